"""Speculative decoding: guess the next tokens, evaluate them in one pass, keep those that would have been drawn anyway.

Every token is drawn from the model's own logits by the caller's sampler, as in plain decoding; a guess only decides
whether those logits are there already. So the distribution is the same, the random numbers too, and greedy text is
what plain decoding gives, wherever the batch's size does not change the roundings of the logits.
"""

import math
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
from .sequence import draft_next
from .tokenizer import Tokenizer

_NGRAM = 3  # tokens that have to be the same before a guess
_LONGEST_NGRAM = 32
_MOST_PLACES = 8  # where a guess is looked for
_MOST_CHANGED = 8  # tokens of the repeated text that are skipped after a change
_LONGEST_CHANGE = 16  # tokens; after more of its own, a text repeats no more

_MOST_DRAFTED = 32  # tokens

_HEADS_OF_OTHERS = frozenset({"dflash", "eagle3", "gemma4-assistant"})  # files that hold a head of another model

_MEASURED = 3  # passes before the first guess: what a token costs without
_UNTRIED = 24  # passes
_REMEMBERED = 9  # passes of either kind
_MEASURED_EVERY = 8  # tokens without a guess, from then on
_FEW_RIGHT, _FEW_WRONG = 4.0, 1.0  # guesses that are counted as right and wrong before there were any
_FORGOTTEN = 0.1  # of the counts, with each guess
_REGAINED = 0.02  # of that, with each token without one

FIXED = 0.75, 0.25  # what a pass and each row of it cost if time shall not matter


class Drafter(Protocol):
    """Guesses how tokens go on.

    It may have a method `evidence(tokens)`: how many of the last tokens speak for what `draft` would return, 0 if there
    is nothing to return.
    """

    def draft(self, tokens: Sequence[int], n: int) -> list[int]:
        """Return up to `n` tokens that may follow; none if there is no good guess."""


class Lookup:
    """Guesses that the text goes on as it did the last time that its end came up: prompt lookup (Saxena 2023).

    Where the text departs from the one that it repeats, a token or a few may have been changed, taken out or
    put in: the guess is what comes after them, as soon as one token is the same again.

    Good for texts that repeat or quote: edits, summaries, code, answers from documents.

    Args:
        documents: other texts to look in, as token ids.
    """

    def __init__(self, documents: Iterable[Sequence[int]] = ()):
        self._text: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}
        self._in_documents: dict[tuple[int, ...], list[int]] = {}
        self._here: list[int] = []  # where the last tokens came up
        self._n_documents = 0  # tokens of them
        self._next, self._agreed = 0, 0  # where it goes on, 0 for nowhere, and how many tokens before are the same
        self._lost = 0, 0, 0  # where it went on last, how many tokens before were the same, and where it was then
        for document in many("documents", documents):
            tokens = list(many("documents", document))
            if not all(isinstance(token, int) for token in tokens):
                raise TypeError(f"documents must be lists of token ids, not {what(document)}")
            self._read([*tokens, -1])  # what is no token ends a document
        self._n_documents = len(self._text)
        self._in_documents = self._places
        self._begin()

    def copy(self) -> "Lookup":
        """Return one with the same documents, for another text."""
        other = Lookup()
        other._text, other._n_documents = self._text[: self._n_documents], self._n_documents
        other._in_documents = self._in_documents
        return other

    def evidence(self, tokens: Sequence[int]) -> int:
        """Return how many tokens at the end are the same as before what `draft` would return; 0 if that is nothing."""
        n_read, text = len(self._text) - self._n_documents, self._text
        n = len(tokens)
        if n_read > n or (n_read and tokens[n_read - 1] != text[-1]):  # another text
            self._begin()
            n_read = 0
        if n_read < n:
            self._read(tokens[n_read:])
            if self._agreed < _LONGEST_NGRAM:
                self._find()
        return self._agreed if self._next and text[self._next] >= 0 else 0

    def draft(self, tokens: Sequence[int], n: int) -> list[int]:
        """Return what came after the longest match of the end of the tokens."""
        if not self.evidence(tokens):
            return []
        found = self._text[self._next : self._next + n]
        return found[: found.index(-1)] if -1 in found else found

    def _find(self) -> None:
        """Have the longest match of the end of the text."""
        text, end, here = self._text, len(self._text), self._here
        if len(here) > 1 or self._in_documents:  # the last of them is the end itself
            there = self._in_documents.get(tuple(text[-_NGRAM:]), []) if self._in_documents else []
            for place in (*there[-_MOST_PLACES:], *here[-_MOST_PLACES - 1 : -1]):
                size = _NGRAM
                while size < _LONGEST_NGRAM and place - size > 0 and text[place - size - 1] == text[end - size - 1]:
                    size += 1
                if size > self._agreed or (size == self._agreed and place > self._next):
                    self._next, self._agreed = place, size
        place, agreed, then = self._lost
        if agreed // 2 > self._agreed and end - then <= _LONGEST_CHANGE:
            self._resume(place, agreed // 2, then)

    def _resume(self, place: int, agreed: int, then: int) -> None:
        """Go on after a change that began at `place` and `then`, if the last token may be one of those after it."""
        since = len(self._text) - then
        token, expected = self._text[-1], place + since - 1  # if as many tokens were put in as were taken out
        found = [at for at in range(place, min(place + since + _MOST_CHANGED, then)) if self._text[at] == token]
        if found:
            self._next = 1 + min(found, key=lambda at: abs(at - expected))
            self._agreed = agreed

    def _begin(self) -> None:
        del self._text[self._n_documents :]
        self._places, self._here = {}, []
        self._next = self._agreed = 0
        self._lost = 0, 0, 0

    def _read(self, tokens: Sequence[int]) -> None:
        text, places, start = self._text, self._places, self._n_documents + _NGRAM
        for token in tokens:
            if self._next:
                if text[self._next] == token:
                    self._next += 1
                    self._agreed += 1
                else:
                    self._lost = self._next, self._agreed, len(text)
                    self._next = self._agreed = 0
            text.append(token)
            if len(text) >= start:
                self._here = places.setdefault(tuple(text[-_NGRAM:]), [])
                self._here.append(len(text))


class DraftModel:
    """Guesses what a smaller model of the same vocabulary would write, greedily. Close it, or use `with`.

    Args:
        model: the smaller model.
        n_ctx: of its context; what it cannot hold it does not guess.
        options: others of its context.

    Raises:
        OptionError: the model is one that drafts from another's hidden states, such as EAGLE-3.
    """

    def __init__(self, model: Model, n_ctx: int = 4096, **options: Any):
        if not isinstance(model, Model):
            raise TypeError(f"a draft model must be a Model, not {what(model)}")
        self.model = model
        if model.architecture in _HEADS_OF_OTHERS:
            raise OptionError(
                f"{model.path.name} ({model.architecture}) drafts from another model's hidden states, which only a "
                'model\'s own MTP head is given here (speculate="mtp"): use "lookup" or a model that writes by itself'
            )
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


class OwnHead:
    """Guesses what the model's own MTP head says: one pass over a layer or so for each token.

    The head was trained with the model to guess, from the model's hidden state and the token after it, the token after
    that (multi-token prediction: DeepSeek-V3, arXiv:2412.19437), and goes on from its own guesses. If a model has
    several heads, the i-th guesses the i-th token, and there are no more guesses than heads.

    Args:
        sequence: of a context with `mtp=True`.
    """

    def __init__(self, sequence: TokenSequence):
        self._sequence = sequence

    def draft(self, tokens: Sequence[int], n: int) -> list[int]:
        """Return what the head says comes next; nothing if it has not read what comes before."""
        return draft_next(self._sequence, n)


class Guess:
    """A function of the tokens and a number that returns a guess, as a `Drafter`."""

    def __init__(self, function: Callable[[Sequence[int], int], Iterable[int]]):
        self._function = function

    def draft(self, tokens: Sequence[int], n: int) -> list[int]:
        """Return what the function returns, at most so much."""
        return [int(token) for token in self._function(tokens, n)][:n]


class Costs:
    """What a pass takes: some seconds, and some for each token in it. Measured while texts are written.

    Whatever interrupts a pass makes it longer, so that the shorter of the last ones say what it takes.

    Args:
        fixed: the two, if they are not to be measured.

    Attributes:
        base: seconds of a pass, whatever is in it.
        row: seconds of each token.
        is_fixed: whether they are not measured.
        n_measured: passes without guesses that were measured.
    """

    def __init__(self, fixed: tuple[float, float] | None = None):
        self.base, self.row = fixed or (0.0, 0.0)
        self.is_fixed = fixed is not None
        self.n_measured = _MEASURED if self.is_fixed else 0
        self._plain: deque[tuple[float, int]] = deque(maxlen=_REMEMBERED)  # seconds and tokens
        self._rows: deque[float] = deque(maxlen=_REMEMBERED)  # seconds that a guessed token has added
        self._n_untried = 0.0  # passes in which guesses were not worth it

    def note(self, n_rows: int, n_guessed: int, seconds: float) -> None:
        """Learn from a pass over `n_rows` tokens, of which `n_guessed` were guessed."""
        if self.is_fixed or (n_guessed and not self._plain):  # by somebody who does not go by these costs
            return
        if n_guessed:
            self._n_untried = 0.0
            self._rows.append((seconds - self.base - self.row * (n_rows - n_guessed)) / n_guessed)
            row = _typical([0.5 * (self.base + self.row), *self._rows])  # of a few it takes none that are longer
        else:
            self.n_measured += 1
            self._plain.append((seconds, n_rows))
            row = self.row or 0.5 * seconds / n_rows
        self._set_row(row)

    def hope(self, share: float) -> None:
        """Forget what guesses were measured to add, once nobody has tried them for some passes.

        A longer guess may be worth it where short ones were not: it may take the first of several tokens to make a pass
        slow. `share`: of a pass.
        """
        self._n_untried += share
        if self._n_untried > _UNTRIED and not self.is_fixed:
            self._n_untried = 0.0
            self._rows.clear()
            self._set_row(0.5 * (self.base + self.row))

    def _set_row(self, row: float) -> None:
        whole = _typical([seconds / n_rows for seconds, n_rows in self._plain])
        self.row = min(max(row, 0.01 * whole), whole)
        self.base = max(0.0, _typical([seconds - self.row * n_rows for seconds, n_rows in self._plain]))


def _typical(seconds: Iterable[float]) -> float:
    """Return what a quarter of the numbers is below."""
    ordered = sorted(seconds)
    return ordered[len(ordered) // 4]


class Speculation:
    """Speculative decoding of one sequence; give it to `generate` as `speculate=`.

    As many tokens are guessed as make the text fastest, going by how many were right, by how long a match a guess rests
    on, and by what passes were measured to take. While guesses have cost more than a share of the time, there are no
    more.

    Between steps the sequence may hold guessed tokens after those that were given out. They are taken back when the
    generation ends or its iterator is closed; do not change the sequence before that.

    Args:
        drafter: "lookup"; "mtp" for the model's own head, in a context with `mtp=True`; a `DraftModel`, another
            `Drafter`, or a function of the tokens and a number for a guess.
        max_loss: the share of the time that guesses may cost; infinity to guess whether it pays or not, and to go by
            counts alone, whatever is measured.
        costs: what passes take, if others are measuring that.

    Attributes:
        drafted: how many tokens were guessed.
        accepted: how many of them were right.

    Raises:
        TypeError, ValueError: it is nothing that drafts.
    """

    def __init__(
        self,
        drafter: "str | Drafter | Callable[[Sequence[int], int], Iterable[int]]" = "lookup",
        max_loss: float = 0.01,
        costs: Costs | None = None,
    ):
        self._drafter = _drafter_of(drafter)
        self.max_loss = number("max_loss", max_loss)
        self.costs = costs or Costs(FIXED if self.max_loss == math.inf else None)
        self.drafted = self.accepted = 0
        self.ahead: Lookahead | None = None

    def over(self, sequence: TokenSequence, max_tokens: int | None = None) -> "Lookahead":
        """Return the sequence as `generate` sees it, which grows by at most `max_tokens`; raise what `check` does."""
        self.check(sequence.context)
        drafter = OwnHead(sequence) if self._drafter is None else self._drafter
        self.ahead = Lookahead(sequence, drafter, self, max_tokens)
        return self.ahead

    def check(self, context: Context) -> None:
        """Say whether it works with a context.

        Raises:
            OptionError: the context shifts when it is full, or its memory forgets by checkpoints and may not keep any;
                or the model's MTP head is to draft, and the context has none.
            ValueError: the draft model has another vocabulary.
        """
        if isinstance(self._drafter, DraftModel):
            self._drafter.check(context.model.tokenizer)
        if self._drafter is None and not context.options.mtp:
            raise OptionError('speculation with "mtp" needs a context with mtp=True, which this one was made without')
        if context.options.on_full != "error":
            raise OptionError(f"speculation needs a context with on_full='error', not {context.options.on_full!r}")
        if not context.memory.can_truncate and not context.memory.n_rollback and not context.options.checkpoint_bytes:
            raise OptionError(
                f"speculation has to forget what was guessed wrong, which a {context.memory.kind} memory does by "
                "checkpoints: leave them some checkpoint_bytes"
            )

    def end(self) -> None:
        """Take back what was guessed and not drawn."""
        if self.ahead is not None and not self.ahead.closed:
            self.ahead.settle()


def _drafter_of(given: Any) -> Drafter | None:
    """Return what drafts as it was asked for; None for the model's own head, which drafts for one sequence."""
    if isinstance(given, str):
        if given not in ("lookup", "mtp"):
            raise ValueError(f'speculate must be "lookup", "mtp", a model or a function, not {given!r}')
        return Lookup() if given == "lookup" else None
    if isinstance(given, Lookup):
        return given.copy()  # each text has its own
    if hasattr(given, "draft"):
        drafter: Drafter = given
        return drafter
    if not callable(given):
        hint = "; for a model, DraftModel(model)" if isinstance(given, Model) else ""
        raise TypeError(f'speculate must be "lookup", "mtp", a drafter or a function, not {what(given)}{hint}')
    return Guess(given)


class Lookahead:
    """A sequence whose logits may have been computed ahead, for tokens that were guessed.

    A guess goes `propose`, one pass over the last token and the guess, `verify`. Whoever evaluates the sequence does
    that; if nobody has, reading `logits` does.

    Attributes:
        tokens: the tokens without what is guessed, as a view.
    """

    def __init__(self, sequence: TokenSequence, drafter: Drafter, counts: Speculation, max_tokens: int | None = None):
        self._sequence, self._drafter, self._counts = sequence, drafter, counts
        context = sequence.context
        self.tokens = Beginning(sequence)
        self._draft: list[int] = []
        self._rows: npt.NDArray[np.float32] | None = None
        self._at = 0  # how many guessed tokens were right
        self._most = min(context.memory.n_rollback or _MOST_DRAFTED, _MOST_DRAFTED)
        self._end = context.options.n_cells
        if max_tokens is not None:
            self._end = min(self._end, len(sequence) + max_tokens)
        self._is_end = context.model.tokenizer.is_end
        self._evidence: Callable[[Sequence[int]], int] | None = getattr(drafter, "evidence", None)
        self._right = self._wrong = 0.0  # guesses, those long ago counting less
        self._forget(1.0)
        self._is_behind = False  # whether right tokens of the last guess have to be evaluated again
        self._has_drafted, self._drafting = False, 0.0  # seconds a guessed token
        self._drafts: deque[float] = deque(maxlen=_REMEMBERED)
        self._start, self._gained = len(sequence), 0.0
        self._plain = 0.0  # seconds that a token takes without a guess

    @property
    def is_ahead(self) -> bool:
        """Whether the logits after the tokens were computed with a guess."""
        return self._rows is not None

    @property
    def logits(self) -> npt.NDArray[np.float32]:
        """The logits after the tokens."""
        if not self.look():
            return self._sequence.logits
        assert self._rows is not None
        row: npt.NDArray[np.float32] = self._rows[self._at]
        return row

    def look(self) -> bool:
        """Evaluate a guess with the last token, if there is one; return whether its logits are those of a guess."""
        if self._rows is not None:
            return True
        if not self._sequence.n_waiting:
            return False
        costs, draft = self._counts.costs, self.propose()
        if draft or costs.n_measured < _MEASURED or not self.tokens.n % _MEASURED_EVERY:
            self._evaluate(draft)
        return self._rows is not None

    def _evaluate(self, draft: list[int]) -> None:
        """Evaluate the last token, with a guess unless there is no room for it, and measure that."""
        sequence, costs = self._sequence, self._counts.costs
        n_waiting, before = sequence.n_waiting, time.perf_counter()
        try:
            if draft:
                self.verify(draft, sequence.logits_after(draft))
        except ContextFullError:
            draft = []
        if not draft:
            _ = sequence.logits
        costs.note(n_waiting + len(draft), len(draft), time.perf_counter() - before)

    def propose(self, n_texts: int = 1, n_most: int = _MOST_DRAFTED) -> list[int]:
        """Return a guess to evaluate with the last token, of at most `n_most` tokens; none if it is not worth it.

        `n_texts`: how many texts share the pass.
        """
        sequence, counts, costs = self._sequence, self._counts, self._counts.costs
        if self._is_behind:  # that comes first, or it would be evaluated after each guess from now on
            self._is_behind = False
            return []
        evidence = 0
        if self._evidence is not None and not (evidence := self._evidence(self.tokens)):
            return []
        if self._rows is not None or not sequence.n_waiting or costs.n_measured < _MEASURED:
            return []
        n_tokens = self.tokens.n
        self._plain = costs.row + costs.base / (1 if costs.is_fixed else n_texts)
        n_free = min(self._most, n_most, self._end - n_tokens - 1)
        may_lose = self._plain * max(1, counts.max_loss * (n_tokens - self._start))
        if n_free < 1 or self._gained < -may_lose:
            return []
        n = self._length(evidence, n_free)
        if not n:
            costs.hope(1 / n_texts)
            self._forget(_REGAINED)
            return []
        before = time.perf_counter()
        draft = self._drafter.draft(self.tokens, n)
        if not costs.is_fixed:
            self._note_drafting(len(draft), time.perf_counter() - before)
        return draft[: next((at for at, token in enumerate(draft) if self._is_end(token)), n)]  # nothing comes after

    def _length(self, evidence: int, n_most: int) -> int:
        """Return how many guesses give most tokens a second."""
        right = self._right + 2 * evidence
        chance = right / (right + self._wrong)  # that the next is right if those before it are
        best = int(self._counts.max_loss == math.inf)
        expected, all_right, seconds = 1.0, 1.0, self._plain
        rate = 1 / seconds
        for n in range(1, n_most + 1):
            all_right *= chance
            expected += all_right
            seconds += self._counts.costs.row + self._drafting
            if expected < rate * seconds:  # from there on it becomes less and less
                break
            best, rate = n, expected / seconds
        return best

    def _note_drafting(self, n: int, seconds: float) -> None:
        if not self._has_drafted:  # a draft model reads the prompt
            self._has_drafted = True
            return
        if n:
            self._drafts.append(seconds / n)
            self._drafting = _typical(self._drafts)
            self._gained -= n * self._drafting

    def verify(self, draft: list[int], rows: npt.NDArray[np.float32]) -> None:
        """Take the logits after the last token and after each of a guess, which was evaluated."""
        self._draft, self._rows, self._at = draft, rows, 0
        self._counts.drafted += len(draft)

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

    def settle(self) -> None:
        """Be done with a guess: learn from it, and forget what of it was not drawn."""
        if self._rows is None:
            return
        n, n_right = len(self._draft), self._at
        self._rows, self._draft, self._at = None, [], 0
        self._forget(_FORGOTTEN)
        self._right += n_right
        self._wrong += n_right < n
        if len(self._sequence) > self.tokens.n:
            self._sequence.truncate(self.tokens.n)
        n_again = self._sequence.n_waiting  # the memory may have gone back further
        self._is_behind = n_again > 0
        self._gained += n_right * self._plain - (n + n_again) * self._counts.costs.row

    def _forget(self, share: float) -> None:
        """Have what was right and wrong count less."""
        few_right = _FEW_RIGHT if self._evidence is None else 0.0
        self._right += share * (few_right - self._right)
        self._wrong += share * (_FEW_WRONG - self._wrong)


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
