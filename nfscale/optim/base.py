"""The contract of an optimiser."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor

from nfscale.layout import Params
from nfscale.optim.schedules import Schedule

State = dict[str, Any]
"""What an optimiser remembers: tensors [F, ...] and dicts of them, so that slots can be picked by index."""

Need = Literal["hv", "diagonal", "cadence", "layer_io"]
"""What the loop provides beside gradients; "cadence": it says in `Extra.refresh` when `update_every` comes round."""


@dataclass(frozen=True)
class Extra:
    """What the loop knows at this step and an optimiser may use."""

    step: Tensor
    """int64 [F]: updates this field has had before this one."""
    rate: Tensor
    """float32 [F]: factor on the learning rate; 1, or halved for each restart of the field."""
    hv: Params | None = None
    """Hessian-vector products with Rademacher probes, where `needs` has "hv" and some field wants one now."""
    hv_fields: Tensor | None = None
    """bool [F]: the fields whose `hv` counts at this step."""
    diagonal: Params | None = None
    """Equilibrated diagonal sqrt(E[(Hv)^2]) shared by the fields, where `needs` has "diagonal"."""
    step_rms: Tensor | None = None
    """float32 [F]: typical root mean square of a preconditioned step, where `needs` has "diagonal"."""
    probe: Params | None = None
    """The signs v that `hv` is the product with: as `hv`."""
    refresh: bool = True
    """Whether the step of some field may be a multiple of `update_every`. The host knows it where `needs` has
    "cadence", so that nothing has to wait for the device to find out; which fields these are, `step` says."""
    length: Tensor | None = None
    """int64 [F]: steps of each field's own schedule; None: of the optimiser's, for all."""


class Optimizer(Protocol):
    """The contract of every entry of `OPTIMIZERS`."""

    @property
    def learning_rate(self) -> float: ...

    @property
    def schedule(self) -> Schedule: ...

    elementwise: ClassVar[bool]
    """Each weight is treated alone: the loop may hand over whole rows {"rows": [F, P]} instead of tensors by name."""

    @property
    def needs(self) -> frozenset[Need]: ...

    def init(self, params: Params) -> State: ...

    def update(self, grads: Params, state: State, params: Params, extra: Extra) -> tuple[Params, State]:
        """Updates to be added to the params, and the next state. State tensors may be reused in place."""
        ...

    def wants_curvature(self, step: Tensor) -> Tensor:
        """Whether a field at this step [F] wants a Hessian-vector product: bool [F]."""
        ...


@runtime_checkable
class Scheduled(Protocol):
    """An optimiser or a solver whose rate follows a schedule."""

    @property
    def schedule(self) -> Schedule: ...


@runtime_checkable
class SeveralRates(Protocol):
    """An optimiser that has not one learning rate for all params."""

    def rates(self, params: Params) -> dict[str, float]:
        """The learning rate of each tensor, by name."""
        ...


def per_field(values: Tensor, like: Tensor) -> Tensor:
    """[F] shaped so that it broadcasts against a tensor [F, ...]."""
    return values.view(-1, *[1] * (like.ndim - 1))


def step_size(learning_rate: float, schedule: Schedule, extra: Extra) -> Tensor:
    """The rate of each field's own step: float64 [F], see `Schedule.factor`."""
    return learning_rate * schedule.factor(extra.step, extra.length) * extra.rate


def began_at_zero(beta: float, count: Tensor) -> Tensor:
    """What a running mean that began at zero holds of its values after `count` of them: 1 - beta^count, float64 [F]."""
    return 1 - beta ** count.double()


def times(tensor: Tensor, values: Tensor) -> Tensor:
    """A tensor [F, ...] times a number of each field's own [F], in the tensor's dtype."""
    return tensor * per_field(values, tensor).to(tensor.dtype)


def map_params(function: Callable[..., Tensor], *params: Params) -> Params:
    """Apply a function to the tensors of the same name."""
    return {name: function(*(p[name] for p in params)) for name in params[0]}
