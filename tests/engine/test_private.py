"""What a slide says of patients and staff stays in the slide: markers planted everywhere in it are nowhere in ours."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
from PIL import Image

MARK = "SECRET"
DESCRIPTION = (
    "Aperio Image Library v12.0.15\r\n1024x1024 [0,0 1024x1024] (256x256) JPEG/RGB Q=80|AppMag = 20|MPP = 0.5|"
    "User = SECRET-USER|Date = SECRET-DATE|Filename = SECRET-FILE|ScanScope ID = SECRET-SCANNER|Title = SECRET-TITLE"
)
TAGS = [
    (315, "s", 0, "SECRET-ARTIST", True),
    (316, "s", 0, "SECRET-HOST", True),
    (33432, "s", 0, "SECRET-COPYRIGHT", True),
    (65000, "s", 0, "SECRET-PRIVATE-TAG", True),
]


def segment(marker: int, text: str) -> bytes:
    return bytes([0xFF, marker]) + (len(text) + 2).to_bytes(2, "big") + text.encode()


def tiles() -> Iterator[bytes]:
    """Tiles of tissue with comments and application segments, and text behind their ends."""
    random = np.random.default_rng(0)
    for _ in range(16):
        pixels = random.integers(120, 230, (256, 256, 3), np.uint8)
        pixels[:, :, 1] //= 2
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=80, comment=b"SECRET-COMMENT")
        stream = file.getvalue()
        planted = segment(0xE1, "Exif\0\0SECRET-EXIF") + segment(0xED, "SECRET-IPTC") + segment(0xFE, "SECRET-COM")
        yield stream[:2] + planted + stream[2:] + b"SECRET-TRAILER"


def label() -> np.ndarray:
    return np.full((64, 128, 3), (1, 254, 3), np.uint8)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("private") / "case.svs"
    shape: dict[str, Any] = {"shape": (1024, 1024, 3), "dtype": np.uint8, "tile": (256, 256), "compression": "jpeg"}
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(
            tiles(), photometric="ycbcr", description=DESCRIPTION, extratags=TAGS, metadata=None,
            software="SECRET-SOFTWARE", datetime="1999:12:31 23:59:59", **shape,
        )  # fmt: skip
        for name in ("label", "macro"):
            text = f"Aperio Image Library v12\r\n{name} 128x64 SECRET-{name.upper()}"
            tiff.write(label(), photometric="rgb", description=text, metadata=None)
    data = path.read_bytes()
    for mark in ("USER", "COMMENT", "TRAILER", "EXIF", "ARTIST", "LABEL", "PRIVATE-TAG", "SOFTWARE"):
        assert f"{MARK}-{mark}".encode() in data
    return path


def everything(folder: Path) -> dict[str, str]:
    """Each file below a folder as text; Parquet as its rows, and what is inlined in a page decoded too."""
    found = {}
    for path in folder.rglob("*"):
        if not path.is_file():
            continue
        text = path.name + path.read_bytes().decode("latin-1")
        if path.suffix == ".parquet":
            text += json.dumps(pq.read_table(path).to_pylist(), default=str)
        for inlined in re.findall(r"base64,([A-Za-z0-9+/=]+)", text):
            text += base64.b64decode(inlined).decode("latin-1")
        found[str(path.relative_to(folder))] = text
    return found


@pytest.mark.parametrize("settings", [["routes=auto"], ["routes=auto", "check_tiles=false"], ["routes=decode"]])
def test_no_marker_of_a_slide_reaches_the_dataset_its_report_or_the_terminal(
    settings: list[str], slide: Path, command: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    said = []
    for arguments in (
        ["shard", "shard/tiny", f"slides={slide}", f"out={out}", *settings, "min_tissue=0", "--local", "--dry-run"],
        ["shard", "shard/tiny", f"slides={slide}", f"out={out}", *settings, "min_tissue=0", "--local"],
        ["report", str(out)],
        ["verify", str(out), "--json"],
    ):
        done = command.run(*arguments)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout + done.stderr)
    rows = pq.read_table(out / "index.parquet").to_pylist()
    assert len(rows) == 16
    assert {row["route"] for row in rows} == {"decode" if "routes=decode" in settings else "copy"}
    assert not [text for text in said if MARK in text or "1999" in text]
    files = everything(out)
    assert {"report.html", "log.jsonl", "qc/case.jpg", "slides.parquet"} <= files.keys()
    assert not [name for name, text in files.items() if MARK in text or "1999:12" in text]


def test_no_pixel_of_the_label_reaches_a_picture(slide: Path, command: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert command.run("shard", "shard/tiny", f"slides={slide}", f"out={out}", "--local").returncode == 0
    green = np.asarray(Image.open(out / "qc" / "case.jpg")).astype(int)
    assert not ((green[:, :, 1] > 220) & (green[:, :, 0] < 60) & (green[:, :, 2] < 60)).any()


def test_a_slide_that_fails_keeps_its_metadata_to_itself(slide: Path, command: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken.svs"
    broken.write_bytes(slide.read_bytes().replace(b"MPP = 0.5", b"MPP = SEC"))
    out = tmp_path / "out"
    done = command.run("shard", "shard/tiny", f"slides={broken}", f"out={out}", "--local")
    assert done.returncode == 3
    assert MARK not in done.stdout + done.stderr
    assert not [name for name, text in everything(out).items() if MARK in text]
