"""What single products Hv with probes of independent signs say of a Hessian.

E[(Hv)_i^2] = |H_i|^2 (Dauphin, de Vries & Bengio, NeurIPS 2015) and E[v_i (Hv)_i] = H_ii (Bekas, Kokiopoulou & Saad,
Applied Numerical Mathematics, 2007, after Hutchinson). Of fields with sines, Gaussians, wavelets and sinc Hv is dense,
of ReLU fields sparse (Chng, Saratchandran & Lucey, CVPR 2025, theorems 4.2 and 4.3): a probe tells nothing of the
weights where it is zero.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nfscale.layout import Layout
from nfscale.rng import Stream, as_tensor, datum_seed, rademacher

PROBES = 100
COUNTS = (1, 10, PROBES)
"""Probes that an estimate is made of."""
_SMALL = 1e-3


@dataclass(frozen=True)
class LayerSparsity:
    """Of Hv in one layer, weights and biases, averaged over 100 probes."""

    layer: str
    zero_share: float
    """Of the entries, exactly 0."""
    small_share: float
    """Of the entries, at most 1e-3 of the largest absolute one in this layer and product."""


@dataclass(frozen=True)
class Estimates:
    """Of diagonals from a few probes: errors as |estimate - exact| / |exact| over all weights, Pearson's correlations;
    means over as many disjoint groups as 100 probes make."""

    probes: int
    equilibrated_error: float
    """Of sqrt(mean (Hv)^2), what ESGD divides by, against the rows' norms."""
    equilibrated_correlation: float
    jacobi_error: float
    """Of mean v Hv, Hutchinson's estimate, against diag H."""
    jacobi_correlation: float


@dataclass(frozen=True)
class SecondMoment:
    """Adam's v beside diag(J^T J), over the weights where both are above 0."""

    pearson_log: float
    """Correlation of the logarithms."""
    spearman: float
    """Correlation of the ranks."""
    pearson_log_in_layers: float
    """As the first, of what is left when each layer's own means are taken away: less the layers' differing scales."""
    slope: float
    """Of log v over log diag(J^T J), by least squares: 1 where they are in proportion."""


def drawn_probes(seed: int, datum_id: str, size: int) -> Tensor:
    """Signs [100, P] of a datum; not those of its fit."""
    seeds = [datum_seed(seed, f"{datum_id}\0diagnosis {index}") for index in range(PROBES)]
    return rademacher(as_tensor(seeds), Stream.PROBE, 0, size).double()


def layer_slices(layout: Layout) -> dict[str, slice]:
    """Where the weights and biases of each layer lie in a row: neighbours whose names agree up to the last dot."""
    found: dict[str, slice] = {}
    for entry in layout.entries:
        name = entry.name.rpartition(".")[0] or entry.name
        start = found[name].start if name in found else entry.offset
        found[name] = slice(start, entry.offset + entry.size)
    return found


def sparsity(layout: Layout, products: Tensor) -> list[LayerSparsity]:
    """How sparse products Hv [K, P] are, layer by layer."""
    found = []
    for name, place in layer_slices(layout).items():
        sizes = products[:, place].abs()
        small = sizes <= _SMALL * sizes.amax(dim=1, keepdim=True)
        found.append(LayerSparsity(name, float((sizes == 0).double().mean()), float(small.double().mean())))
    return found


def equilibrated_estimate(products: Tensor) -> Tensor:
    """sqrt(mean (Hv)^2) of products [K, P]: [P]."""
    return products.square().mean(dim=0).sqrt()


def estimates(hessian: Tensor, probes: Tensor, products: Tensor) -> list[Estimates]:
    """Estimated diagonals from probes and products [100, P] beside those of H [P, P]."""
    rows, diagonal = hessian.norm(dim=1), hessian.diagonal()
    found = []
    for count in COUNTS:
        groups = list(zip(probes.split(count), products.split(count), strict=True))
        of_rows = [equilibrated_estimate(product) for _, product in groups]
        of_diagonal = [(probe * product).mean(dim=0) for probe, product in groups]
        found.append(
            Estimates(
                count,
                _mean([float((one - rows).norm() / rows.norm()) for one in of_rows]),
                _mean([correlation(one, rows) for one in of_rows]),
                _mean([float((one - diagonal).norm() / diagonal.norm()) for one in of_diagonal]),
                _mean([correlation(one, diagonal) for one in of_diagonal]),
            )
        )
    return found


def second_moment(layout: Layout, second: Tensor, gauss_newton: Tensor) -> SecondMoment:
    """Adam's v [P] beside diag(J^T J) [P]."""
    both = (second > 0) & (gauss_newton > 0)
    v, gn = torch.where(both, second.double(), 1).log(), torch.where(both, gauss_newton, 1).log()
    inside_v, inside_gn = v.clone(), gn.clone()
    for place in layer_slices(layout).values():
        for values in (inside_v, inside_gn):
            values[place] -= values[place][both[place]].mean()
    v, gn = v[both], gn[both]
    return SecondMoment(
        correlation(v, gn),
        correlation(_ranks(v), _ranks(gn)),
        correlation(inside_v[both], inside_gn[both]),
        float(((gn - gn.mean()) @ v) / (gn - gn.mean()).square().sum()),
    )


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's."""
    return float(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1])


def _ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().double()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
