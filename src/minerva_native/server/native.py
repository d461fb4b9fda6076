"""llama-server's own `/completion`, in terms of the engine."""

from collections.abc import Mapping
from typing import Any

import minerva_native as mn

from .bodies import MOST_PROMPTS, NativeBody
from .errors import wrong
from .replies import event, params_of, timings_of

_STOP_TYPES = {"end": "eos", "stop": "word", "length": "limit", "cancelled": "none"}


def native_prompts(body: NativeBody, tokenizer: mn.Tokenizer) -> list[str | list[int]]:
    """Return the prompts. A list with a token id in it is one prompt, whose texts are encoded.

    Raises:
        HTTPError: they are something else.
    """
    given = body.prompt
    if not isinstance(given, list):
        return [_text(given)]
    if not any(isinstance(item, int) for item in given):
        if len(given) > MOST_PROMPTS:
            raise wrong("prompt", f"it has more than {MOST_PROMPTS} prompts")
        return [item if isinstance(item, list) else _text(item) for item in given]
    ids: list[int] = []
    for item in given:
        if isinstance(item, list):
            raise wrong("prompt", "it has token ids and lists of them")
        ids += (
            [item] if isinstance(item, int) else tokenizer.encode(_text(item), add_special=not ids, parse_special=True)
        )
    return [ids]


def _text(given: Any) -> str:
    text = given.get("prompt_string") if isinstance(given, dict) else given
    if not isinstance(text, str) or (isinstance(given, dict) and given.get("multimodal_data")):
        raise wrong("prompt", "it must be a text, token ids, or a list of those")
    return text


def settings_of(body: NativeBody, params: mn.SamplingParams, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return `generation_settings`; `given` are the keywords of the request."""
    limit = -1 if given["max_tokens"] is None else given["max_tokens"]
    biases = given.get("logit_bias", {})
    return params_of(params) | {
        "logit_bias": [{"token": token, "bias": None if bias is False else bias} for token, bias in biases.items()],
        "n_predict": limit,
        "max_tokens": limit,
        "n_probs": body.n_probs or 0,
        "stop": [body.stop] if isinstance(body.stop, str) else body.stop or [],
        "stream": bool(body.stream),
        "grammar": body.grammar or "",
    }


class NativeWriter:
    """Writes an answer in llama-server's shape, whole or in pieces.

    Args:
        body: the request.
        model: the name to give.
        index: of the answer.
        tokenizer: of the model.
        settings: see `settings_of`.
    """

    def __init__(
        self,
        body: NativeBody,
        model: str,
        index: int,
        tokenizer: mn.Tokenizer,
        settings: Mapping[str, Any],
    ):
        self._body, self._model, self._index, self._tokenizer = body, model, index, tokenizer
        self._settings, stops = settings, settings["stop"]
        self._word = stops[0] if len(stops) == 1 else ""  # of several, the engine does not say which it was
        self._tokens: list[int] = []  # whose text has not come yet
        self._probabilities: list[dict[str, Any]] = []
        self._n_tokens = 0
        self._has_new_line = False

    def whole(self, prompt: list[int], completion: mn.Completion) -> dict[str, Any]:
        """Return the reply."""
        reply = self._last(completion.finish_reason, completion.context_full, completion.usage, completion.timings)
        reply |= {
            "content": completion.text,
            "prompt": self._tokenizer.decode(prompt, special=True),
            "has_new_line": "\n" in completion.text,
        }
        if self._body.return_tokens:
            reply["tokens"] = completion.tokens
        if self._body.n_probs:
            reply["completion_probabilities"] = list(map(_probability, completion.logprobs or ()))
        return reply

    def of(self, chunk: mn.Chunk) -> bytes:
        """Return the events of a chunk; none if it adds nothing."""
        if chunk.token is not None:
            self._tokens.append(chunk.token)
            self._n_tokens += 1
            if chunk.token_logprob is not None:
                self._probabilities.append(_probability(chunk.token_logprob))
        events = b""
        if chunk.text or self._probabilities:
            piece: dict[str, Any] = {
                "index": self._index,
                "content": chunk.text,
                "tokens": self._tokens,
                "stop": False,
                "tokens_predicted": self._n_tokens,
            }
            if self._body.n_probs:
                piece["completion_probabilities"] = self._probabilities
            events = event(piece)
            self._tokens, self._probabilities = [], []
            self._has_new_line |= "\n" in chunk.text
        if chunk.finish_reason is not None:
            usage, timings = chunk.usage or mn.Usage(), chunk.timings or mn.Timings()
            last = self._last(chunk.finish_reason, chunk.context_full, usage, timings)
            events += event(last | {"has_new_line": self._has_new_line})
        return events

    def _last(self, reason: str, is_full: bool, usage: mn.Usage, timings: mn.Timings) -> dict[str, Any]:
        return {
            "index": self._index,
            "content": "",
            "tokens": [],
            "stop": True,
            "model": self._model,
            "tokens_predicted": usage.completion_tokens,
            "tokens_evaluated": usage.prompt_tokens,
            "tokens_cached": usage.cached_tokens,
            "generation_settings": self._settings,
            "truncated": is_full,
            "stop_type": _STOP_TYPES[reason],
            "stopping_word": self._word if reason == "stop" else "",
            "timings": timings_of(usage, timings),
        }


def _probability(one: mn.TokenLogprob) -> dict[str, Any]:
    return {**_entry(one), "top_logprobs": list(map(_entry, one.top))}


def _entry(one: mn.TokenLogprob) -> dict[str, Any]:
    return {"id": one.token, "token": one.text, "bytes": list(one.piece), "logprob": one.logprob}
