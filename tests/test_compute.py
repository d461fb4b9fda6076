"""Backends in files: which is chosen, and what is said of one that cannot be loaded."""

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

import minerva_native as mn
from minerva_native._binding import FOLDER, lib, text

FAKE = """
#include "ggml-backend-impl.h"

static const char * name(ggml_backend_reg_t backend) { (void) backend; return NAME; }
static size_t count(ggml_backend_reg_t backend) { (void) backend; return 0; }

static struct ggml_backend_reg backend = {VERSION, {name, count, 0, 0}, 0};

const char * minerva_backend_source(void) { return SOURCE; }
ggml_backend_reg_t minerva_backend_init(const void * host) { (void) host; return IS_FOUND ? &backend : 0; }
int ggml_backend_score(void) { return SCORE; }
_Bool minerva_backend_suits(void) { return SUITS; }

#if defined(NEEDS)
int needed(void);
int need(void) { return needed(); }
#endif
"""

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def compiler() -> str:
    found = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not found:
        pytest.skip("this machine has no C compiler, to make backends with")
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the backends of this build, if they are files."""
    made = tmp_path / "backends"
    made.mkdir()
    for file in FOLDER.glob("libggml-*.so"):
        (made / file.name).symlink_to(file)
    return made


@pytest.fixture
def make(compiler: str, folder: Path, llama_cpp_source: Path) -> Make:
    """A function that compiles a backend without devices: its file's name, and what is special about it."""
    version = next(
        line.split()[2]
        for line in (llama_cpp_source / "ggml" / "src" / "ggml-backend-impl.h").read_text().splitlines()
        if line.strip().startswith("#define GGML_BACKEND_API_VERSION")
    )

    def compiled(file: str, *needed: Path, **different: object) -> Path:
        facts = {
            "NAME": '"RPC"',  # what may be without devices
            "VERSION": version,
            "SOURCE": f'"{text(lib.ggml_commit())}"',
            "IS_FOUND": 1,
            "SCORE": 1,
            "SUITS": 1,
            **different,
        }
        source = folder / "fake.c"
        source.write_text(FAKE)
        include = [f"-I{llama_cpp_source / 'ggml' / name}" for name in ("include", "src")]
        defined = [f"-D{name}={value}" for name, value in facts.items()]
        command = [compiler, "-shared", "-fPIC", *include, *defined, str(source), *map(str, needed)]
        subprocess.run([*command, "-o", str(folder / file)], check=True)
        source.unlink()
        return folder / file

    return compiled


def absent(compiler: str, folder: Path, name: str) -> Path:
    """Make a library of this name for a linker, to be deleted afterwards."""
    (folder / "needed.c").write_text("int needed(void) { return 1; }")
    names = [f"-Wl,-install_name,{name}"] if sys.platform == "darwin" else [f"-Wl,-soname,{name}"]
    command = [compiler, "-shared", "-fPIC", str(folder / "needed.c"), *names, "-o", str(folder / name)]
    subprocess.run(command, check=True)
    (folder / "needed.c").unlink()
    return folder / name


def run(program: str, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run a program in which the backends are those of a folder: what is loaded stays in a process."""
    head = """
        import sys
        from pathlib import Path
        import minerva_native as mn
        devices = sys.modules["minerva_native.devices"]  # the package has a function of this name
        devices.FOLDER = Path(sys.argv[1])
    """
    code = textwrap.dedent(head) + textwrap.dedent(program)
    return subprocess.run(
        [sys.executable, *flags, "-c", code, str(folder)], capture_output=True, text=True, timeout=120, check=False
    )


def described(folder: Path, name: str) -> list[str]:
    """Return whether the backend is loaded, its variant, and what is wrong with it."""
    program = f"""
        import warnings
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = [backend for backend in mn.compute_backends() if backend.name == {name!r}]
        print(found[-1].is_loaded, found[-1].file and found[-1].file.name, found[-1].variant, sep="\\n")
        print(found[-1].why_not, end="")
    """
    ended = run(program, folder)
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout.split("\n")


def test_every_build_has_a_loaded_backend_for_the_cpu() -> None:
    (cpu,) = [backend for backend in mn.compute_backends() if backend.name == "CPU"]
    assert cpu.is_loaded
    assert cpu.why_not == ""
    assert (cpu.file is not None) == ("GGML_BACKEND_DL" in mn.build_info()["options"])


def test_the_variant_with_the_highest_score_is_loaded(make: Make, folder: Path) -> None:
    for variant, score in {"old": 1, "new": 3, "newer": 2, "foreign": 0}.items():
        make(f"libggml-fake-{variant}.so", SCORE=score, NAME='"FAKE"')
    assert described(folder, "FAKE")[:3] == ["True", "libggml-fake-new.so", "new"]


def test_a_variant_built_with_more_than_this_cpu_has_is_not_loaded(make: Make, folder: Path) -> None:
    make("libggml-fake-more.so", SCORE=3, SUITS=0, NAME='"FAKE"')
    make("libggml-fake-less.so", SCORE=2, NAME='"FAKE"')
    assert described(folder, "FAKE")[:3] == ["True", "libggml-fake-less.so", "less"]
    (folder / "libggml-fake-less.so").unlink()  # of one alone it is said
    loaded, _, _, why = described(folder, "FAKE")
    assert (loaded, why) == ("False", "libggml-fake-more.so: it needs instructions that this CPU does not have")


def test_a_variant_that_cannot_be_loaded_gives_way_to_the_next_and_is_named(make: Make, folder: Path) -> None:
    make("libggml-fake-good.so", SCORE=1, NAME='"FAKE"')
    make("libggml-fake-better.so", SCORE=2, NAME='"FAKE"', SOURCE='"another"')
    (folder / "libggml-fake-best.so").write_text("no library")
    loaded, _, variant, why_not = described(folder, "FAKE")
    assert (loaded, variant) == ("True", "good")
    assert "libggml-fake-best.so" in why_not
    assert "libggml-fake-better.so: it was built from llama.cpp another" in why_not


def test_a_backend_whose_library_is_missing_is_named_with_the_library_and_the_remedy(
    make: Make, folder: Path, compiler: str
) -> None:
    library = absent(compiler, folder, "libcublas.so.999")
    make("libggml-cuda.so", library, NEEDS=1)
    library.unlink()
    loaded, file, _, why_not = described(folder, "CUDA")
    assert (loaded, file) == ("False", "libggml-cuda.so")
    assert why_not == "libcublas.so.999 is missing: pip install 'minerva-native[cuda]'"


@pytest.mark.parametrize(
    ("different", "why_not"),
    [
        ({"VERSION": 1}, "libggml-vulkan.so: its interface is version 1 of ggml's, and this module's is "),
        ({"SOURCE": '"another"'}, "libggml-vulkan.so: it was built from llama.cpp another, and this module from "),
        ({"IS_FOUND": 0}, "libggml-vulkan.so: it found nothing that it can compute on"),
        ({"SCORE": 0}, "libggml-vulkan.so: it needs instructions that this CPU does not have"),
    ],
    ids=["interface", "commit", "nothing to compute on", "another CPU"],
)
def test_a_backend_that_does_not_fit_is_not_loaded(
    make: Make, folder: Path, different: dict[str, object], why_not: str
) -> None:
    make("libggml-vulkan.so", **different)
    loaded, _, _, found = described(folder, "Vulkan")
    assert loaded == "False"
    assert found.startswith(why_not)


def test_a_file_that_is_no_library_is_not_loaded(folder: Path) -> None:
    (folder / "libggml-vulkan.so").write_text("no library")
    loaded, _, _, why_not = described(folder, "Vulkan")
    assert loaded == "False"
    assert why_not.startswith("libggml-vulkan.so: ")


def test_a_library_that_is_no_backend_of_this_package_is_not_loaded(folder: Path, compiler: str) -> None:
    absent(compiler, folder, "libggml-vulkan.so")
    assert described(folder, "Vulkan")[3] == "libggml-vulkan.so: it is not a backend of this package"


def test_a_backend_without_a_device_is_loaded_and_says_so(make: Make, folder: Path) -> None:
    make("libggml-cuda.so", NAME='"CUDA"')
    loaded, _, _, why_not = described(folder, "CUDA")
    assert (loaded, why_not) == ("True", "it finds no device")


BROKEN = """
    with mn.Model.demo() as model, model.context(n_ctx=64) as context, context.sequence() as sequence:
        sequence.extend(model.tokenizer.encode("Once"))
        print(len(list(mn.generate(sequence, max_tokens=4))))
    mn.devices()
"""


def test_there_is_one_warning_and_the_cpu_generates(make: Make, folder: Path, compiler: str) -> None:
    library = absent(compiler, folder, "libvulkan.so.999")
    make("libggml-vulkan.so", library, NEEDS=1)
    library.unlink()
    ended = run(BROKEN, folder, "-W", "always")
    assert (ended.returncode, ended.stdout) == (0, "4\n")
    assert ended.stderr.count("Warning") == 1
    assert "RuntimeWarning: the Vulkan backend is not used: libvulkan.so.999 is missing: install" in ended.stderr


def test_a_warning_that_is_made_an_error_comes_once(folder: Path) -> None:
    (folder / "libggml-vulkan.so").write_text("no library")
    program = """
        try:
            mn.devices()
        except RuntimeWarning as warning:
            print(type(warning).__name__)
        print(mn.devices()[-1].type)
    """
    ended = run(program, folder, "-W", "error::RuntimeWarning")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "RuntimeWarning\ncpu\n", "")


def test_the_command_line_shows_the_warning_and_the_list(folder: Path) -> None:
    (folder / "libggml-vulkan.so").write_text("no library")
    ended = run("from minerva_native.cli import main\nsys.exit(main(['devices']))", folder)
    assert ended.returncode == 0
    (warning,) = ended.stderr.splitlines()
    assert warning.startswith("minerva: warning: the Vulkan backend is not used: libggml-vulkan.so: ")
    assert "backend CPU: loaded" in ended.stdout
    assert "backend Vulkan: not loaded: libggml-vulkan.so: " in ended.stdout


def test_without_a_backend_for_the_cpu_nothing_can_be_done(tmp_path: Path) -> None:
    if "GGML_BACKEND_DL" not in mn.build_info()["options"]:
        pytest.skip("in this build the CPU's backend is part of the module")
    ended = run("mn.devices()", tmp_path)
    assert "BuildError: no backend for the CPU can be loaded (there is none): install the package again" in ended.stderr
