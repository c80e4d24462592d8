"""Stop anywhere, go on anyhow: what comes is the same, to the bit."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from engine.data import Augment, Blocks, CropView, Ect, open_loader

VIEWS = [
    CropView(40),
    CropView(33, rotations=True, ect=Ect(), augment=Augment(jitter=0.8, stain=0.5, blur=0.5), output="uint8"),
]
STEPS = 8  # of 12 samples, of 37: across two ends of an epoch
BATCH = 12


def open_cpu(dataset: Any, backend: Any, batch_size: int = BATCH, **options: Any) -> Any:
    merged: dict[str, Any] = {"views": VIEWS, "seed": 9, "threads": 2, "device": "cpu"} | options
    return open_loader(dataset.path, batch_size_per_rank=batch_size, backend=backend, **merged)


def take(loader: Any, count: int) -> Any:
    return [next(loader) for _ in range(count)]


def states_and_batches(dataset: Any, backend: Any, **options: Any) -> tuple[list[Any], list[Any]]:
    """Return the state before each step of an undisturbed run, as a checkpoint keeps it, and the steps' batches."""
    states, batches = [], []
    with open_cpu(dataset, backend, **options) as loader:
        for _ in range(STEPS):
            states.append(json.loads(json.dumps(loader.state_dict())))
            batches.append(next(loader))
    return states, batches


def assert_same(batch: Any, other: Any) -> None:
    assert torch.equal(batch.rows, other.rows)
    assert np.array_equal(batch.sample_ids, other.sample_ids)
    for images, other_images in zip(batch.images, other.images, strict=True):
        assert torch.equal(images, other_images)


def test_a_stop_at_every_step_leaves_the_rest_bit_identical(dataset: Any, backend: Any) -> None:
    states, batches = states_and_batches(dataset, backend)
    for stopped_at, state in enumerate(states):
        assert state["seen"] == stopped_at * BATCH
        with open_cpu(dataset, backend) as loader:
            loader.load_state_dict(state)
            for batch, expected in zip(take(loader, STEPS - stopped_at), batches[stopped_at:], strict=True):
                assert_same(batch, expected)


@pytest.mark.parametrize(
    "options", [{"locality": Blocks(4, 3)}, {"bad_samples": "replace"}], ids=lambda options: next(iter(options))
)
def test_so_it_does_with_another_order_and_with_bad_samples(make_dataset: Any, backend: Any, options: Any) -> None:
    made = make_dataset()
    if "bad_samples" in options:
        made.overwrite(3, 200, bytes(50))
        made.overwrite(8, 200, bytes(50))
    states, batches = states_and_batches(made, backend, **options)
    for stopped_at in (1, 4, 7):
        with open_cpu(made, backend, **options) as loader:
            loader.load_state_dict(states[stopped_at])
            for batch, expected in zip(take(loader, STEPS - stopped_at), batches[stopped_at:], strict=True):
                assert_same(batch, expected)


@pytest.fixture(scope="module")
def alone(dataset: Any) -> list[Any]:
    """Nine batches of one rank, one thread and the least prefetching there is, by the plain decoder."""
    with open_cpu(dataset, "torch", threads=1, prefetch=1) as loader:
        return take(loader, 9)


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 1), (2, 3), (5, 2)])
def test_four_ranks_then_two_then_three_deliver_what_one_does(
    dataset: Any, backend: Any, alone: list[Any], threads: int, prefetch: int
) -> None:
    state = None
    for run, world_size in enumerate((4, 2, 3)):
        loaders = [
            open_cpu(
                dataset,
                backend,
                BATCH // world_size,
                rank=rank,
                world_size=world_size,
                threads=threads,
                prefetch=prefetch,
            )
            for rank in range(world_size)
        ]
        try:
            for loader in loaders:
                if state is not None:
                    loader.load_state_dict(state)
            for expected in alone[3 * run : 3 * run + 3]:
                parts = [next(loader) for loader in loaders]
                assert torch.equal(torch.cat([part.rows for part in parts]), expected.rows)
                together = [torch.cat([part.images[number] for part in parts]) for number in range(len(VIEWS))]
                # DALI normalises a plain float view itself, and rounds otherwise.
                torch.testing.assert_close(together[0], expected.images[0], rtol=0, atol=1e-5)
                assert torch.equal(together[1], expected.images[1])
            states = [loader.state_dict() for loader in loaders]
            assert all(each == states[0] for each in states)  # any rank's state is that of the run
            state = json.loads(json.dumps(states[0]))
        finally:
            for loader in loaders:
                loader.close()


@pytest.mark.parametrize("prefetch", [1, 2, 4])
def test_neither_threads_nor_prefetching_change_a_bit(dataset: Any, backend: Any, prefetch: int) -> None:
    _, expected = states_and_batches(dataset, backend)
    for threads in (1, 3):
        _, batches = states_and_batches(dataset, backend, threads=threads, prefetch=prefetch)
        for batch, other in zip(batches, expected, strict=True):
            assert_same(batch, other)
    with pytest.raises(ValueError, match="prefetch is 0"):
        open_cpu(dataset, backend, prefetch=0)


def test_a_state_of_something_else_is_refused_with_what_is_here_and_there(dataset: Any, make_dataset: Any) -> None:
    with open_cpu(dataset, "torch") as loader:
        state = loader.state_dict()
        wrong: list[tuple[dict[str, Any], str]] = [
            ({"order": "feistel-0"}, r"'order' is 'feistel-1' here, but 'feistel-0' in the saved state"),
            ({"draws": "philox"}, r"'draws' is 'splitmix-1' here, but 'philox'"),
            ({"seed": 8}, r"'seed' is 9 here, but 8 in the saved state"),
            ({"views": state["views"][:1]}, r"'views' is .*'size_px': 33.* here, but .*'size_px': 40"),
        ]
        for changes, match in wrong:
            with pytest.raises(ValueError, match=f"cannot resume: {match}.*start a new run"):
                loader.load_state_dict(state | changes)
        assert loader.seen == 0
        assert next(loader).rows.shape == (BATCH,)  # a refused state changes nothing
    other = make_dataset()
    with (
        open_cpu(other, "torch") as loader,
        pytest.raises(ValueError, match=f"'dataset' is '.*' here, but '{state['dataset']}' in the saved state"),
    ):
        loader.load_state_dict(state)


def test_an_order_is_refused_by_another_one(dataset: Any) -> None:
    with open_cpu(dataset, "torch", locality=Blocks(4, 3)) as loader:
        state = loader.state_dict()
    others: tuple[dict[str, Any], ...] = ({}, {"locality": Blocks(4, 2)})
    for options in others:
        with open_cpu(dataset, "torch", **options) as loader, pytest.raises(ValueError, match="'order' is"):
            loader.load_state_dict(state)
