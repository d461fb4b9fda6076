"""The `minerva` command as a person or a script uses it: a process with arguments, streams and an exit status."""

import contextlib
import json
import logging
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import gguf
import pytest

import minerva_native as mn
from minerva_native.cli import messages

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
        (("generate", "-p", "word " * 2000, "-c", "64"), "n_ctx=64 (-c)"),
        (("generate", "-c", "1"), "n_ctx (-c) must be"),
        (("generate", "-c", "-1"), "n_ctx (-c) must be"),
        (("generate", "-c", "1000000000000"), "n_ctx (-c) must be"),
        (("generate", "-c", "2000000000"), "n_ctx=2000000000 (-c) needs a KV cache"),
        (("generate", "-b", "0"), "n_batch (-b) must be"),
        (("generate", "-t", "0"), "n_threads (-t) must be"),
        (("generate", "-ctk", "f17"), "kv_type (-ctk, -ctv) must be"),
        (("generate", "--temp", "nan"), "temperature (--temp) must be"),
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
    command = [*MINERVA, "generate", "-q", "-t", "1", "-p", "Once", "-n", "-1", "-c", "100000", "--ignore-eos"]
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


def test_the_seed_is_named_and_gives_the_same_text_again() -> None:
    first = run(*SHORT, "-n", "16")
    (seed,) = re.findall(r"\| seed (\d+)$", first.stderr, re.MULTILINE)
    assert run(*SHORT, "-n", "16", "-s", seed).stdout == first.stdout
    answer = json.loads(run(*SHORT, "-n", "16", "--json").stdout)
    assert run(*SHORT, "-n", "16", "-s", str(answer["seed"])).stdout == answer["text"] + "\n"


def test_a_context_of_0_is_the_model_s_own() -> None:
    answer = json.loads(run(*SHORT, "-n", "-1", "-c", "0", "--ignore-eos", "--json").stdout)
    assert answer["n_prompt"] + answer["n_gen"] == mn.Model.demo().n_ctx_train


def test_warnings_are_lines_on_stderr() -> None:
    doubled = run("generate", "-t", "1", "-p", "<|endoftext|>One day", "--parse-special", "-n", "1")
    beyond = run(*SHORT, "-n", "1", "-c", "5000")
    for result, words in ((doubled, "the final prompt starts with 2 BOS tokens"), (beyond, "training context")):
        assert result.returncode == 0
        warning, timings = result.stderr.splitlines()
        assert warning.startswith("minerva: warning: ")
        assert "llama_" not in warning
        assert words in warning
        assert "tokens/s" in timings
    assert run(*SHORT, "-n", "1").stderr.count("\n") == 1


class SetSoon:
    """A cancel token that is set once the computation runs."""

    asked = 0

    def is_set(self) -> bool:
        self.asked += 1
        return self.asked > 2


def test_what_libllama_says_of_every_interruption_is_no_warning(
    capsys: pytest.CaptureFixture[str], demo: mn.Model
) -> None:
    said = []
    for is_verbose in (False, True):
        with (
            messages.shown_log(is_verbose, is_quiet=False),
            demo.context(n_ctx=1024, n_threads=1) as context,
            context.sequence() as sequence,
            pytest.raises(mn.Cancelled),
        ):
            sequence.extend([5] * 1000, cancel=SetSoon())
        said.append(capsys.readouterr().err)
    assert said[0] == ""
    assert "removing memory module entries" in said[1]


def test_a_model_without_a_pre_tokenizer_is_warned_about(tmp_path: Path) -> None:
    content = mn.DEMO_PATH.read_bytes()
    assert content.count(b"tokenizer.ggml.pre") == 1
    (tmp_path / "m.gguf").write_bytes(content.replace(b"tokenizer.ggml.pre", b"tokenizer.ggml.prx"))
    warnings = run("tokenize", "-m", str(tmp_path / "m.gguf"), "-p", "a").stderr.splitlines()
    assert all(re.match(r"minerva: warning: \w", line) for line in warnings)
    assert [line for line in warnings if "missing pre-tokenizer" in line]
    assert [line for line in warnings if "QUALITY WILL BE DEGRADED" in line]


def test_verbose_shows_the_log_and_quiet_nothing_but_errors() -> None:
    verbose = run(*SHORT, "-n", "1", "-v").stderr
    assert "minerva: debug: llama_" in verbose
    assert run(*SHORT, "-n", "1", "-c", "5000", "-q").stderr == ""
    assert run("bench", "-q", "-t", "1", "-p", "4", "-n", "0", "-r", "1", "-o", "json").stderr == ""
    assert "the prompt is empty" in run("generate", "-p", "", "-q").stderr


@pytest.mark.parametrize("locale", [{}, {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}], ids=["C", "ASCII"])
def test_text_is_utf_8_also_in_the_posix_locale(locale: dict[str, str], tmp_path: Path) -> None:
    environment = {**os.environ, "LC_ALL": "C", **locale}
    command = [*MINERVA, "tokenize", "--json", "-p", "un café"]
    answer = json.loads(subprocess.check_output(command, env=environment))
    assert answer["ids"] == mn.Model.demo().tokenizer.encode("un café")
    prompt = ["-m", str(with_prompt(tmp_path, "un café")), "-n", "0"]
    shown = subprocess.run([*MINERVA, "generate", "-t", "1", *prompt], env=environment, capture_output=True, check=True)
    assert shown.stdout == subprocess.check_output([*MINERVA, "generate", "-t", "1", *prompt])


def test_a_prompt_that_is_not_utf_8_is_wrong_usage() -> None:
    result = subprocess.run([*MINERVA, "generate", "-p", b"caf\xe9"], capture_output=True, timeout=60)
    assert result.returncode == 2
    assert b"is not UTF-8 text" in result.stderr


# What a file says may not reach a terminal as it is.

HOSTILE = "a\x1b[2Jb\x9bc\x7fd\u202ee\nf"
ESCAPED = r"a\x1b[2Jb\x9bc\x7fd\u202ee"


def with_prompt(folder: Path, prompt: str) -> Path:
    """Copy the built-in model with another name and prompt in its metadata."""
    reader = gguf.GGUFReader(mn.DEMO_PATH)
    writer = gguf.GGUFWriter(folder / "named.gguf", "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "minerva.prompt", "general.name"):
            continue
        kind = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], kind)
    writer.add_string("minerva.prompt", prompt)
    writer.add_string("general.name", prompt)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "named.gguf"


def on_a_terminal(*arguments: str) -> str:
    """Return what a command prints on a terminal, stdout and stderr together."""
    controller, terminal = pty.openpty()
    with subprocess.Popen([*MINERVA, *arguments], stdin=terminal, stdout=terminal, stderr=terminal) as process:
        os.close(terminal)
        output = b""
        with contextlib.suppress(OSError):  # how the end of a terminal is read
            while part := os.read(controller, 1 << 16):
                output += part
    os.close(controller)
    assert process.returncode == 0
    return output.decode().replace("\r\n", "\n")


def test_metadata_is_shown_escaped(tmp_path: Path) -> None:
    path = str(with_prompt(tmp_path, HOSTILE))
    for shown in (on_a_terminal("info", "-m", path), run("info", "-m", path).stdout):
        assert ESCAPED in shown
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", shown)


def test_generated_text_is_escaped_on_a_terminal_and_nowhere_else(tmp_path: Path) -> None:
    command = ("generate", "-t", "1", "-n", "1", "--temp", "0", "-m", str(with_prompt(tmp_path, HOSTILE)))
    shown = on_a_terminal(*command)
    assert f"{ESCAPED}\nf" in shown
    assert "\x1b[2J" not in shown
    written = subprocess.check_output([*MINERVA, *command], stdin=subprocess.DEVNULL)
    assert written.startswith(HOSTILE.encode())


@pytest.mark.parametrize("command", ["info", "generate", "tokenize"])
def test_json_is_printable_ascii(tmp_path: Path, command: str) -> None:
    text = () if command == "info" else ("-p", HOSTILE)
    path = str(with_prompt(tmp_path, HOSTILE))
    out = run(command, "-m", path, *text, *(("-n", "1", "-t", "1") if command == "generate" else ()), "--json").stdout
    assert out.removesuffix("\n").isprintable()
    assert out.isascii()
    answer = json.loads(out)
    assert HOSTILE in (
        answer.get("metadata", {}).get("general.name"),
        answer.get("prompt"),
        mn.Model.demo().tokenizer.decode(answer.get("ids", [])),
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("info", "-m", f"/nowhere/{HOSTILE}"),
        ("generate", "-f", f"/nowhere/{HOSTILE}"),
        ("generate", "-ctk", HOSTILE),
        ("generate", HOSTILE),
        (HOSTILE,),
    ],
)
def test_errors_are_escaped(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.returncode in (1, 2)
    assert r"\x1b[2J" in result.stderr
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", result.stderr)
    assert result.stderr.splitlines()[-1].startswith(("minerva: error: ", "minerva generate: error: "))


def test_log_lines_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    with messages.shown_log(is_verbose=False, is_quiet=False):
        logging.getLogger("minerva_native").warning("%s", HOSTILE)
    assert capsys.readouterr().err == f"minerva: warning: {ESCAPED}\\nf\n"


def test_an_error_that_is_logged_but_not_raised_is_shown_in_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with messages.shown_log(is_verbose=False, is_quiet=False) as log:
        logging.getLogger("minerva_native").error("%s", "odd")
        assert capsys.readouterr().err == ""
        log.show_errors()
    assert capsys.readouterr().err == "minerva: warning: odd\n"


def test_a_number_that_json_does_not_have_becomes_a_string() -> None:
    assert json.loads(messages.as_json({"a": [float("nan"), float("-inf"), 1.5]})) == {"a": ["NaN", "-Infinity", 1.5]}


def test_what_scripts_need_is_left_and_bytes_are_shown() -> None:
    assert messages.printable("ab\u200d\u200e é 日") == "ab\u200d\u200e é 日"
    assert messages.printable("\udcff\ud800\U000e0041\t") == r"\xff\ud800\U000e0041\t"


def test_a_prompt_without_an_end_is_refused(tmp_path: Path) -> None:
    result = run("tokenize", "-f", "/dev/zero")
    assert result.returncode == 1
    assert "too many for a prompt" in result.stderr
