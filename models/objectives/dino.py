"""DINO (arXiv 2104.14294) as HIPT trains with it: head, loss with its centre, views, schedules, gradients, teacher.

`DINO` puts the pieces together; a step of it is

    dino(views, epoch)["loss"].backward()
    dino.after_backward(epoch)          # clips each gradient by itself, spares the prototypes at first
    optimizer.step()
    dino.after_step(step, total)        # the teacher follows

Epochs are whatever the caller counts temperatures and freezing in: epochs, as published, or steps.

Shapes: B images, V views, K prototypes (out_dim).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAST_LAYER = "last_layer"


class WeightNormLinear(nn.Module):
    """A bias-free linear layer with rows w = g v/|v|; keys `weight_g` [out, 1] and `weight_v` [out, in].

    These are the keys of torch's deprecated `weight_norm`, which published DINO heads carry.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1))
        self.weight_v = nn.Parameter(nn.Linear(in_dim, out_dim, bias=False).weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_dim] to [..., out_dim]."""
        return F.linear(x, self.weight_g * self.weight_v / self.weight_v.norm(dim=1, keepdim=True))


class DINOHead(nn.Module):
    """Three linear layers with GELU between, L2-normalisation, and a weight-normalised layer of prototypes.

    Args:
        in_dim: width of the backbone's features.
        out_dim: K, number of prototypes.
        hidden_dim: width between the linear layers.
        bottleneck_dim: width of what is normalised.
        norm_last_layer: keep the prototypes at unit length (`weight_g` is frozen at 1).
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        *,
        norm_last_layer: bool = True,
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)
        self.last_layer.weight_g.requires_grad_(not norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, in_dim] to prototype scores [B, K]."""
        return self.last_layer(F.normalize(_at_least_float32(self.mlp(x)), dim=-1))


class MultiCropWrapper(nn.Module):
    """A backbone over views of several sizes, and a head over all of its features at once.

    Args:
        backbone: maps a batch of views to [B, D]; a classifier of its own (`head`, `fc`) is taken off.
        head: maps [V * B, D] to [V * B, K].
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        for name in ("head", "fc"):
            if hasattr(backbone, name):
                setattr(backbone, name, nn.Identity())
        self.backbone = backbone
        self.head = head

    def forward(self, views: Tensor | Sequence[Tensor]) -> Tensor:
        """Views, each [B, ...], to [V * B, K] in the order given; consecutive views of one shape run as one batch."""
        return self.head(self.features(views))

    def features(self, views: Tensor | Sequence[Tensor]) -> Tensor:
        """The same views to the backbone's features [V * B, D]."""
        if isinstance(views, Tensor):
            views = [views]
        runs = [torch.cat(list(run)) for _, run in groupby(views, key=lambda view: view.shape[1:])]
        return torch.cat([self.backbone(run) for run in runs])


class DINOLoss(nn.Module):
    """Cross-entropy between the teacher's centred, sharpened view and every other view of the student.

    q_i = softmax((t_i - centre)/teacher_temp), p_v = softmax(s_v/student_temp); the loss is the mean of -q_i . log p_v
    over the images and over all pairs of a teacher's view i and a student's view v != i. Then
    centre <- m centre + (1 - m) mean(t), over both views of all ranks.

    Args:
        out_dim: K.
        n_crops: V, the student's views; the first two are the teacher's.
        warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs: the teacher's temperature goes from the first to
            the second in as many evenly spaced epochs, both ends included, and stays there.
        n_epochs: epochs lie in [0, n_epochs).

    Raises:
        ValueError: fewer than two crops, or a warm-up longer than the training.
    """

    center: Tensor

    def __init__(
        self,
        out_dim: int,
        n_crops: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        n_epochs: int,
        *,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        if n_crops < 2:
            raise ValueError(f"n_crops counts both global crops, so it must be at least 2: found {n_crops}")
        if not 0 <= warmup_teacher_temp_epochs <= n_epochs:
            raise ValueError(
                f"warmup_teacher_temp_epochs must lie in [0, n_epochs={n_epochs}]: found {warmup_teacher_temp_epochs}"
            )
        self.n_crops = n_crops
        self.n_epochs = n_epochs
        self.student_temp = student_temp
        self.teacher_temp = teacher_temp
        self.center_momentum = center_momentum
        self.teacher_entropy: Tensor | None = None
        self._held: list[Tensor] = []  # sums of teacher scores, and how many, of parts whose centre has not moved
        self._warmup_temps = np.linspace(warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs).tolist()
        self.register_buffer("center", torch.zeros(1, out_dim))

    def forward(self, student_out: Tensor, teacher_out: Tensor, epoch: int, *, move_center: bool = True) -> Tensor:
        """The loss, a float32 scalar; moves the centre, and notes the mean entropy (nats) of q in `teacher_entropy`.

        Args:
            student_out: scores [V * B, K], view by view.
            teacher_out: scores [2 * B, K] of the first two views; no gradient flows into them.
            epoch: for the teacher's temperature.
            move_center: False for each part but the last of a batch that is computed in parts: the centre then moves
                once, by the mean over all parts.

        Raises:
            ValueError: numbers of rows that do not belong together, or an epoch outside [0, n_epochs).
        """
        if len(student_out) * 2 != len(teacher_out) * self.n_crops:
            raise ValueError(
                f"the student must have {self.n_crops} views (n_crops) of each image and the teacher 2: found "
                f"{len(student_out)} and {len(teacher_out)} rows"
            )
        teacher_out = _at_least_float32(teacher_out.detach())
        log_p_VBK = F.log_softmax(_at_least_float32(student_out) / self.student_temp, dim=-1).unflatten(
            0, (self.n_crops, -1)
        )
        sharpened = (teacher_out - self.center) / self.temperature_at(epoch)
        q_2BK = sharpened.softmax(dim=-1).unflatten(0, (2, -1))
        others_2BK = log_p_VBK.sum(dim=0) - log_p_VBK[:2]  # for each teacher's view, all of the student's but this one
        loss = -(q_2BK * others_2BK).sum() / (others_2BK.shape[1] * 2 * (self.n_crops - 1))
        self.teacher_entropy = torch.special.entr(q_2BK).sum(dim=-1).mean()
        self._note_scores(teacher_out, move_center)
        return loss

    def temperature_at(self, epoch: int) -> float:
        """The teacher's temperature in `epoch`."""
        if not 0 <= epoch < self.n_epochs:
            raise ValueError(f"epoch must lie in [0, n_epochs={self.n_epochs}): found {epoch}")
        return self._warmup_temps[epoch] if epoch < len(self._warmup_temps) else self.teacher_temp

    @torch.no_grad()
    def _note_scores(self, teacher_out: Tensor, move_center: bool) -> None:
        rows = teacher_out.new_full((1, 1), len(teacher_out))
        self._held.append(torch.cat([teacher_out.sum(dim=0, keepdim=True), rows], dim=1))
        if not move_center:
            return
        total_1X = torch.stack(self._held).sum(dim=0)
        self._held.clear()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total_1X)
        mean_1K = total_1X[:, :-1] / total_1X[:, -1:]
        self.center.lerp_(mean_1K.to(self.center.dtype), 1 - self.center_momentum)


class DINO(nn.Module):
    """Student, teacher and loss as one module: its state dict is all that a resumed training needs but the optimiser's.

    Args:
        student: MultiCropWrapper(backbone, DINOHead).
        teacher: another of the same shape, without drop path; it takes the student's weights and no gradients.
        loss: of as many prototypes as the heads have.
        teacher_momentum: at the start; it rises to 1 along half a cosine.
        clip_norm: longest gradient of a single parameter.
        frozen_epochs: epochs in which the prototypes do not learn.
    """

    def __init__(
        self,
        student: MultiCropWrapper,
        teacher: MultiCropWrapper,
        loss: DINOLoss,
        *,
        teacher_momentum: float = 0.996,
        clip_norm: float = 3.0,
        frozen_epochs: int = 1,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.loss = loss
        self.teacher_momentum = teacher_momentum
        self.clip_norm = clip_norm
        self.frozen_epochs = frozen_epochs
        teacher.load_state_dict(student.state_dict())
        teacher.requires_grad_(False)

    def forward(self, views: Sequence[Tensor], epoch: int, *, move_center: bool = True) -> dict[str, Tensor]:
        """Student and teacher on views [B, ...] each, the two global ones first. Moves the centre, see `DINOLoss`.

        Returns:
            loss: float32 scalar.
            teacher_entropy: float32 scalar without gradient, nats, of the teacher's sharpened scores: 0 where one
                prototype takes all, log K where all are alike.
            features: float [2 * B, D] without gradient, the teacher's.
        """
        features_VD = self.teacher.features(views[:2])
        loss = self.loss(self.student(views), self.teacher.head(features_VD), epoch, move_center=move_center)
        return {"loss": loss, "teacher_entropy": self.loss.teacher_entropy, "features": features_VD.detach()}

    def after_backward(self, epoch: int) -> dict[str, Tensor]:
        """Prepare the gradients for the optimiser; returns their norms as `clip_gradients` does."""
        norms = clip_gradients(self.student, self.clip_norm)
        if epoch < self.frozen_epochs:
            cancel_last_layer_gradients(self.student)
        return norms

    def after_step(self, step: int, total: int) -> None:
        """Let the teacher follow the student, after optimiser step `step` (1-based) of `total`."""
        left = 0.5 * (1 + math.cos(math.pi * (step - 1) / total))
        update_teacher(self.student, self.teacher, 1 - (1 - self.teacher_momentum) * left)


def cosine_schedule(
    base: float, final: float, steps: int, *, warmup_steps: int = 0, start: float = 0.0
) -> npt.NDArray[np.float64]:
    """One value per step, float64 [steps]: linear from `start` to `base`, then half a cosine towards `final`.

    As published, `base` ends the warm-up and begins the cosine, and the step that would reach `final` is not there.
    Published values: learning rate 0.0005 * batch/256 to 1e-6 after 10 epochs of warm-up, weight decay 0.04 to 0.4,
    momentum of the teacher 0.996 to 1.

    Raises:
        ValueError: the warm-up is longer than the schedule.
    """
    if not 0 <= warmup_steps <= steps:
        raise ValueError(f"warmup_steps must lie in [0, steps={steps}]: found {warmup_steps}")
    rest = steps - warmup_steps
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * np.arange(rest) / max(rest, 1)))
    return np.concatenate([np.linspace(start, base, warmup_steps), cosine])


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two optimiser groups: what weight decay applies to, and (`weight_decay` 0) biases and other 1-D parameters.

    Class tokens, position tables and prototypes are decayed, as published. A schedule of the decay sets group 0 alone.
    """
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (spared if name.endswith(".bias") or parameter.ndim == 1 else decayed).append(parameter)
    return [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float) -> dict[str, Tensor]:
    """Shrink each parameter's gradient by itself: g <- g min(1, max_norm/(|g| + 1e-6)).

    Returns:
        name -> |g| before clipping (L2, 0-d), of the parameters that have a gradient.
    """
    norms = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            norms[name] = parameter.grad.norm()
            parameter.grad.mul_((max_norm / (norms[name] + 1e-6)).clamp(max=1.0))
    return norms


def cancel_last_layer_gradients(model: nn.Module) -> None:
    """Forget the gradients of the prototypes (names that contain `last_layer`): AdamW then leaves them, undecayed."""
    for name, parameter in model.named_parameters():
        if LAST_LAYER in name:
            parameter.grad = None


@torch.no_grad()
def update_teacher(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """teacher <- momentum teacher + (1 - momentum) student, over all parameters; buffers stay.

    Raises:
        ValueError: the two have different parameters (a `module.` prefix, DDP's, does not matter).
    """
    sources, targets = ([*model.parameters()] for model in (student, teacher))
    if [p.shape for p in sources] != [p.shape for p in targets]:
        raise ValueError("student and teacher must have the same parameters in the same order")
    for source, target in zip(sources, targets, strict=True):
        target.lerp_(source.to(target.dtype), 1 - momentum)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
