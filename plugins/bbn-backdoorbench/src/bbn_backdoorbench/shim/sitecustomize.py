"""Lets BackdoorBench run on a current stack: names that numpy 2 and torch removed, modules that it moved itself."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from torch.utils.data.dataloader import _BaseDataLoaderIter

for name, value in {"infty": np.inf, "float": float, "int": int, "object": object}.items():
    if name not in vars(np):
        setattr(np, name, value)

_asarray = np.asarray


def asarray(values: Any, *args: Any, **keywords: Any) -> Any:  # noqa: ANN401
    """np.asarray as before numpy 1.24, where lists of unequal lengths become an array of objects."""
    try:
        return _asarray(values, *args, **keywords)
    except ValueError as error:
        if "inhomogeneous" not in str(error):
            raise
        return _asarray(values, dtype=object)


np.asarray = asarray  # type: ignore[assignment]

# bnp calls it; torch removed it in 1.13
if not hasattr(_BaseDataLoaderIter, "next"):
    _BaseDataLoaderIter.next = _BaseDataLoaderIter.__next__  # type: ignore[attr-defined]


class Moved(ModuleType):
    """`defense.NAME`, under which ep and bnp import what the toolbox now keeps in `utils.defense_utils.NAME`."""

    def __getattr__(self, name: str) -> ModuleType:
        """The module at its present place, so that its classes exist once."""
        if name.startswith("__"):
            raise AttributeError(name)
        return import_module(f"utils.defense_utils.{self.__name__.rpartition('.')[2]}.{name}")


for name in ("dde", "mbns"):
    moved = Path("utils", "defense_utils", name).is_dir() and not Path("defense", name).exists()
    if moved:
        sys.modules[f"defense.{name}"] = Moved(f"defense.{name}")
