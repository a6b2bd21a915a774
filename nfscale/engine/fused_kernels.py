"""The kernels of the fused step, in Triton: a program takes one field through forward, backward and optimiser.

A field is D -> W (-> W)^(DEPTH - 1) -> C with sines; its points pass in tiles of TILE. Its row is W_0 [W, D], b_0 [W],
W_l [W, W], b_l [W], ..., W_L [C, W], b_L [C]. The gradient is kept as 2 DEPTH + 1 blocks, in the order of the row:
(W_0 | b_0), then W_l, b_l of each hidden layer, then W_L, b_L.

Operands of products are of the type OPERAND, sums float32; the first layer, whose arguments reach a hundred radians,
is float32 throughout. omega goes into the operands' weights. Sums over points (of biases, and W_0) are products with
an auxiliary block of 16 columns [coordinates, 1, 0, ...]: a reduction by shuffles takes several times as long.

Dangers:
- bfloat16 products are wrong in Triton's interpreter. OPERAND is float16 or float32.
- `tl.sin` takes 50 instructions where `fast_sinf` takes two; the interpreter has `tl.sin` alone, hence FAST.
- Threads of a program read weights that others of them wrote. Barriers stand between, and nothing here is read that
  another program writes in the same launch.
- TRITON_INTERPRET counts when triton is imported for the first time, here or elsewhere.
- What is assigned in a loop must keep its type, names of other things included.
"""

# Capital arguments are constants of a compiled kernel; its language has neither unpacking nor early returns.
# ruff: noqa: N803, N806, RET505, RUF005, SIM108
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false

import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""The kernels run on the CPU, slowly, for tests."""

DRAWN = tl.constexpr(256)  # positions at once, no fewer than threads
LANES = tl.constexpr(16)  # the least that a product takes: channels and auxiliary columns are filled up to it
ALL, STRATIFIED, LONG_RUNS, UNIFORM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
"""Which points enter a step; LONG_RUNS is stratified where a run has 2^16 samples or more."""
GRADIENT, ADAM, PRECONDITIONED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _sine_cosine(z, FAST: tl.constexpr):
    if FAST:
        return libdevice.fast_sinf(z), libdevice.fast_cosf(z)
    else:
        return tl.sin(z), tl.cos(z)


@triton.jit
def _product(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _added(total, a, b):
    """total + a b."""
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _drawn(points, step, seed, available, taken, runs, units, most_units, STREAM: tl.constexpr, SAMPLING: tl.constexpr):
    """Positions of these points of a step: int32, as `points`. `nfscale.engine.sampling`, number for number.

    Args:
        runs: int32 [taken, 3], start, length and count of units of each run.
        units: int32 [taken, most_units].
    """
    zero = tl.zeros_like(points)
    if SAMPLING == UNIFORM:
        w0, w1, w2, w3 = tl.philox(seed, points // 4, zero + step, zero + STREAM, zero)
        lane = points % 4
        word = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
        drawn = tl.umulhi(word, (zero + available).to(tl.uint32)).to(tl.int32)
    else:
        inside = points < taken
        start = tl.load(runs + points * 3, mask=inside, other=0)
        length = tl.load(runs + points * 3 + 1, mask=inside, other=1)
        unit_count = tl.load(runs + points * 3 + 2, mask=inside, other=1)
        w0, w1, _, _ = tl.philox(seed, points, step // length, zero + STREAM, zero)
        offset = tl.umulhi(w0, length.to(tl.uint32))
        chosen = tl.umulhi(w1, unit_count.to(tl.uint32)).to(tl.int32)
        multiplier = tl.load(units + points * most_units + chosen, mask=inside, other=0)
        if SAMPLING == LONG_RUNS:
            product = multiplier.to(tl.uint64) * (step % length).to(tl.uint64) + offset
            place = product % length.to(tl.uint64)
        else:
            product = multiplier.to(tl.uint32) * (step % length).to(tl.uint32) + offset
            place = product % length.to(tl.uint32)
        drawn = start + place.to(tl.int32)
    return drawn


@triton.jit
def _draw(
    positions,
    begin,
    end,
    step,
    seed,
    available,
    taken,
    runs,
    units,
    most_units,
    STREAM: tl.constexpr,
    SAMPLING: tl.constexpr,
):
    """Positions of points [begin, end) of a step, to memory: inside `_sums` every thread would draw many of them."""
    for base in range(begin, end, DRAWN):
        points = base + tl.arange(0, DRAWN)
        drawn = _drawn(points, step, seed, available, taken, runs, units, most_units, STREAM, SAMPLING)
        tl.store(positions + points, drawn, mask=points < end)


@triton.jit
def _place(
    BLOCK: tl.constexpr, DIMENSIONS: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr
):
    """Where the entries of a block of the gradient lie in the row, and which of them do."""
    units, lanes = tl.arange(0, WIDTH), tl.arange(0, LANES)
    LAYER: tl.constexpr = WIDTH * (DIMENSIONS + 1) + ((BLOCK + 1) // 2 - 1) * WIDTH * (WIDTH + 1)
    if BLOCK == 0:
        is_weight = (lanes < DIMENSIONS)[None, :]
        at = tl.where(is_weight, units[:, None] * DIMENSIONS + lanes[None, :], WIDTH * DIMENSIONS + units[:, None])
        inside = (units >= 0)[:, None] & (lanes <= DIMENSIONS)[None, :]
    elif BLOCK == 2 * DEPTH - 1:
        at = LAYER + lanes[:, None] * WIDTH + units[None, :]
        inside = (lanes < CHANNELS)[:, None] & (units >= 0)[None, :]
    elif BLOCK == 2 * DEPTH:
        at = LAYER + CHANNELS * WIDTH + lanes
        inside = lanes < CHANNELS
    elif BLOCK % 2 == 1:
        at = LAYER + units[:, None] * WIDTH + units[None, :]
        inside = (units >= 0)[:, None] & (units >= 0)[None, :]
    else:
        at = LAYER + WIDTH * WIDTH + units
        inside = units >= 0
    return at, inside


@triton.jit
def _operands(
    row,
    omega_0,
    omega_hidden,
    DIMENSIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """A row as products take it: omega_0 W_0 by columns, omega_0 b_0, all omega W_l, all omega b_l, W_L, b_L."""
    units, lanes = tl.arange(0, WIDTH), tl.arange(0, LANES)
    is_channel = lanes < CHANNELS
    first = ()
    for dimension in tl.static_range(DIMENSIONS):
        first = first + (omega_0 * tl.load(row + units * DIMENSIONS + dimension),)
    first_bias = omega_0 * tl.load(row + WIDTH * DIMENSIONS + units)
    weights, biases = (), ()
    for layer in tl.static_range(1, DEPTH):
        at = row + WIDTH * (DIMENSIONS + 1) + (layer - 1) * WIDTH * (WIDTH + 1)
        weight = omega_hidden * tl.load(at + units[:, None] * WIDTH + units[None, :])
        weights = weights + (weight.to(OPERAND),)
        biases = biases + (omega_hidden * tl.load(at + WIDTH * WIDTH + units),)
    at = row + WIDTH * (DIMENSIONS + 1) + (DEPTH - 1) * WIDTH * (WIDTH + 1)
    last = tl.load(at + lanes[:, None] * WIDTH + units[None, :], mask=is_channel[:, None], other=0.0).to(OPERAND)
    last_bias = tl.load(at + CHANNELS * WIDTH + lanes, mask=is_channel, other=0.0)
    return first, first_bias, weights, biases, last, last_bias


@triton.jit
def _four(at, inside, COUNT: tl.constexpr, TILE: tl.constexpr):
    """`COUNT` of up to four numbers that lie at each place, as a tuple of [TILE]."""
    four = tl.arange(0, 4)
    block = tl.load(at[:, None] + four[None, :], mask=inside[:, None] & (four < COUNT)[None, :], other=0.0)
    even, odd = tl.split(tl.reshape(block, (TILE, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _zeros(WIDTH: tl.constexpr, DEPTH: tl.constexpr):
    """What the blocks of a gradient are added up in; biases take the auxiliary block's columns."""
    zeros = (tl.zeros((WIDTH, LANES), tl.float32),)
    for _ in tl.static_range(1, DEPTH):
        zeros = zeros + (tl.zeros((WIDTH, WIDTH), tl.float32), tl.zeros((WIDTH, LANES), tl.float32))
    return zeros + (tl.zeros((LANES, WIDTH), tl.float32), tl.zeros((LANES, LANES), tl.float32))


@triton.jit
def _as_blocks(sums, DIMENSIONS: tl.constexpr, DEPTH: tl.constexpr):
    """The blocks of a gradient: of biases, the column of ones."""
    is_one = (tl.arange(0, LANES) == DIMENSIONS)[None, :]
    blocks = (sums[0],)
    for layer in tl.static_range(1, DEPTH + 1):
        blocks = blocks + (sums[2 * layer - 1], tl.sum(tl.where(is_one, sums[2 * layer], 0.0), axis=1))
    return blocks


@triton.jit
def _samples(
    coordinates,
    values,
    mask,
    drawn,
    inside,
    MASKED: tl.constexpr,
    DIMENSIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Of the points of a tile: coordinates as a tuple, the auxiliary block, values, weights."""
    lanes = tl.arange(0, LANES)
    point = _four(coordinates + drawn * DIMENSIONS, inside, DIMENSIONS, TILE)
    auxiliary = tl.where((lanes == DIMENSIONS)[None, :], 1.0, tl.zeros((TILE, LANES), tl.float32))
    for dimension in tl.static_range(DIMENSIONS):
        auxiliary = tl.where((lanes == dimension)[None, :], point[dimension][:, None], auxiliary)
    expected = tl.zeros((TILE, LANES), tl.float32)
    for some in tl.static_range(0, CHANNELS, 4):
        value = _four(values + drawn * CHANNELS + some, inside, CHANNELS - some, TILE)
        for channel in tl.static_range(min(CHANNELS - some, 4)):
            expected = tl.where((lanes == some + channel)[None, :], value[channel][:, None], expected)
    if MASKED:
        share = tl.load(mask + drawn, mask=inside, other=0.0)
    else:
        share = tl.where(inside, 1.0, 0.0)
    return point, auxiliary.to(OPERAND), expected, share


@triton.jit
def _sums(
    row,
    coordinates,
    values,
    mask,
    positions,
    begin,
    end,
    scale,
    omega_0,
    omega_hidden,
    SAMPLING: tl.constexpr,
    MASKED: tl.constexpr,
    DIMENSIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    TILE: tl.constexpr,
    OPERAND: tl.constexpr,
    FAST: tl.constexpr,
):
    """Sums over points [begin, end) of a step of one field: squared error, weights, and the gradient's blocks.

    The gradient is that of scale / 2 times the sum of weighted squared errors, with respect to z of z = omega (W h + b)
    where there is an omega; all pointers are the field's own.

    Args:
        positions: int32 [taken], which points enter the step, where not all do.
    """
    first, first_bias, weights, biases, last, last_bias = _operands(
        row, omega_0, omega_hidden, DIMENSIONS, CHANNELS, WIDTH, DEPTH, OPERAND
    )
    squares = tl.zeros((TILE, LANES), tl.float32)
    mass = tl.zeros((TILE,), tl.float32)
    sums = _zeros(WIDTH, DEPTH)
    for base in range(begin, end, TILE):
        points = base + tl.arange(0, TILE)
        inside = points < end
        if SAMPLING == ALL:
            drawn = points
        else:
            drawn = tl.load(positions + points, mask=inside, other=0)
        point, auxiliary, expected, share = _samples(
            coordinates, values, mask, drawn, inside, MASKED, DIMENSIONS, CHANNELS, TILE, OPERAND
        )

        z = tl.zeros((TILE, WIDTH), tl.float32) + first_bias[None, :]
        for dimension in tl.static_range(DIMENSIONS):
            z += point[dimension][:, None] * first[dimension][None, :]
        sine, cosine = _sine_cosine(z, FAST)
        outputs, slopes = (sine.to(OPERAND),), (cosine.to(OPERAND),)
        for layer in tl.static_range(1, DEPTH):
            z = _product(outputs[layer - 1], tl.trans(weights[layer - 1]))
            sine, cosine = _sine_cosine(z + biases[layer - 1][None, :], FAST)
            outputs, slopes = outputs + (sine.to(OPERAND),), slopes + (cosine.to(OPERAND),)
        predicted = _product(outputs[DEPTH - 1], tl.trans(last)) + last_bias[None, :]

        error = (predicted - expected) * share[:, None]
        squares += (predicted - expected) * error
        mass += share
        error = (error * scale).to(OPERAND)
        error_across = tl.trans(error)
        after = (
            _added(sums[2 * DEPTH - 1], error_across, outputs[DEPTH - 1]),
            _added(sums[2 * DEPTH], error_across, auxiliary),
        )
        slope = _product(error, last).to(OPERAND) * slopes[DEPTH - 1]
        for layer in tl.static_range(DEPTH - 1, 0, -1):
            slope_across = tl.trans(slope)
            after = (
                _added(sums[2 * layer - 1], slope_across, outputs[layer - 1]),
                _added(sums[2 * layer], slope_across, auxiliary),
            ) + after
            slope = _product(slope, weights[layer - 1]).to(OPERAND) * slopes[layer - 1]
        sums = (_added(sums[0], tl.trans(slope), auxiliary),) + after
    return tl.sum(squares), tl.sum(mass), _as_blocks(sums, DIMENSIONS, DEPTH)


@triton.jit
def _factor(BLOCK: tl.constexpr, DEPTH: tl.constexpr, omega_0, omega_hidden):
    """What a block of `_sums` lacks of the gradient with respect to the weights."""
    if BLOCK == 0:
        factor = omega_0
    elif BLOCK < 2 * DEPTH - 1:
        factor = omega_hidden
    else:
        factor = 1.0
    return factor


@triton.jit
def _adam(
    row, mean_at, square_at, at, inside, gradient, step_size, inverse_correction, beta1, rest1, beta2, rest2, epsilon
):
    """Adam of the weights at these places of a row, in place."""
    mean = beta1 * tl.load(mean_at + at, mask=inside, other=0.0) + rest1 * gradient
    square = beta2 * tl.load(square_at + at, mask=inside, other=0.0) + rest2 * gradient * gradient
    weight = tl.load(row + at, mask=inside, other=0.0)
    tl.debug_barrier()  # an entry of a small block is in several threads: all of them have read it
    tl.store(mean_at + at, mean, mask=inside)
    tl.store(square_at + at, square, mask=inside)
    tl.store(row + at, weight - step_size * mean / (tl.sqrt(square) * inverse_correction + epsilon), mask=inside)


@triton.jit
def _momentum(momentum_at, inverse_at, at, inside, gradient, beta1, rest1):
    """The next momentum of the weights at these places, and the square length of the preconditioned step along it."""
    momentum = beta1 * tl.load(momentum_at + at, mask=inside, other=0.0) + rest1 * gradient
    direction = momentum * tl.load(inverse_at + at, mask=inside, other=0.0)
    return momentum, tl.sum(tl.where(inside, direction * direction, 0.0))


@triton.jit
def _bounded(step_size, correction, longest, at, square_length, size, CLIPPED: tl.constexpr):
    """What the preconditioned momentum is multiplied by: no step's root mean square is above `longest`."""
    factor = step_size
    if CLIPPED:
        typical = tl.sqrt(square_length / size) / correction
        factor = step_size * tl.minimum(tl.load(longest + at) / typical, 1.0)
    return factor / correction


@triton.jit
def _move(row, momentum_at, inverse_at, at, inside, momentum, factor):
    """The momentum is stored, the weights at these places change along it."""
    weight = tl.load(row + at, mask=inside, other=0.0)
    direction = momentum * tl.load(inverse_at + at, mask=inside, other=0.0)
    tl.debug_barrier()  # as in `_adam`, the momentum included
    tl.store(momentum_at + at, momentum, mask=inside)
    tl.store(row + at, weight - factor * direction, mask=inside)


@triton.jit(do_not_specialize=["available", "taken", "step_count", "most_units"])
def advance(
    rows,
    first_moments,
    second_moments,
    coordinates,
    values,
    mask,
    scales,
    fields,
    counts,
    seeds,
    steps,
    runs,
    units,
    positions,
    step_size,
    correction,
    longest,
    diagonal_row,
    inverse_diagonal,
    available,
    taken,
    step_count,
    most_units,
    omega_0,
    omega_hidden,
    beta1,
    rest1,
    beta2,
    rest2,
    epsilon,
    KIND: tl.constexpr,
    CLIPPED: tl.constexpr,
    STREAM: tl.constexpr,
    SAMPLING: tl.constexpr,
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
    """All steps of one field per program, in place; a field that is not finite any more stops.

    Args:
        rows, first_moments, second_moments: float32 [F, P].
        fields: int64 [programs], the field of each; counts: int32 [programs], its steps, `step_count` at most.
        positions: int32 [programs, taken], scratch, where not all points enter a step.
        step_size, correction, longest, diagonal_row: [F, step_count]; inverse_diagonal: float32 [U, P].
    """
    field = tl.load(fields + tl.program_id(0))
    left = tl.load(counts + tl.program_id(0))
    row, first, second = rows + field * SIZE, first_moments + field * SIZE, second_moments + field * SIZE
    scale, seed, step = tl.load(scales + field), tl.load(seeds + field), tl.load(steps + field).to(tl.int32)
    at = field * step_count
    drawn = positions + tl.program_id(0).to(tl.int64) * taken
    while left > 0:
        if SAMPLING != ALL:
            _draw(drawn, 0, taken, step, seed, available, taken, runs, units, most_units, STREAM, SAMPLING)
            tl.debug_barrier()  # all positions are there that other threads read now
        _, mass, sums = _sums(
            row,
            coordinates + field * available * DIMENSIONS,
            values + field * available * CHANNELS,
            mask + field * available,
            drawn,
            0,
            taken,
            scale,
            omega_0,
            omega_hidden,
            SAMPLING,
            MASKED,
            DIMENSIONS,
            CHANNELS,
            WIDTH,
            DEPTH,
            TILE,
            OPERAND,
            FAST,
        )
        norm = 2.0 / (CHANNELS * scale * mass)
        size, corrected = tl.load(step_size + at), tl.load(correction + at)
        tl.debug_barrier()  # all threads have read the weights that are changed now
        if KIND == ADAM:
            for block in tl.static_range(2 * DEPTH + 1):
                places, inside = _place(block, DIMENSIONS, CHANNELS, WIDTH, DEPTH)
                gradient = sums[block] * (norm * _factor(block, DEPTH, omega_0, omega_hidden))
                _adam(
                    row,
                    first,
                    second,
                    places,
                    inside,
                    gradient,
                    size,
                    1.0 / corrected,
                    beta1,
                    rest1,
                    beta2,
                    rest2,
                    epsilon,
                )
        else:
            inverse = inverse_diagonal + tl.load(diagonal_row + at) * SIZE
            momenta, square_length = (), 0.0
            for block in tl.static_range(2 * DEPTH + 1):
                places, inside = _place(block, DIMENSIONS, CHANNELS, WIDTH, DEPTH)
                gradient = sums[block] * (norm * _factor(block, DEPTH, omega_0, omega_hidden))
                momentum, squares = _momentum(first, inverse, places, inside, gradient, beta1, rest1)
                momenta, square_length = momenta + (momentum,), square_length + squares
            factor = _bounded(size, corrected, longest, at, square_length, SIZE, CLIPPED)
            tl.debug_barrier()  # all threads have read all momenta
            for block in tl.static_range(2 * DEPTH + 1):
                places, inside = _place(block, DIMENSIONS, CHANNELS, WIDTH, DEPTH)
                _move(row, first, inverse, places, inside, momenta[block], factor)
        tl.debug_barrier()  # all weights are changed that other threads read now
        # What is not finite anywhere is so in the sum of the errors.
        left = tl.where(tl.sum(tl.abs(sums[2 * DEPTH])) < float("inf"), left - 1, 0)
        step += 1
        at += 1


@triton.jit(do_not_specialize=["available", "taken", "chunk", "index", "most_units"])
def partial_gradient(
    rows,
    coordinates,
    values,
    mask,
    scales,
    fields,
    seeds,
    steps,
    runs,
    units,
    positions,
    partials,
    available,
    taken,
    chunk,
    index,
    most_units,
    omega_0,
    omega_hidden,
    STREAM: tl.constexpr,
    SAMPLING: tl.constexpr,
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
    """What `chunk` points of a field add, for `update` to add up: programs are (which of `fields`, which chunk).

    Args:
        index: of the step, counted from the fields' own `steps`.
        partials: float32 [programs, chunks, 2 + P], out: squared error and weights, summed; gradient of their mean
            times the weights.
    """
    field = tl.load(fields + tl.program_id(0))
    scale = tl.load(scales + field)
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, taken)
    drawn = positions + tl.program_id(0).to(tl.int64) * taken
    if SAMPLING != ALL:
        step = tl.load(steps + field).to(tl.int32) + index
        seed = tl.load(seeds + field)
        _draw(drawn, begin, end, step, seed, available, taken, runs, units, most_units, STREAM, SAMPLING)
        tl.debug_barrier()
    squares, mass, sums = _sums(
        rows + field * SIZE,
        coordinates + field * available * DIMENSIONS,
        values + field * available * CHANNELS,
        mask + field * available,
        drawn,
        begin,
        end,
        scale,
        omega_0,
        omega_hidden,
        SAMPLING,
        MASKED,
        DIMENSIONS,
        CHANNELS,
        WIDTH,
        DEPTH,
        TILE,
        OPERAND,
        FAST,
    )
    partial = partials + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * (2 + SIZE)
    tl.store(partial, squares / CHANNELS)
    tl.store(partial + 1, mass)
    for block in tl.static_range(2 * DEPTH + 1):
        places, inside = _place(block, DIMENSIONS, CHANNELS, WIDTH, DEPTH)
        gradient = sums[block] * (2.0 / (CHANNELS * scale) * _factor(block, DEPTH, omega_0, omega_hidden))
        tl.store(partial + 2 + places, gradient, mask=inside)


@triton.jit
def _total(partial, chunks, stride, at, inside):
    """Of what the chunks of a field have at these places, in their order."""
    total = tl.load(partial + at, mask=inside, other=0.0)
    for chunk in range(1, chunks):
        total += tl.load(partial + chunk * stride + at, mask=inside, other=0.0)
    return total


@triton.jit(do_not_specialize=["chunks", "step_count", "index"])
def update(
    partials,
    rows,
    first_moments,
    second_moments,
    losses,
    fields,
    step_size,
    correction,
    longest,
    diagonal_row,
    inverse_diagonal,
    chunks,
    step_count,
    index,
    beta1,
    rest1,
    beta2,
    rest2,
    epsilon,
    KIND: tl.constexpr,
    CLIPPED: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds up what `partial_gradient` left and takes the step of one field per program; GRADIENT writes it to `rows`.

    A stride of `partials` is 2 + SIZE.
    """
    field = tl.load(fields + tl.program_id(0))
    partial = partials + tl.program_id(0).to(tl.int64) * chunks * (2 + SIZE)
    row, first, second = rows + field * SIZE, first_moments + field * SIZE, second_moments + field * SIZE
    mass = _total(partial, chunks, 2 + SIZE, 1, True)
    if KIND == GRADIENT:
        tl.store(losses + field, _total(partial, chunks, 2 + SIZE, 0, True) / mass)
    else:
        when = field * step_count + index
        size, corrected = tl.load(step_size + when), tl.load(correction + when)
    square_length = 0.0
    for base in range(0, SIZE, BLOCK):
        at = base + tl.arange(0, BLOCK)
        inside = at < SIZE
        gradient = _total(partial + 2, chunks, 2 + SIZE, at, inside) / mass
        if KIND == GRADIENT:
            tl.store(row + at, gradient, mask=inside)
        elif KIND == ADAM:
            _adam(row, first, second, at, inside, gradient, size, 1.0 / corrected, beta1, rest1, beta2, rest2, epsilon)
        else:
            inverse = inverse_diagonal + tl.load(diagonal_row + when) * SIZE
            momentum, squares = _momentum(first, inverse, at, inside, gradient, beta1, rest1)
            tl.store(first + at, momentum, mask=inside)
            square_length += squares
    if KIND == PRECONDITIONED:
        tl.debug_barrier()
        inverse = inverse_diagonal + tl.load(diagonal_row + when) * SIZE
        factor = _bounded(size, corrected, longest, when, square_length, SIZE, CLIPPED)
        for base in range(0, SIZE, BLOCK):
            at = base + tl.arange(0, BLOCK)
            inside = at < SIZE
            momentum = tl.load(first + at, mask=inside, other=0.0)
            _move(row, first, inverse, at, inside, momentum, factor)
