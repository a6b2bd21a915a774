"""One training loop for every model here: AdamW, warm-up and cosine, averaged weights, early stopping."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

LossOf = Callable[[nn.Module, Tensor], Tensor]
"""The mean loss of a model on rows given by their positions, int64 [B]."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a model is trained."""

    steps: int
    batch: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    average: float = 0.0
    """Of the exponential moving average that is kept of the model (0: none), with a warm-up."""
    evaluate_every: int = 0
    """Steps between two looks at the held-out loss; 0: none, and the last model counts."""
    patience: int = 6
    """Looks without a better held-out loss after which training ends."""


@dataclass
class Trained:
    """A model and how it came about."""

    model: nn.Module
    steps: int
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    """(step, training loss since the last look, held-out loss)"""

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.model.parameters())


def train(
    model: nn.Module,
    loss_of: LossOf,
    rows: int,
    schedule: Schedule,
    seed: int,
    held_out: Callable[[nn.Module], float] | None = None,
) -> Trained:
    """Train a model on `rows` rows in batches that go round in epochs; the best by held-out loss where there is one.

    Args:
        held_out: the loss of a model on rows that it does not see; a lower one counts as better.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
    averaged = copy.deepcopy(model) if schedule.average else model
    best, best_loss, best_step, since = copy.deepcopy(averaged), math.inf, 0, 0.0
    batch = min(schedule.batch, rows)
    curve: list[tuple[int, float, float]] = []
    order, at, step = torch.randperm(rows, generator=generator), 0, 0
    for step in range(1, schedule.steps + 1):
        if at + batch > rows:
            order, at = torch.randperm(rows, generator=generator), 0
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * _factor(step, schedule.steps)
        loss = loss_of(model.train(), order[at : at + batch])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        at, since = at + batch, since + loss.item()
        if schedule.average:
            _average(averaged, model, min(schedule.average, (1 + step) / (10 + step)))
        if held_out is None or not schedule.evaluate_every or step % schedule.evaluate_every:
            continue
        with torch.no_grad():
            found = held_out(averaged.eval())
        curve.append((step, since / schedule.evaluate_every, found))
        since = 0.0
        if found < best_loss:
            best, best_loss, best_step = copy.deepcopy(averaged), found, step
        elif step - best_step >= schedule.patience * schedule.evaluate_every:
            break
    return Trained((best if curve else averaged).eval(), best_step or step, curve)


def _factor(step: int, steps: int) -> float:
    """Of the learning rate: a rise over 5 % of the steps, then half a cosine."""
    rise = max(1, steps // 20)
    return step / rise if step < rise else 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


@torch.no_grad()
def _average(averaged: nn.Module, model: nn.Module, decay: float) -> None:
    for mine, theirs in zip(averaged.parameters(), model.parameters(), strict=True):
        mine.lerp_(theirs, 1 - decay)
    for mine, theirs in zip(averaged.buffers(), model.buffers(), strict=True):
        mine.copy_(theirs)
