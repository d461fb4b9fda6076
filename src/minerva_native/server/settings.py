"""What a server may be told."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to serve.

    Attributes:
        keys: the tokens that let a client in; none lets everybody in who can connect.
        hosts: names that a client may have used for this machine, besides localhost and addresses; None for any.
        cors_origins: origins of other pages in a browser that may use the API.
        max_body_bytes: how large the body of a request may be.
        max_head_bytes: how large its head may be.
        max_connections: how many clients may be connected.
        max_waiting: how many requests may wait for their turn.
        head_seconds: how long a client may take for the head of a request.
        body_seconds: how long it may take for the rest.
        write_seconds: how long it may leave a piece of a reply unread.
        keep_alive_seconds: how long a connection stays open without a request.
        grace_seconds: how long requests may go on once the server is told to end.
        sampling: parameters of the sampler for requests that do not give their own, over the model's.
        log_content: log the texts of answers.
    """

    keys: Sequence[str] = ()
    hosts: Sequence[str] | None = ()
    cors_origins: Sequence[str] = ()
    max_body_bytes: int = 16 << 20
    max_head_bytes: int = 32 << 10
    max_connections: int = 2048
    max_waiting: int = 1024
    head_seconds: float = 10.0
    body_seconds: float = 60.0
    write_seconds: float = 30.0
    keep_alive_seconds: float = 30.0
    grace_seconds: float = 10.0
    sampling: Mapping[str, Any] = field(default_factory=dict)
    log_content: bool = False


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model that can be served.

    Attributes:
        name: what requests call it.
        path: of its file, or the first of its files.
        size_bytes: of its files.
    """

    name: str
    path: Path
    size_bytes: int
