"""Adapters that PEFT made without quantune, and bases that are stored in unusual ways."""

import json
import shutil

import pytest
import torch
from merge.conftest import CPU, TOKENS, Quiet, train
from merge.test_exact import answers
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support import quantization
from transformers import AutoModelForCausalLM

from quantune.errors import ModelError
from quantune.merge.merge import merge
from quantune.merge.request import MergeRequest, Setting
from quantune.merge.trained import find_adapter

NF4 = quantization(weight_dtype="nf4")


@torch.no_grad()
def made_by_peft(base, folder, config):
    """An adapter of PEFT's own with random weights; returns the logits of base and adapter."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval()
    logits = model(TOKENS).logits
    model.save_pretrained(str(folder))
    return logits


def merged(base, adapter, out, **options):
    found = find_adapter(adapter)
    setting = Setting.of_another_tool(found, str(base))
    given = {"dtype": torch.float32, "verify": False, **options}
    merge(MergeRequest(adapters=(found,), weights=(1.0,), setting=setting, out=out, **given), CPU, Quiet())
    return out


CONFIGS = {
    "patterns": {"rank_pattern": {"layers.1.*q_proj": 2}, "alpha_pattern": {"down_proj": 3}, "use_rslora": True},
    "single tokens": {"trainable_token_indices": [3, 5, 7]},
    "DoRA and biases": {"use_dora": True, "bias": "all"},
}


@pytest.mark.parametrize("base", ["llama", "tied"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_adapters_of_peft_merge_as_peft_computes_them(kind, base, bases, tmp_path):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], **CONFIGS[kind])
    logits = made_by_peft(bases[base], tmp_path / "adapter", config)
    out = merged(bases[base], tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(answers(out), logits, rtol=1e-4, atol=1e-4)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] == (base == "tied")


def test_adapter_over_conv1d(gpt2, tmp_path):
    from merge.conftest import with_tokenizer

    base = with_tokenizer(gpt2, tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True)
    logits = made_by_peft(base, tmp_path / "adapter", config)
    out = merged(base, tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(answers(out), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapter_that_took_a_share_of_the_base_needs_its_recipe(init, bases, tmp_path):
    made_by_peft(bases["llama"], tmp_path / "adapter", LoraConfig(target_modules=["q_proj"], init_lora_weights=init))
    with pytest.raises(ModelError, match=f'began with init_lora_weights = "{init}".*--recipe'):
        merged(bases["llama"], tmp_path / "adapter", tmp_path / "merged")


def test_what_is_no_lora_adapter_is_refused_by_name(bases, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(bases["llama"])
    config = IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    get_peft_model(model, config).save_pretrained(str(tmp_path / "ia3"))
    with pytest.raises(ModelError, match='expected a LoRA adapter .* found peft_type = "IA3"'):
        merged(bases["llama"], tmp_path / "ia3", tmp_path / "merged")


def test_adapter_files_that_are_damaged_are_named(bases, tmp_path):
    made_by_peft(bases["llama"], tmp_path / "adapter", LoraConfig(target_modules=["q_proj"]))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="adapter_model.safetensors can't be read, it is damaged"):
        merged(bases["llama"], tmp_path / "adapter", tmp_path / "merged")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{nothing")
    with pytest.raises(ModelError, match="adapter_config.json can't be read"):
        merged(bases["llama"], tmp_path / "adapter", tmp_path / "merged")


def test_base_that_nothing_but_shapes_speaks_for_is_warned_of(bases, tmp_path):
    made_by_peft(bases["llama"], tmp_path / "adapter", LoraConfig(target_modules=["q_proj"]))
    shutil.copytree(bases["llama"], tmp_path / "elsewhere")
    found = find_adapter(tmp_path / "adapter")
    setting = Setting.of_another_tool(found, str(tmp_path / "elsewhere"))
    observer = Quiet()
    request = MergeRequest(adapters=(found,), weights=(1.0,), setting=setting, out=tmp_path / "m", verify=False)
    merge(request, CPU, observer)
    assert "nothing but its shapes says that" in observer.warnings[0]
    assert observer.warnings[0].endswith(f"the adapter itself names {bases['llama']}")


def test_adapter_of_a_run_loads_in_plain_peft(bases, tmp_path):
    """On the dequantized base, it answers as base and adapter did."""
    trained = train(bases["llama"], tmp_path / "adapter", quantization(backend="fp8"))
    base = trained.merge(tmp_path / "no adapter", onto="original")
    model = AutoModelForCausalLM.from_pretrained(bases["llama"], dtype=torch.float32)
    plain = PeftModel.from_pretrained(model, str(trained.folder)).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(TOKENS).logits, answers(base), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", ["mixtral", "gpt_oss"])
def test_experts_that_were_trained_in_full(base, bases, tmp_path):
    trained = train(bases[base], tmp_path / "adapter", modules_to_save=("experts",), targets=("q_proj",))
    out = trained.merge(tmp_path / "merged")
    torch.testing.assert_close(answers(out), trained.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", [("q_proj", "lm_head"), ("q_proj", "embed_tokens"), ("q_proj",)])
def test_tied_base_that_stores_its_head_as_well(targets, bases, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(bases["tied"], base)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    trained = train(base, tmp_path / "adapter", NF4, targets=targets)
    out = trained.merge(tmp_path / "merged")
    torch.testing.assert_close(answers(out), trained.logits, rtol=1e-4, atol=1e-4)
