"""Image preprocessing of the reward models on tensors: differentiable, where the published one goes through PIL.

Measured against the published preprocessing in tests/test_rewards.py: PIL rounds to 8 bits after each of its two
passes, so `shorter_side` differs from it by at most about one grey level; `longest_side` is exact.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from psd.models.hub import Source

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def bicubic(images: Float[Tensor, "B 3 H W"], height: int, width: int) -> Float[Tensor, "B 3 h w"]:
    """Antialiased bicubic resize; not clamped. The identity for images of this size already."""
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bicubic", antialias=True)


def shorter_side(
    images: Float[Tensor, "B 3 H W"], size: int, offset: Callable[[float], int] = math.floor
) -> Float[Tensor, "B 3 s s"]:
    """Shorter side to `size` px, centre crop, clamped to [0, 1] as PIL's bytes are.

    `offset` rounds the crop's corner: transformers floors, torchvision (ImageReward) rounds half to even.
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    height, width = size * height // short, size * width // short
    top, left = offset((height - size) / 2), offset((width - size) / 2)
    wide = bicubic(images, images.shape[-2], width).clamp(0, 1)  # PIL's bytes clip after each of its passes
    return bicubic(wide, height, width).clamp(0, 1)[..., top : top + size, left : left + size]


def longest_side(images: Float[Tensor, "B 3 H W"], size: int) -> Float[Tensor, "B 3 s s"]:
    """Longest side to `size` px, zero padding around (HPSv2's own); not clamped."""
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    resized = bicubic(images, round(height * scale), round(width * scale))
    down, right = size - resized.shape[-2], size - resized.shape[-1]
    return F.pad(resized, (right // 2, right - right // 2, down // 2, down - down // 2))


def normalise(
    images: Float[Tensor, "B 3 H W"], mean: Float[Tensor, "3 1 1"], std: Float[Tensor, "3 1 1"]
) -> Float[Tensor, "B 3 H W"]:
    return (images.float() - mean) / std


def load_mean_std(source: Source, device: str) -> tuple[Float[Tensor, "3 1 1"], Float[Tensor, "3 1 1"]]:
    """image_mean and image_std of a folder's preprocessor_config.json; CLIP's where there is no such file."""
    settings = {}
    if source.is_folder and source.file("preprocessor_config.json").exists():
        settings = json.loads(source.file("preprocessor_config.json").read_text(encoding="utf-8"))
    return tuple(
        torch.tensor(settings.get(key, default), device=device, dtype=torch.float32).view(3, 1, 1)
        for key, default in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD))
    )
