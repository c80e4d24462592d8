"""`engine bench`: the cases run in a process of their own, every result is kept, and ratios are compared over time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from engine import bench
from engine.config import UsageError

MACHINE = {"cpu": "Some CPU (R) 9000", "cores": 4, "memory_gb": 8.0, "gpus": [], "python": "3.11.0", "versions": {}}


def _record(date: str, cases: dict[str, dict[str, float]], **values: float) -> dict[str, Any]:
    """A line of a history: case -> ratios; a case without ratios takes its value from `values`."""
    return {
        "date": date,
        "commit": "abc",
        "engine": "0.1.0",
        "cases": [
            {"name": name, "value": values.get(name, 1.0), "unit": "unit", "ratio_to": ratios}
            for name, ratios in cases.items()
        ],
    }


def _write(results: Path, machine: str, *records: dict[str, Any], bench: str = "shard") -> Path:
    file = results / machine / f"{bench}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.fixture
def decoys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder holds packages of our names, which must not be imported."""
    folder = tmp_path / "here"
    for name in ("engine", "models", "sharding", "configs", "benchmarks"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("raise ImportError('a decoy was imported')\n")
    monkeypatch.chdir(folder)
    return folder


# --- running


def test_a_run_has_the_documented_shape_and_is_kept(decoys: Path) -> None:
    result = bench.run(cases=["copy_420", "plan"], rounds=2, quick=True)
    assert {"bench", "date", "commit", "engine", "rounds", "hardware", "cases", "skipped", "file"} == set(result)
    assert {"cpu", "cores", "memory_gb", "gpus", "python", "versions"} == set(result["hardware"])
    assert [case["name"] for case in result["cases"]] == ["copy_420", "plan"]
    for case in result["cases"]:
        assert {"name", "value", "unit", "ratio_to", "spread", "rounds"} <= set(case)
    assert {"openslide_pil", "cucim_simplejpeg", "sendfile"} == set(result["cases"][0]["ratio_to"])
    # Small slides have a history of their own.
    file = decoys / "benchmarks" / "results" / bench.slug(result["hardware"]) / "shard-quick.jsonl"
    assert Path(result["file"]) == file
    (line,) = file.read_text().splitlines()
    assert json.loads(line) == {key: value for key, value in result.items() if key != "file"}
    text = bench.describe(result)
    assert "copy_420" in text
    assert str(file) in text


def test_painted_slides_are_kept_in_the_work_folder_and_runs_are_appended(tmp_path: Path) -> None:
    work, results = tmp_path / "work", tmp_path / "results"
    bench.run(cases=["plan"], rounds=1, quick=True, work=work, results=results)
    (slide,) = work.rglob("*.svs")
    before = slide.stat().st_mtime_ns
    bench.run(cases=["plan"], rounds=1, quick=True, work=work, results=results)
    assert slide.stat().st_mtime_ns == before
    (machine,) = bench.compare(results, "shard-quick")["hardware"]
    assert len(machine["runs"]) == 2
    assert [case["name"] for case in machine["cases"]] == ["plan"]
    assert all(value > 0 for value in machine["cases"][0]["values"])


def test_an_interrupted_run_ends_its_process_without_a_word_and_keeps_nothing(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom engine import bench\n"
        "try: bench.run(cases=['plan'], rounds=10**6, quick=True, work=Path('work'), results=Path('results'))\n"
        "except KeyboardInterrupt: sys.exit(130)\n"
    )
    with open(tmp_path / "errors", "wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", code], cwd=tmp_path, stderr=errors, start_new_session=True
        )
    try:
        while not (tmp_path / "work" / "out").exists():
            assert process.poll() is None, (tmp_path / "errors").read_text()
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(30) == 130
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert "Traceback" not in (tmp_path / "errors").read_text()
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
@pytest.mark.ray
def test_every_case_runs(decoys: Path, tmp_path: Path) -> None:
    from benchmarks.shard import CASES

    result = bench.run(rounds=1, quick=True, results=tmp_path / "results")
    assert [case["name"] for case in result["cases"]] == list(CASES)
    assert all(case["value"] > 0 for case in result["cases"])


@pytest.mark.slow
def test_the_loaders_bench_runs_and_says_what_it_left_out(decoys: Path, tmp_path: Path) -> None:
    result = bench.run("loader", cases=["dali_uint8", "dali_gpu_float"], rounds=1, quick=True, results=tmp_path)
    assert Path(result["file"]).name == "loader-quick.jsonl"
    names = [case["name"] for case in result["cases"]] + [case["name"] for case in result["skipped"]]
    assert names == ["dali_uint8", "dali_gpu_float"]
    result["cases"][0]["missing"] = {"litdata_pil": "No module named 'litdata'"}
    result["skipped"] = [{"name": "dali_gpu_float", "reason": "no GPU"}]
    text = bench.describe(result)
    assert "dali_gpu_float was skipped: no GPU" in text
    assert "litdata_pil was left out: No module named 'litdata'" in text


def test_an_unknown_case_is_usage_and_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no case 'copy'; known: copy_420, .*ray_decode"):
        bench.run(cases=["copy"], results=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("keys", "said"), [({"bench": "nonsense"}, "no benchmark"), ({"rounds": 0}, "rounds=0")])
def test_a_wrong_request_is_usage(tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        bench.run(**keys, results=tmp_path)


def test_a_case_that_cannot_be_measured_is_a_failure_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "slides-quick").write_text("no folder")
    with pytest.raises(RuntimeError, match="slides-quick"):
        bench.run(cases=["plan"], rounds=1, quick=True, work=tmp_path, results=tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_a_process_that_dies_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="ended with 1"):
        bench.run(cases=["plan"], results=tmp_path)


@pytest.mark.parametrize(("share", "noisy"), [(0.97, False), (0.4, True)])
def test_a_run_on_a_shared_core_says_so(share: float, noisy: bool) -> None:
    case = {"name": "copy", "value": 1.0, "unit": "unit", "ratio_to": {}, "spread": {"value": [1.0, 1.0]}, "rounds": 1}
    cases = [case, {**case, "cpu_share": {"ours": 0.99, "peer": share}}]
    text = bench.describe({"hardware": MACHINE, "cases": cases, "skipped": [], "file": "shard.jsonl"})
    assert ("we had 40% of it" in text) == noisy


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        ([], "some-cpu-r-9000-4-cores-no-gpu"),
        (["NVIDIA H200", "NVIDIA H200"], "some-cpu-r-9000-4-cores-2x-nvidia-h200"),
    ],
)
def test_a_hardware_has_a_folder_name(gpus: list[str], expected: str) -> None:
    assert bench.slug({**MACHINE, "gpus": gpus}) == expected


# --- comparing


def test_a_history_is_a_series_of_ratios_in_order_of_time(tmp_path: Path) -> None:
    _write(
        tmp_path,
        "one",
        _record("2026-03-01", {"copy": {"peer": 9.0, "floor": 0.5}, "plan": {}}, plan=30.0),
        _record("2026-01-01", {"copy": {"peer": 10.0}}),
        _record("2026-02-01", {"copy": {"peer": 14.0}, "plan": {}}, plan=20.0),
    )
    (machine,) = bench.compare(tmp_path)["hardware"]
    assert [run["date"] for run in machine["runs"]] == ["2026-01-01", "2026-02-01", "2026-03-01"]
    assert machine["cases"] == [
        # Against the median of 10 and 14.
        {
            "name": "copy",
            "against": "peer",
            "is_ratio": True,
            "values": [10.0, 14.0, 9.0],
            "change": pytest.approx(-0.25),
        },
        {
            "name": "plan",
            "against": "unit",
            "is_ratio": False,
            "values": [None, 20.0, 30.0],
            "change": pytest.approx(0.5),
        },
        {"name": "copy", "against": "floor", "is_ratio": True, "values": [None, None, 0.5], "change": None},
    ]


def test_hardware_is_never_mixed_nor_are_benches(tmp_path: Path) -> None:
    _write(tmp_path, "one", _record("2026-01-01", {"copy": {"peer": 10.0}}))
    _write(tmp_path, "two", _record("2026-01-02", {"copy": {"peer": 5.0}}))
    _write(tmp_path, "two", _record("2026-01-03", {"copy": {"peer": 1.0}}), bench="shard-quick")
    result = bench.compare(tmp_path)
    assert [(machine["slug"], machine["cases"][0]["values"]) for machine in result["hardware"]] == [
        ("one", [10.0]),
        ("two", [5.0]),
    ]
    assert all(machine["cases"][0]["change"] is None for machine in result["hardware"])
    assert json.loads(json.dumps(result)) == result


def test_a_comparison_shows_each_ratio_and_the_change(tmp_path: Path) -> None:
    _write(
        tmp_path,
        "one",
        _record("2026-01-01", {"copy": {"peer": 10.0}}),
        _record("2026-01-02", {"copy": {"peer": 12.5}, "plan": {}}, plan=3.0),
    )
    text = bench.describe_history(bench.compare(tmp_path))
    assert "one: 2 runs" in text
    copy, plan = (next(line for line in text.splitlines() if name in line) for name in ("copy", "plan"))
    assert "10  12.5" in copy
    assert "+25.0%" in copy
    assert "-  3" in plan
    assert "%" not in plan


def test_a_chart_is_one_picture_with_a_bar_for_each_ratio(tmp_path: Path) -> None:
    _write(
        tmp_path,
        "one",
        _record("2026-01-01", {"copy": {"peer": 10.0}}),
        _record("2026-01-02", {"copy": {"peer": 100.0, "a < b": 0.1}, "plan": {}}),
    )
    bench.write_chart(bench.compare(tmp_path), tmp_path / "charts" / "shard.svg")
    picture = ElementTree.parse(tmp_path / "charts" / "shard.svg").getroot()
    tag = "{http://www.w3.org/2000/svg}"
    texts = [each.text for each in picture.iter(f"{tag}text")]
    assert {"one", "copy / peer", "copy / a < b", "0.1x", "1x", "10x", "100x"} <= set(texts)
    assert not [text for text in texts if text and "plan" in text]
    _, faster, slower = picture.iter(f"{tag}rect")
    start, width = (float(faster.attrib[name]) for name in ("x", "width"))
    assert float(slower.attrib["x"]) + float(slower.attrib["width"]) == pytest.approx(start)
    assert float(slower.attrib["width"]) == pytest.approx(width / 2, abs=0.2)
    (dot,) = picture.iter(f"{tag}circle")
    assert float(dot.attrib["cx"]) == pytest.approx(start + width / 2, abs=0.2)


def test_no_history_is_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="run it first"):
        bench.compare(tmp_path / "nowhere")


def test_a_broken_line_is_usage_and_names_its_place(tmp_path: Path) -> None:
    file = _write(tmp_path, "one", _record("2026-01-01", {"copy": {"peer": 10.0}}))
    file.write_text(file.read_text() + '{"date": "2026-0\n')
    with pytest.raises(UsageError, match=r"shard\.jsonl, line 2"):
        bench.compare(tmp_path)
