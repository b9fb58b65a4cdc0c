"""Federated averaging (McMahan et al., 2017): clients train on their own samples, a server averages their networks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from backdoor_bench_none.contracts.context import Context, no_log, no_progress
from backdoor_bench_none.contracts.dataset import DatasetInfo
from backdoor_bench_none.contracts.recipe import Recipe
from backdoor_bench_none.contracts.trainer import FitTask, History, Trainer
from backdoor_bench_none.errors import ConfigError
from backdoor_bench_none.trainers.centralized import Centralized

if TYPE_CHECKING:
    from torch import Tensor


class Federated(Trainer):
    """FedAvg: the recipe's epochs are rounds, its learning rate is that of a round; every client takes part in each.

    All weights and buffers are averaged with equal weight for each client, as in the code of DBA (arXiv:2202.06382,
    section 8.8, does not say). A defense that drops samples drops them on the clients that hold them; a client without
    samples sits out. Data that no client holds, such as a trusted hold-out, are trained on by the server.
    """

    paper: ClassVar[str] = "arXiv:1602.05629"
    has_clients: ClassVar[bool] = True

    clients: int = Field(10, ge=1, le=10_000, description="number of clients")
    local_epochs: int = Field(1, ge=1, description="epochs of a client in each round")
    distribution: Literal["iid", "dirichlet"] = Field(
        "iid", description="iid: equal shares at random; dirichlet: each class divided by shares drawn from Dir(alpha)"
    )
    alpha: float = Field(0.5, gt=0, description="dirichlet: low values give clients few classes")

    def recipe(self) -> Mapping[str, Any]:
        """Rounds at one learning rate, in batches of 64, as in DBA."""
        return {"epochs": 10, "schedule": "constant", "lr": 0.1, "batch_size": 64, "nesterov": False}

    def check(self, info: DatasetInfo) -> None:
        """Raise `ConfigError` if there are more clients than training images."""
        if self.clients > info.train_size:
            raise ConfigError(
                f"federated: {self.clients} clients cannot share the {info.train_size} training images of {info.name}",
                "lower clients",
            )

    def split(self, labels: Tensor, num_classes: int, seed: int) -> Tensor:
        """The client (N,) int64 of every sample; `ConfigError` if a client would have none."""
        generator = np.random.default_rng(seed)
        owners = torch.empty(len(labels), dtype=torch.int64)
        for indices, shares in self._groups(labels, num_classes, generator):
            ends = np.round(np.cumsum(shares) * len(indices)).astype(np.int64)
            owner = np.searchsorted(ends, np.arange(len(indices)), side="right")
            owners[generator.permutation(indices)] = torch.from_numpy(owner)
        sizes = torch.bincount(owners, minlength=self.clients)
        if not bool(sizes.all()):
            empty = int(torch.nonzero(sizes == 0)[0])
            raise ConfigError(f"federated: client {empty} has no sample", "raise alpha, or lower clients")
        return owners

    def _groups(
        self, labels: Tensor, num_classes: int, generator: np.random.Generator
    ) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
        """Indices that are divided together, with the share of each client."""
        if self.distribution == "iid":
            yield np.arange(len(labels)), np.full(self.clients, 1 / self.clients)
            return
        for label in range(num_classes):
            yield np.flatnonzero(labels.numpy() == label), generator.dirichlet(np.full(self.clients, self.alpha))

    def fit(self, task: FitTask, context: Context) -> History:
        """Train `task.model` in place, round by round; the losses are the means over clients."""
        owners = task.data.clients
        if owners is None:
            return Centralized().fit(task, context)
        model, recipe, kept = task.model, task.recipe, task.indices()
        held = {client: kept[owners[kept] == client] for client in range(self.clients)}
        history = History()
        for index in range(recipe.epochs):
            shared = {"epochs": self.local_epochs, "lr": recipe.lr_at(index, 1), "schedule": "constant"}
            start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            average, losses = Average(), []
            for client, samples in held.items():
                if not len(samples):
                    continue
                local = Recipe(**{**recipe.model_dump(), **shared, **task.local.get(client, {})})
                model.load_state_dict(start)
                quiet = replace(context.derive("round", index, client), progress=no_progress, log=no_log)
                fitted = Centralized().fit(replace(task, recipe=local, keep=samples), quiet)
                losses.append(fitted.losses[-1])
                average.add(model.state_dict())
            model.load_state_dict(average.result())
            history.losses.append(float(np.mean(losses)))
            context.log("loss", history.losses[-1], index)
            context.progress(index + 1, recipe.epochs)
        model.eval()
        return history


class Average:
    """The unweighted mean of state dictionaries, in float64; integers are truncated."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._types: dict[str, torch.dtype] = {}
        self._count = 0

    def add(self, weights: Mapping[str, Tensor]) -> None:
        """Add one network's weights and buffers."""
        for name, tensor in weights.items():
            self._types[name] = tensor.dtype
            total = tensor.to(torch.float64, copy=True)
            if name in self._sums:
                total = self._sums[name] + total
            self._sums[name] = total
        self._count += 1

    def result(self) -> dict[str, Tensor]:
        """The mean of the added networks; `ConfigError` if there are none."""
        if not self._count:
            raise ConfigError("federated: no client has a sample left to train on")
        return {name: (total / self._count).to(self._types[name]) for name, total in self._sums.items()}
