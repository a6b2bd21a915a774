"""The Hessian against autograd's own, preconditioners and spectra against matrices that are known."""

import csv
import json
import math
import wave

import numpy as np
import pytest
import torch
import yaml

from nfscale.diagnose import extremes_along_training, hessian_along_training, subject_of
from nfscale.diagnose.lanczos import extreme_eigenvalues
from nfscale.diagnose.loss import MOST_SAMPLES, Loss
from nfscale.diagnose.preconditioners import condition, known_diagonals
from nfscale.diagnose.probes import (
    COUNTS,
    drawn_probes,
    equilibrated_estimate,
    estimates,
    layer_slices,
    second_moment,
    sparsity,
)
from nfscale.errors import CallerError
from nfscale.fields import MLP, HashGrid, MultiplicativeFilters
from nfscale.job import job_from_settings
from nfscale.signals import Samples
from tests.cli.test_commands import nfscale
from tests.jobs import tiny_job


@pytest.fixture(scope="module")
def chirp(tmp_path_factory):
    """Settings of a job on a sound of 130 samples, whose frequency rises from 2 to 10 cycles; some stand twice."""
    folder = tmp_path_factory.mktemp("sounds")
    times = np.arange(130) / 130
    values = 0.8 * np.sin(2 * np.pi * (2 * times + 4 * times**2))
    with wave.open(str(folder / "chirp.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes((values * 32767).astype("<i2").tobytes())
    return {
        "name": "chirp",
        "dataset": {"kind": "folder", "path": str(folder), "pattern": "*.wav"},
        "signal": {"kind": "audio", "span": 130 / 8000},
        "field": {"kind": "mlp", "width": 8, "depth": 2, "weight_scale": 1.0},
        "optimizer": {"kind": "adam", "learning_rate": 0.004},
        "fit": {"max_steps": 200, "samples": "full"},
        "output": str(folder / "run"),
    }


def subject_on(settings, *overrides):
    return subject_of(job_from_settings(settings, list(overrides)))


ACTIVATIONS = [
    ["field.activation=sine"],
    ["field.activation=gabor"],
    ["field.activation=relu", "field.encoding=positional", "field.encoding_count=3"],
]


@pytest.mark.parametrize("overrides", ACTIVATIONS)
def test_the_hessian_is_that_of_autograd(chirp, overrides):
    """Oracle: torch.autograd.functional.hessian of the mean squared error with the samples' weights."""
    subject = subject_on(chirp, "field.width=4", *overrides)
    samples, field = subject.samples, subject.field
    coordinates, values = samples.coordinates.double()[None], samples.values.double()
    assert samples.mask is not None
    weights = samples.mask.double()

    def loss_of(row: torch.Tensor) -> torch.Tensor:
        predicted = field.apply(field.layout.unravel(row[None]), coordinates)[0]
        return ((predicted - values).square().mean(dim=1) * weights).sum() / weights.sum()

    expected = torch.autograd.functional.hessian(loss_of, subject.row.double())
    assert isinstance(expected, torch.Tensor)
    found = Loss.of(subject).hessian(subject.row)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("overrides", ACTIVATIONS)
def test_the_gauss_newton_diagonal_is_that_of_the_jacobian(chirp, overrides):
    subject = subject_on(chirp, "field.width=4", *overrides)
    field, mask = subject.field, subject.samples.mask

    def values_of(row: torch.Tensor) -> torch.Tensor:
        return field.apply(field.layout.unravel(row[None]), subject.samples.coordinates.double()[None]).flatten()

    jacobian = torch.autograd.functional.jacobian(values_of, subject.row.double())
    assert isinstance(jacobian, torch.Tensor)
    assert mask is not None
    assert mask.unique().tolist() == [0.5, 1]
    expected = (jacobian.square() * mask[:, None]).sum(dim=0) / mask.sum()
    torch.testing.assert_close(Loss.of(subject).gauss_newton_diagonal(subject.row), expected)


def test_of_several_channels_all_enter_the_gauss_newton_diagonal(tmp_path):
    """For squared errors averaged over C channels, H less its residual part is 2 / C times J^T J over the samples."""
    subject = subject_of(tiny_job(tmp_path, "signal.convert=rgb", "field.width=4"))
    field, coordinates = subject.field, subject.samples.coordinates
    with torch.no_grad():
        values = field.apply(field.layout.unravel(subject.row[None]), coordinates[None])[0]
    assert values.shape[1] == 3
    loss = Loss(field, subject.signal, Samples(coordinates, values).map(torch.Tensor.double))
    exact = loss.hessian(subject.row).diagonal()
    torch.testing.assert_close(exact, 2 / 3 * loss.gauss_newton_diagonal(subject.row), rtol=1e-3, atol=1e-6)


def test_products_are_the_same_however_many_are_taken_at_once(chirp, monkeypatch):
    subject = subject_on(chirp)
    loss = Loss.of(subject)
    probes = drawn_probes(0, subject.datum_id, subject.field.layout.size)[:7]
    together = loss.products(subject.row, probes)
    torch.testing.assert_close(together, probes @ loss.hessian(subject.row))
    monkeypatch.setattr("nfscale.diagnose.loss._CHUNK_POINTS", 1)
    torch.testing.assert_close(loss.products(subject.row, probes), together)


def test_many_samples_are_thinned(tmp_path):
    subject = subject_of(tiny_job(tmp_path))
    taken = Loss.of(subject).samples
    assert len(taken.values) == len(subject.samples.values)
    many = Samples(torch.zeros(3 * MOST_SAMPLES - 1, 2), torch.zeros(3 * MOST_SAMPLES - 1, 1))
    assert len(Loss.of(type("Many", (), vars(subject) | {"samples": many})()).samples.values) == MOST_SAMPLES  # type: ignore[arg-type]


def test_preconditioners_of_a_diagonal_matrix_make_all_but_perfect_condition():
    entries = torch.tensor([1000.0, -10.0, 1.0, -0.1], dtype=torch.float64)
    hessian, gauss_newton = entries.diag(), torch.tensor([4.0, 4.0, 4.0, 1.0], dtype=torch.float64)
    diagonals = known_diagonals(hessian, gauss_newton)
    found = {name: condition(name, hessian, diagonal)[0] for name, diagonal in diagonals.items()}
    assert found["none"].condition == pytest.approx(1e4)
    assert (found["none"].largest, found["none"].smallest) == pytest.approx((1000, -10))
    assert found["none"].negative_share == 0.5
    assert found["jacobi"].condition == found["equilibrated"].condition == pytest.approx(1)
    assert found["gauss_newton"].condition == pytest.approx(250 / 0.1)
    assert found["root_gauss_newton"].condition == pytest.approx(500 / 0.1)


def test_row_norms_see_what_stands_beside_a_diagonal_that_vanishes():
    """Dauphin, de Vries & Bengio's case: Jacobi's preconditioner blows up a weight whose H_ii is near zero."""
    hessian = torch.tensor([[0.001, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 100.0]], dtype=torch.float64)
    diagonals = known_diagonals(hessian, torch.ones(3, dtype=torch.float64))
    conditions = {name: condition(name, hessian, diagonal)[0].condition for name, diagonal in diagonals.items()}
    jacobi = 1 / math.sqrt(0.002)  # off the diagonal of the first two, which has ones: 1 + jacobi, 1 - jacobi, 1
    assert conditions["jacobi"] == pytest.approx(1 + jacobi)
    assert conditions["equilibrated"] < 5 < conditions["jacobi"] < conditions["none"]


def test_quantiles_leave_out_flat_directions():
    entries = torch.cat([torch.full((95,), 2.0), torch.full((5,), 0.0)]).double()
    found, shares = condition("none", entries.diag(), torch.ones(100))
    assert (found.condition, found.condition_10, found.condition_50) == pytest.approx((1e12, 1, 1))
    assert shares[:95].tolist() == [1] * 95


@pytest.mark.parametrize("size", [4, 60])
def test_the_ends_of_a_spectrum_are_those_of_the_whole(size):
    """Oracle: torch.linalg.eigvalsh."""
    drawn = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = drawn + drawn.mT
    whole = torch.linalg.eigvalsh(matrix)
    found = extreme_eigenvalues(lambda vector: matrix @ vector, torch.ones(size))
    assert found == pytest.approx((float(whole[0]), float(whole[-1])), rel=1e-5)


def test_a_matrix_with_one_sign_has_its_smallest_eigenvalue_near_zero_found():
    matrix = torch.linspace(1, 50, 50, dtype=torch.float64).diag()
    assert extreme_eigenvalues(lambda vector: matrix @ vector, torch.ones(50)) == pytest.approx((1, 50), rel=1e-4)


def test_extremes_agree_with_the_whole_hessian(chirp):
    subject = subject_on(chirp)
    (whole,), (ends,) = (list(along(subject, [20])) for along in (hessian_along_training, extremes_along_training))
    exact = {one.preconditioner: (one.smallest, one.largest) for one in whole.conditions}
    assert {one.preconditioner for one in ends.extremes} == {"none", "gauss_newton", "esgd_100", "adam"}
    for one in ends.extremes:
        assert (one.smallest, one.largest) == pytest.approx(exact[one.preconditioner], rel=1e-4)
    assert ends.layers == whole.layers
    assert (ends.steps, ends.quality) == (whole.steps, whole.quality)


def test_estimates_are_within_three_standard_errors(chirp):
    """(Hv)_i^2 and v_i (Hv)_i over 100 probes, against row norms and the diagonal: of normal deviations 99.7 % are."""
    subject = subject_on(chirp)
    loss = Loss.of(subject)
    hessian, probes = loss.hessian(subject.row), drawn_probes(0, subject.datum_id, subject.field.layout.size)
    products = loss.products(subject.row, probes)
    for drawn, exact in (
        (products.square(), hessian.square().sum(dim=1)),
        (probes * products, hessian.diagonal()),
    ):
        deviation = (drawn.mean(dim=0) - exact) / (drawn.std(dim=0) / math.sqrt(len(probes)))
        assert float((deviation.abs() < 3).double().mean()) > 0.95
        assert float(deviation.mean().abs()) < 0.5
    torch.testing.assert_close(equilibrated_estimate(products), products.square().mean(dim=0).sqrt())


def test_more_probes_estimate_better(chirp):
    subject = subject_on(chirp)
    hessian = Loss.of(subject).hessian(subject.row)
    probes = drawn_probes(0, subject.datum_id, len(hessian))
    found = estimates(hessian, probes, probes @ hessian)
    assert [one.probes for one in found] == list(COUNTS)
    for errors, correlations in (
        ([one.equilibrated_error for one in found], [one.equilibrated_correlation for one in found]),
        ([one.jacobi_error for one in found], [one.jacobi_correlation for one in found]),
    ):
        assert errors == sorted(errors, reverse=True)
        assert correlations == sorted(correlations)
        assert errors[0] / errors[-1] == pytest.approx(10, rel=0.4)  # 1 / sqrt(probes)
    diagonal = torch.arange(1.0, 6, dtype=torch.float64).diag()  # of which one probe tells all
    exact = estimates(diagonal, probes[:, :5], probes[:, :5] @ diagonal)[0]
    assert (exact.equilibrated_error, exact.jacobi_error, exact.jacobi_correlation) == pytest.approx((0, 0, 1))


def test_probes_are_signs_of_the_datum():
    probes = drawn_probes(0, "a", 400)
    assert probes.abs().unique().tolist() == [1]
    assert float((probes @ probes.mT / 400).fill_diagonal_(0).abs().max()) < 0.25
    assert not torch.equal(probes, drawn_probes(0, "b", 400))


def test_layers_are_weights_and_biases_of_one_name():
    slices = layer_slices(MLP(2, 1, width=5, depth=2).layout)
    assert slices == {"layers.0": slice(0, 15), "layers.1": slice(15, 45), "layers.2": slice(45, 51)}
    for field in (MultiplicativeFilters(2, 1, width=4), HashGrid(2, 1, width=4)):
        places = list(layer_slices(field.layout).values())
        assert sum(place.stop - place.start for place in places) == field.layout.size


def test_sparsity_counts_zeros_and_what_is_small_beside_the_largest_of_its_layer():
    layout = MLP(1, 1, width=2, depth=1).layout  # 2 + 2, 2 + 1
    products = torch.tensor([[0.0, 1, 2, 1e-3, 1e-7, 2e-7, 0], [0, 0, 5, 5, 1, 1, 1]], dtype=torch.float64)
    first, last = sparsity(layout, products)
    assert (first.layer, first.zero_share, first.small_share) == ("layers.0", 3 / 8, 4 / 8)
    assert (last.layer, last.zero_share, last.small_share) == ("layers.1", 1 / 6, 1 / 6)


def test_products_of_a_relu_field_are_sparser_than_those_of_sines(chirp):
    """Chng, Saratchandran & Lucey, theorems 4.2 and 4.3."""

    def hidden_layer(*overrides: str) -> list[float]:
        subject = subject_on(chirp, "field.width=16", "field.depth=3", *overrides)
        found = [moment.layers[2] for moment in hessian_along_training(subject, [0, 100])]
        assert all(layer.small_share >= layer.zero_share for layer in found)
        return [layer.zero_share for layer in found]

    assert hidden_layer() == [0, 0]
    assert min(hidden_layer("field.activation=relu", "field.encoding=positional")) > 0.05


def test_adam_beside_gauss_newton_is_measured_over_weights_and_within_layers():
    layout = MLP(1, 1, width=4, depth=1).layout  # 8 + 5
    gauss_newton = torch.arange(1.0, 14, dtype=torch.float64)
    found = second_moment(layout, (3 * gauss_newton**0.5).float(), gauss_newton)
    assert (found.pearson_log, found.spearman, found.slope) == pytest.approx((1, 1, 0.5), abs=1e-5)
    layers_alone = torch.cat([torch.full((8,), 1.0), torch.full((5,), 1e6)])
    shuffled = gauss_newton.clone()
    shuffled[8:] += 1e6
    wiggle = torch.tensor([1.0, 2, 2, 1, 1, 2, 2, 1, 1, 2, 1, 2, 1]).double()
    by_scale = second_moment(layout, layers_alone * wiggle, shuffled)
    assert by_scale.pearson_log > 0.95
    assert abs(by_scale.pearson_log_in_layers) < 0.3
    with_dead = gauss_newton.clone()
    with_dead[3] = 0
    assert second_moment(layout, with_dead**2, with_dead).slope == pytest.approx(2)


def test_adam_along_training_is_set_beside_gauss_newton(chirp):
    start, later = hessian_along_training(subject_on(chirp), [0, 200])
    assert start.second is None
    assert start.clouds is None
    assert "adam" not in start.spectra
    assert later.second is not None
    assert "adam" in later.spectra
    assert later.second.pearson_log_in_layers > 0.4  # 0.6; between layers their scales differ at this size
    assert later.quality > start.quality + 10


def test_equilibration_lowers_the_condition_along_training(chirp):
    for moment in hessian_along_training(subject_on(chirp, "field.omega_0=20"), [0, 200]):
        conditions = {one.preconditioner: one for one in moment.conditions}
        assert conditions["equilibrated"].condition_10 < 0.8 * conditions["none"].condition_10
        assert conditions["esgd_100"].condition_10 == pytest.approx(conditions["equilibrated"].condition_10, rel=0.2)


def test_large_fields_are_refused_with_a_way_out_before_they_are_fitted(tmp_path):
    subject = subject_of(tiny_job(tmp_path, "field.width=64"))
    with pytest.raises(CallerError, match=r"at most 3,000 weights, and this one has 4,417; .* ask for --extremes"):
        next(hessian_along_training(subject, [10**9]))


def test_the_command_writes_tables_and_a_plot(chirp, tmp_path):
    job, figures = tmp_path / "job.yaml", tmp_path / "figures.json"
    job.write_text(yaml.safe_dump(chirp | {"output": str(tmp_path / "run")}))
    relu = "field.activation=relu,field.encoding=positional"
    done = nfscale("diagnose", "hessian", job, "--beside", relu, "--steps", "0,20", "--json", figures)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    written, folder = json.loads(figures.read_text()), tmp_path / "run-diagnose"
    assert (folder / "hessian.svg").read_text().startswith("<svg")
    for key, name in (("rows", ""), ("layers", "-layers"), ("estimates", "-estimates"), ("adam", "-adam")):
        rows = list(csv.DictReader((folder / f"hessian{name}.csv").read_text().splitlines()))
        assert len(rows) == len(written[key]) > 1
        assert {row["field"] for row in rows} == {"as the job has it", relu}
        text = {"field", "preconditioner", "layer"}
        assert all(np.isfinite(float(value)) for row in rows for column, value in row.items() if column not in text)
    assert {row["steps"] for row in written["adam"]} == {20}
    assert f"{folder / 'hessian.svg'}, hessian.csv, hessian-layers.csv" in done.stdout
    assert (tmp_path / "mlruns.db").exists()


def test_the_command_shows_the_ends_of_the_spectra_of_larger_fields(chirp, tmp_path):
    job, figures = tmp_path / "job.yaml", tmp_path / "figures.json"
    job.write_text(yaml.safe_dump(chirp | {"output": str(tmp_path / "run"), "track": {"enabled": False}}))
    wide = ("field.width=56", "optimizer.kind=esgd", "--steps", "0", "--json", figures)
    refused = nfscale("diagnose", "hessian", job, *wide)
    assert refused.returncode == 2
    assert "ask for --extremes" in refused.stderr
    assert not (tmp_path / "run-diagnose").exists()
    done = nfscale("diagnose", "hessian", job, "--extremes", *wide)
    assert done.returncode == 0, done.stderr
    rows = json.loads(figures.read_text())["rows"]
    assert {row["preconditioner"] for row in rows} == {"none", "gauss_newton", "esgd_100"}
    assert all(row["smallest"] < 0 < row["largest"] for row in rows)
    assert (tmp_path / "run-diagnose" / "hessian-layers.csv").exists()
