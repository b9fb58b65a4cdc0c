"""Imports what is not there."""

from backdoor_bench_none.registry.hookspecs import hookimpel  # noqa: F401
