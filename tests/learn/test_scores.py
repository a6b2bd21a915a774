"""Scores against closed forms and twins, and on samplers whose faults are known."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from sklearn.neighbors import NearestNeighbors

from nfscale.learn.scores import Score, Scorer, baselines, frechet_distance, nearest, precision_recall


def test_the_frechet_distance_is_that_of_the_formula():
    generator = torch.Generator().manual_seed(0)
    one = torch.randn((500, 6), generator=generator) @ torch.randn((6, 6), generator=generator)
    other = torch.randn((400, 6), generator=generator) + 1
    a, b = np.cov(one.numpy().T), np.cov(other.numpy().T)
    gap = np.square(one.mean(0).numpy() - other.mean(0).numpy()).sum()
    assert frechet_distance(one, other) == pytest.approx(gap + np.trace(a + b - 2 * sqrtm(a @ b).real), rel=1e-4)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6)
    shifted = one + torch.tensor([3.0, 0, 0, 0, 0, 0])
    assert frechet_distance(one, shifted) == pytest.approx(9, rel=1e-4)


def test_nearest_neighbours_are_scikit_learns():
    generator = torch.Generator().manual_seed(1)
    rows, among = torch.randn((700, 5), generator=generator), torch.randn((600, 5), generator=generator)
    expected, _ = NearestNeighbors(n_neighbors=3).fit(among).kneighbors(rows)
    assert np.allclose(nearest(rows, among), expected[:, 0], atol=1e-3)
    assert np.allclose(nearest(rows, among, rank=3), expected[:, 2], atol=1e-3)
    itself, _ = NearestNeighbors(n_neighbors=2).fit(among).kneighbors(among)
    assert np.allclose(nearest(among, among, itself=True), itself[:, 1], atol=1e-3)


def test_precision_and_recall_tell_far_from_few():
    generator = torch.Generator().manual_seed(2)
    data = torch.randn((300, 2), generator=generator)
    assert precision_recall(data + 100, data) == (0, 0)
    precision, recall = precision_recall(data[:30] * 0.1, data)  # good ones, all alike
    assert precision == 1
    assert recall < 0.3
    precision, recall = precision_recall(torch.randn((300, 2), generator=generator), data)
    assert min(precision, recall) > 0.7


@pytest.fixture(scope="module")
def scorer():
    """Two classes of 'images', bright above or below, whose weights are the pixels themselves."""
    generator = torch.Generator().manual_seed(3)

    def drawn(count):
        ranks = torch.arange(count) % 2
        pixels = 0.1 * torch.randn((count, 10, 8, 1), generator=generator)
        pixels[ranks == 0, :5] += 0.7
        pixels[ranks == 1, 5:] += 0.7
        return pixels.numpy(), ranks

    data = {name: drawn(count) for name, count in (("train", 300), ("validation", 60), ("test", 60))}
    train = data["train"][0]
    return Scorer(data, torch.from_numpy(train).flatten(1), train, 2), data, drawn


def test_samplers_are_told_apart_by_their_faults(scorer):
    judge, data, drawn = scorer
    assert judge.judge_accuracy > 0.95
    train, ranks = data["train"]

    def score(pixels, of):
        return judge.score("x", torch.from_numpy(pixels).flatten(1), pixels, of)

    good, copied = score(*drawn(300)), score(train, ranks)
    wrong = score(drawn(300)[0], 1 - torch.arange(300) % 2)
    assert good.label_agreement > 0.95
    assert wrong.label_agreement < 0.05
    assert 0.9 < good.novelty_ratio < 1.1
    assert not good.memorises
    assert copied.memorises
    assert copied.copies == 1
    assert copied.novelty_ratio == pytest.approx(0, abs=0.02)
    collapsed = score(np.repeat(drawn(2)[0], 150, axis=0), torch.arange(2).repeat_interleave(150))
    assert collapsed.frechet_distance > 1.5 * good.frechet_distance
    assert collapsed.recall < good.recall / 2


def test_of_two_novelties_the_smaller_counts():
    assert Score("x", 1, 1, 0, 1, 1, novelty_weights=1.2, novelty_data=0.4, copies=0).memorises


def test_baselines_have_the_statistics_that_they_are_named_for():
    generator = torch.Generator().manual_seed(4)
    ranks = torch.arange(400) % 2
    rows = torch.randn((400, 6), generator=generator) @ torch.randn((6, 6), generator=generator) + 5 * ranks[:, None]
    wanted = torch.arange(4000) % 2
    found = baselines(rows, ranks, wanted, components=5, seed=0)
    for name, samples in found.items():
        of_one = samples[wanted == 1]
        assert torch.allclose(of_one.mean(0), rows[ranks == 1].mean(0), atol=0.6), name
    true = torch.cov(rows[ranks == 1].T)
    assert torch.allclose(torch.cov(found["PCA Gaussian"][wanted == 1].T), true, atol=0.15 * float(true.abs().max()))
    per_weight = torch.cov(found["Gaussian per weight"][wanted == 1].T)
    assert torch.allclose(per_weight.diag(), true.diag(), rtol=0.15)
    assert (per_weight - per_weight.diag().diag()).abs().max() < 0.15 * true.diag().max()
    assert nearest(found["noise 0.1 on a training field"], rows).median() < nearest(rows, rows, itself=True).median()
