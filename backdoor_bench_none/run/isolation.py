"""Puts back what a component changed in its process, so that nothing of it reaches what is computed after it."""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch._dynamo  # the first optimizer imports it, which sets a filter and an environment variable
from torch.nn.modules import module as hooks

#: dictionaries of hooks that run in every network of the process
GLOBAL_HOOKS: tuple[MutableMapping[Any, Any], ...] = (
    hooks._global_forward_hooks,
    hooks._global_forward_pre_hooks,
    hooks._global_backward_hooks,
    hooks._global_parameter_registration_hooks,
    hooks._global_module_registration_hooks,
    hooks._global_buffer_registration_hooks,
)
SIGNALS = tuple(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}) if hasattr(signal, "SIGKILL") else ()


@dataclass(frozen=True)
class State:
    """Something that a whole process shares."""

    name: str
    read: Callable[[], Any]
    put_back: Callable[[Any], Any]
    #: whether it is expected to change, so that no word is lost about it
    silent: bool = False


def _put_back_mapping(mapping: MutableMapping[Any, Any], before: MutableMapping[Any, Any]) -> None:
    mapping.clear()
    mapping.update(before)


def _put_back_environment(before: dict[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


def _read_hooks() -> list[dict[Any, Any]]:
    return [dict(mapping) for mapping in GLOBAL_HOOKS]


def _put_back_hooks(before: list[dict[Any, Any]]) -> None:
    for mapping, kept in zip(GLOBAL_HOOKS, before, strict=True):
        _put_back_mapping(mapping, kept)


def _read_deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _put_back_deterministic(before: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _read_backends() -> tuple[Any, ...]:
    cudnn = torch.backends.cudnn
    return cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, torch.backends.mkldnn.enabled


def _put_back_backends(before: tuple[Any, ...]) -> None:
    cudnn = torch.backends.cudnn
    cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = before[:4]
    torch.backends.mkldnn.set_flags(before[4])  # type: ignore[no-untyped-call]


def _read_autocast() -> tuple[bool, bool]:
    return torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


def _put_back_autocast(before: tuple[bool, bool]) -> None:
    for device, enabled in zip(("cpu", "cuda"), before, strict=True):
        torch.set_autocast_enabled(device, enabled)


def _read_signals() -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in SIGNALS}


def _put_back_signals(before: dict[int, Any]) -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in before.items():
        if handler is not None and signal.getsignal(number) != handler:
            with suppress(OSError, ValueError):  # some belong to the system, all to the main thread
                signal.signal(number, handler)


def _put_back_filters(before: list[Any]) -> None:
    warnings.filters[:] = before  # type: ignore[index]
    warnings._filters_mutated()  # type: ignore[attr-defined]


def _put_back_streams(before: tuple[Any, Any]) -> None:
    sys.stdout, sys.stderr = before


def _read_numbers() -> tuple[Any, ...]:
    of_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), of_gpus


def _put_back_numbers(before: tuple[Any, ...]) -> None:
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])
    if before[3]:
        torch.cuda.set_rng_state_all(before[3])


STATES = (
    State("the working directory", os.getcwd, os.chdir),
    State("environment variables", lambda: dict(os.environ), _put_back_environment),
    State("the default dtype", torch.get_default_dtype, torch.set_default_dtype),
    State("the default device", torch.get_default_device, torch.set_default_device),
    State("deterministic algorithms", _read_deterministic, _put_back_deterministic),
    State("switches of torch.backends", _read_backends, _put_back_backends),
    State("float32 precision", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    State("autocast", _read_autocast, _put_back_autocast),
    State("gradients", torch.is_grad_enabled, torch.set_grad_enabled),
    State("anomaly detection", torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    State("the number of threads", torch.get_num_threads, torch.set_num_threads),
    State("hooks of all networks", _read_hooks, _put_back_hooks),
    State("NumPy's handling of errors", np.geterr, lambda before: np.seterr(**before)),
    State("garbage collection", gc.isenabled, lambda before: gc.enable() if before else gc.disable()),
    State("the recursion limit", sys.getrecursionlimit, sys.setrecursionlimit),
    State("warning filters", lambda: list(warnings.filters), _put_back_filters),
    State("signal handlers", _read_signals, _put_back_signals),
    State("standard output", lambda: (sys.stdout, sys.stderr), _put_back_streams),
    State("random numbers", _read_numbers, _put_back_numbers, silent=True),
)


class LeftChangedWarning(UserWarning):
    """A component changed something that the whole process shares; it was put back."""


@contextmanager
def isolated(what: str) -> Iterator[None]:
    """Put back the state of the process after the block, whatever happens in it.

    A warning names what `what` had changed; `RuntimeError` if something cannot be put back.
    """
    before = [state.read() for state in STATES]
    changed: list[str] = []
    try:
        yield
    finally:
        for state, kept in zip(STATES, before, strict=True):
            if state.silent:
                state.put_back(kept)
            elif _differs(state, kept):
                state.put_back(kept)
                changed.append(state.name)
                if _differs(state, kept):
                    raise RuntimeError(f"{what} changed {state.name}, which cannot be put back")
        if torch.is_inference_mode_enabled():
            raise RuntimeError(f"{what} entered torch.inference_mode and did not leave it")
        if changed:
            message = f"{what} left changed, and it was put back: {', '.join(changed)}"
            warnings.warn(message, LeftChangedWarning, stacklevel=3)


def _differs(state: State, before: Any) -> bool:  # noqa: ANN401
    try:
        return bool(state.read() != before)
    except OSError:  # a working directory that was removed
        return True
