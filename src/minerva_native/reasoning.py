"""Reasoning: tells it from the answer as the text is made, and ends it when its budget is spent."""

from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .generation import Chooser, Guide
from .sampling.masks import Mask
from .sequence import Tokens
from .tokenizer import Tokenizer


class ReasoningDecoder:
    """A decoder for `generate` whose text is the answer alone; the reasoning is taken from it after each step.

    White space right after a tag belongs to the tag. A tag may be spelled by several tokens, and may be a control
    token.

    Args:
        tokenizer: of the model.
        tags: the tags around the reasoning.
        after: the last token of the prompt.
        inside: whether the prompt has opened the reasoning already.
        budget: how many tokens the reasoning may have before its end is forced; None for any number.
        message: text that is forced before the end tag.

    Attributes:
        n_tokens: how many tokens of reasoning the model has made.
        opening: the tokens of the opening tag.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        tags: tuple[str, str],
        *,
        after: int | None,
        inside: bool,
        budget: int | None = None,
        message: str = "",
    ):
        self._tags, self._inside, self._budget = tags, inside, budget
        self._decoder = tokenizer.stream(after=after)
        self._special = tokenizer.stream(special=True, after=after)
        spelled = [tokenizer.encode(tag, add_special=False, parse_special=True) for tag in tags]
        self.opening = spelled[0]
        self._hidden = {token for ids in spelled for token in ids if tokenizer.is_control(token)}
        self._end = [*(tokenizer.encode(message, add_special=False) if message else []), *spelled[1]]
        self._forced: deque[int] = deque()
        self._held = self._reasoning = ""
        self._at_start = inside
        self.n_tokens = 0
        self._watch_budget()

    @property
    def is_inside(self) -> bool:
        """Whether the next token is reasoning."""
        return self._inside

    def forcing(self, sampler: Chooser) -> Chooser:
        """Return a sampler that chooses the tokens that are forced, and else as another does."""
        return _Forcing(self._forced, sampler)

    def feed(self, token: int) -> str:
        """Return the text that the token adds to the answer."""
        was_inside, is_forced = self._inside, bool(self._forced)
        if is_forced:
            self._forced.popleft()
        text = (self._special if token in self._hidden else self._decoder).feed(token)
        answer = self._split(self._held + text)
        if was_inside and self._inside and not is_forced:
            self.n_tokens += 1
        if is_forced and not self._forced and self._inside:  # the vocabulary cannot spell the end tag
            self._reasoning += self._held
            self._held, self._inside, self._at_start = "", False, True
        self._watch_budget()
        return answer

    def flush(self) -> str:
        """Return what is left of the answer at the end."""
        held, self._held = self._held + self._decoder.flush(), ""
        return self._give(held)

    def take(self) -> str:
        """Return the reasoning since the last call."""
        reasoning, self._reasoning = self._reasoning, ""
        return reasoning

    def _split(self, text: str) -> str:
        answer = ""
        while True:
            tag = self._tags[self._inside]
            at = text.find(tag)
            if at < 0:
                n_held = _overlap(text, tag)
                self._held = text[len(text) - n_held :]
                return answer + self._give(text[: len(text) - n_held])
            answer += self._give(text[:at])
            text = text[at + len(tag) :]
            self._inside, self._at_start = not self._inside, True

    def _give(self, text: str) -> str:
        """Put text where it belongs: keep it if it is reasoning, else return it."""
        if self._at_start:
            text = text.lstrip()
            self._at_start = not text
        if self._inside:
            self._reasoning += text
            return ""
        return text

    def _watch_budget(self) -> None:
        if self._inside and self._budget is not None and self.n_tokens >= self._budget and not self._forced:
            self._forced.extend(self._end)


class _Forcing:
    """A sampler that chooses the tokens that are forced, and else as another does."""

    def __init__(self, forced: deque[int], sampler: Chooser):
        self._forced, self._sampler = forced, sampler
        self.only_reads = getattr(sampler, "only_reads", False)

    def __call__(self, logits: npt.NDArray[np.float32], tokens: Tokens) -> int:
        return self._forced[0] if self._forced else self._sampler(logits, tokens)


class AfterReasoning:
    """A guide for the answer that leaves the reasoning before it free.

    Args:
        guide: of the answer.
        reasoning: the decoder that tells them apart.
        may_begin: whether the model may open the reasoning itself.
        tokenizer: of the model. No token that ends a generation is allowed inside the reasoning.
    """

    def __init__(self, guide: Guide, reasoning: ReasoningDecoder, may_begin: bool, tokenizer: Tokenizer):
        self._guide, self._reasoning = guide, reasoning
        self._inside = np.array([not tokenizer.is_end(token) for token in range(tokenizer.n_vocab)])
        self._may_begin = may_begin and bool(reasoning.opening)
        self._opening: list[int] = []  # what is left of the opening tag
        self._is_free = False  # whether the token that comes is reasoning

    @property
    def tokens(self) -> Sequence[int]:
        """The tokens of the answer."""
        return self._guide.tokens

    @property
    def is_complete(self) -> bool:
        """Whether the answer is complete."""
        return self._guide.is_complete

    @property
    def can_end(self) -> bool:
        """Whether the answer may end here; it has not begun while there is reasoning."""
        return not self._reasoning.is_inside and not self._opening and self._guide.can_end

    def forced(self) -> int | None:
        """Return the only way to go on, if there is one."""
        self._is_free = self._reasoning.is_inside
        if self._opening:
            return self._opening[0]
        return None if self._is_free or self._may_begin else self._guide.forced()

    def prepare(self) -> None:
        """Begin to compute the mask."""
        if not self._is_free:
            self._guide.prepare()

    def mask(self) -> Mask | None:
        """Return the mask of the answer; inside the reasoning all is allowed but to end."""
        if self._is_free:
            return self._inside
        mask = self._guide.mask()
        if self._may_begin and mask is not None:
            mask = np.unpackbits(mask.view(np.uint8), bitorder="little").view(np.bool_)
            mask[self._reasoning.opening[0]] = True
            mask = np.packbits(mask, bitorder="little")
        return mask

    def consume(self, token: int) -> None:
        """Go behind a token."""
        if self._opening:
            self._opening.pop(0)
        elif self._is_free:
            self._may_begin = False
        elif self._may_begin and token == self._reasoning.opening[0]:
            self._opening, self._may_begin = self._reasoning.opening[1:], False
        else:
            self._may_begin = False
            self._guide.consume(token)

    def follow(self, tokens: list[int]) -> None:
        """Go to the place behind these tokens of the answer."""
        self._guide.follow(tokens)


def opens_reasoning(prompt: str, tags: tuple[str, str]) -> bool:
    """Return whether a prompt ends with the opening tag: the model then begins inside its reasoning."""
    return prompt.rstrip().endswith(tags[0].strip())


def _overlap(text: str, tag: str) -> int:
    """Return how many characters at the end of a text begin a tag."""
    return next((size for size in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:size])), 0)
