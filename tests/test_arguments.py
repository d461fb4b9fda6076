"""Arguments of every wrong kind: only documented exceptions come out, they name the argument, and nothing changes."""

import contextlib
import itertools
import operator
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minerva_native as mn
from minerva_native import sampling
from minerva_native.sampling import filters, penalties

IDS = [20, 21, 22, 23]


class Opaque:
    """An object that can do nothing, not even be compared."""

    def __eq__(self, other: object) -> bool:
        raise TypeError("an Opaque cannot be compared with anything")

    __hash__ = object.__hash__


LOGITS = np.linspace(-3, 3, 50, dtype=np.float32)
NUMBERS: list[Any] = [
    *(True, False, 0, 1, -1, 2, 255, 2**31 - 1, 2**31, 2**32, 2**63, -(2**63) - 1, 10**30, -(10**30), 10**400),
    *(0.5, 1.5, -0.0, float("nan"), float("inf"), float("-inf"), 1e-320, 1e39, 1e308, 2j),
    *(np.int64(3), np.uint8(1), np.float32(0.5), np.float64("nan"), np.bool_(True)),
]
OTHERS: list[Any] = [
    *(None, "", "x", "3", "\0", "\ud800", b"", b"x", object(), Opaque(), ..., lambda *_: None),
    *([], (), {}, set(), [1], [1, 2], [-1], [10**30], [2**31], [1.5], ["x"], [None], [[1]], {"x": 1}, {1: [2]}, {1, 2}),
    *(np.array([], np.int32), np.array([1, 2]), np.array([1.5]), np.array(["x"]), np.array([None]), np.array(3)),
    *(np.zeros((2, 2), np.int32), np.array([2**63], np.uint64), np.zeros(50), np.zeros(50, np.float16), LOGITS[:3]),
    *(np.array([], np.float32), np.zeros((5, 10), np.float32), np.full(50, np.nan, np.float32), np.zeros(50, np.bool_)),
    *(np.zeros(7, np.uint8), np.zeros(1, np.uint8), np.zeros(50, ">i4"), np.zeros(100, np.float32)[::2]),
    *(
        threading.Event(),
        Path(f"{mn.DEMO_PATH}/at/all"),
        iter([1, "x"]),
        range(3),
        range(-2, 0),
        slice(None),
        ValueError("x"),
    ),
]
ANYTHING = NUMBERS + OTHERS


class Room(NamedTuple):
    """What is there to be called."""

    model: mn.Model
    context: mn.Context
    sequence: mn.Sequence
    strangers: list[Any]
    folder: Path
    llm: mn.LLM


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Room]:
    with mn.Model.demo() as model, mn.Model.demo() as other, mn.Model.demo() as closed_model:
        closed_context = closed_model.context(n_ctx=64, n_threads=1)
        closed_sequence = closed_context.sequence()
        closed_model.close()
        with (
            model.context(n_ctx=128, n_seq=3, n_threads=1) as context,
            other.context(n_ctx=64, n_threads=1) as elsewhere,
        ):
            sequence, stranger = context.sequence(), elsewhere.sequence()
            closed_here = context.sequence()
            closed_here.close()
            sequence.extend(IDS)
            strangers = [
                *(model, context, sequence, model.tokenizer, model.metadata, sequence.tokens, mn.Sampler()),
                *(mn.SamplingParams(), mn.ContextOptions(), other, elsewhere, stranger, {stranger: [1]}, [stranger]),
                *(closed_model, closed_context, closed_sequence, closed_here, {closed_here: [1]}, [closed_here]),
                *({sequence: "x"}, {sequence: None}, {sequence: [10**30]}, {"x": [1]}, [sequence, None]),
            ]
            folder = tmp_path_factory.mktemp("files")
            (folder / "text").write_text("some text")
            strangers += [folder, folder / "text"]
            with (
                pytest.MonkeyPatch.context() as patch,
                contextlib.chdir(folder),
                mn.LLM(model, n_ctx=256, n_threads=1) as llm,
            ):  # any string is a file's name
                patch.setenv("XDG_CACHE_HOME", str(folder))
                yield Room(model, context, sequence, strangers, folder, llm)


class Call(NamedTuple):
    """A way to call something: valid arguments, each of which is replaced; `also` are further words for them."""

    make: Callable[[Room], Callable[..., object]]
    arguments: Callable[[Room], dict[str, Any]]
    reads_files: bool = False
    also: tuple[str, ...] = ()


def steps(room: Room) -> Callable[..., object]:
    return lambda **arguments: list(itertools.islice(mn.generate(**arguments), 2))


def set_pinned(room: Room) -> Callable[..., object]:
    return lambda pinned: setattr(room.sequence, "pinned", pinned)


def close_after(function: Callable[..., Any]) -> Callable[..., object]:
    def call(**arguments: object) -> None:
        function(**arguments).close()

    return call


def method(name: str, of: str = "sequence") -> Callable[[Room], Callable[..., object]]:
    return lambda room: operator.attrgetter(name)(getattr(room, of))


# The words of token ids are the tokenizer's business, whose own tests read them.
TOKEN_IDS = ("",)

NOTHING: dict[str, Any] = {"on_progress": None, "cancel": None}


def growing(name: str) -> Call:
    more = NOTHING if name in ("extend", "assign") else {"cancel": None}
    return Call(method(name), lambda room: {"ids": [7], **more}, also=TOKEN_IDS)


def fixed(function: Callable[..., object], arguments: dict[str, Any], *also: str) -> Call:
    return Call(lambda room: function, lambda room: dict(arguments), also=also)


CANDIDATES = sampling.Candidates(LOGITS)
STEPS: dict[str, tuple[Callable[..., object], dict[str, Any]]] = {
    "top_k": (filters.top_k, {"k": 4}),
    "top_p": (filters.top_p, {"p": 0.9, "min_keep": 1}),
    "min_p": (filters.min_p, {"p": 0.1, "min_keep": 1}),
    "typical_p": (filters.typical_p, {"p": 0.5, "min_keep": 1}),
    "top_n_sigma": (filters.top_n_sigma, {"n": 1.0}),
    "xtc": (filters.xtc, {"threshold": 0.1, "min_keep": 1}),
    "temperature": (filters.temperature, {"t": 0.7}),
    "dynamic_temperature": (filters.dynamic_temperature, {"t": 0.7, "spread": 0.2, "exponent": 1.0}),
    "penalties": (penalties.penalties, {"history": [1, 2, 2], "repeat": 1.2, "frequency": 0.1, "presence": 0.1}),
    "dry": (
        penalties.dry,
        {"history": [1, 2, 3, 1, 2], "multiplier": 0.8, "base": 1.75, "allowed_length": 2, "breakers": {5: [()]}},
    ),
}


def watch(room: Room) -> Callable[..., object]:
    metrics = mn.Metrics()

    def call(**arguments: Any) -> None:
        metrics.watch(**arguments)
        metrics.unwatch(arguments["llm"])

    return call


def copy_a_little(size_bytes: Any) -> object:
    """Measure the first device, unless that would be right and take long."""
    is_long = isinstance(size_bytes, int) and 1 << 16 < size_bytes <= 1 << 40
    return None if is_long else mn.devices()[0].copy_bandwidth(size_bytes)


def listen_briefly(**arguments: Any) -> None:
    """Be a worker that ends as soon as it listens."""

    def end(address: str, devices: list[mn.Device]) -> None:
        raise mn.Cancelled("it is not to stay")

    mn.rpc_worker(**arguments, on_listening=end)


DRAWN: dict[str, Any] = {"logits": LOGITS, "tokens": IDS, "mask": None}
SCORED: dict[str, Any] = {"logits": LOGITS, "token": 3}
SAMPLER = mn.Sampler(
    mn.SamplingParams(seed=1, repeat_penalty=1.1, dry_multiplier=0.5, dry_sequence_breakers=[9], logit_bias={3: 1.0})
)

HELLO = [{"role": "user", "content": "Hello"}]

REQUEST: dict[str, Any] = {
    "max_tokens": 1,
    "stop": ("xx",),
    "echo": False,
    "logprobs": False,
    "top_logprobs": 0,
    "thinking_tags": ("<a>", "</a>"),
    "reasoning_budget": 3,
    "reasoning_message": "",
    "keep_partial": False,
    "continue_final_message": False,
    "response_format": None,
    "constraint": None,
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "chat_template_kwargs": {},
    "cancel": None,
    "timeout": None,
}

SERVER: dict[str, Any] = {
    "base_url": "http://127.0.0.1:9/v1",
    "model": "x",
    "api_key": "x",
    "timeout": 1.0,
    "retries": 0,
    "accepts": ("top_k",),
}

CALLS: dict[str, Call] = {
    **{name: growing(name) for name in ("extend", "assign", "logits_after", "score")},
    "top_scores": Call(method("top_scores"), lambda room: {"ids": [7], "n": 2, "cancel": None}, also=TOKEN_IDS),
    "append": Call(method("append"), lambda room: {"token": 5}, also=TOKEN_IDS),
    "truncate": Call(method("truncate"), lambda room: {"n": 4}),
    "rewind": Call(method("rewind"), lambda room: {"n": 0}),
    "shift": Call(method("shift"), lambda room: {"keep": 1, "discard": 0}, also=("discard", "first")),
    "fork": Call(lambda room: close_after(room.sequence.fork), lambda room: {"n": 2}),
    "save": Call(method("save"), lambda room: {"path": room.folder / "saved"}, reads_files=True),
    "pinned": Call(set_pinned, lambda room: {"pinned": False}),
    "Context.extend": Call(
        method("extend", "context"),
        lambda room: {"prompts": {room.sequence: [5]}, **NOTHING},
        also=("sequence", *TOKEN_IDS),
    ),
    "Context.evaluate": Call(
        method("evaluate", "context"),
        lambda room: {"sequences": [room.sequence], "max_tokens": 5, **NOTHING},
        also=("sequence",),
    ),
    "Context.logits_after": Call(
        method("logits_after", "context"),
        lambda room: {"guesses": {room.sequence: [5]}, "others": [room.sequence], "max_tokens": 5, "cancel": None},
        also=("sequence", *TOKEN_IDS),
    ),
    "Tokenizer.encode": Call(
        method("model.tokenizer.encode", "context"),
        lambda room: {"text": "a", "add_special": True, "parse_special": False, "cancel": None},
    ),
    "Tokenizer.count": Call(
        method("model.tokenizer.count", "context"),
        lambda room: {"text": "a", "add_special": True, "parse_special": False},
    ),
    **{
        f"Tokenizer.{name}": Call(
            method(f"model.tokenizer.{name}", "context"), lambda room: {"ids": [5], "special": False}, also=TOKEN_IDS
        )
        for name in ("decode", "decode_bytes")
    },
    "Tokenizer.piece": Call(
        method("model.tokenizer.piece", "context"), lambda room: {"token": 5, "special": False}, also=TOKEN_IDS
    ),
    "Tokenizer.stream": Call(
        method("model.tokenizer.stream", "context"), lambda room: {"special": False, "after": 5}, also=TOKEN_IDS
    ),
    **{
        f"Tokenizer.{name}": Call(
            method(f"model.tokenizer.{name}", "context"), lambda room: {"token": 5}, also=TOKEN_IDS
        )
        for name in ("is_end", "is_control")
    },
    "Context.encode": Call(method("encode", "context"), lambda room: {"ids": [1]}, also=TOKEN_IDS),
    "Context.restore": Call(
        lambda room: close_after(room.context.restore), lambda room: {"path": room.folder / "saved"}, reads_files=True
    ),
    "Context.set_threads": Call(
        method("set_threads", "context"), lambda room: {"n": 1, "batch": 1}, also=("n_threads", "n_threads_batch")
    ),
    "Context.from_bytes": Call(
        lambda room: close_after(room.context.from_bytes), lambda room: {"data": room.sequence.to_bytes()}
    ),
    "Context.clear_cache": Call(method("clear_cache", "context"), lambda room: {"pinned": False}),
    "Context": Call(
        lambda room: close_after(mn.Context), lambda room: {"model": room.model, "options": mn.ContextOptions(n_ctx=64)}
    ),
    "ContextOptions.resolve": Call(
        lambda room: mn.ContextOptions(n_ctx=64).resolve, lambda room: {"model": room.model}
    ),
    "ContextOptions": Call(
        lambda room: mn.ContextOptions, lambda room: mn.ContextOptions(n_ctx=64).__dict__, also=("number of sequences",)
    ),
    "generate": Call(
        steps,
        lambda room: {
            "sequence": room.sequence,
            "sampler": mn.SamplingParams(seed=1),
            "max_tokens": 2,
            "stop": ("xx",),
            "cancel": None,
            "decoder": room.model.tokenizer.stream(),
            "top_logprobs": 0,
            "logprobs": False,
        },
        also=("Sequence",),
    ),
    "SamplingParams": Call(lambda room: mn.SamplingParams, lambda room: mn.SamplingParams().__dict__),
    "SamplingParams.replace": Call(lambda room: mn.SamplingParams().replace, lambda room: {"top_k": 3}),
    "SamplingParams.from_model": Call(
        lambda room: mn.SamplingParams.from_model, lambda room: {"model": room.model, "temperature": 1.0}
    ),
    "Sampler": Call(
        lambda room: mn.Sampler,
        lambda room: {
            "params": mn.SamplingParams(dry_multiplier=1.0),
            "processors": (),
            "tokenizer": room.model.tokenizer,
        },
    ),
    "sampler()": fixed(SAMPLER, DRAWN, "vocabulary"),
    "Sampler.distribution": fixed(SAMPLER.distribution, DRAWN, "vocabulary"),
    "Sampler.logprobs": fixed(SAMPLER.logprobs, {**SCORED, "n": 2}, "vocabulary"),
    "Sampler.sampled_logprobs": fixed(SAMPLER.sampled_logprobs, {**SCORED, **DRAWN, "n": 2}, "vocabulary"),
    "Sampler.fork": fixed(SAMPLER.fork, {"seed": 3}),
    "Sampler.load_state_dict": Call(
        lambda room: mn.Sampler().load_state_dict, lambda room: {"state": mn.Sampler().state_dict()}
    ),
    "state": Call(
        lambda room: lambda **state: mn.Sampler().load_state_dict(state),
        lambda room: mn.Sampler().state_dict(),
        also=("state",),
    ),
    "apply_mask": fixed(
        sampling.apply_mask, {"logits": LOGITS, "mask": np.ones(50, np.bool_), "out": np.empty(50, np.float32)}, "out"
    ),
    "logprob": fixed(sampling.logprob, SCORED, "vocabulary"),
    "top_logprobs": fixed(sampling.top_logprobs, {"logits": LOGITS, "n": 3}),
    "Step.logprob": fixed(lambda **scored: mn.Step(**scored).logprob, SCORED, "vocabulary"),
    **{name: fixed(step, {"candidates": CANDIDATES, **given}, "tokens") for name, (step, given) in STEPS.items()},
    "Device.copy_bandwidth": fixed(copy_a_little, {"size_bytes": 4096}),
    "cpu_quota": Call(
        lambda room: mn.cpu_quota, lambda room: {"root": room.folder, "membership": room.folder / "text"}
    ),
    "rpc_worker": Call(
        lambda room: listen_briefly,
        lambda room: {"host": "127.0.0.1", "port": 0, "n_threads": 1, "devices": None},
        reads_files=True,
    ),
    "devices_at": fixed(mn.devices_at, {"endpoints": [], "timeout": 10.0}, "rpc"),
    "Model.load": Call(
        lambda room: close_after(mn.Model.load),
        lambda room: {
            "path": mn.DEMO_PATH,
            "gpu_layers": "auto",
            "devices": None,
            "rpc": (),
            "rpc_timeout": 300.0,
            "split_mode": "layer",
            "main_gpu": None,
            "tensor_split": None,
            "tensor_overrides": None,
            "cpu_moe": False,
            "n_cpu_moe": 0,
            "context": None,
            "mmap": True,
            "mlock": False,
            "kv_overrides": None,
            "load_mtp": False,
            "vocab_only": True,
            "check": True,
            "on_progress": None,
        },
    ),
    "LLM": Call(
        lambda room: close_after(mn.LLM),
        lambda room: {
            "model": room.model,
            "template": "{{ messages[0].content }}",
            "on_full": "error",
            "n_parallel": 1,
            "cache_dir": None,
            "cache_bytes": 1 << 20,
            "speculate": None,
            "n_ctx": 64,
        },
        reads_files=True,
        also=("on_full", "template"),
    ),
    "PromptFiles": fixed(mn.PromptFiles, {"directory": "prompts"}),
    "Constraint.json_schema": fixed(mn.Constraint.json_schema, {"schema": {"type": "null"}}),
    "Constraint.regex": fixed(mn.Constraint.regex, {"pattern": "a"}, "regular expression"),
    "Constraint.choice": fixed(mn.Constraint.choice, {"texts": ["a", "b"]}, "choice"),
    "Constraint.lark": fixed(mn.Constraint.lark, {"grammar": 'start: "a"'}),
    "Constraint.gbnf": fixed(mn.Constraint.gbnf, {"grammar": 'root ::= "a"'}),
    "Constraint.of": fixed(mn.Constraint.of, {"given": ["a"]}, "constraint", "choice", "regular expression"),
    "Constraint.of_format": fixed(mn.Constraint.of_format, {"given": {"type": "json_object"}}, "schema", "format"),
    "Constraint.matcher": Call(
        lambda room: mn.Constraint.choice(["a"]).matcher,
        lambda room: {"tokenizer": room.model.tokenizer, "in_thread": False},
    ),
    "Matcher.consume": Call(
        lambda room: mn.Constraint.regex("(?s:.*)").matcher(room.model.tokenizer).consume, lambda room: {"token": 40}
    ),
    "Matcher.rollback": Call(
        lambda room: mn.Constraint.regex("a*").matcher(room.model.tokenizer).rollback, lambda room: {"n": 0}
    ),
    "Matcher.follow": Call(
        lambda room: mn.Constraint.regex("(?s:.*)").matcher(room.model.tokenizer).follow,
        lambda room: {"tokens": [40]},
        also=TOKEN_IDS,
    ),
    "Speculation": fixed(mn.Speculation, {"drafter": "lookup", "max_loss": 0.1}, "speculate"),
    "Lookup": fixed(mn.Lookup, {"documents": [[1, 2]]}),
    "DraftModel": Call(
        lambda room: close_after(mn.DraftModel), lambda room: {"model": room.model, "n_ctx": 64, "n_threads": 1}
    ),
    "LLM.complete": Call(
        lambda room: room.llm.complete, lambda room: {"prompt": "Once", **REQUEST}, also=("messages", *REQUEST)
    ),
    "LLM.chat_completion": Call(
        lambda room: room.llm.chat_completion,
        lambda room: {"messages": HELLO, "tools": None, "n": 1, **REQUEST},
        also=("message", "template", "must be a JSON value", "'content'", *REQUEST),
    ),
    "LLM.choose": Call(
        method("choose", "llm"),
        lambda room: {"prompt": "Once", "answers": ["a", "b"], "cancel": None, "timeout": None},
        also=("messages",),
    ),
    "LLM.score": Call(
        method("score", "llm"),
        lambda room: {"text": "Once upon", "cancel": None, "timeout": None},
        also=("prompt", "messages"),
    ),
    "LLM.count_tokens": Call(method("count_tokens", "llm"), lambda room: {"text": "Once"}, also=("prompt", "messages")),
    "LLM.chat": Call(
        method("chat", "llm"),
        lambda room: {"system": "x", "template": None, "tools": (), **REQUEST},
    ),
    "LLM.load_chat": Call(method("load_chat", "llm"), lambda room: {"path": room.folder / "text"}, reads_files=True),
    "Chat.send": Call(
        lambda room: room.llm.chat(max_tokens=1).send, lambda room: {"message": "Hello"}, also=("role", "content")
    ),
    "Chat.save": Call(lambda room: room.llm.chat().save, lambda room: {"path": room.folder / "chat"}, reads_files=True),
    "Metrics.watch": Call(watch, lambda room: {"llm": room.llm, "name": None}),
    "Metrics.unwatch": Call(lambda room: mn.Metrics().unwatch, lambda room: {"llm": room.llm}),
    "OpenTelemetry": fixed(
        mn.OpenTelemetry, {"capture_content": False, "tracer_provider": None, "meter_provider": None}
    ),
    "BackendRequest": fixed(
        mn.BackendRequest, {"messages": HELLO, "tools": None, "prompt": None, **REQUEST}, "message"
    ),
    "NativeBackend.stream": Call(
        lambda room: lambda request: mn.NativeBackend(room.llm).stream(request).complete(),
        lambda room: {"request": mn.BackendRequest(HELLO, max_tokens=1)},
    ),
    "OpenAIBackend": fixed(mn.OpenAIBackend, SERVER),
    "OpenAIBackend.stream": Call(
        lambda room: mn.OpenAIBackend(**SERVER).stream, lambda room: {"request": mn.BackendRequest(HELLO, max_tokens=1)}
    ),
    "connect": Call(
        lambda room: close_after(mn.connect), lambda room: {"target": room.llm}, reads_files=True, also=("model",)
    ),
    "GGUF": Call(lambda room: close_after(mn.GGUF), lambda room: {"path": mn.DEMO_PATH}),
    "GGUF.has_tensor": Call(lambda room: mn.GGUF(mn.DEMO_PATH).has_tensor, lambda room: {"name": "output.weight"}),
}


def state(room: Room) -> tuple[list[int], int, int]:
    return list(room.sequence), room.context.cells_used, room.context.n_seq


def attempt(room: Room, name: str, arguments: dict[str, Any], replaced: set[str]) -> None:
    """Make a call; if it fails, check how."""
    call = CALLS[name]
    before = state(room)
    logits = room.sequence.logits
    error = failure(call, room, arguments)
    if error is None:
        room.sequence.assign(IDS)
        room.context.clear_cache(pinned=True)
        return
    sentence = str(error)
    assert len(sentence.split()) > 3, repr(error)
    if not isinstance(error, mn.MinervaError | OSError):
        words = {*replaced, *call.also}
        assert any(word.lower() in sentence.lower() for word in words), (name, arguments, repr(error))
    assert state(room) == before, repr(error)
    assert np.array_equal(room.sequence.logits, logits), repr(error)


def failure(call: Call, room: Room, arguments: dict[str, Any]) -> Exception | None:
    """Return the documented exception that a call raises, if it does."""
    try:
        call.make(room)(**arguments)
    except (mn.MinervaError, TypeError, ValueError) as error:
        return error
    except OSError as error:
        if not call.reads_files:
            raise
        return error
    return None


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, for what is computed with odd numbers
@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_argument(room: Room, name: str) -> None:
    valid = CALLS[name].arguments(room)
    for argument in valid:
        for value in ANYTHING + room.strangers:
            attempt(room, name, {**CALLS[name].arguments(room), argument: value}, {argument})


def nested(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(values, max_size=3) | st.dictionaries(st.integers() | st.text(max_size=3), values, max_size=2)


VALUES = st.recursive(
    st.sampled_from(ANYTHING)
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    nested,
    max_leaves=5,
)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", CALLS)
@given(data=st.data())
def test_several_wrong_arguments(room: Room, name: str, data: st.DataObject) -> None:
    valid = CALLS[name].arguments(room)
    replaced = data.draw(st.sets(st.sampled_from(sorted(valid)), min_size=1, max_size=3))
    values = VALUES | st.sampled_from(room.strangers)
    wrong = {argument: data.draw(values, argument) for argument in sorted(replaced)}
    attempt(room, name, {**valid, **wrong}, replaced)


class Raising:
    """A decoder that cannot decode."""

    def feed(self, token: int) -> str:
        raise RuntimeError("it cannot")

    def flush(self) -> str:
        return ""


class Silent:
    """A decoder whose text is none."""

    def feed(self, token: int) -> Any:
        return None

    def flush(self) -> str:
        return ""


class Odd:
    """A cancel token that fails when it is asked."""

    def is_set(self) -> bool:
        raise RuntimeError("it cannot")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"decoder": Raising()}, RuntimeError, "it cannot"),
        ({"decoder": Silent()}, TypeError, r"decoder must return text from feed\(\), not None"),
        ({"decoder": Silent(), "stop": ["x"]}, TypeError, "decoder must return text"),
        ({"cancel": Odd()}, RuntimeError, "it cannot"),
        ({"sampler": lambda logits, tokens: None}, TypeError, "sampler must return a token id, not None"),
        ({"sampler": lambda logits, tokens: 1.0}, TypeError, "sampler must return a token id, not a float"),
        ({"sampler": lambda logits, tokens: 10**30}, ValueError, "token id"),
        ({"sampler": lambda logits, tokens: -1}, ValueError, "token id"),
    ],
)
def test_a_step_that_fails_leaves_the_sequence_as_it_was(
    room: Room, arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    before, logits = state(room), room.sequence.logits
    with pytest.raises(error, match=words):
        next(mn.generate(room.sequence, **({"sampler": lambda logits, tokens: 40} | arguments)))
    assert state(room) == before
    assert np.array_equal(room.sequence.logits, logits)


@pytest.mark.parametrize("history", [[10**30], [-(10**30)], ["x"], [None], "text", [[1]], np.zeros((2, 2), np.int32)])
def test_a_history_of_no_tokens_is_refused(history: Any) -> None:
    for name in ("sampler()", "Sampler.distribution"):
        with pytest.raises((TypeError, ValueError), match="tokens so far"):
            CALLS[name].make(None)(logits=LOGITS, tokens=history)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change", [{"seed": 2**64}, {"drawn": float("inf")}, {"mu": 10**400}, {"seed": -1}, {"version": 2}]
)
def test_a_state_out_of_range_changes_nothing(change: dict[str, Any]) -> None:
    sampler = mn.Sampler(mn.SamplingParams(seed=7, mirostat=2))
    sampler(LOGITS)
    before = sampler.state_dict()
    with pytest.raises(ValueError, match="state"):
        sampler.load_state_dict({**before, **change})
    assert sampler.state_dict() == before
