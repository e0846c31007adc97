"""Renders messages to text with the model's chat template, and finds the characters of the answers."""
