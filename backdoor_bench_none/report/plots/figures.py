"""The figures of the paper: from the finished cells of its benchmark to a picture and the numbers behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from backdoor_bench_none.contracts.attack import StampAttack
from backdoor_bench_none.contracts.context import Context
from backdoor_bench_none.contracts.network import Pixels, predict_logits
from backdoor_bench_none.planning.stage_table import record_key
from backdoor_bench_none.report.plots import regions
from backdoor_bench_none.report.plots.activations import (
    Activations,
    LayerValues,
    compare_values,
    draw_activations,
    pair_images,
    read_activations,
)
from backdoor_bench_none.report.plots.labels import find_metrics
from backdoor_bench_none.report.plots.sweep import draw_sweep, find_sweep
from backdoor_bench_none.report.plots.triggers import draw_sheets, make_sheets
from backdoor_bench_none.results.rows import make_rows
from backdoor_bench_none.run.stages import Stages

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from backdoor_bench_none.contracts.cell import Cell
    from backdoor_bench_none.contracts.record import Record
    from backdoor_bench_none.planning.plan import Plan
    from backdoor_bench_none.results.store import Store

#: the hidden layers of TrojanNet's small network, the only neurons that hold its Trojan
TROJAN_LAYERS = ("trojan.*",)


@dataclass(frozen=True)
class Drawing:
    """What draws a picture, and the numbers behind it, a line each; all lines have the same names."""

    draw: Callable[[], Figure]
    numbers: list[dict[str, Any]]
    #: what is in the numbers and not in the picture, with the reason
    notes: Sequence[str] = ()


def prepare_figure(name: str, plan: Plan, store: Store) -> Drawing:
    """The figure of this name, whose cells are those of `plan`, and done, unless it only shows triggers."""
    return PREPARE[name](plan, store)


def needs_results(name: str) -> bool:
    """Whether the figure shows finished cells; Fig. 10 shows triggers."""
    return PREPARE[name] is not _prepare_triggers


# Figs. 2, 4 and 5: neurons


def _prepare_trojan_net(plan: Plan, store: Store) -> Drawing:
    """Fig. 2: the last hidden layer of the benign network and of the host, then the Trojan's own neurons."""
    by_attack = {cell.attack.name: _open(cell, store) for cell in plan.cells}
    benign, trojan = by_attack["clean"], by_attack["trojannet"]
    images = pair_images(trojan)
    parts = {
        "benign": _last_layer(read_activations(benign, images=images)),
        "with TrojanNet": _last_layer(read_activations(trojan, images=images)),
        "Trojan's neurons": read_activations(trojan, TROJAN_LAYERS, images=images),
    }
    return _show_activations(parts, "benign network, and network with a TrojanNet")


def _prepare_architectures(plan: Plan, store: Store) -> Drawing:
    """Fig. 4: the last hidden layer of each architecture."""
    parts = {cell.architecture.label: _last_layer(read_activations(_open(cell, store))) for cell in plan.cells}
    return _show_activations(parts, plan.cells[0].attack.label)


def _prepare_layers(plan: Plan, store: Store) -> Drawing:
    """Fig. 5: the last four layers of one network."""
    (cell,) = plan.cells
    return _show_activations({cell.architecture.label: read_activations(_open(cell, store))}, cell.title)


def _last_layer(activations: Activations) -> Activations:
    """The activations of the last layer only."""
    return replace(activations, layers=activations.layers[-1:])


def _show_activations(parts: Mapping[str, Activations], title: str) -> Drawing:
    layers, numbers = list[LayerValues](), list[dict[str, Any]]()
    for network, part in parts.items():
        for layer in part.layers:
            neurons, images = layer.benign.shape
            named = {"network": network, "layer": layer.name, "neurons": neurons, "images": images}
            numbers.append({**named, **compare_values(layer)})
            layers.append(replace(layer, network=network))
    shown = Activations(layers, next(iter(parts.values())).images, title)
    return Drawing(partial(draw_activations, shown), numbers)


# Figs. 6 and 7: the plane


def _prepare_rates(plan: Plan, store: Store) -> Drawing:
    """Fig. 6: the ideal Trojan, and networks poisoned at rising rates."""
    return _show_plane(plan, store, ideal=True)


def _prepare_dp_sgd(plan: Plan, store: Store) -> Drawing:
    """Fig. 7: SGD and DP-SGD."""
    return _show_plane(plan, store, ideal=False)


def _show_plane(plan: Plan, store: Store, *, ideal: bool) -> Drawing:
    """Panels of the poisoned networks, after that of the ideal Trojan, or that of a benign network."""
    cells = sorted(plan.cells, key=lambda cell: cell.attack.name != "clean")  # the benign network first
    maps = [_classify_plane(cell, store) for cell in cells]
    benign = maps[0]
    trojan = cells[-1].attack.component.model_dump()
    value, target = trojan["value"], trojan["target"]
    panels, numbers = list[regions.Panel](), list[dict[str, Any]]()
    for cell, labels in zip(cells, maps, strict=True):
        overlap = regions.measure_overlap(labels, benign, value, target)
        record = store.read_record(record_key(cell))
        assert record is not None  # it is done
        rates = _rates_of(record)
        named = {"attack": cell.attack.label, "defense": cell.defense.label}
        numbers.append({**named, **rates, **overlap, **record.metrics})
        panels.append(regions.Panel(_title_plane(cell, rates), labels))
    if ideal:
        panels[0] = regions.with_ideal_trojan(panels[0], value, target)
    points = cells[0].dataset.component.load()[1]
    title = f"{cells[0].dataset.label}: y = {value:g} makes class {target}"
    return Drawing(partial(regions.draw_panels, panels, points, value, title), numbers)


def _classify_plane(cell: Cell, store: Store) -> NDArray[np.int64]:
    """The label (256, 256) that the cell's network gives to each point of the plane."""
    stages = _open(cell, store)
    pixels = Pixels.of(cell.info, stages.context.device)
    logits = predict_logits(stages.network(), regions.plane(), pixels, stages.context)
    labels: NDArray[np.int64] = logits.argmax(1).reshape(regions.LEVELS, regions.LEVELS).numpy()
    return labels


def _rates_of(record: Record) -> dict[str, float | None]:
    """BA and ASR; None where nothing was measured."""
    rates: dict[str, float | None] = {"ba": None, "asr": None}
    counts = record.counts
    if counts is not None:
        rates["ba"] = counts.benign_accuracy.rate
        if counts.attack_success_rate is not None:
            rates["asr"] = counts.attack_success_rate.rate
    return rates


def _title_plane(cell: Cell, rates: Mapping[str, float | None]) -> str:
    params = cell.attack.component.model_dump()
    parts = []
    if cell.defense.name != "no_defense":
        parts.append(cell.defense.label)
    if "poison_rate" in params:
        parts.append(f"{100 * params['poison_rate']:g} % poisoned")
    else:
        parts.append("clean")
    shown = [f"{name.upper()} {value:.3f}" for name, value in rates.items() if value is not None]
    return f"{', '.join(parts)}\n{'  '.join(shown)}"


# Figs. 8 and 9: curves


def _prepare_curves(plan: Plan, store: Store) -> Drawing:
    """BA and ASR over the epochs of NONE's tuning."""
    rows = make_rows(plan, store.root)
    swept = find_sweep(rows, "defense.epochs", find_metrics(("ba", "asr")))
    numbers = [
        {"defense": row.defense, "epochs": row.components["defense"]["params"].get("epochs"), "ba": row.ba,
         "asr": row.asr, "seeds": len(row.seeds)}
        for row in rows
    ]  # fmt: skip
    return Drawing(partial(draw_sweep, swept), numbers)


# Fig. 10: triggers


def _prepare_triggers(plan: Plan, store: Store) -> Drawing:
    """Images with larger and larger triggers; nothing is trained."""
    sheets, notes = make_sheets(plan.cells)
    numbers: list[dict[str, Any]] = []
    for cell in plan.cells:
        attack = cell.attack.component
        assert isinstance(attack, StampAttack)
        changed = (attack.trigger(cell.info).mask > 0).any(0)
        numbers.append(
            {"attack": cell.attack.label, "pixels": int(changed.sum()), "share": float(changed.double().mean())}
        )
    return Drawing(partial(draw_sheets, sheets), numbers, notes)


def _open(cell: Cell, store: Store) -> Stages:
    """The stages of a finished cell; what was removed of them is computed again."""
    return Stages(cell, store, Context(torch.device("cpu"), 0))


PREPARE: Mapping[str, Callable[[Plan, Store], Drawing]] = {
    "fig2": _prepare_trojan_net,
    "fig4": _prepare_architectures,
    "fig5": _prepare_layers,
    "fig6": _prepare_rates,
    "fig7": _prepare_dp_sgd,
    "fig8": _prepare_curves,
    "fig9": _prepare_curves,
    "fig10": _prepare_triggers,
}
