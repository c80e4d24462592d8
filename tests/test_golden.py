"""What earlier versions wrote stays readable, and orders that checkpoints rely on stay as they are.

`golden/dataset-v1` was written by `engine shard` at format version 1 and is never written again. A change that breaks
one of these tests is a new version of the format or of the order, not a new expectation.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import simplejpeg

from engine.data import CropView, open_loader
from engine.data.draws import DRAWS_VERSION, uniforms
from engine.data.order import ORDER_VERSION, SampleStream
from sharding.index import open_dataset
from sharding.verify import verify_dataset

DATASET = Path(__file__).parent / "golden" / "dataset-v1"


def test_a_version_1_dataset_is_readable_and_whole() -> None:
    dataset = open_dataset(DATASET)
    assert dataset.meta["format_version"] == 1
    assert (dataset.num_rows, len(dataset.shard_names)) == (16, 2)
    assert verify_dataset(DATASET) == {"ok": True, "samples": 16, "bad": []}


def test_its_rows_are_found_where_format_md_says() -> None:
    rows = np.fromfile(DATASET / "rows.bin", [("shard", "<u4"), ("offset", "<u8"), ("length", "<u4"), ("crc32", "<u4")])
    index = pq.read_table(DATASET / "index.parquet").to_pylist()
    names = open_dataset(DATASET).shard_names
    for row, line in zip(rows, index, strict=True):
        assert names[row["shard"]] == line["shard"]
        assert (row["offset"], row["length"], row["crc32"]) == (line["offset"], line["length"], line["crc32"])
        with open(DATASET / "shards" / f"{line['shard']}.tar", "rb") as tar:
            tar.seek(int(row["offset"]))
            assert simplejpeg.decode_jpeg(tar.read(int(row["length"]))).shape == (128, 128, 3)
        assert line["key"] == f"{line['sample_id']:016x}"


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_every_backend_loads_it(backend: str) -> None:
    view = CropView(96, output="uint8")
    with open_loader(DATASET, batch_size_per_rank=16, views=[view], backend=backend) as loader:  # type: ignore[arg-type]
        batch = next(loader)
    ids = pq.read_table(DATASET / "index.parquet").column("sample_id").to_numpy()
    assert sorted(batch.sample_ids) == sorted(ids)


def test_the_order_feistel_1_is_what_it_was() -> None:
    assert ORDER_VERSION == "feistel-1"
    assert SampleStream(4, 0).rows(0, 8).tolist() == [2, 0, 1, 3, 1, 0, 2, 3]
    assert SampleStream(1_000_003, 5).rows(10**12, 6).tolist() == [506121, 105457, 90874, 340552, 261238, 845332]


def test_the_draws_splitmix_1_are_what_they_were() -> None:
    assert DRAWS_VERSION == "splitmix-1"
    assert uniforms(3, np.array([0, 7, 10**12]), 1, 2).tolist() == [
        [0.42285582752914586, 0.9205157562955293],
        [0.11244138029141282, 0.4366673776148017],
        [0.10540963897924682, 0.1237733146146276],
    ]
