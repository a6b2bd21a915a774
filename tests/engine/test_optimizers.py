"""Every kind of optimiser in the engine: on every step, in any batch, through restarts, and on a job's own terms."""

import pytest
import torch

from nfscale.engine import Stop, fit
from nfscale.engine.dispatch import chosen
from nfscale.optim import ESGD, OPTIMIZERS, SGD, SOAP, Adam, Jacobi, Muon, Regularized, Scaled, Schedule, Shampoo
from tests.engine.fits import DATA, FACTORS, FIELD, SIGNAL, STEPS, assert_as_alone, calibration_of, fitted

SCHEDULE = Schedule("cosine", total_steps=40, warmup=5)
NEW = {
    "sgd": SGD(0.02, SCHEDULE, nesterov=True),
    "esgd_max": OPTIMIZERS["esgd_max"](0.1, SCHEDULE),
    "jacobi": Jacobi(0.1, SCHEDULE),
    "adahessian-e": OPTIMIZERS["adahessian"](0.1, SCHEDULE, variant="e"),
    "adahessian-j": OPTIMIZERS["adahessian"](0.1, SCHEDULE, variant="j"),
    "shampoo": Shampoo(0.01, SCHEDULE, update_every=5),
    "soap": SOAP(0.005, SCHEDULE, update_every=5),
    "muon": Muon(0.01, SCHEDULE, adam_learning_rate=0.01),
    "adam, scaled": Scaled(Adam(0.01, SCHEDULE, 0.3, 0.7), FACTORS),
    "adam, regularized": Regularized(Adam(0.01, SCHEDULE), weight_decay=0.01, clip_norm=1.0),
    "esgd, regularized": Regularized(ESGD(0.5, SCHEDULE), weight_decay=0.01, clip_norm=1.0),
    "esgd per field, regularized": Regularized(ESGD(0.05, SCHEDULE, curvature="per_field"), clip_norm=1.0),
}
CPU = torch.device("cpu")


def test_every_kind_is_tried():
    kinds = {type(getattr(optimizer, "inner", optimizer)) for optimizer in NEW.values()}
    assert kinds == set(OPTIMIZERS.values())


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", NEW)
def test_fields_get_better_on_every_step_whose_update_is_the_optimisers_own(kind, step):
    """The steps that take many updates in one call know Adam and ESGD, and leave all others to torch."""
    is_known = step == "native" and kind == "adam, scaled"  # whose factors it takes too
    assert (chosen(step, CPU, FIELD, SIGNAL, NEW[kind]).advance is not None) == is_known
    for field in fitted(DATA, NEW[kind], samples=32, step=step).values():
        assert field.steps == 40
        assert field.quality > field.history_quality[0] + 3, field.id


@pytest.mark.parametrize("kind", NEW)
def test_steps_agree_to_rounding(kind):
    """Over 20 updates; more would amplify what rounds."""
    stop = Stop(max_steps=20, check_every=20)
    plain, handwritten = (fitted(DATA[:2], NEW[kind], samples=32, stop=stop, step=step) for step in ("plain", "torch"))
    for datum_id, field in plain.items():
        moved = (field.weights - handwritten[datum_id].weights).abs().max()
        # The first gradient of a matrix with unequal sides leaves SOAP's basis open where it is zero: rounding decides.
        assert moved < (0.1 if kind == "soap" else 1e-2) * field.weights.abs().max(), datum_id
        assert field.quality == pytest.approx(handwritten[datum_id].quality, abs=1.0 if kind == "soap" else 0.1)


@pytest.mark.parametrize("kind", NEW)
def test_a_field_does_not_depend_on_its_batch(kind):
    how = {"optimizer": NEW[kind], "samples": 32}
    if "diagonal" in NEW[kind].needs:
        how["calibration"] = calibration_of(NEW[kind], 32)
    for batch in (2, 3, 5):
        assert_as_alone(fitted(DATA, batch=batch, **how), DATA, **how)


@pytest.mark.parametrize("kind", NEW)
def test_a_field_that_is_not_finite_restarts_and_its_neighbours_go_on(kind):
    """A datum of NaN diverges at every restart; the others end as without it."""
    how = {"optimizer": NEW[kind], "samples": 32, "batch": 3, "stop": Stop(40, check_every=20, max_restarts=1)}
    if "diagonal" in NEW[kind].needs:
        how["calibration"] = calibration_of(NEW[kind], 32)
    ill = ("ill", DATA[0][1].map(lambda tensor: tensor.clone()))
    ill[1].values.fill_(float("nan"))
    among = fitted([DATA[0], ill, DATA[1]], **how)
    assert not among["ill"].result.ok
    alone = fitted(DATA[:2], **how)
    for datum_id, field in alone.items():
        assert torch.equal(field.weights, among[datum_id].weights)


@pytest.mark.parametrize("kind", ["shampoo", "soap", "jacobi"])
def test_a_cadence_that_checks_do_not_keep_is_refused(kind):
    with pytest.raises(ValueError, match=r"check_every=7 is not a multiple.*update_every"):
        fit(FIELD, SIGNAL, DATA, optimizer=NEW[kind], stop=Stop(42, check_every=7), seed=0)
