"""SPRING against the formula written out, and as what it is: a Kaczmarz method with momentum."""

import pytest
import torch

from nfscale.optim import Extra, Schedule, Spring
from tests.engine.fits import DATA, STEPS, Stop, assert_as_alone, fitted
from tests.optim.quadratics import LinearFields, layout_of, linear_fields

CONSTANT = Schedule("constant")
STOP = Stop(max_steps=20, check_every=10)


def part_of(problem: LinearFields, samples: slice) -> LinearFields:
    weights = problem.weights[:, samples]
    kept = problem.inputs[:, samples], problem.values[:, samples]
    return LinearFields(*kept, weights / weights.sum(dim=1, keepdim=True))


def test_a_step_is_the_formula_with_a_dense_jacobian():
    problem, solver = linear_fields(3), Spring(0.3, CONSTANT, momentum=0.8, damping=0.1)
    draw = torch.Generator().manual_seed(0)
    rows, last = (torch.randn(3, 12, generator=draw, dtype=torch.float64) for _ in range(2))
    extra = Extra(torch.zeros(3).long(), torch.tensor([1.0, 0.5, 0.25]))
    moved, state = solver.solve(problem, rows, {"step": last.clone()}, extra)
    line = problem.linearization(rows)
    for index in range(3):
        jacobian = line._jacobian(slice(None))[index]
        kernel, residuals = jacobian @ jacobian.mT, line.residuals[index].flatten()
        kernel += 0.1 * kernel.trace() / 6 * torch.eye(6)
        kept = 0.8 * last[index]
        expected = kept - jacobian.mT @ torch.linalg.solve(kernel, residuals + jacobian @ kept)
        torch.testing.assert_close(state["step"][index], expected)
        torch.testing.assert_close(moved[index], rows[index] + 0.3 * float(extra.rate[index]) * expected)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_minibatches_of_equations_that_agree_are_solved_one_after_the_other(momentum):
    """Kaczmarz: each step satisfies the equations of its own minibatch, and all come to agree."""
    whole = linear_fields(24)
    truth = torch.randn(3, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    residuals = whole.linearization(truth).residuals / (whole.weights / 2).sqrt()[..., None]
    consistent = LinearFields(whole.inputs, whole.values + residuals, whole.weights)
    solver = Spring(1.0 - momentum, CONSTANT, momentum=momentum, damping=1e-10)
    rows = torch.zeros(3, 12, dtype=torch.float64)
    state = solver.init(rows, layout_of(12))
    for number in range(2000):
        part = part_of(consistent, slice(number % 8 * 3, number % 8 * 3 + 3))
        rows, state = solver.solve(part, rows, state, Extra(torch.zeros(3).long(), torch.ones(3)))
        if number == 0 and momentum == 0:
            torch.testing.assert_close(part.losses(rows), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(rows, truth, rtol=1e-3, atol=1e-3)


def test_the_rate_follows_the_schedule_at_the_fields_own_step():
    problem, solver = linear_fields(3), Spring(0.5, Schedule("cosine", total_steps=10), momentum=0.0)
    rows = torch.zeros(3, 12, dtype=torch.float64)
    extra = Extra(torch.tensor([0, 5, 10]), torch.ones(3))
    moved, state = solver.solve(problem, rows, solver.init(rows, layout_of(12)), extra)
    torch.testing.assert_close(moved, torch.tensor([0.5, 0.25, 0.0]).double()[:, None] * state["step"])


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("samples", [16, "full"])
def test_a_fit_is_that_of_the_field_alone_bit_for_bit(step, samples):
    """Five data through three slots, so that fields at different steps share the batch."""
    how = {"optimizer": Spring(0.1, CONSTANT), "stop": STOP, "step": step, "samples": samples}
    assert_as_alone(fitted(DATA, batch=3, **how), DATA, **how)


def test_minibatches_are_small_systems_where_all_samples_would_be_too_large():
    solver = Spring(0.1, CONSTANT, largest_system=20)
    fitted(DATA[:2], optimizer=solver, stop=STOP, samples=16)
    with pytest.raises(ValueError, match=r"Spring.*63 x 63.*use fewer fit.samples"):
        fitted(DATA[:2], optimizer=solver, stop=STOP)


@pytest.mark.parametrize(("key", "value"), [("damping", 0), ("momentum", 1.0), ("momentum", -0.1)])
def test_values_that_make_no_sense_are_refused_by_name(key, value):
    with pytest.raises(ValueError, match=key):
        Spring(0.1, CONSTANT, **{key: value})
