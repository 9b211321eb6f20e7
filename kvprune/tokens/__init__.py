"""Encoder tokens: which rows see them, where they lie in the image, and which are kept or merged."""
