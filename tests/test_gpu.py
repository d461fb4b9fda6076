"""On a GPU: layers are where they are said to be, and what it computes is what the CPU computes.

For a build with a GPU. Mesa's software device is one to Vulkan, with GGML_VK_VISIBLE_DEVICES=0.
"""

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest

import minerva_native as mn
from minerva_native.cli import main
from minerva_native.model import DRAFT_PATH
from tiny_models import TinyModel

GPUS = [device for device in mn.devices() if device.type in ("gpu", "igpu")]
IS_SOFTWARE = any("llvmpipe" in device.description for device in GPUS)  # Mesa's
BACKENDS = ", ".join(mn.build_info()["backends"])

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not GPUS, reason=f"this build, with {BACKENDS}, has no GPU on this machine"),
]

# By how much logits may differ: the root mean square, as a multiple of their standard deviation.
FROM_THE_CPU = 0.05  # which rounds what it multiplies with Q8_0 to 8 bits: that alone makes 0.01 to 0.02
FROM_THE_CPU_IN_4_BITS = 0.2  # keys and values in Q4_0 make 0.14 on either, and round some the other way
FROM_THE_CPU_IN_F32 = 0.01  # nothing is rounded, but CUDA may multiply with 10 bits of mantissa (TF32)
FROM_ITSELF = 0.03  # a token alone takes another kernel than one in a batch, which may round as well

GREEDY = mn.SamplingParams.greedy()
PROMPTS = (
    "Once upon a time",
    "The",
    "One day, a little girl named Emma went to the park with her dog.",
    '"Hello," said the cat. "What is your name?" Tom did not know what to say, because he had never met a cat that '
    "could talk. He looked at the cat for a long time. Then he said his name, and the cat smiled.",
)

Logits = npt.NDArray[np.float32]


def distance(ours: Logits, theirs: Logits) -> float:
    assert np.isfinite(ours).all()
    return float(np.sqrt(((ours - theirs) ** 2).mean()) / theirs.std())


@pytest.fixture(scope="module")
def gpu() -> Iterator[mn.Model]:
    """The built-in model on the first GPU."""
    with mn.Model.load(mn.DEMO_PATH, devices=[GPUS[0].name], gpu_layers=-1) as model:
        yield model


@pytest.fixture(scope="module")
def cpu() -> Iterator[mn.Model]:
    """The same on the CPU alone."""
    with mn.Model.load(mn.DEMO_PATH, devices=[]) as model:
        yield model


@pytest.fixture
def context(gpu: mn.Model) -> Iterator[mn.Context]:
    with gpu.context(n_ctx=512, n_seq=4, n_threads=1) as context:
        yield context


@pytest.fixture(scope="module")
def ids(gpu: mn.Model) -> list[int]:
    return gpu.tokenizer.encode(PROMPTS[-1])


def rows(model: mn.Model, ids: Sequence[int], **options: Any) -> Logits:
    """Return the logits after each token of a text, which a new context evaluates at once."""
    with model.context(n_ctx=512, n_threads=1, **options) as context, context.sequence() as sequence:
        sequence.extend(ids[:1])
        return sequence.logits_after(ids[1:])


def written(model: mn.Model, ids: list[int], n: int = 40, **options: Any) -> list[int]:
    """Return the text that a new context writes, without drawing."""
    with model.context(n_ctx=512, n_threads=1) as context, context.sequence() as sequence:
        sequence.extend(ids)
        return [step.token for step in mn.generate(sequence, GREEDY, max_tokens=n, **options)]


def assert_written_alike(model: mn.Model, ids: list[int], ours: list[int], theirs: list[int]) -> None:
    """Two texts are equal, or differ first at a token for which the model sees two that are as likely."""
    differing = [index for index, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]]
    if differing:
        at = differing[0]
        logits = rows(model, [*ids, *theirs[:at]])[-1]
        assert abs(logits[ours[at]] - logits[theirs[at]]) < 4 * FROM_THE_CPU * logits.std()
    else:
        assert len(ours) == len(theirs)


# Where it is


def test_the_first_gpu_has_all_layers_the_cache_and_the_output(gpu: mn.Model, context: mn.Context) -> None:
    here, there = context.placement
    assert (here.device, here.layers, here.has_output, here.cache_bytes) == ("CPU", 0, False, 0)
    assert (there.device, there.layers, there.has_output) == (GPUS[0].name, gpu.n_layer, True)
    assert there.description == GPUS[0].description
    assert there.cache_bytes == 512 * 2048  # 4 layers, keys and values of 128 numbers in f16
    assert there.buffer_bytes > 0
    assert there.size_bytes + here.size_bytes >= gpu.size_bytes


@pytest.mark.parametrize("path", [mn.DEMO_PATH, DRAFT_PATH], ids=lambda path: path.stem)
def test_auto_puts_all_of_a_small_model_there(path: Path) -> None:
    with mn.Model.load(path) as model:
        assert model.gpu_layers == model.n_layer + 1
        assert sum(part.layers for part in model.placement[1:]) == model.n_layer


@pytest.mark.parametrize("layers", range(6))
def test_some_layers_can_stay_here(cpu: mn.Model, ids: list[int], layers: int) -> None:
    with mn.Model.load(mn.DEMO_PATH, devices=[GPUS[0].name], gpu_layers=layers) as model:
        here, *there = model.placement
        assert here.layers == min(4, 5 - layers)  # the output counts as one
        assert sum(part.layers for part in there) == max(0, layers - 1)
        assert distance(rows(model, ids), rows(cpu, ids)) < FROM_THE_CPU


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 128 small layers, whose keys and values take 32,768 bytes a token."""
    return TinyModel(n_layer=128).write(tmp_path_factory.mktemp("deep") / "deep.gguf")


# Its KV cache is a little larger than the GPU's memory.
TOO_LONG = mn.ContextOptions(n_ctx=GPUS[0].memory_total_bytes // 32_768 + 256 if GPUS else 2, n_batch=64, n_threads=1)


def test_more_than_fits_is_refused_with_what_would_fit(deep: Path) -> None:
    with pytest.raises(mn.DeviceError, match=r"ask for at most gpu_layers=\d") as caught:
        mn.Model.load(deep, devices=[GPUS[0].name], gpu_layers=-1, context=TOO_LONG)
    assert GPUS[0].description in str(caught.value)


def test_auto_leaves_here_what_does_not_fit(deep: Path) -> None:
    with mn.Model.load(deep, devices=[GPUS[0].name], context=TOO_LONG) as model:
        assert model.gpu_layers < 128


def test_a_command_says_where_the_model_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "-p", "Once", "-n", "2", "--temp", "0", "-c", "256"]) == 0
    assert "0 layers on CPU" in (line := capsys.readouterr().err.splitlines()[0])
    assert f"on {GPUS[0].name} ({GPUS[0].description})" in line


# What it computes


@pytest.mark.parametrize("path", [mn.DEMO_PATH, DRAFT_PATH], ids=lambda path: path.stem)
@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_it_computes_what_the_cpu_computes(path: Path, prompt: str) -> None:
    with mn.Model.load(path, devices=[GPUS[0].name]) as gpu, mn.Model.load(path, devices=[]) as cpu:
        ids = gpu.tokenizer.encode(prompt)
        assert distance(rows(gpu, ids), rows(cpu, ids)) < FROM_THE_CPU
        assert_written_alike(cpu, ids, written(gpu, ids), written(cpu, ids))


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3moe", "mamba", "jamba", "gpt2"])
def test_kinds_of_models(tmp_path: Path, architecture: str) -> None:
    if architecture == "qwen3moe" and IS_SOFTWARE:
        pytest.skip("llvmpipe takes many minutes to compile the shader that chooses experts")
    path = TinyModel(architecture, tied=architecture == "gemma2").write(tmp_path / "tiny.gguf")
    ids = list(range(20, 60))
    with mn.Model.load(path, devices=[GPUS[0].name]) as gpu, mn.Model.load(path, devices=[]) as cpu:
        assert distance(rows(gpu, ids), rows(cpu, ids)) < FROM_THE_CPU_IN_F32


@pytest.mark.parametrize(
    ("kv_type", "flash_attention"),
    [
        ("f16", "on"),
        ("f16", "off"),
        ("f32", "off"),
        ("q8_0", "auto"),
        ("q4_0", "on"),
        (("q8_0", "f16"), "auto"),
    ],
    ids=str,
)
def test_options_of_the_cache(
    gpu: mn.Model, cpu: mn.Model, ids: list[int], kv_type: Any, flash_attention: Literal["auto", "on", "off"]
) -> None:
    options = {"kv_type": kv_type, "flash_attention": flash_attention}
    tolerance = FROM_THE_CPU_IN_4_BITS if kv_type == "q4_0" else FROM_THE_CPU
    assert distance(rows(gpu, ids, **options), rows(cpu, ids, **options)) < tolerance


# The KV cache there


def test_what_is_undone_leaves_no_trace(gpu: mn.Model, context: mn.Context, ids: list[int]) -> None:
    sequence = context.sequence()
    sequence.extend(ids)
    sequence.truncate(10)
    sequence.extend([5, 6, 7])
    sequence.rewind(3)
    sequence.extend(ids[10:])
    assert distance(sequence.logits, rows(gpu, ids)[-1]) < FROM_ITSELF


def test_a_shift_is_what_the_cpu_makes_of_it(gpu: mn.Model, cpu: mn.Model, ids: list[int]) -> None:
    shifted = []
    for model in (gpu, cpu):
        with model.context(n_ctx=512, n_threads=1) as context, context.sequence() as sequence:
            sequence.extend(ids)
            sequence.shift(4, 10)
            sequence.extend([7])
            shifted.append(sequence.logits)
    assert distance(*shifted) < FROM_THE_CPU


def test_a_fork_goes_its_own_way(gpu: mn.Model, context: mn.Context, ids: list[int]) -> None:
    sequence = context.sequence()
    sequence.extend(ids)
    fork = sequence.fork(20)
    fork.extend([5, 6, 7])
    sequence.extend([8])
    assert distance(fork.logits, rows(gpu, [*ids[:20], 5, 6, 7])[-1]) < FROM_ITSELF
    assert distance(sequence.logits, rows(gpu, [*ids, 8])[-1]) < FROM_ITSELF


def test_a_prefix_that_was_evaluated_is_reused(gpu: mn.Model, context: mn.Context, ids: list[int]) -> None:
    with context.sequence() as sequence:
        sequence.extend(ids)
    before = context.stats.tokens_evaluated
    with context.sequence() as sequence:
        sequence.extend([*ids[:-5], 5, 6])
        assert distance(sequence.logits, rows(gpu, [*ids[:-5], 5, 6])[-1]) < FROM_ITSELF
    assert context.stats.tokens_evaluated - before == 2


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_what_is_saved_there_is_restored_there_and_here(
    gpu: mn.Model, cpu: mn.Model, ids: list[int], tmp_path: Path, kv_type: str
) -> None:
    with gpu.context(n_ctx=512, n_threads=1, kv_type=kv_type) as context, context.sequence() as sequence:
        sequence.extend(ids)
        sequence.save(tmp_path / "saved")
    expected = rows(gpu, [*ids, 5], kv_type=kv_type)[-1]
    for model, tolerance in ((gpu, FROM_ITSELF), (cpu, FROM_THE_CPU)):
        with model.context(n_ctx=512, n_threads=1, kv_type=kv_type, prefix_cache=False) as context:
            restored = context.restore(tmp_path / "saved")
            restored.extend([5])
            assert context.stats.tokens_evaluated == 1
            assert distance(restored.logits, expected) < tolerance


def test_several_sequences_in_one_batch(gpu: mn.Model, context: mn.Context) -> None:
    prompts = [gpu.tokenizer.encode(prompt) for prompt in PROMPTS]
    sequences = [context.sequence() for _ in prompts]
    context.extend(dict(zip(sequences, prompts, strict=True)))
    context.extend({sequence: [5] for sequence in sequences})  # one token each
    for sequence, prompt in zip(sequences, prompts, strict=True):
        assert distance(sequence.logits, rows(gpu, [*prompt, 5])[-1]) < FROM_ITSELF


# Writing there


def test_a_draft_changes_nothing(gpu: mn.Model) -> None:
    ids = gpu.tokenizer.encode("Once upon a time, there was a little girl named Emma. One day,")
    plain = written(gpu, ids, 60)
    with mn.Model.load(DRAFT_PATH, devices=[GPUS[0].name]) as smaller, mn.DraftModel(smaller) as drafter:
        for guesser in (mn.Lookup(), drafter):
            speculation = mn.Speculation(guesser)
            assert_written_alike(gpu, ids, written(gpu, ids, 60, speculate=speculation), plain)
    assert speculation.accepted > 0


def test_tokens_are_drawn_from_its_logits(context: mn.Context, ids: list[int]) -> None:
    params = mn.SamplingParams(temperature=0.9, top_k=40, top_p=0.95, repeat_penalty=1.1, seed=11)
    sequence = context.sequence()
    sequence.extend(ids)
    drawn = [step.token for step in mn.generate(sequence, params, max_tokens=24)]
    sequence.truncate(len(ids))
    sampler = mn.Sampler(params)
    for token in drawn:
        logits = sequence.logits
        assert logits.dtype == np.float32
        assert logits.shape == (context.model.tokenizer.n_vocab,)
        assert sampler(logits, sequence.tokens) == token
        sequence.append(token)


# What goes wrong


@pytest.mark.skipif(IS_SOFTWARE, reason="llvmpipe has no memory of its own, and crashes if the machine has none left")
def test_a_context_that_has_no_room_there_is_a_typed_error(deep: Path) -> None:
    with mn.Model.load(deep, devices=[GPUS[0].name]) as model:
        with pytest.raises(mn.ContextError, match=f"no context could be made with n_ctx={TOO_LONG.n_ctx}"):
            mn.Context(model, TOO_LONG)
        assert len(written(model, [5, 6, 7], 4)) == 4


@pytest.mark.parametrize("first", ["model", "context", "sequence"])
def test_everything_can_be_closed_in_any_order(first: str) -> None:
    model = mn.Model.load(mn.DEMO_PATH, devices=[GPUS[0].name])
    context = model.context(n_ctx=128, n_threads=1)
    sequence = context.sequence()
    sequence.extend([5, 6, 7])
    owners = {"model": model, "context": context, "sequence": sequence}
    for name in (first, *owners):
        owners[name].close()  # type: ignore[attr-defined]
    with pytest.raises(mn.ClosedError):
        sequence.extend([8])


def run(script: str, **environment: str) -> str:
    """Run a script in a process of its own, which has to end by itself; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_process_may_end_without_closing_anything() -> None:
    begun = """
        import minerva_native as mn
        model = mn.Model.demo()
        context = model.context(n_ctx=128, n_threads=1)
        sequence = context.sequence()
        sequence.extend([5, 6, 7])
        print(len(sequence.logits))
    """
    assert int(run(begun)) > 1000


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_child_is_refused_what_its_parent_has_there() -> None:
    forked = """
        import os, signal
        import minerva_native as mn
        model = mn.Model.demo()
        context = model.context(n_ctx=128, n_threads=1)
        sequence = context.sequence()
        sequence.extend([5, 6, 7])
        before = sequence.logits.copy()
        child = os.fork()
        if not child:
            signal.alarm(60)
            try:
                sequence.extend([8])
            except mn.BrokenContextError:
                pass
            else:
                os._exit(1)
            try:
                mn.Model.demo()
            except mn.DeviceError as error:
                assert "forked" in str(error), error
            else:
                os._exit(2)
            with mn.Model.load(mn.DEMO_PATH, devices=[]) as other, other.context(n_ctx=64, n_threads=1) as here:
                here.sequence().extend([5, 6, 7])
            os._exit(0)
        print(os.waitpid(child, 0)[1])
        sequence.extend([8])
        sequence.truncate(3)
        assert (sequence.logits == before).all()
    """
    assert run(forked) == "0\n"


# A GPU that fails on command: a layer between Vulkan and its driver.


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the layer."""
    if "Vulkan" not in BACKENDS:
        pytest.skip("only a Vulkan device can be made to fail")
    compiler = os.environ.get("CC") or shutil.which("cc")
    folder = tmp_path_factory.mktemp("layer")
    source, library = Path(__file__).with_name("faulty_vulkan.c"), folder / "libfaulty.so"
    if (
        compiler is None
        or subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library], check=False).returncode
    ):
        pytest.skip("a layer for Vulkan cannot be compiled without a C compiler and Vulkan's headers")
    (folder / "faulty.json").write_text(
        '{"file_format_version": "1.0.0", "layer": {"name": "VK_LAYER_MINERVA_faulty", "type": "GLOBAL", '
        '"library_path": "./libfaulty.so", "api_version": "1.3.0", "implementation_version": "1", '
        '"description": "fails when it is told to"}}'
    )
    return folder


def run_with(layer: Path, faults: Path, script: str) -> str:
    """Run a script whose GPU fails while `faults / "lost"` or `faults / "memory"` exists."""
    return run(
        FAILING + textwrap.dedent(script),
        VK_LAYER_PATH=str(layer),
        VK_INSTANCE_LAYERS="VK_LAYER_MINERVA_faulty",
        MINERVA_FAULTS=str(faults),
    )


FAILING = """
import os
from pathlib import Path
import minerva_native as mn

faults = Path(os.environ["MINERVA_FAULTS"])
lost, memory = faults / "lost", faults / "memory"

def refused(kind, function, *arguments, **options):
    try:
        function(*arguments, **options)
    except kind as error:
        print(error)
    else:
        raise AssertionError("nothing was raised")

def works(**options):
    with mn.Model.load(mn.DEMO_PATH, **options) as model, model.context(n_ctx=64, n_threads=1) as context:
        context.sequence().extend([5, 6, 7])
        return model.gpu_layers

model = mn.Model.demo()
context = model.context(n_ctx=128, n_threads=1)
sequence = context.sequence()
sequence.extend([5, 6, 7])
"""


def test_a_lost_device_breaks_the_context_and_not_the_process(layer: Path, tmp_path: Path) -> None:
    lines = run_with(
        layer,
        tmp_path,
        """
        saved = sequence.to_bytes()
        lost.touch()
        refused(mn.BrokenContextError, sequence.extend, [8])
        refused(mn.BrokenContextError, sequence.extend, [8])
        refused(mn.DeviceError, works)
        refused(mn.DeviceError, mn.devices()[0].copy_bandwidth, 1 << 20)
        assert works(devices=[]) == 0
        context.close()
        model.close()
        """,
    ).splitlines()
    assert "DeviceLost" in lines[0]
    assert "its GPU is lost to this process" in lines[0]
    assert "its GPU is lost to this process" in lines[1]


def test_a_device_may_be_lost_while_a_state_is_read_or_written(layer: Path, tmp_path: Path) -> None:
    run_with(
        layer,
        tmp_path,
        """
        saved = sequence.to_bytes()
        lost.touch()
        refused(mn.MinervaError, sequence.to_bytes)
        refused(mn.MinervaError, context.from_bytes, saved)
        """,
    )


def test_a_device_may_have_no_memory_left_in_the_midst(layer: Path, tmp_path: Path) -> None:
    lines = run_with(
        layer,
        tmp_path,
        """
        memory.touch()
        refused(mn.DeviceError, mn.Model.demo)
        refused(mn.ContextError, model.context, n_ctx=128)
        memory.unlink()
        assert works() == 5
        sequence.extend([8])
        """,
    ).splitlines()
    assert "allocate" in lines[0]
