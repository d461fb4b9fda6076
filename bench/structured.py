"""What structured output costs and saves: `python bench/structured.py masks | speed | record | server ...`.

    masks VOCABULARY.gguf     the time of a mask, and of libllama's grammar over the whole vocabulary
    speed MODEL.gguf          constrained decoding against free decoding, the same number of sampled tokens
    record MODEL.gguf         a record of 20 fields: forced tokens in one batch, against token by token
    server MODEL.gguf --llama-server PATH [--llama-cpp-python PYTHON]
                              the same against llama-server with `json_schema`, and llama-cpp-python's grammar

Ratios are the medians of pairs measured in turns, with the smallest and the largest in brackets.
"""

import argparse
import json
import random
import re
import statistics
import subprocess
import time
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import minerva_native as mn
from minerva_native._binding import ffi, lib
from minerva_native.structured import Matcher
from upstream import llama_server

JSON = (
    'root ::= object\nobject ::= "{" (pair (", " pair)*)? "}"\npair ::= string ": " value\n'
    'value ::= object | array | string | number | "true" | "false" | "null"\narray ::= "[" (value (", " value)*)? "]"\n'
    'number ::= "-"? [0-9]+ ("." [0-9]+)?\nstring ::= "\\"" char* "\\""\n'
    'char ::= [^"\\\\\\x00-\\x1f] | "\\\\" ["\\\\/bfnrt]'
)
LIST = {"type": "array", "items": {"type": "string"}, "minItems": 1000}
WORDS = ["customer", "description", "quantity", "available", "größe", "Kierkegaard", "42 Main Street", "日本語", "a"]
NAMES = (
    "first_name last_name street city country postal_code phone_number email_address occupation employer department "
    "nationality favourite_colour favourite_food marital_status blood_type native_language preferred_currency "
    "time_zone membership_level"
)
ENTRY = np.dtype([("id", "i4"), ("logit", "f4"), ("p", "f4")])


class TokenByToken(Matcher):
    """A matcher that leaves every token to the sampler."""

    def forced(self) -> int | None:
        return None


MIXED = {
    "age": {"type": "integer", "minimum": 0, "maximum": 150},
    "married": {"type": "boolean"},
    "native_language": {"enum": ["English", "Danish", "Thai", "Japanese"]},
    "membership_level": {"enum": ["bronze", "silver", "gold"]},
    "number_of_children": {"type": "integer", "minimum": 0, "maximum": 20},
    "has_driving_licence": {"type": "boolean"},
    "height_in_centimetres": {"type": "integer", "minimum": 30, "maximum": 272},
    "newsletter_subscribed": {"type": "boolean"},
    "preferred_currency": {"enum": ["EUR", "USD", "DKK", "THB", "JPY"]},
    "date_of_birth": {"type": "string", "format": "date"},
}


def mixed_record() -> dict[str, Any]:
    """Return the schema of a record of 20 fields: strings, and as many numbers, flags, dates and choices."""
    properties = {**record(10)["properties"], **MIXED}
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def record(n: int) -> dict[str, Any]:
    """Return the schema of a record of short strings."""
    names = NAMES.split()
    properties = {name: {"type": "string", "maxLength": 10} for name in names[:n]}
    return {"type": "object", "properties": properties, "required": names[:n], "additionalProperties": False}


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def in_turns(one: Callable[[], float], other: Callable[[], float], pairs: int) -> list[float]:
    """Return one time divided by the other, of each pair."""
    ratios = []
    for at in range(pairs + 1):
        first, second = (one(), other()) if at % 2 else (other(), one())[::-1]
        if at:  # the first pair warms up
            ratios.append(first / second)
    return ratios


# Masks


def random_value(generator: random.Random, depth: int = 3) -> Any:
    kind = generator.randrange(6 if depth else 4)
    if kind == 0:
        return generator.randrange(-(10**6), 10**6)
    if kind == 1:
        return round(generator.uniform(-100, 100), 3)
    if kind == 2:
        return generator.choice([True, False, None])
    if kind == 3:
        return " ".join(generator.choices(WORDS, k=generator.randrange(1, 6)))
    if kind == 4:
        return [random_value(generator, depth - 1) for _ in range(generator.randrange(4))]
    return {generator.choice(WORDS): random_value(generator, depth - 1) for _ in range(generator.randrange(1, 5))}


def schema_of(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return {"type": "object", "properties": {k: schema_of(v) for k, v in value.items()}, "required": list(value)}
    if isinstance(value, list):
        return {"type": "array", "items": {"anyOf": [schema_of(v) for v in value] or [{"type": "null"}]}}
    names = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
    return {"type": names[type(value)]}


def masks(arguments: argparse.Namespace) -> None:
    model = mn.Model.load(arguments.model, vocab_only=True)
    tokenizer = model.tokenizer
    before = time.perf_counter()
    mn.Constraint.choice(["a"]).matcher(tokenizer)
    print(f"vocabulary of {tokenizer.n_vocab:,}: made in {time.perf_counter() - before:.2f} s, once a model")
    generator = random.Random(1)
    values = [{word: random_value(generator) for word in WORDS[:5]} for _ in range(30)]
    times: dict[str, list[float]] = {"JSON schema": [], "GBNF of JSON": []}
    for value in values:
        ids = tokenizer.encode(json.dumps(value, ensure_ascii=False), add_special=False)
        for name, constraint in (
            ("JSON schema", mn.Constraint.json_schema(schema_of(value))),
            ("GBNF of JSON", mn.Constraint.gbnf(JSON)),
        ):
            matcher = constraint.matcher(tokenizer)
            for token in ids:
                before = time.perf_counter()
                matcher.mask()
                times[name].append(time.perf_counter() - before)
                matcher.consume(token)
    for name, found in times.items():
        p50, p99 = np.percentile(found, [50, 99]) * 1e6
        print(f"{name}: mask p50 {p50:.1f} us, p99 {p99:.1f} us, largest {max(found) * 1e6:.0f} us, of {len(found):,}")
    ratios, theirs = [], []
    for value in values[:3]:
        ids = tokenizer.encode(json.dumps(value, ensure_ascii=False), add_special=False)[:60]
        matcher = mn.Constraint.gbnf(JSON).matcher(tokenizer)
        with model.raw() as pointer:
            vocab = lib.llama_model_get_vocab(pointer)
        sampler = lib.llama_sampler_init_grammar(vocab, JSON.encode(), b"root")
        entries = np.zeros(tokenizer.n_vocab, ENTRY)
        array = ffi.new("llama_token_data_array *")
        for token in ids:
            entries["id"], entries["logit"] = np.arange(tokenizer.n_vocab), 0.0
            array.data = ffi.cast("llama_token_data *", entries.ctypes.data)
            array.size, array.selected, array.sorted = tokenizer.n_vocab, -1, False
            before = time.perf_counter()
            lib.llama_sampler_apply(sampler, array)
            theirs.append(time.perf_counter() - before)
            before = time.perf_counter()
            matcher.mask()
            ratios.append(theirs[-1] / (time.perf_counter() - before))
            matcher.consume(token)
            lib.llama_sampler_accept(sampler, token)
        lib.llama_sampler_free(sampler)
    print(f"libllama's grammar over the whole vocabulary: p50 {statistics.median(theirs) * 1e3:.2f} ms")
    print(f"libllama's time over ours, the same grammar and place: {spread(ratios)}")


# Speed


def timed(sequence: mn.Sequence, prompt: list[int], n: int, guide: Matcher | None) -> float:
    """Return the seconds that so many sampled tokens take, without the prompt."""
    sequence.assign(prompt)
    _ = sequence.logits
    bias = {
        token: -float("inf") for token in range(sequence.context.model.tokenizer.n_vocab) if is_end(sequence, token)
    }
    sampler = mn.Sampler(mn.SamplingParams(temperature=0.8, seed=1, logit_bias=bias))
    n_sampled, before = 0, time.perf_counter()
    for step in mn.generate(sequence, sampler, constraint=guide):
        n_sampled += not step.is_forced
        if n_sampled == n:
            break
    return time.perf_counter() - before


def is_end(sequence: mn.Sequence, token: int) -> bool:
    return sequence.context.model.tokenizer.is_end(token)


def speed(arguments: argparse.Namespace) -> None:
    constraint = mn.Constraint.json_schema(LIST)
    with mn.Model.load(arguments.model) as model:
        prompt = model.tokenizer.encode("A list of fruits in JSON:\n")
        for n_threads in arguments.threads:
            with model.context(n_ctx=1024, n_threads=n_threads) as context, context.sequence() as sequence:
                for name, in_thread in (("on the calling thread", False), ("in a thread", True)):

                    def constrained(in_thread: bool = in_thread, sequence: mn.Sequence = sequence) -> float:
                        guide = constraint.matcher(model.tokenizer, in_thread=in_thread)
                        guide.__class__ = TokenByToken
                        return timed(sequence, prompt, 64, guide)

                    def free(sequence: mn.Sequence = sequence) -> float:
                        return timed(sequence, prompt, 64, None)

                    ratios = in_turns(free, constrained, arguments.pairs)
                    print(f"{n_threads} threads, mask {name}: constrained speed over free {spread(ratios)}")


def record_of_twenty(arguments: argparse.Namespace) -> None:
    n_threads = arguments.threads[-1]
    with mn.Model.load(arguments.model) as model, model.context(n_ctx=2048, n_threads=n_threads) as context:
        prompt = model.tokenizer.encode("A person as JSON:\n")
        sequence = context.sequence()
        for name, schema in (("20 fields", mixed_record()), ("20 strings", record(20))):
            constraint = mn.Constraint.json_schema(schema)
            steps: list[mn.Step] = []

            def take(kind: type[Matcher], constraint: mn.Constraint = constraint) -> float:
                nonlocal steps
                sequence.assign(prompt)
                _ = sequence.logits
                guide = constraint.matcher(model.tokenizer)
                guide.__class__ = kind
                before = time.perf_counter()
                made = list(mn.generate(sequence, mn.SamplingParams.greedy(), constraint=guide))
                seconds = time.perf_counter() - before
                assert made[-1].finish_reason == "end"
                steps = made if kind is Matcher else steps
                return seconds

            ratios = in_turns(partial(take, Matcher), partial(take, TokenByToken), arguments.pairs)
            n_forced = sum(step.is_forced for step in steps)
            print(f"{name}, {len(steps)} tokens, {n_forced} of them forced: time over token by token {spread(ratios)}")


# Others

PEER = """
import json, sys, time
import llama_cpp
model, schema, n_threads, n_free, prompt = json.loads(sys.argv[1])
llm = llama_cpp.Llama(model, n_ctx=2048, n_threads=n_threads, n_threads_batch=n_threads, verbose=False)
grammar = llama_cpp.LlamaGrammar.from_json_schema(json.dumps(schema), verbose=False)
for line in sys.stdin:
    kind = line.strip()
    llm.reset()
    llm.create_completion(prompt, max_tokens=1, temperature=0)
    before = time.perf_counter()
    options = {"grammar": grammar, "max_tokens": 1000} if kind == "record" else {"max_tokens": n_free}
    bias = None if kind == "record" else {llm.token_eos(): -100.0}
    done = llm.create_completion(prompt, temperature=0, logit_bias=bias, **options)
    seconds = time.perf_counter() - before
    print(json.dumps([seconds, done["usage"]["completion_tokens"], done["choices"][0]["text"]]), flush=True)
"""


def server(arguments: argparse.Namespace) -> None:
    schema, n_free, prompt_text = record(12), 96, "A person as JSON:\n"
    n_threads = arguments.threads[-1]
    model = mn.Model.load(arguments.model)
    context = model.context(n_ctx=2048, n_threads=n_threads)
    sequence, tokenizer = context.sequence(), model.tokenizer
    prompt = tokenizer.encode(prompt_text)
    constraint = mn.Constraint.json_schema(schema)
    results: dict[str, list[tuple[float, int]]] = {}

    def ours(kind: str) -> tuple[float, int]:
        sequence.assign(prompt)
        _ = sequence.logits
        before = time.perf_counter()
        if kind == "record":
            guide = constraint.matcher(tokenizer)
            steps = list(mn.generate(sequence, mn.SamplingParams.greedy(), constraint=guide))
            assert steps[-1].finish_reason == "end"
        else:
            bias = {token: -float("inf") for token in range(tokenizer.n_vocab) if tokenizer.is_end(token)}
            params = mn.SamplingParams(temperature=0.0, logit_bias=bias)
            before = time.perf_counter()
            steps = list(mn.generate(sequence, params, max_tokens=n_free))
        return time.perf_counter() - before, len(steps)

    with llama_server(arguments.llama_server, arguments.model, n_threads, "-c", "2048", "-np", "1") as address:

        def ask(request: dict[str, Any]) -> Any:
            data = json.dumps(request).encode()
            with urllib.request.urlopen(f"http://{address}/completion", data, timeout=300) as answer:
                return json.load(answer)

        def theirs(kind: str) -> tuple[float, int]:
            request = {"prompt": prompt_text, "temperature": 0, "cache_prompt": True}
            ask({**request, "n_predict": 1})
            request |= {"json_schema": schema, "n_predict": 1000} if kind == "record" else {"n_predict": n_free}
            request |= {} if kind == "record" else {"ignore_eos": True}
            before = time.perf_counter()
            done = ask(request)
            seconds = time.perf_counter() - before
            if kind == "record":
                assert len(json.loads(done["content"])) == 12, done["content"]
            return seconds, done["tokens_predicted"]

        ways: dict[str, Callable[[str], tuple[float, int]]] = {"minerva": ours, "llama-server": theirs}
        peer = None
        if arguments.llama_cpp_python:
            options = json.dumps([arguments.model, schema, n_threads, n_free, prompt_text])
            peer = subprocess.Popen(
                [arguments.llama_cpp_python, "-c", PEER, options],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )

            def by_peer(kind: str) -> tuple[float, int]:
                assert peer is not None
                assert peer.stdin is not None
                assert peer.stdout is not None
                peer.stdin.write(kind + "\n")
                peer.stdin.flush()
                seconds, n, _ = json.loads(peer.stdout.readline())
                return seconds, n

            ways["llama-cpp-python"] = by_peer
        for at in range(arguments.pairs + 1):
            for kind in ("free", "record"):
                for name, way in ways.items():
                    measured = way(kind)
                    if at:
                        results.setdefault(f"{name} {kind}", []).append(measured)
        if peer is not None:
            peer.terminate()
            peer.wait(20)
    mine = results["minerva record"]
    for name in ways:
        free, constrained = results[f"{name} free"], results[f"{name} record"]
        kept = [(c[1] / c[0]) / (f[1] / f[0]) for c, f in zip(constrained, free, strict=True)]
        seconds, n = statistics.median(c[0] for c in constrained), constrained[0][1]
        print(f"{name}: {statistics.median(f[1] / f[0] for f in free):.1f} t/s free")
        print(f"  a record of {n} tokens in {seconds:.3f} s, t/s over free {spread(kept)}")
        if name != "minerva":
            ratios = [c[0] / m[0] for c, m in zip(constrained, mine, strict=True)]
            print(f"  its time for the record over ours {spread(ratios)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["masks", "speed", "record", "server"])
    parser.add_argument("model")
    parser.add_argument("--threads", type=lambda text: [int(part) for part in re.split(",", text)], default=[2])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--llama-server", default="llama-server")
    parser.add_argument("--llama-cpp-python")
    arguments = parser.parse_args()
    arguments.model = str(Path(arguments.model))
    {"masks": masks, "speed": speed, "record": record_of_twenty, "server": server}[arguments.what](arguments)


if __name__ == "__main__":
    main()
