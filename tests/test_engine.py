"""What apps are built on: evaluating in pieces and together, drafts, cancelling one call, what cells depend on."""

import gc
import inspect
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import minerva_native as mn
from engine_room import open_up
from minerva_native._binding import ffi, lib
from minerva_native.engine.cache import KVCache
from minerva_native.engine.slot import ReuseKey
from tiny_models import TinyModel

Logits = npt.NDArray[np.float32]

IDS = list(range(20, 60))
OTHER = list(range(100, 130))
OPTIONS: dict[str, Any] = {"n_ctx": 256, "n_seq": 4, "n_threads": 1, "kv_type": "f32", "flash_attention": "off"}
KINDS = {
    "attention": TinyModel(),
    "sliding window": TinyModel("gemma2", tied=True),
    "recurrent": TinyModel("mamba"),
    "hybrid": TinyModel("jamba"),
}


@pytest.fixture
def context(tiny: mn.Model) -> Iterator[mn.Context]:
    with tiny.context(**OPTIONS) as context:
        yield context


@pytest.fixture
def opened(tiny: mn.Model) -> Iterator[tuple[mn.Context, KVCache]]:
    context, cache = open_up(tiny, **OPTIONS)
    with context:
        yield context, cache


def fresh(model: mn.Model, ids: list[int]) -> Logits:
    with model.context(**OPTIONS) as context:
        sequence = context.sequence()
        sequence.extend(ids)
        return sequence.logits


def assert_same(logits: Logits, expected: Logits) -> None:
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-3 * np.abs(expected).max())


# Evaluating what waits


def append_all(sequence: mn.Sequence, ids: list[int]) -> mn.Sequence:
    for token in ids:
        sequence.append(token)
    return sequence


def test_evaluating_brings_several_sequences_up_to_date_in_one_batch(tiny: mn.Model, context: mn.Context) -> None:
    texts = [IDS, OTHER, IDS[5:9]]
    sequences = [append_all(context.sequence(), text) for text in texts]
    assert context.evaluate(sequences) == 0
    assert context.stats.decode_calls == 1
    assert context.stats.tokens_evaluated == sum(map(len, texts))
    for sequence, text in zip(sequences, texts, strict=True):
        assert_same(sequence.logits, fresh(tiny, text))
    assert context.stats.decode_calls == 1


def test_evaluating_in_pieces_says_how_many_tokens_are_left(tiny: mn.Model, context: mn.Context) -> None:
    sequence = append_all(context.sequence(), IDS)
    left = [context.evaluate([sequence], max_tokens=15) for _ in range(3)]
    assert left == [25, 10, 0]
    assert context.stats.tokens_evaluated == len(IDS)
    assert context.evaluate([sequence]) == 0
    assert_same(sequence.logits, fresh(tiny, IDS))
    assert context.stats.tokens_evaluated == len(IDS)


def test_a_piece_serves_sequences_in_the_order_given(context: mn.Context) -> None:
    first, second = append_all(context.sequence(), IDS[:4]), append_all(context.sequence(), OTHER)
    assert context.evaluate([first, second], max_tokens=10) == 4 + len(OTHER) - 10
    assert (first.n_waiting, second.n_waiting) == (0, len(OTHER) - 6)


def test_a_sequence_that_is_named_twice_is_evaluated_once(tiny: mn.Model, context: mn.Context) -> None:
    sequence = append_all(context.sequence(), IDS)
    assert context.evaluate([sequence, sequence]) == 0
    assert context.stats.tokens_evaluated == len(IDS)
    assert_same(sequence.logits, fresh(tiny, IDS))


def test_evaluating_what_is_known_is_no_work(context: mn.Context) -> None:
    sequence = context.sequence()
    sequence.extend(IDS)
    assert context.evaluate([sequence]) == 0
    assert context.stats.decode_calls == 1


def test_after_a_truncation_evaluating_gives_the_logits_back(tiny: mn.Model, context: mn.Context) -> None:
    sequence = context.sequence()
    sequence.extend(IDS)
    sequence.truncate(10)
    context.evaluate([sequence])
    calls = context.stats.decode_calls
    assert_same(sequence.logits, fresh(tiny, IDS[:10]))
    assert context.stats.decode_calls == calls


def test_four_generations_in_turn_share_their_batches(tiny: mn.Model) -> None:
    def run(together: bool) -> tuple[list[list[int]], int]:
        with tiny.context(**OPTIONS) as context:
            sequences = [context.sequence() for _ in range(4)]
            context.extend({sequence: IDS[number:] for number, sequence in enumerate(sequences)})
            greedy = [
                mn.generate(sequence, mn.SamplingParams(temperature=0.0), max_tokens=20) for sequence in sequences
            ]
            for _ in range(20):
                if together:
                    context.evaluate(sequences)
                for steps in greedy:
                    next(steps)
            return [list(sequence) for sequence in sequences], context.stats.decode_calls

    apart, together = run(False), run(True)
    assert apart[0] == together[0]
    assert (apart[1], together[1]) == (77, 20)


@pytest.mark.parametrize(("wrong", "error"), [(0, ValueError), (-1, ValueError), ("1", TypeError)])
def test_a_number_of_tokens_that_cannot_be(context: mn.Context, wrong: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        context.evaluate([], max_tokens=wrong)


def test_what_cannot_be_evaluated(tiny: mn.Model, context: mn.Context) -> None:
    with pytest.raises(mn.EmptySequenceError):
        context.evaluate([context.sequence()])
    with pytest.raises(TypeError):
        context.evaluate([[1, 2]])  # type: ignore[list-item]
    with tiny.context(**OPTIONS) as other, pytest.raises(ValueError, match="another context"):
        context.evaluate([other.sequence()])


def test_a_thread_gets_in_between_the_pieces_of_a_long_prompt(tiny: mn.Model) -> None:
    options = {**OPTIONS, "n_ctx": 4096, "n_batch": 16}
    with tiny.context(**options) as context:
        long, short = context.sequence(), context.sequence()
        begun, finished = threading.Event(), threading.Event()

        def use() -> None:
            begun.wait(10)
            for token in IDS[:5]:
                short.extend([token])
            finished.set()

        thread = threading.Thread(target=use)
        thread.start()
        n_pieces = 0
        for _ in range(20):  # far more than it takes
            long.truncate(0)
            append_all(long, [token % 200 for token in range(3000)])
            while context.evaluate([long], max_tokens=16):
                begun.set()
                n_pieces += not finished.is_set()
            if finished.is_set():
                break
        thread.join(10)
        assert finished.is_set()
        assert n_pieces < 20 * 187


# Drafts


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("waiting", [0, 1, 5])
def test_the_logits_after_each_token_of_a_draft_take_one_pass(
    load_tiny: Callable[[TinyModel], mn.Model], name: str, waiting: int
) -> None:
    model = load_tiny(KINDS[name])
    with model.context(**OPTIONS) as context:
        sequence = context.sequence()
        sequence.extend(IDS)
        append_all(sequence, OTHER[:waiting])
        calls, text = context.stats.decode_calls, list(sequence)
        rows = sequence.logits_after([5, 6, 7])
        assert context.stats.decode_calls == calls + 1
        assert rows.shape == (4, model.tokenizer.n_vocab)
        assert rows.dtype == np.float32
        assert sequence == [*text, 5, 6, 7]
        for number, row in enumerate(rows):
            assert_same(row, fresh(model, [*text, *[5, 6, 7][:number]]))
        assert np.array_equal(sequence.logits, rows[-1])
        assert context.stats.decode_calls == calls + 1


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("kv_unified", [True, False])
def test_drafts_of_several_sequences_share_a_batch_with_others(
    load_tiny: Callable[[TinyModel], mn.Model], name: str, kv_unified: bool
) -> None:
    model = load_tiny(KINDS[name])
    with model.context(**{**OPTIONS, "n_ctx": 1024, "n_seq": 4, "kv_unified": kv_unified}) as context:
        sequences = [context.sequence() for _ in range(4)]
        texts = [[*IDS, number] for number in range(4)]
        for sequence, text in zip(sequences, texts, strict=True):
            sequence.extend(text)
            sequence.append(9)
            text.append(9)
        _ = sequences[1].logits  # the first row of its draft is known
        long, short, other, prompt = sequences
        prompt.extend(OTHER, evaluate=False)
        texts[3] += OTHER
        calls = context.stats.decode_calls
        drafts = {long: [5, 6, 7], short: [8]}
        found = context.logits_after(drafts, [other, short, prompt], max_tokens=10)
        if model.architecture != "gemma2":  # whose windows are computed apart
            assert context.stats.decode_calls - calls <= 2
        assert [rows.shape for rows in found.values()] == [(4, model.tokenizer.n_vocab), (2, model.tokenizer.n_vocab)]
        for (sequence, rows), text in zip(found.items(), texts, strict=False):
            assert sequence == text + drafts[sequence]
            for number, row in enumerate(rows):
                assert_same(row, fresh(model, text + drafts[sequence][:number]))
            assert_same(sequence.logits, rows[-1])
        assert other.n_waiting == 0 < prompt.n_waiting < len(OTHER)
        for sequence, text in zip(sequences, texts, strict=True):
            if sequence in found:
                sequence.truncate(len(text) + 1)
                text += drafts[sequence][:1]
            assert_same(sequence.logits, fresh(model, text))


def test_a_draft_that_is_cut_off_is_taken_back(tiny: mn.Model) -> None:
    with tiny.context(**OPTIONS) as context:
        one, other = context.sequence(), context.sequence()
        for sequence in (one, other):
            sequence.extend(IDS)
            sequence.append(5)
        found = context.logits_after({one: [6, 7], other: [8, 9]}, max_tokens=5)
        assert list(found) == [one]
        assert other == [*IDS, 5]
        assert_same(other.logits, fresh(tiny, [*IDS, 5]))
        with pytest.raises(mn.Cancelled):
            context.logits_after({other: [8]}, cancel=Always())
        assert other == [*IDS, 5]
        with pytest.raises(mn.ContextFullError):
            context.logits_after({one: [7], other: [5] * 300})
        assert one == [*IDS, 5, 6, 7]
        assert other == [*IDS, 5]
        with pytest.raises(mn.EmptySequenceError):
            context.logits_after({context.sequence(): [5]})
        assert context.logits_after({one: []})[one].shape == (1, tiny.tokenizer.n_vocab)
    with tiny.context(**OPTIONS, on_full="shift") as context, pytest.raises(mn.OptionError, match="on_full='error'"):
        context.logits_after({context.sequence(): [5]})


class Always:
    """A cancel token that is set."""

    def is_set(self) -> bool:
        return True


def test_a_draft_is_verified_and_cut(tiny: mn.Model, context: mn.Context) -> None:
    sequence = context.sequence()
    sequence.extend(IDS)
    rows = sequence.logits_after([5, 6, 7])
    sequence.truncate(len(IDS) + 1)
    assert sequence.extend([9]) == 1
    assert_same(sequence.logits, fresh(tiny, [*IDS, 5, 9]))
    assert len(rows) == 4


@pytest.mark.parametrize("truncate", [False, True])
def test_an_empty_draft_gives_the_logits(tiny: mn.Model, context: mn.Context, truncate: bool) -> None:
    sequence = context.sequence()
    sequence.extend(IDS)
    if truncate:
        sequence.truncate(30)
    rows = sequence.logits_after([])
    assert rows.shape == (1, tiny.tokenizer.n_vocab)
    assert np.array_equal(rows[0], sequence.logits)


def test_the_last_token_is_a_row_of_the_pass_after_a_truncation(tiny: mn.Model, context: mn.Context) -> None:
    sequence = context.sequence()
    sequence.extend(IDS)
    sequence.truncate(30)
    calls = context.stats.decode_calls
    rows = sequence.logits_after([1, 2])
    assert context.stats.decode_calls == calls + 1
    assert_same(rows[0], fresh(tiny, IDS[:30]))
    assert_same(rows[2], fresh(tiny, [*IDS[:30], 1, 2]))


def test_a_draft_longer_than_a_batch(tiny: mn.Model) -> None:
    with tiny.context(**{**OPTIONS, "n_batch": 7}) as context:
        sequence = append_all(context.sequence(), IDS)
        rows = sequence.logits_after(OTHER)
        for number in (0, 1, 6, 7, len(OTHER)):
            assert_same(rows[number], fresh(tiny, [*IDS, *OTHER[:number]]))


def test_an_empty_sequence_has_no_logits_before_a_draft(context: mn.Context) -> None:
    with pytest.raises(mn.EmptySequenceError):
        context.sequence().logits_after([1])


def test_a_draft_that_does_not_fit_changes_nothing(tiny: mn.Model, context: mn.Context) -> None:
    sequence = context.sequence()
    sequence.extend(IDS)
    with pytest.raises(mn.ContextFullError):
        sequence.logits_after([5] * 300)
    assert sequence == IDS
    assert_same(sequence.logits, fresh(tiny, IDS))


def test_a_score_and_what_waits_take_one_pass(context: mn.Context) -> None:
    sequence = context.sequence()
    sequence.extend(IDS)
    append_all(sequence, [1, 2, 3])
    calls = context.stats.decode_calls
    sequence.score(OTHER)
    assert context.stats.decode_calls == calls + 1


# Cancelling one call


class After:
    """A cancel token that is set once it was asked n times."""

    def __init__(self, n: int):
        self.n = n

    def is_set(self) -> bool:
        self.n -= 1
        return self.n < 0


CALLS: dict[str, Callable[[mn.Sequence, Any], object]] = {
    "extend": lambda sequence, token: sequence.extend(OTHER, cancel=token),
    "extend by one": lambda sequence, token: sequence.extend([5], cancel=token),
    "extend together": lambda sequence, token: sequence.context.extend({sequence: OTHER}, cancel=token),
    "assign": lambda sequence, token: sequence.assign(OTHER, cancel=token),
    "score": lambda sequence, token: sequence.score(OTHER, cancel=token),
    "logits after": lambda sequence, token: sequence.logits_after(OTHER, cancel=token),
    "evaluate": lambda sequence, token: sequence.context.evaluate([append_all(sequence, [])], cancel=token),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("n", [0, 1, 2])
def test_a_call_is_cancelled_by_its_own_token(tiny: mn.Model, name: str, n: int) -> None:
    """Before it starts, between batches, and in the middle of a computation."""
    with tiny.context(**OPTIONS) as context:
        sequence = context.sequence()
        sequence.extend(IDS)
        if name == "evaluate":
            sequence.append(7)
        text = list(sequence)
        with pytest.raises(mn.Cancelled):
            CALLS[name](sequence, After(n))
        assert sequence == text
        assert_same(sequence.logits, fresh(tiny, text))
        CALLS[name](sequence, threading.Event())


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_waits_for_its_turn_is_cancelled_at_once(context: mn.Context, name: str) -> None:
    sequence, busy = context.sequence(), context.sequence()
    sequence.extend(IDS)
    token, waits, leaves = threading.Event(), threading.Event(), threading.Event()
    outcome: list[object] = []

    def wait_in_the_queue() -> None:
        waits.set()
        try:
            CALLS[name](sequence, token)
        except mn.Cancelled as error:
            outcome.append(error)
        leaves.set()

    thread = threading.Thread(target=wait_in_the_queue)

    def be_slow(done: int, total: int) -> None:
        thread.start()
        assert waits.wait(10)
        assert not leaves.wait(0.05)
        token.set()
        assert leaves.wait(10)  # while this call is still inside

    assert busy.extend(OTHER, on_progress=be_slow) == len(OTHER)
    thread.join(10)
    assert len(outcome) == 1
    assert sequence == IDS


def test_a_token_does_not_concern_the_calls_of_others(context: mn.Context) -> None:
    sequence, other = context.sequence(), context.sequence()
    with pytest.raises(mn.Cancelled):
        sequence.extend(IDS, cancel=After(2))
    assert other.extend(OTHER) == len(OTHER)


@pytest.mark.parametrize("wrong", [True, 1, "now", object()])
def test_a_token_that_is_none(context: mn.Context, wrong: Any) -> None:
    sequence = context.sequence()
    with pytest.raises(TypeError, match="is_set"):
        sequence.extend(IDS, cancel=wrong)
    assert sequence == []


def test_a_prompt_that_generate_evaluates_can_be_cancelled(tiny: mn.Model, context: mn.Context) -> None:
    sequence = append_all(context.sequence(), IDS)
    steps = mn.generate(sequence, cancel=After(1), max_tokens=5)
    with pytest.raises(mn.Cancelled):
        next(steps)
    assert sequence == IDS
    assert_same(sequence.logits, fresh(tiny, IDS))


# What cells depend on


def set_control_vector(cache: KVCache, seed: int | None) -> None:
    """Set a control vector by libllama's call, or none."""
    n_embd, n_layer = cache.runner.model.n_embd, cache.runner.model.n_layer
    size = n_embd * (n_layer - 1) if seed is not None else 0
    data = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    array = ffi.from_buffer("float[]", data) if size else ffi.NULL
    assert lib.llama_set_adapter_cvec(cache.handle.pointer, array, size, n_embd, 1, n_layer - 1) == 0


def test_cells_are_shared_under_the_same_control_vector_alone(tiny: mn.Model, tmp_path: Path) -> None:
    def with_vector(ids: list[int]) -> Logits:
        context, cache = open_up(tiny, **OPTIONS)
        with context:
            set_control_vector(cache, 1)
            sequence = context.sequence()
            sequence.extend(ids)
            return sequence.logits

    steered, plain = with_vector(IDS), fresh(tiny, IDS)
    assert np.abs(steered - plain).max() > 0.1
    context, cache = open_up(tiny, **OPTIONS)
    with context:
        before = context.sequence()
        before.extend(IDS)
        before.save(tmp_path / "plain")
        cache.rekey(ReuseKey(control_vector="one"))
        set_control_vector(cache, 1)
        after = context.sequence()
        assert after.extend(IDS) == len(IDS)
        assert_same(after.logits, steered)
        assert_same(before.logits, steered)  # what is there is re-evaluated
        with pytest.raises(mn.StateError, match="control_vector"):
            context.restore(tmp_path / "plain")
        before.close()
        after.close()
        cache.rekey(ReuseKey())
        set_control_vector(cache, None)
        again = context.sequence()
        assert again.extend([*IDS, 1]) == 1  # from before the vector
        assert_same(again.logits, fresh(tiny, [*IDS, 1]))
        assert context.restore(tmp_path / "plain") == IDS


def test_what_was_changed_through_raw_is_not_mixed_with_what_was_cached(tiny: mn.Model, tmp_path: Path) -> None:
    context, cache = open_up(tiny, **OPTIONS)
    with context:
        sequence, closed = context.sequence(), context.sequence()
        sequence.extend(IDS)
        closed.extend(OTHER)
        closed.close()
        sequence.save(tmp_path / "saved")
        plain = sequence.logits
        with context.raw() as pointer:
            assert pointer == cache.handle.pointer
            set_control_vector(cache, 1)
        assert sequence == IDS
        assert np.abs(sequence.logits - plain).max() > 0.1
        assert context.sequence().extend(OTHER) == len(OTHER)
        with pytest.raises(mn.StateError, match="raw"):
            context.restore(tmp_path / "saved")


def test_nothing_else_may_use_the_context_within_raw(context: mn.Context) -> None:
    sequence = context.sequence()
    with context.raw(), pytest.raises(mn.ReentryError):
        sequence.append(1)
    sequence.append(1)


def test_a_model_lends_its_pointer(tiny: mn.Model) -> None:
    with tiny.raw() as pointer:
        assert lib.llama_model_n_embd(pointer) == tiny.n_embd


# Errors that carry data


def test_a_full_context_says_how_many_cells_are_needed_and_free(context: mn.Context) -> None:
    sequence = context.sequence()
    sequence.extend([5] * 200)
    with pytest.raises(mn.ContextFullError) as caught:
        sequence.extend([6] * 57)
    assert (caught.value.needed, caught.value.available) == (57, 56)


def test_the_number_printed_is_the_one_that_was_given(tiny: mn.Model) -> None:
    with tiny.context(**{**OPTIONS, "kv_unified": False}) as context:
        with pytest.raises(mn.ContextFullError, match=r"64 \(n_ctx=256 for n_seq=4\)") as caught:
            context.sequence().extend([5] * 65)
        assert (caught.value.needed, caught.value.available) == (65, 64)


def test_errors_are_told_apart_by_class(tiny: mn.Model, context: mn.Context) -> None:
    for token in range(4):
        held = context.sequence()
        held.pinned = True
        held.append(token)
        _ = held.logits
        held.close()
    with pytest.raises(mn.SequencesInUseError):
        context.sequence()
    with pytest.raises(mn.OptionError):
        tiny.context(kv_type="q8_0", flash_attention="off")
    with tiny.context(**OPTIONS) as other:
        for error in (mn.EmptySequenceError, mn.ContextError, ValueError):
            with pytest.raises(error):
                _ = other.sequence().logits
            with pytest.raises(error):
                mn.generate(other.sequence())


def test_a_decode_that_fails_says_what_libllama_says(tiny: mn.Model, opened: tuple[mn.Context, KVCache]) -> None:
    context, cache = opened
    sequence = context.sequence()
    sequence.extend(IDS)
    lib.llama_memory_seq_rm(lib.llama_get_memory(cache.handle.pointer), 0, 5, -1)  # behind the engine's back
    with pytest.raises(mn.DecodeError, match="inconsistent sequence positions") as caught:
        sequence.extend(OTHER)
    assert caught.value.code == -1
    assert sequence == IDS
    sequence.extend([1])
    assert_same(sequence.logits, fresh(tiny, [*IDS, 1]))


# Options


def test_the_options_in_force_can_be_read_and_not_written(tiny: mn.Model) -> None:
    with tiny.context(n_ctx=100, n_batch=2048, kv_type="q8_0", flash_attention=True) as context:
        options = context.options
        assert (options.n_ctx, options.n_batch, options.kv_type) == (100, 100, ("q8_0", "q8_0"))
        assert (options.flash_attention, options.n_threads) == ("on", 1)
        for thing in (context, options):
            with pytest.raises(AttributeError):
                thing.n_ctx = 5  # type: ignore[misc]


def test_a_context_can_be_made_from_options(tiny: mn.Model) -> None:
    with mn.Context(tiny, mn.ContextOptions(n_ctx=64, n_seq=2)) as context:
        assert (context.n_ctx, context.n_seq) == (64, 2)


def test_the_keywords_of_a_context_are_those_of_its_options() -> None:
    own = list(inspect.signature(mn.Model.context).parameters)
    assert own == ["self", *inspect.signature(mn.ContextOptions).parameters]


def test_without_a_size_a_context_is_as_long_as_the_models_training(tiny: mn.Model) -> None:
    with tiny.context(n_ctx=0, n_threads=1) as context:
        assert context.n_ctx == context.options.n_ctx == tiny.n_ctx_train
    with tiny.context(n_ctx=0, n_seq=2, kv_unified=False, n_threads=1) as context:
        assert context.options.n_cells == tiny.n_ctx_train // 2


def test_a_context_with_yarn_leaves_what_the_model_says_of_itself(tiny: mn.Model) -> None:
    before = tiny.n_ctx_train
    with tiny.context(n_ctx=64, rope_scaling_type="yarn", rope_freq_scale=0.5, yarn_orig_ctx=32) as context:
        assert tiny.n_ctx_train == before
        assert context.options.rope["yarn_orig_ctx"] == 32


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"rope_scaling_type": "magic"}, ValueError, "rope_scaling_type must be one of none, linear, yarn, longrope"),
        ({"rope_freq_base": 0}, ValueError, "rope_freq_base must be more than 0"),
        ({"rope_freq_scale": -0.5}, ValueError, "rope_freq_scale must be more than 0"),
        ({"yarn_ext_factor": -1.0}, ValueError, "yarn_ext_factor must be 0 or more"),
        ({"yarn_beta_fast": float("inf")}, ValueError, "yarn_beta_fast must be 0 or more"),
        ({"yarn_attn_factor": "1"}, TypeError, "yarn_attn_factor must be a number"),
        ({"yarn_orig_ctx": 0}, ValueError, "yarn_orig_ctx"),
        ({"n_threads_batch": 0}, ValueError, "n_threads_batch"),
        ({"n_ctx": 1}, ValueError, "n_ctx must be 0"),
    ],
)
def test_options_that_cannot_be(tiny: mn.Model, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        tiny.context(**options)


def test_the_number_of_threads_can_be_changed(demo: mn.Model) -> None:
    ids, folder = demo.tokenizer.encode("Once upon a time"), Path("/proc/self/task")
    with demo.context(n_ctx=64, n_threads=1, n_threads_batch=2, prefix_cache=False) as context:
        assert (context.n_threads, context.n_threads_batch) == (1, 2)
        with context.sequence() as sequence:
            sequence.extend(ids)
            expected = sequence.logits
        before = len(list(folder.iterdir())) if folder.exists() else 0
        for n, batch in ((2, None), (1, 4), (3, 1), (6, 6), (1, 1)):
            context.set_threads(n, batch)
            assert (context.n_threads, context.n_threads_batch) == (n, n if batch is None else batch)
            assert context.options.n_threads == n
            with context.sequence() as sequence:
                sequence.extend(ids[:-1])
                sequence.extend(ids[-1:])
                assert np.abs(sequence.logits - expected).max() < 1e-2 * np.abs(expected).max()
        for wrong, error in ((0, ValueError), (10**6, ValueError), ("2", TypeError)):
            with pytest.raises(error, match="n_threads"):
                context.set_threads(wrong)  # type: ignore[arg-type]
        assert (context.n_threads, context.n_threads_batch) == (1, 1)
    if before:
        assert len(list(folder.iterdir())) < before  # all teams are gone, those that were replaced too
    with pytest.raises(mn.ClosedError):
        context.set_threads(2)


# Queries


def test_looking_changes_nothing(opened: tuple[mn.Context, KVCache]) -> None:
    context, cache = opened
    gone, closed, sequence = context.sequence(), context.sequence(), context.sequence()
    gone.extend(IDS)
    closed.extend(OTHER)
    closed.close()
    sequence.extend([1, 2, 3])
    del gone
    gc.collect()
    before = (list(cache.pool.open), list(cache.pool.finished), cache.pool.spare)
    assert context.cells_used == 3
    assert not context.is_full
    assert not sequence.is_full
    assert sequence.size_bytes > 0
    assert (list(cache.pool.open), list(cache.pool.finished), cache.pool.spare) == before


def test_what_memory_can_do_is_read_only(context: mn.Context) -> None:
    assert not {"clear", "copy", "remove", "write", "shift"} & set(dir(context.memory))
    with pytest.raises(AttributeError):
        context.memory.can_shift = False  # type: ignore[misc]


# Two corruptions that no test saw


def test_cells_are_counted_right_after_a_shift_beyond_a_shared_prefix(context: mn.Context) -> None:
    sequence = context.sequence()
    sequence.extend(IDS)
    fork = sequence.fork(20)
    sequence.shift(10, 10)
    assert (len(sequence), len(fork)) == (30, 20)
    assert context.cells_used == 40  # ten of them shared


# Callbacks that do more than they were asked for


def test_a_failed_call_leaves_a_list_that_a_callback_has_rewritten(tiny: mn.Model) -> None:
    def rewrite(sequence: mn.Sequence, lacking: int) -> None:
        one.truncate(10)
        one.extend(OTHER[:20])

    with tiny.context(**{**OPTIONS, "n_ctx": 64}, on_full=rewrite) as context:
        one, other = context.sequence(), context.sequence()
        context.extend({one: IDS[:20], other: OTHER[:20]})
        _ = one.logits
        with pytest.raises(mn.ContextFullError):
            context.extend({one: IDS[20:25], other: list(range(150, 200))})
        assert one == [*IDS[:10], *OTHER[:20]]
        assert_same(one.logits, fresh(tiny, list(one)))


def test_progress_that_rewrites_a_list_and_fails_leaves_the_logits_of_what_is_there(tiny: mn.Model) -> None:
    with tiny.context(**{**OPTIONS, "n_batch": 8}) as context:
        sequence = context.sequence()
        sequence.extend(IDS[:20])
        other = context.sequence()
        other.extend([1])  # which has the logits before copied out of libllama's buffer

        def rewrite(done: int, total: int) -> None:
            sequence.truncate(10)
            sequence.extend(OTHER[:20])
            raise InterruptedError

        with pytest.raises(InterruptedError):
            sequence.extend(IDS[20:40], on_progress=rewrite)
        assert_same(sequence.logits, fresh(tiny, list(sequence)))


def test_a_draft_has_its_first_row_although_on_full_evaluated_the_sequence(tiny: mn.Model) -> None:
    def make_room(full: mn.Sequence, lacking: int) -> None:
        fork.close()
        _ = full.logits

    with tiny.context(**{**OPTIONS, "n_ctx": 64}, on_full=make_room) as context:
        sequence = context.sequence()
        sequence.extend(list(range(50)))
        fork = sequence.fork()
        sequence.truncate(49)
        rows = sequence.logits_after(OTHER[:14])
        for number in (0, 1, 14):
            assert_same(rows[number], fresh(tiny, [*range(49), *OTHER[:number]]))


def test_a_draft_after_a_list_that_on_full_has_emptied_has_no_first_row(tiny: mn.Model) -> None:
    with tiny.context(**{**OPTIONS, "n_ctx": 64}, on_full=lambda full, lacking: full.truncate(0)) as context:
        sequence = context.sequence()
        sequence.extend(list(range(60)))
        rows = sequence.logits_after(OTHER[:10])
        assert np.isnan(rows[0]).all()
        assert_same(rows[10], fresh(tiny, OTHER[:10]))


@pytest.mark.parametrize("pinned", [False, True])
def test_a_cancelled_evaluation_leaves_its_cells_to_others(context: mn.Context, pinned: bool) -> None:
    sequence = context.sequence()
    sequence.extend(IDS)
    sequence.pinned = pinned
    append_all(sequence, OTHER)
    with pytest.raises(mn.Cancelled):
        context.evaluate([sequence], cancel=After(2))  # in the middle of the computation
    sequence.close()
    assert context.sequence().extend([*IDS, 3]) == 1


@pytest.mark.parametrize("how", ["cells of its own", "abandoned", "on_full"])
def test_an_assignment_without_a_prefix_cache_takes_the_room_that_there_is(tiny: mn.Model, how: str) -> None:
    held: list[mn.Sequence] = []
    options: dict[str, Any] = {**OPTIONS, "n_ctx": 100, "n_seq": 2, "prefix_cache": False}
    if how == "cells of its own":
        options |= {"n_ctx": 256, "kv_unified": False}
    elif how == "on_full":
        options["on_full"] = lambda full, lacking: held[0].close()
    with tiny.context(**options) as context:
        held.append(context.sequence())
        sequence = context.sequence()
        held[0].extend(list(range(100 if how == "cells of its own" else 60)))
        sequence.extend(IDS[:30])
        if how == "abandoned":
            held.clear()
            gc.collect()
        text = [*IDS[:20], *range(100, 140)]
        sequence.assign(text)
        assert sequence == text
        assert_same(sequence.logits, fresh(tiny, text))


def test_undoing_an_assignment_takes_no_cells_of_another_key(tiny: mn.Model) -> None:
    def make_room(full: mn.Sequence, lacking: int) -> None:
        cache.rekey(ReuseKey(control_vector="one"))
        set_control_vector(cache, 1)

    context, cache = open_up(tiny, **{**OPTIONS, "n_ctx": 64}, on_full=make_room)
    with context:
        sequence = context.sequence()
        sequence.extend(IDS)
        plain = sequence.logits
        with pytest.raises(mn.ContextFullError):
            sequence.assign([5] * 100)
        assert sequence == IDS
        assert np.abs(sequence.logits - plain).max() > 0.1
