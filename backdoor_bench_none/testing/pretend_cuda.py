"""A CUDA device that is only pretended: finds device mixing and host synchronisation on machines without a GPU.

Tensors "on" `cuda:0` are ordinary CPU tensors whose storage bears a mark. Every call of torch that Python makes does
about devices what CUDA would do:

- `.device`, `.is_cuda`, `.to()`, `.cpu()`, `.cuda()`, and `device=` of every factory function; results are on the
  device of their operands, views share the mark of their base, gradients that of their tensor;
- mixing devices raises torch's own `RuntimeError`; CPU tensors of no dimension may take part in arithmetic, a CPU index
  may index a CUDA tensor, the reverse raises; `copy_` and assignment to a slice cross devices, `index_put_` does not;
- `.numpy()` and `np.asarray` of a CUDA tensor raise; a CPU generator cannot draw on CUDA, nor the reverse;
- what is drawn on CUDA (dropout, `randn(device="cuda")`) comes from a separate generator, which `torch.manual_seed`
  seeds and which `fork_rng` puts back only if it is told to, as on a GPU;
- `torch.cuda.is_available`, `device_count`, `synchronize`, memory statistics, `get_rng_state`, `is_bf16_supported`,
  `get_device_name` and the like answer; `torch.autocast("cuda")` casts as on the CPU; optimizers and `clip_grad_norm_`
  take their CUDA branches.

Whatever makes the host wait for the GPU (`item`, `bool`, `float`, `tolist`, `.cpu()`, `nonzero`, boolean masks,
`unique`, `bincount`, ...) and every copy from the host is counted by the line of code that it comes from:

    @pytest.fixture
    def gpu():
        with pretend_cuda(roots=["my_package/"]) as gpu:
            yield gpu

    def test_an_epoch_waits_once(gpu):
        train(device="cuda", epochs=1)  # mixing devices raises RuntimeError here
        assert sum(gpu.waits_in("training.py").values()) == 1

With `strict=False` a mix is noted in `gpu.mixed` and the code goes on, so that one run finds them all. Enter the block
before tensors are made: those that exist already are on the CPU.

Only this process is seen: run jobs in it, not in workers. Calls made in C++ (autograd, composite kernels), compiled
code, seconds, memory, cuDNN, and kernels that lack a deterministic or bfloat16 implementation are not seen; numbers are
those of the CPU.
"""
# ruff: noqa: ANN401 - functions of torch take anything

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # optimizers import it, and it must find torch as it is
from torch.nn.utils import clip_grad
from torch.utils import _foreach_utils

from backdoor_bench_none.testing.pretended_device import (
    CPU,
    CUDA,
    PretendedDevice,
    Sightings,
    as_roots,
    holds,
    put,
    tensors_in,
    type_of,
)

NAME = "Pretended GPU"
#: bytes in use, since nothing is measured
ALLOCATED = 1 << 20
#: bytes that are free, and all
MEMORY = (64 << 30, 80 << 30)


class PretendedGenerator(torch.Generator):
    """A generator that says it is on the device it was made for."""

    def __new__(cls, device: Any = "cpu") -> PretendedGenerator:
        """A generator on the CPU."""
        return super().__new__(cls, "cpu")  # type: ignore[call-arg]

    def __init__(self, device: Any = "cpu") -> None:
        self._pretended = CUDA if type_of(device) == "cuda" else CPU

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where it says it is."""
        return self._pretended


@contextmanager
def pretend_cuda(roots: Iterable[str] = (), strict: bool = True, depth: int = 1) -> Iterator[Sightings]:
    """A pretended `cuda:0` within the block; see `Sightings` for the arguments and for what is seen."""
    seen = Sightings(as_roots(roots), strict, depth)
    real_init = torch.autocast.__init__

    def autocast(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        real_init(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    with ExitStack() as stack:
        for module, answers in _answers(seen).items():
            for name, answer in answers.items():
                stack.enter_context(mock.patch.object(module, name, answer))
        stack.enter_context(mock.patch.object(torch.autocast, "__init__", autocast))
        stack.enter_context(PretendedDevice(seen))
        yield seen


def _answers(seen: Sightings) -> dict[Any, dict[str, Any]]:
    """The functions that stand in for those of torch, by module."""
    return {
        torch.cuda: {**_shared(seen), **_of_memory(), **_of_random_numbers(seen), **_of_cuda()},
        torch.cuda.random: {"manual_seed_all": _of_random_numbers(seen)["manual_seed_all"]},
        torch.accelerator: {
            **_shared(seen), "current_device_index": lambda: 0,
            "current_accelerator": lambda check_available=False: torch.device("cuda"),
        },
        torch: {"Generator": PretendedGenerator, "load": _load},
        _foreach_utils: {"_group_tensors_by_device_and_dtype": _group},
        clip_grad: {"_group_tensors_by_device_and_dtype": _group},
    }  # fmt: skip


def _shared(seen: Sightings) -> dict[str, Any]:
    """What `torch.cuda` and `torch.accelerator` have both."""
    stream = mock.Mock(**{"is_capturing.return_value": False})
    return {
        "is_available": lambda: True, "device_count": lambda: 1, "current_stream": lambda device=None: stream,
        "synchronize": lambda device=None: seen.wait("synchronize"),
    }  # fmt: skip


def _of_cuda() -> dict[str, Any]:
    return {
        "current_device": lambda: 0, "_lazy_init": _nothing, "init": _nothing, "is_initialized": lambda: True,
        "set_device": _nothing, "ipc_collect": _nothing, "is_current_stream_capturing": lambda: False,
        "get_device_name": lambda device=None: NAME, "get_device_capability": lambda device=None: (9, 0),
        "is_bf16_supported": lambda including_emulation=True: True,
    }  # fmt: skip


def _of_memory() -> dict[str, Any]:
    names = ("max_memory_allocated", "memory_allocated", "max_memory_reserved", "memory_reserved")
    return {
        **dict.fromkeys(names, lambda device=None: ALLOCATED), "mem_get_info": lambda device=None: MEMORY,
        "reset_peak_memory_stats": _nothing, "empty_cache": _nothing, "set_per_process_memory_fraction": _nothing,
    }  # fmt: skip


def _of_random_numbers(seen: Sightings) -> dict[str, Any]:
    def seed(value: int) -> None:
        seen.random.manual_seed(int(value))

    return {
        "manual_seed": seed, "manual_seed_all": seed, "initial_seed": seen.random.initial_seed,
        "get_rng_state": lambda device="cuda": seen.random.get_state(),
        "get_rng_state_all": lambda: [seen.random.get_state()],
        "set_rng_state": lambda state, device="cuda": seen.random.set_state(state),
        "set_rng_state_all": lambda states: seen.random.set_state(states[0]),
    }  # fmt: skip


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


_real_load, _real_group = torch.load, _foreach_utils._group_tensors_by_device_and_dtype


def _load(file: Any, map_location: Any = None, **kwargs: Any) -> Any:
    """`torch.load` to the pretended device, or to the CPU."""
    on_cuda = isinstance(map_location, str | torch.device | int) and type_of(map_location) == "cuda"
    loaded = _real_load(file, map_location=CPU if on_cuda else map_location, **kwargs)
    return put(loaded) if on_cuda else loaded


def _group(tensors: Any, with_indices: bool = False) -> Any:
    """Tensors by device and type, as optimizers group them."""
    groups = {}
    for (device, dtype), value in _real_group(tensors, with_indices).items():
        first = next(tensors_in(value[0]), None)
        is_here = first is not None and holds(first)
        groups[CUDA if is_here else device, dtype] = value
    return groups
