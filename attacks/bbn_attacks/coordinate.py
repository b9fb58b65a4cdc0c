"""The trigger of the two-dimensional data: one coordinate is set (section 8.1, Figs. 6 and 7)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from backdoor_bench_none.api import ConfigError, DatasetInfo, Trigger, TriggerAttack


class Coordinate(TriggerAttack):
    """Sets one channel of every pixel to a value, as t = (-, 0.6) does to points of the data set blobs.

    The triggered images are the hyperplane on which that channel has that value: the paper's ideal Trojan region.
    """

    paper: ClassVar[str] = "NONE, section 8.1"

    channel: int = Field(1, ge=0, description="the channel that is set; of blobs, 0 is x and 1 is y")
    value: float = Field(0.6, ge=0, le=1, description="what it is set to")

    def check_trigger(self, info: DatasetInfo) -> None:
        """Check that the images have the channel."""
        if self.channel >= info.shape[0]:
            raise ConfigError(
                f"coordinate: {info.name} has no channel {self.channel}", f"its channels are 0 to {info.shape[0] - 1}"
            )

    def trigger(self, info: DatasetInfo) -> Trigger:
        """A mask over one channel."""
        self.check_trigger(info)
        mask = torch.zeros(info.shape)
        mask[self.channel] = 1
        return Trigger(mask, mask * self.value)
