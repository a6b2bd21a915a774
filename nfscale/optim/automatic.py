"""`optimizer.kind: auto`: the method that reaches a job's target in the fewest device-seconds, by a rule of thumb.

Evidence: `python -m pipelines.optimizer_rule` (tables in pipelines/benchmarks/RESULTS.md): photographs, words and
meshes with the fields of the shipped jobs, each method at the best of several rates and schedules.
"""

from dataclasses import dataclass

_HIGH_DB = 47.0
"""Beyond it minibatches of Adam need more than a thousand steps on photographs, and Muon a third of that at 2.7 times
the cost of a step. On words, whose fields have larger weights and frequencies, its automatic rate fits nothing."""

_LARGEST_SCALE = 1.75
"""Weight scale up to which Muon is chosen."""

_SEARCHED_DB = 40.0
"""Up to it ESGD is ahead of Adam on words, by a seventh, and behind it at the end of a long fit; and L-BFGS where both
take all samples, by a quarter at 35 dB and by little at 40. On meshes ESGD is ahead all the way."""

_SEARCHED_WORK = 1e7
"""Weights times samples of a step below which what L-BFGS does beside gradients costs more than it saves."""


@dataclass(frozen=True)
class Automatic:
    """The kind is decided with the first data, see `automatic_kind`, and stays with the run."""


@dataclass(frozen=True)
class Circumstances:
    """What the kind is decided by."""

    target_db: float | None
    """None where the job has none, or one that is not in decibels."""
    is_in_db: bool
    """The quality of the job, which is otherwise that of a solid."""
    weights: int
    """Of a field."""
    samples: int
    """Of a step."""
    values: int
    """Of a datum: samples times channels."""
    takes_all: bool
    """Every step takes all samples of its field, and they stay the same from step to step."""
    has_hidden_matrices: bool
    """The field is an MLP of two activated layers and more, between which Muon finds matrices."""
    dimensions: int
    """Of the coordinates."""
    weight_scale: float
    shares_init: bool
    """All fields start from one theta0, so that they can share curvature."""


def automatic_kind(job: Circumstances) -> str:
    """The kind of optimiser for a job: most often adam; esgd with shared curvature for sounds and solids."""
    if not job.is_in_db:
        return "esgd" if job.shares_init else "adam"
    if job.target_db is None:
        return "adam"
    if job.dimensions == 1 and job.shares_init and job.target_db <= _SEARCHED_DB and not job.takes_all:
        return "esgd"
    if job.target_db > _HIGH_DB and job.has_hidden_matrices and job.weight_scale <= _LARGEST_SCALE:
        return "muon" if job.dimensions > 1 else "adam"
    is_worth_searching = job.weights >= job.values and job.weights * job.samples >= _SEARCHED_WORK
    return "lbfgs" if job.takes_all and is_worth_searching and job.target_db <= _SEARCHED_DB else "adam"
