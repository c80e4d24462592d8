"""`engine shard` again: finished after any death, never mixed, never written twice."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from engine import shard
from engine.config import UsageError
from engine.recipes import ShardRecipe
from sharding.lock import LockedError, folder_lock
from sharding.verify import verify_dataset

Made = tuple[Path, dict[str, Any]]
MakeRecipe = Callable[..., ShardRecipe]
# Four groups of three slides.
KEYS = ("context_px=256", "patches_per_shard=16", "group_slides=3")
LEFT_OVER = (".tmp-", ".work", ".lock")


def _left_over(dataset: Path) -> list[str]:
    return [str(p.relative_to(dataset)) for p in dataset.rglob("*") if p.name.startswith(LEFT_OVER)]


def _digest(dataset: Path) -> str:
    return str(json.loads((dataset / "dataset.json").read_text())["digest"])


def test_a_finished_dataset_is_found_finished_and_nothing_is_written(
    sharded: Made,
    slides: Path,
    make_recipe: MakeRecipe,
    listing: Callable[[Path], dict[str, tuple[int, int]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    dataset, first = sharded
    before = listing(dataset)
    again = shard.run(make_recipe(slides, dataset, workers=2), local=True)
    assert listing(dataset) == before
    assert {key: again[key] for key in first if key != "seconds"} == {k: first[k] for k in first if k != "seconds"}
    assert "nothing was written" in capsys.readouterr().err


def test_a_manifest_that_comes_after_the_dataset_is_said_to_check_nothing(
    sharded: Made, slides: Path, tmp_path: Path, make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "md5"
    manifest.write_text(f"{'0' * 32}  synth-0000.svs\n")
    shard.run(make_recipe(slides, sharded[0], md5_manifest=manifest), local=True)
    assert "no MD5 was compared now" in capsys.readouterr().err


def test_what_a_killed_run_left_in_a_folder_of_plans_goes_in_time(
    slides: Path, tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    plans = tmp_path / "plans"
    plans.mkdir()
    for name, age_s in ((".tmp-old.npz.7", 7200), (".tmp-new.npz.8", 10)):
        (plans / name).write_bytes(b"x")
        os.utime(plans / name, (time.time() - age_s, time.time() - age_s))
    shard.dry_run(make_recipe(slides, tmp_path / "out", plans=plans))
    assert [path.name for path in plans.glob(".tmp-*")] == [".tmp-new.npz.8"]


def test_another_recipe_into_a_finished_dataset_is_refused_and_says_what_differs(
    sharded: Made,
    slides: Path,
    make_recipe: MakeRecipe,
    listing: Callable[[Path], dict[str, tuple[int, int]]],
) -> None:
    before = listing(sharded[0])
    with pytest.raises(UsageError, match="quality=85 there, 90 now"):
        shard.run(make_recipe(slides, sharded[0], quality=90), local=True)
    assert listing(sharded[0]) == before


@pytest.mark.parametrize("change", ["more", "fewer", "other bytes", "other spacing"])
def test_other_slides_into_a_finished_dataset_are_refused(
    sharded: Made,
    slides: Path,
    tmp_path: Path,
    make_recipe: MakeRecipe,
    change: str,
    listing: Callable[[Path], dict[str, tuple[int, int]]],
) -> None:
    source = tmp_path / "slides.csv"
    rows = [[f"synth-000{i}", str(slides / f"synth-000{i}.svs"), ""] for i in range(3)]
    if change == "more":
        rows.append(["new", str(slides / "synth-0000.svs"), ""])
    elif change == "fewer":
        rows.pop()
    elif change == "other bytes":
        rows[0][1] = str(tmp_path / "synth-0000.svs")
        Path(rows[0][1]).write_bytes((slides / "synth-0000.svs").read_bytes() + b"x")
    else:
        rows[0][2] = "0.25"
    source.write_text("slide_id,path,mpp\n" + "\n".join(",".join(row) for row in rows) + "\n")
    before = listing(sharded[0])
    with pytest.raises(UsageError, match="made from other slides"):
        shard.run(make_recipe(source, sharded[0]), local=True)
    assert listing(sharded[0]) == before


def test_a_folder_of_other_things_and_a_file_are_refused(slides: Path, tmp_path: Path, make_recipe: MakeRecipe) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.docx").write_text("x")
    with pytest.raises(UsageError, match=r"not empty \(thesis.docx\)"):
        shard.run(make_recipe(slides, tmp_path / "full"), local=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        shard.run(make_recipe(slides, tmp_path / "file"), local=True)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.docx"]


def test_a_second_writer_is_refused_and_disturbs_nothing(slides: Path, tmp_path: Path, make_recipe: MakeRecipe) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with folder_lock(out):
        with pytest.raises(LockedError, match=f"process {os.getpid()}"):
            shard.run(make_recipe(slides, out), local=True)
        assert [p.name for p in out.iterdir()] == [".lock"]
    assert shard.run(make_recipe(slides, out), local=True)["slides"]["done"] == 3


def test_a_writer_that_finished_while_another_waited_is_not_written_over(
    slides: Path, tmp_path: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Between the look at the folder and its lock another process may begin and finish.
    out = tmp_path / "out"
    taken = shard.folder_lock
    digests = []

    @contextlib.contextmanager
    def late(folder: Path) -> Iterator[None]:
        monkeypatch.setattr(shard, "folder_lock", taken)
        digests.append(shard.run(make_recipe(slides, out, quality=90), local=True)["digest"])
        with taken(folder):
            yield

    monkeypatch.setattr(shard, "folder_lock", late)
    with pytest.raises(UsageError, match="another recipe"):
        shard.run(make_recipe(slides, out), local=True)
    assert [_digest(out)] == digests
    assert verify_dataset(out)["ok"]


def test_an_unfinished_dataset_of_another_recipe_is_not_continued(
    slides: Path, tmp_path: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard, "finish_dataset", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        shard.run(make_recipe(slides, tmp_path / "out"), local=True)
    monkeypatch.undo()
    with pytest.raises(UsageError, match=r"unfinished work of another recipe .*quality=85 there, 90 now"):
        shard.run(make_recipe(slides, tmp_path / "out", quality=90), local=True)


def _interrupted(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def test_a_spacing_that_was_corrected_meanwhile_is_taken_up_by_the_next_run(
    slides: Path, tmp_path: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, slide = tmp_path / "list.csv", slides / "synth-0000.svs"
    source.write_text(f"path,mpp\n{slide},0.5\n")
    recipe = make_recipe(source, tmp_path / "out")
    monkeypatch.setattr(shard, "finish_dataset", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        shard.run(recipe, local=True)
    monkeypatch.undo()
    source.write_text(f"path,mpp\n{slide},0.25\n")
    result = shard.run(recipe, local=True)
    fresh = shard.run(make_recipe(source, tmp_path / "fresh"), local=True)
    assert result["digest"] == fresh["digest"]
    assert pl.read_parquet(tmp_path / "out" / "slides.parquet")["mpp"].to_list() == [0.25]
    assert verify_dataset(tmp_path / "out")["ok"]


def test_a_slide_that_left_the_list_leaves_an_unfinished_dataset(
    sharded: Made, slides: Path, tmp_path: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(slides, tmp_path / "slides")
    recipe = make_recipe(folder, tmp_path / "out")
    monkeypatch.setattr(shard, "finish_dataset", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        shard.run(recipe, local=True)
    monkeypatch.undo()
    (folder / "synth-0001.svs").unlink()
    assert shard.run(recipe, local=True)["slides"]["done"] == 2
    assert verify_dataset(tmp_path / "out")["ok"]
    assert set(pl.read_parquet(tmp_path / "out" / "index.parquet")["slide_id"]) == {"synth-0000", "synth-0002"}
    assert {path.stem for path in (tmp_path / "out" / "qc").iterdir()} == {"synth-0000", "synth-0002"}


_DIE = """
import os, sys
from pathlib import Path

import numpy, openslide, polars, pyarrow.parquet, simplejpeg, tifffile
from engine import shard
from engine.cluster import Finished
from engine.recipes import ShardRecipe
from sharding.readers import openslide_reader

slides, folder = sys.argv[1], Path(sys.argv[2])
last = 0

def in_process(function, jobs, **_):
    while jobs:
        job = jobs.popleft()
        yield Finished(job, function(job))

shard.fan_out = in_process

def child(out, fatal):
    # Writes are counted, and the process ends just before number `fatal`.
    count = 0
    changes = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link"}

    def watch(event, arguments):
        nonlocal count
        if event == "open":
            path, mode, flags = arguments
            if not (isinstance(mode, str) and set(mode) & set("wax+")) and not flags & (os.O_CREAT | os.O_TRUNC):
                return
        elif event not in changes:
            return
        if not isinstance(arguments[0], int) and str(out) in os.fsdecode(arguments[0]):
            count += 1
            if count == fatal:
                os._exit(9)

    if fatal:
        sys.addaudithook(watch)
    recipe = ShardRecipe(slides=slides, out=out, workers=1, patches_per_shard=16, reader="openslide")
    os._exit(0 if shard.run(recipe, local=True)["patches"]["copy"] else 1)

def in_child(out, fatal):
    pid = os.fork()
    if not pid:
        try:
            child(out, fatal)
        finally:
            os._exit(77)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def tree(out):
    return {
        str(path.relative_to(out)): path.read_bytes() if path.is_file() else b""
        for path in out.rglob("*") if path.name != "log.jsonl" and path.name != "recipe.yaml"
    }

assert in_child(folder / "whole", 0) == 0
whole = tree(folder / "whole")
fatal = 1
while (ended := in_child(out := folder / f"died-{fatal}", fatal)) != 0:
    assert ended == 9, ended
    again = in_child(out, 0)
    found = tree(out)
    if again:
        print(f"write {fatal}: the rerun ended with {again}")
    elif found != whole:
        odd = sorted(k for k in found.keys() | whole.keys() if found.get(k) != whole.get(k))
        print(f"write {fatal}: {odd}")
    fatal += 1
print("deaths", fatal - 1)
"""


@pytest.mark.slow
def test_a_run_that_dies_before_any_of_its_writes_is_finished_by_the_next(slides: Path, tmp_path: Path) -> None:
    script = tmp_path / "die.py"
    script.write_text(_DIE)
    done = subprocess.run(
        [sys.executable, str(script), str(slides / "synth-0001.svs"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *wrong, last = done.stdout.splitlines()
    assert wrong == []
    assert int(last.removeprefix("deaths ")) > 30


def _until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    while not condition():
        assert process.poll() is None, f"the run ended with {process.returncode} before the moment came"
        time.sleep(0.002)


@pytest.fixture(scope="module")
def many_digest(many_slides: Path, tmp_path_factory: pytest.TempPathFactory, make_recipe: MakeRecipe) -> str:
    out = tmp_path_factory.mktemp("many") / "dataset"
    return str(shard.run(make_recipe(many_slides, out, workers=2, group_slides=3), local=True)["digest"])


def _moments(command: Any, out: Path) -> dict[str, Callable[[], bool]]:
    def records() -> int:
        return len(list((out / ".work" / "slides").glob("[!.]*.json")))

    return {
        "as the first worker starts": lambda: len(command.processes()) > 2,
        "after the first shard": lambda: any((out / "shards").glob("*.parquet")),
        "after six slides": lambda: records() > 6,
    }


@pytest.mark.parametrize("moment", ["as the first worker starts", "after the first shard", "after six slides"])
def test_a_killed_run_leaves_no_process_and_is_finished_by_the_next(
    command: Any, many_slides: Path, many_digest: str, tmp_path: Path, moment: str
) -> None:
    out = tmp_path / "out"
    arguments = ("shard", "shard/tiny", f"slides={many_slides}", f"out={out}", *KEYS, "workers=2", "--local")
    process = command.start(*arguments, errors=tmp_path / "errors")
    _until(_moments(command, out)[moment], process)
    process.kill()
    process.wait()
    assert command.survivors(10) == []
    assert not (out / "dataset.json").exists()
    done = command.run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["digest"] == many_digest
    assert _left_over(out) == []
    assert verify_dataset(out)["ok"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_run_on_ray_leaves_no_process_and_is_finished_by_the_next(
    command: Any, many_slides: Path, many_digest: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ("shard", "shard/tiny", f"slides={many_slides}", f"out={out}", *KEYS, "workers=2")
    process = command.start(*arguments, errors=tmp_path / "errors")
    _until(_moments(command, out)["after the first shard"], process)
    process.kill()
    process.wait()
    # Ray's own agents may wait for their dead cluster for minutes; what works on slides must be gone.
    assert [line for line in command.survivors(10) if "Agent" not in line] == []
    done = command.run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["digest"] == many_digest
    assert _left_over(out) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_so_in_one_line_and_is_finished_by_the_next(
    command: Any, many_slides: Path, many_digest: str, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    arguments = ("shard", "shard/tiny", f"slides={many_slides}", f"out={out}", *KEYS, "workers=2", "--local")
    process = command.start(*arguments, errors=tmp_path / "errors")
    _until(_moments(command, out)["after the first shard"], process)
    if number is signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    assert process.wait(60) == 130
    *before, last = (tmp_path / "errors").read_text().splitlines()
    assert last == "engine: interrupted; run the same command again to go on"
    assert all(line.startswith("shard: ") for line in before)
    assert command.survivors(10) == []
    assert not (out / ".lock").exists()
    done = command.run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["digest"] == many_digest
    assert _left_over(out) == []
