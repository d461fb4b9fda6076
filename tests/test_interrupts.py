"""A signal handler may raise between any two lines of this package: no sequence may ever contradict its tokens."""

import random
import signal
from collections.abc import Callable, Iterator

import pytest

import minerva_native as mn
from tiny_models import TOKENS

STEPS = 1500
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


def use(sequence: mn.Sequence, choice: random.Random) -> None:
    """Do one thing to a sequence."""
    ids = [choice.randrange(len(TOKENS)) for _ in range(choice.randrange(1, 20))]
    name = choice.choice(["extend", "append", "truncate", "rewind", "score", "logits", "generate"])
    if name in ("extend", "score"):
        getattr(sequence, name)(ids)
    elif name in ("truncate", "rewind"):
        getattr(sequence, name)(choice.randrange(len(sequence) + 1))
    elif name == "append":
        sequence.append(ids[0])
    elif len(sequence) and name == "logits":
        _ = sequence.logits
    elif len(sequence):
        for _ in mn.generate(sequence, lambda logits, tokens: ids[0], max_tokens=3):
            pass


@pytest.mark.parametrize("interrupted", [False, True], ids=["left alone", "interrupted"])
def test_sequences_agree_with_a_fresh_evaluation(
    tiny: mn.Model, alarm: Callable[[float], None], interrupted: bool
) -> None:
    choice = random.Random(1)
    options = {
        "n_ctx": 600,
        "n_seq": 3,
        "n_threads": 1,
        "kv_type": "f32",
        "flash_attention": "off",
        "prefix_cache": False,
    }
    with tiny.context(**options) as context:  # type: ignore[arg-type]
        sequences, fresh = [context.sequence(), context.sequence()], context.sequence()
        interrupts = 0
        for step in range(STEPS):
            sequence = choice.choice(sequences)
            if len(sequence) > 150:
                sequence.truncate(0)
            try:
                alarm(choice.choice([1e-5, 5e-5, 2e-4, 1e-3]) if interrupted else 0)
                use(sequence, choice)
                alarm(0)
            except Interrupt:
                interrupts += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert context.cells_used == sum(map(len, sequences))
            if step % 7:
                continue
            for kept in filter(len, sequences):
                fresh.extend(list(kept.tokens))
                assert abs(kept.logits - fresh.logits).max() < TOLERANCE
                fresh.truncate(0)
        assert bool(interrupts) == interrupted
