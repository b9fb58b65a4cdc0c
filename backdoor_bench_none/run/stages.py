"""Computes the stages of a cell: each is loaded if its artifact exists, else computed and kept.

There is one method for each row of the table in `planning/stage_table.py`.
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
from backdoor_bench_none.contracts.network import Pixels, move, unwrap
from backdoor_bench_none.contracts.recipe import Recipe
from backdoor_bench_none.contracts.record import Cost, Record
from backdoor_bench_none.contracts.task import TrainingTask
from backdoor_bench_none.contracts.trainer import PretrainingTask, check_learned
from backdoor_bench_none.planning.stage_table import (
    Stage,
    artifact_keys,
    benign_key,
    find_stage,
    has_stage,
    initial_key,
    needs_of,
    record_key,
    stage_key,
    stages_of,
    train_key,
    victim_key,
)
from backdoor_bench_none.results.store import Artifact, Store
from backdoor_bench_none.run import artifacts
from backdoor_bench_none.run.checks import (
    check_dataset,
    check_rebuilt,
    check_result,
    check_samples,
    forbid_changes,
    is_same_network,
)
from backdoor_bench_none.run.evaluation import count_trigger_hits, evaluate, pack_evaluation, score_detection
from backdoor_bench_none.run.ground_truth import draw_clean_samples, mark_decoys, mark_poisoned
from backdoor_bench_none.run.isolation import isolated
from backdoor_bench_none.run.measuring import measure_stage
from backdoor_bench_none.seeds import derive_seed
from backdoor_bench_none.trainers.centralized import Centralized

#: of so many training images, and of as many poisoned ones, the logits of a returned network are compared
COMPARED = 128


@dataclass
class Stages:
    """The stages of one cell.

    `context` holds device, precision, deadline and progress; each stage gets its own seed.
    """

    cell: Cell
    store: Store
    context: Context
    provenance: Mapping[str, Any] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)
    #: the decoded data set that this process had last, by its key; the next cell often has the same
    kept: dict[str, Artifact] = field(default_factory=dict)
    _cached: dict[str, Artifact] = field(default_factory=dict)

    def data(self) -> tuple[ImageSet, ImageSet]:
        """The decoded training and test set."""
        key = stage_key(self.cell, "data")
        if key in self.kept:
            self._cached.setdefault("data", self.kept[key])
        tensors = self._artifact("data", self._load).tensors
        if key not in self.kept:
            self.kept.clear()
            self.kept[key] = self._cached["data"]
        return artifacts.read_images(tensors, "train"), artifacts.read_images(tensors, "test")

    def crafter(self) -> Artifact:
        """The weights of the network that the attack crafts with."""
        return self._artifact("crafter", self._train_crafter)

    def backbone(self) -> Artifact:
        """The weights that every network starts from."""
        return self._artifact("backbone", self._pretrain)

    def poison(self) -> tuple[PoisonedSamples, PoisonedSamples]:
        """The poisoned training samples and the triggered test samples."""
        tensors = self._artifact("poison", self._poison).tensors
        return artifacts.read_samples(tensors, "train"), artifacts.read_samples(tensors, "test")

    def benign(self) -> Artifact:
        """The weights of the network trained on clean data, which can be computed for every cell."""
        return self._artifact("benign", self._train_benign, benign_key(self.cell))

    def victim(self) -> Artifact:
        """The weights of the network trained on the poisoned set, or by the attacker.

        They can be computed for every cell, also where the defense does not start from them.
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
        """The cell's record, not yet written; every stage of the cell has its artifact and its cost afterwards."""
        for stage in stages_of(self.cell):
            if stage.folder is not None:
                self.run(stage.name)
        defended = self.defense()
        with measure_stage(self.context.device) as measured:
            record = self._evaluate(defended)
        self.costs["evaluate"] = measured.cost
        costs = dict(self.costs)
        if not record.victim_losses:
            costs.pop("victim", None)  # a victim that was not trained has no cost to compare with
        noted = [text for artifact in self._cached.values() for text in artifact.meta.get("warnings", ())]
        return record.model_copy(update={"costs": costs, "warnings": [*dict.fromkeys([*noted, *measured.warnings])]})

    def run(self, name: str) -> None:
        """Load or compute a stage, by name."""
        getattr(self, name)()

    # How each stage is computed.

    def _train_crafter(self) -> Artifact:
        task, crafter = self._crafting_task()
        with isolated("the attack"):
            model = crafter.train(task, self._seeded(stage_key(self.cell, "crafter")))
        return Artifact(model.state_dict(), {})

    def _crafting_task(self) -> tuple[TrainingTask, Crafter]:
        """The task of the attack's crafter, and the crafter."""
        crafter = self.cell.attack.component.crafted_with()
        assert crafter is not None, "a cell without a crafter has no such stage"
        architecture, info = crafter.architecture(), self.cell.info
        spec = ModelSpec(info.num_classes, info.shape[0], info.shape[1], nn.ReLU)
        builder = ModelBuilder(architecture, spec, stage_key(self.cell, "crafter"), self.context.device)
        train = self.data()[0].to(self.context.device)
        recipe = self._own_recipe(architecture)
        return TrainingTask(train=train, info=info, recipe=recipe, trainer=Centralized(), build=builder), crafter

    def _own_recipe(self, architecture: Architecture) -> Recipe:
        """The recipe of the data set and an architecture, without that of the trainer or of the benchmark file."""
        return Recipe(**{**self.cell.dataset.component.recipe(), **architecture.recipe(self.cell.dataset.name)})

    def _pretrain(self) -> Artifact:
        def open_task() -> TrainingTask:
            with isolated("the data set"):
                train, classes = self.cell.dataset.component.load_for_pretraining()
            info = replace(self.cell.info, num_classes=classes, train_size=len(train))
            return TrainingTask(
                train=train.to(self.context.device), info=info,
                recipe=self._own_recipe(self.cell.architecture.component), trainer=Centralized(),
                build=self._make_builder(info),
            )  # fmt: skip

        task = PretrainingTask(self._make_builder(self.cell.info), open_task)
        with isolated("the trainer"):
            model = self.cell.trainer.component.pretrain(task, self._seeded(stage_key(self.cell, "backbone")))
        return Artifact(model.state_dict(), {})

    def _load(self) -> Artifact:
        with isolated("the data set"):
            train, test = self.cell.dataset.component.load()
        check_dataset(train, test, self.cell.info)
        return artifacts.data_artifact(train, test)

    def _poison(self) -> Artifact:
        attack, (train, test) = self.cell.attack.component, self.attack_tasks()
        samples: dict[str, PoisonedSamples] = {}
        for name, (task, context), method in (("train", train, attack.poison), ("test", test, attack.attack_test)):
            with isolated("the attack"), forbid_changes(data=task.data):
                samples[name] = method(task, context)
            check_samples(samples[name], len(task.data), task.info, f"{method.__name__}()")
        return artifacts.samples_artifact(samples)

    def attack_tasks(self) -> tuple[tuple[AttackTask, Context], tuple[AttackTask, Context]]:
        """The attack's task and context for the training set, and those for the test set."""
        network, info, (train, test) = self._crafting_network(), self.cell.info, self.data()
        stage_seed = derive_seed(stage_key(self.cell, "poison"))
        contexts = [replace(self.context, seed=derive_seed(stage_seed, part)) for part in ("train", "test")]
        return (
            (AttackTask(train, info, network, self.clients()), contexts[0]),
            (AttackTask(test, info, network, None), contexts[1]),
        )

    def _crafting_network(self) -> nn.Module | None:
        """The network that the attack crafts with: its own, or the victim's frozen backbone; None if it needs none."""
        if has_stage(self.cell, "crafter"):
            task, _ = self._crafting_task()
            return task.build.load(self.crafter().tensors)
        if self.cell.attack.component.needs_backbone:
            return self.builder(0).eval()
        return None

    def _train_benign(self) -> Artifact:
        cell, context = self.cell, self._seeded(benign_key(self.cell))
        task = self._training_task(self.data()[0])
        with isolated("the trainer"):
            history = task.fit(model := task.new_model(), context)
        check_learned(history, cell.info.num_classes)
        return Artifact(model.state_dict(), {"losses": history.losses})

    def _train_victim(self) -> Artifact:
        attack, context = self.cell.attack.component, self._seeded(victim_key(self.cell))
        task = self.victim_task()
        with isolated("the attack"), forbid_changes(train=task.train, original=task.original):
            torch.manual_seed(context.seed)
            model, history = attack.train(task, context)
        remedy = "Attack.adapt" if attack.controls_training else "Architecture.build"
        model = self._check_rebuilt(model, self._victim_shell(), task.train, remedy)
        return Artifact(model.state_dict(), {"losses": history.losses})

    def _check_rebuilt(self, model: nn.Module, shell: nn.Module, train: ImageSet, remedy: str) -> nn.Module:
        """`model` without wrappers; `TypeError` unless its weights in `shell` make the same network.

        Both classify images of the poisoned training set `train`.
        """
        images = self._compared(train)
        model = unwrap(model)
        pixels = Pixels.of(self.cell.info, self.context.device)
        check_rebuilt(model, shell, images, pixels, self.context, remedy)
        return model

    def victim_task(self) -> VictimTask:
        """The task of an attacker who controls training."""
        benign_weights = self.benign().tensors if self.cell.attack.component.starts_from_benign else None
        return VictimTask(
            **vars(self._training_task(self.poisoned_train())),
            original=self.data()[0].to(self.context.device),
            poisoned=self.poison()[0].indices,
            benign_weights=benign_weights,
        )

    def _training_task(self, train: ImageSet) -> TrainingTask:
        cell = self.cell
        return TrainingTask(
            train=train.to(self.context.device), info=cell.info, recipe=cell.recipe, trainer=cell.trainer.component,
            build=self.builder, clients=self.clients(),
        )  # fmt: skip

    def _defend(self) -> Artifact:
        cell, context = self.cell, self._seeded(stage_key(self.cell, "defense"))
        task = self.defense_task()
        with isolated("the defense"), forbid_changes(train=task.train, clean=task.clean):
            torch.manual_seed(context.seed)
            result = cell.defense.component.run(task, context)
        check_result(result, len(task.train))
        model = self._check_rebuilt(result.model, self.defended_shell(), task.train, "Defense.adapt")
        return artifacts.defense_artifact(replace(result, model=model), unchanged=self._is_victim(model, task.train))

    def _is_victim(self, model: nn.Module, train: ImageSet) -> bool:
        """Whether a defense that starts from the victim returned it as it was."""
        if not self.cell.defense.component.starts_from_victim:
            return False
        pixels = Pixels.of(self.cell.info, self.context.device)
        return is_same_network(model, self.victim_network(), self._compared(train), pixels, self.context)

    def _compared(self, train: ImageSet) -> Tensor:
        """The first images of the poisoned training set, and as many poisoned ones."""
        return torch.cat([train.images[:COMPARED], train.take(self.poison()[0].indices[:COMPARED]).images])

    def defense_task(self) -> DefenseTask:
        """The task of the defense; only one that sees the ground truth is given any of it."""
        defense = self.cell.defense.component
        task = DefenseTask(
            **vars(self._training_task(self.poisoned_train())),
            clean=self.clean_holdout(),
            victim_network=self.victim_network() if defense.starts_from_victim else None,
        )
        if not defense.sees_ground_truth:
            return task
        (original, test), (samples, triggered) = self.data(), self.poison()
        return OracleTask(
            **vars(task), poisoned=self.poisoned(), original=original, poisoned_samples=samples, test=test,
            triggered_samples=triggered,
        )  # fmt: skip

    def defended_shell(self) -> nn.Module:
        """The structure of the network that the defense returns, on the device."""
        defense = self.cell.defense.component
        start = self._victim_shell() if defense.starts_from_victim else self.builder(0)
        return move(defense.adapt(start), self.context.device)

    def _victim_shell(self) -> nn.Module:
        """The structure of the victim on the device, which an attacker who controls training may change."""
        return move(self.cell.attack.component.adapt(self.builder(0), self.cell.info), self.context.device)

    def victim_network(self) -> nn.Module:
        """The victim, in eval mode, on the device."""
        model = self._victim_shell()
        model.load_state_dict(dict(self.victim().tensors))
        return model.eval()

    def network(self) -> nn.Module:
        """The network that the defense returned, in eval mode, on the device."""
        model = self.defended_shell()
        model.load_state_dict(defended_weights(self.defense().tensors))
        return model.eval()

    def _search(self) -> Artifact:
        context = self._seeded(stage_key(self.cell, "search"))
        task = SearchTask(self.network(), self.data()[0].to(context.device), self.cell.info)
        with isolated("the attack"):
            triggers = self.cell.attack.component.find_triggers(task, context)
        tensors = {"masks": triggers.masks, "patterns": triggers.patterns, "labels": triggers.labels}
        return Artifact(tensors, {"facts": [dict(fact) for fact in triggers.facts]})

    def _evaluate(self, defended: Artifact) -> Record:
        cell = self.cell
        counts, evaluation = self.evaluate_network(self.network())
        detection = self.detect(defended.tensors.get("flagged"), defended.tensors.get("scores"))
        metrics: dict[str, float] = {}
        for choice in cell.metrics:
            if choice.component.absent_for(cell.attack.component, cell.info):
                continue
            with isolated(f"metric '{choice.label}'"):
                numbers = choice.component.compute(evaluation, self.context)
            metrics |= {f"{choice.label}.{name}": float(value) for name, value in numbers.items()}
        facts = {"dataset_sha256": cell.fingerprint, "poisoned_samples": int(self.poisoned().sum())}
        losses = self.victim().meta["losses"] if has_stage(cell, "victim") else []
        triggers = count_trigger_hits(self.search(), evaluation) if has_stage(cell, "search") else []
        return Record.of(
            cell, record_key(cell), "done", counts=counts, detection=detection,
            outcomes=pack_evaluation(evaluation), metrics=metrics, infected=defended.meta["infected"],
            unchanged=defended.meta.get("unchanged", False),
            extras=defended.meta["extras"], victim_losses=losses, upstream={**artifact_keys(cell), **facts},
            triggers=triggers,
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
        info = self.cell.info
        counts, evaluation = evaluate(model, test, parts, Pixels.of(info, self.context.device), self.context)
        return counts, replace(evaluation, test=test, info=info, attack=self.cell.attack.component)

    def detect(self, flagged: Tensor | None, scores: Tensor | None) -> Detection | None:
        """The counts of `flagged` (N,) bool and `scores` (N,) against the ground truth; None if `flagged` is."""
        if flagged is None:
            return None
        counted = ~self.decoys()
        if scores is not None:
            scores = scores[counted]
        return score_detection(flagged[counted], scores, self.poisoned()[counted])

    # What the stages share.

    def poisoned_train(self) -> ImageSet:
        """The training set as the defender gets it."""
        return self.poison()[0].replace(self.data()[0])

    def poisoned(self) -> Tensor:
        """The ground truth (N,) bool."""
        return mark_poisoned(self.poison()[0], len(self.data()[0]))

    def decoys(self) -> Tensor:
        """The samples (N,) bool that the attack changed and that are neither poisoned nor benign."""
        return mark_decoys(self.poison()[0], len(self.data()[0]))

    def clean_holdout(self) -> ImageSet | None:
        """int(clean_fraction * N) training samples that were not poisoned; None if the defense takes none."""
        fraction = self.cell.defense.component.clean_fraction
        if fraction == 0:
            return None
        benign = ~(self.poisoned() | self.decoys())
        seed = derive_seed(train_key(self.cell), self.cell.seed, "clean hold-out")
        return self.data()[0].take(draw_clean_samples(benign, fraction, seed)).to(self.context.device)

    def clients(self) -> Tensor | None:
        """The client (N,) of each training sample, assigned by the clean labels; None where training has no clients."""
        cell = self.cell
        if not cell.trainer.component.has_clients:
            return None
        seed = derive_seed(stage_key(cell, "data"), cell.seed, "clients")
        return cell.trainer.component.split(self.data()[0].labels, cell.info.num_classes, seed)

    @property
    def builder(self) -> ModelBuilder:
        """The builder of the cell's networks; draw 0 is the same for all attacks and defenses of a seed."""
        builder = self._make_builder(self.cell.info)
        if has_stage(self.cell, "backbone"):
            return replace(builder, backbone=self.backbone().tensors)
        return builder

    def _make_builder(self, info: DatasetInfo) -> ModelBuilder:
        cell = self.cell
        spec = ModelSpec(info.num_classes, info.shape[0], info.shape[1], cell.activation.component.build)
        return ModelBuilder(cell.architecture.component, spec, initial_key(cell), self.context.device)

    def _seeded(self, key: str) -> Context:
        """The context of a stage, with the seed derived from its content key."""
        return replace(self.context, seed=derive_seed(key))

    def _artifact(self, name: str, compute: Callable[[], Artifact], key: str | None = None) -> Artifact:
        """The artifact of a stage: loaded, or computed under a lock, for which a second run waits.

        The stages it needs are computed before its clock starts.
        """
        stage, key = find_stage(name), key or stage_key(self.cell, name)
        folder = str(stage.folder)
        artifact = self._cached.get(name) or self.store.load_artifact(folder, key)
        if artifact is None:
            self._compute_needs(stage)
            with self.store.lock(folder, key):
                artifact = self.store.load_artifact(folder, key) or self._compute(folder, key, compute)
        self.costs[name] = Cost(**artifact.meta["cost"])
        self._cached[name] = artifact
        return artifact

    def _compute_needs(self, stage: Stage) -> None:
        for need in needs_of(stage, self.cell):
            self.run(need.name)
        if stage.name == "victim" and self.cell.attack.component.starts_from_benign:
            self.benign()  # needed also by a victim that is no stage of the cell

    def _compute(self, folder: str, key: str, compute: Callable[[], Artifact]) -> Artifact:
        with measure_stage(self.context.device) as measured:
            computed = compute()
        meta = {"cost": measured.cost.model_dump(), "warnings": measured.warnings, **computed.meta}
        artifact = Artifact({name: tensor.detach().cpu() for name, tensor in computed.tensors.items()}, meta)
        self.store.save_artifact(folder, key, artifact)
        return artifact


def defended_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dictionary of the network in the artifact of a defense."""
    prefix = artifacts.WEIGHTS
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
