"""The order of patches on disk."""

from __future__ import annotations

import numpy as np

from sharding.permute import order_keys, shard_numbers, splitmix64

IDS = np.arange(1, 20_001, dtype=np.uint64) * np.uint64(0x1234567)


def test_splitmix64_is_the_published_function() -> None:
    # The first outputs of Vigna's splitmix64.c from state 0: the state grows by the constant that we add first.
    gamma = 0x9E3779B97F4A7C15
    states = np.array([0, gamma, 2 * gamma % 2**64], np.uint64)
    assert [int(v) for v in splitmix64(states)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_keys_are_distinct_depend_on_each_id_alone_and_change_with_the_seed() -> None:
    keys = order_keys(IDS, 7)
    assert len(np.unique(keys)) == len(IDS)
    assert np.array_equal(order_keys(IDS[100:200], 7), keys[100:200])
    other = order_keys(IDS, 8)
    assert not (keys == other).any()
    moved = np.argsort(np.argsort(keys)), np.argsort(np.argsort(other))
    assert abs(np.corrcoef(*moved)[0, 1]) < 0.05


def test_the_order_is_unrelated_to_the_place_in_the_slide() -> None:
    ranks = np.argsort(np.argsort(order_keys(IDS, 0)))
    assert abs(np.corrcoef(ranks, np.arange(len(IDS)))[0, 1]) < 0.05


def test_shard_numbers_are_the_scaled_upper_half_of_the_key() -> None:
    keys = np.concatenate([order_keys(IDS, 3), np.array([0, 2**64 - 1, 2**63], np.uint64)])
    for num_shards in (1, 2, 3, 7, 1000, 2**31):
        expected = [(int(key) >> 32) * num_shards >> 32 for key in keys]
        numbers = shard_numbers(keys, num_shards)
        assert numbers.tolist() == expected
        assert numbers.max() < num_shards


def test_shards_fill_evenly_and_in_the_order_of_the_keys() -> None:
    keys = np.sort(order_keys(IDS, 0))
    numbers = shard_numbers(keys, 10)
    assert np.all(np.diff(numbers) >= 0)
    counts = np.bincount(numbers, minlength=10)
    # Binomial with mean 2000: 6 standard deviations are 255.
    assert np.abs(counts - 2000).max() < 255
