"""Speculative decoding: the same text with fewer passes, whatever the guesses are."""

import collections
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

import minerva_native as mn
from minerva_native.speculative import FIXED, Costs
from tiny_models import END, END_OF_TURN, TinyModel

PROMPT = "Once upon a time, there was a little girl named Emma. One day,"

ACCEPTED = 0.4  # of what the built-in pair drafts, at least


@pytest.fixture(scope="module")
def context(demo: mn.Model) -> Iterator[mn.Context]:
    with demo.context(n_ctx=1024, n_seq=2, n_threads=1, kv_type="f32", flash_attention="off") as context:
        yield context


@pytest.fixture
def sequence(context: mn.Context) -> Iterator[mn.Sequence]:
    with context.sequence() as sequence:
        sequence.extend(context.model.tokenizer.encode(PROMPT))
        yield sequence


def written(sequence: mn.Sequence, params: mn.SamplingParams, n: int = 80, **options: Any) -> list[int]:
    """Return the tokens, and leave the sequence as it was."""
    before = len(sequence)
    steps = list(
        mn.generate(sequence, mn.Sampler(params, tokenizer=sequence.context.model.tokenizer), max_tokens=n, **options)
    )
    tokens = [step.token for step in steps]
    assert sequence[before:] == tokens
    sequence.truncate(before)
    return tokens


class Oracle:
    """Guesses what is known to come, with an error now and then."""

    def __init__(self, start: int, tokens: list[int], wrong_every: int = 0):
        self._start, self._tokens, self._wrong_every = start, tokens, wrong_every
        self.n_asked = 0

    def draft(self, tokens: Sequence[int], n: int) -> list[int]:
        self.n_asked += 1
        at = len(tokens) - self._start
        guess = self._tokens[at : at + n]
        if self._wrong_every:
            guess = [5 if (at + k) % self._wrong_every == 0 else token for k, token in enumerate(guess)]
        return guess


GREEDY = mn.SamplingParams.greedy()
DRAWN = mn.SamplingParams(temperature=0.9, top_p=0.95, repeat_penalty=1.1, repeat_last_n=32, seed=7)


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("wrong_every", [0, 7, 2, 1])
def test_the_text_is_the_same_whatever_is_guessed(
    sequence: mn.Sequence, params: mn.SamplingParams, wrong_every: int
) -> None:
    plain = written(sequence, params)
    speculation = mn.Speculation(Oracle(len(sequence), plain, wrong_every), max_loss=math.inf)
    assert written(sequence, params, speculate=speculation) == plain
    if wrong_every == 0:
        assert speculation.accepted > 0.7 * len(plain)
    assert speculation.accepted <= speculation.drafted


def test_right_guesses_save_passes(sequence: mn.Sequence) -> None:
    plain = written(sequence, GREEDY)
    n_calls = sequence.context.stats.decode_calls
    speculation = mn.Speculation(Oracle(len(sequence), plain), max_loss=math.inf)
    written(sequence, GREEDY, speculate=speculation)
    assert sequence.context.stats.decode_calls - n_calls < 20 < len(plain)


def test_wrong_guesses_come_to_an_end(sequence: mn.Sequence) -> None:
    oracle = Oracle(len(sequence), [5] * 1000)
    plain = written(sequence, GREEDY, n=300)
    speculation = mn.Speculation(oracle)
    assert written(sequence, GREEDY, n=300, speculate=speculation) == plain
    assert speculation.accepted < 10
    assert oracle.n_asked < 100


def test_lookup_finds_what_is_repeated() -> None:
    lookup = mn.Lookup([[91, 92, 93, 94]])
    text = [1, 2, 3, 4, 5, 6, 7, 1, 2, 3]
    assert lookup.draft(text, 3) == [4, 5, 6]
    assert lookup.draft([*text, 4, 5], 99) == [6, 7, 1, 2, 3, 4, 5]
    assert lookup.draft([8, 8, 9], 3) == []  # another text
    assert lookup.draft([8, 91, 92, 93], 3) == [94]  # of the document, and not beyond its end
    assert lookup.draft([1, 2, 3], 3) == []  # what was read before is forgotten
    longer = [9, 1, 2, 3, 50, 8, 1, 2, 3, 60, 9, 1, 2, 3]
    assert mn.Lookup().draft(longer, 1) == [50]  # the longest match, not the last one


@pytest.mark.parametrize("change", [[80], [80, 81, 82], []], ids=["another", "more", "none"])
def test_lookup_goes_on_after_a_change(change: list[int]) -> None:
    lookup, before, after = mn.Lookup(), list(range(10, 20)), list(range(30, 40))
    text = [*before, 25, *after, 1, 2, *before]
    assert lookup.draft(text, 3) == [25, 30, 31]
    assert lookup.evidence(text) == 10
    for token in change:
        text.append(token)
        assert lookup.draft(text, 3) == []
    text.append(after[0])
    assert lookup.draft(text, 3) == [31, 32, 33]  # one token is enough
    assert lookup.evidence(text) == 5
    assert lookup.draft([*text, 31, 99, 98], 3) == []


def test_lookups_of_one_drafter_do_not_mix(sequence: mn.Sequence) -> None:
    documents = mn.Lookup([[91, 92, 93, 94]])
    one, other = documents.copy(), documents.copy()
    assert one.draft([1, 2, 3, 4, 1, 2, 3], 1) == [4]
    assert other.draft([5, 1, 2, 3], 1) == []
    assert other.draft([5, 1, 2, 3, 91, 92, 93], 1) == [94]
    assert one.draft([1, 2, 3, 4, 1, 2, 3, 4], 2) == [1, 2]
    mn.Speculation(documents, math.inf).over(sequence).propose()
    assert documents.draft([1, 91, 92, 93], 1) == [94]


def test_the_costs_of_passes_are_measured() -> None:
    costs = Costs()
    costs.note(9, 8, 1.0)  # nothing to compare it with
    for at in range(20):
        for n_rows, n_guessed in ((1, 0), (1, 0), (9, 8), (1, 0), (4, 3)):
            interrupted = at % 4 == 0 or (at % 2 == 0 and n_guessed)  # something else has the CPU
            costs.note(n_rows, n_guessed, 0.010 + 0.002 * n_rows + 0.02 * interrupted)
    assert [costs.base, costs.row] == pytest.approx([0.010, 0.002], rel=0.05)
    for _ in range(60):
        costs.hope(0.5)
    assert [costs.base, costs.row] == pytest.approx([0.006, 0.006], rel=0.05)  # as little is known as in the beginning
    fixed = Costs(FIXED)
    fixed.note(1, 0, 9.0)
    fixed.hope(99)
    assert (fixed.base, fixed.row) == FIXED


def test_guesses_are_as_long_as_they_are_sure_and_cheap(sequence: mn.Sequence) -> None:
    text = list(range(100, 140))

    def lengths(row: float, agreed: int) -> int:
        sequence.assign([*text, 1, *text[: agreed - 1]])
        sequence.append(text[agreed - 1])
        return len(mn.Speculation(costs=Costs((1 - row, row))).over(sequence).propose())

    assert lengths(0.1, 3) < lengths(0.1, 6) < lengths(0.1, 12)
    assert lengths(0.5, 12) < lengths(0.1, 12) < lengths(0.01, 12)
    assert lengths(0.9, 3) == 0


def test_nothing_is_guessed_that_cannot_be_part_of_the_text(sequence: mn.Sequence) -> None:
    plain = written(sequence, GREEDY)
    end = sequence.context.model.tokenizer.eos
    assert end is not None
    for max_tokens in (5, 20, 23):
        speculation = mn.Speculation(Oracle(len(sequence), plain), math.inf)
        assert written(sequence, GREEDY, max_tokens, speculate=speculation) == plain[:max_tokens]
        assert 0 < speculation.drafted == speculation.accepted < max_tokens
    sequence.append(plain[0])
    ahead = mn.Speculation(lambda tokens, n: [7, 8, end, 9], math.inf).over(sequence)
    assert ahead.propose() == [7, 8]


def test_lookup_speculates_where_the_text_repeats(demo: mn.Model) -> None:
    tokenizer = demo.tokenizer
    with demo.context(n_ctx=1024, n_threads=1, kv_type="f32", flash_attention="off") as context:
        sequence = context.sequence()
        sequence.extend(tokenizer.encode(PROMPT))
        story = written(sequence, GREEDY, n=120)
        sequence.extend(story)
        sequence.extend(tokenizer.encode(PROMPT))
        plain = written(sequence, GREEDY)
        speculation = mn.Speculation("lookup", max_loss=math.inf)
        assert written(sequence, GREEDY, speculate=speculation) == plain
        assert speculation.drafted > 0


def test_a_model_can_draft(sequence: mn.Sequence, demo: mn.Model, tiny: mn.Model) -> None:
    plain = written(sequence, GREEDY)
    with mn.DraftModel(demo, n_ctx=512, n_threads=1, kv_type="f32", flash_attention="off") as drafter:
        speculation = mn.Speculation(drafter, max_loss=math.inf)
        assert written(sequence, GREEDY, speculate=speculation) == plain
        assert speculation.drafted > 0
        assert speculation.accepted == pytest.approx(speculation.drafted, abs=33)  # the last draft may be cut off
    with mn.DraftModel(tiny) as other, pytest.raises(ValueError, match="another vocabulary"):
        mn.Speculation(other).over(sequence)


PAIR: dict[str, Any] = {"n_ctx": 1024, "n_threads": 1, "kv_type": "f32", "flash_attention": "off"}


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_smaller_model_drafts_for_a_larger_one(
    sequence: mn.Sequence, demo_draft: mn.Model, params: mn.SamplingParams
) -> None:
    plain = written(sequence, params)
    with mn.DraftModel(demo_draft, **PAIR) as drafter:
        speculation = mn.Speculation(drafter, max_loss=math.inf)
        assert written(sequence, params, speculate=speculation) == plain
    assert speculation.accepted > ACCEPTED * speculation.drafted > 0


def test_tokens_that_were_drafted_come_as_often_as_the_model_says(sequence: mn.Sequence, demo_draft: mn.Model) -> None:
    # Four tokens are given, until there is a draft: the next is drawn before it, and the last after its first token.
    start, given = list(sequence), written(sequence, GREEDY, n=4)
    params = mn.SamplingParams(temperature=1.5, top_k=8, top_p=1.0, min_p=0.0)
    drawn = collections.Counter[tuple[int, int]]()
    n_draws, n_accepted = 600, 0
    with mn.DraftModel(demo_draft, **PAIR) as drafter:
        for seed in range(n_draws):
            rest, draw = iter(given), mn.Sampler(dataclasses.replace(params, seed=seed))

            def choose(logits: Any, tokens: Any, rest: Iterator[int] = rest, draw: mn.Sampler = draw) -> int:
                return next(rest, None) or draw(logits, tokens)

            speculation = mn.Speculation(drafter, max_loss=math.inf)
            steps = list(mn.generate(sequence, choose, max_tokens=len(given) + 2, speculate=speculation))
            assert speculation.drafted
            n_accepted += speculation.accepted > 0
            drawn[steps[len(given)].token, steps[-1].token] += 1
            sequence.truncate(len(start))
    expected = dict[tuple[int, int], float]()
    sampler = mn.Sampler(params)
    sequence.extend(given)
    for first, share in zip(*sampler.distribution(sequence.logits, sequence.tokens), strict=True):
        if sequence.context.model.tokenizer.is_end(int(first)):
            expected[int(first), int(first)] = float(share)
            continue
        sequence.append(int(first))
        for second, next_share in zip(*sampler.distribution(sequence.logits, sequence.tokens), strict=True):
            expected[int(first), int(second)] = float(share * next_share)
        sequence.rewind(1)
    assert n_accepted > n_draws / 4
    assert set(drawn) <= set(expected)
    often = {pair: n_draws * share for pair, share in expected.items() if n_draws * share >= 5}
    rare = n_draws - sum(often.values())
    chi2 = sum((drawn[pair] - n) ** 2 / n for pair, n in often.items())
    chi2 += (n_draws - sum(drawn[pair] for pair in often) - rare) ** 2 / rare
    assert len(often) > 5
    assert chi2 < len(often) + 3.1 * math.sqrt(2 * len(often)) + 4  # above it in one of a thousand


def test_stop_strings_limits_and_constraints_are_kept_in_the_middle_of_a_guess(sequence: mn.Sequence) -> None:
    tokenizer = sequence.context.model.tokenizer
    plain = written(sequence, GREEDY)
    word = tokenizer.decode(plain[40:44]).strip()

    def all_of(**options: Any) -> list[tuple[Any, ...]]:
        n = len(sequence)
        steps = list(mn.generate(sequence, GREEDY, **options))
        sequence.truncate(n)
        return [(step.token, step.text, step.finish_reason, round(step.logprob, 3)) for step in steps]

    for options in ({"stop": [word]}, {"max_tokens": 43}, {"max_tokens": 60, "top_logprobs": 2}):
        with_guesses = all_of(speculate=mn.Speculation(Oracle(len(sequence), plain), math.inf), **options)
        assert with_guesses == all_of(**options)
    constraint = mn.Constraint.regex("[a-z ,.]{60}")
    kept = written(sequence, DRAWN, constraint=constraint)
    speculation = mn.Speculation(Oracle(len(sequence), kept), math.inf)
    assert written(sequence, DRAWN, constraint=constraint, speculate=speculation) == kept


def test_guesses_are_taken_back_when_the_caller_leaves(sequence: mn.Sequence) -> None:
    plain = written(sequence, GREEDY)
    before = len(sequence)
    steps = mn.generate(sequence, GREEDY, speculate=mn.Speculation(Oracle(before, plain), math.inf))
    taken = [next(steps).token for _ in range(20)]
    assert len(sequence) >= before + 20
    steps.close()  # type: ignore[attr-defined]
    assert sequence[before:] == taken


def test_a_full_context_ends_at_the_same_token(demo: mn.Model) -> None:
    with demo.context(n_ctx=64, n_threads=1, kv_type="f32", flash_attention="off") as context:
        sequence = context.sequence()
        sequence.extend(demo.tokenizer.encode(PROMPT))
        plain = written(sequence, GREEDY, n=999)
        assert (
            written(sequence, GREEDY, n=999, speculate=mn.Speculation(Oracle(len(sequence), plain * 2), math.inf))
            == plain
        )


def test_what_cannot_speculate_says_so(demo: mn.Model, load_tiny: Any) -> None:
    with demo.context(n_ctx=64, on_full="shift") as context, context.sequence() as sequence:
        sequence.extend([1, 2])
        with pytest.raises(mn.OptionError, match="on_full='error'"):
            next(mn.generate(sequence, speculate=mn.Speculation()))
        with pytest.raises(TypeError, match="speculate must be a Speculation"):
            mn.generate(sequence, speculate="lookup")  # type: ignore[arg-type]
    for architecture, kind in ("mamba", "recurrent"), ("jamba", "hybrid"):
        model = load_tiny(TinyModel(architecture))
        with pytest.raises(mn.OptionError, match=f"a {kind} memory does by checkpoints"):
            mn.LLM(model, n_ctx=64, speculate="lookup", checkpoint_bytes=0)
    with pytest.raises(ValueError, match='must be "lookup", "mtp", a model or a function'):
        mn.LLM(demo, n_ctx=64, speculate="look")
    with pytest.raises(TypeError, match=r"not a Model; for a model, DraftModel\(model\)"):
        mn.Speculation(demo)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be"):
        mn.LLM(demo, n_ctx=64, speculate=7)


@pytest.mark.parametrize(
    ("architecture", "n_rs_seq"),
    [("lfm2", 6), ("qwen35", 6), ("nemotron_h", 6), ("qwen35", 0), ("mamba", 0), ("jamba", 0), ("rwkv7", 0)],
)
@pytest.mark.parametrize("wrong_every", [0, 3, 1])
def test_a_state_goes_back_to_a_snapshot_or_to_a_checkpoint(
    load_tiny: Any, architecture: str, n_rs_seq: int, wrong_every: int
) -> None:
    model = load_tiny(TinyModel(architecture, n_layer=4))
    drawn = mn.SamplingParams(seed=3, logit_bias=dict.fromkeys((END, END_OF_TURN), -math.inf))
    options: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "kv_type": "f32", "flash_attention": "off"}
    with model.context(n_rs_seq=n_rs_seq, **options) as context, context.sequence() as sequence:
        sequence.extend(list(range(60, 90)))
        with model.context(**options) as other, other.sequence() as without:
            without.extend(list(sequence))
            plain = written(without, drawn, n=100)
        speculation = mn.Speculation(Oracle(len(sequence), plain, wrong_every), max_loss=math.inf)
        steps = list(mn.generate(sequence, drawn, max_tokens=100, speculate=speculation))
        assert [step.token for step in steps] == plain
        assert speculation.drafted > 50
        stats, wrong = context.stats, speculation.drafted - speculation.accepted
        # What is evaluated besides the text are wrong guesses, and what was right before them if there is no snapshot.
        # The last token of the text is if it was guessed.
        assert stats.tokens_evaluated - wrong - stats.tokens_reevaluated in (30 + 99, 30 + 100)
        if n_rs_seq or not wrong_every:
            assert stats.tokens_reevaluated <= 1
        else:  # the token before the guess, and what of the guess was right
            assert stats.tokens_reevaluated <= 1.5 * len(plain)
        if not wrong_every:
            assert stats.decode_calls < 25


@pytest.mark.parametrize("speculate", ["lookup", "model", "function"])
def test_an_llm_speculates_and_counts(demo: mn.Model, speculate: str) -> None:
    options: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "kv_type": "f32", "flash_attention": "off"}
    with mn.LLM(demo, **options) as llm:
        plain = llm.complete(PROMPT, max_tokens=80, temperature=0)
        chat = llm.chat(temperature=0, max_tokens=40).send("Tell me a story.")
    ways: dict[str, Any] = {"lookup": "lookup", "model": demo, "function": lambda tokens, n: plain.tokens[-n:]}
    with mn.LLM(demo, speculate=ways[speculate], **options) as llm:
        answer = llm.complete(PROMPT, max_tokens=80, temperature=0)
        assert answer.text == plain.text
        assert llm.chat(temperature=0, max_tokens=40).send("Tell me a story.").text == chat.text
        assert answer.usage.accepted <= answer.usage.drafted
        if speculate == "model":
            assert answer.usage.accepted > 0  # it costs as much as the model itself, so there are few drafts
    assert plain.usage.drafted == 0
