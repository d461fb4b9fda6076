from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from minerva_native.sampling import Candidates, Sampler, SamplingParams
from minerva_native.sampling.penalties import dry, merge_breakers, penalties, string_breakers, token_breakers


def penalised(history: list[int], repeat: float = 1.0, frequency: float = 0.0, presence: float = 0.0) -> list[float]:
    logits = np.array([2.0, -2.0, 0.0, 1.0], np.float32)
    return [float(logit) for logit in penalties(Candidates(logits), history, repeat, frequency, presence).logits]


def test_repeat_divides_positive_and_multiplies_negative_logits() -> None:
    assert penalised([0, 1, 1, 2], repeat=2.0) == [1.0, -4.0, 0.0, 1.0]


def test_frequency_counts_and_presence_does_not() -> None:
    assert penalised([0, 0, 3], frequency=0.5) == [1.0, -2.0, 0.0, 0.5]
    assert penalised([0, 0, 3], presence=0.5) == [1.5, -2.0, 0.0, 0.5]


def test_penalties_reach_candidates_that_were_filtered_before() -> None:
    left = Candidates(np.array([3.0, 2.0, 1.0], np.float32), np.array([7, 2, 9]))
    assert penalties(left, [9, 7, 100], presence=1.0).logits.tolist() == [2.0, 2.0, 0.0]


def test_tokens_outside_the_vocabulary_are_ignored() -> None:
    assert penalised([17, -1], presence=1.0) == [2.0, -2.0, 0.0, 1.0]


def dried(
    history: list[int], breakers: Sequence[tuple[int, ...]] = (), allowed: int = 2, base: float = 2.0
) -> list[float]:
    logits = np.zeros(6, np.float32)
    left = dry(Candidates(logits), history, 1.0, base, allowed, token_breakers(breakers)).logits
    return [-float(logit) for logit in left]


def test_dry_penalises_what_would_continue_a_repeat() -> None:
    assert dried([0, 1, 2, 5, 0, 1]) == [0, 0, 1.0, 0, 0, 0]


def test_dry_grows_with_the_repeat() -> None:
    assert dried([0, 1, 2, 3, 5, 0, 1, 2]) == [0, 0, 0, 2.0, 0, 0]


def test_dry_takes_the_longest_repeat_of_a_token() -> None:
    assert dried([4, 1, 3, 5, 0, 4, 1, 3, 5, 2, 0, 4, 1]) == [0, 0, 0, 2.0, 0, 0]


def test_dry_ignores_short_repeats() -> None:
    assert dried([0, 1, 2, 5, 0, 1], allowed=3) == [0] * 6


def test_dry_does_not_look_beyond_a_breaker() -> None:
    assert dried([0, 1, 2, 5, 0, 1], breakers=[(0,)]) == [0] * 6
    assert dried([5, 0, 1, 2, 5, 0, 1], breakers=[(5,)]) == [0, 0, 1.0, 0, 0, 0]


def test_a_breaker_of_several_tokens_must_be_complete() -> None:
    history = [3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert dried(history, breakers=[(3, 4)]) == [0, 0, 1.0, 0, 0, 0]
    assert dried(history, breakers=[(3, 5)]) == [0, 0, 4.0, 0, 0, 0]


def test_the_longest_of_several_breakers_with_the_same_start_counts() -> None:
    assert dried([3, 4, 0, 1, 2, 3, 4, 0, 1], breakers=[(3,), (3, 4)]) == [0, 0, 1.0, 0, 0, 0]


def test_dry_does_not_penalise_a_breaker() -> None:
    assert dried([0, 1, 2, 5, 0, 1], breakers=[(2,)])[2] == 0


def test_dry_of_a_long_monotone_history_is_finite_and_quick() -> None:
    logits = np.zeros(6, np.float32)
    left = dry(Candidates(logits), [1] * 20_000, 1.0, 1.75, 2).logits
    assert np.isfinite(left[[0, 2, 3, 4, 5]]).all()
    assert left[1] == -np.float32(1.75**158)  # the largest power that float32 can hold


class Words:
    """A tokenizer of a few pieces."""

    pieces = (b"a", b"b", b"\n", b"ab\n", b"x\nb", b"\n\n", b"end", b" en", b"d")
    n_vocab = len(pieces)

    def piece(self, token: int, special: bool = False) -> bytes:
        return self.pieces[token]

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        ids, rest = [], text.encode()
        while rest:
            best = max((p for p in self.pieces if rest.startswith(p)), key=len)
            ids.append(self.pieces.index(best))
            rest = rest[len(best) :]
        return ids


def test_a_string_breaks_in_every_token_that_holds_it() -> None:
    assert string_breakers(Words(), ["\n"]) == {"\n": {2: [()], 3: [()], 4: [()], 5: [()]}}


def test_a_string_may_begin_at_the_end_of_a_token() -> None:
    assert string_breakers(Words(), ["end"]) == {"end": {6: [()], 7: [(8,)]}}


def test_breakers_of_both_kinds_are_merged() -> None:
    assert merge_breakers([{1: [()]}, {1: [(), (2,)], 3: [()]}]) == {1: [(), (2,)], 3: [()]}


def test_string_breakers_need_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="dry_sequence_breakers"):
        Sampler(SamplingParams(dry_multiplier=0.8))


def test_a_sampler_resolves_string_breakers_with_its_tokenizer() -> None:
    logits = np.zeros(9, np.float32)
    params = SamplingParams(dry_multiplier=10.0, top_k=0, top_p=1.0, min_p=0.0, temperature=1.0, seed=1)
    sampler = Sampler(params.replace(dry_sequence_breakers=("\n",)), tokenizer=Words())
    free = Sampler(params.replace(dry_sequence_breakers=()))
    repeats = [0, 1, 8, 2, 0, 1]
    assert sampler.distribution(logits, repeats)[0].tolist()[-1] == 8
    broken = [2, 1, 8, 0, 2, 1]
    assert free.distribution(logits, broken)[1].min() < 0.1
    assert sampler.distribution(logits, broken)[1].min() == pytest.approx(1 / 9)
