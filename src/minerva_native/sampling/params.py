"""`SamplingParams`: every sampling parameter in one validated, immutable value."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from typing import Any, Protocol

import numpy as np

from .._arguments import integer, many, number, what

DEFAULT_ORDER = (
    "penalties",
    "dry",
    "top_n_sigma",
    "top_k",
    "typical_p",
    "top_p",
    "min_p",
    "xtc",
    "temperature",
)
"""llama.cpp's default chain of steps (`common_params_sampling::samplers`)."""

_STEP_ALIASES = {
    "typ_p": "typical_p",
    "typ": "typical_p",
    "typical": "typical_p",
    "nucleus": "top_p",
    "temp": "temperature",
}

MAX_SEED = 2**64 - 1
"""The largest seed."""


class HasMetadata(Protocol):
    """An object with GGUF metadata, such as a `Model`."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The model's GGUF keys and values."""
        ...


@dataclass(frozen=True)
class SamplingParams:
    """How to sample a token. Names are llama-server's request fields, defaults are llama.cpp's.

    A step with neutral parameters is skipped and costs nothing. A value of the wrong type raises `TypeError`, a value
    out of range raises `ValueError`; both messages name the parameter.

    Attributes:
        temperature: at least 0; divides the logits. 0 is greedy: take the most likely remaining token.
        dynatemp_range: at least 0; half-width of the dynamic temperature range around `temperature`. 0 is off.
        dynatemp_exponent: at least 0; exponent that maps the normalised entropy to that range.
        top_k: any integer; keep the k most likely tokens. 0 or less keeps all.
        top_p: 0 to 1; keep the smallest set of most likely tokens with at least this total probability. 1 is off.
        min_p: 0 to 1; keep tokens at least this fraction as likely as the most likely one. 0 is off.
        typical_p: 0 to 1; keep the most typical tokens until their total probability exceeds this. 1 is off.
        top_n_sigma: any number; keep logits within n standard deviations of the largest. 0 or less is off.
        xtc_probability: 0 to 1; chance that XTC removes every token at or above its threshold but the least likely.
        xtc_threshold: 0 to 1; the probability at which XTC starts to remove tokens. Above 0.5 is off.
        repeat_last_n: at least -1; penalty window of the next three, in tokens. 0 is off, -1 is the whole history.
        repeat_penalty: above 0; divides positive and multiplies negative logits of tokens in the window. 1 is off.
        frequency_penalty: any number; subtracted once per occurrence in the window. 0 is off.
        presence_penalty: any number; subtracted once if the token occurs in the window. 0 is off.
        dry_multiplier: any number; strength of the DRY penalty. 0 is off.
        dry_base: at least 0; base of DRY's exponential. Below 1 is off.
        dry_allowed_length: at least 0; DRY does not penalise repeats shorter than this many tokens.
        dry_penalty_last_n: at least -1; penalty window of DRY, in tokens. 0 is off, -1 is the whole history.
        dry_sequence_breakers: strings (these need a tokenizer), token ids or id sequences that no repeat may cross.
        mirostat: 0 to 2; 1 or 2 replaces the chain with temperature and that version of Mirostat. 0 is off.
        mirostat_tau: at least 0; Mirostat's target surprise, in bits.
        mirostat_eta: at least 0; Mirostat's learning rate.
        adaptive_target: at most 1; adaptive-p favours tokens near this probability. Negative is off.
        adaptive_decay: 0 to 0.99; decay of adaptive-p's moving average.
        min_keep: at least 0; top-p, min-p, typical-p and XTC keep at least this many tokens.
        logit_bias: mapping or (id, bias) pairs; added to the logits before processors and steps. `-inf` bans a token.
            An id may be a string of digits, as in JSON.
        seed: 0 to 2**64 - 1; seed of the random stream. `None` or -1 takes one from the operating system.
        order: names of the steps in the order they run. A step that is not named does not run.
    """

    temperature: float = 0.8
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    top_n_sigma: float = -1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    repeat_last_n: int = 64
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = 64
    dry_sequence_breakers: Sequence[str | int | Sequence[int]] = ("\n", ":", '"', "*")
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    adaptive_target: float = -1.0
    adaptive_decay: float = 0.9
    min_keep: int = 0
    logit_bias: Mapping[int, float] | Mapping[str, float] | Iterable[tuple[int, float]] = ()
    seed: int | None = None
    order: Sequence[str] = DEFAULT_ORDER

    def __post_init__(self) -> None:
        for name, (low, high) in _FLOAT_RANGES.items():
            object.__setattr__(self, name, _finite(name, getattr(self, name), low, high))
        for name, (least, most) in _INT_RANGES.items():
            object.__setattr__(self, name, _integer(name, getattr(self, name), least, most))
        if self.seed is not None and _integer("seed", self.seed, -1, MAX_SEED) == -1:
            object.__setattr__(self, "seed", None)
        elif self.seed is not None:
            object.__setattr__(self, "seed", _integer("seed", self.seed, 0, MAX_SEED))
        if self.repeat_penalty == 0.0 or not math.isfinite(1.0 / self.repeat_penalty):
            raise ValueError(f"repeat_penalty must be greater than 0, not {self.repeat_penalty!r}")
        object.__setattr__(self, "logit_bias", _bias_pairs(self.logit_bias))
        object.__setattr__(self, "dry_sequence_breakers", _breakers(self.dry_sequence_breakers))
        object.__setattr__(self, "order", parse_order(self.order))

    @classmethod
    def greedy(cls) -> SamplingParams:
        """Return parameters that always take the most likely token: temperature 0 and no filters."""
        return cls(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)

    @classmethod
    def from_model(cls, model: HasMetadata, **overrides: Any) -> SamplingParams:
        """Return the parameters that the model's GGUF metadata recommends, with defaults for the rest.

        Reads the same `general.sampling.*` keys as llama.cpp (`common_init_sampler_from_model`). A keyword argument
        overrides the metadata.

        Raises:
            ValueError: a metadata value has the wrong type or is out of range; the message names the key.
        """
        metadata = getattr(model, "metadata", None)
        if not isinstance(metadata, Mapping):
            raise TypeError(f"model must be a Model, or something else with metadata, not {what(model)}")
        values: dict[str, Any] = {}
        for suffix, name in _METADATA_FIELDS.items():
            key = f"general.sampling.{suffix}"
            value = metadata.get(key)
            if value is None or name in overrides:
                continue
            if name == "order":
                value = tuple(step for step in str(value).split(";") if step)
            elif isinstance(value, float):
                value = _shortest_float32(value)
            try:
                values |= {name: getattr(cls(**dict[str, Any]({name: value})), name)}
            except (TypeError, ValueError) as error:
                raise ValueError(f"{key}: {error}") from None
        return cls(**values, **overrides)

    def replace(self, **changes: Any) -> SamplingParams:
        """Return a validated copy with some fields changed."""
        return replace_fields(self, **changes)


_FLOAT_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, math.inf),
    "dynatemp_range": (0.0, math.inf),
    "dynatemp_exponent": (0.0, math.inf),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
    "top_n_sigma": (-math.inf, math.inf),
    "xtc_probability": (0.0, 1.0),
    "xtc_threshold": (0.0, 1.0),
    "repeat_penalty": (0.0, math.inf),
    "frequency_penalty": (-math.inf, math.inf),
    "presence_penalty": (-math.inf, math.inf),
    "dry_multiplier": (-math.inf, math.inf),
    "dry_base": (0.0, math.inf),
    "mirostat_tau": (0.0, math.inf),
    "mirostat_eta": (0.0, math.inf),
    "adaptive_target": (-math.inf, 1.0),
    "adaptive_decay": (0.0, 0.99),
}

_INT32_MAX = 2**31 - 1
_DIGITS = len(str(_INT32_MAX))
_INT_RANGES: dict[str, tuple[int, int]] = {
    "top_k": (-_INT32_MAX, _INT32_MAX),
    "repeat_last_n": (-1, _INT32_MAX),
    "dry_allowed_length": (0, _INT32_MAX),
    "dry_penalty_last_n": (-1, _INT32_MAX),
    "mirostat": (0, 2),
    "min_keep": (0, _INT32_MAX),
}

_METADATA_FIELDS = {
    "sequence": "order",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "xtc_probability": "xtc_probability",
    "xtc_threshold": "xtc_threshold",
    "temp": "temperature",
    "penalty_last_n": "repeat_last_n",
    "penalty_repeat": "repeat_penalty",
    "mirostat": "mirostat",
    "mirostat_tau": "mirostat_tau",
    "mirostat_eta": "mirostat_eta",
}


def parse_order(names: Sequence[str]) -> tuple[str, ...]:
    """Return the canonical step names; llama.cpp's other spellings (`top-p`, `nucleus`, `typ_p`) are accepted."""
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"order must be a sequence of step names, not {type(names).__name__}")
    known = {name.replace("_", ""): name for name in (*DEFAULT_ORDER, "adaptive_p")}
    steps = []
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"order must contain step names, not {type(name).__name__}")
        spelled = name.lower().replace("-", "_")
        spelled = _STEP_ALIASES.get(spelled, spelled)
        step = known.get(spelled.replace("_", ""))
        if step is None:
            raise ValueError(f"order: unknown step {name!r}; the steps are {', '.join(known.values())}")
        if step in steps:
            raise ValueError(f"order: {step} appears twice")
        steps.append(step)
    return tuple(steps)


def _finite(name: str, value: object, low: float, high: float) -> float:
    if isinstance(value, bool):
        raise TypeError(f"{name} must be a number, not a bool")
    result = number(name, value)
    if not math.isfinite(result):
        raise ValueError(f"{name} must be finite, not {result!r}")
    if not low <= result <= high:
        raise ValueError(f"{name} must be {_range_text(low, high)}, not {result!r}")
    return result


def _integer(name: str, value: object, least: int, most: int) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, not a bool")
    result = integer(name, value)
    if not least <= result <= most:
        raise ValueError(f"{name} must be from {least} to {most}, not {result}")
    return result


def _range_text(low: float, high: float) -> str:
    if high == math.inf:
        return f"at least {low:g}"
    if low == -math.inf:
        return f"at most {high:g}"
    return f"from {low:g} to {high:g}"


def _shortest_float32(value: float) -> float:
    """Return the shortest decimal with the same float32: GGUF's 0.949999988079071 is read as 0.95."""
    import struct

    if not abs(value) < 3.4e38:  # also NaN, which is refused later
        return value
    packed = struct.pack("f", value)
    for digits in range(1, 9):
        short = float(f"{value:.{digits}g}")
        if struct.pack("f", short) == packed:
            return short
    return value


def _bias_pairs(bias: object) -> tuple[tuple[int, float], ...]:
    if isinstance(bias, (str, bytes)) or not isinstance(bias, Iterable):
        raise TypeError(f"logit_bias must be a mapping or (id, bias) pairs, not {type(bias).__name__}")
    pairs = []
    for pair in bias.items() if isinstance(bias, Mapping) else many("logit_bias", bias):
        try:
            token, value = pair
        except (TypeError, ValueError):
            raise TypeError(f"logit_bias must contain (id, bias) pairs, not {pair!r}") from None
        if isinstance(token, str) and token.isascii() and token.isdigit() and len(token) <= _DIGITS:
            token = int(token)
        token = _integer("logit_bias: token id", token, 0, _INT32_MAX)
        if value is False or (isinstance(value, float | np.floating) and value == -math.inf):
            pairs.append((token, -math.inf))
        else:
            pairs.append((token, _finite(f"logit_bias[{token}]", value, -math.inf, math.inf)))
    return tuple(pairs)


def _breakers(breakers: object) -> tuple[str | tuple[int, ...], ...]:
    name = "dry_sequence_breakers"
    if isinstance(breakers, (str, bytes)) or not isinstance(breakers, Iterable):
        raise TypeError(f"{name} must be a sequence of strings or token ids, not {type(breakers).__name__}")
    parsed: list[str | tuple[int, ...]] = []
    for breaker in many(name, breakers):
        if isinstance(breaker, str):
            parsed.append(breaker)
        elif isinstance(breaker, Iterable):
            parsed.append(tuple(_integer(name, token, 0, _INT32_MAX) for token in many(name, breaker)))
        else:
            parsed.append((_integer(name, breaker, 0, _INT32_MAX),))
        if not parsed[-1]:
            raise ValueError(f"{name}: a breaker is empty")
    return tuple(parsed)
