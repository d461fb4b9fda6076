"""What the server says over plain HTTP, without a client library."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

import minerva_native as mn
from minerva_native.server import openapi
from serving import Served, serve
from tiny_models import TinyModel


@pytest.fixture(scope="module")
def http(served: Served) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {served.token}"}
    with httpx.Client(base_url=served.url, headers=headers, timeout=60) as client:
        yield client


def post(http: httpx.Client, path: str, body: object) -> Any:
    reply = http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_health_needs_no_token_and_the_rest_does(served: Served) -> None:
    with served.http() as stranger:
        for path in ("/health", "/v1/health"):
            reply = stranger.get(path)
            assert (reply.status_code, reply.json()) == (200, {"status": "ok"})
        for path in ("/props", "/v1/models", "/nothing"):
            reply = stranger.get(path)
            assert reply.status_code == 401
            assert reply.headers["www-authenticate"] == "Bearer"


def test_props_say_what_the_model_is_like(http: httpx.Client, demo: mn.Model) -> None:
    props = http.get("/props").json()
    assert props["model_alias"] == "minerva-demo"
    assert props["model_path"].endswith(".gguf")
    assert props["total_slots"] == 4
    assert props["default_generation_settings"]["n_ctx"] == demo.n_ctx_train
    assert props["chat_template"] == mn.ChatTemplate.of(demo).text
    assert props["eos_token"] == "<|endoftext|>"
    assert props["default_generation_settings"]["params"]["temperature"] == 0.8


def test_texts_become_tokens_and_texts_again(http: httpx.Client, demo: mn.Model) -> None:
    text = "Once <|im_end|> 🐻"
    tokenizer = demo.tokenizer
    plain = post(http, "/tokenize", {"content": text, "parse_special": False})["tokens"]
    assert plain == tokenizer.encode(text, add_special=False)
    parsed = post(http, "/tokenize", {"content": text})["tokens"]
    assert parsed == tokenizer.encode(text, add_special=False, parse_special=True)
    assert len(parsed) < len(plain)
    whole = post(http, "/tokenize", {"content": text, "add_special": True})["tokens"]
    assert whole == [tokenizer.bos, *parsed]
    pieces = post(http, "/tokenize", {"content": text, "with_pieces": True})["tokens"]
    assert [one["id"] for one in pieces] == parsed
    shown = [one["piece"] for one in pieces]
    assert any(isinstance(piece, list) for piece in shown)  # parts of the bear
    assert b"".join(p.encode() if isinstance(p, str) else bytes(p) for p in shown).decode() == text
    for ids in (plain, parsed):
        assert post(http, "/detokenize", {"tokens": ids})["content"] == text
    reply = http.post("/detokenize", json={"tokens": [10**6]})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "tokens")


def test_a_template_is_applied(http: httpx.Client, demo: mn.Model) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    template = mn.ChatTemplate.of(demo)
    assert post(http, "/apply-template", {"messages": messages})["prompt"] == template.render(messages)
    bare = post(http, "/apply-template", {"messages": messages, "add_generation_prompt": False})["prompt"]
    assert bare == template.render(messages, add_generation_prompt=False)
    counted = post(http, "/v1/chat/completions/input_tokens", {"messages": messages})["input_tokens"]
    assert counted == len(template.encode(demo.tokenizer, messages))


def test_a_head_is_a_get_without_a_body(http: httpx.Client) -> None:
    for path in ("/health", "/props", "/v1/models", "/openapi.json"):
        got, head = http.get(path), http.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == got.headers["content-length"]


def test_wrong_paths_and_methods_are_errors_in_openais_shape(http: httpx.Client) -> None:
    for method, path, status in (
        ("GET", "/nothing", 404),
        ("POST", "/v1/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models/minerva-demo", 405),
        ("POST", "/health", 405),
    ):
        reply = http.request(method, path)
        assert reply.status_code == status
        assert {*reply.json()["error"]} == {"message", "type", "param", "code"}
        if status == 405:
            assert reply.headers["allow"] in ("POST", "GET, HEAD")


def test_what_is_no_json_object_is_said(http: httpx.Client) -> None:
    for content in (b"", b"{", b"[]", b"1", b"\xff"):
        reply = http.post("/v1/completions", content=content)
        assert reply.status_code == 400
        assert "JSON" in reply.json()["error"]["message"]
    missing = http.post("/v1/completions", json={})
    assert missing.json()["error"]["param"] == "prompt"


def test_unknown_fields_are_ignored(http: httpx.Client) -> None:
    body = {"prompt": "Once", "max_tokens": 1, "service_tier": "auto", "user": "me", "store": True, "new_field": [{}]}
    assert post(http, "/v1/completions", body)["choices"][0]["finish_reason"] == "length"


def test_a_stream_is_made_of_events(http: httpx.Client) -> None:
    with http.stream("POST", "/v1/completions", json={"prompt": "Once", "max_tokens": 3, "stream": True}) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        events = reply.read().decode().split("\n\n")
    assert events[-1] == ""
    assert events[-2] == "data: [DONE]"
    assert all(json.loads(event.removeprefix("data: ")) for event in events[:-2])


def test_the_description_of_the_api_holds(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    assert document == json.loads(json.dumps(openapi.document()))
    assert document["openapi"] == "3.1.0"
    schemas = document["components"]["schemas"]
    for path, methods in document["paths"].items():
        for method, described in methods.items():
            names = {part[1:-1] for part in path.split("/") if part.startswith("{")}
            assert names == {one["name"] for one in described.get("parameters", ()) if one["in"] == "path"}
            assert method in ("get", "post")
            if method == "get" and not names:
                assert http.get(path).status_code == 200
            if method == "post":  # 405 would say that it is no endpoint
                assert http.post(path, content=b"").status_code == 400
    for name, schema in schemas.items():
        jsonschema.Draft202012Validator.check_schema(schema)
        resolved = json.loads(json.dumps(schema).replace("#/components/schemas/", "#/$defs/")) | {"$defs": schemas}
        validator = jsonschema.Draft202012Validator(resolved)
        if name == "ChatBody":
            message = {"role": "user", "content": "Hello"}
            assert validator.is_valid({"messages": [message], "temperature": 0.5, "logit_bias": {"5": 1}})
            assert not validator.is_valid({"messages": [message], "temperature": "hot"})
            assert not validator.is_valid({"messages": [{"content": "Hello"}]})
            assert not validator.is_valid({})


def test_a_message_of_the_assistant_at_the_end_is_continued(http: httpx.Client) -> None:
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Once upon a"}]
    options = {"temperature": 0, "max_tokens": 8}
    prompt = post(http, "/apply-template", {"messages": messages})["prompt"]
    assert prompt.endswith("<|im_start|>assistant\nOnce upon a")
    own = post(http, "/completion", {"prompt": prompt, "n_predict": 8, "temperature": 0})
    for explicit in ({}, {"continue_final_message": True}):
        answer = post(http, "/v1/chat/completions", {"messages": messages, **options, **explicit})
        assert answer["choices"][0]["message"]["content"] == own["content"]
    body = {"messages": messages, **options, "add_generation_prompt": True}
    fresh = post(http, "/v1/chat/completions", body)
    assert fresh["usage"]["prompt_tokens"] > answer["usage"]["prompt_tokens"]
    counted = post(http, "/v1/chat/completions/input_tokens", {"messages": messages})
    assert counted["input_tokens"] == answer["usage"]["prompt_tokens"]
    for change, param in (
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"messages": [*messages, messages[-1]]}, "messages"),
        ({"messages": [*messages[:-1], {"role": "assistant", "content": ""}]}, "continue_final_message"),
    ):
        reply = http.post("/v1/chat/completions", json={"messages": messages, **options, **change})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def test_keys_of_a_file_let_in_and_are_not_shown(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# of the family\nfirst\n\nsecond\n")
    with serve("--api-key-file", str(keys)) as served, served.http() as client:
        assert served.token == ""
        for key, status in (("first", 200), ("second", 200), ("# of the family", 401), ("third", 401)):
            assert client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == status


@pytest.mark.parametrize("token", ["99999", "00000000001", "9" * 200])
def test_a_bias_of_a_token_that_there_is_not_is_refused(http: httpx.Client, token: str) -> None:
    reply = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, "logit_bias": {token: 1}})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "logit_bias"


def test_a_model_without_a_template_says_how_to_give_one(tmp_path: Path) -> None:
    bare = TinyModel().write(tmp_path / "bare.gguf")
    with serve("-m", str(bare)) as served, served.http() as client:
        messages = [{"role": "user", "content": "a"}]
        headers = {"authorization": f"Bearer {served.token}"}
        reply = client.post("/v1/chat/completions", json={"messages": messages}, headers=headers)
        assert reply.status_code == 400
        assert "--chat-template-file" in reply.json()["error"]["message"]
