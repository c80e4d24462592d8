"""One slide, from file to committed shards: what is stored, what is quarantined, and what a rerun does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg
import tifffile

from sharding import slide_job
from sharding.index import FLAG_OUTSIDE
from sharding.permute import order_keys
from sharding.slide_job import SlideJob, SlideRecord, estimate_slide, read_record, run_slide
from sharding.synth import SlideSpec, paint_slide

MakeJob = Callable[..., SlideJob]
HOW = ["zeroed", "random", "scrambled scan", "no SOI", "second half zeroed", "claims 128 px", "no bytes"]


def rows_of(dataset: Path, record: SlideRecord) -> pa.Table:
    tables = [pq.read_table(dataset / "shards" / f"{shard.name}.parquet") for shard in record.shards]
    return pa.concat_tables(tables)


def stored(dataset: Path, record: SlideRecord) -> dict[tuple[int, int], bytes]:
    """(row, col) -> payload."""
    found = {}
    for row in rows_of(dataset, record).to_pylist():
        data = (dataset / "shards" / f"{row['shard']}.tar").read_bytes()
        found[row["row"], row["col"]] = data[row["offset"] : row["offset"] + row["length"]]
    return found


def stamps(dataset: Path) -> dict[str, tuple[int, int]]:
    files = [p for p in dataset.rglob("*") if p.is_file()]
    return {str(p.relative_to(dataset)): (p.stat().st_mtime_ns, p.stat().st_ino) for p in files}


def contents(dataset: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (dataset / "shards").iterdir()}


@pytest.mark.parametrize("reader", ["cucim", "openslide"])
def test_every_stored_patch_is_the_jpeg_of_the_slides_own_pixels(
    reader: str, slides: Any, decoded: Any, make_job: MakeJob, tmp_path: Path
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
        assert payload == simplejpeg.encode_jpeg(own, 85, "RGB", "444")


def test_shards_are_ordered_by_the_key_of_their_sample_ids(slides: Any, make_job: MakeJob, tmp_path: Path) -> None:
    record = run_slide(make_job(slides["plain"], tmp_path, seed=5, patches_per_shard=8))
    assert len(record.shards) > 2
    ids = rows_of(tmp_path, record)["sample_id"].to_numpy()
    assert np.all(np.diff(order_keys(ids, 5).astype(float)) > 0)
    assert sum(shard.samples for shard in record.shards) == record.patches
    # Another seed stores the same patches in another order.
    other = run_slide(make_job(slides["plain"], tmp_path / "other", seed=6, patches_per_shard=8))
    others = rows_of(tmp_path / "other", other)["sample_id"].to_numpy()
    assert set(others) == set(ids)
    assert others.tolist() != ids.tolist()


def test_columns_say_where_a_patch_lies_and_how_it_was_read(slides: Any, make_job: MakeJob, tmp_path: Path) -> None:
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
    slides: Any, make_job: MakeJob, tmp_path: Path
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


def test_sample_ids_change_with_spacing_and_size(slides: Any, make_job: MakeJob, tmp_path: Path) -> None:
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
    reader: str, slides: Any, make_job: MakeJob, tmp_path: Path
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
    how: str, slides: Any, make_job: MakeJob, damage_tile: Callable[..., Path], tmp_path: Path
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
    slides: Any, make_job: MakeJob, damage_tile: Callable[..., Path], tmp_path: Path
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
    slides: Any, make_job: MakeJob, damage_tile: Callable[..., Path], tmp_path: Path
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
    slides: Any, make_job: MakeJob, tmp_path: Path
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
    record = run_slide(job)
    assert record.status == "quarantined"
    assert reason in record.reason
    assert estimate_slide(job).reason == record.reason
    assert read_record(job) == record


def test_a_very_coarse_spacing_plans_as_any_other(slides: Any, make_job: MakeJob, tmp_path: Path) -> None:
    record = run_slide(make_job(slides["plain"], tmp_path, mpp=None, mpp_override=10.0))
    assert (record.status, record.mpp) == ("done", 10.0)
    assert record.patches > 0


def test_no_slide_files_are_a_record_too(make_job: MakeJob, slides: Any, tmp_path: Path) -> None:
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


def test_a_full_disk_is_the_runs_failure_and_not_the_slides(
    slides: Any, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(slides["plain"], tmp_path)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "shards" / "x.tar"))

    monkeypatch.setattr(slide_job, "write_shard", full)
    with pytest.raises(OSError, match="No space left"):
        run_slide(job)
    assert read_record(job) is None


def test_a_second_run_does_nothing(slides: Any, make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(slides["plain"], tmp_path)
    record = run_slide(job)
    before = stamps(tmp_path)
    assert run_slide(job) == record
    assert stamps(tmp_path) == before


@pytest.mark.parametrize("suffix", ["tar", "idx", "parquet"])
def test_a_missing_file_of_a_shard_is_made_again(suffix: str, slides: Any, make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(slides["plain"], tmp_path)
    record = run_slide(job)
    before = contents(tmp_path)
    (tmp_path / "shards" / f"{record.shards[-1].name}.{suffix}").unlink()
    again = run_slide(job)
    assert replace(again, seconds=0.0) == replace(record, seconds=0.0)
    assert contents(tmp_path) == before


def test_a_tar_that_was_cut_short_is_made_again(slides: Any, make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(slides["plain"], tmp_path)
    tar = tmp_path / "shards" / f"{run_slide(job).shards[0].name}.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-512])
    run_slide(job)
    assert tar.read_bytes() == whole


def test_a_run_that_died_between_shards_ends_the_same(
    slides: Any, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_slide(make_job(slides["plain"], tmp_path / "whole"))
    job = make_job(slides["plain"], tmp_path / "died")
    write_shard = slide_job.write_shard
    calls = []

    def die(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write_shard(*args)

    with monkeypatch.context() as patch:
        patch.setattr(slide_job, "write_shard", die)
        with pytest.raises(KeyboardInterrupt):
            run_slide(job)
    assert read_record(job) is None
    run_slide(job)
    assert contents(tmp_path / "died") == contents(tmp_path / "whole")


def test_an_estimate_counts_what_a_run_writes_and_writes_nothing(
    slides: Any, make_job: MakeJob, tmp_path: Path
) -> None:
    job = make_job(slides["plain"], tmp_path)
    estimate = estimate_slide(job)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
    record = run_slide(job)
    assert (estimate.patches, estimate.mpp, estimate.reader) == (record.patches, record.mpp, record.reader)
    assert estimate.shards == len(record.shards)
    written = sum(shard.bytes for shard in record.shards)
    assert abs(estimate.bytes / written - 1) < 0.25


def test_nothing_of_the_scanner_or_the_patient_reaches_the_shards(make_job: MakeJob, tmp_path: Path) -> None:
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
