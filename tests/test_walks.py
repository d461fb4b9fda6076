"""Random walks over every operation on several sequences, on each kind of memory, against evaluations from scratch.

After every step, each sequence must equal a plain list with the same changes, and have the logits of a context that
evaluated the same tokens and nothing else. A shifted sequence differs from a fresh evaluation by nature: it is compared
with the same removals and shifts made by hand, with plain libllama calls.
"""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import hypothesis
import hypothesis.stateful as stateful
import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest

import minerva_native as mn
from engine_room import open_up
from minerva_native._binding import ffi, lib
from minerva_native.engine.pool import count_cells
from minerva_native.engine.runner import Batch
from minerva_native.sequence import slot_of
from minerva_native.speculative import OwnHead
from tiny_models import TinyModel

Logits = npt.NDArray[np.float32]

WALKS_OF_EACH, STEPS = 60, 40
N_CTX, N_SEQ, MAX_TOKENS = 256, 4, 80  # libllama rounds n_ctx up to a multiple of 256: it has no cell to spare
TOLERANCE = 1e-3  # relative: the order of additions depends on the batch size, and keys and values are float16
FEW = st.sampled_from([40, 41, 42])  # so few that texts often share a prefix
QUESTION = list(range(100, 108))  # for the encoder, if there is one
TEXT = st.lists(FEW, min_size=1, max_size=24)
TEXT_EACH = st.lists(TEXT, min_size=N_SEQ, max_size=N_SEQ)
TOKEN_EACH = st.lists(st.lists(FEW, min_size=1, max_size=1), min_size=N_SEQ, max_size=N_SEQ)


class Kind(NamedTuple):
    """A kind of memory: a model that has it, and how its context is made."""

    model: TinyModel
    options: Mapping[str, Any] = MappingProxyType({})


# A small difference can make a mixture of experts choose another expert, so its keys and values are in float32.
KINDS = {
    "attention": Kind(TinyModel()),
    "attention in cells of its own": Kind(TinyModel(), {"kv_unified": False, "n_ctx": N_SEQ * 80}),
    "mixture of experts": Kind(TinyModel("qwen3moe"), {"kv_type": "f32"}),
    "sliding window": Kind(TinyModel("gemma2", tied=True)),
    "sliding window in cells of its own": Kind(
        TinyModel("gemma2", tied=True), {"kv_unified": False, "n_ctx": N_SEQ * 80}
    ),
    "sliding window, small cache": Kind(TinyModel("gemma2", tied=True), {"swa_full": False, "n_ctx": 300}),
    "recurrent, Mamba": Kind(TinyModel("mamba")),
    "recurrent, RWKV": Kind(TinyModel("rwkv7")),
    "hybrid": Kind(TinyModel("jamba")),
    "hybrid with a small window": Kind(TinyModel("lfm2", n_layer=4), {"swa_full": False, "n_ctx": 300}),
    "hybrid with a small window and snapshots": Kind(
        TinyModel("lfm2", n_layer=4), {"swa_full": False, "n_ctx": 300, "n_rs_seq": 4}
    ),
    "hybrid with snapshots, delta net": Kind(TinyModel("qwen35"), {"n_rs_seq": 4}),
    "hybrid with snapshots, Mamba 2": Kind(TinyModel("nemotron_h", n_layer=4), {"n_rs_seq": 4}),
    "attention with an MTP head": Kind(TinyModel("glm4moe", n_mtp=1), {"mtp": True, "kv_type": "f32"}),
    "small window with a chain of MTP heads": Kind(
        TinyModel("mimo2", n_mtp=2), {"mtp": True, "swa_full": False, "n_ctx": 300}
    ),
    "hybrid with snapshots and an MTP head": Kind(TinyModel("qwen35", n_mtp=1), {"mtp": True, "n_rs_seq": 4}),
    "encoder-decoder": Kind(TinyModel("t5")),
}

OPTIONS: dict[str, Any] = {"n_threads": 1, "n_batch": 16, "n_ubatch": 8, "flash_attention": "off"}


class ByHand:
    """Runs programs with libllama calls: ("evaluate", tokens), ("cut", n), ("redo",) and ("shift", keep, discard)."""

    def __init__(self, model: mn.Model, options: Mapping[str, Any]):
        unshared = {"kv_unified": True, "n_ctx": 256, "swa_full": True}
        self.context = model.context(**{**OPTIONS, **options, **unshared}, prefix_cache=False)
        self.batch = Batch(16)
        self.known: dict[tuple[Any, ...], Logits | None] = {}

    def logits(self, program: list[tuple[Any, ...]]) -> Logits | None:
        """Return the logits after a program, or None if a sliding window has dropped tokens that come into it again."""
        key = tuple(program)
        if key not in self.known:
            self.known[key] = self._run(program)
        return self.known[key]

    def _run(self, program: list[tuple[Any, ...]]) -> Logits | None:
        if self.context.model.has_encoder:
            self.context.encode(QUESTION)
        with self.context.raw() as pointer:
            return self._run_on(pointer, program)

    def _run_on(self, pointer: Any, program: list[tuple[Any, ...]]) -> Logits | None:
        memory = lib.llama_get_memory(pointer)
        lib.llama_memory_seq_rm(memory, 0, -1, -1)
        tokens: list[int] = []
        for name, *arguments in program:
            if name == "evaluate":
                self._evaluate(pointer, arguments[0], len(tokens))
                tokens += arguments[0]
            elif name == "cut":
                del tokens[arguments[0] :]
                lib.llama_memory_seq_rm(memory, 0, len(tokens), -1)
            elif name == "redo":
                lib.llama_memory_seq_rm(memory, 0, len(tokens) - 1, -1)
                if not self._holds(memory, len(tokens) - 1):
                    return None
                self._evaluate(pointer, tokens[-1:], len(tokens) - 1)
            else:
                keep, discard = arguments
                del tokens[keep : keep + discard]
                lib.llama_memory_seq_rm(memory, 0, keep, keep + discard)
                lib.llama_memory_seq_add(memory, 0, keep + discard, -1, -discard)
            if not self._holds(memory, len(tokens)):
                return None
        row = lib.llama_get_logits_ith(pointer, -1)
        n_vocab = self.context.model.tokenizer.n_vocab
        logits: Logits = np.frombuffer(ffi.buffer(row, 4 * n_vocab), np.float32).copy()
        return logits

    def _holds(self, memory: Any, n: int) -> bool:
        """Return whether the window, if there is one, still holds what the token after the first n attends to."""
        window = self.context.memory.window
        return not window or 0 <= lib.llama_memory_seq_pos_min(memory, 0) <= max(0, n + 1 - window)

    def _evaluate(self, pointer: Any, tokens: list[int], start: int) -> None:
        batch = self.batch
        for at in range(0, len(tokens), 7):
            part = tokens[at : at + 7]
            batch.put(0, np.array(part, np.int32), start + at, 0)
            assert lib.llama_decode(pointer, batch.struct) == 0


class Text:
    """What a sequence should hold, and how it came to hold that.

    Attributes:
        tokens: the tokens.
        shifts: the program that leads to them, if the sequence was ever shifted.
        waits: whether not to compare the logits yet, because reading them would evaluate tokens that should wait.
    """

    def __init__(self, tokens: list[int], program: list[tuple[Any, ...]] | None = None):
        self.tokens = tokens
        self.shifts = program
        self.waits = False

    @property
    def program(self) -> list[tuple[Any, ...]]:
        return [("evaluate", tuple(self.tokens))] if self.shifts is None else self.shifts

    def look(self, starts_over: bool) -> None:
        """Record that the logits were read: after a cut, that re-evaluates the last token, or everything."""
        self.waits = False
        if starts_over:
            self.shifts = None
        elif self.shifts is not None and self.shifts[-1][0] == "cut":
            self.shifts.append(("redo",))

    def extend(self, ids: list[int]) -> None:
        self.tokens += ids
        if self.shifts is not None:
            self.shifts.append(("evaluate", tuple(ids)))

    def cut(self, n: int, can_truncate: bool) -> None:
        removed = len(self.tokens) - n
        del self.tokens[n:]
        if removed and self.shifts is not None:
            if can_truncate and n:
                self.shifts = [*self.shifts, ("cut", n)]
            else:  # a recurrent state goes back to a point after the last shift, or before the first
                self.shifts = self._without(removed)

    def _without(self, removed: int) -> list[tuple[Any, ...]] | None:
        """Return the program without its last tokens, or None if some of them are from before a shift."""
        program = list(self.shifts or [])
        while removed and program[-1][0] == "evaluate":
            ids = program.pop()[1]
            if len(ids) > removed:
                program.append(("evaluate", ids[:-removed]))
            removed = max(0, removed - len(ids))
        return None if removed else program

    def shift(self, keep: int, discard: int) -> None:
        self.shifts = [*self.program, ("shift", keep, discard)]
        del self.tokens[keep : keep + discard]

    def copy(self) -> "Text":
        return Text(list(self.tokens), None if self.shifts is None else list(self.shifts))


class Walk(stateful.RuleBasedStateMachine):
    """The sequences of one context, and the texts that they should hold."""

    finished = 0  # walks that made all their steps

    def __init__(self, model: mn.Model, by_hand: ByHand, options: Mapping[str, Any], folder: Path):
        super().__init__()
        options = {"n_ctx": N_CTX, "n_seq": N_SEQ, "checkpoint_interval": 8, **OPTIONS, **options}
        self.context, self.cache = open_up(model, **options)
        self.by_hand, self.folder = by_hand, folder
        if model.has_encoder:
            self.context.encode(QUESTION)
        self.can_truncate = self.context.memory.can_truncate
        self.texts: dict[mn.Sequence, Text] = {self.context.sequence(): Text([])}
        self.steps = 0

    def teardown(self) -> None:
        Walk.finished += self.steps >= STEPS
        for text in self.texts.values():
            text.waits = False
        self.agree()
        self.context.close()

    def pick(self, data: st.DataObject) -> tuple[mn.Sequence, Text]:
        return data.draw(st.sampled_from(list(self.texts.items())), label="sequence")

    def attempt(self, change: Callable[[], Any], text: Text) -> int | None:
        """Return how many tokens a change evaluates, or None if there is no room: then nothing may have changed."""
        before = self.context.stats.tokens_evaluated
        try:
            change()
        except mn.ContextFullError:
            return None
        except mn.ContextError:
            if self.has_place():
                raise
            return None
        text.waits = False
        return self.context.stats.tokens_evaluated - before

    def has_place(self) -> bool:
        """Return whether open and pinned sequences leave a sequence id free."""
        return len(self.texts) + sum(slot.pinned for slot in self.cache.pool.finished) < N_SEQ

    def look(self, sequence: mn.Sequence, text: Text) -> Logits | None:
        """Return the logits of a sequence, or None if there is no room to evaluate what they need."""
        if self.attempt(lambda: sequence.logits, text) is None:
            return None
        # The slot says whether it started over, and the logits must agree with that.
        text.look(slot_of(sequence).n_exact is None)
        return sequence.logits

    @stateful.rule(data=st.data(), ids=TEXT)
    def extend(self, data: st.DataObject, ids: list[int]) -> None:
        sequence, text = self.pick(data)
        ids = ids[: MAX_TOKENS - len(text.tokens)]
        if ids and self.attempt(lambda: sequence.extend(ids), text) is not None:
            text.extend(ids)

    @stateful.rule(data=st.data(), ids=TEXT)
    def score(self, data: st.DataObject, ids: list[int]) -> None:
        sequence, text = self.pick(data)
        ids = ids[: MAX_TOKENS - len(text.tokens)]
        if not ids or (text.tokens and self.look(sequence, text) is None):
            return
        if self.attempt(lambda: sequence.score(ids), text) is not None:
            text.extend(ids)

    @stateful.rule(data=st.data(), ids=TEXT)
    def logits_after(self, data: st.DataObject, ids: list[int]) -> None:
        sequence, text = self.pick(data)
        ids = ids[: MAX_TOKENS - len(text.tokens)]
        if not ids or not text.tokens or self.look(sequence, text) is None:
            return
        if self.attempt(lambda: sequence.logits_after(ids), text) is not None:
            text.extend(ids)

    @stateful.rule(data=st.data(), ids=st.lists(FEW, min_size=1, max_size=7), after=st.lists(FEW, max_size=2))
    def guess(self, data: st.DataObject, ids: list[int], after: list[int]) -> None:
        sequence, text = self.pick(data)
        ids, n = ids[: MAX_TOKENS - len(text.tokens) - len(after)], len(text.tokens)
        if not ids or not n or self.look(sequence, text) is None:
            return
        if self.attempt(lambda: sequence.logits_after(ids), text) is None:
            return
        text.extend(ids)
        kept = data.draw(st.integers(n, n + len(ids)), label="kept")
        sequence.truncate(kept)
        text.cut(kept, self.can_truncate)
        if after and self.attempt(lambda: sequence.extend(after), text) is not None:
            text.extend(after)
        text.waits |= not after and text.shifts is None

    @stateful.precondition(lambda self: self.context.options.mtp)
    @stateful.rule(data=st.data(), n=st.integers(1, 6), n_right=st.integers(0, 6))
    def guess_by_head(self, data: st.DataObject, n: int, n_right: int) -> None:
        sequence, text = self.pick(data)
        if not text.tokens or len(text.tokens) + 1 + n > MAX_TOKENS or self.look(sequence, text) is None:
            return
        if self.attempt(lambda: sequence.append(41), text) is None:
            return
        text.extend([41])
        ids = OwnHead(sequence).draft(sequence.tokens, n)
        assert list(sequence) == text.tokens
        if not ids or self.attempt(lambda: sequence.logits_after(ids), text) is None:
            text.waits = True
            return
        text.extend(ids)
        sequence.rewind(n_wrong := max(0, len(ids) - n_right))
        text.cut(len(text.tokens) - n_wrong, self.can_truncate)
        text.waits = n_wrong > 0 and text.shifts is None

    @stateful.precondition(lambda self: self.context.options.on_full == "error" and len(self.texts) > 1)
    @stateful.rule(data=st.data(), ids=st.lists(FEW, min_size=2, max_size=7), n_right=st.integers(0, 4))
    def guess_together(self, data: st.DataObject, ids: list[int], n_right: int) -> None:
        texts, drafts = dict([self.pick(data), self.pick(data)]), dict[mn.Sequence, list[int]]()
        for (sequence, text), draft in zip(texts.items(), (ids[:2], ids[1:]), strict=False):
            drafts[sequence] = draft[: MAX_TOKENS - len(text.tokens)]
            if not text.tokens or not drafts[sequence] or self.look(sequence, text) is None:
                return
        if self.attempt(lambda: self.context.logits_after(drafts), text) is None:
            return
        for sequence, text in texts.items():
            text.extend(drafts[sequence])
            n_wrong = max(0, len(drafts[sequence]) - n_right)
            sequence.rewind(n_wrong)
            text.cut(len(text.tokens) - n_wrong, self.can_truncate)
            text.waits = n_wrong > 0 and text.shifts is None

    @stateful.rule(max_tokens=st.none() | st.integers(1, 20))
    def evaluate(self, max_tokens: int | None) -> None:
        texts = {sequence: text for sequence, text in self.texts.items() if text.tokens and text.shifts is None}
        try:
            left = self.context.evaluate(texts, max_tokens)
        except mn.ContextFullError:
            return
        assert left == sum(sequence.n_waiting for sequence in texts)

    @stateful.rule(data=st.data(), token=FEW)
    def append(self, data: st.DataObject, token: int) -> None:
        sequence, text = self.pick(data)
        if len(text.tokens) == MAX_TOKENS:
            return
        if self.attempt(lambda: sequence.append(token), text) is not None:
            text.extend([token])
            text.waits = True

    @stateful.rule(data=st.data(), lazily=st.booleans())
    def truncate(self, data: st.DataObject, lazily: bool) -> None:
        sequence, text = self.pick(data)
        n = data.draw(st.integers(0, len(text.tokens)), label="n")
        sequence.truncate(n)
        text.cut(n, self.can_truncate)
        text.waits |= lazily and text.shifts is None

    @stateful.rule(data=st.data(), n=st.integers(1, 3))
    def rewind(self, data: st.DataObject, n: int) -> None:
        sequence, text = self.pick(data)
        n = min(n, len(text.tokens))
        sequence.rewind(n)
        text.cut(len(text.tokens) - n, self.can_truncate)

    @stateful.rule(data=st.data(), edit=TEXT)
    def assign(self, data: st.DataObject, edit: list[int]) -> None:
        sequence, text = self.pick(data)
        other = self.pick(data)[1]
        kept = data.draw(st.integers(0, len(other.tokens)), label="kept")
        ids = (other.tokens[:kept] + edit)[:MAX_TOKENS]
        common = sum(
            1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text.tokens, ids, strict=False))
        )
        if self.attempt(lambda: sequence.assign(ids), text) is not None:
            if common < len(text.tokens):  # it starts over, from a prefix that was never shifted
                text.tokens, text.shifts = ids, None
            elif ids[common:]:
                text.extend(ids[common:])

    @stateful.rule(data=st.data())
    def shift(self, data: st.DataObject) -> None:
        sequence, text = self.pick(data)
        if len(text.tokens) < 2 or not self.context.memory.can_shift:
            return
        keep = data.draw(st.integers(0, len(text.tokens) - 2), label="keep")
        discard = data.draw(st.integers(1, len(text.tokens) - keep - 1), label="discard")
        # Evaluate the waiting tokens before the shift and a token right after it, so that both sides evaluate at the
        # same points. Reading the logits is not enough: after a failed decode they are known, but the state is not.
        if self.look(sequence, text) is None or self.attempt(lambda: sequence.extend([41]), text) is None:
            return
        text.extend([41])
        if self.attempt(lambda: sequence.shift(keep, discard), text) is None:
            return
        text.shift(keep, discard)
        if self.attempt(lambda: sequence.extend([40]), text) is not None:
            text.extend([40])

    @stateful.precondition(lambda self: len(self.texts) < N_SEQ)
    @stateful.rule(data=st.data(), whole=st.booleans())
    def fork(self, data: st.DataObject, whole: bool) -> None:
        sequence, text = self.pick(data)
        n = None if whole else data.draw(st.integers(0, len(text.tokens)), label="n")
        copy = text.copy()
        if self.attempt(lambda: self.texts.update({sequence.fork(n): copy}), copy) is not None and n is not None:
            copy.cut(n, self.can_truncate)
        copy.waits = text.waits

    @stateful.precondition(lambda self: len(self.texts) < N_SEQ)
    @stateful.rule(data=st.data())
    def save_and_restore(self, data: st.DataObject) -> None:
        sequence, text = self.pick(data)
        if self.attempt(lambda: sequence.save(self.folder / "sequence"), Text([])) is None:
            return  # after a shift, saving needs a free cell to apply it
        copy = text.copy()
        self.attempt(lambda: self.texts.update({self.context.restore(self.folder / "sequence"): copy}), copy)
        copy.waits = text.waits

    @stateful.rule(data=st.data(), size=st.integers(3, 9), forget=st.booleans())
    def keep_and_bring_back(self, data: st.DataObject, size: int, forget: bool) -> None:
        sequence, text = self.pick(data)
        cache, slot = self.cache, slot_of(sequence)
        with cache.gate.enter(), cache.handle:
            n = cache.n_exact(slot)
            ids = np.array(text.tokens[:n], np.int32)
            if not n:
                return
            try:
                parts = [cache.part(slot, at, min(at + size, n)) for at in range(0, n, size)] if cache.can_split else []
                whole = [part for part in parts if part is not None]
                kept = data.draw(st.integers(1, n), label="kept")
                payload = cache.snapshot(slot) if n == slot.n_cached else None
                if forget:
                    cache.clear_finished()
                if whole and len(whole) == len(parts):
                    cache.keep_parts(ids[:kept], whole)
                elif payload is not None:
                    cache.keep_snapshot(payload)
            except (mn.ContextFullError, mn.SequencesInUseError):
                return

    @stateful.rule(data=st.data(), ids=st.lists(FEW, min_size=17, max_size=24))
    def stop_in_the_middle_of_a_text(self, data: st.DataObject, ids: list[int]) -> None:
        sequence, text = self.pick(data)
        if len(text.tokens) + len(ids) > MAX_TOKENS or text.shifts is not None:
            return
        try:
            sequence.extend(ids, on_progress=lambda done, total: self.context.cancel())
        except mn.Cancelled:
            return
        except mn.ContextFullError:
            return
        text.extend(ids)  # it needed only one batch, so nothing was left to cancel
        text.waits = False

    @stateful.precondition(lambda self: len(self.texts) > 1)
    @stateful.rule(data=st.data(), pinned=st.booleans())
    def close(self, data: st.DataObject, pinned: bool) -> None:
        sequence, _ = self.pick(data)
        sequence.pinned = pinned
        sequence.close()
        del self.texts[sequence]

    @stateful.rule()
    def unpin(self) -> None:
        self.context.clear_cache(pinned=True)

    @stateful.precondition(lambda self: self.has_place())
    @stateful.rule(ids=TEXT)
    def open(self, ids: list[int]) -> None:
        sequence, text = self.context.sequence(), Text([])
        self.texts[sequence] = text
        if self.attempt(lambda: sequence.extend(ids), text) is not None:
            text.extend(ids)

    @stateful.rule(data=st.data(), texts=TEXT_EACH | TOKEN_EACH)
    def extend_several(self, data: st.DataObject, texts: list[list[int]]) -> None:
        chosen = data.draw(st.sets(st.sampled_from(range(len(self.texts))), min_size=1), label="which")
        wanted = [(list(self.texts)[index], texts[index]) for index in sorted(chosen)]
        wanted = [(sequence, ids[: MAX_TOKENS - len(sequence)]) for sequence, ids in wanted]
        try:
            self.context.extend(dict(wanted))
        except mn.ContextFullError:
            return
        for sequence, ids in wanted:
            if ids:
                self.texts[sequence].extend(ids)
                self.texts[sequence].waits = False

    @stateful.invariant()
    def agree(self) -> None:
        self.steps += 1
        for sequence, text in self.texts.items():
            assert list(sequence) == text.tokens
        pool, memory = self.cache.pool, self.context.memory
        slots = [*pool.open, *pool.finished]
        ids = [slot.id for slot in slots if slot.id >= 0]
        assert len(set(ids)) == len(ids) <= N_SEQ
        if memory.can_share:
            assert pool.spare <= self.context.n_ctx - count_cells(slots)
        for slot in pool.finished:
            assert slot.in_sync <= (slot.n_cached == len(slot.tokens) > 0)
        for sequence, text in self.texts.items():
            if text.tokens and not text.waits:
                logits = self.look(sequence, text)
                if logits is None:  # a cell that it shares must be re-evaluated, and there is no room for that
                    continue
                expected = self.by_hand.logits(text.program)
                if expected is None:
                    continue
                assert np.abs(logits - expected).max() < TOLERANCE * np.abs(expected).max()
                best, second = np.sort(expected)[[-1, -2]]
                if best - second > 2 * TOLERANCE * np.abs(expected).max():
                    assert logits.argmax() == expected.argmax()


@pytest.mark.parametrize("name", KINDS)
def test_random_walks(name: str, load_tiny: Callable[[TinyModel], mn.Model], tmp_path: Path) -> None:
    kind = KINDS[name]
    model = load_tiny(kind.model)
    by_hand = ByHand(model, kind.options)
    Walk.finished = 0
    stateful.run_state_machine_as_test(
        lambda: Walk(model, by_hand, kind.options, tmp_path),  # type: ignore[arg-type]  # it takes any factory
        settings=hypothesis.settings(
            max_examples=5 * WALKS_OF_EACH // 2,  # some end early
            stateful_step_count=STEPS,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.generate],  # no shrinking, which takes minutes: the walk is printed as it is
        ),
    )
    assert Walk.finished >= WALKS_OF_EACH
