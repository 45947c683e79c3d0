"""Radiance fields, density and colour at points of a box, and the backgrounds behind them.

Two fields of one interface: VoxelField, a dense grid that optimises in seconds on a CPU, and HashField, the hash grid
with two small networks of threestudio's `implicit-volume` that MVDream's configuration uses. Colours have no view
direction. Points are world coordinates. Nothing here knows of rays: those are cameras.py's, integration render.py's.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from psd.scene.hashgrid import CORNERS, HashGrid, add_weighted_rows, corner_weights, weighted_rows

# Of a shadow, in half-widths of the box: how far it may reach, where the ground is first; its grid; a faint start.
SHADOW_REACH, GROUND, SHADOW_CELLS, SHADOW_START = 1.3, -0.56, 20, -4.0


class Field(nn.Module):
    """density(x) = softplus(raw(x) + bias(x)), zero outside the box of half-width `radius`; rgb(x) = sigmoid(features).

    bias(x) = scale * (1 - |x| / std), (scale, std) = `density_bias`: a ball to start from (threestudio: blob_magic3d).
    A field gives its raw values (`raw_features`, `raw_density`) and the gradient of the raw density (`raw_slope`).
    """

    def __init__(self, radius: float, density_bias: tuple[float, float]):
        super().__init__()
        self.radius, self.density_bias = radius, density_bias

    @property
    def device(self) -> torch.device:
        """Where the field computes; one without parameters and buffers on the CPU."""
        return next((tensor.device for tensor in [*self.parameters(), *self.buffers()]), torch.device("cpu"))

    def forward(self, x: Float[Tensor, "N 3"]) -> tuple[Float[Tensor, " N"], Float[Tensor, "N 3"]]:
        """Density and rgb in [0, 1]."""
        raw, features = self.raw_features(x)
        return self._activated(raw, x), torch.sigmoid(features)

    def density(self, x: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
        """Density alone, for less than `forward` costs."""
        return self._activated(self.raw_density(x), x)

    def normals(self, x: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        """Unit normals -grad density / |grad density|, differentiable in the field's parameters; zero where grad is.

        softplus rises, so the gradient of raw + bias has the direction of the density's, also where the density itself
        has all but vanished. It is written out (`raw_slope`) and not taken by autograd: the orientation loss then needs
        no second derivatives, and pictures need no graph. x is taken as a constant.
        """
        x = x.detach()
        scale, std = self.density_bias
        slope = self.raw_slope(x) - (scale / std) * F.normalize(x, dim=-1)
        return -F.normalize(slope, dim=-1)

    def _activated(self, raw: Float[Tensor, " N"], x: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
        scale, std = self.density_bias
        columns = x.T.contiguous()  # sums over rows of three are slow, and so is vector_norm over columns
        bias = scale - (scale / std) * columns.square().sum(0).sqrt()
        return F.softplus(raw + bias) * (columns.abs().amax(0) <= self.radius)

    def raw_features(self, x: Float[Tensor, "N 3"]) -> tuple[Float[Tensor, " N"], Float[Tensor, "N 3"]]:
        """Raw density and colour, before bias and activation."""
        raise NotImplementedError

    def raw_density(self, x: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
        raise NotImplementedError

    def raw_slope(self, x: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        """d raw density / d x, differentiable in the parameters."""
        raise NotImplementedError

    def parameter_groups(self) -> list[dict]:
        """For an optimiser: parameters and their learning rates."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """What another field of this class can go on from (`take`)."""
        return self.state_dict()

    def take(self, state: dict[str, Tensor]) -> None:
        """Go on from what a field of this class was. Raises RuntimeError where the two do not fit."""
        self.load_state_dict(state)


class VoxelField(Field):
    """Trilinear interpolation of a grid [1, 4, R, R, R]: raw density and raw rgb; axes z, y, x; corners on the box's.

    A fresh grid is zero: the grey ball of the density bias. Differentiable in the grid, not in the points: `forward`
    raises RuntimeError for points that require a gradient.

    The grid holds raw density / `density_gain`: under Adam, whose steps know no scale, density's rate is so much larger
    than the colours'. One voxel takes a density of 2.3 / its width to be 90 % opaque, 77 of 48 in the toybox's box: at
    a rate at which colours keep still, that is fog for hundreds of steps.
    """

    def __init__(
        self,
        resolution: int = 48,
        radius: float = 1.0,
        density_bias: tuple[float, float] = (10.0, 0.5),
        learning_rate: float = 0.05,
        density_gain: float = 1.0,
    ):
        super().__init__(radius, density_bias)
        self.resolution, self.learning_rate, self.density_gain = resolution, learning_rate, density_gain
        self.voxels = nn.Parameter(torch.zeros(1, 4, resolution, resolution, resolution))

    def raw_features(self, x: Float[Tensor, "N 3"]) -> tuple[Float[Tensor, " N"], Float[Tensor, "N 3"]]:
        table = self.voxels.view(4, -1).T.contiguous()
        index, fraction = self._cells(x)
        raw = Interpolation.apply(table, index, corner_weights(fraction)).T.contiguous()
        return self.density_gain * raw[0], raw[1:].T

    def raw_density(self, x: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
        grid = (x / self.radius).view(1, 1, 1, -1, 3)
        raw = F.grid_sample(self.voxels[:, :1], grid, padding_mode="border", align_corners=True)
        return self.density_gain * raw.view(-1)

    def raw_slope(self, x: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        table = self.voxels[0, 0].reshape(-1, 1)
        index, fraction = self._cells(x)
        slopes = [Interpolation.apply(table, index, corner_weights(fraction, axis)) for axis in range(3)]
        return torch.cat(slopes, -1) * (self.density_gain * (self.resolution - 1) / (2 * self.radius))

    def parameter_groups(self) -> list[dict]:
        return [{"params": [self.voxels], "lr": self.learning_rate}]

    @torch.no_grad()
    def state(self) -> dict[str, Tensor]:
        """The grid's raw values, without the gain."""
        return {"voxels": self.voxels * self._gains()}

    @torch.no_grad()
    def take(self, state: dict[str, Tensor]) -> None:
        """At this field's resolution."""
        grid = state["voxels"].to(self.voxels) / self._gains()
        self.voxels.copy_(grid if grid.shape[-1] == self.resolution else upsampled(grid, self.resolution))

    def _gains(self) -> Float[Tensor, "1 4 1 1 1"]:
        return self.voxels.new_tensor([self.density_gain, 1, 1, 1]).view(1, 4, 1, 1, 1)

    @torch.no_grad()
    def refine(self, resolution: int) -> None:
        """Put the grid on `resolution` points a side; `voxels` is a new parameter then.

        The same field where the old number less one divides the new less one, else as near as linear pieces come.
        """
        self.voxels, self.resolution = nn.Parameter(upsampled(self.voxels, resolution)), resolution

    def total_variation(self) -> Float[Tensor, ""]:
        """Smoothness: mean squared slope of the grid's values, bias and gain left out, per unit of length, over all
        channels."""
        across = (self.resolution - 1) / (2 * self.radius)
        return SquaredSteps.apply(self.voxels) * across**2

    def _cells(self, x: Float[Tensor, "N 3"]) -> tuple[Int[Tensor, "N 8"], Float[Tensor, "3 N"]]:
        """Rows of the flat grid at the corners of each point's cell, and the point's place in the cell."""
        size = self.resolution
        u = ((x.T.contiguous() + self.radius) * ((size - 1) / (2 * self.radius))).clamp_(0, size - 1)
        cell = u.to(torch.int32).clamp_(max=size - 2)
        first = (cell[2] * size + cell[1]) * size + cell[0]
        index = first.new_empty(len(x), 8)
        for column, (i, j, k) in enumerate(CORNERS):
            torch.add(first, (k * size + j) * size + i, out=index[:, column])
        return index, u - cell


def upsampled(grid: Float[Tensor, "1 C r r r"], resolution: int) -> Float[Tensor, "1 C R R R"]:
    """Trilinear, corners on corners."""
    return F.interpolate(grid, 3 * (resolution,), mode="trilinear", align_corners=True)


class Interpolation(torch.autograd.Function):
    """rows[n] = sum_k weight[n, k] * table[index[n, k]], differentiable in the table only.

    Instead of F.grid_sample, whose backward pass also forms the points' gradient that nothing here needs: on one CPU
    core forward and backward together take 0.6 of its time.
    """

    @staticmethod
    def forward(
        ctx, table: Float[Tensor, "V C"], index: Int[Tensor, "N 8"], weight: Float[Tensor, "N 8"]
    ) -> Float[Tensor, "N C"]:
        ctx.save_for_backward(index, weight)
        ctx.rows = len(table)
        return weighted_rows(table, index, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Float[Tensor, "N C"]) -> tuple[Float[Tensor, "V C"], None, None]:
        index, weight = ctx.saved_tensors
        table_gradient = gradient.new_zeros(gradient.shape[1], ctx.rows).T
        add_weighted_rows(table_gradient, index, weight, gradient)
        return table_gradient, None, None


class SquaredSteps(torch.autograd.Function):
    """Sum over the three axes of the mean squared difference between neighbours of a grid [1, C, R, R, R].

    A quadratic form v.Lv / count, so that one pass gives value and gradient: a quarter of autograd's time.
    """

    @staticmethod
    def forward(ctx, grid: Float[Tensor, "1 C R R R"]) -> Float[Tensor, ""]:
        size = grid.shape[-1]
        pull, ctx.count = torch.zeros_like(grid), grid.numel() // size * (size - 1)
        scratch = torch.empty_like(grid)  # one for all: beyond 32 MB the system hands out fresh pages each time
        for axis in (2, 3, 4):
            step, low, high = (each.narrow(axis, at, size - 1) for each, at in ((scratch, 0), (grid, 0), (grid, 1)))
            torch.sub(high, low, out=step)
            pull.narrow(axis, 1, size - 1).add_(step)
            pull.narrow(axis, 0, size - 1).sub_(step)
        ctx.save_for_backward(pull)
        return torch.mul(pull, grid, out=scratch).sum() / ctx.count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Float[Tensor, ""]) -> Float[Tensor, "1 C R R R"]:
        (pull,) = ctx.saved_tensors
        return pull * (2 * gradient / ctx.count)


class HashField(Field):
    """Multi-resolution hash grid; a network of one hidden layer without biases for raw density, another for raw rgb.

    Defaults are MVDream's configuration (threestudio's `implicit-volume`). float32.
    """

    def __init__(
        self,
        levels: int = 16,
        log2_size: int = 19,
        base_resolution: int = 16,
        growth: float = 1.447269237440378,
        hidden: int = 64,
        radius: float = 1.0,
        density_bias: tuple[float, float] = (10.0, 0.5),
    ):
        super().__init__(radius, density_bias)
        self.encoding = HashGrid(levels, log2_size, base_resolution, growth)
        self.density_network = network(self.encoding.width, hidden, 1)
        self.feature_network = network(self.encoding.width, hidden, 3)

    def raw_features(self, x: Float[Tensor, "N 3"]) -> tuple[Float[Tensor, " N"], Float[Tensor, "N 3"]]:
        encoded = self.encoding(self._unit(x))
        return self.density_network(encoded)[:, 0], self.feature_network(encoded)

    def raw_density(self, x: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
        return self.density_network(self.encoding(self._unit(x)))[:, 0]

    def raw_slope(self, x: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        """The chain rule through the network, one row of its Jacobian: (W_2 * [W_1 e > 0]) W_1, then the encoding."""
        first, _, last = self.density_network
        u = self._unit(x)
        active = (first(self.encoding(u)) > 0).to(x.dtype)
        return self.encoding.slope(u, (active * last.weight) @ first.weight) / (2 * self.radius)

    def parameter_groups(self) -> list[dict]:
        networks = [*self.density_network.parameters(), *self.feature_network.parameters()]
        return [{"params": list(self.encoding.parameters()), "lr": 0.01}, {"params": networks, "lr": 0.001}]

    def _unit(self, x: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        return (x + self.radius) / (2 * self.radius)


def network(width: int, hidden: int, out: int, layers: int = 1) -> nn.Sequential:
    """width -> hidden (`layers` times) -> out, ReLU between, no biases."""
    sizes = [width] + [hidden] * layers
    modules = [m for i, o in pairwise(sizes) for m in (nn.Linear(i, o, bias=False), nn.ReLU())]
    return nn.Sequential(*modules, nn.Linear(hidden, out, bias=False))


class ConstantBackground(nn.Module):
    """One learned colour whatever the direction."""

    def __init__(self, rgb: tuple[float, float, float] = (0.5, 0.5, 0.5), learning_rate: float = 0.01):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(rgb).logit())
        self.learning_rate = learning_rate

    def forward(self, directions: Float[Tensor, "*shape 3"]) -> Float[Tensor, "*shape 3"]:
        return torch.sigmoid(self.logits).expand_as(directions)

    def parameter_groups(self) -> list[dict]:
        return [{"params": [self.logits], "lr": self.learning_rate}]


class ShadowedBackground(nn.Module):
    """One fixed colour, darkened where a ray meets the ground by a learned soft shadow. Our own.

    Priors draw what stands on the ground with its shadow. A field can only show it as dark haze below the object, which
    ends up in the mesh. Here it is part of what lies behind: a grid of opacities on the plane z = height, both learned.
    """

    def __init__(self, rgb: tuple[float, float, float], radius: float, learning_rate: float) -> None:
        super().__init__()
        self.register_buffer("rgb", torch.tensor(rgb))
        self.reach, self.learning_rate = SHADOW_REACH * radius, learning_rate
        self.height = nn.Parameter(torch.tensor(GROUND * radius))
        self.logits = nn.Parameter(torch.full((1, 1, SHADOW_CELLS, SHADOW_CELLS), SHADOW_START))

    def forward(self, directions: Float[Tensor, "R 3"], origins: Float[Tensor, "R 3"]) -> Float[Tensor, "R 3"]:
        down = directions[:, 2:].clamp(max=-1e-3)
        place = (origins + (self.height - origins[:, 2:]) / down * directions)[:, :2] / self.reach
        opacity = F.grid_sample(torch.sigmoid(self.logits), place[None, None], align_corners=False)[0, 0].T
        meets = (directions[:, 2:] < -1e-3) & (origins[:, 2:] > self.height)
        return self.rgb * (1 - opacity * meets)

    def parameter_groups(self) -> list[dict]:
        height = {"params": [self.height], "lr": 0.02 * self.learning_rate, "weight_decay": 0.0}
        return [{"params": [self.logits], "lr": self.learning_rate, "weight_decay": 0.0}, height]


class DirectionalBackground(nn.Module):
    """sigmoid of a network (two hidden layers of 16) of spherical harmonics: threestudio's neural environment map."""

    def __init__(self):
        super().__init__()
        self.network = network(9, 16, 3, layers=2)

    def forward(self, directions: Float[Tensor, "*shape 3"]) -> Float[Tensor, "*shape 3"]:
        """rgb in [0, 1] for unit directions."""
        return torch.sigmoid(self.network(spherical_harmonics(directions)))

    def parameter_groups(self) -> list[dict]:
        return [{"params": list(self.network.parameters()), "lr": 0.001}]


def spherical_harmonics(directions: Float[Tensor, "*shape 3"]) -> Float[Tensor, "*shape 9"]:
    """Real orthonormal harmonics of bands 0 to 2 at unit directions: tiny-cuda-nn's "degree 3", its order and signs."""
    x, y, z = directions.unbind(-1)
    band_0 = torch.full_like(x, math.sqrt(1 / (4 * math.pi)))
    c_1, c_2 = math.sqrt(3 / (4 * math.pi)), math.sqrt(15 / (4 * math.pi))
    band_1 = (-c_1 * y, c_1 * z, -c_1 * x)
    zonal, sectoral = (3 * z * z - 1) * (c_2 / math.sqrt(12)), (x * x - y * y) * (c_2 / 2)
    band_2 = (c_2 * x * y, -c_2 * y * z, zonal, -c_2 * x * z, sectoral)
    return torch.stack([band_0, *band_1, *band_2], -1)
