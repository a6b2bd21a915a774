"""The prompts as one archive, and the set where it can be had."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from nfscale.datasets import DATASETS, speech
from nfscale.datasets.speech import SpeechDataset
from nfscale.errors import CallerError
from nfscale.job import load_job
from nfscale.media.audio import as_wav
from nfscale.signals import Sound

pytest.importorskip("soundfile")

JOB = Path(__file__).resolve().parents[2] / "pipelines" / "speech.yaml"
WAV = as_wav(Sound(np.linspace(-0.5, 0.5, 80, dtype=np.float32)[:, None], 8000))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A made-up package, as if it were fetched."""
    root = tmp_path / "package"
    below = root / "usr/share/asterisk/sounds/en_US_f_Allison"
    for name in ("digits/1.wav", "digits/10.wav", "letters/a.wav", "hello.wav", "silence/1.wav", "phonetic/a_p.wav"):
        (below / name).parent.mkdir(parents=True, exist_ok=True)
        (below / name).write_bytes(WAV)
    (below / "letters/b.wav").write_bytes(WAV[:60])
    (below / "LICENSE.txt").write_text("no sound")
    monkeypatch.setattr(speech, "_FOLDER", Path("usr/share/asterisk/sounds/en_US_f_Allison"))
    monkeypatch.setattr(speech, "fetch_debian", lambda package, into: root)
    return root


def archive_of(into: Path) -> bytes:
    into.mkdir()
    return (speech._archived(speech._PACKAGE, into) / "prompts.tar").read_bytes()


def test_the_archive_is_a_function_of_the_sounds_alone(folder, tmp_path):
    first = archive_of(tmp_path / "first")
    for path in folder.rglob("*.wav"):
        path.chmod(0o600)
        path.touch()
    assert archive_of(tmp_path / "second") == first
    with tarfile.open(fileobj=io.BytesIO(first)) as archive:
        names = archive.getnames()
    assert names == sorted(names)
    assert "silence/1.wav" not in names
    assert len(names) == 6


def test_prompts_are_data_with_their_folders_as_labels(folder, tmp_path):
    archive_of(tmp_path / "first")
    path = tmp_path / "first" / "prompts.tar"
    dataset = SpeechDataset(path, list(speech._members(path)))
    data = {datum.id: datum for datum in map(dataset.read, range(6))}
    assert {datum.id: datum.label for datum in data.values()} == {
        "digits/1": "digits",
        "digits/10": "digits",
        "hello": "prompts",
        "letters/a": "letters",
        "letters/b": "letters",
        "phonetic/a_p": "phonetic",
    }
    assert "truncated" in data.pop("letters/b").error
    assert {datum.error for datum in data.values()} == {None}


def test_without_the_client_the_caller_is_told_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setenv("NFSCALE_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(speech, "_FOLDER", Path("absent"))
    with pytest.raises(CallerError, match=r"there is no apt-get here; run `apt-get update && apt-get install") as error:
        DATASETS["speech"]().open()
    assert "\n" not in str(error.value)


# --- the set


def opened(**keys):
    try:
        return DATASETS["speech"](**keys).open()
    except CallerError as error:
        pytest.skip(str(error))


def test_the_set_is_whole():
    everything, words = opened(part="all"), opened()
    assert (len(everything.ids), len(words.ids)) == (558, 182)
    assert len(set(everything.ids)) == 558
    assert set(words.ids) < set(everything.ids)
    data = [words.read(position) for position in range(182)]
    assert [datum.error for datum in data] == [None] * 182
    assert [datum.id for datum in data] == list(words.ids)
    sounds = [datum.content for datum in data]
    assert {(sound.rate, sound.values.shape[1]) for sound in sounds} == {(8000, 1)}
    assert 0.5 < min(sound.seconds for sound in sounds) < max(sound.seconds for sound in sounds) < 2
    assert {datum.label for datum in data} == {"digits", "letters", "phonetic"}
    assert len(opened(part="phonetic").ids) == 27


def test_a_part_keeps_the_ids_of_the_whole():
    assert list(opened(part="digits").ids) == [name for name in opened(part="all").ids if name.startswith("digits/")]


def test_neighbours_are_of_one_length():
    words = opened()
    lengths = [words.read(position).content.seconds for position in range(182)]
    assert lengths == sorted(lengths)


def test_the_job_that_ships_is_valid():
    job = load_job(JOB)
    assert job.dataset.kind == job.name == "speech"
    assert job.signal.kind == "audio"
    assert job.needs_calibration
