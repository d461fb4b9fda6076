"""What speculation saves and costs: `python bench/speculative.py MODEL.gguf [--llama-server PATH]`.

Two tasks, against plain decoding in turns: a text that repeats what is in the prompt with a word changed, and a story
that cannot be guessed, greedily. So that a small model repeats faithfully, the first is dictated by the sampler; its
logits are computed all the same. With `--copy` a model (SmolLM2) also copies the text by itself. Ratios are medians of
pairs, with the smallest and the largest in brackets.

With `--parallel N` the same for N requests at once, which the model answers itself: copies (for SmolLM2) and stories.

With `--llama-server` also a request that the model itself answers by copying (for SmolLM2), in turns with upstream's
server: plain, and with `--spec-type ngram-simple`. Its times are those that it reports for the tokens of the answer.
"""

import argparse
import contextlib
import json
import math
import re
import statistics
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import minerva_native as mn
from upstream import llama_server

PARAGRAPH = (
    "The river rises in the northern hills near the village of Alderby and flows south for about ninety miles before "
    "it reaches the sea. Along its course it passes three small towns, two old mills, and a long stretch of meadow "
    "that floods every winter. In the spring the water is cold and clear, and trout can be seen from the stone bridge "
    "at Harrow. The people who live beside it say that the river remembers every storm, and that on quiet nights you "
    "can hear the bells of the drowned church at Saint Osyth, which the flood of 1287 carried away in a single night."
)
COPY = (
    "<|im_start|>user\nRepeat this text, with the word 'mills' replaced by 'bridges':\n\n"
    f"{PARAGRAPH}<|im_end|>\n<|im_start|>assistant\n"
)
N_COPIED = 124  # tokens of the answer
STORY = "Write a long story about a lighthouse keeper who finds a strange machine on the beach."


class Dictated:
    """A sampler that draws what it is told, whatever the logits are."""

    def __init__(self, tokens: list[int]):
        self._rest = iter(tokens)

    def __call__(self, logits: object, tokens: object) -> int:
        return next(self._rest)


def over(ones: list[float], others: list[float]) -> str:
    """Return the median of how many times as long the others took, with the smallest and the largest."""
    ratios = [other / one for one, other in zip(ones, others, strict=True)]
    return f"{statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]"


def ours(sequence: mn.Sequence, speculate: str | None) -> tuple[float, str]:
    """Return the seconds that the answer takes, and the answer."""
    sequence.assign(sequence.context.model.tokenizer.encode(COPY, parse_special=True))
    _ = sequence.logits
    speculation = mn.Speculation(speculate) if speculate else None
    before = time.perf_counter()
    steps = mn.generate(sequence, mn.SamplingParams.greedy(), max_tokens=N_COPIED, speculate=speculation)
    text = "".join(step.text for step in steps)
    return time.perf_counter() - before, text


def theirs(address: str) -> tuple[float, str]:
    """Return the same of llama-server, which has the prompt cached."""
    body = json.dumps({"prompt": COPY, "n_predict": N_COPIED, "temperature": 0.0}).encode()
    request = urllib.request.Request(f"http://{address}/completion", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        answer = json.load(response)
    return answer["timings"]["predicted_ms"] / 1e3, answer["content"]


def compare(sequence: mn.Sequence, model: str, binary: str, n_threads: int, pairs: int) -> None:
    """Print how this package and upstream's server do with a request that is answered by copying."""
    common = (binary, model, n_threads, "-c", "2048", "-np", "1")
    with contextlib.ExitStack() as stack:
        plain = stack.enter_context(llama_server(*common))
        guessing = stack.enter_context(llama_server(*common, "--spec-type", "ngram-simple"))
        ways: dict[str, Callable[[], tuple[float, str]]] = {
            "ours, lookup": lambda: ours(sequence, "lookup"),
            "ours, plain": lambda: ours(sequence, None),
            "theirs, ngram-simple": lambda: theirs(guessing),
            "theirs, plain": lambda: theirs(plain),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        texts: dict[str, set[str]] = {name: set() for name in ways}
        for at in range(pairs + 1):
            for name, way in ways.items() if at % 2 else reversed(ways.items()):
                took, text = way()
                if at:
                    seconds[name].append(took)
                    texts[name].add(text)
    for name, some in seconds.items():
        print(f"copy, {name}: {N_COPIED / statistics.median(some):.1f} tokens/s")
    first = seconds["ours, lookup"]
    print("  ours with lookup over ours plain:", over(first, seconds["ours, plain"]))
    print(
        "  theirs with ngram-simple over theirs plain:", over(seconds["theirs, ngram-simple"], seconds["theirs, plain"])
    )
    print("  ours with lookup over theirs with ngram-simple:", over(first, seconds["theirs, ngram-simple"]))
    print("  the same text in all:", len(set.union(*texts.values())) == 1)


def together(model: mn.Model, n_parallel: int, n_threads: int, pairs: int) -> None:
    """Print what guesses do for several requests at once, whose prompts are cached."""
    options: dict[str, Any] = {"n_ctx": 1024 * n_parallel, "n_parallel": n_parallel, "n_threads": n_threads}
    words = ("mills", "river", "towns", "water", "bridge", "people", "storm", "night")[:n_parallel]
    bias = {token: -math.inf for token in range(model.tokenizer.n_vocab) if model.tokenizer.is_end(token)}
    tasks: dict[str, tuple[list[str], dict[str, Any]]] = {
        "copies": ([COPY.replace("'mills'", f"'{word}'") for word in words], {"max_tokens": N_COPIED}),
        "stories": ([f"{STORY} It has to do with {word}." for word in words], {"max_tokens": 150, "logit_bias": bias}),
    }
    with mn.LLM(model, **options) as plain, mn.LLM(model, speculate="lookup", **options) as guessing:
        for task, (texts, asked) in tasks.items():
            prompts = [model.tokenizer.encode(text, parse_special=True) for text in texts]
            seconds: dict[mn.LLM, list[float]] = {plain: [], guessing: []}
            answers: dict[mn.LLM, list[mn.Completion]] = {}
            passes: dict[mn.LLM, int] = {}
            for at in range(pairs + 1):
                for llm in (plain, guessing) if at % 2 else (guessing, plain):
                    calls, before = llm.context.stats.decode_calls, time.perf_counter()
                    answers[llm] = llm.map(prompts, temperature=0, progress=False, **asked)
                    seconds[llm].append(time.perf_counter() - before)
                    passes[llm] = llm.context.stats.decode_calls - calls
            same = sum(one.tokens == other.tokens for one, other in zip(*answers.values(), strict=True))
            drafted = sum(answer.usage.drafted for answer in answers[guessing])
            accepted = sum(answer.usage.accepted for answer in answers[guessing])
            n = sum(len(answer.tokens) for answer in answers[guessing])
            ratio = over(seconds[guessing][1:], seconds[plain][1:])
            print(f"{n_parallel} {task}: {ratio} times plain decoding's speed; {passes[guessing]} passes instead of "
                  f"{passes[plain]}; {accepted} of {drafted} guessed tokens right, of {n}; "
                  f"{same} of {len(prompts)} texts the same")  # fmt: skip


def passes_take(sequence: mn.Sequence, clock: Callable[[], float], repetitions: int) -> None:
    """Print how much longer a pass takes over several tokens, all with logits, than over one: the shortest of each."""
    sequence.extend([1000 + at for at in range(200)])
    _ = sequence.logits
    n, seconds = len(sequence), dict[int, float]()
    for _ in range(repetitions):
        for n_rows in (1, 2, 5, 9, 17, 33):
            sequence.append(999)
            before = clock()
            _ = sequence.logits_after([1000 + at for at in range(n_rows - 1)]) if n_rows > 1 else sequence.logits
            seconds[n_rows] = min(clock() - before, seconds.get(n_rows, math.inf))
            sequence.truncate(n)
    print("; ".join(f"{n_rows} tokens: {value / seconds[1]:.2f}" for n_rows, value in seconds.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--llama-server", help="upstream's server, of the same source and flags")
    parser.add_argument("--passes", action="store_true", help="how much longer passes over several tokens take")
    parser.add_argument("--copy", action="store_true", help="a third task, for SmolLM2")
    parser.add_argument("--parallel", type=int, help="so many requests at once, up to 8")
    parser.add_argument("--cpu-time", action="store_true", help="for use with --threads 1: other load matters little")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    model = mn.Model.load(arguments.model)
    if arguments.parallel:
        together(model, arguments.parallel, arguments.threads, arguments.pairs)
        return
    tokenizer = model.tokenizer
    edited = re.sub("mills", "bridges", PARAGRAPH)
    edit = tokenizer.encode(f"{PARAGRAPH}\n\nThe same with one word changed:\n\n")
    copied = tokenizer.encode(edited, add_special=False)
    prompts = {"edit": edit, "story": tokenizer.encode(STORY)}
    if arguments.copy:
        prompts["copy"] = tokenizer.encode(COPY, parse_special=True)
    options = {"n_ctx": 2048, "n_threads": arguments.threads, "n_rs_seq": 8}
    with model.context(**options) as context, context.sequence() as sequence:

        def take(task: str, speculation: mn.Speculation | None) -> tuple[float, list[int]]:
            sequence.assign(prompts[task])
            _ = sequence.logits
            n_before, n = len(sequence), {"edit": len(copied), "copy": N_COPIED, "story": 200}[task]
            bias = {token: -math.inf for token in range(tokenizer.n_vocab) if tokenizer.is_end(token)}
            greedy = mn.Sampler(mn.SamplingParams(temperature=0.0, logit_bias=bias))
            sampler = Dictated(copied) if task == "edit" else greedy
            before, calls = clock(), context.stats.decode_calls
            for _ in mn.generate(sequence, sampler, max_tokens=n, speculate=speculation):
                pass
            passes.append(context.stats.decode_calls - calls)
            return clock() - before, sequence[n_before:]

        if arguments.passes:
            passes_take(sequence, clock, arguments.pairs)
            return
        if arguments.llama_server:
            compare(sequence, arguments.model, arguments.llama_server, arguments.threads, arguments.pairs)
            return

        passes = list[int]()
        for task in prompts:
            ratios, same, needed = list[float](), 0, list[int]()
            for at in range(arguments.pairs + 1):
                speculation = mn.Speculation("lookup")
                if at % 2:
                    plain, guessed = take(task, None), take(task, speculation)
                    n_passes = passes[-1]
                else:
                    guessed, plain = take(task, speculation), take(task, None)
                    n_passes = passes[-2]
                if at:
                    needed.append(n_passes)
                    ratios.append(plain[0] / guessed[0])
                    same += plain[1] == guessed[1]
            median = statistics.median(ratios)
            print(f"{task}: {median:.3f} [{min(ratios):.3f}, {max(ratios):.3f}] times plain decoding's speed; "
                  f"{len(guessed[1])} tokens in {statistics.median(needed):g} passes, {speculation.accepted} of "
                  f"{speculation.drafted} guesses right; "
                  f"the same text in {same} of {arguments.pairs} pairs")  # fmt: skip


if __name__ == "__main__":
    main()
