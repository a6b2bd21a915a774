"""What a user would write with torch: a module and an optimiser per field, `vmap` over fields, `torch.compile`.

A method is made from a `Problem` and takes steps of all its fields. Its first steps take the samples that nfscale
takes, so that results can be compared; later ones draw their own in the way that comes naturally to the method.
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from nfscale.benchmark.workloads import Problem

COMPARED_STEPS = 3


class Method(Protocol):
    """What is timed."""

    @property
    def step_name(self) -> str | None:
        """Of our methods: the step that the engine chose."""
        ...

    def advance(self, count: int) -> None:
        """So many steps of every field."""
        ...

    def rows(self) -> Tensor:
        """The fields' weights in the order of the layout: [F, P]."""
        ...


MakeMethod = Callable[[Problem], Method]


class Siren(nn.Module):
    """sin(omega (W h + b)) and a linear layer."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(fan_in, fan_out) for fan_out, fan_in in problem.field.shapes)
        self.omega_0, self.omega_hidden = problem.field.omega_0, problem.field.omega_hidden

    def forward(self, coordinates: Tensor) -> Tensor:
        hidden = coordinates
        for index, layer in enumerate(self.layers[:-1]):
            hidden = torch.sin((self.omega_hidden if index else self.omega_0) * layer(hidden))
        return self.layers[-1](hidden)


class Draws:
    """Stratified samples as torch.rand draws them: one of each run of neighbours."""

    def __init__(self, problem: Problem) -> None:
        self._first = problem.first_positions(COMPARED_STEPS)
        runs = problem.sampler.runs
        self._starts, self._lengths = (tensor.to(problem.rows.device) for tensor in runs)

    def at(self, step: int, field: int) -> Tensor | None:
        """Positions of one field: int64 [n], or None for all."""
        if self._first is None:
            return None
        if step < COMPARED_STEPS:
            return self._first[field, step]
        return self._starts + (torch.rand(self._starts.shape, device=self._starts.device) * self._lengths).long()

    def of_all(self, step: int, fields: int) -> Tensor | None:
        """Positions of all fields: int64 [F, n], or None for all samples."""
        if self._first is None:
            return None
        if step < COMPARED_STEPS:
            return self._first[:, step]
        shape = (fields, *self._starts.shape)
        return self._starts + (torch.rand(shape, device=self._starts.device) * self._lengths).long()


class Loop:
    """One field after the other: a module, torch.optim.Adam and all steps."""

    step_name = None

    def __init__(self, problem: Problem) -> None:
        self._samples, self._draws = problem.samples, Draws(problem)
        self._step = 0
        self._nets = []
        for row in problem.rows:
            net = Siren(problem).to(row.device)
            nn.utils.vector_to_parameters(row.clone(), net.parameters())
            self._nets.append((net, torch.optim.Adam(net.parameters(), lr=problem.learning_rate)))

    def advance(self, count: int) -> None:
        for field, (net, optimizer) in enumerate(self._nets):
            coordinates, values = self._samples.coordinates[field], self._samples.values[field]
            for step in range(self._step, self._step + count):
                positions = self._draws.at(step, field)
                x, y = (coordinates, values) if positions is None else (coordinates[positions], values[positions])
                optimizer.zero_grad()
                nn.functional.mse_loss(net(x), y).backward()
                optimizer.step()
        self._step += count

    def rows(self) -> Tensor:
        return torch.stack([nn.utils.parameters_to_vector(net.parameters()).detach() for net, _ in self._nets])


class _Stacked:
    """Tensors [F, ...] of all fields in one torch.optim.Adam."""

    step_name = None

    def __init__(self, problem: Problem) -> None:
        self._problem, self._draws, self._step = problem, Draws(problem), 0
        params = problem.field.layout.unravel(problem.rows)
        self._params = {name: tensor.clone().requires_grad_() for name, tensor in params.items()}
        self._optimizer = torch.optim.Adam(self._params.values(), lr=problem.learning_rate)

    def _differentiate(self, coordinates: Tensor, values: Tensor) -> None:
        """Leave gradients with the params."""
        raise NotImplementedError

    def advance(self, count: int) -> None:
        samples = self._problem.samples
        for step in range(self._step, self._step + count):
            positions = self._draws.of_all(step, len(samples.values))
            coordinates, values = samples.coordinates, samples.values
            if positions is not None:
                coordinates = coordinates.take_along_dim(positions[..., None], dim=1)
                values = values.take_along_dim(positions[..., None], dim=1)
            self._differentiate(coordinates, values)
            self._optimizer.step()
        self._step += count

    def rows(self) -> Tensor:
        return self._problem.field.layout.ravel(self._params).detach()


class Vmap(_Stacked):
    """torch.func: vmap of grad over the fields."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        net = Siren(problem)

        def loss_of(params: dict[str, Tensor], coordinates: Tensor, values: Tensor) -> Tensor:
            return nn.functional.mse_loss(torch.func.functional_call(net, params, (coordinates,)), values)

        self._gradient = torch.func.vmap(torch.func.grad(loss_of))

    def _differentiate(self, coordinates: Tensor, values: Tensor) -> None:
        detached = {name: tensor.detach() for name, tensor in self._params.items()}
        for name, gradient in self._gradient(detached, coordinates, values).items():
            self._params[name].grad = gradient


class Compiled(_Stacked):
    """torch.compile of batched products and their backward pass."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        field, names = problem.field, [entry.name for entry in problem.field.layout.entries]

        def loss_of(params: list[Tensor], coordinates: Tensor, values: Tensor) -> Tensor:
            predicted = field.apply(dict(zip(names, params, strict=True)), coordinates)
            return (predicted - values).square().mean(dim=(1, 2)).sum()

        self._loss_of = torch.compile(loss_of, dynamic=False)

    def _differentiate(self, coordinates: Tensor, values: Tensor) -> None:
        self._optimizer.zero_grad()
        self._loss_of(list(self._params.values()), coordinates, values).backward()


def fields_of_a_loop(fields: int, samples: int) -> int:
    """How many fields a loop is timed on; the others take as long, one after the other."""
    return min(fields, max(2, min(8, math.ceil((1 << 17) / samples))))
