"""Encoder-decoder models, whose sequences answer an encoded text, against direct calls of libllama."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import minerva_native as mn
from engine_room import open_up
from minerva_native._binding import ffi, lib
from tiny_models import END, TinyModel

Logits = npt.NDArray[np.float32]

QUESTION, OTHER_QUESTION = list(range(30, 60)), list(range(200, 210))
ANSWER = [END, 5, 6, 7, 8, 9]


@pytest.fixture
def model(load_tiny: Callable[[TinyModel], mn.Model]) -> mn.Model:
    return load_tiny(TinyModel("t5"))


@pytest.fixture
def context(model: mn.Model) -> Iterator[mn.Context]:
    with model.context(n_ctx=128, n_seq=3, n_threads=1, kv_type="f32") as context:
        yield context


def by_hand(model: mn.Model, question: list[int], answer: list[int]) -> Logits:
    """Return the logits after an answer, from one `llama_encode` and one `llama_decode`."""
    with model.context(n_ctx=128, n_threads=1, kv_type="f32") as context, context.raw() as pointer:
        for function, tokens in ((lib.llama_encode, question), (lib.llama_decode, answer)):
            ids = ffi.new("llama_token[]", tokens)
            assert function(pointer, lib.llama_batch_get_one(ids, len(tokens))) == 0
        row = lib.llama_get_logits_ith(pointer, -1)
        logits: Logits = np.frombuffer(ffi.buffer(row, 4 * model.tokenizer.n_vocab), np.float32).copy()
        return logits


def assert_same(logits: Logits, expected: Logits) -> None:
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-3 * np.abs(expected).max())


def test_an_answer_depends_on_the_question(model: mn.Model, context: mn.Context) -> None:
    assert context.memory.kind == "encoder-decoder"
    assert context.encode(QUESTION) == END
    sequence = context.sequence()
    sequence.extend(ANSWER)
    assert_same(sequence.logits, by_hand(model, QUESTION, ANSWER))
    assert not np.allclose(sequence.logits, by_hand(model, OTHER_QUESTION, ANSWER), atol=0.1)
    assert (context.stats.tokens_encoded, context.stats.tokens_evaluated) == (len(QUESTION), len(ANSWER))


def test_several_sequences_answer_the_same_question(model: mn.Model, context: mn.Context) -> None:
    context.encode(QUESTION)
    one, other = context.sequence(), context.sequence()
    context.extend({one: ANSWER, other: ANSWER[:2]})
    fork = one.fork(3)
    fork.extend([1, 2])
    one.rewind(1)
    assert_same(one.logits, by_hand(model, QUESTION, ANSWER[:-1]))
    assert_same(other.logits, by_hand(model, QUESTION, ANSWER[:2]))
    assert_same(fork.logits, by_hand(model, QUESTION, [*ANSWER[:3], 1, 2]))


def test_another_question_makes_all_answers_be_reevaluated(model: mn.Model, context: mn.Context) -> None:
    context.encode(QUESTION)
    with context.sequence() as closed:
        closed.extend(ANSWER)
    sequence = context.sequence()
    sequence.extend(ANSWER)
    context.encode(OTHER_QUESTION)
    assert sequence == ANSWER
    assert_same(sequence.logits, by_hand(model, OTHER_QUESTION, ANSWER))
    again = context.sequence()
    again.extend([*ANSWER, 1])
    assert_same(again.logits, by_hand(model, OTHER_QUESTION, [*ANSWER, 1]))


def test_a_saved_answer_belongs_to_its_question(context: mn.Context, tmp_path: Path) -> None:
    context.encode(QUESTION)
    sequence = context.sequence()
    sequence.extend(ANSWER)
    sequence.save(tmp_path / "saved")
    assert np.array_equal(context.restore(tmp_path / "saved").logits, sequence.logits)
    context.encode(OTHER_QUESTION)
    with pytest.raises(mn.StateError, match="answers another text"):
        context.restore(tmp_path / "saved")


def test_a_model_with_an_encoder_needs_a_question_first(context: mn.Context) -> None:
    with pytest.raises(mn.ContextError, match="give it the text to answer with encode first"):
        context.sequence()


def test_no_answer_continues_without_a_question(model: mn.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    context, cache = open_up(model, n_ctx=128, n_seq=3, n_threads=1, kv_type="f32")
    context.encode(QUESTION)
    sequence = context.sequence()
    sequence.extend(ANSWER)
    with monkeypatch.context() as patch:
        patch.setattr(cache.runner, "begin", context.cancel)
        with pytest.raises(mn.Cancelled):
            context.encode(OTHER_QUESTION)
    with pytest.raises(mn.ContextError, match="encode first"):
        sequence.extend([7])
    context.encode(QUESTION)
    assert sequence == ANSWER
    assert_same(sequence.logits, by_hand(context.model, QUESTION, ANSWER))


@pytest.mark.parametrize(
    ("wrong", "error"), [([], ValueError), ([5] * 129, ValueError), ([-1], ValueError), (["a"], TypeError)]
)
def test_invalid_questions(context: mn.Context, wrong: list[int], error: type[Exception]) -> None:
    with pytest.raises(error):
        context.encode(wrong)


def test_a_model_without_an_encoder_has_nothing_to_encode(tiny: mn.Model) -> None:
    assert not tiny.has_encoder
    with tiny.context(n_ctx=16, n_threads=1) as context, pytest.raises(mn.ContextError, match="extend a sequence"):
        context.encode([1])
