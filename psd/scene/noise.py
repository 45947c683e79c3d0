"""Noise that lies on a surface (Yan et al. 2024): views that see the same place get the same numbers from it.

The directions around the origin are mapped onto six squares, each in four shells by distance; a square holds R x R
texels of N(0, 1). A cell of a view's noise is the sum of the texels that its patch of surface covers, divided by the
square root of their number: N(0, 1) again. A texel counts for one cell of a view alone, so that cells stay independent.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

CHARTS, SHELLS = 6, 4
SOLID = 0.1  # opacity from which on there is a surface
POINTS = 8  # along each side of a cell, at which its surface is looked up


class SurfaceNoise:
    """Texels around one object and the noise behind it; both random, by the generator alone."""

    def __init__(self, shape: tuple[int, int, int], resolution: int, generator: torch.Generator, device: torch.device):
        self.shape, self.resolution, self.device = shape, resolution, device
        self.texels = self.drawn(generator, CHARTS * SHELLS * resolution**2, shape[0])
        self.behind = self.drawn(generator, *shape)

    def drawn(self, generator: torch.Generator, *shape: int) -> Float[Tensor, "*shape"]:
        return torch.randn(shape, generator=generator).to(self.device)

    def refresh(self, gamma: float, generator: torch.Generator) -> None:
        """n <- sqrt(1 - gamma) n + sqrt(gamma) N(0, 1): after k of them the correlation is (1 - gamma)^(k/2)."""
        keep, fresh = math.sqrt(1 - gamma), math.sqrt(gamma)
        self.texels = keep * self.texels + fresh * self.drawn(generator, *self.texels.shape)
        self.behind = keep * self.behind + fresh * self.drawn(generator, *self.shape)

    def seen(
        self, points: Float[Tensor, "V 3 H W"], opacity: Float[Tensor, "V 1 H W"], radius: float
    ) -> Float[Tensor, "V C h w"]:
        """Noise of every view, whose pixels show these points of the box of half-width `radius`."""
        height, width = self.shape[1:]
        size = (height * POINTS, width * POINTS)
        points = F.interpolate(points / radius, size, mode="bilinear", align_corners=False)
        solid = F.interpolate(opacity, size, mode="bilinear", align_corners=False)[:, 0] > SOLID
        rows = torch.arange(height, device=self.device).repeat_interleave(POINTS)
        columns = torch.arange(width, device=self.device).repeat_interleave(POINTS)
        cell = rows[:, None] * width + columns
        return torch.stack([self.of_view(p, s, cell) for p, s in zip(points.movedim(1, -1), solid)])

    def of_view(
        self, points: Float[Tensor, "H W 3"], solid: Bool[Tensor, "H W"], cell: Int[Tensor, "H W"]
    ) -> Float[Tensor, "C h w"]:
        texel = texel_of(points[solid], self.resolution)
        cell, inside = cell[solid][texel >= 0], texel[texel >= 0]
        cells = self.behind[0].numel()
        owner = torch.full((len(self.texels),), cells, device=self.device)
        owner.scatter_reduce_(0, inside, cell, "amin")
        owned = (owner < cells).nonzero()[:, 0]
        summed = self.texels.new_zeros(cells, self.shape[0]).index_add_(0, owner[owned], self.texels[owned])
        count = torch.bincount(owner[owned], minlength=cells)[:, None]
        noise = torch.where(count > 0, summed / count.clamp(min=1).sqrt(), self.behind.flatten(1).T)
        return noise.T.reshape(self.shape)


def texel_of(points: Float[Tensor, "N 3"], resolution: int) -> Int[Tensor, " N"]:
    """Index of each point's texel, -1 beyond the last shell. The chart is that of the coordinate furthest out."""
    distance = points.norm(dim=-1)
    axis = points.abs().argmax(-1)
    x, y, z = (points.gather(1, ((axis + k) % 3)[:, None])[:, 0] for k in (1, 2, 0))
    u, v = hemisphere_to_square(x, y, z.abs())
    column, row = (((c + 1) / 2 * resolution).long().clamp(0, resolution - 1) for c in (u, v))
    chart = 2 * axis + (z < 0)
    shell = (distance * SHELLS).long()
    index = ((chart * SHELLS + shell.clamp(max=SHELLS - 1)) * resolution + row) * resolution + column
    return torch.where(distance <= 1, index, -1)


def hemisphere_to_square(
    x: Float[Tensor, " N"], y: Float[Tensor, " N"], z: Float[Tensor, " N"]
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Directions with z >= 0 onto [-1, 1]^2, of equal areas to equal areas (Shirley and Chiu 1997)."""
    theta, phi = torch.atan2((x**2 + y**2).sqrt(), z), torch.atan2(y, x)
    d = (1 - theta.cos()).clamp(min=0).sqrt()
    quarter = ((phi + math.pi / 4) / (math.pi / 2)).floor()  # which side of the square
    along = d * (4 / math.pi) * (phi - quarter * (math.pi / 2))
    side = quarter.long() % 4
    u = torch.where(side == 0, d, torch.where(side == 1, -along, torch.where(side == 2, -d, along)))
    v = torch.where(side == 0, along, torch.where(side == 1, d, torch.where(side == 2, -along, -d)))
    return u, v
