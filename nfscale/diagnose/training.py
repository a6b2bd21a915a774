"""The weights of a field along one training by its job's own optimiser, as the engine takes its steps."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nfscale.diagnose.subject import Subject
from nfscale.engine import Stop, calibrate
from nfscale.engine.batch import MINIMUM_SLOTS, Batch, Slot
from nfscale.engine.dispatch import chosen
from nfscale.engine.sampling import Sampler
from nfscale.engine.step import evaluate, stack_samples
from nfscale.errors import CallerError
from nfscale.optim import Adam
from nfscale.rng import as_tensor, datum_seed
from nfscale.signals import Samples


@dataclass(frozen=True)
class Moment:
    """The field after so many steps; not the best so far, but where the optimiser stands."""

    steps: int
    row: Tensor
    """Weights: float32 [P]."""
    quality: float
    """In the signal's unit."""
    second_moment: Tensor | None
    """Adam's v = E[g^2] with its bias corrected: float32 [P]. None before the first step, and of other optimisers."""


def along_training(subject: Subject, moments: Sequence[int]) -> Iterator[Moment]:
    """The field at these numbers of steps, in their order.

    Numbers are rounded down to a multiple of the optimiser's `update_every`, but for those between 0 and the first.

    Raises:
        CallerError: if the fit is lost before the last of them.
    """
    optimizer, job, field = subject.optimizer(), subject.job, subject.field
    samples = Samples(subject.samples.coordinates, subject.samples.values, subject.samples.mask)
    every = getattr(optimizer, "update_every", 1)
    wanted = sorted({max(steps // every * every, every) if steps else 0 for steps in moments})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    calibration = None
    if "diagonal" in optimizer.needs:
        calibration = calibrate(
            field,
            subject.signal,
            [(subject.datum_id, samples)],
            optimizer=optimizer,  # type: ignore[arg-type]
            stop=Stop(max(wanted[-1], every), check_every=every),
            seed=job.seed,
            theta0=subject.row,
            samples=job.fit.samples,
            sampling=job.fit.sampling,
            device=device,
        ).to(device)
    count = len(samples.values)
    seed, idle = datum_seed(job.seed, subject.datum_id), MINIMUM_SLOTS - 1  # a lone field rounds differently
    batch = Batch(
        field,
        subject.signal,
        optimizer,
        Sampler(count, count if job.fit.samples == "full" else job.fit.samples, job.fit.sampling),
        calibration,
        rows=subject.row.to(device).repeat(1 + idle, 1),
        samples=stack_samples([samples] * (1 + idle), device),
        seeds=as_tensor([seed] * (1 + idle), device),
        slots=[Slot(subject.datum_id, seed), *[None] * idle],
        step=chosen(job.fit.step, device, field, subject.signal, optimizer),
    )
    before = 0
    for steps in wanted:
        batch.advance(steps - before)
        before = steps
        if not batch.rows[0].isfinite().all():
            raise CallerError(
                f"the fit is lost before step {steps}; take a smaller optimizer.learning_rate, or --steps"
            )
        quality = evaluate(field, subject.signal, batch.rows, batch.samples, apply=batch.step.apply)[1]
        second = None
        if isinstance(optimizer, Adam) and steps:
            second = batch.state["square"]["rows"][0].cpu() / (1 - optimizer.beta2**steps)
        yield Moment(steps, batch.rows[0].cpu().clone(), float(quality[0]), second)
