"""Labels and splits of files from a CSV beside them."""

import csv
import io
import re
from collections.abc import Callable, Sequence
from typing import TextIO

from nfscale.datasets.base import Label
from nfscale.datasets.places import object_of, opening
from nfscale.errors import CallerError
from nfscale.files import StoreError, is_uri

_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")  # fits int64


def labels_of_csv(
    source: str, ids: Sequence[str], exists: Callable[[str], bool]
) -> dict[str, tuple[Label, str | None]]:
    """The (label, split) of each datum that a CSV names; empty cells are None.

    Labels that are all integers become integers, so that a dataset's labels are of one kind. Data that the CSV
    does not name have no label; it may name files that exist and are not among the data, because a pattern left
    them out.

    Args:
        source: the path or URI of a CSV with a header and the columns `id`, `label` and optionally `split`.
        exists: whether there is a file of that id.

    Raises:
        CallerError: if it cannot be read, lacks a column, or names a datum twice or one that does not exist.
    """
    rows = _rows(source)
    known = set(ids)
    for datum_id, (line, _, _) in rows.items():
        if datum_id not in known and not exists(datum_id):
            raise CallerError(
                f"dataset.label_from: line {line} of {source!r} names {datum_id!r}, and there is no such file; "
                f"ids are paths below dataset.path, such as {ids[0]!r}"
            )
    integers = all(_INTEGER.fullmatch(label) for _, label, _ in rows.values() if label)
    return {
        datum_id: ((int(label) if integers else label) if label else None, split or None)
        for datum_id, (_, label, split) in rows.items()
        if datum_id in known
    }


def _rows(source: str) -> dict[str, tuple[int, str, str]]:
    """The (line, label, split) of each id, as text."""
    rows: dict[str, tuple[int, str, str]] = {}
    try:
        with _opened(source) as file:
            table = csv.DictReader(file, restval="")
            columns = list(table.fieldnames or [])
            if missing := [name for name in ("id", "label") if name not in columns]:
                raise CallerError(
                    f"dataset.label_from: {source!r} has no column {missing[0]!r}; its columns: "
                    f"{', '.join(columns) or 'none'}; expected a header with id, label and optionally split"
                )
            for row in table:
                datum_id = row["id"]
                if datum_id in rows:
                    raise CallerError(
                        f"dataset.label_from: {source!r} names {datum_id!r} twice, in lines {rows[datum_id][0]} and "
                        f"{table.line_num}; keep one of them"
                    )
                rows[datum_id] = (table.line_num, row["label"].strip(), row.get("split", "").strip())
    except StoreError:
        raise
    except OSError as error:
        raise CallerError(
            f"dataset.label_from is parent or the path of a CSV; cannot read {source!r}: {error.strerror or error}"
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise CallerError(f"dataset.label_from: {source!r} is not a CSV in UTF-8: {error}") from error
    return rows


def _opened(source: str) -> TextIO:
    if not is_uri(source):
        return open(source, newline="", encoding="utf-8-sig")
    place = object_of(source)
    if place is None:
        raise CallerError(f"dataset.label_from: {source!r} names no object; expected the URI of a CSV")
    with opening("dataset.label_from"):
        content = place[0].read(place[1])
    return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig", newline="")
