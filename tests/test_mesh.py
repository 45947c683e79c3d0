"""Meshes against the fields they come from, by a software rasteriser, and their files as other readers see them."""

from __future__ import annotations

import io
import json
import struct
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fast_simplification
import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from psd.errors import RequestError
from psd.scene import mesh as meshes
from psd.scene.cameras import Cameras, orbit_cameras
from psd.scene.fields import ConstantBackground, Field
from psd.scene.mesh import (
    Atlas,
    EmptyScene,
    Mesh,
    export_glb,
    export_obj_zip,
    export_ply,
    extract_mesh,
    read_glb_extras,
)
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


def volume(vertices: np.ndarray, faces: np.ndarray) -> float:
    a, b, c = vertices[faces].astype(np.float64).transpose(1, 0, 2)
    return float((a * np.cross(b, c)).sum() / 6)


def grid_of(field: Field, resolution: int = 48) -> np.ndarray:
    return meshes.density_grid(field, resolution)


def test_density_grid_has_the_axes_x_y_z_and_reaches_the_box():
    field = Shape(lambda x: x[:, 0] + 10 * x[:, 1] + 100 * x[:, 2], radius=2.0)
    grid = grid_of(field, 5)
    assert grid.shape == (5, 5, 5)
    assert [grid[4, 2, 2], grid[2, 4, 2], grid[2, 2, 4], grid[0, 0, 0]] == [2.0, 20.0, 200.0, -222.0]


def mismatch(density: np.ndarray, level: float, cell: float) -> tuple[float, float]:
    """By definition, ray by ray; and the sum of all opacities."""
    wrong = total = 0.0
    for axis in range(3):
        for ray in np.moveaxis(density, axis, -1).reshape(-1, len(density)).astype(float):
            opacity = 1 - np.exp(-ray.sum() * cell)
            wrong += 1 - opacity if ray.max() > level else opacity
            total += opacity
    return wrong, total


@pytest.mark.parametrize("scale", [0.03, 1.0, 100.0])
def test_silhouette_threshold_has_the_least_mismatch(scale: float):
    density, cell = grid_of(overlapping(scale=scale), 24), 2 / 23
    level = meshes.silhouette_threshold(density, cell)
    best = min(mismatch(density, tau, cell)[0] for tau in np.geomspace(1e-3, density.max(), 40))
    wrong, total = mismatch(density, level, cell)
    assert wrong <= best + 1.01 * meshes.SLACK * total


def test_silhouette_threshold_of_a_sharp_block_by_hand():
    """Every level between 0 and 100 fits: the geometric middle, from the density of which a cell is 1 % opaque."""
    density = np.zeros((8, 8, 8), np.float32)
    density[2:6, 2:6, 2:6] = 100
    assert meshes.silhouette_threshold(density, 0.25) == pytest.approx((100 * 0.01 / 0.25) ** 0.5, rel=1e-6)


def test_silhouette_threshold_where_rays_of_any_opacity_have_the_same_densest_point():
    """A wedge of one density: whichever ray the best sum would end at, a level has all of them or none."""
    density = np.zeros((8, 8, 8), np.float32)
    for k in range(1, 7):
        density[1:7, k, 1 : 1 + k] = 1
    assert 0 < meshes.silhouette_threshold(density, 0.25) < 1


@pytest.mark.parametrize("steepness", [60.0, 300.0, 2000.0])
@pytest.mark.parametrize("scale", [0.3, 1.0, 30.0])
def test_the_mesh_has_the_silhouette_of_the_render_whatever_the_density_scale(steepness: float, scale: float):
    """Peak densities from 6 to 20,000. The slack is that of a grid: half a cell around the outline is 0.08."""
    field = overlapping(steepness=steepness, scale=scale)
    mesh = extract_mesh(field, resolution=64, target_faces=1500, texture_px=64)
    cameras, _, opacity = around(field, count=2)
    covered = np.stack([mask for _, mask in seen_of(mesh, cameras)])
    softness = np.minimum(opacity, 1 - opacity).sum() / opacity.sum()  # no mesh can do better than this
    assert np.abs(covered - opacity).sum() / opacity.sum() < 1.03 * softness + 0.08
    assert covered.sum() / opacity.sum() == pytest.approx(1, abs=0.08)


def test_noise_inside_a_solid_leaves_its_surface_whole():
    """A level just below the plateau's peaks would fit the silhouette too, and leave a sponge."""

    def density(x):
        noise = torch.sin(x * 61).prod(1)
        return (100 + 30 * noise) * (x.norm(dim=-1) < 0.5)

    mesh = extract_mesh(Shape(density), resolution=64, texture_px=64)
    assert mesh.report["watertight"]
    assert np.linalg.norm(mesh.vertices, axis=1) == pytest.approx(0.5, abs=2 * 2 / 63)


def test_steep_edges_make_no_stairs():
    """softplus' argument is linear across the surface: the ball stays round to a hundredth of a cell."""
    field = Balls(((0.0, 0.0, 0.0), 0.5, (1.0, 1.0, 1.0)), steepness=1000.0)
    vertices, _ = meshes.isosurface(grid_of(field), 10.0, 1.0)
    surface = 0.5 - 10.0 / 1000
    assert np.linalg.norm(vertices, axis=1) == pytest.approx(surface, abs=0.02 * 2 / 47)


def test_a_field_that_fills_its_box_gives_the_box_closed():
    mesh = extract_mesh(
        Shape(lambda x: torch.full_like(x[:, 0], 50.0), radius=0.7), 24, target_faces=3000, texture_px=64
    )
    assert mesh.report["watertight"]
    assert volume(mesh.vertices, mesh.faces) == pytest.approx(1.4**3, rel=0.01)
    assert np.abs(mesh.vertices).max() == pytest.approx(0.7)


def test_parts_beside_each_other_stay_and_floaters_and_cavities_go():
    def density(x):
        shell = (x - torch.tensor([0.3, 0.0, 0.0])).norm(dim=-1).sub(0.45).abs() < 0.15  # hollow, radii 0.3 and 0.6
        cube = (x - torch.tensor([-0.6, 0.0, 0.0])).abs().amax(-1) < 0.16
        floater = (x - torch.tensor([-0.6, 0.7, 0.7])).norm(dim=-1) < 0.06
        return 100.0 * (shell | cube | floater)

    mesh = extract_mesh(Shape(density), resolution=64, texture_px=64)
    parts = trimesh.Trimesh(mesh.vertices, mesh.faces).split()
    left, right = sorted(parts, key=lambda part: part.bounds[0, 0])
    assert left.centroid == pytest.approx([-0.6, 0, 0], abs=0.02)
    assert left.volume == pytest.approx(0.32**3, rel=0.25)
    assert np.linalg.norm(right.vertices - [0.3, 0, 0], axis=1).min() > 0.55
    assert mesh.vertices[:, 1].max() < 0.65


def test_decimation_reaches_its_target_and_keeps_the_shape(field: Balls):
    fine = extract_mesh(field, resolution=64, target_faces=10**6, texture_px=64)
    coarse = extract_mesh(field, resolution=64, target_faces=1000, texture_px=64)
    assert fine.report["faces"] > 5000 >= 1000 >= coarse.report["faces"] > 900
    assert volume(coarse.vertices, coarse.faces) == pytest.approx(volume(fine.vertices, fine.faces), rel=0.02)


def test_decimation_takes_one_mesh_at_a_time(field: Balls, monkeypatch: pytest.MonkeyPatch):
    """The library behind it has one global mesh, and runs end in parallel."""
    at_work, simplify = threading.Lock(), fast_simplification.simplify

    def watched(*args, **kwargs):
        assert at_work.acquire(blocking=False), "two at once"
        time.sleep(0.02)
        at_work.release()
        return simplify(*args, **kwargs)

    monkeypatch.setattr(fast_simplification, "simplify", watched)
    surface = meshes.isosurface(grid_of(field, 24), 5.0, 1.0)
    with ThreadPoolExecutor(4) as pool:
        assert all(len(faces) <= 200 for _, faces in pool.map(lambda _: meshes.decimated(*surface, 200), range(4)))


def test_normals_are_unit_and_point_outwards(field: Balls, mesh: Mesh):
    assert np.linalg.norm(mesh.normals, axis=1) == pytest.approx(1, abs=1e-5)
    points = torch.from_numpy(mesh.vertices).requires_grad_()
    (slope,) = torch.autograd.grad(field.density(points).sum(), points)
    outwards = -torch.nn.functional.normalize(slope, dim=1).numpy()
    cosine = (outwards * mesh.normals).sum(1)
    assert np.quantile(cosine, 0.05) > 0.95
    assert volume(mesh.vertices, mesh.faces) > 0


def test_the_report_says_what_the_mesh_is(mesh: Mesh):
    assert json.loads(json.dumps(mesh.report)) == mesh.report
    assert mesh.report["faces"] == len(mesh.faces)
    assert mesh.report["vertices"] == len(mesh.vertices)
    assert (mesh.report["watertight"], mesh.report["reason"]) == (True, "")
    assert trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).is_watertight
    at = overlapping().density(torch.from_numpy(mesh.vertices))
    assert at.median().item() == pytest.approx(mesh.report["threshold"], rel=0.1)


TETRAHEDRON = np.array([[0, 2, 1], [0, 1, 3], [1, 2, 3], [0, 3, 2]], np.int32)


@pytest.mark.parametrize(
    ("faces", "reason"),
    [
        (TETRAHEDRON, ""),
        (TETRAHEDRON[:3], "3 edges belong to one face only"),
        (np.concatenate([TETRAHEDRON, TETRAHEDRON[:, ::-1] + [[0, 0, 4]]]).astype(np.int32) % 5, "two faces"),
        (np.concatenate([TETRAHEDRON[:3], TETRAHEDRON[3:, ::-1]]), "3 edges lie between faces of opposite winding"),
    ],
)
def test_why_a_mesh_is_not_closed(faces: np.ndarray, reason: str):
    assert reason in meshes.open_because(faces)
    assert bool(reason) == bool(meshes.open_because(faces))


def test_covered_texels_share_a_square_out_among_its_triangles():
    corners = np.array([[[1, 1], [7.2, 1], [1, 6]], [[7.2, 1], [7.2, 6], [1, 6]]])
    texel, face, weights = meshes.covered_texels(corners, 8)
    assert sorted(texel) == [8 * row + column for row in range(1, 6) for column in range(1, 7)]
    centres = np.stack([texel % 8, texel // 8], 1) + 0.5
    assert np.einsum("nk,nki->ni", weights, corners[face]) == pytest.approx(centres, abs=1e-5)
    nothing = np.array([[[2, 2], [5, 5], [2, 2]], [[1.6, 1.6], [1.9, 1.6], [1.6, 1.9]], [[-4, -4], [-1, -4], [-4, -1]]])
    assert not len(meshes.covered_texels(nothing.astype(float), 8)[0])


def test_the_atlas_belongs_to_the_mesh_and_charts_do_not_overlap(mesh: Mesh):
    assert np.array_equal(mesh.atlas.vertices[mesh.atlas.faces], mesh.faces)
    assert mesh.atlas.uv.min() >= 0
    assert mesh.atlas.uv.max() <= 1
    texel, _, _ = meshes.covered_texels((mesh.atlas.uv * [1, -1] + [0, 1])[mesh.atlas.faces] * 256, 256)
    assert len(np.unique(texel)) > 0.99 * len(texel)
    assert len(texel) > 0.35 * 256**2


def test_the_texture_has_the_vertex_colours_also_on_seams(mesh: Mesh):
    """Read as viewers do, bilinearly: at a corner that mixes in texels beyond the chart's edge."""
    x, y = ((mesh.atlas.uv * [1, -1] + [0, 1]) * 256 - 0.5).clip(0, 255).T
    column, row = np.minimum(x.astype(int), 254), np.minimum(y.astype(int), 254)
    x, y = (x - column)[:, None], (y - row)[:, None]
    texture = mesh.texture.astype(float)
    upper = texture[row, column] * (1 - x) + texture[row, column + 1] * x
    lower = texture[row + 1, column] * (1 - x) + texture[row + 1, column + 1] * x
    read = upper * (1 - y) + lower * y
    assert np.quantile(np.abs(read - mesh.colours[mesh.atlas.vertices]), 0.98) < 12


def test_a_chart_smaller_than_a_texel_keeps_its_colour():
    """Red is a large triangle, blue one between the centres of the texels beside it."""
    field = Balls(((-0.5, 0.0, 0.0), 0.4, (1.0, 0.0, 0.0)), ((0.5, 0.0, 0.0), 0.4, (0.0, 0.0, 1.0)))
    vertices = np.array(
        [[-0.5, 0, 0.4], [-0.45, 0, 0.4], [-0.5, 0.05, 0.4], [0.5, 0, 0.4], [0.55, 0, 0.4], [0.5, 0.05, 0.4]]
    )
    vertices, normals = vertices.astype(np.float32), np.tile(np.array([[0, 0, 1]], np.float32), (6, 1))
    # Upper left half of 16 x 16 texels; within the texel in row 12, column 12.
    uv = np.array([[0, 1], [0.7, 1], [0, 0.3], [12.6 / 16, 3.4 / 16], [12.8 / 16, 3.4 / 16], [12.6 / 16, 3.2 / 16]])
    atlas = Atlas(uv.astype(np.float32), np.arange(6, dtype=np.int32), np.arange(6, dtype=np.int32).reshape(2, 3))
    colours = meshes.to_uint8(meshes.surface_colours(field, vertices, normals, 0.03))
    texture = meshes.baked(field, 0.03, vertices, normals, colours, atlas, 16)
    assert texture[12, 12].tolist() in colours[3:].tolist()
    assert colours[3].argmax() == 2
    assert texture[0, 0].argmax() == texture[3, 3].argmax() == 0


def test_surface_colours_by_hand():
    """Below the surface 5 per unit, red in the first two cells of 0.1 and blue in the four below them.

    Each cell has the optical depth 2 * 5 * 0.1 = 1: of the light 1 - e^-2 comes from the red, 1 - e^-6 from both.
    """

    class Layers(Field):
        def forward(self, x):
            red, blue = torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 0, 1])
            return self.density(x), torch.where(x[:, 2:] > -0.15, red, blue)

        def density(self, x):
            return 5.0 * (x[:, 2] < 0.05)

    surface, up = np.zeros((1, 3), np.float32), np.array([[0, 0, 1]], np.float32)
    (rgb,) = meshes.surface_colours(Layers(1.0, (0.0, 1.0)), surface, up, 0.1)
    share = (1 - np.exp(-2)) / (1 - np.exp(-6))
    assert rgb == pytest.approx([share, 0, 1 - share], abs=1e-5)


def test_colours_come_from_what_is_seen_not_from_the_haze():
    """A ball whose surface the level puts into a clear green haze, with red paint below it and grey at the core."""

    class Hazy(Field):
        def forward(self, x):
            r = x.norm(dim=-1, keepdim=True)
            rgb = torch.where(
                r > 0.5, torch.tensor([0.0, 1, 0]), torch.where(r > 0.35, torch.tensor([1.0, 0, 0]), GREY)
            )
            return self.density(x), rgb

        def density(self, x):
            return torch.where(x.norm(dim=-1) < 0.5, 80.0, 0.5) * (x.norm(dim=-1) < 0.55)

    directions = torch.nn.functional.normalize(torch.randn(50, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    points = (0.52 * directions).numpy()
    colours = meshes.surface_colours(Hazy(1.0, (0.0, 1.0)), points, directions.numpy(), 2 / 63)
    assert colours[:, 0].min() > 0.9
    assert colours[:, 1:].max() < 0.1


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
    assert not tree.get("extensionsUsed")
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
    assert b"map_Kd texture.png" in files["mesh.mtl"]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(files["texture.png"]))), mesh.texture)
    rows = [line.split() for line in files["mesh.obj"].decode().splitlines()]
    vertices, uv, normals = (np.array([row[1:] for row in rows if row[0] == kind], float) for kind in ("v", "vt", "vn"))
    corners = np.array([[corner.split("/") for corner in row[1:]] for row in rows if row[0] == "f"], int) - 1
    assert vertices == pytest.approx(mesh.vertices[:, [1, 2, 0]], abs=1e-5)
    assert normals == pytest.approx(mesh.normals[:, [1, 2, 0]], abs=1e-5)
    assert uv == pytest.approx(mesh.atlas.uv, abs=1e-5)
    assert np.array_equal(corners, np.stack([mesh.faces, mesh.atlas.faces, mesh.faces], -1))
    assert trimesh.Trimesh(vertices, corners[..., 0], process=False).is_watertight


@pytest.mark.parametrize(
    ("density", "threshold", "message"),
    [
        (lambda x: 0 * x[:, 0], "auto", "at most 0 % opaque"),
        (lambda x: 0 * x[:, 0] + 0.2, "auto", "at most 34 % opaque"),
        (lambda x: x[:, 0] / 0, "auto", "not a number"),
        (lambda x: 9 * (x.norm(dim=-1) < 0.5), 50.0, "density threshold of 50"),
    ],
)
def test_an_empty_scene_says_what_to_do(density, threshold: float | str, message: str):
    with pytest.raises(EmptyScene, match=message) as error:
        extract_mesh(Shape(density), resolution=24, threshold=threshold)
    assert isinstance(error.value, RequestError)
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("threshold", [0, -1.0, float("nan"), "otsu"])
def test_a_threshold_that_is_none_is_refused(threshold: float | str):
    with pytest.raises(ValueError, match="threshold must be"):
        extract_mesh(overlapping(), threshold=threshold)


def test_the_same_field_gives_the_same_mesh(field: Balls, mesh: Mesh):
    again = extract_mesh(field, resolution=64, target_faces=3000, texture_px=256)
    assert again.report == mesh.report
    assert all(np.array_equal(a, b) for a, b in zip(again.atlas, mesh.atlas))
    for name in ("vertices", "faces", "normals", "colours", "texture"):
        assert np.array_equal(getattr(again, name), getattr(mesh, name))
