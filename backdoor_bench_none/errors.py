"""Errors that a user can correct: the message says what is wrong, the hint what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of the `bbn` command."""

    #: everything that was requested is there
    OK = 0
    #: at least one cell failed or timed out
    CELLS_FAILED = 1
    #: the command line, the configuration or the data are wrong
    USAGE_ERROR = 2
    #: a bug in this package
    INTERNAL_ERROR = 3
    #: the selection matches no cell
    NOTHING_SELECTED = 5
    #: stopped by Ctrl-C
    INTERRUPTED = 130


class BenchError(Exception):
    """Base of all errors that are reported without a traceback."""

    exit_code = ExitCode.USAGE_ERROR

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"

    def __reduce__(self) -> tuple[type[BenchError], tuple[str, str | None]]:
        return type(self), (self.message, self.hint)


class ConfigError(BenchError):
    """The benchmark file, or a parameter in it, is wrong."""


class DatasetError(BenchError):
    """A data set is missing, unreadable or not as expected."""


class PluginError(BenchError):
    """A plugin is broken, or two plugins provide the same name."""


class StoreError(BenchError):
    """The results folder cannot be written, or an artifact in it is damaged."""


class NothingSelectedError(BenchError):
    """The selection matches no cell."""

    exit_code = ExitCode.NOTHING_SELECTED


class TrainingError(BenchError):
    """A network failed to train: its loss is not finite, or no better than chance."""


class DeadlineError(BenchError):
    """A stage ran past its deadline."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown `name`: the closest known name, or all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known: {', '.join(names) or 'nothing'}"
