"""Numerical methods that are independent of the project."""
