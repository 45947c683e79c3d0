"""Files of a mesh as other readers see them."""

from __future__ import annotations

import io
import json
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

from psd.errors import RequestError
from psd.scene.files import export_glb, export_obj_zip, export_ply, read_glb_extras
from psd.scene.mesh import Mesh, extract_mesh
from tests.solids import Balls, around, overlapping, rasterised


@pytest.fixture(scope="module")
def field() -> Balls:
    return overlapping()


@pytest.fixture(scope="module")
def mesh(field: Balls) -> Mesh:
    return extract_mesh(field, resolution=64, target_faces=3000, texture_px=256)


@pytest.fixture(scope="module")
def glb(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("glb") / "mesh.glb"
    export_glb(mesh, path, {"prompt": "zwei Bälle", "seed": 3, "scores": {"with": 0.25, "without": float("nan")}})
    return path


def test_files_show_the_colours_of_the_render_from_all_sides(field: Balls, glb: Path):
    """The GLB as a reader gets it, turned back into our axes, without light."""
    model = trimesh.load(glb, force="mesh", process=False)
    vertices = model.vertices[:, [2, 0, 1]]
    texture = np.asarray(model.visual.material.baseColorTexture.convert("RGB"))
    cameras, foreground, opacity = around(field)
    for pose, rgb, alpha in zip(cameras.c2w.numpy(), foreground, opacity):
        shown, covered = rasterised(vertices, model.faces, model.visual.uv, texture, pose, 40.0)
        mean = rgb.sum((0, 1)) / alpha.sum()
        assert shown[covered].mean(0) == pytest.approx(mean, abs=0.05 * float(mean.max()))
        both = covered & (alpha > 0.9)
        assert both.sum() > 0.75 * covered.sum()
        assert np.abs(shown - rgb / np.maximum(alpha, 1e-6)[..., None])[both].mean() < 0.05


def test_glb_stands_upright_and_faces_the_viewer(tmp_path: Path):
    """A viewer looks along -z with y up: our up, +z, is there +y; our front, +x, is +z; our left, +y, is +x."""
    axes = {"red": (0.7, 0.0, 0.0), "green": (0.0, 0.6, 0.0), "blue": (0.0, 0.0, 0.5)}
    balls = [(at, 0.2, tuple(float(a > 0) for a in at)) for at in axes.values()]
    field = Balls(((0.0, 0.0, 0.0), 0.2, (1.0, 1.0, 1.0)), *balls)
    mesh = extract_mesh(field, resolution=48, target_faces=4000, texture_px=256)
    export_glb(mesh, tmp_path / "axes.glb", {})
    model = trimesh.load(tmp_path / "axes.glb", force="mesh", process=False)
    rgb = model.visual.to_color().vertex_colors[:, :3].astype(int)
    for channel, expected in enumerate([(0, 0, 0.7), (0.6, 0, 0), (0, 0.5, 0)]):
        others = np.delete(rgb, channel, 1).max(1)
        marked = model.vertices[rgb[:, channel] - others > 80]
        assert (marked.min(0) + marked.max(0)) / 2 == pytest.approx(expected, abs=0.05)
    assert model.volume > 0
    assert (model.vertex_normals * (model.vertices - model.center_mass)).sum(1).mean() > 0


def glb_json(path: Path) -> dict:
    data = path.read_bytes()
    return json.loads(data[20 : 20 + struct.unpack("<I", data[12:16])[0]])


def test_glb_material_and_attributes(mesh: Mesh, glb: Path):
    tree = glb_json(glb)
    (primitive,) = tree["meshes"][0]["primitives"]
    assert set(primitive["attributes"]) == {"POSITION", "NORMAL", "TEXCOORD_0"}  # COLOR_0 would darken the texture
    (material,) = tree["materials"]
    assert material["pbrMetallicRoughness"]["metallicFactor"] == 0
    assert material["pbrMetallicRoughness"]["roughnessFactor"] == 0.9
    assert "baseColorTexture" in material["pbrMetallicRoughness"]
    assert not material.get("doubleSided", False)
    # The light is in the colours; a viewer that cannot do without its own may still show the file.
    assert material["extensions"] == {"KHR_materials_unlit": {}}
    assert tree["extensionsUsed"] == ["KHR_materials_unlit"] and not tree.get("extensionsRequired")
    assert "baseColorFactor" not in material["pbrMetallicRoughness"] and "emissiveFactor" not in material
    assert tree["samplers"][tree["textures"][0]["sampler"]] == {"wrapS": 33071, "wrapT": 33071}
    assert glb.stat().st_size < 9e6
    holey = Mesh(**{**vars(mesh), "report": {**mesh.report, "watertight": False}})
    export_glb(holey, glb.with_name("holey.glb"), {})
    assert glb_json(glb.with_name("holey.glb"))["materials"][0]["doubleSided"] is True


def test_glb_normals_are_the_smooth_ones_also_on_seams(mesh: Mesh, glb: Path):
    tree = glb_json(glb)
    binary = glb.read_bytes()[-tree["buffers"][0]["byteLength"] :]
    (primitive,) = tree["meshes"][0]["primitives"]
    accessor = tree["accessors"][primitive["attributes"]["NORMAL"]]
    start = tree["bufferViews"][accessor["bufferView"]].get("byteOffset", 0) + accessor.get("byteOffset", 0)
    normals = np.frombuffer(binary, "<f4", 3 * accessor["count"], start).reshape(-1, 3)
    assert normals == pytest.approx(mesh.normals[mesh.atlas.vertices][:, [1, 2, 0]], abs=1e-5)


def test_settings_in_a_glb_come_back(glb: Path):
    assert read_glb_extras(glb) == {"prompt": "zwei Bälle", "seed": 3, "scores": {"with": 0.25, "without": None}}
    assert not list(glb.parent.glob("*.partial"))


def header(length: int, content: bytes = b"") -> bytes:
    return struct.pack("<4sIII4s", b"glTF", 2, 20 + length, length, b"JSON") + content


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"glTF",
        b"\x89PNG\r\n\x1a\n" + bytes(64),
        header(2**31),
        header(8, b'{"asset"'),
        header(2, b"{}"),
        header(4, b"null"),
        header(48, b'{"asset": {"extras": {"psd": "no settings"}}}   '),
        header(40000, b"[" * 40000),
    ],
)
def test_files_without_settings_are_named(data: bytes, tmp_path: Path):
    path = tmp_path / "other.glb"
    path.write_bytes(data)
    with pytest.raises(RequestError, match=r"carries no settings: drop a GLB that this app wrote\.$"):
        read_glb_extras(path)


def test_ply_has_our_axes_normals_and_colours(mesh: Mesh, tmp_path: Path):
    export_ply(mesh, tmp_path / "mesh.ply")
    model = trimesh.load(tmp_path / "mesh.ply", process=False)
    assert model.vertices == pytest.approx(mesh.vertices, abs=1e-6)
    assert np.array_equal(model.faces, mesh.faces)
    assert np.array_equal(model.visual.vertex_colors[:, :3], mesh.colours)
    assert model.vertex_normals == pytest.approx(mesh.normals, abs=1e-5)


def test_obj_zip_is_complete_and_closed(mesh: Mesh, tmp_path: Path):
    export_obj_zip(mesh, tmp_path / "mesh.zip")
    with zipfile.ZipFile(tmp_path / "mesh.zip") as archive:
        assert archive.testzip() is None
        files = {name: archive.read(name) for name in archive.namelist()}
    assert set(files) == {"mesh.obj", "mesh.mtl", "texture.png"}
    assert {b"map_Kd texture.png", b"Kd 1 1 1", b"illum 0"} <= set(files["mesh.mtl"].splitlines())  # 0: without light
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(files["texture.png"]))), mesh.texture)
    rows = [line.split() for line in files["mesh.obj"].decode().splitlines()]
    vertices, uv, normals = (np.array([row[1:] for row in rows if row[0] == kind], float) for kind in ("v", "vt", "vn"))
    corners = np.array([[corner.split("/") for corner in row[1:]] for row in rows if row[0] == "f"], int) - 1
    assert vertices == pytest.approx(mesh.vertices[:, [1, 2, 0]], abs=1e-5)
    assert normals == pytest.approx(mesh.normals[:, [1, 2, 0]], abs=1e-5)
    assert uv == pytest.approx(mesh.atlas.uv, abs=1e-5)
    assert np.array_equal(corners, np.stack([mesh.faces, mesh.atlas.faces, mesh.faces], -1))
    assert trimesh.Trimesh(vertices, corners[..., 0], process=False).is_watertight


def test_the_same_mesh_gives_the_same_zip_at_any_time(mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    export_obj_zip(mesh, tmp_path / "now.zip")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 86400)
    export_obj_zip(mesh, tmp_path / "tomorrow.zip")
    assert (tmp_path / "now.zip").read_bytes() == (tmp_path / "tomorrow.zip").read_bytes()
