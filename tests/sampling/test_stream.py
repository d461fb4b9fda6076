from __future__ import annotations

import numpy as np

from minerva_native.sampling.stream import Stream, fresh_seed


def test_the_stream_is_splitmix64() -> None:
    # The reference implementation's first three outputs for the seed 1234567.
    stream = Stream(1234567)
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [stream.uniform() for _ in expected] == [(value >> 11) * 2.0**-53 for value in expected]


def test_numbers_are_uniform() -> None:
    stream = Stream(1)
    numbers = np.array([stream.uniform() for _ in range(100_000)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.bincount((numbers * 100).astype(int), minlength=100)
    assert ((counts - 1000) ** 2 / 1000).sum() < 160  # chi-squared, 99 degrees of freedom, 1e-4


def test_adjacent_seeds_give_unrelated_numbers() -> None:
    first = np.array([Stream(seed).uniform() for seed in range(20_000)])
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.03
    assert abs(first.mean() - 0.5) < 0.01


def test_a_stream_continues_from_its_two_numbers() -> None:
    stream = Stream(5)
    for _ in range(3):
        stream.uniform()
    assert Stream(stream.seed, stream.drawn).uniform() == stream.uniform()


def test_fresh_seeds_differ() -> None:
    assert fresh_seed() != fresh_seed()
