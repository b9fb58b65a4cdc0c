"""Imports what is not there."""

from backdoor_bench_none.hookspecs import hookimpel  # noqa: F401
