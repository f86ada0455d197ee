"""What `quantune quantize` writes is a base for `quantune run` and `quantune merge` as well, bit for bit."""

import pytest
import torch
from model.conftest import MIXTURES, save
from support import FORMATS, Silent, base_of, quantization
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from quantune.backends.checkpoints import as_stored
from quantune.errors import ModelError
from quantune.model.adoption import quantization_over, take_quantization
from quantune.model.base import Base, skeleton
from quantune.model.load import load_model, packed_fingerprint, plan_base
from quantune.quantize.choice import choose
from quantune.quantize.quantize import quantize
from quantune.streaming.adopted import adopted
from quantune.streaming.source import open_source

CPU = torch.device("cpu")
READABLE = {name: keys for name, keys in FORMATS.items() if name not in ("torchao nf4", "mxfp4")}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return save(LlamaForCausalLM(config), tmp_path_factory.mktemp("llama"))


def pack(source, out, backend, weight_dtype=None, skip=(), activation_dtype=None, **options):
    settings = [f"{key}={str(value).lower()}" for key, value in options.items()]
    choice = choose(backend, weight_dtype, settings=settings, skip=skip, activation_dtype=activation_dtype)
    quantize(base_of(source), choice, out, device=CPU, observer=Silent())
    return out


def opened(folder):
    """The base in a folder, as `open_base` finds it, without a tokenizer."""
    config = AutoConfig.from_pretrained(folder)
    stored = take_quantization(config)
    return Base(
        name=str(folder),
        source=str(folder),
        revision=None,
        trust_remote_code=False,
        attn_implementation=None,
        config=config,
        stored=stored,
        quantization=as_stored(stored),
        tokenizer=None,
    )


def loaded(base, chosen):
    return load_model(base, chosen, compute_dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("keys", READABLE.values(), ids=READABLE.keys())
def test_a_packed_checkpoint_is_loaded_as_the_bytes_that_packing_it_here_gives(llama, tmp_path, keys):
    base = opened(pack(llama, tmp_path / "out", **keys))
    taken, packed = loaded(base, base.quantization), loaded(base_of(llama), quantization(**keys))
    assert packed_fingerprint(taken) == packed_fingerprint(packed)
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.equal(taken(tokens).logits, packed(tokens).logits)


@pytest.mark.parametrize("keys", READABLE.values(), ids=READABLE.keys())
def test_a_merge_reads_what_its_weights_mean(llama, tmp_path, keys):
    base = opened(pack(llama, tmp_path / "out", **keys))
    packed = loaded(base_of(llama), quantization(**keys))
    plan = plan_base(base, base.quantization, torch.float32, CPU)
    with open_source(tmp_path / "out") as stored:
        source = adopted(stored, skeleton(base), plan, CPU)
        assert len(source.packed) == 7
        for name in source.packed:
            expected = packed.get_submodule(name.removesuffix(".weight")).dequantize()
            assert torch.equal(source.read(name), expected)


def test_modules_that_were_skipped_stay_as_they_were(llama, tmp_path):
    base = opened(pack(llama, tmp_path / "out", "bnb", "nf4", skip=["down_proj"]))
    model = loaded(base, base.quantization)
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear


@pytest.mark.parametrize("backend, weight_dtype", [("bnb", "nf4"), ("torchao", "int8")])
def test_experts_that_the_checkpoint_keeps_are_loaded_dense(tmp_path, backend, weight_dtype):
    torch.manual_seed(0)
    source = save(MIXTURES["qwen3_moe"](), tmp_path / "in")
    base = opened(pack(source, tmp_path / "out", backend, weight_dtype, skip=["experts"]))
    chosen = quantization(["experts"], backend=backend, weight_dtype=weight_dtype)
    taken, packed = loaded(base, base.quantization), loaded(base_of(source), chosen)
    assert packed_fingerprint(taken) == packed_fingerprint(packed)
    experts = taken.model.layers[0].mlp.experts.gate_up_proj
    assert torch.equal(experts, packed.model.layers[0].mlp.experts.gate_up_proj) and experts.dtype == torch.float32


def test_rounding_of_activations_is_left_out_where_the_model_is_trained_on(llama, tmp_path):
    base = opened(pack(llama, tmp_path / "out", "torchao", "int8", activation_dtype="int8"))
    packed = loaded(base_of(llama), quantization(backend="torchao", weight_dtype="int8"))
    assert packed_fingerprint(loaded(base, base.quantization)) == packed_fingerprint(packed)


def test_blocks_of_another_size_are_named_in_the_recipe(llama, tmp_path):
    """What transformers writes has blocks of 64; its configuration has no word for others."""
    base = opened(pack(llama, tmp_path / "out", "bnb", "nf4", block_size=128))
    with pytest.raises(Exception, match="expected blocks of 64 and the shape"):
        loaded(base, base.quantization)
    chosen = quantization_over("base", base.stored, quantization(weight_dtype="nf4", block_size=128))
    assert packed_fingerprint(loaded(base, chosen)) == packed_fingerprint(loaded(base_of(llama), chosen))


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"backend": "bnb", "weight_dtype": "int8"}, 'it holds nf4, where the recipe has weight_dtype = "int8"'),
        ({"backend": "bnb", "weight_dtype": "nf4", "double_quant": False}, "must say: double_quant = true"),
        ({"backend": "torchao", "weight_dtype": "int8"}, 'the recipe asks for backend = "torchao"'),
    ],
)
def test_a_recipe_that_says_another_format_is_refused(llama, tmp_path, keys, said):
    base = opened(pack(llama, tmp_path / "out", "bnb", "nf4"))
    with pytest.raises(ModelError, match="already quantized") as caught:
        quantization_over("base", base.stored, quantization(**keys))
    assert said in str(caught.value)
