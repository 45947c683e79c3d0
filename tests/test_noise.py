"""Noise on a surface: it is N(0, 1), its cells are independent, and it stays where the surface is."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from psd.scene.cameras import camera_rays, orbit_cameras
from psd.scene.noise import CHARTS, SHELLS, SurfaceNoise, hemisphere_to_square, texel_of

SHAPE, RADIUS = (4, 8, 8), 1.0


def noise_of(seed: int = 0, resolution: int = 64) -> SurfaceNoise:
    return SurfaceNoise(SHAPE, resolution, torch.Generator().manual_seed(seed), torch.device("cpu"))


def ball_from(azimuth_deg: float, ball: float = 0.6, px: int = 32) -> tuple[Tensor, Tensor]:
    """What a camera sees of a ball around the origin: surface points and opacity."""
    cameras = orbit_cameras(1, azimuth_start_deg=azimuth_deg, elevation_deg=15.0, distance=2.5, fovy_deg=40.0)
    origins, directions = camera_rays(cameras, px, px)
    b = (origins * directions).sum(-1, keepdim=True)
    inside = b**2 - (origins.square().sum(-1, keepdim=True) - ball**2)
    points = origins + directions * (-b - inside.clamp(min=0).sqrt())
    return points.movedim(-1, 1), (inside > 0).float().movedim(-1, 1)


def test_equal_areas_go_to_equal_areas():
    x = torch.randn(200_000, 3, generator=torch.Generator().manual_seed(0))
    x = x / x.norm(dim=1, keepdim=True)
    u, v = hemisphere_to_square(x[:, 0], x[:, 1], x[:, 2].abs())
    assert u.abs().max() <= 1 + 1e-5 and v.abs().max() <= 1 + 1e-5
    counts = torch.histogramdd(torch.stack([u, v], 1), [8, 8], range=[-1.0, 1.0, -1.0, 1.0]).hist
    assert (counts / counts.mean() - 1).abs().max() < 0.08  # 3,125 a cell: 4.5 standard deviations


def test_every_direction_and_shell_has_texels_of_its_own():
    points = torch.tensor([[0.3, 0, 0], [-0.3, 0, 0], [0, 0.3, 0], [0, 0, -0.3], [0.6, 0, 0], [1.2, 0, 0]])
    texels = texel_of(points, 8)
    assert len(set(texels.tolist())) == 6 and texels[5] == -1
    assert texels.max() < CHARTS * SHELLS * 64


def test_a_view_of_it_is_standard_normal_and_its_cells_are_independent():
    points, opacity = ball_from(20.0)
    views = torch.stack([noise_of(seed).seen(points, opacity, RADIUS)[0] for seed in range(400)])
    cells = views.flatten(2).movedim(1, 0).reshape(-1, SHAPE[1] * SHAPE[2])  # [draws, cells]
    assert cells.mean().abs() < 0.01 and (cells.var(0) - 1).abs().max() < 0.2
    correlation = torch.corrcoef(cells.T) - torch.eye(cells.shape[1])
    assert correlation.abs().max() < 5.5 / math.sqrt(len(cells))


def test_it_stays_on_the_surface_when_the_camera_moves():
    """Correlation of the same cells seen again: high within a texel, less beyond, none from behind; the rest stays."""
    noise = noise_of()
    front, beside, further, behind = (noise.seen(*ball_from(azimuth), RADIUS)[0] for azimuth in (0.0, 0.2, 4.0, 180.0))
    solid = torch.nn.functional.avg_pool2d(ball_from(0.0)[1], 4)[0, 0] == 1

    def agreement(a: Tensor, b: Tensor) -> float:
        return torch.corrcoef(torch.stack([a[:, solid].flatten(), b[:, solid].flatten()]))[0, 1].item()

    assert agreement(front, beside) > 0.8
    assert 0.2 < agreement(front, further) < agreement(front, beside)
    assert abs(agreement(front, behind)) < 0.3
    empty = torch.nn.functional.max_pool2d(ball_from(0.0)[1], 4)[0, 0] == 0
    assert torch.equal(front[:, empty], noise.behind[:, empty])


@pytest.mark.parametrize("steps", [1, 10])
def test_renewal_forgets_at_its_rate(steps: int):
    noise, generator = noise_of(), torch.Generator().manual_seed(5)
    before = noise.texels.clone()
    for _ in range(steps):
        noise.refresh(0.05, generator)
    correlation = torch.corrcoef(torch.stack([before.flatten(), noise.texels.flatten()]))[0, 1]
    assert correlation == pytest.approx(0.95 ** (steps / 2), abs=0.01)
    assert noise.texels.var() == pytest.approx(1, abs=0.02)
