"""The pluggy markers of hooks and of their implementations."""

from __future__ import annotations

import pluggy

PROJECT = "backdoor_bench_none"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
