"""A field as a triangle mesh with vertex colours and a baked texture, and its files: GLB, PLY, OBJ in a zip.

density on a grid -> level with the render's silhouette -> marching cubes -> parts -> decimation -> normals -> colours
seen along the inward normals -> texture atlas. A Mesh is in world coordinates (z-up, front +x); each file says which
axes it has. The colours are the field's: sRGB, with the light that it holds. Knows nothing of how a field came about.
"""

from __future__ import annotations

import io
import json
import struct
import threading
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int32, UInt8
from PIL import Image

from psd.errors import RequestError
from psd.export import write_file
from psd.scene.fields import Field

CHUNK = 2**17  # points per call of the field: what bounds the memory of a hash grid
SLACK = 0.01  # of the object's outline: what a mesh's silhouette may be worse than the best level's
MIN_PART = 0.03  # surface of a part that is kept, relative to the largest one: an object beside another, no floaters
COLOUR_STEPS = range(-2, 6)  # grid cells below a surface point that its colour is gathered from
SLANT = 2.0  # mean of 1 / cos over the directions that see a surface, each weighted by cos, the size it is seen at
PIECE_FACES = 1250  # of the surface that are unwrapped together
PADDING_PX = 4  # between charts of the atlas: two texels of each survive in the second mipmap
ROUGHNESS = 0.9
CLAMP_TO_EDGE = 33071  # glTF takes OpenGL's numbers
EXTRAS_KEY = "psd"  # of the GLB's asset.extras, where the settings are
MAX_HEADER_BYTES = 2**20  # a GLB's JSON that is read for its settings

_DECIMATION_LOCK = threading.Lock()


class EmptyScene(RequestError):
    """There is nothing solid in the field to make a mesh of; one sentence with advice."""


class Atlas(NamedTuple):
    """Where the triangles lie in the texture.

    It has corners of its own, because a vertex on a seam lies in several charts: corner `faces[f, k]` is that of vertex
    `vertices[faces[f, k]]`, the mesh's own `faces[f, k]`. uv starts at the texture's lower left, v upwards.
    """

    uv: Float32[np.ndarray, "U 2"]
    vertices: Int32[np.ndarray, " U"]
    faces: Int32[np.ndarray, "F 3"]


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
    texture_px: int = 1024,
) -> Mesh:
    """The surface of a field's density with the colours that a render of it shows.

    resolution    grid points along each side of the box
    threshold     density of the surface, or "auto": `silhouette_threshold`
    target_faces  more are decimated

    Raises EmptyScene where no surface is found, and ValueError on a threshold that is no positive number.
    """
    if not (threshold == "auto" or (isinstance(threshold, int | float) and 0 < threshold < float("inf"))):
        raise ValueError(f"threshold must be 'auto' or a positive density, not {threshold!r}")
    density = density_grid(field, resolution)
    if not np.isfinite(density).all():
        raise EmptyScene("The scene's density is not a number: the run diverged, try another seed or a lower rate.")
    cell = 2 * field.radius / (resolution - 1)
    level = silhouette_threshold(density, cell) if threshold == "auto" else float(threshold)
    vertices, faces = main_parts(*isosurface(density, level, field.radius))
    vertices, faces = decimated(vertices, faces, target_faces)
    normals = vertex_normals(vertices, faces)
    colours = to_uint8(surface_colours(field, vertices, normals, cell))
    atlas = unwrapped(vertices, faces, texture_px)
    texture = baked(field, cell, vertices, normals, colours, atlas, texture_px)
    reason = open_because(faces)
    report = dict(faces=len(faces), vertices=len(vertices), watertight=not reason, reason=reason, threshold=level)
    return Mesh(vertices, faces, normals, colours, atlas, texture, report)


def density_grid(field: Field, resolution: int) -> Float32[np.ndarray, "{resolution} {resolution} {resolution}"]:
    """Density at the corners of a regular grid over the whole box, axes (x, y, z)."""
    axis = torch.linspace(-field.radius, field.radius, resolution, device=device_of(field))
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


def surface_colours(
    field: Field, points: Float32[np.ndarray, "N 3"], normals: Float32[np.ndarray, "N 3"], cell: float
) -> Float32[np.ndarray, "N 3"]:
    """What the volume render shows there: sum w c / sum w down the normal from a little outside, w a ray's weights.

    A ray comes slanting, and its way through each layer is longer by SLANT. The colour of the point itself is that of
    the haze around the object, which no ray sees alone: against renders of fields of 300 steps its error is twice this
    one's. A single sample below the surface does as well on some fields only.
    """
    device = device_of(field)
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
    field: Field,
    cell: float,
    vertices: Float32[np.ndarray, "V 3"],
    normals: Float32[np.ndarray, "V 3"],
    colours: UInt8[np.ndarray, "V 3"],
    atlas: Atlas,
    texture_px: int,
) -> UInt8[np.ndarray, "{texture_px} {texture_px} 3"]:
    """The texture: `surface_colours` at every texel whose centre is in a triangle, elsewhere the nearest texel's.

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
    texture[texel], blank[texel] = to_uint8(surface_colours(field, points, towards, cell)), False
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


def to_uint8(rgb: Float32[np.ndarray, "N 3"]) -> UInt8[np.ndarray, "N 3"]:
    return (rgb.clip(0, 1) * 255).round().astype(np.uint8)


def y_up(rows: Float32[np.ndarray, "N 3"]) -> Float32[np.ndarray, "N 3"]:
    """World axes to glTF's: up, our z, is y there, and the front, our x, is z, which viewers look at first."""
    return rows[:, [1, 2, 0]]


def export_glb(mesh: Mesh, path: Path, extras: dict[str, Any]) -> None:
    """Binary glTF 2.0, y-up: normals, base colour texture (sRGB), rough non-metal; `extras` as JSON in asset.extras.

    A number in `extras` that is not finite becomes null.
    No COLOR_0: a viewer would multiply it with the texture. One-sided, so that viewers can leave out the back faces;
    two-sided where the mesh has holes to look through.
    """
    import trimesh

    material = trimesh.visual.material.PBRMaterial(
        name="surface",
        baseColorTexture=Image.fromarray(mesh.texture),
        metallicFactor=0.0,
        roughnessFactor=ROUGHNESS,
        doubleSided=not mesh.report["watertight"],
    )
    model = trimesh.Trimesh(
        y_up(mesh.vertices)[mesh.atlas.vertices],
        mesh.atlas.faces,
        vertex_normals=y_up(mesh.normals)[mesh.atlas.vertices],
        visual=trimesh.visual.TextureVisuals(mesh.atlas.uv, material=material),
        process=False,
    )
    # Through JSON first: trimesh would write what JSON does not know in its own way, and NaN makes browsers refuse all.
    extras = json.loads(json.dumps(extras), parse_constant=lambda _: None)

    def finish(tree: dict[str, Any]) -> None:
        tree["asset"]["extras"] = {EXTRAS_KEY: extras}
        tree["samplers"] = [{"wrapS": CLAMP_TO_EDGE, "wrapT": CLAMP_TO_EDGE}]  # charts touch the texture's edges
        tree["textures"][0]["sampler"] = 0

    write_file(path, model.export(file_type="glb", include_normals=True, tree_postprocessor=finish))


def read_glb_extras(path: Path) -> dict[str, Any]:
    """The settings that `export_glb` wrote. Reads the JSON at the file's beginning alone. Raises RequestError."""
    try:
        with path.open("rb") as file:
            magic, _, _, length, kind = struct.unpack("<4sIII4s", file.read(20))
            if (magic, kind) != (b"glTF", b"JSON") or length > MAX_HEADER_BYTES:
                raise ValueError("not a GLB of ours")
            return dict(json.loads(file.read(length))["asset"]["extras"][EXTRAS_KEY])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
        raise RequestError("This file carries no settings: drop a GLB that this app wrote.") from error


def export_ply(mesh: Mesh, path: Path) -> None:
    """Binary PLY with normals and vertex colours (sRGB, as is usual), in world axes: z-up, front +x."""
    import trimesh

    model = trimesh.Trimesh(
        mesh.vertices, mesh.faces, vertex_normals=mesh.normals, vertex_colors=mesh.colours, process=False
    )
    write_file(path, model.export(file_type="ply", vertex_normal=True))


def export_obj_zip(mesh: Mesh, path: Path) -> None:
    """mesh.obj, mesh.mtl and texture.png in one zip, y-up. Faces share vertices across the texture's seams."""
    lines = io.StringIO()
    lines.write("mtllib mesh.mtl\no mesh\nusemtl surface\n")
    for name, rows in (("v", y_up(mesh.vertices)), ("vt", mesh.atlas.uv), ("vn", y_up(mesh.normals))):
        row = name + rows.shape[1] * " %.5f" + "\n"
        lines.write((row * len(rows)) % tuple(rows.ravel().tolist()))
    corners = np.stack([mesh.faces, mesh.atlas.faces, mesh.faces], -1) + 1
    lines.write(("f %d/%d/%d %d/%d/%d %d/%d/%d\n" * len(corners)) % tuple(corners.ravel().tolist()))
    material = "newmtl surface\nKd 1 1 1\nKs 0 0 0\nillum 1\nmap_Kd texture.png\n"
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("mesh.obj", lines.getvalue())
        archive.writestr("mesh.mtl", material)
        archive.writestr("texture.png", png(mesh.texture), zipfile.ZIP_STORED)
    write_file(path, data.getvalue())


def png(image: UInt8[np.ndarray, "H W 3"]) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG")
    return data.getvalue()


def device_of(field: Field) -> torch.device:
    """Where a field computes; one without parameters and buffers on the CPU."""
    return next((tensor.device for tensor in [*field.parameters(), *field.buffers()]), torch.device("cpu"))
