"""Files of a mesh: GLB with its settings, PLY, OBJ in a zip.

A Mesh is in world coordinates (z-up, front +x); each file says which axes it has.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from psd.errors import RequestError
from psd.export import write_file
from psd.scene.mesh import Mesh

ROUGHNESS = 0.9
CLAMP_TO_EDGE = 33071  # glTF takes OpenGL's numbers
EXTRAS_KEY = "psd"  # of the GLB's asset.extras, where the settings are
MAX_HEADER_BYTES = 2**20  # a GLB's JSON that is read for its settings


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
    """mesh.obj, mesh.mtl and texture.png in one zip, y-up. Faces share vertices across the texture's seams.

    The same mesh gives the same bytes: no entry holds the time it was written at.
    """
    lines = io.StringIO()
    lines.write("mtllib mesh.mtl\no mesh\nusemtl surface\n")
    for name, rows in (("v", y_up(mesh.vertices)), ("vt", mesh.atlas.uv), ("vn", y_up(mesh.normals))):
        row = name + rows.shape[1] * " %.5f" + "\n"
        lines.write((row * len(rows)) % tuple(rows.ravel().tolist()))
    corners = np.stack([mesh.faces, mesh.atlas.faces, mesh.faces], -1) + 1
    lines.write(("f %d/%d/%d %d/%d/%d %d/%d/%d\n" * len(corners)) % tuple(corners.ravel().tolist()))
    material = "newmtl surface\nKd 1 1 1\nKs 0 0 0\nillum 1\nmap_Kd texture.png\n"
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
