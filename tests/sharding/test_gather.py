"""From rows to committed shards: what is copied is checked, and a shard appears whole or not at all."""

from __future__ import annotations

import os
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

from sharding import gather, stage
from sharding.gather import GatherJob, SlideChangedError, gather_shard, read_result
from sharding.index import FLAG_WHITE, INDEX_SCHEMA, DatasetDamagedError
from sharding.permute import Member, PermuteJob
from sharding.rows import ROW
from sharding.stage import SlideJob, read_record, read_sources
from sharding.work import WorkFolder
from sharding.writer import write_members

MakeJob = Callable[..., SlideJob]
COPIES: dict[str, Any] = {"context_px": 256, "stride_px": 256, "patches_per_shard": 4, "min_tissue": 0.0}


def staged(job: SlideJob) -> list[GatherJob]:
    """Stage and permute a slide by itself; the jobs that are left."""
    options = job.options
    member = Member(job.name, job.path, job.run().patches)
    permutation = PermuteJob(job.dataset, job.name, (member,), options.seed, options.patches_per_shard).run()
    first, jobs = 0, []
    for number, count in enumerate(permutation.counts):
        jobs.append(GatherJob(job.dataset, job.name, permutation.digest, number, first, count))
        first += count
    return [one for one in jobs if one.count]


def stamps(dataset: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (dataset / "shards").iterdir()}


def tile_range(slide: Path, column: int, row: int) -> tuple[int, int]:
    with tifffile.TiffFile(slide) as tiff:
        page: Any = tiff.pages[0]
        index = row * -(-page.imagewidth // page.tilewidth) + column
        return page.dataoffsets[index], page.databytecounts[index]


def rot(slide: Path, column: int, row: int) -> None:
    """Change a byte in the middle of a tile; the file keeps its size and time."""
    offset, length = tile_range(slide, column, row)
    before = slide.stat()
    with open(slide, "r+b") as file:
        file.seek(offset + length // 2)
        byte = file.read(1)[0]
        file.seek(offset + length // 2)
        file.write(bytes([byte ^ 1]))
    os.utime(slide, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def own(slides: Any, tmp_path: Path) -> Path:
    """A slide that may be changed."""
    return Path(shutil.copyfile(slides["plain"], tmp_path / "own.svs"))


@pytest.mark.parametrize("options", [COPIES, {**COPIES, "check_tiles": False}, {"routes": "decode"}])
def test_offset_length_and_crc_find_every_payload(
    options: dict[str, Any], slides: Any, make_job: MakeJob, run_slide: Any, tmp_path: Path
) -> None:
    record = run_slide(make_job(slides["plain"], tmp_path, **options))
    found = 0
    for shard in record.shards:
        table = pq.read_table(tmp_path / "shards" / f"{shard.name}.parquet")
        assert table.schema.equals(INDEX_SCHEMA)
        data = (tmp_path / "shards" / f"{shard.name}.tar").read_bytes()
        assert (shard.samples, shard.bytes) == (table.num_rows, len(data))
        for row in table.to_pylist():
            payload = data[row["offset"] : row["offset"] + row["length"]]
            assert zlib.crc32(payload) == row["crc32"]
            assert (row["key"], row["shard"]) == (f"{row['sample_id']:016x}", shard.name)
            side = 256 if "context_px" in options else 128
            assert simplejpeg.decode_jpeg(payload, strict=True).shape == (side, side, 3)
            found += 1
    assert found == record.patches > 10
    assert record.patches_copied == (0 if options.get("routes") else record.patches)


@pytest.mark.parametrize("name", ["plain", "rgb"])
def test_unchecked_copies_are_those_of_checked_ones_but_for_flags(
    name: str, slides: Any, make_job: MakeJob, run_slide: Any, rows_of: Any, shard_files: Any, tmp_path: Path
) -> None:
    side = {"plain": 256, "rgb": 240}[name]
    tables, files = [], []
    for checked in (True, False):
        options = {**COPIES, "context_px": side, "stride_px": side, "check_tiles": checked}
        record = run_slide(make_job(slides[name], tmp_path / str(checked), **options))
        assert record.patches_copied == record.patches > 4
        tables.append(rows_of(tmp_path / str(checked), record))
        found = shard_files(tmp_path / str(checked))
        files.append({path: data for path, data in found.items() if not path.endswith(".parquet")})
    assert files[0] == files[1]
    assert tables[0].drop(["flags"]).equals(tables[1].drop(["flags"]))
    assert set(tables[1]["flags"].to_pylist()) == {0}  # white glass, were it looked at
    assert set(tables[0]["flags"].to_pylist()) == {0, FLAG_WHITE}


@pytest.fixture
def own_tables(tmp_path: Path) -> tuple[Path, list[bytes]]:
    """A slide of four JPEG tiles, each of which brings tables of its own, so that no two begin alike; the tiles."""
    pixels = np.random.default_rng(0).integers(90, 160, (512, 512, 3), dtype=np.uint8)
    pixels[:, :, 1] //= 2
    tiles = [
        simplejpeg.encode_jpeg(
            np.ascontiguousarray(pixels[y : y + 256, x : x + 256]), 70 + y // 64 + x // 32, "RGB", "422"
        )
        for y in (0, 256)
        for x in (0, 256)
    ]
    path = tmp_path / "own-tables.tif"
    layout: dict[str, Any] = {"shape": (512, 512, 3), "dtype": np.uint8, "tile": (256, 256), "compression": "jpeg"}
    tifffile.imwrite(
        path, iter(tiles), photometric="ycbcr", resolution=(20000, 20000), resolutionunit="CENTIMETER", **layout
    )
    return path, tiles


def test_tiles_of_many_headers_are_copied(
    own_tables: tuple[Path, list[bytes]],
    make_job: MakeJob,
    run_slide: Any,
    stored: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, tiles = own_tables
    found = []
    for folder, checked, most_heads in (("a", True, 64), ("b", False, 64), ("c", True, 2)):
        monkeypatch.setattr(stage, "_MOST_HEADS", most_heads)
        job = make_job(path, tmp_path / folder, **COPIES, check_tiles=checked)
        record = run_slide(job)
        assert record.patches_copied == 4
        found.append(stored(tmp_path / folder, record))
    assert found[0] == found[1] == found[2]
    for i, payload in enumerate(found[0][divmod(i, 2)] for i in range(4)):
        assert np.array_equal(simplejpeg.decode_jpeg(payload), simplejpeg.decode_jpeg(tiles[i]))


def test_of_tiles_of_many_headers_few_are_kept_and_all_are_checked(
    own_tables: tuple[Path, list[bytes]], make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "_MOST_HEADS", 2)
    job = make_job(own_tables[0], tmp_path, **COPIES)
    (gathered,) = staged(job)
    assert [len(source.heads) for source in read_sources(job.work, job.name)] == [2]
    rot(own_tables[0], 1, 1)
    ((count, reason, _),) = gather_shard(gathered).damaged.values()
    assert count == 1
    assert reason == "TIFF tile (1, 1) of level 0 has changed since it was checked (crc32)"


def test_a_tile_that_changed_since_it_was_checked_is_rejected_and_counted(
    own: Path, make_job: MakeJob, run_slide: Any, stored: Any, tmp_path: Path
) -> None:
    before = stored(tmp_path / "whole", run_slide(make_job(own, tmp_path / "whole", **COPIES)))
    job = make_job(own, tmp_path / "rotten", **COPIES)
    planned = job.run().patches
    rot(own, 1, 2)
    record = run_slide(job)
    after = stored(tmp_path / "rotten", record)
    assert set(after) == set(before) - {(2, 1)}
    assert all(after[cell] == before[cell] for cell in after)
    assert record.damaged == {job.name: [1, "TIFF tile (1, 2) of level 0 has changed since it was checked (crc32)"]}
    assert (record.patches, record.patches_copied, record.patches_quarantined) == (planned - 1, planned - 1, 1)
    assert record.reason == (
        f"1 of {planned} patches are damaged "
        "(first: TIFF tile (1, 2) of level 0 has changed since it was checked (crc32))"
    )


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("zeroed", "cannot be copied: it starts with 0000, not with SOI"),
        ("no SOI", "cannot be copied: it starts with 0000"),
        ("claims 128 px", "cannot be copied: its frame is 128x128 px"),
        ("second half zeroed", "cannot be copied: its scan has no end"),
        ("no bytes", "is empty (0 bytes)"),
    ],
)
def test_a_tile_that_cannot_be_copied_unchecked_is_rejected_and_counted(
    how: str,
    said: str,
    slides: Any,
    make_job: MakeJob,
    run_slide: Any,
    stored: Any,
    damage_tile: Callable[..., Path],
    tmp_path: Path,
) -> None:
    options = {**COPIES, "check_tiles": False}
    before = stored(tmp_path / "whole", run_slide(make_job(slides["plain"], tmp_path / "whole", **options)))
    path = damage_tile(slides["plain"], tmp_path / "bad.svs", 0, 1, 2, how)
    record = run_slide(make_job(path, tmp_path / "bad", **options))
    after = stored(tmp_path / "bad", record)
    assert set(after) == set(before) - {(2, 1)}
    assert all(after[cell] == before[cell] for cell in after)
    assert (record.planned, record.patches, record.patches_quarantined) == (len(before), len(after), 1)
    assert record.patches_copied == len(after)
    assert record.reason.startswith(
        f"1 of {len(before)} patches are damaged (first: TIFF tile (1, 2) of level 0 {said}"
    )


@pytest.mark.parametrize("place", [2**63 + 8, 2**64 - 100, 2**40])
def test_a_tile_that_lies_outside_of_the_file_is_rejected_unchecked(
    place: int, make_job: MakeJob, run_slide: Any, tmp_path: Path
) -> None:
    """In a BigTIFF an offset may be any number of 64 bits."""
    path = tmp_path / "big.tif"
    pixels = np.full((512, 512, 3), (200, 90, 160), np.uint8)
    layout: dict[str, Any] = {"tile": (256, 256), "compression": "jpeg", "photometric": "rgb", "bigtiff": True}
    tifffile.imwrite(path, pixels, resolution=(20000, 20000), resolutionunit="CENTIMETER", **layout)
    with tifffile.TiffFile(path) as tiff:
        tag = tiff.pages[0].tags["TileOffsets"]
        assert int(tag.dtype) == 16
    with open(path, "r+b") as file:
        file.seek(tag.valueoffset)
        file.write(place.to_bytes(8, "little"))
    options = {**COPIES, "check_tiles": False}
    record = run_slide(make_job(path, tmp_path / "out", **options))
    assert (record.status, record.patches, record.patches_quarantined) == ("done", 3, 1)
    assert "TIFF tile (0, 0) of level 0 reaches beyond the end of the file" in record.reason


@pytest.mark.parametrize("check_tiles", [True, False])
def test_a_slide_without_a_tile_table_is_all_damaged(
    check_tiles: bool, own: Path, make_job: MakeJob, run_slide: Any, tmp_path: Path
) -> None:
    with tifffile.TiffFile(own) as tiff:
        place = tiff.pages[0].tags["TileOffsets"].offset
    with open(own, "r+b") as file:
        file.seek(place + 4)
        file.write(bytes(4))  # the tag's count
    record = run_slide(make_job(own, tmp_path / "out", **COPIES, check_tiles=check_tiles))
    assert (record.status, record.patches, record.patches_quarantined) == ("done", 0, record.planned)
    assert "is missing from the file's tile table (0 entries)" in record.reason


def test_damage_of_both_kinds_is_counted_together_and_can_be_too_much(
    slides: Any, make_job: MakeJob, run_slide: Any, damage_tile: Callable[..., Path], tmp_path: Path
) -> None:
    path = damage_tile(slides["plain"], tmp_path / "bad.svs", 0, 1, 2, "zeroed")
    for folder, limit, status in (("a", 1.0, "done"), ("b", 0.1, "quarantined")):
        job = make_job(path, tmp_path / folder, max_bad_fraction=limit, **COPIES)
        first = job.run()
        assert first.patches_quarantined == 1
        rot(path, 2, 2)
        record = run_slide(job)
        rot(path, 2, 2)  # the same bit again
        assert record.status == status
        assert record.reason.startswith(f"2 of {first.planned} patches are damaged ({first.reason.partition('(')[2]}")
        assert ("more than max_bad_fraction=0.1" in record.reason) == (status == "quarantined")


def test_a_shard_whose_patches_are_all_rejected_is_none(own: Path, make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(own, tmp_path, **{**COPIES, "patches_per_shard": 1})
    one, *others = sorted(staged(job), key=lambda one: one.count)
    assert one.count == 1
    row = np.fromfile(job.work.permutation(job.name), ROW)[one.first]
    rot(own, int(row["col"]), int(row["row"]))
    result = gather_shard(one)
    assert (result.shard, result.damaged[job.name][0]) == (None, 1)
    assert list((tmp_path / "shards").iterdir()) == []
    assert read_result(one) == gather_shard(one) == result
    assert all(gather_shard(other).shard is not None for other in others)


def test_of_large_patches_fewer_are_held_at_a_time(
    slides: Any, make_job: MakeJob, shard_files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"context_px": 256, "stride_px": 256, "patches_per_shard": 100}
    (whole,) = staged(make_job(slides["plain"], tmp_path / "whole", **options))
    gather_shard(whole)
    held = []

    def noted(descriptor: int, headers: Any, payloads: Any) -> None:
        held.append(sum(len(head) + len(rest) for head, rest in payloads))
        write_members(descriptor, headers, payloads)

    monkeypatch.setattr(gather, "write_members", noted)
    monkeypatch.setattr(gather, "_WINDOW_BYTES", 40_000)
    (job,) = staged(make_job(slides["plain"], tmp_path / "parts", **options))
    gather_shard(job)
    assert len(held) > 1
    assert max(held) < 60_000  # a row's length is without its head
    assert shard_files(tmp_path / "whole") == shard_files(tmp_path / "parts")


def test_a_disk_that_cannot_be_read_ends_the_run_and_the_slide_is_named(
    own: Path, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: int) -> bytes:
        raise OSError(5, "Input/output error")

    jobs = staged(make_job(own, tmp_path, **COPIES))
    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(OSError, match=r"Input/output error: .*own\.svs"):
        gather_shard(jobs[0])


def test_a_slide_that_was_replaced_under_way_ends_the_run(
    own: Path, slides: Any, make_job: MakeJob, tmp_path: Path
) -> None:
    jobs = staged(make_job(own, tmp_path, **COPIES))
    whole = own.read_bytes()
    own.write_bytes(whole[:-1])
    with pytest.raises(SlideChangedError, match=r"own\.svs changed while the run was under way; run again"):
        gather_shard(jobs[0])
    own.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(SlideChangedError, match=r"own\.svs changed"):
        gather_shard(jobs[0])
    assert list((tmp_path / "shards").iterdir()) == []
    own.write_bytes(whole)  # another time, the same bytes
    assert gather_shard(jobs[0]).damaged == {}


def test_a_payload_that_was_damaged_in_the_work_folder_ends_the_run(
    slides: Any, make_job: MakeJob, tmp_path: Path
) -> None:
    job = make_job(slides["plain"], tmp_path)
    first = staged(job)[0]
    payloads = job.work.payloads(job.name)
    payloads.write_bytes(bytes(payloads.stat().st_size))
    with pytest.raises(DatasetDamagedError, match=r"payloads is damaged at byte \d+: remove the folder .*\.work"):
        gather_shard(first)


def test_a_permutation_that_lost_rows_ends_the_run(slides: Any, make_job: MakeJob, tmp_path: Path) -> None:
    jobs = staged(make_job(slides["plain"], tmp_path))
    path = WorkFolder(tmp_path).permutation(jobs[0].group)
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(DatasetDamagedError, match="has lost rows"):
        gather_shard(jobs[-1])


def test_committed_shards_are_not_written_again(slides: Any, make_job: MakeJob, run_slide: Any, tmp_path: Path) -> None:
    job = make_job(slides["plain"], tmp_path)
    record = run_slide(job)
    before = stamps(tmp_path)
    assert run_slide(job) == record
    assert stamps(tmp_path) == before


def test_a_shard_of_another_permutation_is_made_again(
    slides: Any, make_job: MakeJob, run_slide: Any, shard_files: Any, tmp_path: Path
) -> None:
    run_slide(make_job(slides["unspaced"], tmp_path / "fresh", mpp=None, mpp_override=0.4))
    job = make_job(slides["unspaced"], tmp_path / "again", mpp=None, mpp_override=0.5)
    run_slide(job)
    assert shard_files(tmp_path / "again") != shard_files(tmp_path / "fresh")
    run_slide(replace(job, mpp_override=0.4))
    assert shard_files(tmp_path / "again") == shard_files(tmp_path / "fresh")


def test_a_death_over_another_permutations_shard_leaves_no_commit(
    slides: Any, make_job: MakeJob, run_slide: Any, shard_files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tar is new, the record says so, and the Parquet is still to come: the old one must not pass for it."""
    run_slide(make_job(slides["unspaced"], tmp_path / "fresh", mpp=None, mpp_override=0.4))
    job = make_job(slides["unspaced"], tmp_path / "died", mpp=None, mpp_override=0.5)
    run_slide(job)
    rename = Path.replace

    def die(self: Path, target: Path) -> Path:
        if Path(target).suffix == ".parquet":
            raise KeyboardInterrupt
        return rename(self, target)

    other = replace(job, mpp_override=0.4)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            run_slide(other)
    run_slide(other)
    assert shard_files(tmp_path / "died") == shard_files(tmp_path / "fresh")


@pytest.mark.parametrize("suffix", ["tar", "idx", "parquet"])
def test_a_missing_file_of_a_shard_is_made_again(
    suffix: str, slides: Any, make_job: MakeJob, run_slide: Any, shard_files: Any, tmp_path: Path
) -> None:
    job = make_job(slides["plain"], tmp_path)
    record = run_slide(job)
    before = shard_files(tmp_path)
    (tmp_path / "shards" / f"{record.shards[-1].name}.{suffix}").unlink()
    assert run_slide(job) == record
    assert shard_files(tmp_path) == before


def test_a_tar_that_was_cut_short_is_made_again(slides: Any, make_job: MakeJob, run_slide: Any, tmp_path: Path) -> None:
    job = make_job(slides["plain"], tmp_path)
    tar = tmp_path / "shards" / f"{run_slide(job).shards[0].name}.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-512])
    run_slide(job)
    assert tar.read_bytes() == whole


@pytest.mark.parametrize("last", ["tar", "idx", "json", "parquet"])
def test_a_death_before_any_file_of_a_shard_ends_the_same(
    last: str,
    slides: Any,
    make_job: MakeJob,
    run_slide: Any,
    shard_files: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_slide(make_job(slides["single"], tmp_path / "whole"))
    whole = shard_files(tmp_path / "whole")
    jobs = staged(make_job(slides["single"], tmp_path / "died"))
    rename = Path.replace

    def die(self: Path, target: Path) -> Path:
        if Path(target).name == f"{jobs[1].shard}.{last}":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        assert gather_shard(jobs[0]).shard is not None
        with pytest.raises(KeyboardInterrupt):
            gather_shard(jobs[1])
    found = shard_files(tmp_path / "died")
    suffixes = {name.partition(".")[2] for name in found if name.startswith(jobs[1].shard)}
    assert suffixes == {"tar": set(), "idx": {"tar"}, "json": {"tar", "idx"}, "parquet": {"tar", "idx"}}[last]
    assert read_result(jobs[1]) is None
    for job in jobs:
        gather_shard(job)
    assert shard_files(tmp_path / "died") == whole


def test_a_full_disk_leaves_no_shard_and_is_the_runs_failure(
    slides: Any, make_job: MakeJob, run_slide: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(slides["plain"], tmp_path)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(gather, "write_members", full)
        with pytest.raises(OSError, match="No space left"):
            run_slide(job)
    assert list((tmp_path / "shards").iterdir()) == []
    # What was staged stays.
    assert read_record(job) is not None
    assert run_slide(job).patches > 0
