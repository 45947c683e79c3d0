"""Fields of constant and of swirling density, before a background that shows the direction."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from psd.scene.fields import Field

plain = dict(jitter=None, with_normals=False, occupancy=None)


class Fog(Field):
    """Constant density in the whole box, or where |x - centre| < `ball`; colour by position, normals outward."""

    def __init__(self, density: float, ball: float = math.inf, centre=(0.0, 0.0, 0.0), radius: float = 1.0):
        super().__init__(radius, (0.0, 1.0))
        self.sigma, self.ball = torch.nn.Parameter(torch.tensor(density)), ball
        self.register_buffer("centre", torch.tensor(centre))
        self.points = []  # how many each call took

    def forward(self, x: Float[Tensor, "N 3"]) -> tuple[Float[Tensor, " N"], Float[Tensor, "N 3"]]:
        self.points.append(len(x))
        inside = ((x - self.centre).norm(dim=-1) < self.ball) & (x.abs().amax(-1) <= self.radius)
        return self.sigma * inside, (x / self.radius + 1) / 2

    def density(self, x: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
        return self.forward(x)[0]

    def normals(self, x: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        return F.normalize(x - self.centre, dim=-1)


class Swirl(Fog):
    """Density and colour that differ at every point."""

    def forward(self, x: Float[Tensor, "N 3"]) -> tuple[Float[Tensor, " N"], Float[Tensor, "N 3"]]:
        self.points.append(len(x))
        wave = torch.sin(3 * x[:, 0] + 2 * x[:, 1]) * torch.cos(4 * x[:, 2])
        return self.sigma * (1 + wave), torch.sigmoid(5 * x.roll(1, dims=-1))


def sky(directions: Tensor) -> Tensor:
    return (directions + 1) / 2


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
