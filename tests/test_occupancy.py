"""Which cells are worth sampling: nerfacc's rule by hand, and pictures that it must not change."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from psd.scene.cameras import camera_rays, orbit_cameras
from psd.scene.render import Occupancy, march_dense, render
from tests.fog import Fog, Swirl, plain, seeded, sky


def test_an_occupancy_that_culls_nothing_changes_nothing():
    field, cameras = Swirl(2.0), orbit_cameras(2)
    want = render(field, sky, cameras, 8, samples=6, jitter=seeded(0), with_normals=True, occupancy=None)
    occupancy = Occupancy(1.0, resolution=8)
    for full in (Fog(0.0), Fog(0.025), Fog(3.0)):  # the mean of 512 times 0.025 is above it
        occupancy.update(full, seeded(1))
        got = render(field, sky, cameras, 8, samples=6, jitter=seeded(0), with_normals=True, occupancy=occupancy)
        for name in ("rgb", "foreground", "opacity", "depth", "z_variance", "normal"):
            torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=0, atol=1e-6)
    (slope,) = torch.autograd.grad(got.rgb.sum(), field.sigma)
    torch.testing.assert_close(slope, torch.autograd.grad(want.rgb.sum(), field.sigma)[0])


def test_an_occupancy_spares_the_empty_cells_and_keeps_the_picture():
    field, cameras = Fog(60.0, ball=0.3, centre=(0.3, -0.2, 0.1)), orbit_cameras(2, fovy_deg=45)
    want = render(field, sky, cameras, 16, samples=600, **plain)
    occupancy = Occupancy(1.0)
    for seed in range(3):
        occupancy.update(field, seeded(seed))
    field.points.clear()
    got = render(field, sky, cameras, 16, samples=150, **{**plain, "occupancy": occupancy})
    assert sum(field.points) < 0.12 * 512 * 150
    torch.testing.assert_close(got.rgb.mean((2, 3)), want.rgb.mean((2, 3)), rtol=0, atol=2e-3)
    difference = (got.opacity - want.opacity).abs()
    assert difference.mean() < 2e-3 and difference.max() < 0.3  # the largest at the ball's rim
    low, high = occupancy.bounds
    origins, directions = (each.reshape(-1, 3) for each in camera_rays(cameras, 16, 16))
    march = march_dense(origins, directions, 1.0, 150, torch.full((512,), 0.5), occupancy)
    assert (march.ends - march.starts).max() * 150 <= (high - low).norm() + 1e-4
    assert (low < field.centre - 0.3).all() and (high > field.centre + 0.3).all()
    assert (low > field.centre - 0.45).all() and (high < field.centre + 0.45).all()


def test_occupancy_follows_nerfaccs_rule():
    occupancy = Occupancy(2.0, resolution=4)
    assert occupancy.cells.all()
    assert [side.tolist() for side in occupancy.bounds] == [[-2, -2, -2], [2, 2, 2]]
    occupancy.update(Fog(8.0, ball=0.01, centre=(5.0, 5.0, 5.0), radius=2.0), seeded(0))
    assert not occupancy.density.any() and occupancy.cells.all()  # all empty: none is left out
    occupancy.update(Corner(8.0, radius=2.0), seeded(0))
    assert occupancy.density[0, 0, 3] == 8 and occupancy.density.sum() == 8
    filled = torch.zeros(4, 4, 4, dtype=torch.bool)
    filled[:2, :2, 2:] = True  # the cell and its neighbours
    assert torch.equal(occupancy.cells, filled)
    assert [side.tolist() for side in occupancy.bounds] == [[-2, -2, 0], [0, 0, 2]]
    occupancy.update(Fog(0.0, radius=2.0), seeded(0))
    assert occupancy.density[0, 0, 3].item() == pytest.approx(0.95 * 8)
    occupancy.update(Fog(float("nan"), radius=2.0), seeded(0))
    assert occupancy.cells.all()  # NaN must be seen


class Corner(Fog):
    """Filled is only the cell [-2, -1] x [-2, -1] x [1, 2]."""

    def density(self, x: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
        return self.sigma * ((x[:, 0] < -1) & (x[:, 1] < -1) & (x[:, 2] > 1))


@pytest.mark.parametrize(("density", "kept"), [(0.2, True), (0.05, False)])
def test_a_cell_is_filled_if_crossing_it_takes_a_hundredth_of_the_light(density: float, kept: bool):
    """Cell width 0.1, so 0.1 is the density; a solid corner keeps the mean above it."""

    class Two(Fog):
        def density(self, x: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
            return torch.where((x < -0.5).all(-1), 100.0, density * (x > 0.5).all(-1))

    occupancy = Occupancy(1.0, resolution=20)
    occupancy.update(Two(1.0), seeded(0))
    assert occupancy.density.mean() > 0.1
    diagonal, t = torch.ones(1, 3), torch.tensor([[-0.75, 0.0, 0.75]])
    assert occupancy.along(torch.zeros(1, 3), diagonal, t).tolist() == [[True, False, kept]]


def test_an_occupancy_looks_up_the_cells_of_points_along_rays():
    occupancy = Occupancy(0.8, resolution=5)
    occupancy.cells = torch.rand(5, 5, 5, generator=seeded(0)) < 0.5
    origins = torch.rand(500, 3, generator=seeded(1)) * 1.2 - 0.6
    directions, t = F.normalize(torch.randn(500, 3, generator=seeded(2)), dim=-1), torch.tensor([0.0, 0.1, -0.15])
    along = occupancy.along(origins, directions, t.expand(500, 3))
    for k in range(3):
        cells = ((origins + t[k] * directions + 0.8) / 0.32).floor().long()
        assert torch.equal(along[:, k], occupancy.cells[tuple(cells.T)])
