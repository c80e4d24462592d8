"""A slide, opened: its levels, its spacing and where that came from, and checked reads of its pixels.

The one place that chooses a reader. Coordinates are (x, y); pixels are uint8 RGB arrays (H, W, 3).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from sharding.atomic import naming
from sharding.jpeg import NotCopyableError, TileHeader
from sharding.tiff_tiles import TiffTiles, TileCopy, TileDefectError

ReaderName = Literal["auto", "cucim", "openslide"]
Pixels = npt.NDArray[np.uint8]

# Spacings outside this range are what a TIFF writer puts there for want of one (72 dpi is 353 um/px).
PLAUSIBLE_MPP = (0.02, 50.0)
# Real slides say 0.2525 x 0.2531; more than this between the axes and a patch would be distorted.
ANISOTROPY_TOLERANCE = 0.05
_DICOM_HEAD_BYTES = 1 << 18
_SERIES_INSTANCE_UID = b"\x20\x00\x0e\x00UI"  # tag (0020,000E) in explicit little-endian, the VR, then a length
_FINGERPRINT_BYTES = 1 << 20


_VERSIONED = (
    "pathology-engine",
    "cucim-cu12",
    "cucim-cu13",
    "openslide-python",
    "openslide-bin",
    "simplejpeg",
    "imagecodecs",
    "tifffile",
    "numpy",
    "scipy",
    "scikit-image",
    "pillow",
    "pyarrow",
)


class SlideError(ValueError):
    """A slide that cannot be used as it is; the message is one sentence that says why."""


class UnreadableSlideError(SlideError):
    """No reader opens the slide."""


class SpacingError(SlideError):
    """The slide's spacing is missing, implausible, anisotropic or too coarse for what was asked."""


class DamagedTileError(SlideError):
    """A TIFF tile under the asked-for pixels does not decode."""


@dataclass(frozen=True, slots=True)
class Level:
    """One level of the pyramid. `downsample_x/y` are the true ratios to level 0 and need not be integers."""

    width_px: int
    height_px: int
    downsample_x: float
    downsample_y: float


@dataclass(frozen=True, slots=True)
class Spacing:
    """Spacing of level 0 in um/px per axis, and its source: `aperio`, `openslide`, `tiff-resolution`."""

    x_um: float
    y_um: float
    source: str


@dataclass(frozen=True, slots=True)
class RawTiles:
    """A level's JPEG tiles as they lie in the file; uint64 [tiles] in raster order, `columns` tiles a row."""

    header: TileHeader
    columns: int
    offsets: npt.NDArray[np.uint64]
    lengths: npt.NDArray[np.uint64]


class Reader(Protocol):
    """What a backend offers. It reads inside a level's bounds only and raises on any pixel it cannot vouch for."""

    name: str
    levels: tuple[Level, ...]
    spacing: Spacing | None

    def read(self, level: int, x_px: int, y_px: int, width_px: int, height_px: int) -> Pixels:
        """uint8 [height_px, width_px, 3]; x_px, y_px in pixels of `level`."""

    def close(self) -> None: ...


def make_levels(sizes_px: list[tuple[int, int]]) -> tuple[Level, ...]:
    """Levels from their (width, height) in pixels, finest first."""
    width0, height0 = sizes_px[0]
    return tuple(Level(w, h, width0 / w, height0 / h) for w, h in sizes_px)


def fingerprint(path: Path) -> str:
    """`size-hash` of a slide file: its length and a hash of its first and last MiB. No time, no name, no path."""
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with naming(path), open(path, "rb") as file:
        digest.update(file.read(_FINGERPRINT_BYTES))
        if size > _FINGERPRINT_BYTES:
            file.seek(max(_FINGERPRINT_BYTES, size - _FINGERPRINT_BYTES))
            digest.update(file.read())
    return f"{size}-{digest.hexdigest()}"


def dicom_series(path: Path) -> str | None:
    """The SeriesInstanceUID of a DICOM file, None for any other file.

    A DICOM slide is several files, one series; each of them opens as the whole slide.
    """
    with open(path, "rb") as file:
        head = file.read(_DICOM_HEAD_BYTES)
    at = head.find(_SERIES_INSTANCE_UID) if head[128:132] == b"DICM" else -1
    if at < 0:
        return None
    start = at + len(_SERIES_INSTANCE_UID) + 2
    length = int.from_bytes(head[start - 2 : start], "little")
    return head[start : start + length].rstrip(b"\0 ").decode("ascii", errors="replace")


class Slide:
    """An open slide. Every pixel of a tiled TIFF that it returns comes from data that a strict decoder accepted.

    `tiles` proves the TIFF's tiles before `reader` reads them; with `decodes_tiles` their pixels are taken from that
    proof, and the reader serves only JPEG tiles that cannot be decoded by themselves. Without `tiles` (other
    compressions and formats) OpenSlide's own errors are all the proof there is.
    """

    def __init__(self, path: Path, reader: Reader, tiles: TiffTiles | None, *, decodes_tiles: bool = False) -> None:
        self._decodes_tiles = decodes_tiles and tiles is not None
        self.path = path
        self.levels = reader.levels
        self._reader = reader
        self._tiles = tiles

    @property
    def reader_name(self) -> str:
        """Who gives the pixels: a strict decoder of the TIFF's own tiles (tiff_tiles.Codec), `cucim` or `openslide`."""
        if self._decodes_tiles:
            assert self._tiles is not None
            return self._tiles.codec(0)
        return self._reader.name

    def copies_tiles(self, level: int, size_px: int) -> bool:
        """Whether the level's TIFF tiles are JPEG of size_px x size_px, so that a patch on their grid can be copied."""
        tiles = self._tiles
        return tiles is not None and tiles.codec(level) == "libjpeg" and tiles.tile_size(level) == (size_px, size_px)

    def copy_tile(self, level: int, column: int, row: int, *, pixels: bool = False) -> TileCopy | None:
        """TIFF tile (column, row) as a JPEG stream of its own, losslessly; None where it decodes but cannot be copied.

        With `pixels` what it decodes to is given too.

        Raises DamagedTileError where it does not decode.
        """
        assert self._tiles is not None
        try:
            return self._tiles.copy(level, column, row, pixels=pixels)
        except NotCopyableError:
            return None
        except TileDefectError as error:
            raise DamagedTileError(f"TIFF tile ({column}, {row}) of level {level} {error}") from None

    def raw_tiles(self, level: int) -> RawTiles | None:
        """Where the level's TIFF tiles lie, unread and unproven; None where they cannot stand alone as JPEG."""
        header = self._tiles.header(level) if self._tiles is not None else None
        if self._tiles is None or header is None:
            return None
        columns = -(-self.levels[level].width_px // self._tiles.tile_size(level)[0])
        return RawTiles(header, columns, *self._tiles.ranges(level))

    def spacing(self, override_mpp: float | None = None) -> Spacing | None:
        """Spacing of level 0, or None where neither the slide nor the user states one.

        Raises SpacingError where what is stated is implausible or anisotropic.
        """
        if override_mpp is not None:
            spacing: Spacing | None = Spacing(override_mpp, override_mpp, "override")
        else:
            spacing = self._reader.spacing
        if spacing is None:
            return None
        low, high = PLAUSIBLE_MPP
        if not (low <= spacing.x_um <= high and low <= spacing.y_um <= high):
            raise SpacingError(
                f"the spacing {spacing.x_um:g} x {spacing.y_um:g} um/px ({spacing.source}) is implausible "
                f"(expected {low:g} to {high:g}); state the right one in the column `mpp` of a slide list"
            )
        if abs(spacing.x_um / spacing.y_um - 1) > ANISOTROPY_TOLERANCE:
            raise SpacingError(
                f"the pixels are not square ({spacing.x_um:g} x {spacing.y_um:g} um, {spacing.source}); "
                "a patch would be distorted"
            )
        return spacing

    def read(
        self,
        level: int,
        x_px: int,
        y_px: int,
        width_px: int,
        height_px: int,
        *,
        factor: int = 1,
        overlapping: bool = True,
    ) -> Pixels:
        """Pixels of a rectangle of `level`, reduced `factor` times: uint8 [height_px // factor, width_px // factor, 3].

        Without `overlapping` the caller's rectangles are disjoint, and less is kept between them.
        The rectangle's sides are multiples of `factor`. Outside the slide it is white. A reduced pixel is the exact
        mean of factor x factor pixels, rounded half up; of JPEG tiles that are decoded here it is what libjpeg's scaled
        decode gives (factor 2, 4 or 8), wherever tiles, rectangle and the slide's own edge are aligned with `factor`.

        Raises DamagedTileError where a TIFF tile under the rectangle does not decode strictly.
        """
        size = self.levels[level]
        right, bottom = x_px + width_px, y_px + height_px
        x1, y1, x2, y2 = max(x_px, 0), max(y_px, 0), min(right, size.width_px), min(bottom, size.height_px)
        if x2 <= x1 or y2 <= y1:
            return np.full((height_px // factor, width_px // factor, 3), 255, np.uint8)
        aligned = not (x_px % factor or y_px % factor or x2 % factor or y2 % factor)
        pixels = self._pixels(level, x1, y1, x2, y2, factor, overlapping) if aligned else None
        if pixels is None:
            whole = self.read(level, x_px, y_px, width_px, height_px)
            return np.asarray(Image.fromarray(whole).reduce(factor))
        if (x1, y1, x2, y2) == (x_px, y_px, right, bottom):
            return pixels
        canvas = np.full((height_px // factor, width_px // factor, 3), 255, np.uint8)
        x, y = (x1 - x_px) // factor, (y1 - y_px) // factor
        canvas[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
        return canvas

    def _pixels(self, level: int, x1: int, y1: int, x2: int, y2: int, factor: int, overlapping: bool) -> Pixels | None:
        """The rectangle, inside the level; None where a factor above 1 takes the mean of all its pixels."""
        tiles = self._tiles
        if factor > 1 and not (tiles and self._decodes_tiles and tiles.scales(level, factor)):
            return None
        # Absent tiles are background; what a reader gives for them is not to be relied on.
        if tiles and (self._decodes_tiles or self._has_absent(level, x1, y1, x2, y2)):
            try:
                return tiles.read(level, x1, y1, x2, y2, factor=factor, overlapping=overlapping)
            except TileDefectError as error:
                raise DamagedTileError(str(error)) from None
            except NotCopyableError:  # a tile that needs the reader: another colour space, progressive, ...
                if factor > 1:
                    return None
        self._prove(level, x1, y1, x2, y2)
        return self._reader.read(level, x1, y1, x2 - x1, y2 - y1)

    def _has_absent(self, level: int, x1: int, y1: int, x2: int, y2: int) -> bool:
        tiles = self._tiles
        assert tiles is not None
        return any(tiles.is_absent(level, column, row) for column, row in tiles.covering(level, x1, y1, x2, y2))

    def _prove(self, level: int, x1: int, y1: int, x2: int, y2: int) -> None:
        if self._tiles is None:
            return
        for column, row in self._tiles.covering(level, x1, y1, x2, y2):
            reason = self._tiles.defect(level, column, row)
            if reason:
                raise DamagedTileError(f"TIFF tile ({column}, {row}) of level {level} {reason}")

    def close(self) -> None:
        self._reader.close()
        if self._tiles is not None:
            self._tiles.close()

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_slide(path: Path, reader: ReaderName = "auto") -> Slide:
    """Open a slide with the named reader, or with the first that opens it.

    With "auto" the pixels of tiled TIFF come from a strict decode of the tiles themselves (TiffTiles), which is check
    and pixels in one; the reader gives levels and spacing. A named reader reads the pixels too, after the same proof:
    cuCIM returns stale pixels for a tile that does not decode. It opens no file that is known to crash it, and none
    whose tiles cannot be proven; OpenSlide reads the rest, and raises by itself.

    Raises UnreadableSlideError with each reader's own reason.
    """
    if not path.is_file():
        raise UnreadableSlideError(f"{path} is not a file")
    if path.stat().st_size == 0:
        raise UnreadableSlideError("the file is empty")
    names = ["cucim", "openslide"] if reader == "auto" else [reader]
    reasons = []
    for name in names:
        try:
            opened, tiles = _open_cucim(path, named=reader == "cucim") if name == "cucim" else _open_openslide(path)
            return Slide(path, opened, tiles, decodes_tiles=reader == "auto")
        except UnreadableSlideError as error:
            reasons.append(f"{name}: {error}")
    raise UnreadableSlideError("no reader opens it (" + "; ".join(reasons) + ")")


def _open_cucim(path: Path, *, named: bool) -> tuple[Reader, TiffTiles | None]:
    tiles = TiffTiles.open(path)
    if isinstance(tiles, str):
        raise UnreadableSlideError(tiles)
    try:
        from sharding.readers.cucim_reader import CucimReader, refusal

        reason = refusal(tiles.compression, tiles.predicted, pixels=named)
        if reason:
            raise UnreadableSlideError(reason)
        reader = CucimReader(path, description=tiles.description, resolution_um=tiles.resolution_um)
    except ImportError as error:
        tiles.close()
        raise UnreadableSlideError(f"not installed ({error})") from None
    except Exception as error:
        tiles.close()
        raise UnreadableSlideError(_one_line(error)) from None
    sizes = [(level.width_px, level.height_px) for level in reader.levels]
    if not tiles.match_levels(sizes):
        reader.close()
        tiles.close()
        raise UnreadableSlideError("its levels are not all TIFF pages whose tiles can be proven")
    return reader, tiles


def _open_openslide(path: Path) -> tuple[Reader, TiffTiles | None]:
    try:
        from sharding.readers.openslide_reader import OpenSlideReader

        reader = OpenSlideReader(path)
    except ImportError as error:
        raise UnreadableSlideError(f"not installed ({error})") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise UnreadableSlideError(_one_line(error)) from None
    except Exception as error:
        if type(error).__module__.startswith("openslide"):
            raise UnreadableSlideError(_one_line(error)) from None
        raise
    # OpenSlide takes an empty tile for background and says nothing; where the tiles can be proven, they are.
    tiles = TiffTiles.open(path)
    if isinstance(tiles, TiffTiles) and not tiles.match_levels([(lv.width_px, lv.height_px) for lv in reader.levels]):
        tiles.close()
        tiles = ""
    return reader, tiles if isinstance(tiles, TiffTiles) else None


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text.rstrip(".!")


def environment_versions() -> dict[str, str]:
    """Versions of the libraries that decide which bytes a dataset holds."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in _VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found
