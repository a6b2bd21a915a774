"""What a user would write with JAX: vmap of grad over the fields, Adam on their stacked tensors, jit of a scan."""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nfscale.benchmark.naive import COMPARED_STEPS
from nfscale.benchmark.workloads import Problem

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8


class Jax:
    """All steps of a call in one scan."""

    step_name = None

    def __init__(self, problem: Problem) -> None:
        import jax
        import jax.numpy as jnp

        self._problem = problem
        cuda = problem.rows.device.type == "cuda"
        self._device: Any = jax.devices("gpu" if cuda else "cpu")[0]
        params = problem.field.layout.unravel(problem.rows)
        put = partial(_put, device=self._device)
        self._x, self._y = put(problem.samples.coordinates), put(problem.samples.values)
        first = problem.first_positions(COMPARED_STEPS)
        self._first = None if first is None else put(first.movedim(0, 1).to(torch.int32))  # [steps, F, n]
        starts, lengths = (put(tensor.to(torch.int32)) for tensor in problem.sampler.runs)
        at_start: Any = {name: put(tensor) for name, tensor in params.items()}
        zeros = {name: jnp.zeros_like(tensor) for name, tensor in at_start.items()}
        self._carry: Any = (at_start, zeros, zeros, jnp.zeros((), jnp.int32), jax.random.key(0))
        depth, omegas = problem.field.depth, (problem.field.omega_0, problem.field.omega_hidden)
        fields, rate = len(problem.rows), problem.learning_rate

        def loss_of(params: Any, x: Any, y: Any) -> Any:
            hidden = x
            for index in range(depth):
                weight, bias = params[f"layers.{index}.weight"], params[f"layers.{index}.bias"]
                hidden = jnp.sin(omegas[min(index, 1)] * (hidden @ weight.T + bias))
            predicted = hidden @ params[f"layers.{depth}.weight"].T + params[f"layers.{depth}.bias"]
            return jnp.mean((predicted - y) ** 2)

        gradient = jax.vmap(jax.grad(loss_of))

        def update(carry: Any, x: Any, y: Any, key: Any) -> Any:
            params, mean, square, step, _ = carry
            step, grads = step + 1, gradient(params, x, y)
            mean = jax.tree.map(lambda m, g: _BETA1 * m + (1 - _BETA1) * g, mean, grads)
            square = jax.tree.map(lambda v, g: _BETA2 * v + (1 - _BETA2) * g * g, square, grads)
            size, root = rate / (1 - _BETA1**step), jnp.sqrt(1 - _BETA2**step)
            params = jax.tree.map(lambda p, m, v: p - size * m / (jnp.sqrt(v) / root + _EPSILON), params, mean, square)
            return params, mean, square, step, key

        def taken(x: Any, y: Any, positions: Any) -> tuple[Any, Any]:
            where = positions[..., None]
            return jnp.take_along_axis(x, where, axis=1), jnp.take_along_axis(y, where, axis=1)

        @partial(jax.jit, static_argnames="count")
        def run(carry: Any, x: Any, y: Any, count: int) -> Any:
            def step(carry: Any, _: None) -> tuple[Any, None]:
                if problem.sampler.is_full:
                    return update(carry, x, y, carry[-1]), None
                key, now = jax.random.split(carry[-1])
                drawn = jax.random.uniform(now, (fields, len(starts)))
                return update(carry, *taken(x, y, starts + (drawn * lengths).astype(jnp.int32)), key), None

            return jax.lax.scan(step, carry, None, length=count)[0]

        @jax.jit
        def run_given(carry: Any, x: Any, y: Any, positions: Any) -> Any:
            def step(carry: Any, given: Any) -> tuple[Any, None]:
                return update(carry, *taken(x, y, given), carry[-1]), None

            return jax.lax.scan(step, carry, positions)[0]

        self._jax, self._run, self._run_given = jax, run, run_given

    def advance(self, count: int) -> None:
        step = int(self._carry[3])
        if self._first is not None and step < COMPARED_STEPS:
            given = self._first[step : step + count]
            self._carry = self._run_given(self._carry, self._x, self._y, given)
            count -= len(given)
        if count:
            self._carry = self._run(self._carry, self._x, self._y, count)
        self._jax.block_until_ready(self._carry)

    def rows(self) -> Tensor:
        params = {name: torch.from_numpy(np.array(tensor)) for name, tensor in self._carry[0].items()}
        return self._problem.field.layout.ravel(params)

    def peak_bytes(self) -> int | None:
        """The most that JAX held on the device at once, data included."""
        statistics = self._device.memory_stats()
        return None if statistics is None else statistics.get("peak_bytes_in_use")


def _put(tensor: Tensor, device: Any) -> Any:
    import jax

    return jax.device_put(tensor.cpu().numpy(), device)
