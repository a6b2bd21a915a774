"""Twins of the plain step in Triton, for sine MLPs on an NVIDIA GPU: gradient, and all steps between two checks.

A program of `fused_kernels.py` takes one field through all its steps, so that a field has the same bits alone and in
any batch. Points of a step beyond `_MOST_POINTS` are divided among several programs, whose partial gradients a second
kernel adds up in their order; that too is decided by the number of points alone.

Products have float16 operands and float32 sums ("fp16"), or are float32 throughout ("ieee").
"""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from nfscale.engine.sampling import Sampler
from nfscale.engine.step import not_siren
from nfscale.engine.updates import Updates, updates_of
from nfscale.fields import MLP, Field
from nfscale.optim import Optimizer
from nfscale.optim.base import State
from nfscale.rng import Stream
from nfscale.signals import Samples, Signal

if TYPE_CHECKING:
    from nfscale.engine.calibrate import Calibration  # which takes a step itself

Precision = Literal["fp16", "ieee"]

_WIDTHS = (16, 32, 64, 128)
_DEPTHS = (2, 5)
_MOST_DIMENSIONS, _MOST_CHANNELS = 3, 8
_WIDEST_BY_ITSELF = 64  # wider fields spill registers: served where they are asked for
_DEEPEST_IN_FLOAT32 = 3  # of the widest fields: their weights take 167 of 227 KiB
_FP16_WEIGHT_SCALE = 3.0
"""Rounding of operands grows with the weight scale: against float32, nothing that shows at 2.5, 1.8 dB at 4 (56 dB)."""
_ERROR_BITS = 8
"""Errors are multiplied by a power of two so that values of a field reach 2^8: at 60 dB they are still normal float16,
and errors 255 times the values are finite."""
_PROBE_BITS = -5  # of probes: the derivative of a phase along signs is some hundreds, and grows with depth
_MOST_POINTS, _POINTS_OF_A_PROGRAM = 4096, 2048
"""Of a step, in one program and where there are several; untuned."""
_UPDATE_BLOCK = 1024
STAGES = 2  # of the pipeline that loads samples
_LONG_RUN = 1 << 16


@dataclass(frozen=True)
class _Launch:
    """How a kernel is launched; found by instruction counts of the compiled kernels, not by time."""

    tile: int
    warps: int


_LAUNCHES: dict[Precision, dict[int, _Launch]] = {
    "fp16": {16: _Launch(64, 2), 32: _Launch(64, 2), 64: _Launch(64, 4), 128: _Launch(64, 8)},
    "ieee": {16: _Launch(32, 4), 32: _Launch(32, 4), 64: _Launch(32, 8), 128: _Launch(16, 8)},
}


def refusal(device: torch.device, field: Field, signal: Signal, precision: Precision | None = None) -> str | None:
    """Why the fused step cannot serve these, or None if it can; does not look for Triton."""
    precision = precision or precision_of(field)
    if device.type != "cuda" and not (device.type == "cpu" and _interpreted()):
        return f"it runs on an NVIDIA GPU, not on {device} (for tests, TRITON_INTERPRET=1 lets it run on a CPU)"
    if (why := not_siren(field)) or not isinstance(field, MLP):
        return why
    if field.width not in _WIDTHS or not _DEPTHS[0] <= field.depth <= _DEPTHS[1]:
        widths = ", ".join(map(str, _WIDTHS))
        return f"it knows widths {widths} and depths {_DEPTHS[0]} to {_DEPTHS[1]}, not {field.width} x {field.depth}"
    if field.dimensions > _MOST_DIMENSIONS or field.channels > _MOST_CHANNELS:
        most = f"{_MOST_DIMENSIONS} dimensions and {_MOST_CHANNELS} channels"
        return f"it knows at most {most}, not {field.dimensions} and {field.channels}"
    if precision == "ieee" and field.width == _WIDTHS[-1] and field.depth > _DEEPEST_IN_FLOAT32:
        return f"float32 operands of width {field.width} and depth {field.depth} are more than a program has room for"
    if not getattr(signal, "squared_error", False):
        return f"it knows signals whose loss is the mean squared error at points, which {type(signal).__name__} is not"
    return None


def suits(field: Field) -> bool:
    """Whether the fused step is the fastest for a field that it serves."""
    return isinstance(field, MLP) and field.width <= _WIDEST_BY_ITSELF


def has_curvature(field: Field) -> bool:
    """Whether there is room for the Hessian-vector product of a field that the step serves."""
    return isinstance(field, MLP) and field.width <= _WIDEST_BY_ITSELF


@lru_cache
def unavailable(device: torch.device) -> str | None:
    """Why there are no kernels for this device on this machine, or None."""
    if find_spec("triton") is None:
        return "there is no Triton: pip install 'nfscale[triton]' (Linux)"
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "it is made for NVIDIA GPUs"
        capability = torch.cuda.get_device_capability(device)
        if capability[0] < 8:
            return f"it takes a GPU of compute capability 8.0 or newer, this one has {capability[0]}.{capability[1]}"
    if (device.type == "cpu") is not _kernels().INTERPRETED:
        return "TRITON_INTERPRET was changed after Triton was imported, or is set on a machine with a GPU"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _kernels() -> Any:
    from nfscale.engine import fused_kernels

    return fused_kernels


def precision_of(field: Field) -> Precision:
    """What a field is stepped in unless something else is asked for."""
    return "fp16" if isinstance(field, MLP) and field.weight_scale <= _FP16_WEIGHT_SCALE else "ieee"


class _Problem:
    """What the kernels are told of fields and samples of a batch; lives for one call, as the tensors may not."""

    def __init__(self, field: Field, samples: Samples, sampler: Sampler | None, precision: Precision | None) -> None:
        assert isinstance(field, MLP), "the dispatcher refuses other fields"
        import triton.language as tl

        kernels = _kernels()
        precision = precision or precision_of(field)
        launch = _LAUNCHES[precision][field.width]
        coordinates, values, mask = (None if t is None else _floats(t) for t in _tensors(samples))
        assert coordinates is not None
        assert values is not None
        self.count, self.available = values.shape[:2]
        for tensor, expected in ((coordinates, field.dimensions), (values, field.channels)):
            if tensor.shape != (self.count, self.available, expected):
                raise ValueError(
                    f"samples {tuple(tensor.shape)} where the field takes {(self.count, self.available, expected)}"
                )
        self.device = values.device
        self.taken = self.available if sampler is None or sampler.is_full else sampler.per_step
        self.samples = {
            "coordinates": coordinates,
            "values": values,
            "mask": values if mask is None else mask,
            "scales": _scales(values, mask),
        }
        sampling, tables = self._drawing(sampler)
        self.drawing = {"available": self.available, "taken": self.taken, **tables}
        self.options = {
            "omega_0": field.first_omega,
            "omega_hidden": field.omega_hidden,
            "STREAM": int(Stream.SAMPLING),
            "SAMPLING": sampling,
            "MASKED": mask is not None,
            "DIMENSIONS": field.dimensions,
            "CHANNELS": field.channels,
            "WIDTH": field.width,
            "DEPTH": field.depth,
            "TILE": launch.tile,
            "OPERAND": tl.float16 if precision == "fp16" else tl.float32,
            "FAST": not kernels.INTERPRETED,
            "SIZE": field.layout.size,
            "num_warps": launch.warps,
            "num_stages": STAGES,
            "enable_fp_fusion": True,
        }
        self.chunks = 1 if self.taken <= _MOST_POINTS else -(-self.taken // _POINTS_OF_A_PROGRAM)
        self.chunk = self.taken if self.chunks == 1 else _POINTS_OF_A_PROGRAM

    def _drawing(self, sampler: Sampler | None) -> tuple[int, dict[str, Any]]:
        """The kind of sampling, and tables of it."""
        kernels = _kernels()
        none = torch.empty(0, dtype=torch.int32, device=self.device)
        if sampler is None or sampler.is_full:
            return kernels.ALL.value, {"runs": none, "units": none, "most_units": 0}
        if sampler.kind == "uniform":
            return kernels.UNIFORM.value, {"runs": none, "units": none, "most_units": 0}
        (starts, lengths), (units, unit_counts) = sampler.runs, sampler.units
        runs = torch.stack([starts, lengths, unit_counts], dim=1)
        tables = {name: table.to(self.device, torch.int32) for name, table in (("runs", runs), ("units", units))}
        kind = kernels.LONG_RUNS if int(lengths.max()) >= _LONG_RUN else kernels.STRATIFIED
        return kind.value, {**tables, "most_units": units.shape[1]}

    def on_device(self) -> AbstractContextManager[Any]:
        """Kernels are launched on the current device, whatever device the tensors are on."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def positions(self, fields: int) -> Tensor:
        """Where programs note the points of a step."""
        taken = self.taken if self.options["SAMPLING"] != _kernels().ALL.value else 0
        return torch.empty((fields, taken), dtype=torch.int32, device=self.device)

    def partials(self, fields: int, size: int | None = None) -> Tensor:
        """Where programs leave what their points add to P numbers, or `size`, for `_update` to add up."""
        shape = (fields, self.chunks, 2 + (size or self.options["SIZE"]))
        return torch.empty(shape, dtype=torch.float32, device=self.device)


def _tensors(samples: Samples) -> tuple[Tensor, Tensor, Tensor | None]:
    return samples.coordinates, samples.values, samples.mask


def _floats(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32).contiguous()


def _scales(values: Tensor, mask: Tensor | None) -> Tensor:
    """Powers of two that errors of each field are multiplied by: float32 [F]. Functions of the field's data alone."""
    largest = values.abs().amax(dim=(1, 2)).clamp(min=1.0)
    if mask is not None:
        largest = largest * mask.abs().amax(dim=1).clamp(min=2.0**-60)
    return _powers_of_two(largest.clamp(max=2.0**60), _ERROR_BITS)


def _powers_of_two(largest: Tensor, bits: int) -> Tensor:
    """What brings such numbers [F] just below 2^bits."""
    return torch.ldexp(torch.ones_like(largest), bits - torch.frexp(largest).exponent)


def fused_gradient(
    field: Field, signal: Signal, rows: Tensor, samples: Samples, precision: Precision | None = None
) -> tuple[Tensor, Tensor]:
    """Losses [F] and gradients [F, P] of rows of weights [F, P] on a batch of samples [F, N, ...]."""
    problem, rows = _Problem(field, samples, None, precision), _floats(rows)
    losses, gradients = rows.new_empty(len(rows)), torch.empty_like(rows)
    fields = torch.arange(len(rows), device=rows.device)
    positions, partials = problem.positions(len(rows)), problem.partials(len(rows))
    with problem.on_device():
        _add_up(problem, rows, fields, fields, fields, positions, partials, 0)
        _update(problem, None, partials, gradients, losses, fields, 0)
    return losses, gradients


def fused_gradient_and_hvp(
    field: Field, signal: Signal, rows: Tensor, samples: Samples, probe: Tensor, precision: Precision | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [F], gradients [F, P] and Hessian-vector products [F, P] with probes [F, P]."""
    from nfscale.engine import fused_curvature

    problem, rows, probe = _Problem(field, samples, None, precision), _floats(rows), _floats(probe)
    shrink = _powers_of_two(probe.abs().amax(dim=1).clamp(min=2.0**-60), _PROBE_BITS)[:, None]
    size = field.layout.size
    losses, both = rows.new_empty(len(rows)), rows.new_empty((len(rows), 2 * size))
    fields = torch.arange(len(rows), device=rows.device)
    partials = problem.partials(len(rows), 2 * size)
    drawing = ("STREAM", "SAMPLING")
    with problem.on_device():
        fused_curvature.partial_curvature[(len(rows), problem.chunks)](
            rows=rows,
            probes=probe * shrink,
            fields=fields,
            partials=partials,
            available=problem.available,
            chunk=problem.chunk,
            **problem.samples,
            **{name: value for name, value in problem.options.items() if name not in drawing},
        )
        _update(problem, None, partials, both, losses, fields, 0)
    return losses, both[:, :size].contiguous(), both[:, size:] / shrink


def fused_steps(
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
    precision: Precision | None = None,
) -> None:
    """`count` steps of some fields of a batch, in place: see `native.native_steps`.

    Nothing here waits for the device.
    """
    assert rows.is_contiguous(), "the kernels change rows where they are"
    problem = _Problem(field, samples, sampler, precision)
    updates = updates_of(optimizer, calibration, state, steps, rate, count, lengths)
    moving = torch.tensor(fields, dtype=torch.int64, device=rows.device)
    with problem.on_device():
        if problem.chunks == 1:
            counts = torch.full((len(fields),), count, dtype=torch.int32, device=rows.device)
            _kernels().advance[(len(fields),)](
                rows=rows,
                fields=moving,
                counts=counts,
                seeds=seeds,
                steps=steps,
                positions=problem.positions(len(fields)),
                step_count=count,
                **problem.samples,
                **problem.drawing,
                **problem.options,
                **_update_options(updates, rows),
            )
            return
        positions, partials = problem.positions(len(fields)), problem.partials(len(fields))
        for index in range(count):
            _add_up(problem, rows, moving, seeds, steps, positions, partials, index)
            _update(problem, updates, partials, rows, rows, moving, index)


def _add_up(
    problem: _Problem,
    rows: Tensor,
    fields: Tensor,
    seeds: Tensor,
    steps: Tensor,
    positions: Tensor,
    partials: Tensor,
    index: int,
) -> None:
    _kernels().partial_gradient[(len(fields), problem.chunks)](
        rows=rows,
        fields=fields,
        seeds=seeds,
        steps=steps,
        positions=positions,
        partials=partials,
        chunk=problem.chunk,
        index=index,
        **problem.samples,
        **problem.drawing,
        **problem.options,
    )


def _update(
    problem: _Problem,
    updates: Updates | None,
    partials: Tensor,
    rows: Tensor,
    losses: Tensor,
    fields: Tensor,
    index: int,
) -> None:
    """The step of each field, or where there are no `updates` its gradient into `rows` and its loss."""
    _kernels().update[(len(fields),)](
        partials=partials,
        rows=rows,
        losses=losses,
        fields=fields,
        chunks=problem.chunks,
        step_count=1 if updates is None else updates.step_size.shape[1],
        index=index,
        SIZE=partials.shape[-1] - 2,
        BLOCK=_UPDATE_BLOCK,
        enable_fp_fusion=True,
        **_update_options(updates, rows),
    )


def _update_options(updates: Updates | None, unused: Tensor) -> dict[str, Any]:
    """What kernels are told of an update.

    Args:
        unused: stands where there is no tensor.
    """
    kernels = _kernels()
    if updates is None:
        kind, updates = kernels.GRADIENT, Updates(unused, None, unused, unused)
    else:
        kind = kernels.PRECONDITIONED if updates.second is None else kernels.ADAM
    tensors = {
        "first_moments": updates.first,
        "second_moments": updates.second,
        "step_size": updates.step_size,
        "correction": updates.correction,
        "longest": updates.longest,
        "diagonal_row": updates.diagonal_row,
        "inverse_diagonal": updates.inverse_diagonal,
    }
    assert updates.first.is_contiguous(), "the kernels change the optimiser's state where it is"
    assert updates.second is None or updates.second.is_contiguous()
    return {
        **{name: unused if tensor is None else tensor.contiguous() for name, tensor in tensors.items()},
        "beta1": updates.beta1,
        "rest1": 1 - updates.beta1,
        "beta2": updates.beta2,
        "rest2": 1 - updates.beta2,
        "epsilon": updates.epsilon,
        "KIND": kind.value,
        "CLIPPED": updates.longest is not None,
    }
