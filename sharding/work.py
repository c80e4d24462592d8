"""The folder for work in an unfinished dataset: where plans, rows, encoded patches and records lie until the end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sharding.qc import qc_name

WORK = ".work"
_FOLDERS = ("plans", "slides", "groups", "shards")


@dataclass(frozen=True, slots=True)
class WorkFolder:
    """Paths of one dataset's work, and of its shards."""

    dataset: Path

    @property
    def path(self) -> Path:
        return self.dataset / WORK

    @property
    def folders(self) -> list[Path]:
        """Every folder that a run writes to, parents first."""
        return [
            self.dataset,
            self.path,
            *(self.path / name for name in _FOLDERS),
            self.dataset / "shards",
            self.dataset / "qc",
        ]

    def plan(self, name: str) -> Path:
        return self.path / "plans" / f"{name}.npz"

    def record(self, name: str) -> Path:
        """What became of a slide. It is renamed into place after its rows and payloads."""
        return self.path / "slides" / f"{name}.json"

    def rows(self, name: str) -> Path:
        return self.path / "slides" / f"{name}.rows.npy"

    def payloads(self, name: str) -> Path:
        """The slide's encoded patches, one after the other."""
        return self.path / "slides" / f"{name}.payloads"

    def sources(self, name: str) -> Path:
        return self.path / "slides" / f"{name}.sources.json"

    def group(self, name: str) -> Path:
        """The finished group's records."""
        return self.path / "groups" / f"{name}.json"

    def permutation(self, name: str) -> Path:
        """A group's rows in the order of their keys, as ROW without a header."""
        return self.path / "groups" / f"{name}.rows"

    def group_sources(self, name: str) -> Path:
        """A group's sources, one JSON object a line."""
        return self.path / "groups" / f"{name}.sources.jsonl"

    def shard_record(self, name: str) -> Path:
        return self.path / "shards" / f"{name}.json"

    def qc(self, slide_id: str) -> Path:
        return self.dataset / "qc" / qc_name(slide_id)

    def shard(self, name: str, suffix: str) -> Path:
        return self.dataset / "shards" / f"{name}.{suffix}"
