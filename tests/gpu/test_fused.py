"""The fused step on a GPU: against float64 on the CPU, and the same bits in any batch and in every run."""

from functools import partial

import pytest
import torch

from nfscale import ESGD, MLP, Adam, Image, Schedule
from nfscale.engine import Calibration, fused
from nfscale.engine.batch import Batch, Slot
from nfscale.engine.dispatch import chosen
from nfscale.engine.sampling import Sampler
from nfscale.engine.step import plain_gradient_and_hvp
from nfscale.rng import Stream, as_tensor, datum_seed, rademacher
from nfscale.signals import Samples

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device on this machine"),
]

CUDA = torch.device("cuda")
SCHEDULE = Schedule("cosine", total_steps=40, warmup=4)
OPTIMIZERS = {"adam": Adam(1e-3, SCHEDULE), "esgd-shared": ESGD(0.1, SCHEDULE, update_every=5)}
PRECISIONS = {"ieee": 2e-5, "fp16": 4e-3}


def problem(fields: int, count: int, field: MLP, masked: bool) -> tuple[torch.Tensor, Samples, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    coordinates = torch.rand(fields, count, field.dimensions, generator=draw) * 2 - 1
    values = torch.rand(fields, count, field.channels, generator=draw) - 0.5
    mask = torch.rand(fields, count, generator=draw) if masked else None
    seeds = as_tensor([datum_seed(0, str(n)) for n in range(fields)])
    return field.layout.ravel(field.init(seeds)), Samples(coordinates, values, mask), seeds


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found.cpu().double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("count", [1, 784, 1000, 5000])
@pytest.mark.parametrize(
    ("dimensions", "channels", "width", "depth"),
    [(1, 1, 16, 2), (2, 1, 32, 2), (2, 3, 64, 2), (2, 3, 64, 4), (3, 8, 32, 5), (2, 3, 128, 2)],
)
def test_gradients_and_products_with_the_hessian_are_those_of_float64(
    dimensions, channels, width, depth, count, precision
):
    field = MLP(dimensions, channels, width=width, depth=depth)
    rows, samples, seeds = problem(5, count, field, masked=count == 1000)
    probe = rademacher(seeds, Stream.PROBE, 0, field.layout.size)
    exact = plain_gradient_and_hvp(
        field, Image(channels), rows.double(), samples.map(torch.Tensor.double), probe.double()
    )
    on_device = samples.map(lambda tensor: tensor.cuda())
    losses, gradients = fused.fused_gradient(field, Image(channels), rows.cuda(), on_device, precision)
    both = fused.fused_gradient_and_hvp(field, Image(channels), rows.cuda(), on_device, probe.cuda(), precision)
    bound = PRECISIONS[precision]
    for found_losses, found_gradients in ((losses, gradients), both[:2]):
        torch.testing.assert_close(found_losses.cpu().double(), exact[0], rtol=bound, atol=0)
        assert error_of(found_gradients, exact[1]) < bound
    assert error_of(both[2], exact[2]) < 3 * bound


def batch_of(field: MLP, optimizer, sampler: Sampler, fields: int, count: int) -> Batch:
    rows, samples, seeds = problem(fields, count, field, masked=False)
    signal, calibration = Image(field.channels), None
    if "diagonal" in optimizer.needs:
        draw = torch.Generator().manual_seed(1)
        calibration = Calibration(torch.rand(3, field.layout.size, generator=draw) + 0.1, torch.full((3,), 0.01), 5)
        calibration = calibration.to(CUDA)
    slots: list[Slot | None] = [Slot(str(n), n) for n in range(fields)]
    step = chosen("fused", CUDA, field, signal, optimizer)
    on_device = samples.map(lambda tensor: tensor.cuda())
    return Batch(field, signal, optimizer, sampler, calibration, rows.cuda(), on_device, seeds.cuda(), slots, step)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("sampling", ["full", "stratified", "uniform", "divided"])
@pytest.mark.parametrize(("width", "depth"), [(32, 2), (64, 4)])
def test_a_field_has_the_same_bits_in_every_run_and_in_any_batch(width, depth, sampling, kind):
    """Races between threads of a program would show here: 300 programs fill the device, two do not."""
    field, count = MLP(2, 3, width=width, depth=depth), 6000 if sampling == "divided" else 1000
    sampler = Sampler(count, 250, sampling) if sampling in ("stratified", "uniform") else Sampler(count, count)
    many, again, few = (batch_of(field, OPTIMIZERS[kind], sampler, fields, count) for fields in (300, 300, 2))
    for batch in (many, again, few):
        batch.advance(15)
    assert many.rows.isfinite().all()
    assert torch.equal(many.rows, again.rows)
    together = many.rows[:2].clone()
    assert torch.equal(few.rows, together)
    many.slots[3:] = [None] * 297
    many.keep([0, 1, 2, 3])
    many.advance(5)
    few.advance(5)
    assert torch.equal(many.rows[:2], few.rows)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_steps_are_those_of_the_plain_step_in_float32(kind):
    field, optimizer, sampler = MLP(2, 3, width=64, depth=2), OPTIMIZERS[kind], Sampler(1000, 250)
    ours = batch_of(field, optimizer, sampler, 4, 1000)
    advance = partial(fused.fused_steps, precision="ieee")
    start = ours.rows.clone()
    plain = batch_of(field, optimizer, sampler, 4, 1000)
    plain.step = chosen("plain", CUDA, field, Image(3), optimizer)
    advance(
        field,
        optimizer,
        ours.calibration,
        sampler,
        ours.rows,
        ours.state,
        ours.samples,
        ours.seeds,
        ours.steps,
        ours.rate,
        5,
        [0, 1, 2, 3],
    )
    plain.advance(5)
    assert error_of(ours.rows - start, (plain.rows - start).cpu().double()) < 1e-2


def test_a_field_that_is_not_finite_hurts_no_other():
    field, optimizer, sampler = MLP(2, 3, width=64, depth=2), OPTIMIZERS["adam"], Sampler(500, 500)
    healthy, sick = (batch_of(field, optimizer, sampler, 200, 500) for _ in range(2))
    sick.samples.values[7, 3] = float("nan")
    healthy.advance(10)
    sick.advance(10)
    others = [index for index in range(200) if index != 7]
    assert torch.equal(sick.rows[others], healthy.rows[others])
    assert not sick.rows[7].isfinite().all()
