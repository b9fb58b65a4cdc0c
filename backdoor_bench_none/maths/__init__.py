"""Numerical methods that know nothing of the project."""
