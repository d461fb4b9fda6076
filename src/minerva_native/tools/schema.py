"""Tools: what a model may call, from Python functions or from OpenAI's dicts."""

import inspect
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .._arguments import many, what
from ..errors import ConstraintError
from ..typed import build, docstring, plain, schema_of
from .calls import to_json

_SCALARS: dict[object, str] = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}

NAME = re.compile(r"[^\s<>\[\]{}()\"'=｜|,;]+")
"""What a tool may be called: no character with which a format could go on after a name."""

_MAX_NAME = 256


@dataclass(frozen=True)
class Tool:
    """Something that a model may call.

    Attributes:
        name: what the model calls it.
        description: what it does.
        parameters: the JSON schema of its arguments, of type "object".
        function: what runs it, or None if the application does.
    """

    name: str
    description: str
    parameters: dict[str, Any]
    function: Callable[..., object] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the tool as OpenAI's API and chat templates have it."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}

    def call(self, arguments: Mapping[str, Any]) -> str:
        """Run the function, and return what goes back to the model: a string as it is, anything else as JSON.

        Raises:
            TypeError, ValueError: there is no function, or the arguments do not fit its parameters. What the function
                raises passes through.
        """
        if self.function is None:
            raise TypeError(f"the tool {self.name!r} has no function: the application runs it")
        return as_text(self.function(**self.bind(arguments)))

    def bind(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of the function, made of those of a call; raises as `call` does."""
        assert self.function is not None
        signature = inspect.signature(self.function)
        hints = _hints(self.function, self.name)
        unknown = [name for name in arguments if name not in signature.parameters]
        if unknown:
            raise TypeError(f"the tool {self.name!r} has no parameter {unknown[0]!r}")
        for name, parameter in signature.parameters.items():
            if name not in arguments and parameter.default is parameter.empty:
                raise TypeError(f"the tool {self.name!r} needs the parameter {name!r}")
        return {name: _convert(value, hints.get(name, Any), name) for name, value in arguments.items()}


def as_text(result: object) -> str:
    """Return what a tool has returned as text for the model: a string as it is, anything else as JSON."""
    return result if isinstance(result, str) else to_json(plain(result))


def read_tools(tools: Iterable[Callable[..., object] | Mapping[str, Any] | Tool]) -> tuple[Tool, ...]:
    """Return tools, each given as a function with type hints, as OpenAI's dict or as a `Tool`.

    A function's description is its docstring, and those of its parameters come from the docstring's "Args:".

    Raises:
        TypeError, ValueError: one of them is no tool, or two have the same name.
    """
    if isinstance(tools, str | Mapping):
        raise TypeError(f"tools must be a list of functions and dicts, not {what(tools)}")
    found: dict[str, Tool] = {}
    for tool in many("tools", tools):
        read = tool if isinstance(tool, Tool) else _of_dict(tool) if isinstance(tool, Mapping) else _of_function(tool)
        if read.name in found:
            raise ValueError(f"two tools are called {read.name!r}")
        found[read.name] = read
    return tuple(found.values())


def _check_name(name: object) -> str:
    if not isinstance(name, str) or not name:
        raise TypeError("a tool must have a name, which is a str")
    if len(name) > _MAX_NAME or not NAME.fullmatch(name):
        raise ValueError(f"a tool cannot be called {name[:_MAX_NAME]!r}: use letters, digits, '_', '-' and '.'")
    return name


def _of_dict(tool: Mapping[str, Any]) -> Tool:
    if tool.get("type", "function") != "function":
        raise ValueError(f"a tool's type must be 'function', not {tool['type']!r}")
    function = tool.get("function", tool)
    if not isinstance(function, Mapping):
        raise TypeError(f"a tool's 'function' must be a dict, not {what(function)}")
    name, description = _check_name(function.get("name")), function.get("description") or ""
    if not isinstance(description, str):
        raise TypeError(f"the description of the tool {name!r} must be a str, not {what(description)}")
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise TypeError(f"the parameters of the tool {name!r} must be a JSON schema of type 'object'")
    properties = parameters.get("properties", {})
    if not isinstance(properties, Mapping):
        raise TypeError(f"the properties of the tool {name!r} must be a dict, not {what(properties)}")
    required = parameters.get("required", [])
    if not isinstance(required, list):
        raise TypeError(f"what is required by the tool {name!r} must be a list, not {what(required)}")
    return Tool(name, description, dict(parameters))


def _of_function(function: object) -> Tool:
    if not callable(function) or isinstance(function, type):
        raise TypeError(f"tools must be functions or dicts, not {what(function)}")
    name = getattr(function, "__name__", None)
    if name is None or name == "<lambda>":
        raise TypeError("a tool must have a name: write a function with def, not a lambda or a partial")
    _check_name(name)
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(f"the tool {name!r} is a generator: a tool is a function that returns its result")
    hints = _hints(function, name)
    description, described = docstring(inspect.getdoc(function) or "")
    definitions: dict[str, Any] = {}
    properties: dict[str, Any] = {}
    required = []
    for parameter in _signature(function, name).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise TypeError(f"the tool {name!r} has the parameter {parameter}, but a model names each argument")
        if parameter.name not in hints:
            raise TypeError(f"the parameter {parameter.name!r} of the tool {name!r} needs a type hint")
        schema = _schema(hints[parameter.name], definitions, f"{parameter.name!r} of the tool {name!r}")
        if parameter.name in described:
            schema = schema | {"description": described[parameter.name]}
        if parameter.default is parameter.empty:
            required.append(parameter.name)
        elif (default := _default(parameter.default)) is not ...:
            schema = schema | {"default": default}
        properties[parameter.name] = schema
    parameters: dict[str, Any] = {"type": "object", "properties": properties, "required": required}
    if definitions:
        parameters["$defs"] = definitions
    return Tool(name, description, parameters, function)


def _signature(function: Callable[..., object], name: str) -> inspect.Signature:
    try:
        return inspect.signature(function)
    except ValueError:
        raise TypeError(f"Python does not know the parameters of {name!r}, so it cannot be a tool") from None


def _hints(function: Callable[..., object], name: str) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError) as error:
        raise TypeError(f"the type hints of the tool {name!r} cannot be read: {error}") from None


def _schema(hint: Any, definitions: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        return schema_of(hint, definitions)
    except TypeError as error:
        raise TypeError(f"the type hint of {where}: {error}") from None


def _default(value: object) -> object:
    """Return a default as JSON has it, or `...` if it has not."""
    try:
        default = plain(value)
        to_json(default)
    except (TypeError, ValueError):
        return ...
    return default


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Return a JSON value as what a type hint wants; raise `ValueError` if it does not fit."""
    try:
        return build(hint, value, where)
    except ConstraintError as error:
        raise ValueError(str(error)) from None
