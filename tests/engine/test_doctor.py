"""`engine doctor` finds what is wrong by doing the work in small, and says what to do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine import doctor

HIDE = """
import sys
from importlib.abc import MetaPathFinder

class Hidden(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {hidden}:
            raise ModuleNotFoundError("No module named " + name, name=name)

sys.meta_path.insert(0, Hidden())
from pathlib import Path
from engine.doctor import _in_small
for check in _in_small(Path(sys.argv[1])):
    print(check.name, check.status, check.detail, "->", check.fix, sep="|")
"""


def _small_checks(tmp_path: Path, *hidden: str) -> dict[str, list[str]]:
    """name -> [status, detail, fix] of the checks that read a slide, with some libraries not installed."""
    script = tmp_path / "script.py"
    script.write_text(HIDE.replace("{hidden}", repr(set(hidden) or {"nothing-is-hidden"})))
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split("|") for line in done.stdout.splitlines() if line.count("|") == 4]
    return {line[0]: [line[1], line[2], line[4]] for line in lines}


@pytest.mark.slow
def test_a_machine_without_cucim_and_dali_is_warned_and_still_shards(tmp_path: Path) -> None:
    found = _small_checks(tmp_path, "cucim", "nvidia")
    assert found["reader cucim"][0] == "WARN"
    assert "OpenSlide reads in its place" in found["reader cucim"][1]
    assert found["reader openslide"][0] == "PASS"
    assert found["shard"][0] == "PASS"
    assert found["loader dali"][0] == "WARN"
    assert "loader=torch" in found["loader dali"][2]
    assert found["loader torch"][0] == "PASS"


def test_a_check_that_breaks_is_the_finding_and_ends_nothing() -> None:
    def _some_check() -> doctor.Check:
        raise OSError("libfoo.so: cannot open\nshared object file")

    found = doctor._guarded(_some_check)
    assert (found.name, found.status) == ("some check", "FAIL")
    assert found.detail == "OSError: libfoo.so: cannot open shared object file"


@pytest.mark.parametrize(("version", "status"), [("2.53.9", "FAIL"), ("2.54.0", "PASS"), ("3.0.0", "PASS")])
def test_a_ray_with_a_known_hole_is_refused(monkeypatch: pytest.MonkeyPatch, version: str, status: str) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: version)
    assert doctor._ray().status == status


def test_a_missing_ray_is_a_warning_that_names_the_way_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    found = doctor._ray()
    assert found.status == "WARN"
    assert "--local" in found.fix


def test_a_failed_check_makes_the_whole_fail_and_a_warning_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def result(*checks: doctor.Check) -> dict[str, Any]:
        def few(folder: Path) -> list[doctor.Check]:
            return list(checks)

        monkeypatch.setattr(doctor, "_in_small", few)
        return doctor.run()

    def passed() -> doctor.Check:
        return doctor.Check("fine", "PASS", "x")

    replaced: dict[str, Callable[[], doctor.Check]] = dict.fromkeys(
        ("_python", "_cuda", "_ray", "_disk", "_open_files"), passed
    )
    for name, check in replaced.items():
        monkeypatch.setattr(doctor, name, check)
    warned = result(doctor.Check("thing", "WARN", "odd", "do this"))
    assert warned["ok"]
    assert "1 warning" in doctor.describe(warned)
    failed = result(doctor.Check("thing", "FAIL", "broken", "do that"))
    assert not failed["ok"]
    assert failed["checks"][-1] == {"name": "thing", "status": "FAIL", "detail": "broken", "fix": "do that"}
    assert "1 check" in doctor.describe(failed)
    assert "FAIL  thing: broken  -> do that" in capsys.readouterr().err
