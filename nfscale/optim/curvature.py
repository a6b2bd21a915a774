"""Products with the Hessian of every field at once.

The sum over fields of per-field losses has a block-diagonal Hessian, so one product with it gives every
field its own Hv (Pearlmutter, "Fast exact multiplication by the Hessian", 1994), here by double backward.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nfscale.layout import Params

LossFunction = Callable[[Params], Tensor]
"""Params -> losses [F]; the loss of a field depends on the params of that field alone."""


def gradient(loss_of: LossFunction, params: Params) -> tuple[Tensor, Params]:
    """Losses [F] and the gradient of each with respect to its own field's params."""
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    losses = loss_of(leaves)
    grads = torch.autograd.grad(losses.sum(), list(leaves.values()))
    return losses.detach(), dict(zip(leaves, grads, strict=True))


def gradient_and_hvp(loss_of: LossFunction, params: Params, probe: Params) -> tuple[Tensor, Params, Params]:
    """Losses [F], gradients, and the product of each field's Hessian with its `probe`."""
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    losses = loss_of(leaves)
    grads = torch.autograd.grad(losses.sum(), list(leaves.values()), create_graph=True)
    named = dict(zip(leaves, grads, strict=True))
    directional = torch.stack([(named[name] * probe[name]).sum() for name in named]).sum()
    products = torch.autograd.grad(directional, list(leaves.values()))
    detached = {name: g.detach() for name, g in named.items()}
    return losses.detach(), detached, dict(zip(leaves, products, strict=True))
