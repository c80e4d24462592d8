"""`engine report`: what stands on the page, what must not stand there, and that it says what it leaves out."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from PIL import Image

from engine import report, shard
from engine.recipes import ShardRecipe
from engine.synth import run as synth
from sharding.index import FORMAT_VERSION, INDEX_SCHEMA, DatasetDamagedError
from sharding.qc import qc_name
from sharding.verify import verify_dataset

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "dataset-v1"
EVIL = "<script>alert(1)</script>"
VOID = {"meta", "img", "input", "rect", "path", "link", "br", "hr"}


class Page(HTMLParser):
    """A page as text and elements; an element that is not closed in its place is an error."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.content: dict[str, str] = {}
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        tag = self._open[-1] if self._open else ""
        self.content[tag] = self.content.get(tag, "") + data
        if tag not in ("style", "script"):
            self.text += f" {' '.join(data.split())}" if data.strip() else ""
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] = f"{self.rows[-1][-1]} {' '.join(data.split())}".strip()

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def slides(self) -> list[dict[str, str]]:
        """The rows of the table of slides, by the names of its columns."""
        (start,) = [i for i, row in enumerate(self.rows) if "Levels" in row]
        names = self.rows[start]
        return [dict(zip(names, row, strict=True)) for row in self.rows[start + 1 :] if len(row) == len(names)]


@pytest.fixture(scope="module")
def messy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(dataset of a slide with a hostile id, a damaged one and a file that is no slide; what the verb returned)."""
    folder = tmp_path_factory.mktemp("messy") / "patient-folder"
    synth(folder, slides=2, size=2048, seed=1, workers=1)
    (folder / "Smith.svs").write_text("no slide")
    with tifffile.TiffFile(folder / "synth-0001.svs") as tiff:
        page: Any = tiff.pages[0]
        tile = 3 * 8 + 3
        offset, length = page.dataoffsets[tile], page.databytecounts[tile]
    with open(folder / "synth-0001.svs", "r+b") as file:
        file.seek(offset)
        file.write(bytes(length))
    slides = folder / "slides.csv"
    slides.write_text(
        "path,slide_id,<b>diagnosis</b>\n"
        f"synth-0000.svs,{EVIL},adeno\nsynth-0001.svs,second,carcinoma\nSmith.svs,third,none\n"
    )
    out = folder.parent / "dataset"
    recipe = ShardRecipe(slides=str(slides), out=out, workers=1, context_px=256, patches_per_shard=16, min_tissue=0.1)
    return out, shard.run(recipe, local=True)


@pytest.fixture
def page(messy: tuple[Path, dict[str, Any]], tmp_path: Path) -> Page:
    report.run(messy[0], tmp_path / "page.html")
    return Page(tmp_path / "page.html")


def _put_picture(dataset: Path, slide_id: str, size: tuple[int, int] = (600, 400)) -> bytes:
    (dataset / "qc").mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(150, 255, (size[1], size[0], 3), np.uint8)
    path = dataset / "qc" / qc_name(slide_id)
    Image.fromarray(pixels).save(path, "JPEG")
    return path.read_bytes()


def _rewrite(path: Path, **columns: Any) -> pa.Table:
    table = pq.read_table(path)
    for name, values in columns.items():
        i = table.schema.get_field_index(name)
        table = table.set_column(i, table.schema.field(i), pa.array(values, table.schema.field(i).type))
    pq.write_table(table, path)
    return table


# --- what stands there


def test_the_result_names_the_page_and_its_size(dataset: Path) -> None:
    result = report.run(dataset)
    path = dataset / "report.html"
    assert result == {"report": str(path), "slides": 3, "bytes": path.stat().st_size}
    assert str(path) in report.describe(result)
    assert verify_dataset(dataset)["ok"]
    assert not list(dataset.glob(".tmp-*"))


def test_totals_and_provenance_are_those_of_the_dataset(messy: tuple[Path, dict[str, Any]], page: Page) -> None:
    result = messy[1]
    assert result["slides"] == {"done": 2, "quarantined": 1}
    copied = result["patches"]["copy"]
    assert result["patches"] == {"copy": copied, "decode": 0, "quarantined": 1}
    assert f"Slides 2 1 quarantined Patches {copied} stored Route copy {copied} 100 % of the stored" in page.text
    assert f"Quarantined patches 1 {100 / (copied + 1):.3g} % of the planned" in page.text
    assert f"{result['shards']} shards" in page.text
    assert result["digest"] in page.text
    assert f"Format version {FORMAT_VERSION}" in page.text
    assert ["context_px", "256"] in page.rows
    assert ["numpy", np.__version__] in page.rows
    assert "No patch carries a flag." in page.text


def test_the_table_says_of_each_slide_what_is_known(messy: tuple[Path, dict[str, Any]], page: Page) -> None:
    second, third, first = page.slides  # what failed comes first
    assert first["Slide"] == EVIL
    assert second["Slide"].startswith("second 1 of ")
    assert third["Slide"].startswith("third ")
    assert [row["Status"] for row in page.slides] == ["damaged", "quarantined", "done"]
    known = ("µm/px", "Source", "Size", "Levels", "Tissue")
    assert [second[name] for name in known[:-1]] == ["0.5", "aperio", "2,048 × 2,048", "2"]
    assert [third[name] for name in known] == ["–"] * 5
    assert (first["Damaged"], second["Damaged"], third["Damaged"]) == ("0", "1", "–")
    index = pq.read_table(messy[0] / "index.parquet").to_pylist()
    for slide_id, shown in ((EVIL, first), ("second", second)):
        own = [row for row in index if row["slide_id"] == slide_id]
        assert (shown["Patches"], shown["copy"]) == (str(len(own)), str(len(own)))
        # Cells of 256 px of a slide of 2048 px.
        assert shown["Tissue"] == f"{100 * sum(row['tissue_fraction'] for row in own) / 64:.3g} %"
        assert re.fullmatch(r"\d+\.\d\d", shown["Seconds"])


def test_failures_stand_on_top_with_their_reasons(messy: tuple[Path, dict[str, Any]], page: Page) -> None:
    reasons = {failure["slide_id"]: failure["reason"] for failure in messy[1]["failures"]}
    assert ["second", "damaged", reasons["second"]] in page.rows
    assert page.text.index("Failures 2") < page.text.index("Distributions") < page.text.index("Slides 3")


def test_a_slide_without_tissue_is_named_as_a_failure(dataset: Path, tmp_path: Path) -> None:
    slides = pq.read_table(dataset / "slides.parquet")
    more = slides.slice(0, 1).to_pylist()[0] | {"slide_id": "white", "patches": 0, "reason": "no patch holds enough"}
    pq.write_table(pa.concat_tables([slides, pa.Table.from_pylist([more], slides.schema)]), dataset / "slides.parquet")
    report.run(dataset, tmp_path / "page.html")
    assert ["white", "no patch", "no patch holds enough"] in Page(tmp_path / "page.html").rows


def test_routes_and_flags_are_counted_from_the_index(dataset: Path, tmp_path: Path) -> None:
    rows = pq.read_metadata(dataset / "index.parquet").num_rows
    route = ["splice" if i % 4 == 0 else "copy" for i in range(rows)]
    _rewrite(
        dataset / "index.parquet",
        route=route,
        flags=[1 + 4 * (i < 2) + 8 * (i < 4) + 64 * (i < 3) for i in range(rows)],
    )
    report.run(dataset, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert f"Route copy {route.count('copy')} " in page.text
    assert f"Route splice {route.count('splice')} " in page.text
    assert sum(int(row["splice"]) for row in page.slides) == route.count("splice")
    assert ["reaches beyond the slide", str(rows), "100 %"] in page.rows
    assert ["blurred", "2", f"{200 / rows:.3g} %"] in page.rows
    assert ["in a partial region", "4", f"{400 / rows:.3g} %"] in page.rows
    assert ["bit 6", "3", f"{300 / rows:.3g} %"] in page.rows


def test_the_index_is_summed_in_batches(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report.run(dataset, tmp_path / "whole.html")
    monkeypatch.setattr(report, "_BATCH_ROWS", 7)
    report.run(dataset, tmp_path / "parts.html")
    whole, parts = Page(tmp_path / "whole.html"), Page(tmp_path / "parts.html")
    assert parts.rows == whole.rows
    assert parts.text == whole.text


_PEAKS = """
import sys
from pathlib import Path
import pyarrow as pa
from engine import report

report._BATCH_ROWS = 1 << 13
for path in sys.argv[1:]:
    sums = report._read_index(Path(path), ["a"])
    print(sums.routes["copy"][0], pa.default_memory_pool().max_memory())
"""


def test_memory_does_not_grow_with_the_index(tmp_path: Path) -> None:
    names = ("slide_id", "mpp", "tissue_fraction", "flags", "route")
    schema = pa.schema([INDEX_SCHEMA.field(name) for name in names])
    rows = 1 << 14
    share = np.random.default_rng(0).random(rows, np.float32)
    columns = [["a"] * rows, np.full(rows, 0.5), share, np.zeros(rows, np.uint32), ["copy"] * rows]
    table = pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)
    paths = []
    for groups in (4, 128):
        paths.append(str(tmp_path / f"{groups}.parquet"))
        with pq.ParquetWriter(paths[-1], schema) as writer:
            for _ in range(groups):
                writer.write_table(table)
    # In a process of its own: what Arrow reads ahead is counted in its default pool alone.
    done = subprocess.run(
        [sys.executable, "-c", _PEAKS, *paths], capture_output=True, text=True, timeout=100, check=True, cwd=ROOT
    )
    (few, peak), (many, later_peak) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert (few, many) == (4 * rows, 128 * rows)
    assert later_peak < 1.5 * peak


def test_the_page_is_a_function_of_the_dataset(dataset: Path, tmp_path: Path) -> None:
    for name in ("one.html", "two.html"):
        report.run(dataset, tmp_path / name)
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_the_golden_dataset_has_a_page(tmp_path: Path) -> None:
    result = report.run(GOLDEN, tmp_path / "page.html")
    assert result["slides"] == 1
    page = Page(tmp_path / "page.html")
    assert [row["Patches"] for row in page.slides] == ["16"]
    assert "the dataset has no log.jsonl" in page.text
    assert "There are no pictures." in page.text


def test_a_slide_without_spacing_has_a_share_of_tissue_all_the_same(tmp_path: Path) -> None:
    synth(tmp_path / "slides", slides=1, size=1024, seed=2, mpp=None, workers=1)
    recipe = ShardRecipe(slides=str(tmp_path / "slides"), out=tmp_path / "out", mpp="native", workers=1, min_tissue=0.1)
    shard.run(recipe, local=True)
    report.run(tmp_path / "out")
    (row,) = Page(tmp_path / "out" / "report.html").slides
    fractions = pq.read_table(tmp_path / "out" / "index.parquet")["tissue_fraction"].to_pylist()
    assert (row["µm/px"], row["Source"]) == ("–", "unknown")
    assert row["Tissue"] == f"{100 * sum(fractions) / 16:.3g} %"


# --- what must not stand there


def test_what_users_write_is_escaped_and_only_our_script_may_run(page: Page) -> None:
    assert EVIL not in page.source
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page.source
    assert "<b>" not in page.source
    assert "&lt;b&gt;diagnosis&lt;/b&gt;" in page.source
    assert len(page.attributes("script")) == 1
    digest = base64.b64encode(hashlib.sha256(page.content["script"].encode()).digest()).decode()
    (policy,) = [
        a["content"] or "" for a in page.attributes("meta") if a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]


def test_nothing_is_loaded_from_elsewhere(dataset: Path, tmp_path: Path) -> None:
    _put_picture(dataset, "synth-0000")
    report.run(dataset, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    sources = [a["src"] or "" for _, a in page.elements if "src" in a]
    assert len(sources) == 3
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert all((a["href"] or "").startswith("#") for a in page.attributes("a"))
    assert not page.attributes("link")
    assert not re.search(r"https?:|url\(|@import", page.source)


def test_neither_place_nor_host_nor_further_columns_stand_there(messy: tuple[Path, dict[str, Any]], page: Page) -> None:
    dataset = messy[0]
    assert socket.gethostname() in (dataset / "log.jsonl").read_text()
    for word in (str(dataset.parent), "patient-folder", "Smith", "adeno", "carcinoma"):
        assert word not in page.source, word
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", page.text)
    assert "further columns (<b>diagnosis</b>)" in page.text


def test_a_reason_reaches_the_page_without_the_path_of_its_slide(dataset: Path, tmp_path: Path) -> None:
    paths = pq.read_table(dataset / "slides.parquet")["path"].to_pylist()
    _rewrite(dataset / "slides.parquet", status=["quarantined"] * 3, reason=[f"{path}: lost" for path in paths])
    report.run(dataset, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert [row["Slide"] for row in page.slides] == [f"synth-000{i} synth-000{i}: lost" for i in range(3)]
    assert str(Path(paths[0]).parent) not in page.source


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("", ""),
        ("/data/my slides/Smith.svs: no such file", "anon: no such file"),
        ("cannot open Smith.svs", "cannot open anon"),
        ("/data/my slides/Smith/Index.dat is missing", "anon/Index.dat is missing"),
        ("like /data/my slides/Smithers.svs", "like [path]"),
        ("lost /mnt/x/y.tmp, /mnt/z/: stop", "lost [path], [path]: stop"),
        ("0.5 um/px, 1/16 of level 0, 3 of 4 / none", "0.5 um/px, 1/16 of level 0, 3 of 4 / none"),
    ],
)
def test_reasons_lose_their_paths(reason: str, said: str) -> None:
    assert report._without_places(reason, "/data/my slides/Smith.svs", "anon") == said


def test_a_slide_in_the_root_keeps_the_slashes_of_its_reason() -> None:
    assert report._without_places("/a.svs has no um/px", "/a.svs", "x") == "x has no um/px"


# --- large datasets


def test_of_many_slides_the_failures_and_a_stated_sample_are_listed(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slides = pq.read_table(dataset / "slides.parquet")
    more = [
        slides.slice(0, 1).to_pylist()[0] | {"slide_id": f"x{i}", "status": "quarantined", "patches": 0, "reason": "r"}
        for i in range(4)
    ]
    pq.write_table(pa.concat_tables([slides, pa.Table.from_pylist(more, slides.schema)]), dataset / "slides.parquet")

    def listed(most: int) -> Page:
        monkeypatch.setattr(report, "_MAX_LISTED", most)
        report.run(dataset, tmp_path / "page.html")
        return Page(tmp_path / "page.html")

    page = listed(6)
    assert [row["Slide"] for row in page.slides] == ["x0 r", "x1 r", "x2 r", "x3 r", "synth-0000", "synth-0001"]
    assert "6 of 7 are listed: all 4 with a failure, and 2 others" in page.text
    page = listed(2)
    assert [row["Slide"] for row in page.slides] == ["x0 r", "x2 r"]
    assert "2 of 7 are listed: 2 of the 4 with a failure, and 0 others" in page.text
    assert "2 of 4 are listed, evenly spaced" in page.text
    assert "All are listed" in listed(7).text


def test_pictures_are_inlined_as_they_are_while_they_are_small_together(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (dataset / "qc" / qc_name("synth-0000")).unlink()
    whole = _put_picture(dataset, "synth-0001")
    _put_picture(dataset, "synth-0002", (400, 600))

    def pictures() -> list[bytes]:
        report.run(dataset, tmp_path / "page.html")
        sources = [a["src"] or "" for a in Page(tmp_path / "page.html").attributes("img") if "src" in a]
        return [base64.b64decode(source.partition(",")[2]) for source in sources]

    assert pictures()[0] == whole
    assert "2 have a picture here." in Page(tmp_path / "page.html").text
    monkeypatch.setattr(report, "_MAX_PICTURES_BYTES", len(whole))
    reduced = pictures()
    assert [Image.open(io.BytesIO(data)).size for data in reduced] == [(288, 192), (192, 288)]
    assert "2 have a picture here, reduced; qc/ holds them in full." in Page(tmp_path / "page.html").text
    monkeypatch.setattr(report, "_MAX_PICTURES", 1)
    assert len(pictures()) == 1
    assert "1 have a picture here." in Page(tmp_path / "page.html").text


# --- the log


def test_throughput_is_that_of_the_last_line_of_each_slide(dataset: Path, tmp_path: Path) -> None:
    lines = [
        {"slide_id": "synth-0000", "patches": 1, "seconds": 50.0},
        {"slide_id": "synth-0000", "patches": 30, "seconds": 2.0},
        {"slide_id": "synth-0001", "patches": 10, "seconds": 3.0},
        {"event": "of no slide"},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (dataset / "log.jsonl").write_text(text + '{"slide_id": "synth-0002", "sec')
    report.run(dataset, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert "Patches a second 8 of one process Time of all slides 5 s" in page.text
    assert "Median slide 3 s of 2 timed Slowest slide 3 s" in page.text
    assert "1 line of log.jsonl could not be read." in page.text
    assert [row["Seconds"] for row in page.slides] == ["2.00", "3.00", "–"]


def test_without_a_log_the_page_says_so(dataset: Path, tmp_path: Path) -> None:
    (dataset / "log.jsonl").unlink()
    report.run(dataset, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert "Unknown: the dataset has no log.jsonl." in page.text
    assert "Seconds" not in page.slides[0]


# --- what is no dataset


def test_what_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no dataset\.json"):
        report.run(tmp_path)


@pytest.mark.parametrize("out", [".", "absent/page.html"])
def test_a_page_needs_a_folder_and_a_name(dataset: Path, tmp_path: Path, out: str) -> None:
    with pytest.raises(ValueError, match="expected a file in a folder that exists"):
        report.run(dataset, tmp_path / out)


@pytest.mark.parametrize("name", ["slides.parquet", "index.parquet"])
def test_a_list_that_is_missing_or_cut_off_is_damage(dataset: Path, name: str) -> None:
    path = dataset / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DatasetDamagedError, match=f"{name} is damaged"):
        report.run(dataset)
    path.unlink()
    with pytest.raises(DatasetDamagedError, match=f"{name} is damaged"):
        report.run(dataset)
    assert not (dataset / "report.html").exists()


def test_lists_that_contradict_each_other_are_damage(dataset: Path) -> None:
    slides = pq.read_table(dataset / "slides.parquet")
    pq.write_table(slides.slice(1), dataset / "slides.parquet")
    with pytest.raises(
        DatasetDamagedError, match=r"patches of slide 'synth-0000', which slides\.parquet does not list"
    ):
        report.run(dataset)
    pq.write_table(slides, dataset / "slides.parquet")
    pq.write_table(pq.read_table(dataset / "index.parquet").slice(1), dataset / "index.parquet")
    with pytest.raises(DatasetDamagedError, match=r"has 72 rows, dataset\.json says 73"):
        report.run(dataset)


def test_an_older_page_stays_where_a_new_one_fails(dataset: Path) -> None:
    (dataset / "report.html").write_text("old")
    (dataset / "qc" / qc_name("synth-0000")).write_bytes(b"no picture" * 1_000_000)
    with pytest.raises(OSError, match="cannot identify"):
        report.run(dataset)
    assert (dataset / "report.html").read_text() == "old"
    assert not list(dataset.glob(".tmp-*"))


# --- in a browser


class Browser:
    """Chromium without a window, spoken to through a pipe in its DevTools protocol."""

    def __init__(self, program: str, profile: Path) -> None:
        read_theirs, write_ours = os.pipe()
        read_ours, write_theirs = os.pipe()
        options = "--headless --no-sandbox --disable-gpu --remote-debugging-pipe"
        start = f'exec "$0" {options} --user-data-dir="$1" 3<&{read_theirs} 4>&{write_theirs}'
        self.process = subprocess.Popen(
            ["bash", "-c", start, program, str(profile)],
            pass_fds=(read_theirs, write_theirs),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_theirs)
        os.close(write_theirs)
        self._to, self._from = os.fdopen(write_ours, "wb", 0), os.fdopen(read_ours, "rb")
        self._session: dict[str, str] = {}
        self._number = 0
        self.events: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        self._to.write(json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            pass
        return dict(answer["result"])

    def _next(self) -> dict[str, Any]:
        data = bytearray()
        while (byte := self._from.read(1)) != b"\0":
            assert byte, "the browser is gone"
            data += byte
        message: dict[str, Any] = json.loads(data)
        self.events.append(message.get("method", ""))
        return message

    def open(self, page: Path) -> None:
        self.call("Page.navigate", url=page.as_uri())
        while "Page.loadEventFired" not in self.events:
            self._next()

    def run(self, script: str) -> Any:
        return self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)["result"].get(
            "value"
        )

    def press(self, key: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code)

    def close(self) -> None:
        self.call("Browser.close")
        self.process.wait(30)
        self._to.close()
        self._from.close()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no browser here: neither chromium nor google-chrome is installed")
    browser = Browser(program, tmp_path / "profile")
    yield browser
    browser.close()


def test_the_table_sorts_filters_and_shows_pictures_in_a_browser(
    messy: tuple[Path, dict[str, Any]], browser: Browser, tmp_path: Path
) -> None:
    dataset = Path(shutil.copytree(messy[0], tmp_path / "dataset"))
    _put_picture(dataset, EVIL)
    _put_picture(dataset, "second")
    report.run(dataset)
    browser.open(dataset / "report.html")

    def rows() -> list[str]:
        script = "[...document.querySelectorAll('#table tbody tr:not([hidden]) th')].map(e => e.firstChild.textContent)"
        return list(browser.run(script))

    def click(text: str) -> None:
        browser.run(f"[...document.querySelectorAll('th button')].find(e => e.textContent === '{text}').click()")

    assert rows() == ["second", "third", EVIL]
    click("Patches")
    ascending = rows()
    assert ascending[0] == "third"
    click("Patches")
    assert rows() == ascending[::-1]
    click("µm/px")
    assert rows()[-1] == "third"  # what is unknown stays last
    click("µm/px")
    assert rows()[-1] == "third"

    browser.run("document.getElementById('find').focus()")
    browser.call("Input.insertText", text="1 OF")
    assert rows() == ["second"]
    assert browser.run("document.getElementById('shown').textContent") == "1 of 3 shown"
    browser.run("[...document.querySelectorAll('.failures a')].at(-1).click()")
    assert len(rows()) == 3
    assert browser.run("document.querySelector('tr:target th').firstChild.textContent") == "third"
    browser.run("document.querySelector('input[value=quarantined]').click()")
    assert rows() == ["third"]
    browser.run("document.querySelector('input[name=status]').click()")
    click("Slide")

    title = "[document.getElementById('viewer').open, document.getElementById('viewer-title').textContent]"
    browser.run("document.querySelector('.picture button').click()")
    assert browser.run(title) == [True, EVIL]
    browser.press("ArrowRight", 39)
    assert browser.run(title) == [True, "second"]
    assert browser.run("document.querySelector('#viewer img').naturalWidth") == 600
    browser.press("Escape", 27)
    assert browser.run(title)[0] is False
    browser.run("new Promise(done => setTimeout(done, 100))")  # the focus moves in an event that follows
    assert browser.run("document.activeElement.getAttribute('aria-label')") == "Enlarge the picture of second"
    assert not {"Log.entryAdded", "Runtime.exceptionThrown"} & set(browser.events)


def test_a_foreign_script_does_not_run_in_a_browser(
    messy: tuple[Path, dict[str, Any]], browser: Browser, tmp_path: Path
) -> None:
    report.run(messy[0], tmp_path / "page.html")
    source = (tmp_path / "page.html").read_text(encoding="utf-8")
    foreign = "<script>document.title = 'foreign'</script><img src='https://example.org/x' alt=''></body>"
    (tmp_path / "page.html").write_text(source.replace("</body>", foreign), encoding="utf-8")
    browser.open(tmp_path / "page.html")
    assert browser.run("document.title") == "dataset: dataset report"
    assert "Log.entryAdded" in browser.events
