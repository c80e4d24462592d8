"""The bytes of a shard: what other programs see of its tar and idx."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest

from sharding.work import WorkFolder
from sharding.writer import END_OF_TAR, ShardRecord, idx_text, is_whole, keys_of, tar_header, tar_headers, write_members

LENGTHS = [0, 1, 511, 512, 513, 1024, 5000]
SAMPLES = [
    (f"{number:016x}", np.random.default_rng(number).bytes(length)) for number, length in enumerate(LENGTHS, 2**60)
]


def write(folder: Path) -> bytes:
    """Write the samples as `shard-0`; returns the tar's bytes."""
    keys = np.frombuffer("".join(key for key, _ in SAMPLES).encode(), np.uint8).reshape(-1, 16)
    headers = tar_headers(keys, np.array(LENGTHS, np.uint64))
    with open(folder / "shard-0.tar", "wb", buffering=0) as file:
        # In two calls, and each payload in two parts.
        for members in (slice(0, 3), slice(3, None)):
            parts = [(payload[: len(payload) // 3], payload[len(payload) // 3 :]) for _, payload in SAMPLES[members]]
            write_members(file.fileno(), headers[members], parts)
        file.write(END_OF_TAR)
    offsets = [512 + sum(512 + -(-length // 512) * 512 for length in LENGTHS[:i]) for i in range(len(LENGTHS))]
    (folder / "shard-0.idx").write_text(idx_text([key for key, _ in SAMPLES], offsets, LENGTHS))
    return (folder / "shard-0.tar").read_bytes()


def without_device_and_checksum(header: bytes) -> bytes:
    return header[:148] + header[156:329] + header[345:]


@pytest.mark.parametrize("size", [0, 1, 511, 20_000, 8**11 - 1])
@pytest.mark.parametrize("key", ["0123456789abcdef", "0" * 16, "f" * 16])
def test_the_header_is_tarfiles_ustar_header_but_for_the_device(key: str, size: int) -> None:
    """Python leaves the device numbers of a regular file empty since 3.11.4; GNU tar and we write zeros there."""
    info = tarfile.TarInfo(name := f"{key}.jpg")
    info.size = size
    header = tar_header(key, size)
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
    assert (tmp_path / "theirs.tar").read_bytes()[:512] == tar_header(name.removesuffix(".jpg"), 20_000)


def test_headers_of_many_are_the_headers_of_each() -> None:
    ids = np.random.default_rng(0).integers(0, 2**64, 50, np.uint64)
    lengths = np.random.default_rng(1).integers(0, 2**32, 50, np.uint64)
    headers = tar_headers(keys_of(ids), lengths)
    for header, sample_id, length in zip(headers, ids.tolist(), lengths.tolist(), strict=True):
        assert header.tobytes() == tar_header(f"{sample_id:016x}", length)


def test_the_tar_is_headers_payloads_padding_and_two_empty_blocks(tmp_path: Path) -> None:
    expected = b"".join(
        tar_header(key, len(payload)) + payload + bytes(-len(payload) % 512) for key, payload in SAMPLES
    )
    assert write(tmp_path) == expected + bytes(1024)


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


def test_more_members_than_one_call_takes_are_all_written(tmp_path: Path) -> None:
    ids = np.arange(3000, dtype=np.uint64)
    headers = tar_headers(keys_of(ids), np.full(3000, 5, np.uint64))
    with open(tmp_path / "x.tar", "wb", buffering=0) as file:
        write_members(file.fileno(), headers, [(b"ab", memoryview(b"cde"))] * 3000)
    assert (tmp_path / "x.tar").read_bytes() == b"".join(header.tobytes() + b"abcde" + bytes(507) for header in headers)


def test_a_write_that_was_cut_short_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write(tmp_path)
    write_all, write_some = os.writev, os.write
    monkeypatch.setattr(os, "writev", lambda descriptor, buffers: write_all(descriptor, buffers[:3]))
    monkeypatch.setattr(os, "write", lambda descriptor, data: write_some(descriptor, data[:1000]))
    assert write(tmp_path) == whole


def test_a_full_disk_is_an_error() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this machine")
    headers = tar_headers(keys_of(np.array([1], np.uint64)), np.array([3], np.uint64))
    with open("/dev/full", "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        write_members(file.fileno(), headers, [(b"", b"abc")])


@pytest.mark.parametrize("missing", ["tar", "idx", "parquet", "a block"])
def test_a_shard_is_whole_with_its_three_files_and_all_its_bytes(missing: str, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    data = write(tmp_path / "shards")
    (tmp_path / "shards" / "shard-0.parquet").touch()
    record, work = ShardRecord("shard-0", len(SAMPLES), len(data), ""), WorkFolder(tmp_path)
    assert is_whole(record, work)
    if missing == "a block":
        (tmp_path / "shards" / "shard-0.tar").write_bytes(data[:-512])
    else:
        (tmp_path / "shards" / f"shard-0.{missing}").unlink()
    assert not is_whole(record, work)
