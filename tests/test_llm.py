"""`LLM`: completions, streams, probabilities, and a queue that is fair and lets go of what is cancelled."""

import asyncio
import contextlib
import gc
import json
import math
import os
import pickle
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

import minerva_native as mn
from minerva_native.completion import TokenLogprob
from tiny_models import TOKENS, TinyModel

STORY = "Once upon a time, there was a little"
CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def llm(demo: mn.Model) -> Iterator[mn.LLM]:
    with mn.LLM(demo, n_ctx=512, n_threads=1) as llm:
        yield llm


@pytest.fixture
def chatty(tiny: mn.Model) -> Iterator[mn.LLM]:
    """A tiny random model that is made to chat, and never ends by itself."""
    with mn.LLM(tiny, n_ctx=512, n_threads=1, template=CHATML) as llm:
        yield llm


def by_hand(model: mn.Model, prompt: str, n: int, **params: Any) -> list[int]:
    """Return what the low-level API generates."""
    with model.context(n_ctx=512, n_threads=1) as context, context.sequence() as sequence:
        sequence.extend(model.tokenizer.encode(prompt))
        sampler = mn.Sampler(mn.SamplingParams.from_model(model, **params), tokenizer=model.tokenizer)
        return [step.token for step in mn.generate(sequence, sampler, max_tokens=n)]


def no_end(llm: mn.LLM) -> dict[int, float]:
    """Return the bias with which a text goes on until the context is full."""
    ends = [token for token in range(llm.tokenizer.n_vocab) if llm.tokenizer.is_end(token)]
    return dict.fromkeys(ends, -math.inf)


def is_idle(llm: mn.LLM) -> bool:
    """Wait until a request that was made now has been served."""
    return llm.complete("x", max_tokens=0).text == ""


def evaluated(llm: mn.LLM, action: Callable[[], object]) -> int:
    before = llm.context.stats.tokens_evaluated
    action()
    return llm.context.stats.tokens_evaluated - before


# Making one


def test_it_owns_what_it_opens() -> None:
    llm = mn.LLM(mn.DEMO_PATH, n_ctx=256, gpu_layers=0, n_threads=1)
    assert llm.model.gpu_layers == 0
    assert llm.context.n_ctx == 256
    assert not llm.closed
    llm.close()
    llm.close()
    assert llm.closed
    assert llm.model.closed
    assert llm.context.closed
    with pytest.raises(mn.ClosedError, match="this LLM is closed"):
        llm.complete(STORY)


def test_a_model_that_was_given_stays_open(demo: mn.Model) -> None:
    with mn.LLM(demo, n_ctx=64) as llm:
        assert llm.model is demo
        assert llm.tokenizer is demo.tokenizer
    assert not demo.closed
    assert llm.context.closed


def test_what_is_dropped_is_closed(demo: mn.Model) -> None:
    llm = mn.LLM(demo, n_ctx=64)
    llm.complete("x", max_tokens=1)
    context = llm.context
    del llm
    gc.collect()
    assert context.closed


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"n_cxt": 64}, TypeError, r"LLM\(\) has no argument 'n_cxt'"),
        ({"gpu_layers": 0}, TypeError, "gpu_layers: the model is loaded already"),
        ({"n_ctx": 1}, ValueError, "n_ctx"),
        ({"on_full": "shift"}, ValueError, "on_full must be"),
        ({"template": 3}, TypeError, "template must be a str or a ChatTemplate"),
        ({"template": "{% if %}"}, mn.TemplateError, "cannot be compiled"),
        ({"n_parallel": 8, "n_seq": 4}, ValueError, "n_seq=4 is too few for n_parallel=8"),
        ({"deterministic": True, "prefix_cache": True}, ValueError, "prefix_cache has no place beside deterministic"),
        ({"n_parallel": 0}, ValueError, "n_parallel"),
        ({"cache_dir": 3}, TypeError, "cache_dir must be a str or a path"),
        ({"cache_dir": mn.DEMO_PATH}, OSError, "Not a directory"),
        ({"cache_bytes": -1}, ValueError, "cache_bytes"),
        ({"speculate": True}, TypeError, 'speculate must be "lookup"'),
    ],
)
def test_wrong_arguments_are_named(
    demo: mn.Model, arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        mn.LLM(demo, **arguments)


def test_it_cannot_be_copied(llm: mn.LLM) -> None:
    with pytest.raises(TypeError, match="cannot be copied"):
        pickle.dumps(llm)


def test_a_process_ends_although_a_request_is_running() -> None:
    program = (
        "import minerva_native as mn\n"
        "llm = mn.LLM(mn.DEMO_PATH, n_ctx=4096, n_threads=1)\n"
        "stream = llm.stream('Once', logit_bias=dict.fromkeys(range(8), -1e9))\n"
        "print(next(stream).token is not None)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "True\n", "")


# Completions


def test_a_completion_is_what_the_low_level_api_makes(llm: mn.LLM) -> None:
    completion = llm.complete(STORY, max_tokens=20, seed=3)
    assert completion.tokens == by_hand(llm.model, STORY, 20, seed=3)
    assert completion.text == llm.tokenizer.decode([*llm.tokenizer.encode(STORY), *completion.tokens])[len(STORY) :]
    assert completion.finish_reason == "length"
    assert not completion.context_full
    assert (completion.reasoning, completion.tool_calls, completion.parsed, completion.logprobs) == ("", (), None, None)


def test_token_ids_are_a_prompt_too(llm: mn.LLM) -> None:
    ids = llm.tokenizer.encode(STORY)
    assert llm.complete(ids, max_tokens=5, temperature=0).tokens == by_hand(llm.model, STORY, 5, temperature=0)
    assert llm.complete(np.array(ids), max_tokens=5, temperature=0).usage.prompt_tokens == len(ids)


def test_usage_counts_what_was_evaluated_and_what_was_cached(llm: mn.LLM) -> None:
    n = llm.count_tokens(STORY)
    first = llm.complete(STORY, max_tokens=5, temperature=0)
    assert (first.usage.prompt_tokens, first.usage.cached_tokens, first.usage.completion_tokens) == (n, 0, 5)
    more = f"{STORY} girl named"
    longer: list[mn.Completion] = []
    assert evaluated(llm, lambda: longer.append(llm.complete(more, max_tokens=1))) == llm.count_tokens(more) - n
    assert longer[0].usage.cached_tokens == n


def test_timings_add_up(llm: mn.LLM) -> None:
    timings = llm.complete(STORY, max_tokens=5).timings
    assert timings.queue >= 0
    assert timings.prefill > 0
    assert timings.queue + timings.prefill <= timings.first_token <= timings.total


def test_a_full_context_is_told_from_max_tokens(demo: mn.Model) -> None:
    with mn.LLM(demo, n_ctx=256, n_threads=1) as llm:
        completion = llm.complete(STORY, logit_bias=no_end(llm))
        assert (completion.finish_reason, completion.context_full) == ("length", True)
        assert completion.usage.prompt_tokens + completion.usage.completion_tokens == 256


def test_no_tokens_can_be_asked_for(llm: mn.LLM) -> None:
    completion = llm.complete(STORY, max_tokens=0)
    assert (completion.text, completion.tokens, completion.finish_reason) == ("", [], "length")
    assert not completion.context_full
    assert completion.usage.prompt_tokens == llm.count_tokens(STORY)
    assert [chunk.finish_reason for chunk in llm.stream(STORY, max_tokens=0)] == ["length"]


def test_stop_strings_and_the_names_of_control_tokens_end_a_text(llm: mn.LLM, chatty: mn.LLM) -> None:
    whole = llm.complete(STORY, max_tokens=20, temperature=0)
    stopped = llm.complete(STORY, max_tokens=20, temperature=0, stop=whole.text[8:12])
    assert (stopped.text, stopped.finish_reason) == (whole.text[:8], "stop")
    start = TOKENS.index("<|im_start|>")
    stopped = chatty.complete("the", max_tokens=5, stop=["<|im_start|>"], logit_bias={start: 1e6})
    assert (stopped.text, stopped.tokens, stopped.finish_reason) == ("", [start], "stop")


def test_logprobs_and_alternatives(llm: mn.LLM) -> None:
    completion = llm.complete(STORY, max_tokens=4, temperature=0, top_logprobs=3)
    assert completion.logprobs is not None
    for token, entry in zip(completion.tokens, completion.logprobs, strict=True):
        assert entry.token == token == entry.top[0].token
        assert entry.logprob == pytest.approx(entry.top[0].logprob)
        assert len(entry.top) == 3
        assert entry.piece == llm.tokenizer.piece(token) == entry.text.encode()
    plain = llm.complete(STORY, max_tokens=4, temperature=0, logprobs=True).logprobs
    assert plain is not None
    assert [entry.logprob for entry in plain] == pytest.approx([entry.logprob for entry in completion.logprobs])
    assert all(entry.top == () for entry in plain)


def test_a_prompt_can_be_echoed_with_its_logprobs(llm: mn.LLM) -> None:
    completion = llm.complete(STORY, max_tokens=3, temperature=0, echo=True)
    assert completion.text.startswith(f"{STORY} ")
    assert len(completion.tokens) == 3
    completion = llm.complete(STORY, max_tokens=3, temperature=0, echo=True, top_logprobs=2)
    scores = llm.score(STORY)
    assert completion.logprobs is not None
    assert completion.logprobs[0].logprob is None
    assert [entry.token for entry in completion.logprobs] == scores.tokens + completion.tokens
    values = [entry.logprob for entry in completion.logprobs[1 : len(scores.tokens)]]
    assert values == pytest.approx(scores.logprobs[1:])
    assert completion.logprobs[0].top == ()
    for entry in completion.logprobs[1:]:
        assert entry.logprob is not None
        best, second = (one.logprob or 0.0 for one in entry.top)
        assert best >= second
        own = [one.logprob for one in entry.top if one.token == entry.token]
        assert own == [pytest.approx(entry.logprob)] or entry.logprob <= second


def test_what_it_is_in_openais_shape(llm: mn.LLM, chatty: mn.LLM) -> None:
    raw = llm.complete(STORY, max_tokens=3, temperature=0, top_logprobs=2).to_dict()
    assert json.loads(json.dumps(raw)) == raw
    assert raw["object"] == "text_completion"
    assert raw["model"] == "minerva-demo.gguf"
    assert raw["choices"][0]["finish_reason"] == "length"
    assert len(raw["choices"][0]["logprobs"]["tokens"]) == 3
    assert raw["usage"]["total_tokens"] == raw["usage"]["prompt_tokens"] + 3
    chat = chatty.chat_completion(HELLO, max_tokens=3, n=2, logprobs=True).to_dict()
    assert json.loads(json.dumps(chat)) == chat
    assert chat["object"] == "chat.completion"
    assert [choice["index"] for choice in chat["choices"]] == [0, 1]
    assert chat["choices"][1]["message"]["role"] == "assistant"
    entries = chat["choices"][0]["logprobs"]["content"]
    assert len(entries) == 3
    assert all(bytes(entry["bytes"]).decode(errors="replace") == entry["token"] for entry in entries)
    assert chat["usage"]["completion_tokens"] == 6


def test_a_part_of_a_character_has_its_own_bytes_in_openais_shape() -> None:
    entry = TokenLogprob(7, b"\xe0\xb8", -1.0)
    content = mn.Completion(text="", is_chat=True, logprobs=[entry]).to_dict()["choices"][0]["logprobs"]["content"]
    assert content == [{"token": "\ufffd", "logprob": -1.0, "bytes": [0xE0, 0xB8], "top_logprobs": []}]


def test_an_end_is_a_stop_in_openais_shape() -> None:
    assert mn.Completion(text="x", finish_reason="end").to_dict()["choices"][0]["finish_reason"] == "stop"


def test_a_notebook_quotes_the_reasoning() -> None:
    assert mn.Completion(text="yes")._repr_markdown_() == "yes"
    assert mn.Completion(text="yes", reasoning="a\nb\n")._repr_markdown_() == "> a\n> b\n\nyes"


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"max_token": 5}, TypeError, r"complete\(\) has no argument 'max_token'"),
        ({"max_tokens": -1}, ValueError, "max_tokens must be 0 or more"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"stop": [""]}, TypeError, "stop must be strings"),
        ({"stop": 3}, TypeError, "stop must be a list"),
        ({"top_logprobs": 1.5}, TypeError, "top_logprobs must be an integer"),
        ({"echo": "yes"}, TypeError, "echo must be True or False"),
        ({"cancel": True}, TypeError, "cancel must have is_set"),
        ({"timeout": -1}, ValueError, "timeout must be from 0 to"),
        ({"timeout": "1"}, TypeError, "timeout must be a number of seconds"),
        ({"thinking_tags": ("<think>",)}, TypeError, "thinking_tags must be a pair"),
        ({"reasoning_budget": 3}, ValueError, "reasoning_budget needs thinking_tags="),
        ({"reasoning_message": 3, "thinking_tags": ("a", "b")}, TypeError, "reasoning_message must be a str"),
        ({"chat_template_kwargs": 3}, TypeError, "chat_template_kwargs must be a dict"),
        ({"sampling": 3}, TypeError, "sampling must be SamplingParams"),
        ({"sampling": mn.SamplingParams(), "top_k": 3}, TypeError, "top_k would be ignored"),
    ],
)
def test_wrong_options_are_named_before_anything_happens(
    llm: mn.LLM, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    for method in (llm.complete, llm.stream):
        with pytest.raises(error, match=words.replace("complete", method.__name__)):
            method(STORY, **options)
    assert llm.context.stats.tokens_evaluated == 0


@pytest.mark.parametrize("prompt", [None, 3, b"x", {"role": "user"}, [1.5], ["x"], [10**9]])
def test_wrong_prompts_are_refused(llm: mn.LLM, prompt: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"prompt|token id"):
        llm.complete(prompt)


def test_an_empty_prompt_is_refused(llm: mn.LLM) -> None:
    with pytest.raises(mn.EmptySequenceError, match="the prompt has no tokens"):
        llm.complete([])


def test_a_prompt_that_does_not_fit_is_refused_and_the_next_one_is_served(llm: mn.LLM) -> None:
    with pytest.raises(mn.ContextFullError):
        llm.complete([5] * 600)
    assert llm.complete(STORY, max_tokens=2).usage.completion_tokens == 2
    assert llm.context.cells_used == 0


def test_the_models_own_sampling_is_the_default(llm: mn.LLM) -> None:
    assert llm.options("complete", {}).sampling == mn.SamplingParams.from_model(llm.model)
    assert llm.options("complete", {"top_k": 3}).sampling == mn.SamplingParams.from_model(llm.model, top_k=3)


def test_map_keeps_the_order(llm: mn.LLM) -> None:
    prompts = [STORY, "The dog", "A cat"]
    single = [llm.complete(prompt, max_tokens=6, temperature=0).text for prompt in prompts]
    assert [one.text for one in llm.map(prompts, max_tokens=6, temperature=0)] == single


# Streams


def test_the_pieces_of_a_stream_are_the_completion(llm: mn.LLM) -> None:
    completion = llm.complete(STORY, max_tokens=12, seed=1, top_logprobs=1)
    chunks = list(llm.stream(STORY, max_tokens=12, seed=1, top_logprobs=1))
    assert "".join(chunk.text for chunk in chunks) == completion.text
    assert [chunk.token for chunk in chunks] == completion.tokens
    assert [chunk.finish_reason for chunk in chunks] == [None] * 11 + ["length"]
    assert completion.logprobs is not None
    assert [chunk.logprob for chunk in chunks] == pytest.approx([entry.logprob for entry in completion.logprobs])
    assert [chunk.top_logprobs[0][0] for chunk in chunks] == [entry.top[0].token for entry in completion.logprobs]
    assert [chunk.usage is None for chunk in chunks] == [True] * 11 + [False]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    assert chunks[-1].timings is not None


def test_a_stream_that_nobody_reads_does_not_hold_up_others(llm: mn.LLM) -> None:
    stream = llm.stream(STORY, max_tokens=10, temperature=0)
    assert llm.complete(STORY, max_tokens=10, temperature=0).text == "".join(chunk.text for chunk in stream)


def endless(llm: mn.LLM, **options: Any) -> mn.requests.Stream[mn.Chunk]:
    """Start a request that takes all of the context."""
    stream = llm.stream(STORY, logit_bias=no_end(llm), temperature=0, **options)
    next(stream)
    return stream


@pytest.fixture
def slow(demo: mn.Model) -> Iterator[mn.LLM]:
    """An LLM whose endless requests take seconds."""
    with mn.LLM(demo, n_ctx=16384, n_threads=1) as llm:
        yield llm


def test_closing_a_stream_stops_it_within_a_token(slow: mn.LLM) -> None:
    stream = endless(slow)
    stream.close()
    before = slow.context.stats.tokens_evaluated
    assert is_idle(slow)
    assert slow.context.stats.tokens_evaluated - before < 1000
    assert list(stream) == []


def test_dropping_a_stream_stops_it(slow: mn.LLM) -> None:
    for _ in endless(slow):
        break
    assert is_idle(slow)
    assert slow.context.stats.tokens_evaluated < 5000


def test_a_cancel_token_ends_a_stream_with_what_there_is(slow: mn.LLM) -> None:
    cancel = threading.Event()
    stream = endless(slow, cancel=cancel)
    cancel.set()
    chunks = list(stream)
    assert chunks[-1].finish_reason == "cancelled"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(chunks) + 1
    assert len(chunks) < 5000


def test_a_timeout_ends_a_completion_with_what_there_is(slow: mn.LLM) -> None:
    completion = slow.complete(STORY, logit_bias=no_end(slow), timeout=0.2)
    assert completion.finish_reason == "cancelled"
    assert len(completion.tokens) < 16000


def test_a_request_that_is_cancelled_in_the_queue_leaves_it(slow: mn.LLM) -> None:
    stream = endless(slow)
    cancel = threading.Event()
    timer = threading.Timer(0.05, cancel.set)
    timer.start()
    with pytest.raises(mn.Cancelled, match="cancelled before the first token"):
        slow.complete(STORY, cancel=cancel)
    with pytest.raises(mn.Cancelled, match=r"its timeout of 0\.05 s"):
        slow.complete(STORY, timeout=0.05)
    assert len(slow.queue) == 0
    assert next(stream).finish_reason is None  # the other one was not touched
    stream.close()


def test_a_cancelled_prefill_raises(load_tiny: Callable[[TinyModel], mn.Model]) -> None:
    model = load_tiny(TinyModel(n_layer=4, n_embd=256, n_ff=1024))
    with mn.LLM(model, n_ctx=8192, n_threads=1) as llm:
        with pytest.raises(mn.Cancelled, match="timeout"):
            llm.complete([20 + at % 200 for at in range(8000)], timeout=0.1)
        assert llm.context.cells_used == 0
        assert llm.complete("the", max_tokens=2).usage.completion_tokens == 2


def test_requests_are_served_in_the_order_they_came(slow: mn.LLM) -> None:
    first = endless(slow)
    waiting = [slow.stream(f"{STORY} {name}", max_tokens=3) for name in ("a", "b", "c")]
    assert len(slow.queue) == 3
    first.close()
    last = [list(stream)[-1].timings for stream in waiting]
    queued = [timings.queue for timings in last if timings is not None]
    assert queued == sorted(queued)


def test_closing_ends_what_runs_and_refuses_what_waits(demo: mn.Model) -> None:
    llm = mn.LLM(demo, n_ctx=16384, n_threads=1)
    running, waiting = endless(llm), llm.stream(STORY)
    llm.close()
    assert list(running)[-1].finish_reason == "cancelled"
    with pytest.raises(mn.ClosedError, match="closed before"):
        next(waiting)
    with pytest.raises(mn.ClosedError, match="this LLM is closed"):
        llm.complete(STORY)


def test_a_thread_that_cannot_be_started_is_an_error_of_that_request(
    demo: mn.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with mn.LLM(demo, n_ctx=256, n_threads=1) as llm:
        metrics = mn.Metrics()
        metrics.watch(llm)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", fail)
            with pytest.raises(RuntimeError, match="new thread"):
                llm.complete("Once", max_tokens=1)
        assert 'outcome="error"' in metrics.prometheus()
        assert llm.complete("Once", max_tokens=1, timeout=30).tokens


def test_a_callback_that_would_wait_for_itself_is_refused(llm: mn.LLM) -> None:
    class Asking:
        def is_set(self) -> bool:
            llm.complete("x")
            return False

    request = llm.stream(STORY, max_tokens=3)
    list(request)
    with pytest.raises(mn.ReentryError, match="cannot make another request"):
        llm.queue.call(lambda request: iter([llm.complete("x")]))


@pytest.mark.parametrize("n_threads", [8])
def test_many_threads_get_what_one_gets(llm: mn.LLM, n_threads: int) -> None:
    jobs = [(f"{STORY} {word}", seed) for word in ("girl", "dog", "cat", "bird", "boy") for seed in range(4)]
    jobs = jobs * n_threads
    options: dict[str, Any] = {"max_tokens": 6}
    serial = [llm.complete(prompt, seed=seed, **options).tokens for prompt, seed in jobs]
    with ThreadPoolExecutor(n_threads) as pool:
        parallel = list(pool.map(lambda job: llm.complete(job[0], seed=job[1], **options), jobs))
    assert [completion.tokens for completion in parallel] == serial
    assert llm.context.cells_used == 0
    for prompt, completion in zip([prompt for prompt, _ in jobs], parallel, strict=True):
        assert completion.usage.prompt_tokens == llm.count_tokens(prompt)


def test_ctrl_c_stops_the_request() -> None:
    program = (
        "import os, signal, threading, minerva_native as mn\n"
        "with mn.LLM(mn.DEMO_PATH, n_ctx=32768, n_threads=1) as llm:\n"
        "    try:\n"
        "        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "        llm.complete('Once', logit_bias=dict.fromkeys(range(8), -1e9))\n"
        "    except KeyboardInterrupt:\n"
        "        print('stopped')\n"
        "    print(len(llm.complete('Once', max_tokens=2).tokens))\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "stopped\n2\n", "")


# Asynchronous


def test_tasks_get_what_calls_get(llm: mn.LLM) -> None:
    expected = [llm.complete(f"{STORY} {n}", max_tokens=5, temperature=0).text for n in range(20)]

    async def main() -> list[mn.Completion]:
        return await asyncio.gather(*(llm.acomplete(f"{STORY} {n}", max_tokens=5, temperature=0) for n in range(20)))

    assert [completion.text for completion in asyncio.run(main())] == expected


def test_without_an_event_loop_asynchronous_calls_say_so(llm: mn.LLM) -> None:
    with pytest.raises(RuntimeError, match="no asyncio event loop is running"):
        llm.astream("Hello")


def test_the_asyncio_backend_of_anyio_will_do(llm: mn.LLM) -> None:
    expected = llm.complete("Once upon", max_tokens=6, temperature=0)

    async def main() -> list[list[int]]:
        found: list[list[int]] = []

        async def one() -> None:
            found.append((await llm.acomplete("Once upon", max_tokens=6, temperature=0)).tokens)

        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(one)
        with anyio.move_on_after(0.05):
            await llm.acomplete("Once upon", max_tokens=None, stop=["no such text"], logit_bias=no_end(llm))
            raise AssertionError("it was not cancelled")
        return found

    assert anyio.run(main) == [expected.tokens] * 3
    assert llm.complete("Once upon", max_tokens=6, temperature=0).tokens == expected.tokens


def test_an_asynchronous_stream_has_the_same_pieces(llm: mn.LLM) -> None:
    async def main() -> list[mn.Chunk]:
        return [chunk async for chunk in llm.astream(STORY, max_tokens=9, seed=2)]

    assert [chunk.text for chunk in asyncio.run(main())] == [
        chunk.text for chunk in llm.stream(STORY, max_tokens=9, seed=2)
    ]


def test_the_event_loop_runs_while_a_request_does(slow: mn.LLM) -> None:
    async def main() -> int:
        task = asyncio.ensure_future(slow.acomplete(STORY, logit_bias=no_end(slow), max_tokens=2000))
        ticks = 0
        while not task.done():
            await asyncio.sleep(0.001)
            ticks += 1
        return ticks

    assert asyncio.run(main()) > 5


def test_cancelling_a_task_stops_its_request_and_no_other(slow: mn.LLM) -> None:
    async def main() -> tuple[str, str]:
        running = asyncio.ensure_future(slow.acomplete(STORY, logit_bias=no_end(slow)))
        waiting = asyncio.ensure_future(slow.acomplete(STORY, max_tokens=3))
        other = asyncio.ensure_future(slow.acomplete(STORY, max_tokens=5, temperature=0))
        await asyncio.sleep(0.1)
        waiting.cancel()
        running.cancel()
        text = (await other).text
        for task in (running, waiting):
            with pytest.raises(asyncio.CancelledError):
                await task
        return text, slow.complete(STORY, max_tokens=5, temperature=0).text

    text, expected = asyncio.run(main())
    assert text == expected
    assert slow.context.stats.tokens_evaluated < 16000


def test_leaving_an_asynchronous_loop_stops_the_request(slow: mn.LLM) -> None:
    async def main() -> None:
        async with slow.astream(STORY, logit_bias=no_end(slow)) as chunks:
            async for _ in chunks:
                break
        with pytest.raises(mn.Cancelled, match="timeout"):
            stream = slow.astream(STORY, logit_bias=no_end(slow))
            try:
                await slow.acomplete(STORY, timeout=0.05)
            finally:
                await stream.aclose()

    asyncio.run(main())
    assert is_idle(slow)
    assert slow.context.stats.tokens_evaluated < 16000


def test_threads_and_tasks_at_once_get_what_one_gets_and_nothing_is_left(demo: mn.Model) -> None:
    """MINERVA_STRESS_SECONDS=60 for the long form."""
    end = time.monotonic() + float(os.environ.get("MINERVA_STRESS_SECONDS", "3"))
    prompts = [
        f"{beginning} {name}" for beginning in ("Once upon a time,", "One day,") for name in ("Tom", "a cat", "")
    ]
    options: dict[str, Any] = {"max_tokens": 5, "seed": 1}
    done: list[str] = []
    resident: list[int] = []
    # Without flash attention the numbers do not depend on how much of a prompt was cached.
    with mn.LLM(demo, n_ctx=1024, n_threads=1, flash_attention="off", kv_type="f32") as llm:
        expected = {prompt: llm.complete(prompt, **options).tokens for prompt in prompts}

        def one_thread(number: int) -> None:
            choice = random.Random(number)
            while time.monotonic() < end:
                prompt, way = choice.choice(prompts), choice.choice(["complete", "stream", "leave", "cancel", "late"])
                if way == "complete":
                    assert llm.complete(prompt, **options).tokens == expected[prompt]
                elif way == "stream":
                    assert [chunk.token for chunk in llm.stream(prompt, **options)] == expected[prompt]
                elif way == "leave":
                    with llm.stream(prompt, **options) as stream:
                        assert next(stream).token == expected[prompt][0]
                else:
                    token = threading.Event()
                    token.set()
                    limits: dict[str, Any] = {"cancel": token} if way == "cancel" else {"timeout": 0}
                    with pytest.raises(mn.Cancelled):
                        llm.complete(prompt, **options, **limits)
                done.append(way)

        async def one_task(number: int) -> None:
            choice = random.Random(1000 + number)
            while time.monotonic() < end:
                prompt = choice.choice(prompts)
                if choice.random() < 0.3:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(choice.choice([0, 0.05])):
                            assert (await llm.acomplete(prompt, **options)).tokens == expected[prompt]
                    done.append("task with a timeout")
                    continue
                assert (await llm.acomplete(prompt, **options)).tokens == expected[prompt]
                done.append("task")

        async def all_tasks() -> None:
            tasks = [asyncio.create_task(one_task(number)) for number in range(200)]
            while time.monotonic() < end:
                await asyncio.sleep(0.1)
                resident.append(resident_bytes())
            await asyncio.gather(*tasks)

        with ThreadPoolExecutor(17) as pool:
            futures = [pool.submit(one_thread, number) for number in range(16)]
            futures.append(pool.submit(asyncio.run, all_tasks()))
            for future in futures:
                future.result(timeout=300)
        assert is_idle(llm)
        assert len(llm.queue) == 0
        assert llm.context.cells_used == 0
        assert {"complete", "stream", "leave", "cancel", "late", "task", "task with a timeout"} == set(done)
        third = len(resident) // 3
        assert max(resident[-third:]) < max(resident[:third]) + (8 << 20)


def resident_bytes() -> int:
    """Return how much memory this process has in RAM; 0 where the system does not say so."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * 4096 if statm.exists() else 0


def test_errors_come_out_of_tasks(llm: mn.LLM) -> None:
    async def main() -> None:
        with pytest.raises(mn.ContextFullError):
            await llm.acomplete([5] * 600)

    asyncio.run(main())


# Messages without a chat


def test_messages_are_answered_and_not_kept(chatty: mn.LLM) -> None:
    first = chatty.chat_completion(HELLO, max_tokens=5, temperature=0)
    ids = mn.ChatTemplate(CHATML).encode(chatty.tokenizer, HELLO)
    assert first.usage.prompt_tokens == len(ids)
    assert first.is_chat
    assert first.message == {"role": "assistant", "content": first.text}
    assert chatty.complete(ids, max_tokens=5, temperature=0).tokens == first.tokens
    again = chatty.chat_completion(HELLO, max_tokens=5, temperature=0)
    assert (again.text, again.usage.cached_tokens) == (first.text, len(ids))


def test_several_answers_share_one_evaluated_prompt(chatty: mn.LLM) -> None:
    n = chatty.count_tokens(HELLO)
    answers: list[mn.Completion] = []
    count = evaluated(chatty, lambda: answers.append(chatty.chat_completion(HELLO, n=3, max_tokens=5, seed=1)))
    assert count == n + 3 * 4  # the last token of each waits
    assert len(answers[0].choices) == 3
    single = [chatty.chat_completion(HELLO, max_tokens=5, seed=seed).tokens for seed in (1, 2, 3)]
    assert [choice.tokens for choice in answers[0].choices] == single
    assert chatty.context.cells_used == 0


def test_messages_are_streamed(chatty: mn.LLM) -> None:
    text = "".join(chunk.text for chunk in chatty.chat_completion(HELLO, stream=True, max_tokens=6, temperature=0))
    assert text == chatty.chat_completion(HELLO, max_tokens=6, temperature=0).text

    async def main() -> tuple[str, str]:
        pieces = [chunk.text async for chunk in chatty.achat_completion_stream(HELLO, max_tokens=6, temperature=0)]
        return "".join(pieces), (await chatty.achat_completion(HELLO, max_tokens=6, temperature=0)).text

    assert asyncio.run(main()) == (text, text)
    with pytest.raises(ValueError, match="n must be 1 with stream=True"):
        chatty.chat_completion(HELLO, n=2, stream=True)


def test_a_model_without_a_template_says_how_to_give_one(tiny: mn.Model) -> None:
    with mn.LLM(tiny, n_ctx=64) as llm:
        assert llm.template is None
        for action in (lambda: llm.chat_completion(HELLO), lambda: llm.chat(), lambda: llm.count_tokens(HELLO)):
            with pytest.raises(mn.TemplateError, match="has no chat template: give one with template="):
                action()


# Probabilities


def test_a_score_is_the_sequences_own(llm: mn.LLM) -> None:
    llm.complete(STORY, max_tokens=1)  # what is cached is scored all the same
    scores = llm.score(STORY)
    with llm.context.sequence() as sequence:
        expected = sequence.score(llm.tokenizer.encode(STORY)).tolist()
    assert scores.tokens == llm.tokenizer.encode(STORY)
    assert math.isnan(scores.logprobs[0])
    assert scores.logprobs[1:] == pytest.approx(expected[1:])


ANSWERS = [" girl", " boy", " brown dog", " boy named Tom"]


def test_answers_are_chosen_by_their_probability(llm: mn.LLM) -> None:
    chosen = llm.choose(STORY, ANSWERS)
    n = len(llm.tokenizer.encode(STORY))
    totals = [math.exp(sum(llm.score(STORY + answer).logprobs[n:])) for answer in ANSWERS]
    assert list(chosen) == ANSWERS
    assert sum(chosen.values()) == pytest.approx(1)
    assert list(chosen.values()) == pytest.approx([total / sum(totals) for total in totals], rel=0.02)


def test_choosing_evaluates_the_prompt_once_and_a_batch_for_each_token(llm: mn.LLM) -> None:
    n = llm.count_tokens(STORY)
    longer = [len(llm.tokenizer.encode(STORY + answer)) - n for answer in ANSWERS]
    calls = llm.context.stats.decode_calls
    assert evaluated(llm, lambda: llm.choose(STORY, ANSWERS)) == n + sum(length - 1 for length in longer)
    assert llm.context.stats.decode_calls - calls == max(longer)
    assert llm.context.cells_used == 0


def test_more_answers_than_places_are_taken_in_turns(demo: mn.Model, llm: mn.LLM) -> None:
    answers = [f" {name} dog" for name in ("big", "small", "brown", "happy", "sad")]
    expected = llm.choose(STORY, answers)
    with mn.LLM(demo, n_ctx=256, n_seq=3, n_threads=1) as narrow:
        assert narrow.choose(STORY, answers) == pytest.approx(expected, rel=0.02)


def test_a_choice_of_one_is_certain_and_messages_are_a_prompt(chatty: mn.LLM) -> None:
    assert chatty.choose("the", ["x"]) == {"x": 1.0}
    assert sum(chatty.choose(HELLO, ["yes", "no"]).values()) == pytest.approx(1)
    for answers in ([], [""], [3]):
        with pytest.raises(ValueError, match="answers must be at least one string"):
            chatty.choose("the", answers)  # type: ignore[arg-type]


def test_tokens_are_counted(chatty: mn.LLM) -> None:
    assert chatty.count_tokens("the") == len(chatty.tokenizer.encode("the"))
    assert chatty.count_tokens(HELLO) == len(mn.ChatTemplate(CHATML).encode(chatty.tokenizer, HELLO))


def test_embeddings_are_a_clear_error(llm: mn.LLM) -> None:
    with pytest.raises(mn.MinervaError, match="embeddings are not there yet"):
        llm.embed("x")


# Reasoning

THINK = ("<think>", "</think>")


def think(text: str, budget: int | None = None, message: str = "") -> tuple[str, str]:
    """Return reasoning and answer of a text that comes a character at a time."""
    with mn.Model.demo() as model:
        tokenizer = model.tokenizer
        decoder = mn.reasoning.ReasoningDecoder(
            tokenizer, THINK, after=None, inside=False, budget=budget, message=message
        )
        tokens = [token for character in text for token in tokenizer.encode(character, add_special=False)]
        answer = "".join(map(decoder.feed, tokens)) + decoder.flush()
        return decoder.take(), answer


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("<think>a b</think>c", "a b", "c"),
        ("<think>\na\n</think>\n\nc d", "a\n", "c d"),
        ("no tags", "", "no tags"),
        ("<thin", "", "<thin"),
        ("<think>a</thin", "a</thin", ""),
        ("a<think>b</think>c<think>d</think>e", "bd", "ace"),
        ("<think></think>c", "", "c"),
        ("a <b <think>c<", "c<", "a <b "),
    ],
)
def test_tags_are_found_across_the_borders_of_tokens(text: str, reasoning: str, answer: str) -> None:
    assert think(text) == (reasoning, answer)


OPENED = CHATML.replace("assistant\n'", "assistant\n<think>\n'")


@pytest.mark.parametrize("budget", [0, 1, 7])
def test_a_budget_ends_the_reasoning_exactly_there(tiny: mn.Model, budget: int) -> None:
    options: dict[str, Any] = {"thinking_tags": THINK, "temperature": 0, "max_tokens": 40}
    with mn.LLM(tiny, n_ctx=512, n_threads=1, template=OPENED) as llm:
        free = llm.chat_completion(HELLO, **options)
        assert (free.text, free.usage.reasoning_tokens) == ("", 40)
        assert free.reasoning.startswith(llm.tokenizer.decode(free.tokens).strip()[:5])
        cut = llm.chat_completion(HELLO, reasoning_budget=budget, **options)
        end = llm.tokenizer.encode("</think>", add_special=False)
        assert cut.usage.reasoning_tokens == budget
        assert cut.tokens[: budget + len(end)] == free.tokens[:budget] + end
        assert cut.reasoning == llm.tokenizer.decode(free.tokens[:budget]).lstrip()
        assert cut.text == llm.tokenizer.decode(cut.tokens[budget + len(end) :]).lstrip()
        told = llm.chat_completion(HELLO, reasoning_budget=budget, reasoning_message="Enough.", **options)
        assert told.reasoning == (cut.reasoning + "Enough.").lstrip()
        assert told.usage.reasoning_tokens == budget


def test_a_budget_of_zero_ends_reasoning_that_the_model_begins(tiny: mn.Model) -> None:
    start, end = TOKENS.index("<|im_start|>"), TOKENS.index("<|im_end|>")
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 10, "thinking_tags": ("<|im_start|>", "Ā")}
    with mn.LLM(tiny, n_ctx=512, n_threads=1) as llm:
        completion = llm.complete("the", reasoning_budget=0, logit_bias={start: 1e6, end: -1e6}, **options)
    assert completion.tokens[0] == start
    assert completion.usage.reasoning_tokens == 0
    assert completion.reasoning == ""


def test_stop_strings_do_not_end_the_reasoning(tiny: mn.Model) -> None:
    with mn.LLM(tiny, n_ctx=512, n_threads=1, template=OPENED) as llm:
        options: dict[str, Any] = {"thinking_tags": THINK, "temperature": 0, "max_tokens": 30}
        free = llm.chat_completion(HELLO, **options)
        again = llm.chat_completion(HELLO, stop=free.reasoning[3], **options)
        assert (again.reasoning, again.finish_reason) == (free.reasoning, "length")


def test_the_pieces_of_reasoning_are_the_reasoning(tiny: mn.Model) -> None:
    with mn.LLM(tiny, n_ctx=512, n_threads=1, template=OPENED) as llm:
        options: dict[str, Any] = {"thinking_tags": THINK, "reasoning_budget": 5, "temperature": 0, "max_tokens": 25}
        whole = llm.chat_completion(HELLO, **options)
        chunks = list(llm.chat_completion(HELLO, stream=True, **options))
        assert "".join(chunk.reasoning for chunk in chunks) == whole.reasoning
        assert "".join(chunk.text for chunk in chunks) == whole.text
        assert time.time() >= whole.created
