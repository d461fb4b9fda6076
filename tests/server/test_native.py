"""`/completion`, llama-server's own endpoint, and the server's own defaults for the sampler."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import httpx
import pytest

import minerva_native as mn
from serving import Served

GREEDY: dict[str, Any] = {"temperature": 0}


@pytest.fixture(scope="module")
def http(exact: Served) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {exact.token}"}
    with httpx.Client(base_url=exact.url, headers=headers, timeout=60) as client:
        yield client


def complete(http: httpx.Client, **body: Any) -> Any:
    reply = http.post("/completion", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def pieces(http: httpx.Client, **body: Any) -> list[Any]:
    reply = http.post("/completion", json={"stream": True, **body})
    assert reply.status_code == 200, reply.text
    *events, done, rest = reply.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_a_text_is_continued_as_by_the_engine(http: httpx.Client, llm: mn.LLM) -> None:
    own = llm.complete("Once upon a time", temperature=0, max_tokens=6)
    reply = complete(http, prompt="Once upon a time", n_predict=6, return_tokens=True, **GREEDY)
    assert (reply["content"], reply["tokens"]) == (own.text, own.tokens)
    assert (reply["stop"], reply["stop_type"], reply["truncated"], reply["has_new_line"]) == (
        True,
        "limit",
        False,
        False,
    )
    assert (reply["tokens_predicted"], reply["tokens_evaluated"]) == (6, own.usage.prompt_tokens)
    assert (reply["model"], reply["prompt"]) == ("minerva-demo", "<|endoftext|>Once upon a time")
    assert reply["timings"]["predicted_n"] == 6
    timings = reply["timings"]
    assert timings["prompt_n"] + timings["cache_n"] == own.usage.prompt_tokens
    assert timings["predicted_per_second"] == pytest.approx(5e3 / timings["predicted_ms"])  # the first is the prompt's
    single = complete(http, prompt="Once upon a time", n_predict=1)["timings"]
    assert (single["predicted_n"], single["predicted_per_second"], single["predicted_per_token_ms"]) == (1, 0, 0)
    settings = reply["generation_settings"]
    assert (settings["temperature"], settings["n_predict"], settings["top_k"]) == (0, 6, 40)
    assert complete(http, prompt="Once upon a time", n_predict=6, **GREEDY)["tokens"] == []


def test_the_pieces_of_a_stream_are_the_reply(http: httpx.Client) -> None:
    options = {"prompt": "Once upon a time", "n_predict": 6, "n_probs": 2, **GREEDY}
    whole = complete(http, return_tokens=True, **options)
    *parts, last = pieces(http, **options)
    assert "".join(part["content"] for part in parts) == whole["content"]
    assert [token for part in parts for token in part["tokens"]] == whole["tokens"]
    shown = [one for part in parts for one in part["completion_probabilities"]]
    wanted = whole["completion_probabilities"]
    assert [one["id"] for one in shown] == [one["id"] for one in wanted] == whole["tokens"]
    assert [one["logprob"] for one in shown] == [one["logprob"] for one in wanted]
    assert all(one["top_logprobs"][0]["id"] == one["id"] and len(one["top_logprobs"]) == 2 for one in wanted)
    assert [part["stop"] for part in (*parts, last)] == [False] * len(parts) + [True]
    assert (last["content"], last["stop_type"], last["tokens_predicted"]) == ("", "limit", 6)
    assert last["generation_settings"] == whole["generation_settings"] | {"stream": True}


def test_what_ended_the_text_is_said(http: httpx.Client) -> None:
    free = complete(http, prompt="Once upon a time", n_predict=12, **GREEDY)["content"]
    word = free.split()[2]
    stopped = complete(http, prompt="Once upon a time", n_predict=12, stop=[word], **GREEDY)
    assert (stopped["stop_type"], stopped["stopping_word"]) == ("word", word)
    assert stopped["content"] == free[: free.index(word)]
    chat = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert complete(http, prompt=chat, n_predict=60, **GREEDY)["stop_type"] == "eos"
    endless = complete(http, prompt=chat, n_predict=60, ignore_eos=True, **GREEDY)
    assert (endless["stop_type"], endless["tokens_predicted"]) == ("limit", 60)
    assert [one["bias"] for one in endless["generation_settings"]["logit_bias"]] == [None, None]


def test_the_context_ends_a_text_without_a_limit(start: Callable[..., AbstractContextManager[Served]]) -> None:
    with start("-c", "256", "--temp", "0") as server:
        headers = {"authorization": f"Bearer {server.token}"}
        with httpx.Client(base_url=server.url, headers=headers, timeout=60) as http:
            reply = complete(http, prompt="Once upon a time", ignore_eos=True)
            assert (reply["stop_type"], reply["truncated"]) == ("limit", True)
            assert reply["tokens_evaluated"] + reply["tokens_predicted"] == 256
            # What the command line says of the sampler holds for requests that say nothing.
            assert reply["generation_settings"]["temperature"] == 0
            assert complete(http, prompt="a", n_predict=1, temperature=1)["generation_settings"]["temperature"] == 1
            assert http.get("/props").json()["default_generation_settings"]["params"]["temperature"] == 0


def test_prompts_are_texts_ids_or_both(http: httpx.Client, llm: mn.LLM) -> None:
    text = "Once upon a time"
    ids = llm.tokenizer.encode(text)
    own = llm.complete(text, temperature=0, max_tokens=4).text
    for prompt in (text, {"prompt_string": text}, ids, [text], [ids], [ids[0], text]):
        assert complete(http, prompt=prompt, n_predict=4, **GREEDY)["content"] == own
    several = complete(http, prompt=[text, ids, {"prompt_string": text}], n_predict=4, **GREEDY)
    assert [reply["content"] for reply in several] == [own] * 3
    assert [reply["index"] for reply in several] == [0, 1, 2]
    streamed = ["", ""]
    for piece in pieces(http, prompt=[text, ids], n_predict=4, **GREEDY):
        streamed[piece["index"]] += piece["content"]
    assert streamed == [own, own]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": 5}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": [1, [2]]}, "prompt"),
        ({"prompt": {"prompt_string": "a", "multimodal_data": ["b"]}}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"n": 2}, "n"),
        ({"n_predict": "many"}, "n_predict"),
        ({"n_probs": -1}, "n_probs"),
        ({"temperature": -1}, "temperature"),
        ({"grammar": "root ::= ("}, "grammar"),
    ],
)
def test_a_wrong_field_is_named(http: httpx.Client, change: dict[str, Any], param: str) -> None:
    for is_streamed in (False, True):
        reply = http.post("/completion", json={"prompt": "Once", "n_predict": 1, "stream": is_streamed, **change})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
