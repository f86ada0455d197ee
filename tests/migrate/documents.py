"""Random YAML documents: structures with known and unknown keys, texts that are mutated, and hostile ones."""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from quantune.recipe.migrate.table import BY_KEY

CORPUS = Path(__file__).parent / "corpus"
TEXTS = [path.read_text(encoding="utf-8") for path in sorted(CORPUS.glob("*.yaml"))]
KNOWN = sorted({key.partition("[")[0].partition(".")[0] for key in BY_KEY})
IN_DATASETS = sorted({key.split(".")[1] for key in BY_KEY if key.startswith("datasets[].")})
BELOW = sorted({key.rpartition(".")[2].strip("*") or "thing" for key in BY_KEY if "." in key})
ODD_KEYS: list[Any] = [
    *(
        0,
        1,
        -5,
        1.5,
        True,
        False,
        None,
        datetime.date(2026, 1, 2),
        b"bytes",
        "",
        " ",
        "a.b",
        "a[0]",
        "datasets[0].path",
    ),
    *(
        "é",
        "日本",
        "key with spaces",
        "#",
        "<<",
        "=",
        "~",
        "lora_R",
        "LORA_R",
        "lora_rr",
        "x" * 200,
        "\x07",
        "\u2028",
        "😀",
    ),
]
ODD_VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3.5, -0.0, 1e-9, 1e300, float("inf"), float("-inf"), float("nan"), 10**40, 2**63),
    *(
        "",
        " ",
        "true",
        "False",
        "no",
        "null",
        "2e-5",
        "1e999",
        "nan",
        "16",
        "4.0",
        "0x10",
        "auto",
        "qlora",
        "lora",
        "jinja",
    ),
    *(
        "train[:20%]",
        "{instruction} {input}",
        "{",
        "{a!z:{b}}",
        "\x00",
        "\x1b[31m",
        "\u2028",
        "é" * 50,
        "😀",
        "x" * 3000,
    ),
    *(datetime.date(2026, 1, 2), datetime.datetime(2026, 1, 2, 3, 4, 5), b"\x00\xff", {1, 2}),
    *([], {}, [1, 2], ["a"], [None], [[1], [2]], [[]], [{}], {"a": 1}, [{"a": 1}], [[{"a": 1}], 2], {"a": {"b": []}}),
]
PIECES = [
    *("&a ", "*a", "<<: *a\n", "<<: [*a, *b]\n", "? ", "- ", ": ", "{", "}", "[", "]", "|\n", ">-\n"),
    *("%TAG ! x:\n", "\t", "!!set {a, b}", "!!omap"),
    *("---\n", "...\n", "!!python/object/apply:os.system ['id']", "!!binary aGk=", "!!binary *"),
    *("!!timestamp 2024-13-45", "!!int x", "!!float .", "!!bool maybe", "!!null 5", "!local x"),
    *("!!map [1]", "!!seq {a: 1}"),
    *("!!str {a: 1}", "!!pairs [a: 1]", "2024-02-30", "1:30", "190:20:30.15", "0b", "0o7", "0x", ".nan", "~"),
    "9" * 5000,
    *("\x00", "\x07", "\x7f", "\x85", "\u2028", "\ufeff", "\ud800", "\U0001f600", "é", "'", '"', "\\"),
    *("#", "@", "`", "\r"),
    *('"\\ud800"', '"\\x00"', '"\\U00110000"', "1e5", "1e999", "-.inf", "yes", "=", "<<", "!", "!!"),
    *("&", "*", "%", "\n\n"),
]  # fmt: skip

ODD_TEXTS = [
    yaml.safe_dump(odd, default_flow_style=True, width=1e9).removesuffix("\n...\n").strip() for odd in ODD_VALUES
]


def structure(chance: random.Random) -> dict[Any, Any]:
    """A document of known keys with fitting and odd values, unknown keys, and shared parts that become anchors."""
    shared = [value(chance, 2) for _ in range(2)]
    base = dict(yaml.safe_load(chance.choice(TEXTS)) or {}) if chance.random() < 0.7 else {}
    for key in list(base):
        if chance.random() < 0.1:
            del base[key]
        elif chance.random() < 0.15:
            base[key] = _one(chance, shared)
    for _ in range(chance.randrange(8)):
        base[key_(chance, KNOWN)] = _one(chance, shared)
    if chance.random() < 0.3:
        base[chance.choice(["datasets", "test_datasets"])] = [
            _dataset(chance, shared) for _ in range(chance.randrange(4))
        ]
    return base or {"base_model": None}


def _dataset(chance: random.Random, shared: list[Any]) -> Any:
    if chance.random() < 0.1:
        return _one(chance, shared)
    made = {"path": chance.choice(["org/rows", "rows.jsonl", "./rows.csv", "json", "s3://rows"]),
            "type": chance.choice(["alpaca", "chat_template", "completion", "alpaca:chat", "sharegpt"])}  # fmt: skip
    return {**made, **{key_(chance, IN_DATASETS): _one(chance, shared) for _ in range(chance.randrange(4))}}


def _one(chance: random.Random, shared: list[Any]) -> Any:
    return chance.choice(shared) if chance.random() < 0.15 else value(chance, 3)


def key_(chance: random.Random, known: list[str]) -> Any:
    """A known key, one misspelled, or one that nobody would write."""
    kind = chance.random()
    key = chance.choice(known)
    if kind < 0.7:
        return key
    if kind < 0.85:
        place = chance.randrange(len(key))
        return key[:place] + chance.choice("aez_") + key[place + 1 :]
    return chance.choice(ODD_KEYS)


def value(chance: random.Random, depth: int) -> Any:
    """Any value, up to so many levels deep."""
    kind = chance.random()
    if depth and kind < 0.1:
        return {key_(chance, BELOW): value(chance, depth - 1) for _ in range(chance.randrange(4))}
    if depth and kind < 0.2:
        return [value(chance, depth - 1) for _ in range(chance.randrange(4))]
    return chance.choice(ODD_VALUES)


def shuffled(document: Any, chance: random.Random) -> Any:
    """The same document with the keys of every mapping in another order."""
    if isinstance(document, dict):
        pairs = [(key, shuffled(member, chance)) for key, member in document.items()]
        chance.shuffle(pairs)
        return dict(pairs)
    return [shuffled(member, chance) for member in document] if isinstance(document, list) else document


def dump(document: Any) -> str:
    """The document as YAML, its keys in their order, shared parts as anchors."""
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


def text(chance: random.Random) -> str:
    """A mutated text, a random document, or a hostile one."""
    kind = chance.random()
    if kind < 0.02:
        return chance.choice(HOSTILE)(chance)
    if kind < 0.3:
        made = dump(structure(chance))
        return made if chance.random() < 0.5 else mutated(made, chance)
    return mutated(chance.choice(TEXTS), chance)


def mutated(made: str, chance: random.Random, pieces: list[str] = PIECES, others: list[str] = TEXTS) -> str:
    """The text after a few changes."""
    for _ in range(chance.choice([1, 1, 1, 2, 2, 3, 6])):
        made = chance.choice(_CHANGES)(made, chance, pieces, others)
    return made


def _flip(made: str, chance: random.Random, pieces: list[str], others: list[str]) -> str:
    place = chance.randrange(len(made) + 1)
    return (
        made[:place] + chr(ord(made[place]) ^ (1 << chance.randrange(7))) + made[place + 1 :] if made[place:] else made
    )


def _cut(made: str, chance: random.Random, pieces: list[str], others: list[str]) -> str:
    start = chance.randrange(len(made) + 1)
    return made[:start] + made[start + chance.choice([1, 2, 5, 20, 100]) :]


def _insert(made: str, chance: random.Random, pieces: list[str], others: list[str]) -> str:
    place = chance.randrange(len(made) + 1)
    return made[:place] + chance.choice(pieces) + made[place:]


def _as_value(made: str, chance: random.Random, pieces: list[str], others: list[str]) -> str:
    lines = made.split("\n")
    index = chance.randrange(len(lines))
    head, colon, _ = lines[index].partition(":")
    lines[index] = f"{head}{colon} {chance.choice(pieces)}"
    return "\n".join(lines)


def _odd_value(made: str, chance: random.Random, pieces: list[str], others: list[str]) -> str:
    return _as_value(made, chance, ODD_TEXTS, others)


def _lines(made: str, chance: random.Random, pieces: list[str], others: list[str]) -> str:
    lines = made.split("\n")
    one, other = chance.randrange(len(lines)), chance.randrange(len(lines))
    kind = chance.randrange(4)
    if kind == 0:
        lines.insert(one, lines[other])
    elif kind == 1:
        lines[one], lines[other] = lines[other], lines[one]
    elif kind == 2:
        lines[one] = " " * chance.randrange(5) + lines[one].lstrip()
    else:
        del lines[one]
    return "\n".join(lines)


def _splice(made: str, chance: random.Random, pieces: list[str], others: list[str]) -> str:
    other = chance.choice(others)
    return made[: chance.randrange(len(made) + 1)] + other[chance.randrange(len(other) + 1) :]


_CHANGES: tuple[Callable[[str, random.Random, list[str], list[str]], str], ...] = (
    *(_flip, _cut, _insert, _as_value, _odd_value, _odd_value, _odd_value, _lines, _lines, _splice),
)


def bomb(levels: int) -> str:
    """Aliases that stand for ten times what the one before does."""
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels))]
    return "\n".join(lines)


def merge_bomb(levels: int) -> str:
    """Merge keys that stand for ten times what the one before does."""
    lines = ["a0: &a0 {k: 1}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}], k{n}: 1}}" for n in range(1, levels)]
    return "\n".join(lines)


HOSTILE: list[Callable[[random.Random], str]] = [
    lambda chance: bomb(chance.randint(2, 12)),
    lambda chance: merge_bomb(chance.randint(2, 12)),
    lambda chance: "a: " + "[" * chance.randint(50, 3000),
    lambda chance: "a: " + "{b: " * chance.randint(50, 3000) + "1" + "}" * 60,
    lambda chance: "".join(" " * n + "k:\n" for n in range(chance.randint(50, 300))),
    lambda chance: "a: " + "- " * chance.randint(50, 2000) + "1",
    lambda chance: "- " * chance.randint(50, 2000) + "1",
    lambda chance: "? " * chance.randint(50, 2000) + "1",
    lambda chance: "a: &a [*a]",
    lambda chance: "a: &a {b: *a}",
    lambda chance: "a: &a {<<: *a, b: 1}",
    lambda chance: "&a a: *a\n*a : 1",
    lambda chance: "datasets: &d\n- path: x\n  more: *d",
    lambda chance: "base_model: x\n? [a, b]\n: 1",
    lambda chance: "base_model: x\n? {a: b}\n: 1",
    lambda chance: "base_model: x\n<<: 5",
    lambda chance: "base_model: x\n<<: [1, {a: 2}]",
    lambda chance: "base_model: x\n<<: {a: 1}\n<<: {a: 2, b: 3}",
    lambda chance: "".join(f"k{n}: {n}\n" for n in range(chance.randint(10, 300))),
    lambda chance: "lora_r: " + "9" * chance.randint(10, 10000),
    lambda chance: "lora_r: 0x" + "f" * chance.randint(10, 6000),
    lambda chance: "lora_r: " + ":".join(["59"] * chance.randint(2, 400)),
    lambda chance: "a: '" + "".join(chr(chance.randrange(0x110000)) for _ in range(50)) + "'",
    lambda chance: "".join(chr(chance.randrange(256)) for _ in range(chance.randrange(300))),
    lambda chance: "".join(chance.choice("-?:,[]{}#&*!|>'\"%@` \n\tab1") for _ in range(chance.randrange(300))),
    lambda chance: "",
    lambda chance: "\ufeffbase_model: x",
    lambda chance: "base_model: x\r\nadapter: lora\rlora_r: 8\u2028lora_alpha: 8\x85seed: 1",
]
