"""A run as something to learn from: its rows in memory, their classes and splits, and the data they were fitted to."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nfscale.errors import CallerError, EncodeError
from nfscale.learn.data import ALL_OK, Labels, Rows
from nfscale.rng import datum_seed
from nfscale.run import OpenRun
from nfscale.store.run_folder import RunFolder
from nfscale.store.table import WeightsTable

FOLDS = 10
"""Parts into which rows are cut by a hash of their id where the table has no splits."""


@dataclass(frozen=True)
class Subject:
    """The rows of a run that a filter lets through, sorted by index."""

    table: WeightsTable
    ids: list[str]
    weights: Tensor
    """float32 [N, P], differences from theta0 where the run has one."""
    ranks: Tensor
    """int64 [N], class numbers; -1 where a row has no label."""
    labels: Labels
    splits: list[str | None]
    shape: tuple[Any, ...]
    """Of the data, as their signal understands it: that of the most rows."""
    metrics: dict[str, float]
    """What the table says of a datum of that shape."""

    @classmethod
    def of(cls, table: WeightsTable, rows: Rows = ALL_OK) -> "Subject":
        """Read the rows.

        Raises:
            CallerError: if none pass.
        """
        columns = ["datum_id", "label", "split", "weights", "metrics"]
        read = table.to_arrow(columns, rows.expression)
        if not len(read):
            raise CallerError(f"{table.folder} has no rows to learn from: no row passes the filter")
        weights = table.matrix(read["weights"])
        if table.theta0 is not None:
            weights = weights - table.theta0
        labels = Labels(read["label"].unique().to_pylist())
        measures = [dict(one) for one in read["metrics"].to_pylist()]
        shapes = [table.signal.shape_of(one) for one in measures]
        commonest = max(set(shapes), key=shapes.count)
        return cls(
            table,
            read["datum_id"].to_pylist(),
            torch.from_numpy(weights),
            torch.from_numpy(labels.ranks(read["label"])),
            labels,
            read["split"].to_pylist(),
            commonest,
            measures[shapes.index(commonest)],
        )

    def __len__(self) -> int:
        return len(self.ids)

    def fold(self, seed: int, folds: int = FOLDS) -> Tensor:
        """int64 [N] in [0, folds): a hash of the datum's id, so that several fields of a datum fall together."""
        return torch.tensor([datum_seed(seed, name.partition("#")[0]) % folds for name in self.ids])

    def split(self, seed: int) -> dict[str, Tensor]:
        """Positions of the rows to train on, to stop by (`validation`) and to score with (`test`).

        Those of the table where it has splits (a missing `validation` is a tenth of `train`); else tenths by id.
        """
        fold = self.fold(seed)
        names = np.array([name or "" for name in self.splits])
        if not (names == "train").any():
            parts = {"train": fold >= 2, "validation": fold == 1, "test": fold == 0}
        else:
            train, validation, test = (torch.from_numpy(names == name) for name in ("train", "validation", "test"))
            if not validation.any():
                train, validation = train & (fold != 1), train & (fold == 1)
            parts = {"train": train, "validation": validation, "test": test if bool(test.any()) else validation}
        found = {name: part.nonzero().flatten() for name, part in parts.items()}
        if small := [name for name, part in found.items() if len(part) < 2]:
            raise CallerError(f"{self.table.folder} has too few rows for a {small[0]} split: {len(self)} in all")
        return found

    @property
    def spacing(self) -> float:
        """Between two samples of a datum, in a domain from -1 to 1."""
        count = len(self.table.signal.coordinates(self.shape))
        return 2 * count ** (-1 / self.table.signal.dimensions)

    def require_classes(self) -> None:
        """Check that the rows have classes to tell apart.

        Raises:
            CallerError: if there are fewer than two.
        """
        if len(self.labels) < 2:
            raise CallerError(
                f"{self.table.folder} has {len(self.labels)} labels; a classifier needs a dataset with at least 2 "
                "(dataset.label_from, label_column, ...)"
            )

    def raw(self, differences: Tensor) -> Tensor:
        """Differences as the weights that decode: [B, P] -> [B, P]."""
        theta0 = self.table.theta0
        return differences if theta0 is None else differences + torch.from_numpy(theta0).to(differences.device)

    def decoded(self, differences: Tensor) -> np.ndarray:
        """Data of `shape` out of weights: [B, P] -> float32 [B, ...].

        Raises:
            CallerError: if data of this signal are no arrays.
        """
        values = self.table.values(self.raw(differences), self.shape)
        return self._as_array(self.table.signal.reconstruct(values, self.shape))

    @cached_property
    def originals(self) -> np.ndarray:
        """The data that the rows were fitted to, as their fields represent them: float32 [N, ...].

        Raises:
            CallerError: if the dataset is gone, or its data are no arrays of one shape.
        """
        run = OpenRun(RunFolder(self.table.folder.files.root))
        try:
            places = self.table.dataset_positions(self.ids)
            data = [run.dataset.read(place) for place in places]
        except (EncodeError, OSError) as error:
            raise CallerError(f"the data of {self.table.folder} cannot be read: {error}") from error
        if gone := [f"{datum.id}: {datum.error}" for datum in data if datum.content is None]:
            raise CallerError(f"{len(gone)} data of {self.table.folder} cannot be read any more, such as {gone[0]}")
        return self._as_array([self.table.signal.original(datum.content) for datum in data])

    def _as_array(self, contents: Sequence[Any]) -> np.ndarray:
        shapes = {getattr(content, "shape", None) for content in contents}
        if len(shapes) != 1 or None in shapes:
            kind = self.table.plan.job["signal"]["kind"]
            raise CallerError(
                f"data of this run ({kind}) are no arrays of one shape, so there is nothing to compare data by; "
                "use signal.resize or the like, or leave the scores on data out"
            )
        return np.stack([np.asarray(content, dtype=np.float32) for content in contents])
