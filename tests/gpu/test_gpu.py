"""A fit on a CUDA device is the fit on the CPU up to rounding."""

import numpy as np
import pytest
import torch

from nfscale import ESGD, MLP, Adam, Image, Schedule, Stop, calibrate, fit
from nfscale.engine.sampling import Sampler
from nfscale.rng import Stream, as_tensor, datum_seed, rademacher, words

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device on this machine"),
]

SEED = 0
SIGNAL = Image(3)
FIELD = MLP(2, 3, width=32, depth=3, weight_scale=1.0)
STOP = Stop(max_steps=200, check_every=50)
SCHEDULE = Schedule("cosine", total_steps=200, warmup=20)


def smooth_image(number: int) -> np.ndarray:
    """16 x 16 pixels, three random plane waves of low frequency per channel."""
    draw = np.random.default_rng(number)
    y, x = np.mgrid[0:16, 0:16] / 16
    waves = [
        sum(np.sin(2 * np.pi * (draw.uniform(-1, 1) * y + draw.uniform(-1, 1) * x + draw.random())) for _ in range(3))
        for _ in range(3)
    ]
    return (0.5 + np.stack(waves, axis=-1) / 6).astype(np.float32)


DATA = [(f"datum-{number}", SIGNAL.samples(smooth_image(number))) for number in range(6)]
SEEDS = as_tensor([datum_seed(SEED, datum_id) for datum_id, _ in DATA])


@pytest.mark.parametrize("samples", [256, 64])
@pytest.mark.parametrize(
    "optimizer",
    [Adam(2e-3, SCHEDULE), ESGD(0.5, SCHEDULE), ESGD(0.05, SCHEDULE, curvature="per_field")],
    ids=["adam", "esgd-shared", "esgd-per_field"],
)
def test_a_fit_on_the_device_has_the_quality_of_a_fit_on_the_cpu(optimizer, samples):
    options = {"optimizer": optimizer, "stop": STOP, "seed": SEED, "samples": samples}
    if "diagonal" in optimizer.needs:
        options["calibration"] = calibrate(FIELD, SIGNAL, DATA, device="cpu", **options)
    on_cpu, on_cuda = (
        {fitted.id: fitted for fitted in fit(FIELD, SIGNAL, DATA, device=device, batch=4, **options)}
        for device in ("cpu", "cuda")
    )
    assert set(on_cuda) == set(on_cpu) == {datum_id for datum_id, _ in DATA}
    for datum_id, fitted in on_cuda.items():
        assert fitted.weights.device.type == "cpu"
        assert fitted.quality > fitted.history_quality[0] + 10
        assert fitted.quality == pytest.approx(on_cpu[datum_id].quality, abs=0.5)
        assert fitted.result is on_cpu[datum_id].result


def test_random_words_and_samples_are_the_same_bits_on_the_device():
    for draw in (words, rademacher):
        ours = draw(SEEDS.cuda(), Stream.PROBE, torch.arange(6).cuda(), 1000).cpu()
        assert torch.equal(ours, draw(SEEDS, Stream.PROBE, torch.arange(6), 1000))
    sampler, steps = Sampler(250, 64), torch.arange(6) * 3
    assert torch.equal(sampler.positions(SEEDS.cuda(), steps.cuda(), 10).cpu(), sampler.positions(SEEDS, steps, 10))


def test_init_on_the_device_is_init_on_the_cpu():
    ours, theirs = FIELD.init(SEEDS.cuda()), FIELD.init(SEEDS)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor.cpu(), theirs[name], rtol=1e-6, atol=0)
