"""Finds classes, their images, and the split into training and test part in folders that people made."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from backdoor_bench_none.data.image_files import Sample
from backdoor_bench_none.data.pixels import image_endings
from backdoor_bench_none.errors import DatasetError
from backdoor_bench_none.words import visible

#: names of training and test parts in lower case; of several test parts the first listed is used
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "val", "valid", "validation", "eval", "evaluation", "dev")
#: what systems leave in folders, beside names that begin with a dot
LITTER = {"thumbs.db", "desktop.ini", "__macosx", "icon\r"}
#: how the folders are read: `split` is a training and a test part, `classes` has class folders only
Layout = Literal["auto", "split", "classes"]
#: the folders of classes, by name
ClassFolders = dict[str, Path]
LAYOUT_HINT = "say `layout: split` or `layout: classes`"


@dataclass(frozen=True)
class Parts:
    """The class folders of both parts, None for a test part that is not there, and how they are read in words."""

    train: ClassFolders
    test: ClassFolders | None
    reading: str


@dataclass(frozen=True)
class Listing:
    """The image files of a part, and the files that are none, counted by ending."""

    samples: list[Sample]
    left_out: Counter[str] = field(default_factory=Counter)


def find_parts(root: Path, layout: Layout) -> Parts:
    """The class folders below `root`, as a split into training and test part, or as one set.

    Names of parts are matched in any case; one part may lie in the folder of the other. `DatasetError` if the folders
    can be read in two ways, and `layout` does not say which.
    """
    folders = _folders(root)
    if layout == "classes":
        return Parts(folders, None, "class folders")
    trains, tests = _named(folders, TRAIN_NAMES), _named(folders, TEST_NAMES)
    if len(trains) > 1:
        names = " and ".join(trains)
        raise DatasetError(f"image_folder: {names} in {root} are both training parts by name", "rename one of them")
    if trains and tests:
        return _beside(root, folders, trains[0], tests, layout)
    if trains and (inside := _inside(folders[trains[0]])):
        return inside
    if tests and (inside := _inside(root)):
        return inside
    if layout == "split":
        lacking = "a training part and no test part" if trains else "no training part"
        hint = f"name its folders one of {', '.join(TRAIN_NAMES)}, and one of {', '.join(TEST_NAMES)}"
        raise DatasetError(f"image_folder: {root} has {lacking}", hint)
    return Parts(folders, None, "class folders")


def _beside(root: Path, folders: ClassFolders, train: str, tests: Sequence[str], layout: Layout) -> Parts:
    """A training part beside one or more test parts, unless they look like class folders."""
    parts = [train, *tests]
    others = [name for name, folder in folders.items() if name not in parts and _has_images(folder)]
    direct = [name for name in parts if _has_images_itself(folders[name])]
    if layout == "auto" and (direct or others):
        why = f"{' and '.join(direct)} hold images themselves" if direct else f"{_some(others)} beside them hold images"
        raise DatasetError(
            f"image_folder: {train} and {tests[0]} in {root} may be a split or two classes: {why}", LAYOUT_HINT
        )
    reading = f"split into {train} and {tests[0]}"
    if len(tests) > 1:
        reading += f"; {_some(tests[1:])} not used"
    return Parts(_folders(folders[train]), _folders(folders[tests[0]]), reading)


def _inside(root: Path) -> Parts | None:
    """A test part inside the folder of the training part; None unless it has the classes that lie beside it."""
    folders = _folders(root)
    for test in _named(folders, TEST_NAMES):
        train = {name: folder for name, folder in folders.items() if name != test}
        within = _folders(folders[test])
        if len(train) > 1 and within.keys() == train.keys():
            return Parts(train, within, f"split, with {test} inside the training part")
    return None


def _named(folders: Mapping[str, Path], names: Sequence[str]) -> list[str]:
    """The folders with one of these names in any case, in the order of `names`."""
    matching = [name for name in folders if name.lower() in names]
    return sorted(matching, key=lambda name: (names.index(name.lower()), name))


def _folders(root: Path) -> ClassFolders:
    """The visible folders in `root`, by name: whole numbers in their order if all are, else sorted as texts."""
    try:
        with os.scandir(root) as entries:
            names = [entry.name for entry in entries if not _is_litter(entry.name) and entry.is_dir()]
    except OSError as error:
        raise DatasetError(
            f"image_folder: {root}: {error.strerror}", "it must hold one folder for each class"
        ) from error
    if names and all(name.isascii() and name.isdigit() for name in names):
        names.sort(key=lambda name: (int(name), name))
    else:
        names.sort()
    return {name: root / name for name in names}


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name.lower() in LITTER


def list_images(folders: ClassFolders) -> Listing:
    """The image files of all classes; `DatasetError` if a class has none."""
    listing = Listing([])
    for label, (name, folder) in enumerate(folders.items()):
        before = len(listing.samples)
        others: Counter[str] = Counter()
        for path in _files(folder):
            ending = os.path.splitext(path)[1].lower()
            if ending in image_endings():
                listing.samples.append((path, label))
            else:
                others[ending or "without an ending"] += 1
        if len(listing.samples) == before:
            held = f"; it holds {count_endings(others)}" if others else ""
            raise DatasetError(
                f"image_folder: class {visible(name)!r} in {folder.parent} has no images{held}",
                "remove the folder, put images there, or name the `classes` to use",
            )
        listing.left_out.update(others)
    return listing


def count_endings(endings: Mapping[str, int]) -> str:
    """Counts of files by ending in words, the most frequent first: "60 .jfif, 20 .png"."""
    ordered = sorted(endings.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {visible(ending)}" for ending, count in ordered)


def _files(folder: Path) -> Iterator[str]:
    """The visible files below `folder`, in the order of their paths; a folder that links to one above is left out."""
    seen: set[str] = set()
    for where, names, files in os.walk(folder, followlinks=True):
        names[:] = [name for name in sorted(names) if not _is_litter(name) and _is_new(os.path.join(where, name), seen)]
        yield from (os.path.join(where, name) for name in sorted(files) if not _is_litter(name))


def _is_new(folder: str, seen: set[str]) -> bool:
    real = os.path.realpath(folder)
    if real in seen:
        return False
    seen.add(real)
    return True


def _has_images(folder: Path) -> bool:
    return any(os.path.splitext(path)[1].lower() in image_endings() for path in _files(folder))


def _has_images_itself(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(
            entry.is_file() and os.path.splitext(entry.name)[1].lower() in image_endings()
            for entry in entries
            if not _is_litter(entry.name)
        )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(visible(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
