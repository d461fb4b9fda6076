"""Another copy of llama.cpp in the process, with the same symbols, and ours do not call each other."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# Symbols of a foreign libllama. Ours must never call these, and calls to these must never resolve to ours.
FOREIGN = """
int llama_max_devices(void) { return 4242; }
int llama_backend_init(void) { __builtin_trap(); return 0; }
void * llama_model_load_from_file(void) { __builtin_trap(); return 0; }
int llama_decode(void) { __builtin_trap(); return 0; }
void * ggml_init(void) { __builtin_trap(); return 0; }
void ggml_backend_load_all(void) { __builtin_trap(); }
void * ggml_get_type_traits(void) { __builtin_trap(); return 0; }
void * ggml_backend_cpu_buffer_type(void) { __builtin_trap(); return 0; }
void * ggml_backend_init(void) { __builtin_trap(); return 0; }
void * ggml_backend_cpu_reg(void) { __builtin_trap(); return 0; }
void * ggml_threadpool_new(void) { __builtin_trap(); return 0; }
long ggml_nelements(void) { __builtin_trap(); return 0; }
void ggml_vec_dot_f32(void) { __builtin_trap(); }
int foreign_calls_its_own(void) { return llama_max_devices(); }
"""

GENERATE = """
import minerva_native as mn
with mn.Model.demo() as model, model.context(n_ctx=64) as context:
    sequence = context.sequence()
    sequence.extend(model.tokenizer.encode("Once"))
    assert len(list(mn.generate(sequence, max_tokens=4))) > 0
"""

FOREIGN_ANSWERS = """
import ctypes, os
foreign = ctypes.CDLL(os.environ["FOREIGN"], mode=ctypes.RTLD_GLOBAL)
assert foreign.foreign_calls_its_own() == 4242
"""


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        pytest.skip("this machine has no C compiler")
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "llama.c").write_text(FOREIGN)
    library = folder / "libllama.so"
    command = [compiler, "-w", "-fno-builtin", "-shared", "-fPIC", str(folder / "llama.c"), "-o", str(library)]
    subprocess.run([*command, *([] if sys.platform == "darwin" else ["-Wl,-soname,libllama.so"])], check=True)
    return library


@pytest.mark.parametrize("script", [FOREIGN_ANSWERS + GENERATE, GENERATE + FOREIGN_ANSWERS + GENERATE])
def test_a_foreign_libllama_can_be_loaded_before_or_after(foreign: Path, script: str) -> None:
    environment = {**os.environ, "FOREIGN": str(foreign)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=120)


def test_the_module_exports_only_its_init_function_and_a_backend_its_own() -> None:
    import ctypes

    from minerva_native._binding import FOLDER, _llama

    module = ctypes.CDLL(_llama.__file__)
    assert module.PyInit__llama
    backends = [ctypes.CDLL(str(file)) for file in FOLDER.glob("libggml-*.so")]
    assert all(backend.minerva_backend_init for backend in backends)
    for library in (module, *backends):
        for name in (
            "llama_decode",
            "ggml_init",
            "gguf_init_from_file",
            "ggml_backend_init",
            "ggml_abort",
            "minerva_log",
        ):
            assert not hasattr(library, name)


def test_the_package_works_from_any_folder(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", GENERATE], cwd=tmp_path, env=environment, check=True, timeout=120)
