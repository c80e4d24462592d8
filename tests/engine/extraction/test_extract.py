"""What `engine extract` stores is what a plain loop over decoded patches computes, in the right rows."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import extract, shard
from engine.stores import open_store, verify_store

Check = Callable[[Path, Path], None]


def _bits(store: Path) -> dict[str, bytes]:
    return {slide_id: slide.embedding.tobytes() for slide_id, slide in open_store(store).items()}


def test_a_dataset_shuffled_over_slides_gives_what_a_plain_loop_gives(
    sharded: tuple[Path, Any], extracted: Path, against_plain_loop: Check
) -> None:
    against_plain_loop(extracted, sharded[0])
    assert verify_store(extracted)["ok"]


def test_slide_order_gives_the_same_bits(
    slides: Path,
    extracted: Path,
    make_recipe: Any,
    make_extract: Any,
    run_here: Any,
    against_plain_loop: Check,
    tmp_path: Path,
) -> None:
    shard.run(make_recipe(slides, tmp_path / "dataset", permute="slide"), local=True)
    run_here(make_extract(tmp_path / "store", dataset=tmp_path / "dataset"))
    against_plain_loop(tmp_path / "store", tmp_path / "dataset")
    assert _bits(tmp_path / "store") == _bits(extracted)


@pytest.mark.slow
def test_two_workers_and_other_jobs_give_the_same_bits(
    sharded: tuple[Path, Any], extracted: Path, make_extract: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extract, "_BATCHES_PER_JOB", 0)  # a job for each slide
    recipe = make_extract(tmp_path / "store", "workers=2", dataset=sharded[0])
    result = extract.run(recipe, local=True)
    assert result["slides"] == {"done": 3, "quarantined": 0, "skipped": 0}
    assert _bits(tmp_path / "store") == _bits(extracted)
    assert open_store(tmp_path / "store").digest == open_store(extracted).digest


@pytest.mark.ray
@pytest.mark.slow
def test_ray_gives_the_same_store(
    sharded: tuple[Path, Any], extracted: Path, make_extract: Any, tmp_path: Path
) -> None:
    result = extract.run(make_extract(tmp_path / "store", dataset=sharded[0]))
    assert result["digest"] == open_store(extracted).digest


def test_slides_read_as_they_are_give_the_pixels_that_would_be_stored(
    slides: Path, extracted: Path, make_extract: Any, run_here: Any, tmp_path: Path
) -> None:
    """These slides' patches are copies of their JPEG tiles, so that nothing may differ."""
    result = run_here(make_extract(tmp_path / "store", slides=slides))
    assert result["slides"] == {"done": 3, "quarantined": 0, "skipped": 0}
    assert _bits(tmp_path / "store") == _bits(extracted)
    read, stored = open_store(tmp_path / "store"), open_store(extracted)
    for slide_id in stored:
        assert read[slide_id].rows.equals(stored[slide_id].rows)
        assert np.array_equal(read[slide_id].xy0, stored[slide_id].xy0)
    assert read.meta["patches"]["pixels"] == "read"


def test_a_finished_store_is_left_alone(
    sharded: tuple[Path, Any], extracted: Path, make_extract: Any, run_here: Any, listing: Any, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(extracted, tmp_path / "store"))
    before = listing(store / "slides")
    result = run_here(make_extract(store, dataset=sharded[0]))
    assert result["slides"] == {"done": 0, "quarantined": 0, "skipped": 3}
    assert result["patches"] == 0
    assert listing(store / "slides") == before
    assert result["digest"] == open_store(extracted).digest


def test_slides_that_are_added_are_appended_and_the_others_stay(
    slides: Path, extracted: Path, make_extract: Any, run_here: Any, listing: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    names = [path.name for path in sorted(slides.glob("*.svs"))]
    for name in names[:2]:
        shutil.copy(slides / name, folder)
    store = tmp_path / "store"
    assert run_here(make_extract(store, slides=folder))["slides"]["done"] == 2
    before = listing(store / "slides")
    shutil.copy(slides / names[2], folder)
    result = run_here(make_extract(store, slides=folder))
    assert result["slides"] == {"done": 1, "quarantined": 0, "skipped": 2}
    after = listing(store / "slides")
    assert {name: after[name] for name in before if name != "."} == {n: v for n, v in before.items() if n != "."}
    assert _bits(store) == _bits(extracted)


def test_a_store_of_another_encoder_is_refused(
    sharded: tuple[Path, Any], extracted: Path, make_extract: Any, run_here: Any, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(extracted, tmp_path / "store"))
    with pytest.raises(ValueError, match=r"was begun with encoder\.seed = 0, now it is 1"):
        run_here(make_extract(store, "seed=1", dataset=sharded[0]))


def test_another_file_under_a_known_slide_id_is_refused(
    slides: Path, make_extract: Any, run_here: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    (path,) = sorted(slides.glob("*.svs"))[:1]
    shutil.copy(path, folder)
    run_here(make_extract(tmp_path / "store", slides=folder))
    with open(folder / path.name, "ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match=f"has slide {path.stem} with fingerprint="):
        run_here(make_extract(tmp_path / "store", slides=folder))


def test_a_dry_run_counts_and_writes_nothing(sharded: tuple[Path, Any], make_extract: Any, tmp_path: Path) -> None:
    result = extract.dry_run(make_extract(tmp_path / "store", dataset=sharded[0]))
    patches = sum(sharded[1]["patches"].values())
    assert result["slides"] == {"todo": 3, "skipped": 0}
    assert (result["patches"], result["embedding"], result["bytes"]) == (patches, [192], patches * 192 * 2)
    assert not (tmp_path / "store").exists()
    assert "would add to" in extract.describe(result)
