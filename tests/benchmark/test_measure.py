"""What a repetition evaluates, on every kind of memory. No test depends on how long anything takes."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import minerva_native as mn
from minerva_native.benchmark import measure
from tiny_models import TinyModel

Load = Callable[[TinyModel], mn.Model]

KINDS = {
    "attention": TinyModel(),
    "sliding window": TinyModel("gemma2", tied=True),
    "recurrent": TinyModel("mamba"),
    "hybrid": TinyModel("jamba"),
    "encoder-decoder": TinyModel("t5"),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def start(model: mn.Model, n_prompt: int = 0, n_gen: int = 0, n_depth: int = 0) -> measure.Run:
    test = measure.Test(n_prompt, n_gen, n_depth, n_threads=1)
    return measure.Run(model, test, mn.SamplingParams(seed=1))


@pytest.mark.parametrize(
    ("lengths", "name"),
    [
        ((512, 0, 0), "pp512"),
        ((0, 128, 0), "tg128"),
        ((512, 128, 0), "pp512+tg128"),
        ((0, 128, 4096), "tg128 @ d4096"),
    ],
)
def test_a_test_has_the_name_that_llama_bench_gives_it(lengths: tuple[int, int, int], name: str) -> None:
    assert measure.Test(*lengths).name == name


@each_kind
@pytest.mark.parametrize(("n_prompt", "n_gen"), [(24, 0), (0, 8), (24, 8)])
def test_a_repetition_evaluates_its_tokens_and_no_others(load_tiny: Load, kind: str, n_prompt: int, n_gen: int) -> None:
    with start(load_tiny(KINDS[kind]), n_prompt, n_gen) as run:
        for _ in range(3):
            before = run.context.stats.tokens_evaluated
            repetition = run.repeat()
            assert run.context.stats.tokens_evaluated - before == n_prompt + n_gen
            assert repetition.token_ns.shape == (n_gen,)
            assert (repetition.first_token_ns is None) == (n_prompt == 0)
            assert repetition.ns >= repetition.token_ns.sum() > 0 or not n_gen


@each_kind
def test_the_depth_is_evaluated_once(load_tiny: Load, kind: str) -> None:
    with start(load_tiny(KINDS[kind]), n_gen=4, n_depth=40) as run:
        run.warm_up()
        assert run.context.stats.tokens_evaluated == 40 + 1
        for number in range(1, 4):
            run.repeat()
            assert run.context.stats.tokens_evaluated == 40 + 1 + 4 * number


@each_kind
def test_tokens_are_generated_at_the_depth(load_tiny: Load, kind: str) -> None:
    with start(load_tiny(KINDS[kind]), n_prompt=6, n_gen=4, n_depth=40) as run:
        run.repeat()
        assert len(run.sequence or ()) == 50
        assert run.take_apart() is not None
        assert len(run.sequence or ()) == 50


def test_a_text_begins_with_bos_if_the_model_expects_it(load_tiny: Load) -> None:
    model = load_tiny(TinyModel())
    for lengths in ((3, 0, 0), (0, 3, 0), (0, 3, 3)):
        with start(model, *lengths) as run:
            run.repeat()
            assert run.sequence is not None
            assert run.sequence[0] == model.tokenizer.bos


@each_kind
def test_a_token_is_taken_apart(load_tiny: Load, kind: str) -> None:
    with start(load_tiny(KINDS[kind]), n_gen=32) as run:
        run.repeat()
        before = run.context.stats.tokens_evaluated
        parts = run.take_apart()
        assert parts is not None
        # All but the first token, which is already there; it is only re-evaluated for its logits after a truncation.
        assert run.context.stats.tokens_evaluated - before == 31
        assert min(parts) > 0
        assert parts.total <= parts.whole


def test_a_generation_continues_after_an_end_token(load_tiny: Load) -> None:
    model = load_tiny(TinyModel())
    params = mn.SamplingParams(logit_bias={model.tokenizer.eos or 0: 100.0}, temperature=0.0)
    with measure.Run(model, measure.Test(n_gen=24, n_threads=1), params) as run:
        run.repeat()
        assert run.take_apart() is not None
        assert run.sequence is not None
        assert set(run.sequence[1:]) == {model.tokenizer.eos}


@pytest.mark.parametrize(("n_prompt", "n_gen"), [(8, 0), (0, 1), (0, 2)])
def test_a_generation_too_short_is_not_taken_apart(tiny: mn.Model, n_prompt: int, n_gen: int) -> None:
    with start(tiny, n_prompt, n_gen) as run:
        run.repeat()
        assert run.take_apart() is None


def test_keys_and_values_are_counted_at_half_the_generation(load_tiny: Load) -> None:
    shape = TinyModel()
    with start(load_tiny(shape), n_gen=20, n_depth=100) as run:
        run.repeat()
        of_a_token = 2 * 2 * shape.n_layer * shape.n_head_kv * shape.head_size  # keys and values, float16
        assert run.kv_bytes() == pytest.approx(110 * of_a_token, rel=0.02)


def test_nothing_is_left_behind(load_tiny: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with start(load_tiny(KINDS["recurrent"]), n_gen=2, n_depth=8) as run:
        run.repeat()
        assert list(tmp_path.rglob("*")), "a memory that cannot be truncated is saved at the depth"
    assert run.context.closed
    assert not list(tmp_path.iterdir())


def test_reading_the_clock_costs_something() -> None:
    assert 0 < measure.clock_ns() < 1e6
    assert np.isfinite(measure.clock_ns(10))
