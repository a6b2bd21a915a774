"""SOAP against its formula in float64, against Adam in a known basis, and what turning a matrix must do."""

import pytest
import torch

from nfscale.optim import SOAP, Adam, Extra
from tests.optim.descents import (
    CONSTANT,
    SCHEDULE,
    assert_alone_as_among_others_that_begin_anew,
    bowls,
    descend,
    quadratic,
    set_back,
)

SHAPES = {"matrix": (4, 4), "vector": (4,), "more": (2, 2, 4), "long": (9, 2)}
"""Sides with a basis have one that the first gradient decides: its rank is full there."""


def made_up(step: int) -> dict:
    draw = torch.Generator().manual_seed(step)
    return {name: torch.randn(2, *shape, generator=draw, dtype=torch.float64) for name, shape in SHAPES.items()}


def reference(name: str, first: int, count: int, index: int, method: str, every: int) -> list[torch.Tensor]:
    """Updates of one field's tensor from step `first` on, the rate being 1 and all betas 0.9: algorithm 3."""
    shape, updates = SHAPES[name], []
    rows, columns = torch.Size(shape[:-1]).numel(), shape[-1]
    mean, square = torch.zeros(rows, columns).double(), torch.zeros(rows, columns).double()
    left, right, basis = torch.zeros(rows, rows).double(), torch.zeros(columns, columns).double(), None
    for own in range(count - first):
        gradient = made_up(first + own)[name][index].reshape(rows, columns)
        left, right = 0.9 * left + 0.1 * gradient @ gradient.T, 0.9 * right + 0.1 * gradient.T @ gradient
        if basis is None:
            basis = [torch.linalg.eigh(factor)[1].flip(1) for factor in (left, right)]
            if name == "vector":
                basis = [torch.eye(1).double(), torch.eye(columns).double()]
            if name == "long":  # its left side is longer than max_factor
                basis[0] = torch.eye(rows).double()
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.9 * square + 0.1 * (basis[0].T @ gradient @ basis[1]).square()
        held = 1 - 0.9 ** (own + 1)
        direction = (basis[0].T @ mean @ basis[1] / held) / ((square / held).sqrt() + 1e-8)
        step = basis[0] @ direction @ basis[1].T if own else gradient / (gradient.abs() + 1e-8)
        updates.append(-step.reshape(shape))
        if own and own % every == 0:
            for side, factor in enumerate((left, right)):
                if name == "vector" or (name == "long" and side == 0):
                    continue
                if method == "eigh":
                    basis[side] = torch.linalg.eigh(factor)[1].flip(1)
                    continue
                estimate = torch.stack([column @ factor @ column for column in basis[side].T])
                order = sorted(range(len(factor)), key=lambda place, estimate=estimate: -float(estimate[place]))
                basis[side] = torch.linalg.qr(factor @ basis[side][:, order])[0]
                square = square[order] if side == 0 else square[:, order]
    return updates


@pytest.mark.parametrize("method", ["qr", "eigh"])
def test_steps_are_those_of_the_formula_for_fields_at_different_steps(method):
    """Field 1 begins 4 steps late, so that the two refresh at different steps."""
    keys = {"beta1": 0.9, "beta2": 0.9, "factor_beta": 0.9, "max_factor": 6}
    optimizer = SOAP(1.0, CONSTANT, update_every=3, method=method, **keys)
    state, seen = optimizer.init(made_up(0)), []
    for number in range(14):
        if number == 4:
            set_back(state, 1)
        step = torch.tensor([number, max(0, number - 4)])
        updates, state = optimizer.update(made_up(number), state, made_up(0), Extra(step, torch.ones(2)))
        seen.append(updates)
    for index, first in enumerate((0, 4)):
        for name in SHAPES:
            theirs = reference(name, first, 14, index, method, 3)
            for number, expected in enumerate(theirs):
                torch.testing.assert_close(seen[first + number][name][index], expected, rtol=1e-7, atol=1e-9)


def test_vectors_and_sides_without_factors_are_adams():
    optimizer, adam = SOAP(0.1, SCHEDULE, beta1=0.9, beta2=0.99, max_factor=1), Adam(0.1, SCHEDULE, 0.9, 0.99)
    states = [optimizer.init(made_up(0)), adam.init(made_up(0))]
    for number in range(7):
        extra = Extra(torch.full((2,), number), torch.tensor([1.0, 0.5]))
        ours, theirs = (
            method.update(made_up(number), state, made_up(0), extra)[0]
            for method, state in zip((optimizer, adam), states, strict=True)
        )
        for name in SHAPES:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-9)  # Adam's rate is in float32


def test_in_a_basis_that_gradients_keep_it_is_adam_in_that_basis():
    """Gradients U S V^T of fixed U and V: turned by them, each is a diagonal matrix, and so are Adam's steps."""
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(2, 4, 4, generator=draw, dtype=torch.float64))[0] for _ in range(2))
    optimizer, adam = SOAP(0.1, CONSTANT, update_every=2, beta1=0.9, beta2=0.99), Adam(0.1, CONSTANT, 0.9, 0.99)
    zeros = {"matrix": torch.zeros(2, 4, 4, dtype=torch.float64)}
    states = [optimizer.init(zeros), adam.init(zeros)]
    for number in range(9):
        sizes = torch.tensor([8.0, 4.0, 2.0, 1.0]).double() * (1 + torch.rand(2, 4, generator=draw).double() / 4)
        diagonal = torch.diag_embed(sizes)
        extra = Extra(torch.full((2,), number), torch.ones(2))
        ours, _ = optimizer.update({"matrix": left @ diagonal @ right.mT}, states[0], zeros, extra)
        theirs, _ = adam.update({"matrix": diagonal}, states[1], zeros, extra)
        turned_back = left.mT @ ours["matrix"] @ right
        if number == 0:  # Adam's, in the coordinates of the weights
            continue
        # Off the diagonal both moments are zero but for rounding, which Adam's epsilon of 1e-8 keeps small.
        torch.testing.assert_close(turned_back, theirs["matrix"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["qr", "eigh"])
def test_turning_rows_and_columns_turns_the_steps(method):
    """Which no diagonal method does. Square matrices: full rank makes the first basis unique but for signs."""
    optimizer, draw = SOAP(0.1, CONSTANT, update_every=2, method=method), torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(4, 4, generator=draw, dtype=torch.float64))[0] for _ in range(2))
    zeros = {"matrix": torch.zeros(2, 4, 4, dtype=torch.float64)}
    states = [optimizer.init(zeros), optimizer.init(zeros)]
    for number in range(7):
        gradient = torch.randn(2, 4, 4, generator=draw, dtype=torch.float64)
        extra = Extra(torch.full((2,), number), torch.ones(2))
        (plain, _), (turned, _) = (
            optimizer.update({"matrix": g}, state, zeros, extra)
            for g, state in zip((gradient, left @ gradient @ right), states, strict=True)
        )
        if number:  # the first step is Adam's
            torch.testing.assert_close(turned["matrix"], left @ plain["matrix"] @ right, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", ["qr", "eigh"])
def test_the_bases_become_the_eigenvectors_of_their_factors(method):
    """Of moments that no longer change; the power iteration takes some refreshes."""
    optimizer, gradient = SOAP(0.1, CONSTANT, update_every=1, method=method), {"matrix": made_up(0)["matrix"]}
    state = optimizer.init(gradient)
    for number in range(60):
        grads = made_up(0 if number else 1)  # the first basis is that of another gradient
        optimizer.update({"matrix": grads["matrix"]}, state, gradient, Extra(torch.full((2,), number), torch.ones(2)))
    basis, factor = state["bases"]["right"]["matrix"], state["factors"]["right"]["matrix"]
    turned = basis.mT @ factor @ basis
    values = turned.diagonal(dim1=1, dim2=2)
    assert (values.diff(dim=1) < 0).all()
    assert (turned - torch.diag_embed(values)).abs().max() < 1e-2 * values.max()
    torch.testing.assert_close(basis.mT @ basis, torch.eye(4, dtype=torch.float64).expand(2, 4, 4))


@pytest.mark.parametrize("method", ["qr", "eigh"])
def test_a_field_that_is_not_finite_stops_no_other(method):
    """torch's eigendecomposition raises for the whole batch."""
    optimizer = SOAP(0.1, CONSTANT, update_every=1, method=method)
    ill, healthy = optimizer.init(made_up(0)), optimizer.init(made_up(0))
    for number in range(3):
        grads, extra = made_up(number), Extra(torch.full((2,), number), torch.ones(2))
        expected, _ = optimizer.update(grads, healthy, grads, extra)
        grads["matrix"][1, 0, 0], grads["vector"][1] = float("nan"), float("inf")
        updates, _ = optimizer.update(grads, ill, grads, extra)
        assert not updates["matrix"][1].isfinite().all()
        for name in SHAPES:
            torch.testing.assert_close(updates[name][0], expected[name][0])


OPTIMIZER = SOAP(2e-3, SCHEDULE, update_every=4)


def test_a_field_is_the_same_alone_and_among_others_that_begin_anew():
    assert_alone_as_among_others_that_begin_anew(OPTIMIZER)


def test_a_quadratic_of_a_matrix_is_descended():
    hessians = bowls(3, 6)

    def losses(params):
        return quadratic(hessians)({"x": params["matrix"].flatten(1)})

    start = {"matrix": torch.ones(3, 3, 2, dtype=torch.float64)}
    end, _ = descend(SOAP(0.05, SCHEDULE), losses, start, 150)
    assert (losses(end) < 0.1 * losses(start)).all()


@pytest.mark.parametrize(("name", "value"), [("update_every", 0), ("method", "svd")])
def test_values_that_make_no_sense_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"{name}.*{value}"):
        SOAP(0.1, CONSTANT, **{name: value})
