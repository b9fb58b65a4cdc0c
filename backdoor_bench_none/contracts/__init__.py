"""The interfaces that plugins implement, and the objects they receive.

Nothing in this package trains, reads files or depends on the registry.
"""
