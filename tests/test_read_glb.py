"""GLBs read back: the app's own as they stood, and foreign ones written by hand and by trimesh."""

from __future__ import annotations

import io
import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from trimesh.visual import TextureVisuals
from trimesh.visual.material import PBRMaterial

from psd.errors import RequestError
from psd.scene import files
from psd.scene.cameras import orbit_cameras
from psd.scene.fields import ConstantBackground
from psd.scene.files import export_glb, read_glb
from psd.scene.mesh import extract_mesh
from psd.scene.raster import MeshScene, srgb_of
from psd.scene.scene import FieldScene
from tests.solids import overlapping

TRIANGLE = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], "<f4")
CORNERS = {"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3"}


def glb(binary: bytes = TRIANGLE.tobytes(), **tree) -> bytes:
    """One triangle, as the specification has it; `tree` replaces parts of the JSON."""
    tree = {
        "asset": {"version": "2.0"}, "scene": 0, "scenes": [{"nodes": [0]}], "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}], "accessors": [CORNERS],
        "bufferViews": [{"buffer": 0, "byteLength": 36}], "buffers": [{"byteLength": len(binary)}], **tree,
    }  # fmt: skip
    text = json.dumps(tree).encode()
    text, binary = text + b" " * (-len(text) % 4), binary + bytes(-len(binary) % 4)
    head = struct.pack("<4sIII4s", b"glTF", 2, 28 + len(text) + len(binary), len(text), b"JSON")
    return head + text + struct.pack("<I4s", len(binary), b"BIN\0") + binary


def read(data: bytes | trimesh.Scene, tmp_path: Path) -> MeshScene:
    path = tmp_path / "mesh.glb"
    path.write_bytes(data if isinstance(data, bytes) else data.export(file_type="glb"))
    return read_glb(path)


def test_a_mesh_of_ours_is_read_as_it_was_written_and_looks_like_its_field(tmp_path: Path):
    """Measured means over the pixels: rgb 0.003, opacity 0.004; the depth is that of a soft surface, 0.06 below."""
    field = overlapping()
    mesh = extract_mesh(field, resolution=64, target_faces=3000, texture_px=256)
    export_glb(mesh, tmp_path / "ours.glb", {})
    scene = read_glb(tmp_path / "ours.glb")
    assert np.array_equal(scene.vertices.numpy(), mesh.vertices[mesh.atlas.vertices])
    assert np.array_equal(scene.faces.numpy(), mesh.atlas.faces)
    assert scene.normals.numpy() == pytest.approx(mesh.normals[mesh.atlas.vertices], abs=1e-6)
    assert scene.uv.numpy() == pytest.approx(mesh.atlas.uv, abs=1e-6)
    assert scene.colours.eq(1).all() and not scene.texture.any()
    assert np.array_equal(scene.textures[0].numpy(), mesh.texture)
    assert scene.radius == np.abs(mesh.vertices).max()

    grey, cameras = ConstantBackground(), orbit_cameras(6, elevation_deg=20.0, distance=2.4, azimuth_start_deg=15.0)
    want = FieldScene(field, grey).render(cameras, 64, samples=160)
    got = replace(scene, background=grey).render(cameras, 64, samples=1)
    assert (got.rgb - want.rgb).abs().mean() < 0.006
    assert (got.opacity - want.opacity).abs().mean() < 0.009
    assert got.opacity.sum() == pytest.approx(want.opacity.sum().item(), rel=0.03)
    both = (got.opacity > 0.99) & (want.opacity > 0.99)
    assert (want.depth - got.depth)[both].abs().mean() < 0.1


def test_a_scene_graph_is_laid_out_in_the_world(tmp_path: Path):
    """A box moved by its parent, and its mirror image; theirs is y-up, and what points along their z is our front."""
    box = trimesh.creation.box((0.2, 0.4, 0.6))
    mirror, parent, child = np.diag([-1.0, 1, 1, 1]), np.eye(4), np.eye(4)
    parent[:3, 3], child[:3, 3], mirror[:3, 3] = (1, 0, 0), (0, 2, 0), (-1, 2, 0)
    graph = trimesh.Scene()
    graph.graph.update("parent", "world", matrix=parent)
    graph.add_geometry(box, node_name="child", parent_node_name="parent", transform=child)
    graph.add_geometry(box.copy(), node_name="mirrored", transform=mirror)
    scene = read(graph, tmp_path)
    assert len(scene.faces) == 24 and scene.vertices.mean(0)[1].abs() < 1e-6
    for half in scene.faces.split(12):
        corners = scene.vertices[half]
        side = 1 if corners[..., 1].mean() > 0 else -1
        low, high = corners.amin((0, 1)).tolist(), corners.amax((0, 1)).tolist()
        assert low == pytest.approx([-0.3, side - 0.1, 1.8]) and high == pytest.approx([0.3, side + 0.1, 2.2])
        a, b, c = (corners.double() - corners.double().mean((0, 1))).unbind(1)
        assert (a * torch.linalg.cross(b, c)).sum().item() / 6 == pytest.approx(0.048, rel=1e-5)
        outwards = scene.vertices[half] - corners.mean((0, 1))
        assert ((scene.normals[half] * outwards).sum(-1) > 0).all()


def test_base_colours_come_from_factors_corners_and_textures(tmp_path: Path):
    """Factors and corners are linear, a texture belongs to its own mesh, and what has nothing is white."""
    plain, painted, factor, textured = (
        trimesh.Trimesh(TRIANGLE + np.array([0, 0, i]), [[0, 1, 2]], process=False) for i in range(4)
    )
    painted.visual.vertex_colors = [[255, 0, 0, 255], [0, 255, 0, 255], [0, 0, 51, 255]]
    factor.visual = TextureVisuals(material=PBRMaterial(baseColorFactor=[0.2, 0.4, 1.0, 1.0]))
    image = Image.new("RGB", (4, 4), (10, 200, 30))
    textured.visual = TextureVisuals(TRIANGLE[:, :2], material=PBRMaterial(baseColorTexture=image))
    scene = read(trimesh.Scene([plain, painted, factor, textured]), tmp_path)
    order = (scene.vertices[scene.faces[:, 0], 0]).round().long().argsort()  # their z is our x
    plain, painted, factor, textured = scene.colours[scene.faces[order]]
    assert plain.eq(1).all() and textured.eq(1).all()
    torch.testing.assert_close(painted, torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 0.2]]))
    torch.testing.assert_close(factor, torch.tensor([[0.2, 0.4, 1.0]] * 3))
    assert scene.texture[order].tolist() == [-1, -1, -1, 0]
    torch.testing.assert_close(scene.uv[scene.faces[order[3]]], torch.from_numpy(TRIANGLE[:, :2].copy()))
    front = orbit_cameras(1, elevation_deg=0.0, distance=9.0)  # from +x, the texture before all
    rgb = scene.render(front, 65, samples=1).rgb[0, :, 30, 34]
    assert rgb.tolist() == pytest.approx([10 / 255, 200 / 255, 30 / 255], abs=1e-5)
    only_factor = replace(scene, faces=scene.faces[order[2:3]], texture=scene.texture[order[2:3]])
    rgb = only_factor.render(front, 65, samples=1).rgb[0, :, 30, 34]
    torch.testing.assert_close(rgb, srgb_of(torch.tensor([0.2, 0.4, 1.0])))


def test_what_has_no_normals_gets_some(tmp_path: Path):
    scene = read(glb(), tmp_path)
    assert scene.faces.tolist() == [[0, 1, 2]] and scene.radius == 1
    torch.testing.assert_close(scene.normals, torch.tensor([[1.0, 0, 0]] * 3))  # their z is our x


NODES = [{"children": [i + 1], "translation": [1, 0, 0]} for i in range(files.MAX_NODES - 1)]


def test_a_deep_scene_graph_takes_no_longer_than_a_wide_one(tmp_path: Path):
    """A chain of a few hundred nodes would take trimesh's own poses minutes, and this test its time limit."""
    scene = read(glb(nodes=[*NODES, {"mesh": 0}]), tmp_path)
    assert scene.vertices[0].tolist() == [0, files.MAX_NODES - 1, 0]


ZEROS = {"componentType": 5126, "type": "VEC3"}
INDEXED = dict(
    meshes=[{"primitives": [{"attributes": {"POSITION": 0}, "indices": 1}]}],
    accessors=[CORNERS, {"bufferView": 1, "componentType": 5125, "count": 3, "type": "SCALAR"}],
    bufferViews=[{"buffer": 0, "byteLength": 36}, {"buffer": 0, "byteOffset": 36, "byteLength": 12}],
)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be read"),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "cannot be read"),
        (glb()[:-8], "cannot be read"),
        (glb(np.full((3, 3), np.nan, "<f4").tobytes()), "cannot be read"),
        (glb(TRIANGLE.tobytes() + struct.pack("<3I", 0, 1, 7), **INDEXED), "cannot be read"),
        (glb(buffers=[{"byteLength": 36, "uri": "../../etc/hostname"}]), "cannot be read"),
        (struct.pack("<4sIII4s", b"glTF", 2, 90020, 90000, b"JSON") + b"[" * 90000, "cannot be read"),
        (glb(meshes=[], nodes=[{}]), "holds no triangles"),
        (glb(meshes=[{"primitives": [{"attributes": {"POSITION": 0}, "mode": 1}]}]), "holds no triangles"),
        (glb(bytes(36)), "holds no triangles"),
        (glb(accessors=[{**ZEROS, "count": 10**12}]), "has more than 1,000,000 triangles"),
        (glb(accessors=[{**ZEROS, "count": 3 * 10**6 + 3}]), "has more than 1,000,000 triangles"),
        (
            glb(
                accessors=[{**ZEROS, "count": 10**6}], meshes=[{"primitives": [{"attributes": {"POSITION": 0}}] * 5000}]
            ),
            "has more than 1,000,000 triangles",
        ),
        (glb(nodes=[*NODES, {"mesh": 0}, {}]), "has more than 4,096 nodes"),
        (glb(extensionsUsed=["KHR_draco_mesh_compression"]), "is compressed"),
    ],
)
def test_what_is_no_mesh_is_refused_in_one_sentence(data: bytes, message: str, tmp_path: Path):
    with pytest.raises(RequestError, match=f"^(This GLB|The geometry of this GLB) {message}") as error:
        read(data, tmp_path)
    assert str(error.value).count(".") - str(error.value).count("2.0") == 1


def test_files_and_textures_that_are_too_large_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    picture = io.BytesIO()
    Image.new("RGB", (64, 64)).save(picture, "PNG")
    mesh = trimesh.Trimesh(TRIANGLE, [[0, 1, 2]], process=False)
    image = Image.open(picture)
    mesh.visual = TextureVisuals(TRIANGLE[:, :2], material=PBRMaterial(baseColorTexture=image))
    assert read(trimesh.Scene([mesh]), tmp_path).textures[0].shape == (64, 64, 3)
    monkeypatch.setattr(files, "MAX_TEXELS", 64 * 64 - 1)
    with pytest.raises(RequestError, match=r"textures of this GLB .* shrink them\.$"):
        read(trimesh.Scene([mesh]), tmp_path)
    monkeypatch.setattr(files, "MAX_GLB_BYTES", 500)
    with pytest.raises(RequestError, match=r"This GLB is larger than .* shrink its textures\.$"):
        read(trimesh.Scene([mesh]), tmp_path)
    with pytest.raises(RequestError, match="cannot be read"):
        read_glb(tmp_path / "none.glb")


def test_damage_anywhere_is_a_refusal_or_a_mesh(tmp_path: Path):
    good, generator = glb(TRIANGLE.tobytes() + struct.pack("<3I", 0, 1, 2), **INDEXED), np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        data = bytearray(good)
        for place in generator.integers(0, len(data), generator.integers(1, 5)):
            data[place] = generator.integers(256)
        try:
            assert read(bytes(data), tmp_path).vertices.isfinite().all()
        except RequestError:
            refused += 1
    assert 0 < refused < 150
