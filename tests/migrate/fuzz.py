"""Random and mutated documents, and what must hold for each: `python tests/migrate/fuzz.py --count 100000`.

A YAML becomes a `Migration` that accounts for every key, a TOML recipe a recipe or a `RecipeError`, never anything
else.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import documents
import tomli
import yaml
from migration import migrate
from walker import keys_of

from quantune.backends import registry
from quantune.errors import RecipeError
from quantune.recipe.load import load_recipe
from quantune.recipe.migrate.reading import LARGEST, MOST_KEYS

ROOT = Path(__file__).parents[2]
LEGACY = """\
adapter = "qlora"
load_in_4bit = "true"
load_in_8bit = false
model_quantization_config = {torchao = {weight_dtype = "int4"}}
model_quantization_config_kwargs = {dequantize = false}
peft = {backend = "torchao", weight_dtype = "nf4"}
bnb_config_kwargs = {bnb_4bit_quant_type = "nf4", bnb_4bit_use_double_quant = true}
quantize_moe_experts = true
gptq = false
model_quantization_config = "Mxfp4Config"
[quantization]
backend = "mxfp4"
config_kwargs = {modules_to_not_convert = ["lm_head"], dequantize = false}
[adapter]
type = "qlora"
"""
UNREADABLE = (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What PyYAML raises for a text that is none, or for a value that is not what its tag says."""
TOML_PIECES = [
    *('"', "'", '"""', "'''", "[", "]", "[[", "]]", "{", "}", "=", ".", ",", "#", "\\", "\t"),
    *("\r", "\x00", "\x7f", "\u2028", "\ufeff", "[" * 500, "{a=" * 300, "9" * 5000),
    *("nan", "inf", "-inf", "1e999", "0x10", "1979-05-27", "1979-05-27T07:32:00Z", "07:32", "true", "é", "😀"),
    *("[quantization]\n", "[[data.train]]\n", "[data.train]\n", "a.b.c = 1\n", '"" = 1\n'),
    *(f"{line}\n" for line in LEGACY.splitlines()),
]  # fmt: skip
RECIPES = [
    (ROOT / "recipes" / "quickstart.toml").read_text(encoding="utf-8"),
    '[model]\nbase = "builtin:mini"\n[adapter]\n[[data.train]]\npath = "a.jsonl"\nformat = "chat"\n',
    *(
        f'{line}\n[model]\nbase = "x"\n[[data.train]]\npath = "a.jsonl"\nformat = "chat"\n'
        for line in LEGACY.splitlines()
    ),
]


def check_yaml(text: str) -> str:
    """Migrate a text and check all that must hold; returns which kind it was taken for."""
    migration = migrate(text, name="fuzz.yaml")
    report = migration.report
    json.dumps(report.as_dict(), allow_nan=False)
    if report.kind == "unreadable":
        assert report.entries == () and migration.document is None and migration.recipe is None
        assert [problem.code for problem in report.problems] == ["QT200"]
        assert not readable(text), f"unreadable for migrate: {report.problems[0].message}"
        return "unreadable"
    assert sorted(entry.key for entry in report.entries) == keys_of(yaml.safe_load(text))
    lines = text.count("\n") + text.count("\r") + text.count("\x85") + text.count("\u2028") + text.count("\u2029") + 1
    assert all(1 <= entry.line <= lines and entry.column >= 1 for entry in report.entries)
    for entry in report.entries:
        assert entry.note or entry.outcome not in ("dropped", "refused")
    if report.kind != "axolotl":
        assert migration.document is None and not report.ok
        return report.kind
    assert migration.recipe is not None and migration.document is not None
    assert repr(plain(tomli.loads(migration.recipe))) == repr(plain(migration.document))
    if report.ok:
        loaded(migration.recipe)
    return "axolotl, ok" if report.ok else "axolotl"


def readable(text: str) -> bool:
    """Whether PyYAML's own safe loader makes a mapping of a text that is within the limits."""
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        if not within_limits(node) or len(text.encode()) > LARGEST:
            return False
        read = yaml.safe_load(text)
        json.dumps(read, default=repr, ensure_ascii=False, skipkeys=True).encode()
        return isinstance(read, dict) and most_keys(read) <= MOST_KEYS
    except UNREADABLE:
        return False


def within_limits(root: Any, deepest: int = 100, most: int = 100_000) -> bool:
    """Whether nodes are neither nested too deeply nor too many, with every alias expanded; a cycle is too deep.

    Raises:
        ValueError: a text can't be written, or a number has too many digits.
    """
    count, waiting = 0, [(root, 1)]
    while waiting:
        node, depth = waiting.pop()
        count += 1
        if count > most or depth > deepest:
            return False
        if isinstance(node, yaml.ScalarNode):
            node.value.encode()
            if node.tag == "tag:yaml.org,2002:int":
                str(yaml.SafeLoader("").construct_yaml_int(node))
        elif isinstance(node, yaml.MappingNode):
            waiting += [(one, depth + 1) for pair in node.value for one in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(one, depth + 1) for one in node.value]
    return True


def most_keys(value: Any) -> int:
    """Keys of the largest mapping."""
    members = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return max([len(value) if isinstance(value, dict) else 0, *map(most_keys, members)])


def plain(value: Any) -> Any:
    """A document whose tables are ordered by key."""
    if isinstance(value, dict):
        return sorted((key, plain(member)) for key, member in value.items())
    return [plain(member) for member in value] if isinstance(value, list) else value


def loaded(text: str) -> None:
    """Load the text of a recipe as a file."""
    with tempfile.NamedTemporaryFile(suffix=".toml") as file:
        Path(file.name).write_bytes(text.encode("utf-8", "surrogatepass"))
        load_recipe(Path(file.name), options_of=registry.options_of, backends_with=registry.backends_with_option)


def check_toml(text: str) -> str:
    """Load a text as a recipe; returns whether it is one."""
    try:
        loaded(text)
    except RecipeError as error:
        assert error.problems and all(problem.message and problem.code for problem in error.problems)
        return "recipe refused"
    return "recipe"


def toml(chance: random.Random) -> str:
    """A mutated recipe."""
    return documents.mutated(chance.choice(RECIPES), chance, TOML_PIECES, RECIPES)


def fuzz(count: int, seed: int = 0, share_of_toml: float = 0.2) -> tuple[Counter[str], list[str]]:
    """Check so many documents; returns how many were what, and every failure as text."""
    found: Counter[str] = Counter()
    failures: list[str] = []
    for number in range(count):
        chance = random.Random(f"{seed} {number}")
        is_toml = chance.random() < share_of_toml
        text = toml(chance) if is_toml else documents.text(chance)
        try:
            found[(check_toml if is_toml else check_yaml)(text)] += 1
        except Exception:  # whatever it is, it is what is looked for
            failures.append(f"document {seed} {number}\n{text[:2000]!r}\n{traceback.format_exc(limit=-6)}")
    return found, failures


def main() -> int:
    """Run from the command line; prints what was found, and fails when anything did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    start = time.perf_counter()
    found, failures = fuzz(given.count, given.seed)
    for failure in failures[:20]:
        print(failure)
    kinds = ", ".join(f"{count} {kind}" for kind, count in found.most_common())
    print(f"{given.count} documents in {time.perf_counter() - start:.0f} s: {kinds}; {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
