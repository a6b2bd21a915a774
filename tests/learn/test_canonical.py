"""Symmetries keep the function, and canonical forms undo them."""

import math

import pytest
import torch

from nfscale.errors import CallerError
from nfscale.fields import MLP
from nfscale.learn.canonical import SYMMETRIES, aligned, canonical, largest_change, scrambled
from nfscale.rng import as_tensor


def drawn(field, count):
    return field.layout.ravel(field.init(as_tensor(list(range(count))))).double()


@pytest.mark.parametrize("activation", SYMMETRIES)
def test_a_canonical_form_is_the_same_function_and_undoes_the_symmetries(activation):
    field = MLP(2, 3, 12, 3, activation=activation)
    rows = drawn(field, 5)
    other = scrambled(field, rows, torch.Generator().manual_seed(0))
    assert (other - rows).abs().max() > 0.1
    assert largest_change(field, rows, other) < 1e-9
    assert largest_change(field, rows, canonical(field, rows)) < 1e-9
    assert torch.allclose(canonical(field, rows), canonical(field, other), atol=1e-9)
    assert largest_change(field, rows, rows + 0.01) > 1e-3, "the check can fail"


def test_phases_of_sines_are_undone():
    field = MLP(2, 1, 8, 2)
    rows = drawn(field, 4)
    params = {name: tensor.clone() for name, tensor in field.layout.unravel(rows).items()}
    params["layers.1.bias"][:, ::2] += 3 * math.pi / field.omega_hidden
    params["layers.2.weight"][:, :, ::2] *= -1
    turned = field.layout.ravel(params)
    assert largest_change(field, rows, turned) < 1e-9
    assert torch.allclose(canonical(field, rows), canonical(field, turned), atol=1e-9)


@pytest.mark.parametrize("activation", SYMMETRIES)
def test_alignment_finds_the_reference_again(activation):
    field = MLP(2, 2, 12, 2, activation=activation)
    (reference,) = drawn(field, 1)
    near = reference + 0.001 * torch.randn((3, field.layout.size), generator=torch.Generator().manual_seed(1))
    other = scrambled(field, near, torch.Generator().manual_seed(2))
    assert (other - reference).norm() > 100 * (near - reference).norm()
    found = aligned(field, other, reference)
    assert torch.allclose(found, near, atol=1e-9)
    assert largest_change(field, other, found) < 1e-9


def test_alignment_brings_independent_fields_nearer():
    field = MLP(2, 1, 16, 2)
    rows = drawn(field, 6)
    found = aligned(field, rows[1:], rows[0])
    assert largest_change(field, rows[1:], found) < 1e-9
    assert ((found - rows[0]).norm(dim=1) < (rows[1:] - rows[0]).norm(dim=1)).all()


def test_what_has_other_symmetries_is_refused():
    with pytest.raises(CallerError, match="not of complex_gabor"):
        canonical(MLP(2, 1, 8, 2, activation="complex_gabor"), torch.zeros(1, 1))
