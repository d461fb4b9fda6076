"""Tools: what a model may call, from Python functions or from OpenAI's dicts."""

import dataclasses
import enum
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .._arguments import many, what
from .calls import to_json

_SCALARS: dict[object, str] = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}

_MAX_NAME = 256
_NAME = re.compile(r"[^\s<>\[\]{}()\"'=｜|,;]+")


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
    return result if isinstance(result, str) else to_json(_plain(result))


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
    if len(name) > _MAX_NAME or not _NAME.fullmatch(name):
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
    return Tool(name, description, dict(parameters))


def _of_function(function: object) -> Tool:
    if not callable(function) or isinstance(function, type):
        raise TypeError(f"a tool must be a function or a dict, not {what(function)}")
    name = getattr(function, "__name__", None)
    if name is None or name == "<lambda>":
        raise TypeError("a tool must have a name: write a function with def, not a lambda or a partial")
    _check_name(name)
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(f"the tool {name!r} is a generator: a tool is a function that returns its result")
    hints = _hints(function, name)
    description, described = _docstring(inspect.getdoc(function) or "")
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


_SECTION = re.compile(r"(Args|Arguments|Parameters|Returns?|Yields|Raises|Examples?|Notes?|Attributes):\s*$")
_ARGUMENT = re.compile(r"\*{0,2}(\w+)\s*(?:\([^)]*\))?:\s*(.*)")


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """Return the description in a docstring of Google's style, and those of the arguments."""
    lines = text.splitlines()
    first = next((n for n, line in enumerate(lines) if _SECTION.match(line)), len(lines))
    found: dict[str, str] = {}
    section, name, indent = "", "", None
    for line in lines[first:]:
        if heading := _SECTION.match(line):
            section, indent, name = heading[1], None, ""
            continue
        if section not in ("Args", "Arguments", "Parameters") or not line.strip():
            continue
        depth = len(line) - len(line.lstrip())
        indent = depth if indent is None else indent
        argument = _ARGUMENT.match(line.strip())
        if depth <= indent and argument:
            name = argument[1]
            found[name] = argument[2].strip()
        elif name:
            found[name] = f"{found[name]} {line.strip()}".strip()
    return "\n".join(lines[:first]).strip(), {name: text for name, text in found.items() if text}


def _is_pydantic(hint: object) -> bool:
    pydantic = sys.modules.get("pydantic")  # a model of it cannot be here otherwise
    return pydantic is not None and isinstance(hint, type) and issubclass(hint, pydantic.BaseModel)


def _schema(hint: Any, definitions: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the JSON schema of a type hint; classes go into the definitions."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is object:
        return {}
    if hint in _SCALARS if isinstance(hint, type) else hint is None:
        return {"type": _SCALARS.get(hint, "null")}
    if origin is typing.Annotated:
        notes = [note for note in arguments[1:] if isinstance(note, str)]
        inner = _schema(arguments[0], definitions, where)
        return inner | {"description": notes[0]} if notes else inner
    if origin is typing.Literal:
        return {"enum": [_plain(value) for value in arguments]}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema(each, definitions, where) for each in arguments]}
    if origin in (typing.Required, typing.NotRequired):
        return _schema(arguments[0], definitions, where)
    if hint is list or origin in (list, set, frozenset) or _is_abstract_list(origin):
        return {"type": "array"} | ({"items": _schema(arguments[0], definitions, where)} if arguments else {})
    if origin is tuple:
        if arguments[-1:] == (...,):
            return {"type": "array", "items": _schema(arguments[0], definitions, where)}
        items = [_schema(each, definitions, where) for each in arguments]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if hint is dict or origin in (dict, typing.get_origin(Mapping[str, Any])):
        if arguments and arguments[0] is not str:
            raise TypeError(f"the keys of {where} must be str, as JSON has no others")
        values = _schema(arguments[1], definitions, where) if arguments else {}
        return {"type": "object"} | ({"additionalProperties": values} if values else {})
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {"enum": [_plain(member.value) for member in hint]}
    if _is_pydantic(hint):
        return _of_pydantic(hint, definitions)
    if dataclasses.is_dataclass(hint) or typing.is_typeddict(hint):
        return _of_class(typing.cast(type, hint), definitions, where)
    name = getattr(hint, "__name__", repr(hint))
    raise TypeError(f"the type hint of {where} has no JSON schema: {name}")


def _is_abstract_list(origin: object) -> bool:
    return getattr(origin, "__module__", "") == "collections.abc" and getattr(origin, "__name__", "") in (
        "Sequence",
        "Iterable",
        "Collection",
        "Set",
    )


def _of_class(hint: type, definitions: dict[str, Any], where: str) -> dict[str, Any]:
    """Put a dataclass or a TypedDict into the definitions, and return a reference."""
    name = hint.__name__
    reference = {"$ref": f"#/$defs/{name}"}
    if name in definitions:
        return reference
    definitions[name] = {}  # it may refer to itself
    hints = _hints(hint, name)
    if dataclasses.is_dataclass(hint):
        own = [each for each in dataclasses.fields(hint) if each.init]
        names = [each.name for each in own]
        missing = dataclasses.MISSING
        required = [each.name for each in own if each.default is missing and each.default_factory is missing]
    else:
        names = list(hints)
        required = [each for each in hints if each in typing.cast(Any, hint).__required_keys__]
    _, described = _docstring(inspect.getdoc(hint) or "")
    properties = {}
    for each in names:
        schema = _schema(hints[each], definitions, f"{each!r} of {name}, for {where}")
        properties[each] = schema | ({"description": described[each]} if each in described else {})
    definitions[name] = {"type": "object", "properties": properties, "required": required}
    return reference


def _of_pydantic(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    schema = hint.model_json_schema(ref_template="#/$defs/{model}")
    definitions.update(schema.pop("$defs", {}))
    definitions[hint.__name__] = schema
    return {"$ref": f"#/$defs/{hint.__name__}"}


def _default(value: object) -> object:
    """Return a default as JSON has it, or `...` if it has not."""
    try:
        plain = _plain(value)
        to_json(plain)
    except (TypeError, ValueError):
        return ...
    return plain


def _plain(value: object) -> Any:
    """Return a value with what JSON has in place of enums, dataclasses, models, tuples and sets."""
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if _is_pydantic(type(value)):
        return typing.cast(Any, value).model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(each) for each in value]
    return value


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Return a JSON value as what a type hint wants; raise `ValueError` if it does not fit."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is object:
        return value
    if origin is typing.Annotated or origin in (typing.Required, typing.NotRequired):
        return _convert(value, arguments[0], where)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, arguments, where)
    if origin is typing.Literal:
        for each in arguments:
            if type(_plain(each)) is type(value) and _plain(each) == value:
                return each
        raise ValueError(f"{where} must be one of {', '.join(map(repr, arguments))}, not {value!r}")
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        for member in hint:
            if _plain(member.value) == value:
                return member
        raise ValueError(f"{where} must be one of {', '.join(repr(member.value) for member in hint)}, not {value!r}")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is None or (isinstance(hint, type) and hint in _SCALARS):
        wanted = type(None) if hint is None else hint
        if type(value) is not wanted:
            raise ValueError(f"{where} must be {_SCALARS[wanted]}, not {value!r}")
        return value
    if _is_pydantic(hint):
        return hint.model_validate(value)
    if dataclasses.is_dataclass(hint) or typing.is_typeddict(hint):
        return _convert_class(value, typing.cast(type, hint), where)
    if hint is dict or origin in (dict, typing.get_origin(Mapping[str, Any])):
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be an object, not {value!r}")
        return {key: _convert(each, arguments[1], where) for key, each in value.items()} if arguments else value
    return _convert_list(value, hint, where)


def _convert_union(value: Any, hints: tuple[Any, ...], where: str) -> Any:
    errors = []
    for exact in (True, False):  # an int before the float that it could be
        for hint in hints:
            if exact and isinstance(hint, type) and type(value) is not hint:
                continue
            try:
                return _convert(value, hint, where)
            except (TypeError, ValueError) as error:
                errors.append(error)
    raise errors[-1]


def _convert_list(value: Any, hint: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if not isinstance(value, list):
        raise ValueError(f"{where} must be an array, not {value!r}")
    kind = origin if origin in (list, tuple, set, frozenset) else list
    if origin is tuple and arguments[-1:] != (...,):
        if len(value) != len(arguments):
            raise ValueError(f"{where} must have {len(arguments)} items, not {len(value)}")
        return tuple(_convert(each, one, where) for each, one in zip(value, arguments, strict=True))
    inner = arguments[0] if arguments else Any
    return kind(_convert(each, inner, where) for each in value)


def _convert_class(value: Any, hint: type, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object, not {value!r}")
    hints = _hints(hint, hint.__name__)
    if unknown := [key for key in value if key not in hints]:
        raise ValueError(f"{where} has no {unknown[0]!r}")
    given = {key: _convert(each, hints[key], f"{where}.{key}") for key, each in value.items()}
    try:
        return hint(**given)
    except TypeError as error:
        raise ValueError(f"{where} does not fit {hint.__name__}: {error}") from None
