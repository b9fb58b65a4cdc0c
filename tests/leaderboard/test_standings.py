"""Standings by hand: means over cells, then over seeds; ranks, baselines, and which numbers are whose."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from backdoor_bench_none.contracts.measures import Count, Counts
from backdoor_bench_none.contracts.record import AxisValue, Record
from backdoor_bench_none.leaderboard.standings import Entry, as_table, choose_baseline, rank_entries, read_entries, show
from backdoor_bench_none.leaderboard.submission import Source, Submission, hash_file, write_archive
from backdoor_bench_none.leaderboard.verification import Verdict, Verification

Bbn = Callable[..., Any]
#: (BA, ASR) in percent of every seed, by attack; ASR None where there is no attack
Cells = Mapping[str, list[tuple[int, int | None]]]
BASE: Cells = {"clean": [(95, None), (96, None)], "a": [(90, 100), (92, 90)], "b": [(88, 80), (90, 60)]}
GOOD: Cells = {"clean": [(94, None), (90, None)], "a": [(85, 10), (90, 0)], "b": [(88, 20), (91, 30)]}
#: mean over cells of DER, (ΔASR - ΔBA + 1) / 2, for each seed
GOOD_DER = ((0.90 - 0.05 + 1 + 0.60 - 0 + 1) / 4, (0.90 - 0.02 + 1 + 0.30 - 0 + 1) / 4)
WEAK: Cells = {"clean": [(94, None), (90, None)], "a": [(90, 100), (92, 90)], "b": [(80, 80), (80, 60)]}


def counts_of(ba: int, asr: int | None) -> Counts:
    attacked = None if asr is None else Count(hits=asr, total=100)
    return Counts(benign_accuracy=Count(hits=ba, total=100), attack_success_rate=attacked, robust_accuracy=attacked)


@pytest.fixture
def enter(make_record: Callable[..., Record]) -> Callable[..., Entry]:
    """An entry with these counts; `seen` are those a verifier found in its weights."""

    def make(
        name: str, cells: Cells, seen: Cells | None = None, verdict: Verdict | None = None, version: str = "1.0",
        distribution: str = "", **declared: Any,
    ) -> Entry:  # fmt: skip
        own = "backdoor-bench-none" if name == "no_defense" else f"bbn-{name}"
        value = AxisValue(name=name, label=name, revision=1, params={})
        submission = Submission(
            track="tiny-v1", track_sha256="0" * 64, defense=value, stage="in_training", core_version="0.1.0", files={},
            source=Source(distribution=distribution or own, version=version), **declared,
        )  # fmt: skip
        records, reevaluated = {}, {}
        for row, (attack, seeds) in enumerate(cells.items()):
            for seed, (ba, asr) in enumerate(seeds):
                key = f"{name.encode().hex()[:12]:0<12}{row:02}{seed:02}"
                seconds = {"defense": 30.0, "victim": 10.0}
                records[key] = make_record(
                    key, ba, asr, seconds, {"attack": attack, "defense": name}, seed=seed, defense_stage="in_training"
                )
                if seen:
                    reevaluated[key] = counts_of(*seen[attack][seed])
        verification = verdict and Verification(
            submission_sha256="0" * 64, track="tiny-v1", verdict=verdict, findings=[], reevaluated=reevaluated,
            repeated={},
            seed=0, core_version="0.1.0", device="a computer",
        )  # fmt: skip
        return Entry(submission, records, verification or None, f"{version}{name}".encode().hex())

    return make


Enter = Callable[..., Entry]


def checked(enter: Enter, name: str, cells: Cells, **declared: Any) -> Entry:
    """An entry whose weights give the numbers of its records."""
    return enter(name, cells, cells, "verified", **declared)


def ranked(*entries: Entry) -> dict[str, Entry]:
    return {entry.submission.defense.name: entry for entry in rank_entries(entries)}


def test_means_are_over_attacked_cells_and_then_over_seeds(enter: Enter) -> None:
    good = ranked(enter("no_defense", BASE), enter("good", GOOD))["good"]
    expected = {
        "der": GOOD_DER, "asr": (0.15, 0.15), "ba": (0.865, 0.905), "ra": (0.15, 0.15), "cost_ratio": (4.0, 4.0),
    }  # fmt: skip
    assert set(good.submitted) == set(expected)
    for name, (first, second) in expected.items():
        spread = good.submitted[name]
        assert spread.mean == pytest.approx((first + second) / 2)
        assert spread.deviation == pytest.approx(abs(first - second) / math.sqrt(2))
        assert spread.count == 2
    assert good.clean_ba is not None
    assert good.clean_ba.mean == pytest.approx(0.92)
    assert good.verified == {}


def test_intervals_are_students_and_within_a_share(enter: Enter) -> None:
    good = ranked(enter("no_defense", BASE), enter("good", GOOD))["good"]
    interval = good.submitted["ba"].interval
    assert interval is not None
    half = 12.7062 * 0.04 / 2  # t of one degree of freedom at 97.5 %, deviation 0.04 / sqrt(2), by sqrt(2)
    assert (interval.low, interval.high) == (pytest.approx(0.885 - half, abs=1e-5), 1.0)
    assert show(good.submitted["ba"], "ba") == "88.5 [63.1, 100.0]"
    assert show(None, "ba") == "–"


def test_without_a_baseline_there_is_no_der_and_no_rank(enter: Enter) -> None:
    good = ranked(enter("good", GOOD))["good"]
    assert "der" not in good.submitted
    assert good.submitted["asr"].mean == pytest.approx(0.15)
    assert good.rank is None


def test_a_baseline_without_a_cell_leaves_that_cell_out_of_der(enter: Enter) -> None:
    good = ranked(enter("no_defense", {"a": BASE["a"]}), enter("good", GOOD))["good"]
    assert good.submitted["der"].mean == pytest.approx((0.925 + 0.94) / 2)


def test_ranks_are_by_der_and_ties_share_their_mean(enter: Enter) -> None:
    standings = ranked(
        enter("no_defense", BASE), *(checked(enter, name, cells) for name, cells in (
            ("weak", WEAK), ("good", GOOD), ("same", GOOD), ("other", BASE),
        ))
    )  # fmt: skip
    assert {name: entry.rank for name, entry in standings.items()} == {
        "good": 1.5, "same": 1.5, "other": 3.0, "weak": 4.0, "no_defense": None,
    }  # fmt: skip
    assert list(standings)[-1] == "no_defense"
    assert list(standings)[2:4] == ["other", "weak"]


def test_baseline_oracle_refused_and_unverified_do_not_compete(enter: Enter) -> None:
    standings = ranked(
        checked(enter, "no_defense", BASE), checked(enter, "oracle", GOOD, sees_ground_truth=True),
        enter("forged", GOOD, verdict="refused"), enter("proud", GOOD), checked(enter, "weak", WEAK),
    )  # fmt: skip
    assert [(name, entry.rank) for name, entry in standings.items() if entry.rank] == [("weak", 1.0)]
    assert [entry.competes for entry in standings.values()].count(True) == 1
    assert standings["forged"].status == "refused"
    assert standings["oracle"].submitted["der"].mean == pytest.approx(sum(GOOD_DER) / 2)
    assert standings["weak"].is_close is None


def test_verified_numbers_are_those_of_the_weights(enter: Enter) -> None:
    """The records say GOOD, the weights give WEAK: both are shown, and the rank is by the weights."""
    standings = ranked(
        enter("no_defense", BASE, BASE, "verified"),
        enter("proud", GOOD, WEAK, "reevaluated"),
        checked(enter, "other", BASE),
    )
    proud = standings["proud"]
    assert proud.submitted["asr"].mean == pytest.approx(0.15)
    assert proud.verified["asr"].mean == pytest.approx((1.0 + 0.8 + 0.9 + 0.6) / 4)
    assert proud.verified["der"].mean == pytest.approx((1 + 0.92 + 1 + 0.9) / 8)
    assert "cost_ratio" in proud.submitted
    assert "cost_ratio" not in proud.verified
    assert (standings["other"].rank, proud.rank) == (1.0, 2.0)
    (line,) = [line for line in as_table(list(standings.values())) if line["defense"] == "proud"]
    assert (line["submitted_asr"], line["verified_asr"], line["claimed_asr"]) == (
        pytest.approx(0.15), pytest.approx(0.825), None,
    )  # fmt: skip
    assert (line["status"], line["verified_cost_ratio"]) == ("reevaluated", None)


def test_claims_never_reach_other_columns(enter: Enter) -> None:
    entry = enter("good", GOOD, claims={"asr": 0.0, "der": 1.0})
    table = as_table(rank_entries([enter("no_defense", BASE), entry]))
    (line,) = [line for line in table if line["defense"] == "good"]
    assert (line["claimed_asr"], line["claimed_der"], line["claimed_ba"]) == (0.0, 1.0, None)
    assert line["submitted_asr"] == pytest.approx(0.15)
    assert line["verified_asr"] is None


def test_close_is_what_a_paired_test_cannot_tell_from_the_first(enter: Enter) -> None:
    near: Cells = {"a": [(85, 12), (90, 0)], "b": [(88, 18), (91, 31)]}
    others = (checked(enter, name, cells) for name, cells in (("good", GOOD), ("near", near), ("weak", WEAK)))
    standings = ranked(enter("no_defense", BASE), *others)
    assert (standings["good"].is_close, standings["near"].is_close, standings["weak"].is_close) == (None, True, False)


def test_close_cannot_be_told_from_one_pair(enter: Enter) -> None:
    one = {name: {"a": cells["a"][:1]} for name, cells in (("base", BASE), ("good", GOOD), ("weak", WEAK))}
    others = (checked(enter, name, one[name]) for name in ("good", "weak"))
    standings = ranked(enter("no_defense", one["base"]), *others)
    assert (standings["good"].rank, standings["weak"].rank) == (1.0, 2.0)
    assert standings["weak"].is_close is None
    assert standings["good"].submitted["der"].interval is None


# the baseline


def test_a_strangers_no_defense_is_nobodys_baseline(enter: Enter) -> None:
    """It would make everybody else look bad, or good."""
    fake: Cells = {"a": [(100, 0), (100, 0)], "b": [(100, 0), (100, 0)]}
    own, stranger = enter("no_defense", BASE), enter("no_defense", fake, distribution="bbn-evil")
    for entries in ([own, stranger, enter("good", GOOD)], [stranger, own, enter("good", GOOD)]):
        good = next(e for e in rank_entries(entries) if e.submission.defense.name == "good")
        assert good.submitted["der"].mean == pytest.approx(sum(GOOD_DER) / 2)
    assert not stranger.competes
    assert choose_baseline([stranger]) is None


def test_the_best_verified_baseline_is_taken(enter: Enter) -> None:
    other: Cells = {attack: [(50, None if asr is None else 50) for _, asr in seeds] for attack, seeds in BASE.items()}
    refused = enter("no_defense", other, other, "refused", "1")
    unverified, verified = enter("no_defense", other, version="2"), enter("no_defense", BASE, BASE, "verified", "3")
    assert choose_baseline([refused, unverified, verified]) is verified
    assert choose_baseline([refused, unverified]) is unverified
    assert choose_baseline([refused]) is None
    good = ranked(refused, unverified, verified, enter("good", GOOD))["good"]
    assert good.submitted["der"].mean == pytest.approx(sum(GOOD_DER) / 2)


# files


@pytest.fixture
def submissions(arena: Any, tmp_path: Path) -> Path:
    shutil.copytree(arena.submissions, tmp_path / "submissions")
    return tmp_path / "submissions"


def build(bbn: Bbn, *paths: Path) -> tuple[list[dict[str, Any]], str]:
    said = bbn("leaderboard", "build", *paths)
    assert said.code == 0
    table: list[dict[str, Any]] = json.loads(Path("site/tiny-v1/standings.json").read_text())
    return table, said.err


def test_a_verification_is_of_the_very_submission(submissions: Path, bbn: Bbn, forge_of: Callable[..., Any]) -> None:
    for path in submissions.iterdir():
        assert bbn("leaderboard", "verify", path, "--cells", 1).code == 0
    statuses = {line["defense"]: line["status"] for line in build(bbn, submissions)[0]}
    assert statuses == {"no_defense": "verified", "none": "verified", "fine_tune": "verified"}
    shutil.rmtree("site")
    forged = forge_of(submissions / "none", "later")
    forged.manifest["authors"] = "Another"
    shutil.rmtree(submissions / "none")
    table, _ = build(bbn, submissions, forged.seal())
    (line,) = [line for line in table if line["defense"] == "none"]
    assert line["status"] == "unverified"
    assert line["verified_der"] is None
    assert line["submitted_der"] is not None


def test_a_verification_that_comes_with_a_submission_is_not_believed(submissions: Path, bbn: Bbn) -> None:
    assert bbn("leaderboard", "verify", submissions / "none", "--cells", 1).code == 0
    (path,) = Path("verifications").iterdir()
    shutil.copy(path, submissions / "none" / "verification.json")
    table, err = build(bbn, submissions)
    assert "none" not in [line["defense"] for line in table]
    assert err == "refused none: 'verification.json' is not listed in submission.json\n"


@pytest.mark.parametrize("text", ["{}", "nonsense", '{"verdict": "verified"}'])
def test_a_broken_verification_is_none(text: str, submissions: Path, bbn: Bbn) -> None:
    Path("verifications").mkdir()
    (Path("verifications") / f"{hash_file(submissions / 'none' / 'submission.json')}.json").write_text(text)
    table, err = build(bbn, submissions)
    assert err == ""
    assert {line["status"] for line in table} == {"unverified"}


def test_an_archive_counts_as_verified_too(submissions: Path, bbn: Bbn, tmp_path: Path) -> None:
    write_archive(submissions / "none", tmp_path / "none.zip")
    shutil.rmtree(submissions / "none")
    assert bbn("leaderboard", "verify", "none.zip", "--cells", 1).code == 0
    table, _ = build(bbn, submissions, tmp_path / "none.zip")
    assert {line["defense"]: line["status"] for line in table}["none"] == "verified"


def test_the_same_submission_twice_counts_once(submissions: Path, bbn: Bbn) -> None:
    shutil.copytree(submissions / "none", submissions / "none-again")
    table, err = build(bbn, submissions)
    assert [line["defense"] for line in table].count("none") == 1
    assert err == "refused none-again: the same submission is listed already\n"


def test_pages_of_equal_names_and_versions_do_not_overwrite_each_other(
    submissions: Path, bbn: Bbn, forge_of: Callable[..., Any]
) -> None:
    forged = forge_of(submissions / "none", "impostor")
    forged.manifest["authors"] = "Impostor"
    build(bbn, submissions, forged.seal())
    pages = list(Path("site/tiny-v1").glob("none-*.html"))
    assert len(pages) == 2
    assert ["Impostor" in page.read_text() for page in pages].count(True) == 1


def test_versions_of_a_defense_are_its_history(submissions: Path, bbn: Bbn, forge_of: Callable[..., Any]) -> None:
    for version in ("0.0.9", "0.2.0"):
        forged = forge_of(submissions / "none", f"none-{version}")
        forged.manifest["source"]["version"] = version
        forged.seal()
    build(bbn, submissions, *Path().glob("none-*"))
    pages = list(Path("site/tiny-v1").glob("none-backdoor-bench-none-*.html"))
    assert len(pages) == 3
    for page in pages:
        history = page.read_text().partition("<h2>History</h2>")[2]
        assert history.count("<li>") == 3
        assert history.count("(this)") == 1
        assert all(f'href="{other.name}"' in history for other in pages if other != page)
    (alone,) = Path("site/tiny-v1").glob("fine-tune-*.html")
    assert alone.read_text().partition("<h2>History</h2>")[2].count("<li>") == 1


@pytest.mark.parametrize(
    ("field", "value"), [("track", "tiny-v2"), ("track_sha256", "0" * 64), ("track", "no-such-track")]
)
def test_another_track_is_refused_with_its_reason(
    field: str, value: str, submissions: Path, bbn: Bbn, forge_of: Callable[..., Any]
) -> None:
    forged = forge_of(submissions / "none")
    forged.manifest[field] = value
    table, err = build(bbn, submissions, forged.seal())
    assert len(table) == 3
    assert f"a track '{forged.manifest['track']}' that is unknown here" in err
    page = Path("site/index.html").read_text()
    assert "<h2>Refused</h2>" in page
    assert forged.manifest["track"] in page.partition("<h2>Refused</h2>")[2]


def test_csv_and_json_say_the_same(submissions: Path, bbn: Bbn) -> None:
    table, _ = build(bbn, submissions)
    rows = list(csv.DictReader(io.StringIO(Path("site/tiny-v1/standings.csv").read_text())))
    assert [row["defense"] for row in rows] == [line["defense"] for line in table]
    for row, line in zip(rows, table, strict=True):
        assert row == {name: "" if value is None else str(value) for name, value in line.items()}
    assert {line["claimed_asr"] for line in table} == {0.5}


def test_what_is_no_site_is_left_alone(submissions: Path, bbn: Bbn, tmp_path: Path) -> None:
    home = tmp_path / "public_html"
    home.mkdir()
    (home / "index.html").write_text("<h1>My thesis</h1>")
    (tmp_path / "file").write_text("text")
    for output in ("public_html", "file"):
        said = bbn("leaderboard", "build", submissions, "--output", output)
        assert said.code == 2
        assert f"'{output}' exists already and is not a leaderboard site" in said.err
    assert [path.name for path in home.iterdir()] == ["index.html"]
    assert (home / "index.html").read_text() == "<h1>My thesis</h1>"


def test_a_site_replaces_an_older_one_and_is_equal_to_the_byte(
    submissions: Path, bbn: Bbn, tree: Callable[[Path], dict[str, str]]
) -> None:
    build(bbn, submissions)
    Path("site/left-over.html").touch()
    first = tree(Path("site"))
    build(bbn, submissions)
    second = tree(Path("site"))
    assert first.pop("left-over.html")
    assert first == second
    assert len(second) == 7
    assert not list(Path().glob(".site*"))


def test_nothing_to_build_of(bbn: Bbn, tmp_path: Path) -> None:
    said = bbn("leaderboard", "build", "nowhere")
    assert (said.code, said.err) == (2, "error: there is no 'nowhere'\n")
    assert read_entries([tmp_path], tmp_path) == ([], [])
