"""Products in less than float32: what of it does not need a GPU. Operands are rounded here as they are there."""

import pytest
import torch

from nfscale.engine.handwritten import handwritten_gradient, handwritten_gradient_and_hvp, handwritten_steps
from nfscale.engine.handwritten_passes import Passes
from nfscale.engine.products import boosts, products_of
from nfscale.engine.sampling import Sampler
from nfscale.engine.step import plain_gradient
from nfscale.fields import MLP
from nfscale.optim import Adam, Schedule
from nfscale.signals import Image, Samples
from tests.engine.test_handwritten import random_samples, rows_and_probe, seeds_of

FLOAT16_BOUND = 4e-3
SWITCH = torch.backends.cuda.matmul


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize(
    ("width", "depth", "channels", "count"), [(13, 1, 1, 5), (32, 3, 3, 200), (64, 2, 3, 784), (256, 2, 1, 2000)]
)
def test_gradients_with_float16_operands_are_those_of_float64_to_11_bits(width, depth, channels, count, masked):
    """The widest field is cut into tiles."""
    field, signal = MLP(2, channels, width=width, depth=depth), Image(channels)
    rows, _ = rows_and_probe(field, 3, torch.float32)
    samples = random_samples(2, channels, count, masked, 3, torch.float32)
    losses, gradients = handwritten_gradient(field, signal, rows, samples, "float16")
    exact = plain_gradient(field, signal, rows.double(), samples.map(torch.Tensor.double))
    assert gradients.dtype == torch.float32
    torch.testing.assert_close(losses.double(), exact[0], rtol=FLOAT16_BOUND, atol=0)
    assert error_of(gradients, exact[1]) < FLOAT16_BOUND
    if depth > 1:
        float32 = handwritten_gradient(field, signal, rows, samples)[1]
        assert error_of(gradients, exact[1]) > 10 * error_of(float32, exact[1]), "nothing was rounded"


def test_the_first_layer_is_float32():
    """A phase of some thousand turns has no bit left after 11."""
    field = MLP(2, 1, width=32, depth=1, omega_0=3e3)
    rows, _ = rows_and_probe(field, 2, torch.float32)
    samples = random_samples(2, 1, 100, False, 2, torch.float32)
    exact = plain_gradient(field, Image(1), rows, samples)[1]
    assert error_of(handwritten_gradient(field, Image(1), rows, samples, "float16")[1], exact) < FLOAT16_BOUND


@pytest.mark.parametrize(("scale", "share"), [(1e4, 1.0), (1.0, 1e4), (1.0, 1e-6), (1e-3, 1.0)])
def test_values_and_masks_of_any_size_stay_in_the_range_of_float16(scale, share):
    """The largest is 65,504, the smallest normal one 6e-5, and a share of the mean of so many samples less."""
    field, signal = MLP(2, 1, width=16, depth=2), Image(1)
    rows, _ = rows_and_probe(field, 2, torch.float32)
    samples = random_samples(2, 1, 3000, True, 2, torch.float32)
    assert samples.mask is not None
    samples = Samples(samples.coordinates, scale * samples.values, share * samples.mask)
    found = handwritten_gradient(field, signal, rows, samples, "float16")[1]
    exact = plain_gradient(field, signal, rows.double(), samples.map(torch.Tensor.double))[1]
    assert error_of(found, exact) < FLOAT16_BOUND


def test_boosts_are_powers_of_two_of_each_field_alone():
    values = torch.tensor([[[0.1], [0.2]], [[300.0], [-5.0]], [[0.0], [0.0]]])
    together = boosts(values, 1 / 1000)
    assert together.shape == (3, 1)
    assert (torch.frexp(together).mantissa == 0.5).all()
    slopes = 2 * values.abs().amax(dim=(1, 2)).clamp(min=1) / 1000 * together[:, 0]
    assert ((slopes >= 2**7) & (slopes < 2**8)).all()
    for field in range(3):
        assert torch.equal(boosts(values[[field]], 1 / 1000), together[[field]])


def test_no_bit_depends_on_the_other_fields():
    field, signal = MLP(2, 3, width=24, depth=3), Image(3)
    rows, _ = rows_and_probe(field, 7, torch.float32)
    samples = random_samples(2, 3, 100, True, 7, torch.float32)
    together = handwritten_gradient(field, signal, rows, samples, "float16")
    for some in ([3], [6, 1], [5, 4, 3, 2, 0]):
        part = samples.map(lambda tensor, some=some: tensor[some])
        found = handwritten_gradient(field, signal, rows[some], part, "float16")
        assert all(torch.equal(ours, theirs[some]) for ours, theirs in zip(found, together, strict=True))


@pytest.mark.parametrize("per_step", [100, 16])
def test_steps_with_float16_operands_are_near_those_of_float32(per_step):
    field, adam = MLP(2, 1, width=32, depth=2, omega_0=10.0, omega_hidden=10.0), Adam(1e-3, Schedule("constant"))
    found = []
    for precision in ("float32", "float16"):
        rows, _ = rows_and_probe(field, 4, torch.float32)
        samples = random_samples(2, 1, 100, False, 4, torch.float32)
        steps, rate, state = torch.zeros(4, dtype=torch.int64), torch.ones(4), adam.init({"rows": rows})
        sampler, fields = Sampler(100, per_step), [0, 1, 3]
        places = (field, adam, None, sampler, rows, state, samples, seeds_of(4), steps, rate, 20, fields)
        handwritten_steps(*places, precision=precision)
        found.append(rows)
    start, _ = rows_and_probe(field, 4, torch.float32)
    assert torch.equal(found[1][2], start[2])
    moved = found[0] - start
    assert 0 < float((found[1] - found[0]).norm()) < 0.05 * float(moved.norm())


# tf32: the switch is the process's


def test_the_switch_is_on_for_our_products_alone_and_is_put_back(monkeypatch):
    seen = []
    product = torch.Tensor.baddbmm_

    def watched(*args, **keys):
        seen.append(SWITCH.fp32_precision)
        return product(*args, **keys)

    monkeypatch.setattr(torch.Tensor, "baddbmm_", watched)
    before = SWITCH.fp32_precision
    products = products_of("tf32")
    ones = torch.ones(2, 4, 4)
    assert torch.equal(products.add(torch.zeros(2, 4, 4), ones, ones), 4 * ones)
    assert torch.equal(products.affine(torch.ones(2, 1, 4), ones, ones, torch.empty(2, 4, 4), alpha=2), 9 * ones)
    with pytest.raises(RuntimeError):
        products.add(torch.zeros(2, 4, 4), ones, torch.ones(2, 3, 4))
    assert seen == ["tf32", "tf32"]
    assert SWITCH.fp32_precision == before != "tf32"


def test_first_layers_and_checks_are_outside_of_the_switch(monkeypatch):
    """Of the products of a step, those with coordinates, on the way there and back, are float32."""
    seen = {}
    for owner, name in ((torch, "bmm"), (torch, "baddbmm"), (torch.Tensor, "baddbmm_")):
        product = getattr(owner, name)

        def watched(*args, product=product, name=name, **keys):
            operands = [tensor for tensor in args if isinstance(tensor, torch.Tensor)][-2:]
            if operands[0].shape[2] == 1:  # no sum
                return product(*args, **keys)
            of_coordinates = any(3 in tensor.shape[1:] for tensor in operands)
            seen.setdefault((of_coordinates, SWITCH.fp32_precision), []).append(name)
            return product(*args, **keys)

        monkeypatch.setattr(owner, name, watched)
    field = MLP(2, 1, width=32, depth=3)
    rows, probe = rows_and_probe(field, 4, torch.float32)
    samples = random_samples(2, 1, 100, False, 4, torch.float32)
    expected = handwritten_gradient_and_hvp(field, Image(1), rows, samples, probe)
    ordinary, seen = dict(seen), seen
    seen.clear()
    found = handwritten_gradient_and_hvp(field, Image(1), rows, samples, probe, "tf32")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True)), "of a CPU, the same"
    assert {precision for _, precision in ordinary} == {"none"}
    assert set(seen) == {(True, "none"), (False, "tf32")}
    assert len(seen[True, "none"]) == 4


def test_products_with_the_hessian_have_no_float16():
    field = MLP(2, 1, width=16, depth=2)
    rows, probe = rows_and_probe(field, 2, torch.float32)
    samples = random_samples(2, 1, 10, False, 2, torch.float32)
    with pytest.raises(AssertionError, match="the range of derivatives"):
        handwritten_gradient_and_hvp(field, Image(1), rows, samples, probe, "float16")
    assert Passes.__init__.__defaults__ == (False, "float32")
