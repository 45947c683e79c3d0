"""Files of a mesh: GLB with its settings, PLY and OBJ in a zip are written; any GLB is read.

Meshes are in world coordinates (z-up, front +x); each file says which axes it has.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from PIL import Image

from psd.errors import RequestError
from psd.export import to_json, write_file
from psd.scene.mesh import Mesh
from psd.scene.raster import MeshScene

if TYPE_CHECKING:
    from trimesh import Trimesh
    from trimesh.scene.transforms import SceneGraph

ROUGHNESS = 0.9
UNLIT = "KHR_materials_unlit"
CLAMP_TO_EDGE = 33071  # glTF takes OpenGL's numbers
EXTRAS_KEY = "psd"  # of the GLB's asset.extras, where the settings are
MAX_HEADER_BYTES = 2**20  # a GLB's JSON that is read for its settings
MAX_GLB_BYTES = 2**26
MAX_FACES = 1_000_000
MAX_TEXELS = 2**26  # of all textures together, once they are unpacked
MAX_NODES = 4096
NO_TRIANGLES = "This GLB holds no triangles: export the object as a mesh."
TOO_MANY = f"This GLB has more than {MAX_FACES:,} triangles: simplify it."
COMPRESSION = {"KHR_draco_mesh_compression", "EXT_meshopt_compression", "KHR_meshopt_compression"}


def y_up(rows: Float32[np.ndarray, "N 3"]) -> Float32[np.ndarray, "N 3"]:
    """World axes to glTF's: up, our z, is y there, and the front, our x, is z, which viewers look at first."""
    return rows[:, [1, 2, 0]]


def z_up(rows: Float[np.ndarray, "N 3"]) -> Float[np.ndarray, "N 3"]:
    """glTF's axes to the world's: the reverse of `y_up`."""
    return rows[:, [2, 0, 1]]


def export_glb(mesh: Mesh, path: Path, extras: dict[str, Any]) -> None:
    """Binary glTF 2.0, y-up: normals, base colour texture (sRGB), without light; `extras` as JSON in asset.extras.

    A number in `extras` that is not finite becomes null.
    Unlit, because the field's light is in the colours: a viewer's own would come on top of it. One that does not know
    the extension sees a rough non-metal.
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
    extras = json.loads(to_json(extras))

    def finish(tree: dict[str, Any]) -> None:
        tree["asset"]["extras"] = {EXTRAS_KEY: extras}
        tree["samplers"] = [{"wrapS": CLAMP_TO_EDGE, "wrapT": CLAMP_TO_EDGE}]  # charts touch the texture's edges
        tree["textures"][0]["sampler"] = 0
        tree["materials"][0]["extensions"] = {UNLIT: {}}
        tree["extensionsUsed"] = [UNLIT]

    write_file(path, model.export(file_type="glb", include_normals=True, tree_postprocessor=finish))


def read_glb_extras(path: Path) -> dict[str, Any]:
    """The settings that `export_glb` wrote. Reads the JSON at the file's beginning alone. Raises RequestError."""
    try:
        with path.open("rb") as file:
            return dict(glb_header(file, MAX_HEADER_BYTES)["asset"]["extras"][EXTRAS_KEY])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
        raise RequestError("This file carries no settings: drop a GLB that this app wrote.") from error


def glb_header(file: io.BufferedIOBase, most_bytes: int) -> dict[str, Any]:
    """The JSON at the beginning of a GLB. Raises ValueError, struct.error or RecursionError."""
    magic, _, _, length, kind = struct.unpack("<4sIII4s", file.read(20))
    if (magic, kind) != (b"glTF", b"JSON") or length > most_bytes:
        raise ValueError("no GLB, or of too many words")
    return json.loads(file.read(length))


def read_glb(path: Path) -> MeshScene:
    """The triangles and base colours of any GLB, in world axes; what `export_glb` wrote stands as it stood.

    All meshes of the scene graph become one. Points, lines, transparency, light and other maps are left out, and other
    files that it names are not opened. Its size is its own: a camera's distance is to be a multiple of `radius`.
    Raises RequestError on what cannot be read, holds no triangles or is larger than the limits above.
    """
    try:
        if path.stat().st_size > MAX_GLB_BYTES:
            raise RequestError(
                f"This GLB is larger than {MAX_GLB_BYTES >> 20} MiB: simplify it or shrink its textures."
            )
        data = path.read_bytes()
        check_header(glb_header(io.BytesIO(data), MAX_GLB_BYTES))
        return scene_of_glb(data)
    except RequestError:
        raise
    except Exception as error:  # a damaged file fails anywhere in the reader
        raise RequestError("This GLB cannot be read: export it anew as binary glTF 2.0, all in one file.") from error


def check_header(header: dict[str, Any]) -> None:
    """Raises RequestError on what would not be read rightly, or could not be held."""
    if COMPRESSION & set(header.get("extensionsUsed", [])):
        raise RequestError("The geometry of this GLB is compressed: export it without compression.")
    # What an accessor counts need not be in the file: without a buffer view it is zeros, and many may name the same.
    counts = [accessor["count"] for accessor in header.get("accessors", [])]
    primitives = [primitive for mesh in header.get("meshes", []) for primitive in mesh["primitives"]]
    vertices = [primitive["attributes"]["POSITION"] for primitive in primitives]
    corners = [primitive.get("indices", own) for primitive, own in zip(primitives, vertices)]
    most = 3 * MAX_FACES
    if any(sum(counts[i] for i in used) > most for used in (vertices, corners)) or sum(counts) > 10 * most:
        raise RequestError(TOO_MANY)
    if len(header.get("nodes", [])) > MAX_NODES:
        raise RequestError(f"This GLB has more than {MAX_NODES:,} nodes: join its meshes.")


def scene_of_glb(data: bytes) -> MeshScene:
    import trimesh

    graph = trimesh.load_scene(io.BytesIO(data), file_type="glb", process=False)
    placed = [(graph.geometry[name], pose) for name, pose in poses_of(graph.graph)]
    placed = [(mesh, pose) for mesh, pose in placed if isinstance(mesh, trimesh.Trimesh) and len(mesh.faces)]
    if not placed:
        raise RequestError(NO_TRIANGLES)
    if sum(max(len(mesh.faces), len(mesh.vertices) // 3) for mesh, _ in placed) > MAX_FACES:
        raise RequestError(TOO_MANY)
    images = {id(image): image for mesh, _ in placed if (image := image_of(mesh)) is not None}
    if sum(image.width * image.height for image in images.values()) > MAX_TEXELS:
        raise RequestError(f"The textures of this GLB have more than {MAX_TEXELS >> 20} million texels: shrink them.")
    index = {key: i for i, key in enumerate(images)}
    rows, first = [], 0
    for mesh, pose in placed:
        faces, *corners = triangles_of(mesh, pose)
        texture = np.full(len(faces), index.get(id(image_of(mesh)), -1))
        rows.append((faces + first, texture, *corners))
        first += len(mesh.vertices)
    faces, texture, vertices, normals, colours, uv = (torch.from_numpy(np.concatenate(each)) for each in zip(*rows))
    finite = all(each.isfinite().all() for each in (vertices, colours, uv))
    if not (finite and faces.min() >= 0 and faces.max() < len(vertices)):
        raise ValueError("corners that are none")
    a, b, c = vertices[faces].unbind(1)
    if not torch.linalg.cross(b - a, c - a).any():
        raise RequestError(NO_TRIANGLES)
    textures = tuple(torch.from_numpy(np.array(image.convert("RGB"))) for image in images.values())
    return MeshScene(vertices, faces, normals, colours, uv, texture, textures)


def poses_of(graph: SceneGraph) -> Iterator[tuple[str, Float[np.ndarray, "4 4"]]]:
    """Each geometry of a scene graph and its pose in the world, parents first: one product a node. trimesh's own
    look-up walks up from every node, which takes minutes for a chain of a few hundred."""
    forest, reached = graph.transforms, [(graph.base_frame, np.eye(4))]
    for node, pose in reached:
        geometry = forest.node_data[node].get("geometry")
        if geometry is not None:
            yield geometry, pose
        for child in forest.children.get(node, ()):
            reached.append((child, pose @ forest.edge_data[node, child].get("matrix", np.eye(4))))


def triangles_of(mesh: Trimesh, pose: Float[np.ndarray, "4 4"]) -> tuple[np.ndarray, ...]:
    """Faces, and of their corners: vertices and unit normals in world axes, colours (linear), uv."""
    turn = pose[:3, :3]
    mirrored = -1 if np.linalg.det(turn) < 0 else 1
    cofactors = np.cross(turn[[1, 2, 0]], turn[[2, 0, 1]])  # normals go with the inverse transpose, even of flat poses
    vertices = mesh.vertices @ turn.T + pose[:3, 3]
    normals = mesh.vertex_normals @ cofactors.T * mirrored
    normals = normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-20)
    colours, uv = np.ones((len(vertices), 3)), np.zeros((len(vertices), 2))
    if mesh.visual.kind == "texture":
        if mesh.visual.material.baseColorFactor is not None:
            colours = colours * shares(mesh.visual.material.baseColorFactor)[:3]
        if "color" in mesh.visual.vertex_attributes:
            colours = colours * shares(mesh.visual.vertex_attributes["color"])[:, :3]
        uv = uv if mesh.visual.uv is None else mesh.visual.uv
    elif mesh.visual.kind == "vertex":
        colours = shares(mesh.visual.vertex_colors)[:, :3]
    corners = (each.astype(np.float32) for each in (z_up(vertices), z_up(normals), colours, uv))
    return mesh.faces[:, ::mirrored].astype(np.int64), *corners


def image_of(mesh: Trimesh) -> Image.Image | None:
    """The base colour's texture, if the mesh has one and says where on it its corners lie."""
    if mesh.visual.kind != "texture" or mesh.visual.uv is None:
        return None
    return mesh.visual.material.baseColorTexture


def shares(values: np.ndarray) -> Float[np.ndarray, "*shape"]:
    """Whole numbers as parts of their type's largest, as glTF stores colours."""
    return values / np.iinfo(values.dtype).max if values.dtype.kind == "u" else values.astype(float)


def export_ply(mesh: Mesh, path: Path) -> None:
    """Binary PLY with normals and vertex colours (sRGB, as is usual), in world axes: z-up, front +x."""
    import trimesh

    model = trimesh.Trimesh(
        mesh.vertices, mesh.faces, vertex_normals=mesh.normals, vertex_colors=mesh.colours, process=False
    )
    write_file(path, model.export(file_type="ply", vertex_normal=True))


def export_obj_zip(mesh: Mesh, path: Path) -> None:
    """mesh.obj, mesh.mtl and texture.png in one zip, y-up, unlit. Faces share vertices across the texture's seams.

    The same mesh gives the same bytes: no entry holds the time it was written at.
    """
    lines = io.StringIO()
    lines.write("mtllib mesh.mtl\no mesh\nusemtl surface\n")
    for name, rows in (("v", y_up(mesh.vertices)), ("vt", mesh.atlas.uv), ("vn", y_up(mesh.normals))):
        row = name + rows.shape[1] * " %.5f" + "\n"
        lines.write((row * len(rows)) % tuple(rows.ravel().tolist()))
    corners = np.stack([mesh.faces, mesh.atlas.faces, mesh.faces], -1) + 1
    lines.write(("f %d/%d/%d %d/%d/%d %d/%d/%d\n" * len(corners)) % tuple(corners.ravel().tolist()))
    material = "newmtl surface\nKd 1 1 1\nKs 0 0 0\nillum 0\nmap_Kd texture.png\n"
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(zipfile.ZipInfo("mesh.obj"), lines.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=1)
        archive.writestr(zipfile.ZipInfo("mesh.mtl"), material, zipfile.ZIP_DEFLATED, compresslevel=1)
        archive.writestr(zipfile.ZipInfo("texture.png"), png(mesh.texture))
    write_file(path, data.getvalue())


def png(image: UInt8[np.ndarray, "H W 3"]) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG")
    return data.getvalue()
