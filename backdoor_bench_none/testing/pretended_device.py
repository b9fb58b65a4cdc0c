"""The rules of CUDA about devices, applied to CPU tensors that bear a mark; see `testing/pretend_cuda.py`."""
# ruff: noqa: ANN401 - the arguments of torch's calls may be anything

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
TWO_DEVICES = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
FOREIGN_INDEX = "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
NO_NUMPY = "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
TO_HOST = "copy to the host"
#: the modules that no line is named of
OWN_FILES = ("testing/pretended_device.py", "testing/pretend_cuda.py")

#: the kind of a wait or copy, and the line that it comes from
Site = tuple[str, str]

#: reading a value on the host, which waits for all work on the device
READS = {
    "item": "item", "__bool__": "bool()", "is_nonzero": "bool()", "__float__": "float()", "__int__": "int()",
    "__index__": "int()", "__complex__": "complex()", "tolist": "tolist", "equal": "equal", "allclose": "allclose",
    "__repr__": "repr", "__format__": "format", "__contains__": "in", "__reduce_ex__": "pickle",
}  # fmt: skip
#: calls whose results have a size that is known on the device alone
SIZED_BY_DEVICE = {
    "nonzero": "nonzero", "argwhere": "nonzero", "masked_select": "boolean mask", "unique": "unique",
    "_unique2": "unique", "_return_output": "unique", "_return_inverse": "unique", "_return_counts": "unique",
    "unique_consecutive": "unique", "bincount": "bincount", "masked_scatter": "boolean mask", "one_hot": "one_hot",
    "histc": "histc",
}  # fmt: skip
#: calls that read on the host whether they succeeded
CHECKED = {
    "svd", "linalg_svd", "linalg_svdvals", "linalg_eigh", "linalg_eig", "linalg_qr", "linalg_cholesky", "linalg_inv",
    "linalg_solve", "linalg_lstsq", "pca_lowrank", "svd_lowrank",
}  # fmt: skip
#: calls whose operands of no dimension must be on the device too
NO_SCALARS = {
    "cat", "concat", "concatenate", "stack", "hstack", "vstack", "matmul", "mm", "bmm", "linear", "conv1d", "conv2d",
    "conv3d", "embedding", "index_select", "gather", "scatter", "scatter_", "dot", "einsum", "addmm",
}  # fmt: skip
#: calls that may take tensors of both devices
CROSSING = {"copy_", "__set__", "set_", "_foreach_copy_", "module_load", "_has_compatible_shallow_copy_type"}
RANDOM = {
    "dropout", "dropout_", "feature_dropout", "alpha_dropout", "dropout1d", "dropout2d", "dropout3d", "rand", "randn",
    "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli", "bernoulli_", "normal", "normal_",
    "uniform_", "multinomial", "random_", "exponential_", "rrelu", "gumbel_softmax",
}  # fmt: skip
LEFT_ALONE = {"untyped_storage", "storage", "_typed_storage", "data_ptr", "storage_offset"}


def holds(tensor: torch.Tensor) -> bool:
    """Whether a tensor is on the pretended device."""
    storage = _storage(tensor)
    return storage is not None and getattr(storage, "_pretended_cuda", False)


def put(value: Any) -> Any:
    """`value`, all of whose tensors are on the device from now on, where they are."""
    for tensor in tensors_in(value):
        if (storage := _storage(tensor)) is not None:
            storage._pretended_cuda = True  # type: ignore[attr-defined]
    return value


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)


def type_of(device: Any) -> str:
    """`cpu` or `cuda`; a number is that of a GPU."""
    return "cuda" if isinstance(device, int) else torch.device(device).type


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """The storage below what torch.func wraps around a tensor; None for sparse tensors, which have none."""
    functorch = torch._C._functorch
    with torch._C.DisableTorchFunction():
        while functorch.is_functorch_wrapped_tensor(tensor):
            tensor = functorch.get_unwrapped(tensor)
        try:
            return tensor.untyped_storage()
        except (RuntimeError, NotImplementedError):
            return None


@dataclass
class Sightings:
    """What code did with the pretended device: `mixed` devices, `waits` of the host and `copies` from it.

    Waits and copies are counts by kind and line. `roots` are parts of the names of the files whose lines are named, by
    default all outside torch; `depth` is how many lines of the stack are named. With `strict` mixing devices raises.
    """

    roots: tuple[str, ...] = ()
    strict: bool = True
    depth: int = 1
    mixed: list[str] = field(default_factory=list)
    waits: Counter[Site] = field(default_factory=Counter)
    copies: Counter[Site] = field(default_factory=Counter)
    #: the generator of the device
    random: torch.Generator = field(default_factory=torch.Generator)
    _last: tuple[Counter[Site], Counter[Site]] = (Counter(), Counter())

    def waits_in(self, part: str) -> dict[Site, int]:
        """The waits at lines whose file name holds `part`."""
        return {site: count for site, count in self.waits.items() if part in site[1]}

    def lap(self) -> tuple[Counter[Site], Counter[Site]]:
        """The waits and copies since the last lap."""
        now = Counter(self.waits), Counter(self.copies)
        since = now[0] - self._last[0], now[1] - self._last[1]
        self._last = now
        return since

    def wait(self, kind: str) -> None:
        """Count a wait of the host for the device."""
        self.waits[kind, self._line()] += 1

    def copy(self, kind: str) -> None:
        """Count a copy from the host to the device."""
        self.copies[kind, self._line()] += 1

    def mix(self, what: str, message: str, error: type[Exception] = RuntimeError) -> None:
        """Note that devices are mixed, and raise what CUDA would."""
        self.mixed.append(f"{self._line()}: {what}: {message}")
        if self.strict:
            raise error(message)

    def _line(self) -> str:
        """The innermost lines of the watched code on the stack."""
        frame: FrameType | None = sys._getframe(1)
        lines: list[str] = []
        while frame is not None and len(lines) < self.depth:
            if self._is_watched(name := frame.f_code.co_filename):
                lines.append(f"{'/'.join(name.split('/')[-2:])}:{frame.f_lineno}")
            frame = frame.f_back
        return " < ".join(lines) or "elsewhere"

    def _is_watched(self, name: str) -> bool:
        if name.endswith(OWN_FILES):
            return False
        if self.roots:
            return any(root in name for root in self.roots)
        return "/torch/" not in name


class PretendedDevice(TorchFunctionMode):
    """Sees every call of torch that Python makes, does about devices what CUDA would do, and notes it in `seen`."""

    def __init__(self, seen: Sightings) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            return self._get(func, args, kwargs)
        if name in LEFT_ALONE:
            return func(*args, **kwargs)
        if args and isinstance(args[0], torch.Tensor):
            if name in ("to", "cpu", "cuda"):
                return self._move(name, args, kwargs)
            if name in ("__getitem__", "__setitem__"):
                return self._index(name, func, args, kwargs)
        return self._call(name, func, args, kwargs)

    def _call(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Any other call: its result is on the device that is named, else on that of its operands."""
        tensors = list(tensors_in((args, kwargs)))
        on_cuda = [holds(tensor) for tensor in tensors]
        named = None if kwargs.get("device") is None else type_of(kwargs["device"])
        if named == "cuda":
            kwargs["device"] = CPU
        lands_on_cuda = any(on_cuda) if named is None else named == "cuda"
        if any(on_cuda):
            self._count_reads(name, len(args) + len(kwargs), len(tensors), kwargs)
            if named == "cpu":
                self.seen.wait(TO_HOST)
            if not all(on_cuda):
                self._check_mix(name, tensors, on_cuda)
        elif lands_on_cuda and name in ("tensor", "as_tensor", "asarray"):
            self.seen.copy(name)
        result = self._draw(name, func, args, kwargs, lands_on_cuda) if name in RANDOM else func(*args, **kwargs)
        return put(result) if lands_on_cuda and name not in READS else result

    def _get(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An attribute of a tensor."""
        attribute, is_here = func.__self__.__name__, holds(args[0])
        if is_here and attribute in ("device", "is_cuda", "is_cpu"):
            return {"device": CUDA, "is_cuda": True, "is_cpu": False}[attribute]
        result = func(*args, **kwargs)
        if is_here and attribute in ("grad", "_grad") and isinstance(result, torch.Tensor):
            put(result)
        return result

    def _count_reads(self, name: str, arguments: int, tensors: int, kwargs: Any) -> None:
        """Count a call that makes the host wait."""
        if name in ("numpy", "__array__"):
            self.seen.mix(name, NO_NUMPY, TypeError)
        if (kind := READS.get(name) or SIZED_BY_DEVICE.get(name)) is not None:
            self.seen.wait(kind)
        elif name in CHECKED or name == "tensor":
            self.seen.wait(name)
        elif name == "where" and arguments == 1:
            self.seen.wait("nonzero")
        elif name == "repeat_interleave" and tensors > 1 and "output_size" not in kwargs:
            self.seen.wait(name)

    def _check_mix(self, name: str, tensors: list[torch.Tensor], on_cuda: list[bool]) -> None:
        """Note a mix if the call may not take tensors of both devices."""
        if name == "copy_" and on_cuda[0]:
            self.seen.copy(name)
        elif name == "copy_":
            self.seen.wait(TO_HOST)
        if name in CROSSING:
            return
        foreign = [tensor for tensor, cuda in zip(tensors, on_cuda, strict=True) if not cuda]
        if name in NO_SCALARS or any(tensor.dim() for tensor in foreign):
            self.seen.mix(name, TWO_DEVICES)

    def _move(self, name: str, args: Any, kwargs: Any) -> Any:
        """`.to`, `.cpu` and `.cuda`."""
        tensor, is_here = args[0], holds(args[0])
        if name == "to":
            rest, goes_there = self._target(is_here, list(args[1:]), kwargs)
        else:
            rest, goes_there = [CPU], name == "cuda"
            kwargs.pop("device", None)
        if is_here != goes_there:
            kwargs["copy"] = True
            if goes_there:
                self.seen.copy("to the device")
            elif not kwargs.get("non_blocking"):
                self.seen.wait(TO_HOST)
        result = torch.Tensor.to(tensor, *rest, **kwargs)
        return put(result) if goes_there else result

    def _target(self, is_here: bool, rest: list[Any], kwargs: Any) -> tuple[list[Any], bool]:
        """The arguments of `.to` for the CPU, and whether its result is on the device; `kwargs` are changed."""
        goes_there = is_here
        for index, value in enumerate(rest):
            if isinstance(value, torch.Tensor):
                goes_there, rest[index] = holds(value), value.dtype
            elif isinstance(value, str | torch.device) or (index == 0 and type(value) is int):
                goes_there, rest[index] = type_of(value) == "cuda", CPU
        if kwargs.get("device") is not None:
            goes_there, kwargs["device"] = type_of(kwargs["device"]) == "cuda", CPU
        if isinstance(other := kwargs.get("other"), torch.Tensor):
            goes_there = holds(other)
        return rest, goes_there

    def _index(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """`x[index]` and `x[index] = value`."""
        is_here, indices = holds(args[0]), list(tensors_in(args[1]))
        fills_by_value = name == "__setitem__" and not _dimensions(args[2])
        for index in indices:
            self._check_index(name, index, is_here, fills_by_value)
        if name == "__setitem__" and isinstance(value := args[2], torch.Tensor) and holds(value) != is_here:
            is_advanced = any(index.dim() or index.dtype == torch.bool for index in indices)
            if value.dim() and is_advanced:
                self.seen.mix(name, TWO_DEVICES)
            elif is_here:
                self.seen.copy("slice from the host")
            else:
                self.seen.wait(TO_HOST)
        result = func(*args, **kwargs)
        return put(result) if is_here else result

    def _check_index(self, name: str, index: torch.Tensor, is_here: bool, fills_by_value: bool) -> None:
        """One tensor among the indices of a tensor that is here or on the CPU."""
        cuda, is_mask = holds(index), index.dtype in (torch.bool, torch.uint8)
        if not index.dim() and not is_mask:  # its value becomes a whole number
            if cuda:
                self.seen.wait("index by a value")
        elif cuda and not is_here:
            self.seen.mix(name, FOREIGN_INDEX)
        elif cuda and is_mask and not fills_by_value:
            self.seen.wait("boolean mask")
        elif is_here and not cuda:
            self.seen.copy("index from the host")

    def _draw(self, name: str, func: Any, args: Any, kwargs: Any, on_cuda: bool) -> Any:
        """Random numbers, from the generator of their device."""
        if (generator := kwargs.get("generator")) is not None:
            wanted, actual = "cuda" if on_cuda else "cpu", generator.device.type
            if wanted != actual:
                self.seen.mix(name, f"Expected a '{wanted}' device type for generator but found '{actual}'")
        if not on_cuda or generator is not None:
            return func(*args, **kwargs)
        before = torch.default_generator.get_state()
        torch.default_generator.set_state(self.seen.random.get_state())
        try:
            return func(*args, **kwargs)
        finally:
            self.seen.random.set_state(torch.default_generator.get_state())
            torch.default_generator.set_state(before)


def _dimensions(value: Any) -> int:
    return value.dim() if isinstance(value, torch.Tensor) else 0


def as_roots(roots: Iterable[str]) -> tuple[str, ...]:
    """Parts of file names, of which a single one may be given alone."""
    return (roots,) if isinstance(roots, str) else tuple(roots)
