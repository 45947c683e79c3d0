"""Score distillation via DDIM inversion (Lukoianov et al. 2024): the noise that the prior itself would begin with."""

from __future__ import annotations

import math
from collections.abc import Generator
from itertools import pairwise

import numpy as np
from jaxtyping import Float
from torch import Tensor

from psd import guidance
from psd.contracts import Answer, Ask, Guided, Now, Setup
from psd.methods.sds import SDS, distilled
from psd.schedule import NoiseSchedule

CLEAN = -1  # the level of x_c: it counts as noisy as t = 0


def inversion_timesteps(t: int, last: int, steps: int, total: int) -> list[int]:
    """Levels that the inversion goes through: clean, a grid of `steps` over the schedule below t, `last`."""
    grid = [1 + k * (total // steps) for k in range(steps)]
    return [CLEAN, *(level for level in grid if level < t), last]


def inversion_step(
    x: Float[Tensor, "*shape"], eps: Float[Tensor, "*shape"], level: int, onto: int, schedule: NoiseSchedule
) -> Float[Tensor, "*shape"]:
    """DDIM backwards, from `level` to the noisier `onto`: alpha * x0_hat + sigma * eps."""
    level = max(level, 0)
    x_0 = guidance.x0_hat(x, eps, schedule.alpha_t(level), schedule.sigma_t(level))
    return schedule.alpha_t(onto) * x_0 + schedule.sigma_t(onto) * eps


def ancestral_std(level: int, onto: int, schedule: NoiseSchedule) -> Float[Tensor, ""]:
    """Standard deviation of DDPM's step from `onto` back to `level`, what eta multiplies in DDIM."""
    abar, abar_onto = schedule.alphas_cumprod[max(level, 0)], schedule.alphas_cumprod[onto]
    return ((1 - abar) / (1 - abar_onto) * (1 - abar_onto / abar)).clamp(min=0).sqrt()


class SDI(SDS):
    """g = w_t * (eps~(x_t) - k), where x_t is x_c inverted to t and k the noise in it; with w = sigma/alpha its target.

    Every inversion step asks the prior under `inversion_gamma`, negative: away from the prompt. `inversion_shift`: as
    in its authors' code the inversion ends up to a step of its grid beyond t, and the prior reads it as if at t.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.total = len(self.schedule.alphas_cumprod)

    def noises(self, step: int) -> int:
        return 1 + (self.config.inversion_steps + 1 if self.config.inversion_eta else 0)

    def step(self, now: Now) -> Generator[Ask, Answer, Guided]:
        last = self.last(now)
        x_t = yield from self.inverted(now, last)
        eps_y, eps_n = yield Ask(x_t[None], (self.y, self.n))
        k = (x_t - now.alpha_t * now.x_c) / now.sigma_t
        return distilled(now, self.config, self.views, x_t, k, eps_y[0], eps_n[0])

    def last(self, now: Now) -> int:
        """The level that the inversion ends at."""
        if not self.config.inversion_shift:
            return now.t
        u = np.random.default_rng([self.config.seed, now.step]).random()
        return min(now.t + math.floor(u * self.total / self.config.inversion_steps), self.total - 1)

    def inverted(self, now: Now, last: int) -> Generator[Ask, Answer, Float[Tensor, "B C h w"]]:
        levels = inversion_timesteps(now.t, last, self.config.inversion_steps, self.total)
        x = now.x_c
        for i, (level, onto) in enumerate(pairwise(levels)):
            eps_y, eps_n = yield Ask(x[None], (self.y, self.n), max(level, 0))
            eps = guidance.cfg(eps_y[0], eps_n[0], self.config.inversion_gamma)
            x = inversion_step(x, eps, level, onto, self.schedule)
            if self.config.inversion_eta:
                x = x + self.config.inversion_eta * ancestral_std(level, onto, self.schedule) * now.noise[1 + i]
        return x
