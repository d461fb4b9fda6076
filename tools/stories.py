# Lists of words and templates look like the text that they produce.
# ruff: noqa: E501, SIM905
"""The training text of the built-in model: short children's stories from a seeded template grammar.

A template is plain text with three constructs:

- `[one|two|]`: one of the alternatives, at random; an empty one makes the others optional. They can be nested.
- `{slot}`: a fact of this story, which is the same throughout. `{h}` is the hero's name.
- `{a slot}`, `{A slot}`: the same with "a" or "an" in front.

Facts: `h` the hero, `f` the friend (each with `k` kind, `a` adjective and pronouns), `obj` adjective and noun of the
hero's thing, `o` its noun alone, `place`/`at`/`near` where the story happens, `s1`..`s3` three different spots there,
`mom` an older relative, `day` the weather. A plot adds its own facts, in variants that fit together.

`python tools/stories.py --seed 1 --count 5` prints some.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

MIN_WORDS, MAX_WORDS = 60, 160  # of one story
CHAT_SHARE = 0.3  # of all documents

IM_START, IM_END = "<|im_start|>", "<|im_end|>"

Facts = dict[str, str]


# --- templates ---


@dataclass(frozen=True)
class Choice:
    """Alternatives, each a parsed template."""

    options: tuple[Template, ...]


@dataclass(frozen=True)
class Slot:
    """A fact to fill in.

    Attributes:
        name: the name of the fact.
        article: "a" or "A" for an indefinite article in front, or empty.
    """

    name: str
    article: str


Template = tuple["str | Choice | Slot", ...]

_MARKS = re.compile(r"[\[\]|]|\{(?:([aA]) )?(\w+)\}")


@cache
def parse(text: str) -> Template:
    """Parse a template; the result is cached."""
    # For each open bracket, a list of finished alternatives and a list of the parts of the current one.
    options: list[list[Template]] = [[]]
    parts: list[list[str | Choice | Slot]] = [[]]
    end = 0
    for mark in _MARKS.finditer(text):
        if mark.start() > end:
            parts[-1].append(text[end : mark.start()])
        end = mark.end()
        if mark.group(2):
            parts[-1].append(Slot(mark.group(2), mark.group(1) or ""))
        elif mark.group() == "[":
            options.append([])
            parts.append([])
        elif mark.group() == "|":
            options[-1].append(tuple(parts[-1]))
            parts[-1] = []
        else:
            choice = Choice((*options.pop(), tuple(parts.pop())))
            parts[-1].append(choice)
    parts[-1].append(text[end:])
    if len(parts) != 1 or options[0]:
        raise ValueError(f"brackets do not match in template: {text!r}")
    return tuple(parts[0])


def with_article(article: str, words: str) -> str:
    """Put "a" or "an" before `words`, by spelling: no word here has a silent h, or a u pronounced "you"."""
    return f"{article}{'n' if words[0] in 'aeiou' else ''} {words}"


def expand(template: str, facts: Facts, rng: random.Random) -> str:
    """Return the text of a template, with choices made and facts filled in."""
    return re.sub(r"\s+", " ", _expand(parse(template), facts, rng)).strip()


def _expand(template: Template, facts: Facts, rng: random.Random) -> str:
    out = []
    for part in template:
        if isinstance(part, str):
            out.append(part)
        elif isinstance(part, Choice):
            out.append(_expand(rng.choice(part.options), facts, rng))
        else:
            value = _expand(parse(facts[part.name]), facts, rng)
            out.append(with_article(part.article, value) if part.article else value)
    return "".join(out)


# --- words ---

GIRLS = "Lily Mia Anna Ella Rosie Lucy Molly Nora Ruby Daisy Emma Zoe Clara Maya Ivy Nina Bella Luna".split()
BOYS = "Tom Ben Max Sam Leo Finn Jack Oscar Tim Noah Hugo Milo Theo Luke Felix Owen Pip Gus".split()
ANIMALS = """rabbit fox bear mouse squirrel hedgehog duck frog owl cat dog puppy kitten pig lamb goat pony deer
badger beaver otter turtle penguin raccoon chicken goose elephant lion monkey panda koala dragon
tiger mole bird""".split()
TRAITS = """little little little small small young cheerful curious kind gentle quiet clever shy brave friendly
happy""".split()
ELDERS = "mother mother father grandmother grandfather".split()
DAYS = "sunny sunny windy warm bright cool cloudy quiet fine".split()

COLORS = "red blue yellow green purple orange pink white".split()
# What each thing can be besides a color.
THINGS = {
    "ball": "soft bouncy", "kite": "big striped", "scarf": "soft warm striped", "hat": "tall soft funny",
    "whistle": "shiny wooden tiny", "bell": "shiny golden tiny", "drum": "big round wooden", "book": "big old little",
    "toy boat": "little wooden", "lantern": "little old shiny", "basket": "big little", "button": "shiny golden round",
    "key": "golden old tiny shiny", "ring": "golden shiny", "marble": "round shiny", "blanket": "soft warm old",
    "umbrella": "big striped", "flute": "wooden golden", "crayon": "big", "teddy bear": "soft old big",
    "doll": "little wooden old", "stone": "round shiny smooth", "shell": "shiny smooth tiny", "feather": "long soft",
    "ribbon": "long shiny", "backpack": "big little", "puzzle": "big wooden", "wagon": "little wooden",
    "top": "wooden shiny", "coin": "golden old shiny", "balloon": "big round", "cup": "little shiny",
    "toy car": "little shiny", "toy train": "wooden shiny", "pencil": "long", "box": "wooden tiny old",
    "mirror": "round little", "rope": "long strong", "spoon": "wooden shiny", "star": "shiny wooden golden",
    "toy robot": "shiny tiny", "necklace": "shiny golden", "pillow": "soft", "watch": "golden old", "crown": "golden tiny",
}  # fmt: skip

# Where it happens: the phrase "in the ...", and spots there that fit "looked ..." and "sat ...".
PLACES = {
    "forest": ("in", "under an old oak tree|behind a mossy rock|next to a hollow log|in the tall ferns|by a little stream"),
    "meadow": ("in", "in the tall grass|under a bush|next to the wild flowers|by an old fence|behind a big stone"),
    "beach": ("at", "behind a big rock|next to a sand castle|under an old boat|by the warm water|near a pile of shells"),
    "river": ("by", "under the bridge|on the river bank|behind a big stone|next to the reeds|under a willow tree"),
    "lake": ("by", "next to the reeds|under a willow tree|on the old dock|behind a little boat|on a flat stone"),
    "garden": ("in", "under the apple tree|next to the roses|behind the shed|by the pumpkins|near the old gate"),
    "hill": ("on", "behind a big stone|under a pine tree|in the tall grass|next to the path|by an old wall"),
    "village": ("in", "by the well|behind the bakery|under a bench|next to the old tower|near the market"),
    "farm": ("on", "behind the barn|under the wagon|next to the hay|by the chicken house|near the old fence"),
    "park": ("in", "under a bench|behind the slide|next to the pond|by the swings|under a tall tree"),
    "valley": ("in", "under a pine tree|by a little stream|behind a big rock|next to the path|in the soft moss"),
    "orchard": ("in", "under the apple tree|behind a ladder|next to a basket|by the stone wall|under a pear tree"),
    "mountain": ("on", "behind a big rock|next to a small cave|under a pine tree|by a cold stream|near the path"),
    "pond": ("by", "next to the reeds|on a flat stone|under a willow tree|behind a bush|by the lily pads"),
    "jungle": ("in", "under a giant leaf|behind a tall palm tree|next to a waterfall|by the vines|near a muddy pool"),
    "town": ("in", "by the fountain|behind the library|under a bench|next to the toy shop|near the train station"),
    "island": ("on", "under a palm tree|behind a big rock|next to a small cave|in the warm sand|by the waves"),
}  # fmt: skip

# What a strong wind can take.
LIGHT_THINGS = ("kite", "scarf", "hat", "ribbon", "feather", "balloon", "blanket", "umbrella", "book", "basket")

HOBBIES = """to run and jump|to sing songs|to look at the clouds|to draw pictures|to help others|to read books|to dance
|to explore|to play outside|to tell jokes|to pick flowers|to collect stones|to watch the birds|to ask questions
|to play games|to splash in puddles|to climb trees|to bake""".replace("\n", "").split("|")  # fmt: skip


def _pronouns(prefix: str, girl: bool) -> Facts:
    he, him, his = ("she", "her", "her") if girl else ("he", "him", "his")
    forms = {"he": he, "him": him, "his": his, "He": he.title(), "His": his.title(), "himself": him + "self"}
    return {prefix + form: word for form, word in forms.items()}


def _invented_name(rng: random.Random) -> str:
    """Return an invented name, so that the model learns to copy a name from the request, not only to recall one."""
    syllables = """ba bi bo da di do fa fi ka ki ko la li lo lu ma mi mo na ni no pa pi po
    ra ri ro sa ta ti to va vi za zi zo"""
    name = "".join(rng.choice(syllables.split()) for _ in range(2))
    return name.title() + rng.choice(("", "", "n", "r"))


def thing_facts(rng: random.Random, things: tuple[str, ...]) -> Facts:
    """Return the facts of a thing: what it is and what it looks like."""
    thing = rng.choice(things)
    adjective = rng.choice(COLORS if rng.random() < 0.6 else THINGS[thing].split())
    return {"o": thing, "oa": adjective, "obj": f"{adjective} {thing}"}


def world(rng: random.Random, invented_names: bool = False) -> Facts:
    """Return the facts that every plot can use."""
    animal_story = rng.random() < 0.55
    hero_girl, friend_girl = rng.random() < 0.5, rng.random() < 0.5
    hero = rng.choice(GIRLS if hero_girl else BOYS)
    friend = rng.choice([name for name in (GIRLS if friend_girl else BOYS) if name != hero])
    if invented_names:
        hero = _invented_name(rng)
    kind = rng.choice(ANIMALS) if animal_story else ("girl" if hero_girl else "boy")
    if animal_story or rng.random() < 0.35:
        friend_kind = rng.choice([animal for animal in ANIMALS if animal != kind])
    else:
        friend_kind = "girl" if friend_girl else "boy"
    place = rng.choice(list(PLACES))
    preposition, spots = PLACES[place]
    s1, s2, s3 = rng.sample(spots.split("|"), 3)
    love1, love2 = rng.sample(HOBBIES, 2)
    return {
        "h": hero, "k": kind, "ha": rng.choice(TRAITS), **_pronouns("", hero_girl),
        "f": friend, "fk": friend_kind, "fa": rng.choice(TRAITS), **_pronouns("f", friend_girl),
        "col": rng.choice(COLORS),
        "place": place, "at": f"{preposition} the {place}", "At": f"{preposition.title()} the {place}",
        "near": f"near the {place}", "s1": s1, "s2": s2, "s3": s3,
        "mom": rng.choice(ELDERS), "day": rng.choice(DAYS), "love": love1, "love2": love2,
        "hk": "{ha} {k}", "ffk": "{fa} {fk}",
    }  # fmt: skip


# --- plots ---


@dataclass(frozen=True)
class Plot:
    """A family of stories.

    Attributes:
        themes: what a request may call it; templates.
        text: the paragraphs; templates.
        variants: facts that vary together.
        has_thing: whether the hero's thing is always in the story, so that a request can name it.
        things: what that thing can be.
    """

    themes: tuple[str, ...]
    text: tuple[str, ...]
    variants: tuple[Facts, ...] = ({},)
    has_thing: bool = False
    things: tuple[str, ...] = tuple(THINGS)


OPEN = (
    "[Once upon a time, there was {a hk} named {h}.|Once upon a time, there was {a hk} named {h}."
    "|Once upon a time, {a hk} named {h} lived {near}.|Once upon a time, there was {a hk} named {h} who lived {at}."
    "|Once upon a time, {at}, there lived {a hk} named {h}.|Once there was {a hk} named {h}."
    "|There once was {a hk} named {h}, who lived {near}.|{h} was {a hk} who lived {near}.|{At} lived {a hk} named {h}."
    "|In a cozy house {near}, there lived {a hk} named {h}.|Long ago, {a hk} named {h} lived {at}.] "
)
LOVES = "[{h} loved {love}.|{He} loved {love} and {love2}.|Every day, {he} liked {love}.|More than anything, {h} loved {love}.|] "
ONE_DAY = "[One day|One {day} day|One {day} morning|One {day} afternoon|One morning|On {a day} day]"
MEET = "[Just then, {a ffk} named {f} came by.|Then {a ffk} named {f} walked up.|Along came {f}, {a ffk}.|Soon {h} met {a ffk} named {f}.]"
FRIENDS = "{h} had a good friend, {a fk} named {f}."
SAD = "[felt very sad|wanted to cry|felt a lump in {his} throat|felt sad and small]"
NIGHT = "[That night|When the stars came out|At bedtime|That evening], {h} [fell asleep with a smile|went to bed happy|dreamed sweet dreams|smiled in {his} sleep|told {his} {mom} all about it]."
ALWAYS = "[From that day on|After that|Ever since then], [{h} and {f} were best friends|the two friends played together every day|{h} and {f} always helped each other|you could often see {h} and {f} together {at}]."

PLOTS: dict[str, Plot] = {
    "lost": Plot(
        ("losing something", "finding something that was lost", "a lost {o}", "losing {a obj}", "a friend who helps"),
        (
            OPEN + "[{His} favorite thing was {a obj}.|{He} had {a obj} that {he} loved very much.|{He} had {a obj}, and {he} took it everywhere.|{His} {mom} had given {him} {a obj}.]",
            ONE_DAY + ", {h} [played {at}|went for a walk {at}|was {at}]. [When {he} looked for the {o}, it was gone!|Then {he} saw that the {o} was gone!|But the {o} was gone!] \"[Oh no! Where is my {o}?|I have lost my {o}!|Where can my {o} be?]\" [cried|said] {h}. {He} looked {s1}, but it was not there. {He} looked {s2}, [but it was not there either|but there was nothing|but no luck]. {h} " + SAD + ".",
            MEET + " \"[Why are you sad|What is wrong|What are you looking for], {h}?\" asked {f}. \"I lost my {obj},\" said {h}. \"[I will help you|Let us look together|We will find it together],\" said {f}. [They looked and looked.|The two of them looked all around.|Together they looked again.] [At last|Finally|After a while], {f} saw something {oa} {s3}. It was the {o}!",
            "\"[Thank you|Thank you so much|Oh, thank you], {f}!\" said {h}. [{He} gave {f} a big hug.|{h} was so happy that {he} danced.|They both laughed.] [From that day on, {h} took good care of the {o}.|" + ALWAYS + "|They played with the {o} until it was time to go home.]",
        ),
        has_thing=True,
    ),
    "friend": Plot(
        ("making a friend", "a new friend", "being lonely", "two friends", "{a k} who meets {a fk}", "being shy"),
        (
            OPEN + LOVES + "But [{h} had no one to play with|{he} was often lonely|{he} did not have a friend yet].",
            ONE_DAY + ", {h} saw {a fk} sitting {s1}. [{h} wanted to say hello, but {he} felt shy.|{h} had never seen the {fk} before.|The {fk} looked lonely, too.] [{h} took a deep breath and walked closer.|Slowly, {h} walked over.|\"I can do it,\" thought {h}.] \"Hello, I am {h}. What is your name?\" \"My name is {f},\" said the {fk}. \"[I am new here|I just moved here|I do not know anyone here].\"",
            "\"[Would you like to play with my {obj}?|Look, I have {a obj}. Do you want to play?|Do you want to see my {obj}?]\" asked {h}. \"[Yes, please!|Oh, yes!|I would love to!]\" said {f}. [They took turns with the {o}|They played with the {o}|They laughed and played] [all afternoon|all day|until the sun went down].",
            "[When it was time to go home|At the end of the day|When it got dark], {f} asked, \"[Can we play again tomorrow?|Will you come back tomorrow?|Are we friends now?]\" \"[Yes, of course|Yes, we are friends now|Of course, my friend],\" said {h}. [{h} was not lonely anymore.|Now {h} had a real friend.|" + ALWAYS + "]",
        ),
        has_thing=True,
    ),
    "help": Plot(
        ("helping", "helping a friend", "being kind", "{a k} who helps {a fk}", "{problem}"),
        (
            OPEN + "[{h} was always ready to help.|{He} liked to help others.|Everyone knew that {h} was kind.|" + LOVES + "]",
            ONE_DAY + ", {h} was walking {at} when {he} [saw|met] {a ffk} named {f}. {trouble} \"[Oh dear|Oh no]! [What can I do|What should I do now]?\" [said|cried] {f}. \"[Do not worry|Please do not be sad]. I will help you,\" said {h}.",
            "{fix} It was [hard work|not easy|slow work], but [{h} did not give up|they did not stop|they worked together]. [At last|Soon|Finally], {done}",
            "\"Thank you, {h}! [You are so kind|You are a real friend|I could not do it alone],\" said {f}. [{f} gave {h} {a obj} as a gift.|{f} and {h} sat down and ate some {snack}.|{f} gave {h} some {snack} to say thank you.] [{h} felt warm and happy inside.|It felt good to help.|{h} was proud and happy.] [" + ALWAYS + "|" + NIGHT + "|]",
        ),
        tuple(
            {"problem": problem, "trouble": trouble, "fix": fix, "done": done, "snack": snack}
            for problem, trouble, fix, done in (
                ("a wagon stuck in the mud", "{fHis} wagon was stuck in the mud.", "{h} pushed the wagon from behind, and {f} pulled from the front.", "the wagon rolled out of the mud."),
                ("a basket of apples", "{fHis} basket had tipped over, and apples were rolling everywhere.", "{h} and {f} picked up the apples, one by one.", "all the apples were back in the basket."),
                ("a kite in a tree", "{fHis} kite was stuck high up in a tree.", "{h} climbed up slowly, from branch to branch, and pulled the string.", "the kite came down."),
                ("a broken fence", "The wind had blown down {fhis} fence.", "{h} held the boards, and {f} put in the nails.", "the fence stood straight again."),
                ("a heavy bag", "{fHe} was carrying a bag that was much too heavy.", "{h} took one side of the bag, and {f} took the other.", "they reached {f}'s house."),
                ("a house full of leaves", "The wind had blown a pile of leaves in front of {fhis} door.", "{h} found a broom and swept, and {f} carried the leaves away.", "the door could open again."),
                ("a boat with a hole", "{fHis} little boat had a hole in it.", "{h} cut a piece of wood, and {f} fixed it over the hole.", "the boat could float again."),
                ("a fallen branch", "A big branch had fallen across {fhis} path.", "{h} and {f} pulled the branch with all their might.", "the path was free."),
                ("a friend with a cold", "{fHe} had a bad cold and could not cook.", "{h} made a pot of hot soup and brought a warm blanket.", "{f} felt much better."),
                ("a torn coat", "{fHis} warm coat was torn.", "{h} took a needle and some thread, and {f} held the cloth.", "the coat was as good as new."),
            )
            for snack in ("berries", "cookies", "apples", "cake", "nuts")
        ),
    ),
    "brave": Plot(
        ("being brave", "being afraid", "courage", "{a k} who was afraid of {fear}", "{fear}"),
        (
            OPEN + LOVES + "But {he} was afraid of {fear}. {habit}",
            "\"[Everyone is afraid of something|It is all right to be afraid|I was afraid of {fear}, too],\" said {his} {mom}. \"[Being brave means that you try anyway|You can be afraid and brave at the same time|Just take one small step].\" {h} thought about it [for a long time|all day].",
            "{event} {h} [was scared|felt {his} heart beat fast|was shaking a little], but {he} [remembered {his} {mom}'s words.|took a deep breath.|said, \"I can be brave.\"] {act} {truth}",
            "[\"I did it!\" said {h}.|\"That was not so bad!\" laughed {h}.|\"I was brave!\" {h} told {his} {mom}.] [{His} {mom} gave {him} a big hug.|{His} {mom} was very proud.] [From that day on, {h} was not afraid of {fear} anymore.|After that, {fear} did not seem so scary.|" + NIGHT + "]",
        ),
        tuple(
            {"fear": fear, "habit": habit, "event": event, "act": act, "truth": truth}
            for fear, habit, event, act, truth in (
                ("the dark", "Every night, {he} hid under the blanket.", "One night, {h} heard a strange sound outside the window.", "{He} took {his} little lamp and opened the door.", "[It was only a kitten who wanted to come in.|It was only a small owl that sang to the moon.|It was only the wind in the leaves.]"),
                ("thunder", "When a storm came, {he} hid under the bed.", "One night, a big storm came, and a little bird sat at the window.", "{He} opened the window and let the bird in.", "They listened to the thunder together, and [it was only a loud noise|it sounded like a big drum]."),
                ("deep water", "{He} never went near the water.", "One day, a duckling was caught in the reeds in the water.", "{He} walked into the water, step by step.", "The water was [cool and gentle|soft and cool], and {h} set the duckling free."),
                ("the old bridge", "{He} always took the long way around.", "One day, {he} heard someone call for help on the other side.", "{He} held on tight and walked across the bridge.", "[A small lamb had hurt its leg, and {h} carried it home.|An old goat had lost his glasses, and {h} found them for him.]"),
                ("the big dog", "{He} ran away when it barked.", "One day, the big dog sat {s1}, crying.", "{He} walked up to the dog very slowly.", "There was a thorn in its paw. {h} pulled it out, and the dog licked {his} face."),
                ("high places", "{He} never climbed up anything.", "One day, a tiny bird fell out of its nest {s1}.", "{He} climbed up, higher and higher, and put the bird back.", "From the top, {he} could see [the whole {place}|far away]. It was beautiful."),
                ("the first day of school", "{He} could not sleep when {he} thought of it.", "The big day came, and {h} stood at the door of the school.", "{He} opened the door and said hello.", "[A smiling teacher showed {him} a seat next to {a fk} named {f}.|{A fk} named {f} waved and said, \"Come and sit with me!\"]"),
                ("the old cave", "{He} thought that a monster lived there.", "One day, {his} ball rolled into the cave.", "{He} took a lamp and went inside.", "There was no monster at all, only [a sleepy bat|a family of mice|walls that shone like stars]."),
                ("new things", "{He} always ate the same food and played the same game.", "One day, {his} friend {f} brought a plate of strange green soup.", "{He} took one very small spoon of it.", "It was [delicious|so good that {he} ate it all]!"),
            )
        ),
    ),
    "share": Plot(
        ("sharing", "{food}", "being hungry", "{a k} who learns to share", "{a k} with {food}"),
        (
            OPEN + ONE_DAY + ", {h}[ made| got| found| bought] {food}. [It smelled so good!|\"This is all for me,\" said {h}.|{He} could not wait to eat.]",
            "{h} sat down {s1} [to eat|and began to eat]. " + MEET + " [{f} looked at the {fd}.|{f} looked very hungry.] \"[May I have some {fd}|Could I have a little], please?\" asked {f}. [\"I am so hungry.\"|\"I have not eaten all day.\"|]",
            "[At first, {h} did not want to share.|{h} held the {fd} tight.|{h} thought for a moment.] [But {f} looked so sad.|Then {he} saw how hungry {f} was.|But it is no fun to eat alone.] \"[Here, take half|Come and sit with me|Let us share],\" said {h}. {f} smiled, and they ate the {fd} together. [It tasted even better that way.|It was the best meal ever.|They talked and laughed.]",
            "The next day, {h} was hungry, and {he} had nothing to eat. Then {f} came with {food2}. \"You shared with me, so now I will share with you,\" said {f}. [{h} learned that sharing makes friends.|" + ALWAYS + "|{h} was glad that {he} had shared.]",
        ),
        tuple(
            {"food": food, "fd": fd, "food2": other}
            for food, fd in (
                ("a basket of berries", "berries"), ("a bag of cookies", "cookies"), ("a big apple pie", "pie"),
                ("a loaf of warm bread", "bread"), ("a chocolate cake", "cake"), ("a pot of soup", "soup"),
                ("a basket of cherries", "cherries"), ("a plate of pancakes", "pancakes"), ("a jar of honey", "honey"),
                ("a bag of nuts", "nuts"), ("a big sandwich", "sandwich"), ("a box of cupcakes", "cupcakes"),
            )
            for other in ("a bowl of fruit", "some cheese", "a bag of peaches", "a jar of jam")
        ),
    ),
    "build": Plot(
        ("building {a thing}", "{a thing}", "building something", "working together", "not giving up"),
        (
            OPEN + LOVES + ONE_DAY + ", {h} had an idea. \"I want to build {a thing}!\" {he} said.",
            "{h} found {parts} and began to work {s1}. [All morning {he} worked alone.|{He} worked and worked.] But {flaw} \"[Oh no|Oh dear]!\" said {h}. \"[I will never finish it|This is too hard for me|I cannot do it alone].\"",
            MEET + " \"[May I help|Can I help you|That looks like fun. Can I help]?\" {fhe} asked. [\"Yes, please,\" said {h}.|{h} nodded.] {f} had a good idea. {fix} [Step by step|Slowly but surely|Little by little], the {thing} was done.",
            "It was the [best|finest|most wonderful] {thing} {at}. {joy} \"We make a good team,\" said {f}. [{h} smiled, because {f} was right.|{h} learned that two can do more than one.|" + ALWAYS + "]",
        ),
        (
            {"thing": "treehouse", "parts": "some boards and a rope", "flaw": "the boards fell down.", "fix": "{f} held the boards while {h} tied them with the rope.", "joy": "They sat up in the treehouse and looked at the sky."},
            {"thing": "sand castle", "parts": "a bucket and a shovel", "flaw": "the walls fell down.", "fix": "{f} brought water to make the sand wet, and {h} made new walls.", "joy": "They put a little flag on top of the castle."},
            {"thing": "boat", "parts": "some wood and an old sheet", "flaw": "the boat was full of holes.", "fix": "{f} closed the holes, and {h} made a sail from the sheet.", "joy": "They sailed the boat on the water and waved."},
            {"thing": "birdhouse", "parts": "some wood and nails", "flaw": "the roof did not fit.", "fix": "{f} measured the wood, and {h} cut it again.", "joy": "Soon a family of birds moved in."},
            {"thing": "bridge", "parts": "some logs and stones", "flaw": "the logs rolled away.", "fix": "{f} put stones under the logs, and {h} tied them together.", "joy": "Now everyone could cross the stream with dry feet."},
            {"thing": "kite", "parts": "some paper and string", "flaw": "the paper tore.", "fix": "{f} found stronger paper, and {h} made a long tail.", "joy": "The kite flew high up into the sky."},
            {"thing": "fort", "parts": "some sticks and blankets", "flaw": "the fort fell down.", "fix": "{f} put the big sticks into the ground, and {h} laid the blankets on top.", "joy": "They sat inside the fort and told stories."},
            {"thing": "swing", "parts": "a rope and a board", "flaw": "the knot came loose.", "fix": "{f} showed {h} how to tie a strong knot.", "joy": "They took turns on the swing and laughed."},
            {"thing": "snowman", "parts": "a carrot and two buttons", "flaw": "the snowball was too heavy to lift.", "fix": "{f} and {h} lifted the big snowball together.", "joy": "They gave the snowman a hat and danced around it."},
            {"thing": "rocket", "parts": "a big box and some paint", "flaw": "the box fell apart.", "fix": "{f} brought some tape, and {h} painted stars on the box.", "joy": "They sat in the rocket and flew to the moon in their dreams."},
            {"thing": "cart", "parts": "a box and four wheels", "flaw": "one wheel came off.", "fix": "{f} held the wheel while {h} put in a strong pin.", "joy": "They rolled down the road and cheered."},
        ),
    ),
    "rain": Plot(
        ("a rainy day", "rain", "being bored", "{game}", "a rainbow"),
        (
            OPEN + LOVES + "One [morning|day], {h} looked out of the window. [It was raining hard.|The rain fell and fell.|Rain was running down the glass.] \"[I cannot go outside|I wanted to play outside|Now my day is ruined],\" {he} said [sadly|with a sigh].",
            "[Then there was a knock at the door.|Just then, someone knocked.] It was {his} friend {f}, {a fk} with a wet nose and {a col} umbrella. \"[Let us play inside|We can have fun inside, too|A rainy day can be fun]!\" said {f}. {play}",
            "[They laughed so much that they forgot the rain.|The time went by very fast.|It was so much fun!] {His} {mom} brought them [warm milk and cookies|hot chocolate|bread with honey]. [Then|After a while|In the afternoon], the rain stopped, and the sun came out. [There was a big rainbow over the {place}.|A rainbow shone in the sky.] {h} and {f} [ran outside and jumped in the puddles|put on their boots and splashed in the puddles].",
            "\"[I like rainy days now|This was the best rainy day ever|I hope it rains again tomorrow],\" said {h}. [{f} laughed.|{f} nodded and smiled.|\"Me, too,\" said {f}.]",
        ),
        (
            {"game": "a blanket house", "play": "They hung blankets over the chairs and made a house. They sat inside and told stories."},
            {"game": "paper boats", "play": "They folded paper boats and let them sail in the bathtub."},
            {"game": "painting", "play": "They took out the paint and made a big picture of {a k} and {a fk}."},
            {"game": "baking", "play": "They baked cookies in the shape of stars and hearts."},
            {"game": "a puppet show", "play": "They made puppets from old socks and put on a funny show."},
            {"game": "hide and seek", "play": "They played hide and seek. {f} hid behind the curtain, and {h} hid under the table."},
            {"game": "music", "play": "They made drums from old pots and played music all morning."},
            {"game": "playing pirates", "play": "They played pirates. The bed was their ship, and the floor was the sea."},
        ),
    ),
    "birthday": Plot(
        ("a birthday", "a surprise", "a surprise party", "a gift", "{f}'s birthday"),
        (
            OPEN + "[" + FRIENDS + "|{His} best friend was {a fk} named {f}.] [Tomorrow was {f}'s birthday.|It was almost {f}'s birthday.] \"I want to give {f} a [surprise|wonderful surprise],\" thought {h}.",
            "{h} [found|bought] {a obj} and wrapped it in paper. {He} also [baked a cake|made a big cake with berries|baked a cake with candles]. [Then {he} asked all the others to come|All the friends came to help], and they hid {s1}.",
            "[When {f} came by, it was very quiet.|{f} walked by, all alone.] \"[Nobody remembers my birthday,|Everyone has forgotten my birthday,|Where is everyone?]\" {fhe} said [sadly|with a sigh]. Then {h} jumped out. \"Surprise! Happy birthday, {f}!\" [everyone shouted|they all called].",
            "{f} [laughed and cried at the same time|was so happy that {fhe} jumped up and down|could not believe it]. {fHe} opened the gift and saw the {obj}. \"[It is perfect|I love it|This is the best gift ever]! Thank you, {h},\" said {f}. [They ate cake and danced until night.|They sang songs and ate all the cake.|Everyone had cake and played games.] [It was the best birthday ever.|{h} was happy, because {f} was happy.]",
        ),
        has_thing=True,
    ),
    "learn": Plot(
        ("learning to {skill}", "learning something new", "practice", "not giving up", "{a k} who wants to {skill}"),
        (
            OPEN + "[More than anything, {h} wanted to {skill}.|{h} had one big dream. {He} wanted to {skill}.|{He} wished that {he} could {skill}.]",
            ONE_DAY + ", {h} tried to {skill}. {fail} {He} tried again. [It went wrong again.|But it was no better.|It still did not work.] \"[I cannot do it|I will never learn it|It is too hard]!\" said {h} [and sat down {s1}|sadly].",
            MEET + " \"[I could not {skill} at first, either|It took me a long time to learn it|Nobody can do it the first time],\" said {f}. \"[Try a little every day|Practice every day, and do not give up|I will show you how]. {tip}\"",
            "So {h} practiced [every day|day after day|each morning]. [Little by little, it got better.|Each day it was a bit easier.] [Then one day|After many days|At last], it worked! {success} \"[Look|Look at me], {f}! I can {skill}!\" [called|shouted] {h}. [{f} clapped and cheered.|\"I knew it!\" said {f}.] [{h} was very proud.|{h} learned that practice makes all the difference.|{h} was glad that {he} had not given up.]",
        ),
        (
            {"skill": "swim", "fail": "{He} splashed and got water in {his} nose.", "tip": "Move your legs like a frog.", "success": "{h} swam all the way across the water."},
            {"skill": "ride a bike", "fail": "{He} fell into the grass.", "tip": "Look ahead and not at your feet.", "success": "{h} rode down the road, and the wind blew in {his} face."},
            {"skill": "whistle", "fail": "Only air came out.", "tip": "Make your mouth small and round.", "success": "A clear, sweet sound filled the air."},
            {"skill": "juggle", "fail": "All the balls fell down.", "tip": "Start with only two balls.", "success": "Three balls flew through the air, and none of them fell."},
            {"skill": "dance", "fail": "{He} tripped and fell.", "tip": "Listen to the music and count to four.", "success": "{h} turned and jumped as light as a feather."},
            {"skill": "skate", "fail": "{He} slipped and landed on {his} back.", "tip": "Bend your knees a little.", "success": "{h} flew over the ice in a big circle."},
            {"skill": "play the flute", "fail": "Only a funny squeak came out.", "tip": "Blow very softly.", "success": "{h} played a song, and even the birds stopped to listen."},
            {"skill": "paint", "fail": "The picture was one big mess.", "tip": "Begin with the big shapes.", "success": "{h} painted the {place} with all its colors."},
            {"skill": "bake bread", "fail": "The bread was as hard as a stone.", "tip": "Let the dough rest for a while.", "success": "The bread was soft and warm, and it smelled so good."},
            {"skill": "read", "fail": "The letters looked all the same.", "tip": "Read one letter at a time.", "success": "{h} read a whole page, and then a whole book."},
            {"skill": "sing", "fail": "It sounded like an old door.", "tip": "Breathe deep and open your mouth wide.", "success": "{h} sang so well that everyone stopped to listen."},
            {"skill": "jump rope", "fail": "The rope caught {his} feet.", "tip": "Jump when the rope comes down.", "success": "{h} jumped ten times, then twenty times!"},
            {"skill": "climb a tree", "fail": "{He} slid down again.", "tip": "Always hold on with one hand.", "success": "{h} sat on the highest branch and waved."},
        ),
    ),
    "grow": Plot(
        ("{a plant}", "a seed", "a garden", "growing {a plant}", "waiting", "{a k} who plants a seed"),
        (
            OPEN + LOVES + ONE_DAY + ", {h} [found a tiny seed {s1}|got a tiny seed from {his} {mom}|found a small brown seed]. \"[What will it be|What will grow from it|I wonder what it is]?\" {he} asked.",
            "{h} made a hole in the ground and put the seed in it. {He} gave it water every [morning|day]. But [day after day, nothing happened|for many days, nothing grew]. {His} friend {f}, {a ffk}, [came to look|looked at the ground]. \"[There is nothing there,|Maybe it is only a stone,|Why do you wait?]\" said {f}. \"[Just wait|It needs time|Good things take time],\" said {h}.",
            "[Then|At last|One morning], a little green leaf came up. \"[Look, it is growing|It is alive]!\" called {h}. The sun shone, and the rain fell. The plant grew bigger and bigger. [In the end|By the end of summer], {result}",
            "{party} \"[You were right to wait|I am glad that you did not give up|It was worth the wait],\" said {f}. {h} [smiled|laughed] and gave {f} a tiny seed. \"Now you can [grow your own|try it, too],\" said {h}.",
        ),
        (
            {"plant": "sunflower", "result": "it was a sunflower, taller than {h}.", "party": "{h} and {f} sat in its shade and looked up."},
            {"plant": "pumpkin", "result": "it was a huge orange pumpkin.", "party": "{h} made pumpkin soup for everyone."},
            {"plant": "apple tree", "result": "it was a little apple tree with three red apples.", "party": "{h} and {f} each ate an apple, and the third was for {his} {mom}."},
            {"plant": "strawberry plant", "result": "it was a strawberry plant, full of sweet red fruit.", "party": "{h} and {f} ate until their mouths were red."},
            {"plant": "tomato plant", "result": "it was a tomato plant with round red tomatoes.", "party": "{h} made a big salad for everyone."},
            {"plant": "bean plant", "result": "it was a bean plant that climbed up to the roof.", "party": "{h} and {f} picked a whole bowl of beans."},
            {"plant": "rose bush", "result": "it was a rose bush, covered with pink roses.", "party": "{h} gave the first rose to {his} {mom}."},
            {"plant": "melon", "result": "it was a big green melon.", "party": "{h} cut the melon, and everyone got a sweet piece."},
        ),
    ),
    "way_home": Plot(
        ("getting lost", "finding the way home", "{lure}", "a long walk", "being lost"),
        (
            OPEN + LOVES + "\"[Do not go too far|Stay near the house|Be back before dark],\" {his} {mom} [always said|told {him}].",
            ONE_DAY + ", {h} saw {lure}. {He} followed it, farther and farther. {gone} {h} looked around. \"[Oh no, I am lost!|Where am I?|How do I get home?]\" said {h}. [It was getting dark.|{He} began to cry.|{He} sat down {s1}.]",
            MEET + " \"[Are you lost|Why do you cry], little one?\" asked {f}. \"Yes, I want to go home,\" said {h}. \"[I know the way|Come with me|Do not be afraid]. {guide}\" said {f}. They walked side by side[ for a long time| and sang a song|].",
            "[At last|Finally|Soon], {h} saw the light in {his} window. {His} {mom} ran out and [hugged {him}|held {him} tight]. \"[I was so worried!|Where have you been?]\" \"I am sorry,\" said {h}. \"{f} helped me to find the way.\" [After that, {h} never went too far again.|" + NIGHT + "|" + ALWAYS + "]",
        ),
        tuple(
            {"lure": lure, "gone": gone, "guide": guide}
            for lure, gone in (
                ("a blue butterfly", "Then the butterfly flew away."), ("a golden leaf in the wind", "Then the leaf was gone."),
                ("a little white bird", "Then the bird flew off into the clouds."), ("a bright red balloon", "Then the balloon floated up into the sky."),
                ("a tiny green frog", "Then the frog jumped into the water."), ("a shining firefly", "Then its light went out."),
            )
            for guide in ("We only have to follow the stream,", "The moon will show us the way,", "We will follow the path,", "I can see your house from the hill,")
        ),
    ),
    "honest": Plot(
        ("telling the truth", "being honest", "a mistake", "a broken {vase}", "saying sorry"),
        (
            OPEN + ONE_DAY + ", {h} {how}. Crash! {His} {mom}'s {vcol} {vase} fell down and broke.",
            "{h} was scared. \"[Now I am in trouble|Nobody must know|This is bad],\" {he} thought. {He} hid the pieces {hide}. [All day|At dinner], {h} was very quiet. [{He} could not eat.|{He} did not want to play.|{His} tummy hurt.]",
            "{He} asked {his} friend {f}, {a fk}, what to do. \"[The truth is always best|Tell the truth, and you will feel better|I would just say sorry],\" said {f}. So {h} went to {his} {mom}. \"I broke your {vase}, and I hid it. I am so sorry,\" {he} said [softly|in a small voice].",
            "{His} {mom} [was quiet for a moment|looked at {him}] and then gave {him} a hug. \"[Thank you for telling me|I am proud that you told the truth|A {vase} is only a {vase}],\" said {his} {mom}. \"Let us fix it together.\" [They put the pieces together with glue.|With some glue, the {vase} was whole again.] [It did not look new, but {h} liked it even more.|{h} felt light and happy again.|From that day on, {h} always told the truth.]",
        ),
        tuple(
            {"vase": vase, "how": how, "hide": hide, "vcol": vcol}
            for vase in ("vase", "cup", "plate", "lamp", "bowl", "clock", "teapot")
            for how in ("was running through the house", "threw a ball inside the house", "jumped on the bed", "danced around the table", "tried to reach the top shelf")
            for hide in ("under the bed", "in a drawer", "behind the sofa")
            for vcol in ("blue", "old", "white", "green")
        ),
    ),
    "treasure": Plot(
        ("a treasure", "a treasure map", "an adventure", "{a k} who finds a map", "a secret"),
        (
            OPEN + LOVES + FRIENDS + " " + ONE_DAY + ", {h} found an old map {s1}. \"[Look|Wow], {f}! It is a treasure map!\" {he} [said|called].",
            "\"[Let us find the treasure|Let us go right away|We must follow it]!\" said {f}. [The two friends|{h} and {f}] followed the map. First they {step1}. Then they {step2}. [It was a long way.|They were tired, but they did not stop.|\"Are we there yet?\" asked {f}. \"Almost,\" said {h}.]",
            "[At last|Finally], they came to a big red cross {s3}. They began to dig. [Deeper and deeper they went.|They dug and dug.] Bump! There was [an old box|a wooden box|a heavy box]. {h} opened it slowly. Inside was {gold}!",
            "{share} \"[This was the best adventure ever|What a day|I will never forget this day],\" said {f}. \"[The best part was that we did it together|And you are the best treasure of all|Yes, and we found it together],\" said {h}. [They laughed all the way home.|" + ALWAYS + "|" + NIGHT + "]",
        ),
        tuple(
            {"gold": gold, "share": share, "step1": step1, "step2": step2}
            for gold, share in (
                ("a pile of golden coins", "They bought a big cake for everyone {at}."), ("a music box", "When {h} opened the music box, it played a sweet song."),
                ("a heap of shiny shells", "They took half of the shells each."), ("a letter", "In the letter it said, \"A good friend is worth more than gold.\""),
                ("a bag of seeds", "They planted the seeds, and soon there were flowers everywhere."), ("a golden crown", "They took turns and wore the crown."),
                ("a book of stories", "They sat down and read the first story right away."),
            )
            for step1, step2 in (
                ("crossed a little bridge", "walked around a big rock"), ("went up a hill", "crawled through a hollow tree"),
                ("jumped over a stream", "counted twenty steps"), ("passed an old mill", "turned left at a tall tree"),
            )
        ),
    ),
    "night": Plot(
        ("going to sleep", "the moon", "the stars", "bedtime", "{a k} who could not sleep"),
        (
            OPEN + "One night, {h} could not sleep. [{He} turned to the left and to the right.|{He} closed {his} eyes, but it did not help.|{He} counted to one hundred, but {he} was still awake.]",
            "{h} [went to the window|looked out of the window]. [The moon was big and round.|The stars were bright.] \"[Moon, why can I not sleep|Hello, moon. Are you awake, too]?\" {he} asked. [The moon only smiled.|It was very quiet.] Then {he} saw {a fk} {s1}. It was {f}. \"I cannot sleep, either,\" called {f}. \"{worry}\"",
            "\"[Come in|Come here|Let us sit together],\" said {h}. They sat under a warm blanket and [looked at the stars|counted the stars|watched the moon]. {calm} [{f} told a story about a sleepy cloud.|{h} hummed a soft song.|They talked about all the good things of the day.]",
            "[Soon|After a while], {f} [yawned|gave a big yawn]. Then {h} yawned, too. \"Good night, {f},\" said {h}. \"Good night, {h},\" said {f}. [Their eyes closed, and they slept until morning.|And the moon watched over them all night long.|In the morning, {his} {mom} found them both fast asleep.]",
        ),
        tuple(
            {"worry": worry, "calm": calm}
            for worry in ("It is too quiet.", "The wind is too loud.", "I had a bad dream.", "I feel alone in my bed.", "I think too much.")
            for calm in ("A star fell down, and they both made a wish.", "A soft wind moved the leaves.", "An owl called from far away.", "{h} brought two cups of warm milk.")
        ),
    ),
    "race": Plot(
        ("a race", "winning", "being fast", "a race between {a k} and {a fk}", "being fair"),
        (
            OPEN + "[{h} was very fast.|{He} could run like the wind.|{He} wanted to win the big race.] [Every day, {he} practiced {at}.|{His} {mom} said, \"Just have fun.\"|]",
            "[At last|Soon], the day of the big race came. Everyone stood {s1}. Next to {h} stood {f}, {a ffk}. \"[Good luck|May the best one win],\" said {f}. \"One, two, three, go!\" [They ran as fast as they could.|Off they went!] {h} was in front, and {f} was right behind {him}.",
            "Then {f} {fell}. \"[Ouch|Ouch, my leg]!\" cried {f}. {h} looked back. {He} could see the finish line, and [{he} was so close|nobody else was near]. But {f} was hurt. {h} [stopped and turned around|ran back right away]. \"[Are you all right?|Come, hold on to me,|Let me help you,]\" said {h}.",
            "[Side by side|Arm in arm|Together], they walked over the finish line. They were the last, but everyone [clapped and cheered|cheered for them]. \"[You could have won,|Why did you come back?]\" said {f}. \"[A friend is better than a prize|I can win another day|It is more fun together],\" said {h}. [They both got a prize for being kind.|" + ALWAYS + "]",
        ),
        tuple({"fell": fell} for fell in ("fell over a root", "slipped in the mud", "tripped over a stone", "stepped into a hole", "slid on the wet grass")),
    ),
    "rescue": Plot(
        ("{a small}", "saving {a small}", "taking care of an animal", "{a k} and {a small}", "setting someone free"),
        (
            OPEN + LOVES + ONE_DAY + ", {h} heard a tiny cry {s1}. It was {a small}. {hurt} \"[You poor little thing|Do not be afraid|I will take care of you],\" said {h}.",
            "{h} carried the {small} home [very gently|in {his} hat|in a soft cloth]. {His} {mom} made a little bed [in a box|from an old basket]. {h} gave it [water and food|something to eat and drink] and [sang to it|sat next to it|kept it warm] every [day|night].",
            "[Day by day|Slowly], the {small} got stronger. {well} \"[It wants to go home now|It is time to let it go|It belongs outside],\" said {his} {mom}. {h} [was sad, but {he} understood|had tears in {his} eyes|did not want to say goodbye]. {He} took the {small} back to the {place} and opened {his} hands. \"Goodbye, little friend,\" {he} said.",
            "[The next morning|A few days later|When spring came], {h} heard [a sound|something] at the window. It was the {small}! [It came back to say thank you.|It had not forgotten {him}.|It had brought {him} a small flower.] [{h} laughed with joy.|{h} was so happy.] [After that, it came to visit every day.|And so they stayed friends forever.]",
        ),
        tuple(
            {"small": small, "hurt": hurt, "well": well}
            for small, hurt, well in (
                ("baby bird", "It had fallen out of its nest.", "It learned to flap its wings."), ("butterfly", "One of its wings was wet.", "It opened its wings in the sun."),
                ("duckling", "It had lost its family.", "It learned to swim in the bathtub."), ("bat", "It was cold and weak.", "It hung from the lamp and slept all day."),
                ("snail", "There was a crack in its shell.", "Its shell was whole again."), ("ladybug", "It was stuck in a drop of honey.", "It walked up and down the table."),
                ("chipmunk", "It had hurt its leg.", "It ran around the room."), ("bee", "It was too tired to fly.", "It began to hum again."),
            )
        ),
    ),
    "tracks": Plot(
        ("a mystery", "strange footprints", "a strange noise", "{a k} who solves a mystery", "missing {item}"),
        (
            OPEN + ONE_DAY + ", something strange happened. {h}'s {item} {was} gone! \"Who took my {item}?\" {he} asked. Then {he} saw [small footprints|strange footprints] on the ground. \"[This is a mystery|I will find out]!\" said {h}.",
            "{h} followed the footprints. They went {s1}, and then {s2}. [There were crumbs, too.|] [Suddenly|Then], {he} heard a noise {s3}. [Crunch, crunch, crunch.|Someone was there!|Something moved.] {His} heart beat fast. \"Who is there?\" called {h}.",
            "Out came {a ffk} with a red face. \"I am {f},\" said the {fk}. \"I took your {item}. {why} I am sorry.\" [{h} was angry at first, but then|Then] {he} saw {f}'s sad eyes. \"[You only had to ask,|Next time, just ask me,|Why did you not ask?]\" said {h}. \"[I will help you|Come, I have enough for two|I am glad to help].\"",
            "{h} [had solved the mystery and found a friend|was proud, for the mystery was solved]. " + ALWAYS,
        ),
        tuple(
            {"item": item, "was": was, "why": why}
            for item, was, whys in (
                ("cookies", "were", ("I was so hungry.", "I wanted to make my little sister happy.")), ("bread", "was", ("I had nothing to eat.", "My family was hungry.")),
                ("carrots", "were", ("I needed them for soup.", "I was so hungry.")), ("blanket", "was", ("I was so cold at night.", "My bed is hard and cold.")),
                ("paint", "was", ("I wanted to paint a picture for my mother.", "My house looks so gray.")), ("shoes", "were", ("My feet were so cold.", "I wanted to dance like you.")),
                ("lamp", "was", ("I am afraid of the dark.", "My house is so dark.")),
            )
            for why in whys
        ),
    ),
    "stuck": Plot(
        ("{a obj}", "{a o} in a tree", "a windy day", "a good idea", "{a k} and {a obj}"),
        (
            OPEN + "[{He} had {a obj}.|{He} loved {his} {obj}.|{His} {mom} gave {him} {a obj}.] One windy [day|morning|afternoon], {h} took the {o} outside.",
            "[Whoosh! The wind blew|Then a strong wind came], and the {o} flew [up into a tall tree|onto a high roof|up, up, up into a tree]. \"[My {o}|Oh no, my {o}]!\" cried {h}. {He} jumped, but {he} could not reach it. {He} threw a stick, but [it did not help|the {o} did not move]. [{h} " + SAD + ".|]",
            MEET + " \"I have an idea,\" said {f}. {plan} [It worked!|It was a very good idea.] {down}",
            "\"Thank you, {f}! You are so [clever|smart|kind],\" said {h}. \"[Do you want to play with it, too?|Let us play together!|Come and play with me!]\" [{f} nodded.|\"Yes!\" said {f}.] [They played until the wind was gone.|They had fun with the {o} all day.] [And this time, {h} held the {o} tight.|" + ALWAYS + "]",
        ),
        (
            {"plan": "{fHe} ran home and came back with a long ladder.", "down": "{h} climbed up and brought down the {o}."},
            {"plan": "\"Stand on my back,\" {fhe} said.", "down": "{h} stood up tall and took hold of the {o}."},
            {"plan": "{fHe} tied two sticks together to make one very long stick.", "down": "{h} pushed, and the {o} fell down."},
            {"plan": "{fHe} asked a big bird for help.", "down": "The bird flew up and brought back the {o}."},
            {"plan": "{fHe} threw a rope over the top and pulled.", "down": "Everything shook, and the {o} fell right into {h}'s arms."},
            {"plan": "\"Let us wait for the wind to turn,\" {fhe} said.", "down": "The wind turned, and the {o} floated down."},
        ),
        has_thing=True,
        things=LIGHT_THINGS,
    ),
    "return": Plot(
        ("finding {a obj}", "giving something back", "being honest", "{a obj}", "doing the right thing"),
        (
            OPEN + LOVES + ONE_DAY + ", {h} found {a obj} {s1}. \"[How pretty|What a lovely {o}|Wow, how nice]!\" {he} said. \"[Now it is mine|I will keep it|It is all mine].\"",
            "{h} took the {o} home and [put it next to {his} bed|showed it to {his} {mom}]. \"[Somebody may miss it,|Who does it belong to?|Maybe someone is looking for it,]\" said {his} {mom}. {h} [did not want to think about that|thought about it all night|looked at the {o} for a long time].",
            "The next day, {h} saw {a ffk} named {f}, who was looking for something {s2}. [{f} was crying.|{f} looked so sad.] \"What is wrong?\" asked {h}. \"I lost my {obj}. [It was a gift from my grandmother|It is my favorite thing|I have looked everywhere],\" said {f}. {h} [wanted to keep the {o}, but {he} knew what was right|felt {his} face turn red|thought for a moment]. {He} ran home and came back with the {o}. \"[Here is your {o},|Is this yours?|I found it,]\" said {h}.",
            "{f} [jumped for joy|smiled from ear to ear|hugged {h}]. \"Thank you! [You are very kind|I am so happy]. [Let us play with it together|You may play with it any time].\" [{h} felt better than ever.|{h} did not have the {o} anymore, but {he} had a new friend.|" + ALWAYS + "]",
        ),
        has_thing=True,
    ),
    "soup": Plot(
        ("making soup", "cooking", "a dinner with friends", "working together", "cooking with {a fk}"),
        (
            OPEN + "One cold [day|evening], {h} wanted to make soup. But {he} had only {one}. \"[That is not enough for soup|This will be a very thin soup],\" {he} said [sadly|with a sigh].",
            MEET + " \"I am cold and hungry,\" said {f}, \"but I have only {two}.\" {h} had an idea. \"[Put it in the pot|Let us put it all in one pot],\" {he} said. Soon {a third} came to see what smelled so good. \"I have {three},\" said the {third}. \"[May I join you|Can I join in]?\" \"[Of course|Yes, please do],\" said {h}.",
            "They stirred and sang[ a song|]. The soup [grew thick and tasty|smelled better and better]. [At last|Finally], it was ready. [Everyone got a big bowl.|They all sat down and ate.] \"[This is the best soup in the world|I have never had such good soup],\" said {f}.",
            "\"[Alone, I had almost nothing. Together, we have a feast|It was only {one}. Now it is a feast],\" said {h}. [They talked and laughed until late.|Nobody was cold or hungry that night.|From that day on, they cooked together every week.]",
        ),
        tuple(
            {"one": one, "two": two, "three": three, "third": third}
            for one in ("one carrot", "two onions", "one potato")
            for two in ("a handful of peas", "a bag of beans", "some corn")
            for three in ("some salt", "three mushrooms", "a big cabbage")
            for third in ("hedgehog", "goat", "mouse", "badger")
        ),
    ),
    "snow": Plot(
        ("snow", "winter", "the first snow", "a sled", "playing in the snow"),
        (
            OPEN + "One [cold|winter] morning, {h} woke up, and everything was white. \"Snow! [It is snowing|It has snowed]!\" {he} [shouted|called]. {He} put on {his} [warm coat|boots] and {his} {col} [hat|scarf] and ran outside.",
            "{h} took {his} sled up the hill. At the top stood {f}, {a ffk}. \"[I wish I had a sled|My sled is broken|I have never been on a sled],\" said {f}. \"[Then ride with me|Come with me|There is room for two],\" said {h}.",
            "They sat down, {h} in front and {f} in the back. [Whoosh! Down the hill they went.|Down they went, faster and faster!] [The wind sang in their ears.|Snow flew into their faces.] {bump} [They laughed and laughed.|]\"[Again, again|One more time]!\" said {f}.",
            "They [rode down the hill|went up and down] until [their noses were red|the sun went down]. Then they went to {h}'s house and [drank hot chocolate by the fire|warmed their feet by the fire]. \"[This was the best winter day ever|I love the snow|Thank you for sharing your sled],\" said {f}. [" + ALWAYS + "|" + NIGHT + "]",
        ),
        tuple(
            {"bump": bump}
            for bump in ("Bump! They landed in a big pile of snow.", "At the bottom, they rolled into the soft snow.", "They slid past the trees and far over the field.", "The sled hit a bump, and they flew through the air.")
        ),
    ),
    "kind_old": Plot(
        ("an old neighbor", "visiting someone", "being kind to someone old", "{a old}", "listening"),
        (
            OPEN + "Next door lived an old {old}. [The old {old} never smiled.|Everyone thought that the old {old} was grumpy.|Nobody ever went to see the old {old}.]",
            ONE_DAY + ", {h} saw the old {old} sitting all alone {s1}. \"[Maybe the {old} is lonely|I think the {old} is sad],\" {he} thought. So {h} [picked some flowers|baked some cookies|took {a obj}] and knocked at the door. \"[What do you want|Who is there]?\" said the old {old}. \"[I brought you something|I only want to say hello],\" said {h}.",
            "The old {old} looked at {h} [for a long time|in surprise] and then smiled. \"Come in, [child|little one].\" They [drank tea|sat by the fire], and the old {old} told a story about {tale}. [{h} listened with big eyes.|It was so exciting!] \"[Nobody has listened to me for years|I was so lonely],\" said the old {old}.",
            "\"[May I come again tomorrow|Can I hear another story tomorrow]?\" asked {h}. \"[You may come every day|Yes, I would like that very much],\" said the old {old}. [From that day on, {h} came every day, and the old {old} smiled again.|After that, nobody called the old {old} grumpy anymore.|{h} learned that a little kindness can change a lot.] [" + NIGHT + "|]",
        ),
        tuple(
            {"old": old, "tale": tale}
            for old in ("goat", "turtle", "bear", "badger", "owl", "man", "woman")
            for tale in ("a ship in a storm", "a dance with the queen", "a trip to the mountains", "a race long ago", "a dragon in a cave")
        ),
    ),
}  # fmt: skip


# --- stories and documents ---


@dataclass(frozen=True)
class Story:
    """A story, and what a request for it can name."""

    plot: str
    text: str
    topics: tuple[str, ...]
    facts: Facts


def tell(rng: random.Random, invented_names: bool = False) -> Story:
    """Return a story of `MIN_WORDS` to `MAX_WORDS` words."""
    name = rng.choice(list(PLOTS))
    plot = PLOTS[name]
    while True:
        facts = world(rng, invented_names) | thing_facts(rng, plot.things)
        # A third character of the same kind as the hero or the friend would be confused with them.
        kinds = {facts["k"], facts["fk"]}
        facts |= rng.choice([variant for variant in plot.variants if kinds.isdisjoint(variant.values())])
        text = "\n\n".join(expand(paragraph, facts, rng) for paragraph in plot.text)
        if MIN_WORDS <= len(text.split()) <= MAX_WORDS:
            return Story(name, text, tuple(_topics(plot, facts, rng, text)), facts)


def _topics(plot: Plot, facts: Facts, rng: random.Random, text: str) -> Iterator[str]:
    """Yield phrases for "a story about ..." that are true of this story."""
    templates = ["{a k}", "{a k}", "{a k} named {h}", "{a k} named {h}", "{h}", "{a hk}", "{a hk} named {h}"]
    if facts["k"] not in ("girl", "boy"):
        templates += ["{h} the {k}", "{h} the {k}"]
    if facts["f"] in text:
        templates += ["{h} and {f}", "{a k} and {a fk}", "{a k} and {a fk}", "{a k} named {h} and {a fk} named {f}"]
    if facts["place"] in text:
        templates += ["the {place}", "{a k} {at}"]
    if plot.has_thing and facts["obj"] in text:
        templates += ["{a obj}", "{a o}", "{a k} and {a obj}", "{a k} named {h} and {a obj}"]
    templates += list(plot.themes) * 2
    for template in templates:
        yield expand(template, facts, rng)


REQUESTS = (
    "Tell me a story about {x}.", "Tell me a story about {x}.", "Tell me a story about {x}", "Tell me a short story about {x}.",
    "tell me a story about {x}", "Please tell me a story about {x}.", "Can you tell me a story about {x}?",
    "Could you tell me a story about {x}, please?", "Write a story about {x}.", "Write a short story about {x}.",
    "Write me a story about {x}, please.", "write a story about {x}", "I want a story about {x}.", "I would like to hear a story about {x}.",
    "A story about {x}, please.", "Do you know a story about {x}?", "Make up a story about {x}.", "Give me a story about {x}.",
    "A bedtime story about {x}, please.", "Tell a children's story about {x}.", "Hello! Tell me a story about {x}.",
    "Hi! Can you tell a story about {x}?", "My child wants a story about {x}.", "I am sad. Tell me a story about {x}.",
)  # fmt: skip
OPEN_REQUESTS = ("Tell me a story.", "Tell me a story", "Tell me a short story, please.", "Write a story.", "Can you tell me a story?", "A story, please.")  # fmt: skip
MORE_REQUESTS = (
    "Another one, please, about {x}.", "Now tell me one about {x}.", "Thank you! Now a story about {x}, please.",
    "That was nice. Can you tell me another story about {x}?", "One more, about {x}.",
)  # fmt: skip
GREETINGS = (
    "Hello!", "Hi!", "Hello", "hi", "Good evening!", "Good morning!", "Hey!", "Who are you?", "What can you do?",
)  # fmt: skip
WELCOMES = (
    "Hello! I tell short stories. What should the story be about?", "Hi! I am a small story teller. What would you like to hear about?",
    "Hello! Would you like to hear a story? Just tell me what it should be about.",
)  # fmt: skip
SYSTEM_TURNS = (
    "You tell short stories for children.", "You are a kind story teller.", "You are a helpful assistant.", "You write short stories.",
    "You are Minerva, a small story teller.",
)  # fmt: skip


def turn(role: str, content: str) -> str:
    """Return a ChatML turn."""
    return f"{IM_START}{role}\n{content}{IM_END}\n"


def chat(rng: random.Random) -> str:
    """Return a conversation in which the assistant tells the story that the user asked for."""
    turns = []
    if rng.random() < 0.2:
        turns.append(turn("system", rng.choice(SYSTEM_TURNS)))
    if rng.random() < 0.06:
        turns += [turn("user", rng.choice(GREETINGS)), turn("assistant", rng.choice(WELCOMES))]
    requests: tuple[str, ...] = OPEN_REQUESTS if rng.random() < 0.08 else REQUESTS
    for _ in range(2 if rng.random() < 0.08 else 1):
        invented = rng.random() < 0.12
        story = tell(rng, invented)
        topics = [topic for topic in story.topics if not invented or story.facts["h"] in topic]
        request = rng.choice(requests).replace("{x}", rng.choice(topics))
        turns += [turn("user", request), turn("assistant", story.text)]
        requests = MORE_REQUESTS
    return "".join(turns)


def documents(seed: int, n: int) -> list[str]:
    """Return `n` training documents, without the leading `<|endoftext|>`: stories and a share `CHAT_SHARE` of conversations."""
    rng = random.Random(seed)
    return [chat(rng) if rng.random() < CHAT_SHARE else tell(rng).text for _ in range(n)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Print documents of the corpus that the built-in model learns from.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=5)
    args = parser.parse_args()
    print("\n\n----\n\n".join(documents(args.seed, args.count)))


if __name__ == "__main__":
    main()
