"""What a report shows of a cell besides its numbers: the command that runs it again, and its trigger."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from synthetic import parse

from backdoor_bench_none.contracts.record import Record
from backdoor_bench_none.planning.plan import Plan
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.report.html import previews as html_previews
from backdoor_bench_none.report.html.build import build_report
from backdoor_bench_none.report.html.command import Commands
from backdoor_bench_none.report.html.previews import Preview, make_previews
from backdoor_bench_none.report.html.source import Source, source_of_plan

MakeRecord = Callable[..., Record]
MakeSource = Callable[[Sequence[Record]], Source]

# the command


def chosen(bbn: Callable[..., Any], command: str) -> list[str]:
    """The titles that `bbn plan` lists for the options of a command."""
    words = shlex.split(command)
    assert words[:2] == ["bbn", "run"]
    said = bbn("plan", *words[2:], "-v")
    assert said.code == 0, said.err
    return [
        line.split("  ")[-1] for line in said.out.splitlines() if re.match(r"  (run|skip|done) +[0-9a-f]{16}  ", line)
    ]


def test_the_command_selects_its_cell_and_no_other(tiny_plan: Callable[..., Plan], bbn: Callable[..., Any]) -> None:
    entries = "badnets, {name: badnets, params: {label_mode: all_to_all}, as: badnets_all}, "
    entries += "{name: badnets, sweep: {poison_rate: [0.01, 0.02]}, as: 'it''s; $(odd)'}, clean"
    plan = tiny_plan(attack=entries, seeds="0, 1", trainer="centralized, {name: federated, params: {clients: 4}}")
    source = source_of_plan(plan, Path("results"), Path("benchmark.yaml"))
    commands = Commands(source.trials, source.file)
    for trials in source.groups:
        command, others = commands.of(trials)
        assert others == []
        assert chosen(bbn, command) == [trial.title for trial in trials]


def test_a_command_can_be_pasted(make_record: MakeRecord, make_source: MakeSource) -> None:
    source = make_source([make_record(axes={"attack": "a'; rm -rf ~ \x03\n\x1b[201~$(x)`y`"})])
    command, _ = Commands(source.trials, Path("-f.yaml")).of(source.groups[0])
    assert command.isprintable()
    assert shlex.split(command)[5:7] == ["-a", "a'; rm -rf ~ ???[201~$(x)`y`"]
    assert shlex.split(command)[2] == "./-f.yaml"


def test_labels_that_select_others_too_are_told(make_record: MakeRecord, make_source: MakeSource) -> None:
    star = make_record("1" * 16, axes={"attack": "*"}).model_copy(update={"title": "a"})
    source = make_source([star, make_record("2" * 16).model_copy(update={"title": "a"})])
    page = build_report(source)
    assert "It also runs 1 other cell, as a" in parse(page)["texts"]


# previews


def test_previews_of_real_images(tiny_plan: Callable[..., Plan]) -> None:
    plan = tiny_plan(attack="badnets, clean, natural")
    made = make_previews(source_of_plan(plan, Path("results"), Path("benchmark.yaml")).pairs)
    assert made["digits", "badnets"].source.startswith("data:image/png;base64,")
    assert "4 test images of digits" in made["digits", "badnets"].text
    assert "of the pixels change" in made["digits", "badnets"].text
    assert made["digits", "clean"] == Preview("", "this attack changes none of these test images")
    assert made["digits", "natural"] == Preview("", "this attack finds its triggers in finished networks")


def test_previews_without_data_or_with_a_broken_attack(tiny_plan: Callable[..., Plan]) -> None:
    plan = tiny_plan()
    dataset, attack = plan.cells[0].dataset.component, plan.cells[0].attack.component
    absent = Registry.default().create("dataset", "gtsrb", {"root": "/nowhere"})

    def explode() -> Any:
        raise ValueError("<b>boom")

    made = make_previews(
        {("a", "b"): lambda: (absent, attack), ("c", "d"): explode, ("e", "f"): lambda: (dataset, attack)}
    )  # type: ignore[dict-item, return-value]
    assert made["a", "b"] == Preview("", "the data set is not on this machine")
    assert made["c", "d"] == Preview("", "no picture: ValueError: <b>boom")
    assert made["e", "f"].source


def test_previews_are_few_and_small(tiny_plan: Callable[..., Plan]) -> None:
    cell = tiny_plan().cells[0]
    made = make_previews(
        {("digits", str(number)): lambda: (cell.dataset.component, cell.attack.component) for number in range(30)}
    )
    assert sum(bool(preview.source) for preview in made.values()) == html_previews.MOST
    assert sum(len(preview.source) for preview in made.values()) <= html_previews.BUDGET
    assert made["digits", "29"].text == "a report has 24 pictures at most"
