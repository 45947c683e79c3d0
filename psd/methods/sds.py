"""Score distillation sampling: the plain arm, and what every method of guided predictions shares."""

from __future__ import annotations

from collections.abc import Generator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from psd import guidance
from psd.config import RunConfig
from psd.contracts import Answer, Ask, Guided, Now, Setup


class SDS:
    """g = w_t * (eps~ - noise) on the first noise (method.md: "without"). No reward is asked, n stays n_0."""

    def __init__(self, setup: Setup) -> None:
        self.config, self.y, self.n, self.views = setup.config, setup.y, setup.n_0, setup.views
        self.schedule = setup.schedule

    def noises(self, step: int) -> int:
        return 1

    def step(self, now: Now) -> Generator[Ask, Answer, Guided]:
        x_t = noisy(now)
        eps_y, eps_n = yield Ask(x_t, (self.y, self.n))
        return distilled(now, self.config, self.views, x_t[0], now.noise[0], eps_y[0], eps_n[0])

    def report(self) -> dict[str, float]:
        return {}


def noisy(now: Now) -> Float[Tensor, "N B C h w"]:
    """x_t of every noise (eq. 11): alpha_t * x_c + sigma_t * noise."""
    return now.alpha_t * now.x_c + now.sigma_t * now.noise


def pick(stack: Float[Tensor, "N B ..."], index: Int[Tensor, " B"]) -> Float[Tensor, "B ..."]:
    """Sample b of noise index[b], for every b."""
    return stack[index, torch.arange(len(index), device=index.device)]


def distilled(
    now: Now,
    config: RunConfig,
    views: int,
    x_t: Float[Tensor, "B C h w"],
    noise: Float[Tensor, "B C h w"],
    eps_y: Float[Tensor, "B C h w"],
    eps_n: Float[Tensor, "B C h w"],
) -> Guided:
    """eq. 12 without delta_pref: w_t * (delta_gen + gamma * delta_cls), of one noise a sample."""
    delta_gen = guidance.delta_gen(eps_n, noise)
    gamma_delta_cls = config.gamma * guidance.delta_cls(eps_y, eps_n)
    w_t = guidance.w_t(now.alpha_t, now.sigma_t, config.weighting)
    terms = {"delta_gen": guidance.norm(delta_gen), "delta_cls": guidance.norm(gamma_delta_cls)}
    eps_cfg = guidance.cfg(eps_y, eps_n, config.gamma)
    g = w_t * (delta_gen + gamma_delta_cls)
    if config.rescale:
        rescaled = guidance.rescale(x_t, eps_cfg, eps_y, now.alpha_t, now.sigma_t, config.rescale, views)
        g = g + w_t * (rescaled - eps_cfg)
    return Guided(g, eps_cfg, terms)
