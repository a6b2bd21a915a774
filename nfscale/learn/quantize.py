"""Weights in 16 or 8 bits, with what that costs measured on the data, datum by datum.

`float16` rounds weights - theta0 (the weights themselves where fields share no theta0), which is what
`store.dtype=delta_float16` stores. `int8` stores them in 255 steps of a size of its own for each field and tensor.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from nfscale.engine.step import evaluate, stack_samples
from nfscale.errors import CallerError
from nfscale.layout import Layout
from nfscale.learn.data import ALL_OK, Rows
from nfscale.run import OpenRun
from nfscale.signals import Kind, Samples
from nfscale.store.table import WeightsTable

LIMITS_DB = {"float16": 0.1, "int8": 1.0}
"""Median loss above which an export is refused."""

_TOGETHER = 64  # fields measured at once


@dataclass(frozen=True)
class Quantized:
    """Rows of differences from theta0 in few bits."""

    kind: str
    codes: np.ndarray
    """float16 or int8 [N, P]"""
    scales: np.ndarray | None
    """Of int8: float32 [N, E], the size of a step of each tensor of the layout."""

    def restored(self, layout: Layout) -> Tensor:
        """float32 [N, P]."""
        rows = torch.from_numpy(self.codes.astype(np.float32))
        if self.scales is not None:
            for place, entry in enumerate(layout.entries):
                rows[:, entry.offset : entry.offset + entry.size] *= torch.from_numpy(self.scales[:, place, None])
        return rows


def quantized(differences: Tensor, layout: Layout, kind: str) -> Quantized:
    """Rows in few bits: float32 [N, P].

    Raises:
        CallerError: if the kind is unknown.
    """
    if kind == "float16":
        return Quantized(kind, differences.numpy().astype(np.float16), None)
    if kind != "int8":
        raise CallerError(f"unknown dtype {kind!r}; known: {', '.join(LIMITS_DB)}")
    scales = torch.stack(
        [differences[:, e.offset : e.offset + e.size].abs().amax(dim=1) / 127 for e in layout.entries], dim=1
    ).clamp(min=1e-30)
    codes = torch.empty(differences.shape, dtype=torch.int8)
    for place, entry in enumerate(layout.entries):
        part = slice(entry.offset, entry.offset + entry.size)
        codes[:, part] = (differences[:, part] / scales[:, place, None]).round().to(torch.int8)
    return Quantized(kind, codes.numpy(), scales.numpy())


@dataclass(frozen=True)
class Loss:
    """What few bits cost, in the unit of the run's quality: positive is worse."""

    kind: str
    quality_name: str
    ids: list[str]
    losses: np.ndarray
    """float32 [N], of each datum."""

    @property
    def median(self) -> float:
        return float(np.median(self.losses))

    @property
    def worst(self) -> float:
        return float(self.losses.max())

    def refuse(self) -> None:
        """Refuse what costs too much.

        Raises:
            CallerError: if the median loss is above the kind's limit.
        """
        limit = LIMITS_DB[self.kind] * (1 if self.quality_name.endswith("_db") else 0.01)
        if self.median > limit:
            raise CallerError(
                f"{self.kind} costs {self.median:.2f} {self.quality_name} in the median of {len(self.ids)} data, more "
                f"than {limit:g}; export with --dtype float32" + (" or float16" if self.kind == "int8" else "")
            )


def measured_loss(
    table: WeightsTable,
    kind: str,
    rows: Rows = ALL_OK,
    progress: Callable[[int], None] = lambda done: None,
) -> Loss:
    """What the data lose when their fields are stored in few bits, measured anew on every datum.

    Raises:
        CallerError: if the dataset cannot be read.
    """
    run = OpenRun(table.folder)
    read = table.to_arrow(["datum_id", "weights"], rows.expression)
    ids, weights = read["datum_id"].to_pylist(), table.matrix(read["weights"])
    start = np.float32(0) if table.theta0 is None else table.theta0
    losses = np.zeros(len(ids), dtype=np.float32)
    for first in range(0, len(ids), _TOGETHER):
        places = list(range(first, min(first + _TOGETHER, len(ids))))
        exact = torch.from_numpy(weights[places])
        coarse = quantized(torch.from_numpy(weights[places] - start), table.layout, kind).restored(table.layout)
        coarse = coarse + torch.from_numpy(np.asarray(start))
        by_kind: dict[Kind, list[tuple[int, Samples]]] = {}
        for position, place in zip(table.dataset_positions([ids[p] for p in places]), range(len(places)), strict=True):
            content = run.dataset.read(position).content
            if content is None:
                raise CallerError(
                    f"datum {ids[first + place]!r} cannot be read any more; nothing can be measured on it"
                )
            samples = replace(run.signal.samples(content), heldout=None)
            by_kind.setdefault(samples.kind, []).append((place, samples))
        for group in by_kind.values():
            alike = group if len(group) > 1 else group * 2  # a lone field rounds differently
            stacked = stack_samples([samples for _, samples in alike], torch.device("cpu"))
            at = [place for place, _ in alike]
            before, after = (evaluate(run.field, run.signal, part[at], stacked)[1] for part in (exact, coarse))
            for place, loss in zip(at, (before - after).tolist(), strict=True):
                losses[first + place] = loss
        progress(first + len(places))
    return Loss(kind, table.plan.quality_name, ids, losses)
