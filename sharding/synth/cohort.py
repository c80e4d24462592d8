"""A set of painted slides as a small study: patients, labels and survival times, all by hash."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sharding.synth.noise import seed_key, uniform

# Drawn tumour shares are 0 or at least 0.15 (`SlideSpec.tumour_share_wanted`): no slide is near the threshold.
TUMOUR_LABEL_FROM = 0.05
LABEL_COLUMNS = ("slide_id", "path", "patient_id", "label", "survival_months", "censored", "tumour_share")
# In sets of more than six slides, each five slides come from four patients: the fourth has two.
_TWO_SLIDES_ABOVE = 6
_SLIDES_PER_GROUP, _PATIENTS_PER_GROUP = 5, 4


def patient_number(index: int, slides: int) -> int:
    """The patient, from 0, of slide `index` in a set of `slides`."""
    if slides <= _TWO_SLIDES_ABOVE:
        return index
    group, place = divmod(index, _SLIDES_PER_GROUP)
    return group * _PATIENTS_PER_GROUP + min(place, _PATIENTS_PER_GROUP - 1)


def label_rows(seed: int, truths: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row of labels.csv (`LABEL_COLUMNS`) for each slide's truth, in order of the slides' index.

    A patient's survival is exponential with a hazard per month of exp(3 * share) / 60, where share is the mean tumour
    share of the patient's slides; it is censored (1) at a time drawn evenly from 12 to 96 months.
    """
    patients = [patient_number(index, len(truths)) for index in range(len(truths))]
    rows = []
    for truth, patient in zip(truths, patients, strict=True):
        shares = [t["tumour_share"] for t, p in zip(truths, patients, strict=True) if p == patient]
        months, censored = _survival(seed_key(seed, 100, patient), sum(shares) / len(shares))
        rows.append(
            {
                "slide_id": truth["slide_id"],
                "path": f"{truth['slide_id']}.svs",
                "patient_id": f"patient-{patient:04d}",
                "label": "tumour" if truth["tumour_share"] >= TUMOUR_LABEL_FROM else "normal",
                "survival_months": months,
                "censored": censored,
                "tumour_share": truth["tumour_share"],
            }
        )
    return rows


def _survival(key: int, tumour_share: float) -> tuple[float, int]:
    """(months, censored) of one patient; rounded to a tenth, which also hides a logarithm's last bit."""
    death = -math.log(1.0 - uniform(key, 0)) * 60.0 / math.exp(3.0 * tumour_share)
    last_seen = 12.0 + 84.0 * uniform(key, 1)
    return max(0.1, round(min(death, last_seen), 1)), int(last_seen < death)
