"""What several tests use: small models, tokenizers, rows and references."""
