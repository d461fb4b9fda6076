"""The `minerva` command as a person or a script uses it: a process with arguments, streams and an exit status."""

import contextlib
import io
import json
import logging
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

import minerva_native as mn
from minerva_native import cli
from minerva_native.cli import info, messages, options, progress
from minerva_native.cli.options import kv_overrides

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


def test_generate_and_chat_keep_to_a_schema_or_a_grammar(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"ready": {"type": "boolean"}}, "required": ["ready"]}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    (tmp_path / "words.gbnf").write_text('root ::= "yes" | "no"')
    for given in (("-j", json.dumps(schema)), ("--json-schema-file", str(tmp_path / "schema.json"))):
        result = run(*SHORT, *given)
        assert isinstance(json.loads(result.stdout)["ready"], bool)
        assert "stopped: complete" in result.stderr
    for given in (("--grammar", 'root ::= "yes" | "no"'), ("--grammar-file", str(tmp_path / "words.gbnf"))):
        assert run(*SHORT, *given).stdout.strip() in ("yes", "no")
    answer = run("chat", "-t", "1", "-st", "-p", "Ready?", "-j", json.dumps(schema), "--json")
    assert isinstance(json.loads(json.loads(answer.stdout)["text"])["ready"], bool)
    wrong = {"-j": "{", "--json-schema": '{"not": {}}', "--grammar": "root = a", "--grammar-file": "/nonexistent"}
    for option, value in wrong.items():
        result = run(*SHORT, option, value)
        assert (result.returncode, result.stdout) == (1, "")
        assert len(result.stderr.splitlines()) == 1


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


def test_info_is_for_people() -> None:
    out = run("info").stdout
    assert re.search(r"^weights +1\.1 MB, 1\.0 M parameters$", out, re.MULTILINE)
    assert re.search(r"^trained context +1,024 tokens$", out, re.MULTILINE)
    assert re.search(r"^tokenizer\.ggml\.add_bos_token +yes$", out, re.MULTILINE)
    assert re.search(r"^llama\.rope\.freq_base +10,000$", out, re.MULTILINE)
    assert re.search(r"^llama\.attention\.layer_norm_rms_epsilon +1e-05$", out, re.MULTILINE)
    assert re.search(
        r"^tokenizer\.ggml\.tokens +<\|endoftext\|>, <\|im_start\|>, .*, \.\.\. 1,280 in all$", out, re.MULTILINE
    )
    assert not re.search(r"\b(True|False|None)\b|^\S+ +[\[']", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "yes"),
        (None, "none"),
        (1234567, "1,234,567"),
        (0.1, "0.1"),
        (100000.0, "100,000"),
        (9.999999747378752e-06, "1e-05"),
        ([], "none"),
        (["a", "b"], "a, b"),
        ([*range(9)], "0, 1, 2, ... 9 in all"),
        ([[True], [2.0]], "yes, 2"),
        ("two\nlines \x1b", r"two lines \x1b"),
        ("word " * 30, f"{'word ' * 19}word ... (150 characters)"),
        ("x" * 200, f"{'x' * 100} ... (200 characters)"),
    ],
)
def test_a_value_of_info(value: object, text: str) -> None:
    assert info.summary(value) == text


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1234, "1.2 kB"), (98_362_432, "98.4 MB"), (25_300_000_000, "25.3 GB")],
)
def test_a_size_for_people(n_bytes: int, text: str) -> None:
    assert messages.size(n_bytes) == text


@pytest.mark.parametrize(("n", "text"), [(0, "0"), (12_345, "12,345"), (134_515_008, "134.5 M"), (7.2e9, "7.2 B")])
def test_a_count_for_people(n: int, text: str) -> None:
    assert messages.count(n) == text


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("command", ["info", "devices"])
def test_no_line_is_wider_than_the_terminal_and_no_word_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int, command: str
) -> None:
    device = mn.Device(
        "CUDA0", "A Graphics Card With A Very Long Name, 80 GB, Founder's Edition", "gpu", 10**11, 10**10
    )
    monkeypatch.setattr(mn, "devices", lambda: [device])
    assert cli.main([command]) == 0
    whole = capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert cli.main([command]) == 0
    folded = capsys.readouterr().out
    assert folded.split() == whole.split()
    path = str(mn.DEMO_PATH)  # a word that may be longer than a line
    assert all(len(line) <= width or line.strip() == path for line in folded.splitlines())


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
        (("generate", "-p", "word " * 2000, "-c", "64"), "0 of the 64 cells of -c are used"),
        (("generate", "-c", "1"), ": -c must be"),
        (("generate", "-c", "-1"), ": -c must be"),
        (("generate", "--ctx-size=1"), ": --ctx-size must be"),
        (("generate", "--ctx-size", "1000000000000"), ": --ctx-size must be"),
        (("generate", "-c", "2000000000"), ": -c 2000000000 needs a KV cache"),
        (("generate", "-c", "2000000000"), "ask for at most -c "),
        (("generate", "-b", "0"), ": -b must be"),
        (("generate", "-ub", "0"), ": -ub must be"),
        (("generate", "-t", "0"), ": -t must be"),
        (("generate", "--keep", "-1"), ": --keep must be"),
        (("generate", "-ctv", "q4_0", "-fa", "off"), "or use -ctk f16 -ctv f16"),
        (("generate", "-ngl", "-2"), ": -ngl must be"),
        (("generate", "--temp", "nan"), ": --temp must be"),
        (("generate", "--temp", "-1"), ": --temp must be"),
        (("generate", "--temp", "inf"), ": --temp must be"),
        (("generate", "--top-p", "nan"), ": --top-p must be"),
        (("generate", "-s", "-5"), ": -s must be"),
        (("generate", "--stop", ""), ": --stop must be"),
        (("generate", "-p", r"\xff"), "-p is not UTF-8 text once its escapes are read"),
        (("tokenize", "-p", r"\xff"), "see --no-escape"),
        (("bench", "-q", "-d", "2000000000", "-p", "1", "-n", "0"), "-d + -p + -n = 2000000001 needs a KV cache"),
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


@pytest.mark.parametrize("arguments", [(), ("dance",), ("--dance",)])
def test_wrong_usage_is_status_2(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("minerva: error: ")
    assert result.stderr.endswith(" (see minerva --help)\n")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("options", [("-t", "many"), ("-v", "-q"), ("--dance",), ("-ctk", "f17"), ("a", "b")])
@pytest.mark.parametrize("command", ["generate", "serve"])
def test_a_wrong_option_is_one_line_that_says_where_the_right_ones_are(command: str, options: tuple[str, ...]) -> None:
    result = run(command, *options)
    assert result.returncode == 2
    assert result.stderr.startswith(f"minerva {command}: error: ")
    assert result.stderr.endswith(f" (see minerva {command} --help)\n")
    assert result.stderr.count("\n") == 1


def test_an_error_speaks_of_options_only_where_it_means_arguments() -> None:
    flags = {"n_ctx": "-c", "stop": "--stop", "kv_type": "-ctk, -ctv", "add_special=False": "--no-bos", "n": "-d + -p"}
    for sentence, expected in (
        ("n_ctx=64 is less than n_ctx_train=4096", "-c 64 is less than n_ctx_train=4096"),
        ("stop must be given, or stop it", "--stop must be given, or stop it"),
        ("/tmp/n_ctx is no n_ctx.gguf", "/tmp/n_ctx is no n_ctx.gguf"),
        ("ask for another kv_type", "ask for another -ctk or -ctv"),
        ("use kv_type=('q8_0', \"f16\")", "use -ctk q8_0 -ctv f16"),
        ("pass add_special=False", "pass --no-bos"),
        ("n=5 is too many", "-d + -p = 5 is too many"),
    ):
        assert cli.in_options(sentence, flags) == expected


@pytest.mark.parametrize("n", ["-2", "many", "1.5"])
def test_a_wrong_number_of_tokens_is_answered_in_terms_of_the_option(n: str) -> None:
    result = run("generate", "-n", n)
    assert result.returncode == 2
    assert f"argument -n/--predict: '{n}' is not a number of tokens" in result.stderr


@pytest.mark.parametrize("n", ["-1", "100"])
def test_a_full_context_is_told_apart_from_the_number_of_tokens(n: str) -> None:
    command = (*SHORT, "-n", n, "-c", "64", "--ignore-eos")
    answer = json.loads(run(*command, "--json").stdout)
    assert (answer["finish_reason"], answer["context_full"]) == ("length", True)
    assert answer["n_prompt"] + answer["n_gen"] == 64
    assert "| stopped: context full (-c 64) |" in run(*command).stderr


@pytest.mark.parametrize("n", ["0", "1", "5"])
def test_the_number_of_tokens_is_why_a_generation_stops(n: str) -> None:
    answer = json.loads(run(*SHORT, "-n", n, "--ignore-eos", "--json").stdout)
    assert (answer["finish_reason"], answer["context_full"], answer["n_gen"]) == ("length", False, int(n))
    assert f"| stopped: -n {n} |" in run(*SHORT, "-n", n, "--ignore-eos").stderr


def whole_story() -> str:
    """Return the built-in model's most likely text for "One day", up to its end token."""
    answer = json.loads(run(*SHORT, "-n", "-1", "--temp", "0", "--json").stdout)
    assert (answer["finish_reason"], answer["context_full"]) == ("end", False)
    return f"One day{answer['text']}"


def test_an_end_token_is_named_and_an_empty_answer_explained() -> None:
    story = whole_story()
    command = ("generate", "-t", "1", "--temp", "0", "--no-escape", "-p", story)
    for model, words in (((), ""), (INSTRUCT, ": its prompt has no chat template, which `minerva chat` applies")):
        result = run(*command, *model)
        assert (result.returncode, result.stdout) == (0, "\n")
        note, timings = result.stderr.splitlines()
        assert note == f"minerva: note: the model ended the text at once, with its end token <|endoftext|>{words}"
        assert "| stopped: end token <|endoftext|> | seed " in timings
    assert run(*command, "-q").stderr == ""
    answer = json.loads(run(*command, "--json").stdout)
    assert (answer["text"], answer["finish_reason"], answer["n_gen"]) == ("", "end", 1)


INSTRUCT = ("-m", str(mn.DEMO_PATH))  # it has a chat template


def test_a_raw_prompt_for_an_instruct_model_is_remarked_upon() -> None:
    note = "minerva: note: the prompt goes to this instruct model as it is: `minerva chat` applies its chat template"
    result = run(*SHORT, "-n", "4", "--temp", "0", *INSTRUCT)
    assert result.stdout == run(*SHORT, "-n", "4", "--temp", "0").stdout, "it is raw"
    assert result.stderr.splitlines()[:-1] == [note]
    assert note in run(*SHORT, "-n", "4", "--json", *INSTRUCT).stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("-p", "One day", "-q", *INSTRUCT),
        ("-p", "One day", "--parse-special", *INSTRUCT),
        ("-p", "<|im_start|>user", *INSTRUCT),
        ("-p", "One day"),
        INSTRUCT,
    ],
    ids=["quiet", "parse-special", "control tokens", "no model named", "no prompt typed"],
)
def test_nothing_is_remarked_upon_if_there_is_no_need(arguments: tuple[str, ...]) -> None:
    assert "note" not in run("generate", "-t", "1", "-n", "2", "--ignore-eos", *arguments).stderr


def test_a_model_without_a_template_is_no_instruct_model(tmp_path: Path) -> None:
    path = with_prompt(tmp_path, "x", without="tokenizer.chat_template")
    result = run(*SHORT, "-n", "2", "--ignore-eos", "-m", str(path))
    assert result.returncode == 0
    assert "note" not in result.stderr
    result = run("generate", "-t", "1", "--temp", "0", "--no-escape", "-p", whole_story(), "-m", str(path))
    assert result.stderr.splitlines()[0].endswith("ended the text at once, with its end token <|endoftext|>")


def test_escapes_are_read_as_llama_cpp_reads_them(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(r"a\tb")
    tokenizer = mn.Model.demo().tokenizer

    def ids(*arguments: str, text: str = "") -> str:
        answer = json.loads(run("tokenize", "--no-bos", "--json", *arguments, text=text).stdout)
        return tokenizer.decode(answer["ids"])

    assert ids("-p", r"a\nb\\n") == "a\nb\\n"
    assert ids("-p", r"caf\xc3\xa9", "-e") == "café"
    assert ids("-p", r"a\nb", "--no-escape") == r"a\nb"
    assert ids("-f", str(tmp_path / "prompt.txt")) == "a\tb"
    assert ids("-f", str(tmp_path / "prompt.txt"), "--no-escape") == r"a\tb"
    assert ids(text=r"a\tb") == ids("-f", "-", text=r"a\tb") == r"a\tb"
    assert json.loads(run("generate", "-t", "1", "-n", "1", "-p", r"a\tb", "--json").stdout)["prompt"] == "a\tb"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\n\r\t\'\"\\", "\n\r\t'\"\\"),
        (r"\x41\x4a\x4A", "AJJ"),
        (r"\x4", r"\x4"),
        (r"\xg1\x", r"\xg1\x"),
        (r"\q\0\N", r"\q\0\N"),
        (r"\\n", r"\n"),
        ("a\\", "a\\"),
        ("\\\n", "\\\n"),
        (r"é\n", "é\n"),
        ("", ""),
    ],
)
def test_an_escape(text: str, expected: str) -> None:
    assert options.unescaped(text, "-p") == expected


def test_a_stop_text_may_have_escapes() -> None:
    command = (*SHORT, "-n", "30", "--temp", "0", "--json")
    whole = json.loads(run(*command).stdout)["text"]
    letter = next(character for character in whole[5:] if character.isalpha())
    stopped = json.loads(run(*command, "--stop", rf"\x{ord(letter):x}").stdout)
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == whole[: whole.index(letter)]
    assert json.loads(run(*command, "--stop", rf"\x{ord(letter):x}", "--no-escape").stdout)["text"] == whole


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


COMMANDS = {
    "module": [*MINERVA],
    "script": [sys.executable, "-c", "import sys, minerva_command as m; sys.exit(m.main())"],
}


@pytest.mark.parametrize("at", ["import numpy", "import minerva_native.cli", "parse"])
@pytest.mark.parametrize("command", [*COMMANDS])
def test_ctrl_c_during_the_imports_exits_130_without_a_traceback(tmp_path: Path, command: str, at: str) -> None:
    # Found first, and stands in the way at the given place, so that the signal comes at no other.
    (tmp_path / "sitecustomize.py").write_text(
        f"""
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if {at!r} == "import " + name:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
if {at!r} == "parse":
    import argparse
    argparse.ArgumentParser.add_subparsers = lambda *names, **options: os.kill(os.getpid(), signal.SIGINT)
"""
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    result = subprocess.run(
        [*COMMANDS[command], "devices"], env=environment, capture_output=True, preexec_fn=heed_ctrl_c
    )
    assert result.returncode == 130
    assert result.stdout == result.stderr == b""


def test_ctrl_c_that_the_parent_process_ignores_stays_ignored(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    code = "import minerva_command as m, signal, sys; m.main(); sys.exit(signal.getsignal(2) is not signal.SIG_IGN)"
    assert subprocess.run([sys.executable, "-c", code, "devices"], env=environment, capture_output=True).returncode == 0


def test_importing_the_package_leaves_ctrl_c_alone() -> None:
    code = "import minerva_native, signal, sys; sys.exit(signal.getsignal(2) is not signal.default_int_handler)"
    assert subprocess.run([sys.executable, "-c", code], preexec_fn=heed_ctrl_c).returncode == 0


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


def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Make stderr a terminal whose output can be read."""
    stderr = io.StringIO()
    monkeypatch.setattr(stderr, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    return stderr


def wait_for(words: str, stderr: io.StringIO) -> None:
    end = time.monotonic() + 30
    while words not in stderr.getvalue():
        assert time.monotonic() < end, f"{words!r} is not in {stderr.getvalue()!r}"
        time.sleep(0.01)


@pytest.mark.parametrize("bar", [progress.prefilling, progress.loading])
def test_a_progress_bar_is_there_before_anything_is_done(
    monkeypatch: pytest.MonkeyPatch, bar: Callable[[bool], Any]
) -> None:
    stderr = terminal(monkeypatch)
    with bar(False) as update:
        wait_for(" 0%", stderr)
        if bar is progress.loading:
            update(0.5)
        else:
            update(1, 2)
        wait_for(" 50%", stderr)
    assert "\x1b[?25h" in stderr.getvalue(), "the cursor is back"


def test_the_bar_of_a_benchmark_is_there_from_the_start_and_rests_while_something_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stderr, n_threads = terminal(monkeypatch), threading.active_count()
    with progress.measuring(2, is_quiet=False) as measuring:
        measuring.update("tg128", 0, 5)
        assert "tg128, test 1 of 2" in stderr.getvalue()
        assert " 0%" in stderr.getvalue()
        assert threading.active_count() == n_threads, "nothing draws meanwhile"
        measuring.update("tg128", 1, 5)
        assert " 20%" in stderr.getvalue()


def test_no_bar_is_drawn_for_what_is_quick_or_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = terminal(monkeypatch)
    for is_quiet, patience in ((False, 60.0), (True, 0.0)):
        monkeypatch.setattr(progress, "PATIENCE_SECONDS", patience)
        with progress.prefilling(is_quiet) as update:
            update(1, 2)
            time.sleep(0.05)
    assert stderr.getvalue() == ""


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


def with_prompt(folder: Path, prompt: str, without: str = "") -> Path:
    """Copy the built-in model with another name and prompt in its metadata, and without one key."""
    reader = gguf.GGUFReader(mn.DEMO_PATH)
    writer = gguf.GGUFWriter(folder / "named.gguf", "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in (
            "general.architecture",
            "minerva.prompt",
            "general.name",
            without,
        ):
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


GREEDY = (*SHORT, "-n", "12", "--temp", "0")


def test_the_options_of_loading_and_of_rope_reach_the_model() -> None:
    plain = run(*GREEDY).stdout
    same = run(
        *GREEDY,
        *("--mlock", "-sm", "layer", "-mg", "0", "-tb", "2", "--override-kv", "general.name=str:other"),
        *("--rope-freq-base", "0", "--yarn-orig-ctx", "0", "--yarn-ext-factor", "-1", "--rope-scaling", "none"),
    )
    assert (same.returncode, same.stdout) == (0, plain)
    stretched = run(*GREEDY, "--rope-scale", "4")
    assert stretched.returncode == 0
    assert stretched.stdout == run(*GREEDY, "--rope-freq-scale", "0.25").stdout != plain
    yarn = ("--rope-scaling", "yarn", "--rope-scale", "4", "--yarn-orig-ctx", "64", "--yarn-beta-fast", "4")
    assert run(*GREEDY, *yarn, "--yarn-beta-slow", "2").stdout != stretched.stdout
    assert run(*GREEDY, "--rope-freq-base", "300").stdout != plain
    assert run(*GREEDY, "--yarn-attn-factor", "3").stdout != plain
    assert run(*GREEDY, "--override-kv", "llama.rope.freq_base=float:300").stdout == (
        run(*GREEDY, "--rope-freq-base", "300").stdout
    )


def test_several_overrides_are_separated_by_commas_or_given_one_by_one() -> None:
    assert kv_overrides('a=int:1,b=float:1.5,c=bool:true,"d=str:x,y",e=str:p=q:r') == {
        "a": 1,
        "b": 1.5,
        "c": True,
        "d": "x,y",
        "e": "p=q:r",
    }
    given = ("--override-kv", "llama.rope.freq_base=float:300", "--override-kv", "general.name=str:x")
    assert run(*GREEDY, *given).stdout == run(*GREEDY, "--rope-freq-base", "300").stdout


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("--override-kv", "x"), 2, "'x' is not KEY=TYPE:VALUE"),
        (("--override-kv", "x=int:1.5"), 2, "is not KEY=TYPE:VALUE"),
        (("--override-kv", "x=bool:1"), 2, "is not KEY=TYPE:VALUE"),
        (("--override-kv", "=int:1"), 2, "is not KEY=TYPE:VALUE"),
        (("--override-kv", "llama.block_count=str:x"), 1, "--override-kv: llama.block_count is a int in"),
        (("-sm", "rows"), 2, "invalid choice: 'rows'"),
        (("-mg", "7"), 1, "-mg 7 is the index of a GPU, and there are"),
        (("-ts", "1,x"), 2, "'1,x' is not a list of numbers, such as 3,1"),
        (("-ts", "0/0"), 1, "-ts must be shares of 0 or more, and not all 0"),
        (("-tb", "0"), 1, "-tb must be from 1 to 512"),
        (("--rope-scaling", "longrope"), 2, "invalid choice"),
        (("--rope-scale", "0"), 1, "--rope-scale must be above 0"),
        (("--rope-scale", "2", "--rope-freq-scale", "0.5"), 2, "not allowed with"),
        (("--rope-freq-base", "-5"), 1, "--rope-freq-base must be more than 0"),
        (("--yarn-ext-factor", "-2"), 1, "--yarn-ext-factor must be 0 or more"),
    ],
)
def test_what_these_options_cannot_be(arguments: tuple[str, ...], status: int, words: str) -> None:
    ended = run(*SHORT, "-n", "1", *arguments)
    assert ended.returncode == status
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr
