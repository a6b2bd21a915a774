"""`optimizer.kind: auto`: the method that reaches a job's target in the fewest device-seconds, by a rule of thumb.

Evidence: `python -m pipelines.optimizer_rule` (tables in pipelines/benchmarks/RESULTS.md): photographs, words and
meshes with the fields of the shipped jobs, each method at the best of several rates and schedules.
"""

from dataclasses import dataclass

_HIGH_DB = 47.0
"""Beyond it minibatches of Adam need more than a thousand steps on photographs, and Muon a third of that at 2.7 times
the cost of a step."""


@dataclass(frozen=True)
class Automatic:
    """The kind is decided with the first data, see `automatic_kind`, and stays with the run."""


def automatic_kind(*, target: float | None, is_in_db: bool, is_full_batch: bool, has_hidden_matrices: bool) -> str:
    """The kind of optimiser for a job.

    Args:
        target: of the quality, None for none: then as good as its steps get it.
        is_in_db: the quality is in decibels.
        is_full_batch: every step takes all samples of a field, so that what an update costs beside them is little.
        has_hidden_matrices: the field is an MLP of three layers and more, whose hidden layers Muon treats as matrices.
    """
    is_high = is_in_db and target is not None and target > _HIGH_DB
    if has_hidden_matrices and (is_high or is_full_batch):
        return "muon"
    return "adam"
