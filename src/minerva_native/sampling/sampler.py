"""`Sampler`: from logits and history to a token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from ..errors import SamplingError
from . import filters
from .adaptive import adaptive_p, mirostat, mirostat_mu, mirostat_v2
from .candidates import (
    COLUMNS_FROM,
    Candidates,
    Doubles,
    Floats,
    Ids,
    Scratch,
    check_largest,
    column_shape,
    largest_logit,
    probabilities,
    shares32,
    weigh,
)
from .logprobs import TokenLogprobs, logprob, top_logprobs
from .masks import Mask, apply_mask
from .params import SamplingParams
from .penalties import (
    BreakerTails,
    BreakerTokenizer,
    LogitBias,
    dry,
    last,
    merge_breakers,
    penalties,
    string_breakers,
    token_breakers,
    writable,
)
from .stream import Stream, fresh_seed

Processor = Callable[[Sequence[int], Floats], None]
"""A function that edits logits in place before the chain: `processor(tokens, logits)`."""

_Step = Callable[[Candidates, Sequence[int]], Candidates]

# How each tokenizer can spell each breaker. Cached because it takes a look at the whole vocabulary.
_SPELLED: WeakKeyDictionary[BreakerTokenizer, dict[str, BreakerTails]] = WeakKeyDictionary()

_KEEPS_THE_BEST = frozenset({"top_n_sigma", "top_k", "top_p", "min_p"})


class Sampler:
    """Chooses tokens: logit bias, mask, processors, the chain of `params.order`, then a draw.

    The caller passes the history. A sampler keeps no state but its random stream, Mirostat's mu and adaptive-p's
    average. It works with any vocabulary, for one thread at a time.

    Args:
        params: libllama's defaults if None.
        processors: called in order with `(tokens, logits)` to edit a copy of the logits in place.
        tokenizer: resolves the strings among `params.dry_sequence_breakers`; needed only if DRY is on.

    Raises:
        ValueError: DRY is on with string breakers, but there is no tokenizer.

    >>> import numpy as np
    >>> sampler = Sampler(SamplingParams(top_k=2, seed=1))
    >>> sampler(np.array([1.0, 3.0, 2.0], np.float32)) in (1, 2)
    True
    """

    def __init__(
        self,
        params: SamplingParams | None = None,
        processors: Iterable[Processor] = (),
        *,
        tokenizer: BreakerTokenizer | None = None,
    ) -> None:
        self.params = params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise TypeError(f"params must be SamplingParams, not {type(params).__name__}")
        self.processors = tuple(processors)
        self._scratch = Scratch()
        self._bias = LogitBias.of(params.logit_bias) if params.logit_bias else None  # type: ignore[arg-type]
        self._breakers = _resolve_breakers(params, tokenizer)
        self._steps = self._build_steps()
        self._has_xtc = any(name == "xtc" for name, _ in self._steps)
        self._adapts = params.adaptive_target >= 0.0 and not params.mirostat
        self._is_argmax = [name for name, _ in self._steps] == ["greedy"] and not (params.mirostat or self._adapts)
        self._stream = Stream(fresh_seed() if params.seed is None else params.seed)
        self.reset()

    @property
    def seed(self) -> int:
        """The seed of the random stream, also if it was chosen at random."""
        return self._stream.seed

    def __call__(self, logits: Floats, tokens: Sequence[int] = (), *, mask: Mask | None = None) -> int:
        """Draw a token.

        Args:
            logits: float32 (n_vocab,); not modified.
            tokens: the history; the chain reads only the windows of the penalties and of DRY.
            mask: which tokens may be drawn; see `apply_mask`.

        Raises:
            SamplingError: the logits contain NaN or +inf, or no token can be drawn.
        """
        candidates = self._prepared(logits, tokens, mask)
        if self._is_argmax:
            best = int(candidates.logits.argmax())
            check_largest(float(candidates.logits[best]))
            return best
        xtc = self._has_xtc and self._stream.uniform() <= self.params.xtc_probability
        survivors = self._survivors(candidates, tokens, xtc)
        if self.params.mirostat:
            return self._draw_mirostat(survivors)
        if self._adapts:
            return self._draw_adaptive(survivors)
        index = self._draw(survivors)
        return index if survivors.ids is None else int(survivors.ids[index])

    def distribution(
        self, logits: Floats, tokens: Sequence[int] = (), *, mask: Mask | None = None
    ) -> tuple[Ids, Doubles]:
        """Return the distribution of the next draw, without changing any state.

        XTC applies by chance, so with XTC this is the mixture of both cases.

        Returns:
            ids, intp (n,), and probabilities, float64 (n,), positive and with sum 1; in descending order, ties by id.
        """
        candidates = self._prepared(logits, tokens, mask)
        chance = self.params.xtc_probability if self._has_xtc else 0.0
        # Steps may work in place, so the second case needs its own logits.
        without_xtc = Candidates(candidates.logits.copy()) if 0.0 < chance < 1.0 else candidates
        ids, probs = self._outcome(candidates, tokens, xtc=chance > 0.0)
        if 0.0 < chance < 1.0:
            ids, probs = _mixed((ids, probs), chance, self._outcome(without_xtc, tokens, xtc=False))
        possible = np.flatnonzero(probs > 0.0)
        order = possible[np.lexsort((ids[possible], -probs[possible]))]
        return ids[order], probs[order]

    def logprobs(
        self,
        logits: Floats,
        token: int,
        n: int = 0,
    ) -> TokenLogprobs:
        """Return the log-probabilities of a token and of the n most likely ones under the model, without the chain."""
        logits = _checked(logits)
        ids, values = top_logprobs(logits, n, self._scratch)
        return TokenLogprobs(token, logprob(logits, token, self._scratch), ids, values)

    def sampled_logprobs(
        self, logits: Floats, token: int, n: int = 0, tokens: Sequence[int] = (), *, mask: Mask | None = None
    ) -> TokenLogprobs:
        """Return the same under the distribution that is drawn from, after the chain; call it before the draw."""
        ids, probs = self.distribution(logits, tokens, mask=mask)
        values = np.log(probs)
        place = np.flatnonzero(ids == token)
        return TokenLogprobs(token, float(values[place[0]]) if place.size else -np.inf, ids[:n], values[:n])

    def state_dict(self) -> dict[str, Any]:
        """Return what a sampler with the same parameters needs to continue from here: plain numbers, fit for JSON."""
        return {
            "version": 1,
            "seed": self._stream.seed,
            "drawn": self._stream.drawn,
            "mu": self._mu,
            "weighted_sum": self._weighted_sum,
            "total_weight": self._total_weight,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`; raise `ValueError` for anything else."""
        try:
            version, seed, drawn = (int(state[name]) for name in ("version", "seed", "drawn"))
            values = [float(state[name]) for name in ("mu", "weighted_sum", "total_weight")]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"state is not what state_dict() returns ({error!r})") from None
        if version != 1:
            raise ValueError(f"state has version {version}; only version 1 is known")
        if seed < 0 or drawn < 0 or not np.isfinite(values).all():
            raise ValueError("state: a number is out of range")
        self._stream = Stream(seed, drawn)
        self._mu, self._weighted_sum, self._total_weight = values

    def fork(self, seed: int | None = None) -> Sampler:
        """Return an independent sampler that continues from here: with the same draws, or with another seed's."""
        branch = Sampler.__new__(Sampler)
        branch.__dict__.update(self.__dict__)
        branch._scratch = Scratch()
        branch._steps = branch._build_steps()
        branch._stream = Stream(self._stream.seed, self._stream.drawn)
        if seed is not None:
            branch.params = self.params.replace(seed=seed)
            branch._stream = Stream(seed)
        return branch

    def reset(self) -> None:
        """Go back to the first draw: restart the random stream, Mirostat and adaptive-p."""
        params = self.params
        self._stream = Stream(self._stream.seed)
        self._mu = 2.0 * params.mirostat_tau
        self._total_weight = 1.0 / (1.0 - params.adaptive_decay)
        self._weighted_sum = params.adaptive_target * self._total_weight

    def _prepared(self, logits: Floats, tokens: Sequence[int], mask: Mask | None) -> Candidates:
        """Apply bias, mask and processors, if there are any, to a copy."""
        candidates = Candidates(_checked(logits))
        if self._bias is None and mask is None and not self.processors:
            return candidates
        if mask is not None:
            work = self._scratch.floats("work", logits.size)
            candidates = Candidates(apply_mask(candidates.logits, mask, work))
        work = writable(candidates, self._scratch)
        if self._bias is not None:
            self._bias.add_to(work)
        for processor in self.processors:
            processor(tokens, work)
        return Candidates(work)

    def _survivors(self, candidates: Candidates, tokens: Sequence[int], xtc: bool) -> Candidates:
        for name, step in self._steps:
            if xtc or name != "xtc":
                candidates = step(candidates, tokens)
        return candidates

    def _outcome(self, candidates: Candidates, tokens: Sequence[int], *, xtc: bool) -> tuple[Ids, Doubles]:
        """Return the ids and probabilities if XTC applies, or if it does not."""
        survivors = self._final(self._survivors(candidates, tokens, xtc))
        return survivors.token_ids(), probabilities(survivors)

    def _final(self, candidates: Candidates) -> Candidates:
        """Apply Mirostat or adaptive-p to what the chain has left."""
        if self.params.mirostat == 1:
            return mirostat(candidates, self._mu, candidates.logits.size, self._scratch)
        if self.params.mirostat == 2:
            return mirostat_v2(candidates, self._mu, self._scratch)
        if self._adapts:
            return adaptive_p(candidates, self.params.adaptive_target, self._weighted_sum, self._total_weight)
        return candidates

    def _draw(self, candidates: Candidates) -> int:
        """Return the position of the token that the next uniform number picks."""
        logits = candidates.logits
        if logits.size >= COLUMNS_FROM:
            return self._draw_long(candidates)
        weights = np.exp(np.subtract(logits, largest_logit(candidates), dtype=np.float64))
        return _pick(weights, self._stream.uniform())

    def _draw_long(self, candidates: Candidates) -> int:
        """Pick a column of the matrix view, then an entry in it."""
        logits = candidates.logits
        weights = weigh(logits, largest_logit(candidates), self._scratch)
        rows, columns = column_shape(logits.size)
        running = np.add.accumulate(weights.columns)
        target = self._stream.uniform() * running[-1]
        column = min(int(running.searchsorted(target, side="right")), _last_step(running))
        if column >= columns:
            return rows * columns + column - columns
        before = running[column - 1] if column else 0.0
        inside = weights.values[column : rows * columns : columns].astype(np.float64)
        return column + columns * _pick(inside, (target - before) / max(weights.columns[column], 1e-300))

    def _draw_mirostat(self, candidates: Candidates) -> int:
        survivors = self._final(candidates)
        probs = probabilities(survivors)
        index = _pick(probs, self._stream.uniform())
        self._mu = mirostat_mu(self._mu, float(probs[index]), self.params.mirostat_tau, self.params.mirostat_eta)
        return int(survivors.token_ids()[index])

    def _draw_adaptive(self, candidates: Candidates) -> int:
        index = _pick(probabilities(self._final(candidates)), self._stream.uniform())
        decay = self.params.adaptive_decay
        self._weighted_sum = float(shares32(candidates)[index]) + decay * self._weighted_sum
        self._total_weight = 1.0 + decay * self._total_weight
        return index if candidates.ids is None else int(candidates.ids[index])

    def _build_steps(self) -> tuple[tuple[str, _Step], ...]:
        """Return the steps that are not neutral, in order; greedy decoding skips filters that keep the best token."""
        order = ("temperature",) if self.params.mirostat else tuple(self.params.order)
        steps = [(name, step) for name in order if (step := self._step(name)) is not None]
        names = [name for name, _ in steps]
        if self.params.temperature == 0.0 and "temperature" in names and self.params.dynatemp_range == 0.0:
            changing = [i for i, name in enumerate(names) if name not in _KEEPS_THE_BEST and name != "temperature"]
            first = changing[-1] + 1 if changing else 0
            if set(names[:first]) <= {"penalties", "dry"}:
                steps = [*steps[:first], ("greedy", lambda c, tokens: filters.temperature(c, 0.0))]
        return tuple(steps)

    def _step(self, name: str) -> _Step | None:
        """Return one step of the chain with its parameters, or None if they are neutral."""
        p, scratch, keep = self.params, self._scratch, self.params.min_keep
        if name == "penalties":
            repeat, frequency, presence, n = p.repeat_penalty, p.frequency_penalty, p.presence_penalty, p.repeat_last_n
            if n == 0 or (repeat, frequency, presence) == (1.0, 0.0, 0.0):
                return None
            return lambda c, tokens: penalties(c, last(tokens, n), repeat, frequency, presence, scratch)
        if name == "dry":
            window, breakers = p.dry_penalty_last_n, self._breakers
            if not _dry_is_on(p):
                return None
            return lambda c, tokens: dry(
                c, last(tokens, window), p.dry_multiplier, p.dry_base, p.dry_allowed_length, breakers, scratch
            )
        if name == "top_n_sigma":
            return (lambda c, tokens: filters.top_n_sigma(c, p.top_n_sigma, scratch)) if p.top_n_sigma > 0.0 else None
        if name == "top_k":
            return (lambda c, tokens: filters.top_k(c, p.top_k, scratch)) if p.top_k > 0 else None
        if name == "typical_p":
            return (lambda c, tokens: filters.typical_p(c, p.typical_p, keep, scratch)) if p.typical_p < 1.0 else None
        if name == "top_p":
            return (lambda c, tokens: filters.top_p(c, p.top_p, keep, scratch)) if p.top_p < 1.0 else None
        if name == "min_p":
            return (lambda c, tokens: filters.min_p(c, p.min_p, keep, scratch)) if p.min_p > 0.0 else None
        if name == "xtc":
            if p.xtc_probability <= 0.0 or p.xtc_threshold > 0.5:
                return None
            return lambda c, tokens: filters.xtc(c, p.xtc_threshold, keep, scratch)
        if name == "temperature":
            if p.dynatemp_range > 0.0:
                return lambda c, tokens: filters.dynamic_temperature(
                    c, p.temperature, p.dynatemp_range, p.dynatemp_exponent
                )
            return (lambda c, tokens: filters.temperature(c, p.temperature)) if p.temperature != 1.0 else None
        return None  # adaptive_p: always last, and on if it has a target


def _checked(logits: Floats) -> Floats:
    if not isinstance(logits, np.ndarray):
        raise TypeError(f"logits must be a numpy array, not {type(logits).__name__}")
    if logits.dtype != np.float32:
        raise TypeError(f"logits must be float32, not {logits.dtype}")
    if logits.ndim != 1:
        raise ValueError(f"logits must have one dimension, not {logits.ndim}")
    if not logits.size:
        raise SamplingError("there are no logits, so no token can be drawn")
    return logits if logits.flags.c_contiguous else np.ascontiguousarray(logits)


def _pick(weights: Doubles, uniform: float) -> int:
    """Return the first index at which the running sum exceeds the fraction `uniform` of the total."""
    running = np.add.accumulate(weights)
    index = int(running.searchsorted(uniform * running[-1], side="right"))
    return index if index < running.size else _last_step(running)


def _last_step(running: Doubles) -> int:
    """Return the last index with a weight above 0."""
    return int(running.searchsorted(running[-1]))


def _mixed(first: tuple[Ids, Doubles], chance: float, other: tuple[Ids, Doubles]) -> tuple[Ids, Doubles]:
    """Return the mixture of two distributions: the first with this chance, else the other."""
    union, place = np.unique(np.concatenate((first[0], other[0])), return_inverse=True)
    weights = np.concatenate((first[1] * chance, other[1] * (1.0 - chance)))
    probs: Doubles = np.bincount(place, weights).astype(np.float64)
    return union, probs


def _dry_is_on(params: SamplingParams) -> bool:
    return (
        "dry" in params.order
        and not params.mirostat
        and params.dry_multiplier != 0.0
        and params.dry_base >= 1.0
        and params.dry_penalty_last_n > 0
    )


def _resolve_breakers(params: SamplingParams, tokenizer: BreakerTokenizer | None) -> BreakerTails:
    if not _dry_is_on(params):
        return {}
    strings = [breaker for breaker in params.dry_sequence_breakers if isinstance(breaker, str)]
    tuples = [breaker for breaker in params.dry_sequence_breakers if isinstance(breaker, tuple)]
    if strings and tokenizer is None:
        raise ValueError(
            f"dry_sequence_breakers contains strings ({strings[0]!r}, ...): pass tokenizer= to the Sampler, or use "
            "token ids instead of strings"
        )
    known = _SPELLED.setdefault(tokenizer, {}) if tokenizer is not None else {}
    unknown = [string for string in strings if string not in known]
    if unknown and tokenizer is not None:
        known |= string_breakers(tokenizer, unknown)
    return merge_breakers((*(known[string] for string in strings), token_breakers(tuples)))
