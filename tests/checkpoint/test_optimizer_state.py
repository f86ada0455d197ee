"""An optimizer's memory comes back bit for bit, whatever the optimizer keeps; one that does not fit is refused."""

import json

import pytest
import torch
from support import save_state
from torch import nn

from quantune.checkpoint.state import read_state, restore
from quantune.errors import CheckpointError


class Float32Momentum(torch.optim.Optimizer):
    """Keeps moments in fp32 and a python counter for parameters of any dtype, as some optimizers do."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                moment = state.setdefault("moment", torch.zeros_like(parameter, dtype=torch.float32))
                state["count"] = state.get("count", 0) + 1
                moment.mul_(0.9).add_(parameter.grad.float())
                parameter.sub_((group["lr"] * moment / state["count"]).to(parameter.dtype))


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "fp32 moments": Float32Momentum,
}


def build(optimizer="adamw", seed=0, dtype=torch.bfloat16):
    torch.manual_seed(seed)
    parameters = {name: nn.Parameter(torch.randn(8, 4, dtype=dtype)) for name in ("a/b", "c.d")}
    return parameters, OPTIMIZERS[optimizer](list(parameters.values()))


def train(parameters, optimizer, count):
    for _ in range(count):
        for parameter in parameters.values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


def save(folder, parameters, optimizer):
    save_state(folder, parameters=parameters, optimizer=optimizer, progress={"step": 1, "best": None})


def load(folder, parameters, optimizer):
    return restore(folder, parameters=parameters, optimizer=optimizer)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_goes_on_with_the_same_bits(tmp_path, name):
    parameters, optimizer = build(name)
    train(parameters, optimizer, 5)
    save(tmp_path, parameters, optimizer)
    train(parameters, optimizer, 5)
    others, other = build(name, seed=9)
    assert load(tmp_path, others, other) == {"step": 1, "best": None}
    train(others, other, 5)
    for key, parameter in parameters.items():
        assert torch.equal(parameter.view(torch.int16), others[key].view(torch.int16))
        mine, theirs = optimizer.state[parameter], other.state[others[key]]
        assert mine.keys() == theirs.keys()
        for entry, value in mine.items():
            same = torch.equal(value, theirs[entry]) if isinstance(value, torch.Tensor) else value == theirs[entry]
            assert same and getattr(value, "dtype", None) == getattr(theirs[entry], "dtype", None)


def test_a_restored_optimizer_does_not_write_into_the_checkpoint(tmp_path):
    parameters, optimizer = build()
    train(parameters, optimizer, 2)
    save(tmp_path, parameters, optimizer)
    before = (tmp_path / "optimizer.safetensors").read_bytes()
    load(tmp_path, parameters, optimizer)
    train(parameters, optimizer, 2)
    assert (tmp_path / "optimizer.safetensors").read_bytes() == before


def test_the_options_of_the_groups_are_those_of_the_recipe_now(tmp_path):
    parameters, optimizer = build()
    optimizer.param_groups[0]["noted"] = 0.125  # by the optimizer itself
    save(tmp_path, parameters, optimizer)
    others, _ = build()
    other = torch.optim.AdamW(list(others.values()), lr=0.5, betas=(0.5, 0.6))
    load(tmp_path, others, other)
    assert other.param_groups[0]["lr"] == 0.5
    assert other.param_groups[0]["betas"] == (0.5, 0.6)
    assert other.param_groups[0]["noted"] == 0.125
    assert other.param_groups[0]["params"][0] is others["a/b"]


def test_parameters_go_by_name_not_by_place(tmp_path):
    parameters, optimizer = build()
    train(parameters, optimizer, 2)
    save(tmp_path, parameters, optimizer)
    others, _ = build(seed=9)
    other = torch.optim.AdamW(list(reversed(others.values())), lr=0.01)
    load(tmp_path, others, other)
    for name, parameter in parameters.items():
        assert torch.equal(optimizer.state[parameter]["exp_avg"], other.state[others[name]]["exp_avg"])


def refused(folder, parameters, optimizer):
    """The refusal, after checking that nothing was touched."""
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    generator = torch.get_rng_state()
    with pytest.raises(CheckpointError) as caught:
        load(folder, parameters, optimizer)
    assert all(torch.equal(before[name], parameter) for name, parameter in parameters.items())
    assert not optimizer.state and torch.equal(generator, torch.get_rng_state())
    return str(caught.value)


def test_another_optimizer_is_refused(tmp_path):
    save(tmp_path, *build("sgd"))
    assert "expected the state of AdamW, found that of SGD" in refused(tmp_path, *build("adamw"))


def test_other_groups_are_refused(tmp_path):
    parameters, optimizer = build()
    save(tmp_path, parameters, optimizer)
    split = torch.optim.AdamW([{"params": [parameter]} for parameter in parameters.values()], lr=0.01)
    assert "groups to hold (a/b) and (c.d), found (a/b; c.d)" in refused(tmp_path, parameters, split)


def test_the_last_parameter_that_does_not_fit_leaves_the_first_untouched(tmp_path):
    save(tmp_path, *build())
    parameters, _ = build(seed=9)
    parameters["c.d"] = nn.Parameter(torch.zeros(3, 3))
    message = refused(tmp_path, parameters, torch.optim.AdamW(list(parameters.values())))
    assert "expected c.d as torch.float32 (3, 3), found torch.bfloat16 (8, 4)" in message


def test_a_parameter_without_a_name_is_refused(tmp_path):
    parameters, optimizer = build()
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(CheckpointError, match="trains a parameter that is not among"):
        save(tmp_path, parameters, optimizer)


@pytest.mark.parametrize("name", ["adapter_state.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("content", [None, b"", b"\x80\x04N."], ids=["missing", "empty", "pickle"])
def test_what_is_not_a_state_is_said_to_be_none(tmp_path, name, content):
    save(tmp_path, *build())
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="is not a state that can be read"):
        read_state(tmp_path)


def test_a_state_is_three_files(tmp_path):
    save(tmp_path, *build())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_state.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    assert json.loads((tmp_path / "state.json").read_text())["progress"] == {"step": 1, "best": None}
