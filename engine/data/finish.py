"""From decoded uint8 pixels to a view's images: resize, turn, and apply what `engine.data.augment` has drawn.

Both decoders end here wherever a view is more than a flipped crop, so that they agree to the bit on the CPU. A few
samples at a time in threads there: they fit into a core's cache, which a whole batch would not, and share what each
call of torch costs, which for one small crop is most of it. On a GPU per batch.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.data.augment import Changes, Float32
from engine.data.ect import Int32
from engine.data.views import CropView, CropWindows

_LOCK = threading.Lock()
_SPARE_BATCHES = 4
_MOST_SAMPLES_PER_TASK = 8  # large enough to hide the cost of a task, small enough that threads share a batch
_PIXELS_TOGETHER = 1 << 15  # 384 KiB of float32


def empty_images(view: CropView, batch_size: int, device: torch.device | None = None) -> torch.Tensor:
    """Return an unfilled tensor [batch_size, 3, size_px, size_px] of the view's dtype and order in memory."""
    if device is not None and device.type == "cuda":
        images = torch.empty(_shape(view, batch_size), dtype=getattr(torch, view.output), device=device)
    else:
        # numpy asks for huge pages where torch does not: filling new memory is a third of a float view's time without.
        images = torch.from_numpy(np.empty(_shape(view, batch_size), view.output))
    return images.permute(0, 3, 1, 2) if view.is_channels_last else images


class ImageMemory:
    """Gives out what `empty_images` does, in memory of earlier batches that nobody holds any more.

    New memory is cleared by the system page by page, which takes longer than normalising into it.
    """

    def __init__(self, view: CropView) -> None:
        self._view = view
        self._spare: deque[npt.NDArray[Any]] = deque(maxlen=_SPARE_BATCHES)

    def empty_images(self, batch_size: int) -> torch.Tensor:
        """See the function."""
        shape = _shape(self._view, batch_size)
        memory = self._spare.pop() if self._spare else np.empty(shape, self._view.output)
        if memory.shape != shape:
            memory = np.empty(shape, self._view.output)
        # The tensor, and whatever shares its memory, holds `lent`; when the last of them goes, the memory comes back.
        lent = memory[...]
        weakref.finalize(lent, self._spare.append, memory).atexit = False
        images = torch.from_numpy(lent)
        return images.permute(0, 3, 1, 2) if self._view.is_channels_last else images


def _shape(view: CropView, batch_size: int) -> tuple[int, ...]:
    size_px = view.size_px
    return (batch_size, size_px, size_px, 3) if view.is_channels_last else (batch_size, 3, size_px, size_px)


def finishing_pool(threads: int, name: str) -> ThreadPoolExecutor:
    """Return a pool in whose threads torch computes on one core each: they are as many as may be used already."""
    return ThreadPoolExecutor(threads, thread_name_prefix=name, initializer=use_one_core)


def submit_samples(
    pool: ThreadPoolExecutor, do_some: Callable[[range], None], count: int, *, threads: int
) -> list[Future[None]]:
    """Have the pool, of so many threads, do_some(indices) until every index below `count` was among them once."""
    size = min(_MOST_SAMPLES_PER_TASK, -(-count // threads))
    return [pool.submit(do_some, range(first, min(first + size, count))) for first in range(0, count, size)]


def finish_samples(
    view: CropView,
    patches: Sequence[npt.NDArray[np.uint8]],
    windows: CropWindows,
    changes: Changes,
    first: int,
    images: torch.Tensor,
    *,
    origins: Int32 | None = None,
) -> None:
    """Cut the samples from number `first` on out of their decoded patches and write the finished crops into `images`.

    patches: uint8[H, W, 3] each, from its of `origins` on (int32[len(patches), 2]: x, y in px; by default 0, 0).
    images: as of `empty_images`.

    As many samples go through each step together as fit into a core's cache; a sample's crop does not depend on it.
    """
    together = max(1, _PIXELS_TOGETHER // view.size_px**2)
    for start in range(0, len(patches), together):
        some = patches[start : start + together]
        here = slice(first + start, first + start + len(some))
        cut = CropWindows(*(field[here] for field in windows))
        corners = np.stack([cut.x0, cut.y0], axis=1) - (0 if origins is None else origins[start : start + together])
        crops = []
        for index, (pixels, (x0, y0)) in enumerate(zip(some, corners.tolist(), strict=True)):
            crop = np.ascontiguousarray(pixels[y0 : y0 + int(cut.height[index]), x0 : x0 + int(cut.width[index])])
            crops.append(_turned(resize(torch.from_numpy(crop), view.size_px), cut, index))
        finish(torch.stack(crops), changes_of(changes, here), images[here])


def resize(crop: torch.Tensor, size_px: int) -> torch.Tensor:
    """Resize uint8[H, W, 3] to uint8[size_px, size_px, 3]: linear, antialiased along an axis that shrinks.

    Nothing outside the crop is looked at. The CPU's kernel computes in fixed point.
    """
    if crop.shape[:2] == (size_px, size_px):
        return crop
    # Unsqueezed first: the strides tell torch that this is channels-last, and what it returns is so too.
    resized = torch.nn.functional.interpolate(
        crop[None].permute(0, 3, 1, 2), (size_px, size_px), mode="bilinear", align_corners=False, antialias=True
    )
    return resized[0].permute(1, 2, 0)


def _turned(crop: torch.Tensor, windows: CropWindows, index: int) -> torch.Tensor:
    """What `turn` makes of the crop [S, S, 3] of sample `index`, without its `where`, which is slow on the CPU."""
    if windows.transpose[index]:
        crop = crop.transpose(0, 1)
    mirrored = [axis for axis, flip in enumerate((windows.flip_y, windows.flip_x)) if flip[index]]
    return crop.flip(mirrored) if mirrored else crop


def turn(crops: torch.Tensor, windows: CropWindows) -> torch.Tensor:
    """Transpose and mirror crops [n, S, S, 3] as the windows say."""
    crops = _where(windows.transpose, crops.transpose(1, 2), crops)
    crops = _where(windows.flip_x, crops.flip(2), crops) if windows.flip_x.any() else crops
    return _where(windows.flip_y, crops.flip(1), crops) if windows.flip_y.any() else crops


def finish(crops: torch.Tensor, changes: Changes, images: torch.Tensor) -> None:
    """Write uint8[n, S, S, 3] crops, changed, into images [n, 3, S, S]; both on one device."""
    if changes.matrix is None:
        images.copy_(crops.permute(0, 3, 1, 2))
        return
    shape = images.shape
    values = crops.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).view(*shape[:2], -1)
    if changes.stain is not None:
        values = _stained(values, changes.stain)
    in_place = images.dtype == torch.float32 and images.is_contiguous()
    result = images if in_place else torch.empty(shape, dtype=torch.float32, device=crops.device)
    _affine(changes.matrix, values, result.view(*shape[:2], -1))
    if changes.augmented:
        for channel, (low, high) in enumerate(zip(changes.low, changes.high, strict=True)):
            result[:, channel].clamp_(low, high)
    if changes.blur is not None:
        _blur(result, changes.blur)
    if changes.solarise is not None:
        _solarise(result, changes.solarise, changes)
    if images.dtype == torch.uint8:
        result.round_()
    if not in_place:
        images.copy_(result)


def changes_of(changes: Changes, samples: slice) -> Changes:
    """Return the changes of some of the samples."""
    chosen = {name: getattr(changes, name) for name in ("matrix", "stain", "blur", "solarise")}
    return changes._replace(**{name: field[samples] for name, field in chosen.items() if field is not None})


def _affine(matrix: Float32, values: torch.Tensor, out: torch.Tensor) -> None:
    """Write matrix[:, :, :3] @ values + matrix[:, :, 3:] ([n, 3, 4] and [n, 3, pixels]) to `out`."""
    on_device = torch.from_numpy(matrix).to(values.device)
    # On the CPU one at a time: several at once take it many times longer. out=: autocast leaves it in float32.
    for some in [slice(None)] if values.is_cuda else [slice(index, index + 1) for index in range(len(values))]:
        torch.baddbmm(on_device[some, :, 3:], on_device[some, :, :3], values[some], out=out[some])


def _stained(values: torch.Tensor, stain: Float32) -> torch.Tensor:
    """Return values (0..255, [n, 3, pixels]) with the optical densities transformed, in 0..255 again."""
    chosen = ~np.isnan(stain[:, 0, 0])
    if not chosen.any():
        return values
    densities = ((values + 1) / 256).log_().neg_()
    stained = torch.empty_like(values)
    _affine(np.nan_to_num(stain), densities, stained)
    stained = stained.neg_().exp_().mul_(256).sub_(1).clamp_(0, 255)
    if chosen.all():
        return stained
    return torch.where(torch.from_numpy(chosen).to(values.device)[:, None, None], stained, values)


def _blur(images: torch.Tensor, weights: Float32) -> None:
    """Blur [n, 3, S, S] in place, along y and along x; beyond the edge the crop is mirrored."""
    chosen = np.flatnonzero(weights[:, 0] < 1)
    if len(chosen) == 0:
        return
    where = None if len(chosen) == len(weights) else torch.from_numpy(chosen).to(images.device)
    taps = torch.from_numpy(weights[chosen]).to(images.device)[:, :, None, None, None].unbind(1)
    radius = len(taps) - 1
    size = images.shape[2]
    padded = torch.nn.functional.pad(images if where is None else images[where], (radius,) * 4, mode="reflect")
    blurred = _weighted_sum(padded, taps, 2, size)
    if where is None:
        _weighted_sum(blurred, taps, 3, size, out=images)
    else:
        images[where] = _weighted_sum(blurred, taps, 3, size)


def _weighted_sum(
    padded: torch.Tensor, taps: Sequence[torch.Tensor], axis: int, size: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum what lies at up to len(taps) - 1 px along an axis, weighted by the distance's of `taps`."""
    radius = len(taps) - 1
    total = torch.mul(padded.narrow(axis, radius, size), taps[0], out=out)
    for step in range(1, radius + 1):
        for start in (radius - step, radius + step):
            total.addcmul_(padded.narrow(axis, start, size), taps[step])
    return total


def _solarise(images: torch.Tensor, solarise: npt.NDArray[np.bool_], changes: Changes) -> None:
    """Invert the upper half of the values, in place, of the crops that are chosen: that is the smaller of both."""
    if not solarise.any():
        return
    mirror = np.where(solarise[:, None], np.array(changes.low) + changes.high, np.inf).astype(np.float32)
    mirrored = torch.from_numpy(mirror).to(images.device)[:, :, None, None] - images
    torch.minimum(images, mirrored, out=images)


def _where(drawn: Int32, turned: torch.Tensor, crops: torch.Tensor) -> torch.Tensor:
    if not drawn.any() or drawn.all():
        return turned if drawn.any() else crops
    return torch.where(torch.from_numpy(drawn.astype(bool)).to(crops.device)[:, None, None, None], turned, crops)


def use_one_core() -> None:
    """Make torch single-threaded in this thread alone.

    `set_num_threads` also sets what threads that start later begin with, so a thread that ends at once sets that back.
    """
    with _LOCK:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        restoring = threading.Thread(target=torch.set_num_threads, args=(before,))
        restoring.start()
        restoring.join()
