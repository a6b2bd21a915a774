"""One MLflow run per job, written by the driver alone, from commits alone.

Every point is a function of a commit: its step is the datum's index or the lease's rank, its timestamp
the time of the commit. Writing a point twice therefore changes nothing, and a run that MLflow missed,
because its server was down or the driver was killed, is made whole by the next start or `nfscale review`.

All calls happen in one background thread: opening a fresh SQLite store takes seconds (migrations), and
a tracking server that is slow or down must not keep workers waiting. Errors are told once and then kept.
"""

import contextlib
import json
import logging
import os
import queue
import re
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nfscale.encode import Progress
from nfscale.files import is_uri
from nfscale.files.user import data_folder
from nfscale.store.history import quality_quantiles, sampled_histories
from nfscale.store.run_folder import WORST_TABLE, Commit, Plan, RunFolder
from nfscale.store.schema import OK_STATUSES, STATUS
from nfscale.store.table import WeightsTable
from nfscale.track.note import note_of
from nfscale.track.registered import register_decoder

if TYPE_CHECKING:
    from mlflow import MlflowClient  # seconds to import

_BATCH = 1000  # metrics that MLflow takes in one call
_NO_NAME = re.compile(r"[^\w.-]+")  # what a name of a metric had better not hold
_MODEL_TAG = "nfscale.model"
_STATE_TAG = "nfscale.state"
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # its pages show charts, not traces
_DIGEST = 16  # hexadecimal digits that tell datasets apart on a page
_TABLES_TAG = "mlflow.loggedArtifacts"  # tables that MLflow's pages show as such
_MOST_SHARDS = 2000  # with points of their own, in a run without points per datum: more make MLflow's pages slow
_SAMPLE_SECONDS = 10.0  # between two looks at the nodes, at first
_SAMPLES_AT_ONE_PACE = 360  # then it is half as often, so that a night leaves thousands of points and not millions
_NODES_AT_ONE_PACE = 4
_STATES = {"FINISHED": "complete", "FAILED": "failed", "KILLED": "killed", "RUNNING": "running"}
"""Of a run by its status in MLflow, as tags say it."""

TOO_MANY_FAILED = "too_many_failed"
"""The state of a complete run with more failed data than its job allows; its status is FAILED."""

Nodes = Callable[[], dict[str, dict[str, float]]]
"""What each node is doing, by its name, see `nfscale.machine`."""
_PERCENTILES = {"p05": 5, "p50": 50, "p95": 95}


def tracking_uri(folder: RunFolder) -> str:
    """`MLFLOW_TRACKING_URI`, or a SQLite store in the folder above the output: never in the current folder.

    SQLite does not live in an object store; for an output there the store is in the user's data folder.
    """
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{store_folder(folder) / 'mlruns.db'}"


def page_of(folder: RunFolder) -> str | None:
    """The page of the run, where a server shows it; None where there is no server or no run."""
    known = folder.tracking
    if not known.get("tracking_uri", "").startswith("http"):
        return None
    return f"{known['tracking_uri'].rstrip('/')}/#/experiments/{known.get('experiment_id', 0)}/runs/{known['run_id']}"


def store_folder(folder: RunFolder) -> Path:
    """Where the SQLite store is."""
    if is_uri(folder.files.root):
        return data_folder().resolve()
    return Path(folder.files.absolute()).resolve().parent


def experiment_id(client: "MlflowClient", name: str, store_folder: Path) -> str:
    """The experiment of this name, created where it is missing; artifacts of a SQLite store lie beside it."""
    from mlflow.exceptions import MlflowException

    if found := client.get_experiment_by_name(name):
        return found.experiment_id
    location = None
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        location = (store_folder / "mlartifacts").as_uri()
    try:
        return client.create_experiment(name, artifact_location=location, tags=_EXPERIMENT_TAGS)
    except MlflowException:  # another process created it in between
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return found.experiment_id


class Tracker:
    """Observes a run and writes it to MLflow from a thread of its own.

    Args:
        nodes: asked now and then what the nodes are doing; None: nobody is asked.
        drives: whether this process is about to work on the run; a review only brings it up to date.
    """

    def __init__(
        self,
        folder: RunFolder,
        plan: Plan,
        warn: Callable[[str], None],
        nodes: Nodes | None = None,
        drives: bool = True,
    ) -> None:
        self._folder, self._plan, self._warn, self._drives = folder, plan, warn, drives
        self._calls: queue.Queue[tuple[str, Callable[[], None]] | None] = queue.Queue()
        self._projection: _Projection | None = None
        self._pace = None if nodes is None else _Pace(nodes)
        self._ending: Callable[[], None] | None = None
        self.problem: str | None = None
        """Why MLflow does not have the run, if it has not."""
        self.seconds = {f"{phase}{kind}": 0.0 for phase in ("opening", "logging", "closing") for kind in ("", "_cpu")}
        """Wall seconds of the thread, while others work, and what it computed in them (`_cpu`): until it has what was
        committed before, then until the last commit, then report, model and totals."""
        self._thread = threading.Thread(target=self._work, name="nfscale-mlflow", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        return self._projection.run_id if self._projection else None

    def on_start(self, folder: RunFolder, plan: Plan, commits: list[Commit]) -> None:
        self._calls.put(("opening", lambda: self._open(commits)))

    def on_progress(self, progress: Progress) -> None: ...

    def on_waiting(self, what: str | None) -> None: ...

    def on_tick(self) -> None:
        if self._pace is not None and self._pace.is_due():
            self._calls.put(("logging", self._look))

    def on_commit(self, commit: Commit) -> None:
        self._calls.put(("logging", lambda: self._need().log_commit(commit)))

    def log_review(self) -> None:
        """Store the report and the convergence table as artifacts of the run."""
        self._calls.put(("closing", lambda: self._need().log_review()))

    def close(self, status: str | None, timeout_seconds: float | None = None, state: str | None = None) -> None:
        """Write what is left and set how the run stands.

        Args:
            status: FINISHED, FAILED or KILLED; RUNNING where another process works on it; None: as it was found,
                but for one that claims to be running, which was killed.
            state: the tag `nfscale.state`, if it is another than the status says: `TOO_MANY_FAILED`.
        """
        self._ending = lambda: self._need().terminate(status, state, whole=self.problem is None)
        self._calls.put(None)
        self._thread.join(timeout_seconds)

    def _open(self, commits: list[Commit]) -> None:
        self._projection = _Projection(self._folder, self._plan, self._drives)
        for commit in commits:
            self._projection.log_commit(commit)

    def _look(self) -> None:
        assert self._pace is not None
        self._need().log_nodes(self._pace.measured())

    def _need(self) -> "_Projection":
        assert self._projection is not None, "on_start comes first"
        return self._projection

    def _work(self) -> None:
        while (item := self._calls.get()) is not None:
            if self.problem is None:
                self._try(*item)
        if self._projection is not None and self._ending is not None:  # whatever went wrong, the run has ended
            self._try("closing", self._ending)

    def _try(self, phase: str, call: Callable[[], None]) -> None:
        started, computed = time.monotonic(), time.thread_time()
        try:
            call()
        except Exception as error:  # whatever a tracking server answers, the encode goes on
            if self.problem is None:
                self.problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                self._warn(
                    f"MLflow at {tracking_uri(self._folder)} does not have this run ({self.problem}); the encode "
                    f"goes on, and `nfscale review {self._folder}` writes it later"
                )
        self.seconds[phase] += time.monotonic() - started
        self.seconds[f"{phase}_cpu"] += time.thread_time() - computed


class _Pace:
    """When to look at the nodes: often at first and less often later, and the less the more of them there are."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes, self._looked, self._due = nodes, 0, 0.0
        self._seconds = _SAMPLE_SECONDS

    def is_due(self) -> bool:
        now = time.monotonic()
        if now < self._due:
            return False
        self._due = now + self._seconds
        return True

    def measured(self) -> dict[str, dict[str, float]]:
        found = self._nodes()
        self._looked += 1
        slower = 2 ** (self._looked // _SAMPLES_AT_ONE_PACE) * max(1, len(found) // _NODES_AT_ONE_PACE)
        self._seconds = _SAMPLE_SECONDS * slower
        return found


class _Projection:
    """The MLflow run of a run folder."""

    def __init__(self, folder: RunFolder, plan: Plan, drives: bool) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # the command says it
        os.environ.setdefault("MLFLOW_ENABLE_ASYNC_LOGGING", "false")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        # A tracking server that does not answer: give up after seconds, not after MLflow's minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        for name in ("alembic", "mlflow.store.db.utils", "mlflow.tracking._model_registry.utils"):
            logging.getLogger(name).setLevel(logging.WARNING)
        from mlflow import MlflowClient

        self.folder, self.plan, self.drives = folder, plan, drives
        self.per_datum = plan.data_count <= plan.job["track"]["per_datum_limit"]
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            migrated_store(store_folder(folder) / "mlruns.db")
        self.client = MlflowClient(tracking_uri(folder))
        self.run_id = self._run()
        self.logged = self._logged_orders()
        self.opened = self.client.get_run(self.run_id).info
        if drives:
            self.client.update_run(self.run_id, status="RUNNING")
            self._describe("running")

    def _describe(self, state: str) -> None:
        """The state of the run, as a tag to search for and in its note."""
        output, run = self.folder.files.absolute(), self.opened
        summary = self.folder.review_figures()
        note = note_of(self.plan, output, state, summary, run.experiment_id, self.run_id, self.per_datum)
        self.client.set_tag(self.run_id, _STATE_TAG, state)
        self.client.set_tag(self.run_id, "mlflow.note.content", note)

    # --- opening

    def _run(self) -> str:
        """The run's id: the one the folder names, or one that a killed driver began, or a new one."""
        known, uri = self.folder.tracking, tracking_uri(self.folder)
        if known.get("tracking_uri") == uri and self._exists(known["run_id"]):
            return known["run_id"]
        run_id = self._begun() or self._created()
        self._log_params(run_id)
        inputs = self.client.get_run(run_id).inputs
        if not (inputs and inputs.dataset_inputs):
            self._log_inputs(run_id)
        self.folder.set_tracking(uri, run_id, self.client.get_run(run_id).info.experiment_id, whole=False)
        return run_id

    def _begun(self) -> str | None:
        """The run that a driver created before it was killed, if there is one."""
        experiment = experiment_id(self.client, self.plan.job["track"]["experiment"], store_folder(self.folder))
        found = self.client.search_runs([experiment], f"tags.`nfscale.run` = '{self.plan.id}'", max_results=1)
        return found[0].info.run_id if found else None

    def _exists(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_run(run_id).info.lifecycle_stage == "active"
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return False
            raise

    def _created(self) -> str:
        job = self.plan.job
        experiment = experiment_id(self.client, job["track"]["experiment"], store_folder(self.folder))
        tags = {
            "nfscale.run": self.plan.id,
            "nfscale.modality": job["signal"]["kind"],
            "nfscale.dataset": job["dataset"]["kind"],
            "nfscale.fingerprint": self.plan.fingerprint,
            "nfscale.output": self.folder.files.absolute(),
            "mlflow.source.name": "nfscale encode",
            "mlflow.source.type": "JOB",
        }
        return self.client.create_run(experiment, run_name=job["name"], tags=tags).info.run_id

    def _log_params(self, run_id: str) -> None:
        from mlflow.entities import Param

        params = [Param(name, value[:6000]) for name, value in _flat(self.plan.job)]
        params.append(Param("data", str(self.plan.data_count)))
        params.append(Param("weights_per_field", str(self.plan.layout.size)))
        for start in range(0, len(params), 100):
            self.client.log_batch(run_id, params=params[start : start + 100])

    def _log_inputs(self, run_id: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        job, plan = self.plan.job, self.plan
        read = Dataset(
            name=job["dataset"]["kind"],
            digest=plan.ids_sha256[:_DIGEST],
            source_type="nfscale",
            source=json.dumps(job["dataset"]),
            profile=json.dumps({"data": plan.data_count}),
            schema=json.dumps({"mlflow_colspec": _data_columns(plan)}),
        )
        produced = Dataset(
            name=f"{job['name']} weights",
            digest=plan.fingerprint[:_DIGEST],
            source_type="nfscale",
            source=json.dumps({"uri": self.folder.files.absolute()}),
            profile=json.dumps({"rows": plan.data_count, "weights_per_field": plan.layout.size}),
            schema=json.dumps({"mlflow_colspec": _columns(self.plan.table_schema())}),
        )
        self.client.log_inputs(
            run_id,
            datasets=[
                DatasetInput(read, [InputTag("mlflow.data.context", "encode")]),
                DatasetInput(produced, [InputTag("mlflow.data.context", "weights")]),
            ],
        )

    # --- points

    def _logged_orders(self) -> set[int]:
        """Ranks of the commits that MLflow has whole; the mark of a commit is written after its other points."""
        return {int(m.step) for m in self.client.get_metric_history(self.run_id, "shard/fields")}

    @property
    def _every(self) -> int:
        """Of so many leases one has points: all of them in runs with points per datum, which have few."""
        shards = -(-self.plan.data_count // self.plan.shard_fields)
        return 1 if self.per_datum else -(-shards // _MOST_SHARDS)

    def log_nodes(self, measured: dict[str, dict[str, float]]) -> None:
        """What the nodes are doing now, where MLflow's page of system metrics looks for it."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        step = max(0, (now - self.opened.start_time) // 1000)
        points = [
            Metric(f"system/{_NO_NAME.sub('-', node)}/{name}", value, now, step)
            for node, values in measured.items()
            for name, value in values.items()
        ]
        for start in range(0, len(points), _BATCH):
            self.client.log_batch(self.run_id, metrics=points[start : start + _BATCH])

    def log_commit(self, commit: Commit) -> None:
        """The points of a committed shard, unless MLflow has them."""
        from mlflow.entities import Metric

        if commit.order in self.logged or commit.order % self._every:
            return
        stamp = int(commit.committed_at * 1000)
        points: list[Any] = []
        if self.per_datum:
            points += [Metric(name, value, stamp, index) for name, index, value in self._per_datum(commit)]
        aggregates = {
            "shard/fields_per_second": commit.rows / commit.seconds if commit.seconds else 0.0,
            "shard/seconds": commit.seconds,
            "shard/steps_mean": commit.steps_mean,
            "shard/failed": float(commit.failed),
            **{f"shard/quality_{name}": value for name, value in commit.quality.items()},
            "shard/fields": float(commit.rows),  # last: the mark that the commit is here whole
        }
        points += [Metric(name, value, stamp, commit.order) for name, value in aggregates.items()]
        for start in range(0, len(points), _BATCH):
            self.client.log_batch(self.run_id, metrics=points[start : start + _BATCH])
        self.logged.add(commit.order)

    def _per_datum(self, commit: Commit) -> Iterator[tuple[str, int, float]]:
        columns = ["index", "quality", "steps", "steps_to_target"]
        table = pq.read_table(self.folder.files.source(commit.file), columns=[*columns, "status"])
        for row in table.filter(STATUS.isin(OK_STATUSES)).to_pylist():  # a failed row may be fitted anew
            for name in columns[1:]:
                if row[name] is not None and np.isfinite(row[name]):
                    yield f"datum/{name}", row["index"], float(row[name])

    def terminate(self, status: str | None, state: str | None = None, whole: bool = True) -> None:
        """The run's status, and once the run is complete its totals: they never change from there on.

        Args:
            whole: whether it has all else; then the folder says so, and nobody writes it again.
        """
        complete = self.folder.is_complete
        if complete and whole:
            self._log_totals()
        if status is None:
            status = "KILLED" if self.opened.status == "RUNNING" else self.opened.status
        self._describe(state or _STATES[status])
        if status == "RUNNING":
            self.client.update_run(self.run_id, status=status)
            return
        self.client.set_terminated(self.run_id, status=status)
        if complete and whole and (status == "FINISHED" or state):
            self.folder.set_tracking(tracking_uri(self.folder), self.run_id, self.opened.experiment_id, whole=True)

    def _log_totals(self) -> None:
        from mlflow.entities import Metric

        commits = self.folder.commits()
        stamp = int(max(commit.committed_at for commit in commits) * 1000)
        counts: Counter[str] = Counter()
        for commit in commits:
            counts.update(commit.counts)
        points = [(f"count/{name}", float(count), 0) for name, count in counts.items()]
        table = WeightsTable(self.folder)
        quality = table.to_arrow(["quality"])["quality"].drop_null().to_numpy()
        if len(quality):
            points += [(f"quality/{name}", float(np.percentile(quality, q)), 0) for name, q in _PERCENTILES.items()]
            points.append(("quality/mean", float(quality.mean()), 0))
        curves = quality_quantiles(sampled_histories(table), list(_PERCENTILES.values()))
        for step, *values in zip(*curves, strict=True):
            points += [
                (f"convergence/quality_{name}", float(value), int(step))
                for name, value in zip(_PERCENTILES, values, strict=True)
            ]
        metrics = [Metric(name, value, stamp, step) for name, value, step in points]
        for start in range(0, len(metrics), _BATCH):
            self.client.log_batch(self.run_id, metrics=metrics[start : start + _BATCH])

    # --- artifacts

    def log_review(self) -> None:
        """What the review made: the report, its pictures, the convergence of every datum, the worst data."""
        for name in self.folder.files.names("review"):
            with self.folder.files.local_copy(name) as path:
                self.client.log_artifact(self.run_id, str(path), "review")
        self.client.set_tag(self.run_id, _TABLES_TAG, json.dumps([{"path": WORST_TABLE, "type": "table"}]))
        if self.folder.is_complete and _MODEL_TAG not in self.client.get_run(self.run_id).data.tags:
            name = f"nfscale-{self.plan.job['name']}"
            register_decoder(self.client, tracking_uri(self.folder), self.run_id, name, WeightsTable(self.folder))
            self.client.set_tag(self.run_id, _MODEL_TAG, name)


def migrated_store(path: Path) -> None:
    """A SQLite store that MLflow has set up, whole or not at all.

    MLflow sets up a fresh store in many steps. A kill in between, or two drivers that both do it, would
    leave one that no later start can use; so it is made under another name, and given its own at the end.
    """
    if path.exists():
        return
    from mlflow import MlflowClient

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        MlflowClient(f"sqlite:///{temporary}").search_experiments(max_results=1)
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _data_columns(plan: Plan) -> list[dict[str, Any]]:
    """What a datum of the dataset consists of, as MLflow's pages show it."""
    content = f"{plan.forward['signal']['kind']} of {plan.forward['signal']['keys'].get('channels', 1)} channels"
    types = {"datum_id": "string", "index": "long", "content": content, "label": plan.label_type, "split": "string"}
    return [{"name": name, "type": kind, "required": name in ("datum_id", "index")} for name, kind in types.items()]


def _columns(schema: pa.Schema) -> list[dict[str, Any]]:
    """The columns of a table as MLflow's pages show them."""
    return [
        {"name": column.name, "type": _type_name(column.type), "required": not column.nullable} for column in schema
    ]


def _type_name(kind: pa.DataType) -> str:
    """MLflow's word for a type, or Arrow's where it has none."""
    words = {"string": "string", "int64": "long", "int32": "integer", "float": "float", "uint64": "long"}
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return words.get(str(kind), str(kind))


def _flat(settings: dict[str, Any], prefix: str = "") -> Sequence[tuple[str, str]]:
    """Dotted names and values as text."""
    items: list[tuple[str, str]] = []
    for key, value in settings.items():
        items += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, str(value))]
    return items
