"""The rule for `optimizer.kind: auto` says what its tables say."""

from dataclasses import replace

import pytest

from nfscale.optim import METHODS, Circumstances, automatic_kind

TILES = Circumstances(
    target_db=40.0,
    is_in_db=True,
    weights=12_900,
    samples=256,
    values=12_288,
    takes_all=False,
    has_hidden_matrices=True,
    dimensions=2,
    weight_scale=1.5,
    shares_init=True,
)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({}, "adam"),
        ({"target_db": None}, "adam"),
        ({"target_db": None, "is_in_db": False}, "esgd"),
        ({"target_db": None, "is_in_db": False, "shares_init": False}, "adam"),
        ({"target_db": 50.0}, "muon"),
        ({"target_db": 50.0, "has_hidden_matrices": False}, "adam"),
        ({"target_db": 50.0, "weight_scale": 2.25}, "adam"),
        ({"dimensions": 1}, "esgd"),
        ({"dimensions": 1, "shares_init": False}, "adam"),
        ({"dimensions": 1, "target_db": 50.0}, "adam"),
        ({"samples": 4096, "takes_all": True}, "lbfgs"),
        ({"samples": 4096, "takes_all": True, "target_db": 45.0}, "adam"),
        ({"samples": 4096, "takes_all": True, "values": 50_000}, "adam"),
        ({"samples": 64, "values": 64, "weights": 300, "takes_all": True}, "adam"),
    ],
)
def test_the_kind_goes_by_target_work_and_values_per_weight(change, kind):
    assert automatic_kind(replace(TILES, **change)) == kind
    assert kind in METHODS
