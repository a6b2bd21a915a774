"""Data whose samples stay in a file: what becomes of them is what becomes of the same data in memory, bit for bit."""

from dataclasses import dataclass, replace

import pytest
import torch

from nfscale.engine import Stop, calibrate
from nfscale.engine.sampling import Sampler, fetched, fetched_steps
from nfscale.optim import Adam, Schedule, Spring
from nfscale.rng import as_tensor
from nfscale.signals import Samples
from tests.engine.fits import (
    ADAM,
    DATA,
    ESGD_OWN,
    ESGD_SHARED,
    FIELD,
    SEED,
    SIGNAL,
    STEPS,
    STOP,
    assert_as_alone,
    assert_same_bits,
    data_of,
    fitted,
)


@dataclass(frozen=True, eq=False)
class Held:
    """A source that says what it was asked for."""

    samples: Samples
    asked: list[torch.Tensor]

    def __len__(self) -> int:
        return len(self.samples.values)

    def draw(self, positions: torch.Tensor) -> Samples:
        assert positions.dtype == torch.int64
        assert positions.device.type == "cpu"
        self.asked.append(positions)
        return self.samples.map(lambda tensor: tensor[positions])


def checked(data) -> list[tuple[str, Samples]]:
    return [(name, replace(part, check=part.map(lambda tensor: tensor[::3]))) for name, part in data]


def left(data) -> list[tuple[str, Samples]]:
    """The same data, their samples in a source."""
    return [
        (
            name,
            replace(part.map(lambda tensor: tensor[:0]), check=part.check, source=Held(replace(part, check=None), [])),
        )
        for name, part in checked(data)
    ]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("optimizer", [ADAM, ESGD_SHARED, ESGD_OWN], ids=["adam", "esgd-shared", "esgd-per_field"])
@pytest.mark.parametrize("sampling", ["stratified", "uniform"])
@pytest.mark.parametrize("at_once", [1 << 20, 2000], ids=["twenty", "ten"])
def test_a_datum_in_a_file_becomes_what_it_becomes_in_memory(step, optimizer, sampling, at_once, monkeypatch):
    monkeypatch.setattr("nfscale.engine.sampling._FETCHED_BYTES", at_once)
    how = {"optimizer": optimizer, "samples": 16, "sampling": sampling, "step": step}
    in_memory, in_file = fitted(checked(DATA), **how), fitted(left(DATA), **how)
    for datum_id, result in in_memory.items():
        assert result.quality > result.history_quality[0] + 1
        assert_same_bits(result, in_file[datum_id])


def test_no_more_is_read_than_steps_see():
    data = left(DATA)
    fitted(data, samples=16, batch=len(DATA))
    for _, part in data:
        assert sum(len(positions) for positions in part.source.asked) == 16 * STOP.max_steps


def test_slots_are_refilled_begun_again_and_compacted_with_their_own_sources():
    data = left(data_of(7))
    stop = Stop(max_steps=40, target=20.0, check_every=5)
    how = {"optimizer": Adam(0.01, Schedule("constant")), "samples": 8, "stop": stop}
    together = fitted(data, batch=3, **how)
    assert len({result.steps for result in together.values()}) > 1
    assert_as_alone(together, data, **how)
    wild = {"optimizer": Adam(3.0, Schedule("constant")), "samples": 8, "batch": 3}
    again, in_memory = fitted(data, **wild), fitted(checked(data_of(7)), **wild)
    assert any(result.restarts for result in again.values())
    for datum_id, result in in_memory.items():
        assert_same_bits(result, again[datum_id])


def test_what_is_held_in_memory_and_what_is_not_share_a_dataset():
    data = [*left(DATA), *checked(data_of(3, 5, 6))]
    assert len({part.kind for _, part in data}) == 2
    assert_as_alone(fitted(data, samples=8), data, samples=8)


def test_solvers_of_minibatches_draw_too():
    solver = Spring(0.1, Schedule("constant"))
    in_memory, in_file = (fitted(data, solver, samples=8) for data in (checked(DATA), left(DATA)))
    for datum_id, result in in_memory.items():
        assert_same_bits(result, in_file[datum_id])


@pytest.mark.parametrize("at_once", [1 << 20, 2000])
def test_a_calibration_is_that_of_the_data_in_memory(at_once, monkeypatch):
    monkeypatch.setattr("nfscale.engine.sampling._FETCHED_BYTES", at_once)
    how = {"optimizer": ESGD_SHARED, "stop": STOP, "seed": SEED, "samples": 16, "device": "cpu"}
    one, other = (calibrate(FIELD, SIGNAL, data, **how) for data in (checked(DATA), left(DATA)))
    assert torch.equal(one.diagonal, other.diagonal)
    assert torch.equal(one.step_rms, other.step_rms)


def test_all_samples_of_a_file_at_every_step_are_refused():
    for how in ({"samples": "full"}, {"samples": 8, "sampling": "error"}):
        with pytest.raises(ValueError, match=r"give a number|use sampling=stratified"):
            fitted(left(DATA), **how)
    with pytest.raises(ValueError, match="give a number"):
        calibrate(FIELD, SIGNAL, left(DATA), optimizer=ESGD_SHARED, stop=STOP, seed=SEED, device="cpu")


def test_steps_find_in_what_was_fetched_what_they_would_find_in_all():
    part = Samples(torch.arange(101.0)[:, None], torch.arange(101.0)[:, None])
    sampler, seeds = Sampler(101, 7), as_tensor([5, 6, 7])
    for count in (1, 4, 6):
        steps = torch.tensor([0, 2 * count, 9 * count])
        presented, dealing = fetched([Held(part, [])] * 3, sampler, seeds, steps, count)
        places = torch.arange(7).expand(3, 1, 7) if dealing.is_full else dealing.positions(seeds, steps, count)
        found = presented.values[torch.arange(3)[:, None, None], places, 0]
        assert torch.equal(found.long(), sampler.positions(seeds, steps, count))


@pytest.mark.parametrize(
    ("count", "update_every", "expected"), [(50, 1, 25), (50, 10, 10), (40, 10, 20), (7, 10, 7), (49, 1, 7), (3, 1, 3)]
)
def test_what_is_read_at_once_is_bounded_and_even(count, update_every, expected, monkeypatch):
    monkeypatch.setattr("nfscale.engine.sampling._FETCHED_BYTES", 25 * 16 * 12)
    like = Samples(torch.empty(3, 0, 2), torch.empty(3, 0, 1))
    assert fetched_steps(Sampler(1000, 16), like, count, update_every) == expected
