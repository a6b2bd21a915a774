"""How many fields fit together: two real steps at two sizes say what memory one more field takes.

What torch allocates is counted, so that no formula has to know a field's layers, a signal's predictions or an
optimiser's state. On a CUDA device the allocator keeps the peak; elsewhere every operation is watched and the
storages that it makes are counted while they live.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nfscale.engine.batch import MINIMUM_SLOTS, Batch
from nfscale.engine.sampling import Sampler
from nfscale.fields import Field
from nfscale.signals import Samples, Signal

_CPU_STEP_BYTES = 12 << 20
"""What a step touches. Larger batches leave the cache, smaller ones spend their time between operations. A step of
a field of 64 units, 4 layers and 256 samples (0.97 MB) takes 702, 600, 612, 635, 673 us at 4, 8, 12, 15, 25 slots; of
32 units, 2 layers and 64 samples (79 kB) 32, 30, 32, 35 us at 100, 150, 204, 320 (one core with 1 MiB of L2 and a
share of 32 MiB of L3)."""
_CPU_TOTAL_BYTES = 1 << 30  # with the samples that a step leaves alone: several workers share a machine's memory
_CUDA_FRACTION = 0.5  # of the free device memory: other sizes, other kinds of data and evaluations need some, too
_MAX_SLOTS = {"cpu": 1024, "cuda": 16384}
_PROBED_SLOTS = (MINIMUM_SLOTS, 2 * MINIMUM_SLOTS)
_PROBED_STEPS = 2  # in the second one, what the first one left behind is still there


@dataclass(frozen=True)
class FieldBytes:
    """What one more field adds to the memory of a batch, at its peak."""

    total: int
    step: int
    """Without samples that a step leaves alone: those of checks, those held back, all but a minibatch."""


def batch_slots(field_bytes: FieldBytes, device: torch.device) -> int:
    """How many fields to fit together."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        budget = int((torch.cuda.mem_get_info(device)[0] + unused) * _CUDA_FRACTION)
        slots = budget // field_bytes.total
    else:
        slots = min(_CPU_STEP_BYTES // field_bytes.step, _CPU_TOTAL_BYTES // field_bytes.total)
    return max(MINIMUM_SLOTS, min(slots, _MAX_SLOTS.get(device.type, 1024)))


def measured_field_bytes(new_batch: Callable[[int], Batch], device: torch.device) -> FieldBytes | None:
    """Takes two steps of two small batches that are thrown away; None if the larger one shows no more memory.

    Args:
        new_batch: a batch of its own of so many fields.
    """
    if device.type == "cuda":
        _step(new_batch, _PROBED_SLOTS[0])  # libraries take their workspaces in the first step and keep them
    peaks, idle = [], []
    for slots in _PROBED_SLOTS:
        with _peak_bytes(device) as peak:
            idle.append(_step(new_batch, slots))
        peaks.append(peak())
    more = _PROBED_SLOTS[1] - _PROBED_SLOTS[0]
    total = (peaks[1] - peaks[0]) // more
    step = total - (idle[1] - idle[0]) // more
    return FieldBytes(total, step) if step > 0 else None


def estimated_field_bytes(field: Field, signal: Signal, sampler: Sampler) -> FieldBytes:
    """What a field takes by the count of its tensors, for where nothing can be measured."""
    widest = max(entry.shape[0] for entry in field.layout.entries)
    layers = len(field.layout.entries) // 2
    points = min(sampler.per_step, sampler.available) * signal.points_per_sample
    step = 4 * (3 * layers * points * widest + 10 * field.layout.size)
    return FieldBytes(step + 4 * 8 * sampler.available, step)


def _step(new_batch: Callable[[int], Batch], slots: int) -> int:
    """Make a batch and take steps; bytes of its samples that these leave alone."""
    batch = new_batch(slots)
    batch.advance(_PROBED_STEPS)
    samples = batch.samples
    idle = [part for part in (samples.check, samples.heldout) if part is not None]
    if not batch.sampler.is_full:
        idle.append(Samples(samples.coordinates, samples.values, samples.mask))
    return sum(_bytes_of(part) for part in idle)


def _bytes_of(samples: Samples) -> int:
    tensors = (samples.coordinates, samples.values, samples.mask)
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def is_out_of_memory(error: RuntimeError) -> bool:
    """On a GPU torch has a class for it, on a CPU only the words of its allocator."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def _peak_bytes(device: torch.device) -> Iterator[Callable[[], int]]:
    """Yields what tells, afterwards, the most bytes that torch held at once."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
    else:
        storages = _Storages()
        with storages:
            yield lambda: storages.peak


class _CountsStorages:
    """Counts the bytes of the storages that operations return and that still live."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._held = 0
        self._watched: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(returned):
            if isinstance(leaf, Tensor):
                self._watch(leaf.untyped_storage())
        self.peak = max(self.peak, self._held)
        return returned

    def _watch(self, storage: torch.UntypedStorage) -> None:
        """Views share a storage, which counts once; a storage lives as long as any tensor or graph that uses it."""
        key, size = id(storage), storage.nbytes()
        if key in self._watched:
            return

        def released(_: weakref.ref) -> None:
            del self._watched[key]
            self._held -= size

        self._watched[key] = weakref.ref(storage, released)
        self._held += size


class _Storages(_CountsStorages, TorchDispatchMode):
    """The mode has no body: where it has the method itself, torch loads its compiler first, which takes 0.6 s."""
