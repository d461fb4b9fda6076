"""Continue a prompt, streaming the text."""

import argparse
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import minerva_native as mn

from .messages import as_json, placed, printable, say, write
from .options import (
    CONTEXT_FLAGS,
    LOADING_FLAGS,
    SAMPLING_FLAGS,
    add_constraint,
    add_context,
    add_json,
    add_loading,
    add_model,
    add_sampling,
    add_text,
    constraint,
    load_model,
    of_batches,
    of_context,
    read_text,
    sampling,
    unescaped,
    utf8,
)
from .progress import prefilling

DEFAULT_N_CTX = 4096

FLAGS = {
    "n_ctx": "-c",
    "max_tokens": "-n",
    "n_batch": "-b",
    "n_ubatch": "-ub",
    "n_threads": "-t",
    "n_keep": "--keep",
    "kv_type": "-ctk, -ctv",
    "flash_attention": "-fa",
    "gpu_layers": "-ngl",
    "swa_full": "--swa-full",
    "stop": "--stop",
    **LOADING_FLAGS,
    **CONTEXT_FLAGS,
    **SAMPLING_FLAGS,
}
"""The options for what errors name otherwise."""

TEMPLATE = "tokenizer.chat_template"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add_model(parser)
    add_text(parser)
    add(
        "-n",
        "--predict",
        type=limit,
        default=256,
        metavar="N",
        help="generate at most N tokens; -1 for no limit but the context (256)",
    )
    size = "context in tokens; 0 for the model's own (default: the model's, up to 4096)"
    add("-c", "--ctx-size", type=int, metavar="N", help=size)
    add("-b", "--batch-size", type=int, default=512, metavar="N", help="prompt tokens in one call (default 512)")
    add("-ub", "--ubatch-size", type=int, default=512, metavar="N", help="prompt tokens in one pass (default 512)")
    add(
        "-t",
        "--threads",
        type=int,
        metavar="N",
        help="threads (default: the usable CPUs; 1 for a tiny model)",
    )
    types = f"type of the cached keys: {', '.join(mn.KV_TYPES)} (f16)"
    add("-ctk", "--cache-type-k", default="f16", choices=mn.KV_TYPES, metavar="TYPE", help=types)
    types = "type of the cached values (f16)"
    add("-ctv", "--cache-type-v", default="f16", choices=mn.KV_TYPES, metavar="TYPE", help=types)
    add("-fa", "--flash-attn", default="auto", choices=("on", "off", "auto"), help="flash attention (auto)")
    add_loading(parser)
    add_context(parser)
    add("--swa-full", action="store_true", help="keep all tokens in sliding-window layers, not just the window")
    add("--context-shift", action="store_true", help="if the context is full, discard the older half and go on")
    add("--keep", type=int, default=4, metavar="N", help="tokens at the start that are never discarded (4)")
    add_sampling(parser)
    add_constraint(parser)
    add("--stop", action="append", type=utf8, default=[], metavar="TEXT", help="stop before this text; can be repeated")
    add("--ignore-eos", action="store_true", help="never choose a token that ends the generation")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Generate; the exit status is 130 if Ctrl-C interrupted it."""
    clock = Clock()
    stop = [unescaped(text, "--stop") for text in options.stop] if options.escape else options.stop
    shape = constraint(options)
    how: dict[str, Any] = {
        **of_batches(options),
        "swa_full": options.swa_full or options.context_shift,
        "on_full": "shift" if options.context_shift else "error",
        "n_keep": options.keep,
        **of_context(options),
    }
    planned = mn.ContextOptions(n_ctx=DEFAULT_N_CTX if options.ctx_size is None else options.ctx_size, **how)
    with load_model(options, context=planned) as model:
        given = sampling(options) | ({"logit_bias": end_biases(model)} if options.ignore_eos else {})
        sampler = mn.Sampler(mn.SamplingParams.from_model(model, **given))
        n_ctx = min(DEFAULT_N_CTX, model.n_ctx_train) if options.ctx_size is None else options.ctx_size
        with model.context(n_ctx=n_ctx or model.n_ctx_train, **how) as context:
            clock.loaded()
            if not options.quiet and (where := placed(context)):
                say("placement", where)
            prompt, shown = choose_prompt(options, model)
            ids = model.tokenizer.encode(prompt, parse_special=options.parse_special)
            if model.has_encoder:
                ids = [context.encode(ids)]
            sequence = context.sequence()
            lacks_template = not shown and is_bare(prompt, options, model)
            text, finish_reason = [], "length"
            try:
                with prefilling(options.quiet) as on_progress:
                    clock.prefill(sequence, ids, on_progress)
                for step in mn.generate(sequence, sampler, max_tokens=options.predict, stop=stop, constraint=shape):
                    clock.tick()
                    if clock.n_tokens == 1 and not options.quiet:
                        hint(step, lacks_template, model)
                    text.append(step.text)
                    if not options.json:
                        write(shown + step.text)
                        sys.stdout.flush()
                        shown = ""
                    finish_reason = step.finish_reason or finish_reason
            except KeyboardInterrupt:
                finish_reason = "cancelled"
            context_full = finish_reason == "length" and clock.n_tokens != options.predict
            match finish_reason:
                case "end" if not model.tokenizer.is_end(sequence[-1]):
                    why = "complete"
                case "end":
                    why = f"end token {name_of(sequence[-1], model)}"
                case "length":
                    why = f"context full (-c {context.n_ctx})" if context_full else f"-n {options.predict}"
                case "stop":
                    why = "--stop"
                case _:
                    why = "Ctrl-C"
    if options.json:
        result = {
            "model": str(model.path),
            "prompt": prompt,
            "text": "".join(text),
            "finish_reason": finish_reason,
            "context_full": context_full,
            "seed": sampler.seed,
            **clock.figures(),
        }
        print(as_json(result))
    else:
        print(flush=True)
        if not options.quiet:
            print(f"{clock.line()} | stopped: {why} | seed {sampler.seed}", file=sys.stderr)
    return 130 if finish_reason == "cancelled" else 0


def limit(text: str) -> int | None:
    """Parse `-n`; -1 is None, no limit."""
    try:
        n = int(text)
    except ValueError:
        n = -2
    if n < -1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens, or -1 for no limit but the context")
    return None if n == -1 else n


def end_biases(model: mn.Model) -> dict[int, float]:
    """Return a bias that bans every token that ends the generation."""
    return dict.fromkeys(filter(model.tokenizer.is_end, range(model.tokenizer.n_vocab)), -math.inf)


def choose_prompt(options: argparse.Namespace, model: mn.Model) -> tuple[str, str]:
    """Return the prompt, and the part of it to print: all of the built-in one, because nobody has typed it."""
    prompt = read_text(options)
    if prompt:
        return prompt, ""
    prompt = str(model.metadata.get("minerva.prompt", "")) if options.prompt is None and options.file is None else ""
    if not prompt:
        raise ValueError("the prompt is empty: give one with -p, -f or on standard input")
    return prompt, prompt


def is_bare(prompt: str, options: argparse.Namespace, model: mn.Model) -> bool:
    """Return whether an instruct model gets a prompt without its chat template, and without the template's tokens."""
    template = model.metadata.get(TEMPLATE)
    if options.model is None or options.parse_special or not isinstance(template, str):
        return False
    tokenizer = model.tokenizer
    return not any(
        token.text in prompt
        for token in tokenizer.special_tokens
        if tokenizer.is_control(token.id) and (token.text in template or token.id in (tokenizer.bos, tokenizer.eos))
    )


def hint(first: mn.Step, lacks_template: bool, model: mn.Model) -> None:
    """Say, in one line, if the first token ends the text, and if the prompt lacks the template."""
    if first.finish_reason == "end":
        why = ": its prompt has no chat template, which `minerva chat` applies" if lacks_template else ""
        say("note", f"the model ended the text at once, with its end token {name_of(first.token, model)}{why}")
    elif lacks_template:
        say("note", "the prompt goes to this instruct model as it is: `minerva chat` applies its chat template")


def name_of(token: int, model: mn.Model) -> str:
    """Return the name of a token, as people may see it."""
    return printable(model.tokenizer.piece(token, special=True).decode(errors="replace"))


class Clock:
    """When things happened in one generation."""

    def __init__(self) -> None:
        self.created = self.start = self.first = self.last = self.prefill_end = time.perf_counter()
        self.n_prompt = self.n_tokens = 0
        self.load_seconds = 0.0

    def loaded(self) -> None:
        """Note that model and context are ready."""
        self.load_seconds = time.perf_counter() - self.created

    def prefill(self, sequence: mn.Sequence, ids: list[int], on_progress: Callable[[int, int], object]) -> None:
        """Evaluate the prompt and time it."""
        self.n_prompt = len(ids)
        self.start = time.perf_counter()
        sequence.extend(ids, on_progress)
        self.prefill_end = self.last = time.perf_counter()

    def tick(self) -> None:
        """Note that a token was generated."""
        self.last = time.perf_counter()
        if not self.n_tokens:
            self.first = self.last
        self.n_tokens += 1

    def figures(self) -> dict[str, Any]:
        """Return rates in tokens per second and times in seconds; None if nothing was measured."""
        prompt, rest = self.prefill_end - self.start, self.last - self.first
        return {
            "n_prompt": self.n_prompt,
            "n_gen": self.n_tokens,
            "load_seconds": self.load_seconds,
            "time_to_first_token_seconds": self.first - self.start if self.n_tokens else None,
            "prompt_tokens_per_second": self.n_prompt / prompt if prompt > 0 else None,
            "generated_tokens_per_second": (self.n_tokens - 1) / rest if self.n_tokens > 1 else None,
        }

    def line(self) -> str:
        """Return the same as a line for people."""
        figures = self.figures()

        def show(name: str, scale: float, unit: str) -> str:
            return "-" if figures[name] is None else f"{figures[name] * scale:,.1f} {unit}"

        return (
            f"prompt: {self.n_prompt} tokens, {show('prompt_tokens_per_second', 1, 'tokens/s')} | "
            f"generated: {self.n_tokens} tokens, {show('generated_tokens_per_second', 1, 'tokens/s')} | "
            f"first token after {show('time_to_first_token_seconds', 1000, 'ms')} | "
            f"load {show('load_seconds', 1000, 'ms')}"
        )
