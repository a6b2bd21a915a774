"""Films: mp4 and the like, gif, folders of frames in; mp4, gif and npy out; shown as frames and as an animation.

Inputs are hostile, and each bad file is a datum with a reason: sizes are bounded before and while frames are decoded,
and a file that ends early is none, where players would show what is left of it.
"""

import io
import struct
import tempfile
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nfscale.hostile import reason_of
from nfscale.media import films, pictures
from nfscale.media.base import Beside, Decode, Panel
from nfscale.media.image import ImageMedium
from nfscale.media.stacks import read_stack
from nfscale.signals.video import Clip

_MOST_BYTES = 512 << 20  # of an encoded film
_GIF = b"GIF8"
_PICTURES = ImageMedium.suffixes - {".gif"}
_UNTIMED_SECONDS = 0.1  # of a frame whose gif states no time, as browsers have it
_SSIM_WINDOW = 7  # pixels, the usual one; smaller frames have no SSIM
_FRAMES_SHOWN = 6
_SMALLEST_SIDE = 96  # that a frame is enlarged to on a page


class VideoMedium:
    """Content: a `signals.Clip`."""

    suffixes = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif"})
    written: tuple[str, ...] = (".mp4", ".gif", ".npy")
    panel_pixels = 330
    legend = "a row each of original frames, rebuilt ones, and the error times ten; then original and rebuilt, moving"

    def read(self, stream: BinaryIO, name: str, beside: Beside) -> Clip:
        """A film; of a picture's name, the frames that follow it by number."""
        start = stream.read(len(_GIF))
        stream.seek(0)
        if start == _GIF:
            return read_gif(stream)
        if Path(name).suffix.lower() in _PICTURES:
            return Clip(read_stack(stream, name, beside, films.MAX_VALUES))
        with tempfile.NamedTemporaryFile(suffix=".film") as copy:  # ffmpeg goes back and forth in it
            _copied(stream, copy)
            return films.decoded(Path(copy.name))

    def write(self, content: Clip, path: Path) -> None:
        suffix = path.suffix.lower()
        if suffix == ".npy":
            np.save(path, content.values)
            return
        frames = np.stack([pictures.to_uint8(frame)[..., :3] for frame in content.values])
        if suffix == ".gif":
            path.write_bytes(animated(list(frames), _rate_of(content)))
        else:
            films.write_mp4(frames, _rate_of(content), path)

    def measurable(self, original: Clip) -> bool:
        return True

    def measures(self, original: Clip, rebuilt: Clip) -> dict[str, float]:
        """`psnr_worst_frame_db` and `ssim` (Wang et al., 2004), the mean over frames; higher is better."""
        error = np.square(original.values.astype(np.float64) - rebuilt.values).mean(axis=(1, 2, 3))
        found = {"psnr_worst_frame_db": float(-10 * np.log10(max(float(error.max()), 1e-20)))}
        if min(original.values.shape[1:3]) < _SSIM_WINDOW:
            return found
        from skimage.metrics import structural_similarity

        similarities: list[Any] = [
            structural_similarity(one, other, channel_axis=2, data_range=1.0, win_size=_SSIM_WINDOW)
            for one, other in zip(original.values, rebuilt.values, strict=True)
        ]
        return found | {"ssim": float(np.mean(similarities))}

    def panels(self, original: Clip, rebuilt: Clip, decode: Decode) -> list[Panel]:
        count, height, width, _ = original.values.shape
        enlarge = max(1, _SMALLEST_SIDE // max(height, width))
        shown = np.unique(np.linspace(0, count - 1, min(_FRAMES_SHOWN, count)).round().astype(int))
        rows = [original.values[shown], rebuilt.values[shown]]
        rows.append(np.stack([pictures.error_map(*pair) for pair in zip(*rows, strict=True)]))
        frames = [pictures.to_uint8(frame) for row in rows for frame in row]
        sheet = pictures.grid([pictures.enlarged(frame, enlarge) for frame in frames], len(shown))
        pairs = zip(original.values, rebuilt.values, strict=True)
        moving = [np.concatenate([pictures.to_uint8(side)[..., :3] for side in pair], axis=1) for pair in pairs]
        moving = [pictures.enlarged(frame, enlarge) for frame in moving]
        rate = _rate_of(original)
        return [
            Panel("image/png", pictures.encoded(sheet, "PNG"), f"frames {', '.join(str(one) for one in shown)}"),
            Panel("image/gif", animated(moving, rate), f"original and rebuilt, {rate:g} frames per second"),
        ]


def read_gif(stream: BinaryIO) -> Clip:
    """The frames of a gif, transparent parts on white: uint8 [T, H, W, 3].

    Those that last longer than the shortest stand as often as it takes.

    Raises:
        ValueError: in a sentence that becomes the row's reason.
    """
    content = stream.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"too large: at most {_MOST_BYTES:,} bytes of a gif are read")
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the size check is ours, and stricter
            return _gif_of(content)
    except Image.DecompressionBombError as error:
        raise ValueError(f"too large: {error}") from error
    except Exception as error:  # a damaged file makes a decoder raise struct.error, IndexError, ...
        raise ValueError(reason_of(error)) from error


def _gif_of(content: bytes) -> Clip:
    from PIL import Image

    if not content.rstrip(b"\0").endswith(b";"):  # where a decoder takes the frames that are left for all
        raise ValueError("truncated: the gif does not end with its trailer")
    width, height = struct.unpack_from("<HH", content, len("GIF89a"))
    most = films.MAX_VALUES // 3 // max(1, width * height)
    too_large = ValueError(
        f"too large: frames of {width} x {height} pixels, at most {films.MAX_VALUES // 3:,} pixels are decoded, over "
        "all frames"
    )
    if not most:
        raise too_large  # before the decoder warns of it
    with Image.open(io.BytesIO(content), formats=["GIF"]) as image:
        frames, seconds = [], []
        while True:
            if len(frames) >= most:
                raise too_large
            if image.size != (width, height):  # decoders enlarge the picture, to any size
                raise ValueError(f"the picture is {width} x {height} pixels, and frame {len(frames)} reaches out of it")
            frames.append(_on_white(image))
            seconds.append(image.info.get("duration", 0) / 1000 or _UNTIMED_SECONDS)
            try:
                image.seek(len(frames))
            except EOFError:
                break
    times = np.rint(np.array(seconds) / min(seconds)).astype(int)
    if times.sum() > most:
        raise too_large
    return Clip(np.repeat(np.stack(frames), times, axis=0), round(float(times.sum() / sum(seconds)), 3))


def _on_white(image: Any) -> np.ndarray:
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB"))
    pixels = np.asarray(image.convert("RGBA"))
    return np.where(pixels[..., 3:] >= 128, pixels[..., :3], np.uint8(255))


def animated(frames: list[np.ndarray], rate: float) -> bytes:
    """uint8 [H, W, 3] each -> a gif, whose frames last hundredths of a second: at the rate on average."""
    from PIL import Image

    ends = np.rint(np.arange(len(frames) + 1) * 100 / rate)
    durations = [int(one) * 10 for one in np.maximum(np.diff(ends), 1)]
    images = [Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0, disposal=1)
    return buffer.getvalue()


def _copied(stream: BinaryIO, copy: Any) -> None:
    left = _MOST_BYTES
    while left >= 0 and (part := stream.read(min(1 << 20, left + 1))):
        copy.write(part)
        left -= len(part)
    if left < 0:
        raise ValueError(f"too large: at most {_MOST_BYTES:,} bytes of a film are read")
    copy.flush()


def _rate_of(clip: Clip) -> float:
    return clip.rate or 25.0
