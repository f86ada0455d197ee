"""The chunked loss equals the model's own, and is exact about what a target is."""

import pytest
import torch
from torch.nn import functional
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from quantune.training import loss as module
from quantune.training.loss import LanguageModelLoss, WholeLogitsLoss, build_loss

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def gemma():
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0))


def granite():
    return GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0))


def batch():
    torch.manual_seed(1)
    input_ids = torch.randint(0, 96, (3, 17))
    labels = input_ids.clone()
    labels[0, :9] = labels[1, 12:] = -100
    labels[2] = -100
    return input_ids, labels


def reference(model, input_ids, labels):
    logits = model(input_ids=input_ids).logits[:, :-1]
    return functional.cross_entropy(logits.reshape(-1, 96), labels[:, 1:].reshape(-1), reduction="sum")


@pytest.mark.parametrize("make", [llama, gemma, granite])
@pytest.mark.parametrize("frozen_head", [True, False])
@pytest.mark.parametrize("chunk_rows", [1, 5, 1000])
def test_value_and_gradients_equal_cross_entropy_over_whole_logits(make, frozen_head, chunk_rows, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 96 * chunk_rows)
    torch.manual_seed(0)
    model = make().eval()
    model.get_output_embeddings().weight.requires_grad_(not frozen_head)
    loss = build_loss(model)
    assert isinstance(loss, LanguageModelLoss)
    assert (loss.finish is None) == (make is llama)  # also where logits are small
    parameters = [p for p in model.parameters() if p.requires_grad]
    found, expected = loss(*batch()), reference(model, *batch())
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_no_more_logits_than_a_chunk_are_held(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 96 * 4)
    model = llama().eval()
    model.lm_head.weight.requires_grad_(False)
    seen = []
    monkeypatch.setattr(module.functional, "linear", lambda x, *rest: seen.append(x.shape[0]) or x @ rest[0].T)
    module.FrozenHeadLoss.apply(torch.randn(10, 32), model.lm_head.weight, None, torch.zeros(10, dtype=torch.long))
    assert seen == [4, 4, 2]


def test_a_batch_without_targets_has_loss_zero_and_finite_gradients():
    model = llama().eval()
    input_ids, labels = batch()
    total = build_loss(model)(input_ids[2:], labels[2:])
    total.backward()
    assert float(total.detach()) == 0.0


def test_right_padding_does_not_change_the_loss():
    model = llama().eval()
    loss = build_loss(model)
    input_ids, labels = batch()
    padded = functional.pad(input_ids, (0, 5), value=3), functional.pad(labels, (0, 5), value=-100)
    torch.testing.assert_close(loss(input_ids, labels), loss(*padded))


def test_a_model_whose_head_can_not_be_taken_apart_uses_its_own_forward():
    model = llama().eval()
    handle = model.register_forward_hook(
        lambda _, __, output: output.__setattr__("logits", output.logits + 1.5 * output.logits.square())
    )
    loss = build_loss(model)
    assert isinstance(loss, WholeLogitsLoss)
    torch.testing.assert_close(loss(*batch()), reference(model, *batch()))
    handle.remove()
