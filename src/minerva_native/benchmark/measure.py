"""Measuring: what one repetition of a test does, and what part of it is timed.

A test is the same as llama-bench's: n_prompt random tokens evaluated as a prompt, then n_gen one at a time, both after
n_depth tokens that are evaluated before the clock starts. It involves no text and no sampler. Besides, the real decode
loop, `generate`, is run on the same sequence, and the time of a token is split into its parts: `llama_decode`, reading
the logits, the sampler, the text, and the loop around them.
"""

import gc
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

import minerva_native as mn

FIRST_TOKENS = 4  # of each repetition, reported separately: caches and branch predictors are still cold

_ENCODED_TOKENS = 32  # the input of an encoder-decoder model

_clock = time.perf_counter_ns


class Test(NamedTuple):
    """What is evaluated, and with which settings. The defaults are llama-bench's, except for the threads.

    Attributes:
        n_prompt: tokens of the prompt.
        n_gen: tokens generated after the prompt.
        n_depth: tokens in the KV cache before either.
        n_batch: tokens evaluated in one call.
        n_ubatch: tokens evaluated in one pass through the model.
        n_threads: CPU threads.
        type_k: the element type of cached keys.
        type_v: the element type of cached values.
        flash_attention: "auto", "on" or "off".
    """

    n_prompt: int = 0
    n_gen: int = 0
    n_depth: int = 0
    n_batch: int = 2048
    n_ubatch: int = 512
    n_threads: int = mn.available_cpus()
    type_k: str = "f16"
    type_v: str = "f16"
    flash_attention: str = "auto"

    @property
    def n_tokens(self) -> int:
        """How many tokens are evaluated and timed."""
        return self.n_prompt + self.n_gen

    @property
    def name(self) -> str:
        """llama-bench's name, such as "pp512", "tg128 @ d4096", "pp512+tg128"."""
        parts = [f"pp{self.n_prompt}"] if self.n_prompt else []
        parts += [f"tg{self.n_gen}"] if self.n_gen else []
        return "+".join(parts) + (f" @ d{self.n_depth}" if self.n_depth else "")


class Repetition(NamedTuple):
    """The times of one repetition, in nanoseconds.

    Attributes:
        ns: prompt and generation together.
        token_ns: each generated token, shape (n_gen,).
        first_token_ns: the prompt, reading its logits, and sampling a token from them; None without a prompt.
    """

    ns: int
    token_ns: npt.NDArray[np.int64]
    first_token_ns: int | None


class Parts(NamedTuple):
    """Where the time of a generated token goes, in nanoseconds; means over a run of the decode loop.

    The first four are timed directly. `loop` is the rest of the time of the steps. The sum of the five is less than
    `whole` by the cost of the measurement.

    Attributes:
        decode: `llama_decode`, until the computation is finished.
        logits: copying the logits into an array.
        sampler: choosing the token.
        text: detokenising.
        loop: bookkeeping and the loop itself.
        whole: the whole run, by one clock around it.
    """

    decode: float
    logits: float
    sampler: float
    text: float
    loop: float
    whole: float

    @property
    def total(self) -> float:
        """The sum of the parts."""
        return self.decode + self.logits + self.sampler + self.text + self.loop


def context_options(test: Test) -> mn.ContextOptions:
    """Return the options of a test's context."""
    return mn.ContextOptions(
        n_ctx=max(2, test.n_depth + test.n_prompt + test.n_gen),  # as llama-bench: it is part of the test
        n_batch=test.n_batch,
        n_ubatch=test.n_ubatch,
        n_threads=test.n_threads,
        kv_type=(test.type_k, test.type_v),
        flash_attention=test.flash_attention,  # type: ignore[arg-type]  # it is checked there
        swa_full=False,
        prefix_cache=False,
        checkpoint_bytes=0,  # copying states would be timed
    )


class Run:
    """A test with its own context. A context manager.

    Attributes:
        test: the test.
        context: the context it runs on.
        sequence: the sequence it runs on; None before the first repetition or warm-up.
    """

    def __init__(self, model: mn.Model, test: Test, params: mn.SamplingParams):
        self.test = test
        self.context = mn.Context(model, context_options(test))
        self.params = params
        self._sampler = mn.Sampler(params)
        self._folder = tempfile.TemporaryDirectory(prefix="minerva-bench-")
        self.sequence: mn.Sequence | None = None
        self._has_depth = False
        n_vocab, bos = model.tokenizer.n_vocab, model.tokenizer.bos
        draw = random.Random(1)
        self._prompt = [draw.randrange(n_vocab) for _ in range(test.n_prompt)]
        self._tokens = [[draw.randrange(n_vocab)] for _ in range(test.n_gen)]
        self._before = [draw.randrange(n_vocab) for _ in range(test.n_depth)]
        if model.tokenizer.adds_bos and bos is not None:  # the model expects it at the beginning of a text
            first = self._before or self._prompt or self._tokens[0]
            first[0] = bos
        if model.has_encoder:
            self.context.encode([draw.randrange(n_vocab) for _ in range(min(_ENCODED_TOKENS, self.context.n_ubatch))])

    def warm_up(self) -> None:
        """Evaluate the prompt and one token, so that memory is mapped and threads are running."""
        sequence = self._start()
        if self._prompt:
            sequence.extend(self._prompt)
        if self._tokens:
            sequence.extend(self._tokens[0])

    def settle(self) -> None:
        """Generate a few tokens, to refill the CPU's caches after other work."""
        if self._tokens:
            sequence = self._start()
            for token in self._tokens[:FIRST_TOKENS]:
                sequence.extend(token)

    def repeat(self) -> Repetition:
        """Run the test once, with Python's garbage collector off."""
        sequence, prompt_ns, first_token_ns = self._start(), 0, None
        with _no_collection():
            if self._prompt:
                start = _clock()
                sequence.extend(self._prompt)
                prompt_ns = _clock() - start
                self._sampler(sequence.logits, sequence.tokens)
                first_token_ns = _clock() - start
            extend, stamps = sequence.extend, [0] * (len(self._tokens) + 1)
            stamps[0] = _clock()
            for number, token in enumerate(self._tokens, 1):
                extend(token)
                stamps[number] = _clock()
        times = np.array(stamps, np.int64)
        token_ns = times[1:] - times[:-1]
        return Repetition(prompt_ns + int(token_ns.sum()), token_ns, first_token_ns)

    def take_apart(self) -> Parts | None:
        """Generate the same number of tokens with the decode loop and time its parts; None if there are too few tokens.

        The sequence is first truncated to where `repeat` began to generate, or to one token.
        """
        start = self.test.n_depth + max(1, self.test.n_prompt)
        n_steps = self.context.n_ctx - start - 1
        if n_steps < 1 or not self._tokens:
            return None
        sequence = self.sequence
        if sequence is None or len(sequence) < start or not self.context.memory.can_truncate:
            sequence = self._start()
            sequence.extend(self._prompt or self._tokens[0])
        sequence.truncate(start)
        _ = sequence.logits
        stats, timed = self.context.stats, _TimedLoop(sequence, self.params)
        with _no_collection():
            timed.next()  # the first token's logits are already known
            decode, logits = stats.decode_seconds, stats.logits_seconds
            timed.clear()
            before = _clock()
            for _ in range(n_steps):
                timed.next()
            whole = _clock() - before
        decode_ns = 1e9 * (stats.decode_seconds - decode)
        logits_ns = 1e9 * (stats.logits_seconds - logits)
        loop_ns = timed.ns - decode_ns - logits_ns - timed.sampler_ns - timed.text_ns
        times = (decode_ns, logits_ns, timed.sampler_ns, timed.text_ns, loop_ns, whole)
        return Parts(*(nanoseconds / n_steps for nanoseconds in times))

    def kv_bytes(self) -> float:
        """Return how many bytes the keys, values and states of the sequence take half-way through the generation.

        If the memory cannot be truncated, return their size at the end.
        """
        if self.sequence is None or not len(self.sequence):
            return 0.0
        half_way = self.test.n_depth + self.test.n_prompt + self.test.n_gen / 2
        if not self.context.memory.can_truncate:  # it is not known how much of it grows with the text
            return float(self.sequence.size_bytes)
        return self.sequence.size_bytes * half_way / len(self.sequence)

    def close(self) -> None:
        """Free the context and delete saved states."""
        self.context.close()
        self._folder.cleanup()

    def _start(self) -> mn.Sequence:
        """Return the sequence with the tokens of the depth evaluated, and no others."""
        if self.sequence is not None and self.context.memory.can_truncate:
            self.sequence.truncate(self.test.n_depth)
            return self.sequence
        if self.sequence is not None:
            self.sequence.close()
        saved = Path(self._folder.name) / "depth"
        if self._has_depth:
            self.sequence = self.context.restore(saved)
            return self.sequence
        self.sequence = self.context.sequence()
        if self._before:
            self.sequence.extend(self._before)
            if not self.context.memory.can_truncate:
                self.sequence.save(saved)
                self._has_depth = True
        return self.sequence

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class _TimedLoop:
    """`generate`, timed, and its sampler and decoder, timed separately. Goes on after the end of a text."""

    def __init__(self, sequence: mn.Sequence, params: mn.SamplingParams):
        self._sequence = sequence
        self._sample = mn.Sampler(params)
        tokenizer = sequence.context.model.tokenizer
        self._stream = tokenizer.stream(after=sequence[-1]) if tokenizer.type != "none" else None
        self._steps = self._generate()
        self.clear()

    def clear(self) -> None:
        """Set all times to zero."""
        self.ns = self.sampler_ns = self.text_ns = 0

    def next(self) -> None:
        """Generate a token."""
        before = _clock()
        step = next(self._steps)
        self.ns += _clock() - before
        if step.finish_reason is not None:
            self._steps = self._generate()

    def _generate(self) -> Iterator[mn.Step]:
        return mn.generate(self._sequence, self._sampler, decoder=self if self._stream else None)

    def _sampler(self, logits: npt.NDArray[np.float32], tokens: Any) -> int:
        before = _clock()
        token = self._sample(logits, tokens)
        self.sampler_ns += _clock() - before
        return token

    def feed(self, token: int) -> str:
        """Turn a token into text, and time it; `generate` calls this as its decoder."""
        assert self._stream is not None
        before = _clock()
        text = self._stream.feed(token)
        self.text_ns += _clock() - before
        return text

    def flush(self) -> str:
        """End a text; see `feed`."""
        return self._stream.flush() if self._stream else ""


@contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()  # without collecting first, which would leave the caches cold
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@cache
def clock_ns(n: int = 2000) -> float:
    """Return the cost of reading the clock, in nanoseconds: the median difference of successive readings.

    Measured once per process.
    """
    read: Callable[[], int] = _clock
    return float(np.median(np.diff(np.array([read() for _ in range(n)], np.int64))))
