"""Volumes: NIfTI, npy, stacks of slices in; NIfTI, npy and pictures of slices out; shown as slices.

Inputs are hostile, and each bad file is a datum with a reason: sizes are compared with what is there before an array is
made, and pickle is never read. A large .npy or .nii that lies on a disk is mapped, and read as its cells are drawn.
"""

import math
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nfscale.hostile import reason_of
from nfscale.media import nifti, pictures
from nfscale.media.base import Beside, Decode, Panel
from nfscale.media.image import ImageMedium
from nfscale.media.stacks import read_pages, read_stack
from nfscale.signals.mapped import MAX_MAPPED
from nfscale.signals.volume import MAX_CELLS, Voxels

_MOST_BYTES = 512 << 20  # of a file
_NUMPY = b"\x93NUMPY"
_PAGED = (".tif", ".tiff")
_SSIM_WINDOW = 7  # cells, the usual one; smaller slices have no SSIM
_SLICES_SHOWN = 6
_SLICES_WRITTEN = 25
_SMALLEST_SIDE = 96  # that a slice is enlarged to on a page


class VolumeMedium:
    """Content: a `signals.Voxels`, or an array."""

    suffixes = frozenset({".nii", ".nii.gz", ".npy", *_PAGED})
    written: tuple[str, ...] = (".nii.gz", ".nii", ".npy", ".png")
    panel_pixels = 330
    legend = (
        "a row each of original slices along z, rebuilt ones, and the error times ten; then the middle across y and x"
    )

    def read(self, stream: BinaryIO, name: str, beside: Beside) -> Any:
        """A volume; of a TIFF of several pages, its pages; of another picture's name, the slices after it by number."""
        start = stream.read(len(_NUMPY))
        stream.seek(0)
        if start == _NUMPY:
            return _read_npy(stream)
        if (mapped := nifti.mapped_nifti(stream)) is not None:
            return mapped
        suffix = Path(name).suffix.lower()
        if suffix in _PAGED and (pages := read_pages(stream, nifti.MAX_VALUES)) is not None:
            return pages
        stream.seek(0)
        if suffix in ImageMedium.suffixes:
            return read_stack(stream, name, beside, nifti.MAX_VALUES)
        content = stream.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"too large: at most {_MOST_BYTES:,} bytes of a volume are read")
        return nifti.read_nifti(content)

    def write(self, content: Voxels, path: Path) -> None:
        """A PNG holds slices along z, up to 25 spread over the volume."""
        suffix = path.suffix.lower()
        if suffix == ".npy":
            np.save(path, content.values)
        elif suffix == ".png":
            slices = _grey(content)[_spread(len(content.values), _SLICES_WRITTEN)]
            sheet = pictures.grid([pictures.to_uint8(one) for one in slices], math.ceil(math.sqrt(len(slices))))
            path.write_bytes(pictures.encoded(sheet, "PNG"))
        else:
            nifti.write_nifti(content, path)

    def measurable(self, original: Voxels) -> bool:
        return min(original.values.shape[1:3]) >= _SSIM_WINDOW

    def measures(self, original: Voxels, rebuilt: Voxels) -> dict[str, float]:
        """`ssim` (Wang et al., 2004), the mean over slices along z, and `ssim_worst_slice`; higher is better."""
        from skimage.metrics import structural_similarity

        low, high = original.value_range or (0.0, 1.0)
        found: list[Any] = [
            structural_similarity(one, other, channel_axis=2, data_range=high - low, win_size=_SSIM_WINDOW)
            for one, other in zip(original.values, rebuilt.values, strict=True)
        ]
        return {"ssim": float(np.mean(found)), "ssim_worst_slice": float(np.min(found))}

    def panels(self, original: Voxels, rebuilt: Voxels, decode: Decode) -> list[Panel]:
        along = _spread(len(original.values), _SLICES_SHOWN)
        sides = [_grey(original), _grey(rebuilt)]
        sheet = _rows([[one[place] for place in along] for one in sides])
        middle = _rows([[one[:, one.shape[1] // 2][::-1], one[:, :, one.shape[2] // 2][::-1]] for one in sides])
        return [
            Panel("image/png", pictures.encoded(sheet, "PNG"), f"slices {', '.join(map(str, along))}"),
            Panel("image/png", pictures.encoded(middle, "PNG"), "across y and x, z up"),
        ]


def _rows(sides: list[list[np.ndarray]]) -> np.ndarray:
    """Originals above rebuilt ones above errors, small ones enlarged."""
    errors = [pictures.error_map(one, other) for one, other in zip(*sides, strict=True)]
    shown = [pictures.to_uint8(one) for row in (*sides, errors) for one in row]
    enlarge = max(1, _SMALLEST_SIDE // max(max(one.shape[:2]) for one in shown))
    return pictures.grid([pictures.enlarged(one, enlarge) for one in shown], len(errors))


def _grey(content: Voxels) -> np.ndarray:
    """Values as shares of their range, [Z, Y, X, C], rows in the order that has the front of a head up."""
    low, high = content.value_range or (float(content.values.min()), float(content.values.max()) + 1e-12)
    scaled = np.clip((content.values - low) / (high - low), 0, 1)
    from_back = content.affine is not None and content.affine[1, 1] > 0
    return scaled[:, ::-1] if from_back else scaled


def _spread(count: int, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int))


def _read_npy(stream: BinaryIO) -> np.ndarray:
    try:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"of version {version} of the npy format; 1.0 and 2.0 are read")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        if dtype.kind not in "biuf":
            raise ValueError(f"an array of {dtype}; volumes are integers or floats")
        count = math.prod(shape)
        if MAX_CELLS < count <= MAX_MAPPED and nifti.lies_on_disk(stream):
            return nifti.mapped(stream, dtype, stream.tell(), shape, "F" if fortran else "C")
        if count > nifti.MAX_VALUES:
            raise ValueError(f"too large: {list(shape)} values, at most {nifti.MAX_VALUES:,} are read")
        content = stream.read(count * dtype.itemsize)
        if len(content) < count * dtype.itemsize:
            raise ValueError("truncated: the file holds fewer values than it states")
    except Exception as error:  # a damaged header makes the reader raise SyntaxError, KeyError, ...
        raise ValueError(reason_of(error)) from error
    array = np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")
    return np.ascontiguousarray(array, dtype.newbyteorder("="))
