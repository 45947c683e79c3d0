"""A prior whose noise predictions are exact: q(x_0|y) = N(mu_y, s_y^2 I) and q(x_0|n) = N(mu_n, s_n^2 I).

And rewards that are a function: `PlainReward`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from psd.contracts import Reward
from psd.methods import Predictions
from psd.schedule import NoiseSchedule


@dataclass(frozen=True)
class GaussianPrior:
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
    alphas_cumprod: Float[Tensor, " T"] = field(default_factory=lambda: torch.linspace(0.999, 0.01, 1000))
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    plain_rows: list[int] = field(default_factory=list)
    gradient_rows: list[int] = field(default_factory=list)

    def embed(self, prompts: list[str]) -> Tensor:
        return torch.stack([torch.full((4, 2), 0.1 * len(prompt)) for prompt in prompts])

    def encode(self, images: Tensor) -> Tensor:
        return images

    def decode(self, x: Tensor) -> Tensor:
        return x

    def eps(self, x_t: Tensor, t: int, cond: Tensor, cameras: Tensor | None = None) -> Tensor:
        (self.gradient_rows if torch.is_grad_enabled() else self.plain_rows).append(len(x_t))
        schedule = NoiseSchedule(self.alphas_cumprod)
        mu = cond.mean((1, 2))[:, None, None, None]
        return gaussian_eps(x_t, mu, 0.5, schedule.alpha_t(t), schedule.sigma_t(t))


class PlainReward(Reward):
    """A function of images [B 3 H W] and prompts, to scores [B], as a Reward."""

    def __init__(self, score: Callable[[Tensor, list[str]], Tensor]):
        self.name, self.score = score.__name__, score

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.score(images, prompts)
