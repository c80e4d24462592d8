"""stdout belongs to the result alone; progress goes to stderr."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine.console import progress

_SCRIPT = """
import ctypes, os, subprocess, sys
from engine.console import own_stdout
print("before")
with own_stdout() as output:
    print("python")
    os.write(1, b"descriptor\\n")
    libc = ctypes.CDLL(None)
    libc.puts(b"native")
    libc.fflush(None)
    subprocess.run(["echo", "child"], check=True)
    output.print("text: \\u00b5m")
    output.json({"path": "\\u00e4", "n": 1})
    if len(sys.argv) > 1:
        sys.exit(5)
print("after")
"""


def _run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONIOENCODING": "utf-8"},
    )


def test_only_the_output_reaches_stdout_inside_the_block(tmp_path: Path) -> None:
    done = _run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["before", "text: µm", '{"path": "ä", "n": 1}', "after"]
    assert sorted(done.stderr.split()) == ["child", "descriptor", "native", "python"]
    assert json.loads(done.stdout.splitlines()[2]) == {"path": "ä", "n": 1}


def test_stdout_is_given_back_when_the_block_exits_early(tmp_path: Path) -> None:
    done = _run(tmp_path, "exit")
    assert done.returncode == 5
    assert done.stdout.splitlines() == ["before", "text: µm", '{"path": "ä", "n": 1}']


def test_a_long_line_is_written_whole(tmp_path: Path) -> None:
    script = tmp_path / "long.py"
    script.write_text(
        "from engine.console import own_stdout\nwith own_stdout() as o:\n    o.json({'x': 'y' * 3_000_000})\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, check=True)
    assert len(json.loads(done.stdout)["x"]) == 3_000_000


def test_progress_off_a_terminal_ends_with_one_plain_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("shard", 3, "slides") as advance:
        for _ in range(3):
            advance(1, "12 patches")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert captured.err.startswith("shard: 3/3 slides")
    assert captured.err.rstrip().endswith("12 patches")


def test_progress_of_nothing_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("verify", 0, "shards"):
        pass
    assert capsys.readouterr().err == ""
