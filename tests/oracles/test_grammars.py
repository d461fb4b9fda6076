"""Grammars, compared with libllama's own sampler for them; JSON schemas, compared with the suite of the standard.

Both engines read the same GBNF and walk along the same random texts; at every step they must allow the same tokens.
Known differences, none of them in the texts:

- Where only one continuation is left, ours allows only the usual tokens for it.
- If it is open where one part of a text ends and the next begins, as in `[^a]+ "bc"`, ours may allow less: it splits a
  text into the longest parts.
- libllama takes bytes that are not in UTF-8 (0xF5 to 0xFF, overlong beginnings) for characters, and a name of a control
  token for text; it never allows the character U+0000. Those tokens are left out.
"""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import minerva_native as mn
from minerva_native._binding import ffi, lib

GRAMMARS = {
    "words": 'root ::= word (" " word){0,4} "."\nword ::= [a-z]+ | "I"',
    "arithmetic": 'root ::= sum\nsum ::= term ([-+] term)*\nterm ::= number | "(" sum ")"\nnumber ::= [0-9]{1,6}',
    "characters": 'root ::= "<" [^"\\\\\\n>]{1,9} ">" ("é" | "日本" | [α-ω]{2,3})',
    "optional": 'root ::= "a"? ("b" | "c")* "d"+',
    "json": (
        'root ::= object\nobject ::= "{" pair ("," pair)* "}"\npair ::= string ":" value\n'
        'value ::= object | string | [0-9]+ | "true" | "null"\nstring ::= "\\"" [a-zA-Z ]* "\\""'
    ),
}
ENTRY = np.dtype([("id", "i4"), ("logit", "f4"), ("p", "f4")])

SUITE = os.environ.get("MINERVA_JSON_SCHEMA_SUITE", "")


class Llama:
    """libllama's sampler for a grammar."""

    def __init__(self, model: mn.Model, grammar: str):
        self._n_vocab = model.tokenizer.n_vocab
        with model.raw() as pointer:
            made = lib.llama_sampler_init_grammar(lib.llama_model_get_vocab(pointer), grammar.encode(), b"root")
        self._sampler = ffi.gc(made, lib.llama_sampler_free)

    def allowed(self) -> set[int]:
        entries = np.zeros(self._n_vocab, ENTRY)
        entries["id"] = np.arange(self._n_vocab)
        array = ffi.new("llama_token_data_array *")
        array.data = ffi.cast("llama_token_data *", entries.ctypes.data)
        array.size, array.selected, array.sorted = self._n_vocab, -1, False
        lib.llama_sampler_apply(self._sampler, array)
        return set(entries["id"][entries["logit"] > -np.inf].tolist())

    def accept(self, token: int) -> None:
        lib.llama_sampler_accept(self._sampler, token)


def is_no_text(tokenizer: mn.Tokenizer, token: int) -> bool:
    piece = tokenizer.piece(token, special=True)
    return b"\0" in piece or any(byte in (0xC0, 0xC1) or byte >= 0xF5 for byte in piece)


@pytest.mark.parametrize("name", GRAMMARS)
@pytest.mark.parametrize("vocabulary_name", ["demo", "llama-bpe", "llama-spm"])
def test_the_same_tokens_are_allowed_along_random_texts(
    name: str, vocabulary_name: str, demo: mn.Model, vocabulary_model: Callable[[str], mn.Model]
) -> None:
    model = demo if vocabulary_name == "demo" else vocabulary_model(vocabulary_name)
    tokenizer = model.tokenizer
    generator = random.Random(name)
    constraint = mn.Constraint.gbnf(GRAMMARS[name])
    others = {token.id for token in tokenizer.special_tokens if not (token.in_every_text or tokenizer.is_end(token.id))}
    others |= {token for token in range(tokenizer.n_vocab) if is_no_text(tokenizer, token)}
    n_steps = n_texts = 0
    while n_steps < 60:
        matcher, llama = constraint.matcher(tokenizer), Llama(model, GRAMMARS[name])
        n_texts += 1
        for _ in range(30):
            bits = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")[: tokenizer.n_vocab]
            ours, theirs = set(np.flatnonzero(bits).tolist()) - others, llama.allowed() - others
            n_steps += 1
            if matcher.forced() is not None:
                assert ours <= theirs
            else:
                assert ours == theirs, [tokenizer.piece(token, special=True) for token in sorted(ours ^ theirs)[:10]]
            texts = [token for token in sorted(ours) if not tokenizer.is_end(token)]
            if not texts:
                break
            token = generator.choice(texts)
            matcher.consume(token)
            llama.accept(token)
            if matcher.is_complete:
                assert all(map(tokenizer.is_end, llama.allowed()))
                break
    assert n_texts > 1


@pytest.mark.skipif(not SUITE, reason="MINERVA_JSON_SCHEMA_SUITE names no folder: see CONTRIBUTING.md")
@pytest.mark.parametrize("draft", ["draft2020-12", "draft2019-09", "draft7"])
def test_what_is_accepted_is_valid_by_the_json_schema_test_suite(draft: str, demo: mn.Model) -> None:
    """With -s it lists what is refused."""
    tokenizer = demo.tokenizer
    n_schemas = n_valid = n_accepted = 0
    refused: dict[str, str] = {}
    for path in sorted(Path(SUITE, draft).glob("*.json")):
        for group in json.loads(path.read_text(encoding="utf-8")):
            name = f"{path.stem}: {group['description']}"
            try:
                constraint = mn.Constraint.json_schema(group["schema"])
            except mn.ConstraintError as error:
                refused[name] = str(error)
                continue
            n_schemas += 1
            for test in group["tests"]:
                matcher = constraint.matcher(tokenizer)
                try:
                    matcher.follow(tokenizer.encode(json.dumps(test["data"], ensure_ascii=False), add_special=False))
                    is_accepted = matcher.can_end
                except mn.ConstraintError:
                    is_accepted = False
                assert test["valid"] or not is_accepted, f"{name}: {test['description']}"
                n_valid += test["valid"]
                n_accepted += is_accepted
    print(f"\n{draft}: {n_schemas} schemas, {n_accepted} of {n_valid} valid values accepted; refused:")
    for name, message in refused.items():
        print(f"  {name}: {message}")
    assert n_schemas > 100
