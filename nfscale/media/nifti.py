"""Volumes in NIfTI files, with nibabel: one volume and its affine out of a file, and into one.

Files come from strangers: a gzip stream of kilobytes may hold gigabytes, and a header may claim any size; so both are
bounded and compared with what is there before an array is made.
"""

import io
import logging
import math
import os
import zlib
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from nfscale.errors import CallerError
from nfscale.signals.mapped import MAX_MAPPED
from nfscale.signals.volume import MAX_CELLS, Voxels

MAX_VALUES = 64 << 20
"""Of one volume: a head at half a millimetre."""

_MOST_BYTES = 8 * MAX_VALUES + (1 << 20)  # of the file when it is unpacked
_HEADER_BYTES = 540  # of the second version; the first has 348
_GZIP = b"\x1f\x8b"
_MILLIMETRES = {"meter": 1000.0, "mm": 1.0, "micron": 0.001, "unknown": 1.0}


def library() -> Any:
    """The nibabel package.

    Raises:
        CallerError: if it is not installed.
    """
    try:
        import nibabel
    except ImportError as error:
        raise CallerError("NIfTI files need the package nibabel; pip install 'nfscale[volume]'") from error
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # it tells the terminal of each header that it mends
    return nibabel


def read_nifti(content: bytes) -> Voxels:
    """The one volume of a .nii or .nii.gz file: numbers as the header scales them, [Z, Y, X].

    Raises:
        ValueError: in a sentence that becomes the row's reason.
        CallerError: without nibabel.
    """
    nibabel = library()
    plain = _unpacked(content) if content[:2] == _GZIP else content
    form = nibabel.Nifti2Image if plain[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c") else nibabel.Nifti1Image
    try:
        image = form.from_bytes(plain)
        shape, dtype = image.shape, image.get_data_dtype()
        offset = int(image.dataobj.offset)
    except Exception as error:  # whatever the library makes of a damaged header
        raise ValueError("not a NIfTI file, or one with a damaged header") from error
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        raise ValueError(f"a volume has 3 axes, and the file has {len(shape)}: {list(shape)}; cut it into volumes")
    if dtype.kind not in "iuf":
        raise ValueError(f"its values are {dtype}; volumes are integers or floats")
    count = math.prod(shape)
    if not 0 < count <= MAX_VALUES:
        raise ValueError(f"too large or empty: {list(shape)} cells, at most {MAX_VALUES:,} are read")
    if offset + count * dtype.itemsize > len(plain):
        raise ValueError(f"truncated: it has {len(plain):,} bytes, its header says {offset + count * dtype.itemsize:,}")
    try:
        with np.errstate(all="ignore"):
            values = image.get_fdata(dtype=np.float32, caching="unchanged").reshape(shape)
        unit = _MILLIMETRES[image.header.get_xyzt_units()[0]]
    except Exception as error:
        raise ValueError(f"cannot be read: {type(error).__name__} {error}") from error
    affine = np.diag([unit, unit, unit, 1.0]) @ image.affine
    return Voxels(np.ascontiguousarray(values.T), affine)


def mapped_nifti(stream: BinaryIO) -> Voxels | None:
    """The volume of a .nii file with more cells than are held in memory, left in the file; None of any other file.

    The stream is left at its start.

    Raises:
        ValueError: if the file is shorter than its header says.
        CallerError: without nibabel.
    """
    start = stream.read(_HEADER_BYTES)
    stream.seek(0)
    size = int.from_bytes(start[:4], "little"), int.from_bytes(start[:4], "big")
    if not lies_on_disk(stream) or not {348, 540} & set(size):
        return None
    nibabel = library()
    form = nibabel.Nifti2Header if 540 in size else nibabel.Nifti1Header
    try:
        header = form.from_fileobj(io.BytesIO(start))
        shape, dtype, offset = header.get_data_shape(), header.get_data_dtype(), int(header.get_data_offset())
        slope, intercept = header.get_slope_inter()
        unit = _MILLIMETRES[header.get_xyzt_units()[0]]
        affine = np.diag([unit, unit, unit, 1.0]) @ header.get_best_affine()
    except Exception:  # what reads small files says why
        return None
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 or dtype.kind not in "iuf" or not MAX_CELLS < math.prod(shape) <= MAX_MAPPED:
        return None
    values = mapped(stream, dtype, offset, shape, "F")
    stored = (1.0, 0.0) if slope is None else (float(slope), float(intercept or 0.0))
    return Voxels(values.T, affine, stored=stored)


def lies_on_disk(stream: BinaryIO) -> bool:
    """Whether a stream is a file that can be mapped."""
    try:
        stream.fileno()
    except (OSError, AttributeError):
        return False
    return True


def mapped(
    stream: BinaryIO, dtype: np.dtype, offset: int, shape: tuple[int, ...], order: Literal["C", "F"]
) -> np.ndarray:
    """An array in a file, read as it is looked at; it outlives the stream.

    Raises:
        ValueError: if the file is too short for it.
    """
    there, wanted = os.fstat(stream.fileno()).st_size, offset + math.prod(shape) * dtype.itemsize
    if not 0 <= offset <= wanted <= there:
        raise ValueError(f"truncated: it has {there:,} bytes, its header says {wanted:,}")
    return np.memmap(stream, dtype, "r", offset, shape, order)  # type: ignore[call-overload]


def _unpacked(content: bytes) -> bytes:
    """What a gzip file holds, up to a limit."""
    stream = zlib.decompressobj(zlib.MAX_WBITS | 16)
    try:
        plain = stream.decompress(content, _MOST_BYTES + 1)
    except zlib.error as error:
        raise ValueError(f"a damaged gzip file: {error}") from error
    if len(plain) > _MOST_BYTES:
        raise ValueError(f"too large: it unpacks to more than {_MOST_BYTES:,} bytes")
    if not stream.eof:
        raise ValueError("truncated: the gzip file ends early")
    return plain


def write_nifti(content: Voxels, path: Path) -> None:
    """float32, with the affine as both forms of the header; several channels become the fifth axis.

    Raises:
        OSError: if it cannot be written.
    """
    nibabel = library()
    assert content.affine is not None
    values = content.values if content.values.ndim == 4 else content.values[..., None]
    array = values.transpose(2, 1, 0, 3).astype(np.float32)
    image = nibabel.Nifti1Image(array[..., 0] if array.shape[3] == 1 else array[:, :, :, None], content.affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(content.affine, code="aligned")
    try:
        image.set_qform(content.affine, code="aligned", strip_shears=False)
    except Exception:  # an affine that no rotation and spacing make: the sform alone says it
        image.set_qform(None, code="unknown")
    nibabel.save(image, path)
