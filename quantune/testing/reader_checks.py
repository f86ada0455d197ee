"""Checks of the reader: what a checkpoint says of packed weights, for backends whose format another library reads."""

from __future__ import annotations

import json

import pytest
import torch

from quantune.backends.layout import PackedWeight
from quantune.backends.readers import Reader
from quantune.errors import QuantizationError
from quantune.testing.case import Subject
from quantune.testing.failing import expecting_no_error, require

MODULE = "model.layers.0.mlp.up_proj"
KEPT = "model.layers.0.mlp.gate"


class ReaderChecks:
    """A checkpoint holds the weights bit for bit, and says what they are."""

    def test_a_checkpoint_for_its_reader_holds_what_is_exported(self, subject: Subject) -> None:
        reader = _reader(subject)
        packed = subject.pack(subject.weight())
        with expecting_no_error("export"):
            exported = list(subject.backend.export(packed).values())
        with expecting_no_error("the reader's tensors()"):
            stored = reader.tensors(f"{MODULE}.weight", packed)
            empty = PackedWeight(packed.layout, torch.zeros_like(packed.data))
            before = reader.tensors(f"{MODULE}.weight", empty)
        strange = [name for name in stored if not name.startswith(f"{MODULE}.")]
        require(
            not strange, f"the reader stores {MODULE}.weight as {strange}; names must begin with the module's and a dot"
        )
        lost = [tensor for tensor in exported if not any(_same(tensor, one) for one in stored.values())]
        require(
            not lost and len(stored) == len(exported),
            f"the reader stores {len(stored)} tensors for a weight, of which {len(exported) - len(lost)} are those of "
            f"export, which has {len(exported)}; tensors() must name each of them and change none",
        )
        require(
            before.keys() == stored.keys(),
            f"the reader stores {sorted(stored)} for one weight and {sorted(before)} for another of its layout; names "
            "must depend on the layout alone, because they are planned before weights are read",
        )

    def test_a_checkpoint_says_what_its_weights_are(self, subject: Subject) -> None:
        reader = _reader(subject)
        layout = subject.layout(subject.shape, torch.bfloat16)
        with expecting_no_error("the reader's quantization_config()"):
            config = json.loads(json.dumps(reader.quantization_config((KEPT,), torch.bfloat16)))
        require(
            isinstance(config.get("quant_method"), str),
            f"quantization_config must name its quant_method, by which the library finds the reader; found {config}",
        )
        require(
            KEPT in json.dumps(config),
            f"quantization_config does not mention {KEPT}, which is not packed; the library would take it to be",
        )
        with expecting_no_error("the reader's metadata()"):
            metadata = reader.metadata({f"{MODULE}.weight": layout}, ["lm_head.weight"])
        require(
            all(isinstance(part, str) for pair in metadata.items() for part in pair),
            f"metadata must be strings by strings, which is all that safetensors stores; found {metadata}",
        )


def _reader(subject: Subject) -> Reader:
    """The reader of the format; skips where there is none."""
    with expecting_no_error("reader", "Without a reader it must raise a QuantizationError that says so."):
        try:
            return subject.backend.reader(subject.options)
        except QuantizationError as error:
            require(bool(str(error)), "the QuantizationError of reader is empty; say which format has a reader")
            pytest.skip(f"no library reads its checkpoints: {error}")


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and torch.equal(_bytes(one), _bytes(other))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().contiguous().view(-1).view(torch.uint8)
