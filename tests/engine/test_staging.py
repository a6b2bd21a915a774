"""Data that are staged and data that come together: what of it does not need a GPU."""

from dataclasses import replace

import pytest
import torch

from nfscale.engine import loop
from nfscale.engine.staging import Staged, staging
from nfscale.engine.step import stack_samples
from nfscale.optim import LBFGS, Adam
from nfscale.signals import Samples
from tests.engine.fits import DATA, ESGD_OWN, ESGD_SHARED, RAYS, SCHEDULE, assert_same_bits, data_of, fitted, ray_data


class OnItsWay(Staged):
    """To the CPU."""

    def __init__(self, host: Samples) -> None:
        self.host = host
        self.has_arrived = False

    def arrived(self) -> Samples:
        self.has_arrived = True
        return self.host.map(torch.clone)


def test_on_a_cpu_nothing_is_staged():
    samples = DATA[0][1]
    assert staging("cpu")(samples) is samples


@pytest.mark.parametrize("together", [1, 3])
def test_what_is_staged_is_taken_where_slots_are_filled_again(together, monkeypatch):
    """A new batch takes what was read; other data are staged or not as there is room."""
    monkeypatch.setattr(loop, "_FILLED_TOGETHER", {"cpu": together})
    data = data_of(8) + data_of(3, height=6)
    expected = fitted(data, samples=16, batch=3)
    staged = [(datum_id, samples if n == 5 else OnItsWay(samples)) for n, (datum_id, samples) in enumerate(data)]
    found = fitted(staged, samples=16, batch=3)
    for datum_id, result in expected.items():
        assert_same_bits(found[datum_id], result)
    arrived = [n for n, (_, samples) in enumerate(staged) if isinstance(samples, OnItsWay) and samples.has_arrived]
    assert arrived == [3, 4, 6, 7], "not the first three of each kind"


@pytest.mark.parametrize("together", [2, 5])
@pytest.mark.parametrize(
    ("optimizer", "how"),
    [
        (Adam(0.01, SCHEDULE), {"samples": 16, "sampling": "error"}),
        (Adam(0.01, SCHEDULE), {"samples": 16, "step_plan": {"9x7-1": 20, "9x7-7": 20}}),
        (ESGD_SHARED, {"samples": "full"}),
        (ESGD_OWN, {"samples": 16}),
        (LBFGS(), {"samples": "full"}),
    ],
    ids=["selected", "planned", "esgd-shared", "esgd-per_field", "lbfgs"],
)
def test_slots_that_are_filled_together_are_those_filled_one_by_one(optimizer, how, together, monkeypatch):
    one_by_one = fitted(data_of(11), optimizer, batch=4, **how)
    monkeypatch.setattr(loop, "_FILLED_TOGETHER", {"cpu": together})
    at_once = fitted(data_of(11), optimizer, batch=4, **how)
    for datum_id, result in one_by_one.items():
        assert_same_bits(at_once[datum_id], result)


def test_samples_to_check_and_held_back_come_with_the_others(monkeypatch):
    one_by_one = fitted(ray_data(7), signal=RAYS, samples=8, batch=2)
    monkeypatch.setattr(loop, "_FILLED_TOGETHER", {"cpu": 2})
    at_once = fitted([(name, OnItsWay(part)) for name, part in ray_data(7)], signal=RAYS, samples=8, batch=2)
    for datum_id, result in one_by_one.items():
        assert result.quality_heldout is not None
        assert_same_bits(at_once[datum_id], result)


def test_a_restart_keeps_its_rate_in_a_batch_that_is_filled_together(monkeypatch):
    monkeypatch.setattr(loop, "_FILLED_TOGETHER", {"cpu": 4})
    reckless = Adam(30.0, SCHEDULE)
    expected = fitted(data_of(5), reckless, batch=5)
    assert max(result.restarts for result in expected.values()) > 0
    for datum_id, result in fitted(data_of(5), reckless, batch=2).items():
        assert_same_bits(result, expected[datum_id])


def test_samples_are_stacked_from_wherever_they_are():
    parts = [replace(samples, mask=torch.ones(len(samples.values))) for _, samples in DATA[:3]]
    stacked = stack_samples(parts, torch.device("cpu"))
    assert torch.equal(stacked.values, torch.stack([part.values for part in parts]))
    elsewhere = [parts[0].map(lambda tensor: tensor.to("meta")), *parts[1:]]
    assert stack_samples(elsewhere, torch.device("meta")).values.shape == stacked.values.shape
