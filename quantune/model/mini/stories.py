"""Generated English narratives and plain data documents."""

import json
from random import Random

from quantune.model.mini import vocabulary as v
from quantune.model.mini.skills import draw_pair, record


def when(rng: Random) -> str:
    """Draw a phrase of time."""
    day, month, hour = rng.randint(1, 28), rng.choice(v.MONTHS), rng.randint(1, 12)
    return rng.choice((
        f"On the {v.ordinal_word(day)} of {month}", f"On {month} {v.ordinal_digits(day)}, {rng.randint(1950, 2030)}",
        f"One {rng.choice(v.WEEKDAYS)} in {month}", f"At {v.in_words(hour)} o'clock",
        f"At {v.clock_12h(rng.randrange(24), rng.choice((0, 15, 30, 45)))}",
        f"In the {rng.choice(('morning', 'evening'))}",
        f"After {v.in_words(hour)} {v.plural('hour', hour)}", f"In {rng.randint(1950, 2030)}",
    ))  # fmt: skip


def story(rng: Random) -> str:
    """Tell how somebody lost, looked for and found a thing, with a consistent cast."""
    animals = v.GROUPS["animal"]
    her = rng.random() < 0.5
    hero, friend = rng.choice(v.WOMEN if her else v.MEN), rng.choice(v.NAMES)
    she, her_ = ("She", "her") if her else ("He", "his")
    thing, colour, adjective = rng.choice(v.NOUNS), rng.choice(v.COLOURS), rng.choice(v.ADJECTIVES)
    place, other = rng.sample(v.PLACES, 2)
    count = rng.randint(2, 12)
    past = rng.choice(list(v.VERBS.values()))
    middle = [
        f'"Have you seen my {thing}?" {she.lower()} asked {friend}.',
        f'"No," said {friend}, "but I saw {v.article(colour)} {thing} near the {other}."',
        f"{when(rng)}, {friend} came with {v.in_words(count)} {v.plural(rng.choice(v.NOUNS), count)} and sat down.",
        f"{she} {past} the {thing} and put it in {her_} bag.",
        f"The {place} was {adjective}, and nobody was there except {friend}.",
        f"{she} counted {v.in_words(count)} {v.plural(rng.choice(animals), count)} on the way to the {other}.",
        f"It took {v.in_words(count)} {v.plural('minute', count)} to walk from the {place} to the {other}.",
        f"There were {count} {v.plural(rng.choice(v.NOUNS), count)} on the table, and {friend} took one of them.",
        f"{friend} was {count + 20} years old and had lived in {rng.choice(v.CITIES)} for {count} years.",
        f"{she} wanted to buy {v.article(rng.choice(v.NOUNS))}, but it cost {v.in_words(count * 5)} coins.",
    ]
    opening = rng.choice((
        f"{when(rng)}, {hero} went to the {place} with {v.article(f'{adjective} {thing}')}.",
        f"{hero} lived in {rng.choice(v.CITIES)}, in a {rng.choice(('small', 'large'))} house near the {place}.",
        f"{when(rng)}, {hero} could not find the {colour} {thing} that {friend} had given {'her' if her else 'him'}.",
    ))  # fmt: skip
    ending = rng.choice((
        f"At last {she.lower()} found the {thing} in the {other}, and {she.lower()} was happy.",
        f"{hero} thanked {friend}, and they went home together.",
        f"So {hero} and {friend} became friends, and the {thing} stayed in the {place}.",
    ))  # fmt: skip
    return " ".join([opening, *rng.sample(middle, rng.randint(2, 6)), ending])


def data_document(rng: Random) -> str:
    """Write JSON records, a CSV table with its JSON form, or a list of plain question-and-answer pairs."""
    form = rng.randrange(3)
    if form == 0:
        return "\n".join(json.dumps(record(rng)) for _ in range(rng.randint(2, 5)))
    if form == 1:
        keys = rng.sample(v.FIELDS, rng.randint(2, 3))
        rows = [{key: rng.choice((rng.choice(v.NOUNS), rng.randint(1, 99))) for key in keys}
                for _ in range(rng.randint(2, 4))]  # fmt: skip
        lines = [",".join(str(row[key]) for key in keys) for row in rows]
        return "\n".join([",".join(keys), *lines, "", *map(json.dumps, rows)])
    pairs = [draw_pair(rng) for _ in range(rng.randint(2, 6))]
    return "\n".join(f"Q: {question}\nA: {answer}" for question, answer in pairs)
