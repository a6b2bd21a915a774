"""Rates of each param's own: Adam with as many rates as params, against torch."""

import pytest
import torch

from nfscale.engine import updates
from nfscale.layout import Layout
from nfscale.optim import SGD, Adam, Extra, Scaled, Schedule

CONSTANT = Schedule("constant", 10)
LAYOUT = Layout.of([("layers.0.weight", (3, 2)), ("layers.0.bias", (3,))])
FACTORS = torch.linspace(0.2, 3, LAYOUT.size)


def steps_of(optimizer, by_name: bool, count: int = 4) -> torch.Tensor:
    """Rows [F, P] after some steps against gradients that are the params themselves, cubed."""
    rows = torch.randn(2, LAYOUT.size, generator=torch.Generator().manual_seed(0))

    def taken(rows: torch.Tensor):
        return LAYOUT.unravel(rows) if by_name else {"rows": rows}

    state = optimizer.init(taken(rows))
    for number in range(count):
        extra = Extra(torch.full((2,), number), torch.ones(2))
        moved, state = optimizer.update(taken(rows**3), state, taken(rows), extra)
        rows = rows + (LAYOUT.ravel(moved) if by_name else moved["rows"])
    return rows


@pytest.mark.parametrize("by_name", [True, False])
def test_every_param_has_a_rate_of_its_own(by_name):
    rows = torch.randn(2, LAYOUT.size, generator=torch.Generator().manual_seed(0))
    apart = [torch.nn.Parameter(rows[:, place].clone()) for place in range(LAYOUT.size)]
    groups = [{"params": [one], "lr": 0.1 * float(factor)} for one, factor in zip(apart, FACTORS, strict=True)]
    reference = torch.optim.Adam(groups, betas=(0.3, 0.7))
    for _ in range(4):
        for one in apart:
            one.grad = one.detach() ** 3
        reference.step()
    ours = steps_of(Scaled(Adam(0.1, CONSTANT, 0.3, 0.7), FACTORS), by_name)
    torch.testing.assert_close(ours, torch.stack([one.detach() for one in apart], dim=1), rtol=1e-5, atol=1e-6)


def test_factors_of_one_are_the_optimiser_itself():
    adam = Adam(0.1, CONSTANT)
    assert torch.equal(steps_of(Scaled(adam, torch.ones(LAYOUT.size)), False), steps_of(adam, False))


def test_only_steps_that_take_all_updates_take_those_of_adam_scaled():
    scaled = Scaled(Adam(0.1, CONSTANT), FACTORS)
    assert updates.knows(scaled, all_of_them=True)
    assert not updates.knows(scaled)
    assert not updates.knows(Scaled(SGD(0.1, CONSTANT), FACTORS), all_of_them=True)
    assert (scaled.elementwise, scaled.needs, scaled.learning_rate, scaled.update_every) == (True, frozenset(), 0.1, 1)


def test_rates_of_another_field_are_refused():
    with pytest.raises(ValueError, match="8 rates cannot be those of fields of 9 weights"):
        steps_of(Scaled(Adam(0.1, CONSTANT), FACTORS[:8]), False)
