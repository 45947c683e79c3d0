"""The regularisers by hand and against threestudio's own training steps (tests/golden/nerf)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from psd.scene.losses import image_loss, opacity_loss, orientation_loss, solid_loss, z_variance_loss
from psd.scene.render import accumulate
from tests.test_render import padded_march

GOLDEN = Path(__file__).parent / "golden/nerf/renderer_and_regularisers"


@pytest.mark.parametrize("system", ["dreamfusion", "mvdream_threestudio", "threestudio_mvdream"])
def test_losses_and_their_gradient_are_threestudios(system: str):
    golden, facts = load_file(GOLDEN.with_suffix(".safetensors")), json.loads(GOLDEN.with_suffix(".json").read_text())
    want, factors = facts["losses"][system], facts["weights"]
    density, rays = golden["density"][:, 0].requires_grad_(), golden["rays_d"].numel() // 3
    march = padded_march(golden["ray_indices"], golden["t_starts"], golden["t_ends"], rays)
    normals, directions = golden["normal"], golden["rays_d"].view(-1, 3)[march.ray]

    columns, weights = accumulate(march, rays, density, golden["features"].sigmoid(), normals)
    opacity, z_variance = columns[:, 3], columns[:, 5]
    losses = {
        "orient": orientation_loss(weights, normals, directions, opacity),
        "sparsity": opacity_loss(opacity),
        "z_variance": z_variance_loss(z_variance, opacity),
    }
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(want[f"loss_{name}"], rel=1e-5), name

    # The recorded gradient is of all four regularisers; the fourth is one we do not use.
    clamped = opacity.clamp(1e-3, 1 - 1e-3)
    losses["opaque"] = torch.nn.functional.binary_cross_entropy(clamped, clamped)
    total = sum(factors[f"lambda_{name}"] * loss for name, loss in losses.items())
    assert total.item() == pytest.approx(want["total"], rel=1e-5)
    (got,) = torch.autograd.grad(total, density)
    gradient = golden[f"regularisers.{system}.dtotal_ddensity"][:, 0]
    torch.testing.assert_close(got, gradient, rtol=0, atol=1e-5 * gradient.abs().max().item())


def test_orientation_loss_by_hand():
    """Two samples face away by cosines 0.5 and 1, one faces the ray; three rays, one of them empty."""
    directions = torch.tensor([[0.0, 0.0, 1.0]]).repeat(3, 1)
    normals = torch.tensor([[0.0, 0.75**0.5, 0.5], [0.0, 0.0, -1.0], [0.0, 0.0, 1.0]])
    weights, opacity = torch.tensor([0.8, 0.9, 0.1]), torch.tensor([0.8, 1.0, 0.0])
    loss = orientation_loss(weights, normals, directions, opacity)
    assert loss.item() == pytest.approx((0.8 * 0.25 + 0.1) / 2)
    dense = (weights.view(1, 3), normals.view(1, 3, 3), directions.view(1, 3, 3))
    assert orientation_loss(*dense, opacity.view(1, 1, 1, 3)).item() == pytest.approx(loss.item())


def test_orientation_loss_turns_normals_and_leaves_the_weights_alone():
    directions = torch.tensor([[1.0, 0.0, 0.0]])
    normals, weights = torch.tensor([[0.6, 0.8, 0.0]], requires_grad=True), torch.tensor([0.5], requires_grad=True)
    orientation_loss(weights, normals, directions, weights).backward()
    torch.testing.assert_close(normals.grad, torch.tensor([[2 * 0.5 * 0.6, 0.0, 0.0]]))
    assert weights.grad is None


def test_opacity_loss_by_hand():
    opacity = torch.tensor([[0.0, 1.0]], requires_grad=True)
    loss = opacity_loss(opacity)
    loss.backward()
    assert loss.item() == pytest.approx((0.1 + 1.01**0.5) / 2)
    torch.testing.assert_close(opacity.grad, torch.tensor([[0.0, 0.5 / 1.01**0.5]]))  # none at 0, and no NaN


def test_solid_loss_by_hand():
    """Of four rays two are seen, one of them solid already."""
    contrast, opacity = torch.tensor([0.2, 0.3, 0.05, 0.0]), torch.tensor([0.4, 1.0, 0.3, 0.0], requires_grad=True)
    loss = solid_loss(contrast, opacity)
    loss.backward()
    assert loss.item() == pytest.approx(0.6**2 / 4)
    torch.testing.assert_close(opacity.grad, torch.tensor([-2 * 0.6 / 4, 0.0, 0.0, 0.0]))


def test_z_variance_loss_by_hand():
    z_variance, opacity = torch.tensor([0.2, 0.4, 9.0, 9.0], requires_grad=True), torch.tensor([0.6, 1.0, 0.5, 0.0])
    loss = z_variance_loss(z_variance, opacity)
    loss.backward()
    assert loss.item() == pytest.approx(0.3)
    assert z_variance.grad.tolist() == [0.5, 0.5, 0, 0]


def test_losses_of_an_empty_picture_are_finite():
    nothing, empty = torch.zeros(0, requires_grad=True), torch.zeros(2, 1, 4, 4, requires_grad=True)
    total = orientation_loss(nothing, torch.zeros(0, 3), torch.zeros(0, 3), empty) + z_variance_loss(empty, empty)
    assert total.item() == 0
    assert opacity_loss(empty).item() == pytest.approx(0.1)
    (total + opacity_loss(empty)).backward()
    assert empty.grad.isfinite().all()


def test_image_loss_by_hand():
    """Two images of two pixels: half of (4 + 1) and of 0, their mean."""
    images = torch.zeros(2, 3, 1, 2)
    target = images.clone()
    target[0, 0, 0, 0], target[0, 2, 0, 1] = 2.0, -1.0
    assert image_loss(images, target).item() == 1.25
