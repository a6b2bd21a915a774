"""What a driver costs: a simulated cluster that it serves, and how long the workers of a real job wait for it.

`simulated`: the driver's own loop serves a pool of workers that do not exist, in simulated time: leases of random
length, stragglers, workers that die, data that kill theirs, late commits of workers that were taken for dead. Its
seconds of CPU and its peak of memory are those of the whole process, the simulation included; at the end each datum has
exactly one commit, or the benchmark fails.

The other rows run a job as users run it, with one worker and with more. `wait_fraction` is the part of the workers'
time between the first lease and the last commit that went into writing rows and checkpoints, into commits, and into
what passes between a worker and the driver until the next lease; lower is better. `speedup` is in fields per second,
over the first of these rows.
"""

import argparse
import heapq
import random
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from nfscale.benchmark.encode import figures_of
from nfscale.benchmark.timing import print_rows
from nfscale.errors import NfscaleError

HELP = "a driver at a million data, and how long workers wait for it"

_LEASE_SECONDS = 15.0  # the median of a simulated one, and of what nfscale aims at
_SIGNS = 3  # of progress in a lease
_DEATHS = 0.02  # of leases
_STRAGGLERS = 0.005  # of leases, ten times slower
_ZOMBIES = 0.3  # of dead workers: alive, and committing late
_REPLACED_SECONDS = 20.0  # until a worker takes the place of a dead one
_TOGETHER_SECONDS = 0.05  # a driver hears of what has happened since it last asked
WAITS = ("writing", "keeping", "between")
"""What of a worker's time is no work of its own, see `Commit.spent`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", nargs="?", default="pipelines/photos.yaml", help="a job file (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of the job, as for encode")
    parser.add_argument("--data", type=int, default=1_000_000, help="of the simulation (default: %(default)s)")
    parser.add_argument("--shards", type=int, default=20_000, help="of the simulation (default: %(default)s)")
    parser.add_argument("--simulated-workers", type=int, default=2_000, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the simulation's deaths (default: %(default)s)")
    parser.add_argument("--workers", default="1,2", help="of the job, one run for each; empty: none (default: 1,2)")


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows: what, data, shards, workers, cpu_seconds and peak_mb (of the driver), wait_fraction, and speed."""
    rows = []
    if arguments.data:
        rows.append(simulated(arguments.data, arguments.shards, arguments.simulated_workers, arguments.seed))
    speed = None
    for workers in [int(count) for count in arguments.workers.split(",") if count]:
        figures = figures_of(arguments.job, [*arguments.overrides, f"workers={workers}"])
        row = row_of(figures, speed)
        speed = speed or row["fields_per_second"]
        rows.append(row)
    print_rows(rows)
    return rows


def row_of(figures: dict[str, Any], first_speed: float | None) -> dict[str, Any]:
    """Of what `nfscale encode --json` wrote."""
    whole = figures["workers"] * figures["seconds"]
    return {
        "what": figures["name"],
        "data": figures["fields"],
        "shards": figures["shards"],
        "workers": figures["workers"],
        "cpu_seconds": figures["driver_cpu_seconds"],
        "peak_mb": figures["driver_peak_mb"],
        "wait_fraction": sum(figures["spent"].get(what, 0.0) for what in WAITS) / whole,
        "fields_per_second": figures["fields_per_second"],
        "speedup": figures["fields_per_second"] / (first_speed or figures["fields_per_second"]),
    }


def simulated(data: int, shards: int, workers: int, seed: int) -> dict[str, Any]:
    """The row of a simulated run.

    Raises:
        NfscaleError: if a datum ends without a commit, or with two.
    """
    from nfscale.driver import peak_mb, serve

    before = time.process_time()
    chance = random.Random(seed)
    folder = _Folder()
    pool = _Pool(folder, workers, chance, deadly={chance.randrange(data) for _ in range(5)})
    plan: Any = _plan(data, -(-data // shards))
    serve(folder, plan, pool, [], clock=lambda: pool.now)  # type: ignore[arg-type] (a folder that is a dict)
    _refuse_others(folder, data)
    return {
        "what": "simulated",
        "data": data,
        "shards": len(plan.shards()),
        "workers": workers,
        "cpu_seconds": time.process_time() - before,
        "peak_mb": peak_mb(),
        "wait_fraction": None,
        "fields_per_second": None,
        "speedup": None,
    }


def _plan(data: int, size: int) -> Any:
    from nfscale.job import job_from_settings
    from nfscale.store.run_folder import Shard

    job = job_from_settings({"dataset": {"kind": "digits"}, "optimizer": {"kind": "adam"}}, [])
    shards = [Shard(n, start, min(start + size, data)) for n, start in enumerate(range(0, data, size))]
    return SimpleNamespace(job=job.model_dump(mode="json"), data_count=data, shards=lambda: shards)


def _refuse_others(folder: "_Folder", data: int) -> None:
    position = 0
    for start, stop in sorted(found for found in folder.found.values() if found is not None):
        if start != position:
            raise NfscaleError(f"simulated: the data from {position} on are committed not once; the next is {start}")
        position = stop
    if position != data:
        raise NfscaleError(f"simulated: {position} of {data} data are committed")


class _Folder:
    """Commits by name as a run folder keeps them, first come, first served: a range of data, or None for a cut."""

    has_calibration = True
    is_complete = False

    def __init__(self) -> None:
        self.found: dict[str, tuple[int, int] | None] = {}

    def commits_and_cuts(self) -> tuple[list[Any], set[str]]:
        return self.commits(), {name for name, found in self.found.items() if found is None}

    def commits(self) -> list[Any]:
        return [SimpleNamespace(rows=found[1] - found[0]) for found in self.found.values() if found is not None]

    def commit(self, shard: Any) -> bool:
        return self.found.setdefault(shard.name, found := (shard.start, shard.stop)) is found

    def cut(self, shard: Any) -> bool:
        return self.found.setdefault(shard.name, None) is None

    def take_over(self) -> int:
        return 1

    def refuse_superseded(self, epoch: int) -> None: ...

    def beat(self, *said: Any) -> None: ...

    def driver_left(self, *said: Any) -> None: ...

    def remove_attempts(self, attempts: list[str]) -> None: ...

    def finish(self, rows: int) -> bool:
        return True


class _Pool:
    """Workers that do nothing but take time, and sometimes die of it."""

    def __init__(self, folder: _Folder, workers: int, chance: random.Random, deadly: set[int]) -> None:
        self.now = 0.0
        self._folder, self._chance, self._deadly = folder, chance, deadly
        self._named = 0
        self._free: dict[str, None] = {}
        self._busy: dict[str, int] = {}
        """Lease of each worker."""
        self._coming: list[tuple[float, int, str, Any, Any]] = []
        """When, a number that no two share, worker, lease, what happens; a heap."""
        for _ in range(workers):
            self._come_up()

    def _come_up(self) -> None:
        self._free[f"worker-{self._named}"] = None
        self._named += 1

    def idle(self) -> list[str]:
        return list(self._free)

    def want(self, workers: int) -> None: ...

    def waiting(self) -> str | None:
        return None

    def start(self, lease: Any) -> None:
        from nfscale.coordinator import Failure

        chance, worker, shard = self._chance, lease.worker, lease.shard
        del self._free[worker]
        self._busy[worker] = lease.id
        seconds = _LEASE_SECONDS * chance.lognormvariate(0, 0.2)
        if chance.random() < _STRAGGLERS:
            seconds *= 10
        for sign in range(_SIGNS):
            self._at(seconds * (sign + 1) / (_SIGNS + 1), lease, None)
        kills = not lease.quarantine and any(shard.start <= datum < shard.stop for datum in self._deadly)
        if kills or chance.random() < _DEATHS:
            failure = Failure.CRASH if kills or chance.random() < 0.5 else Failure.INFRA
            self._at(seconds * chance.random(), lease, failure)
            if not kills and chance.random() < _ZOMBIES:
                self._at(2 * seconds, lease, "late")
        else:
            self._at(seconds, lease, "done")

    def _at(self, seconds: float, lease: Any, what: Any) -> None:
        self._named += 1
        heapq.heappush(self._coming, (self.now + seconds, self._named, lease.worker, lease, what))

    def poll(self, seconds: float) -> list[Any]:
        events: list[Any] = []
        until = self.now + seconds
        while not events and self.now < until:
            following = self._coming[0][0] if self._coming else until
            self.now = min(until, max(following, self.now) + _TOGETHER_SECONDS)
            while self._coming and self._coming[0][0] <= self.now:
                _, _, worker, lease, what = heapq.heappop(self._coming)
                events += self._happens(worker, lease, what)
        return events

    def _happens(self, worker: str, lease: Any, what: Any) -> Iterator[Any]:
        from nfscale.encode import Progress
        from nfscale.pool import Advanced, Failed, Succeeded

        if what == "replaced":
            self._come_up()
        elif what == "late":
            self._folder.commit(lease.shard)
        elif self._busy.get(worker) != lease.id:
            return
        elif what is None:
            yield Advanced(worker, Progress(lease.shard.name, []))
        elif what == "done":
            del self._busy[worker]
            self._free[worker] = None
            won = self._folder.commit(lease.shard)
            cut = not won and self._folder.found[lease.shard.name] is None
            commit = SimpleNamespace(rows=len(lease.shard), spent={})
            yield Succeeded(worker, SimpleNamespace(commit=commit, won=won, cut=cut))  # type: ignore[arg-type]
        else:
            self.cancel(worker)
            yield Failed(worker, what, "simulated")

    def cancel(self, worker: str) -> None:
        del self._busy[worker]
        self._at(_REPLACED_SECONDS, SimpleNamespace(worker=worker), "replaced")

    def close(self) -> None: ...
