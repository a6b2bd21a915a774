"""What the tests of optimisers share: fields with known Hessians, a small MLP, and descents with any optimiser.

A quadratic field has the loss x^T H x / 2 + g^T x, whose Hessian H and gradient H x + g are known.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from nfscale.fields import MLP
from nfscale.layout import Params
from nfscale.optim import Extra, Optimizer, Schedule
from nfscale.optim.base import State
from nfscale.optim.curvature import gradient_and_hvp
from nfscale.rng import Stream, as_tensor, datum_seed, rademacher

FIELDS = 3
FIELD = MLP(2, 1, width=8, depth=2, omega_0=10.0, omega_hidden=5.0, weight_scale=1.0)
SEEDS = as_tensor([datum_seed(0, f"datum-{index}") for index in range(FIELDS)])
CONSTANT = Schedule("constant")
SCHEDULE = Schedule("cosine", total_steps=150, warmup=10)

Losses = Callable[[Params], Tensor]


def symmetric(fields: int, size: int, seed: int = 0) -> Tensor:
    """Dense random symmetric matrices [F, P, P], float64, with rows of unequal norm."""
    draw = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-1, 1, size, dtype=torch.float64)
    matrix = torch.randn(fields, size, size, generator=draw, dtype=torch.float64) * scales[:, None] * scales
    return (matrix + matrix.mT) / 2


def quadratic(hessians: Tensor) -> Losses:
    """Losses of quadratic fields {"x": [F, P]}, whose gradient at zero is zero."""
    return lambda params: 0.5 * torch.einsum("fi,fij,fj->f", params["x"], hessians, params["x"])


def bowls(fields: int, size: int) -> Tensor:
    """Positive definite Hessians [F, P, P], float64, with eigenvalues from 0.1 to about 10."""
    draw = torch.Generator().manual_seed(5)
    turn = torch.linalg.qr(torch.randn(fields, size, size, generator=draw, dtype=torch.float64))[0]
    return turn @ torch.diag(torch.logspace(-1, 1, size, dtype=torch.float64)) @ turn.mT


def mlp_data() -> tuple[Tensor, Tensor]:
    """Coordinates and values of the small MLP: [F, 20, 2], [F, 20, 1], float64."""
    draw = torch.Generator().manual_seed(0)
    coordinates = torch.rand(FIELDS, 20, 2, generator=draw, dtype=torch.float64) * 2 - 1
    return coordinates, torch.rand(FIELDS, 20, 1, generator=draw, dtype=torch.float64) - 0.5


def mlp_losses(fields: slice = slice(None)) -> Losses:
    """Losses of these fields of the small MLP."""
    coordinates, values = (tensor[fields] for tensor in mlp_data())
    return lambda params: (FIELD.apply(params, coordinates) - values).square().mean(dim=(1, 2))


def mlp_params() -> Params:
    return {name: p.double() for name, p in FIELD.init(SEEDS).items()}


def probes_of(params: Params, seeds: Tensor, step: Tensor) -> Params:
    """Signs for every param, by the fields' own seeds and steps."""
    sizes = {name: p[0].numel() for name, p in params.items()}
    drawn = rademacher(seeds, Stream.PROBE, step, sum(sizes.values()))
    parts = drawn.to(next(iter(params.values())).dtype).split(list(sizes.values()), dim=1)
    return {name: part.reshape(p.shape) for part, (name, p) in zip(parts, params.items(), strict=True)}


def set_back(state: State, index: int) -> None:
    """The state of one field as it is at its start, where that is all zeros."""
    for value in state.values():
        if isinstance(value, Tensor):
            value[index] = 0
        else:
            set_back(value, index)


def descend(
    optimizer: Optimizer,
    losses: Losses,
    params: Params,
    steps: int,
    *,
    rate: Iterable[float] = (1.0, 1.0, 0.5),
    seeds: Tensor = SEEDS,
    first: Tensor | None = None,
    resets: dict[int, int] | None = None,
) -> tuple[Params, Tensor]:
    """The params after so many steps, and the fields' own steps.

    Args:
        first: int64 [F], the steps that the fields have had before.
        resets: {after so many steps: the field that begins anew, from where it is}.
    """
    fields = len(next(iter(params.values())))
    step = torch.zeros(fields, dtype=torch.int64) if first is None else first.clone()
    state = optimizer.init(params)
    for number in range(steps):
        if resets and number in resets:
            step[resets[number]] = 0
            set_back(state, resets[number])
        probe = probes_of(params, seeds[:fields], step)
        _, grads, products = gradient_and_hvp(losses, params, probe)
        wanted = optimizer.wants_curvature(step)
        extra = Extra(step, torch.tensor(list(rate))[:fields], hv=products, hv_fields=wanted, probe=probe)
        updates, state = optimizer.update(grads, state, params, extra)
        params = {name: p + updates[name] for name, p in params.items()}
        step = step + 1
    return params, step


def one(params: Params, index: int) -> Params:
    """One field of many."""
    return {name: p[index : index + 1].clone() for name, p in params.items()}


def torch_descend(
    make: Callable[[list[Tensor]], torch.optim.Optimizer],
    losses: Losses,
    params: Params,
    rates: Iterable[float],
    before: Callable[[list[Tensor]], None] = lambda tensors: None,
) -> Params:
    """The params after a torch optimiser's steps at these rates, on the loss of one field.

    Args:
        before: done to the tensors, whose gradients are set, before each step.
    """
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    optimizer = make(list(leaves.values()))
    for rate in rates:
        optimizer.zero_grad()
        losses(leaves).sum().backward()
        before(list(leaves.values()))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    return {name: p.detach() for name, p in leaves.items()}


def rates_of(optimizer: Optimizer, steps: int, rate: float = 1.0) -> list[float]:
    """What the schedule makes of the learning rate at each step."""
    return [optimizer.learning_rate * rate * float(f) for f in optimizer.schedule.factor(torch.arange(steps))]


def assert_alone_as_among_others_that_begin_anew(optimizer: Optimizer) -> None:
    """Fields 0 and 2 of the small MLP are what they are alone, whatever field 1 does, and all descend."""
    start = mlp_params()
    together, steps = descend(optimizer, mlp_losses(), start, 40, resets={13: 1})
    assert steps.tolist() == [40, 27, 40]
    for index, rate in ((0, 1.0), (2, 0.5)):
        own = slice(index, index + 1)
        alone, _ = descend(optimizer, mlp_losses(own), one(start, index), 40, rate=[rate], seeds=SEEDS[own])
        for name, tensor in alone.items():
            # The products of a lone field take another path through the matrix library; 40 steps amplify the rounding.
            torch.testing.assert_close(together[name][own], tensor, rtol=1e-6, atol=1e-8)
    assert (mlp_losses()(together) < mlp_losses()(start)).all()
