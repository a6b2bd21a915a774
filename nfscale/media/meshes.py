"""Triangle meshes out of files that strangers wrote: OFF, OBJ, STL, PLY and GLB.

Files are hostile, so nothing is believed before the bytes behind it have been counted: a header that claims a
billion vertices is refused by the length of the file. No reader follows a name to another file: material libraries
of OBJ and textures are passed over, buffers of a GLB that lie elsewhere are refused. Polygons become fans of
triangles. What comes out is checked once, for all formats: some faces, no face of vertices that do not exist, no
vertex that is no number.
"""

import json
import struct
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import numpy as np

from nfscale.signals.solids import Mesh

MAX_BYTES = 512 << 20
"""Of a binary file: ten million triangles as STL."""
MAX_TEXT_BYTES = 128 << 20
"""Of a text: while it is parsed it takes ten times its size in memory. Binary PLY holds the same in a fifth."""
MAX_FACES = 10_000_000
"""Triangles of a mesh: 0.7 GB with their corners, and an hour for its winding numbers."""

_GLB_TRIANGLES = 4
_GLB_TYPES = {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
_PLY_TYPES = {
    name: code
    for code, names in {
        "i1": "char int8", "u1": "uchar uint8", "i2": "short int16", "u2": "ushort uint16",
        "i4": "int int32", "u4": "uint uint32", "f4": "float float32", "f8": "double float64",
    }.items()
    for name in names.split()
}  # fmt: skip
_PLY_ORDERS = {"ascii": None, "binary_little_endian": "<", "binary_big_endian": ">"}


def read_mesh(stream: BinaryIO, suffix: str) -> Mesh:
    """The triangles of a file of one of `READERS`.

    Raises:
        ValueError: in a sentence that becomes the row's reason.
    """
    from nfscale.datasets.folder import reason_of

    content = stream.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"too large: at most {MAX_BYTES >> 20} MiB of a mesh are read")
    if not content:
        raise ValueError("an empty file")
    try:
        mesh = READERS[suffix](content)
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError, struct.error, OverflowError) as error:
        raise ValueError(f"not a {suffix[1:].upper()} file, or a damaged one: {type(error).__name__}") from error
    except (ValueError, MemoryError) as error:
        raise ValueError(reason_of(error)) from error
    return checked(mesh)


def checked(mesh: Mesh) -> Mesh:
    """The mesh itself, if it has triangles, and these have three corners that are numbers.

    Raises:
        ValueError: saying what is wrong.
    """
    count, faces = len(mesh.vertices), mesh.faces
    if not len(faces):
        raise ValueError(f"no faces: {count} vertices alone are no surface")
    if len(faces) > MAX_FACES:
        raise ValueError(f"too large: {len(faces)} triangles, at most {MAX_FACES} are read")
    if faces.min() < 0 or faces.max() >= count:
        wrong = faces.max() if faces.max() >= count else faces.min()
        raise ValueError(f"a face has the vertex {wrong}; there are {count}, counted from 0")
    if not np.isfinite(mesh.vertices).all():
        raise ValueError("vertices that are NaN or infinite")
    return mesh


def _mesh(vertices: Any, faces: np.ndarray) -> Mesh:
    return Mesh(np.ascontiguousarray(vertices, np.float64).reshape(-1, 3), np.ascontiguousarray(faces, np.int64))


def _fans(polygons: Sequence[Sequence[int]]) -> np.ndarray:
    """Polygons [K_i] as triangles int64 [T, 3], those of few corners first; of fewer than 3 none."""
    lengths = np.fromiter(map(len, polygons), np.int64, len(polygons))
    _refuse_many(int((lengths - 2).clip(0).sum()))
    parts = [np.empty((0, 3), np.int64)]
    for length in np.unique(lengths[lengths >= 3]):
        rows = np.array([polygons[place] for place in np.flatnonzero(lengths == length).tolist()], np.int64)
        parts.append(_fan(rows))
    return np.concatenate(parts)


def _fan(rows: np.ndarray) -> np.ndarray:
    """Polygons of equally many corners [K, n] as triangles [K * (n - 2), 3]."""
    first = np.broadcast_to(rows[:, :1], rows[:, 2:].shape)
    return np.stack([first, rows[:, 1:-1], rows[:, 2:]], axis=2).reshape(-1, 3)


def _refuse_many(faces: int) -> None:
    if faces > MAX_FACES:
        raise ValueError(f"too large: {faces} triangles, at most {MAX_FACES} are read")


def _lines(content: bytes) -> list[bytes]:
    """The lines of a text that hold more than a comment."""
    if len(content) > MAX_TEXT_BYTES:
        raise ValueError(f"too large: at most {MAX_TEXT_BYTES >> 20} MiB of text are read; binary PLY takes less")
    stripped = (line.partition(b"#")[0].strip() for line in content.splitlines())
    return [line for line in stripped if line]


def _numbers(lines: Sequence[bytes], what: str) -> np.ndarray:
    """The first three numbers of each line: float64 [N, 3].

    Raises:
        ValueError: if a line has fewer, or something else.
    """
    rows = [line.split(None, 3)[:3] for line in lines]
    if any(len(row) != 3 for row in rows):
        raise ValueError(f"{what} has fewer than three numbers")
    try:
        return np.array(rows, dtype=np.bytes_).astype(np.float64).reshape(-1, 3)
    except ValueError as error:
        raise ValueError(f"{what} is no three numbers") from error


def _integers(tokens: Sequence[bytes], what: str) -> list[int]:
    try:
        return [int(token) for token in tokens]
    except ValueError as error:
        raise ValueError(f"{what} is no list of numbers") from error


def _require_left(wanted: int, left: int, what: str) -> None:
    if not 0 <= wanted <= left:
        raise ValueError(f"cut off, or a header that lies: it claims {wanted} {what}, there are at most {left}")


def _read_off(content: bytes) -> Mesh:
    lines = _lines(content)
    keyword, *rest = lines[0].split() if lines else [b""]
    if not keyword.endswith(b"OFF") or keyword.startswith((b"4", b"n")) or rest[:1] == [b"BINARY"]:
        raise ValueError("not an OFF file of text in three dimensions: it does not begin with OFF")
    counts = rest or (lines[1].split() if len(lines) > 1 else [])
    start = 1 if rest else 2
    if len(counts) < 2:
        raise ValueError("an OFF file without the numbers of its vertices and faces")
    vertices, faces = _integers(counts[:2], "the header")
    _require_left(vertices, len(lines) - start, "vertices")
    _require_left(faces, len(lines) - start - vertices, "faces")
    corners = lines[start : start + vertices]
    polygons = []
    for line in lines[start + vertices : start + vertices + faces]:
        length, *tokens = line.split()
        (count,) = _integers([length], "a face")
        _require_left(count, len(tokens), "vertices of a face")
        polygons.append(_integers(tokens[:count], "a face"))
    return _mesh(_numbers(corners, "a vertex"), _fans(polygons))


def _read_obj(content: bytes) -> Mesh:
    """Vertices and faces; materials, groups, curves and what else there is are passed over."""
    corners, polygons = [], []
    for line in _lines(content.replace(b"\\\r\n", b" ").replace(b"\\\n", b" ")):
        keyword, _, rest = line.partition(b" ")
        if keyword == b"v":
            corners.append(rest)
        elif keyword == b"f":
            numbers = _integers([token.partition(b"/")[0] for token in rest.split()], "a face")
            if 0 in numbers:
                raise ValueError("a face has the vertex 0; an OBJ file counts from 1, or from -1 backwards")
            polygons.append([number - 1 if number > 0 else len(corners) + number for number in numbers])
    if not corners:
        raise ValueError("not an OBJ file, or one without vertices")
    return _mesh(_numbers(corners, "a vertex"), _fans(polygons))


def _read_stl(content: bytes) -> Mesh:
    claimed = struct.unpack_from("<I", content, 80)[0] if len(content) >= 84 else -1
    if 84 + 50 * claimed != len(content) and content.lstrip()[:5].lower() == b"solid":
        lines = [line.partition(b" ")[2] for line in _lines(content) if line[:7].lower() == b"vertex "]
        if not lines or len(lines) % 3:
            raise ValueError(f"an STL file of text with {len(lines)} corners; expected three for each triangle")
        vertices = _numbers(lines, "a corner")
    else:
        if claimed < 0:
            raise ValueError(f"not an STL file: {len(content)} bytes are less than its header")
        _require_left(claimed, (len(content) - 84) // 50, "triangles")
        _refuse_many(claimed)
        rows = np.frombuffer(content, np.dtype([("numbers", "<f4", (4, 3)), ("attribute", "<u2")]), claimed, 84)
        vertices = rows["numbers"][:, 1:].reshape(-1, 3)
    return _mesh(vertices, np.arange(len(vertices)).reshape(-1, 3))


# --- PLY


def _read_ply(content: bytes) -> Mesh:
    order, elements, start = _ply_header(content)
    columns: dict[str, dict[str, Any]] = {}
    lines = _lines(content[start:]) if order is None else []
    for name, count, properties in elements:
        if order is None:
            _require_left(count, len(lines), f"rows of {name}")
            columns[name] = _ply_text(lines[:count], properties)
            lines = lines[count:]
        else:
            columns[name], start = _ply_binary(content, start, count, properties, order, name)
    vertex, face = columns.get("vertex", {}), columns.get("face", {})
    if missing := {"x", "y", "z"} - set(vertex):
        raise ValueError(f"a PLY file whose vertices have no {', '.join(sorted(missing))}")
    polygons = face.get("vertex_indices", face.get("vertex_index"))
    if polygons is None:
        raise ValueError("a PLY file without faces: a cloud of points, or strips of triangles, which are not read")
    faces = _fan(polygons.astype(np.int64)) if isinstance(polygons, np.ndarray) else _fans(polygons)
    return _mesh(np.stack([np.asarray(vertex[axis], np.float64) for axis in "xyz"], axis=1), faces)


_Properties = list[tuple[str, str, str | None]]
"""(name, type, type of the count of a list or None) of each property of an element."""


def _ply_header(content: bytes) -> tuple[str | None, list[tuple[str, int, _Properties]], int]:
    """Byte order (None: text), elements (name, count, properties), and where the values begin."""
    end = content.find(b"end_header", 0, 1 << 16)
    if content[:3] != b"ply" or end < 0:
        raise ValueError("not a PLY file: it has no header from ply to end_header")
    order: str | None = "?"
    elements: list[tuple[str, int, _Properties]] = []
    for line in content[:end].decode("ascii", "replace").splitlines()[1:]:
        match line.split():
            case ["format", kind, "1.0"] if kind in _PLY_ORDERS:
                order = _PLY_ORDERS[kind]
            case ["element", name, count] if count.isdecimal():
                elements.append((name, int(count), []))
            case ["property", "list", counts, kind, name]:
                elements[-1][2].append((name, _PLY_TYPES[kind], _PLY_TYPES[counts]))
            case ["property", kind, name]:
                elements[-1][2].append((name, _PLY_TYPES[kind], None))
            case ["format" | "element" | "property", *_]:
                raise ValueError(f"a PLY file with the unknown line {line.strip()[:60]!r} in its header")
    if order == "?":
        raise ValueError("a PLY file that does not say its format")
    return order, elements, content.index(b"\n", end) + 1


def _ply_text(lines: list[bytes], properties: _Properties) -> dict[str, Any]:
    """Columns of an element by name: a list of numbers, or of lists of them."""
    columns: dict[str, list[Any]] = {name: [] for name, _, _ in properties}
    for line in lines:
        tokens, place = line.split(), 0
        for name, kind, counts in properties:
            if counts is None:
                columns[name].append(float(tokens[place]))
                place += 1
                continue
            count = int(tokens[place])
            _require_left(count, len(tokens) - place - 1, "numbers of a list")
            values = tokens[place + 1 : place + 1 + count]
            columns[name].append(list(map(float, values)) if kind[0] == "f" else _integers(values, "a face"))
            place += 1 + count
    return columns


def _ply_binary(
    content: bytes, start: int, count: int, properties: _Properties, order: str, name: str
) -> tuple[dict[str, Any], int]:
    """Columns of an element by name, and where it ends; lists as an array [K, n] where all are of one length."""
    if not count or not properties:
        return {key: np.empty((0, 3)) if counts else np.empty(0) for key, _, counts in properties}, start
    lengths, place = {}, start  # of the lists of the first row: mostly all rows have the same
    for key, kind, counts in properties:
        if counts is not None:
            (lengths[key],) = np.frombuffer(content, order + counts, 1, place).tolist()
            _require_left(lengths[key], len(content), "numbers of a list")
            place += np.dtype(counts).itemsize
        place += np.dtype(kind).itemsize * lengths.get(key, 1)
    fields = []
    for key, kind, counts in properties:
        fields += [] if counts is None else [(f"{key} count", order + counts)]
        fields.append((key, order + kind, (lengths[key],)) if counts else (key, order + kind))
    row = np.dtype(fields)
    if count * row.itemsize <= len(content) - start:
        rows = np.frombuffer(content, row, count, start)
        if all((rows[f"{key} count"] == length).all() for key, length in lengths.items()):
            return {key: rows[key] for key, _, _ in properties}, start + count * row.itemsize
    if not lengths:
        _require_left(count, (len(content) - start) // row.itemsize, f"rows of {name}")
    least = sum(np.dtype(counts or kind).itemsize for _, kind, counts in properties)
    _require_left(count, (len(content) - start) // least, f"rows of {name}")
    return _ply_lists(content, start, count, properties, order)


def _ply_lists(
    content: bytes, start: int, count: int, properties: _Properties, order: str
) -> tuple[dict[str, Any], int]:
    """As `_ply_binary`, row by row: for lists of several lengths."""
    columns: dict[str, list[Any]] = {name: [] for name, _, _ in properties}
    codes = {code: struct.Struct(order + letter) for code, letter in zip(
        ("i1", "u1", "i2", "u2", "i4", "u4", "f4", "f8"), "bBhHiIfd", strict=True
    )}  # fmt: skip
    for _ in range(count):
        for name, kind, counts in properties:
            length = 1
            if counts is not None:
                (length,) = codes[counts].unpack_from(content, start)
                start += codes[counts].size
                _require_left(int(length), (len(content) - start) // codes[kind].size, "numbers of a list")
            one = codes[kind]
            values = [one.unpack_from(content, start + one.size * place)[0] for place in range(int(length))]
            columns[name].append(values if counts is not None else values[0])
            start += one.size * int(length)
    return columns, start


# --- GLB


def _read_glb(content: bytes) -> Mesh:
    """The triangles of all nodes of the scene, each in its place: glTF 2.0 in its binary form."""
    if content[:4] != b"glTF" or struct.unpack_from("<I", content, 4)[0] != 2:
        raise ValueError("not a GLB file of glTF 2.0")
    scene, binary = _glb_chunks(content)
    if unknown := [name for name in scene.get("extensionsRequired", ()) if "compression" in name]:
        raise ValueError(f"a GLB file compressed by {', '.join(map(str, unknown))}, which is not read")
    vertices, faces, count = [np.empty((0, 3))], [np.empty((0, 3), np.int64)], 0
    for mesh, place in _glb_nodes(scene):
        for primitive in scene["meshes"][mesh]["primitives"]:
            if primitive.get("mode", _GLB_TRIANGLES) != _GLB_TRIANGLES:
                continue  # points, lines; strips are rare
            corners = _glb_accessor(scene, binary, primitive["attributes"]["POSITION"], 3).astype(np.float64)
            indices = np.arange(len(corners))
            if "indices" in primitive:
                indices = _glb_accessor(scene, binary, primitive["indices"], 1)[:, 0].astype(np.int64)
            _refuse_many(sum(map(len, faces)) + len(indices) // 3)
            if len(indices) and indices.max() >= len(corners):
                raise ValueError(f"a face has the vertex {indices.max()}; there are {len(corners)}, counted from 0")
            vertices.append(corners @ place[:3, :3].T + place[:3, 3])
            faces.append(indices[: len(indices) // 3 * 3].reshape(-1, 3) + count)
            count += len(corners)
    return _mesh(np.concatenate(vertices), np.concatenate(faces))


def _glb_chunks(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The description of the scene, and the buffer behind it."""
    length, kind = struct.unpack_from("<I4s", content, 12)
    _require_left(length, len(content) - 20, "bytes of its description")
    if kind != b"JSON" or length > MAX_TEXT_BYTES:
        raise ValueError("a GLB file that does not begin with its description, or with too long a one")
    scene = json.loads(content[20 : 20 + length])
    start = 20 + length
    if len(content) < start + 8:
        return scene, b""
    length, _ = struct.unpack_from("<I4s", content, start)
    _require_left(length, len(content) - start - 8, "bytes of its buffer")
    return scene, content[start + 8 : start + 8 + length]


def _glb_nodes(scene: dict[str, Any]) -> list[tuple[int, np.ndarray]]:
    """(mesh, matrix [4, 4] into the scene) of each node that has a mesh."""
    nodes = scene.get("nodes", [])
    shown = scene["scenes"][scene.get("scene", 0)]["nodes"] if scene.get("scenes") else range(len(nodes))
    waiting, seen, found = [(int(node), np.eye(4)) for node in shown], set(), []
    while waiting:
        number, above = waiting.pop()
        if number in seen or number < 0:
            raise ValueError("a GLB file in which a node has two parents, or is its own ancestor")
        seen.add(number)
        place = above @ _glb_place(nodes[number])
        if "mesh" in nodes[number]:
            found.append((nodes[number]["mesh"], place))
        waiting += [(int(child), place) for child in nodes[number].get("children", ())]
    return found


def _glb_place(node: dict[str, Any]) -> np.ndarray:
    """The matrix of a node: its own, or of its translation, rotation and scale."""
    if "matrix" in node:
        return np.array(node["matrix"], np.float64).reshape(4, 4).T
    place = np.eye(4)
    x, y, z, w = map(float, node.get("rotation", (0, 0, 0, 1)))
    place[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    place[:3, :3] *= np.array(node.get("scale", (1, 1, 1)), np.float64)
    place[:3, 3] = node.get("translation", (0, 0, 0))
    return place


def _glb_accessor(scene: dict[str, Any], binary: bytes, number: int, width: int) -> np.ndarray:
    """The numbers [N, width] of an accessor."""
    accessor = scene["accessors"][number]
    if "sparse" in accessor or "bufferView" not in accessor:
        raise ValueError("a GLB file with numbers that are not in its buffer, or sparse ones, which are not read")
    view = scene["bufferViews"][accessor["bufferView"]]
    if view.get("buffer", 0) != 0 or "uri" in scene["buffers"][0]:
        raise ValueError("a GLB file that refers to another file; only the buffer inside it is read")
    kind = np.dtype(_GLB_TYPES[accessor["componentType"]])
    if accessor["type"] != {1: "SCALAR", 3: "VEC3"}[width]:
        raise ValueError(f"a GLB file with {accessor['type']} where {width} numbers each are expected")
    start = int(view.get("byteOffset", 0)) + int(accessor.get("byteOffset", 0))
    stride, count = int(view.get("byteStride", 0)) or kind.itemsize * width, int(accessor["count"])
    end = start + (count - 1) * stride + kind.itemsize * width
    if min(start, count - 1, stride - kind.itemsize * width) < 0 or end > len(binary):
        raise ValueError(f"cut off, or a header that lies: it claims {count} rows, the buffer has {len(binary)} bytes")
    rows = np.ndarray((count, width), kind, binary, start, (stride, kind.itemsize))
    if accessor.get("normalized") and kind.kind in "iu":
        return np.maximum(rows / np.iinfo(kind).max, -1)
    return rows


READERS: dict[str, Callable[[bytes], Mesh]] = {
    ".off": _read_off,
    ".obj": _read_obj,
    ".stl": _read_stl,
    ".ply": _read_ply,
    ".glb": _read_glb,
}
"""By the suffix of the file's name."""
