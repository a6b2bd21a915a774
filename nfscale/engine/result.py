"""When a field stops, and what comes out of it. Outcomes are data: a diverged field is a result, not an error."""

from dataclasses import dataclass, field
from enum import StrEnum

from torch import Tensor

from nfscale.layout import Layout, Params


class Result(StrEnum):
    """Why a field left the batch."""

    CONVERGED = "converged"
    PLATEAU = "plateau"
    MAX_STEPS = "max_steps"
    DIVERGED = "diverged"

    @property
    def ok(self) -> bool:
        return self is not Result.DIVERGED


@dataclass(frozen=True)
class Stop:
    """When to look at a field and when to let it go.

    Raises:
        ValueError: if max_steps is not a multiple of check_every (a smaller max_steps is checked at its end).
    """

    max_steps: int
    target: float | None = None
    """Quality at which a field is done, in the unit of the signal's quality."""
    check_every: int = 50
    plateau_checks: int | None = None
    """Leave after this many checks in a row whose best quality gained less than `plateau_gain` in all."""
    plateau_gain: float = 0.1
    max_restarts: int = 3
    """How often a field that diverges starts again, at half the learning rate each time."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "check_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, got {getattr(self, name)}")
        if self.max_steps > self.cadence and self.max_steps % self.cadence:
            below = self.max_steps // self.cadence * self.cadence
            raise ValueError(
                f"max_steps={self.max_steps} is not a multiple of check_every={self.check_every}; "
                f"use max_steps={below} or {below + self.cadence}, or another check_every"
            )

    @property
    def cadence(self) -> int:
        """Steps between two checks."""
        return min(self.check_every, self.max_steps)


@dataclass
class Fitted:
    """One field that left the batch, with the best params any check has seen."""

    id: str
    weights: Tensor
    """float32 [P] on the CPU, in the order of the layout."""
    loss: float
    """On the samples that are measured: the check's, where the signal names some."""
    quality: float
    """As `loss`."""
    steps: int
    """Updates of the last attempt, after `restarts` attempts that diverged."""
    result: Result
    seed: int
    restarts: int = 0
    steps_to_target: int | None = None
    wall_seconds: float = 0.0
    history_step: list[int] = field(default_factory=list)
    history_quality: list[float] = field(default_factory=list)
    quality_heldout: float | None = None
    """Of the same weights, on the samples that the datum holds back; None where it holds none back."""

    def params(self, layout: Layout) -> Params:
        """The weights by name, without a field axis."""
        return {name: tensor[0] for name, tensor in layout.unravel(self.weights[None]).items()}
