"""Shampoo against its formula in float64, another library's, and what turning a matrix must do."""

import pytest
import torch

from nfscale.optim import Adam, Extra, Shampoo
from tests.optim.descents import (
    CONSTANT,
    SCHEDULE,
    assert_alone_as_among_others_that_begin_anew,
    bowls,
    descend,
    quadratic,
    set_back,
)

SHAPES = {"matrix": (5, 3), "vector": (4,), "more": (2, 2, 3), "long": (9, 2)}


def made_up(step: int, fields: int = 2) -> dict:
    draw = torch.Generator().manual_seed(step)
    return {name: torch.randn(fields, *s, generator=draw, dtype=torch.float64) for name, s in SHAPES.items()}


def root(matrix: torch.Tensor, power: float, damping: float) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag((values.clamp(min=0) + damping * values.max()) ** power) @ vectors.T


def expected(name: str, seen: list, optimizer: Shampoo) -> torch.Tensor:
    """The update of one field's tensor after these gradients, the rate being 1."""
    beta1, beta2, damping = optimizer.beta1, optimizer.beta2, optimizer.damping

    def moment(values: list) -> torch.Tensor:
        weights = [beta2 ** (len(values) - 1 - k) for k in range(len(values))]
        return sum(w * v for w, v in zip(weights, values, strict=True)) / (1.0 if beta2 == 1 else sum(weights))

    weights = [beta1 ** (len(seen) - 1 - k) for k in range(len(seen))]
    mean = sum(w * g for w, g in zip(weights, seen, strict=True)) / sum(weights)
    known = seen[: (len(seen) - 1) // optimizer.update_every * optimizer.update_every + 1]  # at the last refresh
    if name == "vector":
        square = moment([g.square() for g in seen])
        step = mean / (square + damping * square.max()).sqrt()
    else:
        flat = [g.reshape(-1, g.shape[-1]) for g in known]
        right = moment([g.T @ g for g in flat])
        if name == "long":  # its left side is longer than max_factor
            step = mean @ root(right, -0.5, damping)
        else:
            left = root(moment([g @ g.T for g in flat]), -0.25, damping)
            step = (left @ mean.reshape(-1, mean.shape[-1]) @ root(right, -0.25, damping)).reshape(mean.shape)
    if optimizer.graft == "none":
        return -step
    length = mean
    if optimizer.graft == "adam":
        weights = [0.999 ** (len(seen) - 1 - k) for k in range(len(seen))]
        square = sum(w * g.square() for w, g in zip(weights, seen, strict=True)) / sum(weights)
        length = mean / (square.sqrt() + 1e-8)
    return -step * length.norm() / step.norm()


@pytest.mark.parametrize("graft", ["none", "sgd", "adam"])
@pytest.mark.parametrize(("beta1", "beta2"), [(0.0, 1.0), (0.8, 0.9)])
def test_steps_are_those_of_the_formula_for_fields_at_different_steps(beta1, beta2, graft):
    """Field 1 begins 4 steps late, so that the two refresh at different steps."""
    optimizer = Shampoo(
        1.0, CONSTANT, update_every=3, beta1=beta1, beta2=beta2, damping=1e-3, graft=graft, max_factor=6
    )
    state = optimizer.init(made_up(0))
    for number in range(11):
        if number == 4:
            set_back(state, 1)
        step = torch.tensor([number, max(0, number - 4)])
        updates, state = optimizer.update(made_up(number), state, made_up(0), Extra(step, torch.ones(2)))
        for index, first in enumerate((0, 4)):
            for name in SHAPES if number >= first else ():
                seen = [made_up(s)[name][index] for s in range(first, number + 1)]
                # The fourth root of a damped eigenvalue keeps all digits but for those of eigh itself.
                torch.testing.assert_close(updates[name][index], expected(name, seen, optimizer), rtol=1e-7, atol=1e-9)


def test_without_what_we_added_it_is_another_librarys():
    """Whose matrix_eps is absolute: both are so small here that full-rank moments hide them."""
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
    optimizer = Shampoo(0.1, CONSTANT, update_every=1, beta1=0.0, beta2=1.0, damping=1e-13, graft="none")
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(1, 4, 4, generator=draw, dtype=torch.float64)
    leaf, params = start[0].clone().requires_grad_(), {"matrix": start}
    theirs, state = pytorch_optimizer.Shampoo([leaf], lr=0.1, matrix_eps=1e-13), optimizer.init(params)
    for number in range(10):
        gradient = torch.randn(1, 4, 4, generator=draw, dtype=torch.float64)
        leaf.grad = gradient[0].clone()
        theirs.step()
        updates, state = optimizer.update(
            {"matrix": gradient}, state, params, Extra(torch.tensor([number]), torch.ones(1))
        )
        params = {"matrix": params["matrix"] + updates["matrix"]}
    torch.testing.assert_close(params["matrix"][0], leaf.detach(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("graft", ["none", "sgd"])
def test_turning_rows_and_columns_turns_the_steps(graft):
    """Which no diagonal method does. Adam's length is not kept by turning, so that graft is left out."""
    optimizer, draw = Shampoo(0.1, CONSTANT, graft=graft, update_every=2), torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=draw, dtype=torch.float64))[0] for n in (5, 3))
    plain = {"matrix": made_up(0)["matrix"]}
    states = [optimizer.init(plain), optimizer.init(plain)]
    for number in range(7):
        gradient, extra = made_up(number)["matrix"], Extra(torch.full((2,), number), torch.ones(2))
        (one_way, _), (turned, _) = (
            optimizer.update({"matrix": g}, state, plain, extra)
            for g, state in zip((gradient, left @ gradient @ right), states, strict=True)
        )
        torch.testing.assert_close(turned["matrix"], left @ one_way["matrix"] @ right, rtol=1e-6, atol=1e-8)


def test_a_grafted_step_is_as_long_as_that_of_adam():
    optimizer, adam = Shampoo(0.1, SCHEDULE, update_every=2), Adam(0.1, SCHEDULE)
    states = [optimizer.init(made_up(0)), adam.init(made_up(0))]
    for number in range(7):
        extra = Extra(torch.full((2,), number), torch.tensor([1.0, 0.5]))
        ours, theirs = (
            method.update(made_up(number), state, made_up(0), extra)[0]
            for method, state in zip((optimizer, adam), states, strict=True)
        )
        for name in SHAPES:
            torch.testing.assert_close(ours[name].flatten(1).norm(dim=1), theirs[name].flatten(1).norm(dim=1))


def test_roots_stay_where_the_host_knows_that_no_refresh_is_due():
    optimizer, ones = Shampoo(0.1, CONSTANT, update_every=2), torch.ones(2)
    state = optimizer.init(made_up(0))
    optimizer.update(made_up(0), state, made_up(0), Extra(torch.zeros(2).long(), ones))
    before = {side: {n: r.clone() for n, r in roots.items()} for side, roots in state["roots"].items()}
    optimizer.update(made_up(1), state, made_up(0), Extra(torch.full((2,), 2), ones, refresh=False))
    optimizer.update(made_up(2), state, made_up(0), Extra(torch.full((2,), 3), ones))  # no multiple of 2
    for side, roots in before.items():
        assert all(torch.equal(r, state["roots"][side][n]) for n, r in roots.items())
    optimizer.update(made_up(3), state, made_up(0), Extra(torch.tensor([4, 5]), ones))
    for side, roots in before.items():
        for name, kept in roots.items():
            assert not torch.equal(kept[0], state["roots"][side][name][0])
            assert torch.equal(kept[1], state["roots"][side][name][1])


def test_a_field_that_is_not_finite_stops_no_other():
    """torch's eigendecomposition raises for the whole batch."""
    optimizer = Shampoo(0.1, CONSTANT, update_every=1)
    ill, healthy = optimizer.init(made_up(0)), optimizer.init(made_up(0))
    for number in range(3):
        grads, extra = made_up(number), Extra(torch.full((2,), number), torch.ones(2))
        expected_updates, _ = optimizer.update(grads, healthy, grads, extra)
        grads["matrix"][1, 0, 0], grads["vector"][1] = float("nan"), float("inf")
        updates, _ = optimizer.update(grads, ill, grads, extra)
        assert not updates["matrix"][1].isfinite().all()
        for name in SHAPES:
            torch.testing.assert_close(updates[name][0], expected_updates[name][0])


def test_gradients_of_zero_move_nothing():
    optimizer = Shampoo(0.1, CONSTANT)
    zeros = {name: torch.zeros_like(g, dtype=torch.float32) for name, g in made_up(0).items()}
    updates, _ = optimizer.update(zeros, optimizer.init(zeros), zeros, Extra(torch.zeros(2).long(), torch.ones(2)))
    assert all(torch.equal(update, zeros[name]) for name, update in updates.items())


OPTIMIZER = Shampoo(2e-3, SCHEDULE, update_every=4)


def test_a_field_is_the_same_alone_and_among_others_that_begin_anew():
    assert_alone_as_among_others_that_begin_anew(OPTIMIZER)


@pytest.mark.parametrize("graft", ["none", "sgd", "adam"])
def test_a_quadratic_of_a_matrix_is_descended(graft):
    hessians = bowls(3, 6)

    def losses(params):
        return quadratic(hessians)({"x": params["matrix"].flatten(1)})

    start = {"matrix": torch.ones(3, 3, 2, dtype=torch.float64)}
    rate = {"none": 0.05, "sgd": 0.05, "adam": 0.05}[graft]
    end, _ = descend(Shampoo(rate, SCHEDULE, graft=graft), losses, start, 150)
    assert (losses(end) < 0.1 * losses(start)).all()


@pytest.mark.parametrize(("name", "value"), [("update_every", 0), ("graft", "lamb")])
def test_values_that_make_no_sense_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"{name}.*{value}"):
        Shampoo(0.1, CONSTANT, **{name: value})
