"""One record as text."""

from __future__ import annotations

import json
from collections.abc import Iterator

from backdoor_bench_none.contracts.measures import Count
from backdoor_bench_none.contracts.record import Record
from backdoor_bench_none.planning.stage_table import in_order


def describe_whole(record: Record) -> Iterator[str]:
    """All a person wants to know of a record, line by line."""
    yield f"{record.title}  {record.status}"
    yield f"key          {record.key}"
    if record.reason:
        yield f"reason       {record.reason}"
    for axis, value in record.axes.items():
        params = ", ".join(f"{name}={param}" for name, param in value.params.items())
        yield f"{axis:12} {value.name}{f' as {value.label}' if value.label != value.name else ''}  {params}"
    yield f"{'recipe':12} " + ", ".join(f"{name}={value}" for name, value in record.recipe.items())
    yield from _numbers(record)
    for stage in in_order(record.costs):
        cost = record.costs[stage]
        memory = "" if cost.peak_memory is None else f", {cost.peak_memory / 2**20:.0f} MiB at most"
        yield f"{stage:12} {cost.seconds:.2f} s{memory}"
    for title, values in (("found", record.extras), ("upstream", record.upstream), ("provenance", record.provenance)):
        if values:
            yield f"{title:12} " + ", ".join(f"{name}={_plain(value)}" for name, value in values.items())
    for trigger in record.triggers:
        yield f"{'trigger':12} " + ", ".join(f"{name}={_plain(value)}" for name, value in trigger.items())
    for text in record.warnings:
        yield f"warning      {text}"
    if record.failure is not None and record.failure.traceback:
        yield record.failure.traceback.rstrip()


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _numbers(record: Record) -> Iterator[str]:
    if record.counts is not None:
        yield f"BA           {_share(record.counts.benign_accuracy)} clean test images given their label"
        yield f"ASR          {_share(record.counts.attack_success_rate)} triggered images given the label wanted"
        yield f"RA           {_share(record.counts.robust_accuracy)} triggered images given their true label"
    if (found := record.detection) is not None:
        rates = [("TPR", found.tpr), ("FPR", found.fpr), ("AUROC", found.auroc)]
        shown = "  ".join(f"{name} {'–' if value is None else f'{value:.4f}'}" for name, value in rates)
        hits = f"{found.true_positive} of {found.true_positive + found.false_negative} poisoned samples flagged"
        yield f"detection    {shown}  ({hits}, and {found.false_positive} benign ones)"
    for name, value in record.metrics.items():
        yield f"{name:12} {'not finite' if value is None else f'{value:.6g}'}"


def _share(count: Count | None) -> str:
    return "– no trigger: 0 of 0" if count is None else f"{count.rate:.4f} = {count.hits} of {count.total}"
