"""L-BFGS against scipy's, torch's, the dense BFGS formula and the conditions that its line search promises."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import optimize

from nfscale.optim import LBFGS, Adam, Schedule
from tests.engine.fits import DATA, FIELD, SEED, STEPS, Stop, assert_as_alone, fitted
from tests.optim.quadratics import Function, extra_of, layout_of, positive_definite, quadratic

STOP = Stop(max_steps=12, check_every=4)


def solved(solver, problem, rows, count):
    """Rows after every step, and the last state."""
    state, history = solver.init(rows, layout_of(rows.shape[1])), [rows]
    for number in range(count):
        rows, state = solver.solve(problem, rows, state, extra_of(len(rows), number))
        history.append(rows)
    return history, state


@pytest.mark.parametrize("condition", [10.0, 1000.0])
def test_a_quadratic_takes_about_as_many_steps_as_scipys(condition):
    """Of each field alone, to the same gradient, with the same history."""
    hessians = positive_definite(3, 12, condition)
    minima = torch.randn(3, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    problem, rows = quadratic(hessians, minima), torch.ones(3, 12, dtype=torch.float64)
    history, _ = solved(LBFGS(history=12), problem, rows, 150)
    for index in range(3):

        def value(x, index=index):
            away = x - minima[index].numpy()
            slope = hessians[index].numpy() @ away
            return 0.5 * away @ slope, slope

        options = {"maxcor": 12, "gtol": 1e-8, "ftol": 0}
        theirs = optimize.minimize(value, np.ones(12), jac=True, method="L-BFGS-B", options=options)
        ours = next(
            number
            for number, at in enumerate(history)
            if (hessians[index] @ (at[index] - minima[index])).abs().max() < 1e-8
        )
        assert ours <= 1.25 * theirs.nit + 3, (ours, theirs.nit)
    torch.testing.assert_close(history[-1], minima)


def test_with_exact_line_searches_a_quadratic_is_solved_in_as_many_steps_as_it_has_dimensions():
    """Nocedal & Wright, theorem 6.4: the directions are then those of conjugate gradients. Here in their own loop."""
    hessians = positive_definite(2, 7, 50.0)
    problem, solver = quadratic(hessians, torch.zeros(2, 7, dtype=torch.float64)), LBFGS(history=7)
    rows = torch.ones(2, 7, dtype=torch.float64)
    state = solver.init(rows, layout_of(7))
    for _ in range(7):
        gradient = problem.gradient(rows)[1]
        direction = solver._direction(state, gradient)
        bent = (direction * (hessians @ direction[..., None])[..., 0]).sum(dim=1)
        step = -((gradient * direction).sum(dim=1) / bent)[:, None] * direction
        solver._remember(state, step, problem.gradient(rows + step)[1] - gradient)
        rows = rows + step
    torch.testing.assert_close(rows, torch.zeros_like(rows), rtol=0, atol=1e-9)


def test_the_direction_is_that_of_the_dense_bfgs_matrix():
    """H <- (I - s y^T / s.y) H (I - y s^T / s.y) + s s^T / s.y over the last pairs, begun at (s.y / y.y) I.

    Fields have 0, 2 and 7 pairs, of which 4 are kept.
    """
    draw, solver = torch.Generator().manual_seed(0), LBFGS(history=4)
    hessians = positive_definite(3, 6, 30.0)
    state = solver.init(torch.zeros(3, 6, dtype=torch.float64), layout_of(6))
    kept: list[list] = [[], [], []]
    for number in range(7):
        steps = torch.randn(3, 6, generator=draw, dtype=torch.float64)
        steps[[n for n, count in enumerate((0, 2, 7)) if number >= count]] = 0
        changes = (hessians @ steps[..., None])[..., 0]
        solver._remember(state, steps, changes)
        for index in range(3):
            if steps[index].any():
                kept[index].append((steps[index], changes[index]))
    assert state["pairs"].tolist() == [0, 2, 7]
    gradient = torch.randn(3, 6, generator=draw, dtype=torch.float64)
    found = solver._direction(state, gradient)
    eye = torch.eye(6, dtype=torch.float64)
    for index in range(3):
        inverse = eye
        for number, (s, y) in enumerate(kept[index][-4:]):
            if number == 0:
                last, change = kept[index][-1]
                inverse = eye * (last @ change) / (change @ change)
            left = eye - torch.outer(s, y) / (s @ y)
            inverse = left @ inverse @ left.mT + torch.outer(s, s) / (s @ y)
        torch.testing.assert_close(found[index], -inverse @ gradient[index])


def rosenbrock(rows, fields):
    """Whose valley is narrower in the second field."""
    steepness = torch.tensor([100.0, 1000.0], dtype=rows.dtype)[fields, None]
    return (steepness * (rows[:, 1:] - rows[:, :-1] ** 2) ** 2 + (1 - rows[:, :-1]) ** 2).sum(dim=1)


def test_a_curved_valley_takes_about_as_many_gradients_as_torchs():
    rows = torch.tensor([[-1.2, 1.0]], dtype=torch.float64).repeat(2, 1)
    problem = Function(rosenbrock, 2)
    history, _ = solved(LBFGS(history=10), problem, rows, 150)
    torch.testing.assert_close(history[-1], torch.ones_like(rows))
    for index in range(2):
        taken = Function(rosenbrock, 2)
        ours = next(n for n, at in enumerate(history) if float(problem.losses(at)[index]) < 1e-10)
        solved(LBFGS(history=10), taken, rows, ours)
        theirs = torch.nn.Parameter(rows[index].clone())
        seen = []

        def closure(theirs=theirs, index=index, seen=seen):
            theirs.grad = None
            loss = rosenbrock(theirs[None], torch.tensor([index]))[0]
            loss.backward()
            seen.append(loss.item())
            return loss

        keys = {"max_iter": 200, "tolerance_grad": 0, "tolerance_change": 0}
        torch.optim.LBFGS([theirs], history_size=10, line_search_fn="strong_wolfe", **keys).step(closure)
        asked = next(n for n, loss in enumerate(seen) if loss < 1e-10)
        assert int(taken.asked[index]) <= 1.3 * asked, (taken.asked, asked)


def test_every_step_lowers_the_loss_enough_and_flattens_the_slope():
    """The weak Wolfe conditions, at every step whose search was not given up."""
    rows = torch.tensor([[-1.2, 1.0]], dtype=torch.float64).repeat(2, 1)
    problem = Function(rosenbrock, 2)
    history, _ = solved(LBFGS(max_evaluations=30), problem, rows, 40)
    for before, after in pairwise(history):
        (loss, gradient), (next_loss, next_gradient) = problem.gradient(before), problem.gradient(after)
        slope, next_slope = ((g * (after - before)).sum(dim=1) for g in (gradient, next_gradient))
        moving = loss > 1e-20
        assert (next_loss[moving] <= (loss + 1e-4 * slope)[moving] + 1e-18).all()
        assert (next_slope[moving] >= 0.9 * slope[moving]).all()


def test_a_gradient_that_lies_leaves_the_field_where_it_is_and_empties_its_history():
    class Lying(Function):
        def gradient(self, rows, fields=None):
            losses, gradients = super().gradient(rows, fields)
            return losses, -gradients

    rows = torch.ones(2, 3, dtype=torch.float64)
    history, state = solved(LBFGS(), Lying(lambda rows, fields: rows.square().sum(dim=1), 2), rows, 2)
    assert torch.equal(history[-1], rows)
    assert state["pairs"].tolist() == [0, 0]


def test_only_fields_that_still_search_are_asked():
    """One begins so near to its minimum that its first length is good, the other far too short."""
    hessians = torch.stack([torch.eye(3), 1e-4 * torch.eye(3)]).double()
    rows = torch.ones(2, 3, dtype=torch.float64)
    problem = quadratic(hessians, torch.tensor([[0.995] * 3, [-1000.0] * 3], dtype=torch.float64))
    solved(LBFGS(), problem, rows, 1)
    assert problem.asked[0] < problem.asked[1]


@pytest.mark.parametrize("step", STEPS)
def test_a_fit_is_that_of_the_field_alone_bit_for_bit(step):
    """Five data through three slots, so that fields at different steps share the batch."""
    how = {"optimizer": LBFGS(), "stop": STOP, "step": step}
    assert_as_alone(fitted(DATA, batch=3, **how), DATA, **how)


def test_it_needs_far_fewer_steps_than_adam():
    target = Stop(max_steps=400, target=30.0, check_every=1)
    adam = Adam(Adam.auto_learning_rate(12, 1.0, 63), Schedule("constant"))
    steps = [
        sorted(result.steps for result in fitted(DATA, optimizer=optimizer, stop=target).values())
        for optimizer in (LBFGS(), adam)
    ]
    assert 4 * steps[0][2] <= steps[1][2], steps


def test_samples_that_change_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"LBFGS takes all samples.*samples=16.*samples='full'"):
        fitted(DATA, optimizer=LBFGS(), samples=16)


@pytest.mark.parametrize("key", ["history", "max_evaluations", "first_step"])
def test_values_that_make_no_sense_are_refused_by_name(key):
    with pytest.raises(ValueError, match=key):
        LBFGS(**{key: 0})


def test_a_fit_ends_with_finite_weights_at_a_loss_that_float32_cannot_lower():
    """Long after it has converged the search finds nothing better, and nothing breaks."""
    flat = [(datum_id, samples.map(torch.zeros_like)) for datum_id, samples in DATA[:2]]
    result = fitted(flat, optimizer=LBFGS(), stop=Stop(60, check_every=30), seed=SEED, field=FIELD)
    for one in result.values():
        assert one.weights.isfinite().all()
        assert math.isfinite(one.loss)
        assert one.loss < 1e-6
