"""Sound files are read, written and shown; hostile ones are refused in a sentence.

Oracles: closed forms, the standard library's wave, and files that libsndfile writes.
"""

import contextlib
import io
import struct
import wave

import numpy as np
import pytest
from PIL import Image as PillowImage

from nfscale.datasets.folder import Folder
from nfscale.errors import CallerError
from nfscale.media import audio
from nfscale.media.audio import AudioMedium, as_wav, decoded, power_spectra
from nfscale.signals import Audio, Sound
from tests.media.pages import no_other_shape

soundfile = pytest.importorskip("soundfile")

MEDIUM = AudioMedium()
RATE, COUNT = 8000, 8000
TONE = (0.5 * np.sin(2 * np.pi * 440 * np.arange(COUNT) / RATE)).astype(np.float32)


def encoded(kind: str, subtype: str | None = None, values: np.ndarray = TONE, channels: int = 1) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.repeat(values[:, None], channels, axis=1), RATE, format=kind, subtype=subtype)
    return buffer.getvalue()


def patched(content: bytes, place: int, new: bytes) -> bytes:
    return content[:place] + new + content[place + len(new) :]


def nothing(name: str):
    raise OSError(name)


# What is read and written


@pytest.mark.parametrize(
    ("kind", "subtype", "largest_error"),
    [
        ("WAV", "PCM_U8", 2.0**-7),
        ("WAV", "PCM_16", 2.0**-15),
        ("WAV", "PCM_24", 2.0**-23),
        ("WAV", "FLOAT", 0.0),
        ("WAVEX", "PCM_16", 2.0**-15),
        ("RF64", "PCM_16", 2.0**-15),
        ("FLAC", "PCM_16", 2.0**-15),
        ("FLAC", "PCM_24", 2.0**-23),
        ("OGG", "VORBIS", 0.1),
        ("OGG", "OPUS", 0.1),
        ("MP3", None, 0.1),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_formats_are_read(kind, subtype, largest_error, channels):
    content = encoded(kind, subtype, channels=channels)
    sound = MEDIUM.read(io.BytesIO(content), "its name says nothing.txt", nothing)
    assert sound.rate == RATE
    assert sound.values.shape == (COUNT, channels)
    assert sound.values.dtype == np.float32
    assert np.abs(sound.values - TONE[:, None])[800:-800].max() <= largest_error


def test_a_wav_out_of_a_pipe_does_not_know_its_length():
    content = encoded("WAV")
    assert content[36:40] == b"data"
    assert len(decoded(patched(content, 40, b"\xff\xff\xff\xff")).values) == COUNT


@pytest.mark.parametrize("channels", [1, 2])
def test_a_wav_is_what_the_standard_library_reads(tmp_path, channels):
    values = np.array([0.0, 0.5, -0.5, 1.0, -1.0, 1.7, -1.7, 2.0**-15], np.float32)
    values = np.repeat(values[:, None], channels, axis=1)
    MEDIUM.write(Sound(values, 11025), tmp_path / "x.wav")
    with wave.open(str(tmp_path / "x.wav")) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (11025, channels, 2)
        read = np.frombuffer(file.readframes(8), "<i2").reshape(8, channels)
    assert read[:, 0].tolist() == [0, 16384, -16384, 32767, -32768, 32767, -32768, 1]


@pytest.mark.parametrize("suffix", MEDIUM.written)
def test_from_a_file_through_samples_to_a_file(tmp_path, suffix):
    signal = Audio(1)
    sound = decoded(encoded("WAV"))
    samples = signal.samples(sound)
    order = np.unique(samples.coordinates.numpy(), return_index=True)[1]
    shape = signal.shape_of(signal.measures(sound))
    MEDIUM.write(signal.reconstruct(samples.values[order][None], shape)[0], tmp_path / f"x{suffix}")
    back = decoded((tmp_path / f"x{suffix}").read_bytes())
    assert back.rate == RATE
    assert np.array_equal(back.values, sound.values)


def test_what_cannot_be_written_is_an_os_error(tmp_path):
    for suffix in MEDIUM.written:
        with pytest.raises(OSError, match=r"."):
            MEDIUM.write(Sound(TONE[:, None], RATE), tmp_path / "absent" / f"x{suffix}")


def test_without_the_package_the_caller_is_told(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    with pytest.raises(CallerError, match=r"pip install 'nfscale\[audio\]'"):
        decoded(encoded_wav := as_wav(Sound(TONE[:, None], RATE)))
    assert encoded_wav


# Hostile files


WAV, FLAC, OGG, MP3 = (encoded(kind) for kind in ("WAV", "FLAC", "OGG", "MP3"))
HOURS = struct.pack("<I", 8000 * 2 * 3600 * 24)
CLAIMS = patched(patched(FLAC, 21, bytes([FLAC[21] | 0x0F])), 22, b"\xff\xff\xff\xff")

HOSTILE = {
    "empty": (b"", "an empty file"),
    "text": (b"this is no sound\n" * 100, "not a sound, or a format other than"),
    "zeros": (bytes(10_000), "not a sound"),
    "aiff": (encoded("AIFF"), "not a sound"),
    "wav, its header alone": (WAV[:20], "truncated: a wav file without samples"),
    "wav, no samples": (encoded("WAV", values=TONE[:0]), "without samples"),
    "wav, half of it": (WAV[: len(WAV) // 2], "truncated: its header states 16000 bytes of samples, 7978 are there"),
    "wav, its last byte": (WAV[:-1], "truncated"),
    "wav, claims a day": (patched(WAV, 40, HOURS), "truncated: its header states 1382400000 bytes"),
    "rf64, half of it": ((lambda c: c[: len(c) // 2])(encoded("RF64")), "truncated: its header states 16000"),
    "wav, no channels": (patched(WAV, 22, b"\0\0"), "damaged or truncated"),
    "wav, no rate": (patched(WAV, 24, bytes(4)), "damaged or truncated"),
    "wav, no format": (patched(WAV, 20, b"\x99\x99"), "damaged or truncated"),
    "wav, 64 channels": (encoded("WAV", values=TONE[:100], channels=64), "64 channels; at most 8"),
    "wav, NaN": (encoded("WAV", "FLOAT", np.array([0.0, np.nan, 0.1], np.float32)), "NaN or infinite"),
    "wav, infinite": (encoded("WAV", "FLOAT", np.array([0.0, -np.inf], np.float32)), "NaN or infinite"),
    "flac, its beginning": (FLAC[:20], "damaged or truncated"),
    "flac, half of it": (FLAC[: len(FLAC) // 2], "damaged or truncated"),
    "flac, damaged": (patched(FLAC, len(FLAC) // 2, b"\x55" * 200), "damaged or truncated"),
    "flac, claims centuries": (CLAIMS, "too long: it claims 858993[45] seconds"),
    "ogg, its beginning": (OGG[:20], "truncated: it ends within an ogg page"),
    "ogg, half of it": (OGG[: len(OGG) // 2], "truncated: it ends within an ogg page"),
    "ogg, its last byte": (OGG[:-1], "truncated: it ends within an ogg page"),
    "ogg, damaged": (patched(OGG, len(OGG) - 100, b"\x55" * 50), "damaged: the ogg page at byte"),
    "ogg, and something else": (OGG + b"trailing", "damaged: no ogg page at byte"),
    "mp3, its beginning": (MP3[:20], "damaged or truncated"),
    "mp3, half of it": (MP3[: len(MP3) // 2], "truncated or damaged: it holds"),
    "mp3, damaged": (patched(MP3, len(MP3) // 2, b"\x55" * 400), "truncated or damaged: it holds"),
    "mp3, not one": (b"ID3" + bytes(2000), "damaged or truncated"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files_are_refused_in_one_sentence(what):
    content, message = HOSTILE[what]
    with pytest.raises(ValueError, match=message) as error:
        decoded(content)
    assert "\n" not in str(error.value)


def test_a_folder_of_all_sorts_is_rows_and_reasons(tmp_path):
    files = {
        "a/mono.wav": WAV,
        "a/other rate.flac": as_flac(TONE, 11025),
        "b/lossy.mp3": MP3,
        "b/named.wav": b"text",
        "b/short.ogg": OGG[:300],
        "b/stereo.wav": encoded("WAV", channels=2),
        "notes.txt": b"no datum",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    dataset = Folder(str(tmp_path), label_from="parent", modality="audio").open()
    data = [dataset.read(position) for position in range(len(dataset.ids))]
    assert [datum.id for datum in data] == sorted(set(files) - {"notes.txt"})
    assert [datum.label for datum in data] == ["a", "a", "b", "b", "b", "b"]
    reasons = [datum.error or reason_for(Audio(1), datum.content) for datum in data]
    for reason, message in zip(reasons, (None, None, None, "not a sound", "truncated", "has 2 channels"), strict=True):
        assert reason == message or message in reason
    assert reason_for(Audio(1, convert="mono"), data[5].content) is None
    assert [datum.content.rate for datum in data[:3]] == [8000, 11025, 8000]


def as_flac(values: np.ndarray, rate: int) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, values, rate, format="FLAC")
    return buffer.getvalue()


def reason_for(signal: Audio, sound: Sound) -> str | None:
    try:
        signal.samples(sound)
    except ValueError as error:
        return str(error)
    return None


def test_random_damage_never_raises_anything_else():
    draw = np.random.default_rng(0)
    for content in (WAV, FLAC, OGG, MP3):
        for _ in range(25):
            damaged = bytearray(content[: int(draw.integers(1, len(content)))])
            for place in draw.integers(0, min(len(damaged), 200), 3):
                damaged[place] = int(draw.integers(256))
            with contextlib.suppress(ValueError):
                assert np.isfinite(decoded(bytes(damaged)).values).all()


def test_what_is_too_large_is_not_read(monkeypatch):
    monkeypatch.setattr(audio, "MAX_VALUES", 1000)
    with pytest.raises(ValueError, match="too long: it claims 1 seconds"):
        decoded(WAV)
    monkeypatch.setattr(audio, "MAX_ENCODED_BYTES", 1000)
    with pytest.raises(ValueError, match="too large: more than 1000 bytes"):
        MEDIUM.read(io.BytesIO(WAV), "x.wav", nothing)


def test_one_sample_is_a_sound():
    for kind in ("WAV", "FLAC", "OGG"):
        assert decoded(encoded(kind, values=TONE[:1])).values.shape == (1, 1)


# Measures and panels


def test_the_spectrum_of_a_tone_is_where_the_tone_is():
    power = power_spectra(Sound(TONE[:, None], RATE))
    assert power.shape == ((COUNT - 256) // 64 + 1, 129)
    assert set(power.argmax(axis=1)) == {round(440 / (RATE / 256))}


def test_spectral_distance_of_a_gain_is_that_gain_in_decibels():
    """At half the amplitude every power is a quarter: 20 log10(2) dB everywhere above the floor."""
    noise = Sound(np.random.default_rng(0).normal(size=(COUNT, 2)).astype(np.float32) * 0.1, RATE)
    half = Sound(noise.values / 2, RATE)
    assert MEDIUM.measures(noise, noise) == {"log_spectral_distance_db": 0.0}
    assert MEDIUM.measures(noise, half)["log_spectral_distance_db"] == pytest.approx(20 * np.log10(2), abs=1e-3)


def test_spectral_distance_of_silence_is_finite():
    silent = Sound(np.zeros((COUNT, 1), np.float32), RATE)
    assert MEDIUM.measures(silent, silent) == {"log_spectral_distance_db": 0.0}
    assert np.isfinite(MEDIUM.measures(silent, Sound(TONE[:, None], RATE))["log_spectral_distance_db"])


def test_sounds_shorter_than_a_frame_have_no_spectral_distance():
    assert not MEDIUM.measurable(Sound(TONE[:255, None], RATE))
    assert MEDIUM.measurable(Sound(TONE[:256, None], RATE))


@pytest.mark.parametrize("values", [TONE, TONE[:1], np.zeros(300, np.float32)], ids=["tone", "one sample", "silence"])
def test_a_page_shows_and_plays_both(values):
    original = Sound(np.repeat(values[:, None], 2, axis=1), RATE)
    rebuilt = Sound(original.values * np.float32(0.99), RATE)
    panels = MEDIUM.panels(original, rebuilt, no_other_shape)
    assert [panel.mime for panel in panels] == ["image/webp", "image/webp", "audio/wav"] * 2
    assert [panel.caption for panel in panels] == ["original"] * 3 + ["rebuilt"] * 3
    for panel in panels:
        if panel.mime == "image/webp":
            picture = np.asarray(PillowImage.open(io.BytesIO(panel.content)))
            assert picture.shape[2] == 4
            assert picture[0, 0, 3] == 0, "the ground is the page's"
        else:
            with wave.open(io.BytesIO(panel.content)) as file:
                assert file.getnframes() == len(values)


def test_players_hold_the_first_ten_seconds():
    long = Sound(np.zeros((25, 1), np.float32), 2)
    with wave.open(io.BytesIO(MEDIUM.panels(long, long, no_other_shape)[2].content)) as file:
        assert file.getnframes() == 20
