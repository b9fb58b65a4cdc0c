"""GTSRB in BackdoorBench's layout, which is not torchvision's."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from backdoor_bench_none.api import BenchError
from bbn_backdoorbench.datasets import GTSRB

HEADER = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"


def write_gtsrb(root: Path) -> None:
    """One training and one test image of each class, whose brightness is its label; the test set is in reverse."""
    (root / "Test").mkdir(parents=True)
    for label in range(43):
        folder = root / "Train" / f"{label:05d}"
        folder.mkdir(parents=True)
        for parent in (folder, root / "Test"):
            Image.new("RGB", (40, 40), (label, label, label)).save(parent / f"{label:05d}.ppm")
        (folder / f"GT-{label:05d}.csv").write_text(f"{HEADER}{label:05d}.ppm;40;40;0;0;40;40;{label}\n")
    rows = [f"{label:05d}.ppm;40;40;0;0;40;40;{label}\n" for label in reversed(range(43))]
    (root / "Test" / "GT-final_test.csv").write_text(HEADER + "".join(rows))


def test_images_are_in_the_order_of_the_lists(tmp_path: Path) -> None:
    write_gtsrb(tmp_path)
    train, test = GTSRB(root=tmp_path).load()
    assert train.labels.tolist() == list(range(43))
    assert test.labels.tolist() == list(reversed(range(43)))
    assert train.images.shape == (43, 3, 32, 32)
    assert train.images[:, 0, 5, 5].tolist() == list(range(43))
    assert test.images[:, 0, 5, 5].tolist() == list(reversed(range(43)))


def test_a_part_of_it_is_told_with_where_the_rest_belongs_in_this_layout(tmp_path: Path) -> None:
    write_gtsrb(tmp_path)
    with pytest.warns(UserWarning, match=f"put Train/00000 to Train/00042 and Test, .* into {tmp_path}"):
        GTSRB(root=tmp_path).prepare()


def test_a_list_that_is_not_there_is_named(tmp_path: Path) -> None:
    write_gtsrb(tmp_path)
    (tmp_path / "Train" / "00007" / "GT-00007.csv").unlink()
    with pytest.raises(BenchError) as fault:
        GTSRB(root=tmp_path).prepare()
    assert "put Train/00000 to Train/00042" in f"{fault.value.message} {fault.value.hint}"
