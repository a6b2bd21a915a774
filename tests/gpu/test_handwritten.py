"""The step of torch without autograd on a CUDA device: against plain steps there, in float64."""

import pytest
import torch

from nfscale.engine.handwritten import handwritten_apply, handwritten_gradient_and_hvp, handwritten_steps
from nfscale.engine.sampling import Sampler
from nfscale.engine.step import plain_apply, plain_gradient_and_hvp
from nfscale.fields import MLP
from nfscale.optim import ESGD, Adam, Schedule
from nfscale.rng import Stream, as_tensor, datum_seed, rademacher
from nfscale.signals import Image, Samples

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device on this machine"),
]

FIELDS = 5
SEEDS = as_tensor([datum_seed(0, str(n)) for n in range(FIELDS)])


def problem(field: MLP, points: int, dtype: torch.dtype) -> tuple[torch.Tensor, Samples]:
    draw = torch.Generator().manual_seed(0)
    coordinates = torch.rand(FIELDS, points, field.dimensions, generator=draw) * 2 - 1
    values = torch.rand(FIELDS, points, field.channels, generator=draw) - 0.5
    samples = Samples(coordinates, values, torch.rand(FIELDS, points, generator=draw))
    return field.layout.ravel(field.init(SEEDS)).to(dtype), samples.map(lambda tensor: tensor.to(dtype))


@pytest.mark.parametrize(("width", "points"), [(13, 7), (64, 1000), (256, 70_000)], ids=["odd", "usual", "tiles"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-11), (torch.float32, 3e-5)])
def test_gradients_and_products_are_those_of_autograd(width, points, dtype, bound):
    field, signal = MLP(2, 3, width=width, depth=2), Image(3)
    rows, samples = problem(field, points, dtype)
    probe = rademacher(SEEDS, Stream.PROBE, 0, field.layout.size).to(dtype)
    rows, probe, samples = rows.cuda(), probe.cuda(), samples.map(torch.Tensor.cuda)
    expected = plain_gradient_and_hvp(field, signal, rows, samples, probe)
    for ours, theirs in zip(handwritten_gradient_and_hvp(field, signal, rows, samples, probe), expected, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < bound
    values, theirs = (apply(field, rows)(samples.coordinates) for apply in (handwritten_apply, plain_apply))
    assert float((values - theirs).norm() / theirs.norm()) < bound


@pytest.mark.parametrize("per_step", [100, 16])
@pytest.mark.parametrize("optimizer", [Adam(1e-3, Schedule("constant")), ESGD(0.05, Schedule("constant"), "per_field")])
def test_steps_on_the_device_are_those_of_the_cpu(optimizer, per_step):
    field = MLP(2, 3, width=32, depth=3, omega_0=10.0, omega_hidden=10.0)
    found = []
    for device in ("cpu", "cuda"):
        rows, samples = problem(field, 100, torch.float64)
        rows, samples = rows.to(device), samples.map(lambda tensor, device=device: tensor.to(device))
        steps, rate = torch.zeros(FIELDS, dtype=torch.int64, device=device), torch.ones(FIELDS, device=device)
        state, sampler = optimizer.init({"rows": rows}), Sampler(100, per_step)
        seeds = SEEDS.to(device)
        handwritten_steps(field, optimizer, None, sampler, rows, state, samples, seeds, steps, rate, 20, [0, 1, 3, 4])
        found.append(rows.cpu())
    before, _ = problem(field, 100, torch.float64)
    assert torch.equal(found[0][2], before[2])
    assert float((found[0] - found[1]).norm()) < 1e-5 * float((found[0] - before).norm())
