"""Folders that Hugging Face datasets writes, written here by the library itself."""

import json

import numpy as np
import pytest

from nfscale.datasets.hf import HuggingFace
from nfscale.errors import CallerError

datasets = pytest.importorskip("datasets")

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3), dtype=np.uint8)


def made(images, first_label=0):
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "pixels": datasets.Array3D((4, 5, 3), "uint8"),
            "flat": datasets.List(datasets.Value("float32")),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "text": datasets.Value("string"),
        }
    )
    columns = {
        "image": list(images),
        "pixels": [image.tolist() for image in images],
        "flat": [(image / 255).ravel().tolist() for image in images],
        "label": [(i + first_label) % 2 for i in range(len(images))],
        "text": [f"t{i}" for i in range(len(images))],
    }
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.fixture
def saved(tmp_path):
    splits = {"train": made(IMAGES[:5]), "test": made(IMAGES[5:], 5)}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "dict"), num_shards={"train": 2, "test": 1})
    return tmp_path / "dict"


@pytest.mark.parametrize("column", ["image", "pixels"])
def test_a_dictionary_of_splits(saved, column):
    assert len(list((saved / "train").glob("*.arrow"))) == 2
    dataset = HuggingFace(str(saved), column, label_column="label").open()
    assert list(dataset.ids) == [f"train/{i:07d}" for i in range(5)] + ["test/0000000", "test/0000001"]
    for position in (*range(7), 6, 2):
        datum = dataset.read(position)
        assert datum.error is None
        assert (datum.content == IMAGES[position]).all()
        assert datum.label == position % 2
        assert type(datum.label) is int
        assert datum.split == ("train" if position < 5 else "test")


def test_a_single_dataset_and_text_labels(tmp_path):
    made(IMAGES).save_to_disk(str(tmp_path / "one"))
    dataset = HuggingFace(str(tmp_path / "one"), "flat", label_column="text", shape=[4, 5, 3]).open()
    assert dataset.ids[6] == "row-0000006"
    datum = dataset.read(6)
    assert (datum.label, datum.split) == ("t6", None)
    assert np.allclose(datum.content, IMAGES[6] / 255)
    named = datasets.Dataset.from_dict({"x": [[1.0]]}, split="train")
    named.save_to_disk(str(tmp_path / "named"))
    assert HuggingFace(str(tmp_path / "named"), "x").open().read(0).split == "train"


def test_a_selection_is_read_as_it_was_saved(tmp_path):
    made(IMAGES).select([4, 1]).save_to_disk(str(tmp_path / "two"))
    dataset = HuggingFace(str(tmp_path / "two"), "image").open()
    assert [(dataset.read(p).content == IMAGES[q]).all() for p, q in ((0, 4), (1, 1))] == [True, True]


def test_what_does_not_fit_is_the_callers_mistake(saved, tmp_path):
    with pytest.raises(CallerError, match=r"has no column 'img'; its columns: image, pixels, flat, label, text"):
        HuggingFace(str(saved), "img").open()
    with pytest.raises(CallerError, match=r"no state.json in .*dataset.kind=table reads Parquet"):
        HuggingFace(str(tmp_path), "image").open()
    with pytest.raises(CallerError, match="no folder"):
        HuggingFace(str(tmp_path / "none"), "image").open()


@pytest.mark.parametrize("name", ["../../secret.arrow", "/etc/passwd", "..", "a\\b", 3, None])
def test_names_lead_nowhere_else(saved, name):
    state = json.loads((saved / "train" / "state.json").read_text())
    state["_data_files"] = [{"filename": name}]
    (saved / "train" / "state.json").write_text(json.dumps(state))
    with pytest.raises(CallerError, match="names no data files inside its folder"):
        HuggingFace(str(saved), "image").open()
    (saved / "dataset_dict.json").write_text(json.dumps({"splits": [name]}))
    with pytest.raises(CallerError, match="names no splits"):
        HuggingFace(str(saved), "image").open()


def test_a_missing_data_file_is_named(saved):
    next((saved / "test").glob("*.arrow")).unlink()
    with pytest.raises(CallerError, match=r"cannot read 'data-00000-of-00001.arrow': No such file"):
        HuggingFace(str(saved), "image").open()
