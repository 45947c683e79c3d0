"""Meshes against the fields they come from."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import fast_simplification
import numpy as np
import pytest
import torch
import trimesh

from psd.errors import RequestError
from psd.scene import mesh as meshes
from psd.scene.fields import Field, VoxelField
from psd.scene.mesh import EmptyScene, Mesh, extract_mesh
from tests.solids import Balls, Shape, around, overlapping, seen_of


@pytest.fixture(scope="module")
def field() -> Balls:
    return overlapping()


@pytest.fixture(scope="module")
def mesh(field: Balls) -> Mesh:
    return extract_mesh(field, resolution=64, target_faces=3000, texture_px=256)


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


@pytest.mark.parametrize(
    ("channels", "what"), [(slice(0, 1), "density"), (slice(1, 4), "colour"), (slice(4), "density")]
)
def test_a_diverged_field_has_no_mesh(channels: slice, what: str):
    field = VoxelField(8)
    field.voxels.data[:, channels] = torch.nan
    with pytest.raises(EmptyScene, match=f"The scene's {what} is not a number: the run diverged"):
        extract_mesh(field, resolution=24, texture_px=64)


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
