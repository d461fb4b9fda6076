"""The exception tree: every error of the engine is a `MinervaError`, and its message says what to do."""


class MinervaError(Exception):
    """Base of every error that this package raises on its own account."""


class BuildError(MinervaError):
    """The compiled binding is missing or was built for something else."""


class ModelLoadError(MinervaError):
    """A file is not a model that can be loaded; the message names the file."""


class ContextError(MinervaError):
    """A context could not be created, or libllama failed to evaluate a batch."""


class ContextFullError(ContextError):
    """The KV cache has no room for the tokens; the sequence is as it was before the call."""


class TokenizerError(MinervaError):
    """The vocabulary cannot encode or decode what was asked."""


class SamplingError(MinervaError):
    """No token can be drawn from these logits."""


class StateError(MinervaError):
    """A saved state does not fit this model or context, or is damaged."""


class DeviceError(MinervaError):
    """A device that was asked for is not there."""


class ClosedError(MinervaError):
    """A `Model`, `Context` or `Sequence` was used after `close()`."""


class Cancelled(MinervaError):
    """A long call was stopped by its caller."""
