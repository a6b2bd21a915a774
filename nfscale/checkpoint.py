"""What is kept of a shard whose fields take long: those that have finished, and those under way.

One file per shard, `checkpoints/shard-00042.npz`, replaced by each newer one and removed with the commit. It holds the
rows of finished fields as a table (Parquet, in an array of bytes) and the tensors of a snapshot; nothing is pickled.
Fields are found in it by their ids, so that the parts of a shard that was cut go on from the checkpoint of the whole.
"""

import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from nfscale.engine import Snapshot
from nfscale.engine.batch import Slot
from nfscale.store.run_folder import RunFolder, Shard
from nfscale.store.schema import write_parquet

_SLOTS, _ROWS, _TENSOR = "slots", "finished", "tensors/"


@dataclass(frozen=True)
class Checkpoint:
    """A shard that was begun."""

    finished: pa.Table
    under_way: Snapshot


def save(folder: RunFolder, shard: Shard, checkpoint: Checkpoint) -> None:
    """Keep this much of a shard, in the place of what was kept before."""
    rows = io.BytesIO()
    write_parquet(checkpoint.finished, rows)
    slots = json.dumps([asdict(slot) for slot in checkpoint.under_way.slots]).encode()
    arrays = {_TENSOR + name: tensor.numpy() for name, tensor in checkpoint.under_way.tensors.items()}
    arrays |= {_SLOTS: np.frombuffer(slots, np.uint8), _ROWS: np.frombuffer(rows.getvalue(), np.uint8)}
    with folder.files.writing(folder.checkpoint_file(shard)) as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type] (a key could be called allow_pickle)


def load(folder: RunFolder, shard: Shard, schema: pa.Schema) -> Checkpoint | None:
    """What was kept of a shard, or of the one that it is a part of; None where that is nothing that can be used."""
    for whole in _wholes(shard):
        try:
            content = folder.files.read(folder.checkpoint_file(whole))
        except FileNotFoundError:
            continue
        try:
            return _parsed(content, schema)
        except (ValueError, TypeError, KeyError, OSError, zipfile.BadZipFile):  # half a file, or of another version
            return None
    return None


def _parsed(content: bytes, schema: pa.Schema) -> Checkpoint | None:
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        finished = pq.read_table(io.BytesIO(arrays[_ROWS].tobytes()))
        if not finished.schema.equals(schema) or finished.schema.metadata != schema.metadata:  # with the fingerprint
            return None
        slots = [Slot(**values) for values in json.loads(arrays[_SLOTS].tobytes())]
        names = [name for name in arrays.files if name.startswith(_TENSOR)]
        tensors = {name.removeprefix(_TENSOR): torch.from_numpy(arrays[name].copy()) for name in names}
    return Checkpoint(finished, Snapshot(slots, tensors))


def _wholes(shard: Shard) -> Iterator[Shard]:
    """The shard, then those that it is a part of."""
    for end in range(len(shard.part), -1, -1):
        yield Shard(shard.index, shard.start, shard.stop, shard.part[:end])
