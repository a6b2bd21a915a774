"""A process for each method: its threads, its allocator and its memory are its own, and it waits for its turn.

The processes live side by side and only one of them works at a time, or those of one method together. Each makes its
share of the problem itself; what it allocates from then on, beyond imports and data, is the method's memory.
"""

import ctypes
import importlib
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nfscale.benchmark.naive import MakeMethod
from nfscale.benchmark.workloads import Workload, problem_of
from nfscale.errors import NfscaleError

_ENDED_SECONDS = 10.0


@dataclass(frozen=True)
class Share:
    """What one process is to do."""

    make: MakeMethod
    workload: Workload
    first: int
    """Of its fields, in the workload."""
    fields: int
    device: str
    threads: int
    cpus: tuple[int, ...]
    """Where it may run; anywhere, where it is empty."""
    package: str | None = None
    """Imported before memory is counted."""


class Worker:
    """The other end of a process."""

    def __init__(self, name: str, share: Share) -> None:
        self._name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, share), name=f"benchmark {name}", daemon=False)
        self._process.start()
        theirs.close()

    def ask(self, verb: str, *arguments: Any) -> None:
        """Have it do something; what comes of it is collected by `answer`."""
        with suppress(BrokenPipeError):
            self._pipe.send((verb, arguments))

    def answer(self) -> Any:
        """What came of the last request.

        Raises:
            NfscaleError: if the method failed, or its process ended.
        """
        try:
            worked, value = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(_ENDED_SECONDS)
            value = f"its process ended with exit code {self._process.exitcode}; is there enough memory?"
            worked = False
        if not worked:
            raise NfscaleError(f"method {self._name} failed: {value}\nleave it out with --methods")
        return value

    def close(self) -> None:
        self._pipe.close()
        self._process.join(_ENDED_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@dataclass(frozen=True)
class Team:
    """The processes of one method, which share its fields and work together."""

    workers: Sequence[Worker]

    def _all(self, verb: str, *arguments: Any) -> list[Any]:
        for worker in self.workers:
            worker.ask(verb, *arguments)
        return [worker.answer() for worker in self.workers]

    def ready(self) -> str | None:
        """Wait until the method is made; the name of the step that the engine chose, of our methods."""
        return self._all("ready")[0]

    def advance(self, count: int) -> None:
        self._all("advance", count)

    def rows(self, fields: int) -> Tensor:
        """Weights of the first fields of the first process: [F, P]."""
        self.workers[0].ask("rows", fields)
        return torch.from_numpy(self.workers[0].answer())

    def peak_bytes(self) -> int | None:
        """What all of them held at once beside imports and data; None where that cannot be known."""
        peaks = self._all("peak_bytes")
        return None if None in peaks else sum(peaks)


@contextmanager
def teams(shares: dict[str, list[Share]]) -> Iterator[dict[str, Team]]:
    """Processes for the shares of each method, ended afterwards."""
    started: dict[str, Team] = {}
    try:
        for name, parts in shares.items():
            workers: list[Worker] = []
            started[name] = Team(workers)
            workers.extend(Worker(name, part) for part in parts)
        for team in started.values():
            team.ready()
        yield started
    finally:
        for team in started.values():
            for worker in team.workers:
                worker.close()


def _serve(pipe: Connection, share: Share) -> None:
    """A process: make the method, then do as it is told until the pipe is closed."""
    commands: dict[str, Callable[..., Any]] | str
    try:
        commands = _commands(share)
    except Exception as error:
        commands = _reason(error)
    while True:
        try:
            verb, arguments = pipe.recv()
        except (EOFError, ConnectionResetError, KeyboardInterrupt):
            return
        if isinstance(commands, str):
            pipe.send((False, commands))
            continue
        try:
            pipe.send((True, commands[verb](*arguments)))
        except KeyboardInterrupt:
            return
        except Exception as error:
            pipe.send((False, _reason(error)))


def _reason(error: Exception) -> str:
    """The error in a line, and where it came from."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    said = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {said} ({Path(frame.filename).name}:{frame.lineno})"


def _commands(share: Share) -> dict[str, Callable[..., Any]]:
    if share.cpus and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, share.cpus)  # before libraries count the processors
    torch.set_num_threads(share.threads)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or it takes the GPU that all methods share
    device = torch.device(share.device)
    problem = problem_of(share.workload, share.first, share.fields).to(device)
    if share.package is not None:
        importlib.import_module(share.package)
    before = _begin_counting(device)
    method = share.make(problem)

    def advance(count: int) -> None:
        method.advance(count)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def peak_bytes() -> int | None:
        if (own := getattr(method, "peak_bytes", None)) is not None and device.type == "cuda":
            return own()
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident()
        return None if peak is None or before is None else max(0, peak - before)

    return {
        "ready": lambda: method.step_name,
        "advance": advance,
        "rows": lambda fields: method.rows()[:fields].cpu().numpy(),
        "peak_bytes": peak_bytes,
    }


def _begin_counting(device: torch.device) -> int | None:
    """Bytes that are held now; the peak is counted from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what making the data has left with the allocator
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    except OSError:
        return None
    return peak_resident()


def peak_resident() -> int | None:
    """Bytes that this process has held at most; None where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    return 1024 * int(found[0]) if found else None
