"""Files appear whole or not at all."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from sharding.atomic import TEMPORARY_PREFIX, atomic_path, sweep_temporary, write_json


def test_the_name_appears_when_the_block_ends_and_nothing_else_stays(tmp_path: Path) -> None:
    target = tmp_path / "file.bin"
    with atomic_path(target) as temporary:
        temporary.write_bytes(b"new")
        assert not target.exists()
        assert temporary.parent == tmp_path
        assert temporary.name.startswith(TEMPORARY_PREFIX)
    assert target.read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]


def test_an_error_leaves_the_old_content_and_no_temporary_file(tmp_path: Path) -> None:
    target = tmp_path / "file.bin"
    target.write_bytes(b"old")

    def fail() -> None:
        with atomic_path(target) as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]


def test_content_is_on_the_disk_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        seen.append("folder" if Path(f"/proc/self/fd/{descriptor}").resolve() == tmp_path else "file")
        fsync(descriptor)

    def noted_replace(self: Path, target: Path) -> Path:
        seen.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    with atomic_path(tmp_path / "file.bin") as temporary:
        temporary.write_bytes(b"new")
    assert seen == ["file", "rename", "folder"]


def test_json_is_written_the_same_whatever_the_order_of_keys(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": "Gewebe ü"})
    write_json(tmp_path / "b.json", {"a": "Gewebe ü", "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"a": "Gewebe ü", "b": 1}


def test_sweeping_takes_temporary_files_of_this_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    for name in (".tmp-a.tar.1", ".tmp-b", "keep.tar", "below/.tmp-c"):
        (tmp_path / name).write_bytes(b"x")
    assert sweep_temporary(tmp_path) == 2
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [".tmp-c", "keep.tar"]


def test_sweeping_a_folder_that_others_write_to_takes_old_files_alone(tmp_path: Path) -> None:
    for name, age_s in ((".tmp-old", 7200), (".tmp-new", 10), ("old", 7200)):
        (tmp_path / name).write_bytes(b"x")
        os.utime(tmp_path / name, (time.time() - age_s, time.time() - age_s))
    assert sweep_temporary(tmp_path, older_than_s=3600) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [".tmp-new", "old"]
