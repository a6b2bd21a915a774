"""Runs whose data are cut into blocks: encoded, resumed, decoded whole, verified, shown."""

import json

import numpy as np
import pytest
from PIL import Image as PillowImage

from nfscale.cli.decode import decode
from nfscale.datasets import DATASETS, tiled
from nfscale.datasets.base import ids_digest
from nfscale.driver import open_run
from nfscale.errors import CallerError
from nfscale.media.image import read_image
from nfscale.review import make_report
from nfscale.run import OpenRun
from nfscale.signals import Clip, Sound, Voxels
from nfscale.store import open_weights
from nfscale.store.run_folder import Plan
from nfscale.verify import verify
from tests.jobs import encode_in_process, tiny_job


def picture(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return (128 + 50 * np.sin(x / 5) + 50 * np.cos(y / 4)).astype(np.uint8)


def tiled_job(output, dataset, *overrides, kind="image", tile=None, **signal):
    signal |= {"kind": kind, "tile": tile or {"size": [16, 12], "overlap": 4}}
    optimizer = {"kind": "adam", "learning_rate": 0.01}
    return tiny_job(output, *overrides, dataset=dataset, signal=signal, optimizer=optimizer)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A run of three pictures: one of 3 x 3 blocks, one that is smaller than a block, one that is none."""
    home = tmp_path_factory.mktemp("home")
    (home / "images").mkdir()
    PillowImage.fromarray(picture(40, 27)).save(home / "images" / "large.png")
    PillowImage.fromarray(picture(7, 9)).save(home / "images" / "small.png")
    (home / "images" / "broken.png").write_bytes(b"no picture")
    encode_in_process(tiled_job(home / "run", {"kind": "folder", "path": str(home / "images")}, "fit.max_steps=200"))
    return home


@pytest.fixture
def table(home):
    return open_weights(home / "run")


def test_each_block_is_a_row_and_what_cannot_be_read_is_one(table):
    rows = table.to_arrow(["datum_id", "status", "metrics"]).to_pylist()
    names = [f"large.png@{y},{x}" for y in range(3) for x in range(3)]
    assert [row["datum_id"] for row in rows] == ["broken.png@0,0", *names, "small.png@0,0"]
    assert [row["status"] == "decode_error" for row in rows] == [True] + [False] * 10
    metrics = dict(rows[5]["metrics"])
    assert {name: metrics[name] for name in ("height", "width", "start_height", "start_width")} == {
        "height": 16,
        "width": 12,
        "start_height": 12,
        "start_width": 7,
    }
    assert (metrics["whole_height"], metrics["whole_width"]) == (40, 27)


def test_a_whole_is_its_blocks_away_from_where_they_meet(table):
    (whole,) = table.decode(["large.png"])
    blocks = table.decode([f"large.png@{y},{x}" for y in range(3) for x in range(3)])
    assert whole.shape == (40, 27, 1)
    alone = np.zeros((40, 27), int)
    places = [(top, left) for top in (0, 12, 24) for left in (0, 7, 15)]
    for top, left in places:
        alone[top : top + 16, left : left + 12] += 1
    for (top, left), block in zip(places, blocks, strict=True):
        own = alone[top : top + 16, left : left + 12] == 1
        assert own.any()
        assert np.array_equal(whole[top : top + 16, left : left + 12][own], block[own])
    error = whole[..., 0] - picture(40, 27) / 255
    assert np.sqrt(np.square(error).mean()) < 0.05
    assert table.whole("large.png").blocks == 9


def test_a_whole_decodes_at_any_shape(table):
    assert table.shapes(["large.png", "small.png", "small.png@0,0"]) == [(40, 27), (7, 9), (7, 9)]
    fine, corner = table.decode(["large.png"], "80x54")[0], table.decode(["large.png@0,0"], "32x24")[0]
    assert np.abs(fine[:24, :14] - corner[:24, :14]).max() < 1e-5
    assert np.abs(fine[:32, :24] - corner).max() > 1e-3, "other blocks have their say"
    mixed = table.decode(["large.png", "large.png@0,0"])
    assert [one.shape for one in mixed] == [(40, 27, 1), (16, 12, 1)]
    assert table.decode(["large.png", "large.png"]).shape == (2, 40, 27, 1)
    assert np.array_equal(table.decode(["small.png"])[0], table.decode(["small.png@0,0"])[0])


def test_the_command_writes_a_whole_or_a_block(home, capsys):
    decode(str(home / "run"), "large.png", home / "whole.png")
    decode(str(home / "run"), "large.png", home / "coarse.png", "20x30")
    decode(str(home / "run"), "large.png@1,1", home / "block.png")
    shapes = [read_image(home / f"{name}.png").shape[:2] for name in ("whole", "coarse", "block")]
    assert shapes == [(40, 27), (20, 30), (16, 12)]
    assert [line.partition(": ")[2] for line in capsys.readouterr().out.splitlines()] == [
        "datum large.png, 40 x 27, 9 blocks blended",
        "datum large.png, 20 x 30, 9 blocks blended",
        "datum large.png@1,1, 16 x 12",
    ]


def test_ids_of_wholes_are_known_and_others_refused(table):
    assert "large.png" in table
    assert "large.png@2,2" in table
    assert "large.png@3,0" not in table
    with pytest.raises(CallerError, match=r"no committed row for \['huge.png'\]"):
        table.decode(["huge.png"])
    with pytest.raises(CallerError, match=r"no weights for 'broken\.png': not an image"):
        table.decode(["broken.png"])


def test_a_run_of_blocks_is_verified_and_shown(home):
    folder = open_weights(home / "run").folder
    found = verify(folder)
    assert (found.rows, found.decoded, found.mismatches) == (11, 10, [])
    assert make_report(folder)["fields"] == 11
    page = folder.files.read("review/report.html").decode()
    assert "large.png: 9 tiles" in page
    assert ", together " in page
    assert (home / "run" / "review" / "large.png-rebuilt.webp").exists()


def test_a_resume_reads_no_data_to_know_its_blocks(home, monkeypatch):
    dataset = {"kind": "folder", "path": str(home / "images")}
    job = tiled_job(home / "run", dataset, "fit.max_steps=200")

    def never(*_):
        raise AssertionError("the blocks are in the plan")

    monkeypatch.setattr(tiled, "cuts_of", never)
    folder, plan = open_run(job)
    assert len(OpenRun(folder).dataset.ids) == plan.data_count == 11
    assert plan.blocks == ((1, (1, 1)), (1, (3, 3)), (1, (1, 1)))
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))).blocks == plan.blocks


def test_another_tile_is_another_job(home):
    dataset = {"kind": "folder", "path": str(home / "images")}
    with pytest.raises(CallerError, match=r"belongs to another job: they differ in signal\.tile\.overlap .*size"):
        open_run(tiled_job(home / "run", dataset, "fit.max_steps=200", tile=16))
    whole = tiny_job(home / "other", dataset=dataset)
    ids = ids_digest(whole.open_dataset().ids)
    assert whole.fingerprint(ids) != tiled_job(home / "run", dataset).fingerprint(ids)


def test_blocks_that_are_missing_or_have_no_weights_are_named(home, tmp_path):
    settings = ("store.shard_fields=4", "fit.max_steps=5")
    dataset = {"kind": "folder", "path": str(home / "images")}
    folder, _ = encode_in_process(tiled_job(tmp_path / "small", dataset, *settings))
    folder.files.remove("commits/shard-00001.json")
    with pytest.raises(CallerError, match=r"5 of the 9 blocks of 'large.png' are committed"):
        open_weights(tmp_path / "small").decode(["large.png"])
    nan = np.random.default_rng(0).random((1, 40, 27)).astype(np.float32)
    nan[0, 39, 26] = np.nan
    np.save(tmp_path / "x.npy", nan)
    encode_in_process(tiled_job(tmp_path / "nan", {"kind": "npz", "path": str(tmp_path / "x.npy")}, "fit.max_steps=5"))
    table = open_weights(tmp_path / "nan")
    assert table.to_arrow(["status"])["status"].to_pylist().count("decode_error") == 1
    with pytest.raises(CallerError, match=r"no weights for the block 'row-0000000@2,2': the image holds NaN"):
        table.decode(["row-0000000"])


def test_the_limit_counts_data(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((5, 20, 20)).astype(np.float32))
    job = tiled_job(tmp_path / "run", {"kind": "npz", "path": str(tmp_path / "x.npy"), "limit": 2}, "fit.max_steps=5")
    _, plan = open_run(job)
    assert plan.blocks == ((2, (2, 2)),)
    assert plan.data_count == 8


class Made:
    """One made-up datum."""

    def __init__(self, content):
        self.content, self.ids = content, ["one"]

    is_thread_bound = False

    def read(self, position):
        from nfscale.datasets.base import Datum

        return Datum("one", 0, self.content)

    def index_of(self, position):
        return position


@pytest.fixture
def encoded(tmp_path, monkeypatch):
    def run(content, kind, tile, **signal):
        monkeypatch.setattr(DATASETS["digits"], "open", lambda self: Made(content))
        job = tiled_job(tmp_path / kind, {"kind": "digits"}, kind=kind, tile=tile, **signal)
        encode_in_process(job)
        return open_weights(tmp_path / kind)

    return run


def test_a_sound_keeps_its_length_and_its_rate(encoded):
    values = np.sin(np.arange(1000) / 9)[:, None].astype(np.float32)
    table = encoded(Sound(values, 400), "audio", 0.5, span=0.5)
    assert len(table) == 6
    (whole,) = table.decode(["one"])
    assert (whole.values.shape, whole.rate) == ((1000, 1), 400)
    (other,) = table.decode(["one"], "300")
    assert (other.values.shape, other.rate) == ((750, 1), 300)


def test_a_volume_keeps_its_affine_and_its_range(encoded):
    affine = np.array([[0, -2.0, 0, 5], [1.5, 0, 0, -7], [0, 0, 3, 11], [0, 0, 0, 1]])
    values = np.random.default_rng(0).normal(50, 20, (10, 9, 12)).astype(np.float32)
    values[:6] = 0  # the first blocks are empty, and do not decide the range
    table = encoded(Voxels(values, affine), "volume", {"size": 6, "overlap": 1})
    (whole,) = table.decode(["one"])
    assert whole.values.shape == (10, 9, 12, 1)
    np.testing.assert_allclose(whole.affine, affine, rtol=1e-6)
    assert whole.value_range == (pytest.approx(values.min()), pytest.approx(values.max()))
    (coarse,) = table.decode(["one"], "5x9x4")
    np.testing.assert_allclose(coarse.affine @ [-0.5, -0.5, -0.5, 1], affine @ [-0.5, -0.5, -0.5, 1], atol=1e-5)
    assert table.signal.span == pytest.approx(18.0), "of the longest side of a block"


def test_a_film_keeps_its_rate(encoded):
    frames = np.random.default_rng(0).integers(0, 256, (7, 8, 9, 3), dtype=np.uint8)
    table = encoded(Clip(frames, 12.0), "video", {"size": [4, 8, 6], "overlap": [1, 0, 2]})
    (whole,) = table.decode(["one"])
    assert (whole.values.shape, whole.rate) == ((7, 8, 9, 3), 12.0)
    (other,) = table.decode(["one"], "24fps")
    assert (len(other.values), other.rate) == (14, 24.0)
