"""`Chat`: messages and a sequence that grow together, and go back together."""

import asyncio
import json
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import minerva_native as mn
from minerva_native.conversation import respelled
from tiny_models import TinyModel

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
BRIEF: dict[str, Any] = {"max_tokens": 6, "temperature": 0}

REAL_MODEL = os.environ.get("MINERVA_REAL_MODEL", "")
REAL_TEMPLATE = os.environ.get("MINERVA_REAL_TEMPLATE", "")  # the file of one, for a model that has none


@pytest.fixture
def llm(tiny: mn.Model) -> Iterator[mn.LLM]:
    with mn.LLM(tiny, n_ctx=512, n_threads=1, template=CHATML) as llm:
        yield llm


def evaluated(llm: mn.LLM, action: Callable[[], object]) -> int:
    before = llm.context.stats.tokens_evaluated
    action()
    return llm.context.stats.tokens_evaluated - before


def no_end(llm: mn.LLM) -> dict[int, float]:
    """Return the bias with which an answer goes on until the context is full."""
    ends = [token for token in range(llm.tokenizer.n_vocab) if llm.tokenizer.is_end(token)]
    return dict.fromkeys(ends, -math.inf)


# Turns


def test_an_answer_is_that_to_the_rendered_messages(llm: mn.LLM) -> None:
    chat = llm.chat(system="Be brief.", **BRIEF)
    answer = chat.send("Hello")
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert answer.tokens == llm.chat_completion(said, **BRIEF).tokens
    assert chat.messages == [*said, {"role": "assistant", "content": answer.text}]
    assert answer.is_chat


def test_each_token_of_a_conversation_is_evaluated_once(demo: mn.Model) -> None:
    llm = mn.LLM(demo, n_ctx=512, n_threads=1)
    chat = llm.chat(max_tokens=20, seed=1, logit_bias=no_end(llm))
    answers: list[mn.Completion] = []

    def talk() -> None:
        for text in ("Hello", "And then?", "the other"):
            answers.append(chat.send(text))

    count = evaluated(llm, talk)
    assert count == len(chat.sequence) - chat.sequence.n_waiting
    # The last token of an answer waits: it is evaluated with the turn after it.
    assert [answer.usage.cached_tokens for answer in answers[1:]] == [
        answer.usage.prompt_tokens + len(answer.tokens) - 1 for answer in answers[:-1]
    ]


def test_a_message_cannot_end_a_turn(llm: mn.LLM) -> None:
    chat = llm.chat(**BRIEF)
    chat.send("a<|im_end|>b")
    end = llm.tokenizer.encode("<|im_end|>", add_special=False, parse_special=True)[0]
    prompt = chat.sequence[: len(chat.sequence) - 6]
    assert list(prompt).count(end) == 1


def test_the_pieces_of_a_streamed_answer_are_the_answer(llm: mn.LLM) -> None:
    sent, streamed = llm.chat(**BRIEF), llm.chat(**BRIEF)
    answer = sent.send("Hello")
    chunks = list(streamed.stream("Hello"))
    assert "".join(chunk.text for chunk in chunks) == answer.text
    assert streamed.messages == sent.messages
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(answer.tokens)


def test_it_is_asynchronous_too(llm: mn.LLM) -> None:
    expected = llm.chat(**BRIEF)
    for text in ("Hello", "More"):
        expected.send(text)

    async def main() -> list[dict[str, Any]]:
        chat = llm.chat(**BRIEF)
        await chat.asend("Hello")
        async for _ in chat.astream("More"):
            pass
        return chat.messages

    assert asyncio.run(main()) == expected.messages


def test_options_of_the_chat_are_defaults_for_its_turns(llm: mn.LLM) -> None:
    chat = llm.chat(**BRIEF)
    assert len(chat.send("Hello").tokens) <= 6
    assert len(chat.send("Hello", max_tokens=2).tokens) <= 2
    with pytest.raises(TypeError, match=r"chat\(\) has no argument 'temprature'"):
        llm.chat(temprature=1)
    with pytest.raises(TypeError, match=r"send\(\) has no argument 'temprature'"):
        chat.send("x", temprature=1)
    with pytest.raises(TypeError, match="message must be a str, a dict or a list of dicts, not None"):
        chat.send(None)  # type: ignore[arg-type]


def test_messages_of_other_roles_can_be_sent(llm: mn.LLM) -> None:
    chat = llm.chat(**BRIEF)
    chat.send({"role": "tool", "content": "3"})
    assert [message["role"] for message in chat.messages] == ["tool", "assistant"]


def test_variables_reach_the_template(llm: mn.LLM) -> None:
    chat = llm.chat(template="{{ messages[0].content }}{{ mood }}", **BRIEF)
    chat.send("the", chat_template_kwargs={"mood": " sad"})
    assert llm.tokenizer.decode(chat.sequence).startswith("the sad")


def test_a_template_that_rewrites_history_keeps_the_common_prefix(llm: mn.LLM) -> None:
    last_only = CHATML.replace("message.content", "(message.content if not loop.first or loop.last else 'old')")
    chat = llm.chat(template=last_only, **BRIEF, logit_bias=no_end(llm))
    first = chat.send("Hello there and then")
    second = chat.send("More")
    assert second.usage.cached_tokens < first.usage.prompt_tokens
    assert second.usage.cached_tokens > 0


# Going back


def test_the_next_turn_evaluates_what_is_new_with_every_upstream_template_that_only_appends(
    demo: mn.Model, llama_cpp_source: Path
) -> None:
    appending = []
    with mn.LLM(demo, n_ctx=8192, n_threads=1) as llm:
        bias = {token.id: -100.0 for token in llm.tokenizer.special_tokens}  # no template writes them into an answer
        for path in sorted((llama_cpp_source / "models" / "templates").glob("*.jinja")):
            template = mn.ChatTemplate(path.read_text(encoding="utf-8"))
            options: dict[str, Any] = {"chat_template_kwargs": {"functions": "", "datetime": "now"}, "logit_bias": bias}
            with llm.chat(template=template, thinking_tags=("<no>", "</no>"), **BRIEF, **options) as chat:
                try:
                    first = chat.send("the other")
                    before, asked = list(chat.sequence), [*chat.messages, {"role": "user", "content": "the one"}]
                    variables = options["chat_template_kwargs"]
                    was = template.render(chat.messages[:-1], **variables) + first.text
                    appends = template.render(asked, **variables).startswith(was)
                    n_before = llm.context.stats.tokens_evaluated
                    usage = chat.send("the one", max_tokens=0).usage
                except mn.TemplateError:
                    continue  # it wants other messages
            assert llm.context.stats.tokens_evaluated - n_before == usage.prompt_tokens - usage.cached_tokens, path.name
            # The last token of an answer has not been evaluated before.
            is_kept = usage.cached_tokens >= len(before) - 1
            assert is_kept or not appends, path.name
            if appends:
                appending.append(path.name)
    assert len(appending) >= 30


def test_a_turn_that_fails_leaves_everything_as_it_was(llm: mn.LLM) -> None:
    chat = llm.chat(**BRIEF)
    chat.send("Hello")
    messages, tokens = chat.messages, list(chat.sequence)
    with pytest.raises(mn.ContextFullError):
        chat.send("the " * 600)
    assert chat.messages == messages
    assert list(chat.sequence) == tokens
    with pytest.raises((TypeError, ValueError), match="role"):
        chat.send({"content": "x"})
    assert chat.messages == messages
    assert chat.send("More").usage.cached_tokens >= len(tokens) - 1


@pytest.fixture
def slow(demo: mn.Model) -> Iterator[mn.LLM]:
    """An LLM whose answers have no end for seconds."""
    with mn.LLM(demo, n_ctx=16384, n_threads=1, template=CHATML) as llm:
        yield llm


@pytest.mark.parametrize("keep_partial", [False, True])
def test_a_cancelled_answer_is_undone_or_kept_as_asked(slow: mn.LLM, keep_partial: bool) -> None:
    chat = slow.chat(temperature=0, logit_bias=no_end(slow))
    chat.send("Hello", max_tokens=5)
    messages, n = chat.messages, len(chat.sequence)
    cancel = threading.Event()
    stream = chat.stream("More", cancel=cancel, keep_partial=keep_partial)
    pieces = [next(stream), next(stream)]
    cancel.set()
    pieces += list(stream)
    assert pieces[-1].finish_reason == "cancelled"
    if keep_partial:
        text = "".join(piece.text for piece in pieces)
        said = [{"role": "user", "content": "More"}, {"role": "assistant", "content": text}]
        assert chat.messages == messages + said
    else:
        assert chat.messages == messages
        assert len(chat.sequence) == n
    assert chat.send("More", max_tokens=3).finish_reason == "length"


def test_closing_the_stream_of_an_answer_undoes_the_turn(slow: mn.LLM) -> None:
    chat = slow.chat(temperature=0, logit_bias=no_end(slow))
    with chat.stream("Hello") as stream:
        next(stream)
    assert chat.send("Hello", max_tokens=4).tokens == slow.chat(temperature=0).send("Hello", max_tokens=4).tokens
    assert len(chat.messages) == 2


def test_undo_takes_the_last_turn_back(llm: mn.LLM) -> None:
    chat = llm.chat(system="Be brief.", **BRIEF)
    first = chat.send("Hello")
    chat.send("More")
    undone = chat.undo()
    assert [message["content"] for message in undone][:1] == ["More"]
    assert len(chat.messages) == 3
    again = chat.send("More")
    assert again.usage.prompt_tokens - again.usage.cached_tokens <= 1
    assert again.usage.cached_tokens > first.usage.prompt_tokens
    chat.undo()
    chat.undo()
    assert chat.undo() == []
    assert chat.messages == [{"role": "system", "content": "Be brief."}]


def test_a_turn_that_is_undone_while_it_runs_is_not_kept(slow: mn.LLM) -> None:
    chat = slow.chat(temperature=0, logit_bias=no_end(slow))
    chat.send("Hello", max_tokens=3)
    stream = chat.stream("More", max_tokens=1000)
    next(stream)
    assert chat.undo() == [{"role": "user", "content": "More"}]
    assert list(stream)[-1].finish_reason == "cancelled"
    assert [message["content"] for message in chat.messages][:1] == ["Hello"]
    assert len(chat.messages) == 2


def test_forks_go_their_own_ways_from_shared_cells(llm: mn.LLM) -> None:
    chat = llm.chat(**BRIEF)
    chat.send("Hello")
    n = len(chat.sequence)
    fork = chat.fork()
    assert list(fork.sequence) == list(chat.sequence)
    one, other = chat.send("a b"), fork.send("c d")
    assert min(one.usage.cached_tokens, other.usage.cached_tokens) >= n - 1
    assert [message["content"] for message in chat.messages[2:3] + fork.messages[2:3]] == ["a b", "c d"]
    assert chat.messages[:2] == fork.messages[:2]


def test_messages_are_copies(llm: mn.LLM) -> None:
    chat = llm.chat(system="a", **BRIEF)
    chat.messages[0]["content"] = "b"
    assert chat.messages[0]["content"] == "a"


# Saving


def test_a_saved_chat_goes_on_where_it_was(llm: mn.LLM, tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {}}}]
    chat = llm.chat(system="Sei freundlich: äöü", tools=tools, **BRIEF)
    chat.send("Hello")
    chat.save(tmp_path / "chat.json")
    assert [path.name for path in tmp_path.iterdir()] == ["chat.json"]
    loaded = llm.load_chat(tmp_path / "chat.json", **BRIEF)
    assert (loaded.messages, loaded.tools, loaded.template.text) == (chat.messages, tools, CHATML)
    assert loaded.send("More").tokens == chat.send("More").tokens


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "x"}, "its format is not"),
        ({"version": 2}, "another version: 2, not 1"),
        ({"messages": [{"content": "x"}]}, "is damaged"),
        ({"tools": None}, "is damaged"),
        ({"template": None}, "is damaged"),
    ],
)
def test_what_is_no_saved_chat_is_refused(llm: mn.LLM, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = tmp_path / "chat.json"
    llm.chat().save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(mn.StateError, match=words):
        llm.load_chat(path)
    path.write_text("{")
    with pytest.raises(mn.StateError, match="is no saved chat"):
        llm.load_chat(path)
    with pytest.raises(FileNotFoundError):
        llm.load_chat(tmp_path / "missing")


# A full context


def small(model: mn.Model, on_full: Any) -> mn.LLM:
    return mn.LLM(model, n_ctx=256, n_threads=1, template=CHATML, on_full=on_full)


def test_a_full_context_is_an_error_by_default(tiny: mn.Model) -> None:
    with small(tiny, "error") as llm:
        chat = llm.chat(system="Be brief.", **BRIEF)
        with pytest.raises(mn.ContextFullError):
            for _ in range(20):
                chat.send("the other and the one")
        assert chat.messages[-1]["role"] == "assistant"


def test_the_oldest_turns_go_and_it_is_said(tiny: mn.Model, caplog: pytest.LogCaptureFixture) -> None:
    with small(tiny, "drop_turns") as llm, caplog.at_level(logging.WARNING, "minerva_native"):
        chat = llm.chat(system="Be brief.", **BRIEF)
        dropped = 0
        for number in range(12):
            answer = chat.send(f"the other and the one {number}")
            dropped += answer.dropped_turns
            roles = [message["role"] for message in chat.messages]
            assert roles == ["system"] + ["user", "assistant"] * (number + 1 - dropped)
            assert chat.messages[-2]["content"].endswith(f" {number}")
            assert len(chat.sequence) <= 256
        assert dropped > 0
        assert "the context is full: a chat goes on with " in caplog.text
        messages = chat.messages
        with pytest.raises(mn.ContextFullError):
            chat.send("the " * 300)
        assert chat.messages == messages


def test_a_function_can_say_what_goes(tiny: mn.Model) -> None:
    calls: list[int] = []

    def keep_last(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        calls.append(len(messages))
        return messages[-1:]

    with small(tiny, keep_last) as llm:
        chat = llm.chat(system="Be brief.", **BRIEF)
        while not calls:
            answer = chat.send("the other and the one")
        assert answer.dropped_turns == (calls[0] - 2) // 2
        assert len(chat.messages) == 2
    with small(tiny, list) as llm, pytest.raises(mn.ContextFullError):
        llm.chat(**BRIEF).send("the " * 300)  # a function that drops nothing


def test_idle_chats_give_their_room_to_whoever_needs_it(tiny: mn.Model) -> None:
    with mn.LLM(tiny, n_ctx=256, n_seq=2, n_threads=1, template=CHATML) as llm:
        chats = [llm.chat(system=f"the other {number} " * 8, **BRIEF) for number in range(4)]
        for _ in range(2):
            for number, chat in enumerate(chats):
                expected = llm.chat_completion([*chat.messages, {"role": "user", "content": f"{number}"}], **BRIEF)
                assert chat.send(f"{number}").tokens == expected.tokens
        assert llm.complete([5] * 240, max_tokens=2).usage.completion_tokens == 2
        assert llm.tokenizer.decode(chats[0].sequence, special=True).count("<|im_start|>") == 5


def test_what_was_evicted_is_counted_as_evaluated(llm: mn.LLM) -> None:
    chat = llm.chat(system="the other " * 20, **BRIEF)
    chat.send("Hello")
    chat.park()
    llm.context.clear_cache()
    before = llm.context.stats.tokens_evaluated
    usage = chat.send("the").usage
    assert usage.cached_tokens == 0
    generated = usage.completion_tokens - 1  # the last one is not evaluated yet
    assert llm.context.stats.tokens_evaluated - before == usage.prompt_tokens + generated


def test_a_parked_chats_next_turn_can_be_cancelled_and_keeps_what_it_held(llm: mn.LLM) -> None:
    chat = llm.chat(system="the other " * 20, **BRIEF)
    chat.send("Hello")
    tokens = list(chat.sequence)
    chat.park()
    llm.context.clear_cache()
    stop = threading.Event()
    stop.set()
    with pytest.raises(mn.Cancelled):
        chat.send("the", cancel=stop)
    assert chat.sequence == tokens


# The end


def test_a_closed_chat_is_of_no_use(llm: mn.LLM) -> None:
    with llm.chat(**BRIEF) as chat:
        chat.send("Hello")
        sequence = chat.sequence
    assert sequence.closed
    assert llm.context.cells_used == 0
    for action in (lambda: chat.send("x"), lambda: chat.fork(), lambda: chat.sequence):
        with pytest.raises(mn.ClosedError, match="this Chat is closed"):
            action()
    assert repr(chat) == "<Chat: closed>"


def test_a_chat_of_a_closed_llm_says_so(tiny: mn.Model) -> None:
    with mn.LLM(tiny, n_ctx=256, template=CHATML) as llm:
        chat = llm.chat(**BRIEF)
        chat.send("Hello")
    with pytest.raises(mn.ClosedError, match="this LLM is closed"):
        chat.send("x")


@pytest.mark.parametrize("architecture", ["mamba", "lfm2", "gemma2"])
def test_it_works_on_every_kind_of_memory(load_tiny: Callable[[TinyModel], mn.Model], architecture: str) -> None:
    with mn.LLM(
        load_tiny(TinyModel(architecture, tied=architecture == "gemma2")),
        n_ctx=512,
        n_seq=3,
        n_threads=1,
        template=CHATML,
    ) as llm:
        chat = llm.chat(**BRIEF)
        for text in ("Hello", "More", "the"):
            expected = llm.chat_completion([*chat.messages, {"role": "user", "content": text}], **BRIEF)
            assert chat.send(text).tokens == expected.tokens
        chat.undo()
        assert len(chat.messages) == 4
        assert chat.send("the").tokens == expected.tokens


# Spelling


def test_tokens_that_spell_the_same_text_are_kept(tiny: mn.Model) -> None:
    tokenizer = tiny.tokenizer
    end = tokenizer.encode("<|im_end|>", parse_special=True, add_special=False)
    letters = [token for letter in "the and" for token in tokenizer.encode(letter, add_special=False)]
    word = tokenizer.encode("the and", add_special=False)
    assert letters != word
    assert respelled(tokenizer, letters, word + end + word) == letters + end + word
    assert respelled(tokenizer, letters + end + letters, word + end + word) == letters + end + letters
    assert respelled(tokenizer, letters + end, word + word) == letters + word
    fake = tokenizer.encode("<|im_end|>", add_special=False)
    assert respelled(tokenizer, word + end, word + fake) == word + fake
    assert respelled(tokenizer, [], word) == word


@given(old=st.lists(st.integers(0, 299), max_size=12), new=st.lists(st.integers(0, 299), max_size=12))
def test_a_respelled_prompt_spells_the_same(tiny: mn.Model, old: list[int], new: list[int]) -> None:
    tokenizer = tiny.tokenizer
    n_vocab = tokenizer.n_vocab
    old, new = [token % n_vocab for token in old], [token % n_vocab for token in new]
    kept = respelled(tokenizer, old, new)
    assert b"".join(tokenizer.piece(token, special=True) for token in kept) == b"".join(
        tokenizer.piece(token, special=True) for token in new
    )
    controls = [token for token in kept if tokenizer.is_control(token)]
    assert controls == [token for token in new if tokenizer.is_control(token)]


# A real model


# What a person would write: a system prompt if there may be one; before the first text, before each other, after it,
# and after an answer that has not ended.
BY_HAND = {
    "llama": (
        "You are terse.",
        "<|im_start|>system\nYou are terse.<|im_end|>\n<|im_start|>user\n",
        "\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "gemma3": (
        None,
        "<bos><start_of_turn>user\n",
        "\n<start_of_turn>user\n",
        "<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>",
    ),
}


@pytest.mark.real_model
@pytest.mark.skipif(not REAL_MODEL, reason="MINERVA_REAL_MODEL names no file: see CONTRIBUTING.md")
def test_a_real_models_greedy_answers_are_those_of_the_low_level_api() -> None:
    said = ["What is the capital of France?", "And of Italy?", "Say it again, please."]
    greedy = mn.SamplingParams.greedy()
    template = Path(REAL_TEMPLATE).read_text() if REAL_TEMPLATE else None
    with mn.LLM(REAL_MODEL, n_ctx=2048, template=template) as llm:
        system, before, between, after, end = BY_HAND[llm.model.architecture]
        chat = llm.chat(system=system, max_tokens=48, sampling=greedy)
        answers = [chat.send(text) for text in said]
        assert llm.context.stats.tokens_evaluated == len(chat.sequence) - chat.sequence.n_waiting
        assert llm.context.stats.tokens_reevaluated == 0

        tokenizer = llm.tokenizer
        with llm.model.context(n_ctx=2048, n_seq=8) as context, context.sequence() as sequence:
            for text, answer in zip(said, answers, strict=True):
                prompt = before + text + after
                sequence.extend(tokenizer.encode(prompt, add_special=False, parse_special=True))
                steps = list(mn.generate(sequence, greedy, max_tokens=48))
                assert answer.tokens == [step.token for step in steps]
                before = between if steps[-1].finish_reason == "end" else end + between
            assert list(sequence) == list(chat.sequence)
