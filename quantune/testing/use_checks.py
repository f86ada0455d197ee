"""Checks of use: layers, merging, adopting, saving, and two ranks over the format."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from quantune.backends.backend import adopt_weight
from quantune.backends.layout import PackedWeight
from quantune.errors import QuantizationError
from quantune.quantized.linear import PackedLoraLinear
from quantune.testing.case import Subject
from quantune.testing.failing import expecting_no_error, fail, require
from quantune.testing.ranks import Job, TwoRanks, train
from quantune.testing.weights import DTYPES, same_bits

TOLERANCE = 1e-4
EXPERTS = 3


class UseChecks:
    """What training does with packed weights works over this format."""

    two_ranks: ClassVar[bool] = True
    """False leaves out training on two ranks, the one check that takes seconds."""

    def test_a_layer_equals_a_dense_one_on_the_dequantized_weight(self, subject: Subject) -> None:
        packed = subject.pack(subject.weight())
        layer, dense = subject.layer(packed, bias=True), _dense(subject, packed)
        x = _random(subject, 5, packed.layout.shape[1]).requires_grad_()
        y = x.detach().clone().requires_grad_()
        upstream = _random(subject, 5, packed.layout.shape[0], seed=1)
        with expecting_no_error("forward and backward of a layer over the packed weight"):
            output = layer(x)
            (output * upstream).sum().backward()
        expected = dense(y)
        (expected * upstream).sum().backward()
        _require_close(output, expected, "the output of a layer")
        _require_close(x.grad, y.grad, "the gradient of a layer's input")

    def test_a_low_rank_update_trains_as_over_a_dense_weight(self, subject: Subject) -> None:
        packed = subject.pack(subject.weight())
        layer, dense = subject.layer(packed), _dense(subject, packed)
        out_features, in_features = packed.layout.shape
        x = _random(subject, 5, in_features).requires_grad_()
        lora_A = _random(subject, 4, in_features, seed=1).requires_grad_()
        lora_B = _random(subject, out_features, 4, seed=2).requires_grad_()
        upstream = _random(subject, 5, out_features, seed=3)
        with expecting_no_error("forward and backward of LoRA over the packed weight"):
            fused = PackedLoraLinear.apply(x, layer.weight, None, lora_A, lora_B, 2.0, layer.weight_format)
            found = torch.autograd.grad((fused * upstream).sum(), [x, lora_A, lora_B])
        plain = functional.linear(x, dense.weight) + functional.linear(functional.linear(x, lora_A), lora_B) * 2.0
        expected = torch.autograd.grad((plain * upstream).sum(), [x, lora_A, lora_B])
        for what, one, other in zip(("input", "lora_A", "lora_B"), found, expected, strict=True):
            _require_close(one, other, f"the gradient of {what} with LoRA")

    def test_merging_adds_in_fp32_and_rounds_once(self, subject: Subject) -> None:
        packed = subject.pack(subject.weight(dtype=torch.bfloat16))
        before, delta = packed.data.clone(), _random(subject, *subject.shape) * 0.01
        exact = subject.dequantize(packed).clone() + delta
        for dtype in DTYPES:
            given = delta.clone()
            with expecting_no_error(f"merge to {dtype}"):
                merged = subject.backend.merge(packed, given, dtype)
            require(
                same_bits(merged, exact.to(dtype)),
                f"merge to {dtype} must be the dequantized weight plus delta, added in fp32 and rounded once; found "
                f"{_differences(merged, exact.to(dtype))}. Leave merge out: the default does it",
            )
            require(
                torch.equal(packed.data, before) and torch.equal(given, delta),
                "merge changed the packed bytes or the delta; it must return a new tensor",
            )

    def test_merging_nothing_changes_nothing(self, subject: Subject) -> None:
        packed = subject.pack(subject.weight())
        expected = subject.dequantize(packed).clone()
        for delta_dtype in DTYPES:
            with expecting_no_error(f"merge of a delta in {delta_dtype}"):
                delta = torch.zeros(subject.shape, dtype=delta_dtype, device=subject.device)
                merged = subject.backend.merge(packed, delta, torch.float32)
            require(
                same_bits(merged, expected),
                "merging a delta of zeros must give the dequantized weight itself; do not quantize again",
            )

    def test_exported_tensors_are_adopted_bit_for_bit(self, subject: Subject) -> None:
        for shape in subject.case.shapes:
            for dtype in DTYPES:
                packed = subject.pack(subject.weight(shape, dtype))
                with expecting_no_error("export"):
                    exported = _copies(subject.backend.export(packed))
                with expecting_no_error("adopt of the tensors of export", "adopt is the inverse of export."):
                    adopted = adopt_weight(subject.backend, exported, shape, dtype, subject.options)
                require(
                    torch.equal(adopted.data, packed.data),
                    "adopt of the tensors of export gave other bytes; adopting takes a weight over bit for bit",
                )

    def test_tensors_that_do_not_fit_are_refused(self, subject: Subject) -> None:
        packed = subject.pack(subject.weight())
        exported = _copies(subject.backend.export(packed))
        for name, tensor in exported.items():
            for what, tensors in (
                (f"without {name!r}", {key: value for key, value in exported.items() if key != name}),
                (f"with {name!r} in {_other(tensor).dtype}", {**exported, name: _other(tensor)}),
                (f"with {name!r} one longer", {**exported, name: torch.cat([tensor.view(-1), tensor.view(-1)[:1]])}),
            ):
                remedy = "adopt must raise a QuantizationError that says what was expected and found"
                try:
                    adopt_weight(subject.backend, tensors, subject.shape, torch.float32, subject.options)
                except QuantizationError:
                    continue
                except Exception as error:
                    fail(f"adopting the tensors of export {what} raised {type(error).__name__}: {error}; {remedy}")
                fail(f"the tensors of export {what} were adopted; {remedy}")

    def test_checkpoints_that_are_adopted_have_names_for_what_is_exported(self, subject: Subject) -> None:
        if not subject.case.description.adopts:
            pytest.skip("adopts no checkpoints")
        exported = subject.backend.export(subject.pack(subject.weight()))
        with expecting_no_error("stored_names('weight', options)"):
            names = subject.backend.stored_names("weight", subject.options)
        if not names:
            pytest.skip("no checkpoint holds this format")
        require(
            names.keys() >= exported.keys() and len(set(names.values())) == len(names),
            f"stored_names must name every tensor of export, {sorted(exported)}, each differently; found {dict(names)}",
        )
        with expecting_no_error("checkpoint_problem({})", "It says in a sentence what does not fit, or None."):
            problem = subject.options.checkpoint_problem({})
        require(
            problem is None or isinstance(problem, str),
            f"checkpoint_problem must return a sentence or None, found {problem!r}",
        )

    def test_rows_that_are_stacked_packed_mean_the_weights_stacked(self, subject: Subject) -> None:
        if not subject.case.description.adopts:
            pytest.skip("adopts no checkpoints")
        parts = [subject.pack(subject.weight(seed=seed)) for seed in range(2)]
        exported = [subject.backend.export(part) for part in parts]
        shape = (2 * subject.shape[0], subject.shape[1])
        try:
            stacked = subject.backend.stack_rows(exported, subject.options)
        except QuantizationError:
            return  # a format may refuse, where stacked rows would be no weight of it
        adopted = adopt_weight(subject.backend, stacked, shape, torch.float32, subject.options)
        expected = torch.cat([subject.dequantize(part) for part in parts])
        require(
            same_bits(subject.dequantize(adopted), expected),
            "stack_rows of two weights means something else than the two weights one above the other",
        )

    def test_experts_of_a_stack_are_packed_as_if_alone(self, subject: Subject) -> None:
        alone = [subject.weight(seed=seed) for seed in range(EXPERTS)]
        stack = torch.stack(alone)
        rows = torch.stack([subject.pack(expert).data for expert in stack])
        for index, expert in enumerate(alone):
            packed = subject.pack(expert)
            require(
                torch.equal(rows[index], packed.data),
                "an expert of a stack has other bytes than the same weight alone; pack must look at nothing else",
            )
            found = subject.dequantize(PackedWeight(packed.layout, rows[index]))
            require(
                same_bits(found, subject.dequantize(packed)),
                "an expert in a stack of packed bytes dequantizes to other values than alone; use packed.views()",
            )

    def test_saved_bytes_mean_the_same_after_loading(self, subject: Subject, tmp_path: Path) -> None:
        packed = subject.pack(subject.weight())
        save_file({"weight": packed.data.cpu()}, tmp_path / "packed.safetensors")
        data = load_file(tmp_path / "packed.safetensors")["weight"].to(subject.device)
        layout = subject.layout(subject.shape)
        require(
            layout == packed.layout and hash(layout) == hash(packed.layout),
            "the layout planned a second time differs from the first; it must depend on shape and options alone",
        )
        found = subject.dequantize(PackedWeight(layout, data))
        require(
            same_bits(found, subject.dequantize(packed)),
            "bytes that were saved and loaded dequantize to other values; everything must be in the inner tensors",
        )

    def test_a_layer_resumes_from_its_state(self, subject: Subject) -> None:
        saved = subject.layer(subject.pack(subject.weight()), bias=True)
        resumed = subject.layer(subject.pack(subject.weight(seed=1)), bias=True)
        x = _random(subject, 5, subject.shape[1])
        with torch.no_grad():
            resumed(x)
            resumed.load_state_dict(saved.state_dict())
            require(
                same_bits(resumed(x), saved(x)),
                "a layer that loaded another one's state computes something else; nothing may be remembered of the "
                "bytes that were there before",
            )

    def test_two_ranks_train_as_one_process(self, subject: Subject, ranks: TwoRanks) -> None:
        if not self.two_ranks:
            pytest.skip("two_ranks = False")
        if "cpu" not in subject.devices:
            pytest.skip("the backend does not run on a CPU, where two ranks are tried")
        job = Job(backend=subject.backend, options=subject.options, shape=subject.shape)
        remedy = "Define the classes of the backend and its options at the top level of an importable module."
        with expecting_no_error("pickling the backend for another process", remedy):
            pickled = pickle.dumps(job)
        with expecting_no_error("training in one process"):
            expected = train(job)
        with expecting_no_error("training on two ranks under FSDP2"):
            found = ranks.run(pickled)
        for rank, losses in enumerate(found):
            near = all(abs(one - other) <= TOLERANCE * abs(other) for one, other in zip(losses, expected, strict=True))
            require(
                near,
                f"rank {rank} of 2 trained with losses {losses}, one process with {expected}; dequantize must depend "
                "on the gathered bytes alone",
            )

    @pytest.fixture(scope="class")
    @classmethod
    def ranks(cls) -> Iterator[TwoRanks]:
        """Two processes, started when they are first needed."""
        with TwoRanks() as ranks:
            yield ranks


def _random(subject: Subject, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randn(shape, generator=generator).to(subject.device)


def _dense(subject: Subject, packed: PackedWeight) -> nn.Linear:
    """An ordinary linear layer on the dequantized weight."""
    out_features, in_features = packed.layout.shape
    dense = nn.Linear(in_features, out_features, device=subject.device)
    dense.weight = nn.Parameter(subject.dequantize(packed).clone(), requires_grad=False)
    dense.bias = nn.Parameter(torch.zeros(out_features, device=subject.device), requires_grad=False)
    return dense


def _require_close(found: Tensor | None, expected: Tensor | None, what: str) -> None:
    assert expected is not None
    near = found is not None and torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    require(
        near,
        f"{what} differs from that of a dense layer on the dequantized weight; dequantize must give the same "
        "values every time, with out and without",
    )


def _differences(found: Tensor, expected: Tensor) -> str:
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return f"{found.dtype} of shape {tuple(found.shape)}"
    return f"{int((found != expected).sum())} of {expected.numel()} values that differ"


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as a checkpoint would hold them: in memory of their own."""
    return {name: tensor.clone().contiguous() for name, tensor in tensors.items()}


def _other(tensor: Tensor) -> Tensor:
    """The tensor in a dtype of another kind."""
    return tensor.float().to(torch.int32) if tensor.is_floating_point() else tensor.float()
