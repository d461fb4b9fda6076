"""The built-in models are as their cards describe them."""

import math
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import minerva_native as mn
import stories

FOLDER = Path(mn.__file__).parent / "demo"


def test_it_is_small_and_its_metadata_describes_it(demo: mn.Model) -> None:
    assert demo.path.stat().st_size < 2_000_000
    assert demo.architecture == "llama"
    assert 1000 <= demo.tokenizer.n_vocab <= 2000
    assert demo.metadata["general.name"] == "Minerva Demo"
    assert demo.metadata["general.license"] == "mit"
    assert str(demo.metadata["general.description"]) in " ".join((FOLDER / "MODEL_CARD.md").read_text().split())
    assert "<|im_start|>" in str(demo.metadata["tokenizer.chat_template"])


def test_the_draft_model_is_smaller_and_has_the_same_vocabulary(demo: mn.Model, demo_draft: mn.Model) -> None:
    assert demo_draft.path.stat().st_size < 300_000
    assert demo_draft.metadata["general.name"] == "Minerva Demo Draft"
    assert str(demo_draft.metadata["general.description"]) in " ".join((FOLDER / "DRAFT_CARD.md").read_text().split())
    of_the_tokenizer = [key for key in demo.metadata if key.startswith("tokenizer.")]
    assert of_the_tokenizer
    assert all(demo_draft.metadata[key] == demo.metadata[key] for key in of_the_tokenizer)


@pytest.mark.parametrize(("name", "card"), [("demo", "MODEL_CARD.md"), ("demo_draft", "DRAFT_CARD.md")])
def test_the_held_out_perplexity_is_what_the_card_states(request: pytest.FixtureRequest, name: str, card: str) -> None:
    model: mn.Model = request.getfixturevalue(name)
    seed, count = (int(str(model.metadata[f"minerva.heldout_{key}"])) for key in ("seed", "documents"))
    scores = []
    with model.context(n_ctx=1024, n_threads=1) as context, context.sequence() as sequence:
        for document in stories.documents(seed, count):
            ids = model.tokenizer.encode(document, parse_special=True)
            sequence.truncate(0)
            sequence.extend(ids[:1])
            scores.append(sequence.score(ids[1:]))
    perplexity = math.exp(-float(np.concatenate(scores).mean(dtype=np.float64)))
    stated = float(str(model.metadata["minerva.heldout_perplexity"]))
    assert abs(perplexity / stated - 1) < 0.01
    assert f"{stated:.2f}" in (FOLDER / card).read_text()


def test_its_stories_are_sentences_that_end(demo: mn.Model) -> None:
    with demo.context(n_ctx=512, n_threads=1) as context, context.sequence() as sequence:
        for seed in range(5):
            sequence.truncate(0)
            sequence.extend(demo.tokenizer.encode(str(demo.metadata["minerva.prompt"])))
            steps = list(mn.generate(sequence, mn.Sampler(mn.SamplingParams(temperature=0.8, seed=seed))))
            assert steps[-1].finish_reason == "end"
            text = str(demo.metadata["minerva.prompt"]) + "".join(step.text for step in steps)
            sentences = re.split(r'(?<=[.!?"])\s+', text.strip())
            assert len(sentences) >= 4
            # After a closing quote a lower-case letter may follow: "Yes!" she said.
            assert all(re.match(r'["A-Z]', after) or before.endswith('"') for before, after in pairwise(sentences))
            assert text.rstrip()[-1] in '.!"'


def test_it_answers_a_chat_with_a_story_about_what_was_asked(demo: mn.Model) -> None:
    prompt = "<|im_start|>user\nTell me a story about a dragon.<|im_end|>\n<|im_start|>assistant\n"
    told = 0
    with demo.context(n_ctx=512, n_threads=1) as context, context.sequence() as sequence:
        for seed in range(5):
            sequence.truncate(0)
            sequence.extend(demo.tokenizer.encode(prompt, parse_special=True))
            steps = list(mn.generate(sequence, mn.Sampler(mn.SamplingParams(temperature=0.8, seed=seed))))
            assert steps[-1].finish_reason == "end"
            told += "dragon" in "".join(step.text for step in steps)
    assert told >= 4
