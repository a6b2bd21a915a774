"""The steps between two checks as a CUDA graph: of small batches, where launching kernels takes longer than they run.

All runs of steps of a batch are the same kernels with other inputs. The third one is taken on a stream of its own and
recorded there, with all its buffers; for the next ones their inputs are copied into these, and the record is replayed.
Whether or not a record is made, the same steps are taken; where one cannot be made, that is said once.

Danger: what is recorded may not wait for the device, copy from the host or allocate pinned memory. So what depends on
random numbers or on the optimiser's schedule is computed before, into the inputs, and the first run of anything
(loading kernels, asking what a library can do) is never the one that is recorded. Other threads may use the device.
"""

import contextlib
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from nfscale.engine.handwritten import Run, handwritten_steps, plan_of_steps
from nfscale.engine.handwritten_passes import Passes, Plan
from nfscale.engine.handwritten_updates import probe_words
from nfscale.engine.products import Precision
from nfscale.engine.sampling import Sampler
from nfscale.fields import Field
from nfscale.optim import Optimizer
from nfscale.optim.base import State
from nfscale.signals import Samples

if TYPE_CHECKING:
    from nfscale.engine.calibrate import Calibration  # which takes a step itself

_MOST_BYTES = 500_000_000
"""That the passes of a step read and write. A GPU moves 4 TB a second and starts a kernel in 3 us, and a step has some
30 of them: from here on they run longer than it takes to launch them."""
_RUNS_BEFORE = 2  # a batch that has no more runs than that is not worth a record
_FEWEST_STEPS, _MOST_STEPS = 5, 100  # of a record, which takes about as long to make as its steps once more


class Graph(Protocol):
    """Steps that can be repeated."""

    def run(self, body: Callable[[], None]) -> None:
        """Take them where they will be recorded."""
        ...

    def record(self, body: Callable[[], None]) -> None:
        """Without taking them."""
        ...

    def replay(self) -> None: ...


class CudaGraph:
    """On a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._graph = torch.cuda.CUDAGraph()

    def run(self, body: Callable[[], None]) -> None:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            body()
        current.wait_stream(self._stream)

    def record(self, body: Callable[[], None]) -> None:
        with torch.cuda.device(self._device):
            before, pool = torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
            try:
                with torch.cuda.graph(self._graph, pool, self._stream, capture_error_mode="thread_local"):
                    body()
            except BaseException:
                # Before 2.13 torch's allocator takes it for under way for ever: github.com/pytorch/pytorch/pull/180395
                with contextlib.suppress(Exception):
                    torch._C._cuda_endAllocateToPool(before.device_index, pool)
                raise
            finally:
                torch.cuda.set_stream(before)  # which a record that fails would leave changed

    def replay(self) -> None:
        with torch.cuda.device(self._device):
            self._graph.replay()


class Recorded:
    """`handwritten_steps` with a record of the batch that it steps; lives as long as a fit."""

    def __init__(self, precision: Precision = "float32", graph: Callable[[torch.device], Graph] = CudaGraph) -> None:
        self.precision: Precision = precision
        self._graph = graph
        self._key: Any = None
        self._runs = 0
        self._held: tuple[Run, Passes, Graph] | None = None
        self._failed = False

    def __call__(
        self,
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
        """`count` steps of some fields of a batch, in place: see `native.native_steps`."""
        length, taken = _length(count, getattr(optimizer, "update_every", 1)), 0
        places = (field, optimizer, calibration, sampler, rows, state, samples, seeds)
        plan = plan_of_steps(field, sampler, samples, len(rows), rows)
        if self._is_worth_it(plan, len(rows), length):
            self._start_over_if_new(*places[:5], samples, length)
            while count - taken >= length and self._run(plan, *places, steps + taken, rate, length, fields, lengths):
                taken += length
        if taken < count:
            rest = (steps + taken, rate, count - taken, fields, lengths)
            handwritten_steps(*places, *rest, precision=self.precision)

    def _is_worth_it(self, plan: Plan, fields: int, length: int) -> bool:
        alone = plan.together >= fields and plan.tiles == 1  # all fields are one chunk
        return not self._failed and alone and length >= _FEWEST_STEPS and _bytes_of_step(plan, fields) <= _MOST_BYTES

    def _start_over_if_new(
        self,
        field: Field,
        optimizer: Optimizer,
        calibration: "Calibration | None",
        sampler: Sampler,
        rows: Tensor,
        samples: Samples,
        length: int,
    ) -> None:
        """Forget the record of a batch of other shapes."""
        shapes = [None if t is None else t.shape for t in (samples.coordinates, samples.values, samples.mask)]
        key = (field, optimizer, id(calibration), sampler, rows.shape, rows.dtype, rows.device, shapes, length)
        if key != self._key:
            self._key, self._runs, self._held = key, 0, None

    def _run(
        self,
        plan: Plan,
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
        lengths: Tensor | None,
    ) -> bool:
        """Take `count` steps, or change nothing and return False."""
        if self._failed:
            return False
        self._runs += 1
        if self._runs <= _RUNS_BEFORE:
            places = (field, optimizer, calibration, sampler, rows, state, samples, seeds, steps, rate, count, fields)
            handwritten_steps(*places, lengths, precision=self.precision)
            return True
        # Empty slots step with the first field, whose results count once: so shapes stay while fields leave.
        index = torch.tensor(fields + fields[:1] * (len(rows) - len(fields)), device=rows.device)
        words = probe_words(optimizer, field.layout.size, seeds, steps, count)
        words = None if words is None else words[index]
        held = self._held
        try:
            passes = held[1] if held else Passes(plan, len(rows), rows, words is not None, self.precision)
            graph = held[2] if held else self._graph(rows.device)
            places = (optimizer, calibration, sampler, rows, state, samples, seeds, steps, rate, count, index)
            run = Run(passes, *places, words, lengths)
            run.draw(0, count)
            if held is None:
                graph.run(lambda: run.take(0, count))
            else:
                for ours, theirs in zip(held[0].inputs, run.inputs, strict=True):
                    ours.copy_(theirs)
                graph.replay()
        except RuntimeError as error:  # such as one of memory; nothing of the batch has changed
            self._give_up(error)
            return False
        (held[0] if held else run).store(rows, state, index[: len(fields)])
        if held is None:
            self._record(run, passes, graph, count)
        return True

    def _record(self, run: Run, passes: Passes, graph: Graph, count: int) -> None:
        try:
            graph.record(lambda: run.take(0, count))
        except Exception as error:
            self._give_up(error)
        else:
            self._held = run, passes, graph

    def _give_up(self, error: Exception) -> None:
        self._failed, self._held = True, None
        _say_once(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def _length(count: int, cadence: int) -> int:
    """Steps of a record: a part of `count` in nearly equal ones, that begins where curvature is looked up."""
    parts = -(-count // _MOST_STEPS)
    return -(-count // (parts * cadence)) * cadence if parts > 1 else count


def _bytes_of_step(plan: Plan, fields: int) -> int:
    """That the passes over the activations of a step read and write: float32, without the Hessian's."""
    layers = plan.field.depth
    return 4 * fields * plan.tile_points * plan.wide.width * (5 + 6 * layers + 6 * (layers - 1))


@lru_cache
def _say_once(reason: str) -> None:
    warnings.warn(f"steps are launched one by one, for a CUDA graph of them failed: {reason}", stacklevel=2)
