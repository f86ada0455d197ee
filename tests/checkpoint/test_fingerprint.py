"""What a run was made of, and how it is said to have changed."""

import json
import subprocess
import sys

import pytest

from quantune.checkpoint.fingerprint import differences, environment, hash_files


def test_only_listed_variables_of_the_environment_are_written(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    text = json.dumps(environment())
    assert json.loads(text)["variables"]["RANK"] == "3"
    assert "secret" not in text


def test_versions_are_read_without_importing_anything_heavy():
    code = (
        "import sys; from quantune.checkpoint import commit, fingerprint, metrics_log, run_folder, store; "
        "assert fingerprint.environment()['versions']['torch']; "
        "assert not {'torch', 'numpy', 'transformers', 'bitsandbytes'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_files_are_hashed_by_name(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert hash_files([tmp_path / "a"]) == {"a": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}


def test_two_files_of_one_name_are_refused(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a").write_bytes(b"")
    with pytest.raises(ValueError, match="found two called a"):
        hash_files(tmp_path.glob("*/a"))


def test_what_differs_is_said_in_sentences():
    saved = {"versions": {"torch": "2.12", "peft": "0.20"}, "cpus": 8, "variables": {"RANK": "0"}}
    now = {"versions": {"torch": "2.13", "peft": "0.20"}, "cpus": 8, "variables": {}, "device": "cpu"}
    assert differences(saved, now) == [
        "device was not there, is cpu",
        "variables.RANK was 0, is not there now",
        "versions.torch was 2.12, is 2.13",
    ]
    assert differences(saved, saved) == []


def test_a_long_value_is_cut():
    assert len(differences({"a": "x" * 500}, {"a": "y" * 500})[0]) < 200
