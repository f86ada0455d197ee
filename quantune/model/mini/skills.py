"""Small question-and-answer skills for the chat part of the corpus: each draws one (request, answer) pair.

The corpus must not contain the quickstart task (English date and duration phrases to ISO-8601): only its parts, such
as month numbers, number words and clock times, appear here, one at a time.
"""

import json
from collections.abc import Callable
from random import Random

from quantune.model.mini import vocabulary as v

Pair = tuple[str, str]
Skill = Callable[[Random], Pair]


def words(rng: Random, low: int = 2, high: int = 6) -> list[str]:
    """Draw distinct nouns and adjectives."""
    return rng.sample(v.NOUNS + v.ADJECTIVES, rng.randint(low, high))


def number(rng: Random) -> int:
    """Draw a number, small ones more often."""
    return rng.randint(0, rng.choice((12, 31, 60, 99, 999, 9999)))


def ask(rng: Random, *phrasings: str) -> str:
    """Pick one phrasing and, now and then, lower its first letter or add a "please"."""
    phrase = rng.choice(phrasings)
    return f"Please {phrase[0].lower()}{phrase[1:]}" if rng.random() < 0.1 else phrase


def text_skill(rng: Random) -> Pair:
    """Copy or transform a short text."""
    items = words(rng)
    text = " ".join(items)
    pick = rng.choice(items)
    other = rng.choice(v.NOUNS)
    joiner, name = rng.choice((("-", "a dash"), ("_", "an underscore"), ("/", "a slash"), (", ", "commas")))
    letters = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 6)))
    index = rng.randrange(len(items))
    return rng.choice((
        (ask(rng, f"Copy this: {text}", f"Repeat: {text}", f"Say \"{text}\"."), text),
        (ask(rng, f"Copy this: {letters} {pick}", f"Repeat: {letters} {pick}"), f"{letters} {pick}"),
        (ask(rng, f"Write in upper case: {text}", f"{text} in capitals"), text.upper()),
        (ask(rng, f"Write in lower case: {text.upper()}"), text),
        (ask(rng, f"Capitalize each word: {text}"), text.title()),
        (ask(rng, f"Reverse the order of the words: {text}"), " ".join(reversed(items))),
        (ask(rng, f"Sort the words: {text}", f"Put in alphabetical order: {text}"), " ".join(sorted(items))),
        (ask(rng, f"What is the first word of: {text}?", f"First word: {text}"), items[0]),
        (ask(rng, f"What is the last word of: {text}?", f"Last word: {text}"), items[-1]),
        (ask(rng, f"What is the {v.ordinal_word(index + 1)} word of: {text}?"), items[index]),
        (ask(rng, f"How many words are in: {text}?", f"Count the words: {text}"), str(len(items))),
        (ask(rng, f"Replace {pick} with {other}: {text}"), " ".join(other if w == pick else w for w in items)),
        (ask(rng, f"Remove the word {pick}: {text}"), " ".join(w for w in items if w != pick)),
        (ask(rng, f"Join with {name}: {text}"), joiner.join(items)),
        (ask(rng, f"Spell {pick}", f"Spell the word {pick}."), " ".join(pick)),
        (ask(rng, f"Write {pick} twice."), f"{pick} {pick}"),
    ))  # fmt: skip


def number_skill(rng: Random) -> Pair:
    """Convert between digits, words and ordinals."""
    n, day = number(rng), rng.randint(1, 31)
    code = "".join(rng.choices("0123456789", k=rng.randint(2, 8)))
    spelled = v.in_words(n)
    return rng.choice((
        (ask(rng, f"Write {n} in words.", f"{n} in words"), spelled),
        (ask(rng, f"Write {spelled} in digits.", f"{spelled} as a number", f"What number is {spelled}?"), str(n)),
        (ask(rng, f"Write {spelled} in digits.", f"{spelled} in digits"), str(n)),
        (ask(rng, f"Which number goes with {v.ordinal_word(day)}?", f"{v.ordinal_word(day)} as a number"), str(day)),
        (ask(rng, f"Which number is in {v.ordinal_digits(day)}?", f"{v.ordinal_digits(day)} as a number"), str(day)),
        (ask(rng, f"What is the ordinal of {day}?"), v.ordinal_digits(day)),
        (ask(rng, f"What is the ordinal of {v.in_words(day)} in words?"), v.ordinal_word(day)),
        (ask(rng, f"Pad {day} to two digits.", f"{day} with two digits"), f"{day:02d}"),
        (ask(rng, f"Write {v.in_words(day)} with two digits."), f"{day:02d}"),
        (ask(rng, f"Copy the code {code}.", f"Repeat: {code}"), code),
        (ask(rng, f"Write {' '.join(code)} without spaces."), code),
    ))  # fmt: skip


def arithmetic_skill(rng: Random) -> Pair:
    """Do small arithmetic and comparisons."""
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    low, high = sorted((a, b))
    several = rng.sample(range(100), rng.randint(3, 5))
    listed = ", ".join(map(str, several))
    return rng.choice((
        (ask(rng, f"What is {a} + {b}?", f"Add {a} and {b}."), str(a + b)),
        (ask(rng, f"What is {high} - {low}?", f"Subtract {low} from {high}."), str(high - low)),
        (ask(rng, f"Which is larger, {a} or {b}?"), str(high)),
        (ask(rng, f"What number comes after {a}?"), str(a + 1)),
        (ask(rng, f"Is {a} even or odd?"), "odd" if a % 2 else "even"),
        (ask(rng, f"Sort these numbers: {listed}"), ", ".join(map(str, sorted(several)))),
        (ask(rng, f"What is the largest of {listed}?"), str(max(several))),
    ))  # fmt: skip


def calendar_skill(rng: Random) -> Pair:
    """Know months, weekdays and clock times, one at a time."""
    m, d = rng.randrange(12), rng.randrange(7)
    month, weekday = v.MONTHS[m], v.WEEKDAYS[d]
    hour, minute = rng.randrange(24), rng.choice((0, 0, rng.randrange(60)))
    clock, short = f"{hour:02d}:{minute:02d}", v.clock_12h(hour, minute)
    return rng.choice((
        (ask(rng, f"Which month number is {month}?", f"Number of the month {month}", f"{month} as a number"),
         str(m + 1)),
        (ask(rng, f"Write {month} as a two-digit number.", f"{month} with two digits"), f"{m + 1:02d}"),
        (ask(rng, f"Which month has number {m + 1}?", f"What is month {m + 1:02d}?"), month),
        (ask(rng, f"Which month does {month[:3]} stand for?"), month),
        (ask(rng, f"Which month comes after {month}?"), v.MONTHS[(m + 1) % 12]),
        (ask(rng, f"Which day comes after {weekday}?"), v.WEEKDAYS[(d + 1) % 7]),
        (ask(rng, f"How many days has {month} in a common year?"), str(v.MONTH_DAYS[m])),
        (ask(rng, f"Convert {short} to 24-hour time.", f"{short} on the 24-hour clock"), clock),
        (ask(rng, f"Convert {short} to 24-hour time.", f"{short} in 24-hour time"), clock),
        (ask(rng, f"Convert {clock} to 12-hour time."), short),
    ))  # fmt: skip


def unit_skill(rng: Random) -> Pair:
    """Convert and abbreviate units."""
    unit = rng.choice(list(v.UNITS))
    smaller, factor = v.UNITS[unit]
    count = rng.randint(1, 9)
    named, symbol = rng.choice(list(v.SYMBOLS.items()))
    amount = rng.randint(1, 59)
    return rng.choice((
        (ask(rng, f"How many {v.plural(smaller)} are in {count} {v.plural(unit, count)}?"), str(count * factor)),
        (ask(rng, f"What is the symbol for {named}?"), symbol),
        (ask(rng, f"Abbreviate {v.in_words(amount)} {v.plural(named, amount)}."), f"{amount} {symbol}"),
        (ask(rng, f"Which unit is in {amount} {v.plural(named, amount)}?"), named),
    ))  # fmt: skip


def record(rng: Random) -> dict[str, str | int]:
    """Draw a flat record of one to four fields."""
    return {key: rng.choice((rng.choice(v.NAMES), rng.choice(v.NOUNS), rng.randint(1, 99), rng.choice(v.CITIES)))
            for key in rng.sample(v.FIELDS, rng.randint(1, 4))}  # fmt: skip


def json_skill(rng: Random) -> Pair:
    """Write, read and edit JSON records."""
    fields = record(rng)
    text = json.dumps(fields)
    key = rng.choice(list(fields))
    listed = ", ".join(f"{name} {value}" for name, value in fields.items())
    pairs = ", ".join(f"{name}={value}" for name, value in fields.items())
    n, person, city, item = number(rng), rng.choice(v.NAMES), rng.choice(v.CITIES), rng.choice(v.NOUNS)
    word_list = words(rng, 2, 4)
    return rng.choice((
        (ask(rng, f"Put into JSON: {listed}", f"{listed} as JSON"), text),
        (ask(rng, f"Turn into JSON: {pairs}", f"{pairs} as JSON"), text),
        (ask(rng, f"What is {key} in {text}?", f"{text} Give the {key}."), str(fields[key])),
        (ask(rng, f"List the keys of {text}"), ", ".join(fields)),
        (ask(rng, f"Remove {key} from {text}"), json.dumps({k: x for k, x in fields.items() if k != key})),
        (ask(rng, f"Set {key} to {n} in {text}"), json.dumps({**fields, key: n})),
        (ask(rng, f"Make a JSON list: {' '.join(word_list)}"), json.dumps(word_list)),
        (ask(rng, f"Put the number {v.in_words(n)} into JSON."), json.dumps({"number": n})),
        (ask(rng, f"{person} lives in {city}. Answer in JSON."), json.dumps({"name": person, "city": city})),
        (ask(rng, f"{person} has {v.in_words(n)} {v.plural(item, n)}. Answer in JSON."),
         json.dumps({"name": person, "item": item, "count": n})),
    ))  # fmt: skip


def language_skill(rng: Random) -> Pair:
    """Know word forms, groups, opposites, feelings and capitals."""
    verb, past = rng.choice(list(v.VERBS.items()))
    noun, place = rng.choice(v.NOUNS), rng.choice(v.PLACES)
    group = rng.choice(list(v.GROUPS))
    member = rng.choice(v.GROUPS[group])
    one, opposite = rng.choice(list(v.OPPOSITES.items()))
    country, capital = rng.choice(list(v.CAPITALS.items()))
    happy = rng.random() < 0.5
    feeling = rng.choice(v.HAPPY if happy else v.UNHAPPY)
    person, colour = rng.choice(v.NAMES), rng.choice(v.COLOURS)
    sentence = f"{person} {past} the {colour} {noun} in the {place}."
    return rng.choice((
        (ask(rng, f"What is the past tense of {verb}?"), past),
        (ask(rng, f"What is the plural of {noun}?"), v.plural(noun)),
        (ask(rng, f"What is the opposite of {one}?"), opposite),
        (ask(rng, f"What kind of thing is {v.article(member)}?", f"Animal, fruit or other: {member}"), group),
        (ask(rng, f"What is the capital of {country}?"), capital),
        (ask(rng, f"Is this positive or negative? The {noun} was {feeling}."), "positive" if happy else "negative"),
        (ask(rng, f"{sentence} Who {past} the {noun}?"), person),
        (ask(rng, f"{sentence} Where was the {noun}?"), f"in the {place}"),
        (ask(rng, f"{sentence} Which colour was the {noun}?"), colour),
    ))  # fmt: skip


SKILLS: tuple[Skill, ...] = (text_skill, number_skill, calendar_skill, json_skill, number_skill, calendar_skill,
                             language_skill, unit_skill, arithmetic_skill)  # fmt: skip


def draw_pair(rng: Random) -> Pair:
    """Draw one pair of any skill."""
    return rng.choice(SKILLS)(rng)
