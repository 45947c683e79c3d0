"""nerfacc's march through occupied cells, its compiled extension played by loops."""

from __future__ import annotations

import math
import sys
import types

import nerfacc
import pytest
import torch
from torch import Tensor

from psd.scene import render as rendering
from psd.scene.cameras import camera_rays, orbit_cameras
from psd.scene.render import Occupancy, extension_works, march_packed, render, slab
from tests.fog import Fog, plain, seeded, sky


def test_the_extension_is_never_looked_for_on_a_cpu_and_never_compiled(monkeypatch):
    assert not extension_works(torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "nerfacc.csrc", None)  # import raises
    monkeypatch.setattr(nerfacc.scan, "_C", None)  # what would compile
    assert not extension_works.__wrapped__(torch.device("cuda"))


def loop_traversal(origins, directions, binaries, aabbs, near_planes, far_planes, step_size, cone_angle):
    """nerfacc.grid.traverse_grids: steps from the near plane on, kept if their middle is in an occupied cell."""
    vals, is_left, is_right, rays = [], [], [], []
    low, high, n = aabbs[0, :3], aabbs[0, 3:], binaries.shape[-1]
    enter, leave = slab(origins, directions, low, high)
    for i, (o, d) in enumerate(zip(origins, directions)):
        start = float(near_planes[i])
        while start + step_size / 2 < leave[i]:
            middle = o + (start + step_size / 2) * d
            index = ((middle - low) / (high - low) * n).floor().long().clamp(0, n - 1)
            if start + step_size / 2 > enter[i] and binaries[0][tuple(index)]:
                vals += [start, start + step_size]
                is_left += [True, False]
                is_right += [False, True]
                rays.append(i)
            start += step_size
    rays = torch.tensor(rays, dtype=torch.long)
    samples = types.SimpleNamespace(ray_indices=rays, packed_info=packed_info(rays, len(origins)))
    intervals = types.SimpleNamespace(
        vals=torch.tensor(vals),
        is_left=torch.tensor(is_left, dtype=torch.bool),
        is_right=torch.tensor(is_right, dtype=torch.bool),
    )
    return intervals, samples, None


def packed_info(ray: Tensor, rays: int) -> Tensor:
    count = torch.bincount(ray, minlength=rays)
    return torch.stack([count.cumsum(0) - count, count], -1)


def loop_exclusive_sum(values: Tensor, packed: Tensor | None = None) -> Tensor:
    if packed is None:
        return values.cumsum(-1) - values
    return torch.cat([values[a : a + n].cumsum(0) - values[a : a + n] for a, n in packed.tolist()])


@pytest.fixture
def played_extension(monkeypatch):
    monkeypatch.setattr(nerfacc.estimators.occ_grid, "traverse_grids", loop_traversal)
    monkeypatch.setattr(nerfacc.volrend, "pack_info", packed_info)
    monkeypatch.setattr(nerfacc.volrend, "exclusive_sum", loop_exclusive_sum)
    monkeypatch.setattr(rendering, "extension_works", lambda device: True)
    monkeypatch.setattr(rendering, "STEPS", 64)  # of 512: the loop is slow


def test_the_packed_march_draws_the_same_picture(played_extension):
    field, cameras = Fog(6.0, ball=0.5), orbit_cameras(1, fovy_deg=30)
    occupancy = Occupancy(1.0, resolution=16)
    occupancy.update(field, seeded(0))
    want = render(field, sky, cameras, 8, samples=400, **{**plain, "with_normals": True})
    got = render(field, sky, cameras, 8, samples=1, jitter=seeded(0), with_normals=True, occupancy=occupancy)
    for seed, same in ((0, True), (1, False)):
        again = render(field, sky, cameras, 8, samples=1, jitter=seeded(seed), with_normals=True, occupancy=occupancy)
        assert torch.equal(got.rgb, again.rgb) == same
    assert want.opacity.max() > 0.99
    for name in ("rgb", "opacity", "depth"):
        assert (getattr(got, name) - getattr(want, name)).abs().mean() < 0.01, name
    slopes = [torch.autograd.grad(each.rgb.sum(), field.sigma)[0].item() for each in (got, want)]
    assert slopes[0] == pytest.approx(slopes[1], rel=0.05)


def test_the_packed_march_leaves_out_what_nobody_sees(played_extension):
    field, cameras = Fog(100.0, ball=0.5), orbit_cameras(1, fovy_deg=30)
    occupancy = Occupancy(1.0, resolution=16)
    occupancy.update(field, seeded(0))
    origins, directions = (each.reshape(-1, 3) for each in camera_rays(cameras, 4, 4))
    march = march_packed(field, origins, directions, torch.zeros(16), occupancy)
    points = origins[march.ray] + march.t[:, None] * directions[march.ray]
    assert (field.density(points) > 0).all()
    way_in = (points.norm(dim=-1) - 0.5).abs()
    assert way_in.max() < math.log(1e4) / 100 + 2 * 2 * 3**0.5 / 64  # T > 1e-4 ends there
