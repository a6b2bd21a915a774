"""Flows learn distributions, and their samples are a table that every command reads."""

import json

import pytest
import torch
from typer.testing import CliRunner

from nfscale.cli.app import app
from nfscale.errors import CallerError
from nfscale.learn.flow import TokenFlow, VectorFlow, flow_loss, sample
from nfscale.learn.generate import Settings, evenly, train_generator, write_samples
from nfscale.learn.latents import Latents
from nfscale.learn.subject import Subject
from nfscale.learn.training import Schedule, train
from nfscale.learn.transforms import Standardizer, Tokens
from nfscale.store import open_weights
from nfscale.verify import verify
from tests.jobs import encode_in_process, tiny_job
from tests.learn.tables import made_table


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """120 digits, encoded."""
    job = tiny_job(tmp_path_factory.mktemp("run") / "digits", "dataset.limit=120", "fit.max_steps=40")
    folder, _ = encode_in_process(job)
    return folder


def test_a_flow_learns_a_distribution_of_each_class():
    """Two classes on rings of different radius, which no Gaussian is."""
    generator = torch.Generator().manual_seed(0)
    ranks = torch.arange(2000) % 2
    angle = 6.2832 * torch.rand(2000, generator=generator)
    data = torch.stack([angle.cos(), angle.sin()], dim=1) * (0.5 + ranks[:, None])
    torch.manual_seed(0)
    model = VectorFlow(2, 2, width=64, dropout=0)
    schedule = Schedule(1500, 256, 4e-3, average=0.99)
    trained = train(model, lambda net, at: flow_loss(net, data[at], ranks[at], 2, generator), 2000, schedule, 0)
    asked = torch.arange(600) % 2
    radius = sample(trained.model, 2, asked, 2, generator).norm(dim=1)
    for rank in (0, 1):
        assert radius[asked == rank].median().item() == pytest.approx(0.5 + rank, abs=0.08)
        assert (radius[asked == rank] - 0.5 - rank).abs().quantile(0.8) < 0.3


def test_a_flow_over_tokens_moves_every_weight(run):
    layout = run.plan().layout
    model = TokenFlow(Tokens(layout), 3, width=32, depth=2)
    rows, time, ranks = torch.randn(4, layout.size), torch.rand(4), torch.tensor([0, 1, 2, 3])
    assert (model(rows, time, ranks) == 0).all(), "silent at the start"
    torch.nn.init.normal_(model.leave.weight)
    for shifts in model.shifts:
        torch.nn.init.normal_(shifts.weight)
    found = model(rows, time, ranks)
    assert (found.std(0) > 0).all()
    assert not torch.allclose(model(rows, time, ranks.flip(0)), found)


def test_training_stops_at_the_best_held_out_loss_and_returns_that_model():
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1)
    looked = []

    def held_out(net):
        looked.append(net.weight.item())
        return [3.0, 1.0, 2.0, 2.0, 2.0, 2.0][len(looked) - 1]

    schedule = Schedule(1000, 4, evaluate_every=10, patience=3)
    found = train(model, lambda net, at: (net(torch.ones(4, 1)) - 5).square().mean(), 4, schedule, 0, held_out)
    assert found.steps == 20
    assert found.model.weight.item() == looked[1]
    assert len(looked) == 5


def test_latents_are_principal_components(tmp_path):
    subject = Subject.of(made_table(tmp_path / "run", 200, spread=0.1))
    rows = subject.weights
    standardizer = Standardizer.of(rows, subject.table.layout, "layer")
    latents = Latents.of(rows, standardizer, 20)
    assert torch.allclose(latents(rows).std(0), torch.ones(20), atol=0.02)
    assert torch.allclose(latents(latents.inverse(latents(rows))), latents(rows), atol=1e-3)
    values = torch.linalg.svdvals(standardizer(rows))
    assert latents.explained == pytest.approx(float(values[:20].square().sum() / values.square().sum()), rel=0.02)
    with pytest.raises(CallerError, match="ask for fewer"):
        Latents.of(rows, standardizer, 200)


@pytest.mark.parametrize("kind", ["pca", "tokens"])
def test_samples_are_a_table_that_every_reader_takes(run, tmp_path, kind):
    subject = Subject.of(open_weights(run.files.path))
    settings = Settings(kind, components=8, steps=30, batch=16)
    generator = train_generator(subject, subject.split(0), settings)
    ranks = evenly(25, len(subject.labels))
    drawn = generator.sample(ranks, 1)
    assert torch.equal(drawn, generator.sample(ranks, 1))
    folder = write_samples(subject, drawn, ranks, str(tmp_path / "samples"), settings)
    table = open_weights(folder.files.path)
    assert len(table) == 25
    assert table.to_arrow(["label"])["label"].to_pylist() == [subject.labels.names[rank] for rank in ranks]
    assert (abs(table.decode([0, 7]) - subject.decoded(drawn[[0, 7]])) < 1e-5).all()
    found = verify(folder)
    assert found.mismatches == []
    assert found.decoded == 25
    with pytest.raises(CallerError, match="holds a run already"):
        write_samples(subject, drawn, ranks, str(tmp_path / "samples"), settings)
    assert len(Subject.of(table)) == 25


def test_the_commands_report_what_the_issue_of_learning_asks_for(run, tmp_path):
    runner, place = CliRunner(), str(run.files.path)
    said = runner.invoke(
        app, ["classify", place, "--folds", "2", "--epochs", "0.1", "--no-track", "--json", str(tmp_path / "c.json")]
    )
    assert said.exit_code == 0, said.output
    figures = json.loads((tmp_path / "c.json").read_text())
    for name in ("weights", "probe", "pixel"):
        low, high = figures[f"{name}_interval"]
        assert low <= figures[f"{name}_accuracy"] <= high
    assert (run.files.path / "learn/classify/confusion-probe.png").read_bytes()[:4] == b"\x89PNG"
    arguments = ["generate", place, "--samples", "40", "--components", "8", "--steps", "30", "--no-track"]
    said = runner.invoke(app, [*arguments, "--json", str(tmp_path / "g.json")])
    assert said.exit_code == 0, said.output
    figures = json.loads((tmp_path / "g.json").read_text())
    assert figures["frechet_distance"] > 0
    assert 0 <= figures["label_agreement"] <= 1
    assert {"best_baseline_frechet_distance", "novelty_ratio"} <= figures.keys()
    assert {one["name"] for one in figures["scores"]} >= {"generator", "reconstructions", "PCA Gaussian"}
    assert len(open_weights(f"{place}/samples")) == 40
    for name in ("samples.png", "scores.png", "model.npz", "statistics.npz", "figures.json"):
        assert (run.files.path / "learn/generate" / name).stat().st_size > 0
    again = runner.invoke(app, arguments)
    assert isinstance(again.exception, CallerError)
    assert "holds samples already" in str(again.exception)
