"""The patch ViT and the region ViT: the published numbers, a plain formula, and what is beyond the published code."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models import build_model
from models.vit import PatchViT, RegionViT, ViT, positions_for

PARITY = Path(__file__).parents[2] / "../shared/parity"
SMALL: dict[str, Any] = {"dim": 32, "depth": 2, "heads": 2}
TOLERANCE = 1e-5  # the published numbers are given to 1e-4


def patch_vit(seed: int = 0, **config: Any) -> PatchViT:
    torch.manual_seed(seed)
    model = build_model("hipt_patch", **config).eval()
    assert isinstance(model, PatchViT)
    return model


def region_vit(seed: int = 0, **config: Any) -> RegionViT:
    torch.manual_seed(seed)
    model = build_model("hipt_region", **config).eval()
    assert isinstance(model, RegionViT)
    return model


def lively(model: ViT) -> ViT:
    """Weights that make every part matter: fresh ones leave class token, positions and registers near 0."""
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


# The published numbers -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def formulas() -> Any:
    if not PARITY.is_dir():
        pytest.skip(f"no published numbers at {PARITY}")
    spec = importlib.util.spec_from_file_location("fill_hipt", PARITY / "fill_hipt.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fill(model: nn.Module, formulas: Any) -> None:
    model.load_state_dict({k: torch.from_numpy(formulas.param(k, v.shape)) for k, v in model.state_dict().items()})


def largest_error(found: Tensor, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found.detach().numpy() - expected).max())


@pytest.mark.parametrize(("side", "rule"), [(224, "given"), (256, "given"), (256, "recomputed")])
def test_patch_embeddings_are_the_published_ones(formulas: Any, side: int, rule: str) -> None:
    file, key = ("hipt_vit", f"vit256.cls.{side}") if rule == "given" else ("hipt_slide", "c.vit256.cls.256")
    model = patch_vit(pos_interpolation=rule)
    fill(model, formulas)
    images = torch.from_numpy(formulas.uniform(f"img{side}", (2, 3, side, side)))
    assert largest_error(model(images), np.load(PARITY / f"{file}.npz")[key]) < TOLERANCE


def test_the_parts_of_the_patch_vit_are_the_published_ones(formulas: Any) -> None:
    expected = np.load(PARITY / "hipt_vit.npz")
    model = patch_vit()
    fill(model, formulas)
    images = torch.from_numpy(formulas.uniform("img256", (2, 3, 256, 256)))
    attention = model.get_last_selfattention(images)
    assert largest_error(attention[:1, :, 0], expected["vit256.attn_clsrow.256"]) < TOLERANCE
    grid = positions_for(model.pos_embed[:, 1:], (16, 16), "given", square=True)
    positions = torch.cat([model.pos_embed[:, :1], grid], dim=1)
    assert largest_error(positions[0, :, :4], expected["vit256.pos_interp_ch0to3.256"]) < TOLERANCE
    small = torch.from_numpy(formulas.uniform("img96", (1, 3, 96, 96)))
    assert largest_error(model._tokens(small)[0][0, :3], expected["vit256.patch_embed_first3.96"]) < TOLERANCE


@pytest.mark.parametrize(("side", "rule"), [(14, "given"), (16, "given"), (16, "recomputed")])
def test_region_embeddings_are_the_published_ones(formulas: Any, side: int, rule: str) -> None:
    file, key = ("hipt_vit", f"vit4k.cls.{side}") if rule == "given" else ("hipt_slide", "c.vit4k.cls.16")
    model = region_vit(pos_interpolation=rule)
    fill(model, formulas)
    grid = torch.from_numpy(formulas.normal(f"grid{side}", (2, 384, side, side)))
    assert largest_error(model(grid), np.load(PARITY / f"{file}.npz")[key]) < TOLERANCE


def test_the_parts_of_the_region_vit_are_the_published_ones(formulas: Any) -> None:
    expected = np.load(PARITY / "hipt_vit.npz")
    model = region_vit()
    fill(model, formulas)
    grid = torch.from_numpy(formulas.normal("grid3x5", (1, 384, 3, 5)))
    assert largest_error(model._tokens(grid)[0][0, :3], expected["vit4k.phi_first3.3x5"]) < TOLERANCE
    table = positions_for(model.pos_embed[:, 1:], (16, 16), "given", square=True)
    positions = torch.cat([model.pos_embed[:, :1], table], dim=1)
    assert largest_error(positions[0, :, :4], expected["vit4k.pos_interp_ch0to3.16"]) < TOLERANCE


def test_keys_and_shapes_are_the_published_ones() -> None:
    if not PARITY.is_dir():
        pytest.skip(f"no published keys at {PARITY}")
    vit, slide = (json.loads((PARITY / f"keys_hipt_{name}.json").read_text()) for name in ("vit", "slide"))
    for model, expected in (
        (patch_vit(), vit["vit256"]),
        (region_vit(), vit["vit4k"]),
        (region_vit(register_tokens=4), slide["c.vit4k_reg4"]),
    ):
        # Their order is that of per-parameter gradient norms, and of optimiser states.
        assert [(key, list(value.shape)) for key, value in model.state_dict().items()] == list(expected.items())


def test_sizes_are_the_published_ones() -> None:
    for model, entries, numbers in ((patch_vit(), 150, 21_665_664), (region_vit(), 78, 2_781_504)):
        assert len(model.state_dict()) == entries
        assert sum(parameter.numel() for parameter in model.parameters()) == numbers
    with torch.device("meta"):
        widths = [
            len(build_model("hipt_patch", variant=v).state_dict()["norm.bias"]) for v in ("tiny", "small", "base")
        ]
    assert widths == [192, 384, 768]


# A plain formula -----------------------------------------------------------------------------------------------------


def cubic(distance: float) -> float:
    """Keys' kernel with a = -0.75."""
    a, d = -0.75, abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0


def resampled(side: int, extent: int, rule: str) -> np.ndarray:
    """The matrix [extent, side] of one axis; what lies beyond the border is the border."""
    step = side / (extent + 0.1) if rule == "given" else side / extent
    matrix = np.zeros((extent, side))
    for i in range(extent):
        centre = (i + 0.5) * step - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[i, min(max(tap, 0), side - 1)] += cubic(centre - tap)
    return matrix


def plain_positions(table: Tensor, grid: tuple[int, int], rule: str) -> Tensor:
    """[s * s, D] to [R * C, D]."""
    side = math.isqrt(len(table))
    rows, columns = (torch.from_numpy(resampled(side, extent, rule)).float() for extent in grid)
    return torch.einsum("rs,ct,std->rcd", rows, columns, table.view(side, side, -1)).flatten(0, 1)


@pytest.mark.parametrize("rule", ["given", "recomputed"])
@pytest.mark.parametrize("grid", [(16, 16), (3, 5), (1, 1), (14, 13), (7, 28), (20, 9)])
def test_positions_are_resampled_as_the_rule_says(grid: tuple[int, int], rule: Any) -> None:
    table = torch.randn(1, 196, 8, generator=torch.Generator().manual_seed(0))
    found = positions_for(table, grid, rule, square=grid[0] == grid[1])[0]
    assert torch.allclose(found, plain_positions(table[0], grid, rule), atol=2e-5)


def test_the_table_is_used_as_it_is_for_a_square_input_of_its_size_only() -> None:
    table = torch.randn(1, 196, 8)
    assert positions_for(table, (14, 14), "given", square=True) is table
    assert torch.allclose(positions_for(table, (14, 14), "recomputed", square=False), table, atol=1e-5)
    assert not torch.allclose(positions_for(table, (14, 14), "given", square=False), table, atol=1e-3)
    # 230 x 224 px give 14 x 14 tokens too.
    model = lively(patch_vit(**SMALL))
    images = torch.randn(1, 3, 230, 224)
    assert not torch.allclose(model(images), model(images[:, :, :224]), atol=1e-4)


def plain_vit(model: ViT, tokens: Tensor, grid: tuple[int, int], seen: Tensor) -> Tensor:
    """One sample [N, D] by the formulas of the paper, with hidden tokens taken out: [D]."""
    state = model.state_dict()
    positions = plain_positions(state["pos_embed"][0, 1:], grid, model.pos_interpolation)
    registers = state["register_tokens"][0] if "register_tokens" in state else tokens[:0]
    x = torch.cat([state["cls_token"][0] + state["pos_embed"][0, :1], registers, (tokens + positions)[seen]])

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    blocks: Any = model.blocks
    heads, width = blocks[0].attn.num_heads, model.dim // blocks[0].attn.num_heads
    for number in range(len(blocks)):
        block = f"blocks.{number}"
        q, k, v = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").chunk(3, dim=-1)
        out = []
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            out.append((q[:, part] @ k[:, part].T / width**0.5).softmax(-1) @ v[:, part])
        x = x + linear(torch.cat(out, dim=-1), f"{block}.attn.proj")
        hidden = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        x = x + linear(hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)), f"{block}.mlp.fc2")
    return norm(x, "norm")[0]


@pytest.mark.parametrize("rule", ["given", "recomputed"])
@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_both_vits_are_the_plain_formula(rule: str, registers: int, masked: bool) -> None:
    settings = {**SMALL, "pos_interpolation": rule, "register_tokens": registers}
    images, grids = torch.randn(2, 3, 70, 90), torch.randn(2, 24, 3, 5)
    for model, x, grid in (
        (patch_vit(**settings), images, (4, 5)),
        (region_vit(in_dim=24, **settings), grids, (3, 5)),
    ):
        lively(model)
        seen = torch.rand(2, math.prod(grid)) > 0.4 if masked else torch.ones(2, math.prod(grid), dtype=torch.bool)
        with torch.no_grad():
            tokens = model._tokens(x)[0]
            expected = torch.stack([plain_vit(model, tokens[i], grid, seen[i]) for i in range(2)])
            found = model(x, mask=seen.view(2, *grid) if masked else None)
        assert torch.allclose(found, expected, atol=2e-5)


# Beyond the class token ----------------------------------------------------------------------------------------------


def test_the_last_layers_end_in_the_class_token_that_forward_gives() -> None:
    model = lively(patch_vit(dim=32, heads=2, depth=3, register_tokens=2))
    images = torch.randn(2, 3, 64, 64)
    layers = model.get_intermediate_layers(images, 3)
    assert [tuple(layer.shape) for layer in layers] == [(2, 1 + 2 + 16, 32)] * 3
    assert torch.allclose(layers[-1][:, 0], model(images), atol=1e-5)
    assert torch.equal(model.get_intermediate_layers(images, 1)[0], layers[-1])
    assert not torch.allclose(layers[0], layers[1], atol=1e-2)
    with pytest.raises(ValueError, match="n=4: expected 1 to 3"):
        model.get_intermediate_layers(images, 4)


def test_attention_is_that_of_the_last_block_and_passes_over_what_is_masked() -> None:
    model = lively(region_vit(**SMALL, in_dim=8, register_tokens=1))
    grids, mask = torch.randn(2, 8, 2, 3), torch.tensor([[True] * 6, [True, False, True, False, True, True]])
    attention = model.get_last_selfattention(grids, mask=mask)
    assert attention.shape == (2, 2, 8, 8)
    assert torch.allclose(attention.sum(-1), torch.ones(2, 2, 8), atol=1e-6)
    assert bool((attention[1, :, :, [3, 5]] == 0).all())
    # The class token of the last block, from its attention by hand.
    first, block = list[Any](model.blocks)
    x = first(*model._prepare(grids, mask))
    v = block.attn.qkv(block.norm1(x)).chunk(3, dim=-1)[2].view(2, 8, 2, 16).transpose(1, 2)
    x = x + block.attn.proj((attention @ v).transpose(1, 2).flatten(2))
    assert torch.allclose(model.norm(x + block.mlp(block.norm2(x)))[:, 0], model(grids, mask=mask), atol=1e-5)


def test_what_is_masked_changes_nothing_and_gets_no_gradient() -> None:
    model = lively(patch_vit(**SMALL))
    images = torch.randn(1, 3, 64, 64, requires_grad=True)
    mask = torch.ones(1, 4, 4, dtype=torch.bool)
    mask[0, 1, 2] = False
    out = model(images, mask=mask)
    other = images.detach().clone()
    other[0, :, 16:32, 32:48] = 7.0
    assert torch.equal(out, model(other, mask=mask))
    assert not torch.allclose(out, model(other), atol=1e-3)
    out.sum().backward()
    assert images.grad is not None
    assert bool((images.grad[0, :, 16:32, 32:48] == 0).all())


# Training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_checkpointing_changes_no_gradient(masked: bool) -> None:
    grids = torch.randn(2, 384, 4, 4)
    mask = torch.rand(2, 16) > 0.5 if masked else None
    gradients = []
    for grad_checkpointing in (False, True):
        model = region_vit(**SMALL, grad_checkpointing=grad_checkpointing).train()
        model(grids, mask=mask).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        assert other is not None
        assert torch.allclose(one, other, atol=1e-6)


def test_drop_path_rises_to_its_rate_and_drops_in_training_only() -> None:
    model = lively(region_vit(depth=3, drop_path=0.5, dropout=0.0))
    assert [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks] == [0.0, 0.25, 0.5]
    grids = torch.randn(16, 384, 2, 2)
    assert torch.equal(model(grids), model(grids))
    model.train()
    assert not torch.allclose(model(grids), model(grids), atol=1e-3)


def test_weights_start_as_the_published_ones_did() -> None:
    model = patch_vit(register_tokens=4)
    state = model.state_dict()
    assert state["pos_embed"].std().item() == pytest.approx(0.02, rel=0.05)
    assert state["blocks.3.mlp.fc1.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert 0 < state["register_tokens"].abs().max() < 1e-5
    assert not any(state[key].any() for key in state if "blocks" in key and key.endswith("bias"))
    assert bool((state["norm.weight"] == 1).all())


@pytest.mark.parametrize("name", ["hipt_patch", "hipt_region"])
def test_bf16_autocast_keeps_the_direction_of_the_features(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name).eval()
    x = torch.randn(2, 3, 256, 256) if name == "hipt_patch" else torch.randn(2, 384, 16, 16)
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(x)
    assert rough.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(exact, rough).min() > 0.999


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, and there is no g++")
def test_a_compiled_vit_gives_the_same_numbers_and_gradients() -> None:
    model = lively(patch_vit(**SMALL))
    compiled = torch.compile(model)
    images = torch.randn(2, 3, 64, 48)
    expected = model(images)
    expected.sum().backward()
    gradient = model.cls_token.grad
    model.cls_token.grad = None
    found = compiled(images)
    found.sum().backward()
    assert gradient is not None
    assert model.cls_token.grad is not None
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(model.cls_token.grad, gradient, atol=1e-4)


# Mistakes ------------------------------------------------------------------------------------------------------------


def test_wrong_inputs_are_refused_with_what_was_found() -> None:
    patch, region = patch_vit(**SMALL), region_vit(**SMALL)
    for shape in ((3, 64, 64), (1, 1, 64, 64), (1, 3, 64, 15)):
        with pytest.raises(ValueError, match=r"\[B, 3, height, width\] of 16 px or more: found \["):
            patch(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"\[B, 384, rows, columns\]: found \[1, 192, 4, 4\]"):
        region(torch.zeros(1, 192, 4, 4))
    with pytest.raises(ValueError, match=r"each of 2 x 4 x 3 tokens: found \[2, 13\]"):
        patch(torch.zeros(2, 3, 64, 48), mask=torch.ones(2, 13))
    with pytest.raises(ValueError, match="dim must be a multiple of heads: found 32 and 5"):
        patch_vit(dim=32, heads=5)
