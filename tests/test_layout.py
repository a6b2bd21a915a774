"""A row of weights and the params by name hold the same bits, and the layout survives its JSON."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nfscale.layout import Entry, Layout

SHAPES = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple), min_size=1, max_size=6)


def layout_of(shapes) -> Layout:
    return Layout.of((f"tensor.{index}", shape) for index, shape in enumerate(shapes))


def bits(count: int, fields: int) -> torch.Tensor:
    """Float32 [fields, count] of arbitrary bit patterns: NaN payloads, infinities and subnormals among them."""
    words = torch.arange(fields * count, dtype=torch.int64) * 0x9E3779B9 % 2**32 - 2**31
    return words.to(torch.int32).view(torch.float32).reshape(fields, count)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.contiguous().view(torch.int32), right.contiguous().view(torch.int32))


@given(SHAPES, st.integers(1, 3))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_rows_to_params_and_back_is_bit_for_bit(shapes, fields):
    layout = layout_of(shapes)
    rows = bits(layout.size, fields)
    params = layout.unravel(rows)
    assert [tuple(tensor.shape) for tensor in params.values()] == [(fields, *shape) for shape in shapes]
    assert same_bits(layout.ravel(params), rows)


@given(SHAPES, st.integers(1, 3))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_row_is_the_tensors_in_c_order_end_to_end(shapes, fields):
    layout = layout_of(shapes)
    params = {f"tensor.{index}": bits(torch.Size(shape).numel(), fields) for index, shape in enumerate(shapes)}
    shaped = {name: p.reshape(fields, *shape) for (name, p), shape in zip(params.items(), shapes, strict=True)}
    assert same_bits(layout.ravel(shaped), torch.cat(list(params.values()), dim=1))
    for entry in layout.entries:
        row = layout.ravel(shaped)[:, entry.offset : entry.offset + entry.size]
        assert same_bits(row, params[entry.name])


def test_params_that_are_not_contiguous_ravel_in_c_order():
    layout = Layout.of([("weight", (2, 3))])
    transposed = torch.arange(12.0).reshape(2, 3, 2).mT
    assert layout.ravel({"weight": transposed}).tolist() == transposed.reshape(2, 6).tolist()


def test_the_order_of_the_dict_does_not_matter():
    layout = Layout.of([("a", (2,)), ("b", (1,))])
    params = {"b": torch.tensor([[3.0]]), "a": torch.tensor([[1.0, 2.0]])}
    assert layout.ravel(params).tolist() == [[1.0, 2.0, 3.0]]


def test_params_are_views_into_their_rows():
    layout = layout_of([(2, 3), (4,)])
    rows = torch.zeros(2, layout.size)
    layout.unravel(rows)["tensor.1"][1, 2] = 7.0
    assert rows.nonzero().tolist() == [[1, 8]]
    assert rows[1, 8] == 7.0


def test_ravel_into_wider_rows_leaves_their_tail_alone():
    layout = layout_of([(2, 3), (4,)])
    rows = bits(layout.size, 2)
    wide = torch.full((2, layout.size + 3), 5.0)
    assert layout.ravel(layout.unravel(rows), out=wide) is wide
    assert same_bits(wide[:, : layout.size], rows)
    assert (wide[:, layout.size :] == 5.0).all()
    assert same_bits(layout.unravel(wide)["tensor.1"], rows[:, 6:])


@given(SHAPES)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_the_layout_survives_its_json(shapes):
    layout = layout_of(shapes)
    read = Layout.from_json(layout.to_json())
    assert read == layout
    assert read.size == layout.size == sum(torch.Size(shape).numel() for shape in shapes)


def test_the_json_is_what_a_stranger_expects():
    layout = Layout.of([("layers.0.weight", (3, 2)), ("layers.0.bias", (3,))])
    assert layout.entries == (Entry("layers.0.weight", (3, 2), 0), Entry("layers.0.bias", (3,), 6))
    assert json.loads(layout.to_json()) == [
        {"name": "layers.0.weight", "shape": [3, 2], "offset": 0},
        {"name": "layers.0.bias", "shape": [3], "offset": 6},
    ]


def test_rows_that_are_too_short_are_refused_with_both_lengths():
    layout = layout_of([(2, 3), (4,)])
    with pytest.raises(ValueError, match=r"\b9\b.*\b10\b"):
        layout.unravel(torch.zeros(1, 9))
