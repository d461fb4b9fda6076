"""`Sampler`: draws a token from logits, given the history."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from .._arguments import integer, many, what
from . import filters
from .adaptive import adaptive_p, mirostat, mirostat_mu, mirostat_v2
from .arguments import checked_logits
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
from .params import MAX_SEED, SamplingParams
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
from .rows import COLDEST, Chain, Survivors
from .stream import Stream, fresh_seed

Processor = Callable[[Sequence[int], Floats], None]
"""Called as `processor(tokens, logits)` before the chain to edit the logits in place."""

_Step = Callable[[Candidates, Sequence[int]], Candidates]

# String breakers already resolved, per tokenizer: resolving one scans the whole vocabulary.
_SPELLED: WeakKeyDictionary[BreakerTokenizer, dict[str, BreakerTails]] = WeakKeyDictionary()

_FEW = 64  # biased tokens

_KEEPS_THE_BEST = frozenset({"top_n_sigma", "top_k", "top_p", "min_p"})


class Sampler:
    """Draws tokens: applies the mask, logit bias, processors and the steps in `params.order`, then draws.

    The caller passes the history. The sampler keeps only its random stream, Mirostat's mu and adaptive-p's moving
    average. It works with any vocabulary, but must not be used by two threads at once. A copy, also a pickled one, goes
    on in the same state; to pickle it, its processors have to be functions that can be pickled.

    Args:
        params: the sampling parameters; `None` uses the defaults.
        processors: called in order as `processor(tokens, logits)`, each editing a copy of the logits in place.
        tokenizer: resolves the strings in `params.dry_sequence_breakers`; only needed if DRY is on.

    Attributes:
        chain: its steps, if several samplers that have the same can take them together: see `rows`.

    Raises:
        ValueError: DRY is on with string breakers but no tokenizer is given.

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
            raise TypeError(f"params must be SamplingParams, not {what(params)}")
        self.processors = tuple(many("processors", processors))
        for processor in self.processors:
            if not callable(processor):
                raise TypeError(f"processors must be functions, not {what(processor)}")
        if tokenizer is not None and not all(hasattr(tokenizer, name) for name in ("n_vocab", "piece", "encode")):
            raise TypeError(f"tokenizer must be a Tokenizer or something alike, not {what(tokenizer)}")
        self._scratch = Scratch()
        self._bias = LogitBias.of(params.logit_bias) if params.logit_bias else None  # type: ignore[arg-type]
        self._breakers = _resolve_breakers(params, tokenizer)
        self._build_steps()
        self._has_xtc = any(name == "xtc" for name, _ in self._steps)
        self._adapts = params.adaptive_target >= 0.0 and not params.mirostat
        self._is_argmax = [name for name, _ in self._steps] == ["greedy"] and not (params.mirostat or self._adapts)
        self._stream = Stream(fresh_seed() if params.seed is None else params.seed)
        self.reset()

    @property
    def only_reads(self) -> bool:
        """Whether a call only reads the logits, and runs nobody else's code: there are no processors."""
        return not self.processors and type(self) is Sampler

    @property
    def seed(self) -> int:
        """The seed of the random stream, even if `params.seed` is `None`."""
        return self._stream.seed

    def __call__(self, logits: Floats, tokens: Sequence[int] = (), *, mask: Mask | None = None) -> int:
        """Draw one token.

        Args:
            logits: float32 (n_vocab,); not modified.
            tokens: the history. The chain reads only the penalty windows at its end.
            mask: the tokens that may be drawn, see `apply_mask`.

        Raises:
            SamplingError: the logits contain NaN or +inf, or no token can be drawn.
        """
        candidates = self._prepared(logits, tokens, mask)
        if self._is_argmax:
            best = int(candidates.logits.argmax())
            if best in self._lowered:
                return int(self._survivors(candidates, tokens, False).token_ids()[0])
            check_largest(float(candidates.logits[best]))
            return best
        with_xtc = self._has_xtc and self._stream.uniform() <= self.params.xtc_probability
        survivors = self._survivors(candidates, tokens, with_xtc)
        if self.params.mirostat:
            return self._draw_mirostat(survivors)
        if self._adapts:
            return self._draw_adaptive(survivors)
        index = self._draw(survivors)
        return index if survivors.ids is None else int(survivors.ids[index])

    def draw(self, survivors: Survivors) -> int:
        """Draw one token from what `chain` leaves of the logits, the same as a call with them would draw."""
        place = 0 if self._is_argmax else _place(survivors.running, self._stream.uniform())
        return int(survivors.ids[place])

    def distribution(
        self, logits: Floats, tokens: Sequence[int] = (), *, mask: Mask | None = None
    ) -> tuple[Ids, Doubles]:
        """Return the distribution of the next draw, without changing the sampler's state.

        XTC triggers at random. If it is on, this is the mixture of the distributions with and without it.

        Returns:
            Token ids, intp (n,), and their probabilities, float64 (n,), in descending order with ties in order of id.
            Every probability is above 0, and they sum to 1.
        """
        candidates = self._prepared(logits, tokens, mask)
        chance = self.params.xtc_probability if self._has_xtc else 0.0
        # Steps may work in place, so the case without XTC needs its own copy of the logits.
        spared = Candidates(candidates.logits.copy()) if 0.0 < chance < 1.0 else candidates
        ids, probs = self._distribution(candidates, tokens, chance > 0.0)
        if 0.0 < chance < 1.0:
            ids, probs = _mixture((ids, probs), chance, self._distribution(spared, tokens, False))
        possible = np.flatnonzero(probs > 0.0)
        order = possible[np.lexsort((ids[possible], -probs[possible]))]
        return ids[order], probs[order]

    def logprobs(
        self,
        logits: Floats,
        token: int,
        n: int = 0,
    ) -> TokenLogprobs:
        """Return the log-probabilities of `token` and of the n most likely tokens under the model, before any step."""
        ids, values = top_logprobs(logits, n, self._scratch)
        return TokenLogprobs(token, logprob(logits, token, self._scratch), ids, values)

    def sampled_logprobs(
        self, logits: Floats, token: int, n: int = 0, tokens: Sequence[int] = (), *, mask: Mask | None = None
    ) -> TokenLogprobs:
        """Return the same as `logprobs`, but under `distribution`: the probabilities that a draw uses.

        Call this before the draw: the draw advances the state of Mirostat and adaptive-p.
        """
        token, n = integer("token", token), max(0, integer("n", n))
        ids, probs = self.distribution(logits, tokens, mask=mask)
        values = np.log(probs)
        place = np.flatnonzero(ids == token)
        return TokenLogprobs(token, float(values[place[0]]) if place.size else -np.inf, ids[:n], values[:n])

    def state_dict(self) -> dict[str, Any]:
        """Return the state, as JSON-compatible numbers, from which an equal sampler continues with the same draws."""
        return {
            "version": 1,
            "seed": self._stream.seed,
            "drawn": self._stream.drawn,
            "mu": self._mu,
            "weighted_sum": self._weighted_sum,
            "total_weight": self._total_weight,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned. Raises `TypeError` or `ValueError` if it is not a valid state."""
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a mapping, as state_dict() returns it, not {what(state)}")
        try:
            version, seed, drawn = (int(state[name]) for name in ("version", "seed", "drawn"))
            values = [float(state[name]) for name in ("mu", "weighted_sum", "total_weight")]
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"state is not a result of state_dict(): {error!r}") from None
        if version != 1:
            raise ValueError(f"state: version must be 1, not {version}")
        if not 0 <= seed <= MAX_SEED or not 0 <= drawn <= MAX_SEED or not np.isfinite(values).all():
            raise ValueError("state: a number is out of range")
        self._stream = Stream(seed, drawn)
        self._mu, self._weighted_sum, self._total_weight = values

    def fork(self, seed: int | None = None) -> Sampler:
        """Return an independent sampler in the same state, or with a new random stream if `seed` is given."""
        branch = type(self).__new__(type(self))
        branch.__setstate__(self.__getstate__())
        if seed is not None:
            branch.params = self.params.replace(seed=seed)
            branch._stream = Stream(branch.params.seed or 0)
        return branch

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name not in ("_scratch", "_steps")}
        return {**state, "_stream": (self._stream.seed, self._stream.drawn)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._stream = Stream(*state["_stream"])
        self._scratch = Scratch()
        self._build_steps()

    def reset(self) -> None:
        """Restart from the first draw with the same seed; Mirostat and adaptive-p return to their initial state."""
        params = self.params
        self._stream = Stream(self._stream.seed)
        self._mu = 2.0 * params.mirostat_tau
        self._total_weight = 1.0 / (1.0 - params.adaptive_decay)
        self._weighted_sum = params.adaptive_target * self._total_weight

    def _prepared(self, logits: Floats, tokens: Sequence[int], mask: Mask | None) -> Candidates:
        """Apply the mask, bias and processors, if there are any, to a copy of the logits."""
        candidates = Candidates(checked_logits(logits))
        if self._bias is not None:
            self._bias.check(logits.size)
        is_biased = self._bias is not None and not self._lowered
        if not is_biased and mask is None and not self.processors:
            return candidates
        if mask is not None:
            work = self._scratch.floats("work", logits.size)
            candidates = Candidates(apply_mask(candidates.logits, mask, work))
        work = writable(candidates, self._scratch)
        if is_biased and self._bias is not None:
            self._bias.add_to(work)
        for processor in self.processors:
            processor(tokens, work)
        return Candidates(work)

    def _survivors(self, candidates: Candidates, tokens: Sequence[int], with_xtc: bool) -> Candidates:
        for name, step in self._steps:
            if with_xtc or name != "xtc":
                candidates = step(candidates, tokens)
        return candidates

    def _distribution(self, candidates: Candidates, tokens: Sequence[int], with_xtc: bool) -> tuple[Ids, Doubles]:
        survivors = self._final(self._survivors(candidates, tokens, with_xtc))
        return survivors.token_ids(), probabilities(survivors)

    def _final(self, candidates: Candidates) -> Candidates:
        """Apply Mirostat or adaptive-p, if one is on, to the candidates left by the chain."""
        if self.params.mirostat == 1:
            return mirostat(candidates, self._mu, candidates.logits.size, self._scratch)
        if self.params.mirostat == 2:
            return mirostat_v2(candidates, self._mu, self._scratch)
        if self._adapts:
            return adaptive_p(candidates, self.params.adaptive_target, self._weighted_sum, self._total_weight)
        return candidates

    def _draw(self, candidates: Candidates) -> int:
        """Return the position drawn with the next uniform number."""
        logits = candidates.logits
        if logits.size >= COLUMNS_FROM:
            return self._draw_long(candidates)
        weights = np.exp(np.subtract(logits, largest_logit(candidates), dtype=np.float64))
        return _pick(weights, self._stream.uniform())

    def _draw_long(self, candidates: Candidates) -> int:
        """Draw a column of the matrix view, then an entry in that column."""
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

    def _build_steps(self) -> None:
        """Have the steps that are not neutral, in order.

        Greedy decoding skips the filters that always keep the most likely token.
        """
        order = ("temperature",) if self.params.mirostat else tuple(self.params.order)
        steps = [(name, step) for name in order if (step := self._step(name)) is not None]
        names = [name for name, _ in steps]
        if self.params.temperature == 0.0 and "temperature" in names and self.params.dynatemp_range == 0.0:
            changing = [i for i, name in enumerate(names) if name not in _KEEPS_THE_BEST and name != "temperature"]
            first = changing[-1] + 1 if changing else 0
            if set(names[:first]) <= {"penalties", "dry"}:
                steps = [*steps[:first], ("greedy", lambda c, tokens: filters.temperature(c, 0.0))]
        self._steps: tuple[tuple[str, _Step], ...] = tuple(steps)
        self._defer_bias()
        self.chain = self._as_chain([name for name, _ in steps])

    def _defer_bias(self) -> None:
        """Let a first step that keeps the k largest logits add a bias that only lowers some: n of them.

        What it keeps is among the k + n largest before, so that the bias need not be added to a copy of all logits.
        """
        bias, scratch, self._lowered = self._bias, self._scratch, frozenset[int]()
        name = self._steps[0][0] if self._steps else ""
        k = {"greedy": 1, "top_k": self.params.top_k}.get(name, 0)
        if k and bias is not None and 0 < len(bias.lowered) <= _FEW and not self.processors:
            n, self._lowered = k + len(bias.lowered), bias.lowered
            self._steps = (name, lambda c, tokens: bias.lower(filters.top_k(c, n, scratch)).head(k)), *self._steps[1:]

    def _as_chain(self, names: list[str]) -> Chain | None:
        """Return the steps as a chain for `rows`, if they are one."""
        p, parameters = self.params, dict[str, float]()
        is_biased = self._bias is not None and not self._lowered
        if not self.only_reads or is_biased or p.mirostat or p.adaptive_target >= 0.0:
            return None
        if 0.0 < np.float32(p.top_p) < 1.0:
            parameters["top_p"] = p.top_p
        if np.float32(p.min_p) > 0.0:
            parameters["min_p"] = p.min_p
        if p.temperature >= COLDEST and p.dynatemp_range == 0.0:
            parameters["temperature"] = p.temperature
        if names != ["greedy"] and (names[:1] != ["top_k"] or not parameters.keys() >= set(names[1:])):
            return None
        steps = tuple((name, parameters[name]) for name in names[1:])
        bias = ([], []) if self._bias is None else (self._bias.ids.tolist(), self._bias.values.tolist())
        return Chain(1 if names == ["greedy"] else p.top_k, steps, p.min_keep, *map(tuple, bias))

    def _step(self, name: str) -> _Step | None:
        """Return one step of the chain, or `None` if its parameters are neutral."""
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
        return None  # adaptive_p always runs last and is on if it has a target: see _final


def _pick(weights: Doubles, uniform: float) -> int:
    """Return the first index at which the running sum exceeds `uniform` times the total."""
    return _place(np.add.accumulate(weights), uniform)


def _place(running: Doubles, uniform: float) -> int:
    """Return the first index at which a running sum exceeds `uniform` times the last one."""
    index = int(running.searchsorted(uniform * running[-1], side="right"))
    return index if index < running.size else _last_step(running)


def _last_step(running: Doubles) -> int:
    """Return the last index with a weight above 0."""
    return int(running.searchsorted(running[-1]))


def _mixture(one: tuple[Ids, Doubles], chance: float, other: tuple[Ids, Doubles]) -> tuple[Ids, Doubles]:
    """Return the mixture of two distributions: `one` with probability `chance`, else `other`."""
    union, place = np.unique(np.concatenate((one[0], other[0])), return_inverse=True)
    probs: Doubles = np.bincount(place, np.concatenate((one[1] * chance, other[1] * (1.0 - chance)))).astype(np.float64)
    return union, probs


def _dry_is_on(params: SamplingParams) -> bool:
    return (
        "dry" in params.order
        and not params.mirostat
        and params.dry_multiplier != 0.0
        and params.dry_base >= 1.0
        and params.dry_penalty_last_n != 0
    )


def _resolve_breakers(params: SamplingParams, tokenizer: BreakerTokenizer | None) -> BreakerTails:
    if not _dry_is_on(params):
        return {}
    strings = [breaker for breaker in params.dry_sequence_breakers if isinstance(breaker, str)]
    tuples = [breaker for breaker in params.dry_sequence_breakers if isinstance(breaker, tuple)]
    if strings and tokenizer is None:
        raise ValueError(
            f"dry_sequence_breakers contains strings ({strings[0]!r}, ...): pass tokenizer= to the Sampler, "
            "or use token ids instead of strings"
        )
    known = _SPELLED.setdefault(tokenizer, {}) if tokenizer is not None else {}
    unknown = [string for string in strings if string not in known]
    if unknown and tokenizer is not None:
        known |= string_breakers(tokenizer, unknown)
    return merge_breakers((*(known[string] for string in strings), token_breakers(tuples)))
