"""The fused step against its plain twin, in Triton's interpreter; what it is refused for; its kernels compiled."""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from nfscale.engine import Calibration, Stop, dispatch, fit, fused, fused_trial
from nfscale.engine.batch import Batch, Slot
from nfscale.engine.dispatch import PLAIN, chosen
from nfscale.engine.sampling import Sampler
from nfscale.engine.step import plain_gradient, plain_gradient_and_hvp
from nfscale.fields import MLP
from nfscale.optim import ESGD, Adam, Schedule
from nfscale.rng import Stream, as_tensor, datum_seed, rademacher
from nfscale.signals import Image, Samples
from tests.engine.fits import ADAM, ESGD_OWN, RAYS, SIGNAL
from tests.engine.interpreted import NEEDS_TRITON, interpreted

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SCHEDULE = Schedule("cosine", total_steps=20, warmup=4)
BOUNDS = {"ieee": 1e-5, "fp16": 3e-3}


def random_samples(fields: int, count: int, dimensions: int, channels: int, masked: bool) -> Samples:
    draw = torch.Generator().manual_seed(count)
    coordinates = torch.rand(fields, count, dimensions, generator=draw) * 2 - 1
    values = torch.rand(fields, count, channels, generator=draw) - 0.5
    mask = None
    if masked:
        mask = torch.rand(fields, count, generator=draw) + 0.1
        mask[:, 1::3] = 0
    return Samples(coordinates, values, mask)


def seeds_of(fields: int) -> torch.Tensor:
    return as_tensor([datum_seed(0, str(n)) for n in range(fields)])


def rows_of(field: MLP, fields: int) -> torch.Tensor:
    return field.layout.ravel(field.init(seeds_of(fields)))


@contextmanager
def several_programs():
    """A step of more than 20 points is divided into parts of 32."""
    before = fused._MOST_POINTS, fused._POINTS_OF_A_PROGRAM
    fused._MOST_POINTS, fused._POINTS_OF_A_PROGRAM = 20, 32
    try:
        yield
    finally:
        fused._MOST_POINTS, fused._POINTS_OF_A_PROGRAM = before


def assert_gradient(field: MLP, samples: Samples, precision: str, bound: float | None = None) -> None:
    rows, signal = rows_of(field, len(samples.values)), Image(field.channels)
    losses, gradients = fused.fused_gradient(field, signal, rows, samples, precision)
    expected_losses, expected = plain_gradient(field, signal, rows, samples)
    bound = bound or BOUNDS[precision]
    torch.testing.assert_close(losses, expected_losses, rtol=bound, atol=0)
    assert float(((gradients - expected).norm(dim=1) / expected.norm(dim=1)).max()) < bound
    for entry in field.layout.entries:  # no tensor hides behind a larger one
        part = slice(entry.offset, entry.offset + entry.size)
        assert float((gradients - expected)[:, part].norm() / expected[:, part].norm()) < 5 * bound, entry.name


# Twins


@NEEDS_TRITON
@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize(
    ("dimensions", "channels", "width", "depth", "count", "fields", "masked"),
    [
        (1, 1, 16, 2, 1, 1, False),
        (2, 1, 32, 2, 64, 2, False),
        (2, 3, 32, 3, 65, 3, True),
        (3, 8, 16, 5, 100, 1, True),
        (1, 5, 16, 4, 31, 2, False),
        (3, 3, 64, 2, 70, 1, True),
        (2, 1, 128, 2, 20, 1, False),
    ],
)
@interpreted
def test_the_gradient_is_that_of_autograd(dimensions, channels, width, depth, count, fields, masked, precision):
    field = MLP(dimensions, channels, width=width, depth=depth)
    assert_gradient(field, random_samples(fields, count, dimensions, channels, masked), precision)


@NEEDS_TRITON
@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize(
    ("dimensions", "channels", "width", "depth", "count", "fields", "masked"),
    [(1, 1, 16, 2, 1, 1, False), (2, 3, 32, 3, 65, 3, True), (3, 8, 16, 5, 40, 1, True), (2, 1, 64, 2, 70, 1, False)],
)
@interpreted
def test_products_with_the_hessian_are_those_of_autograd(
    dimensions, channels, width, depth, count, fields, masked, precision
):
    field = MLP(dimensions, channels, width=width, depth=depth)
    rows, samples = rows_of(field, fields), random_samples(fields, count, dimensions, channels, masked)
    signs = rademacher(seeds_of(fields), Stream.PROBE, 0, field.layout.size)
    for probe in (signs, 1e3 * signs * rows):
        expected = plain_gradient_and_hvp(field, Image(channels), rows, samples, probe)
        found = fused.fused_gradient_and_hvp(field, Image(channels), rows, samples, probe, precision)
        torch.testing.assert_close(found[0], expected[0], rtol=BOUNDS[precision], atol=0)
        for ours, theirs, bound in zip(found[1:], expected[1:], (1, 3), strict=True):
            assert float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max()) < bound * BOUNDS[precision]
        for entry in field.layout.entries:
            part = slice(entry.offset, entry.offset + entry.size)
            difference = float((found[2] - expected[2])[:, part].norm() / expected[2][:, part].norm())
            assert difference < 10 * BOUNDS[precision], entry.name


@NEEDS_TRITON
@interpreted
def test_steps_with_curvature_of_their_own_are_those_of_the_plain_step():
    """Their probes are keyed alike, so that the diagonals agree from the first step on."""
    field, samples = MLP(2, 1, width=16, depth=2), random_samples(2, 40, 2, 1, False)
    optimizer = ESGD(0.02, SCHEDULE, curvature="per_field", update_every=2)
    step, sampler = chosen("fused", CPU, field, Image(1), optimizer), Sampler(40, 40)
    assert step.gradient is fused.fused_gradient
    assert step.gradient_and_hvp is fused.fused_gradient_and_hvp
    exact = replace(
        step,
        gradient=partial(fused.fused_gradient, precision="ieee"),
        gradient_and_hvp=partial(fused.fused_gradient_and_hvp, precision="ieee"),
    )
    plain, ours = (
        batch_of(step, optimizer, sampler, samples, field, torch.zeros(2, dtype=torch.int64)) for step in (PLAIN, exact)
    )
    plain.advance(4)
    ours.advance(4)
    moved = plain.rows - rows_of(field, 2)
    assert float((ours.rows - plain.rows).norm() / moved.norm()) < 1e-3


@NEEDS_TRITON
@pytest.mark.parametrize("precision", BOUNDS)
@interpreted
def test_programs_that_share_a_field_add_up_to_its_gradient(precision):
    with several_programs():
        for count in (21, 32, 100):
            assert_gradient(MLP(2, 3, width=16, depth=2), random_samples(2, count, 2, 3, count == 100), precision)


@NEEDS_TRITON
@interpreted
def test_values_and_masks_of_any_size_stay_in_the_range_of_half_precision():
    """The largest float16 is 65,504, the smallest normal one 6e-5."""
    field, samples = MLP(2, 1, width=16, depth=2), random_samples(2, 50, 2, 1, True)
    assert samples.mask is not None
    for values, mask in ((1e4, 1.0), (1.0, 1e4), (1.0, 1e-6), (1e-3, 1.0)):
        assert_gradient(field, replace(samples, values=values * samples.values, mask=mask * samples.mask), "fp16")
    assert torch.equal(fused._scales(samples.values, None), torch.full((2,), 128.0))


@NEEDS_TRITON
@pytest.mark.parametrize(
    ("kind", "available", "per_step"),
    [
        ("stratified", 4096, 256),
        ("stratified", 63, 16),
        ("stratified", 300, 290),
        ("stratified", 140_000, 2),
        ("uniform", 63, 17),
        ("uniform", 1 << 20, 260),
    ],
)
@interpreted
def test_the_samples_of_a_step_are_those_of_the_sampler(kind, available, per_step):
    sampler, seeds, first = Sampler(available, per_step, kind), seeds_of(3), torch.tensor([0, 7, 1 << 20])
    field = MLP(1, 1, width=16, depth=2)
    samples = Samples(torch.zeros(3, available, 1), torch.zeros(3, available, 1))
    problem, rows, fields = fused._Problem(field, samples, sampler, "ieee"), rows_of(field, 3), torch.arange(3)
    expected = sampler.positions(seeds, first, 4)
    for index in range(4):
        positions, partials = problem.positions(3), problem.partials(3)
        positions.fill_(-1)
        fused._add_up(problem, rows, fields, seeds, first, positions, partials, index)
        assert torch.equal(positions.long(), expected[:, index])


def random_calibration(field: MLP) -> Calibration:
    draw = torch.Generator().manual_seed(0)
    return Calibration(torch.rand(2, field.layout.size, generator=draw) + 0.1, torch.tensor([0.5, 0.01]), 3)


OPTIMIZERS = {
    "adam": Adam(1e-3, SCHEDULE),
    "esgd-shared": ESGD(0.1, SCHEDULE, update_every=3),
    "esgd-unclipped": ESGD(0.02, SCHEDULE, clip=None),
}


def batch_of(step, optimizer, sampler, samples, field, steps) -> Batch:
    """Fields that have had so many steps, the second of them at half the rate."""
    count = len(samples.values)
    rows, seeds, slots = rows_of(field, count), seeds_of(count), [Slot(str(n), n) for n in range(count)]
    calibration = random_calibration(field) if "diagonal" in optimizer.needs else None
    batch = Batch(field, Image(field.channels), optimizer, sampler, calibration, rows, samples, seeds, slots, step)
    batch.steps[:], batch.rate[1] = steps, 0.5
    return batch


def fused_step(field: MLP, optimizer, precision: str):
    step = chosen("fused", CPU, field, Image(field.channels), optimizer)
    assert step.advance is not None
    return replace(step, advance=partial(step.advance, precision=precision))


@NEEDS_TRITON
@pytest.mark.parametrize("programs", ["one", "several"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("sampling", ["full", "stratified", "uniform"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@interpreted
def test_steps_are_those_of_the_plain_step(kind, sampling, masked, programs):
    field, optimizer, steps = MLP(2, 1, width=16, depth=2), OPTIMIZERS[kind], torch.tensor([0, 7, 13])
    sampler = Sampler(45, 45) if sampling == "full" else Sampler(45, 24, sampling)
    samples = random_samples(3, 45, 2, 1, masked)
    rows = []
    for step in (PLAIN, fused_step(field, optimizer, "ieee")):
        batch = batch_of(step, optimizer, sampler, samples, field, steps)
        if programs == "several":
            with several_programs():
                batch.advance(4)
        else:
            batch.advance(4)
        assert torch.equal(batch.steps, steps + 4)
        rows.append(batch.rows)
    moved = rows[0] - rows_of(field, 3)
    assert float(((rows[1] - rows[0]).norm(dim=1) / moved.norm(dim=1)).max()) < 1e-4


@NEEDS_TRITON
@pytest.mark.parametrize("kind", OPTIMIZERS)
@interpreted
def test_steps_of_fields_with_schedules_of_their_own_are_those_of_the_plain_step(kind):
    field, optimizer, steps = MLP(2, 1, width=16, depth=2), OPTIMIZERS[kind], torch.tensor([5, 7, 13])
    samples, sampler = random_samples(3, 45, 2, 1, False), Sampler(45, 24)

    def moved(step, lengths: torch.Tensor | None) -> torch.Tensor:
        batch = batch_of(step, optimizer, sampler, samples, field, steps)
        batch.lengths = lengths
        batch.advance(4)
        return batch.rows - rows_of(field, 3)

    lengths = torch.tensor([10, 12, SCHEDULE.total_steps])
    plain, fused_one = (moved(step, lengths) for step in (PLAIN, fused_step(field, optimizer, "ieee")))
    assert float(((fused_one - plain).norm(dim=1) / plain.norm(dim=1)).max()) < 1e-4
    others = moved(PLAIN, None)
    assert [torch.equal(*pair) for pair in zip(plain, others, strict=True)] == [False, False, True]


@NEEDS_TRITON
@pytest.mark.parametrize("kind", ["adam", "esgd-shared"])
@interpreted
def test_steps_in_half_precision_are_near_those_of_the_plain_step(kind):
    """After more than a few the sign-like first steps of Adam would show little of it."""
    field, optimizer, sampler = MLP(2, 3, width=32, depth=3), OPTIMIZERS[kind], Sampler(90, 32)
    samples, steps = random_samples(2, 90, 2, 3, False), torch.tensor([0, 7])
    plain, half = (
        batch_of(step, optimizer, sampler, samples, field, steps)
        for step in (PLAIN, fused_step(field, optimizer, "fp16"))
    )
    plain.advance(5)
    half.advance(5)
    moved = plain.rows - rows_of(field, 2)
    assert float((half.rows - plain.rows).norm() / moved.norm()) < 3e-2


@NEEDS_TRITON
@interpreted
def test_whole_fits_reach_what_plain_steps_reach():
    y, x = np.mgrid[0:8, 0:8] / 8
    signal, field = Image(1), MLP(2, 1, width=16, depth=2, omega_0=10, omega_hidden=10)
    data = [
        (str(n), signal.samples((0.5 + 0.4 * np.sin(3 * x + n * y)).astype(np.float32)[..., None])) for n in range(2)
    ]
    optimizer = Adam(2e-2, Schedule("cosine", total_steps=30))
    results = {
        step: {
            fitted.id: fitted.quality
            for fitted in fit(
                field, signal, data, optimizer=optimizer, stop=Stop(30, check_every=15), seed=0, step=step
            )
        }
        for step in ("plain", "fused")
    }
    for datum_id, quality in results["plain"].items():
        assert quality > 25
        assert results["fused"][datum_id] == pytest.approx(quality, abs=0.5)


# What a field's memory and neighbours may not do


@NEEDS_TRITON
@pytest.mark.parametrize("kind", ["adam", "esgd-shared"])
@pytest.mark.parametrize("programs", ["one", "several"])
@interpreted
def test_a_field_has_the_same_bits_in_any_batch_and_in_any_number_of_calls(kind, programs):
    field, optimizer, sampler = MLP(2, 1, width=16, depth=2), OPTIMIZERS[kind], Sampler(70, 24)
    samples, step = random_samples(3, 70, 2, 1, True), fused_step(field, optimizer, "fp16")
    how = several_programs() if programs == "several" else contextmanager(lambda: iter([None]))()
    with how:
        together = batch_of(step, optimizer, sampler, samples, field, torch.zeros(3, dtype=torch.int64))
        together.advance(3)
        together.slots[0] = None
        idle = together.rows[0].clone()
        together.advance(1)
        assert torch.equal(together.rows[0], idle)
        together.keep([1, 2])
        together.advance(2)
        alone = batch_of(step, optimizer, sampler, samples, field, torch.zeros(3, dtype=torch.int64))
        alone.slots[0] = alone.slots[2] = None
        for count in (3, 1, 2) if kind == "esgd-shared" else (2, 4):  # the cadence of curvature begins with a call
            alone.advance(count)
    assert torch.equal(together.rows[0], alone.rows[1])
    assert torch.equal(alone.rows[0], rows_of(field, 3)[0])


@contextmanager
def poisoned_memory():
    """New tensors are full of NaN, or of the largest integer."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@NEEDS_TRITON
@interpreted
def test_nothing_is_read_that_was_not_written_and_nothing_written_beyond_the_rows():
    field, sampler = MLP(2, 1, width=16, depth=2), Sampler(45, 24)
    samples, optimizer = random_samples(3, 45, 2, 1, False), OPTIMIZERS["adam"]
    for programs in (contextmanager(lambda: iter([None]))(), several_programs()):
        with programs, poisoned_memory():
            assert_gradient(field, samples, "ieee")
            step = fused_step(field, optimizer, "ieee")
            batch = batch_of(step, optimizer, sampler, samples, field, torch.zeros(3, dtype=torch.int64))
            around = torch.full((5, field.layout.size), float("nan"))
            around[1:4] = batch.rows
            batch.rows = around[1:4]
            batch.advance(2)
            assert around[1:4].isfinite().all()
            assert around[[0, 4]].isnan().all()
            assert all(tensor["rows"].isfinite().all() for tensor in batch.state.values())


@NEEDS_TRITON
@pytest.mark.parametrize("kind", OPTIMIZERS)
@interpreted
def test_a_field_that_is_not_finite_stops_and_hurts_no_other(kind):
    field, optimizer = MLP(2, 1, width=16, depth=2), OPTIMIZERS[kind]
    sampler, samples = Sampler(40, 40), random_samples(3, 40, 2, 1, False)
    step, start = fused_step(field, optimizer, "ieee"), torch.zeros(3, dtype=torch.int64)
    healthy = batch_of(step, optimizer, sampler, samples, field, start)
    healthy.advance(3)
    samples.values[1, 5] = float("inf")
    sick = batch_of(step, optimizer, sampler, samples, field, start)
    sick.advance(3)
    assert torch.equal(sick.rows[[0, 2]], healthy.rows[[0, 2]])
    assert not sick.rows[1].isfinite().all()
    moment = sick.state["mean" if kind == "adam" else "momentum"]["rows"]
    assert moment[1, -1] == -float("inf")  # a second step would make it NaN


@NEEDS_TRITON
@interpreted
def test_fields_take_as_many_steps_as_each_is_told():
    """What a program does when its count is not its neighbours'."""
    from nfscale.engine import fused_kernels

    field, optimizer = MLP(2, 1, width=16, depth=2), OPTIMIZERS["adam"]
    sampler, samples = Sampler(40, 16), random_samples(3, 40, 2, 1, False)
    start, counts = torch.zeros(3, dtype=torch.int64), torch.tensor([0, 3, 1], dtype=torch.int32)
    whole = []
    for count in range(4):
        batch = batch_of(fused_step(field, optimizer, "ieee"), optimizer, sampler, samples, field, start)
        if count:
            batch.advance(count)
        whole.append(batch.rows)
    batch = batch_of(fused_step(field, optimizer, "ieee"), optimizer, sampler, samples, field, start)
    problem = fused._Problem(field, samples, sampler, "ieee")
    updates = fused.updates_of(optimizer, None, batch.state, batch.steps, batch.rate, 3)
    fused_kernels.advance[(3,)](
        rows=batch.rows,
        fields=torch.arange(3),
        counts=counts,
        seeds=batch.seeds,
        steps=batch.steps,
        positions=problem.positions(3),
        step_count=3,
        **problem.samples,
        **problem.drawing,
        **problem.options,
        **fused._update_options(updates, batch.rows),
    )
    for index, count in enumerate(counts.tolist()):
        assert torch.equal(batch.rows[index], whole[count][index])


# The dispatcher


class Louder(Image):
    def loss(self, predicted, samples):
        return 2 * super().loss(predicted, samples)


def served(**options) -> MLP:
    return MLP(**{"dimensions": 2, "channels": 1, "width": 32, "depth": 2, **options})


@pytest.mark.parametrize(
    ("device", "field", "signal", "why"),
    [
        (CPU, served(), SIGNAL, "on an NVIDIA GPU, not on cpu"),
        (torch.device("meta"), served(), SIGNAL, "on an NVIDIA GPU, not on meta"),
        (CUDA, served(width=48), SIGNAL, "widths 16, 32, 64, 128 and depths 2 to 5, not 48 x 2"),
        (CUDA, served(depth=1), SIGNAL, "not 32 x 1"),
        (CUDA, served(depth=6), SIGNAL, "not 32 x 6"),
        (CUDA, served(dimensions=4), SIGNAL, "at most 3 dimensions and 8 channels, not 4 and 1"),
        (CUDA, served(channels=9), Image(9), "at most 3 dimensions and 8 channels, not 2 and 9"),
        (CUDA, served(width=128, depth=4, weight_scale=4.0), SIGNAL, "width 128 and depth 4 are more than"),
        (CUDA, served(), Louder(1), "Louder is not"),
        (CUDA, served(), RAYS, "Rays is not"),
    ],
)
def test_what_the_fused_step_does_not_know_is_refused_where_it_is_asked_for(device, field, signal, why, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=f"step='fused' cannot be taken: .*{why}.*; use step='auto' or 'plain'"):
        chosen("fused", device, field, signal, ADAM)
    assert chosen("auto", device, field, signal, ADAM).name != "fused"


def test_auto_takes_the_fused_step_on_a_gpu_where_it_is_fast(monkeypatch):
    monkeypatch.setattr(fused, "unavailable", lambda device: None)
    monkeypatch.setattr(fused_trial, "disagreement", lambda *tried: None)
    for optimizer, at_once in ((ADAM, True), (ESGD_OWN, False)):
        step = chosen("auto", CUDA, served(), SIGNAL, optimizer)
        assert step.name == "fused"
        assert (step.advance is not None) == at_once
        assert step.gradient_and_hvp is fused.fused_gradient_and_hvp
    wide = chosen("fused", CUDA, served(width=128), SIGNAL, ADAM)
    assert wide.gradient is fused.fused_gradient
    assert wide.gradient_and_hvp is not fused.fused_gradient_and_hvp
    assert chosen("auto", CUDA, served(width=128), SIGNAL, ADAM).name != "fused"


def test_the_precision_that_is_asked_for_reaches_the_kernels(monkeypatch):
    tried = []
    monkeypatch.setattr(fused, "unavailable", lambda device: None)
    monkeypatch.setattr(fused_trial, "disagreement", lambda *given: tried.append(given[3]))
    for precision, of_kernels in (("float32", "ieee"), ("float16", "fp16")):
        for name in ("auto", "fused"):
            step = chosen(name, CUDA, served(), SIGNAL, ADAM, precision)
            assert step.name == "fused"
            for function in (step.gradient, step.gradient_and_hvp, step.advance):
                assert function.keywords == {"precision": of_kernels}
        assert tried.pop() == of_kernels
    assert chosen("auto", CUDA, served(), SIGNAL, ADAM, "tf32").name == "torch"
    with pytest.raises(ValueError, match="step='fused' cannot be taken: its products are float16 or float32, not tf32"):
        chosen("fused", CUDA, served(), SIGNAL, ADAM, "tf32")
    deep = served(width=128, depth=4)
    assert chosen("fused", CUDA, deep, SIGNAL, ADAM).name == "fused"
    with pytest.raises(ValueError, match="width 128 and depth 4 are more than"):
        chosen("fused", CUDA, deep, SIGNAL, ADAM, "float32")


def test_auto_takes_another_step_where_the_fused_one_is_wrong(monkeypatch):
    dispatch.warn_once.cache_clear()
    monkeypatch.setattr(fused, "unavailable", lambda device: None)
    monkeypatch.setattr(fused_trial, "disagreement", lambda *tried: "on this device two runs of it differ")
    with pytest.warns(UserWarning, match="the fused step is not available, .*two runs of it differ"):
        assert chosen("auto", CUDA, served(), SIGNAL, ADAM).name == "torch"
    assert chosen("fused", CUDA, served(), SIGNAL, ADAM).name == "fused", "where it is asked for"


@interpreted
def test_the_trial_on_a_device_tells_right_from_wrong():
    field = served(width=16)
    right = fused.fused_gradient, fused.fused_steps

    def verdict(gradient=right[0], steps=right[1]) -> str | None:
        fused_trial.disagreement.cache_clear()
        fused.fused_gradient, fused.fused_steps = gradient, steps
        try:
            return fused_trial.disagreement(CPU, field, SIGNAL)
        finally:
            fused.fused_gradient, fused.fused_steps = right

    def failing(*arguments):
        raise RuntimeError("no kernel image is available")

    assert verdict() is None
    assert "gradients differ from the plain step's by" in verdict(gradient=lambda *a: (None, 1.1 * right[0](*a)[1]))
    assert "its steps differ" in verdict(steps=lambda *arguments: None)
    assert "two runs of it differ" in verdict(steps=lambda *a: a[4].add_(torch.rand_like(a[4]) * 1e-6))
    assert verdict(gradient=failing) == "on this device it fails with RuntimeError: no kernel image is available"


def test_without_triton_another_step_runs_and_says_so_once(monkeypatch):
    dispatch.warn_once.cache_clear()
    monkeypatch.setattr(fused, "find_spec", lambda name: None)
    fused.unavailable.cache_clear()
    with pytest.warns(UserWarning, match=r"the fused step is not available.*pip install 'nfscale\[triton\]'"):
        chosen("auto", CUDA, served(), SIGNAL, ADAM)
    assert chosen("auto", CUDA, served(), SIGNAL, ADAM).name != "fused"  # warnings are errors: this is quiet
    with pytest.raises(ValueError, match="there is no Triton"):
        chosen("fused", CUDA, served(), SIGNAL, ADAM)
    fused.unavailable.cache_clear()
    dispatch.warn_once.cache_clear()


def test_strongly_scaled_fields_are_stepped_in_float32():
    assert fused.precision_of(served(weight_scale=2.5)) == "fp16"
    assert fused.precision_of(served(weight_scale=4.0)) == "ieee"


@NEEDS_TRITON
@interpreted
def test_samples_of_another_shape_are_refused():
    samples = random_samples(2, 5, 2, 1, False)
    with pytest.raises(ValueError, match=r"\(2, 5, 1\) where the field takes \(2, 5, 2\)"):
        fused.fused_gradient(served(channels=2), Image(2), rows_of(served(channels=2), 2), samples)
