"""Transforms have exact inverses, and statistics are those of the training rows."""

import numpy as np
import pytest
import torch

from nfscale.errors import CallerError
from nfscale.fields import MLP, HashGrid
from nfscale.learn import Rows, Standardizer, Tokens
from nfscale.learn.transforms import dropped, noise
from tests.learn.tables import made_table

FIELDS = [
    MLP(2, 3, 16, 2),
    MLP(3, 1, 8, 3, activation="gabor"),
    MLP(2, 1, 8, 2, activation="complex_gabor"),
    HashGrid(2, 1),
]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return made_table(tmp_path_factory.mktemp("made") / "run", 230)


@pytest.mark.parametrize("per", ["scalar", "layer"])
def test_statistics_are_of_the_training_rows_alone(table, per):
    train = table.weights(Rows(split="train").expression) - table.theta0
    found = Standardizer.of_table(table, Rows(split="train"), per)
    assert np.allclose(found.mean, train.mean(0), atol=1e-6)
    standard = found(torch.from_numpy(train))
    if per == "scalar":
        assert (standard.std(0) - 1).abs().max() < 0.01
    for entry in table.layout.entries:
        assert standard[:, entry.offset : entry.offset + entry.size].square().mean() == pytest.approx(1, rel=1e-3)
    assert torch.allclose(found.inverse(standard), torch.from_numpy(train), atol=1e-6)
    in_memory = Standardizer.of(torch.from_numpy(train), table.layout, per)
    assert torch.allclose(in_memory.deviation, found.deviation, rtol=1e-5)


def test_statistics_are_kept_in_the_run_folder(table):
    found = Standardizer.of_table(table, Rows(split="train"))
    found.save(table.folder, "learn/statistics.npz")
    read = Standardizer.load(table.folder, "learn/statistics.npz")
    assert torch.equal(read.mean, found.mean)
    assert torch.equal(read.deviation, found.deviation)
    with pytest.raises(CallerError, match="is missing"):
        Standardizer.load(table.folder, "learn/other.npz")
    with pytest.raises(CallerError, match="statistics of 0 rows"):
        Standardizer.of_table(table, Rows(split="nobody"))


@pytest.mark.parametrize("per", ["neuron", "layer"])
@pytest.mark.parametrize("field", FIELDS, ids=lambda field: getattr(field, "activation", "grid"))
def test_tokens_hold_every_weight_once(field, per):
    tokens = Tokens(field.layout, per)
    rows = torch.randn(3, field.layout.size)
    cut = tokens(rows)
    assert cut.shape == (3, len(tokens), tokens.width)
    assert torch.equal(tokens.inverse(cut), rows)
    assert int(tokens.mask.sum()) == field.layout.size
    assert (cut * (1 - tokens.mask) == 0).all()
    assert torch.equal(tokens.inverse(cut + 7 * (1 - tokens.mask)), rows), "what fills a token up is dropped"


def test_a_neurons_token_is_its_row_and_its_bias():
    field = MLP(2, 1, 4, 2)
    rows = torch.randn(1, field.layout.size)
    params = field.layout.unravel(rows)
    tokens = Tokens(field.layout)
    assert tokens.places.tolist() == [[0, i] for i in range(4)] + [[1, i] for i in range(4)] + [[2, 0]]
    of_third = tokens(rows)[0, 6]
    assert torch.equal(of_third, torch.cat([params["layers.1.weight"][0, 2], params["layers.1.bias"][0, 2:3]]))
    assert len(Tokens(field.layout, "layer")) == 3


def test_augmentations_are_of_the_size_asked_for():
    rows, generator = torch.ones(200, 50), torch.Generator().manual_seed(0)
    assert (noise(rows, 0.3, generator) - 1).std().item() == pytest.approx(0.3, rel=0.05)
    assert (dropped(rows, 0.25, generator) == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
