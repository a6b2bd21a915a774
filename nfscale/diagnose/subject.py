"""What is looked at: one datum of a job, and the field that would be fitted to it."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nfscale.datasets import Dataset, Subset
from nfscale.errors import CallerError
from nfscale.fields import Field, theta0_of
from nfscale.job import EncodeJob
from nfscale.optim import Optimizer, Solver
from nfscale.rng import as_tensor, datum_seed
from nfscale.signals import Samples, Signal
from nfscale.signals.tiles import block_id, whole_id


@dataclass(frozen=True)
class Subject:
    """A field at its start, and the samples it is fitted to."""

    job: EncodeJob
    datum_id: str
    content: Any
    signal: Signal
    samples: Samples
    field: Field
    row: Tensor
    """Where the field starts: [P]."""

    def optimizer(self) -> Optimizer | Solver:
        """The job's, for all samples in every step."""
        return self.job.build_optimizer(len(self.samples.values))


def subject_of(job: EncodeJob, datum_id: str | None = None) -> Subject:
    """The subject of a job: the datum of this id, or the first that can be read.

    Raises:
        CallerError: if there is no such datum, or it cannot be read.
    """
    if job.field.init == "learned":
        raise CallerError(
            "diagnose looks at the start that a job draws, and field.init=learned is learned when a run begins; "
            "use field.init=shared"
        )
    dataset = _blocks_of_one(job, job.open_dataset(), datum_id)
    ids = list(dataset.ids)
    if datum_id is not None and datum_id not in ids:
        raise CallerError(f"no datum {datum_id!r} in the dataset; ids look like {ids[:3]}")
    positions = range(len(ids)) if datum_id is None else [ids.index(datum_id)]
    reason = "the dataset is empty"
    for position in positions:
        datum = dataset.read(position)
        if datum.content is None:
            reason = f"{datum.id}: {datum.error}"
            continue
        try:
            signal = job.build_signal([datum.content])
            samples = signal.samples(datum.content)
        except ValueError as error:
            reason = f"{datum.id}: {error}"
            continue
        job = job.settled(signal, [datum.content])
        field = job.build_field(signal.dimensions, signal.channels)
        if job.field.init == "shared":
            row = theta0_of(field, job.seed)
        else:
            row = field.layout.ravel(field.init(as_tensor([datum_seed(job.seed, datum.id)])))[0]
        return Subject(job, datum.id, datum.content, signal, samples, field, row)
    raise CallerError(f"no datum to look at can be read; the last, {reason}")


def _blocks_of_one(job: EncodeJob, data: Dataset, datum_id: str | None) -> Dataset:
    """Where data are cut, the blocks of the datum that is asked for, or of the first that can be read."""
    if job.tile is None:
        return data
    ids = list(data.ids)
    readable = (name for place, name in enumerate(ids) if data.read(place).content is not None)
    name = next(readable, "") if datum_id is None else whole_id(datum_id)
    if name not in ids:
        like = block_id(ids[0], (0,) * len(job.tile.size)) if ids else "none"
        seen = "none of the data can be read" if datum_id is None else f"no datum {datum_id!r} in the dataset"
        raise CallerError(f"{seen}, whose data are cut; ids look like {like!r}")
    one = Subset(data, [ids.index(name)])
    return job.blocks_of(one, job.counted_blocks(one))
