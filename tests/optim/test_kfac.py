"""K-FAC's parts against dense matrices: factors, preconditioning, rescaling; and whole fits."""

import pytest
import torch

from nfscale.engine.dispatch import PLAIN
from nfscale.engine.problem import FieldProblem
from nfscale.fields import MLP
from nfscale.optim import KFAC, Adam, Extra, Schedule
from nfscale.optim.kfac import preconditioned, rescaled
from nfscale.rng import as_tensor, datum_seed
from nfscale.signals import Image, Samples
from tests.engine.fits import DATA, STEPS, Stop, assert_same_bits, fitted
from tests.optim.quadratics import extra_of, linear_fields

SEEDS = as_tensor([datum_seed(0, f"datum-{index}") for index in range(3)])
SMALL = MLP(2, 2, width=4, depth=2, omega_0=5.0, omega_hidden=3.0)
STOP = Stop(max_steps=10, check_every=5)


def line_and_rows(count: int = 20):
    draw = torch.Generator().manual_seed(0)
    coordinates = torch.rand(3, count, 2, generator=draw, dtype=torch.float64) * 2 - 1
    values = torch.rand(3, count, 2, generator=draw, dtype=torch.float64) - 0.5
    mask = torch.rand(3, count, generator=draw, dtype=torch.float64)
    rows = SMALL.layout.ravel(SMALL.init(SEEDS)).double()
    problem = FieldProblem(SMALL, Image(2), Samples(coordinates, values, mask), PLAIN)
    return problem.linearization(rows), rows


def in_rows(block: torch.Tensor, outputs: int) -> torch.Tensor:
    """A matrix over (W | b) in row order, brought into the order of a row: all of W, then b."""
    wide = len(block) // outputs - 1
    places = torch.arange(outputs * (wide + 1)).view(outputs, wide + 1)
    order = torch.cat([places[:, :-1].flatten(), places[:, -1]])
    return block[order][:, order]


def kronecker(factors: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
    inputs, deltas = (factor[index] for factor in factors)
    return in_rows(torch.kron(deltas.contiguous(), inputs.contiguous()), len(deltas))


def test_the_factors_of_a_linear_layer_are_its_exact_gauss_newton_matrix():
    """And so its Hessian: the loss of a linear field is quadratic. To the last digits of float64."""
    problem = linear_fields(9)
    rows = torch.randn(3, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    line = problem.linearization(rows)
    ((inputs, deltas),) = line.factors()
    assert deltas.shape == (3, 2, 2)
    for index in range(3):
        product = kronecker((inputs, deltas), index)
        torch.testing.assert_close(product, 2 * line.normal()[index], rtol=1e-14, atol=1e-15)

        def loss(row, index=index):
            everyone = torch.stack([row if n == index else rows[n] for n in range(3)])
            return problem.losses(everyone)[index]

        torch.testing.assert_close(product, torch.autograd.functional.hessian(loss, rows[index]))


def test_the_factors_of_the_last_layer_of_a_siren_are_its_exact_block():
    line, _ = line_and_rows()
    last = line.factors()[-1]
    size = 2 * 5
    for index in range(3):
        torch.testing.assert_close(kronecker(last, index), 2 * line.normal()[index][-size:, -size:])


def test_the_factors_of_every_layer_are_exact_where_one_sample_is_all():
    """Nothing is averaged over samples then, and the product is exact."""
    line, _ = line_and_rows(count=1)
    matrix, place = 2 * line.normal(), 0
    for factors in line.factors():
        size = factors[0].shape[1] * factors[1].shape[1]
        for index in range(3):
            block = matrix[index, place : place + size, place : place + size]
            torch.testing.assert_close(kronecker(factors, index), block)
        place += size
    assert place == SMALL.layout.size


def test_preconditioning_is_the_inverse_of_the_damped_kronecker_products():
    line, rows = line_and_rows()
    factors, damping = line.factors(), torch.tensor([1e-3, 0.1, 10.0], dtype=torch.float64)
    gradient = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, place = preconditioned(line, gradient, factors, damping), 0
    for inputs, deltas in factors:
        size = inputs.shape[1] * deltas.shape[1]
        for index in range(3):
            share = (inputs[index].diagonal().mean() / deltas[index].diagonal().mean()).sqrt()
            root = damping[index].sqrt()
            one = inputs[index] + root * share * torch.eye(len(inputs[index]))
            other = deltas[index] + root / share * torch.eye(len(deltas[index]))
            expected = torch.linalg.solve(
                in_rows(torch.kron(other, one), len(other)), gradient[index, place : place + size]
            )
            torch.testing.assert_close(found[index, place : place + size], expected)
        place += size


def test_rescaling_minimises_the_damped_quadratic_model_over_both_directions():
    line, rows = line_and_rows()
    draw = torch.Generator().manual_seed(0)
    gradient = 2 * line.pulled(line.residuals)
    ways = [torch.randn(rows.shape, generator=draw, dtype=torch.float64) for _ in range(2)]
    ways[1][1] = 0  # of a field at its first step
    ways[1][2] = -3 * ways[0][2]  # along the same line
    damping = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    step, predicted = rescaled(line, gradient, *ways, damping)
    for index in range(3):
        matrix = 2 * line.normal()[index] + damping[index] * torch.eye(SMALL.layout.size)
        basis = torch.stack([way[index] for way in ways], dim=1)[:, : 2 if index == 0 else 1]
        best = -torch.linalg.solve(basis.mT @ matrix @ basis, basis.mT @ gradient[index])
        torch.testing.assert_close(step[index], basis @ best)
        model = gradient[index] @ step[index] + 0.5 * step[index] @ matrix @ step[index]
        torch.testing.assert_close(predicted[index], -model)


def test_a_linear_field_is_solved_in_one_step_with_next_to_no_damping():
    """Its factors are exact, so the step is Newton's."""
    problem, solver = linear_fields(40), KFAC(damping=1e-20)
    rows = torch.zeros(3, 12, dtype=torch.float64)
    state = solver.init(rows, MLP(5, 2, width=4, depth=1).layout)
    state["inputs"], state["deltas"] = {"0": torch.zeros(3, 6, 6).double()}, {"0": torch.zeros(3, 2, 2).double()}
    moved, _ = solver.solve(problem, rows, state, extra_of(3))
    torch.testing.assert_close(moved, problem.solution(), rtol=1e-6, atol=1e-7)


def test_factors_are_estimated_at_the_fields_own_cadence():
    line, rows = line_and_rows()

    class Problem:
        def linearization(self, rows):
            return line

        def losses(self, rows):
            return line.losses() * 0.5

    solver = KFAC(update_every=5)
    state = solver.init(rows, SMALL.layout)
    _, state = solver.solve(Problem(), rows, state, Extra(torch.tensor([0, 3, 10]), torch.ones(3)))
    (inputs, deltas), *_ = line.factors()
    for found, expected in ((state["inputs"]["0"], inputs), (state["deltas"]["0"], deltas)):
        assert torch.equal(found[[0, 2]], expected[[0, 2]])
        assert not found[1].any()


@pytest.mark.parametrize(
    ("after", "factor"), [(0.0, 0.6), (0.5, 1.0), (0.9, 1 / 0.6), (1.5, 0.6**-3), (float("nan"), 0.6**-3)]
)
def test_the_damping_follows_what_a_step_gained_of_what_was_predicted(after, factor):
    """`after`: how much of the gain is missing that the undamped model predicts, a little more than the damped one."""
    line, rows = line_and_rows()
    solver = KFAC()

    class Problem:
        def linearization(self, rows):
            return line

        def losses(self, moved):
            model = (line.residuals + line.pushed(moved - rows)).square().flatten(1).sum(dim=1)
            return line.losses() - (1 - after) * (line.losses() - model)

    moved, state = solver.solve(Problem(), rows, solver.init(rows, SMALL.layout), extra_of(3))
    torch.testing.assert_close(state["damping"], torch.full((3,), 0.01 * factor, dtype=torch.float64))
    assert torch.equal(moved, rows) == (not after < 1)
    assert bool(state["step"].any()) == (after < 1)


@pytest.mark.parametrize("step", STEPS)
def test_a_fit_is_that_of_the_field_alone(step):
    """Five data through three slots, so that fields at different steps share the batch.

    What is promised is equality to rounding: factors have odd sizes (13 here), which the matrix library may sum in
    another order at another alignment. Where this was written the bits were the same.
    """
    how = {"optimizer": KFAC(), "stop": STOP, "step": step}
    together = fitted(DATA, batch=3, **how)
    for datum in DATA:
        alone = fitted([datum], **how)[datum[0]]
        torch.testing.assert_close(together[datum[0]].weights, alone.weights, rtol=1e-3, atol=1e-4)
        assert together[datum[0]].history_step == alone.history_step


def test_it_needs_far_fewer_steps_than_adam():
    target = Stop(max_steps=400, target=30.0, check_every=1)
    adam = Adam(Adam.auto_learning_rate(12, 1.0, 63), Schedule("constant"))
    steps = [
        sorted(result.steps for result in fitted(DATA, optimizer=optimizer, stop=target).values())
        for optimizer in (KFAC(), adam)
    ]
    assert 4 * steps[0][2] <= steps[1][2], steps


def test_the_same_fit_gives_the_same_bits():
    first, second = (fitted(DATA, optimizer=KFAC(), stop=STOP) for _ in range(2))
    for datum_id, result in first.items():
        assert_same_bits(result, second[datum_id])


@pytest.mark.parametrize(("key", "value"), [("damping", 0), ("adaptation", 1.0), ("update_every", 0)])
def test_values_that_make_no_sense_are_refused_by_name(key, value):
    with pytest.raises(ValueError, match=key):
        KFAC(**{key: value})
