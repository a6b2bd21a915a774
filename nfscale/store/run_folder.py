"""The folder of a run: what is in it, and the only ways in which something gets there.

    job.json                           the frozen plan; written first, put-if-absent
    checkpoints/shard-00042.npz        while a shard takes long: its fields so far; removed with the commit
    calibration.parquet                what all fields share beside theta0; put-if-absent
    steps.parquet                      where the job has a step plan: its copy, put-if-absent
    data/shard-00042.<attempt>.parquet written by one attempt, under a name of its own
    commits/shard-00042.json           put-if-absent: names the one file that counts, or the parts it was cut into
    _SUCCESS                           when every datum has a row
    driver.json                        while a driver runs: where, its last sign of life, what is in flight
    drivers/3-of-16.json               the same of a driver that has a share of the shards
    _control/epoch-000007.json         put-if-absent by each driver that starts: the highest one counts
    weights.arrow                      where the job wants it: an uncompressed copy for training
    review/                            report and pictures

Readers open only what the commits name, so a killed or late attempt leaves nothing that anyone sees.
"""

import base64
import contextlib
import io
import json
import os
import socket
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nfscale.errors import CallerError, MismatchError, SupersededError
from nfscale.files import Files, open_files
from nfscale.layout import Layout
from nfscale.store import schema, step_plan
from nfscale.store.schema import LabelType

REPORT = "review/report.html"
REVIEW_SUMMARY = "review/summary.json"
CONVERGENCE = "review/convergence.parquet"
WORST_TABLE = "review/worst.json"
JOB_FILE = "review/job.yaml"
IPC_COPY = "weights.arrow"
ESTIMATE = "estimate.json"
"""May lie in the folder before the run does."""
_STEPS = "steps.parquet"
_CONTROL = "_control"
_DRIVERS = "drivers"
_CHECKPOINTS = "checkpoints"
_SHARDS_LEFT = 4
"""So many shards at least are made of what is left, until they are as small as they may be. Simulated with 1,146 fields
of 62 ms and two workers: the one that is done first waits 0.3 s for the other in place of 1.7 s, and there are five
shards more, of 0.05 s beside their fits."""


@dataclass(frozen=True)
class Shard:
    """A range of positions in the dataset; where it lands is a function of its name."""

    index: int
    start: int
    stop: int
    part: str = ""
    """Which half of which half, after bisection: "", "a", "b", "aa", ..."""
    again: bool = False
    """It is committed, and the rows in it that failed are to be fitted anew."""

    @property
    def name(self) -> str:
        return f"shard-{self.index:05d}" + (f"-{self.part}" if self.part else "")

    def __len__(self) -> int:
        return self.stop - self.start

    def halves(self) -> tuple["Shard", "Shard"]:
        """The two parts it commits as once it is bisected."""
        middle = (self.start + self.stop) // 2
        return (
            Shard(self.index, self.start, middle, self.part + "a", self.again),
            Shard(self.index, middle, self.stop, self.part + "b", self.again),
        )


@dataclass(frozen=True)
class Plan:
    """What is frozen at the first start; the content of `job.json`."""

    id: str
    """Of the run: unique, made when the plan is made."""
    fingerprint: str
    job: dict[str, Any]
    """The resolved job."""
    data_count: int
    ids_sha256: str
    label_type: LabelType
    samples_per_step: int
    """What the optimiser's automatic learning rate was derived from."""
    shard_fields: int
    layout: Layout
    forward: dict[str, Any]
    """The exact forward: omega, output affine, coordinate range, formula; enough to decode without nfscale."""
    theta0: np.ndarray | None
    """float32 [P], what all fields start from; None where each starts from its own."""
    calibration_positions: tuple[int, ...] = ()
    blocks: tuple[tuple[int, tuple[int, ...]], ...] | None = None
    """Of data that are cut into blocks, which `data_count` counts: how many each has by axis, as pairs of a number of
    data that follow each other and their counts."""
    learned: dict[str, float] = field(default_factory=dict)
    """What it took to learn theta0, see `nfscale.engine.LearnedStart`; empty where it was drawn."""
    factors: np.ndarray | None = None
    """float32 [P], learned with theta0: of each weight on the learning rate, see `nfscale.optim.Scaled`."""
    versions: dict[str, str] = field(default_factory=dict)
    format: int = 1
    last_fields: int | None = None
    """How few fields the last shards have, so that workers end together; None: as many as all."""

    @property
    def quality_name(self) -> str:
        return self.forward["signal"]["quality_name"]

    def shards(self) -> list[Shard]:
        """The shards of the run, before any bisection."""
        shards: list[Shard] = []
        start = 0
        while start < self.data_count:
            left = self.data_count - start
            size = self.shard_fields
            if self.last_fields is not None:
                size = max(self.last_fields, min(size, -(-left // _SHARDS_LEFT)))
            shards.append(Shard(len(shards), start, start + min(size, left)))
            start = shards[-1].stop
        return shards

    def table_schema(self) -> pa.Schema:
        """The schema that every file of the run has."""
        return schema.table_schema(
            self.layout, self.label_type, self.quality_name, self.fingerprint, self.format, self.dtype
        )

    @property
    def dtype(self) -> schema.StoreDtype:
        """How the weights are rounded."""
        return self.job["store"]["dtype"]

    def to_json(self) -> dict[str, Any]:
        content = asdict(self)
        content["layout"] = json.loads(self.layout.to_json())
        content["calibration_positions"] = list(self.calibration_positions)
        content |= {"theta0": _encoded(self.theta0), "factors": _encoded(self.factors)}
        return content

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Plan":
        values = dict(content)
        values["layout"] = Layout.from_json(json.dumps(content["layout"]))
        values["calibration_positions"] = tuple(content["calibration_positions"])
        if (blocks := content.get("blocks")) is not None:
            values["blocks"] = tuple((times, tuple(counts)) for times, counts in blocks)
        values |= {"theta0": _decoded(content["theta0"]), "factors": _decoded(content.get("factors"))}
        return cls(**values)


def _encoded(row: np.ndarray | None) -> dict[str, str] | None:
    if row is None:
        return None
    data = base64.b64encode(row.astype("<f4").tobytes()).decode()
    return {"dtype": "float32", "encoding": "base64, little-endian", "data": data}


def _decoded(content: dict[str, str] | None) -> np.ndarray | None:
    if content is None:
        return None
    return np.frombuffer(base64.b64decode(content["data"]), dtype="<f4").astype(np.float32)


@dataclass(frozen=True)
class Commit:
    """A shard that is done: which file counts, and what is in it."""

    shard: str
    index: int
    start: int
    stop: int
    file: str
    """Relative to the run folder."""
    rows: int
    bytes: int
    sha256: str
    attempt: str
    order: int
    """Rank of the lease it came from, in the order in which the driver gave them out; unique in a run."""
    worker: str
    committed_at: float
    """Seconds since the epoch."""
    seconds: float
    """Wall time of the shard, reading and writing included."""
    fit_seconds: float
    """Wall time inside the engine."""
    counts: dict[str, int]
    """Rows by status."""
    quality: dict[str, float]
    """mean, p05, p50, p95 over the rows that have one; empty where none has."""
    steps_mean: float
    """Over the rows that were fitted."""
    spent: dict[str, float] = field(default_factory=dict)
    """Parts of `seconds`: optimiser `steps`, `checks` between them, waiting for data that are not read yet
    (`reading`), `measuring` the rows as readers decode them, `writing` them, and `keeping` checkpoints. And
    beside them what passed `between` the rows of the worker's last shard and this one: a commit, a report, a lease."""

    @property
    def failed(self) -> int:
        return sum(count for status, count in self.counts.items() if status in schema.FAILED_STATUSES)


class RunFolder:
    """A run folder, on a local or shared file system or in an object store."""

    def __init__(self, location: str | Path) -> None:
        self.files: Files = open_files(location)

    def __str__(self) -> str:
        """Path or URI, as the user wrote it."""
        return self.files.root

    def _json(self, name: str) -> dict[str, Any]:
        """A file that may not be there: then it says nothing."""
        try:
            return json.loads(self.files.read(name))
        except FileNotFoundError:
            return {}

    @property
    def has_report(self) -> bool:
        return self.files.size(REPORT) is not None

    def review_figures(self) -> dict[str, Any]:
        """The figures of the last review; empty before the first."""
        return self._json(REVIEW_SUMMARY)

    @property
    def tracking(self) -> dict[str, Any]:
        """Where this run is in MLflow: tracking_uri, experiment_id, run_id, and whether it is there whole."""
        return self._json("mlflow.json")

    def write_estimate(self, figures: dict[str, Any]) -> None:
        """Keep what the run is expected to cost and to come to, see `nfscale.plan.estimate`.

        Raises:
            CallerError: if the folder cannot be written.
        """
        try:
            self.files.replace(ESTIMATE, schema.json_bytes(figures))
        except OSError as error:
            raise CallerError(f"cannot write {self.files.place(ESTIMATE)}: {error.strerror or error}") from error

    def estimate(self) -> dict[str, Any]:
        """What was estimated before the run; empty where nothing was."""
        return self._json(ESTIMATE)

    def set_tracking(self, tracking_uri: str, run_id: str, experiment_id: str, whole: bool) -> None:
        """Remember where this run is in MLflow."""
        content = {
            "tracking_uri": tracking_uri,
            "experiment_id": experiment_id,
            "run_id": run_id,
            "whole": whole,
        }
        self.files.replace("mlflow.json", schema.json_bytes(content))

    @property
    def is_tracked(self) -> bool:
        """Whether MLflow has everything of a complete run."""
        return bool(self.tracking.get("whole"))

    @property
    def is_complete(self) -> bool:
        return self.files.size("_SUCCESS") is not None

    # --- the plan

    def plan(self) -> Plan:
        """The frozen plan.

        Raises:
            CallerError: if this is no run folder, or one that a newer nfscale wrote.
        """
        try:
            content = json.loads(self.files.read("job.json"))
        except FileNotFoundError as error:
            raise CallerError(f"{self} is not a run folder: it has no job.json") from error
        except (OSError, ValueError) as error:
            raise CallerError(f"{self.files.place('job.json')} cannot be read: {error}") from error
        if content.get("format") != Plan.format:
            raise CallerError(
                f"{self} has format {content.get('format')}, this nfscale reads format {Plan.format}; "
                "read it with the version that its job.json names"
            )
        return Plan.from_json(content)

    @property
    def has_plan(self) -> bool:
        return self.files.size("job.json") is not None

    def freeze(self, plan: Plan, steps: Mapping[str, int] | None = None) -> Plan:
        """Write the plan if there is none; the plan that counts from now on.

        Args:
            steps: the job's step plan, if it has one.

        Raises:
            CallerError: if the folder belongs to another job, or its place cannot tell the first of two writers.
        """
        self.files.put_if_absent("job.json", schema.json_bytes(plan.to_json()))
        self.files.refuse_shared_names("job.json")
        frozen = self.plan()
        self.refuse_other(frozen, plan.fingerprint, plan.job)
        self.keep_steps(steps)
        return frozen

    def keep_steps(self, steps: Mapping[str, int] | None) -> None:
        """Keep a copy of the job's step plan, if it has one; a copy that is there is of the same: the job's is."""
        if steps is not None and self.files.size(_STEPS) is None:
            self.files.put_if_absent(_STEPS, step_plan.to_bytes(steps))

    def steps(self) -> dict[str, int]:
        """The job's step plan: steps by datum's id."""
        return step_plan.parsed(self.files.read(_STEPS))

    def refuse_other(self, frozen: Plan, fingerprint: str, job: dict[str, Any]) -> None:
        """Refuse a job that is not the folder's own.

        Raises:
            CallerError: with the keys in which the two jobs differ.
        """
        if frozen.fingerprint == fingerprint:
            return
        differing = [
            f"{k} ({was!r} in the folder, {now!r} now)" for k, (was, now) in differing_keys(frozen.job, job).items()
        ]
        what = f"they differ in {', '.join(differing)}" if differing else "its dataset has other ids now"
        if not differing and job["fit"].get("step_plan"):
            what += ", or its step plan other steps"
        raise CallerError(
            f"{self} belongs to another job: {what}; choose another output, or repeat the job it was made with"
        )

    # --- shards

    def data_file(self, shard: Shard, attempt: str) -> str:
        """Where an attempt writes its rows."""
        return f"data/{shard.name}.{attempt}.parquet"

    @staticmethod
    def checkpoint_file(shard: Shard) -> str:
        """Where attempts at a shard keep what they have so far."""
        return _checkpoint_file(shard.name)

    def commit(self, commit: Commit) -> bool:
        """Make an attempt's file the one that counts; False if another attempt was first."""
        return self.files.put_if_absent(_commit_file(commit.shard), schema.json_bytes(asdict(commit)))

    def cut(self, shard: Shard) -> bool:
        """Cut a shard for good, so that only its parts can be committed; False if the whole has been committed.

        It takes the place of the shard's commit: a late attempt at the whole finds it there and is not the first.
        """
        name = _commit_file(shard.name)
        content = {"shard": shard.name, "cut": [half.name for half in shard.halves()]}
        return self.files.put_if_absent(name, schema.json_bytes(content)) or self.is_cut(shard)

    def is_cut(self, shard: Shard) -> bool:
        """Whether this shard was cut."""
        return "cut" in self._json(_commit_file(shard.name))

    def commits(self) -> list[Commit]:
        """All commits, in the order of their leases."""
        return self.commits_and_cuts()[0]

    def commits_and_cuts(self) -> tuple[list[Commit], set[str]]:
        """All commits, in the order of their leases, and the names of the shards that were cut."""
        names = [name for name in self.files.names("commits") if name.endswith(".json")]
        found = list(map(self._parsed, names, self.files.read_many(names)))
        commits = sorted((one for one in found if isinstance(one, Commit)), key=lambda commit: commit.order)
        return commits, {one for one in found if isinstance(one, str)}

    def commit_of(self, shard: Shard) -> Commit | None:
        """The commit of a shard, if it has one."""
        try:
            found = self._parsed(name := _commit_file(shard.name), self.files.read(name))
        except FileNotFoundError:
            return None
        return found if isinstance(found, Commit) else None

    def _parsed(self, name: str, content: bytes) -> Commit | str:
        """A commit, or the name of a shard that was cut."""
        try:
            values = json.loads(content)
            return values["shard"] if "cut" in values else Commit(**values)
        except (ValueError, TypeError) as error:
            raise MismatchError(
                f"{self.files.place(name)} is not a commit ({error}); remove it, and the same encode fits its "
                "shard again"
            ) from error

    def recommit(self, commit: Commit) -> bool:
        """Put a commit in the place of the shard's former one: readers see the one or the other. Always True."""
        self.files.replace(_commit_file(commit.shard), schema.json_bytes(asdict(commit)))
        return True

    def refuse_missing_files(self) -> None:
        """Check that the files are there that the commits name.

        Raises:
            MismatchError: naming some that are not, and the way out.
        """
        there = set(self.files.names("data"))
        gone = [commit for commit in self.commits() if commit.file not in there]
        if gone:
            some = ", ".join(_commit_file(commit.shard) for commit in gone[:3])
            raise MismatchError(
                f"{len(gone)} files that are committed are missing, such as {self.files.place(gone[0].file)}; bring "
                f"them back, or remove their commits ({some}{', ...' if len(gone) > 3 else ''}) and the same encode "
                "fits their data again"
            )

    def remove_attempts(self, attempts: Collection[str]) -> None:
        """Remove what attempts left that were ended from outside."""
        for name in self.uncommitted() if attempts else ():
            if any(f".{attempt}." in name for attempt in attempts):
                self.files.remove(name)

    def uncommitted(self) -> list[str]:
        """Files of attempts that no commit names: in flight, lost to another attempt, or left by a kill.

        Checkpoints are among them where their shard is committed.
        """
        commits = self.commits()
        named = {commit.file for commit in commits}
        done = {_checkpoint_file(commit.shard) for commit in commits}
        kept = [name for name in self.files.names(_CHECKPOINTS) if name in done or self.is_complete]
        return sorted({*self.files.names("data"), *self.files.unfinished(), *kept} - named)

    # --- the driver

    @property
    def epoch(self) -> int:
        """Of the last driver that took the run over; 0 if none has."""
        return max((int(name[-11:-5]) for name in self.files.names(_CONTROL)), default=0)

    def take_over(self) -> int:
        """Begin an epoch: from now on drivers of earlier ones commit nothing. The number of this one."""
        content = {"host": socket.gethostname(), "pid": os.getpid(), "at": time.time(), "id": uuid.uuid4().hex}
        epoch = len(self.files.names(_CONTROL))
        while not self.files.put_if_absent(_epoch_file(epoch := epoch + 1), schema.json_bytes(content)):
            pass
        return epoch

    def refuse_superseded(self, epoch: int) -> None:
        """Check that no driver has taken over since this epoch began.

        One may do so the moment after: then its own attempt at a shard that is committed now is not the first.

        Raises:
            SupersededError: if one has.
        """
        if self.files.size(_epoch_file(epoch + 1)) is None:
            return
        newest = self._json(self.files.names(_CONTROL)[-1])
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(newest["at"]))
        raise SupersededError(
            f"another driver took over {self} (process {newest['pid']} on {newest['host']}, since {since} UTC); this "
            "one ends, what it had committed stays, and the other one continues"
        )

    def beat(self, state: dict[str, Any], share: str | None = None) -> None:
        """Say that a driver is alive, and what is in flight; of several drivers, each for its share."""
        self.files.replace(_driver_file(share), schema.json_bytes(state))

    def driver(self) -> dict[str, Any] | None:
        """What a driver said last, or None if all left in good order."""
        said = []
        for name in ["driver.json", *self.files.names(_DRIVERS)]:
            with contextlib.suppress(ValueError):
                said.append(self._json(name))
        return max(filter(None, said), key=lambda state: state["at"], default=None)

    def driver_left(self, share: str | None = None) -> None:
        """Say that the driver is gone in good order."""
        self.files.remove(_driver_file(share))

    def finish(self, rows: int) -> bool:
        """Mark the run as complete; False if another driver did before."""
        return self.files.put_if_absent("_SUCCESS", schema.json_bytes({"rows": rows}))

    def unfinish(self) -> None:
        """Take the mark away again."""
        self.files.remove("_SUCCESS")

    # --- calibration

    def write_calibration(self, steps: Sequence[int], step_rms: np.ndarray, diagonal: np.ndarray) -> bool:
        """Store what the fields share, if nothing is stored yet: [U], [U], [U, P]."""
        element = pa.list_(pa.field("element", pa.float32(), nullable=False), diagonal.shape[1])
        columns = {
            "step": pa.array(steps, pa.int32()),
            "step_rms": pa.array(step_rms.astype(np.float32)),
            "diagonal": pa.FixedSizeListArray.from_arrays(pa.array(diagonal.astype(np.float32).ravel()), type=element),
        }
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns), buffer, compression="zstd", use_dictionary=False)
        return self.files.put_if_absent("calibration.parquet", buffer.getvalue())

    @property
    def has_calibration(self) -> bool:
        return self.files.size("calibration.parquet") is not None

    def calibration(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Steps [U], typical step lengths [U] and diagonals [U, P]."""
        table = pq.read_table(io.BytesIO(self.files.read("calibration.parquet")))
        diagonal = table["diagonal"].combine_chunks().flatten().to_numpy()
        return table["step"].to_numpy(), table["step_rms"].to_numpy(), diagonal.reshape(table.num_rows, -1)


def _epoch_file(epoch: int) -> str:
    return f"{_CONTROL}/epoch-{epoch:06d}.json"


def _driver_file(share: str | None) -> str:
    return "driver.json" if share is None else f"{_DRIVERS}/{share.replace('/', '-of-')}.json"


def _checkpoint_file(shard: str) -> str:
    return f"{_CHECKPOINTS}/{shard}.npz"


def _commit_file(shard: str) -> str:
    return f"commits/{shard}.json"


def differing_keys(one: dict[str, Any], other: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys of two jobs whose values differ, with both values; without those that change no result."""
    free = {"output", "workers", "max_workers", "workers_per_gpu", "track", "checkpoint_minutes", "name"}
    free |= {"max_failed_fraction", "fit.batch", "fit.step", "store.shard_fields", "store.ipc_copy"}
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted(one.keys() | other.keys()):
        name = prefix + key
        if name in free or one.get(key) == other.get(key):
            continue
        if isinstance(one.get(key), dict) and isinstance(other.get(key), dict):
            found |= differing_keys(one[key], other[key], name + ".")
        else:
            found[name] = one.get(key), other.get(key)
    return found
