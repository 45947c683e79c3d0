"""Image mode (Algorithm 2): latents x_c moved along descending timesteps; a batch holds independent runs."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from psd import guidance
from psd.config import PICTURES, RunConfig, seeds_of
from psd.contracts import Answer, Arm, Artefact, Ask, Drawn, Guided, Models, Observed, Setup
from psd.errors import RequestError
from psd.export import export_png, to_uint8
from psd.methods import METHODS
from psd.methods.negative import starting_negative
from psd.picture import check_image
from psd.schedule import NoiseSchedule, descending_timesteps, further_noise, shift_timestep
from psd.score import BoundScore

STAYS = -1  # in place of a noise's number: the one of the whole run


@dataclass
class Latents:
    """One arm's x_c, its DDIM-consistent noise k, and the optimiser: None is the DDIM update."""

    x_c: Float[Tensor, "B C h w"]
    k: Float[Tensor, "B C h w"]
    optimizer: torch.optim.Adam | None

    def moved(self, g: Float[Tensor, "B C h w"], alpha_t: Tensor, sigma_t: Tensor) -> Float[Tensor, "B C h w"]:
        """x_c after the gradient g; where g = eps~ - k the first is DDIM."""
        if self.optimizer is None:
            return self.x_c - sigma_t / alpha_t * g
        parameter = self.optimizer.param_groups[0]["params"][0]
        parameter.grad = g
        self.optimizer.step()
        return parameter.clone()  # a state that was handed out stays as it is


class ImageStage:
    """Every arm's latents. `prompts` and `seeds`, one each a sample, are the config's where they are not given: its
    seed and those that follow, as many as it wants images.

    One generator a sample, so that a batch draws what single runs would; t is drawn by the first.
    """

    preview_every_s = 0.5

    def __init__(
        self,
        config: RunConfig,
        arms: dict[str, RunConfig],
        models: Models,
        prompts: list[str] | None = None,
        seeds: list[int] | None = None,
    ) -> None:
        self.config, self.models, prior = config, models, models.prior
        self.prompts = prompts or [config.prompt] * config.images
        self.seeds = seeds or seeds_of(config.seed, config.images)
        self.generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        self.schedule, total = NoiseSchedule(prior.alphas_cumprod), len(prior.alphas_cumprod)
        self.timesteps = descending_timesteps(config.steps, config.t_max, config.t_min, total).tolist()
        self.steps = config.steps - 1
        self.y, self.n_0 = prior.embed(self.prompts), starting_negative(config, prior, len(self.prompts))
        self.latents: dict[str, Latents] = {}
        self.arms: dict[str, Arm] = {}
        for name, arm in arms.items():
            score = BoundScore(models.decode, models.reward, self.prompts)
            setup = Setup(arm, prior, self.y, self.n_0, score, self.schedule)
            self.arms[name] = Arm(name, arm, METHODS[arm.method].load()(setup), score)

    def start(self) -> Generator[Ask, Answer, int]:
        """x_c = x0_hat of pure noise at the largest t, k = eps~ there; the same for every arm of equal gamma.

        Where there is a picture to start from the noise is added to it (SDEdit, Meng et al. 2022).
        """
        t, x_t = self.timesteps[0], self._sample_noise()
        if self.config.start:
            x_t = self.schedule.alpha_t(t) * self._given(x_t) + self.schedule.sigma_t(t) * x_t
        eps_y, eps_n = yield Ask(x_t[None], (self.y, self.n_0), t)
        for name, arm in self.arms.items():
            k = guidance.cfg(eps_y[0], eps_n[0], arm.config.gamma)
            x_c = guidance.x0_hat(x_t, k, self.schedule.alpha_t(t), self.schedule.sigma_t(t))
            if not torch.isfinite(x_c).all():
                raise RequestError(
                    f"The first prediction of {self.models.prior.name} is not a number: lower gamma, or restore its "
                    "weights."
                )
            adam = torch.optim.Adam([x_c.clone()], arm.config.lr) if arm.config.update == "adam" else None
            self.latents[name] = Latents(x_c, k, adam)
        return t

    def draw(self, step: int) -> Drawn:
        """Two fresh noises a sample; t with the random time shift of Algorithm 2."""
        noise = torch.stack([self._sample_noise(), self._sample_noise()])
        tau = torch.stack([torch.rand((), generator=each) for each in self.generators])[0].item()  # one t for all
        low, high = self.config.time_shift_low, self.config.time_shift_high
        t = shift_timestep(self.timesteps[step + 1], low + tau * (high - low), len(self.models.prior.alphas_cumprod))
        return Drawn(step, step / self.steps, t, noise)

    def noises(self, drawn: Drawn, arm: str, count: int) -> Float[Tensor, "N B C h w"]:
        """The first is the last CFG prediction, fresh, or one for the whole run; the second is fresh, as all others."""
        config = self.arms[arm].config
        first = self.latents[arm].k if config.pair == "ddim" else drawn.noise[0]
        shape = tuple(first.shape[1:])
        if config.noise == "consistent":
            first = torch.stack([further_noise(seed, 0, STAYS, shape) for seed in self.seeds]).to(first.device)
        more = [
            torch.stack([further_noise(seed, drawn.step, index, shape) for seed in self.seeds]).to(first.device)
            for index in range(2, count)
        ]
        return torch.stack([first, drawn.noise[1], *more][:count])

    def observe(self, drawn: Drawn) -> Observed:
        return Observed({name: latents.x_c for name, latents in self.latents.items()})

    def apply(self, drawn: Drawn, observed: Observed, guided: dict[str, Guided]) -> str:
        """Move every arm, or none where one breaks down: the last good state stays."""
        alpha_t, sigma_t = self.schedule.alpha_t(drawn.t), self.schedule.sigma_t(drawn.t)
        moved = {name: self.latents[name].moved(each.g, alpha_t, sigma_t) for name, each in guided.items()}
        if not torch.stack([torch.isfinite(x_c).all() for x_c in moved.values()]).all():  # one wait for all
            return "numbers overflowed; lower gamma, pref_weight or lr."
        for name, x_c in moved.items():
            self.latents[name].x_c, self.latents[name].k = x_c, guided[name].eps_cfg
        return ""

    def report(self, arm: str) -> dict[str, float]:
        return {}

    @torch.no_grad()
    def views(self) -> dict[str, Float[Tensor, "B 3 H W"]]:
        """Every arm's pictures, to be measured on the way."""
        return {name: self.models.decode(latents.x_c).float() for name, latents in self.latents.items()}

    def preview(self, views: dict[str, Float[Tensor, "B 3 H W"]]) -> UInt8[np.ndarray, "height width 3"]:
        """The arms side by side, a row a seed."""
        return to_uint8(torch.cat([torch.cat(list(images), -2) for images in views.values()], -1))

    @torch.no_grad()
    def pictures(self, arm: str) -> Float[Tensor, "B 3 H W"]:
        """An arm's pictures as they are kept: decoded by the prior, in the levels that a file holds."""
        return (self.models.prior.decode(self.latents[arm].x_c).float() * 255).round() / 255

    def scored(self, arm: str) -> tuple[Float[Tensor, "B 3 H W"], list[str]]:
        return self.pictures(arm), self.prompts

    def artefacts(self, arm: str) -> Iterator[Artefact]:
        """Every sample's picture, with the settings that make it alone."""

        made = cache(lambda: to_uint8(self.pictures(arm)))

        def write(index: int, path: Path, about: dict[str, Any]) -> None:
            export_png(path, made()[index], about | {"seed": self.seeds[index], "images": 1})

        for index, kind in enumerate(PICTURES[: len(self.seeds)]):
            yield Artefact(kind, partial(write, index))

    @torch.no_grad()
    def _given(self, like: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """Latents of the picture to start from, its middle square, one for every sample."""
        prior = self.models.prior
        pixels = torch.from_numpy(check_image(self.config.start)).permute(2, 0, 1)[None]
        side, size = min(pixels.shape[-2:]), like.shape[-1] * prior.image_size // prior.latent_shape[-1]
        top, left = ((whole - side) // 2 for whole in pixels.shape[-2:])
        square = pixels[..., top : top + side, left : left + side]
        square = F.interpolate(square, (size, size), mode="bilinear", antialias=True).clamp(0, 1)
        return prior.encode(square.to(like.device)).expand_as(like)

    def _sample_noise(self) -> Float[Tensor, "B C h w"]:
        prior, size = self.models.prior, self.config.image_size
        channels, side, _ = prior.latent_shape
        side = size * side // prior.image_size if size else side
        noise = [torch.randn((channels, side, side), generator=each) for each in self.generators]
        return torch.stack(noise).to(prior.device)
