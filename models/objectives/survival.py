"""Discrete-time survival: times in bins, one hazard per bin (arXiv 1907.00825; loss as in MCAT and HIPT).

h_t = sigmoid(logit_t) is the probability of the event in bin t, given that it has not come before;
S_t = prod_{j <= t} (1 - h_j) the probability that it comes after bin t; S_{-1} = 1. censored = 1 means that the event
was not seen until the time given.

Shapes: B patients, T bins.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-7  # floor of each probability in the loss
_EDGE = 1e-6  # how far the outer edges of the bins lie beyond the times


def nll_survival_loss(logits: Tensor, bin_index: Tensor, censored: Tensor, alpha: float = 0.15) -> Tensor:
    """Negative log-likelihood, float32 scalar, mean over patients.

    An event in bin y costs u = -log S_{y-1} - log h_y, a patient censored in it k = -log S_y, each probability at least
    1e-7; the loss is (1 - alpha)(u + k) + alpha u.

    Args:
        logits: [B, T].
        bin_index: integers [B] or [B, 1], the bin of each time.
        censored: [B] or [B, 1], 1 or True where no event was seen.
        alpha: weight taken from the censored; the published training uses 0.15, its validation 0.

    Raises:
        ValueError: numbers of patients that differ.
    """
    at_B1 = bin_index.to(logits.device).long().reshape(-1, 1)
    is_censored_B1 = censored.to(logits.device).bool().reshape(-1, 1)
    if not len(logits) == len(at_B1) == len(is_censored_B1):
        raise ValueError(
            "logits, bin_index and censored must be of equally many patients: "
            f"found {len(logits)}, {len(at_B1)} and {len(is_censored_B1)}"
        )
    log_hazard_BT, log_survival_BT = _log_hazard_and_survival(logits)
    floor = math.log(_EPS)
    log_before_BT = F.pad(log_survival_BT, (1, 0))
    seen_B1 = -(log_before_BT.gather(1, at_B1).clamp(min=floor) + log_hazard_BT.gather(1, at_B1).clamp(min=floor))
    unseen_B1 = -log_survival_BT.gather(1, at_B1).clamp(min=floor)
    return torch.where(is_censored_B1, (1 - alpha) * unseen_B1, seen_B1).mean()


def hazards(logits: Tensor) -> Tensor:
    """[B, T] to h, [B, T] in (0, 1)."""
    return _log_hazard_and_survival(logits)[0].exp()


def survival(logits: Tensor) -> Tensor:
    """[B, T] to S, [B, T] in (0, 1), falling with t."""
    return _log_hazard_and_survival(logits)[1].exp()


def risk(logits: Tensor) -> Tensor:
    """[B, T] to [B]: minus the sum of S over the bins, higher where the event is expected earlier."""
    return -survival(logits).sum(dim=-1)


def time_bin_edges(time: npt.ArrayLike, censored: npt.ArrayLike, n_bins: int) -> npt.NDArray[np.float64]:
    """float64 [n_bins + 1]: quantiles of the times of events; the outer edges enclose all times by 1e-6.

    Args:
        time: [B], in any unit.
        censored: [B], 1 or True where no event was seen.

    Raises:
        ValueError: times that are not finite, no event, or too few different times of events for so many bins.
    """
    times = np.asarray(time, dtype=np.float64)
    events = times[~np.asarray(censored, dtype=bool)]
    if not np.isfinite(times).all():
        raise ValueError(f"every time must be a finite number: found {int((~np.isfinite(times)).sum())} others")
    if not len(events):
        raise ValueError("bins are quantiles of the times of events, and every case is censored")
    edges: npt.NDArray[np.float64] = np.quantile(events, np.linspace(0, 1, n_bins + 1))
    edges[0], edges[-1] = times.min() - _EDGE, times.max() + _EDGE
    if not (np.diff(edges) > 0).all():
        raise ValueError(
            f"{len(events)} events at {len(np.unique(events))} different times make no {n_bins} bins; ask for fewer"
        )
    return edges


def discretize_times(time: npt.ArrayLike, censored: npt.ArrayLike, n_bins: int) -> npt.NDArray[np.int64]:
    """int64 [B]: the bin of each time, by `time_bin_edges` of the same cases. Raises as that does."""
    return bin_of(time, time_bin_edges(time, censored, n_bins))


def bin_of(time: npt.ArrayLike, edges: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """int64 [B]: the right-open bin of each time by given edges (other cases'); beyond them lie the outer bins."""
    return np.searchsorted(edges[1:-1], np.asarray(time, dtype=np.float64), side="right").astype(np.int64)


def _log_hazard_and_survival(logits: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.logsigmoid(logits), F.logsigmoid(-logits).cumsum(dim=-1)
