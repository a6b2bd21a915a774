"""Multiplicative filter networks against the formula of their description, and how they are drawn."""

import math

import numpy as np
import pytest
import torch

from nfscale.fields import MultiplicativeFilters
from nfscale.rng import as_tensor, datum_seed


def by_the_formula(field: MultiplicativeFilters, params: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    def filtered(index: int) -> np.ndarray:
        of = f"filters.{index}."
        wave = np.sin(params[of + "frequency"] @ x + params[of + "phase"])
        if field.filter == "gabor":
            squares = ((x - params[of + "center"]) ** 2).sum(axis=1)
            wave = wave * np.exp(-params[of + "sharpness"] / 2 * squares)
        return wave

    hidden = filtered(0)
    for index in range(field.depth - 1):
        hidden = (params[f"layers.{index}.weight"] @ hidden + params[f"layers.{index}.bias"]) * filtered(index + 1)
    last = field.depth - 1
    return params[f"layers.{last}.weight"] @ hidden + params[f"layers.{last}.bias"]


@pytest.mark.parametrize("kind", ["fourier", "gabor"])
@pytest.mark.parametrize(("dimensions", "depth"), [(1, 1), (2, 3), (3, 2)])
def test_values_are_those_of_the_formula(kind, dimensions, depth):
    field = MultiplicativeFilters(dimensions, 2, width=5, depth=depth, filter=kind, input_scale=8.0)
    params = field.init(as_tensor([3, 4]))
    points = torch.rand(2, 9, dimensions, generator=torch.Generator().manual_seed(0)) * 2 - 1
    values = field.apply(params, points)
    for index in range(2):
        own = {name: tensor[index].double().numpy() for name, tensor in params.items()}
        expected = [by_the_formula(field, own, x) for x in points[index].double().numpy()]
        np.testing.assert_allclose(values[index].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_windows_are_drawn_from_a_gamma_distribution():
    field = MultiplicativeFilters(2, 1, width=64, depth=3, filter="gabor")
    drawn = field.init(as_tensor([datum_seed(0, str(n)) for n in range(400)]))["filters.1.sharpness"]
    assert float(drawn.min()) >= 0
    assert float(drawn.mean()) == pytest.approx(2, abs=0.05)  # Gamma(6 / 3, 1)
    assert float(drawn.var()) == pytest.approx(2, abs=0.1)
    below = float((drawn < 1).double().mean())
    assert below == pytest.approx(1 - 2 / math.e, abs=0.01)  # its distribution function at 1


def test_an_unknown_filter_is_refused():
    with pytest.raises(ValueError, match="unknown filter 'sinc'; known: fourier, gabor"):
        MultiplicativeFilters(2, 1, filter="sinc")  # type: ignore[arg-type]
