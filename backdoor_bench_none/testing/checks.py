"""The checks of all kinds of component, and what checks of single kinds share."""

from __future__ import annotations

import inspect
import pickle
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from backdoor_bench_none.contracts.component import Component
from backdoor_bench_none.seeds import canonical_json
from backdoor_bench_none.testing.bench import Bench
from backdoor_bench_none.words import describe_error, text_of

#: raises AssertionError with the fault and its remedy if the component does not meet the contract
Check = Callable[[Any, Bench], None]


@dataclass(frozen=True)
class Verdict:
    """The result of a check: it passed if there is neither a `reason` why it failed nor one why it was skipped."""

    check: str
    reason: str = ""
    skipped: str = ""


class SkippedError(Exception):
    """A check says nothing on this device; its message is the reason."""


def run_check(check: Check, component: Component, bench: Bench) -> Verdict:
    """Run `check`; any exception of the component is a failure, and global state is restored for the next check."""
    try:
        with _restored_state():
            check(component, bench)
    except SkippedError as error:
        return Verdict(name_of(check), skipped=text_of(error))
    except AssertionError as error:
        return Verdict(name_of(check), text_of(error))
    except Exception as error:  # third-party code may raise anything
        return Verdict(name_of(check), describe_error(error))
    return Verdict(name_of(check))


def name_of(check: Check) -> str:
    """The name of a check: `fields_described` for `check_fields_described`."""
    return str(getattr(check, "__name__", check)).removeprefix("check_")


def require(condition: object, message: str) -> None:
    """Raise `AssertionError` unless `condition` holds, also with `python -O`."""
    if not condition:
        raise AssertionError(message)


def need_repeatable(bench: Bench) -> None:
    """Skip the check unless two runs of one seed give equal numbers, which only a CPU promises."""
    if bench.device.type != "cpu":
        raise SkippedError(f"two runs differ on {bench.device.type}; run it on a CPU")


def check_documented(component: Component, bench: Bench) -> None:
    """The class has its own docstring, which begins with a sentence."""
    text = type(component).__doc__
    require(text and text != Component.__doc__, "the class has no docstring; `bbn show` prints it")
    first = inspect.cleandoc(text or "").split("\n\n")[0]
    require(first.rstrip().endswith((".", ":")), f"the docstring does not begin with a sentence: {first!r}")


def check_fields_described(component: Component, bench: Bench) -> None:
    """Every parameter has a description."""
    bare = [name for name, field in type(component).model_fields.items() if not field.description]
    require(not bare, f"no description of {', '.join(bare)}; write Field(..., description=...)")


def check_unknown_parameter_refused(component: Component, bench: Bench) -> None:
    """A misspelt parameter is an error."""
    try:
        type(component).model_validate({**component.model_dump(), "no_such_parameter": 1})
    except ValidationError:
        return
    raise AssertionError("an unknown parameter is accepted; keep extra='forbid'")


def check_frozen(component: Component, bench: Bench) -> None:
    """Parameters cannot be changed afterwards, since keys depend on them."""
    require(type(component).model_config.get("frozen"), "its parameters can be changed; keep frozen=True")


def check_pickles(component: Component, bench: Bench) -> None:
    """A component sent to another process equals the original."""
    require(
        pickle.loads(pickle.dumps(component)) == component,  # noqa: S301 - our own bytes
        "a pickled copy is not equal to it",
    )


def check_identity(component: Component, bench: Bench) -> None:
    """Parameters survive JSON, and the identity is a function of them."""
    again = type(component)(**component.model_dump(mode="json"))
    require(again == component, f"made again from its parameters as JSON it differs: {again!r}")
    identity = component.identity()
    canonical_json(identity)
    require(again.identity() == identity, "two equal components have different identities, so keys would differ")
    revision = component.revision
    require(isinstance(revision, int) and revision >= 1, f"revision is {revision!r}, not a whole number from 1")


COMPONENT_CHECKS: tuple[Check, ...] = (
    check_documented, check_fields_described, check_unknown_parameter_refused, check_frozen, check_pickles,
    check_identity,
)  # fmt: skip


# what checks of several kinds use


def equal(first: Tensor | None, second: Tensor | None) -> bool:
    """Whether two tensors are equal to the last bit, or both None."""
    if first is None or second is None:
        return first is second
    return first.dtype == second.dtype and torch.equal(first, second)


def same_weights(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether two state dictionaries are equal to the last bit."""
    return first.keys() == second.keys() and all(equal(first[name], second[name]) for name in first)


@contextmanager
def disturbed(seed: int) -> Iterator[None]:
    """Set the global generators to another state inside, and restore them afterwards."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


@contextmanager
def _restored_state() -> Iterator[None]:
    """Restore generators, gradient mode and settings after what is done inside."""
    gradients, dtype, threads = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
    cudnn, strict = torch.backends.cudnn, torch.are_deterministic_algorithms_enabled()
    flags = cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32
    try:
        with disturbed(4321):  # an unlikely seed, so that a component that sets one is noticed
            yield
    finally:
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(dtype)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)
        cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = flags


def global_state() -> dict[str, object]:
    """The global state that a component shares with others in its process, by name."""
    devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return {
        "the state of torch's global generator": tuple(torch.random.get_rng_state().tolist()),
        "the state of CUDA's generators": [tuple(torch.cuda.get_rng_state(index).tolist()) for index in devices],
        "the state of numpy's global generator": repr(np.random.get_state()),
        "the state of Python's global generator": random.getstate(),
        "whether gradients are computed": torch.is_grad_enabled(),
        "the default type of tensors": torch.get_default_dtype(),
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "cudnn.deterministic": torch.backends.cudnn.deterministic,
        "cudnn.allow_tf32": torch.backends.cudnn.allow_tf32,
        "whether algorithms must be deterministic": torch.are_deterministic_algorithms_enabled(),
        "the number of threads": torch.get_num_threads(),
    }


@contextmanager
def left_alone() -> Iterator[None]:
    """Raise `AssertionError` if what is done inside changes the global state."""
    before = global_state()
    yield
    changed = [name for name, value in global_state().items() if value != before[name]]
    require(not changed, f"it changes {', '.join(changed)}; use context.generator, and restore what you change")
