"""Losses of a rendering: pure functions, unweighted. The regularisers are threestudio's, but for `solid_loss`.

Weights and their schedules are the caller's.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

SEEN = 0.1  # contrast with the background; all but bright halos stay below it


def orientation_loss(
    weights: Float[Tensor, "*samples"],
    normals: Float[Tensor, "*samples 3"],
    directions: Float[Tensor, "*samples 3"],
    opacity: Float[Tensor, "*rays"],
) -> Float[Tensor, ""]:
    """Surfaces that face away from the ray which sees them: sum sg(w) max(n.d, 0)^2 / #(opacity > 0).

    sg: no gradient reaches the weights, so that a surface is turned and not made transparent. The sum is over samples,
    the count over rays. 0 where no ray meets anything. Source: Ref-NeRF, DreamFusion.
    """
    away = (normals * directions).sum(-1).clamp(min=0)
    return (weights.detach() * away**2).sum() / (opacity > 0).sum().clamp(min=1)


def opacity_loss(opacity: Float[Tensor, "*rays"]) -> Float[Tensor, ""]:
    """Sparsity: mean sqrt(opacity^2 + 0.01). Least, 0.1, where the picture is empty; smooth at 0."""
    return (opacity**2 + 0.01).sqrt().mean()


def solid_loss(contrast: Float[Tensor, "*rays"], opacity: Float[Tensor, "*rays"]) -> Float[Tensor, ""]:
    """What is seen is solid: mean of (1 - opacity)^2 where the contrast with the background is above SEEN, else of 0.

    One background colour does not tell something white from something dark and transparent, and the sparsity of
    `opacity_loss` decides for the latter, which is no mesh. Our own.
    """
    return ((1 - opacity).square() * (contrast > SEEN)).mean()


def z_variance_loss(z_variance: Float[Tensor, "*rays"], opacity: Float[Tensor, "*rays"]) -> Float[Tensor, ""]:
    """Thick, foggy surfaces: mean variance of the depth along a ray, over the rays of opacity > 0.5.

    0 where there are none (threestudio's mean is NaN there). Source: HiFA.
    """
    solid = opacity > 0.5
    return torch.where(solid, z_variance, 0.0).sum() / solid.sum().clamp(min=1)


def image_loss(images: Float[Tensor, "B 3 H W"], target: Float[Tensor, "B 3 H W"]) -> Float[Tensor, ""]:
    """Half the squared distance, summed over pixels and channels, mean over the images. Source: HiFA (lambda_rgb)."""
    return 0.5 * (images - target).square().sum((1, 2, 3)).mean()
