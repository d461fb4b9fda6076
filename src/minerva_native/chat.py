"""Chat templates: from messages to a prompt, and to token ids that no message can forge."""

import contextlib
import dataclasses
import functools
import json
import re
import traceback
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from jinja2 import TemplateSyntaxError

from .chat_sandbox import Refusal, Sandbox, budget
from .chat_text import Text, plain, written
from .errors import TemplateError
from .model import Model
from .tokenizer import SpecialToken, Tokenizer

Message = Mapping[str, Any]

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
"""Roles that a template may make control tokens of, as in `'<|' + message.role + '|>'`; all others are data."""

_MAX_TEMPLATE = 1 << 18  # characters; the longest upstream has 17,000
_MAX_DEPTH = 100  # of what is in a message

_KEY = "tokenizer.chat_template"

# The template's names for tokens of the vocabulary, and the keys of the GGUF file.
_TOKENS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "sep_token": "seperator",
    "pad_token": "padding",
    "cls_token": "cls",
    "mask_token": "mask",
}

_THINKING_TAGS = (
    ("<think>", "</think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<mm:think>", "</mm:think>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<|channel>thought\n", "<channel|>"),
    ("<thinking>", "</thinking>"),
)

_REASONING = ("reasoning_content", "thinking", "reasoning")  # names for the same thing, the usual one first

_CONTROL = re.compile(r"<[|｜].*[|｜]>", re.DOTALL)
_TAG = re.compile(r"[<\[].*[>\]]", re.DOTALL)

_SPACE = " \t\n\v\f\r"  # what isspace() of C takes for white space


class ChatTemplate:
    """A chat template in the language of Jinja, as transformers runs it: in a sandbox, with bounded time and output.

    Safe to use from several threads at once.

    Attributes:
        text: the template.
        thinking_tags: the tags around a model's reasoning, such as `("<think>", "</think>")`, if the template has any.

    Raises:
        TemplateError: the template cannot be compiled.
    """

    text: str
    thinking_tags: tuple[str, str] | None

    def __init__(self, text: str):
        if not isinstance(text, str):
            raise TypeError(f"a chat template must be a str, not {type(text).__name__}")
        if len(text) > _MAX_TEMPLATE:
            raise TemplateError(f"the chat template has {len(text):,} characters; the limit is {_MAX_TEMPLATE:,}")
        self.text = text
        unescaped = text.replace("\\n", "\n")  # as literals of the template are
        self.thinking_tags = next((tags for tags in _THINKING_TAGS if all(tag in unescaped for tag in tags)), None)
        self._tokens: dict[str, str] = {}
        self._guards: weakref.WeakKeyDictionary[Tokenizer, list[SpecialToken]] = weakref.WeakKeyDictionary()
        self._for_tools: ChatTemplate | None = None
        try:
            self._compiled = _sandbox().from_string(text)
        except Exception as error:
            raise _as_template_error(error, "the chat template cannot be compiled") from None

    @classmethod
    def of(cls, model: Model, name: str | None = None) -> Self:
        """Return a model's own template.

        Args:
            model: the model.
            name: which one, if the model has several, such as "tool_use"; by default the one without a name, or the
                one for tools whenever there are tools.

        Raises:
            TemplateError: the model has no such template, or it cannot be compiled.
        """
        key = _KEY if name is None else f"{_KEY}.{name}"
        text = model.metadata.get(key)
        if not isinstance(text, str):
            names = [key.removeprefix(f"{_KEY}.") for key in model.metadata if key.startswith(f"{_KEY}.")]
            which = "chat template" if name is None else f"chat template named {name!r}"
            there = f" (it has {', '.join(map(repr, names))})" if names else ""
            raise TemplateError(f"{model.path.name} has no {which}{there}: give one with template=")
        template = cls(text)
        template._tokens = _tokens_of(model.tokenizer)
        for variable, key in _TOKENS.items():
            token = model.metadata.get(f"tokenizer.ggml.{key}_token_id")
            if isinstance(token, int) and 0 <= token < model.tokenizer.n_vocab:
                template._tokens.setdefault(variable, _name(model.tokenizer, token))
        if name is None and f"{_KEY}.tool_use" in model.metadata:
            template._for_tools = cls.of(model, "tool_use")
        return template

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """Return the prompt as text. Control tokens in it may be the template's or a message's: see `encode`.

        Args:
            messages: dicts with a `role`, and a `content` that is a str, a list of parts (dicts), or None.
            tools: descriptions of functions (dicts), as in OpenAI's API.
            add_generation_prompt: end with the beginning of an answer.
            continue_final_message: end within the last message instead, after its content, for an answer to go on.
            variables: other variables of the template, such as `enable_thinking`; JSON values.

        Raises:
            TypeError, ValueError: an argument is not what it should be.
            TemplateError: the template refuses the messages, fails, or takes too much time or memory.
        """
        template = self._chosen(tools)
        begins = add_generation_prompt and not continue_final_message
        text = template._render(messages, tools, begins, template._tokens, variables)
        return plain(_up_to_the_end_of(text, messages[-1]) if continue_final_message else text)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        trust_content: bool = False,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> list[int]:
        """Return the prompt as token ids.

        Only what the template itself wrote becomes a control token. A control token's name in a message, a tool or a
        variable, or put together by the template from parts of one, becomes ordinary tokens; so does that of a
        user-defined tag that the template names, such as `</tool_response>`. The ids begin with one BOS token if the
        vocabulary or the template asks for it, never with two.

        Args:
            tokenizer: the tokenizer of the model that gets the ids.
            messages: see `render`.
            tools: see `render`.
            add_generation_prompt: see `render`.
            trust_content: let control tokens in messages, tools and variables take effect.
            continue_final_message: see `render`.
            variables: see `render`.

        Raises:
            TypeError, ValueError, TemplateError: see `render`.
            TokenizerError: the vocabulary cannot encode the prompt.
        """
        template = self._chosen(tools)
        tokens = template._tokens or _tokens_of(tokenizer)
        begins = add_generation_prompt and not continue_final_message
        text = template._render(messages, tools, begins, tokens, variables)
        if continue_final_message:
            text = _up_to_the_end_of(text, messages[-1])
        guarded = [] if trust_content else template._guarded(tokenizer)
        if _is_forged(text, guarded):
            ids = _encode_in_pieces(tokenizer, text, guarded)
        else:
            ids = tokenizer.encode(plain(text), add_special=False, parse_special=True)
        bos = tokenizer.bos
        if bos is not None and tokenizer.adds_bos:
            ids = [bos, *ids]
        while ids[:2] == [bos, bos]:
            del ids[0]
        return ids

    @property
    def shows_tools(self) -> bool:
        """Whether it reads `tools`."""
        return "tools" in (self._for_tools or self).text

    def with_arguments(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Return messages with the arguments of calls as this template wants them: as a dict, or as JSON text.

        OpenAI's API has them as text; most templates write a dict as JSON themselves, and would write a text as a
        string in quotes.
        """
        if not isinstance(messages, list | tuple) or not any(map(_has_calls, messages)):
            return messages  # if they are no messages, `render` says so
        return [_with_arguments(message, self._wants_dicts) for message in messages]

    @functools.cached_property
    def _wants_dicts(self) -> bool:
        call = {"name": "probe_name", "arguments": {"probe_key": "probe_value"}}
        calls = [{"id": "123456789", "type": "function", "function": call}]
        said: Message = {"role": "assistant", "content": "", "tool_calls": calls}
        messages: list[Message] = [{"role": "user", "content": "a"}, said]
        parameters = {"type": "object", "properties": {}}
        tool = {"type": "function", "function": {"name": "probe_name", "description": "", "parameters": parameters}}
        for tools in ([tool], None):
            with contextlib.suppress(TemplateError):
                text = self.render(messages, tools)
                return "{'probe_key'" not in text
        return True

    def _chosen(self, tools: Sequence[Mapping[str, Any]] | None) -> "ChatTemplate":
        return self._for_tools if tools and self._for_tools is not None else self

    def _guarded(self, tokenizer: Tokenizer) -> list[SpecialToken]:
        """Return the tokens that no message may contain.

        A user-defined token is ordinary text (runs of spaces, tags of HTML), unless it ends a generation, looks like
        gpt-oss's `<|start|>`, or is a tag that the template names, such as `<tool_call>`.
        """
        if tokenizer not in self._guards:
            self._guards[tokenizer] = [
                token
                for token in tokenizer.special_tokens
                if not token.in_every_text
                or token.id == tokenizer.bos
                or tokenizer.is_end(token.id)
                or _CONTROL.fullmatch(token.text)
                or (_TAG.fullmatch(token.text) and token.text in self.text)
            ]
        return self._guards[tokenizer]

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        tokens: Mapping[str, str],
        variables: Mapping[str, Any],
    ) -> Text:
        context = {
            "documents": None,
            **{name: Text.literal(token) for name, token in tokens.items()},
            **{name: _data(value, name) for name, value in variables.items()},
            "messages": [_message(message, number) for number, message in enumerate(_list(messages, "messages"))],
            "tools": None if tools is None else [_tool(tool, at) for at, tool in enumerate(_list(tools, "tools"))],
            "add_generation_prompt": bool(add_generation_prompt),
        }
        if not context["messages"]:
            raise ValueError("messages must not be empty")
        with budget():
            try:
                _sandbox().weighed(list(context.values()))
                return Text(self._compiled.render(context))
            except Exception as error:
                raise _as_template_error(error, "the chat template fails") from None

    def __repr__(self) -> str:
        return f"<ChatTemplate of {len(self.text):,} characters>"


@functools.cache
def _sandbox() -> Sandbox:
    return Sandbox()


def _as_template_error(error: Exception, what: str) -> TemplateError:
    """Return an error of a template's as one sentence, with the line of the template if it is known."""
    frames = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in frames if frame.f_code.co_filename == "<template>"]  # by jinja's doing
    line = error.lineno if isinstance(error, TemplateSyntaxError) else lines[-1] if lines else None
    if isinstance(error, Refusal):
        what, reason = "the chat template refuses the messages", str(error)
    elif isinstance(error, RecursionError):
        reason = "it calls itself too often, or is nested too deeply"
    else:
        reason = str(error) or type(error).__name__
    at = f" in line {line}" if line else ""
    return TemplateError(f"{what}{at}: {reason[:1000]}", line=line)


def _list(value: object, name: str) -> Sequence[Any]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a list of dicts, not a {type(value).__name__}")
    return value


def _message(message: object, number: int) -> dict[str, Any]:
    """Return a message as the template gets it: data, without keys whose value is None."""
    where = f"messages[{number}]"
    data = _data(message, where)
    if not isinstance(data, dict):
        raise TypeError(f"{where} must be a dict with a role and a content, not a {type(message).__name__}")
    data = {key: value for key, value in data.items() if value is not None}
    if "role" not in data:
        raise ValueError(f'{where} has no role, such as "user"')
    if not isinstance(data["role"], str):
        raise TypeError(f"the role of {where} must be a str, not a {type(data['role']).__name__}")
    content = data.get("content", "")
    if isinstance(content, list):
        for index, part in enumerate(content):
            if not isinstance(part, dict):
                raise TypeError(f"{where}['content'][{index}] must be a dict, such as one of the type 'text'")
    elif not isinstance(content, str):
        raise TypeError(
            f"the content of {where} must be a str, a list of parts, or None, not a {type(content).__name__}"
        )
    if data["role"] in ROLES:
        data["role"] = Text.literal(data["role"])
    reasoning = next((data[name] for name in _REASONING if name in data), None)
    if reasoning is not None:
        data = {"thinking": reasoning, **data, "reasoning_content": reasoning}
    return data


def _up_to_the_end_of(text: Text, message: Message) -> Text:
    """Return a prompt up to the end of its last message's content."""
    given = message.get("content")
    if not isinstance(given, str) or not given.strip():
        raise ValueError("continue_final_message needs a last message with a content, which is a str")
    mask = written(text)
    for content in (given, given.rstrip(), given.strip()):  # templates strip
        start = text.rfind(content)
        while start >= 0:
            end = start + len(content)
            if not any(mask[start:end]) and all(mask[end:]):  # nobody but the template has written what comes after
                return text[:end]
            start = text.rfind(content, 0, end - 1)
    raise TemplateError("the chat template changes the last message, so that it cannot be continued")


def _has_calls(message: object) -> bool:
    return isinstance(message, Mapping) and bool(message.get("tool_calls"))


def _with_arguments(message: Message, as_dicts: bool) -> Message:
    calls = message.get("tool_calls") if isinstance(message, Mapping) else None
    if not isinstance(calls, list | tuple) or not all(isinstance(call, Mapping) for call in calls):
        return message
    changed = []
    for call in calls:
        function = call.get("function")
        arguments = function.get("arguments") if isinstance(function, Mapping) else None
        if as_dicts and isinstance(arguments, str):
            with contextlib.suppress(ValueError, RecursionError):
                arguments = json.loads(arguments)
        elif not as_dicts and isinstance(arguments, Mapping):
            arguments = json.dumps(arguments, ensure_ascii=False)
        changed.append({**call, "function": {**function, "arguments": arguments}} if arguments is not None else call)
    return {**message, "tool_calls": changed}


def _tool(tool: object, number: int) -> Any:
    data = _data(tool, f"tools[{number}]")
    if not isinstance(data, dict):
        raise TypeError(f"tools[{number}] must be a dict that describes a function, not a {type(tool).__name__}")
    return data


def _data(value: Any, where: str, depth: int = 0) -> Any:
    """Return a copy of JSON values, each string as a `Text` that the template did not write."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"{where.split('[')[0]} is nested more than {_MAX_DEPTH} levels deep, or contains itself")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _untrusted(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"the keys of {where} must be str")
        return {_untrusted(key): _data(item, f"{where}[{key!r}]", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = (_data(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value))
        return list(items) if isinstance(value, list) else tuple(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _data({field.name: getattr(value, field.name) for field in dataclasses.fields(value)}, where, depth + 1)
    if callable(getattr(value, "model_dump", None)):  # pydantic's, such as the messages of OpenAI's library
        return _data(value.model_dump(), where, depth + 1)
    raise TypeError(f"{where} must be a JSON value, not a {type(value).__name__}")


def _untrusted(text: str) -> Text:
    return Text(plain(text), bytes(len(text)))


def _name(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.piece(token, special=True).decode(errors="replace")


def _tokens_of(tokenizer: Tokenizer) -> dict[str, str]:
    tokens = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos}
    return {
        name: _name(tokenizer, token)
        for name, token in tokens.items()
        if token is not None and token < tokenizer.n_vocab
    }


def _is_forged(text: Text, guarded: Iterable[SpecialToken]) -> bool:
    """Return whether a special token's name is anywhere in the text that the template did not write as a whole.

    If not, libllama can find special tokens only in what the template wrote.
    """
    mask = written(text)
    for token in guarded:
        if re.search("[\ud800-\udfff]", token.text):
            return True  # not UTF-8: its name could be found inside a character
        start = text.find(token.text)
        while start >= 0:
            if 0 in mask[start : start + len(token.text)]:
                return True
            start = text.find(token.text, start + 1)
    return False


def _encode_in_pieces(tokenizer: Tokenizer, text: Text, guarded: Sequence[SpecialToken]) -> list[int]:
    """Encode a text as `parse_special` does, except that only what the template wrote is parsed.

    libllama looks for one special token after the other, the longest names first, in what the ones before have left,
    and encodes what is left in the end piece by piece.
    """
    pieces: list[Text | int] = [text]
    for token in guarded:
        if token.text in text:
            pieces = [part for piece in pieces for part in (_cut(piece, token) if isinstance(piece, Text) else [piece])]
    ids = []
    for piece in pieces:
        ids += [piece] if isinstance(piece, int) else _encode_plain(tokenizer, plain(piece), guarded)
    return ids


def _cut(text: Text, token: SpecialToken) -> list[Text | int]:
    """Cut a text at a special token, where the template wrote it."""
    parts: list[Text | int] = []
    mask = written(text)
    begin, start = 0, text.find(token.text)
    while start >= 0:
        end = start + len(token.text)
        if 0 in mask[start:end]:
            start = text.find(token.text, start + 1)
            continue
        before = text[begin:start]
        parts += [before.rstrip(_SPACE) if token.lstrip else before, token.id]
        begin = end
        if token.rstrip:
            begin += len(text[end:]) - len(text[end:].lstrip(_SPACE))
        start = text.find(token.text, begin)
    return [part for part in (*parts, text[begin:]) if part != ""]


def _encode_plain(tokenizer: Tokenizer, text: str, guarded: Sequence[SpecialToken]) -> list[int]:
    """Encode a text without guarded tokens, even those that the vocabulary finds in every text: those are cut in two.

    What comes after such a cut may begin with the space that some vocabularies put before every text.
    """
    ids = tokenizer.encode(text, add_special=False)
    found = set(ids)
    for token in guarded:
        if token.id in found and (start := text.find(token.text)) >= 0:
            if len(token.text) == 1:
                raise TemplateError(f"the vocabulary can write {token.text!r} of a message as a control token only")
            first, rest = text[: start + 1], text[start + 1 :]
            return _encode_plain(tokenizer, first, guarded) + _encode_plain(tokenizer, rest, guarded)
    return ids
