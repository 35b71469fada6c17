"""Write the embedded data set: messages to a shop about orders, and where the shop sends each of them.

    python scripts/make_orders.py --out src/tunekit/assets/orders.jsonl [--rows 400] [--seed 0]

Each line is `{"prompt": message, "completion": "team: delivery | urgent: yes"}`. The same seed gives the same bytes.
"""

import argparse
import json
import random
from pathlib import Path

from tiny_corpus import CITIES, COLOURS, DAYS, NAMES, THINGS

CONCERNS = {
    "delivery": [
        "My {item} has not arrived in {city}.",
        "Where is the parcel with the {item}?",
        "The driver left my {item} at the wrong house.",
        "The parcel was due on {day}, and there is no {item} yet.",
        "The {item} is still on its way to {city}, the tracking says.",
        "Can the driver bring the {item} on {day} instead?",
    ],
    "returns": [
        "I want to send the {item} back.",
        "The {item} is too small. Can I swap it?",
        "How do I return a {item} from {city}?",
        "I do not like the {item} and want to swap it for another colour.",
        "Please take back the {item} that I got on {day}.",
        "May I send back {count} {item}s that I do not need?",
    ],
    "billing": [
        "I paid twice for the {item}.",
        "The bill for my {item} is wrong.",
        "Please send me the bill for {count} {item}s.",
        "You took the money for the {item} on {day}, and again later.",
        "The price on the bill is not the price of the {item}.",
        "My card was charged for {count} {item}s. I paid for one.",
    ],
    "repairs": [
        "The {item} broke on {day}.",
        "There is a hole in my {item}.",
        "A part of the {item} is missing.",
        "Can somebody in {city} mend my {item}?",
        "The {item} broke after {count} days.",
        "My {item} has a hole and a part fell off.",
    ],
    "sales": [
        "Do you have a {item} in the shop in {city}?",
        "How much is the {item}?",
        "I would like to order {count} {item}s.",
        "Are {count} {item}s cheaper than one?",
        "Do you sell a {item} for a child?",
        "I would like to buy a {item} on {day}. Do you have one?",
    ],
}
URGENCY = {
    "yes": ["Please hurry!", "It is very urgent.", "I cannot wait any longer.", "I need help today."],
    "no": ["There is no hurry.", "Take your time.", "Any day is fine.", "It can wait."],
}
GREETINGS = ["Hello, {name} here.", "Hi, this is {name}.", "I am {name} from {city}.", "Good morning!", "Hello!"]
RECORD = "team: {team} | urgent: {urgent}"


def make_row(rng: random.Random) -> dict[str, str]:
    """One message with its record."""
    words = {
        "name": rng.choice(NAMES),
        "item": f"{rng.choice(COLOURS)} {rng.choice(THINGS)}",
        "count": rng.randint(2, 60),
        "city": rng.choice(CITIES),
        "day": rng.choice(DAYS),
    }
    team, urgent = rng.choice(list(CONCERNS)), rng.choice(list(URGENCY))
    concern, hurry = rng.choice(CONCERNS[team]), rng.choice(URGENCY[urgent])
    parts = [rng.choice(GREETINGS), *rng.choice([[concern, hurry], [hurry, concern]])]
    return {"prompt": " ".join(parts).format(**words), "completion": RECORD.format(team=team, urgent=urgent)}


def make_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Rows of which no two have the same message, so that a held-out message is always a new one."""
    rng = random.Random(seed)
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < count:
        row = make_row(rng)
        rows.setdefault(row["prompt"], row)
    return list(rows.values())


def main() -> None:
    """Write the data set."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON Lines file to write")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    lines = (json.dumps(row) + "\n" for row in make_rows(arguments.rows, arguments.seed))
    arguments.out.write_text("".join(lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
