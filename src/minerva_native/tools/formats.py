"""The formats in which models write calls, one entry a family.

To add one: say what in a chat template tells it, and how a call is spelled in it, in terms of `syntax` and `notation`.
`tests/test_tools.py` then spells calls in it, reads them in pieces, and tries its grammar.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .calls import ToolCall, to_json
from .grammar import Grammar
from .notated import NotatedCall
from .notation import GEMMA, PYTHON
from .parser import CallParser, opens_reasoning, read_answer
from .reader import END, Malformed, Markers, Reading
from .schema import Tool
from .syntax import JsonCall, NamedCall, Syntax
from .tagged import Attributes, TaggedCall

_THINK = ("<think>", "</think>")


@dataclass(frozen=True, kw_only=True)
class ToolFormat:
    """How the models of a family write calls.

    Attributes:
        name: of the family and its version.
        signs: what is in its chat templates: all strings of one of these groups.
        calls: how a call may be spelled, the usual way first.
        bare: how calls are spelled that no marker opens; they can only be at the beginning.
        section: markers around all calls of an answer.
        joint: white space between calls, for writing.
        section_gap: white space around the calls of a section, for writing.
        reasoning: the tags around reasoning, unless the caller says otherwise.
        ends_reasoning: markers that end reasoning though its tag was not closed, as in `Markers`.
        silent: markers that are no content.
    """

    name: str
    signs: tuple[tuple[str, ...], ...]
    calls: tuple[Syntax, ...] = ()
    bare: Syntax | None = None
    section: tuple[str, str] | None = None
    joint: str = ""
    section_gap: str = ""
    reasoning: tuple[str, str] | None = _THINK
    ends_reasoning: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    silent: tuple[str, ...] = ()

    @classmethod
    def of(cls, template: str) -> "ToolFormat":
        """Return the format that a chat template is written for; JSON in <tool_call> tags if nothing tells it."""
        if not isinstance(template, str):
            raise TypeError(f"the text of a chat template must be a str, not {type(template).__name__}")
        for each in FORMATS:
            if any(all(sign in template for sign in group) for group in each.signs):
                return each
        return HERMES

    def parser(
        self,
        tools: Iterable[Tool] | None = None,
        *,
        reasoning: tuple[str, str] | Literal["auto"] | None = "auto",
        prompt: str = "",
    ) -> CallParser:
        """Return a parser for one answer.

        Args:
            tools: what may be called: a call of anything else is an error. None for no such check; parameters that
                are bare text have the type then that they look like.
            reasoning: the tags around reasoning, None for none; "auto" for those of the format.
            prompt: the end of the prompt, which may have opened the reasoning.
        """
        tags = self.reasoning if reasoning == "auto" else reasoning
        known = None if tools is None else {tool.name: tool for tool in tools}
        return CallParser(self, known, tags, prompt)

    def read(self, parser: CallParser) -> Reading[None]:
        """Read an answer."""
        return read_answer(parser)

    @property
    def syntax(self) -> Syntax:
        """How a call is spelled by default."""
        return self.bare or self.calls[0]

    def write(self, calls: Iterable[ToolCall | tuple[str, Mapping[str, Any]]]) -> str:
        """Return calls, or names with arguments, as the models spell them."""
        pairs = [(call.name, call.arguments) if isinstance(call, ToolCall) else call for call in calls]
        text = self.syntax.join([self.syntax.write(name, arguments) for name, arguments in pairs], self.joint)
        if self.section:
            text = f"{self.section[0]}{self.section_gap}{text}{self.section_gap}{self.section[1]}"
        return text

    def grammar(
        self,
        tools: Iterable[Tool],
        *,
        required: bool,
        parallel: bool = True,
        name: str | None = None,
        tokens: Mapping[str, int] | None = None,
        reasoning: tuple[str, str] | Literal["auto"] | None = "auto",
        prompt: str = "",
    ) -> str | None:
        """Return a grammar for answers in the Lark dialect of llguidance, or None if the format has none.

        Args:
            tools: what may be called.
            required: the answer is a call. Otherwise it is text, which calls may follow.
            parallel: there may be several calls.
            name: the one tool that may be called.
            tokens: ids of the control tokens of the vocabulary, by their names. A marker that is one has to be here,
                because no text matches it.
            reasoning: the tags around reasoning, as in `parser`; it may come first.
            prompt: the end of the prompt, which may have opened the reasoning.
        """
        allowed = [_without_more(tool) for tool in tools if name is None or tool.name == name]
        if not allowed:
            raise ValueError("there is no tool" + (f" {name!r}" if name is not None else " to call"))
        grammar, lead = Grammar(tokens), ""
        if tags := self.reasoning if reasoning == "auto" else reasoning:
            rest = grammar.until(tags[1]) + r" /[ \n]*/"
            lead = rest if opens_reasoning(prompt, tags) else f"({grammar.literal(tags[0])} {rest})?"
        return self.write_grammar(grammar, allowed, required, parallel, lead)

    def write_grammar(self, grammar: Grammar, tools: list[Tool], required: bool, parallel: bool, lead: str) -> str:
        """Return the grammar for these tools.

        Args:
            grammar: what has been written of it.
            tools: those that may be called.
            required: whether the answer is a call.
            parallel: whether there may be several.
            lead: what comes before all else.
        """
        syntax, joint = self.syntax, grammar.literal(self.joint)
        call = grammar.one_of([syntax.rule(grammar, tool) for tool in tools])
        opener, close = syntax.opens[0], grammar.literal(syntax.close)
        opened = f"{grammar.literal(opener)} {call} {close}"
        if self.section:
            opener, gap = self.section[0], grammar.literal(self.section_gap)
            calls = f"{opened} ({joint} {opened})*" if parallel else opened
            calls = f"{gap} {calls} {gap} {grammar.literal(self.section[1])}"
        elif syntax.is_list:
            calls = f'"[" {call} (", " {call})* "]" {close}' if parallel else f'"[" {call} "]" {close}'
        else:
            calls = f"{call} {close} ({joint} {opened})*" if parallel else f"{call} {close}"
        if required:
            silent = grammar.one_of([grammar.literal(marker) for marker in self.silent]) if self.silent else ""
            before = f"({silent})*" if silent else ""
            return grammar.text(f"{lead} {before} {grammar.literal(opener)} {calls}")
        if opener:
            text, before = grammar.anything(*self.silent), grammar.until(opener, *self.silent)
        else:
            text, before = grammar.pattern(f"([^{re.escape(syntax.first)}](?s:.*))?"), ""
        return grammar.text(f"{lead} ({text} | {before} {calls})")


def _without_more(tool: Tool) -> Tool:
    """Return a tool that takes nothing but its properties, unless its schema says that it does."""
    return replace(tool, parameters={"additionalProperties": False} | tool.parameters)


HERMES = ToolFormat(
    name="hermes",
    signs=(("<tool_call>", '"arguments"'),),
    calls=(JsonCall(open="<tool_call>", close="</tool_call>", pad="\n"),),
    joint="\n",
)


def _function_tags(name: str, signs: tuple[tuple[str, ...], ...], prefix: str = "") -> ToolFormat:
    """Return a format of tags like <function=...>; models that write it often slip into JSON."""
    opening, closing = f"<{prefix}tool_call>", f"</{prefix}tool_call>"
    return ToolFormat(
        name=name,
        signs=signs,
        calls=(
            TaggedCall(
                wrapper=(opening, closing),
                open="<function=",
                name_end=">",
                key_open="<parameter=",
                key_end=">",
                value_end="</parameter>",
                end="</function>",
                pad="\n",
                gap="\n",
            ),
            JsonCall(open=opening, close=closing, first="{"),
        ),
        joint="\n",
        reasoning=(f"<{prefix}think>", f"</{prefix}think>"),
        ends_reasoning={opening: ("<function=",)},
    )


SEED = _function_tags("seed", (("<seed:tool_call>",),), prefix="seed:")
QWEN_XML = _function_tags("qwen-xml", (("<function=", "<parameter="),))

GLM = ToolFormat(
    name="glm",
    signs=(("<arg_key>", "<arg_value>"),),
    calls=(
        TaggedCall(
            open="<tool_call>",
            name_end="",
            key_open="<arg_key>",
            key_end="</arg_key>",
            value_open="<arg_value>",
            value_end="</arg_value>",
            end="</tool_call>",
            after=("<tool_call>", END),
        ),
    ),
)

KIMI_K2 = ToolFormat(
    name="kimi-k2",
    signs=(("<|tool_calls_section_begin|>",),),
    section=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    calls=(
        NamedCall(
            open="<|tool_call_begin|>", after="<|tool_call_argument_begin|>", close="<|tool_call_end|>", is_id=True
        ),
    ),
)

_K3_TOOLS, _K3_RESPONSE = "<|open|>tools<|sep|>", "<|open|>response<|sep|>"

KIMI_K3 = ToolFormat(
    name="kimi-k3",
    signs=(("<|open|>", "<|close|>", "<|sep|>"),),
    section=(_K3_TOOLS, "<|close|>tools<|sep|>"),
    calls=(
        TaggedCall(
            open="<|open|>call",
            name_end="<|sep|>",
            key_open="<|open|>argument",
            key_end="<|sep|>",
            value_end="<|close|>argument<|sep|>",
            end="<|close|>call<|sep|>",
            after=("<|open|>call", "<|close|>tools<|sep|>"),
            attributes=Attributes("tool", "key", "type", "string"),
            numbered=' index="#"',
        ),
    ),
    reasoning=("<|open|>think<|sep|>", "<|close|>think<|sep|>"),
    ends_reasoning={_K3_RESPONSE: (), _K3_TOOLS: ()},
    silent=(_K3_RESPONSE, "<|close|>response<|sep|>", "<|close|>message<|sep|>"),
)

_DEEPSEEK_SECTION = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
_DEEPSEEK_CALL = ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>")

DEEPSEEK_V3 = ToolFormat(
    name="deepseek-v3",
    signs=((_DEEPSEEK_SECTION[0], "```json"),),
    section=_DEEPSEEK_SECTION,
    calls=(
        NamedCall(
            open=_DEEPSEEK_CALL[0],
            close=_DEEPSEEK_CALL[1],
            before="function<｜tool▁sep｜>",
            after="\n```json\n",
            fence="\n```",
        ),
    ),
    joint="\n",
)

DEEPSEEK_V31 = ToolFormat(
    name="deepseek-v3.1",
    signs=((_DEEPSEEK_SECTION[0],),),
    section=_DEEPSEEK_SECTION,
    calls=(NamedCall(open=_DEEPSEEK_CALL[0], close=_DEEPSEEK_CALL[1], after="<｜tool▁sep｜>"),),
)


def _dsml(name: str, signs: tuple[tuple[str, ...], ...], section: str, space: str = "") -> ToolFormat:
    """Return a DeepSeek format from V3.2 on; they differ in names and in a space."""
    opening, closing = f"<｜DSML｜{space}", f"</｜DSML｜{space}"
    return ToolFormat(
        name=name,
        signs=signs,
        section=(f"{opening}{section}>", f"{closing}{section}>"),
        calls=(
            TaggedCall(
                open=f"{opening}invoke",
                name_end=">",
                key_open=f"{opening}parameter",
                key_end=">",
                value_end=f"{closing}parameter>",
                end=f"{closing}invoke>",
                after=(f"{opening}invoke", f"{closing}{section}>"),
                attributes=Attributes("name", "name", "string", "true"),
                gap="\n",
            ),
        ),
        joint="\n",
        section_gap="\n",
    )


DEEPSEEK_V32 = _dsml("deepseek-v3.2", (("DSML", "function_calls"),), "function_calls")
DEEPSEEK_V4 = _dsml("deepseek-v4", (("DSML", "tool_calls"),), "tool_calls")
DEEPSEEK_V41 = _dsml("deepseek-v4.1", (("DSML｜ calls",), ("DSML｜ invoke",)), "calls", space=" ")

MISTRAL = ToolFormat(
    name="mistral",
    signs=(("[TOOL_CALLS]", "[ARGS]"),),
    calls=(NamedCall(open="[TOOL_CALLS]", after="[ARGS]", id_mark="[CALL_ID]"),),
    reasoning=("[THINK]", "[/THINK]"),
)

MISTRAL_LIST = ToolFormat(
    name="mistral-list",
    signs=(("[TOOL_CALLS]",),),
    calls=(JsonCall(open="[TOOL_CALLS]", is_list=True, keys=("arguments",)),),
)

_LLAMA_KEYS = ("parameters", "arguments")

LLAMA = ToolFormat(
    name="llama",
    signs=(("<|start_header_id|>", "ipython"),),
    bare=JsonCall(keys=_LLAMA_KEYS, first="{"),
    calls=(JsonCall(open="<|python_tag|>", keys=_LLAMA_KEYS),),
    joint="; ",
)

LLAMA4 = ToolFormat(
    name="llama4",
    signs=(("<|header_start|>",),),
    bare=NotatedCall(bracket="(", notation=PYTHON, is_list=True, first="["),
    silent=("<|python_start|>", "<|python_end|>"),
)

LFM2 = ToolFormat(
    name="lfm2",
    signs=(("<|tool_list_start|>",), ("<|tool_call_start|>",)),
    calls=(
        NotatedCall(open="<|tool_call_start|>", bracket="(", notation=PYTHON, is_list=True, close="<|tool_call_end|>"),
    ),
)

NEMOTRON = ToolFormat(
    name="nemotron",
    signs=(("<TOOLCALL>",),),
    calls=(JsonCall(open="<TOOLCALL>", close="</TOOLCALL>", is_list=True),),
)

APRIEL = ToolFormat(
    name="apriel",
    signs=(("<tool_calls>[",),),
    calls=(JsonCall(open="<tool_calls>", close="</tool_calls>", is_list=True),),
    reasoning=("<thinking>", "</thinking>"),
)

GRANITE3 = ToolFormat(
    name="granite3",
    signs=(("<|tool_call|>", "JSON list of tools"),),
    calls=(JsonCall(open="<|tool_call|>", is_list=True),),
)

MINIMAX = ToolFormat(
    name="minimax",
    signs=(("<minimax:tool_call>",),),
    section=("<minimax:tool_call>", "</minimax:tool_call>"),
    calls=(
        TaggedCall(
            open="<invoke",
            name_end=">",
            key_open="<parameter",
            key_end=">",
            value_end="</parameter>",
            end="</invoke>",
            after=("<invoke", "</minimax:tool_call>"),
            attributes=Attributes("name", "name"),
            gap="\n",
        ),
    ),
    joint="\n",
    section_gap="\n",
)

GEMMA4 = ToolFormat(
    name="gemma4",
    signs=(("<|tool_call>",),),
    calls=(
        NotatedCall(
            open="<|tool_call>",
            before="call:",
            bracket="{",
            notation=GEMMA,
            close="<tool_call|>",
        ),
    ),
    reasoning=("<|channel>thought\n", "<channel|>"),
)


class Harmony(ToolFormat):
    """gpt-oss: an answer is several messages, each with a header that says what it is."""

    def read(self, parser: CallParser) -> Reading[None]:
        """Read the messages."""
        return _read_messages(parser)

    def write(self, calls: Iterable[ToolCall | tuple[str, Mapping[str, Any]]]) -> str:
        """Return calls as the models spell them; there is one in an answer."""
        pairs = [(call.name, call.arguments) if isinstance(call, ToolCall) else call for call in calls]
        return "<|call|><|start|>assistant".join(
            f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{to_json(dict(arguments))}"
            for name, arguments in pairs
        )

    def write_grammar(self, grammar: Grammar, tools: list[Tool], required: bool, parallel: bool, lead: str) -> str:
        """Return the grammar for these tools: an answer has one call at most."""
        literal = grammar.literal
        calls = [
            f"{literal(f'{tool.name} <|constrain|>json<|message|>')} {grammar.json(tool.parameters)}" for tool in tools
        ]
        call = f"{literal('<|channel|>commentary to=functions.')} {grammar.one_of(calls)}"
        start = literal("<|start|>assistant")
        said = f"({literal('<|channel|>commentary<|message|>')} {grammar.until('<|end|>')} {start})?"
        thought = f"({literal('<|channel|>analysis<|message|>')} {grammar.until('<|end|>')} {start})?"
        final = "" if required else f" | {literal('<|channel|>final<|message|>')} {grammar.anything()}"
        return grammar.text(f"{thought} {said} ({call}{final})")


_HEADER_ENDS = Markers(dict.fromkeys(("<|message|>", "<|end|>", "<|call|>", "<|return|>"), ()))
_MESSAGE_ENDS = Markers({"<|end|>": ("<|start|>", END), "<|return|>": (END,)})
_HEADER = re.compile(
    r"(?:<\|start\|>\w*)?(?:assistant)?(?:\s+to=[^\s<]*)?"
    r"(?:<\|channel\|>\w*(?:\s+to=[^\s<]*)?(?:\s*<\|constrain\|>\w*|\s+\w*)?)*"
)
_FUNCTION = re.compile(r"to=functions\.([^\s<]+)")
_OTHER = re.compile(r"to=(?!assistant\b)([^\s<]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")


def _read_messages(parser: CallParser) -> Reading[None]:
    """Read messages up to the end; the prompt has begun the first."""
    _, start, begun = parser.prompt.rpartition("<|start|>")
    begun, marker, _ = begun.partition("<|message|>") if start else ("", "", "")
    while True:
        parts: list[str] = []
        if not marker:
            marker, _ = yield from parser.reader.until(_HEADER_ENDS, parts.append)
        text = "".join(parts)
        if marker == "<|message|>":
            yield from _read_message(parser, begun + text, text + marker)
        elif marker:
            parser.fail("the message has no <|message|>", text + marker)
        else:
            break
        begun = marker = ""
    if _HEADER.fullmatch(begun + text):
        if text:
            parser.fail("the message is cut off", text)
    elif text.strip():
        parser.fail("the message has no <|message|>", text)
        parser.content.add(text)


def _read_message(parser: CallParser, header: str, text: str) -> Reading[None]:
    """Read the body of a message, whose header was read; `text` is what of it was not in the prompt."""
    reader = parser.reader
    function, other, channels = _FUNCTION.findall(header), _OTHER.findall(header), _CHANNEL.findall(header)
    channel = channels[-1] if channels else "final"
    if function:
        if not (yield from parser.attempt(_read_function(parser, function[-1]), text)):
            yield from reader.until(_MESSAGE_ENDS, parser.content.add)
    elif other:
        body: list[str] = []
        yield from reader.until(_MESSAGE_ENDS, body.append)
        parser.fail(f"there is no tool {other[-1]!r}", "".join(body))
    elif channel == "analysis":
        yield from reader.until(_MESSAGE_ENDS, parser.reasoning.add)
        parser.reasoning.close("")
    else:
        if channel not in ("final", "commentary"):
            parser.fail(f"there is no channel {channel!r}", text)
        yield from reader.until(_MESSAGE_ENDS, parser.content.add)


def _read_function(parser: CallParser, name: str) -> Reading[None]:
    reader, call = parser.reader, parser.open()
    call.named(name)
    yield from reader.json(call.write)
    yield from reader.spaces()
    if not (yield from reader.literal("<|call|>", "<|end|>", "<|return|>")):
        found = yield from reader.sees("<|start|>", END)
        if found is None:
            raise Malformed("the message goes on after the arguments")
    call.finish()


HARMONY = Harmony(name="gpt-oss", signs=(("<|channel|>", "<|message|>"),), reasoning=None)

FORMATS: tuple[ToolFormat, ...] = (
    HARMONY,
    GEMMA4,
    KIMI_K3,
    KIMI_K2,
    DEEPSEEK_V41,
    DEEPSEEK_V32,
    DEEPSEEK_V4,
    DEEPSEEK_V3,
    DEEPSEEK_V31,
    GLM,
    SEED,
    QWEN_XML,
    MINIMAX,
    MISTRAL,
    MISTRAL_LIST,
    LFM2,
    NEMOTRON,
    APRIEL,
    GRANITE3,
    LLAMA4,
    LLAMA,
    HERMES,
)
"""All formats; the first one whose signs a template has is its own."""
