"""One step of every field in a batch, and the evaluation at a check.

`plain_gradient` (autograd) is the oracle: a faster step is a twin with its signature.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nfscale.fields import Field
from nfscale.layout import Params
from nfscale.optim.curvature import gradient, gradient_and_hvp
from nfscale.signals import Samples, Signal

_EVALUATION_BYTES = 2 << 20  # of one layer: activations stay in cache, which is 2.5 times faster than 16 MiB at a time


def plain_gradient(field: Field, signal: Signal, rows: Tensor, samples: Samples) -> tuple[Tensor, Tensor]:
    """Losses [F] and gradients [F, P] of rows of weights [F, P] on a batch of samples [F, N, ...]."""
    losses, grads = gradient(_loss_of(field, signal, samples), field.layout.unravel(rows))
    return losses, field.layout.ravel(grads)


def plain_gradient_and_hvp(
    field: Field, signal: Signal, rows: Tensor, samples: Samples, probe: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [F], gradients [F, P] and Hessian-vector products [F, P] with probes [F, P]."""
    layout = field.layout
    losses, grads, products = gradient_and_hvp(
        _loss_of(field, signal, samples), layout.unravel(rows), layout.unravel(probe)
    )
    return losses, layout.ravel(grads), layout.ravel(products)


def _loss_of(field: Field, signal: Signal, samples: Samples):
    def loss_of(params: Params) -> Tensor:
        return signal.loss(field.apply(params, samples.coordinates), samples)

    return loss_of


@torch.no_grad()
def evaluate(field: Field, signal: Signal, rows: Tensor, samples: Samples) -> tuple[Tensor, Tensor]:
    """Loss [F] and quality [F] over all samples of each field, a few fields at a time."""
    count, available = samples.values.shape[:2]
    losses, qualities = [], []
    for start, stop in field_chunks(field, count, available):
        part = slice_fields(samples, start, stop)
        predicted = field.apply(field.layout.unravel(rows[start:stop]), part.coordinates)
        losses.append(signal.loss(predicted, part))
        qualities.append(signal.quality(predicted, part))
    return torch.cat(losses), torch.cat(qualities)


def field_chunks(field: Field, count: int, available: int) -> Iterator[tuple[int, int]]:
    """Ranges of fields to evaluate together at `available` samples each, so that activations stay in cache.

    No range has one field unless there is one in all: a lone field takes another path through the matrix
    library and may round differently.
    """
    widest = max(entry.shape[0] for entry in field.layout.entries)
    size = max(2, _EVALUATION_BYTES // (4 * available * widest))
    start = 0
    while start < count:
        stop = count if count - start <= size + 1 else start + size
        yield start, stop
        start = stop


def slice_fields(samples: Samples, start: int, stop: int) -> Samples:
    """Samples of the fields start .. stop - 1."""
    mask = samples.mask
    return Samples(
        samples.coordinates[start:stop], samples.values[start:stop], None if mask is None else mask[start:stop]
    )


def stack_samples(parts: Sequence[Samples], device: torch.device) -> Samples:
    """Samples of several data of one sample count as a batch: [N, ...] each -> [F, N, ...]."""
    masks = [part.mask for part in parts if part.mask is not None]
    return Samples(
        torch.stack([part.coordinates for part in parts]).to(device),
        torch.stack([part.values for part in parts]).to(device),
        torch.stack(masks).to(device) if masks else None,
    )


def gather_samples(samples: Samples, positions: Tensor) -> Samples:
    """Each field's samples at its positions: [F, N, ...], int64 [F, n] -> [F, n, ...]."""
    fields = torch.arange(len(positions), device=positions.device)[:, None]
    mask = samples.mask
    return Samples(
        samples.coordinates[fields, positions],
        samples.values[fields, positions],
        None if mask is None else mask[fields, positions],
    )
