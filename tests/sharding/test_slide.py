"""The contract of readers, run over all of them; spacing; and files that are no slides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from sharding.slide import (
    DamagedTileError,
    Level,
    Pixels,
    ReaderName,
    Slide,
    Spacing,
    SpacingError,
    UnreadableSlideError,
    fingerprint,
    make_levels,
    open_slide,
)
from sharding.synth import SlideSpec, paint_slide

# A reader in this table runs the whole contract.
READERS: tuple[ReaderName, ...] = ("cucim", "openslide")
PAINTED = ("plain", "rgb", "fine", "odd", "single", "unspaced")
every_reader = pytest.mark.parametrize("reader", ["auto", *READERS])


@every_reader
@pytest.mark.parametrize("name", PAINTED)
def test_levels_are_those_of_the_file_finest_first(reader: Any, name: str, slides: Any, decoded: Any) -> None:
    expected = make_levels([(a.shape[1], a.shape[0]) for a in decoded(slides[name])])
    with open_slide(slides[name], reader) as slide:
        assert slide.levels == expected
        assert slide.reader_name == ("libjpeg" if reader == "auto" else reader)
    assert expected[0].downsample_x == expected[0].downsample_y == 1.0


@every_reader
@pytest.mark.parametrize("name", PAINTED)
def test_pixels_of_level_0_equal_an_independent_decode(reader: Any, name: str, slides: Any, decoded: Any) -> None:
    picture = decoded(slides[name])[0]
    height, width, _ = picture.shape
    rectangles = [
        (0, 0, 256, 256),
        (100, 37, 301, 203),
        (width - 64, height - 64, 64, 64),
        (width - 1, height - 1, 1, 1),
        (255, 239, 3, 3),
        (0, 0, width, height),
    ]
    with open_slide(slides[name], reader) as slide:
        for x, y, w, h in rectangles:
            pixels = slide.read(0, x, y, w, h)
            assert pixels.dtype == np.uint8
            assert pixels.flags.c_contiguous
            assert np.array_equal(pixels, picture[y : y + h, x : x + w]), (x, y, w, h)


@every_reader
@pytest.mark.parametrize("name", ["plain", "rgb", "fine"])
def test_pixels_of_upper_levels_equal_an_independent_decode(reader: Any, name: str, slides: Any, decoded: Any) -> None:
    for level, picture in enumerate(decoded(slides[name])[1:], start=1):
        height, width, _ = picture.shape
        with open_slide(slides[name], reader) as slide:
            for x, y in ((0, 0), (1, 0), (17, 33), (width - 64, height - 64), (101, 127)):
                assert np.array_equal(slide.read(level, x, y, 64, 64), picture[y : y + 64, x : x + 64]), (x, y)


def test_cucim_hits_the_pixel_on_levels_whose_downsamples_differ_between_the_axes(slides: Any, decoded: Any) -> None:
    """cuCIM divides by the mean of both axes' downsamples; OpenSlide interpolates there, so it cannot be compared."""
    pictures = decoded(slides["odd"])
    assert len(pictures) > 1
    with open_slide(slides["odd"], "cucim") as slide:
        assert slide.levels[1].downsample_x != slide.levels[1].downsample_y
        for level, picture in enumerate(pictures):
            height, width, _ = picture.shape
            side = min(32, height)
            wrong = [
                (x, y)
                for x in range(0, width - side + 1, 7)
                for y in {0, (height - side) // 2, height - side}
                if not np.array_equal(slide.read(level, x, y, side, side), picture[y : y + side, x : x + side])
            ]
            assert wrong == [], level
            assert np.array_equal(slide.read(level, width - 1, height - 1, 1, 1), picture[-1:, -1:]), level
            assert np.array_equal(slide.read(level, 0, 0, width, height), picture), level


@every_reader
def test_outside_the_slide_it_is_white(reader: Any, slides: Any, decoded: Any) -> None:
    with open_slide(slides["single"], reader) as slide:
        picture = decoded(slides["single"])[0]
        corner = slide.read(0, -10, -20, 50, 60)
        assert np.array_equal(corner[20:, 10:], picture[:40, :40])
        assert corner[:20].min() == 255
        assert corner[:, :10].min() == 255
        corner = slide.read(0, 1000 - 30, 900 - 20, 64, 64)
        assert np.array_equal(corner[:20, :30], picture[-20:, -30:])
        assert corner[20:].min() == 255
        assert corner[:, 30:].min() == 255
        for x, y in ((-64, 0), (1000, 0), (0, 900), (0, -64), (10**6, 10**6)):
            assert np.array_equal(slide.read(0, x, y, 64, 64), np.full((64, 64, 3), 255, np.uint8))


@every_reader
@pytest.mark.parametrize(("name", "mpp"), [("plain", 0.5), ("fine", 0.25), ("odd", 0.2527), ("unspaced", None)])
def test_the_spacing_is_what_the_file_says(reader: Any, name: str, mpp: float | None, slides: Any) -> None:
    with open_slide(slides[name], reader) as slide:
        spacing = slide.spacing()
        assert (spacing and (spacing.x_um, spacing.y_um)) == (mpp and (mpp, mpp))
        stated = slide.spacing(0.31)
        assert stated == Spacing(0.31, 0.31, "override")


def generic_tiff(path: Path, *, per_cm: tuple[float, float] | None, description: str = "", **options: Any) -> Path:
    picture = np.full((512, 512, 3), 200, np.uint8)
    tifffile.imwrite(
        path,
        picture,
        tile=(256, 256),
        photometric="rgb",
        description=description,
        metadata=None,
        resolution=per_cm,
        resolutionunit=None if per_cm is None else "CENTIMETER",
        **{"compression": "jpeg", **options},
    )
    return path


@every_reader
def test_a_generic_tiff_states_its_spacing_by_its_resolution(reader: Any, tmp_path: Path) -> None:
    path = generic_tiff(tmp_path / "a.tif", per_cm=(20_000, 20_000))
    with open_slide(path, reader) as slide:
        spacing = slide.spacing()
        assert spacing is not None
        assert (spacing.x_um, spacing.y_um) == pytest.approx((0.5, 0.5))


@every_reader
def test_a_writers_default_resolution_is_no_spacing(reader: Any, tmp_path: Path) -> None:
    with open_slide(generic_tiff(tmp_path / "none.tif", per_cm=None), reader) as slide:
        assert slide.spacing() is None
    # 72 dpi
    with (
        open_slide(generic_tiff(tmp_path / "dpi.tif", per_cm=(28.346, 28.346)), reader) as slide,
        pytest.raises(SpacingError, match=r"352\.\d+ x 352\.\d+ um/px .* is implausible .*column `mpp`"),
    ):
        slide.spacing()


def test_the_resolution_of_an_aperio_file_without_mpp_is_not_believed(tmp_path: Path) -> None:
    description = "Aperio Image Library v12\r\n512x512 (256x256) JPEG/RGB Q=80|AppMag = 40"
    path = generic_tiff(tmp_path / "a.svs", per_cm=(20_000, 20_000), description=description)
    with open_slide(path, "cucim") as slide:
        assert slide.spacing() is None


class Fake:
    """A reader of one white level with any spacing."""

    name = "fake"
    levels: tuple[Level, ...] = make_levels([(100, 100)])

    def __init__(self, spacing: Spacing | None) -> None:
        self.spacing = spacing

    def read(self, level: int, x_px: int, y_px: int, width_px: int, height_px: int) -> Pixels:
        return np.full((height_px, width_px, 3), 255, np.uint8)

    def close(self) -> None:
        pass


@pytest.mark.parametrize("um", [0.0, -0.5, 0.01, 51.0, float("nan"), float("inf")])
def test_an_implausible_spacing_is_an_error_and_an_override_mends_it(um: float) -> None:
    slide = Slide(Path("x"), Fake(Spacing(um, um, "test")), None)
    with pytest.raises(SpacingError, match="implausible"):
        slide.spacing()
    assert slide.spacing(0.5) == Spacing(0.5, 0.5, "override")
    with pytest.raises(SpacingError, match="implausible"):
        slide.spacing(um)


def test_pixels_that_are_not_square_are_an_error() -> None:
    assert Slide(Path("x"), Fake(Spacing(0.2525, 0.2531, "test")), None).spacing() is not None
    with pytest.raises(SpacingError, match=r"not square \(0\.25 x 0\.5 um"):
        Slide(Path("x"), Fake(Spacing(0.25, 0.5, "test")), None).spacing()


@every_reader
@pytest.mark.parametrize("how", ["zeroed", "random", "scrambled scan", "no SOI", "claims 128 px", "no bytes"])
def test_a_damaged_tile_is_an_error_and_its_neighbours_stay_readable(
    reader: Any, how: str, slides: Any, decoded: Any, damage_tile: Callable[..., Path], tmp_path: Path
) -> None:
    picture = decoded(slides["plain"])[0]
    path = damage_tile(slides["plain"], tmp_path / "bad.svs", 0, 1, 2, how)
    with open_slide(path, reader) as slide:
        before = slide.read(0, 0, 0, 256, 512)
        assert np.array_equal(before, picture[:512, :256])
        for _ in range(2):
            for x, y, side in ((256, 512, 256), (500, 500, 24), (511, 767, 1), (0, 0, 1024)):
                with pytest.raises(DamagedTileError):
                    slide.read(0, x, y, side, side)
            # Every other pixel can still be read, by the same handle.
            for x, y, w, h in ((0, 0, 1024, 512), (0, 768, 1024, 256), (0, 512, 256, 256), (512, 512, 512, 256)):
                assert np.array_equal(slide.read(0, x, y, w, h), picture[y : y + h, x : x + w])
        # OpenSlide blanks an empty tile's place on the levels above too; there an error is right as well.
        with suppress(DamagedTileError) if (reader, how) == ("openslide", "no bytes") else nullcontext():
            assert np.array_equal(slide.read(1, 0, 0, 256, 256), decoded(slides["plain"])[1])


@every_reader
def test_damage_in_an_upper_level_stays_there(
    reader: Any, slides: Any, decoded: Any, damage_tile: Callable[..., Path], tmp_path: Path
) -> None:
    path = damage_tile(slides["plain"], tmp_path / "bad.svs", 1, 0, 0, "zeroed")
    with open_slide(path, reader) as slide:
        with pytest.raises(DamagedTileError):
            slide.read(1, 10, 10, 20, 20)
        assert np.array_equal(slide.read(0, 0, 0, 1024, 1024), decoded(slides["plain"])[0])


def test_the_error_names_the_tile_and_says_what_was_found(
    slides: Any, damage_tile: Callable[..., Path], tmp_path: Path
) -> None:
    path = damage_tile(slides["plain"], tmp_path / "bad.svs", 0, 3, 1, "no SOI")
    with (
        open_slide(path) as slide,
        pytest.raises(DamagedTileError, match=r"TIFF tile \(3, 1\) of level 0 .*starts with 0000"),
    ):
        slide.read(0, 1000, 300, 10, 10)


def is_one_line(text: str) -> bool:
    return bool(text) and text.isprintable()


def test_files_that_are_no_slides_are_refused_with_a_reason(
    slides: Any, open_elsewhere: Callable[..., dict[str, dict[str, Any]]], tmp_path: Path
) -> None:
    whole = slides["plain"].read_bytes()
    Image.new("RGB", (300, 300), (200, 100, 150)).save(tmp_path / "picture.png")
    contents = {
        "text.svs": b"this is no slide\n" * 100,
        "empty.svs": b"",
        "picture.svs": (tmp_path / "picture.png").read_bytes(),
        "one-byte.tif": b"I",
        "header-only.svs": whole[:8],
        "cut-in-the-tags.svs": whole[:100],
        "noise.svs": np.random.default_rng(0).bytes(10_000),
        "tiff-then-noise.svs": whole[:8] + np.random.default_rng(0).bytes(10_000),
    }
    paths = [tmp_path / name for name in contents]
    for path in paths:
        path.write_bytes(contents[path.name])
    for reader in ("auto", *READERS):
        answers = open_elsewhere([*paths, tmp_path / "absent.svs", tmp_path], reader)
        assert len(answers) == len(paths) + 2
        for name, answer in answers.items():
            assert not answer["opened"], name
            assert answer["kind"] == "UnreadableSlideError", (name, answer)
            assert is_one_line(answer["error"]), (name, answer)


def test_a_chain_of_pages_that_runs_in_a_circle_is_refused_and_not_followed_for_ever(
    slides: Any, open_elsewhere: Callable[..., dict[str, dict[str, Any]]], tmp_path: Path
) -> None:
    with tifffile.TiffFile(slides["plain"]) as tiff:
        pages: Any = tiff.pages
        next_at = pages[-1].offset + 2 + 12 * len(pages[-1].tags)
        first = pages[0].offset
    data = bytearray(slides["plain"].read_bytes())
    assert data[next_at : next_at + 4] == bytes(4)
    data[next_at : next_at + 4] = first.to_bytes(4, "little")
    path = tmp_path / "circle.svs"
    path.write_bytes(data)
    for reader in ("openslide", "cucim", "auto"):
        answer = open_elsewhere([path], reader)[path.name]
        assert answer["kind"] in ("", "UnreadableSlideError")
        assert answer["opened"] or is_one_line(answer["error"])


def test_a_slide_cut_short_gives_a_reason_or_its_own_pixels(
    slides: Any, decoded: Any, open_elsewhere: Callable[..., dict[str, dict[str, Any]]], tmp_path: Path
) -> None:
    for source in ("plain", "single"):
        whole = slides[source].read_bytes()
        cuts = [len(whole) * percent // 100 for percent in (2, 10, 25, 50, 75, 90, 99)] + [len(whole) - 1]
        paths = [tmp_path / f"{source}-{cut}.svs" for cut in cuts]
        for path, cut in zip(paths, cuts, strict=True):
            path.write_bytes(whole[:cut])
        picture = decoded(slides[source])[0]
        for reader in READERS:
            answers = open_elsewhere(paths, reader)
            assert len(answers) == len(paths)
            for path in paths:
                answer = answers[path.name]
                assert answer["kind"] in ("", "UnreadableSlideError", "DamagedTileError")
                assert answer["opened"] or is_one_line(answer["error"])
                if answer["kind"] == "UnreadableSlideError":
                    continue
                # The process above has shown that this neither crashes nor hangs.
                with open_slide(path, reader) as slide:
                    assert_own_pixels_or_damage(slide, picture)


def assert_own_pixels_or_damage(slide: Slide, picture: Pixels) -> None:
    for y in range(0, picture.shape[0], 256):
        for x in range(0, picture.shape[1], 256):
            expected = picture[y : y + 256, x : x + 256]
            try:
                pixels = slide.read(0, x, y, expected.shape[1], expected.shape[0])
            except DamagedTileError:
                continue
            assert np.array_equal(pixels, expected), (x, y)


def test_the_broken_files_of_other_projects_are_refused_with_a_reason(
    shared: Path, open_elsewhere: Callable[[Sequence[Path], str], dict[str, dict[str, Any]]]
) -> None:
    paths = sorted((shared / "slides" / "negative").iterdir())
    for reader in ("auto", *READERS):
        answers = open_elsewhere(paths, reader)
        assert len(answers) == len(paths)
        for name, answer in answers.items():
            assert answer["opened"] or is_one_line(answer["error"]), (name, answer)
        for name in ("histolab_broken.svs", "openslide_unopenable.tiff", "openslide_unreadable.svs"):
            assert not answers[name]["opened"], name


def test_a_real_slide_reads_alike_in_both_readers(shared: Path, decoded: Any) -> None:
    path = shared / "slides" / "CMU-1-Small-Region.svs"
    picture = decoded(path)[0]
    for reader in READERS:
        with open_slide(path, reader) as slide:
            spacing = slide.spacing()
            assert spacing is not None
            assert (spacing.x_um, spacing.y_um) == (0.499, 0.499)
            assert [(level.width_px, level.height_px) for level in slide.levels] == [(2220, 2967)]
            assert np.array_equal(slide.read(0, 0, 0, 2220, 2967), picture)


def test_auto_decodes_tiles_itself_and_takes_openslide_for_the_rest(slides: Any, tmp_path: Path) -> None:
    with open_slide(slides["plain"]) as slide:
        assert slide.reader_name == "libjpeg"
    path = generic_tiff(tmp_path / "a.tif", per_cm=None, compression="packbits")
    with open_slide(path) as slide:
        assert slide.reader_name == "openslide"
    with pytest.raises(UnreadableSlideError, match="cucim: there is no strict decoder for its tiles"):
        open_slide(path, "cucim")


def test_a_reader_that_was_named_never_falls_back(tmp_path: Path) -> None:
    path = tmp_path / "text.svs"
    path.write_text("no slide")
    with pytest.raises(UnreadableSlideError) as caught:
        open_slide(path, "openslide")
    assert "cucim" not in str(caught.value)
    with pytest.raises(UnreadableSlideError, match=r"cucim: .*; openslide: "):
        open_slide(path, "auto")


def test_an_error_of_reading_a_fingerprint_names_the_file() -> None:
    with pytest.raises(OSError, match="/proc/self/mem"):
        fingerprint(Path("/proc/self/mem"))


def test_the_fingerprint_knows_length_head_and_tail_and_nothing_else(tmp_path: Path) -> None:
    mib = 1 << 20
    data = bytearray(np.random.default_rng(0).bytes(3 * mib))
    path = tmp_path / "a.svs"

    def mark() -> str:
        path.write_bytes(data)
        return fingerprint(path)

    first = mark()
    assert first.startswith(f"{3 * mib}-")
    copy = tmp_path / "b.svs"
    copy.write_bytes(data)
    assert fingerprint(copy) == first
    for place, known in ((0, True), (mib - 1, True), (mib, False), (2 * mib - 1, False), (2 * mib, True), (-1, True)):
        data[place] ^= 1
        assert (mark() != first) == known, place
        data[place] ^= 1
    # Between one and two MiB head and tail meet without a gap.
    short = bytearray(data[: mib + 100])
    path.write_bytes(short)
    marks = {fingerprint(path)}
    for place in (mib - 1, mib, mib + 99):
        short[place] ^= 1
        path.write_bytes(short)
        marks.add(fingerprint(path))
    assert len(marks) == 4


def test_other_spacings_of_a_repainted_slide_are_read(tmp_path: Path) -> None:
    paint_slide(replace(SlideSpec(width_px=512, height_px=512), mpp=0.2527), tmp_path)
    for reader in READERS:
        with open_slide(tmp_path / "synth-0000.svs", reader) as slide:
            spacing = slide.spacing()
            assert spacing is not None
            assert spacing.x_um == 0.2527
