"""A model: the weights and the vocabulary of a GGUF file."""

import inspect
import math
import os
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, Literal, NoReturn, ParamSpec, Self

from . import rpc as workers
from ._arguments import flag, function, integer, many, number, what
from ._arguments import path as as_path
from ._binding import BUILD_INFO, callbacks, ffi, is_lost, lib, text, thrown
from ._handle import Handle
from .check import check_loaded, check_model
from .devices import (
    Placement,
    buffer_types,
    check_not_inherited,
    gpus,
    is_about,
    placement,
    select,
    warn_that_nothing_fits,
)
from .errors import Cancelled, DeviceError, ModelLoadError, OptionError, StateError
from .fit import check_layers, layers_that_fit
from .gguf import GGUF, Metadata, Override, checked_overrides, open_parts
from .options import ContextOptions
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .context import Context

DEMO_PATH = Path(__file__).parent / "demo" / "minerva-demo.gguf"
"""The path of the built-in model."""

DRAFT_PATH = DEMO_PATH.with_name("minerva-demo-draft.gguf")

_SPLIT_MODES = {
    "none": lib.LLAMA_SPLIT_MODE_NONE,
    "layer": lib.LLAMA_SPLIT_MODE_LAYER,
    "row": lib.LLAMA_SPLIT_MODE_ROW,
    "tensor": lib.LLAMA_SPLIT_MODE_TENSOR,
}

_LOAD_MODES = {  # by `mmap` and `mlock`
    (True, False): lib.LLAMA_LOAD_MODE_AUTO,
    (True, True): lib.LLAMA_LOAD_MODE_MMAP_MLOCK,
    (False, False): lib.LLAMA_LOAD_MODE_NONE,
    (False, True): lib.LLAMA_LOAD_MODE_MLOCK,
}

_EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"  # as llama.cpp's --cpu-moe has it
_LONGEST_PATTERN = 1000  # compiling one takes stack

MTP_ARCHITECTURES = frozenset(
    {
        *("bailingmoe3", "cohere2moe", "deepseek2", "deepseek32", "deepseek4", "glm-dsa", "glm4moe", "hy_v3", "mimo2"),
        *("nemotron_h_moe", "qwen35", "qwen35moe", "qwen3next", "step35"),
    }
)
"""Architectures whose heads for multi-token prediction libllama has a graph for."""

_SAMPLES, _SAMPLE_BYTES = 256, 4096  # of the model's file, for its fingerprint

_P = ParamSpec("_P")


def _with_parameters_of(
    function: Callable[_P, object],
) -> Callable[[Callable[..., "Context"]], Callable[Concatenate["Model", _P], "Context"]]:
    """Give a method the parameters of a function, for type checkers, editors and `help`: they are written once."""

    def decorate(method: Callable[..., "Context"]) -> Callable[Concatenate["Model", _P], "Context"]:
        own = inspect.signature(method)
        parameters = [next(iter(own.parameters.values())), *inspect.signature(function).parameters.values()]
        method.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        return method

    return decorate


class Model:
    """A loaded model; make one with `Model.load` or `Model.demo`. A context manager, safe to share between threads."""

    path: Path
    tokenizer: Tokenizer
    gpu_layers: int  # how many layers were offered to a GPU

    connections: Any  # libllama's, to the RPC workers that have layers of it
    kv_overrides: dict[str, Override]  # what `Model.load` was told to use instead of the file's metadata
    load_mtp: bool  # whether its MTP heads were loaded

    def __init__(
        self,
        parts: Sequence[GGUF],
        handle: Handle,
        gpu_layers: int,
        vocab_only: bool,
        kv_overrides: dict[str, Override],
        connections: Any = ffi.NULL,
        load_mtp: bool = False,
    ):
        self.path, self._parts, self._handle, self.vocab_only = parts[0].path, parts, handle, vocab_only
        self.kv_overrides, self.connections, self.load_mtp = kv_overrides, connections, load_mtp
        self._contexts: weakref.WeakSet[Context] = weakref.WeakSet()
        self.tokenizer = Tokenizer(handle, parts[0].metadata)
        with handle as pointer:  # a context with YaRN changes libllama's own number
            self._n_ctx_train = int(lib.llama_model_n_ctx_train(pointer))
        self._fingerprint: str | None = None  # of the file, once a sequence is saved or restored
        most = self.n_blocks + 1
        self.gpu_layers = min(gpu_layers, most) if gpu_layers >= 0 else most

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        gpu_layers: Literal["auto"] | int = "auto",
        devices: Sequence[str] | None = None,
        rpc: Sequence[str] = (),
        rpc_timeout: float = workers.DEFAULT_TIMEOUT,
        split_mode: str = "layer",
        main_gpu: int | None = None,
        tensor_split: Sequence[float] | None = None,
        tensor_overrides: Mapping[str, str] | None = None,
        cpu_moe: bool = False,
        n_cpu_moe: int = 0,
        context: ContextOptions | None = None,
        mmap: bool = True,
        mlock: bool = False,
        kv_overrides: Mapping[str, Override] | None = None,
        load_mtp: bool = False,
        vocab_only: bool = False,
        check: bool = True,
        on_progress: Callable[[float], object] | None = None,
    ) -> Self:
        """Load a GGUF file (`llama_model_load_from_file`).

        Args:
            path: the file; of a split model the first one, or all of them in order if they are not named as usual.
            gpu_layers: how many layers to put on GPUs; the output counts as one, an MTP head too (see `n_blocks`), and
                -1 is all. "auto" is as many as fit in their free memory with a context, less 1 GiB of each; none
                without a GPU. See `context`.
            devices: names from `minerva_native.devices()`; all by default, none for the CPU alone.
            rpc: the RPC workers that take layers too, as "host:port" (see `rpc_worker`). What they are sent is neither
                encrypted nor authenticated.
            rpc_timeout: how many seconds a worker may be silent while something is asked of it, before it is given up;
                the last one holds for all models that share a worker.
            split_mode: how several GPUs share the model: "none" (one has it), "layer", "row" or "tensor".
            main_gpu: the index of the GPU that has the whole model with split_mode="none".
            tensor_split: the share of each GPU, such as [3, 1]; by default as they have free memory.
            tensor_overrides: where to put tensors that a regular expression (C++'s, anywhere in the name) matches, such
                as {"ffn_down": "CPU"}: "CPU", the name of a device, or the address of an RPC worker. The first that
                matches counts.
            cpu_moe: keep the experts' weights of a mixture of experts in this machine's memory.
            n_cpu_moe: the same for the first so many layers.
            context: the options of the context that will be made, which `gpu_layers` is to leave room for. Without
                them "auto" plans for `ContextOptions()`, and of a number only the weights are checked. With
                split_mode="row" or "tensor" nothing is planned, and "auto" is all.
            mmap: map the file instead of reading it.
            mlock: keep the weights in RAM, never swapped out. The system may limit that (`ulimit -l`), which libllama
                then warns of.
            kv_overrides: values to use instead of those in the file's metadata, as in
                {"tokenizer.ggml.add_bos_token": False}.
            load_mtp: load the model's heads for multi-token prediction too, for a context with `mtp=True` to draft with
                (see `n_mtp_layers`).
            vocab_only: load no weights; the model then only tokenizes.
            check: refuse files that contradict themselves, on which libllama may end the process; pass False only for
                files that you trust.
            on_progress: called with 0.0 to 1.0 as the weights come in; returning False stops the load, which then
                raises `Cancelled`.

        Raises:
            ModelLoadError: there is no model in that file.
            DeviceError: a GPU was asked for that is not there, `gpu_layers` is more than fits, or an RPC worker cannot
                be reached.
            OptionError, ContextError: the model cannot have the context that `context` is about, or has no MTP head.
            Cancelled: `on_progress` returned False.
            TypeError, ValueError: an argument is of the wrong type or out of range.
        """
        paths = [as_path("path", one) for one in (path if isinstance(path, list | tuple) else [path])]
        if not paths:
            raise ValueError("path must name a file")
        mmap, mlock, vocab_only = flag("mmap", mmap), flag("mlock", mlock), flag("vocab_only", vocab_only)
        load_mtp, check = flag("load_mtp", load_mtp), flag("check", check)
        overrides = checked_overrides(kv_overrides)
        function("on_progress", on_progress)
        parts = open_parts(paths[0], paths[1:])
        if overrides:
            overrides = parts[0].override(overrides)
        facts = check_model(parts, vocab_only) if check else None
        if load_mtp and not _n_mtp_layers(parts):
            architecture = parts[0].metadata.get("general.architecture", "")
            raise OptionError(f"{paths[0].name} ({architecture}) has no MTP head that libllama can draft with")
        parameters = ffi.new("struct llama_model_params *", lib.llama_model_default_params())
        if isinstance(devices, str):
            raise TypeError(f"devices must be a list of names, not a str: [{devices!r}]")
        local = gpus() if devices is None else select(list(many("devices", devices)))
        if not vocab_only:
            check_not_inherited(local)
        # Workers come first, as in llama.cpp: what follows them is sent over the network once.
        endpoints = workers.checked(rpc)
        chosen = [*workers.connect([] if vocab_only else endpoints, rpc_timeout), *local]
        layers = _resolve_gpu_layers(gpu_layers, bool(chosen))
        if not isinstance(split_mode, str) or split_mode not in _SPLIT_MODES:
            raise ValueError(f"split_mode must be one of {', '.join(_SPLIT_MODES)}, not {split_mode!r}")
        parameters.split_mode = _SPLIT_MODES[split_mode]
        n_gpus = len(chosen)
        if main_gpu is not None:
            parameters.main_gpu = integer("main_gpu", main_gpu, 0, 2**31 - 1)
            if parameters.main_gpu >= max(1, n_gpus):  # 0 is what it is anyway
                raise DeviceError(f"main_gpu={main_gpu} is the index of a GPU, and there are {n_gpus} to choose from")
        shares = _tensor_split(tensor_split, n_gpus)
        parameters.tensor_split = shares
        moved = _TensorOverrides(tensor_overrides, cpu_moe, n_cpu_moe, parts, chosen)
        parameters.tensor_buft_overrides = moved.array
        if context is not None and not isinstance(context, ContextOptions):
            raise TypeError(f"context must be ContextOptions, not {what(context)}")
        replaced = _overrides(overrides)
        parameters.kv_overrides = replaced
        stopped = False

        # Even if nobody watches: entering Python lets a pending Ctrl-C take effect during a long load.
        def watch(fraction: float) -> bool:
            nonlocal stopped
            stopped = on_progress is not None and on_progress(fraction) is False
            return not stopped

        watcher = ffi.new_handle(watch)
        offered = ffi.new("ggml_backend_dev_t[]", [*chosen, ffi.NULL])
        parameters.devices = ffi.NULL if devices is None and not endpoints else offered
        mmap = mmap and all(part.can_be_mapped for part in parts)
        parameters.vocab_only, parameters.load_mtp = vocab_only, load_mtp
        parameters.progress_callback = lib.minerva_progress
        parameters.progress_callback_user_data = watcher
        names = [ffi.new("char[]", os.fsencode(one)) for one in paths]
        files = ffi.new("const char *[]", names)

        def read(layers: int, is_dry: bool) -> tuple[Handle, Any]:
            parameters.n_gpu_layers, parameters.no_alloc = layers, is_dry
            parameters.load_mode = _LOAD_MODES[mmap, mlock] if not is_dry else lib.LLAMA_LOAD_MODE_NONE
            connections = ffi.new("minerva_connections **")
            with callbacks.captured_errors() as errors:
                pointer = lib.minerva_model_load(files, len(names), parameters, connections)
            needed = ffi.gc(connections[0], lib.minerva_connections_free) if connections[0] != ffi.NULL else ffi.NULL
            handle = Handle("Model", pointer, lib.minerva_model_free) if pointer != ffi.NULL else None
            callbacks.raise_kept()
            if stopped:
                raise Cancelled("loading was stopped by on_progress")
            if handle is None:
                why = thrown() or callbacks.reason(errors, "libllama gives no reason")
                if is_lost() or is_about(local, "\n".join([why, *errors])):
                    raise DeviceError(f"{paths[0]} cannot be loaded: {why}")
                raise ModelLoadError(
                    f"{paths[0]} cannot be loaded ({why}): check that the file is complete and that llama.cpp "
                    f"{BUILD_INFO['llama_cpp']} knows its architecture"
                )
            if facts and not vocab_only:
                with handle as model:
                    check_loaded(facts, lib.llama_model_rope_type(model))
            return handle, needed

        @contextmanager
        def dry_run(layers: int) -> Iterator[Model]:
            handle, needed = read(layers, True)
            try:
                yield Model(parts, handle, layers, vocab_only, overrides, needed, load_mtp)
            finally:
                handle.close()

        if (layers or moved.use_devices) and not vocab_only and split_mode in ("none", "layer"):
            if gpu_layers != "auto":
                check_layers(dry_run, chosen, context, layers)
            elif (fitting := layers_that_fit(dry_run, chosen, context)) is not None:
                layers = fitting
            elif moved.use_devices:
                raise DeviceError("tensor_overrides puts more on devices than fits there beside a context")
            else:  # not even what a GPU needs to help with long prompts
                layers, offered[0], parameters.devices = 0, ffi.NULL, offered
            if not layers and gpu_layers == "auto":
                warn_that_nothing_fits(paths[0], chosen)
        handle, needed = read(layers, False)
        return cls(parts, handle, layers, vocab_only, overrides, needed, load_mtp)

    @classmethod
    def demo(cls, *, gpu_layers: Literal["auto"] | int = "auto") -> Self:
        """Load the small trained model inside the package (see `demo/MODEL_CARD.md`)."""
        return cls.load(DEMO_PATH, gpu_layers=gpu_layers)

    @classmethod
    def demo_draft(cls, *, gpu_layers: Literal["auto"] | int = "auto") -> Self:
        """Load the smaller one with the same vocabulary, which drafts for it (see `demo/DRAFT_CARD.md`)."""
        return cls.load(DRAFT_PATH, gpu_layers=gpu_layers)

    @_with_parameters_of(ContextOptions)
    def context(self, **options: Any) -> "Context":
        """Make a context, which holds the KV cache and computes. The keywords are the fields of `ContextOptions`.

        Raises:
            TypeError, ValueError: an option is of the wrong type or out of range.
            OptionError: the model, this machine or libllama cannot do what an option asks for.
            ContextError: libllama refuses for a reason of its own, such as a lack of memory.
        """
        from .context import Context

        return Context(self, ContextOptions(**options))

    def raw(self) -> Handle:
        """Lend libllama's `llama_model *` for calls of `lib`: `with model.raw() as pointer`.

        The model is not freed before the block ends. Raises `ClosedError` if it is closed.
        """
        return self._handle

    def close_first(self, context: "Context") -> None:
        """Have `close` close a context before the model; every context sees to that itself."""
        self._contexts.add(context)

    def fingerprint(self) -> str:
        """Return a digest of the model's files (the size of each, its beginning, and samples from all over it).

        `kv_overrides` are part of it.

        Two models of equal digests are the same, unless somebody means to deceive. Raises `StateError` if a file can no
        longer be read.
        """
        if self._fingerprint is None:
            try:
                self._fingerprint = _fingerprint([part.path for part in self._parts], self.kv_overrides)
            except OSError as error:
                raise StateError(f"{self.path} can no longer be read to tell which model this is ({error})") from error
        return self._fingerprint

    @property
    def head_sizes(self) -> tuple[float, float]:
        """How many numbers an attention head's key and value have."""
        width = self.n_embd // max(1.0, max(self.hyperparameter("attention.head_count")))
        key = max(self.hyperparameter("attention.key_length", width))
        return key, max(self.hyperparameter("attention.value_length", width))

    @property
    def has_learned_positions(self) -> bool:
        """Whether the model knows its positions from a table, such as GPT-2's, and none beyond `n_ctx_train`."""
        return any(part.has_tensor("position_embd.weight") for part in self._parts)

    @property
    def has_long_factors(self) -> bool:
        """Whether the model turns keys by other factors in a long context (LongRoPE: arXiv:2402.13753)."""
        return any(part.has_tensor("rope_factors_long.weight") for part in self._parts)

    def hyperparameter(self, name: str, *default: float) -> list[float]:
        """Return the numbers, one or one a layer, of the file's `<architecture>.<name>` key; else `default`, or 0."""
        value = self.metadata.get(f"{self.architecture}.{name}", 0)
        values = value if isinstance(value, list) else [value]
        numbers = [float(number) for number in values if isinstance(number, int | float) and math.isfinite(number)]
        return numbers if any(numbers) else list(default) or [0.0]

    @property
    def metadata(self) -> Metadata:
        """Every key of the GGUF file, as a read-only mapping."""
        return self._parts[0].metadata

    @property
    def architecture(self) -> str:
        """The `general.architecture` of the file, such as "llama"."""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def is_causal(self) -> bool:
        """Whether a token attends only to those before it; if not (BERT, diffusion), no text can be continued."""
        with self._handle as model:
            diffuses = lib.llama_model_is_diffusion(model)
        return not diffuses and self.metadata.get(f"{self.architecture}.attention.causal", True) is not False

    @property
    def has_encoder(self) -> bool:
        """Whether the model reads a text as a whole before it answers (`Context.encode`), such as T5."""
        with self._handle as model:
            return bool(lib.llama_model_has_encoder(model))

    @property
    def file_type(self) -> str:
        """The quantisation of most weights, such as "Q8_0" (`llama_ftype_name`)."""
        with self._handle as model:
            kind = lib.llama_model_ftype(model) if not self.vocab_only else self.metadata.get("general.file_type", 0)
            return text(lib.llama_ftype_name(int(kind) if isinstance(kind, int) else 0))

    @property
    def description(self) -> str:
        """Architecture, size and quantisation in libllama's words, such as "llama 1B Q4_0" (`llama_model_desc`)."""
        with self._handle as model:
            buffer = ffi.new("char[]", 256)
            lib.llama_model_desc(model, buffer, len(buffer))
            return text(buffer)

    @property
    def n_params(self) -> int:
        """How many weights the model has."""
        if self.vocab_only:
            return sum(math.prod(tensor.shape) for part in self._parts for tensor in part.tensors)
        return self._fact(lib.llama_model_n_params)

    @property
    def size_bytes(self) -> int:
        """The size of all tensors in bytes."""
        if self.vocab_only:
            return sum(tensor.size_bytes for part in self._parts for tensor in part.tensors)
        return self._fact(lib.llama_model_size)

    @property
    def placement(self) -> list[Placement]:
        """What of the model is on which device: the CPU first, then those that have layers or the output."""
        with self._handle as model:
            return [] if self.vocab_only else placement(model, self.n_layer)

    @property
    def n_embd(self) -> int:
        """The width of the model."""
        return self._fact(lib.llama_model_n_embd, "embedding_length")

    @property
    def n_layer(self) -> int:
        """The depth of the model, without its MTP heads."""
        n_heads = int(max(self.hyperparameter("nextn_predict_layers")))
        return self.n_blocks - n_heads if self.vocab_only else self._fact(lib.llama_model_n_layer)

    @property
    def n_blocks(self) -> int:
        """How many layers the file has: those of the model, and those of its MTP heads, whether they are loaded or not.

        `gpu_layers` counts all of them, from the last one to the first.
        """
        return int(max(self.hyperparameter("block_count")))

    @property
    def n_mtp_layers(self) -> int:
        """How many heads for multi-token prediction (MTP, NextN) the file has that can draft; 0 for most models."""
        return _n_mtp_layers(self._parts)

    @property
    def n_ctx_train(self) -> int:
        """The context length in tokens that the model was trained on."""
        return int(max(self.hyperparameter("context_length"))) if self.vocab_only else self._n_ctx_train

    def _fact(self, function: Callable[[Any], int], key: str = "") -> int:
        """Ask libllama, or the metadata if libllama was told to read the vocabulary alone."""
        with self._handle as model:
            return int(max(self.hyperparameter(key))) if self.vocab_only and key else int(function(model))

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._handle.closed

    def close(self) -> None:
        """Free the model and close its contexts. Closing twice is no error."""
        for context in list(self._contexts):
            context.close()
        self._handle.close()
        for part in self._parts:
            part.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Model cannot be copied or pickled: load the file again")

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.architecture}, {self.file_type}, {self.n_params:,} weights"
        return f"<Model {self.path.name}: {state}>"


def _resolve_gpu_layers(gpu_layers: Literal["auto"] | int, has_device: bool) -> int:
    """Return libllama's number: 0 for the CPU alone, negative for every layer."""
    if isinstance(gpu_layers, str) and gpu_layers == "auto":
        return -1 if has_device else 0
    if isinstance(gpu_layers, str):
        raise ValueError(f'gpu_layers must be "auto" or a number of layers, not {gpu_layers!r}')
    layers = integer("gpu_layers", gpu_layers)
    if not -1 <= layers < 2**31:
        raise ValueError(f"gpu_layers must be from 0 to {2**31 - 1}, or -1 for all, not {layers}")
    if layers and not has_device:
        raise DeviceError(
            f"gpu_layers={layers} asks for a GPU, but there is none in this build or among the devices named: install "
            "with the flags of your GPU (see the README), or leave gpu_layers out to run on the CPU"
        )
    return layers


def _tensor_split(shares: Sequence[float] | None, n_gpus: int) -> Any:
    """Return libllama's array of the GPUs' shares, or NULL."""
    if shares is None:
        return ffi.NULL
    given = [number(f"tensor_split[{index}]", share) for index, share in enumerate(many("tensor_split", shares))]
    if any(share < 0 or not math.isfinite(share) for share in given) or not any(given):
        raise ValueError(f"tensor_split must be shares of 0 or more, and not all 0: not {given}")
    if len(given) != n_gpus:
        raise DeviceError(f"tensor_split has {len(given)} shares, and there are {n_gpus} GPUs to split the model over")
    return ffi.new("float[]", [*given, *[0.0] * (lib.llama_max_devices() - len(given))])


class _TensorOverrides:
    """libllama's array of `tensor_overrides`, or NULL, and what has to live as long as it.

    Attributes:
        array: the array.
        use_devices: whether something is put on others than the CPU.
    """

    array: Any = ffi.NULL
    use_devices = False

    def __init__(
        self, given: Mapping[str, str] | None, cpu_moe: bool, n_cpu_moe: int, parts: Sequence[GGUF], gpus: list[Any]
    ):
        patterns = _patterns(given, cpu_moe, n_cpu_moe, [tensor.name for part in parts for tensor in part.tensors])
        if not patterns:
            return
        types = buffer_types(gpus)
        for pattern, device in patterns.items():
            if device not in types:
                raise DeviceError(
                    f"tensor_overrides puts {pattern!r} on {device!r}, and the model has {', '.join(types)}"
                )
        self.use_devices = {*patterns.values()} != {"CPU"}
        self.array = ffi.new("struct llama_model_tensor_buft_override[]", len(patterns) + 1)
        self._names = [ffi.new("char[]", pattern.encode()) for pattern in patterns]
        for entry, name, device in zip(self.array, self._names, patterns.values(), strict=False):
            entry.pattern, entry.buft = name, types[device]


def _patterns(given: object, cpu_moe: bool, n_cpu_moe: int, tensors: Sequence[str]) -> dict[str, str]:
    """Return the device for each pattern, those of experts last."""
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"tensor_overrides must be a dict of patterns and devices, not {what(given)}")
    cpu_moe, n_cpu_moe = flag("cpu_moe", cpu_moe), integer("n_cpu_moe", n_cpu_moe, 0, 2**31 - 1)
    patterns: dict[str, str] = {}
    for pattern, device in (given or {}).items():
        _check_pattern(pattern, tensors)
        if not isinstance(device, str):
            raise TypeError(f"devices in tensor_overrides must be strings, not {what(device)}")
        patterns[pattern] = device
    layers = {int(found[1]) for name in tensors if (found := re.match(r"blk\.(\d{1,4})\.", name))}
    for experts in [_EXPERTS] if cpu_moe else [rf"blk\.{n}{_EXPERTS}" for n in sorted(layers) if n < n_cpu_moe]:
        patterns.setdefault(experts, "CPU")
    return patterns


def _check_pattern(pattern: object, tensors: Sequence[str]) -> None:
    if not isinstance(pattern, str):
        raise TypeError(f"patterns in tensor_overrides must be strings, not {what(pattern)}")
    if not 0 < len(pattern) <= _LONGEST_PATTERN or not pattern.isprintable():
        raise ValueError(
            f"a pattern in tensor_overrides has 1 to {_LONGEST_PATTERN} printable characters, not {pattern!r}"
        )
    is_found = False
    for name in tensors:
        code = lib.minerva_pattern_matches(pattern.encode(), name.encode())
        if code == lib.MINERVA_THREW:
            raise ValueError(f"{pattern!r} in tensor_overrides is no regular expression of C++'s: {thrown()}")
        is_found |= code == 1
    if not is_found:
        raise ValueError(f"{pattern!r} in tensor_overrides matches no tensor of the model")


def _n_mtp_layers(parts: Sequence[GGUF]) -> int:
    """Return how many MTP heads libllama can draft with."""
    metadata = parts[0].metadata
    architecture = str(metadata.get("general.architecture", ""))
    n_layer, n_heads, width, width_out = (
        metadata.get(f"{architecture}.{key}")
        for key in ("block_count", "nextn_predict_layers", "embedding_length", "embedding_length_out")
    )
    if architecture not in MTP_ARCHITECTURES or not isinstance(n_layer, int) or not isinstance(n_heads, int):
        return 0
    if width_out not in (None, 0, width) and architecture != "deepseek4":  # which gives hidden states of another width
        return 0
    heads = range(n_layer - n_heads, n_layer)
    has_all = all(any(part.has_tensor(f"blk.{head}.nextn.eh_proj.weight") for part in parts) for head in heads)
    return n_heads if 0 < n_heads < n_layer and has_all else 0


def _overrides(values: Mapping[str, Override]) -> Any:
    """Return libllama's array of `kv_overrides`, which ends with an empty key, or NULL."""
    if not values:
        return ffi.NULL
    array = ffi.new("struct llama_model_kv_override[]", len(values) + 1)
    for entry, (key, value) in zip(array, values.items(), strict=False):
        entry.key = key.encode()
        if isinstance(value, bool):
            entry.tag, entry.val_bool = lib.LLAMA_KV_OVERRIDE_TYPE_BOOL, value
        elif isinstance(value, int):
            entry.tag, entry.val_i64 = lib.LLAMA_KV_OVERRIDE_TYPE_INT, value
        elif isinstance(value, float):
            entry.tag, entry.val_f64 = lib.LLAMA_KV_OVERRIDE_TYPE_FLOAT, value
        else:
            entry.tag, entry.val_str = lib.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()
    return array


def _fingerprint(paths: Sequence[Path], overrides: Mapping[str, Override]) -> str:
    import hashlib  # which loads OpenSSL: not to be part of every start

    digest = hashlib.blake2b(digest_size=32)
    for path in paths:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(size.to_bytes(8, "little"))
            for number in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    for override in sorted(overrides.items()):
        digest.update(repr(override).encode())
    return digest.hexdigest()
