from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from minerva_native.errors import SamplingError
from minerva_native.sampling import Sampler, SamplingParams, apply_mask

SIZES = [1, 2, 7, 8, 31, 32, 50, 1000, 128_256]


def packed(allowed: Any, kind: str) -> Any:
    bits = np.packbits(allowed, bitorder="little")
    if kind == "uint8":
        return bits
    words = np.zeros(-(-bits.size // 4) * 4, np.uint8)
    words[: bits.size] = bits
    return words.view("<u4" if kind == "uint32" else "<i4")


@pytest.mark.parametrize("kind", ["bool", "uint8", "uint32", "int32"])
@pytest.mark.parametrize("size", SIZES)
def test_only_allowed_tokens_keep_their_logits(size: int, kind: str) -> None:
    rng = np.random.default_rng(size)
    logits = rng.normal(0, 3, size).astype(np.float32)
    allowed = rng.random(size) < 0.5
    mask = allowed if kind == "bool" else packed(allowed, kind)
    expected = np.where(allowed, logits, np.float32(-np.inf))
    np.testing.assert_array_equal(apply_mask(logits, mask), expected)
    out = np.empty_like(logits)
    assert apply_mask(logits, mask, out) is out
    np.testing.assert_array_equal(out, expected)


def test_logits_may_be_masked_in_place() -> None:
    logits = np.zeros(100, np.float32)
    allowed = np.arange(100) % 3 == 0
    apply_mask(logits, allowed, logits)
    np.testing.assert_array_equal(logits == 0, allowed)


def test_the_output_may_overlap_the_logits() -> None:
    logits = np.arange(64, dtype=np.float32)
    apply_mask(logits[:], np.arange(64) < 32, logits)
    assert logits.tolist() == [*range(32), *[-np.inf] * 32]


def test_a_banned_token_stays_banned() -> None:
    logits = np.array([-np.inf, 0.0], np.float32)
    assert apply_mask(logits, np.array([True, False])).tolist() == [-np.inf, -np.inf]


def test_a_mask_with_too_few_bits_is_refused() -> None:
    logits = np.zeros(100, np.float32)
    for mask in (np.ones(99, np.bool_), np.ones(12, np.uint8), np.ones(3, np.uint32)):
        with pytest.raises(ValueError, match="mask"):
            apply_mask(logits, mask)


@pytest.mark.parametrize("mask", [[True], np.ones(1, np.float32), np.ones(1, np.int64)])
def test_anything_but_a_mask_is_refused(mask: Any) -> None:
    with pytest.raises(TypeError, match="mask"):
        apply_mask(np.zeros(1, np.float32), mask)


@pytest.mark.parametrize("params", [SamplingParams.greedy(), SamplingParams(seed=1)], ids=["greedy", "default"])
def test_a_sampler_draws_only_allowed_tokens_and_leaves_the_logits_alone(params: SamplingParams) -> None:
    logits = np.random.default_rng(0).normal(0, 3, 1000).astype(np.float32)
    before = logits.copy()
    allowed = np.zeros(1000, np.bool_)
    allowed[[3, 5]] = True
    sampler = Sampler(params)
    assert {sampler(logits, mask=allowed) for _ in range(20)} <= {3, 5}
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("params", [SamplingParams.greedy(), SamplingParams(seed=1)], ids=["greedy", "default"])
def test_an_empty_mask_is_an_error(params: SamplingParams) -> None:
    with pytest.raises(SamplingError, match="mask"):
        Sampler(params)(np.zeros(1000, np.float32), mask=np.zeros(1000, np.bool_))


def test_a_processor_may_apply_a_mask() -> None:
    allowed = np.arange(50) == 17

    def mask_them(tokens: Any, logits: Any) -> None:
        apply_mask(logits, allowed, logits)

    sampler = Sampler(SamplingParams(seed=1), [mask_them])
    assert sampler(np.zeros(50, np.float32)) == 17
