"""A shard on disk: `NAME.tar` (USTAR), `NAME.idx` (DALI) and `NAME.parquet`, whose appearance is the commit."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from sharding.atomic import atomic_path
from sharding.index import INDEX_SCHEMA, write_table

_BLOCK = 512


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """What dataset.json says of one shard."""

    name: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str


def tar_header(name: str, size: int) -> bytes:
    """The 512 bytes of a USTAR header: mode 0644, no owner, no time. `tarfile` takes eight times as long for it."""
    header = bytearray(_BLOCK)
    encoded = name.encode("ascii")
    assert len(encoded) <= 100
    assert size < 8**11
    header[0 : len(encoded)] = encoded
    header[100:108] = b"0000644\0"
    header[108:116] = b"0000000\0"
    header[116:124] = b"0000000\0"
    header[124:136] = b"%011o\0" % size
    header[136:148] = b"00000000000\0"
    header[148:156] = b" " * 8
    header[156:157] = b"0"
    header[257:265] = b"ustar\x0000"
    header[329:337] = b"0000000\0"
    header[337:345] = b"0000000\0"
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def write_shard(folder: Path, name: str, samples: Iterable[tuple[str, bytes]], columns: pa.Table) -> ShardRecord:
    """Write one shard; nothing of it is visible before it is whole, and it counts only once its Parquet is there.

    Args:
        folder: the dataset's `shards/`.
        samples: (key, payload) in the order of storage.
        columns: INDEX_SCHEMA less shard, key, offset, length and crc32; one row per sample, the same order.
    """
    keys, offsets, lengths, checksums, lines = [], [], [], [], []
    digest = hashlib.sha256()
    position = 0
    with atomic_path(folder / f"{name}.tar") as temporary, open(temporary, "wb") as file:
        for key, payload in samples:
            padding = b"\0" * (-len(payload) % _BLOCK)
            for part in (tar_header(f"{key}.jpg", len(payload)), payload, padding):
                file.write(part)
                digest.update(part)
            offset = position + _BLOCK
            keys.append(key)
            offsets.append(offset)
            lengths.append(len(payload))
            checksums.append(zlib.crc32(payload))
            lines.append(f"jpg {offset} {len(payload)} {key}.jpg\n")
            position = offset + len(payload) + len(padding)
        end = b"\0" * (2 * _BLOCK)
        file.write(end)
        digest.update(end)
        position += len(end)
    with atomic_path(folder / f"{name}.idx") as temporary:
        temporary.write_text(f"v1.2 {len(keys)}\n" + "".join(lines), encoding="ascii")
    table = columns
    for column, values in (
        ("shard", [name] * len(keys)),
        ("key", keys),
        ("offset", offsets),
        ("length", lengths),
        ("crc32", checksums),
    ):
        table = table.append_column(INDEX_SCHEMA.field(column), pa.array(values, INDEX_SCHEMA.field(column).type))
    parquet = folder / f"{name}.parquet"
    write_table(table.select(INDEX_SCHEMA.names).cast(INDEX_SCHEMA), parquet)
    return ShardRecord(name, len(keys), position, digest.hexdigest(), hashlib.sha256(parquet.read_bytes()).hexdigest())
