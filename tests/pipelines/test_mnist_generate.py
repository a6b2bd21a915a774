"""The pipeline from digits to new ones: what it holds against its targets, and that it runs."""

import pytest

from pipelines.mnist_generate import main, targets

GOOD = {
    "weights_accuracy": 0.91,
    "probe_accuracy": 0.93,
    "pixel_accuracy": 0.935,
    "label_agreement": 0.92,
    "frechet_distance": 4.0,
    "best_baseline_frechet_distance": 9.0,
    "novelty_ratio": 0.85,
    "wall_seconds": 1500.0,
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weights_accuracy", 0.89),
        ("probe_accuracy", 0.92),
        ("label_agreement", 0.89),
        ("frechet_distance", 4.6),
        ("novelty_ratio", 0.79),
        ("wall_seconds", 1900.0),
    ],
)
def test_each_target_can_be_missed_alone(name, value):
    assert all(targets(GOOD).values())
    assert list(targets(GOOD | {name: value}).values()).count(False) == 1


@pytest.mark.slow
def test_it_runs(tmp_path):
    figures = main(["--output", str(tmp_path / "run"), "--small"])
    assert figures["pixel_accuracy"] > 0.5
    assert (tmp_path / "run" / "samples" / "_SUCCESS").exists()
    assert (tmp_path / "run" / "learn" / "generate" / "samples.png").exists()
