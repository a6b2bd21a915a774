"""Solvers on a CUDA device reach what they reach on the CPU; rounding leads line searches along other ways."""

import pytest
import torch

from nfscale import MLP, Image, Schedule, Stop, fit
from nfscale.optim import KFAC, LBFGS, GaussNewton, Spring
from tests.engine.fits import smooth_image

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device on this machine"),
]

SIGNAL = Image(1)
FIELD = MLP(2, 1, width=16, depth=2, omega_0=10.0, omega_hidden=10.0)
DATA = [(f"datum-{number}", SIGNAL.samples(smooth_image(number))) for number in range(5)]


@pytest.mark.parametrize("solver", [LBFGS(), KFAC(), GaussNewton(), Spring(0.2, Schedule("constant"))])
@pytest.mark.parametrize("step", ["auto", "plain"])
def test_a_solver_on_the_device_reaches_what_it_reaches_on_the_cpu(solver, step):
    options = {"optimizer": solver, "stop": Stop(40, target=40.0, check_every=10), "seed": 0, "batch": 3, "step": step}
    steps = []
    for device in ("cpu", "cuda"):
        found = {fitted.id: fitted for fitted in fit(FIELD, SIGNAL, DATA, device=device, **options)}
        assert all(fitted.quality >= 40 for fitted in found.values())
        steps.append(torch.tensor([found[datum_id].steps for datum_id, _ in DATA]))
    assert (steps[0] - steps[1]).abs().max() <= 10
