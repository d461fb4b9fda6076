"""The built-in page in a browser: Debian's chromium, or any other that is installed. It reaches loopback alone."""

import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import pytest
from playwright.sync_api import ConsoleMessage, Error, Locator, Page, Request, expect, sync_playwright

from page_stub import DEFAULTS, PAGE, Cut, Gate, Refusal, Stub, end, piece, pieces, running_stub

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed: the built-in page is not tested")

WIDE, NARROW = (1440, 900), (375, 760)
SIZES = [pytest.param(WIDE, id="1440"), pytest.param(NARROW, id="375")]
SCHEMES = ["light", "dark"]

expect.set_options(timeout=10_000)


@dataclass(frozen=True)
class Site:
    """A server with the page: all that a test knows of it unless it asks for the stub."""

    url: str
    token: str


@pytest.fixture
def stub() -> Iterator[Stub]:
    with running_stub() as stub:
        yield stub


@pytest.fixture(scope="module")
def served() -> Iterator[Site]:
    """`minerva serve` with the built-in model."""
    command = [sys.executable, "-m", "minerva_native", "serve", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"page: (http\S+)#token=(\S+)", line):
                yield Site(found[1], found[2])
                break
        else:
            pytest.fail("".join(lines))
        process.terminate()


@pytest.fixture
def site(request: pytest.FixtureRequest) -> Site:
    """The stub, or the real server for a test that says `on_both`."""
    if getattr(request, "param", "stub") == "served":
        return cast(Site, request.getfixturevalue("served"))
    stub = cast(Stub, request.getfixturevalue("stub"))
    return Site(stub.url, stub.token)


on_both = pytest.mark.parametrize("site", ["stub", "served"], indirect=True)
on_the_server = pytest.mark.parametrize("site", ["served"], indirect=True)


NOTE_VIOLATIONS = """
window.violations = [];
addEventListener("securitypolicyviolation", (event) => violations.push(event.violatedDirective + event.blockedURI));
"""


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    """One tab for all tests: each has an origin, and so a storage, of its own."""
    with sync_playwright() as playwright:
        # What is not on loopback goes to a proxy that does not exist.
        arguments = ["--proxy-server=http://127.0.0.1:9"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
        context.set_default_timeout(10_000)
        context.add_init_script(NOTE_VIOLATIONS)
        yield context.new_page()
        browser.close()


@pytest.fixture
def tolerated() -> list[str]:
    """Parts of messages on the console that a test expects; all others fail it."""
    return []


Visit = Callable[..., Page]


@pytest.fixture
def visit(tab: Page, site: Site, tolerated: list[str]) -> Iterator[Visit]:
    """A function that opens the page; an error on the console, or a request that goes elsewhere, fails the test."""
    problems: list[str] = []

    def note_message(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not any(part in message.text for part in tolerated):
            problems.append(f"{message.type}: {message.text}")

    def note_error(error: Error) -> None:
        problems.append(f"an exception: {error}")

    def note_request(request: Request) -> None:
        if not request.url.startswith((site.url, "about:blank")):
            problems.append(f"a request for {request.url}")

    def visit(
        size: tuple[int, int] = WIDE,
        fragment: str | None = None,
        scheme: Literal["light", "dark"] = "light",
        motion: Literal["no-preference", "reduce"] = "reduce",
    ) -> Page:
        tab.set_viewport_size({"width": size[0], "height": size[1]})
        tab.emulate_media(color_scheme=scheme, reduced_motion=motion)
        tab.mouse.move(0, 0)
        tab.goto(site.url + (f"#token={site.token}" if fragment is None else fragment))
        return tab

    tab.on("console", note_message)
    tab.on("pageerror", note_error)
    tab.on("request", note_request)
    yield visit
    tab.unroute_all()
    problems.extend(tab.evaluate("violations"))
    tab.evaluate("sessionStorage.clear()")
    tab.goto("about:blank")
    tab.remove_listener("console", note_message)
    tab.remove_listener("pageerror", note_error)
    tab.remove_listener("request", note_request)
    assert not problems


def message(page: Page) -> Locator:
    return page.get_by_role("textbox", name="Message", exact=True)


def ask(page: Page, text: str = "Who are you?") -> None:
    message(page).fill(text)
    message(page).press("Enter")


def await_defaults(page: Page) -> None:
    expect(page.get_by_label("Temperature")).to_have_value("0.8")


def answer(page: Page) -> Locator:
    """The last answer."""
    return page.locator("article.answer").last


def passage(page: Page) -> Locator:
    """The text of the last answer, without its reasoning."""
    return answer(page).locator("> .passage")


def button(page: Page, name: str) -> Locator:
    return page.get_by_role("button", name=name, exact=True)


def finished(page: Page) -> Locator:
    return answer(page).get_by_role("button", name=re.compile("Regenerate|Try again"))


# The token.


@on_both
def test_the_token_is_taken_from_the_address_kept_in_the_tab_and_used(visit: Visit, site: Site) -> None:
    page = visit()
    expect(page.get_by_label("Model")).not_to_be_empty()
    assert page.url == site.url
    assert site.token not in page.evaluate("history.state + location.href + document.cookie + localStorage.length")
    page.reload()
    expect(page.get_by_label("Model")).not_to_be_empty()
    expect(page.get_by_role("dialog")).to_be_hidden()


@on_both
def test_without_a_token_the_page_asks_for_it_and_says_if_it_is_wrong(
    visit: Visit, site: Site, tolerated: list[str]
) -> None:
    tolerated.append("401")
    page = visit(fragment="")
    field = page.locator("#token")
    expect(field).to_be_focused()
    field.fill("guess")
    field.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("The server refused this token.")
    field.fill("with space")
    field.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("no spaces")
    field.fill(site.token)
    field.press("Enter")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(page.get_by_label("Model")).not_to_be_empty()


def test_the_whole_address_is_taken_for_a_token_as_well(visit: Visit, site: Site, tolerated: list[str]) -> None:
    tolerated.append("401")
    page = visit(fragment="")
    page.locator("#token").fill(f"{site.url}#token={site.token}")
    button(page, "Continue").click()
    expect(page.get_by_label("Model")).not_to_be_empty()


def test_a_token_in_the_address_of_an_open_page_is_taken(visit: Visit, site: Site, tolerated: list[str]) -> None:
    tolerated.append("401")
    page = visit(fragment="")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.goto(f"{site.url}#token={site.token}")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(page.get_by_label("Model")).not_to_be_empty()
    assert page.url == site.url


def test_a_question_that_meets_a_new_token_is_asked_again(visit: Visit, stub: Stub, tolerated: list[str]) -> None:
    tolerated.append("401")
    page = visit()
    await_defaults(page)
    stub.token = "another"
    ask(page)
    page.locator("#token").fill("another")
    button(page, "Continue").click()
    expect(passage(page)).to_have_text("Good.")
    assert len(stub.asked) == 1


def test_who_has_no_token_can_go_back_to_the_conversation(visit: Visit, stub: Stub, tolerated: list[str]) -> None:
    tolerated.append("401")
    page = visit()
    await_defaults(page)
    stub.token = "another"
    ask(page)
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("alert")).to_have_text("The server wants a token.")
    finished(page).click()
    expect(page.get_by_role("dialog")).to_be_visible()


# The conversation.


def test_an_answer_appears_while_it_is_written(visit: Visit, stub: Stub) -> None:
    gate = Gate()
    stub.will([*pieces("Once upon"), gate, *pieces(" a time."), *end()])
    page = visit()
    await_defaults(page)
    ask(page, "Tell me a story.")
    expect(passage(page)).to_have_text("Once upon")
    expect(button(page, "Stop")).to_be_visible()
    expect(button(page, "Send")).to_be_hidden()
    gate.open()
    expect(passage(page)).to_have_text("Once upon a time.")
    expect(button(page, "Send")).to_be_visible()
    expect(message(page)).to_be_focused()
    expect(message(page)).to_have_value("")
    [body] = stub.asked
    assert body.pop("temperature") == 0.8
    assert body == {
        "model": "stories.gguf",
        "messages": [{"role": "user", "content": "Tell me a story."}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": True,
        "top_logprobs": 5,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.05,
        "repeat_penalty": 1,
    }


def test_the_conversation_and_the_system_prompt_are_sent(visit: Visit, stub: Stub) -> None:
    page = visit()
    page.get_by_label("System prompt").fill("Be kind.")
    ask(page, "One")
    expect(finished(page)).to_be_visible()
    ask(page, "Two")
    expect(finished(page)).to_be_visible()
    assert stub.asked[1]["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Good."},
        {"role": "user", "content": "Two"},
    ]


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_keeps_the_text_and_leaves_the_request(visit: Visit, stub: Stub, how: str) -> None:
    stub.will([*pieces("Once upon"), Gate()])
    page = visit()
    ask(page)
    expect(passage(page)).to_have_text("Once upon")
    if how == "button":
        button(page, "Stop").click()
    else:
        page.keyboard.press("Escape")
    assert stub.abandoned.wait(10)
    expect(passage(page)).to_have_text("Once upon")
    expect(answer(page)).to_contain_text("2 tokens")
    expect(answer(page)).to_contain_text("stopped")
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(message(page)).to_be_focused()


def test_a_stall_before_the_first_token_can_be_stopped(visit: Visit, stub: Stub) -> None:
    stub.will([Gate()])
    page = visit()
    ask(page)
    expect(answer(page)).to_contain_text("Reading")
    button(page, "Stop").click()
    assert stub.abandoned.wait(10)
    expect(answer(page)).to_contain_text("stopped")
    finished(page).click()
    expect(passage(page)).to_have_text("Good.")


def test_what_is_typed_during_an_answer_is_kept_and_not_sent(visit: Visit, stub: Stub) -> None:
    gate = Gate()
    stub.will([gate, *end()])
    page = visit()
    ask(page)
    ask(page, "Next")
    expect(message(page)).to_have_value("Next")
    gate.open()
    expect(finished(page)).to_be_visible()
    assert len(stub.asked) == 1


def test_the_last_answer_is_written_again(visit: Visit, stub: Stub) -> None:
    stub.will([*pieces("First."), *end()], [*pieces("Second."), *end()], [*pieces("Better."), *end()])
    page = visit()
    ask(page, "One")
    expect(finished(page)).to_be_visible()
    ask(page, "Two")
    expect(passage(page)).to_have_text("Second.")
    expect(page.get_by_role("button", name="Regenerate")).to_have_count(1)
    finished(page).click()
    expect(passage(page)).to_have_text("Better.")
    expect(page.locator("article.answer")).to_have_count(2)
    assert stub.asked[2]["messages"] == stub.asked[1]["messages"]
    expect(message(page)).to_be_focused()


def test_an_edited_question_takes_the_place_of_what_followed(visit: Visit, stub: Stub) -> None:
    page = visit()
    ask(page, "One")
    expect(finished(page)).to_be_visible()
    ask(page, "Two")
    expect(finished(page)).to_be_visible()
    page.get_by_role("button", name="Edit").first.click()
    field = page.get_by_label("Edit the message")
    expect(field).to_be_focused()
    field.press("Escape")
    expect(page.locator("article")).to_have_count(4)
    page.get_by_role("button", name="Edit").first.click()
    field.fill("Three")
    field.press("Enter")
    expect(finished(page)).to_be_visible()
    expect(message(page)).to_be_focused()
    expect(page.locator("article")).to_have_count(2)
    assert stub.asked[-1]["messages"] == [{"role": "user", "content": "Three"}]


def test_a_cleared_conversation_comes_back_with_undo(visit: Visit, stub: Stub) -> None:
    page = visit()
    expect(button(page, "Clear")).to_be_disabled()
    ask(page)
    expect(finished(page)).to_be_visible()
    button(page, "Clear").click()
    expect(page.locator("article")).to_have_count(0)
    button(page, "Undo").click()
    expect(page.locator("article")).to_have_count(2)
    button(page, "Clear").click()
    ask(page, "New")
    expect(finished(page)).to_be_visible()
    expect(button(page, "Undo")).to_have_count(0)
    assert stub.asked[-1]["messages"] == [{"role": "user", "content": "New"}]


def test_clearing_stops_the_answer(visit: Visit, stub: Stub) -> None:
    stub.will([*pieces("Once"), Gate()])
    page = visit()
    ask(page)
    expect(passage(page)).to_have_text("Once")
    button(page, "Clear").click()
    assert stub.abandoned.wait(10)
    ask(page, "New")
    expect(passage(page)).to_have_text("Good.")


@on_both
def test_a_reload_leaves_nothing_of_the_conversation(visit: Visit, site: Site) -> None:
    page = visit()
    expect(page.get_by_text("a reload clears it")).to_be_visible()
    ask(page, "A secret")
    expect(finished(page)).to_be_visible(timeout=60_000)
    page.reload()
    expect(page.locator("article")).to_have_count(0)
    stored = page.evaluate("JSON.stringify([{...sessionStorage}, {...localStorage}])")
    assert "A secret" not in stored
    assert site.token in stored


# What is under and in an answer.


def test_reasoning_is_folded_and_apart_from_the_answer(visit: Visit, stub: Stub) -> None:
    gate = Gate()
    stub.will([*pieces("Think hard.", "reasoning_content"), gate, *pieces("Yes."), *end()], [*pieces("No."), *end()])
    page = visit()
    ask(page)
    summary = answer(page).locator("summary")
    expect(summary).to_have_text("Reasoning …")
    expect(page.get_by_text("Think hard.")).to_be_hidden()
    gate.open()
    expect(passage(page)).to_have_text("Yes.")
    expect(summary).to_have_text(re.compile(r"Reasoning, [\d.]+ s"))
    summary.click()
    expect(page.get_by_text("Think hard.")).to_be_visible()
    ask(page, "And?")
    expect(passage(page)).to_have_text("No.")
    expect(answer(page).locator("details")).to_be_hidden()
    assert stub.asked[1]["messages"][1] == {"role": "assistant", "content": "Yes."}


def test_an_answer_ends_with_its_figures(visit: Visit, stub: Stub) -> None:
    stub.will([*pieces("Cut"), *end("length", prompt=1200, cached=1024, predicted=300)])
    page = visit()
    ask(page)
    facts = answer(page).locator(".facts")
    expect(facts).to_contain_text("300 tokens · 20.0 tokens/s · first token ")
    expect(facts).to_contain_text("1,024 of 1,200 prompt tokens cached · cut off at the token limit")
    expect(page.get_by_text("Context: 1,500 / 4,096 tokens")).to_be_visible()


def test_figures_that_the_server_does_not_give_are_left_out(visit: Visit, stub: Stub) -> None:
    stub.will([piece("a"), piece("b"), {"choices": [{"delta": {}, "finish_reason": "stop"}]}])
    page = visit()
    ask(page)
    expect(answer(page).locator(".facts")).to_contain_text("2 tokens · ")
    expect(answer(page)).not_to_contain_text("cached")


CODE = "Look:\n\n```python\nif a < b:\n    print('<b>')\n```\n\nThat was it.\n~~~\nopen"


def test_fenced_code_is_apart_and_can_be_copied(visit: Visit, stub: Stub) -> None:
    stub.will([piece(character) for character in f" {CODE}"] + end())
    page = visit()
    ask(page)
    expect(finished(page)).to_be_visible()
    code = answer(page).locator("pre")
    assert code.all_text_contents() == ["if a < b:\n    print('<b>')", "open"]
    assert answer(page).locator(".prose").all_text_contents() == ["Look:", "That was it."]
    expect(answer(page).get_by_text("python", exact=True)).to_be_visible()
    copies = answer(page).get_by_role("button", name="Copy")
    copies.first.click()
    expect(answer(page).get_by_text("Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "if a < b:\n    print('<b>')"
    copies.last.click()
    expect(answer(page).get_by_text("Copied")).to_have_count(2)
    assert page.evaluate("navigator.clipboard.readText()") == f" {CODE}"


# Probabilities.


def shaded(page: Page, stub: Stub) -> Locator:
    owl = piece(" owl", 0.03, {" cat": 0.5, " dog": 0.25, " \n": 0.1, "\u202e": 0.0001})
    stub.will([piece("An", 0.95), owl, piece(" sees", 0.6), piece("\n", 0.1), *end()])
    ask(page)
    expect(finished(page)).to_be_visible()
    expect(passage(page).get_by_role("option")).to_have_count(0)
    button(page, "Probabilities").click()
    return passage(page).get_by_role("option")


def test_tokens_are_shaded_by_their_probability_while_asked_for(visit: Visit, stub: Stub) -> None:
    page = visit()
    tokens = shaded(page, stub)
    assert tokens.all_text_contents() == ["An", " owl", " sees", "\n"]
    shades = tokens.evaluate_all("all => all.map((it) => getComputedStyle(it).getPropertyValue('--warmth'))")
    assert shades == ["0%", "62%", "14%", "44%"]
    expect(button(page, "Probabilities")).to_have_attribute("aria-pressed", "true")
    button(page, "Probabilities").click()
    expect(tokens).to_have_count(0)
    expect(passage(page)).to_have_text("An owl sees")


LINES = ["␣owl 3.0%", "␣cat 50.0%", "␣dog 25.0%", "␣⏎ 10.0%", "␣owl 3.0%", "<U+202E> < 0.1%"]


def test_the_pointer_on_a_token_shows_its_alternatives(visit: Visit, stub: Stub) -> None:
    page = visit()
    shaded(page, stub).nth(1).hover()
    popover = page.get_by_role("tooltip")
    assert popover.locator("p").all_text_contents() == LINES
    popover.hover()
    expect(popover).to_be_visible()
    page.keyboard.press("Escape")
    expect(popover).to_be_hidden()
    passage(page).get_by_role("option").first.hover()
    expect(popover).to_contain_text("An 95.0%")
    button(page, "Settings").hover()
    expect(popover).to_be_hidden()


def test_the_keyboard_walks_over_the_tokens_with_one_stop_an_answer(visit: Visit, stub: Stub) -> None:
    page = visit()
    tokens = shaded(page, stub)
    popover = page.get_by_role("tooltip")
    answer(page).get_by_role("button", name="Copy").focus()
    page.keyboard.press("Shift+Tab")
    expect(tokens.first).to_be_focused()
    expect(popover).to_contain_text("An")
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    assert popover.locator("p").all_text_contents() == LINES
    expect(tokens.nth(1)).to_have_attribute("aria-describedby", "popover")
    page.keyboard.press("End")
    expect(popover.locator("p").first).to_have_text("⏎ 10.0%")
    page.keyboard.press("Tab")
    expect(popover).to_be_hidden()
    page.keyboard.press("Shift+Tab")
    expect(tokens.last).to_be_focused()


@pytest.mark.parametrize("size", SIZES)
def test_the_popover_stays_inside_the_window(visit: Visit, stub: Stub, size: tuple[int, int]) -> None:
    words = " ".join(["word"] * 400)
    stub.will([*pieces(words), *end()])
    page = visit(size)
    button(page, "Probabilities").click()
    ask(page)
    expect(finished(page)).to_be_visible()
    tokens = passage(page).get_by_role("option")
    width, height = size
    for i in (0, 150, 399):
        tokens.nth(i).hover()
        box = page.get_by_role("tooltip").bounding_box()
        assert box
        assert box["x"] >= 0
        assert box["y"] >= 0
        assert box["x"] + box["width"] <= width
        assert box["y"] + box["height"] <= height


def test_a_character_in_several_tokens_shows_in_the_last(visit: Visit, stub: Stub) -> None:
    owl = "🦉".encode()
    first, last = piece("\ufffd", 0.5), piece("🦉")
    first["choices"][0]["delta"] = {}
    [cut] = first["choices"][0]["logprobs"]["content"]
    cut["bytes"] = list(owl[:2])
    others = {owl[:2]: 0.5, owl[1:2]: 0.25, owl[2:3]: 0.2}
    cut["top_logprobs"] = [
        {"token": "\ufffd", "logprob": math.log(p), "bytes": list(other)} for other, p in others.items()
    ]
    last["choices"][0]["logprobs"]["content"][0]["bytes"] = list(owl[2:])
    stub.will([first, last, piece(" hoots"), *end()])
    page = visit()
    ask(page)
    expect(passage(page)).to_have_text("🦉 hoots")
    expect(finished(page)).to_be_visible()
    button(page, "Probabilities").click()
    tokens = passage(page).get_by_role("option")
    assert tokens.all_text_contents() == ["", "🦉", " hoots"]
    tokens.first.hover()
    lines = page.get_by_role("tooltip").locator("p")
    assert lines.all_text_contents() == ["<F0><9F> 50.0%", "<F0><9F> 50.0%", "<9F> 25.0%", "<A6> 20.0%"]
    assert page.locator("#popover .same").all_text_contents() == ["<F0><9F> 50.0%"]


def test_the_tokens_of_the_reasoning_are_shaded_apart(visit: Visit, stub: Stub) -> None:
    stub.will([*pieces("Think hard.", "reasoning_content"), *pieces("Yes indeed."), *end()])
    page = visit()
    button(page, "Probabilities").click()
    ask(page)
    expect(finished(page)).to_be_visible()
    answer(page).locator("summary").click()
    reasoning = page.get_by_role("listbox", name="Tokens of the reasoning").get_by_role("option")
    assert reasoning.all_text_contents() == ["Think", " hard."]
    assert passage(page).get_by_role("option").all_text_contents() == ["Yes", " indeed."]


def test_text_without_probabilities_is_shown_all_the_same(visit: Visit, stub: Stub) -> None:
    plain = {"choices": [{"delta": {"content": " and more"}, "finish_reason": None}]}
    stub.will([piece("Some"), plain, *end()], [plain, *end()])
    page = visit()
    button(page, "Probabilities").click()
    ask(page)
    expect(passage(page)).to_have_text("Some and more")
    expect(finished(page)).to_be_visible()
    ask(page)
    expect(passage(page)).to_have_text("and more")


# Models and settings.


def test_the_knobs_show_the_models_defaults_and_are_sent(visit: Visit, stub: Stub) -> None:
    page = visit()
    temperature, seed = page.get_by_label("Temperature"), page.get_by_label("Seed")
    expect(temperature).to_have_value("0.8")
    expect(page.get_by_label("Top-p")).to_have_value("0.95")
    expect(seed).to_have_value("")
    expect(button(page, "Reset")).to_be_disabled()
    temperature.fill("0")
    seed.fill("7")
    page.get_by_label("Max tokens").fill("12")
    page.get_by_label("Top-k").fill("")
    ask(page)
    expect(finished(page)).to_be_visible()
    sent = stub.asked[0]
    assert (sent["temperature"], sent["seed"], sent["max_tokens"]) == (0, 7, 12)
    assert "top_k" not in sent
    button(page, "Reset").click()
    expect(temperature).to_have_value("0.8")
    expect(seed).to_have_value("")
    expect(page.get_by_label("Top-k")).to_have_value("40")
    expect(button(page, "Reset")).to_be_disabled()


@pytest.mark.parametrize("size", SIZES)
def test_a_knob_out_of_range_is_shown_and_not_sent(visit: Visit, stub: Stub, size: tuple[int, int]) -> None:
    page = visit(size)
    await_defaults(page)
    page.evaluate("document.getElementById('top_p').value = '1.5'")
    ask(page, "Keep me")
    expect(page.get_by_label("Top-p")).to_be_focused()
    expect(message(page)).to_have_value("Keep me")
    assert not stub.asked


def test_another_model_brings_its_defaults_and_leaves_what_was_changed(visit: Visit, stub: Stub) -> None:
    stub.models = {"a.gguf": DEFAULTS, "b.gguf": {**DEFAULTS, "temperature": 0.3, "top_k": 20, "max_tokens": 100}}
    page = visit()
    await_defaults(page)
    page.get_by_label("Top-k").fill("5")
    page.get_by_label("Model").select_option("b.gguf")
    expect(page.get_by_label("Temperature")).to_have_value("0.3")
    expect(page.get_by_label("Max tokens")).to_have_value("100")
    expect(page.get_by_label("Top-k")).to_have_value("5")
    ask(page)
    expect(finished(page)).to_be_visible()
    assert stub.asked[0]["model"] == "b.gguf"
    button(page, "Reset").click()
    expect(page.get_by_label("Top-k")).to_have_value("20")


def test_settings_cover_the_conversation_in_a_narrow_window(visit: Visit) -> None:
    page = visit(NARROW)
    expect(page.get_by_label("Temperature")).to_be_hidden()
    button(page, "Settings").click()
    expect(page.get_by_label("Temperature")).to_be_visible()
    for _ in range(14):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.closest('header, main, footer')") is None
    page.keyboard.press("Escape")
    expect(page.get_by_label("Temperature")).to_be_hidden()
    button(page, "Settings").click()
    button(page, "Close").click()
    expect(button(page, "Settings")).to_be_focused()


# What goes wrong.


def test_a_refusal_is_an_alert_that_names_the_field(visit: Visit, stub: Stub, tolerated: list[str]) -> None:
    tolerated.append("400")
    stub.will(Refusal(400, "temperature must be at least 0", "temperature"))
    page = visit()
    ask(page)
    expect(page.get_by_role("alert")).to_have_text("temperature must be at least 0 (400, temperature)")
    finished(page).click()
    expect(passage(page)).to_have_text("Good.")
    expect(page.get_by_role("alert")).to_have_count(0)


def test_an_error_in_the_stream_leaves_the_text_before_it(visit: Visit, stub: Stub) -> None:
    error = {"error": {"message": "The context is full.", "type": "server_error", "param": None, "code": 500}}
    stub.will([*pieces("Once upon"), error])
    page = visit()
    ask(page)
    expect(page.get_by_role("alert")).to_have_text("The context is full. (500)")
    expect(passage(page)).to_have_text("Once upon")
    expect(finished(page)).to_have_text("Regenerate")


def test_a_stream_that_is_cut_is_an_error(visit: Visit, stub: Stub) -> None:
    stub.will([*pieces("Once upon"), Cut()])
    page = visit()
    ask(page)
    expect(page.get_by_role("alert")).to_have_text("The connection ended before the answer did.")
    expect(passage(page)).to_have_text("Once upon")


def test_a_server_that_went_away_is_an_error(visit: Visit, tolerated: list[str]) -> None:
    tolerated.append("Failed to load resource: net::ERR_CONNECTION_REFUSED")
    page = visit()
    await_defaults(page)
    page.route("**/completions", lambda route: route.abort("connectionrefused"))
    ask(page)
    expect(page.get_by_role("alert")).to_have_text("The server cannot be reached. Is it still running?")
    page.unroute_all()
    finished(page).click()
    expect(passage(page)).to_have_text("Good.")


def test_a_server_without_models_says_so_and_can_be_asked_again(visit: Visit, stub: Stub) -> None:
    stub.models = {}
    page = visit()
    expect(page.get_by_role("alert")).to_have_text("The server has no model.")
    stub.models = {"late.gguf": DEFAULTS}
    button(page, "Try again").click()
    expect(page.get_by_label("Model")).to_have_value("late.gguf")
    expect(page.get_by_role("alert")).to_have_count(0)


# Hostile text.

HOSTILE = [
    pytest.param("<img src=x onerror=\"window.hit = 1\"><svg onload='window.hit = 1'>", id="markup"),
    pytest.param("</script><script>window.hit = 1</script>", id="script"),
    pytest.param("W" * 3000, id="long word"),
    pytest.param("שלום <b>עולם</b> \u202eabc\u2066 مرحبا", id="right to left"),
    pytest.param("javascript:alert(1) &lt;b&gt; {{7*7}} ${1}", id="entities"),
]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("size", SIZES)
def test_text_stays_text(visit: Visit, stub: Stub, text: str, size: tuple[int, int], tolerated: list[str]) -> None:
    tolerated.append("400")
    fenced = f"{text}\n```{text}\n{text}\n```\n"
    stub.models = {text: DEFAULTS}
    stub.will(
        [piece(text, 0.5, {f"{text}!": 0.2}, "reasoning_content"), piece(fenced, 0.5, {text: 0.2}), *end()],
        Refusal(400, text, text),
    )
    page = visit(size)
    ask(page, text)
    expect(finished(page)).to_be_visible()
    answer(page).locator("summary").click()
    assert page.locator("article.question .bubble").text_content() == text
    assert answer(page).locator("details .passage").text_content() == text
    assert passage(page).locator(".prose").text_content() == text
    assert passage(page).locator("pre").first.text_content() == text
    assert no_overflow(page)
    button(page, "Probabilities").click()
    token = passage(page).get_by_role("option")
    assert token.text_content() == fenced
    token.focus()
    expect(page.get_by_role("tooltip")).to_be_visible()
    assert no_overflow(page)
    ask(page, text)
    expect(page.get_by_role("alert")).to_have_text(f"{text} (400, {text})")
    assert no_overflow(page)
    assert page.evaluate("window.hit") is None
    markup = "#turns :is(img, svg, script, b, a, iframe), #popover :is(img, svg, script, b)"
    assert page.locator(markup).count() == 0


def test_no_text_becomes_markup_in_the_source() -> None:
    script = (PAGE / "page.js").read_text()
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|Function\(", script)
    html = (PAGE / "index.html").read_text()
    assert not re.findall(r"\sstyle=|\son\w+=|<style|<script(?![^>]*src=)|https?:", html)


# Looks.

NO_OVERFLOW = """() => {
  const wide = [document.scrollingElement, ...document.querySelectorAll("header, main, footer, aside, #composer")]
    .filter((it) => it.scrollWidth > it.clientWidth);
  const outside = [...document.querySelectorAll("body *")].filter((it) => {
    const { left, right, width } = it.getBoundingClientRect();
    return width && !it.matches("pre *, .unseen, .unseen *") && (left < -0.5 || right > innerWidth + 0.5);
  });
  return [...wide, ...outside].map((it) => it.outerHTML.slice(0, 80));
}"""


def no_overflow(page: Page) -> bool:
    found = page.evaluate(NO_OVERFLOW)
    assert not found
    return True


CONTRASTS = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].map((x) => x / 255);
  };
  const over = ([r, g, b, a], under) => [r, g, b].map((x, i) => x * a + under[i] * (1 - a));
  const light = (color) => {
    const [r, g, b] = color.map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) =>
    element ? over(rgba(getComputedStyle(element).backgroundColor), ground(element.parentElement)) : [1, 1, 1];
  const ratio = (color, element) => {
    const under = ground(element);
    const [a, b] = [light(over(rgba(color), under)), light(under)].sort((x, y) => x - y);
    return (b + 0.05) / (a + 0.05);
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const hasText = [...element.childNodes].some((it) => it.nodeType === Node.TEXT_NODE && it.data.trim());
    const isSeen = element.checkVisibility({ opacityProperty: true, visibilityProperty: true });
    if (!isSeen || element.matches(".unseen, .unseen *, :disabled:not(select), option")) continue;
    const style = getComputedStyle(element);
    if (hasText || element.value) found.push([ratio(style.color, element), element.outerHTML.slice(0, 90)]);
    if (element.placeholder) {
      found.push([ratio(getComputedStyle(element, "::placeholder").color, element), `placeholder ${element.id}`]);
    }
  }
  return found;
}"""


def low_contrasts(page: Page) -> list[Any]:
    found = page.evaluate(CONTRASTS)
    assert len(found) > 8
    return [(round(ratio, 2), what) for ratio, what in found if ratio < 4.5]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", SIZES)
def test_everything_fits_and_can_be_read(
    visit: Visit, stub: Stub, tolerated: list[str], size: tuple[int, int], scheme: str
) -> None:
    tolerated.append("40")
    page = visit(size, scheme=scheme)
    await_defaults(page)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(251, 250, 247)") == (scheme == "light")
    assert no_overflow(page)
    assert not low_contrasts(page)

    gate = Gate()
    levels = [piece(f" word{p}", p, {" other": 1 - p}) for p in (0.99, 0.6, 0.3, 0.1, 0.01)]
    thoughts = [piece(f" thought{p}", p, what="reasoning_content") for p in (0.99, 0.6, 0.3, 0.1, 0.01)]
    stub.will([*thoughts, *levels, *pieces(f"\n{CODE}"), gate, *end()], Refusal(400, "No.", "min_p"))
    ask(page, "A question of some length, so that it does not fit into one line of a narrow window")
    expect(passage(page)).to_contain_text("open")
    answer(page).locator("summary").click()
    assert no_overflow(page)
    assert not low_contrasts(page)
    gate.open()
    expect(finished(page)).to_be_visible()
    button(page, "Probabilities").click()
    passage(page).get_by_role("option").nth(3).focus()
    expect(page.get_by_role("tooltip")).to_be_visible()
    assert no_overflow(page)
    assert not low_contrasts(page)
    page.get_by_role("button", name="Edit").click()
    assert no_overflow(page)
    assert not low_contrasts(page)
    ask(page, "And now an error")
    expect(page.get_by_role("alert")).to_be_visible()
    assert no_overflow(page)
    assert not low_contrasts(page)
    if size == NARROW:
        button(page, "Settings").click()
        assert no_overflow(page)
        assert not low_contrasts(page)
        button(page, "Close").click()
    stub.token = "another"
    page.reload()
    expect(page.get_by_role("dialog")).to_be_visible()
    expect(page.get_by_role("alert")).to_be_visible()
    assert no_overflow(page)
    assert not [low for low in low_contrasts(page) if "token" in low[1]]


def test_nothing_moves_for_who_asked_for_less_motion(visit: Visit, stub: Stub) -> None:
    moving = "() => document.getAnimations().filter((it) => it.playState === 'running').length"
    stub.will([Gate()])
    page = visit(motion="reduce")
    ask(page)
    expect(answer(page)).to_contain_text("Reading")
    assert page.evaluate(moving) == 0
    page.emulate_media(reduced_motion="no-preference")
    assert page.evaluate(moving) == 1


# The keyboard, and what is said aloud.


def focused(page: Page) -> str:
    return str(page.evaluate("document.activeElement.id || document.activeElement.textContent || 'page'"))


FOCUS_IS_SEEN = """() => {
  const it = document.activeElement;
  const { outlineStyle, outlineWidth } = getComputedStyle(it);
  const frame = it.closest("#composer");
  return (outlineStyle !== "none" && parseFloat(outlineWidth) >= 2)
    || (it.id === "message" && getComputedStyle(frame).boxShadow !== "none");
}"""


def test_the_tab_key_goes_once_through_everything_and_the_focus_is_seen(visit: Visit, stub: Stub) -> None:
    stub.models = {"a.gguf": DEFAULTS, "b.gguf": DEFAULTS}
    stub.will([*pieces("Think", "reasoning_content"), *pieces("Look:\n```\ncode\n```"), *end()])
    page = visit()
    await_defaults(page)
    expect(message(page)).to_be_focused()
    page.keyboard.type("One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    expect(finished(page)).to_be_visible()
    assert stub.asked[0]["messages"][0]["content"] == "One\ntwo"
    page.get_by_label("Model").focus()
    order = [focused(page)]
    while "max_tokens" not in order and len(order) < 40:
        page.keyboard.press("Tab")
        order.append(focused(page))
        assert page.evaluate(FOCUS_IS_SEEN), order
    expected = "model clear show-settings main Edit Copy Reasoning Copy code Copy Regenerate message shade send system"
    assert [re.sub("Reasoning.*", "Reasoning", name) for name in order] == [
        *expected.split(),
        *("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "seed", "max_tokens"),
    ]


UNNAMED = """() => [...document.querySelectorAll(
    "button, input, textarea, select, summary, pre, main, aside, dialog, [role=listbox], [role=option]"
  )].filter((it) => {
    const label = document.getElementById(it.getAttribute("aria-labelledby")) ?? it.labels?.[0];
    return !(it.ariaLabel || label?.textContent.trim() || it.textContent.trim());
  }).map((it) => it.outerHTML)"""


def test_every_control_has_a_name(visit: Visit, stub: Stub) -> None:
    page = visit()
    shaded(page, stub)
    page.get_by_role("button", name="Edit").click()
    assert page.get_by_role("listbox", name="Tokens of the answer").is_visible()
    assert page.evaluate(UNNAMED) == []


def test_an_answer_is_said_in_sentences(visit: Visit, stub: Stub) -> None:
    gate = Gate()
    stub.will([*pieces("One owl. Two ow"), gate, *pieces("ls. The"), *pieces(" end"), *end()])
    page = visit()
    page.evaluate(
        """() => {
          window.said = [];
          const added = (records) => records.flatMap((it) => [...it.addedNodes]);
          const note = (records) => said.push(...added(records).map((it) => it.textContent));
          new MutationObserver(note).observe(document.querySelector("[aria-live=polite]"), { childList: true });
        }"""
    )
    ask(page)
    expect(passage(page)).to_have_text("One owl. Two ow")
    assert page.evaluate("said") == ["One owl."]
    gate.open()
    expect(finished(page)).to_be_visible()
    assert page.evaluate("said") == ["One owl.", "Two owls.", "The end"]
    assert page.locator("#turns").evaluate("(it) => it.closest('[aria-live]')") is None


# The scroll.


def test_the_scroll_follows_the_stream_unless_the_user_scrolled_up(visit: Visit, stub: Stub) -> None:
    gates = [Gate(), Gate(), Gate()]
    lines = pieces("line\n" * 100)
    stub.will([*lines, gates[0], *lines, piece("two"), gates[1], *lines, piece("three"), gates[2], *lines, *end()])
    page = visit()
    below = "document.getElementById('main').scrollHeight - main.scrollTop - main.clientHeight"
    ask(page)
    expect(passage(page)).to_contain_text("line")
    gates[0].open()
    expect(passage(page)).to_contain_text("two")
    page.wait_for_function(f"{below} < 2")
    expect(button(page, "Go to the end")).to_be_hidden()
    page.mouse.move(500, 400)
    page.mouse.wheel(0, -300)
    expect(button(page, "Go to the end")).to_be_visible()
    top = page.evaluate("main.scrollTop")
    gates[1].open()
    expect(passage(page)).to_contain_text("three")
    assert page.evaluate("main.scrollTop") == top
    button(page, "Go to the end").click()
    gates[2].open()
    expect(finished(page)).to_be_visible()
    assert page.evaluate(below) < 2


# On the real server.


@on_the_server
def test_the_built_in_model_answers(visit: Visit) -> None:
    page = visit()
    expect(page.get_by_label("Temperature")).not_to_have_value("")
    page.get_by_label("Max tokens").fill("12")
    page.get_by_label("Temperature").fill("0")
    ask(page, "Once upon a time")
    expect(finished(page)).to_be_visible(timeout=60_000)
    expect(page.get_by_role("alert")).to_have_count(0)
    facts = answer(page).locator(".facts")
    expect(facts).to_have_text(re.compile(r"12 tokens · [\d.,]+ tokens/s · first token [\d.]+ s · \d+ of \d+ prompt"))
    expect(facts).to_contain_text("cut off at the token limit")
    expect(page.get_by_text(re.compile(r"Context: \d+ / [\d,]+ tokens"))).to_be_visible()
    text = passage(page).inner_text().split()
    assert text
    page.get_by_label("Max tokens").fill("11")
    finished(page).click()
    expect(facts).to_contain_text("11 tokens", timeout=60_000)
    cached, prompt = map(int, re.findall(r"(\d+) of (\d+) prompt tokens cached", facts.inner_text())[0])
    assert cached >= prompt - 1

    button(page, "Probabilities").click()
    tokens = passage(page).get_by_role("option")
    expect(tokens).to_have_count(11)
    assert "".join(text).startswith("".join("".join(tokens.all_text_contents()).split()))
    tokens.nth(3).hover()
    lines = page.get_by_role("tooltip").locator("p").all_text_contents()
    assert len(lines) == 6
    assert lines[0] == lines[1]  # greedy takes the likeliest
    shares = [float(line.split()[-1].rstrip("%")) for line in lines[1:]]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) <= 100.3


@on_the_server
def test_what_the_server_refuses_is_an_alert(visit: Visit, tolerated: list[str]) -> None:
    tolerated.append("400")
    page = visit()
    page.get_by_label("Repeat penalty").fill("0")
    ask(page)
    expect(page.get_by_role("alert")).to_contain_text("(400, repeat_penalty)")
