"""How extraction scales over nodes: `python -P -m benchmarks.extract_cluster WORK`.

Four logical Ray nodes on this machine, with one core each, against one; and four of which one is killed when 30 % of
the slides are done, and not replaced. Every read waits first, as one from a far store does: the nodes share the cores
of one machine, so what is measured is how work is handed out and taken back, not how fast patches are made.

Prints one JSON object: the seconds from the start of the first job, `speed_up` of four nodes over one, `delay` of the
end by the kill, and `ideal_delay`: what the loss of a quarter of the cluster for the rest of the run costs at least.
"""

from __future__ import annotations

import functools
import json
import shutil
import sys
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
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

_SLIDES = 240
_PATCHES = 8  # of a slide: one read
_LATENCY_S = 2.5
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
        for finished in fan_out_to_workers(make, jobs, workers=nodes, cores=1, gpus=0, address=cluster.address):
            assert not isinstance(finished.result, Crash), finished
            done += len(finished.result)
            ended = time.time()  # closing the cluster comes after
            if kill and killed_at is None and done >= _KILL_AT * len(tasks):
                killed_at = time.time()
                cluster.remove_node(added[-1], allow_graceful=False)
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
    work.mkdir(parents=True, exist_ok=True)
    one, four, killed = measure(work, 1), measure(work, _NODES), measure(work, _NODES, kill=True)
    share = killed["killed_at_s"] / four["seconds"]
    result = {
        "one_node_s": one["seconds"],
        "four_nodes_s": four["seconds"],
        "speed_up": one["seconds"] / four["seconds"],
        "killed_s": killed["seconds"],
        "killed_at_s": killed["killed_at_s"],
        "delay": killed["seconds"] / four["seconds"],
        "ideal_delay": share + (1 - share) * _NODES / (_NODES - 1),
    }
    print(json.dumps({key: round(value, 3) for key, value in result.items()}))


if __name__ == "__main__":
    main()
