"""`engine shard`: the same bytes whoever works, readable by others, finished after any death, never mixed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import polars as pl
import pytest
import simplejpeg
import wds2idx  # type: ignore[import-untyped]
import webdataset
import yaml

from engine import shard
from engine.config import UsageError, build, read_recipe
from engine.recipes import ShardRecipe
from sharding.lock import LockedError, folder_lock
from sharding.verify import verify_dataset

Made = tuple[Path, dict[str, Any]]
MakeRecipe = Callable[..., ShardRecipe]
KEYS = ("context_px=256", "patches_per_shard=16")
LEFT_OVER = (".tmp-", ".work", ".lock")


def _left_over(dataset: Path) -> list[str]:
    return [str(p.relative_to(dataset)) for p in dataset.rglob("*") if p.name.startswith(LEFT_OVER)]


def _digest(dataset: Path) -> str:
    return str(json.loads((dataset / "dataset.json").read_text())["digest"])


# --- the same bytes


def test_two_local_workers_give_the_same_bytes_as_one(
    sharded: Made, slides: Path, tmp_path: Path, make_recipe: MakeRecipe, content: Callable[[Path], dict[str, bytes]]
) -> None:
    result = shard.run(make_recipe(slides, tmp_path / "two", workers=2), local=True)
    assert result["digest"] == sharded[1]["digest"]
    assert content(tmp_path / "two") == content(sharded[0])


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_ray_gives_the_same_bytes_as_local_processes(
    sharded: Made, slides: Path, command: Any, content: Callable[[Path], dict[str, bytes]], workers: int
) -> None:
    done = command.run("shard", "shard/tiny", f"slides={slides}", "out=ray", *KEYS, f"workers={workers}", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["digest"] == sharded[1]["digest"]
    assert content(command.folder / "ray") == content(sharded[0])
    assert command.survivors(20) == []


def test_the_place_of_slides_and_dataset_is_in_no_byte(
    sharded: Made, slides: Path, tmp_path: Path, make_recipe: MakeRecipe, content: Callable[[Path], dict[str, bytes]]
) -> None:
    moved = shutil.copytree(slides, tmp_path / "elsewhere")
    result = shard.run(make_recipe(moved, tmp_path / "out"), local=True)
    assert result["digest"] == sharded[1]["digest"]
    assert content(tmp_path / "out") == content(sharded[0])
    assert all(str(slides).encode() not in data for data in content(sharded[0]).values())


def test_another_seed_is_another_order_of_the_same_patches(
    sharded: Made, slides: Path, tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    shard.run(make_recipe(slides, tmp_path / "out", seed=1), local=True)
    one, other = (pl.read_parquet(d / "index.parquet") for d in (sharded[0], tmp_path / "out"))
    assert one["sample_id"].to_list() != other["sample_id"].to_list()
    assert set(one["sample_id"]) == set(other["sample_id"])


def test_a_fresh_dataset_verifies_and_its_counts_agree(sharded: Made) -> None:
    dataset, result = sharded
    index = pl.read_parquet(dataset / "index.parquet")
    assert verify_dataset(dataset) == {"ok": True, "samples": len(index), "bad": []}
    assert result["patches"] == {"copy": len(index), "decode": 0, "quarantined": 0}
    assert result["slides"] == {"done": 3, "quarantined": 0}
    tars = list((dataset / "shards").glob("*.tar"))
    assert result["shards"] == len(tars) >= 4
    assert result["bytes"] == sum(tar.stat().st_size for tar in tars)
    assert _left_over(dataset) == []


# --- what others read


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves its files to the collector
def test_webdataset_reads_every_sample(sharded: Made) -> None:
    dataset = sharded[0]
    index = pl.read_parquet(dataset / "index.parquet")
    urls = sorted(str(tar) for tar in (dataset / "shards").glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in samples] == index["key"].to_list()
    assert not any("." in sample["__key__"] for sample in samples)
    assert [len(sample["jpg"]) for sample in samples] == index["length"].to_list()
    assert {tuple(simplejpeg.decode_jpeg(sample["jpg"], strict=True).shape) for sample in samples} == {(256, 256, 3)}


def test_tar_and_index_agree_and_hold_no_owner_or_time(sharded: Made) -> None:
    dataset = sharded[0]
    index = pl.read_parquet(dataset / "index.parquet")
    for path in (dataset / "shards").glob("*.tar"):
        rows = index.filter(pl.col("shard") == path.stem)
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        assert [member.name for member in members] == [f"{key}.jpg" for key in rows["key"]]
        assert [member.offset_data for member in members] == rows["offset"].to_list()
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}


def test_the_idx_is_what_wds2idx_writes(sharded: Made, tmp_path: Path) -> None:
    for tar in sorted((sharded[0] / "shards").glob("*.tar")):
        theirs = tmp_path / f"{tar.stem}.idx"
        with contextlib.redirect_stdout(io.StringIO()), wds2idx.IndexCreator(str(tar), str(theirs)) as creator:
            creator.create_index()
        assert tar.with_suffix(".idx").read_bytes() == theirs.read_bytes()


_DALI = """
import json, sys
import numpy as np
from nvidia.dali import fn, pipeline_def, types

paths, count = sys.argv[2:], int(sys.argv[1])

@pipeline_def(batch_size=count, num_threads=1, device_id=None)
def read():
    jpeg = fn.readers.webdataset(
        paths=paths, index_paths=[p[:-4] + ".idx" for p in paths], ext=["jpg"], missing_component_behavior="error"
    )
    return jpeg, fn.decoders.image(jpeg, device="cpu", output_type=types.RGB)

pipeline = read()
pipeline.build()
jpegs, images = pipeline.run()
np.savez(sys.stdout.buffer, images=images.as_array(), **{f"jpeg{i}": np.array(jpegs[i]) for i in range(count)})
"""


def test_dali_reads_every_sample_with_our_idx(sharded: Made, tmp_path: Path) -> None:
    dataset = sharded[0]
    index = pl.read_parquet(dataset / "index.parquet")
    tars = [str(tar) for tar in sorted((dataset / "shards").glob("*.tar"))]
    (tmp_path / "read.py").write_text(_DALI)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "read.py"), str(len(index)), *tars], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    arrays = np.load(io.BytesIO(done.stdout))
    for i, row in enumerate(index.iter_rows(named=True)):
        with open(dataset / "shards" / f"{row['shard']}.tar", "rb") as file:
            payload = os.pread(file.fileno(), row["length"], row["offset"])
        assert arrays[f"jpeg{i}"].tobytes() == payload
        assert np.array_equal(arrays["images"][i], simplejpeg.decode_jpeg(payload)), row


def test_patches_of_a_real_slide_are_openslides_pixels_at_the_indexed_place(
    real_slide: Path, tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    dataset = tmp_path / "real"
    result = shard.run(make_recipe(real_slide, dataset, mpp="native"), local=True)
    assert result["slides"] == {"done": 1, "quarantined": 0}
    index = pl.read_parquet(dataset / "index.parquet")
    assert len(index) >= 20
    errors, ratios = [], []
    with openslide.OpenSlide(str(real_slide)) as slide:
        for row in index.iter_rows(named=True):
            with open(dataset / "shards" / f"{row['shard']}.tar", "rb") as file:
                stored = simplejpeg.decode_jpeg(os.pread(file.fileno(), row["length"], row["offset"]))
            place, side = (row["x0"], row["y0"]), row["read_px"]
            truth = np.asarray(slide.read_region(place, 0, (side, side)))[:, :, :3]
            difference = stored.astype(np.float64) - truth
            errors.append(float(np.abs(difference).mean()))
            ratios.append(10 * np.log10(255**2 / float(np.square(difference).mean())))
    # JPEG of quality 85 without subsampling on top of the slide's own; a shift of one pixel gives 15 dB less.
    assert max(errors) < MAX_MEAN_ERROR
    assert min(ratios) > MIN_PSNR_DB
    assert index["mpp"].to_list() == pytest.approx([0.499] * len(index))
    print(f"largest mean difference {max(errors):.2f} grey levels, smallest PSNR {min(ratios):.1f} dB")


MAX_MEAN_ERROR = 4.0
MIN_PSNR_DB = 33.0


# --- reruns and refusals


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


# --- deaths

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
    for job in jobs:
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
    recipe = ShardRecipe(slides=slides, out=out, workers=1, patches_per_shard=8, reader="openslide")
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
    return str(shard.run(make_recipe(many_slides, out, workers=2), local=True)["digest"])


def _moments(command: Any, out: Path) -> dict[str, Callable[[], bool]]:
    def records() -> int:
        return len(list((out / ".work").glob("[!.]*.json")))

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
    assert (tmp_path / "errors").read_text().splitlines() == [
        "engine: interrupted; run the same command again to go on"
    ]
    assert command.survivors(10) == []
    assert not (out / ".lock").exists()
    done = command.run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["digest"] == many_digest
    assert _left_over(out) == []


# --- slides of every kind


def test_a_csv_gives_ids_spacings_and_columns_to_the_dataset(
    slides: Path, tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    source = tmp_path / "list.csv"
    names = [slides / f"synth-000{i}.svs" for i in range(3)]
    source.write_text(
        "slide_id,path,mpp,label,age\n"
        f"as it says,{names[0]},,tumour,61\n"
        f"finer,{names[1]},0.25,normal,\n"
        f"twice,{names[0]},,tumour,7\n"
        f"TCGA-A1.B2.C3,{names[2]},,normal,9\n"
    )
    result = shard.run(make_recipe(source, tmp_path / "out"), local=True)
    table = pl.read_parquet(tmp_path / "out" / "slides.parquet")
    rows = {row["slide_id"]: row for row in table.iter_rows(named=True)}
    assert list(rows) == sorted(rows)
    assert {key: (row["label"], row["age"]) for key, row in rows.items()} == {
        "as it says": ("tumour", 61),
        "finer": ("normal", None),
        "twice": ("tumour", 7),
        "TCGA-A1.B2.C3": ("normal", 9),
    }
    assert (rows["finer"]["mpp"], rows["finer"]["mpp_source"]) == (0.25, "override")
    assert (rows["as it says"]["mpp"], rows["as it says"]["mpp_source"]) == (0.5, "aperio")
    assert rows["twice"]["status"] == "quarantined"
    assert "the same file as slide as it says" in rows["twice"]["reason"]
    assert result["slides"] == {"done": 3, "quarantined": 1}
    assert [failure["slide_id"] for failure in result["failures"]] == ["twice"]
    index = pl.read_parquet(tmp_path / "out" / "index.parquet")
    assert set(index["slide_id"]) == {"as it says", "finer", "TCGA-A1.B2.C3"}
    assert index["sample_id"].n_unique() == len(index)
    # At half the spacing a window of 256 px takes 512 px of the slide.
    assert set(index.filter(pl.col("slide_id") == "finer")["read_px"]) == {512}
    names_on_disk = [path.name for path in (tmp_path / "out" / "shards").iterdir()]
    assert not any("TCGA" in name for name in names_on_disk)
    assert b"TCGA" not in b"".join(path.read_bytes() for path in (tmp_path / "out" / "shards").glob("*.tar"))


def test_a_slide_listed_but_missing_is_quarantined_and_the_others_are_done(
    slides: Path, tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    source = tmp_path / "list.csv"
    source.write_text(f"path\n{slides / 'synth-0000.svs'}\n{tmp_path / 'gone.svs'}\n")
    result = shard.run(make_recipe(source, tmp_path / "out"), local=True)
    assert result["slides"] == {"done": 1, "quarantined": 1}
    assert "No such file" in result["failures"][0]["reason"]
    assert shard.run(make_recipe(source, tmp_path / "out"), local=True)["digest"] == result["digest"]


def test_broken_slides_are_quarantined_with_a_reason_each_and_the_others_are_as_without_them(
    sharded: Made, slides: Path, tmp_path: Path, make_recipe: MakeRecipe, content: Callable[[Path], dict[str, bytes]]
) -> None:
    folder = shutil.copytree(slides, tmp_path / "slides")
    whole = (slides / "synth-0000.svs").read_bytes()
    (folder / "text.svs").write_text("this is no slide\n" * 1000)
    (folder / "empty.svs").write_bytes(b"")
    (folder / "short.svs").write_bytes(whole[: len(whole) // 2])
    (folder / "tiny.svs").write_bytes(whole[:9])
    result = shard.run(make_recipe(folder, tmp_path / "out"), local=True)
    assert result["slides"] == {"done": 3, "quarantined": 4}
    reasons = {failure["slide_id"]: failure["reason"] for failure in result["failures"]}
    assert set(reasons) == {"text", "empty", "short", "tiny"}
    assert all(reason and "\n" not in reason for reason in reasons.values())
    assert "empty" in reasons["empty"]
    assert content(tmp_path / "out") == content(sharded[0])
    assert (tmp_path / "out" / "log.jsonl").read_text().count("quarantined") == 4


def test_a_slide_of_a_coarse_spacing_is_done_or_quarantined_and_ends_no_run(
    slides: Path, tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    source = tmp_path / "list.csv"
    source.write_text(f"path,mpp\n{slides / 'synth-0000.svs'},12\n{slides / 'synth-0001.svs'},0.5\n")
    result = shard.run(make_recipe(source, tmp_path / "out", mpp="native"), local=True)
    assert result["slides"]["done"] + result["slides"]["quarantined"] == 2
    assert "synth-0001" in set(pl.read_parquet(tmp_path / "out" / "index.parquet")["slide_id"])


def test_a_set_of_nothing_but_broken_slides_is_an_empty_dataset_that_verifies(
    tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "text.svs").write_text("no slide")
    result = shard.run(make_recipe(tmp_path / "slides", tmp_path / "out"), local=True)
    assert (result["shards"], result["slides"]) == (0, {"done": 0, "quarantined": 1})
    assert verify_dataset(tmp_path / "out")["ok"]


# --- the dry run and the saved recipe


@pytest.mark.parametrize("patches_per_shard", [16, 2])
def test_a_dry_run_writes_nothing_and_counts_what_the_run_makes(
    slides: Path,
    tmp_path: Path,
    make_recipe: MakeRecipe,
    listing: Callable[[Path], dict[str, tuple[int, int]]],
    patches_per_shard: int,
) -> None:
    folder = shutil.copytree(slides, tmp_path / "slides")
    (folder / "text.svs").write_text("no slide")
    recipe = make_recipe(folder, tmp_path / "out", patches_per_shard=patches_per_shard)
    before = listing(tmp_path)
    planned = shard.dry_run(recipe)
    assert listing(tmp_path) == before
    made = shard.run(recipe, local=True)
    for key in ("slides", "patches", "shards"):
        assert planned[key] == made[key], key
    assert planned["bytes"] == pytest.approx(made["bytes"], rel=0.15)
    assert [f["slide_id"] for f in planned["failures"]] == [f["slide_id"] for f in made["failures"]] == ["text"]
    assert planned["dry_run"] is True
    assert "dry_run" not in made


def test_the_saved_recipe_given_back_makes_the_same_dataset(dataset: Path, tmp_path: Path) -> None:
    values = read_recipe("shard", str(dataset / "recipe.yaml"))
    values["out"] = str(tmp_path / "again")
    result = shard.run(build(ShardRecipe, values), local=True)
    assert result["digest"] == _digest(dataset)


def test_the_saved_recipe_means_the_same_from_another_folder(
    slides: Path, tmp_path: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(slides.parent)
    out = tmp_path / "out"
    first = shard.run(make_recipe(Path("slides"), out), local=True)
    monkeypatch.chdir(tmp_path)
    values = yaml.safe_load((out / "recipe.yaml").read_text())
    values["out"] = str(tmp_path / "again")
    assert shard.run(build(ShardRecipe, values), local=True)["digest"] == first["digest"]
