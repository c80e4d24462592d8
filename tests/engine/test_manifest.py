"""GDC's manifest and the output of md5sum: file names to digests, and slides to theirs."""

from __future__ import annotations

import hashlib
import shutil
import string
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import UsageError
from engine.manifest import digests_of, read_manifest
from engine.slide_list import ListedSlide
from sharding.md5 import md5_of

ONE, TWO, THREE = (digit * 32 for digit in "1a3")
HEADER = "id\tfilename\tmd5\tsize\tstate\n"


@pytest.fixture
def manifest(tmp_path: Path):
    def write(content: str | bytes) -> Path:
        path = tmp_path / "manifest.txt"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def _slide(path: str) -> ListedSlide:
    return ListedSlide(path, Path("/data") / path)


def test_gdcs_manifest_gives_names_and_digests_in_lower_case(manifest) -> None:
    text = f"{HEADER}id-1\ta.svs\t{ONE}\t10\treleased\n\nid-2\tb c.svs\t{TWO.upper()}\t20\treleased\n"
    assert read_manifest(manifest(text)) == {"a.svs": ONE, "b c.svs": TWO}


def test_columns_are_found_by_name_and_windows_files_are_read(manifest) -> None:
    text = f"\ufeffmd5\tfilename\r\n{ONE}\ta.svs\r\n"
    assert read_manifest(manifest(text)) == {"a.svs": ONE}


def test_what_md5sum_prints_is_read(manifest) -> None:
    text = f"{ONE}  a.svs\n{TWO} *deep/b c.svs\n{THREE.upper()}  /data/d.svs\n"
    assert read_manifest(manifest(text)) == {"a.svs": ONE, "b c.svs": TWO, "d.svs": THREE}


def test_the_real_md5sum_is_understood_and_agrees_with_ours(tmp_path: Path) -> None:
    if shutil.which("md5sum") is None:
        pytest.skip("there is no md5sum on this machine")
    names = ["a.svs", "deep/b  c.svs", "-d.svs"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    with open(tmp_path / "sums", "wb") as out:
        subprocess.run(["md5sum", "--", *names], cwd=tmp_path, stdout=out, check=True, timeout=60)
    expected = {Path(name).name: md5_of(str(tmp_path / name)) for name in names}
    assert read_manifest(tmp_path / "sums") == expected


names = st.text(string.ascii_letters + string.digits + "-_. ", min_size=1).filter(
    lambda name: name == name.strip() and name not in (".", "..")
)


@given(files=st.dictionaries(names, st.binary(), min_size=1), gdc=st.booleans())
def test_any_list_of_files_comes_back(files: dict[str, bytes], gdc: bool, tmp_path_factory) -> None:
    digests = {name: hashlib.md5(data).hexdigest() for name, data in files.items()}
    if gdc:
        text = HEADER + "".join(f"id\t{name}\t{md5}\t1\treleased\n" for name, md5 in digests.items())
    else:
        text = "".join(f"{md5}  {name}\n" for name, md5 in digests.items())
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_text(text)
    assert read_manifest(path) == digests


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        (HEADER, "lists no file"),
        ("id\tfilename\tsize\nx\ta.svs\t1\n", "line 1: there is no column md5"),
        ("id,filename,md5\n", "line 1: there is no column filename"),
        (f"{HEADER}x\ta.svs\t{ONE[:-1]}\t1\tlive\n", "line 2: md5 is '" + ONE[:-1]),
        (f"{HEADER}x\ta.svs\t{'g' * 32}\t1\tlive\n", "line 2: md5 is 'ggg"),
        (f"{HEADER}x\ta.svs\t\t1\tlive\n", "line 2: md5 is ''"),
        (f"{HEADER}x\t\t{ONE}\t1\tlive\n", "line 2: there is no file name"),
        (f"{HEADER}x\ta.svs\t{ONE}\n", "line 2: 3 values in 5 columns"),
        (f"{HEADER}x\ta.svs\t{ONE}\t1\tlive\n\nx\ta.svs\t{TWO}\t1\tlive\n", f"line 4: a.svs has the md5 {TWO}"),
        (f"{ONE}  a.svs\n{TWO}  a.svs\n", f"line 2: a.svs has the md5 {TWO}"),
        (f"{ONE}  a.svs\nb.svs\n", "line 2: expected an md5"),
        (b"id\tfilename\tmd5\n\xff\xfe\n", "no text file"),
    ],
)
def test_mistakes_are_told_in_one_sentence_that_names_the_line(manifest, text: str | bytes, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_manifest(manifest(text))
    assert said in str(caught.value)
    assert "manifest.txt" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.txt: No such file"):
        read_manifest(tmp_path / "nowhere.txt")


def test_a_file_listed_twice_with_one_digest_is_no_mistake(manifest) -> None:
    text = f"{HEADER}x\ta.svs\t{ONE}\t1\tlive\nx\ta.svs\t{ONE}\t1\tlive\ny\ta.svs\t{ONE}\t1\tlive\n"
    assert read_manifest(manifest(text)) == {"a.svs": ONE}


@pytest.mark.parametrize("gdc", [True, False])
def test_a_name_that_occurs_twice_is_told_apart_by_its_folder(manifest, gdc: bool) -> None:
    rows = [("id-1", "a.svs", ONE), ("id-2", "a.svs", TWO), ("id-3", "b.svs", THREE)]
    if gdc:
        text = HEADER + "".join(f"{folder}\t{name}\t{md5}\t1\tlive\n" for folder, name, md5 in rows)
    else:
        text = "".join(f"{md5}  {folder}/{name}\n" for folder, name, md5 in rows)
    found = read_manifest(manifest(text))
    assert found == {"id-1/a.svs": ONE, "id-2/a.svs": TWO, "b.svs": THREE}
    slides = [_slide(path) for path in ("id-1/a.svs", "id-2/a.svs", "other/a.svs", "anywhere/b.svs", "c.svs")]
    assert digests_of(slides, found) == {
        "id-1/a.svs": ONE,
        "id-2/a.svs": TWO,
        "other/a.svs": None,
        "anywhere/b.svs": THREE,
        "c.svs": None,
    }
