"""Extreme eigenvalues of a symmetric matrix that is known by its products alone.

Lanczos' method as ARPACK restarts it, with full reorthogonalisation (Lehoucq, Sorensen & Yang, "ARPACK Users' Guide",
SIAM 1998), from scipy. The ends of a spectrum come after tens of products; what lies near zero does not come at all,
so there is no condition number from here.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

_TOLERANCE = 1e-6  # relative: eigenvalues are printed with four digits


def extreme_eigenvalues(product: Callable[[Tensor], Tensor], start: Tensor) -> tuple[float, float]:
    """The smallest and the largest eigenvalue, signs counted.

    Args:
        product: the matrix by a vector: float64 [P] -> [P].
        start: any vector that is not orthogonal to what is looked for: [P], P of 3 and more.
    """
    from scipy.sparse.linalg import LinearOperator, eigsh  # half a second, which other commands need not wait

    def matvec(vector: np.ndarray) -> np.ndarray:
        return product(torch.from_numpy(np.array(vector, np.float64).reshape(-1))).numpy()

    size = len(start)
    operator = LinearOperator((size, size), matvec=matvec, dtype=np.float64)  # type: ignore[call-arg]
    options: dict[str, Any] = {"v0": start.double().numpy(), "tol": _TOLERANCE, "return_eigenvectors": False}
    found = np.asarray(eigsh(operator, k=2, which="BE", **options))
    return float(found.min()), float(found.max())
