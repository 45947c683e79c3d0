"""What the method asks of a prior, a decoder and a reward. What answers to these serves: psd.models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor


@runtime_checkable
class Prior(Protocol):
    """A latent diffusion model: x are latents, images are RGB in [0, 1]. Weights are frozen.

    A multi-view prior takes `cameras`, one row a view (psd.scene.cameras.camera_embedding), rows ordered (group, view).
    """

    latent_shape: tuple[int, int, int]
    alphas_cumprod: Float[Tensor, " T"]
    device: torch.device

    def embed(self, prompts: list[str]) -> Float[Tensor, "P L D"]: ...

    def encode(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]: ...

    def decode(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]: ...

    def eps(
        self,
        x_t: Float[Tensor, "B C h w"],
        t: int | Int[Tensor, ""],
        cond: Float[Tensor, "B L D"],
        cameras: Float[Tensor, "B 16"] | None = None,
    ) -> Float[Tensor, "B C h w"]: ...


Decode = Callable[[Float[Tensor, "B C h w"]], Float[Tensor, "B 3 H W"]]  # a prior's own, or a quicker one


@runtime_checkable
class Reward(Protocol):
    """Higher is better, raw scale, float32. What has a body here is inherited: most rewards say `__call__` alone.

    S = B / views pictures of one object, or S = B single ones, are judged together; rows are ordered (sample, view).
    """

    name: str
    views: int = 1
    differentiable: bool = True  # in the images

    def __call__(self, images: Float[Tensor, "B 3 H W"], prompts: list[str]) -> Float[Tensor, " S"]: ...

    def rank(self, images: Float[Tensor, "B 3 H W"], prompts: list[str], copies: int) -> Float[Tensor, " S"]:
        """As `__call__`, of `copies` of the same samples, rows ordered (copy, sample); a mixture learns from them."""
        return self(images, prompts)

    def bound(self) -> Reward:
        """A reward for one arm of a run: what it learns there is seen by nobody else."""
        return self
