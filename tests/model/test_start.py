"""Training on from an adapter: what fits, and every difference named where one does not."""

import contextlib
import json
import shutil

import attrs
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support import base_of, quantization
from transformers import AutoModelForCausalLM

from quantune.errors import ModelError
from quantune.model import adapter
from quantune.model.base import skeleton
from quantune.model.load import load_model
from quantune.model.start import check_start, load_start
from quantune.recipe.schema import AdapterConfig

CONFIG = AdapterConfig(r=4, alpha=8, targets=("q_proj", "mlp.down_proj"))
TOKENS = torch.arange(24).view(2, 12)


def attached(folder, config, seed=0):
    model = load_model(base_of(folder), quantization(), compute_dtype=torch.float32, device=torch.device("cpu"))
    return adapter.attach(model, config, base_name="b", seed=seed)


def saved(folder, config, path):
    """A saved adapter whose every tensor has moved from its initialization."""
    model = attached(folder, config)
    torch.manual_seed(1)
    for parameter in adapter.trainable_parameters(model).values():
        parameter.data += torch.randn_like(parameter) * 0.05
    adapter.save_adapter(model, path)
    return model


@pytest.fixture(scope="module")
def start(llama, tmp_path_factory):
    """An adapter of `CONFIG`."""
    folder = tmp_path_factory.mktemp("run") / "adapter"
    saved(llama, CONFIG, folder)
    return folder


@pytest.fixture
def copy(start, tmp_path):
    """A copy of it that a test may change."""
    return shutil.copytree(start, tmp_path / "adapter")


def change(folder, **values):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


FITTING = {
    "lora": CONFIG,
    "dora": attrs.evolve(CONFIG, use_dora=True, use_rslora=True),
    "all-linear": AdapterConfig(r=2),
    "expression": AdapterConfig(r=2, targets=r".*layers\.1\..*(k|v)_proj"),
    "head saved": AdapterConfig(r=2, modules_to_save=("lm_head",)),
    "head and embedding": AdapterConfig(r=2, targets=("all-linear", "lm_head", "embed_tokens")),
    "biases": attrs.evolve(CONFIG, bias="all"),
}


@pytest.mark.parametrize("config", FITTING.values(), ids=FITTING)
def test_training_starts_with_the_weights_of_the_adapter(llama, tmp_path, config):
    expected = adapter.trainable_parameters(saved(llama, config, tmp_path))
    check_start(tmp_path, skeleton(base_of(llama)), config)
    model = attached(llama, attrs.evolve(config, start_from=str(tmp_path)), seed=9)
    load_start(model, tmp_path)
    found = adapter.trainable_parameters(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], parameter) for name, parameter in expected.items())


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_training_starts_with_the_weights_of_an_adapter_on_experts(mixtures, tmp_path, name):
    config = AdapterConfig(r=2, target_parameters=("experts.gate_up_proj", "experts.down_proj"))
    expected = adapter.trainable_parameters(saved(mixtures[name], config, tmp_path))
    same = attrs.evolve(config, target_parameters=("down_proj", "gate_up_proj"))
    check_start(tmp_path, skeleton(base_of(mixtures[name])), same)
    model = attached(mixtures[name], config, seed=9)
    load_start(model, tmp_path)
    found = adapter.trainable_parameters(model)
    assert all(torch.equal(found[name], parameter) for name, parameter in expected.items())
    other = attrs.evolve(config, target_parameters=("down_proj",))
    with pytest.raises(ModelError, match=r'target_parameters is \[.*\] there, \["down_proj"\] here'):
        check_start(tmp_path, skeleton(base_of(mixtures[name])), other)


def test_an_adapter_that_plain_peft_wrote_in_another_dtype_fits(llama, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=r".*(q_proj|mlp\.down_proj)", lora_dropout=0.1)
    made = get_peft_model(plain, lora, autocast_adapter_dtype=False)
    made.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.bfloat16}
    check_start(tmp_path, skeleton(base_of(llama)), CONFIG)
    model = attached(llama, CONFIG)
    load_start(model, tmp_path)
    assert {parameter.dtype for parameter in adapter.trainable_parameters(model).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("config", "messages"),
    [
        (attrs.evolve(CONFIG, r=8), [r"r is 4 there, 8 here \(write r = 4\)"]),
        (attrs.evolve(CONFIG, alpha=4), [r"alpha is 8 there, 4 here \(write alpha = 8\)"]),
        (attrs.evolve(CONFIG, use_dora=True), [r"use_dora is false there, true here \(write use_dora = false\)"]),
        (attrs.evolve(CONFIG, use_rslora=True, r=2), ["r is 4 there", "use_rslora is false there"]),
        (attrs.evolve(CONFIG, bias="all"), ['bias is "none" there, "all" here']),
        (attrs.evolve(CONFIG, modules_to_save=("lm_head",)), [r"modules_to_save is not set there, \[.lm_head.\] here"]),
        (
            attrs.evolve(CONFIG, targets="all-linear"),
            [r"only this table has model.layers.0.mlp.gate_proj; write targets = \[.mlp.down_proj., .q_proj.\]"],
        ),
        (attrs.evolve(CONFIG, targets=("q_proj", "k_proj")), ["only the adapter has .*down_proj, only this .*k_proj"]),
    ],
)
def test_every_difference_is_named_with_what_to_write(llama, start, config, messages):
    with pytest.raises(ModelError) as caught:
        check_start(start, skeleton(base_of(llama)), config)
    for message in messages:
        assert caught.match(message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, 'expected a LoRA adapter in .*, found peft_type = "IA3"'),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is .* there, for which quantune has no key"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is .* there, for which quantune has no key"),
        ({"init_lora_weights": "pissa"}, 'began with init = "pissa", so it belongs to a base that a share was taken'),
        ({"init_lora_weights": "gaussian", "lora_dropout": 0.3}, None),
    ],
)
def test_what_quantune_does_not_train_is_refused_and_what_makes_no_difference_is_not(llama, copy, values, message):
    change(copy, **values)
    if message is None:
        check_start(copy, skeleton(base_of(llama)), CONFIG)
        return
    with pytest.raises(ModelError, match=message):
        check_start(copy, skeleton(base_of(llama)), CONFIG)


def test_a_key_that_an_older_peft_did_not_write_has_its_default(llama, copy):
    file = copy / "adapter_config.json"
    kept = ("peft_type", "r", "lora_alpha", "target_modules")
    file.write_text(json.dumps({key: json.loads(file.read_text())[key] for key in kept}))
    check_start(copy, skeleton(base_of(llama)), CONFIG)


def test_the_adapter_of_a_loftq_run_is_known_by_the_recipe_beside_it(llama, copy):
    (copy.parent / "recipe.toml").write_text('[adapter]\ninit = "loftq"\n')
    with pytest.raises(ModelError, match='began with init = "loftq"'):
        check_start(copy, skeleton(base_of(llama)), CONFIG)


def test_an_adapter_of_another_base_is_refused_by_shape(mixtures, start, llama, copy):
    tensors = load_file(copy / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({**tensors, name: torch.zeros(4, 32)}, copy / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"q_proj.lora_A.weight has the shape \[4, 32\] there, \[4, 64\] here"):
        check_start(copy, skeleton(base_of(llama)), CONFIG)
    del tensors[name]
    save_file(tensors, copy / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=f"its tensors are others, e.g. {name}"):
        check_start(copy, skeleton(base_of(llama)), CONFIG)


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ({"<a>": 319, "<b>": 320}, None),
        ({"<b>": 319, "<a>": 320}, 'the row of the added token "<b>" is that of "<a>" there'),
        ({"<a>": 319, "<b>": 320, "<c>": 321}, None),  # a row that was there to spare
    ],
)
def test_added_tokens_must_have_the_rows_they_had(llama, copy, added, said):
    tokens = [{"id": 319, "content": "<a>"}, {"id": 320, "content": "<b>"}]
    (copy / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    with contextlib.nullcontext() if said is None else pytest.raises(ModelError, match=said):
        check_start(copy, skeleton(base_of(llama)), CONFIG, added)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_damaged_files_are_named(llama, copy, file):
    (copy / file).write_bytes(b"\xff{")
    with pytest.raises(ModelError, match=f"{file} can't be read"):
        check_start(copy, skeleton(base_of(llama)), CONFIG)


def test_a_folder_that_changed_after_the_check_is_not_half_loaded(llama, copy):
    model = attached(llama, CONFIG)
    tensors = load_file(copy / "adapter_model.safetensors")
    tensors.pop(min(tensors))
    save_file(tensors, copy / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="does not fit the base, e.g. "):
        load_start(model, copy)
