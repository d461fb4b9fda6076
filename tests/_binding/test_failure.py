"""What libllama throws, or would end the process for, becomes a return code: on every thread, and for good."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import minerva_native as mn
from engine_room import open_up
from minerva_native._binding import ffi, lib, thrown
from tiny_models import TinyModel

N_SEQ = 8


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[mn.Model]:
    """A model with a table of 512 positions: ggml asserts that a position is in it, on the thread that reads it."""
    path = TinyModel("gpt2").write(tmp_path_factory.mktemp("gpt2") / "gpt2.gguf")
    with mn.Model.load(path) as model:
        yield model


class Bare:
    """A context with threads of its own, without the engine."""

    def __init__(self, model: mn.Model, n_threads: int):
        parameters = ffi.new("struct llama_context_params *", lib.llama_context_default_params())
        parameters.n_ctx, parameters.n_seq_max, parameters.kv_unified = 256 * N_SEQ, N_SEQ, True
        parameters.n_threads = parameters.n_threads_batch = n_threads
        with model.raw() as pointer:
            context = lib.minerva_context_new(pointer, parameters, ffi.NULL)
        assert context != ffi.NULL
        self.decoder = ffi.new("minerva_decoder *", {"context": context})
        assert lib.minerva_threads_set(self.decoder, n_threads, n_threads) == 0

    def decode(self, *positions: int) -> int:
        """Decode a token of each of several empty sequences, at these positions."""
        count = len(positions)
        return lib.minerva_decode_each(self.decoder, count, [5] * count, list(positions), list(range(count)))

    def __enter__(self) -> "Bare":
        return self

    def __exit__(self, *exception: object) -> None:
        lib.minerva_threads_free(self.decoder)
        lib.llama_free(self.decoder.context)


def n_threads_now() -> int:
    return len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 0


@pytest.mark.parametrize("n_threads", [1, 2, 5, 8])
def test_an_assertion_on_any_thread_is_a_return_code(gpt2: mn.Model, n_threads: int) -> None:
    for failing in range(N_SEQ):  # each thread reads its share of the rows
        before = n_threads_now()
        with Bare(gpt2, n_threads) as bare:
            positions = [0] * N_SEQ
            positions[failing] = 9999
            assert bare.decode(*positions) == lib.MINERVA_THREW
            assert lib.minerva_thrown_cause() == lib.MINERVA_ASSERTION
            assert "GGML_ASSERT" in thrown()
            assert bare.decoder.failed
            assert n_threads_now() == before  # no worker goes on behind its back


def test_assertions_on_several_threads_at_once(gpt2: mn.Model) -> None:
    for _ in range(20):
        with Bare(gpt2, 4) as bare:
            assert bare.decode(*[9999] * N_SEQ) == lib.MINERVA_THREW


def test_after_it_every_call_on_that_context_is_refused(gpt2: mn.Model) -> None:
    with Bare(gpt2, 2) as bare:
        assert bare.decode(0, 9999) == lib.MINERVA_THREW
        decoder, state = bare.decoder, ffi.new("uint8_t[]", 8)
        for result in (
            bare.decode(0),
            lib.minerva_encode(decoder, 1, [5], 1),
            lib.minerva_memory_clear(decoder),
            lib.minerva_memory_seq_rm(decoder, 0, -1, -1),
            lib.minerva_memory_seq_cp(decoder, 0, 1),
            lib.minerva_memory_seq_add(decoder, 0, 1, 1),
            lib.minerva_state_size(decoder, 0, 0),
            lib.minerva_state_read(decoder, 0, 0, state, 8),
            lib.minerva_state_write(decoder, 0, 0, state, 8, True),
        ):
            assert result == lib.MINERVA_THREW
            assert lib.minerva_thrown_cause() == lib.MINERVA_FAILED


def test_other_contexts_of_the_model_go_on(gpt2: mn.Model) -> None:
    with Bare(gpt2, 2) as other:
        with Bare(gpt2, 2) as bare:
            assert bare.decode(0, 9999) == lib.MINERVA_THREW
            assert other.decode(0, 0) == 0
        assert other.decode(1, 1) == 0


def test_what_was_thrown_is_forgotten_by_the_next_call(gpt2: mn.Model, demo: mn.Model) -> None:
    with Bare(gpt2, 1) as bare, Bare(demo, 1) as other:
        assert bare.decode(9999) == lib.MINERVA_THREW
        assert other.decode(0) == 0
        assert thrown() == ""


def test_an_engine_on_a_broken_context_says_so_from_then_on(gpt2: mn.Model, tmp_path: Path) -> None:
    context, cache = open_up(gpt2, n_ctx=64, n_seq=5, n_threads=2)
    with context:
        sequence, other = context.sequence(), context.sequence()
        sequence.extend([5, 6, 7])
        other.extend([8, 9])
        logits = sequence.logits
        forks = sequence.fork(), other.fork()  # so that no logits are in libllama's buffer alone
        saved = tmp_path / "sequence"
        sequence.save(saved)
        assert cache.runner.decode_one(5, 9999, 4) == lib.MINERVA_THREW
        calls: list[Callable[[], object]] = [
            lambda: sequence.extend([8]),
            lambda: sequence.extend([8, 9]),
            lambda: context.extend({sequence: [1], other: [2]}),
            lambda: sequence.logits_after([5]),
            lambda: sequence.assign([5, 9, 9]),
            lambda: context.restore(saved),
        ]
        for call in calls:
            with pytest.raises(mn.BrokenContextError, match=r"GGML_ASSERT.*make another"):
                call()
        assert list(sequence.tokens) == [5, 6, 7]
        sequence.truncate(1)
        with pytest.raises(mn.BrokenContextError):
            sequence.logits  # noqa: B018
        for closed in (other, *forks):
            closed.close()
    with gpt2.context(n_ctx=64, n_threads=2) as context, context.sequence() as sequence:
        sequence.extend([5, 6, 7])
        np.testing.assert_allclose(sequence.logits, logits, atol=1e-4)


# ---- In processes of their own --------------------------------------------------------------------------------------


def run(program: str, *arguments: str, timeout: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
    )


def test_an_assertion_outside_a_guarded_call_still_ends_the_process() -> None:
    program = """
        from minerva_native._binding import ffi, lib
        lib.ggml_backend_tensor_memset(ffi.new("struct ggml_tensor *"), 1, 0, 1)
    """
    ended = run(program)
    assert ended.returncode == -signal.SIGABRT
    assert "GGML_ASSERT" in ended.stderr


FORK = """
    import os, sys, threading, time
    import minerva_native as mn

    model = mn.Model.demo()
    context = model.context(n_ctx=256, n_threads=2)
    sequence = context.sequence()
    sequence.extend([1, 2, 3])
    stop = threading.Event()

    def busy():
        with model.context(n_ctx=2048, n_threads=2) as other, other.sequence() as it:
            while not stop.is_set():
                it.extend(list(range(20, 276)))
                it.truncate(0)

    thread = threading.Thread(target=busy)
    thread.start()
    time.sleep(0.2)
    for _ in range(8):
        child = os.fork()
        if not child:
            try:
                sequence.extend([4])
            except mn.BrokenContextError as error:
                assert "forked" in str(error), error
            else:
                os._exit(3)
            assert list(sequence.tokens) == [1, 2, 3]
            sequence.close()
            context.close()
            with mn.Model.demo() as fresh, fresh.context(n_ctx=64, n_threads=2) as own, own.sequence() as new:
                new.extend([1, 2, 3])
                new.logits
            with model.context(n_ctx=64, n_threads=2) as own, own.sequence() as new:
                new.extend([1, 2, 3])
            model.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    stop.set()
    thread.join()
    sequence.extend([4])
    print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_child_makes_contexts_of_its_own_and_cannot_use_those_of_its_parent() -> None:
    ended = run(FORK)
    assert (ended.stdout, ended.stderr, ended.returncode) == ("done\n", "", 0)


FORK_IN_CALLBACK = """
    import os, signal, sys
    import minerva_native as mn

    class Forking:
        child = None

        def is_set(self):
            if self.child is None and sys._getframe(1).f_code.co_name == "is_cancelled":  # libllama is computing
                self.child = os.fork()
            return False

    with mn.Model.demo() as model, model.context(n_ctx=512, n_threads=2) as context, context.sequence() as sequence:
        token = Forking()
        try:
            sequence.extend(list(range(20, 276)), cancel=token)
        except mn.BrokenContextError as error:
            assert token.child == 0 and "forked" in str(error), error
            with model.context(n_ctx=64, n_threads=2) as own, own.sequence() as new:
                new.extend([1, 2, 3])
            os._exit(7)
        if not token.child:
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(token.child, 0)[1]))
        sequence.extend([4])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_fork_in_a_callback_of_a_computation_ends_that_computation_in_the_child() -> None:
    ended = run(FORK_IN_CALLBACK)
    assert (ended.stdout, ended.stderr, ended.returncode) == ("7\n", "", 0)


THREADS = """
    import resource
    import minerva_native as mn

    with mn.Model.demo() as model:
        limit = sum(1 for _ in __import__("os").scandir("/proc/self/task"))
        resource.setrlimit(resource.RLIMIT_AS, (1 << 31, 1 << 31))
        for _ in range(3):
            try:
                model.context(n_ctx=64, n_threads=512)
            except mn.ContextError as error:
                print(error)
            else:
                print("made")
        with model.context(n_ctx=64, n_threads=2) as context, context.sequence() as sequence:
            sequence.extend([1, 2, 3])
            print(len(sequence))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads by Linux's /proc")
def test_more_threads_than_the_system_grants() -> None:
    ended = run(THREADS)
    lines = ended.stdout.splitlines()
    assert ended.returncode == 0, ended.stderr
    assert len(lines) == 4
    assert all("n_threads=512" in line and "grants no more threads" in line for line in lines[:3])
    assert lines[3] == "3"


NO_MEMORY = """
    import resource, sys
    import minerva_native as mn

    with mn.Model.demo() as model, model.context(n_ctx=4096, n_threads=1) as context, context.sequence() as sequence:
        mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + (int(sys.argv[1]) << 10), resource.RLIM_INFINITY))
        try:
            sequence.extend([20 + index % 1000 for index in range(4000)])
        except (mn.ContextError, MemoryError):
            sys.exit(3)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
@pytest.mark.parametrize("spare_kb", [0, 500, 600, 700, 800])
def test_the_first_exception_of_a_thread_when_memory_is_short(spare_kb: int) -> None:
    # Or what glibc has put aside for other threads would do: with AMX, ggml has had some.
    ended = run(NO_MEMORY, str(spare_kb), MALLOC_ARENA_MAX="1")
    assert (ended.returncode, ended.stderr) == (3, "")


EXIT = """
    import logging, sys, threading, time
    import minerva_native as mn

    logging.basicConfig(stream=open("/dev/null", "w"), level=logging.DEBUG)
    model = mn.Model.demo()

    def load():
        while True:
            mn.Model.demo().close()

    def decode():
        with model.context(n_ctx=2048, n_threads=2) as context, context.sequence() as sequence:
            cancel = threading.Event()
            while True:
                sequence.extend(list(range(20, 276)), cancel=cancel)
                sequence.truncate(0)

    def encode():
        while True:
            model.tokenizer.encode("Once upon a time. " * 500)

    for work in (load, decode, encode):
        threading.Thread(target=work, daemon=True).start()
    time.sleep(float(sys.argv[1]))
"""


@pytest.mark.parametrize("number", range(6))
def test_the_interpreter_ends_while_daemon_threads_are_in_libllama(number: int) -> None:
    ended = run(EXIT, str(0.05 + number / 50))
    assert (ended.stderr, ended.returncode) == ("", 0)


SMALL_STACK = """
    import os
    import threading
    import minerva_native as mn

    model = mn.Model.demo()
    context = model.context(n_ctx=64, n_threads=1)
    sequence = context.sequence()

    def work():
        for call in (lambda: model.context(n_ctx=64, n_threads=1), lambda: sequence.extend([1, 2, 3])):
            try:
                call()
            except mn.ContextError as error:
                print(error)

    threading.stack_size(max(65536, os.sysconf("SC_THREAD_STACK_MIN")))  # which is 131072 on arm64
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    sequence.extend([1, 2, 3])
    print(len(sequence))
"""


def test_a_thread_whose_stack_is_too_small_to_compute() -> None:
    ended = run(SMALL_STACK)
    assert ended.returncode == 0, ended.stderr
    *refused, length = ended.stdout.splitlines()
    assert len(refused) == 2
    assert all("stack is too small" in line for line in refused)
    assert length == "3"
