"""Learning rates and lengths are pure functions."""

import pytest

from quantune.recipe.schema import TrainingConfig
from quantune.training.schedule import learning_rate, total_steps, warmup_steps


def rates(total, warmup, **config):
    made = TrainingConfig(learning_rate=1.0, **config)
    return [learning_rate(step, config=made, total=total, warmup=warmup) for step in range(total)]


def test_the_warm_up_rises_linearly_to_the_peak():
    assert rates(10, 3, schedule="constant")[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_cosine_falls_from_the_peak_towards_its_end():
    found = rates(100, 0, schedule="cosine")
    assert found[0] == 1.0 and found[50] == pytest.approx(0.5) and 0 < found[-1] < 1e-3
    assert found == sorted(found, reverse=True)


def test_linear_falls_evenly():
    assert rates(4, 0, schedule="linear") == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_the_minimum_is_a_fraction_of_the_peak():
    assert min(rates(100, 10, schedule="cosine", min_lr_ratio=0.1)[10:]) > 0.1


@pytest.mark.parametrize(
    ("config", "samples", "steps"),
    [({"max_steps": 7}, 100, 7), ({}, 100, 13), ({"epochs": 2.0}, 100, 25), ({"epochs": 0.001}, 100, 1)],
)
def test_the_length_of_a_run(config, samples, steps):
    assert total_steps(TrainingConfig(batch_size=8, **config), samples) == steps


def test_the_warm_up_is_three_percent_unless_the_recipe_says_otherwise():
    assert warmup_steps(TrainingConfig(), 200) == 6
    assert warmup_steps(TrainingConfig(warmup_ratio=0.5), 200) == 100
    assert warmup_steps(TrainingConfig(warmup_steps=11), 200) == 11
