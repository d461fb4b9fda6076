"""The decode loop: what a step contains, and every reason to finish.

If a test needs certain tokens, a logit processor forces them. Everything else is real.
"""

from collections.abc import Iterator, Sequence
from threading import Event
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import minerva_native as mn
from tiny_models import END, END_OF_TURN, START_OF_TURN, TOKENS

N_CTX = 80


@pytest.fixture
def context(tiny: mn.Model) -> Iterator[mn.Context]:
    with tiny.context(n_ctx=N_CTX, n_threads=1, kv_type="f32", flash_attention="off") as context:
        yield context


@pytest.fixture
def sequence(context: mn.Context) -> mn.Sequence:
    """A sequence with a prompt of five tokens."""
    sequence = context.sequence()
    sequence.extend([END, *ids("the", "Ġa", "Ġb", "Ġc")])
    return sequence


class Dictate:
    """A logit processor that allows only one token: the next one of a list."""

    def __init__(self, tokens: Sequence[int]):
        self._rest = iter(tokens)

    def __call__(self, tokens: Sequence[int], logits: npt.NDArray[np.float32]) -> None:
        chosen = next(self._rest)
        logits[:] = -np.inf
        logits[chosen] = 0.0


def dictate(*tokens: str | int) -> mn.Sampler:
    chosen = [token if isinstance(token, int) else TOKENS.index(token) for token in tokens]
    return mn.Sampler(mn.SamplingParams.greedy(), [Dictate(chosen)])


def letters(text: str) -> mn.Sampler:
    """Return a sampler that generates a text character by character."""
    return dictate(*text.replace(" ", "Ġ").replace("\n", "Ċ"))


def ids(*tokens: str) -> list[int]:
    return [TOKENS.index(token) for token in tokens]


def greedy() -> mn.Sampler:
    return mn.Sampler(mn.SamplingParams.greedy())


def text_of(steps: list[mn.Step]) -> str:
    return "".join(step.text for step in steps)


# Steps


def test_each_step_is_one_token_of_the_sequence(sequence: mn.Sequence) -> None:
    prompt = list(sequence.tokens)
    steps = list(mn.generate(sequence, dictate("h", "e", "Ġw"), max_tokens=3))
    assert [step.token for step in steps] == ids("h", "e", "Ġw")
    assert [step.text for step in steps] == ["h", "e", " w"]
    assert sequence.tokens == [*prompt, *ids("h", "e", "Ġw")]


def test_a_step_is_yielded_before_its_token_is_evaluated(sequence: mn.Sequence) -> None:
    generation = mn.generate(sequence, dictate("h", "e"), max_tokens=2)
    evaluated = sequence.context.stats.tokens_evaluated
    next(generation)
    assert sequence.context.stats.tokens_evaluated == evaluated
    next(generation)
    assert sequence.context.stats.tokens_evaluated == evaluated + 1


def test_nothing_is_sampled_before_a_step_is_requested(sequence: mn.Sequence) -> None:
    mn.generate(sequence, dictate(), max_tokens=5)
    assert len(sequence) == 5


def test_a_character_of_several_tokens_is_the_text_of_the_last(sequence: mn.Sequence) -> None:
    steps = list(mn.generate(sequence, dictate("a", "ðŁ", "¦", "Ļ"), max_tokens=4))
    assert [step.text for step in steps] == ["a", "", "", "🦙"]


def test_a_step_says_how_long_it_took(sequence: mn.Sequence) -> None:
    assert all(step.seconds > 0.0 for step in mn.generate(sequence, greedy(), max_tokens=3))


def test_without_a_sampler_the_default_one_is_used(sequence: mn.Sequence) -> None:
    assert [step.finish_reason for step in mn.generate(sequence, max_tokens=1)] != [None]


def test_the_sampler_is_given_the_whole_sequence(sequence: mn.Sequence) -> None:
    lengths: list[int] = []
    sampler = mn.Sampler(mn.SamplingParams.greedy(), [lambda tokens, logits: lengths.append(len(tokens))])
    list(mn.generate(sequence, sampler, max_tokens=3))
    assert lengths == [5, 6, 7]


# Log-probabilities


def expected_logprobs(sequence: mn.Sequence, n_steps: int) -> list[float]:
    """Append greedy choices by hand, and return their log-probabilities."""
    logprobs = []
    for _ in range(n_steps):
        logits = sequence.logits.astype(np.float64)
        token = int(logits.argmax())
        logprobs.append(float(logits[token] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()))
        sequence.append(token)
    return logprobs


def test_a_logprob_is_the_log_softmax_of_the_logits(sequence: mn.Sequence) -> None:
    expected = expected_logprobs(sequence, 6)
    sequence.rewind(6)
    for step, logprob in zip(mn.generate(sequence, greedy(), max_tokens=6), expected, strict=True):
        assert step.logprob == pytest.approx(logprob, abs=1e-4)
        assert step.logprob == step.logprob


def test_logprobs_can_be_read_after_all_steps_are_made(sequence: mn.Sequence) -> None:
    expected = expected_logprobs(sequence, 6)
    sequence.rewind(6)
    steps = list(mn.generate(sequence, greedy(), max_tokens=6))
    sequence.context.close()
    assert [step.logprob for step in steps] == pytest.approx(expected, abs=1e-4)


def test_a_logprob_is_the_models_own_whatever_the_sampler_did(sequence: mn.Sequence) -> None:
    logits = sequence.logits.astype(np.float64)
    step = next(mn.generate(sequence, dictate("h"), max_tokens=1))
    expected = logits[step.token] - np.log(np.exp(logits).sum())
    assert step.logprob == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("seed", [None, 7], ids=["greedy", "drawn"])
def test_steps_that_need_no_logprobs_cost_no_copy_of_the_logits(sequence: mn.Sequence, seed: int | None) -> None:
    params = mn.SamplingParams.greedy() if seed is None else mn.SamplingParams(seed=seed)
    expected = [step.token for step in mn.generate(sequence, params, max_tokens=8)]
    sequence.rewind(8)
    before = sequence.context.stats.logits_seconds
    assert [step.token for step in mn.generate(sequence, params, max_tokens=8, logprobs=False)] == expected
    assert sequence.context.stats.logits_seconds == before


def test_a_sampler_of_somebody_else_may_keep_the_logits(sequence: mn.Sequence) -> None:
    kept: list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]] = []

    class Keeping(mn.Sampler):
        def __call__(self, logits: npt.NDArray[np.float32], *arguments: Any, **options: Any) -> int:
            kept.append((logits, logits.copy()))
            return super().__call__(logits, *arguments, **options)

    assert len(list(mn.generate(sequence, Keeping(), max_tokens=4, logprobs=False))) == 4
    assert len(kept) == 4
    assert all(np.array_equal(logits, copy) for logits, copy in kept)


def test_a_processor_may_use_the_context(sequence: mn.Sequence) -> None:
    def process(tokens: Sequence[int], logits: npt.NDArray[np.float32]) -> None:
        logits[:] = -sequence.logits

    sampler = mn.Sampler(mn.SamplingParams.greedy(), [process])
    worst = int(sequence.logits.argmin())
    assert next(mn.generate(sequence, sampler, logprobs=False)).token == worst


# Finishing: length


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_a_generation_ends_after_max_tokens(sequence: mn.Sequence, max_tokens: int) -> None:
    steps = list(mn.generate(sequence, dictate(*"abcdefgh"), max_tokens=max_tokens))
    assert [step.finish_reason for step in steps] == [None] * (max_tokens - 1) + ["length"]


def test_max_tokens_0_generates_nothing(sequence: mn.Sequence) -> None:
    assert list(mn.generate(sequence, greedy(), max_tokens=0)) == []
    assert len(sequence) == 5


def test_a_full_context_ends_a_generation(context: mn.Context, sequence: mn.Sequence) -> None:
    steps = list(mn.generate(sequence, dictate(*"a" * N_CTX)))
    assert len(steps) == N_CTX - 5
    assert steps[-1].finish_reason == "length"
    assert context.is_full


def test_a_context_without_room_for_one_token_is_an_error(sequence: mn.Sequence) -> None:
    sequence.extend([7] * (N_CTX - 5))
    with pytest.raises(mn.ContextFullError):
        next(mn.generate(sequence, greedy()))
    assert len(sequence) == N_CTX


def test_an_incomplete_character_is_replaced_in_the_last_step(sequence: mn.Sequence) -> None:
    steps = list(mn.generate(sequence, dictate("a", "ðŁ"), max_tokens=2))
    assert [step.text for step in steps] == ["a", "\ufffd"]


# Finishing: the model's own end


@pytest.mark.parametrize("end", [END, END_OF_TURN])
def test_an_end_token_ends_a_generation_and_has_no_text(sequence: mn.Sequence, end: int) -> None:
    steps = list(mn.generate(sequence, dictate("a", end, "b"), max_tokens=9))
    assert [(step.token, step.text, step.finish_reason) for step in steps] == [
        (TOKENS.index("a"), "a", None),
        (end, "", "end"),
    ]
    assert sequence.tokens[-1] == end


def test_any_other_control_token_has_no_text_and_ends_nothing(sequence: mn.Sequence) -> None:
    steps = list(mn.generate(sequence, dictate("a", START_OF_TURN, "b"), max_tokens=3))
    assert [step.text for step in steps] == ["a", "", "b"]


def test_an_end_token_at_max_tokens_is_an_end(sequence: mn.Sequence) -> None:
    steps = list(mn.generate(sequence, dictate("a", END), max_tokens=2))
    assert steps[-1].finish_reason == "end"


# Finishing: stop strings


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("abcdef", ["d"], "abc"),
        ("abcdef", ["cd"], "ab"),
        ("abcdef", ["abc"], ""),
        ("ab\n\ncd", ["\n\n"], "ab"),
        ("aaab", ["aab"], "a"),
        ("abababc", ["ababc"], "ab"),
        ("abcdef", ["xyz", "de", "cdef"], "abc"),
        ("abcdef", ["e", "cde"], "ab"),
        ("User: hi", ["User:", "user:"], ""),
    ],
)
def test_no_part_of_a_stop_string_is_in_the_text(sequence: mn.Sequence, text: str, stop: list[str], shown: str) -> None:
    steps = list(mn.generate(sequence, letters(text), max_tokens=20, stop=stop))
    assert text_of(steps) == shown
    assert steps[-1].finish_reason == "stop"


def test_a_stop_string_inside_a_token_cuts_its_text(sequence: mn.Sequence) -> None:
    steps = list(mn.generate(sequence, dictate("a", "and", "b"), max_tokens=9, stop=["n"]))
    assert [(step.text, step.finish_reason) for step in steps] == [("a", None), ("a", "stop")]


def test_a_stop_string_may_begin_in_one_token_and_end_in_another(sequence: mn.Sequence) -> None:
    steps = list(mn.generate(sequence, dictate("a", "and", "ing", "b"), max_tokens=9, stop=["ndi"]))
    assert text_of(steps) == "aa"
    assert steps[-1].finish_reason == "stop"


def test_a_stop_string_may_be_a_character_of_several_tokens(sequence: mn.Sequence) -> None:
    steps = list(mn.generate(sequence, dictate("a", "ðŁ", "¦", "Ļ", "b"), max_tokens=9, stop=["🦙"]))
    assert text_of(steps) == "a"
    assert len(steps) == 4


def test_text_that_only_begins_like_a_stop_string_is_released_when_it_differs(sequence: mn.Sequence) -> None:
    steps = list(mn.generate(sequence, letters("abxabc"), max_tokens=6, stop=["abc"]))
    assert [step.text for step in steps] == ["", "", "abx", "", "", ""]


@pytest.mark.parametrize("last", ["b", END])
def test_text_held_back_for_a_stop_string_is_released_at_the_end(sequence: mn.Sequence, last: str | int) -> None:
    steps = list(mn.generate(sequence, dictate("x", "a", last), max_tokens=3, stop=["abc", "ac"]))
    assert text_of(steps) == ("xab" if last == "b" else "xa")
    assert [step.text for step in steps][:2] == ["x", ""]


def test_the_tokens_of_a_stop_string_are_in_the_sequence(sequence: mn.Sequence) -> None:
    list(mn.generate(sequence, letters("abc"), max_tokens=9, stop=["bc"]))
    assert sequence.tokens[-3:] == ids("a", "b", "c")


def test_one_stop_string_need_not_be_in_a_list(sequence: mn.Sequence) -> None:
    assert text_of(list(mn.generate(sequence, letters("abc"), max_tokens=9, stop="bc"))) == "a"


def test_the_prompt_does_not_count_for_a_stop_string(sequence: mn.Sequence) -> None:
    sequence.extend(ids("a", "b"))
    steps = list(mn.generate(sequence, letters("cd"), max_tokens=2, stop=["bc"]))
    assert text_of(steps) == "cd"


def test_a_stop_string_that_never_occurs_does_not_change_the_text(sequence: mn.Sequence) -> None:
    steps = list(mn.generate(sequence, greedy(), max_tokens=30, stop=["the end of all things"]))
    decoded = sequence.context.model.tokenizer.decode([step.token for step in steps])
    assert text_of(steps) == decoded


# Finishing: cancelled


def test_a_cancelled_generation_ends_with_the_current_step(sequence: mn.Sequence) -> None:
    cancel = Event()
    steps = []
    for step in mn.generate(sequence, dictate(*"abcdefgh"), max_tokens=8, cancel=cancel):
        steps.append(step)
        if len(steps) == 3:
            cancel.set()
    assert text_of(steps) == "abcd"
    assert [step.finish_reason for step in steps] == [None, None, None, "cancelled"]


def test_text_held_back_is_released_when_cancelled(sequence: mn.Sequence) -> None:
    cancel = Event()
    cancel.set()
    steps = list(mn.generate(sequence, letters("abc"), max_tokens=8, stop=["abc"], cancel=cancel))
    assert [(step.text, step.finish_reason) for step in steps] == [("a", "cancelled")]


def test_a_cancelled_generation_can_be_continued(sequence: mn.Sequence) -> None:
    expected = [step.token for step in mn.generate(sequence, greedy(), max_tokens=6)]
    sequence.truncate(5)
    cancel = Event()
    cancel.set()
    first = list(mn.generate(sequence, greedy(), cancel=cancel))
    rest = list(mn.generate(sequence, greedy(), max_tokens=5))
    assert [step.token for step in first + rest] == expected


# Changing the sequence between steps


def test_a_rewind_between_steps_takes_the_generation_back(sequence: mn.Sequence) -> None:
    expected = [step.token for step in mn.generate(sequence, greedy(), max_tokens=3)]
    sequence.truncate(5)
    generation = mn.generate(sequence, greedy(), max_tokens=6)
    tokens = [next(generation).token for _ in range(3)]
    sequence.rewind(3)
    tokens += [step.token for step in generation]
    assert tokens == expected * 2


def test_the_next_step_follows_a_token_replaced_after_a_rewind(sequence: mn.Sequence) -> None:
    generation = mn.generate(sequence, greedy(), max_tokens=2)
    next(generation)
    sequence.rewind(1)
    sequence.append(*ids("the"))
    second = next(generation)
    sequence.rewind(1)
    assert sequence.tokens[-1] == TOKENS.index("the")
    assert second.token == int(sequence.logits.argmax())


def test_the_next_step_follows_tokens_added_between_steps(sequence: mn.Sequence) -> None:
    generation = mn.generate(sequence, dictate("a", "b"), max_tokens=2)
    next(generation)
    sequence.extend(ids("the", "ing"))
    next(generation)
    assert sequence.tokens[5:] == ids("a", "the", "ing", "b")


def test_a_sequence_can_be_used_after_its_generation_is_left_early(sequence: mn.Sequence) -> None:
    for step in mn.generate(sequence, dictate(*"abc"), max_tokens=3):
        if step.text == "b":
            break
    assert sequence.tokens[5:] == ids("a", "b")
    assert text_of(list(mn.generate(sequence, dictate("c"), max_tokens=1))) == "c"


# Invalid arguments, which are refused before the first step is requested


def test_an_empty_sequence_cannot_be_continued(context: mn.Context) -> None:
    with pytest.raises(ValueError, match="BOS"):
        mn.generate(context.sequence())


@pytest.mark.parametrize("stop", [[""], ["a", ""], "", [b"a"], [None], 7])
def test_stop_strings_must_be_text(sequence: mn.Sequence, stop: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        mn.generate(sequence, stop=stop)


@pytest.mark.parametrize("max_tokens", [-1, 1.5, float("nan"), "3"])
def test_max_tokens_must_be_a_number_of_tokens(sequence: mn.Sequence, max_tokens: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        mn.generate(sequence, max_tokens=max_tokens)


def test_a_closed_sequence_cannot_be_continued(sequence: mn.Sequence) -> None:
    sequence.close()
    with pytest.raises(mn.ClosedError):
        next(mn.generate(sequence, greedy()))


# With the trained model


def test_the_trained_model_tells_a_story_to_its_end(demo: mn.Model) -> None:
    with demo.context(n_ctx=512, n_threads=1) as context:
        sequence = context.sequence()
        sequence.extend(demo.tokenizer.encode("Once upon a time"))
        steps = list(mn.generate(sequence, greedy()))
    assert steps[-1].finish_reason == "end"


def test_one_seed_gives_one_story(demo: mn.Model) -> None:
    with demo.context(n_ctx=128, n_threads=1) as context:
        stories = set()
        for seed in (1, 1, 2):
            with context.sequence() as sequence:
                sequence.extend(demo.tokenizer.encode("Once upon a time"))
                sampler = mn.Sampler(mn.SamplingParams(seed=seed))
                stories.add(text_of(list(mn.generate(sequence, sampler, max_tokens=40))))
    assert len(stories) == 2


def test_a_sampler_may_return_a_numpy_integer(tiny: mn.Model) -> None:
    with tiny.context(n_ctx=64, n_threads=1) as context, context.sequence() as sequence:
        sequence.extend([1, 2])
        step = next(mn.generate(sequence, lambda logits, tokens: logits.argmax()))  # type: ignore[arg-type,return-value]
        assert type(step.token) is int


def test_stop_may_be_any_iterable(demo: mn.Model) -> None:
    with demo.context(n_ctx=128, n_threads=1) as context, context.sequence() as sequence:
        sequence.extend(demo.tokenizer.encode("Once upon a time"))
        steps = list(mn.generate(sequence, mn.Sampler(mn.SamplingParams(seed=1)), stop=(text for text in [" "])))  # type: ignore[arg-type]
        assert steps[-1].finish_reason == "stop"


def test_a_custom_decoder_turns_tokens_into_text(sequence: mn.Sequence) -> None:
    class Shouting:
        def __init__(self) -> None:
            self._stream = sequence.context.model.tokenizer.stream()

        def feed(self, token: int) -> str:
            return self._stream.feed(token).upper()

        def flush(self) -> str:
            return self._stream.flush() + "!"

    steps = list(mn.generate(sequence, dictate("h", "e"), max_tokens=2, decoder=Shouting()))
    assert text_of(steps) == "HE!"


def test_a_decoder_can_continue_in_the_middle_of_a_character(sequence: mn.Sequence) -> None:
    decoder = sequence.context.model.tokenizer.stream()
    first, *rest = [TOKENS.index(token) for token in ("Ã", "¤")]  # the two bytes of a letter
    assert decoder.feed(first) == ""
    sequence.append(first)
    assert text_of(list(mn.generate(sequence, dictate(*rest), max_tokens=1, decoder=decoder))) == "ä"


def test_a_sequence_that_is_emptied_before_the_first_step(sequence: mn.Sequence) -> None:
    steps = mn.generate(sequence, dictate("h"))
    sequence.truncate(0)
    with pytest.raises(mn.EmptySequenceError):
        next(steps)
