"""Small pictures of triggers as data URIs: test images above, the same with the trigger, and their difference."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from backdoor_bench_none.contracts.attack import Attack, AttackTask
from backdoor_bench_none.contracts.context import Context
from backdoor_bench_none.contracts.dataset import Dataset, ImageSet
from backdoor_bench_none.errors import BenchError
from backdoor_bench_none.report.html.source import MakePair, Pair
from backdoor_bench_none.report.html.texts import clean_line

#: images side by side, the most pixels of their longer side, pictures of a report, and characters of all pictures
COLUMNS, SIDE, MOST, BUDGET = 4, 64, 24, 400_000
#: the number of test images among which those of different classes are chosen
SEARCHED = 2000


@dataclass(frozen=True)
class Preview:
    """A picture as a data URI and its description; if there is no picture, `source` is empty and `text` says why."""

    source: str
    text: str


class NothingToShowError(Exception):
    """An attack has no picture; the message says why."""


def make_previews(pairs: Mapping[Pair, MakePair]) -> dict[Pair, Preview]:
    """A preview for every data set and attack, within `MOST` and `BUDGET`; every data set is read once."""
    images: dict[str, ImageSet | str] = {}
    previews: dict[Pair, Preview] = {}
    shown = spent = 0
    for pair, make in pairs.items():
        preview = Preview("", f"a report has {MOST} pictures at most")
        if shown < MOST and spent < BUDGET:
            preview = _make(pair, make, images)
        if spent + len(preview.source) > BUDGET:
            preview = Preview("", "this picture would make the report too large")
        if preview.source:
            shown += 1
        spent += len(preview.source)
        previews[pair] = preview
    return previews


def _make(pair: Pair, make: MakePair, images: dict[str, ImageSet | str]) -> Preview:
    try:
        dataset, attack = make()
        if attack.searches:
            raise NothingToShowError("this attack finds its triggers in finished networks")
        if pair[0] not in images:
            images[pair[0]] = _read(dataset)
        sample = images[pair[0]]
        if isinstance(sample, str):
            raise NothingToShowError(sample)
        return Preview(*_draw(pair, dataset, attack, sample))
    except NothingToShowError as reason:
        return Preview("", str(reason))
    except BenchError as error:
        return Preview("", clean_line(error.message))
    except Exception as error:  # third-party code may raise anything
        return Preview("", clean_line(f"no picture: {type(error).__name__}: {error}"))


def _read(dataset: Dataset) -> ImageSet | str:
    """The first test image of some classes, or why there is none."""
    try:
        dataset.fingerprint()
        test = dataset.load()[1]
    except BenchError:
        return "the data set is not on this machine"
    if test.images.ndim != 4 or test.images.shape[1] not in (1, 3):
        return "its samples are not pictures"
    labels = test.labels[:SEARCHED]
    first = [int(torch.nonzero(labels == label)[0, 0]) for label in torch.unique(labels)[:COLUMNS]]
    return test.take(torch.tensor(first, dtype=torch.int64))


def _draw(pair: Pair, dataset: Dataset, attack: Attack, sample: ImageSet) -> tuple[str, str]:
    info = dataset.info()
    triggered = attack.resolve(info).preview(AttackTask(sample, info), Context(torch.device("cpu"), 0))
    difference = (triggered.int() - sample.images.int()).abs()
    if not bool(difference.any()):
        raise NothingToShowError("this attack changes none of these test images")
    picture = torch.cat([_join(rows.to(torch.uint8)) for rows in (sample.images, triggered, difference)], dim=1)
    buffer = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(buffer, format="PNG", optimize=True)
    changed = float((difference > 0).any(1).float().mean())
    text = (
        f"{len(sample)} test images of {clean_line(pair[0], 60)}: clean, with {clean_line(pair[1], 60)}, and the "
        f"difference, of {int(difference.max())} of 255 at most; {100 * changed:.1f} % of the pixels change"
    )
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}", text


def _join(images: Tensor) -> Tensor:
    """Images (N, C, H, W) uint8 side by side with a gap (3, H', W'); large ones are subsampled."""
    step = max(1, -(-max(images.shape[-2:]) // SIDE))
    framed = torch.nn.functional.pad(images[..., ::step, ::step].expand(-1, 3, -1, -1), (1, 1, 1, 1), value=128)
    return torch.cat(list(framed), dim=2)
