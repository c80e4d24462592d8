"""What earlier versions wrote stays readable, and orders that checkpoints rely on stay as they are.

`golden/dataset-vN` was written by `engine shard` at format version N and is never written again. A change that breaks
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

GOLDEN = Path(__file__).parent / "golden"
# Format version -> patches, and their side in pixels.
VERSIONS = {1: (16, 128), 2: (11, 256)}


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def dataset(version: int) -> Path:
    return GOLDEN / f"dataset-v{version}"


def test_a_dataset_of_every_version_is_readable_and_whole(version: int, dataset: Path) -> None:
    opened = open_dataset(dataset)
    patches, _ = VERSIONS[version]
    assert opened.meta["format_version"] == version
    assert (opened.num_rows, len(opened.shard_names)) == (patches, 2)
    assert verify_dataset(dataset) == {"ok": True, "samples": patches, "bad": []}


def test_version_2_has_both_routes_regions_and_flags() -> None:
    table = pq.read_table(GOLDEN / "dataset-v2" / "index.parquet")
    assert set(table["route"].to_pylist()) == {"copy", "decode"}
    assert set(table["flags"].to_pylist()) == {0, 2, 8, 10}
    regions = table["region"].to_pylist()
    assert sorted(regions.count(region) for region in set(regions)) == [1, 2, 4, 4]


def test_its_rows_are_found_where_format_md_says(version: int, dataset: Path) -> None:
    side = VERSIONS[version][1]
    rows = np.fromfile(dataset / "rows.bin", [("shard", "<u4"), ("offset", "<u8"), ("length", "<u4"), ("crc32", "<u4")])
    index = pq.read_table(dataset / "index.parquet").to_pylist()
    names = open_dataset(dataset).shard_names
    for row, line in zip(rows, index, strict=True):
        assert names[row["shard"]] == line["shard"]
        assert (row["offset"], row["length"], row["crc32"]) == (line["offset"], line["length"], line["crc32"])
        with open(dataset / "shards" / f"{line['shard']}.tar", "rb") as tar:
            tar.seek(int(row["offset"]))
            assert simplejpeg.decode_jpeg(tar.read(int(row["length"]))).shape == (side, side, 3)
        assert line["key"] == f"{line['sample_id']:016x}"


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_every_backend_loads_it(backend: str, dataset: Path) -> None:
    view, rows = CropView(96, output="uint8"), open_dataset(dataset).num_rows
    with open_loader(dataset, batch_size_per_rank=rows, views=[view], backend=backend) as loader:  # type: ignore[arg-type]
        batch = next(loader)
    ids = pq.read_table(dataset / "index.parquet").column("sample_id").to_numpy()
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
