"""The endpoints."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from functools import partial
from importlib.resources import files
from typing import Any, Protocol, TypeAlias

from starlette.routing import Route, Router

import minerva_native as mn

from . import replies
from .bodies import (
    FIELDS,
    MOST_IDS,
    B,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    Generation,
    NativeBody,
    ResponseBody,
    TemplateBody,
    TokenizeBody,
    checked_messages,
    continues,
    is_text,
    of_chat,
    of_completion,
    of_native,
    prompts_of,
    strings,
)
from .errors import HTTPError, names_argument, of_arguments, of_engine, wrong
from .exchange import Endpoint, Exchange, Handler, as_json
from .guard import Access, App, Guard, Receive, Scope, Send
from .long_texts import LongTexts
from .models import Models
from .native import NativeWriter, native_prompts, settings_of
from .openapi import document
from .responses import ResponseEvents, chat_body, own_names, response_of
from .settings import Settings


class Chunks(Protocol):
    """A stream of chunks that can be closed."""

    def __aiter__(self) -> AsyncIterator[mn.Chunk]:
        """Return an iterator over them."""

    async def aclose(self) -> None:
        """Stop the request."""


Merged: TypeAlias = AsyncGenerator[tuple[int, mn.Chunk], None]
"""The chunks of several streams, with the index of each."""

_logger = logging.getLogger("minerva_native.server")

_SHORT = 10_000  # characters of texts that are encoded on the event loop

_LONG = 1 << 16  # characters or tokens that others need not wait for
_LONG_GRAMMAR = 1 << 12  # characters: as many as can take a tenth of a second

_LONGEST_TOKEN = 128  # characters: so many spaces are one token in some vocabularies

_MOST_BIASES = 64  # that are read on the event loop

_SEEDS = 1 << 64  # after the last one comes the first

_MOST_ANSWERS = 128  # to all prompts of a request

_PAGE = {
    "/": ("index.html", b"text/html; charset=utf-8"),
    "/page.js": ("page.js", b"text/javascript; charset=utf-8"),
    "/page.css": ("page.css", b"text/css; charset=utf-8"),
    "/favicon.svg": ("favicon.svg", b"image/svg+xml"),
}

_POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def create_app(models: Models, metrics: mn.Metrics, settings: Settings, on_access: Callable[[Access], None]) -> App:
    """Return the ASGI application.

    Args:
        models: what is served.
        metrics: what they do.
        settings: how.
        on_access: called with each request once it is answered.
    """
    api = Api(models, metrics, settings)
    endpoints: list[tuple[str, str, Handler]] = [
        *(("GET", path, _page(*file)) for path, file in _PAGE.items()),
        ("GET", "/health", api.health),
        ("GET", "/v1/health", api.health),
        ("GET", "/openapi.json", api.openapi),
        ("GET", "/metrics", api.metrics),
        ("GET", "/props", api.props),
        ("GET", "/v1/models", api.list_models),
        ("GET", "/models", api.list_models),
        ("GET", "/v1/models/{name}", api.show_model),
        ("POST", "/v1/chat/completions", api.chat_completions),
        ("POST", "/chat/completions", api.chat_completions),
        ("POST", "/v1/completions", api.completions),
        ("POST", "/completions", api.completions),
        ("POST", "/completion", api.native),
        ("POST", "/v1/responses", api.responses),
        ("POST", "/responses", api.responses),
        ("POST", "/v1/chat/completions/input_tokens", api.count_chat),
        ("POST", "/chat/completions/input_tokens", api.count_chat),
        ("POST", "/v1/responses/input_tokens", api.count_response),
        ("POST", "/responses/input_tokens", api.count_response),
        ("POST", "/v1/embeddings", api.embeddings),
        ("POST", "/embeddings", api.embeddings),
        ("POST", "/tokenize", api.tokenize),
        ("POST", "/detokenize", api.detokenize),
        ("POST", "/apply-template", api.apply_template),
    ]

    @asynccontextmanager
    async def lifespan(app: object) -> AsyncIterator[None]:
        unloading = asyncio.create_task(models.unload_idle())
        try:
            yield
        finally:
            unloading.cancel()
            api.close()
            await models.close()

    routes = [Route(path, Endpoint(method, path, handler)) for method, path, handler in endpoints]
    router = Router(routes, redirect_slashes=False, default=_not_found, lifespan=lifespan)
    return Guard(router, settings, on_access)


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
        raise HTTPError(404, "there is no such endpoint", code="not_found")


def _page(name: str, kind: bytes) -> Handler:
    """Return the endpoint of a file of the page."""
    headers = [(b"content-type", kind), (b"cache-control", b"no-cache"), (b"content-security-policy", _POLICY)]

    async def answer(exchange: Exchange) -> None:
        await exchange.reply(200, (files(__package__) / "page" / name).read_bytes(), headers)

    return answer


class Api:
    """The API over the models that are served."""

    def __init__(self, models: Models, metrics: mn.Metrics, settings: Settings):
        self._models, self._metrics, self._settings = models, metrics, settings
        self._long_texts, self._grammars = LongTexts(_LONG), LongTexts(_LONG_GRAMMAR)

    def close(self) -> None:
        """Leave what takes long."""
        self._long_texts.close()
        self._grammars.close()

    # What there is

    async def health(self, exchange: Exchange) -> None:
        """Say that the server is there."""
        await exchange.json({"status": "ok"})

    async def openapi(self, exchange: Exchange) -> None:
        """Describe the API."""
        await exchange.json(document())

    async def metrics(self, exchange: Exchange) -> None:
        """Say what was done, for Prometheus."""
        kind = mn.Metrics.CONTENT_TYPE.encode()
        await exchange.reply(200, self._metrics.prometheus().encode(), [(b"content-type", kind)])

    async def list_models(self, exchange: Exchange) -> None:
        """List the models."""
        await exchange.json({"object": "list", "data": [self._described(name) for name in self._models.places]})

    async def show_model(self, exchange: Exchange) -> None:
        """Describe a model."""
        name = exchange.in_path("name")
        if name not in self._models.places:
            raise HTTPError(404, f"there is no model {name[:200]!r}", "model", "model_not_found")
        await exchange.json(self._described(name))

    def _described(self, name: str) -> dict[str, Any]:
        place = self._models.places[name]
        described: dict[str, Any] = {"id": name, "object": "model", "created": 0, "owned_by": "minerva"}
        described["status"] = "unloaded" if place.llm is None else "loaded"
        described["meta"] = {"size": place.source.size_bytes}
        if place.llm is not None:
            model = place.llm.model
            described["meta"] |= {
                "n_vocab": model.tokenizer.n_vocab,
                "n_ctx_train": model.n_ctx_train,
                "n_ctx": place.llm.context.n_ctx,
                "n_embd": model.n_embd,
                "n_params": model.n_params,
            }
        return described

    async def props(self, exchange: Exchange) -> None:
        """Say what a model is like; the names are llama-server's."""
        async with self._models.lend(exchange.query("model")) as (name, llm):
            tokenizer = llm.tokenizer
            params = mn.SamplingParams.from_model(llm.model, **self._settings.sampling)
            facts = {
                "model_alias": name,
                "model_path": llm.model.path.name,
                "total_slots": llm.n_parallel,
                "default_generation_settings": {"n_ctx": llm.context.n_ctx, "params": replies.params_of(params)},
                "chat_template": None if llm.template is None else llm.template.text,
                "bos_token": _piece(tokenizer, tokenizer.bos),
                "eos_token": _piece(tokenizer, tokenizer.eos),
                "modalities": {"vision": False, "audio": False},
                "build_info": f"minerva-native {mn.__version__}",
            }
        await exchange.json(facts)

    # Text

    async def chat_completions(self, exchange: Exchange) -> None:
        """Answer messages."""
        body, sampling = await self._read(exchange, ChatBody)
        messages = checked_messages(body.messages)
        async with self._lent(exchange, body.model) as (name, llm):
            _checked_size(llm, messages)
            given = await self._keywords(exchange, llm, body, lambda: of_chat(body, sampling, llm))
            n = body.n or 1
            if not body.stream:
                with _told():
                    completion = await exchange.wait(llm.achat_completion(messages, body.tools, n, **given))
                await self._whole(exchange, name, [completion])
                return

            def begin(index: int) -> Chunks:
                return llm.achat_completion_stream(messages, body.tools, **_seeded(given, index))

            await self._pieces(exchange, body, name, llm, begin, 1, is_chat=True)

    async def completions(self, exchange: Exchange) -> None:
        """Continue texts."""
        body, sampling = await self._read(exchange, CompletionBody)
        texts, n = prompts_of(body), body.n or 1
        if body.best_of is not None and body.best_of < n:
            raise HTTPError(400, f"best_of: it is less than n={n}", "best_of")
        if len(texts) * max(n, body.best_of or 1) > _MOST_ANSWERS:
            raise HTTPError(400, f"prompt: there would be more than {_MOST_ANSWERS} answers", "prompt")
        async with self._lent(exchange, body.model, "prompt") as (name, llm):
            prompts = await self._encoded(exchange, llm, texts)
            given = await self._keywords(exchange, llm, body, lambda: of_completion(body, sampling, llm.model))
            if not body.stream:
                with _told():
                    works = [llm.acomplete(prompt, n, body.best_of, **given) for prompt in prompts]
                    completions = await exchange.wait(_all(works))
                await self._whole(exchange, name, completions)
                return
            if body.best_of is not None and body.best_of > n:
                raise HTTPError(400, "best_of: it cannot be streamed", "best_of")

            def begin(index: int) -> Chunks:
                return llm.astream(prompts[index // n], **_seeded(given, index % n))

            await self._pieces(exchange, body, name, llm, begin, len(prompts), is_chat=False)

    async def native(self, exchange: Exchange) -> None:
        """Continue texts, in llama-server's shape."""
        body, sampling = await self._read(exchange, NativeBody)
        if body.n is not None and body.n > 1:
            raise wrong("n", "it must be 1 here: give the prompt several times")
        async with self._lent(exchange, body.model, "prompt") as (name, llm):
            prompts = await self._encoded(exchange, llm, native_prompts(body, llm.tokenizer))
            given = await self._keywords(exchange, llm, body, lambda: of_native(body, sampling, llm.model))
            settings = settings_of(body, llm.options("request", given).sampling, given)
            writers = [NativeWriter(body, name, at, llm.tokenizer, settings) for at in range(len(prompts))]
            if not body.stream:
                with _told():
                    completions = await exchange.wait(_all([llm.acomplete(prompt, **given) for prompt in prompts]))
                _note(exchange.access, replies.added([replies.usage_of([one.usage]) for one in completions]))
                self._note_texts(exchange.access, completions)
                pairs = zip(writers, prompts, completions, strict=True)
                whole = [writer.whole(prompt, completion) for writer, prompt, completion in pairs]
                await exchange.json(whole if isinstance(body.prompt, list) and len(whole) > 1 else whole[0])
                return
            streams = _begun(lambda index: llm.astream(prompts[index], **given), len(prompts))

            async def events() -> AsyncIterator[bytes]:
                usages = []
                async with aclosing(self._chunks(exchange.access, streams)) as chunks:
                    async for index, chunk in chunks:
                        if piece := writers[index].of(chunk):
                            yield piece
                        usages += [] if chunk.usage is None else [replies.usage_of([chunk.usage])]
                _note(exchange.access, replies.added(usages))
                yield replies.DONE

            await _streamed(exchange, events(), streams)

    async def _read(self, exchange: Exchange, kind: type[B]) -> tuple[B, dict[str, Any]]:
        """Return a body, and what it asks of the sampler, over the server's own defaults."""
        body, sampling = await exchange.read(kind)
        return body, {**self._settings.sampling, **sampling}

    @asynccontextmanager
    async def _lent(
        self, exchange: Exchange, model: str | None, prompt: str = "messages"
    ) -> AsyncIterator[tuple[str, mn.LLM]]:
        """Lend a model to a request that generates; `prompt` is its field that has the prompt."""
        try:
            async with self._models.lend(model) as (name, llm):
                exchange.access.facts["model"] = name
                if len(llm.queue) >= self._settings.max_waiting:
                    raise HTTPError(503, "too many requests wait", code="busy", headers={"retry-after": "1"})
                try:
                    yield name, llm
                except mn.BrokenContextError:
                    await self._models.drop(name, llm)
                    raise
        except mn.MinervaError as error:
            failed = of_engine(error, prompt)
            if failed.status >= 500:
                _logger.error("%s", error)
            raise failed from error

    async def _whole(self, exchange: Exchange, name: str, completions: Sequence[mn.Completion]) -> None:
        reply = replies.whole(completions, name)
        _note(exchange.access, reply["usage"])
        self._note_texts(exchange.access, completions)
        await exchange.json(reply)

    def _note_texts(self, access: Access, completions: Sequence[mn.Completion]) -> None:
        if self._settings.log_content:
            access.facts["text"] = [choice.text for one in completions for choice in one.choices]

    def _chunks(self, access: Access, streams: Sequence[Chunks]) -> Merged:
        """Return what several streams yield, with their indices."""
        chunks = _merged(streams)
        return _noted(access, chunks, len(streams)) if self._settings.log_content else chunks

    async def _pieces(
        self,
        exchange: Exchange,
        body: Generation,
        name: str,
        llm: mn.LLM,
        begin: Callable[[int], Chunks],
        n_prompts: int,
        is_chat: bool,
    ) -> None:
        """Stream the answers to all prompts side by side; `begin` makes the stream of one."""
        n = body.n or 1
        count = n * n_prompts
        identity = replies.new_id("chatcmpl" if is_chat else "cmpl")
        has_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        answers = [replies.Pieces(identity, name, index, llm.tokenizer, is_chat) for index in range(count)]
        streams = _begun(begin, count)

        async def events() -> AsyncIterator[bytes]:
            last: dict[int, mn.Chunk] = {}
            begun: set[int] = set()
            async with aclosing(self._chunks(exchange.access, streams)) as chunks:
                async for index, chunk in chunks:
                    piece = b"" if index in begun else answers[index].begin()
                    begun.add(index)
                    if chunk.finish_reason is not None:
                        last[index] = chunk
                    if piece := piece + answers[index].of(chunk):
                        yield piece
            usages = [last[index].usage or mn.Usage() for index in range(count)]
            usage = replies.added([replies.usage_of(usages[at : at + n]) for at in range(0, count, n)])
            _note(exchange.access, usage)
            if has_usage:
                yield answers[0].end(usage, replies.timings_of(usages[0], last[0].timings or mn.Timings()))
            yield replies.DONE

        await _streamed(exchange, events(), streams)

    async def responses(self, exchange: Exchange) -> None:
        """Answer the items of a conversation, in the shape of OpenAI's newer API."""
        body, sampling = await self._read(exchange, ResponseBody)
        with own_names():
            await self._respond(exchange, body, sampling)

    async def _respond(self, exchange: Exchange, body: ResponseBody, sampling: dict[str, Any]) -> None:
        chat = chat_body(body)
        messages = checked_messages(chat.messages)
        async with self._lent(exchange, body.model) as (name, llm):
            _checked_size(llm, messages)
            given = await self._keywords(exchange, llm, chat, lambda: of_chat(chat, sampling, llm))
            if not body.stream:
                with _told():
                    completion = await exchange.wait(llm.achat_completion(messages, chat.tools, **given))
                _note(exchange.access, replies.usage_of([completion.usage]))
                self._note_texts(exchange.access, [completion])
                await exchange.json(response_of(body, name, completion, sampling))
                return
            streams = _begun(lambda _: llm.achat_completion_stream(messages, chat.tools, **given), 1)
            writer = ResponseEvents(body, name, sampling)

            async def events() -> AsyncIterator[bytes]:
                async with aclosing(self._chunks(exchange.access, streams)) as chunks:
                    async for _, chunk in chunks:
                        if piece := writer.of(chunk):
                            yield piece
                        if chunk.usage is not None:
                            _note(exchange.access, replies.usage_of([chunk.usage]))

            await _streamed(exchange, events(), streams)

    async def count_chat(self, exchange: Exchange) -> None:
        """Count the tokens of messages."""
        body, sampling = await self._read(exchange, ChatBody)
        await self._count(exchange, body, sampling)

    async def count_response(self, exchange: Exchange) -> None:
        """Count the tokens of the items of a conversation."""
        with own_names():
            body, sampling = await self._read(exchange, ResponseBody)
            await self._count(exchange, chat_body(body), sampling)

    async def _count(self, exchange: Exchange, body: ChatBody, sampling: dict[str, Any]) -> None:
        messages = checked_messages(body.messages)
        async with self._lent(exchange, body.model) as (_, llm):
            size = _checked_size(llm, messages)
            given = await self._keywords(exchange, llm, body, lambda: of_chat(body, sampling, llm))
            template, tools = _template(llm), None if body.tool_choice == "none" else body.tools
            variables = {**given.get("chat_template_kwargs", {}), "continue_final_message": continues(body)}
            said = template.with_arguments(messages)
            encode = partial(template.encode, llm.tokenizer, said, tools, **variables)
            with _told():
                count = len(await exchange.wait(self._long_texts.run(size, encode)))
        await exchange.json({"object": "response.input_tokens", "input_tokens": count})

    async def embeddings(self, exchange: Exchange) -> None:
        """Say that embeddings are not there yet."""
        once = {"x-should-retry": "false"}  # which OpenAI's clients heed: they try most errors of a server again
        raise HTTPError(501, "embeddings are not there yet", code="not_supported", headers=once)

    async def _keywords(
        self, exchange: Exchange, llm: mn.LLM, body: Generation, make: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Return the keywords of a request, checked; what takes long is done in a thread.

        Raises:
            HTTPError: one of them is wrong.
        """
        chat = body if isinstance(body, ChatBody) else None
        form = None if chat is None or is_text(chat.response_format) else chat.response_format
        shapes = [given for given in (body.grammar, body.json_schema, form) if given is not None]
        tools = [] if chat is None or chat.tools is None else chat.tools

        def checked() -> dict[str, Any]:
            given = make()
            tags = llm.template.thinking_tags if chat is not None and llm.template is not None else None
            options = llm.options("request", {"thinking_tags": tags, **given})
            llm.compile(options, tools)
            if options.constraint is not None:
                given["constraint"] = options.constraint
                given.pop("response_format", None)
            return given

        try:
            if not shapes and not tools and len(body.logit_bias or ()) <= _MOST_BIASES:
                return checked()
            size = len(as_json([shapes, tools, body.logit_bias]))
            return await exchange.wait(self._grammars.run(size, checked))
        except mn.ConstraintError as error:
            if not shapes:
                raise of_arguments(error, FIELDS) from None
            name = "grammar" if body.grammar is not None else "json_schema" if form is None else "response_format"
            raise HTTPError(400, f"{name}: {error}", name) from None
        except (mn.ClosedError, mn.BrokenContextError, mn.TemplateError):
            raise
        except (TypeError, ValueError, mn.MinervaError) as error:
            raise of_arguments(error, FIELDS) from None

    # Tokens

    async def _encoded(self, exchange: Exchange, llm: mn.LLM, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        """Return prompts as ids, which are checked; long ones are encoded in a thread.

        Names of control tokens are those tokens, as with other servers: whoever sends a raw prompt has applied a
        template.
        """
        tokenizer = llm.tokenizer

        def encode() -> list[list[int]]:
            return [
                tokenizer.encode(one, parse_special=True) if isinstance(one, str) else tokenizer.as_array(one).tolist()
                for one in prompts
            ]

        size = _checked_size(llm, prompts)
        try:
            return encode() if size <= _SHORT else await exchange.wait(self._long_texts.run(size, encode))
        except (TypeError, ValueError) as error:
            raise wrong("prompt", str(error)) from None

    async def tokenize(self, exchange: Exchange) -> None:
        """Encode a text."""
        body, _ = await exchange.read(TokenizeBody)
        async with self._lent(exchange, body.model, "content") as (_, llm):
            tokenizer, ending = llm.tokenizer, self._long_texts.ending

            def work() -> bytes:
                ids = tokenizer.encode(body.content, body.add_special, body.parse_special, cancel=ending)
                if not body.with_pieces:
                    return as_json({"tokens": ids})
                if len(ids) > MOST_IDS:
                    raise HTTPError(400, f"with_pieces: the text has more than {MOST_IDS:,} tokens", "with_pieces")
                tokens = {token: {"id": token, "piece": _shown(tokenizer.piece(token, True))} for token in set(ids)}
                return as_json({"tokens": [tokens[token] for token in ids]})

            reply = await exchange.wait(self._long_texts.run(len(body.content), work))
        await exchange.encoded(reply)

    async def detokenize(self, exchange: Exchange) -> None:
        """Decode tokens."""
        body, _ = await exchange.read(DetokenizeBody)
        async with self._lent(exchange, body.model, "tokens") as (_, llm):

            def work() -> bytes:
                for token in body.tokens:
                    if not 0 <= token < llm.tokenizer.n_vocab:
                        raise HTTPError(400, f"tokens: there is no token {token}", "tokens")
                return as_json({"content": llm.tokenizer.decode(body.tokens, special=True)})

            reply = await exchange.wait(self._long_texts.run(len(body.tokens), work))
        await exchange.encoded(reply)

    async def apply_template(self, exchange: Exchange) -> None:
        """Show the prompt that messages are."""
        body, _ = await exchange.read(TemplateBody)
        messages = checked_messages(body.messages)
        async with self._lent(exchange, body.model) as (_, llm):
            template, kwargs, size = _template(llm), body.chat_template_kwargs or {}, _checked_size(llm, messages)

            def render() -> str:
                said = template.with_arguments(messages)
                begins = body.add_generation_prompt is not False
                return template.render(said, body.tools, begins, continues(body), **kwargs)

            with _told():
                text = await exchange.wait(self._long_texts.run(size, render))
            await exchange.json({"prompt": text})


def _checked_size(llm: mn.LLM, texts: Sequence[Any]) -> int:
    """Return how many characters messages, or prompts, have.

    What cannot fit is refused before it is encoded, which takes long and keeps a place.

    Raises:
        ContextFullError: even of the longest tokens that vocabularies have there would be too many.
    """
    n_ctx = llm.context.n_ctx
    if any(isinstance(text, list) and len(text) > n_ctx for text in texts):
        raise mn.ContextFullError(f"the prompt has more tokens than the context of {n_ctx:,}")
    sizes = [sum(map(len, strings(text))) for text in texts if not isinstance(text, list)]
    size = sum(sizes)
    longest = size if texts and isinstance(texts[0], dict) else max(sizes, default=0)
    if longest > n_ctx * _LONGEST_TOKEN:
        raise mn.ContextFullError(f"{longest:,} characters are too many for a context of {n_ctx:,} tokens")
    return size


def _template(llm: mn.LLM) -> mn.ChatTemplate:
    if llm.template is None:
        raise HTTPError(400, "the model has no chat template", "messages")
    return llm.template


@contextmanager
def _told() -> Iterator[None]:
    """Tell the client what is wrong with its request, if that is what an error is about.

    Here the request is served already: an error that does not name one of its fields is a fault of ours.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        if isinstance(error, mn.MinervaError) or not names_argument(error, FIELDS):
            raise
        raise of_arguments(error, FIELDS) from None


async def _all(works: Sequence[Coroutine[Any, Any, mn.Completion]]) -> list[mn.Completion]:
    """Return what several requests return; the first error stops the others."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def _begun(begin: Callable[[int], Chunks], count: int) -> list[Chunks]:
    """Begin several streams at once; raise what is wrong with the request."""
    try:
        return [begin(index) for index in range(count)]
    except (TypeError, ValueError, mn.ConstraintError) as error:
        raise of_arguments(error, FIELDS) from None


async def _merged(streams: Sequence[Chunks]) -> Merged:
    """Yield what several streams do, with their indices, as it comes."""
    if len(streams) == 1:
        with _told():
            async for chunk in streams[0]:
                yield 0, chunk
        return
    arrived: asyncio.Queue[tuple[int, mn.Chunk | None]] = asyncio.Queue()  # None: it has ended

    async def pass_on(index: int) -> None:
        try:
            async for chunk in streams[index]:
                arrived.put_nowait((index, chunk))
        finally:
            arrived.put_nowait((index, None))

    tasks = [asyncio.ensure_future(pass_on(index)) for index in range(len(streams))]
    try:
        waiting = len(streams)
        while waiting:
            index, piece = await arrived.get()
            if piece is not None:
                yield index, piece
                continue
            waiting -= 1
            with _told():
                await tasks[index]  # which raises what has ended it
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)  # several may have failed, and one is told


async def _noted(access: Access, merged: Merged, count: int) -> Merged:
    """Yield chunks, and note the texts that they make, also if the client goes before their end."""
    texts = access.facts["text"] = [""] * count
    async with aclosing(merged) as chunks:
        async for index, chunk in chunks:
            texts[index] += chunk.text
            yield index, chunk


async def _streamed(exchange: Exchange, events: AsyncIterator[bytes], streams: Sequence[Chunks]) -> None:
    """Send the events that are made of streams, and stop these if the client goes."""
    try:
        await exchange.stream(events)
    finally:
        for stream in streams:
            await stream.aclose()


def _seeded(given: dict[str, Any], index: int) -> dict[str, Any]:
    """Return the keywords of one of several answers: with a seed each takes the next one."""
    seed: int | None = given.get("seed")
    return given if not index or seed is None or seed < 0 else {**given, "seed": (seed + index) % _SEEDS}


def _note(access: Access, usage: dict[str, Any]) -> None:
    access.facts["prompt_tokens"] = usage["prompt_tokens"]
    access.facts["cached_tokens"] = usage["prompt_tokens_details"]["cached_tokens"]
    access.facts["completion_tokens"] = usage["completion_tokens"]


def _piece(tokenizer: mn.Tokenizer, token: int | None) -> str:
    return "" if token is None else tokenizer.piece(token, special=True).decode(errors="replace")


def _shown(piece: bytes) -> str | list[int]:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)
