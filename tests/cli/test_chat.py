"""`minerva chat` as a person uses it on a terminal, and as a script does without one."""

import io
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import minerva_native as mn
from minerva_native.cli import answers, editing, session
from terminal import Terminal, screen_after
from tiny_models import TinyModel

CHAT = [sys.executable, "-m", "minerva_native", "chat", "-t", "1"]

# The same, as if prompt_toolkit were not installed.
WITHOUT_TOOLKIT = (
    "import sys; sys.modules['prompt_toolkit'] = None; from minerva_native.cli import main; sys.exit(main())"
)

THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{{ '<|im_start|>assistant\n<think>\n' }}{# </think> #}"
)


def chat(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CHAT, *arguments], input=text, capture_output=True, text=True, timeout=120)


def on_a_terminal(*arguments: str, editor: str = "prompt_toolkit", rows: int = 40) -> Terminal:
    command = [*CHAT, *arguments]
    if editor == "readline":
        command = [sys.executable, "-c", WITHOUT_TOOLKIT, "chat", "-t", "1", *arguments]
    terminal = Terminal(command, rows=rows)
    terminal.expect(r"^> ?")
    return terminal


def leave(terminal: Terminal) -> int:
    terminal.expect(PROMPT)
    terminal.press("\x04")
    return terminal.wait()


PROMPT = r"^\d?> ?$"

ENDLESS = ("-c", "100000", "--ignore-eos")


# Without a terminal


def test_each_line_is_answered_in_one_conversation() -> None:
    said = ("Tell me a story about a fox.", "Another one, about a lamb.")
    with mn.LLM(mn.Model.demo(), n_ctx=1024, n_threads=1) as llm:
        expected = llm.chat(max_tokens=20, temperature=0.0)
        texts = [expected.send(text).text for text in said]
    result = chat("-n", "20", "--temp", "0", text="\n\n".join(said) + "\n")
    assert result.returncode == 0
    assert result.stdout == "".join(f"{text}\n" for text in texts)
    assert result.stderr.count("was cut at 20 tokens (-n)") == 2


def test_the_first_message_may_be_an_option() -> None:
    given = chat("-n", "8", "--temp", "0", "-p", "One day").stdout
    assert given == chat("-n", "8", "--temp", "0", text="One day\n").stdout
    single = chat("-n", "8", "--temp", "0", "-st", "-p", "One day", text="not read\n")
    assert single.stdout == given
    assert chat("-n", "8", "--temp", "0", "-p", "One day", text="And then?").stdout.startswith(given)


def test_json_is_one_object_an_answer() -> None:
    result = chat("--json", "-n", "8", "-s", "3", "-q", text="One day\nAnd then?\n")
    first, second = map(json.loads, result.stdout.splitlines())
    assert result.stdout.isascii()
    assert result.stderr == ""
    assert (first["prompt"], second["prompt"]) == ("One day", "And then?")
    assert first["text"] == chat("-n", "8", "-s", "3", text="One day").stdout.removesuffix("\n")
    assert (first["seed"], first["finish_reason"], first["n_gen"]) == (3, "length", 8)
    assert second["n_cached"] == first["n_prompt"] + first["n_gen"] - 1
    assert first["generated_tokens_per_second"] > 0


def test_a_seed_that_is_named_gives_the_same_answer_again() -> None:
    first = json.loads(chat("--json", "-n", "16", text="One day").stdout)
    again = json.loads(chat("--json", "-n", "16", "-s", str(first["seed"]), text="One day").stdout)
    assert again["text"] == first["text"]


def test_a_line_is_never_a_command_without_a_terminal(tmp_path: Path) -> None:
    result = chat("-n", "2", "--json", text=f"/save {tmp_path}/a.json\n/exit\nOne day\n")
    assert len(result.stdout.splitlines()) == 3
    assert not list(tmp_path.iterdir())


def test_a_system_prompt_is_part_of_the_prompt() -> None:
    plain, system = (
        json.loads(chat("--json", "-n", "1", *more, text="a").stdout) for more in ((), ("-sys", "Be kind"))
    )
    assert system["n_prompt"] > plain["n_prompt"]


def test_the_built_in_model_says_what_it_can_do() -> None:
    assert "only tells stories" in chat("-n", "1", text="a").stderr
    assert "only tells stories" not in chat("-n", "1", "-m", str(mn.DEMO_PATH), text="a").stderr


def test_timings_are_shown_on_request() -> None:
    result = chat("-n", "4", "-s", "5", "--timings", text="One day\n")
    assert re.search(r"prompt: \d+ tokens, 0 of them cached, .*generated: 4 tokens, .*\| seed 5$", result.stderr, re.M)
    assert "tokens/s" not in chat("-n", "4", text="One day\n").stderr


def test_turns_are_dropped_visibly_when_the_context_is_full() -> None:
    lines = "Tell me a story about a fox and a lamb and a bear and a girl who finds a key in the garden.\n" * 6
    result = chat("-c", "256", "-n", "40", "--json", text=lines)
    dropped = [json.loads(line)["dropped_turns"] for line in result.stdout.splitlines()]
    assert result.returncode == 0
    assert sum(dropped) > 1
    said = [line for line in result.stderr.splitlines() if "the context is full" in line]
    assert len(said) == sum(number > 0 for number in dropped)
    assert all("dropped from the conversation" in line for line in said)


def test_a_full_context_is_an_error_on_request() -> None:
    lines = "Tell me a story about a fox and a lamb and a bear and a girl who finds a key in the garden.\n" * 6
    result = chat("-c", "256", "-n", "40", "--on-full", "error", "-q", text=lines)
    assert result.returncode == 1
    assert "of the 256 cells of -c" in result.stderr
    assert result.stderr.count("\n") == 1


def test_reasoning_is_told_from_the_answer_and_has_a_budget() -> None:
    template = ("--chat-template", THINKING, "-n", "12", "--ignore-eos")
    result = json.loads(chat(*template, "--reasoning-budget", "4", "--json", text="One day").stdout)
    assert result["reasoning"]
    assert result["text"]
    shown = chat(*template, "--reasoning-budget", "4", "-s", str(result["seed"]), text="One day").stdout
    assert shown == result["text"] + "\n"
    none = json.loads(chat(*template, "--reasoning-budget", "0", "--json", text="One day").stdout)
    assert none["reasoning"] == ""


def test_a_chat_template_can_be_given(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    greedy = ("--json", "-n", "1", "--temp", "0")
    expected = json.loads(chat(*greedy, text="One day").stdout)
    named = json.loads(chat(*greedy, "--chat-template", "chatml", text="One day").stdout)
    assert (named["n_prompt"], named["text"]) == (expected["n_prompt"], expected["text"])
    bare = json.loads(chat(*greedy, "--chat-template-file", str(tmp_path / "t.jinja"), text="One day").stdout)
    assert bare["n_prompt"] == len(mn.Model.demo().tokenizer.encode("One day"))
    variable = ("--chat-template", "{{ a }}", "--chat-template-kwargs", '{"a": "One day"}')
    assert json.loads(chat(*greedy, *variable, text="x").stdout)["n_prompt"] == bare["n_prompt"]


@pytest.fixture(scope="module")
def without_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TinyModel().write(tmp_path_factory.mktemp("chat") / "base.gguf")


def test_a_model_without_a_template_is_an_error_that_names_the_option(without_template: Path) -> None:
    result = chat("-m", str(without_template), text="a\n")
    assert result.returncode == 1
    assert "base.gguf has no chat template" in result.stderr
    assert "--chat-template" in result.stderr
    assert chat("-m", str(without_template), "--chat-template", "chatml", "-n", "1", text="a\n").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-p", ""), "the first message (-p) is empty"),
        (("-m", "/nowhere/model.gguf"), "does not exist"),
        (("-c", "1"), "-c must be"),
        (("--temp", "nan"), "--temp must be"),
        (("--chat-template", "llama3"), "'llama3' is no template"),
        (("--chat-template", "{% if %}"), "cannot be compiled"),
        (("--chat-template-file", "/nowhere/t"), "/nowhere/t: No such file"),
        (("--chat-template", "{{ raise_exception('no') }}"), "no"),
        (("--reasoning-budget", "5"), "--reasoning-budget is of no use here"),
    ],
)
def test_an_error_is_one_line_and_status_1(arguments: tuple[str, ...], words: str) -> None:
    result = chat("-q", *arguments, text="a\n")
    assert result.returncode == 1
    assert result.stdout == ""
    assert words in result.stderr
    assert result.stderr.startswith("minerva: error: ")
    assert result.stderr.count("\n") == 1


def test_input_that_is_not_utf_8_is_named() -> None:
    result = subprocess.run([*CHAT, "-n", "1", "-q"], input=b"a\n\xff\n", capture_output=True, timeout=60)
    assert result.returncode == 1
    assert b"line 2 of standard input is not UTF-8 text" in result.stderr


@pytest.mark.parametrize("arguments", [("--chat-template-kwargs", "[1]"), ("-n", "many"), ("--on-full", "shift")])
def test_wrong_usage_is_status_2(arguments: tuple[str, ...]) -> None:
    assert chat(*arguments).returncode == 2


def test_ctrl_c_without_a_terminal_shows_what_there_is_and_exits_130() -> None:
    command = [*CHAT, *ENDLESS, "-p", "One day"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed_ctrl_c
    ) as process:
        assert process.stdout is not None
        assert len(process.stdout.read(20)) == 20
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert rest.endswith(b"\n")
    assert b"Traceback" not in errors


def heed_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


# On a terminal

editors = pytest.mark.parametrize("editor", ["prompt_toolkit", "readline"])


@editors
def test_a_conversation_on_a_terminal(editor: str) -> None:
    with on_a_terminal("-n", "12", "--temp", "0", "-q", editor=editor) as terminal:
        terminal.enter("One day")
        terminal.expect(PROMPT)
        terminal.enter("/tokens")
        assert "2 messages" in terminal.expect(r"this conversation: .*$")
        terminal.enter("/undo")
        terminal.expect("took back: One day")
        terminal.enter("/undo")
        terminal.expect("there is no turn to undo")
        terminal.enter("/tokens")
        terminal.expect("this conversation: 0 messages, 0 of ")
        terminal.enter("/nonsense")
        terminal.expect("there is no command /nonsense: see /help")
        terminal.enter("/help")
        assert "/retry" in terminal.expect("/undo ")
        assert leave(terminal) == 0


@editors
def test_ctrl_c_stops_the_answer_and_not_the_program(editor: str) -> None:
    with on_a_terminal(*ENDLESS, editor=editor) as terminal:
        terminal.enter("One day")
        terminal.expect(r"\w+ \w+ \w+ \w+ \w+ \w+ ")
        terminal.press("\x03")
        terminal.expect("stopped: the answer so far is kept, and /undo takes it back")
        terminal.enter("/tokens")
        terminal.expect("this conversation: 2 messages")
        terminal.expect(PROMPT)
        time.sleep(0.2)  # Python's readline misses a signal between the prompt and its wait for keys
        terminal.press("half a line\x03")  # and at the prompt it drops the line
        terminal.expect(PROMPT)
        terminal.enter("/exit")
        assert terminal.wait() == 0


@editors
def test_alt_enter_and_a_paste_make_messages_of_several_lines(editor: str, tmp_path: Path) -> None:
    with on_a_terminal("-n", "2", editor=editor) as terminal:
        terminal.press("first\x1b\rsecond\r")
        terminal.expect(PROMPT)
        terminal.press("\x1b[200~/undo\nthird\x1b[201~\r")  # as terminals mark what is pasted
        terminal.expect(PROMPT)
        terminal.enter(f"/save {tmp_path}/chat.json")
        terminal.expect("saved 4 messages")
        assert leave(terminal) == 0
    messages = json.loads((tmp_path / "chat.json").read_text())["messages"]
    assert [message["content"] for message in messages if message["role"] == "user"] == [
        "first\nsecond",
        "/undo\nthird",
    ]


@editors
def test_tab_completes_commands(editor: str) -> None:
    with on_a_terminal("-n", "1", editor=editor) as terminal:
        terminal.press("/tok\t")
        terminal.expect("/tokens")
        terminal.press("\r")
        terminal.expect("this conversation: 0 messages")


def test_retry_answers_again_with_another_seed_and_fork_goes_two_ways(tmp_path: Path) -> None:
    def saved(terminal: Terminal) -> list[str]:
        terminal.enter(f"/save {tmp_path}/chat.json")
        terminal.expect("saved . messages")
        messages = json.loads((tmp_path / "chat.json").read_text())["messages"]
        return [message["content"] for message in messages]

    with on_a_terminal("-n", "24", "-s", "1", "--temp", "2", "--ignore-eos") as terminal:
        terminal.enter("One day")
        terminal.expect("was cut")
        first = saved(terminal)
        terminal.enter("/retry")
        terminal.expect("was cut")
        second = saved(terminal)
        assert first[0] == second[0] == "One day"
        assert first[1] != second[1]
        terminal.enter("/fork")
        terminal.expect("this is conversation 2 now")
        terminal.expect(r"^2> ?$")
        terminal.enter("And then?")
        terminal.expect("was cut")
        assert saved(terminal)[:3] == [*second, "And then?"]
        terminal.enter("/forks")
        terminal.expect(r"  1  2 messages  One day\s+\* 2  4 messages  And then\?")
        terminal.enter("/fork 1")
        terminal.expect("conversation 1: One day")
        assert saved(terminal) == second
        terminal.enter("/fork 3")
        terminal.expect("there is no conversation 3")


def test_a_retry_that_fails_changes_nothing() -> None:
    with on_a_terminal("-n", "4") as terminal:
        terminal.enter("/retry")
        terminal.expect("there is no message to answer again")
        terminal.enter("One day")
        terminal.expect("was cut")
        terminal.enter("/set logit_bias [[99999,1]]")
        terminal.expect("logit_bias is")
        terminal.enter("/retry")
        terminal.expect("minerva: error: .*\\n.*the answer before is still there")
        terminal.enter("/tokens")
        terminal.expect("2 messages")


def test_settings_are_changed_by_either_name_and_checked() -> None:
    with on_a_terminal("-s", "1", "-n", "4") as terminal:
        for typed, answer in (
            ("temp 0.3", "temperature is 0.3"),
            ("--top-k=5", "top_k is 5"),
            ("repeat_penalty 1.1", "repeat_penalty is 1.1"),
            ("seed -1", "seed is -1"),
            ("n 3", "max_tokens is 3"),
            ("samplers top_k;temp", "order is top_k;temp"),
            ("temp -1", r"temperature must be at least 0, not -1\.0"),
            ("temp warm", "temperature cannot be 'warm'"),
            ("temp", "/set temp needs a value"),
            ("warmth 1", "there is no parameter warmth"),
            ("", r"temperature +0\.3"),
        ):
            terminal.enter(f"/set {typed}")
            terminal.expect(answer)
        terminal.enter("One day")
        terminal.expect("was cut at 3 tokens")


def test_a_system_prompt_is_shown_set_and_removed() -> None:
    with on_a_terminal("-sys", "Be kind", "-n", "2") as terminal:
        for typed, answer in (
            ("/system", "Be kind"),
            ("/system Be brief", "the system prompt is set"),
            ("/system", "Be brief"),
            ('/system ""', "the system prompt is removed"),
            ("/system", "there is no system prompt"),
        ):
            terminal.enter(f"{typed}")
            terminal.expect(answer)
        terminal.enter("One day")
        terminal.expect("was cut")
        terminal.enter("/system Be long")
        terminal.expect("the next turn evaluates the conversation again")
        terminal.enter("/tokens")
        terminal.expect("3 messages")


def test_a_conversation_is_saved_for_its_owner_alone_and_loaded(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with on_a_terminal("-n", "2") as terminal:
        terminal.enter("One day")
        terminal.expect("was cut")
        for typed, answer in (
            (f"/save {tmp_path}/a.json", "saved 2 messages"),
            (f"/save {tmp_path}/a.json", "saved 2 messages"),
            (f"/save {tmp_path}/notes.txt", "exists and is no saved chat"),
            ("/save /nowhere/a.json", "No such file"),
            ("/save", "/save needs the name of a file"),
            (f"/load {tmp_path}/notes.txt", "is no saved chat"),
            (f"/load {tmp_path}/none", "No such file"),
            (f"/load {tmp_path}/a.json", "loaded 2 messages; this is conversation 2: One day"),
        ):
            terminal.enter(f"{typed}")
            terminal.expect(answer)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o600


def test_nothing_is_kept_on_disk_unless_it_is_asked_for(tmp_path: Path) -> None:
    history = tmp_path / "history"
    history.touch(mode=0o644)
    with on_a_terminal("-n", "1", "--history", str(history)) as terminal:
        terminal.enter("One day")
        terminal.expect("was cut")
        assert leave(terminal) == 0
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert json.loads(history.read_text()) == "One day"
    environment = {"HOME": str(tmp_path / "home")}
    (tmp_path / "home").mkdir()
    with Terminal([*CHAT, "-n", "1"], env=environment) as terminal:
        terminal.expect(r"^> ?")
        terminal.enter("One day")
        terminal.expect("was cut")
        assert leave(terminal) == 0
    assert not list((tmp_path / "home").iterdir())


@editors
def test_what_was_typed_before_comes_back_with_an_arrow(editor: str, tmp_path: Path) -> None:
    history = tmp_path / "history"
    editing.History(history).add("/tokens")
    with on_a_terminal("-n", "1", "--history", str(history), editor=editor) as terminal:
        terminal.press("\x1b[A\r")
        terminal.expect("this conversation: 0 messages")


@pytest.mark.parametrize("content", ["[1]\n", "no json\n", '"a"\n5\n'])
def test_another_file_is_not_taken_for_a_history(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other"
    path.write_text(content)
    path.chmod(0o644)
    with pytest.raises(ValueError, match="is no history that minerva chat wrote"):
        editing.History(path)
    assert path.read_text() == content
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    with pytest.raises(ValueError, match="is not a regular file"):
        editing.History(Path(os.devnull))


def test_a_missing_prompt_toolkit_is_a_hint_once() -> None:
    with on_a_terminal("-n", "1", editor="readline") as terminal:
        terminal.enter("/exit")
        assert terminal.wait() == 0
        assert "\n".join(terminal.lines).count("pip install 'minerva-native[chat]'") == 1


def test_what_is_typed_during_an_answer_is_not_shown() -> None:
    with on_a_terminal(*ENDLESS) as terminal:
        terminal.enter("One day")
        terminal.expect(r"\w+ \w+ \w+ ")
        terminal.press("/tokens\r")
        terminal.expect(r"\w+ \w+ \w+ ")
        terminal.press("\x03")
        before = terminal.expect("stopped")
        assert "/tokens" not in before


@editors
def test_what_is_typed_ahead_comes_after_the_answer(editor: str) -> None:
    with on_a_terminal("-n", "200", "--ignore-eos", "-q", editor=editor) as terminal:
        terminal.press("One day\r/tokens\r")
        terminal.expect("this conversation: 2 messages")


def test_the_command_line_imports_no_library_before_it_is_needed() -> None:
    heavy = ("prompt_toolkit", "huggingface_hub", "rich", "jinja2", "readline", "asyncio")
    code = f"import minerva_native.cli, sys; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


# How an answer looks


class FakeTerminal(io.StringIO):
    """Standard output that says that it is a terminal of some size."""

    def __init__(self, fileno: int):
        super().__init__()
        self._fileno = fileno

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fileno


ROWS, COLUMNS = 12, 40


@pytest.fixture
def output(monkeypatch: pytest.MonkeyPatch) -> FakeTerminal:
    fake = FakeTerminal(7)
    monkeypatch.setattr(answers, "sys", SimpleNamespace(stdout=fake))  # pytest puts its own in the place of sys.stdout
    monkeypatch.setattr(os, "get_terminal_size", lambda fileno: os.terminal_size((COLUMNS, ROWS)))
    monkeypatch.setenv("TERM", "xterm-256color")
    return fake


def shown(output: FakeTerminal, *texts: str, reasoning: str = "", is_whole: bool = True) -> list[str]:
    """Return the lines of the screen after an answer that follows a prompt."""
    log = answers.Log()
    answer = answers.OnATerminal(log)
    if reasoning:
        answer.add(mn.Chunk(reasoning=reasoning))
    for text in texts:
        answer.add(mn.Chunk(text))
    if is_whole:
        answer.finish()
    else:
        answer.end()
    lines = screen_after("before\n> said\n" + output.getvalue() + "> ", ROWS, COLUMNS)
    while lines and not lines[-1]:
        lines.pop()
    return lines


def test_markdown_takes_the_place_of_the_plain_text(output: FakeTerminal) -> None:
    assert shown(output, "Some **bold", "** words,\nand `code`:\n\n", "- one\n- two") == [
        "before",
        "> said",
        "Some bold words,",
        "and code:",
        "",
        " • one",
        " • two",
        ">",
    ]


@pytest.mark.parametrize("n_characters", [1, COLUMNS - 1, COLUMNS, COLUMNS + 1, 3 * COLUMNS, 4 * COLUMNS + 3])
@pytest.mark.parametrize("character", ["x", "日"])
def test_text_that_wraps_is_replaced_as_a_whole(output: FakeTerminal, n_characters: int, character: str) -> None:
    lines = shown(output, f"**{character * n_characters}**\n")
    assert lines[:2] == ["before", "> said"]
    assert "".join(lines[2:-1]).replace(" ", "") == character * n_characters
    assert lines[-1] == ">"


def test_what_may_have_left_the_screen_stays_plain(output: FakeTerminal) -> None:
    lines = [f"- line {number}" for number in range(ROWS + 5)]
    assert shown(output, "\n".join(lines)) == [*lines[-(ROWS - 1) :], ">"]


def test_an_answer_as_long_as_the_screen_is_replaced(output: FakeTerminal) -> None:
    lines = [f"- {number}" for number in range(ROWS)]
    assert shown(output, "\n".join(lines)) == [*(f" • {number}" for number in range(1, ROWS)), ">"]


@pytest.mark.parametrize(
    "text", ["**a** \U0001f468\u200d\U0001f469", "**a** \u0e01\u0e38", "**a** \U0001f1e9\U0001f1ea"]
)
def test_text_whose_width_terminals_do_not_agree_about_stays_plain(output: FakeTerminal, text: str) -> None:
    assert shown(output, text)[2].startswith("**a**")


def test_an_answer_that_is_not_whole_stays_plain(output: FakeTerminal) -> None:
    assert shown(output, "**a", is_whole=False)[2:] == ["**a", ">"]


def test_a_line_of_the_log_in_between_keeps_the_text_plain(output: FakeTerminal) -> None:
    log = answers.Log()
    answer = answers.OnATerminal(log)
    answer.add(mn.Chunk("**a**"))
    log.n_lines += 1
    answer.finish()
    assert output.getvalue() == "**a**\n"


def test_a_dumb_terminal_gets_plain_text(output: FakeTerminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    shown(output, "**a**", reasoning="why")
    assert output.getvalue() == "why\n\n**a**\n"


def test_reasoning_is_dim_and_stays(output: FakeTerminal) -> None:
    assert shown(output, "**So** it is.", reasoning="Let me think.\nYes.")[2:] == [
        "Let me think.",
        "Yes.",
        "",
        "So it is.",
        ">",
    ]
    assert output.getvalue().startswith("\x1b[2mLet me think.\nYes.\x1b[22m\n\n")


HOSTILE = (
    "a\x1b[2Jb\x9bc\u202ed [x](javascript:alert) &#27;[2J &#x202e; `\x1b]0;t\x07`\n\n```\n\x1b[3J\n```\n<b>\x1b[H</b>"
)


def test_a_model_cannot_move_the_cursor(output: FakeTerminal) -> None:
    rendered = answers.markdown(HOSTILE, COLUMNS)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", re.sub(r"\x1b\[[\d;]*m", "", rendered))
    shown(output, HOSTILE, reasoning=HOSTILE, is_whole=False)
    assert not re.search("[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f\u202e]", output.getvalue())
    assert set(re.findall(r"\x1b.{0,3}", output.getvalue())) == {"\x1b[2m", "\x1b[22"}


# Completion


def test_a_word_is_completed_by_what_may_stand_there(tmp_path: Path) -> None:
    assert session.completions("/un") == ["/undo"]
    assert {"/fork", "/retry", "/exit"} <= {*session.completions("/")}
    assert session.completions("/set top_") == ["top_k", "top_n_sigma", "top_nsigma", "top_p"]
    (tmp_path / "one.json").touch()
    (tmp_path / "other").mkdir()
    assert session.completions(f"/load {tmp_path}/o") == [f"{tmp_path}/one.json", f"{tmp_path}/other/"]
    for line in ("", "/set temp 0", "/load /nowhere/", "un", "/undo ", "/a\n"):
        assert session.completions(line) == []
