"""One record as text."""

from __future__ import annotations

import json
from collections.abc import Iterator

from backdoor_bench_none.contracts.measures import Count, Detection
from backdoor_bench_none.contracts.record import Record
from backdoor_bench_none.planning.stage_table import in_order


def describe_whole(record: Record) -> Iterator[str]:
    """The content of a record for a terminal, line by line."""
    yield f"{record.title}  {record.status}"
    yield f"key          {record.key}"
    if record.reason:
        yield f"reason       {record.reason}"
    for axis, value in record.axes.items():
        params = ", ".join(f"{name}={_param(name, param, record)}" for name, param in value.params.items())
        name = value.name
        if value.label != name:
            name += f" as {value.label}"
        yield f"{axis:12} {name}  {params}"
    yield f"{'recipe':12} " + ", ".join(f"{name}={value}" for name, value in record.recipe.items())
    yield from _numbers(record)
    for stage in in_order(record.costs):
        cost = record.costs[stage]
        line = f"{stage:12} {cost.seconds:.2f} s"
        if cost.peak_memory is not None:
            line += f", {cost.peak_memory / 2**20:.0f} MiB at most"
        yield line
    for title, values in (("found", record.extras), ("upstream", record.upstream), ("provenance", record.provenance)):
        if values:
            yield f"{title:12} " + ", ".join(f"{name}={_plain(value)}" for name, value in values.items())
    for trigger in record.triggers:
        yield f"{'trigger':12} " + ", ".join(f"{name}={_plain(value)}" for name, value in trigger.items())
    for text in record.warnings:
        yield f"warning      {text}"
    if record.failure is not None and record.failure.traceback:
        yield record.failure.traceback.rstrip()


def _param(name: str, value: object, record: Record) -> object:
    """A parameter; the class that an attack aims at with its name, where it has one."""
    classes = (record.dataset_info or {}).get("classes")
    if name in ("target", "source") and classes and isinstance(value, int) and value < len(classes):
        return f"{value} ('{classes[value]}')"
    return value


def _plain(value: object) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _numbers(record: Record) -> Iterator[str]:
    if record.counts is not None:
        yield f"BA           {_share(record.counts.benign_accuracy)} clean test images given their label"
        yield f"ASR          {_share(record.counts.attack_success_rate)} triggered images given the label wanted"
        yield f"RA           {_share(record.counts.robust_accuracy)} triggered images given their true label"
    if record.detection is not None:
        yield _describe_detection(record.detection)
    for name, value in record.metrics.items():
        shown = "not finite" if value is None else f"{value:.6g}"
        yield f"{name:12} {shown}"


def _describe_detection(detection: Detection) -> str:
    rates = {"TPR": detection.tpr, "FPR": detection.fpr, "AUROC": detection.auroc}
    shown = "  ".join(f"{name} {_rate(value)}" for name, value in rates.items())
    poisoned = detection.true_positive + detection.false_negative
    hits = f"{detection.true_positive} of {poisoned} poisoned samples flagged"
    return f"detection    {shown}  ({hits}, and {detection.false_positive} benign ones)"


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _share(count: Count | None) -> str:
    if count is None:
        return "– no trigger: 0 of 0"
    return f"{count.rate:.4f} = {count.hits} of {count.total}"
