"""Text to token ids and back, by the vocabulary in the model's file."""

import codecs
import functools
import operator
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ._binding import ffi, lib, thrown
from ._handle import Handle
from .errors import TokenizerError

TokenIds = Sequence[int] | npt.NDArray[np.integer[Any]]

TYPES = {
    lib.LLAMA_VOCAB_TYPE_NONE: "none",
    lib.LLAMA_VOCAB_TYPE_SPM: "spm",
    lib.LLAMA_VOCAB_TYPE_BPE: "bpe",
    lib.LLAMA_VOCAB_TYPE_WPM: "wpm",
    lib.LLAMA_VOCAB_TYPE_UGM: "ugm",
    lib.LLAMA_VOCAB_TYPE_RWKV: "rwkv",
    lib.LLAMA_VOCAB_TYPE_PLAMO2: "plamo2",
}

_SPACE_SIGN = "▁".encode()  # how SentencePiece writes a space

# Some pre-tokenizers of libllama use std::regex, which recurses for every character of a match, at about 300 bytes of
# stack. A long run of one kind of character overflows the stack of an ordinary thread.
_RUNS = re.compile(r"[^\W\d_]+|\d+|\s+|(?:[^\w\s]|_)+")
_UNBROKEN = re.compile(r"\S{1000}|\s{1000}")  # a cheap check before the exact one
_LONG_RUN = 1000  # characters
_LONGEST_RUN = 1_000_000
_DEEP_STACK_BYTES = 1 << 30  # address space; memory is used only as the stack grows
_stack_size_lock = threading.Lock()

_MAX_TEXT_BYTES = 1 << 30  # libllama counts bytes and tokens in 32-bit integers


class Tokenizer:
    """The vocabulary of a model. Safe to use from several threads at once.

    Its methods raise `TokenizerError` if the model has no vocabulary, and `ClosedError` after the model is closed.

    Attributes:
        type: "spm", "bpe", "wpm", "ugm", "rwkv", "plamo2", "other", or "none" if the model has no vocabulary.
        n_vocab: the number of token ids.
        bos: the id of the token for the beginning of a sequence, or None if there is none.
        eos: the id of the token for the end of a sequence, or None.
        eot: the id of the token for the end of a turn, or None.
        adds_bos: whether `encode` puts `bos` before a text by default.
        adds_eos: whether `encode` puts `eos` after a text by default.
    """

    type: str
    n_vocab: int
    bos: int | None
    eos: int | None
    eot: int | None
    adds_bos: bool
    adds_eos: bool

    def __init__(self, model: Handle):
        self._model = model
        with model as pointer:
            self._vocab = vocab = lib.llama_model_get_vocab(pointer)
            kind = lib.llama_vocab_type(vocab)
            self.type = TYPES.get(kind, "other")
            self.n_vocab = lib.llama_vocab_n_tokens(vocab)
            self.bos = _optional(lib.llama_vocab_bos(vocab))
            self.eos = _optional(lib.llama_vocab_eos(vocab))
            self.eot = _optional(lib.llama_vocab_eot(vocab))
            self._sep = _optional(lib.llama_vocab_sep(vocab))
            self.adds_bos = bool(lib.llama_vocab_get_add_bos(vocab))
            self.adds_eos = bool(lib.llama_vocab_get_add_eos(vocab))
        self._ends: dict[int, bool] = {}
        self._controls: dict[int, bool] = {}
        self._pieces: tuple[dict[int, bytes], dict[int, bytes]] = ({}, {})  # without and with special tokens
        self._texts: tuple[dict[int, str | None], dict[int, str | None]] = ({}, {})
        # Some vocabularies (SentencePiece) put a space before a text, which decoding must remove again.
        self._missing_bytes = self._find_missing_bytes() if self.type == "spm" else frozenset()
        try:
            first = self.encode("a", add_special=False)[:1]
        except TokenizerError:  # there is no vocabulary, or it lacks the letter
            first = []
        self._adds_space = any(self._piece(token, False)[:1] == b" " for token in first)

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Turn text into token ids (`llama_tokenize`).

        Args:
            text: the text.
            add_special: add the special tokens that the model expects around a text (BOS, EOS).
            parse_special: treat the names of special tokens in the text, such as `<|im_start|>`, as those tokens. Leave
                it off for text from others.

        Raises:
            TokenizerError: the vocabulary cannot encode the text.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, not {type(text).__name__}")
        self._require_vocabulary()
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(f"the text has a lone surrogate at index {error.start}") from None
        if len(data) > _MAX_TEXT_BYTES:
            raise TokenizerError(f"the text has {len(data):,} bytes; encode at most {_MAX_TEXT_BYTES:,} at a time")
        capacity = len(data) + 8
        if self._missing_bytes and not self._missing_bytes.isdisjoint(data + _SPACE_SIGN):
            raise TokenizerError("the vocabulary has no tokens for some of the text's bytes")
        if add_special:
            self._require_special_tokens()
        tokenize = lib.minerva_tokenize
        if self.type == "bpe" and _UNBROKEN.search(text) and (run := _longest_run(text)) > _LONG_RUN:
            if run > _LONGEST_RUN:
                raise TokenizerError(
                    f"the text has a run of {run:,} characters of one kind; the limit is {_LONGEST_RUN:,}"
                )
            tokenize = functools.partial(_on_a_deep_stack, tokenize)
        with self._model:
            while True:
                buffer = np.empty(capacity, np.int32)
                array = ffi.from_buffer("llama_token[]", buffer, require_writable=True)
                count = tokenize(self._vocab, data, len(data), array, capacity, add_special, parse_special)
                if count >= 0:
                    ids: list[int] = buffer[:count].tolist()
                    if ids and min(ids) < 0:
                        raise TokenizerError("the vocabulary has no token for a part of the text, and no unknown token")
                    return ids
                if count == lib.MINERVA_THREW:
                    raise TokenizerError(f"the text of {len(data):,} bytes cannot be encoded ({thrown()})")
                capacity = -count

    def decode(self, ids: TokenIds, special: bool = False) -> str:
        """Turn token ids into text; bytes that are not UTF-8 become U+FFFD.

        The space that some vocabularies put before every text is removed. For a token inside a text see `piece`.

        Args:
            ids: token ids.
            special: show control tokens by their names instead of leaving them out.
        """
        return self.decode_bytes(ids, special).decode(errors="replace")

    def decode_bytes(self, ids: TokenIds, special: bool = False) -> bytes:
        """Turn token ids into bytes, as `decode` does."""
        pieces, at_start = [], self._adds_space
        for token in self.as_array(ids).tolist():
            piece = self._piece(token, special)
            pieces.append(piece[1:] if at_start and piece[:1] == b" " else piece)
            at_start = self._adds_space and self.is_control(token)
        return b"".join(pieces)

    def piece(self, token: int, special: bool = False) -> bytes:
        """Return the bytes that a token stands for inside a text (`llama_token_to_piece`)."""
        return self._piece(self.check(token), special)

    def stream(self, special: bool = False, after: int | None = None) -> "StreamDecoder":
        """Return a decoder that takes one token at a time.

        Args:
            special: show control tokens by their names instead of leaving them out.
            after: the token before the first one, if the text continues earlier tokens.
        """
        return StreamDecoder(self, special, after)

    def is_end(self, token: int) -> bool:
        """Return whether the token ends a generation (EOS, end of turn and the like)."""
        end = self._ends.get(token)
        if end is None:
            token = self.check(token)
            with self._model:
                end = self._ends[token] = bool(lib.llama_vocab_is_eog(self._vocab, token))
        return end

    def is_control(self, token: int) -> bool:
        """Return whether the token is a control token, which stands for no text."""
        control = self._controls.get(token)
        if control is None:
            token = self.check(token)
            self._require_vocabulary()
            with self._model:
                control = self._controls[token] = bool(lib.llama_vocab_is_control(self._vocab, token))
        return control

    def check(self, token: int) -> int:
        """Return a token id as an int; raise `TypeError` or `ValueError` if it is not an id of this vocabulary."""
        token = operator.index(token)
        if not 0 <= token < self.n_vocab:
            raise ValueError(f"token id {token} is out of range: the vocabulary has ids 0 to {self.n_vocab - 1}")
        return token

    def as_array(self, ids: TokenIds) -> npt.NDArray[np.int32]:
        """Return token ids as an int32 array; raise `TypeError` or `ValueError` if one is not of this vocabulary."""
        if isinstance(ids, str | bytes):
            raise TypeError(f"token ids must be integers, not {type(ids).__name__}: encode the text first")
        # A fast path for decode loops over several sequences.
        if isinstance(ids, list) and len(ids) == 1 and type(ids[0]) is int:
            return np.array([self.check(ids[0])], np.int32)
        array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))
        if array.ndim != 1:
            raise ValueError(f"token ids must be one-dimensional, not of shape {array.shape}")
        if not array.size:
            return np.empty(0, np.int32)
        if array.dtype.kind not in "iu":
            for token in array.tolist():
                self.check(token)  # names the bad token, even an integer that is too large for 64 bits
            raise TypeError(f"token ids must be integers, not {array.dtype}")
        for token in (array.min(), array.max()):
            self.check(token)
        return np.array(array, np.int32)  # a copy: the caller may change the original

    def _require_vocabulary(self) -> None:
        if self.type == "none":
            raise TokenizerError("this model has no vocabulary: use token ids instead of text")

    def _find_missing_bytes(self) -> frozenset[int]:
        """Return the bytes that have no token: libllama would abort on a text that needs one."""
        missing = set(range(256))
        with self._model:
            for token in range(self.n_vocab):
                name = ffi.string(lib.llama_vocab_get_text(self._vocab, token))
                if len(name) == 1:
                    missing.discard(name[0])
                elif re.fullmatch(rb"<0x[0-9A-F]{2}>", name):
                    missing.discard(int(name[3:5], 16))
                if not missing:
                    break
        return frozenset(missing)

    def _require_special_tokens(self) -> None:
        """Raise if libllama would have to add a token that the vocabulary does not define, because it would abort."""
        for name, token, is_added in (
            ("BOS", self.bos, self.adds_bos or self.type == "wpm"),
            ("EOS", self.eos, self.adds_eos),
            ("SEP", self._sep, self.type == "wpm"),
        ):
            if is_added and (token is None or token >= self.n_vocab):
                raise TokenizerError(f"the vocabulary asks for a {name} token but defines none: pass add_special=False")

    def _piece(self, token: int, special: bool) -> bytes:
        """Return the bytes of a valid token id."""
        piece = self._pieces[special].get(token)
        if piece is None:
            self._require_vocabulary()
            size = 64
            with self._model:
                while True:
                    buffer = ffi.new("char[]", size)
                    count = lib.minerva_token_to_piece(self._vocab, token, buffer, size, special)
                    if count >= 0:
                        break
                    if count == lib.MINERVA_THREW:
                        raise TokenizerError(f"token {token} cannot be decoded ({thrown()})")
                    size = -count
            piece = self._pieces[special][token] = ffi.unpack(buffer, count) if count else b""
        return piece

    def _remember_text(self, token: int, special: bool) -> None:
        """Cache the text of a valid token id, or None if its bytes are not whole characters."""
        try:
            self._texts[special][token] = self._piece(token, special).decode()
        except UnicodeDecodeError:
            self._texts[special][token] = None


class StreamDecoder:
    """Turns tokens into text one at a time, and never returns a part of a character."""

    __slots__ = ("_at_start", "_decoder", "_mid_character", "_special", "_texts", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, special: bool, after: int | None):
        self._tokenizer, self._special = tokenizer, special
        self._at_start = tokenizer._adds_space and (after is None or tokenizer.is_control(after))
        self._texts = tokenizer._texts[special]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._mid_character = False

    def feed(self, token: int) -> str:
        """Return the text that the token completes, which may be empty."""
        tokenizer = self._tokenizer
        if not (self._mid_character or tokenizer._adds_space):
            text = self._texts.get(token)
            if text is not None:
                return text
        token = tokenizer.check(token)
        piece = tokenizer._piece(token, self._special)
        if self._at_start and piece[:1] == b" ":
            piece = piece[1:]
        self._at_start = tokenizer._adds_space and tokenizer.is_control(token)
        if token not in self._texts:
            tokenizer._remember_text(token, self._special)
        text = self._decoder.decode(piece)
        self._mid_character = bool(self._decoder.getstate()[0])
        return text

    def flush(self) -> str:
        """End the text: return U+FFFD if the last character is incomplete, otherwise nothing."""
        self._mid_character = False
        return self._decoder.decode(b"", final=True)


def _longest_run(text: str) -> int:
    """Return the length of the longest run of letters, digits, white space or other characters."""
    return max(len(match[0]) for match in _RUNS.finditer(text))


def _on_a_deep_stack(function: Callable[..., int], *arguments: Any) -> int:
    """Call a function on a new thread with a stack of `_DEEP_STACK_BYTES`."""
    results: list[int] = []
    with _stack_size_lock:
        before = threading.stack_size(_DEEP_STACK_BYTES)
        try:
            thread = threading.Thread(target=lambda: results.append(function(*arguments)))
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    return results[0]


def _optional(token: int) -> int | None:
    return None if token == lib.LLAMA_TOKEN_NULL else token
