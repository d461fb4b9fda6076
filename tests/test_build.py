"""The build as a user runs it: flags reach llama.cpp, and an error is one sentence that says what to do."""

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
from pathlib import Path

import pytest

import build_wheel
import minerva_native as mn
from minerva_native._binding import lib, text

ROOT = Path(__file__).parents[1]


def failed_build(tmp_path: Path, *settings: str, **environment: str) -> str:
    """Run a build that should fail, with some settings; return what it printed, on one line."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(tmp_path / "wheels"), str(ROOT)]
    settings = (f"build-dir={tmp_path / 'build'}", *settings)
    command += [f"--config-settings={setting}" for setting in settings]  # pip before 23.1 knows no short form
    result = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600
    )
    assert result.returncode != 0
    return " ".join(re.sub(r"\n\s*", " ", result.stdout + result.stderr).split())


def test_a_folder_that_is_not_llama_cpp_is_refused(tmp_path: Path) -> None:
    output = failed_build(tmp_path, f"cmake.define.MINERVA_LLAMA_CPP_DIR={tmp_path}")
    assert "is not a llama.cpp checkout" in output
    assert "leave the option out to build the pin" in output


def stand_in(tmp_path: Path, configuration: str) -> Path:
    """Make a llama.cpp checkout that has nothing but this in its CMakeLists.txt."""
    folder = tmp_path / "llama.cpp"
    (folder / "include").mkdir(parents=True)
    (folder / "include" / "llama.h").touch()
    (folder / "ggml").mkdir()
    (folder / "ggml" / "CMakeLists.txt").touch()
    (folder / "CMakeLists.txt").write_text(textwrap.dedent(configuration))
    return folder


def test_flags_from_both_places_reach_llama_cpps_cmake_untouched(tmp_path: Path) -> None:
    report = "LTO ${GGML_LTO}, repack ${GGML_CPU_REPACK}, native ${GGML_NATIVE}"
    folder = stand_in(tmp_path, f'message(FATAL_ERROR "{report}")\n')
    settings = [f"cmake.define.{name}" for name in (f"MINERVA_LLAMA_CPP_DIR={folder}", "GGML_CPU_REPACK=OFF")]
    output = failed_build(tmp_path, *settings, CMAKE_ARGS="-DGGML_LTO=ON -DGGML_NATIVE=OFF")
    assert "LTO ON, repack OFF, native OFF" in output


@pytest.mark.parametrize(
    ("option", "settings", "sentence"),
    [
        ("GGML_CUDA", ["CMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit=ON"], "needs the CUDA toolkit with nvcc"),
        ("GGML_VULKAN", ["CMAKE_DISABLE_FIND_PACKAGE_Vulkan=ON"], "needs Vulkan headers of 1.3.272 or newer"),
        ("GGML_VULKAN", [], "found: headers of 1.3.200"),
    ],
    ids=["no nvcc", "no headers", "old headers"],
)
def test_a_backend_that_cannot_be_built_ends_the_build_with_a_sentence(
    tmp_path: Path, option: str, settings: list[str], sentence: str
) -> None:
    if not settings:
        settings = old_vulkan(tmp_path / "sdk")
    output = failed_build(tmp_path, *(f"cmake.define.{setting}" for setting in (f"{option}=ON", *settings)))
    assert f"{option}=ON needs" in output
    assert sentence in output
    assert f"leave {option} out" in output
    assert "Building CXX object" not in output


@pytest.mark.parametrize("option", ["GGML_RPC", "GGML_BACKEND_DL"])
def test_upstreams_tools_have_nothing_of_the_binding(tmp_path: Path, option: str) -> None:
    settings = [f"cmake.define.{name}=ON" for name in (option, "MINERVA_BUILD_TOOLS")]
    assert f"{option}=ON and MINERVA_BUILD_TOOLS=ON exclude each other" in failed_build(tmp_path, *settings)


def test_backends_in_files_share_no_library_with_the_module(tmp_path: Path) -> None:
    folder = stand_in(
        tmp_path,
        """
        file(WRITE "${CMAKE_CURRENT_BINARY_DIR}/empty.c" "")
        foreach(library ggml-base ggml-rpc ggml-cpu)
          if(library STREQUAL "ggml-base")
            set(shared "${BUILD_SHARED_LIBS}")
            add_library(${library} "${CMAKE_CURRENT_BINARY_DIR}/empty.c")
          else()
            add_library(${library} MODULE "${CMAKE_CURRENT_BINARY_DIR}/empty.c")
          endif()
          get_target_property(type ${library} TYPE)
          list(APPEND types "${library}: ${type}")
        endforeach()
        message(FATAL_ERROR "upstream sees ${shared}; ${types}")
        """,
    )
    settings = [f"cmake.define.{name}" for name in (f"MINERVA_LLAMA_CPP_DIR={folder}", "GGML_BACKEND_DL=ON")]
    output = failed_build(tmp_path, *settings)
    assert "upstream sees ON; ggml-base: STATIC_LIBRARY;ggml-rpc: STATIC_LIBRARY;ggml-cpu: MODULE_LIBRARY" in output


def test_a_variant_that_the_compiler_does_not_know_is_left_out(tmp_path: Path) -> None:
    folder = stand_in(
        tmp_path,
        """
        file(WRITE "${CMAKE_CURRENT_BINARY_DIR}/empty.c" "")
        foreach(library llama ggml ggml-base ggml-rpc ggml-cpu-old ggml-cpu-new)
          add_library(${library} "${CMAKE_CURRENT_BINARY_DIR}/empty.c")
        endforeach()
        target_compile_options(ggml-cpu-new PRIVATE -march=of-tomorrow)
        add_dependencies(ggml ggml-cpu-old ggml-cpu-new)
        set(GGML_AVAILABLE_BACKENDS ggml-rpc ggml-cpu-old ggml-cpu-new CACHE INTERNAL "")
        get_target_property(waits_for ggml MANUALLY_ADDED_DEPENDENCIES)
        message(STATUS "ggml depends on ${waits_for}")
        """,
    )
    settings = [f"cmake.define.{name}" for name in (f"MINERVA_LLAMA_CPP_DIR={folder}", "GGML_BACKEND_DL=ON")]
    output = failed_build(tmp_path, *settings)
    assert "does not know -march=of-tomorrow: ggml-cpu-new is left out" in output
    assert "ggml-cpu-old is left out" not in output
    assert "ggml depends on waits_for-NOTFOUND" in output


def old_vulkan(sdk: Path) -> list[str]:
    """Make headers without what the pin needs, and all else; return the settings that name them."""
    (sdk / "vulkan").mkdir(parents=True)
    (sdk / "vulkan" / "vulkan.hpp").write_text("namespace vk { struct Instance {}; }\n")
    core = "#define VK_HEADER_VERSION_COMPLETE VK_MAKE_API_VERSION(0, 1, 3, VK_HEADER_VERSION)\n"
    (sdk / "vulkan" / "vulkan_core.h").write_text(f"#define VK_HEADER_VERSION 200\n{core}")
    (sdk / "vulkan" / "vulkan.h").touch()
    (sdk / "SPIRV-HeadersConfig.cmake").touch()
    for name in ("libvulkan.so", "glslc"):
        (sdk / name).touch(0o755)
    return [
        f"Vulkan_INCLUDE_DIR={sdk}",
        f"Vulkan_LIBRARY={sdk / 'libvulkan.so'}",
        f"Vulkan_GLSLC_EXECUTABLE={sdk / 'glslc'}",
        f"SPIRV-Headers_DIR={sdk}",
    ]


AUDITWHEEL = """
import os, sys
from pathlib import Path

if sys.argv[1] == "repair":
    Path(sys.argv[sys.argv.index("--wheel-dir") + 1], "made.whl").write_text(os.environ["PATH"])
"""


def test_a_wheel_is_repaired_beside_its_place_and_with_the_scripts_of_this_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "auditwheel").mkdir()
    (tmp_path / "auditwheel" / "__main__.py").write_text(AUDITWHEEL)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PATH", os.defpath)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "another file system"))
    made = build_wheel.repaired(tmp_path / "a.whl", tmp_path)
    assert made == tmp_path / "made.whl"
    assert sysconfig.get_path("scripts") in made.read_text().split(os.pathsep)


def test_build_info_describes_the_build() -> None:
    info = mn.build_info()
    assert info["llama_cpp_source"] in ("pinned", "custom")
    assert "GGML_CPU" in info["options"]
    assert info["compiler"]
    assert info["cpu_features"].startswith("CPU")


def test_ggml_names_the_pinned_commit_as_its_own() -> None:
    info = mn.build_info()
    if info["llama_cpp_source"] == "pinned":
        assert text(lib.ggml_commit()) == info["llama_cpp"]


def test_upstreams_licence_is_in_the_package() -> None:
    from minerva_native._binding import _llama

    licence = Path(_llama.__file__).with_name("LICENSE.llama.cpp").read_text()
    assert "MIT License" in licence
    assert "ggml authors" in licence


LIBRARY_IS_MISSING = """
import sys

class Loader:
    def find_spec(self, name, path=None, target=None):
        if name == "minerva_native._binding._llama":
            raise ImportError("libvulkan.so.1: cannot open shared object file: No such file or directory")

sys.meta_path.insert(0, Loader())
sys.argv = ["minerva", "devices"]
import minerva_command
sys.exit(minerva_command.main())
"""


def test_a_library_that_the_module_needs_and_the_machine_lacks_is_named() -> None:
    done = subprocess.run([sys.executable, "-c", LIBRARY_IS_MISSING], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("minerva: error: the compiled binding cannot be loaded (libvulkan.so.1: cannot open")
    assert "install what has libvulkan.so.1" in line
