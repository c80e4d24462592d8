"""The recipe keys of what a model sees and in which order; ranges are checked by the classes of `engine.data`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from engine.config import Recipe
from engine.data.augment import Augment
from engine.data.ect import Ect
from engine.data.locality import Blocks


def _on_or_off(value: Any) -> Any:
    """`true` is a section as it comes, `false` is none."""
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


class EctRecipe(Recipe):
    """Extended-context translation: windows near the crop's size, resized to it."""

    scale: tuple[float, float] = Field((0.9, 1.1), description="smallest and largest scale of a window")
    aspect: tuple[float, float] = Field((0.95, 1.05), description="smallest and largest width / height")
    scale_is: Literal["area", "side", "patch_area"] = Field(
        "area", description="of the crop's area, of its side, or of the stored patch's area"
    )

    @model_validator(mode="after")
    def _consistent(self) -> EctRecipe:
        self.made()
        return self

    def made(self) -> Ect:
        return Ect(**dict(self))


class AugmentRecipe(Recipe):
    """Changes of a crop's values; the first five are probabilities."""

    jitter: float = Field(0.0, description="probability of brightness, contrast, saturation and hue, all at once")
    grey: float = Field(0.0, description="probability of grey")
    stain: float = Field(0.0, description="probability of other amounts of haematoxylin, eosin and DAB (HED jitter)")
    blur: float = Field(0.0, description="probability of a Gaussian blur")
    solarise: float = Field(0.0, description="probability that the upper half of the values is inverted")
    brightness: float = Field(0.4, description="times 1 - x to 1 + x")
    contrast: float = Field(0.4, description="times 1 - x to 1 + x")
    saturation: float = Field(0.2, description="times 1 - x to 1 + x")
    hue: float = Field(0.1, description="turned by up to x of a full turn")
    stain_sigma: float = Field(0.05, description="each stain times 1 - x to 1 + x, plus up to x of optical density")
    blur_sigma_px: tuple[float, float] = Field((0.1, 2.0), description="smallest and largest sigma")

    @model_validator(mode="after")
    def _consistent(self) -> AugmentRecipe:
        self.made()
        return self

    def made(self) -> Augment:
        return Augment(**dict(self))


class LocalityRecipe(Recipe):
    """An order for storage without fast random reads."""

    block_rows: int = Field(256, description="neighbouring samples that are read together")
    window_blocks: int = Field(64, description="blocks that are shuffled among each other")

    @model_validator(mode="after")
    def _consistent(self) -> LocalityRecipe:
        self.made()
        return self

    def made(self) -> Blocks:
        return Blocks(**dict(self))


EctKeys = Annotated[EctRecipe | None, BeforeValidator(_on_or_off)]
AugmentKeys = Annotated[AugmentRecipe | None, BeforeValidator(_on_or_off)]
LocalityKeys = Annotated[LocalityRecipe | None, BeforeValidator(_on_or_off)]
