"""The plan of a run: everything that is decided once, from the job and a look at its dataset."""

import contextlib
import importlib.metadata
import platform
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nfscale.apart import read_apart
from nfscale.datasets import Dataset, seeded_sample
from nfscale.datasets.base import ids_digest
from nfscale.datasets.tiled import PROBED_BLOCKS, Tiled
from nfscale.engine import LearnedStart, learn_start
from nfscale.engine.loop import SELECTS_WITHOUT_CHECK
from nfscale.engine.sampling import DRAWN_IN_FULL
from nfscale.errors import CallerError
from nfscale.fields import Field, theta0_of
from nfscale.job import FORMAT_VERSION, EncodeJob
from nfscale.optim import Solver
from nfscale.run import samples_of_one_kind
from nfscale.signals import Signal
from nfscale.store.run_folder import Plan
from nfscale.store.schema import LabelType

_SHARD_SECONDS = 15.0  # of work: what a lost worker costs, and short enough that all workers end together
_ASSUMED_FLOPS = {"cpu": 20e9, "cuda": 10e12}  # useful rate of one worker; only decides how data are cut
_SHARD_FIELDS = {"cpu": (4, 4096), "cuda": (64, 4096)}  # fewer would leave a batch half empty
_MINIMUM_SHARDS = 8
_LAST_PARTS = 4  # of a shard, at the end: fewer than a batch of fields would not pay for the writing and the commit
_PROBED_DATA = 100  # data tried until enough are readable to decide what the signal leaves open
_DECIDING_DATA = 8  # readable ones that decide it: reading them is all that a plan costs


def make_plan(job: EncodeJob, device: str = "cpu") -> Plan:
    """Everything that is decided once per run, from the job and the dataset.

    Raises:
        CallerError: if the dataset is empty or none of its first data can be read.
    """
    data = job.open_dataset()
    if not data.ids:
        raise CallerError("the dataset is empty")
    digest, blocks = ids_digest(data.ids), job.counted_blocks(data)
    dataset = job.blocks_of(data, blocks)
    if (steps := job.read_steps()) is not None and steps.keys().isdisjoint(dataset.ids):
        raise CallerError(
            f"fit.step_plan: {job.fit.step_plan!r} names none of the {len(dataset.ids)} data of this dataset"
        )
    probed = _probed(job, dataset)
    signal = probed.signal
    fingerprint = job.fingerprint(digest)
    job = job.settled(signal, probed.contents)
    field = job.build_field(signal.dimensions, signal.channels)
    samples = signal.samples(probed.contents[0])
    if job.fit.sampling == "error" and samples.check is not None:
        raise CallerError(f"fit.{SELECTS_WITHOUT_CHECK}")
    if job.fit.samples == "full" and samples.source is not None:
        raise CallerError(f"fit.{DRAWN_IN_FULL}")
    available = samples.count
    per_step = available if job.fit.samples == "full" else min(job.fit.samples, available)
    optimizer = job.build_optimizer(per_step)
    if isinstance(optimizer, Solver) and (why := optimizer.too_large(field.layout.size, per_step * signal.channels)):
        raise CallerError(f"optimizer.kind={job.optimizer.kind} cannot be used: {why}")
    theta0, learned, factors = None, {}, None
    if job.field.init == "learned":
        start = _learned_start(job, dataset, signal, field, per_step)
        theta0, learned = start.theta0.numpy(), start.figures()
        factors = None if start.factors is None else start.factors.numpy()
    elif job.field.init == "shared":
        theta0 = theta0_of(field, job.seed).numpy()
    positions: list[int] = []
    if job.needs_calibration:
        wanted = job.optimizer.calibration_data
        positions = seeded_sample(dataset.ids, 4 * wanted, job.seed, "calibration")
    shard_fields = _shard_fields(job, field, per_step * signal.points_per_sample, len(dataset.ids), device)
    return Plan(
        id=uuid.uuid4().hex,
        fingerprint=fingerprint,
        job=job.model_dump(mode="json"),
        data_count=len(dataset.ids),
        ids_sha256=digest,
        label_type=probed.label_type,
        samples_per_step=per_step,
        shard_fields=shard_fields,
        layout=field.layout,
        forward={"field": field.forward_description(), "signal": signal.forward_description()} | job.tile_description(),
        theta0=theta0,
        calibration_positions=tuple(positions),
        blocks=blocks,
        learned=learned,
        factors=factors,
        versions=_versions(),
        format=FORMAT_VERSION,
        last_fields=_last_fields(job, shard_fields, device),
    )


def _learned_start(job: EncodeJob, dataset: Dataset, signal: Signal, field: Field, per_step: int) -> LearnedStart:
    """theta0 from a sample of the dataset; a resume finds it in the plan.

    Raises:
        CallerError: if the dataset is smaller than the sample, or nothing was learned.
    """
    learner = job.build_learner()
    if len(dataset.ids) < learner.data:
        raise CallerError(
            f"field.init=learned learns from learning.data={learner.data} data, and the dataset has "
            f"{len(dataset.ids)}; use learning.data={len(dataset.ids)}, a larger dataset or field.init=shared"
        )
    positions = seeded_sample(dataset.ids, 4 * learner.data, job.seed, "learning")
    data = samples_of_one_kind(dataset, signal, positions, learner.data, job.fit.samples == "full")
    if not data:
        raise CallerError("field.init=learned: none of the data drawn to learn from can be read; use field.init=shared")
    try:
        return learn_start(
            field,
            signal,
            data,
            learner=learner,
            **job.learning_rate_and_betas(per_step),
            seed=job.seed,
            samples=job.fit.samples,
            sampling=job.fit.sampling,
            step=job.fit.step,
        )
    except ValueError as error:
        raise CallerError(f"field.init=learned: {error}") from error


@dataclass(frozen=True)
class _Probed:
    """What the first data say of the rest."""

    signal: Signal
    contents: list[Any]
    """The first few data that can be read."""
    label_type: LabelType


def _probed(job: EncodeJob, dataset: Dataset) -> _Probed:
    """Read data until the signal and the type of the labels are decided.

    The first ones; where none of them can be read, some that are spread over the dataset.
    """
    contents: list[Any] = []
    labels: list[str | int] = []
    reason = ""
    tried = 0
    deciding = PROBED_BLOCKS if isinstance(dataset, Tiled) else _DECIDING_DATA
    with contextlib.closing(read_apart(dataset, _probed_positions(job, dataset))) as coming:
        for datum in coming:
            if tried >= _PROBED_DATA and contents:
                break
            tried += 1
            if datum.label is not None:
                labels.append(datum.label)
            if datum.content is None:
                reason = f"{datum.id}: {datum.error}"
            elif len(contents) < deciding:
                try:
                    job.build_signal([datum.content]).samples(datum.content)
                    contents.append(datum.content)
                except ValueError as error:
                    reason = f"{datum.id}: {error}"
            if len(contents) == deciding and labels:
                break
    if not contents:
        raise CallerError(f"none of {tried} data that were tried can be read; the last of them, {reason}")
    signal = job.build_signal(contents)
    label_type = "int64" if labels and isinstance(labels[0], int) else "string"
    return _Probed(signal, contents, label_type)


def _probed_positions(job: EncodeJob, dataset: Dataset) -> Iterator[int]:
    if isinstance(dataset, Tiled):
        yield from dataset.probe_positions()
    first = min(_PROBED_DATA, len(dataset.ids))
    yield from range(first)
    if first < len(dataset.ids):
        yield from seeded_sample(dataset.ids, 2 * _PROBED_DATA, job.seed, "probe")


def _shard_fields(job: EncodeJob, field: Field, points: int, count: int, device: str) -> int:
    """How many fields a shard has, by what a fit of `points` points per step costs."""
    if job.store.shard_fields != "auto":
        return job.store.shard_fields
    flops = 6 * field.layout.size * points * job.fit.max_steps  # forward and backward of one fit
    by_time = int(_SHARD_SECONDS * _ASSUMED_FLOPS[device] / flops)
    low, high = _SHARD_FIELDS[device]
    return max(low, min(by_time, high, -(-count // _MINIMUM_SHARDS)))


def _last_fields(job: EncodeJob, shard_fields: int, device: str) -> int | None:
    """How small shards become towards the end; on a GPU they would leave a batch half empty."""
    if job.store.shard_fields != "auto" or device != "cpu":
        return None
    return max(_SHARD_FIELDS[device][0], shard_fields // _LAST_PARTS)


def _versions() -> dict[str, str]:
    packages = ("nfscale", "torch", "numpy", "pyarrow")
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found | {"python": platform.python_version()}
