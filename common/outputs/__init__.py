"""Directories of results: whose files are whose, lists of images, labels of AI-generated ones."""
