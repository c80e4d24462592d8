from __future__ import annotations

import builtins
import gc
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch

from engine.data import CropView, Ect, SampleStream, dino_views, open_loader
from engine.data.draws import uniforms
from engine.data.views import CROP_DRAWS, crop_windows

UINT8 = CropView(33, output="uint8")
FLOAT = CropView(40, mean=(0.7, 0.5, 0.6), std=(0.2, 0.25, 0.3))
WHOLE = CropView(96, flips=False, centre=True, output="uint8")


def open_cpu(dataset: Any, backend: Any, batch_size: int = 6, **options: Any) -> Any:
    merged: dict[str, Any] = {"views": [UINT8, FLOAT], "seed": 9, "threads": 2} | options
    return open_loader(dataset.path, batch_size_per_rank=batch_size, backend=backend, device="cpu", **merged)


def take(loader: Any, count: int) -> Any:
    return [next(loader) for _ in range(count)]


def assert_same(batches: Any, others: Any) -> None:
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert torch.equal(batch.rows, other.rows)
        assert np.array_equal(batch.sample_ids, other.sample_ids)
        for images, other_images in zip(batch.images, other.images, strict=True):
            assert torch.equal(images, other_images)


def test_a_batch_holds_the_planned_crops(dataset: Any, backend: Any) -> None:
    with open_cpu(dataset, backend, views=[UINT8, FLOAT, WHOLE]) as loader:
        batches = take(loader, 8)  # 48 samples of 37: into the second epoch
    rows = torch.cat([batch.rows for batch in batches])
    assert rows.dtype == torch.int64
    assert rows.tolist() == SampleStream(37, seed=9).rows(0, 48).tolist()
    ids = np.concatenate([batch.sample_ids for batch in batches])
    assert ids.dtype == np.uint64
    assert ids.tolist() == [int(dataset.keys[row], 16) for row in rows]
    for number, view in enumerate([UINT8, FLOAT, WHOLE]):
        images = torch.cat([batch.images[number] for batch in batches])
        assert images.shape == (48, 3, view.size_px, view.size_px)
        assert images.dtype == getattr(torch, view.output)
        windows = crop_windows(view, uniforms(9, np.arange(48), number, CROP_DRAWS), 96, 96)
        for row, image, x0, y0, flip_x, flip_y in zip(rows, images, *windows[:4], strict=True):
            patch = torch.from_numpy(simplejpeg.decode_jpeg(dataset.payloads[row])).permute(2, 0, 1)
            crop = patch[:, y0 : y0 + view.size_px, x0 : x0 + view.size_px]
            crop = crop.flip([axis for axis, flip in ((2, flip_x), (1, flip_y)) if flip])
            if view.output == "uint8":
                assert torch.equal(image, crop)
            else:
                mean, std = (torch.tensor(value).view(3, 1, 1) for value in (view.mean, view.std))
                torch.testing.assert_close(image, (crop / 255 - mean) / std, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size_px", [1, 15, 16, 17, 32, 95])
def test_dali_equals_the_plain_decoder_to_the_bit(dataset: Any, size_px: int) -> None:
    # Edges of crops fall inside JPEG blocks and chroma pairs, where a decoder of regions may cut corners.
    views = [CropView(size_px, output="uint8"), CropView(size_px)]
    with open_cpu(dataset, "dali", 37, views=views) as dali, open_cpu(dataset, "torch", 37, views=views) as plain:
        for batch, other in zip(take(dali, 3), take(plain, 3), strict=True):
            assert torch.equal(batch.images[0], other.images[0])
            torch.testing.assert_close(batch.images[1], other.images[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_deliver_the_same_samples_in_the_same_order(dataset: Any, backend: Any, world_size: int) -> None:
    with open_cpu(dataset, backend, 12) as loader:
        alone = take(loader, 4)
    parts = []
    for rank in range(world_size):
        with open_cpu(dataset, backend, 12 // world_size, rank=rank, world_size=world_size) as loader:
            parts.append(take(loader, 4))
            assert loader.seen == 48
    for batch, *of_ranks in zip(alone, *parts, strict=True):
        assert torch.equal(batch.rows, torch.cat([part.rows for part in of_ranks]))
        for view in range(2):
            assert torch.equal(batch.images[view], torch.cat([part.images[view] for part in of_ranks]))


def test_resume_delivers_the_identical_rest(dataset: Any, backend: Any) -> None:
    with open_cpu(dataset, backend) as loader:
        assert loader.seen == 0
        take(loader, 3)
        assert loader.seen == 18  # although more is prefetched
        state = json.loads(json.dumps(loader.state_dict()))
        rest = take(loader, 5)
        loader.load_state_dict(state)  # back again in the same loader
        assert_same(rest, take(loader, 5))
    with open_cpu(dataset, backend) as loader:
        take(loader, 1)
        loader.load_state_dict(state)
        assert_same(rest, take(loader, 5))
    with open_cpu(dataset, backend, seen=18) as loader:
        assert_same(rest, take(loader, 5))
    with open_cpu(dataset, backend, 2, rank=1, world_size=3, seen=18) as loader:  # another world size
        assert torch.equal(next(loader).images[0], rest[0].images[0][2:4])


def test_a_position_and_a_seed_of_numpy_are_taken_as_plain_numbers(dataset: Any) -> None:
    with open_cpu(dataset, "torch", seen=np.int64(8), seed=np.uint64(3)) as loader:
        state = loader.state_dict()
    assert json.loads(json.dumps(state)) == state
    with open_cpu(dataset, "torch", seed=3) as loader:
        loader.load_state_dict(state)
        assert loader.seen == 8


def test_a_state_of_another_stream_is_refused_by_name(dataset: Any, make_dataset: Any) -> None:
    with open_cpu(dataset, "torch") as loader:
        state = loader.state_dict()
        others = {"seed": 10, "order": "feistel-0", "draws": "x", "dataset": "d2", "views": [UINT8.as_dict()]}
        for name, value in others.items():
            with pytest.raises(ValueError, match=f"'{name}'"):
                loader.load_state_dict(state | {name: value})
        with pytest.raises(ValueError, match="seen"):
            loader.load_state_dict(state | {"seen": -1})
        del state["seed"]
        with pytest.raises(ValueError, match="lacks 'seed'"):
            loader.load_state_dict(state)


def test_delivered_images_are_never_overwritten(dataset: Any, backend: Any) -> None:
    with open_cpu(dataset, backend) as loader:
        kept = take(loader, 12)
        copies = [[images.clone() for images in batch.images] for batch in kept]
        take(loader, 12)
    gc.collect()
    for batch, copied in zip(kept, copies, strict=True):
        assert all(torch.equal(images, copy) for images, copy in zip(batch.images, copied, strict=True))


def test_images_may_be_changed_in_place(dataset: Any, backend: Any) -> None:
    with open_cpu(dataset, backend) as loader, open_cpu(dataset, backend) as untouched:
        for batch in take(loader, 6):
            for images in batch.images:
                images.zero_()
        assert_same([next(loader)], take(untouched, 7)[6:])


def test_batches_larger_than_the_dataset_and_single_samples_work(make_dataset: Any, paint: Any, backend: Any) -> None:
    single = make_dataset([paint(1, 96)])
    with open_cpu(single, backend, 5) as loader:
        assert next(loader).rows.tolist() == [0] * 5
    with open_cpu(single, backend, 1) as loader:
        assert next(loader).images[0].shape == (1, 3, 33, 33)


def test_impossible_requests_are_refused_before_anything_starts(dataset: Any, backend: Any) -> None:
    threads = threading.active_count()
    wrong: dict[str, dict[str, Any]] = {
        "97 px does not fit": {"views": [CropView(97)]},
        "views is empty": {"views": []},
        "rank 2 does not exist": {"rank": 2, "world_size": 2},
        "batch_size_per_rank": {"batch_size": 0},
        "seen": {"seen": -1},
        "seed is -1": {"seed": -1},
        r"seed is 1\.5": {"seed": 1.5},
        "threads is 0": {"threads": 0},
    }
    for match, options in wrong.items():
        with pytest.raises(ValueError, match=match):
            open_cpu(dataset, backend, **options)
    with pytest.raises(ValueError, match="device"):
        open_loader(dataset.path, batch_size_per_rank=2, views=[UINT8], backend=backend, device="meta")
    assert threading.active_count() == threads
    with pytest.raises(ValueError, match="backend"):
        open_cpu(dataset, "tensorflow")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_missing_gpu_is_said_and_auto_takes_the_cpu(dataset: Any) -> None:
    with pytest.raises(ValueError, match="no usable CUDA device"):
        open_loader(dataset.path, batch_size_per_rank=2, views=[UINT8], device="cuda")
    with open_loader(dataset.path, batch_size_per_rank=2, views=[UINT8]) as loader:
        assert loader.device == torch.device("cpu")
        assert loader.backend == "dali"


@pytest.mark.parametrize(
    ("views", "chosen"),
    [
        (dino_views(40, 24, num_small=2), "torch"),  # together they show nearly all of a patch
        ([CropView(16, ect=Ect())], "dali"),  # decoding little of it pays
        ([*dino_views(40, 24, num_small=2), UINT8], "dali"),  # DALI finishes the plain view
    ],
    ids=["whole", "part", "plain"],
)
def test_auto_leaves_out_dali_where_it_could_only_decode_whole_patches(
    dataset: Any, views: list[CropView], chosen: str
) -> None:
    batches = {}
    for backend in ("auto", "dali", "torch"):
        with open_loader(dataset.path, batch_size_per_rank=5, views=views, backend=backend, device="cpu") as loader:
            assert loader.backend == (chosen if backend == "auto" else backend)
            batches[backend] = next(loader).images
    for images, by_dali, by_torch in zip(*batches.values(), strict=True):
        assert torch.equal(images, by_dali)
        assert torch.equal(images, by_torch)


def test_a_named_backend_never_falls_back(dataset: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_dali(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("nvidia"):
            raise ImportError("No module named 'nvidia.dali'")
        return real_import(name, *args, **options)

    monkeypatch.delitem(sys.modules, "engine.data.dali_loader", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_dali)
    with pytest.raises(ImportError, match="pip install nvidia-dali-cuda120"):
        open_cpu(dataset, "dali")
    with open_cpu(dataset, "auto") as loader:
        assert loader.backend == "torch"


def test_the_chosen_backend_is_stated(dataset: Any, backend: Any) -> None:
    with open_cpu(dataset, backend) as loader:
        assert loader.backend == backend


def test_a_closed_loader_leaves_no_threads_or_files(dataset: Any, backend: Any) -> None:
    def descriptors_of_the_dataset() -> Any:
        links = [str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
        return [link for link in links if str(dataset.path / "shards") in link]

    threads = threading.active_count()
    loader = open_cpu(dataset, backend)
    batch = next(loader)
    assert descriptors_of_the_dataset()
    loader.close()
    loader.close()
    assert not descriptors_of_the_dataset()
    assert threading.active_count() == threads
    assert batch.images[0].sum() > 0
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


def test_importing_the_package_imports_neither_torch_nor_dali() -> None:
    code = (
        "import sys, engine.data, engine.data.views, engine.data.order, engine.data.draws\n"
        "engine.data.CropView(8)\n"
        "sys.exit(bool({'torch', 'nvidia.dali', 'pyarrow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
