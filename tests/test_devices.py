"""Devices, and the number of CPUs and threads."""

import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import minerva_native as mn
from minerva_native import available_cpus, cpu_quota
from minerva_native.devices import select


def test_the_cpu_is_a_device_with_memory() -> None:
    cpu = next(device for device in mn.devices() if device.type == "cpu")
    assert cpu.memory_total_bytes >= cpu.memory_free_bytes > 0
    assert cpu.description


def test_the_backends_of_the_build_are_named() -> None:
    assert "CPU" in mn.build_info()["backends"]


def test_a_device_copies_its_memory() -> None:
    cpu = next(device for device in mn.devices() if device.type == "cpu")
    assert cpu.copy_bandwidth(1 << 20) > 0


def test_a_device_that_is_gone_cannot_be_measured() -> None:
    with pytest.raises(mn.DeviceError, match="no device 'CUDA7'"):
        mn.Device("CUDA7", "a card", "gpu", 1 << 40, 1 << 40).copy_bandwidth()


def test_a_device_without_room_cannot_be_measured() -> None:
    cpu = next(device for device in mn.devices() if device.type == "cpu")
    with pytest.raises(mn.DeviceError, match="no room"):
        cpu.copy_bandwidth(1 << 60)


def test_the_cpu_can_be_named_although_libllama_accepts_only_offload_devices() -> None:
    cpu = next(device.name for device in mn.devices() if device.type == "cpu")
    assert select([cpu]) == []


def test_a_context_uses_the_cpus_of_this_process(demo: mn.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minerva_native.options.ONE_THREAD_BYTES", 0)
    with demo.context(n_ctx=64) as context:
        assert context.n_threads == available_cpus()


def test_a_tiny_model_uses_one_thread(demo: mn.Model) -> None:
    with demo.context(n_ctx=64) as context:
        assert context.n_threads == 1
    with demo.context(n_ctx=64, n_threads=2) as context:
        assert context.n_threads == 2


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")
def test_affinity_counts() -> None:
    script = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
    script += "from minerva_native import available_cpus; print(available_cpus())"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout == b"1\n"


@pytest.mark.parametrize(
    ("files", "membership", "quota"),
    [
        ({}, "0::/user.slice\n", math.inf),
        ({"cpu.max": "max 100000\n"}, "0::/\n", math.inf),
        ({"cpu.max": "150000 100000\n"}, "0::/\n", 1.5),
        ({"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, "0::/a/b\n", 3.0),
        ({"cpu.max": "200000 100000\n"}, "0::/docker/not-seen-from-inside\n", 2.0),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, "4:cpu:/\n3:memory:/\n", 0.5),
        ({"cpu,cpuacct/x/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/x/cpu.cfs_period_us": "100000\n"},
         "4:cpu,cpuacct:/x\n", math.inf),
        ({"cpu.max": "garbage\n"}, "0::/\n", math.inf),
    ],
)  # fmt: skip
def test_cpu_quotas_count(tmp_path: Path, files: dict[str, str], membership: str, quota: float) -> None:
    root = tmp_path / "cgroup"
    root.mkdir()
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (tmp_path / "membership").write_text(membership)
    assert cpu_quota(root, tmp_path / "membership") == quota


def test_a_system_without_cgroups_has_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path, tmp_path / "membership") == math.inf


FORK = """
    import os, signal, sys, threading
    from types import SimpleNamespace
    import minerva_native

    devices = sys.modules["minerva_native.devices"]  # the package has a function of this name
    begun, go_on = threading.Event(), threading.Event()

    def begin():
        begun.set()
        go_on.wait()

    devices.lib = SimpleNamespace(llama_backend_init=begin, ggml_backend_dev_count=lambda: 1)
    thread = threading.Thread(target=devices.initialise)
    thread.start()
    begun.wait()
    threading.Timer(0.1, go_on.set).start()
    child = os.fork()
    if not child:
        signal.alarm(10)
        devices.initialise()
        os._exit(0)
    thread.join()
    print(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_fork_waits_until_another_thread_has_started_the_backends() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORK)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.stdout, ended.stderr) == ("0\n", "")
