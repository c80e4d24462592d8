"""Imports go one way, heavy libraries stay out of the way, and nothing of ours looks into the user's folder."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("engine", "sharding", "models", "benchmarks", "configs")
ALLOWED = {
    "engine": {"engine", "sharding", "models", "configs"},
    "benchmarks": {"benchmarks", "engine", "sharding", "models", "configs"},
    "sharding": {"sharding"},
    "models": {"models"},
    "configs": set(),
}
# Library -> the one module that may import it.
SOLE_IMPORTER = {
    "ray": "engine/cluster.py",
    "nvidia": "engine/data/dali_loader.py",
    "obstore": "engine/data/store.py",
    "cucim": "sharding/readers/cucim_reader.py",
    "openslide": "sharding/readers/openslide_reader.py",
    "zarr": "engine/stores/zarr_store.py",
}
# The same for libraries that the benchmarks also measure by themselves, in one module of theirs.
PEER = {"nvidia": "benchmarks/dali_peers.py"}
FORBIDDEN = {
    "sharding": {"torch", "torchvision", "ray", "nvidia", "timm", "zarr", "pydantic", "typer"},
    "models": {"ray", "nvidia", "cucim", "openslide", "zarr", "pyarrow"},
}
HEAVY = ("torch", "ray", "nvidia.dali", "cucim", "openslide", "zarr", "obstore")


def _modules() -> list[Path]:
    return sorted(path for name in OURS for path in (ROOT / name).rglob("*.py"))


def _imports(path: Path) -> Iterator[str]:
    """Every module that is imported anywhere in the file, functions and TYPE_CHECKING blocks included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively; absolute imports say where they lead"
            yield node.module or ""
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            argument = node.args[0]
            if isinstance(argument, ast.Constant):
                yield str(argument.value)


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_is_something_to_check() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in _modules()} >= {"engine", "sharding", "models"}


@pytest.mark.parametrize("path", _modules(), ids=_name)
def test_imports_go_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    imported = {name.split(".")[0] for name in _imports(path)}
    assert imported & set(OURS) <= ALLOWED[package]
    assert not imported & FORBIDDEN.get(package, set())


@pytest.mark.parametrize(("library", "module"), SOLE_IMPORTER.items())
def test_each_heavy_library_has_one_importer(library: str, module: str) -> None:
    importers = {_name(path) for path in _modules() if library in {name.split(".")[0] for name in _imports(path)}}
    assert importers <= {module, PEER.get(library, module)}


@pytest.mark.parametrize(
    "statement",
    [
        "import engine.cli",
        "import models, models.config",
        "import engine.data",
        "import engine.stores, engine.stores.layout",
        "import engine.recipes",
        "import engine.shard",
        "import engine.cluster",
    ],
)
def test_importing_a_front_door_imports_nothing_heavy(statement: str) -> None:
    assert _heavy_after(statement) == []


def test_the_check_for_heavy_imports_can_fail() -> None:
    assert _heavy_after("import engine.trainer") == ["torch"]


def test_a_dry_run_needs_nothing_heavy_in_the_driver(tmp_path: Path) -> None:
    (tmp_path / "no.svs").write_text("no slide")
    command = ["engine", "shard", "shard/tiny", f"slides={tmp_path}", f"out={tmp_path / 'out'}", "--dry-run", "--local"]
    code = f"import sys; sys.argv = {command!r}\nfrom engine.cli import main\ntry: main()\nexcept SystemExit: pass"
    assert _heavy_after(code) == []


def _heavy_after(code: str) -> list[str]:
    guarded = f"if __name__ == '__main__':\n    {code.replace(chr(10), chr(10) + '    ')}\n"
    report = f"    import sys; print('HEAVY', *[name for name in {HEAVY!r} if name in sys.modules])\n"
    done = subprocess.run(
        [sys.executable, "-P", "-c", guarded + report], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("HEAVY")]
    return line.split()[1:]


@pytest.mark.parametrize("path", _modules(), ids=_name)
def test_nothing_of_ours_changes_the_import_path(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "sys.path" not in text
    assert "PYTHONPATH" not in text


def test_no_registry_and_no_path_of_a_machine_is_written_down() -> None:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("this is no git checkout")
    # Put together here, so that this file does not contain what it looks for.
    words = ["index" + "-url", "find" + "-links", "/ro" + "ot/", "file:" + "//"]
    for name in done.stdout.splitlines():
        path = ROOT / name
        if path.suffix in (".py", ".toml", ".txt", ".md", ".yaml", "") and path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            assert not [word for word in words if word in text], name
