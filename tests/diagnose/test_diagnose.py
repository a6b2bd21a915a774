"""Diagnoses against what is known: the arcsine law, a kernel taken apart, a wave of one frequency."""

import csv
import json
import math

import numpy as np
import pytest
import torch
import yaml

from nfscale.diagnose import (
    field_spectrum,
    kernel_along_training,
    kernel_statistics,
    layer_statistics,
    power_spectrum,
    spectrum_statistics,
    subject_of,
    tangent_kernel,
)
from nfscale.diagnose.activations import arcsine_distance
from nfscale.errors import CallerError
from nfscale.fields import MLP, HashGrid, theta0_of
from nfscale.job import load_job
from tests.cli.test_commands import nfscale
from tests.jobs import tiny_job, tiny_settings

GRID = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_distance_to_the_arcsine_law_is_small_where_it_holds():
    angles = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 2 * math.pi
    assert arcsine_distance(torch.sin(angles)) < 0.01
    assert arcsine_distance(angles / math.pi - 1) == pytest.approx(0.1052, abs=0.005)  # of a uniform distribution
    assert arcsine_distance(torch.zeros(10)) == pytest.approx(0.5)


def test_activations_of_weight_scaled_sines_keep_the_arcsine_law_and_smaller_ones_lose_it():
    def distances(alpha: float) -> list[float]:
        field = MLP(2, 1, width=128, depth=5, weight_scale=alpha)
        return [found.arcsine_distance for found in layer_statistics(field, theta0_of(field, 0), GRID)[0]]

    assert max(distances(2.0)) < 0.02
    assert distances(0.5)[-1] > 0.1


def test_layers_are_what_the_field_computes():
    field = MLP(2, 1, width=8, depth=2, omega_0=7.0)
    row = theta0_of(field, 0)
    statistics, values = layer_statistics(field, row, GRID)
    assert [found.layer for found in statistics] == [0, 1]
    before, after = values[0]
    torch.testing.assert_close(torch.sin(before), after)
    params = field.layout.unravel(row[None])
    last = after if field.depth == 1 else values[-1][1]
    weight, bias = params["layers.2.weight"][0], params["layers.2.bias"][0]
    torch.testing.assert_close(last @ weight.mT + bias, field.apply(params, GRID[None])[0], rtol=1e-4, atol=1e-5)


def test_fields_without_layers_to_look_into_are_refused():
    field = HashGrid(2, 1)
    with pytest.raises(CallerError, match=r"field.kind=mlp; got HashGrid"):
        layer_statistics(field, theta0_of(field, 0), GRID)


@pytest.mark.parametrize("field", [MLP(2, 2, width=6, depth=2), HashGrid(2, 2, width=4)])
def test_the_kernel_is_the_product_of_the_gradients_of_single_values(field):
    row, points = theta0_of(field, 0).double(), GRID[:5].double()
    kernel = tangent_kernel(field, row.float(), points)
    gradients = []
    for n in range(5):
        for c in range(2):
            weights = row.clone().requires_grad_()
            field.apply(field.layout.unravel(weights[None]), points[None])[0, n, c].backward()
            gradients.append(weights.grad)
    jacobian = torch.stack([g for g in gradients if g is not None])
    torch.testing.assert_close(kernel, jacobian @ jacobian.mT, rtol=1e-6, atol=1e-9)


def test_statistics_of_kernels_that_are_known():
    y = torch.tensor([1.0, -1.0, 2.0, -2.0])
    along, _ = kernel_statistics(torch.outer(y, y).double(), y, y, 0, 0.0)
    assert along.alignment == pytest.approx(1)
    assert along.residual_alignment == pytest.approx(1)
    assert along.effective_rank == pytest.approx(1, abs=1e-6)
    even, eigenvalues = kernel_statistics(4 * torch.eye(4, dtype=torch.float64), y, y, 3, 1.5)
    assert (even.condition, even.largest, even.steps, even.quality) == (1, 1, 3, 1.5)
    assert even.effective_rank == pytest.approx(4)
    assert even.alignment == pytest.approx(0.5)  # |I| = 2
    assert eigenvalues.tolist() == [1, 1, 1, 1]


def test_a_wave_has_the_spectrum_of_a_wave():
    axis = torch.linspace(-1, 1, 257)[:-1]
    frequencies, power = power_spectrum(torch.sin(2 * torch.pi * 6 * axis)[:, None])
    assert float(frequencies[power.argmax()]) == 6
    found = spectrum_statistics(frequencies, power)
    assert found.centroid == pytest.approx(6, abs=0.1)
    assert found.bandwidth == pytest.approx(6, abs=0.6)
    assert found.high_share < 1e-6
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    diagonal = torch.sin(2 * torch.pi * (3 * rows + 4 * columns))[..., None]
    frequencies, power = power_spectrum(diagonal)
    assert float(frequencies[power.argmax()]) == 5


def test_scaled_weights_have_higher_frequencies_at_the_start():
    def centroid(alpha: float) -> float:
        field = MLP(2, 1, width=32, depth=3, weight_scale=alpha)
        return spectrum_statistics(*field_spectrum(field, theta0_of(field, 0), 2)).centroid

    assert centroid(1.0) < 0.7 * centroid(1.5) < 0.7 * 0.9 * centroid(2.5)


@pytest.mark.parametrize("optimizer", ["adam", "esgd"])
def test_the_kernel_along_training_belongs_to_fits_that_get_better(tmp_path, optimizer):
    subject = subject_of(tiny_job(tmp_path, f"optimizer.kind={optimizer}"))
    found = [statistics for statistics, _ in kernel_along_training(subject, [40, 0])]
    assert [one.steps for one in found] == [0, 40]
    assert found[1].quality > found[0].quality + 1
    assert all(one.condition >= 1 and 0 <= one.alignment <= 1 for one in found)


def test_a_datum_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CallerError, match="no datum 'nothing' in the dataset; ids look like"):
        subject_of(tiny_job(tmp_path), "nothing")


@pytest.mark.parametrize("what", ["init", "spectrum", "ntk"])
def test_the_command_writes_a_plot_and_figures_of_the_job_and_of_what_stands_beside_it(tmp_path, what):
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(tiny_settings(tmp_path / "run")))
    assert load_job(job).track.enabled
    figures = tmp_path / "figures.json"
    more = ["--steps", "0,20"] if what == "ntk" else []
    done = nfscale("diagnose", what, job, "--beside", "field.weight_scale=1", "--json", figures, *more)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run-diagnose"
    assert (folder / f"{what}.svg").read_text().startswith("<svg")
    rows = list(csv.DictReader((folder / f"{what}.csv").read_text().splitlines()))
    assert len(rows) == len(json.loads(figures.read_text())["rows"]) > 1
    assert {"field.weight_scale=1"} < {row.get("field") or row.get("of") for row in rows}
    assert all(np.isfinite(float(value)) for row in rows for key, value in row.items() if key not in ("field", "of"))
    assert (tmp_path / "mlruns.db").exists()
    assert "warning" not in done.stderr


def test_a_list_of_steps_that_is_none_is_the_callers_mistake(tmp_path):
    done = nfscale("diagnose", "ntk", tmp_path / "none.yaml", "--steps", "many")
    assert done.returncode == 2
    assert "--steps is a list such as 0,50,200, got 'many'" in done.stderr
