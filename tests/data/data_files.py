"""Small data files, and the datasets made of them."""

import json

from quantune.data.dataset import build
from quantune.recipe.schema import DataConfig, SourceConfig


def source(path, format="completion", **more):
    return SourceConfig(path=str(path), format=format, **more)


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def dataset(tmp_path, tokenizer, rows, config=None, format="chat", **more):
    path = write(tmp_path / "d.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    found = source(path, format, **more)
    return build([found], DataConfig(train=(found,), **(config or {})), tokenizer)


def chat(question, answer):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}
