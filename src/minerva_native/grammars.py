"""Grammars in Lark's and llama.cpp's notation: what has to be known of one before it is used."""

import re
from collections.abc import Iterator

from ._arguments import what
from .errors import ConstraintError

MOST_RULES = 5_000
_MOST_CHARACTERS = 1_000_000

_TOKENS = re.compile(
    r"""
    (?P<space>\s+|//[^\n]*|\#[^\n]*)
    |(?P<define>[?!]*[A-Za-z_][A-Za-z0-9_]*\s*(?:\[[^]]*\]\s*)?(?:\.\d+\s*)?:(?!:))
    |(?P<string>"(?:[^"\\\n]|\\.)*"i?)
    |(?P<regex>/(?:[^/\\\n]|\\.)+/[imslux]*)
    |(?P<special><[^<>\s]+>)
    |(?P<block>%(?:json|regex|lark)\s*(?=[{"\[tf]))
    |(?P<directive>%[a-z]+[^\n]*)
    |(?P<name>[A-Za-z_@][A-Za-z0-9_-]*)
    |(?P<count>\{\s*\d*\s*,?\s*\d*\s*\}|~\s*\d+(?:\s*\.\.\s*\d+)?)
    |(?P<sign>\.\.|->|[|()\[\]?*+&~])
    """,
    re.VERBOSE,
)


class _UnknownNotationError(Exception):
    """Something that this module does not read: then the engine is the judge."""


def check_text(name: str, text: object) -> None:
    """Raise `TypeError` for what is no text, and `ConstraintError` for a grammar that is too large."""
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a str, not {what(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConstraintError(f"{name} has a lone surrogate at index {error.start}") from None
    if len(text) > _MOST_CHARACTERS:
        raise ConstraintError(f"the grammar has {len(text):,} characters; at most {_MOST_CHARACTERS:,} are allowed")


def check_rules(text: str) -> None:
    """Raise `ConstraintError` for a grammar of too many rules."""
    n_rules = len(re.findall(r"^[^\S\n]*[?!]?[A-Za-z_][^:\n\"'/]*:", text, re.MULTILINE))
    if n_rules > MOST_RULES:
        raise ConstraintError(f"the grammar has {n_rules:,} rules; at most {MOST_RULES:,} are allowed")


def check_ends(text: str) -> None:
    """Raise `ConstraintError` if no text of finite length satisfies a Lark grammar, such as `start: "a" start`.

    A rule can end if one of its alternatives consists of parts that can.
    """
    try:
        rules = _Reader(text).rules()
    except _UnknownNotationError:
        return
    ends: set[str] = set()
    waiting, n_before = list(rules), -1
    while len(ends) != n_before:
        n_before = len(ends)
        for name in reversed(waiting):  # a rule usually stands before those that it uses
            if rules[name].can_end(ends, rules):
                ends.add(name)
        waiting = [name for name in waiting if name not in ends]
    if "start" in waiting:
        raise ConstraintError(f"the grammar never ends: no text completes {', '.join(waiting[:3])}")


class _Rule:
    """Alternatives, each a list of the names that it needs and of groups."""

    def __init__(self) -> None:
        self.alternatives: list[list[str | _Rule]] = [[]]

    def can_end(self, ends: set[str], rules: "dict[str, _Rule]") -> bool:
        return any(
            all(
                part.can_end(ends, rules) if isinstance(part, _Rule) else part in ends or part not in rules
                for part in parts
            )
            for parts in self.alternatives
        )


class _Reader:
    """Reads the rules of a Lark grammar, as far as it matters whether they can end."""

    def __init__(self, text: str):
        self._text, self._at = text, 0

    def rules(self) -> dict[str, _Rule]:
        """Return the rules by their names."""
        found: dict[str, _Rule] = {}
        stack = [_Rule()]  # what stands before the first rule is ignored
        for kind, text in self._tokens():
            parts = stack[-1].alternatives[-1]
            if kind == "define":
                if len(stack) > 1:
                    raise _UnknownNotationError
                name = re.split(r"[\s\[.:]", text.lstrip("?!"))[0]
                stack = [found.setdefault(name, _Rule())]
            elif kind == "name":
                parts.append(text)
            elif text in ("(", "["):
                group = _Rule()
                parts.append(group)
                stack.append(group)
            elif text in (")", "]"):
                if len(stack) == 1:
                    raise _UnknownNotationError
                stack.pop()
                if text == "]":  # optional
                    stack[-1].alternatives[-1].pop()
            elif text == "|":
                stack[-1].alternatives.append([])
            elif text in ("?", "*") or (kind == "count" and re.match(r"[{~]\s*(0|,|\.)", text)):
                if parts:
                    parts.pop()
            elif kind in ("string", "regex", "special", "block"):
                parts.append(_Rule())
        return found

    def _tokens(self) -> Iterator[tuple[str, str]]:
        text = self._text
        while self._at < len(text):
            match = _TOKENS.match(text, self._at)
            if match is None:
                raise _UnknownNotationError
            self._at = match.end()
            kind = str(match.lastgroup)
            if kind == "block":
                self._skip_value()
            if kind not in ("space", "directive"):
                yield kind, match.group()

    def _skip_value(self) -> None:
        """Go behind the JSON value or the braces that follow."""
        depth = 0
        for match in re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]]|[^"{}\[\]\s]+|\s+').finditer(self._text, self._at):
            self._at = match.end()
            depth += (match.group() in ("{", "[")) - (match.group() in ("}", "]"))
            if depth == 0 and not match.group().isspace():
                return
        raise _UnknownNotationError
