"""r(y, decode(x_0)): a reward as a method asks for it, bound to one arm of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from psd.contracts import Decode, Pair, Reward

if TYPE_CHECKING:
    from psd.scene.cameras import Cameras


class BoundScore:
    """Scores of every noise and sample, differentiable; a mixture learns its scales here, for this arm alone.

    A reward that judges several views together gives each of them their common score.

    rank          "group": every view of a noise has the mean over all of them
    view_prompts  the reward reads y as "y, front view" and so on, by the view's camera
    """

    def __init__(
        self, decode: Decode, reward: Reward, prompts: list[str], rank: str = "view", view_prompts: bool = False
    ) -> None:
        self.decode, self.reward, self.prompts = decode, reward.bound(), prompts
        self.rank, self.view_prompts = rank, view_prompts
        self.cameras: Cameras | None = None
        self.pair: Pair | None = None

    def __call__(self, x_0: Float[Tensor, "N B C h w"]) -> Float[Tensor, "N B"]:
        images, read = self.decode(x_0.flatten(0, 1)).float(), self.read(x_0.shape[1])
        if self.view_prompts and self.cameras is not None:
            from psd.scene.cameras import view_names  # a picture has no cameras and loads no scene

            read = [f"{prompt}, {name} view" for prompt, name in zip(read, view_names(self.cameras), strict=True)]
        scores = self.reward.rank(images, read * len(x_0), len(x_0)).view(len(x_0), -1)
        scores = scores.repeat_interleave(self.reward.views, 1)
        scores = scores.mean(1, keepdim=True).expand_as(scores) if self.rank == "group" else scores
        if len(x_0) > 1:
            self.pair = Pair(images.detach().unflatten(0, x_0.shape[:2]), scores.detach())
        return scores

    def read(self, samples: int) -> list[str]:
        """The prompt of each sample; one prompt serves all views of an object."""
        return self.prompts * samples if len(self.prompts) == 1 else self.prompts
