"""Write train.jsonl and heldout.jsonl beside this file: English dates and durations to ISO-8601 in JSON.

    python recipes/quickstart/make_data.py

Deterministic, standard library only. The two files share no phrase and no answer: an answer's hash decides its file.
"""

import hashlib
import json
import random
import re
from collections.abc import Callable
from datetime import date, datetime, timedelta
from pathlib import Path


def listed(text: str) -> list[str]:
    """Split a readable line of words into a list."""
    return text.split()


SEED = 2021
TRAIN_ROWS = 5000
HELD_OUT_ROWS = 200
HELD_OUT_SHARE = 0.05

MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
          "December")  # fmt: skip
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

ONES = listed("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen")  # fmt: skip
TENS = listed("zero ten twenty thirty forty fifty")
IRREGULAR_ORDINALS = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth",
                      "nine": "ninth", "twelve": "twelfth"}  # fmt: skip
# Units of a duration, largest first: (singular name, ISO-8601 letter, largest count). The last three follow the "T".
UNITS = (("year", "Y", 20), ("month", "M", 11), ("day", "D", 30), ("hour", "H", 23), ("minute", "M", 59),
         ("second", "S", 59))  # fmt: skip
FIRST_TIME_UNIT = 3

Row = tuple[str, dict[str, str]]


def in_words(number: int) -> str:
    """Spell 0..59: 42 -> "forty-two"."""
    if number < 20:
        return ONES[number]
    tens, ones = divmod(number, 10)
    return TENS[tens] + (f"-{ONES[ones]}" if ones else "")


def ordinal_word(number: int) -> str:
    """Spell an ordinal: 21 -> "twenty-first"."""
    head, dash, last = in_words(number).rpartition("-")
    regular = last[:-1] + "ieth" if last.endswith("y") else last + "th"
    return head + dash + IRREGULAR_ORDINALS.get(last, regular)


def ordinal_digits(number: int) -> str:
    """Write an ordinal with digits: 3 -> "3rd"."""
    suffix = "th" if number in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"


def date_phrase(rng: random.Random, day: date) -> str:
    """Say a date in one of many ways."""
    month, year, weekday = MONTHS[day.month - 1], day.year, WEEKDAYS[day.weekday()]
    short = month if month == "May" else month[:3]
    spelled, ordinal = ordinal_word(day.day), ordinal_digits(day.day)
    return rng.choice((
        f"the {spelled} of {month} {year}", f"the {spelled} of {month}, {year}", f"{month} the {spelled}, {year}",
        f"{month} {ordinal}, {year}", f"the {ordinal} of {month} {year}", f"{ordinal} {month} {year}",
        f"{month} {day.day}, {year}", f"{day.day} {month} {year}", f"{short} {day.day}, {year}",
        f"{day.day} {short} {year}", f"{weekday}, {month} {day.day}, {year}",
        f"{weekday} the {spelled} of {month} {year}",
    ))  # fmt: skip


def duration_phrase(rng: random.Random, parts: list[tuple[int, int]]) -> str:
    """Say a duration given as (unit index, count) pairs."""
    spelled = rng.random() < 0.6
    said = []
    for unit, count in parts:
        name = UNITS[unit][0] + ("" if count == 1 else "s")
        one = ("an" if name == "hour" else "a") if count == 1 and rng.random() < 0.3 else None
        said.append(f"{one or (in_words(count) if spelled else count)} {name}")
    return said[0] if len(said) == 1 else ", ".join(said[:-1]) + " and " + said[-1]


def iso_duration(parts: list[tuple[int, int]]) -> str:
    """Write (unit index, count) pairs as an ISO-8601 duration: PT2H5M."""
    days = "".join(f"{count}{UNITS[unit][1]}" for unit, count in parts if unit < FIRST_TIME_UNIT)
    clock = "".join(f"{count}{UNITS[unit][1]}" for unit, count in parts if unit >= FIRST_TIME_UNIT)
    return f"P{days}" + (f"T{clock}" if clock else "")


def parse_duration(text: str) -> list[tuple[int, int]]:
    """Read an ISO-8601 duration back into (unit index, count) pairs."""
    match = re.fullmatch(r"P(?:(\d+)Y)?(?:(\d+)M)?(?:(\d+)D)?(?:T(?:(\d+)H)?(?:(\d+)M)?(?:(\d+)S)?)?", text)
    assert match, f"expected an ISO-8601 duration. Received: {text}"
    return [(unit, int(count)) for unit, count in enumerate(match.groups()) if count]


def draw_day(rng: random.Random) -> date:
    """Draw a day from 1980 to 2039."""
    return date(1980, 1, 1) + timedelta(days=rng.randrange((date(2040, 1, 1) - date(1980, 1, 1)).days))


def date_row(rng: random.Random) -> Row:
    """Draw a date with its phrase."""
    day = draw_day(rng)
    answer = day.isoformat()
    assert datetime.strptime(answer, "%Y-%m-%d").date() == day
    return date_phrase(rng, day), {"date": answer}


def duration_row(rng: random.Random) -> Row:
    """Draw a duration of one to three neighbouring units with its phrase."""
    first = rng.randrange(len(UNITS))
    parts = [(unit, rng.randint(1, UNITS[unit][2])) for unit in range(len(UNITS))[first : first + rng.randint(1, 3)]]
    answer = iso_duration(parts)
    assert parse_duration(answer) == parts
    return duration_phrase(rng, parts), {"duration": answer}


DRAWS: tuple[Callable[[random.Random], Row], ...] = (date_row, date_row, duration_row)


def is_held_out(answer: str) -> bool:
    """Decide by the answer's hash which file a row belongs to."""
    return int.from_bytes(hashlib.sha256(answer.encode()).digest()[:4], "big") / 2**32 < HELD_OUT_SHARE


def make_rows() -> tuple[dict[str, str], dict[str, str]]:
    """Return the train and the held-out rows as phrase -> answer, both JSON text on the answer's side."""
    rng = random.Random(SEED)
    train: dict[str, str] = {}
    held_out: dict[str, str] = {}
    while len(train) < TRAIN_ROWS or len(held_out) < HELD_OUT_ROWS:
        phrase, fields = rng.choice(DRAWS)(rng)
        answer = json.dumps(fields)
        rows, limit = (held_out, HELD_OUT_ROWS) if is_held_out(answer) else (train, TRAIN_ROWS)
        if len(rows) < limit:
            assert rows.setdefault(phrase, answer) == answer, f"two answers for the phrase: {phrase}"
    assert not set(train) & set(held_out) and not set(train.values()) & set(held_out.values())
    return train, held_out


def write_rows(path: Path, rows: dict[str, str]) -> None:
    """Write chat rows, one a line."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for phrase, answer in rows.items():
            messages = [{"role": "user", "content": phrase}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    for name, rows in zip(("train", "heldout"), make_rows(), strict=True):
        write_rows(here / f"{name}.jsonl", rows)
