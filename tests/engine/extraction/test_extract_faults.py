"""Killed, interrupted, damaged: what is stored in the end is the same, and what is lost is named."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile

from engine.stores import open_store, verify_store

POINTS = ["extract.read:2", "extract.batch:1", "extract.batch:5", "extract.before_slide:2", "store.after_array:3"]
POINTS += ["store.before_rename:2", "store.after_rename:1"]


@pytest.fixture(scope="module")
def many(many_slides: Path, tmp_path_factory: pytest.TempPathFactory, make_recipe: Any) -> Path:
    """A dataset of twelve slides."""
    from engine import shard

    out = tmp_path_factory.mktemp("many") / "dataset"
    shard.run(make_recipe(many_slides, out, patches_per_shard=64), local=True)
    return out


@pytest.fixture(scope="module")
def many_by_slide(many_slides: Path, tmp_path_factory: pytest.TempPathFactory, make_recipe: Any) -> Path:
    """The same slides, one after the other in the shards."""
    from engine import shard

    out = tmp_path_factory.mktemp("many_by_slide") / "dataset"
    shard.run(make_recipe(many_slides, out, patches_per_shard=64, permute="slide"), local=True)
    return out


@pytest.fixture(scope="module")
def whole(many: Path, tmp_path_factory: pytest.TempPathFactory, make_extract: Any, run_here: Any) -> Path:
    """The store of `many`, of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("undisturbed") / "store"
    run_here(make_extract(out, "batch_size=4", dataset=many))
    return out


@pytest.fixture(scope="module")
def undisturbed(whole: Path) -> str:
    """The digest of `whole`."""
    return open_store(whole).digest


def arguments(source: str, out: Path, *more: str, workers: int = 1) -> list[str]:
    settings = [source, f"out={out}", "batch_size=4", f"workers={workers}", "cores_per_worker=1"]
    return ["extract", "extract/tiny", *settings, "--json", *more]


def computed(store: Path) -> list[str]:
    """The slides that were embedded, once for each time, by the log."""
    lines = [json.loads(line) for line in (store / "log.jsonl").read_text().splitlines()]
    return [line["slide_id"] for line in lines if line["status"] == "done"]


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_a_worker_that_dies_once_changes_nothing(
    point: str, many: Path, undisturbed: str, command: Any, tmp_path: Path
) -> None:
    out, token = tmp_path / "store", tmp_path / "token"
    fault = {"ENGINE_FAULT": point, "ENGINE_FAULT_ONCE": str(token)}
    done = command.run(*arguments(f"dataset={many}", out, "--local"), **fault)
    assert token.exists(), "nobody came to the step"
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["digest"] == undisturbed
    assert verify_store(out)["ok"]
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]


def _workers(command: Any, word: bytes) -> list[int]:
    found = []
    for pid in command.processes():
        try:
            if word in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "workers", "order"),
    [pytest.param("ray", 2, "many_by_slide", marks=pytest.mark.ray), ("local", 1, "many"), ("local", 2, "many")],
)
def test_two_workers_killed_one_after_the_other_lose_nothing(
    backend: str,
    workers: int,
    order: str,
    whole: Path,
    against_plain_loop: Callable[[Path, Path], None],
    request: pytest.FixtureRequest,
    command: Any,
    tmp_path: Path,
) -> None:
    out, dataset = tmp_path / "store", request.getfixturevalue(order)
    more, word = (["--local"], b"spawn_main") if backend == "local" else ([], b"ray::_Actor")
    given = arguments(f"dataset={dataset}", out, *more, workers=workers)
    process = command.start(*given, errors=tmp_path / "errors.txt")
    killed = 0
    while process.poll() is None and killed < 2:
        slides = len(list((out / "slides").glob("copy-*"))) if (out / "slides").is_dir() else 0
        if slides > 4 * killed and (found := _workers(command, word)):
            os.kill(found[0], signal.SIGKILL)
            killed += 1
            slides_then = slides
        time.sleep(0.01)
    assert process.wait(timeout=300) == 0, (tmp_path / "errors.txt").read_text()[-3000:]
    assert killed == 2
    assert slides_then < 12
    against_plain_loop(out, dataset)
    store, expected = open_store(out), open_store(whole)
    assert all(np.array_equal(store[slide_id].embedding, expected[slide_id].embedding) for slide_id in expected)
    assert verify_store(out)["ok"]
    # A slide may have been written just before its worker's death, and then is found, not embedded again.
    assert len(computed(out)) == len(set(computed(out)))


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_stopped(
    many: Path, undisturbed: str, command: Any, listing: Any, tmp_path: Path
) -> None:
    out = tmp_path / "store"
    process = command.start(*arguments(f"dataset={many}", out, "--local"), errors=tmp_path / "errors.txt")
    while process.poll() is None and len(list(out.glob("slides/copy-*"))) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130, (tmp_path / "errors.txt").read_text()[-3000:]
    assert "run the same command again" in (tmp_path / "errors.txt").read_text()
    assert command.survivors(10) == []
    whole = {path.name for path in out.glob("slides/copy-*")}
    assert 3 <= len(whole) < 12
    before = listing(out / "slides")
    done = command.run(*arguments(f"dataset={many}", out, "--local"))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["slides"] == {"done": 12 - len(whole), "quarantined": 0, "skipped": len(whole)}
    assert result["digest"] == undisturbed
    after = listing(out / "slides")
    assert all(after[name] == before[name] for name in before if name.split("/")[0] in whole)


def test_a_damaged_sample_quarantines_its_slide_alone(
    dataset: Path, make_extract: Any, run_here: Any, extracted: Path, tmp_path: Path
) -> None:
    row = pq.read_table(dataset / "index.parquet").to_pylist()[7]
    path = dataset / "shards" / f"{row['shard']}.tar"
    sound = path.read_bytes()
    with open(path, "r+b") as file:
        file.seek(row["offset"] + row["length"] // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 4]))
    result = run_here(make_extract(tmp_path / "store", dataset=dataset))
    assert result["slides"] == {"done": 2, "quarantined": 1, "skipped": 0}
    (failure,) = result["failures"]
    assert failure["slide_id"] == row["slide_id"]
    assert row["key"] in failure["reason"]
    assert "crc32" in failure["reason"]
    store = open_store(tmp_path / "store")
    assert row["slide_id"] not in store
    assert store.failures == [failure]
    path.write_bytes(sound)
    again = run_here(make_extract(tmp_path / "store", dataset=dataset))
    assert again["slides"] == {"done": 1, "quarantined": 0, "skipped": 2}
    assert again["digest"] == open_store(extracted).digest


@pytest.mark.parametrize("damage", ["cut off", "missing"])
def test_a_damaged_shard_quarantines_the_slides_that_lie_in_it_alone(
    damage: str, many_by_slide: Path, whole: Path, make_extract: Any, run_here: Any, tmp_path: Path
) -> None:
    dataset = Path(shutil.copytree(many_by_slide, tmp_path / "dataset"))
    index = pq.read_table(dataset / "index.parquet").to_pylist()
    shard = max(row["shard"] for row in index)
    path = dataset / "shards" / f"{shard}.tar"
    if damage == "missing":
        path.unlink()
    else:
        os.truncate(path, 1024)
    lost = {row["slide_id"] for row in index if row["shard"] == shard}
    result = run_here(make_extract(tmp_path / "store", "batch_size=4", dataset=dataset))
    assert {failure["slide_id"] for failure in result["failures"]} == lost
    assert all(shard in failure["reason"] for failure in result["failures"])
    assert result["slides"] == {"done": 12 - len(lost), "quarantined": len(lost), "skipped": 0}
    assert 0 < len(lost) < 12
    store, expected = open_store(tmp_path / "store"), open_store(whole)
    assert set(store) == set(expected) - lost
    assert all(np.array_equal(store[name].embedding, expected[name].embedding) for name in store)


def test_a_damaged_slide_is_quarantined_and_a_damaged_patch_is_left_out(
    slides: Path, make_extract: Any, run_here: Any, extracted: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(slides, tmp_path / "slides"))
    first, second, third = sorted(folder.glob("*.svs"))
    stored = open_store(extracted)
    with tifffile.TiffFile(first) as tiff:  # one tile that holds a patch
        page: Any = tiff.pages[0]
        row, col = stored[first.stem].rows.select("row", "col").row(2)
        index = row * -(-page.imagewidth // page.tilewidth) + col
        offset, length = page.dataoffsets[index], page.databytecounts[index]
    with open(first, "r+b") as file:
        file.seek(offset)
        file.write(bytes(length))
    second.write_bytes(b"no slide")
    result = run_here(make_extract(tmp_path / "store", slides=folder))
    assert result["slides"] == {"done": 2, "quarantined": 1, "skipped": 0}
    assert result["patches_quarantined"] == 1
    assert [failure["slide_id"] for failure in result["failures"]] == [first.stem, second.stem]
    store = open_store(tmp_path / "store")
    assert np.array_equal(store[third.stem].embedding, stored[third.stem].embedding)
    keep = np.arange(len(stored[first.stem])) != 2
    assert np.array_equal(store[first.stem].embedding, stored[first.stem].embedding[keep])
    assert np.array_equal(store[first.stem].xy0, stored[first.stem].xy0[keep])
    assert store[first.stem].attributes["patches_quarantined"] == 1


def test_a_quarantined_slide_ends_the_command_with_three(slides: Path, command: Any, tmp_path: Path) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    (folder / "bad.svs").write_bytes(b"no slide")
    shutil.copy(next(slides.glob("*.svs")), folder / "good.svs")
    done = command.run(*arguments(f"slides={folder}", tmp_path / "store", "--local"))
    assert done.returncode == 3, done.stderr
    result = json.loads(done.stdout)
    assert result["slides"] == {"done": 1, "quarantined": 1, "skipped": 0}
    assert "bad" in done.stderr


@pytest.mark.slow
def test_a_slide_that_kills_its_worker_every_time_is_found_among_others(
    many: Path, make_extract: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine import extract, job_slots

    (tmp_path / "deadly.py").write_text(DEADLY)
    monkeypatch.syspath_prepend(str(tmp_path))
    import deadly  # type: ignore[import-not-found]

    monkeypatch.setattr(extract, "Extractor", deadly.Deadly)
    monkeypatch.setattr(job_slots, "TRIES", 2)
    result = extract.run(make_extract(tmp_path / "store", "batch_size=4", dataset=many), local=True)
    assert result["slides"] == {"done": 11, "quarantined": 1, "skipped": 0}
    assert result["failures"] == [{"slide_id": "copy-05", "reason": "the process that read it crashed 2 times"}]


DEADLY = """
import os
from engine.extraction.worker import Extractor

class Deadly(Extractor):
    def open(self, task):
        if task.slide_id == "copy-05":
            os._exit(1)
        return super().open(task)
"""


def test_two_runs_at_once_are_refused(many: Path, make_extract: Any, run_here: Any, tmp_path: Path) -> None:
    from sharding.lock import LockedError, folder_lock

    (tmp_path / "store").mkdir()
    with folder_lock(tmp_path / "store"), pytest.raises(LockedError):
        run_here(make_extract(tmp_path / "store", dataset=many))
