"""What a field becomes is its own affair: the same bits alone, in any batch, in any order, after any neighbour.

Sizes are awkward on purpose (63 samples, 12 units, rows of 205 weights): a kernel that treats the end of a row
or another alignment differently shows itself.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from nfscale.engine import Calibration, Check, Fitted, Result, Stop, calibrate, fit
from nfscale.engine.batch import Batch
from nfscale.engine.step import evaluate, field_chunks
from nfscale.fields import MLP, theta0_of
from nfscale.optim import ESGD, Adam, Extra, Schedule
from nfscale.rng import Stream, as_tensor, datum_seed, rademacher
from nfscale.signals import Image, Samples

SEED = 3
SIGNAL = Image(1)
FIELD = MLP(2, 1, width=12, depth=2, omega_0=10.0, omega_hidden=10.0, weight_scale=1.0)
STOP = Stop(max_steps=40, check_every=20)
SCHEDULE = Schedule("cosine", total_steps=40, warmup=5)
ADAM = Adam(0.01, SCHEDULE)
ESGD_SHARED = ESGD(0.5, SCHEDULE)
ESGD_OWN = ESGD(0.05, SCHEDULE, curvature="per_field")


def smooth_image(number: int, height: int = 9, width: int = 7) -> np.ndarray:
    draw = np.random.default_rng(number)
    y, x = np.mgrid[0:height, 0:width] / 10
    return np.clip(0.5 + 0.4 * np.sin(3 * draw.random() * y + 4 * draw.random() * x + 6 * draw.random()), 0, 1)


def data_of(count: int, height: int = 9, width: int = 7) -> list[tuple[str, Samples]]:
    return [
        (f"{height}x{width}-{n}", SIGNAL.samples(smooth_image(n, height, width).astype(np.float32)))
        for n in range(count)
    ]


DATA = data_of(5)


def stacked(data: list[tuple[str, Samples]]) -> Samples:
    return Samples(torch.stack([s.coordinates for _, s in data]), torch.stack([s.values for _, s in data]))


def calibration_of(optimizer: ESGD, samples: int | str, stop: Stop = STOP) -> Calibration:
    """From data that the tests do not fit."""
    data = [(f"other-{n}", SIGNAL.samples(smooth_image(100 + n))) for n in range(4)]
    return calibrate(FIELD, SIGNAL, data, optimizer=optimizer, stop=stop, seed=SEED, samples=samples, device="cpu")


def fitted(data, optimizer=ADAM, samples="full", stop=STOP, **options) -> dict[str, Fitted]:
    """All fields by id, fitted on the CPU."""
    if "diagonal" in optimizer.needs and "calibration" not in options:
        options["calibration"] = calibration_of(optimizer, samples)
    options = {"seed": SEED, "device": "cpu", **options}
    results = list(fit(FIELD, SIGNAL, data, optimizer=optimizer, samples=samples, stop=stop, **options))
    assert len({result.id for result in results}) == len(results)
    return {result.id: result for result in results}


def assert_same_bits(left: Fitted, right: Fitted) -> None:
    assert torch.equal(left.weights, right.weights), left.id
    assert replace(left, weights=right.weights) == right


def assert_as_alone(together: dict[str, Fitted], data, **how) -> None:
    """Every field of `together` is what it is when it is fitted alone."""
    assert set(together) == {datum_id for datum_id, _ in data}
    for datum in data:
        alone = fitted([datum], **how)
        assert_same_bits(together[datum[0]], alone[datum[0]])


@pytest.mark.parametrize("samples", ["full", 16])
@pytest.mark.parametrize("optimizer", [ADAM, ESGD_SHARED, ESGD_OWN], ids=["adam", "esgd-shared", "esgd-per_field"])
def test_a_field_alone_has_the_bits_it_has_among_five(optimizer, samples):
    together = fitted(DATA, optimizer, samples)
    for result in together.values():
        assert result.result is Result.MAX_STEPS
        assert result.quality > result.history_quality[0] + 3  # it learned something, so that equality says something
        assert result.history_step == [0, 20, 40]
    assert_as_alone(together, DATA, optimizer=optimizer, samples=samples)


@pytest.mark.parametrize("samples", ["full", 16])
@pytest.mark.parametrize("optimizer", [ADAM, ESGD_SHARED], ids=["adam", "esgd-shared"])
@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_the_batch_size_changes_no_bit(optimizer, samples, batch):
    data = data_of(8)
    automatic = fitted(data, optimizer, samples, batch="auto")
    other = fitted(data, optimizer, samples, batch=batch)
    assert set(other) == set(automatic)
    for datum_id, result in automatic.items():
        assert_same_bits(other[datum_id], result)


def fits_together_and_alone(width: int, depth: int, channels: int, samples: int | str):
    """Six data in one batch, and each in a batch of its own: results by id."""
    field, signal = MLP(2, channels, width=width, depth=depth, omega_0=10.0, omega_hidden=10.0), Image(channels)
    draw = np.random.default_rng(0)
    data = [(str(n), signal.samples(draw.random((9, 7, channels)))) for n in range(6)]

    def run(part):
        options = {"optimizer": Adam(3e-3, SCHEDULE), "stop": STOP, "seed": 0, "samples": samples, "device": "cpu"}
        return {result.id: result for result in fit(field, signal, part, **options)}

    return run(data), {datum_id: run([(datum_id, part)])[datum_id] for datum_id, part in data}


@pytest.mark.parametrize("samples", ["full", 11])
@pytest.mark.parametrize(("width", "depth", "channels"), [(16, 3, 3), (8, 1, 1), (20, 2, 2), (64, 2, 1)])
def test_no_bit_depends_on_the_batch_for_other_layouts(width, depth, channels, samples):
    together, alone = fits_together_and_alone(width, depth, channels, samples)
    for datum_id, result in together.items():
        assert_same_bits(alone[datum_id], result)


@pytest.mark.parametrize("width", [13, 18, 33])
def test_other_widths_depend_on_the_batch_by_rounding_alone(width):
    """The matrix library picks its path by the alignment of a field's block, so no bits are promised here."""
    together, alone = fits_together_and_alone(width, 2, 1, "full")
    for datum_id, result in together.items():
        assert torch.allclose(alone[datum_id].weights, result.weights, rtol=0, atol=1e-5)
        assert alone[datum_id].steps == result.steps


def test_an_evaluation_in_pieces_has_the_bits_of_one_at_once(monkeypatch):
    rows = FIELD.layout.ravel(FIELD.init(as_tensor([datum_seed(0, str(n)) for n in range(9)])))
    samples = stacked(data_of(9))
    at_once = evaluate(FIELD, SIGNAL, rows, samples)
    for fields, expected in ((2, [2, 2, 2, 3]), (3, [3, 3, 3]), (4, [4, 5]), (8, [9])):  # never one field alone
        monkeypatch.setattr("nfscale.engine.step._EVALUATION_BYTES", fields * 4 * 63 * 12)
        assert [stop - start for start, stop in field_chunks(FIELD, 9, 63)] == expected
        pieces = evaluate(FIELD, SIGNAL, rows, samples)
        assert all(torch.equal(piece, whole) for piece, whole in zip(pieces, at_once, strict=True))


def test_the_order_of_the_data_does_not_matter():
    data = data_of(7)
    forward = fitted(data, ESGD_SHARED, 16, batch=3)
    backward = fitted(data[::-1], ESGD_SHARED, 16, batch=3)
    assert set(forward) == set(backward)
    for datum_id, result in forward.items():
        assert_same_bits(backward[datum_id], result)


def test_images_of_several_sizes_are_fitted_in_one_dataset():
    sizes = [data_of(4), data_of(3, 5, 8), data_of(2, 4, 4)]
    data = [datum for round_ in range(4) for size in sizes for datum in size[round_ : round_ + 1]]
    together = fitted(data, samples=16, batch=2)
    assert_as_alone(together, data, samples=16)


def test_a_minibatch_larger_than_a_datum_takes_all_its_samples():
    assert_same_bits(*(next(iter(fitted(DATA[:1], samples=samples).values())) for samples in ("full", 10_000)))


def test_seeds_and_ids_decide_what_is_drawn():
    by_seed = [next(iter(fitted(DATA[:1], samples=16, seed=seed).values())) for seed in (0, 1)]
    assert not torch.equal(by_seed[0].weights, by_seed[1].weights)
    twins = fitted([("a", DATA[0][1]), ("b", DATA[0][1])], samples=16)
    assert not torch.equal(twins["a"].weights, twins["b"].weights)
    assert twins["a"].history_quality[0] == twins["b"].history_quality[0]  # one theta0 for both
    assert twins["a"].seed == datum_seed(SEED, "a")


def test_max_steps_ends_a_field_that_nothing_else_ends():
    for result in fitted(DATA).values():
        assert result.result is Result.MAX_STEPS
        assert result.result.ok
        assert (result.steps, result.steps_to_target, result.restarts) == (40, None, 0)
        assert len(result.history_quality) == 3


def test_the_target_ends_a_field_at_the_first_check_that_reaches_it():
    stop = Stop(max_steps=100, target=28.0, check_every=5)
    optimizer = Adam(0.01, Schedule("constant"))
    results = fitted(DATA, optimizer, stop=stop)
    assert len({result.steps for result in results.values()}) > 1, "all left together: the target shows nothing"
    for result in results.values():
        assert result.result is Result.CONVERGED
        assert result.steps == result.steps_to_target == result.history_step[-1]
        assert result.quality == result.history_quality[-1] >= 28.0
        assert all(quality < 28.0 for quality in result.history_quality[:-1])


def test_fields_come_out_in_the_order_in_which_they_finish():
    stop = Stop(max_steps=100, target=28.0, check_every=5)
    results = fitted(DATA, Adam(0.01, Schedule("constant")), stop=stop)
    steps = [result.steps for result in results.values()]
    assert steps == sorted(steps)
    assert steps[0] < steps[-1]


def test_a_field_that_gains_too_little_over_the_checks_leaves_on_a_plateau():
    """A learning rate of nearly zero gains nothing; the plateau is seen when the checks it needs have been."""
    stop = Stop(max_steps=100, check_every=5, plateau_checks=3, plateau_gain=0.1)
    for result in fitted(DATA, Adam(1e-9, Schedule("constant")), stop=stop).values():
        assert result.result is Result.PLATEAU
        assert result.result.ok
        assert result.steps == 15
        assert result.steps_to_target is None


def test_a_field_that_still_gains_is_not_on_a_plateau():
    stop = Stop(max_steps=40, check_every=5, plateau_checks=3, plateau_gain=0.1)
    assert {result.result for result in fitted(DATA, stop=stop).values()} == {Result.MAX_STEPS}


def test_a_huge_learning_rate_ends_as_diverged_after_its_restarts():
    results = fitted(DATA, Adam(1000.0, SCHEDULE), stop=replace(STOP, max_restarts=2))
    untrained = fitted(DATA, Adam(1e-12, SCHEDULE))
    for datum_id, result in results.items():
        assert result.result is Result.DIVERGED
        assert not result.result.ok
        assert result.restarts == 2
        assert result.history_step[0] == 0
        assert math.isfinite(result.loss)
        assert torch.isfinite(result.weights).all()
        # Nothing was better than theta0, so that is what is kept.
        assert torch.equal(result.weights, theta0_of(FIELD, SEED))
        assert result.quality == untrained[datum_id].history_quality[0]


def test_restarts_halve_the_rate_and_nothing_else():
    """A field that restarted k times is the field of another run at rate / 2^k."""
    results = fitted(data_of(6), Adam(3.0, SCHEDULE), samples=16)
    restarts = {result.restarts for result in results.values()}
    assert len(restarts - {0}) > 1, "the rate restarts too few: choose another"
    for count in restarts:
        calm = fitted(data_of(6), Adam(3.0 / 2**count, SCHEDULE), samples=16)
        for result in results.values():
            if result.restarts == count and result.result.ok:
                expected = calm[result.id]
                assert expected.restarts == 0
                assert_same_bits(replace(result, restarts=0), expected)


def test_neighbours_of_fields_that_diverge_and_restart_keep_their_bits():
    optimizer = Adam(10.0, SCHEDULE)
    together = fitted(data_of(6), optimizer, batch=6)
    outcomes = {(result.result, result.restarts) for result in together.values()}
    assert Result.DIVERGED in {outcome for outcome, _ in outcomes}
    assert Result.MAX_STEPS in {outcome for outcome, _ in outcomes}
    assert_as_alone(together, data_of(6), optimizer=optimizer)


@pytest.mark.parametrize("batch", ["auto", 2])
@pytest.mark.parametrize("optimizer", [ADAM, ESGD_SHARED, ESGD_OWN], ids=["adam", "esgd-shared", "esgd-per_field"])
def test_a_field_whose_loss_overflows_diverges_and_its_neighbours_keep_their_bits(optimizer, batch):
    """With two slots it comes third, into a slot that another field has left: nothing of that one remains."""
    values = DATA[0][1].values.clone()
    values[0] = 1e30  # squared, more than float32 holds
    wild = ("wild", Samples(DATA[0][1].coordinates, values))
    together = fitted([*DATA[:2], wild, *DATA[2:]], optimizer, batch=batch)
    assert together["wild"].result is Result.DIVERGED
    assert together["wild"].restarts == STOP.max_restarts
    assert torch.equal(together["wild"].weights, theta0_of(FIELD, SEED))
    for datum_id, result in fitted(DATA, optimizer).items():
        assert result.restarts == 0
        assert_same_bits(together[datum_id], result)


@pytest.mark.parametrize("rate", [0.01, 0.2])
def test_loss_and_quality_are_those_of_the_weights_and_the_best_of_the_history(rate):
    """At the higher rate the last check is not the best one for some field."""
    stop = Stop(max_steps=60, check_every=5)
    results = fitted(DATA, Adam(rate, Schedule("constant")), stop=stop)
    last_is_best = []
    for datum_id, samples in DATA:
        result = results[datum_id]
        rows = result.weights.repeat(2, 1)
        loss, quality = evaluate(FIELD, SIGNAL, rows, stacked([(datum_id, samples)] * 2))
        assert (result.loss, result.quality) == (float(loss[0]), float(quality[0]))
        assert result.quality == max(result.history_quality)
        last_is_best.append(result.quality == result.history_quality[-1])
        params = {name: p[None] for name, p in result.params(FIELD.layout).items()}
        predicted = FIELD.apply(params, samples.coordinates[None])
        own = SIGNAL.quality(predicted, Samples(samples.coordinates[None], samples.values[None]))
        assert float(own) == pytest.approx(result.quality, abs=1e-3)
    if rate == 0.2:
        assert not all(last_is_best)


def test_shared_init_starts_every_field_from_one_draw():
    results = fitted(DATA, Adam(1e-12, SCHEDULE))
    assert all(torch.equal(result.weights, theta0_of(FIELD, SEED)) for result in results.values())
    assert torch.equal(theta0_of(FIELD, SEED), FIELD.layout.ravel(FIELD.init(as_tensor([datum_seed(SEED, "")])))[0])


def test_per_datum_init_starts_every_field_from_a_draw_of_its_own():
    results = fitted(DATA, Adam(1e-12, SCHEDULE), init="per_datum", batch=2)
    for datum_id, result in results.items():
        own = FIELD.layout.ravel(FIELD.init(as_tensor([datum_seed(SEED, datum_id)])))[0]
        torch.testing.assert_close(result.weights, own, rtol=0, atol=1e-9)
    assert_as_alone(fitted(DATA, init="per_datum", batch=2), DATA, init="per_datum")


def test_a_tensor_as_init_is_the_shared_start():
    start = FIELD.layout.ravel(FIELD.init(as_tensor([12345])))[0]
    before = start.clone()
    results = fitted(DATA, Adam(1e-12, SCHEDULE), init=start)
    assert all(torch.equal(result.weights, start) for result in results.values())
    fitted(DATA, init=start)
    assert torch.equal(start, before)


@pytest.mark.parametrize("optimizer", [ADAM, ESGD_SHARED, ESGD_OWN], ids=["adam", "esgd-shared", "esgd-per_field"])
def test_refilled_slots_begin_at_their_own_first_step(optimizer):
    """Eleven data through two slots that empty at different checks: schedules and curvature follow each field."""
    data = data_of(11)
    stop = Stop(max_steps=60, target=26.0, check_every=10)
    how = {"optimizer": optimizer, "samples": 16, "stop": stop}
    together = fitted(data, **how, batch=2)
    assert len({result.steps for result in together.values()}) > 1, "all left together: the refill shows nothing"
    for result in together.values():
        assert result.history_step == list(range(0, result.steps + 1, 10))
    assert_as_alone(together, data, **how)


class Counted:
    """Data that count how many of them were read."""

    def __init__(self, data) -> None:
        self.data, self.read = data, 0

    def __iter__(self):
        for datum in self.data:
            self.read += 1
            yield datum


def test_data_are_read_as_slots_free_up():
    data = Counted(data_of(12))
    results = fit(FIELD, SIGNAL, data, optimizer=ADAM, stop=STOP, seed=SEED, batch=3, device="cpu")
    assert data.read == 0
    finished = 0
    for _ in results:
        finished += 1
        # Three that were in the slots, and those that took the place of fields already handed out.
        assert data.read <= 3 * math.ceil(finished / 3)
    assert finished == data.read == 12


def test_data_of_other_sizes_are_read_ahead_by_no_more_than_the_slots():
    small, large = data_of(10, 4, 4), data_of(10, 5, 5)
    data = Counted([datum for pair in zip(small, large, strict=True) for datum in pair])
    finished = 0
    for _ in fit(FIELD, SIGNAL, data, optimizer=ADAM, stop=STOP, seed=SEED, batch=3, device="cpu"):
        finished += 1
        # In the slots, waiting for slots of the other size, and handed out (up to a batch of them at once).
        assert data.read <= finished + 2 * 3
    assert finished == data.read == 20


def test_no_data_give_no_fields():
    assert fitted([]) == {}


def test_shared_curvature_without_a_calibration_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"calibration=.*calibrate"):
        list(fit(FIELD, SIGNAL, DATA, optimizer=ESGD_SHARED, stop=STOP, seed=SEED, device="cpu"))


@pytest.mark.parametrize(("max_steps", "check_every", "ways_out"), [(70, 50, "50 or 100"), (130, 40, "120 or 160")])
def test_max_steps_that_no_check_would_meet_are_refused_with_the_ways_out(max_steps, check_every, ways_out):
    with pytest.raises(ValueError, match=rf"{max_steps}.*check_every={check_every}.*{ways_out}"):
        Stop(max_steps=max_steps, check_every=check_every)


def test_fewer_steps_than_a_check_are_checked_at_their_end():
    stop = Stop(max_steps=15, check_every=50)
    assert stop.cadence == 15
    assert [result.history_step for result in fitted(DATA[:2], stop=stop).values()] == [[0, 15]] * 2


def test_wall_seconds_are_the_clocks_divided_among_the_fields():
    ticks = iter(range(10_000))
    results = fitted(DATA, batch=2, clock=lambda: float(next(ticks)))
    # Two readings around each of the two segments of each batch of 2, 2 and 1 fields: 1 second a segment.
    assert [results[datum_id].wall_seconds for datum_id, _ in DATA] == [1.0, 1.0, 1.0, 1.0, 2.0]
    assert all(result.wall_seconds == 0 for result in fitted(DATA[:1]).values())


def test_the_observer_hears_of_every_check():
    heard = []
    fitted(DATA, batch=2, observe=heard.append)
    active_and_finished = [(2, 0), (2, 2), (2, 0), (2, 2), (1, 0), (1, 1)]
    assert heard == [Check(active, finished, 20 * active) for active, finished in active_and_finished]


class Louder(Image):
    """The same images with another unit of the loss."""

    def loss(self, predicted, samples):
        return 1e3 * super().loss(predicted, samples)


@pytest.mark.parametrize("curvature", ["shared", "per_field"])
def test_the_unit_of_the_loss_changes_no_esgd_fit(curvature):
    """Two segments of the loop, curvature measured by it or by a calibration: equal up to rounding."""
    optimizer, stop = ESGD(0.2, SCHEDULE, curvature=curvature, update_every=5), Stop(max_steps=10, check_every=5)
    results = []
    for signal in (SIGNAL, Louder(1)):
        options = {"optimizer": optimizer, "stop": stop, "seed": SEED, "device": "cpu"}
        shared = calibrate(FIELD, signal, DATA, **options) if curvature == "shared" else None
        fields = fit(FIELD, signal, DATA, calibration=shared, **options)
        results.append({result.id: result for result in fields})
    for datum_id, result in results[0].items():
        moved = (result.weights - theta0_of(FIELD, SEED)).square().mean().sqrt()
        assert moved > 1e-3
        torch.testing.assert_close(results[1][datum_id].weights, result.weights, rtol=1e-3, atol=1e-3 * float(moved))


def test_the_calibration_at_theta0_is_the_row_norms_of_the_mean_hessian_square():
    """Sixteen fields probe four times each; full Hessians of a field of 17 weights say what they should find."""
    field = MLP(2, 1, width=4, depth=1, omega_0=5.0)
    data = data_of(16, 5, 5)
    optimizer, theta0 = ESGD(0.1, SCHEDULE, beta2=0.9), theta0_of(field, SEED)
    shared = calibrate(field, SIGNAL, data, optimizer=optimizer, stop=Stop(max_steps=1), seed=SEED, device="cpu")
    assert shared.diagonal.shape == (1, field.layout.size)
    row_norms, variances = [], []
    for _, samples in data:

        def loss(row, samples=samples):
            predicted = field.apply(field.layout.unravel(row[None]), samples.coordinates[None].double())
            return (predicted[0] - samples.values.double()).square().mean()

        hessian = torch.autograd.functional.hessian(loss, theta0.double())
        row_norms.append(hessian.square().sum(dim=1))
        variances.append(2 * (row_norms[-1].square() - hessian.pow(4).sum(dim=1)))
    # Four probes of each field at theta0, weighed as a running mean of beta2 = 0.9.
    weights = 0.1 * 0.9 ** torch.arange(4, dtype=torch.float64) / (1 - 0.9**4)
    error = (torch.stack(variances).mean(dim=0) / len(data) * weights.square().sum()).sqrt()
    difference = shared.diagonal[0].double().square() - torch.stack(row_norms).mean(dim=0)
    assert (difference.abs() < 3 * error).all()
    assert (difference.abs() > 0.2 * error).any()  # an error bar of honest size


def test_a_calibration_is_the_running_mean_over_its_probes_and_the_median_step():
    """At a learning rate of zero all stays at theta0, so that full Hessians and the probes' seeds say every number."""
    field, data = MLP(2, 1, width=4, depth=1, omega_0=5.0), data_of(5, 5, 5)
    optimizer, theta0 = ESGD(0.0, Schedule("constant"), beta2=0.8, damping=0.1), theta0_of(field, SEED)
    stop = Stop(max_steps=30, check_every=10)
    shared = calibrate(field, SIGNAL, data, optimizer=optimizer, stop=stop, seed=SEED, device="cpu")
    seeds = as_tensor([datum_seed(SEED, datum_id) for datum_id, _ in data])
    hessians, gradients = [], []
    for _, samples in data:

        def loss(row, samples=samples):
            predicted = field.apply(field.layout.unravel(row[None]), samples.coordinates[None].double())
            return (predicted[0] - samples.values.double()).square().mean()

        hessians.append(torch.autograd.functional.hessian(loss, theta0.double()))
        gradients.append(torch.autograd.functional.jacobian(loss, theta0.double()))
    square, weight = torch.zeros(field.layout.size, dtype=torch.float64), 0.0
    for row, probed_steps in enumerate(([0, -1, -2, -3], [10], [20])):
        for step in probed_steps:
            probes = rademacher(seeds, Stream.PROBE, torch.full((5,), step), field.layout.size).double()
            products = torch.stack([hessian @ probe for hessian, probe in zip(hessians, probes, strict=True)])
            square, weight = 0.8 * square + 0.2 * products.square().mean(dim=0), 0.8 * weight + 0.2
        diagonal = (square / weight).sqrt()
        torch.testing.assert_close(shared.diagonal[row].double(), diagonal, rtol=1e-4, atol=1e-6)
        steps = torch.stack(gradients) / (diagonal + 0.1 * diagonal.mean())
        typical = steps.square().mean(dim=1).sqrt().median()
        torch.testing.assert_close(shared.step_rms[row].double(), typical, rtol=1e-4, atol=0)
    assert len(shared.diagonal) == len(shared.step_rms) == 3


def test_a_calibration_says_what_holds_at_each_step():
    shared = Calibration(torch.arange(6.0).view(3, 2), torch.tensor([1.0, 2.0, 3.0]), every=10)
    diagonal, step_rms = shared.at(torch.tensor([0, 9, 10, 25, 999]))
    assert step_rms.tolist() == [1.0, 1.0, 2.0, 3.0, 3.0]
    assert diagonal.tolist() == [[0.0, 1.0], [0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [4.0, 5.0]]


def test_a_calibration_has_one_row_per_update_and_ends_at_the_target():
    whole = calibration_of(ESGD_SHARED, 16)
    assert whole.every == 10
    assert whole.diagonal.shape == (4, FIELD.layout.size)
    assert (whole.diagonal >= 0).all()
    assert (whole.step_rms > 0).all()
    early = calibration_of(ESGD_SHARED, 16, stop=replace(STOP, target=10.0))
    assert early.diagonal.shape == (2, FIELD.layout.size)
    assert torch.equal(early.diagonal, whole.diagonal[:2])
    assert torch.equal(early.step_rms, whole.step_rms[:2])


def test_a_calibration_starts_where_fit_starts():
    options = {"optimizer": ESGD_SHARED, "stop": STOP, "seed": SEED, "device": "cpu"}
    by_default = calibrate(FIELD, SIGNAL, DATA, **options)
    same = calibrate(FIELD, SIGNAL, DATA, theta0=theta0_of(FIELD, SEED), **options)
    other = calibrate(FIELD, SIGNAL, DATA, theta0=theta0_of(FIELD, SEED + 1), **options)
    assert torch.equal(by_default.diagonal, same.diagonal)
    assert torch.equal(by_default.step_rms, same.step_rms)
    assert not torch.equal(by_default.diagonal, other.diagonal)


def test_one_datum_is_enough_for_a_calibration():
    options = {"optimizer": ESGD_SHARED, "stop": STOP, "seed": SEED, "device": "cpu"}
    alone, twice = (calibrate(FIELD, SIGNAL, DATA[:1] * count, **options) for count in (1, 2))
    assert torch.equal(alone.diagonal, twice.diagonal)
    assert torch.equal(alone.step_rms, twice.step_rms)
    assert alone.diagonal.isfinite().all()


@pytest.mark.parametrize(("data", "counts"), [([], r"\[\]"), ([*data_of(1), *data_of(1, 5, 5)], r"\[25, 63\]")])
def test_calibration_data_of_no_single_size_are_refused_with_their_sizes(data, counts):
    with pytest.raises(ValueError, match=f"one sample count, got counts {counts}"):
        calibrate(FIELD, SIGNAL, data, optimizer=ESGD_SHARED, stop=STOP, seed=SEED, device="cpu")


def test_shared_steps_are_no_longer_than_the_calibrations():
    """Values a thousand times too large would throw a field far; the clip holds every step to the typical length."""
    optimizer = ESGD(0.5, Schedule("constant"), clip=1.0)
    shared = calibration_of(optimizer, "full")
    wild = [("wild", Samples(DATA[0][1].coordinates, 1e3 * DATA[0][1].values))]
    stop = Stop(max_steps=10, check_every=10)
    for clip, holds in ((1.0, True), (None, False)):
        result = fitted(wild, replace(optimizer, clip=clip), stop=stop, calibration=shared)["wild"]
        moved = (result.weights - theta0_of(FIELD, SEED)).square().mean().sqrt()
        assert bool(moved <= 10 * 0.5 * shared.step_rms[0] * (1 + 1e-5)) == holds


def test_optimisers_by_name_see_what_optimisers_by_row_see():
    """`elementwise` is an option of speed: the same fit where the loop hands over tensors by name."""

    class ByName(Adam):
        elementwise = False

        def update(self, grads, state, params, extra: Extra):
            assert [tuple(p.shape[1:]) for p in params.values()] == [e.shape for e in FIELD.layout.entries]
            assert list(grads) == [entry.name for entry in FIELD.layout.entries]
            return super().update(grads, state, params, extra)

    by_name, by_row = (fitted(DATA, kind(0.01, SCHEDULE), samples=16, batch=2) for kind in (ByName, Adam))
    for datum_id, result in by_row.items():
        torch.testing.assert_close(by_name[datum_id].weights, result.weights, rtol=1e-5, atol=1e-6)


def test_masks_stay_with_their_data():
    """A datum without a mask is not weighted by its neighbour's, in the first batch or after a refill."""
    part = SIGNAL.samples(smooth_image(0))
    mask = torch.zeros(len(part.values))
    mask[:20] = 1
    masked = replace(part, mask=mask)
    data = [("masked", masked), ("plain", part), ("masked too", masked), ("plain too", part)]
    alone = {name: next(iter(fitted([(name, one)], ADAM, "full").values())) for name, one in data}
    for batch in (2, 3, "auto"):
        together = fitted(data, ADAM, "full", batch=batch)
        for name, result in alone.items():
            assert_same_bits(together[name], result)
    assert alone["masked"].quality != alone["plain"].quality


@pytest.mark.parametrize(
    ("change", "message"),
    [({"samples": 0}, "samples is at least 1, got 0"), ({"batch": -1}, "batch is at least 1, got -1")],
)
def test_numbers_out_of_range_are_refused_before_anything_is_read(change, message):
    def data():
        raise AssertionError("the data were read")
        yield

    with pytest.raises(ValueError, match=message):
        fit(FIELD, SIGNAL, data(), optimizer=ADAM, stop=STOP, seed=0, **change)


def test_a_check_must_fall_on_an_update_of_the_fields_own_curvature():
    optimizer = ESGD(0.05, SCHEDULE, curvature="per_field", update_every=7)
    with pytest.raises(ValueError, match="check_every=20 is not a multiple of the optimiser's update_every=7"):
        fit(FIELD, SIGNAL, DATA, optimizer=optimizer, stop=STOP, seed=0)


@pytest.mark.parametrize("change", [{"max_steps": 0}, {"check_every": 0}])
def test_a_stop_has_at_least_one_step_and_checks(change):
    with pytest.raises(ValueError, match="is at least 1, got 0"):
        Stop(**({"max_steps": 10} | change))


def test_a_batch_that_does_not_fit_into_memory_is_halved(monkeypatch):
    """Results are those of a machine with more memory, bit for bit."""
    data = data_of(9)
    expected = fitted(data, ADAM, 11)
    advance, sizes = Batch.advance, []

    def cramped(batch, count):
        sizes.append(len(batch.slots))
        if len(batch.slots) > 3:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")
        advance(batch, count)

    monkeypatch.setattr(Batch, "advance", cramped)
    found = fitted(data, ADAM, 11)
    assert sizes[:3] == [9, 4, 2]
    assert found.keys() == expected.keys()
    for datum_id, result in expected.items():
        assert_same_bits(found[datum_id], result)


def test_another_error_of_a_batch_is_not_taken_for_a_lack_of_memory(monkeypatch):
    def broken(batch, count):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(Batch, "advance", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        fitted(DATA, ADAM, 11)
