"""Packed layouts: offsets, views, and what is refused."""

import pytest
import torch

from quantune.backends.layout import ALIGNMENT, PackedLayout, PackedWeight, TensorSpec
from quantune.errors import QuantizationError

SPECS = {
    "codes": TensorSpec(torch.uint8, (5,)),
    "scale": TensorSpec(torch.float32, (3, 1)),
    "offset": TensorSpec(torch.bfloat16, (1,)),
}


def plan(specs=SPECS):
    return PackedLayout.plan(backend="b", options=None, shape=(2, 5), dtype=torch.float32, tensors=specs)


def tensors():
    return {
        "codes": torch.arange(5, dtype=torch.uint8),
        "scale": torch.randn(3, 1),
        "offset": torch.ones(1, dtype=torch.bfloat16),
    }


def test_every_inner_tensor_starts_at_an_aligned_offset():
    assert [entry.offset for entry in plan().inner] == [0, 16, 32]
    assert plan().nbytes % ALIGNMENT == 0


def test_what_is_written_is_what_the_views_show():
    written = tensors()
    views = PackedWeight(plan(), plan().write(written)).views()
    assert views.keys() == written.keys()
    for name, tensor in written.items():
        assert torch.equal(views[name], tensor)


def test_views_share_the_memory_of_the_bytes():
    flat = plan().write(tensors())
    plan().views(flat)["scale"].fill_(7)
    assert torch.equal(plan().views(flat)["scale"], torch.full((3, 1), 7.0))


def test_views_of_a_row_of_a_stack_of_packed_weights_work():
    flat = plan().write(tensors())
    stack = torch.stack([torch.zeros_like(flat), flat])
    assert torch.equal(plan().views(stack[1])["codes"], torch.arange(5, dtype=torch.uint8))


def test_layouts_are_hashable_and_equal_by_value():
    assert {plan(): 1}[plan()] == 1


def test_padding_is_zero_so_that_equal_weights_have_equal_bytes():
    flat = plan().write(tensors())
    assert not flat[5:16].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(5, dtype=torch.int8)}, "'codes' as torch.uint8"),
        ({"scale": torch.zeros(3)}, r"\(3, 1\), found torch.float32 \(3,\)"),
        ({"extra": torch.zeros(1)}, "expected the inner tensors"),
    ],
)
def test_tensors_that_do_not_fit_the_layout_are_refused(change, message):
    with pytest.raises(QuantizationError, match=message):
        plan().write(tensors() | change)
