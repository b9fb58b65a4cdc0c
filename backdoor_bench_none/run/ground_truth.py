"""Which training samples an attack changed, and which ones a defense may be given as clean data."""

from __future__ import annotations

import torch
from torch import Tensor

from backdoor_bench_none.contracts.attack import PoisonedSamples
from backdoor_bench_none.errors import ConfigError


def mark_decoys(samples: PoisonedSamples, size: int) -> Tensor:
    """The training samples (size,) bool that were changed and are neither poisoned nor benign."""
    decoys = torch.zeros(size, dtype=torch.bool)
    if samples.decoys is not None:
        decoys[samples.indices[samples.decoys]] = True
    return decoys


def mark_poisoned(samples: PoisonedSamples, size: int) -> Tensor:
    """The poisoned training samples (size,) bool, without decoys."""
    changed = torch.zeros(size, dtype=torch.bool)
    changed[samples.indices] = True
    return changed & ~mark_decoys(samples, size)


def draw_clean_samples(benign: Tensor, fraction: float, seed: int) -> Tensor:
    """int(fraction * N) indices of training samples that are `benign` (N,) bool.

    The samples of a smaller fraction are among those of a larger one. `ConfigError` if there are too few or none.
    """
    order = torch.randperm(len(benign), generator=torch.Generator().manual_seed(seed))
    count, available = int(fraction * len(benign)), int(benign.sum())
    if not 0 < count <= available:
        asked = f"{count} of {len(benign)} training images; {available} are not poisoned"
        raise ConfigError(f"clean_fraction {fraction} asks for {asked}", "choose a fraction in between")
    return order[benign[order]][:count]
