"""Muon against torch.optim.Muon and Adam, and its orthogonalisation against singular values."""

import pytest
import torch

from nfscale.optim import Adam, Extra, Muon
from nfscale.optim.muon import hidden_names, orthogonalised
from tests.optim.descents import (
    CONSTANT,
    SCHEDULE,
    assert_alone_as_among_others_that_begin_anew,
    bowls,
    descend,
    mlp_params,
    one,
    quadratic,
)

HIDDEN = "layers.1.weight"
MUON = Muon(0.01, SCHEDULE, adam_learning_rate=2e-3)


def made_up(step: int) -> dict:
    draw = torch.Generator().manual_seed(step)
    return {name: torch.randn(p.shape, generator=draw, dtype=torch.float64) for name, p in mlp_params().items()}


def quintic(matrix: torch.Tensor) -> torch.Tensor:
    """What five iterations make of the singular values, one by one: odd polynomials act on them alone."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ vh


@pytest.mark.parametrize("nesterov", [True, False])
def test_hidden_matrices_follow_the_formula_and_the_rest_is_adam(nesterov):
    """Field 1 begins 5 steps late, field 2 is at half the rate."""
    muon = Muon(0.01, SCHEDULE, momentum=0.8, nesterov=nesterov, adam_learning_rate=2e-3)
    adam, params, first = Adam(2e-3, SCHEDULE), mlp_params(), (0, 5, 0)
    state, rest = muon.init(params), {name: p for name, p in params.items() if name != HIDDEN}
    adam_state = adam.init(rest)
    for number in range(12):
        if number == 5:
            for kept in (state["momentum"], *state["adam"].values(), *adam_state.values()):
                for tensor in kept.values():
                    tensor[1] = 0
        grads, step = made_up(number), torch.tensor([max(0, number - f) for f in first])
        extra = Extra(step, torch.tensor([1.0, 1.0, 0.5]))
        updates, state = muon.update(grads, state, params, extra)
        theirs, adam_state = adam.update({name: grads[name] for name in rest}, adam_state, rest, extra)
        for name in rest:
            torch.testing.assert_close(updates[name], theirs[name], rtol=0, atol=0)
        for index in range(3):
            if number < first[index]:
                continue
            seen = [made_up(s)[HIDDEN][index] for s in range(first[index], number + 1)]
            momentum = sum(0.2 * 0.8 ** (len(seen) - 1 - k) * g for k, g in enumerate(seen))
            direction = 0.2 * seen[-1] + 0.8 * momentum if nesterov else momentum
            rate = 0.01 * float(SCHEDULE.factor(step)[index]) * (0.5 if index == 2 else 1.0)
            torch.testing.assert_close(updates[HIDDEN][index], -rate * quintic(direction), rtol=1e-9, atol=1e-12)


def test_the_hidden_matrix_is_torchs_muon():
    """Which iterates in bfloat16: five iterations amplify roundings of 0.4 %, hence 5 % of the largest entry."""
    muon, params = Muon(0.01, CONSTANT, momentum=0.95), one(mlp_params(), 0)
    leaf = params[HIDDEN][0].float().requires_grad_()
    theirs, state = torch.optim.Muon([leaf], lr=0.01, weight_decay=0.0), muon.init(params)
    for number in range(8):
        grads = {name: g[:1] for name, g in made_up(number).items()}
        before = leaf.detach().clone()
        leaf.grad = grads[HIDDEN][0].float()
        theirs.step()
        updates, state = muon.update(grads, state, params, Extra(torch.tensor([number]), torch.ones(1)))
        moved = (leaf.detach() - before).double()
        assert (updates[HIDDEN][0] - moved).abs().max() < 0.05 * moved.abs().max()


@pytest.mark.parametrize("shape", [(2, 6, 6), (2, 3, 7, 4), (2, 4, 7)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = torch.linalg.svdvals(orthogonalised(matrices))
    assert values.min() > 0.6  # 0.7 for all but the smallest singular values, of which a random matrix has some
    assert values.max() < 1.25
    for matrix, result in zip(matrices.flatten(0, -3), orthogonalised(matrices).flatten(0, -3), strict=True):
        torch.testing.assert_close(result, quintic(matrix))
    torch.testing.assert_close(orthogonalised(1e3 * matrices), orthogonalised(matrices))
    assert torch.equal(orthogonalised(torch.zeros(shape)), torch.zeros(shape))


def test_hidden_are_the_weights_of_layers_between_the_first_and_the_last():
    names = [f"layers.{index}.{part}" for index in (0, 1, 2, 10, 3) for part in ("weight", "bias")]
    assert hidden_names(dict.fromkeys([*names, "grids.0", "filters.0.frequency"], torch.ones(1, 2, 2))) == [
        f"layers.{index}.weight" for index in (1, 2, 3)
    ]
    assert hidden_names({"layers.0.weight": torch.ones(1), "x": torch.ones(1)}) == []


def test_a_field_is_the_same_alone_and_among_others_that_begin_anew():
    assert_alone_as_among_others_that_begin_anew(MUON)


def test_a_quadratic_of_one_hidden_matrix_is_descended():
    """{"x": [F, P]} alone is Adam's; as the middle one of three layers it is Muon's."""
    hessians = bowls(3, 9)

    def losses(params):
        return quadratic(hessians)({"x": params[HIDDEN].flatten(1)})

    zeros = torch.zeros(3, 2, dtype=torch.float64)
    start = {"layers.0.weight": zeros, HIDDEN: torch.ones(3, 3, 3, dtype=torch.float64), "layers.2.weight": zeros}

    def with_all(params):
        others = params["layers.0.weight"].square() + params["layers.2.weight"].square()
        return losses(params) + others.sum(dim=1)

    end, _ = descend(Muon(0.05, SCHEDULE), with_all, start, 150)
    assert (losses(end) < 0.2 * losses(start)).all()  # steps of one length in all directions: slow in a long valley
