"""A shard on disk: what other programs see of it, and that it appears whole or not at all."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sharding import writer
from sharding.index import INDEX_SCHEMA
from sharding.writer import ShardRecord, tar_header, write_shard

LENGTHS = [0, 1, 511, 512, 513, 1024, 5000]
SAMPLES = [
    (f"{number:016x}", np.random.default_rng(number).bytes(length)) for number, length in enumerate(LENGTHS, 2**60)
]


def columns(count: int) -> pa.Table:
    values = {
        "sample_id": range(2**60, 2**60 + count),
        "slide_id": ["s"] * count,
        "mpp": [0.5] * count,
        "tissue_fraction": [1.0] * count,
        "route": ["decode"] * count,
        "region": [None] * count,
    }
    fields = [f for f in INDEX_SCHEMA if f.name not in {"shard", "key", "offset", "length", "crc32"}]
    arrays = [pa.array(values.get(f.name, [0] * count), f.type) for f in fields]
    return pa.table(arrays, schema=pa.schema(fields))


def write(folder: Path) -> ShardRecord:
    return write_shard(folder, "shard-0", SAMPLES, columns(len(SAMPLES)))


def without_device_and_checksum(header: bytes) -> bytes:
    return header[:148] + header[156:329] + header[345:]


@pytest.mark.parametrize("size", [0, 1, 511, 20_000, 8**11 - 1])
@pytest.mark.parametrize("name", ["0123456789abcdef.jpg", "x" * 100])
def test_the_header_is_tarfiles_ustar_header_but_for_the_device(name: str, size: int) -> None:
    """Python leaves the device numbers of a regular file empty since 3.11.4; GNU tar and we write zeros there."""
    info = tarfile.TarInfo(name)
    info.size = size
    header = tar_header(name, size)
    assert len(header) == 512
    theirs = info.tobuf(tarfile.USTAR_FORMAT)
    assert without_device_and_checksum(header) == without_device_and_checksum(theirs)
    assert header[329:345] == b"0000000\0" * 2
    read = tarfile.TarInfo.frombuf(header, "ascii", "strict")  # checks the checksum
    assert (read.name, read.size, read.mode, read.mtime) == (name, size, 0o644, 0)


def test_the_header_is_gnu_tars_ustar_header_byte_for_byte(tmp_path: Path) -> None:
    gnu = shutil.which("tar")
    if gnu is None:
        pytest.skip("no tar program on this machine")
    if "GNU" not in subprocess.run([gnu, "--version"], capture_output=True, text=True, check=False).stdout:
        pytest.skip("the tar program here is not GNU's")
    name = "0123456789abcdef.jpg"
    (tmp_path / name).write_bytes(bytes(20_000))
    options = ["--format=ustar", "--owner=0", "--group=0", "--numeric-owner", "--mtime=@0", "--mode=644"]
    subprocess.run([gnu, *options, "-cf", "theirs.tar", name], check=True, cwd=tmp_path)
    assert (tmp_path / "theirs.tar").read_bytes()[:512] == tar_header(name, 20_000)


def test_the_record_states_the_tars_length_and_hash_and_it_ends_in_two_empty_blocks(tmp_path: Path) -> None:
    record = write(tmp_path)
    data = (tmp_path / "shard-0.tar").read_bytes()
    assert data[-1024:] == bytes(1024)
    assert len(data) == sum(512 + -(-length // 512) * 512 for length in LENGTHS) + 1024
    assert (record.name, record.samples, record.bytes) == ("shard-0", len(SAMPLES), len(data))
    assert record.sha256 == hashlib.sha256(data).hexdigest()


def test_tarfile_and_gnu_tar_list_and_extract_it(tmp_path: Path) -> None:
    write(tmp_path)
    names = [f"{key}.jpg" for key, _ in SAMPLES]
    with tarfile.open(tmp_path / "shard-0.tar") as tar:
        assert tar.getnames() == names
        for member, (_, payload) in zip(tar.getmembers(), SAMPLES, strict=True):
            assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
            file = tar.extractfile(member)
            assert file is not None
            assert file.read() == payload
    gnu = shutil.which("tar")
    if gnu is None:
        pytest.skip("no tar program on this machine")
    listed = subprocess.run([gnu, "-tf", tmp_path / "shard-0.tar"], capture_output=True, text=True, check=True)
    assert listed.stdout.split() == names
    assert listed.stderr == ""


def test_the_idx_is_what_wds2idx_writes(tmp_path: Path) -> None:
    wds2idx = pytest.importorskip("wds2idx", reason="nvidia-dali is not installed")
    if shutil.which("tar") is None:
        pytest.skip("no tar program on this machine, which wds2idx calls")
    write(tmp_path)
    with wds2idx.IndexCreator(str(tmp_path / "shard-0.tar"), str(tmp_path / "theirs.idx"), verbose=False) as creator:
        creator.create_index()
    assert (tmp_path / "shard-0.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()


def test_webdataset_reads_it(tmp_path: Path) -> None:
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    write(tmp_path)
    with open(tmp_path / "shard-0.tar", "rb") as file:
        samples = list(group_by_keys({**part, "__url__": "shard-0.tar"} for part in tar_file_iterator(file)))
    assert [(sample["__key__"], sample["jpg"]) for sample in samples] == SAMPLES


def test_offset_length_and_crc_find_every_payload(tmp_path: Path) -> None:
    write(tmp_path)
    data = (tmp_path / "shard-0.tar").read_bytes()
    table = pq.read_table(tmp_path / "shard-0.parquet")
    assert table.schema.equals(INDEX_SCHEMA)
    for row, (key, payload) in zip(table.to_pylist(), SAMPLES, strict=True):
        assert data[row["offset"] : row["offset"] + row["length"]] == payload
        assert row["crc32"] == zlib.crc32(payload)
        assert (row["key"], row["shard"]) == (key, "shard-0")
        assert row["offset"] % 512 == 0


def test_the_same_samples_give_the_same_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name)
    for suffix in ("tar", "idx", "parquet"):
        one, other = ((tmp_path / name / f"shard-0.{suffix}").read_bytes() for name in ("a", "b"))
        assert one == other


def test_the_parquet_appears_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    replace = Path.replace

    def noted(self: Path, target: Path) -> Path:
        order.append(Path(target).suffix)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", noted)
    write(tmp_path)
    assert order == [".tar", ".idx", ".parquet"]


def test_a_failure_while_the_tar_is_written_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> Iterator[tuple[str, bytes]]:
        yield from SAMPLES[:3]
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_shard(tmp_path, "shard-0", failing(), columns(len(SAMPLES)))
    assert list(tmp_path.iterdir()) == []


def test_a_failure_before_the_parquet_leaves_no_commit_and_a_rerun_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_table", fail)
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard-0.idx", "shard-0.tar"]
    record = write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard-0.idx", "shard-0.parquet", "shard-0.tar"]
    assert hashlib.sha256((tmp_path / "shard-0.tar").read_bytes()).hexdigest() == record.sha256
