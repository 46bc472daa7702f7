"""Conditional GAN: Chinese text to product images in one forward pass."""
