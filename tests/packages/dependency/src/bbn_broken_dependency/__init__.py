"""Needs a package that is not installed."""

import bbn_broken_needs_this  # noqa: F401
