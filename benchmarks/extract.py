"""`engine bench extract`: patches to embeddings beside the encoder alone, and beside the usual loop over slides.

Ours is a worker of `engine extract` with all that it does: samples are checked, slides are written to a store. The
encoder alone embeds tensors that are there already. The usual loop has a DataLoader for each slide, with PIL and
torchvision's transforms, and saves a tensor for each slide; it reads the same stored JPEG patches (`pil_loader`) or the
slide by OpenSlide (`openslide_loader`). With the one-layer encoder reading is the limit, with HIPT's patch ViT the
encoder is. Everyone has the same core, or, on a GPU, the same cores.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.harness import OURS, CannotRunError, Case, Run, Setting, against_peers, every_core, play
from benchmarks.slides import painted
from engine.config import apply_overrides, build, read_recipe
from engine.extract_recipe import ExtractRecipe, build_extract_recipe
from engine.extraction.agreement import EncoderSpec, agree
from engine.extraction.encoders import Encoder
from engine.extraction.planning import open_source, slide_tasks
from engine.extraction.sources import SlideTask
from engine.extraction.worker import ExtractJob, Extractor, WorkerSpec
from engine.recipes import ShardRecipe
from engine.shard import run as shard
from engine.stores import begin_store, finish_store
from sharding.readers.openslide_reader import openslide

EncoderName = Literal["one_layer", "hipt_patch"]

_PX = 256
_MEAN = _STD = (0.5, 0.5, 0.5)
# Patches of a round: a slide's worth where reading is the limit, some batches where the encoder is.
_PATCHES: dict[str, int] = {"one_layer": 1536, "hipt_patch": 96}
_GPU_PATCHES = 100_000
_PEER_SHARE = 3  # of the patches: the usual loop needs many times as long
_BATCH: dict[str, int] = {"one_layer": 64, "hipt_patch": 16}


class OneLayer(nn.Module):
    """A convolution of 16 x 16 px with 32 channels, averaged over places."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 32, 16, 16)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(images).mean(dim=(2, 3))
        return out


class OneLayerEncoder(Encoder):
    """OneLayer in the place of the encoder that the spec describes."""

    def __init__(self, spec: EncoderSpec, device: str) -> None:
        super().__init__(spec, device)
        self.embed = OneLayer().to(self.device)
        self.dim = 32


class OneLayerExtractor(Extractor):
    """A worker with OneLayer."""

    def make_encoder(self, spec: EncoderSpec, device: str) -> Encoder:
        """See Extractor."""
        return OneLayerEncoder(spec, device)


@dataclass(frozen=True, slots=True)
class _Work:
    """What everyone embeds: `tasks` are slides with their first patches, `slides` their files by id."""

    dataset: Path
    slides: dict[str, Path]
    tasks: list[SlideTask]
    sorted_rows: Path
    batch_size: int

    @property
    def patches(self) -> int:
        return sum(task.patches for task in self.tasks)


def _patches(setting: Setting, count: int, batch_size: int) -> _Work:
    place = setting.work / ("extract-quick" if setting.quick else "extract")
    files = painted(setting, "chroma_420")
    recipe = build(
        ShardRecipe,
        apply_overrides(read_recipe("shard", "shard/lossless256"), [f"slides={files[0].parent}", f"out={place}/set"]),
    )
    if not (recipe.out / "dataset.json").exists():
        with every_core(setting):
            shard(recipe, local=True)
    tasks = slide_tasks(extract := _recipe(recipe.out, place), open_source(extract), place / "rows.parquet")[0]
    each = max(1, count // len(tasks))
    cut = [SlideTask(t.slide_id, min(each, t.patches), t.identity, first=t.first) for t in tasks]
    return _Work(recipe.out, {file.stem: file for file in files}, cut, place / "rows.parquet", batch_size)


def _recipe(dataset: Path, place: Path) -> ExtractRecipe:
    settings = [f"dataset={dataset}", f"out={place / 'store'}", "weights=random", "workers=1"]
    return build_extract_recipe(apply_overrides(read_recipe("extract", "extract/hipt_patch"), settings))


def _spec(work: _Work, *, gpu: bool) -> EncoderSpec:
    source = open_source(recipe := _recipe(work.dataset, work.dataset.parent))
    recipe = recipe.model_copy(update={"batch_size": work.batch_size})
    return agree(
        recipe,
        patch_px=source.patch_px,
        mpp=source.mpp,
        stride_px=source.stride_px,
        region_patches=None,
        precision="bfloat16" if gpu else "float32",
    )


def _ours(work: _Work, make: type[Extractor], store: Path, *, gpu: bool, threads: int) -> tuple[Run, Encoder]:
    """Our worker, and its encoder. `store` is the folder that every run is given."""
    worker = make(WorkerSpec(store, _spec(work, gpu=gpu), work.dataset, work.sorted_rows, threads, gpu))

    def run(out: Path) -> int:
        assert out == store
        begin_store(out, {"dtype": "float16"})
        results = worker(ExtractJob(tuple(work.tasks)))
        finish_store(out)
        assert all(result.status == "done" for result in results), results
        return sum(result.patches for result in results)

    return run, worker.encoder


def _alone(encoder: Encoder, work: _Work) -> Run:
    """The encoder on normalised tensors that lie on its device."""
    images = torch.randn(work.batch_size, 3, _PX, _PX, device=encoder.device)

    def run(_: Path) -> int:
        batches = -(-work.patches // work.batch_size)
        with torch.inference_mode(), encoder.precision():
            for _batch in range(batches):
                encoder.embed(images)
        if images.is_cuda:
            torch.cuda.synchronize()
        return batches * work.batch_size

    return run


class _Patches(Dataset[torch.Tensor]):
    """A slide's patches, each decoded by PIL when it is asked for."""

    def __init__(self, images: Sequence[Callable[[], Image.Image]]) -> None:
        self._images = images
        self._transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(_MEAN, _STD)])

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, number: int) -> torch.Tensor:
        tensor: torch.Tensor = self._transform(self._images[number]())
        return tensor


def _slide_by_slide(
    encoder: Encoder, work: _Work, read: Callable[[SlideTask], Sequence[Callable[[], Image.Image]]], *, workers: int
) -> Run:
    """A DataLoader for each slide, in this process (on one core further ones only cost), else in `workers` others."""

    def run(out: Path) -> int:
        done = 0
        for task in work.tasks:
            loader = DataLoader(_Patches(read(task)), work.batch_size, num_workers=workers, pin_memory=workers > 0)
            found = []
            with torch.inference_mode(), encoder.precision():
                for batch in loader:
                    found.append(encoder.embed(batch.to(encoder.device, non_blocking=True)).float().cpu())
            torch.save(torch.cat(found), out / f"{task.slide_id}.pt")
            done += sum(map(len, found))
        return done

    return run


def _stored(work: _Work, task: SlideTask) -> list[Callable[[], Image.Image]]:
    rows = pq.read_table(work.dataset / "index.parquet", columns=["slide_id", "shard", "offset", "length"]).to_pylist()
    chosen = [row for row in rows if row["slide_id"] == task.slide_id][: task.patches]
    shards = {row["shard"]: open(work.dataset / "shards" / f"{row['shard']}.tar", "rb") for row in chosen}  # noqa: SIM115

    def image(row: dict[str, Any]) -> Image.Image:
        payload = os.pread(shards[row["shard"]].fileno(), row["length"], row["offset"])
        return Image.open(io.BytesIO(payload)).convert("RGB")

    return [partial(image, row) for row in chosen]


def _on_slide(work: _Work, task: SlideTask) -> list[Callable[[], Image.Image]]:
    table = pq.read_table(
        work.sorted_rows, columns=["x0", "y0", "level", "read_px"], filters=[("slide_id", "=", task.slide_id)]
    )
    slide = openslide.OpenSlide(work.slides[task.slide_id])

    def image(x0: int, y0: int, level: int, read_px: int) -> Image.Image:
        return slide.read_region((x0, y0), level, (read_px, read_px)).convert("RGB")

    return [partial(image, **row) for row in table.slice(0, task.patches).to_pylist()]


def _share(work: _Work) -> _Work:
    tasks = [SlideTask(t.slide_id, max(1, t.patches // _PEER_SHARE), t.identity, first=t.first) for t in work.tasks]
    return _Work(work.dataset, work.slides, tasks, work.sorted_rows, work.batch_size)


def _contenders(setting: Setting, name: EncoderName, *, gpu: bool, threads: int) -> Iterator[tuple[str, Run]]:
    count = _GPU_PATCHES if gpu else _PATCHES[name]
    work = _patches(setting, 16 if setting.quick else count, 256 if gpu else _BATCH[name])
    make = OneLayerExtractor if name == "one_layer" else Extractor
    ours, encoder = _ours(work, make, setting.work / "out", gpu=gpu, threads=threads)
    part = _share(work) if name == "one_layer" or gpu else work
    workers = threads if gpu else 0
    yield OURS, ours
    yield "model_alone", _alone(encoder, work)
    yield "pil_loader", _slide_by_slide(encoder, part, partial(_stored, part), workers=workers)
    if name == "one_layer":
        yield "openslide_loader", _slide_by_slide(encoder, part, partial(_on_slide, part), workers=workers)


def _on_one_core(setting: Setting, name: EncoderName) -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return against_peers(play(dict(_contenders(setting, name, gpu=False, threads=1)), setting), "patches/s")
    finally:
        torch.set_num_threads(threads)


def _on_gpu(setting: Setting, name: EncoderName) -> dict[str, Any]:
    if not torch.cuda.is_available():
        raise CannotRunError("it needs an NVIDIA GPU, and torch finds none on this machine")
    with every_core(setting):
        threads = len(setting.cores)
        return against_peers(play(dict(_contenders(setting, name, gpu=True, threads=threads)), setting), "patches/s")


CASES: dict[str, Case] = {
    "one_layer": partial(_on_one_core, name="one_layer"),
    "hipt_patch": partial(_on_one_core, name="hipt_patch"),
    "gpu_one_layer": partial(_on_gpu, name="one_layer"),
    "gpu_hipt_patch": partial(_on_gpu, name="hipt_patch"),
}
