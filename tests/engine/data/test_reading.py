from __future__ import annotations

import itertools
import pickle
import threading
from typing import Any

import numpy as np
import pytest

from engine.data import BadSampleError, CropView, SampleStream, open_loader, sources
from engine.data.reading import SampleReader, jpeg_size
from sharding.index import open_dataset


def deliver_until_error(dataset: Any, backend: Any) -> Any:
    """Take batches of one sample until the loader fails; return the rows delivered and the error."""
    rows: list[int] = []
    view = CropView(32, output="uint8")
    with open_loader(
        dataset.path, batch_size_per_rank=1, views=[view], backend=backend, seed=4, threads=2, device="cpu"
    ) as loader:
        with pytest.raises(BadSampleError) as caught:
            rows.extend(int(batch.rows) for batch in itertools.islice(loader, 100))
        assert loader.seen == len(rows)
        with pytest.raises(BadSampleError):  # it neither hangs nor skips the sample
            next(loader)
        assert loader.seen == len(rows)
    return rows, caught.value


def planned(count: int, num_rows: int = 12, seed: int = 4) -> Any:
    return SampleStream(num_rows, seed).rows(0, count).tolist()


def assert_names_the_sample(error: Any, dataset: Any, row: int, reason: str) -> None:
    assert error.shard == dataset.shards[row]
    assert error.key == dataset.keys[row]
    assert reason in error.reason
    for part in (error.shard, error.key, f"row {row}", f"engine verify {dataset.path}"):
        assert part in str(error)


def flip_bit(dataset: Any, row: int, at: int) -> None:
    dataset.overwrite(row, at, bytes([dataset.payloads[row][at] ^ 0x10]))


DAMAGE = {
    "flipped payload bit": (lambda d, row: flip_bit(d, row, len(d.payloads[row]) // 2), "crc32"),
    "zeroed payload": (lambda d, row: d.overwrite(row, 0, bytes(len(d.payloads[row]))), "crc32"),
    "flipped digit of the name": (lambda d, row: d.overwrite(row, -512 + 3, b"z"), "tar header"),
    "another sample's name": (lambda d, row: d.overwrite(row, -512, b"0123456789abcdef"), "tar header"),
    "zeroed header": (lambda d, row: d.overwrite(row, -512, bytes(512)), "tar header"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_when_its_turn_comes_and_not_before(make_dataset: Any, backend: Any, damage: str) -> None:
    dataset = make_dataset()
    place = 5
    row = planned(place + 1)[place]
    inflict, reason = DAMAGE[damage]
    inflict(dataset, row)
    delivered, error = deliver_until_error(dataset, backend)
    assert delivered == planned(place)
    assert_names_the_sample(error, dataset, row, reason)


def test_a_truncated_shard_is_named(make_dataset: Any, backend: Any) -> None:
    dataset = make_dataset(rows_per_shard=6)
    last = 5
    with open(dataset.shard_file(last), "r+b") as file:
        file.truncate(dataset.offsets[last] + 100)
    _, error = deliver_until_error(dataset, backend)
    assert_names_the_sample(error, dataset, last, "truncated")


def test_a_shard_cut_before_the_header_is_named_from_the_index(make_dataset: Any) -> None:
    dataset = make_dataset(rows_per_shard=6)
    with open(dataset.shard_file(5), "r+b") as file:
        file.truncate(dataset.offsets[5] - 600)
    reader = SampleReader(open_dataset(dataset.path))
    with pytest.raises(BadSampleError) as caught:
        reader.read_one(5)
    assert_names_the_sample(caught.value, dataset, 5, "truncated")
    reader.close()


def test_a_missing_shard_is_named(make_dataset: Any) -> None:
    dataset = make_dataset(rows_per_shard=6)
    dataset.shard_file(7).unlink()
    reader = SampleReader(open_dataset(dataset.path))
    with pytest.raises(BadSampleError, match="cannot be read") as caught:
        reader.collect(reader.submit(np.array([3, 7])))
    assert_names_the_sample(caught.value, dataset, 7, "No such file")
    reader.close()


def test_a_patch_of_another_size_is_named(make_dataset: Any, paint: Any, backend: Any) -> None:
    payloads = [paint(row, 96) for row in range(12)]
    row = planned(4)[3]
    payloads[row] = paint(row, 64)  # with the right crc32
    dataset = make_dataset(payloads)
    delivered, error = deliver_until_error(dataset, backend)
    assert delivered == planned(3)
    assert_names_the_sample(error, dataset, row, "64 x 64 px, expected 96 x 96")


def test_a_sample_that_does_not_decode_is_named(make_dataset: Any, paint: Any, backend: Any) -> None:
    payloads = [paint(row, 96) for row in range(12)]
    row = planned(6)[5]
    payloads[row] = payloads[row][: len(payloads[row]) // 3]  # with the right crc32
    dataset = make_dataset(payloads)
    delivered, error = deliver_until_error(dataset, backend)
    assert delivered == planned(5)
    assert_names_the_sample(error, dataset, row, "does not decode")


def test_the_error_survives_pickling() -> None:
    error = BadSampleError("shard-000001", "0" * 16, "it is gone", 7, "Mend it.")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error)
    assert (copy.shard, copy.key, copy.row) == (error.shard, error.key, 7)


def test_threads_share_few_file_descriptors(dataset: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # One open shard for eight threads on four shards: every read evicts a descriptor that another thread may be using.
    monkeypatch.setattr(sources, "_MAX_OPEN_SHARDS", 1)
    reader = SampleReader(open_dataset(dataset.path))
    failures: list[Exception] = []

    def read_all(seed: int) -> None:
        try:
            for row in np.random.default_rng(seed).permutation(37).tolist() * 5:
                sample = reader.read_one(row)
                assert sample.jpeg.tobytes() == dataset.payloads[row]
                assert sample.sample_id == int(dataset.keys[row], 16)
        except (BadSampleError, AssertionError) as error:
            failures.append(error)

    threads = [threading.Thread(target=read_all, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reader.close()
    assert not failures


def test_submitted_rows_come_back_in_order(dataset: Any) -> None:
    reader = SampleReader(open_dataset(dataset.path))
    rows = np.arange(37)[::-1].copy()
    samples = reader.collect(reader.submit(rows))
    assert [sample.sample_id for sample in samples] == [int(dataset.keys[row], 16) for row in rows]
    reader.close()


def test_jpeg_size_reads_headers_and_refuses_what_is_none(paint: Any) -> None:
    jpeg = paint(1, 48)
    assert jpeg_size(jpeg) == (48, 48)
    assert jpeg_size(b"12345" + jpeg, 5) == (48, 48)
    with_comment = jpeg[:2] + b"\xff\xfe\x00\x06abcd" + b"\xff" + jpeg[2:]
    assert jpeg_size(with_comment) == (48, 48)
    before_any_pixels = jpeg[:400] + b"\xff\xd9"  # its frame header is there
    assert b"\xff\xc0" in before_any_pixels
    assert b"\xff\xda" not in before_any_pixels
    for broken in (b"", before_any_pixels, b"\xff\xd8", jpeg[:30], b"PNG" + jpeg, bytes(600), b"\xff\xd8" + bytes(600)):
        assert jpeg_size(broken) is None
