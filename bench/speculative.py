"""What speculation saves and costs: `python bench/speculative.py MODEL.gguf [--llama-server PATH]`.

Two tasks, against plain decoding in turns: a text that repeats what is in the prompt with a word changed, and a story
that cannot be guessed, greedily. So that a small model repeats faithfully, the first is dictated by the sampler; its
logits are computed all the same. Ratios are medians of pairs, with the smallest and the largest in brackets.
"""

import argparse
import math
import re
import statistics
import time

import minerva_native as mn

PARAGRAPH = (
    "The river rises in the northern hills near the village of Alderby and flows south for about ninety miles before "
    "it reaches the sea. Along its course it passes three small towns, two old mills, and a long stretch of meadow "
    "that floods every winter. In the spring the water is cold and clear, and trout can be seen from the stone bridge "
    "at Harrow. The people who live beside it say that the river remembers every storm, and that on quiet nights you "
    "can hear the bells of the drowned church at Saint Osyth, which the flood of 1287 carried away in a single night."
)
STORY = "Write a long story about a lighthouse keeper who finds a strange machine on the beach."


class Dictated:
    """A sampler that draws what it is told, whatever the logits are."""

    def __init__(self, tokens: list[int]):
        self._rest = iter(tokens)

    def __call__(self, logits: object, tokens: object) -> int:
        return next(self._rest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=9)
    arguments = parser.parse_args()
    model = mn.Model.load(arguments.model)
    tokenizer = model.tokenizer
    edited = re.sub("mills", "bridges", PARAGRAPH)
    edit = tokenizer.encode(f"{PARAGRAPH}\n\nThe same with one word changed:\n\n")
    copied = tokenizer.encode(edited, add_special=False)
    story = tokenizer.encode(STORY)
    with model.context(n_ctx=2048, n_threads=arguments.threads) as context, context.sequence() as sequence:

        def take(task: str, speculation: mn.Speculation | None) -> tuple[float, list[int]]:
            sequence.assign(edit if task == "edit" else story)
            _ = sequence.logits
            n_before, n = len(sequence), len(copied) if task == "edit" else 200
            bias = {token: -math.inf for token in range(tokenizer.n_vocab) if tokenizer.is_end(token)}
            greedy = mn.Sampler(mn.SamplingParams(temperature=0.0, logit_bias=bias))
            sampler = Dictated(copied) if task == "edit" else greedy
            before = time.perf_counter()
            for _ in mn.generate(sequence, sampler, max_tokens=n, speculate=speculation):
                pass
            return time.perf_counter() - before, sequence[n_before:]

        for task in ("edit", "story"):
            ratios, same = [], 0
            for at in range(arguments.pairs + 1):
                speculation = mn.Speculation("lookup")
                if at % 2:
                    plain, guessed = take(task, None), take(task, speculation)
                else:
                    guessed, plain = take(task, speculation), take(task, None)
                if at:
                    ratios.append(plain[0] / guessed[0])
                    same += plain[1] == guessed[1]
            median = statistics.median(ratios)
            print(f"{task}: {median:.3f} [{min(ratios):.3f}, {max(ratios):.3f}] times plain decoding's speed; "
                  f"{speculation.accepted} of {speculation.drafted} guessed tokens right, of {len(guessed[1])}; "
                  f"the same text in {same} of {arguments.pairs} pairs")  # fmt: skip


if __name__ == "__main__":
    main()
