"""The prompt cache on disk: what one process has evaluated, the next one reads, whatever happens in between."""

import hashlib
import json
import logging
import os
import random
import re
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest

import minerva_native as mn
from minerva_native.prompt_cache import PromptCache
from tiny_models import TinyModel

PROMPT = [(7919 * at) % 500 + 10 for at in range(900)]
OPTIONS: dict[str, Any] = {"n_ctx": 1024, "n_threads": 1}

PROGRAM = """
import json, os, signal, sys
import minerva_native as mn
directory, action, *numbers = sys.argv[1:]
ids = [(7919 * at) % 500 + 10 for at in range(900)]
if action == "die":  # when the third file is written, but has not its name yet
    fsync, calls = os.fsync, []
    def die(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)
    os.fsync = die
if action == "limit":
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(numbers[0]),) * 2)
with mn.LLM(mn.DEMO_PATH, cache_dir=directory or None, n_ctx=1024, n_threads=1) as llm:
    answer = llm.complete(ids + [int(number) for number in numbers if action == "more"], max_tokens=16, temperature=0.0)
    print(json.dumps({
        "evaluated": answer.usage.prompt_tokens - answer.usage.cached_tokens,
        "prefill": llm.context.stats.tokens_evaluated - answer.usage.completion_tokens,
        "text": answer.text,
    }))
"""


def run(directory: Path | str, action: str = "", *numbers: int, status: int = 0) -> dict[str, Any]:
    """Answer a prompt of 900 tokens in a process of its own."""
    command = [sys.executable, "-c", PROGRAM, str(directory), action, *map(str, numbers)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stderr
    result: dict[str, Any] = json.loads(done.stdout) if done.stdout else {}
    return result


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "prompts"


class Room(NamedTuple):
    """A context with a prompt cache."""

    context: mn.Context
    cache: PromptCache


@pytest.fixture
def room(demo: mn.Model, directory: Path) -> Iterator[Callable[..., Room]]:
    """A function that makes a context with a prompt cache, as a new process does."""
    made: list[Room] = []

    def make(max_bytes: int = 1 << 30, model: mn.Model = demo, **options: Any) -> Room:
        context = model.context(**{"n_seq": 2, **OPTIONS, **options})
        made.append(Room(context, PromptCache(directory, context, max_bytes)))
        return made[-1]

    yield make
    for context, cache in made:
        cache.close()
        context.close()


def keep(room: Room, ids: list[int]) -> None:
    """Evaluate tokens and wait until they are on disk."""
    with room.context.sequence() as sequence:
        sequence.extend(ids)
        room.cache.store(sequence)
    room.cache.flush()


def files(directory: Path) -> list[Path]:
    return sorted(directory.iterdir(), key=lambda path: int(path.stem.rpartition("-")[2]))


# Restarts


def test_the_next_process_evaluates_hardly_anything_of_a_prompt(directory: Path) -> None:
    first, second, plain = run(directory), run(directory), run("")
    assert first["evaluated"] == plain["evaluated"] == 900
    assert second["evaluated"] <= 9
    assert second["prefill"] <= 9
    assert first["text"] == second["text"] == plain["text"]


def test_a_prompt_that_goes_on_differently_is_evaluated_from_there(directory: Path) -> None:
    run(directory)
    assert run(directory, "more", 5, 6, 7)["evaluated"] <= 4


def test_a_kill_while_a_file_is_written_loses_nothing_before_it(directory: Path) -> None:
    run(directory, "die", status=-signal.SIGKILL)
    assert [path.name for path in directory.iterdir() if path.suffix == ".part"]
    after = run(directory)
    assert after["evaluated"] == 900 - 2 * 256
    assert after["text"] == run("")["text"]
    assert run(directory)["evaluated"] <= 9


def test_what_cannot_be_written_is_no_error_of_the_request(directory: Path) -> None:
    assert run(directory, "limit", 100_000)["text"] == run("")["text"]
    assert not list(directory.iterdir())


def test_two_processes_use_one_directory_at_a_time(directory: Path) -> None:
    commands = [[sys.executable, "-c", PROGRAM, str(directory), "more", str(number)] for number in (5, 6, 7)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    results = [json.loads(process.communicate(timeout=300)[0]) for process in processes]
    for number, result in zip((5, 6, 7), results, strict=True):
        again = run(directory, "more", number)
        assert again["evaluated"] <= 9
        assert again["text"] == result["text"]


def test_a_chat_goes_on_after_a_restart(demo: mn.Model, directory: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {**OPTIONS, "template": "{% for m in messages %}{{ m.content }}\n{% endfor %}"}
    asked: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0}
    with mn.LLM(demo, cache_dir=directory, **options) as llm:
        chat = llm.chat(system="Once upon a time there was a fox. " * 20)
        chat.send("What did it do?", **asked)
        chat.save(tmp_path / "chat")
        expected = chat.send("And then?", **asked)
    with mn.LLM(demo, **options) as llm:
        plain = llm.load_chat(tmp_path / "chat").send("And then?", **asked)
    with mn.LLM(demo, cache_dir=directory, **options) as llm:
        answer = llm.load_chat(tmp_path / "chat").send("And then?", **asked)
    assert plain.usage.cached_tokens == 0
    assert answer.usage.prompt_tokens - answer.usage.cached_tokens <= 8
    assert answer.text == expected.text


def test_nothing_is_written_unless_it_is_asked_for(demo: mn.Model, tmp_path: Path) -> None:
    program = PROGRAM.replace("cache_dir=directory or None, ", "")
    home = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", program, "", ""], check=True, capture_output=True, env=home, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


# Every kind of memory


class Kind(NamedTuple):
    """A kind of memory: a model that has it, and how its context is made."""

    model: TinyModel
    options: Mapping[str, Any] = MappingProxyType({})


KINDS = {
    "attention": Kind(TinyModel()),
    "attention, quantised": Kind(TinyModel(), {"kv_type": "q8_0", "flash_attention": "on"}),
    "attention in cells of its own": Kind(TinyModel(), {"kv_unified": False}),
    "mixture of experts": Kind(TinyModel("qwen3moe"), {"kv_type": "f32"}),
    "sliding window": Kind(TinyModel("gemma2", tied=True)),
    "sliding window, small cache": Kind(TinyModel("gemma2", tied=True), {"swa_full": False}),
    "recurrent, Mamba": Kind(TinyModel("mamba")),
    "recurrent, RWKV": Kind(TinyModel("rwkv7")),
    "hybrid": Kind(TinyModel("jamba")),
    "hybrid with a small window": Kind(TinyModel("lfm2", n_layer=4), {"swa_full": False}),
    "encoder-decoder": Kind(TinyModel("t5")),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("n", [40, 300])
def test_every_memory_goes_on_from_what_is_on_disk(
    room: Callable[..., Room], load_tiny: Callable[[TinyModel], mn.Model], name: str, n: int
) -> None:
    kind = KINDS[name]
    prompt, answer = [20 + at % 37 for at in range(n)], [90, 91, 92]

    def make() -> Room:
        made = room(model=load_tiny(kind.model), n_batch=64, n_ubatch=32, **kind.options)
        if made.context.model.has_encoder:
            made.context.encode(list(range(100, 108)))
        return made

    context, cache = make()
    with context.sequence() as sequence:
        sequence.extend(prompt)
        _ = sequence.logits
        sequence.extend(answer)
        before = sequence.logits
        cache.store(sequence)
        assert np.array_equal(sequence.logits, before)
        sequence.extend([93])
        expected = sequence.logits
        cache.flush()
    with context.sequence() as sequence:
        n_in_memory = sequence.extend([*prompt, 95, 96])
    context, cache = make()
    assert cache.load([*prompt, *answer, 93]) == n + 3
    with context.sequence() as sequence:
        assert sequence.extend([*prompt, *answer, 93]) == 1
        assert np.allclose(sequence.logits, expected, rtol=1e-3, atol=1e-3)
    context, cache = make()  # the same prompt and another answer
    cache.load([*prompt, 95, 96])
    with context.sequence() as sequence:
        assert sequence.extend([*prompt, 95, 96]) == n_in_memory
        found = sequence.logits
    context.clear_cache()
    with context.sequence() as sequence:
        sequence.extend([*prompt, 95, 96])
        assert np.allclose(sequence.logits, found, rtol=1e-2, atol=1e-2)


def test_what_was_shifted_is_not_kept(room: Callable[..., Room], directory: Path) -> None:
    context, cache = room()
    with context.sequence() as sequence:
        sequence.extend(PROMPT[:400])
        sequence.shift(280, 100)
        cache.store(sequence)
        cache.flush()
    assert [path.n_tokens for path in mn.PromptFiles(directory).prompts()] == [256, 24]
    assert room().cache.load(PROMPT[:400]) == 280


# What is written


def test_prompts_share_what_they_have_in_common(room: Callable[..., Room], directory: Path) -> None:
    one = room()
    keep(one, PROMPT[:600])
    assert len(files(directory)) == 3
    keep(one, PROMPT[:512] + PROMPT[:88])
    assert len(files(directory)) == 4


def test_a_prompt_that_grows_replaces_its_tail(room: Callable[..., Room], directory: Path) -> None:
    one = room()
    lengths = []
    for n in (300, 310, 330, 520):
        keep(one, PROMPT[:n])
        lengths.append([int(path.stem.rpartition("-")[2]) for path in files(directory)])
    assert lengths == [[256, 300], [256, 300], [256, 330], [256, 512]]


def test_a_state_that_grows_replaces_the_one_before(
    room: Callable[..., Room], load_tiny: Callable[[TinyModel], mn.Model], directory: Path
) -> None:
    one = room(model=load_tiny(TinyModel("mamba")))
    prompt = [20 + at % 37 for at in range(300)]
    for n in (200, 205, 300):
        keep(one, prompt[:n])
    assert [path.n_tokens for path in mn.PromptFiles(directory).prompts()] == [300]


def test_only_what_the_memory_lacks_is_read(room: Callable[..., Room], directory: Path) -> None:
    keep(room(), PROMPT)
    for path in files(directory)[:2]:
        path.write_bytes(b"damaged")
    context, cache = room(n_seq=3)
    with context.sequence() as sequence:
        sequence.extend(PROMPT[:600])
    assert cache.load(PROMPT) == 300
    with context.sequence() as sequence:
        assert sequence.extend(PROMPT) <= 1


def test_a_sequence_and_its_forks_are_as_they_were_after_it_is_kept(room: Callable[..., Room]) -> None:
    context, cache = room()
    sequence = context.sequence()
    sequence.extend(PROMPT[:300])
    fork = sequence.fork(200)
    before = sequence.logits
    n_cells, n_evaluated = context.cells_used, context.stats.tokens_evaluated
    cache.store(sequence)
    assert np.array_equal(sequence.logits, before)
    assert fork.extend([5, 6]) == 2
    assert sequence.extend([7]) == 1
    assert context.cells_used == n_cells + 3
    assert context.stats.tokens_evaluated == n_evaluated + 3


def test_it_is_for_its_owner_alone_whatever_the_umask_is(room: Callable[..., Room], directory: Path) -> None:
    before = os.umask(0o077 if os.umask(0) == 0 else 0)
    try:
        for mask in (0, 0o777):
            os.umask(mask)
            keep(room(), PROMPT[: 300 if mask else 600])
    finally:
        os.umask(before)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in files(directory)} == {0o600}


def test_the_least_recently_used_is_evicted_first_and_the_end_of_a_prompt_before_its_beginning(
    room: Callable[..., Room], directory: Path
) -> None:
    one = room()
    other = PROMPT[::-1]
    keep(one, PROMPT[:512])
    size = mn.PromptFiles(directory).size_bytes
    keep(one, other[:512])
    room().cache.load(PROMPT[:512])
    small = room(max_bytes=size * 7 // 4)
    keep(small, other[100:350])
    left = {path.name for path in files(directory)}
    assert mn.PromptFiles(directory).size_bytes <= size * 7 // 4
    assert len(left) == 3
    assert room().cache.load(PROMPT[:512]) == 512
    assert room().cache.load(other[:512]) == 0
    assert room().cache.load(other[100:350]) == 250


def test_what_is_larger_than_the_budget_is_not_written(room: Callable[..., Room], directory: Path) -> None:
    keep(room(max_bytes=1000), PROMPT)
    assert not files(directory)


def test_drafts_that_a_killed_process_left_are_removed_in_the_end(room: Callable[..., Room], directory: Path) -> None:
    one = room()
    old, new = directory / f".{'0' * 16}.part", directory / f".{'1' * 16}.part"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    keep(one, PROMPT[:100])
    assert not old.exists()
    assert new.exists()


def test_closing_takes_no_longer_than_it_may(
    room: Callable[..., Room], directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    is_released = threading.Event()
    monkeypatch.setattr(os, "fsync", lambda descriptor: is_released.wait(30))
    context, cache = room()
    with context.sequence() as sequence:
        sequence.extend(PROMPT)
        cache.store(sequence)
    before = time.perf_counter()
    cache.close(timeout=0.05)
    assert time.perf_counter() - before < 10
    assert "closed before everything was written" in caplog.text
    is_released.set()


# What is not trusted


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def change_version(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[16] += 1
    path.write_bytes(content)


HARM: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (damage, "checksum does not match"),
    "cut short": (lambda path: os.truncate(path, path.stat().st_size // 2), "checksum does not match"),
    "cut to its beginning": (lambda path: os.truncate(path, 40), "damaged|not a saved sequence|checksum"),
    "empty": (lambda path: os.truncate(path, 0), "not a saved sequence|damaged"),
    "something else": (lambda path: path.write_bytes(b"x" * 1000), "not a saved sequence|damaged"),
    "another version": (change_version, "version"),
    "a symbolic link": (link, "is a symbolic link"),
    "a FIFO": (make_fifo, "not a file that only this user"),
    "others can write": (lambda path: path.chmod(0o666), "not a file that only this user"),
    "a directory": (make_directory, "not a file that only this user"),
}


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("model", [None, TinyModel("jamba")], ids=["pieces", "states"])
def test_a_file_that_cannot_be_trusted_is_skipped_by_name(
    room: Callable[..., Room],
    directory: Path,
    caplog: pytest.LogCaptureFixture,
    load_tiny: Callable[[TinyModel], mn.Model],
    harm: str,
    model: TinyModel | None,
) -> None:
    options = {} if model is None else {"model": load_tiny(model)}
    prompt = PROMPT[:600] if model is None else [20 + at % 37 for at in range(200)]
    keep(room(**options), prompt)
    path = files(directory)[-1]
    HARM[harm][0](path)
    context, cache = room(**options)
    n_kept = 512 if model is None else 0
    with caplog.at_level(logging.WARNING, "minerva_native"):
        assert cache.load(prompt) == n_kept
        assert cache.load(prompt) == 0
    lines = [line for line in caplog.messages if path.name in line]
    assert len(lines) == 1
    assert re.search(HARM[harm][1], lines[0])
    if not path.is_dir():  # it is written again
        with context.sequence() as sequence:
            sequence.extend(prompt)
            cache.store(sequence)
        cache.flush()
        assert room(**options).cache.load(prompt) == len(prompt)


@pytest.mark.parametrize("model", [None, TinyModel("jamba")], ids=["pieces", "states"])
def test_a_state_that_libllama_refuses_is_skipped_once(
    room: Callable[..., Room],
    directory: Path,
    caplog: pytest.LogCaptureFixture,
    load_tiny: Callable[[TinyModel], mn.Model],
    model: TinyModel | None,
) -> None:
    options = {} if model is None else {"model": load_tiny(model)}
    prompt = [20 + at % 37 for at in range(600 if model is None else 200)]
    keep(room(**options), prompt)
    path = files(directory)[-1]
    content = path.read_bytes()[:-40]  # without the end of the state, and the digest
    path.write_bytes(content + hashlib.blake2b(content, digest_size=32).digest())
    context, cache = room(**options)
    with context.sequence() as sequence:
        sequence.extend([5, 6, 7])
        expected = sequence.logits
        sequence.append(8)
        assert cache.load(prompt) == 0
        sequence.rewind(1)
        assert np.allclose(sequence.logits, expected, atol=1e-3)
    assert cache.load(prompt) == (512 if model is None else 0)
    lines = [line for line in caplog.messages if path.name in line]
    assert len(lines) == 1
    assert "cannot be restored here" in lines[0]


@pytest.mark.parametrize("model", [None, TinyModel("jamba")], ids=["pieces", "states"])
def test_no_header_makes_a_request_fail(
    room: Callable[..., Room], directory: Path, load_tiny: Callable[[TinyModel], mn.Model], model: TinyModel | None
) -> None:
    options = {} if model is None else {"model": load_tiny(model)}
    prompt = [20 + at % 37 for at in range(100)]
    keep(room(**options), prompt)
    (path,) = files(directory)
    content, choose = path.read_bytes(), random.Random(1)
    n_header = struct.unpack_from("<I", content, 20)[0]
    for _ in range(60):
        mutant = bytearray(content)
        for _ in range(choose.choice([1, 1, 2, 40])):
            mutant[choose.randrange(24 + n_header)] = choose.choice(b'0129[]{},:"nx\xff')
        path.write_bytes(mutant)
        assert room(**options).cache.load([*prompt[:90], 5, 6]) <= 0 or mutant == content


def test_a_file_under_the_name_of_another_is_skipped(
    room: Callable[..., Room], directory: Path, load_tiny: Callable[[TinyModel], mn.Model], tmp_path: Path
) -> None:
    tiny = load_tiny(TinyModel())
    short = [20 + at % 37 for at in range(100)]
    keep(room(model=tiny), short)
    (of_tiny,) = files(directory)
    of_tiny = of_tiny.rename(tmp_path / of_tiny.name)
    keep(room(), short)
    (of_demo,) = files(directory)
    of_demo.write_bytes(of_tiny.read_bytes())
    context, cache = room()
    assert cache.load(short) == 0
    with context.sequence() as sequence:
        assert sequence.extend(short) == 100


def test_what_another_model_or_context_has_evaluated_is_not_used(
    room: Callable[..., Room], load_tiny: Callable[[TinyModel], mn.Model], caplog: pytest.LogCaptureFixture
) -> None:
    short = [20 + at % 37 for at in range(100)]
    keep(room(model=load_tiny(TinyModel())), short)
    assert room(model=load_tiny(TinyModel(seed=2))).cache.load(short) == 0
    assert room(model=load_tiny(TinyModel()), kv_type="q8_0", flash_attention="on").cache.load(short) == 0
    assert room(model=load_tiny(TinyModel()), rope_freq_base=5000.0).cache.load(short) == 0
    assert room(model=load_tiny(TinyModel())).cache.load(short) == 100
    assert "skips" not in caplog.text


def test_files_of_others_are_left_alone(
    room: Callable[..., Room], directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory.mkdir()
    (directory / "diary.txt").write_text("mine")
    one = room(max_bytes=0)
    one.cache.load(PROMPT)
    one.cache.load(PROMPT)
    assert [line for line in caplog.messages if "'diary.txt'" in line] == [
        f"{directory} has what is not the prompt cache's, and is skipped: 'diary.txt'"
    ]
    mn.PromptFiles(directory).clear()
    assert (directory / "diary.txt").read_text() == "mine"


def test_files_that_vanish_are_no_error(
    room: Callable[..., Room], directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = room()
    keep(one, PROMPT[:600])
    assert mn.PromptFiles(directory).clear() == 3
    directory.rmdir()
    other = room()
    directory.rmdir()
    assert other.cache.load(PROMPT) == 0
    keep(other, PROMPT[:600])
    assert len(files(directory)) == 3
    assert not caplog.messages


# What does not fit


def test_a_prompt_is_brought_in_beside_open_sequences_or_not_at_all(room: Callable[..., Room]) -> None:
    keep(room(), PROMPT)
    context, cache = room(n_seq=2)
    open_one = context.sequence()
    open_one.extend(PROMPT[::-1][:500])
    with pytest.raises(mn.ContextFullError):
        cache.load(PROMPT)
    assert cache.load(PROMPT[:400]) == 400
    assert len(open_one) == 500
    n_evaluated = context.stats.tokens_evaluated
    assert open_one.extend([5]) == 1
    assert context.stats.tokens_evaluated == n_evaluated + 1


def test_a_context_without_a_prefix_cache_cannot_have_one(demo: mn.Model, directory: Path) -> None:
    with demo.context(n_ctx=64, prefix_cache=False) as context, pytest.raises(ValueError, match="prefix_cache=True"):
        PromptCache(directory, context)


# The command


def minerva(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "minerva_native", "cache", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})


def test_the_command_lists_counts_and_clears(room: Callable[..., Room], directory: Path) -> None:
    keep(room(), PROMPT[:300])
    size = sum(path.stat().st_size for path in files(directory))
    listed = minerva("list", str(directory))
    assert [line.split()[1:6] for line in listed.stdout.splitlines()] == [
        ["minerva-demo.gguf", "tokens", "0", "to", "256"],
        ["minerva-demo.gguf", "tokens", "256", "to", "300"],
    ]
    found = json.loads(minerva("list", "--json", str(directory)).stdout)
    assert [Path(prompt["path"]) for prompt in found["prompts"]] == files(directory)
    assert json.loads(minerva("size", "--json", str(directory)).stdout)["size_bytes"] == size
    assert minerva("clear", "-q", str(directory)).stdout == "removed 2 files\n"
    assert minerva("list", str(directory)).stdout == ""


def test_the_command_and_the_library_have_the_same_default(demo: mn.Model, tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": ""}
    expected = tmp_path / ".cache" / "minerva-native" / "prompts"
    assert json.loads(minerva("size", "--json", **home).stdout) == {"directory": str(expected), "size_bytes": 0}
    program = PROGRAM.replace("directory or None", "True")
    environment = {**os.environ, **home}
    subprocess.run([sys.executable, "-c", program, "", ""], check=True, capture_output=True, env=environment)
    assert json.loads(minerva("size", "--json", **home).stdout)["size_bytes"] > 1_000_000


def test_the_command_needs_an_action() -> None:
    assert minerva().returncode == 2
    assert minerva("list", "--no-such-option").returncode == 2
