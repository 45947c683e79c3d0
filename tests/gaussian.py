"""A prior whose noise predictions are exact: q(x_0|y) = N(mu_y, s_y^2 I) and q(x_0|n) = N(mu_n, s_n^2 I)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from psd.methods import Predictions


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
