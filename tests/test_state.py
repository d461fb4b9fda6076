"""Saved sequences: a restored sequence equals the saved one, and a damaged file restores nothing."""

import contextlib
import hashlib
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import minerva_native as mn
from tiny_models import TinyModel

IDS = list(range(20, 60))
KINDS = {
    "attention": TinyModel(),
    "sliding window": TinyModel("gemma2", tied=True),
    "recurrent": TinyModel("mamba"),
    "hybrid": TinyModel("jamba"),
    "mixture of experts": TinyModel("qwen3moe"),
}


def make(model: mn.Model, **options: object) -> mn.Context:
    options = {"n_ctx": 256, "n_seq": 2, "n_threads": 1, "prefix_cache": False, **options}
    return model.context(**options)  # type: ignore[arg-type]


@pytest.fixture
def context(tiny: mn.Model) -> Iterator[mn.Context]:
    with make(tiny) as context:
        yield context


@pytest.fixture
def saved(context: mn.Context, tmp_path: Path) -> Path:
    with context.sequence() as sequence:
        sequence.extend(IDS)
        sequence.save(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("options", [{}, {"kv_unified": False}, {"kv_type": "q8_0"}], ids=str)
def test_a_restored_sequence_equals_the_saved_one(
    load_tiny: Callable[[TinyModel], mn.Model], tmp_path: Path, name: str, options: dict[str, object]
) -> None:
    model = load_tiny(KINDS[name])
    with make(model, **options) as context:
        sequence = context.sequence()
        sequence.extend(IDS)
        sequence.save(tmp_path / "saved")
        logits = sequence.logits
        sequence.extend([1, 2, 3])
        further = sequence.logits
    with make(model, **options) as context:
        restored = context.restore(tmp_path / "saved")
        assert restored == IDS
        assert np.array_equal(restored.logits, logits)
        assert context.stats.tokens_evaluated == 0
        assert restored.extend([1, 2, 3]) == 3
        np.testing.assert_allclose(restored.logits, further, rtol=0, atol=1e-3 * np.abs(further).max())


@pytest.mark.parametrize("name", ["recurrent", "hybrid"])
def test_a_shifted_and_restored_sequence_can_be_rewound_to(
    load_tiny: Callable[[TinyModel], mn.Model], tmp_path: Path, name: str
) -> None:
    with make(load_tiny(KINDS[name])) as context:
        sequence = context.sequence()
        sequence.extend(IDS[:8])
        sequence.shift(3, 2)
        sequence.extend([1])
        sequence.save(tmp_path / "saved")
        restored = context.restore(tmp_path / "saved")
        logits = restored.logits
        restored.extend([2, 3])
        restored.rewind(2)
        before = context.stats.tokens_evaluated
        assert np.array_equal(restored.logits, logits)
        assert context.stats.tokens_evaluated == before


def test_bytes_are_what_a_file_would_have(context: mn.Context, tmp_path: Path) -> None:
    with context.sequence() as sequence:
        sequence.extend(IDS)
        sequence.save(tmp_path / "saved")
        data, logits = sequence.to_bytes(), sequence.logits
    assert data == (tmp_path / "saved").read_bytes()
    for given in (data, bytearray(data), memoryview(data)):
        with context.from_bytes(given) as restored:
            assert restored == IDS
            assert np.array_equal(restored.logits, logits)
    for damaged in (b"", data[:-1], data[:40], b"x" + data[1:]):
        with pytest.raises(mn.StateError, match="the data"):
            context.from_bytes(damaged)
    with pytest.raises(TypeError, match="data must be bytes"):
        context.from_bytes("saved")  # type: ignore[arg-type]


def test_waiting_tokens_and_unknown_logits(context: mn.Context, tmp_path: Path) -> None:
    sequence = context.sequence()
    sequence.extend(IDS)
    sequence.truncate(30)
    sequence.append(7)
    sequence.save(tmp_path / "saved")
    restored = context.restore(tmp_path / "saved")
    assert restored == sequence
    np.testing.assert_allclose(restored.logits, sequence.logits, atol=1e-3)


def test_an_empty_sequence(context: mn.Context, tmp_path: Path) -> None:
    context.sequence().save(tmp_path / "saved")
    restored = context.restore(tmp_path / "saved")
    assert restored == []
    assert restored.extend(IDS) == len(IDS)


def test_a_shifted_sequence_is_saved_as_it_is_after_the_shift(context: mn.Context, tmp_path: Path) -> None:
    sequence = context.sequence()
    sequence.extend(IDS)
    sequence.shift(4, 10)
    sequence.save(tmp_path / "saved")
    restored = context.restore(tmp_path / "saved")
    assert restored == [*IDS[:4], *IDS[14:]]
    assert np.array_equal(restored.logits, sequence.logits)
    assert context.stats.tokens_evaluated == len(IDS) + 1  # one to apply the shift
    sequence.extend([1])
    restored.extend([1])
    np.testing.assert_allclose(restored.logits, sequence.logits, atol=1e-3)


def test_a_fork_is_saved_whole(context: mn.Context, tmp_path: Path) -> None:
    sequence = context.sequence()
    sequence.extend(IDS)
    fork = sequence.fork(30)
    fork.extend([1])
    fork.save(tmp_path / "saved")
    logits = fork.logits
    fork.close()
    assert np.array_equal(context.restore(tmp_path / "saved").logits, logits)


def test_saving_replaces_a_file_and_leaves_nothing_else(context: mn.Context, saved: Path) -> None:
    sequence = context.sequence()
    sequence.extend([1, 2])
    sequence.save(str(saved))
    assert context.restore(saved) == [1, 2]
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def refused(context: mn.Context, path: Path, words: str | None = None) -> None:
    """Assert that a file is refused, and that this takes no cell and no sequence id."""
    with pytest.raises(mn.StateError, match=words):
        context.restore(path)
    assert context.cells_used == 0
    for sequence in [context.sequence() for _ in range(context.n_seq)]:  # all ids are free
        sequence.close()


@pytest.mark.parametrize("fiftieth", range(50))
def test_a_truncated_file_is_refused(context: mn.Context, saved: Path, fiftieth: int) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: len(content) * fiftieth // 50])
    refused(context, saved)


def test_a_file_with_any_byte_changed_is_refused(context: mn.Context, saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    choice = random.Random(1)
    places = {*range(400), *range(len(content) - 100, len(content)), *choice.sample(range(len(content)), 500)}
    for place in places:
        byte = content[place]
        content[place] ^= choice.randrange(1, 256)
        saved.write_bytes(content)
        refused(context, saved)
        content[place] = byte


@pytest.mark.parametrize(
    "change",
    [
        {"n_tokens": -1},
        {"n_tokens": 10**9},
        {"n_tokens": "40"},
        {"n_tokens": 39},
        {"n_cached": 41},
        {"n_cached": -3},
        {"n_logits": 2},
        {"n_pure": "x"},
        {"n_pure": 50},
        {"fingerprint": None},
        {"model": ...},
        {"n_cached": ...},
    ],
    ids=str,
)
def test_a_file_with_a_valid_checksum_and_an_invalid_header(
    context: mn.Context, saved: Path, change: dict[str, object]
) -> None:
    header, body = parts(saved)
    text = json.dumps({key: value for key, value in {**header, **change}.items() if value is not ...}).encode()
    write(saved, text, body)
    refused(context, saved)


def parts(path: Path) -> tuple[dict[str, object], bytearray]:
    """Return the header of a saved sequence, and what follows it."""
    content = path.read_bytes()
    (size,) = struct.unpack_from("<I", content, 20)
    header: dict[str, object] = json.loads(content[24 : 24 + size])
    return header, bytearray(content[24 + size : -32])


def write(path: Path, header: bytes, body: bytes | bytearray) -> None:
    """Write a file with a valid checksum, whatever its content."""
    content = path.read_bytes()[:20] + struct.pack("<I", len(header)) + header + body
    path.write_bytes(content + hashlib.blake2b(content, digest_size=32).digest())


def test_a_header_that_is_nested_too_deeply(context: mn.Context, saved: Path) -> None:
    write(saved, b"[" * 100_000, b"")
    refused(context, saved, "no header")


@pytest.mark.parametrize("token", [-1, 10**6])
def test_a_file_with_an_invalid_token(context: mn.Context, saved: Path, token: int) -> None:
    header, body = parts(saved)
    struct.pack_into("<i", body, 12, token)
    write(saved, json.dumps(header).encode(), body)
    refused(context, saved, "no token of this model")


@pytest.mark.parametrize("name", KINDS)
def test_a_corrupt_state_leaves_nothing_behind(
    load_tiny: Callable[[TinyModel], mn.Model], tmp_path: Path, name: str
) -> None:
    choice = random.Random(1)
    with make(load_tiny(KINDS[name]), n_seq=3) as context, context.sequence() as sequence:
        sequence.extend(IDS)
        expected = sequence.logits
        for _ in range(20):
            sequence.save(tmp_path / "saved")
            header, body = parts(tmp_path / "saved")
            start = 4 * (len(IDS) + context.model.tokenizer.n_vocab)
            for _ in range(20):
                body[choice.randrange(start, min(start + 600, len(body)))] = choice.randrange(256)
            write(tmp_path / "saved", json.dumps(header).encode(), body)
            with contextlib.suppress(mn.StateError):
                context.restore(tmp_path / "saved").close()
                continue
            for place in [context.sequence() for _ in range(context.n_seq - 1)]:
                place.close()
            sequence.truncate(0)
            sequence.extend(IDS)
            np.testing.assert_allclose(sequence.logits, expected, rtol=0, atol=1e-3 * np.abs(expected).max())


FORMS = {
    **KINDS,
    "transposed values": TinyModel(),
    "cells of their own": TinyModel(),
    "f32": TinyModel(),
    "bf16": TinyModel(),
    "q8_0": TinyModel(),
    "q4_1": TinyModel(),
    "RWKV": TinyModel("rwkv7"),
    "encoder-decoder": TinyModel("t5"),
    "small window": TinyModel("gemma2", tied=True),
    "hybrid with a small window": TinyModel("lfm2", n_layer=4),
}
FORM_OPTIONS: dict[str, dict[str, object]] = {
    "transposed values": {"flash_attention": "off"},
    "cells of their own": {"kv_unified": False},
    **{kind: {"kv_type": kind} for kind in ("f32", "bf16", "q8_0")},
    "q4_1": {"kv_type": ("q4_1", "q5_0")},
    "small window": {"swa_full": False},
    "hybrid with a small window": {"swa_full": False, "flash_attention": "off"},
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("n", [1, 2, 50])
def test_every_form_of_memory_is_saved_and_restored(
    load_tiny: Callable[[TinyModel], mn.Model], tmp_path: Path, name: str, n: int
) -> None:
    with make(load_tiny(FORMS[name]), **FORM_OPTIONS.get(name, {})) as context:
        if context.model.has_encoder:
            context.encode([1, 2, 3])
        sequence = context.sequence()
        sequence.extend(list(range(20, 20 + n)))
        sequence.save(tmp_path / "saved")
        assert np.array_equal(context.restore(tmp_path / "saved").logits, sequence.logits)


@pytest.mark.parametrize("name", FORMS)
def test_a_state_that_is_not_finite_is_refused_and_spoils_nobody(
    load_tiny: Callable[[TinyModel], mn.Model], tmp_path: Path, name: str
) -> None:
    """Whatever is overwritten, either nothing is restored, or the other sequence computes what it did before."""
    with make(load_tiny(FORMS[name]), **FORM_OPTIONS.get(name, {})) as context:
        if context.model.has_encoder:
            context.encode([1, 2, 3])
        sequence = context.sequence()
        sequence.extend(IDS)
        sequence.save(tmp_path / "saved")
        sequence.truncate(0)
        sequence.extend(IDS[:9])
        expected = sequence.logits
        header, body = parts(tmp_path / "saved")
        start = 4 * (len(IDS) + context.model.tokenizer.n_vocab) + 8
        refusals = 0
        choice = random.Random(1)
        for _ in range(60):
            spoilt = bytearray(body)
            place = start + 2 * choice.randrange((len(body) - start) // 2 - 64)
            spoilt[place : place + 64] = struct.pack("<32H", *[choice.choice((0x7C00, 0xFC00, 0x7E00, 0xFFFF))] * 32)
            write(tmp_path / "saved", json.dumps(header).encode(), spoilt)
            try:
                context.restore(tmp_path / "saved").close()
            except mn.StateError:
                refusals += 1
            sequence.rewind(1)
            sequence.extend(IDS[8:9])
            np.testing.assert_allclose(sequence.logits, expected, rtol=0, atol=1e-3 * np.abs(expected).max())
        assert refusals > 20


@pytest.mark.parametrize(("attention", "value"), [("on", 1e5), ("off", 1e38)])
def test_numbers_that_only_attention_makes_infinite(
    tiny: mn.Model, tmp_path: Path, attention: str, value: float
) -> None:
    """Flash attention computes with f16, and a product of large numbers of f32 is no number of f32."""
    with make(tiny, kv_type="f32", flash_attention=attention) as context:
        with context.sequence() as sequence:
            sequence.extend(IDS)
            sequence.save(tmp_path / "saved")
        header, body = parts(tmp_path / "saved")
        struct.pack_into("<f", body, len(body) - 400, value)
        write(tmp_path / "saved", json.dumps(header).encode(), body)
        refused(context, tmp_path / "saved", "not finite")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite(context: mn.Context, saved: Path, value: float) -> None:
    header, body = parts(saved)
    struct.pack_into("<f", body, 4 * len(IDS) + 40, value)
    write(saved, json.dumps(header).encode(), body)
    refused(context, saved, "logits that are not finite")


@pytest.mark.parametrize("kind", ["folder", "FIFO", "device", "far too large"])
def test_what_is_no_file_to_read(context: mn.Context, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "saved"
    match kind:
        case "folder":
            path.mkdir()
        case "FIFO":
            os.mkfifo(path)
        case "device":
            path = Path("/dev/zero")
        case "far too large":
            with path.open("wb") as file:
                file.truncate(1 << 43)
    refused(context, path, "is not a regular file|more than the memory")


def test_keys_that_are_rotated_differently(tiny: mn.Model, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
        with make(tiny) as context:
            refused(context, saved, "its rotated is True, here it is False")
    monkeypatch.setattr(mn.Model, "has_long_factors", True)
    with make(tiny, n_ctx=513) as context:
        refused(context, saved, "its long_factors is False, here it is True")
    with make(tiny, n_ctx=512) as context:
        assert context.restore(saved) == IDS


def test_a_long_file_name(context: mn.Context, tmp_path: Path) -> None:
    with context.sequence() as sequence:
        sequence.extend(IDS)
        sequence.save(tmp_path / ("n" * 250))
        assert context.restore(tmp_path / ("n" * 250)) == IDS


def test_a_longer_file_is_refused(context: mn.Context, saved: Path) -> None:
    saved.write_bytes(saved.read_bytes() + b"more")
    refused(context, saved, "checksum")


def test_a_file_of_another_kind(context: mn.Context, demo: mn.Model) -> None:
    refused(context, demo.path, "is not a saved sequence")


def test_a_missing_file(context: mn.Context, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        context.restore(tmp_path / "nothing")


def test_another_model(load_tiny: Callable[[TinyModel], mn.Model], saved: Path) -> None:
    """The first has the same shape and differs only in its weights."""
    for other in (TinyModel(seed=2), TinyModel(n_layer=2), TinyModel("mamba")):
        with make(load_tiny(other)) as context:
            refused(context, saved, "was saved from another model")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_type": "f32"}, r"its kv_type is \['f16', 'f16'\], here it is \['f32', 'f32'\]"),
        ({"kv_type": ("f16", "q8_0")}, "kv_type"),
        ({"kv_unified": False}, "kv_unified is True, here it is False"),
        ({"flash_attention": "off"}, "V transposition"),
        ({"rope_freq_scale": 0.5}, "rope"),
    ],
)
def test_other_options(tiny: mn.Model, saved: Path, options: dict[str, object], words: str) -> None:
    with make(tiny, **options) as context:
        refused(context, saved, words)


def test_a_context_of_another_size_is_accepted(tiny: mn.Model, saved: Path) -> None:
    with make(tiny, n_ctx=64, n_seq=1, n_batch=8) as context:
        assert context.restore(saved) == IDS


def test_a_context_without_room(tiny: mn.Model, saved: Path) -> None:
    with make(tiny, n_ctx=39) as context:
        with pytest.raises(mn.ContextFullError, match="0 of n_ctx=39 cells are used, 40 more are wanted, 39 are free"):
            context.restore(saved)
        assert context.cells_used == 0
        both = context.sequence(), context.sequence()
        with pytest.raises(mn.ContextError, match="all 2 sequences"):
            context.restore(saved)
        assert both[0] == []


def test_a_restored_sequence_is_a_prefix_for_others(tiny: mn.Model, saved: Path) -> None:
    with make(tiny, prefix_cache=True) as context:
        context.restore(saved)
        assert context.sequence().extend([*IDS, 1]) == 1


def test_a_missing_folder(context: mn.Context, tmp_path: Path) -> None:
    sequence = context.sequence()
    sequence.extend(IDS)
    with pytest.raises(FileNotFoundError):
        sequence.save(tmp_path / "nowhere" / "saved")


def test_a_closed_sequence_cannot_be_saved(context: mn.Context, tmp_path: Path) -> None:
    sequence = context.sequence()
    sequence.close()
    with pytest.raises(mn.ClosedError):
        sequence.save(tmp_path / "saved")


def test_a_save_that_fails_leaves_the_old_file(
    context: mn.Context, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def fail(number: int) -> None:
        raise OSError("no space left")

    sequence = context.sequence()
    sequence.extend([1, 2, 3])
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        sequence.save(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL on this system")
def test_a_kill_during_a_save_leaves_the_old_file_or_the_new(demo: mn.Model, tmp_path: Path) -> None:
    program = """
import sys, minerva_native as mn
context = mn.Model.demo().context(n_ctx=512, n_threads=1)
sequence = context.sequence()
sequence.extend([10] * 200)
number = 0
while True:
    number += 1
    sequence.append(11)
    _ = sequence.logits
    sequence.save(sys.argv[1])
    if number == 1:
        print("saving", flush=True)
    if number % 200 == 0:
        sequence.truncate(200)
"""
    choice = random.Random(1)
    with demo.context(n_ctx=512, n_threads=1) as context:
        for round_ in range(8):
            path = tmp_path / "saved"
            with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE) as process:
                assert process.stdout is not None
                assert process.stdout.readline() == b"saving\n"
                time.sleep(choice.random() * 0.05)
                process.kill()
            with context.restore(path) as restored:
                assert restored[:200] == [10] * 200
                assert set(restored[200:]) == {11}, round_
