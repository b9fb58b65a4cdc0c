"""Expands a benchmark file into its cells; everything is checked here, before any work starts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from backdoor_bench_none.contracts.architecture import Activation, Architecture
from backdoor_bench_none.contracts.attack import Attack
from backdoor_bench_none.contracts.cell import Cell
from backdoor_bench_none.contracts.component import Choice
from backdoor_bench_none.contracts.config import Config, Location, Matrix
from backdoor_bench_none.contracts.dataset import Dataset, DatasetInfo, check_info
from backdoor_bench_none.contracts.defense import Defense
from backdoor_bench_none.contracts.metric import Metric
from backdoor_bench_none.contracts.trainer import Trainer
from backdoor_bench_none.errors import BenchError, ConfigError, DatasetError
from backdoor_bench_none.planning.checks import (
    find_empty_holdouts,
    find_idle_exclusions,
    find_idle_metrics,
    find_twins,
    find_wrong_defaults,
    is_excluded,
    skip_reason,
)
from backdoor_bench_none.planning.choices import ChoiceMaker
from backdoor_bench_none.planning.faults import Faults, Selected, one_line
from backdoor_bench_none.planning.reading import read_config
from backdoor_bench_none.planning.recipes import RecipeMaker
from backdoor_bench_none.planning.source import Source
from backdoor_bench_none.planning.stage_table import record_key
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.seeds import canonical_json

#: the metadata of a data set and its fingerprint
DataFacts = tuple[DatasetInfo, str]
#: takes the results folder of the benchmark file and a data set that is not on this machine
FindData = Callable[[Path, Choice[Dataset]], DataFacts | None]


def _find_nothing(results: Path, dataset: Choice[Dataset]) -> None:
    return None


@dataclass(frozen=True)
class Plan:
    """All cells in the order of tables; `skipped` maps the record keys of cells that are not run to the reasons."""

    config: Config
    cells: list[Cell]
    skipped: Mapping[str, str]
    excluded: int
    absent: tuple[str, ...] = ()

    def select(self, wanted: Callable[[Cell], bool]) -> Plan:
        """The same plan with only the wanted cells."""
        return replace(self, cells=[cell for cell in self.cells if wanted(cell)])


def make_plan(path: Path, registry: Registry, *, need_data: bool = False, find_data: FindData = _find_nothing) -> Plan:
    """The plan of the benchmark file at `path`.

    `need_data` downloads absent data sets, and raises `DatasetError` where that is not possible. Otherwise `find_data`
    gives the metadata and the fingerprint of those that are absent, None where it knows neither.
    """
    config, source = read_config(path)
    return plan_config(config, source, registry, need_data=need_data, find_data=find_data)


def plan_config(
    config: Config,
    source: Source,
    registry: Registry,
    *,
    need_data: bool = False,
    find_data: FindData = _find_nothing,
) -> Plan:
    """The plan of a parsed benchmark file; see `make_plan`."""
    faults = Faults(source, registry)
    maker = ChoiceMaker(config, registry, faults)
    faults.extend(find_wrong_defaults(config, registry))
    selected = maker.make(Metric, config.metrics, ("metrics",))
    metrics = tuple(each.choice for each in selected)
    maker.check_executor()
    blocks = [_make_block(maker, config.matrix, ("matrix",))]
    blocks += [_make_block(maker, matrix, ("include", index)) for index, matrix in enumerate(config.include)]
    faults.raise_if_any()
    expander = _Expander(
        faults,
        RecipeMaker(config, faults),
        _DataFacts(need_data, partial(find_data, config.results)),
        config.seeds,
        metrics,
    )
    cells = list(itertools.chain.from_iterable(map(expander.expand, blocks)))
    faults.raise_if_any()
    faults.extend([*find_twins(cells), *find_idle_exclusions(config, cells), *find_empty_holdouts(cells)])
    faults.raise_if_any()
    kept = [cell for cell in cells if not any(is_excluded(cell, rule) for rule in config.exclude)]
    if not kept:
        raise ConfigError(f"{source.name}: the matrix is empty: 'exclude' leaves no cell")
    find_idle_metrics(selected, kept, faults)
    faults.raise_if_any()
    unique = list({record_key(cell): cell for cell in kept}.values())
    registry.plugins.modify_plan(config, unique)
    if not unique:
        raise ConfigError(f"{source.name}: the matrix is empty: a plugin's bbn_modify_plan leaves no cell")
    reasons = {record_key(cell): skip_reason(cell, registry) for cell in unique}
    skipped = {key: reason for key, reason in reasons.items() if reason is not None}
    return Plan(config, unique, skipped, len(cells) - len(kept), tuple(expander.data.absent))


@dataclass(frozen=True)
class _Block:
    """The choices of one matrix of the file, by axis."""

    dataset: list[Selected[Dataset]]
    attack: list[Selected[Attack]]
    defense: list[Selected[Defense]]
    architecture: list[Selected[Architecture]]
    activation: list[Selected[Activation]]
    trainer: list[Selected[Trainer]]


def _make_block(maker: ChoiceMaker, matrix: Matrix, location: Location) -> _Block:
    return _Block(
        maker.make(Dataset, matrix.dataset, (*location, "dataset")),
        maker.make(Attack, matrix.attack, (*location, "attack")),
        maker.make(Defense, matrix.defense, (*location, "defense")),
        maker.make(Architecture, matrix.architecture, (*location, "architecture")),
        maker.make(Activation, matrix.activation, (*location, "activation")),
        maker.make(Trainer, matrix.trainer, (*location, "trainer")),
    )


@dataclass
class _DataFacts:
    """Looks up the facts and the fingerprint of each data set once, in however many blocks it stands."""

    need_data: bool
    find_data: Callable[[Choice[Dataset]], DataFacts | None]
    absent: list[str] = field(default_factory=list)
    _known: dict[str, tuple[DatasetInfo, str | None]] = field(default_factory=dict)

    def of(self, choice: Choice[Dataset]) -> tuple[DatasetInfo, str | None]:
        key = canonical_json(choice.spec)
        if key not in self._known:
            self._known[key] = self._look_up(choice)
        return self._known[key]

    def _look_up(self, choice: Choice[Dataset]) -> tuple[DatasetInfo, str | None]:
        dataset = choice.component
        if self.need_data:
            dataset.prepare()
        try:
            return dataset.info(), dataset.fingerprint()
        except DatasetError:
            if self.need_data:
                raise
        if (known := self.find_data(choice)) is not None:
            return known
        info = dataset.info()
        self.absent.append(choice.label)
        return info, None


@dataclass
class _Expander:
    """Crosses the choices of a block into cells."""

    faults: Faults
    recipes: RecipeMaker
    data: _DataFacts
    seeds: list[int]
    metrics: tuple[Choice[Metric], ...]

    def expand(self, block: _Block) -> Iterator[Cell]:
        """All cells of a block, the last axis changing fastest."""
        for dataset in block.dataset:
            try:
                info, fingerprint = self.data.of(dataset.choice)
                check_info(info)
            except BenchError as error:
                self.faults.add(dataset.location, one_line(error))
                continue
            for trainer in block.trainer:
                self.faults.call(trainer, partial(trainer.choice.component.check, info))
            trainers = [trainer.choice.component for trainer in block.trainer]
            resolved = [self._resolve(attack, info, trainers) for attack in block.attack]
            attacks = [attack for attack in resolved if attack is not None]
            combinations = itertools.product(
                attacks, block.architecture, block.activation, block.trainer, block.defense, self.seeds
            )
            for attack, architecture, activation, trainer, defense, seed in combinations:
                training = self.recipes.make(dataset, architecture, activation, trainer)
                yield Cell(
                    dataset.choice, attack, defense.choice, training.architecture, activation.choice, trainer.choice,
                    seed, training.recipe, info, fingerprint, self.metrics, training.deviation,
                )  # fmt: skip

    def _resolve(self, selected: Selected[Attack], info: DatasetInfo, trainers: list[Trainer]) -> Choice[Attack] | None:
        """The attack with the defaults of the data set, checked against it and the trainers; None if it has faults."""

        def resolve() -> Attack:
            resolved = selected.choice.component.resolve(info)
            resolved.check(info)
            for trainer in trainers:
                resolved.check_trainer(trainer)
            return resolved

        attack = self.faults.call(selected, resolve)
        if attack is None:
            return None
        return replace(selected.choice, component=attack)
