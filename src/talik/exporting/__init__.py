"""A run's result as a plain Transformers folder or a PEFT adapter."""
