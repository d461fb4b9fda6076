"""What clients send: the fields of each request, and what they are for the engine.

Each body is a `msgspec.Struct`, which checks it and describes itself for the OpenAPI document. Fields of
`SamplingParams` are taken under their names, and checked by that class.
"""

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar, get_type_hints

import msgspec
from msgspec import Meta, Struct

import minerva_native as mn

from .errors import HTTPError, wrong

_logger = logging.getLogger("minerva_native.server")

B = TypeVar("B", bound=Struct)

MOST_PROMPTS = 128  # of one request

_DIGITS = 10  # of a token's id

_MAX_DEPTH = 64  # of JSON
_MOST_TOOL_BYTES = 1 << 18  # of which a grammar is made
_MOST_CONTAINERS = 1 << 19  # which take a third of a second

SAMPLING = {
    field.name: get_type_hints(mn.SamplingParams)[field.name]
    for field in dataclasses.fields(mn.SamplingParams)
    if field.name not in ("order", "logit_bias")
}
"""The fields of `SamplingParams` that a request may have, with their types."""

Count = Annotated[int, Meta(ge=1, le=128)]
Limit = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
Message = Annotated[
    dict[str, Any], Meta(extra_json_schema={"properties": {"role": {"type": "string"}}, "required": ["role"]})
]
Messages = Annotated[list[Message], Meta(min_length=1, max_length=4096)]
Tools = Annotated[list[dict[str, Any]], Meta(max_length=512)]
Stop = Annotated[str, Meta(max_length=4096)]
Stops = Stop | Annotated[list[Stop], Meta(max_length=64)]
Bias = float | bool
Biases = (
    Annotated[dict[Annotated[str, Meta(max_length=256)], Bias], Meta(max_length=1 << 18)]
    | Annotated[list[tuple[int | Annotated[str, Meta(max_length=256)], Bias]], Meta(max_length=1 << 18)]
)
MOST_IDS = 1 << 20
Ids = Annotated[list[int], Meta(max_length=MOST_IDS)]


class StreamOptions(Struct, kw_only=True):
    """What a stream has besides the answer.

    Attributes:
        include_usage: whether a chunk without choices comes last, with the usage.
    """

    include_usage: bool | None = None


class Generation(Struct, kw_only=True):
    """What requests for text have in common.

    Attributes:
        model: its name, as `/v1/models` lists it; if there is only one, any name or none.
        stream: send the answer piece by piece, as server-sent events.
        stream_options: see there.
        n: how many answers.
        stop: strings that end the answer; empty ones do not.
        logit_bias: added to the logits of tokens: ids, or texts whose tokens are meant; false bans them.
        ignore_eos: never choose a token that ends the answer.
        samplers: the steps of the sampler, in order.
        grammar: what the answer is to be, in llama.cpp's GBNF.
        json_schema: a JSON schema of the answer.
    """

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Count | None = None
    stop: Stops | None = None
    logit_bias: Biases | None = None
    ignore_eos: bool | None = None
    samplers: list[str] | None = None
    grammar: str | None = None
    json_schema: dict[str, Any] | bool | None = None


class ChatBody(Generation, kw_only=True):
    """A request of `/v1/chat/completions`.

    Attributes:
        messages: the conversation.
        max_completion_tokens: how many tokens to make at most; -1 for as many as fit.
        max_tokens: the same, by its older name.
        n_predict: the same, by llama-server's name.
        logprobs: give each token's log-probability.
        top_logprobs: how many of the most likely tokens to name for each.
        tools: functions that may be called.
        tool_choice: "auto", "none", "required", or the one to call.
        parallel_tool_calls: whether there may be more than one call.
        response_format: text, a JSON object, or JSON of a schema.
        reasoning_effort: a variable of the chat template; "none" also sets `enable_thinking` to false, others to true.
        reasoning_format: "none" leaves the reasoning in the content.
        reasoning_budget: how many tokens of reasoning before it is ended by force; -1 for no limit.
        continue_final_message: go on with the last message; by default if it is the assistant's.
        add_generation_prompt: true makes a new message in any case.
        chat_template_kwargs: other variables of the chat template.
        prompt_cache_key: of no effect: what was evaluated before is found by its tokens.
    """

    messages: Messages
    max_completion_tokens: Limit | None = None
    max_tokens: Limit | None = None
    n_predict: Limit | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: Tools | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    reasoning_format: str | None = None
    reasoning_budget: Limit | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    prompt_cache_key: str | None = None


class CompletionBody(Generation, kw_only=True):
    """A request of `/v1/completions`.

    Attributes:
        prompt: a text or token ids, or a list of those.
        max_tokens: how many tokens to make at most; 16 by default, -1 for as many as fit.
        n_predict: the same, by llama-server's name.
        logprobs: give each token's log-probability, and those of so many of the most likely ones.
        echo: begin with the prompt.
        best_of: make as many, and return the `n` that are most likely by their mean log-probability.
        suffix: not supported.
    """

    prompt: str | Annotated[list[int | str | Ids], Meta(min_length=1, max_length=1 << 20)]
    max_tokens: Limit | None = None
    n_predict: Limit | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: Count | None = None
    suffix: str | None = None


class NativeBody(Generation, kw_only=True):
    """A request of `/completion`, as llama-server has it.

    Attributes:
        prompt: a text, token ids, both after one another, or a list of prompts; a text may be `{"prompt_string": ...}`.
        n_predict: how many tokens to make at most; -1, the default, for as many as fit.
        n_probs: give each token's log-probability, and those of so many of the most likely ones.
        return_tokens: give the ids of the tokens.
    """

    prompt: (
        str | dict[str, Any] | Annotated[list[int | str | Ids | dict[str, Any]], Meta(min_length=1, max_length=1 << 20)]
    )
    n_predict: Limit | None = None
    n_probs: Annotated[int, Meta(ge=0, le=100)] | None = None
    return_tokens: bool | None = None


class ResponseBody(Struct, kw_only=True):
    """A request of `/v1/responses`.

    Attributes:
        input: what the user says, or the items of a conversation.
        model: its name, as `/v1/models` lists it; if there is only one, any name or none.
        instructions: the system prompt.
        max_output_tokens: how many tokens to make at most.
        stream: send the answer as events.
        tools: functions that may be called.
        tool_choice: "auto", "none", "required", or the one to call.
        parallel_tool_calls: whether there may be more than one call.
        text: its `format` is text, a JSON object, or JSON of a schema.
        reasoning: its `effort` is a variable of the chat template.
        top_logprobs: how many of the most likely tokens to name for each.
        include: "message.output_text.logprobs" gives each token's log-probability.
        metadata: given back as it is.
        previous_response_id: not supported: nothing is stored.
        conversation: not supported.
        background: not supported.
        prompt_cache_key: of no effect.
    """

    input: str | Annotated[list[dict[str, Any]], Meta(min_length=1, max_length=4096)]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    stream: bool | None = None
    tools: Tools | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    include: list[str] | None = None
    metadata: dict[str, str] | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    background: bool | None = None
    prompt_cache_key: str | None = None


class TokenizeBody(Struct, kw_only=True):
    """A request of `/tokenize`.

    Attributes:
        content: the text, of 4,194,304 characters at most.
        add_special: add what the model expects around it, such as a BOS token.
        parse_special: treat the names of control tokens as those tokens.
        with_pieces: give the text of each token; bytes if it is none.
        model: see there.
    """

    content: Annotated[str, Meta(max_length=4 << 20)]
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False
    model: str | None = None


class DetokenizeBody(Struct, kw_only=True):
    """A request of `/detokenize`.

    Attributes:
        tokens: ids.
        model: see there.
    """

    tokens: Ids
    model: str | None = None


class TemplateBody(Struct, kw_only=True):
    """A request of `/apply-template`.

    Attributes:
        messages: the conversation.
        tools: functions that may be called.
        continue_final_message: see `ChatBody`.
        add_generation_prompt: end with the beginning of an answer.
        chat_template_kwargs: other variables of the chat template.
        model: see there.
    """

    messages: Messages
    tools: Tools | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    model: str | None = None


def read(data: bytes, kind: type[B]) -> tuple[B, dict[str, Any]]:
    """Return a body, and the fields of `SamplingParams` that came with it.

    Raises:
        HTTPError: it is not JSON, or a field is wrong.
    """
    n_containers = data.count(b"{") + data.count(b"[")  # or more: some may be in texts
    if n_containers > _MOST_CONTAINERS:
        raise HTTPError(400, f"the body has more than {_MOST_CONTAINERS:,} arrays and objects")
    try:
        fields = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise HTTPError(400, f"the body is not JSON: {error}") from None
    except RecursionError:
        raise HTTPError(400, "the body is nested too deeply") from None
    if not isinstance(fields, dict):
        raise HTTPError(400, "the body must be a JSON object")
    if n_containers > _MAX_DEPTH:
        _check_depth(fields)
    try:
        body = msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise _as_http(error) from None
    own = {field.name for field in msgspec.structs.fields(kind)}
    sampling = {name: fields[name] for name in SAMPLING if name not in own and fields.get(name) is not None}
    if unknown := sorted(fields.keys() - own - SAMPLING.keys()):
        _logger.debug("ignored fields: %s", ", ".join(repr(name[:40]) for name in unknown[:20]))
    return body, sampling


def _as_http(error: msgspec.ValidationError) -> HTTPError:
    sentence, _, path = str(error).partition(" - at `$.")
    if not path:
        missing = sentence.partition("missing required field `")[2].rstrip("`")
        return HTTPError(400, sentence, missing or None)
    where = path.rstrip("`")
    return HTTPError(400, f"{where}: {sentence}", where.partition("[")[0].partition(".")[0])


def _check_depth(value: Any) -> None:
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH):
        level = [item for outer in level for item in _inside(outer)]
        if not level:
            return
    raise HTTPError(400, f"the body is nested more than {_MAX_DEPTH} levels deep")


def _inside(value: Any) -> Iterator[Any]:
    items = value.values() if isinstance(value, dict) else value
    return (item for item in items if isinstance(item, dict | list))


# What it is for the engine

FIELDS = {name: name for name in SAMPLING} | {
    "order": "samplers",
    "logit_bias": "logit_bias",
    "max_tokens": "max_tokens",
    "stop": "stop",
    "constraint": "grammar",
    "response_format": "response_format",
    "messages": "messages",
    "tools": "tools",
    "tool_choice": "tool_choice",
    "top_logprobs": "top_logprobs",
    "reasoning_budget": "reasoning_budget",
    "chat_template_kwargs": "chat_template_kwargs",
    "continue_final_message": "continue_final_message",
    "prompt": "prompt",
    "echo": "echo",
}
"""The engine's names of what may be wrong with a request, and the API's."""


def of_generation(body: Generation, sampling: Mapping[str, Any], model: mn.Model) -> dict[str, Any]:
    """Return the keywords of a request that all requests for text have."""
    given: dict[str, Any] = dict(sampling)
    biases = _biases(body.logit_bias, model) if body.logit_bias else dict[int, Any]()
    if body.ignore_eos:
        special = (token.id for token in model.tokenizer.special_tokens)
        biases |= dict.fromkeys(filter(model.tokenizer.is_end, special), False)
    if biases:
        given["logit_bias"] = biases
    if body.samplers is not None:
        given["order"] = body.samplers
    if stops := [stop for stop in ([body.stop] if isinstance(body.stop, str) else body.stop or ()) if stop]:
        given["stop"] = stops
    shapes = [name for name in ("grammar", "json_schema", "response_format") if getattr(body, name, None) is not None]
    if len(shapes) > 1 and not (shapes[-1] == "response_format" and is_text(getattr(body, "response_format", None))):
        raise wrong(shapes[1], f"give {shapes[0]} or {shapes[1]}, not both")
    if body.grammar is not None:
        given["constraint"] = mn.Constraint.gbnf(body.grammar)
    elif body.json_schema is not None:
        given["constraint"] = mn.Constraint.json_schema(body.json_schema)
    return given


def of_chat(body: ChatBody, sampling: Mapping[str, Any], llm: mn.LLM) -> dict[str, Any]:
    """Return the keywords of a chat completion, without messages, tools and n."""
    if body.tools and len(msgspec.json.encode(body.tools)) > _MOST_TOOL_BYTES:
        raise wrong("tools", f"they have more than {_MOST_TOOL_BYTES:,} bytes")
    given = of_generation(body, sampling, llm.model)
    given["max_tokens"] = _limit(body.max_completion_tokens, body.max_tokens, body.n_predict)
    given["logprobs"] = bool(body.logprobs)
    if body.top_logprobs:
        if not body.logprobs:
            raise wrong("top_logprobs", "it needs logprobs")
        given["top_logprobs"] = body.top_logprobs
    if body.response_format is not None and not is_text(body.response_format):
        given["response_format"] = body.response_format
    if body.tool_choice is not None:
        given["tool_choice"] = body.tool_choice
    if body.parallel_tool_calls is not None:
        given["parallel_tool_calls"] = body.parallel_tool_calls
    variables = dict(body.chat_template_kwargs or {})
    tags = None if llm.template is None else llm.template.thinking_tags
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
        variables.setdefault("enable_thinking", body.reasoning_effort != "none")
    if variables:
        given["chat_template_kwargs"] = variables
    if continues(body):
        given["continue_final_message"] = True
    if body.reasoning_format not in (None, "none", "auto", "deepseek"):
        raise wrong("reasoning_format", 'it must be "none", "auto" or "deepseek"')
    if body.reasoning_format == "none":
        given["thinking_tags"] = None
    elif tags is not None and body.reasoning_budget not in (None, -1):
        given["reasoning_budget"] = body.reasoning_budget
    return given


def of_completion(body: CompletionBody, sampling: Mapping[str, Any], model: mn.Model) -> dict[str, Any]:
    """Return the keywords of a completion, without prompt, n and best_of."""
    if body.suffix:
        raise wrong("suffix", "it is not supported")
    given = of_generation(body, sampling, model)
    limit = _limit(body.max_tokens, body.n_predict)
    given["max_tokens"] = 16 if body.max_tokens is None and body.n_predict is None else limit
    if body.logprobs is not None:
        given |= {"logprobs": True, "top_logprobs": body.logprobs}
    if body.echo:
        given["echo"] = True
    return given


def of_native(body: NativeBody, sampling: Mapping[str, Any], model: mn.Model) -> dict[str, Any]:
    """Return the keywords of a completion by llama-server's names, without the prompt."""
    given = of_generation(body, sampling, model)
    given["max_tokens"] = _limit(body.n_predict)
    if body.n_probs:
        given |= {"logprobs": True, "top_logprobs": body.n_probs}
    return given


def prompts_of(body: CompletionBody) -> list[str | list[int]]:
    """Return the prompts, each a text or ids."""
    given = body.prompt
    if isinstance(given, str):
        return [given]
    if all(isinstance(item, int) for item in given):
        return [[item for item in given if isinstance(item, int)]]
    if len(given) > MOST_PROMPTS:
        raise wrong("prompt", f"it has more than {MOST_PROMPTS} prompts")
    prompts: list[str | list[int]] = []
    for item in given:
        if isinstance(item, int):
            raise wrong("prompt", "it must be a text, token ids, or a list of texts or of token ids")
        prompts.append(item)
    return prompts


def _limit(*given: int | None) -> int | None:
    limit = next((value for value in given if value is not None), None)
    return None if limit is None or limit < 0 else limit


def is_text(response_format: Any) -> bool:
    """Say whether a `response_format` is that of plain text."""
    return isinstance(response_format, dict) and response_format.get("type") == "text"


def _biases(given: Any, model: mn.Model) -> dict[int, Any]:
    """Return the biases by token. A text that is not an id stands for its tokens; true means nothing."""
    biases: dict[int, Any] = {}
    for key, value in given.items() if isinstance(given, dict) else given:
        if value is True:
            raise wrong("logit_bias", "a bias must be a number or false")
        if isinstance(key, int):
            tokens = [key]
        elif key.isascii() and key.isdigit() and isinstance(given, dict):
            tokens = [int(key) if len(key) <= _DIGITS else model.tokenizer.n_vocab]  # which is none
        else:
            tokens = model.tokenizer.encode(key, add_special=False)
        biases |= dict.fromkeys(tokens, value)
    for token in biases:
        if not 0 <= token < model.tokenizer.n_vocab:
            raise wrong("logit_bias", f"there is no token {token}: ids are from 0 to {model.tokenizer.n_vocab - 1}")
    return biases


def continues(body: ChatBody | TemplateBody) -> bool:
    """Say whether the answer goes on with the last message.

    Raises:
        HTTPError: it cannot, or is to do both.
    """
    last = body.messages[-1]
    is_open, begins = body.continue_final_message, body.add_generation_prompt
    if is_open and begins:
        raise wrong("continue_final_message", "it cannot be true beside add_generation_prompt")
    if is_open is None:
        is_open = begins is None and last.get("role") == "assistant" and not last.get("tool_calls")
    if is_open and [message.get("role") for message in body.messages[-2:]] == ["assistant"] * 2:
        raise wrong("messages", "there are two messages of the assistant at the end")
    return is_open


def strings(value: Any) -> Iterator[str]:
    """Yield the strings in JSON, without the names of fields."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def checked_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with their parts of text joined.

    Raises:
        HTTPError: a part is not text.
    """
    return [_checked(message, f"messages[{number}]") for number, message in enumerate(messages)]


def _checked(message: dict[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(message.get("role"), str):
        raise HTTPError(400, f'{where} has no role, such as "user"', "messages")
    if message["role"] == "developer":
        message = {**message, "role": "system"}
    content = message.get("content")
    if content is None and isinstance(message.get("tool_calls"), list):  # templates add it to other text
        return {**message, "content": ""}
    if content is None or isinstance(content, str):
        return message
    if not isinstance(content, list):
        raise HTTPError(400, f"{where}.content must be a text or a list of parts", "messages")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get(kind if kind == "refusal" else "text") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "output_text", "refusal") or not isinstance(text, str):
            raise HTTPError(400, f"{where}.content[{index}] must be a part of the type 'text'", "messages")
        texts.append(text)
    return {**message, "content": "\n".join(texts)}
