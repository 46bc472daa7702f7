"""Image tokenizers that others published: their encoders and decoders, and reading their files."""
