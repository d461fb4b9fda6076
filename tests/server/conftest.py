"""A server with the built-in model, and one whose chat template has tools and reasoning."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import openai
import pytest

import minerva_native as mn
from serving import Served, serve

# As Qwen 3 has them: calls in <tool_call> tags. The answer begins with reasoning unless it is turned off.
TEMPLATE = (
    '{% if tools %}<|im_start|>system\nAnswer with <tool_call>{"name": ..., "arguments": ...}</tool_call>:\n'
    "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['reasoning_content'] %}<think>\n{{ message['reasoning_content'] }}</think>\n{% endif %}"
    "{{ message['content'] if message['content'] }}"
    "{% for call in message['tool_calls'] %}<tool_call>\n{{ call['function'] | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}{% endif %}"
)


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    """A server with the built-in model."""
    with serve() as server:
        yield server


@pytest.fixture(scope="session")
def exact() -> Iterator[Served]:
    """A server whose answers do not depend on the requests before."""
    with serve("--deterministic", "-c", "8192") as server:
        yield server


@pytest.fixture(scope="session")
def exact_client(exact: Served) -> openai.OpenAI:
    """OpenAI's client of it."""
    return exact.client()


@pytest.fixture(scope="session")
def llm(demo: mn.Model) -> Iterator[mn.LLM]:
    """What it serves, in this process."""
    with mn.LLM(demo, n_ctx=8192, n_parallel=4, n_threads=1, deterministic=True) as llm:
        yield llm


@pytest.fixture(scope="session")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server whose chat template has tools and reasoning."""
    template = tmp_path_factory.mktemp("template") / "template.jinja"
    template.write_text(TEMPLATE)
    with serve("--chat-template-file", str(template), "-c", "4096") as server:
        yield server


@pytest.fixture(scope="session")
def client(served: Served) -> openai.OpenAI:
    """OpenAI's client."""
    return served.client()


@pytest.fixture(scope="session")
def thinker(thinking: Served) -> openai.OpenAI:
    """OpenAI's client of the other server."""
    return thinking.client()


@pytest.fixture
def start() -> Callable[..., AbstractContextManager[Served]]:
    """A function that starts a server with options of its own."""
    return serve
