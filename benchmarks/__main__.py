"""`python -P -m benchmarks REQUEST`: run cases in a process of its own, pinned to one core from its start.

The request and the answer are JSON objects (`engine.bench` sends and takes them); only the answer goes to stdout.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from engine.console import own_stdout
from engine.errors import sentence
from engine.runtime import die_with_parent


def main() -> None:
    request = json.loads(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends us
    die_with_parent(request["parent"])
    cores = _pin()
    with own_stdout() as output:
        try:
            answer = _run(request, cores)
        except Exception as error:
            found = sentence(error)
            if found is None:
                raise
            answer = {"error": found[0], "usage": found[1]}
        output.json(answer)


def _pin() -> frozenset[int]:
    """Bind this process to the last of its cores; returns those it had. Threads of libraries to come inherit it."""
    if not hasattr(os, "sched_setaffinity"):
        return frozenset(range(os.cpu_count() or 1))
    cores = frozenset(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {max(cores)})
    return cores


def _run(request: dict[str, Any], cores: frozenset[int]) -> dict[str, Any]:
    from benchmarks.harness import Setting, run_cases

    known = importlib.import_module(f"benchmarks.{request['bench']}").CASES
    setting = Setting(Path(request["work"]), request["rounds"], request["quick"], cores)
    return run_cases(request["bench"], known, request["cases"], setting)


if __name__ == "__main__":
    main()
