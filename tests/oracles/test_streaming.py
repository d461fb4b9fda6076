"""Text decoded token by token against text decoded at once, for every kind of vocabulary, any text and any ids.

The vocabulary files are llama.cpp's, except for RWKV, of which llama.cpp has none.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

import minerva_native as mn
from tiny_models import Key, write_gguf

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
SPACE_SIGN = "\N{LOWER ONE EIGHTH BLOCK}"

# Byte-level BPE. Some vocabularies lack a token for some bytes, so characters with these bytes are lost.
BYTE_LEVEL = {
    "aquila": b"",
    "command-r": b"",
    "deepseek-coder": b"",
    "deepseek-llm": b"",
    "falcon": b"\x03\x04\x05\x0b\x11\x13\x14\x15\x16\x17\x19\x1c\x1d\x1e\xf2",
    "gpt-2": b"",
    "gpt-neox": b"",
    "llama-bpe": b"",
    "mpt": b"",
    "qwen2": b"",
    "qwen35": b"",
    "refact": b"\xf1",
    "starcoder": b"\xf1",
    "rwkv": b"",
}

# Vocabularies that write a space as U+2581, so that a U+2581 in the text becomes a space.
# In Phi-3 a text can also contain the token "</s>", which removes the spaces after it.
SENTENCEPIECE = {
    "baichuan": [SPACE_SIGN],
    "gemma-4": [SPACE_SIGN],
    "llama-spm": [SPACE_SIGN],
    "phi-3": [SPACE_SIGN, "</s>"],
}

# WordPiece and Unigram normalise a text before they encode it.
NORMALISING = ("bert-bge", "nomic-bert-moe")

LOSSLESS = (*BYTE_LEVEL, *SENTENCEPIECE)
VOCABULARIES = (*LOSSLESS, *NORMALISING)

# Any character except lone surrogates, and often difficult ones: combining, joining, invisible, of 2 to 4 bytes.
AWKWARD = [
    *("\0", "\t", "\n", "\r\n", "\x1b", "\x7f", "\x80", "\xa0", "\xad", " ", "  ", " a", "' ", "é", "e\u0301", "ß"),
    *("\u200b", "\u200d", "\u202e", "\ufe0f", "\ufeff", REPLACEMENT, SPACE_SIGN, "\u2028", "Ω", "한", "ᄒ", "漢", "ไ"),
    *(
        "🦙",
        "👩🏽\u200d💻",
        "🏳️\u200d🌈",
        "🇩🇪",
        "𝔄",
        "\U000e0067",
        "\U0010ffff",
        "<|im_end|>",
        "</s>",
        "<0x0A>",
        "[UNK]",
    ),
]
texts = st.lists(st.one_of(st.characters(codec="utf-8"), st.sampled_from(AWKWARD)), max_size=24).map("".join)


class Vocabulary(NamedTuple):
    name: str
    tokenizer: mn.Tokenizer

    def stream(self, ids: list[int], special: bool = False) -> list[str]:
        """Return the text that each token completes, and what is left at the end."""
        decoder = self.tokenizer.stream(special)
        return [*map(decoder.feed, ids), decoder.flush()]

    def without_what_it_cannot_encode(self, text: str) -> str:
        for lost in SENTENCEPIECE.get(self.name, []):
            text = text.replace(lost, "")
        return "".join(char for char in text if not set(char.encode()) & set(BYTE_LEVEL.get(self.name, b"")))


@pytest.fixture(scope="session")
def rwkv(tmp_path_factory: pytest.TempPathFactory) -> mn.Model:
    """A vocabulary of RWKV's kind: tokens are escaped bytes, and the longest match is taken."""
    tokens = ["<s>", *(f"\\x{byte:02x}" for byte in range(256)), "the", " the", "\\n\\n", "\\xf0\\x9f", "ing", "é"]
    hyperparameters: dict[str, Key] = {
        "context_length": 64,
        "embedding_length": 64,
        "block_count": 1,
        "feed_forward_length": 64,
        "attention.head_count": 0,
        "attention.layer_norm_epsilon": 1e-5,
        "wkv.head_size": 64,
        "time_mix_extra_dim": 32,
        "time_decay_extra_dim": 64,
    }
    keys: dict[str, Key] = {f"rwkv6.{key}": value for key, value in hyperparameters.items()}
    keys |= {"tokenizer.ggml.model": "rwkv", "tokenizer.ggml.tokens": tokens}
    keys["tokenizer.ggml.token_type"] = [1] * len(tokens)
    path = write_gguf(tmp_path_factory.mktemp("rwkv") / "vocabulary.gguf", "rwkv6", keys)
    return mn.Model.load(path, vocab_only=True)


@pytest.fixture(scope="session")
def load(vocabulary: Callable[[str], mn.Tokenizer], rwkv: mn.Model) -> Callable[[str], Vocabulary]:
    return lambda name: Vocabulary(name, rwkv.tokenizer if name == "rwkv" else vocabulary(name))


@pytest.fixture(scope="session", params=VOCABULARIES)
def any_vocabulary(request: pytest.FixtureRequest, load: Callable[[str], Vocabulary]) -> Vocabulary:
    return load(request.param)


@pytest.fixture(scope="session", params=LOSSLESS)
def lossless_vocabulary(request: pytest.FixtureRequest, load: Callable[[str], Vocabulary]) -> Vocabulary:
    return load(request.param)


@given(text=texts, special=st.booleans())
def test_any_text_decodes_the_same_token_by_token_and_at_once(
    any_vocabulary: Vocabulary, text: str, special: bool
) -> None:
    ids = any_vocabulary.tokenizer.encode(text)
    assert "".join(any_vocabulary.stream(ids, special)) == any_vocabulary.tokenizer.decode(ids, special)


@given(text=texts)
def test_any_text_comes_back_from_a_lossless_vocabulary(lossless_vocabulary: Vocabulary, text: str) -> None:
    text = lossless_vocabulary.without_what_it_cannot_encode(text)
    assert "".join(lossless_vocabulary.stream(lossless_vocabulary.tokenizer.encode(text))) == text


@given(data=st.data(), special=st.booleans())
def test_any_ids_decode_the_same_token_by_token_and_at_once(
    any_vocabulary: Vocabulary, data: st.DataObject, special: bool
) -> None:
    ids = data.draw(token_ids(any_vocabulary.tokenizer))
    assert "".join(any_vocabulary.stream(ids, special)) == any_vocabulary.tokenizer.decode(ids, special)


@given(data=st.data())
def test_text_already_streamed_stays_valid_whatever_comes_next(any_vocabulary: Vocabulary, data: st.DataObject) -> None:
    ids = data.draw(token_ids(any_vocabulary.tokenizer))
    following = data.draw(token_ids(any_vocabulary.tokenizer))
    *streamed, _ = any_vocabulary.stream(ids)
    assert any_vocabulary.tokenizer.decode(ids + following).startswith("".join(streamed))


@given(data=st.data())
def test_no_more_than_an_incomplete_character_is_held_back(any_vocabulary: Vocabulary, data: st.DataObject) -> None:
    ids = data.draw(token_ids(any_vocabulary.tokenizer))
    *streamed, _ = any_vocabulary.stream(ids)
    whole = any_vocabulary.tokenizer.decode(ids)
    assert whole.removeprefix("".join(streamed)) in ("", REPLACEMENT)


@given(text=texts, data=st.data())
def test_a_character_of_several_tokens_is_never_shown_broken(
    lossless_vocabulary: Vocabulary, text: str, data: st.DataObject
) -> None:
    text = lossless_vocabulary.without_what_it_cannot_encode(text).replace(REPLACEMENT, "")
    ids = lossless_vocabulary.tokenizer.encode(text)
    so_far = ids[: data.draw(st.integers(0, len(ids)))]
    *streamed, _ = lossless_vocabulary.stream(so_far)
    assert REPLACEMENT not in "".join(streamed)


def token_ids(tokenizer: mn.Tokenizer) -> st.SearchStrategy[list[int]]:
    """Draw any ids: uniformly, from both ends of the range (bytes and control tokens), and from texts."""
    anywhere = st.integers(0, tokenizer.n_vocab - 1)
    edge = min(300, tokenizer.n_vocab)
    edges = st.one_of(st.integers(0, edge - 1), st.integers(tokenizer.n_vocab - edge, tokenizer.n_vocab - 1))
    cut_text = texts.map(lambda text: tokenizer.encode(text)[1:-1])
    return st.one_of(st.lists(anywhere), st.lists(edges), cut_text)
