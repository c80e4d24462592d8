"""The bytes of a shard: `NAME.tar` (USTAR) and `NAME.idx` (DALI). Python's `tarfile` takes longer than all the rest."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sharding.work import WorkFolder

BLOCK = 512
END_OF_TAR = bytes(2 * BLOCK)
KEY_LENGTH = 16
_PADDING = memoryview(bytes(BLOCK))
# The most buffers that one writev takes (Linux: IOV_MAX).
_MOST_BUFFERS = 1024

ByteArray = npt.NDArray[np.uint8]
Payload = tuple[bytes, bytes | memoryview]  # in two parts


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """What dataset.json says of one shard; `index_sha256` is of its Parquet, which holds each payload's crc32."""

    name: str
    samples: int
    bytes: int
    index_sha256: str


def is_whole(shard: ShardRecord, work: WorkFolder) -> bool:
    """Whether a committed shard's files are there, its tar of the right size."""
    tar, *others = (work.shard(shard.name, suffix) for suffix in ("tar", "idx", "parquet"))
    return all(path.is_file() for path in (tar, *others)) and tar.stat().st_size == shard.bytes


def _template() -> ByteArray:
    header = bytearray(BLOCK)
    header[16:20] = b".jpg"
    header[100:108] = b"0000644\0"
    header[108:116] = b"0000000\0"
    header[116:124] = b"0000000\0"
    header[135:136] = b"\0"
    header[136:148] = b"00000000000\0"
    header[148:156] = b" " * 8
    header[156:157] = b"0"
    header[257:265] = b"ustar\x0000"
    header[329:337] = b"0000000\0"
    header[337:345] = b"0000000\0"
    return np.frombuffer(bytes(header), np.uint8)


_TEMPLATE = _template()
_HEX = np.frombuffer(b"0123456789abcdef", np.uint8)
_NIBBLES = np.arange(60, -4, -4, dtype=np.uint64)
_OCTAL_SIZE = np.arange(30, -3, -3, dtype=np.uint64)
_OCTAL_SUM = np.arange(15, -3, -3, dtype=np.uint64)


def keys_of(sample_id: npt.NDArray[np.uint64]) -> ByteArray:
    """The 16 lower-case hexadecimal digits of each id, ASCII; uint8 [n, 16]."""
    return _HEX[(sample_id[:, None] >> _NIBBLES) & np.uint64(15)]


def tar_headers(keys: ByteArray, lengths: npt.NDArray[np.uint64]) -> ByteArray:
    """USTAR headers of members KEY.jpg: mode 0644, no owner, no time; uint8 [n, 512].

    Args:
        keys: uint8 [n, 16].
        lengths: bytes of each payload, below 8 GiB; uint64 [n].
    """
    headers = np.repeat(_TEMPLATE[None], len(keys), axis=0)
    headers[:, :KEY_LENGTH] = keys
    headers[:, 124:135] = _octal(lengths, _OCTAL_SIZE)
    headers[:, 148:154] = _octal(headers.sum(axis=1, dtype=np.uint64), _OCTAL_SUM)
    headers[:, 154:156] = (0, ord(" "))
    return headers


def tar_header(key: str, length: int) -> bytes:
    """The 512 bytes before one payload; see `tar_headers`, which is quicker for many."""
    header = bytearray(_TEMPLATE.tobytes())
    header[:KEY_LENGTH] = key.encode("ascii")
    header[124:135] = b"%011o" % length
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def _octal(values: npt.NDArray[np.uint64], shifts: npt.NDArray[np.uint64]) -> ByteArray:
    return (((values[:, None] >> shifts) & np.uint64(7)) + np.uint64(ord("0"))).astype(np.uint8)


def write_members(descriptor: int, headers: ByteArray, payloads: Sequence[Payload]) -> None:
    """Append members to a tar; a payload is given in two parts."""
    block = memoryview(headers.tobytes())
    buffers: list[bytes | memoryview] = []
    for i, (head, rest) in enumerate(payloads):
        buffers += (
            block[i * BLOCK : (i + 1) * BLOCK],
            head,
            rest,
            _PADDING[: -(len(head) + len(rest)) % BLOCK],
        )
    for start in range(0, len(buffers), _MOST_BUFFERS):
        _write_all(descriptor, buffers[start : start + _MOST_BUFFERS])


def _write_all(descriptor: int, buffers: Sequence[bytes | memoryview]) -> None:
    expected = sum(map(len, buffers))
    written = os.writev(descriptor, buffers)
    if written < expected:  # a full disk, or a signal
        rest = memoryview(b"".join(buffers))[written:]
        while rest:
            rest = rest[os.write(descriptor, rest) :]


def idx_text(keys: Sequence[str], offsets: Sequence[int], lengths: Sequence[int]) -> str:
    """The index that DALI's wds2idx makes of the tar."""
    lines = [f"jpg {o} {n} {key}.jpg\n" for key, o, n in zip(keys, offsets, lengths, strict=True)]
    return f"v1.2 {len(lines)}\n" + "".join(lines)
