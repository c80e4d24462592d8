"""`engine bench step`: what models make of batches that are there already.

On one core: a forward pass of the patch ViT beside timm's of the same size, and regions in one batch beside regions one
at a time. On a GPU: forward passes and training steps in bfloat16, as a share of the matrix products that it was
measured to do. Of training as a whole, with the loader: `train_step.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, cast

import timm
import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import train_step
from benchmarks.harness import OURS, CannotRunError, Case, Run, Setting, against_peers, alone, play
from models import build_model
from models.hipt import HIPT4K
from models.vit import ViT

_IMAGES, _QUICK_IMAGES = 16, 2
_REGIONS, _REGION_PX = 8, 1024
_QUICK_REGIONS, _QUICK_REGION_PX = 2, 256
_GPU_IMAGES, _GPU_PASSES = 256, 20
_MATRIX, _PRODUCTS = 8192, 50


@contextmanager
def _one_core() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _forward(model: Callable[[Tensor], Tensor], batches: list[Tensor]) -> Run:
    """A contender that puts the batches through the model; its unit is one image or region."""

    def run(_: Path) -> int:
        with torch.inference_mode():
            for batch in batches:
                model(batch)
        if batches[0].is_cuda:
            torch.cuda.synchronize()
        return sum(map(len, batches))

    return run


def _patch(setting: Setting, side: int) -> dict[str, Any]:
    images = torch.randn(_QUICK_IMAGES if setting.quick else _IMAGES, 3, side, side)
    peer = timm.create_model("vit_small_patch16_224", num_classes=0, img_size=side).eval()
    contenders = {OURS: _forward(build_model("hipt_patch").eval(), [images]), "timm": _forward(peer, [images])}
    with _one_core():
        return against_peers(play(contenders, setting), "images/s")


def _regions(setting: Setting, device: str = "cpu") -> dict[str, Any]:
    """Regions in one batch beside one at a time, by the same model and by the arithmetic of the published code."""
    count, side = (_QUICK_REGIONS, _QUICK_REGION_PX) if setting.quick else (_REGIONS, _REGION_PX)
    model = cast(HIPT4K, build_model("hipt_4k", bf16=device == "cuda").eval().to(device))
    published = cast(HIPT4K, build_model("hipt_4k").eval().to(device))
    for module in published.modules():
        if isinstance(module, Attention):
            module.fused_attn = False  # type: ignore[misc]  # writes attention out
    regions = torch.randn(count, 3, side, side, device=device)
    one_by_one = list(regions.split(1))
    contenders = {
        OURS: _forward(model, [regions]),
        "one_by_one": _forward(model, one_by_one),
        "as_published": _forward(partial(_as_published, published), one_by_one),
    }
    with _one_core():
        return against_peers(play(contenders, setting), "regions/s")


def _as_published(model: HIPT4K, region: Tensor) -> Tensor:
    """One square region, every token through every block, in float32."""
    side = region.shape[-1] // 256
    patches = region.unfold(2, 256, 256).unfold(3, 256, 256).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 256, 256)
    embeddings = _class_tokens(model.model256, patches)
    return _class_tokens(model.model4k, embeddings.T.reshape(1, -1, side, side))


def _class_tokens(vit: ViT, x: Tensor) -> Tensor:
    return vit.get_intermediate_layers(x)[0][:, 0]


def _on_gpu(setting: Setting, measure: Callable[[Setting], dict[str, Any]]) -> dict[str, Any]:
    if not torch.cuda.is_available():
        raise CannotRunError("torch sees no CUDA device")
    return measure(setting)


def _gpu_patch(setting: Setting, *, train: bool, compiled: bool) -> dict[str, Any]:
    """Images per second of hipt_patch at 224 px in bfloat16, and what share of the measured matrix rate that is."""
    model = build_model("hipt_patch").to("cuda").train(train)
    images = torch.randn(8 if setting.quick else _GPU_IMAGES, 3, 224, 224, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    called: Any = torch.compile(model) if compiled else model

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            out = called(images)
        if train:
            out.float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def run(_: Path) -> int:
        with torch.set_grad_enabled(train):
            for _pass in range(_GPU_PASSES):
                step()
        torch.cuda.synchronize()
        return _GPU_PASSES * len(images)

    flops = _flops(model, images[:1], train)
    rounds = play({OURS: run, "matmul": _matrix_products}, setting)
    rates = [one.rate for one in rounds[OURS]]
    peak = median(one.rate * 2 * _MATRIX**3 for one in rounds["matmul"])
    return alone(rates, "images/s") | {
        "matmul_share": median(rates) * flops / peak,
        "matmul_tflops": peak / 1e12,
        "gflops_per_image": flops / 1e9,
    }


def _matrix_products(_: Path) -> int:
    a = torch.randn(_MATRIX, _MATRIX, device="cuda", dtype=torch.bfloat16)
    b = torch.randn_like(a)
    for _product in range(_PRODUCTS):
        torch.mm(a, b)
    torch.cuda.synchronize()
    return _PRODUCTS


def _flops(model: nn.Module, image: Tensor, train: bool) -> int:
    """Operations of one image in matrix products and convolutions, forward and, for training, backward."""
    counter = FlopCounterMode(display=False)
    with counter, torch.set_grad_enabled(train):
        out = model(image)
        if train:
            out.sum().backward()
    model.zero_grad()
    return int(counter.get_total_flops())


CASES: dict[str, Case] = {
    "hipt_patch_224": partial(_patch, side=224),
    "hipt_patch_256": partial(_patch, side=256),
    "hipt_4k": _regions,
    "gpu_hipt_4k": partial(_on_gpu, measure=partial(_regions, device="cuda")),
    "gpu_patch_forward": partial(_on_gpu, measure=partial(_gpu_patch, train=False, compiled=False)),
    "gpu_patch_forward_compiled": partial(_on_gpu, measure=partial(_gpu_patch, train=False, compiled=True)),
    "gpu_patch_step": partial(_on_gpu, measure=partial(_gpu_patch, train=True, compiled=False)),
    "gpu_patch_step_compiled": partial(_on_gpu, measure=partial(_gpu_patch, train=True, compiled=True)),
    **train_step.CASES,
}
