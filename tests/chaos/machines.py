"""What chaos is made on: a Ray cluster of a head and three nodes, and an MLflow server; all on loopback.

All processes carry a mark in their environment, by which they are found and, at the end, ended: those and no others.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # 127.0.0.1 stays 127.0.0.1
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # else seven more processes, for what nobody asks of it here
    "OMP_NUM_THREADS": "1",
}
_MARK = "NFSCALE_CHAOS"
_LOOK_SECONDS = 0.25  # how exactly the time is known in which Ray notices a death


def marked(mark: str) -> list[int]:
    """Processes with this mark in their environment, but for this one."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdecimal() and int(path.name) != os.getpid():
            try:
                if f"{_MARK}={mark}".encode() in (path / "environ").read_bytes().split(b"\0"):
                    found.append(int(path.name))
            except OSError:
                continue
    return found


def command_of(pid: int) -> str:
    """The command of a process, empty once it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def kill(pid: int) -> bool:
    """SIGKILL; False if it was gone before."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def free_port() -> int:
    """A port of loopback that nobody has, outside the range that Ray takes for its workers."""
    while True:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
        if not 10002 <= port <= 19999:
            return port


def mark_everything(mark: str, root: Path) -> None:
    """Let all that this process starts from now on carry the mark and find the project."""
    os.environ.update(ENVIRONMENT | {_MARK: mark})
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        os.environ.pop(name, None)


@dataclass
class _Dead:
    node: Any
    died: float
    back_after: float
    noticed: float | None = None


class Nodes:
    """A head without cores, and nodes of one core that come back some time after their raylet was killed."""

    def __init__(self, count: int) -> None:
        from ray.cluster_utils import Cluster

        small = {"object_store_memory": 80 << 20, "include_dashboard": False}
        self._small = {"num_cpus": 1, "object_store_memory": 80 << 20}
        self._cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 0} | small)
        self.alive: list[Any] = [self._cluster.add_node(**self._small) for _ in range(count)]
        self._dead: list[_Dead] = []
        self._looked = 0.0
        self.noticed: list[float] = []
        """Seconds from each death of a raylet until Ray called its node dead."""

    @property
    def address(self) -> str:
        return self._cluster.address

    def kill_raylet(self, node: Any, back_after: float) -> bool:
        """Kill a node's raylet; so long after Ray has noticed, `tend` puts another node in its place."""
        if not kill(node.all_processes["raylet"][0].process.pid):
            return False
        self.alive.remove(node)
        self._dead.append(_Dead(node, time.monotonic(), back_after))
        return True

    def tend(self) -> None:
        """See which deaths Ray has noticed, and replace nodes whose time has come; in the main thread, for Ray."""
        now = time.monotonic()
        if not self._dead or now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        alive = {row["NodeID"] for row in self._cluster.global_state.node_table() if row["Alive"]}
        for dead in list(self._dead):
            if dead.noticed is None and dead.node.node_id not in alive:
                dead.noticed = time.monotonic()
                self.noticed.append(dead.noticed - dead.died)
            if dead.noticed is not None and now - dead.noticed >= dead.back_after:
                self._dead.remove(dead)
                self._cluster.remove_node(dead.node, allow_graceful=False)
                self.alive.append(self._cluster.add_node(wait=False, **self._small))

    def settle(self, seconds: float = 180.0) -> None:
        """Wait until all that were killed are replaced."""
        deadline = time.monotonic() + seconds
        while self._dead and time.monotonic() < deadline:
            self.tend()
            time.sleep(_LOOK_SECONDS)

    def close(self) -> None:
        self._cluster.shutdown()


class TrackingServer:
    """MLflow's own server with a database, to be killed and started again."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder, self._port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen | None = None
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--backend-store-uri", f"sqlite:///{self._folder / 'mlflow.db'}", "--workers", "1"]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        with open(self._folder / "server.log", "a") as log:
            self._process = subprocess.Popen(
                command, env=os.environ | ENVIRONMENT, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as response:
                return response.status == 200
        except OSError:
            return False

    def wait(self, seconds: float = 180.0) -> None:
        """Until it answers."""
        deadline = time.monotonic() + seconds
        while not self.answers:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the tracking server does not answer; see {self._folder / 'server.log'}")
            time.sleep(0.5)

    def kill(self) -> bool:
        """The whole session of the server, which has several processes."""
        if self._process is None or self._process.poll() is not None:
            return False
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None
        return True
