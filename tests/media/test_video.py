"""Films in files: mp4, gif and folders of frames in, mp4, gif and npy out; and files that lie."""

import io
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nfscale.cli.decode import decode
from nfscale.datasets import DATASETS
from nfscale.errors import CallerError
from nfscale.media import MEDIA, films
from nfscale.media.base import nothing_beside
from nfscale.media.video import VideoMedium, animated
from nfscale.signals import Clip
from nfscale.store import open_weights
from nfscale.verify import verify
from tests.jobs import encode_in_process, tiny_job
from tests.media.pages import no_other_shape

pytest.importorskip("imageio_ffmpeg", reason="reading films needs imageio-ffmpeg")

MEDIUM = VideoMedium()


def film(frames: int = 6, height: int = 32, width: int = 48) -> np.ndarray:
    """A bright square that moves over a ramp: float32 [T, H, W, 3]."""
    values = np.empty((frames, height, width, 3), np.float32)
    values[:] = np.linspace(0.2, 0.8, width, dtype=np.float32)[:, None] * np.array([1, 0.8, 0.6], np.float32)
    for frame in range(frames):
        values[frame, 8:20, 2 + 4 * frame : 14 + 4 * frame] = 0.95
    return values


def read(content: bytes, name: str = "x.mp4") -> Clip:
    return MEDIUM.read(io.BytesIO(content), name, nothing_beside)


@pytest.fixture(scope="module")
def mp4(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("films") / "x.mp4"
    MEDIUM.write(Clip(film(), 12.5), path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def gif() -> bytes:
    return animated(list((film() * 255).astype(np.uint8)), 12.5)


@pytest.mark.parametrize(("suffix", "off"), [(".mp4", 0.06), (".gif", 0.08)])
@pytest.mark.parametrize("size", [(32, 48), (33, 47)])
def test_a_film_that_is_written_is_read_again(tmp_path, suffix, off, size):
    path = tmp_path / f"x{suffix}"
    MEDIUM.write(Clip(film(6, *size), 12.5), path)
    with path.open("rb") as stream:
        back = MEDIUM.read(stream, path.name, nothing_beside)
    assert back.values.dtype == np.uint8
    assert back.values.shape == (6, *size, 3)
    assert back.rate == pytest.approx(12.5)
    assert np.abs(back.values / 255 - film(6, *size)).mean() < off / 3
    assert np.abs(back.values[4, 12, 24] / 255 - 0.95).max() < off, "the square is where it was in frame 4"


def test_an_array_is_written_as_it_is(tmp_path):
    MEDIUM.write(Clip(film(), 25.0), tmp_path / "x.npy")
    assert np.array_equal(np.load(tmp_path / "x.npy"), film())


def test_some_frames_of_a_film_are_those_of_the_whole(tmp_path, mp4):
    (tmp_path / "x.mp4").write_bytes(mp4)
    whole, part = films.decoded(tmp_path / "x.mp4"), films.decoded(tmp_path / "x.mp4", 2, 5)
    assert np.array_equal(part.values, whole.values[2:5])
    assert part.rate == whole.rate == 12.5


def test_frames_of_a_gif_that_last_longer_stand_more_often():
    images = [Image.fromarray(np.full((4, 4), grey, np.uint8)) for grey in (0, 90, 180)]
    stream = io.BytesIO()
    images[0].save(stream, "GIF", save_all=True, append_images=images[1:], duration=[40, 120, 40])
    clip = read(stream.getvalue(), "x.gif")
    assert clip.values[:, 0, 0, 0].tolist() == [0, 90, 90, 90, 180]
    assert clip.rate == 25


def test_a_film_at_a_rate_that_gifs_do_not_have_lasts_as_long():
    clip = read(animated([np.full((4, 4, 3), 20 * n, np.uint8) for n in range(12)], 30), "x.gif")
    assert len(clip.values) == 12
    assert len(clip.values) / (clip.rate or 0) == pytest.approx(0.4)


# --- folders of frames


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, numbers in (("walk", range(1, 4)), ("gap", (1, 2, 4)), ("odd", (1, 2))):
        (tmp_path / name).mkdir()
        for number in numbers:
            size = 5 if name == "odd" and number == 2 else 4
            Image.fromarray(np.full((size, 6, 3), 10 * number, np.uint8)).save(tmp_path / name / f"f_{number:03d}.png")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/f_001.png").write_bytes((tmp_path / "walk/f_001.png").read_bytes())
    (tmp_path / "torn/f_002.png").write_bytes((tmp_path / "walk/f_002.png").read_bytes()[:50])
    return tmp_path


def test_a_folder_of_frames_is_a_film(folder):
    dataset = DATASETS["folder"](str(folder), pattern="*/f_001.png", label_from="parent", modality="video").open()
    data = {datum.label: datum for datum in map(dataset.read, range(len(dataset.ids)))}
    assert data["walk"].error is None
    assert data["walk"].content.values[:, 0, 0, 0].tolist() == [10, 20, 30]
    assert data["walk"].content.rate is None
    assert "f_003.png is missing" in data["gap"].error
    assert "its numbered pictures differ" in data["odd"].error
    assert data["torn"].error.startswith("f_002.png: ")
    assert str(folder) not in "".join(datum.error or "" for datum in data.values())


# --- files that lie


def test_a_truncated_film_is_none(mp4):
    for length in (len(mp4) // 3, len(mp4) - 40):
        with pytest.raises(ValueError, match="damaged or truncated"):
            read(mp4[:length])


def test_a_truncated_gif_is_none(gif):
    with pytest.raises(ValueError, match="truncated"):
        read(gif[: len(gif) // 2], "x.gif")


def test_a_gif_bomb_is_refused_before_it_is_decoded(gif):
    bomb = gif[:6] + struct.pack("<HH", 65535, 65535) + gif[10:]
    with pytest.raises(ValueError, match="too large"):
        read(bomb, "x.gif")


def test_a_frame_that_reaches_out_of_the_picture_is_refused(gif):
    """Decoders enlarge the picture to hold it, past any check of the picture's own size."""
    place = gif.index(b",\x00\x00\x00\x00" + struct.pack("<HH", 48, 32))
    wide = gif[: place + 5] + struct.pack("<HH", 8000, 8000) + gif[place + 9 :]
    with pytest.raises(ValueError, match="48 x 32 pixels, and frame 0 reaches out of it"):
        read(wide, "x.gif")


def test_a_gif_of_too_many_frames_is_refused(gif, monkeypatch):
    monkeypatch.setattr(films, "MAX_VALUES", 4 * 32 * 48 * 3)
    with pytest.raises(ValueError, match="too large: frames of 48 x 32 pixels, at most 6,144 pixels"):
        read(gif, "x.gif")


def test_a_gif_whose_frame_lasts_for_hours_is_refused(monkeypatch):
    monkeypatch.setattr(films, "MAX_VALUES", 100 * 16 * 3)
    images = [Image.fromarray(np.full((4, 4), grey, np.uint8)) for grey in (0, 90)]
    stream = io.BytesIO()
    images[0].save(stream, "GIF", save_all=True, append_images=images[1:], duration=[10, 60000])
    with pytest.raises(ValueError, match="too large"):
        read(stream.getvalue(), "x.gif")


def test_a_film_of_too_many_pixels_is_refused_while_it_is_decoded(mp4, monkeypatch):
    monkeypatch.setattr(films, "MAX_VALUES", 3 * 32 * 48 * 3)
    monkeypatch.setattr(films, "_CHUNK", 100)
    with pytest.raises(ValueError, match="too large: at most 4,608 pixels are decoded"):
        read(mp4)


def test_a_film_that_takes_too_long_is_given_up(mp4, monkeypatch):
    monkeypatch.setattr(films, "_SECONDS", 0.0)
    with pytest.raises(ValueError, match="took longer than 0 seconds"):
        read(mp4)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no film at all",
        b"ffconcat version 1.0\nfile '/etc/passwd'\n",
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
    ],
    ids=["empty", "text", "concat", "playlist"],
)
def test_what_is_no_film_is_a_sentence_and_names_no_path(content):
    with pytest.raises(ValueError, match="no film, or a damaged or truncated one") as caught:
        read(content)
    assert "/tmp" not in str(caught.value)
    assert "passwd" not in str(caught.value)


def test_a_playlist_does_not_open_the_film_beside_it(tmp_path, mp4):
    (tmp_path / "secret.mp4").write_bytes(mp4)
    for text in (
        f"ffconcat version 1.0\nfile '{tmp_path}/secret.mp4'\n",
        f"#EXTM3U\n#EXTINF:1,\n{tmp_path}/secret.mp4\n",
    ):
        with pytest.raises(ValueError, match="no film"):
            read(text.encode())


def test_bad_files_in_a_folder_are_data_with_a_reason(tmp_path, mp4, gif):
    (tmp_path / "a.mp4").write_bytes(mp4)
    (tmp_path / "b.mp4").write_bytes(mp4[:300])
    (tmp_path / "c.gif").write_bytes(gif[:200])
    dataset = DATASETS["folder"](str(tmp_path), modality="video").open()
    data = [dataset.read(position) for position in range(3)]
    assert [datum.error is None for datum in data] == [True, False, False]
    assert all(datum.content is None for datum in data[1:])


def test_without_the_package_the_caller_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(CallerError, match=r"pip install 'nfscale\[video\]'"):
        read(b"")
    with pytest.raises(CallerError, match=r"pip install 'nfscale\[video\]'"):
        DATASETS["clips"]().open()


def test_films_are_encoded_verified_and_decoded_at_another_rate_and_size(tmp_path, mp4, gif):
    """Of three films, one is cut off: a row with a reason, and no neighbour's."""
    films_of = tmp_path / "films"
    films_of.mkdir()
    for name, content in (("a.mp4", mp4), ("b.gif", gif), ("c.mp4", mp4[: len(mp4) // 2])):
        (films_of / name).write_bytes(content)
    job = tiny_job(
        tmp_path / "run",
        dataset={"kind": "folder", "path": str(films_of)},
        signal={"kind": "video", "resize": [16, 24], "holdout": 3},
        field={"kind": "mlp", "width": 16, "depth": 2, "omega_0": 10, "weight_scale": 1.5},
        optimizer={"kind": "esgd", "calibration_data": 2, "warmup": 20},
        max_failed_fraction=0.5,
    )
    folder, summary = encode_in_process(job)
    assert summary.counts["decode_error"] == 1
    rows = open_weights(tmp_path / "run").to_arrow(["reason", "metrics", "quality_heldout"]).to_pylist()
    assert [row["reason"] is None for row in rows] == [True, True, False]
    assert "damaged or truncated" in rows[2]["reason"]
    assert dict(rows[0]["metrics"])["psnr_worst_frame_db"] > 5
    assert rows[0]["quality_heldout"] is not None
    assert not verify(folder).mismatches
    for name, shape, expected, rate in (
        ("x.mp4", None, (6, 16, 24, 3), 12.5),
        ("x.gif", "25fps", (12, 16, 24, 3), 25),
        ("y.mp4", "3x20x30", (3, 20, 30, 3), 6.25),
    ):
        decode(str(tmp_path / "run"), "a.mp4", tmp_path / name, shape)
        found = read((tmp_path / name).read_bytes(), name)
        assert found.values.shape == expected
        assert found.rate == pytest.approx(rate)


# --- measures and pages


def test_measures_say_the_worst_frame():
    rebuilt = film().copy()
    rebuilt[3] += 0.1
    found = MEDIUM.measures(Clip(film(), 25.0), Clip(rebuilt, 25.0))
    assert found["psnr_worst_frame_db"] == pytest.approx(20, abs=1e-3)
    assert 0.8 < found["ssim"] < 1
    small = Clip(film()[:, :4, :4], 25.0)
    assert set(MEDIUM.measures(small, small)) == {"psnr_worst_frame_db"}


def test_a_page_shows_frames_and_moves():
    sheet, moving = MEDIUM.panels(Clip(film(9), 25.0), Clip(film(9) * 0.9, 25.0), no_other_shape)
    with Image.open(io.BytesIO(sheet.content)) as image:
        assert image.height > 3 * 64
        assert image.width > 6 * 96
    with Image.open(io.BytesIO(moving.content)) as image:
        assert image.n_frames == 9
        assert image.width == 2 * 96
    assert "25 frames per second" in moving.caption
    assert MEDIA["video"].legend
