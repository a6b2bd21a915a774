"""Whole fits to a target: slots that are refilled as fields finish, beside batches that wait for their slowest field.

`nfscale.fit` refills and compacts; in lockstep a batch is filled once and all its fields step until the last of them is
done. Both fit the same seeded sample of photograph tiles, 256 samples at a step, look at all fields at the same
checks, and count the steps that a field needed alike. `time_ratio` is refill over lockstep, of the fastest rounds;
`steps_ratio` is what it comes from: the mean of the fields' steps over the mean of their batches' longest. On a CPU the
device's time is the time of the whole fit; data are read beforehand.
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from nfscale.benchmark.step import Machine, add_common_arguments, machine_of, refuse_step
from nfscale.benchmark.timing import in_turns, print_rows
from nfscale.engine import Stop, fit
from nfscale.engine.batch import MINIMUM_SLOTS, Batch, Slot
from nfscale.engine.dispatch import StepName, chosen
from nfscale.engine.sampling import Sampler
from nfscale.engine.step import evaluate, stack_samples
from nfscale.errors import CallerError, NfscaleError
from nfscale.fields import MLP, theta0_of
from nfscale.optim import Adam, Schedule
from nfscale.rng import as_tensor, datum_seed
from nfscale.signals import Image, Samples

HELP = "whole fits of photographs to a target: refill beside lockstep"

_SEED = 0
_SAMPLES = 256
_FIELD: Any = MLP(2, 3)
_SIGNAL: Any = Image(3)

Data = Sequence[tuple[str, Samples]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", type=float, default=35.0, help="psnr_db (default: %(default)s)")
    parser.add_argument("--tiles", type=int, default=256, help="of 64 x 64 pixels (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="slots (default: %(default)s)")
    parser.add_argument("--max-steps", type=int, default=300, help="of a field (default: %(default)s)")
    parser.add_argument("--check-every", type=int, default=20, help="steps (default: %(default)s)")
    parser.add_argument("--step", default="auto", help="the step that is taken, as in fit.step (default: auto)")
    add_common_arguments(parser)


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row: time_ratio, steps_ratio, and what both were made of."""
    machine = machine_of(arguments)
    torch.set_num_threads(machine.threads)
    refuse_step(arguments.step, machine.device)
    tiles = arguments.tiles if arguments.fields is None else min(arguments.tiles, arguments.fields)
    for name, value in (("--tiles", tiles), ("--batch", arguments.batch)):
        if value < MINIMUM_SLOTS:
            raise CallerError(f"{name} is at least {MINIMUM_SLOTS}, got {value}")
    try:
        stop = Stop(arguments.max_steps, arguments.target, arguments.check_every, max_restarts=0)
    except ValueError as error:
        raise CallerError(str(error)) from error
    row = measured(photographs(tiles), stop, arguments.batch, arguments.step, machine, arguments.rounds)
    print_rows([row])
    return [row]


def photographs(count: int) -> Data:
    """A seeded sample of tiles.

    Raises:
        CallerError: without the packages that the photographs come in.
    """
    try:
        from nfscale.datasets import DATASETS, seeded_sample

        photos = DATASETS["photos"]().open()
        drawn = seeded_sample(photos.ids, count, seed=_SEED, purpose="benchmark")
        return [(photos.ids[position], _SIGNAL.samples(photos.read(position).content)) for position in drawn]
    except (ImportError, ValueError, NfscaleError) as error:
        needed = "scikit-image, scikit-learn and pillow"
        raise CallerError(f"benchmark fit takes photographs, which come with {needed}: {error}") from error


def measured(data: Data, stop: Stop, slots: int, step: StepName, machine: Machine, rounds: int) -> dict[str, Any]:
    """Both ways in turns.

    Raises:
        NfscaleError: if they do not take the same steps to the target.
    """
    needed: dict[str, dict[str, int]] = {}

    def refill() -> None:
        needed["refill"] = _refilled(data, stop, slots, step, machine.device)

    def lockstep() -> None:
        needed["lockstep"] = _in_lockstep(data, stop, slots, step, machine.device)

    few = data[:MINIMUM_SLOTS]
    _refilled(few, Stop(1, check_every=1), slots, step, machine.device)  # so that what is compiled at first use is
    times = in_turns({"refill": refill, "lockstep": lockstep}, rounds, warm_up=0)
    both = needed["refill"].items() <= needed["lockstep"].items()
    if not both and machine.device == "cpu":
        raise NfscaleError("refill and lockstep took different steps to the target; nothing is reported")
    steps = [needed["lockstep"][datum_id] for datum_id, _ in data]
    batches = [steps[start : start + slots] for start in range(0, len(steps), slots)]
    held = sum(max(batch) * len(batch) for batch in batches)
    reached = sum(count < stop.max_steps for count in steps)
    return {
        "dataset": "photos",
        "target_db": stop.target,
        "fields": len(data),
        "slots": slots,
        "time_ratio": times["refill"].minimum / times["lockstep"].minimum,
        "time_ratio_median": times["refill"].median / times["lockstep"].median,
        "steps_ratio": sum(steps) / held,
        "steps_mean": sum(steps) / len(steps),
        "steps_longest": max(steps),
        "before_max_steps": reached,
        "refill_s": times["refill"].minimum,
        "lockstep_s": times["lockstep"].minimum,
        "threads": machine.threads,
        "device": machine.device,
    }


def _optimizer(stop: Stop) -> Any:
    rate = Adam.auto_learning_rate(_FIELD.width, _FIELD.weight_scale, _SAMPLES)
    return Adam(rate, Schedule("cosine", total_steps=stop.max_steps))


def _refilled(data: Data, stop: Stop, slots: int, step: StepName, device: str) -> dict[str, int]:
    """Steps of each field, but of those that diverged, which leave before others know."""
    fields = fit(
        _FIELD,
        _SIGNAL,
        data,
        optimizer=_optimizer(stop),
        stop=stop,
        seed=_SEED,
        samples=_SAMPLES,
        batch=slots,
        step=step,
        device=device,
    )
    return {fitted.id: fitted.steps for fitted in fields if fitted.result.ok}


def _in_lockstep(data: Data, stop: Stop, slots: int, step: StepName, device: str) -> dict[str, int]:
    """Steps of each field until it was first seen at the target, or at the end."""
    found: dict[str, int] = {}
    for start in range(0, len(data), slots):
        part = data[start : start + slots]
        for done, steps in _batch_in_lockstep(part, stop, step, torch.device(device)):
            found.setdefault(part[done][0], steps)
    return found


def _batch_in_lockstep(data: Data, stop: Stop, step: StepName, device: torch.device) -> Iterator[tuple[int, int]]:
    """Which fields are done after how many steps, each at least once."""
    assert stop.target is not None, "the target is an option with a default"
    optimizer = _optimizer(stop)
    open_fields = set(range(len(data)))
    data = list(data) + list(data[:1]) * (MINIMUM_SLOTS - len(data))
    samples = stack_samples([part for _, part in data], device)
    batch = Batch(
        _FIELD,
        _SIGNAL,
        optimizer,
        Sampler(samples.values.shape[1], _SAMPLES),
        None,
        rows=theta0_of(_FIELD, _SEED).to(device).repeat(len(data), 1),
        samples=samples,
        seeds=as_tensor([datum_seed(_SEED, datum_id) for datum_id, _ in data], device),
        slots=[Slot(datum_id, datum_seed(_SEED, datum_id)) for datum_id, _ in data],
        step=chosen(step, device, _FIELD, _SIGNAL, optimizer),
    )
    evaluate(_FIELD, _SIGNAL, batch.rows, batch.samples, apply=batch.step.apply)  # the look before the first step
    steps = 0
    while open_fields:
        batch.advance(stop.cadence)
        steps += stop.cadence
        _, quality = evaluate(_FIELD, _SIGNAL, batch.rows, batch.samples, apply=batch.step.apply)
        for index, reached in enumerate((quality >= stop.target).tolist()):
            if index in open_fields and (reached or steps >= stop.max_steps):
                open_fields.remove(index)
                yield index, steps
