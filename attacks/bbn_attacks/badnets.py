"""BadNets (Gu et al., 2017): a visible trigger and changed labels, single target or label specific."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field

from backdoor_bench_none.api import DatasetInfo, PlacedTiles, Trigger, TriggerAttack, triggers

if TYPE_CHECKING:
    from torch import Tensor

Level = Annotated[int, Field(ge=0, le=255)]
TriggerKind = Literal["pixel", "static", "dynamic", "watermark", "corner", "label_consistent"]


class BadNets(TriggerAttack):
    """Poisons by stamping and relabelling; the defaults are the paper's per data set (Table 8, sections 8.6 and 8.7).

    Kinds of trigger: `pixel` one pixel bottom right; `static` a square of one colour bottom right; `dynamic` the black
    and white corner pattern of the label-consistent attack at a random position per image, a function of seed and
    index; `watermark` coloured glyphs over the whole image; `corner` a solid square top left; `label_consistent` that
    pattern bottom right. The paper does not give the pixels; these are our choice.
    """

    paper: ClassVar[str] = "arXiv:1708.06733"

    trigger_kind: TriggerKind | None = Field(
        None, description="kind of trigger; default: the paper's for the data set (Table 8)"
    )
    size: int = Field(3, ge=1, le=224, description="side of the patch in pixels; no effect on pixel and watermark")
    opacity: float = Field(1.0, gt=0, le=1, description="value of the mask; below 1 the trigger is blended in")
    color: tuple[Level, Level, Level] | None = Field(
        None, description="RGB in 0..255 of static (default red) and corner (default black)"
    )

    def resolve(self, info: DatasetInfo) -> Self:
        """Fill in the paper's trigger and target."""
        return super().resolve(info).model_copy(update={"trigger_kind": self.trigger_kind or info.paper_trigger})

    def check_trigger(self, info: DatasetInfo) -> None:
        """Check that the patch is no larger than the images."""
        kind = self.trigger_kind or info.paper_trigger
        if kind not in ("pixel", "watermark"):
            triggers.check_fits(info.shape, self.size)

    def trigger(self, info: DatasetInfo) -> Trigger:
        """The trigger at its fixed position; `dynamic` is shown bottom right."""
        shape, channels = info.shape, info.shape[0]
        kind = self.trigger_kind or info.paper_trigger
        if kind == "watermark":
            return triggers.watermark(shape, self.opacity)
        if kind == "pixel":
            return triggers.place(shape, triggers.solid_tile(1, (255, 255, 255), channels), -1, -1, self.opacity)
        if kind == "static":
            tile = triggers.solid_tile(self.size, self.color or (255, 0, 0), channels)
            return triggers.place(shape, tile, -1, -1, self.opacity)
        if kind == "corner":
            return triggers.place(
                shape, triggers.solid_tile(self.size, self.color or (0, 0, 0), channels), 0, 0, self.opacity
            )
        return triggers.place(shape, triggers.label_consistent_tile(self.size), -1, -1, self.opacity)

    def trigger_each(self, info: DatasetInfo, indices: Tensor, seed: int) -> Trigger | PlacedTiles:
        """A separate position for each sample if the trigger is dynamic."""
        if (self.trigger_kind or info.paper_trigger) != "dynamic":
            return self.trigger(info)
        rows, columns = triggers.random_places(info.shape, self.size, indices, seed)
        return triggers.PlacedTiles(info.shape, triggers.label_consistent_tile(self.size), rows, columns, self.opacity)
