"""`nfscale tune`: settings that reach a quality at the least cost, as a job file with a reason for each choice."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from nfscale.cli.common import JsonOption, warn, write_json
from nfscale.cli.workers import device_of, leave_at_once, pool_of
from nfscale.datasets import seeded_sample
from nfscale.errors import CallerError
from nfscale.job import EncodeJob, job_from_settings, load_job
from nfscale.plan.front import front_picture
from nfscale.plan.trials import BETAS, RATE_FACTOR, Trials, overrides_of
from nfscale.plan.tune import CANDIDATES, Reason, Tuned
from nfscale.plan.tune import tune as tune_job
from nfscale.pool import Pool
from nfscale.store.schema import quality_text
from nfscale.termination import Termination
from nfscale.track import log_folder

_DATA = 64  # that settings are tried on, at most


def tune(
    job_file: Annotated[Path, typer.Argument(help="A job file (YAML).", metavar="JOB.yaml", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Keys of the job, as section.key=value.", metavar="[KEY=VALUE]...")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write tuned.yaml, front.png and figures.")] = Path(
        "runs/tuned"
    ),
    seconds: Annotated[float, typer.Option(min=1, help="Wall time of the search, about.")] = 300.0,
    quality: Annotated[
        float | None, typer.Option(help="The median to reach, in place of the job's own (or its target, if lower).")
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="A key that stays as it is, such as field.width; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Which data and which settings are drawn.")] = 0,
    json_file: JsonOption = None,
) -> None:
    """Find cheaper settings for a job by trying many on a few of its data; writes a job file that says why.

    They are tried where `nfscale encode` would fit them: on Ray in this machine or the cluster of RAY_ADDRESS, by
    as many workers as the job says (workers=0: in this process). Costs compare where these are of one kind.

    Example: `nfscale tune pipelines/photos.yaml --seconds 600 --keep field.width -o runs/tuned`
    """
    job = load_job(job_file, overrides)
    console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
    if job.tile is not None:
        raise CallerError("tune draws whole data, and this job cuts them (signal.tile); tune a job on smaller data")
    if job.fit.step_plan is not None:
        raise CallerError("tune chooses one length of all fields, and this job has a step plan; use fit.step_plan=null")
    positions = seeded_sample(job.open_dataset().ids, _DATA, seed, "tune")
    device_of(job)  # refuses workers that cannot be had
    settings = job.model_dump(mode="json", exclude_none=True)
    tell = console.print
    with _workers(job) as pool:
        trials = Trials(settings, positions, pool, tell)
        tuned = tune_job(job, trials, seconds=seconds, seed=seed, quality=quality, keep=keep or (), tell=tell)
    figures = _figures(tuned)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "tuned.yaml").write_text(_job_text(job_file, settings, tuned))
        (out / "front.png").write_bytes(front_picture(tuned))
    except OSError as error:
        raise CallerError(f"cannot write into {out}: {error.strerror or error}") from error
    write_json(out / "tuned.json", figures)
    write_json(json_file, figures)
    numbers = {key: float(value) for key, value in figures.items() if isinstance(value, int | float)}
    chosen = dict(tuned.choices)
    if job.track.enabled and (problem := log_folder(out, job.track.experiment, f"{job.name} tune", chosen, numbers)):
        warn(f"not in MLflow: {problem}")
    _show(console, tuned, out)


@contextlib.contextmanager
def _workers(job: EncodeJob) -> Iterator[Pool]:
    """The job's workers, let go in good order whatever ends the search."""
    termination = Termination()
    pool: Pool | None = None
    code = None
    try:
        with termination:
            pool = pool_of(job, None, useful=CANDIDATES)
            termination.install()
            yield pool
    except BaseException as error:
        code = termination.exit_code_of(error)
        if code is None:
            raise
        print("interrupted; nothing was written", file=sys.stderr)
        raise typer.Exit(int(code)) from error
    finally:
        if pool is not None:
            pool.close()
        elif code is not None:
            leave_at_once(int(code))


def _figures(tuned: Tuned) -> dict[str, Any]:
    return {
        "choices": dict(tuned.choices),
        "goal": tuned.goal,
        "own_seconds_per_datum": tuned.own.seconds,
        "own_quality": tuned.own.quality,
        "best_seconds_per_datum": tuned.best.seconds,
        "best_quality": tuned.best.quality,
        "cost_ratio": tuned.cost_ratio,
        "compared_on": tuned.own.data,
        "tried": len(tuned.trials),
        "seconds": tuned.seconds,
        "front": [
            {"choices": dict(choices), "seconds_per_datum": one.seconds, "quality": one.quality}
            for choices, one in ((choices, tuned.trials[choices]) for choices in tuned.front)
        ],
        "reasons": [vars(reason) for reason in tuned.reasons],
    }


def _job_text(job_file: Path, settings: dict[str, Any], tuned: Tuned) -> str:
    """The job with the choices, each with its reason at the end of its line."""
    found = job_from_settings(settings, overrides_of(settings, tuned.choices))
    reasons = {_key_in_job(reason.key): _why(reason) for reason in tuned.reasons}
    section, lines = "", []
    for line in yaml.safe_dump(found.model_dump(mode="json", exclude_none=True), sort_keys=False).splitlines():
        key = line.partition(":")[0]
        if not line.startswith(" "):
            section = key
        why = reasons.get(f"{section}.{key.strip()}" if line.startswith("  ") else key)
        lines.append(f"{line}  # {why}" if why else line)
    head = [
        f"# {job_file.name}, tuned: {100 * tuned.cost_ratio:.0f} % of its cost per datum "
        f"({1e3 * tuned.best.seconds:.1f} against {1e3 * tuned.own.seconds:.1f} ms of the device),",
        f"# median {_text(tuned, tuned.best.quality)} against {_text(tuned, tuned.own.quality)}, "
        f"on {tuned.own.data} data that had no part in the choice.",
    ]
    return "\n".join([*head, *lines, ""])


def _key_in_job(key: str) -> str:
    return {RATE_FACTOR: "optimizer.learning_rate", BETAS: "optimizer.beta1"}.get(key, key)


def _why(reason: Reason) -> str:
    before = f"{reason.before} times" if reason.key == RATE_FACTOR else reason.before
    if reason.cost_without is None or reason.quality_without is None:
        return f"in place of {before}, with which the others cannot be used"
    return (
        f"in place of {before}, with which the cost is {100 * reason.cost_without:.0f} % "
        f"and the median {reason.quality_without:+.2f}"
    )


def _text(tuned: Tuned, quality: float) -> str:
    return f"{tuned.own.quality_name} {quality_text(tuned.own.quality_name, quality)}"


def _show(console: Console, tuned: Tuned, out: Path) -> None:
    if not tuned.choices:
        console.print(f"\nof {len(tuned.trials)} settings none is cheaper at the quality of the job's own")
    for reason in tuned.reasons:
        console.print(f"{reason.key}: {reason.chosen} {_why(reason)}")
    console.print(
        f"\ncost      {1e3 * tuned.best.seconds:.1f} ms of the device per datum, the job's own settings "
        f"{1e3 * tuned.own.seconds:.1f}: {100 * tuned.cost_ratio:.0f} %"
    )
    best, own = _text(tuned, tuned.best.quality), _text(tuned, tuned.own.quality)
    console.print(
        f"quality   median {best}, the job's own {own}, on {tuned.own.data} data that had no part in the choice"
    )
    console.print(f"tried     {len(tuned.trials)} settings in {tuned.seconds:.0f} s")
    console.print(f"written   {out / 'tuned.yaml'}, {out / 'front.png'}")
