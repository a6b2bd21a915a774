"""Classifiers of fields and of the data they were fitted to, on the same splits.

Rows are cut into folds by their ids; each fold is tested once by models trained on the others, and all predictions are
pooled: every row counts once, and the interval is that of one proportion. Or the table's own `test` rows are tested by
models trained on all others, as published accuracies are.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from nfscale.errors import CallerError
from nfscale.learn.readers import READERS, Fields, mlp
from nfscale.learn.subject import Subject
from nfscale.learn.training import Schedule, train
from nfscale.learn.transforms import Standardizer

PIXELS = "pixels"
"""The name of the baseline that sees the data instead of the fields."""

_SMOOTHING = 0.1  # of labels: a point of accuracy on thousands of rows, whatever the reader
_EPOCHS = {"mlp": 30, "probe": 40, "tokens": 20, "equivariant": 20, PIXELS: 30}
_RATES = {"tokens": 1e-3, "equivariant": 3e-3}


@dataclass
class Accuracy:
    """Of one reader over all folds, as shares."""

    reader: str
    correct: int
    rows: int
    parameters: int
    confusion: np.ndarray = field(repr=False)
    """int64 [K, K]: rows of class i that were read as class j."""

    @property
    def value(self) -> float:
        return self.correct / self.rows

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, by Wilson (1927)."""
        z, n, p = 1.96, self.rows, self.value
        centre, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        return (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)


def classify(
    subject: Subject,
    readers: Sequence[str],
    folds: int = 5,
    seed: int = 0,
    epochs_scale: float = 1.0,
    progress: Callable[[str, int, float], None] = lambda reader, fold, accuracy: None,
) -> list[Accuracy]:
    """Train and test each reader on each fold; `pixels` among the readers is an MLP on the original data.

    Args:
        folds: 1: the table's own split.
        epochs_scale: of the epochs that each reader usually trains for.
        progress: told (reader, fold, accuracy on it) as folds are done.

    Raises:
        CallerError: if a reader is unknown, rows have no classes, or the data for `pixels` cannot be read.
    """
    subject.require_classes()
    if unknown := set(readers) - {*READERS, PIXELS}:
        raise CallerError(f"unknown readers {sorted(unknown)}; known: {', '.join([*READERS, PIXELS])}")
    labelled = (subject.ranks >= 0).nonzero().flatten()
    fold = (_own_split(subject) if folds == 1 else subject.fold(seed, folds))[labelled]
    if len(fold.unique()) < folds:
        raise CallerError(f"{len(labelled)} labelled rows are too few for {folds} folds")
    found = []
    for name in readers:
        inputs = torch.from_numpy(subject.originals).flatten(1) if name == PIXELS else subject.weights
        inputs, ranks = inputs[labelled], subject.ranks[labelled]
        confusion = np.zeros((len(subject.labels), len(subject.labels)), dtype=np.int64)
        parameters = 0
        for held in range(folds):
            model, scaled = _fitted(subject, name, inputs, ranks, fold != held, seed + held, epochs_scale)
            predicted = predictions(model, scaled(inputs[fold == held]))
            truth = ranks[fold == held]
            np.add.at(confusion, (truth.numpy(), predicted.numpy()), 1)
            parameters = sum(tensor.numel() for tensor in model.parameters())
            progress(name, held, float((predicted == truth).float().mean()))
        found.append(Accuracy(name, int(np.trace(confusion)), int(confusion.sum()), parameters, confusion))
    return found


def _own_split(subject: Subject) -> Tensor:
    """int64 [N]: 0 of rows that the table says are for testing, 1 of others."""
    fold = torch.tensor([0 if name == "test" else 1 for name in subject.splits])
    if len(fold.unique()) < 2:
        names = ", ".join(sorted({name or "none" for name in subject.splits}))
        raise CallerError(f"{subject.table.folder} has no rows for testing beside others (splits: {names}); use folds")
    return fold


def _fitted(
    subject: Subject, name: str, inputs: Tensor, ranks: Tensor, chosen: Tensor, seed: int, epochs_scale: float
) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """A reader trained on the chosen rows, and how it wants its inputs."""
    rows, classes = inputs[chosen], len(subject.labels)
    torch.manual_seed(seed)  # of initialization and dropout
    if name == PIXELS:
        scaled: Callable[[Tensor], Tensor] = centred(rows)
        model: nn.Module = mlp(rows.shape[1], 512, classes)
    else:
        scaled = standardizer = Standardizer.of(rows, subject.table.layout)
        theta0 = subject.table.theta0
        start = None if theta0 is None else torch.from_numpy(theta0)
        model = READERS[name](Fields(subject.table.field, standardizer, start, subject.spacing), classes)
    epochs = max(1, round(_EPOCHS[name] * epochs_scale))
    return fit_classifier(model, scaled(rows), ranks[chosen], epochs, seed, _RATES.get(name, 2e-3)), scaled


def centred(rows: Tensor) -> Callable[[Tensor], Tensor]:
    """Data [N, ...] less their mean over one deviation for all: what a model of data is given."""
    mean, deviation = rows.mean(0), rows.std().clamp(min=1e-6)
    return lambda data: (data - mean) / deviation


def fit_classifier(
    model: nn.Module, inputs: Tensor, ranks: Tensor, epochs: int, seed: int, learning_rate: float = 2e-3
) -> nn.Module:
    """The model trained to tell the classes of its inputs apart: [N, ...], int64 [N]."""
    loss = nn.CrossEntropyLoss(label_smoothing=_SMOOTHING)
    batch = min(128, len(inputs))
    schedule = Schedule(epochs * max(1, len(inputs) // batch), batch, learning_rate)
    return train(model, lambda net, at: loss(net(inputs[at]), ranks[at]), len(inputs), schedule, seed).model


@torch.no_grad()
def predictions(model: nn.Module, inputs: Tensor) -> Tensor:
    """Class numbers: [N, ...] -> int64 [N]."""
    return torch.cat([model(part).argmax(dim=1) for part in inputs.split(512)])
