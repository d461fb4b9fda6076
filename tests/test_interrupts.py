"""A signal handler may raise between any two lines of this package: no sequence may ever contradict its tokens."""

import random
import signal
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import minerva_native as mn
from tiny_models import TinyModel

STEPS = 1000
TOLERANCE = 1e-3


class Interrupt(Exception):
    """What the handler raises."""


@pytest.fixture
def alarm() -> Iterator[Callable[[float], None]]:
    """Gives a function that has `Interrupt` raised after so many seconds; 0 calls it off."""

    def raise_interrupt(number: int, frame: object) -> None:
        raise Interrupt

    previous = signal.signal(signal.SIGALRM, raise_interrupt)
    try:
        yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds) and None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def use(sequences: list[mn.Sequence], choice: random.Random) -> None:
    """Do one thing to one of the sequences, or to several."""
    index = choice.randrange(len(sequences))
    sequence = sequences[index]
    ids = [choice.randrange(100, 103) for _ in range(choice.randrange(1, 20))]  # few, so that texts begin alike
    name = choice.choice(
        ["extend", "append", "truncate", "rewind", "score", "logits", "generate", "assign", "fork", "close", "together"]
    )
    if name in ("extend", "score"):
        getattr(sequence, name)(ids)
    elif name in ("truncate", "rewind"):
        getattr(sequence, name)(choice.randrange(len(sequence) + 1))
    elif name == "append":
        sequence.append(ids[0])
    elif name == "assign":
        sequence.assign(choice.choice(sequences)[: choice.randrange(len(sequence) + 1)] + ids)
    elif name == "fork":
        sequences[index] = sequence.fork(choice.randrange(len(sequence) + 1))
    elif name == "close":
        sequences[index] = sequence.context.sequence()
    elif name == "together":
        sequence.context.extend(dict.fromkeys(sequences, ids))
    elif len(sequence) and name == "logits":
        _ = sequence.logits
    elif len(sequence):
        for _ in mn.generate(sequence, lambda logits, tokens: ids[0], max_tokens=3):
            pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the handler raises in a __del__, too
@pytest.mark.parametrize(
    "shape",
    [TinyModel(), TinyModel("gemma2", tied=True), TinyModel("mamba"), TinyModel("jamba")],
    ids=["attention", "sliding window", "recurrent", "hybrid"],
)
def test_sequences_agree_with_a_fresh_evaluation(
    load_tiny: Callable[[TinyModel], mn.Model], alarm: Callable[[float], None], shape: TinyModel
) -> None:
    choice = random.Random(1)
    options: dict[str, Any] = {"n_ctx": 900, "n_threads": 1, "kv_type": "f32", "flash_attention": "off"}
    model = load_tiny(shape)
    with (
        # A place may be lost where an interrupt strikes between two lines, so there are many.
        model.context(**options, n_seq=60, n_ubatch=16, swa_full=False, checkpoint_interval=8) as context,
        model.context(**options, prefix_cache=False) as other_context,
    ):
        sequences, fresh = [context.sequence(), context.sequence(), context.sequence()], other_context.sequence()
        interrupts = 0
        for step in range(STEPS):
            for sequence in sequences:
                if len(sequence) > 100:
                    sequence.truncate(0)
            try:
                alarm(choice.choice([1e-5, 5e-5, 2e-4, 1e-3]))
                use(sequences, choice)
                alarm(0)
            except Interrupt:
                interrupts += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            if step % 7:
                continue
            for kept in filter(len, sequences):
                fresh.extend(list(kept.tokens))
                assert np.abs(kept.logits - fresh.logits).max() < TOLERANCE * np.abs(fresh.logits).max()
                fresh.truncate(0)
        assert interrupts > STEPS // 10
