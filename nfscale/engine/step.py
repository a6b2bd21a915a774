"""One step of every field in a batch, and the evaluation at a check.

`plain_gradient` (autograd) is the oracle: a faster step is a twin with its signature.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from nfscale.fields import MLP, Field
from nfscale.layout import Params
from nfscale.optim.curvature import gradient, gradient_and_hvp
from nfscale.rng import Stream, uniform
from nfscale.signals import Samples, Signal
from nfscale.signals.base import Apply

_CPU = torch.device("cpu")
_FEWEST_FIELDS = 2  # that are evaluated together, see `field_chunks`
_EVALUATION_BYTES = 2 << 20  # of one layer: activations stay in cache, which is 2.5 times faster than 16 MiB at a time
_GPU_EVALUATION_BYTES = 256 << 20  # few launches, and little beside the memory of a GPU


def plain_gradient(field: Field, signal: Signal, rows: Tensor, samples: Samples) -> tuple[Tensor, Tensor]:
    """Losses [F] and gradients [F, P] of rows of weights [F, P] on a batch of samples [F, N, ...]."""
    losses, grads = gradient(losses_of(field, signal, samples), field.layout.unravel(rows))
    return losses, field.layout.ravel(grads)


def plain_gradient_and_hvp(
    field: Field, signal: Signal, rows: Tensor, samples: Samples, probe: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [F], gradients [F, P] and Hessian-vector products [F, P] with probes [F, P]."""
    layout = field.layout
    losses, grads, products = gradient_and_hvp(
        losses_of(field, signal, samples), layout.unravel(rows), layout.unravel(probe)
    )
    return losses, layout.ravel(grads), layout.ravel(products)


def not_siren(field: Field) -> str | None:
    """Why a twin that is written for SIREN cannot serve a field, or None if it can."""
    if not isinstance(field, MLP):
        return f"it knows MLPs with sines, not {type(field).__name__}"
    if not field.is_siren:
        return f"it knows MLPs with sines, not with activation={field.activation} and encoding={field.encoding}"
    return None


def losses_of(field: Field, signal: Signal, samples: Samples) -> Callable[[Params], Tensor]:
    """The losses [F] on a batch of samples [F, N, ...], as a function of the params."""

    def losses(params: Params) -> Tensor:
        return signal.loss(signal.predict(partial(field.apply, params), samples), samples)

    return losses


def plain_apply(field: Field, rows: Tensor) -> Apply:
    """The fields with these rows of weights [F, P] as a function of coordinates: [F|1, N, D] -> [F, N, C]."""
    return partial(field.apply, field.layout.unravel(rows))


@torch.no_grad()
def evaluate(
    field: Field,
    signal: Signal,
    rows: Tensor,
    samples: Samples,
    indices: list[int] | None = None,
    apply: Callable[[Field, Tensor], Apply] = plain_apply,
    errors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss [F] and quality [F] over all samples that each field is measured on, a few fields at a time.

    Args:
        indices: the fields to measure; all, in their order, where it is None.
        apply: `plain_apply` or a twin.
        errors: [F, N], filled with the squared error of each sample, summed over channels.
    """
    samples = samples.measured
    count = len(rows) if indices is None else len(indices)
    available = samples.values.shape[1]
    losses, qualities = [], []
    for start, stop in field_chunks(field, count, available * signal.points_per_sample, rows.device):
        chosen = slice(start, stop) if indices is None else indices[start:stop]
        part = samples.map(lambda tensor, chosen=chosen: tensor[chosen])
        predicted = _predicted(field, signal, apply(field, rows[chosen]), part)
        losses.append(signal.loss(predicted, part))
        qualities.append(signal.quality(predicted, part))
        if errors is not None:
            errors[start:stop] = (predicted - part.values).square().flatten(2).sum(dim=2)
    return torch.cat(losses), torch.cat(qualities)


def _predicted(field: Field, signal: Signal, apply: Apply, samples: Samples) -> Tensor:
    """Predictions for all samples, a few samples at a time: they are small beside the activations behind them."""
    chunks = sample_chunks(field, samples.values.shape[1], signal.points_per_sample, samples.values.device)
    if len(chunks) == 1:
        return signal.predict(apply, samples)
    parts = [
        signal.predict(apply, samples.map(lambda tensor, start=start, stop=stop: tensor[:, start:stop]))
        for start, stop in chunks
    ]
    return torch.cat(parts, dim=1)


@torch.no_grad()
def predicted_at(
    field: Field,
    signal: Signal,
    rows: Tensor,
    coordinates: Tensor,
    apply: Callable[[Field, Tensor], Apply] = plain_apply,
) -> Tensor:
    """Predictions of fields at what `signal.coordinates` gave: [F, P], [N, ...] -> [F, N, ...], a part at a time."""
    count = len(rows)
    pair = rows.expand(_FEWEST_FIELDS, -1) if count == 1 else rows  # a lone field rounds differently
    at = Samples(coordinates[None], coordinates.new_empty((1, len(coordinates), signal.channels)))
    parts = [
        _predicted(field, signal, apply(field, pair[start:stop]), at)
        for start, stop in field_chunks(field, len(pair), len(coordinates) * signal.points_per_sample, rows.device)
    ]
    return torch.cat(parts)[:count]


def field_chunks(field: Field, count: int, available: int, device: torch.device = _CPU) -> Iterator[tuple[int, int]]:
    """Ranges of fields to evaluate together at `available` points each, so that activations stay in cache.

    No range has one field unless there is one in all: a lone field takes another path through the matrix
    library and may round differently.
    """
    size = max(_FEWEST_FIELDS, _evaluation_bytes(device) // _layer_bytes(field, available))
    start = 0
    while start < count:
        stop = count if count - start <= size + 1 else start + size
        yield start, stop
        start = stop


def sample_chunks(
    field: Field, count: int, points_per_sample: int, device: torch.device = _CPU
) -> list[tuple[int, int]]:
    """Ranges of a field's samples to evaluate one after the other where the fewest fields have too many at once.

    A function of the field and the counts alone, so that neighbours change no rounding. Ranges are nearly
    equal: none is so short that it takes another path through the matrix library.
    """
    longest = max(1, _evaluation_bytes(device) // (_FEWEST_FIELDS * _layer_bytes(field, points_per_sample)))
    pieces = -(-count // longest)
    edges = [index * count // pieces for index in range(pieces + 1)]
    return list(pairwise(edges))


def _evaluation_bytes(device: torch.device) -> int:
    return _EVALUATION_BYTES if device.type == "cpu" else _GPU_EVALUATION_BYTES


def _layer_bytes(field: Field, points: int) -> int:
    """What the widest layer of one field takes at so many points."""
    return 4 * points * max(entry.shape[0] for entry in field.layout.entries)


def stack_samples(parts: Sequence[Samples], device: torch.device) -> Samples:
    """Samples of several data of one kind as a batch: [N, ...] each -> [F, N, ...]."""
    mixed = len({part.values.device for part in parts}) > 1
    return parts[0].map(lambda *t: torch.stack([one.to(device) for one in t] if mixed else t).to(device), *parts[1:])


def training_samples(
    signal: Signal, samples: Samples, positions: Tensor | None, seeds: Tensor, steps: Tensor
) -> Samples:
    """What enters a step: each field's samples at its positions, or all; with jitter where the signal wants it.

    Args:
        positions: int64 [F, n], or None for all samples.
        seeds, steps: int64 [F], the fields' own: what jitter is keyed by.
    """
    coordinates, values, mask = samples.coordinates, samples.values, samples.mask
    if positions is not None:
        # Places among the samples of all fields: indexing by field and position takes twice as long.
        starts = torch.arange(len(positions), device=positions.device)[:, None] * values.shape[1]
        places = (starts + positions).flatten()

        def drawn(tensor: Tensor) -> Tensor:
            return tensor.flatten(0, 1).index_select(0, places).unflatten(0, positions.shape)

        coordinates, values, mask = drawn(coordinates), drawn(values), None if mask is None else drawn(mask)
    jitter = uniform(seeds, Stream.JITTER, steps, values.shape[1]) if signal.jittered else None
    return Samples(coordinates, values, mask, jitter=jitter)
