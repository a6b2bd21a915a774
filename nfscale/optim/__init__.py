"""How fields are fitted: optimisers over batched params, pure `init`/`update` pairs, and whole solvers, `init`/`solve`.

The loop owns time and chance, an optimiser owns only memory: step counts, learning-rate scale and
curvature come in `Extra`. Axis 0 of every tensor is the field, and nothing reduces over it.
Adding an optimiser is one file here and one line in `OPTIMIZERS`; a solver, in `SOLVERS`.
"""

from nfscale.optim.adam import Adam
from nfscale.optim.base import Extra, Optimizer
from nfscale.optim.esgd import ESGD
from nfscale.optim.gauss_newton import GaussNewton
from nfscale.optim.kfac import KFAC
from nfscale.optim.lbfgs import LBFGS
from nfscale.optim.schedules import SCHEDULES, Schedule
from nfscale.optim.solver import Problem, Solver
from nfscale.optim.spring import Spring

OPTIMIZERS: dict[str, type] = {"adam": Adam, "esgd": ESGD}
SOLVERS: dict[str, type] = {"gauss_newton": GaussNewton, "kfac": KFAC, "lbfgs": LBFGS, "spring": Spring}
METHODS: dict[str, type] = OPTIMIZERS | SOLVERS
"""What `optimizer.kind` names."""

__all__ = [
    "ESGD",
    "KFAC",
    "LBFGS",
    "METHODS",
    "OPTIMIZERS",
    "SCHEDULES",
    "SOLVERS",
    "Adam",
    "Extra",
    "GaussNewton",
    "Optimizer",
    "Problem",
    "Schedule",
    "Solver",
    "Spring",
]
