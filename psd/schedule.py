"""The prior's noise schedule and the timesteps of a run. Timesteps are indices 0 (clean) .. T - 1 (noise)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class NoiseSchedule:
    """x_t = alpha_t * x_0 + sigma_t * eps with alpha_t^2 + sigma_t^2 = 1 (eq. 1)."""

    alphas_cumprod: Float[Tensor, " T"]  # abar_t, falling

    def alpha_t(self, t: int | Int[Tensor, ""]) -> Float[Tensor, ""]:
        return self.alphas_cumprod[t].sqrt()

    def sigma_t(self, t: int | Int[Tensor, ""]) -> Float[Tensor, ""]:
        return (1 - self.alphas_cumprod[t]).sqrt()


def descending_timesteps(
    steps: int, t_max: float, t_min: float, num_train_timesteps: int = 1000
) -> Int[Tensor, " steps"]:
    """The N timesteps of Algorithm 2, evenly spaced from t_max down to t_min (shares of the schedule), rounded.

    More steps than the interval holds give repeats, which are harmless: under DDIM a repeated step changes nothing.
    """
    t = torch.linspace(t_max, t_min, steps, dtype=torch.float64) * num_train_timesteps
    return t.round().long().clamp(0, num_train_timesteps - 1)


def shift_timestep(t: int, tau: float, num_train_timesteps: int = 1000) -> int:
    """t + tau of Algorithm 2, kept inside the schedule; tau ~ U(T1, T2) is a share of it, drawn by the caller."""
    return min(max(t + round(tau * num_train_timesteps), 0), num_train_timesteps - 1)


def further_noise(seed: int, step: int, index: int, shape: tuple[int, ...]) -> Float[Tensor, "*shape"]:
    """The index-th noise of a step beyond its pair: a function of these numbers alone, so that asking for more noises
    moves no other random number of the run."""
    (state,) = np.random.SeedSequence([seed, step, index % 2**32]).generate_state(1, np.uint64)
    return torch.randn(shape, generator=torch.Generator().manual_seed(int(state)))
