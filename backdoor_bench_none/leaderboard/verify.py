"""Verifies a submission: its form, every model's numbers from its weights, and a sample of cells run again."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from backdoor_bench_none.contracts.cell import Cell
from backdoor_bench_none.contracts.component import Choice
from backdoor_bench_none.contracts.context import Context, choose_amp
from backdoor_bench_none.contracts.defense import Defense, Stage
from backdoor_bench_none.contracts.measures import Counts
from backdoor_bench_none.contracts.record import Record
from backdoor_bench_none.errors import BenchError
from backdoor_bench_none.leaderboard.agreement import compare_counts, compare_runs, compare_with_cell, is_made_on
from backdoor_bench_none.leaderboard.submission import MANIFEST, Submission, as_plain, hash_file, read_submission
from backdoor_bench_none.leaderboard.track import Track, read_track
from backdoor_bench_none.leaderboard.verification import Finding, Verdict, Verification
from backdoor_bench_none.leaderboard.weights import evaluate_weights
from backdoor_bench_none.planning.plan import Plan
from backdoor_bench_none.planning.stage_table import record_key
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.registry.plugins import Plugins, own_version
from backdoor_bench_none.results.store import Store
from backdoor_bench_none.run.devices import prepare_device
from backdoor_bench_none.run.provenance import device_name, installed_libraries
from backdoor_bench_none.run.runner import Options, Reporter, run_plan
from backdoor_bench_none.run.stages import Stages
from backdoor_bench_none.words import plural


class Declared(Defense):
    """Stands for a third-party defense by what its submission declares; its code is not imported."""

    stage = Stage.POST_TRAINING
    declared: dict[str, Any]

    def identity(self) -> dict[str, Any]:
        """The identity that the submission declares."""
        return dict(self.declared)


@dataclass
class Verifier:
    """Verifies one unpacked submission.

    `results` is a results folder of the verifier, in which work is kept. `sample` cells are drawn with `seed` and run
    again; without a `reporter` none is. `run_code` allows the import of third-party defenses.
    """

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
        """Make all checks and return their findings; `SubmissionError` if the submission cannot be read."""
        submission, records = read_submission(self.folder)
        prepare_device(self.context.device)
        track = read_track(submission.track)
        registry = Registry(Plugins(external=self.run_code))
        plan = self._plan(submission, track, registry)
        if plan is not None:
            matched = list(self._match(plan, submission, records))
            for cell, record in matched:
                self._evaluate(cell, record)
            if matched and self._is_known(submission, registry):
                self._repeat(plan, matched, registry)
        return Verification(
            submission_sha256=hash_file(self.folder / MANIFEST), track=track.name, verdict=self._verdict(),
            findings=self.findings, reevaluated=self.reevaluated, repeated=self.repeated, seed=self.seed,
            core_version=own_version(), device=device_name(self.context.device),
        )  # fmt: skip

    def _verdict(self) -> Verdict:
        if not all(finding.ok for finding in self.findings):
            return "refused"
        return "verified" if self.repeated else "reevaluated"

    def _note(self, check: str, ok: bool, message: str = "", cell: Cell | None = None) -> None:
        title = "" if cell is None else cell.title
        self.findings.append(Finding(check=check, cell=title, ok=ok, message=as_plain(message)))

    def _note_fault(self, check: str, fault: str, cell: Cell | None = None) -> bool:
        """Add the finding of a check that holds unless there is a fault, and return whether it holds."""
        self._note(check, not fault, fault, cell)
        return not fault

    # Which cells the submission must have, by keys that are computed here.

    def _plan(self, submission: Submission, track: Track, registry: Registry) -> Plan | None:
        """The track's cells with the declared defense; None, with the reason noted, if they cannot be planned."""
        fault = ""
        if submission.track_sha256 != track.sha256:
            fault = "it was made for another version of the track's file"
        if not self._note_fault("track", fault):
            return None
        allowed = submission.clean_fraction <= track.highest_clean_fraction
        self._note("clean data", allowed, f"{submission.clean_fraction:g} of at most {track.highest_clean_fraction:g}")
        component = self._component(submission, registry)
        if component is None:
            return None
        choice = Choice("defense", submission.defense.name, submission.defense.label, component)
        plan = track.plan(Registry(Plugins(external=False)))  # so that no third-party hook can remove cells
        return replace(plan, cells=[replace(cell, defense=choice) for cell in plan.cells], skipped={})

    def _component(self, submission: Submission, registry: Registry) -> Defense | None:
        """The declared defense, or a stand-in if its code may not run; None, with the reason noted, on a mismatch."""
        identity = {"revision": submission.defense.revision, "params": submission.defense.params}
        identity |= submission.defense.content
        if not self._is_known(submission, registry):
            self._check_declared_clean_fraction(submission)
            if self.run_code:
                self._note("code", True, "not run: what is installed here is another package or version")
            return Declared(declared=identity)
        try:
            component = registry.create("defense", submission.defense.name, submission.defense.params)
        except BenchError as error:
            self._note("defense", False, error.message)
            return None
        own = component.identity()
        if own != identity:
            revisions = f"revision {submission.defense.revision}, here it is {own['revision']}"
            self._note("defense", False, f"its declared identity is not that of the code here: {revisions}")
            return None
        defense = cast("Defense", component)
        declared = (submission.clean_fraction, submission.sees_ground_truth, submission.stage)
        actual = (defense.clean_fraction, defense.sees_ground_truth, defense.stage.value)
        fault = ""
        if declared != actual:
            fault = f"{declared} declared, the code says {actual}"
        self._note_fault("declarations", fault)
        return defense

    def _check_declared_clean_fraction(self, submission: Submission) -> None:
        """Compare the two places where a submission states its clean data."""
        declared, parameter = submission.clean_fraction, submission.defense.params.get("clean_fraction", 0.0)
        fault = ""
        if parameter != declared:
            fault = f"clean_fraction {declared:g} declared, its parameter is {parameter}"
        self._note_fault("declarations", fault)

    def _is_known(self, submission: Submission, registry: Registry) -> bool:
        """Whether the code of the defense is installed from the declared package and may be run.

        Built-in defenses always may, third-party ones of the declared version with `run_code`.
        """
        if submission.defense.name not in registry.names("defense"):
            return False
        provider = registry.entry("defense", submission.defense.name).provider
        if provider.distribution != submission.source.distribution:
            return False
        return provider.builtin or (self.run_code and provider.version == submission.source.version)

    def _match(
        self, plan: Plan, submission: Submission, records: Mapping[str, Record]
    ) -> Iterator[tuple[Cell, Record]]:
        """Every cell of the track with its record, found by the key that is computed here."""
        extra = sorted(set(records) - {record_key(cell) for cell in plan.cells})
        fault = ""
        if extra:
            fault = f"{plural('record', len(extra))} of no cell of the track, the first is {extra[0]}"
        self._note_fault("records", fault)
        for cell in plan.cells:
            record = records.get(record_key(cell))
            if record is None:
                message = "no record has the key of this cell: other parameters, data or revisions"
                self._note("complete", False, message, cell)
            elif self._note_fault("record", compare_with_cell(record, cell, submission), cell):
                yield cell, record

    # Every model again, from its weights.

    def _evaluate(self, cell: Cell, record: Record) -> None:
        context = self._context_of(cell)
        stages = Stages(cell, Store(self.results), context)
        try:
            tensors = load_file(self.folder / "weights" / f"{record_key(cell)}.safetensors")
            counts, detection = evaluate_weights(stages, tensors)
        except (BenchError, TypeError, ValueError, IndexError, RuntimeError, SafetensorError, OSError) as error:
            self._note("weights", False, " ".join(str(error).split())[:300], cell)
            return
        self.reevaluated[record_key(cell)] = counts
        exact = self.context.device.type == "cpu" and is_made_on(record, _describe_machine(context))
        self._note_fault("numbers", compare_counts(record, counts, exact), cell)
        if record.detection != detection:
            fault = f"the record says {record.detection}, the submitted flags give {detection}"
            self._note("detection", False, fault, cell)

    def _context_of(self, cell: Cell) -> Context:
        amp = None if cell.recipe.precision == "float32" else choose_amp(self.context.device)
        return replace(self.context, amp=amp)

    # A sample of cells again, from the beginning.

    def _repeat(self, plan: Plan, matched: Sequence[tuple[Cell, Record]], registry: Registry) -> None:
        drawn = random.Random(self.seed).sample(matched, min(self.sample, len(matched)))  # noqa: S311 - no secret
        cells = [cell for cell, _ in drawn]
        if not cells or self.reporter is None:
            return
        options = Options(self.results, str(self.context.device), only="all")
        run_plan(replace(plan, cells=cells), registry, options, self.reporter)
        store, submitted = Store(self.results), [record for _, record in matched]
        for cell, record in drawn:
            repeated = store.read_record(record_key(cell))
            if repeated is None or repeated.counts is None:
                reason = "no record" if repeated is None else repeated.reason
                self._note("repeated", False, f"it does not run here: {reason}", cell)
                continue
            self.repeated[record_key(cell)] = repeated.counts
            exact = self.context.device.type == "cpu" and is_made_on(record, repeated.provenance)
            self._note_fault("repeated", compare_runs(record, repeated, submitted, exact), cell)


def _describe_machine(context: Context) -> dict[str, Any]:
    """What a record made here would state of its machine, as far as counts rest on it.

    Only on the same CPU with the same precision, threads and libraries are counts equal to the last image.
    """
    precision = "float32" if context.amp is None else str(context.amp).removeprefix("torch.")
    return {
        "device": device_name(context.device), "precision": precision, "threads": torch.get_num_threads(),
        "libraries": installed_libraries(),
    }  # fmt: skip
