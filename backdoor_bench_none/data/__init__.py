"""The built-in data sets, and loaders for the user's own images."""
