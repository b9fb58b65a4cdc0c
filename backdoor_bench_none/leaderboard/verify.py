"""Checks a submission: its form, every model's numbers from its weights, and a sample of cells run again."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from backdoor_bench_none.contracts.cell import AXES, Cell
from backdoor_bench_none.contracts.component import Choice
from backdoor_bench_none.contracts.context import Context, choose_amp
from backdoor_bench_none.contracts.defense import Defense, Stage
from backdoor_bench_none.contracts.measures import Counts, Detection
from backdoor_bench_none.contracts.record import Record
from backdoor_bench_none.errors import BenchError
from backdoor_bench_none.leaderboard.submission import Submission, as_plain, hash_file, read_submission
from backdoor_bench_none.leaderboard.track import Track, read_track
from backdoor_bench_none.leaderboard.verification import Finding, Verdict, Verification
from backdoor_bench_none.planning.plan import Plan
from backdoor_bench_none.planning.stage_table import record_key
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.registry.plugins import Plugins, own_version
from backdoor_bench_none.results.store import Store
from backdoor_bench_none.run.provenance import LIBRARIES, device_name, installed_version
from backdoor_bench_none.run.runner import Options, Reporter, run_plan
from backdoor_bench_none.run.stages import Stages

#: share of the images by which counts of another device or precision may differ
ROUNDING = 0.005
#: a repeated run may differ by three standard deviations over seeds, or by this share
REPEATED = 0.01


class Declared(Defense):
    """Stands for a stranger's defense by what its submission declares; its code is not imported."""

    stage = Stage.POST_TRAINING
    declared: dict[str, Any]

    def identity(self) -> dict[str, Any]:
        """What the submission declares."""
        return dict(self.declared)


@dataclass
class Verifier:
    """Verifies one unpacked submission. Work is kept in the results folder `results`, which is the verifier's own."""

    folder: Path
    results: Path
    context: Context
    run_code: bool = False
    sample: int = 3
    seed: int = 0
    reporter: Reporter | None = None
    findings: list[Finding] = field(default_factory=list)
    reevaluated: dict[str, Counts] = field(default_factory=dict)
    repeated: dict[str, Counts] = field(default_factory=dict)

    def verify(self) -> Verification:
        """Do everything, and say what was found; `SubmissionError` if it cannot even be read."""
        submission, records = read_submission(self.folder)
        track = read_track(submission.track)
        registry = Registry(Plugins(external=self.run_code))
        plan = self._plan(submission, track, registry)
        reruns = plan is not None and self._is_known(submission, registry)
        if plan is not None:
            matched = list(self._match(plan, submission, records))
            for cell, record in matched:
                self._evaluate(cell, record)
            if reruns and matched:
                self._repeat(plan, matched, registry)
        verdict: Verdict = "verified" if self.repeated else "reevaluated"
        if not all(finding.ok for finding in self.findings):
            verdict = "refused"
        return Verification(
            submission_sha256=hash_file(self.folder / "submission.json"), track=track.name, verdict=verdict,
            findings=self.findings, reevaluated=self.reevaluated, repeated=self.repeated, seed=self.seed,
            core_version=own_version(), device=device_name(self.context.device),
        )  # fmt: skip

    def _note(self, check: str, ok: bool, message: str = "", cell: Cell | None = None) -> bool:
        title = "" if cell is None else cell.title
        self.findings.append(Finding(check=check, cell=title, ok=ok, message=as_plain(message)))
        return ok

    # Which cells there must be, by keys that are computed here.

    def _plan(self, submission: Submission, track: Track, registry: Registry) -> Plan | None:
        """The track's cells with the declared defense; None, with the reason noted, if there can be none."""
        same = submission.track_sha256 == track.sha256
        if not self._note("track", same, "" if same else "it was made for another version of the track's file"):
            return None
        allowed = submission.clean_fraction <= track.highest_clean_fraction
        self._note("clean data", allowed, f"{submission.clean_fraction:g} of at most {track.highest_clean_fraction:g}")
        component = self._component(submission, registry)
        if component is None:
            return None
        choice = Choice("defense", submission.defense.name, submission.defense.label, component)
        plan = track.plan(Registry(Plugins(external=False)))  # a stranger's hook must not leave cells out
        return replace(plan, cells=[replace(cell, defense=choice) for cell in plan.cells], skipped={})

    def _component(self, submission: Submission, registry: Registry) -> Defense | None:
        declared = {"revision": submission.defense.revision, "params": submission.defense.params}
        declared |= submission.defense.content
        if not self._is_known(submission, registry):
            granted = submission.defense.params.get("clean_fraction", 0.0)
            same = granted == submission.clean_fraction
            message = f"clean_fraction {submission.clean_fraction:g} declared, its parameter is {granted}"
            self._note("declarations", same, "" if same else message)
            if self.run_code:
                self._note("code", True, "not run: what is installed here is another package or version")
            return Declared(declared=declared)
        try:
            component = registry.create("defense", submission.defense.name, submission.defense.params)
        except BenchError as error:
            self._note("defense", False, error.message)
            return None
        own = component.identity()
        if own != declared:
            found = f"revision {submission.defense.revision}, here it is {own['revision']}"
            self._note("defense", False, f"its declared identity is not that of the code here: {found}")
            return None
        honest = cast("Defense", component)
        same = (honest.clean_fraction, honest.sees_ground_truth, honest.stage.value)
        declares = (submission.clean_fraction, submission.sees_ground_truth, submission.stage)
        self._note("declarations", same == declares, "" if same == declares else f"{declares} declared, {same} found")
        return honest

    def _is_known(self, submission: Submission, registry: Registry) -> bool:
        """Whether the defense is at hand from the very package that is declared: ours, or with `run_code` anybody's."""
        if submission.defense.name not in registry.names("defense"):
            return False
        provider = registry.entry("defense", submission.defense.name).provider
        return provider.distribution == submission.source.distribution and (
            provider.builtin or (self.run_code and provider.version == submission.source.version)
        )

    def _match(
        self, plan: Plan, submission: Submission, records: Mapping[str, Record]
    ) -> Iterator[tuple[Cell, Record]]:
        """Every cell of the track with its record: the key must be the one that is computed here."""
        extra = sorted(set(records) - {record_key(cell) for cell in plan.cells})
        message = f"{len(extra)} records are of no cell of the track, the first is {extra[0]}" if extra else ""
        self._note("records", not extra, message)
        for cell in plan.cells:
            record = records.get(record_key(cell))
            if record is None:
                self._note(
                    "complete", False, "no record has the key of this cell: other parameters, data or revisions", cell
                )
            elif self._note("record", *_agrees(cell, record, submission), cell):
                yield cell, record

    # Every model again, from its weights.

    def _evaluate(self, cell: Cell, record: Record) -> None:
        stages = Stages(cell, Store(self.results), self._context_of(cell))
        try:
            tensors = load_file(self.folder / "weights" / f"{record_key(cell)}.safetensors")
            counts, detection = evaluate_weights(stages, tensors)
        except (BenchError, TypeError, ValueError, IndexError, RuntimeError, SafetensorError, OSError) as error:
            self._note("weights", False, " ".join(str(error).split())[:300], cell)
            return
        self.reevaluated[record_key(cell)] = counts
        self._note("numbers", *_same_counts(record, counts, self._is_same_machine(record)), cell)
        if record.detection != detection:
            found = f"the record says {record.detection}, the submitted flags give {detection}"
            self._note("detection", False, found, cell)

    def _context_of(self, cell: Cell) -> Context:
        amp = None if cell.recipe.precision == "float32" else choose_amp(self.context.device)
        return replace(self.context, amp=amp)

    def _is_same_machine(self, record: Record) -> bool:
        """Whether counts must be equal to the last image: the same CPU, precision, threads and libraries."""
        amp = None if record.recipe.get("precision") == "float32" else choose_amp(self.context.device)
        here = {
            "device": device_name(self.context.device),
            "precision": "float32" if amp is None else str(amp).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "libraries": {name: found for name in LIBRARIES if (found := installed_version(name))},
        }
        return self.context.device.type == "cpu" and _is_made_on(record, here)

    # A sample of cells again, from the beginning.

    def _repeat(self, plan: Plan, matched: Sequence[tuple[Cell, Record]], registry: Registry) -> None:
        drawn = random.Random(self.seed).sample(matched, min(self.sample, len(matched)))  # noqa: S311 - no secret
        cells = [cell for cell, _ in drawn]
        if not cells or self.reporter is None:
            return
        options = Options(self.results, str(self.context.device), only="all")
        run_plan(replace(plan, cells=cells), registry, options, self.reporter)
        store = Store(self.results)
        for cell, submitted in drawn:
            record = store.read_record(record_key(cell))
            if record is None or record.counts is None:
                self._note("repeated", False, f"it does not run here: {record.reason if record else 'no record'}", cell)
                continue
            self.repeated[record_key(cell)] = record.counts
            exact = self.context.device.type == "cpu" and _is_made_on(submitted, record.provenance)
            self._note("repeated", *_is_repeated(submitted, record, matched, exact), cell)


def _agrees(cell: Cell, record: Record, submission: Submission) -> tuple[bool, str]:
    """What a record says of itself is what its key stands for."""
    if record.key != record_key(cell):
        return False, f"the record calls itself {record.key}"
    if record.seed != cell.seed:
        return False, f"the record is of seed {record.seed}, its key of seed {cell.seed}"
    if record.status != "done" or record.counts is None:
        return False, f"the record is {record.status}"
    for axis in AXES:
        choice, value = cell.choices[axis], record.axes[axis]
        identity = choice.component.identity()
        known = {"revision": value.revision, "params": value.params, **value.content}
        if value.name != choice.name or known != identity:
            return False, f"the record's {axis} is {value.name} {known}, the cell's {choice.name} {identity}"
        if value.label != choice.label:
            return False, f"the record's {axis} is labelled {value.label!r}, the cell's {choice.label!r}"
    if record.recipe != cell.recipe.model_dump(mode="json"):
        return False, "the record's recipe is not the cell's"
    for stage in ("data", "poison", "victim", "defense"):
        if record.upstream.get(stage) != (wanted := getattr(cell, f"{stage}_key")):
            return False, f"the record's {stage} is {record.upstream.get(stage)}, the cell's {wanted}"
    says = (record.clean_fraction, record.sees_ground_truth, record.defense_stage)
    if says != (declared := (submission.clean_fraction, submission.sees_ground_truth, submission.stage)):
        return False, f"the record says of its defense {says}, the submission {declared}"
    return True, ""


def evaluate_weights(stages: Stages, tensors: Mapping[str, Tensor]) -> tuple[Counts, Detection | None]:
    """The counts of a submitted model on the test sets made here, and the detection of its flags."""
    weights = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("model.")}
    if bad := [name for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all())]:
        raise ValueError(f"the weights {bad[0]} are not finite")
    shell = stages.defended_shell()
    for name, own in shell.state_dict().items():
        given = weights.get(name, own.new_empty(0, 0))
        if given.shape != own.shape or given.is_floating_point() != own.is_floating_point():
            raise ValueError(
                f"the weights do not fit the cell's network at {name}; a defense that changes it needs --run-code"
            )
    check_loadable_weights(shell, weights)
    counts, _ = stages.evaluate_network(shell.eval())
    return counts, stages.detect(tensors.get("flagged"), tensors.get("scores"))


def check_loadable_weights(shell: torch.nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load `weights` whole into `shell`; `ValueError` if there are more of them than it has."""
    odd = sorted(set(weights) - set(shell.state_dict()))
    if odd:
        raise ValueError(f"the weights hold {odd[0]}, which the cell's network has not")
    shell.load_state_dict(dict(weights))


def _same_counts(record: Record, found: Counts, exact: bool) -> tuple[bool, str]:
    assert record.counts is not None
    for name in ("benign_accuracy", "attack_success_rate", "robust_accuracy"):
        said, here = getattr(record.counts, name), getattr(found, name)
        if (said is None) != (here is None):
            return False, f"{name}: the record says {said}, here it is {here}"
        if said is None:
            continue
        allowed = 0 if exact else max(1, round(ROUNDING * here.total))
        if said.total != here.total or abs(said.hits - here.hits) > allowed:
            return (
                False,
                f"{name}: the record says {said.hits} of {said.total}, its weights give {here.hits} of {here.total}",
            )
    return True, ""


def _is_made_on(record: Record, here: Mapping[str, Any]) -> bool:
    """Whether a record was made on this machine, as far as it says so itself."""
    return all(record.provenance.get(name) == here[name] for name in ("device", "precision", "threads", "libraries"))


def _is_repeated(
    submitted: Record, found: Record, matched: Sequence[tuple[Cell, Record]], exact: bool
) -> tuple[bool, str]:
    """On the same machine all shares are equal; elsewhere within three deviations over seeds, or one point."""
    before, after = _shares(submitted), _shares(found)
    if set(before) != set(after):
        return False, f"submitted {sorted(before)}, run again {sorted(after)}"
    for name, share in before.items():
        allowed = 0.0 if exact else max(3 * _deviation(submitted, name, matched), REPEATED)
        if abs(share - after[name]) > allowed:
            return False, f"{name}: submitted {share:.2%}, run again {after[name]:.2%}"
    return True, ""


def _shares(record: Record) -> dict[str, float]:
    """What is compared of a record."""
    found = {name: count.rate for name, count in record.counts or () if count is not None}
    for name in ("tpr", "fpr"):
        if (share := getattr(record.detection, name, None)) is not None:
            found[name] = share
    return found


def _deviation(record: Record, name: str, matched: Sequence[tuple[Cell, Record]]) -> float:
    """The standard deviation over seeds of the submitted cells that differ in the seed only."""
    from backdoor_bench_none.maths.statistics import spread_over_seeds

    alike = [_shares(other) for _, other in matched if other.axes == record.axes]
    rates = [shares[name] for shares in alike if name in shares]
    return spread_over_seeds(rates).deviation or 0.0 if rates else 0.0
