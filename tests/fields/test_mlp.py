"""The batched MLP is SIREN: field by field the network that torch.nn.Linear would make, from the papers' init."""

import math
from itertools import pairwise

import pytest
import torch

from nfscale.fields import MLP
from nfscale.rng import as_tensor, datum_seed

SEEDS = as_tensor([datum_seed(0, f"datum-{index}") for index in range(5)])
MANY_SEEDS = as_tensor([datum_seed(1, f"datum-{index}") for index in range(200)])


class Siren(torch.nn.Module):
    """One field, as Sitzmann et al. write it."""

    def __init__(self, mlp: MLP, params: dict[str, torch.Tensor]) -> None:
        super().__init__()
        widths = [mlp.dimensions, *[mlp.width] * mlp.depth, mlp.channels]
        self.omegas = [mlp.omega_0] + [mlp.omega_hidden] * (mlp.depth - 1)
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(fan_in, fan_out, dtype=torch.float64) for fan_in, fan_out in pairwise(widths)
        )
        self.load_state_dict({name: tensor.double() for name, tensor in params.items()})

    def forward(self, coordinates: torch.Tensor) -> torch.Tensor:
        hidden = coordinates
        for layer, omega in zip(self.layers[:-1], self.omegas, strict=True):
            hidden = torch.sin(omega * layer(hidden))
        return self.layers[-1](hidden)


def coordinates_of(fields: int, samples: int, dimensions: int) -> torch.Tensor:
    return torch.rand(fields, samples, dimensions, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(
    "mlp",
    [
        MLP(2, 3, width=16, depth=3),
        MLP(1, 1, width=7, depth=1, omega_0=300.0),
        MLP(3, 2, width=5, depth=4, omega_0=20.0, omega_hidden=10.0, weight_scale=2.0),
    ],
)
def test_each_field_is_a_siren_of_linear_layers(mlp):
    params = mlp.init(SEEDS)
    coordinates = coordinates_of(len(SEEDS), 11, mlp.dimensions)
    doubled = {name: p.double() for name, p in params.items()}
    ours = mlp.apply(doubled, coordinates.double())
    assert ours.shape == (len(SEEDS), 11, mlp.channels)
    for index in range(len(SEEDS)):
        siren = Siren(mlp, {name: p[index] for name, p in params.items()})
        torch.testing.assert_close(ours[index], siren(coordinates[index].double()).detach(), rtol=1e-10, atol=1e-12)


def test_single_precision_is_close_to_double():
    mlp = MLP(2, 3, width=16, depth=3)
    params, coordinates = mlp.init(SEEDS), coordinates_of(len(SEEDS), 11, 2)
    double = mlp.apply({name: p.double() for name, p in params.items()}, coordinates.double())
    single = mlp.apply(params, coordinates)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, double.float(), rtol=1e-4, atol=1e-4)


def test_coordinates_without_a_field_axis_of_their_own_are_shared():
    mlp = MLP(2, 3, width=8, depth=2)
    params, shared = mlp.init(SEEDS), coordinates_of(1, 11, 2)
    assert torch.equal(mlp.apply(params, shared), mlp.apply(params, shared.repeat(len(SEEDS), 1, 1)))


def test_the_automatic_weight_scale_spans_the_frequencies_that_the_samples_can_tell():
    for depth in (4, 5, 8):
        scale = MLP.auto_weight_scale(80, 20.0, depth, "interpolate")
        assert 20.0 * scale**depth == pytest.approx(80)
        assert 20.0 * MLP.auto_weight_scale(40, 20.0, depth, "fit") ** depth == pytest.approx(80)
    assert MLP.auto_weight_scale(10, 30.0, 4, "fit") == 1.0
    assert MLP.auto_weight_scale(1000, 30.0, 2, "interpolate") == 1.5, "more is unsafe"


@pytest.mark.parametrize("weight_scale", [1.0, 1.7])
def test_init_fills_the_bounds_of_each_layer(weight_scale):
    dimensions, width, depth, omega = 3, 24, 3, 20.0
    mlp = MLP(dimensions, 2, width=width, depth=depth, omega_0=50.0, omega_hidden=omega, weight_scale=weight_scale)
    params = mlp.init(MANY_SEEDS)
    hidden = math.sqrt(6 / width) / omega
    weight_bounds = [weight_scale / dimensions, weight_scale * hidden, weight_scale * hidden, hidden]
    bias_bounds = [1 / math.sqrt(dimensions)] + [1 / math.sqrt(width)] * depth
    for layer in range(depth + 1):
        for kind, bound in (("weight", weight_bounds[layer]), ("bias", bias_bounds[layer])):
            drawn = params[f"layers.{layer}.{kind}"].double()
            error = 4 / drawn.numel() ** 0.5  # four standard errors
            assert drawn.abs().max() <= bound * (1 + 1e-6), (layer, kind)
            assert drawn.min() < -0.97 * bound, (layer, kind)
            assert drawn.max() > 0.97 * bound, (layer, kind)
            assert abs(drawn.mean()) < error * bound / 3**0.5, (layer, kind)
            assert abs(drawn.square().mean() / bound**2 - 1 / 3) < error * (4 / 45) ** 0.5, (layer, kind)
            assert mlp.bounds(layer)[kind == "bias"] == pytest.approx(bound), (layer, kind)


def test_biases_have_the_default_bounds_of_a_torch_linear_layer():
    torch.manual_seed(0)
    for fan_in in (2, 24):
        theirs = torch.nn.Linear(fan_in, 20_000).bias.detach().abs().max()
        mlp = MLP(2, 1, width=24, depth=2)
        layer = 0 if fan_in == 2 else 1
        assert mlp.bounds(layer)[1] == pytest.approx(float(theirs), rel=1e-3)


@pytest.mark.parametrize(
    ("dimensions", "first", "second"), [(1, 3500 * (1 - math.exp(-7 * 0.2)), 0.6), (2, 50 * (1 - math.exp(-1)), 0.08)]
)
def test_winner_adds_noise_to_the_first_two_matrices_by_the_centroid(dimensions, first, second):
    keys = {"width": 24, "depth": 3, "omega_0": 50.0, "omega_hidden": 20.0}
    siren = MLP(dimensions, 2, initialization="siren", **keys).init(MANY_SEEDS)
    noisy = MLP(dimensions, 2, initialization="winner", spectral_centroid=0.4, **keys).init(MANY_SEEDS)
    deviations = {"layers.0.weight": first / 50, "layers.1.weight": second / 20}  # of a centroid of 0.2 a channel
    for name, tensor in siren.items():
        added = (noisy[name] - tensor).double()
        if name in deviations:
            error = 4 / (2 * added.numel()) ** 0.5  # four standard errors of a deviation
            assert added.std() / deviations[name] == pytest.approx(1, abs=error), name
            assert abs(added.mean()) < 4 * deviations[name] / added.numel() ** 0.5, name
        else:
            assert not added.any(), name


def test_winner_says_what_it_lacks():
    with pytest.raises(ValueError, match="initialization=winner needs spectral_centroid; a job measures it"):
        MLP(2, 1, initialization="winner")
    with pytest.raises(ValueError, match=r"constants for 1 and 2 coordinates \(sounds, images\), not for 3"):
        MLP(3, 1, initialization="winner", spectral_centroid=0.1)
    with pytest.raises(ValueError, match="a share from 0 to 1, got 2"):
        MLP(2, 1, initialization="winner", spectral_centroid=2.0)


@pytest.mark.parametrize("alpha", [2.0, 1.5, 1.1])
def test_weight_scale_multiplies_all_weight_matrices_but_the_last_and_nothing_else(alpha):
    siren = MLP(2, 3, width=16, depth=3, weight_scale=1.0).init(SEEDS)
    scaled = MLP(2, 3, width=16, depth=3, weight_scale=alpha).init(SEEDS)
    for name, tensor in siren.items():
        if name.endswith("bias") or name == "layers.3.weight":
            assert torch.equal(scaled[name], tensor), name
        elif alpha == 2.0:  # a power of two rounds nowhere
            assert torch.equal(scaled[name], alpha * tensor), name
        else:  # the bound rounds, then the product: at most 2 units in the last place
            torch.testing.assert_close(scaled[name], alpha * tensor, rtol=2**-22, atol=0, msg=name)


def test_equal_seeds_give_equal_fields_and_other_seeds_others():
    mlp = MLP(2, 3, width=16, depth=3)
    rows = mlp.layout.ravel(mlp.init(torch.stack([SEEDS[0], SEEDS[1], SEEDS[0]])))
    assert torch.equal(rows[0], rows[2])
    assert (rows[0] != rows[1]).float().mean() > 0.99


def test_what_a_seed_draws_does_not_depend_on_its_place():
    mlp = MLP(2, 3, width=16, depth=3)
    together = mlp.layout.ravel(mlp.init(SEEDS))
    order = torch.tensor([3, 0, 4, 2, 1])
    assert torch.equal(mlp.layout.ravel(mlp.init(SEEDS[order])), together[order])
    for index in range(len(SEEDS)):
        assert torch.equal(mlp.layout.ravel(mlp.init(SEEDS[index : index + 1]))[0], together[index])


def test_params_ravel_to_one_row_and_back_bit_for_bit():
    mlp = MLP(2, 3, width=16, depth=3)
    params = mlp.init(SEEDS)
    rows = mlp.layout.ravel(params)
    assert rows.shape == (len(SEEDS), 2 * 16 + 16 + 2 * (16 * 16 + 16) + 16 * 3 + 3)
    back = mlp.layout.unravel(rows)
    assert list(back) == [f"layers.{layer}.{kind}" for layer in range(4) for kind in ("weight", "bias")]
    assert all(torch.equal(back[name], params[name]) for name in params)


def test_the_formula_in_the_description_is_the_forward():
    mlp = MLP(2, 1, width=6, depth=3, omega_0=25.0, omega_hidden=15.0)
    said = mlp.forward_description()
    keys = said["keys"]
    params = {name: p[0].double() for name, p in mlp.init(SEEDS).items()}
    x = coordinates_of(1, 4, 2)[0].double()
    hidden = torch.sin(keys["omega_0"] * (x @ params["layers.0.weight"].T + params["layers.0.bias"]))
    for layer in range(1, keys["depth"]):
        weight, bias = params[f"layers.{layer}.weight"], params[f"layers.{layer}.bias"]
        hidden = torch.sin(keys["omega_hidden"] * (hidden @ weight.T + bias))
    weight, bias = params["layers.3.weight"], params["layers.3.bias"]
    ours = mlp.apply({name: p[None] for name, p in params.items()}, x[None])[0]
    torch.testing.assert_close(ours, hidden @ weight.T + bias, rtol=1e-10, atol=1e-12)
    assert said["kind"] == "mlp"
    assert MLP(**keys) == mlp


@pytest.mark.parametrize("name", ["dimensions", "channels", "width", "depth", "omega_0", "omega_hidden"])
def test_sizes_and_frequencies_that_are_not_positive_are_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"{name}.*-1"):
        MLP(**{"dimensions": 2, "channels": 1, name: -1})
