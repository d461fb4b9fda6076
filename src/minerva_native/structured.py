"""Structured output: a constraint says what a text may be, a matcher which token may come next.

The work is llguidance's: it turns schemas and grammars into masks over the vocabulary.
"""

import contextlib
import json
import os
import re
import threading
import weakref
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from itertools import takewhile
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from ._arguments import flag, integer, many, what
from ._stack import with_stack
from .errors import ConstraintError, MinervaError, TokenizerError
from .grammars import check_ends, check_rules, check_text
from .schemas import Schema, blame, prepare
from .tokenizer import TokenIds, Tokenizer
from .typed import build, is_typed, schema_of

if TYPE_CHECKING:
    import llguidance

_STACK_BYTES = 64 << 20  # for the compiler, which recurses from one rule to the next

_MOST_SYMBOLS = 25_000  # of a grammar, for which the engine's time grows with their square: a second or two
_MOST_LEXER_WORK = 300_000  # in its own unit

_SPACED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

_MOST_DIGITS = 20  # in a row, of a JSON number: more than a double or a 64-bit integer has

_LONGEST_NAME = 40  # characters of a pattern in messages

_ANCHOR = "\x02"  # no token goes across it


class Constraint:
    """What a text may be. Works with every model, and never changes.

    Make one with `json_schema`, `json_object`, `regex`, `choice`, `lark` or `gbnf`, and give it to `generate` or to any
    method of an `LLM` as `constraint=`. Needs the extra `structured`.

    Raises:
        ConstraintError: the schema or grammar is wrong, has a feature that is not supported, is too large, or nothing
            of finite length satisfies it. `ConstraintError.path` says where in a schema.
        TypeError: it is of the wrong type.
        MinervaError: llguidance is not installed.

    Attributes:
        schema: the JSON schema that it keeps to, as it was prepared; None if it is no schema.
    """

    __slots__ = ("__weakref__", "_grammar", "_name", "_parse", "schema")

    def __init__(self, grammar: str, name: str, parse: Callable[[str], Any], schema: Schema | bool | None = None):
        self._grammar, self._name, self._parse, self.schema = grammar, name, parse, schema

    @classmethod
    def json_schema(cls, schema: Any) -> Self:
        """Allow the JSON values that a schema describes, written on one line with spaces after commas and colons.

        Properties come in the order of the schema, the optional ones among them or not. An object has no properties
        but those that are named, unless the schema speaks of others (`additionalProperties`). A number has at most 20
        digits before its point and 20 after it: a model may never come to an end otherwise.

        Args:
            schema: a JSON schema (dict or bool), a pydantic model or any other type that a schema can be taken from.
        """
        parse: Callable[[str], Any] = json.loads
        if not isinstance(schema, Mapping | bool):
            schema, parse = _typed(schema)
        prepared = prepare(schema)
        if problem := _schema_problem(prepared):
            path = blame(prepared, lambda part: _schema_problem(part) == problem)
            raise ConstraintError(f"the schema at {path}: {problem}", path=path)
        return cls(_json_grammar(prepared), "a JSON schema", parse, prepared)

    @classmethod
    def json_object(cls) -> Self:
        """Allow any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: "str | re.Pattern[str]") -> Self:
        """Allow the texts that a regular expression matches as a whole; its syntax is that of Rust's `regex`."""
        text = _with_flags(pattern) if isinstance(pattern, re.Pattern) else pattern
        check_text("a regular expression", text)
        name = f"/{text if len(text) <= _LONGEST_NAME else text[:_LONGEST_NAME] + '...'}/"
        return cls(_checked(_engine().LLMatcher.grammar_from_regex(text)), name, str)

    @classmethod
    def choice(cls, texts: Iterable[str]) -> Self:
        """Allow one of several texts."""
        if isinstance(texts, str):
            raise TypeError("a choice must be a list of texts, not a str")
        given = list(many("a choice", texts))
        if not given or not all(isinstance(text, str) and text for text in given):
            raise ConstraintError("a choice must be between strings that are not empty")
        # One lexeme: alternatives of a rule are parsed each by itself, and llguidance gives up on 2,000.
        return cls.lark("start: TEXT\nTEXT: " + " | ".join(map(json.dumps, dict.fromkeys(given))))

    @classmethod
    def lark(cls, grammar: str) -> Self:
        """Allow the texts of a grammar in Lark's notation, as llguidance extends it; it begins with `start`."""
        check_text("a grammar", grammar)
        check_rules(grammar)
        checked = _checked(_engine().LLMatcher.grammar_from_lark(grammar))
        check_ends(grammar)
        return cls(checked, "a grammar", str)

    @classmethod
    def gbnf(cls, grammar: str) -> Self:
        """Allow the texts of a grammar in llama.cpp's notation (GBNF), which begins with `root`."""
        check_text("a grammar", grammar)
        check_rules(grammar)
        from llguidance.gbnf_to_lark import gbnf_to_lark

        try:
            lark = gbnf_to_lark(grammar)
        except RecursionError:
            raise ConstraintError("the grammar is nested too deeply") from None
        except Exception as error:  # of any class: a converter of few words
            raise ConstraintError(f"the grammar is not GBNF: {error}") from None
        return cls.lark(lark)

    @classmethod
    def of(cls, given: Any) -> Self | None:
        """Return the constraint that the argument `constraint=` names; None for None.

        Args:
            given: a constraint, a compiled regular expression, a list of texts to choose from, or a dict of one of
                "json_schema", "regex", "choice", "lark" and "gbnf".
        """
        if given is None or isinstance(given, cls):
            return given
        if isinstance(given, re.Pattern):
            return cls.regex(given)
        if isinstance(given, list | tuple):
            return cls.choice(given)
        if isinstance(given, Mapping):
            makers = {"json_schema": cls.json_schema, "regex": cls.regex, "choice": cls.choice}
            makers |= {"lark": cls.lark, "gbnf": cls.gbnf}
            if len(given) == 1 and (name := next(iter(given))) in makers:
                return makers[name](given[name])
            raise ValueError(
                f"constraint must be a dict of one of {', '.join(makers)}, not of {', '.join(map(repr, given))}"
            )
        raise TypeError(f"constraint must be a Constraint, such as Constraint.regex(...), not {what(given)}")

    @classmethod
    def of_format(cls, given: Any) -> Self | None:
        """Return the constraint that the argument `response_format=` names; None for None and for plain text.

        Args:
            given: a dict as in OpenAI's API (of the type "text", "json_object" or "json_schema"), or what `json_schema`
                takes.
        """
        if given is None or isinstance(given, cls):
            return given
        if not isinstance(given, Mapping | bool) and not is_typed(given):
            raise TypeError(f"response_format must be a dict or a type, not {what(given)}: use constraint= for others")
        kind = given.get("type") if isinstance(given, Mapping) else None
        if kind == "text":
            return None
        if kind == "json_object":
            inner = given.get("schema")  # as llama-server has it
            return cls.json_object() if inner is None else cls.json_schema(inner)
        if kind == "json_schema":
            return cls.json_schema(_schema_in(given))
        return cls.json_schema(given)

    def prepare(self, tokenizer: Tokenizer) -> None:
        """Begin in the background what `matcher` needs once for each vocabulary."""
        _vocabularies.begin(tokenizer)

    def matcher(self, tokenizer: Tokenizer, *, in_thread: bool = False) -> "Matcher":
        """Return a matcher at the beginning of a text.

        The first one for a model compiles the grammar, which takes up to seconds if that is large; later ones are
        copies. Raises `ConstraintError` if the vocabulary has no token that ends a generation.

        Args:
            tokenizer: of the model. Its vocabulary is read once, which takes a fraction of a second.
            in_thread: compute each mask in a thread while the model computes. It pays if there is a free core.
        """
        if not isinstance(tokenizer, Tokenizer):
            raise TypeError(f"tokenizer must be a Tokenizer, not {what(tokenizer)}")
        in_thread, vocabulary = flag("in_thread", in_thread), _vocabularies.get(tokenizer)
        engine = vocabulary.compiled.get(self)
        if engine is None:
            limits, make = _limits(), _engine().LLMatcher
            engine = _with_stack(lambda: make(vocabulary.engine, self._grammar, log_level=0, limits=limits))
            vocabulary.compiled[self] = engine
        return Matcher(engine.deep_copy(), tokenizer, in_thread, None if self.schema is None else vocabulary.digits)

    def parse(self, text: str) -> Any:
        """Return the value that a text stands for: of JSON the value, or an instance of the type that was given.

        Raises:
            ConstraintError: the text is not complete. `ConstraintError.text` has it.
        """
        try:
            return self._parse(text)
        except Exception as error:  # a validator may raise anything
            raise ConstraintError(f"the text is not a complete value of {self._name} ({error})", text=text) from None

    def __repr__(self) -> str:
        return f"<Constraint: {self._name}>"


class Matcher:
    """A place in a text that a constraint describes; made by `Constraint.matcher`. Not for two threads at once.

    Attributes:
        tokens: the tokens so far.
        is_complete: whether the text is complete, so that nothing may follow.
    """

    def __init__(
        self,
        engine: "llguidance.LLMatcher",
        tokenizer: Tokenizer,
        in_thread: bool,
        digits: npt.NDArray[np.int32] | None = None,
    ):
        self._engine, self._tokenizer, self._in_thread = engine, tokenizer, in_thread
        self._digits, self._places = digits, [_Place(False, False, 0)]
        self._mask = np.zeros(-(-tokenizer.n_vocab // 32), np.int32)
        self._nothing = self._mask.tobytes()
        self._address, self._size = self._mask.ctypes.data, self._mask.nbytes
        self._is_current = False  # whether the mask is that of this place
        self._computing: _Job | None = None
        self._forced: deque[int] | None = None
        self.tokens: array[int] = array("i")
        self._wait()  # raises what the compiler had to say
        self._look()

    @property
    def can_end(self) -> bool:
        """Whether the text may end here."""
        self._wait()
        return bool(self._engine.is_accepting())

    def prepare(self) -> None:
        """Begin to compute the mask, if that is done in a thread."""
        if self._in_thread and not self._is_current and self._computing is None:
            self._computing = _mask_thread().start(self._compute)

    def mask(self) -> npt.NDArray[np.int32]:
        """Return which tokens may come next: packed bits, int32 (n_vocab / 32,), valid until the next call."""
        self._wait()
        if not self._is_current:
            self._compute()
            self._wait()  # raises what went wrong
        if self._mask.tobytes() == self._nothing:
            raise ConstraintError("the constraint allows no token here")
        if self._digits is not None and self._places[-1].n_digits >= _MOST_DIGITS:
            shorter: npt.NDArray[np.int32] = self._mask & ~self._digits
            if shorter.any():
                return shorter
        return self._mask

    def forced(self) -> int | None:
        """Return the next token if the constraint leaves one continuation of the text, else None."""
        if self._forced is None:
            self._wait()
            self._forced = deque(self._engine.compute_ff_tokens())
        return self._forced[0] if self._forced else None

    def consume(self, token: int) -> None:
        """Go behind a token; raise `ConstraintError`, and stay here, if it is not allowed."""
        if type(token) is not int or not 0 <= token < self._tokenizer.n_vocab:
            token = self._tokenizer.check(token)
        self._wait()
        if self._engine.try_consume_tokens([token]) != 1:
            self._wait()  # raises what went wrong, if it is not the token
            piece = self._tokenizer.piece(token, special=True)
            raise ConstraintError(f"the constraint does not allow token {token} ({piece!r}) here")
        if self._forced and self._forced[0] == token:
            self._forced.popleft()
        else:
            self._forced = None
        self.tokens.append(token)
        if self._digits is not None:
            self._places.append(self._places[-1].after(self._tokenizer.piece(token)))
        self._is_current = False
        self._look()

    def rollback(self, n: int) -> None:
        """Go back by `n` tokens. Raises `ValueError` if there are not so many."""
        n = integer("n", n)
        if not 0 <= n <= len(self.tokens):
            raise ValueError(f"cannot go back by {n}: the matcher has {len(self.tokens)} tokens")
        self._wait()
        if n:
            self._engine.rollback(n)
            del self.tokens[len(self.tokens) - n :]
            del self._places[len(self.tokens) + 1 :]
            self._is_current, self._forced = False, None
            self._look()

    def follow(self, tokens: TokenIds) -> None:
        """Become the matcher of other tokens, going back only as far as they differ."""
        if self.tokens.tolist() == tokens:
            return
        tokens = self._tokenizer.as_array(tokens).tolist()
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.tokens, tokens, strict=False)))
        self.rollback(len(self.tokens) - same)
        for token in tokens[same:]:
            self.consume(token)

    def fork(self) -> "Matcher":
        """Return a matcher at the same place, which goes its own way."""
        self._wait()
        branch = Matcher(self._engine.deep_copy(), self._tokenizer, self._in_thread, self._digits)
        branch.tokens, branch._places = self.tokens[:], self._places[:]
        return branch

    def _compute(self) -> None:
        self._engine.unsafe_compute_mask_ptr(self._address, self._size)
        self._is_current = True

    def _wait(self) -> None:
        if self._computing is not None:
            self._computing.wait()
            self._computing = None
        if self._engine.is_error():
            raise ConstraintError(_first_lines(self._engine.get_error()))

    def _look(self) -> None:
        self.is_complete = self._engine.is_stopped()
        if self.is_complete:
            self._wait()  # raises what was wrong


class _Place(NamedTuple):
    """A place in a JSON text: whether it is inside a string, after a backslash, and how many digits are before it."""

    in_string: bool
    is_escaped: bool
    n_digits: int

    def after(self, piece: bytes) -> "_Place":
        """Return the place behind a piece."""
        in_string, is_escaped, n_digits = self
        for byte in piece:
            if in_string:
                in_string, is_escaped = is_escaped or byte != 0x22, byte == 0x5C and not is_escaped
            else:
                in_string, n_digits = byte == 0x22, n_digits + 1 if 0x30 <= byte <= 0x39 else 0
        return _Place(in_string, is_escaped, n_digits)


def _with_flags(compiled: "re.Pattern[Any]") -> Any:
    """Return the pattern of one of Python's regular expressions, with its flags."""
    if isinstance(compiled.pattern, str) and compiled.flags & (re.ASCII | re.VERBOSE):
        raise ConstraintError(f"{compiled!r}: of the flags only IGNORECASE, MULTILINE and DOTALL are supported")
    names = {re.IGNORECASE: "i", re.MULTILINE: "m", re.DOTALL: "s"}
    flags = "".join(name for flag, name in names.items() if compiled.flags & flag)
    return f"(?{flags}){compiled.pattern}" if flags and isinstance(compiled.pattern, str) else compiled.pattern


def _schema_in(given: Mapping[str, Any]) -> Any:
    """Return the schema in a response format of the type "json_schema"."""
    inner = given.get("json_schema", given)
    schema = inner
    if isinstance(inner, Mapping) and (inner is given or inner.keys() & {"schema", "name", "strict"}):
        schema = inner.get("schema")
    if schema is None:
        raise TypeError('response_format has no schema: {"type": "json_schema", "json_schema": {"schema": ...}}')
    return schema


# The engine


def _engine() -> Any:
    try:
        import llguidance
    except ImportError:
        raise MinervaError("structured output needs llguidance: pip install 'minerva-native[structured]'") from None
    return llguidance


def _limits() -> Any:
    return _engine().LLParserLimits(max_grammar_size=_MOST_SYMBOLS, initial_lexer_fuel=_MOST_LEXER_WORK)


def _with_stack(function: Callable[[], Any]) -> Any:
    try:
        return with_stack(function, _STACK_BYTES)
    except RuntimeError as error:
        raise ConstraintError(str(error)) from None


def _schema_problem(schema: Any) -> str:
    """Return what is wrong with a schema, or with what stands in the place of one; empty if nothing is."""
    try:
        return _problem(_json_grammar(schema))
    except ValueError as error:  # it is not even read
        return str(error)


def _json_grammar(schema: Any) -> str:
    if isinstance(schema, bool):
        schema = {} if schema else {"anyOf": []}
    grammar: str = _engine().LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=_SPACED)
    return grammar


def _problem(grammar: str) -> str:
    """Return what is wrong with a grammar; empty if nothing is."""
    validate, limits = _engine().LLMatcher.validate_grammar_with_warnings, _limits()
    is_wrong, messages = _with_stack(lambda: validate(grammar, limits=limits))
    return _first_lines(messages[0]) if is_wrong else ""


def _checked(grammar: str) -> str:
    if problem := _problem(grammar):
        raise ConstraintError(f"the grammar: {problem}")
    return grammar


def _first_lines(message: str) -> str:
    """Return a message of the engine without its state."""
    lines = [line.strip() for line in message.split("\n<state>")[0].splitlines()]
    return " ".join(line for line in lines if line and set(line) != {"^"})[:500]


class _Vocabulary(NamedTuple):
    """A vocabulary for the engine.

    Attributes:
        engine: its own view.
        digits: which tokens begin with a digit, in packed bits.
        compiled: what it has made of grammars, at the beginning of a text.
    """

    engine: "llguidance.LLTokenizer"
    digits: npt.NDArray[np.int32]
    compiled: "weakref.WeakKeyDictionary[Constraint, llguidance.LLMatcher]"


class _Vocabularies:
    """The vocabularies of models as the engine wants them, each made once."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin again: a child of a fork has neither the threads nor who holds the lock."""
        self._made: weakref.WeakKeyDictionary[Tokenizer, _Job] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def begin(self, tokenizer: Tokenizer) -> "_Job":
        with self._lock:
            job = self._made.get(tokenizer)
            if job is None:
                _engine()
                job = self._made[tokenizer] = _Job(lambda: _vocabulary(tokenizer))
                threading.Thread(target=job.run, name="minerva_native vocabulary", daemon=True).start()
        return job

    def get(self, tokenizer: Tokenizer) -> _Vocabulary:
        job = self.begin(tokenizer)
        try:
            made: _Vocabulary = job.wait()
            return made
        except BaseException:
            with self._lock, contextlib.suppress(KeyError):
                del self._made[tokenizer]
            raise


def _vocabulary(tokenizer: Tokenizer) -> _Vocabulary:
    engine = _engine()
    names = {token.id: token.text for token in tokenizer.special_tokens if not token.in_every_text}
    pieces = tokenizer.pieces()
    for token, name in names.items():
        pieces[token] = b"\xff" + name.encode(errors="surrogateescape")
    ends = [token for token in range(tokenizer.n_vocab) if tokenizer.is_end(token)]
    if not ends:
        raise ConstraintError("the vocabulary has no token that ends a generation, which a constraint needs")
    encode = _Encoder(tokenizer, pieces, ends)
    begin_with_digit = np.zeros(-(-tokenizer.n_vocab // 32) * 32, np.bool_)
    begin_with_digit[: tokenizer.n_vocab] = [piece[:1].isdigit() for piece in pieces]
    digits = np.packbits(begin_with_digit, bitorder="little").view(np.int32)
    made = engine.LLTokenizer(engine.TokenizerWrapper(encode), n_vocab=tokenizer.n_vocab, eos_token=ends)
    return _Vocabulary(made, digits, weakref.WeakKeyDictionary())


class _Encoder:
    """Encodes the middle of a text, as the engine asks for it."""

    def __init__(self, tokenizer: Tokenizer, pieces: list[bytes], ends: list[int]):
        self.tokens = pieces
        self.special_token_ids: list[int] = []  # their pieces say it
        self.eos_token_id, self.bos_token_id = ends[0], tokenizer.bos
        self._tokenizer = weakref.ref(tokenizer)  # the engine, which keeps this, is kept by the tokenizer
        try:
            self._anchor = tokenizer.encode(_ANCHOR, add_special=False)
        except TokenizerError:
            self._anchor = []

    def __call__(self, data: bytes) -> list[int]:
        tokenizer = self._tokenizer()
        try:
            if tokenizer is None:
                return []
            ids = tokenizer.encode(_ANCHOR.encode() + data, add_special=False)
            if self._anchor and ids[: len(self._anchor)] == self._anchor:
                return ids[len(self._anchor) :]
            return tokenizer.encode(data, add_special=False)
        except MinervaError:
            return []


class _Job:
    """A call in another thread, for which one can wait."""

    __slots__ = ("_error", "_function", "_lock", "_result")

    def __init__(self, function: Callable[[], Any]):
        self._function: Callable[[], Any] | None = function
        self._result: Any = None
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._lock.acquire()

    def run(self) -> None:
        function, self._function = self._function, None
        assert function is not None
        try:
            self._result = function()
        except BaseException as error:
            self._error = error
        self._lock.release()

    def wait(self) -> Any:
        """Return the result, or raise the error."""
        with self._lock:
            if self._error is not None:
                raise self._error
            return self._result


class _MaskThread:
    """Computes masks while the model computes."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        self.process = os.getpid()
        threading.Thread(target=self._serve, name="minerva_native masks", daemon=True).start()

    def start(self, function: Callable[[], None]) -> _Job:
        job = _Job(function)
        self._jobs.put(job)
        return job

    def _serve(self) -> None:
        while True:
            self._jobs.get().run()


_vocabularies = _Vocabularies()
os.register_at_fork(after_in_child=_vocabularies.forget)
_masks: _MaskThread | None = None


def _mask_thread() -> _MaskThread:
    global _masks
    if _masks is None or _masks.process != os.getpid():  # a child of a fork has no threads
        _masks = _MaskThread()
    return _masks


def _typed(kind: Any) -> tuple[Schema, Callable[[str], Any]]:
    """Return the schema of a type, and what makes an instance from JSON."""
    if hasattr(kind, "model_validate_json"):  # pydantic reads JSON more leniently than Python's values
        return kind.model_json_schema(), kind.model_validate_json
    if not is_typed(kind):
        raise TypeError(f"a schema must be a dict or a type, not {what(kind)}")
    return schema_of(kind), lambda text: build(kind, json.loads(text))
