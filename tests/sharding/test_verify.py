"""Every changed byte of a dataset is found, and named.

`log.jsonl`, `recipe.yaml` and the pictures in `qc/` are outside of this: they say when, from where and how a dataset
was made, not what it holds.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import simplejpeg

from sharding.index import ROW_DTYPE, read_meta
from sharding.verify import verify_dataset


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, slides: Any, make_dataset: Callable[..., Any]) -> Path:
    """A finished dataset of a few dozen patches. Whoever changes it puts it back."""
    dataset = tmp_path_factory.mktemp("tiny") / "dataset"
    make_dataset(dataset, {"first": slides["single"]})
    return dataset


def reasons(result: dict[str, Any]) -> str:
    return "; ".join(bad["reason"] for bad in result["bad"])


def test_a_whole_dataset_has_no_defect(finished: Path) -> None:
    patches = read_meta(finished)["counts"]["patches"]
    seen: list[int] = []
    result = verify_dataset(finished, on_shard=lambda: seen.append(1))
    assert result == {"ok": True, "samples": patches, "bad": []}
    assert len(seen) == len(read_meta(finished)["shards"])


def flip_is_found(dataset: Path, path: Path, place: int, bit: int) -> tuple[bool, str]:
    """(was it found, what went wrong instead) after one bit was flipped; the file is put back."""
    data = path.read_bytes()
    changed = bytearray(data)
    changed[place] ^= 1 << bit
    path.write_bytes(changed)
    try:
        result = verify_dataset(dataset)
    except UnicodeError as error:
        return False, f"UnicodeError: {error}"
    except ValueError as error:
        return True, str(error)
    except Exception as error:
        return False, f"{type(error).__name__}: {error}"
    finally:
        path.write_bytes(data)
    return not result["ok"], reasons(result)


def test_any_flipped_bit_in_any_file_is_found(tiny: Path) -> None:
    rng = random.Random(0)
    files = [tiny / name for name in every_file(tiny)]
    assert Counter(path.suffix or path.name for path in files) == {
        ".tar": 2,
        ".idx": 2,
        ".parquet": 4,
        ".bin": 1,
        ".json": 1,
    }
    missed = []
    for number in range(200):
        path = files[number % len(files)]
        place, bit = rng.randrange(path.stat().st_size), rng.randrange(8)
        found, why = flip_is_found(tiny, path, place, bit)
        if not found:
            missed.append(f"{path.name} byte {place} of {path.stat().st_size} bit {bit}: {why or 'ok'}")
    assert missed == []
    assert verify_dataset(tiny)["ok"]


def test_a_flipped_bit_of_a_payload_names_shard_and_key(tiny: Path) -> None:
    rng = random.Random(1)
    rows = pq.read_table(tiny / "index.parquet").to_pylist()
    for row in rng.sample(rows, 10):
        tar = tiny / "shards" / f"{row['shard']}.tar"
        data = tar.read_bytes()
        changed = bytearray(data)
        changed[row["offset"] + rng.randrange(row["length"])] ^= 1 << rng.randrange(8)
        tar.write_bytes(changed)
        result = verify_dataset(tiny)
        tar.write_bytes(data)
        assert (row["shard"], row["key"], "the payload's crc32 is wrong") in [
            (bad["shard"], bad["key"], bad["reason"]) for bad in result["bad"]
        ]
        # The other samples are whole and stay unaccused.
        assert {bad["key"] for bad in result["bad"]} <= {row["key"], None}
        assert result["samples"] == len(rows)


@pytest.mark.parametrize("region", ["header", "padding", "end"])
def test_bytes_between_the_payloads_are_checked_too(region: str, dataset: Path) -> None:
    shard = read_meta(dataset)["shards"][0]
    tar = dataset / "shards" / f"{shard['name']}.tar"
    rows = pq.read_table(dataset / "shards" / f"{shard['name']}.parquet").to_pylist()
    row = next(row for row in rows if row["length"] % 512)
    place = {
        "header": row["offset"] - 512 + 300,
        "padding": row["offset"] + row["length"],
        "end": shard["bytes"] - 1,
    }[region]
    data = bytearray(tar.read_bytes())
    data[place] ^= 1
    tar.write_bytes(data)
    result = verify_dataset(dataset)
    assert not result["ok"]
    assert {bad["shard"] for bad in result["bad"]} == {shard["name"]}
    if region == "header":
        assert (row["key"], "the tar header is damaged") in [(bad["key"], bad["reason"]) for bad in result["bad"]]


def every_file(dataset: Path) -> list[str]:
    files = (path.relative_to(dataset) for path in dataset.rglob("*") if path.is_file())
    return sorted(str(path) for path in files if path.parts[0] != "qc")


def test_a_missing_file_is_found_whichever_it_is(tiny: Path, tmp_path: Path) -> None:
    for number, name in enumerate(every_file(tiny)):
        dataset = Path(shutil.copytree(tiny, tmp_path / str(number)))
        (dataset / name).unlink()
        if name == "dataset.json":
            with pytest.raises(ValueError, match=r"holds no dataset\.json"):
                verify_dataset(dataset)
            continue
        result = verify_dataset(dataset)
        assert not result["ok"], name
        stem = Path(name).stem
        assert stem in reasons(result) or stem in {bad["shard"] for bad in result["bad"]}, (name, result)


@pytest.mark.parametrize("left", [0.0, 0.4, 0.999])
def test_a_truncated_file_is_found_whichever_it_is(left: float, tiny: Path, tmp_path: Path) -> None:
    for number, name in enumerate(every_file(tiny)):
        dataset = Path(shutil.copytree(tiny, tmp_path / str(number)))
        path = dataset / name
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * left)])
        result = verify_dataset(dataset)
        assert not result["ok"], name
        assert all(bad["reason"].isprintable() for bad in result["bad"]), (name, result)


def test_bytes_appended_to_a_file_are_found_whichever_it_is(tiny: Path, tmp_path: Path) -> None:
    for number, name in enumerate(every_file(tiny)):
        dataset = Path(shutil.copytree(tiny, tmp_path / str(number)))
        with open(dataset / name, "ab") as file:
            file.write(b"x" * ROW_DTYPE.itemsize)
        assert not verify_dataset(dataset)["ok"], name


@pytest.mark.parametrize("suffixes", [("tar", "idx", "parquet"), ("tar",), ("parquet",)])
def test_a_shard_that_no_one_listed_is_found(suffixes: tuple[str, ...], dataset: Path) -> None:
    name = read_meta(dataset)["shards"][0]["name"]
    for suffix in suffixes:
        shutil.copyfile(dataset / "shards" / f"{name}.{suffix}", dataset / "shards" / f"extra.{suffix}")
    result = verify_dataset(dataset)
    assert ("extra", "the shard is not listed in dataset.json") in [
        (bad["shard"], bad["reason"]) for bad in result["bad"]
    ]


def test_two_shards_that_changed_places_are_found(dataset: Path) -> None:
    one, other = (dataset / "shards" / f"{shard['name']}.tar" for shard in read_meta(dataset)["shards"][:2])
    one.rename(dataset / "x")
    other.rename(one)
    (dataset / "x").rename(other)
    result = verify_dataset(dataset)
    assert {one.stem, other.stem} <= {bad["shard"] for bad in result["bad"]}


def test_an_index_of_another_dataset_is_found(
    dataset: Path, tmp_path: Path, slides: Any, make_dataset: Callable[..., Any]
) -> None:
    make_dataset(tmp_path / "other", {"first": slides["plain"], "second": slides["single"]}, quality=60)
    for name in ("rows.bin", "index.parquet", "slides.parquet"):
        shutil.copyfile(tmp_path / "other" / name, dataset / name)
    text = reasons(verify_dataset(dataset))
    assert "rows.bin does not agree" in text
    assert "index.parquet does not agree" in text


def test_a_payload_that_does_not_decode_is_found_even_if_its_checksums_are_right(
    tmp_path: Path, slides: Any, make_dataset: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sharding import stage

    encode, count = stage.encode_patch, 0

    def sometimes_cut(pixels: Any, quality: int, **options: Any) -> bytes:
        nonlocal count
        count += 1
        data = encode(pixels, quality, **options)
        return data[: len(data) // 2] if count == 3 else data

    monkeypatch.setattr(stage, "encode_patch", sometimes_cut)
    make_dataset(tmp_path / "d", {"first": slides["single"]})
    result = verify_dataset(tmp_path / "d")
    assert len(result["bad"]) == 1
    bad = result["bad"][0]
    assert bad["reason"].startswith("the payload does not decode")
    assert bad["key"]
    row = next(r for r in pq.read_table(tmp_path / "d" / "index.parquet").to_pylist() if r["key"] == bad["key"])
    assert row["shard"] == bad["shard"]
    with pytest.raises(ValueError, match=r".+"):
        simplejpeg.decode_jpeg(
            (tmp_path / "d" / "shards" / f"{row['shard']}.tar").read_bytes()[row["offset"] :][: row["length"]],
            strict=True,
        )
