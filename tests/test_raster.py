"""The rasteriser against triangles worked out by hand, a loop over faces, and the ball that a mesh comes close to."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import trimesh
from torch import Tensor

from psd.scene import raster
from psd.scene.cameras import Cameras, camera_rays, orbit_cameras
from psd.scene.mesh import extract_mesh
from psd.scene.raster import Hits, MeshScene, first_hits, looked_up
from psd.scene.scene import Scene
from psd.scene.turntable import depth_picture, normal_picture, turntable_frames
from tests.solids import SIZE, overlapping, rasterised

# From (3, 0, 0) towards -x: y is to the right, z up, and at depth d a pixel of eight is d / 4 wide.
FRONT = orbit_cameras(1, elevation_deg=0.0, fovy_deg=90.0, distance=3.0)


def at(depth: float, column: float, row: float) -> list[float]:
    """The point that FRONT's picture of 8 px has there."""
    return [3 - depth, (column - 4) * depth / 4, (4 - row) * depth / 4]


def mesh_scene(corners: list, faces: list | None = None, **parts) -> MeshScene:
    """White, normals towards +x."""
    vertices = torch.tensor(corners)
    faces = torch.tensor(faces or torch.arange(len(corners)).view(-1, 3).tolist())
    default = dict(
        normals=torch.tensor([1.0, 0, 0]).expand(len(vertices), 3), colours=torch.ones_like(vertices),
        uv=torch.zeros(len(vertices), 2), texture=torch.full((len(faces),), -1), textures=(),
    )  # fmt: skip
    return MeshScene(vertices, faces, **{**default, **parts})


def hits_of(scene: MeshScene, camera: Cameras = FRONT, size: int = 8) -> Hits:
    return first_hits(scene.vertices, scene.faces, camera, size)


def faces_seen(hits: Hits) -> Tensor:
    """The face at each of FRONT's 8 x 8 pixels, -1 where there is none."""
    return torch.full((64,), -1).index_copy(0, hits.ray, hits.face).view(8, 8)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_a_triangle_covers_the_pixels_whose_centres_it_holds_from_either_side(order: list[int]):
    """Its legs along column 1 and row 1, its third side x + y = 8.5: centres of column + row <= 7."""
    triangle = mesh_scene([at(3, 1, 1), at(3, 7.5, 1), at(3, 1, 7.5)], [order])
    hits = hits_of(triangle)
    want = [(row, column) for row in range(1, 7) for column in range(1, 7) if column + row <= 7]
    assert [(ray // 8, ray % 8) for ray in hits.ray.tolist()] == want
    for distance, (row, column) in zip(hits.distance.tolist(), want):
        assert distance == pytest.approx(3 * math.hypot(1, (column - 3.5) / 4, (row - 3.5) / 4), rel=1e-6)


def test_weights_are_those_of_the_point_in_space_and_not_of_its_picture():
    """The middle of the picture of an edge from depth 1 to depth 3 lies a quarter along it, at depth 3/2."""
    triangle = mesh_scene([at(1, 0.5, 4.5), at(3, 6.5, 4.5), at(2, 3.5, 0.1)])
    hits = hits_of(triangle)
    middle = (hits.ray == 4 * 8 + 3).nonzero().item()
    assert hits.weights[middle].tolist() == pytest.approx([0.75, 0.25, 0], abs=1e-6)
    assert hits.distance[middle].item() == pytest.approx(1.5 * math.hypot(1, 0.5 / 4, 0.5 / 4), rel=1e-6)
    torch.testing.assert_close(hits.weights.sum(1), torch.ones_like(hits.distance))


@pytest.mark.parametrize("chunk", [1, 50, 2**20])
@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_of_two_faces_that_cross_the_nearer_is_seen_on_each_side(order: list[int], chunk: int, monkeypatch):
    """One at depth 2 and one that comes nearer to the right, through depth 2 in the middle of the picture."""
    monkeypatch.setattr(raster, "CHUNK", chunk)
    flat = [at(2, -20, -20), at(2, 28, 4), at(2, -20, 28)]
    slanting = [[0.0, -2.0, -9.0], [0.0, -2.0, 9.0], [2.0, 2.0, 0.0]]  # x = 1 + y / 2
    faces = [[[0, 1, 2], [3, 4, 5]][k] for k in order]
    seen = faces_seen(hits_of(mesh_scene([*flat, *slanting], faces)))
    middle = seen[3:5]
    assert (middle[:, :4] == order.index(0)).all() and (middle[:, 4:] == order.index(1)).all()


def test_neighbours_leave_no_gap_and_an_edge_on_face_is_not_there():
    """Two triangles share the picture's diagonal, through the centres of pixels; a third lies in the line of sight."""
    square = [at(3, 0, 0), at(3, 8, 0), at(3, 8, 8), at(3, 0, 8)]
    hits = hits_of(mesh_scene([*square, [0.0, 0, 0], [1.0, 0, 0], [2.0, 0, 0]], [[0, 1, 2], [0, 2, 3], [4, 5, 6]]))
    assert hits.ray.tolist() == list(range(64)) and set(hits.face.tolist()) == {0, 1}
    assert faces_seen(hits).diagonal().tolist() == [0] * 8  # of equally near ones the first


def test_a_floor_that_goes_on_behind_the_eye_is_seen_to_the_horizon():
    floor = mesh_scene([[-1e4, -1e4, -0.5], [1e4, -1e4, -0.5], [0.0, 2e4, -0.5]])
    hits = hits_of(floor)
    assert hits.ray.tolist() == list(range(32, 64))
    _, directions = camera_rays(FRONT, 8, 8)
    torch.testing.assert_close(hits.distance.float(), -0.5 / directions.view(-1, 3)[32:, 2], rtol=1e-5, atol=0)
    assert not len(hits_of(mesh_scene([[4.0, -1, -1], [4.0, 1, -1], [4.0, 0, 1]])).ray)  # all of it behind


def ball_scene(radius: float = 0.5) -> MeshScene:
    ball = trimesh.creation.icosphere(subdivisions=5, radius=radius)
    vertices = torch.from_numpy(np.array(ball.vertices)).float()
    return mesh_scene(
        vertices.tolist(), ball.faces.tolist(), normals=vertices / radius, colours=vertices.abs() / radius
    )


def test_a_ball_of_20480_faces_has_the_balls_outline_depth_and_normals():
    """Distance 3 cos - sqrt(r^2 - h^2) for a ray that passes the middle at h; its faces lie within r (1 - 2e-4)."""
    scene, cameras = ball_scene(), orbit_cameras(2, elevation_deg=25.0, fovy_deg=30.0, azimuth_start_deg=10.0)
    for camera in (cameras[:1], cameras[1:]):
        hits = hits_of(scene, camera, 64)
        origins, directions = (rays.view(-1, 3) for rays in camera_rays(camera, 64, 64))
        cosine = (directions * camera.c2w[:, :3, 2]).sum(1).neg()
        h2 = 9 * (1 - cosine**2)
        met = torch.zeros(64 * 64, dtype=torch.bool).index_fill(0, hits.ray, True)
        assert met[h2 < 0.4995**2].all() and not met[h2 > 0.5**2].any()
        inner = h2[hits.ray] < 0.45**2
        distance = (3 * cosine - (0.25 - h2).clamp(min=0).sqrt())[hits.ray]
        torch.testing.assert_close(hits.distance.float()[inner], distance[inner], rtol=0, atol=3e-4)
        points = origins[hits.ray] + hits.distance.float()[:, None] * directions[hits.ray]
        corners = scene.vertices[scene.faces[hits.face]]
        between = torch.einsum("nk,nkc->nc", hits.weights.float(), corners)
        torch.testing.assert_close(between, points, rtol=0, atol=1e-5)


def test_a_rendering_is_the_volume_renderers_of_the_same_ball():
    """Colour |normal| at the surface; the picture's edges are mixed from four rays a pixel."""
    scene, cameras = ball_scene(), orbit_cameras(3, elevation_deg=25.0, fovy_deg=30.0)
    assert isinstance(scene, Scene) and scene.radius == pytest.approx(0.5)
    seen = scene.render(cameras, 32, samples=1, with_normals=True)
    _, directions = camera_rays(cameras, 32, 32)
    cosine = (directions * cameras.c2w[:, None, None, :3, 2]).sum(-1).neg()
    h2 = 9 * (1 - cosine**2)
    distance = 3 * cosine - (0.25 - h2).clamp(min=0).sqrt()
    normal = (cameras.c2w[:, None, None, :3, 3] + distance[..., None] * directions) / 0.5
    inner, outside = h2 < 0.4**2, h2 > 0.6**2
    assert seen.opacity[:, 0][inner].eq(1).all() and not seen.opacity[:, 0][outside].any()
    assert {0, 2, 4} < set((4 * seen.opacity).unique().tolist()) <= {0, 1, 2, 3, 4}
    disc = math.pi * (32 / 2 / math.tan(math.radians(15)) * math.tan(math.asin(0.5 / 3))) ** 2
    assert seen.opacity.sum((1, 2, 3)).tolist() == pytest.approx([disc] * 3, rel=0.01)
    torch.testing.assert_close(seen.depth[:, 0][inner], distance[inner], rtol=0, atol=2e-3)
    torch.testing.assert_close(seen.normal.permute(0, 2, 3, 1)[inner], normal[inner], rtol=0, atol=0.01)
    rgb = raster.srgb_of(normal.abs())[inner]
    assert (seen.rgb.permute(0, 2, 3, 1)[inner] - rgb).abs().mean() < 0.01
    assert seen.rgb.permute(0, 2, 3, 1)[outside].eq(1).all()  # the background
    torch.testing.assert_close(seen.rgb, seen.foreground + 1 - seen.opacity)
    torch.testing.assert_close(seen.contrast, (1 - seen.rgb).amax(1, keepdim=True))
    assert not seen.z_variance.any() and seen.samples is None
    assert scene.render(cameras, 8, samples=1).normal is None


def test_depth_normals_and_turntables_are_drawn_of_meshes_too():
    scene = ball_scene()
    seen = scene.render(orbit_cameras(1), 32, samples=1, with_normals=True)
    assert depth_picture(seen)[0, 16, 16, 0] > 250 and not depth_picture(seen)[0, 0, 0].any()
    assert normal_picture(seen)[0, 16, 16, 0] > 240
    assert [frame.shape for frame in turntable_frames(scene, 2, 16, samples=1)] == [(16, 16, 3)] * 2


def test_a_camera_that_meets_nothing_sees_the_background():
    away = mesh_scene([[9.0, 0, 0], [9.0, 1, 0], [9.0, 0, 1]])
    seen = away.render(FRONT, 4, samples=1, with_normals=True)
    assert seen.rgb.eq(1).all() and not seen.opacity.any() and not seen.depth.any() and not seen.normal.any()


def test_a_face_by_face_loop_covers_the_same_pixels():
    mesh = extract_mesh(overlapping(), resolution=48, target_faces=1500, texture_px=64)
    cameras = orbit_cameras(3, elevation_deg=20.0, distance=2.4, azimuth_start_deg=15.0)
    for i, pose in enumerate(cameras.c2w.numpy()):
        uv = np.zeros((len(mesh.vertices), 2))
        _, covered = rasterised(mesh.vertices, mesh.faces, uv, mesh.texture, pose, 40.0)
        hits = first_hits(torch.from_numpy(mesh.vertices), torch.from_numpy(mesh.faces), cameras[i : i + 1], SIZE)
        assert np.array_equal(np.flatnonzero(covered), hits.ray.numpy())


def test_texels_are_bilinear_stay_at_the_edges_and_repeat_beyond():
    """Two by two, the upper row 0 and 100, the lower 200 and 40."""
    texels = torch.tensor([[0, 100], [200, 40]], dtype=torch.uint8)[..., None].expand(2, 2, 3)
    uv = torch.tensor(
        [[0.25, 0.75], [0.75, 0.75], [0.5, 0.75], [0.5, 0.5], [0, 0], [1, 1], [1.25, -0.25], [-0.5, 0.75]]
    )
    want = [0, 100, 50, 85, 200, 100, 0, 50]
    assert (255 * looked_up(texels, uv)[:, 0]).tolist() == pytest.approx(want, abs=1e-3)


def test_textures_are_multiplied_with_the_corners_in_linear_light():
    """Half the light of sRGB 200/255 is 0.5737; half of all light, on a face without texture, 0.7354."""
    square = [at(3, 0, 0), at(3, 8, 0), at(3, 8, 8), at(3, 0, 8)]
    texels = torch.full((1, 1, 3), 200, dtype=torch.uint8)
    scene = mesh_scene(
        square,
        [[0, 1, 2], [0, 2, 3]],
        colours=torch.full((4, 3), 0.5),
        texture=torch.tensor([0, -1]),
        textures=(texels,),
    )
    rgb = scene.render(FRONT, 8, samples=1).rgb[0, 0]
    assert rgb[1, 6].item() == pytest.approx(0.5737, abs=1e-4)
    assert rgb[6, 1].item() == pytest.approx(0.7354, abs=1e-4)
    assert F.mse_loss(raster.linear_of(raster.srgb_of(grey := torch.linspace(0, 1, 99))), grey) < 1e-10
