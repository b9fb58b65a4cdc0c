"""The stages data -> poison -> victim -> defense -> evaluate: each is loaded if it is there, else computed and kept.

Some attacks and trainers need more: `crafter`, the network that an attack crafts samples with; `backbone`, the frozen
part of every network; `benign`, the victim of the attack `clean`; `search`, triggers found in the defended network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from backdoor_bench_none.attack import AttackTask, Crafter, FoundTriggers, PoisonedSamples, SearchTask, VictimTask
from backdoor_bench_none.cell import Cell
from backdoor_bench_none.context import Context
from backdoor_bench_none.data.dataset import DatasetInfo, ImageSet
from backdoor_bench_none.defense import DefenseTask, OracleTask
from backdoor_bench_none.errors import ConfigError
from backdoor_bench_none.evaluation import Evaluation, evaluate, pack_evaluation, score_detection
from backdoor_bench_none.measures import Counts, Detection
from backdoor_bench_none.models.architecture import Architecture, ModelSpec
from backdoor_bench_none.models.builder import ModelBuilder
from backdoor_bench_none.recipe import Recipe
from backdoor_bench_none.results.record import Cost, Record
from backdoor_bench_none.results.store import Artifact, Store
from backdoor_bench_none.run.checks import check_loadable, check_result, forbid_changes
from backdoor_bench_none.run.measuring import measure_stage
from backdoor_bench_none.seeds import derive_seed
from backdoor_bench_none.task import TrainingTask
from backdoor_bench_none.training import Centralized, Pixels, check_learned, move


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

    def crafter(self) -> Artifact | None:
        """The weights of the network that the attack crafts with, if it does."""
        key = self.cell.crafter_key
        return None if key is None else self._artifact("crafter", key, self._train_crafter, (self.data,))

    def backbone(self) -> Artifact | None:
        """The weights that every network starts from, if the trainer has a backbone."""
        key = self.cell.backbone_key
        return None if key is None else self._artifact("backbone", key, self._pretrain)

    def poison(self) -> tuple[PoisonedSamples, PoisonedSamples]:
        """The poisoned training samples and the triggered test samples."""
        needed = [self.data, self.crafter] + [self.backbone] * self.cell.the_attack.needs_backbone
        tensors = self._artifact("poison", self.cell.poison_key, self._poison, needed).tensors
        train, test = (_read_samples(tensors, part) for part in ("train", "test"))
        return train, test

    def benign(self) -> Artifact:
        """The weights of the network trained on clean data."""
        return self._artifact("victim", self.cell.benign_key, self._train_benign, (self.data, self.backbone), "benign")

    def victim(self) -> Artifact:
        """The weights of the network trained on the poisoned set, or by the attacker."""
        needed = [self.data, self.poison, self.backbone] + [self.benign] * self.cell.the_attack.starts_from_benign
        return self._artifact("victim", self.cell.victim_key, self._train_victim, needed)

    def defense(self) -> Artifact:
        """The weights of the defended network, and what the defense found."""
        needed = [self.data, self.poison, self.backbone] + [self.victim] * self.cell.the_defense.starts_from_victim
        return self._artifact("defense", self.cell.defense_key, self._defend, needed)

    def search(self) -> FoundTriggers:
        """The triggers that the attack finds in the defended network."""
        found = self._artifact("search", self.cell.search_key, self._search, (self.defense,))
        return FoundTriggers(**found.tensors, facts=tuple(found.meta["facts"]))

    def evaluate(self) -> Record:
        """The cell's record, not yet written."""
        defended = self.defense()
        self.data(), self.crafter(), self.backbone(), self.poison()  # whoever computed them, their costs are known
        if self.cell.the_defense.starts_from_victim:
            if self.cell.the_attack.starts_from_benign:
                self.benign()
            self.victim()
        if self.cell.the_attack.searches:
            self.search()
        with measure_stage(self.context.device) as measured:
            record = self._evaluate(defended)
        self.costs["evaluate"] = measured.cost
        costs = dict(self.costs)
        if not record.victim_losses:
            costs.pop("victim", None)  # it was not trained here, so there is no training to compare costs with
        return record.model_copy(update={"costs": costs, "warnings": [*defended.meta["warnings"], *measured.warnings]})

    # How each is computed.

    def _load_data(self) -> Artifact:
        train, test = self.cell.the_dataset.load()
        tensors: dict[str, Tensor] = {}
        for name, part in (("train", train), ("test", test)):
            tensors |= {f"{name}_images": part.images, f"{name}_labels": part.labels}
        return Artifact(tensors, {})

    def _train_crafter(self) -> Artifact:
        crafter = cast("Crafter", self.cell.the_attack.crafted_with())
        model = crafter.train(self._crafting_task(crafter), replace(self.context, seed=self._seed("crafter_key")))
        return Artifact(model.state_dict(), {})

    def _crafting_task(self, crafter: Crafter) -> TrainingTask:
        architecture, info = crafter.architecture(), self.cell.info
        spec = ModelSpec(info.num_classes, info.shape[0], info.shape[1], nn.ReLU)
        builder = ModelBuilder(architecture, spec, str(self.cell.crafter_key), self.context.device)
        train = self.data()[0].to(self.context.device)
        recipe = self._own_recipe(architecture)
        return TrainingTask(train=train, info=info, recipe=recipe, trainer=Centralized(), build=builder)

    def _own_recipe(self, architecture: Architecture) -> Recipe:
        """The recipe that the data set and an architecture bring along."""
        return Recipe(**{**self.cell.the_dataset.recipe(), **architecture.recipe(self.cell.dataset.name)})

    def _pretrain(self) -> Artifact:
        def make_task() -> TrainingTask:
            train, classes = self.cell.the_dataset.load_for_pretraining()
            info = replace(self.cell.info, num_classes=classes, train_size=len(train))
            return TrainingTask(
                train=train.to(self.context.device), info=info, recipe=self._own_recipe(self.cell.the_architecture),
                trainer=Centralized(), build=self._make_builder(info),
            )  # fmt: skip

        context = replace(self.context, seed=self._seed("backbone_key"))
        model = self.cell.the_trainer.pretrain(make_task, self._make_builder(self.cell.info), context)
        return Artifact(model.state_dict(), {})

    def _poison(self) -> Artifact:
        train, test = self.attack_tasks()
        attack, tensors = self.cell.the_attack, dict[str, Tensor]()
        for name, task, make in (("train", train, attack.poison), ("test", test, attack.attack_test)):
            with forbid_changes(data=task.data):
                samples = make(task)
            tensors |= {f"{name}_{x}": tensor for x, tensor in vars(samples).items() if tensor is not None}
        return Artifact(tensors, {})

    def attack_tasks(self) -> tuple[AttackTask, AttackTask]:
        """What the attack is given to poison the training set with, and the test set."""
        network = self._crafting_network()
        made = []
        for name, part, clients in zip(("train", "test"), self.data(), (self.clients(), None), strict=True):
            seed = derive_seed(self._seed("poison_key"), name)
            made.append(AttackTask(part, self.cell.info, seed, network, clients, replace(self.context, seed=seed)))
        return made[0], made[1]

    def _crafting_network(self) -> nn.Module | None:
        """What the attack asked to craft with: its own network, or the victim's frozen backbone."""
        if (weights := self.crafter()) is not None:
            crafter = cast("Crafter", self.cell.the_attack.crafted_with())
            return self._crafting_task(crafter).build.load(weights.tensors)
        return self.builder(0).eval() if self.cell.the_attack.needs_backbone else None

    def _train_benign(self) -> Artifact:
        cell, context = self.cell, replace(self.context, seed=self._seed("benign_key"))
        task = self._training_task(self.data()[0])
        history = task.fit(model := task.new_model(), context)
        check_learned(history, cell.info.num_classes)
        return Artifact(model.state_dict(), {"losses": history.losses})

    def _train_victim(self) -> Artifact:
        attack, context = self.cell.the_attack, replace(self.context, seed=self._seed("victim_key"))
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
            benign_weights=self.benign().tensors if self.cell.the_attack.starts_from_benign else None,
        )

    def _training_task(self, train: ImageSet) -> TrainingTask:
        cell = self.cell
        return TrainingTask(
            train=train.to(self.context.device), info=cell.info, recipe=cell.recipe, trainer=cell.the_trainer,
            build=self.builder, clients=self.clients(),
        )  # fmt: skip

    def _defend(self) -> Artifact:
        cell, context = self.cell, replace(self.context, seed=self._seed("defense_key"))
        torch.manual_seed(context.seed)
        task = self.defense_task()
        with forbid_changes(train=task.train, clean=task.clean):
            result = cell.the_defense.run(task, context)
        check_result(result, len(task.train))
        check_loadable(result.model, self.defended_shell(), "Defense.adapt")
        found = {name: x for name in ("flagged", "scores") if (x := getattr(result, name)) is not None}
        tensors = {f"model.{name}": tensor for name, tensor in result.model.state_dict().items()}
        return Artifact({**tensors, **found}, {"extras": dict(result.extras), "infected": result.infected})

    def defense_task(self) -> DefenseTask:
        """What the defense is given."""
        cell = self.cell
        given: dict[str, Any] = {
            **vars(self._training_task(self.poisoned_train())),
            "clean": self.clean_holdout(),
            "victim_network": self.victim_network() if cell.the_defense.starts_from_victim else None,
        }
        if cell.the_defense.sees_ground_truth:
            (original, test), (samples, triggered) = self.data(), self.poison()
            return OracleTask(
                **given, poisoned=self.poisoned(), original=original, poisoned_samples=samples, test=test,
                triggered_samples=triggered,
            )  # fmt: skip
        return DefenseTask(**given)

    def defended_shell(self) -> nn.Module:
        """The structure of the network that the defense returns."""
        starts = self._victim_shell() if self.cell.the_defense.starts_from_victim else self.builder(0)
        return self.cell.the_defense.adapt(starts)

    def _victim_shell(self) -> nn.Module:
        """The structure of the victim, which an attacker who trains it may change."""
        return self.cell.the_attack.adapt(self.builder(0), self.cell.info)

    def victim_network(self) -> nn.Module:
        """The victim, in eval mode, on the device."""
        model = move(self._victim_shell(), self.context.device)
        model.load_state_dict(dict(self.victim().tensors))
        return model.eval()

    def network(self) -> nn.Module:
        """The network that the defense returned, in eval mode, on the device."""
        weights = {name[6:]: x for name, x in self.defense().tensors.items() if name.startswith("model.")}
        model = move(self.defended_shell(), self.context.device)
        model.load_state_dict(weights)
        return model.eval()

    def _search(self) -> Artifact:
        context = replace(self.context, seed=self._seed("search_key"))
        task = SearchTask(self.network(), self.data()[0].to(context.device), self.cell.info)
        found = self.cell.the_attack.find_triggers(task, context)
        tensors = {"masks": found.masks, "patterns": found.patterns, "labels": found.labels}
        return Artifact(tensors, {"facts": [dict(fact) for fact in found.facts]})

    def _evaluate(self, defended: Artifact) -> Record:
        cell = self.cell
        found = self.search() if cell.the_attack.searches else None
        counts, evaluation = self.evaluate_network(self.network())
        detection = self.detect(defended.tensors.get("flagged"), defended.tensors.get("scores"))
        metrics = {
            f"{choice.label}.{name}": float(value)
            for choice in cell.metrics
            for name, value in choice.component.compute(evaluation).items()  # type: ignore[attr-defined]
        }
        upstream = {
            "data": cell.data_key, "poison": cell.poison_key, "victim": cell.victim_key, "defense": cell.defense_key,
            "dataset_sha256": cell.fingerprint, "poisoned_samples": int(self.poisoned().sum()),
        }  # fmt: skip
        losses = self.victim().meta["losses"] if cell.the_defense.starts_from_victim else []
        return Record.of(
            cell, "done", counts=counts, detection=detection,
            outcomes=pack_evaluation(evaluation), metrics=metrics, infected=defended.meta["infected"],
            extras=defended.meta["extras"], victim_losses=losses, upstream=upstream,
            triggers=[] if found is None else _with_counts(found, evaluation),
            provenance=dict(self.provenance), defense_stage=cell.the_defense.stage,
            sees_ground_truth=cell.the_defense.sees_ground_truth,
        )  # fmt: skip

    def evaluate_network(self, model: nn.Module) -> tuple[Counts, Evaluation]:
        """The counts of a finished network on the clean and the triggered test set."""
        (_, test), (_, triggered) = self.data(), self.poison()
        found = self.search() if self.cell.the_attack.searches else None
        parts = [triggered] if found is None else (found.stamp(index, test) for index in range(len(found.labels)))
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
        found, samples = torch.zeros(len(self.data()[0]), dtype=torch.bool), self.poison()[0]
        if samples.decoys is not None:
            found[samples.indices[samples.decoys]] = True
        return found

    def clean_holdout(self) -> ImageSet | None:
        """int(clean_fraction * N) training samples that were not
        poisoned, a smaller fraction's among a larger one's.
        """
        fraction = self.cell.the_defense.clean_fraction
        if fraction == 0:
            return None
        train = self.data()[0]
        benign = ~(self.poisoned() | self.decoys())
        generator = torch.Generator().manual_seed(derive_seed(self.cell.train_key, self.cell.seed, "clean hold-out"))
        order = torch.randperm(len(train), generator=generator)
        count, available = int(fraction * len(train)), int(benign.sum())
        if not 0 < count <= available:
            found = f"{count} of {len(train)} training images; {available} are not poisoned"
            raise ConfigError(f"clean_fraction {fraction} asks for {found}", "choose a fraction in between")
        return train.take(order[benign[order]][:count]).to(self.context.device)

    def clients(self) -> Tensor | None:
        """The client (N,) of every training sample, by the clean labels; None where all data are in one place."""
        cell = self.cell
        if not cell.the_trainer.has_clients:
            return None
        seed = derive_seed(cell.data_key, cell.seed, "clients")
        return cell.the_trainer.split(self.data()[0].labels, cell.info.num_classes, seed)

    @property
    def builder(self) -> ModelBuilder:
        """Makes the cell's networks; draw 0 is the same for all attacks and defenses of a seed."""
        backbone = self.backbone()
        return replace(self._make_builder(self.cell.info), backbone=None if backbone is None else backbone.tensors)

    def _make_builder(self, info: DatasetInfo) -> ModelBuilder:
        cell = self.cell
        spec = ModelSpec(info.num_classes, info.shape[0], info.shape[1], cell.the_activation.build)
        return ModelBuilder(cell.the_architecture, spec, cell.initial_key, self.context.device)

    def _seed(self, key: str) -> int:
        return derive_seed(getattr(self.cell, key))

    def _artifact(
        self,
        stage: str,
        key: str,
        compute: Callable[[], Artifact],
        needed: Sequence[Callable[[], object]] = (),
        name: str | None = None,
    ) -> Artifact:
        """The artifact of a stage: loaded, or computed under a lock, so that of two runs one waits for the other.

        The stages in `needed` are there before the clock starts. `name` is that of the cost, where it is not `stage`.
        """
        name = name or stage
        artifact = self._cached.get(name) or self.store.load_artifact(stage, key)
        if artifact is None:
            for stage_before in needed:
                stage_before()
            with self.store.lock(stage, key):
                artifact = self.store.load_artifact(stage, key) or self._compute(stage, key, compute)
        self.costs[name] = Cost(**artifact.meta["cost"])
        self._cached[name] = artifact
        return artifact

    def _compute(self, stage: str, key: str, compute: Callable[[], Artifact]) -> Artifact:
        with measure_stage(self.context.device) as measured:
            made = compute()
        meta = {"cost": measured.cost.model_dump(), "warnings": measured.warnings, **made.meta}
        artifact = Artifact({name: tensor.detach().cpu() for name, tensor in made.tensors.items()}, meta)
        self.store.save_artifact(stage, key, artifact)
        return artifact


def _read_samples(tensors: Mapping[str, Tensor], part: str) -> PoisonedSamples:
    found = {name.removeprefix(f"{part}_"): tensor for name, tensor in tensors.items() if name.startswith(f"{part}_")}
    return PoisonedSamples(**found)


def _with_counts(found: FoundTriggers, evaluation: Evaluation) -> list[dict[str, Any]]:
    """What is known of each trigger found in the network, and its hits among the test images of other classes."""
    hits = evaluation.triggered_predictions == evaluation.wanted_labels
    return [
        {**fact, "hits": int(part.sum()), "total": len(part)}
        for fact, part in zip(found.facts, torch.split(hits, list(evaluation.part_sizes)), strict=True)
    ]
