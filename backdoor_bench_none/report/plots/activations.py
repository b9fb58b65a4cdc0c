"""The values of neurons on benign images and on the same images with their trigger, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu, wilcoxon
from torch import Tensor, nn

from backdoor_bench_none.contracts.network import Pixels
from backdoor_bench_none.errors import BenchError, ConfigError
from backdoor_bench_none.inspection.layers import Layer
from backdoor_bench_none.inspection.neurons import collect_activations, find_layers
from backdoor_bench_none.report.plots.canvas import (
    BINS,
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

    from backdoor_bench_none.run.stages import Stages

#: the most images of each kind; more do not change the shares visibly
MAX_IMAGES = 2000
#: the number of layers shown by default: the last ones, as in Fig. 5
LAST = 4


@dataclass(frozen=True)
class LayerValues:
    """The values of a layer's neurons on both kinds of image, (C, N) each.

    A value is the largest over the neuron's map, before the activation.
    """

    name: str
    benign: NDArray[np.float32]
    triggered: NDArray[np.float32]
    #: the network it belongs to, where a picture shows several
    network: str = ""


@dataclass(frozen=True)
class Activations:
    """The values of some layers of one network, in order of execution."""

    layers: list[LayerValues]
    images: int
    title: str


def read_activations(
    stages: Stages, patterns: Sequence[str] = (), images: tuple[Tensor, Tensor] | None = None
) -> Activations:
    """The activations of a finished cell's defended network on test images, clean and with their trigger.

    `images`: pairs from `pair_images` of another cell, for a network without a trigger of its own.
    """
    benign, triggered = images or pair_images(stages)
    model, context = stages.network(), stages.context
    pixels = Pixels.of(stages.cell.info, context.device)
    layers = choose_layers(model, pixels.normalize(benign[:1]), patterns)
    before, after = (
        collect_activations(model, layers, "pre_activation", each, pixels, context)[0] for each in (benign, triggered)
    )
    values = [LayerValues(layer.name, before[layer.name].numpy(), after[layer.name].numpy()) for layer in layers]
    return Activations(values, len(benign), plain(stages.cell.title, 100))


def pair_images(stages: Stages) -> tuple[Tensor, Tensor]:
    """Up to `MAX_IMAGES` test images (N, C, H, W) spread over the set, and the same images with the trigger."""
    test, samples = stages.data()[1], stages.poison()[1]
    indices, images = samples.indices, samples.images
    if stages.cell.attack.component.searches:
        triggers = stages.search()
        stamped = [triggers.stamp(index, test) for index in range(len(triggers.labels))]
        indices = torch.cat([samples.indices for samples in stamped])
        images = torch.cat([samples.images for samples in stamped])
    if not len(indices):
        name = plain(stages.cell.attack.label)
        raise ConfigError(f"the attack '{name}' triggers no test image", "choose an attack that does with -a")
    kept = torch.arange(0, len(indices), -(-len(indices) // MAX_IMAGES))
    return test.images[indices[kept]], images[kept]


def choose_layers(model: nn.Module, example: Tensor, patterns: Sequence[str] = ()) -> list[Layer]:
    """The layers that match a pattern; without patterns, the last `LAST` hidden ones."""
    layers = find_layers(model, example)
    if not layers:
        raise BenchError("this network has no hidden layer", "there is nothing to draw")
    matches = [layer for layer in layers if _matches(layer.name, patterns)]
    if patterns and not matches:
        names = ", ".join(plain(layer.name) for layer in layers)
        raise ConfigError(f"no layer matches '{plain(' '.join(patterns))}'", f"there are: {names}")
    check_count("layers", len(matches), MAX_PANELS)
    return matches or layers[-LAST:]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def compare_values(layer: LayerValues) -> dict[str, float]:
    """How far the values on triggered images are from those on benign ones.

    Means; shares of values above 0, the linear piece of ReLU and its kin; `overlap`, the common area of both
    histograms; `auroc`, the chance that a triggered image has a higher mean over the layer's neurons than a benign one,
    which is the Mann-Whitney U statistic divided by the number of pairs of images. `p` is that of Wilcoxon's signed
    rank test, two-sided, over images: each is compared with its own triggered copy, and neurons of one image are not
    independent. `BenchError` if values are not finite.
    """
    groups = (layer.benign, layer.triggered)
    if not all(np.isfinite(values).all() for values in groups):
        raise BenchError(
            f"values of the layer {plain(layer.name)} are not finite",
            "the network has diverged; see `bbn results show`",
        )
    edges = np.histogram_bin_edges(np.concatenate([values.ravel() for values in groups]), BINS)
    shares = [np.histogram(values, edges)[0] / values.size for values in groups]
    means = [values.mean(0, dtype=np.float64) for values in groups]
    pairs = len(means[0]) * len(means[1])
    p = 1.0
    if (means[0] != means[1]).any():
        p = float(wilcoxon(means[1], means[0]).pvalue)
    return {
        "mean_benign": float(means[0].mean()),
        "mean_triggered": float(means[1].mean()),
        "positive_benign": float((layer.benign > 0).mean()),
        "positive_triggered": float((layer.triggered > 0).mean()),
        "overlap": float(np.minimum(*shares).sum()),
        "auroc": float(mannwhitneyu(means[1], means[0]).statistic) / pairs,
        "p": p,
    }


def _title_of(layer: LayerValues) -> str:
    """The layer, and how well its values tell triggered images."""
    compared = compare_values(layer)
    name = plain(": ".join(filter(None, (layer.network, layer.name))))
    return f"{name}, overlap {compared['overlap']:.2f}, AUROC {compared['auroc']:.2f}"


def draw_activations(activations: Activations) -> Figure:
    """A panel for each layer with both histograms over all its neurons and images, in percent."""
    values = "all neurons before the activation, the largest value over the map"
    note = f"{values}, on {activations.images:,} pairs of test images"
    figure, axes = make_panels(len(activations.layers), activations.title, [note], height=1.7)
    handles, labels = list[Any](), list[str]()
    for axis, layer in zip(axes, activations.layers, strict=True):
        groups = {"benign": layer.benign.ravel(), "triggered": layer.triggered.ravel()}
        handles, labels = draw_shares(axis, groups), list(groups)
        set_title(axis, _title_of(layer))
    label_axes(axes, "value of a neuron", "share of the values (%)")
    add_legend(figure, handles, labels)
    return figure
