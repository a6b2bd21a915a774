"""Levenberg-Marquardt and what it is made of, against dense Jacobians, closed forms and scipy."""

import numpy as np
import pytest
import torch
from scipy import optimize

from nfscale.engine.dispatch import PLAIN
from nfscale.engine.problem import FieldProblem
from nfscale.fields import FIELDS, MLP
from nfscale.optim import Adam, Extra, GaussNewton, Schedule
from nfscale.optim.linearization import damped_solution
from nfscale.rng import as_tensor, datum_seed
from nfscale.signals import Image, Occupancy, Samples
from tests.engine.fits import DATA, STEPS, Stop, assert_as_alone, data_of, fitted
from tests.optim.quadratics import extra_of, layout_of, linear_fields

SEEDS = as_tensor([datum_seed(0, f"datum-{index}") for index in range(3)])
SMALL = MLP(2, 2, width=4, depth=2, omega_0=5.0, omega_hidden=3.0)
STOP = Stop(max_steps=12, check_every=4)


def rows_of(field: MLP = SMALL) -> torch.Tensor:
    return field.layout.ravel(field.init(SEEDS)).double()


def samples_of(count: int, masked: bool = True) -> Samples:
    draw = torch.Generator().manual_seed(0)
    coordinates = torch.rand(3, count, 2, generator=draw, dtype=torch.float64) * 2 - 1
    values = torch.rand(3, count, 2, generator=draw, dtype=torch.float64) - 0.5
    mask = torch.rand(3, count, generator=draw, dtype=torch.float64) if masked else None
    return Samples(coordinates, values, mask)


def problem_of(count: int, field: MLP = SMALL, masked: bool = True) -> FieldProblem:
    return FieldProblem(field, Image(2), samples_of(count, masked), PLAIN)


def dense_jacobian(problem: FieldProblem, rows: torch.Tensor, index: int) -> torch.Tensor:
    """Of the residuals of one field, whose squares sum to its loss, by torch.func: [M, P]."""
    samples = problem.samples.map(lambda tensor: tensor[index : index + 1])

    def residuals(row):
        predicted = problem.field.apply(problem.field.layout.unravel(row[None]), samples.coordinates)
        weight = torch.ones_like(samples.values[..., 0]) if samples.mask is None else samples.mask
        weight = weight / weight.sum() / predicted.shape[-1]
        return ((predicted - samples.values) * weight.sqrt()[..., None]).flatten()

    return torch.func.jacrev(residuals)(rows[index])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("keys", [{}, {"activation": "gaussian"}, {"activation": "relu", "encoding": "positional"}])
def test_a_linearization_is_the_dense_jacobian(keys, masked):
    field = MLP(2, 2, width=4, depth=2, omega_0=5.0, omega_hidden=3.0, **keys)
    problem, rows = problem_of(7, field, masked), rows_of(field)
    line = problem.linearization(rows)
    torch.testing.assert_close(line.losses(), problem.losses(rows))
    torch.testing.assert_close(2 * line.pulled(line.residuals), problem.gradient(rows)[1])
    direction = torch.randn_like(rows)
    for index in range(3):
        jacobian = dense_jacobian(problem, rows, index)
        torch.testing.assert_close(line.gram()[index], jacobian @ jacobian.mT)
        torch.testing.assert_close(line.normal()[index], jacobian.mT @ jacobian)
        torch.testing.assert_close(line.pushed(direction)[index].flatten(), jacobian @ direction[index])
        torch.testing.assert_close(line.pulled(line.residuals)[index], jacobian.mT @ line.residuals[index].flatten())
    assert line.side == min(14, field.layout.size)


def test_the_normal_matrix_does_not_depend_on_how_many_samples_are_taken_at_once(monkeypatch):
    line = problem_of(33).linearization(rows_of())
    whole = line.normal()
    monkeypatch.setattr("nfscale.optim.linearization._JACOBIAN_BYTES", 5 * 8 * 2 * SMALL.layout.size)
    torch.testing.assert_close(line.normal(), whole)


@pytest.mark.parametrize("count", [5, 60])
def test_a_damped_step_is_that_of_the_dense_normal_equations(count):
    """In the space of 10 residuals, and in that of 46 weights where there are 120."""
    problem, rows = problem_of(count), rows_of()
    line, damping = problem.linearization(rows), torch.tensor([1e-3, 0.1, 10.0], dtype=torch.float64)
    step, found = damped_solution(line, -line.residuals, damping)
    assert found.all()
    for index in range(3):
        jacobian = dense_jacobian(problem, rows, index)
        eye = torch.eye(SMALL.layout.size, dtype=torch.float64)
        mean_eigenvalue = jacobian.square().sum() / min(jacobian.shape)
        matrix = jacobian.mT @ jacobian + damping[index] * mean_eigenvalue * eye
        expected = -torch.linalg.solve(matrix, jacobian.mT @ line.residuals[index].flatten())
        torch.testing.assert_close(step[index], expected)


@pytest.mark.parametrize("samples", [4, 40])
def test_linear_least_squares_is_solved_in_one_step_without_damping(samples):
    """With more weights than residuals it is the nearest of many solutions: the one of least norm, from 0."""
    problem = linear_fields(samples)
    rows = torch.zeros(3, 12, dtype=torch.float64)
    solver = GaussNewton(damping=0.0)
    solved, state = solver.solve(problem, rows, solver.init(rows, layout_of(12)), extra_of(3))
    torch.testing.assert_close(solved, problem.solution())
    assert state["damping"].tolist() == [0.0] * 3


def test_a_small_siren_is_fitted_as_well_as_by_scipys_levenberg_marquardt():
    """From the same start, in as many evaluations of residuals and Jacobian; the minima may be others."""
    problem, rows = problem_of(40), rows_of()
    theirs = []
    for index in range(3):

        def residuals(row, index=index):
            everyone = rows.clone()
            everyone[index] = torch.from_numpy(row)
            return problem.linearization(everyone).residuals[index].flatten().numpy()

        def jacobian(row, index=index):
            everyone = rows.clone()
            everyone[index] = torch.from_numpy(row)
            return dense_jacobian(problem, everyone, index).numpy()

        found = optimize.least_squares(residuals, rows[index].numpy(), jacobian, method="lm", max_nfev=60)
        theirs.append(2 * found.cost)
    solver, at = GaussNewton(), rows
    state = solver.init(rows, SMALL.layout)
    for number in range(60):
        at, state = solver.solve(problem, at, state, extra_of(3, number))
    assert np.median(problem.losses(at).numpy() / np.array(theirs)) < 1.2


def test_a_step_that_helps_relaxes_the_damping_and_one_that_does_not_is_refused_and_doubles_it():
    problem = linear_fields(40)

    class Worse:
        """Says that every other place is worse, in the field with index 1."""

        def linearization(self, rows):
            return problem.linearization(rows)

        def losses(self, rows):
            return problem.losses(rows) + torch.tensor([0.0, 1e3, torch.nan])

    rows = torch.zeros(3, 12, dtype=torch.float64)
    solver = GaussNewton(damping=0.1)
    state = solver.init(rows, layout_of(12))
    moved, state = solver.solve(Worse(), rows, state, extra_of(3))
    assert (moved[0] != 0).any()
    assert torch.equal(moved[1:], rows[1:])
    assert state["damping"].tolist() == pytest.approx([0.1 / 3, 0.2, 0.2], rel=0.05)
    _, state = solver.solve(Worse(), moved, state, extra_of(3))
    assert state["damping"].tolist()[1:] == pytest.approx([0.8, 0.8])
    assert state["growth"].tolist() == [2.0, 8.0, 8.0]


def test_a_matrix_that_is_not_positive_definite_refuses_the_step_of_its_field_alone():
    problem = linear_fields(40)
    problem.inputs[1, :, 0] = problem.inputs[1, :, 1]  # two columns of J are one
    rows = torch.zeros(3, 12, dtype=torch.float64)
    solver = GaussNewton(damping=0.0)
    state = solver.init(rows, layout_of(12))
    for number in range(3):
        rows, state = solver.solve(problem, rows, state, extra_of(3, number))
    torch.testing.assert_close(rows[[0, 2]], problem.solution()[[0, 2]])
    torch.testing.assert_close(problem.losses(rows), problem.losses(problem.solution()))


def test_a_restarted_field_begins_with_more_damping():
    problem = linear_fields(40)
    rows = torch.zeros(3, 12, dtype=torch.float64)
    solver = GaussNewton(damping=0.1)
    extra = Extra(torch.zeros(3).long(), torch.tensor([1.0, 0.5, 0.25]))
    moved, _ = solver.solve(problem, rows, solver.init(rows, layout_of(12)), extra)
    for index, damping in enumerate((0.1, 0.2, 0.4)):
        other = GaussNewton(damping=damping)
        alone, _ = other.solve(problem, rows, other.init(rows, layout_of(12)), extra_of(3))
        torch.testing.assert_close(moved[index], alone[index])


@pytest.mark.parametrize("step", STEPS)
def test_a_fit_is_that_of_the_field_alone_bit_for_bit(step):
    """Five data through three slots, so that fields at different steps share the batch."""
    how = {"optimizer": GaussNewton(), "stop": STOP, "step": step}
    assert_as_alone(fitted(DATA, batch=3, **how), DATA, **how)


def test_it_needs_far_fewer_steps_than_adam():
    target = Stop(max_steps=400, target=30.0, check_every=1)
    adam = Adam(Adam.auto_learning_rate(12, 1.0, 63), Schedule("constant"))
    steps = [
        sorted(result.steps for result in fitted(DATA, optimizer=optimizer, stop=target).values())
        for optimizer in (GaussNewton(), adam)
    ]
    assert 10 * steps[0][2] <= steps[1][2], steps


def test_what_would_not_fit_is_refused_with_its_size_before_a_step():
    small = GaussNewton(largest_system=50)
    fitted(data_of(2, 7, 7), optimizer=small, stop=STOP)
    with pytest.raises(ValueError, match=r"GaussNewton.*63 x 63.*0 MiB.*63 residuals and 205 weights.*=50; use lbfgs"):
        fitted(DATA, optimizer=small, stop=STOP)


@pytest.mark.parametrize(
    ("field", "signal", "why"),
    [
        (FIELDS["hash_grid"](2, 1), Image(1), "the field is a HashGrid"),
        (MLP(2, 1, activation="gabor"), Image(1), "not those of activation=gabor"),
        (MLP(3, 1), Occupancy(1), "not the loss of Occupancy"),
    ],
)
def test_what_it_cannot_take_apart_is_refused_in_a_sentence(field, signal, why):
    with pytest.raises(ValueError, match=f"GaussNewton cannot fit this: .*{why}; use"):
        fitted([], optimizer=GaussNewton(), field=field, signal=signal)


def test_values_that_make_no_sense_are_refused_by_name():
    with pytest.raises(ValueError, match=r"damping.*-1"):
        GaussNewton(damping=-1)
