"""The solver is the published algorithm, kept group by group."""

import pytest
import torch

from quantune_hqq.solver import BETA, errors_of, fit_zeros, taken_by_shrinking

LOW, HIGH = -8, 7


def groups_in_steps(count=256, size=64):
    """Heavy-tailed groups scaled so that their range is that of the codes, and the zero points that fit it."""
    torch.manual_seed(0)
    groups = torch.distributions.StudentT(3.0).sample((count, size))
    groups = groups / ((groups.amax(1) - groups.amin(1)) / (HIGH - LOW))[:, None]
    return groups, LOW - groups.amin(1)


def fit(groups, zeros, **changes):
    arguments = {"low": LOW, "high": HIGH, "iterations": 20, "lp_norm": 0.7, "rounded": lambda zeros: zeros}
    return fit_zeros(groups, zeros, **{**arguments, **changes})


def published_update(weight, scale, zero, beta, p):
    """One turn of the paper's loop, in its terms: unsigned codes, scale the inverse of the step."""
    codes = (weight * scale + zero).round().clamp(0, HIGH - LOW)
    error = weight - (codes - zero) / scale
    kept = error.sign() * (error.abs() - error.abs().pow(p - 1) / beta).clamp(min=0)
    return (codes - (weight - kept) * scale).mean(dim=1, keepdim=True)


@pytest.mark.parametrize("p", [0.5, 0.7, 1.0])
def test_an_update_is_that_of_the_paper(p):
    groups, zeros = groups_in_steps()
    expected = published_update(groups.double(), 1.0, (zeros - LOW).double()[:, None], BETA, p).view(-1) + LOW
    found = zeros - taken_by_shrinking(errors_of(groups, zeros, LOW, HIGH), BETA, p).mean(1)
    assert torch.allclose(found.double(), expected, atol=1e-5)


@pytest.mark.parametrize("p", [0.5, 0.7, 1.0])
def test_an_update_is_that_of_the_hqq_package(p):
    optimize = pytest.importorskip("hqq.core.optimize", reason="compares with the hqq package, which is not installed")
    groups, zeros = groups_in_steps()
    arguments = (groups, torch.ones_like(zeros)[:, None], (zeros - LOW)[:, None], [0, HIGH - LOW], BETA, p, 1)
    _, _, expected, _ = optimize.optimize_weights_proximal_legacy_step(*arguments)
    found = zeros - taken_by_shrinking(errors_of(groups, zeros, LOW, HIGH), BETA, p).mean(1)
    assert torch.allclose(found, expected.view(-1) + LOW, atol=1e-5)


def test_no_group_gets_worse_and_most_get_better():
    groups, zeros = groups_in_steps()
    before, after = (errors_of(groups, z, LOW, HIGH).abs().mean(1) for z in (zeros, fit(groups, zeros)))
    assert (after <= before).all()
    assert (after < before).float().mean() > 0.8


def test_a_group_is_fitted_as_if_alone():
    groups, zeros = groups_in_steps(count=40)
    together = fit(groups, zeros)
    alone = torch.cat([fit(groups[i : i + 1], zeros[i : i + 1]) for i in range(40)])
    assert torch.equal(together, alone)


def test_zero_points_are_those_that_can_be_stored():
    groups, zeros = groups_in_steps()
    zeros = zeros.half().float()
    found = fit(groups, zeros, rounded=lambda zeros: zeros.half().float())
    assert torch.equal(found, found.half().float()) and not torch.equal(found, zeros)


def test_without_iterations_zero_points_stay():
    groups, zeros = groups_in_steps()
    assert torch.equal(fit(groups, zeros, iterations=0), zeros)


def test_more_iterations_never_make_a_group_worse():
    groups, zeros = groups_in_steps()
    errors = [errors_of(groups, fit(groups, zeros, iterations=n), LOW, HIGH).abs().mean(1) for n in (0, 1, 5, 20, 60)]
    assert all((later <= earlier).all() for earlier, later in zip(errors, errors[1:], strict=False))


def test_groups_without_an_error_stay():
    groups = torch.arange(LOW, HIGH + 1.0).repeat(4, 2)
    for p in (0.7, 1.0):
        assert torch.equal(fit(groups, torch.zeros(4), lp_norm=p), torch.zeros(4))
