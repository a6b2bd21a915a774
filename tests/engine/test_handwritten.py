"""The step of torch without autograd against its plain twin, and what it promises beyond it."""

import itertools

import numpy as np
import pytest
import torch

from nfscale.engine import Stop, calibrate, handwritten_passes
from nfscale.engine.batch import Batch, Slot
from nfscale.engine.dispatch import PLAIN, Step, chosen
from nfscale.engine.handwritten import (
    handwritten_apply,
    handwritten_gradient,
    handwritten_gradient_and_hvp,
    handwritten_steps,
)
from nfscale.engine.handwritten_passes import Plan
from nfscale.engine.sampling import Sampler
from nfscale.engine.step import plain_apply, plain_gradient_and_hvp
from nfscale.fields import MLP
from nfscale.optim import ESGD, Adam, Optimizer, Schedule
from nfscale.rng import Stream, as_tensor, datum_seed, rademacher
from nfscale.signals import Image, Samples
from tests.engine.fits import (
    DATA,
    FIELD,
    SCHEDULE,
    SEED,
    SIGNAL,
    assert_same_bits,
    calibration_of,
    data_of,
    fitted,
    smooth_image,
)

SMALL = 1 << 13
"""Bytes of a layer with which the fields below need several chunks, and larger ones several tiles."""

OPTIMIZERS = {
    "adam": Adam(0.005, SCHEDULE),
    "esgd-shared": ESGD(0.5, SCHEDULE),
    "esgd-unclipped": ESGD(0.2, SCHEDULE, clip=None),
    "esgd-per_field": ESGD(0.05, SCHEDULE, curvature="per_field"),
}


def random_samples(dimensions: int, channels: int, count: int, masked: bool, fields: int, dtype) -> Samples:
    draw = torch.Generator().manual_seed(count)
    coordinates = torch.rand(fields, count, dimensions, generator=draw, dtype=dtype) * 2 - 1
    values = torch.rand(fields, count, channels, generator=draw, dtype=dtype) - 0.5
    mask = None
    if masked:
        mask = torch.rand(fields, count, generator=draw, dtype=dtype)
        mask[:, 1::3] = 0
    return Samples(coordinates, values, mask)


def seeds_of(fields: int) -> torch.Tensor:
    return as_tensor([datum_seed(0, str(n)) for n in range(fields)])


def rows_and_probe(field: MLP, fields: int, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    seeds = seeds_of(fields)
    rows = field.layout.ravel(field.init(seeds)).to(dtype)
    return rows, rademacher(seeds, Stream.PROBE, 0, field.layout.size).to(dtype)


@pytest.fixture(params=[None, SMALL], ids=["chunks", "small-chunks"])
def chunks(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setitem(handwritten_passes._LAYER_BYTES, "cpu", request.param)


# Twins


@pytest.mark.parametrize(("dimensions", "channels"), [(1, 1), (2, 2), (2, 3), (3, 4)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-11), (torch.float32, 3e-5)])
def test_gradients_and_products_are_those_of_autograd(dimensions, channels, dtype, bound, chunks):
    for width, depth, masked in itertools.product((13, 32), (1, 2, 5), (False, True)):
        for fields, count in ((1, 7), (3, 1), (3, 256)):
            field, signal = MLP(dimensions, channels, width=width, depth=depth), Image(channels)
            rows, probe = rows_and_probe(field, fields, dtype)
            samples = random_samples(dimensions, channels, count, masked, fields, dtype)
            expected = plain_gradient_and_hvp(field, signal, rows, samples, probe)
            found = handwritten_gradient_and_hvp(field, signal, rows, samples, probe)
            assert all(tensor.dtype == dtype for tensor in found)
            few = 100 if count == 1 else 1  # a single residual is a difference of nearly equal numbers
            torch.testing.assert_close(found[0], expected[0], rtol=few * bound, atol=0)
            for ours, theirs in zip(found[1:], expected[1:], strict=True):
                assert float((ours - theirs).norm() / theirs.norm()) < few * bound, (width, depth, count, masked)
                for entry in field.layout.entries:  # no tensor hides behind a larger one
                    part = slice(entry.offset, entry.offset + entry.size)
                    error = float((ours - theirs)[:, part].norm() / theirs[:, part].norm())
                    assert error < 10 * few * bound, (entry.name, width, depth, count, masked)
            alone = handwritten_gradient(field, signal, rows, samples)
            assert torch.equal(alone[0], found[0])
            assert torch.equal(alone[1], found[1])


@pytest.mark.parametrize(("width", "depth", "channels", "count"), [(13, 1, 1, 5), (64, 4, 3, 1000), (100, 2, 8, 129)])
def test_apply_is_that_of_the_field(width, depth, channels, count):
    field = MLP(2, channels, width=width, depth=depth)
    rows, _ = rows_and_probe(field, 3, torch.float32)
    coordinates = random_samples(2, channels, count, False, 3, torch.float32).coordinates
    for at in (coordinates, coordinates[:1]):
        values, expected = handwritten_apply(field, rows)(at), plain_apply(field, rows)(at)
        assert values.shape == (3, count, channels)
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_samples_of_another_shape_are_refused():
    samples = random_samples(2, 1, 5, False, 3, torch.float32)
    field = MLP(2, 2, width=8, depth=1)
    with pytest.raises(ValueError, match=r"\(3, 5, 1\) where the field takes \(3, 5, 2\)"):
        handwritten_gradient(field, Image(2), rows_and_probe(field, 3, torch.float32)[0], samples)


def batch_of(step: Step, optimizer: Optimizer, field: MLP, count: int, per_step: int, dtype=torch.float32) -> Batch:
    """A batch whose last slot is empty and whose fields have had different numbers of steps at different rates."""
    calibration, fields = None, 5
    if "diagonal" in optimizer.needs:
        data = [(f"other-{n}", SIGNAL.samples(smooth_image(100 + n))) for n in range(3)]
        calibration = calibrate(field, SIGNAL, data, optimizer=optimizer, stop=Stop(40), seed=SEED, device="cpu")
    slots: list[Slot | None] = [Slot(str(n), n) for n in range(fields - 1)]
    batch = Batch(
        field,
        SIGNAL,
        optimizer,
        Sampler(count, per_step),
        calibration,
        rows_and_probe(field, fields, dtype)[0],
        random_samples(2, 1, count, per_step % 2 == 1, fields, dtype),
        seeds_of(fields),
        [*slots, None],
        step,
    )
    batch.steps += torch.tensor([0, 20, 10, 0, 30])
    batch.rate *= torch.tensor([1.0, 0.5, 1.0, 0.25, 1.0])
    return batch


@pytest.mark.parametrize("per_step", [63, 16])
@pytest.mark.parametrize("width", [12, 13])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_steps_are_those_of_plain_steps(kind, width, per_step, chunks):
    """What the state holds, too; but for the slot that is empty, which stays as it was. In float64, but for the sizes
    of the steps: a field's own curvature from one probe multiplies what rounding leaves."""
    field, optimizer = MLP(2, 1, width=width, depth=2, omega_0=10.0, omega_hidden=10.0), OPTIMIZERS[kind]
    step = chosen("torch", torch.device("cpu"), field, SIGNAL, optimizer)
    ours, plain = (batch_of(each, optimizer, field, 63, per_step, torch.float64) for each in (step, PLAIN))
    before = ours.rows.clone()
    for _ in range(2):
        for batch in (ours, plain):
            batch.advance(10)
    moved = (plain.rows - before)[:-1].norm()
    assert moved > 1e-2
    assert float((ours.rows - plain.rows)[:-1].norm()) < 1e-5 * float(moved)
    assert torch.equal(ours.rows[-1], before[-1])
    assert torch.equal(ours.steps, plain.steps)
    for name, value in plain.state.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(ours.state[name][:-1], value[:-1])
        else:
            difference = (ours.state[name]["rows"] - value["rows"])[:-1].norm()
            assert float(difference) < 1e-5 * float(value["rows"][:-1].norm()), name
            assert not ours.state[name]["rows"][-1].any()


def test_an_optimiser_that_it_does_not_know_takes_its_gradients_and_products():
    class Slower(ESGD):
        pass

    slower = Slower(0.02, SCHEDULE, curvature="per_field")
    step = chosen("torch", torch.device("cpu"), FIELD, SIGNAL, slower)
    assert step.advance is None
    assert step.gradient_and_hvp is handwritten_gradient_and_hvp
    known = fitted(DATA, ESGD(0.02, SCHEDULE, curvature="per_field"), step="torch")
    for datum_id, result in fitted(DATA, slower, step="torch").items():
        assert abs(result.quality - known[datum_id].quality) < 0.05


@pytest.mark.parametrize("sampling", ["full", "stratified", "uniform"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_fits_reach_what_plain_steps_reach(kind, sampling):
    schedule = Schedule("cosine", total_steps=120, warmup=20)
    optimizer = {
        "adam": Adam(0.005, schedule),
        "esgd-shared": ESGD(0.5, schedule),
        "esgd-unclipped": ESGD(0.2, schedule, clip=None),
        "esgd-per_field": ESGD(0.05, schedule, curvature="per_field"),
    }[kind]
    samples = "full" if sampling == "full" else 32
    how = {"samples": samples, "sampling": "stratified" if sampling == "full" else sampling}
    stop = Stop(120, check_every=40)
    if "diagonal" in optimizer.needs:
        how["calibration"] = calibration_of(optimizer, samples, stop)
    plain, ours = (fitted(data_of(6), optimizer, stop=stop, step=step, **how) for step in ("plain", "torch"))
    gained = [result.quality - result.history_quality[0] for result in plain.values()]
    assert np.median(gained) > 5
    differences = [ours[datum_id].quality - result.quality for datum_id, result in plain.items()]
    assert abs(np.median(differences)) < 0.2


# Beyond the twin


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize(("width", "count"), [(12, 63), (13, 7), (33, 100), (64, 300)])
def test_no_bit_depends_on_the_other_fields(width, count, masked, chunks):
    field, signal = MLP(2, 3, width=width, depth=3), Image(3)
    rows, probe = rows_and_probe(field, 7, torch.float32)
    samples = random_samples(2, 3, count, masked, 7, torch.float32)
    together = handwritten_gradient_and_hvp(field, signal, rows, samples, probe)
    values = handwritten_apply(field, rows)(samples.coordinates)
    for some in ([3], [6, 1], [5, 4, 3, 2, 0], [2, 2]):
        part = samples.map(lambda tensor, some=some: tensor[some])
        found = handwritten_gradient_and_hvp(field, signal, rows[some], part, probe[some])
        assert all(torch.equal(ours, theirs[some]) for ours, theirs in zip(found, together, strict=True))
        if len(some) > 1:  # a batch has two slots
            assert torch.equal(handwritten_apply(field, rows[some])(part.coordinates), values[some])


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_field_goes_on_in_another_batch_as_it_would_have_in_its_own(kind, chunks):
    optimizer = OPTIMIZERS[kind]
    step = chosen("torch", torch.device("cpu"), FIELD, SIGNAL, optimizer)
    whole, resumed = (batch_of(step, optimizer, FIELD, 63, 16) for _ in range(2))
    whole.advance(20)
    resumed.advance(10)
    resumed.keep([3, 1])
    resumed.advance(10)
    resumed.keep([1, 1])
    resumed.slots[1] = None
    expected = whole.rows.clone()
    assert torch.equal(resumed.rows[0], expected[1])
    whole.advance(10)
    resumed.advance(10)
    assert torch.equal(resumed.rows[0], whole.rows[1])
    assert torch.equal(resumed.rows[1], expected[1])


def test_threads_change_no_bit():
    one = fitted(data_of(7), samples=16, step="torch")
    torch.set_num_threads(3)
    try:
        three = fitted(data_of(7), samples=16, step="torch")
    finally:
        torch.set_num_threads(1)
    for datum_id, result in one.items():
        assert_same_bits(three[datum_id], result)


def test_a_field_that_overflows_is_an_outcome_and_harms_no_other():
    results = fitted(DATA[:2], Adam(1e30, SCHEDULE), step="torch")
    assert {str(result.result) for result in results.values()} == {"diverged"}
    batch = batch_of(chosen("torch", torch.device("cpu"), FIELD, SIGNAL, OPTIMIZERS["adam"]), *_healthy())
    ill = batch_of(chosen("torch", torch.device("cpu"), FIELD, SIGNAL, OPTIMIZERS["adam"]), *_healthy())
    ill.rows[2] = float("nan")
    for each in (batch, ill):
        each.advance(10)
    assert torch.equal(ill.rows[[0, 1, 3]], batch.rows[[0, 1, 3]])


def _healthy():
    return OPTIMIZERS["adam"], FIELD, 63, 63


def test_a_step_of_size_zero_moves_nothing():
    """The last step of a schedule that decays to zero, where the size divides."""
    adam = Adam(0.0, SCHEDULE)
    step = chosen("torch", torch.device("cpu"), FIELD, SIGNAL, adam)
    batch = batch_of(step, adam, FIELD, 63, 63)
    before = batch.rows.clone()
    batch.advance(10)
    assert torch.equal(batch.rows, before)


def test_nothing_lives_on_between_calls_and_chunks_bound_the_workspace(monkeypatch):
    """Twenty chunks take the memory of one, beside what all fields have anyway."""
    made = []

    class Counted(handwritten_passes.Passes):
        def __init__(self, plan, fields, *rest):
            made.append(fields)
            super().__init__(plan, fields, *rest)

    monkeypatch.setattr("nfscale.engine.handwritten.Passes", Counted)
    monkeypatch.setitem(handwritten_passes._LAYER_BYTES, "cpu", SMALL)
    adam = OPTIMIZERS["adam"]
    batch = batch_of(Step("torch", handwritten_gradient, handwritten_apply, handwritten_steps), adam, FIELD, 63, 63)
    batch.advance(10)
    assert made == [2]  # four fields in two chunks


@pytest.mark.parametrize(
    ("points", "fields"), [(1, 1), (63, 1), (784, 256), (784, 7), (4096, 16), (65536, 3), (100, 2)]
)
def test_a_plan_has_a_place_for_every_point_and_every_field(points, fields):
    for width in (8, 13, 64, 256):
        plan = Plan.of(MLP(2, 3, width=width), points, fields, torch.empty(0))
        assert plan.pieces * plan.tiles * plan.tile_points >= points
        chunks = plan.chunks(list(range(fields)), on_cpu=True)
        assert sorted({index for chunk in chunks for index in chunk}) == list(range(fields))
        assert all(len(chunk) <= max(plan.together, 2) for chunk in chunks)
        assert all(len(chunk) * plan.tiles >= 2 for chunk in chunks)
        assert plan == Plan.of(MLP(2, 3, width=width), points, fields, torch.empty(0))
        other = Plan.of(MLP(2, 3, width=width), points, fields + 5, torch.empty(0))
        assert (other.tiles, other.pieces, other.tile_points) == (plan.tiles, plan.pieces, plan.tile_points)
