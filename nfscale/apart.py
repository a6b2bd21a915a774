"""Data read in a process apart, so that one that kills its reader does not kill the driver that makes the plan.

The process is forked: it has the opened dataset, and costs milliseconds. Danger: a fork takes along the locks that
other threads hold, and none of the threads. Where there are any that may be in the middle of something (those of an
object store's library, of Ray, of the embedding program), data are read in this process.
"""

import multiprocessing
import sys
import threading
from collections.abc import Generator, Iterable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from nfscale.datasets import Dataset, Datum
from nfscale.signals.mapped import mapping_of

_HAVE_THREADS = ("obstore", "ray", "jax")
"""Packages that start some where Python does not see them."""
_SENT_BYTES = 64 << 20
"""Of a datum; a larger one is read once more, now that it is known to be harmless."""
_PATIENCE_SECONDS = 60.0  # for a datum; one that takes longer is read in this process


def read_apart(dataset: Dataset, positions: Iterable[int]) -> Generator[Datum, None, None]:
    """The data at these positions; one whose reading ends the process has no content and an error that says so."""
    if not _may_fork():
        yield from map(dataset.read, positions)
        return
    reader = None
    try:
        for position in positions:
            reader = reader or _Reader(dataset)
            try:
                yield reader.read(position)
            except EOFError:
                code = reader.close()
                reader = None
                yield Datum(
                    dataset.ids[position],
                    dataset.index_of(position),
                    None,
                    error=f"reading it ended the process (exit code {code})",
                )
    finally:
        if reader is not None:
            reader.close()


def _may_fork() -> bool:
    alone = threading.active_count() == 1 and not any(name in sys.modules for name in _HAVE_THREADS)
    return alone and "fork" in multiprocessing.get_all_start_methods() and sys.platform == "linux"


class _Reader:
    """The other end of the process."""

    def __init__(self, dataset: Dataset) -> None:
        context = multiprocessing.get_context("fork")
        self._dataset = dataset
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._pipe, dataset), daemon=True)
        self._process.start()
        theirs.close()

    def read(self, position: int) -> Datum:
        """A datum.

        Raises:
            EOFError: if reading it has ended the process.
        """
        try:
            self._pipe.send(position)
            datum = self._pipe.recv() if self._pipe.poll(_PATIENCE_SECONDS) else None
        except (BrokenPipeError, ConnectionResetError) as error:
            raise EOFError from error
        return self._dataset.read(position) if datum is None else datum

    def close(self) -> int | None:
        """End the process; its exit code."""
        self._pipe.close()
        self._process.join(1.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        return self._process.exitcode


def _serve(pipe: Connection, theirs: Connection, dataset: Dataset) -> None:
    import torch

    theirs.close()
    torch.set_num_threads(1)  # OpenMP does not survive a fork
    while True:
        try:
            position = pipe.recv()
        except (EOFError, ConnectionResetError, KeyboardInterrupt):
            return
        datum = dataset.read(position)
        try:
            pipe.send(datum if _can_be_sent(datum.content) else None)
        except Exception:  # content that cannot be sent is read once more, where it is wanted
            pipe.send(None)


def _can_be_sent(content: Any) -> bool:
    """Numbers that stay in the file they are mapped from would all be read, and arrive as others that do not."""
    values = getattr(content, "values", content)
    is_mapped = isinstance(values, np.ndarray) and mapping_of(values) is not None
    return not is_mapped and int(getattr(values, "nbytes", 0)) <= _SENT_BYTES
