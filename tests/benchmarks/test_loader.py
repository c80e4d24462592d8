"""`engine bench loader`: peers deliver what ours delivers, and only what was made in the window is counted."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch

from benchmarks import dali_peers, feeds, harness, loader
from benchmarks.feeds import Patches, painted_patches, time_feed
from benchmarks.harness import Setting, run_cases
from benchmarks.loader_peers import PIL_PEERS

KEYS = {"openslide_pil", "webdataset_pil", "litdata_pil", "streaming_pil", "dali_stock", "roi_limit"}
VIEWS = {
    "uint8": loader._UINT8,
    "float": loader._FLOAT,
    "ect": loader._ECT_FLOAT,
    "jitter": loader._ECT_JITTER,
}
PEERS = {**PIL_PEERS, "dali_stock": dali_peers.dali_stock}


@pytest.fixture(scope="session")
def patches(setting: Setting) -> Patches:
    return painted_patches(setting)


@pytest.fixture(scope="session")
def mean_of_ours(patches: Patches) -> dict[str, torch.Tensor]:
    return {name: _mean(loader.ours(patches, view, backend="torch"), 4) for name, view in VIEWS.items()}


def _mean(feed: feeds.Feed, count: int) -> torch.Tensor:
    with feed() as batches:
        return torch.cat([batch.float() for batch in islice(batches, count)]).mean((0, 2, 3))


def test_the_cases_are_the_documented_ones() -> None:
    per_core = ["dali_uint8", "dali_float", "dali_ect_float", "dali_ect_jitter", "torch_uint8", "torch_float"]
    assert list(loader.CASES) == [*per_core, "dali_gpu_uint8", "dali_gpu_float"]


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_delivers_the_same_kind_of_batch(
    peer: str, name: str, patches: Patches, mean_of_ours: dict[str, torch.Tensor]
) -> None:
    random.seed(0)
    torch.manual_seed(0)
    view = VIEWS[name]
    feed = PEERS[peer](patches, view)
    with feed() as batches:
        one, other = islice(batches, 2)
    assert one.shape == other.shape == (patches.batch_size, 3, 224, 224)
    assert one.dtype == getattr(torch, view.output)
    order = torch.channels_last if view.is_channels_last else torch.contiguous_format
    assert one.is_contiguous(memory_format=order)
    assert not torch.equal(one, other)
    low, high = (0.0, 255.0) if view.output == "uint8" else (-2.2, 2.7)
    assert low <= one.min() < one.max() <= high
    # The same 35 patches in other orders, with other windows; a wrong normalisation or order of channels is far off.
    tolerance = 12.0 if view.output == "uint8" else 0.2
    assert (_mean(feed, 16) - mean_of_ours[name]).abs().max() < tolerance


def test_crops_of_peers_are_windows_of_the_stored_patches(patches: Patches) -> None:
    with PIL_PEERS["webdataset_pil"](patches, loader._UINT8)() as batches:
        crop = next(batches)[0].permute(1, 2, 0).numpy()
    turned = [each for flipped in (crop, crop[::-1]) for each in (flipped, flipped[:, ::-1])]
    for payload in patches.payloads():
        stored = simplejpeg.decode_jpeg(payload)
        for candidate in turned:
            places = np.argwhere((stored[:97, :97] == candidate[0, 0]).all(2))
            if any(np.array_equal(stored[y : y + 224, x : x + 224], candidate) for y, x in places):
                return
    pytest.fail("the crop is in no patch")


def test_the_limits_decode_the_windows_and_nothing_else(patches: Patches) -> None:
    jpegs, starts, sizes = dali_peers._decodable(patches, loader._ECT_FLOAT)[0]
    found = {name: _first_batch(limit(patches, loader._ECT_FLOAT)) for name, limit in dali_peers.LIMITS.items()}
    for index, (jpeg, (x, y), (width, height)) in enumerate(zip(jpegs, starts, sizes, strict=True)):
        expected = simplejpeg.decode_jpeg(jpeg)[y : y + height, x : x + width]
        for name, batch in found.items():
            assert np.array_equal(np.asarray(batch[index]), expected), name


def _first_batch(feed: feeds.Feed) -> list[Any]:
    with feed() as batches:
        return [np.array(image) for image in next(batches)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dali_uint8", "dali_float", "dali_ect_float", "torch_uint8", "torch_float"])
def test_a_case_has_a_ratio_to_every_peer(name: str, setting: Setting) -> None:
    result = loader.CASES[name](setting)
    assert result["unit"] == "samples/s"
    assert set(result["ratio_to"]) == set(result["cpu_ratio_to"]) == KEYS
    assert result["missing"] == {}
    assert result["limits"][result["limit"]] == max(result["limits"].values()) == result["rates"]["roi_limit"]
    assert all(units == 16 for units in result["units_per_round"].values())


@pytest.mark.slow
def test_the_cost_of_jitter_is_measured_in_the_same_rounds(setting: Setting) -> None:
    result = loader.CASES["dali_ect_jitter"](setting)
    assert set(result["ratio_to"]) == KEYS | {"dali_ect_float"}


@pytest.mark.parametrize(("module", "peer"), [("litdata", "litdata_pil"), ("streaming", "streaming_pil")])
def test_a_peer_that_is_not_installed_is_left_out(
    module: str, peer: str, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(loader, "PIL_PEERS", {peer: PIL_PEERS[peer]})
    result = loader.CASES["torch_uint8"](setting)
    assert set(result["ratio_to"]) == {"dali_stock", "roi_limit"}
    assert list(result["missing"]) == [peer]
    assert module in result["missing"][peer]


def test_without_dali_its_cases_are_skipped_and_torch_is_measured(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "peers", lambda: ({}, {"dali_stock": "no DALI", "roi_limit": "no DALI"}))
    result = run_cases("loader", loader.CASES, ["dali_uint8", "torch_uint8"], setting)
    assert result["skipped"] == [{"name": "dali_uint8", "reason": "DALI does not import here: no DALI"}]
    assert [case["name"] for case in result["cases"]] == ["torch_uint8"]
    assert result["cases"][0]["ratio_to"] == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU on this machine")
def test_without_a_gpu_its_cases_are_skipped_with_the_reason(setting: Setting) -> None:
    result = run_cases("loader", loader.CASES, ["dali_gpu_uint8"], setting)
    assert result["cases"] == []
    assert result["skipped"][0]["name"] == "dali_gpu_uint8"
    assert "NVIDIA GPU" in result["skipped"][0]["reason"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch finds none on this machine")
@pytest.mark.parametrize("name", ["dali_gpu_uint8", "dali_gpu_float"])
def test_a_gpu_is_measured_beside_all_cores(name: str, setting: Setting) -> None:
    result = loader.CASES[name](setting)
    decoders = {f"{kind}_decode_hw_{load:g}" for kind in ("roi", "full") for load in (0.0, 0.65, 1.0)}
    assert set(result["ratio_to"]) == {"cpu_all_cores"} | decoders


def test_only_batches_of_the_window_count_and_the_stream_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    now = [0.0]
    monkeypatch.setattr(feeds.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(feeds, "cpu_seconds", lambda: now[0] / 4)

    @contextmanager
    def feed() -> Iterator[Iterator[torch.Tensor]]:
        def batches() -> Iterator[torch.Tensor]:
            for number in range(100):
                now[0] += 10.0 if number < 3 else 1.0
                log.append("batch")
                yield torch.zeros(8, 3, 2, 2)

        yield batches()
        log.append("closed")

    assert time_feed(feed, warm=3, timed=4) == harness.Round(32, 4.0, 0.0, 1.0)
    assert log == ["batch"] * 7 + ["closed"]
