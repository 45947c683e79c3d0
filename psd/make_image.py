"""Image mode as `psd.run` drives it: from RunConfig to the states of psd.image, pictures of them, and files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from psd.config import RunConfig
from psd.contracts import Decode, Prior, Reward
from psd.export import export_png, to_uint8
from psd.image import ImageStep, distil_image, scorer


class MakeImage:
    """One image run. The state to export is the last one that `trouble` let pass.

    `decode` makes the pictures that are ranked and previewed; those that are kept are the prior's own.
    """

    preview_every_s = 0.5

    def __init__(
        self, config: RunConfig, arms: dict[str, RunConfig], prior: Prior, reward: Reward, decode: Decode
    ) -> None:
        self.config, self.arms, self.prior, self.reward, self.decode = config, arms, prior, reward, decode

    def steps(self) -> Iterator[ImageStep]:
        config, prior = self.config, self.prior
        score = scorer(self.decode, self.reward, [config.prompt])
        y, n_0 = prior.embed([config.prompt]), prior.embed([config.negative_prompt])
        generator = torch.Generator().manual_seed(config.seed)
        return distil_image(prior, score, y, n_0, self.arms, [generator], self._latent_shape())

    def trouble(self, state: ImageStep) -> str:
        """What went wrong in this step, one sentence; empty while all is well."""
        if all(torch.isfinite(x_c).all() for x_c in state.x_c.values()):
            return ""
        return f"Stopped at step {state.step}: numbers overflowed; lower gamma, pref_weight or lr."

    @torch.no_grad()
    def views(self, state: ImageStep) -> Float[Tensor, "A 1 3 H W"]:
        """Every arm's picture, to be looked at and measured on the way."""
        return self._pictures(state, self.decode)[:, None]

    def preview(self, state: ImageStep, views: Float[Tensor, "A 1 3 H W"]) -> np.ndarray:
        """The arms side by side."""
        return to_uint8(torch.cat(list(views[:, 0]), dim=-1))

    @torch.no_grad()
    def export(
        self, state: ImageStep, directory: Path, settings: dict[str, Any], rewards: dict[str, Reward]
    ) -> tuple[dict[str, Path], dict[str, dict[str, float]], dict[str, Path], dict[str, Any]]:
        """Score the pictures and write them: (arm -> picture, arm -> scores, name -> file, remarks for run.json)."""
        images, scores = {}, {}
        for name, image in zip(state.x_c, self._pictures(state, self.prior.decode), strict=True):
            image = (image * 255).round() / 255  # score what the file will hold
            scores[name] = {r: reward(image[None], [self.config.prompt]).item() for r, reward in rewards.items()}
            images[name] = directory / f"{name}.png"
            export_png(images[name], to_uint8(image), {**settings, "arm": name, "scores": scores[name]})
        return images, scores, {path.name: path for path in images.values()}, {}

    def _pictures(self, state: ImageStep, decode: Decode) -> Float[Tensor, "A 3 H W"]:
        return decode(torch.cat(list(state.x_c.values()))).float()

    def _latent_shape(self) -> tuple[int, int, int]:
        if not self.config.image_size:
            return self.prior.latent_shape
        channels, side, _ = self.prior.latent_shape
        side = self.config.image_size * side // self.prior.image_size
        return (channels, side, side)
