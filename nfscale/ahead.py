"""Items of an iterator made ahead of time, in a thread, while what uses them is at work."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

import torch

Item = TypeVar("Item")

_WAITING = 2
"""Chunks that wait at most: beside these one is being made, and one is in use."""
_LONGEST = 64
"""Items of a chunk: handing over costs more than a small datum does."""
_PATIENCE = 0.005  # seconds that a chunk may be kept back while none waits
_STOP_SECONDS = 0.1


def ahead(
    items: Iterable[Item], bytes_of: Callable[[Item], int], chunk_bytes: int = 4 << 20
) -> Generator[Item, None, None]:
    """The same items in the same order, each made before it is asked for; an exception comes out in its place.

    The thread ends when the iterator is used up or closed. An item may be in the making by then: it is waited for.

    Args:
        bytes_of: what an item takes in memory; about four times `chunk_bytes`, or four items, are held at once.
    """
    handed: queue.Queue[tuple[list[Item], BaseException | None, bool]] = queue.Queue(_WAITING)
    stopped = threading.Event()
    threads = torch.get_num_threads()

    def hand_over(chunk: list[Item], error: BaseException | None = None, last: bool = False) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                handed.put((chunk, error, last), timeout=_STOP_SECONDS)
                return

    def make() -> None:
        torch.set_num_threads(threads)  # each thread has a number of its own
        chunk: list[Item] = []
        size, began = 0, time.monotonic()
        try:
            for item in items:
                chunk.append(item)
                size += bytes_of(item)
                is_due = handed.empty() and time.monotonic() - began > _PATIENCE
                if size >= chunk_bytes or len(chunk) == _LONGEST or is_due:
                    hand_over(chunk)
                    chunk, size, began = [], 0, time.monotonic()
                if stopped.is_set():
                    return
        except BaseException as error:
            hand_over(chunk, error)
        else:
            hand_over(chunk, last=True)

    thread = threading.Thread(target=make, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            chunk, error, last = handed.get()
            yield from chunk
            if error is not None:
                raise error
            if last:
                return
    finally:
        stopped.set()
        thread.join()
