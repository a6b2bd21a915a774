"""What every field, signal, optimiser and schedule promises, tried on each entry of their dicts.

A new variant is tested by being listed; a new signal adds an example datum to `DATA`.
"""

import dataclasses
from dataclasses import replace
from functools import cached_property
from itertools import product

import numpy as np
import pytest
import torch

from nfscale.engine.dispatch import PLAIN
from nfscale.engine.problem import FieldProblem
from nfscale.errors import CallerError
from nfscale.fields import FIELDS, MLP
from nfscale.fields.activations import ACTIVATIONS
from nfscale.fields.encodings import ENCODINGS
from nfscale.fields.initializations import INITIALIZATIONS
from nfscale.job import job_from_settings
from nfscale.layout import Layout, Params
from nfscale.media.render import orbit_pose
from nfscale.optim import METHODS, OPTIMIZERS, SCHEDULES, SOLVERS, Extra, Optimizer, Regularized, Schedule, Solver
from nfscale.rng import as_tensor, datum_seed
from nfscale.signals import SIGNALS, Grid, Image, Samples, Scene, Sound
from nfscale.signals.base import Pointwise
from nfscale.signals.tiles import Gridded, Tile, blended, box_of, place_metrics

SEEDS = as_tensor([datum_seed(0, f"datum-{index}") for index in range(3)])
CHANNELS = 2
CHANNELS_OF = {"occupancy": 1, "radiance": 4, "sdf": 1}
"""Kinds of signals that have no others."""


def scene(seed: int) -> Scene:
    """Nine views of noise that fills the scene's box."""
    poses = np.stack([orbit_pose(0.7 * view, 0.3, 4.0) for view in range(9)])
    images = np.random.default_rng(seed).integers(0, 256, (9, 5, 6, 3)).astype(np.uint8)
    return Scene(images, poses, 0.3, np.zeros(9, dtype=bool))


DATA = {
    "audio": [Sound(np.random.default_rng(n).uniform(-1, 1, (30, CHANNELS)).astype(np.float32), 40) for n in range(3)],
    "image": [np.random.default_rng(n).random((5, 6, CHANNELS)).astype(np.float32) for n in range(3)],
    "occupancy": [np.random.default_rng(n).integers(0, 2, (5, 6, 4)).astype(np.float32) for n in range(3)],
    "radiance": [scene(n) for n in range(3)],
    "sdf": [np.random.default_rng(n).normal(0, 0.1, (5, 6, 4)).astype(np.float32) for n in range(3)],
    "sphere": [np.random.default_rng(n).random((5, 6, CHANNELS)).astype(np.float32) for n in range(3)],
    "video": [np.random.default_rng(n).random((3, 5, 4, CHANNELS)).astype(np.float32) for n in range(3)],
    "volume": [np.random.default_rng(n).random((3, 5, 4, CHANNELS)).astype(np.float32) for n in range(3)],
}
"""Three data of one shape for each kind of signal, with the channels above."""

OPTIONS = {
    "esgd": [{"curvature": "shared"}, {"curvature": "per_field"}],
    "sgd": [{"nesterov": False}, {"nesterov": True}],
    "esgd_max": [{"nesterov": False}, {"nesterov": True}],
    "adahessian": [{"variant": "e"}, {"variant": "j"}],
    "shampoo": [{"graft": "none"}, {"graft": "sgd"}, {"graft": "adam"}, {"max_factor": 3}],
    "soap": [{"method": "qr"}, {"method": "eigh"}, {"max_factor": 3}],
}
"""Ways to configure an optimiser that differ in kind; others are tried with their defaults."""

OPTIMIZER_CASES = [
    pytest.param(kind, options, id="-".join([kind, *map(str, options.values())]))
    for kind in OPTIMIZERS
    for options in [*OPTIONS.get(kind, [{}]), {"regularized": True}]
]


# Fields

FIELD_OPTIONS = {
    "mlp": [
        *({"activation": activation, "encoding": encoding} for activation, encoding in product(ACTIVATIONS, ENCODINGS)),
        *({"initialization": initialization} for initialization in INITIALIZATIONS if initialization != "winner"),
        {"initialization": "winner", "spectral_centroid": 0.3},
    ],
    "mfn": [{"filter": "fourier"}, {"filter": "gabor"}],
}
"""Ways to configure a field that differ in kind; others are tried with their defaults."""

FIELD_CASES = [
    pytest.param((kind, options), id="-".join([kind, *map(str, options.values())]))
    for kind in FIELDS
    for options in FIELD_OPTIONS.get(kind, [{}])
]


@pytest.fixture(params=FIELD_CASES)
def field(request):
    kind, options = request.param
    return FIELDS[kind](dimensions=2, channels=CHANNELS, **options)


def coordinates_of(fields: int, samples: int = 10) -> torch.Tensor:
    return torch.rand(fields, samples, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_params_are_those_of_the_layout_with_a_field_axis_in_front(field):
    params = field.init(SEEDS)
    assert {name: tuple(p.shape) for name, p in params.items()} == {
        entry.name: (3, *entry.shape) for entry in field.layout.entries
    }
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in params.values())


def test_params_go_into_rows_and_back(field):
    params, layout = field.init(SEEDS), field.layout
    rows = layout.ravel(params)
    assert rows.shape == (3, layout.size)
    assert all(torch.equal(layout.unravel(rows)[name], p) for name, p in params.items())
    assert Layout.from_json(layout.to_json()) == layout
    offsets = [entry.offset for entry in layout.entries]
    assert offsets == [sum(entry.size for entry in layout.entries[:index]) for index in range(len(offsets))]


def test_init_is_a_function_of_the_seed_alone(field):
    rows = field.layout.ravel(field.init(SEEDS))
    assert torch.equal(field.layout.ravel(field.init(SEEDS.flip(0))), rows.flip(0))
    for index in range(3):
        assert torch.equal(field.layout.ravel(field.init(SEEDS[index : index + 1]))[0], rows[index])
    assert not torch.equal(rows[0], rows[1])


def test_apply_gives_each_field_values_at_its_own_coordinates(field):
    params, coordinates = field.init(SEEDS), coordinates_of(3)
    together = field.apply(params, coordinates)
    assert together.shape == (3, 10, CHANNELS)
    assert together.dtype == torch.float32
    for index in range(3):
        own = {name: p[index : index + 1] for name, p in params.items()}
        alone = field.apply(own, coordinates[index : index + 1])
        torch.testing.assert_close(alone[0], together[index], rtol=1e-4, atol=1e-5)
    moved = coordinates.clone()
    moved[1] = -moved[1]
    assert torch.equal(field.apply(params, moved)[[0, 2]], together[[0, 2]])
    assert not torch.equal(field.apply(params, moved)[1], together[1])


def test_apply_takes_one_set_of_coordinates_for_all(field):
    params, shared = field.init(SEEDS), coordinates_of(1)
    values = field.apply(params, shared)
    assert values.shape == (3, 10, CHANNELS)
    torch.testing.assert_close(values, field.apply(params, shared.repeat(3, 1, 1)), rtol=1e-4, atol=1e-5)


def test_values_depend_on_every_param(field):
    params = {name: p.requires_grad_() for name, p in field.init(SEEDS).items()}
    field.apply(params, coordinates_of(3)).square().sum().backward()
    for name, p in params.items():
        assert p.grad is not None, name
        assert (p.grad.flatten(1).abs().sum(dim=1) > 0).all(), name


def test_fields_are_frozen_and_say_what_they_are(field):
    with pytest.raises(AttributeError):
        field.channels = 5
    said = field.forward_description()
    assert FIELDS[said["kind"]] is type(field)
    assert type(field)(**said["keys"]) == field


# Signals


SIGNAL_OPTIONS = {"sdf": [{}, {"eikonal": 0.5}]}
"""Ways to configure a signal that differ in kind; others are tried with their defaults."""

SIGNAL_CASES = [
    pytest.param((kind, options), id="-".join([kind, *options]))
    for kind in SIGNALS
    for options in SIGNAL_OPTIONS.get(kind, [{}])
]


@pytest.fixture(params=SIGNAL_CASES)
def signal(request):
    kind, options = request.param
    assert kind in DATA, f"add three example data of the signal {kind!r} to DATA"
    return SIGNALS[kind](channels=CHANNELS_OF.get(kind, CHANNELS), **options), DATA[kind]


def far_of(signal) -> float:
    """A prediction so far off is worse. IoU sees signs alone, and the values it is compared with are 0 and 1."""
    return 3.0 if signal.quality_name == "iou" else 0.3


def array_of(content) -> np.ndarray:
    """The array of a content, which may be the content itself, its `values` or its `poses`."""
    if isinstance(content, Scene):
        return content.poses
    if isinstance(content, Grid):
        return content.levels
    return content if isinstance(content, np.ndarray) else content.values


def with_array(content, array: np.ndarray):
    if isinstance(content, Scene):
        return replace(content, poses=array)
    return array if isinstance(content, np.ndarray) else replace(content, values=array)


def batch_of(signal, data) -> Samples:
    samples = [signal.samples(datum) for datum in data]
    return samples[0].map(lambda *tensors: torch.stack(tensors), *samples[1:])


def parts_of(samples: Samples) -> list[Samples]:
    """What is fitted, what is checked and what is held back."""
    return [part for part in (samples, samples.check, samples.heldout) if part is not None]


def test_samples_are_coordinates_in_range_with_their_values(signal):
    signal, data = signal
    for part in [part for datum in data for part in parts_of(signal.samples(datum))]:
        count = len(part.values)
        assert len(part.coordinates) == count
        assert part.coordinates.dtype == part.values.dtype == torch.float32
        assert part.coordinates.isfinite().all()
        assert part.values.isfinite().all()
        assert part.mask is None or part.mask.shape == (count,)
        assert part.jitter is None
        if type(signal).predict is Pointwise.predict:
            assert part.coordinates.shape == (count, signal.dimensions)
            assert part.values.shape == (count, signal.channels)
            assert part.coordinates.abs().max() <= 1


def test_what_is_checked_and_held_back_has_no_checks_of_its_own(signal):
    signal, data = signal
    for part in parts_of(signal.samples(data[0]))[1:]:
        assert part.check is None
        assert part.heldout is None


class Waves:
    """Made-up fields [F]: a sine of the sum of the coordinates, at a frequency of each field's own."""

    def __init__(self, signal, frequencies: torch.Tensor) -> None:
        self.signal, self.frequencies, self.points = signal, frequencies, 0

    def __call__(self, coordinates: torch.Tensor) -> torch.Tensor:
        assert coordinates.ndim == 3
        assert len(coordinates) in (1, len(self.frequencies))
        assert coordinates.shape[2] == self.signal.dimensions
        assert coordinates.abs().max() <= 1 + 1e-6
        self.points += coordinates.shape[1]
        angle = self.frequencies[:, None, None] * coordinates.sum(dim=2, keepdim=True)
        return (angle + torch.arange(self.signal.channels)).sin()


FREQUENCIES = torch.tensor([1.0, 2.0, 3.0])


def cases_of(signal, samples: Samples) -> list[Samples]:
    """The parts of a batch, with jitter where the signal wants it."""
    parts = parts_of(samples)
    if signal.jittered:
        jitter = torch.rand(samples.values.shape[:2], generator=torch.Generator().manual_seed(0))
        parts.append(replace(samples, check=None, heldout=None, jitter=jitter))
    return parts


def test_predictions_are_like_the_values_and_take_the_points_that_are_said(signal):
    signal, data = signal
    for part in cases_of(signal, batch_of(signal, data)):
        waves = Waves(signal, FREQUENCIES)
        predicted = signal.predict(waves, part)
        assert predicted.shape == part.values.shape
        assert predicted.dtype == torch.float32
        assert predicted.isfinite().all()
        assert waves.points <= signal.points_per_sample * part.values.shape[1]
        assert signal.loss(predicted, part).isfinite().all()


def test_a_field_is_predicted_by_itself_and_a_sample_by_itself(signal):
    """So that neighbours change nothing, and many samples are predicted a few at a time."""
    signal, data = signal
    for part in cases_of(signal, batch_of(signal, data)):
        together = signal.predict(Waves(signal, FREQUENCIES), part)
        for index in range(3):
            own = slice(index, index + 1)
            alone = signal.predict(Waves(signal, FREQUENCIES[own]), part.map(lambda tensor, own=own: tensor[own]))
            torch.testing.assert_close(alone, together[own])
        middle = part.values.shape[1] // 2
        for some in (slice(None, middle), slice(middle, None)):
            few = part.map(lambda tensor, some=some: tensor[:, some])
            torch.testing.assert_close(signal.predict(Waves(signal, FREQUENCIES), few), together[:, some])


def test_predictions_can_be_differentiated_twice(signal):
    signal, data = signal
    part = cases_of(signal, batch_of(signal, data))[-1]
    frequencies = FREQUENCIES.clone().requires_grad_()
    loss = signal.loss(signal.predict(Waves(signal, frequencies), part), part).sum()
    (slope,) = torch.autograd.grad(loss, frequencies, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), frequencies)
    assert slope.isfinite().all()
    assert curvature.isfinite().all()
    assert (slope != 0).all()


def test_jitter_is_used_where_it_is_asked_for(signal):
    signal, data = signal
    if not signal.jittered:
        assert signal.jittered is False
        return
    *_, plain, jittered = cases_of(signal, replace(batch_of(signal, data), check=None, heldout=None))
    waves = Waves(signal, FREQUENCIES)
    assert not torch.equal(signal.predict(waves, plain), signal.predict(waves, jittered))


def test_samples_are_a_function_of_the_datum(signal):
    signal, data = signal
    before = array_of(data[0]).copy()
    first, second = signal.samples(data[0]), signal.samples(data[0])
    assert torch.equal(first.values, second.values)
    assert torch.equal(first.coordinates, second.coordinates)
    first.values.zero_()
    assert np.array_equal(array_of(data[0]), before)


def test_loss_and_quality_are_one_number_per_field_of_its_own(signal):
    signal, data = signal
    samples = batch_of(signal, data)
    noise = 0.1 * torch.randn(samples.values.shape, generator=torch.Generator().manual_seed(0))
    predicted = samples.values + noise
    for measure in (signal.loss, signal.quality):
        together = measure(predicted, samples)
        assert together.shape == (3,)
        assert together.isfinite().all()
        for index in range(3):
            own = samples.map(lambda tensor, index=index: tensor[index : index + 1])
            torch.testing.assert_close(measure(predicted[index : index + 1], own)[0], together[index])
        changed = predicted.clone()
        changed[1] += far_of(signal)
        assert torch.equal(measure(changed, samples)[[0, 2]], together[[0, 2]])
        assert measure(changed, samples)[1] != together[1]


def test_a_better_prediction_has_less_loss_and_higher_quality(signal):
    signal, data = signal
    samples = batch_of(signal, data)
    noise = torch.randn(samples.values.shape, generator=torch.Generator().manual_seed(0))
    near, far = samples.values + 0.01 * noise, samples.values + far_of(signal) * noise
    assert (signal.loss(near, samples) < signal.loss(far, samples)).all()
    assert (signal.quality(near, samples) > signal.quality(far, samples)).all()


def test_loss_is_a_mean_over_samples(signal):
    """Twice the samples are the same loss, so that minibatches of any size have the same unit."""
    signal, data = signal
    samples = batch_of(signal, data)
    predicted = samples.values + 0.1
    mask = None if samples.mask is None else samples.mask.repeat(1, 2)
    twice = Samples(samples.coordinates.repeat(1, 2, 1), samples.values.repeat(1, 2, 1), mask)
    torch.testing.assert_close(signal.loss(predicted.repeat(1, 2, 1), twice), signal.loss(predicted, samples))


def test_a_datum_is_reconstructed_from_values_at_the_coordinates_of_its_shape(signal):
    signal, data = signal
    for datum in data:
        shape = signal.shape_of(signal.measures(datum))
        parts, wanted = parts_of(signal.samples(datum)), signal.coordinates(shape)
        known = torch.cat([part.coordinates for part in parts])
        distance, place = (wanted[:, None] - known).abs().amax(dim=2).min(dim=1)
        assert distance.max() < 1e-5
        values = torch.cat([part.values for part in parts])[place]
        rebuilt, original = signal.reconstruct(values[None], shape)[0], signal.original(datum)
        assert np.abs(array_of(rebuilt) - array_of(original)).max() < 1e-6


def test_signals_are_frozen_name_their_quality_and_say_what_they_are(signal):
    signal, _ = signal
    with pytest.raises(AttributeError):
        signal.channels = 5
    assert signal.quality_name
    said = signal.forward_description()
    assert SIGNALS[said["kind"]] is type(signal)
    assert type(signal)(**said["keys"]) == signal


def test_a_datum_that_does_not_fit_is_refused_in_a_sentence(signal):
    signal, data = signal
    array = array_of(data[0])
    for wrong in (np.full_like(array, np.nan), np.zeros((0, *array.shape[1:]), array.dtype)):
        with pytest.raises(ValueError, match=r"\w+ \w+"):
            signal.samples(with_array(data[0], wrong))


@pytest.mark.parametrize("kind", [kind for kind, cls in SIGNALS.items() if issubclass(cls, Gridded)])
def test_a_datum_that_is_cut_and_blended_is_the_datum(kind):
    """With fields that say exactly what their blocks hold: block by block, in the order of `coordinates`."""
    signal, datum = SIGNALS[kind](channels=CHANNELS), DATA[kind][0]
    cells, per_unit = signal.grid_of(datum), signal.cells_per_unit(datum)
    assert tuple(int(signal.measures(datum)[name]) for name in signal.grid_axes) == cells
    tile = Tile.parsed({"size": 3 / per_unit, "overlap": 1 / per_unit}, signal.grid_axes, signal.whole_cells)
    cuts = tile.cuts(cells, per_unit)
    assert any(len(cut.starts) > 1 for cut in cuts)
    shapes = set()

    def evaluate(group):
        for part in group:
            block = signal.cut(datum, box_of(cuts, part.block))
            shape = signal.shape_of(signal.measures(block))
            shapes.add(signal.whole_shape(signal.measures(block) | place_metrics(signal.grid_axes, cuts, part.block)))
            samples, wanted = signal.samples(block), signal.coordinates(shape)
            assert torch.equal(signal.block_coordinates(part.places, shape), wanted), "as the block was fitted"
            known = torch.cat([one.coordinates for one in parts_of(samples)])
            yield samples.values[(wanted[:, None] - known).abs().amax(dim=2).argmin(dim=1)]

    fitted = signal.shape_of(signal.measures(datum))
    whole = blended(cuts, signal.points(fitted, fitted), CHANNELS, evaluate, together=2)
    rebuilt, original = signal.reconstruct(whole[None], fitted)[0], signal.original(datum)
    assert np.abs(array_of(rebuilt) - array_of(original)).max() < 1e-6
    assert signal.whole_quality(original, rebuilt) > 100
    assert shapes == {fitted}, "every block knows the shape of the whole"


@pytest.mark.parametrize("kind", SIGNALS)
def test_a_job_cuts_what_is_a_grid_and_refuses_the_rest_in_a_sentence(kind):
    settings = {"dataset": {"kind": "folder", "path": "."}, "signal": {"kind": kind, "tile": 2}, "output": "run"}
    if issubclass(SIGNALS[kind], Gridded):
        assert job_from_settings(settings, []).tile.size == (2,) * SIGNALS[kind].dimensions
        return
    with pytest.raises(
        CallerError, match=r"signal\.tile: such data are no grids .* of audio, image, video, volume are"
    ):
        job_from_settings(settings, [])


# Optimisers


def optimizer_of(kind: str, options: dict, learning_rate: float = 1e-2):
    """With every rate that is set apart, such as that of the params which Muon leaves to Adam, set to this one."""
    rates = [entry.name for entry in dataclasses.fields(OPTIMIZERS[kind]) if entry.name.endswith("learning_rate")]
    options = {"schedule": Schedule("cosine", total_steps=50), **dict.fromkeys(rates, learning_rate), **options}
    optimizer = OPTIMIZERS[kind](**{name: value for name, value in options.items() if name != "regularized"})
    return Regularized(optimizer, weight_decay=0.1, clip_norm=1.0) if options.get("regularized") else optimizer


def params_of(fields: int) -> Params:
    """Those of a field with a first, a hidden and a last layer, and a tensor with one more axis."""
    draw = torch.Generator().manual_seed(0)
    shapes = {
        "layers.0.weight": (4, 3),
        "layers.0.bias": (4,),
        "layers.1.weight": (4, 4),
        "layers.1.bias": (4,),
        "layers.2.weight": (2, 4),
        "layers.2.bias": (2,),
        "more": (2, 3, 2),
    }
    return {name: torch.randn(fields, *shape, generator=draw) for name, shape in shapes.items()}


def extra_of(optimizer, params: Params, step: torch.Tensor, number: int) -> Extra:
    """All that an optimiser can ask for, different at every call."""
    draw = torch.Generator().manual_seed(1000 + number)
    fields = len(step)
    random = [{name: torch.randn(p.shape, generator=draw) for name, p in params.items()} for _ in range(3)]
    return Extra(
        step=step,
        rate=torch.tensor([1.0, 0.5, 0.25])[:fields],
        hv=random[0],
        hv_fields=optimizer.wants_curvature(step),
        diagonal={name: d.abs() + 0.1 for name, d in random[1].items()},
        step_rms=torch.tensor([0.5, 2.0, 100.0])[:fields],
        probe={name: d.sign() for name, d in random[2].items()},
    )


def part_of(tree, index: slice | list[int]):
    """The same fields out of every tensor of a state or an Extra's dict."""
    if isinstance(tree, dict):
        return {name: part_of(value, index) for name, value in tree.items()}
    return tree[index].clone() if isinstance(tree, torch.Tensor) else tree


def run(optimizer, params: Params, first_steps: torch.Tensor, index: slice = slice(None), count: int = 6):
    """`count` updates with made-up gradients, of the fields in `index` only; the updates and the last state."""
    own = part_of(params, index)
    state, history = optimizer.init(own), []
    for number in range(count):
        draw = torch.Generator().manual_seed(number)
        grads = {name: torch.randn(p.shape, generator=draw) for name, p in params.items()}
        whole = extra_of(optimizer, params, first_steps + number, number)
        extra = Extra(**{name: part_of(getattr(whole, name), index) for name in Extra.__dataclass_fields__})
        updates, state = optimizer.update(part_of(grads, index), state, own, extra)
        history.append({name: u.clone() for name, u in updates.items()})
        own = {name: p + updates[name] for name, p in own.items()}
    return history, state


def tensors_of(tree) -> list[torch.Tensor]:
    return [leaf for value in tree.values() for leaf in tensors_of(value)] if isinstance(tree, dict) else [tree]


STEPS = torch.tensor([0, 10, 20])
"""The fields' steps differ; optimisers that probe at a cadence probe all three."""


@pytest.mark.parametrize(("kind", "options"), OPTIMIZER_CASES)
def test_every_state_tensor_has_the_field_axis_first(kind, options):
    optimizer, params = optimizer_of(kind, options), params_of(3)
    for state in (optimizer.init(params), run(optimizer, params, torch.zeros(3).long())[1]):
        leaves = tensors_of(state)
        assert all(isinstance(leaf, torch.Tensor) and leaf.shape[0] == 3 for leaf in leaves)


@pytest.mark.parametrize(("kind", "options"), OPTIMIZER_CASES)
def test_updates_have_the_names_shapes_and_dtype_of_the_params(kind, options):
    params = params_of(3)
    history, _ = run(optimizer_of(kind, options), params, torch.zeros(3).long())
    for updates in history:
        assert {name: u.shape for name, u in updates.items()} == {name: p.shape for name, p in params.items()}
        assert all(u.dtype == torch.float32 and u.isfinite().all() and (u != 0).any() for u in updates.values())


@pytest.mark.parametrize(("kind", "options"), OPTIMIZER_CASES)
def test_a_field_alone_gets_the_updates_it_gets_among_three(kind, options):
    optimizer, params = optimizer_of(kind, options), params_of(3)
    # Fields that begin late begin with an empty state, as after a probe at their own first step here.
    together, state = run(optimizer, params, STEPS)
    for index in range(3):
        own = slice(index, index + 1)
        alone, own_state = run(optimizer, params, STEPS, own)
        for ours, theirs in zip(alone, together, strict=True):
            for name in params:
                torch.testing.assert_close(ours[name], theirs[name][own], rtol=1e-5, atol=1e-8)
        for ours, theirs in zip(tensors_of(own_state), tensors_of(state), strict=True):
            torch.testing.assert_close(ours, theirs[own], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("kind", "options"), OPTIMIZER_CASES)
def test_the_rate_of_a_field_scales_its_updates(kind, options):
    """`Extra.rate` is 1, 1/2, 1/4 in `extra_of`: a fit at twice the learning rate is the same fit at twice the step."""
    params = params_of(3)
    single, double = (run(optimizer_of(kind, options, rate), params, STEPS, count=1)[0][0] for rate in (0.01, 0.02))
    for name in params:
        torch.testing.assert_close(double[name], 2 * single[name], rtol=1e-5, atol=0)
    optimizer, ones = optimizer_of(kind, options), torch.ones(3)
    whole = extra_of(optimizer, params, STEPS, 0)
    rates = []
    for rate in (ones, whole.rate):
        extra = replace(whole, rate=rate)
        rates.append(optimizer.update(params, optimizer.init(params), params, extra)[0])
    for name in params:
        factor = whole.rate.view(-1, *[1] * (params[name].ndim - 1))
        torch.testing.assert_close(rates[1][name], factor * rates[0][name], rtol=1e-5, atol=0)


@pytest.mark.parametrize(("kind", "options"), OPTIMIZER_CASES)
def test_updates_leave_params_and_gradients_as_they_were(kind, options):
    optimizer, params, grads = optimizer_of(kind, options), params_of(3), params_of(3)
    extra = extra_of(optimizer, params, STEPS, 0)
    now = {"params": params, "grads": grads, "hv": extra.hv, "probe": extra.probe, "diagonal": extra.diagonal}
    given = part_of(now, slice(None))
    optimizer.update(grads, optimizer.init(params), params, extra)
    for before, after in zip(tensors_of(given), tensors_of(now), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize(("kind", "options"), OPTIMIZER_CASES)
def test_elementwise_optimisers_take_rows_as_well_as_tensors_by_name(kind, options):
    optimizer, params = optimizer_of(kind, options), params_of(3)
    if not optimizer.elementwise:
        assert optimizer.elementwise is False
        return
    layout = Layout.of((name, tuple(p.shape[1:])) for name, p in params.items())
    extra = extra_of(optimizer, params, STEPS, 0)
    by_name, _ = optimizer.update(params, optimizer.init(params), params, extra)
    rows = {"rows": layout.ravel(params)}
    hv, probe, diagonal = ({"rows": layout.ravel(part)} for part in (extra.hv, extra.probe, extra.diagonal))
    by_row, _ = optimizer.update(
        rows, optimizer.init(rows), rows, replace(extra, hv=hv, probe=probe, diagonal=diagonal)
    )
    torch.testing.assert_close(by_row["rows"], layout.ravel(by_name), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("kind", "options"), OPTIMIZER_CASES)
def test_wanting_curvature_is_a_function_of_each_fields_own_step(kind, options):
    optimizer, steps = optimizer_of(kind, options), torch.arange(40)
    wanted = optimizer.wants_curvature(steps)
    assert wanted.dtype == torch.bool
    assert wanted.tolist() == [bool(optimizer.wants_curvature(step[None])) for step in steps]
    assert bool(wanted.any()) == ("hv" in optimizer.needs)
    assert bool(wanted[0]) == ("hv" in optimizer.needs)  # without a probe at step 0 there is no diagonal
    assert optimizer.needs <= {"hv", "diagonal", "cadence"}


@pytest.mark.parametrize(("kind", "options"), OPTIMIZER_CASES)
def test_steps_follow_the_gradient_downhill(kind, options):
    optimizer, params = optimizer_of(kind, options), params_of(3)
    updates, _ = optimizer.update(params, optimizer.init(params), params, extra_of(optimizer, params, STEPS, 0))
    slopes = sum((updates[name] * params[name]).flatten(1).sum(dim=1) for name in params)
    assert (slopes < 0).all()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_automatic_rate_is_a_positive_number_that_never_grows_with_width(kind):
    rates = [OPTIMIZERS[kind].auto_learning_rate(width, 1.5, 256) for width in (16, 64, 256)]
    assert all(rate > 0 for rate in rates)
    assert rates == sorted(rates, reverse=True)


# Schedules


@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules_start_at_one_never_rise_and_stay_in_the_unit_interval(kind):
    factor = Schedule(kind, total_steps=100).factor(torch.arange(150))
    assert factor.dtype == torch.float64
    assert factor[0] == 1
    assert (factor.diff() <= 0).all()
    assert (factor >= 0).all()
    assert torch.equal(factor[100:], factor[100].expand(50))


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_factor_of_a_step_does_not_depend_on_the_batch(kind):
    """In float32, which is how steps take it: a power in float64 rounds differently in and out of a vector."""
    schedule = Schedule(kind, total_steps=97, warmup=11)
    steps = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([schedule.factor(step[None]) for step in steps])
    assert torch.equal(schedule.factor(steps).float(), alone.float())
    torch.testing.assert_close(schedule.factor(steps), alone, rtol=1e-14, atol=0)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_warm_up_never_starts_at_zero_and_ends_at_one(kind):
    factor = Schedule(kind, total_steps=100, warmup=10).factor(torch.arange(11))
    assert factor[0] > 0
    assert (factor[:10].diff() > 0).all()
    assert factor[9] == factor[10] == 1


# Solvers

SOLVED = MLP(2, CHANNELS, width=8, depth=2, omega_0=10.0, omega_hidden=10.0)


def solver_of(kind: str):
    """With its defaults; one that has a learning rate gets it automatically."""
    cls = SOLVERS[kind]
    if not hasattr(cls, "auto_learning_rate"):
        return cls()
    return cls(cls.auto_learning_rate(8, 1.5, 30), Schedule("constant"))


def problem_of(index: slice | list[int] = slice(None)) -> FieldProblem:
    """The fits of the example images."""
    signal = Image(CHANNELS)
    return FieldProblem(SOLVED, signal, batch_of(signal, DATA["image"]).map(lambda tensor: tensor[index]), PLAIN)


def started(rows: int = 3) -> torch.Tensor:
    return SOLVED.layout.ravel(SOLVED.init(SEEDS))[:rows]


def solved(solver, problem: FieldProblem, rows: torch.Tensor, rate: torch.Tensor | None = None, count: int = 6):
    """Rows and losses after every one of `count` steps, and the last state."""
    state, history = solver.init(rows, SOLVED.layout), [(rows, problem.losses(rows))]
    rate = torch.ones(len(rows)) if rate is None else rate
    for number in range(count):
        steps = torch.full((len(rows),), number)
        rows, state = solver.solve(problem, rows, state, Extra(steps, rate))
        history.append((rows, problem.losses(rows)))
    return history, state


@pytest.mark.parametrize("kind", SOLVERS)
def test_solvers_are_told_apart_from_optimisers(kind):
    assert isinstance(solver_of(kind), Solver)
    assert not hasattr(Optimizer, "solve")
    assert METHODS[kind] is SOLVERS[kind]
    assert solver_of(kind).needs <= {"layer_io"}
    assert not any(isinstance(optimizer_of(other, {}), Solver) for other in OPTIMIZERS)


@pytest.mark.parametrize("kind", SOLVERS)
def test_a_solvers_state_has_the_field_axis_first_and_keeps_its_shapes(kind):
    solver, rows = solver_of(kind), started()
    first = tensors_of(solver.init(rows, SOLVED.layout))
    assert all(leaf.shape[0] == 3 for leaf in first)
    last = tensors_of(solved(solver, problem_of(), rows)[1])
    assert [(leaf.shape, leaf.dtype) for leaf in last] == [(leaf.shape, leaf.dtype) for leaf in first]


@pytest.mark.parametrize("kind", SOLVERS)
def test_a_solver_leaves_the_rows_it_was_given_and_lowers_the_losses(kind):
    rows = started()
    before = rows.clone()
    history, _ = solved(solver_of(kind), problem_of(), rows)
    assert torch.equal(rows, before)
    losses = torch.stack([losses for _, losses in history])
    assert (losses[-1] < losses[0]).all()
    if solver_of(kind).full_batch:
        assert (losses[-1] < 0.3 * losses[0]).all()
        assert (losses.diff(dim=0) <= 1e-5 * losses[:-1]).all()


@pytest.mark.parametrize("kind", SOLVERS)
def test_a_field_alone_is_solved_as_among_three(kind):
    """To rounding: the first steps of the matrix library take another path for a single matrix."""
    together, _ = solved(solver_of(kind), problem_of(), started(), count=3)
    for index in range(3):
        own = slice(index, index + 1)
        alone, _ = solved(solver_of(kind), problem_of(own), started()[own], count=3)
        for (_, ours), (_, theirs) in zip(alone, together, strict=True):
            torch.testing.assert_close(ours, theirs[own], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", SOLVERS)
def test_neighbours_that_are_lost_change_nothing_bit_for_bit(kind):
    """A field that is not finite is not lost on the others; it is left to the loop, and nothing raises."""
    healthy, _ = solved(solver_of(kind), problem_of(), started())
    broken = started().clone()
    broken[1] = torch.nan
    beside, _ = solved(solver_of(kind), problem_of(), broken)
    for (ours, _), (theirs, _) in zip(beside, healthy, strict=True):
        assert torch.equal(ours[[0, 2]], theirs[[0, 2]])


class Watched(FieldProblem):
    """Remembers the first rows, other than those it started from, at which it was asked for the losses."""

    @cached_property
    def tried(self) -> list[torch.Tensor]:
        return []

    def gradient(self, rows, fields=None):
        self._see(rows)
        return super().gradient(rows, fields)

    def losses(self, rows):
        self._see(rows)
        return super().losses(rows)

    def _see(self, rows: torch.Tensor) -> None:
        if not torch.equal(rows, started()):
            self.tried.append(rows)


@pytest.mark.parametrize("kind", SOLVERS)
def test_a_field_that_was_restarted_is_first_tried_nearer_to_its_start(kind):
    solver, first = solver_of(kind), []
    for rate in (torch.ones(3), torch.tensor([1.0, 0.5, 0.125])):
        problem = Watched(**vars(problem_of()))
        extra = Extra(torch.zeros(3).long(), rate)
        moved, _ = solver.solve(problem, started(), solver.init(started(), SOLVED.layout), extra)
        first.append(problem.tried[0] if problem.tried else moved)
    whole, careful = ((rows - started()).square().sum(dim=1).sqrt() for rows in first)
    assert torch.equal(first[0][0], first[1][0])
    assert (careful[1:] < whole[1:]).all()


@pytest.mark.parametrize("kind", SOLVERS)
def test_a_solver_says_what_is_too_large_for_it_or_that_nothing_is(kind):
    solver = solver_of(kind)
    assert solver.too_large(100, 50) is None
    why = solver.too_large(10**6, 10**6)
    assert why is None or "1,000,000 x 1,000,000" in why
