"""How extraction scales over nodes: `python -P -m benchmarks.extract_cluster WORK [ROUNDS]`.

Four logical Ray nodes on this machine, with one core each, against one; and four of which one is killed when 30 % of
the slides are done, and not replaced. Every read waits first, as one from a far store does: the nodes share the cores
of one machine, so what is measured is how work is handed out and taken back, not how fast patches are made.

One node is measured once; four, and four less one, in turns for as many rounds as are asked for (5). Prints one JSON
object: the seconds from the start of the first job, of every round; the median of the rounds' `speed_up` of four nodes
over one and of their `delay` of the end by the kill, with [min, max]; and `ideal_delay`: what the loss of a quarter of
the cluster for the rest of the run costs at least.
"""

from __future__ import annotations

import functools
import json
import shutil
import sys
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from ray.cluster_utils import Cluster

from benchmarks.extract import OneLayerExtractor
from engine.cluster import Crash, fan_out_to_workers
from engine.config import apply_overrides
from engine.extract_recipe import build_extract_recipe
from engine.extraction.agreement import agree
from engine.extraction.planning import open_source, slide_tasks
from engine.extraction.sources import OpenSlide, SlideTask
from engine.extraction.worker import ExtractJob, WorkerSpec
from engine.recipes import ShardRecipe
from engine.shard import run as shard
from engine.stores import begin_store, finish_store, verify_store
from engine.synth import run as synth

_SLIDES = 480
_PATCHES = 8  # of a slide: one read
_LATENCY_S = 0.6
_NODES = 4
_KILL_AT = 0.3


class FarExtractor(OneLayerExtractor):
    """A worker whose reads wait. It begins when all workers are there: starting them is no part of what is measured."""

    def __init__(self, spec: WorkerSpec, number: int, *, workers: int) -> None:
        super().__init__(spec, number)
        ready = spec.sorted_rows.parent / "ready"
        (ready / str(time.time_ns())).touch()
        while len(list(ready.iterdir())) < workers:
            time.sleep(0.01)

    def open(self, task: SlideTask) -> OpenSlide:
        """See Extractor."""
        opened = super().open(task)
        submit = opened.submit

        def submit_late(pool: ThreadPoolExecutor, first: int, out: Any) -> list[Future[dict[int, str]]]:
            waiting = pool.submit(time.sleep, _LATENCY_S)
            return [pool.submit(_after, waiting), *submit(pool, first, out)]

        opened.submit = submit_late  # type: ignore[method-assign]
        return opened


def _after(waiting: Future[None]) -> dict[int, str]:
    waiting.result()
    return {}


def measure(work: Path, nodes: int, *, kill: bool = False) -> dict[str, Any]:
    """Extract `_SLIDES` slides on `nodes` nodes; returns {seconds, slides, killed_at_s}."""
    dataset, out = _dataset(work), work / "store"
    shutil.rmtree(out, ignore_errors=True)
    for folder in (work / "ready", out):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    recipe = build_extract_recipe(
        apply_overrides({"encoder": {"name": "hipt_patch", "variant": "tiny", "depth": 1}}, [
            f"dataset={dataset}", f"out={out}", "weights=random", "normalisation=half", f"batch_size={_PATCHES}",
        ])
    )  # fmt: skip
    source = open_source(recipe)
    spec = agree(
        recipe, patch_px=source.patch_px, mpp=source.mpp, stride_px=source.stride_px, region_patches=None,
        precision="float32",
    )  # fmt: skip
    tasks, _ = slide_tasks(recipe, source, work / "rows.parquet")
    begin_store(out, {"dtype": "float16"})
    jobs = deque(
        ExtractJob((SlideTask(t.slide_id, min(t.patches, _PATCHES), t.identity, first=t.first),)) for t in tasks
    )
    worker = WorkerSpec(out, spec, dataset, work / "rows.parquet", 1, gpu=False)
    make = functools.partial(FarExtractor, worker, workers=nodes)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        added = [cluster.add_node(num_cpus=1) for _ in range(nodes)]
        cluster.wait_for_nodes()
        done, killed_at = 0, None
        lose = threading.Thread(target=cluster.remove_node, args=(added[-1],), kwargs={"allow_graceful": False})
        for finished in fan_out_to_workers(make, jobs, workers=nodes, cores=1, gpus=0, address=cluster.address):
            assert not isinstance(finished.result, Crash), finished
            done += len(finished.result)
            ended = time.time()  # closing the cluster comes after
            if kill and killed_at is None and done >= _KILL_AT * len(tasks):
                killed_at = time.time()
                lose.start()  # in a thread: it takes seconds, and who hands out jobs goes on meanwhile
        if killed_at is not None:
            lose.join()
    finally:
        cluster.shutdown()
    began = max(path.stat().st_mtime for path in (work / "ready").iterdir())
    finish_store(out)
    assert done == len(tasks)
    assert verify_store(out)["ok"]
    return {"seconds": ended - began, "slides": done, "killed_at_s": None if killed_at is None else killed_at - began}


def _dataset(work: Path) -> Path:
    """Copies of one small slide that differ in bytes behind the last IFD, sharded slide by slide."""
    if not (work / "dataset" / "dataset.json").exists():
        synth(work / "painted", slides=1, size=2048, seed=1, workers=1)
        data = next((work / "painted").glob("*.svs")).read_bytes()
        (work / "slides").mkdir(parents=True, exist_ok=True)
        for number in range(_SLIDES):
            (work / "slides" / f"copy-{number:03d}.svs").write_bytes(data + number.to_bytes(16))
        shard(ShardRecipe(slides=str(work / "slides"), out=work / "dataset", permute="slide"), local=True)
    return work / "dataset"


def main() -> None:
    work = Path(sys.argv[1]).expanduser().resolve()
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    work.mkdir(parents=True, exist_ok=True)
    one = measure(work, 1)["seconds"]
    four, killed = [], []
    for number in range(1, rounds + 1):
        four.append(measure(work, _NODES))
        killed.append(measure(work, _NODES, kill=True))
        print(f"round {number} of {rounds}: {four[-1]}, {killed[-1]}", file=sys.stderr, flush=True)
    whole = [run["seconds"] for run in four]
    shares = [lost["killed_at_s"] / seconds for lost, seconds in zip(killed, whole, strict=True)]
    result = {
        "one_node_s": one,
        "four_nodes_s": whole,
        "speed_up": _summary([one / seconds for seconds in whole]),
        "killed_s": [lost["seconds"] for lost in killed],
        "killed_at_s": [lost["killed_at_s"] for lost in killed],
        "delay": _summary([lost["seconds"] / seconds for lost, seconds in zip(killed, whole, strict=True)]),
        "ideal_delay": _summary([share + (1 - share) * _NODES / (_NODES - 1) for share in shares]),
    }
    print(json.dumps(_rounded(result)))


def _summary(values: list[float]) -> dict[str, Any]:
    return {"median": median(values), "spread": [min(values), max(values)]}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return round(value, 3)


if __name__ == "__main__":
    main()
