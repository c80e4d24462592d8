"""Batches of patches, read ahead in threads, over the borders of slides: each is full but the last."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from engine.extraction.sources import OpenSlide, reason_of


@dataclass(slots=True, eq=False)
class Slide:
    """A slide on its way: how many of its patches have come back, which were damaged, why it failed, if it did."""

    open: OpenSlide
    done: int = 0
    damaged: dict[int, str] = field(default_factory=dict)
    failure: str = ""

    @property
    def patches(self) -> int:
        return len(self.open.xy0)


@dataclass(frozen=True, slots=True)
class Part:
    """`count` patches of a slide from `first` on, which lie in a batch from `at` on."""

    slide: Slide
    first: int
    at: int
    count: int
    tasks: list[Future[dict[int, str]]]


@dataclass(slots=True)
class Batch:
    """uint8 [batch_size, px, px, 3] and what lies in it: `filled` patches, and behind them anything.

    It belongs to whoever took it until the next one is taken.
    """

    images: torch.Tensor
    parts: list[Part] = field(default_factory=list)
    filled: int = 0

    def read(self) -> Batch:
        """Itself once it is read; slides that cannot be read have failed then."""
        for part in self.parts:
            for task in part.tasks:
                try:
                    part.slide.damaged |= task.result()
                except Exception as error:
                    part.slide.failure = part.slide.failure or reason_of(error)
        return self


def batches(
    slides: Iterable[Slide], pool: ThreadPoolExecutor, *, batch_size: int, px: int, ahead: int, pinned: bool
) -> Iterator[Batch]:
    """Read slides one after the other and yield their batches, `ahead` of which are being read meanwhile.

    The rest of a slide that has failed is not read. A slide's own errors never leave here; `Batch.read` notes them.
    """
    pending: deque[Batch] = deque()
    spare: list[torch.Tensor] = []  # what was used once: fresh memory costs as much as decoding into it

    def empty() -> Batch:
        return Batch(
            spare.pop() if spare else torch.zeros((batch_size, px, px, 3), dtype=torch.uint8, pin_memory=pinned)
        )

    batch = empty()
    for slide in slides:
        first = 0
        while first < slide.patches and not slide.failure:
            count = min(batch_size - batch.filled, slide.patches - first)
            out = batch.images.numpy()[batch.filled : batch.filled + count]
            batch.parts.append(Part(slide, first, batch.filled, count, slide.open.submit(pool, first, out)))
            batch.filled += count
            first += count
            if batch.filled == batch_size:
                pending.append(batch)
                batch = empty()
            while len(pending) > ahead:
                yield (ready := pending.popleft().read())
                spare.append(ready.images)
    if batch.filled:
        pending.append(batch)
    for ready in pending:
        yield ready.read()
