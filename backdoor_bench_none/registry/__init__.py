"""The components by kind and name, and the plugins that provide them."""
