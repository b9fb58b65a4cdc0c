"""The artifacts of stages: which tensors they hold, and under which names."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from backdoor_bench_none.contracts.attack import PoisonedSamples
from backdoor_bench_none.contracts.dataset import ImageSet
from backdoor_bench_none.contracts.defense import DefenseResult
from backdoor_bench_none.results.store import Artifact

#: before the names of weights in the artifact of a defense
WEIGHTS = "model."


def data_artifact(train: ImageSet, test: ImageSet) -> Artifact:
    """The images and labels of a data set."""
    tensors: dict[str, Tensor] = {}
    for name, part in (("train", train), ("test", test)):
        tensors |= {f"{name}_images": part.images, f"{name}_labels": part.labels}
    return Artifact(tensors, {})


def read_images(tensors: Mapping[str, Tensor], part: str) -> ImageSet:
    """The part `train` or `test` of a data set's artifact."""
    return ImageSet(tensors[f"{part}_images"], tensors[f"{part}_labels"])


def samples_artifact(samples: Mapping[str, PoisonedSamples]) -> Artifact:
    """The samples that an attack made, by part."""
    tensors: dict[str, Tensor] = {}
    for part, part_samples in samples.items():
        tensors |= {f"{part}_{name}": x for name, x in vars(part_samples).items() if x is not None}
    return Artifact(tensors, {})


def read_samples(tensors: Mapping[str, Tensor], part: str) -> PoisonedSamples:
    """The part `train` or `test` of an attack's artifact."""
    prefix = f"{part}_"
    return PoisonedSamples(**{name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)})


def defense_artifact(result: DefenseResult, *, unchanged: bool) -> Artifact:
    """The weights of the defended network, what the defense reports, and whether the network is the victim."""
    tensors = {f"{WEIGHTS}{name}": tensor for name, tensor in result.model.state_dict().items()}
    findings = {"flagged": result.flagged, "scores": result.scores}
    tensors |= {name: tensor for name, tensor in findings.items() if tensor is not None}
    return Artifact(tensors, {"extras": dict(result.extras), "infected": result.infected, "unchanged": unchanged})
