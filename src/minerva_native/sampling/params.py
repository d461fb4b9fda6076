"""`SamplingParams`: what to do with the logits, as one validated value."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from typing import Any, Protocol, SupportsFloat

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
"""libllama's default chain (`common_params_sampling::samplers`)."""

_STEP_ALIASES = {
    "typ_p": "typical_p",
    "typ": "typical_p",
    "typical": "typical_p",
    "nucleus": "top_p",
    "temp": "temperature",
}

_MAX_SEED = 2**64 - 1


class HasMetadata(Protocol):
    """Anything with a GGUF metadata mapping, such as a `Model`."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Every GGUF key of the model."""
        ...


@dataclass(frozen=True)
class SamplingParams:
    """How to choose a token. Names are llama-server's request fields, defaults are libllama's.

    A step whose parameter is neutral costs nothing. A value of the wrong type raises `TypeError`, a value out of
    range `ValueError`; both name the parameter.

    Attributes:
        temperature: divides the logits; 0 takes the most likely remaining token (greedy).
        dynatemp_range: half-width of the dynamic temperature interval around `temperature`; 0 is off.
        dynatemp_exponent: how the normalised entropy maps to that interval.
        top_k: keep the k most likely tokens; 0 or less keeps all.
        top_p: keep the smallest set of tokens with at least this mass (nucleus); 1 is off.
        min_p: keep tokens at least this fraction as likely as the most likely one; 0 is off.
        typical_p: keep the most locally typical tokens with more than this mass; 1 is off.
        top_n_sigma: keep logits within n standard deviations of the largest; 0 or less is off.
        xtc_probability: chance of removing all tokens above `xtc_threshold` except the least likely of them; 0 is off.
        xtc_threshold: probability from which XTC removes; above 0.5 is off.
        repeat_last_n: how many tokens of the history the three penalties look at; 0 is off.
        repeat_penalty: divides the positive and multiplies the negative logits of tokens in that window; 1 is off.
        frequency_penalty: subtracted from a token's logit for every occurrence in the window; 0 is off.
        presence_penalty: subtracted once if the token occurs in the window; 0 is off.
        dry_multiplier: strength of DRY; 0 is off.
        dry_base: base of DRY's exponential; below 1 is off.
        dry_allowed_length: repetitions shorter than this are not penalised.
        dry_penalty_last_n: how many tokens of the history DRY scans; 0 is off.
        dry_sequence_breakers: what a repetition does not extend across: strings (resolved with the sampler's
            tokenizer), token ids, or sequences of token ids.
        mirostat: 1 or 2 replaces the chain with temperature and that version of Mirostat; 0 is off.
        mirostat_tau: Mirostat's target surprise, in bits.
        mirostat_eta: Mirostat's learning rate.
        adaptive_target: adaptive-p prefers tokens near this probability; negative is off.
        adaptive_decay: decay of adaptive-p's moving average, 0 to 0.99.
        min_keep: top-p, min-p, typical-p and XTC keep at least this many tokens.
        logit_bias: added to the logits of token ids before anything else; `-inf` bans. A mapping, or (id, bias) pairs.
        seed: seed of the random stream, 0 to 2**64 - 1; `None` takes a random one.
        order: names of the steps, in the order in which they run; steps that are not named do not run.
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
    logit_bias: Mapping[int, float] | Iterable[tuple[int, float]] = ()
    seed: int | None = None
    order: Sequence[str] = DEFAULT_ORDER

    def __post_init__(self) -> None:
        for name, (low, high) in _FLOAT_RANGES.items():
            object.__setattr__(self, name, _finite(name, getattr(self, name), low, high))
        for name, (least, most) in _INT_RANGES.items():
            object.__setattr__(self, name, _integer(name, getattr(self, name), least, most))
        if self.seed is not None:
            object.__setattr__(self, "seed", _integer("seed", self.seed, 0, _MAX_SEED))
        if self.repeat_penalty == 0.0 or not math.isfinite(1.0 / self.repeat_penalty):
            raise ValueError(f"repeat_penalty must be greater than 0, not {self.repeat_penalty!r}")
        object.__setattr__(self, "logit_bias", _bias_pairs(self.logit_bias))
        object.__setattr__(self, "dry_sequence_breakers", _breakers(self.dry_sequence_breakers))
        object.__setattr__(self, "order", parse_order(self.order))

    @classmethod
    def greedy(cls) -> SamplingParams:
        """Return parameters that always choose the most likely token: temperature 0 and no filter."""
        return cls(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)

    @classmethod
    def from_model(cls, model: HasMetadata, **overrides: Any) -> SamplingParams:
        """Return what the model's GGUF metadata recommends, and libllama's defaults for the rest.

        Reads the `general.sampling.*` keys that llama.cpp reads (`common_init_sampler_from_model`). A keyword takes
        precedence over the metadata. Metadata of the wrong type or out of range raises `ValueError` with the key.
        """
        metadata = model.metadata
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
        """Return a copy with some fields changed, validated again."""
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
_INT_RANGES: dict[str, tuple[int, int]] = {
    "top_k": (-_INT32_MAX, _INT32_MAX),
    "repeat_last_n": (0, _INT32_MAX),
    "dry_allowed_length": (0, _INT32_MAX),
    "dry_penalty_last_n": (0, _INT32_MAX),
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
    """Return the steps that `names` stand for; llama.cpp's other spellings (`top-p`, `nucleus`, `typ_p`) count too."""
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"order must be a sequence of step names, not {type(names).__name__}")
    known = {name.replace("_", ""): name for name in (*DEFAULT_ORDER, "adaptive_p")}
    steps = []
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"order must hold step names, not {type(name).__name__}")
        spelled = name.lower().replace("-", "_")
        spelled = _STEP_ALIASES.get(spelled, spelled)
        step = known.get(spelled.replace("_", ""))
        if step is None:
            raise ValueError(f"order: there is no step {name!r}; the steps are {', '.join(known.values())}")
        if step in steps:
            raise ValueError(f"order names {step} twice")
        steps.append(step)
    return tuple(steps)


def _finite(name: str, value: object, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, SupportsFloat):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, not {number!r}")
    if abs(number) > 3.4028234663852886e38:
        raise ValueError(f"{name} must fit a 32-bit float, not {number!r}")
    if not low <= number <= high:
        raise ValueError(f"{name} must be {_range_text(low, high)}, not {number!r}")
    return number


def _integer(name: str, value: object, least: int, most: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}")
    number: int = value.__index__()
    if not least <= number <= most:
        raise ValueError(f"{name} must be from {least} to {most}, not {number}")
    return number


def _range_text(low: float, high: float) -> str:
    if high == math.inf:
        return f"at least {low:g}"
    if low == -math.inf:
        return f"at most {high:g}"
    return f"from {low:g} to {high:g}"


def _shortest_float32(value: float) -> float:
    """Return the shortest decimal for a float32 of a GGUF file: 0.95 for 0.949999988079071."""
    import struct

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
    for pair in bias.items() if isinstance(bias, Mapping) else bias:
        try:
            token, value = pair
        except (TypeError, ValueError):
            raise TypeError(f"logit_bias must hold (id, bias) pairs, not {pair!r}") from None
        token = _integer("logit_bias: token id", token, 0, _INT32_MAX)
        if value is False or value == -math.inf:
            pairs.append((token, -math.inf))
        else:
            pairs.append((token, _finite(f"logit_bias[{token}]", value, -math.inf, math.inf)))
    return tuple(pairs)


def _breakers(breakers: object) -> tuple[str | tuple[int, ...], ...]:
    name = "dry_sequence_breakers"
    if isinstance(breakers, (str, bytes)) or not isinstance(breakers, Iterable):
        raise TypeError(f"{name} must be a sequence of strings or token ids, not {type(breakers).__name__}")
    parsed: list[str | tuple[int, ...]] = []
    for breaker in breakers:
        if isinstance(breaker, str):
            parsed.append(breaker)
        elif isinstance(breaker, Iterable):
            parsed.append(tuple(_integer(name, token, 0, _INT32_MAX) for token in breaker))
        else:
            parsed.append((_integer(name, breaker, 0, _INT32_MAX),))
        if not parsed[-1]:
            raise ValueError(f"{name}: a breaker is empty")
    return tuple(parsed)
