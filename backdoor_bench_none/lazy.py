"""Imports of large libraries that wait until something of them is used.

`bbn plan` and `bbn table` import the modules of all components, which import torch, and need nothing of it.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

#: attributes that `inspect`, `warnings` and others look for in every module there is
ASKED_OF_ALL = ("__file__", "__wrapped__", "__warningregistry__")


class Unloaded(ModuleType):
    """Stands in `sys.modules` for a module that has not been needed, and passes on what is asked of it.

    `import torch` and `import torch.nn as nn` find it and load nothing. The first use of an attribute, `from torch
    import nn`, and the import of any other part import the library.
    """

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        if name in ASKED_OF_ALL:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(_load(self.__name__), name)


def _load(name: str) -> ModuleType:
    """The real module, which takes the place of what stands for it and for all of its library."""
    if name in sys.modules and not isinstance(sys.modules[name], Unloaded):
        return sys.modules[name]
    library = name.partition(".")[0]
    for other, module in list(sys.modules.items()):
        if isinstance(module, Unloaded) and other.partition(".")[0] == library:
            del sys.modules[other]
    return importlib.import_module(name)


def import_when_used(*names: str) -> None:
    """Let the first import of these modules wait until they are used; a part stands after its library.

    A library that has been imported stays as it is.
    """
    for name in names:
        library, _, part = name.rpartition(".")
        if name in sys.modules or (library and not isinstance(sys.modules.get(library), Unloaded)):
            continue
        sys.modules[name] = Unloaded(name)
        if library:
            setattr(sys.modules[library], part, sys.modules[name])
