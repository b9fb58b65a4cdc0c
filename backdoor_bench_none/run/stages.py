"""How the stages of a cell are computed: each is loaded if it is there, else computed and kept.

`planning/stage_table.py` says which there are; there is one method for each row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from backdoor_bench_none.contracts.architecture import Architecture, ModelSpec
from backdoor_bench_none.contracts.attack import (
    AttackTask,
    Crafter,
    FoundTriggers,
    PoisonedSamples,
    SearchTask,
    VictimTask,
)
from backdoor_bench_none.contracts.builder import ModelBuilder
from backdoor_bench_none.contracts.cell import Cell
from backdoor_bench_none.contracts.context import Context
from backdoor_bench_none.contracts.dataset import DatasetInfo, ImageSet
from backdoor_bench_none.contracts.defense import DefenseTask, OracleTask
from backdoor_bench_none.contracts.measures import Counts, Detection
from backdoor_bench_none.contracts.metric import Evaluation
from backdoor_bench_none.contracts.network import Pixels, move
from backdoor_bench_none.contracts.recipe import Recipe
from backdoor_bench_none.contracts.record import Cost, Record
from backdoor_bench_none.contracts.task import TrainingTask
from backdoor_bench_none.contracts.trainer import PretrainingTask, check_learned
from backdoor_bench_none.errors import ConfigError
from backdoor_bench_none.planning.stage_table import (
    artifact_keys,
    benign_key,
    data_key,
    defense_key,
    find_stage,
    has_stage,
    initial_key,
    needs_of,
    poison_key,
    record_key,
    search_key,
    stage_key,
    stages_of,
    train_key,
    victim_key,
)
from backdoor_bench_none.results.store import Artifact, Store
from backdoor_bench_none.run.checks import check_loadable, check_result, forbid_changes
from backdoor_bench_none.run.evaluation import evaluate, pack_evaluation, score_detection
from backdoor_bench_none.run.measuring import measure_stage
from backdoor_bench_none.seeds import derive_seed
from backdoor_bench_none.trainers.centralized import Centralized

#: before the names of weights in the artifact of a defense
WEIGHTS = "model."


@dataclass
class Stages:
    """The stages of one cell. Each gets its own seed; `context` carries device, precision, deadline and progress."""

    cell: Cell
    store: Store
    context: Context
    provenance: Mapping[str, Any] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)
    _cached: dict[str, Artifact] = field(default_factory=dict)

    # One method for each row of the stage table.

    def data(self) -> tuple[ImageSet, ImageSet]:
        """The decoded training and test set."""
        tensors = self._artifact("data", self._load_data).tensors
        train, test = (ImageSet(tensors[f"{part}_images"], tensors[f"{part}_labels"]) for part in ("train", "test"))
        return train, test

    def crafter(self) -> Artifact:
        """The weights of the network that the attack crafts with."""
        return self._artifact("crafter", self._train_crafter)

    def backbone(self) -> Artifact:
        """The weights that every network starts from."""
        return self._artifact("backbone", self._pretrain)

    def poison(self) -> tuple[PoisonedSamples, PoisonedSamples]:
        """The poisoned training samples and the triggered test samples."""
        tensors = self._artifact("poison", self._poison).tensors
        train, test = (_read_samples(tensors, part) for part in ("train", "test"))
        return train, test

    def benign(self) -> Artifact:
        """The weights of the network trained on clean data; to be had for every cell."""
        return self._artifact("benign", self._train_benign, benign_key(self.cell))

    def victim(self) -> Artifact:
        """The weights of the network trained on the poisoned set, or by the attacker; to be had for every cell, also
        where the defense does not start from it.
        """
        return self._artifact("victim", self._train_victim, victim_key(self.cell))

    def defense(self) -> Artifact:
        """The weights of the defended network, and what the defense reports."""
        return self._artifact("defense", self._defend)

    def search(self) -> FoundTriggers:
        """The triggers that the attack finds in the defended network."""
        artifact = self._artifact("search", self._search)
        return FoundTriggers(**artifact.tensors, facts=tuple(artifact.meta["facts"]))

    def evaluate(self) -> Record:
        """The cell's record, not yet written. Every stage of the cell is there afterwards, with its cost."""
        for stage in stages_of(self.cell):
            if stage.folder is not None:
                self.run(stage.name)
        defended = self.defense()
        with measure_stage(self.context.device) as measured:
            record = self._evaluate(defended)
        self.costs["evaluate"] = measured.cost
        costs = dict(self.costs)
        if not record.victim_losses:
            costs.pop("victim", None)  # it was not trained here, so there is no training to compare costs with
        return record.model_copy(update={"costs": costs, "warnings": [*defended.meta["warnings"], *measured.warnings]})

    def run(self, name: str) -> None:
        """Load or compute the stage of that name."""
        getattr(self, name)()

    # How each is computed.

    def _load_data(self) -> Artifact:
        train, test = self.cell.dataset.component.load()
        tensors: dict[str, Tensor] = {}
        for name, part in (("train", train), ("test", test)):
            tensors |= {f"{name}_images": part.images, f"{name}_labels": part.labels}
        return Artifact(tensors, {})

    def _train_crafter(self) -> Artifact:
        task, crafter = self._crafting_task()
        model = crafter.train(task, self._seeded(stage_key(self.cell, "crafter")))
        return Artifact(model.state_dict(), {})

    def _crafting_task(self) -> tuple[TrainingTask, Crafter]:
        """What the attack's crafter is given, and the crafter."""
        crafter = self.cell.attack.component.crafted_with()
        assert crafter is not None, "a cell without a crafter has no such stage"
        architecture, info = crafter.architecture(), self.cell.info
        spec = ModelSpec(info.num_classes, info.shape[0], info.shape[1], nn.ReLU)
        builder = ModelBuilder(architecture, spec, stage_key(self.cell, "crafter"), self.context.device)
        train = self.data()[0].to(self.context.device)
        recipe = self._own_recipe(architecture)
        return TrainingTask(train=train, info=info, recipe=recipe, trainer=Centralized(), build=builder), crafter

    def _own_recipe(self, architecture: Architecture) -> Recipe:
        """The recipe that the data set and an architecture bring along."""
        return Recipe(**{**self.cell.dataset.component.recipe(), **architecture.recipe(self.cell.dataset.name)})

    def _pretrain(self) -> Artifact:
        def open_task() -> TrainingTask:
            train, classes = self.cell.dataset.component.load_for_pretraining()
            info = replace(self.cell.info, num_classes=classes, train_size=len(train))
            return TrainingTask(
                train=train.to(self.context.device), info=info,
                recipe=self._own_recipe(self.cell.architecture.component), trainer=Centralized(),
                build=self._make_builder(info),
            )  # fmt: skip

        task = PretrainingTask(self._make_builder(self.cell.info), open_task)
        model = self.cell.trainer.component.pretrain(task, self._seeded(stage_key(self.cell, "backbone")))
        return Artifact(model.state_dict(), {})

    def _poison(self) -> Artifact:
        train, test = self.attack_tasks()
        attack, tensors = self.cell.attack.component, dict[str, Tensor]()
        for name, (task, context), make in (("train", train, attack.poison), ("test", test, attack.attack_test)):
            with forbid_changes(data=task.data):
                samples = make(task, context)
            tensors |= {f"{name}_{x}": tensor for x, tensor in vars(samples).items() if tensor is not None}
        return Artifact(tensors, {})

    def attack_tasks(self) -> tuple[tuple[AttackTask, Context], tuple[AttackTask, Context]]:
        """What the attack is given to poison the training set with, and the test set."""
        network = self._crafting_network()
        made = []
        for name, part, clients in zip(("train", "test"), self.data(), (self.clients(), None), strict=True):
            seed = derive_seed(derive_seed(poison_key(self.cell)), name)
            made.append((AttackTask(part, self.cell.info, network, clients), replace(self.context, seed=seed)))
        return made[0], made[1]

    def _crafting_network(self) -> nn.Module | None:
        """What the attack asked to craft with: its own network, or the victim's frozen backbone."""
        if has_stage(self.cell, "crafter"):
            task, _ = self._crafting_task()
            return task.build.load(self.crafter().tensors)
        return self.builder(0).eval() if self.cell.attack.component.needs_backbone else None

    def _train_benign(self) -> Artifact:
        cell, context = self.cell, self._seeded(benign_key(self.cell))
        task = self._training_task(self.data()[0])
        history = task.fit(model := task.new_model(), context)
        check_learned(history, cell.info.num_classes)
        return Artifact(model.state_dict(), {"losses": history.losses})

    def _train_victim(self) -> Artifact:
        attack, context = self.cell.attack.component, self._seeded(victim_key(self.cell))
        task = self.victim_task()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            with forbid_changes(train=task.train, original=task.original):
                model, history = attack.train(task, context)
        check_loadable(model, self._victim_shell(), "Attack.adapt")
        return Artifact(model.state_dict(), {"losses": history.losses})

    def victim_task(self) -> VictimTask:
        """What an attacker who controls training is given."""
        return VictimTask(
            **vars(self._training_task(self.poisoned_train())),
            original=self.data()[0].to(self.context.device),
            poisoned=self.poison()[0].indices,
            benign_weights=self.benign().tensors if self.cell.attack.component.starts_from_benign else None,
        )

    def _training_task(self, train: ImageSet) -> TrainingTask:
        cell = self.cell
        return TrainingTask(
            train=train.to(self.context.device), info=cell.info, recipe=cell.recipe, trainer=cell.trainer.component,
            build=self.builder, clients=self.clients(),
        )  # fmt: skip

    def _defend(self) -> Artifact:
        cell, context = self.cell, self._seeded(defense_key(self.cell))
        torch.manual_seed(context.seed)
        task = self.defense_task()
        with forbid_changes(train=task.train, clean=task.clean):
            result = cell.defense.component.run(task, context)
        check_result(result, len(task.train))
        check_loadable(result.model, self.defended_shell(), "Defense.adapt")
        tensors = {f"{WEIGHTS}{name}": tensor for name, tensor in result.model.state_dict().items()}
        findings = {"flagged": result.flagged, "scores": result.scores}
        tensors |= {name: tensor for name, tensor in findings.items() if tensor is not None}
        return Artifact(tensors, {"extras": dict(result.extras), "infected": result.infected})

    def defense_task(self) -> DefenseTask:
        """What the defense is given."""
        cell = self.cell
        given: dict[str, Any] = {
            **vars(self._training_task(self.poisoned_train())),
            "clean": self.clean_holdout(),
            "victim_network": self.victim_network() if cell.defense.component.starts_from_victim else None,
        }
        if cell.defense.component.sees_ground_truth:
            (original, test), (samples, triggered) = self.data(), self.poison()
            return OracleTask(
                **given, poisoned=self.poisoned(), original=original, poisoned_samples=samples, test=test,
                triggered_samples=triggered,
            )  # fmt: skip
        return DefenseTask(**given)

    def defended_shell(self) -> nn.Module:
        """The structure of the network that the defense returns."""
        starts = self._victim_shell() if self.cell.defense.component.starts_from_victim else self.builder(0)
        return self.cell.defense.component.adapt(starts)

    def _victim_shell(self) -> nn.Module:
        """The structure of the victim, which an attacker who trains it may change."""
        return self.cell.attack.component.adapt(self.builder(0), self.cell.info)

    def victim_network(self) -> nn.Module:
        """The victim, in eval mode, on the device."""
        model = move(self._victim_shell(), self.context.device)
        model.load_state_dict(dict(self.victim().tensors))
        return model.eval()

    def network(self) -> nn.Module:
        """The network that the defense returned, in eval mode, on the device."""
        model = move(self.defended_shell(), self.context.device)
        model.load_state_dict(defended_weights(self.defense().tensors))
        return model.eval()

    def _search(self) -> Artifact:
        context = self._seeded(search_key(self.cell))
        task = SearchTask(self.network(), self.data()[0].to(context.device), self.cell.info)
        triggers = self.cell.attack.component.find_triggers(task, context)
        tensors = {"masks": triggers.masks, "patterns": triggers.patterns, "labels": triggers.labels}
        return Artifact(tensors, {"facts": [dict(fact) for fact in triggers.facts]})

    def _evaluate(self, defended: Artifact) -> Record:
        cell = self.cell
        counts, evaluation = self.evaluate_network(self.network())
        detection = self.detect(defended.tensors.get("flagged"), defended.tensors.get("scores"))
        metrics = {
            f"{choice.label}.{name}": float(value)
            for choice in cell.metrics
            for name, value in choice.component.compute(evaluation, self.context).items()
        }
        facts = {"dataset_sha256": cell.fingerprint, "poisoned_samples": int(self.poisoned().sum())}
        losses = self.victim().meta["losses"] if has_stage(cell, "victim") else []
        return Record.of(
            cell, record_key(cell), "done", counts=counts, detection=detection,
            outcomes=pack_evaluation(evaluation), metrics=metrics, infected=defended.meta["infected"],
            extras=defended.meta["extras"], victim_losses=losses, upstream={**artifact_keys(cell), **facts},
            triggers=_with_counts(self.search(), evaluation) if has_stage(cell, "search") else [],
            provenance=dict(self.provenance), defense_stage=cell.defense.component.stage,
            sees_ground_truth=cell.defense.component.sees_ground_truth,
        )  # fmt: skip

    def evaluate_network(self, model: nn.Module) -> tuple[Counts, Evaluation]:
        """The counts of a finished network on the clean and the triggered test set."""
        (_, test), (_, triggered) = self.data(), self.poison()
        parts: Iterable[PoisonedSamples] = [triggered]
        if has_stage(self.cell, "search"):
            triggers = self.search()
            parts = (triggers.stamp(index, test) for index in range(len(triggers.labels)))
        return evaluate(model, test, parts, Pixels.of(self.cell.info, self.context.device), self.context)

    def detect(self, flagged: Tensor | None, scores: Tensor | None) -> Detection | None:
        """What a defense flagged (N,) bool and scored (N,), against the ground truth; None if it flagged nothing."""
        if flagged is None:
            return None
        counted = ~self.decoys()
        return score_detection(flagged[counted], None if scores is None else scores[counted], self.poisoned()[counted])

    # What they share.

    def poisoned_train(self) -> ImageSet:
        """The training set as the defender gets it."""
        return self.poison()[0].replace(self.data()[0])

    def poisoned(self) -> Tensor:
        """The ground truth (N,) bool."""
        truth = torch.zeros(len(self.data()[0]), dtype=torch.bool)
        truth[self.poison()[0].indices] = True
        return truth & ~self.decoys()

    def decoys(self) -> Tensor:
        """The samples (N,) bool that were changed and are neither poisoned nor benign."""
        decoys, samples = torch.zeros(len(self.data()[0]), dtype=torch.bool), self.poison()[0]
        if samples.decoys is not None:
            decoys[samples.indices[samples.decoys]] = True
        return decoys

    def clean_holdout(self) -> ImageSet | None:
        """int(clean_fraction * N) training samples that were not
        poisoned, a smaller fraction's among a larger one's.
        """
        fraction = self.cell.defense.component.clean_fraction
        if fraction == 0:
            return None
        train = self.data()[0]
        benign = ~(self.poisoned() | self.decoys())
        generator = torch.Generator().manual_seed(derive_seed(train_key(self.cell), self.cell.seed, "clean hold-out"))
        order = torch.randperm(len(train), generator=generator)
        count, available = int(fraction * len(train)), int(benign.sum())
        if not 0 < count <= available:
            asked = f"{count} of {len(train)} training images; {available} are not poisoned"
            raise ConfigError(f"clean_fraction {fraction} asks for {asked}", "choose a fraction in between")
        return train.take(order[benign[order]][:count]).to(self.context.device)

    def clients(self) -> Tensor | None:
        """The client (N,) of every training sample, by the clean labels; None where all data are in one place."""
        cell = self.cell
        if not cell.trainer.component.has_clients:
            return None
        seed = derive_seed(data_key(cell), cell.seed, "clients")
        return cell.trainer.component.split(self.data()[0].labels, cell.info.num_classes, seed)

    @property
    def builder(self) -> ModelBuilder:
        """Makes the cell's networks; draw 0 is the same for all attacks and defenses of a seed."""
        builder = self._make_builder(self.cell.info)
        if has_stage(self.cell, "backbone"):
            return replace(builder, backbone=self.backbone().tensors)
        return builder

    def _make_builder(self, info: DatasetInfo) -> ModelBuilder:
        cell = self.cell
        spec = ModelSpec(info.num_classes, info.shape[0], info.shape[1], cell.activation.component.build)
        return ModelBuilder(cell.architecture.component, spec, initial_key(cell), self.context.device)

    def _seeded(self, key: str) -> Context:
        """The context of a stage, with the seed that its content key gives."""
        return replace(self.context, seed=derive_seed(key))

    def _artifact(self, name: str, compute: Callable[[], Artifact], key: str | None = None) -> Artifact:
        """The artifact of a stage: loaded, or computed under a lock, so that of two runs one waits for the other.

        The stages that it needs are there before the clock starts.
        """
        stage, key = find_stage(name), key or stage_key(self.cell, name)
        folder = str(stage.folder)
        artifact = self._cached.get(name) or self.store.load_artifact(folder, key)
        if artifact is None:
            for need in needs_of(stage, self.cell):
                self.run(need.name)
            with self.store.lock(folder, key):
                artifact = self.store.load_artifact(folder, key) or self._compute(folder, key, compute)
        self.costs[name] = Cost(**artifact.meta["cost"])
        self._cached[name] = artifact
        return artifact

    def _compute(self, folder: str, key: str, compute: Callable[[], Artifact]) -> Artifact:
        with measure_stage(self.context.device) as measured:
            made = compute()
        meta = {"cost": measured.cost.model_dump(), "warnings": measured.warnings, **made.meta}
        artifact = Artifact({name: tensor.detach().cpu() for name, tensor in made.tensors.items()}, meta)
        self.store.save_artifact(folder, key, artifact)
        return artifact


def defended_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dictionary of the network in the artifact of a defense."""
    return {name.removeprefix(WEIGHTS): x for name, x in tensors.items() if name.startswith(WEIGHTS)}


def _read_samples(tensors: Mapping[str, Tensor], part: str) -> PoisonedSamples:
    prefix = f"{part}_"
    return PoisonedSamples(**{name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)})


def _with_counts(triggers: FoundTriggers, evaluation: Evaluation) -> list[dict[str, Any]]:
    """What is known of each trigger found in the network, and its hits among the test images of other classes."""
    hits = evaluation.triggered_predictions == evaluation.wanted_labels
    return [
        {**fact, "hits": int(part.sum()), "total": len(part)}
        for fact, part in zip(triggers.facts, torch.split(hits, list(evaluation.part_sizes)), strict=True)
    ]
