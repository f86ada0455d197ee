"""The files of a checkpoint beside its weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantune.checkpoint.commit import write_file_atomically
from quantune.streaming.source import WEIGHTS

REPORT = "quantize.json"
"""How a folder was quantized, and what came of it."""
COPIED = (
    *("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"),
    *("*.model", "*.tiktoken", "chat_template*", "additional_chat_templates", "*processor_config.json", "*.py"),
    *("LICENSE*", "USE_POLICY*"),
)
"""What is taken along: tokenizer, chat templates, generation config, the model's own code, and its license."""


def copy_beside(source: Path, target: Path) -> None:
    """Copy what lies beside the weights of a checkpoint, its `config.json` left out.

    Raises:
        OSError: a file can't be read or written.
    """
    code = "auto_map" in json.loads((source / "config.json").read_text(encoding="utf-8"))
    for path in sorted(source.iterdir()):
        taken = any(path.match(pattern) for pattern in COPIED) and not any(path.match(pattern) for pattern in WEIGHTS)
        if not taken or (path.suffix == ".py" and not code):
            continue
        if path.is_dir():
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, target / path.name)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    write_file_atomically(path, json.dumps(document, indent=2, default=str) + "\n")
