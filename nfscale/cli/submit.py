"""`nfscale submit`, `jobs`, `logs`, `stop`: encodes on a cluster that runs already."""

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from nfscale.cli.common import JsonOption, write_json
from nfscale.distributed.job_api import RayCluster, dashboard_address
from nfscale.distributed.submission import exit_code_of, prepared, run_attempts, send
from nfscale.errors import CallerError, ExitCode

AddressOption = Annotated[
    str | None,
    typer.Option(
        help="Of Ray's dashboard; RAY_API_SERVER_ADDRESS if left out.", metavar="http://HEAD:8265", show_default=False
    ),
]
IdArgument = Annotated[str, typer.Argument(help="As submit and jobs print it.", metavar="ID", show_default=False)]


def submit(
    job_file: Annotated[Path, typer.Argument(help="A job file (YAML).", metavar="JOB.yaml", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Keys of the job, as section.key=value.", metavar="[KEY=VALUE]...")
    ] = None,
    address: AddressOption = None,
    retries: Annotated[int, typer.Option(help="How often an attempt that failed on the way is repeated.", min=0)] = 0,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the job to its end.")] = True,
    output_root: Annotated[
        str | None, typer.Option(help="Path or URI that a relative output is below.", show_default=False)
    ] = None,
    working_dir: Annotated[
        Path | None, typer.Option(help="A folder that goes with the job, which is in it.", show_default=False)
    ] = None,
    image: Annotated[
        str | None, typer.Option(help="A container image for driver and workers.", show_default=False)
    ] = None,
    pip: Annotated[
        Path | None, typer.Option(help="A requirements file that the nodes install.", show_default=False)
    ] = None,
    code: Annotated[bool, typer.Option("--code", help="Send this nfscale, not the one installed there.")] = False,
    environment: Annotated[
        list[str] | None,
        typer.Option("--env", help="A variable of the job; all who see the jobs see it.", metavar="NAME[=VALUE]"),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Run an encode on a Ray cluster; submit it again to resume. Ends with the exit code of the encode.

    Example: `nfscale submit pipelines/digits.yaml output=s3://bucket/digits --address http://HEAD:8265 --retries 3`
    """
    address = dashboard_address(address)
    if retries and not wait:
        raise CallerError("--retries is the work of whoever waits; leave out --no-wait, or submit again by hand")
    with prepared(
        job_file,
        overrides or [],
        address,
        output_root=output_root,
        working_dir=working_dir,
        image=image,
        pip=pip,
        code=code,
        environment=environment or (),
    ) as submission:
        figures = {"address": address, "name": submission.name, "output": submission.output}
        if not wait:
            job_id = send(RayCluster(address), submission)
            write_json(json_file, figures | {"attempts": [job_id], "id": job_id})
            print(f"submitted {job_id}, into {submission.output}; nfscale logs {job_id} --address {address}")
            return
        try:
            attempts, job = run_attempts(lambda: RayCluster(address), submission, retries, _write, _say)
        except KeyboardInterrupt:
            _say(f"no longer following; the job goes on: nfscale jobs, logs, stop --address {address}")
            raise typer.Exit(int(ExitCode.INTERRUPTED)) from None
    code_of_job = exit_code_of(job)
    write_json(json_file, figures | asdict(job) | {"attempts": attempts, "exit_code": int(code_of_job)})
    if code_of_job is not ExitCode.DONE:
        _say(f"error: {job.id}: {job.status}, {job.message or 'no message'}")
        raise typer.Exit(int(code_of_job))
    _say(f"{job.id} is done")


def jobs(address: AddressOption = None, json_file: JsonOption = None) -> None:
    """List the jobs that were submitted to a cluster, the latest first.

    Example: `nfscale jobs --address http://HEAD:8265`
    """
    known = RayCluster(dashboard_address(address)).jobs()
    write_json(json_file, {"jobs": [asdict(job) for job in known]})
    if not known:
        print("no jobs")
        return
    table = Table("id", "status", "exit code", "started", "seconds", "output", box=None, pad_edge=False)
    for job in known:
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.started_at)) if job.started_at else ""
        seconds = f"{(job.ended_at or time.time()) - job.started_at:.0f}" if job.started_at else ""
        code = "" if job.exit_code is None else str(job.exit_code)
        table.add_row(job.id, job.status, code, started, seconds, job.output or "")
    Console(soft_wrap=True, highlight=False, markup=False).print(table)


def logs(
    job_id: IdArgument,
    address: AddressOption = None,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Until the job has ended.")] = True,
) -> None:
    """Print what a job printed.

    Example: `nfscale logs digits-a0 --address http://HEAD:8265`
    """
    cluster = RayCluster(dashboard_address(address))
    cluster.job(job_id)
    for piece in cluster.follow(job_id) if follow else [cluster.logs(job_id)]:
        _write(piece)


def stop(job_id: IdArgument, address: AddressOption = None) -> None:
    """End a job in good order: what is committed stays, and submitting it again continues.

    Example: `nfscale stop digits-a0 --address http://HEAD:8265`
    """
    stopped = RayCluster(dashboard_address(address)).stop(job_id)
    print(f"{job_id} is told to stop" if stopped else f"{job_id} had ended before")


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
