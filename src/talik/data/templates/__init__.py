"""Messages -> text by the model's chat template, with the answers' characters."""
