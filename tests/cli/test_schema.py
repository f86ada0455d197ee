"""`quantune schema`, among plugins of every kind."""

from __future__ import annotations

import json

from commands import quantune_command, refused
from plugin_packages import install

OPTIONS = '''
import attrs
from typing import Literal
from quantune.backends.description import BackendDescription, Probe

@attrs.frozen(kw_only=True)
class Options:
    """Options of mine."""

    bits: Literal[2, 3]
    """Bits of a code."""
    steps: int = attrs.field(default={default}, validator=attrs.validators.ge(0))

def description_of(name):
    return BackendDescription(
        name=name, summary="", weight_dtypes=(), options=Options, probe=lambda: Probe(available=True), load=lambda: 0
    )

mine = description_of("mine")
'''


def branches(done):
    assert done.returncode == 0, done.stderr
    definitions = json.loads(done.stdout)["definitions"]
    prefix = "quantization."
    return {name.removeprefix(prefix): node for name, node in definitions.items() if name.startswith(prefix)}


def test_the_options_of_an_installed_plugin_are_in_the_schema(tmp_path):
    folder = install(tmp_path, "plugin", {"mine": "plugin:mine"}, OPTIONS.replace("{default}", "5"))
    done = quantune_command("schema", PYTHONPATH=folder)
    mine = branches(done)["mine"]
    assert done.stderr == "" and mine["required"] == ["backend", "bits"]
    assert mine["properties"]["bits"] == {"enum": [2, 3], "description": "Bits of a code."}
    assert mine["properties"]["steps"] == {"type": "integer", "default": 5}
    assert "skip" in mine["properties"]


def test_a_plugin_that_can_not_be_described_is_left_out_with_a_warning(tmp_path):
    install(tmp_path, "broken", {"broken": "broken:description"}, "raise RuntimeError('no')")
    folder = install(tmp_path, "plugin", {"mine": "plugin:mine"}, OPTIONS.replace("{default}", "float('nan')"))
    done = quantune_command("schema", PYTHONPATH=folder)
    assert set(branches(done)) == {"bnb", "torchao", "mxfp4", "fp8"}
    assert 'warning: left out of the schema: backend "broken" of package broken' in done.stderr
    assert 'warning: left out of the schema: the options of backend "mine" can\'t be read: ValueError' in done.stderr


def test_the_schema_is_written_to_a_file(tmp_path):
    done = quantune_command("schema", "-o", str(tmp_path / "recipe.schema.json"))
    assert done.returncode == 0 and done.stdout == ""
    assert json.loads((tmp_path / "recipe.schema.json").read_text())["title"] == "A recipe of quantune"


def test_a_schema_that_can_not_be_written_names_the_file(tmp_path):
    assert f"found the folder {tmp_path}" in refused("schema", "-o", str(tmp_path))
    assert f"{tmp_path / 'no' / 'x.json'} can't be written" in refused("schema", "-o", str(tmp_path / "no" / "x.json"))
