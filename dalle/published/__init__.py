"""Generators that others published: DALLE-pytorch's layers and layout."""
