"""The model: where it comes from, what it consists of, and how to run its blocks one by one."""
