"""The model: its source, its parts, and how its blocks are run one by one."""
