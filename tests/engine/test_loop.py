"""What a field becomes is its own affair: the same bits alone, in any batch, in any order, after any neighbour."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from nfscale.engine import Check, Result, Stop, fit, loop
from nfscale.engine.dispatch import PLAIN
from nfscale.engine.step import evaluate, stack_samples
from nfscale.fields import MLP, theta0_of
from nfscale.optim import Adam, Extra
from nfscale.rng import as_tensor, datum_seed
from nfscale.signals import Image
from tests.engine.fits import (
    ADAM,
    DATA,
    ESGD_OWN,
    ESGD_SHARED,
    FIELD,
    SCHEDULE,
    SEED,
    SIGNAL,
    STEPS,
    STOP,
    assert_as_alone,
    assert_same_bits,
    data_of,
    fitted,
)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("samples", ["full", 16])
@pytest.mark.parametrize("optimizer", [ADAM, ESGD_SHARED, ESGD_OWN], ids=["adam", "esgd-shared", "esgd-per_field"])
def test_a_field_alone_has_the_bits_it_has_among_five(optimizer, samples, step):
    together = fitted(DATA, optimizer, samples, step=step)
    for result in together.values():
        assert result.result is Result.MAX_STEPS
        assert result.quality > result.history_quality[0] + 3  # it learned something, so that equality says something
        assert result.history_step == [0, 20, 40]
    assert_as_alone(together, DATA, optimizer=optimizer, samples=samples, step=step)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("samples", ["full", 16])
@pytest.mark.parametrize("optimizer", [ADAM, ESGD_SHARED], ids=["adam", "esgd-shared"])
@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_the_batch_size_changes_no_bit(optimizer, samples, batch, step):
    data = data_of(8)
    automatic = fitted(data, optimizer, samples, batch="auto", step=step)
    other = fitted(data, optimizer, samples, batch=batch, step=step)
    assert set(other) == set(automatic)
    for datum_id, result in automatic.items():
        assert_same_bits(other[datum_id], result)


def fits_together_and_alone(width: int, depth: int, channels: int, samples: int | str, step: str):
    """Six data in one batch, and each in a batch of its own: results by id."""
    field, signal = MLP(2, channels, width=width, depth=depth, omega_0=10.0, omega_hidden=10.0), Image(channels)
    draw = np.random.default_rng(0)
    data = [(str(n), signal.samples(draw.random((9, 7, channels)))) for n in range(6)]

    def run(part):
        options = {"optimizer": Adam(3e-3, SCHEDULE), "stop": STOP, "seed": 0, "samples": samples, "step": step}
        return {result.id: result for result in fit(field, signal, part, **options, device="cpu")}

    return run(data), {datum_id: run([(datum_id, part)])[datum_id] for datum_id, part in data}


@pytest.mark.parametrize("samples", ["full", 11])
@pytest.mark.parametrize(("width", "depth", "channels"), [(16, 3, 3), (8, 1, 1), (20, 2, 2), (64, 2, 1)])
@pytest.mark.parametrize("step", STEPS)
def test_no_bit_depends_on_the_batch_for_other_layouts(width, depth, channels, samples, step):
    together, alone = fits_together_and_alone(width, depth, channels, samples, step)
    for datum_id, result in together.items():
        assert_same_bits(alone[datum_id], result)


@pytest.mark.parametrize("width", [1, 13, 18, 33])
@pytest.mark.parametrize("step", STEPS[1:])
def test_no_bit_depends_on_the_batch_for_any_width_but_in_plain_steps(width, step):
    together, alone = fits_together_and_alone(width, 2, 1, 11, step)
    for datum_id, result in together.items():
        assert_same_bits(alone[datum_id], result)


@pytest.mark.parametrize("width", [13, 18, 33])
def test_other_widths_depend_on_the_batch_by_rounding_alone_in_plain_steps(width):
    """The matrix library picks its path by the alignment of a field's block, so no bits are promised here."""
    together, alone = fits_together_and_alone(width, 2, 1, "full", "plain")
    for datum_id, result in together.items():
        assert torch.allclose(alone[datum_id].weights, result.weights, rtol=0, atol=1e-5)
        assert alone[datum_id].steps == result.steps


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


def test_shared_init_starts_every_field_from_one_draw():
    results = fitted(DATA, Adam(1e-12, SCHEDULE))
    assert all(torch.equal(result.weights, theta0_of(FIELD, SEED)) for result in results.values())
    assert torch.equal(theta0_of(FIELD, SEED), FIELD.layout.ravel(FIELD.init(as_tensor([datum_seed(SEED, "")])))[0])


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("init", ["shared", "per_datum"])
def test_the_first_check_of_a_field_is_of_its_own_start_at_its_own_coordinates(init, step):
    """Images of 9 x 7 and of 7 x 9 pixels share a batch, but no coordinates."""
    field = MLP(2, 1, width=12, depth=2)
    data = [datum for pair in zip(data_of(4), data_of(4, 7, 9), strict=True) for datum in pair]
    assert len({samples.kind for _, samples in data}) == 1
    found = fitted(data, field=field, init=init, step=step, batch=6)
    for datum_id, samples in data:
        rows = field.layout.ravel(field.init(as_tensor([datum_seed(SEED, datum_id)])))
        rows = theta0_of(field, SEED)[None] if init == "shared" else rows
        _, (quality,) = evaluate(field, SIGNAL, rows, stack_samples([samples], rows.device))
        assert found[datum_id].history_quality[0] == pytest.approx(float(quality), abs=1e-4)


def test_a_shared_start_is_evaluated_once_for_all_that_look_at_the_same_coordinates(monkeypatch):
    evaluated = []

    def watched(field, rows):
        apply = PLAIN.apply(field, rows)

        def at(coordinates):
            evaluated.append(len(rows))
            return apply(coordinates)

        return at

    monkeypatch.setattr(loop, "chosen", lambda *arguments: replace(PLAIN, apply=watched))
    fitted(data_of(8), batch=4, stop=Stop(max_steps=20, check_every=20))
    assert evaluated == [4, 4, 4], "the start, four fields after their steps, the four that took their slots"


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


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("optimizer", [ADAM, ESGD_SHARED, ESGD_OWN], ids=["adam", "esgd-shared", "esgd-per_field"])
def test_refilled_slots_begin_at_their_own_first_step(optimizer, step):
    """Eleven data through two slots that empty at different checks: schedules and curvature follow each field."""
    data = data_of(11)
    stop = Stop(max_steps=60, target=26.0, check_every=10)
    how = {"optimizer": optimizer, "samples": 16, "stop": stop, "step": step}
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


def test_wall_seconds_are_the_clocks_divided_among_the_fields():
    ticks = iter(range(10_000))
    results = fitted(DATA, batch=2, clock=lambda: float(next(ticks)))
    # Three readings in each of the two segments of each batch of 2, 2 and 1 fields: 2 seconds a segment.
    assert [results[datum_id].wall_seconds for datum_id, _ in DATA] == [2.0, 2.0, 2.0, 2.0, 4.0]
    assert all(result.wall_seconds == 0 for result in fitted(DATA[:1]).values())


def test_the_observer_hears_of_every_check():
    heard = []
    fitted(DATA, batch=2, step="plain", observe=heard.append)
    active_and_finished = [(2, 0), (2, 2), (2, 0), (2, 2), (1, 0), (1, 1)]
    assert heard == [Check(active, finished, 20 * active, "plain", slots=2) for active, finished in active_and_finished]
    heard.clear()
    ticks = itertools.accumulate(itertools.cycle([100, 3, 5]))  # outside, in the steps, in the check
    fitted(DATA, batch=2, observe=heard.append, clock=lambda: float(next(ticks)))
    assert [(check.step_seconds, check.check_seconds) for check in heard] == [(3.0, 5.0)] * 6


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
