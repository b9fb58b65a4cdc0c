"""Prepares and reports what real_backdoorbench.sh runs: a checkout with small data, and a benchmark of all methods."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from backdoor_bench_none.api import Registry, Store, make_plan, record_key
from bbn_backdoorbench import toolbox
from bbn_backdoorbench.words import SCRIPTS

#: images of each of GTSRB's 43 classes, so few because preactresnet18 takes 30 ms for one on a CPU
TRAIN, TEST, CLASSES = 3, 1, 43
#: a class is a digit in one of these colours
COLOURS = ((255, 255, 255), (255, 80, 80), (80, 255, 80), (80, 80, 255), (255, 255, 80))
#: flags that make each method short; the others are those of its YAML file
SHORT: dict[str, dict[str, int | float | bool]] = {
    "abl": {"tuning_epochs": 1, "finetuning_epochs": 1, "unlearning_epochs": 1},
    "anp": {"nb_iter": 4, "print_every": 2},
    "fp": {"epochs": 1, "once_prune_ratio": 0.25},
    "mcr": {"epochs": 1, "ft_epochs": 1, "train_curve_epochs": 1},
    "nad": {"te_epochs": 1, "epochs": 1},
    "nc": {"nc_epoch": 1, "epochs": 1},
    "npd": {"warm_epochs": 1, "epochs": 1, "frequency_save": 0},
    "rnp": {"unlearning_epochs": 1, "recovering_epochs": 1},
    "sau": {"n_rounds": 1},
    "i-bau": {"n_rounds": 1},
    # these train nothing
    "bnp": {}, "clp": {}, "ep": {},
}  # fmt: skip
OTHERS: dict[str, int | float | bool] = {"epochs": 1}
#: so much that NPD, which draws from each class, finds one image in each
CLEAN_FRACTION = 0.4
#: the toolbox drops the last batch of an epoch, which would be the only one of those in its YAML files
BATCH_SIZE = 32


def prepare(checkout: Path, folder: Path) -> None:
    """Link the checkout into folder/home, with a small data set of its own, and write the benchmark."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    for path in checkout.iterdir():
        if path.name not in ("data", "record", ".git") and not (home / path.name).exists():
            (home / path.name).symlink_to(path)
    (home / "record").mkdir(exist_ok=True)
    write_images(home / "data" / "gtsrb")
    defenses: list[dict[str, Any]] = [{"name": "no_defense"}]
    for script, component in SCRIPTS.items():
        params: dict[str, Any] = {"options": {**SHORT.get(script, OTHERS), "batch_size": BATCH_SIZE}}
        if issubclass(getattr(toolbox, component), toolbox.WithCleanData):
            params["clean_fraction"] = CLEAN_FRACTION
        defenses.append({"name": f"backdoorbench:{script}", "params": params, "as": script})
    record = {"name": "backdoorbench_record", "params": {"record": str(home / "record" / "badnet")}, "as": "badnet"}
    matrix = {
        "dataset": [{"name": "backdoorbench:gtsrb", "params": {"root": str(home / "data" / "gtsrb")}}],
        "attack": [record], "defense": defenses, "architecture": ["backdoorbench:preactresnet18"],
    }  # fmt: skip
    text = yaml.safe_dump({"version": 1, "name": "methods", "results": str(folder / "results"), "matrix": matrix})
    (folder / "methods.yaml").write_text(text, encoding="utf-8")


def write_images(root: Path) -> None:
    """Real digits in colour, in the layout that both sides read as GTSRB."""
    digits = load_digits()
    test: list[tuple[str, int]] = []
    for label in range(CLASSES):
        rows = np.flatnonzero(digits.target == label % 10)
        tint = np.array(COLOURS[label // 10]) / 16
        images = (digits.images[rows[: TRAIN + TEST], :, :, None] * tint).astype("uint8")
        folder = root / "Train" / f"{label:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        (root / "Test").mkdir(exist_ok=True)
        names = [f"{label:05d}_{number:05d}.ppm" for number in range(TRAIN + TEST)]
        for number, (name, pixels) in enumerate(zip(names, images, strict=True)):
            parent = folder if number < TRAIN else root / "Test"
            Image.fromarray(pixels).resize((32, 32)).save(parent / name)
        write_list(folder / f"GT-{label:05d}.csv", [(name, label) for name in names[:TRAIN]])
        test += [(name, label) for name in names[TRAIN:]]
    write_list(root / "Test" / "GT-final_test.csv", test)


def write_list(path: Path, rows: list[tuple[str, int]]) -> None:
    """GTSRB's list of images."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["Filename", "Width", "Height", "Roi.X1", "Roi.Y1", "Roi.X2", "Roi.Y2", "ClassId"])
        writer.writerows([name, 32, 32, 0, 0, 32, 32, label] for name, label in rows)


def report(folder: Path) -> None:
    """Print what happened to each method."""
    path = folder / "methods.yaml"
    plan = make_plan(path, Registry.default(path.parent), need_data=True)
    store = Store(folder / "results")
    for cell in plan.cells:
        key = record_key(cell)
        record = store.read_record(key)
        line = f"{cell.defense.label:10} "
        if key in plan.skipped:
            line += f"skipped: {plan.skipped[key]}"
        elif record is None:
            line += "no record: see run.log"
        elif record.counts is None:
            line += f"{record.status}: {record.reason}"
        else:
            counts = {
                "ACC": record.counts.benign_accuracy, "ASR": record.counts.attack_success_rate,
                "RA": record.counts.robust_accuracy,
            }  # fmt: skip
            line += ", ".join(f"{name} {count.hits} of {count.total}" for name, count in counts.items() if count)
            line += "".join(f"; {note}" for note in record.extras.values())
        print(line)


if __name__ == "__main__":
    if sys.argv[1] == "prepare":
        prepare(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        report(Path(sys.argv[2]))
