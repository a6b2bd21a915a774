"""L-BFGS: limited-memory quasi-Newton steps, each field with a history and a line search of its own.

Two-loop recursion: Nocedal & Wright, "Numerical Optimization" (2006), algorithm 7.4, with the initial matrix of
eq. 7.20. Line search: bracketing for the weak Wolfe conditions, Lewis & Overton, "Nonsmooth optimization via
quasi-Newton methods" (2013), algorithm 2.6; it is short, batches well, and every accepted pair has positive
curvature. Two differences from it: inside a bracket whose right end is too high the next length is the minimum of a
parabola and not the middle, and the search gives up after `max_evaluations` with the best length that was low enough.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nfscale.layout import Layout
from nfscale.optim.base import Extra, Need, State
from nfscale.optim.solver import Problem

_DECREASE = 1e-4  # the c1 of Armijo's condition, Nocedal & Wright's choice
_FLATTEN = 0.9  # the c2 of the curvature condition, likewise for quasi-Newton methods: most first lengths pass
_MARGIN = 0.1  # a parabola's minimum stays this far inside its bracket
_GROWTH = 3.0  # of a length that is still too short; first steps are made short on purpose


@dataclass(frozen=True)
class LBFGS:
    """One step is one direction and its line search: most often one gradient, at most `max_evaluations`.

    There is no learning rate: a search begins at the length 1 of Newton's method, times `Extra.rate`.
    """

    history: int = 20
    """Pairs of steps and gradient changes that are kept: 2 x history x P numbers of a field."""
    max_evaluations: int = 10
    """Gradients of one line search."""
    first_step: float = 0.01
    """Length of the first trial step over that of the params, both as root mean squares: there is no scale yet."""

    full_batch: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset()

    def __post_init__(self) -> None:
        for name in ("history", "max_evaluations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, got {getattr(self, name)}")
        if self.first_step <= 0:
            raise ValueError(f"first_step is above 0, got {self.first_step}")

    def too_large(self, size: int, residuals: int) -> str | None:
        return None

    def init(self, rows: Tensor, layout: Layout) -> State:
        fields, size = rows.shape
        return {
            "fresh": torch.ones(fields, dtype=torch.bool, device=rows.device),
            "loss": rows.new_zeros(fields),
            "gradient": torch.zeros_like(rows),
            "steps": rows.new_zeros((fields, self.history, size)),
            "changes": rows.new_zeros((fields, self.history, size)),
            "inverse_products": rows.new_zeros((fields, self.history), dtype=torch.float64),
            "pairs": torch.zeros(fields, dtype=torch.int64, device=rows.device),
        }

    def solve(self, problem: Problem, rows: Tensor, state: State, extra: Extra) -> tuple[Tensor, State]:
        loss, gradient = state["loss"], state["gradient"]
        fresh = state["fresh"].nonzero()[:, 0]
        if len(fresh):
            loss[fresh], gradient[fresh] = problem.gradient(rows[fresh], fresh)
            state["fresh"][fresh] = False
        direction = self._direction(state, gradient)
        slope = _dot(gradient, direction)
        uphill = ~(slope < 0)  # of a history that rounding has spoiled
        self._forget(state, uphill)
        direction = torch.where(uphill[:, None], -gradient, direction)
        slope = torch.where(uphill, -_dot(gradient, gradient), slope)
        first = self.first_step * _dot(rows, rows).sqrt() / _dot(direction, direction).sqrt()
        length = torch.where(state["pairs"] == 0, first, torch.ones_like(first)) * extra.rate
        taken, new_loss, new_gradient = self._search(problem, rows, loss, gradient, direction, slope, length)
        moved = rows + taken.to(rows.dtype)[:, None] * direction
        self._remember(state, moved - rows, new_gradient - gradient)
        self._forget(state, taken == 0)
        state["loss"], state["gradient"] = new_loss, new_gradient
        return moved, state

    def _direction(self, state: State, gradient: Tensor) -> Tensor:
        """-H g by the two-loop recursion; fields without pairs get -g. A pair that is not there has product 0."""
        pairs = state["pairs"]
        # Of all fields, to skip places that are empty everywhere: they add zeros.
        kept = max(1, min(self.history, int(pairs.max())))
        newest_first = (pairs[:, None] - 1 - torch.arange(kept, device=pairs.device)) % self.history
        fields = torch.arange(len(gradient), device=gradient.device)[:, None]
        steps, changes = (state[name][fields, newest_first] for name in ("steps", "changes"))
        inverse_products = state["inverse_products"][fields, newest_first]
        residue, factors = gradient.clone(), []
        for age in range(kept):
            factor = inverse_products[:, age] * _dot(steps[:, age], residue)
            residue.addcmul_(factor.to(residue.dtype)[:, None], changes[:, age], value=-1)
            factors.append(factor)
        inverse = inverse_products[:, 0]
        scale = torch.where(inverse > 0, 1 / (inverse * _dot(changes[:, 0], changes[:, 0])), 1.0)
        residue *= scale.to(residue.dtype)[:, None]
        for age in reversed(range(kept)):
            back = inverse_products[:, age] * _dot(changes[:, age], residue)
            residue.addcmul_((factors[age] - back).to(residue.dtype)[:, None], steps[:, age])
        return residue.neg_()

    def _search(
        self,
        problem: Problem,
        rows: Tensor,
        loss: Tensor,
        gradient: Tensor,
        direction: Tensor,
        slope: Tensor,
        length: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Lengths float64 [F] that lower the loss enough, 0 where none was found, with losses and gradients there."""
        taken = torch.zeros_like(length)
        best_loss, best_gradient = loss.clone(), gradient.clone()
        low, high = torch.zeros_like(length), torch.full_like(length, torch.inf)
        low_loss, low_slope = loss.double(), slope.clone()
        searching = torch.arange(len(rows), device=rows.device)
        for _ in range(self.max_evaluations):
            at = length[searching]
            along = direction[searching]
            found_loss, found_gradient = problem.gradient(
                rows[searching] + at.to(rows.dtype)[:, None] * along, searching
            )
            found_slope = _dot(found_gradient, along)
            bound = loss[searching].double() + _DECREASE * at * slope[searching]
            is_low = found_loss.double() <= bound
            is_flat = found_slope >= _FLATTEN * slope[searching]
            better = is_low & (found_loss <= best_loss[searching])
            kept = searching[better]
            taken[kept], best_loss[kept], best_gradient[kept] = at[better], found_loss[better], found_gradient[better]
            left, right = low[searching], high[searching]
            parabola = _parabola_minimum(low_loss[searching], low_slope[searching], at - left, found_loss.double())
            within = left + (at - left) * parabola
            too_short = is_low & ~is_flat
            middle = torch.where(right.isinf(), _GROWTH * at, (at + right) / 2)
            length[searching] = torch.where(too_short, middle, within)
            low[searching] = torch.where(too_short, at, left)
            low_loss[searching] = torch.where(too_short, found_loss.double(), low_loss[searching])
            low_slope[searching] = torch.where(too_short, found_slope, low_slope[searching])
            high[searching] = torch.where(is_low, right, at)
            searching = searching[~(is_low & is_flat)]
            if not len(searching):
                break
        return taken, best_loss, best_gradient

    def _remember(self, state: State, step: Tensor, change: Tensor) -> None:
        """A pair into the oldest place of the fields where it says something about the curvature."""
        product = _dot(step, change)
        lengths = (_dot(step, step) * _dot(change, change)).sqrt()
        fields = (product > 1e-8 * lengths).nonzero()[:, 0]  # below it rounding decides the sign
        place = state["pairs"][fields] % self.history
        state["steps"][fields, place] = step[fields]
        state["changes"][fields, place] = change[fields]
        state["inverse_products"][fields, place] = 1 / product[fields]
        state["pairs"][fields] += 1

    @staticmethod
    def _forget(state: State, fields: Tensor) -> None:
        """Empty the histories of the fields that are True [F]: the next step is along the gradient."""
        state["inverse_products"][fields] = 0
        state["pairs"][fields] = 0


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Of each field, summed in float64: [F, P], [F, P] -> [F]."""
    return (left * right).sum(dim=1, dtype=torch.float64)


def _parabola_minimum(loss: Tensor, slope: Tensor, width: Tensor, far_loss: Tensor) -> Tensor:
    """Where, as a fraction of the width, the parabola with this start, slope and end has its minimum: [F]."""
    drop = -slope * width
    fraction = drop / (2 * (far_loss - loss + drop))
    return torch.where(fraction.isfinite(), fraction, _MARGIN).clamp(_MARGIN, 1 - _MARGIN)
