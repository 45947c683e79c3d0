"""RewardSDS (Chachy et al. 2025): several noises at one t, each followed to its picture and weighted by its reward."""

from __future__ import annotations

from collections.abc import Generator
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from psd import guidance
from psd.contracts import Answer, Ask, Guided, Now, Setup
from psd.methods.sds import SDS, noisy, pick

BEST, WORST = (2, 0.9), (2, 0.1)  # of min-max: how many, and the weight of their mean


def candidate_weights(rewards: Float[Tensor, "N B"], strategy: str) -> Float[Tensor, "N B"]:
    """What each noise's gradient counts.

    min-max  0.9 * mean over the best two - 0.1 * mean over the worst two
    best     the best alone
    softmax  softmax of the rewards, without a temperature

    A reward that is no number counts as the worst. Raises ValueError on another strategy.
    """
    rewards = torch.where(torch.isfinite(rewards), rewards, -1e30)
    if strategy == "softmax":
        return rewards.softmax(0)
    order, weights = rewards.argsort(dim=0, descending=True, stable=True), torch.zeros_like(rewards)
    if strategy == "best":
        return weights.scatter(0, order[:1], 1.0)
    if strategy != "min-max":
        raise ValueError(f"candidate_weights must be 'min-max', 'best' or 'softmax', not {strategy!r}")
    (best, share), (worst, against) = BEST, WORST
    add = lambda rows, value: weights.scatter_add_(0, rows, torch.full_like(weights, value)[: len(rows)])  # noqa: E731
    add(order[:best], share / len(order[:best]))
    return add(order[-worst:], -against / len(order[-worst:]))


def explored_timesteps(t: int, steps: int, total: int) -> list[int]:
    """t, and the levels below it of `steps` spread over the schedule; the last one, 0, is only arrived at."""
    grid = np.linspace(0, total - 1, steps).astype(int)[::-1].tolist()
    return [t, *(level for level in grid if level < t)] if t > 0 else [t]


class RewardSDS(SDS):
    """g = w_t * sum_i weight_i * (eps~_i - noise_i) over `candidates` noises; one noise in the last part of the run.

    Each x_t is taken to t = 0 by DDIM under the same guidance; what it arrives at is scored, per sample or group.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.score = setup.score

    def noises(self, step: int) -> int:
        return self.config.candidates if step < int(self.config.steps * self.config.reward_share) else 1

    def step(self, now: Now) -> Generator[Ask, Answer, Guided]:
        config, x_t = self.config, noisy(now)
        eps_y, eps_n = yield Ask(x_t, (self.y, self.n))
        eps_cfg, terms = guidance.cfg(eps_y, eps_n, config.gamma), {}
        weights = torch.ones_like(x_t[:1, :, 0, 0, 0])
        best = torch.zeros_like(weights[0], dtype=torch.long)
        if len(x_t) > 1:
            rewards = self.score((yield from self.explored(now.t, x_t, eps_cfg))).float()
            weights, best = candidate_weights(rewards, config.candidate_weights), rewards.argmax(0)
            terms = {"reward_winner": rewards.amax(0), "reward_gap": rewards.amax(0) - rewards.amin(0)}
        delta = (weights[:, :, None, None, None] * self.residual(now, x_t, eps_y, eps_cfg)).sum(0)
        w_t = guidance.w_t(now.alpha_t, now.sigma_t, config.weighting)
        return Guided(w_t * delta, pick(eps_cfg, best), {"delta_sds": guidance.norm(delta)} | terms)

    def residual(
        self,
        now: Now,
        x_t: Float[Tensor, "N B C h w"],
        eps_y: Float[Tensor, "N B C h w"],
        eps_cfg: Float[Tensor, "N B C h w"],
    ) -> Float[Tensor, "N B C h w"]:
        """What each noise pulls x_c by, without w(t)."""
        share, views = self.config.rescale, self.views
        return guidance.rescale(x_t, eps_cfg, eps_y, now.alpha_t, now.sigma_t, share, views) - now.noise

    def explored(
        self, t: int, x_t: Float[Tensor, "N B C h w"], eps_cfg: Float[Tensor, "N B C h w"]
    ) -> Generator[Ask, Answer, Float[Tensor, "N B C h w"]]:
        """Every x_t at the end of its DDIM; the first prediction is the step's own."""
        levels = explored_timesteps(t, self.config.explore_steps, len(self.schedule.alphas_cumprod))
        x, eps = x_t, eps_cfg
        for i, (level, onto) in enumerate(pairwise(levels)):
            if i:
                eps_y, eps_n = yield Ask(x, (self.y, self.n), level)
                eps = guidance.cfg(eps_y, eps_n, self.config.gamma)
            x_0 = guidance.x0_hat(x, eps, self.schedule.alpha_t(level), self.schedule.sigma_t(level))
            x = self.schedule.alpha_t(onto) * x_0 + self.schedule.sigma_t(onto) * eps
        return x
