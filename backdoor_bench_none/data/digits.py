"""The handwritten digits of scikit-learn: 1,797 real images, no download."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field

from backdoor_bench_none.contracts.dataset import Dataset, DatasetInfo, ImageSet
from backdoor_bench_none.errors import DatasetError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_TEST_SIZE = 500
_DEFAULT_SIZE = 16
#: the sha256 of the images and labels of the default size, known without making them
_KNOWN = "90c7160bca084f252ba95c2d78ea379d4b8dff15eeee678cc9e05fcd514030ce"


def stratified_split(labels: NDArray[np.int64], test_size: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Fixed indices of a training and a test part with equal class shares, both ascending.

    `test_size` is a share in 0..1 or a whole number of samples.
    """
    from sklearn.model_selection import train_test_split  # takes a second to import, and most commands read no images

    indices = np.arange(len(labels))
    train, test = train_test_split(indices, test_size=test_size, stratify=labels, random_state=0)
    return np.sort(train), np.sort(test)


def _hash(*parts: ImageSet) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.images.numpy().tobytes())
        digest.update(part.labels.numpy().tobytes())
    return digest.hexdigest()


class Digits(Dataset):
    """scikit-learn's `load_digits`: 8x8 grey images of ten classes, enlarged; 1,297 for training, 500 for testing."""

    image_size: int = Field(
        default=_DEFAULT_SIZE, ge=8, le=64, description="side in pixels, enlarged bilinearly from 8"
    )

    def info(self) -> DatasetInfo:
        """The metadata; `mean` and `std` hold for the default size.

        The digits fill the frame, so there is no crop and no flip.
        """
        return DatasetInfo(
            name="digits",
            shape=(1, self.image_size, self.image_size),
            num_classes=10,
            train_size=1797 - _TEST_SIZE,
            mean=(0.3053,),
            std=(0.3186,),
            paper_target=0,
            paper_trigger="label_consistent",
        )

    def files(self) -> list[Path]:
        """An empty list: the images are part of scikit-learn."""
        return []

    def fingerprint(self) -> str:
        """The sha256 of the images and labels of both parts."""
        if self.image_size == _DEFAULT_SIZE:
            return _KNOWN  # `load` makes sure of it
        return _hash(*self.load())

    def recipe(self) -> Mapping[str, Any]:
        """Small batches: 20 steps per epoch."""
        return {"epochs": 20, "batch_size": 64}

    def load(self) -> tuple[ImageSet, ImageSet]:
        """1,297 training and 500 test images (N, 1, S, S), in scikit-learn's order within each part.

        `DatasetError` if the installed libraries make other images of the default size than they should.
        """
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy(self._enlarged(np.rint(digits.images * (255 / 16)).astype(np.uint8)))
        labels = digits.target.astype(np.int64)
        train, test = (torch.from_numpy(part) for part in stratified_split(labels, _TEST_SIZE))
        whole = ImageSet(images, torch.from_numpy(labels))
        parts = whole.take(train), whole.take(test)
        if self.image_size == _DEFAULT_SIZE and _hash(*parts) != _KNOWN:
            versions = (
                f"scikit-learn {version('scikit-learn')}, numpy {version('numpy')} and Pillow {version('pillow')}"
            )
            raise DatasetError(f"digits: {versions} make other images than those that records know", "install others")
        return parts

    def _enlarged(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        # Pillow computes in integers: the bytes, and so the fingerprint, are the same on every machine.
        size = (self.image_size, self.image_size)
        enlarged = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)) for image in images]
        return np.stack(enlarged)[:, None]
