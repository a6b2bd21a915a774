"""Twins of the plain step in C++, for sine MLPs on a CPU: gradient, forward, and all steps between two checks.

`native.cpp` is called with the addresses of tensors. It takes one field after the other through its steps, so that
a field has the same bits alone, in any batch and on any number of threads, whatever its width.
"""

import ctypes
from ctypes import POINTER, Structure, c_double, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nfscale.engine.build import CannotBuild, compiled
from nfscale.engine.sampling import Sampler
from nfscale.engine.step import not_siren
from nfscale.engine.updates import Updates, updates_of
from nfscale.fields import MLP, Field
from nfscale.optim import Optimizer
from nfscale.optim.base import State
from nfscale.rng import Stream
from nfscale.signals import Samples, Signal
from nfscale.signals.base import Apply

if TYPE_CHECKING:
    from nfscale.engine.calibrate import Calibration  # which takes a step itself

_SOURCE = Path(__file__).with_name("native.cpp")
_ADAM, _SHARED_DIAGONAL, _OWN_DIAGONAL = 0, 1, 2
_STRATIFIED, _UNIFORM = 1, 2


class _Net(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("dimensions", "channels", "width", "depth")),
        *((name, c_double) for name in ("omega_0", "omega_hidden")),
    )


class _Data(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("available", "taken")),
        ("coordinates", c_void_p),
        ("coordinates_stride", c_int64),
        *((name, c_void_p) for name in ("values", "mask")),
        *((name, c_int64) for name in ("sampling", "stream")),
        *((name, c_void_p) for name in ("seeds", "steps", "run_start", "run_length", "units", "unit_count")),
        ("most_units", c_int64),
    )


class _Update(Structure):
    _fields_ = (
        ("kind", c_int64),
        *((name, c_void_p) for name in ("first", "second", "step_size", "correction", "longest")),
        *((name, c_void_p) for name in ("diagonal_row", "inverse_diagonal", "probes", "factors")),
        *((name, c_int64) for name in ("update_every", "probe_stream")),
        *((name, c_double) for name in ("beta1", "beta2", "epsilon", "damping")),
    )


@lru_cache(maxsize=1)
def _loaded() -> ctypes.CDLL | CannotBuild:
    """The library, or why there is none; tried once in a process."""
    try:
        library = ctypes.CDLL(str(compiled(_SOURCE)))
    except CannotBuild as error:
        return error
    except OSError as error:
        return CannotBuild(f"what was compiled cannot be loaded ({error})")
    net, data, update = POINTER(_Net), POINTER(_Data), POINTER(_Update)
    library.nfscale_advance.argtypes = [net, data, update, c_void_p, c_int64, c_int64, c_void_p, c_int64]
    library.nfscale_gradient.argtypes = [net, data, c_int64, c_void_p, c_void_p, c_void_p, c_int64]
    library.nfscale_product.argtypes = [net, data, c_int64, *[c_void_p] * 5, c_int64]
    library.nfscale_apply.argtypes = [net, data, c_int64, c_void_p, c_void_p, c_int64]
    library.nfscale_positions.argtypes = [data, c_int64, c_int64, c_void_p]
    library.nfscale_positions.restype = None
    library.nfscale_sine.argtypes = [c_void_p, c_void_p, c_void_p, c_int64]
    library.nfscale_sine.restype = None
    return library


def refusal(device: torch.device, field: Field, signal: Signal) -> str | None:
    """Why the native step cannot serve these, or None if it can; does not look for a compiler."""
    if device.type != "cpu":
        return f"it runs on a CPU, not on {device}"
    if why := not_siren(field):
        return why
    if not getattr(signal, "squared_error", False):
        return f"it knows signals whose loss is the mean squared error at points, which {type(signal).__name__} is not"
    return None


def unavailable() -> str | None:
    """Why there is no library on this machine, or None; builds it where it is not built yet."""
    library = _loaded()
    return str(library) if isinstance(library, CannotBuild) else None


def _library() -> ctypes.CDLL:
    library = _loaded()
    if isinstance(library, CannotBuild):
        raise RuntimeError(f"the native step is not available: {library}")
    return library


def _call(name: str, *arguments: Any) -> None:
    if getattr(_library(), name)(*arguments):
        raise MemoryError("can't allocate memory for the native step")


def _net(field: Field) -> _Net:
    assert isinstance(field, MLP), "the dispatcher refuses other fields"
    return _Net(field.dimensions, field.channels, field.width, field.depth, field.first_omega, field.omega_hidden)


def _address(tensor: Tensor) -> int:
    assert tensor.is_contiguous(), "the library reads tensors from one end to the other"
    return tensor.data_ptr()


def _data(samples: Samples, dimensions: int, channels: int) -> _Data:
    """All samples of a batch, whose shapes the library cannot see.

    Raises:
        ValueError: if they are not those of the field (both are printed).
    """
    coordinates, values = samples.coordinates, samples.values
    fields, available = values.shape[:2]
    for tensor, expected in ((coordinates, (fields, available, dimensions)), (values, (fields, available, channels))):
        if tensor.shape != expected:
            raise ValueError(f"samples {tuple(tensor.shape)} where the field takes {expected}")
    return _Data(
        available=available,
        taken=available,
        coordinates=_address(coordinates),
        coordinates_stride=available * dimensions,
        values=_address(values),
        mask=None if samples.mask is None else _address(samples.mask),
    )


def _floats(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32).contiguous()


def native_gradient(field: Field, signal: Signal, rows: Tensor, samples: Samples) -> tuple[Tensor, Tensor]:
    """Losses [F] and gradients [F, P] of rows of weights [F, P] on a batch of samples [F, N, ...]."""
    net, count = _net(field), len(rows)
    rows, samples = _floats(rows), samples.map(_floats)
    data = _data(samples, net.dimensions, net.channels)
    losses, gradients = rows.new_empty(count), rows.new_empty((count, field.layout.size))
    addresses = (_address(tensor) for tensor in (rows, losses, gradients))
    _call("nfscale_gradient", net, data, count, *addresses, torch.get_num_threads())
    return losses, gradients


def native_gradient_and_hvp(
    field: Field, signal: Signal, rows: Tensor, samples: Samples, probe: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [F], gradients [F, P] and Hessian-vector products [F, P] with probes [F, P]."""
    net, count = _net(field), len(rows)
    rows, probe, samples = _floats(rows), _floats(probe), samples.map(_floats)
    data = _data(samples, net.dimensions, net.channels)
    losses, gradients, products = rows.new_empty(count), torch.empty_like(rows), torch.empty_like(rows)
    addresses = (_address(tensor) for tensor in (rows, probe, losses, gradients, products))
    _call("nfscale_product", net, data, count, *addresses, torch.get_num_threads())
    return losses, gradients, products


def native_apply(field: Field, rows: Tensor) -> Apply:
    """`field.apply` of these rows of weights [F, P]: [F|1, N, D] -> [F, N, C], without gradients."""
    rows = _floats(rows)

    def apply(coordinates: Tensor) -> Tensor:
        net, coordinates = _net(field), _floats(coordinates)
        if coordinates.shape[-1] != net.dimensions:
            raise ValueError(f"coordinates {tuple(coordinates.shape)} for a field of {net.dimensions} dimensions")
        count, available = len(rows), coordinates.shape[1]
        values = rows.new_empty((count, available, net.channels))
        stride = coordinates[0].numel() if len(coordinates) == count else 0
        data = _Data(available=available, coordinates=_address(coordinates), coordinates_stride=stride)
        _call("nfscale_apply", net, data, count, _address(rows), _address(values), torch.get_num_threads())
        return values

    return apply


def native_steps(
    field: Field,
    optimizer: Optimizer,
    calibration: "Calibration | None",
    sampler: Sampler,
    rows: Tensor,
    state: State,
    samples: Samples,
    seeds: Tensor,
    steps: Tensor,
    rate: Tensor,
    count: int,
    fields: list[int],
    lengths: Tensor | None = None,
) -> None:
    """`count` steps of some fields of a batch, in place: rows [F, P] and the optimiser's state move, `steps` do not.

    Args:
        seeds: int64 [F], of the data.
        steps, rate: int64 [F], float32 [F], as in `Extra`, before the first of the steps.
        fields: indices of the fields that move.
        lengths: int64 [F], as in `Extra`.
    """
    net = _net(field)
    data, kept = _data(samples, net.dimensions, net.channels), []
    data.seeds, data.steps = _address(seeds), _address(steps)
    if not sampler.is_full:
        kept += _draw(data, sampler, seeds, steps)
    updates = updates_of(optimizer, calibration, state, steps, rate, count, lengths)
    update = _update(updates)
    moving = torch.tensor(fields, dtype=torch.int64)
    threads = torch.get_num_threads()
    _call("nfscale_advance", net, data, update, _address(moving), len(fields), count, _address(rows), threads)


def native_positions(sampler: Sampler, seeds: Tensor, first_step: Tensor, count: int) -> Tensor:
    """The twin of `Sampler.positions`: int64 [F, count, per_step]."""
    data = _Data()
    kept = _draw(data, sampler, seeds, first_step)
    positions = torch.empty((len(seeds), count, sampler.per_step), dtype=torch.int64)
    _library().nfscale_positions(data, len(seeds), count, _address(positions))
    del kept
    return positions


def _draw(data: _Data, sampler: Sampler, seeds: Tensor, steps: Tensor) -> list[Tensor]:
    """Have the steps draw their samples; returns what must live as long."""
    data.available, data.taken = sampler.available, sampler.per_step
    data.stream, data.seeds, data.steps = int(Stream.SAMPLING), _address(seeds), _address(steps)
    if sampler.kind == "uniform":
        data.sampling = _UNIFORM
        return []
    data.sampling = _STRATIFIED
    (starts, lengths), (units, unit_counts) = sampler.runs, sampler.units
    kept = [tensor.contiguous() for tensor in (starts, lengths, units, unit_counts)]
    data.run_start, data.run_length, data.units, data.unit_count = (_address(tensor) for tensor in kept)
    data.most_units = units.shape[1]
    return kept


def _update(updates: Updates) -> _Update:
    """Points into tensors of `updates`, which must live as long."""
    kind = _SHARED_DIAGONAL if updates.second is None else _ADAM if updates.probes is None else _OWN_DIAGONAL
    scalars = {name: getattr(updates, name) for name in ("beta1", "beta2", "epsilon", "damping", "update_every")}
    moments = ("first", "second", "step_size", "correction", "longest")
    names = (*moments, "diagonal_row", "inverse_diagonal", "probes", "factors")
    tensors = {name: getattr(updates, name) for name in names}
    addresses = {name: _address(tensor) for name, tensor in tensors.items() if tensor is not None}
    return _Update(kind=kind, probe_stream=int(Stream.PROBE), **addresses, **scalars)


def native_sine(u: Tensor) -> tuple[Tensor, Tensor]:
    """sin(pi u) and cos(pi u) as the native step computes them, for tests."""
    u = _floats(u)
    sines, cosines = torch.empty_like(u), torch.empty_like(u)
    _library().nfscale_sine(_address(u), _address(sines), _address(cosines), u.numel())
    return sines, cosines
