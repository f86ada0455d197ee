"""A run restored from its state goes on as if it had not stopped."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from quantune.checkpoint.state import load_state, save_state
from quantune.errors import CheckpointError
from quantune.recipe.schema import TrainingConfig
from quantune.training.optimizer import build_optimizer

PRINTS = {"[adapter]": {"r": 8}, "the packed weights": "abc"}


class Run:
    """A small training run with every source of randomness in it."""

    def __init__(self, seed, optimizer="adamw"):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        self.model = nn.Sequential(nn.Linear(64, 128), nn.Dropout(0.3), nn.Linear(128, 1))
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = build_optimizer(self.parameters.values(), TrainingConfig(optimizer=optimizer))

    def steps(self, count):
        for _ in range(count):
            x = torch.randn(8, 64) + random.random() + np.random.rand()
            self.model(x).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def save(self, folder, **more):
        arguments = {"parameters": self.parameters, "optimizer": self.optimizer, "fingerprints": PRINTS}
        save_state(folder, progress={"step": 5}, **{**arguments, **more})

    def load(self, folder, **more):
        arguments = {"parameters": self.parameters, "optimizer": self.optimizer, "fingerprints": PRINTS}
        return load_state(folder, **{**arguments, **more})


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


def test_there_is_no_pickle_in_a_state(tmp_path):
    run = Run(0)
    run.steps(1)
    run.save(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}


def test_what_changed_is_named(tmp_path):
    Run(0).save(tmp_path)
    with pytest.raises(CheckpointError, match=r"the packed weights changed since"):
        Run(0).load(tmp_path, fingerprints=PRINTS | {"the packed weights": "xyz"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("0.bias"), "trains other parameters than this recipe, e.g. 0.bias"),
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
