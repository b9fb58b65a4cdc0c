"""Writes record folders as BackdoorBench's tools read them."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from backdoor_bench_none.api import BenchError, Counts, DatasetInfo, ImageSet, PoisonedSamples
from bbn_backdoorbench.words import ATTACK_RESULT, DEFENSE_RESULT, INFO

#: marks results written by this package, which may be overwritten
PLUGIN_KEY = "written_by"


@dataclass(frozen=True)
class Network:
    """A network, by the toolbox's name, and its weights."""

    model_name: str
    num_classes: int
    weights: Mapping[str, Tensor]

    def as_dict(self) -> dict[str, Any]:
        """Its entries in a result file."""
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.weights.items()}
        return {"model_name": self.model_name, "num_classes": self.num_classes, "model": weights}


def write_attack(
    folder: Path,
    network: Network,
    info: DatasetInfo,
    train: tuple[ImageSet, PoisonedSamples] | None,
    test: tuple[ImageSet, PoisonedSamples],
    facts: Mapping[str, Any],
) -> None:
    """Write attack_result.pt, info.pickle and the images of both parts into a new `folder`.

    `train` and `test` are a clean set with its changed samples; `train` is None if the attack has no training set. The
    paths in the files are relative to the folder that holds `record/`, so `folder` must be put there under its own
    name.
    """
    dataset = info.name.removeprefix("backdoorbench:")
    channels, height, width = info.shape
    with new_folder(folder) as draft:
        parts: dict[str, Any] = {"bd_train": None, "bd_test": _write_part(draft, folder.name, "bd_test", *test, False)}
        if train is not None:
            parts["bd_train"] = _write_part(draft, folder.name, "bd_train", *train, True)
        result = {
            **network.as_dict(), "data_path": f"./data/{dataset}", "img_size": (height, width, channels),
            "clean_data": dataset, **parts,
        }  # fmt: skip
        torch.save(result, draft / ATTACK_RESULT, pickle_protocol=2)
        torch.save(dict(facts), draft / INFO, pickle_protocol=2)


def _write_part(
    draft: Path, record: str, name: str, clean: ImageSet, samples: PoisonedSamples, whole: bool
) -> dict[str, Any]:
    """Write the images of one part; returns its state as the toolbox stores it.

    `whole` says whether the part also holds the unchanged samples.
    """
    images_folder = f"./record/{record}/{name}_dataset"
    true_labels = clean.labels[samples.indices].tolist()
    entries: dict[int, dict[str, Any]] = {}
    (draft / f"{name}_dataset").mkdir()
    for index, image, label, true in zip(
        samples.indices.tolist(), samples.images.permute(0, 2, 3, 1).numpy(), samples.labels.tolist(), true_labels,
        strict=True,
    ):  # fmt: skip
        path = draft / f"{name}_dataset" / str(true) / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        # Pillow takes grey images without an axis for channels
        pixels = image.squeeze(-1) if image.shape[-1] == 1 else image
        Image.fromarray(pixels).save(path)
        entries[index] = {"path": f"{images_folder}/{true}/{index}.png", "other_info": [label, true]}
    changed = np.zeros(len(clean), dtype=np.float64)
    changed[samples.indices.numpy()] = 1
    order = np.sort(samples.indices.numpy().astype(np.int64))
    if whole:
        order = np.arange(len(clean), dtype=np.int64)
    container = {"save_folder_path": images_folder, "data_dict": entries, "save_file_format": ".png"}
    return {
        "bd_data_container": container, "getitem_all": True, "getitem_all_switch": False,
        "original_index_array": order, "poison_indicator": changed, "save_folder_path": images_folder,
    }  # fmt: skip


def write_defense(folder: Path, name: str, network: Network, counts: Counts, written_by: str) -> Path:
    """Write `defense/<name>/` with defense_result.pt and the two csv files into the record in `folder`.

    `BenchError` if there is a result with that name that this package did not write.
    """
    target = folder / "defense" / name
    if target.exists() and not (target / PLUGIN_KEY).is_file():
        message = f"'{target}' exists already and was not written by this package"
        raise BenchError(message, "move it, or choose another name")
    shutil.rmtree(target, ignore_errors=True)
    with new_folder(target) as draft:
        torch.save({**network.as_dict(), PLUGIN_KEY: written_by}, draft / DEFENSE_RESULT, pickle_protocol=2)
        (draft / PLUGIN_KEY).write_text(written_by + "\n", encoding="utf-8")
        _write_tables(draft, name, counts)
    return target


def _write_tables(folder: Path, name: str, counts: Counts) -> None:
    """Write the results as the last epoch, in the columns that the toolbox's tools read."""
    shares = {
        "test_acc": counts.benign_accuracy, "test_asr": counts.attack_success_rate, "test_ra": counts.robust_accuracy,
    }  # fmt: skip
    values: dict[str, Any] = dict.fromkeys(shares)
    values |= {name: count.rate for name, count in shares.items() if count}
    absent: dict[str, Any] = {name: value is None for name, value in values.items()}
    rows = {"last": values, "valid_max": values, "exist_nan_value": absent}
    _write_csv(folder / f"{name}_df.csv", [{"": 0, "epoch": 0, "batch": 0, **values}])
    _write_csv(folder / f"{name}_df_summary.csv", [{"": row, "epoch": 0, "batch": 0, **of} for row, of in rows.items()])


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a draft that is renamed to `folder` at the end; `BenchError` if that exists or cannot be written."""
    if folder.exists():
        raise BenchError(f"'{folder}' exists already", "move it, or choose another folder with --output")
    draft = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        yield draft
        draft.rename(folder)
    except OSError as error:
        raise BenchError(f"'{folder}' cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
