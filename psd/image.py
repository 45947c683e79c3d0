"""Image mode (Algorithm 2): latents x_c optimised by a method's gradient along descending timesteps.

All arms and samples advance in lockstep on the same starting noise, timesteps and noises; one batched forward of the
prior a step serves every condition, noise, arm and sample. Knows nothing of files, clocks or prompts' words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from psd import guidance
from psd.config import RunConfig
from psd.contracts import Decode, Prior, Reward
from psd.lockstep import eps_of_arms, score_noises, update_negative
from psd.methods import METHODS, Guided, Predictions, Score
from psd.negative import NegativeEmbedding
from psd.schedule import NoiseSchedule, descending_timesteps, shift_timestep


class ImageStep(NamedTuple):
    """State after a step. `terms` holds the norms, weights and rewards of psd.methods, one value a sample."""

    step: int  # 1-based; step 1 is the start x_c = x0_hat of pure noise
    t: int
    x_c: dict[str, Float[Tensor, "B C h w"]]
    terms: dict[str, dict[str, Float[Tensor, " B"]]]
    drift: dict[str, float]  # |n - n_0| of the arms that learn n


@dataclass
class Arm:
    """One arm's trainable state: latents x_c, DDIM-consistent noise k, negative embedding n."""

    config: RunConfig
    x_c: Float[Tensor, "B C h w"]
    k: Float[Tensor, "B C h w"]
    negative: NegativeEmbedding
    optimizer: torch.optim.Adam | None  # None: the DDIM update

    @classmethod
    def start(cls, config: RunConfig, x_c: Tensor, k: Tensor, n_0: Tensor) -> Arm:
        lr = config.negative_lr if METHODS[config.method].learns_negative else 0.0
        negative = NegativeEmbedding(n_0, lr, config.negative_optimizer, config.negative_decay_steps)
        x_c = x_c.clone()
        return cls(config, x_c, k, negative, torch.optim.Adam([x_c], config.lr) if config.update == "adam" else None)

    def noises(self, step: int, fresh: Float[Tensor, "2 B C h w"]) -> Float[Tensor, "N B C h w"]:
        """The pair of this step, or its first noise alone where no reward is asked."""
        first = self.k if self.config.pair == "ddim" else fresh[0]
        pair = METHODS[self.config.method].noises == 2 and step % self.config.pref_interval == 0
        return torch.stack([first, fresh[1]]) if pair else first[None]

    def update(self, guided: Guided, alpha_t: Tensor, sigma_t: Tensor) -> None:
        self.k = guided.eps_cfg
        if self.optimizer is None:
            self.x_c = self.x_c - sigma_t / alpha_t * guided.g  # DDIM, where g = eps~ - k
        else:
            self.x_c.grad = guided.g
            self.optimizer.step()


def scorer(decode: Decode, reward: Reward, prompts: list[str]) -> Score:
    """r(y_b, decode(x_0[n, b])) for every noise n and sample b; differentiable."""

    def score(x_0: Float[Tensor, "N B C h w"]) -> Float[Tensor, "N B"]:
        return score_noises(decode, reward, x_0, prompts)

    return score


def distil_image(
    prior: Prior,
    score: Score,
    y: Float[Tensor, "B L D"],
    n_0: Float[Tensor, "B L D"],
    arms: dict[str, RunConfig],
    generators: list[torch.Generator],
    latent_shape: tuple[int, int, int] | None = None,
) -> Iterator[ImageStep]:
    """Run every arm over the N timesteps; yields after each of them.

    One generator per sample, so that a batch draws what single runs would. The arms share the timesteps of the first
    arm's config. Forward passes of the prior: N batched ones without gradient, and one with gradient through n for
    every update of a negative embedding.
    """
    schedule = NoiseSchedule(prior.alphas_cumprod)
    shared = next(iter(arms.values()))
    total = len(prior.alphas_cumprod)
    timesteps = descending_timesteps(shared.steps, shared.t_max, shared.t_min, total).tolist()
    shape = latent_shape or prior.latent_shape

    def sample_noise() -> Float[Tensor, "B C h w"]:
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(prior.device)

    # Start: x_c = x0_hat of pure noise at the largest t, k = eps~ there; the same for every arm of equal gamma.
    t = timesteps[0]
    x_t = sample_noise()
    eps_y, eps_n = eps_of_arms(prior, t, {"": x_t[None]}, y, {"": n_0})[""]
    states: dict[str, Arm] = {}
    for name, config in arms.items():
        eps_cfg = guidance.cfg(eps_y[0], eps_n[0], config.gamma)
        x_c = guidance.x0_hat(x_t, eps_cfg, schedule.alpha_t(t), schedule.sigma_t(t))
        states[name] = Arm.start(config, x_c, eps_cfg, n_0)
    yield ImageStep(1, t, {name: arm.x_c for name, arm in states.items()}, {name: {} for name in arms}, {})

    for step, t in enumerate(timesteps[1:]):
        fresh = torch.stack([sample_noise(), sample_noise()])
        tau = torch.stack([torch.rand((), generator=generator) for generator in generators])[0].item()  # one t for all
        t = shift_timestep(t, shared.time_shift_low + tau * (shared.time_shift_high - shared.time_shift_low), total)
        alpha_t, sigma_t = schedule.alpha_t(t), schedule.sigma_t(t)

        # Noise the pair (eq. 11) of every arm; one batched forward.
        noises = {name: arm.noises(step, fresh) for name, arm in states.items()}
        noisy = {name: alpha_t * states[name].x_c + sigma_t * noise for name, noise in noises.items()}
        predicted = eps_of_arms(prior, t, noisy, y, {name: arm.negative.value for name, arm in states.items()})

        terms, drift = {}, {}
        for name, arm in states.items():
            p = Predictions(noisy[name], noises[name], *predicted[name], alpha_t, sigma_t)
            guided = METHODS[arm.config.method].step(p, arm.config, score)
            arm.update(guided, alpha_t, sigma_t)
            terms[name] = guided.terms
            if step % (arm.config.pref_interval * arm.config.negative_interval) == 0:
                update_negative(prior, score, arm.negative, p, guided, arm.config.gamma, t, step)
            if arm.negative.lr_0:
                drift[name] = arm.negative.drift
        yield ImageStep(step + 2, t, {name: arm.x_c for name, arm in states.items()}, terms, drift)
