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

from backdoor_bench_none.cell import Cell, Choice
from backdoor_bench_none.context import Context, choose_amp
from backdoor_bench_none.defense import Defense, Stage
from backdoor_bench_none.errors import BenchError
from backdoor_bench_none.leaderboard.submission import Submission, hash_file, read_submission
from backdoor_bench_none.leaderboard.track import Track, read_track
from backdoor_bench_none.leaderboard.verification import Finding, Verdict, Verification
from backdoor_bench_none.measures import Counts, Detection
from backdoor_bench_none.plan import Plan
from backdoor_bench_none.plugins import Plugins, own_version
from backdoor_bench_none.registry import Registry
from backdoor_bench_none.results.record import Record
from backdoor_bench_none.results.store import Store
from backdoor_bench_none.run.provenance import device_name
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
            findings=self.findings, reevaluated=self.reevaluated, repeated=self.repeated, core_version=own_version(),
            device=device_name(self.context.device),
        )  # fmt: skip

    def _note(self, check: str, ok: bool, message: str = "", cell: Cell | None = None) -> bool:
        self.findings.append(Finding(check=check, cell="" if cell is None else cell.title, ok=ok, message=message))
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
        plan = track.plan(registry)
        return replace(plan, cells=[replace(cell, defense=choice) for cell in plan.cells], skipped={})

    def _component(self, submission: Submission, registry: Registry) -> Defense | None:
        declared = {"revision": submission.defense.revision, "params": submission.defense.params}
        declared |= submission.defense.content
        if not self._is_known(submission, registry):
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
        extra = sorted(set(records) - {cell.key for cell in plan.cells})
        message = f"{len(extra)} records are of no cell of the track, the first is {extra[0]}" if extra else ""
        self._note("records", not extra, message)
        for cell in plan.cells:
            record = records.get(cell.key)
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
            tensors = load_file(self.folder / "weights" / f"{cell.key}.safetensors")
            counts, detection = evaluate_weights(stages, tensors)
        except (BenchError, TypeError, ValueError, SafetensorError, OSError) as error:
            self._note("weights", False, " ".join(str(error).split())[:300], cell)
            return
        self.reevaluated[cell.key] = counts
        self._note("numbers", *_same_counts(record, counts, self._is_same_machine(record)), cell)
        if record.detection != detection:
            found = f"the record says {record.detection}, the submitted flags give {detection}"
            self._note("detection", False, found, cell)

    def _context_of(self, cell: Cell) -> Context:
        amp = None if cell.recipe.precision == "float32" else choose_amp(self.context.device)
        return replace(self.context, amp=amp)

    def _is_same_machine(self, record: Record) -> bool:
        precision = "float32" if choose_amp(self.context.device) is None else "bfloat16"
        made = record.provenance
        return made.get("device") == device_name(self.context.device) and made.get("precision") == precision

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
            record = store.read_record(cell.key)
            if record is None or record.counts is None:
                self._note("repeated", False, f"it does not run here: {record.reason if record else 'no record'}", cell)
                continue
            self.repeated[cell.key] = record.counts
            self._note("repeated", *self._is_repeated(submitted, record.counts, matched), cell)

    def _is_repeated(
        self, submitted: Record, found: Counts, matched: Sequence[tuple[Cell, Record]]
    ) -> tuple[bool, str]:
        """On the same machine the counts are equal; elsewhere within three deviations over seeds, or one point."""
        assert submitted.counts is not None
        exact = self._is_same_machine(submitted) and self.context.device.type == "cpu"
        for name in ("benign_accuracy", "attack_success_rate"):
            before, after = getattr(submitted.counts, name), getattr(found, name)
            if before is None or after is None:
                if before is not after:
                    return False, f"{name}: submitted {before}, here {after}"
                continue
            allowed = 0.0 if exact else max(3 * _deviation(submitted, name, matched), REPEATED)
            if abs(before.rate - after.rate) > allowed:
                return False, f"{name}: submitted {before.hits} of {before.total}, run again {after.hits}"
        return True, ""


def _agrees(cell: Cell, record: Record, submission: Submission) -> tuple[bool, str]:
    """What a record says of itself is what its key stands for."""
    if record.key != cell.key:
        return False, f"the record calls itself {record.key}"
    if record.seed != cell.seed:
        return False, f"the record is of seed {record.seed}, its key of seed {cell.seed}"
    if record.status != "done" or record.counts is None:
        return False, f"the record is {record.status}"
    for axis, value in record.axes.items():
        choice = getattr(cell, axis)
        identity = choice.component.identity()
        known = {"revision": value.revision, "params": value.params, **value.content}
        if value.name != choice.name or known != identity:
            return False, f"the record's {axis} is {value.name} {known}, the cell's {choice.name} {identity}"
    if record.recipe != cell.recipe.model_dump(mode="json"):
        return False, "the record's recipe is not the cell's"
    if record.clean_fraction != submission.clean_fraction:
        return False, f"the record says clean_fraction {record.clean_fraction:g}"
    return True, ""


def evaluate_weights(stages: Stages, tensors: Mapping[str, Tensor]) -> tuple[Counts, Detection | None]:
    """The counts of a submitted model on the test sets made here, and the detection of its flags."""
    weights = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("model.")}
    if bad := [name for name, tensor in weights.items() if not bool(torch.isfinite(tensor.float()).all())]:
        raise ValueError(f"the weights {bad[0]} are not finite")
    shell = stages.defended_shell()
    for name, own in shell.state_dict().items():
        if name not in weights or weights[name].shape != own.shape:
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


def _deviation(record: Record, name: str, matched: Sequence[tuple[Cell, Record]]) -> float:
    """The standard deviation over seeds of the submitted cells that differ in the seed only."""
    from backdoor_bench_none.statistics import spread_over_seeds

    alike = [other for _, other in matched if other.axes == record.axes and other.counts is not None]
    rates = [count.rate for other in alike if (count := getattr(other.counts, name)) is not None]
    return spread_over_seeds(rates).deviation or 0.0 if rates else 0.0
