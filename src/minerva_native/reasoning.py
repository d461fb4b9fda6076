"""Reasoning: tells it from the answer as the text is made, and ends it when its budget is spent."""

from collections import deque

import numpy as np
import numpy.typing as npt

from .generation import Chooser
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
        self._hidden = {token for ids in spelled for token in ids if tokenizer.is_control(token)}
        self._end = [*(tokenizer.encode(message, add_special=False) if message else []), *spelled[1]]
        self._forced: deque[int] = deque()
        self._held = self._reasoning = ""
        self._at_start = inside
        self.n_tokens = 0
        self._watch_budget()

    def forcing(self, sampler: Chooser) -> Chooser:
        """Return a sampler that chooses the tokens that are forced, and else as another does."""
        forced = self._forced

        def choose(logits: npt.NDArray[np.float32], tokens: Tokens) -> int:
            return forced[0] if forced else sampler(logits, tokens)

        return choose

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


def opens_reasoning(prompt: str, tags: tuple[str, str]) -> bool:
    """Return whether a prompt ends with the opening tag: the model then begins inside its reasoning."""
    return prompt.rstrip().endswith(tags[0].strip())


def _overlap(text: str, tag: str) -> int:
    """Return how many characters at the end of a text begin a tag."""
    return next((size for size in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:size])), 0)
