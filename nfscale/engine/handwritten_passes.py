"""Forward, backward and R-operator passes of sine MLPs by hand, over buffers that live as long as their owner.

With z_l = omega_l (W_l h_{l-1} + b_l), h_l = sin z_l and the mean squared error behind the last, linear layer:
sine and cosine are taken once, the cosine where z was; omega is a factor of the matrix products; products write
where they are wanted. The R-operator (Pearlmutter, "Fast exact multiplication by the Hessian", 1994) carries
the derivative along a direction v through both passes: six more products in each layer and no further sine.

Danger: the matrix library picks its path, and with it the order of a sum, by the shape and the alignment of a block,
and takes another one for a lone block. A field has the same bits in any batch because nothing of that depends on
its neighbours: rows begin at multiples of 64 floats, points are padded to multiples of 16 (of weight zero), widths
to multiples of 4 (units whose weights are zero and stay so), and no product has a single block on a CPU: fields
too small for a chunk of their own go together, at least two; the points of larger ones are cut into tiles.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from nfscale.engine.products import Precision, Products, boosts, products_of
from nfscale.fields import MLP

_LAYER_BYTES = {"cpu": 1 << 20, "cuda": 256 << 20}
"""Activations of one layer that are worked on together; those of a step are 2 depth + 2 times as many. On a CPU they
stay in cache, and operations are long beside the time between them: 256 fields of 784 points, 32 units and 2 layers
take 43, 34, 35, 37 ms with 0.5, 1, 2, 4 MiB (two cores with 1 MiB of L2 each). On a GPU a common batch is taken whole,
and what the workspace of an uncommon one takes is bounded; this bound is not measured."""
_ROW_FLOATS = 64
_POINTS = 16
_WIDTH = 4


def padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@dataclass(frozen=True)
class Plan:
    """How fields and their points are taken: some fields together, or the points of one field in tiles.

    A function of the field, the points and the kind of device; only `together` depends on how many fields there are.
    """

    field: MLP
    points: int
    together: int
    """Fields of a chunk."""
    tiles: int
    """Parts of a field's points that are blocks of one product; above 1 only where `together` is 1."""
    pieces: int
    """Rounds of tiles, one after the other."""
    tile_points: int

    @staticmethod
    def of(field: MLP, points: int, fields: int, like: Tensor) -> "Plan":
        """For so many fields with rows like these, of so many points each."""
        on_cpu = like.device.type == "cpu"
        budget = _LAYER_BYTES.get(like.device.type, _LAYER_BYTES["cuda"])
        point_bytes = like.element_size() * padded(field.width, _WIDTH)
        whole = padded(points, _POINTS)
        if 2 * whole * point_bytes <= budget:
            together = min(budget // (whole * point_bytes), max(2 if on_cpu else 1, fields))
            return Plan(field, points, together, 1, 1, whole)
        tiles = 2
        pieces = -(-points * point_bytes // budget)
        return Plan(field, points, 1, tiles, pieces, padded(-(-points // (tiles * pieces)), _POINTS))

    def chunks(self, fields: Sequence[int], on_cpu: bool) -> list[list[int]]:
        """The fields in nearly equal chunks; a lone small field on a CPU is there twice."""
        count = -(-len(fields) // self.together)
        edges = [index * len(fields) // count for index in range(count + 1)]
        parts = [list(fields[start:stop]) for start, stop in pairwise(edges)]
        lone = on_cpu and self.tiles == 1
        return [part * 2 if lone and len(part) == 1 else part for part in parts]

    @cached_property
    def wide(self) -> MLP:
        """The field with its width padded, whose layout is that of the buffers' rows."""
        return replace(self.field, width=padded(self.field.width, _WIDTH))

    @cached_property
    def row_size(self) -> int:
        return padded(self.wide.layout.size, _ROW_FLOATS)

    def pack(self, rows: Tensor, out: Tensor) -> Tensor:
        """Rows [k, P] into rows of a buffer [k, row_size], whose padding is left alone."""
        if self.wide == self.field:
            out[:, : rows.shape[1]] = rows
        else:
            inner, outer = self.field.layout.unravel(rows), self.wide.layout.unravel(out)
            for name, tensor in inner.items():
                outer[name][tuple(slice(size) for size in tensor.shape)] = tensor
        return out

    def unpack(self, buffer: Tensor) -> Tensor:
        """Rows [k, P] of a buffer [k, row_size]: a view where nothing but the end is padding."""
        if self.wide == self.field:
            return buffer[:, : self.field.layout.size]
        inner, outer = self.field.layout, self.wide.layout.unravel(buffer)
        shapes = {entry.name: (len(buffer), *entry.shape) for entry in inner.entries}
        return inner.ravel({name: outer[name][tuple(slice(s) for s in shape)] for name, shape in shapes.items()})


class _Operands:
    """Rows [k, row_size] as operands of batched products; their blocks are fields, or tiles of one field."""

    def __init__(self, plan: Plan, rows: Tensor, products: Products) -> None:
        self.rows, self._rounded = rows, rows
        tensors = list(plan.wide.layout.unravel(rows).values())
        blocks = len(rows) * plan.tiles
        self.weights = [weight.expand(blocks, -1, -1) for weight in tensors[0::2]]
        self.operands = self.weights
        """As products take them; where they are rounded, at the last `refresh`."""
        if products.dtype is not None:
            self._rounded = torch.zeros_like(rows, dtype=products.dtype)
            rounded = list(plan.wide.layout.unravel(self._rounded).values())
            self.operands = [weight.expand(blocks, -1, -1) for weight in rounded[0::2]]
        self.biases = [bias.unsqueeze(1).expand(blocks, -1, -1) for bias in tensors[1::2]]
        self._weight_0, self._bias_0, self._omega_0 = tensors[0].mT, tensors[1], plan.field.first_omega
        self._first = rows.new_empty((len(rows), plan.field.dimensions + 1, plan.wide.width))
        self.first = self._first.expand(blocks, -1, -1)
        """omega_0 [W_0 b_0] transposed, of the rows at the last `refresh`: one product, and no bias beside it."""

    def refresh(self) -> None:
        torch.mul(self._weight_0, self._omega_0, out=self._first[:, :-1])
        torch.mul(self._bias_0, self._omega_0, out=self._first[:, -1])
        if self._rounded is not self.rows:
            self._rounded.copy_(self.rows)


class _Sums:
    """A gradient by block, summed over pieces; `finish` sums it over tiles into rows [k, row_size]."""

    def __init__(self, plan: Plan, rows: Tensor) -> None:
        self.rows, self._tiled = rows, plan.tiles > 1
        self._tensors = list(plan.wide.layout.unravel(rows).values())
        blocks = len(rows) * plan.tiles
        self.first = rows.new_empty((blocks, plan.field.dimensions + 1, plan.wide.width))
        """With respect to [W_0 b_0], transposed."""
        self.weights = [rows.new_empty((blocks, *shape)) for shape in plan.wide.shapes]
        self.biases = [rows.new_empty((blocks, fan_out)) for fan_out, _ in plan.wide.shapes]

    def add_bias(self, layer: int, slope: Tensor, dim: int, beta: int) -> None:
        if beta:
            self.biases[layer] += slope.sum(dim)
        else:
            torch.sum(slope, dim, out=self.biases[layer])

    def finish(self) -> None:
        sums = [self.first[:, :-1].mT, self.first[:, -1]]
        for weight, bias in zip(self.weights[1:], self.biases[1:], strict=True):
            sums += [weight, bias]
        for tensor, summed in zip(self._tensors, sums, strict=True):
            tensor.copy_(summed.sum(0, keepdim=True) if self._tiled else summed)


class _Tape:
    """What the way forward leaves for the way back, and the buffers of the way back."""

    def __init__(self, plan: Plan, like: Tensor, blocks: int, dtype: torch.dtype | None = None) -> None:
        shape = (blocks, plan.tile_points, plan.wide.width)
        self.hidden = [like.new_empty(shape, dtype=dtype or like.dtype) for _ in range(plan.field.depth)]
        """h_l, as products take it; of the R-operator R h_l."""
        self.factors = [like.new_empty(shape) for _ in range(plan.field.depth)]
        """cos z_l; of the R-operator h_l R z_l."""
        self.slope, self.next_slope = like.new_empty(shape), like.new_empty(shape)
        self.output = like.new_empty((blocks, plan.field.channels, plan.tile_points))

    def turn(self) -> None:
        self.slope, self.next_slope = self.next_slope, self.slope


class Passes:
    """The passes over one chunk of k fields: `load` samples (all with masks or none), set `rows`, take gradients."""

    def __init__(
        self,
        plan: Plan,
        fields: int,
        like: Tensor,
        with_products: bool = False,
        precision: Precision = "float32",
    ) -> None:
        self.plan, self._products = plan, products_of(precision)
        shape, blocks, rounded = (fields, plan.row_size), fields * plan.tiles, self._products.dtype
        self._at = _Operands(plan, like.new_zeros(shape), self._products)
        self._sums, self._tape = _Sums(plan, like.new_zeros(shape)), _Tape(plan, like, blocks, rounded)
        if with_products:
            assert rounded is None, "the range of derivatives along a probe is not that of slopes"
            self._along = _Operands(plan, like.new_zeros(shape), self._products)
            self._r_sums, self._r_tape = _Sums(plan, like.new_zeros(shape)), _Tape(plan, like, blocks)
        self._boost = None if rounded is None else like.new_ones((fields, 1))
        self._omegas = [plan.field.first_omega] + [plan.field.omega_hidden] * (plan.field.depth - 1)
        ahead, points = (plan.pieces, blocks), plan.tile_points
        self._coordinates = like.new_zeros((*ahead, plan.field.dimensions + 1, points))
        self._coordinates[:, :, -1] = 1  # for the first bias
        self._values = like.new_zeros((*ahead, plan.field.channels, points))
        self._shares = like.new_zeros((*ahead, 1, points))
        self._put(self._shares, like.new_full((1, 1, 1), 1 / plan.points).expand(fields, 1, plan.points))
        self._is_even = plan.points == plan.pieces * plan.tiles * points

    @property
    def rows(self) -> Tensor:
        """[k, row_size], to be written by the owner."""
        return self._at.rows

    @property
    def gradients(self) -> Tensor:
        """[k, row_size], of the mean squared error."""
        return self._sums.rows

    @property
    def probes(self) -> Tensor:
        """[k, row_size], to be written by the owner."""
        return self._along.rows

    @property
    def products(self) -> Tensor:
        """[k, row_size], of the Hessians with the probes."""
        return self._r_sums.rows

    def load(self, coordinates: Tensor, values: Tensor, mask: Tensor | None) -> None:
        """The samples of the k fields: [k, N, D], [k, N, C], [k, N]."""
        self._put(self._coordinates[:, :, :-1], coordinates.mT)
        self._put(self._values, values.mT)
        if mask is not None:
            shares = mask / mask.sum(dim=1, keepdim=True)
            self._put(self._shares, shares.unsqueeze(1))
            self._is_even = False
        if self._boost is not None:
            self._boost.copy_(boosts(values, 1 / self.plan.points if mask is None else shares.abs().amax(dim=1)))

    def _put(self, blocks: Tensor, given: Tensor) -> None:
        """[k, ..., N] into its places in [pieces, blocks, ..., tile_points]."""
        if self.plan.tiles == 1:
            blocks[0, :, :, : given.shape[2]] = given
            return
        for number, part in enumerate(given[0].split(self.plan.tile_points, dim=1)):
            blocks[number // self.plan.tiles, number % self.plan.tiles, :, : part.shape[1]] = part

    def gradient(self, with_losses: bool = False) -> Tensor | None:
        """Fills `gradients`; returns losses [k] where they are asked for."""
        self._at.refresh()
        losses = self.rows.new_zeros(len(self.rows)) if with_losses else None
        for piece in range(self.plan.pieces):
            self._forward(piece)
            slope = self._loss_slope(piece, losses)
            self._backward(piece, slope)
        self._sums.finish()
        if self._boost is not None:
            self._sums.rows.div_(self._boost)
        return losses

    def gradient_and_product(self, with_losses: bool = False) -> Tensor | None:
        """Fills `gradients` and `products`; returns losses [k] where they are asked for."""
        self._at.refresh()
        self._along.refresh()
        losses = self.rows.new_zeros(len(self.rows)) if with_losses else None
        for piece in range(self.plan.pieces):
            self._forward(piece)
            self._r_forward(piece)
            slope = self._loss_slope(piece, losses)
            r_slope = self._r_tape.output.mul_(self._slope_factor(piece))
            self._r_backward(piece, slope, r_slope)
        self._sums.finish()
        self._r_sums.finish()
        return losses

    def _forward(self, piece: int) -> None:
        at, hidden, factors, product = self._at, self._tape.hidden, self._tape.factors, self._products
        torch.bmm(self._coordinates[piece].mT, at.first, out=factors[0])
        for layer in range(self.plan.field.depth):
            if layer:
                omega, weight = self._omegas[layer], at.operands[layer].mT
                product.affine(at.biases[layer], hidden[layer - 1], weight, factors[layer], beta=omega, alpha=omega)
            torch.sin(factors[layer], out=hidden[layer])
            factors[layer].cos_()
        product.affine(at.biases[-1].mT, at.operands[-1], hidden[-1].mT, self._tape.output)

    def _slope_factor(self, piece: int) -> Tensor | float:
        """What the residuals [blocks, C, n] are multiplied by."""
        factor = 2 / self.plan.field.channels
        return factor / self.plan.points if self._is_even else self._shares[piece] * factor

    def _loss_slope(self, piece: int, losses: Tensor | None) -> Tensor:
        """d loss / d y, in the place of the output: [blocks, C, n]."""
        residual = self._tape.output.sub_(self._values[piece])
        if losses is None:
            return self._boosted(residual.mul_(self._slope_factor(piece)))
        slope = residual * self._slope_factor(piece)
        losses += (residual.mul_(slope).sum(dim=(1, 2)) / 2).view(len(losses), -1).sum(dim=1)
        return self._boosted(residual.copy_(slope))

    def _boosted(self, slope: Tensor) -> Tensor:
        return slope if self._boost is None else slope.mul_(self._boost.unsqueeze(2))

    def _backward(self, piece: int, slope: Tensor) -> None:
        at, sums, tape, product, beta = self._at, self._sums, self._tape, self._products, int(piece > 0)
        product.add(sums.weights[-1], product.operand(slope), tape.hidden[-1], beta)
        sums.add_bias(-1, slope, 2, beta)
        _outer(slope.mul_(self._omegas[-1]), at.weights[-1], out=tape.slope)
        for layer in reversed(range(self.plan.field.depth)):
            into = tape.slope.mul_(tape.factors[layer])
            if layer == 0:
                sums.first.baddbmm_(self._coordinates[piece], into, beta=beta)
                return
            rounded = product.operand(into)
            product.add(sums.weights[layer], rounded.mT, tape.hidden[layer - 1], beta)
            sums.add_bias(layer, into, 1, beta)
            product.add(tape.next_slope, rounded, at.operands[layer], beta=0, alpha=self._omegas[layer - 1])
            tape.turn()

    def _r_forward(self, piece: int) -> None:
        at, along, tape, r_tape, product = self._at, self._along, self._tape, self._r_tape, self._products
        torch.bmm(self._coordinates[piece].mT, along.first, out=r_tape.factors[0])
        for layer in range(self.plan.field.depth):
            r_z = r_tape.factors[layer]
            if layer:
                omega, below = self._omegas[layer], layer - 1
                weight, direction = at.weights[layer].mT, along.weights[layer].mT
                product.affine(along.biases[layer], tape.hidden[below], direction, r_z, beta=omega, alpha=omega)
                product.add(r_z, r_tape.hidden[below], weight, alpha=omega)
            torch.mul(r_z, tape.factors[layer], out=r_tape.hidden[layer])
            r_z.mul_(tape.hidden[layer])
        product.affine(along.biases[-1].mT, along.weights[-1], tape.hidden[-1].mT, r_tape.output)
        product.add(r_tape.output, at.weights[-1], r_tape.hidden[-1].mT)

    def _r_backward(self, piece: int, slope: Tensor, r_slope: Tensor) -> None:
        at, along, tape, r_tape, beta = self._at, self._along, self._tape, self._r_tape, int(piece > 0)
        sums, r_sums, product, omega = self._sums, self._r_sums, self._products, self._omegas[-1]
        product.add(sums.weights[-1], slope, tape.hidden[-1], beta)
        product.add(product.add(r_sums.weights[-1], r_slope, tape.hidden[-1], beta), slope, r_tape.hidden[-1])
        sums.add_bias(-1, slope, 2, beta)
        r_sums.add_bias(-1, r_slope, 2, beta)
        _outer(slope.mul_(omega), at.weights[-1], out=tape.slope)
        _outer(r_slope.mul_(omega), at.weights[-1], out=r_tape.slope)
        r_tape.slope.baddbmm_(slope.mT, along.weights[-1])
        for layer in reversed(range(self.plan.field.depth)):
            r_into = r_tape.slope.mul_(tape.factors[layer])
            r_into.addcmul_(tape.slope, r_tape.factors[layer], value=-1)
            into = tape.slope.mul_(tape.factors[layer])
            if layer == 0:
                sums.first.baddbmm_(self._coordinates[piece], into, beta=beta)
                r_sums.first.baddbmm_(self._coordinates[piece], r_into, beta=beta)
                return
            below, r_below, omega = tape.hidden[layer - 1], r_tape.hidden[layer - 1], self._omegas[layer - 1]
            product.add(sums.weights[layer], into.mT, below, beta)
            product.add(product.add(r_sums.weights[layer], r_into.mT, below, beta), into.mT, r_below)
            sums.add_bias(layer, into, 1, beta)
            r_sums.add_bias(layer, r_into, 1, beta)
            product.add(r_tape.next_slope, r_into, at.weights[layer], beta=0, alpha=omega)
            product.add(r_tape.next_slope, into, along.weights[layer], alpha=omega)
            product.add(tape.next_slope, into, at.weights[layer], beta=0, alpha=omega)
            tape.turn()
            r_tape.turn()


def _outer(slope: Tensor, weight: Tensor, out: Tensor) -> None:
    """Slopes of the outputs [blocks, C, n] by the last weights [blocks, C, W] -> [blocks, n, W]."""
    if slope.shape[1] == 1:  # the product of a matrix library takes three times as long
        torch.mul(slope.mT, weight, out=out)
    else:
        torch.bmm(slope.mT, weight, out=out)


def forward(field: MLP, rows: Tensor, coordinates: Tensor) -> Tensor:
    """The field's `apply` without gradients: [F, P], [F|1, N, D] -> [F, N, C].

    Sizes and alignments are those of the passes, so that a field's values do not depend on its neighbours here
    either, where at least two fields are asked for.
    """
    points = coordinates.shape[1]
    plan = Plan(field, points, len(rows), 1, 1, padded(points, _POINTS))
    at = _Operands(plan, plan.pack(rows, rows.new_zeros((len(rows), plan.row_size))), Products())
    at.refresh()
    given = rows.new_zeros((len(rows), field.dimensions + 1, plan.tile_points))
    given[:, :-1, :points] = coordinates.mT
    given[:, -1] = 1
    hidden = torch.bmm(given.mT, at.first).sin_()
    for layer in range(1, field.depth):
        omega = field.omega_hidden
        into = torch.baddbmm(at.biases[layer], hidden, at.weights[layer].mT, beta=omega, alpha=omega)
        hidden = into.sin_()
    values = torch.baddbmm(at.biases[-1].mT, at.weights[-1], hidden.mT)
    return values[:, :, :points].mT.contiguous()
