"""An optimiser around another: all but the update is the inner one's."""

from dataclasses import dataclass

from torch import Tensor

from nfscale.layout import Params
from nfscale.optim.base import Need, Optimizer, State
from nfscale.optim.schedules import Schedule


@dataclass(frozen=True)
class Wrapped:
    """What an optimiser hands through that changes the updates of another, and keeps no state of its own."""

    inner: Optimizer

    @property
    def learning_rate(self) -> float:
        return self.inner.learning_rate

    @property
    def schedule(self) -> Schedule:
        return self.inner.schedule

    @property
    def needs(self) -> frozenset[Need]:
        return self.inner.needs

    @property
    def elementwise(self) -> bool:
        return self.inner.elementwise

    @property
    def update_every(self) -> int:
        return getattr(self.inner, "update_every", 1)

    def init(self, params: Params) -> State:
        return self.inner.init(params)

    def wants_curvature(self, step: Tensor) -> Tensor:
        return self.inner.wants_curvature(step)
