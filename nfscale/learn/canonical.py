"""What changes a field's weights and not the field: the order of hidden neurons, the sign and the phase of their sines.

Of fields that share theta0 neurons stay comparable and nothing here is needed; fields that start from draws of their
own are brought into one form by `canonical`, or laid beside a reference by `aligned` (Ainsworth et al., "Git Re-Basin",
ICLR 2023, for the permutations; sine neurons have more: sin(-z) = -sin(z), sin(z + pi) = -sin(z)).

A neuron of an odd activation (sine, finer) may change the sign of its incoming weights and bias if its outgoing weights
do too; of an even one (gaussian, sinc) its outgoing weights stay. A sine neuron may move its bias by pi / omega if its
outgoing weights change sign. `largest_change` checks that a field is still the same function.
"""

import math
from typing import Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from nfscale.errors import CallerError
from nfscale.fields import MLP, Field
from nfscale.layout import Params

_ODD, _EVEN = ("sine", "finer"), ("gaussian", "sinc")


def canonical(field: Field, rows: Tensor) -> Tensor:
    """Each field in one form: phases within half a turn, signs by the largest weight, neurons in order of their norm.

    [B, P] -> [B, P]. Fields that differ by symmetries alone get equal rows, but for rounding and for ties.

    Raises:
        CallerError: if the field is no MLP with one real map for each unit.
    """
    mlp = _mlp(field)
    params = _copied(mlp, rows)
    for layer in range(mlp.depth):
        if mlp.activation == "sine":
            _bring_phases_near(mlp, params, layer, torch.zeros_like(params[f"layers.{layer}.bias"]))
        if mlp.activation in (*_ODD, *_EVEN):
            weight = params[f"layers.{layer}.weight"]
            largest = weight.gather(2, weight.abs().argmax(dim=2, keepdim=True)).squeeze(2)
            _flip(mlp, params, layer, largest < 0)
        if mlp.activation == "sine":  # a flip turns a phase at the edge of its range to the other edge
            _bring_phases_near(mlp, params, layer, torch.zeros_like(params[f"layers.{layer}.bias"]))
        _reorder(params, layer, params[f"layers.{layer}.weight"].square().sum(2).argsort(dim=1))
    return mlp.layout.ravel(params)


def aligned(field: Field, rows: Tensor, reference: Tensor, rounds: int = 3) -> Tensor:
    """Each field in the form that lies nearest to a reference: [B, P], [P] -> [B, P].

    Layer by layer the neurons, each in the sign and phase that fits best, are assigned to those of the reference
    (Hungarian method): at first by their incoming weights, since outgoing ones lead to neurons that are not in their
    places yet, then by both.

    Raises:
        CallerError: if the field is no MLP with one real map for each unit.
    """
    mlp = _mlp(field)
    params = _copied(mlp, rows)
    wanted = mlp.layout.unravel(reference[None])
    for turn in range(rounds):
        for layer in range(mlp.depth):
            costs, flips = _costs(mlp, params, wanted, layer, both=turn > 0)
            order = torch.stack([torch.from_numpy(linear_sum_assignment(cost.T.numpy())[1]) for cost in costs])
            at = torch.arange(order.shape[1])
            chosen = torch.stack([flip[order[row], at] for row, flip in enumerate(flips)])
            _reorder(params, layer, order)
            _flip(mlp, params, layer, chosen)
            if mlp.activation == "sine":
                _bring_phases_near(mlp, params, layer, wanted[f"layers.{layer}.bias"])
    return mlp.layout.ravel(params)


def largest_change(field: Field, before: Tensor, after: Tensor, points: int = 256, seed: int = 0) -> float:
    """The largest difference of the values of fields [B, P] at random coordinates: 0 but for rounding if preserved."""
    mlp = _mlp(field)
    generator = torch.Generator().manual_seed(seed)
    coordinates = 2 * torch.rand((1, points, mlp.dimensions), generator=generator, dtype=torch.float64) - 1
    values = [mlp.apply(mlp.layout.unravel(rows.double()), coordinates) for rows in (before, after)]
    return float((values[0] - values[1]).abs().max())


def scrambled(field: Field, rows: Tensor, generator: torch.Generator) -> Tensor:
    """Each field with its neurons in a random order and random signs: the same functions. An augmentation of readers.

    Not for generators: one more copy of each field in another order makes diffusion over weights fail (Zeng et al.,
    "Generative Modeling of Weights", 2025).
    """
    mlp = _mlp(field)
    params = _copied(mlp, rows)
    for layer in range(mlp.depth):
        shape = (len(rows), mlp.width)
        if mlp.activation in (*_ODD, *_EVEN):
            _flip(mlp, params, layer, torch.rand(shape, generator=generator) < 0.5)
        _reorder(params, layer, torch.rand(shape, generator=generator).argsort(dim=1))
    return mlp.layout.ravel(params)


def _mlp(field: Field) -> MLP:
    if not isinstance(field, MLP) or field.activation in ("gabor", "complex_gabor"):
        said = getattr(field, "activation", type(field).__name__)
        raise CallerError(f"symmetries are known of MLPs with one real map for each unit, not of {said}")
    return field


def _copied(mlp: MLP, rows: Tensor) -> Params:
    return {name: tensor.clone() for name, tensor in mlp.layout.unravel(rows).items()}


def _reorder(params: Params, layer: int, order: Tensor) -> None:
    """Neurons of a layer in this order: [B, W]."""
    for name in (f"layers.{layer}.weight", f"layers.{layer}.bias"):
        tensor = params[name]
        index = order if tensor.ndim == 2 else order[:, :, None].expand_as(tensor)
        params[name] = tensor.gather(1, index)
    after = params[f"layers.{layer + 1}.weight"]
    params[f"layers.{layer + 1}.weight"] = after.gather(2, order[:, None, :].expand_as(after))


def _flip(mlp: MLP, params: Params, layer: int, flipped: Tensor) -> None:
    """Other signs for the incoming weights and biases of some neurons [B, W], and what keeps the function."""
    sign = 1 - 2 * flipped.to(params[f"layers.{layer}.bias"].dtype)
    params[f"layers.{layer}.weight"] *= sign[:, :, None]
    params[f"layers.{layer}.bias"] *= sign
    if mlp.activation in _ODD:
        params[f"layers.{layer + 1}.weight"] *= sign[:, None, :]


def _bring_phases_near(mlp: MLP, params: Params, layer: int, wanted: Tensor) -> None:
    """Biases of sines moved by whole halves of a turn to be nearest to the wanted ones: [B or 1, W]."""
    half = math.pi / (mlp.omega_hidden if layer else mlp.first_omega)
    bias = params[f"layers.{layer}.bias"]
    halves = torch.round((bias - wanted) / half)
    params[f"layers.{layer}.bias"] = bias - halves * half
    params[f"layers.{layer + 1}.weight"] *= (1 - 2 * (halves % 2))[:, None, :]


def _costs(mlp: MLP, params: Params, wanted: Params, layer: int, both: bool) -> tuple[Tensor, Tensor]:
    """Squared distances of a layer's neurons to the reference's [B, W, W], at the better sign, and whether it is -1."""
    weight, bias = params[f"layers.{layer}.weight"], params[f"layers.{layer}.bias"]
    outgoing = params[f"layers.{layer + 1}.weight"].mT
    signs: tuple[Literal[1, -1], ...] = (1, -1) if mlp.activation in (*_ODD, *_EVEN) else (1,)
    found = []
    for sign in signs:
        incoming = _squared(sign * weight, wanted[f"layers.{layer}.weight"])
        gap = sign * bias[:, :, None] - wanted[f"layers.{layer}.bias"][:, None, :]
        turned = torch.zeros_like(gap)
        if mlp.activation == "sine":
            half = math.pi / (mlp.omega_hidden if layer else mlp.first_omega)
            turned = torch.round(gap / half)
            gap = gap - turned * half
        cost = incoming + gap.square()
        if both:
            after = sign * outgoing if mlp.activation in _ODD else outgoing
            theirs = wanted[f"layers.{layer + 1}.weight"].mT
            straight, opposite = _squared(after, theirs), _squared(-after, theirs)
            cost = cost + torch.where(turned % 2 == 0, straight, opposite)
        found.append(cost)
    stacked = torch.stack(found)
    best, which = stacked.min(dim=0)
    return best, which == 1


def _squared(one: Tensor, other: Tensor) -> Tensor:
    """Squared distances of rows: [B, W, K], [1, W, K] -> [B, W, W]."""
    return torch.cdist(one, other.expand(len(one), -1, -1)).square()


SYMMETRIES: dict[str, str] = {
    "sine": "order, sign, phase",
    "finer": "order, sign",
    "gaussian": "order, sign",
    "sinc": "order, sign",
    "relu": "order",
}
"""What this file knows of each activation; the scales of relu are left as they are."""
