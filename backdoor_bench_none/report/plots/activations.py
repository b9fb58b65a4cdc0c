"""The values of neurons on benign images and on the same images with their trigger, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from backdoor_bench_none.contracts.network import Pixels
from backdoor_bench_none.errors import BenchError, ConfigError
from backdoor_bench_none.inspection.neurons import Layer, collect_activations, find_layers
from backdoor_bench_none.report.plots.canvas import (
    MAX_PANELS,
    add_legend,
    check_count,
    draw_shares,
    label_axes,
    make_panels,
    plain,
    set_title,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from backdoor_bench_none.report.plots.finished import FinishedStages

#: images of each kind, at most: shares no longer change visibly
MAX_IMAGES = 2000
#: layers shown where none are named: the last ones, as in Fig. 5
LAST = 4


@dataclass(frozen=True)
class LayerValues:
    """A layer's neurons on both kinds of image, (C, N) each: the largest value over the map, before the activation."""

    name: str
    benign: NDArray[np.float32]
    triggered: NDArray[np.float32]


@dataclass(frozen=True)
class Activations:
    """The layers of one network in order of execution."""

    layers: list[LayerValues]
    images: int
    title: str


def read_activations(stages: FinishedStages, patterns: Sequence[str] = ()) -> Activations:
    """The defended network of a finished cell on test images and on the same ones with their trigger."""
    benign, triggered = _paired_images(stages)
    model, context = stages.network(), stages.context
    pixels = Pixels.of(stages.cell.info, context.device)
    layers = choose_layers(model, pixels.normalize(benign[:1]), patterns)
    values = [collect_activations(model, layers, "pre_activation", x, pixels, context)[0] for x in (benign, triggered)]
    found = [LayerValues(layer.name, *(v[layer.name].numpy() for v in values)) for layer in layers]
    return Activations(found, len(benign), plain(stages.cell.title, 100))


def _paired_images(stages: FinishedStages) -> tuple[Tensor, Tensor]:
    """Up to `MAX_IMAGES` test images (N, C, H, W) spread over the set, and the same ones triggered."""
    test, samples = stages.data()[1], stages.poison()[1]
    indices, images = samples.indices, samples.images
    if stages.cell.attack.component.searches:
        found = stages.search()
        parts = [found.stamp(index, test) for index in range(len(found.labels))]
        indices, images = (torch.cat([getattr(part, name) for part in parts]) for name in ("indices", "images"))
    if not len(indices):
        name = plain(stages.cell.attack.label)
        raise ConfigError(f"the attack '{name}' triggers no test image", "choose an attack that does with -a")
    kept = torch.arange(0, len(indices), -(-len(indices) // MAX_IMAGES))
    return test.images[indices[kept]], images[kept]


def choose_layers(model: nn.Module, example: Tensor, patterns: Sequence[str] = ()) -> list[Layer]:
    """The layers that match a pattern, or without patterns the last four that are hidden."""
    found = find_layers(model, example)
    if not found:
        raise BenchError("this network has no hidden layer", "there is nothing to draw")
    chosen = [layer for layer in found if any(fnmatchcase(layer.name, pattern) for pattern in patterns)]
    if patterns and not chosen:
        names = ", ".join(plain(layer.name) for layer in found)
        raise ConfigError(f"no layer matches '{plain(' '.join(patterns))}'", f"there are: {names}")
    check_count("layers", len(chosen), MAX_PANELS)
    return chosen or found[-LAST:]


def draw_activations(activations: Activations) -> Figure:
    """A panel for each layer: both histograms over all its neurons and images, in percent."""
    of = "all neurons before the activation, the largest value over the map"
    note = f"{of}, on {activations.images:,} pairs of test images"
    figure, axes = make_panels(len(activations.layers), activations.title, [note], height=1.7)
    handles, labels = list[Any](), list[str]()
    for axis, layer in zip(axes, activations.layers, strict=True):
        values = {"benign": layer.benign.ravel(), "triggered": layer.triggered.ravel()}
        handles, labels = draw_shares(axis, values, counted=False)
        set_title(axis, plain(layer.name))
    label_axes(axes, "value of a neuron", "share of the values (%)")
    add_legend(figure, handles, labels)
    return figure
