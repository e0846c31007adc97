"""Renders messages by the model's chat template, and finds the characters of the answers."""
