"""An honest submission is verified; every forgery is refused with a finding that names the cell and the fact.

The forger knows the code: hashes are those of the forged files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bbn_attacks.badnets import BadNets
from bbn_defenses.fine_tune import FineTune

from backdoor_bench_none.leaderboard.submission import hash_file, read_submission, write_archive
from backdoor_bench_none.leaderboard.verification import Finding, Verification

Bbn = Callable[..., Any]
Forge = Callable[..., Any]
Verify = Callable[..., Verification]
Faults = Callable[[Verification], list[Finding]]


# honest ones


@pytest.mark.usefixtures("worker_processes")
def test_cells_are_run_again_in_processes_of_their_own(arena: Any, verify: Verify, faults: Faults) -> None:
    verification = verify(arena.submissions / "fine_tune", sample=2)
    assert faults(verification) == []
    assert (verification.verdict, len(verification.repeated)) == ("verified", 2)


@pytest.mark.parametrize("defense", ["no_defense", "none", "fine_tune"])
def test_an_honest_submission_is_verified(defense: str, arena: Any, verify: Verify, faults: Faults) -> None:
    folder = arena.submissions / defense
    _, records = read_submission(folder)
    verification = verify(folder, sample=6)
    assert faults(verification) == []
    assert verification.verdict == "verified"
    counts = {key: record.counts for key, record in records.items()}
    assert len(counts) == 6
    assert verification.reevaluated == counts
    assert verification.repeated == counts
    per_cell = [finding.check for finding in verification.findings if finding.cell]
    assert sorted(set(per_cell)) == ["numbers", "record", "repeated"]
    assert len(per_cell) == 18


def test_nothing_run_again_is_not_verified(arena: Any, verify: Verify) -> None:
    verification = verify(arena.submissions / "fine_tune", sample=0)
    assert (verification.verdict, verification.repeated, len(verification.reevaluated)) == ("reevaluated", {}, 6)


def test_the_command_writes_what_it_found_into_a_folder_of_the_verifiers_own(
    forge: Forge, bbn: Bbn, tmp_path: Path
) -> None:
    folder = forge("fine_tune").folder
    write_archive(folder, tmp_path / "mine-1.0.zip")
    said = bbn("leaderboard", "verify", folder, "--cells", 1, "--seed", 7)
    assert said.code == 0
    assert "6 models evaluated again, 1 cell run again (--seed 7)" in said.out
    said = bbn("leaderboard", "verify", "mine-1.0.zip", "--cells", 1, "--seed", 7)
    assert said.code == 0
    (path,) = Path("verifications").iterdir()  # the folder and the archive are the same submission
    first = Verification.model_validate_json(path.read_text())
    assert path.stem == first.submission_sha256 == hash_file(folder / "submission.json")
    assert (first.verdict, first.seed, first.track) == ("verified", 7, "tiny-v1")


def test_the_command_refuses_with_exit_code_1_and_says_why(forge: Forge, bbn: Bbn, tmp_path: Path) -> None:
    forged = forge()
    alter_counts(forged, "attack_success_rate", 0)
    said = bbn("leaderboard", "verify", forged.seal(), "--cells", 0, "--verifications", tmp_path / "out")
    assert said.code == 1
    place = "FAILED  numbers of digits/badnets/fine_tune/mlp/relu/s0: attack_success_rate: the record says 0 of "
    assert place in said.out
    assert "refused; wrote" in said.out
    (path,) = (tmp_path / "out").iterdir()
    assert json.loads(path.read_text())["verdict"] == "refused"


def test_a_seed_draws_the_same_cells_and_nobody_knows_the_default(arena: Any, verify: Verify, bbn: Bbn) -> None:
    drawn = [sorted(verify(arena.submissions / "no_defense", sample=2, seed=seed).repeated) for seed in (5, 5, 6, 8)]
    assert drawn[0] == drawn[1]
    assert len({tuple(keys) for keys in drawn}) > 1
    seeds = set()
    for _ in range(2):
        said = bbn("leaderboard", "verify", arena.submissions / "no_defense", "--cells", 0)
        (path,) = Path("verifications").iterdir()
        seeds |= {json.loads(path.read_text())["seed"], *map(int, re.findall(r"--seed (\d+)", said.out))}
    assert len(seeds) == 2


# forgeries that need no training to be found


def alter_counts(forged: Any, name: str, hits: int, cell: str = "badnets/s0") -> None:
    record = forged.record(cell)
    assert record["counts"][name]["hits"] != hits
    record["counts"][name]["hits"] = hits
    forged.write_record(cell, record)


def alter_weights(forged: Any) -> None:
    name, weight = next((n, x) for n, x in forged.tensors("badnets/s0").items() if x.ndim == 2)
    forged.edit_tensors("badnets/s0", **{name: weight + torch.randn_like(weight)})


def alter_totals(forged: Any) -> None:
    record = forged.record("badnets/s0")
    for count in record["counts"].values():
        count["total"] *= 2
    forged.write_record("badnets/s0", record)


def claim_a_trigger_for_clean(forged: Any) -> None:
    record = forged.record("clean/s0")
    record["counts"]["attack_success_rate"] = {"hits": 0, "total": 100}
    forged.write_record("clean/s0", record)


def swap(forged: Any, *edited: str) -> None:
    """Exchange records and weights of two seeds, and edit what a record says of itself."""
    one, other = "badnets/s0", "badnets/s1"
    records = {cell: forged.record(cell) for cell in (one, other)}
    tensors = {cell: forged.tensors(cell) for cell in (one, other)}
    for cell, source in ((one, other), (other, one)):
        kept = {name: records[cell][name] for name in edited}
        forged.write_record(cell, {**records[source], **kept})
        forged.edit_tensors(cell, **tensors[source])


def edit(*path: str, to: object, cell: str = "badnets/s0") -> Callable[[Any], None]:
    """Change one value of a record."""

    def change(forged: Any) -> None:
        record = forged.record(cell)
        part = record
        for name in path[:-1]:
            part = part[name]
        assert part[path[-1]] != to
        part[path[-1]] = to
        forged.write_record(cell, record)

    return change


def declare(*path: str, to: object) -> Callable[[Any], None]:
    """Change one value of submission.json."""

    def change(forged: Any) -> None:
        part = forged.manifest
        for name in path[:-1]:
            part = part[name]
        assert part[path[-1]] != to
        part[path[-1]] = to

    return change


def tensor(name: str, make: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Any], None]:
    """Change the first tensor whose name ends so."""

    def change(forged: Any) -> None:
        tensors = forged.tensors("badnets/s0")
        full = next(each for each in tensors if each.endswith(name))
        forged.edit_tensors("badnets/s0", **{full: make(tensors[full])})

    return change


def add_tensor(forged: Any) -> None:
    forged.edit_tensors("badnets/s0", **{"model.backdoor": torch.zeros(2)})


def leave_out(forged: Any) -> None:
    forged.record_path("badnets/s1").unlink()
    forged.weights_path("badnets/s1").unlink()


def leave_out_weights(forged: Any) -> None:
    forged.weights_path("badnets/s0").unlink()


def add_record(forged: Any) -> None:
    (forged.folder / "records" / "0123456789abcdef.json").write_text(json.dumps(forged.record("badnets/s0")))


S0 = "digits/badnets/fine_tune/mlp/relu/s0"
#: what is done, the check that fails, the cell it names, and what it says
FORGERIES: dict[str, tuple[Callable[[Any], None], str, str, str]] = {
    "altered weights": (alter_weights, "numbers", S0, r"the record says \d+ of \d+, its weights give \d+ of"),
    "ASR of 0": (lambda f: alter_counts(f, "attack_success_rate", 0), "numbers", S0, "attack_success_rate.*says 0 of"),
    "higher BA": (lambda f: alter_counts(f, "benign_accuracy", 499), "numbers", S0, "benign_accuracy.*says 499 of"),
    "lower RA": (lambda f: alter_counts(f, "robust_accuracy", 1), "numbers", S0, "robust_accuracy.*says 1 of"),
    "other totals": (alter_totals, "numbers", S0, r"says \d+ of 1000"),
    "a trigger of clean": (claim_a_trigger_for_clean, "numbers", S0.replace("badnets", "clean"), "here it is None"),
    "swapped seeds": (swap, "record", S0, "key is"),
    "swapped, keys edited": (lambda f: swap(f, "key"), "record", S0, "of seed 1, its key of seed 0"),
    "swapped, seeds too": (lambda f: swap(f, "key", "seed", "title"), "record", S0, "the record's poison is"),
    "revision declared": (declare("defense", "revision", to=2), "defense", "", "revision 2, here it is 1"),
    "revision recorded": (edit("axes", "defense", "revision", to=2), "record", S0, "'revision': 2.*'revision': 1"),
    "attack's revision": (edit("axes", "attack", "revision", to=2), "record", S0, "the record's attack"),
    "parameters declared": (declare("defense", "params", "epochs", to=5), "complete", "s0", "other parameters"),
    "parameters recorded": (edit("axes", "defense", "params", "epochs", to=5), "record", S0, "'epochs': 5"),
    "an unknown parameter": (declare("defense", "params", to={"sped": 5}), "defense", "", "sped"),
    "another recipe": (edit("recipe", "epochs", to=800), "record", S0, "recipe is not the cell's"),
    "another poisoned set": (edit("upstream", "poison", to="0" * 16), "record", S0, "poison is 0000"),
    "another defense": (edit("axes", "defense", "name", to="none"), "record", S0, "defense is none"),
    "another label": (edit("axes", "attack", "label", to="harder"), "record", S0, "labelled 'harder'"),
    "a missing record": (leave_out, "complete", S0.replace("s0", "s1"), "no record has the key"),
    "a surplus record": (add_record, "records", "", "of no cell of the track.*0123456789abcdef"),
    "a failed record": (edit("status", to="failed"), "record", S0, "the record is failed"),
    "missing weights": (leave_out_weights, "weights", S0, "No such file"),
    "NaN weights": (tensor("weight", lambda x: x * torch.nan), "weights", S0, "not finite"),
    "another shape": (tensor("weight", lambda x: torch.zeros(3, 3)), "weights", S0, "do not fit"),
    "complex weights": (tensor("bias", lambda x: x.to(torch.complex64)), "weights", S0, "do not fit"),
    "a missing tensor": (tensor("bias", lambda x: None), "weights", S0, "do not fit"),
    "a surplus tensor": (add_tensor, "weights", S0, "hold backdoor, which"),
    "less clean data": (declare("clean_fraction", to=0.0), "declarations", "", "declared"),
    "too much clean data": (declare("clean_fraction", to=0.5), "clean data", "", "0.5 of at most 0.2"),
    "clean data recorded": (edit("clean_fraction", to=0.0), "record", S0, "says of its defense"),
    "an oracle": (declare("sees_ground_truth", to=True), "declarations", "", "True"),
    "another stage": (declare("stage", to="in_training"), "declarations", "", "in_training"),
    "another track's file": (declare("track_sha256", to="0" * 64), "track", "", "another version"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forgery_is_refused(name: str, forge: Forge, verify: Verify, faults: Faults) -> None:
    change, check, cell, message = FORGERIES[name]
    forged = forge()
    change(forged)
    verification = verify(forged.seal())
    assert verification.verdict == "refused"
    said = [each for each in faults(verification) if each.check == check and each.cell.endswith(cell)]
    assert said, faults(verification)
    assert re.search(message, said[0].message), said[0]


DETECTION: dict[str, tuple[Callable[[Any], None], str, str]] = {
    "flags": (tensor("flagged", lambda x: ~x), "detection", "the submitted flags give"),
    "recorded": (edit("detection", "false_positive", to=0), "detection", "false_positive=0"),
    "no flags": (tensor("flagged", lambda x: None), "detection", "give None"),
    "fewer flags": (tensor("flagged", lambda x: x[:7]), "weights", "."),
    "NaN scores": (tensor("scores", lambda x: x * torch.nan), "weights", "."),
}


@pytest.mark.parametrize("name", DETECTION)
def test_flags_are_counted_again(name: str, forge: Forge, verify: Verify, faults: Faults) -> None:
    change, check, message = DETECTION[name]
    forged = forge("none")
    change(forged)
    verification = verify(forged.seal())
    assert verification.verdict == "refused"
    assert [(each.check, each.cell) for each in faults(verification)] == [(check, S0.replace("fine_tune", "none"))]
    assert re.search(message, faults(verification)[0].message)


def test_a_submission_of_an_older_revision_is_refused(
    arena: Any, verify: Verify, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FineTune, "revision", 2)
    verification = verify(arena.submissions / "fine_tune")
    assert [each.check for each in faults(verification)] == ["defense"]
    assert "revision 1, here it is 2" in faults(verification)[0].message
    assert verification.verdict == "refused"
    assert verification.reevaluated == {}


def test_records_of_an_older_attack_are_refused(
    arena: Any, verify: Verify, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BadNets, "revision", 2)
    verification = verify(arena.submissions / "fine_tune")
    assert verification.verdict == "refused"
    assert sorted({each.check for each in faults(verification)}) == ["complete", "records"]
    missing = [each.cell for each in faults(verification) if each.check == "complete"]
    assert missing == [S0.replace("s0", f"s{seed}") for seed in range(3)]
