"""The OpenAPI document, from the structs that check the requests."""

import types
from typing import Any, Union, get_args, get_origin

import msgspec

import minerva_native as mn

from . import bodies

_BODIES = {
    "/v1/chat/completions": ("Answer messages.", bodies.ChatBody),
    "/v1/completions": ("Continue texts.", bodies.CompletionBody),
    "/completion": ("Continue texts, in llama-server's shape.", bodies.NativeBody),
    "/v1/responses": ("Answer the items of a conversation.", bodies.ResponseBody),
    "/v1/chat/completions/input_tokens": ("Count the tokens of messages.", bodies.ChatBody),
    "/v1/responses/input_tokens": ("Count the tokens of the items of a conversation.", bodies.ResponseBody),
    "/tokenize": ("Encode a text.", bodies.TokenizeBody),
    "/detokenize": ("Decode tokens.", bodies.DetokenizeBody),
    "/apply-template": ("Show the prompt that messages are.", bodies.TemplateBody),
}

_STREAMED = ("/v1/chat/completions", "/v1/completions", "/completion", "/v1/responses")

_GETS = {
    "/health": "Say that the server is there.",
    "/props": "Say what a model is like.",
    "/v1/models": "List the models.",
    "/v1/models/{name}": "Describe a model.",
    "/metrics": "Count what was done, in Prometheus's text format.",
}

_ERRORS = {
    "400": "The request is wrong; `param` names the field.",
    "401": "The token is missing or wrong.",
    "403": "By another name of this machine, or from a page of another origin.",
    "404": "There is no such model.",
    "408": "The body took too long.",
    "413": "The body is too large.",
    "503": "Too busy, or about to end.",
}


def document() -> dict[str, Any]:
    """Return the description of the API."""
    kinds = [kind for _, kind in _BODIES.values()]
    references, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    for kind in (bodies.ChatBody, bodies.CompletionBody, bodies.NativeBody, bodies.ResponseBody):
        own = components[kind.__name__]["properties"]
        own |= {name: _schema(given) for name, given in bodies.SAMPLING.items() if name not in own}
    paths: dict[str, Any] = {}
    for (path, (summary, _)), reference in zip(_BODIES.items(), references, strict=True):
        content = {"application/json": {"schema": {"type": "object"}}}
        if path in _STREAMED:
            content["text/event-stream"] = {"schema": {"type": "string"}}
        body = {"required": True, "content": {"application/json": {"schema": reference}}}
        paths[path] = {"post": {"summary": summary, "requestBody": body, "responses": _responses(content)}}
    for path, summary in _GETS.items():
        media = "text/plain" if path == "/metrics" else "application/json"
        parameters = []
        if path == "/v1/models/{name}":
            parameters = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
        elif path == "/props":
            parameters = [{"name": "model", "in": "query", "schema": {"type": "string"}}]
        content = {media: {"schema": {"type": "string" if media == "text/plain" else "object"}}}
        paths[path] = {"get": {"summary": summary, "parameters": parameters, "responses": _responses(content)}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Minerva Native", "version": mn.__version__},
        "paths": paths,
        "components": {
            "schemas": components | {"Error": _ERROR},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"token": []}],
    }


_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def _responses(content: dict[str, Any]) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    errors = {status: {"description": sentence, "content": error} for status, sentence in _ERRORS.items()}
    return {"200": {"description": "The answer.", "content": content}, **errors}


_NAMES = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}


def _schema(given: Any) -> dict[str, Any]:
    """Return the schema of a type of `SamplingParams`; null stands for the default."""
    if given in _NAMES:
        return {"type": [_NAMES[given], "null"]}
    if get_origin(given) in (Union, types.UnionType):
        return {"type": [_NAMES[kind] for kind in get_args(given)]}
    return {"type": ["array", "null"]}
