"""What was read from an object store, kept on a local disk of bounded size, for all processes of a machine.

A file here is sparse and has the layout of the remote one: bytes that were read stand where they stand there, the rest
is a hole. Nothing says which bytes are present and nothing has to: a sample carries its tar header and its crc32 is in
the index, so what is missing, half-written or rotten does not pass the reader's checks and is read from the store anew.
That also makes writers free of each other: they write the same bytes to the same places.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from engine.data.sources import OpenFiles

_log = logging.getLogger(__name__)

_BLOCK_BYTES = 512  # the unit of st_blocks, on every file system
_CHECKS_PER_SIZE = 64  # how often the size is looked at while as much as the cache may hold is written
_KEPT = 7 / 8  # of max_bytes, when files are emptied
_TOUCH_EVERY_S = 10.0


class RangeCache:
    """Ranges of remote files in `folder`, together at most `max_bytes` on disk; 0 keeps nothing.

    The size is looked at now and then, so several processes together exceed `max_bytes` by some percent for a moment,
    before they are back below. Whole files are emptied then, those first that were used longest ago.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._files = OpenFiles(os.O_RDWR | os.O_CREAT)
        self._lock = threading.Lock()
        self._unchecked_bytes = 0
        self._touched: dict[str, float] = {}
        self._broken = False
        if max_bytes > 0:
            folder.mkdir(parents=True, exist_ok=True)
            self._shrink()

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Return what there is of a range: possibly less, zeros, or damaged bytes."""
        path = self._folder / name
        if self._max_bytes <= 0 or not path.exists():
            return b""
        try:
            file = self._files.get(path)
            data = os.pread(file.fd, length, offset)
            if data and time.monotonic() - self._touched.get(name, -_TOUCH_EVERY_S) >= _TOUCH_EVERY_S:
                self._touched[name] = time.monotonic()
                os.utime(file.fd)
        except OSError as error:
            self._give_up(error)
            return b""
        return data

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Keep a range. A disk that is full or broken ends the cache, not the run."""
        if self._max_bytes <= 0 or self._broken:
            return
        path = self._folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = self._files.get(path)
            os.pwrite(file.fd, data, offset)
        except OSError as error:
            self._give_up(error)
            return
        with self._lock:
            self._unchecked_bytes += len(data)
            due = self._unchecked_bytes * _CHECKS_PER_SIZE >= self._max_bytes
            if due:
                self._unchecked_bytes = 0
        if due:
            try:
                self._shrink()
            except OSError as error:
                self._give_up(error)

    def close(self) -> None:
        """Close the files; the cache stays usable."""
        self._files.close()

    def _give_up(self, error: OSError) -> None:
        if not self._broken:
            self._broken = True
            _log.warning("the cache %s is not written any more: %s", self._folder, error)

    def _shrink(self) -> None:
        """Empty the files used longest ago until the rest fits."""
        with self._sole() as sole:
            if not sole:
                return
            files = []
            for path in self._folder.glob("*/*"):
                with contextlib.suppress(OSError):
                    status = path.stat()
                    files.append((status.st_mtime_ns, status.st_blocks * _BLOCK_BYTES, path))
            total = sum(size for _, size, _ in files)
            if total <= self._max_bytes:
                return
            for _, size, path in sorted(files):
                if total <= self._max_bytes * _KEPT:
                    break
                # Emptied, not removed: another process may have it open, and would write on into a file without a name.
                with contextlib.suppress(OSError):
                    os.truncate(path, 0)
                    total -= size

    @contextlib.contextmanager
    def _sole(self) -> Iterator[bool]:
        """Whether no other process or thread is shrinking this cache. On a file system without locks: always."""
        descriptor = os.open(self._folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            except OSError:
                yield True
            else:
                yield True
        finally:
            os.close(descriptor)
