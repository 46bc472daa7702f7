"""Stage 1: the image tokenizer (VQVAE / VQGAN)."""
