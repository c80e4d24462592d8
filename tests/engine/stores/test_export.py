"""Exports are read back with the libraries that their users have, and hold what the store holds."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch

from engine.stores import begin_store, finish_store, open_store, write_slide
from engine.stores import export as module
from engine.stores.export import run, slide_names


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, make_slide: Callable[..., Any], make_store: Any) -> Path:
    """Slides of 30, 1 and no rows."""
    slides = {"a/b.svs": make_slide(30, seed=1), "one": make_slide(1, seed=2), "none": make_slide(0)}
    return Path(make_store(tmp_path_factory.mktemp("store") / "store", slides))


def load(path: Path) -> torch.Tensor:
    tensor: torch.Tensor = torch.load(path, weights_only=True)
    return tensor


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("array", ["embedding", "local"])
@pytest.mark.parametrize("order", [None, "store"])
def test_hipt_pt(array: str, order: str | None, store: Path, tmp_path: Path) -> None:
    result = run(store, tmp_path / "out", format="hipt_pt", array=array, order=order)
    assert result == {
        "store": str(store),
        "format": "hipt_pt",
        "out": str(tmp_path / "out"),
        "slides": 3,
        "files": 3,
    }
    places = read_csv(tmp_path / "out" / "regions.csv")
    for slide_id, slide in open_store(store).items():
        name = {"a/b.svs": "a%2Fb.svs"}.get(slide_id, slide_id)
        tensor = load(tmp_path / "out" / f"{name}.pt")
        assert tensor.dtype == torch.float32
        assert tensor.device.type == "cpu"
        expected = dict(zip(map(tuple, slide.xy0.tolist()), slide.array(array).astype(np.float32), strict=True))
        if order is None:
            # What HIPT's readers do: names of region files, sorted as text.
            keys = sorted(expected, key=lambda place: f"{place[0]}_{place[1]}")
            assert len(keys) < 30 or keys != sorted(keys)
        else:
            keys = list(expected)
        assert tensor.shape == (len(keys), *slide.shape(array)[1:])
        for row, key in enumerate(keys):
            np.testing.assert_array_equal(tensor[row].numpy(), expected[key])
        listed = [(int(row["x"]), int(row["y"])) for row in places if row["slide_id"] == slide_id]
        assert listed == keys
    assert [row["row"] for row in places if row["slide_id"] == "a/b.svs"] == [str(row) for row in range(30)]


def test_hipt_region_pt(store: Path, tmp_path: Path) -> None:
    result = run(store, tmp_path / "out", format="hipt_region_pt", array="local", slides=["a/b.svs", "none"])
    assert (result["slides"], result["files"]) == (2, 30)
    listed = read_csv(tmp_path / "out" / "region_features.csv")
    slide = open_store(store)["a/b.svs"]
    local = slide.array("local")
    assert len(listed) == 30
    for row, (x, y) in enumerate(slide.xy0.tolist()):
        path = tmp_path / "out" / f"a%2Fb.svs_{x}_{y}.pt"
        np.testing.assert_array_equal(load(path).numpy(), local[row].astype(np.float32))
        assert load(path).dtype == torch.float32
        assert listed[row] == {"feature_path": path.name, "slide_id": "a/b.svs", "x": str(x), "y": str(y)}


@pytest.mark.parametrize("order", [None, "name"])
def test_clam_h5(order: str | None, store: Path, tmp_path: Path) -> None:
    run(store, tmp_path / "out", format="clam_h5", order=order)
    for slide_id, slide in open_store(store).items():
        rows = list(range(len(slide)))
        if order == "name":
            rows.sort(key=lambda row: "_".join(map(str, slide.xy0[row])))
        with h5py.File(tmp_path / "out" / f"{slide_id.replace('/', '%2F')}.h5") as file:
            features, coords = file["features"], file["coords"]
            assert features.dtype == np.float32
            assert coords.dtype == np.int64
            np.testing.assert_array_equal(features[:], slide.embedding[rows].astype(np.float32))
            np.testing.assert_array_equal(coords[:], slide.xy0[rows])
            assert dict(features.attrs) == {"name": slide_id, "encoder": "hipt_patch"}
            expected = {
                "name": slide_id,
                "patch_size": 256,
                "patch_size_level0": 512,
                "target_magnification": 20,
                "level0_magnification": 40,
                "level0_width": 9000,
                "level0_height": 8000,
                "patch_level": 0,
            }
            if len(slide) == 0:
                del expected["patch_level"], expected["target_magnification"]  # its rows cannot tell
            assert dict(coords.attrs) == expected


@pytest.mark.parametrize(
    ("columns", "attributes", "expected"),
    [
        ({"level": [0, 0], "read_px": [256, 256]}, {}, {"patch_size": 256, "patch_size_level0": 256, "patch_level": 0}),
        # Resampled: CLAM's pair of level and size would read something else.
        (
            {"level": [0, 0], "read_px": [507, 507]},
            {"patch_px": 256},
            {"patch_size": 256, "patch_size_level0": 507},
        ),
        ({"level": [1, 1], "read_px": [256, 256]}, {}, {"patch_size": 256, "patch_level": 1}),
        ({"level": [0, 1], "read_px": [256, 128]}, {"overlap_px": 0}, {"overlap": 0}),
        ({"mpp": [None, None]}, {"mpp0": 3.0}, {}),
        ({"mpp": [0.9, 0.9]}, {"mpp0": 0.12}, {"target_magnification": 10, "level0_magnification": 80}),
    ],
)
def test_coords_say_what_is_known_of_the_patches(
    columns: dict[str, Any], attributes: dict[str, Any], expected: dict[str, int], tmp_path: Path, make_store: Any
) -> None:
    arrays = {"embedding": np.zeros((2, 3), np.float32), "xy0": np.zeros((2, 2), np.int32)}
    make_store(tmp_path / "store", {"s": (arrays, pa.table(columns), attributes)})
    run(tmp_path / "store", tmp_path / "out", format="clam_h5")
    with h5py.File(tmp_path / "out" / "s.h5") as file:
        assert dict(file["coords"].attrs) == {"name": "s", **expected}


@pytest.mark.parametrize(
    ("recipe", "columns", "expected"),
    [
        # 256 of level 1 of a 40x slide, with an overlap of 64.
        (
            {"context_px": 256, "stride_px": 192, "region_patches": None},
            {"col": [3, 5], "row": [7, 7], "level": [1, 1], "read_px": [256, 256], "mpp": [0.5, 0.5]},
            {
                "patch_size": 256,
                "patch_size_level0": 512,
                "overlap": 64,
                "patch_level": 1,
                "target_magnification": 20,
                "level0_magnification": 40,
            },
        ),
        # Regions of 16 x 16 of these, whose rows tell the patches' read_px; resampled from level 0.
        (
            {"context_px": 256, "stride_px": 256, "region_patches": 16},
            {
                "col": [1, 1],
                "row": [0, 1],
                "level": [0, 0],
                "read_px": [384, 384],
                "mpp": [0.5, 0.5],
                "patches": [9, 9],
            },
            {
                "patch_size": 4096,
                "patch_size_level0": 6144,
                "overlap": 0,
                "target_magnification": 20,
                "level0_magnification": 20,
            },
        ),
        # One cell alone does not tell how far the next one is.
        (
            {"context_px": 256, "stride_px": 256, "region_patches": None},
            {"col": [1, 1], "row": [2, 2], "level": [1, 1], "read_px": [256, 256], "mpp": [0.5, 0.5]},
            {"patch_size": 256, "overlap": 0, "patch_level": 1, "target_magnification": 20},
        ),
    ],
)
def test_the_grid_tells_how_large_patches_are_at_level_0(
    recipe: dict[str, Any], columns: dict[str, Any], expected: dict[str, int], tmp_path: Path, make_store: Any
) -> None:
    step = {192: 384, 256: 6144}[recipe["stride_px"]]
    cells = np.stack([columns["col"], columns["row"]], axis=1)
    arrays = {"embedding": np.zeros((2, 3), np.float32), "xy0": (cells * step + 7).astype(np.int32)}
    make_store(tmp_path / "store", {"s": (arrays, pa.table(columns), {})}, patches={"recipe": recipe})
    run(tmp_path / "store", tmp_path / "out", format="clam_h5")
    with h5py.File(tmp_path / "out" / "s.h5") as file:
        assert dict(file["coords"].attrs) == {"name": "s", **expected}


@pytest.mark.parametrize("array", ["embedding", "local"])
@pytest.mark.parametrize("order", ["store", "name"])
@pytest.mark.parametrize("buffer", [1, 1 << 28])
def test_parquet(
    array: str, order: str, buffer: int, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BUFFER_BYTES", buffer)
    result = run(store, tmp_path / "out", format="parquet", array=array, order=order)
    assert result["files"] == 1
    table = pl.read_parquet(tmp_path / "out" / "embeddings.parquet")
    opened = open_store(store)
    assert len(table) == opened.num_rows
    assert table.columns[:3] == ["slide_id", "x0", "y0"]
    assert table.columns[-1] == array
    for slide_id, slide in opened.items():
        mine = table.filter(pl.col("slide_id") == slide_id)
        rows = list(range(len(slide)))
        if order == "name":
            rows.sort(key=lambda row: "_".join(map(str, slide.xy0[row])))
        np.testing.assert_array_equal(mine[array].to_numpy().reshape(-1), slide.array(array)[rows].ravel())
        np.testing.assert_array_equal(mine.select("x0", "y0").to_numpy(), slide.xy0[rows])
        assert mine["sample_id"].to_list() == slide.rows["sample_id"][rows].to_list()
    assert table[array].to_numpy().shape[1:] == opened["one"].shape(array)[1:]


@pytest.mark.parametrize(
    ("format", "array", "missing", "kept"),
    [
        ("hipt_pt", "embedding", "one.pt", "a%2Fb.svs.pt"),
        ("hipt_region_pt", "local", "one_0_-128.pt", "a%2Fb.svs_0_-128.pt"),
        ("clam_h5", "embedding", "one.h5", "a%2Fb.svs.h5"),
        ("parquet", "embedding", "embeddings.parquet", "export.json"),
    ],
)
def test_an_export_that_was_interrupted_goes_on(
    format: str, array: str, missing: str, kept: str, store: Path, tmp_path: Path, tree: Callable[..., Any]
) -> None:
    out = tmp_path / "out"
    first = run(store, out, format=format, array=array)
    before = tree(out)
    assert missing in before
    written = (out / kept).stat().st_mtime_ns
    (out / missing).unlink()
    (out / f".tmp-{missing}.1").write_bytes(b"half")
    assert run(store, out, format=format, array=array) == first
    assert tree(out) == before
    if kept != "export.json":
        assert (out / kept).stat().st_mtime_ns == written


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "array"),
    [("hipt_pt", "embedding"), ("hipt_region_pt", "local"), ("clam_h5", "embedding"), ("parquet", "local")],
)
def test_no_half_of_a_file_is_left_whenever_the_export_dies(
    format: str, array: str, store: Path, tmp_path: Path, tree: Callable[..., Any], dies_at: Callable[..., bool]
) -> None:
    run(store, tmp_path / "undisturbed", format=format, array=array, slides=["one"])
    whole = tree(tmp_path / "undisturbed")
    for number in range(1, 200):
        out = tmp_path / "out"
        died = dies_at(number, out, lambda out=out: run(store, out, format=format, array=array, slides=["one"]))
        files = {name: data for name, data in tree(out).items() if not name.startswith(".")} if died else whole
        assert files.items() <= whole.items()
        run(store, out, format=format, array=array, slides=["one"])
        assert tree(out) == whole
        shutil.rmtree(out)
        if not died:
            break
    assert number > 10


def test_slides_that_were_added_are_exported_beside_the_others(
    tmp_path: Path, make_store: Any, make_slide: Any, identity: dict[str, Any]
) -> None:
    path, out = make_store(tmp_path / "store", ["one"]), tmp_path / "out"
    run(path, out, format="clam_h5")
    begin_store(path, identity)
    write_slide(path, "two", *make_slide())
    finish_store(path)
    assert run(path, out, format="clam_h5")["files"] == 2
    run(path, tmp_path / "table", format="parquet", slides=["one"])
    # One table cannot grow.
    with pytest.raises(ValueError, match=r"another export.*slides.*--overwrite"):
        run(path, tmp_path / "table", format="parquet")
    run(path, tmp_path / "table", format="parquet", overwrite=True)
    assert len(pl.read_parquet(tmp_path / "table" / "embeddings.parquet")) == 10


def test_another_export_is_not_overwritten_unasked(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(store, out, format="hipt_pt")
    before = load(out / "a%2Fb.svs.pt")
    with pytest.raises(ValueError, match=r"order was name, now it is store.*--overwrite"):
        run(store, out, format="hipt_pt", order="store")
    assert torch.equal(load(out / "a%2Fb.svs.pt"), before)
    run(store, out, format="hipt_pt", order="store", slides=["a/b.svs"], overwrite=True)
    assert not torch.equal(load(out / "a%2Fb.svs.pt"), before)
    assert not (out / "one.pt").exists(), "a file of the other export would later be taken for one of this"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "one.pt").write_bytes(b"precious")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="files that are no export"):
            run(store, tmp_path / "mine", format="hipt_pt", overwrite=overwrite)
    assert (tmp_path / "mine" / "one.pt").read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "npz"}, "--format npz: expected hipt_pt, hipt_region_pt, clam_h5, parquet"),
        ({"format": "hipt_pt", "order": "x"}, "--order x: expected store or name"),
        ({"format": "hipt_region_pt"}, r"embedding is \[30, 6\], .* 3 dimensions: give --array local"),
        ({"format": "clam_h5", "array": "local"}, r"local is \[30, 4, 3\].*give --array embedding\."),
        ({"format": "clam_h5", "array": "x"}, "there is no array x"),
        ({"format": "parquet", "slides": ["one", "two"]}, r"has no slide two \(1 of 2 unknown\)"),
        ({"format": "parquet", "slides": []}, "no slide to export"),
    ],
)
def test_a_mistake_is_told_before_anything_is_written(
    settings: dict[str, Any], message: str, store: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run(store, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_regions_at_the_same_place_are_refused(tmp_path: Path, make_store: Any, make_slide: Any) -> None:
    arrays, rows, attributes = make_slide()
    path = make_store(tmp_path / "store", {"s": ({**arrays, "xy0": np.zeros((5, 2), np.int32)}, rows, attributes)})
    with pytest.raises(ValueError, match="slide s: two of its rows lie at the same place"):
        run(path, tmp_path / "out", format="hipt_region_pt", array="local")


def test_slides_are_named_in_a_list_or_a_file(tmp_path: Path) -> None:
    assert slide_names("a, b,c") == ["a", "b", "c"]
    (tmp_path / "some.csv").write_text("label,slide_id\n1,a\n0,b c\n")
    assert slide_names(str(tmp_path / "some.csv")) == ["a", "b c"]
    (tmp_path / "other.csv").write_text("label\n1\n")
    with pytest.raises(ValueError, match="no column slide_id"):
        slide_names(str(tmp_path / "other.csv"))
    with pytest.raises(ValueError, match="no such file"):
        slide_names(str(tmp_path / "none.csv"))


def test_the_command_exports(store: Path, tmp_path: Path, command: Any) -> None:
    out = tmp_path / "out"
    arguments = ["export", str(store), "--format", "clam_h5", "--out", str(out), "--slides", "one,a/b.svs"]
    done = command.run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    expected = {"store": str(store), "format": "clam_h5", "out": str(out), "slides": 2, "files": 2}
    assert json.loads(done.stdout) == expected
    assert "export: 2/2 slides" in done.stderr
    done = command.run("export", str(store), "--format", "npz", "--out", str(out))
    assert done.returncode == 2
    assert "--format npz: expected" in done.stderr
