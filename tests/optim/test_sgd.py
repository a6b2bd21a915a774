"""Our SGD is torch.optim.SGD, field by field, each field with a step and a rate of its own."""

import pytest
import torch

from nfscale.optim import SGD
from tests.optim.descents import (
    CONSTANT,
    SCHEDULE,
    bowls,
    descend,
    mlp_losses,
    mlp_params,
    one,
    quadratic,
    rates_of,
    torch_descend,
)

CASES = pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])


@CASES
def test_sgd_is_torch_sgd_on_an_mlp(momentum, nesterov):
    """Field 1 begins anew after 37 steps and field 2 is at half the rate: torch runs each of them by itself."""
    sgd, start = SGD(0.02, SCHEDULE, momentum, nesterov), mlp_params()
    ours, steps = descend(sgd, mlp_losses(), start, 90, resets={37: 1})
    assert steps.tolist() == [90, 53, 90]
    assert (mlp_losses()(ours) < 0.7 * mlp_losses()(start)).all()
    for index, runs in enumerate(
        [[rates_of(sgd, 90)], [rates_of(sgd, 37), rates_of(sgd, 53)], [rates_of(sgd, 90, 0.5)]]
    ):
        theirs, losses = one(start, index), mlp_losses(slice(index, index + 1))
        for rates in runs:
            theirs = torch_descend(
                lambda tensors: torch.optim.SGD(tensors, lr=1.0, momentum=momentum, nesterov=nesterov),
                losses,
                theirs,
                rates,
            )
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name][index : index + 1], tensor, rtol=1e-9, atol=1e-11)


@CASES
def test_sgd_is_torch_sgd_on_a_quadratic(momentum, nesterov):
    hessians, start = bowls(3, 6), {"x": torch.ones(3, 6, dtype=torch.float64)}
    sgd = SGD(0.02, CONSTANT, momentum, nesterov)
    ours, _ = descend(sgd, quadratic(hessians), start, 50, rate=(1.0, 1.0, 1.0))
    theirs = torch_descend(
        lambda tensors: torch.optim.SGD(tensors, momentum=momentum, nesterov=nesterov),
        quadratic(hessians),
        start,
        rates_of(sgd, 50),
    )
    torch.testing.assert_close(ours["x"], theirs["x"], rtol=1e-10, atol=1e-12)
