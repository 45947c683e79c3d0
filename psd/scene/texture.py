"""The colours of a mesh: those that renders of its field show, and where none looks those along the normals; baked.

sRGB, with the light that the field holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int, Int32, UInt8
from torch import Tensor

from psd.export import to_bytes
from psd.scene.cameras import Cameras
from psd.scene.fields import Field

CHUNK = 2**17  # points per call of the field: what bounds the memory of a hash grid
COLOUR_STEPS = range(-2, 6)  # grid cells below a surface point that its colour is gathered from
SLANT = 2.0  # mean of 1 / cos over the directions that see a surface, each weighted by cos, the size it is seen at
BEHIND = 0.1  # of the box's half-width: a point this far behind what a view shows is hidden from it
SEEN = 0.1  # weight of the colour along the normal beside the views' cos^2: what counts where hardly one looks
PIECE_FACES = 500  # of the surface that are unwrapped together: at 1,250 a third longer for a twentieth fewer corners
PADDING_PX = 4  # between charts of the atlas: two texels of each survive in the second mipmap


class Atlas(NamedTuple):
    """Where the triangles lie in the texture.

    It has corners of its own, because a vertex on a seam lies in several charts: corner `faces[f, k]` is that of vertex
    `vertices[faces[f, k]]`, the mesh's own `faces[f, k]`. uv starts at the texture's lower left, v upwards.
    """

    uv: Float32[np.ndarray, "U 2"]
    vertices: Int32[np.ndarray, " U"]
    faces: Int32[np.ndarray, "F 3"]


Paint = Callable[[Float32[np.ndarray, "N 3"], Float32[np.ndarray, "N 3"]], Float32[np.ndarray, "N 3"]]  # of normals


class Views(NamedTuple):
    """Renders of a field from all around, which a mesh of it is painted from."""

    cameras: Cameras
    rgb: Float[Tensor, "V 3 S S"]  # with the background that shines through: it is what is seen
    opacity: Float[Tensor, "V 1 S S"]
    depth: Float[Tensor, "V 1 S S"]  # sum w t, as a Rendering's


def painter(field: Field, cell: float, views: Views | None) -> Paint:
    """Colours of surface points, given their normals: those of the views that see a point, else along its normal.

    A soft field lets its background through, and the more the more slanting it is seen: what is seen is in the renders
    alone. A view counts with cos^2 of the angle that it sees the surface at, times the square of its opacity there.
    """

    def paint(points: Float32[np.ndarray, "N 3"], normals: Float32[np.ndarray, "N 3"]) -> Float32[np.ndarray, "N 3"]:
        below = surface_colours(field, points, normals, cell)
        if views is None:
            return below
        seen, weight = seen_colours(views, torch.from_numpy(points), torch.from_numpy(normals), BEHIND * field.radius)
        return ((seen.numpy() + SEEN * below) / (weight.numpy() + SEEN)).astype(np.float32)

    return paint


@torch.no_grad()
def seen_colours(
    views: Views, points: Float[Tensor, "N 3"], normals: Float[Tensor, "N 3"], behind: float
) -> tuple[Float[Tensor, "N 3"], Float[Tensor, "N 1"]]:
    """sum w c and sum w over the views, on the CPU; a point `behind` what a view shows has w = 0 there."""
    device = views.rgb.device
    points, normals = points.to(device), normals.to(device)
    total, weight = torch.zeros_like(points), torch.zeros_like(points[:, :1])
    for c2w, fovy_deg, *pictures in zip(views.cameras.c2w, views.cameras.fovy_deg, *views[1:]):
        right, up, back, position = c2w[:3].to(device).unbind(-1)
        towards = position - points
        distance = towards.norm(dim=-1)
        focal = 1 / torch.tan(torch.deg2rad(fovy_deg) / 2).to(device)
        x, y = (focal * (towards @ axis) / (towards @ back) for axis in (-right, up))
        place = torch.stack([x, y], -1)[None, None]
        read = F.grid_sample(torch.cat(pictures)[None], place, padding_mode="border", align_corners=False)[0, :, 0]
        rgb, opacity, depth = read.split([3, 1, 1])
        cosine = ((towards * normals).sum(-1) / distance).clamp(min=0)
        shown = (distance < depth / opacity.clamp(min=1e-6) + behind) & (place.abs() < 1).all(-1)[0]
        w = (cosine * opacity).square() * shown
        total += (w * rgb).T
        weight += w.T
    return total.cpu(), weight.cpu()


def surface_colours(
    field: Field, points: Float32[np.ndarray, "N 3"], normals: Float32[np.ndarray, "N 3"], cell: float
) -> Float32[np.ndarray, "N 3"]:
    """What the volume render shows there: sum w c / sum w down the normal from a little outside, w a ray's weights.

    A ray comes slanting, and its way through each layer is longer by SLANT. The colour of the point itself is that of
    the haze around the object, which no ray sees alone: against renders of fields of 300 steps its error is twice this
    one's. A single sample below the surface does as well on some fields only.
    """
    device = field.device
    depth = cell * torch.tensor(COLOUR_STEPS, device=device)
    colours = []
    with torch.no_grad():
        for point, normal in zip(*(torch.from_numpy(rows).split(CHUNK // len(depth)) for rows in (points, normals))):
            along = point.to(device)[:, None] - normal.to(device)[:, None] * depth[:, None]
            density, rgb = field(along.view(-1, 3))
            thickness = density.view(-1, len(depth)) * (SLANT * cell)
            # Where all is clear every sample counts alike.
            weights = torch.exp(thickness - thickness.cumsum(1)) * -torch.expm1(-thickness) + 1e-8
            mean = (weights[..., None] * rgb.view(*weights.shape, 3)).sum(1) / weights.sum(1, keepdim=True)
            colours.append(mean.float().cpu())
    return torch.cat(colours).numpy()


def unwrapped(vertices: Float32[np.ndarray, "V 3"], faces: Int32[np.ndarray, "F 3"], texture_px: int) -> Atlas:
    """Charts of the surface side by side in the unit square.

    xatlas gets the surface in pieces: its time grows with the square of their size, the number of charts does not fall.
    """
    import xatlas

    atlas, pieces = xatlas.Atlas(), pieces_of(vertices[faces].mean(1), np.arange(len(faces)))
    for piece in pieces:
        atlas.add_mesh(vertices, faces[piece].astype(np.uint32))
    pack = xatlas.PackOptions()
    pack.resolution, pack.padding = texture_px, PADDING_PX
    atlas.generate(xatlas.ChartOptions(), pack)
    uv, uv_vertices, uv_faces, corners = [], [], np.empty_like(faces), 0
    for i, piece in enumerate(pieces):
        piece_vertices, piece_faces, piece_uv = atlas[i]
        uv_faces[piece] = piece_faces + np.uint32(corners)
        corners += len(piece_uv)
        uv.append(piece_uv)
        uv_vertices.append(piece_vertices)
    return Atlas(np.concatenate(uv).clip(0, 1), np.concatenate(uv_vertices).astype(np.int32), uv_faces)


def pieces_of(centres: Float32[np.ndarray, "F 3"], index: Int[np.ndarray, " N"]) -> list[Int[np.ndarray, " P"]]:
    """Faces (`index` of them, by their centres) halved across their longest extent until PIECE_FACES are left."""
    if len(index) <= PIECE_FACES:
        return [index]
    axis = np.ptp(centres[index], axis=0).argmax()
    index = index[np.argsort(centres[index, axis], kind="stable")]
    half = len(index) // 2
    return pieces_of(centres, index[:half]) + pieces_of(centres, index[half:])


def baked(
    paint: Paint,
    vertices: Float32[np.ndarray, "V 3"],
    normals: Float32[np.ndarray, "V 3"],
    colours: UInt8[np.ndarray, "V 3"],
    atlas: Atlas,
    texture_px: int,
) -> UInt8[np.ndarray, "{texture_px} {texture_px} 3"]:
    """The texture: `paint` at every texel whose centre is in a triangle, elsewhere the nearest texel's.

    So neither bilinear lookups nor mipmaps mix in a colour that is not the surface's. Under a corner whose texel's
    centre no triangle has, the texel takes the vertex's colour: a chart may be smaller than a texel.
    """
    from scipy.ndimage import distance_transform_edt

    corners = (atlas.uv * [1, -1] + [0, 1]) * texture_px
    texel, face, barycentric = covered_texels(corners[atlas.faces], texture_px)
    at = atlas.vertices[atlas.faces[face]]
    points = np.einsum("nk,nki->ni", barycentric, vertices[at])
    towards = np.einsum("nk,nki->ni", barycentric, normals[at])
    towards /= np.maximum(np.linalg.norm(towards, axis=1, keepdims=True), 1e-20)
    texture, blank = np.zeros((texture_px**2, 3), np.uint8), np.ones(texture_px**2, bool)
    column, row = corners.astype(np.int64).clip(0, texture_px - 1).T
    under = row * texture_px + column
    texture[under], blank[under] = colours[atlas.vertices], False
    texture[texel], blank[texel] = to_bytes(paint(points, towards)), False
    square = (texture_px, texture_px)
    row, column = distance_transform_edt(blank.reshape(square), return_distances=False, return_indices=True)
    return texture.reshape(*square, 3)[row, column]


def covered_texels(
    corners: Float[np.ndarray, "F 3 2"], size: int
) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"], Float32[np.ndarray, "N 3"]]:
    """Texels (row * size + column) whose centre is in a triangle, that triangle, and the centre's place in it.

    Corners are (column, row) in texels; the centre of texel (0, 0) is at (0.5, 0.5). Barycentric weights follow the
    corners' order.
    """
    first = np.ceil(corners.min(1) - 0.5).astype(np.int64).clip(0)
    last = np.floor(corners.max(1) - 0.5).astype(np.int64).clip(max=size - 1)
    width, height = (last - first + 1).clip(0).T
    count = width * height
    face = np.repeat(np.arange(len(corners)), count)
    place = np.arange(len(face)) - np.repeat(np.cumsum(count) - count, count)  # within the triangle's bounding box
    column, row = first[face, 0] + place % width[face], first[face, 1] + place // width[face]
    a, b, c = corners.transpose(1, 0, 2)
    (x_b, y_b), (x_c, y_c) = (b - a).T, (c - a).T
    area = x_b * y_c - x_c * y_b
    area = np.where(area == 0, np.inf, area)  # a triangle without area covers nothing but its own line
    x, y = column + 0.5 - a[face, 0], row + 0.5 - a[face, 1]
    weight_b = (x * y_c[face] - y * x_c[face]) / area[face]
    weight_c = (y * x_b[face] - x * y_b[face]) / area[face]
    barycentric = np.stack([1 - weight_b - weight_c, weight_b, weight_c], 1).astype(np.float32)
    inside = (barycentric >= 0).all(1) & np.isfinite(area)[face]
    return (row * size + column)[inside], face[inside], barycentric[inside]
