"""The generated binding against an independent parse of the pinned header, and against the C compiler."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from minerva_native._binding import ffi, lib


@pytest.fixture(scope="session")
def header(llama_cpp_source: Path) -> str:
    text = (llama_cpp_source / "include" / "llama.h").read_text()
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)


@pytest.fixture(scope="session")
def compiler() -> str:
    found = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not found:
        pytest.skip("this machine has no C compiler")
    return found


def without_deprecated(text: str) -> str:
    """Remove every `DEPRECATED(...)` with balanced parentheses."""
    kept, position = [], 0
    for match in re.finditer(r"\bDEPRECATED\(", text):
        if match.start() < position:
            continue
        kept.append(text[position : match.start()])
        depth, position = 1, match.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(text[position], 0)
            position += 1
    return "".join([*kept, text[position:]])


def api_functions(text: str) -> set[str]:
    body = re.sub(r"^#.*(\\\n.*)*$", "", text, flags=re.M)
    return set(re.findall(r"\bLLAMA_API\b[^;(]*?\b(\w+)\s*\(", without_deprecated(body)))


def run_c(compiler: str, source_folder: Path, folder: Path, statements: list[str]) -> list[int]:
    program = folder / "probe.c"
    body = "\n".join(f'printf("%lld\\n", (long long) ({statement}));' for statement in statements)
    program.write_text(f"#include <llama.h>\n#include <stddef.h>\n#include <stdio.h>\nint main(void) {{ {body} }}\n")
    includes = [f"-I{source_folder / path}" for path in ("include", "ggml/include")]
    subprocess.run([compiler, "-w", *includes, str(program), "-o", str(folder / "probe")], check=True)
    output = subprocess.run([str(folder / "probe")], capture_output=True, text=True, check=True).stdout
    return [int(line) for line in output.split()]


def test_every_function_of_the_header_that_is_not_deprecated_is_bound(header: str) -> None:
    expected = api_functions(header)
    assert len(expected) > 180
    assert sorted(name for name in expected if not hasattr(lib, name)) == []


def test_no_deprecated_function_is_bound(header: str) -> None:
    assert not hasattr(lib, "llama_load_model_from_file")
    assert {name for name in dir(lib) if name.startswith("llama_")} == api_functions(header)


def test_struct_fields_are_those_of_the_header(header: str) -> None:
    structs = re.findall(r"\bstruct\s+(llama_\w+)\s*\{([^{}]*)\}", header)
    assert len(structs) > 10
    for struct, body in structs:
        field = r"\(\s*\*\s*(\w+)\s*\)\s*\([^;]*\)\s*;|(\w+)\s*(?:\[\w+\])?\s*;"
        declared = [pointer or plain for pointer, plain in re.findall(field, body)]
        assert [name for name, _ in ffi.typeof(f"struct {struct}").fields] == declared, struct


def test_struct_layouts_are_the_c_compilers(header: str, compiler: str, llama_cpp_source: Path, tmp_path: Path) -> None:
    statements, bound = [], []
    for name in set(re.findall(r"\bstruct\s+(llama_\w+)\s*\{", header)):
        kind = ffi.typeof(f"struct {name}")
        statements.append(f"sizeof(struct {name})")
        bound.append(ffi.sizeof(kind))
        for field, description in kind.fields:
            if field:
                statements.append(f"offsetof(struct {name}, {field})")
                bound.append(description.offset)
    assert len(statements) > 100
    assert run_c(compiler, llama_cpp_source, tmp_path, statements) == bound


def test_constants_are_the_c_compilers(header: str, compiler: str, llama_cpp_source: Path, tmp_path: Path) -> None:
    enumerations = re.findall(r"\benum\s+llama_\w+\s*\{([^{}]*)\}", header)
    names = [name for body in enumerations for name in re.findall(r"(?:^|,)\s*(LLAMA_\w+)", body)]
    names += ["LLAMA_DEFAULT_SEED", "LLAMA_TOKEN_NULL", "LLAMA_SESSION_MAGIC", "GGML_MAX_DIMS", "GGUF_VERSION"]
    assert len(names) > 120
    assert run_c(compiler, llama_cpp_source, tmp_path, names) == [getattr(lib, name) for name in names]


def test_the_stub_names_everything_in_the_library() -> None:
    import minerva_native._binding as binding
    from minerva_native._binding import _llama

    stubs = [Path(path) / "_llama.pyi" for path in binding.__path__]
    compiled = Path(_llama.__file__).with_name("_llama.pyi")
    stub = next(path for path in [compiled, *stubs] if path.is_file()).read_text()
    named = set(re.findall(r"^    (?:def )?(\w+)[(:]", stub.partition("class Lib:")[2], re.M))
    assert set(dir(lib)) - named == set()
