"""Steps that change individual logits: logit bias, and the repetition penalties and DRY, which read the history."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from .arguments import checked
from .arguments import history as check_history
from .candidates import Candidates, Floats, Ids, Scratch

_LOG_MAX_FLOAT32 = 88.7228391
_LONGEST_BREAKER_BYTES = 40
_LONGEST_TAIL = 20

BreakerTails = dict[int, list[tuple[int, ...]]]
"""For each token that can begin a sequence breaker, the tails that complete it: the tokens that must follow."""


@checked
def penalties(
    candidates: Candidates,
    history: Sequence[int],
    repeat: float = 1.0,
    frequency: float = 0.0,
    presence: float = 0.0,
    scratch: Scratch | None = None,
) -> Candidates:
    """Penalise the tokens in `history` (Keskar et al. 2019; `llama_sampler_init_penalties`).

    A positive logit is divided by `repeat`, any other is multiplied by it. Then `frequency` is subtracted once per
    occurrence, and `presence` once. Pass only the penalty window as `history`.
    """
    counts = Counter(history.tolist() if isinstance(history, np.ndarray) else history)
    if not counts:
        return candidates
    ids = np.fromiter(counts, np.intp, len(counts))
    times = np.fromiter(counts.values(), np.float32, len(counts))

    def penalised(logits: Floats, times: Floats) -> Floats:
        factor = np.float32(repeat)
        scaled: Floats = np.where(logits <= 0, logits * factor, logits / factor)
        return scaled - (times * np.float32(frequency) + np.float32(presence))

    position, chosen = _positions(candidates, ids)
    logits = writable(candidates, scratch)
    logits[position] = penalised(logits[position], times[chosen])
    return Candidates(logits, candidates.ids)


@checked
def dry(
    candidates: Candidates,
    history: Sequence[int],
    multiplier: float,
    base: float = 1.75,
    allowed_length: int = 2,
    breakers: BreakerTails | None = None,
    scratch: Scratch | None = None,
) -> Candidates:
    """Penalise tokens that would extend a verbatim repetition (DRY; `llama_sampler_init_dry`).

    If the last n tokens of `history`, n >= allowed_length, occurred before, then the token that followed them there
    loses multiplier * base ** (n - allowed_length). A repeat never crosses a sequence breaker.
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
    """Return, for each token that would extend a repeat, the length of the longest repeat that it extends."""
    backwards = np.array(history, np.int64)[::-1]
    size = backwards.size
    if size <= allowed_length:
        return {}
    limit = _distance_to_breaker(backwards.tolist(), breakers) if breakers else size
    if limit < allowed_length:
        return {}
    largest_exponent = _largest_exponent(base)
    if largest_exponent > 0:  # longer repeats get the same penalty
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
    """Return how many tokens follow the last sequence breaker, or the length of the history if there is none."""
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
    """Return the largest exponent for which base ** exponent fits float32, or 0 if there is no limit."""
    base32 = np.float32(base)
    if base32 <= np.float32(1.000001):
        return 0
    return int(np.float32(_LOG_MAX_FLOAT32) / np.log(base32))


class LogitBias(NamedTuple):
    """The bias of each biased token.

    Attributes:
        ids: intp (n,), token ids, each at most once.
        values: float32 (n,), what is added to their logits.
        lowered: the ids, if no logit is raised; else none.
    """

    ids: Ids
    values: Floats
    lowered: frozenset[int]

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, float]]) -> LogitBias:
        """Return the bias from (id, bias) pairs; the biases of a repeated id are summed."""
        total: dict[int, float] = {}
        for token, value in pairs:
            total[token] = total.get(token, 0.0) + value
        ids, values = np.fromiter(total, np.intp, len(total)), np.fromiter(total.values(), np.float32, len(total))
        return cls(ids, values, frozenset(total) if (values <= 0.0).all() else frozenset())

    def check(self, n_vocab: int) -> None:
        """Raise `ValueError` if an id is outside the vocabulary."""
        largest = self.ids.item(self.ids.argmax())
        if largest >= n_vocab:
            raise ValueError(f"logit_bias: token id {largest} is outside a vocabulary of {n_vocab}")

    def add_to(self, logits: Floats) -> None:
        """Add the bias in place."""
        logits[self.ids] += self.values

    def lower(self, candidates: Candidates) -> Candidates:
        """Return candidates with the bias added, by descending logit."""
        position, chosen = _positions(candidates, self.ids)
        if not position.size:
            return candidates.sorted()
        logits = candidates.logits.copy()
        logits[position] += self.values[chosen]
        return Candidates(logits, candidates.ids).sorted()


def writable(candidates: Candidates, scratch: Scratch | None) -> Floats:
    """Return the logits in an array that may be modified: the scratch work array, or a copy without scratch."""
    logits = candidates.logits
    if scratch is None:
        copy: Floats = logits.copy()
        return copy
    work: Floats = scratch.floats("work", logits.size)
    # Adding 0 copies faster than a copy, which numpy does not vectorise in every build.
    if logits is not work:
        np.add(logits, np.float32(0.0), out=work)
    return work


def _positions(candidates: Candidates, ids: Ids) -> tuple[Ids, Ids]:
    """Return the positions of these distinct ids among the candidates, and for each its index in `ids`."""
    if candidates.ids is None:
        inside = np.flatnonzero((ids >= 0) & (ids < candidates.logits.size))
        return (ids, inside) if inside.size == ids.size else (ids[inside], inside)
    order = np.argsort(ids)
    slot = np.minimum(ids[order].searchsorted(candidates.ids), ids.size - 1)
    position = np.flatnonzero(ids[order][slot] == candidates.ids)
    return position, order[slot[position]]


class BreakerTokenizer(Protocol):
    """The tokenizer methods that are needed to resolve strings as sequence breakers."""

    @property
    def n_vocab(self) -> int:
        """The size of the vocabulary."""
        ...

    def piece(self, token: int, special: bool = ...) -> bytes:
        """Return the bytes of a token."""
        ...

    def encode(self, text: str, add_special: bool = ..., parse_special: bool = ...) -> list[int]:
        """Return the tokens of a text."""
        ...


def token_breakers(breakers: Iterable[tuple[int, ...]]) -> BreakerTails:
    """Return the tails of sequence breakers that are given as token ids."""
    tails: BreakerTails = {}
    for head, *tail in breakers:
        known = tails.setdefault(head, [])
        if tuple(tail) not in known:
            known.append(tuple(tail))
    return tails


def string_breakers(tokenizer: BreakerTokenizer, strings: Sequence[str]) -> dict[str, BreakerTails]:
    """Return, for each string, the tokens that contain it, and those that end with its beginning plus their tails.

    This visits every token, which takes about a second for a large vocabulary. As in libllama, only the first 40
    bytes of a string and the first 20 tokens of a tail are used.
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
    """Return the union of several sets of sequence breakers."""
    merged: BreakerTails = {}
    for part in parts:
        for token, tails in part.items():
            known = merged.setdefault(token, [])
            known.extend(tail for tail in dict.fromkeys(tails) if tail not in known)
    return merged


def last(tokens: Sequence[int], count: int) -> Sequence[int]:
    """Return the last `count` tokens of a history, in time independent of its length; all of them for -1."""
    if count == 0:
        return ()
    try:
        size = len(tokens)
        return tokens[size - count :] if 0 < count < size else tokens[:]
    except (TypeError, LookupError):
        check_history("tokens", tokens)
        raise
