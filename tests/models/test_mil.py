"""MIL models: published numbers, slow formulas for one bag, golden numbers, and batches that equal their bags.

`python tests/models/test_mil.py` writes the golden numbers anew.
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models import MODEL_CONFIGS, build_model
from models.clam import CLAM
from models.mil import BagModel, FCMajority, pad_bags

GOLDEN = Path(__file__).with_name("golden_mil.json")
SIZES = (5, 1, 9, 24)
LABELS = torch.tensor([0, 1, 1, 0])
# Small instances: name of the case -> (model, settings).
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "abmil": ("abmil", {"embed_dims": (8,), "attention_dim": 4, "gated": False}),
    "abmil gated": ("abmil", {"embed_dims": (8,), "attention_dim": 4}),
    "abmil branches": ("abmil", {"embed_dims": (), "attention_dim": 4, "branches": 3, "classifier_dims": (7,)}),
    "clam_sb": ("clam_sb", {"embed_dim": 8, "attention_dim": 4, "k_sample": 3, "instance_loss": "ce"}),
    "clam_mb": ("clam_mb", {"embed_dim": 8, "attention_dim": 4, "k_sample": 3, "subtyping": True}),
    "dsmil": ("dsmil", {"query_dim": 4}),
    "fc_majority": ("fc_majority", {}),
    "fc_majority mean": ("fc_majority", {"aggregate": "mean"}),
    "pool_mil mean": ("pool_mil", {"embed_dims": (8,), "pool": "mean"}),
    "pool_mil max": ("pool_mil", {"embed_dims": (8,), "pool": "max"}),
    "pool_mil top": ("pool_mil", {"embed_dims": (8,), "pool": "top"}),
}
DEFAULTS = [name for name, config in MODEL_CONFIGS.items() if config.__module__ == "models.mil_config"]


def drawn(name: str, shape: Any) -> Tensor:
    """Normal numbers that depend on `name` alone."""
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    return torch.from_numpy(rng.standard_normal(tuple(shape)).astype(np.float32))


def small(case: str, **settings: Any) -> BagModel:
    """The case's model over embeddings 6 wide, its parameters a function of their names."""
    name, own = SMALL[case]
    settings = {"in_dim": 6, "n_classes": 2, **own, **settings}
    if "dropout" in MODEL_CONFIGS[name].model_fields:
        settings.setdefault("dropout", 0.0)
    model = build_model(name, **settings)
    assert isinstance(model, BagModel)
    model.load_state_dict({key: 0.5 * drawn(key, value.shape) for key, value in model.state_dict().items()})
    return model


def some_bags() -> list[Tensor]:
    return [drawn(f"bag {i}", (size, 6)) for i, size in enumerate(SIZES)]


def loss_of(model: BagModel, bags: Tensor, mask: Tensor | None, labels: Tensor) -> Tensor:
    if isinstance(model, CLAM):
        return model.loss(bags, labels, mask)["loss"]
    return F.cross_entropy(model(bags, mask), labels)


# Published numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gated", "tag"), [(False, "ilse_simple"), (True, "ilse_gated")])
def test_attention_matches_the_published_formulas(published: Any, gated: bool, tag: str) -> None:
    formulas, expected = published.formulas("fill_vittm"), published.arrays("mil")
    model: Any = build_model("abmil", in_dim=32, embed_dims=(), attention_dim=16, gated=gated).double()
    shapes = {"V.weight": (16, 32), "V.bias": (16,), "w.weight": (1, 16), "w.bias": (1,)}
    if gated:
        shapes |= {"U.weight": (16, 32), "U.bias": (16,)}
    names = {
        key: "ilse." + key.replace(".weight", "").replace("V.bias", "bV").replace("U.bias", "bU") for key in shapes
    }
    names["w.bias"] = "ilse.bw"
    model.attention.load_state_dict({key: torch.from_numpy(formulas.param(names[key], s)) for key, s in shapes.items()})
    bag = torch.from_numpy(formulas.inp("ilse/H", (9, 32))).double()
    with torch.no_grad():
        out = model.outputs(bag)
        scores = model.attention.scores(bag.unsqueeze(0))
    for found, name in ((scores, "score"), (out.attention, "attn"), (out.embedding, "z")):
        assert np.abs(found.flatten().numpy() - expected[f"{tag}_{name}"]).max() < 1e-12


# One bag, by formulas written out ------------------------------------------------------------------------------------


def relu_layer(layer: Any, x: Tensor) -> Tensor:
    return torch.stack(
        [torch.tensor([max(0.0, float(w @ h + b)) for w, b in zip(layer.weight, layer.bias, strict=True)]) for h in x]
    )


def softmax(scores: list[float]) -> list[float]:
    powers = [math.exp(score) for score in scores]
    return [power / sum(powers) for power in powers]


def attention_weights(pool: Any, h: Tensor, branch: int = 0) -> list[float]:
    scores = []
    for row in h:
        hidden = torch.tanh(pool.V.weight @ row + pool.V.bias)
        if pool.U is not None:
            hidden = hidden / (1 + torch.exp(-(pool.U.weight @ row + pool.U.bias)))
        scores.append(float(pool.w.weight[branch] @ hidden + pool.w.bias[branch]))
    return softmax(scores)


def weighted(weights: list[float], h: Tensor) -> Tensor:
    return torch.stack([a * row for a, row in zip(weights, h, strict=True)]).sum(dim=0)


@pytest.mark.parametrize("case", ["abmil", "abmil gated", "clam_sb"])
@torch.no_grad()
def test_attention_pools_one_bag(case: str) -> None:
    model: Any = small(case)
    bag = some_bags()[2]
    h = relu_layer(model.embed[0], bag)
    weights = attention_weights(model.attention, h)
    head = model.classifiers[0] if case == "clam_sb" else model.classifier[0]
    out = model.outputs(bag)
    assert out.attention.shape == (1, 1, 9)
    assert out.attention.flatten().tolist() == pytest.approx(weights, abs=1e-6)
    assert torch.allclose(out.logits[0], head.weight @ weighted(weights, h) + head.bias, atol=1e-5)
    assert torch.equal(model(bag), out.logits)
    assert torch.allclose(model.features(bag)[0], weighted(weights, h), atol=1e-6)


@torch.no_grad()
def test_branches_attend_by_themselves_and_are_concatenated() -> None:
    model: Any = small("abmil branches")
    bag = some_bags()[2]
    pooled = [weighted(attention_weights(model.attention, bag, branch), bag) for branch in range(3)]
    out = model.outputs(bag)
    assert out.attention.shape == (1, 3, 9)
    assert torch.allclose(out.embedding[0], torch.cat(pooled), atol=1e-6)
    hidden = relu_layer(model.classifier[0], out.embedding)
    assert torch.allclose(out.logits[0], model.classifier[3](hidden[0]), atol=1e-5)


@torch.no_grad()
def test_clam_mb_answers_for_each_class_from_its_own_branch() -> None:
    model: Any = small("clam_mb")
    bag = some_bags()[2]
    h = relu_layer(model.embed[0], bag)
    slow = [
        float(layer.weight[0] @ weighted(attention_weights(model.attention, h, c), h) + layer.bias)
        for c, layer in enumerate(model.classifiers)
    ]
    assert model(bag)[0].tolist() == pytest.approx(slow, abs=1e-5)


@pytest.mark.parametrize("case", ["clam_sb", "clam_mb"])
@pytest.mark.parametrize("instance_loss", ["ce", "svm"])
@pytest.mark.parametrize("subtyping", [False, True])
@torch.no_grad()
def test_clam_teaches_the_most_and_the_least_attended(case: str, instance_loss: str, subtyping: bool) -> None:
    model: Any = small(case, instance_loss=instance_loss, subtyping=subtyping)
    slow = []
    for bag, label in zip(some_bags(), LABELS.tolist(), strict=True):
        h = relu_layer(model.embed[0], bag)
        k = min(3, len(bag) // 2)
        total = 0.0
        for c in range(2):
            weights = attention_weights(model.attention, h, c if case == "clam_mb" else 0)
            order = sorted(range(len(bag)), key=lambda i: -weights[i])
            taught = []
            if c == label:
                taught = [(i, 1) for i in order[:k]] + [(i, 0) for i in order[len(bag) - k :]]
            elif subtyping:
                taught = [(i, 0) for i in order[:k]]
            losses = []
            for i, target in taught:
                s = (model.instance_classifiers[c].weight @ h[i] + model.instance_classifiers[c].bias).tolist()
                margin = 1.0 if instance_loss == "svm" else 0.0
                powers = sum(math.exp(s[j] + margin * (j != target)) for j in range(2))
                losses.append(math.log(powers) - s[target])
            total += sum(losses) / max(1, len(losses))
        slow.append(total / 2 if subtyping else total)
    bags, mask = pad_bags(some_bags())
    found = model.loss(bags, LABELS, mask, bag_weight=0.6)
    assert found["instance_loss"].item() == pytest.approx(sum(slow) / 4, rel=1e-5)
    assert found["bag_loss"].item() == pytest.approx(F.cross_entropy(model(bags, mask), LABELS).item(), rel=1e-6)
    mixed = 0.6 * found["bag_loss"] + 0.4 * found["instance_loss"]
    assert found["loss"].item() == pytest.approx(mixed.item(), rel=1e-6)


@torch.no_grad()
def test_dsmil_attends_to_what_resembles_the_top_instance() -> None:
    model: Any = small("dsmil")
    bag = some_bags()[2]
    instance = model.instance_classifier(bag)
    q, v = model.query(bag), model.value[1](bag)
    slow, attention = [], []
    for c in range(2):
        top = max(range(9), key=lambda i: float(instance[i, c]))
        attention.append(softmax([float(q[i] @ q[top]) / math.sqrt(4) for i in range(9)]))
    pooled = torch.stack([weighted(a, v) for a in attention])
    for c in range(2):
        kernel = model.bag_classifier.weight[c]
        answer = sum(float(kernel[d] @ pooled[d]) for d in range(2)) + float(model.bag_classifier.bias[c])
        slow.append(0.5 * (answer + float(instance[:, c].max())))
    out = model.outputs(bag)
    assert out.attention[0].flatten().tolist() == pytest.approx([*attention[0], *attention[1]], abs=1e-6)
    assert out.logits[0].tolist() == pytest.approx(slow, abs=1e-5)


@pytest.mark.parametrize("n_classes", [1, 2, 3])
@torch.no_grad()
def test_pooling_baselines_by_hand(n_classes: int) -> None:
    bag = some_bags()[2]
    mean, largest, top = (small(f"pool_mil {pool}", n_classes=n_classes) for pool in ("mean", "max", "top"))
    model: Any = mean
    h = relu_layer(model.embed[0], bag)
    answers = h @ model.classifier.weight.T + model.classifier.bias
    assert torch.allclose(mean(bag), answers.mean(dim=0, keepdim=True), atol=1e-5)
    assert torch.allclose(largest(bag)[0], model.classifier(torch.stack([max(column) for column in h.T])), atol=1e-5)

    def confidence(i: int) -> float:
        p = softmax(answers[i].tolist())
        return {1: float(answers[i][0]), 2: p[min(1, n_classes - 1)], 3: max(p)}[n_classes]

    assert torch.allclose(top(bag)[0], answers[max(range(9), key=confidence)], atol=1e-5)


@torch.no_grad()
def test_regions_vote_and_the_lowest_class_wins_a_tie() -> None:
    model = small("fc_majority", n_classes=3).eval()
    assert isinstance(model, FCMajority)
    bag = drawn("regions", (40, 6))
    won = [int(row.argmax()) for row in model.classifier(bag)]
    shares = [won.count(c) / 40 for c in range(3)]
    out = model.outputs(bag)
    assert out.embedding[0].tolist() == pytest.approx(shares, abs=1e-6)
    assert out.logits.exp()[0].tolist() == pytest.approx(shares, abs=1e-6)
    tied = torch.stack([bag[won.index(2)], bag[won.index(1)]])
    assert model(tied).argmax(dim=1).tolist() == [1]


@torch.no_grad()
def test_regions_average_their_probabilities() -> None:
    model: Any = small("fc_majority mean", n_classes=3).eval()
    bag = some_bags()[2]
    mean = np.mean([softmax(row.tolist()) for row in model.classifier(bag)], axis=0)
    assert model(bag).exp()[0].tolist() == pytest.approx(mean.tolist(), abs=1e-6)


def test_a_region_alone_is_trained_by_plain_cross_entropy() -> None:
    model: Any = small("fc_majority").train()
    regions, labels = drawn("regions", (12, 6)), torch.arange(12) % 2
    found = F.cross_entropy(model(regions.unsqueeze(1)), labels)
    assert found.item() == pytest.approx(F.cross_entropy(model.classifier(regions), labels).item(), rel=1e-6)


# Batches -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SMALL)
@pytest.mark.parametrize("train", [False, True])
def test_a_padded_batch_equals_its_bags_one_by_one(case: str, train: bool) -> None:
    model = small(case).train(train)
    bags, mask = pad_bags(some_bags())
    garbage = bags.masked_fill(~mask.unsqueeze(-1), math.nan)
    out = model.outputs(garbage, mask)
    for i, bag in enumerate(some_bags()):
        alone = model.outputs(bag)
        assert torch.allclose(out.logits[i], alone.logits[0], atol=1e-6)
        assert torch.allclose(out.embedding[i], alone.embedding[0], atol=1e-6)
        if alone.attention is not None:
            assert out.attention is not None
            assert torch.allclose(out.attention[i, :, : len(bag)], alone.attention[0], atol=1e-6)
            assert not out.attention[i, :, len(bag) :].any()


def test_one_bag_may_have_a_mask_of_its_own() -> None:
    model, bag = small("abmil"), some_bags()[2]
    mask = torch.arange(9) < 4
    assert torch.allclose(model(bag, mask), model(bag[:4]), atol=1e-6)
    assert torch.allclose(model(bag, mask=mask[None]), model(bag[:4]), atol=1e-6)


@pytest.mark.parametrize("case", SMALL)
def test_gradients_of_a_padded_batch_are_the_mean_of_its_bags(case: str) -> None:
    model = small(case).train()
    bags, mask = pad_bags(some_bags())
    loss_of(model, bags.masked_fill(~mask.unsqueeze(-1), math.nan), mask, LABELS).backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for bag, label in zip(some_bags(), LABELS, strict=True):
        (loss_of(model, bag, None, label[None]) / len(SIZES)).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert torch.allclose(together[name], p.grad, atol=1e-6), name


@pytest.mark.parametrize("case", SMALL)
@torch.no_grad()
def test_the_order_of_instances_does_not_matter(case: str) -> None:
    model, bag = small(case).eval(), some_bags()[3]
    assert torch.allclose(model(bag), model(bag.flip(0)), atol=1e-6)


def test_bags_that_do_not_fit_are_refused() -> None:
    model = small("abmil")
    bags, mask = pad_bags(some_bags())
    with pytest.raises(ValueError, match=r"shape \[B, N, 6\] or \[N, 6\]: found \[4, 24, 5\]"):
        model(bags[..., :5], mask)
    with pytest.raises(ValueError, match=r"mask must be bool and have shape \[4, 24\]: found torch.bool of \[3, 24\]"):
        model(bags, mask[:3])
    with pytest.raises(ValueError, match=r"found torch.float32 of \[4, 24\]"):
        model(bags, mask.float())
    with pytest.raises(ValueError, match=r"none in bags \[2\]"):
        model(bags, mask & (torch.arange(4) != 2).unsqueeze(1))
    with pytest.raises(ValueError, match=r"none in bags \[0\]"):
        model(torch.zeros(0, 6))


# Defaults and golden numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DEFAULTS)
def test_every_parameter_of_the_default_model_gets_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    model: Any = build_model(name, subtyping=True) if name.startswith("clam") else build_model(name)
    bags, mask = pad_bags([torch.randn(size, model.in_dim) for size in SIZES])
    loss_of(model, bags, mask, LABELS).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", DEFAULTS)
def test_bf16_autocast_stays_close_to_float32(name: str) -> None:
    torch.manual_seed(0)
    model: Any = build_model(name).eval()
    bags, mask = pad_bags([torch.randn(size, model.in_dim) for size in (40, 7, 100)])
    with torch.no_grad():
        exact = model.features(bags, mask)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model.outputs(bags, mask)
    assert F.cosine_similarity(exact, rough.embedding.flatten(1).float(), dim=1).min() > 0.999
    if rough.attention is not None:
        assert rough.attention.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, and there is no g++")
@torch.no_grad()
def test_the_compiled_model_gives_the_same() -> None:
    model = small("abmil gated").eval()
    bags, mask = pad_bags(some_bags())
    assert torch.allclose(torch.compile(model)(bags, mask), model(bags, mask), atol=1e-5)


def golden(case: str) -> dict[str, Any]:
    """Logits of the batch, and the gradient's length at each parameter."""
    model = small(case).train()
    bags, mask = pad_bags(some_bags())
    loss = loss_of(model, bags, mask, LABELS)
    loss.backward()
    gradients = {name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.item(), "logits": model(bags, mask).tolist(), "gradients": gradients}


@pytest.mark.parametrize("case", SMALL)
def test_golden_outputs_and_gradients(case: str) -> None:
    expected, found = json.loads(GOLDEN.read_text())[case], golden(case)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert np.array(found["logits"]) == pytest.approx(np.array(expected["logits"]), abs=1e-4)
    assert found["gradients"] == pytest.approx(expected["gradients"], rel=1e-3, abs=1e-6)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({case: golden(case) for case in SMALL}, indent=1) + "\n")
