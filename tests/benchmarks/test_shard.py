"""The cases of `engine bench shard`, on small slides."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import shard
from benchmarks.harness import Setting
from benchmarks.ours import Ours, Patch

BOTH = {"openslide_pil", "cucim_simplejpeg"}
PEERS = {
    "copy_420": BOTH | {"sendfile"},
    "copy_444": BOTH | {"sendfile"},
    "copy_420_checked": BOTH | {"sendfile"},
    "copy_444_checked": BOTH | {"sendfile"},
    "decode_aligned": BOTH,
    "decode_unaligned": BOTH,
    "half_scale": BOTH,
    "plan": set(),
    "workers_2": set(),
    "ray_copy": set(),
    "ray_decode": set(),
}


def test_the_cases_are_the_documented_ones() -> None:
    assert set(shard.CASES) == set(PEERS)


@pytest.mark.parametrize("name", [name for name in PEERS if PEERS[name]])
def test_a_case_gives_our_rate_and_a_ratio_to_each_of_its_peers(name: str, setting: Setting) -> None:
    result = shard.CASES[name](setting)
    assert result["unit"] == "patches/s"
    assert result["value"] > 0
    assert set(result["ratio_to"]) == PEERS[name]
    assert set(result["spread"]) == PEERS[name] | {"value"}
    for peer, ratio in result["ratio_to"].items():
        # One round: its ratio is that of the rates.
        assert ratio == pytest.approx(result["rates"]["ours"] / result["rates"][peer])
    assert all(units > 0 for units in result["units_per_round"].values())


def test_planning_is_given_in_milliseconds_a_slide(setting: Setting) -> None:
    result = shard.CASES["plan"](setting)
    assert (result["unit"], result["ratio_to"]) == ("ms/slide", {})
    assert 0 < result["value"] < 60_000


@pytest.mark.parametrize("name", ["workers_2", pytest.param("ray_copy", marks=[pytest.mark.ray, pytest.mark.slow])])
def test_a_parallel_case_is_one_rate_over_the_other(name: str, setting: Setting) -> None:
    result = shard.CASES[name](setting)
    first, second = result["rates"].values()
    assert result["unit"] == ("workers_2/workers_1" if name == "workers_2" else "ray/local")
    assert result["value"] == pytest.approx(first / second)


def test_processes_wait_for_each_other_before_the_clock_starts(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard, "_BARRIER_S", 0.05)
    (tmp_path / "barrier").mkdir()
    ours = Ours.prepare([])
    with pytest.raises(RuntimeError, match="2 processes were asked for"):
        shard._timed(shard._Job(ours, tmp_path / "first", tmp_path / "barrier", 2))
    (tmp_path / "barrier" / "other").touch()
    assert shard._timed(shard._Job(ours, tmp_path / "first", tmp_path / "barrier", 2))[0] == 0


def test_a_peer_gets_neighbours_from_the_middle() -> None:
    patches = [Patch(Path("slide"), x, 0, 256, 1) for x in range(10)]
    assert [patch.x0 for patch in shard._middle(patches, 4)] == [3, 4, 5, 6]
    assert shard._middle(patches, 40) == patches
