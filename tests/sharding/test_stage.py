"""One slide, from file to rows and payloads: what is stored, what is quarantined, and what is kept."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import simplejpeg
import tifffile

from sharding import stage
from sharding.encode import encode_patch
from sharding.estimate import estimate_slide
from sharding.index import FLAG_OUTSIDE
from sharding.rows import RAW
from sharding.slide import Slide
from sharding.stage import SlideJob, read_record, read_sources, stage_slide
from sharding.synth import SlideSpec, paint_slide

MakeJob = Callable[..., SlideJob]
HOW = ["zeroed", "random", "scrambled scan", "no SOI", "second half zeroed", "claims 128 px", "no bytes"]


@pytest.mark.parametrize("reader", ["cucim", "openslide"])
def test_every_stored_patch_is_the_jpeg_of_the_slides_own_pixels(
    reader: str, slides: Any, decoded: Any, make_job: MakeJob, run_slide: Any, stored: Any, tmp_path: Path
) -> None:
    picture = decoded(slides["plain"])[0]
    record = run_slide(make_job(slides["plain"], tmp_path, reader=reader))
    assert (record.status, record.reader, record.reason) == ("done", reader, "")
    assert (record.width_px0, record.height_px0, record.levels) == (1024, 1024, 2)
    assert (record.mpp, record.patches_quarantined) == (0.5, 0)
    found = stored(tmp_path, record)
    assert len(found) == record.patches > 20
    for (row, col), payload in found.items():
        own = np.ascontiguousarray(picture[row * 128 : row * 128 + 128, col * 128 : col * 128 + 128])
        assert payload == encode_patch(own, 85)


def test_columns_say_where_a_patch_lies_and_how_it_was_read(
    slides: Any, make_job: MakeJob, run_slide: Any, rows_of: Any, tmp_path: Path
) -> None:
    record = run_slide(make_job(slides["fine"], tmp_path, context_px=160, min_tissue=0.3))
    table = rows_of(tmp_path, record)
    for row in table.to_pylist():
        # Stored at 0.5 um/px from a 0.25 slide: cells of 256 level-0 px, windows of 320 around them.
        assert (row["x0"], row["y0"]) == (row["col"] * 256 - 32, row["row"] * 256 - 32)
        assert (row["level"], row["read_px"], row["mpp"], row["route"], row["region"]) == (0, 320, 0.5, "decode", None)
        assert 0.3 <= row["tissue_fraction"] <= 1.0
        border = row["col"] in (0, 3) or row["row"] in (0, 3)
        assert bool(row["flags"] & FLAG_OUTSIDE) == border
        assert row["key"] == f"{row['sample_id']:016x}"
        assert row["slide_id"] == "slide"
    assert len(set(table["sample_id"].to_pylist())) == table.num_rows


def test_sample_ids_and_pixels_do_not_depend_on_the_slides_name_or_place(
    slides: Any, make_job: MakeJob, run_slide: Any, rows_of: Any, tmp_path: Path
) -> None:
    copy = tmp_path / "elsewhere" / "another name.svs"
    copy.parent.mkdir()
    shutil.copyfile(slides["plain"], copy)
    jobs = [
        make_job(slides["plain"], tmp_path / "a", slide_id="a"),
        make_job(copy, tmp_path / "b", slide_id="b"),
        make_job(slides["rgb"], tmp_path / "c", slide_id="a"),
    ]
    tables = [rows_of(Path(job.dataset), run_slide(job)) for job in jobs]
    columns = ["sample_id", "x0", "y0", "key", "offset", "length", "crc32"]
    assert tables[0].select(columns).equals(tables[1].select(columns))
    assert not set(tables[0]["sample_id"].to_pylist()) & set(tables[2]["sample_id"].to_pylist())


def test_sample_ids_change_with_spacing_and_size(
    slides: Any, make_job: MakeJob, run_slide: Any, rows_of: Any, tmp_path: Path
) -> None:
    ids: list[set[int]] = []
    changes: list[dict[str, Any]] = [{}, {"context_px": 130}, {"mpp": 1.0}]
    for number, options in enumerate(changes):
        job = make_job(slides["plain"], tmp_path / str(number), **options)
        ids.append(set(rows_of(Path(job.dataset), run_slide(job))["sample_id"].to_pylist()))
    assert not ids[0] & ids[1]
    assert not ids[0] & ids[2]


def tile_cells(column: int, row: int, tile_px: int, context_px: int, stride_px: int) -> set[tuple[int, int]]:
    """(row, col) of the cells whose window touches a TIFF tile."""
    margin = (context_px - stride_px) // 2
    touched = set()
    for r in range(32):
        for c in range(32):
            x, y = c * stride_px - margin, r * stride_px - margin
            if x < (column + 1) * tile_px and x + context_px > column * tile_px:  # noqa: SIM102  # one axis a line
                if y < (row + 1) * tile_px and y + context_px > row * tile_px:
                    touched.add((r, c))
    return touched


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("context_px", [128, 160])
@pytest.mark.parametrize("reader", ["cucim", "openslide"])
def test_exactly_the_patches_over_a_damaged_tile_are_quarantined(
    how: str,
    context_px: int,
    reader: str,
    slides: Any,
    make_job: MakeJob,
    run_slide: Any,
    stored: Any,
    damage_tile: Callable[..., Path],
    tmp_path: Path,
) -> None:
    options = {"reader": reader, "context_px": context_px, "stride_px": 128}
    whole = run_slide(make_job(slides["plain"], tmp_path / "whole", **options))
    before = stored(tmp_path / "whole", whole)
    path = damage_tile(slides["plain"], tmp_path / "bad.svs", 0, 1, 2, how)
    record = run_slide(make_job(path, tmp_path / "bad", **options))
    after = stored(tmp_path / "bad", record)

    over = tile_cells(1, 2, 256, context_px, 128) & set(before)
    assert len(over) >= 4
    assert set(after) == set(before) - over
    # Nothing stale, black or white: every stored patch is the one of the whole slide.
    assert all(after[cell] == before[cell] for cell in after)
    assert (record.status, record.patches, record.patches_quarantined) == ("done", len(after), len(over))
    assert record.reason.startswith(f"{len(over)} of {len(before)} patches are damaged (first: ")
    assert record.reason.isprintable()


@pytest.mark.parametrize("reader", ["cucim", "openslide"])
def test_a_slide_that_was_cut_off_gives_its_whole_patches_or_a_reason(
    reader: str, slides: Any, make_job: MakeJob, run_slide: Any, stored: Any, tmp_path: Path
) -> None:
    whole = run_slide(make_job(slides["single"], tmp_path / "whole", reader=reader))
    before = stored(tmp_path / "whole", whole)
    with tifffile.TiffFile(slides["single"]) as tiff:
        page: Any = tiff.pages[0]
        end = page.dataoffsets[9]  # tile (1, 2) and all after it are gone
    path = tmp_path / "cut.svs"
    path.write_bytes(slides["single"].read_bytes()[:end])
    record = run_slide(make_job(path, tmp_path / "cut", reader=reader))
    if record.status == "quarantined":
        assert record.reason
        assert record.shards == []
        return
    after = stored(tmp_path / "cut", record)
    lost = {(r, c) for r, c in before if r >= 6 or (r >= 4 and c >= 2)}
    assert set(before) - lost <= set(after)
    assert not lost & set(after)
    assert all(after[cell] == before[cell] for cell in before if cell in after)
    assert record.patches_quarantined >= len(lost) > 0


@pytest.mark.parametrize("how", ["zeroed", "random", "no bytes"])
def test_a_damaged_overview_quarantines_nothing(
    how: str,
    slides: Any,
    make_job: MakeJob,
    run_slide: Any,
    stored: Any,
    damage_tile: Callable[..., Path],
    tmp_path: Path,
) -> None:
    before = stored(tmp_path / "whole", run_slide(make_job(slides["plain"], tmp_path / "whole")))
    path = damage_tile(slides["plain"], tmp_path / "bad.svs", 1, 0, 0, how)
    record = run_slide(make_job(path, tmp_path / "bad"))
    after = stored(tmp_path / "bad", record)
    assert (record.status, record.patches_quarantined, record.reason) == ("done", 0, "")
    # The mask then comes from level 0: patches at the very threshold may differ.
    assert len(set(after) ^ set(before)) <= 2
    assert all(after[cell] == before[cell] for cell in set(after) & set(before))


def test_damage_on_a_slide_of_one_level_plans_no_glass(
    slides: Any, make_job: MakeJob, run_slide: Any, stored: Any, damage_tile: Callable[..., Path], tmp_path: Path
) -> None:
    before = stored(tmp_path / "whole", run_slide(make_job(slides["single"], tmp_path / "whole")))
    path = damage_tile(slides["single"], tmp_path / "bad.svs", 0, 1, 1, "zeroed")
    record = run_slide(make_job(path, tmp_path / "bad"))
    over = tile_cells(1, 1, 256, 128, 128)
    after = stored(tmp_path / "bad", record)
    # Otsu sees a little less of the slide: patches at the very threshold may differ.
    assert len(set(after) ^ (set(before) - over)) <= 1
    assert record.patches_quarantined == len(over)


def test_too_many_damaged_patches_quarantine_the_slide_and_leave_no_shard(
    slides: Any, make_job: MakeJob, run_slide: Any, damage_tile: Callable[..., Path], tmp_path: Path
) -> None:
    path = damage_tile(slides["plain"], tmp_path / "bad.svs", 0, 1, 2, "zeroed")
    total = run_slide(make_job(path, tmp_path / "a")).patches + 4
    at_limit = run_slide(make_job(path, tmp_path / "b", max_bad_fraction=4 / total))
    assert (at_limit.status, at_limit.patches_quarantined) == ("done", 4)
    record = run_slide(make_job(path, tmp_path / "c", max_bad_fraction=3.9 / total))
    assert (record.status, record.patches, record.shards) == ("quarantined", 0, [])
    assert "more than max_bad_fraction" in record.reason
    assert list((tmp_path / "c" / "shards").iterdir()) == []


def test_without_spacing_a_slide_is_quarantined_unless_native_or_stated(
    slides: Any, make_job: MakeJob, run_slide: Any, stored: Any, rows_of: Any, tmp_path: Path
) -> None:
    record = run_slide(make_job(slides["unspaced"], tmp_path / "a"))
    assert (record.status, record.patches) == ("quarantined", 0)
    assert "states no spacing" in record.reason
    native = run_slide(make_job(slides["unspaced"], tmp_path / "b", mpp=None))
    assert (native.status, native.mpp, native.mpp_source) == ("done", None, "unknown")
    assert native.patches > 0
    assert rows_of(tmp_path / "b", native)["mpp"].to_pylist() == [None] * native.patches
    stated = run_slide(make_job(slides["unspaced"], tmp_path / "c", mpp_override=0.5))
    assert (stated.status, stated.mpp, stated.mpp_source) == ("done", 0.5, "override")
    assert stored(tmp_path / "c", stated) == stored(tmp_path / "b", native)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mpp": 0.25}, "never enlarged"),
        ({"context_px": 2048, "stride_px": 2048}, "1024x1024 px, less than one patch of 2048 px"),
        ({"mpp_override": 60.0}, "implausible"),
    ],
)
def test_a_slide_that_cannot_be_used_becomes_a_record_with_its_reason(
    options: dict[str, Any], reason: str, slides: Any, make_job: MakeJob, tmp_path: Path
) -> None:
    job = make_job(slides["plain"], tmp_path, **options)
    record = stage_slide(job)
    assert record.status == "quarantined"
    assert reason in record.reason
    assert estimate_slide(job).reason == record.reason
    assert read_record(job) == record


def test_a_very_coarse_spacing_plans_as_any_other(
    slides: Any, make_job: MakeJob, run_slide: Any, tmp_path: Path
) -> None:
    record = run_slide(make_job(slides["plain"], tmp_path, mpp=None, mpp_override=10.0))
    assert (record.status, record.mpp) == ("done", 10.0)
    assert record.patches > 0


def test_no_slide_files_are_a_record_too(make_job: MakeJob, run_slide: Any, slides: Any, tmp_path: Path) -> None:
    text = tmp_path / "text.svs"
    text.write_text("no slide")
    record = run_slide(make_job(text, tmp_path / "a"))
    assert record.status == "quarantined"
    assert "no reader opens it" in record.reason
    gone = make_job(text, tmp_path / "b")
    text.unlink()
    assert "No such file" in run_slide(gone).reason
    changed = replace(make_job(slides["plain"], tmp_path / "c"), fingerprint="1-00")
    assert "changed while the run was under way" in run_slide(changed).reason


def test_a_slide_that_is_replaced_while_it_is_read_is_refused(
    slides: Any, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide = Path(shutil.copyfile(slides["plain"], tmp_path / "own.svs"))
    job = make_job(slide, tmp_path, routes="decode")
    opened = stage.open_slide

    def late(path: Path, reader: Any) -> Slide:
        other = shutil.copyfile(slides["rgb"], tmp_path / "other.svs")
        Path(other).replace(path)
        return opened(path, reader)

    monkeypatch.setattr(stage, "open_slide", late)
    record = stage_slide(job)
    assert (record.status, record.patches) == ("quarantined", 0)
    assert "changed while the run was under way" in record.reason


def test_a_death_over_the_rows_of_another_spacing_leaves_no_record_of_it(
    slides: Any, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [make_job(slides["plain"], tmp_path, mpp=None, mpp_override=mpp) for mpp in (0.5, 0.25)]
    assert stage_slide(jobs[0]).status == "done"

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage, "write_record", die)
        with pytest.raises(KeyboardInterrupt):
            stage_slide(jobs[1])
    # The rows are those of the second spacing: the first is staged anew.
    assert read_record(jobs[0]) is None
    assert stage_slide(jobs[0]).mpp == 0.5
    assert {source.mpp for source in read_sources(jobs[0].work, jobs[0].name)} == {0.5}


def test_nothing_of_the_scanner_or_the_patient_reaches_the_shards(
    make_job: MakeJob, run_slide: Any, tmp_path: Path
) -> None:
    spec = SlideSpec(seed=3, width_px=1024, height_px=1024)
    paint_slide(spec, tmp_path)
    with tifffile.TiffFile(tmp_path / "synth-0000.svs") as tiff:
        page: Any = tiff.pages[0]
        tag = page.tags["ImageDescription"]
        at, length = tag.valueoffset, tag.count
    data = bytearray((tmp_path / "synth-0000.svs").read_bytes())
    planted = "Aperio Image Library v12\r\n|MPP = 0.5|User = SECRETUSER|Date = 12/31/1999|x="
    data[at : at + length] = planted.encode()[: length - 1].ljust(length - 1, b"x") + b"\0"
    path = tmp_path / "SECRETNAME-1234.svs"
    path.write_bytes(data)
    secrets = [b"SECRETUSER", b"12/31/1999", b"SECRETNAME", b"Aperio"]
    assert all(secret in data for secret in secrets if secret != b"SECRETNAME")
    record = run_slide(make_job(path, tmp_path / "dataset", slide_id="SECRETNAME-1234"))
    assert record.patches > 0
    for file in (tmp_path / "dataset" / "shards").iterdir():
        assert b"SECRET" not in file.name.encode()
        if file.suffix in (".tar", ".idx"):
            assert not [secret for secret in secrets if secret in file.read_bytes()]
        else:
            # The index holds the user's slide_id, and no path beside it.
            text = json.dumps(pq.read_table(file).to_pylist(), default=str)
            assert "SECRETUSER" not in text
            assert str(tmp_path) not in text
    (picture,) = (tmp_path / "dataset" / "qc").iterdir()
    assert not [secret for secret in secrets if secret in picture.read_bytes()]


def test_a_full_disk_is_the_runs_failure_and_not_the_slides(
    slides: Any, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(slides["plain"], tmp_path)

    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "x.payloads"))

    monkeypatch.setattr(stage, "encode_patch", full)
    with pytest.raises(OSError, match="No space left"):
        stage_slide(job)
    assert read_record(job) is None
    assert [path.name for path in (tmp_path / ".work" / "slides").iterdir()] == []


def test_a_staged_slide_is_not_staged_again(
    slides: Any, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(slides["plain"], tmp_path)
    record = stage_slide(job)
    monkeypatch.setattr(stage, "open_slide", None)
    assert stage_slide(job) == read_record(job) == record


def test_a_record_of_another_spacing_or_digest_or_without_its_rows_is_no_record(
    slides: Any, make_job: MakeJob, tmp_path: Path
) -> None:
    job = make_job(slides["plain"], tmp_path)
    stage_slide(job)
    assert read_record(replace(job, mpp_override=0.25)) is None
    assert read_record(replace(job, md5="0" * 32)) is None
    job.work.rows(job.name).unlink()
    assert read_record(job) is None
    assert stage_slide(job).status == "done"


STEPS = ["payloads", "sources.json", "rows.npy", "json"]


@pytest.mark.parametrize("last", STEPS)
def test_a_death_before_any_file_of_a_staged_slide_is_made_good(
    last: str, slides: Any, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage_slide(whole := make_job(slides["plain"], tmp_path / "whole"))
    job = make_job(slides["plain"], tmp_path / "died")
    rename = Path.replace

    def die(self: Path, target: Path) -> Path:
        if Path(target).name == f"{job.name}.{last}":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            stage_slide(job)
    assert read_record(job) is None
    # They appear in this order, each whole, and nothing else is left.
    names = [f"{job.name}.{step}" for step in STEPS]
    folders = job.work.path / "slides", whole.work.path / "slides"
    assert sorted(p.name for p in folders[0].iterdir()) == sorted(names[: STEPS.index(last)])
    stage_slide(job)
    for name in names[:-1]:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


def test_rows_say_where_the_bytes_of_a_patch_lie(slides: Any, make_job: MakeJob, tmp_path: Path) -> None:
    """Copies lie in the slide, encoded patches in the work folder; the crc32 is that of the whole payload."""
    for options, route in (({"context_px": 256, "stride_px": 256}, "copy"), ({}, "decode")):
        job = make_job(slides["plain"], tmp_path / route, **options)
        record = stage_slide(job)
        rows, (source,) = np.load(job.work.rows(job.name)), read_sources(job.work, job.name)
        assert len(rows) == record.patches > 0
        assert (source.route, source.slide_id, source.fingerprint) == (route, "slide", job.fingerprint)
        path = Path(job.path) if route == "copy" else job.work.payloads(job.name)
        assert source.path == (job.path if route == "copy" else "")
        assert source.size_bytes == path.stat().st_size
        data = path.read_bytes()
        for row in rows:
            payload = bytes.fromhex(source.heads[row["head"]]) + data[row["offset"] :][: row["length"]]
            assert zlib.crc32(payload) == row["crc32"]
            assert simplejpeg.decode_jpeg(payload, strict=True).shape == (job.options.context_px,) * 2 + (3,)


def test_without_a_check_no_tile_is_read(
    slides: Any, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = make_job(slides["plain"], tmp_path / "checked", context_px=256, stride_px=256)
    job = make_job(slides["plain"], tmp_path / "unchecked", context_px=256, stride_px=256, check_tiles=False)
    record = stage_slide(checked)
    monkeypatch.setattr(Slide, "copy_tile", None)
    monkeypatch.setattr(stage, "read_patch", None)
    found = stage_slide(job)
    assert replace(found, seconds=0.0) == replace(record, seconds=0.0)
    rows, proven = np.load(job.work.rows(job.name)), np.load(checked.work.rows(checked.name))
    assert set(rows["head"]) == {RAW}
    assert set(rows["crc32"]) == {0}
    assert np.array_equal(rows["sample_id"], proven["sample_id"])
    # The tile as the TIFF states it: what is proven is its scan, at its end.
    assert np.array_equal(rows["offset"] + rows["length"], proven["offset"] + proven["length"])
