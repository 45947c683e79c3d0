"""Priors whose noise predictions are exact, a method's step on given predictions, and rewards that are a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from psd.config import RunConfig
from psd.contracts import Guided, Now, Reward, Setup
from psd.guidance import cfg
from psd.methods import METHODS
from psd.scene.rig import Frame
from psd.schedule import NoiseSchedule

# Of every setting that may differ between arms: a number that is no test's, and makes a difference.
OTHER = dict(
    gamma=5.0, lr=0.2, pref_weight=1.0, pref_interval=3, reward_scale=5.0, rescale=0.5, negative_lr=0.1,
    negative_interval=3, negative_decay_steps=4, lr_end=0.1, lambda_rgb=1.0, lambda_orient=10.0, lambda_orient_end=10.0,
    lambda_opacity=10.0, lambda_solid=10.0, lambda_z_variance=10.0, lambda_smooth=1.0,
)  # fmt: skip


class Predictions(NamedTuple):
    """A prior's answers for N noises of B samples, all at one timestep."""

    x_t: Float[Tensor, "N B C h w"]  # alpha_t * x_c + sigma_t * noise (eq. 11)
    noise: Float[Tensor, "N B C h w"]
    eps_y: Float[Tensor, "N B C h w"]
    eps_n: Float[Tensor, "N B C h w"]
    alpha_t: Float[Tensor, ""]
    sigma_t: Float[Tensor, ""]


def step_of(
    method: str, p: Predictions, config: RunConfig, score: Callable[[Tensor], Tensor], views: int = 1
) -> Guided:
    """What a method's step makes of these predictions; it asks for them once, under the prompt and n."""
    y, n_0 = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
    made = METHODS[method].load()(Setup(config, None, y, n_0, score, None, views))
    x_c = (p.x_t[0] - p.sigma_t * p.noise[0]) / p.alpha_t
    steps = made.step(Now(0, 0.0, 500, p.alpha_t, p.sigma_t, None, x_c, p.noise))
    with torch.no_grad():
        ask = next(steps)
        torch.testing.assert_close(ask.x_t, p.x_t, rtol=1e-4, atol=1e-4)
        assert ask.t is None and [cond.mean().item() for cond in ask.conds] == [0.0, 1.0]
        try:
            steps.send((p.eps_y, p.eps_n))
        except StopIteration as end:
            return end.value
    raise AssertionError("it asked again")


def winner_of(p: Predictions, guided: Guided, gamma: float) -> Tensor:
    """Which of the noises a step went by, [B]: that of its eps~."""
    distance = (cfg(p.eps_y, p.eps_n, gamma) - guided.eps_cfg).abs().amax((2, 3, 4))
    return distance.argmin(0)


@dataclass(frozen=True)
class GaussianPrior:
    """q(x_0|y) = N(mu_y, s_y^2 I) and q(x_0|n) = N(mu_n, s_n^2 I)."""

    mu_y: float | Tensor = 0.5
    s_y: float = 0.3
    mu_n: float | Tensor = 0.0
    s_n: float = 1.0

    def eps_y(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        return gaussian_eps(x_t, self.mu_y, self.s_y, alpha_t, sigma_t)

    def eps_n(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        return gaussian_eps(x_t, self.mu_n, self.s_n, alpha_t, sigma_t)

    def predict(self, x_c: Tensor, noise: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Predictions:
        """x_c [B C h w] noised by `noise` [N B C h w] (eq. 11), with the prior's answers."""
        x_t = alpha_t * x_c + sigma_t * noise
        return Predictions(
            x_t, noise, self.eps_y(x_t, alpha_t, sigma_t), self.eps_n(x_t, alpha_t, sigma_t), alpha_t, sigma_t
        )


def gaussian_eps(x_t: Tensor, mu: float | Tensor, s: float, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """-sigma_t * grad log q(x_t), where q(x_t) = N(alpha_t mu, alpha_t^2 s^2 + sigma_t^2)."""
    return sigma_t * (x_t - alpha_t * mu) / (alpha_t**2 * s**2 + sigma_t**2)


@dataclass
class ExactPrior:
    """q(x_0 | cond) = N(mean(cond), 0.5^2 I): eps is known, and the condition's gradient too. Counts its forwards."""

    latent_shape: tuple[int, int, int] = (2, 3, 3)
    name: str = "exact"
    licence: str = "none"
    image_size: int = 3
    views: int = 1
    frame: Frame = field(default_factory=Frame)
    alphas_cumprod: Float[Tensor, " T"] = field(default_factory=lambda: torch.linspace(0.999, 0.01, 1000))
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    plain_rows: list[int] = field(default_factory=list)
    gradient_rows: list[int] = field(default_factory=list)

    def remarks(self, prompt: str, label: str = "prompt") -> list[str]:
        return []

    def embed(self, prompts: list[str]) -> Tensor:
        return torch.stack([torch.full((4, 2), 0.1 * len(prompt)) for prompt in prompts])

    def encode(self, images: Tensor) -> Tensor:
        return images

    def decode(self, x: Tensor) -> Tensor:
        return x

    def eps(self, x_t: Tensor, t: int | Tensor, cond: Tensor, cameras: Tensor | None = None) -> Tensor:
        (self.gradient_rows if torch.is_grad_enabled() else self.plain_rows).append(len(x_t))
        schedule = NoiseSchedule(self.alphas_cumprod)
        mu = cond.mean((1, 2))[:, None, None, None]
        alpha_t, sigma_t = (
            each if each.ndim == 0 else each[:, None, None, None] for each in (schedule.alpha_t(t), schedule.sigma_t(t))
        )
        return gaussian_eps(x_t, mu, 0.5, alpha_t, sigma_t)


class PlainReward(Reward):
    """A function of images [B 3 H W] and prompts, to scores [B], as a Reward."""

    def __init__(self, score: Callable[[Tensor, list[str]], Tensor]):
        self.name, self.score = score.__name__, score

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.score(images, prompts)

    def rank(self, images: Tensor, prompts: list[str], copies: int) -> Tensor:
        return self.score(images, prompts)  # of any channels: an exact prior's pictures are its latents
