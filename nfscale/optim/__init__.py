"""How fields are fitted: optimisers over batched params, pure `init`/`update` pairs, and whole solvers, `init`/`solve`.

The loop owns time and chance, an optimiser owns only memory: step counts, learning-rate scale and
curvature come in `Extra`. Axis 0 of every tensor is the field, and nothing reduces over it.
Adding an optimiser is one file here and one line in `OPTIMIZERS`; a solver, in `SOLVERS`.
"""

from nfscale.optim.adahessian import AdaHessian
from nfscale.optim.adam import Adam
from nfscale.optim.automatic import Automatic, Circumstances, automatic_kind
from nfscale.optim.base import Extra, Optimizer, Scheduled
from nfscale.optim.esgd import ESGD
from nfscale.optim.esgd_max import ESGDMax
from nfscale.optim.gauss_newton import GaussNewton
from nfscale.optim.jacobi import Jacobi
from nfscale.optim.kfac import KFAC
from nfscale.optim.lbfgs import LBFGS
from nfscale.optim.muon import Muon
from nfscale.optim.regularized import Regularized
from nfscale.optim.scaled import Scaled
from nfscale.optim.schedules import SCHEDULES, Schedule
from nfscale.optim.sgd import SGD
from nfscale.optim.shampoo import Shampoo
from nfscale.optim.soap import SOAP
from nfscale.optim.solver import Problem, Solver
from nfscale.optim.spring import Spring

OPTIMIZERS: dict[str, type] = {
    "adam": Adam,
    "esgd": ESGD,
    "sgd": SGD,
    "esgd_max": ESGDMax,
    "jacobi": Jacobi,
    "adahessian": AdaHessian,
    "shampoo": Shampoo,
    "soap": SOAP,
    "muon": Muon,
}
SOLVERS: dict[str, type] = {"gauss_newton": GaussNewton, "kfac": KFAC, "lbfgs": LBFGS, "spring": Spring}
METHODS: dict[str, type] = OPTIMIZERS | SOLVERS
"""What `optimizer.kind` names, beside "auto"."""

__all__ = [
    "ESGD",
    "KFAC",
    "LBFGS",
    "METHODS",
    "OPTIMIZERS",
    "SCHEDULES",
    "SGD",
    "SOAP",
    "SOLVERS",
    "AdaHessian",
    "Adam",
    "Automatic",
    "Circumstances",
    "ESGDMax",
    "Extra",
    "GaussNewton",
    "Jacobi",
    "Muon",
    "Optimizer",
    "Problem",
    "Regularized",
    "Scaled",
    "Schedule",
    "Scheduled",
    "Shampoo",
    "Solver",
    "Spring",
    "automatic_kind",
]
