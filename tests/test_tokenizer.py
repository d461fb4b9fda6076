"""Text to tokens and back, with a known vocabulary; comparisons with other projects are in `oracles`."""

import gc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import minerva_native as mn
from tiny_models import END, END_OF_TURN, START_OF_TURN, TOKENS, VOCABULARY, Key, TinyModel, write_gguf


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


def test_special_tokens_are_ids_or_none(tokenizer: mn.Tokenizer, without_vocabulary: mn.Tokenizer) -> None:
    assert (tokenizer.bos, tokenizer.eos, tokenizer.eot) == (END, END, END_OF_TURN)
    assert (without_vocabulary.bos, without_vocabulary.eos, without_vocabulary.eot) == (None, None, None)


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


@pytest.mark.parametrize(("name", "character"), [("deepseek-llm", "a"), ("gpt-neox", "1"), ("falcon", "!")])
def test_a_long_run_of_one_kind_of_character_does_not_overflow_the_stack(
    vocabulary: Callable[[str], mn.Tokenizer], name: str, character: str
) -> None:
    tokenizer = vocabulary(name)
    text = f"one {character * 50_000} two"
    assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == text
    with pytest.raises(mn.TokenizerError, match="characters of one kind"):
        tokenizer.encode(character * 1_000_001)
