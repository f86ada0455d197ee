"""Tokens that a recipe adds: what the tokenizer does with them, the rows they get, and that somebody trains those."""

import attrs
import pytest
import torch
from support import base_of, quantization
from tokenizers import processors
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PhiConfig, PhiForCausalLM

from quantune.errors import ModelError
from quantune.model import adapter, mini, targets
from quantune.model.base import open_base, skeleton
from quantune.model.load import load_model
from quantune.model.vocabulary import Additions, add_tokens
from quantune.recipe.schema import AdapterConfig, ModelConfig, SpecialTokensConfig

CPU = torch.device("cpu")


def model_config(**keys):
    special = {key: keys.pop(key) for key in list(keys) if key.endswith(("_token", "special_tokens"))}
    return ModelConfig(base="builtin:mini", special_tokens=SpecialTokensConfig(**special), **keys)


def tokenizer_with(**keys):
    tokenizer = AutoTokenizer.from_pretrained(mini.PATH)
    return tokenizer, add_tokens(tokenizer, model_config(**keys))


def pieces(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)


def load(base, quantized=None):
    return load_model(base, quantized, compute_dtype=torch.float32, device=CPU)


def test_an_added_token_is_one_token_and_generated_text_shows_it():
    tokenizer, additions = tokenizer_with(added_tokens=("<call>", "</call>"))
    assert pieces(tokenizer, "a<call>b</call>")[1:] == ["a", "<call>", "b", "</call>"]
    assert tokenizer.decode(tokenizer("<call>").input_ids, skip_special_tokens=True) == "<call>"
    assert additions == Additions(tokens=("<call>", "</call>"), rows=4098)


def test_an_additional_special_token_joins_the_tokenizers_own_and_generated_text_leaves_it_out():
    tokenizer, additions = tokenizer_with(additional_special_tokens=("<tool>",))
    assert {"<tool>", "<|user|>"} <= set(tokenizer.all_special_tokens)
    assert tokenizer.decode(tokenizer("a<tool>").input_ids, skip_special_tokens=True) == "a"
    assert additions.tokens == ("<tool>",)


def test_a_token_that_the_vocabulary_has_is_no_addition():
    tokenizer, additions = tokenizer_with(pad_token="<|end|>", eos_token="<|user|>", added_tokens=("<|system|>",))
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|end|>", "<|user|>")
    assert additions == Additions()


def test_an_ordinary_token_is_not_added_again():
    with pytest.raises(ModelError, match=r'"the" is an ordinary token of the vocabulary already'):
        tokenizer_with(added_tokens=("<call>", "the"))


@pytest.mark.parametrize("in_a_sequence", [False, True])
def test_texts_begin_with_the_new_bos_token(in_a_sequence):
    tokenizer = AutoTokenizer.from_pretrained(mini.PATH)
    if in_a_sequence:  # as Llama 3's are
        backend = tokenizer.backend_tokenizer
        backend.post_processor = processors.Sequence([processors.ByteLevel(), backend.post_processor])
    add_tokens(tokenizer, model_config(bos_token="<new>"))
    assert pieces(tokenizer, "a") == ["<new>", "a"]


def test_a_bos_token_that_can_not_be_replaced_is_refused():
    tokenizer = AutoTokenizer.from_pretrained(mini.PATH)
    tokenizer.backend_tokenizer.post_processor = processors.BertProcessing(("<|end|>", 1), ("<|begin|>", 0))
    with pytest.raises(ModelError, match=r"still puts it around texts"):
        add_tokens(tokenizer, model_config(bos_token="<new>"))


def test_a_token_that_only_pads_needs_a_row_and_no_training():
    _, additions = tokenizer_with(pad_token="<fill>")
    assert additions == Additions(tokens=(), rows=4097)
    _, twice = tokenizer_with(pad_token="<fill>", added_tokens=("<fill>",))
    assert twice.tokens == ("<fill>",)


@pytest.mark.parametrize(
    ("rows", "multiple", "present", "expected"),
    [
        (0, 1, 320, 320),
        (322, 1, 320, 322),
        (322, 64, 320, 384),
        (0, 64, 320, 320),
        (0, 7, 320, 322),
        (300, 1, 320, 320),
    ],
)
def test_embeddings_grow_as_far_as_they_must_and_never_shrink(rows, multiple, present, expected):
    assert Additions(rows=rows, multiple=multiple).rows_of(present) == expected


def untied_with_bias(folder):
    """A Phi: its head is not its embedding, and has a bias."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128}
    model = PhiForCausalLM(PhiConfig(**sizes, num_hidden_layers=1, num_attention_heads=4, tie_word_embeddings=False))
    torch.nn.init.normal_(model.lm_head.bias)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("quantized", [None, "mxfp4"])
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_new_rows_are_the_mean_of_the_old_ones_which_stay(tied_llama, tmp_path, kind, quantized):
    base = base_of(tied_llama if kind == "tied" else untied_with_bias(tmp_path))
    packing = None if quantized is None else quantization(backend=quantized)
    before, grown = load(base, packing), load(attrs.evolve(base, additions=Additions(rows=323, multiple=5)), packing)
    assert grown.config.vocab_size == 325
    for old, new in (
        (before.get_input_embeddings(), grown.get_input_embeddings()),
        (before.get_output_embeddings(), grown.get_output_embeddings()),
    ):
        assert torch.equal(new.weight[:320], old.weight)
        mean = old.weight.double().mean(dim=0)
        torch.testing.assert_close(new.weight[320:].double(), mean.expand(5, -1), rtol=1e-6, atol=1e-7)
    if kind == "tied":
        assert grown.lm_head.weight is grown.model.embed_tokens.weight
    else:
        mean = before.lm_head.bias.double().mean()
        torch.testing.assert_close(grown.lm_head.bias[320:].double(), mean.expand(5), rtol=1e-6, atol=1e-7)
    tokens = torch.arange(10)[None]
    assert torch.equal(grown(tokens).logits[..., :320], before(tokens).logits)


def test_the_skeleton_grows_too_and_the_checkpoints_configuration_stays(tied_llama):
    base = attrs.evolve(base_of(tied_llama), additions=Additions(rows=330))
    assert skeleton(base).get_input_embeddings().num_embeddings == 330
    assert base.config.vocab_size == 320


@pytest.mark.parametrize(
    ("saved", "wanted"),
    [
        ((), '["embed_tokens", "lm_head"]'),
        (("lm_head",), '["lm_head", "embed_tokens"]'),
        (("embed_tokens",), '["embed_tokens", "lm_head"]'),
        (("norm",), '["norm", "embed_tokens", "lm_head"]'),
    ],
)
def test_new_tokens_whose_embeddings_nothing_trains_are_refused_with_the_modules_to_train(llama, saved, wanted):
    base = attrs.evolve(base_of(llama), additions=Additions(tokens=("<a>", "<b>"), rows=322))
    with pytest.raises(ModelError) as caught:
        targets.require_trained_tokens(skeleton(base), base.additions, AdapterConfig(modules_to_save=saved))
    assert "<a>, <b>" in str(caught.value)
    assert f"modules_to_save = {wanted}" in str(caught.value)


def test_new_tokens_are_trained_by_both_modules_or_by_either_of_tied_ones(llama, tied_llama):
    new = Additions(tokens=("<a>",), rows=321)
    both = AdapterConfig(modules_to_save=("lm_head", "model.embed_tokens"))
    targets.require_trained_tokens(skeleton(base_of(llama)), new, both)
    for module in ("lm_head", "embed_tokens"):
        targets.require_trained_tokens(skeleton(base_of(tied_llama)), new, AdapterConfig(modules_to_save=(module,)))
    targets.require_trained_tokens(
        skeleton(base_of(llama)), Additions(rows=400), AdapterConfig()
    )  # rows without tokens


def test_a_row_that_the_embedding_had_to_spare_must_be_trained_as_well(llama):
    new = Additions(tokens=("<a>",), rows=301)
    assert new.rows_of(320) == 320
    with pytest.raises(ModelError, match="embed_tokens"):
        targets.require_trained_tokens(skeleton(base_of(llama)), new, AdapterConfig())


def test_either_module_of_tied_embeddings_trains_the_embedding_and_the_head(tied_llama):
    base = attrs.evolve(base_of(tied_llama), additions=Additions(tokens=("<a>",), rows=321))
    for module in ("lm_head", "embed_tokens"):
        model = adapter.attach(
            load(base), AdapterConfig(r=2, modules_to_save=(module,)), base_name="tied", seed=0
        ).get_base_model()
        parts = (model.get_input_embeddings(), model.get_output_embeddings())
        embedding, head = (part.modules_to_save["default"].weight for part in parts)
        assert embedding is head and embedding.requires_grad and len(embedding) == 321


def test_a_gpt2_grows(tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=64, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    model = load(attrs.evolve(base_of(tmp_path), additions=Additions(rows=321)))
    assert model.transformer.wte.weight.shape == (321, 64) and model(torch.tensor([[320]])).logits.shape[-1] == 321


def test_opening_a_base_adds_the_tokens_of_its_recipe():
    base = open_base(model_config(pad_token="<fill>", added_tokens=("<a>",), pad_vocabulary_to_multiple_of=128))
    assert base.additions == Additions(tokens=("<a>",), rows=4098, multiple=128)
    assert base.tokenizer.convert_tokens_to_ids("<fill>") == base.pad_id
    assert skeleton(base).config.vocab_size == 4224
