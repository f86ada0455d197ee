"""Values of a base's config.json that a recipe replaces: they reach the model, and an unknown one is an error."""

import pytest
import torch
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, Mistral3Config

from quantune.errors import ModelError
from quantune.model.base import open_base, skeleton
from quantune.model.configuration import with_values
from quantune.model.load import load_model
from quantune.recipe.schema import ModelConfig

LLAMA = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}


def refused(config, values):
    with pytest.raises(ModelError) as caught:
        with_values(config, values)
    return str(caught.value)


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_rope_settings_merge_under_their_old_and_new_names(name, kind):
    made = with_values(LlamaConfig(**LLAMA, rope_theta=5e5), {name: {kind: "linear", "factor": 2.0}})
    assert made.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}


def test_the_base_frequency_alone_leaves_the_rest():
    made = with_values(LlamaConfig(**LLAMA, rope_parameters=dict(LLAMA3)), {"rope_theta": 1e6})
    assert made.rope_parameters == {**LLAMA3, "rope_theta": 1e6}


def test_another_type_of_rope_keeps_none_of_the_old_ones_factors():
    made = with_values(LlamaConfig(**LLAMA, rope_parameters=dict(LLAMA3)), {"rope_scaling": {"rope_type": "default"}})
    assert made.rope_parameters == {"rope_type": "default", "rope_theta": 500000.0}


def test_rope_settings_by_type_of_layer_merge_one_by_one():
    config = Gemma3TextConfig(vocab_size=320, hidden_size=64, num_hidden_layers=2)
    before = {name: dict(table) for name, table in config.rope_parameters.items()}
    made = with_values(config, {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}})
    assert made.rope_parameters["sliding_attention"] == before["sliding_attention"]
    assert made.rope_parameters["full_attention"]["factor"] == 8.0
    assert "expected a table for" in refused(config, {"rope_scaling": {"rope_type": "linear", "factor": 8.0}})


def test_a_key_reaches_its_table_and_the_rest_of_the_table_stays():
    config = Mistral3Config(text_config={**LLAMA, "model_type": "mistral", "sliding_window": 512})
    made = with_values(config, {"text_config": {"sliding_window": 128}})
    assert (made.text_config.sliding_window, made.text_config.hidden_size) == (128, 64)
    assert 'has no sliding_windows (did you mean "sliding_window"?)' in refused(
        config, {"text_config": {"sliding_windows": 128}}
    )


def test_an_architectures_other_name_for_a_key_is_understood():
    assert with_values(GPT2Config(n_layer=2), {"num_hidden_layers": 1}).n_layer == 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"atention_dropout": 0.1}, 'has no atention_dropout (did you mean "attention_dropout"?)'),
        ({"num_hidden_layers": "two"}, "expected int, got str"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "Missing required keys"),
        ({"rope_scaling": {"rope_type": "yarm", "factor": 2.0}}, "expected rope_type as one of default"),
        ({"rope_scaling": {"rope_type": "yarn", "factr": 2.0}}, 'have no factr (did you mean "factor"?)'),
        ({"rope_scaling": 2.0}, "expected a table, found 2.0"),
    ],
)
def test_what_a_configuration_can_not_take_is_refused_by_name(values, expected):
    assert expected in refused(LlamaConfig(**LLAMA), values)


def test_a_model_computes_with_the_values_of_its_recipe():
    tokens = torch.arange(40)[None] + 5

    def logits(**values):
        base = open_base(ModelConfig(base="builtin:mini", config=values))
        model = load_model(base, None, compute_dtype=torch.float32, device=torch.device("cpu"))
        return model(tokens).logits

    plain, scaled = logits(), logits(rope_scaling={"rope_type": "linear", "factor": 4.0})
    assert not torch.allclose(plain, scaled, atol=1e-2)
    assert torch.equal(plain, logits(rope_theta=10000.0))


def test_an_activation_that_does_not_exist_is_an_error_before_weights_are_read():
    base = open_base(ModelConfig(base="builtin:mini", config={"hidden_act": "silky"}))
    with pytest.raises(ModelError, match="silky"):
        skeleton(base)
