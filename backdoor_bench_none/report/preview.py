"""A PNG sheet of test images: clean, with the attack's trigger, and their difference."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from backdoor_bench_none.contracts.attack import Attack, AttackTask
from backdoor_bench_none.contracts.context import Context
from backdoor_bench_none.contracts.dataset import Dataset, ImageSet
from backdoor_bench_none.errors import BenchError, ConfigError

COLUMNS = 8
#: the least width of an image on the sheet in pixels; small ones are enlarged by a whole factor
SIDE = 96


def write_preview(attack: Attack, dataset: Dataset, path: Path) -> None:
    """Write a PNG with the first test image of up to eight classes: clean, with the attack, and the difference."""
    dataset.prepare()
    info = dataset.info()
    attack = attack.resolve(info)
    attack.check(info)
    if attack.searches:
        raise ConfigError(
            "this attack finds its triggers in finished networks", "run a cell, then see `bbn results show KEY`"
        )
    test = dataset.load()[1]
    sample = test.take(_first_of_each_class(test)[:COLUMNS])
    triggered = attack.preview(AttackTask(sample, info), Context(torch.device("cpu"), 0))
    difference = (triggered.int() - sample.images.int()).abs().to(torch.uint8)
    rows = [_join(images) for images in (sample.images, triggered, difference)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(torch.cat(rows, dim=1).permute(1, 2, 0).numpy()).save(path, format="PNG")
    except OSError as error:
        raise BenchError(f"'{path}' cannot be written: {error.strerror or error}") from error


def _first_of_each_class(data: ImageSet) -> Tensor:
    classes = torch.unique(data.labels)
    return torch.stack([torch.nonzero(data.labels == label)[0, 0] for label in classes])


def _join(images: Tensor) -> Tensor:
    """Images (N, C, H, W) uint8 side by side with a gap, enlarged (3, H', W')."""
    factor = max(1, -(-SIDE // images.shape[-1]))
    large = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3).expand(-1, 3, -1, -1)
    framed = torch.nn.functional.pad(large, (2, 2, 2, 2), value=128)
    return torch.cat(list(framed), dim=2)
