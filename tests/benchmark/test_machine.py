"""The facts about the machine and the model, and the warnings about noise."""

import hashlib
import json
from types import ModuleType

import pytest

import minerva_native as mn
from minerva_native.benchmark import machine


def test_everything_needed_to_repeat_a_measurement_is_reported() -> None:
    facts = machine.facts()
    json.dumps(facts)
    assert facts["build_commit"] == mn.build_info()["llama_cpp"]
    assert facts["cpu_info"]
    assert facts["backends"]
    assert facts["cpus"]
    assert facts["python"]


def test_variables_that_affect_the_libraries_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "0")
    monkeypatch.setenv("SECRET", "1")
    environment = machine.facts()["environment"]
    assert environment["GOMP_SPINCOUNT"] == "0"
    assert "SECRET" not in environment


def test_a_model_is_identified_by_its_name_and_its_header(demo: mn.Model) -> None:
    facts = machine.model_facts(demo)
    start = min(tensor.offset for tensor in mn.GGUF(demo.path).tensors)
    assert facts["model_header_sha256"] == hashlib.sha256(demo.path.read_bytes()[:start]).hexdigest()
    assert facts["model_filename"] == str(demo.path)
    assert facts["model_size"] == demo.size_bytes
    assert facts["model_file_bytes"] == demo.path.stat().st_size
    assert facts["model_type"] == demo.description
    json.dumps(facts)


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine without noise."""
    monkeypatch.setattr(mn, "cpu_quota", lambda: float("inf"))
    monkeypatch.setattr(machine, "load_average", lambda: 0.1)
    monkeypatch.setattr(machine, "usable_cpus", lambda: [0, 1, 2, 3])
    monkeypatch.setattr(machine, "governors", lambda: ["performance"])
    return monkeypatch


def test_a_quiet_machine_gives_no_warning(quiet: pytest.MonkeyPatch) -> None:
    assert machine.noise(4) == []
    quiet.setattr(machine, "governors", lambda: None)
    quiet.setattr(machine, "load_average", lambda: None)
    assert machine.noise(4) == []


def test_the_rest_of_a_load_on_idle_cpus_is_no_warning(quiet: pytest.MonkeyPatch) -> None:
    quiet.setattr(machine, "load_average", lambda: 0.8)
    quiet.setattr(machine, "usable_cpus", lambda: [0, 1])
    assert machine.noise(2) == []
    quiet.setattr(machine, "load_average", lambda: 1.0)
    assert len(machine.noise(2)) == 1


@pytest.mark.parametrize(
    ("owner", "name", "value", "words"),
    [
        (machine, "load_average", 1.7, "load was 1.7"),
        (mn, "cpu_quota", 1.5, "quota of 1.5 is less than 4 threads"),
        (machine, "usable_cpus", [0, 1], "4 threads share 2 CPUs"),
        (machine, "governors", ["powersave"], "'powersave'"),
    ],
)
def test_what_makes_times_vary_is_warned_about(
    quiet: pytest.MonkeyPatch, owner: ModuleType, name: str, value: object, words: str
) -> None:
    quiet.setattr(owner, name, lambda: value)
    (sentence,) = machine.noise(4)
    assert words in sentence
