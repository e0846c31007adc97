"""The computer: devices, memory, limits and rates; measured here or described in a file."""
