"""Labels of a folder's images from a CSV."""

import numpy as np
import pytest
from PIL import Image

from nfscale.datasets.folder import Folder
from nfscale.errors import CallerError


@pytest.fixture
def images(tmp_path):
    root = tmp_path / "images"
    for name in ("a/one.png", "a/two.png", "b/three.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((2, 2), np.uint8)).save(root / name)
    return root


def opened(images, content, **keys):
    path = images.parent / "labels.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return Folder(str(images), label_from=str(path), **keys).open()


def test_labels_and_splits_by_id(images):
    dataset = opened(images, "\ufeffsplit,id,label\ntrain,a/one.png,cat\n,b/three.png,dog\ntest,a/two.png,\n")
    data = [dataset.read(position) for position in range(3)]
    assert [(d.id, d.label, d.split) for d in data] == [
        ("a/one.png", "cat", "train"),
        ("a/two.png", None, "test"),
        ("b/three.png", "dog", None),
    ]
    assert all(d.error is None for d in data)


def test_labels_that_are_all_integers_are_integers(images):
    dataset = opened(images, "id,label\na/one.png, 7\nb/three.png,-1\n")
    assert [dataset.read(p).label for p in range(3)] == [7, None, -1]
    mixed = opened(images, "id,label\na/one.png,7\nb/three.png,dog\n")
    assert [mixed.read(p).label for p in range(3)] == ["7", None, "dog"]


def test_a_csv_may_name_files_that_a_pattern_leaves_out(images):
    dataset = opened(images, "id,label\na/one.png,1\nb/three.png,3\n", pattern="a/*.png")
    assert [dataset.read(p).label for p in range(2)] == [1, None]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,label\na/one.png,1\na/four.png,4\n", r"line 3 of .* names 'a/four.png', and there is no such file"),
        ("id,label\n../labels.csv,1\n", r"names '../labels.csv', and there is no such file"),
        ("id,label\na/one.png,1\na/one.png,2\n", r"names 'a/one.png' twice, in lines 2 and 3"),
        ("file,label\na/one.png,1\n", r"has no column 'id'; its columns: file, label"),
        ("id,class\na/one.png,1\n", r"has no column 'label'; its columns: id, class"),
        ("", r"has no column 'id'; its columns: none"),
        (b"id,label\n\xff\xfe,1\n", r"is not a CSV in UTF-8"),
    ],
)
def test_a_csv_that_does_not_fit_is_the_callers_mistake(images, content, message):
    with pytest.raises(CallerError, match=message):
        opened(images, content)


def test_a_missing_csv_is_the_callers_mistake(images):
    with pytest.raises(CallerError, match=r"label_from is parent or the path of a CSV; cannot read 'parents'"):
        Folder(str(images), label_from="parents").open()
