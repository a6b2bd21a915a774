"""Pictures of data beside what the table decodes to: pairs, error maps, and tiles put together again."""

import base64
import io
from typing import Literal

import numpy as np
from PIL import Image as PillowImage

_ERROR_GAIN = 10.0  # an error of a tenth of the range shows as white: at 30 dB the eye needs that much


def to_uint8(image: np.ndarray) -> np.ndarray:
    """[H, W, C] in [0, 1] -> uint8 [H, W, 3] or [H, W, 4]."""
    scaled = (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
    channels = scaled.shape[2]
    if channels in (3, 4):
        return scaled
    return np.repeat(scaled[:, :, :1], 3, axis=2)


def error_map(original: np.ndarray, rebuilt: np.ndarray) -> np.ndarray:
    """Mean absolute error over channels, times `_ERROR_GAIN`: [H, W, 3] in [0, 1]."""
    error = np.abs(original - rebuilt).mean(axis=2, keepdims=True) * _ERROR_GAIN
    return np.repeat(np.clip(error, 0, 1), 3, axis=2)


def grid(images: list[np.ndarray], columns: int, gap: int = 2) -> np.ndarray:
    """Images of any sizes in cells of the largest, row by row: uint8 [H, W, 4], empty places transparent."""
    height, width = (max(image.shape[axis] for image in images) + gap for axis in (0, 1))
    rows = -(-len(images) // columns)
    sheet = np.zeros((rows * height, min(columns, len(images)) * width, 4), dtype=np.uint8)
    for position, image in enumerate(images):
        top, left = position // columns * height, position % columns * width
        cell = sheet[top : top + image.shape[0], left : left + image.shape[1]]
        cell[..., : image.shape[2]] = image
        if image.shape[2] == 3:
            cell[..., 3] = 255
    return sheet


def assembled(tiles: dict[tuple[int, int], np.ndarray], tile: int) -> np.ndarray:
    """Tiles by (row, column) in their places: uint8 [H, W, 4], missing tiles transparent."""
    rows = max(row for row, _ in tiles) + 1
    columns = max(column for _, column in tiles) + 1
    canvas = np.zeros((rows * tile, columns * tile, 4), dtype=np.uint8)
    for (row, column), image in tiles.items():
        place = canvas[row * tile : (row + 1) * tile, column * tile : (column + 1) * tile]
        place[..., :3] = image[..., :3]
        place[..., 3] = 255
    return canvas


def enlarged(image: np.ndarray, factor: int) -> np.ndarray:
    """Every pixel as a square of factor x factor."""
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def shrunk(image: np.ndarray, longest: int) -> np.ndarray:
    """A picture whose longer side is at most that: uint8 [H, W, 3 or 4]; a smaller one as it is."""
    scale = longest / max(image.shape[:2])
    if scale >= 1:
        return image
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    return np.asarray(PillowImage.fromarray(image).resize(size, PillowImage.Resampling.BOX))


def encoded(image: np.ndarray, kind: Literal["PNG", "WEBP"]) -> bytes:
    """An image as the bytes of a file: exact as PNG, small and good for photographs as WebP."""
    buffer = io.BytesIO()
    PillowImage.fromarray(image).save(buffer, format=kind, quality=90, method=2)
    return buffer.getvalue()


def data_uri(content: bytes, mime: str) -> str:
    """The bytes of a file as a URI that a page carries in itself."""
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"
