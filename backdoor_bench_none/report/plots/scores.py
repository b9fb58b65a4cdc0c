"""The scores that a defense gave to benign and to poisoned training samples, and its cut between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from backdoor_bench_none.errors import BenchError, ConfigError
from backdoor_bench_none.maths.natural_break import find_breaks
from backdoor_bench_none.report.plots.canvas import add_legend, draw_shares, make_panels, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from backdoor_bench_none.contracts.cell import Cell
    from backdoor_bench_none.report.plots.finished import FinishedStages


@dataclass(frozen=True)
class Scores:
    """Scores of the benign (n,) and the poisoned (k,) samples.

    Exactly the samples above `cut` were flagged; it is None where flags and scores do not agree in this way.
    `is_break` says that the cut is the natural break of all scores.
    """

    benign: NDArray[np.float64]
    poisoned: NDArray[np.float64]
    cut: float | None
    is_break: bool
    title: str
    note: str


def check_scores(cell: Cell) -> None:
    """Raise `ConfigError` for a defense that does not declare scores among what it returns."""
    if "scores" not in cell.defense.component.returns:
        raise ConfigError(
            f"the defense '{plain(cell.defense.label)}' gives no scores",
            "choose one with -d whose `bbn show NAME` says that it returns scores, as none",
        )


def read_scores(stages: FinishedStages) -> Scores:
    """The scores and flags of a finished cell, split by the ground truth; decoys are left out."""
    check_scores(stages.cell)
    tensors = stages.defense().tensors
    if "scores" not in tensors:
        raise BenchError(f"the defense of {plain(stages.cell.title, 100)} gave no scores", "see `bbn results show`")
    scores = tensors["scores"].double().numpy()
    flagged = np.zeros(len(scores), np.bool_)
    if "flagged" in tensors:
        flagged = tensors["flagged"].numpy()
    poisoned, counted = stages.poisoned().numpy(), ~stages.decoys().numpy()
    cut = find_cut(scores[counted], flagged[counted])
    is_break = bool(np.isfinite(scores).all()) and cut == float(find_breaks(scores).thresholds[0])
    hits, others = (int((flagged & counted & part).sum()) for part in (poisoned, ~poisoned))
    totals = [int((counted & part).sum()) for part in (poisoned, ~poisoned)]
    note = f"flagged: {hits:,} of {totals[0]:,} poisoned, {others:,} of {totals[1]:,} benign"
    title = plain(stages.cell.title, 100)
    return Scores(scores[counted & ~poisoned], scores[counted & poisoned], cut, is_break, title, note)


def find_cut(scores: NDArray[np.float64], flagged: NDArray[np.bool_]) -> float | None:
    """The highest of the scores (N,) that was not flagged (N,), if all flagged ones are higher; None otherwise."""
    if flagged.all() or not flagged.any():
        return None
    cut = float(scores[~flagged].max())
    if cut < float(scores[flagged].min()):
        return cut
    return None


def draw_scores(scores: Scores) -> Figure:
    """Both histograms, each in percent of its own samples, and the cut."""
    figure, (axis,) = make_panels(1, scores.title, [scores.note], height=2.2)
    groups = {"benign": scores.benign, "poisoned": scores.poisoned}
    handles = draw_shares(axis, groups)
    labels = [f"{name} ({len(values):,})" for name, values in groups.items()]
    if scores.cut is not None:
        handles.append(axis.axvline(scores.cut, color="black", linestyle="--", linewidth=1))
        name = "natural break" if scores.is_break else "cut"
        labels.append(f"{name} at {scores.cut:.4g}")
    axis.set(xlabel="score of the defense (higher is more suspicious)", ylabel="share of the samples (%)")
    add_legend(figure, handles, labels)
    return figure
