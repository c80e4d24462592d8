"""The slide level of HIPT: the published numbers, batches of unequal slides, freezing, positions, golden results."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models import build_model
from models.hipt_slide import HIPTN, HIPTLocalGlobal, HIPTSlide
from models.region_positions import sinusoid

PARITY = Path(__file__).parents[2] / "../shared/parity"
GOLDEN = Path(__file__).parent / "golden"
POSITIONS = ("none", "sinusoid_1d", "learned_1d", "sinusoid_2d", "learned_2d")
VIT: dict[str, Any] = {"in_dim": 24, "dim": 32, "depth": 2, "heads": 2}
SLIDE: dict[str, Any] = {"in_dim": 32, "dim": 32, "heads": 2, "n_classes": 3}


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_hipt = load(GOLDEN / "make_hipt.py")


def slide(**config: Any) -> HIPTSlide:
    torch.manual_seed(0)
    model = build_model("hipt_slide", **{**SLIDE, **config}).eval()
    assert isinstance(model, HIPTSlide)
    return model


def local_global(**config: Any) -> HIPTLocalGlobal:
    torch.manual_seed(0)
    model = build_model("hipt_local_global", **{**SLIDE, "region": VIT, **config}).eval()
    assert isinstance(model, HIPTLocalGlobal)
    return model


def hipt_n(**config: Any) -> HIPTN:
    torch.manual_seed(0)
    model = build_model("hipt_n", **{"in_dim": 24, "dim": 16, "n_classes": 3, **config}).eval()
    assert isinstance(model, HIPTN)
    return model


# The published numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "published", "classes", "bag"),
    [
        ("hipt_slide", "HIPT_GP_FC", 3, (7, 192)),
        ("hipt_slide", "c.GlobalHIPT", 4, None),
        ("hipt_slide", "o.GlobalOrdinalHIPT", 4, None),
        ("hipt_slide", "o.GlobalRegressionHIPT", 4, None),
        ("hipt_slide", "o.GlobalHIPT_pos1d", 4, None),
        ("hipt_local_global", "HIPT_LGP_FC", 2, (5, 256, 384)),
        ("hipt_n", "HIPT_None_FC", 2, None),
    ],
)
def test_keys_and_numbers_are_the_published_ones(
    name: str, published: str, classes: int, bag: tuple[int, ...] | None
) -> None:
    if not PARITY.is_dir():
        pytest.skip(f"no published numbers at {PARITY}")
    settings: dict[str, dict[str, Any]] = {
        "o.GlobalOrdinalHIPT": {"head": "ordinal"},
        "o.GlobalRegressionHIPT": {"head": "regression"},
        "o.GlobalHIPT_pos1d": {"positions": "sinusoid_1d", "max_regions": 16},
    }
    model = build_model(name, n_classes=classes, **settings.get(published, {})).eval()
    shapes = [(key, list(value.shape)) for key, value in model.state_dict().items()]
    assert shapes == list(json.loads((PARITY / "keys_hipt_slide.json").read_text())[published].items())
    if bag is None:
        return
    formulas = load(PARITY / "fill_hipt.py")
    model.load_state_dict({k: torch.from_numpy(formulas.param(k, v.shape)) for k, v in model.state_dict().items()})
    with torch.no_grad():
        logits = model(torch.from_numpy(formulas.normal("bag" + "x".join(map(str, bag)), bag)))
    expected = np.load(PARITY / "hipt_slide.npz")[f"{published}.logits"]
    assert logits.shape == expected.shape
    assert np.abs(logits.numpy() - expected).max() < 1e-5


# Golden results ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", make_hipt.CASES)
def test_outputs_and_gradients_are_what_they_were(case: str) -> None:
    golden = np.load(GOLDEN / "hipt.npz")
    for key, value in make_hipt.measure(case).items():
        expected = golden[f"{case}.{key}"]
        assert value.shape == expected.shape
        assert np.abs(value - expected).max() < 1e-4 * max(1.0, float(np.abs(expected).max()))


def test_the_golden_file_has_every_case_and_no_other() -> None:
    assert set(np.load(GOLDEN / "hipt.npz")) == {f"{c}.{key}" for c in make_hipt.CASES for key in ("out", "gradients")}


def defaults() -> list[tuple[str, dict[str, Any], tuple[int, ...]]]:
    return [
        ("hipt_patch", {}, (2, 3, 256, 256)),
        ("hipt_region", {}, (2, 384, 16, 16)),
        ("hipt_4k", {}, (1, 3, 256, 512)),
        ("hipt_slide", {"n_classes": 2}, (5, 192)),
        ("hipt_local_global", {"n_classes": 2}, (3, 256, 384)),
        ("hipt_n", {"n_classes": 2}, (3, 256, 384)),
    ]


@pytest.mark.parametrize(("name", "config", "shape"), defaults(), ids=str)
def test_every_parameter_of_a_default_model_gets_a_gradient(
    name: str, config: dict[str, Any], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    model = build_model(name, **config).train()
    out = model(torch.randn(shape))
    (out * torch.randn_like(out)).sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not bool(p.grad.isfinite().all())] == []


# Batches of unequal slides -------------------------------------------------------------------------------------------


def padded(slides: list[Tensor], fill: float) -> tuple[Tensor, Tensor]:
    """Slides in one batch with `fill` beyond their ends, and its mask [B, M]."""
    longest = max(map(len, slides))
    batch = torch.full((len(slides), longest, *slides[0].shape[1:]), fill, dtype=slides[0].dtype)
    mask = torch.zeros(len(slides), longest, dtype=torch.bool)
    for number, one in enumerate(slides):
        batch[number, : len(one)] = one
        mask[number, : len(one)] = True
    return batch, mask


def gradients(model: nn.Module) -> list[Tensor]:
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return found


def assert_equal_one_by_one(model: nn.Module, together: Tensor, alone: list[Tensor]) -> None:
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)
    together.square().sum().backward()
    batched = gradients(model)
    torch.cat(alone).square().sum().backward()
    pairs = list(zip(batched, gradients(model), strict=True))
    assert pairs
    assert all(torch.allclose(one, other, atol=1e-4, rtol=1e-4) for one, other in pairs)


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_batch_of_unequal_slides_is_its_slides_one_by_one(positions: str) -> None:
    model = slide(positions=positions)
    slides = [torch.randn(count, 32) for count in (5, 1, 3)]
    places = [torch.randint(0, 9, (len(one), 2)) for one in slides]
    batch, mask = padded(slides, float("nan"))
    coordinates, _ = padded(places, 1000)
    together = model(batch, mask=mask, coordinates=coordinates)
    alone = [model(one, coordinates=place) for one, place in zip(slides, places, strict=True)]
    assert_equal_one_by_one(model, together, alone)
    with torch.no_grad():  # torch takes another path through its encoder where no gradient is asked for
        assert torch.allclose(model(batch, mask=mask, coordinates=coordinates), together, atol=1e-5)


@pytest.mark.parametrize("build", [local_global, hipt_n])
def test_a_batch_of_patches_is_its_slides_one_by_one(build: Any) -> None:
    model = build()
    slides = [torch.randn(count, 9, 24) for count in (4, 2)]
    patch_masks = [torch.rand(len(one), 9) > 0.4 for one in slides]
    for one in patch_masks:
        one[:, 0] = True
    batch, mask = padded(slides, float("nan"))
    patch_mask, _ = padded(patch_masks, 0)
    alone = [model(one, patch_mask=seen) for one, seen in zip(slides, patch_masks, strict=True)]
    assert_equal_one_by_one(model, model(batch, mask=mask, patch_mask=patch_mask), alone)
    # A region of which no patch is seen is no region.
    patch_mask[0, 3] = False
    without = model(slides[0][:3], patch_mask=patch_masks[0][:3])
    assert torch.allclose(model(batch, mask=mask, patch_mask=patch_mask)[:1], without, atol=1e-5)


def test_a_gap_in_a_slide_counts_in_no_sequence() -> None:
    model = slide(positions="sinusoid_1d")
    regions = torch.randn(1, 4, 32)
    mask = torch.tensor([[True, False, True, True]])
    assert torch.allclose(model(regions, mask=mask), model(regions[:, mask[0]]), atol=1e-5)


def test_attention_is_shared_among_the_regions_of_a_slide() -> None:
    batch, mask = padded([torch.randn(4, 32), torch.randn(2, 32)], 0.0)
    attention = slide().attention(batch, mask=mask)
    assert torch.allclose(attention.sum(dim=1), torch.ones(2))
    assert attention[1, 2:].tolist() == [0.0, 0.0]
    assert bool((attention[mask] > 0).all())


def test_attention_of_patches_is_that_of_their_regions() -> None:
    model, patches = local_global(), torch.randn(3, 4, 24)
    embeddings, _ = model.region_embeddings(patches)
    assert torch.equal(model.attention(patches), HIPTSlide.attention(model, embeddings))
    assert model.attention(patches).shape == (1, 3)


def test_without_positions_the_order_of_regions_does_not_matter_and_with_them_it_does() -> None:
    regions, order = torch.randn(6, 32), torch.tensor([3, 1, 5, 0, 2, 4])
    places = torch.tensor([[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]])
    for positions in POSITIONS:
        model = slide(positions=positions)
        same = torch.allclose(model(regions, coordinates=places), model(regions[order], coordinates=places), atol=1e-6)
        assert same == (positions == "none")
        if positions.endswith("2d"):
            both = model(regions[order], coordinates=places[order])
            assert torch.allclose(model(regions, coordinates=places), both, atol=1e-5)


# Positions by hand ---------------------------------------------------------------------------------------------------


def test_sinusoids_alternate_sine_and_cosine() -> None:
    found = sinusoid(torch.tensor([0, 3]), 4)
    expected = [[0.0, 1.0, 0.0, 1.0], [np.sin(3), np.cos(3), np.sin(0.03), np.cos(0.03)]]
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float32), atol=1e-6)


def test_2d_positions_are_the_cantor_number_or_two_tables() -> None:
    x, mask = torch.zeros(1, 3, 32), torch.ones(1, 3, dtype=torch.bool)
    places = torch.tensor([[[2, 5], [3, 5], [2, 7]]])
    cantor = slide(positions="sinusoid_2d").pos_encoder
    assert isinstance(cantor, nn.Module)
    assert torch.allclose(cantor(x, mask, places)[0], sinusoid(torch.tensor([33, 41, 52]), 32))
    tables: Any = slide(positions="learned_2d").pos_encoder
    column, row = tables.column.weight, tables.row.weight
    expected = torch.stack([torch.cat([column[i], row[j]]) for i, j in ((0, 0), (1, 0), (0, 2))])
    assert torch.allclose(tables(x, mask, places)[0], expected)


# Parameters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freeze", ["none", "all", "all_but_positions"])
def test_the_region_vit_is_trained_as_far_as_is_asked(freeze: str) -> None:
    model = local_global(freeze=freeze).train()
    model(torch.randn(2, 9, 24)).sum().backward()
    local = {key.partition(".")[2] for key, p in model.named_parameters() if "local_vit" in key and p.grad is not None}
    everything = {key for key, _ in model.local_vit.named_parameters()}
    assert local == {"none": everything, "all": set(), "all_but_positions": {"pos_embed"}}[freeze]
    rest = [p.grad for key, p in model.named_parameters() if "local_vit" not in key]
    assert all(grad is not None for grad in rest)


def test_regions_need_not_be_square() -> None:
    model, patches = local_global(), torch.randn(2, 6, 24)
    embeddings, mask = model.region_embeddings(patches, grid=(2, 3))
    by_hand = model.local_vit(patches.mT.reshape(2, 24, 2, 3))
    assert torch.allclose(embeddings[0], by_hand, atol=1e-6)
    assert mask.tolist() == [[True, True]]
    assert not torch.allclose(embeddings, model.region_embeddings(patches, grid=(3, 2))[0], atol=1e-5)


@pytest.mark.parametrize("build", [slide, local_global, hipt_n])
def test_bf16_autocast_stays_close_to_float32(build: Any) -> None:
    model = build(n_classes=16)
    bag = torch.randn(6, 32) if build is slide else torch.randn(6, 16, 24)
    with torch.no_grad():
        exact = model(bag)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(bag).float()
    assert torch.nn.functional.cosine_similarity(exact, rough).min() > 0.999


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, and there is no g++")
def test_a_compiled_model_gives_the_same_numbers() -> None:
    model = slide()
    batch, mask = padded([torch.randn(4, 32), torch.randn(2, 32)], 0.0)
    with torch.no_grad():  # the check of the mask splits the graph, at which torch itself warns of gradients
        assert torch.allclose(torch.compile(model)(batch, mask=mask), model(batch, mask=mask), atol=1e-5)


# Mistakes ------------------------------------------------------------------------------------------------------------


def test_wrong_inputs_are_refused_with_what_was_found() -> None:
    with pytest.raises(ValueError, match=r"\[B, M, 32\] or \[M, 32\]: found \[1, 4, 33\]"):
        slide()(torch.zeros(4, 33))
    with pytest.raises(ValueError, match=r"\[B, M, patches, 24\].*found \[1, 4, 9, 32\]"):
        hipt_n()(torch.zeros(4, 9, 32))
    with pytest.raises(ValueError, match=r"mask must have shape \[1, 4\] \(slides, regions\): found \[1, 3\]"):
        slide()(torch.zeros(4, 32), mask=torch.ones(3))
    with pytest.raises(ValueError, match="a slide has no region"):
        slide()(torch.zeros(2, 3, 32), mask=torch.tensor([[True] * 3, [False] * 3]))
    with pytest.raises(ValueError, match="a slide has no region"):
        slide()(torch.zeros(0, 32))
    with pytest.raises(ValueError, match=r"patch_mask must have shape \[1, 2, 9\].*found \[2, 8\]"):
        hipt_n()(torch.zeros(2, 9, 24), patch_mask=torch.ones(2, 8))
    with pytest.raises(ValueError, match="8 patches: expected a square number"):
        local_global()(torch.zeros(2, 8, 24))
    with pytest.raises(ValueError, match="8 patches: expected 3 x 3"):
        local_global()(torch.zeros(2, 8, 24), grid=(3, 3))
    with pytest.raises(ValueError, match="2-D positions need coordinates"):
        slide(positions="sinusoid_2d")(torch.zeros(2, 32))
    with pytest.raises(ValueError, match="max_regions=4 is too small for this slide: expected 5 or more"):
        slide(positions="learned_1d", max_regions=4)(torch.zeros(5, 32))
    with pytest.raises(ValueError, match="max_grid=4 is too small for this slide: expected 8 or more"):
        slide(positions="learned_2d", max_grid=4)(torch.zeros(2, 32), coordinates=torch.tensor([[3, 0], [10, 0]]))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"head": "ordinal", "n_classes": 1}, "head=ordinal needs n_classes of 2 or more: found 1"),
        ({"dim": 33, "heads": 3, "positions": "sinusoid_1d"}, "positions=sinusoid_1d needs an even dim: found 33"),
        ({"heads": 5}, "dim must be a multiple of heads: found 32 and 5"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        slide(**settings)


def test_the_widths_of_both_levels_must_agree() -> None:
    with pytest.raises(ValueError, match="in_dim must be the width of the region embeddings: found 32 and 48"):
        local_global(region={**VIT, "dim": 48})
