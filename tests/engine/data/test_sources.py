"""What lies together is read as one piece, and comes out as if it had been read alone."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data import BadSampleError, CropView, StoreError, open_loader
from engine.data.reading import SampleReader
from engine.data.sources import LocalShards, in_tasks, joined
from sharding.index import open_dataset

PIECES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5000), st.integers(1, 300)), min_size=1, max_size=60)


@given(PIECES, st.integers(0, 400), st.integers(0, 2000))
def test_pieces_are_joined_where_they_may_be_and_nowhere_else(
    pieces: list[tuple[int, int, int]], gap_bytes: int, most_bytes: int
) -> None:
    shards, offsets, lengths = (np.array(column) for column in zip(*pieces, strict=True))
    groups = joined(shards, offsets, lengths, gap_bytes=gap_bytes, most_bytes=most_bytes)
    assert sorted(place for group in groups for place in group) == list(range(len(pieces)))
    assert [min(group) for group in groups] == sorted(min(group) for group in groups)
    spans = []
    for group in groups:
        assert len(set(shards[group])) == 1
        ends = np.maximum.accumulate((offsets + lengths)[group])
        assert (np.diff(offsets[group]) >= 0).all()
        assert (offsets[group][1:] - ends[:-1] <= gap_bytes).all()
        assert len(group) == 1 or ends[-1] - offsets[group][0] <= most_bytes
        spans.append((int(shards[group[0]]), int(offsets[group[0]]), int(ends[-1]), int(lengths[group[0]])))
    # The next one did not fit.
    for (shard, start, end, _), (other, begin, _, length) in zip(sorted(spans), sorted(spans)[1:], strict=False):
        assert shard != other or begin - end > gap_bytes or max(end, begin + length) - start > most_bytes


def test_tasks_hold_whole_groups() -> None:
    groups = [[0], [1, 2], [3], [4, 5, 6, 7], [8], [9]]
    assert list(in_tasks(groups, 1)) == [[group] for group in groups]
    assert list(in_tasks(groups, 3)) == [[[0], [1, 2]], [[3], [4, 5, 6, 7]], [[8], [9]]]
    assert list(in_tasks([], 3)) == []


def test_all_datasets_together_keep_so_many_files_open(
    make_dataset: Any, paint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.data.sources._MAX_OPEN_SHARDS", 3)
    made = [make_dataset([paint(10 * number + row, 96) for row in range(6)], rows_per_shard=1) for number in range(4)]
    reader = SampleReader([open_dataset(each.path) for each in made])
    samples = reader.collect(reader.submit(np.arange(24)))
    assert [sample.jpeg.tobytes() for sample in samples] == [payload for each in made for payload in each.payloads]
    ours = {path.resolve() for each in made for path in (each.path / "shards").glob("*.tar")}
    assert sum(link.resolve() in ours for link in Path("/proc/self/fd").iterdir()) == 3
    reader.close()


@pytest.fixture
def preads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths that were read."""
    lengths: list[int] = []
    pread = os.pread

    def counted(fd: int, length: int, offset: int) -> bytes:
        lengths.append(length)
        return pread(fd, length, offset)

    monkeypatch.setattr("engine.data.sources.os.pread", counted)
    return lengths


def test_neighbours_on_disk_are_one_pread(dataset: Any, preads: list[int]) -> None:
    reader = SampleReader(open_dataset(dataset.path))
    rows = np.array([12, 3, 36, 11, 2, 10, 1])
    samples = reader.collect(reader.submit(rows))
    reader.close()
    assert [sample.jpeg.tobytes() for sample in samples] == [dataset.payloads[row] for row in rows]
    assert len(preads) == 3  # rows 1 to 3, 10 to 12, and 36


def test_a_pread_of_several_that_fails_is_tried_one_by_one(make_dataset: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_dataset()
    pread = os.pread

    def with_a_bad_sector(fd: int, length: int, offset: int) -> bytes:
        if offset <= dataset.offsets[4] + 10 < offset + length:
            raise OSError(errno.EIO, "Input/output error")
        return pread(fd, length, offset)

    monkeypatch.setattr("engine.data.sources.os.pread", with_a_bad_sector)
    reader = SampleReader(open_dataset(dataset.path), keep_faults=True)
    samples = reader.collect(reader.submit(np.arange(12)))
    reader.close()
    assert [row for row, sample in enumerate(samples) if sample.fault] == [4]
    assert "Input/output error" in str(samples[4].fault)
    assert [sample.jpeg.tobytes() for sample in samples if not sample.fault] == [
        payload for row, payload in enumerate(dataset.payloads) if row != 4
    ]


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EMFILE])
def test_a_file_system_out_of_reach_is_no_bad_sample(
    make_dataset: Any, monkeypatch: pytest.MonkeyPatch, number: int, backend: Any
) -> None:
    dataset = make_dataset()

    def fails(*_: Any) -> bytes:
        raise OSError(number, os.strerror(number))

    options: dict[str, Any] = {"views": [CropView(32)], "device": "cpu", "bad_samples": "replace"}
    with open_loader(dataset.path, batch_size_per_rank=4, backend=backend, **options) as loader:
        with monkeypatch.context() as patched:
            patched.setattr("engine.data.sources.os.pread", fails)
            with pytest.raises(StoreError, match=f"{dataset.path}/shards/.*{os.strerror(number)}"):
                next(loader)
        assert loader.replacements == []
        assert len(next(loader).rows) == 4


def test_the_first_fault_in_the_order_of_rows_is_raised(make_dataset: Any) -> None:
    dataset = make_dataset()
    for row in (2, 7):
        dataset.overwrite(row, 50, b"\0" * 20)
    reader = SampleReader(open_dataset(dataset.path))
    for rows, first in (([1, 7, 2], 7), ([2, 1, 7], 2)):
        with pytest.raises(BadSampleError) as caught:
            reader.collect(reader.submit(np.array(rows)))
        assert caught.value.row == first
    reader.close()


def test_a_file_is_read_ahead_by_batches_and_not_by_bytes(dataset: Any) -> None:
    reader = SampleReader(open_dataset(dataset.path))
    assert LocalShards.read_ahead_bytes == 0
    assert reader.batches_at_once(256) == 1
    reader.close()
