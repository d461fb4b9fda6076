"""Make mutants and see what becomes of each: `PYTHONPATH=tests python -m fuzz.run --count 50000 --out /tmp/fuzz`.

Each mutant has a process of its own, forked from one that has never computed, and is a function of its name
BASE:SEED:INDEX; `--one BASE:SEED:INDEX` does one of them again and keeps its file. A JSON line on stdout for each
finding, progress and a table of outcomes on stderr. The exit status is 1 if there are findings, 130 after Ctrl-C.
"""

import argparse
import faulthandler
import json
import math
import os
import random
import re
import resource
import selectors
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import Progress

import minerva_native as mn

from . import bases, exercise, mutate

MAX_RESIDENT_BYTES = 1 << 30  # more is a finding
MAX_MAPPED_BYTES = 6 << 30  # address space: room for stacks and mapped files, but no mutant exhausts the machine
STUCK_FACTOR = 8  # a deadlock uses no CPU time: a process is also stopped after this many times the limit by the clock
MAX_SAVED = 5  # files of one kind
MAX_SAVED_BYTES = 500_000_000

USEFUL = {"generates", "restores"}
TYPED = (mn.ModelLoadError, mn.TokenizerError, mn.ContextError, mn.SamplingError, mn.StateError)
UNEXPECTED = (mn.ReentryError, mn.SequencesInUseError)  # no file is a reason for these
ERRORS = {
    kind.__name__
    for kind in vars(mn).values()
    if isinstance(kind, type) and issubclass(kind, TYPED) and not issubclass(kind, UNEXPECTED)
}


@dataclass
class Mutant:
    """A mutant in its process, and what is known of it so far. One with a negative index is its base, unchanged."""

    base: bases.Base
    seed: int
    index: int
    folder: Path
    check: bool = True
    pid: int = 0
    pipe: int = -1
    started: float = 0.0
    lines: bytes = b""
    stuck: bool = False
    again: bool = False

    @property
    def name(self) -> str:
        return f"{self.base.name}:{self.seed}:{self.index}"

    @property
    def messages(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines.splitlines()]

    def told(self, name: str) -> Any:
        """Return the last value of that name that the process has told, if any."""
        return next((message[name] for message in reversed(self.messages) if name in message), None)

    def start(self, seconds: int, mapped_bytes: int, bystander: Path) -> None:
        """Fork the process that makes the mutant and uses it."""
        self.folder.mkdir()
        self.pipe, writer = os.pipe()
        self.started = time.monotonic()
        self.pid = os.fork()
        if self.pid:
            os.close(writer)
            return
        try:
            limit(seconds, mapped_bytes)
            log = os.open(self.folder / "stderr", os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            faulthandler.enable(2)
            live(self, writer, bystander)
        finally:
            os._exit(0)

    def write(self, rng: random.Random) -> tuple[Path, list[str]]:
        """Write the mutant's files; return the one to open and what was done to it."""
        parts = list(self.base.parts)
        if self.base.saved is not None:
            path = self.folder / "mutant.saved"
            data, done = mutate.mutate_saved(rng, self.base.saved) if self.index >= 0 else (self.base.saved, [])
            path.write_bytes(data)
            (self.folder / "model.gguf").write_bytes(parts[0])
            return path, done
        number = rng.randrange(len(parts))
        file = mutate.parse(parts[number])
        done = mutate.mutate(rng, file) if self.index >= 0 else []
        parts[number] = mutate.write(file)
        if len(parts) == 1:
            paths = [self.folder / "mutant.gguf"]
        else:
            paths = [self.folder / f"mutant-{at + 1:05}-of-{len(parts):05}.gguf" for at in range(len(parts))]
            done = [f"part {number + 1}: {line}" for line in done]
        for path, data in zip(paths, parts, strict=True):
            path.write_bytes(data)
        return paths[0], done


def limit(seconds: int, mapped_bytes: int) -> None:
    """Set this process's limits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver's business
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (mapped_bytes, mapped_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def live(mutant: Mutant, writer: int, bystander_path: Path) -> None:
    """Make a mutant, use it, and tell what comes of it through a pipe."""

    def tell(**message: object) -> None:
        os.write(writer, json.dumps(message).encode() + b"\n")

    def at(step: str) -> None:
        tell(step=step, resident_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)

    at("mutate")
    rng = random.Random(mutant.name)
    path, done = mutant.write(rng)
    how = exercise.Way(mmap=rng.random() < 0.7, check=mutant.check, n_threads=rng.choice((2, 3)))
    tell(mutations=done, how=how._asdict())
    try:
        if mutant.base.saved is not None:
            outcome = exercise.use_saved(mutant.base, mutant.folder / "model.gguf", path, at)
        else:
            at("bystander")
            bystander = exercise.Bystander(bystander_path)
            try:
                exercise.use_model(path, how, at)
                outcome = "generates"
            except mn.MinervaError as error:
                outcome = type(error).__name__
                tell(message=str(error))
            at("bystander afterwards")
            bystander.check()
    except AssertionError as error:
        traceback.print_exc()
        outcome = f"wrong: {error}"
    except BaseException as error:
        traceback.print_exc()
        frame = traceback.extract_tb(error.__traceback__)[-1]
        outcome = f"untyped:{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"
    tell(outcome=outcome)


ASSERTION = re.compile(r"([\w.-]+/[\w.-]+\.(?:c|cpp|h|hpp):\d+): (GGML_ASSERT\(.*\)|[^:\n]*)")
LAST_WORDS = re.compile(
    r"terminate called .*|what\(\):.*|SUMMARY: .*|.*(?:free|alloc\w*|corrupt\w*|smashing|unsorted|libgomp).*"
)
KIND = re.compile(r"(?:part \d+: )?(\w+).*", re.DOTALL)
FRAME = re.compile(r'File ".*/(minerva_native/\S+|fuzz/\S+)", line \d+ in (\S+)')


def cause(stderr: str, step: str) -> str:
    """Return what ended a process, by its last words: an assertion, or else the step and the innermost Python frame."""
    if found := ASSERTION.findall(stderr):
        return f"{found[-1][0]}: {found[-1][1]}"
    words = [line.strip() for line in stderr.splitlines() if LAST_WORDS.fullmatch(line.strip())]
    frame = FRAME.search(stderr)
    return "; ".join([step, *words[-2:], *([f"{frame[1]}:{frame[2]}"] if frame else [])])


def outcome_of(mutant: Mutant, status: int, resident_bytes: int) -> str:
    """Return what became of a mutant whose process has ended."""
    step = mutant.told("step") or "start"
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if mutant.stuck or number == signal.SIGXCPU:
        return f"hang: {step}"
    if resident_bytes > MAX_RESIDENT_BYTES:
        within = [
            each["step"] for each in mutant.messages if each.get("resident_bytes", math.inf) <= MAX_RESIDENT_BYTES
        ]
        return f"memory: {within[-1]}"
    outcome: str | None = mutant.told("outcome")
    if outcome is not None:
        return outcome
    how = signal.Signals(number).name if number else f"exit {os.waitstatus_to_exitcode(status)}"
    why = cause((mutant.folder / "stderr").read_text(errors="replace"), step)
    if number == signal.SIGABRT:
        return f"death: {how}: {why}"
    kinds = sorted({KIND.sub(r"\1", line) for line in mutant.told("mutations") or ()})
    return f"death: {how}: {why} ({', '.join(kinds)})"  # there are no last words to tell one from another


@dataclass
class Results:
    """The outcomes so far, and the folder that findings are kept in, or every mutant."""

    out: Path | None
    keeps_all: bool = False
    interrupted: bool = False
    outcomes: Counter[str] = field(default_factory=Counter)
    n_findings: int = 0
    saved_bytes: int = 0

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """Have the driver stop. What a handler raises is lost if the signal comes in a hook that runs at a fork."""
        self.interrupted = True

    def add(self, mutant: Mutant, outcome: str) -> None:
        if mutant.index < 0 and outcome in ERRORS:
            outcome = f"unfit base: {outcome}"
        self.outcomes[outcome] += 1
        is_finding = outcome not in USEFUL | ERRORS
        self.n_findings += is_finding
        if not (is_finding or self.keeps_all):
            return
        finding = {
            "mutant": mutant.name,
            "outcome": outcome,
            "mutations": mutant.told("mutations"),
            "how": mutant.told("how"),
            "step": mutant.told("step"),
            "message": mutant.told("message"),
            "reproduce": f"PYTHONPATH=tests python -m fuzz.run --one {mutant.name} --out DIR"
            + " --unchecked" * (not mutant.check),
        }
        if is_finding:
            print(json.dumps(finding), flush=True)
        if self.outcomes[outcome] <= MAX_SAVED:
            self.keep(mutant, finding)

    def keep(self, mutant: Mutant, finding: dict[str, object]) -> None:
        """Copy the files of a mutant and what is known of it to the folder for findings."""
        files = [
            path for path in mutant.folder.iterdir() if path.suffix in (".gguf", ".saved") and path.stem != "model"
        ]
        size = sum(path.stat().st_size for path in files)
        if self.out is None or self.saved_bytes + size > MAX_SAVED_BYTES:
            return
        self.saved_bytes += size
        name = mutant.name.replace(":", "-")
        for path in files:
            if path.name != "mutant.saved" or mutant.base.saved is not None:
                shutil.copyfile(path, self.out / path.name.replace("mutant", name))
        stderr = (mutant.folder / "stderr").read_text(errors="replace")[-3000:]
        (self.out / f"{name}.json").write_text(json.dumps({**finding, "stderr": stderr}, indent=1) + "\n")

    def summary(self) -> str:
        """Return the outcomes as a table in Markdown."""
        rows = [
            f"| {count} | {'' if outcome in USEFUL | ERRORS else 'finding'} | {outcome.replace('|', '/')} |"
            for outcome, count in self.outcomes.most_common()
        ]
        total = f"{self.outcomes.total()} mutants, {self.n_findings} findings"
        return "\n".join([total, "", "| count | | outcome |", "| ---: | --- | --- |", *rows, ""])

    def write_summary(self) -> None:
        if self.out is not None:
            (self.out / "SUMMARY.md").write_text(self.summary())


def run(
    todo: Iterator[Mutant], results: Results, options: argparse.Namespace, bystander: Path, progress: Progress
) -> None:
    """Take mutants through their processes, `options.jobs` at a time."""
    jobs, seconds = options.jobs, options.seconds
    mapped_bytes = resource.RLIM_INFINITY if options.sanitizer else MAX_MAPPED_BYTES
    task, alive = progress.task_ids[0], dict[int, Mutant]()
    suspects: list[Mutant] = []  # what took too long, to be given more time: the machine may have been busy
    selector = selectors.DefaultSelector()
    drawn = 0.0
    try:
        while not results.interrupted:
            while len(alive) < jobs and (mutant := suspects.pop() if suspects else next(todo, None)):
                mutant.start(seconds * 3 if mutant.again else seconds, mapped_bytes, bystander)
                alive[mutant.pipe] = mutant
                selector.register(mutant.pipe, selectors.EVENT_READ)
            if not alive:
                return
            for key, _ in selector.select(0.5):
                mutant = alive[key.fd]
                if data := os.read(mutant.pipe, 1 << 16):
                    mutant.lines += data
                    continue
                selector.unregister(mutant.pipe)
                os.close(mutant.pipe)
                _, status, usage = os.wait4(mutant.pid, 0)
                del alive[key.fd]
                outcome = outcome_of(mutant, status, usage.ru_maxrss * 1024)
                if outcome.startswith("hang") and not mutant.again:
                    shutil.rmtree(mutant.folder)
                    again = Mutant(mutant.base, mutant.seed, mutant.index, mutant.folder, mutant.check, again=True)
                    suspects.append(again)
                    continue
                results.add(mutant, outcome)
                shutil.rmtree(mutant.folder)
                progress.advance(task)
            now = time.monotonic()
            for mutant in alive.values():
                if not mutant.stuck and now - mutant.started > STUCK_FACTOR * seconds:
                    mutant.stuck = True
                    os.kill(mutant.pid, signal.SIGKILL)
            if now - drawn > 2:
                drawn = now
                progress.update(task, description=f"{results.n_findings} findings", refresh=True)
                results.write_summary()
    finally:
        for mutant in alive.values():
            os.kill(mutant.pid, signal.SIGKILL)
            os.waitpid(mutant.pid, 0)
        results.write_summary()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fuzz.run", description=__doc__, allow_abbrev=False)
    parser.add_argument("--count", type=int, default=2000, help="how many mutants (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--first", type=int, default=0, help="the index of the first (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=mn.available_cpus(), help="processes (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=5, help="CPU time for a mutant (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep the files of findings here, and SUMMARY.md")
    parser.add_argument("--base", action="append", help="only this base; may be given several times")
    parser.add_argument("--one", metavar="BASE:SEED:INDEX", help="this mutant alone, and keep its file")
    parser.add_argument("--unchanged", action="store_true", help="the bases themselves, all of which should generate")
    parser.add_argument("--unchecked", action="store_true", help="load with check=False: what is caught, not refused")
    parser.add_argument("--sanitizer", action="store_true", help="the binding has a sanitizer, which maps terabytes")
    return parser.parse_args()


def chosen(options: argparse.Namespace, every: list[str]) -> Sequence[tuple[str, int, int]]:
    """Return the names of the mutants that are asked for: base, seed and index."""
    if options.one:
        name, seed, index = options.one.split(":")
        return [(name, int(seed), int(index))]
    wanted = [name for name in every if not options.base or name in options.base]
    if options.unchanged:
        return [(name, options.seed, -1) for name in wanted]
    indices = range(options.first, options.first + options.count)
    return [(wanted[index % len(wanted)], options.seed, index) for index in indices]


def main() -> int:
    options = arguments()
    os.environ["GGML_NO_BACKTRACE"] = "1"  # by a debugger, which takes a second
    every = bases.bases()
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out, keeps_all=bool(options.one))
    signal.signal(signal.SIGINT, results.interrupt)
    signal.signal(signal.SIGTERM, results.interrupt)
    # In memory if that is to be had: `Sequence.save` waits for the disk.
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as name:
        folder = Path(name)
        bystander = folder / "bystander.gguf"
        bystander.write_bytes(every[0].parts[0])
        names = chosen(options, [base.name for base in every])
        of = {base.name: base for base in every}
        todo = (
            Mutant(of[name], seed, index, folder / f"{name}{index}", not options.unchecked)
            for name, seed, index in names
        )
        # No thread that refreshes it: what a thread holds at a fork, the child waits for in vain.
        progress = Progress(console=Console(stderr=True), auto_refresh=False)
        progress.add_task("", total=len(names))
        with progress:
            run(todo, results, options, bystander, progress)
    print(results.summary(), file=sys.stderr)
    return 130 if results.interrupted else int(results.n_findings > 0)


if __name__ == "__main__":
    sys.exit(main())
