"""The curvature profile of a network: the largest eigenvalues of the loss over its input."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field

from backdoor_bench_none.contracts.context import Context
from backdoor_bench_none.contracts.metric import Evaluation, Metric
from backdoor_bench_none.contracts.network import Pixels
from backdoor_bench_none.inspection.curvature import input_curvature

#: images whose Hessians are computed at once
CHUNK = 100


class Curvature(Metric):
    """The largest eigenvalues of the Hessian of the loss over the normalised input, means over clean test images."""

    paper = "NONE, section 8.3; Moosavi-Dezfooli et al., arXiv:1811.09716"

    images: int = Field(200, ge=1, description="the first so many test images")
    count: int = Field(3, ge=1, description="eigenvalues, from the largest one; no more than inputs")
    steps: int = Field(12, ge=1, description="Hessian-vector products; at least the number of classes finds them all")

    def compute(self, evaluation: Evaluation, context: Context) -> Mapping[str, float]:
        """`lambda_1` and so on."""
        if evaluation.test is None or evaluation.info is None:
            return {}
        pixels = Pixels.of(evaluation.info, context.device)
        chosen = evaluation.test.take(torch.arange(min(self.images, len(evaluation.test)))).to(context.device)
        profiles = []
        for start in range(0, len(chosen), CHUNK):
            part = chosen.take(torch.arange(start, min(start + CHUNK, len(chosen))))
            inputs = pixels.normalize(part.images)
            count = min(self.count, inputs[0].numel())
            steps = max(self.steps, count)
            profiles.append(input_curvature(evaluation.model, inputs, part.labels, count, steps, seed=0))
            context.check_deadline()
        means = torch.cat(profiles).mean(0).tolist()
        return {f"lambda_{place}": mean for place, mean in enumerate(means, start=1)}
