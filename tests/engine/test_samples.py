"""What a step sees, what a check measures, what is held back, and how a signal predicts it."""

from dataclasses import replace

import pytest
import torch

from nfscale.engine import Stop, calibrate
from nfscale.engine.batch import Batch, Slot
from nfscale.engine.memory import _peak_bytes
from nfscale.engine.sampling import Sampler
from nfscale.engine.step import evaluate, field_chunks, sample_chunks, stack_samples, training_samples
from nfscale.fields import MLP, theta0_of
from nfscale.optim import ESGD, Adam, Schedule
from nfscale.rng import Stream, as_tensor, datum_seed, uniform
from nfscale.signals import Image, Samples
from tests.engine.fits import (
    ADAM,
    DATA,
    ESGD_OWN,
    ESGD_SHARED,
    FIELD,
    RAYS,
    SCHEDULE,
    SEED,
    SIGNAL,
    STOP,
    Rays,
    assert_as_alone,
    assert_same_bits,
    data_of,
    fitted,
    ray_data,
    smooth_image,
    stacked,
)

CPU = torch.device("cpu")
THETA0 = theta0_of(FIELD, SEED)


def said_by_theta0(coordinates: torch.Tensor) -> torch.Tensor:
    return FIELD.apply(FIELD.layout.unravel(THETA0.repeat(2, 1)), coordinates[None])[0]


def with_check(datum: tuple[str, Samples], check: Samples) -> tuple[str, Samples]:
    return datum[0], replace(datum[1], check=check)


def measured(weights: torch.Tensor, samples: Samples, signal=SIGNAL) -> tuple[float, float]:
    """Loss and quality of one field."""
    values = evaluate(FIELD, signal, weights.repeat(2, 1), stack_samples([samples] * 2, CPU))
    return float(values[0][0]), float(values[1][0])


# Checks


def test_loss_and_quality_are_those_of_the_check():
    others = [SIGNAL.samples(smooth_image(50 + n, 5, 6)) for n in range(len(DATA))]
    data = [with_check(datum, other) for datum, other in zip(DATA, others, strict=True)]
    results = fitted(data, samples=16, batch=2)
    for (datum_id, samples), other in zip(data, others, strict=True):
        result = results[datum_id]
        assert (result.loss, result.quality) == pytest.approx(measured(result.weights, other), rel=1e-5)
        assert result.quality == max(result.history_quality)
        assert result.history_quality[0] == pytest.approx(measured(THETA0, other)[1], rel=1e-5)
        assert result.quality != pytest.approx(measured(result.weights, replace(samples, check=None))[1], rel=1e-3)
        assert result.quality_heldout is None


@pytest.mark.parametrize("samples", ["full", 16])
def test_a_check_changes_no_step(samples):
    """The check agrees with the samples here, so that the same params are the best."""
    data = [with_check((name, part), Samples(part.coordinates[:50], part.values[:50])) for name, part in DATA]
    stop = Stop(max_steps=20, check_every=20)
    plain, checked = (fitted(some, samples=samples, stop=stop) for some in (DATA, data))
    for datum_id, result in plain.items():
        assert torch.equal(checked[datum_id].weights, result.weights)
        assert not torch.equal(result.weights, THETA0)
        assert checked[datum_id].history_quality != result.history_quality


def test_the_target_is_one_of_the_check():
    stop = Stop(max_steps=40, target=20.0, check_every=5)
    wrong = [with_check((name, part), Samples(part.coordinates, -part.values)) for name, part in DATA]
    plain, checked = (fitted(data, stop=stop) for data in (DATA, wrong))
    for datum_id, result in plain.items():
        assert result.steps_to_target is not None
        assert checked[datum_id].steps_to_target is None


def test_the_best_params_are_the_best_of_the_check():
    """A check that wants what theta0 says: every step makes it worse."""
    data = [
        with_check((name, part), Samples(part.coordinates[:9], said_by_theta0(part.coordinates[:9])))
        for name, part in DATA
    ]
    for result in fitted(data, stop=replace(STOP, max_restarts=0)).values():
        assert torch.equal(result.weights, THETA0)
        assert result.quality == result.history_quality[0] > 100


# What is held back


def test_the_quality_of_what_is_held_back_is_that_of_the_best_params():
    """The best params are theta0, or those of a later check, as the check says."""
    heldout = SIGNAL.samples(smooth_image(77, 4, 5))
    theta0_is_best = Samples(DATA[0][1].coordinates[:9], said_by_theta0(DATA[0][1].coordinates[:9]))
    for check in (None, theta0_is_best):
        data = [(name, replace(part, check=check, heldout=heldout)) for name, part in DATA]
        results = fitted(data, batch=3, stop=replace(STOP, max_restarts=0))
        for result in results.values():
            assert torch.equal(result.weights, THETA0) == (check is not None)
            assert result.quality_heldout == pytest.approx(measured(result.weights, heldout)[1], rel=1e-5)
    assert_as_alone(results, data, stop=replace(STOP, max_restarts=0))


def test_no_step_and_no_check_sees_what_is_held_back():
    heldout = Samples(torch.zeros(3, 2), torch.full((3, 1), float("nan")))
    plain = fitted(DATA, samples=16)
    for datum_id, result in fitted([(name, replace(part, heldout=heldout)) for name, part in DATA], samples=16).items():
        assert result.quality_heldout != result.quality_heldout  # not a number
        assert_same_bits(replace(result, quality_heldout=None), plain[datum_id])


def test_a_field_that_diverged_says_the_quality_of_what_it_fell_back_to():
    heldout = SIGNAL.samples(smooth_image(77, 4, 5))
    data = [(name, replace(part, heldout=heldout)) for name, part in DATA[:2]]
    for result in fitted(data, Adam(1000.0, SCHEDULE)).values():
        assert not result.result.ok
        assert result.quality_heldout == measured(THETA0, heldout)[1]


# What shares a batch


@pytest.mark.parametrize("batch", [2, 3, "auto"])
def test_masks_stay_with_their_data(batch):
    """A datum without a mask is not weighted by its neighbour's, in the first batch or after a refill."""
    part = SIGNAL.samples(smooth_image(0))
    mask = torch.zeros(len(part.values))
    mask[:20] = 1
    masked = replace(part, mask=mask)
    data = [("masked", masked), ("plain", part), ("masked too", masked), ("plain too", part)]
    together = fitted(data, batch=batch)
    assert_as_alone(together, data)
    assert together["masked"].quality != together["plain"].quality


@pytest.mark.parametrize("batch", [2, "auto"])
def test_data_of_several_kinds_are_fitted_in_one_dataset(batch):
    """Other counts to check or to hold back, or none: what each becomes is what it becomes alone."""
    kinds = [
        ray_data(3, checked, held_back) for checked, held_back in ((13, 9), (8, 9), (13, 4), (None, 9), (13, None))
    ]
    data = [datum for row in zip(*kinds, strict=True) for datum in row]
    assert len({part.kind for _, part in data}) == len(kinds)
    together = fitted(data, samples=8, signal=RAYS, batch=batch)
    assert_as_alone(together, data, samples=8, signal=RAYS)
    for datum_id, part in data:
        assert (together[datum_id].quality_heldout is None) == (part.heldout is None)


def test_refilled_and_compacted_slots_keep_their_checks_and_what_they_hold_back():
    data = ray_data(11)
    stop = Stop(max_steps=40, target=20.0, check_every=5)
    together = fitted(data, Adam(0.01, Schedule("constant")), 8, stop, signal=RAYS, batch=4)
    assert len({result.steps for result in together.values()}) > 1, "all left together: the refill shows nothing"
    for datum_id, part in data:
        result = together[datum_id]
        assert result.quality == measured(result.weights, part.check, RAYS)[1]
        assert result.quality_heldout == measured(result.weights, part.heldout, RAYS)[1]


def test_a_batch_gives_its_data_back_as_they_were():
    data = ray_data(3)
    samples = stack_samples([part for _, part in data], CPU)
    slots = [Slot(datum_id, 0) for datum_id, _ in data]
    batch = Batch(FIELD, RAYS, ADAM, Sampler(21, 8), None, THETA0.repeat(3, 1), samples, as_tensor([0, 1, 2]), slots)
    for (datum_id, given), (name, back) in zip(data, batch.data(), strict=True):
        assert name == datum_id
        assert back.kind == given.kind
        equal = given.map(lambda ours, theirs: (ours == theirs).all(), back)
        for part in (equal, equal.check, equal.heldout):
            assert part.coordinates
            assert part.values


# Predictions


@pytest.mark.parametrize("samples", ["full", 8])
@pytest.mark.parametrize("optimizer", [ADAM, ESGD_SHARED, ESGD_OWN], ids=["adam", "esgd-shared", "esgd-per_field"])
def test_a_signal_with_a_prediction_of_its_own_is_fitted_through_it(optimizer, samples):
    """Segments, five points of the field each: they are learned, and no bit depends on the batch."""
    data, how = ray_data(5), {"optimizer": optimizer, "samples": samples, "signal": RAYS}
    if optimizer is ESGD_SHARED:
        how["calibration"] = calibrate(
            FIELD, RAYS, data, optimizer=optimizer, stop=STOP, seed=SEED, samples=samples, device="cpu"
        )
    together = fitted(data, **how)
    for datum_id, part in data:
        result = together[datum_id]
        assert result.quality > result.history_quality[0] + 1
        assert result.quality_heldout > measured(THETA0, part.heldout, RAYS)[1] + 1
    assert_as_alone(together, data, **how)
    for datum_id, result in fitted(data, **how, batch=2).items():
        assert_same_bits(together[datum_id], result)


def test_a_pointwise_signal_is_the_prediction_at_the_coordinates():
    class Spelled(Image):
        def predict(self, apply, samples):
            assert samples.jitter is None
            return apply(samples.coordinates)

    spelled = fitted(DATA, samples=16, signal=Spelled(1))
    for datum_id, result in fitted(DATA, samples=16, step="plain").items():
        assert_same_bits(result, spelled[datum_id])


# Jitter


class Noted(Rays):
    """Notes the jitter that it is given."""

    def __init__(self) -> None:
        super().__init__(1)
        object.__setattr__(self, "heard", [])

    def predict(self, apply, samples):
        self.heard.append(samples.jitter)
        return super().predict(apply, samples)


def test_steps_are_jittered_by_the_fields_own_seed_and_step_and_measurements_are_not():
    signal, data = Noted(), ray_data(3)
    fitted(data, samples=8, signal=signal, batch=3)
    heard = [jitter for jitter in signal.heard if jitter is not None]
    assert len(heard) == STOP.max_steps
    assert len(signal.heard) - len(heard) == 3 + 1  # at three checks, and of what is held back
    seeds = as_tensor([datum_seed(SEED, datum_id) for datum_id, _ in data])
    for step, jitter in enumerate(heard):
        assert torch.equal(jitter, uniform(seeds, Stream.JITTER, torch.full((3,), step), 8))
        assert jitter.dtype == torch.float32
        assert jitter.min() >= 0
        assert jitter.max() < 1
    assert len({float(jitter[0, 0]) for jitter in heard}) == STOP.max_steps


def test_jitter_is_that_of_a_field_alone_in_any_batch_and_at_any_step_of_the_others():
    samples = stack_samples([part for _, part in ray_data(4)], CPU)
    seeds, steps = as_tensor([7, 8, 9, 10]), torch.tensor([0, 20, 3, 20])
    together = training_samples(RAYS, samples, None, seeds, steps).jitter
    for index in range(4):
        own = slice(index, index + 1)
        alone = training_samples(RAYS, samples.map(lambda t, own=own: t[own]), None, seeds[own], steps[own])
        assert torch.equal(alone.jitter[0], together[index])


@pytest.mark.parametrize(("target", "looks"), [(None, 0), (150.0, 1)])
def test_a_calibration_is_jittered_as_a_fit_is_and_looks_where_it_may_end_early(target, looks):
    signal, data = Noted(), ray_data(3)
    optimizer, stop = ESGD(0.1, SCHEDULE, update_every=5), Stop(10, check_every=5, target=target)
    calibrate(FIELD, signal, data, optimizer=optimizer, stop=stop, seed=SEED, samples=8, device="cpu")
    seeds = as_tensor([datum_seed(SEED, datum_id) for datum_id, _ in data])
    heard = [jitter for jitter in signal.heard if jitter is not None]
    wanted = {step: uniform(seeds, Stream.JITTER, torch.full((3,), step), 8) for step in range(10)}
    in_order = [0, 0, 0, 0, *range(1, 10)]  # the first step is probed four times
    assert all(torch.equal(jitter, wanted[step]) for jitter, step in zip(heard, in_order, strict=True))
    assert len(signal.heard) - len(heard) == looks


def test_a_signal_that_is_not_jittered_draws_nothing():
    samples = stacked(DATA)
    assert training_samples(SIGNAL, samples, None, as_tensor([0] * 5), torch.zeros(5).long()).jitter is None


# Calibration


def test_a_calibration_ends_by_its_checks_and_ignores_what_is_held_back():
    how = {"optimizer": ESGD_SHARED, "stop": replace(STOP, target=10.0), "seed": SEED, "device": "cpu"}
    plain = calibrate(FIELD, SIGNAL, DATA, **how)
    assert len(plain.diagonal) == 2
    held_back = [
        (name, replace(part, heldout=data_of(1, 3, 3 + n)[0][1])) for n, (name, part) in enumerate(DATA)
    ]  # of several sizes, too
    assert torch.equal(calibrate(FIELD, SIGNAL, held_back, **how).diagonal, plain.diagonal)
    wrong = [with_check((name, part), Samples(part.coordinates, -9 * part.values)) for name, part in DATA]
    assert len(calibrate(FIELD, SIGNAL, wrong, **how).diagonal) == 4


def test_calibration_data_that_are_checked_unlike_each_other_are_refused():
    with pytest.raises(ValueError, match="agree in what they are checked on"):
        calibrate(
            FIELD, RAYS, [*ray_data(1), *ray_data(1, 5)], optimizer=ESGD_SHARED, stop=STOP, seed=SEED, device="cpu"
        )


# Evaluation in pieces


def test_an_evaluation_of_a_few_fields_at_a_time_has_the_bits_of_one_at_once(monkeypatch):
    rows = FIELD.layout.ravel(FIELD.init(as_tensor([datum_seed(0, str(n)) for n in range(9)])))
    samples = stacked(data_of(9))
    at_once = evaluate(FIELD, SIGNAL, rows, samples)
    for fields, expected in ((2, [2, 2, 2, 3]), (3, [3, 3, 3]), (4, [4, 5]), (8, [9])):  # never one field alone
        monkeypatch.setattr("nfscale.engine.step._EVALUATION_BYTES", fields * 4 * 63 * 12)
        assert [stop - start for start, stop in field_chunks(FIELD, 9, 63)] == expected
        pieces = evaluate(FIELD, SIGNAL, rows, samples)
        assert all(torch.equal(piece, whole) for piece, whole in zip(pieces, at_once, strict=True))


@pytest.mark.parametrize("signal", [SIGNAL, RAYS], ids=["image", "rays"])
def test_an_evaluation_of_a_few_samples_at_a_time_says_the_same_up_to_rounding(monkeypatch, signal):
    data = data_of(4) if signal is SIGNAL else ray_data(4, None, None)
    samples = stacked(data)
    samples = replace(samples, mask=torch.rand(samples.values.shape[:2], generator=torch.Generator().manual_seed(0)))
    rows = FIELD.layout.ravel(FIELD.init(as_tensor([1, 2, 3, 4])))
    at_once = evaluate(FIELD, signal, rows, samples)
    for points in (5, 20, 60):
        monkeypatch.setattr("nfscale.engine.step._EVALUATION_BYTES", 2 * 4 * points * FIELD.width)
        chunks = sample_chunks(FIELD, samples.values.shape[1], signal.points_per_sample)
        assert len(chunks) > 1
        assert all((stop - start) * signal.points_per_sample <= points for start, stop in chunks)
        for piece, whole in zip(evaluate(FIELD, signal, rows, samples), at_once, strict=True):
            torch.testing.assert_close(piece, whole, rtol=1e-5, atol=1e-5)


def test_pieces_of_samples_are_nearly_equal_cover_all_and_do_not_depend_on_the_batch():
    for count in (1, 63, 64, 4097):
        for points in (1, 7, 48):
            chunks = sample_chunks(MLP(3, 4, width=256), count, points)
            assert [start for start, _ in chunks] == [0, *(stop for _, stop in chunks[:-1])]
            assert chunks[-1][1] == count
            lengths = {stop - start for start, stop in chunks}
            assert max(lengths) - min(lengths) <= 1


def test_a_view_of_many_rays_is_measured_in_little_memory():
    """1,000 rays of 48 points: 12 MB of one layer for one field, and there are several layers and two fields."""

    class Deep(Rays):
        points_per_sample = 48

    field, signal = MLP(2, 1, width=64, depth=3), Deep(1)
    rays = ray_data(2, None, None)
    samples = stack_samples([part.map(lambda t: t[:20].repeat(50, 1)) for _, part in rays], CPU)
    rows = theta0_of(field, 0).repeat(2, 1)
    with _peak_bytes(CPU) as peak:
        evaluate(field, signal, rows, samples)
    assert peak() < 20e6


def test_chosen_fields_are_measured_as_they_are_among_all():
    samples, rows = stacked(DATA), FIELD.layout.ravel(FIELD.init(as_tensor([1, 2, 3, 4, 5])))
    together = evaluate(FIELD, SIGNAL, rows, samples)
    for indices in ([3, 1], [4, 4], [0, 2, 3]):
        chosen = evaluate(FIELD, SIGNAL, rows, samples, indices)
        assert all(torch.equal(part, whole[indices]) for part, whole in zip(chosen, together, strict=True))
