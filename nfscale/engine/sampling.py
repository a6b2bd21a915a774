"""Which of a field's own samples enter a step: keyed by the datum's seed and the field's own step.

Stratified: the ordered samples are cut into as many runs as a step takes samples, and each step takes
one sample of every run, without replacement until the run is used up. The order within a run is an
affine permutation a t + c (mod length) with a random unit a and offset c, drawn anew for every pass;
it costs one word per run and pass, where sorting random keys would cost one per sample.

Error: at each check a field's samples are drawn anew, more of those that it represents badly, and the steps until the
next check take theirs, stratified, from these. Nothing is evaluated for it that the check does not evaluate anyway.

Data whose samples stay in a file (`Samples.source`) are drawn from at the same positions: `fetched` reads those of
several steps at once and lays them out so that the steps' own draw finds them. So steps know nothing of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from nfscale.rng import Stream, philox, words
from nfscale.signals import Samples, Source

Sampling = Literal["stratified", "uniform", "error"]

DRAWN_IN_FULL = (
    "samples=full takes all samples of a datum at every step, and data of this kind stay in their files; give a number"
)
_KEPT_SHARE = 0.5
"""Of the samples of a field, with the largest errors: they survive until the next check."""
_MUTATED_SHARE = 0.5
"""Of the draws, from all samples alike: no part of a datum is forgotten while its cached error is small."""
_FETCHED_BYTES = 1 << 20
"""Of one field, read at once: little beside what a step takes, and some hundred steps' worth."""


@dataclass(frozen=True)
class Sampler:
    """Draws `per_step` of `available` samples for each field and step."""

    available: int
    per_step: int
    kind: Sampling = "stratified"

    @property
    def is_full(self) -> bool:
        return self.per_step >= self.available

    @property
    def selects(self) -> bool:
        """Whether steps see those of a field's samples that `selected` chose at its last check."""
        return self.kind == "error" and not self.is_full

    def positions(self, seeds: Tensor, first_step: Tensor, count: int) -> Tensor:
        """Sample positions of `count` steps from `first_step` [F] on: int64 [F, count, per_step]."""
        if self.kind == "uniform":
            return self._uniform(seeds, first_step, count)
        return self._stratified(seeds, first_step, count)

    def _uniform(self, seeds: Tensor, first_step: Tensor, count: int) -> Tensor:
        steps = first_step[:, None] + torch.arange(count, device=seeds.device)
        every = seeds[:, None].expand_as(steps).reshape(-1)
        drawn = words(every, Stream.SAMPLING, steps.reshape(-1), self.per_step)
        return ((drawn * self.available) >> 32).view(len(seeds), count, self.per_step)

    @cached_property
    def runs(self) -> tuple[Tensor, Tensor]:
        """Start and length of each run: int64 [per_step], [per_step]."""
        edges = torch.arange(self.per_step + 1) * self.available // self.per_step
        return edges[:-1], edges[1:] - edges[:-1]

    @cached_property
    def units(self) -> tuple[Tensor, Tensor]:
        """For each run: a row of multipliers coprime with its length (padded), and how many there are."""
        table, counts, row = self._units_by_length
        return table[row], counts[row]

    @cached_property
    def _units_by_length(self) -> tuple[Tensor, Tensor, Tensor]:
        """`units` of each of the lengths that runs have, of which there are two at most, and which a run has."""
        lengths, row = self.runs[1].unique(return_inverse=True)
        units = [_coprime(int(length)) for length in lengths]
        table = torch.nn.utils.rnn.pad_sequence(units, batch_first=True)
        return table, torch.tensor([len(one) for one in units]), row

    def _stratified(self, seeds: Tensor, first_step: Tensor, count: int) -> Tensor:
        device = seeds.device
        starts, lengths = (t.to(device) for t in self.runs)
        units, unit_counts, row = (t.to(device) for t in self._units_by_length)
        runs = torch.arange(self.per_step, device=device)
        steps = first_step[:, None, None] + torch.arange(count, device=device)[None, :, None]
        passes, places = steps // lengths, steps % lengths  # [F, count, per_step]
        first_pass = first_step[:, None] // lengths  # [F, per_step]
        spanned = (count - 1) // int(self.runs[1].min()) + 2  # passes that `count` steps can touch
        pass_numbers = first_pass[:, :, None] + torch.arange(spanned, device=device)
        w0, w1, _, _ = philox(seeds[:, None, None], (runs[None, :, None], pass_numbers, int(Stream.SAMPLING), 0))
        offsets = (w0 * lengths[:, None]) >> 32
        chosen = (w1 * unit_counts[row, None]) >> 32
        multipliers = units[row[:, None], chosen]  # [F, per_step, spanned]
        which = (passes - first_pass[:, None, :]).transpose(1, 2)  # [F, per_step, count]
        multiplier = multipliers.gather(2, which).transpose(1, 2)
        offset = offsets.gather(2, which).transpose(1, 2)
        return starts + (multiplier * places + offset) % lengths


def _coprime(length: int) -> Tensor:
    """The numbers from 1 to `length` that share no factor with it: int64, ascending."""
    numbers = torch.arange(1, length + 1)
    return numbers[torch.gcd(numbers, torch.tensor(length)) == 1]


def selected(errors: Tensor) -> Tensor:
    """Which sample takes each place until the next check, in the samples' own order: errors [F, N] -> int64 [F, N].

    Half of the places go to the half of the samples with the largest errors, the others to all alike, both spread
    evenly (systematic resampling). After EVOS (Zhang et al., "EVOS: Efficient Implicit Neural Training via EVOlutionary
    Selector", CVPR 2025): its sparse fitness evaluation and its unbiased mutation, without the crossover by frequency.
    As there, the loss is the plain mean over what is drawn.
    """
    count = errors.shape[1]
    kept = max(1, round(_KEPT_SHARE * count))
    fittest = torch.zeros_like(errors, dtype=torch.float64)
    fittest.scatter_(1, errors.argsort(dim=1, descending=True, stable=True)[:, :kept], 1 / kept)
    edges = ((1 - _MUTATED_SHARE) * fittest + _MUTATED_SHARE / count).cumsum(dim=1)
    places = (torch.arange(count, dtype=torch.float64, device=errors.device) + 0.5) / count
    return torch.searchsorted(edges / edges[:, -1:], places.expand(len(errors), -1).contiguous()).clamp_(max=count - 1)


# --- samples that stay in a file


def fetched_steps(sampler: Sampler, like: Samples, count: int, update_every: int) -> int:
    """For how many of the next `count` steps samples are read at once: a divisor of it.

    A multiple of `update_every`, for that cadence starts with what is read; or all, where no divisor is.

    Args:
        like: a batch of samples [F, N, ...] of the data, which may be empty.
    """
    tensors = [tensor for tensor in (like.coordinates, like.values, like.mask) if tensor is not None]
    step_bytes = 4 * sampler.per_step * sum(tensor.shape[2:].numel() for tensor in tensors)
    even = [steps for steps in range(update_every, count + 1, update_every) if count % steps == 0] or [count]
    return max([steps for steps in even if steps * step_bytes <= _FETCHED_BYTES], default=even[0])


def fetched(
    sources: Sequence[Source], sampler: Sampler, seeds: Tensor, steps: Tensor, count: int
) -> tuple[Samples, Sampler]:
    """What `count` steps are to see of data that stay in files, and the sampler that deals it out among them.

    That sampler takes one sample of each run of `count` at each step, in an order that it draws; so each sample is put
    where it looks in its step, and every step sees what it would see if all samples were in memory, in the same order.

    Args:
        steps: int64 [F], that the fields have had: multiples of `count`, so that the steps are one pass of the sampler.
    """
    dealing = Sampler(count * sampler.per_step, sampler.per_step)
    positions = sampler.positions(seeds, steps, count).flatten(1)
    places = torch.arange(sampler.per_step, device=seeds.device).expand(len(seeds), -1)
    if not dealing.is_full:
        places = dealing.positions(seeds, steps, count).flatten(1)
    parts: list[Samples] = []
    for source, wanted, place in zip(sources, positions.cpu(), places.cpu(), strict=True):
        drawn = source.draw(wanted)
        parts.append(drawn.map(lambda tensor, place=place: torch.empty_like(tensor).index_copy_(0, place, tensor)))
    return parts[0].map(lambda *tensors: torch.stack(tensors).to(seeds.device), *parts[1:]), dealing
