"""Painted slides: readable as Aperio by both readers, true to their truth, and the same bytes every time."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image
from skimage.filters import threshold_otsu

from engine import synth
from sharding.synth import SlideSpec, paint_slide
from sharding.synth.cohort import label_rows, patient_number
from sharding.synth.layout import NODE_PX, Layout
from sharding.synth.texture import Painter

Pixels = NDArray[np.uint8]


def read_openslide(path: Path, level: int = 0) -> Pixels:
    import openslide

    with openslide.OpenSlide(path) as slide:
        return np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]))[..., :3]


def read_cucim(path: Path, level: int = 0) -> Pixels:
    from cucim.clara import CuImage

    with CuImage(str(path)) as slide:
        size = slide.resolutions["level_dimensions"][level]
        return np.asarray(slide.read_region((0, 0), size, level))


def box_means(picture: Pixels, scale: int) -> NDArray[np.float64]:
    h, w = picture.shape[0] // scale, picture.shape[1] // scale
    return picture[: h * scale, : w * scale].reshape(h, scale, w, scale, 3).mean(axis=(1, 3))


def truth_of(out: Path, slide_id: str) -> tuple[Pixels, Pixels]:
    """(tissue, class), each (ceil(height / 16), ceil(width / 16)) uint8."""
    tissue, classes = (Image.open(out / "truth" / f"{slide_id}_{name}.png") for name in ("tissue", "class"))
    with tissue, classes:
        return np.asarray(tissue), np.asarray(classes)


def digests(out: Path) -> dict[str, str]:
    files = sorted(p for p in out.rglob("*") if p.is_file())
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four slides of 4100 px, a size that is a multiple of nothing, with the default options."""
    out = tmp_path_factory.mktemp("synth") / "out"
    synth.run(out, slides=4, size=4100, seed=5, workers=1)
    return out


SMALL = SlideSpec(width_px=1100, height_px=1300, quality=95)
VARIANTS = [
    replace(spec, tile_px=tile_px)
    for spec in (SMALL, replace(SMALL, subsampling="4:4:4"), replace(SMALL, subsampling="4:4:4", photometric="rgb"))
    for tile_px in (240, 256)
]


def test_both_readers_see_an_aperio_slide_with_its_spacing_and_levels(painted: Path) -> None:
    import openslide
    from cucim.clara import CuImage

    path = painted / "synth-0000.svs"
    dimensions = ((4100, 4100), (1025, 1025), (256, 256))
    with openslide.OpenSlide(path) as slide:
        assert slide.properties["openslide.vendor"] == "aperio"
        assert float(slide.properties["openslide.mpp-x"]) == 0.5
        assert slide.properties["openslide.objective-power"] == "20"
        assert slide.level_dimensions == dimensions
        assert not slide.associated_images
    with CuImage(str(path)) as slide:
        assert slide.metadata["aperio"]["MPP"] == "0.5"
        assert slide.metadata["aperio"]["AppMag"] == "20"
        assert slide.resolutions["level_dimensions"] == dimensions


def test_upper_levels_are_box_means(painted: Path) -> None:
    path = painted / "synth-0000.svs"
    whole = read_openslide(path)
    for level, scale in ((1, 4), (2, 16)):
        picture = read_openslide(path, level)
        assert np.array_equal(picture, read_cucim(path, level))
        difference = np.abs(picture - box_means(whole, scale))
        # 4:2:0 at quality 80 blurs the colour of single nuclei; a shift by one pixel would give twice this mean.
        assert difference.mean() < 4
        assert abs((picture - box_means(whole, scale)).mean()) < 0.3


@pytest.mark.parametrize("spec", VARIANTS, ids=lambda s: f"{s.subsampling}-{s.photometric}-{s.tile_px}")
def test_every_tile_format_reads_alike_in_both_readers(spec: SlideSpec, tmp_path: Path) -> None:
    paint_slide(spec, tmp_path)
    path = tmp_path / "synth-0000.svs"
    whole = read_openslide(path)
    assert whole.shape == (1300, 1100, 3)
    assert np.array_equal(whole, read_cucim(path))
    limit = 3.0 if spec.subsampling == "4:2:0" else 1.5
    assert np.abs(read_openslide(path, 1) - box_means(whole, 4)).mean() < limit

    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        assert page.tags["PhotometricInterpretation"].value == (2 if spec.photometric == "rgb" else 6)
        assert page.tags["YCbCrSubSampling"].value == ((2, 2) if spec.subsampling == "4:2:0" else (1, 1))
        assert page.tile == (spec.tile_px, spec.tile_px)
        assert page.jpegtables.startswith(b"\xff\xd8\xff\xdb")
        tiff.filehandle.seek(page.dataoffsets[7])
        stream = tiff.filehandle.read(page.databytecounts[7])
    # SOI, then at once SOF0 with the tile's size, three components, and straight to the scan: no marker tells colours.
    assert stream[:4] == b"\xff\xd8\xff\xc0"
    assert int.from_bytes(stream[7:9], "big") == int.from_bytes(stream[9:11], "big") == spec.tile_px
    ids, factors = stream[12:21:3], stream[13]
    assert ids == (b"\x00\x01\x02" if spec.photometric == "rgb" else b"\x01\x02\x03")
    assert factors == (0x22 if spec.subsampling == "4:2:0" else 0x11)
    assert stream[21:23] == b"\xff\xda"
    assert stream[-2:] == b"\xff\xd9"


def test_formats_show_the_same_picture(tmp_path: Path) -> None:
    pictures = []
    for number, spec in enumerate(VARIANTS):
        paint_slide(spec, tmp_path / str(number))
        pictures.append(read_openslide(tmp_path / str(number) / "synth-0000.svs").astype(int))
    # Glass noise is fixed to tiles, so 240 and 256 differ by it.
    assert all(np.abs(picture - pictures[-1]).mean() < 6 for picture in pictures)
    assert all(abs((picture - pictures[-1]).mean()) < 0.5 for picture in pictures)


@pytest.mark.parametrize(("mpp", "magnification"), [(0.25, "40"), (0.2527, "40"), (1.0, "10")])
def test_other_spacings_change_magnification(mpp: float, magnification: str, tmp_path: Path) -> None:
    import openslide

    paint_slide(SlideSpec(width_px=600, height_px=512, mpp=mpp), tmp_path)
    with openslide.OpenSlide(tmp_path / "synth-0000.svs") as slide:
        assert slide.properties["openslide.objective-power"] == magnification
        assert float(slide.properties["openslide.mpp-x"]) == mpp
        assert slide.level_count == 1


def test_without_spacing_nothing_tells_it(tmp_path: Path) -> None:
    import openslide
    from cucim.clara import CuImage

    truth = paint_slide(SlideSpec(width_px=512, height_px=512, mpp=None), tmp_path)
    path = tmp_path / "synth-0000.svs"
    assert truth["mpp"] is None
    with openslide.OpenSlide(path) as slide:
        assert slide.properties["openslide.vendor"] == "aperio"
        assert not {"openslide.mpp-x", "openslide.objective-power", "aperio.MPP", "aperio.AppMag"} & {*slide.properties}
        assert slide.properties["tiff.ResolutionUnit"] == "none"
    with CuImage(str(path)) as slide:
        assert not {"MPP", "AppMag"} & {*slide.metadata["aperio"]}


def test_bigtiff_reads_the_same(tmp_path: Path) -> None:
    spec = SlideSpec(width_px=1100, height_px=700)
    paint_slide(spec, tmp_path / "classic")
    paint_slide(replace(spec, bigtiff=True), tmp_path / "big")
    classic, big = (tmp_path / name / "synth-0000.svs" for name in ("classic", "big"))
    assert classic.read_bytes()[2] == 42
    assert big.read_bytes()[2] == 43
    assert np.array_equal(read_openslide(classic), read_openslide(big))
    assert np.array_equal(read_openslide(big), read_cucim(big))


def test_files_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    options: dict[str, Any] = {"slides": 3, "size": 1100, "seed": 2, "pen": True, "hole": True}
    one = synth.run(tmp_path / "one", workers=1, **options)
    two = synth.run(tmp_path / "two", workers=2, **options)
    assert (one["workers"], two["workers"]) == (1, 2)
    found = digests(tmp_path / "one")
    assert found == digests(tmp_path / "two")
    assert len(found) == 3 * 4 + 2
    assert not any(".tmp" in name for name in found)


def test_files_do_not_depend_on_the_processor(tmp_path: Path) -> None:
    """numpy and libjpeg-turbo choose their kernels by CPU; the plainest ones must paint the same bytes."""
    code = (
        "import sys; from pathlib import Path; from sharding.synth import SlideSpec, paint_slide;"
        "paint_slide(SlideSpec(seed=6, width_px=1536, height_px=1100, pen=True, hole=True), Path(sys.argv[1]))"
    )
    ask = (
        "from numpy._core._multiarray_umath import __cpu_dispatch__ as d, __cpu_features__ as f;"
        "print(*(k for k in d if f[k]))"
    )
    features = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
    plain = {**os.environ, "NPY_DISABLE_CPU_FEATURES": features, "JSIMD_FORCENONE": "1"}
    for name, environment in (("chosen", {**os.environ}), ("plain", plain)):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=True, env=environment, cwd=tmp_path)
    assert digests(tmp_path / "chosen") == digests(tmp_path / "plain")


def test_seeds_and_indices_differ(tmp_path: Path) -> None:
    for number, (seed, index) in enumerate(((0, 0), (1, 0), (0, 1))):
        paint_slide(SlideSpec(seed=seed, index=index, width_px=512, height_px=512), tmp_path / str(number))
    pictures = [read_openslide(next((tmp_path / str(number)).glob("*.svs"))) for number in range(3)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(pictures[a].astype(int) - pictures[b]).mean() > 5


def test_a_tile_painted_alone_equals_the_same_tile_within_a_row() -> None:
    spec = SlideSpec(seed=9, width_px=4096, height_px=4096, pen=True, hole=True)
    layout, painter = Layout(spec), Painter(spec)
    m, side = painter.margin_nodes, 17 + 2 * painter.margin_nodes
    row = layout.nodes(-m * NODE_PX, 2048 - m * NODE_PX, 16 * 16 + 1 + 2 * m, side)
    # A fresh layout and painter, other calls before or none: nothing may remember.
    for column in (3, 8, 12):
        alone = Layout(spec).nodes(column * 256 - m * NODE_PX, 2048 - m * NODE_PX, side, side)
        again = Painter(spec).paint(column * 256, 2048, alone)
        assert np.array_equal(again, painter.paint(column * 256, 2048, row.columns(column * 16, column * 16 + side)))


def test_tissue_shows_no_seams_at_tile_borders() -> None:
    spec = SlideSpec(seed=1, width_px=2048, height_px=2048, tumour_target=0.5)
    layout, painter = Layout(spec), Painter(spec)
    m, side = painter.margin_nodes, 17 + 2 * painter.margin_nodes
    tiles = []
    for x0 in range(512, 1536, 256):
        column = []
        for y0 in range(512, 1536, 256):
            column.append(painter.paint(x0, y0, layout.nodes(x0 - m * NODE_PX, y0 - m * NODE_PX, side, side)))
        tiles.append(np.concatenate(column))
    picture = np.concatenate(tiles, axis=1).astype(int)
    for axis in (0, 1):
        steps = np.abs(np.diff(picture, axis=axis)).mean(axis=(1 - axis, 2))
        for border in (255, 511, 767):
            # Against its neighbourhood: steps are larger in tumour, and smaller on glass.
            assert steps[border] < 1.15 * np.max(steps[[*range(border - 12, border), *range(border + 1, border + 13)]])


def test_patches_are_not_copies_of_each_other(painted: Path) -> None:
    whole = read_openslide(painted / "synth-0001.svs")
    tissue, _ = truth_of(painted, "synth-0001")
    seen = set()
    for y in range(0, 4096 - 256, 256):
        for x in range(0, 4096 - 256, 256):
            if (tissue[y // 16 : y // 16 + 16, x // 16 : x // 16 + 16] == 255).all():
                # The coarse picture: equal cells at equal places would be equal here even under other noise.
                seen.add((box_means(whole[y : y + 256, x : x + 256], 32) // 8).astype(np.uint8).tobytes())
    full = sum(
        bool((tissue[y : y + 16, x : x + 16] == 255).all()) for y in range(0, 240, 16) for x in range(0, 240, 16)
    )
    assert full > 20
    assert len(seen) == full


@pytest.mark.parametrize("hole", [False, True])
@pytest.mark.parametrize("pen", [False, True])
def test_otsu_on_saturation_finds_the_true_tissue(hole: bool, pen: bool, tmp_path: Path) -> None:
    for index in range(3):
        spec = SlideSpec(seed=11, index=index, width_px=2048, height_px=3072, hole=hole, pen=pen)
        truth = paint_slide(spec, tmp_path)
        means = box_means(read_openslide(tmp_path / f"{spec.slide_id}.svs"), 16)
        saturation = (means.max(axis=2) - means.min(axis=2)) / means.max(axis=2)
        tissue, classes = truth_of(tmp_path, spec.slide_id)
        # Ink is coloured too: to tell it from tissue is another task.
        judged = classes != truth["classes"]["pen"]
        found = (saturation > threshold_otsu(saturation[judged])) & judged
        true = (tissue == 255) & judged
        assert (found & true).sum() / (found | true).sum() >= 0.95
        assert bool((classes == 3).any()) == pen


def test_a_hole_is_glass_inside_tissue(tmp_path: Path) -> None:
    from scipy import ndimage

    for hole in (False, True):
        paint_slide(SlideSpec(seed=4, index=1, width_px=2048, height_px=2048, hole=hole), tmp_path / str(hole))
        tissue, _ = truth_of(tmp_path / str(hole), "synth-0001")
        filled = ndimage.binary_fill_holes(tissue == 255)
        share = (filled & (tissue == 0)).sum() / filled.sum()
        assert (share > 0.02) == hole


def test_tumour_is_denser_and_darker_than_stroma(painted: Path) -> None:
    whole = box_means(read_openslide(painted / "synth-0001.svs"), 16)
    _, classes = truth_of(painted, "synth-0001")
    classes = classes[:256, :256]
    background, stroma, tumour = (whole[classes == value].mean() for value in (0, 1, 2))
    assert background > stroma + 25 > tumour + 35


def test_the_tissue_edge_is_sharp(painted: Path) -> None:
    """Across a border between a glass and a tissue truth pixel, the step happens within a few pixels."""
    whole = read_openslide(painted / "synth-0002.svs").astype(float).mean(axis=2)
    tissue, _ = truth_of(painted, "synth-0002")
    widths = []
    for row in range(20, 236):
        for column in np.flatnonzero((tissue[row, 1:] == 255) & (tissue[row, :-1] == 0)):
            if column < 4 or column > 250 or not (tissue[row, column + 1 : column + 4] == 255).all():
                continue
            line = whole[row * 16 + 8, column * 16 - 16 : column * 16 + 48]
            glass, stroma = line[:8].mean(), line[40:].mean()
            between = (line < glass - 0.2 * (glass - stroma)) & (line > glass - 0.6 * (glass - stroma))
            widths.append(int(between[: int(np.argmax(line < glass - 0.6 * (glass - stroma))) + 1].sum()))
    assert len(widths) > 50
    assert np.median(widths) <= 4


def test_truth_labels_and_slide_list_agree(painted: Path) -> None:
    with (painted / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["slide_id"] for row in rows] == [f"synth-{i:04d}" for i in range(4)]
    assert {row["label"] for row in rows} == {"tumour", "normal"}
    for row in rows:
        assert (painted / row["path"]).is_file()
        truth = json.loads((painted / "truth" / f"{row['slide_id']}.json").read_text())
        tissue, classes = truth_of(painted, row["slide_id"])
        assert tissue.shape == classes.shape == (257, 257)
        assert (truth["width_px0"], truth["height_px0"], truth["mpp"], truth["downsample"]) == (4100, 4100, 0.5, 16)
        assert np.array_equal(tissue == 255, classes > 0)
        assert truth["tissue_share"] == pytest.approx((tissue == 255).mean(), abs=1e-6)
        assert truth["tumour_share"] == pytest.approx((classes == 2).sum() / (classes > 0).sum(), abs=1e-6)
        assert float(row["tumour_share"]) == truth["tumour_share"]
        assert (row["label"] == "tumour") == (truth["tumour_share"] > 0)
        assert 0.2 < truth["tissue_share"] < 0.7
        wanted = SlideSpec(**truth["spec"]).tumour_share_wanted
        assert truth["tumour_share"] == pytest.approx(wanted, abs=0.05)


def test_survival_shortens_with_tumour_and_patients_share_it() -> None:
    def study(share: float) -> list[dict[str, Any]]:
        return label_rows(3, [{"slide_id": f"synth-{i:04d}", "tumour_share": share} for i in range(400)])

    none, much = study(0.0), study(0.7)
    assert np.mean([r["survival_months"] for r in much]) < 0.5 * np.mean([r["survival_months"] for r in none])
    assert 0 < np.mean([r["censored"] for r in much]) < np.mean([r["censored"] for r in none]) < 1
    by_patient: dict[str, set[tuple[float, int]]] = {}
    for row in none:
        by_patient.setdefault(row["patient_id"], set()).add((row["survival_months"], row["censored"]))
    assert all(len(outcomes) == 1 for outcomes in by_patient.values())
    assert len(by_patient) == 320
    assert [patient_number(i, 6) for i in range(6)] == list(range(6))
    assert [patient_number(i, 7) for i in range(7)] == [0, 1, 2, 3, 3, 4, 5]


def test_a_finished_folder_is_left_alone_and_an_interrupted_one_completed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options: dict[str, Any] = {"slides": 2, "size": 512, "workers": 1}
    assert synth.run(out, **options)["painted"] == 2
    before = digests(out)
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    again = synth.run(out, **options)
    assert (again["painted"], again["already_there"]) == (0, 2)
    assert "nothing to do" in capsys.readouterr().err
    assert stamps == {p: p.stat().st_mtime_ns for p in out.rglob("*")}

    # As after a kill while the second slide was being written.
    (out / "labels.csv").unlink()
    (out / "truth" / "synth-0001.json").unlink()
    (out / "synth-0001.svs").rename(out / ".tmp-synth-0001.svs")
    assert synth.run(out, **options)["painted"] == 1
    assert digests(out) == before


def test_other_arguments_or_a_strange_folder_are_refused(tmp_path: Path) -> None:
    synth.run(tmp_path / "out", slides=1, size=512)
    with pytest.raises(ValueError, match=r"other arguments .*seed 0 there, 1 asked"):
        synth.run(tmp_path / "out", slides=1, size=512, seed=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"not empty \(thesis.txt"):
        synth.run(tmp_path / "full", slides=1, size=512)
    with pytest.raises(ValueError, match="is a file"):
        synth.run(tmp_path / "full" / "thesis.txt", slides=1, size=512)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"photometric": "rgb"}, "4:4:4"),
        ({"photometric": "cmyk"}, "photometric is 'cmyk'"),
        ({"subsampling": "4:1:1"}, "subsampling is '4:1:1'"),
        ({"tile": 512}, "tile is 512"),
        ({"size": 100}, "width_px is 100"),
        ({"quality": 0}, "quality is 0"),
        ({"mpp": 0.0}, "mpp is 0.0"),
        ({"mpp": float("nan")}, "mpp is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"slides": 0}, "slides is 0"),
        ({"workers": 0}, "workers is 0"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        synth.run(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_picture(tmp_path: Path) -> None:
    """144 million pixels would take 430 MB as one array; the painter takes little more than Python with its imports."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc: the peak of one process alone cannot be read")
    # VmHWM and not ru_maxrss: the latter starts from the size of the process that started this one.
    code = (
        "import re, sys; from pathlib import Path; from sharding.synth import SlideSpec, paint_slide;"
        "paint_slide(SlideSpec(width_px=12_000, height_px=12_000), Path(sys.argv[1]));"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert int(done.stdout) / 1024 < 250
