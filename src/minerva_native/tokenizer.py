"""Text to token ids and back, by the vocabulary in the model's file."""

import codecs
import functools
import operator
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ._arguments import cancel_token, flag, what
from ._binding import ffi, lib, thrown
from ._handle import Handle, NoCopy
from ._stack import StackError, with_stack
from .errors import Cancelled, TokenizerError

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

# Before its merges, BPE splits a text into words as `tokenizer.ggml.pre` says. These splitters of libllama are loops of
# its own, or regexes whose matches have a few characters at most.
_LOOPS = {
    *("a.x-4.0", "chatglm-bpe", "codeshell", "command-r", "dbrx", "deepseek-r1-qwen", "exaone", "exaone4", "f2llmv2"),
    *("falcon-h1", "falcon3", "gemma4", "gigachat", "glm4", "glm5", "gpt-2", "granite-docling"),
    *("granite-embed-multi-311m", "grok-2", "hunyuan", "jais", "jina-de", "jina-es", "jina-v1-en", "jina-v2-code"),
    *("jina-v2-de", "jina-v2-es", "jina-v5-nano", "kimi-k2", "kormo", "laguna", "lfm2", "llama-bpe", "llama-v3"),
    *("llama3", "megrez", "mellum", "mellum2", "midm-2.0", "minerva-7b", "modern-bert", "mpt", "olmo", "phi-2"),
    *("pixtral", "qwen2", "qwen35", "refact", "roberta-bpe", "sarvam-moe", "smaug-bpe", "smollm", "solar-open"),
    *("stablelm2", "starcoder", "trillion"),
}

# All others use std::regex, which recurses for each character of a match. No match of these extends beyond a line and
# the white space and slashes that follow it. A name in neither set may match a whole text.
_WITHIN_LINES = {
    *("afmoe", "bailingmoe", "bailingmoe2", "bloom", "chameleon", "cohere2moe", "deepseek-coder", "deepseek-llm"),
    *("deepseek-v3", "default", "exaone-moe", "falcon", "gpt-4o", "gpt3-finnish", "granite-embed-multi-97m"),
    *("hunyuan-dense", "hy_v4", "jais-2", "joyai-llm", "kanana2", "llada-moe", "llama4", "minicpm5", "minimax-m2"),
    *("poro-chat", "seed-coder", "spark2_5", "superbpe", "talkie", "tekken", "tiny_aya", "ufakzeka", "viking"),
    *("whitespace", "youtu"),
}

_STACK_BYTES_A_CHARACTER = 512  # GCC's std::regex takes 321
_STACK_BYTES = 256 << 10  # for everything else
_SHORT_MATCH = 1000  # characters; what may be longer gets a stack of its own
_LONGEST_MATCH = 2_000_000  # which takes 640 MB
_SPACE_BESIDE_SPACE = re.compile(r" \s|\s ")

_LONG_TEXT = 1 << 16  # characters; a longer one is encoded in a thread, so that its caller can leave
_MAX_TEXT_BYTES = 1 << 30  # libllama counts bytes and tokens in 32-bit integers


class SpecialToken(NamedTuple):
    """A token that is found in a text by its name, before anything else is.

    Attributes:
        id: its id.
        text: its name; bytes that are not UTF-8 are surrogates.
        in_every_text: whether `encode` finds it without `parse_special` too (user-defined tokens).
        lstrip: whether it swallows white space before it.
        rstrip: whether it swallows white space after it.
    """

    id: int
    text: str
    in_every_text: bool
    lstrip: bool
    rstrip: bool


class Tokenizer(NoCopy):
    """The vocabulary of a model. Safe to use from several threads at once.

    Its methods raise `TokenizerError` if the model has no vocabulary, and `ClosedError` after the model is closed.

    Attributes:
        type: "spm", "bpe", "wpm", "ugm", "rwkv", "plamo2", "other", or "none" if the model has no vocabulary.
        n_vocab: the number of token ids.
        bos: the id of the token for the beginning of a sequence, or None if there is none.
        eos: the id of the token for the end of a sequence, or None.
        eot: the id of the token for the end of a turn, or None.
        nl: the id of the token for a line break, or None.
        pad: the id of the token for padding, or None.
        fim_prefix: the id of the token before the text before a gap to fill (fill in the middle), or None.
        fim_suffix: the id of the token before the text after the gap, or None.
        fim_middle: the id of the token after which the model fills the gap, or None.
        adds_bos: whether `encode` puts `bos` before a text by default.
        adds_eos: whether `encode` puts `eos` after a text by default.
    """

    type: str
    n_vocab: int
    bos: int | None
    eos: int | None
    eot: int | None
    nl: int | None
    pad: int | None
    fim_prefix: int | None
    fim_suffix: int | None
    fim_middle: int | None
    adds_bos: bool
    adds_eos: bool

    def __init__(self, model: Handle, metadata: Mapping[str, object]):
        self._model = model
        with model as pointer:
            self._vocab = vocab = lib.llama_model_get_vocab(pointer)
            kind = lib.llama_vocab_type(vocab)
            self.type = TYPES.get(kind, "other")
            self.n_vocab = lib.llama_vocab_n_tokens(vocab)
            self.bos = _optional(lib.llama_vocab_bos(vocab))
            self.eos = _optional(lib.llama_vocab_eos(vocab))
            self.eot = _optional(lib.llama_vocab_eot(vocab))
            self.nl, self.pad = _optional(lib.llama_vocab_nl(vocab)), _optional(lib.llama_vocab_pad(vocab))
            self.fim_prefix = _optional(lib.llama_vocab_fim_pre(vocab))
            self.fim_suffix = _optional(lib.llama_vocab_fim_suf(vocab))
            self.fim_middle = _optional(lib.llama_vocab_fim_mid(vocab))
            self._sep = _optional(lib.llama_vocab_sep(vocab))
            self.adds_bos = bool(lib.llama_vocab_get_add_bos(vocab))
            self.adds_eos = bool(lib.llama_vocab_get_add_eos(vocab))
        name, splitter = (str(metadata.get(f"tokenizer.ggml.{key}", "")) for key in ("model", "pre"))
        # The model "gemma4" implies its splitter, which is a loop.
        self._splitter = (splitter or "default") if self.type == "bpe" and name != "gemma4" else ""
        self._refuses_spaces = self._splitter == "whitespace" and name != "whitespace"
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

    def __len__(self) -> int:
        """Return the number of token ids."""
        return self.n_vocab

    def __bool__(self) -> bool:
        return True  # also without a vocabulary

    def count(self, text: str | bytes, add_special: bool = True, parse_special: bool = False) -> int:
        """Return how many tokens a text is; the arguments and errors are those of `encode`."""
        return len(self.encode(text, add_special, parse_special))

    def encode(
        self,
        text: str | bytes,
        add_special: bool = True,
        parse_special: bool = False,
        *,
        cancel: threading.Event | None = None,
    ) -> list[int]:
        """Turn text into token ids (`llama_tokenize`).

        A text of 1 GiB in UTF-8 is the limit. Vocabularies whose splitter is a regex also limit what it may match at
        once, which is mostly a line, to 2,000,000 characters.

        Args:
            text: the text, as a string or as bytes in UTF-8.
            add_special: add the special tokens that the model expects around a text (BOS, EOS).
            parse_special: treat the names of special tokens in the text, such as `<|im_start|>`, as those tokens. Leave
                it off for text from others.
            cancel: ends the call when it is set; so does Ctrl-C. libllama cannot be interrupted here: a thread of its
                own goes on in the background until the text is encoded.

        Raises:
            TokenizerError: the vocabulary cannot encode the text, the text is too long, or the system grants no stack
                that is large enough for it.
            Cancelled: `cancel` was set.
        """
        if not isinstance(text, str | bytes):
            raise TypeError(f"text must be a str or bytes, not {what(text)}")
        cancel_token(cancel)
        add_special, parse_special = flag("add_special", add_special), flag("parse_special", parse_special)
        self._require_vocabulary()
        try:
            text, data = (text, text.encode()) if isinstance(text, str) else (text.decode(), text)
        except UnicodeEncodeError as error:
            raise TokenizerError(f"the text has a lone surrogate at index {error.start}") from None
        except UnicodeDecodeError as error:
            raise TokenizerError(f"the text is not UTF-8 at byte {error.start}") from None
        if len(data) > _MAX_TEXT_BYTES:
            raise TokenizerError(f"the text has {len(data):,} bytes; encode at most {_MAX_TEXT_BYTES:,} at a time")
        if self._refuses_spaces and (found := _SPACE_BESIDE_SPACE.search(text)):
            raise TokenizerError(
                "the vocabulary's splitter, 'whitespace', cannot take a space next to other white space, as at index "
                f"{found.start()} of the text"
            )
        if add_special:
            self._require_special_tokens()
        if cancel is not None and cancel.is_set():
            raise Cancelled("encoding was cancelled")
        match = self._longest_match(text)
        stack_bytes = _STACK_BYTES + -(-match * _STACK_BYTES_A_CHARACTER // _STACK_BYTES) * _STACK_BYTES  # whole pages
        if match > _SHORT_MATCH or len(text) > _LONG_TEXT or (match and stack_bytes > lib.minerva_stack_left()):
            try:
                return with_stack(lambda: self._tokenize(data, add_special, parse_special), stack_bytes, cancel)
            except StackError as error:
                raise TokenizerError(f"{error}; the text needs it, so encode it in pieces") from None
        return self._tokenize(data, add_special, parse_special)

    def _longest_match(self, text: str) -> int:
        """Return how many characters of the text a recursive splitter may match at once; 0 for the others."""
        if not self._splitter or self._splitter in _LOOPS:
            return 0
        length = len(text)
        if length > _SHORT_MATCH and self._splitter in _WITHIN_LINES:
            length = min(length, _longest_stretch(text))
        if length > _LONGEST_MATCH:
            raise TokenizerError(
                f"the vocabulary's splitter, {self._splitter!r}, may match {length:,} characters of the text at once; "
                f"the limit is {_LONGEST_MATCH:,}: encode the text in pieces"
            )
        return length

    def _tokenize(self, data: bytes, add_special: bool, parse_special: bool) -> list[int]:
        """Call `llama_tokenize` on a text that is safe for it."""
        if self._missing_bytes and not self._missing_bytes.isdisjoint(data + _SPACE_SIGN):
            raise TokenizerError("the vocabulary has no tokens for some of the text's bytes")
        capacity = len(data) + 8
        with self._model:
            while True:
                buffer = np.empty(capacity, np.int32)
                array = ffi.from_buffer("llama_token[]", buffer, require_writable=True)
                count = lib.minerva_tokenize(self._vocab, data, len(data), array, capacity, add_special, parse_special)
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
        special = flag("special", special)
        pieces, at_start = [], self._adds_space
        for token in self.as_array(ids).tolist():
            piece = self._piece(token, special)
            pieces.append(piece[1:] if at_start and piece[:1] == b" " else piece)
            at_start = self._adds_space and self.is_control(token)
        return b"".join(pieces)

    def piece(self, token: int, special: bool = False) -> bytes:
        """Return the bytes that a token stands for inside a text (`llama_token_to_piece`)."""
        return self._piece(self.check(token), flag("special", special))

    def pieces(self) -> list[bytes]:
        """Return what `piece` does with `special`, for every token of the vocabulary in order."""
        self._require_vocabulary()
        size = 1 << 10
        buffer, vocab, found = ffi.new("char[]", size), self._vocab, []
        with self._model:
            for token in range(self.n_vocab):
                count = lib.minerva_token_to_piece(vocab, token, buffer, size, True)
                found.append(ffi.unpack(buffer, count) if count > 0 else self._piece(token, True) if count else b"")
        return found

    def stream(self, special: bool = False, after: int | None = None) -> "StreamDecoder":
        """Return a decoder that takes one token at a time.

        Args:
            special: show control tokens by their names instead of leaving them out.
            after: the token before the first one, if the text continues earlier tokens.
        """
        return StreamDecoder(self, flag("special", special), None if after is None else self.check(after))

    def is_end(self, token: int) -> bool:
        """Return whether the token ends a generation (EOS, end of turn and the like)."""
        if type(token) is not int:
            token = self.check(token)
        end = self._ends.get(token)
        if end is None:
            token = self.check(token)
            with self._model:
                end = self._ends[token] = bool(lib.llama_vocab_is_eog(self._vocab, token))
        return end

    def is_control(self, token: int) -> bool:
        """Return whether the token is a control token, which stands for no text."""
        if type(token) is not int:
            token = self.check(token)
        control = self._controls.get(token)
        if control is None:
            token = self.check(token)
            self._require_vocabulary()
            with self._model:
                control = self._controls[token] = bool(lib.llama_vocab_is_control(self._vocab, token))
        return control

    @functools.cached_property
    def special_tokens(self) -> list[SpecialToken]:
        """The control, unknown and user-defined tokens, BOS, and the ends of a generation, longest names first."""
        self._require_vocabulary()
        hidden = lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_UNKNOWN
        found = []
        with self._model:
            for token in range(self.n_vocab):
                kind = lib.llama_vocab_get_attr(self._vocab, token)
                is_special = kind & (hidden | lib.LLAMA_TOKEN_ATTR_USER_DEFINED)
                if is_special or token == self.bos or lib.llama_vocab_is_eog(self._vocab, token):
                    name = ffi.string(lib.llama_vocab_get_text(self._vocab, token))
                    strips = (bool(kind & lib.LLAMA_TOKEN_ATTR_LSTRIP), bool(kind & lib.LLAMA_TOKEN_ATTR_RSTRIP))
                    if name:
                        text = name.decode(errors="surrogateescape")
                        found.append(SpecialToken(token, text, not kind & hidden, *strips))
        return sorted(found, key=lambda special: -len(special.text.encode(errors="surrogateescape")))

    def check(self, token: int) -> int:
        """Return a token id as an int; raise `TypeError` or `ValueError` if it is not an id of this vocabulary."""
        try:
            token = operator.index(token)
        except TypeError:
            raise TypeError(f"a token id must be an integer, not {what(token)}") from None
        if not 0 <= token < self.n_vocab:
            raise ValueError(f"token id {token} is out of range: the vocabulary has ids 0 to {self.n_vocab - 1}")
        return token

    def as_array(self, ids: TokenIds) -> npt.NDArray[np.int32]:
        """Return token ids as an int32 array; raise `TypeError` or `ValueError` if one is not of this vocabulary."""
        if isinstance(ids, str | bytes):
            raise TypeError(f"token ids must be integers, not {what(ids)}: encode the text first")
        # A fast path for decode loops over several sequences.
        if isinstance(ids, list) and len(ids) == 1 and type(ids[0]) is int:
            return np.array([self.check(ids[0])], np.int32)
        try:
            array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))
        except TypeError:
            raise TypeError(f"token ids must be a list or an array of integers, not {what(ids)}") from None
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


class StreamDecoder(NoCopy):
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
        if type(token) is int and not (self._mid_character or tokenizer._adds_space):
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


def _longest_stretch(text: str) -> int:
    """Return how many characters a line can have together with the white space and slashes that follow it, at most."""
    lines = text.split("\n")
    longest = blank = 0
    for line in lines:
        blank = 0 if line.replace("/", "").strip() else blank + len(line) + 1
        longest = max(longest, blank)
    return longest + 2 * max(map(len, lines)) + 2


def _optional(token: int) -> int | None:
    return None if token == lib.LLAMA_TOKEN_NULL else token
