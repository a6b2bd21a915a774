"""The batch size comes from what torch allocates in two steps, and is halved where that was too little."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nfscale.engine import Calibration, loop
from nfscale.engine.batch import MINIMUM_SLOTS, Batch
from nfscale.engine.memory import (
    FieldBytes,
    _peak_bytes,
    batch_slots,
    estimated_field_bytes,
    measured_field_bytes,
)
from nfscale.engine.sampling import Sampler
from nfscale.engine.step import stack_samples
from nfscale.fields import MLP, theta0_of
from nfscale.optim import ESGD, Adam
from nfscale.rng import as_tensor
from nfscale.signals import Image, Samples
from tests.engine.fits import (
    ADAM,
    DATA,
    ESGD_OWN,
    ESGD_SHARED,
    FIELD,
    RAYS,
    SCHEDULE,
    assert_same_bits,
    data_of,
    fitted,
    ray_data,
)

CPU = torch.device("cpu")


# What is allocated


def test_a_storage_counts_once_and_as_long_as_anything_uses_it():
    def peak_of(function) -> int:
        with _peak_bytes(CPU) as peak:
            function()
        return peak()

    def views():
        whole = torch.zeros(1000)
        return whole[10:], whole.view(10, 100).mT, whole.expand(5, -1)

    def one_after_the_other():
        for _ in range(5):
            torch.zeros(1000)

    def kept_by_the_graph():
        value = torch.zeros(1000, requires_grad=True)
        for _ in range(4):
            value = value.sin()  # whose gradient needs what goes in
        return value

    def kept_by_nothing():
        value = torch.zeros(1000)
        for _ in range(4):
            value = value.sin()
        return value

    assert peak_of(views) == 4000
    assert peak_of(one_after_the_other) == 4000
    assert peak_of(kept_by_the_graph) == 5 * 4000
    assert peak_of(kept_by_nothing) == 2 * 4000


def new_batches(field: MLP, optimizer, signal, datum: Samples, samples: int | str):
    """What makes a batch of so many fields of one datum."""
    count = len(datum.values)
    sampler = Sampler(count, count if samples == "full" else samples)
    calibration = Calibration(torch.ones(1, field.layout.size), torch.ones(1), 10)

    def new_batch(slots: int) -> Batch:
        rows, seeds = theta0_of(field, 0).repeat(slots, 1), as_tensor(list(range(slots)))
        stacked = stack_samples([datum] * slots, CPU)
        return Batch(field, signal, optimizer, sampler, calibration, rows, stacked, seeds, [None] * slots)

    return new_batch, sampler


@pytest.mark.parametrize("optimizer", [Adam(1e-3, SCHEDULE), ESGD(0.1, SCHEDULE)], ids=["adam", "esgd-shared"])
@pytest.mark.parametrize(
    ("field", "size", "samples"),
    [
        (MLP(2, 3, width=64, depth=4), 64, 256),
        (MLP(2, 3, width=32, depth=2), 8, "full"),
        (MLP(2, 3, width=128, depth=3), 16, "full"),
    ],
    ids=["photos", "digits", "wide"],
)
def test_a_field_takes_the_tensors_that_one_can_count(field, size, samples, optimizer):
    image = np.random.default_rng(0).random((size, size, 3))
    new_batch, sampler = new_batches(field, optimizer, Image(3), Image(3).samples(image), samples)
    found = measured_field_bytes(new_batch, CPU)
    points = min(sampler.per_step, sampler.available)
    activations = 2 * field.depth * field.width * points  # what a sine takes in and gives, kept for the backward pass
    of_the_size_of_params = 8  # params, the best of them, two moments, two gradients, an update and its direction
    counted = 4 * (activations + of_the_size_of_params * field.layout.size)
    assert counted / 2 < found.step < 2 * counted
    idle = 0 if sampler.is_full else 4 * 5 * size**2
    assert found.total == found.step + idle
    estimate = estimated_field_bytes(field, Image(3), sampler)
    assert found.step / 3 < estimate.step < 3 * found.step


def test_points_of_a_sample_and_what_is_checked_and_held_back_count():
    datum = ray_data(1, 13, 9)[0][1]
    plain, whole = (
        measured_field_bytes(new_batches(FIELD, ADAM, RAYS, part, "full")[0], CPU)
        for part in (replace(datum, check=None, heldout=None), datum)
    )
    assert whole.step == plain.step == plain.total
    assert whole.total == plain.total + 4 * 5 * (13 + 9)
    activations = 4 * 2 * FIELD.depth * FIELD.width * len(datum.values) * RAYS.points_per_sample
    assert plain.step > activations


def test_curvature_of_a_fields_own_takes_more():
    plain, own = (
        measured_field_bytes(new_batches(FIELD, optimizer, Image(1), DATA[0][1], "full")[0], CPU)
        for optimizer in (ESGD_SHARED, ESGD_OWN)
    )
    assert own.step > 1.3 * plain.step


# What follows from it


@pytest.mark.parametrize(
    ("total", "step", "slots"),
    [
        (1 << 20, 1 << 20, 12),
        (6 << 20, 1 << 20, 12),
        (1 << 28, 1 << 20, 4),
        (1 << 40, 1 << 40, MINIMUM_SLOTS),
        (100, 100, 1024),
    ],
)
def test_slots_fill_the_cache_and_no_more_than_their_share_of_the_memory(total, step, slots):
    assert batch_slots(FieldBytes(total, step), CPU) == slots


@pytest.mark.parametrize("optimizer", [ADAM, ESGD_SHARED, ESGD_OWN], ids=["adam", "esgd-shared", "esgd-per_field"])
def test_probing_and_not_probing_give_the_same_bits(optimizer, monkeypatch):
    probed = fitted(DATA, optimizer, 11)
    monkeypatch.setattr(loop, "measured_field_bytes", lambda new_batch, device: None)
    for datum_id, result in fitted(DATA, optimizer, 11).items():
        assert_same_bits(result, probed[datum_id])


def test_each_kind_is_probed_once_and_a_given_batch_size_is_taken_as_it_is(monkeypatch):
    probes = []

    def counted(new_batch, device):
        probes.append(len(new_batch(3).slots))
        return measured_field_bytes(new_batch, device)

    monkeypatch.setattr(loop, "measured_field_bytes", counted)
    sizes = [data_of(3), data_of(3, 5, 8)]
    data = [datum for row in zip(*sizes, strict=True) for datum in row]
    fitted(data)
    assert probes == [3, 3]
    fitted(data, batch=2)
    assert probes == [3, 3]
    known = {}
    for _ in range(2):
        fitted(data, capacities=known)
        assert probes == [3, 3, 3, 3], "what one fit has found, the next one takes"
    assert known.keys() == {samples.kind for _, samples in data}


# Where memory ends


@pytest.mark.parametrize("batch", [9, "auto"])
def test_a_batch_that_does_not_fit_into_memory_is_halved(monkeypatch, batch):
    """Results are those of a machine with more memory, bit for bit; there is too little for the probe itself."""
    data = ray_data(9)
    expected = fitted(data, ADAM, 11, signal=RAYS)
    advance, sizes = Batch.advance, []

    def cramped(batch, count):
        sizes.append(len(batch.slots))
        if len(batch.slots) > 3:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")
        advance(batch, count)

    monkeypatch.setattr(Batch, "advance", cramped)
    found = fitted(data, ADAM, 11, signal=RAYS, batch=batch)
    assert sizes[:5] == ([9, 4, 2, 2, 2] if batch == 9 else [2, 4, 9, 4, 2])
    assert max(sizes[5:]) == 2
    assert found.keys() == expected.keys()
    for datum_id, result in expected.items():
        assert_same_bits(found[datum_id], result)


@pytest.mark.parametrize("batch", [9, "auto"])
def test_another_error_of_a_batch_is_not_taken_for_a_lack_of_memory(monkeypatch, batch):
    def broken(batch, count):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(Batch, "advance", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        fitted(DATA, ADAM, 11, batch=batch)
