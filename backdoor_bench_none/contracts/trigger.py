"""The trigger of Eq. 1, `x' = (1 - m) * x + m * t`, and the kinds of trigger the paper uses (Fig. 3, Table 8)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from backdoor_bench_none.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

#: (C, H, W)
Shape = tuple[int, int, int]
Color = tuple[int, int, int]
#: draws on a mask (H, W) with a thickness
Stroke: TypeAlias = "Callable[[NDArray[np.uint8], int], None]"


@dataclass(frozen=True)
class Trigger:
    """Eq. 1: `mask` (1|C, H, W) and `pattern` (C, H, W), float in [0, 1]; with a leading N, one trigger per image.

    The paper's masks are binary (Theorem 3.3 needs this), which makes stamping idempotent; a mask between 0 and 1
    blends.
    """

    mask: Tensor
    pattern: Tensor

    def __post_init__(self) -> None:
        if self.mask.shape[-2:] != self.pattern.shape[-2:]:
            raise ConfigError(f"mask {tuple(self.mask.shape)} and pattern {tuple(self.pattern.shape)} differ in size")
        for name, tensor in (("mask", self.mask), ("pattern", self.pattern)):
            if not tensor.is_floating_point() or (tensor.numel() and (tensor.min() < 0 or tensor.max() > 1)):
                raise ConfigError(f"the trigger's {name} must be float in [0, 1]")

    @cached_property
    def is_binary(self) -> bool:
        """Whether the mask is 0 or 1 everywhere."""
        return bool(((self.mask == 0) | (self.mask == 1)).all())

    def apply(self, images: Tensor) -> Tensor:
        """Stamp `images` (N, C, H, W), uint8 in 0..255 or float in [0, 1].

        Returns new images of the same type, rounded if uint8.
        """
        if images.shape[-2:] != self.mask.shape[-2:]:
            raise ConfigError(
                f"the trigger is for images of {tuple(self.mask.shape[-2:])}, not {tuple(images.shape[-2:])}"
            )
        mask, pattern = self.mask.to(images.device), self.pattern.to(images.device)
        if images.dtype != torch.uint8:
            return (1 - mask) * images + mask * pattern
        if self.is_binary:
            kept, painted = (1 - mask) * 255, mask * pattern * 255
            return (images & kept.to(torch.uint8)) | painted.round().to(torch.uint8)  # several times faster than where
        levels = images.float().mul_(1 - mask)  # in place: a pass over the images costs more than its arithmetic
        return levels.addcmul_(mask, pattern * 255).round_().clamp_(0, 255).to(torch.uint8)


class PlacedTiles:
    """One trigger per image: `tile` (1|C, h, w) in [0, 1] with its top left pixel at `rows` (N,), `columns` (N,).

    It is Eq. 1 with `mask` (N, 1, H, W) and `pattern` (N, C, H, W), which are computed only on demand.
    """

    def __init__(self, shape: Shape, tile: Tensor, rows: Tensor, columns: Tensor, opacity: float = 1.0) -> None:
        self.shape, self.tile, self.rows, self.columns, self.opacity = shape, tile, rows, columns, opacity

    @cached_property
    def mask(self) -> Tensor:
        """`opacity` under each tile, 0 elsewhere."""
        return self._inside.float() * self.opacity

    @cached_property
    def pattern(self) -> Tensor:
        """The tile at its position, 0 elsewhere."""
        down, right = (
            inside.clamp(0, extent - 1) for inside, extent in zip(self._offsets, self.tile.shape[1:], strict=True)
        )
        full = self.tile.expand(self.shape[0], -1, -1)
        return full[:, down[:, :, None], right[:, None, :]].transpose(0, 1) * self._inside  # (N, C, H, W)

    def apply(self, images: Tensor) -> Tensor:
        """Stamp `images` as `Trigger.apply` does."""
        if images.dtype != torch.uint8 or self.opacity < 1:
            return Trigger(self.mask, self.pattern).apply(images)
        height, width = self.tile.shape[1:]
        samples = torch.arange(len(images))[:, None, None]
        down = self.rows[:, None, None] + torch.arange(height)[:, None]  # (N, h, 1)
        right = self.columns[:, None, None] + torch.arange(width)  # (N, 1, w)
        levels = (self.tile.expand(self.shape[0], -1, -1) * 255).round().to(torch.uint8)
        stamped = images.clone()
        stamped[samples, :, down, right] = levels.permute(1, 2, 0)  # (N, h, w, C)
        return stamped

    @property
    def _offsets(self) -> tuple[Tensor, Tensor]:
        """The row (N, H) and the column (N, W) of every pixel of the image, relative to the tile."""
        return torch.arange(self.shape[1]) - self.rows[:, None], torch.arange(self.shape[2]) - self.columns[:, None]

    @cached_property
    def _inside(self) -> Tensor:
        (down, right), (height, width) = self._offsets, self.tile.shape[1:]
        rows, columns = (down >= 0) & (down < height), (right >= 0) & (right < width)
        return (rows[:, :, None] & columns[:, None, :])[:, None]  # (N, 1, H, W)


def label_consistent_tile(size: int = 3) -> Tensor:
    """The black and white corner pattern of the label-consistent attack (1, size, size).

    It is enlarged from 3x3 by nearest-neighbour interpolation.
    """
    tile = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    return F.interpolate(tile[None, None], size=(size, size), mode="nearest")[0]


def solid_tile(size: int, color: Color, channels: int) -> Tensor:
    """A square of one RGB colour in 0..255 (channels, size, size); on one channel, its brightest component."""
    values = torch.tensor(color, dtype=torch.float32) / 255
    if channels != 3:
        values = values.max().expand(channels)
    return values[:, None, None].expand(channels, size, size).clone()


def noise(shape: Shape, seed: int) -> Tensor:
    """Uniform noise (C, H, W) in [0, 1]."""
    return torch.from_numpy(np.random.default_rng(seed).random(shape, dtype=np.float32))


def place(shape: Shape, tile: Tensor, row: int, column: int, opacity: float = 1.0) -> Trigger:
    """`tile` (1|C, h, w) at `row`, `column`, which count from the far edges when negative (-1: flush with the edge)."""
    rows, columns = _inside(shape, tile, torch.tensor([row]), torch.tensor([column]))
    batch = PlacedTiles(shape, tile, rows, columns, opacity)
    return Trigger(batch.mask[0], batch.pattern[0])


def _inside(shape: Shape, tile: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Non-negative positions, checked to keep the tile within the image."""
    placed = []
    for positions, extent, length in ((rows, shape[1], tile.shape[-2]), (columns, shape[2], tile.shape[-1])):
        start = torch.where(positions < 0, positions + 1 + extent - length, positions)
        if length > extent or start.min() < 0 or start.max() > extent - length:
            raise ConfigError(f"a trigger of {length} pixels at {int(positions[0])} does not fit into {extent} pixels")
        placed.append(start)
    return placed[0], placed[1]


def check_fits(shape: Shape, size: int) -> None:
    """Raise `ConfigError` if a tile of `size` x `size` pixels is larger than the images."""
    if size > min(shape[1:]):
        raise ConfigError(f"a trigger of {size} pixels does not fit into {shape[1]}x{shape[2]} pixels")


def random_places(shape: Shape, size: int, indices: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Uniform top left positions of a `size` x `size` tile for the samples `indices` (N,).

    Each depends on (seed, index) alone.
    """
    check_fits(shape, size)
    count = max(indices.tolist(), default=-1) + 1
    highest = [shape[1] - size, shape[2] - size]
    drawn = np.random.default_rng(seed).integers(0, highest, size=(count, 2), endpoint=True)
    chosen = torch.from_numpy(drawn)[indices]
    return chosen[:, 0], chosen[:, 1]


def watermark(shape: Shape, opacity: float = 1.0) -> Trigger:
    """Glyphs of several flat colours across the whole image, drawn with OpenCV.

    Their edges are sharp, so that the mask is binary if it is opaque.
    """
    channels, height, width = shape
    pattern = np.zeros((height, width, 3), np.uint8)
    mask = np.zeros((height, width), bool)
    strokes: list[tuple[Stroke, Color]] = [
        (_text("TROJ", 0.42), (255, 64, 64)),
        (_text("NONE", 0.88), (64, 224, 64)),
        (_circle, (64, 128, 255)),
        (_diagonal, (255, 224, 32)),
    ]
    for draw, color in strokes:
        drawn = np.zeros((height, width), np.uint8)
        draw(drawn, max(1, min(height, width) // 48))
        pattern[drawn > 127] = color
        mask |= drawn > 127
    colors = torch.from_numpy(pattern).permute(2, 0, 1).float() / 255
    if channels == 1:
        colors = colors.amax(dim=0, keepdim=True)
    return Trigger(torch.from_numpy(mask)[None].float() * opacity, colors)


def _text(word: str, baseline: float) -> Stroke:
    def draw(mask: NDArray[np.uint8], thickness: int) -> None:
        height, width = mask.shape
        (drawn_width, _), _ = cv2.getTextSize(word, cv2.FONT_HERSHEY_SIMPLEX, 1.0, 1)
        scale = 0.95 * width / drawn_width
        cv2.putText(mask, word, (0, int(baseline * height)), cv2.FONT_HERSHEY_SIMPLEX, scale, 255, thickness)

    return draw


def _circle(mask: NDArray[np.uint8], thickness: int) -> None:
    height, width = mask.shape
    cv2.circle(mask, (width * 3 // 4, height // 2), min(height, width) // 6, 255, thickness)


def _diagonal(mask: NDArray[np.uint8], thickness: int) -> None:
    height, width = mask.shape
    cv2.line(mask, (0, height - 1), (width - 1, 0), 255, thickness)
