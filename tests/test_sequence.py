"""A sequence is a list of tokens: what changes it, and how much work each change takes.

Work is counted (`Context.stats.tokens_evaluated`), never timed.
"""

import copy
import gc
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest

import minerva_native as mn
from minerva_native.sequence import draw_next, look_ahead
from tiny_models import TOKENS

Logits = npt.NDArray[np.float32]

IDS = list(range(20, 44))
N_CTX = 60


@pytest.fixture
def context(tiny: mn.Model) -> Iterator[mn.Context]:
    with make_context(tiny) as context:
        yield context


@pytest.fixture
def sequence(context: mn.Context) -> mn.Sequence:
    return context.sequence()


def make_context(model: mn.Model, n_ctx: int = N_CTX, n_seq: int = 1, n_batch: int = 2048) -> mn.Context:
    return model.context(n_ctx=n_ctx, n_seq=n_seq, n_batch=n_batch, n_threads=1, kv_type="f32", flash_attention="off")


@pytest.fixture
def fresh_logits(tiny: mn.Model) -> Callable[[list[int]], Logits]:
    """A function that returns the logits of a text after a single `extend` in a new context."""

    def logits(ids: list[int]) -> Logits:
        with make_context(tiny) as context, context.sequence() as sequence:
            sequence.extend(ids)
            return sequence.logits

    return logits


def assert_same(logits: Logits, expected: Logits) -> None:
    """Assert that logits are equal, up to rounding: the order of additions depends on the batch size."""
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


def evaluated_by(context: mn.Context, action: Callable[[], object]) -> int:
    before = context.stats.tokens_evaluated
    action()
    return context.stats.tokens_evaluated - before


# Growing


def test_a_new_sequence_is_empty(sequence: mn.Sequence) -> None:
    assert len(sequence) == 0
    assert sequence.tokens == []


def test_extending_adds_the_tokens_in_order(sequence: mn.Sequence) -> None:
    sequence.extend(IDS[:3])
    sequence.extend(np.array(IDS[3:5]))
    sequence.extend(tuple(IDS[5:7]))
    assert sequence.tokens == IDS[:7]


def test_extending_evaluates_each_token_once_and_returns_how_many(context: mn.Context, sequence: mn.Sequence) -> None:
    assert sequence.extend(IDS) == len(IDS)
    assert context.stats.tokens_evaluated == len(IDS)
    assert evaluated_by(context, lambda: sequence.extend(IDS[:5])) == 5


def test_extending_by_nothing_evaluates_nothing(context: mn.Context, sequence: mn.Sequence) -> None:
    assert sequence.extend([]) == 0
    assert context.stats.decode_calls == 0


@pytest.mark.parametrize("n_batch", [1, 5, 12, 24, 100])
def test_a_prompt_is_evaluated_in_chunks_of_n_batch(tiny: mn.Model, n_batch: int) -> None:
    with make_context(tiny, n_batch=n_batch) as context:
        context.sequence().extend(IDS)
        assert context.stats.decode_calls == -(-len(IDS) // n_batch)
        assert context.stats.tokens_evaluated == len(IDS)


def test_progress_is_reported_after_each_chunk(tiny: mn.Model) -> None:
    reports: list[tuple[int, int]] = []
    with make_context(tiny, n_batch=10) as context:
        context.sequence().extend(IDS, on_progress=lambda done, total: reports.append((done, total)))
    assert reports == [(10, 24), (20, 24), (24, 24)]


def test_an_appended_token_is_not_evaluated_before_it_is_needed(context: mn.Context, sequence: mn.Sequence) -> None:
    sequence.extend(IDS)
    assert evaluated_by(context, lambda: sequence.append(7)) == 0
    assert sequence.tokens == [*IDS, 7]
    assert evaluated_by(context, lambda: sequence.logits) == 1


def test_appended_tokens_are_evaluated_with_the_next_extend(context: mn.Context, sequence: mn.Sequence) -> None:
    sequence.extend(IDS)
    sequence.append(7)
    sequence.append(8)
    assert evaluated_by(context, lambda: sequence.extend([9, 10])) == 4
    assert context.stats.decode_calls == 2


def test_extending_counts_the_tokens_that_were_waiting(sequence: mn.Sequence) -> None:
    sequence.append(7)
    assert sequence.extend([8, 9]) == 3


def test_an_empty_sequence_can_be_appended_to(
    sequence: mn.Sequence, fresh_logits: Callable[[list[int]], Logits]
) -> None:
    for token in IDS:
        sequence.append(token)
    assert_same(sequence.logits, fresh_logits(IDS))


# Logits


def test_logits_are_one_float32_for_each_token_of_the_vocabulary(sequence: mn.Sequence) -> None:
    sequence.extend(IDS)
    assert sequence.logits.shape == (len(TOKENS),)
    assert sequence.logits.dtype == np.float32


def test_reading_logits_after_extending_evaluates_nothing(context: mn.Context, sequence: mn.Sequence) -> None:
    sequence.extend(IDS)
    assert evaluated_by(context, lambda: sequence.logits) == 0


def test_reading_logits_again_evaluates_nothing_and_gives_the_same(context: mn.Context, sequence: mn.Sequence) -> None:
    sequence.extend(IDS)
    sequence.append(7)
    first = sequence.logits
    assert evaluated_by(context, lambda: sequence.logits) == 0
    assert np.array_equal(sequence.logits, first)


def test_unread_logits_are_not_mistaken_for_those_after_an_append(tiny: mn.Model) -> None:
    with tiny.context(n_ctx=64, n_seq=2, n_threads=1) as context:
        first, second = context.sequence(), context.sequence()
        first.extend([1, 2, 3])
        first.append(4)
        second.extend([5, 6])  # makes the context save the unread logits
        late = first.logits.copy()
        second.truncate(0)
        second.extend([1, 2, 3, 4])
        np.testing.assert_allclose(late, second.logits, atol=0.05)


def test_logits_that_were_read_never_change(context: mn.Context, sequence: mn.Sequence) -> None:
    sequence.extend(IDS)
    kept = sequence.logits
    copy = kept.copy()
    sequence.extend([5, 6, 7])
    assert not np.array_equal(sequence.logits, copy)
    sequence.truncate(0)
    context.close()
    assert np.array_equal(kept, copy)


def test_an_empty_sequence_has_no_logits(sequence: mn.Sequence) -> None:
    with pytest.raises(mn.ContextError, match="empty"):
        _ = sequence.logits


# Shrinking


def test_truncating_keeps_the_first_tokens(sequence: mn.Sequence) -> None:
    sequence.extend(IDS)
    sequence.truncate(10)
    assert sequence.tokens == IDS[:10]


def test_rewinding_removes_the_last_tokens(sequence: mn.Sequence) -> None:
    sequence.extend(IDS)
    sequence.rewind(4)
    assert sequence.tokens == IDS[:-4]


@pytest.mark.parametrize("n", [0, 1, 23])
def test_truncating_evaluates_nothing(context: mn.Context, sequence: mn.Sequence, n: int) -> None:
    sequence.extend(IDS)
    assert evaluated_by(context, lambda: sequence.truncate(n)) == 0


def test_logits_after_a_rewind_evaluate_one_token(context: mn.Context, sequence: mn.Sequence) -> None:
    sequence.extend(IDS)
    sequence.rewind(5)
    assert evaluated_by(context, lambda: sequence.logits) == 1


def test_logits_after_a_rewind_are_those_of_the_shorter_text(
    sequence: mn.Sequence, fresh_logits: Callable[[list[int]], Logits]
) -> None:
    sequence.extend(IDS)
    _ = sequence.logits
    sequence.rewind(5)
    assert_same(sequence.logits, fresh_logits(IDS[:-5]))


def test_extending_after_a_rewind_evaluates_only_the_new_tokens(context: mn.Context, sequence: mn.Sequence) -> None:
    sequence.extend(IDS)
    sequence.rewind(5)
    assert evaluated_by(context, lambda: sequence.extend([1, 2])) == 2


def test_removed_tokens_do_not_affect_what_follows_a_rewind(
    sequence: mn.Sequence, fresh_logits: Callable[[list[int]], Logits]
) -> None:
    sequence.extend(IDS)
    sequence.rewind(10)
    sequence.extend([1, 2, 3])
    assert_same(sequence.logits, fresh_logits([*IDS[:-10], 1, 2, 3]))


def test_rewinding_waiting_tokens_evaluates_at_most_one_token(context: mn.Context, sequence: mn.Sequence) -> None:
    sequence.extend(IDS)
    before = sequence.logits
    sequence.append(7)
    sequence.append(8)
    sequence.rewind(2)
    assert evaluated_by(context, lambda: sequence.logits) <= 1
    assert_same(sequence.logits, before)


def test_truncating_to_the_current_length_changes_nothing(context: mn.Context, sequence: mn.Sequence) -> None:
    sequence.extend(IDS)
    sequence.truncate(len(IDS))
    sequence.rewind(0)
    assert evaluated_by(context, lambda: sequence.logits) == 0


def test_a_sequence_truncated_to_0_starts_over(
    sequence: mn.Sequence, fresh_logits: Callable[[list[int]], Logits]
) -> None:
    sequence.extend(IDS)
    sequence.truncate(0)
    sequence.extend(IDS[3:9])
    assert_same(sequence.logits, fresh_logits(IDS[3:9]))


# Tokens


def test_tokens_are_a_live_view(sequence: mn.Sequence) -> None:
    view = sequence.tokens
    sequence.extend(IDS)
    assert view == IDS
    sequence.truncate(2)
    assert list(view) == IDS[:2]


def test_the_view_reads_like_a_list(sequence: mn.Sequence) -> None:
    sequence.extend(IDS)
    view = sequence.tokens
    assert (view[0], view[-1], view[2:5], view[::-1]) == (IDS[0], IDS[-1], IDS[2:5], IDS[::-1])
    assert IDS[3] in view
    assert view.index(IDS[3]) == 3
    assert view == tuple(IDS)
    assert repr(view) == repr(IDS)
    with pytest.raises(IndexError):
        view[len(IDS)]


def test_the_view_cannot_be_written_to(sequence: mn.Sequence) -> None:
    sequence.extend(IDS)
    with pytest.raises(TypeError):
        sequence.tokens[0] = 1  # type: ignore[index]


# Scoring


def test_scores_are_the_log_probabilities_of_each_token_after_those_before(
    sequence: mn.Sequence, fresh_logits: Callable[[list[int]], Logits]
) -> None:
    scores = sequence.score(IDS)
    for position in (1, 5, len(IDS) - 1):
        expected = log_softmax(fresh_logits(IDS[:position]))[IDS[position]]
        assert scores[position] == pytest.approx(expected, abs=1e-4)


def test_the_first_token_of_a_sequence_has_no_score(sequence: mn.Sequence) -> None:
    scores = sequence.score(IDS)
    assert np.isnan(scores[0])
    assert np.isfinite(scores[1:]).all()


def test_the_first_score_after_a_text_comes_from_the_texts_logits(sequence: mn.Sequence) -> None:
    sequence.extend(IDS)
    expected = log_softmax(sequence.logits)[7]
    assert sequence.score([7, 8])[0] == pytest.approx(expected, abs=1e-5)


def test_scored_tokens_are_part_of_the_sequence_and_evaluated_once(context: mn.Context, sequence: mn.Sequence) -> None:
    scores = sequence.score(IDS)
    assert scores.shape == (len(IDS),)
    assert scores.dtype == np.float32
    assert sequence.tokens == IDS
    assert context.stats.tokens_evaluated == len(IDS)
    assert evaluated_by(context, lambda: sequence.logits) == 0


def test_logits_after_scoring_are_those_of_the_whole(
    sequence: mn.Sequence, fresh_logits: Callable[[list[int]], Logits]
) -> None:
    sequence.score(IDS)
    assert_same(sequence.logits, fresh_logits(IDS))


@pytest.mark.parametrize("n_batch", [1, 7, 23])
def test_scores_do_not_depend_on_the_size_of_the_chunks(tiny: mn.Model, sequence: mn.Sequence, n_batch: int) -> None:
    with make_context(tiny, n_batch=n_batch) as context:
        np.testing.assert_allclose(context.sequence().score(IDS), sequence.score(IDS), atol=1e-4)


def test_the_most_likely_tokens_of_each_place_are_those_of_the_logits(
    sequence: mn.Sequence, fresh_logits: Callable[[list[int]], Logits]
) -> None:
    scores, tops = sequence.top_scores(IDS, 3)
    assert np.isnan(scores[0])
    assert tops[0] == []
    for position in (1, 5, len(IDS) - 1):
        ids, expected = mn.sampling.top_logprobs(fresh_logits(IDS[:position]), 3)
        assert [token for token, _ in tops[position]] == ids.tolist()
        assert [value for _, value in tops[position]] == pytest.approx(expected.tolist(), abs=1e-4)
        assert scores[position] == pytest.approx(log_softmax(fresh_logits(IDS[:position]))[IDS[position]], abs=1e-4)
    assert [len(top) for top in sequence.top_scores([7, 8], 2)[1]] == [2, 2]


def test_scoring_nothing_evaluates_nothing(context: mn.Context, sequence: mn.Sequence) -> None:
    assert sequence.score([]).shape == (0,)
    assert context.stats.decode_calls == 0


def log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max()
    normed: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return normed


# A full context


@pytest.mark.parametrize("n_ctx", [2, 31, 60, 256, 300])
def test_exactly_n_ctx_tokens_fit(tiny: mn.Model, n_ctx: int) -> None:
    with make_context(tiny, n_ctx=n_ctx) as context:
        sequence = context.sequence()
        sequence.extend([5] * n_ctx)
        assert sequence.logits.shape == (len(TOKENS),)
        assert context.is_full
        assert context.cells_used == context.n_ctx == n_ctx
        with pytest.raises(mn.ContextFullError, match=f"n_ctx={n_ctx}"):
            sequence.append(5)


@pytest.mark.parametrize("grow", ["extend", "score"])
def test_tokens_that_do_not_fit_change_nothing(context: mn.Context, sequence: mn.Sequence, grow: str) -> None:
    sequence.extend(IDS)
    before = sequence.logits
    work = context.stats.tokens_evaluated
    with pytest.raises(mn.ContextFullError, match="37 more are wanted, 36 are free"):
        getattr(sequence, grow)([5] * (N_CTX - len(IDS) + 1))
    assert sequence.tokens == IDS
    assert context.cells_used == len(IDS)
    assert context.stats.tokens_evaluated == work
    assert np.array_equal(sequence.logits, before)


def test_a_truncated_sequence_has_room_again(sequence: mn.Sequence) -> None:
    sequence.extend([5] * N_CTX)
    sequence.truncate(10)
    assert sequence.extend([6] * (N_CTX - 10)) == N_CTX - 10


def test_waiting_tokens_take_their_cells_immediately(context: mn.Context, sequence: mn.Sequence) -> None:
    for _ in range(N_CTX):
        sequence.append(5)
    assert context.is_full
    with pytest.raises(mn.ContextFullError):
        sequence.append(5)
    assert sequence.logits.shape == (len(TOKENS),)


@pytest.mark.parametrize("grow", ["extend", "score"])
@pytest.mark.parametrize("wrong", [[5, -1], [5, len(TOKENS)], [5, 2**40], [5, 1.5], [5, None], "the"])
def test_invalid_token_ids_change_nothing(sequence: mn.Sequence, grow: str, wrong: list[int]) -> None:
    sequence.extend(IDS)
    with pytest.raises((TypeError, ValueError)):
        getattr(sequence, grow)(wrong)
    assert sequence.tokens == IDS


def test_an_exception_in_on_progress_leaves_the_sequence_as_it_was(
    tiny: mn.Model, fresh_logits: Callable[[list[int]], Logits]
) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > 10:
            raise Stop

    with make_context(tiny, n_batch=7) as context:
        sequence = context.sequence()
        sequence.extend(IDS[:5])
        with pytest.raises(Stop):
            sequence.extend(IDS[5:], on_progress=stop)
        assert sequence.tokens == IDS[:5]
        assert context.cells_used == 5
        assert_same(sequence.logits, fresh_logits(IDS[:5]))
        sequence.extend(IDS[5:])
        assert_same(sequence.logits, fresh_logits(IDS))


def test_a_cancelled_prompt_leaves_the_sequence_as_it_was(
    tiny: mn.Model, fresh_logits: Callable[[list[int]], Logits]
) -> None:
    with make_context(tiny, n_batch=7) as context:
        sequence = context.sequence()
        sequence.extend(IDS[:5])
        with pytest.raises(mn.Cancelled):
            sequence.extend(IDS[5:], on_progress=lambda done, total: context.cancel())
        assert sequence.tokens == IDS[:5]
        assert context.cells_used == 5
        assert_same(sequence.logits, fresh_logits(IDS[:5]))


def test_a_call_after_a_cancelled_one_is_not_cancelled(
    sequence: mn.Sequence, fresh_logits: Callable[[list[int]], Logits]
) -> None:
    sequence.context.cancel()
    sequence.extend(IDS)
    assert_same(sequence.logits, fresh_logits(IDS))


# Several sequences


@pytest.fixture
def pair(tiny: mn.Model) -> Iterator[tuple[mn.Sequence, mn.Sequence]]:
    with make_context(tiny, n_seq=2) as context:
        yield context.sequence(), context.sequence()


def test_sequences_that_take_turns_do_not_affect_each_other(
    pair: tuple[mn.Sequence, mn.Sequence], fresh_logits: Callable[[list[int]], Logits]
) -> None:
    one, other = pair
    for token in IDS:
        one.extend([token])
        other.extend([token + 100])
    assert_same(one.logits, fresh_logits(IDS))
    assert_same(other.logits, fresh_logits([token + 100 for token in IDS]))


def test_logits_read_late_are_those_of_their_own_sequence(
    pair: tuple[mn.Sequence, mn.Sequence], fresh_logits: Callable[[list[int]], Logits]
) -> None:
    one, other = pair
    one.extend(IDS)
    other.extend(IDS[::-1])
    other.extend([1, 2])
    evaluated = one.context.stats.tokens_evaluated
    assert_same(one.logits, fresh_logits(IDS))
    assert_same(other.logits, fresh_logits([*IDS[::-1], 1, 2]))
    assert one.context.stats.tokens_evaluated == evaluated


def change_nothing(one: mn.Sequence, other: mn.Sequence) -> None:
    pass


def append(one: mn.Sequence, other: mn.Sequence) -> None:
    one.append(9)


def go_on_with_the_other(one: mn.Sequence, other: mn.Sequence) -> None:
    other.extend([7])


def rewind_and_evaluate(one: mn.Sequence, other: mn.Sequence) -> None:
    one.rewind(2)
    one.extend([8])


@pytest.mark.parametrize("between", [change_nothing, append, go_on_with_the_other, rewind_and_evaluate])
@pytest.mark.parametrize("is_alike", [True, False], ids=["the sampler that looked ahead", "another"])
def test_what_is_drawn_is_of_the_last_token_whatever_came_after_looking_ahead(
    pair: tuple[mn.Sequence, mn.Sequence], between: Callable[[mn.Sequence, mn.Sequence], None], is_alike: bool
) -> None:
    one, other = pair
    one.extend(IDS[:8])
    other.extend(IDS[8:16])
    params = mn.SamplingParams(seed=3, temperature=2.0)
    sampler, another = mn.Sampler(params), mn.Sampler(params)
    one.append(1)
    other.append(2)
    one.context.evaluate([one, other])
    look_ahead([(one, sampler), (other, another)])
    between(one, other)
    drawing = sampler if is_alike else mn.Sampler(params.replace(top_k=7))
    expected = mn.Sampler(drawing.params)(one.logits)
    assert draw_next(one, drawing, one.tokens) == expected
    assert draw_next(other, another, other.tokens) == mn.Sampler(params)(other.logits)


def test_what_is_drawn_together_is_right_beside_guesses(tiny: mn.Model) -> None:
    with tiny.context(n_ctx=512, n_seq=3, kv_unified=False) as context:  # which evaluates them in this order
        three = [context.sequence() for _ in range(3)]
        for at, sequence in enumerate(three):
            sequence.extend(IDS[at : at + 8])
            sequence.append(at + 1)
        others = [three[0], three[2]]
        context.logits_after({three[1]: [5, 6, 7]}, others)
        params = mn.SamplingParams(seed=3, temperature=2.0)
        samplers = [mn.Sampler(params) for _ in others]
        look_ahead(list(zip(others, samplers, strict=True)))
        drawn = [
            draw_next(sequence, sampler, sequence.tokens) for sequence, sampler in zip(others, samplers, strict=True)
        ]
        assert drawn == [mn.Sampler(params)(sequence.logits) for sequence in others]


@pytest.mark.parametrize("is_greedy", [True, False])
def test_looking_ahead_reads_no_logits_that_are_not_in_the_buffer(
    pair: tuple[mn.Sequence, mn.Sequence], is_greedy: bool
) -> None:
    params = mn.SamplingParams(seed=3, temperature=0.0 if is_greedy else 1.0)
    drawing = [(sequence, mn.Sampler(params)) for sequence in pair]
    look_ahead(drawing)  # nothing is evaluated
    for sequence in pair:
        sequence.extend(IDS[:8])
        look_ahead(drawing)  # only those of the last one are there
    for sequence, sampler in drawing:
        assert draw_next(sequence, sampler, sequence.tokens) == mn.Sampler(params)(sequence.logits)
    pair[0].context.extend({sequence: [1] for sequence in pair})
    pair[0].context.close()
    look_ahead(drawing)
    with pytest.raises(mn.ClosedError):
        draw_next(*drawing[0], pair[0].tokens)


def test_truncating_one_sequence_does_not_change_the_other(
    pair: tuple[mn.Sequence, mn.Sequence], fresh_logits: Callable[[list[int]], Logits]
) -> None:
    one, other = pair
    one.extend(IDS)
    other.extend(IDS[:10])
    one.truncate(0)
    other.append(7)
    assert_same(other.logits, fresh_logits([*IDS[:10], 7]))


def test_sequences_share_the_cells_of_their_context(pair: tuple[mn.Sequence, mn.Sequence]) -> None:
    one, other = pair
    one.extend([5] * (N_CTX - 4))
    with pytest.raises(mn.ContextFullError, match="5 more are wanted, 4 are free"):
        other.extend([6] * 5)
    assert other.extend([6] * 4) == 4
    assert one.context.cells_used == N_CTX


def test_threads_that_share_a_context_get_the_logits_of_their_own_sequence(
    tiny: mn.Model, fresh_logits: Callable[[list[int]], Logits]
) -> None:
    with make_context(tiny, n_seq=3, n_ctx=200) as context:
        got: dict[int, Logits] = {}

        def run(number: int) -> None:
            sequence = context.sequence()
            for token in IDS:
                sequence.append(token + number)
                got[number] = sequence.logits

        threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number in range(3):
        assert_same(got[number], fresh_logits([token + number for token in IDS]))


# Closing


def test_closing_frees_the_cells_and_the_sequence_id(context: mn.Context) -> None:
    sequence = context.sequence()
    sequence.extend(IDS)
    sequence.close()
    sequence.close()
    assert sequence.closed
    assert context.cells_used == 0
    context.sequence().extend([5] * N_CTX)


def test_leaving_the_with_block_closes_the_sequence(context: mn.Context) -> None:
    with context.sequence() as sequence:
        sequence.extend(IDS)
    assert sequence.closed


@pytest.mark.parametrize(
    "use",
    [
        lambda sequence: sequence.extend([1]),
        lambda sequence: sequence.append(1),
        lambda sequence: sequence.score([1]),
        lambda sequence: sequence.logits,
        lambda sequence: sequence.truncate(0),
        lambda sequence: sequence.rewind(0),
    ],
    ids=["extend", "append", "score", "logits", "truncate", "rewind"],
)
@pytest.mark.parametrize("close", ["sequence", "context"])
def test_using_a_closed_sequence(
    context: mn.Context, sequence: mn.Sequence, close: str, use: Callable[[mn.Sequence], object]
) -> None:
    sequence.extend(IDS)
    (sequence if close == "sequence" else context).close()
    with pytest.raises(mn.ClosedError):
        use(sequence)


def test_the_tokens_of_a_closed_sequence_can_still_be_read(sequence: mn.Sequence) -> None:
    sequence.extend(IDS)
    sequence.close()
    assert sequence.tokens == IDS


@pytest.mark.parametrize("read", [False, True], ids=["with unread logits", "with read logits"])
def test_a_garbage_collected_sequence_frees_its_id(context: mn.Context, read: bool) -> None:
    for _ in range(3):
        sequence = context.sequence()
        sequence.extend([5] * N_CTX)
        if read:
            _ = sequence.logits
        del sequence
        gc.collect()
    assert context.cells_used == 0


def test_a_sequence_with_a_reused_id_inherits_nothing(
    context: mn.Context, fresh_logits: Callable[[list[int]], Logits]
) -> None:
    first = context.sequence()
    first.extend(IDS[::-1])
    del first
    gc.collect()
    second = context.sequence()
    with pytest.raises(mn.ContextError, match="empty"):
        _ = second.logits
    second.extend(IDS)
    assert_same(second.logits, fresh_logits(IDS))


def test_a_sequence_collected_before_its_context_closes_is_not_freed_twice() -> None:
    program = """
import gc, minerva_native as mn
context = mn.Model.demo().context(n_ctx=64, n_threads=1)
sequence = context.sequence()
sequence.extend([5, 6, 7])
del sequence
gc.collect()
context.close()
assert context.cells_used == 0
context.close()
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_score_that_does_not_fit_evaluates_nothing(tiny: mn.Model) -> None:
    with tiny.context(n_ctx=16, n_threads=1) as context, context.sequence() as sequence:
        sequence.extend([1, 2, 3])
        sequence.rewind(1)
        before = context.stats.tokens_evaluated
        with pytest.raises(mn.ContextFullError):
            sequence.score([4] * 15)
        assert context.stats.tokens_evaluated == before


@pytest.mark.parametrize("close", ["sequence", "context"])
def test_closing_during_a_call_ends_only_that_call(tiny: mn.Model, close: str) -> None:
    with tiny.context(n_ctx=64, n_batch=4, n_threads=1) as context, context.sequence() as sequence:

        def close_it(done: int, total: int) -> None:
            (sequence if close == "sequence" else context).close()

        with pytest.raises(mn.ClosedError):
            sequence.extend(list(range(20)), close_it)
        if close == "sequence":
            assert context.sequence().extend([1, 2]) == 2


def test_models_contexts_and_sequences_cannot_be_copied(tiny: mn.Model) -> None:
    with tiny.context(n_ctx=16, n_threads=1) as context, context.sequence() as sequence:
        for thing in (tiny, context, sequence):
            with pytest.raises(TypeError, match="cannot be copied"):
                copy.copy(thing)


# One token at a time


def test_one_token_at_a_time_gives_the_same_logits_as_one_batch(
    tiny: mn.Model, context: mn.Context, sequence: mn.Sequence
) -> None:
    for token in IDS:
        assert evaluated_by(context, lambda token=token: sequence.extend([token])) == 1  # type: ignore[misc]
    assert sequence == IDS
    with make_context(tiny) as other, other.sequence() as whole:
        whole.extend(IDS)
        np.testing.assert_allclose(sequence.logits, whole.logits, rtol=0, atol=1e-3 * np.abs(whole.logits).max())
    assert context.stats.decode_calls == len(IDS)


def test_extending_by_one_token_evaluates_waiting_tokens_too(context: mn.Context, sequence: mn.Sequence) -> None:
    sequence.extend(IDS)
    sequence.append(5)
    assert sequence.extend([6]) == 2
    assert sequence == [*IDS, 5, 6]


@pytest.mark.parametrize("token", [-1, 10**6, True, 1.5, "a"])
def test_one_invalid_token_changes_nothing(context: mn.Context, sequence: mn.Sequence, token: object) -> None:
    sequence.extend(IDS)
    with pytest.raises((TypeError, ValueError)):
        sequence.extend([token])  # type: ignore[list-item]
    assert sequence == IDS


def test_one_token_too_many(context: mn.Context, sequence: mn.Sequence) -> None:
    sequence.extend([5] * N_CTX)
    with pytest.raises(mn.ContextFullError):
        sequence.extend([5])
    assert len(sequence) == N_CTX


def test_progress_is_reported_for_one_token_too(sequence: mn.Sequence) -> None:
    seen: list[tuple[int, int]] = []
    sequence.extend(IDS)
    sequence.extend([5], on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 1)]


def test_reading_logits_is_timed(context: mn.Context, sequence: mn.Sequence) -> None:
    sequence.extend(IDS)
    assert context.stats.logits_seconds == 0
    _ = sequence.logits
    assert context.stats.logits_seconds > 0


def test_size_bytes_is_the_size_of_the_cells(tiny: mn.Model, sequence: mn.Sequence) -> None:
    assert sequence.size_bytes == 0
    sequence.extend(IDS)
    one = sequence.size_bytes / len(IDS)
    # 3 layers, keys and values of 2 heads of 32, in float32. libllama also writes the position of each cell.
    assert one == pytest.approx(3 * 2 * 2 * 32 * 4, rel=0.02)
    sequence.truncate(12)
    assert sequence.size_bytes == pytest.approx(12 * one, rel=0.02)
