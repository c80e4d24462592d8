"""What slide-level models end with, and how their outputs are read.

Grades are cumulative logits, with weights of their own or shared ones (CORAL, arXiv 1901.07884); survival is in
discrete time: hazard h_t in interval t, S_t = (1 - h_1) ... (1 - h_t). Shapes: B slides, C classes, grades or time
intervals.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.hipt_config import HeadKind
from models.objectives.ordinal import predict_ordinal
from models.objectives.regression import predict_class
from models.objectives.survival import hazards, risk, survival


def build_head(kind: HeadKind, dim: int, n_classes: int) -> nn.Module:
    """A module from [B, dim] to logits [B, K]: K is C; 1 for regression; C - 1 for ordinal and coral."""
    if kind == "coral":
        return CoralHead(dim, n_classes)
    outputs = {"classification": n_classes, "regression": 1, "ordinal": n_classes - 1, "survival": n_classes}
    return nn.Linear(dim, outputs[kind])


class CoralHead(nn.Module):
    """Cumulative logits that share their weights: one score, and a threshold for each but the lowest grade."""

    def __init__(self, dim: int, n_classes: int) -> None:
        super().__init__()
        self.score = nn.Linear(dim, 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(n_classes - 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, dim] to [B, C - 1], logits of "the grade is above 0", "above 1", ..."""
        out: Tensor = self.score(x) + self.bias
        return out


def predictions(kind: HeadKind, logits: Tensor, n_classes: int) -> dict[str, Tensor]:
    """What the logits of a head [B, K] say, in float32.

    classification: probabilities [B, C]; class, int64 [B].
    regression: value [B]; class, the rounded value within 0 .. C - 1.
    ordinal, coral: above [B, C - 1], the probability of a grade above 0, 1, ...; class, how many of them are above
        one half before the first that is not.
    survival: hazards [B, C]; survival [B, C], the probability of living beyond each interval; risk [B], minus the sum
        of the latter.
    """
    logits = logits.float()
    if kind == "classification":
        return {"probabilities": logits.softmax(dim=-1), "class": logits.argmax(dim=-1)}
    if kind == "regression":
        return {"value": logits.squeeze(-1), "class": predict_class(logits, n_classes)}
    if kind == "survival":
        return {"hazards": hazards(logits), "survival": survival(logits), "risk": risk(logits)}
    return {"above": logits.sigmoid(), "class": predict_ordinal(logits)}
