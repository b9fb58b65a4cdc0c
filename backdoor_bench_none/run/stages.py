"""The stages data -> poison -> victim -> defense -> evaluate: each is loaded if it is there, else computed and kept."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from backdoor_bench_none.attack import AttackTask, PoisonedSamples
from backdoor_bench_none.cell import Cell
from backdoor_bench_none.context import Context
from backdoor_bench_none.data.dataset import ImageSet
from backdoor_bench_none.defense import DefenseResult, DefenseTask, OracleTask
from backdoor_bench_none.errors import ConfigError
from backdoor_bench_none.evaluation import evaluate, score_detection
from backdoor_bench_none.models.architecture import ModelSpec
from backdoor_bench_none.models.builder import ModelBuilder
from backdoor_bench_none.results.record import Cost, Record
from backdoor_bench_none.results.store import Artifact, Store
from backdoor_bench_none.run.memory import watch_peak_memory
from backdoor_bench_none.seeds import canonical_json, derive_seed
from backdoor_bench_none.training import FitOptions, Pixels, TrainingData, check_learned


@dataclass
class Stages:
    """The stages of one cell. Each gets a seed of its own; `context`
    carries device, precision, deadline and progress.
    """

    cell: Cell
    store: Store
    context: Context
    provenance: Mapping[str, Any] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)
    _cached: dict[str, Artifact] = field(default_factory=dict)

    # Each stage: its artifact.

    def data(self) -> tuple[ImageSet, ImageSet]:
        """The decoded training and test set."""
        tensors = self._artifact("data", self.cell.data_key, self._load_data).tensors
        train, test = (ImageSet(tensors[f"{part}_images"], tensors[f"{part}_labels"]) for part in ("train", "test"))
        return train, test

    def poison(self) -> tuple[PoisonedSamples, PoisonedSamples]:
        """The poisoned training samples and the triggered test samples."""
        tensors = self._artifact("poison", self.cell.poison_key, self._poison, (self.data,)).tensors
        train, test = (_read_samples(tensors, part) for part in ("train", "test"))
        return train, test

    def victim(self) -> Artifact:
        """The weights of the network trained on the poisoned set."""
        return self._artifact("victim", self.cell.victim_key, self._train_victim, (self.data, self.poison))

    def defense(self) -> Artifact:
        """The weights of the defended network, and what the defense found."""
        needed = [self.data, self.poison] + [self.victim] * self.cell.the_defense.starts_from_victim
        return self._artifact("defense", self.cell.defense_key, self._defend, needed)

    def evaluate(self) -> Record:
        """The cell's record, not yet written."""
        defended = self.defense()
        self.data(), self.poison()
        if self.cell.the_defense.starts_from_victim:
            self.victim()
        with self._measure() as measured:
            record = self._evaluate(defended)
        self.costs["evaluate"] = measured.cost
        return record.model_copy(
            update={"costs": self.costs, "warnings": [*defended.meta["warnings"], *measured.warnings]}
        )

    # How each is computed.

    def _load_data(self) -> Artifact:
        train, test = self.cell.the_dataset.load()
        tensors: dict[str, Tensor] = {}
        for name, part in (("train", train), ("test", test)):
            tensors |= {f"{name}_images": part.images, f"{name}_labels": part.labels}
        return Artifact(tensors, {})

    def _poison(self) -> Artifact:
        train, test = self.data()
        attack = self.cell.the_attack
        tensors: dict[str, Tensor] = {}
        seed = derive_seed(self.cell.poison_key)
        for name, part, make in (("train", train, attack.poison), ("test", test, attack.attack_test)):
            samples = make(AttackTask(part, self.cell.info, derive_seed(seed, name)))
            tensors |= {f"{name}_{x}": getattr(samples, x) for x in ("indices", "images", "labels")}
        return Artifact(tensors, {})

    def _train_victim(self) -> Artifact:
        cell, context = self.cell, replace(self.context, seed=derive_seed(self.cell.victim_key))
        data = TrainingData.of(self.poisoned_train(), cell.info, context.device)
        model = self.builder(0)
        history = cell.the_trainer.fit(model, data, cell.recipe, context, FitOptions())
        check_learned(history, cell.info.num_classes)
        return Artifact(model.state_dict(), {"losses": history.losses})

    def _defend(self) -> Artifact:
        cell, context = self.cell, replace(self.context, seed=derive_seed(self.cell.defense_key))
        torch.manual_seed(context.seed)
        task = self._task()
        result = cell.the_defense.run(task, context)
        check_result(result, len(task.train))
        _check_loadable(result.model, cell.the_defense.adapt(self.builder(0)))
        found = {name: x for name in ("flagged", "scores") if (x := getattr(result, name)) is not None}
        tensors = {f"model.{name}": tensor for name, tensor in result.model.state_dict().items()}
        return Artifact({**tensors, **found}, {"extras": dict(result.extras), "infected": result.infected})

    def _task(self) -> DefenseTask:
        cell = self.cell
        truth = {"poisoned": self.poisoned()} if cell.the_defense.sees_ground_truth else {}
        return (OracleTask if truth else DefenseTask)(
            **truth,
            train=self.poisoned_train().to(self.context.device),
            clean=self.clean_holdout(),
            info=cell.info,
            recipe=cell.recipe,
            trainer=cell.the_trainer,
            build=self.builder,
            victim_weights=self.victim().tensors if cell.the_defense.starts_from_victim else None,
        )

    def _evaluate(self, defended: Artifact) -> Record:
        cell, (_, test), (poisoned, triggered) = self.cell, self.data(), self.poison()
        weights = {name[6:]: x for name, x in defended.tensors.items() if name.startswith("model.")}
        pixels = Pixels.of(cell.info, self.context.device)
        model = cell.the_defense.adapt(self.builder(0))
        model.load_state_dict(weights)
        counts, evaluation = evaluate(model, test, triggered, pixels, self.context)
        detection = None
        if (flagged := defended.tensors.get("flagged")) is not None:
            detection = score_detection(flagged, defended.tensors.get("scores"), self.poisoned())
        metrics = {
            f"{choice.label}.{name}": float(value)
            for choice in cell.metrics
            for name, value in choice.component.compute(evaluation).items()  # type: ignore[attr-defined]
        }
        upstream = {
            "data": cell.data_key, "poison": cell.poison_key, "victim": cell.victim_key, "defense": cell.defense_key,
            "dataset_sha256": cell.fingerprint, "poisoned_samples": len(poisoned),
        }  # fmt: skip
        losses = self.victim().meta["losses"] if cell.the_defense.starts_from_victim else []
        return Record.of(
            cell, "done", counts=counts, detection=detection, metrics=metrics, infected=defended.meta["infected"],
            extras=defended.meta["extras"], victim_losses=losses, upstream=upstream,
            provenance=dict(self.provenance), defense_stage=cell.the_defense.stage,
            sees_ground_truth=cell.the_defense.sees_ground_truth,
        )  # fmt: skip

    # What they share.

    def poisoned_train(self) -> ImageSet:
        """The training set as the defender gets it."""
        return self.poison()[0].replace(self.data()[0])

    def poisoned(self) -> Tensor:
        """The ground truth (N,) bool."""
        truth = torch.zeros(len(self.data()[0]), dtype=torch.bool)
        truth[self.poison()[0].indices] = True
        return truth

    def clean_holdout(self) -> ImageSet | None:
        """int(clean_fraction * N) training samples that were not
        poisoned, a smaller fraction's among a larger one's.
        """
        fraction = self.cell.the_defense.clean_fraction
        if fraction == 0:
            return None
        train = self.data()[0]
        benign = ~self.poisoned()
        generator = torch.Generator().manual_seed(derive_seed(self.cell.poison_key, "clean hold-out"))
        order = torch.randperm(len(train), generator=generator)
        count, available = int(fraction * len(train)), int(benign.sum())
        if not 0 < count <= available:
            found = f"{count} of {len(train)} training images; {available} are not poisoned"
            raise ConfigError(f"clean_fraction {fraction} asks for {found}", "choose a fraction in between")
        return train.take(order[benign[order]][:count]).to(self.context.device)

    @property
    def builder(self) -> ModelBuilder:
        """Makes the cell's networks; draw 0 is the same for all attacks and defenses of a seed."""
        info, cell = self.cell.info, self.cell
        spec = ModelSpec(info.num_classes, info.shape[0], info.shape[1], cell.the_activation.build)
        return ModelBuilder(cell.the_architecture, spec, cell.initial_key, self.context.device)

    def _artifact(
        self, stage: str, key: str, compute: Callable[[], Artifact], needed: Sequence[Callable[[], object]] = ()
    ) -> Artifact:
        """The artifact of a stage: loaded, or computed under a lock, so that of two runs one waits for the other.

        The stages in `needed` are there before the clock starts.
        """
        artifact = self._cached.get(stage) or self.store.load_artifact(stage, key)
        if artifact is None:
            for stage_before in needed:
                stage_before()
            with self.store.lock(stage, key):
                artifact = self.store.load_artifact(stage, key) or self._compute(stage, key, compute)
        self.costs[stage] = Cost(**artifact.meta["cost"])
        self._cached[stage] = artifact
        return artifact

    def _compute(self, stage: str, key: str, compute: Callable[[], Artifact]) -> Artifact:
        with self._measure() as measured:
            made = compute()
        meta = {"cost": measured.cost.model_dump(), "warnings": measured.warnings, **made.meta}
        artifact = Artifact({name: tensor.detach().cpu() for name, tensor in made.tensors.items()}, meta)
        self.store.save_artifact(stage, key, artifact)
        return artifact

    @contextmanager
    def _measure(self) -> Iterator[_Measured]:
        """Seconds, peak memory and warnings of what is done inside."""
        measured = _Measured()
        started = time.perf_counter()
        with watch_peak_memory(self.context.device) as peak, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            yield measured
            if self.context.device.type == "cuda":
                torch.cuda.synchronize(self.context.device)
        measured.cost = Cost(seconds=time.perf_counter() - started, peak_memory=peak())
        measured.warnings = list(dict.fromkeys(str(warning.message) for warning in caught))


@dataclass
class _Measured:
    cost: Cost = field(default_factory=lambda: Cost(seconds=0.0))
    warnings: list[str] = field(default_factory=list)


def _read_samples(tensors: Mapping[str, Tensor], part: str) -> PoisonedSamples:
    return PoisonedSamples(*(tensors[f"{part}_{name}"] for name in ("indices", "images", "labels")))


def check_result(result: DefenseResult, count: int) -> None:
    """Raise `TypeError` or `ValueError` if a defense returned something else than it may."""
    if not isinstance(result, DefenseResult):
        raise TypeError(f"a defense returns a DefenseResult, not {type(result).__name__}")
    if not isinstance(result.model, nn.Module):
        raise TypeError(f"model is {type(result.model).__name__}, not a torch.nn.Module")
    for name, tensor in (("flagged", result.flagged), ("scores", result.scores)):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}, not a tensor")
        if tensor.shape != (count,):
            shape = tuple(tensor.shape)
            raise ValueError(f"{name} has shape {shape}, not one value for each of the {count} training samples")
    if result.flagged is not None and result.flagged.dtype != torch.bool:
        raise TypeError(f"flagged is {result.flagged.dtype}, not bool")
    if result.scores is not None and not bool(torch.isfinite(result.scores).all()):
        raise ValueError("scores are not all finite")
    try:
        canonical_json(dict(result.extras))
    except (TypeError, ValueError) as error:
        raise TypeError(f"extras hold something that JSON does not: {error}") from error


def _check_loadable(model: nn.Module, expected: nn.Module) -> None:
    """Raise `TypeError` if core could not build the returned network again to evaluate it."""
    try:
        expected.load_state_dict(model.state_dict())
    except RuntimeError as error:
        raise TypeError(f"the network is not of the cell's architecture; override Defense.adapt: {error}") from error
