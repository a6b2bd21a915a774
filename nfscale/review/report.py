"""`report.html`: how did every datum converge, and what do the fields look like? One file, no network.

What is bounded: pictures of at most `_MOSAIC` data and the worst, median and best `_ROW` of them, photographs of at
most `_CANVASES`, each as large as a page shows it; plots are bins, quantiles and samples. Memory holds numbers of every
datum and no weights, see `gathered`.
"""

import contextlib
import io
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import yaml
from PIL import Image as PillowImage

from nfscale.datasets import Dataset
from nfscale.errors import NfscaleError
from nfscale.media import Panel, pictures
from nfscale.media.image import sides
from nfscale.review.gathered import Gathered, gathered
from nfscale.review.page import rendered
from nfscale.review.sections import sections, summary_of, unit_of
from nfscale.review.wholes import WholeShown, wholes
from nfscale.run import OpenRun
from nfscale.store.run_folder import CONVERGENCE, JOB_FILE, REPORT, REVIEW_SUMMARY, WORST_TABLE, RunFolder
from nfscale.store.schema import json_bytes
from nfscale.store.table import WeightsTable

_MOSAIC = 96
_ROW = 6
_CANVASES = 10
_WORST = 500
_PANEL_BYTES = 160_000  # about 54 of them are in a page, of at most 20 MB with its mosaic and photographs
_PANEL_PIXELS = 640
_CELL_PIXELS = 96  # of the mosaic
_CANVAS_PIXELS = 1400


@dataclass
class _Rebuilt:
    """One datum in a gallery."""

    id: str
    quality: float
    original: Any
    rebuilt: Any


def make_report(folder: RunFolder) -> dict[str, Any]:
    """Write report.html, its pictures and the convergence tables; the figures it shows.

    Works on a run that is still going: what is committed is what it shows. Where the dataset cannot be read any more,
    or is another by now, the report has no pictures and says why.

    Raises:
        CallerError: if this is no run folder.
    """
    run, table = OpenRun(folder), WeightsTable(folder)
    rows = gathered(table)
    _write_convergence(table)
    worst = _worst_rows(rows)
    folder.files.replace("review/worst.csv", _worst_csv(worst))
    folder.files.replace(WORST_TABLE, _worst_json(worst))
    job_text = yaml.safe_dump(run.plan.job, sort_keys=False, allow_unicode=True)
    folder.files.replace(JOB_FILE, job_text.encode())
    summary = summary_of(run, table, rows)
    context: dict[str, Any] = {"summary": summary, "run": run, "job": job_text, "unit": unit_of(run.plan.quality_name)}
    context |= {"job_file": folder.files.place(JOB_FILE), "made_at": time.strftime("%Y-%m-%d %H:%M", time.gmtime())}
    context |= sections(run, table, rows)
    context |= {"galleries": [], "no_pictures": ""}
    if len(rows.fitted):
        try:
            context |= _galleries(run, table, rows)
        except (NfscaleError, OSError) as error:
            context["no_pictures"] = str(error)
    folder.files.replace(REVIEW_SUMMARY, json_bytes(summary))
    folder.files.replace(REPORT, rendered("report.html.j2", run.plan.quality_name, context).encode())
    return summary


def _galleries(run: OpenRun, table: WeightsTable, rows: Gathered) -> dict[str, Any]:
    fitted = rows.fitted
    middle = max(0, len(fitted) // 2 - _ROW // 2)
    count = len(fitted)
    ends = {"worst": range(min(_ROW, count)), "best": range(count - 1, max(-1, count - 1 - _ROW), -1)}
    chosen = {"worst": ends["worst"], "median": range(middle, min(middle + _ROW, count)), "best": ends["best"]}
    shown = _Shown(run, table)
    drawn = {name: shown.data(rows.ids_at(fitted[list(at)])) for name, at in chosen.items()}
    galleries = [(name, [_figure(run, table, datum) for datum in found]) for name, found in drawn.items()]
    medium = run.medium
    together = list(wholes(run, table, rows, _CANVASES))
    if run.job.signal.kind != "image":
        galleries = [*([("whole", [_figure(run, table, one) for one in together])] if together else []), *galleries]
    context: dict[str, Any] = {"galleries": galleries, "legend": medium.legend, "panel_pixels": medium.panel_pixels}
    context |= {"mosaic": None, "canvases": []}
    if run.job.signal.kind != "image":
        return context
    everyone = [datum for found in drawn.values() for datum in found]
    if everyone:
        cells = [side for datum in everyone for side in sides(datum.original, datum.rebuilt)]
        sheet = pictures.encoded(pictures.grid(cells, columns=3 * _ROW), "PNG")
        run.folder.files.replace("review/worst-median-best.png", sheet)
    if run.job.tile is not None:
        return context | {"canvases": [_canvas(run, one) for one in together]}
    place = _place_of(run.dataset)
    if place is not None:
        return context | {"canvases": shown.canvases(_fitted_ids(table), place)}
    sample = np.random.default_rng(run.job.seed).permutation(count)[:_MOSAIC]
    return context | {"mosaic": shown.mosaic(sorted(rows.ids_at(fitted[sample])))}


def _fitted_ids(table: WeightsTable) -> list[str]:
    """Of all data that have a quality; asked for where data are tiles, whose ids say what they are tiles of."""
    ids = table.to_arrow(["datum_id", "quality"]).filter(pc.field("quality").is_valid())["datum_id"]
    return ids.to_pylist()


class _Shown:
    """Originals and reconstructions by id."""

    def __init__(self, run: OpenRun, table: WeightsTable) -> None:
        self.run, self.table = run, table

    def data(self, ids: Sequence[str]) -> list[_Rebuilt]:
        """These data beside what their fields say; left out are those that cannot be read any more or are too large."""
        if not ids:
            return []
        qualities = self.table.rows(ids)["quality"].to_pylist()
        read = [
            (datum, quality)
            for position, quality in zip(self.table.dataset_positions(ids), qualities, strict=True)
            if (datum := self.run.dataset.read(position)).content is not None
        ]
        held: list[tuple[str, float, Any]] = []
        for datum, quality in read:
            with contextlib.suppress(ValueError):  # of data that stay in their files
                held.append((datum.id, quality, self.run.signal.original(datum.content)))
        if not held:
            return []
        rebuilt = self.table.decode([datum_id for datum_id, _, _ in held])
        return [_Rebuilt(*datum, content) for datum, content in zip(held, rebuilt, strict=True)]

    def mosaic(self, ids: list[str]) -> dict[str, Any] | None:
        """These data, originals beside reconstructions."""
        drawn = self.data(ids)
        if not drawn:
            return None
        sheets = [
            pictures.grid([pictures.shrunk(pictures.to_uint8(getattr(p, side)), _CELL_PIXELS) for p in drawn], 12)
            for side in ("original", "rebuilt")
        ]
        enlarge = max(1, 400 // max(sheets[0].shape[:2]))
        shown = [pictures.encoded(pictures.enlarged(sheet, enlarge), "PNG") for sheet in sheets]
        for side, picture in zip(("originals", "rebuilt"), shown, strict=True):
            self.run.folder.files.replace(f"review/{side}.png", picture)
        return {
            "original": pictures.data_uri(shown[0], "image/png"),
            "rebuilt": pictures.data_uri(shown[1], "image/png"),
        }

    def canvases(self, ids: list[str], place: Callable[[str], tuple[str, int, int]]) -> list[dict[str, Any]]:
        """Whole pictures put together from their tiles, as the dataset says which belongs where."""
        groups: dict[str, dict[tuple[int, int], str]] = {}
        for datum_id in ids:
            name, row, column = place(datum_id)
            groups.setdefault(name, {})[row, column] = datum_id
        shown = []
        for name, cells in sorted(groups.items())[:_CANVASES]:
            by_id = {p.id: p for p in self.data(list(cells.values()))}
            tiles = {cell: by_id[datum_id] for cell, datum_id in cells.items() if datum_id in by_id}
            if not tiles:
                continue
            size = next(iter(tiles.values())).original.shape[0]
            sides = {}
            for side in ("original", "rebuilt"):
                canvas = pictures.assembled({c: pictures.to_uint8(getattr(p, side)) for c, p in tiles.items()}, size)
                sides[side] = _side(self.run, canvas, f"{name}-{side}")
            quality = [p.quality for p in tiles.values()]
            shown.append({"name": name, "tiles": len(tiles), "quality": float(np.median(quality)), **sides})
        return shown


def _side(run: OpenRun, canvas: np.ndarray, name: str) -> str:
    """A large picture as a file of its own, and for the page, where it is made smaller if need be."""
    picture = pictures.encoded(canvas, "WEBP")
    run.folder.files.replace(f"review/{name}.webp", picture)
    if max(canvas.shape) > _CANVAS_PIXELS:
        picture = pictures.encoded(pictures.shrunk(canvas, _CANVAS_PIXELS), "WEBP")
    return pictures.data_uri(picture, "image/webp")


def _canvas(run: OpenRun, whole: WholeShown) -> dict[str, Any]:
    """A whole picture beside what its blocks say together."""
    name = _file_name(whole.id)
    sides = {
        side: _side(run, pictures.to_uint8(getattr(whole, side)), f"{name}-{side}") for side in ("original", "rebuilt")
    }
    return {"name": whole.id, "tiles": whole.blocks, "quality": whole.blocks_median, "whole": whole.quality, **sides}


def _file_name(datum_id: str) -> str:
    """An id, which may be a path, as the name of a file."""
    return re.sub(r"[^\w.-]+", "-", datum_id)[:100]


def _place_of(dataset: Dataset) -> Any:
    """The dataset's `place(id) -> (picture, row, column)`, if its data are tiles of larger pictures."""
    whole = getattr(dataset, "whole", dataset)
    return getattr(whole, "place", None)


def _figure(run: OpenRun, table: WeightsTable, datum: _Rebuilt | WholeShown) -> dict[str, Any]:
    """A datum as its medium shows it."""
    panels = run.medium.panels(datum.original, datum.rebuilt, lambda shape: table.decode([datum.id], shape)[0])
    return {"id": datum.id, "quality": datum.quality, "panels": [_panel(panel) for panel in panels]}


def _panel(panel: Panel) -> dict[str, Any]:
    """A panel as the template shows it; a picture or film of too many bytes as a smaller picture."""
    content, mime, caption = panel.content, panel.mime, panel.caption
    if len(content) > _PANEL_BYTES and mime.startswith("image/"):
        with PillowImage.open(io.BytesIO(content)) as picture:
            still = np.asarray(picture.convert("RGBA"))
        content, mime = pictures.encoded(pictures.shrunk(still, _PANEL_PIXELS), "WEBP"), "image/webp"
    uri = "" if len(content) > 4 * _PANEL_BYTES else pictures.data_uri(content, mime)
    if not uri:
        caption = f"{caption}: too large for this page ({len(content) / 1e6:.1f} MB)"
    return {"is_sound": mime.startswith("audio/"), "uri": uri, "caption": caption}


def _write_convergence(table: WeightsTable) -> None:
    """`convergence.parquet`: every column but the weights, file by file, so that memory stays bounded."""
    columns = [name for name in table.schema.names if name != "weights"]
    schema = table.schema.empty_table().select(columns).schema
    with (
        table.folder.files.writing(CONVERGENCE) as stream,
        pq.ParquetWriter(stream, schema, compression="zstd") as writer,
    ):
        for commit in sorted(table.commits, key=lambda commit: commit.start):
            writer.write_table(pq.read_table(table.file_of(commit), columns=columns).cast(schema))


def _worst_rows(rows: Gathered) -> pa.Table:
    """The worst data that were fitted, worst first, and before them what failed without a quality."""
    failed = np.flatnonzero(~np.isfinite(rows.quality))[: _WORST // 2]
    positions = np.concatenate([rows.fitted[: _WORST - len(failed)], failed])
    columns = ["datum_id", "index", "quality", "steps", "steps_to_target", "status", "reason", "label", "split"]
    found = rows.rows_at(positions, columns)
    return pa.table({name: [row[name] for row in found] for name in columns})


def _worst_csv(worst: pa.Table) -> bytes:
    """The worst data as text that MLflow's artifact viewer shows."""
    buffer = pa.BufferOutputStream()
    pcsv.write_csv(worst, buffer)
    return buffer.getvalue().to_pybytes()


def _worst_json(worst: pa.Table) -> bytes:
    """The same as MLflow's own tables are written, which its pages can search and sort; numbers as one reads them."""
    rows = [[_shown_number(value) for value in row.values()] for row in worst.to_pylist()]
    return json_bytes({"columns": worst.column_names, "data": rows})


def _shown_number(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return round(value, 4) if np.isfinite(value) else None
