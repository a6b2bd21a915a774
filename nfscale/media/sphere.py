"""Maps on the sphere: NetCDF and equirectangular images in; NetCDF and PNG out; shown as maps in the data's unit."""

import io
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nfscale.media import netcdf, pictures
from nfscale.media.base import Beside, Decode, Panel
from nfscale.media.image import ImageMedium
from nfscale.signals.sphere import SphereMap, cell_areas

NETCDF_SUFFIXES = frozenset({".nc", ".nc4", ".cdf", ".netcdf"})

_MOST_BYTES = 512 << 20  # of a NetCDF file that is read whole
_CHANNELS_SHOWN = 4
_ERROR_SHARE = 0.05
"""The error's colours end at this share of the data's range: 40 dB are an error of a hundredth."""
_INK, _MISSING = "#767676", "#8a8a8a"  # legible on white and on black
_SAME_DEGREES = 0.01  # within which two grids are the same: what the table's float32 and its rounding leave


class SphereMedium:
    """Content: a `SphereMap`, as `signals.Sphere` takes it."""

    suffixes = NETCDF_SUFFIXES | ImageMedium.suffixes
    written: tuple[str, ...] = (".nc", ".png")
    panel_pixels = 330
    legend = (
        f"original, rebuilt, error (its colours end at {_ERROR_SHARE:.0%} of the range of the colours beside); "
        "north is up, missing cells are grey"
    )

    def read(self, stream: BinaryIO, name: str, beside: Beside) -> SphereMap:
        """One map: a NetCDF file with one variable on one grid, or an image from pole to pole and all around.

        Cells of an image that are more transparent than not are missing.
        """
        start = stream.read(4)
        stream.seek(0)
        is_netcdf = start[:3] == b"CDF" or start == b"\x89HDF" or Path(name).suffix.lower() in NETCDF_SUFFIXES
        if not is_netcdf:
            return _of_image(ImageMedium().read(stream, name, beside))
        content = stream.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"too large: at most {_MOST_BYTES:,} bytes of a NetCDF file are read")
        file = netcdf.MapFile(content)
        try:
            planes = list(file.planes.values())
            if not planes:
                raise ValueError("no variable has both latitude and longitude among its dimensions")
            if len(planes) > 1 or planes[0].maps != 1:
                counts = ", ".join(f"{plane.maps} of {plane.name!r}" for plane in planes)
                raise ValueError(f"the file holds several maps ({counts}); dataset.kind=netcdf reads such files")
            return file.read(planes, 0)
        finally:
            file.close()

    def write(self, content: SphereMap, path: Path) -> None:
        """NetCDF with coordinates and units, or PNG: one pixel for each cell, north up, west left."""
        if path.suffix.lower() == ".png":
            path.write_bytes(pictures.encoded(coloured(content), "PNG"))
        else:
            path.write_bytes(netcdf.to_bytes(content))

    def measurable(self, original: SphereMap) -> bool:
        return True

    def measures(self, original: SphereMap, rebuilt: SphereMap) -> dict[str, float]:
        """`rmse` of each channel in its unit, cells weighted by area; empty where the two are not of one grid."""
        if not _same_grid(original, rebuilt):
            return {}
        weights = np.broadcast_to(cell_areas(original.latitude, original.longitude)[..., None], original.values.shape)
        over = tuple(range(original.values.ndim - 1))  # the times, too
        error = (original.values.astype(np.float64) - rebuilt.values) ** 2
        present = ~np.isnan(error)
        sums = np.where(present, error * weights, 0).sum(axis=over), np.where(present, weights, 0).sum(axis=over)
        rmse = np.sqrt(sums[0] / sums[1])
        names = ["rmse"] if len(rmse) == 1 else [f"rmse_{name}" for name in _names(original)]
        return {name: float(value) for name, value in zip(names, rmse, strict=True)}

    def panels(self, original: SphereMap, rebuilt: SphereMap, decode: Decode) -> list[Panel]:
        """Maps with colour bars in the data's unit, the channels below each other; what is missing, in both.

        Of maps at several times, the one in the middle.
        """
        if original.times is not None and rebuilt.times is not None:
            place = len(original.times) // 2
            when = f"{original.times[place]:.10g} {original.origin.time_units if original.origin else ''}"
            shown = self.panels(original.at(place), rebuilt.at(place), decode)
            return [replace(panel, caption=f"{panel.caption}, at {when}") for panel in shown]
        same = _same_grid(original, rebuilt)
        if same:
            rebuilt = _with_values(rebuilt, np.where(np.isnan(original.values), np.nan, rebuilt.values))
        shown = [Panel("image/png", _drawn(original), "original"), Panel("image/png", _drawn(rebuilt), "rebuilt")]
        if not same:
            return shown
        error = _with_values(rebuilt, rebuilt.values - original.values)
        rmse = ", ".join(
            f"{value:.3g} {unit}"
            for value, unit in zip(self.measures(original, rebuilt).values(), _units(original), strict=True)
        )
        return [*shown, Panel("image/png", _drawn(error, is_error=True), f"rebuilt - original, RMSE {rmse}")]


def coloured(content: SphereMap) -> np.ndarray:
    """A pixel for each cell, north up and west left: three channels as red, green and blue, others by a colour map.

    Of maps at several times, the first.
    Channels of another number than one and three stand below each other. Missing cells are transparent.
    uint8 [H, W, 4].
    """
    upright = _north_up(content.at(0))
    values, ranges = upright.values, _ranges(upright)
    low, high = np.array(ranges).T
    scaled = np.nan_to_num(np.clip((values - low) / (high - low), 0, 1))
    if values.shape[2] == 3:
        opaque = ~np.isnan(values).any(axis=2, keepdims=True)
        return (np.concatenate([scaled, opaque], axis=2) * 255 + 0.5).astype(np.uint8)
    import matplotlib

    parts = []
    for channel, one in enumerate(ranges):
        name, low, high = _scale(one)
        colours = matplotlib.colormaps[name](np.clip((values[:, :, channel] - low) / (high - low), 0, 1), bytes=True)
        colours[np.isnan(values[:, :, channel])] = 0
        parts.append(colours)
    return np.concatenate(parts)


def _of_image(image: np.ndarray) -> SphereMap:
    """An equirectangular image: rows from 90 to -90 degrees north, columns from -180 to 180 east, edge to edge."""
    pixels = image[:, :, None] if image.ndim == 2 else image
    height, width, channels = pixels.shape
    peak = 1 if pixels.dtype == bool else np.iinfo(pixels.dtype).max if pixels.dtype.kind == "u" else None
    if peak is None:
        raise ValueError(f"an image of {pixels.dtype} has no known range; NetCDF states the unit of such maps")
    values = pixels.astype(np.float32) / np.float32(peak)
    if channels in (2, 4):
        values = np.where(values[:, :, -1:] >= 0.5, values[:, :, :-1], np.float32(np.nan))
    names = ("grey",) if values.shape[2] == 1 else ("red", "green", "blue")
    latitude = np.linspace(90 - 90 / height, 90 / height - 90, height)
    longitude = np.linspace(180 / width - 180, 180 - 180 / width, width)
    return SphereMap(values, latitude, longitude, names, ("1",) * len(names), ((0.0, 1.0),) * len(names))


# --- maps


def _with_values(content: SphereMap, values: np.ndarray) -> SphereMap:
    return SphereMap(values, content.latitude, content.longitude, content.names, content.units, content.ranges)


def _names(content: SphereMap) -> tuple[str, ...]:
    return content.names or tuple(f"channel_{channel}" for channel in range(content.values.shape[-1]))


def _units(content: SphereMap) -> tuple[str, ...]:
    return content.units or ("1",) * content.values.shape[-1]


def _ranges(content: SphereMap) -> list[tuple[float, float]]:
    """Of each channel, the run's, or what the map itself spans."""
    if content.ranges is not None:
        return list(content.ranges)
    spans = [(float(np.nanmin(one)), float(np.nanmax(one))) for one in np.moveaxis(content.values, -1, 0)]
    return [(low, high if high > low else low + 1) for low, high in spans]


def _same_grid(one: SphereMap, other: SphereMap) -> bool:
    return one.values.shape == other.values.shape and all(
        np.allclose(a, b, rtol=0, atol=_SAME_DEGREES)
        for a, b in ((one.latitude, other.latitude), (one.longitude, other.longitude))
    )


def _north_up(content: SphereMap) -> SphereMap:
    """Rows from north to south, columns from west to east; around the globe from -180 degrees, no column twice."""
    rows = np.argsort(-content.latitude, kind="stable")
    longitude = content.longitude
    step = abs(longitude[-1] - longitude[0]) / max(1, len(longitude) - 1)
    if abs(longitude[-1] - longitude[0]) + step >= 360 - _SAME_DEGREES:
        longitude = np.mod(np.round(longitude, 6) + 180, 360) - 180
        _, columns = np.unique(longitude, return_index=True)
    else:
        columns = np.argsort(longitude, kind="stable")
    turned = SphereMap(content.values[rows][:, columns], content.latitude[rows], longitude[columns])
    return SphereMap(turned.values, turned.latitude, turned.longitude, content.names, content.units, content.ranges)


# --- pictures


def _scale(limits: tuple[float, float], is_error: bool = False) -> tuple[str, float, float]:
    """(colour map, lowest, highest): symmetric about zero where values have both signs."""
    low, high = limits
    if is_error:
        most = _ERROR_SHARE * (high - low)
        return "RdBu_r", -most, most
    if low < 0 < high and min(-low, high) > 0.1 * max(-low, high):
        most = max(-low, high)
        return "RdBu_r", -most, most
    return "viridis", low, high


def _drawn(content: SphereMap, is_error: bool = False) -> bytes:
    """A PNG with transparent ground: a map for each channel, its colour bar below."""
    import matplotlib
    from matplotlib.figure import Figure

    upright = _north_up(content)
    units, names, ranges = _units(upright), _names(upright), _ranges(upright)
    count = min(_CHANNELS_SHOWN, len(names))
    covered = [abs(axis[-1] - axis[0]) + 1 for axis in (upright.latitude, upright.longitude)]
    proportion = float(np.clip(covered[0] / covered[1], 0.3, 1.2))
    figure = Figure(figsize=(4.2, (4.0 * proportion + 0.75) * count), layout="constrained", dpi=110)
    for channel, axes in enumerate(np.atleast_1d(figure.subplots(count, 1))):
        colours, low, high = _scale(ranges[channel], is_error)
        image = axes.imshow(
            upright.values[:, :, channel],
            cmap=matplotlib.colormaps[colours].with_extremes(bad=_MISSING),
            vmin=low,
            vmax=high,
            aspect="auto",
            interpolation="nearest",
        )
        axes.set_box_aspect(proportion)
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set_color(_INK)
        bar = figure.colorbar(
            image, ax=axes, location="bottom", shrink=0.9, aspect=30, extend="both" if is_error else None
        )
        bar.ax.tick_params(colors=_INK, labelsize=12)
        bar.outline.set_edgecolor(_INK)  # type: ignore[attr-defined]
        what = f"error of {names[channel]}" if is_error else names[channel]
        bar.set_label(f"{what} [{units[channel]}]", color=_INK, fontsize=12)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", transparent=True)
    return buffer.getvalue()
