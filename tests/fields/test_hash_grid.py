"""Hash grids against the formula of their description, one point and one corner at a time."""

import math
from itertools import product

import numpy as np
import pytest
import torch

from nfscale.fields import HashGrid
from nfscale.rng import as_tensor


def by_the_formula(field: HashGrid, params: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """The values of one field at one point, in float64."""
    said = field.forward_description()
    keys, parts = said["keys"], []
    for level, cells in enumerate(said["cells"]):
        p = np.clip((x + 1) / 2 * cells, 0, cells)
        low = np.minimum(np.floor(p), cells - 1).astype(int)
        grid, total = params[f"grids.{level}"], np.zeros(keys["features"])
        for step in product((0, 1), repeat=len(x)):
            corner = low + np.array(step)
            if (cells + 1) ** len(x) <= keys["table_size"]:
                index = sum(int(c) * (cells + 1) ** axis for axis, c in enumerate(corner))
            else:
                index = 0
                for c, prime in zip(corner, said["primes"], strict=True):
                    index ^= int(c) * prime
                index %= keys["table_size"]
            total += math.prod(1 - np.abs(p - corner)) * grid[index]
        parts.append(total)
    hidden = np.concatenate(parts)
    for index in range(field.depth + 1):
        hidden = params[f"layers.{index}.weight"] @ hidden + params[f"layers.{index}.bias"]
        hidden = np.maximum(hidden, 0) if index < field.depth else hidden
    return hidden


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("table_size", [16, 1024])
def test_values_are_those_of_the_formula(dimensions, table_size):
    field = HashGrid(dimensions, 2, width=5, depth=2, levels=3, coarsest=2, finest=9, table_size=table_size)
    params = field.init(as_tensor([3, 4]))
    for level in range(field.levels):
        params[f"grids.{level}"].mul_(1e4)  # as large as what they are added to
    points = torch.rand(2, 20, dimensions, generator=torch.Generator().manual_seed(0)) * 2 - 1
    points[:, 0], points[:, 1], points[:, 2] = -1, 1, 0
    values = field.apply(params, points)
    for index in range(2):
        own = {name: tensor[index].double().numpy() for name, tensor in params.items()}
        expected = [by_the_formula(field, own, x) for x in points[index].double().numpy()]
        np.testing.assert_allclose(values[index].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_levels_grow_by_one_factor_and_small_ones_have_a_vector_per_corner():
    field = HashGrid(2, 1, levels=5, coarsest=4, finest=64, table_size=1024)
    assert field.cells == (4, 8, 16, 32, 64)
    sizes = [entry.shape[0] for entry in field.layout.entries[:5]]
    assert sizes == [25, 81, 289, 1024, 1024]


def test_keys_that_cannot_be_are_refused():
    for keys, why in (
        ({"table_size": 100}, "table_size is a power of two, got 100"),
        ({"finest": 2}, "finest is at least coarsest=4, got 2"),
        ({"levels": 0}, "levels is above 0, got 0"),
    ):
        with pytest.raises(ValueError, match=why):
            HashGrid(2, 1, **keys)
