"""A call of a tool, and what a parser gives back for a piece of text."""

import json
import string
import uuid
from dataclasses import dataclass, field
from typing import Any

_DIGITS = string.digits + string.ascii_letters


@dataclass(frozen=True)
class ToolCall:
    """A call that a model has made.

    Attributes:
        id: names the call, for the message with its result.
        name: of the tool.
        arguments: by the names of the tool's parameters.
        text: the arguments as JSON, as the model spelled them.
        index: the place of the call in the answer; `CallDelta.index` is the same.
    """

    id: str
    name: str
    arguments: dict[str, Any]
    text: str
    index: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the call as OpenAI's API has it, with the arguments as a string."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.text}}


@dataclass(frozen=True)
class CallDelta:
    """A piece of a call that is being made.

    The pieces come before it is known whether the call is complete. If it proves wrong or is cut off, there is a
    `CallError` with its index, and no `ToolCall`.

    Attributes:
        index: of the call in the answer.
        id: of the call, in its first piece.
        name: of the tool, in the first piece.
        arguments: what comes next in the JSON text of the arguments.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the piece as a stream of OpenAI's API has it."""
        piece: dict[str, Any] = {"index": self.index}
        if self.id is not None:
            piece |= {"id": self.id, "type": "function"}
        name = {} if self.name is None else {"name": self.name}
        return piece | {"function": name | {"arguments": self.arguments}}


@dataclass(frozen=True)
class CallError:
    """Text that looked like a call and is none.

    Attributes:
        message: what is wrong with it.
        text: what the model wrote. It is in the content too, unless it was cut off or came in between calls.
        index: of the call, if pieces of it were given.
    """

    message: str
    text: str
    index: int | None = None


@dataclass
class ParsedPiece:
    """What a piece of text adds to an answer.

    Attributes:
        content: text for the user.
        reasoning: text of the model's reasoning.
        calls: calls that are complete now.
        deltas: pieces of calls, complete or not.
        errors: what looked like a call and is none.
    """

    content: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    deltas: list[CallDelta] = field(default_factory=list)
    errors: list[CallError] = field(default_factory=list)

    @property
    def error(self) -> str | None:
        """What was wrong, in one line, or None."""
        return "; ".join(error.message for error in self.errors) or None


def new_call_id() -> str:
    """Return an id of nine letters and digits: the one form that all chat templates take, Mistral's too."""
    number, digits = uuid.uuid4().int, []
    for _ in range(9):
        number, digit = divmod(number, len(_DIGITS))
        digits.append(_DIGITS[digit])
    return "".join(digits)


def to_json(value: object) -> str:
    """Return a value as JSON, with characters as they are if UTF-8 has them."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return text
