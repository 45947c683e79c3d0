"""Views of a mesh: a small exact rasteriser in plain torch.

A ray sees the first triangle that it meets. With the corners v_0, v_1, v_2 relative to the eye and a unit direction d,

    w_k = (v_{k+1} x v_{k+2}) . d / v_0 . (v_1 x v_2)      solves      sum_k w_k v_k = d:

the ray meets the triangle where no w_k is negative, at the distance 1 / sum w, and w / sum w are the barycentric
weights there, perspective and all. What lies behind the eye needs no clipping. (Olano and Greer 1997, in world
coordinates.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from psd.scene.cameras import Cameras, camera_rays
from psd.scene.render import Background, Rendering

CHUNK = 2**20  # pairs of a triangle and a pixel that are looked at together
SUBPIXELS = 2  # along each side of a pixel: without them edges and textures flicker, and rewards see it
ON_EDGE = 1e-9  # of a barycentric weight: neighbours share their edge, and no ray slips through between them


def white(directions: Float[Tensor, "*shape 3"]) -> Float[Tensor, "*shape 3"]:
    return torch.ones_like(directions)


class Hits(NamedTuple):
    """What the N rays that meet something meet first."""

    ray: Int[Tensor, " N"]  # row * size + column
    face: Int[Tensor, " N"]
    weights: Float[Tensor, "N 3"]  # barycentric, in the order of the face's corners
    distance: Float[Tensor, " N"]


@dataclass(frozen=True, eq=False)
class MeshScene:
    """Triangles in world coordinates (z-up, front +x), seen from both sides, in their base colour without light.

    The base colour is as in glTF a corner's colour, linear, times the face's texture, sRGB. Beyond [0, 1] a texture
    repeats. uv starts at the texture's lower left, v upwards.
    """

    vertices: Float[Tensor, "V 3"]
    faces: Int[Tensor, "F 3"]
    normals: Float[Tensor, "V 3"]
    colours: Float[Tensor, "V 3"]
    uv: Float[Tensor, "V 2"]
    texture: Int[Tensor, " F"]  # index in `textures`; -1: none
    textures: tuple[UInt8[Tensor, "_ _ 3"], ...]  # row 0 is the upper edge
    background: Background = white

    @property
    def radius(self) -> float:
        return self.vertices[self.faces].abs().max().item()

    @torch.no_grad()
    def render(self, cameras: Cameras, size: int, *, samples: int, with_normals: bool = False) -> Rendering:
        """Each pixel is the mean of SUBPIXELS^2 rays. A surface is met at one distance, so that `samples` and the
        variance of z are without meaning here; the latter is 0."""
        views = [self._seen(cameras[i : i + 1].to(self.vertices.device), size) for i in range(len(cameras))]
        foreground, opacity, depth, normal = torch.cat(views).split([3, 1, 1, 3], 1)
        _, directions = camera_rays(cameras.to(self.vertices.device), size, size)
        behind = self.background(directions.reshape(-1, 3)).view_as(directions).permute(0, 3, 1, 2)
        rgb = foreground + behind * (1 - opacity)
        contrast = (rgb - behind).abs().amax(1, keepdim=True)
        normal = F.normalize(normal, dim=1) if with_normals else None
        return Rendering(rgb, contrast, foreground, opacity, depth, torch.zeros_like(depth), normal, None)

    def _seen(self, camera: Cameras, size: int) -> Float[Tensor, "1 8 {size} {size}"]:
        """Means over each pixel's rays: foreground 3, opacity, depth, normal 3."""
        fine = SUBPIXELS * size
        hits = first_hits(self.vertices, self.faces, camera, fine)
        columns = self.vertices.new_zeros(fine * fine, 8)
        normal = F.normalize(self._between(self.normals, hits), dim=1)
        one, distance = torch.ones_like(normal[:, :1]), hits.distance[:, None].float()
        columns[hits.ray] = torch.cat([self._colours(hits), one, distance, normal], 1)
        return F.avg_pool2d(columns.T.reshape(1, 8, fine, fine), SUBPIXELS)

    def _between(self, rows: Float[Tensor, "V C"], hits: Hits) -> Float[Tensor, "N C"]:
        """Values of the corners interpolated where the rays meet their faces."""
        return torch.einsum("nk,nkc->nc", hits.weights.to(rows.dtype), rows[self.faces[hits.face]])

    def _colours(self, hits: Hits) -> Float[Tensor, "N 3"]:
        linear, uv, texture = self._between(self.colours, hits), self._between(self.uv, hits), self.texture[hits.face]
        for index, texels in enumerate(self.textures):
            here = (texture == index).nonzero()[:, 0]
            linear[here] *= linear_of(looked_up(texels, uv[here]))
        return srgb_of(linear)


def first_hits(vertices: Float[Tensor, "V 3"], faces: Int[Tensor, "F 3"], camera: Cameras, size: int) -> Hits:
    """What the rays through the size^2 pixel centres of one camera meet first; of equally near faces the first."""
    camera = Cameras(*(each.double() for each in vars(camera).values()))
    origins, directions = (rays.reshape(-1, 3) for rays in camera_rays(camera, size, size))
    corners = (vertices.double() - origins[0])[faces]
    across = torch.linalg.cross(corners.roll(-1, 1), corners.roll(-2, 1), dim=-1)
    volume = (corners[:, 0] * across[:, 0]).sum(-1, keepdim=True)
    planes = across / volume[..., None]  # w_k of a direction; not finite where a face is seen from its edge
    nearest = directions.new_full((size * size,), torch.inf)
    first = torch.full_like(nearest, len(faces), dtype=torch.long)
    for face, ray in candidates(corners, camera, size):
        w = (planes[face] * directions[ray][:, None]).sum(-1)
        total = w.sum(-1)
        met = (w >= -ON_EDGE * total[:, None]).all(-1) & (total > 0) & total.isfinite()
        face, ray, distance = face[met], ray[met], 1 / total[met]
        before = nearest[ray]
        nearest.scatter_reduce_(0, ray, distance, "amin")
        won = (distance == nearest[ray]) & (distance < before)
        face, ray = face[won], ray[won]
        first[ray] = len(faces)
        first.scatter_reduce_(0, ray, face, "amin")
    ray = nearest.isfinite().nonzero()[:, 0]
    face, distance = first[ray], nearest[ray]
    return Hits(ray, face, (planes[face] * directions[ray][:, None]).sum(-1) * distance[:, None], distance)


def candidates(
    corners: Float[Tensor, "F 3 3"], camera: Cameras, size: int
) -> Iterator[tuple[Int[Tensor, " N"], Int[Tensor, " N"]]]:
    """Pairs of a face and a pixel (row * size + column) of its bounding box, about CHUNK at a time.

    The box of a face that reaches behind the eye is the whole picture. `corners` are relative to the eye.
    """
    right, up, back = camera.c2w[0, :3, :3].T
    depth = -corners @ back
    focal = size / 2 / torch.tan(torch.deg2rad(camera.fovy_deg) / 2)
    place = size / 2 + torch.stack([corners @ right, -(corners @ up)], -1) * (focal / depth)[..., None]
    ahead = (depth > 0).all(1)[:, None]
    slack = 1e-6  # px, for rounding
    low, high = place.amin(1) - 0.5 - slack, place.amax(1) - 0.5 + slack
    low = torch.where(ahead, low, 0).clamp(0, size).ceil().long()
    high = torch.where(ahead, high, size).clamp(-1, size - 1).floor().long()
    width, height = (high - low + 1).clamp(min=0).T
    count = torch.where((depth > 0).any(1), width * height, 0)
    until = count.cumsum(0)
    ends = torch.arange(CHUNK, int(until[-1]) + CHUNK, CHUNK, device=until.device)
    last = 0
    for end in torch.searchsorted(until, ends, right=True).add(1).clamp(max=len(count)).unique().tolist():
        face = torch.arange(last, end, device=until.device).repeat_interleave(count[last:end])
        within = torch.arange(len(face), device=until.device) - (until - count)[face] + (until - count)[last]
        column, row = low[face, 0] + within % width[face], low[face, 1] + within // width[face]
        yield face, row * size + column
        last = end


def looked_up(texels: UInt8[Tensor, "h w 3"], uv: Float[Tensor, "N 2"]) -> Float[Tensor, "N 3"]:
    """Bilinear between the texels' centres, in [0, 1]; at the texture's edges it stays with the outermost texel."""
    height, width = texels.shape[:2]
    u, v = torch.where((uv >= 0) & (uv <= 1), uv, uv - uv.floor()).T
    x, y = (u * width - 0.5).clamp(0, width - 1), ((1 - v) * height - 0.5).clamp(0, height - 1)
    column, row = x.long(), y.long()
    x, y = (x - column)[:, None], (y - row)[:, None]
    beside, below = (column + 1).clamp(max=width - 1), (row + 1).clamp(max=height - 1)
    upper = torch.lerp(texels[row, column].float(), texels[row, beside].float(), x)
    lower = torch.lerp(texels[below, column].float(), texels[below, beside].float(), x)
    return torch.lerp(upper, lower, y) / 255


def linear_of(srgb: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Light of a colour, both in [0, 1] (IEC 61966-2-1).

    Renders, textures, PLY and MTL hold sRGB. Only glTF's corner colours and factors are light, so that this and
    `srgb_of` are needed to read a GLB alone: what we write has none of either.
    """
    return torch.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def srgb_of(linear: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The reverse of `linear_of`; light beyond [0, 1] is cut off."""
    linear = linear.clamp(0, 1)
    return torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
