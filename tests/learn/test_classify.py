"""Readers learn what there is to learn, and see no more than they should."""

import numpy as np
import pytest
import torch

from nfscale.errors import CallerError
from nfscale.fields import MLP
from nfscale.learn.classify import Accuracy, classify
from nfscale.learn.readers import READERS, EquivariantReader, Fields
from nfscale.learn.subject import Subject
from nfscale.learn.transforms import Standardizer
from tests.learn.tables import made_table


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    """Rows of three classes, each around a direction of its own."""
    return Subject.of(made_table(tmp_path_factory.mktemp("made") / "run", 300, spread=0.01))


@pytest.mark.parametrize("reader", READERS)
def test_a_reader_learns_classes_that_are_apart(subject, reader):
    (found,) = classify(subject, [reader], folds=2, epochs_scale=0.4)
    assert found.rows == 294, "rows that diverged are not read"
    assert found.confusion.sum() == 294
    assert found.value > (0.5 if reader == "equivariant" else 0.9)
    low, high = found.interval
    assert low < found.value <= high


def test_one_fold_is_the_tables_own_test_split(subject):
    (found,) = classify(subject, ["mlp"], folds=1, epochs_scale=0.4)
    assert found.rows == sum(name == "test" for name in subject.splits) == 54
    assert found.value > 0.9
    wrong = torch.where(torch.tensor([name == "test" for name in subject.splits]), subject.ranks, 0)
    (unseen,) = classify(Subject(**vars(subject) | {"ranks": wrong}), ["mlp"], folds=1, epochs_scale=0.4)
    assert unseen.confusion[:, 1:].sum() == 0, "no model has seen a test row"
    for splits in ([None] * len(subject), ["test"] * len(subject)):
        with pytest.raises(CallerError, match="no rows for testing beside others"):
            classify(Subject(**vars(subject) | {"splits": splits}), ["mlp"], folds=1)


def test_labels_without_a_meaning_are_at_chance(subject):
    shuffled = torch.from_numpy(np.random.default_rng(0).permutation(subject.ranks.numpy()))
    (found,) = classify(Subject(**vars(subject) | {"ranks": shuffled}), ["mlp"], folds=2, epochs_scale=0.3)
    assert found.value < 0.45


def test_the_interval_is_wilsons():
    """Against the values of Brown, Cai & DasGupta (2001) for 8 of 10."""
    low, high = Accuracy("x", 8, 10, 0, np.zeros((2, 2))).interval
    assert (low, high) == (pytest.approx(0.490, abs=1e-3), pytest.approx(0.943, abs=1e-3))


def test_several_fields_of_a_datum_fall_into_one_fold(subject):
    ids = [f"{name}#{k}" if k else name for name in subject.ids[:50] for k in range(3)]
    fold = Subject(**vars(subject) | {"ids": ids}).fold(0, 5).reshape(50, 3)
    assert (fold == fold[:, :1]).all()
    assert len(fold.unique()) == 5


def test_splits_are_the_tables_own_where_it_has_them(subject):
    parts = subject.split(0)
    assert {subject.splits[i] for i in parts["train"]} == {"train"}
    assert {subject.splits[i] for i in parts["test"]} == {"test"}
    without = Subject(**vars(subject) | {"splits": [None] * len(subject)}).split(0)
    assert sorted(torch.cat(list(without.values())).tolist()) == list(range(len(subject)))


def permuted(layout, rows):
    """Neurons of the hidden layers in another order: the same function."""
    params = {name: tensor.clone() for name, tensor in layout.unravel(rows).items()}
    for layer in (0, 1):
        order = torch.randperm(params[f"layers.{layer}.bias"].shape[1])
        params[f"layers.{layer}.weight"] = params[f"layers.{layer}.weight"][:, order]
        params[f"layers.{layer}.bias"] = params[f"layers.{layer}.bias"][:, order]
        params[f"layers.{layer + 1}.weight"] = params[f"layers.{layer + 1}.weight"][:, :, order]
    return layout.ravel(params)


def test_the_equivariant_reader_does_not_see_the_order_of_neurons():
    field = MLP(2, 3, 8, 2)
    rows = torch.randn(4, field.layout.size)
    model = EquivariantReader(field.layout, 5).eval()
    assert torch.allclose(model(permuted(field.layout, rows)), model(rows), atol=1e-5)
    assert not torch.allclose(model(rows.flip(1)), model(rows), atol=1e-3)
    other = READERS["mlp"](Fields(field, Standardizer.of(rows, field.layout), None, 0.1), 5).eval()
    assert not torch.allclose(other(permuted(field.layout, rows)), other(rows), atol=1e-3)
    with pytest.raises(CallerError, match="equivariant reader takes MLPs"):
        EquivariantReader(MLP(2, 1, 8, 2, activation="gabor").layout, 5)


def test_the_probe_reads_what_the_field_says(subject):
    """Its gradient reaches the coordinates, and it sees functions: permuting neurons changes nothing."""
    table = subject.table
    standardizer = Standardizer.of(subject.weights, table.layout)
    model = READERS["probe"](Fields(table.field, standardizer, torch.from_numpy(table.theta0), 0.1), 3).eval()
    raw = subject.raw(subject.weights[:4])
    moved = permuted(table.layout, raw) - torch.from_numpy(table.theta0)
    assert torch.allclose(model(standardizer(moved)), model(standardizer(subject.weights[:4])), atol=1e-3)
    model(standardizer(subject.weights[:4])).sum().backward()
    assert model.coordinates.grad.abs().max() > 0


def test_what_cannot_be_classified_is_the_callers_mistake(subject):
    with pytest.raises(CallerError, match="unknown readers"):
        classify(subject, ["gpt"])
    alone = Subject(**vars(subject) | {"labels": type(subject.labels)(["cat"])})
    with pytest.raises(CallerError, match="has 1 labels"):
        classify(alone, ["mlp"])
