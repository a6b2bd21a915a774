"""The meshes of libcgal-demo: all there, all closed, each with an inside. Skipped where they cannot be fetched."""

from pathlib import Path

import numpy as np
import pytest

from nfscale.datasets import shapes
from nfscale.errors import CallerError
from nfscale.job import load_job
from nfscale.signals import Occupancy, Solid

pytest.importorskip("igl", reason="pip install 'nfscale[shapes]'")
JOBS = Path(__file__).resolve().parents[2] / "pipelines"


@pytest.fixture(scope="module")
def dataset():
    try:
        return shapes.Shapes().open()
    except CallerError as error:
        pytest.skip(str(error))


def test_the_set_is_whole_and_its_meshes_are_closed(dataset):
    assert len(set(dataset.ids)) == len(dataset.ids) == 38
    data = [dataset.read(position) for position in range(38)]
    assert [(d.id, d.index, d.label, d.error) for d in data] == [
        (name, position, name, None) for position, name in enumerate(dataset.ids)
    ]
    for datum in data:
        mesh = datum.content.mesh
        assert len(mesh.faces) >= 400, datum.id
        edges = np.sort(mesh.faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
        _, uses = np.unique(edges, axis=0, return_counts=True)
        assert (uses % 2 == 0).all(), f"{datum.id} has an edge that ends nowhere"


def test_a_shape_has_an_inside(dataset):
    datum = dataset.read(dataset.ids.index("eight"))
    assert isinstance(datum.content, Solid)
    samples = Occupancy(pool=2000, check=8000).samples(datum.content)
    assert 0.01 < float((samples.check.values > 0).float().mean()) < 0.05
    assert 0.1 < float((samples.values > 0).float().mean()) < 0.4, "half of the pool lies near the surface"


def test_a_mesh_that_is_damaged_is_a_datum_with_a_reason(monkeypatch):
    monkeypatch.setattr(shapes, "_files", lambda archive: {"anchor": b"OFF\n3 1 0\n0 0 0\n"})
    datum = shapes.ShapesDataset(Path("absent")).read(0)
    assert (datum.id, datum.content) == ("anchor", None)
    assert "cut off" in datum.error


def test_the_job_that_ships_is_valid():
    job = load_job(JOBS / "shapes.yaml")
    assert (job.dataset.kind, job.signal.kind) == ("shapes", "occupancy")
    assert job.needs_calibration
