"""Run any GGUF model in-process, over libllama, with every step of decoding in your hands."""

from .context import Context, Stats
from .devices import Device, build_info, devices
from .errors import (
    BuildError,
    Cancelled,
    ClosedError,
    ContextError,
    ContextFullError,
    DeviceError,
    MinervaError,
    ModelLoadError,
    SamplingError,
    StateError,
    TokenizerError,
)
from .generation import Step, generate
from .gguf import GGUF
from .memory import Memory
from .model import Model
from .sampling import Sampler, SamplingParams
from .sequence import Sequence
from .tokenizer import StreamDecoder, Tokenizer

__version__ = "0.1.0"

__all__ = [
    "GGUF",
    "BuildError",
    "Cancelled",
    "ClosedError",
    "Context",
    "ContextError",
    "ContextFullError",
    "Device",
    "DeviceError",
    "Memory",
    "MinervaError",
    "Model",
    "ModelLoadError",
    "Sampler",
    "SamplingError",
    "SamplingParams",
    "Sequence",
    "StateError",
    "Stats",
    "Step",
    "StreamDecoder",
    "Tokenizer",
    "TokenizerError",
    "build_info",
    "devices",
    "generate",
]
