"""The training that diagnoses look at is the one that a fit takes."""

import pytest
import torch

from nfscale.diagnose import along_training, subject_of
from nfscale.engine import Stop, fit
from nfscale.engine.step import plain_gradient, stack_samples, training_samples
from nfscale.errors import CallerError
from nfscale.optim import Adam
from nfscale.rng import as_tensor, datum_seed
from tests.jobs import tiny_job


def test_moments_are_those_of_a_fit(tmp_path):
    subject = subject_of(tiny_job(tmp_path, "optimizer.kind=adam", "fit.samples=16"))
    found = list(along_training(subject, [20, 0, 5]))
    assert [moment.steps for moment in found] == [0, 5, 20]
    assert torch.equal(found[0].row, subject.row)
    stop = Stop(20, check_every=1)
    data = [(subject.datum_id, subject.samples)]
    (fitted,) = fit(subject.field, subject.signal, data, optimizer=subject.optimizer(), stop=stop, seed=0, samples=16)
    for moment in found:
        assert moment.quality == pytest.approx(fitted.history_quality[moment.steps], abs=1e-4)


def test_the_second_moment_is_the_mean_of_squared_gradients(tmp_path):
    """Oracle: the sum in Adam's paper, over gradients taken anew at the weights of each step."""
    subject = subject_of(tiny_job(tmp_path, "optimizer.kind=adam", "field.width=8"))
    optimizer = subject.optimizer()
    assert isinstance(optimizer, Adam)
    found = list(along_training(subject, range(5)))
    assert found[0].second_moment is None
    seeds = as_tensor([datum_seed(0, subject.datum_id)])
    batch = stack_samples([subject.samples], torch.device("cpu"))
    squares = []
    for moment in found[:4]:
        part = training_samples(subject.signal, batch, None, seeds, torch.tensor([moment.steps]))
        squares.append(plain_gradient(subject.field, subject.signal, moment.row[None], part)[1][0].square())
    weights = torch.tensor([optimizer.beta2 ** (3 - step) for step in range(4)])
    expected = (torch.stack(squares) * weights[:, None]).sum(dim=0) / weights.sum()
    second = found[4].second_moment
    assert second is not None
    torch.testing.assert_close(second, expected, rtol=1e-3, atol=1e-9)


def test_steps_of_an_optimiser_that_takes_curvature_are_multiples_of_its_cadence(tmp_path):
    subject = subject_of(tiny_job(tmp_path, "optimizer.update_every=10"))
    found = list(along_training(subject, [3, 27]))
    assert [moment.steps for moment in found] == [10, 20]
    assert all(moment.second_moment is None for moment in found)


def test_a_fit_that_is_lost_is_said_to_be(tmp_path):
    subject = subject_of(tiny_job(tmp_path, "optimizer.kind=adam", "optimizer.learning_rate=1e38"))
    with pytest.raises(CallerError, match=r"the fit is lost before step 20; take a smaller optimizer\.learning_rate"):
        list(along_training(subject, [0, 20]))
