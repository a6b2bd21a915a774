"""The copy for training: `weights.arrow`, an uncompressed Arrow IPC file that is memory-mapped.

It is a projection of the commits, sorted by index: what tells data apart, their labels, and the weights as they are
stored. Whoever has it reads batches at the speed of memory, and a row at random in microseconds; it names the commits
it was made of, and one that was made of others is as good as none.
"""

import hashlib

import pyarrow as pa
import pyarrow.parquet as pq

from nfscale.files import LocalFiles
from nfscale.store.run_folder import IPC_COPY, RunFolder
from nfscale.store.table import WeightsTable

COLUMNS = ("datum_id", "index", "split", "label", "weights", "status", "quality")
_BATCH_ROWS = 256
_COMMITS_KEY = b"nfscale.commits"


def write_ipc_copy(folder: RunFolder) -> None:
    """Write the copy of what is committed, unless there is one of it; shard by shard, so memory stays bounded."""
    table = WeightsTable(folder)
    if _made_of(folder) == (digest := _digest(table)):
        return
    schema = table.schema.empty_table().select(COLUMNS).schema
    # A dictionary for the whole file has to be known before its first batch; text is simpler, and small.
    plain = [f.with_type(f.type.value_type) if pa.types.is_dictionary(f.type) else f for f in schema]
    schema = pa.schema(plain, metadata=(schema.metadata or {}) | {_COMMITS_KEY: digest})
    with folder.files.writing(IPC_COPY) as stream, pa.ipc.new_file(stream, schema) as writer:
        for commit in sorted(table.commits, key=lambda commit: commit.start):
            rows = pq.read_table(table.file_of(commit), columns=list(COLUMNS))
            writer.write_table(rows.cast(schema), max_chunksize=_BATCH_ROWS)


def ipc_copy(table: WeightsTable) -> pa.Table | None:
    """The copy as a table whose columns lie in the memory-mapped file; None where there is none of these commits."""
    files = table.folder.files
    if not isinstance(files, LocalFiles) or files.size(IPC_COPY) is None:
        return None
    with pa.memory_map(str(files.source(IPC_COPY))) as mapped:
        reader = pa.ipc.open_file(mapped)
        if (reader.schema.metadata or {}).get(_COMMITS_KEY) != _digest(table):
            return None
        return reader.read_all()


def _digest(table: WeightsTable) -> bytes:
    """What the copy must have been made of."""
    files = sorted(commit.sha256 for commit in table.commits)
    return hashlib.sha256("".join(files).encode()).hexdigest().encode()


def _made_of(folder: RunFolder) -> bytes | None:
    if folder.files.size(IPC_COPY) is None:
        return None
    with folder.files.open(IPC_COPY) as stream:
        return (pa.ipc.open_file(stream).schema.metadata or {}).get(_COMMITS_KEY)
