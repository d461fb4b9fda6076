"""Text to tokens and back, with a known vocabulary; comparisons with other projects are in `oracles`."""

import base64
import gc
import os
import random
import re
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import minerva_native as mn
from minerva_native._binding import ffi, lib
from tiny_models import END, END_OF_TURN, SPECIAL, START_OF_TURN, TOKENS, VOCABULARY, Key, TinyModel, write_gguf


@pytest.fixture
def tokenizer(tiny: mn.Model) -> mn.Tokenizer:
    return tiny.tokenizer


@pytest.fixture
def spm(vocabulary: Callable[[str], mn.Tokenizer]) -> mn.Tokenizer:
    """A vocabulary that puts a space before a text and has a token for each byte."""
    return vocabulary("llama-spm")


@pytest.fixture
def without_vocabulary(tmp_path: Path) -> mn.Tokenizer:
    keys: dict[str, Key] = {f"llama.{key}": value for key, value in TinyModel().hyperparameters.items()}
    keys["tokenizer.ggml.model"] = "none"
    return mn.Model.load(write_gguf(tmp_path / "none.gguf", "llama", keys), vocab_only=True).tokenizer


def with_keys(path: Path, **changes: Key) -> mn.Tokenizer:
    """Load the tiny vocabulary with some `tokenizer.ggml` keys changed."""
    keys: dict[str, Key] = {f"llama.{key}": value for key, value in TinyModel().hyperparameters.items()}
    keys |= VOCABULARY | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return mn.Model.load(write_gguf(path, "llama", keys), vocab_only=True).tokenizer


def ids(*tokens: str) -> list[int]:
    return [TOKENS.index(token) for token in tokens]


# Encoding


def test_merges_are_applied_in_their_order(tokenizer: mn.Tokenizer) -> None:
    assert tokenizer.encode("the thing", add_special=False) == ids("the", "Ġ", "th", "ing")


def test_a_character_without_a_token_becomes_its_bytes(tokenizer: mn.Tokenizer) -> None:
    assert tokenizer.encode("🦙", add_special=False) == ids("ðŁ", "¦", "Ļ")


def test_the_model_decides_which_special_tokens_are_added(tokenizer: mn.Tokenizer, tmp_path: Path) -> None:
    assert tokenizer.encode("a") == [END, *ids("a")]
    assert with_keys(tmp_path / "none.gguf", add_bos_token=False).encode("a") == ids("a")
    assert with_keys(tmp_path / "both.gguf", add_eos_token=True).encode("a") == [END, *ids("a"), END]


def test_nothing_is_added_without_add_special(tokenizer: mn.Tokenizer) -> None:
    assert tokenizer.encode("a", add_special=False) == ids("a")


def test_names_of_special_tokens_are_encoded_as_text_by_default(tokenizer: mn.Tokenizer) -> None:
    encoded = tokenizer.encode("<|im_end|>", add_special=False)
    assert END_OF_TURN not in encoded
    assert tokenizer.decode(encoded) == "<|im_end|>"


def test_names_of_special_tokens_become_tokens_with_parse_special(tokenizer: mn.Tokenizer) -> None:
    encoded = tokenizer.encode("<|im_start|>a<|im_end|>", add_special=False, parse_special=True)
    assert encoded == [START_OF_TURN, *ids("a"), END_OF_TURN]


def test_an_empty_text_has_only_the_added_tokens(tokenizer: mn.Tokenizer) -> None:
    assert tokenizer.encode("", add_special=False) == []
    assert tokenizer.encode("") == [END]


def test_a_nul_character_is_a_character(tokenizer: mn.Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\0b")) == "a\0b"


def test_a_text_can_become_more_tokens_than_it_has_bytes(spm: mn.Tokenizer) -> None:
    encoded = spm.encode("\x01" * 3, add_special=True)
    assert len(encoded) == 5
    assert spm.decode(encoded) == "\x01" * 3


def test_a_long_text_comes_back(tokenizer: mn.Tokenizer) -> None:
    text = "The llama sings. 🦙\n" * 5000
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(("text", "index"), [("\ud800", 0), ("ab\udfff", 2), ("\ud83e\udd99", 0)])
def test_a_lone_surrogate_is_refused_with_its_index(tokenizer: mn.Tokenizer, text: str, index: int) -> None:
    with pytest.raises(mn.TokenizerError, match=f"surrogate at index {index}"):
        tokenizer.encode(text)


# Decoding


def test_decode_accepts_lists_tuples_arrays_and_iterators(tokenizer: mn.Tokenizer) -> None:
    the = ids("the", "Ġa")
    others = (the, tuple(the), np.array(the), np.array(the, np.uint16), iter(the))
    assert {tokenizer.decode(other) for other in others} == {"the a"}  # type: ignore[arg-type]


def test_decode_of_nothing_is_empty(tokenizer: mn.Tokenizer) -> None:
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode_bytes(np.empty(0, np.int64)) == b""


def test_control_tokens_are_shown_only_with_special(tokenizer: mn.Tokenizer) -> None:
    turn = [START_OF_TURN, *ids("a"), END_OF_TURN]
    assert tokenizer.decode(turn) == "a"
    assert tokenizer.decode(turn, special=True) == "<|im_start|>a<|im_end|>"


def test_bytes_that_are_not_a_character_are_kept_as_bytes_and_replaced_in_text(tokenizer: mn.Tokenizer) -> None:
    broken = ids("a", "ðŁ", "b")
    assert tokenizer.decode_bytes(broken) == b"a\xf0\x9fb"
    assert tokenizer.decode(broken) == "a\ufffdb"


@pytest.mark.parametrize("text", ["llama", " llama", "  llama", "\nllama", ""])
def test_the_space_that_a_vocabulary_puts_before_a_text_is_removed(spm: mn.Tokenizer, text: str) -> None:
    assert spm.decode(spm.encode(text)) == text
    assert spm.decode(spm.encode(text, add_special=False)) == text


def test_the_space_after_a_control_token_is_removed_too(spm: mn.Tokenizer) -> None:
    assert spm.decode(spm.encode("one</s>two", parse_special=True)) == "onetwo"
    assert spm.decode(spm.encode("one</s>two", parse_special=True), special=True) == "<s>one</s>two"


@pytest.mark.parametrize("wrong", [-1, len(TOKENS), 2**31, -(2**63), 2**64])
def test_an_id_out_of_range_is_named_with_the_range(tokenizer: mn.Tokenizer, wrong: int) -> None:
    uses: list[Callable[[], object]] = [
        lambda: tokenizer.decode([0, wrong]),
        lambda: tokenizer.decode_bytes([wrong, 0]),
        lambda: tokenizer.is_end(wrong),
        lambda: tokenizer.is_control(wrong),
        lambda: tokenizer.stream().feed(wrong),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=f"{wrong} is out of range.*0 to {len(TOKENS) - 1}"):
            use()


@pytest.mark.parametrize("wrong", ["the", b"the", [1.0], [None], ["1"], [True], 5, np.array([0.5]), [[1], 2]])
def test_only_lists_of_integers_are_accepted(tokenizer: mn.Tokenizer, wrong: list[int]) -> None:
    with pytest.raises((TypeError, ValueError)):
        tokenizer.decode(wrong)


def test_ids_of_two_dimensions_are_refused(tokenizer: mn.Tokenizer) -> None:
    two: npt.NDArray[np.int64] = np.zeros((2, 2), np.int64)
    with pytest.raises(ValueError, match="one-dimensional"):
        tokenizer.decode(two)


# Facts about tokens


def test_special_tokens_are_listed_with_what_libllama_does_about_them(
    tokenizer: mn.Tokenizer, without_vocabulary: mn.Tokenizer, vocabulary: Callable[[str], mn.Tokenizer]
) -> None:
    assert sorted(token.id for token in tokenizer.special_tokens) == sorted(ids(*SPECIAL))
    assert [len(token.text) for token in tokenizer.special_tokens] == [13, 12, 10]
    assert not any(token.in_every_text or token.lstrip or token.rstrip for token in tokenizer.special_tokens)
    end = next(token for token in vocabulary("phi-3").special_tokens if token.text == "<|end|>")
    assert end.rstrip
    with pytest.raises(mn.TokenizerError, match="no vocabulary"):
        without_vocabulary.special_tokens  # noqa: B018


def test_special_tokens_are_ids_or_none(tokenizer: mn.Tokenizer, without_vocabulary: mn.Tokenizer) -> None:
    assert (tokenizer.bos, tokenizer.eos, tokenizer.eot) == (END, END, END_OF_TURN)
    assert (without_vocabulary.bos, without_vocabulary.eos, without_vocabulary.eot) == (None, None, None)


def test_tokens_for_gaps_lines_and_padding(
    tokenizer: mn.Tokenizer, without_vocabulary: mn.Tokenizer, vocabulary: Callable[[str], mn.Tokenizer]
) -> None:
    coder = vocabulary("starcoder")
    found = [coder.fim_prefix, coder.fim_suffix, coder.fim_middle]
    assert [coder.piece(token, special=True) for token in found if token is not None] == [
        b"<fim_prefix>",
        b"<fim_suffix>",
        b"<fim_middle>",
    ]
    assert coder.encode("\n", add_special=False) == [coder.nl]
    assert vocabulary("phi-3").pad is not None
    for name in ("nl", "pad", "fim_prefix", "fim_suffix", "fim_middle"):
        assert getattr(without_vocabulary, name) is None


def test_bytes_in_utf8_are_a_text(tokenizer: mn.Tokenizer) -> None:
    assert tokenizer.encode(b"the other") == tokenizer.encode("the other")
    with pytest.raises(mn.TokenizerError, match="not UTF-8 at byte 4"):
        tokenizer.encode(b"the \xff")


def test_it_counts_tokens_and_its_own(tokenizer: mn.Tokenizer, without_vocabulary: mn.Tokenizer) -> None:
    assert tokenizer.count("the other") == len(tokenizer.encode("the other"))
    assert tokenizer.count("<|im_end|>", add_special=False, parse_special=True) == 1
    assert len(tokenizer) == tokenizer.n_vocab
    assert without_vocabulary


def test_the_end_of_text_and_the_end_of_turn_end_a_generation(tokenizer: mn.Tokenizer) -> None:
    assert [token for token in range(tokenizer.n_vocab) if tokenizer.is_end(token)] == [END, END_OF_TURN]


def test_control_tokens_are_those_without_text(tokenizer: mn.Tokenizer) -> None:
    controls = [token for token in range(tokenizer.n_vocab) if tokenizer.is_control(token)]
    assert controls == [END, START_OF_TURN, END_OF_TURN]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama-bpe", "bpe"), ("llama-spm", "spm"), ("bert-bge", "wpm"), ("nomic-bert-moe", "ugm")],
)
def test_the_type_of_a_vocabulary_is_named(vocabulary: Callable[[str], mn.Tokenizer], name: str, kind: str) -> None:
    assert vocabulary(name).type == kind


def test_using_a_model_without_a_vocabulary(without_vocabulary: mn.Tokenizer) -> None:
    assert without_vocabulary.type == "none"
    assert without_vocabulary.n_vocab == len(TOKENS)
    uses: list[Callable[[], object]] = [
        lambda: without_vocabulary.encode("a"),
        lambda: without_vocabulary.decode([1]),
        lambda: without_vocabulary.stream().feed(1),
        lambda: without_vocabulary.is_control(1),
    ]
    for use in uses:
        with pytest.raises(mn.TokenizerError, match="no vocabulary"):
            use()


# Lifetime


def test_a_tokenizer_keeps_its_model_alive(tmp_path: Path) -> None:
    tokenizer = mn.Model.load(TinyModel().write(tmp_path / "model.gguf"), vocab_only=True).tokenizer
    gc.collect()
    assert tokenizer.decode(tokenizer.encode("the")) == "the"


def test_using_the_tokenizer_of_a_closed_model(tmp_path: Path) -> None:
    model = mn.Model.load(TinyModel().write(tmp_path / "model.gguf"), vocab_only=True)
    model.close()
    with pytest.raises(mn.ClosedError):
        model.tokenizer.encode("the")
    with pytest.raises(mn.ClosedError):
        model.tokenizer.decode(ids("the"))


# Streaming


def test_a_character_is_returned_with_its_last_byte(tokenizer: mn.Tokenizer) -> None:
    decoder = tokenizer.stream()
    assert [decoder.feed(token) for token in ids("a", "ðŁ", "¦", "Ļ", "b")] == ["a", "", "", "🦙", "b"]


def test_an_incomplete_character_is_replaced_at_the_end(tokenizer: mn.Tokenizer) -> None:
    decoder = tokenizer.stream()
    assert [decoder.feed(token) for token in ids("a", "ðŁ")] == ["a", ""]
    assert decoder.flush() == "\ufffd"


def test_an_incomplete_character_is_replaced_as_soon_as_the_next_one_begins(tokenizer: mn.Tokenizer) -> None:
    decoder = tokenizer.stream()
    assert [decoder.feed(token) for token in ids("ðŁ", "a")] == ["", "\ufffda"]
    assert decoder.flush() == ""


def test_a_decoder_can_be_reused_after_flush(tokenizer: mn.Tokenizer) -> None:
    decoder = tokenizer.stream()
    decoder.feed(*ids("ðŁ"))
    decoder.flush()
    assert decoder.feed(*ids("a")) == "a"
    assert decoder.flush() == ""


def test_decoders_of_one_tokenizer_do_not_mix(tokenizer: mn.Tokenizer) -> None:
    one, other = tokenizer.stream(), tokenizer.stream()
    one.feed(*ids("ðŁ"))
    assert other.feed(*ids("a")) == "a"
    assert [one.feed(token) for token in ids("¦", "Ļ")] == ["", "🦙"]


def test_control_tokens_are_streamed_only_with_special(tokenizer: mn.Tokenizer) -> None:
    assert tokenizer.stream().feed(END_OF_TURN) == ""
    assert tokenizer.stream(special=True).feed(END_OF_TURN) == "<|im_end|>"


def test_a_stream_that_continues_a_text_keeps_the_space_of_its_first_token(spm: mn.Tokenizer) -> None:
    first, second = spm.encode("one two", add_special=False)
    assert spm.stream().feed(second) == "two"
    assert spm.stream(after=first).feed(second) == " two"
    assert spm.stream(after=spm.bos).feed(second) == "two"


def test_a_piece_is_the_token_inside_a_text(vocabulary: Callable[[str], mn.Tokenizer]) -> None:
    tokenizer = vocabulary("llama-spm")
    ids = tokenizer.encode("Hello big world", add_special=False)
    assert [tokenizer.piece(token) for token in ids] == [b" Hello", b" big", b" world"]
    assert tokenizer.decode(ids) == "Hello big world"
    with pytest.raises(ValueError, match="out of range"):
        tokenizer.piece(tokenizer.n_vocab)


def test_bytes_without_a_token_are_refused_before_libllama_aborts(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", "\u2581a", "\u2581", "a", "b"]
    vocabulary: dict[str, Key] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1],
    }
    path = write_gguf(tmp_path / "few.gguf", "llama", vocabulary)
    with mn.Model.load(path, vocab_only=True) as model, pytest.raises(mn.TokenizerError, match="has no tokens"):
        model.tokenizer.encode("abc")


# Splitters: how BPE cuts a text into words before it merges

SPLITTERS = (
    *("a.x-4.0", "afmoe", "bailingmoe", "bailingmoe2", "bloom", "chameleon", "chatglm-bpe", "codeshell"),
    *("cohere2moe", "command-r", "dbrx", "deepseek-coder", "deepseek-llm", "deepseek-r1-qwen", "deepseek-v3"),
    *("default", "exaone", "exaone-moe", "exaone4", "f2llmv2", "falcon", "falcon-h1", "falcon3", "gemma4"),
    *("gigachat", "glm4", "glm5", "gpt-2", "gpt-4o", "gpt3-finnish", "granite-docling", "granite-embed-multi-311m"),
    *("granite-embed-multi-97m", "grok-2", "hunyuan", "hunyuan-dense", "hy_v4", "jais", "jais-2", "jina-de"),
    *("jina-es", "jina-v1-en", "jina-v2-code", "jina-v2-de", "jina-v2-es", "jina-v5-nano", "joyai-llm", "kanana2"),
    *("kimi-k2", "kormo", "laguna", "lfm2", "llada-moe", "llama-bpe", "llama-v3", "llama3", "llama4", "megrez"),
    *("mellum", "mellum2", "midm-2.0", "minerva-7b", "minicpm5", "minimax-m2", "modern-bert", "mpt", "olmo", "phi-2"),
    *("pixtral", "poro-chat", "qwen2", "qwen35", "refact", "roberta-bpe", "sarvam-moe", "seed-coder", "smaug-bpe"),
    *("smollm", "solar-open", "spark2_5", "stablelm2", "starcoder", "superbpe", "talkie", "tekken", "tiny_aya"),
    *("trillion", "ufakzeka", "viking", "whitespace", "youtu"),
)

SENTENCE = "the quick brown fox jumps over the lazy dog "


def repeated(piece: str, length: int) -> str:
    return (piece * (length // len(piece) + 1))[:length]


TEXTS: dict[str, Callable[[int], str]] = {
    "Thai": lambda n: repeated("การทดสอบภาษาไทย", n),
    "Hindi": lambda n: repeated("हिन्दीपरीक्षण", n),
    "decomposed accents": lambda n: repeated(unicodedata.normalize("NFD", "éàüñô"), n),
    "combining marks": lambda n: "a" + "\u0301" * (n - 1),
    "base64": lambda n: base64.b64encode(random.Random(1).randbytes(n)).decode()[:n],
    "a URL": lambda n: "https://example.com/" + repeated("path/to?a=b&c=%20d;", n - 20),
    "English": lambda n: repeated(SENTENCE, n),
    "spaces": lambda n: " " * n,
    "line ends": lambda n: repeated("\n\r\n", n),
    "slashes at line ends": lambda n: "!" + repeated("/\n", n - 1),
    "a mixture": lambda n: repeated("Ab1 \n\t ไ é ¿?! 中文 'll ", n),
    "digits": lambda n: repeated("1234567890", n),
    "emoji": lambda n: repeated("🦙👩🏽\u200d🚀", n),
}

# What a child process does with the arguments: a folder of vocabularies, the length of a text and splitter=text,... It
# names each before it dies of one.
ENCODE = """
import sys
import minerva_native as mn
import test_tokenizer
folder, length, *work = sys.argv[1:]
for line in work:
    splitter, _, texts = line.partition("=")
    with mn.Model.load(f"{folder}/{splitter}.gguf", vocab_only=True) as model:
        for text in texts.split(","):
            print(f"{splitter} on {text}", flush=True)
            model.tokenizer.encode(test_tokenizer.TEXTS[text](int(length)))
"""


def run(script: str, *arguments: str, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a script in a child process, which can import the tests."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=seconds,
    )


@pytest.fixture(scope="session")
def splitters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny vocabulary for each splitter."""
    folder = tmp_path_factory.mktemp("splitters")
    for name in SPLITTERS:
        with_keys(folder / f"{name}.gguf", pre=name)
    return folder


# "whitespace" refuses a space beside white space, and "superbpe" takes hours for a long run of digits.
LEFT_OUT = {"whitespace": ("spaces", "line ends", "a mixture"), "superbpe": ("digits",)}


def texts_for(splitter: str) -> list[str]:
    return [name for name in TEXTS if name not in LEFT_OUT.get(splitter, ())]


def test_the_splitters_are_those_of_the_pinned_source(llama_cpp_source: Path) -> None:
    source = (llama_cpp_source / "src" / "llama-vocab.cpp").read_text()
    assert sorted(set(re.findall(r'tokenizer_pre == "([^"]+)"', source))) == sorted(SPLITTERS)


# All of it takes about three minutes: MINERVA_ALL_TEXTS=1 pytest -k ends_the_process
@pytest.mark.parametrize(("length", "share"), [(30_000, 3), (200_000, 12)])
def test_no_splitter_ends_the_process_with_a_long_text(splitters: Path, length: int, share: int) -> None:
    if os.environ.get("MINERVA_ALL_TEXTS"):
        share = 1
    work = []
    for row, splitter in enumerate(SPLITTERS):
        texts = [text for column, text in enumerate(texts_for(splitter)) if (row + column) % share == 0]
        work += [f"{splitter}={','.join(texts)}"] if texts else []
    done = run(ENCODE, str(splitters), str(length), *work, seconds=600)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr


# What a child process does with a folder of vocabularies: compare its ids with those of a thread with a small stack.
COMPARE = """
import os, sys, threading
import minerva_native as mn
import test_tokenizer
threading.stack_size(max(1 << 16, os.sysconf("SC_THREAD_STACK_MIN")))
for row, splitter in enumerate(test_tokenizer.SPLITTERS):
    with mn.Model.load(f"{sys.argv[1]}/{splitter}.gguf", vocab_only=True) as model:
        for name in test_tokenizer.texts_for(splitter)[row % 4 :: 4]:
            for length in (30, 100, 600):
                print(f"{splitter} on {name}, {length}", flush=True)
                text, found = test_tokenizer.TEXTS[name](length), []
                thread = threading.Thread(target=lambda: found.append(model.tokenizer.encode(text)))
                thread.start()
                thread.join()
                assert found == [model.tokenizer.encode(text)]
"""


def test_a_thread_with_a_small_stack_gets_the_same_ids(splitters: Path) -> None:
    done = run(COMPARE, str(splitters))
    assert done.returncode == 0, done.stdout[-200:] + done.stderr


def raw_encode(model: mn.Model, text: str) -> list[int]:
    """Encode on this thread's stack."""
    data, ids = text.encode(), np.empty(4 * len(text) + 8, np.int32)
    with model.raw() as pointer:
        vocab, array = lib.llama_model_get_vocab(pointer), ffi.from_buffer("llama_token[]", ids, require_writable=True)
        count = lib.llama_tokenize(vocab, data, len(data), array, len(ids), True, False)
    found: list[int] = ids[:count].tolist()
    return found


@pytest.mark.parametrize("splitter", ["deepseek-v3", "exaone-moe", "gpt-4o"])
def test_a_deep_stack_gives_the_same_ids(splitters: Path, splitter: str) -> None:
    with mn.Model.load(splitters / f"{splitter}.gguf", vocab_only=True) as model:
        for text in TEXTS.values():
            assert model.tokenizer.encode(text(5000)) == raw_encode(model, text(5000))


@pytest.mark.parametrize(("name", "character"), [("deepseek-llm", "a"), ("gpt-neox", "1"), ("falcon", "!")])
def test_a_long_run_of_one_kind_of_character_comes_back(
    vocabulary: Callable[[str], mn.Tokenizer], name: str, character: str
) -> None:
    text = f"one {character * 50_000} two"
    tokenizer = vocabulary(name)
    assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == text


def test_what_a_splitter_may_match_at_once_has_a_limit(splitters: Path) -> None:
    with mn.Model.load(splitters / "deepseek-v3.gguf", vocab_only=True) as model:
        with pytest.raises(mn.TokenizerError, match=r"'deepseek-v3', may match 2,000,001 .* the limit is 2,000,000"):
            model.tokenizer.encode("a" * 2_000_001)
        lines = (SENTENCE * 20 + "\n\n/\n") * 2500
        assert len(lines) > 2_000_000
        assert model.tokenizer.decode(model.tokenizer.encode(lines)) == lines


LIMITED = """
import resource, sys
import minerva_native as mn
with mn.Model.load(sys.argv[1], vocab_only=True) as model:
    resource.setrlimit(resource.RLIMIT_AS, (600 << 20, 600 << 20))
    assert len(model.tokenizer.encode("a" * 20_000, add_special=False)) == 20_000
    try:
        model.tokenizer.encode("a" * 1_900_000)
    except mn.TokenizerError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the address space")
def test_a_stack_that_cannot_be_had_is_a_tokenizer_error(splitters: Path) -> None:
    done = run(LIMITED, str(splitters / "deepseek-v3.gguf"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "no thread with a stack of 950,272 KB" in done.stdout


def test_a_space_beside_white_space_is_refused_where_libllama_would_abort(splitters: Path, tmp_path: Path) -> None:
    with mn.Model.load(splitters / "whitespace.gguf", vocab_only=True) as model:
        assert model.tokenizer.encode("a b\n\nc", add_special=False) == ids("a", "b", "c")
        for text in ("a b  c", "a b \nc", "a b\u3000 c"):
            with pytest.raises(mn.TokenizerError, match=r"'whitespace', cannot take a space .* at index 3"):
                model.tokenizer.encode(text)
    whole = with_keys(tmp_path / "whole.gguf", model="whitespace", pre="whitespace")
    assert whole.encode("a  b \n c", add_special=False) == ids("a", "b", "c")


# Cancelling


def test_a_long_text_can_be_cancelled(tokenizer: mn.Tokenizer) -> None:
    cancel = threading.Event()
    asked = 0

    class Cancel(threading.Event):
        def is_set(self) -> bool:
            nonlocal asked
            asked += 1
            return asked > 3

    with pytest.raises(mn.Cancelled):
        tokenizer.encode(SENTENCE * 100_000, cancel=Cancel())
    assert asked == 4
    assert tokenizer.encode("a", cancel=cancel) == [END, *ids("a")]
    cancel.set()
    with pytest.raises(mn.Cancelled):
        tokenizer.encode("a", cancel=cancel)


def test_a_cancel_token_must_have_is_set(tokenizer: mn.Tokenizer) -> None:
    with pytest.raises(TypeError, match=r"cancel must have is_set\(\)"):
        tokenizer.encode("a", cancel=True)  # type: ignore[arg-type]


LEAVE = """
import os, signal, sys, threading
import minerva_native as mn
how, path = sys.argv[1:]
model = mn.Model.load(path, vocab_only=True)
if how == "interrupt":
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    cancel = threading.Event()
    if how == "cancel":
        threading.Timer(0.3, cancel.set).start()
    model.tokenizer.encode("the quick brown fox jumps over the lazy dog\\n" * 400_000, cancel=cancel)
except (mn.Cancelled, KeyboardInterrupt) as error:
    print(type(error).__name__)
model.close()
raise SystemExit(7)
"""


@pytest.mark.parametrize(("how", "error"), [("cancel", "Cancelled"), ("interrupt", "KeyboardInterrupt")])
def test_a_process_can_exit_while_an_encoding_that_was_left_goes_on(splitters: Path, how: str, error: str) -> None:
    for _ in range(5):
        done = run(LEAVE, how, str(splitters / "gpt-2.gguf"))
        assert (done.returncode, done.stdout, done.stderr) == (7, f"{error}\n", "")


FORK = """
import os, signal, sys, threading, warnings
import minerva_native as mn
warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
encode = mn.Model.load(sys.argv[1], vocab_only=True).tokenizer.encode
done = threading.Event()
def work():
    while not done.is_set():
        encode("a" * 3000)
threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
for thread in threads:
    thread.start()
for _ in range(20):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if len(encode("b" * 3000)) == 3001 else 1)
    assert os.waitpid(child, 0)[1] == 0
done.set()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_of_a_fork_encodes_whatever_other_threads_did(splitters: Path) -> None:
    done = run(FORK, str(splitters / "deepseek-v3.gguf"))
    assert (done.returncode, done.stderr) == (0, "")


# Arguments


def test_wrong_arguments_are_named(tokenizer: mn.Tokenizer) -> None:
    wrong: list[tuple[Callable[[Any], object], Any, type[Exception], str]] = [
        (tokenizer.piece, "x", TypeError, "must be an integer, not a str"),
        (tokenizer.is_end, 2.0, TypeError, "must be an integer, not a float"),
        (tokenizer.is_control, [], TypeError, "must be an integer, not a list"),
        (tokenizer.stream().feed, 2.0, TypeError, "must be an integer, not a float"),
        (tokenizer.decode, 3, TypeError, "a list or an array of integers, not a int"),
        (tokenizer.decode, None, TypeError, "a list or an array of integers, not None"),
        (lambda after: tokenizer.stream(after=after), 10**30, ValueError, "out of range"),
        (lambda after: tokenizer.stream(after=after), "a", TypeError, "must be an integer, not a str"),
    ]
    for token in range(tokenizer.n_vocab):  # what is remembered of a token must not answer for 2.0
        tokenizer.is_end(token), tokenizer.is_control(token), tokenizer.stream().feed(token)
    for function, argument, error, message in wrong:
        with pytest.raises(error, match=message):
            function(argument)
