"""TCGA barcodes in names, and the columns that come of them."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.slide_list import ListedSlide
from engine.tcga import SAMPLE_TYPES, Barcode, barcode_columns, parse_barcode

UUID = "381c8f82-61a0-4e9d-982d-1ad0af7bead9"
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("name", "parts", "label"),
    [
        (f"TCGA-83-5908-01Z-00-DX1.{UUID}.svs", ("83", "5908", "01", "Z", "00", "DX1"), 1),
        (f"TCGA-D8-A27V-11A-02-TS1.{UUID}", ("D8", "A27V", "11", "A", "02", "TS1"), 0),
        ("TCGA-06-0124-06A-01-BSB.svs", ("06", "0124", "06", "A", "01", "BSB"), 1),
        ("tcga-06-0124-20a-01-ms1.SVS", ("06", "0124", "20", "A", "01", "MS1"), None),
        ("TCGA-06-0124-01Z-00-DX12_crop", ("06", "0124", "01", "Z", "00", "DX12"), 1),
        ("TCGA-06-0124-01A", ("06", "0124", "01", "A", None, None), 1),
        ("TCGA-06-0124.svs", ("06", "0124", None, None, None, None), None),
        ("TCGA-06-0124-00A-01-DX1", ("06", "0124", "00", "A", "01", "DX1"), None),
    ],
)
def test_a_barcode_is_taken_apart(name: str, parts: tuple[str | None, ...], label: int | None) -> None:
    barcode = parse_barcode(name)
    assert barcode == Barcode("TCGA", *parts)  # type: ignore[arg-type]
    assert barcode is not None
    assert barcode.patient_id == f"TCGA-{parts[0]}-{parts[1]}"
    assert barcode.label == label


@pytest.mark.parametrize(
    "name",
    [
        "",
        "slide-a-b-05.svs",  # a name whose fourth part looks like a sample type
        "CPTAC-06-0124-01Z-00-DX1",
        "x-TCGA-06-0124-01Z-00-DX1",
        "TCGA-06-012-01Z-00-DX1",
        "TCGA-06-01245-01Z-00-DX1",
        "TCGA-06-0124-foo",
        "TCGA-06-0124-01Z-00-DX1-copy",
        "TCGA_06_0124",
        "TCGA-06-0124-\u0660\u0661A-01-TS1",  # digits, but not ours
    ],
)
def test_what_is_no_barcode_is_none(name: str) -> None:
    assert parse_barcode(name) is None


@given(code=st.integers(0, 99), suffix=st.sampled_from(["", ".svs", f".{UUID}.svs", " copy.svs"]))
def test_labels_follow_the_sample_type_code(code: int, suffix: str) -> None:
    barcode = parse_barcode(f"TCGA-AB-CD12-{code:02d}A-01-TS1{suffix}")
    assert barcode is not None
    assert barcode.label == (1 if code in range(1, 10) else 0 if code in range(10, 20) else None)
    assert barcode.sample_type == SAMPLE_TYPES.get(f"{code:02d}")


@given(st.text())
def test_any_name_is_parsed_or_refused_quietly(name: str) -> None:
    barcode = parse_barcode(name)
    assert barcode is None or name.upper().startswith(barcode.patient_id)


def _slide(slide_id: str, path: str = "x.svs", **columns: object) -> ListedSlide:
    return ListedSlide(slide_id, Path(path), 0.25, columns)


def test_columns_are_added_and_slides_without_a_barcode_are_told() -> None:
    slides = [
        _slide(f"TCGA-83-5908-01Z-00-DX1.{UUID}", age=61),
        _slide("case 7", f"TCGA-83-5908-11A-01-TS1.{UUID}.svs", age=61),
        _slide("case 8", "other.svs", age=None),
    ]
    named, unnamed = barcode_columns(slides)
    assert unnamed == ["case 8"]
    assert [slide.columns for slide in named] == [
        {"age": 61, "patient_id": "TCGA-83-5908", "site": "83", "sample_type": "Primary Solid Tumor", "label": 1},
        {"age": 61, "patient_id": "TCGA-83-5908", "site": "83", "sample_type": "Solid Tissue Normal", "label": 0},
        {"age": None, "patient_id": None, "site": None, "sample_type": None, "label": None},
    ]
    assert [(slide.slide_id, slide.path, slide.mpp) for slide in named] == [
        (slide.slide_id, slide.path, slide.mpp) for slide in slides
    ]
    assert slides[0].columns == {"age": 61}


def test_a_column_of_the_list_stays_as_it_is_for_every_slide() -> None:
    slides = [_slide("TCGA-83-5908-01Z-00-DX1", label="luad"), _slide("TCGA-83-5909-01Z-00-DX1")]
    named, _ = barcode_columns(slides)
    assert [slide.columns.get("label") for slide in named] == ["luad", None]
    assert [slide.columns["patient_id"] for slide in named] == ["TCGA-83-5908", "TCGA-83-5909"]


def test_real_slide_names_give_their_patients() -> None:
    path = REPOSITORY.parent / "shared" / "data" / "labels" / "slideflow_lung_labels.csv"
    if not path.is_file():
        pytest.skip(f"no real labels here: {path} is absent")
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 500
    for row in rows:
        barcode = parse_barcode(row["slide"])
        assert barcode is not None, row["slide"]
        assert (barcode.patient_id, barcode.label) == (row["patient"], 1)
