"""What store.json says of the slides, and the rows of all of them as one table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from engine.stores.layout import ROWS_FILE, SLIDES, folder_name, read_file, read_record, slide_folders
from sharding.atomic import atomic_path

_ROW_GROUP = 1 << 17


def survey(store: Path) -> tuple[list[dict[str, Any]], pa.Schema]:
    """({slide_id, rows, sha256 of slide.json} of each whole slide by slide_id, the columns of all their rows).

    A column that is null in one slide has the type it has in another. Raises ValueError where types do not fit
    together, StoreDamagedError where a slide's folder is not what was written.
    """
    slides = []
    schemas: dict[pa.Schema, str] = {}
    for folder in slide_folders(store):
        record, sha256 = read_record(folder)
        slides.append({"slide_id": record["slide_id"], "rows": record["rows"], "sha256": sha256})
        schemas.setdefault(_read_rows(folder, record).schema, record["slide_id"])
    schema = pa.schema([("slide_id", pa.string())])
    for other, slide_id in schemas.items():
        try:
            schema = pa.unify_schemas([schema, other], promote_options="permissive")
        except pa.ArrowException as error:
            raise ValueError(f"{store}: the rows of slide {slide_id} do not fit to the others': {error}") from None
    return sorted(slides, key=lambda slide: slide["slide_id"]), schema


def merge_rows(store: Path, slide_ids: list[str], schema: pa.Schema) -> None:
    """Write rows.parquet, slide after slide; a hundred thousand rows are in memory at a time."""
    with (
        atomic_path(store / ROWS_FILE) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd", compression_level=3) as writer,
    ):
        waiting, num_rows = [schema.empty_table()], 0
        for slide_id in slide_ids:
            folder = store / SLIDES / folder_name(slide_id)
            waiting.append(_read_rows(folder, read_record(folder)[0]))
            num_rows += waiting[-1].num_rows
            if num_rows >= _ROW_GROUP:
                writer.write_table(pa.concat_tables(waiting, promote_options="permissive"))
                waiting, num_rows = [schema.empty_table()], 0
        writer.write_table(pa.concat_tables(waiting, promote_options="permissive"))


def _read_rows(folder: Path, record: dict[str, Any]) -> pa.Table:
    return pq.read_table(pa.BufferReader(read_file(folder, ROWS_FILE, record["files"][ROWS_FILE]["sha256"])))
