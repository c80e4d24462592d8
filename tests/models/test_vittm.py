"""The paper's ViTTM: pieces and keys as published, whole models against a plain re-computation from the paper."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.special import erf, expit, softmax
from torch import Tensor

from models import build_model
from models.config import ViTTMConfig, resolve_config
from models.vittm import ViTTM
from models.vittm_heads import Fusion, read_write_head

Array = npt.NDArray[np.float64]

SMALL: dict[str, Any] = {"dim": 32, "depth": 2, "heads": 2, "n_classes": 5}
NESTED: dict[str, Any] = {**SMALL, "img_size": 64, "memory_patch": 16, "process_patch": 32}
EQUAL: dict[str, Any] = {**SMALL, "img_size": 56}
HEADS = ("lin", "ca", "lca", "la", "tl")
TOLERANCE = 2e-6  # the published numbers are given to 1e-4


def build(seed: int = 0, **config: Any) -> ViTTM:
    """A model with every parameter drawn: norms near one, the rest spread enough to matter."""
    torch.manual_seed(seed)
    model = build_model("vittm", **config).eval()
    assert isinstance(model, ViTTM)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = math.prod(parameter.shape[1:]) ** -0.5 if parameter.ndim in (2, 4) else 0.1
            is_gain = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(torch.randn_like(parameter) * scale + float(is_gain))
    return model


# The published numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lin", "ca"])
def test_heads_match_the_published_code(kind: Any, vittm_parity: Any) -> None:
    head = read_write_head(kind, dim=64, heads=4, latent_dim=16, num_query=5)
    vittm_parity.fill(head, f"rw_{kind}.")
    out = head(vittm_parity.input("rw/query", 2, 5, 64), vittm_parity.input("rw/src", 2, 11, 64))
    assert np.abs(out.detach().numpy() - vittm_parity.arrays("vittm_paper")[f"rw_{kind}"]).max() < TOLERANCE


def test_the_gate_matches_the_published_code(vittm_parity: Any) -> None:
    fusion = Fusion("add_erase", 64, 5)
    vittm_parity.fill(fusion, "fuse_ae.")
    out = fusion(vittm_parity.input("fuse/rw", 2, 5, 64), vittm_parity.input("fuse/target", 2, 5, 64))
    assert np.abs(out.detach().numpy() - vittm_parity.arrays("vittm_paper")["fuse_add_erase"]).max() < TOLERANCE


def test_keys_are_the_published_ones_in_their_order(vittm_parity: Any) -> None:
    sizes: dict[str, Any] = {"dim": 64, "depth": 2, "heads": 4, "n_classes": 10}
    nested = {**sizes, "img_size": 128, "memory_patch": 16, "process_patch": 32}
    models: dict[str, torch.nn.Module] = {
        "vittm_16_32": build_model("vittm", **nested),
        "vittm_28_28": build_model("vittm", **sizes, img_size=112),
        "vittm_16_32_mlp": build_model("vittm", **nested, memory_mlp_ratio=0.5),
    }
    for kind in HEADS:
        head: Any = kind
        models[f"rw_{kind}"] = read_write_head(head, dim=64, heads=4, latent_dim=16, num_query=5)
    for name, model in models.items():
        found = [(key, list(value.shape)) for key, value in model.state_dict().items()]
        assert found == list(vittm_parity.keys("vittm_paper")[name].items()), name


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        ({}, 33.2),
        ({"memory_patch": 16, "process_patch": 32}, 32.6),
        ({"dim": 768, "heads": 12}, 126.5),
        ({"dim": 768, "heads": 12, "memory_patch": 16, "process_patch": 32}, 125.4),
    ],
)
def test_sizes_are_the_published_ones(config: dict[str, Any], millions: float) -> None:
    with torch.device("meta"):
        model = ViTTM(ViTTMConfig(**config))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


# A plain re-computation in float64 -----------------------------------------------------------------------------------


class Plain:
    """The forward pass written out with numpy, in float64, from the state dict; no batch."""

    def __init__(self, model: ViTTM) -> None:
        self.config = model.config
        self.state: dict[str, Array] = {k: v.double().numpy() for k, v in model.state_dict().items()}

    def linear(self, x: Array, key: str) -> Array:
        return x @ self.state[f"{key}.weight"].T + self.state[f"{key}.bias"]

    def norm(self, x: Array, key: str, eps: float) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
        return scaled * self.state[f"{key}.weight"] + self.state[f"{key}.bias"]

    def mlp(self, x: Array, key: str) -> Array:
        hidden = self.linear(x, f"{key}.fc1")
        return self.linear(0.5 * hidden * (1 + erf(hidden / math.sqrt(2))), f"{key}.fc2")

    def patches(self, image: Array, stream: str, patch: int) -> Array:
        kernel = self.state[f"{stream}_embedder.proj.weight"]
        bias = self.state[f"{stream}_embedder.proj.bias"]
        rows = []
        for y in range(0, image.shape[1], patch):
            for x in range(0, image.shape[2], patch):
                rows.append(np.tensordot(kernel, image[:, y : y + patch, x : x + patch], 3) + bias)
        return np.stack(rows) + self.state[f"{stream}_pos_embed"][0]

    def head(self, query: Array, source: Array, key: str) -> Array:
        kind = self.config.read_write
        if kind == "tl":
            tokens = np.concatenate([query, source])
            return softmax(self.mlp(self.norm(tokens, f"{key}.norm", 1e-5), f"{key}.mlp"), axis=0).T @ tokens
        if kind == "la":
            k = softmax(self.mlp(self.norm(source, f"{key}.norm", 1e-5), f"{key}.mlp"), axis=0)
            q = softmax(self.mlp(self.norm(query, f"{key}.norm_q", 1e-5), f"{key}.mlp2"), axis=1)
            return q @ (k.T @ source)
        q, k, v = (self.linear(x, f"{key}.{n}") for x, n in ((query, "q"), (source, "k"), (source, "v")))
        if kind != "lin":
            q, k, v = (self.norm(x, f"{key}.{n}_norm", 1e-5) for x, n in ((q, "q"), (k, "k"), (v, "v")))
        heads = zip(*(np.split(x, self.config.heads, axis=1) for x in (q, k, v)), strict=True)
        parts = [self.one_head(*qkv) for qkv in heads]
        out = np.concatenate(parts, axis=1)
        return out if kind == "lin" else self.linear(out, f"{key}.proj")

    def one_head(self, q: Array, k: Array, v: Array) -> Array:
        if self.config.read_write == "ca":
            return softmax(q @ k.T / math.sqrt(q.shape[1]), axis=1) @ v
        if self.config.read_write == "lca":
            return softmax(q, axis=1) @ (softmax(k, axis=0).T @ v)
        q, k = (np.where(x > 0, x + 1, np.exp(x)) for x in (q, k))
        weight = q @ k.T
        return weight @ v / (weight.sum(1, keepdims=True) + 1e-6)

    def fuse(self, written: Array, target: Array, key: str) -> Array:
        if self.config.fusion == "add":
            return target + written
        if self.config.fusion == "erase":
            return written
        gate = expit(self.linear(written.mean(0), f"{key}.linear"))[:, None]
        return (1 - gate) * target + gate * written

    def block(self, x: Array, key: str) -> Array:
        q, k, v = np.split(self.linear(self.norm(x, f"{key}.norm1", 1e-6), f"{key}.attn.qkv"), 3, axis=1)
        heads = zip(*(np.split(part, self.config.heads, axis=1) for part in (q, k, v)), strict=True)
        parts = [softmax(q @ k.T / math.sqrt(q.shape[1]), axis=1) @ v for q, k, v in heads]
        x = x + self.linear(np.concatenate(parts, axis=1), f"{key}.attn.proj")
        return x + self.mlp(self.norm(x, f"{key}.norm2", 1e-6), f"{key}.mlp")

    def logits(self, image: Array) -> tuple[Array, Array]:
        memory = self.patches(image, "memory", self.config.memory_patch)
        process = self.patches(image, "process", self.config.process_patch)
        for i in range(self.config.depth):
            memory, process = (self.norm(x, f"read_norm.{i}", 1e-6) for x in (memory, process))
            process = self.fuse(self.head(process, memory, f"read_head.{i}"), process, f"read_fusion.{i}")
            process = self.block(process, f"blocks.{i}")
            memory, process = (self.norm(x, f"write_norm.{i}", 1e-6) for x in (memory, process))
            memory = self.fuse(self.head(memory, process, f"write_head.{i}"), memory, f"write_fusion.{i}")
            if self.config.memory_mlp_ratio:
                key = f"mem_blocks.{i}"
                memory = memory + self.mlp(self.norm(memory, f"{key}.norm", 1e-5), f"{key}.mlp")
        process = self.norm(process, "process_norm", 1e-6)
        return (
            self.linear(self.norm(memory.mean(0), "fc_norm", 1e-6), "head"),
            self.linear(self.norm(process.mean(0), "fc_norm_process", 1e-6), "process_head"),
        )


@pytest.mark.parametrize(
    "config",
    [
        *({**NESTED, "read_write": kind} for kind in HEADS),
        *({**EQUAL, "fusion": kind} for kind in ("erase", "add_erase")),
        {**NESTED, "read_write": "lca", "fusion": "add_erase", "latent_scale": 2},
        {**EQUAL, "memory_mlp_ratio": 0.5, "mlp_ratio": 2.0},
    ],
    ids=lambda config: "-".join(str(config.get(key, "")) for key in ("read_write", "fusion", "memory_mlp_ratio")),
)
def test_the_model_equals_a_plain_recomputation(config: dict[str, Any]) -> None:
    model = build(**config)
    images = torch.randn(2, 3, config["img_size"], config["img_size"])
    with torch.no_grad():
        out = model(images)
    for image, memory_logits, process_logits in zip(images, *out.values(), strict=True):
        memory, process = Plain(model).logits(image.double().numpy())
        assert np.abs(memory_logits.numpy() - memory).max() < 1e-5
        assert np.abs(process_logits.numpy() - process).max() < 1e-5


# Behaviour -----------------------------------------------------------------------------------------------------------


def test_a_new_model_answers_zero_and_its_features_do_not() -> None:
    model = build_model("vittm", **EQUAL)
    images = torch.randn(3, 3, 56, 56)
    assert {name: value.abs().max().item() for name, value in model(images).items()} == {
        "memory_logits": 0.0,
        "process_logits": 0.0,
    }
    features: Tensor = model.features(images)  # type: ignore[operator]
    assert features.shape == (3, 32)
    assert features.std() > 0.1


def test_features_are_what_the_process_classifier_sees() -> None:
    model = build(**NESTED)
    images = torch.randn(2, 3, 64, 64)
    assert torch.allclose(model.process_head(model.features(images)), model(images)["process_logits"], atol=1e-6)


def test_memory_of_16_px_patches_shares_the_unused_embedding() -> None:
    nested, equal = build(**NESTED), build(**EQUAL)
    assert nested.memory_embedder is nested.patch_embed
    assert all(p.requires_grad for p in nested.patch_embed.parameters())
    assert equal.memory_embedder is not equal.patch_embed
    assert not any(p.requires_grad for p in equal.patch_embed.parameters())


def test_only_parameters_that_no_output_depends_on_are_frozen() -> None:
    model = build(**EQUAL)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert {name.rpartition("_head.")[0] or name for name in frozen} == {
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        "read",
        "write",
    }
    images = torch.randn(1, 3, 56, 56)
    before = model(images)
    with torch.no_grad():
        for name in frozen:
            model.get_parameter(name).add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in model(images).items())


@pytest.mark.parametrize("sides", [(64, 64), (128, 128), (64, 96)])
def test_images_of_other_sizes_get_resampled_positions(sides: tuple[int, int]) -> None:
    model = build(**NESTED)
    memory, process = model.tokens(torch.randn(1, 3, *sides))
    assert memory.shape == (1, sides[0] * sides[1] // 256, 32)
    assert process.shape == (1, sides[0] * sides[1] // 1024, 32)
    with torch.no_grad():
        model.memory_pos_embed.fill_(0.5)
        model.process_pos_embed.zero_()
    memory, process = model.embed(torch.zeros(1, 3, *sides))
    memory_bias, process_bias = model.memory_embedder.proj.bias, model.process_embedder.proj.bias
    assert memory_bias is not None
    assert process_bias is not None
    assert torch.allclose(memory, (memory_bias + 0.5).expand_as(memory), atol=1e-6)
    assert torch.allclose(process, process_bias.expand_as(process), atol=1e-6)


def test_drop_path_grows_with_depth() -> None:
    model = build_model("vittm", **{**EQUAL, "depth": 3, "drop_path": 0.2})
    blocks: Any = model.blocks
    assert [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks] == pytest.approx([0.0, 0.1, 0.2])


def test_wrong_inputs_are_refused_with_what_was_found() -> None:
    model = build(**NESTED)
    with pytest.raises(ValueError, match=r"shape \[B, 3, H, W\]: found \[2, 1, 64, 64\]"):
        model(torch.zeros(2, 1, 64, 64))
    with pytest.raises(ValueError, match=r"multiples of memory_patch and process_patch, 16 and 32 px: found.*48"):
        model(torch.zeros(2, 3, 48, 64))
    fixed = build(**NESTED, read_write="tl")
    with pytest.raises(ValueError, match=r"made for images of 64 x 64 px \(img_size\): found \[1, 3, 128, 128\]"):
        fixed(torch.zeros(1, 3, 128, 128))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"img_size": 230}, "img_size must be a multiple of memory_patch: found 230 and 28"),
        ({"process_patch": 30}, "img_size must be a multiple of process_patch: found 224 and 30"),
        ({"heads": 5}, "dim must be a multiple of heads: found 384 and 5"),
        ({"latent_scale": 5}, r"dim must be a multiple of latent_scale \* heads: found 384, 5 and 6"),
        ({"latent_scale": 5, "read_write": "la"}, "dim must be a multiple of latent_scale: found 384 and 5"),
        ({"read_write": "mlp"}, "'lin', 'ca', 'lca', 'la' or 'tl'"),
        ({"num_classes": 3}, "no setting 'num_classes'; did you mean 'n_classes'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        resolve_config("vittm", settings)


def test_small_batches_are_learned_by_both_heads() -> None:
    from models.objectives.two_heads import two_head_loss

    torch.manual_seed(0)
    model = build_model("vittm", **EQUAL)
    images, labels = torch.randn(5, 3, 56, 56), torch.arange(5)
    optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    for _ in range(30):
        optimiser.zero_grad()
        values = two_head_loss(model(images), labels)
        values["loss"].backward()
        optimiser.step()
    assert values["memory_loss"].item() < 0.2
    assert values["process_loss"].item() < 0.2
