"""Every changed, missing or additional byte of a store is found, and named."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import verify as verb
from engine.stores import begin_store, verify_store, write_slide


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, make_store: Callable[..., Path]) -> Path:
    """A store of two slides. Whoever changes it puts it back."""
    return make_store(tmp_path_factory.mktemp("whole") / "store", ["a/b", "two"])


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(whole, tmp_path / "store"))


def places(result: dict[str, Any]) -> list[tuple[str | None, str | None]]:
    return [(bad["shard"], bad["key"]) for bad in result["bad"]]


def test_a_whole_store_has_no_defect(whole: Path) -> None:
    seen: list[int] = []
    result = verify_store(whole, on_slide=lambda: seen.append(1))
    assert result == {"ok": True, "samples": 10, "bad": []}
    assert len(seen) == 2
    assert verb.run(whole) == result
    assert "all 10 embeddings are as they were written" in verb.describe(result, whole)


@given(st.integers(0, 2**32), st.integers(1, 255))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_changed_byte_of_any_file_is_found(whole: Path, place: int, change: int) -> None:
    files = sorted(file for file in whole.rglob("*") if file.is_file())
    file = files[place % len(files)]
    data = file.read_bytes()
    changed = bytearray(data)
    changed[place % len(data)] ^= change
    file.write_bytes(changed)
    try:
        found = not verify_store(whole)["ok"]
    except ValueError as error:  # a store of another format version
        found = "format version" in str(error)
    finally:
        file.write_bytes(data)
    assert found, f"{file.relative_to(whole)} byte {place % len(data)} xor {change}"


@pytest.mark.parametrize("how", ["missing", "cut", "longer", "empty"])
def test_any_file_that_is_missing_or_has_another_length_is_found(how: str, whole: Path) -> None:
    files = sorted(file for file in whole.rglob("*") if file.is_file())
    assert len(files) == 2 * (2 + 4 * 2 + 1) + 4
    for file in files:
        data = file.read_bytes()
        if how == "missing":
            file.unlink()
        else:
            file.write_bytes({"cut": data[:-1], "longer": data + b"\0", "empty": b""}[how])
        try:
            found = not verify_store(whole)["ok"]
        except ValueError as error:
            found = how == "missing" and "holds no store.json" in str(error)
        file.write_bytes(data)
        assert found, f"{file.relative_to(whole)}: {how}"
    assert verify_store(whole)["ok"]


@pytest.mark.parametrize(
    ("file", "place"),
    [
        ("slides/two/embedding/c.0.0", ("two", "embedding")),
        ("slides/two/present/zarr.json", ("two", "present")),
        ("slides/two/rows.parquet", ("two", "rows")),
        ("slides/two/zarr.json", ("two", None)),
        ("slides/a%2Fb/slide.json", ("a%2Fb", None)),
        ("rows.parquet", (None, None)),
        ("zarr.json", (None, None)),
        ("slides/zarr.json", (None, None)),
    ],
)
def test_what_changed_is_named_and_nothing_else_accused(
    file: str, place: tuple[str | None, str | None], store: Path
) -> None:
    data = bytearray((store / file).read_bytes())
    data[random.Random(0).randrange(len(data))] ^= 1
    (store / file).write_bytes(data)
    result = verify_store(store)
    assert places(result) == [place]
    assert result["samples"] == (10 if place[0] is None else 5)
    assert file.rpartition("/")[2] in result["bad"][0]["reason"]
    text = verb.describe(result, store)
    assert "1 defect" in text
    assert "engine extract" in text


def test_additional_files_are_found(store: Path) -> None:
    (store / "slides/two/embedding/c.1.0").write_bytes(b"x")
    (store / "slides/two/note.txt").write_bytes(b"x")
    (store / "slides/two/more").mkdir()
    (store / "slides/two/more/zarr.json").symlink_to("nowhere")
    (store / "slides/stray").mkdir()
    assert places(verify_store(store)) == [("stray", None), ("two", "embedding"), ("two", "more"), ("two", None)]


def test_a_missing_slide_is_found(store: Path) -> None:
    shutil.rmtree(store / "slides" / "two")
    result = verify_store(store)
    assert result["bad"] == [{"shard": "two", "key": None, "reason": "its folder is missing"}]


def test_arrays_of_two_slides_that_changed_places_are_found(store: Path) -> None:
    one, two = store / "slides/two/embedding", store / "slides/a%2Fb/embedding"
    one.rename(store / "x")
    two.rename(one)
    (store / "x").rename(two)
    assert places(verify_store(store)) == [("a%2Fb", "embedding"), ("two", "embedding")]


def test_what_writers_have_at_hand_is_no_damage(
    store: Path, identity: dict[str, Any], make_slide: Callable[..., Any]
) -> None:
    (store / "slides" / ".tmp-1234").mkdir()
    (store / "recipe.yaml").write_text("a: 1")
    assert verify_store(store)["ok"]


def test_slides_that_were_added_but_not_finished_are_told(
    store: Path, identity: dict[str, Any], make_slide: Callable[..., Any]
) -> None:
    begin_store(store, identity)
    write_slide(store, "three", *make_slide())
    (bad,) = verify_store(store)["bad"]
    assert bad["shard"] == "three"
    assert "run the same `engine extract` again" in bad["reason"]


def test_no_store_is_a_mistake_of_usage(tmp_path: Path, identity: dict[str, Any]) -> None:
    begin_store(tmp_path / "begun", identity)
    with pytest.raises(ValueError, match="has not finished it"):
        verb.run(tmp_path / "begun")
    with pytest.raises(ValueError, match="no dataset"):
        verb.run(tmp_path)


def test_the_command_tells_damage_by_its_exit_code(store: Path, command: Any) -> None:
    done = command.run("verify", str(store), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"ok": True, "samples": 10, "bad": []}
    (store / "slides/two/xy0/c.0.0").unlink()
    done = command.run("verify", str(store), "--json")
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["bad"][0]["key"] == "xy0"
    data = (store / "store.json").read_bytes()
    (store / "store.json").write_bytes(data.replace(b'"two"', b'"tow"'))
    done = command.run("verify", str(store))
    assert done.returncode == 1
    assert "does not agree with its own digest" in done.stdout
