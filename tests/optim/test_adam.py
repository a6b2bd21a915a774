"""Our Adam is torch.optim.Adam, field by field, each field with a step and a rate of its own."""

import pytest
import torch

from nfscale.fields import MLP
from nfscale.optim import Adam, Extra, Schedule
from nfscale.optim.curvature import gradient
from nfscale.rng import as_tensor, datum_seed

FIELDS = 3
MLP_FIELD = MLP(2, 1, width=8, depth=2, omega_0=10.0, omega_hidden=5.0, weight_scale=1.0)
SEEDS = as_tensor([datum_seed(0, f"datum-{index}") for index in range(FIELDS)])


def test_adam_is_torch_adam_for_each_field_with_its_own_step_and_rate():
    """Field 1 starts anew on the way and field 2 at half the rate, so that steps and rates differ within the batch.

    In double precision, since descents amplify what rounds; Adam itself keeps its rate in float32, hence 1e-6.
    """
    adam = Adam(learning_rate=2e-3, schedule=Schedule("cosine", total_steps=150, warmup=10), beta1=0.8, beta2=0.95)
    draw = torch.Generator().manual_seed(0)
    coordinates = torch.rand(FIELDS, 20, 2, generator=draw, dtype=torch.float64) * 2 - 1
    values = torch.rand(FIELDS, 20, 1, generator=draw, dtype=torch.float64) - 0.5

    def losses(params):
        return (MLP_FIELD.apply(params, coordinates) - values).square().mean(dim=(1, 2))

    def own_copy(index: int) -> list[torch.Tensor]:
        return [p[index : index + 1].clone().requires_grad_() for p in params.values()]

    def torch_adam(tensors: list[torch.Tensor]) -> torch.optim.Adam:
        return torch.optim.Adam(tensors, lr=1.0, betas=(0.8, 0.95), eps=1e-8)

    params = {n: p.double() for n, p in MLP_FIELD.init(SEEDS).items()}
    state = adam.init(params)
    steps, rate = torch.zeros(FIELDS, dtype=torch.int64), torch.tensor([1.0, 1.0, 0.5])
    theirs = [own_copy(index) for index in range(FIELDS)]
    optimizers = [torch_adam(tensors) for tensors in theirs]
    first_loss = losses(params)
    for iteration in range(120):
        if iteration == 37:
            steps[1] = 0
            for moments in state.values():
                for moment in moments.values():
                    moment[1] = 0
            optimizers[1] = torch_adam(theirs[1])
        for index, (tensors, optimizer) in enumerate(zip(theirs, optimizers, strict=True)):
            named = dict(zip(params, tensors, strict=True))
            predicted = MLP_FIELD.apply(named, coordinates[index : index + 1])
            optimizer.zero_grad()
            (predicted - values[index]).square().mean().backward()
            optimizer.param_groups[0]["lr"] = 2e-3 * float(rate[index]) * float(adam.schedule.factor(steps)[index])
            optimizer.step()
        _, grads = gradient(losses, params)
        updates, state = adam.update(grads, state, params, Extra(steps, rate))
        params = {name: p + updates[name] for name, p in params.items()}
        steps = steps + 1
    assert steps.tolist() == [120, 83, 120]
    assert (losses(params) < 0.5 * first_loss).all()
    for index in range(FIELDS):
        for name, tensor in zip(params, theirs[index], strict=True):
            torch.testing.assert_close(params[name][index], tensor[0].detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e4])
def test_adam_is_torch_adam_at_gradients_of_any_size(scale):
    """Tiny gradients show where epsilon is added, large ones what the moments lose."""
    adam = Adam(learning_rate=0.1, schedule=Schedule("constant"))
    draw = torch.Generator().manual_seed(1)
    params = {"rows": torch.zeros(2, 50)}
    theirs = torch.zeros(2, 50, requires_grad=True)
    optimizer, state = torch.optim.Adam([theirs], lr=0.1), adam.init(params)
    for iteration in range(40):
        noise = scale * torch.randn(2, 50, generator=draw)
        theirs.grad = noise.clone()
        optimizer.step()
        extra = Extra(torch.full((2,), iteration), torch.ones(2))
        updates, state = adam.update({"rows": noise}, state, params, extra)
        params = {"rows": params["rows"] + updates["rows"]}
    torch.testing.assert_close(
        params["rows"], theirs.detach(), rtol=1e-5, atol=1e-6 * float(theirs.detach().abs().max())
    )


def test_the_first_step_is_the_learning_rate_against_the_sign_of_the_gradient():
    adam = Adam(learning_rate=0.1, schedule=Schedule("constant"))
    grads = {"rows": torch.tensor([[3.0, -2e3], [-1e-3, 5.0]])}
    updates, _ = adam.update(grads, adam.init(grads), grads, Extra(torch.zeros(2).long(), torch.tensor([1.0, 0.25])))
    torch.testing.assert_close(updates["rows"], torch.tensor([[-0.1, 0.1], [0.025, -0.025]]), rtol=1e-4, atol=0)


def test_adam_needs_nothing_but_gradients():
    adam = Adam(learning_rate=0.1, schedule=Schedule())
    assert adam.needs == frozenset()
    assert adam.wants_curvature(torch.arange(4)).tolist() == [False] * 4


def test_the_automatic_rate_falls_with_width_large_scales_and_small_minibatches():
    assert Adam.auto_learning_rate(64, 1.5, 256) == pytest.approx(1e-3)
    assert Adam.auto_learning_rate(128, 1.5, 256) == pytest.approx(5e-4)
    assert Adam.auto_learning_rate(64, 2.0, 256) == pytest.approx(5e-4)
    assert Adam.auto_learning_rate(64, 2.0, 64) == pytest.approx(2.5e-4)
