"""docs/migrate.md, generated from the table of rules: every key with what becomes of it."""

from __future__ import annotations

from quantune.recipe.migrate.datasets import PARTS
from quantune.recipe.migrate.rule import Rule
from quantune.recipe.migrate.table import GROUPS

INTRODUCTION = """\
# Migrating

    quantune migrate old.yaml                  write old.toml beside it
    quantune migrate old.yaml -o recipe.toml   write it elsewhere
    quantune migrate configs/ --check          report only, for every YAML in a folder
    quantune migrate old.yaml --report r.json  the report as JSON as well

reads an axolotl-style YAML and writes a recipe with comments: what each value was called, what was left out and why,
what does not mean exactly the same. The recipe passes `quantune check`.

Every key of the YAML has exactly one outcome in the report. Of one file it goes to standard error, whole; of several
only what was refused, unrecognised or changed does, and `--report` has all of it:

| outcome | what it means |
|---|---|
| translated | the recipe says it; `changed` where the meaning is not exactly the same, with how |
| default | it says what quantune does anyway, or is null |
| dropped | a recipe needs none of it, with the reason |
| refused | quantune can't do it, with the way out |
| unrecognised | no such key is known, with what was probably meant |

A refused or unrecognised key, one that stands twice, or something that is missing (an adapter, targets), makes the exit
code 2 and nothing is written. `--force` writes the recipe without it, and lists it at the head.

- **YAML** is read as PyYAML's safe loader reads it: `2e-5` is text there and becomes a number, `no` is false, `1:30` is
  90. A key that stands twice is reported. At most 1 MiB, 100 levels, 100,000 values with every alias expanded; no tags
  that make objects.
- **Batches** are counted for every process there: `batch_size = micro_batch_size x gradient_accumulation_steps x
  processes`. Give `--processes 8` if it ran on eight GPUs.
- **Defaults** that differ are written out: 512 tokens, rank 8, a warm-up of 3 %, a checkpoint an epoch.
- **Paths** of what is read are relative to the recipe's folder here and to the current directory there. Where the two
  differ they are rewritten, so run it where the YAML was run.
- YAMLs of LlamaFactory and torchtune are recognised and not translated as yet.

This page is generated from the rules in `quantune/recipe/migrate/`. A key of `test_datasets` is treated as that of
`datasets`; keys of `fsdp_config` may have the prefix `fsdp_`.
"""
OUTCOMES = {"translate": "translated", "drop": "dropped", "refuse": "refused"}


def render() -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, *(_group(title, rules) for title, rules in GROUPS.items())])


def _group(title: str, rules: tuple[Rule, ...]) -> str:
    lines = [f"## {title}", "", "| key | outcome | becomes, or why |", "|---|---|---|"]
    for rule in rules:
        keys = ", ".join(f"`{key}`" for key in rule.keys if not _is_twin(key))
        lines.append(f"| {keys} | {OUTCOMES[rule.treatment]} | {rule.meaning.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def _is_twin(key: str) -> bool:
    """Whether the introduction says already that the key is treated as another one."""
    return key.startswith((f"{list(PARTS)[1]}[]", "fsdp_config.fsdp_"))
