"""Chaos: real encodes on a real Ray cluster of this machine, while its parts are killed, filled up, cut off and slowed.

    make chaos SEED=1 MINUTES=10            (python -m tests.chaos.run --seed 1 --minutes 10 --json chaos-1.json)

Encodes follow each other, into a disk of their own and into a bucket by turns. Faults come every so often: kill -9 of a
worker, a node's raylet, the driver, the MLflow server; a full disk, a disk that is read-only; a bucket that is slow, or
errs. A driver that ends is started again by the same command. Then every encode must hold every datum once, with the
weights of an undisturbed encode, pass `nfscale verify`, and be whole in MLflow. The steps that were thrown away are
counted, and how long Ray takes to notice that a node is dead. Exit code 1 if anything is wrong.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.chaos import machines
from tests.chaos.digits import steps_run
from tests.chaos.machines import Nodes, TrackingServer, command_of, kill, marked
from tests.chaos.proxy import FaultyStore

ROOT = Path(__file__).parents[2]
NODES = 3
WASTED_ALLOWED = 0.15
DIFFERENCE_ALLOWED = 1e-6
_BETWEEN_SECONDS = (5.0, 18.0)
"""From one fault to the next, or later, when workers are at work: longer than what is lost by one, shorter than an
encode."""
_DISK_BYTES = 256 << 20
_AFTERWARDS_SECONDS = 420.0
"""That the last encode may go on after the last fault."""
_CRASHED = {-6, -11}
"""How a process of Ray's ends whose native code aborts: by itself, told apart in the report."""
_AGAIN = {1, -9, 4, 143} | _CRASHED
"""How a driver may end in all this: failed on the way, killed, overtaken by the next one, told to leave, crashed."""


@dataclass
class Encode:
    """One of the encodes, and what became of it."""

    output: str
    place: str
    seconds: float = 0.0
    drivers: int = 0
    exit_codes: dict[str, int] = field(default_factory=dict)
    shards: int = 0
    longest_shard_seconds: float = 0.0
    rows: int = 0
    steps_run: int = 0
    steps_kept: int = 0
    largest_difference: float = float("nan")
    problems: list[str] = field(default_factory=list)

    @property
    def wasted(self) -> float:
        """Fraction of the steps that were thrown away."""
        return 1 - self.steps_kept / self.steps_run if self.steps_run else 0.0


class Disk:
    """A file system of memory that can be filled up and made read-only; needs root."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir(parents=True)
        self._mount("-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs")

    def _mount(self, *options: str) -> None:
        subprocess.run(["mount", *options, str(self.place)], check=True, capture_output=True)

    def fill(self) -> None:
        with contextlib.suppress(OSError), open(self.place / "filler", "wb", buffering=0) as filler:
            while filler.write(b"\0" * (1 << 20)):
                pass

    def empty(self) -> None:
        (self.place / "filler").unlink(missing_ok=True)

    def lock(self) -> bool:
        """Read-only from now on; False if there was no moment without a file open for writing."""
        for _ in range(100):
            with contextlib.suppress(subprocess.CalledProcessError):
                self._mount("-o", "remount,ro")
                return True
            time.sleep(0.02)
        return False

    def unlock(self) -> None:
        self._mount("-o", "remount,rw")

    def close(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.place)], check=False, capture_output=True)


def possible_disk(place: Path) -> Disk | None:
    """A disk, or None where this user may not mount one."""
    try:
        return Disk(place)
    except (OSError, subprocess.CalledProcessError):
        return None


class Chaos:
    """The machines, the encodes on them, and what befalls them."""

    def __init__(self, seed: int, minutes: float, folder: Path, fields: int, steps: int) -> None:
        self.draw = random.Random(seed)
        self.seed, self.minutes, self.folder = seed, minutes, folder
        self.fields, self.steps = fields, steps
        self.faults: Counter[str] = Counter()
        self.told: list[str] = []
        self.encodes: list[Encode] = []
        self.mends: list[tuple[float, Callable[[], None]]] = []
        self.disk = possible_disk(folder / "disk")
        self.store: FaultyStore
        self.nodes: Nodes
        self.tracking: TrackingServer
        self.driver: subprocess.Popen | None = None

    # --- the encodes

    def settings(self, output: str, log: Path) -> dict[str, Any]:
        return {
            "name": "chaos",
            "dataset": {
                "kind": "function",
                "target": "tests.chaos.digits:Digits",
                "arguments": {"log": str(log), "count": self.fields},
            },
            "field": {"kind": "mlp", "width": 64, "depth": 3, "weight_scale": 1.5},  # steps are most of the work
            "optimizer": {"kind": "esgd", "curvature": "shared"},
            "fit": {"max_steps": self.steps, "target": None, "samples": "full", "check_every": 20},
            "store": {"shard_fields": 20},
            "workers": NODES,
            "output": output,
        }

    def undisturbed(self) -> Any:
        """Weights of an encode that nothing happens to: [fields, P]."""
        from nfscale.store import open_weights
        from tests.jobs import encode_in_process, job_from_settings

        settings = self.settings(str(self.folder / "undisturbed"), self.folder / "undisturbed.steps")
        folder, _ = encode_in_process(job_from_settings(settings | {"workers": 0}, []))
        return open_weights(str(folder)).weights()

    def start_driver(self, number: int) -> subprocess.Popen:
        command = [sys.executable, "-m", "nfscale", "encode", str(self.folder / f"job-{number}.yaml")]
        environment = os.environ | {"RAY_ADDRESS": self.nodes.address, "MLFLOW_TRACKING_URI": self.tracking.uri}
        environment["PYTHONFAULTHANDLER"] = "1"
        with open(self.folder / f"driver-{number}.log", "a") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def encode(self, number: int, faults_until: float) -> Encode:
        """Run one encode to its end, whatever that takes."""
        on_disk = number % 2 == 0
        output = str((self.disk.place if self.disk else self.folder) / f"run-{number}")
        one = Encode(output if on_disk else f"s3://encoded/chaos/run-{number}", "disk" if on_disk else "bucket")
        log = self.folder / f"steps-{number}"
        (self.folder / f"job-{number}.yaml").write_text(yaml.safe_dump(self.settings(one.output, log)))
        codes: Counter[str] = Counter()
        began = time.monotonic()
        next_fault = began + self.draw.uniform(*_BETWEEN_SECONDS)
        self.driver = self.start_driver(number)
        one.drivers = 1
        while True:
            now = time.monotonic()
            if (code := self.driver.poll()) is not None:
                codes[str(code)] += 1
                if code == 0:
                    break
                if code not in _AGAIN or now > faults_until + _AFTERWARDS_SECONDS:
                    one.problems.append(f"the driver ended with {code}; see driver-{number}.log in {self.folder}")
                    break
                time.sleep(1.0)
                self.driver = self.start_driver(number)
                one.drivers += 1
            if now > faults_until + _AFTERWARDS_SECONDS:
                one.problems.append(f"not done {_AFTERWARDS_SECONDS:.0f} s after the last fault")
                kill(self.driver.pid)
                break
            if next_fault <= now < faults_until:
                if self.workers():
                    self.befall(one.place, now)
                    next_fault = now + self.draw.uniform(*_BETWEEN_SECONDS)
                else:  # and not at the very moment when there are some
                    next_fault = now + self.draw.uniform(0.0, _BETWEEN_SECONDS[0])
            self.mend(now)
            self.nodes.tend()
            time.sleep(0.1)
        self.mend(float("inf"))
        one.seconds, one.exit_codes = time.monotonic() - began, dict(codes)
        one.steps_run = steps_run(log)
        return one

    # --- what befalls them

    def befall(self, place: str, now: float) -> None:
        """One fault, drawn from those that are possible now."""
        possible: list[tuple[str, Callable[[float], bool]]] = [
            ("worker", self.kill_worker),
            ("raylet", self.kill_raylet),
            ("driver", self.kill_driver),
            ("mlflow", self.kill_tracking),
        ]
        if place == "disk" and self.disk is not None and not self.mends:
            possible += [("disk full", self.fill_disk), ("disk read-only", self.lock_disk)]
        if place == "bucket" and self.store.mood == "well":
            possible += [("bucket slow", self.slow_store), ("bucket errs", self.upset_store)]
        while possible:
            name, act = possible.pop(self.draw.randrange(len(possible)))
            if act(now):
                self.faults[name] += 1
                self.told.append(f"{time.strftime('%H:%M:%S')} {name}")
                print(f"  {self.told[-1]}", flush=True)
                return

    def mend(self, now: float) -> None:
        """Undo what is to last no longer."""
        due = [mend for when, mend in self.mends if when <= now]
        self.mends = [(when, mend) for when, mend in self.mends if when > now]
        for mend in due:
            mend()

    def later(self, now: float, low: float, high: float, mend: Callable[[], None]) -> bool:
        self.mends.append((now + self.draw.uniform(low, high), mend))
        return True

    def workers(self) -> list[int]:
        """Processes that fit at this moment."""
        return sorted(pid for pid in marked(self.mark) if "ray::_FitWorker.work" in command_of(pid))

    def kill_worker(self, now: float) -> bool:
        workers = self.workers()
        return bool(workers) and kill(self.draw.choice(workers))

    def kill_raylet(self, now: float) -> bool:
        if len(self.nodes.alive) < 2:
            return False
        return self.nodes.kill_raylet(self.draw.choice(self.nodes.alive), self.draw.uniform(0.0, 8.0))

    def kill_driver(self, now: float) -> bool:
        return self.driver is not None and self.driver.poll() is None and kill(self.driver.pid)

    def kill_tracking(self, now: float) -> bool:
        return self.tracking.answers and self.tracking.kill() and self.later(now, 5, 20, self.tracking.start)

    def fill_disk(self, now: float) -> bool:
        assert self.disk is not None
        self.disk.fill()
        return self.later(now, 2, 5, self.disk.empty)

    def lock_disk(self, now: float) -> bool:
        assert self.disk is not None
        return self.disk.lock() and self.later(now, 2, 5, self.disk.unlock)

    def slow_store(self, now: float) -> bool:
        self.store.mood = "slow"
        return self.later(now, 4, 8, self.calm_store)

    def upset_store(self, now: float) -> bool:
        self.store.mood = "erring"
        return self.later(now, 4, 8, self.calm_store)

    def calm_store(self) -> None:
        self.store.mood = "well"

    # --- what became of them

    def judge(self, one: Encode, expected: Any) -> None:
        """Look whether an encode is what it would have been."""
        import numpy as np

        from nfscale.store import RunFolder, open_weights
        from nfscale.verify import verify

        if one.problems:
            return
        folder = RunFolder(one.output)
        commits = folder.commits()
        one.shards, one.rows = len(commits), sum(commit.rows for commit in commits)
        one.longest_shard_seconds = max(commit.seconds for commit in commits)
        table = open_weights(one.output)
        rows = table.to_arrow(["index", "status", "steps"])
        indices = rows["index"].to_pylist()
        if sorted(indices) != list(range(self.fields)) or not folder.is_complete:
            one.problems.append(f"{len(indices)} rows of {len(set(indices))} data, not each of {self.fields} once")
            return
        one.steps_kept = sum(rows["steps"].to_pylist())
        if (statuses := Counter(rows["status"].to_pylist())) != {"max_steps": self.fields}:
            one.problems.append(f"statuses {dict(statuses)}")
        weights = table.weights()
        one.largest_difference = float(np.abs(weights - expected).max())
        if not one.largest_difference <= DIFFERENCE_ALLOWED:
            one.problems.append(f"weights differ by {one.largest_difference:g} from those of an undisturbed encode")
        one.problems += [f"verify: {mismatch}" for mismatch in verify(folder).mismatches[:3]]

    def judge_tracking(self, one: Encode) -> None:
        """Bring MLflow up to an encode with `nfscale review`, and look whether it has everything once."""
        from mlflow import MlflowClient

        from nfscale.store import RunFolder

        environment = os.environ | {"MLFLOW_TRACKING_URI": self.tracking.uri}
        command = [sys.executable, "-m", "nfscale", "review", one.output]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        folder = RunFolder(one.output)
        if done.returncode or not folder.is_tracked:
            one.problems.append(f"review ended with {done.returncode}: {done.stderr[-300:]}")
            return
        client = MlflowClient(self.tracking.uri)
        experiment = client.get_experiment_by_name("nfscale")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id], f"tags.`nfscale.run` = '{folder.plan().id}'")
        if len(runs) != 1:
            one.problems.append(f"{len(runs)} runs in MLflow")
            return
        run_id = runs[0].info.run_id
        steps = {name: [p.step for p in client.get_metric_history(run_id, name)] for name in _POINTS}
        if sorted(steps["shard/fields"]) != sorted(commit.order for commit in folder.commits()):
            one.problems.append(f"{len(steps['shard/fields'])} points of {one.shards} shards in MLflow")
        if sorted(steps["datum/quality"]) != list(range(self.fields)):
            one.problems.append(f"{len(steps['datum/quality'])} points of {self.fields} data in MLflow")

    # --- all of it

    def run(self) -> dict[str, Any]:
        self.mark = uuid.uuid4().hex
        machines.mark_everything(self.mark, ROOT)
        os.environ["RAY_TMPDIR"] = str(self.folder / "ray")
        (self.folder / "ray").mkdir()
        with self.bucket():
            began = time.monotonic()
            self.tracking = TrackingServer(self.folder / "mlflow")
            expected = self.undisturbed()
            print(f"an undisturbed encode in this process took {time.monotonic() - began:.0f} s", flush=True)
            self.nodes = Nodes(NODES)
            try:
                self.tracking.wait()
                faults_until = time.monotonic() + 60 * self.minutes
                while time.monotonic() < faults_until:
                    print(f"encode {len(self.encodes)}", flush=True)
                    self.encodes.append(one := self.encode(len(self.encodes), faults_until))
                    self.judge(one, expected)
                    _tell(one)
                self.tracking.wait()
                for one in self.encodes:
                    if not one.problems:
                        self.judge_tracking(one)
                self.nodes.settle()
                return self.report()
            finally:
                self.end()

    @contextlib.contextmanager
    def bucket(self) -> Iterator[None]:
        from tests.object_store import s3_environment

        with s3_environment() as settings:
            self.store = FaultyStore(int(settings["AWS_ENDPOINT_URL"].rpartition(":")[2]))
            os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{self.store.port}"
            try:
                yield
            finally:
                self.store.close()

    def end(self) -> None:
        """End all that was started here, and nothing else."""
        self.mend(float("inf"))
        with contextlib.suppress(Exception):
            self.nodes.close()
        for pid in marked(self.mark):
            if "tests.chaos" not in command_of(pid) and "moto.server" not in command_of(pid):
                kill(pid)
        if self.disk is not None:
            self.disk.close()

    def report(self) -> dict[str, Any]:
        run = sum(one.steps_run for one in self.encodes)
        wasted = 1 - sum(one.steps_kept for one in self.encodes) / run if run else 0.0
        problems = [f"{one.output}: {problem}" for one in self.encodes for problem in one.problems]
        if wasted > WASTED_ALLOWED:
            problems.append(f"{100 * wasted:.1f} % of the steps were thrown away")
        noticed = self.nodes.noticed
        return {
            "seed": self.seed,
            "minutes": self.minutes,
            "faults": sum(self.faults.values()),
            "faults_by_kind": dict(self.faults.most_common()),
            "faults_in_order": self.told,
            "not_possible": [] if self.disk else ["disk full", "disk read-only (this user may not mount)"],
            "encodes": [asdict(one) | {"wasted": one.wasted} for one in self.encodes],
            "drivers": sum(one.drivers for one in self.encodes),
            "drivers_crashed": sum(one.exit_codes.get(str(code), 0) for one in self.encodes for code in _CRASHED),
            "wasted": wasted,
            "node_death_noticed_seconds": {
                "count": len(noticed),
                "median": statistics.median(noticed) if noticed else None,
                "longest": max(noticed, default=None),
            },
            "bucket": {
                "delayed": self.store.delayed,
                "refused": self.store.refused,
                "unanswered": self.store.unanswered,
            },
            "problems": problems,
            "ok": not problems,
        }


_POINTS = ("shard/fields", "datum/quality")


def _tell(one: Encode) -> None:
    print(
        f"  {one.place}: {one.rows} rows in {one.shards} shards, {one.seconds:.0f} s, {one.drivers} drivers "
        f"{one.exit_codes}, {100 * one.wasted:.1f} % of {one.steps_run:,} steps thrown away, weights differ by "
        f"{one.largest_difference:g}, longest shard {one.longest_shard_seconds:.1f} s"
        + "".join(f"\n  PROBLEM {problem}" for problem in one.problems),
        flush=True,
    )


def print_report(figures: dict[str, Any]) -> None:
    """The figures as a table."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table("encode", "rows", "seconds", "drivers", "thrown away", "weights differ by", "problems", box=None)
    for one in figures["encodes"]:
        table.add_row(
            one["place"],
            str(one["rows"]),
            f"{one['seconds']:.0f}",
            str(one["drivers"]),
            f"{100 * one['wasted']:.1f} %",
            f"{one['largest_difference']:g}",
            str(len(one["problems"])),
        )
    console.print(table)
    kinds = ", ".join(f"{name} {count}" for name, count in figures["faults_by_kind"].items())
    console.print(f"faults    {figures['faults']}: {kinds}")
    for name in figures["not_possible"]:
        console.print(f"          not possible here: {name}")
    console.print(f"thrown away  {100 * figures['wasted']:.1f} % of all steps (allowed {100 * WASTED_ALLOWED:.0f} %)")
    noticed = figures["node_death_noticed_seconds"]
    if noticed["count"]:
        median, longest = noticed["median"], noticed["longest"]
        console.print(f"dead nodes   noticed by Ray after {median:.1f} s (median), {longest:.1f} s (longest)")
    if figures["drivers_crashed"]:
        console.print(f"drivers      {figures['drivers_crashed']} crashed by themselves, in native code of Ray's")
    for problem in figures["problems"]:
        console.print(f"PROBLEM   {problem}", markup=False)
    console.print("every datum once, as undisturbed" if figures["ok"] else "NOT as it should be")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=10.0, help="of faults; the last encode may go on after them")
    parser.add_argument("--fields", type=int, default=1200, help="of an encode")
    parser.add_argument("--steps", type=int, default=1000, help="of a field")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--keep", action="store_true", help="keep the folder with all logs")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="nfc", dir="/tmp"))  # short: Ray's sockets are in it
    figures: dict[str, Any] = {"ok": False}
    try:
        figures = Chaos(options.seed, options.minutes, folder, options.fields, options.steps).run()
        if options.json:
            options.json.write_text(json.dumps(figures, indent=1) + "\n")
        print_report(figures)
    finally:
        if figures["ok"] and not figures["drivers_crashed"] and not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            print(f"logs are in {folder}")
    return 0 if figures["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
