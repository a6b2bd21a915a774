"""Rates by layer are rates of Adam, and give one initialization the speed of the other."""

import csv
import math

import pytest
import torch
import yaml

from nfscale.diagnose import rates_by_layer, rates_compared, subject_of
from nfscale.engine.step import plain_gradient
from nfscale.errors import CallerError
from nfscale.fields import MLP, theta0_of
from nfscale.optim import Adam, Extra, Schedule
from nfscale.rng import as_tensor, datum_seed
from nfscale.signals import Image
from tests.cli.test_commands import nfscale
from tests.engine.fits import data_of, stacked
from tests.jobs import tiny_job, tiny_settings

FIELD = MLP(2, 1, width=12, depth=3, weight_scale=2.0)
FACTORS = (0.25, 0.5, 1.0, 3.0)
SEEDS = as_tensor([datum_seed(0, "a"), datum_seed(0, "b")])


def test_a_step_of_adam_is_the_rate_times_the_factor_of_its_layer():
    case, adam = rates_by_layer(FIELD, FACTORS), Adam(1e-3, Schedule("constant"), epsilon=0.0)
    rows = case.layout.ravel(case.init(SEEDS))
    assert case.apply(case.init(SEEDS), torch.rand(1, 9, 2)).shape == (2, 9, 1)
    _, grads = plain_gradient(case, Image(1), rows, stacked(data_of(2)))
    updates, _ = adam.update(
        {"rows": grads}, adam.init({"rows": rows}), {}, Extra(torch.zeros(2).long(), torch.ones(2))
    )
    before, after = (case.original(case.layout.unravel(r)) for r in (rows, rows + updates["rows"]))
    for name, tensor in before.items():
        moved = (after[name] - tensor).abs()
        expected = torch.full_like(moved, 1e-3 * FACTORS[int(name.split(".")[1])])
        torch.testing.assert_close(moved, expected, rtol=1e-2, atol=0)


def test_the_start_is_that_of_the_field_itself():
    coordinates = torch.rand(1, 20, 2, generator=torch.Generator().manual_seed(0))
    case = rates_by_layer(FIELD, FACTORS)
    torch.testing.assert_close(case.apply(case.init(SEEDS), coordinates), FIELD.apply(FIELD.init(SEEDS), coordinates))
    assert not torch.equal(theta0_of(case, 0), theta0_of(FIELD, 0))


def test_a_move_of_a_weight_shows_by_the_factors_more_in_scaled_fields():
    """The claim that the factors rest on: root mean square derivatives by layer, scaled over SIREN's."""
    wide = MLP(2, 1, width=128, depth=4, weight_scale=2.0)
    coordinates = 2 * torch.rand(1, 200, 2, generator=torch.Generator().manual_seed(0)) - 1

    def sensitivities(field: MLP) -> list[float]:
        params = {name: p.requires_grad_() for name, p in field.init(SEEDS).items()}
        signs = torch.randint(0, 2, (2, 200, 1), generator=torch.Generator().manual_seed(1)) * 2.0 - 1
        (field.apply(params, coordinates) * signs).sum().backward()
        return [float(params[f"layers.{layer}.weight"].grad.square().mean().sqrt()) for layer in range(5)]

    siren = MLP(2, 1, width=128, depth=4, weight_scale=1.0)
    ratios = [a / b for a, b in zip(sensitivities(wide), sensitivities(siren), strict=True)]
    for ratio, expected in zip(ratios, (8.0, 4.0, 2.0, 1.0, 1.0), strict=True):
        assert math.log2(ratio) == pytest.approx(math.log2(expected), abs=0.7)


def test_weight_scaling_and_siren_are_compared_at_both_speeds(tmp_path):
    keys = {"kind": "adam", "learning_rate": 1e-3, "schedule": "constant"}
    subject = subject_of(tiny_job(tmp_path, "field.weight_scale=2", "field.depth=3", optimizer=keys))
    found = [statistics for statistics, _ in rates_compared(subject, 60, 20.0)]
    assert [one.rates for one in found] == ["1/1/1/1", "4/2/1/1", "1/1/1/1", "0.25/0.5/1/1"]
    assert all(math.isfinite(one.quality) for one in found)
    assert len({one.quality for one in found}) == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["field.weight_scale=2"], "got optimizer.kind=esgd; use optimizer.kind=adam"),
        (["field.weight_scale=1", "optimizer.kind=adam"], "give field.kind=mlp and a field.weight_scale above 1"),
        (
            ["field.activation=relu", "field.initialization=kaiming", "optimizer.kind=adam"],
            "a field.weight_scale above 1",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, overrides, message):
    with pytest.raises(CallerError, match=message):
        next(rates_compared(subject_of(tiny_job(tmp_path, *overrides)), 20, 20.0))


def test_the_command_writes_the_curves_of_four_fits(tmp_path):
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(tiny_settings(tmp_path / "run")))
    done = nfscale("diagnose", "rates", job, "optimizer.kind=adam", "--steps", "40", "--target", "15")
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "run-diagnose" / "rates.csv").read_text().splitlines()))
    assert [row["field"] for row in rows][::2] == ["SIREN", "weight scale 1.5"]
    assert (tmp_path / "run-diagnose" / "rates.svg").read_text().startswith("<svg")
