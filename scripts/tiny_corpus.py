"""The text of the tiny model's pretraining: real stories and word problems, and generated conversations.

`pretrain_tiny.py` draws documents from here, and `make_orders.py` takes its words from the lists below, so
that every name and thing of the fine-tuning data set was also met in pretraining. The two things that fine-tuning
has to teach are kept out on purpose: no text here asks a shop for anything, and no answer here is a record of the
form `key: value | key: value`.

A document is a list of (role, content) turns; plain text is one turn without a role.
"""

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

Turn = tuple[str, str]
Document = list[Turn]
Task = Callable[[random.Random], tuple[str, str]]


def split_words(text: str) -> list[str]:
    """The words of a text, so that the lists below stay readable."""
    return text.split()


GIRLS = split_words(
    """
    Anna Lily Mia Sara Lucy Emma Ella Zara Amy Jane Sue Molly Jenny Nora Ida Maria Julia Clara Eva Lena
    Alice Ruth Grace Rosa Olga Nina Paula Vera Hana Mei
    """
)
BOYS = split_words(
    """
    Tom Tim Ben Max Sam Bob Jack John Leo Alex Paul Peter Mark Adam Noah Oscar Ivan Hugo Luis Omar David
    Henry Felix Simon Karl Erik Marco Pablo Amir Kenji
    """
)
NAMES = GIRLS + BOYS
CITIES = split_words(
    """
    Oslo Paris Rome London Berlin Madrid Vienna Prague Lisbon Dublin Athens Warsaw Geneva Milan Bergen
    Lyon Boston Chicago Denver Dallas Toronto Lima Quito Cairo Delhi Tokyo Osaka Seoul Sydney Perth
    """
)
COLOURS = split_words("red blue green yellow white black pink purple orange brown grey silver")
THINGS = split_words(
    """
    mug lamp chair table ball hat book pen cup plate bag kite bike clock pillow blanket vase basket
    bottle candle towel spoon ribbon mirror carpet drum balloon coat jacket shirt
    """
)
ANIMALS = split_words(
    """
    cat dog bird frog duck horse cow pig goat hen bear lion tiger rabbit owl ant bee sheep mouse fox
    """
)
FOODS = split_words("bread cheese apple soup cake rice milk honey pear plum egg salad pizza corn butter jam")
DAYS = split_words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
WORDS = COLOURS + THINGS + [word for word in ANIMALS + FOODS if word not in COLOURS]

STATEMENTS = [
    "{person} bought {count} {colour} {things} in {city} on {day}.",
    "On {day}, {person} found {count} {colour} {things} in {city}.",
    "{person} lives in {city} and has {count} {colour} {things}. Today is {day}.",
    "{person} went to {city} on {day} with {count} {colour} {things}.",
    "It was {day}. {person} was in {city} and saw {count} {colour} {things}.",
    "My name is {person}. I live in {city}. I made {count} {colour} {things} on {day}.",
    "In {city}, {person} sold {count} {colour} {things} last {day}.",
    "The {count} {colour} {things} belong to {person}, who left {city} on {day}.",
    "{count} {colour} {things} were lost in {city} on {day}. {person} looked for them.",
    "{person} has a shop in {city}. There are {count} {colour} {things} in it. It opens on {day}.",
    "I met {person} on {day}. We counted {count} {colour} {things} and then took the train to {city}.",
    "Next {day} there is a party in {city}. {person} will bring {count} {colour} {things}!",
]
QUESTIONS = {
    "person": ["Who is named?", "Which person is it about?", "What is the name?"],
    "count": ["How many {things} are there?", "How many {things}?", "Which number is in the text?"],
    "colour": ["What colour are the {things}?", "Which colour is mentioned?"],
    "thing": ["What is {colour}? Give one.", "Which thing is it?"],
    "things": ["What is {colour}?", "What does {person} have?"],
    "city": ["Which city is mentioned?", "Where is it?", "Name the city."],
    "day": ["Which day is mentioned?", "When is it?", "Name the day."],
}
FIELD_KEYS = {
    "person": ["name", "person", "who", "Name"],
    "count": ["count", "number", "how many", "Number"],
    "colour": ["colour", "paint", "Colour"],
    "thing": ["thing", "object", "what", "Thing"],
    "object": ["object", "thing", "what", "Object"],
    "city": ["city", "place", "where", "City"],
    "day": ["day", "when", "date", "Day"],
}


@dataclass(frozen=True)
class Fact:
    """The values behind one generated statement."""

    person: str
    count: str
    colour: str
    thing: str
    city: str
    day: str

    @property
    def values(self) -> dict[str, str]:
        """All the values that templates and questions may name."""
        return vars(self) | {"things": self.thing + "s", "object": f"{self.colour} {self.thing}"}


def pseudo_word(rng: random.Random) -> str:
    """A pronounceable word without meaning: it can only be copied, never guessed."""
    word = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(1, 3)))
    return word + rng.choice(["", "n", "r", "s", "t"])


def any_word(rng: random.Random) -> str:
    """A word of any kind."""
    return rng.choice([rng.choice(WORDS), rng.choice(NAMES), rng.choice(CITIES), rng.choice(DAYS), pseudo_word(rng)])


def distinct_words(rng: random.Random, low: int, high: int) -> list[str]:
    """Between `low` and `high` different words."""
    return list(dict.fromkeys(any_word(rng) for _ in range(high)))[: rng.randint(low, high)]


def random_fact(rng: random.Random) -> Fact:
    """A fact; now and then with pseudo-words for the person and the city."""
    person = rng.choice(NAMES) if rng.random() < 0.85 else pseudo_word(rng).capitalize()
    city = rng.choice(CITIES) if rng.random() < 0.85 else pseudo_word(rng).capitalize()
    count = str(rng.randint(2, 99))
    return Fact(person, count, rng.choice(COLOURS), rng.choice(THINGS), city, rng.choice(DAYS))


def state(rng: random.Random, fact: Fact) -> str:
    """The fact as one or two plain English sentences."""
    return rng.choice(STATEMENTS).format(**fact.values)


def repeat(rng: random.Random) -> tuple[str, str]:
    words = " ".join(distinct_words(rng, 1, 8))
    return rng.choice(["Repeat: ", "Say this again: ", "Copy the words: ", "Repeat after me:\n"]) + words, words


def answer_about_one(rng: random.Random) -> tuple[str, str]:
    fact = random_fact(rng)
    field = rng.choice(list(QUESTIONS))
    question = rng.choice(QUESTIONS[field]).format(**fact.values)
    parts = [state(rng, fact), question]
    return rng.choice([" ", "\n"]).join(parts if rng.random() < 0.7 else parts[::-1]), fact.values[field]


def answer_about_several(rng: random.Random) -> tuple[str, str]:
    people_and_cities = zip(rng.sample(NAMES, 3), rng.sample(CITIES, rng.randint(2, 3)), strict=False)
    facts = [replace(random_fact(rng), person=person, city=city) for person, city in people_and_cities]
    fact = rng.choice(facts)
    lines = [f"{f.person} has {f.count} {f.colour} {f.thing}s in {f.city}." for f in facts]
    field, question = rng.choice(
        [
            ("count", "How many {things} does {person} have?"),
            ("city", "Where are the {things} of {person}?"),
            ("colour", "What colour are the {things} of {person}?"),
            ("person", "Who has things in {city}?"),
            ("things", "What does {person} have?"),
        ]
    )
    return " ".join([*lines, question.format(**fact.values)]), fact.values[field]


def write_fields(rng: random.Random) -> tuple[str, str]:
    fact = random_fact(rng)
    fields = rng.sample(
        ["person", "count", rng.choice(["colour", "thing", "object"]), "city", "day"], rng.randint(1, 5)
    )
    keys = [rng.choice(FIELD_KEYS[field]) for field in fields]
    equals = rng.choice([": ", ": ", "=", " = ", " is ", " -> "])
    separator = rng.choice([", ", "; ", "\n", " and ", " / ", " - "])
    answer = separator.join(key + equals + fact.values[field] for key, field in zip(keys, fields, strict=True))
    form = separator.join(key + equals + "..." for key in keys)
    return rng.choice([f"{state(rng, fact)}\nFill in: {form}", f"Fill in: {form}\n{state(rng, fact)}"]), answer


def follow_example(rng: random.Random) -> tuple[str, str]:
    """One worked example fixes which values are wanted, and how they are written."""
    fields = rng.sample(["person", "count", "object", "colour", "city", "day"], rng.randint(1, 4))
    separator = rng.choice([", ", " / ", "; ", " - ", " ", "\n"])
    first, second = random_fact(rng), random_fact(rng)
    example, answer = (separator.join(fact.values[field] for field in fields) for fact in (first, second))
    return f"{state(rng, first)}\nAnswer:\n{example}\n\n{state(rng, second)}\nAnswer:", answer


def pick_word(rng: random.Random) -> tuple[str, str]:
    words = distinct_words(rng, 2, 6)
    position = rng.choice(["first", "last", "second"])
    word = words[{"first": 0, "last": -1, "second": 1}[position]]
    return f"What is the {position} word: {' '.join(words)}", word


def find_kind(rng: random.Random) -> tuple[str, str]:
    kinds = {
        "animal": ANIMALS,
        "city": CITIES,
        "colour": COLOURS[:8],
        "name": NAMES,
        "day": DAYS,
        "food": FOODS,
    }
    chosen = rng.sample(list(kinds), 3)
    words = {kind: rng.choice(kinds[kind]) for kind in chosen}
    kind = rng.choice(chosen)
    return f"Which word is of the kind {kind}: {', '.join(words.values())}?", words[kind]


def list_items(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(ANIMALS + FOODS + THINGS, rng.randint(2, 5))
    mark = rng.choice([", ", " | ", " + ", "\n", "\n- "])
    told = f"{', '.join(f'the {word}' for word in words[:-1])} and the {words[-1]}"
    ask = {", ": "with commas", " | ": "with |", " + ": "with +", "\n": "on lines", "\n- ": "with dashes"}[mark]
    start = "- " if mark == "\n- " else ""
    return f"{rng.choice(NAMES)} saw {told}. List the things {ask}.", start + mark.join(words)


def count_words(rng: random.Random) -> tuple[str, str]:
    words = distinct_words(rng, 1, 6)
    return f"How many words are here: {' '.join(words)}", str(len(words))


def calculate(rng: random.Random) -> tuple[str, str]:
    left, right = rng.randint(0, 20), rng.randint(0, 10)
    if rng.random() < 0.5:
        return rng.choice([f"{left} + {right} =", f"What is {left} plus {right}?"]), str(left + right)
    return rng.choice([f"{left + right} - {right} =", f"What is {left + right} minus {right}?"]), str(left)


def compare(rng: random.Random) -> tuple[str, str]:
    left, right = rng.sample(range(1, 100), 2)
    word = rng.choice(["more", "less"])
    return f"Is {left} {word} than {right}?", "Yes." if (left > right) == (word == "more") else "No."


def spell(rng: random.Random) -> tuple[str, str]:
    word = rng.choice([rng.choice(WORDS), pseudo_word(rng)])
    return f"Spell {word}.", "-".join(word)


def look_up(rng: random.Random) -> tuple[str, str]:
    keys = [*dict.fromkeys(any_word(rng) for _ in range(rng.randint(2, 6)))]
    table = {key: rng.choice([any_word(rng), str(rng.randint(1, 99))]) for key in keys}
    equals = rng.choice([": ", " = ", " -> "])
    lines = rng.choice(["\n", "; "]).join(key + equals + value for key, value in table.items())
    key = rng.choice(keys)
    return f"{lines}\nWhat is {key}?", table[key]


def rewrite(rng: random.Random) -> tuple[str, str]:
    one, two = rng.sample(NAMES, 2)
    verb, past = rng.choice([("likes", "liked"), ("helps", "helped"), ("calls", "called"), ("paints", "painted")])
    asked, answer = rng.choice(
        [
            ("Turn it round", f"{two} is {past} by {one}."),
            ("Swap the names", f"{two} {verb} {one}."),
            ("Make it a question", f"Who {verb} {two}?"),
            ("Put it in the past", f"{one} {past} {two}."),
        ]
    )
    return f"{asked}: {one} {verb} {two}.", answer


def replace_word(rng: random.Random) -> tuple[str, str]:
    fact = random_fact(rng)
    field, words = rng.choice([("city", CITIES), ("colour", COLOURS), ("day", DAYS), ("person", NAMES)])
    old, new = fact.values[field], rng.choice(words)
    sentence = state(rng, fact)
    return f"Write {new} for {old}: {sentence}", sentence.replace(old, new)


def one_or_many(rng: random.Random) -> tuple[str, str]:
    thing, count = rng.choice(THINGS), rng.randint(2, 99)
    phrase = rng.choice(["", rng.choice(COLOURS) + " "]) + thing
    if rng.random() < 0.3:
        return f"One {phrase}, {count} ...", f"{count} {phrase}s"
    return rng.choice([f"{count} {phrase}s, one ...", f"Give one of the {count} {phrase}s."]), f"one {phrase}"


def reverse_list(rng: random.Random) -> tuple[str, str]:
    words = distinct_words(rng, 2, 5)
    return f"Say it backwards: {', '.join(words)}", ", ".join(reversed(words))


def neighbour_day(rng: random.Random) -> tuple[str, str]:
    index, (word, step) = rng.randrange(7), rng.choice([("after", 1), ("before", -1)])
    return f"Which day comes {word} {DAYS[index]}?", DAYS[(index + step) % 7]


def sort_numbers(rng: random.Random) -> tuple[str, str]:
    numbers = rng.sample(range(1, 100), rng.randint(2, 4))
    return f"Sort: {', '.join(map(str, numbers))}", ", ".join(map(str, sorted(numbers)))


def greet(rng: random.Random) -> tuple[str, str]:
    name = rng.choice(NAMES)
    return rng.choice(
        [
            ("Hello!", "Hello! How can I help you?"),
            ("Who are you?", "I am a tiny language model."),
            ("Thank you!", "You are welcome."),
            (f"Hi, I am {name}.", f"Hello {name}! How can I help you?"),
            (f"Say hello to {name}.", f"Hello {name}!"),
        ]
    )


# Copying out of a sentence is what fine-tuning builds on, so those tasks come more often.
TASKS: dict[Task, int] = {
    repeat: 3,
    answer_about_one: 5,
    answer_about_several: 3,
    write_fields: 6,
    follow_example: 4,
    pick_word: 1,
    find_kind: 1,
    list_items: 2,
    count_words: 1,
    calculate: 1,
    compare: 1,
    spell: 1,
    look_up: 2,
    rewrite: 1,
    replace_word: 2,
    one_or_many: 1,
    reverse_list: 1,
    neighbour_day: 1,
    sort_numbers: 1,
    greet: 1,
}


def conversation(rng: random.Random) -> Document:
    """One to three tasks in a row, at times after a system message."""
    turns = [("system", "You are a helpful assistant.")] if rng.random() < 0.1 else []
    for task in rng.choices(list(TASKS), list(TASKS.values()), k=rng.choice([1, 1, 2, 3])):
        question, answer = task(rng)
        turns += [("user", question), ("assistant", answer)]
    return turns


def rename_characters(rng: random.Random, story: str) -> str:
    """Swap the names of a story for others, so that a name can only be known by reading it above."""
    swaps = {old: new for names in (GIRLS, BOYS) for old, new in zip(names, rng.sample(names, len(names)), strict=True)}
    return re.sub(r"\b[A-Z][a-z]+\b", lambda match: swaps.get(match[0], match[0]), story)


def story_document(rng: random.Random, stories: list[str]) -> Document:
    """A story as plain text or, at times, as the answer to a request for one."""
    story = rename_characters(rng, rng.choice(stories))
    named = [name for name in NAMES if re.search(rf"\b{name}\b", story)]
    if rng.random() < 0.75:
        return [("", story)]
    about = f" about {rng.choice(named)}" if named else ""
    return [("user", f"Tell me a story{about}."), ("assistant", story)]


def read_stories(data: Path) -> list[str]:
    """The TinyStories sample, with plain quotation marks."""
    text = (data / "tinystories" / "stories_0001_0600.txt").read_text(encoding="utf-8")
    text = text.translate(str.maketrans("\u201c\u201d\u2018\u2019", "\"\"''"))
    stories = (re.sub(r" *\n+ *", "\n", story).strip() for story in text.split("<|endoftext|>"))
    return [story for story in stories if story]


def read_word_problems(path: Path) -> list[str]:
    """GSM8K questions with their worked answers, without the calculator marks and the final `####` line."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    answers = (re.sub(r"<<.*?>>", "", row["answer"]).split("\n####")[0] for row in rows)
    return [f"{row['question']}\n{answer}" for row, answer in zip(rows, answers, strict=True)]


def documents(rng: random.Random, stories: list[str], word_problems: list[str]) -> Iterator[Document]:
    """An endless mixture: by documents 9 % stories, 4 % word problems and the rest fresh conversations."""
    while True:
        draw = rng.random()
        if draw < 0.09:
            yield story_document(rng, stories)
        elif draw < 0.13:
            yield [("", rng.choice(word_problems))]
        else:
            yield conversation(rng)
