"""Callbacks from C: they can come on any thread, and no exception may cross into C."""

import logging
import signal
import threading
from pathlib import Path

import pytest

import minerva_native as mn


def test_the_log_reaches_the_logger_from_any_thread(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "minerva_native"):
        thread = threading.Thread(target=lambda: mn.Model.demo().close())
        thread.start()
        thread.join()
    assert any("general.name" in record.message for record in caplog.records)


def test_the_log_is_quiet_by_default(capfd: pytest.CaptureFixture[str]) -> None:
    with mn.Model.demo() as model, model.context(n_ctx=64) as context:
        context.sequence().extend([1, 2, 3])
    assert capfd.readouterr() == ("", "")


def test_an_exception_in_a_log_handler_does_not_reach_libllama(capfd: pytest.CaptureFixture[str]) -> None:
    def explode(record: logging.LogRecord) -> bool:
        raise RuntimeError("a filter that fails")

    logger = logging.getLogger("minerva_native")
    level = logger.level
    logger.addFilter(explode)
    logger.setLevel(logging.DEBUG)
    try:
        mn.Model.demo().close()
    finally:
        logger.removeFilter(explode)
        logger.setLevel(level)
    assert "Traceback" not in capfd.readouterr().err


def test_progress_goes_from_0_to_1() -> None:
    seen: list[float] = []
    mn.Model.load(mn.Model.demo().path, on_progress=seen.append).close()
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_an_exception_in_on_progress_ends_the_load_and_is_raised() -> None:
    def explode(fraction: float) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        mn.Model.load(mn.Model.demo().path, on_progress=explode)


def test_on_progress_cancels_a_load_by_returning_false() -> None:
    with pytest.raises(mn.Cancelled):
        mn.Model.load(mn.Model.demo().path, on_progress=lambda fraction: False)


def test_several_threads_load_at_once(tmp_path: Path) -> None:
    results: list[int] = []

    def load() -> None:
        with mn.Model.demo() as model, model.context(n_ctx=64, n_threads=1) as context:
            results.append(context.sequence().extend(model.tokenizer.encode("Hello")))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert len(set(results)) == 1


def test_cancel_from_another_thread_stops_a_prefill_and_leaves_the_sequence_as_it_was() -> None:
    with mn.Model.demo() as model, model.context(n_ctx=256, n_batch=16) as context:
        sequence = context.sequence()
        sequence.extend([5, 6, 7])
        before = sequence.logits.copy()

        def cancel_once(done: int, total: int) -> None:
            thread = threading.Thread(target=context.cancel)
            thread.start()
            thread.join()

        with pytest.raises(mn.Cancelled):
            sequence.extend(list(range(20, 120)), cancel_once)
        assert sequence.tokens == [5, 6, 7]
        assert abs(sequence.logits - before).max() < 1e-3
        assert sequence.extend([8, 9]) == 2


def test_an_exception_from_a_signal_handler_stops_a_long_computation(demo: mn.Model) -> None:
    def explode(number: int, frame: object) -> None:
        raise TimeoutError("the alarm rang")

    previous = signal.signal(signal.SIGALRM, explode)
    try:
        with demo.context(n_ctx=16384, n_batch=16384, n_threads=1) as context, context.sequence() as sequence:
            sequence.extend([5, 6, 7])
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(TimeoutError, match="the alarm rang"):
                sequence.extend([8] * 16000)  # one call of llama_decode, many seconds long
            assert sequence.tokens == [5, 6, 7]
            assert context.stats.decode_calls == 2
            assert sequence.extend([8, 9]) == 2
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
