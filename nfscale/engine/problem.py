"""What a solver is handed: losses, gradients and linearizations of the fields of a batch on the samples of a step."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nfscale.engine.step import evaluate
from nfscale.fields import MLP, Field
from nfscale.fields.activations import ACTIVATIONS
from nfscale.optim.linearization import Linearization
from nfscale.optim.solver import Solver
from nfscale.signals import Samples, Signal

if TYPE_CHECKING:
    from nfscale.engine.dispatch import Step  # which asks what a solver is

_FEWEST_FIELDS = 2  # that are evaluated together, see `nfscale.engine.step.field_chunks`


def unsolvable(solver: Solver, field: Field, signal: Signal) -> str | None:
    """Why a solver cannot fit such fields to such a signal, or None if it can."""
    named = type(signal).__name__
    if solver.full_batch and signal.jittered:
        return f"its loss has to stay the same from step to step, and {named} draws its samples anew at each"
    if "layer_io" not in solver.needs:
        return None
    if not isinstance(field, MLP):
        return f"it takes MLPs apart layer by layer, and the field is a {type(field).__name__}; use an mlp, or lbfgs"
    activation = ACTIVATIONS[field.activation]
    if activation.maps > 1 or activation.is_complex:
        return f"its layers have one real linear map each, not those of activation={field.activation}; use lbfgs"
    if not getattr(signal, "squared_error", False):
        return f"it minimises the mean squared error at points, which is not the loss of {named}; use lbfgs"
    return None


@dataclass(frozen=True)
class FieldProblem:
    """F fields on a batch of samples [F, N, ...]."""

    field: Field
    signal: Signal
    samples: Samples
    step: "Step"

    def gradient(self, rows: Tensor, fields: Tensor | None = None) -> tuple[Tensor, Tensor]:
        count, samples = len(rows), self.samples
        if fields is not None and count < len(samples.values):
            padded = max(count, _FEWEST_FIELDS)  # a lone field rounds differently
            rows, fields = rows.expand(padded, -1), fields.expand(padded)
            samples = samples.map(lambda tensor: tensor[fields])
        losses, gradients = self.step.gradient(self.field, self.signal, rows.contiguous(), samples)
        return losses[:count], gradients[:count]

    def losses(self, rows: Tensor) -> Tensor:
        return evaluate(self.field, self.signal, rows, self.samples, apply=self.step.apply)[0]

    def linearization(self, rows: Tensor) -> Linearization:
        """By autograd over the field's layers, one backward pass per channel.

        Samples do not meet inside a field, so the gradient of a channel's sum over samples is that of every sample.
        """
        field, samples = self.field, self.samples
        assert isinstance(field, MLP), "fit() refuses others"
        params = {name: tensor.detach() for name, tensor in field.layout.unravel(rows).items()}
        first = "layers.0.bias"
        with torch.enable_grad():
            params[first] = params[first].requires_grad_()  # so that there is a graph behind every layer
            passed = list(field.layers(params, samples.coordinates))
            values = passed[-1][0]
            preactivations = [preactivation for preactivation, _ in passed]
            by_channel = [
                torch.autograd.grad(values[..., channel].sum(), preactivations, retain_graph=True)
                for channel in range(values.shape[-1])
            ]
        weights = _weights(samples)
        roots = (weights / values.shape[-1]).sqrt()
        inputs = [field.encoded(samples.coordinates).expand(len(rows), -1, -1)]
        inputs += [hidden.detach() for _, hidden in passed[:-1]]
        deltas = [torch.stack(layer, dim=2) * roots[..., None, None] for layer in zip(*by_channel, strict=True)]
        residuals = (values.detach() - samples.values) * roots[..., None]
        return Linearization(inputs, deltas, residuals, weights)


def _weights(samples: Samples) -> Tensor:
    """Of the samples in the mean of the loss: [F, N]."""
    if samples.mask is not None:
        return samples.mask / samples.mask.sum(dim=1, keepdim=True)
    fields, count = samples.values.shape[:2]
    return samples.values.new_full((fields, count), 1 / count)
