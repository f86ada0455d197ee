"""`quantune migrate` as a person runs it: what it writes, says and exits with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands import ROOT, quantune_command, refused
from test_migrate_rules import BASE

from quantune.recipe.migrate.reference import render

GOOD = {**BASE, "base_model": "builtin:mini", "datasets": [{"path": "train.jsonl", "type": "chat_template"}]}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    return tmp_path


def write(folder, changes=None, name="old.yaml"):
    path = folder / name
    path.write_text(yaml.safe_dump({**GOOD, **(changes or {})}, sort_keys=False))
    return path


def test_the_recipe_stands_beside_the_yaml_and_checks(folder):
    path = write(folder)
    done = quantune_command("migrate", str(path), cwd=folder)
    assert (done.returncode, done.stdout) == (0, f"{folder / 'old.toml'}\n"), done.stderr
    assert f"{path}:1:1 translated base_model -> model.base" in done.stderr
    assert done.stderr.splitlines()[-1] == f"{path}: 10 translated"
    assert quantune_command("check", str(folder / "old.toml")).returncode == 0


def test_an_unknown_key_is_named_and_nothing_is_written(folder):
    path = write(folder, {"lora_rank": 8})
    said = refused("migrate", str(path))
    assert 'unrecognised lora_rank: did you mean "lora_r"?' in said
    assert not (folder / "old.toml").exists()


def test_force_writes_what_can_be_said_and_lists_the_rest_at_its_head(folder):
    path = write(folder, {"lora_rank": 8, "rl": "dpo"})
    done = quantune_command("migrate", str(path), "--force", cwd=folder)
    assert done.returncode == 2
    head = (folder / "old.toml").read_text().partition("[model]")[0]
    assert "# - lora_rank: not a known key" in head and "# - rl: quantune learns from answers" in head
    assert quantune_command("check", str(folder / "old.toml")).returncode == 0


def test_check_only_reports(folder):
    done = quantune_command("migrate", str(write(folder)), "--check")
    assert done.returncode == 0 and done.stdout == ""
    assert not (folder / "old.toml").exists()


def test_a_recipe_that_is_there_is_kept_unless_it_may_be_replaced(folder):
    path = write(folder)
    (folder / "old.toml").write_text("mine")
    said = refused("migrate", str(path))
    assert "old.toml is there already; --overwrite replaces it" in said
    assert (folder / "old.toml").read_text() == "mine"
    assert quantune_command("migrate", str(path), "--overwrite").returncode == 0
    assert "[model]" in (folder / "old.toml").read_text()


def test_the_report_holds_every_key_as_json(folder):
    path = write(folder, {"wandb_project": "x", "seed": 42})
    out = folder / "new.toml"
    done = quantune_command("migrate", str(path), "-o", str(out), "--report", str(folder / "report.json"))
    assert done.returncode == 0, done.stderr
    (report,) = json.loads((folder / "report.json").read_text())["files"]
    assert (report["file"], report["ok"], report["kind"]) == (str(path), True, "axolotl")
    assert report["written"] == str(out)
    outcomes = {entry["key"]: entry["outcome"] for entry in report["entries"]}
    assert outcomes["wandb_project"] == "dropped" and outcomes["seed"] == "default"
    assert len(outcomes) == len(report["entries"]) == sum(report["counts"].values())


def test_a_folder_is_translated_with_a_summary(folder):
    inside = folder / "configs" / "deeper"
    inside.mkdir(parents=True)
    write(inside, name="a.yml")
    write(inside.parent, {"lora_rank": 8}, name="b.yaml")
    (inside / "c.yaml").write_text("finetuning_type: lora\n")
    done = quantune_command("migrate", str(folder / "configs"))
    assert done.returncode == 2
    assert (inside / "a.toml").exists() and not (inside.parent / "b.toml").exists()
    *summary, last = done.stderr.splitlines()[-4:]
    assert [" ".join(line.split()[1:]) for line in summary] == [
        "axolotl 10 translated, 1 unrecognised",
        "axolotl 10 translated",
        "llamafactory 1 refused, 1 problem",
    ]
    assert last.startswith("nothing is written for a YAML with such problems; --force writes what can be")


def test_what_a_person_has_to_look_at_comes_last(folder):
    path = write(folder, {"rl": "dpo", "seed": 1})
    *_, entry, counts, way_out = quantune_command("migrate", str(path)).stderr.splitlines()
    assert "refused rl: " in entry and counts == f"{path}: 11 translated, 1 refused" and "--force" in way_out
    assert "--force" not in quantune_command("migrate", str(path), "--check").stderr


def test_what_is_wrong_with_the_whole_yaml_is_said_once(folder):
    (folder / "other.yaml").write_text("stage: sft\nfinetuning_type: lora\n")
    said = refused("migrate", str(folder / "other.yaml"))
    assert said.count("this is a YAML of LlamaFactory") == 1 and said.endswith("other.yaml: 2 refused, 1 problem\n")


@pytest.mark.parametrize("output", [(), ("-o", "there/r.toml")])
def test_a_recipe_that_stands_elsewhere_checks(folder, output):
    for name in ("cfg", "there"):
        (folder / name).mkdir()
    write(folder / "cfg", {"datasets": [{"path": "./train.jsonl", "type": "chat_template"}]})
    done = quantune_command("migrate", "cfg/old.yaml", *output, cwd=folder)
    written = folder / done.stdout.strip()
    assert done.returncode == 0 and 'path = "../train.jsonl"' in written.read_text()
    assert quantune_command("check", str(written)).returncode == 0


def test_a_file_that_can_not_be_read_or_written_stops_no_other(folder):
    (folder / "a.yaml").write_bytes(b"base_model: \xe9\n")
    (folder / "b.toml").mkdir()
    for name in ("b.yaml", "c.yaml"):
        write(folder, name=name)
    report = folder / "report.json"
    done = quantune_command("migrate", ".", "--overwrite", "--report", str(report), cwd=folder)
    assert (done.returncode, done.stdout) == (2, "c.toml\n"), done.stderr
    assert "a.yaml  unreadable    1 problem" in done.stderr
    assert "expected UTF-8 text, found other bytes at position 12  QT200" in done.stderr
    first, second, third = json.loads(report.read_text())["files"]
    assert (first["kind"], first["ok"], first["written"]) == ("unreadable", False, None)
    assert second["not_written"].startswith("b.toml can't be written: ") and third["written"] == "c.toml"
    assert sorted(path.name for path in folder.glob(".*")) == []


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["a.yaml", "-o", "a.yaml", "--overwrite"], "a.yaml can't be both the YAML a.yaml and the recipe of a.yaml"),
        (["a.yaml", "--check", "--report", "./a.yaml"], "a.yaml can't be both the YAML a.yaml and the report"),
        (["a.yaml", "--report", "a.toml"], "a.toml can't be both the recipe of a.yaml and the report"),
        (["a.yaml", "a.yml"], "a.toml can't be both the recipe of a.yaml and the recipe of a.yml"),
        (["a.toml", "--overwrite"], "a.toml can't be both the YAML a.toml and the recipe of a.toml"),
    ],
)
def test_nothing_is_written_over_a_yaml_or_twice_to_one_place(folder, arguments, part):
    for name in {argument for argument in arguments[:2] if argument.startswith("a.")}:
        write(folder, name=name)
    before = {path: path.read_text() for path in folder.iterdir()}
    assert part in refused("migrate", *arguments, cwd=folder)
    assert {path: path.read_text() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["nothing.yaml"], "there is no file nothing.yaml"),
        (["{folder}"], "expected YAML files in"),
        (["{folder}/a.yaml", "{folder}/b.yaml", "-o", "x.toml"], "--output names the recipe of one file"),
        (["{folder}/latin.yaml"], "expected UTF-8 text"),
    ],
)
def test_what_can_not_be_read_is_said_in_a_sentence(tmp_path, arguments, part):
    if len(arguments) > 2:
        write(tmp_path, name="a.yaml")
        write(tmp_path, name="b.yaml")
    if "latin" in arguments[0]:
        (tmp_path / "latin.yaml").write_bytes(b"base_model: \xe9\n")
    assert part in refused("migrate", *(argument.format(folder=tmp_path) for argument in arguments))


def test_a_yaml_that_is_none_is_reported_with_its_place(tmp_path):
    path = tmp_path / "old.yaml"
    path.write_text("a: 1\nb: [1\n")
    assert f"{path}:3:1" in refused("migrate", str(path))


def test_migrate_imports_neither_torch_nor_transformers(folder):
    script = (
        "import sys, quantune.cli\n"
        f"sys.argv = ['quantune', 'migrate', {str(write(folder))!r}]\n"
        "try:\n    quantune.cli.main()\n"
        "except SystemExit:\n    pass\n"
        "print(sorted({'torch', 'transformers', 'bitsandbytes', 'peft', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_the_page_in_docs_is_up_to_date():
    assert (Path(ROOT) / "docs" / "migrate.md").read_text() == render(), "run `make docs`"
