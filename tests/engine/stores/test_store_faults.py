"""Killed at any system call: a slide is whole or not there, and readers of a store always find a whole one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.stores import begin_store, finish_store, finished_slides, open_store, verify_store, write_slide
from sharding import faults

POINTS = [
    "store.before_write",
    "store.after_array",
    "store.before_fsync",
    "store.before_rename",
    "store.after_rename",
    "atomic.before_write",
    "atomic.before_fsync",
    "atomic.before_rename",
    "atomic.after_rename",
]
NEVER = 1 << 60


@pytest.fixture(autouse=True)
def _no_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed loses nothing that it wrote; fsync, which these tests do often, is for the machine."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.slow
def test_a_slide_is_whole_or_not_there_whenever_its_writer_dies(
    tmp_path: Path, make_slide: Callable[..., Any], make_store: Any, identity: Any, tree: Any, dies_at: Any
) -> None:
    one, two = make_slide(seed=1), make_slide(seed=2)
    undisturbed = tree(make_store(tmp_path / "undisturbed", {"one": one, "two": two}))
    begin_store(tmp_path / "begun", identity)
    write_slide(tmp_path / "begun", "one", *one)
    path = tmp_path / "store"
    outcomes = []
    for number in range(1, 1000):
        shutil.copytree(tmp_path / "begun", path)
        died = dies_at(number, path, lambda: write_slide(path, "two", *two))
        whole = finished_slides(path)
        outcomes.append("two" in whole)
        assert whole - {"two"} == {"one"}
        begin_store(path, identity)
        write_slide(path, "two", *two)
        finish_store(path)
        assert tree(path) == undisturbed, f"after a death at step {number}"
        shutil.rmtree(path)
        if not died:
            break
    # Every file, folder, rename and fsync is a step; the slide appears once and stays.
    assert len(outcomes) > 40
    assert outcomes == sorted(outcomes)
    assert outcomes[0] is False
    assert outcomes[-1] is True


@pytest.mark.slow
def test_a_store_that_is_finished_anew_is_whole_at_every_step(
    tmp_path: Path, make_slide: Callable[..., Any], make_store: Any, identity: Any, tree: Any, dies_at: Any
) -> None:
    one, two = make_slide(seed=1), make_slide(seed=2)
    undisturbed = tree(make_store(tmp_path / "undisturbed", {"one": one, "two": two}))
    make_store(tmp_path / "finished", {"one": one})
    write_slide(tmp_path / "finished", "two", *two)
    path = tmp_path / "store"
    seen = []
    for number in range(1, 1000):
        shutil.copytree(tmp_path / "finished", path)
        died = dies_at(number, path, lambda: finish_store(path))
        store = open_store(path)
        seen.append(list(store))
        assert store.rows["slide_id"].to_list() == [name for name in store for _ in range(5)]
        assert [slide.embedding.shape for slide in store.values()] == [(5, 6)] * len(store)
        begin_store(path, identity)
        finish_store(path)
        assert tree(path) == undisturbed, f"after a death at step {number}"
        shutil.rmtree(path)
        if not died:
            break
    assert len(seen) > 15
    assert seen[0] == ["one"]
    assert seen[-1] == ["one", "two"]
    assert seen == sorted(seen)


@pytest.mark.slow
def test_a_store_is_begun_again_wherever_its_beginning_ended(
    tmp_path: Path, identity: Any, tree: Any, dies_at: Any
) -> None:
    begin_store(tmp_path / "undisturbed", identity)
    for number in range(1, 100):
        path = tmp_path / f"store-{number}"
        died = dies_at(number, path, lambda path=path: begin_store(path, identity))
        begin_store(path, identity)
        assert tree(path) == tree(tmp_path / "undisturbed")
        if not died:
            break
    assert number > 8


@pytest.mark.parametrize("point", POINTS)
def test_a_process_that_dies_at_a_fault_point_is_made_up_for(
    point: str, tmp_path: Path, make_slide: Callable[..., Any], identity: Any, make_store: Any, tree: Any, dies_at: Any
) -> None:
    slides = {name: make_slide(seed=seed) for seed, name in enumerate("abc")}

    def all_of_it() -> None:
        begin_store(tmp_path / "store", identity)
        for name, slide in slides.items():
            write_slide(tmp_path / "store", name, *slide)
        finish_store(tmp_path / "store")

    def killed() -> None:
        faults._name, faults._left = point, 2
        all_of_it()

    assert dies_at(NEVER, tmp_path, killed)
    all_of_it()
    assert tree(tmp_path / "store") == tree(make_store(tmp_path / "undisturbed", slides))
    assert verify_store(tmp_path / "store")["ok"]
