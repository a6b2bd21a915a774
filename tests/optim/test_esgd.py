"""ESGD's parts against closed forms: products with known Hessians, the norms of their rows, the step, its rate.

Throughout, a quadratic field has the loss x^T H x / 2 + g^T x, whose Hessian H and gradient H x + g are known.
"""

import math

import pytest
import torch

from nfscale.fields import MLP
from nfscale.optim import ESGD, Extra, Schedule
from nfscale.optim.curvature import gradient, gradient_and_hvp
from nfscale.optim.esgd import accumulate, corrected, rms_of
from nfscale.rng import Stream, as_tensor, datum_seed, rademacher

CONSTANT = Schedule("constant")
SEEDS = as_tensor([datum_seed(0, f"datum-{index}") for index in range(3)])
SMALL_MLP = MLP(2, 2, width=4, depth=2, omega_0=5.0, omega_hidden=3.0)


def symmetric(fields: int, size: int, seed: int = 0) -> torch.Tensor:
    """Dense random symmetric matrices [F, P, P], float64, with rows of unequal norm."""
    draw = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-1, 1, size, dtype=torch.float64)
    matrix = torch.randn(fields, size, size, generator=draw, dtype=torch.float64) * scales[:, None] * scales
    return (matrix + matrix.mT) / 2


def quadratic(hessians: torch.Tensor, linear: torch.Tensor):
    def losses(params):
        x = params["x"]
        return 0.5 * torch.einsum("fi,fij,fj->f", x, hessians, x) + (linear * x).sum(dim=1)

    return losses


def mlp_losses(coordinates: torch.Tensor, values: torch.Tensor, scale: float = 1.0):
    def losses(params):
        return scale * (SMALL_MLP.apply(params, coordinates) - values).square().mean(dim=(1, 2))

    return losses


def mlp_data(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    coordinates = torch.rand(3, 9, 2, generator=draw, dtype=torch.float64) * 2 - 1
    values = torch.rand(3, 9, 2, generator=draw, dtype=torch.float64) - 0.5
    return coordinates.to(dtype), values.to(dtype)


def mlp_params(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: p.to(dtype) for name, p in SMALL_MLP.init(SEEDS).items()}


def test_the_product_with_a_quadratic_hessian_is_the_matrix_product():
    hessians, draw = symmetric(3, 7), torch.Generator().manual_seed(1)
    x, linear, probe = (torch.randn(3, 7, generator=draw, dtype=torch.float64) for _ in range(3))
    losses, grads, products = gradient_and_hvp(quadratic(hessians, linear), {"x": x}, {"x": probe})
    gradients = (hessians @ x[:, :, None])[:, :, 0] + linear
    torch.testing.assert_close(products["x"], (hessians @ probe[:, :, None])[:, :, 0])
    torch.testing.assert_close(grads["x"], gradients)
    torch.testing.assert_close(losses, 0.5 * (x * (gradients + linear)).sum(dim=1))
    assert not any(t.requires_grad for t in (losses, grads["x"], products["x"]))


def test_the_product_of_each_mlp_is_that_of_its_full_hessian():
    coordinates, values = mlp_data(torch.float64)
    params = mlp_params(torch.float64)
    layout = SMALL_MLP.layout
    probe = layout.unravel(rademacher(SEEDS, Stream.PROBE, 0, layout.size).double())
    _, _, products = gradient_and_hvp(mlp_losses(coordinates, values), params, probe)
    for index in range(3):

        def loss(row, index=index):
            predicted = SMALL_MLP.apply(layout.unravel(row[None]), coordinates[index : index + 1])
            return (predicted - values[index]).square().mean()

        row = layout.ravel(params)[index]
        hessian = torch.autograd.functional.hessian(loss, row)
        torch.testing.assert_close(layout.ravel(products)[index], hessian @ layout.ravel(probe)[index])
        _, theirs = torch.autograd.functional.hvp(loss, row, layout.ravel(probe)[index])
        torch.testing.assert_close(layout.ravel(products)[index], theirs)


def test_gradients_are_those_that_come_with_the_product():
    coordinates, values = mlp_data(torch.float32)
    params = mlp_params(torch.float32)
    losses, grads = gradient(mlp_losses(coordinates, values), params)
    with_product = gradient_and_hvp(mlp_losses(coordinates, values), params, params)
    torch.testing.assert_close(losses, with_product[0])
    for name in params:
        torch.testing.assert_close(grads[name], with_product[1][name])


def test_the_own_diagonal_is_the_row_norms_of_the_hessian():
    """Within three standard errors for every row, and the errors have the size that theory gives them.

    With signs v, E[(Hv)_i^4] = 3 ||H_i||^4 - 2 sum_j H_ij^4, so one probe of (Hv)_i^2 has the variance
    2 (||H_i||^4 - sum_j H_ij^4); the running mean weighs probe k of n by (1 - b) b^(n-k) / (1 - b^n). Many
    fields have the same Hessian, two of them in turn, and each field probes of its own: their mean finds a
    bias far below the error of one field.
    """
    size, fields, probes, beta2 = 12, 120, 1500, 0.998
    seeds = as_tensor([datum_seed(7, f"datum-{index}") for index in range(fields)])
    hessians = symmetric(2, size).repeat(fields // 2, 1, 1)
    losses_of = quadratic(hessians, torch.zeros(fields, size, dtype=torch.float64))
    esgd = ESGD(0.0, CONSTANT, curvature="per_field", update_every=1, beta2=beta2)
    params = {"x": torch.ones(fields, size, dtype=torch.float64)}
    state = esgd.init(params)
    for step in range(probes):
        probe = {"x": rademacher(seeds, Stream.PROBE, step, size).double()}
        _, grads, products = gradient_and_hvp(losses_of, params, probe)
        steps = torch.full((fields,), step)
        extra = Extra(steps, torch.ones(fields), hv=products, hv_fields=esgd.wants_curvature(steps))
        _, state = esgd.update(grads, state, params, extra)
    assert state["probes"].tolist() == [probes] * fields
    estimated = corrected(state["square"], state["probes"], beta2)["x"].square()
    row_norms = hessians.square().sum(dim=2)
    weights = (1 - beta2) * beta2 ** torch.arange(probes, dtype=torch.float64) / (1 - beta2**probes)
    variance = 2 * (row_norms.square() - hessians.pow(4).sum(dim=2)) * weights.square().sum()
    errors = ((estimated - row_norms) / variance.sqrt()).view(-1, 2, size)  # in standard errors of one field
    assert errors.mean(dim=0).abs().max() < 3 / (fields / 2) ** 0.5
    assert 0.9 < errors.square().mean().sqrt() < 1.1


@pytest.mark.parametrize("beta2", [0.5, 0.9, 0.999])
@pytest.mark.parametrize("probes", [1, 2, 17])
def test_probes_that_always_say_the_same_give_that_diagonal_whatever_their_number(probes, beta2):
    esgd = ESGD(0.0, CONSTANT, curvature="per_field", update_every=1, beta2=beta2)
    product = {"x": torch.tensor([[3.0, -0.5, 1e-3], [-40.0, 2.0, 7.0]])}
    state = esgd.init(product)
    for step in range(probes):
        steps = torch.full((2,), step)
        extra = Extra(steps, torch.ones(2), hv=product, hv_fields=torch.tensor([True, True]))
        _, state = esgd.update(product, state, product, extra)
    diagonal = corrected(state["square"], state["probes"], beta2)
    torch.testing.assert_close(diagonal["x"], product["x"].abs(), rtol=1e-5 / (1 - beta2) ** 0.5, atol=0)


def test_a_probe_counts_only_for_the_fields_that_want_it():
    esgd = ESGD(0.0, CONSTANT, curvature="per_field", update_every=10, beta2=0.9)
    assert esgd.wants_curvature(torch.tensor([0, 1, 10, 15, 20])).tolist() == [True, False, True, False, True]
    params = {"x": torch.ones(2, 3)}
    state = esgd.init(params)
    for step, size in ((torch.tensor([0, 0]), 2.0), (torch.tensor([10, 3]), 6.0)):
        extra = Extra(step, torch.ones(2), hv={"x": torch.full((2, 3), size)}, hv_fields=esgd.wants_curvature(step))
        _, state = esgd.update(params, state, params, extra)
    assert state["probes"].tolist() == [2, 1]
    diagonal = corrected(state["square"], state["probes"], 0.9)["x"]
    mean = (0.9 * 4 + 36) / 1.9  # the running mean of 2^2 and 6^2, weighed 0.09 and 0.1
    torch.testing.assert_close(diagonal, torch.tensor([mean**0.5, 2.0])[:, None].expand(2, 3))


def test_a_step_without_a_product_keeps_the_diagonal():
    esgd = ESGD(0.0, CONSTANT, curvature="per_field", beta2=0.9)
    params = {"x": torch.ones(2, 3)}
    extra = Extra(torch.zeros(2).long(), torch.ones(2), hv=params, hv_fields=torch.tensor([True, True]))
    _, state = esgd.update(params, esgd.init(params), params, extra)
    before = state["square"]["x"].clone()
    _, state = esgd.update(params, state, params, Extra(torch.ones(2).long(), torch.ones(2)))
    assert torch.equal(state["square"]["x"], before)
    assert state["probes"].tolist() == [1, 1]


def test_accumulate_weighs_the_probes_as_a_running_mean():
    square = {"x": torch.zeros(1, 1)}
    for product in (1.0, 2.0, 3.0):
        accumulate(square, {"x": torch.tensor([[product]])}, beta2=0.75)
    assert float(square["x"]) == pytest.approx(0.25 * (0.75**2 * 1 + 0.75 * 4 + 9))


@pytest.mark.parametrize("curvature", ["shared", "per_field"])
def test_a_step_is_the_mean_momentum_over_the_damped_diagonal(curvature):
    """Against the formula written out, with a constant diagonal D and gradients that change."""
    beta1, damping, rate = 0.7, 0.1, 0.3
    esgd = ESGD(rate, CONSTANT, curvature=curvature, update_every=1, beta1=beta1, damping=damping, clip=None)
    diagonal = {"a": torch.tensor([[1.0, 4.0], [2.0, 2.0]]), "b": torch.tensor([[[7.0]], [[5.0]]])}
    floor = damping * torch.tensor([(1 + 4 + 7) / 3, (2 + 2 + 5) / 3])
    draw = torch.Generator().manual_seed(0)
    state = esgd.init(diagonal)
    momentum = {name: torch.zeros_like(d) for name, d in diagonal.items()}
    for step in range(5):
        grads = {name: torch.randn(d.shape, generator=draw) for name, d in diagonal.items()}
        steps = torch.full((2,), step)
        shared = {"diagonal": diagonal, "step_rms": torch.ones(2)}
        own = {"hv": diagonal, "hv_fields": torch.tensor([True, True])}
        extra = Extra(steps, torch.tensor([1.0, 0.5]), **(shared if curvature == "shared" else own))
        updates, state = esgd.update(grads, state, diagonal, extra)
        for name, d in diagonal.items():
            momentum[name] = beta1 * momentum[name] + (1 - beta1) * grads[name]
            shape = [-1, *[1] * (d.ndim - 1)]
            mean = momentum[name] / (1 - beta1 ** (step + 1))
            expected = -rate * torch.tensor([1.0, 0.5]).view(shape) * mean / (d + floor.view(shape))
            torch.testing.assert_close(updates[name], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("curvature", ["shared", "per_field"])
@pytest.mark.parametrize("scale", [1e3, 1e-3])
def test_scaling_the_loss_leaves_the_updates_unchanged(curvature, scale):
    """Both runs walk the path of the unscaled one; only what they are told of the loss differs."""
    coordinates, values = mlp_data(torch.float32)
    layout = SMALL_MLP.layout
    esgd = ESGD(0.05, CONSTANT, curvature=curvature, update_every=2, clip=1.0)
    params = mlp_params(torch.float32)
    states = [esgd.init(params), esgd.init(params)]
    squares = [{name: torch.zeros_like(p) for name, p in params.items()} for _ in range(2)]
    for step in range(6):
        steps = torch.full((3,), step)
        probe = layout.unravel(rademacher(SEEDS, Stream.PROBE, step, layout.size))
        updates = []
        for run, factor in enumerate((1.0, scale)):
            _, grads, products = gradient_and_hvp(mlp_losses(coordinates, values, factor), params, probe)
            if curvature == "per_field":
                extra = Extra(steps, torch.ones(3), hv=products, hv_fields=esgd.wants_curvature(steps))
            else:
                accumulate(squares[run], products, 0.9)
                diagonal = corrected(squares[run], steps + 1, 0.9)
                extra = Extra(steps, torch.ones(3), diagonal=diagonal, step_rms=torch.full((3,), 0.02))
            update, states[run] = esgd.update(grads, states[run], params, extra)
            updates.append(layout.ravel(update))
        for ours, scaled in zip(*updates, strict=True):
            torch.testing.assert_close(scaled, ours, rtol=1e-4, atol=1e-4 * float(ours.square().mean().sqrt()))
        params = {name: p + layout.unravel(updates[0])[name] for name, p in params.items()}


def test_clip_limits_the_root_mean_square_of_a_step():
    """Field 0 is far too long, field 1 a little, field 2 short enough: it is left alone."""
    draw = torch.Generator().manual_seed(0)
    direction = {"a": torch.randn(3, 4, 5, generator=draw), "b": torch.randn(3, 6, generator=draw)}
    lengths = rms_of(direction)
    typical = lengths * torch.tensor([1e-3, 0.4, 0.6])
    extra = Extra(torch.zeros(3).long(), torch.tensor([1.0, 0.5, 1.0]))
    clipped = ESGD(0.1, CONSTANT, clip=2.0).scaled({n: d.clone() for n, d in direction.items()}, typical, extra)
    expected = 0.1 * torch.tensor([1.0, 0.5, 1.0]) * torch.minimum(lengths, 2.0 * typical)
    torch.testing.assert_close(rms_of(clipped), expected)
    for name, tensor in direction.items():  # shorter, but along the same line
        ratio = clipped[name] / tensor
        assert (ratio < 0).all()
        torch.testing.assert_close(ratio.flatten(1), (-expected / lengths)[:, None].expand(3, tensor[0].numel()))


def test_without_clip_a_step_is_as_long_as_its_direction():
    direction = {"x": torch.full((1, 4), 100.0)}
    extra = Extra(torch.zeros(1).long(), torch.ones(1))
    update = ESGD(0.1, CONSTANT, clip=None).scaled(direction, torch.tensor([1e-3]), extra)
    torch.testing.assert_close(update["x"], torch.full((1, 4), -10.0))


def test_rms_is_over_all_params_of_a_field():
    params = {"a": torch.tensor([[1.0, 2.0], [0.0, 0.0]]), "b": torch.tensor([[[2.0]], [[6.0]]])}
    torch.testing.assert_close(rms_of(params), torch.tensor([3.0, 12.0]).sqrt())


def test_shared_curvature_without_a_diagonal_is_refused_with_the_way_out():
    esgd, params = ESGD(0.1, CONSTANT), {"x": torch.ones(1, 2)}
    with pytest.raises(ValueError, match=r"needs a calibration.*per_field"):
        esgd.update(params, esgd.init(params), params, Extra(torch.zeros(1).long(), torch.ones(1)))


def test_curvature_decides_what_is_needed():
    assert ESGD(0.1, CONSTANT, curvature="shared").needs == {"diagonal"}
    assert ESGD(0.1, CONSTANT, curvature="per_field").needs == {"hv"}
    assert not ESGD(0.1, CONSTANT, curvature="shared").wants_curvature(torch.arange(20)).any()


@pytest.mark.parametrize(("name", "value"), [("update_every", 0), ("clip", 0.0), ("clip", -1.0)])
def test_values_that_make_no_sense_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"{name}.*{value}"):
        ESGD(0.1, CONSTANT, **{name: value})


def test_esgd_descends_a_quadratic_whose_curvatures_differ_a_millionfold():
    """The diagonal of a diagonal Hessian is exact, so one rate suits all its directions."""
    curvatures = torch.logspace(-3, 3, 7)[None].repeat(2, 1)
    esgd = ESGD(0.5, CONSTANT, curvature="per_field", update_every=1, beta1=0.0, damping=0.0)
    params = {"x": torch.ones(2, 7)}
    state = esgd.init(params)
    for step in range(10):
        grads, steps = {"x": curvatures * params["x"]}, torch.full((2,), step)
        probe = rademacher(SEEDS[:2], Stream.PROBE, step, 7)
        extra = Extra(steps, torch.ones(2), hv={"x": curvatures * probe}, hv_fields=esgd.wants_curvature(steps))
        updates, state = esgd.update(grads, state, params, extra)
        params = {"x": params["x"] + updates["x"]}
    torch.testing.assert_close(params["x"], torch.full((2, 7), 0.5**10), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [1, 1, 1, 1, 1]),
        ("cosine", [1, (1 + math.sqrt(0.5)) / 2, 0.5, 0, 0]),
        ("exponential", [1, 10**-0.5, 0.1, 0.01, 0.01]),
        ("step", [1, 1, 0.1, 0.01, 0.01]),
    ],
)
def test_schedules_at_known_steps(kind, expected):
    factor = Schedule(kind, total_steps=100).factor(torch.tensor([0, 25, 50, 100, 170]))
    assert factor.dtype == torch.float64
    assert factor.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", ["constant", "cosine", "exponential", "step"])
def test_warm_up_rises_linearly_to_one_and_the_decay_follows(kind):
    schedule = Schedule(kind, total_steps=120, warmup=20)
    rising = schedule.factor(torch.arange(20))
    assert rising.tolist() == pytest.approx([(step + 1) / 20 for step in range(20)])
    after = schedule.factor(torch.arange(20, 140))
    assert torch.equal(after, Schedule(kind, total_steps=100).factor(torch.arange(120)))
    assert after[0] == 1


def test_the_factor_of_a_field_is_its_own_steps_whatever_its_neighbours():
    schedule = Schedule("cosine", total_steps=100, warmup=7)
    steps = torch.randperm(130, generator=torch.Generator().manual_seed(0))
    together = schedule.factor(steps)
    assert together.tolist() == [schedule.factor(step[None]).item() for step in steps]


@pytest.mark.parametrize("curvature", ["shared", "per_field"])
def test_the_rate_of_a_step_is_that_of_the_fields_own_step(curvature):
    schedule = Schedule("cosine", total_steps=100, warmup=10)
    esgd = ESGD(0.2, schedule, curvature=curvature, beta1=0.0, damping=0.0, clip=None)
    ones, steps = {"x": torch.ones(4, 2)}, torch.tensor([0, 5, 10, 55])
    extra = Extra(steps, torch.ones(4), hv=ones, hv_fields=torch.ones(4, dtype=torch.bool), diagonal=ones)
    updates, _ = esgd.update(ones, esgd.init(ones), ones, extra)
    expected = -0.2 * torch.tensor([0.1, 0.6, 1.0, 0.5])
    torch.testing.assert_close(updates["x"], expected[:, None].expand(4, 2))
