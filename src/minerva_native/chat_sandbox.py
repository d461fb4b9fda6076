"""Where chat templates run: jinja's sandbox, with what transformers adds, bounded, and with literals told from data."""

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from string import Formatter
from types import GeneratorType
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_indent, do_join
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace, pass_eval_context
from markupsafe import Markup

from .chat_text import ITEM_WEIGHT, Text, check_length, written
from .errors import TemplateError

MAX_SECONDS = 2.0  # of this thread's CPU time
_MAX_BITS = 1 << 16  # of an integer
_MAX_ARGUMENT = 1 << 20  # of a filter, such as a width

# What could take more time or memory than is seen from here, and no template needs.
_NO_FILTERS = ("batch", "center", "pprint", "striptags", "urlize", "wordwrap")
_NO_METHODS = frozenset({"center", "encode", "expandtabs", "format_map", "ljust", "rjust", "translate", "zfill"})
_NO_METHODS_OF_MARKUP = frozenset({"format", "join", "replace", "striptags", "unescape"})

_WIDE = re.compile(r"%[^a-zA-Z%]*(\*|\d{5})")  # a conversion of `%` with a width from elsewhere, or a large one


class Refusal(Exception):
    """What a template says with `raise_exception`."""


class Budget:
    """What one rendering may still use."""

    def __init__(self) -> None:
        self.deadline = time.thread_time() + MAX_SECONDS
        self._weights: dict[int, tuple[int, object]] = {}  # by id; with the container, so that the id stays its own

    def spend(self) -> None:
        """Raise `TemplateError` if the time is over."""
        if time.thread_time() > self.deadline:
            raise TemplateError(f"it takes more than {MAX_SECONDS:g} s")

    def weight(self, value: object) -> int:
        """Return how much text a value can become. A container weighs what is in it, as often as it is in it.

        Templates cannot change a container, so each is looked at once.
        """
        if isinstance(value, str):
            return len(value) + ITEM_WEIGHT
        if not isinstance(value, list | tuple | dict):
            return ITEM_WEIGHT
        if id(value) not in self._weights:
            weight = ITEM_WEIGHT + sum(map(self.weight, value))
            if isinstance(value, dict):
                weight += sum(map(self.weight, value.values()))
            self._weights[id(value)] = weight, value
        return self._weights[id(value)][0]


_budget: ContextVar[Budget] = ContextVar("budget")


@contextmanager
def budget() -> Iterator[None]:
    """Give the template that runs in this block its time."""
    token = _budget.set(Budget())
    try:
        yield
    finally:
        _budget.reset(token)


class _Generator(CodeGenerator):
    """Writes Python that marks the template's literals, and that says at each block and container what it does."""

    def visit_Const(self, node: nodes.Const, frame: Any) -> None:
        if isinstance(node.value, str):
            self.write(f"environment.literal({node.value!r})")
        else:
            super().visit_Const(node, frame)

    def _output_const_repr(self, group: Iterable[Any]) -> str:
        return f"environment.literal({super()._output_const_repr(group)})"

    def _output_child_to_const(self, node: nodes.Expr, frame: Any, finalize: Any) -> str:
        if not isinstance(node, nodes.TemplateData):  # nothing is computed before there is a budget
            raise nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            super().visit_Concat(node, frame)
            return
        self.write("environment.concat(map(str, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")

    def visit_List(self, node: nodes.List, frame: Any) -> None:
        self._weighed(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Any) -> None:
        self._weighed(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Any) -> None:
        if node.ctx == "load":
            self._weighed(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def _weighed(self, visit: Callable[[Any, Any], None], node: nodes.Node, frame: Any) -> None:
        self.write("environment.weighed(")
        visit(node, frame)
        self.write(")")

    def blockvisit(self, nodes: Iterable[nodes.Node], frame: Any) -> None:
        self.writeline("environment.spend()")
        super().blockvisit(nodes, frame)


class _Generation(Extension):
    """The tag around what an assistant generates; transformers finds it there, and the text is as without."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """Make the block a call, as in transformers: what is set in it is not seen outside."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("generated"), [], [], body).set_lineno(line)

    def generated(self, caller: Macro) -> str:
        """Return the text of the block."""
        text: str = caller()
        return text


class _Namespace(Namespace):
    """Holds no names that begin with an underscore, and shows nothing of what it holds."""

    def __init__(*args: Any, **names: Any) -> None:  # `self` may be one of the names
        Namespace.__init__(*args, **names)
        for name in dict(*args[1:], **names):
            _check_name(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace holds no name that begins with an underscore, as {name!r} does")


class _Dict:
    """`dict` in templates, without the attributes of a class."""

    def __call__(self, *args: Any, **items: Any) -> dict[Any, Any]:
        return dict(*args, **items)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As `dict.fromkeys`."""
        return dict.fromkeys(*args)


class Sandbox(ImmutableSandboxedEnvironment):
    """Compiles and runs templates. Strings of data are to be `Text`; what a template renders is a `Text`.

    It may run only in a `budget()`. Safe to use from several threads at once.
    """

    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[_Generation, loopcontrols], cache_size=0
        )
        filters: dict[str, Callable[..., Any]] = self.filters | {
            "tojson": self._tojson,
            "join": _join,
            "indent": _indent,
            "replace": _replace,
        }
        self.filters = {
            name: self._bounded(name, function) for name, function in filters.items() if name not in _NO_FILTERS
        }
        tests: dict[str, Any] = self.tests
        self.tests = {name: self._bounded(name, function) for name, function in tests.items()}
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }
        del self.globals["lipsum"]

    # The generated Python calls these.

    literal = staticmethod(Text.literal)

    @staticmethod
    def concat(parts: Iterable[str]) -> Text:
        """Join what the template wrote and what it took from data."""
        return Text().join(parts)

    @staticmethod
    def spend() -> None:
        """Raise `TemplateError` if the rendering takes too long."""
        _budget.get().spend()

    @staticmethod
    def weighed(value: Any) -> Any:
        """Return a value; raise `TemplateError` if it holds too much."""
        check_length(_budget.get().weight(value) - ITEM_WEIGHT)
        return value

    def call(self, context: Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function or a method for the template."""
        self.spend()
        return self.weighed(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute what may become large."""
        self.spend()
        if operator == "%" and isinstance(left, str):
            self._check_percent(left, right)
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length(), right.bit_length()
            if (operator == "**" and bits[0] * abs(right) > _MAX_BITS) or (operator == "*" and sum(bits) > _MAX_BITS):
                raise TemplateError("it computes an integer that is too large")
        elif operator == "*":
            for value, count in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple) and isinstance(count, int):
                    check_length((len(value) if isinstance(value, str) else _budget.get().weight(value)) * count)
        return self.weighed(super().call_binop(context, operator, left, right))

    @staticmethod
    def _check_percent(text: str, values: object) -> None:
        """Raise `TemplateError` if `%` could make a text that is too long."""
        if _WIDE.search(text):
            raise TemplateError("it formats with a width that is too large or not its own")
        check_length(len(text) + text.count("%") * _budget.get().weight(values))

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Return an attribute for the template; that of a string is a `Text`'s, whose methods know their limits."""
        return super().getattr(Text(obj) if type(obj) is str else obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Return an item, or else an attribute."""
        return super().getitem(Text(obj) if type(obj) is str else obj, argument)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Tell whether the template may have an attribute."""
        refused = _NO_METHODS_OF_MARKUP | _NO_METHODS if isinstance(obj, Markup) else _NO_METHODS
        return super().is_safe_attribute(obj, attr, value) and not (isinstance(obj, str) and attr in refused)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return what takes the place of a string's `format`."""
        if super().wrap_str_format(value) is None:
            return None
        if value.__name__ == "format_map" or isinstance(value.__self__, Markup):
            raise SecurityError("a template may not use format_map, nor format after `safe`")
        return functools.partial(self._format, value.__self__)

    def _format(self, text: str, *args: Any, **kwargs: Any) -> Text:
        """As `str.format`, without widths that come from elsewhere; what is written stays written."""
        formatter, parts, count = SandboxedFormatter(self), [], 0
        is_literal = all(written(text))
        for literal, field, spec, conversion in Formatter().parse(text):
            parts.append(Text.literal(literal) if is_literal else Text(literal, bytes(len(literal))))
            if field is None:
                continue
            if field[:1] in ("", ".", "["):
                field, count = f"{count}{field}", count + 1
            if spec and re.search(r"[{]|\d{5}", spec):
                raise TemplateError("it formats with a width that is too large or not its own")
            value, _ = formatter.get_field(field, args, kwargs)
            value = formatter.convert_field(value, conversion)
            parts.append(value if isinstance(value, Text) and not spec else formatter.format_field(value, spec or ""))
        return Text().join(parts)

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter or test that stays within the budget."""

        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self.spend()
            if name == "format":
                self._check_percent(str(args[0]), args[1:] or kwargs)
            if name not in ("default", "d", "int", "float"):
                for argument in (*args[1:], *kwargs.values()):
                    if isinstance(argument, int) and abs(argument) > _MAX_ARGUMENT:
                        raise TemplateError(f"it calls {name} with {argument}; {_MAX_ARGUMENT:,} is the limit")
            result = function(*args, **kwargs)
            return map(self.weighed, result) if isinstance(result, GeneratorType) else self.weighed(result)

        return bounded

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """As `json.dumps`, without jinja's escapes for HTML."""
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        return self.concat(encoder.iterencode(value)) if indent is not None else encoder.encode(value)


@pass_eval_context
def _join(context: EvalContext, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    joined: str = do_join(context, value, Text(d), attribute)
    return joined


def _replace(s: object, old: object, new: object, count: int | None = None) -> str:
    return Text(s).replace(str(old), str(new), -1 if count is None else count)


def _indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    check_length(len(s) + (str(s).count("\n") + 1) * (width if isinstance(width, int) else len(width)))
    return do_indent(s, width, first, blank)


def _raise_exception(message: object) -> NoReturn:
    raise Refusal(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
