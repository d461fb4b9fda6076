"""What is done with every mutant: all that a program does with a model, with arguments that are right."""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

import minerva_native as mn

from . import bases

Report = Callable[[str], object]  # called with the name of each step before it

TEXTS = (
    "",
    "a",
    "The llama sings. 🦙\n",
    " \n\n \t\r\n  ",
    "a\0b",
    "AAA <s>x</s><|im_end|>[CLS]<0x0A>",
    "ภาษาไทยไม่มีช่องว่าง नमस्ते e\u0301",
    "1234567890 'tis they'll!!! http://a.b/c?d=e",
    "and then the thing " * 100,
)
RESTORE_ERRORS = (mn.StateError, mn.ContextFullError)


def ids(model: mn.Model, count: int) -> list[int]:
    """Return token ids that do not depend on what the vocabulary says."""
    return [(7 * index + 5) % model.tokenizer.n_vocab for index in range(count)]


class Way(NamedTuple):
    """How a file is opened, and with how many threads its model computes the second time."""

    mmap: bool
    check: bool
    n_threads: int


class Bystander:
    """A healthy model beside the mutant, which must not notice it."""

    def __init__(self, path: Path):
        self.model = mn.Model.load(path, gpu_layers=0)
        self.context = self.model.context(n_ctx=bases.N_CTX, n_threads=1)
        self.sequence = self.context.sequence()
        self.sequence.extend(bases.IDS)
        self.expected = self.sequence.logits

    def check(self) -> None:
        """Raise an `AssertionError` unless the same model computes the same."""
        self.sequence.rewind(2)
        self.sequence.extend(bases.IDS[-2:])
        here = self.sequence.logits
        assert np.allclose(here, self.expected, rtol=1e-3, atol=1e-3), "another model computes something else now"
        with self.model.context(n_ctx=bases.N_CTX, n_threads=2) as other, other.sequence() as sequence:
            sequence.extend(bases.IDS[:1])
            assert np.isfinite(sequence.logits).all(), "a new context computes no numbers"


def use_model(path: Path, how: Way, at: Report) -> None:
    """Take a file through everything; raise the first error that is no surprise, and any other at once."""
    errors: list[mn.MinervaError] = []
    for step, use in ("load", use_weights), ("load the vocabulary", use_vocabulary):
        at(step)
        try:
            use(path, how, at)
        except mn.MinervaError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def use_vocabulary(path: Path, how: Way, at: Report) -> None:
    with mn.Model.load(path, vocab_only=True, check=how.check) as model:
        describe(model)
        use_tokenizer(model.tokenizer, at)


def use_weights(path: Path, how: Way, at: Report) -> None:
    errors: list[mn.MinervaError] = []
    file = mn.GGUF(path)
    has_head = any(".nextn." in tensor.name for tensor in file.tensors)
    file.close()
    with mn.Model.load(path, gpu_layers=0, mmap=how.mmap, check=how.check, load_mtp=has_head) as model:
        at("describe")
        describe(model)
        use_tokenizer(model.tokenizer, at)
        if not model.tokenizer.n_vocab:
            return
        for n_threads in 1, how.n_threads:
            at(f"context of {n_threads} threads")
            try:
                with model.context(
                    n_ctx=bases.N_CTX, n_batch=16, n_seq=3, n_threads=n_threads, mtp=has_head
                ) as context:
                    use_context(context, path.with_suffix(".saved"), at)
            except mn.MinervaError as error:
                errors.append(error)
        at("close")
    if errors:
        raise errors[0]


def describe(model: mn.Model) -> None:
    dict(model.metadata)
    repr(model)
    _ = (model.description, model.file_type, model.n_params, model.size_bytes, model.n_ctx_train, model.n_embd)
    file = mn.GGUF(model.path)
    _ = file.tensors
    file.close()


def use_tokenizer(tokenizer: mn.Tokenizer, at: Report) -> None:
    at("tokenize")
    for text in TEXTS:
        for add_special, parse_special in ((False, False), (True, True)):
            try:
                encoded = tokenizer.encode(text, add_special, parse_special)
                tokenizer.decode(encoded, special=add_special)
            except mn.TokenizerError:
                pass  # a part of the text has no token, which is no reason to stop
    at("detokenize")
    if tokenizer.type == "none":
        return
    stream = tokenizer.stream(special=True)
    for token in range(0, tokenizer.n_vocab, 1 + tokenizer.n_vocab // 400):
        tokenizer.piece(token)
        tokenizer.is_end(token)
        stream.feed(token)
    stream.flush()


def use_context(context: mn.Context, saved: Path, at: Report) -> None:
    """Compute, and if that fails, see that the context still answers."""
    try:
        # Threads wait for each other, on a busy machine for long: with several, as little as possible.
        compute(context, at) if context.n_threads > 1 else compute_all(context, saved, at)
    except mn.MinervaError:
        at("after an error")
        with contextlib.suppress(mn.MinervaError), context.sequence() as sequence:
            sequence.extend([0])
            _ = sequence.logits
        with contextlib.suppress(mn.MinervaError):
            context.clear_cache()
        raise


def compute(context: mn.Context, at: Report) -> None:
    prompt = read_text(context, 3, at)
    with context.sequence() as sequence:
        at("prefill with threads")
        sequence.extend(prompt[:2])
        at("decode with threads")
        sequence.append(prompt[2])
        _ = sequence.logits


def read_text(context: mn.Context, count: int, at: Report) -> list[int]:
    """Return token ids to begin with; an encoder has read them."""
    prompt = ids(context.model, count)
    if context.model.has_encoder:
        at("encode")
        prompt[0] = context.encode(prompt)
    return prompt


def compute_all(context: mn.Context, saved: Path, at: Report) -> None:
    prompt = read_text(context, 16, at)
    with context.sequence() as sequence:
        at("prefill")
        sequence.extend([*prompt, *prompt[:4]])
        _ = sequence.logits
        at("decode")
        for token in prompt[:3]:
            sequence.append(token)
            _ = sequence.logits
        at("fork")
        with sequence.fork(10) as fork:
            fork.extend(prompt[5:8])
            _ = fork.logits
        at("truncate")
        sequence.truncate(12)
        sequence.extend(prompt[:2])
        _ = sequence.logits
        at("generate")
        params = mn.SamplingParams(temperature=0.8, seed=1)
        speculation = mn.Speculation("mtp", math.inf) if context.options.mtp else None
        with contextlib.suppress(mn.SamplingError):  # weights that are no numbers
            for _ in mn.generate(sequence, params, max_tokens=3, speculate=speculation):
                pass
        at("save")
        sequence.save(saved)
        at("restore")
        with context.restore(saved) as restored:
            restored.append(prompt[3])
            _ = restored.logits


def use_saved(base: bases.Base, model_path: Path, saved: Path, at: Report) -> str:
    """Restore a mutant of a saved sequence beside another sequence; return what came of it."""
    at("load")
    with (
        mn.Model.load(model_path, gpu_layers=0) as model,
        bases.context(model, base.kv_type) as context,
        context.sequence() as other,
    ):
        other.extend(bases.IDS[:9])
        expected = other.logits

        def check(when: str) -> None:
            at(f"another sequence {when}")
            other.rewind(1)
            other.append(bases.IDS[8])
            assert np.allclose(other.logits, expected, rtol=1e-3, atol=1e-3), f"another sequence's logits differ {when}"

        at("restore")
        try:
            with context.restore(saved) as sequence:
                check("beside what is restored")
                at("continue")
                sequence.append(bases.IDS[0])
                _ = sequence.logits
                outcome = "restores"
        except RESTORE_ERRORS as error:
            outcome = type(error).__name__
        check("afterwards")
        at("close")
    return outcome
