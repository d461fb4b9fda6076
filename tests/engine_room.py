"""The engine inside a context, for tests of what no user can reach."""

from typing import Any
from unittest import mock

import minerva_native as mn
from minerva_native.engine.cache import KVCache


def open_up(model: mn.Model, **options: Any) -> tuple[mn.Context, KVCache]:
    """Make a context, and give the cache inside it, too."""
    made: list[KVCache] = []

    def make(*arguments: Any) -> KVCache:
        made.append(KVCache(*arguments))
        return made[-1]

    with mock.patch("minerva_native.context.KVCache", make):
        context = model.context(**options)
    return context, made[0]
