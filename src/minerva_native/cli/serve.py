"""Serve models over HTTP, with OpenAI's API and a page to chat."""

from __future__ import annotations

import argparse
import glob
import importlib.util
import json
import logging
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import minerva_native as mn

from .generate import FLAGS as GENERATE_FLAGS
from .messages import as_json, placed, say
from .options import (
    LAYERS,
    LLM_N_SEQ,
    add_context,
    add_json,
    add_loading,
    add_rpc,
    add_sampling,
    file_name,
    gpu_layers,
    of_batches,
    of_context,
    of_loading,
    sampling,
)

if TYPE_CHECKING:
    from minerva_native.server.guard import Access
    from minerva_native.server.settings import Settings, Source

FLAGS = {
    **GENERATE_FLAGS,
    "n_parallel": "-np",
    "cache_dir": "--cache-dir",
    "speculate": "--speculate",
    "deterministic": "--deterministic",
    "port": "--port",
}

_DEFAULT_N_CTX = 8192
_DEFAULT_N_PARALLEL = 4
_MOST_SEQUENCES = 256  # libllama's limit
_SPLIT = re.compile(r"-(\d{5})-of-\d{5}$")
_SECONDS = {"s": 1, "m": 60, "h": 3600}
_BYTES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_LIBRARIES = ("starlette", "uvicorn", "httptools", "msgspec")

_logger = logging.getLogger("minerva_native")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    model = "a GGUF file, or a folder of them; can be repeated. Several are loaded when they are asked for"
    add("-m", "--model", action="append", type=file_name, metavar="FILE", help=f"{model} (the built-in model)")
    add("-a", "--alias", metavar="NAME", help="what to call the one model (the name of its file)")
    add("-ngl", "--gpu-layers", type=gpu_layers, default="auto", metavar="N", help=LAYERS)
    add_rpc(parser)
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen; others than this machine need a key")
    add("--port", type=int, default=8080, metavar="N", help="the port; 0 for a free one (8080)")
    add("--unix-socket", type=Path, metavar="PATH", help="listen on a socket that only you can open, and need no token")
    add("--api-key-file", type=file_name, metavar="FILE", help="tokens that let clients in, one a line (one is made)")
    origin = "the origin of a page whose scripts may use the server, such as http://localhost:3000; can be repeated"
    add("--cors-origin", type=origin_of_pages, action="append", default=[], metavar="ORIGIN", help=origin)
    name = "a name by which others reach this machine; can be repeated"
    add("--allowed-host", type=host_name, action="append", default=[], metavar="NAME", help=name)
    add("-np", "--parallel", type=int, default=_DEFAULT_N_PARALLEL, metavar="N", help="requests at once (4)")
    context = f"context in tokens, for all requests at once (the model's, up to {_DEFAULT_N_CTX})"
    add("-c", "--ctx-size", type=int, metavar="N", help=f"{context}; 0 for the model's own")
    add("-b", "--batch-size", type=int, default=512, metavar="N", help="prompt tokens in one call (512)")
    add("-ub", "--ubatch-size", type=int, default=512, metavar="N", help="prompt tokens in one pass (512)")
    add("-t", "--threads", type=int, metavar="N", help="threads (default: the usable CPUs; 1 for a tiny model)")
    types = f"type of the cached keys: {', '.join(mn.KV_TYPES)} (f16)"
    add("-ctk", "--cache-type-k", default="f16", choices=mn.KV_TYPES, metavar="TYPE", help=types)
    add("-ctv", "--cache-type-v", default="f16", choices=mn.KV_TYPES, metavar="TYPE", help="and values (f16)")
    add("-fa", "--flash-attn", default="auto", choices=("on", "off", "auto"), help="flash attention (auto)")
    add("--swa-full", action="store_true", help="keep all tokens in sliding-window layers, not just the window")
    add_sampling(parser)
    add_loading(parser)
    add_context(parser)
    template = "a file with a chat template, for models whose own is missing or wrong"
    add("--chat-template-file", type=file_name, metavar="FILE", help=template)
    guess = "guess tokens and verify several in one pass: that texts repeat, or what the model's own MTP head says"
    add("--speculate", choices=("lookup", "mtp"), help=guess)
    alone = "answers depend on their request alone, to the last bit: slower, and each has its share of the context"
    add("--deterministic", action="store_true", help=alone)
    cache = "keep prompts on disk, so that they need not be evaluated again after a restart; what people write is in it"
    add("--cache-dir", type=file_name, metavar="DIR", help=cache)
    memory = "unload models used longest ago if the files of those loaded are larger together, such as 8G (3/4 of it)"
    add("--models-memory", type=n_bytes, metavar="SIZE", help=memory)
    add("--idle-unload", type=seconds, metavar="TIME", help="unload a model that was not used for so long, such as 10m")
    add("--log-json", action="store_true", help="log in JSON, one object a line")
    add("--log-content", action="store_true", help="log the texts of answers, too")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM."""
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise mn.MinervaError(f"{missing[0]} is not installed: pip install 'minerva-native[server]'")
    from minerva_native.server import run as running
    from minerva_native.server.app import create_app
    from minerva_native.server.models import Models
    from minerva_native.server.settings import Source

    log = _Log(options)
    with log.shown(), ExitStack() as stack:
        sources = list(_sources(options, Source))
        settings = _settings(options, running.is_loopback(options.host))
        if options.unix_socket is not None:
            listening = stack.enter_context(running.unix_socket(options.unix_socket))
            url = f"unix:{options.unix_socket}"
        else:
            listening = running.tcp_socket(options.host, options.port)
            shown = f"[{options.host}]" if ":" in options.host else options.host
            url = f"http://{shown}:{listening.getsockname()[1]}"
        memory = _memory_bytes() * 3 // 4 if options.models_memory is None else options.models_memory
        load = partial(_loaded, options)
        metrics = mn.Metrics()
        models = Models(sources, load, metrics, memory, options.idle_unload)
        if len(sources) == 1:
            models.adopt(sources[0].name, load(sources[0]))
        app = create_app(models, metrics, settings, log.access)

        def ready() -> None:
            token = settings.keys[0] if settings.keys and options.api_key_file is None else None
            placed = _placed(models.places[sources[0].name].llm)
            log.ready(options, url, token, [source.name for source in sources], placed)

        try:
            running.run(app, listening, settings, ready)
        finally:
            models.close_now()
    return 0


def _settings(options: argparse.Namespace, is_loopback: bool) -> Settings:
    from minerva_native.server.settings import Settings

    keys = []
    if options.api_key_file is not None:
        lines = Path(options.api_key_file).read_text(encoding="utf-8").splitlines()
        keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not keys:
            raise ValueError(f"{options.api_key_file} has no key")
    elif options.unix_socket is None and not is_loopback:
        raise ValueError(f"--host {options.host} lets other machines in: give their keys with --api-key-file")
    elif options.unix_socket is None:
        keys = [secrets.token_urlsafe(24)]
    given = sampling(options)
    mn.SamplingParams(**given)  # which says what is wrong before anything is loaded
    hosts = None if options.unix_socket is not None else [options.host, *options.allowed_host]
    return Settings(
        keys=keys, hosts=hosts, cors_origins=options.cors_origin, sampling=given, log_content=options.log_content
    )


def _sources(options: argparse.Namespace, kind: type[Source]) -> Iterator[Source]:
    """Yield the models that the options name, each of another name."""
    paths: list[Path] = []
    for name in options.model or ():
        path = Path(name)
        if not path.is_dir():
            paths.append(path)
            continue
        found = sorted(file for file in path.glob("*.gguf") if _is_model(file))
        if not found:
            raise ValueError(f"there is no model in the folder {name}")
        paths += found
    if options.alias is not None and len(paths) > 1:
        raise ValueError("--alias is for one model, and there are several")
    names: set[str] = set()
    for file in paths or [mn.DEMO_PATH]:
        stem = _SPLIT.sub("", file.stem) if options.alias is None else options.alias
        unique = next(name for name in (stem, *(f"{stem}-{at}" for at in range(2, 1000))) if name not in names)
        names.add(unique)
        parts = [file]
        if _SPLIT.search(file.stem):
            parts = list(file.parent.glob(f"{glob.escape(_SPLIT.sub('', file.stem))}-*-of-*.gguf"))
        yield kind(name=unique, path=file, size_bytes=sum(part.stat().st_size for part in parts))


def _is_model(file: Path) -> bool:
    """Say whether a file is a model, or its first part, and not what goes with one."""
    part = _SPLIT.search(file.stem)
    return not file.name.startswith("mmproj") and (part is None or int(part[1]) == 1)


def _loaded(options: argparse.Namespace, source: Source) -> mn.LLM:
    """Load a model."""
    from .progress import loading

    how = {**of_batches(options), **of_context(options), "mtp": options.speculate == "mtp"}
    planned = mn.ContextOptions(
        n_ctx=_DEFAULT_N_CTX if options.ctx_size is None else options.ctx_size,
        # Not more: while all are taken, each token is compared with the cells that finished requests have left.
        n_seq=min(max(options.parallel, LLM_N_SEQ), _MOST_SEQUENCES),
        **how,
    )
    template = options.chat_template_file and Path(options.chat_template_file).read_text(encoding="utf-8")
    with loading(options.quiet) as on_progress:
        model = mn.Model.load(
            source.path,
            gpu_layers=options.gpu_layers,
            context=planned,
            on_progress=on_progress,
            load_mtp=options.speculate == "mtp",
            **of_loading(options),
        )
    try:
        n_ctx = min(_DEFAULT_N_CTX, model.n_ctx_train) if options.ctx_size is None else options.ctx_size
        return mn.LLM(
            model,
            template=template,
            n_parallel=options.parallel,
            cache_dir=options.cache_dir,
            speculate=options.speculate,
            deterministic=options.deterministic,
            n_ctx=n_ctx or model.n_ctx_train,
            n_seq=planned.n_seq,
            **how,
        )
    except BaseException:
        model.close()
        raise


def _placed(llm: mn.LLM | None) -> str | None:
    """Say where a model is computed; None for one that is not loaded."""
    return None if llm is None else placed(llm.context) or "on the CPU"


class _Log:
    """What people, or programs, read on stderr while the server runs."""

    def __init__(self, options: argparse.Namespace):
        self._is_json, self._is_quiet, self._is_verbose = options.log_json, options.quiet, options.verbose

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the log of the package line by line, as it comes."""
        before, handlers = _logger.level, list(_logger.handlers)
        for handler in handlers:
            _logger.removeHandler(handler)
        mine = _Lines(self)
        _logger.addHandler(mine)
        _logger.setLevel(logging.DEBUG if self._is_verbose else logging.ERROR if self._is_quiet else logging.INFO)
        try:
            yield
        finally:
            _logger.removeHandler(mine)
            _logger.setLevel(before)
            for handler in handlers:
                _logger.addHandler(handler)

    def line(self, kind: str, sentence: str, **facts: Any) -> None:
        """Show a line."""
        if self._is_json:
            print(json.dumps({"time": time.time(), "kind": kind, "message": sentence, **facts}), file=sys.stderr)
            sys.stderr.flush()
        else:
            say(kind, sentence)

    def ready(
        self, options: argparse.Namespace, url: str, token: str | None, models: list[str], placed: str | None
    ) -> None:
        """Say where the server listens, and what lets clients in."""
        page = None if url.startswith("unix:") else url if token is None else f"{url}/#token={token}"
        if options.json:
            facts = {
                "url": url,
                "token": token,
                "page": page,
                "models": models,
                "placement": placed,
                "pid": os.getpid(),
            }
            print(as_json(facts), flush=True)
            if options.quiet:
                return
        where = f", {placed}" if placed else ""
        self.line("serving", f"{url} has {', '.join(models)}{where}, {options.parallel} requests at once")
        if token is not None and not options.json:
            self.line("token", token)
        if page is not None and not options.json:
            self.line("page", page)

    def access(self, access: Access) -> None:
        """Show a request that is answered."""
        if self._is_quiet:
            return
        route = access.route or ("(no endpoint)" if access.status == 404 else "(refused)")
        if self._is_json:
            facts = {"method": access.method, "route": route, "status": access.status, "seconds": access.seconds}
            self.line("request", "", **facts, **access.facts)
            return
        counts = ""
        if "completion_tokens" in access.facts:
            facts = access.facts
            cached = f" ({facts['cached_tokens']} cached)" if facts["cached_tokens"] else ""
            counts = f", {facts['prompt_tokens']}{cached} + {facts['completion_tokens']} tokens"
        text = f": {access.facts['text']}" if "text" in access.facts else ""
        self.line("request", f"{access.method} {route} {access.status}, {access.seconds:.2f} s{counts}{text}")


class _Lines(logging.Handler):
    """The log of the package as lines: warnings, and what the server does; all of it with `-v`."""

    def __init__(self, log: _Log):
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Show a line."""
        is_own = record.name.startswith("minerva_native.server")
        if record.levelno >= logging.WARNING or is_own or _logger.level == logging.DEBUG:
            line = record.getMessage().strip()
            if re.search(r"\w", line):
                self._log.line("note" if record.levelno == logging.INFO else record.levelname.lower(), line)


def seconds(text: str) -> float:
    """Parse a time such as 90, 90s, 10m or 1h."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time, such as 10m")
    return float(found[1]) * _SECONDS[found[2] or "s"]


def origin_of_pages(text: str) -> str:
    """Refuse what no browser sends as an origin."""
    if text != "null" and re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#\s]+", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no origin, such as http://localhost:3000, without a path")
    return text


def host_name(text: str) -> str:
    """Refuse an address of a page, or a port, which no name in a Host header equals."""
    if not text or re.search(r"[:/\s]", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a host, such as box.example, without a port")
    return text


def n_bytes(text: str) -> int:
    """Parse a size such as 500M or 8G."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", text.upper())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size, such as 8G")
    return int(float(found[1]) * _BYTES[found[2]])


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
