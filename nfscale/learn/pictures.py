"""Pictures of what models do, as PNG."""

import io

import numpy as np
from matplotlib.figure import Figure

from nfscale.media import pictures

_BLUE, _ORANGE = "#3b82c4", "#d9822b"


def confusion(matrix: np.ndarray, names: list, title: str) -> bytes:
    """Which classes [K, K] are taken for which: rows are the truth, shares of their row."""
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = min(14.0, 2.2 + 0.42 * len(names))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), [str(name) for name in names], rotation=90 if len(names) > 12 else 0)
    axes.set_yticks(range(len(names)), [str(name) for name in names])
    if len(names) <= 20:
        for (row, column), count in np.ndenumerate(matrix):
            if count:
                ink = "white" if share[row, column] > 0.5 else "black"
                axes.text(column, row, str(count), ha="center", va="center", color=ink, fontsize=7)
    axes.set_xlabel("read as")
    axes.set_ylabel("is")
    axes.set_title(title, fontsize=10)
    return _png(figure)


def bars(columns: dict[str, dict[str, float]], wanted: dict[str, str]) -> bytes:
    """One panel for each measure: values by row name. `wanted` has a word on each measure's direction."""
    figure = Figure(figsize=(3.2 * len(columns), 0.36 * len(next(iter(columns.values()))) + 1.2), layout="constrained")
    grid = np.atleast_1d(figure.subplots(1, len(columns), sharey=True))
    for axes, (measure, values) in zip(grid, columns.items(), strict=True):
        names = list(values)
        shown = [0.0 if value is None else value for value in values.values()]
        colours = [_ORANGE if name.startswith("generator") else _BLUE for name in names]
        axes.barh(range(len(names)), shown, color=colours)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set_title(f"{measure}\n({wanted[measure]})", fontsize=9)
        if min(shown) > 0 and max(shown) > 50 * min(shown):
            axes.set_xscale("log")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return _png(figure)


def sheet(images: np.ndarray, columns: int, smallest_side: int = 56) -> bytes:
    """Images [n, H, W, C] in rows of `columns`."""
    enlarge = max(1, smallest_side // max(images.shape[1:3]))
    tiles = [pictures.enlarged(pictures.to_uint8(image), enlarge) for image in images]
    return pictures.encoded(pictures.grid(tiles, columns), "PNG")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
