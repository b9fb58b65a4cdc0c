"""Evaluates the weights of a submission on test sets made by the verifier."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from backdoor_bench_none.contracts.measures import Counts, Detection
from backdoor_bench_none.run.stages import Stages, defended_weights


def evaluate_weights(stages: Stages, tensors: Mapping[str, Tensor]) -> tuple[Counts, Detection | None]:
    """The counts of a submitted model on the test sets made here, and the detection of its flags.

    `ValueError` if the weights are not finite or do not fit the cell's network.
    """
    weights = defended_weights(tensors)
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"the weights {name} are not finite")
    shell = stages.defended_shell()
    for name, own in shell.state_dict().items():
        submitted = weights.get(name)
        if submitted is None or not _is_alike(submitted, own):
            raise ValueError(
                f"the weights do not fit the cell's network at {name}; a defense that changes it needs --run-code"
            )
    if odd := sorted(set(weights) - set(shell.state_dict())):
        raise ValueError(f"the weights hold {odd[0]}, which the cell's network does not have")
    shell.load_state_dict(weights)
    counts, _ = stages.evaluate_network(shell.eval())
    return counts, stages.detect(tensors.get("flagged"), tensors.get("scores"))


def _is_alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape, and both or neither hold real numbers."""
    return one.shape == other.shape and one.is_floating_point() == other.is_floating_point()
