"""Attacks that tell from their parameters whether their trigger fits, against stamping one."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import get_args

import pytest
import torch
from bbn_attacks.badnets import BadNets, TriggerKind
from bbn_attacks.blended import Blended
from bbn_attacks.coordinate import Coordinate
from bbn_attacks.label_consistent import LabelConsistent
from bbn_attacks.sig import SIG
from bbn_attacks.wanet import WaNet

from backdoor_bench_none.contracts.attack import StampAttack
from backdoor_bench_none.contracts.dataset import DatasetInfo
from backdoor_bench_none.errors import ConfigError

INFO = DatasetInfo("tiny", (3, 8, 8), 10, 1000, (0.5,) * 3, (0.5,) * 3)
ATTACKS = [
    *(BadNets(trigger_kind=kind, size=size) for kind in get_args(TriggerKind) for size in (1, 3, 8, 9)),
    BadNets(trigger_kind="corner", size=9, opacity=0.5),
    Blended(), Coordinate(channel=0), Coordinate(channel=2), Coordinate(channel=3), LabelConsistent(),
    LabelConsistent(corners="all"), SIG(), WaNet(),
]  # fmt: skip


def stamps(attack: StampAttack, info: DatasetInfo) -> bool:
    with suppress(ConfigError):
        StampAttack.check_trigger(attack, info)
        return True
    return False


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 8, 8), (3, 2, 2), (1, 2, 2)], ids=str)
@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_a_trigger_fits_if_it_can_be_stamped(attack: StampAttack, shape: tuple[int, int, int]) -> None:
    assert type(attack).check_trigger is not StampAttack.check_trigger
    info = replace(INFO, shape=shape, mean=(0.5,) * shape[0], std=(0.5,) * shape[0])
    if stamps(attack, info):
        attack.check_trigger(info)
    else:
        with pytest.raises(ConfigError):
            attack.check_trigger(info)


def test_an_attack_that_says_nothing_is_stamped() -> None:
    class Fixed(Blended):
        check_trigger = StampAttack.check_trigger

        def stamp(self, images: torch.Tensor, *rest: object, **named: object) -> torch.Tensor:
            raise ConfigError("too small")

    with pytest.raises(ConfigError, match="too small"):
        Fixed().check(INFO)
