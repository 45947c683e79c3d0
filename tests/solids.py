"""Fields of simple solids, a rasteriser that goes face by face, and both of them seen by the same cameras."""

from __future__ import annotations

import numpy as np
import torch

from psd.scene.cameras import Cameras, orbit_cameras
from psd.scene.fields import ConstantBackground, Field
from psd.scene.mesh import Mesh
from psd.scene.render import render_views

GREY = 0.5  # what an optimised field keeps inside, where no ray gets
SIZE = 64  # px of the comparisons


class Balls(Field):
    """Union of balls (centre, radius, rgb) of density softplus(steepness * depth) * scale, painted in a thin shell.

    The paint is lit from above; under the shell and far outside all is grey, as in fields that a run has optimised.
    """

    def __init__(self, *balls: tuple, steepness: float = 400.0, scale: float = 1.0, radius: float = 1.0):
        super().__init__(radius, (0.0, 1.0))
        self.steepness, self.scale = steepness, scale
        self.centres, self.radii, self.rgb = (torch.tensor([ball[k] for ball in balls]) for k in range(3))

    def forward(self, x):
        offset = x[:, None] - self.centres
        distance = offset.norm(dim=-1) - self.radii
        depth, nearest = (-distance).max(1)
        light = 0.75 + 0.25 * torch.nn.functional.normalize(offset, dim=-1)[torch.arange(len(x)), nearest, 2]
        painted = (depth.abs() < 0.12)[:, None]
        return self._solid(depth), torch.where(painted, self.rgb[nearest] * light[:, None], GREY)

    def density(self, x):
        return self._solid(-((x[:, None] - self.centres).norm(dim=-1) - self.radii).amin(1))

    def _solid(self, depth):
        return torch.nn.functional.softplus(self.steepness * depth) * self.scale


class Shape(Field):
    """Any density function."""

    def __init__(self, density, radius: float = 1.0):
        super().__init__(radius, (0.0, 1.0))
        self.density = density

    def forward(self, x):
        return self.density(x), torch.full_like(x, GREY)


def overlapping(**kwargs) -> Balls:
    return Balls(((0.2, 0.0, 0.0), 0.35, (0.9, 0.2, 0.1)), ((-0.2, 0.1, 0.1), 0.3, (0.1, 0.3, 0.9)), **kwargs)


def rasterised(
    vertices: np.ndarray, faces: np.ndarray, uv: np.ndarray, texture: np.ndarray, pose: np.ndarray, fovy_deg: float
) -> tuple[np.ndarray, np.ndarray]:
    """rgb [SIZE, SIZE, 3] in [0, 1] without light, and what is covered; faces seen from behind are culled.

    One face after another into a depth buffer; pose columns right, up, -look, position; uv from the lower left.
    """
    right, up, depth = ((vertices - pose[:3, 3]) @ pose[:3, :3]).T * [[1], [1], [-1]]
    focal = SIZE / 2 / np.tan(np.deg2rad(fovy_deg) / 2)
    screen = np.stack([SIZE / 2 + focal * right / depth, SIZE / 2 - focal * up / depth], 1)
    rgb, nearest = np.zeros((SIZE, SIZE, 3)), np.full((SIZE, SIZE), np.inf)
    side = len(texture)
    for face in faces:
        a, b, c = screen[face]
        to_b, to_c = b - a, c - a
        area = to_b[0] * to_c[1] - to_b[1] * to_c[0]
        (x_0, y_0), (x_1, y_1) = np.ceil(screen[face].min(0) - 0.5), np.floor(screen[face].max(0) - 0.5)
        if area >= 0 or x_1 < x_0 or y_1 < y_0:  # clockwise here is counter-clockwise with y upwards
            continue
        x, y = np.meshgrid(np.arange(x_0, x_1 + 1), np.arange(y_0, y_1 + 1))
        off_x, off_y = x.ravel() + 0.5 - a[0], y.ravel() + 0.5 - a[1]
        weight_b, weight_c = (off_x * to_c[1] - off_y * to_c[0]) / area, (off_y * to_b[0] - off_x * to_b[1]) / area
        weights = np.stack([1 - weight_b - weight_c, weight_b, weight_c], 1)
        inside = (weights >= 0).all(1)
        weights = weights[inside] / depth[face]
        z = 1 / weights.sum(1)
        at = (y.ravel()[inside].astype(int), x.ravel()[inside].astype(int))
        closer = z < nearest[at]
        at = (at[0][closer], at[1][closer])
        u, v = ((weights * z[:, None])[closer] @ uv[face]).T
        nearest[at] = z[closer]
        row, column = ((1 - v) * side).astype(int).clip(0, side - 1), (u * side).astype(int).clip(0, side - 1)
        rgb[at] = texture[row, column] / 255
    return rgb, np.isfinite(nearest)


def around(field: Field, count: int = 8) -> tuple[Cameras, np.ndarray, np.ndarray]:
    """Cameras, the field's own colours (not dimmed by opacity) [B, H, W, 3] and opacity [B, H, W]."""
    cameras = orbit_cameras(count, elevation_deg=20.0, distance=2.4, azimuth_start_deg=15.0)
    seen = render_views(field, ConstantBackground((0.5,) * 3), cameras, SIZE, samples=160)
    return cameras, seen.foreground.permute(0, 2, 3, 1).numpy(), seen.opacity[:, 0].numpy()


def seen_of(mesh: Mesh, cameras: Cameras) -> list[tuple[np.ndarray, np.ndarray]]:
    corners = mesh.vertices[mesh.atlas.vertices]
    return [
        rasterised(corners, mesh.atlas.faces, mesh.atlas.uv, mesh.texture, pose.numpy(), 40.0) for pose in cameras.c2w
    ]
