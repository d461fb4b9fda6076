"""A signal handler may raise between any two lines of this package: logits must always be those of the tokens."""

import gc
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minerva_native as mn
from engine_room import open_up
from tiny_models import TinyModel

STEPS = 1000
TOLERANCE = 1e-3


class Interrupt(Exception):
    """What the handler raises."""


class Later:
    """A cancel token that is set once it was looked at so many times."""

    def __init__(self, n: int) -> None:
        self.n = n

    def is_set(self) -> bool:
        """Return whether to stop."""
        self.n -= 1
        return self.n < 0


def test_who_stops_a_computation_is_told_of_no_error(demo: mn.Model, caplog: pytest.LogCaptureFixture) -> None:
    with demo.context(n_ctx=2048, n_threads=1) as context, context.sequence() as sequence:
        for n in range(6):  # the first before anything computes
            with caplog.at_level("DEBUG", "minerva_native"), pytest.raises(mn.Cancelled):
                sequence.extend([100] * 1500, cancel=Later(n))
            sequence.truncate(0)
        failed = [record for record in caplog.records if "failed to" in record.getMessage()]
        assert failed
        assert {record.levelname for record in failed} == {"DEBUG"}


@pytest.fixture
def alarm() -> Iterator[Callable[[float], None]]:
    """A function that schedules an `Interrupt` after some seconds; 0 cancels it."""

    is_armed = False

    def raise_interrupt(number: int, frame: object) -> None:
        if is_armed:  # else another thread got the signal, and was slow to say so
            raise Interrupt

    def arm(seconds: float) -> None:
        nonlocal is_armed
        is_armed = seconds > 0
        signal.setitimer(signal.ITIMER_REAL, seconds)

    previous = signal.signal(signal.SIGALRM, raise_interrupt)
    try:
        yield arm
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def use(sequences: list[mn.Sequence], choice: random.Random) -> None:
    """Do a random operation on one of the sequences, or on several."""
    index = choice.randrange(len(sequences))
    sequence = sequences[index]
    ids = [choice.randrange(100, 103) for _ in range(choice.randrange(1, 20))]  # few, for shared prefixes
    names = ["extend", "append", "truncate", "rewind", "score", "logits", "generate", "assign", "fork", "close"]
    name = choice.choice([*names, "together", "a token each"])
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
    elif name == "a token each":
        sequence.context.extend(dict.fromkeys(sequences, ids[:1]))
    elif len(sequence) and name == "logits":
        _ = sequence.logits
    elif len(sequence):
        for _ in mn.generate(sequence, lambda logits, tokens: ids[0], max_tokens=3):
            pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the handler may raise in a __del__
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
        # An interrupt between two lines may leak a sequence id, so there are many.
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


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("shared", [False, True], ids=["cells of its own", "shared cells"])
@pytest.mark.parametrize("shape", [TinyModel(), TinyModel("jamba")], ids=["attention", "hybrid"])
def test_an_interrupted_shift_is_done_completely_or_not_at_all(
    load_tiny: Callable[[TinyModel], mn.Model], alarm: Callable[[float], None], shape: TinyModel, shared: bool
) -> None:
    choice = random.Random(1)
    options: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "kv_type": "f32", "flash_attention": "off"}
    model = load_tiny(shape)
    ids = [choice.randrange(100, 200) for _ in range(40)]
    with (
        model.context(**options, n_seq=60, checkpoint_interval=8) as context,
        model.context(**options, n_seq=4, prefix_cache=False) as other,
    ):
        fresh, done, interrupts = other.sequence(), other.sequence(), 0
        for _ in range(250):
            with context.sequence() as sequence:
                sequence.extend(ids)
                fork = sequence.fork(30) if shared else None
                try:
                    alarm(choice.choice([5e-6, 2e-5, 5e-5, 1e-4, 3e-4]))
                    sequence.shift(4, 10)
                    alarm(0)
                except Interrupt:
                    interrupts += 1
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                text = list(sequence)
                assert text in (ids, [*ids[:4], *ids[14:]])
                assert context.cells_used == len(text) + (30 - (4 if len(text) < 40 else 30) if fork else 0) or shared
                sequence.extend([7])
                expected = []
                for shifted in (False, True):
                    done.assign(ids if shifted else text)
                    if shifted:
                        done.shift(4, 10)
                    done.extend([7])
                    expected.append(done.logits)
                    done.truncate(0)
                assert any(np.abs(sequence.logits - row).max() < TOLERANCE * np.abs(row).max() for row in expected)
                if fork:
                    fresh.assign(ids[:30])
                    assert np.abs(fork.logits - fresh.logits).max() < TOLERANCE * np.abs(fresh.logits).max()
                    fork.close()
        assert interrupts > 20


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("shape", [TinyModel(), TinyModel("mamba")], ids=["attention", "recurrent"])
def test_saving_and_restoring_can_be_interrupted(
    load_tiny: Callable[[TinyModel], mn.Model], alarm: Callable[[float], None], shape: TinyModel, tmp_path: Path
) -> None:
    choice = random.Random(1)
    model = load_tiny(shape)
    options: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "kv_type": "f32", "flash_attention": "off"}
    with model.context(**options, n_seq=200) as context, context.sequence() as sequence:
        sequence.extend(list(range(100, 140)))
        expected, interrupts = sequence.logits, 0
        sequence.save(tmp_path / "saved")
        for step in range(200):
            try:
                alarm(choice.choice([5e-5, 2e-4, 5e-4, 1e-3]))
                if step % 2:
                    sequence.save(tmp_path / "saved")
                else:
                    context.restore(tmp_path / "saved").close()
                alarm(0)
            except Interrupt:
                interrupts += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert np.array_equal(sequence.logits, expected) or not interrupts
            if step % 10 == 0:
                with context.restore(tmp_path / "saved") as restored:
                    assert restored == sequence
                    assert np.abs(restored.logits - expected).max() < TOLERANCE * np.abs(expected).max()
                assert np.abs(sequence.logits - expected).max() < TOLERANCE * np.abs(expected).max()
        assert interrupts > 20


@pytest.fixture
def on_alarm() -> Iterator[Callable[[Callable[[], None]], None]]:
    """A function that sets what is called when `ITIMER_REAL` expires."""
    previous = signal.getsignal(signal.SIGALRM)

    def set_handler(function: Callable[[], None]) -> None:
        signal.signal(signal.SIGALRM, lambda number, frame: function())

    yield set_handler
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize("use", ["extend", "logits", "truncate", "close"])
def test_calls_from_a_signal_handler_during_a_call_are_refused_or_deferred(
    tiny: mn.Model, on_alarm: Callable[[Callable[[], None]], None], use: str
) -> None:
    choice = random.Random(1)
    options: dict[str, Any] = {"n_ctx": 2048, "n_batch": 16, "n_threads": 1, "kv_type": "f32", "flash_attention": "off"}
    context, cache = open_up(tiny, **options, n_seq=8)
    with context, tiny.context(**options, prefix_cache=False) as other_context:
        mine, others, fresh = context.sequence(), [context.sequence()], other_context.sequence()
        handled, refused, is_armed = 0, 0, False

        def handler() -> None:
            nonlocal handled, refused
            if not is_armed:  # another thread got the signal, and was slow to say so
                return
            try:
                if use == "extend":
                    others[0].extend([200])
                elif use == "logits":
                    others[0].append(200)
                    _ = others[0].logits
                elif use == "truncate":
                    mine.truncate(min(2, len(mine)))
                elif use == "close":
                    others[0].close()
                    others[0] = context.sequence()
                handled += 1
            except mn.ContextError:
                refused += 1
            except mn.ClosedError:
                pass

        on_alarm(handler)
        for step in range(300):
            ids = [choice.randrange(40, 43) for _ in range(choice.randrange(2, 40))]
            if others[0].closed:
                others[0] = context.sequence()
            others[0].assign([1, 2, 3])
            is_armed = True
            signal.setitimer(signal.ITIMER_REAL, choice.choice([3e-5, 6e-5, 1e-4, 3e-4]), 1e-4)
            if step % 2:
                mine.assign(ids)
            else:
                mine.fork().close()
            signal.setitimer(signal.ITIMER_REAL, 0)
            is_armed = False
            slots = [*cache.pool.open, *cache.pool.finished]
            assert len({slot.id for slot in slots if slot.id >= 0}) == sum(slot.id >= 0 for slot in slots)
            for sequence in (mine, others[0]):
                if not sequence.closed and len(sequence):
                    fresh.assign(list(sequence.tokens))
                    expected = fresh.logits
                    assert np.abs(sequence.logits - expected).max() < TOLERANCE * np.abs(expected).max()
        assert handled + refused > 100
        assert refused or use == "close"


def test_a_signal_handler_during_a_call_from_a_callback_is_refused(
    tiny: mn.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, cache = open_up(tiny, n_ctx=64, n_seq=3, n_threads=1)
    with context:
        one, other, third = context.sequence(), context.sequence(), context.sequence()
        decode = cache.runner.decode

        def decode_and_be_interrupted(*arguments: Any) -> int:
            with pytest.raises(mn.ReentryError, match="is computing"):
                third.append(3)
            with pytest.raises(mn.ReentryError, match="is computing"):
                context.close()
            return decode(*arguments)

        def on_progress(done: int, total: int) -> None:
            other.extend([3, 4])
            third.append(5)

        monkeypatch.setattr(cache.runner, "decode", decode_and_be_interrupted)
        one.extend([1, 2], on_progress)
        assert [one, other, third] == [[1, 2], [3, 4], [5]]


def test_sequences_collected_during_a_call_are_released_after_it(tiny: mn.Model) -> None:
    choice = random.Random(1)

    class Chat:
        def __init__(self, ids: list[int]):
            self.itself = self
            self.sequence = context.sequence()
            self.sequence.extend(ids)

        def __del__(self) -> None:
            self.sequence.close()

    before = gc.get_threshold()
    context, cache = open_up(tiny, n_ctx=4096, n_seq=64, n_batch=16, n_threads=1)
    with context, context.sequence() as sequence:
        gc.set_threshold(20)
        try:
            for step in range(1500):
                if not step % 50:
                    gc.collect()  # the old generation too
                ids = [choice.randrange(40, 43) for _ in range(choice.randrange(2, 30))]
                Chat(ids)
                sequence.assign(ids[::-1])
                sequence.fork().close()
        finally:
            gc.set_threshold(*before)
        gc.collect()
        assert context.cells_used == len(sequence)
        context.clear_cache()
        assert len(cache.pool.open) == 1


def test_a_callback_may_use_the_context(tiny: mn.Model) -> None:
    with tiny.context(n_ctx=64, n_seq=2, n_batch=8, n_threads=1) as context:
        sequence, other = context.sequence(), context.sequence()
        sequence.extend(list(range(32)), on_progress=lambda done, total: other.extend([done]))
        assert other == [8, 16, 24, 32]
        with pytest.raises(mn.ClosedError):
            sequence.extend(list(range(20)), on_progress=lambda done, total: sequence.close())
