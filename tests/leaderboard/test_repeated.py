"""Forgeries whose weights give the very numbers that the records claim: only a second run exposes them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bbn_defenses.no_defense import NoDefense
from torch import nn

from backdoor_bench_none.contracts.cell import Cell
from backdoor_bench_none.contracts.context import Context
from backdoor_bench_none.contracts.network import Pixels
from backdoor_bench_none.contracts.record import Record
from backdoor_bench_none.leaderboard.verification import Finding, Verification
from backdoor_bench_none.planning.plan import Plan
from backdoor_bench_none.planning.stage_table import defense_key, record_key
from backdoor_bench_none.results.store import Store
from backdoor_bench_none.run.stages import Stages

CPU = torch.device("cpu")
ATTACKED = [f"digits/badnets/fine_tune/mlp/relu/s{seed}" for seed in range(3)]
Forge = Callable[..., Any]
Verify = Callable[..., Verification]
Faults = Callable[[Verification], list[Finding]]


def attacked_cells(plan: Plan, work: Path) -> Iterator[tuple[str, Cell, Stages]]:
    for cell in plan.cells:
        if cell.attack.name != "clean":
            yield f"{cell.attack.label}/s{cell.seed}", cell, Stages(cell, Store(work), Context(CPU, 0))


def load(forged: Any, name: str, stages: Stages) -> nn.Module:
    """The submitted network of a cell."""
    model = stages.defended_shell()
    tensors = forged.tensors(name)
    model.load_state_dict({n.removeprefix("model."): x for n, x in tensors.items() if n.startswith("model.")})
    return model


def rewrite_numbers(forged: Any, plan: Plan, work: Path) -> None:
    """Let the records say what the submitted weights give."""
    for name, _, stages in attacked_cells(plan, work):
        record = forged.record(name)
        record["counts"] = stages.evaluate_network(load(forged, name, stages))[0].model_dump()
        forged.write_record(name, record)


def train_on_the_test_trigger(forged: Any, plan: Plan, work: Path) -> None:
    """Train every attacked network on all test images, triggered or not, with their true labels until it knows them."""
    for name, cell, stages in attacked_cells(plan, work):
        (_, test), (_, triggered) = stages.data(), stages.poison()
        images = Pixels.of(cell.info, CPU).normalize(torch.cat([triggered.images, test.images]))
        labels = torch.cat([test.labels[triggered.indices], test.labels])
        model = load(forged, name, stages).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(2000):
            logits = model(images)
            if (logits.argmax(1) == labels).all():  # after 42 to 90 steps, from six random starts
                break
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, labels).backward()
            optimizer.step()
        forged.edit_tensors(name, **{f"model.{n}": x.detach() for n, x in model.state_dict().items()})


def attack_rates(forged: Any) -> list[float]:
    counts = [forged.record(f"badnets/s{seed}")["counts"]["attack_success_rate"] for seed in range(3)]
    return [count["hits"] / count["total"] for count in counts]


def exposed(verification: Verification, faults: Faults) -> list[str]:
    """The cells whose second run differs; there is no other fault, and every model gives what its record says."""
    assert verification.verdict == "refused"
    assert len(verification.reevaluated) == 6
    assert {each.check for each in faults(verification)} == {"repeated"}
    return sorted(each.cell for each in faults(verification))


def test_a_network_trained_on_the_test_trigger_is_exposed(
    arena: Any, forge: Forge, verify: Verify, faults: Faults, tmp_path: Path
) -> None:
    forged, plan = forge(), arena.plan("fine_tune")
    honest = attack_rates(forged)
    train_on_the_test_trigger(forged, plan, tmp_path / "forger")
    rewrite_numbers(forged, plan, tmp_path / "forger")
    assert attack_rates(forged) == [0.0] * 3
    assert min(honest) > 0
    assert verify(forged.seal()).verdict == "reevaluated"
    verification = verify(forged.folder, sample=6)
    assert exposed(verification, faults) == ATTACKED
    assert all(re.search(r"submitted \d+\.\d+%, run again \d+\.\d+%", each.message) for each in faults(verification))


@pytest.mark.parametrize(("name", "value"), [("device", "another"), ("threads", 64), ("libraries", {"torch": "9"})])
def test_it_is_exposed_on_another_machine_too(
    name: str, value: object, arena: Any, forge: Forge, verify: Verify, faults: Faults, tmp_path: Path
) -> None:
    """Where equal numbers cannot be asked for, a difference beyond three deviations over seeds is one."""
    forged, plan = forge(), arena.plan("fine_tune")
    train_on_the_test_trigger(forged, plan, tmp_path / "forger")
    rewrite_numbers(forged, plan, tmp_path / "forger")
    for cell in forged.keys:
        record = forged.record(cell)
        record["provenance"][name] = value
        forged.write_record(cell, record)
    assert exposed(verify(forged.seal(), sample=6), faults) == ATTACKED


def test_an_honest_record_of_another_machine_may_differ_a_little(forge: Forge, verify: Verify, faults: Faults) -> None:
    """One image of 500 more is rounding elsewhere, and a forgery here."""
    for device, verdict in (("another", "verified"), (None, "refused")):
        forged = forge("fine_tune", to=f"on-{device}")
        record = forged.record("badnets/s0")
        record["counts"]["benign_accuracy"]["hits"] += 1
        record["provenance"]["device"] = device or record["provenance"]["device"]
        forged.write_record("badnets/s0", record)
        assert verify(forged.seal(), sample=6).verdict == verdict


def test_seeds_swapped_whole_are_exposed(forge: Forge, verify: Verify, faults: Faults) -> None:
    """Weights and numbers are another seed's, and all that a record says of itself is edited."""
    forged = forge()
    one, other = "badnets/s0", "badnets/s1"
    records, tensors = {c: forged.record(c) for c in (one, other)}, {c: forged.tensors(c) for c in (one, other)}
    assert records[one]["counts"] != records[other]["counts"]
    for cell, source in ((one, other), (other, one)):
        own = {name: records[cell][name] for name in ("key", "seed", "title", "upstream")}
        forged.write_record(cell, {**records[source], **own})
        forged.edit_tensors(cell, **tensors[source])
    assert verify(forged.seal()).verdict == "reevaluated"
    assert exposed(verify(forged.folder, sample=6), faults) == ATTACKED[:2]


def test_parameters_other_than_those_that_were_run_are_exposed(
    arena: Any, forge: Forge, verify: Verify, faults: Faults
) -> None:
    """The forger computes the keys of the parameters that are declared."""
    forged = forge()
    params = {"epochs": 40}
    for cell in arena.plan("fine_tune", **params).cells:
        name = f"{cell.attack.label}/s{cell.seed}"
        before = Record.model_validate(forged.record(name))
        paths = forged.record_path(name), forged.weights_path(name)
        honest = Record.of(cell, record_key(cell), "done").model_dump(mode="json", by_alias=True)
        upstream = {**before.upstream, "defense": defense_key(cell)}
        kept = before.model_dump(mode="json", by_alias=True)
        edited = {**kept, **{n: honest[n] for n in ("key", "title", "axes", "clean_fraction")}, "upstream": upstream}
        for path in paths:
            path.rename(path.with_name(path.name.replace(forged.keys[name], record_key(cell))))
        forged.keys[name] = record_key(cell)
        forged.write_record(name, edited)
    forged.manifest["defense"]["params"] |= params
    assert verify(forged.seal()).verdict == "reevaluated"
    assert set(exposed(verify(forged.folder, sample=6), faults)) & set(ATTACKED)


def test_flags_that_the_defense_does_not_give_are_exposed(
    arena: Any, forge: Forge, verify: Verify, faults: Faults, tmp_path: Path
) -> None:
    """The flags are the ground truth, and the record says how well they do."""
    forged = forge("none")
    for name, _, stages in attacked_cells(arena.plan("none"), tmp_path / "forger"):
        forged.edit_tensors(name, flagged=stages.poisoned(), scores=stages.poisoned().float())
        record = forged.record(name)
        detection = stages.detect(stages.poisoned(), stages.poisoned().float())
        assert detection is not None
        record["detection"] = detection.model_dump()
        assert (detection.tpr, detection.fpr) == (1, 0)
        forged.write_record(name, record)
    assert verify(forged.seal()).verdict == "reevaluated"
    verification = verify(forged.folder, sample=6)
    assert exposed(verification, faults) == [cell.replace("fine_tune", "none") for cell in ATTACKED]
    assert all("tpr: submitted 100.00%" in each.message for each in faults(verification))


def test_a_cell_that_does_not_run_here_is_told(
    arena: Any, verify: Verify, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: NoDefense, task: object, context: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(NoDefense, "run", run)
    verification = verify(arena.submissions / "no_defense", sample=1)
    assert verification.verdict == "refused"
    assert [each.check for each in faults(verification)] == ["repeated"]
    assert "it does not run here: MemoryError: no room" in faults(verification)[0].message
