"""The exception tree: every error of the engine is a `MinervaError`, and its message says what to do.

    MinervaError
    +-- BuildError
    +-- ModelLoadError
    +-- ContextError
    |   +-- OptionError (also a ValueError)
    |   +-- ContextFullError
    |   +-- SequencesInUseError
    |   +-- EmptySequenceError (also a ValueError)
    |   +-- ReentryError
    |   +-- DecodeError
    |   +-- BrokenContextError
    +-- TokenizerError
    +-- SamplingError
    +-- ConstraintError
    +-- TemplateError
    +-- StateError
    +-- DeviceError
    +-- BackendError
    +-- ClosedError
    +-- Cancelled

An argument of the wrong type or out of range is a `TypeError` or `ValueError`, as everywhere in Python.
"""

import re
from pathlib import Path


class MinervaError(Exception):
    """Base of every error that this package raises on its own account."""


class BuildError(MinervaError):
    """The compiled binding is missing or was built for something else."""


class ModelLoadError(MinervaError):
    """A file is not a model that can be loaded; the message names the file."""


class ContextError(MinervaError):
    """A context could not be created, or could not do what it was asked."""


class OptionError(ContextError, ValueError):
    """A context option is valid in itself, but not for this model or together with another option."""


class ContextFullError(ContextError):
    """The KV cache has no room for the tokens; the sequence is as it was before the call.

    Attributes:
        needed: how many cells the call needed.
        available: how many cells were free.
    """

    def __init__(self, message: str, *, needed: int = 0, available: int = 0):
        super().__init__(message)
        self.needed, self.available = needed, available


class SequencesInUseError(ContextError):
    """All `n_seq` sequences of the context are in use."""


class EmptySequenceError(ContextError, ValueError):
    """A sequence without tokens has no logits and cannot be continued."""


class ReentryError(ContextError):
    """A signal handler, a finaliser or a `raw` block used the context in the middle of another call."""


class DecodeError(ContextError):
    """libllama failed to evaluate a batch; the message has the words of its log.

    Attributes:
        code: what `llama_decode` or `llama_encode` returned.
    """

    def __init__(self, message: str, *, code: int = 0):
        super().__init__(message)
        self.code = code


class BrokenContextError(ContextError):
    """A computation failed in a way that leaves this context unusable; the model and other contexts go on.

    Also raised for a context that a child process has inherited by `os.fork`.
    """


class TokenizerError(MinervaError):
    """The vocabulary cannot encode or decode what was asked."""


class SamplingError(MinervaError):
    """No token can be drawn from these logits."""


class ConstraintError(MinervaError):
    """A schema or a grammar cannot be used, or a text that it was to describe is incomplete.

    Attributes:
        path: where in a JSON schema the trouble is, as a JSON pointer such as "#/properties/name".
        text: the incomplete text.
    """

    def __init__(self, message: str, *, path: str = "", text: str = ""):
        super().__init__(message)
        self.path, self.text = path, text


class TemplateError(MinervaError):
    """A chat template is missing or wrong, or refuses the messages.

    Attributes:
        line: the line of the template, if there is one.
    """

    def __init__(self, message: str, *, line: int | None = None):
        super().__init__(message)
        self.line = line


class StateError(MinervaError):
    """A saved state does not fit this model or context, or is damaged."""


class DeviceError(MinervaError):
    """A device that was asked for is not there, has no room, or has failed."""


class BackendError(MinervaError):
    """Another engine, such as a server, did not give an answer, or no whole one.

    Attributes:
        status: the HTTP status that it gave, or that it named in the middle of a stream; None if nothing was received.
    """

    def __init__(self, message: str, *, status: int | None = None):
        super().__init__(message)
        self.status = status


class ClosedError(MinervaError):
    """A `Model`, `Context` or `Sequence` was used after `close()`."""


class Cancelled(MinervaError):
    """A long call was stopped by its caller."""


def missing_library(why: str) -> str:
    """Return the name of the library that the system's loader says is missing; empty if it says something else."""
    found = re.search(r"(\S+): cannot open shared object file|Library not loaded: (\S+)", why)
    return "" if found is None else Path(found[1] or found[2]).name
