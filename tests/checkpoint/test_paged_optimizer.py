"""A paged optimizer goes on with the same bits; on a GPU its moments are in pages again."""

import pytest
import torch
from support import save_state
from torch import nn

from quantune.checkpoint.state import restore
from quantune.recipe.schema import TrainingConfig
from quantune.training.optimizer import build_optimizer, page_state

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


def build(name, device, seed=0):
    torch.manual_seed(seed)
    # one below and one above the size from which bitsandbytes pages, both above that from which it packs into 8 bits
    shapes = {"small": (80, 80), "large": (400, 300)}
    parameters = {key: nn.Parameter(torch.randn(shape, device=device)) for key, shape in shapes.items()}
    return parameters, build_optimizer(parameters, TrainingConfig(optimizer=name, learning_rate=1e-2))


def steps(parameters, optimizer, count, seed):
    torch.manual_seed(seed)
    for _ in range(count):
        for parameter in parameters.values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw_8bit"])
def test_a_paged_optimizer_goes_on_with_the_same_bits(tmp_path, name, device):
    parameters, optimizer = build(name, device)
    steps(parameters, optimizer, 3, seed=1)
    save_state(tmp_path, parameters=parameters, optimizer=optimizer, progress={})
    steps(parameters, optimizer, 3, seed=2)

    others, other = build(name, device, seed=9)
    restore(tmp_path, parameters=others, optimizer=other)
    page_state(other)
    paged = {key: getattr(other.state[parameter]["state1"], "is_paged", False) for key, parameter in others.items()}
    assert paged == {"small": False, "large": device == "cuda"}
    steps(others, other, 3, seed=2)
    for key, parameter in parameters.items():
        assert torch.equal(parameter, others[key])
        for entry, value in optimizer.state[parameter].items():
            found = other.state[others[key]][entry]
            assert torch.equal(value, found) if isinstance(value, torch.Tensor) else value == found


def test_an_optimizer_that_is_not_paged_is_left_alone():
    parameters, optimizer = build("adamw_8bit", "cpu")
    steps(parameters, optimizer, 1, seed=1)
    held = {id(optimizer.state[parameter]["state1"]) for parameter in parameters.values()}
    page_state(optimizer)
    assert held == {id(optimizer.state[parameter]["state1"]) for parameter in parameters.values()}
