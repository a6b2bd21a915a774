"""Meshes and voxel grids out of files, good and hostile; what they enclose; meshes and pictures out of grids.

Oracles: trimesh, which writes what is read here and reads what is written; boxes and balls in closed form.
"""

import io
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from nfscale.driver import open_run, serve
from nfscale.errors import CallerError
from nfscale.job import job_from_settings
from nfscale.media import MEDIA, meshes
from nfscale.media.meshes import read_mesh
from nfscale.media.occupancy import OccupancyMedium
from nfscale.media.solids import drawn, mesh_of, solid_of
from nfscale.pool import InProcessPool
from nfscale.signals import Grid, Mesh, Occupancy
from nfscale.store import open_weights
from nfscale.verify import verify
from tests.media.pages import no_other_shape

trimesh = pytest.importorskip("trimesh", reason="pip install 'nfscale[shapes]'")
pytest.importorskip("igl", reason="pip install 'nfscale[shapes]'")

MEDIUM = OccupancyMedium()


def nothing_else(path: str):
    raise AssertionError(f"{path} was opened")


def read(content: bytes, name: str):
    return MEDIUM.read(io.BytesIO(content), name, nothing_else)


def exported(mesh, kind: str, **keys) -> bytes:
    content = mesh.export(file_type=kind, **keys)
    return content.encode() if isinstance(content, str) else content


def lopsided():
    """A closed mesh without symmetry, off the origin."""
    mesh = trimesh.creation.icosphere(subdivisions=2)
    mesh.apply_scale([1, 2, 3])
    mesh.apply_translation([10, 20, 30])
    return mesh


def corners_of(mesh) -> np.ndarray:
    """The triangles by their corners, sorted: [T, 3, 3]."""
    corners = np.asarray(mesh.vertices)[np.asarray(mesh.faces)].reshape(-1, 9)
    return corners[np.lexsort(corners.round(4).T[::-1])].reshape(-1, 3, 3)


# --- formats


@pytest.mark.parametrize(
    ("suffix", "kind", "keys"),
    [
        (".off", "off", {}),
        (".obj", "obj", {}),
        (".stl", "stl", {}),
        (".stl", "stl_ascii", {}),
        (".ply", "ply", {}),
        (".ply", "ply", {"encoding": "ascii"}),
        (".glb", "glb", {}),
    ],
)
def test_what_trimesh_writes_is_read(suffix, kind, keys):
    mesh = lopsided()
    ours = read_mesh(io.BytesIO(exported(mesh, kind, **keys)), suffix)
    assert (ours.vertices.dtype, ours.faces.dtype) == (np.float64, np.int64)
    assert ours.faces.shape == mesh.faces.shape
    np.testing.assert_allclose(ours.vertices[ours.faces], mesh.vertices[mesh.faces], rtol=1e-6)
    assert MEDIUM.read(io.BytesIO(exported(mesh, kind, **keys)), f"A/B{suffix.upper()}", nothing_else)


SQUARE = [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]]
HALVES = [[SQUARE[0], SQUARE[1], SQUARE[2]], [SQUARE[0], SQUARE[2], SQUARE[3]]]
VERTICES = "\n".join(" ".join(map(str, vertex)) for vertex in SQUARE)
OBJ_VERTICES = "\n".join(f"v {x} {y} {z}" for x, y, z in SQUARE)
PLY_HEADER = (
    "ply\nformat {} 1.0\ncomment made by hand\nelement vertex 4\nproperty float x\nproperty float y\n"
    "property float z\nproperty uchar red\nelement face {}\nproperty list uchar int vertex_indices\n"
    "property uchar flags\nend_header\n"
)


def binary_ply(order: str, polygons: list[list[int]]) -> bytes:
    name = {"<": "binary_little_endian", ">": "binary_big_endian"}[order]
    rows = [struct.pack(f"{order}fffB", *vertex, 7) for vertex in SQUARE]
    rows += [struct.pack(f"{order}B{len(p)}iB", len(p), *p, 9) for p in polygons]
    return PLY_HEADER.format(name, len(polygons)).encode() + b"".join(rows)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("quad.off", f"OFF\n4 1 0\n{VERTICES}\n4 0 1 2 3\n"),
        ("counts.off", f"OFF 4 1 0\n{VERTICES}\n4 0 1 2 3 255 0 0\n"),
        ("comment.off", f"# made by hand\nOFF\n\n4 2 0 # counts\n{VERTICES}\n3 0 1 2\n3 0 2 3\n"),
        ("colours.off", "COFF\n4 1 0\n" + "\n".join(f"{x} {y} {z} 9 9 9 255" for x, y, z in SQUARE) + "\n4 0 1 2 3"),
        ("quad.obj", f"mtllib /etc/passwd\no x\n{OBJ_VERTICES}\nvn 0 0 1\nusemtl a\nf 1/1/1 2//1 3/3 4\n"),
        ("back.obj", f"{OBJ_VERTICES}\nf -4 -3 -2\nf -4 -2 -1\nl 1 2\n"),
        ("long.obj", f"{OBJ_VERTICES}\nf 1 2 \\\n3 4\n"),
        (
            "quad.ply",
            PLY_HEADER.format("ascii", 1) + "\n".join(f"{x} {y} {z} 7" for x, y, z in SQUARE) + "\n4 0 1 2 3 9",
        ),
        ("little.ply", binary_ply("<", [[0, 1, 2, 3]])),
        ("big.ply", binary_ply(">", [[0, 1, 2], [0, 2, 3]])),
        ("mixed.ply", binary_ply("<", [[0, 1], [0, 1, 2, 3]])),
        ("mixed.ply", binary_ply(">", [[0, 1, 2], [0, 1], [0, 2, 3]])),
    ],
)
def test_polygons_are_fans_and_what_else_there_is_is_passed_over(name, content):
    content = content.encode() if isinstance(content, str) else content
    mesh = read_mesh(io.BytesIO(content), Path(name).suffix)
    assert mesh.vertices[mesh.faces].tolist() == HALVES


def test_a_binary_stl_may_begin_as_a_text_does():
    content = bytearray(exported(lopsided(), "stl"))
    content[:5] = b"solid"
    assert len(read_mesh(io.BytesIO(bytes(content)), ".stl").faces) == len(lopsided().faces)


def glb(scene: dict, binary: bytes = b"") -> bytes:
    described = json.dumps({"asset": {"version": "2.0"}} | scene).encode()
    described += b" " * (-len(described) % 4)
    chunks = struct.pack("<I4s", len(described), b"JSON") + described
    chunks += struct.pack("<I4s", len(binary), b"BIN\0") + binary if binary else b""
    return b"glTF" + struct.pack("<II", 2, 12 + len(chunks)) + chunks


TRIANGLE = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], "<f4")
SCENE = {
    "scenes": [{"nodes": [0]}],
    "nodes": [{"mesh": 0}],
    "meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}],
    "accessors": [{"componentType": 5126, "count": 3, "type": "VEC3", "bufferView": 0}],
    "bufferViews": [{"buffer": 0, "byteLength": 36}],
    "buffers": [{"byteLength": 36}],
}


def test_nodes_of_a_glb_are_where_the_scene_has_them():
    mesh = lopsided()
    scene = trimesh.Scene()
    first = trimesh.transformations.compose_matrix(scale=[1, 2, 3], angles=[0.1, 0.2, 0.3], translate=[5, 6, 7])
    second = trimesh.transformations.compose_matrix(angles=[0, 0, 1.0], translate=[-1, 0, 0])
    scene.add_geometry(mesh, node_name="a", geom_name="m", transform=first)
    scene.add_geometry(mesh, node_name="b", geom_name="m", parent_node_name="a", transform=second)
    ours = read_mesh(io.BytesIO(scene.export(file_type="glb")), ".glb")
    np.testing.assert_allclose(corners_of(ours), corners_of(scene.to_geometry()), rtol=1e-5, atol=1e-5)


def test_a_node_may_be_turned_scaled_and_moved():
    half = 0.5**0.5
    node = {"mesh": 0, "rotation": [0, 0, half, half], "scale": [2, 3, 4], "translation": [10, 0, 0]}
    mesh = read_mesh(io.BytesIO(glb(SCENE | {"nodes": [node]}, TRIANGLE.tobytes())), ".glb")
    np.testing.assert_allclose(mesh.vertices, [[10, 0, 0], [10, 2, 0], [7, 0, 0]], atol=1e-6)


def test_rows_of_a_buffer_may_lie_apart():
    rows = np.zeros((3, 5), "<f4")
    rows[:, 1:4] = TRIANGLE
    views = [{"buffer": 0, "byteLength": 60, "byteStride": 20, "byteOffset": 0}]
    accessors = [SCENE["accessors"][0] | {"byteOffset": 4}]
    content = glb(SCENE | {"bufferViews": views, "accessors": accessors}, rows.tobytes())
    assert np.array_equal(read_mesh(io.BytesIO(content), ".glb").vertices, TRIANGLE)


# --- hostile files


PLY_LIE = (
    b"ply\nformat %s 1.0\nelement vertex %d\nproperty float x\nproperty float y\nproperty float z\n"
    b"element face 1\nproperty list %s int vertex_indices\nend_header\n"
)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        *[(f"empty{suffix}", b"", "empty") for suffix in meshes.READERS],
        *[(f"noise{suffix}", b"\x89PNG\r\n\x1a\n" + bytes(range(256)), r"\w+ \w+") for suffix in meshes.READERS],
        ("a.off", b"OFF\n1000000000 1000000000 0\n0 0 0\n", "claims 1000000000 vertices, there are at most 1"),
        ("a.off", b"OFF\n1 2 0\n0 0 0\n3 0 0 0\n", "claims 2 faces, there are at most 1"),
        ("a.off", b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 3\n", "the vertex 3; there are 3"),
        ("a.off", b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 -1\n", "the vertex -1; there are 3"),
        ("a.off", b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 nan 0\n3 0 1 2\n", "NaN or infinite"),
        ("a.off", b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1\n3 0 1 2\n", "fewer than three numbers"),
        ("a.off", b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 x 1\n3 0 1 2\n", "no three numbers"),
        ("a.off", b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n999999999 0 1 2\n", "claims 999999999 vertices of a face"),
        ("a.off", b"OFF\n3 0 0\n0 0 0\n1 0 0\n0 1 0\n", "no faces: 3 vertices alone"),
        ("a.off", b"4OFF\n3 0 0\n", "not an OFF file"),
        ("a.off", b"OFF\n-3 -1 0\n", "claims -3 vertices"),
        ("a.obj", b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 4\n", "the vertex 3; there are 3, counted from 0"),
        ("a.obj", b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 0 1 2\n", "the vertex 0; an OBJ file counts from 1"),
        ("a.obj", b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf -9 1 2\n", "the vertex -6"),
        ("a.obj", b"v 0 0 inf\nv 1 0 0\nv 0 1 0\nf 3 1 2\n", "NaN or infinite"),
        ("a.obj", b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf a b c\n", "no list of numbers"),
        ("a.obj", b"v 0 0 0\nv 1 0 0\n", "no faces"),
        ("a.stl", bytes(80) + struct.pack("<I", 4_000_000_000) + bytes(100), "claims 4000000000 triangles, .* most 2"),
        ("a.stl", bytes(80) + struct.pack("<I", 0), "no faces"),
        ("a.stl", bytes(40), "less than its header"),
        ("a.stl", b"solid x\nfacet\nvertex 0 0 0\nvertex 1 0 0\n", "2 corners"),
        ("a.stl", bytes(80) + struct.pack("<I12fH", 1, *[np.nan] * 12, 0), "NaN or infinite"),
        ("a.ply", PLY_LIE % (b"binary_little_endian", 10**9, b"uchar") + bytes(50), "claims 1000000000 rows of vertex"),
        ("a.ply", PLY_LIE % (b"ascii", 10**9, b"uchar") + b"0 0 0\n", "claims 1000000000 rows of vertex"),
        ("a.ply", PLY_LIE % (b"binary_little_endian", 1, b"uint") + bytes(12) + b"\xff" * 8, "numbers of a list"),
        ("a.ply", PLY_LIE % (b"binary_little_endian", 1, b"uint") + bytes(12) + b"\xff\xff\xff\x07" * 2, "list"),
        ("a.ply", PLY_LIE % (b"binary_big_endian", 1, b"char") + bytes(12) + b"\xff" * 8, "numbers of a list"),
        ("a.ply", PLY_LIE.replace(b"float x", b"string x") % (b"ascii", 1, b"uchar"), "not a PLY file, or a damaged"),
        ("a.ply", b"ply\nformat ascii 2.0\nend_header\n", "unknown line 'format ascii 2.0'"),
        ("a.ply", b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nend_header\n1\n", "have no y, z"),
        ("a.ply", b"ply\nproperty float x\nend_header\n", "damaged"),
        ("a.glb", glb(SCENE, TRIANGLE.tobytes())[:-20], "cut off"),
        ("a.glb", glb(SCENE | {"nodes": [{"mesh": 0, "children": [0]}]}, TRIANGLE.tobytes()), "its own ancestor"),
        ("a.glb", glb(SCENE | {"nodes": [{"children": [1, 1]}, {"mesh": 0}]}, TRIANGLE.tobytes()), "two parents"),
        ("a.glb", glb(SCENE | {"buffers": [{"uri": "/etc/passwd", "byteLength": 36}]}), "refers to another file"),
        ("a.glb", glb(SCENE | {"extensionsRequired": ["KHR_draco_mesh_compression"]}), "compressed by KHR_draco"),
        (
            "a.glb",
            glb(SCENE | {"accessors": [SCENE["accessors"][0] | {"count": 10**12}]}, TRIANGLE.tobytes()),
            "claims 1000000000000 rows",
        ),
        (
            "a.glb",
            glb(SCENE | {"accessors": [{"componentType": 5126, "count": 10**12, "type": "VEC3"}]}),
            "not in its buffer",
        ),
        (
            "a.glb",
            glb(SCENE | {"bufferViews": [{"buffer": 0, "byteOffset": -36}]}, TRIANGLE.tobytes()),
            "a header that lies",
        ),
        ("a.glb", b"glTF" + struct.pack("<IIII", 2, 99, 2**32 - 1, 0) + b"{}", "claims 4294967295 bytes"),
        ("a.glb", glb({"nodes": 5}), "not a GLB file, or a damaged one"),
        ("a.glb", glb({}), "no faces"),
        ("a.fbx", b"x", "no kind of mesh .* '.fbx'; known are .glb"),
    ],
)
def test_a_hostile_mesh_is_refused_in_a_sentence(name, content, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        read(content, name)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("kind", ["off", "obj", "stl", "stl_ascii", "ply", "glb"])
def test_damage_anywhere_is_a_mesh_or_a_sentence(kind):
    content = exported(trimesh.creation.box(), kind)
    draw = np.random.default_rng(0)
    refused = 0
    for length in range(0, len(content), max(1, len(content) // 150)):
        damaged = bytearray(content)
        for place in draw.integers(0, len(content), 3):
            damaged[place] = draw.integers(256)
        for broken in (content[:length], bytes(damaged)):
            try:
                mesh = read_mesh(io.BytesIO(broken), f".{kind[:3]}")
            except ValueError:
                refused += 1
            else:
                assert 0 <= mesh.faces.min() <= mesh.faces.max() < len(mesh.vertices)
    assert refused > 100


def test_sizes_are_bounded(monkeypatch):
    content = exported(trimesh.creation.box(), "off")
    monkeypatch.setattr(meshes, "MAX_FACES", 11)
    with pytest.raises(ValueError, match="12 triangles, at most 11"):
        read(content, "a.off")
    with pytest.raises(ValueError, match="12 triangles, at most 11"):
        read(exported(trimesh.creation.box(), "stl"), "a.stl")
    monkeypatch.setattr(meshes, "MAX_TEXT_BYTES", 100)
    with pytest.raises(ValueError, match=r"too large.*binary PLY"):
        read(content, "a.off")
    monkeypatch.setattr(meshes, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="too large"):
        read(content, "a.off")


# --- what lies inside


def inside_of(mesh) -> np.ndarray:
    """At the points of a grid that has none on the faces of a cube from -1/2 to 1/2."""
    axis = np.linspace(-0.95, 0.95, 20)
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    return solid_of(Mesh(np.asarray(mesh.vertices, float), np.asarray(mesh.faces, np.int64))).inside(points)


def test_a_closed_surface_encloses_its_inside_whichever_way_it_faces():
    cube = trimesh.creation.box()
    axis = np.abs(np.linspace(-0.95, 0.95, 20)) < 0.5
    expected = (axis[:, None, None] & axis[:, None] & axis).reshape(-1)
    assert np.array_equal(inside_of(cube), expected)
    cube.invert()
    assert np.array_equal(inside_of(cube), expected)


def test_two_bodies_that_overlap_are_their_union():
    both = trimesh.creation.box()
    other = trimesh.creation.box().apply_translation([0.3, 0.3, 0])
    union = inside_of(trimesh.util.concatenate([both, other]))
    assert np.array_equal(union, inside_of(both) | inside_of(other))


def test_a_surface_with_a_hole_has_an_inside_nevertheless():
    ball = trimesh.creation.icosphere(subdivisions=3, radius=0.7)
    open_ball = trimesh.Trimesh(ball.vertices, ball.faces[ball.triangles_center[:, 2] < 0.65], process=False)
    assert not open_ball.is_watertight
    assert (inside_of(open_ball) != inside_of(ball)).mean() < 0.01


@pytest.mark.parametrize("sizes", [(1, 1, 0), (1, 0, 0)])
def test_a_flat_mesh_is_read_and_has_no_samples(sizes):
    flat = trimesh.creation.box()
    flat.vertices *= sizes
    solid = read(exported(flat, "off"), "flat.off")
    with pytest.raises(ValueError, match="flat"):
        Occupancy(pool=100, check=1000).samples(solid)


def test_an_open_sheet_has_no_inside():
    sheet = read(f"OFF\n4 1 0\n{VERTICES}\n4 0 1 2 3\n".encode(), "sheet.off")
    with pytest.raises(ValueError, match="nothing lies inside: the surface is flat, wide open"):
        Occupancy(pool=100, check=1000).samples(sheet)


# --- voxel grids


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


VOXELS = np.random.default_rng(0).random((4, 5, 6)) < 0.5


@pytest.mark.parametrize(
    "content", [npy(VOXELS), npy(np.asfortranarray(VOXELS)), npy(VOXELS.astype(np.uint8)), npz(voxels=VOXELS)]
)
def test_a_voxel_grid_is_read(content):
    assert np.array_equal(read(content, "a.npy"), VOXELS)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "."),
        (b"\x93NUMPY", "."),
        (npy(VOXELS)[:-7], "cut off: 113 bytes of values, the header claims 120"),
        (npy(VOXELS).replace(b"(4, 5, 6)", b"(4, 5, 6x"), "."),
        (npy(VOXELS[0]), r"got bool \[5, 6\]"),
        (npy(np.array([["a"]])), "got <U1"),
        (npz(a=VOXELS, b=VOXELS), "2 arrays; expected one"),
        (npz(a=VOXELS)[:-30], "."),
        (b"PK" + bytes(50), "."),
    ],
)
def test_a_hostile_grid_is_refused(content, sentence):
    with pytest.raises(ValueError, match=sentence):
        read(content, "a.npy")


def test_a_grid_that_claims_to_be_gigantic_is_refused_by_its_header():
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|b1", "fortran_order": False, "shape": (10**5,) * 3})
    with pytest.raises(ValueError, match="100000 x 100000 x 100000; from 1 to 134217728"):
        read(buffer.getvalue() + bytes(10), "a.npy")


def test_a_grid_of_objects_is_not_unpickled():
    with pytest.raises(ValueError, match="got object"):
        read(npy(np.array([[[{}]]])), "a.npy")


# --- out of grids


def ball_grid(size: int = 24, centre=(10.0, 20.0, 30.0), scale: float = 5.0) -> Grid:
    """Logits of a ball of radius 0.6 in the coordinates of the field."""
    coordinates = Occupancy().coordinates((size,) * 3).numpy().reshape(size, size, size, 3)
    return Grid((0.6 - np.linalg.norm(coordinates, axis=3)).astype(np.float32), centre, scale)


def test_marching_cubes_give_the_surface_in_the_datums_own_coordinates():
    mesh = mesh_of(ball_grid())
    radii = np.linalg.norm(mesh.vertices - [10, 20, 30], axis=1)
    np.testing.assert_allclose(radii, 0.6 * 5, rtol=0.02)
    made = trimesh.Trimesh(mesh.vertices, mesh.faces)
    assert made.is_watertight
    assert made.volume == pytest.approx(4 / 3 * np.pi * 3**3, rel=0.02), "faces look outwards"


def test_surfaces_close_at_the_end_of_the_grid():
    full = Grid(np.ones((3, 4, 5), np.float32))
    made = trimesh.Trimesh(*(getattr(mesh_of(full), name) for name in ("vertices", "faces")))
    assert made.is_watertight
    np.testing.assert_allclose(np.ptp(made.vertices, axis=0), np.array([3, 4, 5]) * 2 / 5, rtol=1e-6)


@pytest.mark.parametrize("suffix", [".obj", ".ply", ".off", ".stl", ".glb"])
def test_what_is_written_opens_elsewhere_and_here(tmp_path, suffix):
    assert suffix in MEDIUM.written
    path = tmp_path / f"ball{suffix}"
    MEDIUM.write(ball_grid(), path)
    theirs = trimesh.load(path, force="mesh")
    assert theirs.is_watertight
    np.testing.assert_allclose(theirs.centroid, [10, 20, 30], atol=0.05)
    ours = read(path.read_bytes(), path.name)
    np.testing.assert_allclose(corners_of(ours.mesh), corners_of(mesh_of(ball_grid())), rtol=1e-5)


def test_a_grid_is_written_as_it_is_read(tmp_path):
    path = tmp_path / "voxels.npy"
    content = read(npy(VOXELS), "a.npy")
    signal = Occupancy()
    MEDIUM.write(signal.original(content), path)
    assert np.array_equal(read(path.read_bytes(), path.name), VOXELS)


def test_a_field_that_has_nothing_inside_is_told(tmp_path):
    empty = Grid(np.full((3, 3, 3), -1, np.float32))
    with pytest.raises(CallerError, match="nothing inside"):
        MEDIUM.write(empty, tmp_path / "a.obj")
    assert not (tmp_path / "a.obj").exists()
    assert [panel.mime for panel in MEDIUM.panels(mesh_of(ball_grid()), empty, no_other_shape)] == ["image/png"]


def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "igl", None)
    monkeypatch.setitem(sys.modules, "trimesh", None)
    with pytest.raises(CallerError, match=r"libigl; pip install 'nfscale\[shapes\]'"):
        read(exported(lopsided(), "off"), "a.off")
    with pytest.raises(CallerError, match=r"trimesh; pip install 'nfscale\[shapes\]'"):
        MEDIUM.write(ball_grid(), tmp_path / "a.obj")


# --- pictures


def test_the_nearer_of_two_triangles_is_seen():
    near, far = [[-1, -1, 1], [1, -1, 1], [0, 1, 1]], [[-3, -3, -1], [3, -3, -1], [0, 3, -1]]
    mesh = Mesh(np.array([*near, *far], float), np.arange(6).reshape(2, 3))
    for order in ([0, 1], [1, 0]):
        shown = Mesh(mesh.vertices, mesh.faces[order])
        wrong = np.array([1.0, 0.0])[order]  # the near one is red
        image = drawn(shown, shown, 0.0, 0.0, wrong).astype(int)
        size = len(image)
        red, clay = image[int(0.52 * size), size // 2], image[int(0.9 * size), size // 2]
        assert red[0] > red[2]
        assert clay[2] > clay[0]
        assert red[3] == clay[3] == 255
        assert image[2, 2, 3] == 0
        assert image[int(0.05 * size), size // 2, 3] == 255, "y points up"


def test_a_page_shows_the_original_the_rebuilt_and_the_error():
    grid = ball_grid(12)
    panels = MEDIUM.panels(mesh_of(grid), grid, no_other_shape)
    assert [panel.mime for panel in panels] == ["image/png"] * 3
    assert panels[0].content == panels[1].content == panels[2].content, "nothing is wrong"


# --- a run


def test_voxel_grids_go_through_a_whole_run(tmp_path):
    coordinates = Occupancy().coordinates((10, 10, 10)).reshape(10, 10, 10, 3)
    grids = [(coordinates.norm(dim=3) < radius).numpy() for radius in np.linspace(0.5, 0.9, 6)]
    np.savez(tmp_path / "grids.npz", images=np.stack([*grids, np.zeros_like(grids[0])]))
    settings = {
        "dataset": {"kind": "npz", "path": str(tmp_path / "grids.npz")},
        "signal": {"kind": "occupancy"},
        "field": {"width": 16, "depth": 2, "omega_0": 10},
        "optimizer": {"kind": "adam", "learning_rate": 5e-3},
        "fit": {"max_steps": 200, "samples": 128, "check_every": 100},
        "track": {"enabled": False},
        "workers": 0,
        "max_failed_fraction": 0.5,
        "output": str(tmp_path / "run"),
    }
    folder, plan = open_run(job_from_settings(settings, []))
    serve(folder, plan, InProcessPool(folder), [])
    table = open_weights(tmp_path / "run")
    rows = table.to_arrow(["status", "quality", "reason", "metrics"]).to_pylist()
    assert [row["status"] for row in rows] == ["max_steps"] * 6 + ["decode_error"]
    assert rows[-1]["reason"].startswith("nothing lies inside")
    assert min(row["quality"] for row in rows[:-1]) > 0.8
    assert dict(rows[0]["metrics"])["size_x"] == 10
    assert not verify(folder).mismatches
    (grid,) = table.decode([3], table.signal.shape_from("20", (10, 10, 10, 5.0, 5.0, 5.0, 5.0)))
    made = mesh_of(grid)
    assert made.vertices.min() > 0
    assert made.vertices.max() < 10
    assert MEDIA["occupancy"].panels(table.signal.original(grids[3]), grid, no_other_shape)
