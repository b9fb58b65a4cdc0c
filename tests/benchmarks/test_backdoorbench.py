"""Reading a record of 5,000 images, against decoding its PNGs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pytest_benchmark.fixture import BenchmarkFixture
from ratios import measure_ratio

from bbn_backdoorbench.reading import read_images, read_record

COUNT = 5_000


def write_record(folder: Path) -> None:
    """2,500 training and 2,500 test images, smooth as photographs are."""
    generator = np.random.default_rng(0)
    parts = {}
    for name in ("bd_train", "bd_test"):
        entries = {}
        for index in range(COUNT // 2):
            label = index % 10
            path = folder / f"{name}_dataset" / str(label) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            small = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            small.resize((32, 32), Image.Resampling.BICUBIC).save(path)
            place = f"./record/x/{name}_dataset/{label}/{index}.png"
            entries[np.int64(index)] = {"path": place, "other_info": [0, label]}
        parts[name] = {
            "bd_data_container": {"data_dict": entries}, "original_index_array": np.arange(COUNT // 2),
            "poison_indicator": np.ones(COUNT // 2),
        }  # fmt: skip
    raw = {
        "model_name": "resnet18", "num_classes": 10, "model": {"weight": torch.zeros(10, 10)},
        "data_path": "./data/cifar10", "img_size": (32, 32, 3), "clean_data": "cifar10", **parts,
    }  # fmt: skip
    torch.save(raw, folder / "attack_result.pt", pickle_protocol=2)


def test_reading_a_record_against_decoding_its_images(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    write_record(tmp_path)
    paths = sorted(tmp_path.rglob("*.png"))
    assert len(paths) == COUNT

    def read() -> None:
        record = read_record(tmp_path)
        for part in (record.train, record.test):
            assert part is not None
            assert read_images(part, (3, 32, 32)).shape == (COUNT // 2, 3, 32, 32)

    def decode() -> None:
        for path in paths:
            with Image.open(path) as image:
                np.asarray(image)

    ratio = measure_ratio(read, decode, rounds=7)
    benchmark.extra_info["reading / decoding"] = ratio
    benchmark.pedantic(read, rounds=3)
    assert ratio <= 1.2
