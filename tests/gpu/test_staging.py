"""Data that are copied to the device by their reader while it computes are the data themselves."""

import threading

import pytest
import torch

from nfscale import MLP, Adam, Image, Schedule, Stop, fit
from nfscale.ahead import ahead
from nfscale.engine import loop, staging
from nfscale.engine.memory import measured_field_bytes
from nfscale.engine.staging import Staged
from nfscale.signals import Samples
from tests.engine.fits import smooth_image

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device on this machine"),
]

SIGNAL = Image(1)
FIELD = MLP(2, 1, width=32, depth=2, omega_0=10.0, omega_hidden=10.0)
ADAM = Adam(2e-3, Schedule("cosine", total_steps=100))


def data() -> list[tuple[str, Samples]]:
    """Of two kinds."""
    return [(f"{n}-{rows}", SIGNAL.samples(smooth_image(n, rows, 16))) for rows in (16, 20) for n in range(23)]


def fitted(coming, batch: int | str, samples: int | str) -> dict[str, torch.Tensor]:
    """Weights by id."""
    options = {"optimizer": ADAM, "stop": Stop(100, check_every=20), "seed": 0, "device": "cuda", "step": "torch"}
    found = fit(FIELD, SIGNAL, coming, batch=batch, samples=samples, **options)
    return {one.id: one.weights for one in found}


def staged_in_a_thread():
    stage = staging.staging("cuda")
    return ahead(((datum_id, stage(part)) for datum_id, part in data()), lambda datum: datum[1].host.bytes)


@pytest.mark.parametrize("samples", ["full", 64])
def test_fits_of_staged_data_are_the_same_bits(samples):
    directly, staged = fitted(data(), 4, samples), fitted(staged_in_a_thread(), 4, samples)
    assert staged.keys() == directly.keys()
    for datum_id, weights in directly.items():
        assert torch.equal(staged[datum_id], weights)


def test_what_a_field_takes_is_measured_without_what_its_reader_allocates(monkeypatch):
    measured = []

    def noted(*given):
        measured.append(measured_field_bytes(*given))
        return measured[-1]

    monkeypatch.setattr(loop, "measured_field_bytes", noted)
    fitted(data(), "auto", 64)
    fitted(staged_in_a_thread(), "auto", 64)
    first, second, *staged = (one.total for one in measured)
    assert staged == pytest.approx([first, second], rel=0.1)


def test_what_arrives_is_what_was_read_and_on_the_device():
    stage = staging.staging()
    made: list[Staged] = []
    read = [part for _, part in data()] * 20
    reader = threading.Thread(target=lambda: made.extend(stage(part) for part in read))
    reader.start()
    reader.join()
    for part, staged in zip(read, made, strict=True):
        there = staged.arrived()
        assert there.values.is_cuda
        assert staged.kind == part.kind
        assert torch.equal(there.values.cpu(), part.values)
        assert torch.equal(there.coordinates.cpu(), part.coordinates)


def test_where_there_is_no_room_samples_stay_where_they_are(monkeypatch):
    def full(*given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Staged, "__init__", full)
    (_, part), *_ = data()
    assert staging.staging("cuda")(part) is part
