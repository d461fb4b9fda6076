"""What the KV cache saves: forks, shared prefixes, shifts, checkpoints, a full context. Work is counted, not timed."""

import threading
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import minerva_native as mn
from engine_room import open_up
from minerva_native._binding import lib
from minerva_native.engine.cache import KVCache
from minerva_native.engine.memory import Cells
from minerva_native.engine.pool import count_cells
from minerva_native.engine.slot import Slot, clipped, common_prefix
from minerva_native.sequence import slot_of
from tiny_models import TinyModel

Logits = npt.NDArray[np.float32]

IDS = list(range(20, 60))
OTHER = list(range(100, 130))
MAMBA, JAMBA, GEMMA = TinyModel("mamba"), TinyModel("jamba"), TinyModel("gemma2", tied=True)
RWKV, LFM = TinyModel("rwkv7"), TinyModel("lfm2", n_layer=4)  # LFM is a hybrid with a sliding window

Load = Callable[[TinyModel], mn.Model]


OPTIONS = {"n_ctx": 256, "n_seq": 4, "n_threads": 1, "kv_type": "f32", "flash_attention": "off"}


def make(model: mn.Model, **options: object) -> mn.Context:
    return model.context(**{**OPTIONS, **options})  # type: ignore[arg-type]


def make_open(model: mn.Model, **options: object) -> tuple[mn.Context, KVCache]:
    return open_up(model, **{**OPTIONS, **options})


@pytest.fixture
def context(tiny: mn.Model) -> Iterator[mn.Context]:
    with make(tiny) as context:
        yield context


@pytest.fixture
def sequence(context: mn.Context) -> mn.Sequence:
    return context.sequence()


def fresh(model: mn.Model, ids: list[int]) -> Logits:
    with make(model) as context:
        sequence = context.sequence()
        sequence.extend(ids)
        return sequence.logits


def assert_same(logits: Logits, expected: Logits) -> None:
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-3 * np.abs(expected).max())


def evaluated_by(context: mn.Context, action: Callable[[], object]) -> int:
    before = context.stats.tokens_evaluated
    action()
    return context.stats.tokens_evaluated - before


# Reading tokens


def test_a_sequence_reads_like_a_list(sequence: mn.Sequence) -> None:
    sequence.extend(IDS)
    assert list(sequence) == IDS
    assert (sequence[0], sequence[-1]) == (IDS[0], IDS[-1])
    assert sequence[3:6] == IDS[3:6]
    assert sequence[::-1] == IDS[::-1]
    assert IDS[7] in sequence
    assert sequence.index(IDS[7]) == 7
    with pytest.raises(IndexError):
        _ = sequence[len(IDS)]


def test_sequences_with_the_same_tokens_are_equal(context: mn.Context, sequence: mn.Sequence) -> None:
    other = context.sequence()
    sequence.extend(IDS)
    other.extend(IDS)
    assert sequence == other == IDS
    other.append(1)
    assert sequence != other
    assert {sequence: 1, other: 2}[sequence] == 1


# Forks


@pytest.mark.parametrize("n", [0, 1, 17, len(IDS), None])
def test_a_fork_costs_no_evaluation_and_no_cell(context: mn.Context, sequence: mn.Sequence, n: int | None) -> None:
    sequence.extend(IDS)
    used = context.cells_used
    assert evaluated_by(context, lambda: sequence.fork(n)) == 0
    assert sequence.fork(n) == IDS[:n]
    assert context.cells_used == used == len(IDS)


def test_a_fork_of_a_whole_sequence_has_its_logits_without_evaluation(
    context: mn.Context, sequence: mn.Sequence
) -> None:
    sequence.extend(IDS)
    fork = sequence.fork()
    assert evaluated_by(context, lambda: fork.logits) == 0
    assert np.array_equal(fork.logits, sequence.logits)


def test_forks_are_independent_of_each_other(tiny: mn.Model, context: mn.Context, sequence: mn.Sequence) -> None:
    sequence.extend(IDS)
    forks = [sequence.fork(), sequence.fork(20)]
    sequence.extend([1])
    for number, fork in enumerate(forks):
        assert evaluated_by(context, lambda fork=fork, number=number: fork.extend([number + 2])) == 1  # type: ignore[misc]
    assert_same(sequence.logits, fresh(tiny, [*IDS, 1]))
    assert_same(forks[0].logits, fresh(tiny, [*IDS, 2]))
    assert_same(forks[1].logits, fresh(tiny, [*IDS[:20], 3]))
    assert context.cells_used == len(IDS) + 3


def test_a_fork_outlives_its_source(tiny: mn.Model, context: mn.Context, sequence: mn.Sequence) -> None:
    sequence.extend(IDS)
    fork = sequence.fork(30)
    sequence.truncate(0)
    sequence.close()
    context.clear_cache()
    assert context.cells_used == 30
    assert_same(fork.logits, fresh(tiny, IDS[:30]))


def test_waiting_tokens_are_forked_too(tiny: mn.Model, context: mn.Context, sequence: mn.Sequence) -> None:
    sequence.extend(IDS)
    sequence.append(7)
    fork = sequence.fork()
    assert fork == [*IDS, 7]
    assert evaluated_by(context, lambda: fork.logits) == 1
    assert_same(fork.logits, fresh(tiny, [*IDS, 7]))


def test_a_fork_counts_against_n_seq(sequence: mn.Sequence) -> None:
    sequence.extend(IDS)
    forks = [sequence.fork() for _ in range(3)]
    with pytest.raises(mn.ContextError, match="all 4 sequences"):
        sequence.fork()
    forks[0].close()
    sequence.fork()


@pytest.mark.parametrize("n", [-1, len(IDS) + 1])
def test_a_fork_out_of_range(sequence: mn.Sequence, n: int) -> None:
    sequence.extend(IDS)
    with pytest.raises(ValueError, match="from 0 to the sequence's length 40"):
        sequence.fork(n)


def test_parallel_continuations_share_the_cells_of_their_prompt(tiny: mn.Model) -> None:
    with make(tiny, n_seq=9, n_ctx=len(IDS) + 8 * 5) as context:
        prompt = context.sequence()
        prompt.extend(IDS)
        forks = [prompt.fork() for _ in range(8)]
        for step in range(5):
            assert context.extend({fork: [number + step] for number, fork in enumerate(forks)}) == 8
        assert context.stats.tokens_evaluated == len(IDS) + 8 * 5
        assert context.stats.decode_calls == 1 + 5
        assert context.is_full
        for number, fork in enumerate(forks):
            assert_same(fork.logits, fresh(tiny, [*IDS, *range(number, number + 5)]))


# Several sequences in one batch


def test_sequences_extended_together_equal_sequences_extended_alone(tiny: mn.Model) -> None:
    texts = [IDS, OTHER, IDS[:3], [5]]
    with make(tiny, n_batch=16) as context:
        sequences = [context.sequence() for _ in texts]
        wanted = dict(zip(sequences, texts, strict=True))
        reports: list[tuple[int, int]] = []
        total = sum(map(len, texts))
        assert context.extend(wanted, on_progress=lambda done, of: reports.append((done, of))) == total
        assert reports[-1] == (total, total)
        assert context.stats.decode_calls == -(-total // 16)
        assert evaluated_by(context, lambda: [sequence.logits for sequence in sequences]) == 0
        for sequence, text in wanted.items():
            assert sequence == text
            assert_same(sequence.logits, fresh(tiny, text))


def test_an_interrupted_batch_of_one_token_each_is_rolled_back(tiny: mn.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    context, cache = make_open(tiny)
    sequences = [context.sequence(), context.sequence()]
    context.extend(dict(zip(sequences, [IDS, OTHER], strict=True)))
    decode_each = cache.runner.decode_each

    def decode_and_be_interrupted(*arguments: Any) -> int:
        decode_each(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cache.runner, "decode_each", decode_and_be_interrupted)
        context.extend({sequence: [5] for sequence in sequences})
    assert sequences == [IDS, OTHER]
    assert context.extend({sequence: [7] for sequence in sequences}) == 2
    for sequence, text in zip(sequences, [IDS, OTHER], strict=True):
        assert_same(sequence.logits, fresh(tiny, [*text, 7]))


def test_if_one_text_does_not_fit_none_is_added(context: mn.Context) -> None:
    one, other = context.sequence(), context.sequence()
    one.extend(IDS)
    logits = one.logits
    with pytest.raises(mn.ContextFullError, match="are used"):
        context.extend({one: OTHER, other: [6] * 200})
    assert one == IDS
    assert other == []
    assert_same(one.logits, logits)


def test_a_sequence_of_another_context_is_refused(tiny: mn.Model, context: mn.Context) -> None:
    with make(tiny) as stranger, pytest.raises(ValueError, match="another context"):
        context.extend({stranger.sequence(): [1]})


def test_extending_by_nothing_evaluates_nothing(context: mn.Context, sequence: mn.Sequence) -> None:
    assert context.extend({}) == context.extend({sequence: []}) == 0
    sequence.extend(IDS)
    assert context.extend({}) == 0


@pytest.mark.parametrize("on_full", ["shift", "truncate"])
def test_a_sequence_changed_by_on_full_does_not_keep_its_old_logits(tiny: mn.Model, on_full: str) -> None:
    def truncate(full: mn.Sequence, lacking: int) -> None:
        if full is one:
            full.truncate(10)

    with make(tiny, n_ctx=32, n_seq=2, on_full=truncate if on_full == "truncate" else "shift") as context:
        one, other = context.sequence(), context.sequence()
        context.extend({one: IDS[:20], other: [5, 6, 7, 8]})
        _ = one.logits
        with pytest.raises(mn.ContextFullError):
            context.extend({one: OTHER[: 10 if on_full == "truncate" else 24], other: [9] * 100})
        assert len(one) == (10 if on_full == "truncate" else 4)
        assert_same(one.logits, fresh(tiny, list(one)))


# Reuse


def test_a_chat_evaluates_every_token_once(context: mn.Context, sequence: mn.Sequence) -> None:
    chat: list[int] = []
    for turn in range(20):
        chat += [turn * 5 % 200 + token for token in range(6)]
        sequence.assign(chat)
        for _ in range(4):
            chat.append(int(sequence.logits.argmax()))
            sequence.append(chat[-1])
    _ = sequence.logits
    assert sequence == chat
    assert context.stats.tokens_evaluated == len(chat) == 200


def test_a_chat_with_a_new_sequence_every_turn_evaluates_every_token_once(context: mn.Context) -> None:
    chat: list[int] = []
    for turn in range(20):
        chat += [turn * 5 % 200 + token for token in range(6)]
        with context.sequence() as sequence:
            sequence.extend(chat)
    assert context.stats.tokens_evaluated == len(chat) == 120
    assert context.stats.tokens_reused == sum(range(0, 120, 6))


@pytest.mark.parametrize("n_seq", [2, 4])
def test_switching_conversations_evaluates_nothing_twice(tiny: mn.Model, n_seq: int) -> None:
    with make(tiny, n_seq=n_seq) as context:
        sequence = context.sequence()
        assert sequence.assign(IDS) == len(IDS)
        assert sequence.assign(OTHER) == len(OTHER)
        assert sequence.assign(IDS) == 0
        assert evaluated_by(context, lambda: sequence.logits) == 0
        assert_same(sequence.logits, fresh(tiny, IDS))
        assert sequence.assign([*OTHER, 1, 2]) == 2
        assert_same(sequence.logits, fresh(tiny, [*OTHER, 1, 2]))


def test_switching_between_closed_conversations_evaluates_nothing_twice(tiny: mn.Model, context: mn.Context) -> None:
    for text, new in ((IDS, len(IDS)), (OTHER, len(OTHER)), (IDS, 0), ([*OTHER, 1], 1), ([*IDS, 2, 3], 2)):
        with context.sequence() as sequence:
            assert evaluated_by(context, lambda sequence=sequence, text=text: sequence.extend(text)) == new  # type: ignore[misc]
            assert_same(sequence.logits, fresh(tiny, text))


def test_a_context_of_one_sequence_reuses_a_prefix_too(tiny: mn.Model) -> None:
    with make(tiny, n_seq=1) as context:
        context.sequence().extend(IDS)
        again = context.sequence()
        assert again.extend([*IDS[:30], 1]) == 1
        assert_same(again.logits, fresh(tiny, [*IDS[:30], 1]))


def test_an_edit_in_the_middle_evaluates_from_the_edit(
    tiny: mn.Model, context: mn.Context, sequence: mn.Sequence
) -> None:
    sequence.extend(IDS)
    edited = [*IDS[:25], 1, *IDS[26:]]
    assert sequence.assign(edited) == len(IDS) - 25
    assert context.stats.tokens_reused == 25
    assert_same(sequence.logits, fresh(tiny, edited))


def test_assigning_a_prefix_evaluates_nothing(context: mn.Context, sequence: mn.Sequence) -> None:
    sequence.extend(IDS)
    assert sequence.assign(IDS[:10]) == 0
    assert sequence == IDS[:10]
    assert sequence.assign([]) == 0
    assert sequence == []


@pytest.mark.parametrize("wrong", [[1, 2, -1], [*IDS[:5], *[6] * 300]], ids=["no token", "too long"])
def test_an_assignment_that_fails_changes_nothing(tiny: mn.Model, sequence: mn.Sequence, wrong: list[int]) -> None:
    sequence.extend(IDS)
    with pytest.raises((ValueError, mn.ContextFullError)):
        sequence.assign(wrong)
    assert sequence == IDS
    assert_same(sequence.logits, fresh(tiny, IDS))


def test_scoring_after_an_interrupted_assignment(
    tiny: mn.Model, sequence: mn.Sequence, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence.extend(IDS)
    _ = sequence.logits
    take = Slot.take

    def take_and_be_interrupted(slot: Slot, other: Slot, n: int) -> None:
        take(slot, other, n)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Slot, "take", take_and_be_interrupted)
        sequence.assign(OTHER)
    assert sequence == IDS
    sequence.score([1, 2])
    assert_same(sequence.logits, fresh(tiny, [*IDS, 1, 2]))


def test_a_prefix_of_an_open_sequence_is_shared(tiny: mn.Model, context: mn.Context) -> None:
    one, other = context.sequence(), context.sequence()
    one.extend(IDS)
    assert other.extend([*IDS[:30], 1, 2]) == 2
    assert context.cells_used == len(IDS) + 2
    assert_same(other.logits, fresh(tiny, [*IDS[:30], 1, 2]))


def test_shifted_tokens_are_not_a_prefix_for_other_sequences(
    tiny: mn.Model, context: mn.Context, sequence: mn.Sequence
) -> None:
    sequence.extend(IDS)
    sequence.shift(4, 10)
    other = context.sequence()
    text = [*IDS[:4], *IDS[14:]]
    assert other.extend(text) == len(text) - 4
    assert_same(other.logits, fresh(tiny, text))


def test_without_a_prefix_cache_everything_is_evaluated(tiny: mn.Model) -> None:
    with make(tiny, prefix_cache=False) as context:
        for _ in range(3):
            with context.sequence() as sequence:
                assert sequence.extend(IDS) == len(IDS)
        assert context.stats.tokens_reused == 0


def test_nothing_is_reused_after_clear_cache(context: mn.Context) -> None:
    context.sequence().extend(IDS)
    context.clear_cache()
    assert context.sequence().extend(IDS) == len(IDS)


def test_closed_sequences_are_evicted_oldest_first(tiny: mn.Model) -> None:
    with make(tiny, n_ctx=100, n_seq=8) as context:
        for text in (IDS, OTHER):
            with context.sequence() as sequence:
                sequence.extend(text)
        assert context.cells_used == 0
        with context.sequence() as sequence:
            assert sequence.extend([6] * 60) == 60  # evicts the first
        assert evaluated_by(context, lambda: context.sequence().extend([*OTHER, 1])) == 1
        context.clear_cache()
        assert evaluated_by(context, lambda: context.sequence().extend(IDS)) == len(IDS)


def test_closed_sequences_are_evicted_when_ids_run_out(tiny: mn.Model) -> None:
    with make(tiny, n_seq=2) as context:
        for first in range(6):
            context.sequence().extend([first, 1, 2, 3])
        assert context.sequence().extend([5, 1, 2, 3, 4]) == 1
        assert context.sequence().extend([2, 1, 2, 3, 4]) == 5


def test_a_pinned_sequence_is_not_evicted(tiny: mn.Model) -> None:
    with make(tiny, n_ctx=100, n_seq=3) as context:
        with context.sequence() as system:
            system.extend(IDS)
            system.pinned = True
        assert context.cells_used == len(IDS)
        for first in range(5):
            with context.sequence() as sequence:
                assert sequence.extend([*IDS, *[first] * 50]) == 50
        two = context.sequence(), context.sequence()
        with pytest.raises(mn.ContextError, match="all 3 sequences"):
            context.sequence()
        with pytest.raises(mn.ContextFullError, match="40 of n_ctx=100 cells are used, 61 more are wanted"):
            two[0].extend([9] * 61)
        context.clear_cache(pinned=True)
        assert context.cells_used == 0
        context.sequence()


# Shifts


def test_a_shift_evaluates_nothing_and_frees_cells(context: mn.Context, sequence: mn.Sequence) -> None:
    sequence.extend(IDS)
    logits = sequence.logits
    assert evaluated_by(context, lambda: sequence.shift(4, 10)) == 0
    assert sequence == [*IDS[:4], *IDS[14:]]
    assert context.cells_used == len(IDS) - 10
    assert np.array_equal(sequence.logits, logits)
    assert evaluated_by(context, lambda: sequence.extend([1, 2])) == 2
    assert context.stats.tokens_discarded == 10


def test_a_shift_to_the_end_is_a_truncation(tiny: mn.Model, sequence: mn.Sequence) -> None:
    sequence.extend(IDS)
    sequence.shift(10, 30)
    assert sequence == IDS[:10]
    assert_same(sequence.logits, fresh(tiny, IDS[:10]))


@pytest.mark.parametrize("keep", [10, 35, 41])
def test_waiting_tokens_are_shifted_too(tiny: mn.Model, sequence: mn.Sequence, keep: int) -> None:
    sequence.extend(IDS)
    for token in range(5):
        sequence.append(token)
    sequence.shift(keep, 3)
    text = [*IDS, *range(5)]
    del text[keep : keep + 3]
    assert sequence == text
    if keep == 41:  # no evaluated token is discarded or moved
        assert_same(sequence.logits, fresh(tiny, text))


def test_a_shift_leaves_no_checkpoint_of_discarded_tokens(load_tiny: Load) -> None:
    with make(load_tiny(MAMBA), checkpoint_interval=10) as context:
        sequence = context.sequence()
        sequence.extend(IDS)
        for token in range(5):
            sequence.append(token)
        sequence.shift(10, 32)  # all evaluated tokens after the tenth, and some that wait
        text = [*IDS[:10], 2, 3, 4]
        assert sequence == text
        sequence.extend(OTHER)
        sequence.truncate(41)
        assert_same(sequence.logits, fresh(load_tiny(MAMBA), [*text, *OTHER][:41]))


@pytest.mark.parametrize(("keep", "discard"), [(-1, 2), (0, -1), (39, 2), (41, 0)])
def test_a_shift_outside_the_sequence(sequence: mn.Sequence, keep: int, discard: int) -> None:
    sequence.extend(IDS)
    with pytest.raises(ValueError, match="there are 40"):
        sequence.shift(keep, discard)


def test_a_shift_does_not_change_sequences_that_share_its_cells(tiny: mn.Model, sequence: mn.Sequence) -> None:
    sequence.extend(IDS)
    fork = sequence.fork()
    sequence.shift(4, 10)
    sequence.extend([1])
    fork.extend([2])
    assert_same(fork.logits, fresh(tiny, [*IDS, 2]))
    with make(tiny) as context:
        alone = context.sequence()
        alone.extend(IDS)
        alone.shift(4, 10)
        alone.extend([1])
        assert_same(sequence.logits, alone.logits)


def test_a_shift_of_shared_cells_needs_room(tiny: mn.Model) -> None:
    with make(tiny, n_ctx=50) as context:
        sequence = context.sequence()
        sequence.extend(IDS)
        fork = sequence.fork()
        with pytest.raises(mn.ContextFullError):
            fork.shift(4, 10)
        assert fork == sequence == IDS
        assert_same(fork.logits, fresh(tiny, IDS))


def test_shifting_a_memory_that_cannot_shift_is_an_error(load_tiny: Load) -> None:
    with make(load_tiny(GEMMA), n_ctx=1024, swa_full=False) as context:
        assert not context.memory.can_shift
        sequence = context.sequence()
        sequence.extend(IDS)
        with pytest.raises(mn.ContextError, match=r"sliding window, kv_type=.* cannot shift"):
            sequence.shift(4, 10)
        assert sequence == IDS


def test_a_failed_decode_that_may_have_begun_a_shift_leads_to_re_evaluation(
    tiny: mn.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of the keys may be rotated already, so none of them is used, nor those of a fork."""
    context, cache = make_open(tiny)
    sequence, other = context.sequence(), context.sequence()
    sequence.extend(IDS)
    sequence.shift(4, 10)
    fork = sequence.fork()
    with monkeypatch.context() as patch, pytest.raises(mn.Cancelled):
        patch.setattr(cache.runner, "begin", lambda cancel: context.cancel())
        other.extend(OTHER)
    for shifted in (sequence, fork):
        shifted.extend([1])
        assert_same(shifted.logits, fresh(tiny, [*IDS[:4], *IDS[14:], 1]))


@pytest.mark.parametrize("model", [TinyModel(), JAMBA], ids=["attention", "hybrid"])
def test_a_shifted_sequence_is_not_reused_after_its_shift(load_tiny: Load, tmp_path: Path, model: TinyModel) -> None:
    """Not even after a save, which applies the shift, or after a rewind."""
    with make(load_tiny(model), checkpoint_interval=8) as context:
        sequence = context.sequence()
        sequence.extend(IDS)
        sequence.shift(10, 20)
        text = list(sequence)
        logits = sequence.logits
        sequence.save(tmp_path / "saved")
        assert np.array_equal(sequence.logits, logits)
        sequence.extend(OTHER)
        sequence.rewind(25)
        other = context.sequence()
        assert other.extend([*text, *OTHER[:7]]) >= len(text) + 7 - 10
        assert_same(other.logits, fresh(load_tiny(model), [*text, *OTHER[:7]]))


# A full context


def test_the_error_for_a_full_context_says_how_full_it_is(context: mn.Context, sequence: mn.Sequence) -> None:
    sequence.extend([5] * 200)
    with pytest.raises(mn.ContextFullError, match="200 of n_ctx=256 cells are used, 57 more are wanted, 56 are free"):
        sequence.extend([6] * 57)
    assert len(sequence) == 200


@pytest.mark.parametrize("grow", ["append", "extend"])
def test_a_full_context_can_shift(tiny: mn.Model, grow: str) -> None:
    with make(tiny, n_ctx=40, on_full="shift", n_keep=4) as context:
        sequence = context.sequence()
        sequence.extend(IDS)
        sequence.append(1) if grow == "append" else sequence.extend([1])
        assert sequence == [*IDS[:4], *IDS[22:], 1]
        assert evaluated_by(context, lambda: sequence.logits) == (grow == "append")
        assert context.stats.tokens_discarded == 18


def test_a_text_longer_than_the_context_is_refused_even_with_shifts(tiny: mn.Model) -> None:
    with make(tiny, n_ctx=40, on_full="shift") as context:
        sequence = context.sequence()
        sequence.extend([1, 2, 3])
        with pytest.raises(mn.ContextFullError):
            sequence.extend([6] * 41)
        assert sequence == [1, 2, 3]


def test_generation_continues_while_the_context_shifts(demo: mn.Model) -> None:
    with demo.context(n_ctx=32, n_threads=1, on_full="shift") as context:
        sequence = context.sequence()
        sequence.extend(demo.tokenizer.encode("Once upon a time"))
        steps = list(mn.generate(sequence, lambda logits, tokens: len(tokens) % 50 + 10, max_tokens=100))
        assert len(steps) == 100
        assert len(sequence) <= 32
        assert context.stats.tokens_discarded > 0


def test_a_context_can_shift_cells_that_closed_sequences_share(tiny: mn.Model) -> None:
    with make(tiny, n_ctx=60, on_full="shift") as context:
        with context.sequence() as closed:
            closed.extend(IDS)
        sequence = context.sequence()
        sequence.extend([*IDS[:30], 1])
        sequence.extend([2] * 35)
        assert sequence == [*IDS[:4], *IDS[17:30], 1, *[2] * 35]


def test_a_full_context_does_not_shift_if_that_frees_nothing(tiny: mn.Model) -> None:
    with make(tiny, n_ctx=100, on_full="shift") as context:
        sequence = context.sequence()
        sequence.extend(IDS)
        fork = sequence.fork()
        fork.extend([7] * 60)
        with pytest.raises(mn.ContextFullError):
            fork.extend([8] * 10)
        assert fork == [*IDS, *[7] * 60]


@pytest.mark.parametrize(
    "on_full", ["shift", lambda sequence, lacking: sequence.truncate(3)], ids=["shift", "function"]
)
def test_on_full_cannot_change_the_text_of_an_assignment(tiny: mn.Model, on_full: Any) -> None:
    with make(tiny, n_ctx=100, on_full=on_full) as context:
        other, sequence = context.sequence(), context.sequence()
        other.extend([9] * 50)
        sequence.extend(IDS)
        with pytest.raises(mn.ContextFullError):
            sequence.assign([*IDS, *[8] * 30])
        assert sequence == IDS
        assert_same(sequence.logits, fresh(tiny, IDS))


def test_on_full_may_close_a_sequence_that_is_being_extended(tiny: mn.Model) -> None:
    sequences: list[mn.Sequence] = []
    with make(tiny, n_ctx=100, n_seq=2, on_full=lambda sequence, lacking: sequences[0].close()) as context:
        one, other = sequences[:] = [context.sequence(), context.sequence()]
        one.extend([5] * 50)
        with pytest.raises(mn.ClosedError):
            context.extend({one: [1], other: [6] * 60})
        other.close()
        both = context.sequence(), context.sequence()
        assert context.extend({both[0]: [1], both[1]: [2]}) == 2


def test_on_progress_may_read_the_logits(tiny: mn.Model) -> None:
    with make(tiny, n_batch=8) as context:
        sequence = context.sequence()
        sequence.extend(IDS, on_progress=lambda done, total: sequence.logits)
        assert_same(sequence.logits, fresh(tiny, IDS))


def test_a_sequence_that_nobody_refers_to_is_evicted(tiny: mn.Model) -> None:
    with make(tiny, n_ctx=100) as context:
        sequence, gone = context.sequence(), context.sequence()
        gone.extend([5] * 60)
        del gone
        assert sequence.extend([6] * 60) == 60


@pytest.mark.parametrize("use", ["logits", "score"])
def test_a_re_evaluated_token_takes_a_cell_of_its_own(tiny: mn.Model, use: str) -> None:
    with make(tiny, n_ctx=100) as context:
        sequence = context.sequence()
        sequence.extend([5] * (100 if use == "logits" else 95))
        fork = sequence.fork()
        fork.rewind(1)
        for _ in range(2):
            with pytest.raises(mn.ContextFullError):
                _ = fork.logits if use == "logits" else fork.score([1, 2, 3, 4, 5])


def test_a_text_that_cannot_fit_evicts_nothing(tiny: mn.Model) -> None:
    with make(tiny, n_ctx=100) as context:
        context.sequence().extend(IDS)
        with pytest.raises(mn.ContextFullError):
            context.sequence().extend([6] * 200)
        assert context.sequence().extend([*IDS, 1]) == 1


def test_cells_of_a_truncated_fork_are_counted(load_tiny: Load) -> None:
    with make(load_tiny(JAMBA)) as context:
        sequence = context.sequence()
        sequence.extend(list(range(100)))
        fork = sequence.fork()
        fork.append(1)
        fork.truncate(50)
        with pytest.raises(mn.ContextFullError):
            sequence.extend([5] * 150)
        assert context.cells_used <= 256


@pytest.mark.parametrize(
    "model", [TinyModel(), GEMMA, TinyModel("qwen3moe"), JAMBA], ids=lambda model: model.architecture
)
def test_a_rope_shift_of_all_keys_changes_nothing(load_tiny: Load, model: TinyModel) -> None:
    # With RoPE only the distance between positions matters: rotating all keys by the same angle must change nothing.
    context, cache = make_open(load_tiny(model), n_seq=2, prefix_cache=False)
    with context:
        moved, left = context.sequence(), context.sequence()
        for sequence in (moved, left):
            sequence.extend(IDS)
        moved.shift(0, 10)
        lib.llama_memory_seq_rm(lib.llama_get_memory(cache.handle.pointer), slot_of(left).id, 0, 10)
        for sequence in (moved, left):
            sequence.extend([3])
        assert_same(moved.logits, left.logits)


@pytest.mark.parametrize("model", [TinyModel("smollm3"), TinyModel("gpt2"), LFM], ids=lambda model: model.architecture)
def test_keys_that_a_rope_shift_would_corrupt_are_not_shifted(load_tiny: Load, model: TinyModel) -> None:
    with make(load_tiny(model)) as context, context.sequence() as sequence:
        sequence.extend(IDS)
        assert not context.memory.can_shift
        with pytest.raises(mn.ContextError, match="cannot shift"):
            sequence.shift(0, 10)


def test_a_context_has_no_more_cells_than_the_model_has_positions(
    load_tiny: Load, caplog: pytest.LogCaptureFixture
) -> None:
    with make(load_tiny(TinyModel("gpt2", n_ctx_train=100)), n_ctx=4096) as context, context.sequence() as sequence:
        assert context.n_ctx == 100
        assert "n_ctx=100 is all that this model has positions for, not 4096" in caplog.text
        sequence.extend([5] * 100)
        with pytest.raises(mn.ContextFullError):
            sequence.append(5)


def test_a_fork_of_a_shifted_sequence_is_shifted_without_a_checkpoint(load_tiny: Load) -> None:
    with make(load_tiny(JAMBA), checkpoint_bytes=0) as context:
        sequence = context.sequence()
        sequence.extend(IDS)
        sequence.shift(4, 10)
        fork = sequence.fork()
        fork.shift(4, 20)
        expected = [*IDS[:4], *IDS[34:]]
        assert fork == expected
        assert_same(fork.logits, fresh(context.model, expected))
        assert sequence == [*IDS[:4], *IDS[14:]]


def test_logits_are_a_copy_that_may_be_written_to(context: mn.Context, sequence: mn.Sequence) -> None:
    sequence.extend(IDS)
    expected = sequence.logits
    fork = sequence.fork()
    for held in (sequence, fork):
        held.logits[:] = 0
        assert np.array_equal(held.logits, expected)
    sequence.assign(OTHER)
    sequence.assign(IDS)
    assert np.array_equal(sequence.logits, expected)


@pytest.mark.parametrize("model", [MAMBA, RWKV, JAMBA], ids=lambda model: model.architecture)
def test_logits_of_a_checkpoint_cannot_be_written_to(load_tiny: Load, model: TinyModel) -> None:
    with make(load_tiny(model)) as context, context.sequence() as sequence:
        sequence.extend(IDS)
        expected = sequence.logits
        sequence.logits[:] = 0
        sequence.extend(OTHER)
        sequence.truncate(len(IDS))
        sequence.logits[:] = 0
        assert np.array_equal(sequence.logits, expected)


def test_more_sequences_than_a_batch_has_tokens(tiny: mn.Model) -> None:
    with make(tiny, n_ctx=40, n_seq=50, n_batch=2) as context:
        sequences = [context.sequence() for _ in range(20)]
        assert context.extend({sequence: [5, 6] for sequence in sequences}) == 40
        assert_same(sequences[-1].logits, fresh(tiny, [5, 6]))


def test_on_full_may_close_a_sequence_that_is_being_assigned(tiny: mn.Model) -> None:
    with make(tiny, n_ctx=256, on_full=lambda sequence, lacking: sequence.close()) as context:
        other, sequence = context.sequence(), context.sequence()
        other.extend([9] * 150)
        sequence.extend([7] * 100)
        with pytest.raises(mn.ClosedError):
            sequence.assign([*[7] * 50, *[8] * 80])
        assert context.cells_used == 150
        other.extend([1] * 100)


def test_leaked_cells_are_freed_when_room_is_needed(tiny: mn.Model) -> None:
    with make(tiny, n_ctx=256, n_seq=4) as context:
        sequence = context.sequence()
        sequence.extend([7] * 200)
        slot = slot_of(sequence)
        slot.id, slot.n_cached = -1, 0  # as after an interrupt between two lines
        sequence.truncate(0)
        other = context.sequence()
        other.extend([9] * 250)
        assert_same(other.logits, fresh(tiny, [9] * 250))


def test_on_full_cannot_change_ids_after_their_check(tiny: mn.Model) -> None:
    ids = np.full(50, 5, np.int32)

    def make_room(sequence: mn.Sequence, lacking: int) -> None:
        ids[:] = 10**6
        sequence.truncate(0)

    with make(tiny, n_ctx=60, on_full=make_room) as context, context.sequence() as sequence:
        sequence.extend([6] * 30)
        sequence.extend(ids)
        assert sequence == [5] * 50


@pytest.mark.parametrize("texts", [None, [], {1: [2]}, {"a": [2]}], ids=str)
def test_only_mappings_of_sequences_are_accepted(context: mn.Context, texts: Any) -> None:
    with pytest.raises(TypeError):
        context.extend(texts)


def test_a_context_without_unified_cells_becomes_full(tiny: mn.Model) -> None:
    with make(tiny, n_ctx=101, n_seq=2, kv_unified=False) as context:
        sequences = [context.sequence(), context.sequence()]
        for sequence in sequences:
            assert not context.is_full
            sequence.extend([5] * 50)
        assert context.is_full


def test_a_small_window_is_not_filled_by_forks(load_tiny: Load) -> None:
    """libllama reuses the cells of tokens that have left the window only if a single sequence holds them."""
    model, text = load_tiny(GEMMA), [token * 7 % 250 for token in range(240)]
    with make(model, n_ctx=1024, n_ubatch=16, swa_full=False) as context:
        sequence = context.sequence()
        sequence.extend(text)
        fork = sequence.fork()
        sequence.close()
        for start in range(0, 300, 20):
            fork.extend([token % 250 for token in range(start, start + 20)])
        again = context.sequence()
        again.extend([*text, 1])
        assert_same(again.logits, fresh(model, [*text, 1]))


def test_cells_after_a_fork_and_a_shift(context: mn.Context, sequence: mn.Sequence) -> None:
    sequence.extend(IDS)
    fork = sequence.fork(20)
    assert context.cells_used == 40
    fork.shift(4, 6)
    assert context.cells_used == 40 + 14
    sequence.close()
    assert context.cells_used == 14


def test_a_shift_of_shared_cells_keeps_unread_logits(context: mn.Context, sequence: mn.Sequence) -> None:
    sequence.extend(IDS)
    fork = sequence.fork()
    fork.extend(OTHER)
    fork.shift(2, 3)
    assert evaluated_by(context, lambda: fork.logits) == 0


def test_the_prefix_of_a_shifted_sequence_is_copied_if_cells_are_not_shared(tiny: mn.Model) -> None:
    with make(tiny, n_ctx=400, n_seq=2, kv_unified=False) as context:
        sequence = context.sequence()
        sequence.extend([*IDS, *OTHER])
        sequence.shift(40, 5)
        sequence.close()
        other = context.sequence()
        assert other.extend([*IDS, 1]) == 1
        assert_same(other.logits, fresh(tiny, [*IDS, 1]))


def test_on_full_may_make_room(tiny: mn.Model) -> None:
    calls: list[tuple[int, int]] = []

    def make_room(sequence: mn.Sequence, lacking: int) -> None:
        calls.append((len(sequence), lacking))
        sequence.truncate(10)

    with make(tiny, n_ctx=40, on_full=make_room) as context:
        sequence = context.sequence()
        sequence.extend(IDS)
        assert sequence.extend([1, 2, 3]) == 3
        assert sequence == [*IDS[:10], 1, 2, 3]
        assert calls == [(40, 3)]
        assert_same(sequence.logits, fresh(tiny, [*IDS[:10], 1, 2, 3]))


def test_on_full_that_makes_no_room(tiny: mn.Model) -> None:
    with make(tiny, n_ctx=40, on_full=lambda sequence, lacking: None) as context:
        sequence = context.sequence()
        sequence.extend(IDS)
        for grow in (lambda: sequence.append(1), lambda: sequence.extend([1]), lambda: sequence.score([1])):
            with pytest.raises(mn.ContextFullError):
                grow()
        assert sequence == IDS


def test_without_unified_cells_no_sequence_takes_those_of_another(tiny: mn.Model) -> None:
    with make(tiny, n_ctx=100, n_seq=2, kv_unified=False) as context:
        one, other = context.sequence(), context.sequence()
        one.extend([5] * 50)
        assert one.is_full
        with pytest.raises(mn.ContextFullError, match="1 more are wanted"):
            one.append(5)
        other.extend([6] * 50)


# Every kind of memory


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        (TinyModel(), {}, ("attention", True, True, True)),
        (TinyModel(), {"kv_unified": False}, ("attention", True, True, False)),
        (GEMMA, {}, ("sliding window", True, True, True)),
        (GEMMA, {"swa_full": False, "n_ctx": 1024}, ("sliding window", False, False, True)),
        (MAMBA, {}, ("recurrent", False, True, True)),
        (JAMBA, {}, ("hybrid", False, True, True)),
        (TinyModel("qwen3moe"), {}, ("attention", True, True, True)),
    ],
)
def test_a_memory_says_what_it_can_do(
    load_tiny: Load, model: TinyModel, options: dict[str, object], expected: tuple[str, bool, bool, bool]
) -> None:
    with make(load_tiny(model), **options) as context:
        memory = context.memory
        assert (memory.kind, memory.can_truncate, memory.can_shift, memory.can_share) == expected
        assert memory.kind in repr(memory)


@pytest.mark.parametrize("model", [MAMBA, JAMBA], ids=["recurrent", "hybrid"])
def test_truncating_re_evaluates_from_the_nearest_checkpoint(load_tiny: Load, model: TinyModel) -> None:
    text = [token % 250 for token in range(200)]
    with make(load_tiny(model), checkpoint_interval=50) as context:
        sequence = context.sequence()
        sequence.extend(text)
        sequence.truncate(130)
        assert evaluated_by(context, lambda: sequence.logits) == 30
        assert context.stats.tokens_reevaluated == 30
        assert_same(sequence.logits, fresh(load_tiny(model), text[:130]))
        sequence.truncate(100)
        assert evaluated_by(context, lambda: sequence.extend([1, 2])) == 2
        assert_same(sequence.logits, fresh(load_tiny(model), [*text[:100], 1, 2]))


@pytest.mark.parametrize("model", [MAMBA, JAMBA], ids=["recurrent", "hybrid"])
def test_truncating_to_the_end_of_a_prompt_evaluates_nothing(load_tiny: Load, model: TinyModel) -> None:
    with make(load_tiny(model)) as context:
        sequence = context.sequence()
        sequence.extend(IDS)
        first = sequence.logits
        for token in OTHER:
            sequence.append(token)
            _ = sequence.logits
        sequence.truncate(len(IDS))
        assert evaluated_by(context, lambda: sequence.logits) == 0
        assert np.array_equal(sequence.logits, first)
        assert evaluated_by(context, lambda: sequence.fork(len(IDS)).logits) == 0


@pytest.mark.parametrize("n", [3, 18], ids=["no checkpoint", "a checkpoint"])
@pytest.mark.parametrize("model", [MAMBA, JAMBA], ids=["recurrent", "hybrid"])
def test_a_cancelled_batch_leaves_no_state_in_any_sequence(load_tiny: Load, model: TinyModel, n: int) -> None:
    with make(load_tiny(model), n_batch=4, checkpoint_interval=8, prefix_cache=False) as context:
        one, closed, other = context.sequence(), context.sequence(), context.sequence()
        for sequence in (one, closed, other):
            sequence.extend(IDS[:n])
        closed.close()
        with pytest.raises(mn.Cancelled):  # in the second batch, whose sequence ids are not adjacent
            context.extend({one: [50] * 6, other: [51] * 2}, on_progress=lambda done, total: context.cancel())
        new = [context.sequence(), context.sequence()]
        for sequence in new:
            sequence.extend(OTHER)
        for sequence in (one, other, *new):
            assert_same(sequence.logits, fresh(load_tiny(model), list(sequence)))


def test_without_room_for_checkpoints_everything_is_re_evaluated(load_tiny: Load) -> None:
    with make(load_tiny(MAMBA), checkpoint_bytes=0) as context:
        sequence = context.sequence()
        sequence.extend(IDS)
        sequence.truncate(30)
        assert evaluated_by(context, lambda: sequence.logits) == 30
        assert_same(sequence.logits, fresh(load_tiny(MAMBA), IDS[:30]))


def test_checkpoints_stay_within_checkpoint_bytes_and_cover_the_text(load_tiny: Load) -> None:
    with make(load_tiny(MAMBA), checkpoint_interval=5, n_seq=1) as context:
        sequence = context.sequence()
        sequence.extend(IDS[:5])
        size = slot_of(sequence).checkpoints[0].state.size
    with make(load_tiny(MAMBA), checkpoint_interval=5, n_seq=1, checkpoint_bytes=4 * size) as context:
        sequence = context.sequence()
        sequence.extend([token % 250 for token in range(200)])
        kept = [checkpoint.n for checkpoint in slot_of(sequence).checkpoints]
        assert len(kept) == 4
        assert kept[-1] == 200
        assert max(np.diff([0, *kept])) <= 125


@pytest.mark.parametrize("model", [MAMBA, JAMBA], ids=["recurrent", "hybrid"])
def test_recurrent_conversations_are_reused_at_their_checkpoints(load_tiny: Load, model: TinyModel) -> None:
    with make(load_tiny(model)) as context:
        sequence = context.sequence()
        sequence.assign(IDS)
        sequence.assign(OTHER)
        assert sequence.assign([*IDS, 1, 2]) == 2
        assert_same(sequence.logits, fresh(load_tiny(model), [*IDS, 1, 2]))


def test_an_interrupted_rollback_leaves_no_checkpoint_of_discarded_tokens(
    load_tiny: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_tiny(GEMMA)
    cut = Cells.cut

    def cut_and_be_interrupted(cells: Cells, sequence_id: int, n: int) -> bool:
        cut(cells, sequence_id, n)
        raise KeyboardInterrupt

    with make(model, swa_full=False, n_ctx=1024, checkpoint_interval=8) as context:
        sequence = context.sequence()
        sequence.extend(IDS)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Cells, "cut", cut_and_be_interrupted)
            slot_of(sequence).rollback(0)
        sequence.extend([1])
        assert_same(sequence.logits, fresh(model, [*IDS, 1]))


def test_truncating_to_before_a_sliding_window_goes_back_to_a_checkpoint(load_tiny: Load) -> None:
    text = [token * 7 % 250 for token in range(700)]
    options: dict[str, object] = {"n_ctx": 1024, "n_ubatch": 16, "n_seq": 1}
    with make(load_tiny(GEMMA), **options, swa_full=False, checkpoint_interval=64) as context:
        sequence = context.sequence()
        sequence.extend(text)
        for n in (690, 300, 100):
            sequence.truncate(n)
            assert evaluated_by(context, lambda: sequence.logits) <= 64 + 16
            with make(load_tiny(GEMMA), **options) as plain:
                expected = plain.sequence()
                expected.extend(text[:n])
                assert_same(sequence.logits, expected.logits)


# Types of keys and values


@pytest.mark.parametrize("kv_type", ["f16", "q8_0", ("q8_0", "q4_0"), ("f16", "q8_0"), ("q4_0", "q4_0")])
def test_quantised_keys_and_values(tiny: mn.Model, kv_type: str | tuple[str, str]) -> None:
    with make(tiny, kv_type=kv_type, flash_attention="auto") as context:
        assert context.kv_type == ((kv_type, kv_type) if isinstance(kv_type, str) else kv_type)
        sequence = context.sequence()
        sequence.extend(IDS)
        exact = fresh(tiny, IDS)
        error = np.linalg.norm(sequence.logits - exact) / np.linalg.norm(exact)
        assert error < (0.5 if "q4_0" in context.kv_type else 0.03)  # the error of another text's logits is 1.4
        assert sequence.fork(20).extend([1]) == 1


@pytest.mark.parametrize(
    ("key_type", "head_size", "can_shift"),
    [("f32", 32, True), ("bf16", 64, False), ("q8_0", 32, False), ("q8_0", 64, True)],
)
def test_keys_that_libllama_cannot_rotate_are_not_shifted(
    load_tiny: Load, key_type: str, head_size: int, can_shift: bool
) -> None:
    model = load_tiny(TinyModel(n_embd=4 * head_size, n_layer=1))
    with make(model, kv_type=(key_type, "f16"), flash_attention="auto") as context, make(model) as exact:
        assert context.memory.can_shift == can_shift
        sequence, expected = context.sequence(), exact.sequence()
        for shifted in (sequence, expected):
            shifted.extend(IDS)
            if not can_shift:
                with pytest.raises(mn.ContextError, match="cannot shift: truncate instead"):
                    sequence.shift(4, 10)
                return
            shifted.shift(4, 10)
            shifted.extend([1])
        error = np.linalg.norm(sequence.logits - expected.logits) / np.linalg.norm(expected.logits)
        assert error < 0.05


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"kv_type": "q8_0", "flash_attention": "off"}, mn.ContextError, "need flash attention"),
        ({"kv_type": ("f16", "q9")}, ValueError, "kv_type must be one of"),
        ({"kv_type": ("f16",)}, ValueError, "or a pair"),
        ({"on_full": "explode"}, ValueError, "on_full must be"),
        ({"on_full": "shift", "kv_type": "bf16"}, mn.ContextError, "cannot shift: .* keys of another type"),
        ({"n_keep": -1}, ValueError, "n_keep must be from"),
        ({"checkpoint_interval": 0}, ValueError, "checkpoint_interval must be from"),
        ({"n_ctx": 6, "kv_unified": False}, ValueError, "less than 2 cells"),
    ],
)
def test_invalid_options(tiny: mn.Model, options: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make(tiny, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_type": ("f16", "q8_0")}, "T5's positions forbid"),
        ({"kv_unified": False, "n_seq": 2}, "with one sequence only"),
    ],
)
def test_options_that_libllama_does_not_support_for_an_encoder_decoder(
    load_tiny: Load, options: dict[str, object], words: str
) -> None:
    with pytest.raises(mn.ContextError, match=words):
        load_tiny(TinyModel("t5")).context(n_ctx=64, **options)  # type: ignore[arg-type]


def test_a_type_whose_blocks_do_not_divide_a_head(load_tiny: Load) -> None:
    model = load_tiny(TinyModel(n_embd=96, n_head=6, n_head_kv=3))
    with pytest.raises(mn.ContextError, match="blocks of 32 numbers, and a head of this model has 16"):
        make(model, kv_type=("q8_0", "f16"))


# Threads


def test_forks_can_be_used_in_several_threads(tiny: mn.Model, context: mn.Context, sequence: mn.Sequence) -> None:
    sequence.extend(IDS)
    forks = [sequence.fork() for _ in range(3)]

    def run(fork: mn.Sequence, first: int) -> None:
        for step in range(10):
            fork.extend([first + step])
            _ = fork.logits

    threads = [threading.Thread(target=run, args=(fork, 50 * number)) for number, fork in enumerate(forks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, fork in enumerate(forks):
        assert_same(fork.logits, fresh(tiny, [*IDS, *range(50 * number, 50 * number + 10)]))


# The bookkeeping itself


def test_shared_cells_are_counted_once() -> None:
    class Fake:
        def __init__(self, n: int, runs: list[tuple[int, int]]):
            self.tokens, self.runs = array("i", [0] * n), runs

    slots = [Fake(10, [(1, 4), (2, 3)]), Fake(6, [(1, 4)]), Fake(5, [(1, 4), (2, 1)])]
    assert count_cells(slots) == 4 + 3 + 3 + 2 + 0


def test_runs_are_clipped_to_the_remaining_tokens() -> None:
    assert clipped([(1, 4), (2, 3)], 7) == [(1, 4), (2, 3)]
    assert clipped([(1, 4), (2, 3)], 5) == [(1, 4), (2, 1)]
    assert clipped([(1, 4), (2, 3)], 4) == [(1, 4)]
    assert clipped([(1, 4), (2, 3)], 0) == []


@pytest.mark.parametrize(
    ("one", "other", "n"), [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2], [1, 3], 1), ([1], [2], 0)]
)
def test_the_common_prefix_of_two_texts(one: list[int], other: list[int], n: int) -> None:
    assert common_prefix(np.array(one, np.int32), np.array(other, np.int32)) == n


def test_pieces_of_a_prompt_are_not_given_up_for_a_window_that_is_gone(
    load_tiny: Callable[[TinyModel], mn.Model],
) -> None:
    model = load_tiny(TinyModel("gemma2", tied=True))
    with model.context(n_ctx=512, n_seq=4, kv_unified=False, n_ubatch=32, n_batch=64, n_threads=1) as context:
        with context.sequence() as first:
            first.extend([5] * 54 + [7] * 20)
        with context.sequence() as second:
            waiting = [second.extend([5] * 88, evaluate=False)]
            while waiting[-1] and len(waiting) < 10:
                waiting.append(context.evaluate([second], max_tokens=32))
                second.extend([], evaluate=False)
            assert waiting == [88, 56, 24, 0]


# Snapshots of recurrent states

QWEN, NEMOTRON = TinyModel("qwen35"), TinyModel("nemotron_h", n_layer=4)

with_snapshots = pytest.mark.parametrize("model", [LFM, QWEN, NEMOTRON], ids=["conv", "delta net", "mamba 2"])


@with_snapshots
def test_what_the_last_batch_has_evaluated_is_forgotten_without_a_checkpoint(load_tiny: Load, model: TinyModel) -> None:
    with make(load_tiny(model), n_rs_seq=6) as context, context.sequence() as sequence:
        assert context.memory.n_rollback == 6
        sequence.extend(IDS)
        _ = sequence.logits
        for guess in (OTHER[:6], OTHER[6:10], OTHER[10:16]):  # as many as that, twice in a row
            before = list(sequence)
            sequence.logits_after([*guess])
            sequence.truncate(len(before) + 1)
            evaluated = evaluated_by(context, lambda: sequence.extend([7]))
            assert evaluated == 1
            assert_same(sequence.logits, fresh(load_tiny(model), [*before, guess[0], 7]))
        assert context.stats.tokens_reevaluated == 0


@with_snapshots
def test_snapshots_of_an_earlier_batch_are_not_gone_back_to(load_tiny: Load, model: TinyModel) -> None:
    with make(load_tiny(model), n_rs_seq=6) as context, context.sequence() as sequence:
        sequence.extend(IDS)
        sequence.append(3)
        _ = sequence.logits
        sequence.rewind(2)  # libllama would take the snapshot of the batch before
        sequence.extend([5])
        assert_same(sequence.logits, fresh(load_tiny(model), [*IDS[:-1], 5]))


@with_snapshots
@pytest.mark.parametrize("cut_first", [True, False])
def test_a_fork_and_what_it_is_of_are_rolled_back_apart(load_tiny: Load, model: TinyModel, cut_first: bool) -> None:
    with make(load_tiny(model), n_rs_seq=6) as context, context.sequence() as sequence:
        sequence.extend(IDS)
        sequence.logits_after(OTHER[:5])
        if cut_first:
            sequence.truncate(len(IDS) + 2)
        fork = sequence.fork()
        if not cut_first:
            sequence.truncate(len(IDS) + 2)
        wanted = {sequence: IDS + OTHER[:2], fork: IDS + OTHER[: 2 if cut_first else 5]}
        for one, ids in wanted.items():
            one.extend([9])
            assert_same(one.logits, fresh(load_tiny(model), [*ids, 9]))


@with_snapshots
def test_sequences_of_a_shared_batch_are_rolled_back_apart(load_tiny: Load, model: TinyModel) -> None:
    with make(load_tiny(model), n_rs_seq=6) as context:
        sequences = [context.sequence() for _ in range(3)]
        for number, sequence in enumerate(sequences):
            sequence.extend([number, *IDS])
        context.extend({sequences[2]: OTHER[:4], sequences[0]: OTHER[:4]})
        for number in (2, 0):
            sequences[number].truncate(len(IDS) + 3)
        context.extend({sequence: [9] for sequence in sequences})
        for number, sequence in enumerate(sequences):
            ids = [number, *IDS, *(OTHER[:2] if number != 1 else []), 9]
            assert_same(sequence.logits, fresh(load_tiny(model), ids))


def test_a_memory_without_snapshots_says_so(load_tiny: Load, tiny: mn.Model) -> None:
    for model in (load_tiny(MAMBA), load_tiny(JAMBA), tiny):
        with make(model, n_rs_seq=8) as context:
            assert context.memory.n_rollback == context.options.n_rs_seq == 0
    with make(load_tiny(LFM), n_rs_seq=64, n_ubatch=16) as context:  # libllama wants two tokens more in a pass
        assert context.memory.n_rollback == 14
        assert lib.llama_n_rs_seq(open_up(load_tiny(LFM), n_ctx=64, n_rs_seq=3)[1].runner.handle.pointer) == 3


def test_guesses_leave_one_checkpoint_behind(load_tiny: Load) -> None:
    with make(load_tiny(MAMBA)) as context, context.sequence() as sequence:
        sequence.extend(IDS)
        for token in range(6):
            sequence.logits_after(OTHER[:20])
            sequence.truncate(len(IDS) + 2 * token + 1)
            sequence.append(7)
            # What was right of the guess, and the next token.
            assert evaluated_by(context, lambda: sequence.logits) == 2
        assert [checkpoint.is_passing for checkpoint in slot_of(sequence).checkpoints] == [False, True]
        assert_same(sequence.logits, fresh(load_tiny(MAMBA), list(sequence)))
