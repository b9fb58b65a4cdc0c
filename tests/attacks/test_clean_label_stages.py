"""Clean-label attacks through all stages on real digits: one crafter for those that share it, one frozen backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from bbn_attacks.label_consistent import RobustCrafter
from torch import Tensor, nn

from backdoor_bench_none.api import Context, FitTask, History
from backdoor_bench_none.contracts.cell import Cell
from backdoor_bench_none.contracts.network import Pixels
from backdoor_bench_none.inspection.features import collect_features
from backdoor_bench_none.planning.plan import Plan
from backdoor_bench_none.planning.stage_table import backbone_key, crafter_key, poison_key
from backdoor_bench_none.results.store import Store
from backdoor_bench_none.run.stages import Stages
from backdoor_bench_none.trainers.transfer import Transfer

CONTEXT = Context(torch.device("cpu"), seed=0)
SWEPT = (
    "{name: label_consistent, params: {steps: 5, crafter: {width: 0.125, epochs: 2, steps: 1}}, "
    "sweep: {class_rate: [0.1, 0.5]}}"
)
#: of quick steps; the classes are a surrogate for the paper's pair
HIDDEN = "{name: hidden_trigger, params: {source: 7, target: 2, rule: sign, steps: 5}, sweep: {class_rate: [0.1, 0.5]}}"
TRANSFER = "{name: transfer, params: {pretraining_epochs: 3}, recipe: {epochs: 2}}"
#: an architecture and its last layer
NETWORKS = {
    "{name: mlp, params: {hidden: 16, depth: 1}}": "classifier",
    "{name: resnet18, params: {width: 0.1}}": "fc",
    "{name: alexnet, params: {width: 0.05}}": "classifier.6",
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "results")


def count_calls(kind: type, method: str, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """One entry for every call of a method that does what it did before."""
    calls: list[object] = []
    original = getattr(kind, method)

    def counted(self: object, *rest: Any) -> Any:
        calls.append(self)
        return original(self, *rest)

    monkeypatch.setattr(kind, method, counted)
    return calls


def saved(store: Store, stage: str) -> int:
    return len(list((store.root / "artifacts" / stage).rglob("*.safetensors")))


def assert_clean_label(stages: Stages, target: int, rate: float) -> None:
    """A share of the target class is changed, nothing else is, and no label."""
    train, poisoned = stages.data()[0], stages.poisoned_train()
    changed = (poisoned.images != train.images).flatten(1).any(1)
    expected = round(rate * int((train.labels == target).sum()))
    assert int(changed.sum()) == expected == stages.evaluate().upstream["poisoned_samples"]
    assert train.labels[changed].eq(target).all()
    assert torch.equal(poisoned.labels, train.labels)


# label-consistent


def test_one_crafter_for_attacks_that_differ_in_rate(
    tiny_plan: Callable[..., Plan], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = count_calls(RobustCrafter, "train", monkeypatch)
    few, many = tiny_plan(attack=SWEPT, defense="no_defense").cells
    assert crafter_key(few) == crafter_key(many)
    assert poison_key(few) != poison_key(many)
    for cell, rate in ((few, 0.1), (many, 0.5)):
        stages = Stages(cell, store, CONTEXT)
        record = stages.evaluate()
        assert "crafter" in record.costs
        assert_clean_label(stages, 0, rate)
        assert record.counts is not None
        assert record.counts.attack_success_rate is not None
        assert record.counts.attack_success_rate.total == int((stages.data()[1].labels != 0).sum())
    assert len(trained) == saved(store, "crafter") == 1
    Stages(many, store, CONTEXT).evaluate()
    assert len(trained) == 1


def test_what_a_crafter_depends_on(tiny_plan: Callable[..., Plan]) -> None:
    def cells(params: str, **axes: str) -> list[Cell]:
        attack = f"{{name: label_consistent, params: {{{params}}}}}"
        return tiny_plan(attack=attack, defense="no_defense", **axes).cells

    shared = cells("steps: 5", architecture="mlp, {name: resnet18, params: {width: 0.1}}")
    assert len(shared) == 2
    assert len({crafter_key(cell) for cell in shared}) == len({poison_key(cell) for cell in shared}) == 1
    others = {params: cells(params)[0] for params in ("steps: 6, norm: l2", "crafter: {epochs: 3}")}
    assert [crafter_key(cell) == crafter_key(shared[0]) for cell in others.values()] == [True, False]
    assert [poison_key(cell) == poison_key(shared[0]) for cell in others.values()] == [False, False]
    assert len({crafter_key(cell) for cell in cells("steps: 5", seeds="0, 1")}) == 2
    assert crafter_key(tiny_plan(attack="badnets").cells[0]) is None


# hidden trigger


@pytest.mark.parametrize(("network", "head"), NETWORKS.items(), ids=["mlp", "resnet18", "alexnet"])
def test_oracle_5_only_the_last_layer_moves(
    network: str, head: str, tiny_plan: Callable[..., Plan], store: Store
) -> None:
    cell = tiny_plan(attack=HIDDEN, defense="no_defense", architecture=network, trainer=TRANSFER).cells[1]
    stages = Stages(cell, store, CONTEXT)
    record = stages.evaluate()
    backbone = stages.backbone()
    assert backbone is not None
    initial = stages.builder(0).state_dict()
    defended = stages.defense().tensors
    defended = {name.removeprefix("model."): x for name, x in defended.items() if name.startswith("model.")}
    of_head = {f"{head}.weight", f"{head}.bias"}
    assert of_head < set(initial)
    for weights in (stages.victim().tensors, defended):
        assert differing(weights, backbone.tensors) == differing(weights, initial) == of_head
    assert differing(initial, backbone.tensors) == of_head  # the victim does not begin with the backbone's own
    assert_clean_label(stages, 2, 0.5)
    assert record.counts is not None
    assert record.counts.attack_success_rate is not None
    assert record.counts.attack_success_rate.total == int((stages.data()[1].labels == 7).sum())


@pytest.mark.parametrize("network", list(NETWORKS)[:2], ids=["mlp", "resnet18"])
@pytest.mark.slow
def test_poisons_come_nearer_to_the_patched_source_in_the_frozen_features(
    network: str, tiny_plan: Callable[..., Plan], store: Store
) -> None:
    attack = HIDDEN.replace("[0.1, 0.5]", "[0.5]")
    plan = tiny_plan(seeds="0, 1, 2, 3, 4", attack=attack, defense="no_defense", architecture=network, trainer=TRANSFER)
    nearer = []
    for cell in plan.cells:
        stages = Stages(cell, store, CONTEXT)
        (train, _), (poisoned, triggered) = stages.data(), stages.poison()
        model, pixels = stages.builder(0), Pixels.of(cell.info, CONTEXT.device)
        images = (train.images[poisoned.indices], poisoned.images, triggered.images)
        before, after, wanted = (collect_features(model, part, pixels, CONTEXT) for part in images)
        gone = (before - wanted.mean(0)).norm(dim=1) - (after - wanted.mean(0)).norm(dim=1)
        nearer.append(float((gone > 0).double().mean()))
    assert len(nearer) == 5
    assert median(nearer) > 0.9  # five seeds of the mlp: always 1


def differing(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> set[str]:
    assert set(first) == set(second)
    return {name for name in first if not torch.equal(first[name], second[name])}


def test_only_the_last_layer_gets_gradients(
    tiny_plan: Callable[..., Plan], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[nn.Module] = []
    fit = Transfer.fit

    def watched(self: Transfer, task: FitTask, context: Context) -> History:
        fitted.append(task.model)
        return fit(self, task, context)

    monkeypatch.setattr(Transfer, "fit", watched)
    network = "{name: alexnet, params: {width: 0.05}}"
    cell = tiny_plan(attack=HIDDEN, defense="no_defense", architecture=network, trainer=TRANSFER).cells[0]
    Stages(cell, store, CONTEXT).victim()
    (model,) = fitted
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {"classifier.6.weight", "classifier.6.bias"}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_one_backbone_for_attacks_that_differ_in_rate(
    tiny_plan: Callable[..., Plan], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = count_calls(Transfer, "pretrain", monkeypatch)
    few, many = tiny_plan(attack=HIDDEN, defense="no_defense", trainer=TRANSFER).cells
    assert backbone_key(few) == backbone_key(many)
    assert poison_key(few) != poison_key(many)
    for cell, rate in ((few, 0.1), (many, 0.5)):
        assert_clean_label(Stages(cell, store, CONTEXT), 2, rate)
    assert len(trained) == saved(store, "backbone") == 1


def test_poison_depends_on_the_backbone_only_if_the_attack_knows_it(tiny_plan: Callable[..., Plan]) -> None:
    def keys(attack: str, trainer: str, **axes: str) -> str:
        (cell,) = tiny_plan(attack=attack, defense="no_defense", trainer=trainer, **axes).cells
        return poison_key(cell)

    longer, wider = TRANSFER.replace("3", "4"), {"architecture": "{name: mlp, params: {hidden: 17, depth: 1}}"}
    hidden, consistent = (f"{{name: {name}, params: {{steps: 5}}}}" for name in ("hidden_trigger", "label_consistent"))
    assert len({keys(hidden, TRANSFER), keys(hidden, longer), keys(hidden, TRANSFER, **wider)}) == 3
    assert len({keys(consistent, trainer) for trainer in (TRANSFER, longer, "centralized")}) == 1
    assert keys(consistent, TRANSFER) == keys(consistent, TRANSFER, **wider)


def test_label_consistent_goes_with_a_frozen_backbone_too(tiny_plan: Callable[..., Plan], store: Store) -> None:
    plan = tiny_plan(attack=SWEPT, defense="no_defense", trainer=TRANSFER)
    assert plan.skipped == {}
    stages = Stages(plan.cells[0], store, CONTEXT)
    backbone = stages.backbone()
    assert backbone is not None
    assert differing(stages.victim().tensors, backbone.tensors) == {"classifier.weight", "classifier.bias"}
    assert_clean_label(stages, 0, 0.1)
