"""RPC workers: layers on other processes, and what happens when one is lost, hangs, lies or never was there."""

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

import minerva_native as mn
from minerva_native.cli import main, rpc_worker
from workers import GREEDY, Worker, tale

pytestmark = pytest.mark.skipif("RPC" not in mn.build_info()["backends"], reason="this build has no RPC")


@pytest.fixture
def start() -> Iterator[Callable[..., Worker]]:
    """A function that starts a worker, which ends with the test."""
    workers: list[Worker] = []

    def run(port: int = 0) -> Worker:
        workers.append(Worker(port))
        return workers[-1]

    yield run
    for worker in workers:
        worker.kill()


def test_an_address_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match="in use") as refused:
            mn.rpc_worker(port=port)
    assert refused.value.filename == f"127.0.0.1 port {port}"
    assert refused.value.strerror == "Address already in use"


def load(*endpoints: str, timeout: float = 60, **options: int) -> mn.Model:
    return mn.Model.load(mn.DEMO_PATH, rpc=endpoints, rpc_timeout=timeout, gpu_layers=options.get("gpu_layers", -1))


@pytest.fixture(scope="module")
def told() -> list[int]:
    """The tokens that one process writes alone."""
    with mn.Model.demo(gpu_layers=0) as model:
        return tale(model)


def layers(model: mn.Model) -> dict[str, int]:
    return {part.description: part.layers for part in model.placement}


# Layers on workers


def test_two_workers_hold_all_layers_and_write_what_one_process_writes(two: list[str], told: list[int]) -> None:
    with load(*two) as model:
        cpu, *others = model.placement
        assert cpu.layers == 0
        assert [part.description for part in others] == two
        assert sum(part.layers for part in others) == model.n_layer
        assert min(part.layers for part in others) > 0
        assert [part.has_output for part in others] == [False, True]
        assert min(part.size_bytes for part in others) > 100_000
        assert tale(model) == told


def test_without_workers_everything_is_here() -> None:
    with mn.Model.demo(gpu_layers=0) as model:
        (cpu,) = model.placement
        assert (cpu.device, cpu.layers, cpu.has_output) == ("CPU", 4, True)
        # The output matrix is there twice, also as what tokens are read with, if this CPU wants it rearranged.
        (tied,) = [tensor.size_bytes for tensor in mn.GGUF(mn.DEMO_PATH).tensors if tensor.name == "token_embd.weight"]
        assert cpu.size_bytes - model.size_bytes in (0, tied)


def test_some_layers_can_stay_here(two: list[str], told: list[int]) -> None:
    with load(two[0], gpu_layers=2) as model:  # the output counts as one
        assert layers(model) == {"this machine's memory": 3, two[0]: 1}
        assert tale(model) == told


def test_shares_are_kept_to(two: list[str], told: list[int]) -> None:
    with mn.Model.load(mn.DEMO_PATH, rpc=two, tensor_split=[1, 4]) as model:
        assert layers(model) == {"this machine's memory": 0, two[0]: 1, two[1]: 3}
        assert tale(model) == told


def test_only_the_model_that_names_workers_uses_them(two: list[str]) -> None:
    with load(*two), mn.Model.demo() as model:
        assert not {*two} & layers(model).keys()
    assert "rpc" not in [device.type for device in mn.devices()]


def test_llm_passes_workers_on(two: list[str]) -> None:
    with mn.LLM(mn.DEMO_PATH, rpc=two, n_ctx=128) as llm, mn.LLM(mn.DEMO_PATH, gpu_layers=0, n_ctx=128) as alone:
        assert {*two} <= layers(llm.model).keys()
        answers = [one.complete("Once upon a time", max_tokens=16, temperature=0).text for one in (llm, alone)]
        assert answers[0] == answers[1]


def test_a_saved_sequence_comes_back_from_workers(two: list[str], tmp_path: os.PathLike[str]) -> None:
    path = os.path.join(tmp_path, "state")
    with load(*two) as model, model.context(n_ctx=64) as context:
        with context.sequence() as sequence:
            sequence.extend([1, 20, 21])
            expected = sequence.logits
            sequence.save(path)
        with model.context(n_ctx=64) as other:
            restored = other.restore(path)
            assert other.stats.tokens_evaluated == 0
            assert restored.tokens == [1, 20, 21]
            assert restored.logits.argmax() == expected.argmax()


# Several users of a worker


def test_two_models_share_a_worker_and_one_may_leave(two: list[str], told: list[int]) -> None:
    with load(two[0]) as one, one.context(n_ctx=128, n_threads=1) as context, context.sequence() as sequence:
        other = load(two[0])
        sequence.extend(one.tokenizer.encode("Once upon a time"))
        written = []
        for number, step in enumerate(mn.generate(sequence, GREEDY, max_tokens=len(told))):
            written.append(step.token)
            if number == 6:
                assert tale(other, 4) == told[:4]  # a context that comes and goes: the worker forgets its graphs
            if number == 12:
                other.close()
        assert written == told


def test_contexts_on_threads_do_not_compute_each_others_graphs(two: list[str], told: list[int]) -> None:
    with load(two[0]) as model, ThreadPoolExecutor(3) as pool:
        assert [*pool.map(lambda _: tale(model), range(9))] == [told] * 9


def test_a_worker_is_free_once_its_models_are_closed(two: list[str]) -> None:
    script = f"import minerva_native as mn; print(mn.devices_at([{two[0]!r}], timeout=1)[0].memory_total_bytes)"
    command = [sys.executable, "-c", script]
    with load(two[0]):
        busy = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert re.search(r"DeviceError: the RPC worker at \S+ accepts connections, but does not answer", busy.stderr)
    free = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert int(free.stdout) > 1 << 20


# Lost workers


def test_a_worker_that_is_killed_breaks_the_context_and_nothing_else(
    start: Callable[..., Worker], told: list[int]
) -> None:
    first, second = start(), start()
    with load(first.endpoint, second.endpoint) as model, model.context(n_ctx=128) as context:
        sequence = context.sequence()
        sequence.extend(model.tokenizer.encode("Once upon a time"))
        steps = mn.generate(sequence, GREEDY, max_tokens=100)
        assert [next(steps).token for _ in range(4)] == told[:4]
        second.kill()
        with pytest.raises(mn.BrokenContextError, match=f"{second.endpoint} has closed .* load it again"):
            list(steps)
        with pytest.raises(mn.BrokenContextError, match=second.endpoint):
            sequence.extend([5])
        with pytest.raises(mn.DeviceError, match=second.endpoint):
            model.context(n_ctx=64)
        with mn.Model.demo() as local, load(first.endpoint) as other:
            assert tale(local) == tale(other) == told


def test_a_worker_that_was_started_again_has_no_weights(start: Callable[..., Worker], told: list[int]) -> None:
    worker = start()
    old = load(worker.endpoint)
    context = old.context(n_ctx=64)
    worker.kill()
    start(worker.port)
    with load(worker.endpoint) as new:
        assert tale(new) == told
        with pytest.raises(mn.DeviceError, match="started again, and has no weights"):
            old.context(n_ctx=64)
        with pytest.raises(mn.BrokenContextError, match=worker.endpoint):
            context.sequence().extend([5])
        context.close()
        assert tale(new) == told
    old.close()


def test_a_model_of_a_lost_worker_can_be_closed_last(start: Callable[..., Worker]) -> None:
    worker = start()
    model = load(worker.endpoint)
    context = model.context(n_ctx=64)
    worker.kill()
    with pytest.raises(mn.DeviceError, match="cannot be reached"):
        load(worker.endpoint)
    context.close()
    model.close()


@contextmanager
def in_time(seconds: float) -> Iterator[None]:
    before = time.monotonic()
    yield
    assert time.monotonic() - before < seconds


def test_a_worker_that_hangs_is_given_up_after_a_time(start: Callable[..., Worker]) -> None:
    worker = start()
    with load(worker.endpoint, timeout=1) as model, model.context(n_ctx=64) as context:
        sequence = context.sequence()
        sequence.extend([1, 20])
        worker.send(signal.SIGSTOP)
        with in_time(30), pytest.raises(mn.BrokenContextError, match=r"has been silent for \d+ s"):
            sequence.extend([21])
        with in_time(30), pytest.raises(mn.DeviceError, match="accepts connections, but does not answer"):
            load(worker.endpoint, timeout=1)


def test_a_call_that_a_worker_holds_up_can_be_cancelled(start: Callable[..., Worker]) -> None:
    worker = start()
    with load(worker.endpoint, timeout=600) as model, model.context(n_ctx=64) as context:
        sequence = context.sequence()
        sequence.extend([1, 20])
        worker.send(signal.SIGSTOP)
        timer = threading.Timer(0.3, context.cancel)
        timer.start()
        with in_time(30), pytest.raises(mn.BrokenContextError, match="did not answer when"):
            sequence.extend([21])
        timer.join()


def test_a_cancelled_call_leaves_a_worker_that_answers_alone(two: list[str], told: list[int]) -> None:
    cancel = threading.Event()
    cancel.set()
    with load(*two) as model, model.context(n_ctx=128) as context, context.sequence() as sequence:
        with pytest.raises(mn.Cancelled):
            sequence.extend([1, 20], cancel=cancel)
        assert tale(model) == told


# What is not a worker


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = f"127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(mn.DeviceError) as caught:
        load(endpoint)
    sentence = f"the RPC worker at {endpoint} cannot be reached (Connection refused): "
    assert str(caught.value) == sentence + "start one there with minerva rpc-worker"


HELLO, DEVICE_COUNT = 14, 15


def message(payload: bytes) -> bytes:
    return struct.pack("<Q", len(payload)) + payload


def version(major: int, minor: int = 0) -> bytes:
    return message(bytes([major, minor, 0, 0]) + bytes(24))


@contextmanager
def liar(*answers: bytes) -> Iterator[str]:
    """Somebody who answers each connection's messages, in order, with these bytes, and hangs up."""

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(10)
                for answer in answers:
                    if connection.recv(1 << 16):
                        connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(30)


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([], "has closed the connection"),
        ([b"HTTP/1.1 400 Bad Request\r\n\r\n"], "not as an RPC worker of this version"),
        ([version(6)], "not as an RPC worker of this version"),
        ([version(7, 99)], "not as an RPC worker of this version"),
        ([version(7)], "has closed the connection"),
        ([version(7), message(struct.pack("<I", 0))], "has no devices"),
        ([version(7), message(b"")], "gave an answer that is none"),
        ([version(7), struct.pack("<Q", 2**63)], "gave an answer that is none"),
        ([version(7), message(struct.pack("<I", 1))], "gave an answer that is none"),  # to the next question
    ],
)
def test_one_that_does_not_answer_as_a_worker_does(answers: list[bytes], words: str) -> None:
    with liar(*answers) as endpoint, pytest.raises(mn.DeviceError, match=f"{endpoint} .*{words}"):
        load(endpoint, timeout=5)


@pytest.mark.parametrize(
    ("rpc", "error", "words"),
    [
        ("host:1", TypeError, "not a str"),
        ([7], TypeError, r"rpc\[0\] must be a str"),
        (["host"], ValueError, r"rpc\[0\]"),
        (["host:0"], ValueError, r"rpc\[0\]"),
        (["host:65536"], ValueError, r"rpc\[0\]"),
        (["[::1]:50052"], ValueError, "IPv4"),
        (["::1:50052"], ValueError, "IPv4"),
        (["a b:1"], ValueError, r"rpc\[0\]"),
        (["host:1", "host:1"], ValueError, "twice"),
    ],
)
def test_what_names_no_worker(rpc: list[str], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        mn.Model.load(mn.DEMO_PATH, rpc=rpc)


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 4096, bytes([HELLO]), bytes([DEVICE_COUNT]) * 99]
)
def test_a_worker_survives_a_client_that_does_not_speak_its_language(
    two: list[str], told: list[int], garbage: bytes
) -> None:
    host, _, port = two[0].partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(garbage)
    with load(two[0]) as model:
        assert tale(model, 4) == told[:4]


# The commands


def test_the_commands_show_where_layers_are(two: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--rpc", ",".join(two), "--json"]) == 0
    placement = json.loads(capsys.readouterr().out)["placement"]
    assert [part["description"] for part in placement][1:] == two
    assert sum(part["layers"] for part in placement) == 4
    assert main(["info", "--rpc", two[0]]) == 0
    assert f"4 layers and the output, 1.1 MB ({two[0]})" in capsys.readouterr().out
    assert main(["devices", "--rpc", ",".join(two)]) == 0
    assert re.search(rf"RPC\d+: {two[1]} \(rpc, .* free\)", capsys.readouterr().out)


def test_a_command_generates_with_workers(two: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["generate", "-p", "Once upon a time", "-n", "12", "--temp", "0", "-q"]
    assert main(options) == 0
    alone = capsys.readouterr().out
    assert main([*options, "--rpc", ",".join(two)]) == 0
    assert capsys.readouterr().out == alone


def test_ctrl_c_ends_a_worker(start: Callable[..., Worker]) -> None:
    worker = start()
    with load(worker.endpoint):
        worker.send(signal.SIGINT)
        assert worker.process.wait(30) == 130
    assert worker.process.stdout is not None
    assert worker.process.stderr is not None
    output, errors = worker.process.stdout.read(), worker.process.stderr.read()
    assert re.match(r"CPU: .* \(cpu, .* free of .*\)\nCtrl-C ends it", output)
    assert errors == ""


def test_a_port_in_use_is_one_sentence(two: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rpc-worker", "-p", two[0].partition(":")[2]]) == 1
    assert re.fullmatch(r"minerva: error: .*[Aa]ddress already in use.*\n", capsys.readouterr().err)


def test_an_address_that_others_can_reach_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(mn, "rpc_worker", lambda host, port, **options: asked.append(host))
    assert main(["rpc-worker", "-H", "0.0.0.0"]) == 0
    assert "never expose it to an open network" in capsys.readouterr().err
    assert main(["rpc-worker"]) == 0
    assert capsys.readouterr().err == ""
    assert asked == ["0.0.0.0", "127.0.0.1"]
    assert [rpc_worker.is_loopback(host) for host in ("127.0.0.9", "localhost", "192.168.0.1", "box")] == [
        *(True, True, False, False)
    ]


def test_a_worker_on_all_addresses_names_none_of_no_use(capsys: pytest.CaptureFixture[str]) -> None:
    for address, listening, endpoint in (
        (
            "0.0.0.0:50052",
            "all addresses of this machine, port 50052",
            "ADDRESS:50052, with an address of this machine",
        ),
        ("127.0.0.1:50052", "127.0.0.1:50052", "127.0.0.1:50052"),
    ):
        rpc_worker.announce(address, mn.devices())
        first, *_, last = capsys.readouterr().out.splitlines()
        assert first == f"listening on {listening}"
        assert last.endswith(f": minerva generate --rpc {endpoint}")


def test_a_device_that_a_worker_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rpc-worker", "-p", "0", "-d", "CUDA9"]) == 1
    assert "there is no device 'CUDA9' here; this build has CPU" in capsys.readouterr().err


def test_a_benchmark_measures_what_workers_compute(two: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["-p", "4", "-n", "2", "-r", "1", "-t", "1", "--no-parts", "-ngl", "-1", "-q", "--json"]
    assert main(["bench", *options, "--rpc", two[0], "-ot", "ffn_down=CPU"]) == 0
    rows = json.loads(capsys.readouterr().out)["results"]
    assert {row["placement"] for row in rows} == {f"rpc=['{two[0]}'], tensor_overrides={{'ffn_down': 'CPU'}}"}
    assert [row["n_gpu_layers"] for row in rows] == [5, 5]
    assert [row["roofline_ts"] for row in rows] == [None, None]
    with pytest.raises(SystemExit) as ended:
        main(["bench", *options, "--cpu-moe", "--compare-llama-bench", sys.executable])
    assert ended.value.code == 2
    assert "has no place beside --cpu-moe" in capsys.readouterr().err
