"""Anyone's images: ids, labels, every stored range, and a reason for what cannot be read."""

import numpy as np
import pytest
from PIL import Image

from nfscale.datasets import DATASETS
from nfscale.datasets.base import ids_digest, open_limited, seeded_sample
from nfscale.datasets.folder import Folder
from nfscale.errors import CallerError


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for name, shape, mode in (
        ("cats/grey.png", (4, 6), "L"),
        ("cats/rgb.png", (4, 6, 3), "RGB"),
        ("dogs/alpha.PNG", (5, 5, 4), "RGBA"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode=None).save(tmp_path / name)
        with Image.open(tmp_path / name) as saved:
            assert saved.mode == mode
    (tmp_path / "dogs" / "broken.png").write_bytes((tmp_path / "cats" / "rgb.png").read_bytes()[:60])
    (tmp_path / "dogs" / "empty.jpg").write_bytes(b"")
    (tmp_path / "dogs" / "text.png").write_text("not an image")
    (tmp_path / "notes.txt").write_text("not for us")
    return tmp_path


def test_ids_are_sorted_paths_of_images(images):
    ids = list(Folder(str(images)).open().ids)
    assert ids[:3] == ["cats/grey.png", "cats/rgb.png", "dogs/alpha.PNG"]
    assert ids[3:] == ["dogs/broken.png", "dogs/empty.jpg", "dogs/text.png"]


def test_a_pattern_selects_files(images):
    assert list(Folder(str(images), pattern="cats/*.png").open().ids) == ["cats/grey.png", "cats/rgb.png"]


def test_labels_come_from_parents_where_asked(images):
    assert Folder(str(images), label_from="parent").open().read(2).label == "dogs"
    assert Folder(str(images)).open().read(2).label is None


def test_images_are_read_in_the_range_they_were_stored_in(images):
    dataset = Folder(str(images)).open()
    assert [dataset.read(i).content.shape for i in range(3)] == [(4, 6), (4, 6, 3), (5, 5, 4)]
    deep = np.arange(24, dtype=np.uint16).reshape(4, 6) * 2000
    Image.fromarray(deep).save(images / "cats" / "deep.png")
    read = Folder(str(images), pattern="**/deep.png").open().read(0).content
    assert read.dtype == np.uint16
    assert (read == deep).all()


def test_what_cannot_be_read_has_a_reason_and_no_path_of_the_machine(images):
    dataset = Folder(str(images)).open()
    for position in (3, 4, 5):
        datum = dataset.read(position)
        assert datum.content is None
        assert datum.error
        assert str(images) not in datum.error


def test_a_decompression_bomb_is_refused_before_it_is_decoded(images, monkeypatch):
    monkeypatch.setattr("nfscale.media.image.MAX_PIXELS", 10)
    assert "too large: 6 x 4 pixels" in Folder(str(images)).open().read(0).error


@pytest.mark.parametrize(("pattern", "message"), [("*.bmp", "no files below"), (None, "no folder")])
def test_an_empty_or_missing_folder_is_the_callers_mistake(tmp_path, pattern, message):
    with pytest.raises(CallerError, match=message):
        Folder(str(tmp_path if pattern else tmp_path / "none"), pattern=pattern).open()


@pytest.mark.parametrize(("kind", "count", "shape"), [("digits", 1797, (8, 8)), ("photos", 1146, (64, 64, 3))])
def test_the_shipped_sets_are_whole(kind, count, shape):
    dataset = DATASETS[kind]().open()
    assert len(set(dataset.ids)) == len(dataset.ids) == count
    for position in (0, count // 2, count - 1):
        datum = dataset.read(position)
        assert datum.content.shape == shape
        assert datum.id == dataset.ids[position]
        assert datum.index == dataset.index_of(position) == position
        assert datum.label is not None


def test_a_tile_says_where_it_belongs():
    dataset = DATASETS["photos"]().open()
    assert dataset.place("coffee/r02c05") == ("coffee", 2, 5)
    assert dataset.place("coffee/r02c05#1") == ("coffee", 2, 5), "a repeat is of the same tile"


def test_whole_photographs_are_the_squares_in_their_middles():
    dataset = DATASETS["photos"](tile=None).open()
    assert len(dataset.ids) == 10
    tall, tiles = dataset.read(2), DATASETS["photos"](tile=400).open()  # coffee, 400 x 600 pixels
    assert tall.label == "coffee"
    assert tall.content.shape == (400, 400, 3)
    left = tiles.read(tiles.ids.index("coffee/r00c00")).content
    assert np.array_equal(tall.content[:, :300], left[:, 100:])


def test_a_limit_is_a_seeded_sample_spread_over_the_dataset():
    limited = open_limited(DATASETS["digits"](), 100, seed=0)
    positions = [limited.index_of(p) for p in range(100)]
    assert positions == sorted(positions)
    assert positions[0] < 200
    assert positions[-1] > 1600
    assert [limited.read(p).index for p in range(3)] == positions[:3]
    assert list(open_limited(DATASETS["digits"](), 100, seed=0).ids) == list(limited.ids)
    assert list(open_limited(DATASETS["digits"](), 100, seed=1).ids) != list(limited.ids)


def test_a_sample_does_not_depend_on_the_order_of_the_data():
    ids = [f"d{i}" for i in range(50)]
    drawn = {ids[p] for p in seeded_sample(ids, 10, 0, "x")}
    backwards = ids[::-1]
    assert {backwards[p] for p in seeded_sample(backwards, 10, 0, "x")} == drawn
    assert {ids[p] for p in seeded_sample(ids, 10, 0, "y")} != drawn


def test_the_digest_tells_orders_and_boundaries_apart():
    assert len({ids_digest(ids) for ids in (["ab", "c"], ["a", "bc"], ["c", "ab"], ["ab", "c", ""])}) == 4
