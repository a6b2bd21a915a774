"""Sounds: wav, flac, ogg (Vorbis, Opus) and mp3 in, wav and flac out; shown as waveform, spectrogram and player.

Files are decoded by libsndfile (the package soundfile). They are hostile, and libsndfile is lenient: it takes what
is left of a truncated wav or ogg for the whole, would allocate whatever a flac claims, and reads a dozen formats by
their first bytes. So formats are told apart here, lengths are compared with what the headers say, and samples are
read in blocks up to a limit.
"""

import io
import struct
import wave
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from nfscale.errors import CallerError
from nfscale.media.base import Beside, Decode, Panel
from nfscale.signals.audio import Sound

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_ENCODED_BYTES = 256 << 20
MAX_VALUES = 16 << 20
"""Samples times channels: 6 minutes at 44,100 Hz, more than a field can represent."""
MAX_CHANNELS = 8

_BLOCK = 1 << 16  # samples decoded at a time
_UNKNOWN = 0xFFFFFFFF  # a wav that was written into a pipe states this length
_UNSTATED = 1 << 62  # libsndfile says as much or more of a file that states no length
_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))

_FRAME_SECONDS = 0.032  # of a spectrogram, the usual window for speech
_FLOOR = 1e-8  # of the loudest: 80 dB below it, where log spectra end
_SHOWN_DB = 80.0
_PLAYED_SECONDS = 10.0  # a page holds dozens of players
_COLUMNS = 600  # of a waveform
_ERROR_GAIN = 10.0  # at 30 dB the error of a waveform is a line otherwise
_INK, _BLUE, _ORANGE = "#767676", "#3b82c4", "#d9822b"  # legible on white and on black


class AudioMedium:
    """Content: a `signals.audio.Sound`."""

    suffixes = frozenset({".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3"})
    written: tuple[str, ...] = (".wav", ".flac")
    panel_pixels = 330
    legend = (
        "above the original, below what the field says: waveform (orange: the error, ten times as large), "
        "spectrogram (80 dB from dark to bright), and the first ten seconds to listen to"
    )

    def read(self, stream: BinaryIO, name: str, beside: Beside) -> Sound:
        encoded = stream.read(MAX_ENCODED_BYTES + 1)
        if len(encoded) > MAX_ENCODED_BYTES:
            raise ValueError(f"too large: more than {MAX_ENCODED_BYTES} bytes")
        return decoded(encoded)

    def write(self, content: Sound, path: Path) -> None:
        """16 bits; what is beyond full scale is clipped."""
        if path.suffix.lower() == ".wav":
            path.write_bytes(as_wav(content))
            return
        soundfile = _soundfile()
        try:
            soundfile.write(path, _as_int16(content), content.rate, format="FLAC", subtype="PCM_16")
        except soundfile.LibsndfileError as error:
            raise OSError(str(error)) from error

    def measurable(self, original: Sound) -> bool:
        return len(original.values) >= _frame_samples(original.rate)

    def measures(self, original: Sound, rebuilt: Sound) -> dict[str, float]:
        """`log_spectral_distance_db`, lower is better.

        The root mean square over frequencies of the difference of the log power spectra, averaged over frames of
        32 ms (Gray & Markel, 1976); powers more than 80 dB below the loudest of the original count as that.
        """
        spectra = [power_spectra(sound) for sound in (original, rebuilt)]
        floor = _floor_of(spectra[0])
        first, second = (10 * np.log10(np.maximum(spectrum, floor)) for spectrum in spectra)
        return {"log_spectral_distance_db": float(np.sqrt(np.square(first - second).mean(axis=1)).mean())}

    def panels(self, original: Sound, rebuilt: Sound, decode: Decode) -> list[Panel]:
        """Two rows of three: waveform, spectrogram and player of each."""
        peak = max(float(np.abs(original.values).max()), 1e-4)
        loudest = power_spectra(original).max()
        shown = []
        for sound, caption in ((original, "original"), (rebuilt, "rebuilt")):
            error = None if sound is original else rebuilt.values - original.values
            shown += [
                Panel("image/webp", _waveform(sound, error, peak), caption),
                Panel("image/webp", _spectrogram(sound, loudest), caption),
                Panel("audio/wav", as_wav(_beginning(sound)), caption),
            ]
        return shown


# --- files


def _soundfile() -> Any:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the package is there and libsndfile is not
        raise CallerError("sound files need the package soundfile; pip install 'nfscale[audio]'") from error
    return soundfile


def decoded(encoded: bytes) -> Sound:
    """The sound in the bytes of a file.

    Raises:
        ValueError: in a sentence that becomes the row's reason.
        CallerError: if soundfile is not installed.
    """
    soundfile = _soundfile()
    _refuse_damaged(encoded)
    try:
        with soundfile.SoundFile(io.BytesIO(encoded)) as file:
            return _all_of(file)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"damaged or truncated; the decoder says: {error.error_string.strip()}") from error
    except (RuntimeError, TypeError, MemoryError) as error:
        raise ValueError(f"cannot be decoded: {type(error).__name__} {error}") from error


def _all_of(file: Any) -> Sound:
    """The samples of an opened file, if they are as many as it states."""
    channels, rate = file.channels, file.samplerate
    if channels > MAX_CHANNELS:
        raise ValueError(f"{channels} channels; at most {MAX_CHANNELS} are read")
    stated = file.frames if file.frames < _UNSTATED else 0
    most = MAX_VALUES // channels
    if stated > most:
        raise ValueError(f"too long: it claims {stated / rate:.0f} seconds, at most {most / rate:.0f} are read")
    blocks, count = [], 0
    while len(block := file.read(_BLOCK, dtype="float32", always_2d=True)):
        blocks.append(block)
        count += len(block)
        if count > most:
            raise ValueError(f"too long: at most {most / rate:.0f} seconds are read")
    if count < stated:
        raise ValueError(f"truncated or damaged: it holds {count} of the {stated} samples that it states")
    if not count:
        raise ValueError("a sound without samples")
    values = np.concatenate(blocks)
    if not np.isfinite(values).all():
        raise ValueError("the sound holds NaN or infinite values")
    return Sound(values, int(rate))


def _refuse_damaged(encoded: bytes) -> None:
    """Look for what libsndfile passes over.

    Raises:
        ValueError: if the file is of no format that is read, or its parts are not what they say.
    """
    if not encoded:
        raise ValueError("an empty file")
    if encoded[:4] in (b"RIFF", b"RF64") and encoded[8:12] == b"WAVE":
        _refuse_short_wav(encoded)
        return
    if encoded[:4] == b"OggS":
        _refuse_damaged_ogg(encoded)
        return
    is_mp3 = encoded[:3] == b"ID3" or (len(encoded) > 1 and encoded[0] == 0xFF and encoded[1] & 0xE0 == 0xE0)
    if encoded[:4] != b"fLaC" and not is_mp3:
        raise ValueError("not a sound, or a format other than wav, flac, ogg and mp3")


def _refuse_short_wav(encoded: bytes) -> None:
    """Compare what the samples' chunk states with what is there; libsndfile takes what is there."""
    place, wide = 12, None
    while place + 8 <= len(encoded):
        name, size = encoded[place : place + 4], struct.unpack_from("<I", encoded, place + 4)[0]
        place += 8
        if name == b"ds64" and place + 16 <= len(encoded):  # of RF64, whose other sizes say that they are unknown
            wide = struct.unpack_from("<Q", encoded, place + 8)[0]
        if name == b"data":
            size = size if wide is None or size != _UNKNOWN else wide
            if size != _UNKNOWN and place + size > len(encoded):
                held = len(encoded) - place
                raise ValueError(f"truncated: its header states {size} bytes of samples, {held} are there")
            return
        place += size + size % 2
    raise ValueError("truncated: a wav file without samples")


def _refuse_damaged_ogg(encoded: bytes) -> None:
    """Walk along the pages; libsndfile leaves out those that are damaged, and ends where the file ends.

    That the last page says that it is the last is not asked for: what some encoders write does not.
    """
    place = 0
    while place < len(encoded):
        if encoded[place : place + 4] != b"OggS":
            raise ValueError(f"damaged: no ogg page at byte {place}")
        content = place + 27 + (encoded[place + 26] if place + 27 <= len(encoded) else 0)
        following = content + sum(encoded[place + 27 : content])
        if max(content, following) > len(encoded):
            raise ValueError("truncated: it ends within an ogg page")
        checksum = struct.unpack_from("<I", encoded, place + 22)[0]
        page = encoded[place : place + 22] + bytes(4) + encoded[place + 26 : following]
        if _ogg_checksum(page) != checksum:
            raise ValueError(f"damaged: the ogg page at byte {place} does not have its checksum")
        place = following


def _ogg_checksum(page: bytes) -> int:
    """The CRC-32 of ogg: that of zlib with the bits the other way round, and neither of its inversions."""
    mirrored = zlib.crc32(page.translate(_MIRRORED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{mirrored:032b}"[::-1], 2)


def _as_int16(sound: Sound) -> np.ndarray:
    return np.rint(np.clip(sound.values * 32768.0, -32768, 32767)).astype("<i2")


def as_wav(sound: Sound) -> bytes:
    """A wav file of 16 bits; what is beyond full scale is clipped."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(sound.values.shape[1])
        file.setsampwidth(2)
        file.setframerate(sound.rate)
        file.writeframes(_as_int16(sound).tobytes())
    return buffer.getvalue()


# --- what a page shows


def _frame_samples(rate: int) -> int:
    """A power of two near `_FRAME_SECONDS`."""
    return 1 << max(3, round(np.log2(_FRAME_SECONDS * rate)))


def power_spectra(sound: Sound) -> np.ndarray:
    """Power by frame and frequency, averaged over channels: [frames, bins]; Hann windows, a quarter apart."""
    size = _frame_samples(sound.rate)
    values = np.pad(sound.values.astype(np.float64), ((0, max(0, size - len(sound.values))), (0, 0)))
    frames = np.lib.stride_tricks.sliding_window_view(values, size, axis=0)[:: size // 4]
    window = np.hanning(size + 1)[:-1]
    return np.square(np.abs(np.fft.rfft(frames * window, axis=2))).mean(axis=1)


def _floor_of(power: np.ndarray) -> float:
    return max(float(power.max()) * _FLOOR, 2.0**-30)


def _beginning(sound: Sound) -> Sound:
    return Sound(sound.values[: int(_PLAYED_SECONDS * sound.rate)], sound.rate)


def _waveform(sound: Sound, error: np.ndarray | None, peak: float) -> bytes:
    """Least and greatest amplitude in each column, the error on top."""

    def draw(axes: "Axes") -> None:
        _band(axes, sound.values, sound.seconds, _BLUE)
        if error is not None:
            _band(axes, error * _ERROR_GAIN, sound.seconds, _ORANGE)
        axes.set_ylim(-1.1 * peak, 1.1 * peak)
        axes.set_ylabel("amplitude")

    return _drawn(draw, sound.seconds)


def _band(axes: "Axes", values: np.ndarray, seconds: float, colour: str) -> None:
    columns = np.array_split(values, min(_COLUMNS, len(values)))
    low, high = (np.array([pick(column) for column in columns]) for pick in (np.min, np.max))
    times = (np.arange(len(columns)) + 0.5) * seconds / len(columns)
    axes.fill_between(times, low, high, color=colour, linewidth=0.6)


def _spectrogram(sound: Sound, loudest: float) -> bytes:
    power = power_spectra(sound)
    level = 10 * np.log10(np.maximum(power, 2.0**-30))
    top = 10 * np.log10(max(loudest, 2.0**-30))

    def draw(axes: "Axes") -> None:
        extent = (0.0, sound.seconds, 0.0, sound.rate / 2000)
        axes.imshow(
            level.T,
            origin="lower",
            aspect="auto",
            extent=extent,
            cmap="magma",
            vmin=top - _SHOWN_DB,
            vmax=top,
            interpolation="bilinear",
        )
        axes.set_ylabel("kHz")

    return _drawn(draw, sound.seconds)


def _drawn(draw: Any, seconds: float) -> bytes:
    """A small plot over time on a transparent ground, in ink that light and dark pages show: WebP, a tenth of a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.8, 1.7), layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.set_xlim(0, seconds)
    axes.set_xlabel("seconds")
    axes.tick_params(colors=_INK, labelsize=8)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(_INK)
        label.set_fontsize(8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_INK)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="webp", dpi=150, transparent=True, pil_kwargs={"quality": 80, "method": 4})
    return buffer.getvalue()
