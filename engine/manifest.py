"""MD5 digests that slides came with: GDC's manifest, or what `md5sum` printed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from engine.config import UsageError
from engine.slide_list import ListedSlide

_MD5 = re.compile(r"[0-9a-f]{32}")
_MD5SUM = re.compile(r"([0-9a-fA-F]{32}) [ *](.+)")


def read_manifest(path: Path) -> dict[str, str]:
    """File name -> MD5 (32 lower-case hexadecimal digits) of a manifest.

    It is GDC's (tab-separated, a header with at least filename and md5) or what md5sum prints (`HASH  NAME`, the name
    with or without folders). A name that stands for different files in different folders (GDC's folders are called by
    the file's id) is not in the result; each of them is, as `FOLDER/NAME`.

    Raises UsageError, with the line, for a digest that is none, a line without a name, two digests of one file or a
    missing column, and for a manifest that is empty or cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UsageError(f"manifest {path} is no text file in UTF-8.") from None
    except OSError as error:
        raise UsageError(f"manifest {path}: {error.strerror}.") from None
    digests: dict[str, dict[str, str]] = {}
    for number, folder, name, md5 in _entries(path, lines):
        if not name:
            raise UsageError(f"manifest {path}, line {number}: there is no file name.")
        if not _MD5.fullmatch(md5):
            raise UsageError(f"manifest {path}, line {number}: md5 is {md5!r}; expected 32 hexadecimal digits.")
        known = digests.setdefault(name, {}).setdefault(folder, md5)
        if known != md5:
            raise UsageError(f"manifest {path}, line {number}: {name} has the md5 {md5}, and {known} further up.")
    if not digests:
        raise UsageError(f"manifest {path} lists no file.")
    result = {}
    for name, by_folder in digests.items():
        if len(set(by_folder.values())) == 1:
            result[name] = next(iter(by_folder.values()))
        else:
            result |= {f"{folder}/{name}" if folder else name: md5 for folder, md5 in by_folder.items()}
    return result


def digests_of(slides: Iterable[ListedSlide], manifest: dict[str, str]) -> dict[str, str | None]:
    """slide_id -> the MD5 that `read_manifest` found for the slide's file; None where the manifest does not list it."""
    return {
        slide.slide_id: manifest.get(f"{slide.path.parent.name}/{slide.path.name}", manifest.get(slide.path.name))
        for slide in slides
    }


def _entries(path: Path, lines: list[str]) -> Iterator[tuple[int, str, str, str]]:
    """(line number, folder, file name, MD5 in lower case) of every line that holds one."""
    filled = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not filled:
        raise UsageError(f"manifest {path} is empty.")
    if _MD5SUM.fullmatch(filled[0][1]):
        for number, line in filled:
            match = _MD5SUM.fullmatch(line)
            if match is None:
                raise UsageError(f"manifest {path}, line {number}: expected an md5, two spaces and a file name.")
            place = PurePosixPath(match[2])
            yield number, place.parent.name, place.name, match[1].lower()
        return
    number, header = filled[0]
    columns = [column.strip() for column in header.split("\t")]
    missing = [column for column in ("filename", "md5") if column not in columns]
    if missing:
        raise UsageError(
            f"manifest {path}, line {number}: there is no column {missing[0]}; expected GDC's tab-separated columns "
            "id, filename, md5, size, state, or the output of md5sum."
        )
    for number, line in filled[1:]:
        values = [value.strip() for value in line.split("\t")]
        if len(values) != len(columns):
            raise UsageError(f"manifest {path}, line {number}: {len(values)} values in {len(columns)} columns.")
        row = dict(zip(columns, values, strict=True))
        yield number, row.get("id", ""), row["filename"], row["md5"].lower()
