"""`bad_samples="replace"`: nothing moves but the bad sample, and every one is reported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from engine.data import BadSampleError, CropView, Replacement, SampleStream, open_loader
from engine.data.order import substitute_position
from engine.data.views import CROP_DRAWS, crop_windows

SEED = 4
VIEW = CropView(40, output="uint8")


def open_replacing(dataset: Any, backend: Any, **options: Any) -> Any:
    merged: dict[str, Any] = {"batch_size_per_rank": 4, "bad_samples": "replace"} | options
    return open_loader(dataset.path, views=[VIEW], backend=backend, seed=SEED, threads=2, device="cpu", **merged)


def expected(num_rows: int, count: int, bad: set[int]) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Return the rows that are delivered, and (position, row, substitute) of each bad one among them."""
    stream = SampleStream(num_rows, SEED)
    delivered, replaced = [], []
    for position, row in enumerate(stream.rows(0, count).tolist()):
        attempt, substitute = 0, row
        while substitute in bad:
            substitute = int(stream.rows(substitute_position(SEED, position, attempt), 1)[0])
            attempt += 1
        delivered.append(substitute)
        if row in bad:
            replaced.append((position, row, substitute))
    return delivered, replaced


def reported(loader: Any) -> list[tuple[int, int, int]]:
    return [(each.position, each.row, each.substitute) for each in loader.replacements]


def damage_payload(dataset: Any) -> set[int]:
    for row in (2, 7):
        dataset.overwrite(row, len(dataset.payloads[row]) // 2, b"\x55\xaa")
    return {2, 7}


def truncate_shard(dataset: Any) -> set[int]:
    with open(dataset.shard_file(5), "r+b") as file:
        file.truncate(dataset.offsets[4] + 100)
    return {4, 5}


def remove_shard(dataset: Any) -> set[int]:
    dataset.shard_file(8).unlink()
    return {6, 7, 8}


@pytest.mark.parametrize("damage", [damage_payload, truncate_shard, remove_shard])
def test_bad_samples_are_replaced_and_reported(
    make_dataset: Any, backend: Any, damage: Callable[[Any], set[int]]
) -> None:
    dataset = make_dataset(rows_per_shard=3)
    bad = damage(dataset)
    with open_replacing(dataset, backend) as loader:
        batches = [next(loader) for _ in range(9)]
        rows = [int(row) for batch in batches for row in batch.rows]
        delivered, replaced = expected(12, 36, bad)
        assert rows == delivered
        assert reported(loader) == replaced
        assert {row for _, row, _ in replaced} == bad
        assert len(replaced) == 3 * len(bad)  # each bad row, once in each of three epochs
        assert all(each.fault.key == dataset.keys[each.row] for each in loader.replacements)
    ids = [f"{each:016x}" for batch in batches for each in batch.sample_ids.tolist()]
    assert ids == [dataset.keys[row] for row in rows]


def test_what_does_not_decode_is_replaced_with_its_own_windows(make_dataset: Any, paint: Any, backend: Any) -> None:
    import simplejpeg

    from engine.data.draws import uniforms

    payloads = [paint(row, 96) for row in range(12)]
    for row in (1, 10):
        payloads[row] = payloads[row][: len(payloads[row]) // 3]  # with the right crc32
    dataset = make_dataset(payloads)
    delivered, replaced = expected(12, 24, {1, 10})
    with open_replacing(dataset, backend) as loader:
        batches = [next(loader) for _ in range(6)]
        assert [int(row) for batch in batches for row in batch.rows] == delivered
        assert reported(loader) == replaced
        assert loader.seen == 24
        assert "does not decode" in loader.replacements[0].fault.reason
    images = np.concatenate([batch.images[0].numpy() for batch in batches])
    windows = crop_windows(VIEW, uniforms(SEED, np.arange(24), 0, CROP_DRAWS), 96, 96)
    for position, _, substitute in replaced:  # the position's window, cut from the substitute
        patch = simplejpeg.decode_jpeg(payloads[substitute])
        x0, y0, flip_x, flip_y = (int(field[position]) for field in windows[:4])
        crop = patch[y0 : y0 + 40, x0 : x0 + 40][:: 1 - 2 * flip_y, :: 1 - 2 * flip_x]
        assert np.array_equal(images[position], crop.transpose(2, 0, 1))


def test_the_report_follows_delivery_and_resume(make_dataset: Any, backend: Any) -> None:
    dataset = make_dataset(rows_per_shard=3)
    bad = damage_payload(dataset)
    delivered, replaced = expected(12, 48, bad)
    with open_replacing(dataset, backend) as loader:
        next(loader)
        state = loader.state_dict()
        assert reported(loader) == [each for each in replaced if each[0] < 4]  # although more is prefetched
        for _ in range(5):
            next(loader)
        loader.load_state_dict(state)
        assert [int(row) for _ in range(11) for row in next(loader).rows] == delivered[4:]
        assert reported(loader) == replaced  # counted once
        loader.load_state_dict(state | {"seen": 480})
        next(loader)
        assert [each for each in reported(loader) if each[0] < 480] == replaced  # skipped ones were not delivered
    with open_replacing(dataset, backend, batch_size_per_rank=2, rank=1, world_size=2) as loader:
        loader.load_state_dict(state)
        assert [int(row) for _ in range(3) for row in next(loader).rows] == delivered[6:8] + delivered[
            10:12
        ] + delivered[14:16]


def test_a_run_that_failed_goes_on_with_replacement(make_dataset: Any, backend: Any) -> None:
    dataset = make_dataset(rows_per_shard=3)
    delivered, _ = expected(12, 24, damage_payload(dataset))
    with open_replacing(dataset, backend, bad_samples="fail") as loader:
        rows: list[int] = []
        with pytest.raises(BadSampleError):
            rows.extend(int(row) for batch in loader for row in batch.rows)
        state = loader.state_dict()
        assert loader.replacements == []
    with open_replacing(dataset, backend) as loader:
        loader.load_state_dict(state)
        while len(rows) < 24:
            rows += [int(row) for row in next(loader).rows]
    assert rows == delivered


def test_too_much_damage_ends_the_run(make_dataset: Any, backend: Any) -> None:
    dataset = make_dataset(rows_per_shard=3)
    for row in (0, 3, 6, 9):
        dataset.shard_file(row).unlink()
    with open_replacing(dataset, backend) as loader:
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"8 substitutes .* bad as well: bad sample .* No such file"):
                next(loader)
        assert loader.seen == 0
        assert loader.replacements == []


def test_replacements_are_logged_once(make_dataset: Any, caplog: pytest.LogCaptureFixture) -> None:
    dataset = make_dataset(rows_per_shard=3)
    bad = damage_payload(dataset)
    position, row, substitute = expected(12, 12, bad)[1][0]
    with open_replacing(dataset, "torch") as loader:
        for _ in range(3):
            next(loader)
        loader.load_state_dict(loader.state_dict() | {"seen": 0})
        for _ in range(3):
            next(loader)
        assert loader.replacements[0] == Replacement(position, row, substitute, BadSampleError("", "", ""))
    start = f"row {substitute} is delivered instead: bad sample {dataset.keys[row]}"
    assert len([record for record in caplog.records if record.getMessage().startswith(start)]) == 1
