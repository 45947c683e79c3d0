"""Volume rendering against closed forms, loops over samples and recorded numbers of nerfacc and threestudio."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from psd.scene import render as rendering
from psd.scene.cameras import Cameras, camera_rays, orbit_cameras
from psd.scene.fields import Field
from psd.scene.render import (
    DenseMarch,
    Occupancy,
    Rendering,
    accumulate,
    march_dense,
    render,
    render_views,
    slab,
)
from psd.scene.scene import FieldScene, Scene
from tests.fog import Fog, Swirl, plain, seeded, sky

GOLDEN = Path(__file__).parent / "golden/nerf"
CUDA = torch.device("cuda")


def padded_march(ray: Tensor, t_starts: Tensor, t_ends: Tensor, rays: int) -> DenseMarch:
    """Packed intervals, those of a ray in a row, as the occupied ones of a dense march."""
    first = torch.searchsorted(ray, torch.arange(rays))
    column = torch.arange(len(ray)) - first[ray]
    starts = torch.zeros(rays, int(column.max()) + 1)
    ends = starts.clone()
    starts[ray, column], ends[ray, column] = t_starts, t_ends
    return DenseMarch(ray, (t_starts + t_ends) / 2, starts, ends, ray * starts.shape[1] + column)


def full_march(starts: Tensor, ends: Tensor) -> DenseMarch:
    """Every interval of rays x samples."""
    rays, samples = starts.shape
    ray = torch.arange(rays).repeat_interleave(samples)
    return padded_march(ray, starts.flatten(), ends.flatten(), rays)


def close(got: Tensor, want: Tensor, relative: float = 1e-5) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=relative * want.abs().max().item())


def test_weights_sums_and_gradient_are_nerfaccs():
    golden = load_file(GOLDEN / "volume_rendering.safetensors")
    march = full_march(golden["t_starts"], golden["t_ends"])
    density = golden["sigmas"].flatten().requires_grad_()
    columns, weights = accumulate(march, 6, density, golden["rgbs"].view(-1, 3), None)
    close(weights, golden["weights"].flatten())
    for got, name in ((columns[:, :3], "color"), (columns[:, 3:4], "opacity"), (columns[:, 4:5], "depth")):
        close(got, golden[name])
    (got,) = torch.autograd.grad((columns[:, :3] * golden["color_cotangent"]).sum(), density)
    close(got, golden["dcolor_dsigma"].flatten())


def test_a_rendering_is_threestudios():
    golden = load_file(GOLDEN / "renderer_and_regularisers.safetensors")
    rays = golden["rays_d"].numel() // 3
    march = padded_march(golden["ray_indices"], golden["t_starts"], golden["t_ends"], rays)
    columns, weights = accumulate(march, rays, golden["density"][:, 0], golden["features"].sigmoid(), golden["normal"])
    foreground, opacity, depth, z_variance, normal = columns.split([3, 1, 1, 1, 3], 1)
    close(weights, golden["out.weights"][:, 0])
    close(foreground, golden["out.comp_rgb_fg"].view(-1, 3))
    close(opacity, golden["out.opacity"].view(-1, 1))
    close(depth, golden["out.depth"].view(-1, 1))
    close(z_variance, golden["out.z_variance"].view(-1, 1))
    close((normal + 1) / 2 * opacity, golden["out.comp_normal"].view(-1, 3))
    background = golden["background"].view(-1, 3)
    close(foreground + background * (1 - opacity), golden["out.comp_rgb"].view(-1, 3))


def by_loop(field: Field, cameras: Cameras, size: int, samples: int, offsets: list[float]) -> dict[str, Tensor]:
    """One ray after another, one sample after another, in float64."""
    origins, directions = (each.reshape(-1, 3).double() for each in camera_rays(cameras, size, size))
    pictures = {name: [] for name in ("rgb", "foreground", "opacity", "depth", "z_variance", "normal")}
    for o, d, offset in zip(origins, directions, offsets):
        sides = [sorted(((-field.radius - o[i]) / d[i], (field.radius - o[i]) / d[i])) for i in range(3)]
        near, far = max(0.0, *(side[0] for side in sides)), min(side[1] for side in sides)
        light, seen = 1.0, []
        if near < far:
            step = (far - near) / samples
            for k in range(samples):
                t = near + (k + offset) * step
                x = (o + t * d).float()[None]
                density, rgb = field(x)
                alpha = 1 - math.exp(-density.item() * step)
                seen.append((light * alpha, t, rgb[0].double(), field.normals(x)[0].double()))
                light *= 1 - alpha
        nothing, opacity = torch.zeros(3, dtype=torch.float64), sum(w for w, *_ in seen)
        foreground = sum((w * rgb for w, _, rgb, _ in seen), nothing)
        mean = sum(w * t for w, t, _, _ in seen) / max(opacity, 1e-5)
        variance = sum(w * (t - mean) ** 2 for w, t, _, _ in seen) / max(opacity, 1e-5)
        pictures["foreground"].append(foreground)
        pictures["opacity"].append([opacity])
        pictures["depth"].append([mean * max(opacity, 1e-5)])
        pictures["z_variance"].append([variance if opacity > 0.5 else 0.0])
        pictures["normal"].append(F.normalize(sum((w * n for w, _, _, n in seen), nothing), dim=0))
        pictures["rgb"].append(foreground + (1 - opacity) * sky(d))
    return {
        name: torch.stack([torch.as_tensor(value).double() for value in values]).view(len(cameras), size, size, -1)
        for name, values in pictures.items()
    }


@pytest.mark.parametrize("jittered", [False, True])
@torch.no_grad()
def test_pictures_are_those_of_a_loop_over_samples(jittered: bool):
    """Two cameras, some rays of which pass the box by."""
    field, cameras, size, samples = Swirl(2.0), orbit_cameras(2, azimuth_start_deg=20), 6, 5
    cameras = Cameras.around(cameras.azimuth_deg, cameras.elevation_deg, cameras.distance, torch.tensor([40.0, 75.0]))
    offsets = torch.rand(72, generator=seeded(3)).tolist() if jittered else [0.5] * 72
    want = by_loop(field, cameras, size, samples, offsets)
    jitter = seeded(3) if jittered else None
    got = render(field, sky, cameras, size, samples=samples, jitter=jitter, with_normals=True, occupancy=None)
    assert 0.1 < (want["opacity"] == 0).double().mean() < 0.7
    assert (want["z_variance"] > 0).any()
    for name, picture in want.items():
        torch.testing.assert_close(getattr(got, name).permute(0, 2, 3, 1).double(), picture, rtol=0, atol=2e-5)


@pytest.mark.parametrize("jitter", [None, 0])
def test_opacity_of_a_constant_fog_is_closed_form_for_any_number_of_samples(jitter: int | None):
    """1 - exp(-sigma L) with L the way through the box, and its derivative in sigma, L exp(-sigma L)."""
    field, cameras = Fog(0.7, radius=0.6), orbit_cameras(3, fovy_deg=30, azimuth_start_deg=10)
    origins, directions = (each.reshape(-1, 3) for each in camera_rays(cameras, 8, 8))
    near, far = slab(origins, directions, torch.full((3,), -0.6), torch.full((3,), 0.6))
    length = (far - near).clamp(min=0)
    for samples in (1, 7):
        generator = None if jitter is None else seeded(jitter)
        picture = render(field, sky, cameras, 8, samples=samples, **{**plain, "jitter": generator})
        torch.testing.assert_close(picture.opacity.flatten(), 1 - torch.exp(-0.7 * length), rtol=0, atol=2e-6)
        (slope,) = torch.autograd.grad(picture.opacity.sum(), field.sigma)
        assert slope.item() == pytest.approx((length * torch.exp(-0.7 * length)).sum().item(), rel=1e-4)


def test_slab_by_hand():
    origins = torch.tensor([[3.0, 0, 0], [3, 0, 0], [0, 0, 0.5], [3, 0, 2], [0, 1, 0.0]])
    directions = torch.tensor([[-1.0, 0, 0], [1, 0, 0], [0, 0, 1], [-1, 0, 0], [1, 0, 0]])
    low, high = torch.tensor([-1.0, -1, -1]), torch.tensor([1.0, 1, 1])
    near, far = slab(origins, directions, low, high)
    # Through the middle, away from the box, from inside, above it, and within one of its faces.
    assert (near < far).tolist() == [True, False, True, False, False]
    assert near[[0, 2]].tolist() == [2, 0] and far[[0, 2]].tolist() == [4, 0.5]


def test_a_solid_ball_has_the_depth_and_the_normals_of_the_sphere():
    """Camera 3 away: distance sqrt(9 - h^2) - sqrt(r^2 - h^2) for a ray that passes the centre at h."""
    field, cameras = Fog(1e4, ball=0.5), orbit_cameras(2, elevation_deg=30, fovy_deg=30)
    picture = render(field, sky, cameras, 16, samples=400, jitter=None, with_normals=True, occupancy=None)
    _, directions = camera_rays(cameras, 16, 16)
    cosine = -(directions * cameras.c2w[:, None, None, :3, 2]).sum(-1)
    h2 = 9 * (1 - cosine**2)
    hit, miss = h2 < 0.45**2, h2 > 0.51**2
    distance = 3 * cosine - (0.25 - h2).clamp(min=0).sqrt()
    assert (picture.opacity[:, 0][hit] > 1 - 1e-6).all() and not picture.opacity[:, 0][miss].any()
    step = 2 * 3**0.5 / 400
    torch.testing.assert_close(picture.depth[:, 0][hit], distance[hit], rtol=0, atol=step)
    surface = cameras.c2w[:, None, None, :3, 3] + distance[..., None] * directions
    torch.testing.assert_close(picture.normal.permute(0, 2, 3, 1)[hit], (surface / 0.5)[hit], rtol=0, atol=5 * step)
    assert not picture.normal.permute(0, 2, 3, 1)[miss].any()
    assert (picture.z_variance[:, 0][hit] < step**2).all()
    rgb, background = picture.rgb.permute(0, 2, 3, 1), sky(directions)
    torch.testing.assert_close(rgb[miss], background[miss])


def test_pictures_are_upright_and_not_mirrored():
    """From +x one looks towards -x, with +y on the right and +z above."""
    cameras = orbit_cameras(1, elevation_deg=0)
    for centre, rows, columns in (
        ((0.0, 0.5, 0.0), slice(6, 10), slice(8, 16)),
        ((0.0, 0.0, 0.5), slice(0, 8), slice(6, 10)),
    ):
        opacity = render(Fog(100.0, ball=0.2, centre=centre), sky, cameras, 16, samples=64, **plain).opacity[0, 0]
        assert opacity.sum() > 3
        assert opacity[rows, columns].sum() == opacity.sum()


def test_normals_and_the_samples_behind_them_come_when_asked_for():
    field, cameras = Swirl(2.0), orbit_cameras(1)
    without = render(field, sky, cameras, 6, samples=5, **plain)
    assert without.normal is None and without.samples is None
    picture = render(field, sky, cameras, 6, samples=5, **{**plain, "with_normals": True})
    weights, normals, directions = picture.samples
    assert torch.equal(picture.rgb, without.rgb)
    torch.testing.assert_close(weights.sum(), picture.opacity.sum())
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(len(weights)))
    assert weights.requires_grad and normals.shape == directions.shape


@pytest.mark.parametrize("with_normals", [False, True])
def test_a_camera_that_sees_nothing_gets_the_background(with_normals: bool):
    cameras = orbit_cameras(1, elevation_deg=0)
    away = Cameras(cameras.c2w * torch.tensor([-1.0, 1, -1, 1]), *list(vars(cameras).values())[1:])
    field = Fog(5.0)
    level = torch.tensor(0.3, requires_grad=True)
    picture = render(
        field, lambda directions: level.expand_as(directions), away, 4, samples=8,
        jitter=seeded(0), with_normals=with_normals, occupancy=None,
    )  # fmt: skip
    assert field.points == [0]
    assert torch.equal(picture.rgb, torch.full((1, 3, 4, 4), 0.3)) and not picture.opacity.any()
    assert all(part.isfinite().all() for part in picture[:5])
    picture.rgb.sum().backward()
    assert level.grad.item() == 48 and field.sigma.grad.item() == 0


def test_jitter_is_the_generators_alone():
    field, cameras = Swirl(2.0), orbit_cameras(2)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    draw = {seed: render(field, sky, cameras, 8, samples=4, **{**plain, "jitter": seeded(seed)}) for seed in (1, 2)}
    again = render(field, sky, cameras, 8, samples=4, **{**plain, "jitter": seeded(1)})
    assert torch.equal(draw[1].rgb, again.rgb) and torch.equal(draw[1].depth, again.depth)
    assert not torch.equal(draw[1].rgb, draw[2].rgb)
    assert torch.equal(state, torch.get_rng_state())


def test_views_are_the_same_pictures_in_chunks_without_gradient(monkeypatch):
    field, cameras = Swirl(2.0), orbit_cameras(3)
    want = render(field, sky, cameras, 6, samples=5, **{**plain, "with_normals": True})
    field.points.clear()
    monkeypatch.setattr(rendering, "CHUNK", 40)  # 8 rays
    got = render_views(field, sky, cameras, 6, samples=5, with_normals=True)
    assert max(field.points) <= 40 and len(field.points) == 3 * 5
    for part, whole in zip(got[:6], want[:6]):
        assert not part.requires_grad
        torch.testing.assert_close(part, whole, rtol=0, atol=1e-6)
    assert got.samples is None
    assert isinstance(render_views(field, sky, cameras, 6, samples=5), Rendering)


def test_a_field_scene_is_its_field_before_its_background():
    occupancy = Occupancy(0.8, resolution=8)
    field = Fog(60.0, ball=0.3, radius=0.8)
    occupancy.update(field, seeded(0))
    scene = FieldScene(field, sky, occupancy)
    assert isinstance(scene, Scene) and scene.radius == 0.8
    want = render_views(field, sky, orbit_cameras(2), 6, samples=5, occupancy=occupancy, with_normals=True)
    got = scene.render(orbit_cameras(2), 6, samples=5, with_normals=True)
    assert all(torch.equal(part, whole) for part, whole in zip(got[:7], want[:7]))
    assert scene.render(orbit_cameras(2), 6, samples=5).normal is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pictures_on_cuda_are_those_of_the_cpu():
    """The dense march to rounding; nerfacc's, if its compiled extension is there, to its step."""
    field, cameras = Fog(6.0, ball=0.5), orbit_cameras(2, fovy_deg=30)
    occupancy = Occupancy(1.0)
    occupancy.update(field, seeded(0))
    want = render(field, sky, cameras, 16, samples=400, **{**plain, "occupancy": occupancy})
    field, on_cuda = field.to(CUDA), Occupancy(1.0, CUDA)
    on_cuda.update(field, seeded(0))
    assert (on_cuda.cells.cpu() == occupancy.cells).float().mean() > 0.999
    dense = render(field, sky, cameras.to(CUDA), 16, samples=400, **plain)
    got = render(field, sky, cameras.to(CUDA), 16, samples=400, **{**plain, "occupancy": on_cuda})
    for each in (dense, got):
        assert (each.rgb.cpu() - want.rgb).abs().mean() < 3e-3
        slopes = [torch.autograd.grad(r.rgb.sum(), field.sigma, retain_graph=True)[0].item() for r in (each, dense)]
        assert slopes[0] == pytest.approx(slopes[1], rel=0.05)


def test_a_march_knows_its_ray_and_place():
    """The third ray misses the box; the samples of the others are in order, a step apart."""
    origins = torch.tensor([[3.0, 0, 0], [0, 3.0, 0.5], [3.0, 0, 2.0]])
    directions = torch.tensor([[-1.0, 0, 0], [0, -1.0, 0], [-1.0, 0, 0]])
    march = march_dense(origins, directions, 1.0, 4, torch.tensor([0.5, 0.25, 0.5]), None)
    assert march.ray.tolist() == [0] * 4 + [1] * 4
    assert march.t.tolist() == [2.25, 2.75, 3.25, 3.75, 2.125, 2.625, 3.125, 3.625]
    assert march.place.tolist() == list(range(8))
    torch.testing.assert_close(march.ends - march.starts, torch.full((2, 4), 0.5))
    torch.testing.assert_close((march.ends + march.starts).flatten() / 2, march.t)
