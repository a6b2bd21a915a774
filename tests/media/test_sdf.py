"""Distances to meshes, what is written of them, and how a rebuilt surface is compared; hostile files in a run.

Oracles: balls and boxes in closed form; trimesh, which reads what is written.
"""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from nfscale.driver import open_run, serve
from nfscale.job import job_from_settings
from nfscale.media import MEDIA
from nfscale.media.sdf import SdfMedium, compared
from nfscale.media.solids import mesh_of, solid_of
from nfscale.pool import InProcessPool
from nfscale.signals import Grid, Mesh, Sdf, Solid
from nfscale.store import open_weights
from nfscale.verify import verify
from tests.media.pages import no_other_shape
from tests.signals.test_sdf import ball_distance, ball_grid, box_distance

trimesh = pytest.importorskip("trimesh", reason="pip install 'nfscale[shapes]'")
pytest.importorskip("igl", reason="pip install 'nfscale[shapes]'")

MEDIUM = SdfMedium()


def mesh(made) -> Mesh:
    return Mesh(np.asarray(made.vertices, float), np.asarray(made.faces, np.int64))


def signed(solid: Solid, points: np.ndarray, largest: float = 1e9) -> np.ndarray:
    away = solid.distance(points, largest)
    return np.where(solid.inside(points), -away, away)


POINTS = np.random.default_rng(0).uniform(-3, 3, (4000, 3))

# --- distances


def test_distances_to_a_box_are_those_of_the_closed_form_whichever_way_it_faces():
    made = trimesh.creation.box((1, 2, 3))
    expected = box_distance(POINTS, (-0.5, -1, -1.5), (1, 2, 3))
    assert (expected < 0).sum() > 50
    np.testing.assert_allclose(signed(solid_of(mesh(made)), POINTS), expected, atol=1e-9)
    made.invert()
    np.testing.assert_allclose(signed(solid_of(mesh(made)), POINTS), expected, atol=1e-9)


def test_distances_to_a_ball_are_those_of_the_closed_form():
    ball = solid_of(mesh(trimesh.creation.icosphere(subdivisions=4, radius=1.5)))
    np.testing.assert_allclose(signed(ball, POINTS), ball_distance(POINTS, 1.5), atol=3e-3)


def test_beyond_the_largest_distance_nothing_is_searched():
    ball = solid_of(mesh(trimesh.creation.icosphere(subdivisions=3)))
    whole, near = ball.distance(POINTS, 1e9), ball.distance(POINTS, 0.5)
    assert np.array_equal(near[whole < 0.499], whole[whole < 0.499])
    assert np.isinf(near[whole > 0.501]).all()


def test_an_open_surface_has_an_inside_and_distances_to_what_is_there():
    made = trimesh.creation.icosphere(subdivisions=3)
    cap = made.triangles_center[:, 2] > 0.9
    opened = solid_of(mesh(trimesh.Trimesh(made.vertices, made.faces[~cap], process=False)))
    points = np.array([[0, 0, -0.5], [0, 0, 0.0], [0, 0, -1.5], [0, 0, 0.99]])
    found = signed(opened, points)
    np.testing.assert_allclose(found[:3], [-0.5, -1, 0.5], atol=0.01)
    assert abs(found[3]) > 0.3, "the surface that was cut out is not there"


# --- surfaces compared


def test_a_surface_is_like_itself_and_a_larger_ball_is_away_by_the_difference():
    ball, larger = (mesh(trimesh.creation.icosphere(subdivisions=4, radius=radius)) for radius in (1.0, 1.1))
    same = compared(ball, ball)
    assert same["chamfer_percent"] == pytest.approx(0, abs=1e-6)
    assert same["normal_consistency"] == pytest.approx(1, abs=1e-6)
    both = compared(ball, larger)
    assert both["chamfer_percent"] == pytest.approx(100 * 0.1 / 12**0.5, rel=0.02)
    assert both["normal_consistency"] == pytest.approx(1, abs=0.01)
    assert compared(larger, ball)["chamfer_percent"] == pytest.approx(100 * 0.1 / 12**0.5 / 1.1, rel=0.02)


def test_surfaces_that_stand_upright_on_each_other_have_no_normal_in_common():
    corners = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], float)
    faces = np.array([[0, 1, 2], [0, 2, 3]])
    lying, standing, turned = Mesh(corners, faces), Mesh(corners[:, [0, 2, 1]], faces), Mesh(corners, faces[:, ::-1])
    assert compared(lying, standing)["normal_consistency"] == pytest.approx(0, abs=1e-9)
    assert compared(lying, turned)["normal_consistency"] == pytest.approx(1), "whichever way they face"


def test_what_is_missing_counts_in_one_direction():
    """Of two balls far from each other one is rebuilt: half of the original is away, all that was rebuilt is right."""
    ball = trimesh.creation.icosphere(subdivisions=3, radius=0.5)
    both = mesh(trimesh.util.concatenate([ball, ball.copy().apply_translation([9, 0, 0])]))
    there = np.linalg.norm(POINTS / np.linalg.norm(POINTS, axis=1, keepdims=True) * 0.5 + [9, 0, 0], axis=1) - 0.5
    expected = 100 * there.mean() / 2 / 2 / np.linalg.norm([10, 1, 1])
    assert compared(both, mesh(ball))["chamfer_percent"] == pytest.approx(expected, rel=0.02)


def test_nothing_rebuilt_is_as_far_as_can_be():
    empty = Grid(np.full((3, 3, 3), -1, np.float32))
    assert MEDIUM.measures(mesh(trimesh.creation.box()), empty) == {"chamfer_percent": 100, "normal_consistency": 0}


# --- out of fields


def perfect(made, signal: Sdf) -> tuple[Solid, Grid]:
    """A mesh, and the grid of a field that says its distances without error."""
    solid = solid_of(mesh(made))
    shape = signal.shape_of(signal.measures(solid))
    centre, scale = np.array(shape[3:6]), shape[6]
    away = signed(solid, centre + scale * signal.coordinates(shape).double().numpy()) / scale
    values = torch.from_numpy((away / signal.truncate).clip(-1, 1)).float()
    return solid, signal.reconstruct(values[None, :, None], shape)[0]


@pytest.mark.parametrize(
    "made",
    [
        trimesh.creation.icosphere(subdivisions=3, radius=40).apply_translation([100, 0, -50]),
        trimesh.creation.torus(1, 0.3).apply_scale(1e-3),
        trimesh.creation.box((3, 2, 1)),
    ],
)
def test_a_perfect_field_decodes_to_the_mesh(made):
    solid, grid = perfect(made, Sdf(resolution=48))
    found = MEDIUM.measures(solid.mesh, grid)
    assert found["chamfer_percent"] < 0.2
    assert found["normal_consistency"] > 0.96
    rebuilt = mesh_of(grid)
    closed = trimesh.Trimesh(rebuilt.vertices, rebuilt.faces)
    assert closed.is_watertight
    assert closed.volume == pytest.approx(made.volume, rel=0.05), "faces look outwards"


def test_distances_interpolate_the_surface_better_than_truths_do():
    made = trimesh.creation.icosphere(subdivisions=3)
    solid, grid = perfect(made, Sdf(resolution=32))
    truths = Grid(np.where(grid.levels > 0, 1, -1).astype(np.float32), grid.centre, grid.scale)
    exact, stepped = (MEDIUM.measures(solid.mesh, one)["chamfer_percent"] for one in (grid, truths))
    assert exact < 0.25 * stepped


@pytest.mark.parametrize("suffix", [".obj", ".ply", ".off", ".stl", ".glb"])
def test_what_is_written_opens_elsewhere(tmp_path, suffix):
    _, grid = perfect(trimesh.creation.box().apply_translation([5, 6, 7]), Sdf(resolution=16))
    MEDIUM.write(grid, tmp_path / f"box{suffix}")
    theirs = trimesh.load(tmp_path / f"box{suffix}", force="mesh")
    assert theirs.is_watertight
    np.testing.assert_allclose(theirs.centroid, [5, 6, 7], atol=0.02)


def test_a_grid_of_distances_is_written_as_it_is_read(tmp_path):
    content = ball_grid()
    MEDIUM.write(Sdf(truncate=4.0).original(content), tmp_path / "ball.npy")
    again = MEDIUM.read(io.BytesIO((tmp_path / "ball.npy").read_bytes()), "ball.npy", no_other_shape)
    assert again.dtype == np.float32
    np.testing.assert_allclose(again, content, atol=1e-5)


def test_meshes_are_measured_and_grids_are_shown():
    solid, grid = perfect(trimesh.creation.box(), Sdf(resolution=16))
    assert MEDIUM.measurable(solid.mesh)
    assert not MEDIUM.measurable(grid)
    shown = MEDIUM.panels(solid.mesh, grid, no_other_shape)
    assert [panel.mime for panel in shown] == ["image/png"] * 3
    away = MEDIUM.measures(solid.mesh, grid)["chamfer_percent"]
    assert shown[2].caption == f"Chamfer distance {away:.2g} % of the diagonal"
    panels = MEDIUM.panels(grid, grid, no_other_shape)
    assert panels[0].content == panels[1].content == panels[2].content, "nothing is wrong"


# --- a run


def exported(made, kind: str) -> bytes:
    content = made.export(file_type=kind)
    return content.encode() if isinstance(content, str) else content


def hostile(folder: Path) -> dict[str, str]:
    """Files that are no solids, and what their rows say."""
    box = trimesh.creation.box()
    whole = {kind: exported(box, kind) for kind in ("off", "obj", "stl", "ply", "glb")}
    nan = box.copy()
    nan.vertices = np.where(np.arange(24).reshape(8, 3) == 5, np.nan, box.vertices)
    files = {
        "cut.off": (whole["off"][: len(whole["off"]) // 2], "cut off|fewer"),
        "cut.stl": (whole["stl"][:-60], "cut off"),
        "cut.ply": (whole["ply"][:-40], "cut off"),
        "cut.glb": (whole["glb"][:-40], "cut off"),
        "nan.obj": (b"v 0 0 nan\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "NaN or infinite"),
        "nan.stl": (exported(nan, "stl"), "NaN or infinite"),
        "empty.obj": (b"", "an empty file"),
        "sheet.off": (b"OFF\n4 1 0\n0 0 0\n1 0 0\n1 1 0\n0 1 0\n4 0 1 2 3\n", "nothing lies inside: .* wide open"),
        "point.off": (b"OFF\n3 1 0\n1 1 1\n1 1 1\n1 1 1\n3 0 1 2\n", "larger than a point"),
    }
    for name, (content, _) in files.items():
        (folder / name).write_bytes(content)
    return {name: sentence for name, (_, sentence) in files.items()}


def test_meshes_go_through_a_whole_run_and_hostile_files_are_rows_with_a_reason(tmp_path):
    meshes = tmp_path / "meshes"
    meshes.mkdir()
    reasons = hostile(meshes)
    ball = trimesh.creation.icosphere(subdivisions=2)
    opened = trimesh.Trimesh(ball.vertices, ball.faces[ball.triangles_center[:, 2] < 0.9], process=False)
    good = {"ball.ply": ball, "box.glb": trimesh.creation.box((1, 2, 1)), "open.stl": opened}
    for name, made in good.items():
        (meshes / name).write_bytes(exported(made, name[-3:]))
    settings = {
        "dataset": {"kind": "folder", "path": str(meshes), "pattern": "*"},
        "signal": {"kind": "sdf", "pool": 16384, "check": 8000, "resolution": 24},
        "field": {"width": 32, "depth": 2, "omega_0": 10},
        "optimizer": {"kind": "adam", "learning_rate": 2e-3},
        "fit": {"max_steps": 300, "samples": 256, "check_every": 100},
        "track": {"enabled": False},
        "workers": 0,
        "max_failed_fraction": 0.9,
        "output": str(tmp_path / "run"),
    }
    folder, plan = open_run(job_from_settings(settings, []))
    serve(folder, plan, InProcessPool(folder), [])
    table = open_weights(tmp_path / "run")
    rows = {
        row["datum_id"]: row
        for row in table.to_arrow(["datum_id", "status", "reason", "quality", "metrics"]).to_pylist()
    }
    assert set(rows) == {*reasons, *good}
    for name, sentence in reasons.items():
        assert rows[name]["status"] == "decode_error"
        assert re.search(sentence, rows[name]["reason"]), rows[name]["reason"]
    for name in good:
        metrics = dict(rows[name]["metrics"])
        assert rows[name]["status"] == "max_steps"
        assert rows[name]["quality"] > 0.9
        assert metrics["chamfer_percent"] < 1.5
        assert metrics["normal_consistency"] > 0.9
    assert not verify(folder).mismatches
    path = tmp_path / "box.glb"
    shape = table.signal.shape_from("40", table.signal.shape_of(dict(rows["box.glb"]["metrics"])))
    position = table.to_arrow(["datum_id"])["datum_id"].to_pylist().index("box.glb")
    (grid,) = table.decode([position], shape)
    MEDIA["sdf"].write(grid, path)
    assert trimesh.load(path, force="mesh").volume == pytest.approx(2, rel=0.1)
