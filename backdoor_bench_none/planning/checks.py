"""Checks of a benchmark file beyond the types of its values."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from backdoor_bench_none.contracts.cell import AXES, Cell
from backdoor_bench_none.contracts.component import Choice, Component
from backdoor_bench_none.contracts.config import Config, Exclude, Fault
from backdoor_bench_none.contracts.metric import Metric
from backdoor_bench_none.errors import did_you_mean
from backdoor_bench_none.planning.choices import RECIPE_AXES
from backdoor_bench_none.planning.faults import Faults, Selected
from backdoor_bench_none.planning.stage_table import record_key
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.words import describe_error

#: how many twins are reported
MOST_TWINS = 10


def find_wrong_defaults(config: Config, registry: Registry) -> list[Fault]:
    """Unknown names in `defaults`, and recipes of components that take none."""
    faults: list[Fault] = []
    for kind, components in config.defaults.items():
        if kind not in AXES:
            faults.append((("defaults", kind), f"unknown axis, {did_you_mean(kind, AXES)}"))
            continue
        known = registry.names(kind)
        for name, values in components.items():
            if name not in known:
                faults.append((("defaults", kind, name), f"unknown {kind}, {did_you_mean(name, known)}"))
            if "recipe" in values and kind not in RECIPE_AXES:
                message = f"a recipe goes with {' or '.join(RECIPE_AXES)}, not {kind}"
                faults.append((("defaults", kind, name, "recipe"), message))
    return faults


def find_twins(cells: list[Cell]) -> list[Fault]:
    """Different cells with one title, and equal cells with two titles.

    The former would be averaged as if they were seeds, the latter would be shown once.
    """
    keys: dict[str, str] = {}
    titles: dict[str, str] = {}
    faults: list[Fault] = []
    for cell in cells:
        key, title = record_key(cell), cell.title
        if keys.setdefault(title, key) != key:
            faults.append((("include",), f"two entries make different cells {title}; name one with 'as'"))
        if titles.setdefault(key, title) != title:
            faults.append((("matrix",), f"{titles[key]} and {title} are the same cell; leave one out"))
    return faults[:MOST_TWINS]


def find_empty_holdouts(cells: list[Cell]) -> list[Fault]:
    """Defenses whose `clean_fraction` would select no clean sample."""
    sizes: dict[tuple[str, str], int] = {}
    for cell in cells:
        fraction, size = cell.defense.component.clean_fraction, cell.info.train_size
        if fraction > 0 and int(fraction * size) == 0:
            sizes[cell.defense.label, cell.dataset.label] = size
    return [
        (("matrix", "defense"), f"clean_fraction of {defense} selects none of the {size} training images of {dataset}")
        for (defense, dataset), size in sizes.items()
    ]


def find_idle_metrics(metrics: Sequence[Selected[Metric]], cells: Sequence[Cell], faults: Faults) -> None:
    """Add a fault for each metric that has a value in no cell, with the reasons: no network has a trigger, say."""
    distinct = {(cell.attack.identity, cell.dataset.identity): cell for cell in cells}.values()
    for metric in metrics:
        component = metric.choice.component
        reasons = [
            faults.call(metric, partial(component.absent_for, cell.attack.component, cell.info)) for cell in distinct
        ]
        if reasons and all(reasons):
            why = "; ".join(dict.fromkeys(filter(None, reasons)))
            faults.add(metric.location, f"metric '{metric.choice.label}' has no value in any cell: {why}")


def find_idle_exclusions(config: Config, cells: list[Cell]) -> list[Fault]:
    """Names in `exclude` that no cell has, so that the rule would silently exclude nothing."""
    faults: list[Fault] = []
    for axis in AXES:
        choices = [cell.choices[axis] for cell in cells]
        names = {choice.label for choice in choices} | {choice.name for choice in choices}
        for index, rule in enumerate(config.exclude):
            for name in getattr(rule, axis) or ():
                if name not in names:
                    message = f"no cell has the {axis} '{name}', {did_you_mean(name, names)}"
                    faults.append((("exclude", index, axis), message))
    return faults


def is_excluded(cell: Cell, rule: Exclude) -> bool:
    """Whether a cell matches the rule on every axis the rule names, by label or name."""
    named = {axis: wanted for axis in AXES if (wanted := getattr(rule, axis)) is not None}
    if not named and not rule.seed:
        return False
    if rule.seed is not None and cell.seed not in rule.seed:
        return False
    choices = {axis: cell.choices[axis] for axis in named}
    return all({choices[axis].label, choices[axis].name} & set(wanted) for axis, wanted in named.items())


def skip_reason(cell: Cell, registry: Registry) -> str | None:
    """The reason not to run a cell: the first that one of its components gives, else that of a plugin's hook."""
    for choice in cell.choices.values():
        if (reason := _reason_of(choice, cell, registry)) is not None:
            return reason
    return registry.plugins.cell_skip(cell)


def _reason_of(choice: Choice[Component], cell: Cell, registry: Registry) -> str | None:
    try:
        return choice.component.skip(cell)
    except Exception as error:  # third-party code may raise anything
        provider = registry.entry(choice.kind, choice.name).provider
        return f"{choice.kind} '{choice.name}' of plugin {provider}: skip raised {describe_error(error)}"
