"""The `minerva` command as a person or a script uses it: a process with arguments, streams and an exit status."""

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import minerva_native as mn

MINERVA = [sys.executable, "-m", "minerva_native"]


# One thread: the model is tiny, and on a busy machine threads wait for each other.
SHORT = ("generate", "-t", "1", "-p", "One day")


def run(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MINERVA, *arguments], input=text or "", capture_output=True, text=True, timeout=120)


def test_generate_needs_no_arguments() -> None:
    result = run("generate", "-t", "1", "-n", "20")
    assert result.returncode == 0
    assert result.stdout.startswith("Once upon a time")
    assert len(result.stdout.split()) > 12
    assert "tokens/s" in result.stderr
    assert "first token after" in result.stderr


def test_the_installed_script_is_the_same_command() -> None:
    script = Path(sys.executable).with_name("minerva")
    assert subprocess.run([script, "--version"], capture_output=True, check=True).stdout.startswith(b"minerva-native ")


def test_the_same_seed_gives_the_same_text() -> None:
    first, second = (run(*SHORT, "-n", "16", "-s", "7").stdout for _ in range(2))
    assert first == second
    assert run(*SHORT, "-n", "16", "-s", "8").stdout != first


def test_the_prompt_comes_from_an_option_a_file_or_standard_input(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("One sunny day\n")
    greedy = ("generate", "-t", "1", "-n", "8", "--temp", "0")
    by_option = run(*greedy, "-p", "One sunny day").stdout
    assert run(*greedy, "-f", str(tmp_path / "prompt.txt")).stdout == by_option
    assert run(*greedy, text="One sunny day\n").stdout == by_option
    assert run(*greedy, "-f", "-", text="One sunny day").stdout == by_option


def test_json_is_one_object_with_text_and_timings() -> None:
    result = run(*SHORT, "-n", "8", "--temp", "0", "--json")
    answer = json.loads(result.stdout)
    assert answer["text"] == run(*SHORT, "-n", "8", "--temp", "0").stdout.removesuffix("\n")
    assert answer["n_gen"] == 8
    assert answer["finish_reason"] == "length"
    for name in ("prompt_tokens_per_second", "generated_tokens_per_second", "time_to_first_token_seconds"):
        assert answer[name] > 0


def test_a_stop_text_ends_the_generation_and_is_not_shown() -> None:
    whole = run(*SHORT, "-n", "40", "--temp", "0").stdout
    word = whole.split()[-2]
    assert run(*SHORT, "-n", "40", "--temp", "0", "--stop", word).stdout == (whole[: whole.index(word)] + "\n")


def test_tokenize_shows_tokens() -> None:
    ids = json.loads(run("tokenize", "-p", "One day", "--json").stdout)
    assert "".join(ids["pieces"][1:]) == "One day"
    without = json.loads(run("tokenize", "-p", "One day", "--no-bos", "--json").stdout)
    assert without["ids"] == ids["ids"][1:]
    assert len(run("tokenize", text="One day").stdout.splitlines()) == len(ids["ids"])
    special = json.loads(run("tokenize", "-p", "<|im_start|>", "--no-bos", "--parse-special", "--json").stdout)
    assert special["pieces"] == ["<|im_start|>"]


def test_info_names_the_source_that_was_built_and_describes_the_model() -> None:
    answer = json.loads(run("info", "--json").stdout)
    assert answer["build"]["llama_cpp_source"] in ("pinned", "custom")
    assert answer["build"]["llama_cpp"]
    assert answer["model"]["architecture"] == "llama"
    assert answer["metadata"]["general.name"] == "Minerva Demo"
    assert "Minerva Demo" in run("info").stdout


def test_devices_include_the_cpu() -> None:
    answer = json.loads(run("devices", "--json").stdout)
    assert "cpu" in [device["type"] for device in answer["devices"]]
    assert "CPU" in run("devices").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate", "-m", "/nowhere/model.gguf"), "does not exist"),
        (("generate", "-m", os.curdir), "is a directory"),
        (("generate", "-m", os.devnull), "is not a regular file"),
        (("generate", "-m", __file__), "is not a GGUF file"),
        (("generate", "-p", ""), "the prompt is empty"),
        (("generate", "-f", "/nowhere/prompt.txt"), "No such file"),
        (("generate", "-f", sys.executable), "is not UTF-8 text"),
        (("generate", "-p", "word " * 2000, "-c", "64"), "the context is full"),
        (("generate", "-c", "0"), "n_ctx must be"),
        (("generate", "-c", "1"), "n_ctx must be"),
        (("generate", "-c", "-1"), "n_ctx must be"),
        (("generate", "-c", "1000000000000"), "n_ctx must be"),
        (("generate", "-c", "2000000000"), "KV cache"),
        (("generate", "-b", "0"), "n_batch must be"),
        (("generate", "-t", "0"), "n_threads must be"),
        (("generate", "--temp", "nan"), "temperature"),
        (("generate", "--temp", "-1"), "temperature"),
        (("generate", "--temp", "inf"), "temperature"),
        (("generate", "--top-p", "nan"), "top_p"),
        (("generate", "-s", "-5"), "seed"),
        (("generate", "--stop", ""), "stop"),
        (("tokenize", "-m", "/nowhere/model.gguf"), "does not exist"),
        (("info", "-m", "/nowhere/model.gguf"), "does not exist"),
    ],
)
def test_an_error_is_one_line_and_status_1(arguments: tuple[str, ...], words: str) -> None:
    result = run(*arguments)
    assert result.returncode == 1
    assert result.stdout == ""
    assert words in result.stderr
    assert result.stderr.startswith("minerva: error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [(), ("dance",), ("generate", "-n", "many"), ("generate", "-p", "a", "-f", "b")])
def test_wrong_usage_is_status_2(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert "usage: minerva" in result.stderr


@pytest.mark.parametrize("n", ["-2", "many", "1.5"])
def test_a_wrong_number_of_tokens_is_answered_in_terms_of_the_option(n: str) -> None:
    result = run("generate", "-n", n)
    assert result.returncode == 2
    assert f"argument -n/--predict: '{n}' is not a number of tokens" in result.stderr


def test_no_limit_generates_until_the_context_is_full() -> None:
    answer = json.loads(run(*SHORT, "-n", "-1", "-c", "64", "--ignore-eos", "--json").stdout)
    assert answer["finish_reason"] == "length"
    assert answer["n_prompt"] + answer["n_gen"] == 64


def test_asking_for_a_gpu_without_one_is_an_error() -> None:
    if any(device.type in ("gpu", "igpu") for device in mn.devices()):
        pytest.skip("this machine has a GPU")
    for arguments in (("-m", str(mn.Model.demo().path)), ()):
        result = run("generate", "-ngl", "99", *arguments)
        assert result.returncode == 1
        assert "asks for a GPU" in result.stderr


def heed_ctrl_c() -> None:
    """Undo that a shell starts background jobs with Ctrl-C ignored, which child processes inherit."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_shows_what_was_generated_and_exits_130() -> None:
    command = [*MINERVA, "generate", "-t", "1", "-p", "Once", "-n", "-1", "-c", "100000", "--ignore-eos"]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=heed_ctrl_c,
    ) as process:
        assert process.stdout is not None
        first = process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(first) == 20
    assert rest.endswith(b"\n")
    assert b"tokens/s" in errors
    assert b"Traceback" not in errors


def test_a_closed_pipe_is_not_an_error() -> None:
    command = [*MINERVA, "generate", "-t", "1", "-p", "Once", "-n", "-1", "-c", "100000", "--ignore-eos"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(5)
        process.stdout.close()
        assert process.stderr is not None
        errors = process.stderr.read()
        assert process.wait(timeout=60) == 0
    assert errors == b""


def test_no_progress_bar_is_drawn_unless_stderr_is_a_terminal() -> None:
    assert "\x1b" not in run(*SHORT, "-n", "4").stderr


def test_nothing_is_read_from_a_terminal() -> None:
    controller, terminal = pty.openpty()
    try:
        command = [*MINERVA, "generate", "-t", "1", "-n", "4"]
        result = subprocess.run(command, stdin=terminal, capture_output=True, timeout=60, check=True)
        assert result.stdout
    finally:
        os.close(controller)
        os.close(terminal)
