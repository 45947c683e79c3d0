"""A reward that stays on the CPU, where the images are on a GPU that has no room for it."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from psd.contracts import Reward


class OnCPU(Reward):
    """The same scores, a little slower; answered where the images are."""

    def __init__(self, reward: Reward) -> None:
        self.reward, self.name = reward, reward.name
        self.views, self.differentiable = reward.views, reward.differentiable

    def __call__(self, images: Float[Tensor, "B 3 H W"], prompts: list[str]) -> Float[Tensor, " S"]:
        return self.reward(images.cpu(), prompts).to(images.device)
