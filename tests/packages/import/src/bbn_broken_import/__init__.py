"""Imports what is not there."""

from backdoor_bench_none.api import hookimpel  # noqa: F401
