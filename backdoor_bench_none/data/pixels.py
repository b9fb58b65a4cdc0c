"""Reads image files of any kind as 8-bit grey or colour, as a viewer shows them, or says why it cannot."""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from backdoor_bench_none.errors import DatasetError
from backdoor_bench_none.words import plural

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: white in 16 bits a channel
WHITE_16_BIT = 2**16 - 1
#: where all images of more than 8 bits stay below this share of white, white is probably another level
DARK = 1 / 8
#: Pillow's modes of one channel with more than 8 bits; "I" has 32, which files of 16 bits are read into too
DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")
#: formats that are no pictures of one kind, and those that Pillow hands to another program
NOT_READ = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}


class SeveralPicturesWarning(UserWarning):
    """Files hold several pictures, as animations do; the first of each is used."""


@dataclass
class ImageReader:
    """Reads the image files of one data set; `check` judges them as a whole afterwards.

    They are turned as their EXIF tag says; what is transparent becomes white; more than 8 bits a channel are scaled so
    that `white`, by default 65535, becomes 255.
    """

    size: int
    channels: int
    white: int | None = None
    #: the highest level in images of more than 8 bits; None if there was none
    highest: int | None = None
    several: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self, path: str) -> NDArray[np.uint8]:
        """One file as uint8 (size, size, channels), resized bilinearly as a whole.

        `DatasetError` names a file that is damaged, holds numbers beyond 16 bits or fractions, or has more pixels than
        Pillow allows.
        """
        try:
            with Image.open(path, formats=readable_formats()) as image:
                if getattr(image, "n_frames", 1) > 1:
                    with self._lock:
                        self.several += 1
                upright = ImageOps.exif_transpose(image)
                plain = _on_white(self._in_8_bits(upright)).convert("RGB" if self.channels == 3 else "L")
                resized = plain.resize((self.size, self.size), Image.Resampling.BILINEAR)
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            raise DatasetError(f"the image {path} cannot be read: {error}", "replace or remove it") from error
        return np.asarray(resized).reshape(self.size, self.size, self.channels)

    def _in_8_bits(self, image: Image.Image) -> Image.Image:
        if image.mode == "F":
            raise ValueError("its pixels are floating-point numbers, whose range is not known; save 8 or 16 bits")
        if image.mode not in DEEP_MODES:
            return image
        levels = np.asarray(image).astype(np.int64)
        white = self.white or WHITE_16_BIT
        if levels.min() < 0 or levels.max() > white:
            raise ValueError(f"its pixels are {levels.min()} to {levels.max()}, beyond white, which is {white}")
        with self._lock:
            self.highest = max(self.highest or 0, int(levels.max()))
        return Image.fromarray(np.rint(levels * (255 / white)).astype(np.uint8))

    def check(self) -> None:
        """Warn of files with several pictures; `DatasetError` if all images of more than 8 bits are nearly black."""
        if self.several:
            message = f"image_folder: {plural('file', self.several)} with several pictures; the first of each is used"
            warnings.warn(message, SeveralPicturesWarning, stacklevel=2)
        if self.white is None and self.highest is not None and self.highest < DARK * WHITE_16_BIT:
            raise DatasetError(
                f"image_folder: the images of 16 bits a channel have levels up to {self.highest} only, nearly black",
                f"say `white: {2 ** max(8, self.highest.bit_length()) - 1}` if that is their white, or `white: 65535`",
            )


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white


@cache
def readable_formats() -> tuple[str, ...]:
    """Pillow's formats that are read."""
    Image.init()
    return tuple(name for name in Image.OPEN if name not in NOT_READ)


@cache
def image_endings() -> frozenset[str]:
    """The endings of the files that are read, in lower case."""
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in readable_formats())
