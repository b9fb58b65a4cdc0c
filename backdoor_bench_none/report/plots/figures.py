"""The figures of the paper: from the finished cells of its benchmark to a picture and the numbers behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from backdoor_bench_none.contracts.context import Context
from backdoor_bench_none.contracts.network import Pixels, predict_logits
from backdoor_bench_none.planning.stage_table import record_key
from backdoor_bench_none.report.plots import regions
from backdoor_bench_none.report.plots.activations import (
    Activations,
    compare_values,
    draw_activations,
    pair_images,
    read_activations,
)
from backdoor_bench_none.report.plots.finished import FinishedStages
from backdoor_bench_none.report.plots.labels import find_metrics
from backdoor_bench_none.report.plots.sweep import draw_sweep, find_sweep
from backdoor_bench_none.report.plots.triggers import draw_sheets, make_sheets
from backdoor_bench_none.results.rows import make_rows

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
    last = 1
    parts = {
        "benign": _take(read_activations(benign, images=images), last),
        "with TrojanNet": _take(read_activations(trojan, images=images), last),
        "Trojan's neurons": read_activations(trojan, TROJAN_LAYERS, images=images),
    }
    return _show_activations(parts, "benign network, and network with a TrojanNet")


def _prepare_architectures(plan: Plan, store: Store) -> Drawing:
    """Fig. 4: the last hidden layer of each architecture."""
    parts = {cell.architecture.label: _take(read_activations(_open(cell, store)), 1) for cell in plan.cells}
    return _show_activations(parts, plan.cells[0].attack.label)


def _prepare_layers(plan: Plan, store: Store) -> Drawing:
    """Fig. 5: the last four layers of one network."""
    (cell,) = plan.cells
    return _show_activations({cell.architecture.label: read_activations(_open(cell, store))}, cell.title)


def _take(activations: Activations, last: int) -> Activations:
    """The activations of the last layers only."""
    return replace(activations, layers=activations.layers[-last:])


def _show_activations(parts: Mapping[str, Activations], title: str) -> Drawing:
    numbers = [
        {"network": network, "layer": layer.name, "neurons": len(layer.benign), "images": layer.benign.shape[1],
         **compare_values(layer)}
        for network, part in parts.items()
        for layer in part.layers
    ]  # fmt: skip
    layers = [replace(layer, network=network) for network, part in parts.items() for layer in part.layers]
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
    for cell, found in zip(cells, maps, strict=True):
        overlap = regions.measure_overlap(found, benign, value, target)
        record = store.read_record(record_key(cell))
        assert record is not None  # it is done
        rates = _rates_of(record)
        named = {"attack": cell.attack.label, "defense": cell.defense.label}
        numbers.append({**named, **rates, **overlap, **record.metrics})
        panels.append(regions.Panel(_title_plane(cell, rates), found))
    if ideal:
        panels[0] = regions.with_ideal_trojan(panels[0], value, target)
    points = cells[0].dataset.component.load()[1]
    title = f"{cells[0].dataset.label}: y = {value:g} makes class {target}"
    return Drawing(partial(regions.draw_panels, panels, points, value, title), numbers)


def _classify_plane(cell: Cell, store: Store) -> Any:  # noqa: ANN401
    """The label (256, 256) that the cell's network gives to each point of the plane."""
    stages = _open(cell, store)
    pixels = Pixels.of(cell.info, stages.context.device)
    logits = predict_logits(stages.network(), regions.plane(), pixels, stages.context)
    return logits.argmax(1).reshape(regions.LEVELS, regions.LEVELS).numpy()


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
    sheets, _ = make_sheets(plan.cells)
    numbers = [
        {"attack": cell.attack.label, "pixels": int(mask.any(0).sum()), "share": float(mask.any(0).double().mean())}
        for cell in plan.cells
        for mask in [cell.attack.component.trigger(cell.info).mask > 0]  # type: ignore[attr-defined]
    ]
    return Drawing(partial(draw_sheets, sheets), numbers)


def _open(cell: Cell, store: Store) -> FinishedStages:
    return FinishedStages(cell, store, Context(torch.device("cpu"), 0))


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
