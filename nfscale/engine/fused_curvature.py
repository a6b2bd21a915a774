"""The kernel of Hessian-vector products, in Triton: gradient and Hv of one field in a single pass over its points.

R{q} is the derivative of q along the probe V, u (Pearlmutter, "Fast exact multiplication by the Hessian", 1994):
z = omega (W h + b) has R{z} = omega (V h + W R{h} + u), h' = sin z has R{h'} = cos(z) R{z}, and backwards, where
g is the gradient with respect to h' and d = cos(z) g, R{d} = cos(z) R{g} - sin(z) R{z} g. That takes three times the
products of a gradient and no further sines. See `fused_kernels` for the rest, dangers included.
"""

import triton
import triton.language as tl

from nfscale.engine.fused_kernels import (
    LANES,
    _added,
    _as_blocks,
    _factor,
    _operands,
    _place,
    _product,
    _samples,
    _sine_cosine,
    _zeros,
)

# ruff: noqa: N803, RUF005
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false


@triton.jit(do_not_specialize=["available", "chunk"])
def partial_curvature(
    rows,
    probes,
    coordinates,
    values,
    mask,
    scales,
    fields,
    partials,
    available,
    chunk,
    omega_0,
    omega_hidden,
    MASKED: tl.constexpr,
    DIMENSIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    TILE: tl.constexpr,
    OPERAND: tl.constexpr,
    FAST: tl.constexpr,
    SIZE: tl.constexpr,
):
    """`partial_gradient` of `fused_kernels` over all points, with products of the Hessian and `probes` float32 [F, P].

    Args:
        partials: float32 [programs, chunks, 2 + 2 P], out: squared error and weights, summed; gradient, and then
            product, of their mean times the weights.
    """
    field = tl.load(fields + tl.program_id(0))
    scale = tl.load(scales + field)
    coordinates += field * available * DIMENSIONS
    values += field * available * CHANNELS
    mask += field * available
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, available)
    first, first_bias, weights, biases, last, last_bias = _operands(
        rows + field * SIZE, omega_0, omega_hidden, DIMENSIONS, CHANNELS, WIDTH, DEPTH, OPERAND
    )
    first_v, first_bias_v, weights_v, biases_v, last_v, last_bias_v = _operands(
        probes + field * SIZE, omega_0, omega_hidden, DIMENSIONS, CHANNELS, WIDTH, DEPTH, OPERAND
    )
    squares = tl.zeros((TILE, LANES), tl.float32)
    mass = tl.zeros((TILE,), tl.float32)
    sums, turned_sums = _zeros(WIDTH, DEPTH), _zeros(WIDTH, DEPTH)
    for base in range(begin, end, TILE):
        points = base + tl.arange(0, TILE)
        inside = points < end
        point, auxiliary, expected, share = _samples(
            coordinates, values, mask, points, inside, MASKED, DIMENSIONS, CHANNELS, TILE, OPERAND
        )

        z = tl.zeros((TILE, WIDTH), tl.float32) + first_bias[None, :]
        turn = tl.zeros((TILE, WIDTH), tl.float32) + first_bias_v[None, :]
        for dimension in tl.static_range(DIMENSIONS):
            z += point[dimension][:, None] * first[dimension][None, :]
            turn += point[dimension][:, None] * first_v[dimension][None, :]
        sine, cosine = _sine_cosine(z, FAST)
        outputs, slopes, turns = (sine.to(OPERAND),), (cosine.to(OPERAND),), (turn.to(OPERAND),)
        for layer in tl.static_range(1, DEPTH):
            before, turned_before = outputs[layer - 1], slopes[layer - 1] * turns[layer - 1]
            weight = tl.trans(weights[layer - 1])
            z = _product(before, weight) + biases[layer - 1][None, :]
            turn = _added(_product(before, tl.trans(weights_v[layer - 1])), turned_before, weight)
            turn += biases_v[layer - 1][None, :]
            sine, cosine = _sine_cosine(z, FAST)
            outputs, slopes = outputs + (sine.to(OPERAND),), slopes + (cosine.to(OPERAND),)
            turns = turns + (turn.to(OPERAND),)
        before, turned_before = outputs[DEPTH - 1], slopes[DEPTH - 1] * turns[DEPTH - 1]
        predicted = _product(before, tl.trans(last)) + last_bias[None, :]
        turned = _added(_product(before, tl.trans(last_v)), turned_before, tl.trans(last)) + last_bias_v[None, :]

        error = (predicted - expected) * share[:, None]
        squares += (predicted - expected) * error
        mass += share
        error = (error * scale).to(OPERAND)
        turned_error = (turned * share[:, None] * scale).to(OPERAND)
        across, turned_across = tl.trans(error), tl.trans(turned_error)
        after = (
            _added(sums[2 * DEPTH - 1], across, before),
            _added(sums[2 * DEPTH], across, auxiliary),
        )
        turned_after = (
            _added(_added(turned_sums[2 * DEPTH - 1], turned_across, before), across, turned_before),
            _added(turned_sums[2 * DEPTH], turned_across, auxiliary),
        )
        slope = _product(error, last)
        turned_slope = _added(_product(turned_error, last), error, last_v)
        for layer in tl.static_range(DEPTH - 1, -1, -1):
            turn = outputs[layer].to(tl.float32) * turns[layer].to(tl.float32)
            turned_slope = (turned_slope * slopes[layer].to(tl.float32) - slope * turn).to(OPERAND)
            slope = (slope * slopes[layer].to(tl.float32)).to(OPERAND)
            across, turned_across = tl.trans(slope), tl.trans(turned_slope)
            if layer > 0:
                before, turned_before = outputs[layer - 1], slopes[layer - 1] * turns[layer - 1]
                after = (
                    _added(sums[2 * layer - 1], across, before),
                    _added(sums[2 * layer], across, auxiliary),
                ) + after
                turned_after = (
                    _added(_added(turned_sums[2 * layer - 1], turned_across, before), across, turned_before),
                    _added(turned_sums[2 * layer], turned_across, auxiliary),
                ) + turned_after
                turned_slope = _added(_product(turned_slope, weights[layer - 1]), slope, weights_v[layer - 1])
                slope = _product(slope, weights[layer - 1])
        sums = (_added(sums[0], across, auxiliary),) + after
        turned_sums = (_added(turned_sums[0], turned_across, auxiliary),) + turned_after

    partial = partials + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * (2 + 2 * SIZE)
    tl.store(partial, tl.sum(squares) / CHANNELS)
    tl.store(partial + 1, tl.sum(mass))
    blocks, turned_blocks = _as_blocks(sums, DIMENSIONS, DEPTH), _as_blocks(turned_sums, DIMENSIONS, DEPTH)
    for block in tl.static_range(2 * DEPTH + 1):
        places, within = _place(block, DIMENSIONS, CHANNELS, WIDTH, DEPTH)
        factor = 2.0 / (CHANNELS * scale) * _factor(block, DEPTH, omega_0, omega_hidden)
        tl.store(partial + 2 + places, factor * blocks[block], mask=within)
        tl.store(partial + 2 + SIZE + places, factor * turned_blocks[block], mask=within)
