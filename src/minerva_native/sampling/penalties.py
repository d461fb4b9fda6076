"""Steps that change logits by what was said before: bias, repetition penalties, DRY."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from .candidates import Candidates, Floats, Ids, Scratch

_LOG_MAX_FLOAT32 = 88.7228391
_LONGEST_BREAKER_BYTES = 40
_LONGEST_TAIL = 20

BreakerTails = dict[int, list[tuple[int, ...]]]
"""For each token that can begin a sequence breaker, the tokens that must follow."""


def penalties(
    candidates: Candidates,
    history: Sequence[int],
    repeat: float = 1.0,
    frequency: float = 0.0,
    presence: float = 0.0,
    scratch: Scratch | None = None,
) -> Candidates:
    """Makes the tokens of `history` less likely (Keskar et al. 2019; `llama_sampler_init_penalties`).

    A positive logit is divided by `repeat` and a negative one multiplied; then the number of occurrences times
    `frequency` is subtracted, and `presence` once. `history` is the window to look at, not the whole of it.
    """
    counts = Counter(history.tolist() if isinstance(history, np.ndarray) else history)
    if not counts:
        return candidates
    ids = np.fromiter(counts, np.intp, len(counts))
    times = np.fromiter(counts.values(), np.float32, len(counts))

    def penalised(logits: Floats, times: Floats) -> Floats:
        factor = np.float32(repeat)
        scaled = np.where(logits <= 0, logits * factor, logits / factor)
        return scaled - (times * np.float32(frequency) + np.float32(presence))

    position, chosen = _positions(candidates, ids)
    logits = writable(candidates, scratch)
    logits[position] = penalised(logits[position], times[chosen])
    return Candidates(logits, candidates.ids)


def dry(
    candidates: Candidates,
    history: Sequence[int],
    multiplier: float,
    base: float = 1.75,
    allowed_length: int = 2,
    breakers: BreakerTails | None = None,
    scratch: Scratch | None = None,
) -> Candidates:
    """Makes tokens that would prolong a verbatim repetition less likely (DRY; `llama_sampler_init_dry`).

    A token that would continue a repeat of length n of the last tokens of `history` loses
    multiplier * base ** (n - allowed_length). A repeat does not reach over a sequence breaker.
    """
    breakers = breakers or {}
    repeats = _repeat_lengths(history, allowed_length, base, breakers)
    if not repeats:
        return candidates
    largest_exponent = _largest_exponent(base)
    ids = np.fromiter(repeats, np.intp, len(repeats))
    exponents = [length - allowed_length for length in repeats.values()]
    if largest_exponent > 0:
        exponents = [min(exponent, largest_exponent) for exponent in exponents]
    base32, multiplier32 = float(np.float32(base)), float(np.float32(multiplier))
    with np.errstate(over="ignore"):
        penalty = np.array([multiplier32 * base32**exponent for exponent in exponents]).astype(np.float32)
    position, chosen = _positions(candidates, ids)
    logits = writable(candidates, scratch)
    logits[position] -= penalty[chosen]
    return Candidates(logits, candidates.ids)


def _repeat_lengths(history: Sequence[int], allowed_length: int, base: float, breakers: BreakerTails) -> dict[int, int]:
    """For each token that would continue a repeat: the longest repeat that it would continue."""
    backwards = np.array(history, np.int64)[::-1]
    size = backwards.size
    if size <= allowed_length:
        return {}
    limit = _distance_to_breaker(backwards.tolist(), breakers) if breakers else size
    if limit < allowed_length:
        return {}
    largest_exponent = _largest_exponent(base)
    if largest_exponent > 0:  # longer repeats are not penalised more
        limit = min(limit, allowed_length + largest_exponent)
    lengths = np.zeros(size, np.int64)
    starts = np.arange(1, size)
    length = 0
    while length < limit:
        starts = starts[: int(starts.searchsorted(size - length))]
        starts = starts[backwards[starts + length] == backwards[length]]
        if not starts.size:
            break
        length += 1
        lengths[starts] = length
    repeats: dict[int, int] = {}
    for start in (np.flatnonzero(lengths[1:] >= allowed_length) + 1).tolist():
        token = int(backwards[start - 1])
        if () not in breakers.get(token, ()):
            repeats[token] = max(repeats.get(token, 0), int(lengths[start]))
    return repeats


def _distance_to_breaker(backwards: list[int], breakers: BreakerTails) -> int:
    """How many tokens follow the last sequence breaker; all of them when there is none."""
    for place, token in enumerate(backwards):
        tails = breakers.get(token)
        if not tails:
            continue
        matched = [
            len(tail)
            for tail in tails
            if len(tail) <= place and all(backwards[place - 1 - i] == part for i, part in enumerate(tail))
        ]
        if matched:
            return place - max(matched)
    return len(backwards)


def _largest_exponent(base: float) -> int:
    """Above this, base ** exponent leaves float32; 0 when it never does."""
    base32 = np.float32(base)
    if base32 <= np.float32(1.000001):
        return 0
    return int(np.float32(_LOG_MAX_FLOAT32) / np.log(base32))


class LogitBias(NamedTuple):
    """Token ids and what is added to their logits, one entry an id."""

    ids: Ids
    values: Floats

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, float]]) -> LogitBias:
        """From (id, bias) pairs; the biases of an id that is there twice add up."""
        total: dict[int, float] = {}
        for token, value in pairs:
            total[token] = total.get(token, 0.0) + value
        return cls(np.fromiter(total, np.intp, len(total)), np.fromiter(total.values(), np.float32, len(total)))

    def add_to(self, logits: Floats) -> None:
        """Adds in place; `ValueError` for an id outside the vocabulary."""
        if int(self.ids.max()) >= logits.size:
            raise ValueError(f"logit_bias: token id {int(self.ids.max())} is outside a vocabulary of {logits.size}")
        logits[self.ids] += self.values


def writable(candidates: Candidates, scratch: Scratch | None) -> Floats:
    """Logits that may be changed: a copy in the sampler's work array, or that array itself."""
    logits = candidates.logits
    if scratch is None:
        copy: Floats = logits.copy()
        return copy
    work: Floats = scratch.floats("work", logits.size)
    # An addition is a faster copy than a copy: numpy's is not vectorised for every build.
    if logits is not work:
        np.add(logits, np.float32(0.0), out=work)
    return work


def _positions(candidates: Candidates, ids: Ids) -> tuple[Ids, Ids]:
    """Where these distinct tokens are among the candidates, and which of `ids` that are."""
    if candidates.ids is None:
        inside = np.flatnonzero((ids >= 0) & (ids < candidates.logits.size))
        return (ids, inside) if inside.size == ids.size else (ids[inside], inside)
    order = np.argsort(ids)
    slot = np.minimum(ids[order].searchsorted(candidates.ids), ids.size - 1)
    position = np.flatnonzero(ids[order][slot] == candidates.ids)
    return position, order[slot[position]]


class BreakerTokenizer(Protocol):
    """What resolving strings needs of a tokenizer."""

    @property
    def n_vocab(self) -> int:
        """How many tokens there are."""
        ...

    def piece(self, token: int, special: bool = ...) -> bytes:
        """The bytes of these tokens."""
        ...

    def encode(self, text: str, add_special: bool = ..., parse_special: bool = ...) -> list[int]:
        """The tokens of a text."""
        ...


def token_breakers(breakers: Iterable[tuple[int, ...]]) -> BreakerTails:
    """Sequence breakers that are given as tokens."""
    tails: BreakerTails = {}
    for head, *tail in breakers:
        known = tails.setdefault(head, [])
        if tuple(tail) not in known:
            known.append(tuple(tail))
    return tails


def string_breakers(tokenizer: BreakerTokenizer, strings: Sequence[str]) -> dict[str, BreakerTails]:
    """Every way in which the tokens of a vocabulary can spell each string: whole inside one, or begun at its end.

    Looks at each token of the vocabulary, which takes a second for a large one. A string counts up to its 40th byte,
    a tail up to its 20th token, as in libllama.
    """
    pieces = [tokenizer.piece(token, special=True) for token in range(tokenizer.n_vocab)]
    return {string: _spellings(tokenizer, pieces, string) for string in strings}


def _spellings(tokenizer: BreakerTokenizer, pieces: list[bytes], string: str) -> BreakerTails:
    target = string.encode()[:_LONGEST_BREAKER_BYTES]
    spellings: BreakerTails = {token: [()] for token, piece in enumerate(pieces) if target in piece}
    for length in range(1, len(target)):
        heads = [token for token, piece in enumerate(pieces) if piece.endswith(target[:length]) and target not in piece]
        if heads:
            rest = tokenizer.encode(target[length:].decode(errors="ignore"), add_special=False)
            for head in heads:
                spellings.setdefault(head, []).append(tuple(rest[:_LONGEST_TAIL]))
    return spellings


def merge_breakers(parts: Iterable[BreakerTails]) -> BreakerTails:
    """All the breakers of several collections."""
    merged: BreakerTails = {}
    for part in parts:
        for token, tails in part.items():
            known = merged.setdefault(token, [])
            known.extend(tail for tail in dict.fromkeys(tails) if tail not in known)
    return merged


def last(tokens: Sequence[int], count: int) -> Sequence[int]:
    """The last `count` tokens of a history, in time that does not grow with the history."""
    if count <= 0:
        return ()
    size = len(tokens)
    return tokens[size - count :] if size > count else tokens[:]
