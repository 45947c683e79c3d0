"""Variational score distillation (Wang et al. 2023) and RewardVSD: a LoRA learns what the renders are like already."""

from __future__ import annotations

from collections.abc import Generator
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from psd import guidance
from psd.contracts import Answer, Ask, Guided, Now, Setup
from psd.methods.rewardsds import RewardSDS
from psd.methods.sds import SDS, noisy
from psd.models.priors.lora import LoRAPrior

CAMERA_DROPPED = 0.1  # of the LoRA's own steps


class Variational:
    """The LoRA of one arm, and its step: eps-hat of x_c noised anew, at any t, against that noise.

    With a multi-view prior it hears the cameras by the prior's own embedding; a prior of single images has none.
    """

    def __init__(self, setup: Setup) -> None:
        config, prior = setup.config, setup.prior
        self.seed, self.y, self.schedule = config.seed, setup.y, setup.schedule
        self.lora = LoRAPrior(prior, config.lora_rank, config.seed)
        self.optimizer = torch.optim.AdamW(
            self.lora.parameters, lr=config.lora_lr, betas=(0.9, 0.99), eps=1e-15, weight_decay=0.01
        )

    def eps(self, now: Now, x_t: Float[Tensor, "N B C h w"]) -> Float[Tensor, "N B C h w"]:
        """eps-hat of the LoRA under the prompt, at the step's t; no guidance."""
        noises, samples = x_t.shape[:2]
        cond = self.y.expand(samples, -1, -1).repeat(noises, 1, 1)
        poses = None if now.poses is None else now.poses.repeat(noises, 1)
        return self.lora.eps(x_t.flatten(0, 1), now.t, cond, poses).view_as(x_t)

    def train(self, now: Now, noise: Float[Tensor, "B C h w"]) -> None:
        """One step, down the mean squared error."""
        rng = np.random.default_rng([self.seed, now.step])
        t, heard = int(rng.integers(len(self.schedule.alphas_cumprod))), rng.random() >= CAMERA_DROPPED
        x_t = self.schedule.alpha_t(t) * now.x_c + self.schedule.sigma_t(t) * noise
        poses = None if now.poses is None else now.poses * heard
        with torch.enable_grad(), self.lora.heard():
            eps = self.lora.prior.eps(x_t, t, self.y.expand(len(x_t), -1, -1), poses)
            loss = (eps - noise).square().mean()
            gradients = torch.autograd.grad(loss, self.lora.parameters)
        for parameter, gradient in zip(self.lora.parameters, gradients):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()


class VSD(SDS):
    """g = w_t * (eps~(x_t) - eps_lora(x_t)); then the LoRA learns one step on x_c."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.variational = Variational(setup)

    def noises(self, step: int) -> int:
        return 2  # the second is for the LoRA

    def step(self, now: Now) -> Generator[Ask, Answer, Guided]:
        x_t = noisy(now)[:1]
        eps_y, eps_n = yield Ask(x_t, (self.y, self.n))
        eps_cfg = guidance.cfg(eps_y[0], eps_n[0], self.config.gamma)
        delta = eps_cfg - self.variational.eps(now, x_t)[0]
        w_t = guidance.w_t(now.alpha_t, now.sigma_t, self.config.weighting)
        learn = partial(self.variational.train, now, now.noise[1])
        return Guided(w_t * delta, eps_cfg, {"delta_vsd": guidance.norm(delta)}, learn)


class RewardVSD(RewardSDS):
    """RewardSDS whose candidates pull by eps~ - eps_lora."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.variational = Variational(setup)

    def noises(self, step: int) -> int:
        return super().noises(step) + 1  # the last is for the LoRA

    def step(self, now: Now) -> Generator[Ask, Answer, Guided]:
        guided = yield from super().step(now._replace(noise=now.noise[:-1]))
        return guided._replace(learn=partial(self.variational.train, now, now.noise[-1]))

    def residual(
        self,
        now: Now,
        x_t: Float[Tensor, "N B C h w"],
        eps_y: Float[Tensor, "N B C h w"],
        eps_cfg: Float[Tensor, "N B C h w"],
    ) -> Float[Tensor, "N B C h w"]:
        return eps_cfg - self.variational.eps(now, x_t)
