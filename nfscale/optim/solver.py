"""The contract of a solver: a method that decides by itself where to look.

An optimiser is handed a gradient; a line search or a trust region asks for losses and gradients at points of its
own, accepts or refuses them field by field, and needs the loss as one function of the params. A solver is handed
the problem and gives back the next rows: one call of `solve` is one step. Axis 0 is the field and nothing reduces over
it. Unlike optimisers, solvers wait for the device within a step: who still searches is known on the host.
"""

from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor

from nfscale.layout import Layout
from nfscale.optim.base import Extra, Need, State
from nfscale.optim.linearization import Linearization


class Problem(Protocol):
    """The losses of F fields on the samples of this step, as functions of their rows of weights."""

    def gradient(self, rows: Tensor, fields: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Losses and gradients of some fields at these rows: [G, P] -> [G], [G, P].

        Args:
            fields: int64 [G], whose rows these are; None: all, in order.
        """
        ...

    def losses(self, rows: Tensor) -> Tensor:
        """[F, P] -> [F]."""
        ...

    def linearization(self, rows: Tensor) -> Linearization:
        """Of the residuals at these rows [F, P], where `needs` has "layer_io"."""
        ...


@runtime_checkable
class Solver(Protocol):
    """The contract of every entry of `SOLVERS`."""

    full_batch: ClassVar[bool]
    """The loss has to be the same function at every step, so that all samples enter each."""

    @property
    def needs(self) -> frozenset[Need]: ...

    def init(self, rows: Tensor, layout: Layout) -> State:
        """What is remembered of fields at rows [F, P] that have had no step: tensors [F, ...] and dicts of them."""
        ...

    def solve(self, problem: Problem, rows: Tensor, state: State, extra: Extra) -> tuple[Tensor, State]:
        """One step: the next rows [F, P] and the next state. Rows are left as they were, state may be reused.

        A field whose step would not lower its loss stays where it is and tries another the next time; `extra.rate`
        below 1, after restarts, makes it more careful.
        """
        ...

    def too_large(self, size: int, residuals: int) -> str | None:
        """Why a field of `size` weights with so many residuals (samples x channels) cannot be solved, or None."""
        ...
