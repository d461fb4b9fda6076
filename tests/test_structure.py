"""The shape of the house: who imports whom, whose names are used where, and what a token costs in Python calls."""

import ast
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import minerva_native as mn
from minerva_native.requests import RequestQueue
from minerva_native.scheduler import Scheduler

PACKAGE = Path(mn.__file__).parent
if not (PACKAGE / "_binding" / "generate.py").exists():  # installed: the checkout has the same files, and this one
    PACKAGE = Path(__file__).parents[1] / "src" / "minerva_native"
ROOT = Path(__file__).parents[1]

# A module imports from a lower layer, or from its own without a circle.
LAYERS = {
    "_binding": 1,
    "_arguments": 0,
    "_json": 0,
    "_handle": 1,
    "_stack": 1,
    "errors": 0,
    "compute": 1,
    "devices": 2,
    "gguf": 2,
    "check": 3,
    "tokenizer": 2,
    "options": 2,
    "rpc": 3,
    "fit": 3,
    "model": 4,
    "engine": 4,
    "sampling": 4,
    "sequence": 5,
    "context": 6,
    "generation": 7,
    "chat_text": 8,
    "chat_sandbox": 8,
    "chat": 8,
    "requests": 8,
    "completion": 8,
    "observer": 8,
    "reasoning": 8,
    "grammars": 8,
    "schemas": 8,
    "typed": 1,
    "structured": 8,
    "tools": 8,
    "calling": 8,
    "speculative": 8,
    "draft": 8,
    "prompt_cache": 8,
    "conversation": 8,
    "beams": 8,
    "scheduler": 8,
    "llm": 9,
    "__init__": 10,
    "telemetry": 11,
    "wire": 11,
    "chunks": 11,
    "backends": 11,
    "benchmark": 11,
    "server": 11,
    "cli": 12,
    "__main__": 13,
}

LAZY = {("model", "context")}  # what is made from a model lies above it

ONLY_TYPES = {  # upward, for annotations alone
    ("options", "model"),
    ("fit", "model"),
    ("options", "sequence"),
    ("model", "context"),
    ("sequence", "context"),
    ("conversation", "llm"),
    ("__init__", "telemetry"),  # found by name, as all that is loaded late
    ("__init__", "backends"),
    ("__init__", "chunks"),
}

ON_PUBLIC_NAMES = ("backends", "chunks", "wire")  # over the package as its users know it


class Import(ast.NodeVisitor):
    """The imports of one module, as (name of the module in this package, how)."""

    def __init__(self, path: Path):
        self.parts = path.relative_to(PACKAGE).with_suffix("").parts
        self.found: set[tuple[str, str]] = set()
        self.how = "top"
        self.visit(ast.parse(path.read_text()))

    def visit_If(self, node: ast.If) -> None:
        how = self.how
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            self.how = "types"
        self.generic_visit(node)
        self.how = how

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        how = self.how
        self.how = "lazy" if how == "top" else how
        self.generic_visit(node)
        self.how = how

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level:
            base = [*self.parts[: len(self.parts) - node.level], *(node.module or "").split(".")]
        elif (node.module or "").split(".")[0] == "minerva_native":
            base = (node.module or "").split(".")[1:]
        else:
            return
        base = [part for part in base if part]
        for name in [alias.name for alias in node.names] if not base or is_folder(base) else [""]:
            target = [*base, name] if name and is_module([*base, name]) else base
            self.found.add((".".join(target) or "__init__", self.how))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.split(".")[0] == "minerva_native":
                self.found.add((".".join(alias.name.split(".")[1:]) or "__init__", self.how))


def is_folder(parts: list[str]) -> bool:
    return PACKAGE.joinpath(*parts).is_dir()


def is_module(parts: list[str]) -> bool:
    return is_folder(parts) or PACKAGE.joinpath(*parts).with_suffix(".py").exists()


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[-1] not in ("_build_info", "generate") or parts[0] != "_binding":
            yield ".".join(part for part in parts if part != "__init__") or "__init__", path


def layer(module: str) -> int:
    return LAYERS[module.split(".")[0]]


IMPORTS = {name: Import(path).found for name, path in modules()}


def test_no_module_imports_from_above() -> None:
    wrong = [
        (name, target)
        for name, found in IMPORTS.items()
        for target, how in found
        if how == "top" and layer(target) > layer(name)
    ]
    assert not wrong


def test_what_is_imported_for_types_from_above_is_listed() -> None:
    found = {
        (name, target)
        for name, found in IMPORTS.items()
        for target, how in found
        if how == "types" and layer(target) > layer(name)
    }
    assert found == ONLY_TYPES


def test_only_a_model_imports_lazily_from_this_package() -> None:
    lazy = {
        (name, target)
        for name, found in IMPORTS.items()
        for target, how in found
        if how == "lazy" and layer(name) < LAYERS["benchmark"]  # a command loads what it needs
    }
    assert lazy == LAZY


def test_no_modules_import_each_other_in_a_circle() -> None:
    finished: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name not in finished:
            for target, how in IMPORTS.get(name, set()):
                if how == "top" and not name.startswith(f"{target}."):
                    walk(target, (*trail, name))
            finished.add(name)

    for name in IMPORTS:
        walk(name, ())


def test_the_samplers_need_nothing_of_the_package_but_its_errors_and_checks() -> None:
    found = {target for name, targets in IMPORTS.items() if name.split(".")[0] == "sampling" for target, _ in targets}
    assert {name for name in found if name.split(".")[0] != "sampling"} == {"errors", "_arguments"}


# What is called of libllama without a guard looks something up, or frees it. An assertion in one of them ends
# the process, so each was read before it came here. `devices` measures before there is a model.
UNGUARDED = re.compile(
    r"minerva_\w+|llama_(free|log_set|max_parallel_sequences|max_devices|ftype_name)"
    r"|llama_vocab_\w+|llama_model_(n_\w+|has_\w+|is_\w+|size|desc|ftype|get_vocab|meta_val_str|rope_type|free"
    r"|decoder_start_token|default_params)|llama_(get_memory|get_logits_ith|n_ctx_seq|context_default_params)"
    r"|llama_memory_(can_shift|seq_cp|seq_pos_min|seq_pos_max)|gguf_(get_\w+|find_\w+|type_name|free)"
    r"|ggml_(type_\w+|blck_size|is_quantized|backend_(reg_(count|get|name|dev_count)|dev_by_type))"
)


def test_what_can_fail_in_libllama_is_called_with_a_guard() -> None:
    calls = [
        (path.name, node.attr)
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name not in ("devices.py", "generate.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lib"
    ]
    functions = [(file, name) for file, name in calls if not name.isupper()]
    assert len(functions) > 50
    assert not [(file, name) for file, name in functions if not UNGUARDED.fullmatch(name)]


def private_names_of_others(path: Path) -> Iterator[str]:
    """Underscore names that a file takes from objects other than `self`, and does not define itself."""
    tree = ast.parse(path.read_text())
    own = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_self(node.value)}
    own |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {name for node in ast.walk(tree) if isinstance(node, ast.Assign) for name in slots_in(node)}
    lines = path.read_text().splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and not is_self(node.value):
            is_explained = "fast path" in lines[node.lineno - 1] or "_is_owned" in lines[node.lineno - 1]
            if node.attr not in own and not is_explained and ast.unparse(node) != "os._exit":
                yield f"{path.name}:{node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if is_private(alias.name) and alias.name not in ("_binding", "_handle", "_llama", "_build_info"):
                    yield f"{path.name}:{node.lineno}: {alias.name}"


def slots_in(node: ast.Assign) -> set[str]:
    if any(isinstance(target, ast.Name) and target.id == "__slots__" for target in node.targets):
        return {str(item.value) for item in ast.walk(node.value) if isinstance(item, ast.Constant)}
    return set()


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


PROTOCOLS = ("_asdict", "_replace", "_fields", "_repr_markdown_")  # of named tuples and of notebooks


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PROTOCOLS


@pytest.mark.parametrize("folder", [PACKAGE, ROOT / "tests", ROOT / "bench"], ids=lambda folder: folder.name)
def test_nobody_reaches_into_what_is_private(folder: Path) -> None:
    assert not [use for path in sorted(folder.rglob("*.py")) for use in private_names_of_others(path)]


def test_a_slot_is_changed_by_its_own_methods_alone() -> None:
    fields = {"tokens", "n_cached", "n_seen", "n_exact", "in_sync", "logits", "row", "runs", "checkpoints", "key", "id"}
    fields |= {"pinned", "closed", "owner"}
    found = []
    for path in sorted((PACKAGE).rglob("*.py")):
        if path.name == "slot.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            targets: list[ast.expr] = []
            if isinstance(node, ast.Assign):
                targets = node.targets
            elif isinstance(node, ast.AugAssign | ast.AnnAssign):
                targets = [node.target]
            for target in targets:
                for item in ast.walk(target):
                    if (
                        isinstance(item, ast.Attribute)
                        and item.attr in fields
                        and isinstance(item.value, ast.Name)
                        and item.value.id in ("slot", "source", "forked", "kept", "old", "oldest", "other")
                    ):
                        found.append(f"{path.name}:{item.lineno}")
    assert not found


def test_the_kind_of_a_memory_is_asked_for_in_one_file() -> None:
    found = []
    for _, path in modules():
        if path.name == "memory.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare) and any(
                isinstance(part, ast.Attribute) and part.attr == "kind" and "memory" in ast.unparse(part.value)
                for part in (node.left, *node.comparators)
            ):
                found.append(f"{path.name}:{node.lineno}")
    assert not found


@pytest.mark.parametrize("part", ["benchmark", "cli", "server", "telemetry", *ON_PUBLIC_NAMES])
def test_what_people_run_uses_the_public_names_alone(part: str) -> None:
    public = {*mn.__all__}
    for name, path in modules():
        if name.split(".")[0] != part:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("minerva_native"):
                inner = (node.module or "").split(".")[1:]
                names = {alias.name for alias in node.names}
                assert not inner or inner[0] in ("benchmark", "cli", "server"), f"{path.name}:{node.lineno}"
                if not inner:
                    names -= {"benchmark"}
                    assert names <= public, f"{path.name}:{node.lineno}: {names - public}"


def test_backends_know_no_more_than_the_public_names() -> None:
    found = {target for name in ON_PUBLIC_NAMES for target, _ in IMPORTS[name]}
    assert found - {*ON_PUBLIC_NAMES} == {"__init__", "_arguments"}


# What a token costs: a call of Python's takes some 50 ns when it is warm, and after each token nothing is.


def calls_of(action: Callable[[], object]) -> int:
    count = 0

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        # A computation that takes long, as beside other work, is asked now and then whether to stop.
        count += event == "call" and frame.f_code.co_name not in ("_on_poll", "is_cancelled")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(before)
    return count


def test_a_token_of_generate_takes_few_python_calls(demo: mn.Model) -> None:
    with demo.context(n_ctx=128, n_threads=1) as context, context.sequence() as sequence:
        sequence.extend([1, 2, 3])
        steps = mn.generate(sequence, lambda logits, tokens: 40, max_tokens=60)
        next(steps)
        next(steps)

        def generate() -> None:
            for _ in range(50):  # who keeps the steps has their log-probabilities computed
                next(steps)

        assert calls_of(generate) <= 17 * 50 + 1


def test_a_round_of_eight_requests_takes_few_python_calls(demo: mn.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = list[int]()
    do_round = vars(Scheduler)["_round"]

    def counted(scheduler: Scheduler, queue: RequestQueue) -> None:
        counts.append(calls_of(lambda: do_round(scheduler, queue)))

    monkeypatch.setattr(Scheduler, "_round", counted)
    with mn.LLM(demo, n_ctx=2048, n_parallel=8, n_threads=1) as llm:
        bias = {token: -float("inf") for token in range(llm.tokenizer.n_vocab) if llm.tokenizer.is_end(token)}
        options: dict[str, Any] = {"max_tokens": 40, "temperature": 0.0, "logit_bias": bias}
        streams = [llm.stream([300 + at] * 8, **options) for at in range(8)]
        assert sum(len(list(stream)) for stream in streams) == 8 * 40
    assert sorted(counts)[len(counts) // 2] <= 8 * 46


def test_extending_by_a_token_takes_few_python_calls(demo: mn.Model) -> None:
    with demo.context(n_ctx=128, n_threads=1) as context, context.sequence() as sequence:
        sequence.extend([1, 2, 3])
        assert calls_of(lambda: [sequence.extend([40]) for _ in range(50)]) <= 6 * 50 + 2


def test_extending_eight_sequences_by_a_token_each_takes_few_python_calls(demo: mn.Model) -> None:
    with demo.context(n_ctx=512, n_seq=8, n_threads=1, prefix_cache=False) as context:
        sequences = [context.sequence() for _ in range(8)]
        context.extend({sequence: [1, 2] for sequence in sequences})
        tokens: dict[mn.Sequence, list[int]] = {sequence: [40] for sequence in sequences}
        assert calls_of(lambda: context.extend(tokens)) <= 5 + 8 * 4
