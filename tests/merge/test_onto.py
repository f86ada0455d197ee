"""Onto the original and onto packed weights; several adapters at once; what a merge says of itself."""

import shutil

import attrs
import pytest
import torch
from merge.conftest import CPU, TOKENS, Quiet, train
from merge.test_exact import answers
from safetensors.torch import load_file
from support import FORMATS, quantization
from transformers import AutoModelForCausalLM

from quantune.errors import InputError, ModelError, VerificationError
from quantune.merge.merge import merge
from quantune.merge.opening import open_merge
from quantune.merge.request import Setting, require_one_setting
from quantune.merge.trained import TrainedAdapter
from quantune.merge.trial import load_reference
from quantune.merge.updates import AdapterUpdate
from quantune.merge.ways import compare_ways
from quantune.model.base import open_base
from quantune.model.load import load_model
from quantune.recipe.schema import AdapterConfig, ModelConfig, QatConfig

NF4 = quantization(weight_dtype="nf4")


@pytest.mark.parametrize("options", [{}, {"init": "pissa"}, {"init": "loftq"}, {"use_dora": True, "init": "olora"}])
def test_original_is_the_unquantized_base_and_what_was_learned(options, bases, tmp_path):
    """An adapter that began with a share of the base gives back that share, not twice of it."""
    trained = train(bases["llama"], tmp_path / "adapter", NF4, **options)
    merged = load_file(trained.merge(tmp_path / "merged", onto="original") / "model.safetensors")
    base = load_file(bases["llama"] / "model.safetensors")
    exact = load_file(trained.merge(tmp_path / "exact") / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    # the learned part is the same in both: what differs is what packing lost, some percent of the weight
    lost = (merged[name] - exact[name]).norm() / base[name].float().norm()
    assert 0.01 < lost < 0.15
    assert torch.equal(merged["lm_head.weight"], base["lm_head.weight"].float())


READABLE = [name for name in FORMATS if name not in ("torchao nf4", "mxfp4")]
"""Formats of which some library reads linear layers."""


@pytest.mark.parametrize("name", READABLE)
def test_packed_is_the_sum_packed_again(name, bases, tmp_path):
    """To the bit what packing the exactly merged weights gives."""
    trained = train(
        bases["llama"], tmp_path / "adapter", quantization(**FORMATS[name]), targets=("q_proj", "down_proj")
    )
    packed = trained.merge(tmp_path / "packed", onto="packed")
    exact = trained.merge(tmp_path / "exact")
    base = open_base(ModelConfig(base=str(packed)))
    found = load_model(base, base.quantization, compute_dtype=torch.float32, device=CPU)
    dense = open_base(ModelConfig(base=str(exact)), quantization(**FORMATS[name]))
    adapted = load_model(dense, dense.quantization, compute_dtype=torch.float32, device=CPU)
    alone = load_model(
        open_base(ModelConfig(base=str(bases["llama"]))),
        quantization(**FORMATS[name]),
        compute_dtype=torch.float32,
        device=CPU,
    )
    for layer in ("q_proj", "k_proj"):
        expected = adapted if layer == "q_proj" else alone  # what nobody adapted keeps the bytes it was trained with
        path = f"model.layers.0.self_attn.{layer}"
        assert torch.equal(found.get_submodule(path).dequantize(), expected.get_submodule(path).dequantize())


def test_packed_base_stays_in_its_format(bases, tmp_path):
    """What the adapter did not touch has the very bytes of the base."""
    trained = train(
        bases["gpt_oss_mxfp4"],
        tmp_path / "adapter",
        targets=("o_proj",),
        target_parameters=("mlp.experts.down_proj",),
    )
    merged = trained.merge(tmp_path / "merged", onto="packed", dtype=None)
    before, after = (load_file(folder / "model.safetensors") for folder in (bases["gpt_oss_mxfp4"], merged))
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))}
    assert {name for name in before if "gate" in name or "embed" in name} <= same
    assert any("down_proj" in name for name in before.keys() - same)


@pytest.mark.parametrize("name, reason", [("torchao nf4", "bnb"), ("mxfp4", "read for the experts of gpt-oss only")])
def test_format_without_a_reader_is_refused(name, reason, bases, tmp_path):
    trained = train(bases["llama"], tmp_path / "adapter", quantization(**FORMATS[name]))
    with pytest.raises(InputError, match=f"--onto packed: .*{reason}.*--onto dequantized"):
        trained.merge(tmp_path / "merged", onto="packed")
    assert not list(tmp_path.glob("merged*"))


def test_several_adapters_are_added_up(bases, tmp_path):
    first = train(bases["llama"], tmp_path / "first", NF4)
    second = train(bases["llama"], tmp_path / "second", NF4, r=2, targets=("q_proj", "lm_head"))
    adapters = tuple(
        TrainedAdapter(folder=one.folder, recipe=None, fingerprints={}, run=None) for one in (first, second)
    )
    request = attrs.evolve(first.request(tmp_path / "merged"), adapters=adapters, weights=(0.7, -0.3))
    merge(request, CPU, Quiet())
    reference = load_reference(open_merge(request, CPU, Quiet()), request)
    with torch.no_grad():
        expected = reference(TOKENS).logits
    torch.testing.assert_close(answers(tmp_path / "merged"), expected, rtol=1e-4, atol=1e-4)
    assert (expected - first.logits).abs().max() > 0.01


@pytest.mark.parametrize(
    "options, named", [({"use_dora": True}, "use_dora"), ({"modules_to_save": ("lm_head",)}, "modules_to_save")]
)
def test_only_plain_adapters_can_be_added_up(options, named, bases, tmp_path):
    first = train(bases["llama"], tmp_path / "first", NF4)
    other = train(bases["llama"], tmp_path / "other", NF4, **options)
    adapters = tuple(
        TrainedAdapter(folder=one.folder, recipe=None, fingerprints={}, run=None) for one in (first, other)
    )
    with pytest.raises(ModelError, match=f"plain LoRA, and the one in .*other has {named}"):
        merge(attrs.evolve(first.request(tmp_path / "merged"), adapters=adapters, weights=(1.0, 1.0)), CPU, Quiet())


@pytest.mark.parametrize("onto", ["dequantized", "original", "packed"])
def test_merged_model_is_tried(onto, tmp_path):
    trained = train("builtin:mini", tmp_path / "adapter", NF4)
    result = merge(trained.request(tmp_path / "merged", onto=onto, dtype=None, verify=True), CPU, Quiet())
    found = result.verification
    assert found.found.tokens > 500
    assert found.passed == (onto == "dequantized")


def test_wrong_merge_is_not_published(tmp_path, monkeypatch):
    trained = train("builtin:mini", tmp_path / "adapter", NF4)
    monkeypatch.setattr(AdapterUpdate, "apply", lambda self, name, weight, expert=None: weight)
    with pytest.raises(VerificationError, match="does not answer as base \\+ adapter do"):
        merge(trained.request(tmp_path / "merged", verify=True), CPU, Quiet())
    assert not list(tmp_path.glob("merged*"))


@pytest.mark.parametrize("options", [{"init": "pissa"}, {"qat": QatConfig()}])
def test_only_what_began_at_zero_can_be_weighed(options):
    setting = Setting(
        model=ModelConfig(base="builtin:mini"),
        quantization=NF4,
        adapter=AdapterConfig(init=options.get("init", "default")),
        seed=0,
        precision="fp32",
        qat=options.get("qat"),
    )
    assert require_one_setting([setting], [1.0]) == setting
    with pytest.raises(InputError, match="merge it alone, without a weight"):
        require_one_setting([setting], [0.7])


def test_unquantized_run_has_nothing_to_pack_into(bases, tmp_path):
    trained = train(bases["llama"], tmp_path / "adapter")
    with pytest.raises(InputError, match="trained on an unquantized base, so there is no format to pack into"):
        trained.merge(tmp_path / "merged", onto="packed")


def test_quantized_base_has_no_original(bases, tmp_path):
    trained = train(bases["deepseek_fp8"], tmp_path / "adapter", targets=("o_proj",))
    with pytest.raises(InputError, match=r"itself is quantized \(fp8\), .* use --onto dequantized"):
        trained.merge(tmp_path / "merged", onto="original")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_packed_merge_computes_in_the_dtype_that_was_asked_for(dtype, bases, tmp_path):
    trained = train(bases["llama"], tmp_path / "adapter", quantization(backend="torchao", weight_dtype="fp8"))
    merged = trained.merge(tmp_path / "packed", onto="packed", dtype=dtype)
    with torch.no_grad():
        assert AutoModelForCausalLM.from_pretrained(merged)(TOKENS).logits.dtype == dtype


def test_layers_that_a_recipe_skips_of_a_packed_base_are_dense_in_a_packed_merge(bases, tmp_path):
    first = train(bases["llama"], tmp_path / "first", quantization(backend="torchao", weight_dtype="int8"))
    base = first.merge(tmp_path / "base", onto="packed", dtype=None)
    for path in bases["llama"].glob("tokenizer*"):
        shutil.copy(path, base)
    options = quantization(skip=("o_proj",), backend="torchao", weight_dtype="int8")
    trained = train(base, tmp_path / "adapter", options, targets=("q_proj",))
    merged = load_file(trained.merge(tmp_path / "merged", onto="packed", dtype=None) / "model.safetensors")
    assert merged["model.layers.0.self_attn.o_proj.weight"].dtype == torch.bfloat16
    assert "model.layers.0.self_attn.k_proj._weight_qdata" in merged


def test_adapters_on_other_experts_are_refused_together(bases, tmp_path):
    first = train(bases["mixtral"], tmp_path / "first", NF4)
    other = train(bases["mixtral"], tmp_path / "other", NF4, target_parameters=("mlp.experts.down_proj",))
    adapters = tuple(
        TrainedAdapter(folder=one.folder, recipe=None, fingerprints={}, run=None) for one in (first, other)
    )
    with pytest.raises(ModelError, match="all have the same target_parameters, and the one in .*other has others"):
        merge(attrs.evolve(first.request(tmp_path / "m"), adapters=adapters, weights=(1.0, 1.0)), CPU, Quiet())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rows_that_nobody_trained_are_those_of_the_run(precision, tmp_path):
    model = ModelConfig(base="builtin:mini", added_tokens=("<one>",))
    trained = train("builtin:mini", tmp_path / "adapter", NF4, model=model, precision=precision)
    merge(trained.request(tmp_path / "merged", verify=True), CPU, Quiet())


def test_original_of_an_unquantized_base_is_what_was_trained_on(tmp_path):
    trained = train("builtin:mini", tmp_path / "adapter", init="pissa", precision="bf16")
    merge(trained.request(tmp_path / "merged", onto="original", verify=True), CPU, Quiet())


def test_what_is_compared_leaves_other_folders_alone(tmp_path):
    trained = train("builtin:mini", tmp_path / "adapter", NF4)
    (tmp_path / "merged.compare").mkdir()
    (tmp_path / "merged.compare" / "table.txt").write_text("mine")
    with pytest.raises(InputError, match="is not quantune's; move it away"):
        compare_ways(trained.request(tmp_path / "merged"), CPU, Quiet())
    assert (tmp_path / "merged.compare" / "table.txt").read_text() == "mine"
