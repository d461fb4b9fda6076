"""Where models and contexts are, how many layers fit there, and tensors that are put elsewhere: on RPC workers."""

import dataclasses
import io
import json
import math
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import minerva_native as mn
from minerva_native import fit
from minerva_native.cli import main
from minerva_native.devices import described as described_by_itself
from tiny_models import TinyModel
from workers import tale

pytestmark = pytest.mark.skipif("RPC" not in mn.build_info()["backends"], reason="this build has no RPC")

GREEDY = mn.SamplingParams.greedy()
SMALL = mn.ContextOptions(n_ctx=512, n_batch=64, n_threads=1)


@pytest.fixture
def has_free(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that gives every device so much free memory, in the eyes of the plan."""

    def limit(free: int, margin: int = 0, total: int = 1 << 40) -> None:
        def described(pointer: Any) -> mn.Device:
            return dataclasses.replace(described_by_itself(pointer), memory_free_bytes=free, memory_total_bytes=total)

        monkeypatch.setattr(fit, "described", described)
        monkeypatch.setattr(fit, "MARGIN_BYTES", margin)

    return limit


@pytest.fixture
def dry_runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of layers that were tried."""
    tried: list[int] = []
    original = fit.layers_that_fit, fit.check_layers

    def counting(function: Callable[..., Any], dry_run: Callable[[int], Any], *arguments: Any) -> Any:
        def counted(layers: int) -> Any:
            tried.append(layers)
            return dry_run(layers)

        return function(counted, *arguments)

    from minerva_native import model

    for function in original:
        monkeypatch.setattr(model, function.__name__, partial(counting, function))
    return tried


def taken(context: mn.Context, device: int = 1) -> int:
    part = context.placement[device]
    return part.size_bytes + part.cache_bytes + part.buffer_bytes


# What is where


def test_a_context_on_the_cpu_has_everything_here(demo: mn.Model) -> None:
    with demo.context(n_ctx=512, n_threads=1) as context:
        (cpu,) = context.placement
        assert (cpu.device, cpu.layers, cpu.has_output) == ("CPU", 4, True)
        # What the model reads and writes tokens with is there once more if this CPU wants the output rearranged.
        (tied,) = [tensor.size_bytes for tensor in mn.GGUF(mn.DEMO_PATH).tensors if tensor.name == "token_embd.weight"]
        assert cpu.size_bytes - demo.size_bytes in (0, tied)
        assert cpu.cache_bytes == 512 * 2048  # 4 layers, keys and values of 128 numbers in f16
        assert cpu.buffer_bytes > 0


def test_the_kv_cache_is_where_its_layers_are(two: list[str]) -> None:
    with mn.Model.load(mn.DEMO_PATH, rpc=two, tensor_split=[1, 4]) as model, model.context(n_ctx=512) as context:
        cpu, first, second = context.placement
        assert [part.layers for part in (cpu, first, second)] == [0, 1, 3]
        assert [part.cache_bytes for part in (cpu, first, second)] == [0, 512 * 512, 512 * 1536]
        assert min(first.buffer_bytes, second.buffer_bytes) > 0
        assert [part.size_bytes for part in context.placement] == [part.size_bytes for part in model.placement]
        assert sum(part.size_bytes for part in model.placement) >= model.size_bytes  # the output matrix is there twice


def test_what_stays_here_is_counted_tensor_by_tensor(two: list[str]) -> None:
    with mn.Model.load(mn.DEMO_PATH, rpc=two[:1], gpu_layers=3) as model:  # the file is mapped as a whole
        cpu, worker = model.placement
        assert (cpu.layers, worker.layers) == (2, 2)
        assert model.size_bytes <= cpu.size_bytes + worker.size_bytes < model.size_bytes + 200_000


# As many layers as fit


def test_a_dry_run_says_what_will_be_taken(two: list[str], has_free: Callable[..., None]) -> None:
    with (
        mn.Model.load(mn.DEMO_PATH, rpc=two[:1], gpu_layers=3) as model,
        mn.Context(model, SMALL) as context,
    ):
        needed = taken(context)
    load = partial(mn.Model.load, mn.DEMO_PATH, rpc=two[:1], context=SMALL)
    has_free(needed)
    given: list[dict[str, Any]] = [{}, {"gpu_layers": 3}]
    for options in given:
        with load(**options) as model:
            assert model.gpu_layers == 3
    has_free(needed - 1)
    with load() as model:
        assert model.gpu_layers == 2
    has_free(needed + 1000, margin=1000)
    with load() as model:
        assert model.gpu_layers == 3
    has_free(needed + 999, margin=1000)
    with load() as model:
        assert model.gpu_layers == 2


@pytest.mark.parametrize("layers", range(1, 6))
def test_a_dry_run_is_right_to_the_byte(two: list[str], has_free: Callable[..., None], layers: int) -> None:
    load = partial(mn.Model.load, mn.DEMO_PATH, rpc=two[:1], gpu_layers=layers, context=SMALL)
    with load() as model, mn.Context(model, SMALL) as context:
        needed = taken(context)
    has_free(0)
    with pytest.raises(
        mn.DeviceError, match=f"would need {needed:,} bytes, and has 0 free; ask for at most gpu_layers=0"
    ):
        load()


def test_a_head_is_planned_for(two: list[str], has_free: Callable[..., None], tmp_path: Path) -> None:
    path = TinyModel("glm4moe", n_mtp=1).write(tmp_path / "headed.gguf")
    options = dataclasses.replace(SMALL, mtp=True)
    load = partial(mn.Model.load, path, rpc=two[:1], load_mtp=True, context=options)
    with load() as model:
        assert (model.n_layer, model.n_blocks, model.gpu_layers) == (3, 4, 5)
        with mn.Context(model, SMALL) as context:
            without = taken(context)
        with mn.Context(model, options) as context, context.sequence() as sequence:
            needed = taken(context)
            sequence.extend(list(range(40, 60)))
            speculation = mn.Speculation("mtp", max_loss=math.inf)
            tokens = [step.token for step in mn.generate(sequence, GREEDY, max_tokens=20, speculate=speculation)]
            assert speculation.drafted > 0
    assert needed > without
    has_free(needed)
    with load(gpu_layers=-1) as model:
        assert model.gpu_layers == 5
    has_free(needed - 1)
    with pytest.raises(mn.DeviceError, match=f"would need {needed:,} bytes"):
        load(gpu_layers=-1)
    with load() as model:
        assert model.gpu_layers == 4
    with (
        mn.Model.load(path, gpu_layers=0) as model,
        model.context(n_ctx=512) as context,
        context.sequence() as sequence,
    ):
        sequence.extend(list(range(40, 60)))
        assert tokens == [step.token for step in mn.generate(sequence, GREEDY, max_tokens=20)]


def test_all_layers_are_tried_first(two: list[str], dry_runs: list[int], has_free: Callable[..., None]) -> None:
    with mn.Model.load(mn.DEMO_PATH, rpc=two) as model:
        assert model.gpu_layers == 5
        assert dry_runs == [-1]
    has_free(0)
    with mn.Model.load(mn.DEMO_PATH, rpc=two) as model:
        assert dry_runs == [-1, -1, 2, 0, 1]
        assert model.gpu_layers == 0
        assert [part.device for part in model.placement] == ["CPU"]
        assert len(tale(model, 4)) == 4


def test_without_a_device_nothing_is_tried(dry_runs: list[int]) -> None:
    mn.Model.load(mn.DEMO_PATH, devices=[]).close()
    mn.Model.load(mn.DEMO_PATH, gpu_layers=0).close()
    assert dry_runs == []


def test_a_larger_context_leaves_room_for_fewer_layers(two: list[str], has_free: Callable[..., None]) -> None:
    has_free(3_000_000)
    fitting = []
    for n_ctx in (256, 1024, 4096, 16384):
        options = dataclasses.replace(SMALL, n_ctx=n_ctx)
        with mn.Model.load(mn.DEMO_PATH, rpc=two[:1], context=options) as model, mn.Context(model, options) as context:
            assert len(context.placement) == 1 or taken(context) <= 3_000_000
            fitting.append(model.gpu_layers)
    assert fitting == sorted(fitting, reverse=True)
    assert fitting[0] == 5
    assert fitting[-1] < 2


def test_each_device_has_to_have_room(two: list[str], has_free: Callable[..., None]) -> None:
    load = partial(mn.Model.load, mn.DEMO_PATH, rpc=two, tensor_split=[1, 3], context=SMALL)
    with load(gpu_layers=-1) as model, mn.Context(model, SMALL) as context:
        needs = [taken(context, device) for device in (1, 2)]
    assert needs[0] < needs[1]
    has_free(needs[1] - 1)
    with load() as model, mn.Context(model, SMALL) as context:
        assert 0 < model.gpu_layers < 5
        assert max(taken(context, device) for device in range(1, len(context.placement))) < needs[1]
    with pytest.raises(mn.DeviceError, match=rf"\({two[1]}\) would need [\d,]+ bytes"):
        load(gpu_layers=-1)


def test_llm_plans_model_and_context_together(two: list[str], has_free: Callable[..., None]) -> None:
    has_free(3_000_000)
    layers = []
    for n_ctx in (256, 8192):
        with mn.LLM(mn.DEMO_PATH, rpc=two[:1], n_ctx=n_ctx, n_batch=64) as llm:
            layers.append(llm.model.gpu_layers)
            assert llm.complete("Once", max_tokens=2).text
    assert layers[0] > layers[1]


def test_more_layers_than_fit_are_refused_with_what_would(two: list[str], has_free: Callable[..., None]) -> None:
    load = partial(mn.Model.load, mn.DEMO_PATH, rpc=two[:1], context=SMALL)
    has_free(2_000_000)
    for layers in (-1, 5, 4, 99):
        with pytest.raises(mn.DeviceError) as caught:
            load(gpu_layers=layers)
        found = re.fullmatch(
            rf"gpu_layers={layers} does not fit: with a context of n_ctx=512, RPC\d+ \({two[0]}\) would need [\d,]+ "
            r"bytes, and has 2,000,000 free; ask for at most gpu_layers=(\d)",
            str(caught.value),
        )
        assert found
        with load(gpu_layers=int(found[1])) as model, mn.Context(model, SMALL) as context:
            assert taken(context) <= 2_000_000
    with pytest.raises(mn.DeviceError, match="for the weights alone"):
        has_free(500_000)
        mn.Model.load(mn.DEMO_PATH, rpc=two[:1], gpu_layers=5)


def test_a_device_that_does_not_say_what_it_has_is_used_if_asked_for(
    two: list[str], has_free: Callable[..., None]
) -> None:
    has_free(0, total=0)
    load = partial(mn.Model.load, mn.DEMO_PATH, rpc=two[:1])
    with load() as model, load(gpu_layers=2) as other:
        assert (model.gpu_layers, other.gpu_layers) == (0, 2)


def test_an_impossible_context_is_refused_before_weights_are_loaded(two: list[str]) -> None:
    options = mn.ContextOptions(kv_type=("f16", "q8_0"), flash_attention=False)
    with pytest.raises(mn.OptionError, match="flash attention"):
        mn.Model.load(mn.DEMO_PATH, rpc=two, context=options)


def test_a_context_that_a_device_cannot_have_leaves_it_fewer_layers(
    two: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    most = 3
    original = fit.dry_context

    def limited(model: mn.Model, *arguments: Any) -> Any:  # as Vulkan refuses a cache beyond its largest buffer
        if model.gpu_layers > most:
            raise mn.ContextError("the model cannot have a context with these options (too large)")
        return original(model, *arguments)

    monkeypatch.setattr(fit, "MARGIN_BYTES", 0)
    monkeypatch.setattr(fit, "dry_context", limited)
    load = partial(mn.Model.load, mn.DEMO_PATH, rpc=two[:1], context=SMALL)
    for most in (3, 0):
        with load() as model:
            assert model.gpu_layers == most
    assert "no layer of it fits beside a context" in caplog.text
    most = -1  # it is not about a device
    with pytest.raises(mn.ContextError, match="too large"):
        load()
    most = 3
    with pytest.raises(mn.ContextError, match="too large"):
        load(gpu_layers=4)


def test_a_plan_warns_of_nothing(two: list[str], caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    mn.Model.load(TinyModel("gpt2").write(tmp_path / "gpt2.gguf"), rpc=two).close()  # it has 512 positions
    options = dataclasses.replace(SMALL, n_ctx=4096)  # more than the model was trained on
    with mn.Model.load(mn.DEMO_PATH, rpc=two, context=options) as model:
        assert [record.message for record in caplog.records if record.levelname == "WARNING"] == []
        mn.Context(model, options).close()


def test_without_options_a_model_that_cannot_have_the_usual_context_is_planned_without_one(
    two: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        fit, "ContextOptions", partial(mn.ContextOptions, kv_type=("f16", "q8_0"), flash_attention=False)
    )
    with mn.Model.load(mn.DEMO_PATH, rpc=two) as model:
        assert model.gpu_layers == 5


# Tensors elsewhere


@pytest.fixture
def experts(tmp_path: Path) -> Path:
    """A mixture of experts of 3 layers."""
    return TinyModel("qwen3moe").write(tmp_path / "experts.gguf")


def expert_bytes(path: Path, layers: int) -> int:
    gguf = mn.GGUF(path)
    names = tuple(f"blk.{layer}." for layer in range(layers))
    total = sum(one.size_bytes for one in gguf.tensors if "_exps" in one.name and one.name.startswith(names))
    gguf.close()
    return total


def test_experts_stay_on_the_cpu(experts: Path, two: list[str]) -> None:
    load = partial(mn.Model.load, experts, rpc=two[:1])
    with load() as model:
        cpu, worker = model.placement
        logits = probe(model)
    for n, options in ((3, {"cpu_moe": True}), (1, {"n_cpu_moe": 1}), (2, {"n_cpu_moe": 2}), (3, {"n_cpu_moe": 999})):
        with load(**options) as model:
            moved, rest = model.placement
            assert moved.size_bytes - cpu.size_bytes == expert_bytes(experts, n) > 0
            assert worker.size_bytes - rest.size_bytes == expert_bytes(experts, n)
            assert rest.layers == 3
            assert probe(model) == pytest.approx(logits, abs=0.05)


def probe(model: mn.Model) -> list[float]:
    with model.context(n_ctx=64, n_threads=1) as context, context.sequence() as sequence:
        sequence.extend([5, 6, 7])
        return [float(logit) for logit in sequence.logits[:50]]


def test_tensors_go_where_a_pattern_says(two: list[str]) -> None:
    with mn.Model.load(mn.DEMO_PATH, rpc=two, gpu_layers=0) as model:
        told = tale(model, 8)
    overrides = {r"blk\.0\.": two[1], r"blk\.[01]\.ffn": two[0], "attn_norm": "CPU"}
    with mn.Model.load(mn.DEMO_PATH, rpc=two, gpu_layers=0, tensor_overrides=overrides) as model:
        cpu, first, second = model.placement
        assert (cpu.layers, first.layers, second.layers) == (4, 0, 0)
        gguf = mn.GGUF(mn.DEMO_PATH)
        sizes = {tensor.name: tensor.size_bytes for tensor in gguf.tensors}
        gguf.close()
        assert second.size_bytes == sum(size for name, size in sizes.items() if name.startswith("blk.0."))
        assert first.size_bytes == sum(size for name, size in sizes.items() if name.startswith("blk.1.ffn"))
        assert tale(model, 8) == told


def test_a_device_has_its_name_too(two: list[str]) -> None:
    name = mn.devices_at(two[:1])[0].name
    with mn.Model.load(mn.DEMO_PATH, rpc=two[:1], gpu_layers=0, tensor_overrides={"output_norm": name}) as model:
        assert model.placement[1].device == name


def test_what_is_put_elsewhere_makes_room(two: list[str], has_free: Callable[..., None]) -> None:
    load = partial(mn.Model.load, mn.DEMO_PATH, rpc=two[:1], context=SMALL)
    has_free(2_000_000)
    with load() as model, load(tensor_overrides={"ffn": "CPU"}) as other:
        assert model.gpu_layers < other.gpu_layers


def test_what_is_put_on_devices_has_to_fit(two: list[str], has_free: Callable[..., None]) -> None:
    has_free(50_000)
    load = partial(mn.Model.load, mn.DEMO_PATH, rpc=two, tensor_overrides={"ffn": two[0]})
    with pytest.raises(mn.DeviceError, match="more on devices than fits"):
        load()
    with pytest.raises(mn.DeviceError, match="gpu_layers=0 does not fit"):
        load(gpu_layers=0)


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        ({"[": "CPU"}, ValueError, "no regular expression"),
        ({"ffn(": "CPU"}, ValueError, "no regular expression"),
        ({"nothing": "CPU"}, ValueError, "matches no tensor"),
        ({"": "CPU"}, ValueError, "1 to 1000 printable"),
        ({"(" * 100_000: "CPU"}, ValueError, "1 to 1000 printable"),
        ({"ffn\0": "CPU"}, ValueError, "printable"),
        ({"ffn": "CUDA7"}, mn.DeviceError, "'CUDA7', and the model has CPU"),
        ({"ffn": 3}, TypeError, "not a int"),
        ({3: "CPU"}, TypeError, "not a int"),
        ("ffn=CPU", TypeError, "a dict"),
    ],
)
def test_what_is_no_override(overrides: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        mn.Model.load(mn.DEMO_PATH, devices=[], tensor_overrides=overrides)


# The commands


def test_commands_say_where_layers_are(
    two: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["-n", "2", "--temp", "0", "-c", "256", "-p", "Once"]
    assert main(["generate", *options]) == 0
    assert "placement" not in capsys.readouterr().err
    assert main(["generate", *options, "--rpc", two[0], "-ngl", "3"]) == 0
    line = capsys.readouterr().err.splitlines()[0]
    assert re.fullmatch(
        r"minerva: placement: 2 layers on CPU: [\d.]+ kB weights, 262.1 kB cache, .* buffers; 2 layers and the output "
        rf"on RPC\d+ \({two[0]}\): [\d.]+ kB weights, 262.1 kB cache, .* buffers",
        line,
    )
    assert main(["generate", *options, "--rpc", two[0], "-q"]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    assert main(["chat", *options, "--rpc", two[0], "-ot", "ffn_(up|down)=CPU"]) == 0
    assert re.search(r"placement: 0 layers on CPU: 591.9 kB weights", capsys.readouterr().err)


def test_bench_says_where_layers_are(
    two: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mn.Model, "load", partial(mn.Model.load, rpc=two[:1]))
    assert main(["bench", "-p", "8", "-n", "0", "-r", "1", "-t", "1", "--no-parts", "-o", "jsonl"]) == 0
    captured = capsys.readouterr()
    assert f"4 layers and the output on RPC0 ({two[0]})" in re.sub(r"RPC\d+", "RPC0", captured.err)
    assert json.loads(captured.out)["n_gpu_layers"] == 5


def test_a_server_says_where_layers_are(two: list[str]) -> None:
    pytest.importorskip("starlette")
    command = [sys.executable, "-m", "minerva_native", "serve", "--port", "0", "--json", "--rpc", two[0], "-ngl", "2"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout is not None
    try:
        assert select.select([server.stdout], [], [], 60)[0], "the server does not start"
        placement = json.loads(server.stdout.readline())["placement"]
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)
        server.stdout.close()
    assert re.fullmatch(rf"3 layers on CPU: .* cache, .*; 1 layer and the output on RPC\d+ \({two[0]}\): .*", placement)


def test_a_command_names_its_own_option(two: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for option, words in (
        ("-ot=nothing=CPU", "'nothing' in -ot matches no tensor"),
        ("-ot=ffn=CUDA7", "-ot puts 'ffn' on 'CUDA7'"),
        ("--n-cpu-moe=-1", "--n-cpu-moe must be from 0"),
    ):
        assert main(["generate", "-p", "x", option]) == 1
        assert words in capsys.readouterr().err
    assert main(["generate", "-p", "x", "-n", "1", "--cpu-moe", "-q"]) == 0  # there are none


def test_a_command_leaves_room_for_its_context(
    two: list[str], has_free: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    has_free(3_000_000)
    options = ["generate", "-p", "x", "-n", "1", "--rpc", two[0], "-b", "64"]
    assert main([*options, "-c", "256"]) == 0
    assert "0 layers on CPU" in capsys.readouterr().err
    assert main([*options, "-c", "8192", "-ngl", "5"]) == 1
    assert "-ngl 5 does not fit: with a context of -c 8192" in capsys.readouterr().err
