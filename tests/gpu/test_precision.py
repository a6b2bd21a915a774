"""Products in less than float32 on a CUDA device: gradients against float64, steps and fits against float32."""

import pytest
import torch

from nfscale import ESGD, MLP, Adam, Image, Schedule, Stop, fit
from nfscale.engine.dispatch import chosen
from nfscale.engine.handwritten import handwritten_gradient, handwritten_gradient_and_hvp
from nfscale.engine.products import _sums_wide
from nfscale.engine.step import plain_gradient, plain_gradient_and_hvp
from nfscale.rng import Stream, as_tensor, datum_seed, rademacher
from nfscale.signals import Samples
from tests.engine.fits import smooth_image

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device on this machine"),
]

CUDA = torch.device("cuda")
FIELDS = 5
SEEDS = as_tensor([datum_seed(0, str(n)) for n in range(FIELDS)])
SWITCH = torch.backends.cuda.matmul
BOUND = 4e-3
"""Of the length of a gradient: 11 bits of each operand are 5e-4."""

ROUNDING_DB = 58.9
"""Of 8 bits; beyond it fits in float32 differ from each other by decibels, too."""


def problem(field: MLP, count: int, masked: bool) -> tuple[torch.Tensor, Samples]:
    draw = torch.Generator().manual_seed(0)
    coordinates = torch.rand(FIELDS, count, field.dimensions, generator=draw) * 2 - 1
    values = torch.rand(FIELDS, count, field.channels, generator=draw) - 0.5
    mask = torch.rand(FIELDS, count, generator=draw) if masked else None
    return field.layout.ravel(field.init(SEEDS)), Samples(coordinates, values, mask)


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found.cpu().double() - expected).norm(dim=1) / expected.norm(dim=1)).max())


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize(("width", "count"), [(13, 7), (64, 1000), (256, 70_000)], ids=["odd", "usual", "tiles"])
@pytest.mark.parametrize("precision", ["tf32", "float16"])
def test_gradients_are_those_of_float64_to_11_bits(precision, width, count, masked):
    field, signal = MLP(2, 3, width=width, depth=3), Image(3)
    rows, samples = problem(field, count, masked)
    exact = plain_gradient(field, signal, rows.double(), samples.map(torch.Tensor.double))
    on_device = samples.map(torch.Tensor.cuda)
    before = SWITCH.fp32_precision
    losses, gradients = handwritten_gradient(field, signal, rows.cuda(), on_device, precision)
    float32 = handwritten_gradient(field, signal, rows.cuda(), on_device)[1]
    assert SWITCH.fp32_precision == before
    torch.testing.assert_close(losses.cpu().double(), exact[0], rtol=BOUND, atol=0)
    assert error_of(gradients, exact[1]) < BOUND
    if width > 13:  # of the smallest, the library may have none but float32
        assert error_of(gradients, exact[1]) > 3 * error_of(float32, exact[1]), "nothing was rounded"


def test_products_with_the_hessian_in_tf32_are_those_of_float64_to_11_bits():
    field, signal = MLP(2, 3, width=64, depth=2), Image(3)
    rows, samples = problem(field, 1000, False)
    probe = rademacher(SEEDS, Stream.PROBE, 0, field.layout.size)
    doubles = (rows.double(), samples.map(torch.Tensor.double), probe.double())
    exact = plain_gradient_and_hvp(field, signal, *doubles)
    on_device = (rows.cuda(), samples.map(torch.Tensor.cuda), probe.cuda())
    found = handwritten_gradient_and_hvp(field, signal, *on_device, "tf32")
    assert error_of(found[1], exact[1]) < BOUND
    assert error_of(found[2], exact[2]) < 3 * BOUND


def test_this_torch_has_products_of_float16_with_float32_sums():
    """Where it has none, operands are widened again: right, but no faster."""
    assert _sums_wide(CUDA)


@pytest.mark.parametrize("samples", ["full", 64])
@pytest.mark.parametrize(
    "optimizer",
    [
        Adam(2e-3, Schedule("cosine", total_steps=200, warmup=20)),
        ESGD(0.05, Schedule("cosine", total_steps=200, warmup=20), curvature="per_field"),
    ],
    ids=["adam", "esgd-per_field"],
)
@pytest.mark.parametrize(
    ("step", "precision"), [("torch", "tf32"), ("torch", "float16"), ("fused", "float16"), ("fused", "float32")]
)
def test_a_fit_has_the_quality_of_one_in_float32(step, precision, optimizer, samples):
    field, signal = MLP(2, 1, width=32, depth=3), Image(1)
    data = [(str(n), signal.samples(smooth_image(n, 16, 16))) for n in range(6)]
    options = {"optimizer": optimizer, "stop": Stop(200, check_every=50), "seed": 0, "samples": samples, "batch": 4}
    found = {}
    for name, kind in (("torch", "float32"), (step, precision)):
        fitted = fit(field, signal, data, device="cuda", step=name, precision=kind, **options)
        found[name, kind] = {one.id: one for one in fitted}
    for datum_id, expected in found["torch", "float32"].items():
        ours = found[step, precision][datum_id]
        assert ours.quality > ours.history_quality[0] + 10
        assert min(ours.quality, ROUNDING_DB) == pytest.approx(min(expected.quality, ROUNDING_DB), abs=0.5)


def test_auto_takes_what_has_the_precision():
    adam, narrow, wide = Adam(1e-3, Schedule("constant")), MLP(2, 1, width=32, depth=2), MLP(2, 1, width=100, depth=2)
    for precision, steps in (
        ("float32", ("fused", "torch")),
        ("float16", ("fused", "torch")),
        ("tf32", ("torch", "torch")),
    ):
        for field, name in zip((narrow, wide), steps, strict=True):
            assert chosen("auto", CUDA, field, Image(1), adam, precision).name == name
