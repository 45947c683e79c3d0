"""Plain sampling by a multi-view prior: four views by DDIM, no object. What the prior itself would draw.

In image mode the plain arm is DDIM already (psd.presets.IMAGE_ARMS).
"""

from __future__ import annotations

from collections.abc import Generator

import torch

from psd import guidance
from psd.contracts import Answer, Ask, Guided, Now, Setup
from psd.methods import SAMPLED_LEVELS
from psd.methods.sds import SDS
from psd.scene.cameras import camera_embedding, orbit_cameras
from psd.schedule import descending_timesteps


class Sampling(SDS):
    """DDIM from pure noise, its levels spread over the run's steps, from cameras that stay: x_c and k are its own."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        config, prior = self.config, setup.prior
        count, total = min(SAMPLED_LEVELS, config.steps), len(self.schedule.alphas_cumprod)
        self.levels = descending_timesteps(count, config.t_max, config.t_min, total).tolist()
        self.done = 0
        self.poses = camera_embedding(orbit_cameras(self.views, **prior.frame.portrait).c2w).to(prior.device)
        generator = torch.Generator().manual_seed(config.seed)
        self.k = torch.randn((self.views, *prior.latent_shape), generator=generator).to(prior.device)
        self.x_c = torch.zeros_like(self.k)

    def step(self, now: Now) -> Generator[Ask, Answer, Guided]:
        if self.done < len(self.levels) * (now.step + 1) // self.config.steps:
            t, first = self.levels[self.done], self.done == 0
            alpha_t, sigma_t = self.schedule.alpha_t(t), self.schedule.sigma_t(t)
            x_t = self.k if first else alpha_t * self.x_c + sigma_t * self.k
            eps_y, eps_n = yield Ask(x_t[None], (self.y, self.n), t, self.poses)
            self.k = guidance.cfg(eps_y[0], eps_n[0], self.config.gamma)
            self.x_c = guidance.x0_hat(x_t, self.k, alpha_t, sigma_t)
            self.done += 1
        return Guided(torch.zeros_like(self.x_c), self.k, {})
