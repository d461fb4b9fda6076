"""The conversations of one `minerva chat`: their settings, and the commands that change them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import minerva_native as mn

from .answers import Answer
from .messages import printable, say

_SUMMARY = 60  # characters of a message in a list

_PARAMETERS = {field.name: field for field in dataclasses.fields(mn.SamplingParams)}

_OTHER_NAMES = {
    "temp": "temperature",
    "s": "seed",
    "n": "max_tokens",
    "predict": "max_tokens",
    "n_predict": "max_tokens",
    "samplers": "order",
    "typical": "typical_p",
    "top_nsigma": "top_n_sigma",
    "dynatemp_exp": "dynatemp_exponent",
    "mirostat_lr": "mirostat_eta",
    "mirostat_ent": "mirostat_tau",
    "dry_sequence_breaker": "dry_sequence_breakers",
}
"""What llama.cpp's flags call parameters, apart from the dashes."""

_NO_LIMIT = ("seed", "max_tokens", "reasoning_budget")  # of which -1 means that nothing is set


@dataclass(frozen=True)
class Reply:
    """An answer that is in the conversation now.

    Attributes:
        text: the answer.
        reasoning: what came before it.
        last: the last chunk, with the figures.
        seed: the sampler's.
    """

    text: str
    reasoning: str
    last: mn.Chunk
    seed: int

    @property
    def is_stopped(self) -> bool:
        """Whether Ctrl-C stopped it."""
        return self.last.finish_reason == "cancelled"

    def figures(self) -> dict[str, Any]:
        """Return counts, times in seconds and rates in tokens per second; None if nothing was measured."""
        usage, timings = self.last.usage, self.last.timings
        assert usage is not None
        assert timings is not None
        n_evaluated, rest = usage.prompt_tokens - usage.cached_tokens, timings.total - timings.first_token
        return {
            "n_prompt": usage.prompt_tokens,
            "n_cached": usage.cached_tokens,
            "n_gen": usage.completion_tokens,
            "time_to_first_token_seconds": timings.first_token or None,
            "prompt_tokens_per_second": n_evaluated / timings.prefill if timings.prefill > 0 else None,
            "generated_tokens_per_second": (usage.completion_tokens - 1) / rest if rest > 0 else None,
        }

    def line(self) -> str:
        """Return the same as a line for people."""
        figures = self.figures()

        def show(name: str, scale: float, unit: str) -> str:
            return "-" if figures[name] is None else f"{figures[name] * scale:,.1f} {unit}"

        return (
            f"prompt: {figures['n_prompt']} tokens, {figures['n_cached']} of them cached, "
            f"{show('prompt_tokens_per_second', 1, 'tokens/s')} | "
            f"generated: {figures['n_gen']} tokens, {show('generated_tokens_per_second', 1, 'tokens/s')} | "
            f"first token after {show('time_to_first_token_seconds', 1000, 'ms')} | seed {self.seed}"
        )


class Session:
    """The conversations, one of which is current.

    Args:
        llm: what answers.
        chat: the first conversation.
        settings: the keywords of every turn.
        shows_timings: print the figures of each answer.
        is_quiet: print no warnings and no figures.

    Attributes:
        chat: the current conversation.
    """

    def __init__(
        self,
        llm: mn.LLM,
        chat: mn.Chat,
        settings: Mapping[str, Any],
        shows_timings: bool = False,
        is_quiet: bool = False,
    ):
        self._llm, self._chats = llm, [chat]
        self.chat = chat
        self._settings, self._shows_timings, self._is_quiet = dict(settings), shows_timings, is_quiet
        self._n_retries = 0

    @property
    def prompt(self) -> str:
        """What stands before the line that is typed: the conversation's number if there are several."""
        return f"{self._chats.index(self.chat) + 1}> " if len(self._chats) > 1 else "> "

    # Turns

    def answer(self, message: str | Mapping[str, Any], to: Answer) -> Reply:
        """Say something, show the answer, and say what was special about it. Ctrl-C stops the answer.

        Raises:
            MinervaError, ValueError: there is no answer, and the conversation is as it was. `Cancelled`: Ctrl-C came
                before the first token.
        """
        seed = self._settings.get("seed")
        seed = secrets.randbits(32) if seed is None else seed + self._n_retries
        texts, reasonings, last = [], [], mn.Chunk()
        with ctrl_c() as cancel:
            options = {**self._settings, "seed": seed, "cancel": cancel, "keep_partial": True}
            try:
                for last in self.chat.stream(message, **options):
                    texts.append(last.text)
                    reasonings.append(last.reasoning)
                    to.add(last)
            except BaseException:
                if texts:
                    to.end()
                raise
            reply = Reply("".join(texts), "".join(reasonings), last, seed)
            if reply.is_stopped or last.finish_reason == "length":
                to.end()
            else:
                to.finish()
        if not self._is_quiet:
            self._say_what_was_special(reply)
        return reply

    def _say_what_was_special(self, reply: Reply) -> None:
        last = reply.last
        if last.dropped_turns:
            turns = "turn was" if last.dropped_turns == 1 else f"{last.dropped_turns} turns were"
            say("warning", f"the context is full: the oldest {turns} dropped from the conversation")
        if last.context_full:
            say("warning", "the context is full, so the answer ends here")
        elif last.finish_reason == "length":
            say("warning", f"the answer was cut at {self._settings.get('max_tokens')} tokens (-n)")
        if self._shows_timings:
            print(reply.line(), file=sys.stderr, flush=True)

    def answer_on_a_terminal(self, message: str | Mapping[str, Any], to: Answer) -> bool:
        """Do the same, but say what is wrong instead of raising; return whether the turn is in the conversation."""
        try:
            reply = self.answer(message, to)
        except mn.Cancelled:
            say("note", "stopped before the answer began: the turn is undone")
            return False
        except (mn.MinervaError, ValueError) as error:
            say("error", error)
            return False
        if reply.is_stopped and not reply.text:
            say("note", "stopped before the answer began: the turn is undone")
            return False
        if reply.is_stopped:
            say("note", "stopped: the answer so far is kept, and /undo takes it back")
        return True

    # Commands

    def run(self, line: str, new_answer: Callable[[], Answer]) -> bool:
        """Carry out a command; return False if it is the last one."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name in ("/exit", "/quit"):
            return False
        if name == "/retry":
            self._retry(new_answer)
            return True
        command = _COMMANDS.get(name)
        if command is None:
            say("error", f"there is no command {name}: see /help; // begins a message with a /")
            return True
        try:
            print(printable(command.action(self, argument), "\n"), flush=True)
        except (mn.MinervaError, ValueError, TypeError) as error:
            say("error", error)
        except OSError as error:
            say("error", f"{error.filename}: {error.strerror}" if error.filename else error)
        return True

    def undo(self, argument: str) -> str:
        """Take back the last turn."""
        said = self.chat.undo()
        if not said:
            raise ValueError("there is no turn to undo")
        return f"took back: {_summary(said)}"

    def _retry(self, new_answer: Callable[[], Answer]) -> None:
        """Answer the last message again, in a copy that takes the place of the conversation when it has an answer."""
        again = self.chat.fork()
        said = again.undo()
        if not said:
            again.close()
            say("error", "there is no message to answer again")
            return
        before, self.chat = self.chat, again
        self._n_retries += 1
        is_answered = False
        try:
            is_answered = self.answer_on_a_terminal(said[0], new_answer())
        finally:
            if is_answered:
                self._chats[self._chats.index(before)] = again
                before.close()
            else:
                self.chat = before
                again.close()
        if not is_answered:
            say("note", "the answer before is still there")

    def fork(self, argument: str) -> str:
        """Copy the conversation and go on in the copy, or go to another one."""
        if not argument:
            self._add(self.chat.fork())
            return f"this is conversation {len(self._chats)} now, a copy; /fork N goes to another"
        if not argument.isdecimal() or not 1 <= int(argument) <= len(self._chats):
            raise ValueError(f"there is no conversation {argument}: /forks lists them")
        self.chat = self._chats[int(argument) - 1]
        return f"conversation {argument}: {_summary(self.chat.messages)}"

    def forks(self, argument: str) -> str:
        """List the conversations."""
        lines = []
        for number, chat in enumerate(self._chats, 1):
            mark = "*" if chat is self.chat else " "
            lines.append(f"{mark} {number}  {len(chat.messages)} messages  {_summary(chat.messages)}")
        return "\n".join(lines)

    def system(self, argument: str) -> str:
        """Show the system prompt, or set it, or remove it with two quotation marks."""
        messages = self.chat.messages
        has_one = bool(messages) and messages[0]["role"] == "system"
        if not argument:
            return str(messages[0]["content"]) if has_one else "there is no system prompt"
        rest = messages[has_one:]
        head = [] if argument == '""' else [{"role": "system", "content": argument}]
        self.chat.template.render([*head, *(rest or [{"role": "user", "content": ""}])])  # it may refuse them
        self._replace(mn.Chat(self._llm, self.chat.template, [*head, *rest], self.chat.tools))
        what = "the system prompt is set" if head else "the system prompt is removed"
        return f"{what}; the next turn evaluates the conversation again" if rest else what

    def set(self, argument: str) -> str:
        """Show the sampling parameters, or change one."""
        if not argument:
            given = {**dataclasses.asdict(mn.SamplingParams.from_model(self._llm.model)), **self._settings}
            shown = {name: _shown(name, given[name]) for name in parameters() if name in given}
            return "\n".join(f"{name:{max(map(len, shown))}}  {value}" for name, value in shown.items())
        typed, _, value = argument.replace("=", " ", 1).partition(" ")
        name = typed.strip("-").replace("-", "_")
        name = _OTHER_NAMES.get(name, name)
        if name not in parameters():
            raise ValueError(f"there is no parameter {typed}: /set lists them")
        if not value.strip():
            raise ValueError(f"/set {typed} needs a value, as in /set temp 0.3")
        settings = {**self._settings, name: _parsed(name, value.strip())}
        options = {"thinking_tags": self.chat.template.thinking_tags, **settings}
        self._llm.options("/set", options)  # refuses what is wrong
        self._settings, self._n_retries = settings, 0
        return f"{name} is {_shown(name, settings[name])}"

    def save(self, argument: str) -> str:
        """Write the conversation to a file that only its owner can read."""
        path = _path("/save", argument)
        if path.exists():
            try:
                self._llm.load_chat(path).close()
            except (mn.StateError, UnicodeDecodeError):
                raise ValueError(f"{path} exists and is no saved chat: choose another name") from None
        mask = os.umask(0o077)
        try:
            self.chat.save(path)
        finally:
            os.umask(mask)
        return f"saved {len(self.chat.messages)} messages to {path}"

    def load(self, argument: str) -> str:
        """Go on with a conversation from a file; the current one stays."""
        loaded = self._llm.load_chat(_path("/load", argument))
        if self.chat.messages or len(self._chats) > 1:
            self._add(loaded)
            number = f"; this is conversation {len(self._chats)}"
        else:
            self._replace(loaded)
            number = ""
        return f"loaded {len(loaded.messages)} messages{number}: {_summary(loaded.messages)}"

    def tokens(self, argument: str) -> str:
        """Count the tokens, and the use of the context."""
        messages, context = self.chat.messages, self._llm.context
        n_tokens = 0
        if messages:
            ids = self.chat.template.encode(
                self._llm.tokenizer, messages, self.chat.tools or None, add_generation_prompt=False
            )
            n_tokens = len(ids)
        return (
            f"this conversation: {len(messages)} messages, {n_tokens:,} of {context.n_ctx:,} tokens "
            f"({n_tokens / context.n_ctx:.0%})\n"
            f"in the KV cache, other conversations included: {context.cells_used:,} tokens"
        )

    def timings(self, argument: str) -> str:
        """Switch the figures after each answer on or off."""
        if argument not in ("on", "off"):
            raise ValueError("/timings takes on or off")
        self._shows_timings = argument == "on"
        return f"timings are {argument}"

    def help(self, argument: str) -> str:
        """List the commands."""
        usages = {command.usage(name): command.summary for name, command in _COMMANDS.items()}
        usages |= {"/retry": "answer the last message again", "/exit": "leave, as Ctrl-D does"}
        width = max(map(len, usages))
        lines = [f"{usage:{width}}  {summary}" for usage, summary in sorted(usages.items())]
        keys = "Alt-Enter (or Esc, Enter) begins a new line. Ctrl-C stops an answer."
        return "\n".join([*lines, "", keys, "// begins a message with a /."])

    def _add(self, chat: mn.Chat) -> None:
        self._chats.append(chat)
        self.chat = chat

    def _replace(self, chat: mn.Chat) -> None:
        """Put a conversation in the place of the current one."""
        self._chats[self._chats.index(self.chat)] = chat
        self.chat.close()
        self.chat = chat


@dataclass(frozen=True)
class _Command:
    action: Callable[[Session, str], str]
    argument: str
    summary: str

    def usage(self, name: str) -> str:
        return f"{name} {self.argument}".rstrip()


_COMMANDS = {
    "/undo": _Command(Session.undo, "", "take back the last turn"),
    "/fork": _Command(Session.fork, "[N]", "go on in a copy of the conversation, or in conversation N"),
    "/forks": _Command(Session.forks, "", "list the conversations"),
    "/system": _Command(Session.system, "[TEXT]", 'show or set the system prompt; "" removes it'),
    "/set": _Command(Session.set, "[NAME VALUE]", "show the sampling parameters or set one: /set temp 0.3"),
    "/save": _Command(Session.save, "FILE", "write the conversation to a file"),
    "/load": _Command(Session.load, "FILE", "go on with a saved conversation"),
    "/tokens": _Command(Session.tokens, "", "count the tokens, and the use of the context"),
    "/timings": _Command(Session.timings, "on|off", "show the figures of each answer, or not"),
    "/help": _Command(Session.help, "", "list the commands"),
}


def parameters() -> list[str]:
    """Return the names that `/set` takes."""
    return [*_PARAMETERS, "max_tokens", "reasoning_budget"]


def completions(line: str) -> list[str]:
    """Return what the last word of a line may become: a command, a parameter, or the name of a file."""
    name, space, rest = line.partition(" ")
    if not line.startswith("/") or "\n" in line:
        return []
    if not space:
        return sorted(each for each in (*_COMMANDS, "/retry", "/exit") if each.startswith(name))
    if name == "/set" and " " not in rest:
        return [each for each in sorted({*parameters(), *_OTHER_NAMES}) if each.startswith(rest)]
    if name in ("/save", "/load") and " " not in rest:
        start = rest.rpartition("/")[2]
        folder = rest.removesuffix(start)
        with contextlib.suppress(OSError):
            paths = [path for path in Path(folder or ".").expanduser().iterdir() if path.name.startswith(start)]
            return sorted(f"{folder}{path.name}{'/' * path.is_dir()}" for path in paths if path.name.isprintable())
    return []


@contextmanager
def ctrl_c() -> Iterator[threading.Event]:
    """Give an event that Ctrl-C sets, instead of raising `KeyboardInterrupt`."""
    event = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda number, frame: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def _summary(messages: list[dict[str, Any]]) -> str:
    """Return the beginning of the last thing that the user said."""
    said = next((str(message["content"]) for message in reversed(messages) if message["role"] == "user"), "")
    line = " ".join(said.split())
    return (line if len(line) <= _SUMMARY else f"{line[:_SUMMARY]}...") or "nothing said so far"


def _path(command: str, argument: str) -> Path:
    if not argument:
        raise ValueError(f"{command} needs the name of a file")
    return Path(argument).expanduser()


def _parsed(name: str, value: str) -> Any:
    """Return the value that a text stands for."""
    if name == "order":
        return [step for step in value.split(";") if step]
    try:
        parsed = json.loads(value)
    except ValueError:
        raise ValueError(f"{name} cannot be {value!r}: it is no number") from None
    return None if parsed == -1 and name in _NO_LIMIT else parsed


def _shown(name: str, value: Any) -> str:
    """Return a value as `/set` takes it."""
    if name == "order":
        return ";".join(value)
    return json.dumps(-1 if value is None else value)
