"""The generator of the built-in model's training text: reproducible, varied, in clean English."""

from __future__ import annotations

import random
import re

import stories

# A sentence that starts with a small letter, a stray space or bracket, a doubled mark, a wrong article.
FLAWS = re.compile(r'(?:[.!?] |^|\n|[^,] ")[a-z]|  | [.,!?]|[{}\[\]|]|[.,]{2}|\."[.,]|\b[Aa] [aeiou]|\b[Aa]n [^aeiou]')


def test_the_same_seed_gives_the_same_documents_and_another_seed_gives_others() -> None:
    documents = stories.documents(7, 50)
    assert documents == stories.documents(7, 50)
    assert documents[:20] == stories.documents(7, 20)
    assert not set(documents) & set(stories.documents(8, 50))


def test_no_document_comes_twice_in_a_thousand() -> None:
    documents = stories.documents(1, 1000)
    assert len(set(documents)) == 1000


def test_every_plot_is_told_with_many_heroes_and_places() -> None:
    rng = random.Random(2)
    told = [stories.tell(rng) for _ in range(1000)]
    assert {story.plot for story in told} == set(stories.PLOTS)
    assert len({story.facts["h"] for story in told}) > 30
    assert len({story.facts["k"] for story in told}) > 30
    assert {story.facts["place"] for story in told} == set(stories.PLACES)


def test_a_story_is_well_formed() -> None:
    rng = random.Random(3)
    for _ in range(1000):
        text = stories.tell(rng).text
        assert stories.MIN_WORDS <= len(text.split()) <= stories.MAX_WORDS
        assert text[-1] in '.!?"', text
        assert text.count('"') % 2 == 0, text
        flaw = FLAWS.search(text)
        assert flaw is None, (flaw.group(), text)


def test_a_story_keeps_its_hero_and_uses_no_other_name() -> None:
    rng = random.Random(4)
    names = set(stories.GIRLS + stories.BOYS)
    for _ in range(500):
        story = stories.tell(rng)
        named = set(re.findall(r"[A-Z][a-z]+", story.text)) & names
        assert story.facts["h"] in named
        assert named <= {story.facts["h"], story.facts["f"]}


def test_a_request_names_what_the_story_is_about() -> None:
    rng = random.Random(5)
    for _ in range(500):
        story = stories.tell(rng)
        for name in re.findall(r"[A-Z][a-z]+", " ".join(story.topics)):
            assert name in story.text
        for fact in ("place", "o"):
            if any(re.search(rf"\b{story.facts[fact]}\b", topic) for topic in story.topics):
                assert story.facts[fact] in story.text


def test_a_share_of_the_documents_are_chats_of_whole_turns() -> None:
    documents = stories.documents(6, 1000)
    chats = [text for text in documents if text.startswith(stories.IM_START)]
    assert 0.25 < len(chats) / len(documents) < 0.35
    turn = r"<\|im_start\|>(system|user|assistant)\n[^<]+<\|im_end\|>\n"
    assert all(re.fullmatch(f"({turn})+", text) for text in chats)
    assert not any("<|" in text for text in documents if text not in chats)
