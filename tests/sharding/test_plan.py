"""Plans that are kept for later runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sharding import stage
from sharding.plan import ShardOptions, load_plan, plan_slide, save_plan
from sharding.slide import open_slide
from sharding.stage import SlideJob, stage_slide

MakeJob = Callable[..., SlideJob]


def test_a_kept_plan_is_taken_and_another_ones_is_not(
    slides: Any, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = tmp_path / "plans"
    plans.mkdir()
    made = []
    plan_slide = stage.plan_slide

    def noted(*args: Any, **keys: Any) -> Any:
        made.append(args)
        return plan_slide(*args, **keys)

    monkeypatch.setattr(stage, "plan_slide", noted)

    def planned_anew(slide: str = "plain", **options: Any) -> bool:
        made.clear()
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        assert stage_slide(replace(make_job(slides[slide], folder, **options), plans=str(plans))).status == "done"
        return bool(made)

    assert planned_anew()
    assert not planned_anew()
    # What the plan does not depend on may differ.
    assert not planned_anew(quality=50, seed=3, patches_per_shard=7, check_tiles=False)
    assert planned_anew(min_tissue=0.4)
    assert planned_anew(context_px=160)
    assert planned_anew(mpp_override=0.51)
    assert planned_anew("single")
    assert len(list(plans.iterdir())) == 5
    for path in plans.iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    assert planned_anew()
    assert not planned_anew()


def test_a_kept_plan_gives_the_same_rows(slides: Any, make_job: MakeJob, tmp_path: Path) -> None:
    jobs = [replace(make_job(slides["plain"], tmp_path / name), plans=str(tmp_path)) for name in ("a", "b")]
    for job in jobs:
        stage_slide(job)
    one, other = (np.load(job.work.rows(job.name)) for job in jobs)
    assert one.tobytes() == other.tobytes()
    assert jobs[0].work.qc("slide").read_bytes() == jobs[1].work.qc("slide").read_bytes()


def test_a_kept_plan_that_is_damaged_anywhere_is_none_or_what_it_was(
    slides: Any, make_options: Callable[..., ShardOptions], tmp_path: Path
) -> None:
    options, path = make_options(), tmp_path / "plan"
    with open_slide(slides["plain"]) as slide:
        save_plan(path, plan_slide(slide, "f", options, mpp_override=None), "digest")
    whole, data = load_plan(path, "digest"), path.read_bytes()
    assert whole is not None
    # The first entry's headers, the end of the last one, and the directory of the archive.
    for byte in [*range(160), *range(len(data) - 400, len(data))]:
        for bit in (0, 3, 5, 7):
            path.write_bytes(data[:byte] + bytes([data[byte] ^ 1 << bit]) + data[byte + 1 :])
            found = load_plan(path, "digest")
            assert found is None or found.rows.tobytes() == whole.rows.tobytes()
