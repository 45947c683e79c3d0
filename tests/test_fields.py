"""Fields against threestudio's numbers (tests/golden/nerf), autograd and interpolation by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from psd.scene.cameras import camera_rays, orbit_cameras
from psd.scene.fields import (
    ConstantBackground,
    DirectionalBackground,
    Field,
    HashField,
    Interpolation,
    ShadowedBackground,
    VoxelField,
    spherical_harmonics,
)
from psd.scene.hashgrid import corner_weights

GOLDEN = Path(__file__).parent / "golden" / "nerf"

volume = load_file(GOLDEN / "implicit_volume.safetensors")


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Uniform in [-1, 1]."""
    return 2 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) - 1


def voxel_field(resolution: int = 6, **settings) -> VoxelField:
    field = VoxelField(resolution, **settings)
    field.voxels.data = 3 * rand(1, 4, *(resolution,) * 3, seed=1)
    return field


def hash_field(**settings) -> HashField:
    """Small, with a table that matters."""
    torch.manual_seed(1)
    field = HashField(levels=4, log2_size=9, base_resolution=4, growth=1.5, hidden=16, **settings)
    field.encoding.table.data = rand(*field.encoding.table.shape, seed=1)
    return field


FIELDS = {"voxel": voxel_field, "dense": lambda: voxel_field(density_gain=3.0), "hash": hash_field}


def any_field(test):
    return pytest.mark.parametrize("field", [make() for make in FIELDS.values()], ids=FIELDS)(test)


# threestudio's implicit volume


class Waves(nn.Module):
    """The fixture's stand-in for a hash grid: sin and cos of 2^k u, k < 4, band by band."""

    def forward(self, u):
        return torch.cat([wave(2**k * u) for k in range(4) for wave in (torch.sin, torch.cos)], -1)

    def slope(self, u, v):
        parts = [part(2**k * u) * 2**k for k in range(4) for part in (torch.cos, lambda p: -torch.sin(p))]
        return (torch.stack(parts, 1) * v.view(len(u), 8, 3)).sum(1)


def golden_volume(**settings) -> HashField:
    field = HashField(levels=12, log2_size=4, hidden=16, **settings)
    field.encoding = Waves()
    for name in ("density", "feature"):
        weights = {f"{i}.weight": volume[f"weights.{name}_network.layers.{i}.weight"] for i in (0, 2)}
        getattr(field, f"{name}_network").load_state_dict(weights)
    return field


def test_hash_field_is_threestudios_implicit_volume():
    field, x = golden_volume(), volume["points"]
    density, rgb = field(x)
    torch.testing.assert_close(density, volume["magic3d_analytic.density"][:, 0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(rgb, volume["magic3d_analytic.features"].sigmoid(), rtol=1e-5, atol=0)
    torch.testing.assert_close(field.normals(x), volume["magic3d_analytic.normal"], rtol=0, atol=1e-4)
    nn.init.zeros_(field.density_network[2].weight)
    bias = volume["magic3d_analytic.activated_density_of_zero_network_output"][:, 0]
    torch.testing.assert_close(field.density(x), bias, rtol=1e-5, atol=1e-7)


def test_bias_and_normals_with_another_blob():
    """Of `exp_activation`: its density is exp instead of softplus, and normals do not ask which."""
    field, x = golden_volume(density_bias=(3.0, 0.7)), volume["points"]
    want = F.softplus(volume["exp_activation.density"].log())[:, 0]
    torch.testing.assert_close(field.density(x), want, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(field.normals(x), volume["exp_activation.normal"], rtol=0, atol=1e-4)


def test_default_hash_field_is_mvdreams_configuration():
    field = HashField()
    sizes = {name: tuple(parameter.shape) for name, parameter in field.named_parameters()}
    assert sizes == {
        "encoding.table": (12_599_920 // 2, 2),
        "density_network.0.weight": (64, 32), "density_network.2.weight": (1, 64),
        "feature_network.0.weight": (64, 32), "feature_network.2.weight": (3, 64),
    }  # fmt: skip
    assert field.radius == 1.0 and field.density_bias == (10.0, 0.5)
    encoding, networks = field.parameter_groups()
    assert (encoding["lr"], networks["lr"]) == (0.01, 0.001)
    assert [*encoding["params"], *networks["params"]] == list(field.parameters())


# Voxel grid


def trilinear(field: VoxelField, x: torch.Tensor) -> torch.Tensor:
    """[N, 4] by grid_sample."""
    grid = (x / field.radius).view(1, 1, 1, -1, 3)
    return F.grid_sample(field.voxels, grid, padding_mode="border", align_corners=True).view(4, -1).T


def test_voxel_field_is_trilinear_interpolation_under_its_activations():
    field = voxel_field(7, radius=0.8, density_bias=(4.0, 0.3))
    x = 0.8 * rand(500, 3)
    density, rgb = field(x)
    want = trilinear(field, x)
    torch.testing.assert_close(density, F.softplus(want[:, 0] + 4 * (1 - x.norm(dim=1) / 0.3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rgb, torch.sigmoid(want[:, 1:]), rtol=1e-5, atol=1e-6)
    cotangents = rand(500, seed=2), rand(500, 3, seed=3)
    wanted = F.softplus(want[:, 0] + 4 * (1 - x.norm(dim=1) / 0.3)), torch.sigmoid(want[:, 1:])
    (got,) = torch.autograd.grad((density, rgb), field.voxels, cotangents)
    (expected,) = torch.autograd.grad(wanted, field.voxels, cotangents)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_the_gain_is_densitys_alone():
    field, x = voxel_field(5, density_gain=4.0), rand(50, 3)
    want = trilinear(field, x)
    raw, rgb = field.raw_features(x)
    torch.testing.assert_close(raw, 4 * want[:, 0])
    torch.testing.assert_close(rgb, want[:, 1:])


def test_voxels_are_ordered_z_y_x_and_their_corners_are_the_boxs():
    field = VoxelField(3, radius=2.0, density_bias=(0.0, 1.0))
    field.voxels.data[0, 1, 2, 1, 0] = 4.0  # red at z = +2, y = 0, x = -2
    points = torch.tensor([[-2.0, 0, 2], [-1, 0, 2], [-1, 1, 1], [2, 0, -2]])
    red = torch.logit(field(points)[1][:, 0])
    torch.testing.assert_close(red, torch.tensor([4.0, 2.0, 0.5, 0.0]), atol=1e-6, rtol=1e-5)


def test_a_fresh_voxel_field_is_the_grey_ball_of_the_bias():
    field = VoxelField()
    x = torch.tensor([[0.0, 0, 0], [0, 0.5, 0], [0, 0, -1.0], [0.6, 0, 0.8]])
    density, rgb = field(x)
    want = torch.tensor([math.log1p(math.exp(10)), math.log(2), math.log1p(math.exp(-10)), math.log1p(math.exp(-10))])
    torch.testing.assert_close(density, want, rtol=1e-4, atol=0)
    assert torch.equal(rgb, torch.full((4, 3), 0.5))
    torch.testing.assert_close(field.normals(x[1:]), F.normalize(x[1:], dim=-1))


def test_voxels_refuse_points_that_ask_for_a_gradient():
    with pytest.raises(RuntimeError):
        voxel_field()(torch.zeros(2, 3, requires_grad=True))


def test_interpolation_gradient_is_its_finite_difference():
    table = rand(9, 2, dtype=torch.float64).requires_grad_()
    index = torch.randint(9, (5, 8), generator=torch.Generator().manual_seed(0))  # with repetitions
    weight = corner_weights(rand(3, 5, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda table: Interpolation.apply(table, index, weight), (table,))


def test_total_variation_of_a_ramp():
    field = VoxelField(5, radius=2.0)  # voxels 1 apart
    assert field.total_variation() == 0
    field.voxels.data[0, 0] += 3 * torch.arange(5)  # slope 3 along x in one of four channels
    assert field.total_variation().item() == pytest.approx(9 / 4)
    field = VoxelField(9, radius=2.0)  # 0.5 apart
    field.voxels.data[0, 0] += 1.5 * torch.arange(9)
    assert field.total_variation().item() == pytest.approx(9 / 4)


def test_total_variation_has_the_gradient_of_its_definition():
    field = voxel_field(6, radius=0.7)
    (got,) = torch.autograd.grad(3 * field.total_variation(), field.voxels)
    steps = [field.voxels.diff(dim=axis).square().mean() for axis in (2, 3, 4)]
    want = 3 * sum(steps) * (5 / 1.4) ** 2
    torch.testing.assert_close(3 * field.total_variation(), want)
    torch.testing.assert_close(got, torch.autograd.grad(want, field.voxels)[0])


@pytest.mark.parametrize(("resolution", "apart"), [(11, 1e-5), (24, 0.5)])
def test_a_refined_grid_is_the_same_field(resolution: int, apart: float):
    """To rounding where its points hold the old ones, 10 cells for 5; otherwise as near as linear pieces come."""
    field, x = voxel_field(6), rand(400, 3, seed=4)
    before, voxels = field(x), field.voxels
    field.refine(resolution)
    assert field.resolution == resolution and field.voxels.shape == (1, 4, *3 * (resolution,))
    assert field.voxels.requires_grad and field.voxels is not voxels
    for got, want in zip(field(x), before):
        torch.testing.assert_close(got, want, rtol=0, atol=apart)


def test_voxel_field_has_its_own_rate():
    field = VoxelField(4, learning_rate=0.07)
    assert [(len(group["params"]), group["lr"]) for group in field.parameter_groups()] == [(1, 0.07)]
    assert field.parameter_groups()[0]["params"][0] is field.voxels


# Both fields


@any_field
def test_density_is_zero_outside_of_the_box_only(field: Field):
    corner = torch.tensor([[1.0, 1.0, -1.0], [1.001, 0, 0], [0, -1.5, 0], [0, 0, 40.0], [0.999, 0, 0]])
    assert (field(corner)[0] > 0).tolist() == [True, False, False, False, True]


@any_field
def test_density_alone_is_the_density(field: Field):
    x = 1.2 * rand(400, 3, seed=5)
    density, rgb = field(x)
    torch.testing.assert_close(field.density(x), density, rtol=1e-5, atol=1e-6)
    assert density.min() == 0 and rgb.min() > 0 and rgb.max() < 1
    (got,) = torch.autograd.grad(field.density(x).sum(), next(field.parameters()))
    (want,) = torch.autograd.grad(field(x)[0].sum(), next(field.parameters()))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@any_field
def test_no_points_are_no_error(field: Field):
    x = torch.zeros(0, 3)
    density, rgb = field(x)
    (density.sum() + rgb.sum() + field.normals(x).sum() + field.density(x).sum()).backward()
    assert density.shape == (0,) and rgb.shape == (0, 3)


@any_field
def test_normals_are_minus_the_densitys_gradient(field: Field):
    x = (0.4 * rand(200, 3, seed=6)).requires_grad_()  # where softplus has not underflown
    (slope,) = torch.autograd.grad(field.density(x).sum(), x)
    normals = field.normals(x)
    torch.testing.assert_close(normals, -F.normalize(slope, dim=-1), rtol=0, atol=1e-4)
    torch.testing.assert_close(normals.norm(dim=-1), torch.ones(200))
    with torch.inference_mode():
        torch.testing.assert_close(field.normals(x), normals)


@pytest.mark.parametrize("make", FIELDS.values(), ids=FIELDS)
def test_normals_are_differentiable_in_the_parameters(make):
    """As the orientation loss needs: against central differences along a random direction of all parameters."""
    field = make().double()
    x, cotangent = 0.8 * rand(60, 3, seed=7, dtype=torch.float64), rand(60, 3, seed=8, dtype=torch.float64)
    parameters = [parameter for name, parameter in field.named_parameters() if "feature" not in name]
    gradients = torch.autograd.grad((field.normals(x) * cotangent).sum(), parameters)
    directions = [rand(*p.shape, seed=9 + i, dtype=torch.float64) for i, p in enumerate(parameters)]
    want = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions):
                parameter += sign * 1e-6 * direction
            want.append((field.normals(x) * cotangent).sum().item())
            for parameter, direction in zip(parameters, directions):
                parameter -= sign * 1e-6 * direction
    got = sum((gradient * direction).sum().item() for gradient, direction in zip(gradients, directions))
    assert got == pytest.approx((want[0] - want[1]) / 2e-6, rel=1e-5)
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@any_field
def test_a_field_survives_its_state_dict(field: Field):
    again = voxel_field(density_gain=field.density_gain) if isinstance(field, VoxelField) else hash_field()
    nn.init.zeros_(next(again.parameters()))
    again.load_state_dict(field.state_dict())
    x = rand(50, 3, seed=3)
    for got, want in zip(again(x), field(x)):
        assert torch.equal(got, want)


# Backgrounds


def test_spherical_harmonics_are_orthonormal():
    """Gauss-Legendre in z times an even ring integrates products of bands up to 2 exactly."""
    nodes, weights = map(torch.tensor, ((-(0.6**0.5), 0.0, 0.6**0.5), (5 / 9, 8 / 9, 5 / 9)))
    angle = torch.arange(6) * (2 * math.pi / 6)
    z, phi = torch.meshgrid(nodes, angle, indexing="ij")
    ring = (1 - z**2).sqrt()
    values = spherical_harmonics(torch.stack([ring * phi.cos(), ring * phi.sin(), z], -1))
    gram = torch.einsum("zpi,zpj,z->ij", values, values, weights) * (2 * math.pi / 6)
    torch.testing.assert_close(gram, torch.eye(9), atol=1e-6, rtol=0)


def test_spherical_harmonics_have_tiny_cuda_nns_order_and_signs():
    x, y, z = 0.48, -0.6, 0.64
    want = [
        0.28209479, -0.48860251 * y, 0.48860251 * z, -0.48860251 * x, 1.09254843 * x * y, -1.09254843 * y * z,
        0.94617470 * z * z - 0.31539157, -1.09254843 * x * z, 0.54627422 * (x * x - y * y),
    ]  # fmt: skip
    torch.testing.assert_close(spherical_harmonics(torch.tensor([x, y, z])), torch.tensor(want), atol=1e-6, rtol=0)


def test_a_shadow_lies_on_the_ground_and_nowhere_else():
    """Seen from (0, 0, 1): straight down to the middle, down beside the grid, level, and from below the ground."""
    colour = (0.8, 0.9, 1.0)
    shadowed = ShadowedBackground(colour, radius=1.0, learning_rate=0.3)
    shadowed.logits.data.fill_(0.0)  # half opaque all over
    towards = torch.tensor([[1e-3, 0.0, -1.0], [0.9, 0.0, -0.1], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
    origins = torch.tensor([[0.0, 0.0, 1.0]] * 3 + [[0.0, 0.0, -2.0]])
    rgb = shadowed(F.normalize(towards, dim=1), origins)
    torch.testing.assert_close(rgb, torch.tensor([[0.4, 0.45, 0.5]] + [list(colour)] * 3))
    heights = [group for group in shadowed.parameter_groups() if group["params"][0] is shadowed.height]
    assert heights[0]["lr"] == pytest.approx(0.006)


def test_a_shadow_finds_its_place_and_its_ground():
    """From pictures of another's, from all around; its ground is a tenth of the box further down."""
    origins, directions = (rays.reshape(-1, 3) for rays in camera_rays(orbit_cameras(8, distance=2.5), 24, 24))
    seen, own = (ShadowedBackground((0.9, 0.9, 0.9), 0.7, 0.3) for _ in range(2))
    middle = (torch.arange(20) - 9.5).square()
    seen.logits.data[0, 0] = 2 - 0.3 * (middle + middle[:, None])
    seen.height.data -= 0.1
    target, first = seen(directions, origins).detach(), own.height.item()
    optimizer = torch.optim.Adam(own.parameter_groups(), betas=(0.9, 0.99))
    losses = []
    for _ in range(100):
        loss = (own(directions, origins) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]
    assert own.height.item() == pytest.approx(first - 0.1, abs=0.03)


def test_backgrounds_are_colours_of_directions():
    directions = F.normalize(rand(2, 5, 4, 3), dim=-1)
    constant = ConstantBackground((0.86, 0.88, 0.9), learning_rate=0.02)
    want = torch.tensor([0.86, 0.88, 0.9]).expand(2, 5, 4, 3)
    torch.testing.assert_close(constant(directions), want)
    directional = DirectionalBackground()
    rgb = directional(directions)
    assert rgb.shape == directions.shape and rgb.min() > 0 and rgb.max() < 1
    assert rgb.flatten(0, 2).std(0).min() > 1e-4  # it looks where it looks
    assert [layer.out_features for layer in directional.network[::2]] == [16, 16, 3]
    for background, rate in ((constant, 0.02), (directional, 0.001)):
        background(directions).sum().backward()
        (group,) = background.parameter_groups()
        assert group["lr"] == rate and group["params"] == list(background.parameters())
        assert all(parameter.grad.abs().max() > 0 for parameter in group["params"])
