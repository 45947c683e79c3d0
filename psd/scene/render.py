"""Volume rendering of a field: emission and absorption along the rays of cameras (NeRF, eqs. 3 and 5).

    w_i = T_i (1 - exp(-sigma_i dt_i)),  T_i = exp(-sum_{j<i} sigma_j dt_j)
    rgb = sum w_i c_i + (1 - sum w_i) background

Only samples in occupied cells of the box are evaluated. They are packed: one row each, with the index of its ray. A
march says where they lie and turns their densities into weights; the rest is the same for all. Knows nothing of losses
or of what the field is made of. Distances t are in world units along unit directions.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import nerfacc
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from psd.scene.cameras import Cameras, camera_rays
from psd.scene.fields import Field, ShadowedBackground

Background = Callable[[Float[Tensor, "R 3"]], Float[Tensor, "R 3"]]  # of directions; a ShadowedBackground: origins too

STEPS = 512  # of the packed march across the box's diagonal (MVDream's renderer)
CHUNK = 2**18  # samples that `render_views` holds at once


class Samples(NamedTuple):
    """Every evaluated sample of a rendering, in no particular order: what the orientation loss needs."""

    weights: Float[Tensor, " N"]
    normals: Float[Tensor, "N 3"]
    directions: Float[Tensor, "N 3"]


class Rendering(NamedTuple):
    """Pictures of B cameras."""

    rgb: Float[Tensor, "B 3 H W"]  # foreground + background * (1 - opacity)
    contrast: Float[Tensor, "B 1 H W"]  # max over channels |rgb - background|; without gradient
    foreground: Float[Tensor, "B 3 H W"]  # sum w c
    opacity: Float[Tensor, "B 1 H W"]  # sum w
    depth: Float[Tensor, "B 1 H W"]  # sum w t; divided by opacity it is the mean distance
    z_variance: Float[Tensor, "B 1 H W"]  # of t under w / opacity; 0 where opacity <= 0.5
    normal: Float[Tensor, "B 3 H W"] | None  # unit(sum w n), world axes, in [-1, 1]; 0 where there is nothing
    samples: Samples | None  # with normals only


class Occupancy:
    """Which cells of a coarse grid over the box are worth sampling: nerfacc's occupancy grid in plain torch.

    Each update takes the density at one random point of every cell, m <- max(0.95 m, sigma(x)). A cell is filled where
    m >= min(mean m, 0.01 / cell width), the latter being where crossing it absorbs a hundredth of the light; it is
    occupied if it or a neighbour is filled. nerfacc leaves out the neighbours: but then a voxel grid never grows beyond
    the ball it starts from. Every cell is occupied before the first update, and never are all empty.
    """

    def __init__(self, radius: float, device: torch.device | str = "cpu", resolution: int = 32):
        self.radius, self.resolution = radius, resolution
        self.density = torch.zeros(3 * (resolution,), device=device)  # m, axes x, y, z
        self.cells = torch.ones_like(self.density, dtype=torch.bool)
        self.bounds = self._bounds()

    @functools.cached_property
    def estimator(self) -> nerfacc.OccGridEstimator:
        """nerfacc's own grid over the same box, for its march."""
        r = self.radius
        grid = nerfacc.OccGridEstimator([-r, -r, -r, r, r, r], resolution=self.resolution)
        return grid.to(self.density.device)

    @torch.no_grad()
    def update(self, field: Field, generator: torch.Generator) -> None:
        """Look at the field anew; every ten steps or so is enough."""
        n, device = self.resolution, self.density.device
        corners = torch.stack(torch.meshgrid(*3 * [torch.arange(n, device=device)], indexing="ij"), -1).view(-1, 3)
        u = torch.rand(corners.shape, generator=generator, device=generator.device).to(device)
        width = 2 * self.radius / n
        density = field.density((corners + u) * width - self.radius)
        self.density = torch.maximum(0.95 * self.density, density.view_as(self.density))
        # Rounded, the mean of equal numbers may exceed them all.
        threshold = self.density.mean().minimum(self.density.amax()).clamp(max=0.01 / width)
        filled = ~(self.density < threshold)  # not ">=": a field of NaN shall show in the pictures, not pass as empty
        self.cells = F.max_pool3d(filled[None, None].float(), kernel_size=3, stride=1, padding=1)[0, 0] > 0
        self.bounds = self._bounds()

    def _bounds(self) -> tuple[Float[Tensor, " 3"], Float[Tensor, " 3"]]:
        """Lower and upper corner of the smallest box around the occupied cells."""
        occupied, width = self.cells.nonzero(), 2 * self.radius / self.resolution
        return occupied.amin(0) * width - self.radius, (occupied.amax(0) + 1) * width - self.radius

    def along(
        self, origins: Float[Tensor, "R 3"], directions: Float[Tensor, "R 3"], t: Float[Tensor, "R S"]
    ) -> Bool[Tensor, "R S"]:
        """Whether origins + t * directions, all of them within the box, lie in occupied cells.

        Works axis by axis in cell units, without the points: a quarter of the time.
        """
        n, scale = self.resolution, self.resolution / (2 * self.radius)
        start, slope = (origins + self.radius) * scale, directions * scale
        cell = torch.zeros_like(t)  # exact up to 2^24 cells
        for axis in range(3):
            cell.mul_(n).add_(torch.addcmul(start[:, axis, None], slope[:, axis, None], t).floor_())
        # Rounding may put a point of the box's faces outside.
        cell = cell.clamp_(0, n**3 - 1).int()
        return self.cells.flatten().index_select(0, cell.flatten()).view(t.shape)


@dataclass(frozen=True)
class DenseMarch:
    """N of rows x S intervals, those in occupied cells; the others count as empty. Any device."""

    ray: Int[Tensor, " N"]
    t: Float[Tensor, " N"]  # middle of the interval
    starts: Float[Tensor, "rows S"]
    ends: Float[Tensor, "rows S"]
    place: Int[Tensor, " N"]  # of the sample among rows x S

    def weights(self, density: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """w_i of the module's docstring."""
        sigma = self.starts.new_zeros(self.starts.numel()).index_copy(0, self.place, density).view_as(self.starts)
        weights, _, _ = nerfacc.render_weight_from_density(self.starts, self.ends, sigma)
        return weights.flatten().index_select(0, self.place)


@dataclass(frozen=True)
class PackedMarch:
    """N intervals, those of a ray in a row and in order. CUDA with nerfacc's compiled extension."""

    ray: Int[Tensor, " N"]
    t: Float[Tensor, " N"]  # middle of the interval
    starts: Float[Tensor, " N"]
    ends: Float[Tensor, " N"]
    rays: int

    def weights(self, density: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """w_i of the module's docstring."""
        return nerfacc.render_weight_from_density(
            self.starts, self.ends, density, ray_indices=self.ray, n_rays=self.rays
        )[0]


@torch.no_grad()
def march_dense(
    origins: Float[Tensor, "R 3"],
    directions: Float[Tensor, "R 3"],
    radius: float,
    samples: int,
    offset: Float[Tensor, " R"],
    occupancy: Occupancy | None,
) -> DenseMarch:
    """`samples` equal steps along the part of each ray inside the box, the k-th sampled at (k + offset) steps.

    The box is +-radius, or with an occupancy the one around its occupied cells: as the scene takes shape the steps
    get finer. Its empty cells are left out, as are the rays that miss the box.
    """
    corner = origins.new_full((3,), radius)
    near, far = slab(origins, directions, *((-corner, corner) if occupancy is None else occupancy.bounds))
    rows = (near < far).nonzero()[:, 0]
    step = ((far - near) / samples)[rows, None]
    k = torch.arange(samples, device=origins.device)
    middle = near[rows, None] + (k + offset[rows, None]) * step
    starts, ends = middle - step / 2, middle + step / 2
    if occupancy is None:
        place = torch.arange(middle.numel(), device=origins.device)
    else:
        place = occupancy.along(origins[rows], directions[rows], middle).flatten().nonzero()[:, 0]
    ray, t = rows.index_select(0, place // samples), middle.flatten().index_select(0, place)
    return DenseMarch(ray, t, starts, ends, place)


def slab(
    origins: Float[Tensor, "R 3"],
    directions: Float[Tensor, "R 3"],
    low: Float[Tensor, " 3"],
    high: Float[Tensor, " 3"],
) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
    """Distances at which rays enter and leave the box [low, high]; they meet it in front of them where near < far."""
    a, b = (low - origins) / directions, (high - origins) / directions
    return torch.minimum(a, b).amax(-1).clamp(min=0), torch.maximum(a, b).amin(-1)


@torch.no_grad()
def march_packed(
    field: Field,
    origins: Float[Tensor, "R 3"],
    directions: Float[Tensor, "R 3"],
    offset: Float[Tensor, " R"],
    occupancy: Occupancy,
) -> PackedMarch:
    """MVDream's: steps of 1/512 of the box's diagonal through the occupied cells, without those nobody sees.

    Left out are samples of alpha < 0.01 and those behind T < 1e-4, after a look at the density alone. nerfacc's own
    `stratified` draws from the global generator: instead each ray starts `offset` steps on.
    """
    step, grid = 2 * 3**0.5 * occupancy.radius / STEPS, occupancy.estimator
    grid.binaries, grid.occs = occupancy.cells[None], occupancy.density.flatten() * step

    def density(starts: Tensor, ends: Tensor, ray: Tensor) -> Tensor:
        return field.density(origins[ray] + directions[ray] * ((starts + ends) / 2)[:, None])

    ray, starts, ends = grid.sampling(
        origins, directions, sigma_fn=density, t_min=offset * step, render_step_size=step, alpha_thre=0.01
    )
    return PackedMarch(ray, (starts + ends) / 2, starts, ends, len(origins))


@functools.cache
def extension_works(device: torch.device) -> bool:
    """Whether nerfacc's compiled extension runs on this device. Never compiles it: that takes minutes and nvcc."""
    if device.type != "cuda":
        return False
    try:
        importlib.import_module("nerfacc.csrc")  # ahead of nerfacc, which would turn to the compiler
        one_ray = torch.tensor([[0, 2]], device=device)
        return nerfacc.exclusive_sum(torch.ones(2, device=device), one_ray).tolist() == [0, 1]
    except (ImportError, RuntimeError):  # none, or built for another torch or another GPU
        return False


def accumulate(
    march: DenseMarch | PackedMarch,
    rays: int,
    density: Float[Tensor, " N"],
    rgb: Float[Tensor, "N 3"],
    normals: Float[Tensor, "N 3"] | None,
) -> tuple[Float[Tensor, "{rays} C"], Float[Tensor, " N"]]:
    """Sums along each ray, in columns: foreground 3, opacity, depth, z_variance and with normals normal 3; the weights.

    What they are is said at `Rendering`.
    """
    weights, t = march.weights(density), march.t[:, None]
    about = t.mean() if len(t) else 0.0  # squares of distances from here lose no digits
    values = [rgb, torch.ones_like(t), t, (t - about) ** 2] + ([] if normals is None else [normals])
    # One sum over all columns: its backward is half that of a sum for each.
    sums = nerfacc.accumulate_along_rays(weights, torch.cat(values, 1), march.ray, rays)
    opacity, depth, squares = sums[:, 3:6].split(1, 1)
    norm = opacity.clamp(min=1e-5)
    z_variance = (squares / norm - ((depth - about * opacity) / norm) ** 2).clamp(min=0) * (opacity > 0.5)
    normal = F.normalize(sums[:, 6:], dim=1)
    return torch.cat([sums[:, :5], z_variance, normal], 1), weights


def render_rays(
    field: Field,
    background: Background,
    origins: Float[Tensor, "R 3"],
    directions: Float[Tensor, "R 3"],
    samples: int,
    jitter: torch.Generator | None,
    with_normals: bool,
    occupancy: Occupancy | None,
) -> tuple[Float[Tensor, "R C"], Samples | None]:
    """The columns of `accumulate` behind those of rgb and contrast, and the samples if normals are asked for."""
    if jitter is None:
        offset = origins.new_full((len(origins),), 0.5)
    else:
        offset = torch.rand(len(origins), generator=jitter, device=jitter.device).to(origins.device)
    if occupancy is not None and extension_works(origins.device):
        march = march_packed(field, origins, directions, offset, occupancy)
    else:
        march = march_dense(origins, directions, field.radius, samples, offset, occupancy)
    along = directions.index_select(0, march.ray)
    points = torch.addcmul(origins.index_select(0, march.ray), along, march.t[:, None])
    density, rgb = field(points)
    normals = field.normals(points) if with_normals else None
    columns, weights = accumulate(march, len(origins), density, rgb, normals)
    placed = isinstance(background, ShadowedBackground)
    behind = background(directions, origins) if placed else background(directions)
    composed = columns[:, :3] + behind * (1 - columns[:, 3:4])
    contrast = (composed - behind).detach().abs().amax(1, keepdim=True)
    return torch.cat([composed, contrast, columns], 1), None if normals is None else Samples(weights, normals, along)


def render(
    field: Field,
    background: Background,
    cameras: Cameras,
    size: int,
    *,
    samples: int,
    jitter: torch.Generator | None,
    with_normals: bool,
    occupancy: Occupancy | None,
) -> Rendering:
    """Square pictures of `size` px, differentiable in the field and the background; `samples` a ray.

    jitter      one number a ray moves all its samples within their steps (nerfacc's stratified sampling); None: middles
    occupancy   empty cells are passed over and the samples spread over the occupied ones' box, so that fewer will do;
                where nerfacc's compiled extension runs, its march takes over, which has its own number of steps
    """
    origins, directions = (rays.reshape(-1, 3) for rays in camera_rays(cameras, size, size))
    columns, kept = render_rays(field, background, origins, directions, samples, jitter, with_normals, occupancy)
    return pictures(columns, len(cameras), size, kept)


@torch.no_grad()
def render_views(
    field: Field,
    background: Background,
    cameras: Cameras,
    size: int,
    *,
    samples: int,
    occupancy: Occupancy | None = None,
    with_normals: bool = False,
) -> Rendering:
    """`render` for looking at: no gradient, no jitter, any number of rays in bounded memory; keeps no `samples`."""
    columns = []
    for i in range(len(cameras)):
        rays = [each.reshape(-1, 3) for each in camera_rays(cameras[i : i + 1], size, size)]
        for origins, directions in zip(*(each.split(max(CHUNK // samples, 1)) for each in rays)):
            columns += render_rays(field, background, origins, directions, samples, None, with_normals, occupancy)[:1]
    return pictures(torch.cat(columns), len(cameras), size, None)


def pictures(columns: Float[Tensor, "R C"], views: int, size: int, samples: Samples | None) -> Rendering:
    """The columns of `render_rays` as images."""
    images = columns.view(views, size, size, -1).permute(0, 3, 1, 2)
    *parts, normal = images.split([3, 1, 3, 1, 1, 1, images.shape[1] - 10], 1)
    return Rendering(*parts, normal if normal.shape[1] else None, samples)
