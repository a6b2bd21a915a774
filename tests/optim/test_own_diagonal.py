"""ESGD-max, Jacobi and AdaHessian: their diagonals against exact Hessians, their steps against formulas in float64."""

import pytest
import torch

from nfscale.optim import AdaHessian, ESGDMax, Extra, Jacobi
from nfscale.rng import as_tensor, datum_seed
from tests.optim.descents import (
    CONSTANT,
    FIELD,
    SCHEDULE,
    SEEDS,
    assert_alone_as_among_others_that_begin_anew,
    bowls,
    descend,
    mlp_losses,
    mlp_params,
    one,
    probes_of,
    quadratic,
)


def made_up(step: int) -> tuple[dict, dict, dict]:
    """Gradients, signs and products with them {"a": [2, 3], "b": [2, 2, 2]}, float64."""
    draw = torch.Generator().manual_seed(step)
    shapes = {"a": (2, 3), "b": (2, 2, 2)}
    grads, signs, products = (
        {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
        for _ in range(3)
    )
    return grads, {name: s.sign() for name, s in signs.items()}, products


def rows(params: dict) -> torch.Tensor:
    """{name: [F, ...]} -> [F, P]."""
    return torch.cat([p.flatten(1) for p in params.values()], dim=1)


def walked(optimizer, count: int) -> list[torch.Tensor]:
    """Updates [2, P] with made-up gradients: field 1 begins 4 steps late, as if it were put into the slot then."""
    state, updates = optimizer.init(made_up(0)[0]), []
    for number in range(count):
        grads, signs, products = made_up(number)
        step = torch.tensor([number, max(0, number - 4)])
        if number == 4:
            for moving in (*state["momentum"].values(), *state["curvature"].values(), state["probes"]):
                moving[1] = 0
        wanted = optimizer.wants_curvature(step)
        extra = Extra(step, torch.ones(2), hv=products, hv_fields=wanted, probe=signs)
        update, state = optimizer.update(grads, state, grads, extra)
        updates.append(rows(update))
    return updates


def formula(kind: str, first: int, count: int, every: int, **keys: float) -> list[torch.Tensor]:
    """Updates [P] of the field that begins at step `first`, from sums over all that it has seen."""
    index, updates = (1 if first else 0), []
    beta1, beta2 = keys["beta1"], keys["beta2"]
    for now in range(first, count):
        own = range(first, now + 1)
        grads = [rows(made_up(s)[0])[index] for s in own]
        probed = [s for s in own if (s - first) % every == 0]
        products = [rows(made_up(s)[2])[index] for s in probed]
        diagonals = [rows(made_up(s)[1])[index] * p for s, p in zip(probed, products, strict=True)]
        weights = torch.tensor([beta2 ** (len(probed) - 1 - k) for k in range(len(probed))], dtype=torch.float64)
        momentum = sum((1 - beta1) * beta1 ** (len(grads) - 1 - k) * g for k, g in enumerate(grads))
        mean = momentum / (1 - beta1 ** len(grads))
        weighted = torch.stack([p.square() for p in products]) * weights[:, None]
        if kind == "esgd_max":
            diagonal = weighted.amax(dim=0).sqrt()
            if keys["nesterov"]:
                mean = (beta1 * momentum + (1 - beta1) * grads[-1]) / (1 - beta1 ** (len(grads) + 1))
        elif kind == "adahessian-e":
            diagonal = (weighted.sum(dim=0) / weights.sum()).sqrt()
        else:
            diagonal = ((torch.stack(diagonals) * weights[:, None]).sum(dim=0) / weights.sum()).abs()
        if "damping" in keys:
            diagonal = diagonal + keys["damping"] * diagonal.mean()
        else:
            diagonal = diagonal ** keys["hessian_power"] + keys["epsilon"]
        updates.append(-0.3 * mean / diagonal)
    return updates


@pytest.mark.parametrize(
    ("kind", "make", "keys"),
    [
        ("esgd_max", ESGDMax, {"beta1": 0.8, "beta2": 0.7, "damping": 0.05, "nesterov": True}),
        ("esgd_max", ESGDMax, {"beta1": 0.8, "beta2": 0.7, "damping": 0.05, "nesterov": False}),
        ("jacobi", Jacobi, {"beta1": 0.8, "beta2": 0.7, "damping": 0.05}),
        ("adahessian-e", AdaHessian, {"beta1": 0.8, "beta2": 0.7, "hessian_power": 0.5, "epsilon": 1e-2}),
        ("adahessian-j", AdaHessian, {"beta1": 0.8, "beta2": 0.7, "hessian_power": 1.0, "epsilon": 1e-2}),
    ],
)
def test_steps_are_those_of_the_formula_for_fields_at_different_steps(kind, make, keys):
    options = {"variant": kind[-1]} if make is AdaHessian else {}
    optimizer = make(learning_rate=0.3, schedule=CONSTANT, update_every=3, **keys, **options)
    ours = walked(optimizer, 12)
    for index, first in enumerate((0, 4)):
        expected = formula(kind, first, 12, 3, **keys)
        for number, theirs in enumerate(expected):
            torch.testing.assert_close(ours[first + number][index], theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_adahessian_e_is_stock_adahessian_on_an_mlp(power):
    """That of another library, which is handed the same products; epsilon is added at the same place."""
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
    optimizer = AdaHessian(0.02, CONSTANT, update_every=1, variant="e", beta2=0.99, hessian_power=power, epsilon=1e-2)
    start = mlp_params()
    ours, _ = descend(optimizer, mlp_losses(), start, 40, rate=(1.0, 1.0, 1.0))
    assert (mlp_losses()(ours) < mlp_losses()(start)).all()
    for index in range(3):
        losses, seeds = mlp_losses(slice(index, index + 1)), SEEDS[index : index + 1]
        leaves = {name: p.requires_grad_() for name, p in one(start, index).items()}
        theirs = pytorch_optimizer.AdaHessian(
            list(leaves.values()), lr=0.02, betas=(0.9, 0.99), hessian_power=power, eps=1e-2
        )
        for step in range(40):
            probe = probes_of(leaves, seeds, torch.tensor([step]))
            grads = torch.autograd.grad(losses(leaves).sum(), list(leaves.values()), create_graph=True)
            products = torch.autograd.grad(grads, list(leaves.values()), list(probe.values()))
            for leaf, gradient in zip(leaves.values(), grads, strict=True):
                leaf.grad = gradient.detach()
            theirs.step(hessian=[p * v for p, v in zip(products, probe.values(), strict=True)])
        for name, leaf in leaves.items():
            torch.testing.assert_close(ours[name][index : index + 1], leaf.detach(), rtol=1e-7, atol=1e-9)


def exact_hessian(index: int) -> torch.Tensor:
    """Of the small MLP at its start: [P, P], float64."""
    layout, losses = FIELD.layout, mlp_losses(slice(index, index + 1))
    row = layout.ravel(one(mlp_params(), index))[0]
    return torch.autograd.functional.hessian(lambda r: losses(layout.unravel(r[None]))[0], row)


@pytest.mark.parametrize("variant", ["jacobi", "adahessian-j"])
def test_the_jacobi_diagonal_is_that_of_the_exact_hessian(variant):
    """Within three standard errors for the mean over many fields with one Hessian, and errors of the size of theory.

    A probe v_i (Hv)_i has the variance sum_{j != i} H_ij^2; the running mean weighs probe k of n by
    (1 - b) b^(n-k) / (1 - b^n). 3 standard errors hold for 99.7 of 100 weights: of P = 105 weights times one mean
    each, the root mean square says more and the largest may be 4.
    """
    fields, probes, beta2 = 60, 300, 0.99
    hessian = exact_hessian(0)
    size = len(hessian)
    seeds = as_tensor([datum_seed(3, f"datum-{index}") for index in range(fields)])
    keys = {"learning_rate": 0.0, "schedule": CONSTANT, "update_every": 1, "beta2": beta2}
    optimizer = Jacobi(**keys) if variant == "jacobi" else AdaHessian(variant="j", **keys)
    params = {"x": torch.zeros(fields, size, dtype=torch.float64)}
    state = optimizer.init(params)
    for number in range(probes):
        step = torch.full((fields,), number)
        probe = probes_of(params, seeds, step)
        extra = Extra(step, torch.ones(fields), {"x": probe["x"] @ hessian}, torch.ones(fields).bool(), probe=probe)
        _, state = optimizer.update(params, state, params, extra)
    assert state["probes"].tolist() == [probes] * fields
    estimated = Jacobi.diagonal(optimizer, state)["x"]
    weights = (1 - beta2) * beta2 ** torch.arange(probes, dtype=torch.float64) / (1 - beta2**probes)
    variance = (hessian.square().sum(dim=1) - hessian.diagonal().square()) * weights.square().sum()
    errors = (estimated - hessian.diagonal()) / variance.sqrt()  # in standard errors of one field
    assert 0.9 < errors.square().mean().sqrt() < 1.1
    of_mean = errors.mean(dim=0).abs() * fields**0.5
    assert (of_mean < 3).double().mean() > 0.98
    assert of_mean.max() < 4
    assert 0.8 < of_mean.square().mean().sqrt() < 1.2


def test_esgd_max_is_an_upper_bound_of_what_was_seen_and_forgets_by_the_probe():
    optimizer, ones = ESGDMax(0.0, CONSTANT, update_every=2, beta2=0.5), {"x": torch.ones(1, 1)}
    state, seen = optimizer.init(ones), []
    for number, product in enumerate([4.0, 99.0, 1.0, 99.0, 1.0, 99.0, 3.0]):  # 99: at steps that are not probed
        step = torch.tensor([number])
        extra = Extra(
            step, torch.ones(1), {"x": torch.tensor([[product]])}, optimizer.wants_curvature(step), probe=ones
        )
        _, state = optimizer.update(ones, state, ones, extra)
        seen.append(float(state["curvature"]["x"]))
    assert seen == [16.0, 16.0, 8.0, 8.0, 4.0, 4.0, 9.0]


CASES = {
    "esgd_max": ESGDMax(0.05, SCHEDULE, update_every=4),
    "jacobi": Jacobi(0.02, SCHEDULE, update_every=4, damping=0.1),
    "adahessian-e": AdaHessian(0.02, SCHEDULE, update_every=4, variant="e", beta2=0.9, epsilon=1e-2),
    "adahessian-j": AdaHessian(0.02, SCHEDULE, update_every=4, variant="j", epsilon=1e-1),
}


@pytest.mark.parametrize("kind", CASES)
def test_a_field_is_the_same_alone_and_among_others_that_begin_anew(kind):
    assert_alone_as_among_others_that_begin_anew(CASES[kind])


@pytest.mark.parametrize("kind", CASES)
def test_quadratics_are_descended(kind):
    losses, start = quadratic(bowls(3, 6)), {"x": torch.ones(3, 6, dtype=torch.float64)}
    end, _ = descend(CASES[kind], losses, start, 150)
    assert (losses(end) < 0.1 * losses(start)).all()


@pytest.mark.parametrize("make", [ESGDMax, Jacobi, AdaHessian])
def test_values_that_make_no_sense_are_refused_by_name(make):
    with pytest.raises(ValueError, match=r"update_every.*0"):
        make(0.1, CONSTANT, update_every=0)


@pytest.mark.parametrize(("name", "value"), [("variant", "k"), ("hessian_power", 0.0), ("hessian_power", 2.0)])
def test_adahessian_refuses_other_variants_and_powers(name, value):
    with pytest.raises(ValueError, match=rf"{name}.*{value}"):
        AdaHessian(0.1, CONSTANT, **{name: value})
