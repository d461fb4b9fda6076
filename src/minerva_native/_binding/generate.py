"""Generate the cffi module and its type stub from llama.cpp's headers, at build time.

The C preprocessor expands `llama.h` and our `hooks.h`. Their declarations are parsed and passed to cffi in API mode, in
which the C compiler supplies every struct layout, enumerator and constant. No declaration is written by hand, so moving
the pin updates the binding.
"""

import argparse
import keyword
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import cffi
from pycparser import c_ast, c_generator, c_parser

HEADERS = ("ggml.h", "ggml-backend.h", "ggml-cpu.h", "ggml-opt.h", "gguf.h", "llama.h")

# What the engine needs of ggml.h: types, their sizes and traits, logging, versions, clocks, CPU thread pools, tensors.
# Of llama.h, gguf.h and ggml-backend.h every function is bound.
GGML_FUNCTIONS = re.compile(
    r"ggml_(log|time|cycles|type|threadpool|is_quantized|blck_size|row_size|quantize|ftype|version|commit|status"
    r"|abort|set_abort|fp16|fp32|bf16|nbytes|nelements|get_name|get_no_alloc|init|free|get_first_tensor|get_next_tensor"
    r"|get_tensor|get_type_traits|new_tensor|tensor_overhead)\w*"
)

# Declared in the pinned headers but not defined in the source: the module could not be loaded if it were bound.
UNDEFINED = {"ggml_threadpool_get_n_threads"}

# Its functions are not bound: they are the CPU backend's, which may be a file of its own (see loading.cpp).
OF_A_BACKEND = "ggml-cpu.h"

# The standard types that upstream's headers use; cffi knows them all.
PRELUDE_NAMES = (
    *(f"{sign}int{bits}_t" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    *("size_t", "ptrdiff_t", "intptr_t", "uintptr_t", "FILE", "va_list"),
)
PRELUDE = "".join(f"typedef int {name};\n" for name in PRELUDE_NAMES)

# Our header, next to this file, is parsed with upstream's. Functions that it marks are defined in Python.
HOOKS = Path(__file__).with_name("hooks.h")
PYTHON_MARK = "MINERVA_PYTHON"

STUB_HEAD = '''"""The compiled binding's types, generated from the C headers at build time."""

from collections.abc import Callable
from typing import Any, Final, TypeAlias

CData: TypeAlias = Any

class FFI:
    NULL: Final[CData]
    error: type[Exception]
    def new(self, cdecl: str, init: object = ...) -> CData: ...
    def cast(self, cdecl: str, value: object) -> CData: ...
    def init_once(self, function: Callable[[], object], tag: str) -> Any: ...
    def string(self, cdata: CData, maxlen: int = ...) -> bytes: ...
    def unpack(self, cdata: CData, length: int) -> Any: ...
    def buffer(self, cdata: CData, size: int = ...) -> Any: ...
    def from_buffer(self, cdecl: str, buffer: object, require_writable: bool = ...) -> CData: ...
    def memmove(self, dest: object, src: object, n: int) -> None: ...
    def new_handle(self, value: object) -> CData: ...
    def from_handle(self, handle: CData) -> Any: ...
    def gc(self, cdata: CData, destructor: Callable[[CData], object] | None, size: int = ...) -> CData: ...
    def release(self, cdata: CData) -> None: ...
    def addressof(self, cdata: CData, *fields: str | int) -> CData: ...
    def typeof(self, cdecl: object) -> Any: ...
    def sizeof(self, cdecl: object) -> int: ...
    def offsetof(self, cdecl: object, *fields: str | int) -> int: ...
    def list_types(self) -> tuple[list[str], list[str], list[str]]: ...
    def def_extern(
        self, name: str = ..., error: object = ..., onerror: Callable[..., object] | None = ...
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]: ...

ffi: FFI

class Lib:'''


class Api(NamedTuple):
    """The declarations of the headers, in order.

    Attributes:
        types: C declarations of types.
        functions: functions that C defines.
        callbacks: functions that Python defines.
        constants: names of enumerators and of integer macros.
    """

    types: list[str]
    functions: list[c_ast.Decl]
    callbacks: list[c_ast.Decl]
    constants: list[str]


def preprocess(compiler: str, include_dirs: list[Path], *options: str) -> str:
    """Expand the headers with the C preprocessor; return the lines of upstream's headers and ours, not the system's."""
    source = "".join(f"#include <{name}>\n" for name in (*HEADERS, HOOKS.name))
    include_dirs = [*include_dirs, HOOKS.parent]
    mark = f"-D{PYTHON_MARK}={PYTHON_MARK}"  # expands to itself, so that the mark is still there afterwards
    command = [compiler, "-E", mark, *options, *(f"-I{path}" for path in include_dirs), "-x", "c", "-"]
    text = subprocess.run(command, input=source, stdout=subprocess.PIPE, text=True, check=True).stdout
    kept, ours = [], False
    for line in text.splitlines():
        marker = re.match(r'#\s*(?:line\s+)?\d+\s+"([^"]*)"', line)
        if marker:
            ours = Path(marker[1]).parent in include_dirs
        elif ours:
            kept.append(line)
    return "\n".join(kept)


def functions_of(include_dirs: list[Path], header: str) -> set[str]:
    """Return the names of the functions that a header declares."""
    text = next(path / header for path in include_dirs if (path / header).is_file()).read_text()
    return set(re.findall(r"^\s*GGML\w*_API\b[^;()]*?\b(\w+)\s*\(", text, re.M))


def statements(text: str) -> Iterator[str]:
    """Split C text into its top-level declarations and function definitions."""
    depth, start = 0, 0
    for match in re.finditer(r'[{};]|"(?:\\.|[^"\\])*"', text):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        body_ends = match[0] == "}" and re.match(r"\s*static\b[^{=;]*\)\s*\{", text[start:])
        if depth == 0 and (match[0] == ";" or body_ends):
            yield text[start : match.end()].strip()
            start = match.end()


def read_api(text: str, macros: str, unbound: set[str]) -> Api:
    """Parse the declarations, except deprecated and static ones and functions that are not bound, such as `unbound`."""
    attribute = re.compile(r'__attribute__\s*\(\((?:[^()"]|"(?:\\.|[^"\\])*"|\([^()]*\))*\)\)')
    kept = [
        re.sub(r"\b(__extension__|_Noreturn|__?restrict|restrict)\b", "", attribute.sub("", statement))
        for statement in statements(text)
        if not re.search(r"\bdeprecated\b|^(static|_Static_assert)\b", statement)
    ]
    in_python = {re.findall(r"(\w+)\s*\(", statement)[0] for statement in kept if statement.startswith(PYTHON_MARK)}
    source = PRELUDE + re.sub(rf"\b{PYTHON_MARK}\b", "", "\n".join(kept))
    types: list[str] = []
    functions: list[c_ast.Decl] = []
    callbacks: list[c_ast.Decl] = []
    constants: list[str] = []
    for node in c_parser.CParser().parse(source).ext[len(PRELUDE_NAMES) :]:
        if isinstance(node, c_ast.Decl) and isinstance(node.type, c_ast.FuncDecl):
            if node.name in in_python:
                callbacks.append(node)
            elif is_wanted(node.name) and node.name not in unbound:
                functions.append(node)
        else:
            declaration = TypeWriter().visit(node) + ";"
            if declaration not in types:
                types.append(declaration)
            constants += EnumeratorNames().collect(node)
    return Api(types, functions, callbacks, [*constants, *integer_macros(macros)])


def integer_macros(text: str) -> list[str]:
    """Return the names of the macros whose value is an integer, directly or through other macros."""
    value = r"\(?\s*(-?\w+)\s*\)?"
    macros = dict(re.findall(rf"^#define\s+((?:LLAMA|GGML|GGUF|MINERVA)_\w+)[ \t]+{value}[ \t]*$", text, re.M))

    def is_integer(word: str) -> bool:
        if word in macros:
            return is_integer(macros[word])
        return bool(re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)[uUlL]*", word))

    return [name for name in macros if is_integer(name)]


def is_wanted(name: str) -> bool:
    """Return whether a function is bound."""
    whole = name.startswith(("llama_", "gguf_", "ggml_backend_", "ggml_opt_", "ggml_cpu_", "minerva_"))
    return (whole or bool(GGML_FUNCTIONS.fullmatch(name))) and name not in UNDEFINED


class EnumeratorNames(c_ast.NodeVisitor):
    """A visitor that collects the names of enumerators."""

    def collect(self, node: c_ast.Node) -> list[str]:
        """Return the names of the enumerators in `node`."""
        self.names: list[str] = []
        self.visit(node)
        return self.names

    def visit_Enumerator(self, node: c_ast.Enumerator) -> None:
        """Collect one name."""
        self.names.append(node.name)


class TypeWriter(c_generator.CGenerator):
    """A writer of declarations that leaves values, array bounds and layouts to the C compiler."""

    depth = 0

    def visit_Enum(self, node: c_ast.Enum) -> str:
        """Leave every enumerator's value to the compiler."""
        name = f"enum {node.name or ''}"
        if node.values is None:
            return name
        return f"{name} {{ {', '.join(item.name for item in node.values.enumerators)}, ... }}"

    def visit_Struct(self, node: c_ast.Struct) -> str:
        """Leave the layout to the compiler."""
        return self.visit_members("struct", node)

    def visit_Union(self, node: c_ast.Union) -> str:
        """Leave the layout to the compiler."""
        return self.visit_members("union", node)

    def visit_members(self, kind: str, node: c_ast.Struct | c_ast.Union) -> str:
        """Write a struct or union. cffi requires an anonymous one inside another to be complete."""
        if node.decls is None:
            return f"{kind} {node.name}"
        self.depth += 1
        members = "".join(f"{self.visit(member)};\n" for member in node.decls)
        self.depth -= 1
        open_end = "" if self.depth and not node.name else "...;"
        return f"{kind} {node.name or ''} {{\n{members}{open_end} }}"

    def visit_BinaryOp(self, node: c_ast.BinaryOp) -> str:
        """Leave an array bound that is an expression to the compiler."""
        return "..."


def write_cdef(api: Api) -> str:
    """Return the declarations for `ffi.cdef`."""
    writer = TypeWriter()
    functions = [re.sub(r"^extern ", "", writer.visit(function)) + ";" for function in api.functions]
    functions += [f'extern "Python+C" {writer.visit(callback)};' for callback in api.callbacks]
    enumerators = set(re.findall(r"\b[A-Z][A-Z0-9_]+\b", " ".join(api.types)))
    macros = [f"#define {name} ..." for name in api.constants if name not in enumerators]
    return "\n".join([*api.types, *functions, *macros])


def write_stub(api: Api) -> str:
    """Return the type stub: `lib` with every function and constant, and `ffi` as far as it can be typed."""
    functions = [stub_function(function) for function in api.functions]
    constants = [f"    {name}: Final[int]" for name in dict.fromkeys(api.constants)]
    callbacks = [f"    {callback.name}: CData" for callback in api.callbacks]
    return "\n".join([STUB_HEAD, *constants, *functions, *callbacks, "", "lib: Lib", ""])


def stub_function(function: c_ast.Decl) -> str:
    """Return the stub of one function: a method with positional-only arguments, because cffi takes no keywords."""
    arguments = ["self"]
    variadic = False
    for number, parameter in enumerate(function.type.args.params if function.type.args else ()):
        if isinstance(parameter, c_ast.EllipsisParam):
            variadic = True
        elif not (isinstance(parameter, c_ast.Typename) and names_of(parameter.type) == ["void"]):
            name = getattr(parameter, "name", None) or f"arg{number}"
            name += "_" if keyword.iskeyword(name) else ""
            arguments.append(f"{name}: {python_type(parameter.type, argument=True)}")
    arguments += ["/", "*args: CData"] if variadic else ["/"]
    return f"    def {function.name}({', '.join(arguments)}) -> {python_type(function.type.type, argument=False)}: ..."


def names_of(node: c_ast.Node) -> list[str]:
    """Return the type names of a plain declaration, or an empty list for pointers, structs and arrays."""
    if isinstance(node, c_ast.TypeDecl):
        if isinstance(node.type, c_ast.IdentifierType):
            return list(node.type.names)
        return ["enum"] if isinstance(node.type, c_ast.Enum) else []
    return []


def python_type(node: c_ast.Node, argument: bool) -> str:
    """Return the Python type that cffi accepts for an argument of a C type, or returns for a result."""
    names = names_of(node)
    if names == ["void"]:
        return "None"
    if names == ["_Bool"]:
        return "bool"
    if names and {"float", "double"} & set(names):
        return "float"
    integer = re.compile(
        r"u?int\d*_t|size_t|int|unsigned|long|short|char|enum|llama_(pos|token|seq_id|state_seq_flags)"
    )
    if names and all(integer.fullmatch(name) for name in names):
        return "int"
    if argument and isinstance(node, c_ast.PtrDecl) and names_of(node.type) == ["char"]:
        return "bytes | CData"
    return "CData"


def write_module(path: Path, api: Api) -> None:
    """Write the C source of the extension module."""
    ffi = cffi.FFI()
    ffi.cdef(write_cdef(api))
    ffi.set_source("minerva_native._binding._llama", "".join(f"#include <{name}>\n" for name in (*HEADERS, HOOKS.name)))
    ffi.emit_c_code(str(path))


def write_if_changed(path: Path, text: str) -> None:
    """Write a file, but leave it and its time stamp alone if it has this text, so that nothing is recompiled."""
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def main(arguments: Iterable[str] | None = None) -> None:
    """Run as a script, as the build does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cc", required=True, help="the C compiler")
    parser.add_argument("--include", type=Path, action="append", required=True, help="a folder of upstream headers")
    parser.add_argument("--module", type=Path, required=True, help="the C file to write")
    parser.add_argument("--stub", type=Path, required=True, help="the type stub to write")
    options = parser.parse_args(None if arguments is None else list(arguments))
    declarations, macros = preprocess(options.cc, options.include), preprocess(options.cc, options.include, "-dD")
    api = read_api(declarations, macros, functions_of(options.include, OF_A_BACKEND))
    write_module(options.module, api)
    write_if_changed(options.stub, write_stub(api))


if __name__ == "__main__":
    main()
