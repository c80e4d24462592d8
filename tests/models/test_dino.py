"""DINO: the published numbers, the formulas written out, and what a step does to student, teacher and centre."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models import MODEL_CONFIGS, build_model
from models.objectives.dino import (
    DINO,
    DINOHead,
    DINOLoss,
    MultiCropWrapper,
    cancel_last_layer_gradients,
    clip_gradients,
    cosine_schedule,
    parameter_groups,
    update_teacher,
)

TOLERANCE = 1e-5  # the published numbers are given to 1e-4


def filled(model: nn.Module, formulas: Any, salt: str = "") -> nn.Module:
    state = {key: torch.from_numpy(formulas.param(key, v.shape, salt)) for key, v in model.state_dict().items()}
    model.load_state_dict(state)
    return model


def small_loss(**settings: Any) -> DINOLoss:
    defaults = {"out_dim": 5, "n_crops": 4, "warmup_teacher_temp": 0.04, "teacher_temp": 0.07}
    return DINOLoss(**{**defaults, "warmup_teacher_temp_epochs": 3, "n_epochs": 10, **settings})


def small_student(seed: int = 0) -> MultiCropWrapper:
    """Views [B, 3, h, w] of any size; 8 features, 6 prototypes."""
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return MultiCropWrapper(backbone, DINOHead(8, 6, 16, 4))


def small_views(seed: int = 0, batch: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 3, side, side, generator=generator) for side in (8, 8, 5, 5)]


# Published numbers ---------------------------------------------------------------------------------------------------


def test_head_matches_the_published_code(published: Any) -> None:
    formulas, keys = published.formulas("fill_hipt"), published.keys("keys_hipt_dino")
    head = filled(DINOHead(192, 512, 2048, 256), formulas)
    assert {key: list(value.shape) for key, value in head.state_dict().items()} == keys["dino_head_192_512"]
    out = head(torch.from_numpy(formulas.normal("headin", (4, 192))))
    assert np.abs(out.detach().numpy() - published.arrays("hipt_dino")["dino.head_out"]).max() < TOLERANCE


def test_loss_and_centre_match_the_published_code(published: Any) -> None:
    formulas, expected = published.formulas("fill_hipt"), published.arrays("hipt_dino")
    criterion = DINOLoss(64, 10, 0.04, 0.04, 0, 100)
    for call, epoch in enumerate((0, 0, 1)):
        student = torch.from_numpy(formulas.normal(f"stu{call}", (40, 64)))
        teacher = torch.from_numpy(formulas.normal(f"tea{call}", (8, 64)))
        assert criterion(student, teacher, epoch).item() == pytest.approx(expected["dino.loss.const"][call], abs=1e-5)
        centre = expected[f"dino.center_after.const.{call}"]
        assert criterion.center.shape == centre.shape
        assert np.abs(criterion.center.numpy() - centre).max() < 1e-6


def test_learning_rates_match_the_published_code(published: Any) -> None:
    rates = cosine_schedule(0.0005 * 512 / 256, 1e-6, 20 * 7, warmup_steps=10 * 7)
    assert np.abs(rates - published.arrays("hipt_dino")["dino.lr_sched"]).max() < 1e-12


def test_a_whole_step_matches_the_published_code(published: Any) -> None:
    if "hipt_region" not in MODEL_CONFIGS:
        pytest.skip("the step's backbone, hipt_region, is not among the models yet")
    formulas, expected = published.formulas("fill_hipt"), published.arrays("hipt_dino")
    keys = published.keys("keys_hipt_dino")
    student, teacher = (
        filled(MultiCropWrapper(build_model("hipt_region"), DINOHead(192, 512, 2048, 256)), formulas, salt)
        for salt in ("", "teacher:")
    )
    assert {key: list(value.shape) for key, value in student.state_dict().items()} == keys["multicrop_vit4k"]
    views = [
        torch.from_numpy(formulas.normal(f"crop{i}", (2, 384, 14, 14) if i < 2 else (2, 384, 6, 6))) for i in range(10)
    ]
    out = student(views)
    assert np.abs(out[:, :64].detach().numpy() - expected["step.student_out_first64"]).max() < TOLERANCE
    loss = DINOLoss(512, 10, 0.04, 0.04, 0, 100)(out, teacher(views[:2]), 0)
    assert loss.item() == pytest.approx(expected["step.loss"].item(), abs=1e-5)
    loss.backward()
    norms = clip_gradients(student, 3.0)
    assert sorted(norms) == sorted(keys["step.grad_param_order"])
    found = torch.stack([norms[name] for name in keys["step.grad_param_order"]]).numpy()
    assert np.abs(found - expected["step.gradnorm_preclip"]).max() < 1e-4

    names = {id(parameter): name for name, parameter in student.named_parameters()}
    decayed, spared = ({names[id(p)] for p in group["params"]} for group in parameter_groups(student))
    assert decayed == {*keys["param_groups_vit4k_dino"]["regularized"]}
    assert spared == {*keys["param_groups_vit4k_dino"]["not_regularized"]}
    cancel_last_layer_gradients(student)
    assert [name for name, p in student.named_parameters() if p.grad is None] == keys["cancelled_epoch0"]


# Against formulas written out ----------------------------------------------------------------------------------------


def slow_loss(student: Tensor, teacher: Tensor, centre: Tensor, temperature: float, n_crops: int) -> float:
    batch = len(student) // n_crops
    terms = []
    for i in range(2):
        for v in range(n_crops):
            if v == i:
                continue
            for b in range(batch):
                t, s = (teacher[i * batch + b] - centre[0]) / temperature, student[v * batch + b] / 0.1
                q, p = t.exp() / t.exp().sum(), s.exp() / s.exp().sum()
                terms.append(-sum(float(q[k]) * math.log(float(p[k])) for k in range(len(q))))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("n_crops", [2, 4])
def test_loss_is_the_mean_cross_entropy_over_pairs_of_different_views(n_crops: int) -> None:
    torch.manual_seed(1)
    criterion = small_loss(n_crops=n_crops).double()
    student, teacher = torch.rand(n_crops * 3, 5).double(), torch.rand(6, 5).double()
    centre = torch.zeros(1, 5).double()
    for epoch, temperature in ((0, 0.04), (1, 0.055), (2, 0.07), (9, 0.07)):
        found = criterion(student, teacher, epoch)
        assert found.item() == pytest.approx(slow_loss(student, teacher, centre, temperature, n_crops), abs=1e-9)
        centre = 0.9 * centre + 0.1 * teacher.mean(dim=0, keepdim=True)
        assert torch.allclose(criterion.center, centre)


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher = torch.randn(12, 5, requires_grad=True), torch.randn(6, 5, requires_grad=True)
    small_loss()(student, teacher, 0).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_head_is_a_cosine_with_each_prototype() -> None:
    head = DINOHead(8, 6, 16, 4)
    x = torch.randn(3, 8)
    hidden = head.mlp(x)
    slow = torch.stack([hidden @ v / (hidden.norm(dim=1) * v.norm()) for v in head.last_layer.weight_v], dim=1)
    assert torch.allclose(head(x), slow, atol=1e-6)
    assert not head.last_layer.weight_g.requires_grad
    assert DINOHead(8, 6, 16, 4, norm_last_layer=False).last_layer.weight_g.requires_grad


def test_every_trainable_parameter_gets_a_gradient() -> None:
    student = small_student()
    small_loss(out_dim=6)(student(small_views()), student(small_views()[:2]).detach(), 0).backward()
    unmoved = [
        name for name, p in student.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert unmoved == []


def test_views_of_one_size_run_together_and_come_back_in_order() -> None:
    student = small_student().eval()
    sizes: list[int] = []
    student.backbone.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    views = small_views()
    together = student(views)
    assert sizes == [6, 6]
    assert torch.allclose(together, torch.cat([student(view) for view in views]), atol=1e-6)
    alternating = [views[0], views[2], views[1]]
    assert torch.allclose(student(alternating), torch.cat([student(view) for view in alternating]), atol=1e-6)


def test_the_backbone_loses_its_own_classifier() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x)

    wrapped = MultiCropWrapper(Classifier(), nn.Identity())
    assert wrapped(torch.ones(1, 8)).shape == (1, 8)
    assert list(wrapped.state_dict()) == []


def test_schedule_warms_up_to_the_base_and_falls_towards_the_final_value() -> None:
    values = cosine_schedule(1.0, 0.2, 10, warmup_steps=4, start=0.4)
    assert values[:4].tolist() == pytest.approx([0.4, 0.6, 0.8, 1.0])
    assert values[4:].tolist() == pytest.approx([0.2 + 0.4 * (1 + math.cos(math.pi * i / 6)) for i in range(6)])
    assert len(cosine_schedule(0.04, 0.4, 5)) == 5
    assert cosine_schedule(1.0, 0.0, 3, warmup_steps=3).tolist() == [0.0, 0.5, 1.0]


def test_each_gradient_is_clipped_by_itself() -> None:
    model = nn.Linear(2, 1)
    model.weight.grad, model.bias.grad = torch.tensor([[3.0, 4.0]]), torch.tensor([0.5])
    norms = clip_gradients(model, 2.0)
    assert {name: norm.item() for name, norm in norms.items()} == {"weight": 5.0, "bias": 0.5}
    assert model.weight.grad[0].tolist() == pytest.approx([1.2, 1.6], abs=1e-6)
    assert model.bias.grad.item() == 0.5


def test_the_teacher_follows_by_its_momentum() -> None:
    student, teacher = nn.Linear(2, 1), nn.Linear(2, 1)
    expected = 0.9 * teacher.weight.detach() + 0.1 * student.weight.detach()
    update_teacher(student, teacher, 0.9)
    assert torch.allclose(teacher.weight, expected)
    with pytest.raises(ValueError, match="same parameters"):
        update_teacher(nn.Linear(3, 1), teacher, 0.9)


# A step, put together ------------------------------------------------------------------------------------------------


def small_dino(**settings: Any) -> DINO:
    return DINO(small_student(0), small_student(1), small_loss(out_dim=6), **settings)


def test_the_teacher_starts_as_a_copy_and_asks_for_no_gradients() -> None:
    dino = small_dino()
    pairs = zip(dino.student.parameters(), dino.teacher.parameters(), strict=True)
    assert all(torch.equal(a, b) and not b.requires_grad for a, b in pairs)
    assert {"loss.center", "teacher.head.last_layer.weight_v"} <= dino.state_dict().keys()


def test_prototypes_stay_for_the_frozen_epochs_weight_decay_included() -> None:
    dino: Any = small_dino(teacher_momentum=0.5)
    optimizer = torch.optim.AdamW(parameter_groups(dino), lr=1e-2, weight_decay=0.1)
    prototypes = dino.student.head.last_layer.weight_v
    for epoch, moves in ((0, False), (1, True)):
        before = prototypes.detach().clone()
        teacher_before = dino.teacher.backbone[0].weight.clone()
        optimizer.zero_grad()
        dino(small_views(epoch), epoch)["loss"].backward()
        dino.after_backward(epoch)
        optimizer.step()
        dino.after_step(epoch + 1, 10)
        assert torch.equal(before, prototypes) is not moves
        momentum = 1 - 0.5 * 0.5 * (1 + math.cos(math.pi * epoch / 10))
        followed = momentum * teacher_before + (1 - momentum) * dino.student.backbone[0].weight
        assert torch.allclose(dino.teacher.backbone[0].weight, followed, atol=1e-7)


def test_the_loss_falls_and_resuming_from_the_state_dict_goes_on_alike() -> None:
    def train(dino: DINO, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
        losses = []
        for step in steps:
            optimizer.zero_grad()
            loss = dino(small_views(step % 2), 0)["loss"]
            loss.backward()
            dino.after_backward(1)
            optimizer.step()
            dino.after_step(step + 1, 20)
            losses.append(loss.item())
        return losses

    def optimizer_of(dino: DINO) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameter_groups(dino), lr=0.5)

    whole = small_dino()
    losses = train(whole, optimizer_of(whole), range(20))
    assert losses[-1] < losses[0] - 0.05

    half = small_dino()
    train(half, optimizer_of(half), range(10))
    resumed = DINO(small_student(5), small_student(6), small_loss(out_dim=6))
    resumed.load_state_dict(half.state_dict())
    assert train(resumed, optimizer_of(resumed), range(10, 20)) == losses[10:]


def test_bf16_autocast_stays_close_to_float32() -> None:
    dino, views = small_dino(), small_views(batch=16)
    exact = dino.student(views)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = dino.student(views)
        loss = dino(views, 0)["loss"]
    assert torch.nn.functional.cosine_similarity(exact, rough.float(), dim=1).min() > 0.999
    assert loss.dtype == dino.loss.center.dtype == torch.float32
    assert loss.item() == pytest.approx(small_dino()(views, 0)["loss"].item(), abs=0.05)


RANK = """
import sys, torch
from torch.distributed import FileStore
from models.objectives.dino import DINOLoss
rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", store=FileStore(sys.argv[2], 2), rank=rank, world_size=2)
criterion = DINOLoss(5, 4, 0.04, 0.07, 3, 10)
criterion(torch.zeros(12, 5), torch.full((6, 5), float(rank)), 0)
print(*criterion.center[0].tolist())
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_the_centre_is_the_mean_over_ranks(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for rank in ranks:
        printed, _ = rank.communicate(timeout=120)
        assert [float(word) for word in printed.split()[-5:]] == pytest.approx([0.05] * 5)


# Refusals ------------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2: found 1"):
        small_loss(n_crops=1)
    with pytest.raises(ValueError, match=r"\[0, n_epochs=2\]: found 3"):
        small_loss(n_epochs=2)
    with pytest.raises(ValueError, match="found 9 and 6 rows"):
        small_loss()(torch.zeros(9, 5), torch.zeros(6, 5), 0)
    with pytest.raises(ValueError, match=r"epoch must lie in \[0, n_epochs=10\): found 10"):
        small_loss()(torch.zeros(12, 5), torch.zeros(6, 5), 10)
    with pytest.raises(ValueError, match=r"\[0, steps=5\]: found 6"):
        cosine_schedule(1.0, 0.0, 5, warmup_steps=6)
