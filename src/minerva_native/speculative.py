"""Speculative decoding: guess the next tokens, evaluate them in one pass, keep those that would have been drawn anyway.

Every token is drawn from the model's own logits by the caller's sampler, as in plain decoding; a guess only decides
whether those logits are there already. So the distribution is the same, the random numbers too, and greedy text is
what plain decoding gives, wherever the batch's size does not change the roundings of the logits.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from ._arguments import integer, many, number, what
from .context import Context
from .errors import ContextFullError, OptionError
from .model import Model
from .sequence import Sequence as TokenSequence
from .tokenizer import Tokenizer

_NGRAM = 3  # tokens that have to be the same before a guess
_LONGEST_NGRAM = 32
_MOST_PLACES = 8  # where a guess is looked for

_FIRST_DRAFT, _MOST_DRAFTED = 4, 32  # tokens

_PLAIN_STEPS = 3  # before the first guess: what a token costs without


class Drafter(Protocol):
    """Guesses how tokens go on."""

    def draft(self, tokens: Sequence[int], n: int) -> list[int]:
        """Return up to `n` tokens that may follow; none if there is no good guess."""


class Lookup:
    """Guesses that the text goes on as it did the last time that its end came up: prompt lookup (Saxena 2023).

    Good for texts that repeat or quote: edits, summaries, code, answers from documents.

    Args:
        documents: other texts to look in, as token ids.
    """

    def __init__(self, documents: Iterable[Sequence[int]] = ()):
        self._text: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}
        self._here: list[int] = []  # where the last tokens came up
        for document in many("documents", documents):
            tokens = list(many("documents", document))
            if not all(isinstance(token, int) for token in tokens):
                raise TypeError(f"documents must be lists of token ids, not {what(document)}")
            self._read([*tokens, -1])  # what is no token ends a document
        self._n_documents = len(self._text)

    def draft(self, tokens: Sequence[int], n: int) -> list[int]:
        """Return what came after the longest match of the end of the tokens."""
        self._follow(tokens)
        if len(self._here) < 2:  # the last of them is the end itself
            return []
        text = self._text
        end = len(text)
        best, longest = 0, 0
        for place in self._here[-_MOST_PLACES - 1 : -1]:
            size = _NGRAM
            while size < _LONGEST_NGRAM and place - size > 0 and text[place - size - 1] == text[end - size - 1]:
                size += 1
            if size >= longest:
                best, longest = place, size
        found = text[best : best + n] if longest else []
        return found[: found.index(-1)] if -1 in found else found

    def _follow(self, tokens: Sequence[int]) -> None:
        n_read = len(self._text) - self._n_documents
        if n_read > len(tokens) or (n_read and tokens[n_read - 1] != self._text[-1]):  # another text
            del self._text[self._n_documents :]
            self._places = {key: kept for key, places in self._places.items() if (kept := self._of_documents(places))}
            n_read = 0
            self._here = []
        self._read(tokens[n_read:])

    def _of_documents(self, places: list[int]) -> list[int]:
        return [place for place in places if place <= self._n_documents]

    def _read(self, tokens: Sequence[int]) -> None:
        text = self._text
        for token in tokens:
            text.append(token)
            if len(text) >= _NGRAM:
                self._here = self._places.setdefault(tuple(text[-_NGRAM:]), [])
                self._here.append(len(text))


class DraftModel:
    """Guesses what a smaller model of the same vocabulary would write, greedily. Close it, or use `with`.

    Args:
        model: the smaller model.
        n_ctx: of its context; what it cannot hold it does not guess.
        options: others of its context.
    """

    def __init__(self, model: Model, n_ctx: int = 4096, **options: Any):
        if not isinstance(model, Model):
            raise TypeError(f"a draft model must be a Model, not {what(model)}")
        self.model = model
        n_ctx = min(integer("n_ctx", n_ctx, 1), model.n_ctx_train)
        self.context: Context = model.context(n_ctx=n_ctx, **options)
        self._sequence = self.context.sequence()

    def check(self, tokenizer: Tokenizer) -> None:
        """Raise `ValueError` if another model's tokens are not the same."""
        own = self.model.tokenizer
        some = range(0, own.n_vocab, max(1, own.n_vocab // 1000))
        if own.n_vocab != tokenizer.n_vocab or any(own.piece(at, True) != tokenizer.piece(at, True) for at in some):
            raise ValueError(f"{self.model.path.name} has another vocabulary, so that it cannot draft for this model")

    def draft(self, tokens: Sequence[int], n: int) -> list[int]:
        """Return the most likely continuation; only tokens that are new are evaluated."""
        sequence, found = self._sequence, list[int]()
        if len(tokens) + n > self.context.n_ctx:
            return found
        sequence.assign(list(tokens))
        for _ in range(n):
            token = int(sequence.logits.argmax())
            found.append(token)
            sequence.append(token)
        return found

    def close(self) -> None:
        """Give its context back."""
        self.context.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Guess:
    """A function of the tokens and a number that returns a guess, as a `Drafter`."""

    def __init__(self, function: Callable[[Sequence[int], int], Iterable[int]]):
        self._function = function

    def draft(self, tokens: Sequence[int], n: int) -> list[int]:
        """Return what the function returns, at most so much."""
        return [int(token) for token in self._function(tokens, n)][:n]


class Speculation:
    """Speculative decoding of one sequence; give it to `generate` as `speculate=`.

    How many tokens are guessed follows how many were right. What guesses cost and save is measured: while they have
    cost more than a share of the time, there are no more.

    Between steps the sequence may hold guessed tokens after those that were given out. They are taken back when the
    generation ends or its iterator is closed; do not change the sequence before that.

    Args:
        drafter: "lookup", a `DraftModel`, another `Drafter`, or a function of the tokens and a number for a guess.
        max_loss: the share of the time that guesses may cost; infinity to guess whether it pays or not.

    Attributes:
        drafted: how many tokens were guessed.
        accepted: how many of them were right.

    Raises:
        OptionError: the drafter is "mtp", for which libllama's interface lacks something.
        TypeError, ValueError: it is nothing that drafts.
    """

    def __init__(
        self,
        drafter: "str | Drafter | Callable[[Sequence[int], int], Iterable[int]]" = "lookup",
        max_loss: float = 0.01,
    ):
        if isinstance(drafter, str):
            if drafter == "mtp":
                raise OptionError(
                    "a model's own MTP head cannot draft: llama.h does not give out the hidden states that it starts "
                    'from; use "lookup" or a smaller model'
                )
            if drafter != "lookup":
                raise ValueError(f'speculate must be "lookup", a model or a function, not {drafter!r}')
            drafter = Lookup()
        self._drafter: Drafter = drafter if hasattr(drafter, "draft") else Guess(drafter)
        if not hasattr(drafter, "draft") and not callable(drafter):
            hint = "; for a model, DraftModel(model)" if isinstance(drafter, Model) else ""
            raise TypeError(f'speculate must be "lookup", a drafter or a function, not {what(drafter)}{hint}')
        self.max_loss = number("max_loss", max_loss)
        self.drafted = self.accepted = 0
        self._ahead: Lookahead | None = None

    def over(self, sequence: TokenSequence) -> "Lookahead":
        """Return the sequence as `generate` shall see it; raises what `check` does."""
        self.check(sequence.context)
        self._ahead = Lookahead(sequence, self._drafter, self)
        return self._ahead

    def check(self, context: Context) -> None:
        """Say whether it works with a context.

        Raises:
            OptionError: the context shifts when it is full, or its memory forgets by checkpoints and may not keep any.
            ValueError: the draft model has another vocabulary.
        """
        if isinstance(self._drafter, DraftModel):
            self._drafter.check(context.model.tokenizer)
        if context.options.on_full != "error":
            raise OptionError(f"speculation needs a context with on_full='error', not {context.options.on_full!r}")
        if not context.memory.can_truncate and not context.memory.n_rollback and not context.options.checkpoint_bytes:
            raise OptionError(
                f"speculation has to forget what was guessed wrong, which a {context.memory.kind} memory does by "
                "checkpoints: leave them some checkpoint_bytes"
            )

    def end(self) -> None:
        """Take back what was guessed and not drawn."""
        if self._ahead is not None and not self._ahead.closed:
            self._ahead.settle()


class Lookahead:
    """A sequence whose logits may have been computed ahead, for tokens that were guessed.

    Attributes:
        tokens: the tokens without what is guessed, as a view.
    """

    def __init__(self, sequence: TokenSequence, drafter: Drafter, counts: Speculation):
        self._sequence, self._drafter, self._counts = sequence, drafter, counts
        self.tokens = Beginning(sequence)
        self._draft: list[int] = []
        self._rows: npt.NDArray[np.float32] | None = None
        self._at = 0  # how many guessed tokens were right
        memory = sequence.context.memory
        self._most = min(memory.n_rollback or _MOST_DRAFTED, _MOST_DRAFTED)
        self._is_behind = False  # whether right tokens of the last guess have to be evaluated again
        self._size = min(_FIRST_DRAFT, self._most)
        self._plain: deque[float] = deque(maxlen=9)  # seconds of the last plain steps
        self._cost = 0.0  # seconds of the pass in stock
        self._elapsed = self._gained = 0.0

    @property
    def logits(self) -> npt.NDArray[np.float32]:
        """The logits after the tokens."""
        if self._rows is not None:
            row: npt.NDArray[np.float32] = self._rows[self._at]
            return row
        before = time.perf_counter()
        if self._pays() and self._guess():
            assert self._rows is not None
            self._cost = time.perf_counter() - before
            self._elapsed += self._cost
            return self._rows[0]
        is_plain = self._sequence.n_waiting == 1
        logits = self._sequence.logits
        seconds = time.perf_counter() - before
        self._elapsed += seconds
        if is_plain:
            self._plain.append(seconds)
        elif self._is_behind:
            self._gained += self._typical - seconds
        self._is_behind = False
        return logits

    def append(self, token: int) -> None:
        """Add a token, which costs nothing if it was guessed."""
        if self._rows is not None:
            if self._at < len(self._draft) and self._draft[self._at] == token:
                self._at += 1
                self._counts.accepted += 1
                self.tokens.n += 1
                return
            self.settle()
        self._sequence.append(token)
        self.tokens.n += 1

    @property
    def is_full(self) -> bool:
        """Whether one more token would not fit."""
        return self._at == len(self._draft) and self._sequence.is_full

    @property
    def closed(self) -> bool:
        """Whether the sequence is closed."""
        return self._sequence.closed

    @property
    def _typical(self) -> float:
        """The seconds of a plain step."""
        return sorted(self._plain)[len(self._plain) // 2]

    def _pays(self) -> bool:
        if len(self._plain) < _PLAIN_STEPS:
            return False
        return self._gained >= -max(self._counts.max_loss * self._elapsed, self._plain[-1])

    def _guess(self) -> bool:
        """Evaluate a guess; return False if there is none."""
        sequence = self._sequence
        if self._is_behind:  # that comes first, or it would be evaluated after each guess from now on
            return False
        n = min(self._size, sequence.context.n_ctx - len(sequence) - 1)
        draft = self._drafter.draft(self.tokens, n) if n > 0 else []
        if not draft:
            return False
        try:
            self._rows = sequence.logits_after(draft)
        except ContextFullError:
            return False
        self._draft, self._at = draft, 0
        self._counts.drafted += len(draft)
        return True

    def settle(self) -> None:
        """Be done with a guess: learn from it, and forget what of it was not drawn."""
        if self._rows is None:
            return
        n = len(self._draft)
        self._gained += self._typical * (self._at + 1) - self._cost
        self._size = min(2 * self._size if self._at == n else max(_FIRST_DRAFT, self._at), self._most)
        self._rows, self._draft, self._at = None, [], 0
        if len(self._sequence) > self.tokens.n:
            self._sequence.truncate(self.tokens.n)
            self._is_behind = self._sequence.n_waiting > 0


class Beginning(Sequence[int]):
    """The first `n` tokens of a sequence, as a live view."""

    def __init__(self, sequence: TokenSequence):
        self._tokens, self.n = sequence.tokens, len(sequence)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            start, stop, step = index.indices(self.n)
            return self._tokens[start:stop:step] if start < stop or step < 0 else []
        if not -self.n <= index < self.n:
            raise IndexError("token index out of range")
        return self._tokens[index if index >= 0 else self.n + index]
