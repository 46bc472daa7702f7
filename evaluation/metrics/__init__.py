"""Measures of sets of images, each with its interval."""
