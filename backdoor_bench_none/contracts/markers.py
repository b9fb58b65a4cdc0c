"""The markers of pluggy by which hooks and their implementations are known."""

from __future__ import annotations

import pluggy

PROJECT = "backdoor_bench_none"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
