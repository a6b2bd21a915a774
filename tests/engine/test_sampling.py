"""Draws are one per stratum, without replacement within a pass, and a function of seed and step alone."""

from itertools import pairwise

import pytest
import torch

from nfscale.engine.sampling import Sampler, selected
from nfscale.rng import as_tensor, datum_seed

SIZES = [(64, 16), (60, 16), (63, 7), (17, 16), (30, 1), (9, 9)]
"""(available, per_step): some divide, most do not."""

KINDS = ["stratified", "uniform"]


def seeds_of(count: int) -> torch.Tensor:
    return as_tensor([datum_seed(0, f"datum-{index}") for index in range(count)])


def zeros(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int64)


def runs_of(available: int, per_step: int) -> list[range]:
    """The strata: consecutive, nearly equal, together all samples."""
    edges = [index * available // per_step for index in range(per_step + 1)]
    return [range(start, stop) for start, stop in pairwise(edges)]


@pytest.mark.parametrize(("available", "per_step"), SIZES)
def test_every_run_contributes_one_sample_to_every_step(available, per_step):
    drawn = Sampler(available, per_step).positions(seeds_of(6), zeros(6), 40)
    assert drawn.shape == (6, 40, per_step)
    assert drawn.dtype == torch.int64
    for place, run in enumerate(runs_of(available, per_step)):
        assert drawn[:, :, place].min() >= run.start
        assert drawn[:, :, place].max() < run.stop


@pytest.mark.parametrize(("available", "per_step"), SIZES)
def test_every_pass_visits_each_sample_of_a_run_once(available, per_step):
    passes = 5
    drawn = Sampler(available, per_step).positions(seeds_of(6), zeros(6), passes * (available // per_step + 1))
    for place, run in enumerate(runs_of(available, per_step)):
        visits = drawn[:, : passes * len(run), place].reshape(6, passes, len(run))
        assert (visits.sort(dim=2).values == torch.tensor(run)).all()


def test_passes_runs_and_fields_have_orders_of_their_own():
    drawn = Sampler(64, 2).positions(seeds_of(2), zeros(2), 64).reshape(2, 2, 32, 2)  # field, pass, step, run
    orders = [drawn[field, number, :, run] - 32 * run for field in range(2) for number in range(2) for run in range(2)]
    assert len({tuple(order.tolist()) for order in orders}) == 8
    # And not the same order begun elsewhere: 512 orders of 32 exist, so that 8 draws rarely share a multiplier.
    multipliers = [int((order[1] - order[0]) % 32) for order in orders]
    assert len(set(multipliers)) > 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("available", "per_step"), SIZES)
def test_a_draw_does_not_depend_on_the_batch(available, per_step, kind):
    seeds, steps = seeds_of(7), torch.tensor([0, 50, 3, 0, 17, 100, 50])
    sampler = Sampler(available, per_step, kind)
    together = sampler.positions(seeds, steps, 10)
    order = torch.tensor([6, 2, 4, 0, 1, 5, 3])
    assert torch.equal(sampler.positions(seeds[order], steps[order], 10), together[order])
    for index in range(7):
        alone = Sampler(available, per_step, kind).positions(seeds[index : index + 1], steps[index : index + 1], 10)
        assert torch.equal(alone[0], together[index])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("available", "per_step"), SIZES)
def test_a_draw_does_not_depend_on_how_the_steps_are_cut(available, per_step, kind):
    sampler, seeds = Sampler(available, per_step, kind), seeds_of(3)
    whole = sampler.positions(seeds, zeros(3), 60)
    for lengths in ([1] * 60, [7, 20, 33], [59, 1]):
        parts, first = [], 0
        for length in lengths:
            parts.append(sampler.positions(seeds, torch.full((3,), first), length))
            first += length
        assert torch.equal(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize(("kind", "available", "per_step"), [("uniform", 60, 16), ("uniform", 17, 40)])
def test_uniform_stays_in_range_and_reaches_everything(kind, available, per_step):
    drawn = Sampler(available, per_step, kind).positions(seeds_of(6), zeros(6), 50)
    assert drawn.shape == (6, 50, per_step)
    assert drawn.dtype == torch.int64
    assert drawn.unique().tolist() == list(range(available))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [0, 1, 1001])
def test_every_sample_is_about_as_likely_at_any_step(kind, step):
    """Chi-square over data at one step; each stratum of 10 is hit once per datum, so it counts separately."""
    available, per_step, fields = 60, 6, 3000
    drawn = Sampler(available, per_step, kind).positions(seeds_of(fields), torch.full((fields,), step), 1)
    counts = torch.bincount(drawn.flatten(), minlength=available).double()
    expected = fields * per_step / available
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    freedom = available - per_step if kind == "stratified" else available - 1
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5


def test_uniform_draws_with_replacement_and_anew_at_every_step():
    drawn = Sampler(50, 50, "uniform").positions(seeds_of(4), zeros(4), 30)
    distinct = torch.tensor([len(step.unique()) for field in drawn for step in field]).double()
    assert abs(distinct.mean() - 50 * (1 - (1 - 1 / 50) ** 50)) < 1  # 31.8 of 50, as with a fair die
    assert len({tuple(step.tolist()) for field in drawn for step in field}) == 120


def test_a_step_that_takes_all_samples_is_full():
    assert Sampler(16, 16).is_full
    assert Sampler(16, 40).is_full
    assert not Sampler(16, 15).is_full


@pytest.mark.parametrize("count", [1, 2, 7, 64, 4097])
def test_the_worse_half_is_selected_three_times_as_often(count):
    """Half of the places go to it, the others to all alike: 1.5 of them a sample against 0.5, and none is far from its
    share, since places are spread evenly."""
    errors = torch.rand(3, count, generator=torch.Generator().manual_seed(0))
    chosen = selected(errors)
    assert chosen.shape == (3, count)
    assert (chosen.diff(dim=1) >= 0).all(), "in the samples' own order"
    kept = max(1, round(count / 2))
    for field in range(3):
        counts = torch.bincount(chosen[field], minlength=count).double()
        worst = errors[field].argsort(descending=True)[:kept]
        share = torch.full((count,), 0.5, dtype=torch.float64)
        share[worst] += 0.5 * count / kept
        assert ((counts - share).abs() < 1 + 1e-9).all()
        assert ((counts.cumsum(0) - share.cumsum(0)).abs() <= 0.5 + 1e-6).all()


def test_a_selection_depends_on_the_field_alone_and_takes_ties_in_order():
    errors = torch.rand(5, 90, generator=torch.Generator().manual_seed(1))
    together = selected(errors)
    for field in range(5):
        assert torch.equal(selected(errors[field : field + 1])[0], together[field])
    tied = torch.bincount(selected(torch.zeros(1, 40))[0], minlength=40)
    assert tied[:20].sum() == 30


def test_only_steps_that_take_a_part_select():
    assert Sampler(60, 16, "error").selects
    assert not Sampler(16, 60, "error").selects
    assert not Sampler(60, 16).selects
    positions = [Sampler(60, 16, kind).positions(seeds_of(2), zeros(2), 9) for kind in ("error", "stratified")]
    assert torch.equal(*positions)
