"""The multi-resolution hash encoding, and the interpolation between the corners of cells that every grid shares."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

CORNERS = tuple((x, y, z) for z, y, x in product((0, 1), repeat=3))  # of a cell, x fastest


def weighted_rows(
    table: Float[Tensor, "V C"], index: Int[Tensor, "N 8"], weight: Float[Tensor, "N 8"]
) -> Float[Tensor, "N C"]:
    """sum_k weight[:, k] * table[index[:, k]] without forming [N, 8, C]."""
    return F.embedding_bag(index, table, mode="sum", per_sample_weights=weight)


def add_weighted_rows(
    table: Float[Tensor, "V C"], index: Int[Tensor, "N 8"], weight: Float[Tensor, "N 8"], rows: Float[Tensor, "N C"]
) -> None:
    """The transpose: add weight[n, k] * rows[n] to table[index[n, k]], in place. One channel at a time: index_add_ of
    single numbers is several times faster on a CPU than of short rows."""
    index = index.view(-1)
    for channel in range(table.shape[1]):
        table[:, channel].index_add_(0, index, (weight * rows[:, channel, None]).view(-1))


def corner_weights(fraction: Float[Tensor, "3 N"], slope: int | None = None) -> Float[Tensor, "N 8"]:
    """Trilinear weights of a cell's CORNERS at `fraction` of it, or their derivatives along the axis `slope`."""
    sides = [(1 - f, f) for f in fraction]
    if slope is not None:
        one = torch.ones_like(fraction[0])
        sides[slope] = (-one, one)
    weight = fraction.new_empty(fraction.shape[1], 8)
    for k, j in product((0, 1), repeat=2):
        across = sides[2][k] * sides[1][j]
        for i in (0, 1):
            torch.mul(across, sides[0][i], out=weight[:, 4 * k + 2 * j + i])
    return weight


def level_scales(levels: int, base_resolution: int, growth: float) -> list[float]:
    """exp2(level * log2(growth)) * base - 1, each operation rounded to float32 as in tiny-cuda-nn.

    One bit of the finest scale moves the encoding there by up to 2e-4. torch's exp2 has another last bit on another
    processor, numpy's likewise; the C library's in float64, rounded once, has the same on all.
    """
    growth_log2 = np.float32(math.log2(np.float32(growth)))
    exponents = np.arange(levels, dtype=np.float32) * growth_log2
    powers = np.array([math.exp2(exponent) for exponent in exponents], np.float32)
    return (powers * np.float32(base_resolution) - np.float32(1)).tolist()


class HashGrid(nn.Module):
    """Multi-resolution hash encoding of the unit cube (Mueller et al. 2022), number for number as in tiny-cuda-nn.

    Level l has scale_l = base * growth^l - 1 and resolution_l = ceil(scale_l) + 1 vertices an axis; a point is at
    p = scale_l * u + 1/2 (rounded once), between the vertices floor(p) and floor(p) + 1. Vertex (i, j, k) reads row
    i + j * resolution + k * resolution^2 where the level's vertices fit into 2^log2_size rows (their number is filled
    up to a multiple of 8), else the low bits of i ^ j * 2654435761 ^ k * 805459861. Beyond the last vertex (because of
    the half, and outside of the cube) rows wrap around. The code is 2 features a level, level by level.
    Source: tiny-cuda-nn's encodings/grid.h.
    """

    features = 2

    def __init__(self, levels: int, log2_size: int, base_resolution: int, growth: float):
        super().__init__()
        self.scales = level_scales(levels, base_resolution, growth)
        self.resolutions = [math.ceil(scale) + 1 for scale in self.scales]
        self.sizes = [min(-(-(resolution**3) // 8) * 8, 2**log2_size) for resolution in self.resolutions]
        self.width = levels * self.features
        self.table = nn.Parameter(torch.empty(sum(self.sizes), self.features).uniform_(-1e-4, 1e-4))
        self.register_buffer("corners", torch.tensor(CORNERS).T[:, None], persistent=False)  # [3, 1, 8]

    def forward(self, u: Float[Tensor, "N 3"]) -> Float[Tensor, "N width"]:
        return HashEncoding.apply(u, self.table, self)

    def slope(self, u: Float[Tensor, "N 3"], v: Float[Tensor, "N width"]) -> Float[Tensor, "N 3"]:
        """d <v, encoded(u)> / du, differentiable in v and the table, not in u."""
        return HashSlope.apply(u, v, self.table, self)

    def cells(self, level: int, u: Float[Tensor, "N 3"]) -> tuple[Int[Tensor, "N 8"], Float[Tensor, "3 N"]]:
        """Rows, in the level's part of the table, of the corners of each point's cell, and the point's place in it."""
        p = (u.T.double() * self.scales[level] + 0.5).to(u.dtype)  # a fused multiply-add
        low = p.floor()
        return self.rows(level, low.long()[:, :, None] + self.corners), p - low

    def rows(self, level: int, vertex: Int[Tensor, "3 *shape"]) -> Int[Tensor, "*shape"]:
        """Row of a vertex within the level's part of the table."""
        resolution, size = self.resolutions[level], self.sizes[level]
        if resolution**3 <= size:
            row = vertex[0] + vertex[1] * resolution + vertex[2] * resolution**2
            return (row & 0xFFFFFFFF) % size  # unsigned, as there
        return (vertex[0] ^ vertex[1] * 2654435761 ^ vertex[2] * 805459861) & (size - 1)


class HashEncoding(torch.autograd.Function):
    """HashGrid's forward pass, differentiable in points and table. Keeps the points alone and hashes twice: indices and
    weights of 16 levels would take 1.5 KB a point."""

    @staticmethod
    def forward(ctx, u: Float[Tensor, "N 3"], table: Float[Tensor, "V 2"], grid: HashGrid) -> Float[Tensor, "N width"]:
        ctx.save_for_backward(u, table)
        ctx.grid = grid
        parts = []
        for level, rows in enumerate(table.split(grid.sizes)):
            index, fraction = grid.cells(level, u)
            parts.append(weighted_rows(rows, index, corner_weights(fraction)))
        return torch.cat(parts, -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx, gradient: Float[Tensor, "N width"]
    ) -> tuple[Float[Tensor, "N 3"] | None, Float[Tensor, "V 2"] | None, None]:
        u, table = ctx.saved_tensors
        grid = ctx.grid
        table_gradient = None
        if ctx.needs_input_grad[1]:
            table_gradient = torch.zeros_like(table)
            for level, rows in enumerate(table_gradient.split(grid.sizes)):
                index, fraction = grid.cells(level, u)
                v = gradient[:, 2 * level : 2 * level + 2]
                add_weighted_rows(rows, index, corner_weights(fraction), v)
        return slope_of(grid, u, gradient, table) if ctx.needs_input_grad[0] else None, table_gradient, None


class HashSlope(torch.autograd.Function):
    """HashGrid.slope: at given points bilinear in v and the table."""

    @staticmethod
    def forward(
        ctx, u: Float[Tensor, "N 3"], v: Float[Tensor, "N width"], table: Float[Tensor, "V 2"], grid: HashGrid
    ) -> Float[Tensor, "N 3"]:
        ctx.save_for_backward(u, v, table)
        ctx.grid = grid
        return slope_of(grid, u, v, table)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx, gradient: Float[Tensor, "N 3"]
    ) -> tuple[None, Float[Tensor, "N width"], Float[Tensor, "V 2"], None]:
        """Of sum_a gradient[:, a] * slope[:, a]: the corner weights are the derivatives along `gradient`."""
        u, v, table = ctx.saved_tensors
        grid = ctx.grid
        table_gradient, v_parts = torch.zeros_like(table), []
        for level, (rows, gradient_rows) in enumerate(zip(table.split(grid.sizes), table_gradient.split(grid.sizes))):
            index, fraction = grid.cells(level, u)
            along = sum(gradient[:, axis, None] * corner_weights(fraction, axis) for axis in range(3))
            along = along * grid.scales[level]
            v_parts.append(weighted_rows(rows, index, along))
            add_weighted_rows(gradient_rows, index, along, v[:, 2 * level : 2 * level + 2])
        return None, torch.cat(v_parts, -1), table_gradient, None


def slope_of(
    grid: HashGrid, u: Float[Tensor, "N 3"], v: Float[Tensor, "N width"], table: Float[Tensor, "V 2"]
) -> Float[Tensor, "N 3"]:
    slope = torch.zeros_like(u)
    for level, rows in enumerate(table.split(grid.sizes)):
        index, fraction = grid.cells(level, u)
        for axis in range(3):
            encoded_slope = weighted_rows(rows, index, corner_weights(fraction, axis))
            slope[:, axis] += grid.scales[level] * (encoded_slope * v[:, 2 * level : 2 * level + 2]).sum(-1)
    return slope
