"""`report.html`: how did every datum converge, and what do the fields look like? One file, no network.

What is bounded: pictures of at most `_MOSAIC` data and the worst, median and best `_ROW` of them,
photographs of at most `_CANVASES`; the rest is columns without weights.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files as resources
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.parquet as pq

from nfscale.datasets import Dataset
from nfscale.encode import OpenRun
from nfscale.media import Panel, pictures
from nfscale.media.image import sides
from nfscale.review import figures
from nfscale.review.wholes import WholeShown, wholes
from nfscale.store.history import quality_quantiles, sampled_histories
from nfscale.store.run_folder import CONVERGENCE, REPORT, REVIEW_SUMMARY, RunFolder
from nfscale.store.schema import FAILED_STATUSES, STATUS, json_bytes, quality_text
from nfscale.store.table import WeightsTable

_MOSAIC = 96
_ROW = 6
_CANVASES = 10
_WORST = 500
_ERRORS_SHOWN = 3  # examples of each reason


@dataclass
class _Rebuilt:
    """One datum in a gallery."""

    id: str
    quality: float
    original: Any
    rebuilt: Any


def make_report(folder: RunFolder) -> dict[str, Any]:
    """Write report.html, its pictures and the convergence tables; the figures it shows.

    Works on a run that is still going: what is committed is what it shows.

    Raises:
        CallerError: if this is no run folder.
        EncodeError: if the dataset is no longer the one that was encoded.
    """
    run, table = OpenRun(folder), WeightsTable(folder)
    rows = table.to_arrow(["datum_id", "index", "label", "status", "reason", "quality", "quality_heldout", "steps"])
    _write_convergence(table)
    folder.files.replace("review/worst.csv", _worst_csv(rows))
    summary = _summary(run, table, rows)
    context: dict[str, Any] = {"summary": summary, "run": run, "job": json.dumps(run.plan.job, indent=1)}
    context["unit"] = unit = _unit(run.plan.quality_name)
    quality = rows["quality"].drop_null().to_numpy()
    if len(quality):
        steps, *bands = quality_quantiles(sampled_histories(table), [5, 25, 50, 75, 95])
        context["histogram"] = figures.histogram(quality, run.job.fit.target, unit)
        context["convergence"] = figures.convergence(steps, bands, run.job.fit.target, unit)
        context |= _galleries(run, table, rows)
    context["failures"] = _failures(rows)
    pages = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    pages.filters["quality"] = partial(quality_text, run.plan.quality_name)
    template = pages.from_string((resources("nfscale.review") / "report.html.j2").read_text())
    folder.files.replace(REVIEW_SUMMARY, json_bytes(summary))
    folder.files.replace(REPORT, template.render(**context).encode())
    return summary


def _summary(run: OpenRun, table: WeightsTable, rows: pa.Table) -> dict[str, Any]:
    """The figures of the report's head."""
    counts = Counter(rows["status"].to_pylist())
    quality = rows["quality"].drop_null().to_numpy()
    summary: dict[str, Any] = {
        "name": run.job.name,
        "output": str(run.folder),
        "fields": len(rows),
        "data": run.plan.data_count,
        "complete": run.folder.is_complete,
        "failed": sum(counts[status] for status in FAILED_STATUSES),
        "counts": dict(sorted(counts.items())),
        "quality_name": run.plan.quality_name,
        "weights_per_field": run.plan.layout.size,
        "table_bytes": sum(commit.bytes for commit in table.commits),
        "device_seconds": sum(commit.fit_seconds for commit in table.commits),
        "workers": len({commit.worker for commit in table.commits}),
        "report": run.folder.files.place(REPORT),
    }
    if len(quality):
        p05, p50, p95 = np.percentile(quality, [5, 50, 95])
        summary |= {"quality_p05": float(p05), "quality_median": float(p50), "quality_p95": float(p95)}
        summary |= {"quality_min": float(quality.min()), "steps_mean": float(np.mean(rows["steps"].drop_null()))}
    if len(heldout := rows["quality_heldout"].drop_null().to_numpy()):
        summary["quality_heldout_median"] = float(np.median(heldout))
    return summary


def _galleries(run: OpenRun, table: WeightsTable, rows: pa.Table) -> dict[str, Any]:
    fitted = rows.select(["datum_id", "quality"]).filter(pc.field("quality").is_valid()).sort_by("quality")
    middle = max(0, len(fitted) // 2 - _ROW // 2)
    count = len(fitted)
    ends = {"worst": range(min(_ROW, count)), "best": range(count - 1, max(-1, count - 1 - _ROW), -1)}
    chosen = {"worst": ends["worst"], "median": range(middle, min(middle + _ROW, count)), "best": ends["best"]}
    shown = _Shown(run, table)
    drawn = {name: shown.data(fitted["datum_id"].take(list(at)).to_pylist()) for name, at in chosen.items()}
    galleries = [(name, [_figure(run, table, datum) for datum in found]) for name, found in drawn.items()]
    medium = run.medium
    together = list(wholes(run, table, fitted, _CANVASES))
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
        return context | {"canvases": shown.canvases(fitted["datum_id"].to_pylist(), place)}
    sample = np.random.default_rng(run.job.seed).permutation(count)[:_MOSAIC]
    return context | {"mosaic": shown.mosaic(sorted(fitted["datum_id"].take(sample).to_pylist()))}


class _Shown:
    """Originals and reconstructions by id."""

    def __init__(self, run: OpenRun, table: WeightsTable) -> None:
        self.run, self.table = run, table

    def data(self, ids: Sequence[str]) -> list[_Rebuilt]:
        """These data beside what their fields say; one that cannot be read any more is left out."""
        if not ids:
            return []
        qualities = self.table.rows(ids)["quality"].to_pylist()
        read = [
            (datum, quality)
            for position, quality in zip(self.table.dataset_positions(ids), qualities, strict=True)
            if (datum := self.run.dataset.read(position)).content is not None
        ]
        if not read:
            return []
        rebuilt = self.table.decode([datum.id for datum, _ in read])
        return [
            _Rebuilt(datum.id, quality, self.run.signal.original(datum.content), content)
            for (datum, quality), content in zip(read, rebuilt, strict=True)
        ]

    def mosaic(self, ids: list[str]) -> dict[str, Any] | None:
        """These data, originals beside reconstructions."""
        drawn = self.data(ids)
        if not drawn:
            return None
        sheets = [
            pictures.grid([pictures.to_uint8(getattr(p, side)) for p in drawn], columns=12)
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
                picture = pictures.encoded(canvas, "WEBP")
                self.run.folder.files.replace(f"review/{name}-{side}.webp", picture)
                sides[side] = pictures.data_uri(picture, "image/webp")
            quality = [p.quality for p in tiles.values()]
            shown.append({"name": name, "tiles": len(tiles), "quality": float(np.median(quality)), **sides})
        return shown


def _canvas(run: OpenRun, whole: WholeShown) -> dict[str, Any]:
    """A whole picture beside what its blocks say together."""
    sides = {}
    for side in ("original", "rebuilt"):
        picture = pictures.encoded(pictures.to_uint8(getattr(whole, side)), "WEBP")
        run.folder.files.replace(f"review/{_file_name(whole.id)}-{side}.webp", picture)
        sides[side] = pictures.data_uri(picture, "image/webp")
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
    uri = pictures.data_uri(panel.content, panel.mime)
    return {"is_sound": panel.mime.startswith("audio/"), "uri": uri, "caption": panel.caption}


def _failures(rows: pa.Table) -> list[dict[str, Any]]:
    """Failed data by status and reason, with examples; the commonest first."""
    failed = rows.filter(STATUS.isin(FAILED_STATUSES))
    groups: dict[tuple[str, str], list[str]] = {}
    for row in failed.select(["datum_id", "status", "reason"]).to_pylist():
        groups.setdefault((row["status"], row["reason"] or ""), []).append(row["datum_id"])
    ranked = sorted(groups.items(), key=lambda item: -len(item[1]))
    return [
        {"status": status, "reason": reason, "count": len(ids), "examples": ids[:_ERRORS_SHOWN]}
        for (status, reason), ids in ranked[:20]
    ]


def _unit(quality_name: str) -> str:
    return {"psnr_db": "PSNR, dB", "snr_db": "SNR, dB", "iou": "IoU"}.get(quality_name, quality_name)


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


def _worst_csv(rows: pa.Table) -> bytes:
    """The worst data as text that MLflow's artifact viewer shows."""
    columns = ["datum_id", "index", "quality", "steps", "status", "reason", "label"]
    worst = rows.select(columns).sort_by([("quality", "ascending")]).slice(0, _WORST)
    plain = worst.set_column(4, "status", worst["status"].cast(pa.string()))
    buffer = pa.BufferOutputStream()
    pcsv.write_csv(plain, buffer)
    return buffer.getvalue().to_pybytes()
