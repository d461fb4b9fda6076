"""Errors as OpenAI's API has them: `{"error": {"message", "type", "param", "code"}}` with an HTTP status."""

import re
from collections.abc import Mapping
from typing import Any

import minerva_native as mn

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 501: "not_supported_error"}

_MOST_CHARACTERS = 2000  # of a message, which may quote what the client has sent

_NAME = re.compile(r"^(?:[a-z_]+\(\) has no argument )?['`]?([a-z][a-z0-9_]*)")

_ABOUT = re.compile(r"\b(tool|prompt)s?\b")

_OF_REQUESTS = (
    mn.ConstraintError,
    mn.TokenizerError,
    mn.SamplingError,
)


class HTTPError(Exception):
    """What a client is told.

    Attributes:
        status: of HTTP.
        message: a sentence.
        param: the field of the request that it is about.
        code: a word for programs.
        headers: more headers of the reply.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        message = message if len(message) <= _MOST_CHARACTERS else f"{message[:_MOST_CHARACTERS]}..."
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The reply."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def wrong(param: str, message: str) -> HTTPError:
    """Return the error of a field that is wrong; the message does not begin with its name."""
    return HTTPError(400, f"{param}: {message}", param)


def names_argument(error: Exception, fields: Mapping[str, str]) -> bool:
    """Say whether an error of the engine begins with the name of an argument, as those about arguments do."""
    found = _NAME.match(str(error))
    return found is not None and found[1] in fields


def of_arguments(error: Exception, fields: Mapping[str, str]) -> HTTPError:
    """Return the error of a request that the engine refuses.

    Args:
        error: the engine's.
        fields: the names that the API has for the engine's.
    """
    found = _NAME.match(str(error))
    name = found[1] if found else ""
    if name not in fields and (about := _ABOUT.search(str(error))) is not None:
        name = "tools" if about[1] == "tool" else about[1]
    if name in fields:
        sentence = str(error)[len(name) :] if str(error).startswith(name) else f": {error}"
        return HTTPError(400, f"{fields[name]}{sentence}", fields[name])
    return HTTPError(400, str(error))


def of_engine(error: Exception, prompt: str | None = None) -> HTTPError:
    """Return what a client is told of an error that came while its request was served.

    Args:
        error: the engine's.
        prompt: the field that has the prompt.
    """
    if isinstance(error, HTTPError):
        return error
    if isinstance(error, mn.ContextFullError):
        return HTTPError(400, str(error), prompt, "context_length_exceeded")
    if isinstance(error, mn.EmptySequenceError | mn.TemplateError):
        sentence = str(error).replace("give one with template=", "start the server with --chat-template-file")
        return HTTPError(400, sentence, prompt)
    if isinstance(error, _OF_REQUESTS):
        return HTTPError(400, str(error))
    if isinstance(error, mn.Cancelled):
        return HTTPError(408, str(error), code="timeout")
    if isinstance(error, mn.ClosedError):
        return HTTPError(503, "the model is being unloaded", code="unavailable", headers={"retry-after": "1"})
    return HTTPError(500, "the server failed: its log says why", code="internal_error")
