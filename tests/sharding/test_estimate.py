"""What a dry run says of a slide."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sharding.estimate import EstimateJob, estimate_slide
from sharding.stage import SlideJob

MakeJob = Callable[..., SlideJob]


@pytest.mark.parametrize("options", [{}, {"context_px": 256, "stride_px": 256, "min_tissue": 0.0}])
def test_an_estimate_counts_what_a_run_writes_and_writes_nothing(
    options: dict[str, Any], slides: Any, make_job: MakeJob, run_slide: Any, tmp_path: Path
) -> None:
    job = make_job(slides["plain"], tmp_path, **options)
    estimate = EstimateJob(job).run()
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
    record = run_slide(job)
    assert (estimate.patches, estimate.patches_copied) == (record.patches, record.patches_copied)
    assert (estimate.mpp, estimate.mpp_source, estimate.reader) == (record.mpp, record.mpp_source, record.reader)
    written = sum(shard.bytes for shard in record.shards)
    assert abs(estimate.bytes / written - 1) < 0.25


def test_the_estimate_of_a_slide_without_tissue_is_nothing(slides: Any, make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(slides["plain"], tmp_path, context_px=512, stride_px=512, min_tissue=1.0)
    estimate = estimate_slide(job)
    assert (estimate.reason, estimate.patches, estimate.bytes) == ("", 0, 0)


def test_damaged_patches_are_passed_over(
    slides: Any, make_job: MakeJob, damage_tile: Callable[..., Path], tmp_path: Path
) -> None:
    path = damage_tile(slides["plain"], tmp_path / "bad.svs", 0, 1, 2, "zeroed")
    whole, damaged = (estimate_slide(make_job(slide, tmp_path)) for slide in (slides["plain"], path))
    assert (damaged.reason, damaged.patches) == ("", whole.patches)
    assert abs(damaged.bytes / whole.bytes - 1) < 0.25


def test_what_no_reader_opens_has_a_reason(make_job: MakeJob, tmp_path: Path) -> None:
    text = tmp_path / "text.svs"
    text.write_text("no slide")
    job = make_job(text, tmp_path)
    assert "no reader opens it" in estimate_slide(job).reason
    text.unlink()
    assert "is not a file" in estimate_slide(job).reason
