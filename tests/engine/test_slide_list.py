"""Folders, globs and CSV files to slides with unique ids."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config import UsageError
from engine.slide_list import list_slides


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.svs", "a.TIFF", "notes.txt", "deep/c.ndpi", ".hidden/d.svs", ".e.svs", "labels.csv"):
        path = tmp_path / "slides" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path / "slides"


def _csv(folder: Path, text: str) -> str:
    path = folder / "list.csv"
    path.write_text(text)
    return str(path)


def test_a_folder_is_searched_below_for_slides_alone_sorted_by_id(folder: Path) -> None:
    slides = list_slides(str(folder))
    assert [slide.slide_id for slide in slides] == ["a", "b", "c"]
    assert all(slide.path.is_absolute() for slide in slides)


def test_a_glob_takes_what_it_matches(folder: Path) -> None:
    assert [s.slide_id for s in list_slides(f"{folder}/*.svs")] == ["b"]
    assert [s.slide_id for s in list_slides(f"{folder}/**/*.ndpi")] == ["c"]


def test_a_folder_whose_name_looks_like_a_glob_is_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "set [1]"
    folder.mkdir()
    (folder / "a.svs").write_bytes(b"x")
    assert [s.slide_id for s in list_slides(str(folder))] == ["a"]


def test_one_file_is_a_list_of_one(folder: Path) -> None:
    assert [s.slide_id for s in list_slides(str(folder / "b.svs"))] == ["b"]


def test_a_path_may_start_at_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert len(list_slides("~/slides")) == 3


@pytest.mark.parametrize("source", ["nowhere", "nowhere/*.svs"])
def test_what_is_not_there_is_refused_by_name(source: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere"):
        list_slides(str(tmp_path / source))


def test_a_folder_without_slides_is_refused_and_says_what_was_searched_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no slide in .*\.svs"):
        list_slides(str(tmp_path))


def test_two_slides_of_one_name_are_refused_with_both_paths(folder: Path) -> None:
    (folder / "deep" / "b.svs").write_bytes(b"other")
    with pytest.raises(UsageError) as caught:
        list_slides(str(folder))
    for part in ("'b'", str(folder / "b.svs"), str(folder / "deep" / "b.svs"), "slide_id"):
        assert part in str(caught.value)


def test_a_csv_gives_ids_spacings_and_further_columns(folder: Path) -> None:
    source = _csv(
        folder,
        "slide_id,path,mpp,label,age\nx,b.svs,0.25,tumour,61\ny,deep/c.ndpi,,normal,\n,a.TIFF,,,3\n",
    )
    slides = {slide.slide_id: slide for slide in list_slides(source)}
    assert list(slides) == ["a", "x", "y"]
    assert slides["x"].mpp == 0.25
    assert slides["x"].path == (folder / "b.svs").resolve()
    assert slides["x"].columns == {"label": "tumour", "age": 61}
    assert slides["y"].mpp is None
    assert slides["y"].columns == {"label": "normal", "age": None}


def test_ids_and_columns_that_look_like_numbers_keep_their_zeros(folder: Path) -> None:
    slides = list_slides(_csv(folder, "slide_id,path,patient_id\n007,b.svs,0042\n"))
    assert slides[0].slide_id == "007"
    assert str(slides[0].columns["patient_id"]) == "0042"


def test_a_csv_with_a_byte_order_mark_and_windows_lines_is_read(folder: Path) -> None:
    path = folder / "list.csv"
    path.write_bytes(b"\xef\xbb\xbfpath,slide_id\r\nb.svs,x\r\n")
    assert [s.slide_id for s in list_slides(str(path))] == ["x"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("slide,label\na,b\n", "expected one named path"),
        ("slide_id,path\na,\n", "line 2: path is empty"),
        ("path,mpp\nb.svs,half\n", "line 2: mpp=half"),
        ("path,status\nb.svs,new\n", "'status'; rename yours"),
        ("slide_id,path\na,b.svs\na,deep/c.ndpi\n", "two slides have the id 'a'"),
        ("slide_id,path\n", "no slide in"),
        ("", "list.csv"),
        ("path\nb.svs,1,2\n", "list.csv"),
    ],
)
def test_mistakes_in_a_csv_are_told_in_one_sentence(folder: Path, text: str, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        list_slides(_csv(folder, text))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_csv_that_is_no_text_is_refused(folder: Path) -> None:
    path = folder / "list.csv"
    path.write_bytes(b"path\n\xff\xfe\x00\x80\n")
    with pytest.raises(UsageError, match=r"list\.csv"):
        list_slides(str(path))
