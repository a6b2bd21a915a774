"""Blocks of a grid: where they begin, what they count, and that a whole shows nothing of them."""

import itertools

import numpy as np
import pytest
import torch

from nfscale.signals import Audio, Image, Sound, Volume, Voxels
from nfscale.signals.tiles import Cut, Points, Tile, blended, block_id, by_whole, parts, whole_id

AXES = ("height", "width")


@pytest.mark.parametrize(
    ("given", "size", "overlap"),
    [
        (256, (256, 256), (16, 16)),
        ("64x32", (64, 32), (4, 2)),
        ([64, 32.0], (64, 32), (4, 2)),
        ({"size": "8", "overlap": 0}, (8, 8), (0, 0)),
        ({"size": [8, 20], "overlap": [4, 1]}, (8, 20), (4, 1)),
        (2, (2, 2), (1, 1)),
        (1, (1, 1), (0, 0)),
    ],
)
def test_a_tile_is_written_in_several_ways(given, size, overlap):
    tile = Tile.parsed(given, AXES, whole_cells=True)
    assert tile == Tile(size, overlap)
    assert Tile.parsed({"size": list(size), "overlap": list(overlap)}, AXES, whole_cells=True) == tile


def test_of_sounds_it_is_seconds():
    tile = Tile.parsed(0.5, ("samples",), whole_cells=False)
    assert tile == Tile((0.5,), (0.03125,))
    (cut,) = tile.cuts((100,), 40.0)
    assert (cut.size, cut.starts[:2]) == (20, (0, 16))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("3x3x3", r"cannot read the size '3x3x3'; write a number for all axes or one for each \(height, width\)"),
        ("many", "cannot read the size 'many'"),
        (True, "cannot read the size True"),
        (float("inf"), "cannot read the size inf"),
        ({"overlap": 2}, "cannot read the size None"),
        (2.5, "the size is a whole number of cells, got 2.5"),
        (0, "a tile's size is above 0, got 0"),
        ({"size": 8, "overlap": 5}, "overlap is at least 0 and at most half its size, got 5"),
        ({"size": 8, "overlap": -1}, "overlap is at least 0 and at most half its size, got -1"),
        ({"size": 8, "sise": 5}, "unknown key sise; accepted: size, overlap"),
    ],
)
def test_what_is_no_tile_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Tile.parsed(given, AXES, whole_cells=True)


CUTS = [
    Cut.of(cells, size, overlap)
    for cells, size in itertools.product((1, 7, 16, 17, 31, 64, 113, 200), (1, 4, 7, 16, 64))
    for overlap in range(size // 2 + 1)
]


def test_blocks_cover_an_axis_share_enough_and_have_one_size():
    for cut in CUTS:
        assert cut.size <= cut.cells
        assert (cut.starts[0], cut.starts[-1] + cut.size) == (0, cut.cells)
        shared = [before + cut.size - after for before, after in itertools.pairwise(cut.starts)]
        assert all(0 <= one < cut.size for one in shared)
    assert Cut.of(100, 40, 10).starts == (0, 30, 60)
    assert Cut.of(101, 40, 10).starts == (0, 20, 40, 61), "one block more, and all share more"
    assert Cut.of(30, 40, 10) == Cut(30, 30, (0,)), "less than a tile is one block"


@pytest.mark.parametrize("overlap", [0, 1, 3, 8])
def test_neighbours_share_what_is_asked_for(overlap):
    for cells in range(17, 150):
        cut = Cut.of(cells, 16, overlap)
        assert all(before + 16 - after >= overlap for before, after in itertools.pairwise(cut.starts))


def test_weights_sum_to_one_exactly_at_any_place_and_are_nothing_outside():
    for cut in CUTS:
        for count in (cut.cells, 3 * cut.cells + 1, max(1, cut.cells // 3)):
            places = Points(count, 0.5 * cut.cells / count, cut.cells / count).places()
            weights = torch.stack([cut.weights(block, places) for block in range(len(cut.starts))])
            assert torch.equal(weights.sum(dim=0), torch.ones(count, dtype=torch.float64))
            assert (weights >= 0).all()
            for block, weight in enumerate(weights):
                inside = cut.within(block, places)
                outside = torch.cat([weight[: inside.start], weight[inside.stop :]])
                assert not outside.any(), (cut, block)


def test_a_block_fades_smoothly_into_the_next():
    cut = Cut.of(36, 20, 4)
    assert cut.fades() == [(18.0, 4.0)]
    first = cut.weights(0, torch.tensor([15.0, 16.0, 17.0, 18.0, 19.0, 20.0, 21.0], dtype=torch.float64))
    quarter = (1 + np.cos(np.pi / 4)) / 2
    torch.testing.assert_close(first, torch.tensor([1, 1, quarter, 0.5, 1 - quarter, 0, 0], dtype=torch.float64))


def test_constant_fields_show_no_seam_at_any_resolution():
    cuts = Tile((16, 12), (4, 3)).cuts((50, 41))
    for height, width in ((50, 41), (33, 97), (5, 200)):
        points = Image(1).points((height, width), (50, 41))
        whole = blended(cuts, points, 2, lambda group: (torch.full((_count(part), 2), 0.7) for part in group), 3)
        assert whole.shape == (height * width, 2)
        assert (whole - 0.7).abs().max() < 2e-7


def _count(part) -> int:
    return int(np.prod([len(axis) for axis in part.places]))


def test_a_plane_stays_a_plane():
    """Fields that know one linear function each at their own coordinates: the whole is linear across blocks."""
    cuts = Tile((16, 12), (4, 3)).cuts((50, 41))
    signal, shape = Image(1), (75, 60)

    def evaluate(group):
        for part in group:
            centres = signal.block_coordinates(part.places, (cuts[0].size, cuts[1].size)).double()
            starts = torch.tensor([cut.starts[one] for cut, one in zip(cuts, part.block, strict=True)])
            cells = starts + (centres + 1) / 2 * torch.tensor([cuts[0].size, cuts[1].size])
            yield (cells @ torch.tensor([[0.5], [0.25]], dtype=torch.float64)).float()

    whole = blended(cuts, signal.points(shape, (50, 41)), 1, evaluate).reshape(shape)
    y, x = (np.arange(75) + 0.5) * 50 / 75, (np.arange(60) + 0.5) * 41 / 60
    assert np.abs(whole.numpy() - (0.5 * y[:, None] + 0.25 * x)).max() < 1e-5


def test_parts_without_points_are_left_out():
    cuts = Tile((4,), (0,)).cuts((40,))
    assert [part.block for part in parts(cuts, [Points(2, 10.0, 20.0)])] == [(2,), (7,)]


def test_a_sound_at_another_rate_lasts_as_long():
    audio, fitted = Audio(1, span=1.0), (1000, 100)
    for text, count in (("50", 500), ("150", 1500), ("30", 300)):
        shape = audio.shape_from(text, fitted)
        (points,) = audio.points(shape, fitted)
        assert points.places()[-1] < 1000
        every = shape[2] if len(shape) > 2 else 1
        assert (shape[0], points.count, points.step) == (count, count * every, pytest.approx(1000 / (count * every)))
    sound = Sound(np.zeros((1000, 1), np.float32), 100)
    assert audio.cut(sound, (slice(5, 15),)).seconds == 0.1


def test_a_block_of_a_volume_is_where_it_was():
    affine = np.array([[0, -2.0, 0, 5], [1.5, 0, 0, -7], [0, 0, 3, 11], [0, 0, 0, 1]])
    volume, head = Volume(1), Voxels(np.random.default_rng(0).random((6, 7, 8)).astype(np.float32), affine)
    block = volume.cut(head, (slice(2, 5), slice(3, 6), slice(1, 8)))
    assert block.values.shape == (3, 3, 7)
    np.testing.assert_allclose(block.affine @ [0, 0, 0, 1], affine @ [1, 3, 2, 1])
    spaced = Volume(1, spacing=[3.0, 2.0, 1.0])
    block = spaced.cut(np.zeros((6, 7, 8), np.uint8), (slice(2, 5), slice(3, 6), slice(1, 8)))
    np.testing.assert_allclose(block.affine[:3, 3], [1, 6, 6])
    assert block.value_range == (0.0, 255.0), "of a plain array of bytes, although an affine says its place"


def test_options_that_would_apply_to_each_tile_are_refused():
    tile = Tile((2.0,), (0.1,))
    with pytest.raises(ValueError, match=r"a tile lasts 2 seconds and the coordinates span 1; signal\.span"):
        Audio(1, span=1.0).refuse_tile(tile)
    with pytest.raises(ValueError, match=r"signal\.resample would apply to each tile"):
        Audio(1, resample=8000).refuse_tile(tile)
    with pytest.raises(ValueError, match=r"signal\.resize would bring each tile to that size"):
        Image(1, resize=[8, 8]).refuse_tile(tile)
    with pytest.raises(ValueError, match=r"transform=zigzag moves pixels"):
        Image(1, transform="zigzag").refuse_tile(tile)


def test_ids_of_blocks_are_read_from_the_end():
    assert block_id("a@1/b", (2, 0, 3)) == "a@1/b@2,0,3"
    assert whole_id("a@1/b@2,0,3") == "a@1/b"
    assert by_whole(["a@0", "b@0", "a@1"]) == {"a": [0, 2], "b": [1]}
