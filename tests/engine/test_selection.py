"""Samples selected by error: the field's own, whoever its neighbours are, and more of what is badly represented."""

import numpy as np
import pytest
import torch

from nfscale.engine import Stop, fit
from nfscale.signals import Image
from tests.engine.fits import (
    ADAM,
    DATA,
    ESGD_OWN,
    ESGD_SHARED,
    FIELD,
    RAYS,
    SIGNAL,
    STEPS,
    STOP,
    assert_as_alone,
    data_of,
    fitted,
    ray_data,
)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("optimizer", [ADAM, ESGD_SHARED, ESGD_OWN], ids=["adam", "esgd-shared", "esgd-per_field"])
def test_samples_selected_by_error_are_the_fields_own(optimizer, step):
    """Through two slots that are refilled, beside fields at other steps; and it is no fit with stratified samples."""
    how = {"optimizer": optimizer, "samples": 16, "step": step, "stop": Stop(60, target=25.0, check_every=10)}
    together = fitted(data_of(7), **how, sampling="error", batch=2)
    assert len({result.steps for result in together.values()}) > 1, "all left together: the refill shows nothing"
    assert_as_alone(together, data_of(7), **how, sampling="error")
    stratified = fitted(data_of(7), **how, batch=2)
    for datum_id, result in together.items():
        first = torch.tensor(result.history_quality[:2])
        assert torch.equal(first, torch.tensor(stratified[datum_id].history_quality[:2])), "until the first check"
        assert result.steps == 10 or not torch.equal(result.weights, stratified[datum_id].weights)


def test_steps_take_more_of_what_the_last_check_saw_badly_represented():
    seen: list[torch.Tensor] = []

    class Watching(Image):
        def predict(self, apply, samples):
            if samples.values.shape[1] == 16:
                seen.append(samples.values)
            return super().predict(apply, samples)

    watching = Watching(1)
    flat = np.full((9, 7), 0.5, dtype=np.float32)
    flat[4:6, 2:5] = 1.0  # all that is left to learn: 6 of 63 pixels
    how = {"samples": 16, "stop": Stop(40, check_every=20), "signal": watching, "step": "plain", "batch": 2}
    fitted([("spot", watching.samples(flat))], sampling="error", **how)
    spots = [float((values[0] > 0.4).double().mean()) for values in seen]
    assert len(spots) == 40
    before, after = np.mean(spots[:20]), np.mean(spots[20:])
    assert before == pytest.approx(6 / 63, abs=0.04)
    assert after > 1.25 * before


def test_a_selection_by_error_needs_errors():
    with pytest.raises(ValueError, match="chooses which samples a step takes, and samples='full' takes all"):
        fit(FIELD, SIGNAL, DATA, optimizer=ADAM, stop=STOP, seed=0, sampling="error")
    with pytest.raises(ValueError, match="checked on samples that no step takes"):
        list(fit(FIELD, RAYS, ray_data(2), optimizer=ADAM, stop=STOP, seed=0, sampling="error", samples=16))
    with pytest.raises(ValueError, match="unknown sampling 'best'; known: stratified, uniform, error"):
        fit(FIELD, SIGNAL, DATA, optimizer=ADAM, stop=STOP, seed=0, sampling="best")  # type: ignore[arg-type]
