"""Colours seen along normals, the atlas and the baked texture, by hand and as viewers read them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from psd.export import to_bytes
from psd.modes.pictures import painting_views
from psd.scene import texture as textures
from psd.scene.cameras import orbit_cameras
from psd.scene.fields import ConstantBackground, Field
from psd.scene.mesh import Mesh, extract_mesh
from psd.scene.rig import Frame
from psd.scene.scene import FieldScene
from psd.scene.texture import Atlas, Views
from tests.solids import GREY, Balls, overlapping


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return extract_mesh(overlapping(), resolution=64, target_faces=3000, texture_px=256)


def test_covered_texels_share_a_square_out_among_its_triangles():
    corners = np.array([[[1, 1], [7.2, 1], [1, 6]], [[7.2, 1], [7.2, 6], [1, 6]]])
    texel, face, weights = textures.covered_texels(corners, 8)
    assert sorted(texel) == [8 * row + column for row in range(1, 6) for column in range(1, 7)]
    centres = np.stack([texel % 8, texel // 8], 1) + 0.5
    assert np.einsum("nk,nki->ni", weights, corners[face]) == pytest.approx(centres, abs=1e-5)
    nothing = np.array([[[2, 2], [5, 5], [2, 2]], [[1.6, 1.6], [1.9, 1.6], [1.6, 1.9]], [[-4, -4], [-1, -4], [-4, -1]]])
    assert not len(textures.covered_texels(nothing.astype(float), 8)[0])


def test_the_atlas_belongs_to_the_mesh_and_charts_do_not_overlap(mesh: Mesh):
    assert np.array_equal(mesh.atlas.vertices[mesh.atlas.faces], mesh.faces)
    assert mesh.atlas.uv.min() >= 0
    assert mesh.atlas.uv.max() <= 1
    texel, _, _ = textures.covered_texels((mesh.atlas.uv * [1, -1] + [0, 1])[mesh.atlas.faces] * 256, 256)
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
    colours = to_bytes(textures.surface_colours(field, vertices, normals, 0.03))
    texture = textures.baked(textures.painter(field, 0.03, None), vertices, normals, colours, atlas, 16)
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
    (rgb,) = textures.surface_colours(Layers(1.0, (0.0, 1.0)), surface, up, 0.1)
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
    colours = textures.surface_colours(Hazy(1.0, (0.0, 1.0)), points, directions.numpy(), 2 / 63)
    assert colours[:, 0].min() > 0.9
    assert colours[:, 1:].max() < 0.1


def all_around(field: Field, background: tuple[float, float, float] = (0.5, 0.5, 0.5)) -> Views:
    return painting_views(FieldScene(field, ConstantBackground(background)), Frame(), 64, samples=96)


def test_colours_come_from_the_views_and_not_from_the_field_where_views_see():
    """Half-clear red before a background of blue is purple in every picture, and so on the mesh."""

    class Clear(Field):
        def forward(self, x):
            return self.density(x), torch.tensor([1.0, 0.0, 0.0]).expand(len(x), 3)

        def density(self, x):
            return 1.5 * (x.norm(dim=-1) < 0.5)

    directions = torch.nn.functional.normalize(torch.randn(80, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    points, normals = (0.5 * directions).numpy(), directions.numpy()
    field = Clear(1.0, (0.0, 1.0))
    views = all_around(field, (0.0, 0.0, 1.0))
    assert textures.painter(field, 0.03, None)(points, normals)[:, 2].max() < 0.01
    seen = textures.painter(field, 0.03, views)(points, normals)
    assert seen[:, 2].min() > 0.1
    assert seen[:, 2].mean() > 0.25


def test_a_view_gives_a_point_its_own_pixel():
    """One camera in front of a picture whose red is its column and whose green is its row."""
    camera = orbit_cameras(1, elevation_deg=0.0, fovy_deg=60.0, distance=2.0)
    ramp = (torch.arange(32) + 0.5) / 32
    rgb = torch.stack([ramp.expand(32, 32), ramp[:, None].expand(32, 32), torch.zeros(32, 32)])[None]
    views = Views(camera, rgb, torch.ones(1, 1, 32, 32), torch.full((1, 1, 32, 32), 2.0))
    edge = 2 * np.tan(np.deg2rad(30))  # of the picture, in the plane through the origin
    # Seen from +x: +y is to the right, +z upwards. The last is too far behind, the one before looks away.
    points = np.array([[0, 0, 0], [0, 0.5 * edge, 0], [0, 0, 0.5 * edge], [0, 0, 0], [-0.5, 0, 0]], np.float32)
    normals = np.array([[1, 0, 0], [1, 0, 0], [1, 0, 0], [-1, 0, 0], [1, 0, 0]], np.float32)
    total, weight = textures.seen_colours(views, torch.from_numpy(points), torch.from_numpy(normals), 0.3)
    seen = (total[:3] / weight[:3]).numpy()
    assert seen == pytest.approx(np.array([[0.5, 0.5, 0], [0.75, 0.5, 0], [0.5, 0.25, 0]]), abs=1e-5)
    slanting = (2 / np.hypot(2, 0.5 * edge)) ** 2
    assert weight[:, 0].tolist() == pytest.approx([1, slanting, slanting, 0, 0], abs=1e-6)


def test_what_hides_a_point_does_not_paint_it():
    """A blue ball close behind a red one is blue also on the side that most views see red before."""
    field = Balls(((0.3, 0.0, 0.0), 0.25, (0.9, 0.1, 0.1)), ((-0.3, 0.0, 0.0), 0.25, (0.1, 0.1, 0.9)))
    towards = np.array([[1, 0, 0], [0.8, 0.6, 0], [0.8, 0, 0.6], [0, 1, 0]], np.float32)
    points = (np.array([-0.3, 0, 0]) + 0.25 * towards).astype(np.float32)
    seen = textures.painter(field, 0.02, all_around(field))(points, towards)
    assert (seen[:, 2] > seen[:, 0] + 0.2).all()
