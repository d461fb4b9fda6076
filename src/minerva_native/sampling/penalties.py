"""Steps that change logits by the tokens that came before: bias, repetition penalties, DRY."""

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
"""For each token that can start a sequence breaker, the tokens that have to follow it."""


def penalties(
    candidates: Candidates,
    history: Sequence[int],
    repeat: float = 1.0,
    frequency: float = 0.0,
    presence: float = 0.0,
    scratch: Scratch | None = None,
) -> Candidates:
    """Make the tokens of `history` less likely (Keskar et al. 2019; `llama_sampler_init_penalties`).

    A positive logit is divided by `repeat`, a negative one is multiplied by it. Then `frequency` is subtracted once for
    each occurrence, and `presence` once for each token. `history` is only the window to look at.
    """
    counts = Counter(history.tolist() if isinstance(history, np.ndarray) else history)
    if not counts:
        return candidates
    ids = np.fromiter(counts, np.intp, len(counts))
    times = np.fromiter(counts.values(), np.float32, len(counts))

    def penalised(logits: Floats, times: Floats) -> Floats:
        factor = np.float32(repeat)
        scaled = np.where(logits <= 0, logits * factor, logits / factor)
        changed: Floats = scaled - (times * np.float32(frequency) + np.float32(presence))
        return changed

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
    """Make tokens that would extend a verbatim repetition less likely (DRY; `llama_sampler_init_dry`).

    If the last n tokens of `history` occur earlier, the token that followed them there is penalised by
    multiplier * base ** (n - allowed_length). A repetition does not extend across a sequence breaker.
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
    """Return, for each token that would extend a repetition, the length of the longest one that it would extend."""
    backwards = np.array(history, np.int64)[::-1]
    size = backwards.size
    if size <= allowed_length:
        return {}
    limit = _distance_to_breaker(backwards.tolist(), breakers) if breakers else size
    if limit < allowed_length:
        return {}
    largest_exponent = _largest_exponent(base)
    if largest_exponent > 0:  # longer repetitions are not penalised any more
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
    """Return how many tokens follow the last sequence breaker; all of them if there is none."""
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
    """Return the largest exponent for which base ** exponent fits into float32; 0 if all do."""
    base32 = np.float32(base)
    if base32 <= np.float32(1.000001):
        return 0
    return int(np.float32(_LOG_MAX_FLOAT32) / np.log(base32))


class LogitBias(NamedTuple):
    """What is added to the logits of some tokens.

    Attributes:
        ids: intp (n,), distinct token ids.
        values: float32 (n,), what is added to the logit of each.
    """

    ids: Ids
    values: Floats

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, float]]) -> LogitBias:
        """Make one from (id, bias) pairs; several biases of one id add up."""
        total: dict[int, float] = {}
        for token, value in pairs:
            total[token] = total.get(token, 0.0) + value
        return cls(np.fromiter(total, np.intp, len(total)), np.fromiter(total.values(), np.float32, len(total)))

    def add_to(self, logits: Floats) -> None:
        """Add to logits in place; raise `ValueError` for an id outside the vocabulary."""
        if int(self.ids.max()) >= logits.size:
            raise ValueError(f"logit_bias: token id {int(self.ids.max())} is outside a vocabulary of {logits.size}")
        logits[self.ids] += self.values


def writable(candidates: Candidates, scratch: Scratch | None) -> Floats:
    """Return logits that may be changed: a copy in the sampler's work array, or that array itself."""
    logits = candidates.logits
    if scratch is None:
        copy: Floats = logits.copy()
        return copy
    work: Floats = scratch.floats("work", logits.size)
    # Adding 0 copies faster than a copy, which not every build of numpy vectorises.
    if logits is not work:
        np.add(logits, np.float32(0.0), out=work)
    return work


def _positions(candidates: Candidates, ids: Ids) -> tuple[Ids, Ids]:
    """Find distinct ids among the candidates: return their positions there, and their places in `ids`."""
    if candidates.ids is None:
        inside = np.flatnonzero((ids >= 0) & (ids < candidates.logits.size))
        return (ids, inside) if inside.size == ids.size else (ids[inside], inside)
    order = np.argsort(ids)
    slot = np.minimum(ids[order].searchsorted(candidates.ids), ids.size - 1)
    position = np.flatnonzero(ids[order][slot] == candidates.ids)
    return position, order[slot[position]]


class BreakerTokenizer(Protocol):
    """What a tokenizer needs to have for strings to be resolved."""

    @property
    def n_vocab(self) -> int:
        """How many token ids there are."""
        ...

    def piece(self, token: int, special: bool = ...) -> bytes:
        """Return the bytes of a token."""
        ...

    def encode(self, text: str, add_special: bool = ..., parse_special: bool = ...) -> list[int]:
        """Return the tokens of a text."""
        ...


def token_breakers(breakers: Iterable[tuple[int, ...]]) -> BreakerTails:
    """Return the sequence breakers that are given as tokens."""
    tails: BreakerTails = {}
    for head, *tail in breakers:
        known = tails.setdefault(head, [])
        if tuple(tail) not in known:
            known.append(tuple(tail))
    return tails


def string_breakers(tokenizer: BreakerTokenizer, strings: Sequence[str]) -> dict[str, BreakerTails]:
    """Return every way in which tokens can spell each string: inside one token, or from the end of one into the next.

    Looks at every token, which takes a second for a large vocabulary. As in libllama, only the first 40 bytes of a
    string count, and only the first 20 tokens after the one it starts in.
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
    """Return the breakers of several collections as one."""
    merged: BreakerTails = {}
    for part in parts:
        for token, tails in part.items():
            known = merged.setdefault(token, [])
            known.extend(tail for tail in dict.fromkeys(tails) if tail not in known)
    return merged


def last(tokens: Sequence[int], count: int) -> Sequence[int]:
    """Return the last `count` tokens of a history, in time that does not grow with the history."""
    if count <= 0:
        return ()
    size = len(tokens)
    return tokens[size - count :] if size > count else tokens[:]
