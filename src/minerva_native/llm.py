"""`LLM`: what people do with a model, in one object over the engine."""

import dataclasses
import inspect
import math
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, NoReturn, Self, overload

from ._arguments import file_path, integer, many, path, what
from .calling import ToolGiven, described
from .chat import ChatTemplate, Message
from .completion import Chunk, Completion, TokenLogprob
from .context import Context
from .conversation import Chat, OpenChats, WhenFull, read_chat
from .draft import Draft, RequestOptions
from .engine.gate import CancelToken
from .errors import ContextFullError, EmptySequenceError, MinervaError, SequencesInUseError, TemplateError
from .model import Model
from .options import ContextOptions
from .prompt_cache import MAX_BYTES, PromptCache
from .requests import AsyncStream, Request, RequestQueue, Stream
from .sampling import logprob
from .sequence import Sequence as TokenSequence
from .speculative import DraftModel, Speculation
from .tokenizer import TokenIds, Tokenizer

Prompt = str | TokenIds
"""A text, which is encoded as the model expects it (with its BOS), or token ids, which are taken as they are."""

_N_SEQ = 8  # places for requests, open chats and forks; with cells in common, a place costs nothing

_MOST_ANSWERS = 128  # to one request

_OF_CONTEXT = frozenset(field.name for field in dataclasses.fields(ContextOptions))
_OF_LOADING = frozenset(inspect.signature(Model.load).parameters) - {"path"}


class Scores(NamedTuple):
    """A text's tokens, and the log-probability of each given those before it.

    Attributes:
        tokens: the ids.
        logprobs: natural logarithms; the first token has nothing before it, which is NaN.
    """

    tokens: list[int]
    logprobs: list[float]


class LLM:
    """A model, its context and its chat template, with a queue in front: text, chats and probabilities from any thread.

    Requests are served one after another in the order they came. `async` methods have the names of the others with an
    `a` before them; they never block the event loop. Whatever a request takes beside its prompt is a keyword: the
    fields of `RequestOptions` (`max_tokens`, `stop`, `logprobs`, `timeout`, `cancel`, ...) and of `SamplingParams`
    (`temperature`, `seed`, ...), whose defaults are the model's own.

    What a finished request has evaluated stays in the KV cache while there is room: a prompt that begins like an
    earlier one is evaluated from where they part. A request leaves the queue, or ends within a token, when it is
    cancelled, its iterator is closed or its time is up.

    A context manager. It closes what it has opened: the context, and the model unless that was given.

    Args:
        model: the path of a GGUF file, or a `Model`.
        template: a chat template, if not the model's own.
        on_full: what a chat does if its messages do not fit. "error" raises `ContextFullError`. "drop_turns" drops the
            oldest turns after the system prompt. A function gets the messages and returns fewer.
        n_parallel: how many requests are served at once; only 1 so far.
        cache_dir: a directory in which prompts and chats are kept, so that another process need not evaluate them
            again; True for the usual one (see `PromptFiles`). What people write is in those files, for this user alone
            to read. None, the default, writes nothing.
        cache_bytes: how large that directory may become; what was not used for longest is removed. 4 GiB by default.
        speculate: guesses tokens, to evaluate several in one pass. "lookup" guesses that the text repeats, a smaller
            `Model` of the same vocabulary writes drafts; or a function of the tokens and a number for so many guesses.
        options: those of `Model.load` and `ContextOptions`; `n_seq` is 8 by default.

    Attributes:
        model: the model.
        context: its context, for whatever this class does not do.
        tokenizer: the model's tokenizer.
        template: the chat template, or None.
        queue: the requests; `len(llm.queue)` of them wait.
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
        **options: Any,
    ):
        if cache_dir is not None and cache_dir is not True:
            cache_dir = file_path("cache_dir", cache_dir)
        cache_bytes = integer("cache_bytes", cache_bytes, 0)
        if integer("n_parallel", n_parallel, 1) > 1:
            raise MinervaError("n_parallel is 1 so far: requests are served one after another")
        if not callable(on_full) and not (isinstance(on_full, str) and on_full in ("error", "drop_turns")):
            raise ValueError(f'on_full must be "error", "drop_turns" or a function, not {on_full!r}')
        loading = {name: options.pop(name) for name in sorted(_OF_LOADING & options.keys())}
        unknown = sorted(options.keys() - _OF_CONTEXT)
        if unknown:
            raise TypeError(f"LLM() has no argument {unknown[0]!r}: see Model.load and ContextOptions")
        context_options = ContextOptions(**{"n_seq": _N_SEQ, **options})
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
            self.model = owned = Model.load(path("model", model), **loading)
        drafter = None
        try:
            self.context = Context(self.model, context_options)
            if isinstance(speculate, Model):
                speculate = drafter = DraftModel(speculate, self.context.n_ctx, n_threads=self.context.n_threads)
            self._speculate = speculate
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
        self.queue, self.chats = RequestQueue(), OpenChats()
        self._close = weakref.finalize(self, _close, self.queue, self.prompt_cache, self.context, drafter, owned)

    def options(self, caller: str, options: Mapping[str, Any]) -> RequestOptions:
        """Return the options of a call, checked; `caller` is its name, for messages."""
        parsed = RequestOptions.of(self.model, caller, options)
        if parsed.reasoning_budget is not None and parsed.thinking_tags is None:
            raise ValueError("reasoning_budget needs thinking_tags=, as no chat template names them here")
        if parsed.constraint is not None:
            parsed.constraint.prepare(self.tokenizer)
        return parsed

    def speculation(self) -> Speculation | None:
        """Return what guesses tokens of one answer, if that was asked for."""
        return None if self._speculate is None else Speculation(self._speculate)

    # Text

    def complete(self, prompt: Prompt, **options: Any) -> Completion:
        """Continue a text, and return what was made.

        Args:
            prompt: a text, or token ids.
            options: the fields of `RequestOptions` and `SamplingParams`.

        Raises:
            TypeError, ValueError: an argument is unknown or wrong.
            ContextFullError: the prompt does not fit.
            EmptySequenceError: the prompt has no tokens.
            Cancelled: the request was stopped before the first token. Later, `finish_reason` is "cancelled".
            ClosedError: the LLM is closed.
        """
        parsed = self.options("complete", options)
        return self.queue.call(self._completing(self._encoder(prompt), parsed), **parsed.limits)

    def stream(self, prompt: Prompt, **options: Any) -> Stream[Chunk]:
        """Do what `complete` does, and return an iterator over the pieces as they are made.

        The request is in the queue at once, and does not wait to be iterated. Closing the iterator stops it.
        """
        parsed = self.options("stream", options)
        return self.queue.stream(self._streaming(self._encoder(prompt), parsed), **parsed.limits)

    async def acomplete(self, prompt: Prompt, **options: Any) -> Completion:
        """Do what `complete` does, without blocking the event loop."""
        parsed = self.options("acomplete", options)
        return await self.queue.acall(self._completing(self._encoder(prompt), parsed), **parsed.limits)

    def astream(self, prompt: Prompt, **options: Any) -> AsyncStream[Chunk]:
        """Do what `stream` does, as an asynchronous iterator."""
        parsed = self.options("astream", options)
        return self.queue.astream(self._streaming(self._encoder(prompt), parsed), **parsed.limits)

    def map(self, prompts: Iterable[Prompt], **options: Any) -> list[Completion]:
        """Complete several prompts, and return the completions in the same order."""
        return [self.complete(prompt, **options) for prompt in list(many("prompts", prompts))]

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
        **options: Any,
    ) -> Completion | Stream[Chunk]:
        """Answer messages, which are kept nowhere; what was evaluated of them before is found in the KV cache.

        Args:
            messages: dicts as OpenAI's API has them.
            tools: what the model may call: functions with type hints, or descriptions (dicts) as in OpenAI's API.
            n: how many answers to make; the others are `Completion.alternatives`. With a seed each takes the next one.
            stream: return an iterator over the pieces of the one answer.
            options: see `complete`.
        """
        work, parsed = self._answering("chat_completion", messages, tools, n, options)
        if stream:
            return self.queue.stream(self._in_pieces(work, n), **parsed.limits)
        return self.queue.call(lambda request: iter([_together(work(request))]), **parsed.limits)

    async def achat_completion(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolGiven] | None = None,
        n: int = 1,
        **options: Any,
    ) -> Completion:
        """Do what `chat_completion` does, without blocking the event loop."""
        work, parsed = self._answering("achat_completion", messages, tools, n, options)
        return await self.queue.acall(lambda request: iter([_together(work(request))]), **parsed.limits)

    def achat_completion_stream(
        self, messages: Sequence[Message], tools: Sequence[ToolGiven] | None = None, **options: Any
    ) -> AsyncStream[Chunk]:
        """Do what `chat_completion` does with `stream=True`, as an asynchronous iterator."""
        work, parsed = self._answering("achat_completion_stream", messages, tools, 1, options)
        return self.queue.astream(self._in_pieces(work, 1), **parsed.limits)

    # Probabilities

    def score(self, text: Prompt, cancel: CancelToken | None = None, timeout: float | None = None) -> Scores:
        """Return the tokens of a text, and the log-probability of each given those before it."""
        encode = self._encoder(text)

        def work(request: Request) -> Iterator[Scores]:
            ids = encode()
            with self._sequence() as sequence:
                scores = self.chats.with_room(lambda: sequence.score(ids, cancel=request))
                yield Scores(ids, scores.tolist())

        return self.queue.call(work, cancel=cancel, timeout=timeout)

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

        def work(request: Request) -> Iterator[dict[str, float]]:
            candidates = [encode() for encode in encoders]
            shortest = min(map(len, candidates)) - 1  # at least one token of each has a probability
            n = next((at for at in range(shortest) if len({ids[at] for ids in candidates}) > 1), shortest)
            with self._evaluated(candidates[0][:n], request) as (sequence, _):
                logprobs = self._logprobs_of(sequence, [ids[n:] for ids in candidates], request)
            largest = max(logprobs)
            weights = [math.exp(value - largest) for value in logprobs]
            yield {text: weight / sum(weights) for text, weight in zip(texts, weights, strict=True)}

        return self.queue.call(work, cancel=cancel, timeout=timeout)

    def count_tokens(self, text: str | Sequence[Message]) -> int:
        """Return how many tokens a text is as a prompt, or messages with the beginning of an answer."""
        return len(self._encoder(text)())

    def embed(self, text: str) -> NoReturn:
        """Raise `MinervaError`: embeddings are not there yet."""
        raise MinervaError("embeddings are not there yet; LLM makes texts and probabilities")

    # On the queue's thread

    def _completing(
        self, encode: Callable[[], list[int]], options: RequestOptions
    ) -> Callable[[Request], Iterator[Completion]]:
        def work(request: Request) -> Iterator[Completion]:
            with self._draft(encode, options, request) as draft:
                yield draft.completion()

        return work

    def _streaming(
        self, encode: Callable[[], list[int]], options: RequestOptions
    ) -> Callable[[Request], Iterator[Chunk]]:
        def work(request: Request) -> Iterator[Chunk]:
            with self._draft(encode, options, request) as draft:
                yield from draft.chunks()

        return work

    def _answering(
        self,
        caller: str,
        messages: Sequence[Message],
        tools: Sequence[ToolGiven] | None,
        n: int,
        options: Mapping[str, Any],
    ) -> tuple[Callable[[Request], Iterator[Draft]], RequestOptions]:
        """Return what yields a draft of each answer, and the options."""
        template = self._chosen(None)
        parsed = self.options(caller, {"thinking_tags": template.thinking_tags, **options})
        n = integer("n", n, 1, _MOST_ANSWERS)
        read, descriptions = described(() if tools is None else tools)
        use = parsed.tools_of(read, template, self.tokenizer)

        def work(request: Request) -> Iterator[Draft]:
            shown = descriptions if use is not None else []
            said = template.with_arguments(messages)
            ids = template.encode(self.tokenizer, said, shown or None, **parsed.chat_template_kwargs)
            with self._evaluated(ids, request) as (sequence, cached):
                self.chats.leave_room(self.context, parsed.max_tokens)
                for number in range(n):
                    is_last = number == n - 1
                    answer = sequence if is_last else self.chats.with_room(sequence.fork)
                    try:
                        yield Draft(
                            answer,
                            parsed,
                            request,
                            cached_tokens=cached,
                            is_chat=True,
                            tools=use,
                            speculation=self.speculation(),
                            seed_offset=number,
                        )
                    finally:
                        if not is_last:
                            answer.close()

        return work, parsed

    def _in_pieces(self, work: Callable[[Request], Iterator[Draft]], n: int) -> Callable[[Request], Iterator[Chunk]]:
        if n != 1:
            raise ValueError(f"n must be 1 with stream=True, not {n}: make a request for each")
        return lambda request: (chunk for draft in work(request) for chunk in draft.chunks())

    @contextmanager
    def _draft(self, encode: Callable[[], list[int]], options: RequestOptions, request: Request) -> Iterator[Draft]:
        ids = encode()
        if not (options.echo and options.logprobs):
            with self._evaluated(ids, request) as (sequence, cached):
                echoed: tuple[str, list[TokenLogprob]] | None = (
                    (self.tokenizer.decode(ids), []) if options.echo else None
                )
                self.chats.leave_room(self.context, options.max_tokens)
                yield Draft(
                    sequence, options, request, cached_tokens=cached, speculation=self.speculation(), echoed=echoed
                )
            return
        with self._sequence() as sequence:
            scores = self.chats.with_room(lambda: sequence.score(ids, cancel=request)).tolist()
            entries = [
                TokenLogprob(token, self.tokenizer.piece(token, special=True), None if math.isnan(value) else value)
                for token, value in zip(ids, scores, strict=True)
            ]
            self.chats.leave_room(self.context, options.max_tokens)
            yield Draft(sequence, options, request, cached_tokens=0, echoed=(self.tokenizer.decode(ids), entries))

    @contextmanager
    def _sequence(self) -> Iterator[TokenSequence]:
        with self.chats.with_room(self.context.sequence) as sequence:
            yield sequence

    @contextmanager
    def _evaluated(self, ids: list[int], request: Request) -> Iterator[tuple[TokenSequence, int]]:
        """Lend a sequence with an evaluated prompt, and say how many of its tokens were cached."""
        if not ids:
            raise EmptySequenceError("the prompt has no tokens, and this model does not begin texts with a BOS token")
        self.load_prompt(ids)
        with self._sequence() as sequence:
            n_evaluated = self.chats.with_room(lambda: sequence.extend(ids, cancel=request))
            try:
                yield sequence, len(ids) - n_evaluated
            finally:
                self.store_prompt(sequence)

    def load_prompt(self, ids: list[int], keep: Chat | None = None) -> None:
        """Bring what the disk has of a prompt into the context. `keep` is the chat whose prompt it is."""
        if self.prompt_cache is not None:
            with suppress(ContextFullError, SequencesInUseError):
                self.chats.with_room(partial(self.prompt_cache.load, ids), keep)

    def store_prompt(self, sequence: TokenSequence) -> None:
        """Keep what a request has evaluated on disk."""
        if self.prompt_cache is not None:
            self.prompt_cache.store(sequence)

    def _logprobs_of(self, sequence: TokenSequence, endings: list[list[int]], request: Request) -> list[float]:
        """Return the log-probability of each ending of a sequence, all of them a token further with each batch."""
        logits = sequence.logits
        sums = [logprob(logits, ids[0]) for ids in endings]
        waiting = [at for at, ids in enumerate(endings) if len(ids) > 1]
        while waiting:
            forks: dict[int, TokenSequence] = {}
            try:
                for at in waiting:
                    try:
                        forks[at] = self.chats.with_room(sequence.fork)
                    except SequencesInUseError:
                        if not forks:
                            raise
                        break
                for depth in range(max(len(endings[at]) for at in forks) - 1):
                    growing = {fork: [endings[at][depth]] for at, fork in forks.items() if depth + 1 < len(endings[at])}
                    self.chats.with_room(partial(self.context.extend, growing, cancel=request))
                    for at, fork in forks.items():
                        if fork in growing:
                            sums[at] += logprob(fork.logits, endings[at][depth + 1])
            finally:
                for fork in forks.values():
                    fork.close()
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


def _template_of(model: Model) -> ChatTemplate | None:
    """Return a model's own template; None if it has none, or one that cannot be compiled."""
    try:
        return ChatTemplate.of(model)
    except TemplateError:
        return None


def _together(drafts: Iterator[Draft]) -> Completion:
    """Write drafts, one after another, and return the first with the others as its alternatives."""
    first, *others = [draft.completion() for draft in drafts]
    return dataclasses.replace(first, alternatives=tuple(others))
