"""Films in files of ffmpeg's formats, which imageio-ffmpeg brings along: decoded to frames, encoded as mp4.

Files come from strangers, and ffmpeg reads hundreds of formats, some of which name other files or addresses. So it
reads one local file of a few formats and nothing beside it, stops at the first error instead of hiding it, and is ended
when it has said more than is asked for or takes too long.
"""

import re
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np

from nfscale.errors import CallerError
from nfscale.signals.video import Clip

MAX_VALUES = 192 << 20
"""Of all decoded frames together: 64 Mi pixels in colour, as many as of an image."""

_MAX_FRAME_PIXELS = 64 << 20
_SECONDS = 300.0  # for one film, on any machine
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
_QUALITY = "14"  # of x264: compression artefacts are far below what a field leaves
_CHUNK = 1 << 20
_HEADER = re.compile(rb"P6\n(\d+) (\d+)\n255\n")
_RATE = re.compile(r"Video: .*?, (\d+(?:\.\d+)?) fps")
_ERROR = re.compile(r"\[(?:error|fatal)\] (.*)")


def ffmpeg() -> str:
    """The program's path.

    Raises:
        CallerError: if it is not installed.
    """
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise CallerError("films need the package imageio-ffmpeg; pip install 'nfscale[video]'") from error
    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise CallerError(f"films need ffmpeg, and imageio-ffmpeg has none for this machine: {error}") from error


def decoded(path: Path, start: int = 0, stop: int | None = None) -> Clip:
    """Frames `start` to `stop` - 1 of a file, or all of them: uint8 [T, H, W, 3].

    Raises:
        ValueError: in a sentence that becomes the row's reason.
        CallerError: without imageio-ffmpeg.
    """
    wanted = [] if stop is None else ["-vf", f"trim=start_frame={start}:end_frame={stop}"]
    content, log = _said(
        [
            *(ffmpeg(), "-nostdin", "-hide_banner", "-nostats", "-loglevel", "level+info", "-xerror"),
            *("-protocol_whitelist", "file", "-format_whitelist", _FORMATS, "-max_pixels", str(_MAX_FRAME_PIXELS)),
            *("-threads", "1", "-i", f"file:{path}", "-map", "0:v:0", *wanted, "-fps_mode", "passthrough"),
            *("-threads", "1", "-pix_fmt", "rgb24", "-c:v", "ppm", "-f", "image2pipe", "-"),
        ],
        path,
    )
    rate = _RATE.search(log)
    return Clip(_frames_of(content), float(rate[1]) if rate else None)


def _said(command: list[str], path: Path) -> tuple[bytes, str]:
    """What ffmpeg writes, and what it tells of the file."""
    parts: list[bytes] = []
    with (
        tempfile.TemporaryFile() as told,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=told) as process,
    ):
        watchdog = threading.Timer(_SECONDS, process.kill)
        watchdog.start()
        try:
            assert process.stdout is not None
            left = MAX_VALUES + _CHUNK  # headers of frames
            while left > 0 and (part := process.stdout.read(_CHUNK)):
                parts.append(part)
                left -= len(part)
            if left <= 0:
                raise ValueError(f"too large: at most {MAX_VALUES // 3:,} pixels are decoded, over all frames")
            code = process.wait()
        finally:
            watchdog.cancel()
            process.kill()
        told.seek(0)
        log = told.read(_CHUNK).decode("utf-8", "replace").replace(str(path), "the file")
    if code < 0:
        raise ValueError(f"cannot be decoded: it took longer than {_SECONDS:.0f} seconds, or the decoder crashed")
    if code:
        why = _ERROR.search(log)
        raise ValueError(f"no film, or a damaged or truncated one; the decoder says: {why[1] if why else code}")
    return b"".join(parts), log


def _frames_of(content: bytes) -> np.ndarray:
    """Pictures with a header each, one after the other, as uint8 [T, H, W, 3]."""
    header = _HEADER.match(content)
    if header is None:
        raise ValueError("a film without frames")
    width, height = int(header[1]), int(header[2])
    size = len(header[0]) + width * height * 3
    if len(content) % size:
        raise ValueError("a film whose frames are not of one size")
    pictures = np.frombuffer(content, np.uint8).reshape(-1, size)[:, len(header[0]) :]
    return np.ascontiguousarray(pictures).reshape(-1, height, width, 3)


def write_mp4(frames: np.ndarray, rate: float, path: Path) -> None:
    """uint8 [T, H, W, 3] as H.264.

    Where a side is odd the colours stay as fine as the brightness, which fewer players show.

    Raises:
        OSError: if it cannot be written.
    """
    _, height, width, _ = frames.shape
    fine = bool(height % 2 or width % 2)
    command: list[Any] = [
        *(ffmpeg(), "-nostdin", "-hide_banner", "-loglevel", "error", "-y"),
        *("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{rate:g}", "-i", "-"),
        *("-c:v", "libx264", "-crf", _QUALITY, "-pix_fmt", "yuv444p" if fine else "yuv420p", "-movflags", "+faststart"),
        *("-f", "mp4", f"file:{path}"),
    ]
    done = subprocess.run(command, input=np.ascontiguousarray(frames).tobytes(), capture_output=True)
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise OSError(f"ffmpeg failed: {lines[0] if lines else done.returncode}")
