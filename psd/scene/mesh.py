"""A field as a triangle mesh with vertex colours and a baked texture.

density on a grid -> level with the render's silhouette -> marching cubes -> parts -> decimation -> normals -> colours
and texture (texture.py). A Mesh is in world coordinates (z-up, front +x). Knows nothing of files or of how a field came
about.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int, Int32, UInt8

from psd.errors import RequestError
from psd.export import to_bytes
from psd.scene.fields import Field
from psd.scene.texture import CHUNK, Atlas, Views, baked, painter, unwrapped

SLACK = 0.01  # of the object's outline: what a mesh's silhouette may be worse than the best level's
MIN_PART = 0.03  # surface of a part that is kept, relative to the largest one: an object beside another, no floaters
FACE_TEXELS, MIN_TEXTURE_PX = 20, 256  # at 12,000 triangles of a grid of 48 four times as many change no colour

_DECIMATION_LOCK = threading.Lock()


class EmptyScene(RequestError):
    """There is nothing solid in the field to make a mesh of; one sentence with advice."""


@dataclass(frozen=True)
class Mesh:
    """Triangles in world coordinates, counter-clockwise seen from outside. Colours are sRGB."""

    vertices: Float32[np.ndarray, "V 3"]
    faces: Int32[np.ndarray, "F 3"]
    normals: Float32[np.ndarray, "V 3"]
    colours: UInt8[np.ndarray, "V 3"]
    atlas: Atlas
    texture: UInt8[np.ndarray, "T T 3"]  # row 0 is the upper edge
    report: dict[str, Any]  # faces, vertices, watertight, reason (why it is not; empty if it is), threshold


def extract_mesh(
    field: Field,
    resolution: int = 128,
    threshold: float | str = "auto",
    target_faces: int = 20_000,
    texture_px: int = 0,
    views: Views | None = None,
) -> Mesh:
    """The surface of a field's density with the colours that a render of it shows.

    resolution    grid points along each side of the box
    threshold     density of the surface, or "auto": `silhouette_threshold`
    target_faces  more are decimated
    texture_px    side of the texture; 0: the power of two that gives every triangle FACE_TEXELS on average, or more
    views         renders that its colours are taken from, where they see it; None: all along the normals

    Raises EmptyScene where no surface is found, and ValueError on a threshold that is no positive number.
    """
    if not (threshold == "auto" or (isinstance(threshold, int | float) and 0 < threshold < float("inf"))):
        raise ValueError(f"threshold must be 'auto' or a positive density, not {threshold!r}")
    density = density_grid(field, resolution)
    check_finite("density", density)
    cell = 2 * field.radius / (resolution - 1)
    level = silhouette_threshold(density, cell) if threshold == "auto" else float(threshold)
    vertices, faces = main_parts(*isosurface(density, level, field.radius))
    vertices, faces = decimated(vertices, faces, target_faces)
    normals = vertex_normals(vertices, faces)
    paint = painter(field, cell, views)
    rgb = paint(vertices, normals)
    check_finite("colour", rgb)
    colours = to_bytes(rgb)
    texture_px = texture_px or max(2 ** math.ceil(math.log2(FACE_TEXELS * len(faces)) / 2), MIN_TEXTURE_PX)
    atlas = unwrapped(vertices, faces, texture_px)
    texture = baked(paint, vertices, normals, colours, atlas, texture_px)
    reason = open_because(faces)
    report = dict(faces=len(faces), vertices=len(vertices), watertight=not reason, reason=reason, threshold=level)
    return Mesh(vertices, faces, normals, colours, atlas, texture, report)


def check_finite(what: str, numbers: Float32[np.ndarray, "*shape"]) -> None:
    if not np.isfinite(numbers).all():
        raise EmptyScene(f"The scene's {what} is not a number: the run diverged, try another seed or a lower rate.")


def density_grid(field: Field, resolution: int) -> Float32[np.ndarray, "{resolution} {resolution} {resolution}"]:
    """Density at the corners of a regular grid over the whole box, axes (x, y, z)."""
    axis = torch.linspace(-field.radius, field.radius, resolution, device=field.device)
    density = []
    with torch.no_grad():
        # x fastest, as the memory of a voxel grid: the other way round takes ten times as long.
        for planes in axis.split(max(CHUNK // resolution**2, 1)):
            z, y, x = torch.meshgrid(planes, axis, axis, indexing="ij")
            density.append(field.density(torch.stack([x, y, z], -1).view(-1, 3)).view(z.shape).float().cpu())
    return torch.cat(density).numpy().transpose(2, 1, 0)


def silhouette_threshold(density: Float32[np.ndarray, "R R R"], cell: float) -> float:
    """The level tau whose mesh has the silhouette of the volume render, seen along the three axes.

    A ray has the opacity o = 1 - exp(-sum density * cell) and meets the mesh where its densest point m is above tau.
    The mismatch, sum_{m > tau} (1 - o) + sum_{m <= tau} o, is known exactly for every tau once the rays are sorted by
    m. Sharp edges leave a wide range of good levels: of those within SLACK of the best the geometric middle is taken,
    since at the lower end the mesh takes in haze, and at the upper end noise inside a solid turns it into a sponge.

    The density at which a step is half opaque, or Otsu's on log density, depends on the density's scale: on fields of
    300 steps the first misses most of the object, the second makes it 1.7 times as large. Raises EmptyScene if no ray
    is half opaque.
    """
    opacity = 1 - np.exp(-cell * np.concatenate([density.sum(axis, dtype=np.float64).ravel() for axis in range(3)]))
    if opacity.max() < 0.5:
        raise EmptyScene(
            f"The scene is empty, at most {100 * opacity.max():.0f} % opaque: use more steps, another seed or "
            "a simpler prompt."
        )
    densest = np.concatenate([density.max(axis).ravel() for axis in range(3)])
    order = np.argsort(-densest)
    densest, opacity = np.append(densest[order], 0), opacity[order]
    # [i]: rays 0 to i meet the mesh, for tau in [densest[i + 1], densest[i]), if there is such a tau.
    mismatch = np.cumsum(1 - opacity) + opacity.sum() - np.cumsum(opacity)
    mismatch[densest[:-1] == densest[1:]] = np.inf
    fits = mismatch <= mismatch.min() + SLACK * opacity.sum()
    high, low = densest[:-1][fits].max(), densest[1:][fits].min()
    # Haze of which a whole cell is SLACK opaque is no surface.
    return float(np.sqrt(high * min(max(low, SLACK / cell), high)))


def isosurface(
    density: Float32[np.ndarray, "R R R"], level: float, radius: float
) -> tuple[Float32[np.ndarray, "V 3"], Int32[np.ndarray, "F 3"]]:
    """Marching cubes; closed where the density reaches the box, whose faces then are faces of the mesh.

    Marching cubes interpolates linearly, and what fields interpolate is the argument x of density = softplus(x): edges
    steeper than a cell keep their place instead of turning into stairs. Raises EmptyScene if nothing is above `level`.
    """
    from skimage.measure import marching_cubes

    if not density.max() > level:
        raise EmptyScene(f"The scene is empty at a density threshold of {level:.3g}: lower it, or let it be automatic.")
    grid, at = softplus_argument(np.pad(density, 1)), softplus_argument(np.array([level], np.float32))
    vertices, faces, _, _ = marching_cubes(grid, at.item(), gradient_direction="ascent")
    vertices = (vertices - 1) * np.float32(2 * radius / (len(density) - 1)) - np.float32(radius)
    return vertices.clip(-radius, radius).astype(np.float32), faces.astype(np.int32)


def softplus_argument(density: Float32[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """x of density = log(1 + exp(x)); densities below 1e-30 count as that."""
    density = np.maximum(density, np.float32(1e-30))
    return density + np.log(-np.expm1(-density))


def main_parts(
    vertices: Float32[np.ndarray, "V 3"], faces: Int32[np.ndarray, "F 3"]
) -> tuple[Float32[np.ndarray, "W 3"], Int32[np.ndarray, "G 3"]]:
    """The connected parts that can be seen: no floaters (MIN_PART) and no cavities.

    A part whose signed volume, sum a.(b x c) / 6, is negative is the wall of a cavity.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = coo_array(
        (np.ones(2 * len(faces), bool), (faces[:, :2].ravel(), faces[:, 1:].ravel())), 2 * (len(vertices),)
    )
    count, part_of_vertex = connected_components(edges, directed=False)
    part = part_of_vertex[faces[:, 0]]
    a, b, c = vertices[faces].astype(np.float64).transpose(1, 0, 2)
    volume = np.bincount(part, np.einsum("fi,fi->f", a, np.cross(b, c)) / 6, count)
    area = np.bincount(part, np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2, count)
    outer = np.where(volume > 0, area, 0)
    return compact(vertices, faces[(outer >= MIN_PART * outer.max())[part] & (outer > 0)[part]])


def compact(
    vertices: Float32[np.ndarray, "V 3"], faces: Int[np.ndarray, "F 3"]
) -> tuple[Float32[np.ndarray, "W 3"], Int32[np.ndarray, "F 3"]]:
    """The same faces over the vertices that they use."""
    used, index = np.unique(faces, return_inverse=True)
    return vertices[used], index.reshape(-1, 3).astype(np.int32)


def decimated(
    vertices: Float32[np.ndarray, "V 3"], faces: Int32[np.ndarray, "F 3"], target_faces: int
) -> tuple[Float32[np.ndarray, "W 3"], Int32[np.ndarray, "G 3"]]:
    """Edges collapsed by quadric error (Garland and Heckbert 1997) down to `target_faces`."""
    from fast_simplification import simplify

    if len(faces) <= target_faces:
        return vertices, faces
    with _DECIMATION_LOCK:  # the library works on one global mesh
        vertices, faces = simplify(vertices, faces, target_count=target_faces)
    return compact(vertices.astype(np.float32), faces)


def vertex_normals(vertices: Float32[np.ndarray, "V 3"], faces: Int32[np.ndarray, "F 3"]) -> Float32[np.ndarray, "V 3"]:
    """Unit normals, outwards: the mean of the faces' normals, weighted by their area."""
    a, b, c = vertices[faces].transpose(1, 0, 2)
    weighted = np.repeat(np.cross(b - a, c - a), 3, axis=0)
    normals = np.stack([np.bincount(faces.ravel(), weighted[:, k], len(vertices)) for k in range(3)], 1)
    return (normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-20)).astype(np.float32)


def open_because(faces: Int32[np.ndarray, "F 3"]) -> str:
    """Why a mesh does not enclose a volume, or nothing: each edge must have one face on either side."""
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).astype(np.int64)
    low, high = edges.min(1), edges.max(1)
    _, index, count = np.unique(low * (faces.max() + 1) + high, return_inverse=True, return_counts=True)
    balance = np.bincount(index, np.where(edges[:, 0] == low, 1, -1))
    if (count == 1).any():
        return f"{(count == 1).sum()} edges belong to one face only"
    if (count > 2).any():
        return f"{(count > 2).sum()} edges belong to more than two faces"
    if balance.any():
        return f"{(balance != 0).sum()} edges lie between faces of opposite winding"
    return ""
