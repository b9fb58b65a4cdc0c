"""Restores names that numpy 2 removed and BackdoorBench uses, in its processes only."""

from __future__ import annotations

from typing import Any

import numpy as np

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
