"""QuantLinear and the LoRA math over it equal dense layers on the dequantized weight."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from quantune.backends.backend import pack_weight
from quantune.backends.bnb import BnbOptions
from quantune.backends.bnb.formats import BnbBackend
from quantune.quantized.linear import PackedLoraLinear, QuantLinear, WeightFormat, Workspace

FORMATS = [BnbOptions(), BnbOptions(weight_dtype="fp4", double_quant=False), BnbOptions(weight_dtype="int8")]


def make(options, *, bias=True, shape=(96, 128)):
    """A QuantLinear and the dense layer with its dequantized weight."""
    torch.manual_seed(1)
    backend = BnbBackend()
    packed = pack_weight(backend, torch.randn(shape) * 0.05, options)
    layer = QuantLinear(
        shape[1],
        shape[0],
        bias=bias,
        weight_format=WeightFormat(backend, packed.layout, Workspace()),
        compute_dtype=torch.float32,
    )
    layer.weight.data = packed.data
    dense = nn.Linear(shape[1], shape[0], bias=bias)
    dense.weight.data = layer.dequantize()
    if bias:
        layer.bias.data = torch.randn(shape[0])
        dense.bias.data = layer.bias.data.clone()
    return layer, dense


@pytest.mark.parametrize("options", FORMATS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(5,), (2, 3), ()])
def test_output_and_gradient_equal_a_dense_layer_on_the_dequantized_weight(options, bias, leading):
    layer, dense = make(options, bias=bias)
    x = torch.randn(*leading, 128, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    upstream = torch.randn(*leading, 96)
    (layer(x) * upstream).sum().backward()
    (dense(y) * upstream).sum().backward()
    assert torch.equal(layer(x), dense(y))
    assert torch.equal(x.grad, y.grad)


def test_a_trainable_bias_gets_its_gradient():
    layer, dense = make(FORMATS[0])
    layer.bias.requires_grad_()
    x = torch.randn(4, 3, 128)
    layer(x).square().sum().backward()
    dense(x).square().sum().backward()
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad)


def saved_bytes(function):
    """Bytes that autograd keeps for the backward pass, by tensor storage."""
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = function()
    return sum(kept.values()), output


def test_no_dequantized_weight_is_kept_for_the_backward_pass():
    layer, dense = make(FORMATS[0], bias=False, shape=(512, 512))
    x = torch.randn(1, 512, requires_grad=True)
    kept, _ = saved_bytes(lambda: layer(x))
    assert kept == layer.weight.nbytes
    assert kept < dense.weight.nbytes / 7


def lora_tensors(rank=8):
    torch.manual_seed(2)
    return torch.randn(rank, 128) * 0.1, torch.randn(96, rank) * 0.1


@pytest.mark.parametrize("options", FORMATS)
@pytest.mark.parametrize("bias", [True, False])
def test_the_fused_lora_function_equals_autograd_on_a_dense_weight(options, bias):
    layer, dense = make(options, bias=bias)
    lora_A, lora_B = (tensor.requires_grad_() for tensor in lora_tensors())
    x = torch.randn(2, 7, 128, requires_grad=True)
    upstream = torch.randn(2, 7, 96)
    fused = PackedLoraLinear.apply(x, layer.weight, layer.bias, lora_A, lora_B, 2.0, layer.weight_format)
    found = torch.autograd.grad((fused * upstream).sum(), [x, lora_A, lora_B])
    plain = dense(x) + functional.linear(functional.linear(x, lora_A), lora_B) * 2.0
    expected = torch.autograd.grad((plain * upstream).sum(), [x, lora_A, lora_B])
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_fused_lora_function_passes_gradcheck_in_double_precision():
    layer, _ = make(FORMATS[2], bias=True, shape=(6, 8))
    layer.bias.data = layer.bias.data.double()
    lora_A, lora_B = torch.randn(2, 8).double().requires_grad_(), torch.randn(6, 2).double().requires_grad_()
    x = torch.randn(3, 8).double().requires_grad_()

    def function(x, lora_A, lora_B):
        return PackedLoraLinear.apply(x, layer.weight, layer.bias, lora_A, lora_B, 0.5, layer.weight_format)

    assert torch.autograd.gradcheck(function, (x, lora_A, lora_B))


def test_adapters_stay_fp32_over_a_bf16_base():
    layer, _ = make(FORMATS[0])
    layer.bias.data = layer.bias.data.bfloat16()
    lora_A, lora_B = (tensor.requires_grad_() for tensor in lora_tensors())
    x = torch.randn(5, 128).bfloat16()
    y = PackedLoraLinear.apply(x, layer.weight, layer.bias, lora_A, lora_B, 1.0, layer.weight_format)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert lora_A.grad.dtype == lora_B.grad.dtype == torch.float32


def test_a_borrowed_weight_is_written_into_one_reused_buffer():
    layer, _ = make(FORMATS[2])
    first = layer.weight_format.borrow(layer.weight, torch.float32)
    second = layer.weight_format.borrow(layer.weight, torch.float32)
    assert first.data_ptr() == second.data_ptr()
    assert layer.dequantize().data_ptr() != first.data_ptr()


def test_it_is_an_nn_linear_whose_weight_is_bytes():
    layer, _ = make(FORMATS[0])
    assert isinstance(layer, nn.Linear)
    assert layer.weight.dtype == torch.uint8 and layer.weight.dim() == 1 and not layer.weight.requires_grad
    with pytest.raises(RuntimeError):
        functional.linear(torch.randn(2, 128), layer.weight)


def test_a_layer_that_was_used_for_inference_trains():
    layer, _ = make(FORMATS[2])
    with torch.inference_mode():
        layer(torch.randn(2, 128))
    x = torch.randn(2, 128, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
