"""A thousand and more cells that nobody has trained, as records and as the source of a report."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from backdoor_bench_none.contracts.record import Record
from backdoor_bench_none.report.html.source import Source, source_of_records
from backdoor_bench_none.results.index import read_measurements
from backdoor_bench_none.results.store import Store

DEFENSES = ("no_defense", "none", "nad", "ac", "abl", "dp_sgd", "fine_tune", "oracle_filter")
ATTACKS = ("badnets", "blended", "wanet", "sig", "label_consistent")
ARCHITECTURES = ("nin", "vgg11", "vgg16", "resnet18", "alexnet")
PROVENANCE = {
    "providers": {"attack": "backdoor-bench-none 0.1.0", "defense": "backdoor-bench-none 0.1.0"},
    "python": "3.12.1", "libraries": {"torch": "2.6.0", "numpy": "2.1.0"}, "device": "NVIDIA H100 80GB HBM3",
    "precision": "bfloat16", "threads": 1, "cuda": "12.4", "deterministic": False,
}  # fmt: skip
RECIPE = {"epochs": 100, "batch_size": 128, "optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "schedule": "one_cycle"}


def synthetic_records(make_record: Callable[..., Record], cells: int = 1000, seeds: int = 1) -> list[Record]:
    """`cells` records, of which one in fifty failed; every victim has a curve of 100 epochs of its own."""
    rng = random.Random(0)
    axes = itertools.product(
        range(seeds), ("cifar10", "gtsrb"), ATTACKS, ARCHITECTURES, ("relu", "elu", "selu"), DEFENSES
    )
    records = []
    for number, (seed, dataset, attack, architecture, activation, defense) in enumerate(itertools.islice(axes, cells)):
        labels = {"dataset": dataset, "attack": attack, "defense": defense, "architecture": architecture,
                  "activation": activation}  # fmt: skip
        fields: dict[str, Any] = {"status": "done", "ba": rng.randrange(60, 96), "asr": rng.randrange(101)}
        if number % 50 == 49:
            trace = "Traceback (most recent call last):\n" + "  File 'a.py', line 1, in f\n" * 20
            failure = {"type": "RuntimeError", "message": "it broke", "traceback": trace}
            fields = {"status": "failed", "ba": None, "reason": "RuntimeError: it broke", "failure": failure}
        curve = [2.3 * math.exp(-epoch / 30) + rng.random() / 10 for epoch in range(100)]
        records.append(
            make_record(
                f"{number * 2654435761 % 2**64:016x}", seed=seed, axes=labels, victim_losses=curve,
                seconds={"data": 1.0, "victim": 100 + rng.random(), "defense": 50 + rng.random()},
                provenance=PROVENANCE, sees_ground_truth=defense == "oracle_filter",
                clean_fraction=0.05 if defense in ("nad", "fine_tune") else 0.0, **fields,
            ).model_copy(update={"recipe": RECIPE, "title": "/".join([*labels.values(), f"s{seed}"])})
        )  # fmt: skip
    return records


def write_records(records: Sequence[Record], folder: Path) -> Path:
    """Put them into a results folder."""
    store = Store(folder)
    for record in records:
        path = store.record_path(record.key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record.model_dump(mode="json", by_alias=True)))  # also what is not finite
    return folder


def source_of(records: Sequence[Record], folder: Path) -> Source:
    """The source of a report on these records, written to `folder`."""
    write_records(records, folder)
    return source_of_records(read_measurements(folder), folder)


def parse(page: str) -> Mapping[str, Any]:
    """The data within a report."""
    start = page.index('<script type="application/json" id="data">') + len('<script type="application/json" id="data">')
    data: Mapping[str, Any] = json.loads(page[start : page.index("</script>", start)])
    return data
