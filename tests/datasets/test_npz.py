"""NumPy's files: mapped where they lie, never unpickled, with ids that cost nothing."""

import io
import zipfile

import numpy as np
import pytest

from nfscale.datasets.base import Datum, ids_digest
from nfscale.datasets.npz import Npz
from nfscale.errors import CallerError

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)


def is_mapped(array: np.ndarray) -> bool:
    while array is not None:
        if isinstance(array, np.memmap):
            return True
        array = getattr(array, "base", None)
    return False


@pytest.fixture
def saved(tmp_path):
    """The path of a .npz with these members."""

    def save(write=np.savez, name="data.npz", **members) -> str:
        write(tmp_path / name, **members)
        return str(tmp_path / name)

    return save


def test_a_npy_is_mapped_and_rows_are_named_by_position(tmp_path):
    np.save(tmp_path / "images.npy", IMAGES)
    dataset = Npz(str(tmp_path / "images.npy")).open()
    assert is_mapped(dataset._data)
    assert len(dataset.ids) == 6
    assert dataset.ids[5] == dataset.ids[-1] == "row-0000005"
    assert dataset.ids[1:3] == ["row-0000001", "row-0000002"]
    assert list(dataset.ids) == [f"row-{i:07d}" for i in range(6)]
    with pytest.raises(IndexError):
        dataset.ids[6]
    datum = dataset.read(3)
    assert isinstance(datum, Datum)
    assert (datum.content == IMAGES[3]).all()
    assert datum.content.flags.writeable
    assert (datum.id, datum.index, datum.label, datum.split, datum.error) == ("row-0000003", 3, None, None, None)


@pytest.mark.parametrize(("write", "mapped"), [(np.savez, True), (np.savez_compressed, False)])
def test_members_of_a_npz(saved, write, mapped):
    path = saved(
        write,
        images=np.asfortranarray(IMAGES),
        y=np.arange(6, dtype=np.uint8)[:, None],
        key=np.array([f"n{i}" for i in range(6)]),
        part=np.array([b"train"] * 4 + [b""] * 2),
    )
    dataset = Npz(path, labels="y", ids="key", splits="part").open()
    assert is_mapped(dataset._data) is mapped
    for position in range(6):
        datum = dataset.read(position)
        assert (datum.content == IMAGES[position]).all()
        assert datum.label == position
        assert type(datum.label) is int
        assert datum.id == dataset.ids[position] == f"n{position}"
        assert datum.split == ("train" if position < 4 else None)


def test_other_byte_orders_become_the_machines(saved):
    datum = Npz(saved(images=IMAGES.astype(">u2"))).open().read(0)
    assert datum.content.dtype == np.uint16
    assert (datum.content == IMAGES[0]).all()


def test_the_array_is_the_only_one_or_of_a_usual_name_or_named(saved):
    assert len(Npz(saved(z=IMAGES, y=np.arange(6))).open().ids) == 6
    assert len(Npz(saved(x=IMAGES, other=IMAGES[:2])).open().ids) == 6
    assert len(Npz(saved(x=IMAGES, other=IMAGES[:2]), array="other").open().ids) == 2
    with pytest.raises(CallerError, match=r"several arrays.*name one of: a, b"):
        Npz(saved(a=IMAGES, b=IMAGES)).open()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"array": "img"}, r"dataset.array: 'data.npz' has no array 'img'; its arrays: images, y, f, p, s"),
        ({"labels": "z"}, r"dataset.labels: .* has no array 'z'"),
        ({"labels": "f"}, r"dataset.labels: 'f' is float64 \[6\]; expected integers or text \[6\]"),
        ({"labels": "s"}, r"dataset.labels: 's' is int64 \[5\]"),
        ({"splits": "y"}, r"dataset.splits: 'y' holds numbers"),
        ({"ids": "p"}, r"dataset.ids: the id 'a' stands at positions 1 and 4"),
        ({"array": "y"}, r"'y' is int64 \[6\]; expected numbers \[N, ...\]"),
    ],
)
def test_what_does_not_fit_is_the_callers_mistake(saved, keys, message):
    duplicated = np.array(["c", "a", "d", "b", "a", "e"])
    path = saved(images=IMAGES, y=np.arange(6), f=np.zeros(6), p=duplicated, s=np.arange(5))
    with pytest.raises(CallerError, match=message):
        Npz(path, **({"array": "images"} | keys)).open()


class Explodes:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was read",))


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_pickle_is_never_read(saved, tmp_path, write):
    hostile = np.array([Explodes(), Explodes()], dtype=object)
    with pytest.raises(CallerError, match="Python objects, which only pickle reads"):
        Npz(saved(write, images=hostile)).open()
    with pytest.raises(CallerError, match="Python objects"):
        Npz(saved(write, images=IMAGES, y=hostile), labels="y").open()
    np.save(tmp_path / "hostile.npy", hostile)
    with pytest.raises(CallerError, match="Python objects"):
        Npz(str(tmp_path / "hostile.npy")).open()


def test_files_that_are_cut_off_or_lie_about_their_size(tmp_path, saved):
    np.save(tmp_path / "whole.npy", IMAGES)
    whole = (tmp_path / "whole.npy").read_bytes()
    for name, content in (("cut.npy", whole[:-1]), ("short.npy", whole[:20]), ("empty.npy", b""), ("text.npy", b"hi")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CallerError, match=f"cannot read '{name}'"):
            Npz(str(tmp_path / name)).open()
    zipped = saved(images=IMAGES)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "data.npz").read_bytes()[:300])
    with pytest.raises(CallerError, match=r"cannot read 'cut.npz'"):
        Npz(str(tmp_path / "cut.npz")).open()
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 40, 4)})
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "bomb.npz", "w", compression) as archive:
            archive.writestr("images.npy", header.getvalue() + b"abcd")
        with pytest.raises(CallerError, match=r"claims 4398046511104 bytes of values and has 4"):
            Npz(str(tmp_path / "bomb.npz")).open()
    assert len(Npz(zipped).open().ids) == 6


def test_a_key_that_a_npy_has_no_use_for(tmp_path):
    np.save(tmp_path / "images.npy", IMAGES)
    with pytest.raises(CallerError, match=r"dataset.labels: 'images.npy' holds one array without a name"):
        Npz(str(tmp_path / "images.npy"), labels="y").open()
    with pytest.raises(CallerError, match="no file"):
        Npz(str(tmp_path / "none.npy")).open()


def test_ids_are_the_same_in_every_opening(saved):
    path = saved(images=IMAGES)
    assert ids_digest(Npz(path).open().ids) == ids_digest([f"row-{i:07d}" for i in range(6)])
