"""What an `LLM` shows of its requests to those who count or trace them."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from .completion import Completion, Usage
from .errors import Cancelled
from .tools import Tool, ToolCall

if TYPE_CHECKING:
    from .draft import RequestOptions

_logger = logging.getLogger("minerva_native")

Operation: TypeAlias = Literal["text_completion", "chat", "score", "choose", "prefill"]


@dataclass(eq=False, kw_only=True)
class RequestRecord:
    """A request of an `LLM`, for an `Observer`. Times are those of `time.perf_counter`, in seconds.

    It is complete once the request has ended. Nothing in it is a copy: an observer reads it, and changes nothing.

    Attributes:
        operation: "text_completion" for a raw prompt, "chat" for messages, "score", "choose"; "prefill" evaluates a
            chat for who reads `Chat.sequence`.
        model: the name of the model's file.
        prompt: what was given: a text, token ids or messages. Of a chat all messages, once they are evaluated.
        options: what was asked for; None for an operation that takes none.
        n: how many answers were asked for.
        is_stream: whether the caller iterates over the pieces.
        submitted: when it came.
        started: when its turn came; None if it ended in the queue.
        prefilled: when its prompt was evaluated, if it was.
        first_token: when the first token was there, if one was.
        ended: when it ended.
        answers: what was written, also if it failed then. Those that `best_of` drops are among them.
        usage: of all answers together; the prompt counts once. Nothing if the prompt was not evaluated to its end.
        error: what it failed with. `Cancelled` if it was stopped before the first token; later that is a
            `finish_reason` of the answers.
    """

    operation: Operation
    model: str
    prompt: Any = field(repr=False)  # nobody's text in a log
    options: "RequestOptions | None" = field(default=None, repr=False)
    n: int = 1
    is_stream: bool = False
    submitted: float = 0.0
    started: float | None = None
    prefilled: float | None = None
    first_token: float | None = None
    ended: float | None = None
    answers: tuple[Completion, ...] = field(default=(), repr=False)
    usage: Usage = field(default_factory=Usage)
    error: BaseException | None = None
    _drafts: list[Callable[[], Completion]] = field(default_factory=list, repr=False)
    _ends: list[Callable[[], object]] = field(default_factory=list, repr=False)

    @property
    def outcome(self) -> str:
        """The first answer's `finish_reason`, "end" if there is none to be; "error" or "cancelled" without a result."""
        if self.error is not None:
            return "cancelled" if isinstance(self.error, Cancelled) else "error"
        return self.answers[0].finish_reason if self.answers else "end"

    # For the engine

    def begin(self, observers: "Sequence[Observer]", submitted: float) -> None:
        """Show it to observers, as it comes."""
        self.submitted = submitted
        for observer in tuple(observers):
            with _logged():
                end = observer.request(self)
                if end is not None:
                    self._ends.append(end)

    def writes(self, completion: Callable[[], Completion]) -> None:
        """Note what an answer is, at any time."""
        self._drafts.append(completion)

    def reads(self, usage: Usage) -> None:
        """Note what was evaluated, for a request without answers."""
        self.usage, self.prefilled = usage, time.perf_counter()

    def end(self, started: float | None, error: BaseException | None) -> None:
        """Complete it, and show it to those who saw it begin."""
        self.started, self.error, self.ended = started, error, time.perf_counter()
        with _logged():
            self.answers += tuple(completion() for completion in self._drafts)
        if self.answers:
            self._sum_up(self.answers)
        for end in self._ends:
            with _logged():
                end()
        self._drafts.clear()  # whoever keeps the record keeps no sequence
        self._ends.clear()

    def _sum_up(self, answers: Sequence[Completion]) -> None:
        first, used = answers[0], [answer.usage for answer in answers]
        self.usage = Usage(
            prompt_tokens=first.usage.prompt_tokens,
            cached_tokens=first.usage.cached_tokens,
            completion_tokens=sum(usage.completion_tokens for usage in used),
            reasoning_tokens=sum(usage.reasoning_tokens for usage in used),
            drafted=sum(usage.drafted for usage in used),
            accepted=sum(usage.accepted for usage in used),
            forced_tokens=sum(usage.forced_tokens for usage in used),
        )
        self.prefilled = self.submitted + first.timings.queue + first.timings.prefill
        written = [answer.timings.first_token for answer in answers if answer.timings.first_token]
        self.first_token = self.submitted + min(written) if written else None


class Observer(Protocol):
    """Sees the requests of an `LLM`, as one of `LLM.observers`. What it raises is logged, and changes nothing else.

    It is called once as a request comes and once as it ends, never for a token; the next request waits meanwhile.
    """

    def request(self, record: RequestRecord) -> Callable[[], object] | None:
        """See a request come, on the thread of its caller. What is returned is called when it has ended, in any way.

        That may be on any thread, and comes before the caller knows of it.
        """

    def tool_call(self, tool: Tool, call: ToolCall) -> AbstractContextManager[object]:
        """Return what is entered while `Chat.run` or `Chat.arun` calls a function, and sees its exception."""


@contextmanager
def watched(observers: Sequence[Observer], tool: Tool, call: ToolCall) -> Iterator[None]:
    """Show observers a tool that is called in this block."""
    entered: list[AbstractContextManager[object]] = []
    for observer in tuple(observers):
        with _logged():
            manager = observer.tool_call(tool, call)
            manager.__enter__()
            entered.append(manager)
    try:
        yield
    except BaseException as error:
        _leave(entered, error)
        raise
    _leave(entered, None)


def _leave(entered: list[AbstractContextManager[object]], error: BaseException | None) -> None:
    for manager in reversed(entered):
        with _logged():
            if error is None:
                manager.__exit__(None, None, None)
            else:  # what it returns would hide the error
                manager.__exit__(type(error), error, error.__traceback__)


@contextmanager
def _logged() -> Iterator[None]:
    try:
        yield
    except Exception:
        _logger.exception("an observer of requests has failed")
