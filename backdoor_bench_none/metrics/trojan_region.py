"""How complete and how accurate a Trojan is (Definitions 3.3 and 3.4), and how far from it (Eqs. 7 and 8)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from pydantic import Field

from backdoor_bench_none.contracts.attack import Attack, StampAttack
from backdoor_bench_none.contracts.context import Context
from backdoor_bench_none.contracts.dataset import DatasetInfo, ImageSet
from backdoor_bench_none.contracts.metric import Evaluation, Metric
from backdoor_bench_none.contracts.network import Pixels, predict_logits
from backdoor_bench_none.contracts.trigger import Trigger

if TYPE_CHECKING:
    from torch import Tensor


class TrojanRegion(Metric):
    """The shares of test images that the trigger, triggers near it, and random ones turn into the attacker's label.

    Counted are images that the network does not give this label without a trigger. A Trojan is complete if the trigger
    always works, and accurate if no other one does. Attacks whose trigger differs between images, or that have none,
    have no values.
    """

    paper = "NONE, Definitions 3.3 and 3.4, Eqs. 7 and 8"

    images: int = Field(500, ge=1, description="the first so many test images")
    draws: int = Field(10, ge=1, description="triggers of each kind; every one is tried on all images")
    radius: float = Field(
        16.0, ge=0, le=255, description="near: levels of 0..255 by which pixels of the pattern change"
    )

    def absent_for(self, attack: Attack, info: DatasetInfo) -> str:
        """An attack without a fixed trigger."""
        if _find_trigger(attack, info) is None:
            return f"the attack {type(attack).__name__} has no trigger that is the same for all images"
        return ""

    def compute(self, evaluation: Evaluation, context: Context) -> Mapping[str, float]:
        """`complete`: the trigger; `near`: its pattern changed; `shifted`: one pixel off; `random`: its mask elsewhere
        with a pattern of noise.
        """
        case = open_case(evaluation, self.images)
        if case is None:
            return {}
        trigger = _find_trigger(case.attack, case.info)
        if trigger is None:
            return {}
        images, wanted = case.data.images, case.wanted
        pixels = Pixels.of(case.info, context.device)

        def share(tried: Trigger) -> float:
            stamped = tried.apply(images).to(context.device)
            predicted = predict_logits(evaluation.model, stamped, pixels, context).argmax(1).cpu()
            return float((predicted == wanted).double().mean())

        generator = context.generator("triggers")
        kinds = {
            "near": [change_pattern(trigger, self.radius, generator) for _ in range(self.draws)],
            "shifted": [shift(trigger, *one_pixel) for one_pixel in ((0, 1), (0, -1), (1, 0), (-1, 0))],
            "random": [draw_trigger(trigger, generator) for _ in range(self.draws)],
        }
        values = {"complete": share(trigger)}
        for name, triggers in kinds.items():
            values[name] = sum(map(share, triggers)) / len(triggers)
            context.check_deadline()
        return values


class Case(NamedTuple):
    """An attack, clean images that the network does not give its label yet, with their labels, and that label (N,)."""

    attack: StampAttack
    info: DatasetInfo
    data: ImageSet
    wanted: Tensor


def open_case(evaluation: Evaluation, count: int) -> Case | None:
    """Those of the first `count` test images that the network gives another label than the attacker wants.

    None if the attack does not stamp images, or, with a warning, if there is no such image.
    """
    attack, info, test = evaluation.attack, evaluation.info, evaluation.test
    if info is None or test is None or not isinstance(attack, StampAttack):
        return None
    chosen = torch.arange(min(count, len(test)))
    wanted = attack.relabel(test.labels[chosen], info.num_classes)
    others = evaluation.clean_predictions[chosen] != wanted
    if not bool(others.any()):
        warnings.warn(
            f"nothing to measure: the network gives all of {len(chosen)} test images the attacker's label without a "
            "trigger", UserWarning, stacklevel=2,
        )  # fmt: skip
        return None
    return Case(attack, info, test.take(chosen[others]), wanted[others])


def _find_trigger(attack: Attack, info: DatasetInfo) -> Trigger | None:
    """The attack's trigger, if it is the same for all images and changes any pixel."""
    trigger = attack.fixed_trigger(info) if isinstance(attack, StampAttack) else None
    if trigger is None or not bool(trigger.mask.any()):
        return None
    return trigger


def change_pattern(trigger: Trigger, radius: float, generator: torch.Generator) -> Trigger:
    """`trigger` with every value of its pattern changed by up to `radius` levels of 255, uniformly, within 0..1."""
    noise = (2 * torch.rand(trigger.pattern.shape, generator=generator) - 1) * radius / 255
    return Trigger(trigger.mask, (trigger.pattern + noise).clamp(0, 1))


def shift(trigger: Trigger, rows: int, columns: int) -> Trigger:
    """`trigger` so many pixels further down and to the right; what leaves the image comes in on the other side."""
    moved: list[Tensor] = [torch.roll(part, (rows, columns), (-2, -1)) for part in (trigger.mask, trigger.pattern)]
    return Trigger(moved[0], moved[1])


def draw_trigger(trigger: Trigger, generator: torch.Generator) -> Trigger:
    """A mask of the same shape in a random place, with a pattern of uniform noise."""
    height, width = trigger.mask.shape[-2:]
    rows, columns = (int(torch.randint(extent, (1,), generator=generator)) for extent in (height, width))
    placed = shift(trigger, rows, columns)
    return Trigger(placed.mask, torch.rand(trigger.pattern.shape, generator=generator))
