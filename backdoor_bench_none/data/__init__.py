"""Data sets: images as uint8 tensors, their facts, and the loaders of the built-in ones."""
