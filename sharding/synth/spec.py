"""What one painted slide shall be: every option in one frozen value, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sharding.synth.noise import seed_key, uniform

Subsampling = Literal["4:2:0", "4:4:4"]
Photometric = Literal["ycbcr", "rgb"]

# Goes into truth files and synth.json. Raise it whenever a change alters one painted byte.
PAINT_VERSION = 1
TRUTH_DOWNSAMPLE = 16
MIN_SIZE_PX, MAX_SIZE_PX = 512, 200_000
# A slide painted without spacing still needs cells of some size.
NOMINAL_MPP = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class SlideSpec:
    """One slide to paint. Equal specs give byte-identical files.

    Attributes:
        seed: the seed of the whole set; any integer from 0 to 2**63 - 1.
        index: the slide's number in the set, from 0; with `seed` it decides everything that is drawn by chance.
        width_px: level-0 width.
        height_px: level-0 height.
        mpp: spacing in um/px; None writes neither spacing nor magnification (cells are then drawn for 0.5 um/px).
        tile_px: side of the TIFF's JPEG tiles, 240 or 256.
        subsampling: chroma subsampling of the JPEG tiles.
        photometric: colour space inside the JPEG tiles; "rgb" needs "4:4:4".
        quality: libjpeg quality, 1 to 100.
        pen: draw pen marks.
        hole: leave a hole of glass inside the largest tissue island.
        tumour_target: share of the tissue that is to be tumour, 0 to 0.95; None draws it (every third slide has none).
        bigtiff: None chooses BigTIFF where the file may pass 3.5 GB; True or False force it.
    """

    seed: int = 0
    index: int = 0
    width_px: int = 4096
    height_px: int = 4096
    mpp: float | None = 0.5
    tile_px: int = 256
    subsampling: Subsampling = "4:2:0"
    photometric: Photometric = "ycbcr"
    quality: int = 80
    pen: bool = False
    hole: bool = False
    tumour_target: float | None = None
    bigtiff: bool | None = None

    def __post_init__(self) -> None:
        for name in ("seed", "index"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
                raise ValueError(f"{name} is {value!r}; expected an integer from 0 to 2**63 - 1")
        for name in ("width_px", "height_px"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not MIN_SIZE_PX <= value <= MAX_SIZE_PX:
                raise ValueError(f"{name} is {value!r}; expected an integer from {MIN_SIZE_PX} to {MAX_SIZE_PX}")
        if self.mpp is not None and not (math.isfinite(self.mpp) and 0.1 <= self.mpp <= 2.0):
            raise ValueError(f"mpp is {self.mpp!r}; expected 0.1 to 2.0 um/px, or None for a slide without spacing")
        if self.tile_px not in (240, 256):
            raise ValueError(f"tile is {self.tile_px!r} px; expected 240 or 256")
        if self.subsampling not in ("4:2:0", "4:4:4"):
            raise ValueError(f"subsampling is {self.subsampling!r}; expected '4:2:0' or '4:4:4'")
        if self.photometric not in ("ycbcr", "rgb"):
            raise ValueError(f"photometric is {self.photometric!r}; expected 'ycbcr' or 'rgb'")
        if self.photometric == "rgb" and self.subsampling != "4:4:4":
            raise ValueError("photometric 'rgb' has no chroma to subsample; ask for subsampling '4:4:4' with it")
        if isinstance(self.quality, bool) or not isinstance(self.quality, int) or not 1 <= self.quality <= 100:
            raise ValueError(f"quality is {self.quality!r}; expected an integer from 1 to 100")
        if self.tumour_target is not None and not 0 <= self.tumour_target <= 0.95:
            raise ValueError(f"tumour_target is {self.tumour_target!r}; expected 0 to 0.95")

    @property
    def slide_id(self) -> str:
        return f"synth-{self.index:04d}"

    @property
    def key(self) -> int:
        """The 64-bit number from which everything of this slide is hashed."""
        return seed_key(self.seed, self.index)

    @property
    def px_per_um(self) -> float:
        return 1.0 / (self.mpp if self.mpp is not None else NOMINAL_MPP)

    @property
    def tumour_share_wanted(self) -> float:
        """The share of the tissue that the layout aims at; 0 for every third slide unless `tumour_target` says."""
        if self.tumour_target is not None:
            return self.tumour_target
        # By position and not by chance, so that three slides are enough to have both labels.
        if (self.index + self.seed) % 3 == 2:
            return 0.0
        return 0.15 + 0.65 * uniform(self.key, 1)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
