"""How fields are fitted: optimisers over batched params, pure `init`/`update` pairs.

The loop owns time and chance, an optimiser owns only memory: step counts, learning-rate scale and
curvature come in `Extra`. Axis 0 of every tensor is the field, and nothing reduces over it.
Adding an optimiser is one file here and one line in `OPTIMIZERS`.
"""

from nfscale.optim.adam import Adam
from nfscale.optim.base import Extra, Optimizer
from nfscale.optim.esgd import ESGD
from nfscale.optim.schedules import SCHEDULES, Schedule

OPTIMIZERS: dict[str, type] = {"adam": Adam, "esgd": ESGD}

__all__ = ["ESGD", "OPTIMIZERS", "SCHEDULES", "Adam", "Extra", "Optimizer", "Schedule"]
