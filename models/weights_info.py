"""What must be known of weights to use them rightly. It travels with them, and with every feature made with them.

The same architecture with the same weights gives other features under another normalisation, spacing or position rule,
and published HIPT code disagrees with itself about all three.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

_MARK = "engine_weights"  # metadata of a safetensors file is ours where this key is
_VERSION = "1"
PREFIX = "engine_prefix"  # in the same metadata: the weights meant are those under this prefix, named without it


@dataclass(frozen=True, slots=True)
class WeightsInfo:
    """Facts about one set of weights; None is unknown.

    Attributes:
        digest: `sha256:` and the hash of names, dtypes, shapes and values, the same in every container.
        model, config: the name and settings that `build_model` takes.
        mean, std: of the normalisation of RGB in [0, 1], one number per channel.
        mpp: spacing the model was trained at, in um/px.
        pos_interpolation: `given` or `recomputed`, where the model has that choice.
    """

    digest: str
    model: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    mpp: float | None = None
    pos_interpolation: str | None = None

    def to_metadata(self) -> dict[str, str]:
        """For safetensors: JSON by field, without those that are unknown."""
        known = {key: json.dumps(value) for key, value in asdict(self).items() if value is not None}
        return {"format": "pt", _MARK: _VERSION, **known}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> WeightsInfo | None:
        """What `to_metadata` wrote, or None where it wrote nothing.

        Raises ValueError where another version or an incomplete one wrote it.
        """
        if _MARK not in metadata:
            return None
        if metadata[_MARK] != _VERSION:
            raise ValueError(f"its metadata has version {metadata[_MARK]}: expected {_VERSION}; convert it again")
        try:
            values: dict[str, Any] = {
                key: json.loads(metadata[key]) for key in cls.__dataclass_fields__ if key in metadata
            }
            values |= {key: tuple(values[key]) for key in ("mean", "std") if key in values}
            return cls(**values)
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"its metadata cannot be read ({error}); convert it again") from None


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """`sha256:` and 64 hex digits over names (sorted), dtypes, shapes and little-endian bytes."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"
