"""Folders, globs and lists to slides with unique ids, and random subsets of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import UsageError
from engine.slide_list import ListedSlide, list_slides, subset


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


def test_two_stars_are_any_number_of_folders_and_meet_a_file_once(folder: Path) -> None:
    (folder / "deep" / "deeper").mkdir()
    (folder / "deep" / "deeper" / "f.svs").write_bytes(b"f")
    assert [s.slide_id for s in list_slides(f"{folder}/**/*.svs")] == ["b", "f"]
    assert [s.slide_id for s in list_slides(f"{folder}/**/**/*.svs")] == ["b", "f"]
    assert [s.slide_id for s in list_slides(f"{folder}/**/deeper/*")] == ["f"]
    (folder / "deep" / "round").symlink_to(folder)
    assert [s.slide_id for s in list_slides(f"{folder}/**/*.svs")] == ["b", "f"]


def test_a_glob_leaves_out_what_is_hidden_and_what_is_no_slide(folder: Path) -> None:
    assert [s.slide_id for s in list_slides(f"{folder}/**")] == ["a", "b", "c"]
    assert [s.slide_id for s in list_slides(f"{folder}/?.[st]*")] == ["b"]


def test_a_glob_may_be_relative_and_may_start_at_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.chdir(folder.parent)
    for source in ("~/slides/*.svs", "slides/*.svs"):
        assert [s.path for s in list_slides(source)] == [(folder / "b.svs").resolve()]


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


@pytest.mark.parametrize("name", [b"ends in \xff.svs", b"\xff folder/good.svs"])
def test_a_name_that_is_no_utf8_is_refused_before_anything_is_done(folder: Path, name: bytes) -> None:
    path = Path(os.fsdecode(os.fsencode(folder) + b"/" + name))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x")
    with pytest.raises(UsageError, match=r"udcff.* is no UTF-8"):
        list_slides(str(folder))


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


def test_a_list_may_be_separated_by_tabs(folder: Path) -> None:
    path = folder / "list.TSV"
    path.write_text("slide_id\tpath\tsite\nx\tb.svs\tOslo, Ullevaal\n")
    (slide,) = list_slides(str(path))
    assert (slide.slide_id, slide.path) == ("x", (folder / "b.svs").resolve())
    assert slide.columns == {"site": "Oslo, Ullevaal"}


def test_label_split_and_patient_are_columns_like_any_other(folder: Path) -> None:
    source = _csv(folder, "path,label,split,patient_id\nb.svs,1,train,TCGA-02-0001\na.TIFF,0,test,TCGA-02-0002\n")
    columns = [slide.columns for slide in list_slides(source)]
    assert columns == [
        {"label": 0, "split": "test", "patient_id": "TCGA-02-0002"},
        {"label": 1, "split": "train", "patient_id": "TCGA-02-0001"},
    ]


def test_paths_of_a_list_start_at_its_folder_at_home_or_at_the_root(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.chdir(tmp_path)
    source = _csv(folder, f"path\n../slides/b.svs\n~/slides/a.TIFF\n{folder}/deep/c.ndpi\n")
    found = [slide.path for slide in list_slides(source)]
    assert found == [(folder / name).resolve() for name in ("a.TIFF", "b.svs", "deep/c.ndpi")]


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


def test_a_spacing_that_is_no_number_is_told_once(folder: Path) -> None:
    with pytest.raises(UsageError) as caught:
        list_slides(_csv(folder, "path,mpp\nb.svs,abc\na.TIFF,abc\n"))
    assert str(caught.value).count("mpp=abc") == 1


def test_a_csv_that_is_no_text_is_refused(folder: Path) -> None:
    path = folder / "list.csv"
    path.write_bytes(b"path\n\xff\xfe\x00\x80\n")
    with pytest.raises(UsageError, match=r"list\.csv"):
        list_slides(str(path))


def _named(ids: list[str]) -> list[ListedSlide]:
    return [ListedSlide(slide_id, Path(f"{slide_id}.svs")) for slide_id in ids]


ids_lists = st.lists(st.text(min_size=1), min_size=1, max_size=30, unique=True)


@given(ids=ids_lists, seed=st.integers(0, 2**64 - 1), data=st.data())
def test_a_subset_depends_on_ids_and_seed_alone_and_grows_by_one(
    ids: list[str], seed: int, data: st.DataObject
) -> None:
    n = data.draw(st.integers(1, len(ids)))
    found = subset(_named(ids), n, seed)
    assert len(found) == n
    assert [slide.slide_id for slide in found] == sorted(slide.slide_id for slide in found)
    assert found == subset(_named(data.draw(st.permutations(ids))), n, seed)
    assert set(ids) >= {slide.slide_id for slide in found}
    if n < len(ids):
        more = {slide.slide_id for slide in subset(_named(ids), n + 1, seed)}
        assert more > {slide.slide_id for slide in found}


@given(ids=ids_lists.filter(lambda ids: len(ids) > 1), seed=st.integers(0, 100), data=st.data())
def test_a_slide_that_is_added_displaces_one_at_most(ids: list[str], seed: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, len(ids) - 1))
    before, after = ({s.slide_id for s in subset(_named(part), n, seed)} for part in (ids[:-1], ids))
    assert len(before - after) <= 1


def test_a_subset_is_the_same_on_every_machine_and_another_for_another_seed() -> None:
    slides = _named([f"slide-{number:03d}" for number in range(200)])
    assert [slide.slide_id for slide in subset(slides, 3, 0)] == ["slide-076", "slide-150", "slide-197"]
    chosen = [{slide.slide_id for slide in subset(slides, 50, seed)} for seed in range(40)]
    # 50 of 200: two subsets share 12.5 slides on average.
    shared = [len(a & b) for i, a in enumerate(chosen) for b in chosen[:i]]
    assert 10 < sum(shared) / len(shared) < 15
    assert max(shared) < 30


@pytest.mark.parametrize("n", [0, -1, 4])
def test_a_subset_that_cannot_be_is_refused_with_both_numbers(n: int) -> None:
    with pytest.raises(UsageError, match=rf"subset of {n} slides.*1 to 3"):
        subset(_named(["a", "b", "c"]), n, 0)
