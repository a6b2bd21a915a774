"""Jobs sent to a cluster that runs already, and sent again as a resume.

What is sent is the job file and the command `nfscale encode`. Everything durable is in the run folder, so sending the
same job again, to this cluster or to a new one, continues where the commits end. Attempts have ids NAME-a0, NAME-a1.

Dangers, each guarded here:
- A lost connection is not a lost job: the cluster is asked again before anything is sent a second time.
- A relative path means another place on the cluster, in a folder that it removes after the job.
- What a runtime environment holds is shown to everyone who sees the jobs: no variable is sent unless it is named.
"""

import base64
import contextlib
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import nfscale
from nfscale.distributed.job_api import SubmittedJob, UnreachableError, is_loopback
from nfscale.errors import CallerError, ExitCode
from nfscale.files import is_uri
from nfscale.job import EncodeJob, load_job

_STOP_SECONDS = 60  # that a driver gets for leaving in good order; Ray's own patience is 3 s
_BACKOFF_SECONDS = (5.0, 60.0)
_PATIENCE_SECONDS = 900.0  # that a cluster may take to come back between two attempts
_FINAL = {ExitCode.DONE, ExitCode.CALLER, ExitCode.TOO_MANY_FAILED, ExitCode.SUPERSEDED, ExitCode.MISMATCH}
"""Codes of an encode that another attempt would end with again."""


@dataclass(frozen=True)
class Submission:
    """A job, ready to be sent."""

    name: str
    output: str
    entrypoint: str
    runtime_env: dict[str, Any] = field(default_factory=dict)

    @property
    def metadata(self) -> dict[str, str]:
        """What Ray keeps with the job."""
        return {"nfscale.name": self.name, "nfscale.output": self.output}

    @property
    def stem(self) -> str:
        """The name as ids may have it."""
        return re.sub(r"[^A-Za-z0-9_.-]+", "-", self.name).strip("-.") or "encode"


class Cluster(Protocol):
    """What attempts need of a cluster."""

    def jobs(self) -> list[SubmittedJob]: ...

    def job(self, job_id: str) -> SubmittedJob: ...

    def submit(self, job_id: str, entrypoint: str, runtime_env: dict[str, Any], metadata: dict[str, str]) -> None: ...

    def follow(self, job_id: str, skip: int = 0) -> Iterator[str]: ...


# --- what is sent


@contextlib.contextmanager
def prepared(
    job_file: Path,
    overrides: Sequence[str],
    address: str,
    *,
    output_root: str | None = None,
    working_dir: Path | None = None,
    image: str | None = None,
    pip: Path | None = None,
    code: bool = False,
    environment: Sequence[str] = (),
) -> Iterator[Submission]:
    """A job as it is sent to `address`, checked here first. Its files are there while the block runs.

    A relative `output` is below `output_root`; without one, below the current folder where the cluster is on this
    machine, and refused elsewhere. Relative paths of the dataset are those in `working_dir`, and refused without it.

    Args:
        working_dir: a folder that goes with the job, which is in it; else the job file goes alone.
        image: a container image for driver and workers; Ray takes nothing else beside it.
        pip: a requirements file that the nodes install.
        code: send this nfscale, instead of using the one that is installed there.
        environment: NAME=VALUE, or NAME for its value here.

    Raises:
        CallerError: if the job, or an option, cannot be.
    """
    job = load_job(job_file, list(overrides))
    if image and (working_dir or pip or code):
        raise CallerError("--image holds everything: Ray takes no --working-dir, --pip or --code beside it")
    _refuse_relative_data(job, working_dir)
    output, root = _output(job, address, output_root)
    variables = _variables(environment) | {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_SECONDS)}
    command = shlex.join(["python", "-m", "nfscale", "encode"])
    options = shlex.join([*overrides, f"output={output}"])
    guard = _guard(root) if root else ""
    if image:
        content = base64.b64encode(job_file.read_bytes()).decode()
        place = f'"$folder"/{shlex.quote(job_file.name)}'
        unpack = f"folder=$(mktemp -d) && printf %s {content} | base64 -d > {place} && "
        entrypoint = f"{guard}{unpack}exec {command} {place} {options}"
        yield Submission(job.name, output, entrypoint, {"image_uri": image, "env_vars": variables})
        return
    runtime_env: dict[str, Any] = {"env_vars": variables}
    if pip:
        if not pip.is_file():
            raise CallerError(f"--pip {pip} is no file; give a requirements file")
        runtime_env["pip"] = str(pip)
    if code:
        runtime_env["py_modules"] = [str(Path(nfscale.__file__).parent)]
    with tempfile.TemporaryDirectory(prefix="nfscale-submit-") as alone:
        if working_dir is None:
            shutil.copy(job_file, alone)
            name = job_file.name
        else:
            name = _within(job_file, working_dir)
        runtime_env["working_dir"] = str(working_dir or alone)
        entrypoint = f"{guard}exec {command} {shlex.quote(name)} {options}"
        yield Submission(job.name, output, entrypoint, runtime_env)


def _within(job_file: Path, working_dir: Path) -> str:
    if not working_dir.is_dir():
        raise CallerError(f"--working-dir {working_dir} is no folder")
    try:
        return job_file.resolve().relative_to(working_dir.resolve()).as_posix()
    except ValueError:
        raise CallerError(f"the job file {job_file} is not in --working-dir {working_dir}; move it there") from None


def _output(job: EncodeJob, address: str, output_root: str | None) -> tuple[str, Path | None]:
    """Where the run goes, and the folder of this machine that a relative output was taken below, if it was."""
    if is_uri(job.output) or Path(job.output).is_absolute():
        return job.output, None
    if output_root is not None:
        if is_uri(output_root):
            return f"{output_root.rstrip('/')}/{job.output}", None
        if Path(output_root).is_absolute():
            return str(Path(output_root) / job.output), None
        raise CallerError(f"--output-root {output_root!r} is relative; give an absolute path or a URI")
    if is_loopback(address):
        return str(Path.cwd() / job.output), Path.cwd()
    raise CallerError(
        f"output {job.output!r} is relative, and would be in a folder that the cluster removes after the job; give "
        "output=s3://bucket/..., an absolute path that all nodes share, or --output-root"
    )


def _guard(root: Path) -> str:
    """Ends the job where the current folder is not: loopback was a tunnel to another machine."""
    said = f"error: {root} is not on the machine of the cluster; give an absolute output, or --output-root"
    return f"test -d {shlex.quote(str(root))} || {{ echo {shlex.quote(said)}; exit {int(ExitCode.CALLER)}; }}; "


def _refuse_relative_data(job: EncodeJob, working_dir: Path | None) -> None:
    section = job.dataset.model_dump()
    named = {"dataset.path": section.get("path"), "fit.step_plan": job.fit.step_plan}
    if section["kind"] == "folder" and section.get("label_from") != "parent":
        named["dataset.label_from"] = section.get("label_from")
    for key, value in named.items():
        if isinstance(value, str) and not is_uri(value) and not Path(value).is_absolute() and working_dir is None:
            raise CallerError(
                f"{key} {value!r} is relative, and only the job file is sent; give an absolute path that all "
                "nodes share, a URI, or --working-dir with the folder it is in"
            )


def _variables(named: Sequence[str]) -> dict[str, str]:
    found = {}
    for text in named:
        name, equals, value = text.partition("=")
        if not equals and name not in os.environ:
            raise CallerError(f"--env {name}: there is no such variable here; write --env {name}=VALUE")
        found[name] = value if equals else os.environ[name]
    return found


# --- attempts


def free_id(stem: str, jobs: Sequence[SubmittedJob]) -> str:
    """STEM-a0, or the number above all that the cluster has of STEM."""
    taken = [int(found[1]) for job in jobs if (found := re.fullmatch(re.escape(stem) + r"-a(\d+)", job.id))]
    return f"{stem}-a{max(taken, default=-1) + 1}"


def send(cluster: Cluster, submission: Submission) -> str:
    """Send a job under the next free id, which is returned.

    Raises:
        CallerError: if a job that writes to the same output has not ended.
    """
    jobs = cluster.jobs()
    for job in jobs:
        if job.output == submission.output and not job.has_ended:
            raise CallerError(
                f"{job.id} writes to {job.output} and is {job.status.lower()}; follow it with `nfscale logs {job.id}`, "
                f"or end it with `nfscale stop {job.id}`"
            )
    job_id = free_id(submission.stem, jobs)
    cluster.submit(job_id, submission.entrypoint, submission.runtime_env, submission.metadata)
    return job_id


def exit_code_of(job: SubmittedJob) -> ExitCode:
    """What `nfscale submit` ends with: the exit code of the encode."""
    if job.status == "SUCCEEDED":
        return ExitCode.DONE
    if job.status == "STOPPED":
        return ExitCode.TERMINATED
    try:
        return ExitCode(job.exit_code or ExitCode.FAILED)
    except ValueError:  # a signal, or a shell that did not find its command
        return ExitCode.FAILED


def run_attempts(
    connect: Callable[[], Cluster],
    submission: Submission,
    retries: int,
    write: Callable[[str], None],
    say: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[list[str], SubmittedJob]:
    """Send a job, follow it, and send it again while it may be: the ids of its attempts, and how the last one ended.

    An attempt that failed on the way is repeated: not after the caller's mistakes, too many failed data, another
    driver, or `nfscale stop`.

    Args:
        connect: the cluster; called anew after each failure.
        write: takes what the job prints.
        say: takes what there is to say about it.

    Raises:
        UnreachableError: if the cluster is lost and no retries are left, or it does not come back.
    """
    cluster = connect()
    ids: list[str] = []
    following: str | None = None
    shown = failures = 0
    while True:
        job: SubmittedJob | None = None
        what = ""
        try:
            if following is None:
                following, shown = send(cluster, submission), 0
                ids.append(following)
                say(f"submitted {following}" + (", which resumes" if len(ids) > 1 else f", into {submission.output}"))
            for piece in cluster.follow(following, skip=shown):
                shown += len(piece)
                write(piece)
            job = cluster.job(following)
            if exit_code_of(job) in _FINAL or job.status == "STOPPED" or failures >= retries:
                return ids, job
            what = f"{job.id} ended with {_ending(job)}"
        except UnreachableError as error:
            if failures >= retries:
                raise UnreachableError(f"{error}; what is committed stays, and the same submit continues") from error
            what = str(error)
        failures += 1
        seconds = min(_BACKOFF_SECONDS[1], _BACKOFF_SECONDS[0] * 2 ** (failures - 1))
        say(f"{what}; again in {seconds:.0f} s, {retries - failures} of {retries} retries left after that")
        sleep(seconds)
        cluster = _again(connect, sleep)
        if job is not None or not _has(cluster, following, submission):
            following = None


def _again(connect: Callable[[], Cluster], sleep: Callable[[float], None]) -> Cluster:
    """The cluster, once it answers again."""
    waited = 0.0
    while True:
        try:
            return connect()
        except UnreachableError:
            if waited >= _PATIENCE_SECONDS:
                raise
            waited += _BACKOFF_SECONDS[0]
            sleep(_BACKOFF_SECONDS[0])


def _has(cluster: Cluster, job_id: str | None, submission: Submission) -> bool:
    """Whether the cluster still knows the job; a new head begins its ids anew."""
    return any(job.id == job_id and job.output == submission.output for job in cluster.jobs())


def _ending(job: SubmittedJob) -> str:
    if job.exit_code is None:
        return f"its driver or node lost ({job.message or job.status})"
    return f"signal {-job.exit_code}" if job.exit_code < 0 else f"exit code {job.exit_code}"
