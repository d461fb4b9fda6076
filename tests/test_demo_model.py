"""The built-in model is as its card describes it."""

import math
import re
from itertools import pairwise
from pathlib import Path

import numpy as np

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


def test_the_held_out_perplexity_is_what_the_card_states(demo: mn.Model) -> None:
    seed, count = (int(str(demo.metadata[f"minerva.heldout_{name}"])) for name in ("seed", "documents"))
    scores = []
    with demo.context(n_ctx=1024, n_threads=1) as context, context.sequence() as sequence:
        for document in stories.documents(seed, count):
            ids = demo.tokenizer.encode(document, parse_special=True)
            sequence.truncate(0)
            sequence.extend(ids[:1])
            scores.append(sequence.score(ids[1:]))
    perplexity = math.exp(-float(np.concatenate(scores).mean(dtype=np.float64)))
    stated = float(str(demo.metadata["minerva.heldout_perplexity"]))
    assert abs(perplexity / stated - 1) < 0.01
    assert f"{stated:.2f}" in (FOLDER / "MODEL_CARD.md").read_text()


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
