"""Mutants of GGUF files and of saved sequences, each a function of a base and a random generator.

The parser and the writer here are the fuzzer's own: they read the valid files that it starts from, and write whatever a
mutation has made of them.
"""

import hashlib
import json
import math
import random
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import gguf

MAGIC = b"GGUF"
STRING, ARRAY, UINT8, UINT32, INT32, FLOAT32, UINT64, BOOL = 8, 9, 0, 4, 5, 6, 10, 7
FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
TYPE_SIZES = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}  # elements and bytes of a block

MAX_DATA_BYTES = 16 << 20  # of a tensor that a mutation makes larger
ALIGNMENT = 32

# Values


@dataclass
class Array:
    """The value of an array key. `count` is what the file says, if that is not the number of items."""

    kind: int
    items: list[int | float | bytes]
    count: int | None = None


Value = int | float | bytes | Array


@dataclass
class Entry:
    """A key and its value."""

    name: bytes
    kind: int
    value: Value


@dataclass
class Tensor:
    """A tensor and its data. `offset` is what the file says, if that is not where the data lies."""

    name: bytes
    dims: list[int]
    kind: int
    data: bytes
    offset: int | None = None
    n_dims: int | None = None

    def fit(self) -> None:
        """Give the data the length that the type and the dimensions ask for, if that is within reason."""
        elements, size = TYPE_SIZES.get(self.kind, (1, 4))
        n_bytes = abs(math.prod(self.dims)) // elements * size
        if n_bytes <= MAX_DATA_BYTES and self.data:
            self.data = (self.data * (n_bytes // len(self.data) + 1))[:n_bytes]


@dataclass
class File:
    """A GGUF file in pieces; `None` stands for what follows from the pieces."""

    entries: list[Entry]
    tensors: list[Tensor]
    magic: bytes = MAGIC
    version: int = 3
    n_entries: int | None = None
    n_tensors: int | None = None
    alignment: int = ALIGNMENT
    raw: list[Callable[[bytes], bytes]] = field(default_factory=list)  # applied to the bytes in the end

    def find(self, name: bytes) -> Entry | None:
        return next((entry for entry in self.entries if entry.name == name), None)

    def array(self, name: bytes) -> Array | None:
        entry = self.find(name)
        return entry.value if entry is not None and isinstance(entry.value, Array) else None

    @property
    def architecture(self) -> bytes:
        entry = self.find(b"general.architecture")
        return entry.value if entry is not None and isinstance(entry.value, bytes) else b"llama"


# Parsing and writing


class Reader:
    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, kind: int) -> int | float:
        layout = struct.Struct("<" + FORMATS[kind])
        number: int | float = layout.unpack(self.take(layout.size))[0]
        return number

    def integer(self, kind: int) -> int:
        return int(self.number(kind))

    def string(self) -> bytes:
        return self.take(self.integer(UINT64))

    def value(self, kind: int) -> Value:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.number(kind)
        kind, count = self.integer(UINT32), self.integer(UINT64)
        return Array(kind, [self.string() if kind == STRING else self.number(kind) for _ in range(count)])

    def entry(self) -> Entry:
        name, kind = self.string(), self.integer(UINT32)
        return Entry(name, kind, self.value(kind))

    def tensor(self) -> Tensor:
        name = self.string()
        dims = [self.integer(UINT64) for _ in range(self.integer(UINT32))]
        return Tensor(name, dims, self.integer(UINT32), b"", self.integer(UINT64))


def parse(data: bytes) -> File:
    """Take a valid file to pieces."""
    reader = Reader(data)
    assert reader.take(4) == MAGIC
    version, n_tensors, n_entries = reader.integer(UINT32), reader.integer(UINT64), reader.integer(UINT64)
    entries = [reader.entry() for _ in range(n_entries)]
    file = File(entries, [reader.tensor() for _ in range(n_tensors)], version=version)
    start = reader.at + -reader.at % file.alignment
    for tensor in file.tensors:
        elements, size = TYPE_SIZES[tensor.kind]
        assert tensor.offset is not None
        at = start + tensor.offset
        tensor.data, tensor.offset = data[at : at + math.prod(tensor.dims) // elements * size], None
    return file


def pack(kind: int, value: int | float) -> bytes:
    """Pack a number of any size as a type, wrapping around."""
    layout = FORMATS[kind]
    if layout in "fd":
        try:
            return struct.pack("<" + layout, value)
        except OverflowError:
            return struct.pack("<" + layout, math.copysign(math.inf, value))
    size = struct.calcsize(layout)
    whole = int(value) if math.isfinite(value) else 0
    return (whole % (1 << 8 * size)).to_bytes(size, "little")


def string(value: bytes) -> bytes:
    return pack(UINT64, len(value)) + value


def item(kind: int, value: int | float | bytes) -> bytes:
    """Write a value as a type, whatever it is."""
    if kind == STRING:
        return string(value if isinstance(value, bytes) else str(value).encode())
    if kind not in FORMATS:
        return string(value) if isinstance(value, bytes) else pack(UINT64, value)
    if isinstance(value, bytes):
        value = int.from_bytes(value[:8], "little")
    return pack(kind, value)


def written(kind: int, value: Value) -> bytes:
    if not isinstance(value, Array):
        return item(kind, value) if kind != ARRAY else pack(UINT32, UINT8) + item(STRING, value)
    if kind != ARRAY:
        return item(kind, value.items[0] if value.items else 0)
    count = len(value.items) if value.count is None else value.count
    return pack(UINT32, value.kind) + pack(UINT64, count) + b"".join(item(value.kind, each) for each in value.items)


def write(file: File) -> bytes:
    """Put the pieces together."""
    n_entries = len(file.entries) if file.n_entries is None else file.n_entries
    n_tensors = len(file.tensors) if file.n_tensors is None else file.n_tensors
    parts = [file.magic, pack(UINT32, file.version), pack(UINT64, n_tensors), pack(UINT64, n_entries)]
    parts += [
        string(entry.name) + pack(UINT32, entry.kind) + written(entry.kind, entry.value) for entry in file.entries
    ]
    at, bodies = 0, []
    for tensor in file.tensors:
        offset = at if tensor.offset is None else tensor.offset
        n_dims = len(tensor.dims) if tensor.n_dims is None else tensor.n_dims
        parts += [string(tensor.name), pack(UINT32, n_dims), *(pack(UINT64, size) for size in tensor.dims)]
        parts += [pack(UINT32, tensor.kind), pack(UINT64, offset)]
        body = tensor.data + bytes(-len(tensor.data) % file.alignment)
        bodies.append(body)
        at += len(body)
    header = b"".join(parts)
    data = b"".join([header, bytes(-len(header) % file.alignment), *bodies])
    for change in file.raw:
        data = change(data)
    return data


# What mutations choose from

INTEGERS = (
    *(0, 1, 2, 3, -1, -2, 7, 31, 33, 127, 255, 256, 257, 512, 513, 65535, 65536, 2**24),
    *(2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1),
)
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-30, 1e30, -1e30, 1e-45, 3.4e38, math.nan, math.inf, -math.inf)
STRINGS = (
    *(b"", b"\0", b"a\0b", b" ", b"\n", b"a" * 300, b"a" * 1001, b"a" * 100_000, b"\xff\xfe", b"\xe2\x96"),
    *("▁".encode(), "🦙".encode(), b"\x1b[2J", b"none", b"default", b"<0x0A>", b"[EMPTY_5]", b"%s%n", b"{{ x }}"),
)
ROPE_SCALING = (b"none", b"linear", b"yarn", b"longrope", b"dynamic")
VOCABULARIES = tuple(b"llama gpt2 bert t5 rwkv plamo2 none no_vocab test gemma4 hybriddna whitespace".split())
PRE_TOKENIZERS = tuple(
    b"""default llama3 llama-bpe falcon3 falcon deepseek-llm deepseek-coder deepseek-v3 mpt starcoder gpt-2 jina-v2-es
    jina-v1-en jina-v2-code roberta-bpe whitespace refact command-r qwen2 qwen35 stablelm2 olmo dbrx smaug-bpe
    poro-chat chatglm-bpe glm4 viking jais tekken smollm codeshell bloom gpt3-finnish exaone exaone4 exaone-moe
    chameleon minerva-7b megrez gpt-4o superbpe trillion bailingmoe seed-coder hunyuan hunyuan-dense kimi-k2 grok-2
    afmoe youtu gemma4 modern-bert jais-2 tiny_aya cohere2moe joyai-llm minimax-m2 solar-open nonsense""".split()
)
CHOICES = {
    b"tokenizer.ggml.model": VOCABULARIES,
    b"tokenizer.ggml.pre": PRE_TOKENIZERS,
    b"general.type": (b"adapter", b"mmproj", b"imatrix", b"model", b"vocab"),
}
ARCHITECTURES = tuple(sorted(name.encode() for name in gguf.MODEL_ARCH_NAMES.values()))
TENSOR_NAMES = tuple(
    sorted(
        {f"{name.format(bid=layer, xid=0)}.{end}".encode() for name in gguf.TENSOR_NAMES.values() for layer in range(2)
         for end in ("weight", "bias")}
    )
)  # fmt: skip


def known_keys() -> list[str]:
    """Return every key that the `gguf` package knows, with its "{arch}"."""
    groups = [group for group in vars(gguf.Keys).values() if isinstance(group, type)]
    keys = [key for group in groups for key in vars(group).values() if isinstance(key, str) and "." in key]
    return sorted({key for key in keys if not key.startswith(("minerva", "gguf."))})


KEYS = known_keys()
HYPERPARAMETERS = [key for key in KEYS if key.startswith("{arch}.")]


class Inapplicable(Exception):
    """The file has nothing that this mutation could change."""


Mutation = Callable[[random.Random, File], str]


def choose(rng: random.Random, things: Sequence[object], what: str) -> int:
    """Return an index of a list; raise `Inapplicable` if it is empty."""
    if not things:
        raise Inapplicable(what)
    return rng.randrange(len(things))


def boundary(rng: random.Random, kind: int, value: Value | None = None) -> int | float | bytes:
    """Return a value of a type that somebody may not have thought of."""
    if kind == STRING:
        return rng.choice(STRINGS)
    if FORMATS.get(kind, "I") in "fd":
        return rng.choice(FLOATS)
    if kind == BOOL:
        return rng.choice((0, 1, 1, 2, 255))
    if isinstance(value, int) and rng.random() < 0.5:
        return rng.choice(
            (value - 1, value + 1, value * 2, value // 2, value * 3, -value, value + 8, rng.randrange(64))
        )
    return rng.choice(INTEGERS)


def clip(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:50]}... ({len(shown)} characters)"


# Mutations of keys


def any_entry(rng: random.Random, file: File) -> Entry:
    """Choose a key, more often a hyperparameter than one of the tokenizer."""
    prefix = file.architecture + b"."
    favoured = [entry for entry in file.entries if entry.name.startswith((prefix, b"split."))]
    entries = favoured if favoured and rng.random() < 0.7 else file.entries
    return entries[choose(rng, entries, "keys")]


def change_value(rng: random.Random, file: File) -> str:
    entry = any_entry(rng, file)
    if isinstance(entry.value, Array):
        return change_array(rng, entry)
    choices = CHOICES.get(entry.name)
    entry.value = rng.choice(choices) if choices and rng.random() < 0.8 else boundary(rng, entry.kind, entry.value)
    return f"{entry.name!r} = {clip(entry.value)}"


def change_array(rng: random.Random, entry: Entry) -> str:
    array = entry.value
    assert isinstance(array, Array)
    kind = rng.randrange(5)
    if kind == 0:
        array.items = array.items[: rng.choice((0, 1, len(array.items) // 2, max(0, len(array.items) - 1)))]
    elif kind == 1:
        array.items = array.items * 2 if rng.random() < 0.3 else [*array.items, *array.items[: rng.randrange(1, 9)]]
    elif kind == 2:
        array.count = rng.choice((0, 1, len(array.items) - 1, len(array.items) + 1, 2**31, 2**32, 2**60, 2**64 - 1))
    elif kind == 3:
        array.kind = rng.choice((*FORMATS, STRING, ARRAY, 13, 2**32 - 1))
    else:
        for _ in range(rng.choice((1, 1, 4, len(array.items)))):
            index = choose(rng, array.items, "items")
            array.items[index] = boundary(rng, array.kind, array.items[index])
    return f"array {entry.name!r}: {len(array.items)} items of type {array.kind}, count {array.count}"


def change_type(rng: random.Random, file: File) -> str:
    entry = any_entry(rng, file)
    entry.kind = rng.choice((*FORMATS, STRING, ARRAY, 13, 255, 2**32 - 1))
    return f"{entry.name!r} is of type {entry.kind}"


def make_array(rng: random.Random, file: File) -> str:
    """Make an array of a number, as of a value for each layer."""
    entry = any_entry(rng, file)
    if not isinstance(entry.value, int | float):
        raise Inapplicable("a scalar")
    kind, value = entry.kind, entry.value
    items: list[int | float | bytes] = [
        boundary(rng, kind, value) if rng.random() < 0.3 else value for _ in range(rng.choice((0, 1, 2, 3, 513)))
    ]
    entry.kind, entry.value = ARRAY, Array(kind, items)
    return f"{entry.name!r} is an array {clip(items)}"


def delete_key(rng: random.Random, file: File) -> str:
    entry = any_entry(rng, file)
    file.entries.remove(entry)
    return f"{entry.name!r} deleted"


def duplicate_key(rng: random.Random, file: File) -> str:
    entry = any_entry(rng, file)
    value = entry.value if isinstance(entry.value, Array) else boundary(rng, entry.kind, entry.value)
    file.entries.insert(rng.randrange(len(file.entries) + 1), Entry(entry.name, entry.kind, value))
    return f"{entry.name!r} twice"


def rename_key(rng: random.Random, file: File) -> str:
    entry = any_entry(rng, file)
    before = entry.name
    prefix = file.architecture.decode(errors="replace")
    known = rng.choice(KEYS).replace("{arch}", prefix).encode()
    entry.name = rng.choice((known, known, before + b"\0x", b"", before.upper(), b"x" * 70_000, b"\xff"))
    return f"{before!r} is named {clip(entry.name)}"


def swap_keys(rng: random.Random, file: File) -> str:
    one, other = any_entry(rng, file), any_entry(rng, file)
    one.kind, other.kind, one.value, other.value = other.kind, one.kind, other.value, one.value
    return f"{one.name!r} and {other.name!r} swapped"


def add_key(rng: random.Random, file: File) -> str:
    prefix = file.architecture.decode(errors="replace")
    template = rng.choice(HYPERPARAMETERS if rng.random() < 0.8 else KEYS)
    name = template.replace("{arch}", prefix).encode()
    kind = rng.choice((UINT32, UINT32, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY))
    if template.endswith("scaling.type"):
        kind = STRING
    elif template.endswith((".causal", ".norm", "add_bos_token", "add_eos_token", "_norm", "finetuned")):
        kind = BOOL
    elif any(
        word in template for word in ("epsilon", "freq", "factor", "scale", "bias", "clamp", "softcapping", "rope.s")
    ):
        kind = FLOAT32
    value: Value
    if kind == ARRAY:
        value = Array(UINT32, [rng.randrange(8) for _ in range(rng.choice((0, 1, 2, 4, 512)))])
    elif template.endswith("scaling.type"):
        value = rng.choice(ROPE_SCALING)
    else:
        value = boundary(rng, kind, rng.randrange(9))
    file.entries = [entry for entry in file.entries if entry.name != name]
    file.entries.append(Entry(name, kind, value))
    return f"{name!r} added: {clip(value)}"


def change_architecture(rng: random.Random, file: File) -> str:
    """Call the model another one, with the keys renamed to match."""
    before, after = file.architecture, rng.choice(ARCHITECTURES)
    for entry in file.entries:
        if entry.name.startswith(before + b"."):
            entry.name = after + entry.name[len(before) :]
        elif entry.name == b"general.architecture":
            entry.value = after
    return f"{before!r} becomes {after!r}"


# Mutations of the vocabulary


def tokens_of(file: File) -> Array:
    tokens = file.array(b"tokenizer.ggml.tokens")
    if tokens is None or not tokens.items:
        raise Inapplicable("tokens")
    return tokens


def duplicate_tokens(rng: random.Random, file: File) -> str:
    tokens = tokens_of(file)
    one, other = rng.randrange(len(tokens.items)), rng.randrange(len(tokens.items))
    text = tokens.items[one]
    assert isinstance(text, bytes)
    kind = rng.randrange(3)
    if kind == 1:
        text += b"\0x"
    elif kind == 2:
        text, tokens.items[one] = f"[EMPTY_{one}]".encode(), b""
    tokens.items[other] = text
    return f"token {other} is like token {one}: {text!r}"


def change_tokens(rng: random.Random, file: File) -> str:
    tokens, done = tokens_of(file), {}
    for _ in range(rng.choice((1, 1, 1, 2, 8, 300))):
        index = rng.randrange(len(tokens.items))
        tokens.items[index] = done[index] = rng.choice(STRINGS)
    return f"{len(done)} tokens change: {clip(done)}"


def change_special_text(rng: random.Random, file: File) -> str:
    """Give a token that is looked for in every text a text that nobody looks for."""
    tokens, types = tokens_of(file), file.array(b"tokenizer.ggml.token_type")
    index, text, kind = rng.randrange(len(tokens.items)), rng.choice(STRINGS), rng.choice((2, 3, 4, 4, 5, 6))
    tokens.items[index] = text
    if types is not None and index < len(types.items):
        types.items[index] = kind
    return f"token {index} is {clip(text)}, of type {kind}"


def unique_tokens(rng: random.Random, file: File) -> str:
    """Replace tokens by others that no text has, such as the single bytes that a vocabulary falls back to."""
    tokens, share = tokens_of(file), rng.choice((0.02, 0.3, 1.0))
    for index in range(len(tokens.items)):
        if rng.random() < share:
            tokens.items[index] = rng.choice((b"u%d", b"<0x%02X>", b"\xff%d", b"a%d\0", b"<|%d|>")) % index
    return f"{share:.0%} of the tokens replaced"


def resize_vocabulary(rng: random.Random, file: File) -> str:
    tokens = tokens_of(file)
    size = rng.choice((0, 1, 2, len(tokens.items) - 1, len(tokens.items) + 1, len(tokens.items) * 2, 20_000))
    names = (
        ("tokens", "token_type", "scores") if rng.random() < 0.7 else (rng.choice(("tokens", "token_type", "scores")),)
    )
    for name in names:
        array = file.array(f"tokenizer.ggml.{name}".encode())
        if array is not None and array.items:
            more: list[int | float | bytes] = [
                b"more%d" % index if name == "tokens" else array.items[-1] for index in range(size - len(array.items))
            ]
            array.items = array.items[:size] + more
    return f"{', '.join(names)} have {size} items"


def change_token_types(rng: random.Random, file: File) -> str:
    types = file.array(b"tokenizer.ggml.token_type")
    if types is None:
        raise Inapplicable("token types")
    kind, share = rng.choice((0, 1, 2, 3, 4, 5, 6, 7, -1, 99, 2**31 - 1)), rng.choice((0.005, 0.1, 1.0))
    types.items = [kind if rng.random() < share else before for before in types.items]
    return f"{share:.1%} of the token types become {kind}"


def change_scores(rng: random.Random, file: File) -> str:
    scores = file.array(b"tokenizer.ggml.scores")
    if scores is None:
        raise Inapplicable("scores")
    score, share = rng.choice(FLOATS), rng.choice((0.005, 0.1, 1.0))
    scores.items = [score if rng.random() < share else before for before in scores.items]
    return f"{share:.1%} of the scores become {score}"


def change_merges(rng: random.Random, file: File) -> str:
    merges = file.array(b"tokenizer.ggml.merges")
    if merges is None or not merges.items:
        raise Inapplicable("merges")
    others = (
        b"",
        b" ",
        b"  ",
        b"nospace",
        b" a",
        b"a ",
        b"a b c",
        b"zz qq",
        b"\0 \0",
        b"\xff \xfe",
        b"t h",
        b"x " * 999,
    )
    for _ in range(rng.choice((1, 4, 30))):
        merges.items[rng.randrange(len(merges.items))] = rng.choice(others)
    return f"merges become {clip(merges.items)}"


SPECIAL_TOKENS = ("bos", "eos", "eot", "eom", "unknown", "padding", "seperator", "mask", "cls", "fim_pre", "fim_suf")


def change_special_token(rng: random.Random, file: File) -> str:
    name = f"tokenizer.ggml.{rng.choice(SPECIAL_TOKENS)}_token_id".encode()
    value = rng.choice((*INTEGERS, rng.randrange(300)))
    file.entries = [entry for entry in file.entries if entry.name != name]
    file.entries.append(Entry(name, rng.choice((UINT32, UINT32, INT32)), value))
    return f"{name!r} = {value}"


def change_token_flag(rng: random.Random, file: File) -> str:
    flag = rng.choice(
        ("add_bos_token", "add_eos_token", "add_sep_token", "add_space_prefix", "remove_extra_whitespaces")
    )
    name, value = f"tokenizer.ggml.{flag}".encode(), rng.choice((0, 1))
    file.entries = [entry for entry in file.entries if entry.name != name]
    file.entries.append(Entry(name, BOOL, value))
    if value and flag.endswith("_token") and rng.random() < 0.5:
        file.entries = [entry for entry in file.entries if not entry.name.endswith(b"_token_id")]
        return f"{name!r} = 1 and no special tokens"
    return f"{name!r} = {value}"


def change_vocabulary_type(rng: random.Random, file: File) -> str:
    entry = file.find(b"tokenizer.ggml.model")
    if entry is None:
        raise Inapplicable("a vocabulary")
    entry.value = rng.choice(VOCABULARIES)
    return f"a vocabulary of type {entry.value!r}"


def change_pre_tokenizer(rng: random.Random, file: File) -> str:
    entry = file.find(b"tokenizer.ggml.pre")
    if entry is None:
        raise Inapplicable("a pre-tokenizer")
    entry.value = rng.choice(PRE_TOKENIZERS)
    return f"pre-tokenizer {entry.value!r}"


def change_charsmap(rng: random.Random, file: File) -> str:
    charsmap = file.array(b"tokenizer.ggml.precompiled_charsmap")
    if charsmap is None or not charsmap.items:
        raise Inapplicable("a charsmap")
    kind = rng.randrange(3)
    if kind == 0:
        size = rng.choice((0, 1, 3, 4, 1023, 4096, len(charsmap.items) - 5, len(charsmap.items) - 4, 2**31, 2**32 - 4))
        charsmap.items[:4] = list(size.to_bytes(4, "little"))
    elif kind == 1:
        charsmap.items = charsmap.items[: rng.choice((0, 1, 3, 4, 5, 400, len(charsmap.items) - 1))]
    else:
        for _ in range(rng.choice((1, 16, 1000))):
            charsmap.items[rng.randrange(len(charsmap.items))] = rng.randrange(256)
    return f"charsmap of {len(charsmap.items)} bytes changed in way {kind}"


# Mutations that keep a model consistent


def hyperparameters(file: File) -> list[Entry]:
    return [entry for entry in file.entries if entry.name.startswith(file.architecture + b".")]


def resize_dimension(rng: random.Random, file: File) -> str:
    """Give one size another value wherever it occurs."""
    dims = any_tensor(rng, file).dims
    before = dims[choose(rng, dims, "dimensions")]
    after = rng.choice(
        (1, 2, 3, 7, 16, 31, 32, 33, 96, 1000, before - 1, before + 1, before * 2, before // 2, before * 4)
    )
    for tensor in file.tensors:
        if before in tensor.dims:
            tensor.dims = [after if size == before else size for size in tensor.dims]
            tensor.fit()
    for entry in hyperparameters(file):
        if entry.value == before:
            entry.value = after
    return f"{before} becomes {after} everywhere"


def change_heads(rng: random.Random, file: File) -> str:
    """Cut attention heads into smaller ones."""
    factor, changed = rng.choice((2, 4, 8, 16, 32)), 0
    for entry in hyperparameters(file):
        if not isinstance(entry.value, int):
            continue
        if b"head_count" in entry.name:
            entry.value, changed = entry.value * factor, changed + 1
        elif entry.name.endswith((b"rope.dimension_count", b"key_length", b"value_length", b"head_size")):
            entry.value, changed = entry.value // factor, changed + 1
    if not changed:
        raise Inapplicable("heads")
    return f"{factor} heads for each"


LAYER = re.compile(rb"blk\.(\d+)\.")


def change_layers(rng: random.Random, file: File) -> str:
    """Leave layers out, or repeat them."""
    entry = file.find(file.architecture + b".block_count")
    if entry is None or not isinstance(entry.value, int):
        raise Inapplicable("layers")
    before, after = entry.value, rng.choice((1, 3, 4, 5, 24, 33))
    layers: dict[int, list[Tensor]] = {}
    others: list[Tensor] = []
    for tensor in file.tensors:
        match = LAYER.search(tensor.name)
        (layers.setdefault(int(match[1]), []) if match else others).append(tensor)
    if not layers:
        raise Inapplicable("layers")
    numbers = sorted(layers)
    file.tensors = others + [
        Tensor(LAYER.sub(b"blk.%d." % layer, tensor.name), list(tensor.dims), tensor.kind, tensor.data)
        for layer in range(after)
        for tensor in layers[numbers[layer % len(numbers)]]
    ]
    entry.value = after
    for other in hyperparameters(file):
        if isinstance(other.value, Array) and len(other.value.items) == before:
            other.value.items = [other.value.items[layer % before] for layer in range(after)]
    return f"{after} layers instead of {before}"


# Mutations of tensors


def any_tensor(rng: random.Random, file: File) -> Tensor:
    return file.tensors[choose(rng, file.tensors, "tensors")]


def change_tensor_type(rng: random.Random, file: File) -> str:
    tensor = any_tensor(rng, file)
    tensor.kind = rng.choice((*TYPE_SIZES, *TYPE_SIZES, 4, 5, 31, 36, 38, 39, 40, 41, 42, 100, 2**31, 2**32 - 1))
    if rng.random() < 0.8:
        tensor.fit()
    return f"{tensor.name!r} is of type {tensor.kind}, {len(tensor.data)} bytes"


def change_all_types(rng: random.Random, file: File) -> str:
    kind, ends = rng.choice(list(TYPE_SIZES)), rng.choice((b"norm.weight", b".bias", b"weight", b"attn_k.weight", b""))
    for tensor in file.tensors:
        if tensor.name.endswith(ends) and math.prod(tensor.dims[:1]) % TYPE_SIZES[kind][0] == 0:
            tensor.kind = kind
            tensor.fit()
    return f"every tensor that ends with {ends!r} is of type {kind}"


def change_shape(rng: random.Random, file: File) -> str:
    tensor = any_tensor(rng, file)
    if not tensor.dims:
        raise Inapplicable("dimensions")
    before, at, kind = list(tensor.dims), rng.randrange(len(tensor.dims)), rng.randrange(6)
    if kind == 0:
        tensor.dims[at] = rng.choice(INTEGERS)
    elif kind == 1:
        tensor.dims[at] = rng.choice(
            (tensor.dims[at] * 2, tensor.dims[at] // 2, tensor.dims[at] + 1, tensor.dims[at] - 1)
        )
    elif kind == 2:
        tensor.dims.reverse()
    elif kind == 3:
        tensor.dims += [1] * rng.randrange(1, 4)
    elif kind == 4:
        tensor.dims = [math.prod(tensor.dims)]
    else:
        tensor.n_dims = rng.choice((0, 1, 2, 3, 4, 5, 2**31, 2**32 - 1))
    if rng.random() < 0.8:
        tensor.fit()
    return f"{tensor.name!r} has {tensor.dims} instead of {before}, n_dims {tensor.n_dims}, {len(tensor.data)} bytes"


def change_offset(rng: random.Random, file: File) -> str:
    tensor = any_tensor(rng, file)
    tensor.offset = rng.choice((0, 1, 4, 31, 32, 64, 4096, 2**20, 2**31, 2**32, 2**63, 2**64 - 32, 2**64 - 1))
    return f"{tensor.name!r} begins at {tensor.offset}"


def rename_tensor(rng: random.Random, file: File) -> str:
    tensor = any_tensor(rng, file)
    before = tensor.name
    others = (
        rng.choice(TENSOR_NAMES),
        any_tensor(rng, file).name,
        b"",
        b"a" * 63,
        b"a" * 64,
        b"a" * 500,
        before + b"\0x",
    )
    tensor.name = rng.choice((*others, before.replace(b"blk.0", b"blk.7"), before.replace(b"weight", b"scale")))
    return f"{before!r} is named {clip(tensor.name)}"


def delete_tensor(rng: random.Random, file: File) -> str:
    tensor = any_tensor(rng, file)
    file.tensors.remove(tensor)
    return f"{tensor.name!r} deleted"


def duplicate_tensor(rng: random.Random, file: File) -> str:
    tensor = any_tensor(rng, file)
    name = rng.choice((tensor.name, rng.choice(TENSOR_NAMES)))
    file.tensors.append(Tensor(name, list(tensor.dims), tensor.kind, tensor.data))
    return f"{tensor.name!r} again as {name!r}"


def swap_tensors(rng: random.Random, file: File) -> str:
    one, other = any_tensor(rng, file), any_tensor(rng, file)
    one.name, other.name = other.name, one.name
    return f"{one.name!r} and {other.name!r} swapped"


def change_data(rng: random.Random, file: File) -> str:
    words = {
        "NaN": 0x7FC00000,
        "inf": 0x7F800000,
        "zero": 0,
        "huge": 0x7F7FFFFF,
        "ones": 0xFFFFFFFF,
        "minus": 0xBF800000,
    }
    name = rng.choice(list(words))
    data = words[name].to_bytes(4, "little")
    tensors = file.tensors if rng.random() < 0.2 else [any_tensor(rng, file)]
    for tensor in tensors:
        if rng.random() < 0.5:
            tensor.data = (data * (len(tensor.data) // 4 + 1))[: len(tensor.data)]
        else:
            at = rng.randrange(max(1, len(tensor.data) // 4)) * 4
            tensor.data = (tensor.data[:at] + data + tensor.data[at + 4 :])[: len(tensor.data)]
    return f"{name} in {len(tensors)} tensors, such as {tensors[0].name!r}"


# Mutations of the rest


def change_header(rng: random.Random, file: File) -> str:
    kind = rng.randrange(4)
    if kind == 0:
        file.version = rng.choice((0, 1, 2, 4, 255, 0x03000000, 2**32 - 1))
        return f"version {file.version}"
    if kind == 1:
        file.n_entries = rng.choice(
            (0, 1, len(file.entries) - 1, len(file.entries) + 1, 2**31, 2**32, 2**60, 2**64 - 1)
        )
        return f"{file.n_entries} keys"
    if kind == 2:
        count = len(file.tensors)
        file.n_tensors = rng.choice((0, 1, count - 1, count + 1, 2**31, 2**32, 2**60, 2**64 - 1))
        return f"{file.n_tensors} tensors"
    file.magic = rng.choice((b"GGML", b"FUGG", b"gguf", b"PK\3\4"))
    return f"magic {file.magic!r}"


def change_alignment(rng: random.Random, file: File) -> str:
    value = rng.choice((0, 1, 2, 3, 4, 8, 16, 24, 33, 64, 128, 4096, 65536, 2**31, 2**32 - 1))
    file.entries = [entry for entry in file.entries if entry.name != b"general.alignment"]
    file.entries.insert(0, Entry(b"general.alignment", rng.choice((UINT32, UINT32, UINT32, UINT64)), value))
    if 1 <= value <= 65536 and rng.random() < 0.8:
        file.alignment = value
    return f"alignment {value}, kept: {file.alignment == value}"


def flip_bytes(rng: random.Random, file: File) -> str:
    seed, count, header = rng.randrange(2**32), rng.choice((1, 1, 2, 8, 64)), rng.random() < 0.8

    def flip(data: bytes) -> bytes:
        own, changed = random.Random(seed), bytearray(data)
        for _ in range(count):
            changed[own.randrange(min(len(data), 9000) if header else len(data))] ^= 1 << own.randrange(8)
        return bytes(changed)

    file.raw.append(flip)
    return f"{count} bits flipped, {'of the header' if header else 'anywhere'}"


def truncate(rng: random.Random, file: File) -> str:
    share, by = rng.random(), rng.choice((0, 0, 1, 4, 32))
    file.raw.append(lambda data: data[:-by] if by else data[: int(len(data) * share**2)])
    return f"cut by {by}" if by else f"cut to {share**2:.1%}"


def insert_bytes(rng: random.Random, file: File) -> str:
    share, size, kind = rng.random() ** 2, rng.choice((1, 4, 8, 32)), rng.randrange(3)

    def insert(data: bytes) -> bytes:
        at = int(len(data) * share)
        return data[:at] + (b"\0" * size if kind != 1 else b"") + data[at + (size if kind else 0) :]

    file.raw.append(insert)
    return f"{size} bytes {('inserted', 'deleted', 'zeroed')[kind]} at {share:.1%}"


KEY_MUTATIONS: tuple[Mutation, ...] = (
    *(change_value,) * 10,
    *(add_key,) * 6,
    *(change_type, make_array, delete_key, duplicate_key, rename_key, swap_keys, change_architecture),
)
CONSISTENT_MUTATIONS: tuple[Mutation, ...] = (resize_dimension, resize_dimension, change_heads, change_layers)
VOCABULARY_MUTATIONS: tuple[Mutation, ...] = (
    change_special_text,
    *(duplicate_tokens, change_tokens, unique_tokens, resize_vocabulary, change_token_types, change_scores),
    *(change_merges, change_special_token, change_token_flag, change_vocabulary_type, change_pre_tokenizer),
    *(change_charsmap,) * 2,
)
TENSOR_MUTATIONS: tuple[Mutation, ...] = (
    *(change_tensor_type, change_tensor_type, change_all_types, change_shape, change_shape, change_offset),
    *(rename_tensor, delete_tensor, duplicate_tensor, swap_tensors, change_data),
)
OTHER_MUTATIONS: tuple[Mutation, ...] = (change_header, change_alignment, flip_bytes, truncate, insert_bytes)


def mutate(rng: random.Random, file: File) -> list[str]:
    """Change a file in one to three ways; return what was done."""
    done: list[str] = []
    wanted = rng.choice((1, 1, 1, 1, 1, 2, 2, 3))
    while len(done) < wanted:
        groups = (KEY_MUTATIONS, CONSISTENT_MUTATIONS, VOCABULARY_MUTATIONS, TENSOR_MUTATIONS, OTHER_MUTATIONS)
        (group,) = rng.choices(groups, (42, 10, 20, 22, 6))
        mutation = rng.choice(group)
        try:
            done.append(f"{mutation.__name__}: {mutation(rng, file)}")
        except Inapplicable:
            continue
    return done


# Saved sequences

LEAD = struct.Struct("<16sII")
DIGEST_BYTES = 32


def mutate_saved(rng: random.Random, data: bytes) -> tuple[bytes, list[str]]:
    """Change a file of `Sequence.save` in one way, nearly always with a digest that matches."""
    magic, version, size = LEAD.unpack_from(data)
    header = json.loads(data[LEAD.size : LEAD.size + size])
    body = bytearray(data[LEAD.size + size : -DIGEST_BYTES])
    kind = rng.choice(
        ("header", "header", "words", "words", "words", "pattern", "bits", "NaN", "size", "lead", "deep", "cut")
    )
    text = ""
    if kind == "header":
        name = rng.choice(list(header))
        header[name] = rng.choice(
            (*INTEGERS, *FLOATS, "", "x", None, [], {}, True, False, 10**30, header[name], [header[name]] * 2)
        )
        if isinstance(header[name], int) and rng.random() < 0.3:
            header[name] = rng.randrange(64)
        text = f"{name} = {clip(header[name])}"
    elif kind == "words":
        for _ in range(rng.choice((1, 1, 2, 16))):
            # The counts and sizes of libllama's own format lie at the start of what it wrote.
            at = rng.randrange(max(1, min(len(body) - 8, rng.choice((64, 256, 1024, len(body)))))) // 4 * 4
            at += 4 * (header["n_tokens"] + header["n_logits"]) if rng.random() < 0.8 else 0
            at = min(at, len(body) - 8)
            body[at : at + 4] = pack(UINT32, rng.choice((*INTEGERS, rng.randrange(64))))
            text += f"word at {at} "
    elif kind == "pattern":
        words = [rng.choice((0, 1, 1, 2, 3, header["n_tokens"], 2**32 - 1)) for _ in range(rng.randrange(1, 7))]
        start = 4 * (header["n_tokens"] + header["n_logits"]) + rng.choice((0, 4, 8, 8, 12, 16, 20))
        body[start:] = b"".join(pack(UINT32, word) for word in words) * rng.choice((1, 10, 1000, 20_000))
        text = f"{words} from {start} on"
    elif kind == "bits":
        for _ in range(rng.choice((1, 8, 64))):
            body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
    elif kind == "NaN":
        word = rng.choice((b"\0\0\xc0\x7f", b"\0\x7e\0\x7e", b"\0\0\x80\x7f", b"\0\x7c\0\x7c", b"\xff\xff\xff\xff"))
        start = rng.randrange(len(body) // 4) * 4
        end = rng.choice((start + 4, len(body) // 4 * 4))
        body[start:end] = word * ((end - start) // 4)
        text = f"{word!r} from {start} to {end}"
    elif kind == "size":
        change = rng.choice((-1, -4, -64, -len(body) // 2, 1, 4, 64, 4096))
        body = body[:change] if change < 0 else body + bytes(change)
        text = f"body {change:+} bytes"
    written_header = json.dumps(header).encode()
    size = len(written_header)
    if kind == "lead":
        version, size = rng.choice(((version, rng.choice(INTEGERS) % 2**32), (rng.choice(INTEGERS) % 2**32, size)))
        text = f"version {version}, header of {size} bytes"
    elif kind == "deep":
        written_header = rng.choice((b"[" * 100_000, b'{"a":' * 50_000, b"1" * 5000, b"\xff", b"", b"null", b"[1]"))
        size = len(written_header)
    content = LEAD.pack(magic, version, size) + written_header + bytes(body)
    digest = hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()
    if kind == "cut":
        cut = rng.randrange(len(content))
        return (content + digest)[:cut], [f"cut to {cut} bytes"]
    return content + digest, [f"{kind}: {text}"]
