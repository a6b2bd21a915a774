"""How good samples are, and whether they are new: beside reconstructions and trivial baselines, in the same units.

- Frechet distance: between Gaussians fitted to features of samples and of held-out data, in the last hidden layer of a
  classifier trained on this run's original data (`Judge`). It is no FID, whose features are Inception's, and compares
  with nothing but rows of the same table.
- Label agreement: the share of samples that the same classifier takes for the class they were asked to be.
- Precision and recall: samples within the manifold of held-out data and held-out data within that of samples, by k
  nearest neighbours in the feature space (Kynkaanniemi et al., NeurIPS 2019).
- Novelty: a sample's distance to its nearest training field, over the median distance of a training field to the
  nearest other one; in weight space and in data space. Below 1 samples lie closer to the training set than it lies to
  itself.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from nfscale.errors import CallerError
from nfscale.learn.classify import centred, fit_classifier, predictions
from nfscale.learn.latents import Latents
from nfscale.learn.transforms import Standardizer

FEATURES = 64
MEMORISED_BELOW = 0.8
"""Median novelty ratio below which a sampler is reported as one that memorises."""
_COPY_BELOW = 0.5
"""Novelty ratio of a single sample that counts as a copy: at half the spacing of the training set."""
_NEIGHBOURS = 3  # of precision and recall, as in the paper
_EPOCHS = 15


class Judge(nn.Module):
    """A classifier whose last hidden layer is the feature space: convolutions for images, else an MLP."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.is_image = len(shape) == 3 and min(shape[:2]) >= 8
        if self.is_image:
            height, width, channels = shape
            left = 32 * -(-height // 4) * -(-width // 4)
            body = [
                *(nn.Conv2d(channels, 16, 3, 2, 1), nn.GELU(), nn.Conv2d(16, 32, 3, 2, 1), nn.GELU()),
                *(nn.Conv2d(32, 32, 3, 1, 1), nn.GELU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(left, FEATURES)),
            ]
        else:
            size = int(np.prod(shape))
            body = [nn.Flatten(), nn.Linear(size, 256), nn.GELU(), nn.Dropout(0.3), nn.Linear(256, FEATURES)]
        self.body, self.head = nn.Sequential(*body, nn.GELU()), nn.Linear(FEATURES, classes)

    def features(self, data: Tensor) -> Tensor:
        """[B, ...] -> [B, FEATURES]."""
        return self.body(data.movedim(3, 1) if self.is_image else data)

    def forward(self, data: Tensor) -> Tensor:
        return self.head(self.features(data))

    @property
    def description(self) -> str:
        kind = "convolutional classifier" if self.is_image else "MLP classifier"
        return f"{FEATURES} features of a {kind} trained on this run's original data"


@dataclass(frozen=True)
class Score:
    """Of one set of samples; lower is better of the distance alone."""

    name: str
    samples: int
    label_agreement: float
    frechet_distance: float
    precision: float
    recall: float
    novelty_weights: float
    """Median ratio."""
    novelty_data: float
    copies: float
    """Share of samples nearer to a training datum, in data space, than half of its spacing."""
    is_baseline: bool = False
    """Whether this is what a generator has to beat."""

    @property
    def novelty_ratio(self) -> float:
        """The smaller of the two medians."""
        return min(self.novelty_weights, self.novelty_data)

    @property
    def memorises(self) -> bool:
        return self.novelty_ratio < MEMORISED_BELOW


class Scorer:
    """Scores sets of samples against the training rows and held-out data of one run.

    Args:
        data: original data [N, ...] and their class numbers [N], by split: train, validation and test.
        train_weights: float32 [M, P], of the training rows, in the same order as data["train"].
        train_decoded: what those decode to: float32 [M, ...].
    """

    def __init__(
        self,
        data: dict[str, tuple[np.ndarray, Tensor]],
        train_weights: Tensor,
        train_decoded: np.ndarray,
        classes: int,
        seed: int = 0,
    ) -> None:
        originals, ranks = data["train"]
        torch.manual_seed(seed)
        inputs = torch.from_numpy(originals)
        self._scaled = centred(inputs)
        self.judge = Judge(originals.shape[1:], classes)
        fit_classifier(self.judge, self._scaled(inputs), ranks, _EPOCHS, seed)
        test, test_ranks = data["test"]
        self.judge_accuracy = float((self.predicted(test) == test_ranks).float().mean())
        """Of the classifier on held-out originals: what label agreement can reach."""
        held = np.concatenate([data["validation"][0], test])
        self._held = self._features(held)
        self._weights, self._decoded = train_weights, torch.from_numpy(train_decoded).flatten(1)
        self._spread_weights = float(nearest(self._weights, self._weights, itself=True).median())
        self._spread_data = float(nearest(self._decoded, self._decoded, itself=True).median())

    def predicted(self, data: np.ndarray) -> Tensor:
        """Class numbers [N]."""
        return predictions(self.judge, self._scaled(torch.from_numpy(data)))

    @torch.no_grad()
    def _features(self, data: np.ndarray) -> Tensor:
        inputs = self._scaled(torch.from_numpy(data))
        return torch.cat([self.judge.features(part) for part in inputs.split(512)])

    def score(self, name: str, weights: Tensor, data: np.ndarray, ranks: Tensor, is_baseline: bool = False) -> Score:
        """Of samples: differences from theta0 [S, P], what they decode to [S, ...], and the classes asked for [S]."""
        features = self._features(data)
        in_data = nearest(torch.from_numpy(data).flatten(1), self._decoded) / self._spread_data
        in_weights = nearest(weights, self._weights) / self._spread_weights
        precision, recall = precision_recall(features, self._held)
        return Score(
            name,
            len(data),
            float((self.predicted(data) == ranks).float().mean()),
            frechet_distance(features, self._held),
            precision,
            recall,
            float(in_weights.median()),
            float(in_data.median()),
            float((in_data < _COPY_BELOW).float().mean()),
            is_baseline,
        )


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """Between Gaussians fitted to two sets of features: [N, K], [M, K] -> |m - n|^2 + tr(A + B - 2 (A B)^(1/2))."""
    first, second = one.double(), other.double()
    a, b = torch.cov(first.T), torch.cov(second.T)
    values, vectors = torch.linalg.eigh(a)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()
    gap = (first.mean(0) - second.mean(0)).square().sum()
    return max(0.0, float(gap + a.trace() + b.trace() - 2 * cross))


def nearest(rows: Tensor, among: Tensor, itself: bool = False, rank: int = 1) -> Tensor:
    """Distance of each row to the `rank`-th nearest of others: [N, K], [M, K] -> [N].

    Args:
        itself: the two sets are one, and a row is not its own neighbour.
    """
    found = []
    for start in range(0, len(rows), 512):
        distances = torch.cdist(rows[start : start + 512], among)
        if itself:
            inside = torch.arange(len(distances))
            distances[inside, start + inside] = torch.inf
        found.append(distances.kthvalue(rank, dim=1).values)
    return torch.cat(found)


def precision_recall(samples: Tensor, data: Tensor) -> tuple[float, float]:
    """Share of samples in the union of balls around data that reach to the third neighbour, and the other way round."""
    return _inside(samples, data), _inside(data, samples)


def _inside(rows: Tensor, among: Tensor) -> float:
    radius = nearest(among, among, itself=True, rank=min(_NEIGHBOURS, len(among) - 1))
    inside = [(torch.cdist(part, among) <= radius).any(dim=1) for part in rows.split(512)]
    return float(torch.cat(inside).float().mean())


# --- trivial baselines: what a generator has to beat


def baselines(rows: Tensor, ranks: Tensor, wanted: Tensor, components: int, seed: int) -> dict[str, Tensor]:
    """Samples of each class by means that need no network: [M, P], int64 [M], int64 [S] -> {name: [S, P]}.

    Noise of several sizes on a training row (in units of each weight's deviation in its class), a Gaussian for each
    weight, a Gaussian with full covariance in the principal components of the class, and points between two rows.
    """
    generator = torch.Generator().manual_seed(seed)
    names = [*(f"noise {scale:g} on a training field" for scale in _NOISES), "Gaussian per weight", "PCA Gaussian"]
    found = {name: rows.new_empty(len(wanted), rows.shape[1]) for name in [*names, "between two fields"]}
    for rank in wanted.unique().tolist():
        mine, places = rows[ranks == rank], (wanted == rank).nonzero().flatten()
        count = len(places)
        if len(mine) < _FEWEST_ROWS:
            raise CallerError(f"class {rank} has {len(mine)} training rows; the baselines need {_FEWEST_ROWS} of each")
        mean, deviation = mine.mean(0), mine.std(0)

        def drawn(count: int = count, mine: Tensor = mine) -> Tensor:
            return mine[torch.randint(len(mine), (count,), generator=generator)]

        for scale in _NOISES:
            noise = torch.randn((count, rows.shape[1]), generator=generator)
            found[f"noise {scale:g} on a training field"][places] = drawn() + scale * deviation * noise
        found["Gaussian per weight"][places] = mean + deviation * torch.randn(
            (count, rows.shape[1]), generator=generator
        )
        kept = min(components, len(mine) - 2, rows.shape[1] - 1)
        plain = Standardizer(mean, deviation.clamp(min=1e-12))
        latents = Latents.of(mine, plain, kept)
        found["PCA Gaussian"][places] = latents.inverse(torch.randn((count, kept), generator=generator))
        share = torch.rand((count, 1), generator=generator)
        found["between two fields"][places] = torch.lerp(drawn(), drawn(), share)
    return found


_NOISES = (0.1, 0.3, 0.5)
_FEWEST_ROWS = 3
