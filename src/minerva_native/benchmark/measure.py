"""Measuring: what one repetition of a test does, and what of it is timed.

A test is llama-bench's: so many random tokens evaluated as a prompt, so many one at a time, after so many that are
there already and do not count. No text and no sampler are part of it. Beside it the real decode loop, `generate`, is
run on the same sequence, and each token is taken apart: into `llama_decode`, reading the logits, the sampler, the text,
and the loop around them.
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

FIRST_TOKENS = 4  # of each repetition, that are shown apart: caches and branch predictors are still cold

_ENCODED_TOKENS = 32  # what an encoder-decoder model answers

_clock = time.perf_counter_ns


class Test(NamedTuple):
    """What is evaluated, and with which settings; the defaults are llama-bench's, but for the threads."""

    n_prompt: int = 0  # tokens of the prompt
    n_gen: int = 0  # tokens generated after it
    n_depth: int = 0  # tokens in the KV cache before either
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
    """The times of one repetition, in nanoseconds."""

    ns: int  # prompt and generation
    token_ns: npt.NDArray[np.int64]  # of each generated token, shape (n_gen,)
    first_token_ns: int | None  # the prompt, its logits, and a token sampled from them; None without a prompt


class Parts(NamedTuple):
    """Where the time of a generated token goes: nanoseconds, the mean over a run of the decode loop.

    The first four are timed where they happen. `loop` is the rest of the steps' time, so what the sum lacks of the
    whole is the measuring itself.
    """

    decode: float  # `llama_decode`, to the end of the computation
    logits: float  # copying the logits into an array
    sampler: float
    text: float  # detokenising
    loop: float  # bookkeeping and the loop itself
    whole: float  # by one clock around the run

    @property
    def total(self) -> float:
        """The sum of the parts."""
        return self.decode + self.logits + self.sampler + self.text + self.loop


class Run:
    """A test on a context of its own. A context manager."""

    def __init__(self, model: mn.Model, test: Test, params: mn.SamplingParams):
        self.test = test
        # The cells that llama-bench asks for, and not one more: their number is part of the test.
        self.context = model.context(
            n_ctx=max(2, test.n_depth + test.n_prompt + test.n_gen),
            n_batch=test.n_batch,
            n_ubatch=test.n_ubatch,
            n_threads=test.n_threads,
            kv_type=(test.type_k, test.type_v),
            flash_attention=test.flash_attention,  # type: ignore[arg-type]  # the context checks it
            swa_full=False,
            prefix_cache=False,
            checkpoint_bytes=0,  # copying states would be timed
        )
        self._params = params
        self._sampler = mn.Sampler(params)
        self._folder = tempfile.TemporaryDirectory(prefix="minerva-bench-")
        self.sequence: mn.Sequence | None = None
        self._has_depth = False
        n_vocab, bos = model.tokenizer.n_vocab, model.tokenizer.bos
        draw = random.Random(1)
        self._prompt = [draw.randrange(n_vocab) for _ in range(test.n_prompt)]
        self._tokens = [[draw.randrange(n_vocab)] for _ in range(test.n_gen)]
        self._before = [draw.randrange(n_vocab) for _ in range(test.n_depth)]
        if model.tokenizer.adds_bos and bos is not None:  # a text begins with it
            first = self._before or self._prompt or self._tokens[0]
            first[0] = bos
        if model.has_encoder:
            self.context.encode([draw.randrange(n_vocab) for _ in range(min(_ENCODED_TOKENS, self.context.n_ubatch))])

    def warm_up(self) -> None:
        """Evaluate the prompt and one token, so that memory is mapped and threads are there."""
        sequence = self._start()
        if self._prompt:
            sequence.extend(self._prompt)
        if self._tokens:
            sequence.extend(self._tokens[0])

    def settle(self) -> None:
        """Generate a few tokens, after something else has had the CPUs and their caches."""
        if self._tokens:
            sequence = self._start()
            for token in self._tokens[:FIRST_TOKENS]:
                sequence.extend(token)

    def repeat(self) -> Repetition:
        """Run the test once. Python's garbage collector rests meanwhile."""
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
        """Generate as many tokens with the decode loop, and time its parts; None where the test has too few.

        The sequence is cut to where the generation of `repeat` began, or to its first token.
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
        stats, timed = self.context.stats, _TimedLoop(sequence, self._params)
        with _no_collection():
            timed.next()  # the first token's logits are there
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

        At its end, where the memory cannot be cut.
        """
        if self.sequence is None or not len(self.sequence):
            return 0.0
        half_way = self.test.n_depth + self.test.n_prompt + self.test.n_gen / 2
        if not self.context.memory.can_truncate:  # how much of it grows with the text is not known
            return float(self.sequence.size_bytes)
        return self.sequence.size_bytes * half_way / len(self.sequence)

    def close(self) -> None:
        """Free the context."""
        self.context.close()
        self._folder.cleanup()

    def _start(self) -> mn.Sequence:
        """Return the sequence, with the tokens of the depth evaluated and nothing else."""
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
    """`generate` with clocks around it, its sampler and its decoder. What ends a text ends nothing here."""

    def __init__(self, sequence: mn.Sequence, params: mn.SamplingParams):
        self._sequence = sequence
        self._sample = mn.Sampler(params)
        tokenizer = sequence.context.model.tokenizer
        self._stream = tokenizer.stream(after=sequence[-1]) if tokenizer.type != "none" else None
        self._steps = self._generate()
        self.clear()

    def clear(self) -> None:
        """Set the clocks to zero."""
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
        """Turn a token into text, timed; the loop's decoder."""
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
    gc.disable()  # and no collection before it either, which would leave the caches cold
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@cache
def clock_ns(n: int = 2000) -> float:
    """Return what one reading of the clock costs in nanoseconds: the median difference of readings in succession.

    It is measured once.
    """
    read: Callable[[], int] = _clock
    return float(np.median(np.diff(np.array([read() for _ in range(n)], np.int64))))
