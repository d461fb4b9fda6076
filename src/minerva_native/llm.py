"""`LLM`: what people do with a model, in one object over the engine."""

import contextlib
import dataclasses
import inspect
import math
import os
import sys
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, Self, TypeAlias, overload

from ._arguments import file_path, flag, function, integer, many, path, what
from .beams import BeamSearch, check_beams
from .calling import ToolGiven, ToolUse, described
from .chat import ChatTemplate, Message
from .completion import Chunk, Completion, TokenLogprob, Usage
from .context import Context, cache_of
from .conversation import Chat, OpenChats, WhenFull, read_chat
from .draft import Draft, RequestOptions, write_together
from .engine.gate import CancelToken
from .errors import ClosedError, ContextFullError, EmptySequenceError, MinervaError, SequencesInUseError, TemplateError
from .model import Model
from .observer import Observer, Operation, RequestRecord
from .options import MOST_SEQUENCES, ContextOptions
from .prompt_cache import MAX_BYTES, PromptCache
from .requests import AsyncStream, Request, RequestQueue, Signal, Stream, n_characters
from .sampling import logprob
from .scheduler import Scheduler
from .sequence import Sequence as TokenSequence
from .speculative import FIXED, Costs, DraftModel, Speculation
from .tokenizer import TokenIds, Tokenizer

if TYPE_CHECKING:
    from rich.progress import Progress

Prompt = str | TokenIds
"""A text, which is encoded as the model expects it (with its BOS), or token ids, which are taken as they are."""

_N_SEQ = 8  # places for requests, open chats and forks; with cells in common, a place costs nothing

_MOST_ANSWERS = 128  # to one request

_OF_CONTEXT = frozenset(field.name for field in dataclasses.fields(ContextOptions))
_OF_LOADING = frozenset(inspect.signature(Model.load).parameters) - {"path", "context"}


class Scores(NamedTuple):
    """A text's tokens, and the log-probability of each given those before it.

    Attributes:
        tokens: the ids.
        logprobs: natural logarithms; the first token has nothing before it, which is NaN.
    """

    tokens: list[int]
    logprobs: list[float]


class Load(NamedTuple):
    """What an LLM does at a moment.

    Attributes:
        waiting: requests that wait for their turn.
        served: requests that are served.
        sequences: sequences in use, of at most `n_seq`: those of requests, of chats between turns, and others.
        n_seq: of the context.
        cells_used: KV cells that those take, of `n_ctx`. While something is evaluated, it may be a batch behind.
        n_ctx: of the context.
    """

    waiting: int
    served: int
    sequences: int
    n_seq: int
    cells_used: int
    n_ctx: int


Echoed: TypeAlias = tuple[str, list[TokenLogprob]]
"""The text of a prompt, and the log-probabilities of its tokens if they were asked for."""

Scored: TypeAlias = tuple[TokenSequence, list[float], list[list[tuple[int, float]]]]
"""A prompt, the log-probability of each of its tokens, and the most likely tokens in the place of each."""


class Beginning(NamedTuple):
    """A prompt that is evaluated, for answers to go on from.

    Attributes:
        sequence: holds the prompt.
        cached_tokens: how many of its tokens were not evaluated.
        is_chat: whether it is messages.
        tools: which tools the answers may call, and how.
        echoed: the prompt, if answers begin with it.
    """

    sequence: TokenSequence
    cached_tokens: int = 0
    is_chat: bool = False
    tools: ToolUse | None = None
    echoed: Echoed | None = None


Begin: TypeAlias = Callable[[Request], Generator[Signal, None, Beginning]]
"""Evaluates the prompt of a request."""


class LLM:
    """A model, its context and its chat template, with a queue in front: text, chats and probabilities from any thread.

    Requests are served in the order they came, one after another or up to `n_parallel` at once. `async` methods have
    the names of the others with an `a` before them; they never block the event loop. Whatever a request takes beside
    its prompt is a keyword: the fields of `RequestOptions` (`max_tokens`, `stop`, `logprobs`, `timeout`, `cancel`, ...)
    and of `SamplingParams` (`temperature`, `seed`, ...), whose defaults are the model's own.

    What a finished request has evaluated stays in the KV cache while there is room: a prompt that begins like an
    earlier one is evaluated from where they part. A request leaves the queue, or ends within a token, when it is
    cancelled, its iterator is closed or its time is up.

    A context manager. It closes what it has opened: the context, and the model unless that was given.

    Args:
        model: the path of a GGUF file, or a `Model`.
        template: a chat template, if not the model's own.
        on_full: what a chat does if its messages do not fit. "error" raises `ContextFullError`. "drop_turns" drops the
            oldest turns after the system prompt. A function gets the messages and returns fewer.
        n_parallel: how many requests to serve at once, a token of each in one batch. They share the `n_ctx` tokens.
        cache_dir: a directory in which prompts and chats are kept, so that another process need not evaluate them
            again; True for the usual one (see `PromptFiles`). What people write is in those files, for this user alone
            to read. None, the default, writes nothing.
        cache_bytes: how large that directory may become; what was not used for longest is removed. 4 GiB by default.
        speculate: guesses tokens, to evaluate several in one pass. "lookup" guesses that the text repeats, "mtp" loads
            the model's own MTP head and has it guess, a smaller `Model` of the same vocabulary writes drafts; or a
            function of the tokens and a number for so many guesses.
        deterministic: make what is computed for a request depend on nothing else, neither on what is served beside it
            nor on what was before. Each sequence is evaluated by itself and has its share of the `n_ctx` tokens, and
            nothing is reused between requests: slower, but equal to the last bit.
        options: those of `Model.load` and `ContextOptions`; `n_seq` is 8 by default, and one more for each request that
            may be served beside the first.

    Attributes:
        model: the model.
        context: its context, for whatever this class does not do.
        tokenizer: the model's tokenizer.
        template: the chat template, or None.
        queue: the requests; `len(llm.queue)` of them wait.
        n_parallel: see there.
        chats: the chats that have an open sequence.
        prompt_cache: what `cache_dir` has, or None.
        on_full: see there.

    Raises:
        TypeError, ValueError: an argument is unknown or wrong.
        ModelLoadError, DeviceError, OptionError, ContextError: see `Model.load` and `Context`.
        TemplateError: the template cannot be compiled.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Model,
        *,
        template: str | ChatTemplate | None = None,
        on_full: WhenFull = "error",
        n_parallel: int = 1,
        cache_dir: str | os.PathLike[str] | Literal[True] | None = None,
        cache_bytes: int = MAX_BYTES,
        speculate: Any = None,
        deterministic: bool = False,
        **options: Any,
    ):
        if cache_dir is not None and cache_dir is not True:
            cache_dir = file_path("cache_dir", cache_dir)
        cache_bytes = integer("cache_bytes", cache_bytes, 0)
        n_parallel = integer("n_parallel", n_parallel, 1, MOST_SEQUENCES - 1)
        deterministic = flag("deterministic", deterministic)
        if not callable(on_full) and not (isinstance(on_full, str) and on_full in ("error", "drop_turns")):
            raise ValueError(f'on_full must be "error", "drop_turns" or a function, not {on_full!r}')
        loading = {name: options.pop(name) for name in sorted(_OF_LOADING & options.keys())}
        unknown = sorted(options.keys() - _OF_CONTEXT)
        if unknown:
            raise TypeError(f"LLM() has no argument {unknown[0]!r}: see Model.load and ContextOptions")
        defaults: dict[str, Any] = {"n_seq": min(n_parallel - 1 + _N_SEQ, MOST_SEQUENCES)}
        if deterministic:
            defaults = {"n_seq": n_parallel + 1, "kv_unified": False, "prefix_cache": False}
            wrong = [name for name in ("kv_unified", "prefix_cache") if options.get(name)]
            if wrong:
                raise ValueError(f"{wrong[0]} has no place beside deterministic=True: it changes roundings")
            if isinstance(speculate, Model | DraftModel):
                raise ValueError(
                    "a draft model has no place beside deterministic=True: what it drafts for a text depends on others"
                )
        if isinstance(speculate, str) and speculate == "mtp":
            defaults["mtp"] = True
            if not isinstance(model, Model):
                loading.setdefault("load_mtp", True)
        context_options = ContextOptions(**{**defaults, **options})
        if context_options.n_seq < n_parallel:
            raise ValueError(f"n_seq={context_options.n_seq} is too few for n_parallel={n_parallel}")
        if isinstance(template, str):
            template = ChatTemplate(template)
        elif template is not None and not isinstance(template, ChatTemplate):
            raise TypeError(f"template must be a str or a ChatTemplate, not {what(template)}")
        owned = None
        if isinstance(model, Model):
            if loading:
                raise TypeError(f"{', '.join(loading)}: the model is loaded already, so give that to Model.load")
            self.model = model
        else:
            self.model = owned = Model.load(path("model", model), context=context_options, **loading)
        drafter = None
        try:
            self.context = Context(self.model, context_options)
            if isinstance(speculate, Model):
                own = {"n_threads": self.context.n_threads, "n_seq": self.context.n_seq}
                speculate = drafter = DraftModel(speculate, self.context.n_ctx, **own)
            self._speculate, self._costs = speculate, Costs(FIXED if deterministic else None)
            if (speculation := self.speculation()) is not None:
                speculation.check(self.context)
            self.template = _template_of(self.model) if template is None else template
            self.prompt_cache = None
            if cache_dir is not None:
                self.prompt_cache = PromptCache(None if cache_dir is True else cache_dir, self.context, cache_bytes)
        except BaseException:
            if drafter is not None:
                drafter.close()
            if owned is not None:
                owned.close()
            raise
        self.tokenizer: Tokenizer = self.model.tokenizer
        self.on_full = on_full
        self.chats, self.n_parallel = OpenChats(), n_parallel
        costs = None if speculate is None else self._costs
        scheduler = Scheduler(self.context, self.chats, n_parallel, deterministic, costs)
        self.queue = RequestQueue(scheduler)
        self._close = weakref.finalize(self, _close, self.queue, self.prompt_cache, self.context, drafter, owned)

    def options(self, caller: str, options: Mapping[str, Any]) -> RequestOptions:
        """Return the options of a call, checked; `caller` is its name, for messages."""
        if self.model.closed:  # which would speak of its file
            raise ClosedError("this LLM is closed")
        parsed = RequestOptions.of(self.model, caller, options)
        if parsed.reasoning_budget is not None and parsed.thinking_tags is None:
            raise ValueError("reasoning_budget needs thinking_tags=, as no chat template names them here")
        if parsed.constraint is not None:
            parsed.constraint.prepare(self.tokenizer)
        return parsed

    def compile(self, options: RequestOptions, tools: Sequence[ToolGiven] = ()) -> None:
        """Compile what the answer to a request has to be, if that was asked for, and check how it may call tools.

        A large schema takes seconds: if they have not passed here, they pass on the queue's thread, where all other
        requests wait for it.

        Raises:
            ConstraintError: it cannot be kept to.
            TypeError, ValueError: a tool, or what was asked for of them, is wrong.
        """
        constraint = options.constraint
        if tools or options.tool_choice == "required":
            use = options.tools_of(described(tools)[0], self._chosen(None), self.tokenizer)
            constraint = constraint if use is None else use.constraint
        if constraint is not None:
            constraint.matcher(self.tokenizer)

    def speculation(self) -> Speculation | None:
        """Return what guesses tokens of one answer, if that was asked for."""
        return None if self._speculate is None else Speculation(self._speculate, costs=self._costs)

    # For those who watch

    @property
    def observers(self) -> list[Observer]:
        """Who sees its requests: append an `Observer`, or remove it. It sees those that come from then on."""
        return self.queue.observers

    @property
    def load(self) -> Load:
        """What it does now. Reading it waits for nothing."""
        context, queue = self.context, self.queue
        cache = cache_of(context)  # without its lock
        n_open = cache.pool.n_open
        return Load(len(queue), queue.n_served, n_open, context.n_seq, cache.cells_used, context.n_ctx)

    def record(
        self,
        operation: Operation,
        prompt: Any,
        options: RequestOptions | None = None,
        n: int = 1,
        is_stream: bool = False,
    ) -> RequestRecord | None:
        """Return what observers see of a request; None if there are none."""
        if not self.queue.observers:
            return None
        model = self.model.path.name
        return RequestRecord(operation=operation, model=model, prompt=prompt, options=options, n=n, is_stream=is_stream)

    # Text

    def complete(
        self,
        prompt: Prompt,
        n: int = 1,
        best_of: int | None = None,
        beam_width: int | None = None,
        **options: Any,
    ) -> Completion:
        """Continue a text, and return what was made.

        Args:
            prompt: a text, or token ids.
            n: how many continuations to make; the others are `Completion.alternatives`. With a seed each takes the next
                one. They are written side by side, as many at once as there are places.
            best_of: make as many, and return the `n` whose tokens have the highest mean log-probability.
            beam_width: instead of drawing, look for the most likely texts by beam search with so many at each length,
                and return the `n` best by the mean log-probability of their tokens.
            options: the fields of `RequestOptions` and `SamplingParams`.

        Raises:
            TypeError, ValueError: an argument is unknown or wrong.
            ContextFullError: the prompt does not fit.
            EmptySequenceError: the prompt has no tokens.
            Cancelled: the request was stopped before the first token. Later, `finish_reason` is "cancelled".
            ClosedError: the LLM is closed.
        """
        parsed = self.options("complete", options)
        work = self._completing(self._from_text(prompt, parsed), parsed, n, best_of, beam_width)
        return self.queue.call(work, record=self.record("text_completion", prompt, parsed, n), **parsed.limits)

    def stream(self, prompt: Prompt, **options: Any) -> Stream[Chunk]:
        """Do what `complete` does, and return an iterator over the pieces as they are made.

        The request is in the queue at once, and does not wait to be iterated. Closing the iterator stops it.
        """
        parsed = self.options("stream", options)
        work = self._streaming(self._from_text(prompt, parsed), parsed)
        record = self.record("text_completion", prompt, parsed, is_stream=True)
        return self.queue.stream(work, record=record, **parsed.limits)

    async def acomplete(
        self,
        prompt: Prompt,
        n: int = 1,
        best_of: int | None = None,
        beam_width: int | None = None,
        **options: Any,
    ) -> Completion:
        """Do what `complete` does, without blocking the event loop."""
        parsed = self.options("acomplete", options)
        work = self._completing(self._from_text(prompt, parsed), parsed, n, best_of, beam_width)
        return await self.queue.acall(work, record=self.record("text_completion", prompt, parsed, n), **parsed.limits)

    def astream(self, prompt: Prompt, **options: Any) -> AsyncStream[Chunk]:
        """Do what `stream` does, as an asynchronous iterator."""
        parsed = self.options("astream", options)
        work = self._streaming(self._from_text(prompt, parsed), parsed)
        record = self.record("text_completion", prompt, parsed, is_stream=True)
        return self.queue.astream(work, record=record, **parsed.limits)

    @overload
    def map(
        self,
        prompts: Iterable[Prompt],
        return_exceptions: Literal[False] = False,
        progress: bool | None = None,
        on_progress: Callable[[int, int], object] | None = None,
        **options: Any,
    ) -> list[Completion]: ...
    @overload
    def map(
        self,
        prompts: Iterable[Prompt],
        return_exceptions: bool,
        progress: bool | None = None,
        on_progress: Callable[[int, int], object] | None = None,
        **options: Any,
    ) -> list[Completion | Exception]: ...
    def map(
        self,
        prompts: Iterable[Prompt],
        return_exceptions: bool = False,
        progress: bool | None = None,
        on_progress: Callable[[int, int], object] | None = None,
        **options: Any,
    ) -> list[Completion] | list[Completion | Exception]:
        """Complete several prompts, `n_parallel` at once, and return the completions in the order of the prompts.

        Args:
            prompts: texts or token ids.
            return_exceptions: put what went wrong with a prompt into its place in the list; else the first error stops
                the others and is raised.
            progress: show a progress bar on stderr; by default if that is a terminal.
            on_progress: called with the prompts done and the prompts in all.
            options: see `complete`; a `seed` is that of each.

        Raises what `complete` does.
        """
        function("on_progress", on_progress)
        parsed = self.options("map", options)
        given = list(many("prompts", prompts))
        works = [self._completing(self._from_text(prompt, parsed), parsed, 1) for prompt in given]
        records = [self.record("text_completion", prompt, parsed) for prompt in given]
        with contextlib.ExitStack() as stack:
            bar = (
                stack.enter_context(_progress_bar())
                if (sys.stderr.isatty() if progress is None else progress)
                else None
            )
            task = None if bar is None else bar.add_task("Completing", total=len(works))

            def show(done: int) -> None:
                if bar is not None and task is not None:
                    bar.update(task, completed=done)
                if on_progress is not None:
                    on_progress(done, len(works))

            return self.queue.gather(works, records, 2 * self.n_parallel, return_exceptions, show, **parsed.limits)

    # Messages

    def chat(
        self,
        system: str | None = None,
        template: str | ChatTemplate | None = None,
        tools: Sequence[ToolGiven] = (),
        **options: Any,
    ) -> Chat:
        """Return a new conversation.

        Args:
            system: the system prompt.
            template: a chat template, if not the LLM's.
            tools: what the model may call: functions with type hints, or descriptions (dicts) as in OpenAI's API.
            options: defaults for its turns: the fields of `RequestOptions` and `SamplingParams`.

        Raises:
            TemplateError: there is no chat template.
        """
        messages = [] if system is None else [{"role": "system", "content": system}]
        return Chat(self, self._chosen(template), messages, tools, options)

    def load_chat(self, path: str | os.PathLike[str], **options: Any) -> Chat:
        """Return a conversation as `Chat.save` wrote it; `options` are as for `chat`.

        Raises:
            OSError: the file cannot be read.
            StateError: it is no saved chat.
        """
        messages, tools, template = read_chat(Path(path))
        own = self.template
        chosen = own if own is not None and own.text == template else ChatTemplate(template)
        return Chat(self, chosen, messages, tools, options)

    @overload
    def chat_completion(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolGiven] | None = None,
        n: int = 1,
        stream: Literal[False] = False,
        best_of: int | None = None,
        **options: Any,
    ) -> Completion: ...
    @overload
    def chat_completion(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolGiven] | None = None,
        n: int = 1,
        *,
        stream: Literal[True],
        **options: Any,
    ) -> Stream[Chunk]: ...
    def chat_completion(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolGiven] | None = None,
        n: int = 1,
        stream: bool = False,
        best_of: int | None = None,
        **options: Any,
    ) -> Completion | Stream[Chunk]:
        """Answer messages, which are kept nowhere; what was evaluated of them before is found in the KV cache.

        Args:
            messages: dicts as OpenAI's API has them.
            tools: what the model may call: functions with type hints, or descriptions (dicts) as in OpenAI's API.
            n: how many answers to make; the others are `Completion.alternatives`. With a seed each takes the next one.
            stream: return an iterator over the pieces of the one answer.
            best_of: see `complete`.
            options: see `complete`.
        """
        parsed = self._answer_options("chat_completion", options)
        begin = self._from_messages(messages, tools, parsed)
        if not stream:
            work = self._completing(begin, parsed, n, best_of)
            return self.queue.call(work, record=self.record("chat", messages, parsed, n), **parsed.limits)
        if n != 1 or best_of is not None:
            raise ValueError("n must be 1 with stream=True, and best_of None: make a request for each")
        record = self.record("chat", messages, parsed, is_stream=True)
        return self.queue.stream(self._streaming(begin, parsed), record=record, **parsed.limits)

    async def achat_completion(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolGiven] | None = None,
        n: int = 1,
        best_of: int | None = None,
        **options: Any,
    ) -> Completion:
        """Do what `chat_completion` does, without blocking the event loop."""
        parsed = self._answer_options("achat_completion", options)
        work = self._completing(self._from_messages(messages, tools, parsed), parsed, n, best_of)
        return await self.queue.acall(work, record=self.record("chat", messages, parsed, n), **parsed.limits)

    def achat_completion_stream(
        self, messages: Sequence[Message], tools: Sequence[ToolGiven] | None = None, **options: Any
    ) -> AsyncStream[Chunk]:
        """Do what `chat_completion` does with `stream=True`, as an asynchronous iterator."""
        parsed = self._answer_options("achat_completion_stream", options)
        work = self._streaming(self._from_messages(messages, tools, parsed), parsed)
        record = self.record("chat", messages, parsed, is_stream=True)
        return self.queue.astream(work, record=record, **parsed.limits)

    # Probabilities

    def score(self, text: Prompt, cancel: CancelToken | None = None, timeout: float | None = None) -> Scores:
        """Return the tokens of a text, and the log-probability of each given those before it."""
        encode = self._encoder(text)

        def work(request: Request) -> Iterator[Scores | Signal]:
            ids = yield from request.elsewhere(encode, n_characters(text))
            sequence, values, _ = yield from self._scored(request, ids)
            sequence.close()
            if request.record is not None:
                request.record.reads(Usage(prompt_tokens=len(ids)))
            yield Scores(ids, values)

        return self.queue.call(work, cancel=cancel, timeout=timeout, record=self.record("score", text))

    def choose(
        self,
        prompt: Prompt | Sequence[Message],
        answers: Iterable[str],
        cancel: CancelToken | None = None,
        timeout: float | None = None,
    ) -> dict[str, float]:
        """Return how likely each of several answers is to follow a prompt; the probabilities sum to 1.

        What all answers have in common is evaluated once. The rest takes one place in the context each, and a batch for
        each token of the longest. The probability of an answer is that of its text, whatever comes after: "no" is
        always at least as likely as "nobody".

        Args:
            prompt: a text, token ids, or messages.
            answers: at least one text, each different. After a raw text they usually begin with a space.
            cancel: stops it when set.
            timeout: stops it after this many seconds.
        """
        given = list(many("answers", [answers] if isinstance(answers, str) else answers))
        if not given or not all(isinstance(text, str) and text for text in given):
            raise ValueError("answers must be at least one string, and none of them empty")
        texts = list(dict.fromkeys(given))
        encoders = [self._encoder(prompt, text) for text in texts]

        def work(request: Request) -> Iterator[dict[str, float] | Signal]:
            size = len(texts) * n_characters(prompt)
            candidates = yield from request.elsewhere(lambda: [encode() for encode in encoders], size)
            shortest = min(map(len, candidates)) - 1  # at least one token of each has a probability
            n = next((at for at in range(shortest) if len({ids[at] for ids in candidates}) > 1), shortest)
            with (yield from self._evaluated(request, candidates[0][:n])) as sequence:
                logprobs = yield from self._logprobs_of(sequence, [ids[n:] for ids in candidates], request)
            if request.record is not None:
                n_endings = sum(len(ids) - n for ids in candidates)
                request.record.reads(Usage(n + n_endings, cached_tokens=max(0, n - request.n_evaluated)))
            largest = max(logprobs)
            weights = [math.exp(value - largest) for value in logprobs]
            yield {text: weight / sum(weights) for text, weight in zip(texts, weights, strict=True)}

        return self.queue.call(work, cancel=cancel, timeout=timeout, record=self.record("choose", prompt))

    def count_tokens(self, text: str | Sequence[Message]) -> int:
        """Return how many tokens a text is as a prompt, or messages with the beginning of an answer."""
        return len(self._encoder(text)())

    def embed(self, text: str) -> NoReturn:
        """Raise `MinervaError`: embeddings are not there yet."""
        raise MinervaError("embeddings are not there yet; LLM makes texts and probabilities")

    # On the queue's thread

    def _completing(
        self, begin: Begin, options: RequestOptions, n: int, best_of: int | None = None, beam_width: int | None = None
    ) -> Callable[[Request], Iterator[Completion | Signal]]:
        """Return the work that yields a completion, with the others that were asked for as its alternatives."""
        n = integer("n", n, 1, _MOST_ANSWERS)
        n_drafts = n if best_of is None else integer("best_of", best_of, n, _MOST_ANSWERS)
        width = 0 if beam_width is None else integer("beam_width", beam_width, n, _MOST_ANSWERS)
        if width:
            check_beams(options)
            if best_of is not None:
                raise TypeError("give best_of or beam_width, not both")
        written = dataclasses.replace(options, logprobs=True) if n_drafts > n else options

        def work(request: Request) -> Iterator[Completion | Signal]:
            beginning = yield from begin(request)
            with self._lent(beginning.sequence) as sequence:
                if width:
                    search = BeamSearch(request, self.chats, width, options.max_tokens)
                    answers = yield from search.run(sequence, beginning.cached_tokens, beginning.is_chat)
                else:
                    drafts = yield from self._written(request, beginning, written, n_drafts)
                    if n_drafts > n:
                        drafts.sort(key=lambda draft: -draft.mean_logprob)
                    answers = [draft.completion() for draft in drafts]
            if not options.logprobs:
                answers = [dataclasses.replace(answer, logprobs=None) for answer in answers]
            yield dataclasses.replace(answers[0], alternatives=tuple(answers[1:n]))

        return work

    def _streaming(self, begin: Begin, options: RequestOptions) -> Callable[[Request], Iterator[Chunk | Signal]]:
        """Return the work that yields the pieces of one answer."""

        def work(request: Request) -> Iterator[Chunk | Signal]:
            beginning = yield from begin(request)
            with self._lent(beginning.sequence) as sequence:
                self.chats.leave_room(self.context, options.max_tokens)
                yield from self._draft(request, beginning, sequence, options).chunks()

        return work

    def _written(
        self, request: Request, beginning: Beginning, options: RequestOptions, count: int
    ) -> Generator[Signal, None, list[Draft]]:
        """Return `count` answers, written side by side in forks, as many at once as there are places."""
        drafts: list[Draft] = []
        while len(drafts) < count:
            n_left = count - len(drafts)
            forks = yield from self._forks(request, beginning.sequence, n_left - 1)
            try:
                sequences = [*forks, beginning.sequence] if len(forks) == n_left - 1 else forks
                wanted = None if options.max_tokens is None else options.max_tokens * len(sequences)
                self.chats.leave_room(self.context, wanted)
                wave = [
                    self._draft(request, beginning, sequence, options, seed_offset=len(drafts) + at)
                    for at, sequence in enumerate(sequences)
                ]
                if len(wave) == 1:
                    for _ in wave[0].chunks():
                        yield Signal.STEP
                else:
                    yield from write_together(request, wave, self.chats)
                drafts += wave
            finally:
                _close_all(forks)
        return drafts

    def _draft(
        self,
        request: Request,
        beginning: Beginning,
        sequence: TokenSequence,
        options: RequestOptions,
        seed_offset: int = 0,
    ) -> Draft:
        return Draft(
            sequence,
            options,
            request,
            cached_tokens=beginning.cached_tokens,
            is_chat=beginning.is_chat,
            tools=beginning.tools,
            speculation=self.speculation(),
            echoed=beginning.echoed,
            seed_offset=seed_offset,
        )

    def _forks(self, request: Request, sequence: TokenSequence, n: int) -> Generator[Signal, None, list[TokenSequence]]:
        """Return `n` forks of a sequence, or fewer if there are not so many places, but at least one."""
        forks: list[TokenSequence] = []
        try:
            while len(forks) < n:
                try:
                    forks.append(self.chats.with_room(sequence.fork))
                except (ContextFullError, SequencesInUseError):
                    if forks:
                        break
                    forks.append((yield from self.chats.room(request, sequence.fork)))
        except BaseException:
            _close_all(forks)
            raise
        return forks

    def _from_text(self, prompt: Prompt, options: RequestOptions) -> Begin:
        encode = self._encoder(prompt)

        def begin(request: Request) -> Generator[Signal, None, Beginning]:
            ids = yield from request.elsewhere(encode, n_characters(prompt))
            if options.echo and options.logprobs:
                sequence, values, tops = yield from self._scored(request, ids, options.top_logprobs)
                entries = [
                    TokenLogprob.of(self.tokenizer, token, None if math.isnan(value) else value, top)
                    for token, value, top in zip(ids, values, tops, strict=True)
                ]
                return Beginning(sequence, echoed=(self.tokenizer.decode(ids), entries))
            sequence = yield from self._evaluated(request, ids)
            echoed: Echoed | None = (self.tokenizer.decode(ids), []) if options.echo else None
            return Beginning(sequence, max(0, len(ids) - request.n_evaluated), echoed=echoed)

        return begin

    def _from_messages(
        self, messages: Sequence[Message], tools: Sequence[ToolGiven] | None, options: RequestOptions
    ) -> Begin:
        template = self._chosen(None)
        read, descriptions = described(() if tools is None else tools)
        use = options.tools_of(read, template, self.tokenizer)

        def begin(request: Request) -> Generator[Signal, None, Beginning]:
            shown = descriptions if use is not None else []
            said = template.with_arguments(messages)
            variables = {**options.chat_template_kwargs, "continue_final_message": options.continue_final_message}
            encode = partial(template.encode, self.tokenizer, said, shown or None, **variables)
            ids = yield from request.elsewhere(encode, n_characters(said))
            sequence = yield from self._evaluated(request, ids)
            return Beginning(sequence, max(0, len(ids) - request.n_evaluated), is_chat=True, tools=use)

        return begin

    def _answer_options(self, caller: str, options: Mapping[str, Any]) -> RequestOptions:
        return self.options(caller, {"thinking_tags": self._chosen(None).thinking_tags, **options})

    def _evaluated(self, request: Request, ids: list[int]) -> Generator[Signal, None, TokenSequence]:
        """Return a new sequence with an evaluated prompt."""
        if not ids:
            raise EmptySequenceError("the prompt has no tokens, and this model does not begin texts with a BOS token")
        self.load_prompt(ids)
        sequence = yield from self.chats.room(request, self.context.sequence)
        try:
            add = partial(sequence.extend, ids, cancel=request, evaluate=False)
            yield from self.chats.room(request, add)
            yield from request.evaluate(sequence)
        except BaseException:
            sequence.close()
            raise
        return sequence

    def load_prompt(self, ids: list[int], keep: Chat | None = None) -> None:
        """Bring what the disk has of a prompt into the context. `keep` is the chat whose prompt it is."""
        if self.prompt_cache is not None:
            with suppress(ContextFullError, SequencesInUseError):
                self.chats.with_room(partial(self.prompt_cache.load, ids), keep)

    def store_prompt(self, sequence: TokenSequence) -> None:
        """Keep what a request has evaluated on disk."""
        if self.prompt_cache is not None:
            self.prompt_cache.store(sequence)

    @contextmanager
    def _lent(self, sequence: TokenSequence) -> Iterator[TokenSequence]:
        """Lend a sequence, and keep what it holds in the end."""
        with sequence:
            try:
                yield sequence
            finally:
                self.store_prompt(sequence)

    def _scored(self, request: Request, ids: list[int], n_top: int = 0) -> Generator[Signal, None, Scored]:
        """Return a new sequence, and the log-probabilities of its tokens, computed in pieces."""
        sequence = yield from self.chats.room(request, self.context.sequence)
        values: list[float] = []
        tops: list[list[tuple[int, float]]] = []
        try:
            for start in range(0, max(1, len(ids)), self.context.n_ubatch):
                piece = ids[start : start + self.context.n_ubatch]
                score = partial(sequence.top_scores, piece, n_top, cancel=request)
                scores, most_likely = yield from self.chats.room(request, score)
                values += scores.tolist()
                tops += most_likely
                yield Signal.STEP
        except BaseException:
            sequence.close()
            raise
        return sequence, values, tops

    def _logprobs_of(
        self, sequence: TokenSequence, endings: list[list[int]], request: Request
    ) -> Generator[Signal, None, list[float]]:
        """Return the log-probability of each ending of a sequence, all of them a token further with each batch."""
        logits = sequence.logits
        sums = [logprob(logits, ids[0]) for ids in endings]
        waiting = [at for at, ids in enumerate(endings) if len(ids) > 1]
        while waiting:
            made = yield from self._forks(request, sequence, len(waiting))
            forks = dict(zip(waiting, made, strict=False))
            try:
                for depth in range(max(len(endings[at]) for at in forks) - 1):
                    growing = {fork: [endings[at][depth]] for at, fork in forks.items() if depth + 1 < len(endings[at])}
                    yield from self.chats.room(request, partial(self.context.extend, growing, cancel=request))
                    for at, fork in forks.items():
                        if fork in growing:
                            sums[at] += logprob(fork.logits, endings[at][depth + 1])
                    yield Signal.STEP
            finally:
                _close_all(made)
            waiting = [at for at in waiting if at not in forks]
        return sums

    # Prompts

    def _encoder(self, prompt: Prompt | Sequence[Message], answer: str = "") -> Callable[[], list[int]]:
        """Return what encodes a prompt, and an answer after it: a long text takes a while."""
        tokenizer = self.tokenizer
        if isinstance(prompt, str):
            return lambda: tokenizer.encode(prompt + answer)
        if isinstance(prompt, bytes | Mapping) or not hasattr(prompt, "__iter__"):
            raise TypeError(f"a prompt must be a str, token ids or messages, not {what(prompt)}")
        if isinstance(prompt, list | tuple) and prompt and all(isinstance(item, Mapping) for item in prompt):
            template = self._chosen(None)
            return lambda: [*template.encode(tokenizer, prompt), *tokenizer.encode(answer, add_special=False)]
        try:
            ids: list[int] = tokenizer.as_array(prompt).tolist()  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise type(error)(f"a prompt must be a str, token ids or messages: {error}") from None
        return lambda: ids + (tokenizer.encode(answer, add_special=False) if answer else [])

    def _chosen(self, template: str | ChatTemplate | None) -> ChatTemplate:
        if isinstance(template, ChatTemplate):
            return template
        if template is not None:
            return ChatTemplate(template)
        return ChatTemplate.of(self.model) if self.template is None else self.template  # the former says what is wrong

    # The end

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._close.alive

    def close(self) -> None:
        """Stop all requests, and close the context, and the model unless it was given. Closing twice is no error."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("an LLM cannot be copied or pickled: it owns memory outside Python")

    def __repr__(self) -> str:
        return f"<LLM {self.model.path.name}: {'closed' if self.closed else f'n_ctx={self.context.n_ctx}'}>"


def _close(
    queue: RequestQueue,
    prompt_cache: PromptCache | None,
    context: Context,
    drafter: DraftModel | None,
    model: Model | None,
) -> None:
    queue.close()
    if prompt_cache is not None:
        prompt_cache.close()
    context.close()
    if drafter is not None:
        drafter.close()
    if model is not None:
        model.close()


def _progress_bar() -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _template_of(model: Model) -> ChatTemplate | None:
    """Return a model's own template; None if it has none, or one that cannot be compiled."""
    try:
        return ChatTemplate.of(model)
    except TemplateError:
        return None


def _close_all(sequences: Iterable[TokenSequence]) -> None:
    for sequence in sequences:
        sequence.close()
