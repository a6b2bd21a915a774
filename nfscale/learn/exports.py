"""A table in the form that others read: Hugging Face, Lance, npz, safetensors, a folder of .pth files.

Each is a folder with `job.json` (layout, exact forward, theta0) and a card beside the data. Tables are read shard by
shard, so that memory stays bounded, but for npz, which is one array. A .pth file is a pickle: it is written for readers
that want nothing else, holds tensors alone, and is never read here.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from nfscale.errors import CallerError
from nfscale.learn.card import card
from nfscale.learn.data import labels_of
from nfscale.learn.quantize import Quantized, quantized
from nfscale.store.schema import ROW_GROUP_ROWS, STATUS, json_bytes
from nfscale.store.table import WeightsTable, as_matrix

_WITHOUT_WEIGHTS = ("decode_error", "crashed")
_METRICS = pa.list_(pa.struct([("name", pa.string()), ("value", pa.float32())]))  # others have no maps


def export(table: WeightsTable, to: str, place: Path, dtype: str = "float32") -> Path:
    """Write the rows that have weights in the form `to`, one of `EXPORTS`, into a new folder.

    Args:
        dtype: float32; float16 or int8 of weights - theta0, which say so in their card (npz alone).

    Raises:
        CallerError: if the form or dtype is unknown, or the folder is not empty.
    """
    if to not in EXPORTS:
        raise CallerError(f"unknown form {to!r}; known: {', '.join(EXPORTS)}")
    if dtype != "float32" and to != "npz":
        raise CallerError(f"--dtype {dtype} goes with --to npz alone; {to} takes float32")
    if place.exists() and any(place.iterdir()):
        raise CallerError(f"{place} is not empty; choose another folder, or remove it")
    place.mkdir(parents=True, exist_ok=True)
    if to == "npz":
        _npz(table, place, dtype)
    else:
        EXPORTS[to](table, place)
    (place / "job.json").write_bytes(json_bytes(table.plan.to_json()))
    (place / "README.md").write_text(card(table, to, dtype))
    return place


def _parts(table: WeightsTable, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Rows that have weights, shard by shard in the order of the dataset, in types that every reader has."""
    names = columns or list(table.schema.names)
    for commit in sorted(table.commits, key=lambda commit: commit.start):
        rows = pq.read_table(table.file_of(commit), columns=list(dict.fromkeys([*names, "status"])))
        rows = rows.filter(~STATUS.isin(_WITHOUT_WEIGHTS)).select(names)
        arrays = [_plain(table, name, rows[name]) for name in names]
        yield pa.table(arrays, names=names)


def _plain(table: WeightsTable, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray | pa.Array:
    if name == "weights":
        matrix = table.matrix(column)
        return pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), table.layout.size)
    if pa.types.is_dictionary(column.type):
        return column.cast(column.type.value_type)
    if pa.types.is_map(column.type):
        pairs = [[{"name": key, "value": value} for key, value in one] for one in column.to_pylist()]
        return pa.array(pairs, _METRICS)
    return column


def _hugging_face(table: WeightsTable, place: Path) -> None:
    """One Parquet file for each split and shard, as `load_dataset(place)` finds them."""
    (place / "data").mkdir()
    for number, rows in enumerate(_parts(table)):
        splits = rows["split"].fill_null("train") if rows["split"].null_count < len(rows) else None
        for split in ["train"] if splits is None else splits.unique().to_pylist():
            own = rows if splits is None else rows.filter(pc.equal(splits, split))  # type: ignore[attr-defined]
            file = place / "data" / f"{split}-{number:05d}.parquet"
            pq.write_table(own, file, row_group_size=ROW_GROUP_ROWS, compression="zstd")


def _lance(table: WeightsTable, place: Path) -> None:
    import lance

    parts = _parts(table)
    first = next(parts, None)
    if first is None:
        raise CallerError(f"{table.folder} has no committed rows")

    def batches() -> Iterator[pa.RecordBatch]:
        yield from first.to_batches()
        for part in parts:
            yield from part.cast(first.schema).to_batches()

    lance.write_dataset(batches(), str(place / "weights.lance"), schema=first.schema)


def _npz(table: WeightsTable, place: Path, dtype: str) -> None:
    """One file: weights [N, P] and what tells data apart; ints and text, no objects."""
    rows = pa.concat_tables(_parts(table, ["datum_id", "index", "split", "label", "weights", "quality"]))
    weights = as_matrix(rows["weights"])
    labels = rows["label"].to_pylist()
    known = [label for label in labels if label is not None]
    arrays: dict[str, np.ndarray] = {
        "datum_id": np.array(rows["datum_id"].to_pylist(), dtype=np.str_),
        "index": rows["index"].to_numpy(),
        "split": np.array([split or "" for split in rows["split"].to_pylist()], dtype=np.str_),
        "quality": rows["quality"].to_numpy(),
        "layout": np.array(table.layout.to_json()),
    }
    if known:
        missing = "" if isinstance(known[0], str) else np.iinfo(np.int64).min
        arrays["label"] = np.array([missing if label is None else label for label in labels])
    if table.theta0 is not None:
        arrays["theta0"] = table.theta0
    if dtype == "float32":
        arrays["weights"] = weights
    else:
        start = np.float32(0) if table.theta0 is None else table.theta0
        coarse: Quantized = quantized(torch.from_numpy(weights - start), table.layout, dtype)
        arrays["differences"] = coarse.codes
        if coarse.scales is not None:
            arrays["scales"] = coarse.scales
    np.savez(place / "weights.npz", **arrays)  # type: ignore[arg-type]


def _safetensors(table: WeightsTable, place: Path) -> None:
    """A file for each shard: every tensor of the layout for all fields, [N, ...]; ids and labels in `rows.parquet`."""
    from safetensors.numpy import save_file

    rows = []
    for number, part in enumerate(_parts(table)):
        matrix = as_matrix(part["weights"])
        tensors = {
            entry.name: np.ascontiguousarray(matrix[:, entry.offset : entry.offset + entry.size]).reshape(
                -1, *entry.shape
            )
            for entry in table.layout.entries
        }
        name = f"weights-{number:05d}.safetensors"
        save_file(tensors, place / name, metadata={"layout": table.layout.to_json()})
        keys = part.drop_columns(["weights"])
        rows.append(keys.append_column("file", pa.array([name] * len(keys))))
    pq.write_table(pa.concat_tables(rows), place / "rows.parquet", compression="zstd")


def _pth(table: WeightsTable, place: Path) -> None:
    """A state dict for each field, and splits.json: {"train": {"path": [...], "label": [...]}, "val": ...}.

    As the readers of Navon et al. ("Equivariant Architectures for Learning in Deep Weight Spaces", ICML 2023) and Zhou
    et al. (NFN) take them: keys in the order of the layers, `seq.0.weight`, `seq.0.bias`, ...
    """
    (place / "fields").mkdir()
    labels, names = labels_of(table), {"train": "train", "validation": "val", "test": "test"}
    splits: dict[str, dict[str, list]] = {name: {"path": [], "label": []} for name in names.values()}
    for part in _parts(table, ["index", "split", "label", "weights"]):
        matrix = torch.from_numpy(as_matrix(part["weights"]))
        params = table.layout.unravel(matrix)
        ranks = labels.ranks(part["label"]).tolist()
        for at, (index, split) in enumerate(zip(part["index"].to_pylist(), part["split"].to_pylist(), strict=True)):
            file = f"fields/{index:07d}.pth"  # never the id, which strangers chose
            state = {name.replace("layers.", "seq."): tensor[at].clone() for name, tensor in params.items()}
            torch.save(state, place / file)
            own = splits[names.get(split or "train", "train")]
            own["path"].append(file)
            own["label"].append(ranks[at])
    (place / "splits.json").write_text(json.dumps(splits, indent=1) + "\n")


EXPORTS: dict[str, Callable[..., None]] = {
    "hf": _hugging_face,
    "lance": _lance,
    "npz": _npz,
    "safetensors": _safetensors,
    "pth": _pth,
}
