"""What a run is trained for: every shipped recipe, DINO, classification, and the options that all of them share."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from engine import shard, synth, train
from engine.config import UsageError, apply_overrides, read_recipe, shipped_recipes
from engine.objective_recipes import OptimRecipe
from engine.objectives import make_objective
from engine.optim import Schedules, clip, make_optimizer
from engine.recipes import ShardRecipe, TrainRecipe
from engine.runtime import Runtime
from engine.train_log import TrainLog
from engine.train_recipe import build_train_recipe
from engine.trainer import _Parts, _Stepper
from engine.watching import watch_features
from models import build_model, load_weights
from models.objectives.dino import cosine_schedule

GOLDEN = Path(__file__).parents[1] / "golden" / "train_losses.json"
HMR = ("train/vittm_hmr_tiny", "batch_size=6", "model.dim=32", "model.depth=2", "model.target_norm=image")
DINO = (
    "train/hipt_patch_dino_tiny",
    "batch_size=6",
    "model.dim=24",
    "model.depth=2",
    "crop_px=64",
    "dino.small_px=32",
    "dino.out_dim=32",
    "dino.num_small=2",
)
SUPERVISED = ("train/vittm_supervised_tiny", "batch_size=6", "model.dim=32", "model.depth=1")
ENCODER = ("train/vittm_supervised_tiny", "batch_size=6")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("objectives")
    synth.run(folder / "slides", slides=3, size=1536, workers=1)
    recipe = ShardRecipe(slides=str(folder / "slides" / "labels.csv"), out=folder / "dataset", workers=1)
    shard.run(recipe, local=True)
    return folder / "dataset"


def _recipe(name: str, *settings: str, **places: Any) -> TrainRecipe:
    given = [f"{key}={value}" for key, value in ({"dataset": "d", "run": "r"} | places).items()]
    return build_train_recipe(apply_overrides(read_recipe("train", name), [*given, *settings]))


def _run(dataset: Path, run: Path, name: str, *settings: str, resume: bool = False) -> list[dict[str, Any]]:
    """Train, and return the lines of metrics.jsonl."""
    train.run(_recipe(name, *settings, dataset=dataset, run=run), resume=resume)
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in lines]


def _weights(run: Path, file: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(run / "last" / file)


@pytest.mark.parametrize("name", shipped_recipes("train"))
def test_shipped_recipes_fit_together(name: str) -> None:
    more = ["model.n_classes=2"] if "supervised" in name else []
    recipe = _recipe(name, *more)
    assert recipe.objective == ("dino" if "dino" in name else "supervised" if "supervised" in name else "masked")
    assert recipe.optim.warmup_steps < recipe.steps


def test_each_recipe_for_machines_with_gpus_has_a_twin_for_two_cores() -> None:
    names = set(shipped_recipes("train"))
    for name in ("vittm_hmr", "vittm_hmr_trial", "vittm_mae", "vittm_supervised", "hipt_patch_dino"):
        assert f"train/{name}" in names
    assert {f"{name}_tiny" for name in names if not name.endswith("_tiny")} <= names


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        (HMR[0], ["objective=dino"], "views=dino and objective=dino go together"),
        (HMR[0], ["views=dino"], "views=dino and objective=dino go together"),
        (DINO[0], ["model={name: vittm, img_size: 96, memory_patch: 16, process_patch: 16}"], "of hipt_patch, timm"),
        (DINO[0], ["ema_momentum=0.9"], "its teacher is that average already"),
        (HMR[0], ["model={name: hipt_patch}"], "unclear what to train it for"),
        (HMR[0], ["model={name: hipt_patch}", "objective=masked"], "it does not mask"),
        (HMR[0], ["model={name: hipt_patch}", "objective=supervised"], r"needs supervised\.label"),
        (HMR[0], ["model={name: abmil, n_classes: 2}", "supervised.label=label"], r"model\.name=abmil"),
        (SUPERVISED[0], ["supervised.focal_gamma=2"], "focal_gamma"),
        (SUPERVISED[0], ["supervised.loss=bce", "supervised.label_smoothing=0.1"], "label_smoothing"),
        (HMR[0], ["accumulate=64"], "more parts than batch_size=24 samples"),
        (HMR[0], ["optim.min_lr=1"], "min_lr=1 with lr=0.001"),
        (HMR[0], ["optim.clip=each"], "clip=each"),
        (HMR[0], ["precision=fp8"], "precision=fp8"),
        (HMR[0], ["mask_ratio=0.999"], "leaves none of 49 process tokens visible"),
    ],
)
def test_what_cannot_be_trained_is_named(name: str, settings: list[str], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        _recipe(name, *settings)


def test_dino_says_how_it_goes_and_leaves_an_encoder(dataset: Path, tmp_path: Path) -> None:
    lines = _run(dataset, tmp_path, *DINO, "steps=3", "watch_every=2")
    assert {"loss", "teacher_entropy", "grad_norm"} <= lines[0].keys()
    assert "rankme" not in lines[0]
    assert 1 <= lines[1]["rankme"] <= 12
    assert 0 < lines[1]["feature_std"] < 2
    assert 0 < lines[0]["teacher_entropy"] < np.log(32)
    encoder = build_model("hipt_patch", dim=24, depth=2, heads=4, pos_grid=6)
    info = load_weights(encoder, tmp_path / "last" / "model.safetensors")
    assert (info.model, info.mpp, info.mean) == ("hipt_patch", 0.5, (0.485, 0.456, 0.406))
    state = _weights(tmp_path)
    assert all(torch.equal(value, state[f"teacher.backbone.{key}"]) for key, value in encoder.state_dict().items())


def test_prototypes_wait_and_the_rest_learns(dataset: Path, tmp_path: Path) -> None:
    recipe = _recipe(*DINO, "dino.freeze_last_layer_steps=2", "steps=4", "optim.schedule=constant")
    before = {key: value.clone() for key, value in make_objective(recipe).model.state_dict().items()}
    for steps, moved in ((2, False), (3, True)):
        settings = (*DINO[1:], "dino.freeze_last_layer_steps=2", f"steps={steps}", "optim.schedule=constant")
        _run(dataset, tmp_path / str(steps), DINO[0], *settings)
        after = _weights(tmp_path / str(steps))
        key = "student.head.last_layer.weight_v"
        assert torch.equal(before[key], after[key]) != moved
        qkv = "student.backbone.blocks.0.attn.qkv.weight"
        assert not torch.equal(before[qkv], after[qkv])


@pytest.mark.parametrize("name", [HMR, (*DINO, "dino.drop_path=0.3")], ids=["hmr", "dino"])
def test_a_batch_in_uneven_parts_gives_the_same_steps(dataset: Path, tmp_path: Path, name: tuple[str, ...]) -> None:
    whole = _run(dataset, tmp_path / "1", *name, "steps=3")
    parts = _run(dataset, tmp_path / "4", *name, "steps=3", "accumulate=4")  # 6 samples: 2, 2, 1, 1
    assert _losses(parts) == pytest.approx(_losses(whole), rel=1e-5)
    one, other = _weights(tmp_path / "1"), _weights(tmp_path / "4")
    for key in ("loss.center",) if "loss.center" in one else ():
        torch.testing.assert_close(other[key], one[key], rtol=1e-5, atol=1e-7)
    assert parts[0]["grad_norm"] == pytest.approx(whole[0]["grad_norm"], rel=1e-4)


def test_buckets_are_settled_by_no_more_samples_than_a_step_takes_at_once() -> None:
    recipe = _recipe(*DINO, "batch_size=20", "accumulate=4")
    objective: Any = make_objective(recipe)
    sizes: list[int] = []
    loss = objective.loss

    def noting(parallel: Any, batch: Any, *more: Any, **keys: Any) -> Any:
        sizes.append(len(batch.images[0]))
        return loss(parallel, batch, *more, **keys)

    objective.loss = noting
    model = objective.model
    parts = _Parts(model, make_optimizer(model, recipe.optim), torch.amp.GradScaler("cpu", enabled=False), None)
    stepper = _Stepper(recipe, Runtime("cpu", "float32", 0, 0, 2), objective, model, parts)
    stepper.settle_buckets(SimpleNamespace(views=recipe.crop_views()))  # type: ignore[arg-type]
    assert sizes == [3]  # 10 samples of a rank: 3, 3, 2, 2
    assert not model.loss.center.any()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_drop_path_follows_from_the_step_so_that_a_resumed_run_repeats_it(dataset: Path, tmp_path: Path) -> None:
    settings = (*DINO, "dino.drop_path=0.5", "checkpoint_every=2")
    straight = _run(dataset, tmp_path / "a", *settings, "steps=4")
    other = _run(dataset, tmp_path / "c", *settings, "steps=4", "seed=1")
    _run(dataset, tmp_path / "b", *settings, "steps=4")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-00000004")
    resumed = _run(dataset, tmp_path / "b", *settings, "steps=4", resume=True)
    assert _losses(resumed) == _losses(straight) != _losses(other)
    left, right = _weights(tmp_path / "a"), _weights(tmp_path / "b")
    assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize(
    "settings",
    [
        SUPERVISED,
        (*SUPERVISED, "supervised.loss=bce"),
        (*SUPERVISED, "supervised.label_smoothing=0.1"),
        (*ENCODER, "model={name: hipt_patch, dim: 24, depth: 1, heads: 3}", "supervised.focal_gamma=2"),
        (*ENCODER, "model={name: hipt_patch, dim: 24, depth: 1, heads: 3}", "supervised.loss=bce"),
    ],
    ids=["heads", "bce", "smoothed", "focal", "one_bce"],
)
def test_classifiers_train_and_say_their_accuracy(dataset: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    lines = _run(dataset, tmp_path, *settings, "steps=3")
    assert all(0 <= line["accuracy"] <= 1 and 0.5 <= line["largest_class"] <= 1 for line in lines)
    assert all(np.isfinite(_losses(lines)))


def test_a_classifier_leaves_an_encoder(dataset: Path, tmp_path: Path) -> None:
    _run(dataset, tmp_path, *ENCODER, "model={name: hipt_patch, dim: 24, depth: 1, heads: 3}", "steps=1")
    encoder = build_model("hipt_patch", dim=24, depth=1, heads=3)
    load_weights(encoder, tmp_path / "last" / "model.safetensors")
    assert torch.equal(encoder.state_dict()["norm.bias"], _weights(tmp_path)["encoder.norm.bias"])


def test_labels_are_those_of_the_rows(dataset: Path) -> None:
    where = "slide_id <> 'synth-0001'"
    recipe = _recipe(*SUPERVISED, f"where={where}", dataset=dataset)
    objective: Any = make_objective(recipe)
    index = pl.read_parquet(dataset / "index.parquet")
    label_of = dict(pl.read_parquet(dataset / "slides.parquet").select("slide_id", "label").iter_rows())
    rows = np.flatnonzero((index["slide_id"] != "synth-0001").to_numpy())
    found = objective._labels(torch.from_numpy(rows))
    expected = [objective.classes.index(label_of[index["slide_id"][int(row)]]) for row in rows]
    assert found.tolist() == expected
    assert len(set(expected)) == 2


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (["model.n_classes=3"], r"model\.n_classes=3, and supervised\.label=label has 2 values: normal, tumour"),
        (["supervised.label=labels"], "no column 'labels'; did you mean 'label'"),
        (["where=label = 'tumour'"], "has one value, 'tumour'"),
    ],
)
def test_labels_that_do_not_fit_are_refused_before_a_run(
    dataset: Path, tmp_path: Path, settings: list[str], match: str
) -> None:
    with pytest.raises(UsageError, match=match):
        _run(dataset, tmp_path / "run", *SUPERVISED, *settings)
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_go_on_with_other_labels(dataset: Path, tmp_path: Path) -> None:
    copy, run = tmp_path / "dataset", tmp_path / "run"
    shutil.copytree(dataset, copy)
    _run(copy, run, *SUPERVISED, "steps=1")
    slides = pl.read_parquet(copy / "slides.parquet")
    slides.with_columns(label=pl.col("label").reverse()).write_parquet(copy / "slides.parquet")
    with pytest.raises(ValueError, match=r"supervised\.label=label are no longer those"):
        _run(copy, run, *SUPERVISED, "steps=2", resume=True)
    slides.write_parquet(copy / "slides.parquet")
    assert len(_run(copy, run, *SUPERVISED, "steps=2", resume=True)) == 2


def test_weights_may_be_a_run_or_a_checkpoint(dataset: Path, tmp_path: Path) -> None:
    _run(dataset, tmp_path / "a", *DINO, "steps=1")
    ways = ("a", "a/last", "a/last/model.safetensors")
    runs = [tmp_path / f"b{number}" for number in range(len(ways))]
    for way, run in zip(ways, runs, strict=True):
        lines = _run(dataset, run, *DINO, "steps=1", "seed=5", f"weights={tmp_path / way}")
        assert lines[0]["loss"] == json.loads((runs[0] / "metrics.jsonl").read_text())["loss"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="nor a run or a checkpoint"):
        _run(dataset, tmp_path / "c", *DINO, "steps=1", f"weights={tmp_path / 'empty'}")


def test_a_run_starts_from_weights_and_leaves_frozen_ones_alone(dataset: Path, tmp_path: Path) -> None:
    _run(dataset, tmp_path / "a", *DINO, "steps=2")
    start = load_file(tmp_path / "a" / "last" / "model.safetensors")
    weights = f"weights={tmp_path / 'a' / 'last' / 'model.safetensors'}"
    frozen = "freeze=[backbone.blocks.0.*, backbone.pos_embed]"
    _run(dataset, tmp_path / "b", *DINO, "steps=2", "seed=5", weights, frozen, "optim.schedule=constant")
    state = _weights(tmp_path / "b")
    kept = [key for key in state if key.startswith(("student.backbone.blocks.0.", "student.backbone.pos_embed"))]
    assert len(kept) > 5
    assert all(torch.equal(state[key], start[key.replace("student", "teacher")]) for key in kept)
    key = "student.backbone.blocks.1.attn.qkv.weight"
    assert not torch.equal(state[key], start[key.replace("student", "teacher")])
    for settings, match in (
        (("freeze=bloks.*",), r"freeze=bloks\.\*: no parameter"),
        (("freeze=*",), "leaves no parameter to learn"),
        (("weights=nowhere.pth",), "weights=nowhere.pth: there is no such file"),
    ):
        with pytest.raises(UsageError, match=match):
            _run(dataset, tmp_path / "c", *DINO, "steps=2", *settings)


def test_averaged_weights_lie_beside_the_last_ones_and_survive_a_resume(dataset: Path, tmp_path: Path) -> None:
    settings = (*HMR, "ema_momentum=0.5", "checkpoint_every=2")
    _run(dataset, tmp_path / "a", *settings, "steps=4")
    _run(dataset, tmp_path / "b", *settings, "steps=4")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-00000004")
    _run(dataset, tmp_path / "b", *settings, "steps=4", resume=True)
    one, other = (_weights(tmp_path / name, "ema.safetensors") for name in ("a", "b"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    earlier = load_file(tmp_path / "a" / "checkpoints" / "step-00000002" / "ema.safetensors")
    key = "blocks.0.mlp_process.0.weight"
    last = _weights(tmp_path / "a")[key]
    assert (one[key] - last).abs().max() < (earlier[key] - last).abs().max()


def test_half_precision_scales_its_loss(dataset: Path, tmp_path: Path) -> None:
    lines = _run(dataset, tmp_path, *HMR, "steps=3", "precision=fp16")
    assert all(line["loss_scale"] > 1 for line in lines)
    assert torch.load(tmp_path / "last" / "state.pt", weights_only=True)["scaler"]["scale"] > 1
    full = _run(dataset, tmp_path / "full", *HMR, "steps=3")
    assert _losses(lines) == pytest.approx(_losses(full), abs=0.02)


def test_a_norm_that_is_not_finite_is_null_in_the_metrics(tmp_path: Path) -> None:
    with TrainLog(_recipe(*HMR, run=tmp_path), Runtime("cpu", "float16", 0, 0, 1), 0) as log:
        log.step(1, {"loss": 0.5, "grad_norm": math.inf}, 0.1, {"seen": 6}, 0.0, 1.0)
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert (line["loss"], line["grad_norm"]) == (0.5, None)


@pytest.mark.parametrize("name", [HMR, DINO, (*SUPERVISED, "steps=3")], ids=["hmr", "dino", "vittm"])
def test_blocks_that_are_computed_twice_give_the_same_run(dataset: Path, tmp_path: Path, name: tuple[str, ...]) -> None:
    plain = _run(dataset, tmp_path / "plain", *name, "steps=2")
    twice = _run(dataset, tmp_path / "twice", *name, "steps=2", "checkpoint_activations=true")
    assert _losses(twice) == pytest.approx(_losses(plain), rel=1e-5)
    assert plain[-1]["grad_norm"] == pytest.approx(twice[-1]["grad_norm"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", [HMR, DINO], ids=["hmr", "dino"])
def test_a_compiled_run_is_the_same_within_tolerance(dataset: Path, tmp_path: Path, name: tuple[str, ...]) -> None:
    if shutil.which("g++") is None and shutil.which("c++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler here")
    settings = (*name, "steps=2", "dino.drop_path=0" if name is DINO else "seed=0")
    plain = _run(dataset, tmp_path / "plain", *settings)
    compiled = _run(dataset, tmp_path / "compiled", *settings, "compile=true")
    assert _losses(compiled) == pytest.approx(_losses(plain), abs=1e-4)
    assert _weights(tmp_path / "plain").keys() == _weights(tmp_path / "compiled").keys()


def test_other_encoders_learn_by_dino(dataset: Path, tmp_path: Path) -> None:
    model = "model={name: timm, architecture: resnet10t}"
    _run(dataset, tmp_path, *(part for part in DINO if "model." not in part), model, "steps=1", "optim.name=sgd")
    encoder = build_model("timm", architecture="resnet10t")
    load_weights(encoder, tmp_path / "last" / "model.safetensors")


def test_schedules() -> None:
    published = Schedules(OptimRecipe(schedule="dino", lr=0.5, min_lr=0.1, warmup_steps=3), 10)
    expected = cosine_schedule(0.5, 0.1, 10, warmup_steps=3)
    assert [published.learning_rate(step) for step in range(10)] == pytest.approx(expected.tolist())
    cosine = Schedules(OptimRecipe(lr=0.5, min_lr=0.1, warmup_steps=2), 10)
    assert [cosine.learning_rate(step) for step in (0, 1, 2, 9)] == pytest.approx([0.25, 0.5, 0.5, 0.1])
    constant = Schedules(OptimRecipe(lr=0.5, schedule="constant", warmup_steps=2), 10)
    assert [constant.learning_rate(step) for step in (0, 1, 5, 9)] == pytest.approx([0.25, 0.5, 0.5, 0.5])
    decay = Schedules(OptimRecipe(weight_decay=0.04, weight_decay_end=0.4), 10)
    expected = cosine_schedule(0.04, 0.4, 10)
    assert [decay.weight_decay(step) for step in range(10)] == pytest.approx(expected.tolist())


def test_only_what_decays_follows_the_schedule_of_the_decay() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    recipe = OptimRecipe(weight_decay=0.1, weight_decay_end=0.2)
    optimizer = make_optimizer(model, recipe)
    Schedules(recipe, 10).apply(optimizer, 5)
    assert [group["weight_decay"] for group in optimizer.param_groups] == pytest.approx([0.15, 0.0])
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 3]
    (everything,) = make_optimizer(model, OptimRecipe(decay="all")).param_groups
    assert len(everything["params"]) == 4
    momentum = make_optimizer(model, OptimRecipe(name="sgd", betas=(0.8, 0.9)))
    assert (type(momentum).__name__, momentum.param_groups[0]["momentum"]) == ("SGD", 0.8)


def test_gradients_are_clipped_together_or_each_by_itself() -> None:
    model = torch.nn.Linear(2, 2)

    def clipped(**keys: Any) -> tuple[float, list[float]]:
        model.weight.grad, model.bias.grad = torch.full((2, 2), 3.0), torch.tensor([0.3, 0.4])
        norm = clip(model, OptimRecipe(**keys))
        return float(norm), [float(p.grad.norm()) for p in model.parameters() if p.grad is not None]

    whole = (36 + 0.25) ** 0.5
    assert clipped(clip_norm=None) == (pytest.approx(whole), pytest.approx([6, 0.5]))
    assert clipped(clip_norm=1) == (pytest.approx(whole), pytest.approx([6 / whole, 0.5 / whole], rel=1e-4))
    assert clipped(clip_norm=1, clip="parameter") == (pytest.approx(whole), pytest.approx([1, 0.5], rel=1e-4))


def test_features_are_watched_for_a_collapse() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = watch_features(torch.randn(512, 16, generator=generator))
    assert spread["rankme"] == pytest.approx(16, rel=0.02)
    assert spread["feature_std"] == pytest.approx(1, rel=0.02)
    same = watch_features(torch.ones(512, 16))
    assert same["rankme"] == pytest.approx(1, abs=1e-3)
    assert same["feature_std"] == pytest.approx(0, abs=1e-3)
    line = watch_features(torch.randn(512, 1, generator=generator) @ torch.ones(1, 16))
    assert line["rankme"] == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vittm_hmr_tiny", "hipt_patch_dino_tiny", "vittm_mae_tiny"])
def test_the_first_twenty_losses_are_as_they_were(dataset: Path, tmp_path: Path, name: str) -> None:
    """Written by `python -m tests.engine.test_train_objectives`; other processors differ in the last digits."""
    losses = _losses(_run(dataset, tmp_path, f"train/{name}", "steps=20", "batch_size=8"))
    assert losses == pytest.approx(json.loads(GOLDEN.read_text())[name], rel=2e-3, abs=2e-3)


def _write_golden() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        synth.run(here / "slides", slides=3, size=1536, workers=1)
        recipe = ShardRecipe(slides=str(here / "slides" / "labels.csv"), out=here / "dataset", workers=1)
        shard.run(recipe, local=True)
        losses = {
            name: _losses(_run(here / "dataset", here / name, f"train/{name}", "steps=20", "batch_size=8"))
            for name in ("vittm_hmr_tiny", "hipt_patch_dino_tiny", "vittm_mae_tiny")
        }
    GOLDEN.write_text(json.dumps(losses, indent=1) + "\n")


if __name__ == "__main__":
    _write_golden()
