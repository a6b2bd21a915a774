"""Weight decay and clipping beside any optimiser: the numbers of torch's AdamW and clip_grad_norm_, field by field."""

import pytest
import torch

from nfscale.engine import handwritten, updates
from nfscale.job import job_from_settings
from nfscale.optim import ESGD, OPTIMIZERS, SGD, Adam, Extra, Muon, Regularized
from nfscale.optim.regularized import clipped
from tests.optim.descents import (
    CONSTANT,
    SCHEDULE,
    SEEDS,
    descend,
    mlp_losses,
    mlp_params,
    one,
    rates_of,
    torch_descend,
)


def clip_to(longest: float):
    return lambda tensors: torch.nn.utils.clip_grad_norm_(tensors, longest) and None


NOTHING = clip_to(float("inf"))


@pytest.mark.parametrize(
    ("inner", "make"),
    [
        (Adam(2e-3, SCHEDULE), lambda tensors: torch.optim.AdamW(tensors, weight_decay=3.0)),
        (SGD(0.02, SCHEDULE), None),
    ],
    ids=["adamw", "sgd"],
)
@pytest.mark.parametrize("longest", [None, 0.05])
def test_decay_and_clipping_are_those_of_torch_on_an_mlp(inner, make, longest):
    """Of SGD, which torch does not decay that way, the decay is done to the tensors before its step."""
    optimizer, start = Regularized(inner, weight_decay=3.0, clip_norm=longest), mlp_params()
    ours, _ = descend(optimizer, mlp_losses(), start, 60)
    plain, _ = descend(inner, mlp_losses(), start, 60)
    for index, rate in enumerate((1.0, 1.0, 0.5)):
        rates = iter(rates_of(inner, 60, rate))

        def before(tensors, rates=rates):
            (NOTHING if longest is None else clip_to(longest))(tensors)
            if make is None:
                factor = 1 - 3.0 * next(rates)
                with torch.no_grad():
                    for tensor in tensors:
                        tensor.mul_(factor)

        theirs = torch_descend(
            make or (lambda tensors: torch.optim.SGD(tensors, momentum=0.9)),
            mlp_losses(slice(index, index + 1)),
            one(start, index),
            rates_of(inner, 60, rate),
            before,
        )
        for name, tensor in theirs.items():
            # Adam keeps its rate in float32, and torch adds 1e-6 to a norm of about 0.1 before it divides by it.
            torch.testing.assert_close(ours[name][index : index + 1], tensor, rtol=1e-4, atol=1e-5)
            assert (plain[name][index : index + 1] - tensor).abs().max() > 1e-3


def test_only_gradients_that_are_too_long_are_clipped_each_field_by_its_own_norm():
    draw = torch.Generator().manual_seed(0)
    grads = {"a": torch.randn(3, 4, 2, generator=draw), "b": torch.randn(3, 5, generator=draw)}
    scales = torch.tensor([1e-3, 10.0, 0.0])
    grads = {name: g * scales.view(3, *[1] * (g.ndim - 1)) for name, g in grads.items()}
    short = clipped(grads, 1.0)
    norms = torch.cat([g.flatten(1) for g in short.values()], dim=1).norm(dim=1)
    assert torch.equal(short["a"][[0, 2]], grads["a"][[0, 2]])
    assert norms[1] == pytest.approx(1.0, rel=1e-6)
    torch.testing.assert_close(short["b"][1] / short["b"][1].norm(), grads["b"][1] / grads["b"][1].norm())


def test_the_decay_of_muon_goes_with_the_rate_of_each_tensor():
    params = mlp_params()
    muon = Muon(0.02, CONSTANT, adam_learning_rate=1e-3)
    extra, zeros = Extra(torch.zeros(3).long(), torch.ones(3)), {n: torch.zeros_like(p) for n, p in params.items()}
    updates, _ = Regularized(muon, weight_decay=0.5).update(zeros, muon.init(params), params, extra)
    for name, update in updates.items():
        rate = 0.02 if name == "layers.1.weight" else 1e-3
        torch.testing.assert_close(update, -0.5 * rate * params[name])


@pytest.mark.parametrize("inner", [Adam(1e-3, CONSTANT), ESGD(0.1, CONSTANT), ESGD(0.1, CONSTANT, "per_field")])
def test_steps_that_do_updates_themselves_refuse_it(inner):
    """They know Adam and ESGD by type, and would leave the decay out."""
    regularized = Regularized(inner, weight_decay=0.1)
    assert handwritten.knows(inner)
    assert not handwritten.knows(regularized)
    assert not updates.knows(regularized)
    assert not updates.knows(regularized, all_of_them=True)
    assert regularized.needs == inner.needs
    assert regularized.update_every == getattr(inner, "update_every", 1)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_job_applies_it_to_every_kind_only_where_it_is_asked_for(kind):
    def built(*overrides: str):
        settings = {"dataset": {"kind": "digits"}, "optimizer": {"kind": kind}}
        return job_from_settings(settings, list(overrides)).build_optimizer(256)

    inner = built()
    assert type(inner) is OPTIMIZERS[kind]
    assert built("optimizer.weight_decay=0.1", "optimizer.clip_norm=2") == Regularized(inner, 0.1, 2.0)
    assert built("optimizer.weight_decay=0.1") == Regularized(inner, 0.1, None)


@pytest.mark.parametrize(("name", "value"), [("weight_decay", -1.0), ("clip_norm", 0.0)])
def test_values_that_make_no_sense_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"{name}.*{value}"):
        Regularized(Adam(0.1, CONSTANT), **{name: value})


def test_a_field_is_the_same_alone_and_among_others_that_begin_anew():
    optimizer, start = Regularized(Adam(2e-3, SCHEDULE), weight_decay=1.0, clip_norm=0.05), mlp_params()
    together, _ = descend(optimizer, mlp_losses(), start, 40, resets={13: 1})
    own = slice(2, 3)
    alone, _ = descend(optimizer, mlp_losses(own), one(start, 2), 40, rate=[0.5], seeds=SEEDS[own])
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name][own], tensor, rtol=1e-6, atol=1e-8)
