"""`engine bench`: measure beside peers, keep every result, and show how the ratios moved.

The cases live in the package `benchmarks`, which knows the engine and is not known to it: they run in a process of
their own (`python -P -m benchmarks`). Results are lines of `RESULTS/<hardware>/<bench>.jsonl`; only lines of one
hardware are compared.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from engine.bench_chart import ratio_chart
from engine.config import UsageError
from engine.figures import as_count
from engine.runtime import usable_cores

if TYPE_CHECKING:
    from rich.table import Table

RESULTS = Path("benchmarks/results")
BENCHES = ("shard", "loader", "step", "extract")
_WIDTH = 120
_SHOWN_RUNS = 10
_QUIET = 0.9  # of a core


def run(
    bench: str = "shard",
    *,
    cases: Sequence[str] = (),
    rounds: int = 7,
    quick: bool = False,
    work: Path | None = None,
    results: Path = RESULTS,
) -> dict[str, Any]:
    """Run the cases (all where none is named) and append the result to the history.

    Args:
        rounds: counted rounds of each case; each value is their median.
        quick: small slides, to see that everything runs; kept apart as `<bench>-quick`.
        work: folder for slides and output; painted slides stay there. None is a temporary one.
        results: folder of the history.

    Returns {bench, date, commit, engine, rounds, hardware, cases: [{name, value, unit, ratio_to, spread, ...}],
    skipped: [{name, reason}], file}; `missing` of a case says which peers were left out, and why.
    Raises UsageError for an unknown bench or case, RuntimeError where a case cannot be measured.
    """
    if bench not in BENCHES:
        raise UsageError(f"there is no benchmark {bench!r}; known: {', '.join(BENCHES)}.")
    if rounds < 1:
        raise UsageError(f"rounds={rounds}: expected 1 or more.")
    with tempfile.TemporaryDirectory(prefix="engine-bench-", ignore_cleanup_errors=True) as folder:
        place = Path(folder) if work is None else work.expanduser().resolve()
        place.mkdir(parents=True, exist_ok=True)
        measured = _measure(
            {"bench": bench, "cases": list(cases), "rounds": rounds, "quick": quick, "work": str(place)}
        )
    machine = hardware()
    record = {
        "bench": f"{bench}-quick" if quick else bench,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "engine": version("pathology-engine"),
        "rounds": rounds,
        "hardware": machine,
        **measured,
    }
    file = results.expanduser().resolve() / slug(machine) / f"{record['bench']}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", encoding="utf-8") as history:
        history.write(json.dumps(record) + "\n")
    return {**record, "file": str(file)}


def _measure(request: dict[str, Any]) -> dict[str, Any]:
    # -P: the current folder may hold a `benchmarks/` of the user's.
    command = [sys.executable, "-P", "-m", "benchmarks", json.dumps({**request, "parent": os.getpid()})]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the benchmark's process ended with {done.returncode}; what it said stands above")
    answer: dict[str, Any] = json.loads(done.stdout)
    if "error" in answer:
        raise UsageError(answer["error"]) if answer["usage"] else RuntimeError(answer["error"])
    return answer


def hardware() -> dict[str, Any]:
    """{cpu, cores (usable), memory_gb, gpus (names), python, versions} of this machine."""
    import torch

    from sharding.slide import environment_versions

    versions = environment_versions()
    for name in ("ray", "torch", "nvidia-dali-cuda120"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    return {
        "cpu": _cpu(),
        "cores": usable_cores(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "python": platform.python_version(),
        "versions": versions,
    }


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def slug(machine: dict[str, Any]) -> str:
    """The folder name of a hardware: what decides its speed."""
    gpus = machine["gpus"]
    parts = [machine["cpu"], f"{machine['cores']} cores", f"{len(gpus)}x {gpus[0]}" if gpus else "no gpu"]
    return "-".join(re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in parts)


def _commit() -> str | None:
    """The commit of the code that runs, `-dirty` where it differs; None where it is no checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # an installed package may lie inside somebody else's checkout
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def compare(results: Path = RESULTS, bench: str = "shard") -> dict[str, Any]:
    """The history of a bench as ratios, each hardware by itself.

    Returns {bench, results, hardware: [{slug, runs: [{date, commit, engine}],
    cases: [{name, against, is_ratio, values, change}]}]}.
    `against` is a peer, or the unit of a case that has none (`is_ratio` is False then). `values` has one entry per run,
    None where it was not measured. `change` is the last value over the median of those before it, less 1; None for a
    first one.

    Raises UsageError where there is no history.
    """
    files = sorted(results.expanduser().glob(f"*/{bench}.jsonl"))
    if not files:
        raise UsageError(f"{results} holds no results of `engine bench {bench}`; run it first, or give --results.")
    machines = [{"slug": file.parent.name, **_history(_read(file))} for file in files]
    return {"bench": bench, "results": str(results.expanduser().resolve()), "hardware": machines}


def _read(file: Path) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            raise UsageError(f"{file}, line {number} is no JSON; remove that line.") from None
    return sorted(records, key=lambda record: str(record["date"]))


def _history(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    series: dict[tuple[str, str, bool], list[float | None]] = {}
    for number, record in enumerate(records):
        for case in record["cases"]:
            ratios = case["ratio_to"]
            for against, value in (ratios or {case["unit"]: case["value"]}).items():
                series.setdefault((case["name"], against, bool(ratios)), [None] * len(records))[number] = value
    return {
        "runs": [{key: record[key] for key in ("date", "commit", "engine")} for record in records],
        "cases": [
            {"name": name, "against": against, "is_ratio": is_ratio, "values": values, "change": _change(values)}
            for (name, against, is_ratio), values in series.items()
        ],
    }


def _change(values: Sequence[float | None]) -> float | None:
    *before, last = [value for value in values if value is not None]
    return last / median(before) - 1 if before else None


def describe(result: dict[str, Any]) -> str:
    """A run for a person."""
    from rich.table import Table

    machine = result["hardware"]
    table = Table("case", "rounds", "value", "min .. max", "ratio to", "median", "min .. max")
    for case in result["cases"]:
        spread = case["spread"]
        table.add_row(case["name"], str(case["rounds"]), f"{case['value']:.4g} {case['unit']}", _range(spread["value"]))
        for peer, ratio in case["ratio_to"].items():
            table.add_row("", "", "", "", peer, f"{ratio:.4g}", _range(spread[peer]))
    where = f"{machine['cpu']}, {machine['cores']} cores, {', '.join(machine['gpus']) or 'no GPU'}"
    share = min((share for case in result["cases"] for share in case.get("cpu_share", {}).values()), default=1.0)
    notes = [f"others used the core (we had {share:.0%} of it): trust the ratios, not the rates"] * (share < _QUIET)
    notes += [f"{case['name']} was skipped: {case['reason']}" for case in result["skipped"]]
    missing = {peer: why for case in result["cases"] for peer, why in case.get("missing", {}).items()}
    notes += [f"{peer} was left out: {why} (pip install 'pathology-engine[bench]')" for peer, why in missing.items()]
    return "\n".join([f"{where}\n{_text(table)}".rstrip("\n"), *notes, f"appended to {result['file']}"])


def describe_history(result: dict[str, Any]) -> str:
    """A comparison for a person."""
    from rich.table import Table

    tables = []
    for machine in result["hardware"]:
        runs = machine["runs"]
        table = Table("case", "ratio to", "oldest to newest", "change of the newest")
        for case in machine["cases"]:
            values = "  ".join("-" if value is None else f"{value:.4g}" for value in case["values"][-_SHOWN_RUNS:])
            change = "" if case["change"] is None else f"{case['change']:+.1%}"
            table.add_row(case["name"], case["against"], values, change)
        tables.append(
            f"{machine['slug']}: {as_count(len(runs), 'run')}, the newest of {runs[-1]['date']}\n{_text(table)}"
        )
    return "\n".join(tables).rstrip("\n")


def _range(values: Sequence[float]) -> str:
    return f"{values[0]:.4g} .. {values[1]:.4g}"


def _text(table: Table) -> str:
    from rich.console import Console

    console = Console(width=_WIDTH)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def write_chart(result: dict[str, Any], file: Path) -> None:
    """Draw a comparison (see `compare`) as an SVG picture that needs nothing else."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(ratio_chart(f"engine bench {result['bench']}", result["hardware"]), encoding="utf-8")
