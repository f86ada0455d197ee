"""A run restored from its state goes on as if it had not stopped."""

import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import save_state
from torch import nn

from quantune.checkpoint.state import restore
from quantune.errors import CheckpointError
from quantune.recipe.schema import TrainingConfig
from quantune.training.optimizer import build_optimizer


class Run:
    """A small training run with every source of randomness in it."""

    def __init__(self, seed, optimizer="adamw"):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        self.model = nn.Sequential(nn.Linear(64, 128), nn.Dropout(0.3), nn.Linear(128, 1))
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = build_optimizer(self.parameters, TrainingConfig(optimizer=optimizer))

    def steps(self, count):
        for _ in range(count):
            x = torch.randn(8, 64) + random.random() + np.random.rand()
            self.model(x).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def save(self, folder):
        save_state(folder, parameters=self.parameters, optimizer=self.optimizer, progress={"step": 5})

    def load(self, folder):
        return restore(folder, parameters=self.parameters, optimizer=self.optimizer)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_five_steps_saved_loaded_and_five_more_equal_ten(tmp_path, optimizer):
    whole = Run(0, optimizer)
    whole.steps(10)
    first = Run(0, optimizer)
    first.steps(5)
    first.save(tmp_path)
    second = Run(99, optimizer)  # other weights and other generators
    assert second.load(tmp_path) == {"step": 5}
    second.steps(5)
    for name, parameter in whole.parameters.items():
        assert torch.equal(second.parameters[name], parameter)


def test_without_loading_the_same_comparison_fails(tmp_path):
    whole, other = Run(0), Run(99)
    whole.steps(10)
    other.steps(5)
    assert not torch.equal(whole.parameters["0.weight"], other.parameters["0.weight"])


def test_saving_changes_nothing_and_twice_gives_the_same_bytes(tmp_path):
    silent = Run(0, "adamw_8bit")
    silent.steps(3)
    saving = Run(0, "adamw_8bit")
    saving.steps(2)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        saving.save(tmp_path / name)
    saving.steps(1)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert torch.equal(saving.parameters["0.weight"], silent.parameters["0.weight"])


def test_every_generator_goes_on_where_it_was(tmp_path):
    run = Run(0)
    np.random.randn()  # leaves a second normal draw in store
    random.gauss(0, 1)
    run.save(tmp_path)
    expected = [torch.rand(1).item(), random.gauss(0, 1), np.random.randn(), np.random.rand()]
    Run(99).load(tmp_path)
    assert [torch.rand(1).item(), random.gauss(0, 1), np.random.randn(), np.random.rand()] == expected


def test_eight_bit_moments_are_kept_in_eight_bit(tmp_path):
    run = Run(0, "adamw_8bit")
    run.steps(1)
    run.save(tmp_path)
    assert load_file(tmp_path / "optimizer.safetensors")["0.weight/state1"].dtype == torch.uint8


def test_there_is_no_pickle_in_a_state(tmp_path):
    run = Run(0)
    run.steps(1)
    run.save(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}


def test_the_state_of_another_optimizer_is_refused(tmp_path):
    Run(0).save(tmp_path)
    with pytest.raises(CheckpointError, match="expected the state of AdamW8bit, found that of AdamW"):
        Run(0, "adamw_8bit").load(tmp_path)


@pytest.mark.parametrize("name", ["state.json", "optimizer.safetensors"])
@pytest.mark.parametrize("data", [None, b"", b"{}", b"\x00\xff" * 50])
def test_a_state_that_can_not_be_read_is_a_checkpoint_error(tmp_path, name, data):
    Run(0).save(tmp_path)
    (tmp_path / name).unlink()
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError):
        Run(0).load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("0.bias"), "trains other parameters than this recipe, e.g. 0.bias"),
        (lambda p: p.update({"9.bias": p["0.bias"]}), "trains other parameters than this recipe, e.g. 9.bias"),
        (lambda p: p.update({"0.bias": nn.Parameter(torch.zeros(3))}), r"expected 0.bias as torch.float32 \(3,\)"),
        (lambda p: p.update({"0.bias": nn.Parameter(torch.zeros(128).half())}), "expected 0.bias as torch.float16"),
    ],
)
def test_other_parameters_are_refused(tmp_path, change, message):
    Run(0).save(tmp_path)
    run = Run(0)
    change(run.parameters)
    with pytest.raises(CheckpointError, match=message):
        run.load(tmp_path)
