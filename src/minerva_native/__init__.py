"""Run any GGUF model in-process, over libllama, with every step of decoding in your hands.

Begin with `Model.load` or `Model.demo`, then `Model.context`, `Context.sequence`, `generate`:

    with Model.demo() as model, model.context(n_ctx=512) as context, context.sequence() as sequence:
        sequence.extend(model.tokenizer.encode("Once upon a time"))
        for step in generate(sequence, SamplingParams(temperature=0.8), max_tokens=64):
            print(step.text, end="", flush=True)

`ContextOptions` explains the options of a context, `SamplingParams` those of the sampler. Every error is a
`MinervaError`, or a plain `TypeError` or `ValueError`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

import minerva_command

if minerva_command.is_run_as_a_module(__name__):
    minerva_command.leave_on_ctrl_c()  # the imports below take most of the time before `__main__` runs

from .compute import ComputeBackend
from .context import Context, Memory, Stats
from .devices import Device, Placement, available_cpus, build_info, compute_backends, cpu_quota, devices
from .errors import (
    BackendError,
    BrokenContextError,
    BuildError,
    Cancelled,
    ClosedError,
    ConstraintError,
    ContextError,
    ContextFullError,
    DecodeError,
    DeviceError,
    EmptySequenceError,
    MinervaError,
    ModelLoadError,
    OptionError,
    ReentryError,
    SamplingError,
    SequencesInUseError,
    StateError,
    TemplateError,
    TokenizerError,
)
from .generation import Step, generate
from .gguf import GGUF
from .model import DEMO_PATH, Model
from .options import FLASH_ATTENTION, KV_TYPES, ContextOptions
from .rpc import devices_at, rpc_worker
from .sampling import Sampler, SamplingParams, logprob, top_logprobs
from .sequence import Sequence
from .tokenizer import StreamDecoder, Tokenizer

if TYPE_CHECKING:
    from .backends import Backend, NativeBackend, OpenAIBackend, connect
    from .chat import ChatTemplate
    from .chunks import BackendRequest, ChunkStream
    from .completion import Chunk, Completion, Timings, TokenLogprob, Usage
    from .conversation import Chat
    from .draft import RequestOptions
    from .llm import LLM, Load
    from .observer import Observer, RequestRecord
    from .prompt_cache import CachedPrompt, PromptFiles
    from .speculative import DraftModel, Lookup, Speculation
    from .structured import Constraint, Matcher
    from .telemetry import Metrics, OpenTelemetry
    from .tools import CallDelta, Tool, ToolCall, read_tools

__version__ = "0.1.0"

__all__ = [
    "DEMO_PATH",
    "FLASH_ATTENTION",
    "GGUF",
    "KV_TYPES",
    "LLM",
    "Backend",
    "BackendError",
    "BackendRequest",
    "BrokenContextError",
    "BuildError",
    "CachedPrompt",
    "CallDelta",
    "Cancelled",
    "Chat",
    "ChatTemplate",
    "Chunk",
    "ChunkStream",
    "ClosedError",
    "Completion",
    "ComputeBackend",
    "Constraint",
    "ConstraintError",
    "Context",
    "ContextError",
    "ContextFullError",
    "ContextOptions",
    "DecodeError",
    "Device",
    "DeviceError",
    "DraftModel",
    "EmptySequenceError",
    "Load",
    "Lookup",
    "Matcher",
    "Memory",
    "Metrics",
    "MinervaError",
    "Model",
    "ModelLoadError",
    "NativeBackend",
    "Observer",
    "OpenAIBackend",
    "OpenTelemetry",
    "OptionError",
    "Placement",
    "PromptFiles",
    "ReentryError",
    "RequestOptions",
    "RequestRecord",
    "Sampler",
    "SamplingError",
    "SamplingParams",
    "Sequence",
    "SequencesInUseError",
    "Speculation",
    "StateError",
    "Stats",
    "Step",
    "StreamDecoder",
    "TemplateError",
    "Timings",
    "TokenLogprob",
    "Tokenizer",
    "TokenizerError",
    "Tool",
    "ToolCall",
    "Usage",
    "__version__",
    "available_cpus",
    "build_info",
    "compute_backends",
    "connect",
    "cpu_quota",
    "devices",
    "devices_at",
    "generate",
    "logprob",
    "read_tools",
    "rpc_worker",
    "top_logprobs",
]

_LAZY = {  # modules that import more than numpy and the binding, or are not needed to generate a token
    "Backend": ".backends",
    "BackendRequest": ".chunks",
    "CachedPrompt": ".prompt_cache",
    "CallDelta": ".tools",
    "Chat": ".conversation",
    "ChatTemplate": ".chat",
    "Chunk": ".completion",
    "ChunkStream": ".chunks",
    "Completion": ".completion",
    "connect": ".backends",
    "Constraint": ".structured",
    "DraftModel": ".speculative",
    "LLM": ".llm",
    "Load": ".llm",
    "Lookup": ".speculative",
    "Matcher": ".structured",
    "Metrics": ".telemetry",
    "NativeBackend": ".backends",
    "Observer": ".observer",
    "OpenAIBackend": ".backends",
    "OpenTelemetry": ".telemetry",
    "PromptFiles": ".prompt_cache",
    "read_tools": ".tools",
    "RequestOptions": ".draft",
    "RequestRecord": ".observer",
    "Speculation": ".speculative",
    "Timings": ".completion",
    "TokenLogprob": ".completion",
    "Tool": ".tools",
    "ToolCall": ".tools",
    "Usage": ".completion",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LAZY[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
