"""Inspection of networks: their neurons, their features and the outputs of their modules."""
