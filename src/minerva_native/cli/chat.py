"""Talk with a model, in a terminal or line by line."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import minerva_native as mn

from .answers import Answer, InAFile, Log, OnATerminal
from .editing import History, line_editor, without_echo
from .generate import DEFAULT_N_CTX, FLAGS, end_biases, limit
from .messages import as_json, placed, say
from .options import (
    LLM_N_SEQ,
    add_constraint,
    add_json,
    add_model,
    add_overrides,
    add_sampling,
    constraint,
    file_name,
    load_model,
    of_batches,
    sampling,
    utf8,
)
from .session import Session, completions, ctrl_c

__all__ = ["FLAGS"]

_MAX_LINE_BYTES = 1 << 24

_CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add_model(parser)
    add("-sys", "--system-prompt", type=utf8, metavar="TEXT", help="the system prompt")
    add("-p", "--prompt", type=utf8, metavar="TEXT", help="the first message")
    add("-st", "--single-turn", action="store_true", help="answer one message and leave")
    template = parser.add_mutually_exclusive_group()
    text = "a chat template in the language of Jinja, or chatml; by default the model's own"
    template.add_argument("--chat-template", type=utf8, metavar="TEXT", help=text)
    template.add_argument("--chat-template-file", type=file_name, metavar="FILE", help="a chat template in a file")
    variables = "other variables of the template, such as '{\"enable_thinking\": false}'"
    add("--chat-template-kwargs", type=json_object, default={}, metavar="JSON", help=variables)
    budget = "tokens of reasoning before its end is forced; 0 for none, -1 for no limit (default)"
    add("--reasoning-budget", type=limit, metavar="N", help=budget)
    full = "what happens when the context is full: the oldest turns go, or an error (drop_turns)"
    add("--on-full", default="drop_turns", choices=("drop_turns", "error"), help=full)
    answer = "tokens of an answer at most; -1 for no limit but the context (default)"
    add("-n", "--predict", type=limit, metavar="N", help=answer)
    size = "context in tokens; 0 for the model's own (default: the model's, up to 4096)"
    add("-c", "--ctx-size", type=int, metavar="N", help=size)
    add("-b", "--batch-size", type=int, default=512, metavar="N", help="prompt tokens in one call (default 512)")
    add("-t", "--threads", type=int, metavar="N", help="threads (default: the usable CPUs; 1 for a tiny model)")
    types = "f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0 or iq4_nl"
    add("-ctk", "--cache-type-k", default="f16", metavar="TYPE", help=f"type of the cached keys: {types} (f16)")
    add("-ctv", "--cache-type-v", default="f16", metavar="TYPE", help="type of the cached values (f16)")
    add("-fa", "--flash-attn", default="auto", choices=("on", "off", "auto"), help="flash attention (auto)")
    add("--swa-full", action="store_true", help="keep all tokens in sliding-window layers, not just the window")
    add_overrides(parser)
    add_sampling(parser)
    add_constraint(parser)
    add("--stop", action="append", type=utf8, default=[], metavar="TEXT", help="stop before this text; can be repeated")
    add("--ignore-eos", action="store_true", help="never choose a token that ends the answer")
    add("--timings", action="store_true", help="show counts and times after each answer")
    add("--history", type=file_name, metavar="FILE", help="keep what is typed in a file; by default nothing is kept")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Talk; the exit status is 130 if Ctrl-C stopped an answer that does not go to a terminal."""
    is_interactive = sys.stdin.isatty() and sys.stdout.isatty() and not options.json
    if options.prompt == "":
        raise ValueError("the first message (-p) is empty")
    planned = mn.ContextOptions(
        n_ctx=DEFAULT_N_CTX if options.ctx_size is None else options.ctx_size,
        n_seq=LLM_N_SEQ,
        **of_batches(options),
    )
    with load_model(options, context=planned) as model, open_llm(options, model) as llm:
        if not options.quiet and (where := placed(llm.context)):
            say("placement", where)
        chat = llm.chat(system=options.system_prompt)
        chat.template.render([*chat.messages, {"role": "user", "content": ""}])  # it may refuse a system prompt
        session = Session(llm, chat, settings(options, llm), options.timings, options.quiet)
        if options.model is None and not options.quiet:
            say("note", "the built-in model only tells stories: ask for one about an animal, or name a model with -m")
        with log_of_a_chat() as log:
            if is_interactive:
                with ctrl_c():  # one that comes between an answer and the next prompt is late, and ends nothing
                    return talk(session, options, lambda: OnATerminal(log))
            return answer_lines(session, options)


def open_llm(options: argparse.Namespace, model: mn.Model) -> mn.LLM:
    """Make the context and the template that the options ask for."""
    n_ctx = min(DEFAULT_N_CTX, model.n_ctx_train) if options.ctx_size is None else options.ctx_size
    return mn.LLM(
        model,
        template=choose_template(options, model),
        on_full=options.on_full,
        n_ctx=n_ctx or model.n_ctx_train,
        **of_batches(options),
    )


def choose_template(options: argparse.Namespace, model: mn.Model) -> mn.ChatTemplate:
    """Return the template that is given, or the model's own."""
    text = options.chat_template
    if options.chat_template_file is not None:
        try:
            text = Path(options.chat_template_file).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{options.chat_template_file} is not UTF-8 text") from None
    elif text == "chatml":
        text = _CHATML
    elif text is not None and "{" not in text:
        raise ValueError(
            f"--chat-template {text!r} is no template: give its text, chatml, or a file with --chat-template-file"
        )
    if text is not None:
        return mn.ChatTemplate(text)
    try:
        return mn.ChatTemplate.of(model)
    except mn.TemplateError as error:
        reason = str(error).removesuffix(": give one with template=")
        raise mn.TemplateError(
            f"{reason}: give one with --chat-template (chatml for many models), or continue texts with minerva generate"
        ) from None


def settings(options: argparse.Namespace, llm: mn.LLM) -> dict[str, Any]:
    """Return the keywords of every turn, checked."""
    given = {
        **sampling(options),
        "max_tokens": options.predict,
        "stop": options.stop,
        "constraint": constraint(options),
        "reasoning_budget": options.reasoning_budget,
        "chat_template_kwargs": options.chat_template_kwargs,
    }
    if options.ignore_eos:
        given["logit_bias"] = end_biases(llm.model)
    assert llm.template is not None
    tags = llm.template.thinking_tags
    if options.reasoning_budget is not None and tags is None:
        raise ValueError("--reasoning-budget is of no use here: the chat template has no reasoning")
    llm.options("chat", {"thinking_tags": tags, **given})
    return given


def json_object(text: str) -> dict[str, Any]:
    """Parse `--chat-template-kwargs`."""
    try:
        value = json.loads(utf8(text))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


@contextmanager
def log_of_a_chat() -> Iterator[Log]:
    """Count the lines of the log."""
    logger, log = logging.getLogger("minerva_native"), Log()
    logger.addFilter(log)
    try:
        yield log
    finally:
        logger.removeFilter(log)


def talk(session: Session, options: argparse.Namespace, new_answer: Callable[[], Answer]) -> int:
    """Talk in a terminal until `/exit` or Ctrl-D."""
    history = History(Path(options.history).expanduser() if options.history else None)
    read = line_editor(history, completions, options.quiet)
    if not options.quiet:
        print("/help lists the commands. Ctrl-C stops an answer, Ctrl-D leaves.", file=sys.stderr, flush=True)
    message = options.prompt
    while True:
        if message is None:
            try:
                message = read(session.prompt)
            except KeyboardInterrupt:
                print(flush=True)
                continue
            except EOFError:
                print(flush=True)
                return 0
            except UnicodeDecodeError:
                say("error", "that was not UTF-8 text")
                continue
            if message.strip():
                history.add(message)
        line, message = message, None
        with without_echo():
            if line.startswith("/") and not line.startswith("//") and "\n" not in line.strip():
                if not session.run(line.strip(), new_answer):
                    return 0
                continue
            if not line.strip():
                continue
            session.answer_on_a_terminal(line[1:] if line.startswith("//") else line, new_answer())
        if options.single_turn:
            return 0


def answer_lines(session: Session, options: argparse.Namespace) -> int:
    """Answer each line of standard input. Nothing in a line is a command, as it may be anybody's."""
    for message in messages_of(options):
        answer = _Nowhere() if options.json else InAFile()
        reply = session.answer(message, answer)
        if options.json:
            result = {
                "prompt": message,
                "text": reply.text,
                "reasoning": reply.reasoning,
                "finish_reason": reply.last.finish_reason,
                "context_full": reply.last.context_full,
                "dropped_turns": reply.last.dropped_turns,
                "seed": reply.seed,
            }
            print(as_json({**result, **reply.figures()}), flush=True)
        if reply.is_stopped:
            return 130
        if options.single_turn:
            break
    return 0


class _Nowhere:
    """An answer that is not shown while it is made."""

    def add(self, chunk: mn.Chunk) -> None:
        """Do nothing."""

    def end(self) -> None:
        """Do nothing."""

    finish = end


def messages_of(options: argparse.Namespace) -> Iterator[str]:
    """Yield the first message, and each line of standard input that is not empty; with `-p`, not those of a terminal.

    A line is read once the message before it is answered.
    """
    if options.prompt is not None:
        yield options.prompt
        if sys.stdin.isatty():
            return
    number = 0
    while line := sys.stdin.buffer.readline(_MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > _MAX_LINE_BYTES:
            raise ValueError(f"line {number} has more than {_MAX_LINE_BYTES:,} bytes, too many for a message")
        try:
            message = line.decode().rstrip("\r\n")
        except UnicodeDecodeError:
            raise ValueError(f"line {number} of standard input is not UTF-8 text") from None
        if message.strip():
            yield message
