"""Update rules: from the prior's predictions at one timestep to the gradient g of the clean sample x_c.

Every method has one signature and knows nothing of the prior, the decoder or the optimiser: predictions come in,
`score` rates x0_hat, and the caller applies g. Adding a method is one function and one line of METHODS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from psd import guidance
from psd.config import RunConfig


class Predictions(NamedTuple):
    """The prior's answers for the N noises of one arm, all at one timestep and one x_c per sample."""

    x_t: Float[Tensor, "N B C h w"]  # alpha_t * x_c + sigma_t * noise (eq. 11)
    noise: Float[Tensor, "N B C h w"]
    eps_y: Float[Tensor, "N B C h w"]
    eps_n: Float[Tensor, "N B C h w"]
    alpha_t: Float[Tensor, ""]
    sigma_t: Float[Tensor, ""]


class Guided(NamedTuple):
    """What one step of a method decided."""

    g: Float[Tensor, "B C h w"]  # gradient of x_c, w(t) included
    winner: Int[Tensor, " B"]  # index of the noise used
    eps_cfg: Float[Tensor, "B C h w"]  # eps~ of that noise: the DDIM-consistent noise k of the next step
    terms: dict[str, Float[Tensor, " B"]]  # norms of the three terms without w(t), beta_r and rewards, per sample


Score = Callable[[Float[Tensor, "N B C h w"]], Float[Tensor, "N B"]]  # r(y, x0_hat), higher is better


def pick(stack: Float[Tensor, "N B ..."], index: Int[Tensor, " B"]) -> Float[Tensor, "B ..."]:
    """Sample b of noise index[b], for every b."""
    return stack[index, torch.arange(len(index), device=index.device)]


@torch.no_grad()
def sds(p: Predictions, config: RunConfig, score: Score) -> Guided:
    """Score distillation sampling on the first noise: g = w_t * (eps~ - noise). `score` is not called."""
    return _distil(p, config, torch.zeros(p.noise.shape[1], dtype=torch.long, device=p.noise.device))


@torch.no_grad()
def psd(p: Predictions, config: RunConfig, score: Score) -> Guided:
    """Preference score distillation (eq. 12): g = w_t * (delta_gen + gamma * delta_cls + beta_r * delta_pref).

    The pair is ranked per sample. With one noise (a step between two of `pref_interval`) this is `sds`; with
    pref_weight = 0 it is winner selection only. Raises ValueError on more than two noises.
    """
    if len(p.noise) == 1:
        return sds(p, config, score)

    # Rank the pair by its one-step predictions (Sec. 3.1), in fp32; ties go to the first noise.
    eps_cfg = guidance.cfg(p.eps_y, p.eps_n, config.gamma)
    ranked = guidance.rescale(p.x_t, eps_cfg, p.eps_y, p.alpha_t, p.sigma_t, config.rescale)
    x0 = guidance.x0_hat(p.x_t, ranked if config.x0_from == "cfg" else p.eps_y, p.alpha_t, p.sigma_t)
    reward_1, reward_2 = score(x0).float()
    winner = (reward_2 > reward_1).long()
    loser = 1 - winner
    reward_gap = (reward_1 - reward_2).abs()

    # delta_gen + gamma * delta_cls, at the winner.
    plain = _distil(p, config, winner)

    # beta_r * delta_pref.
    delta_cls = guidance.delta_cls(pick(p.eps_y, winner), pick(p.eps_n, winner))
    delta_pref = guidance.delta_pref(
        plain.eps_cfg, pick(eps_cfg, loser), pick(p.noise, winner), pick(p.noise, loser), config.pref_form
    )
    beta_r = guidance.beta_r(delta_cls, delta_pref, config.gamma, reward_gap, config.reward_scale)
    preference = config.pref_weight * beta_r[:, None, None, None] * delta_pref

    terms = {
        "delta_pref": guidance.norm(preference),
        "beta_r": beta_r,
        "reward_gap": reward_gap,
        "reward_winner": torch.maximum(reward_1, reward_2),
    }
    w_t = guidance.w_t(p.alpha_t, p.sigma_t, config.weighting)
    return plain._replace(g=plain.g + w_t * preference, terms=plain.terms | terms)


def _distil(p: Predictions, config: RunConfig, index: Int[Tensor, " B"]) -> Guided:
    """eq. 12 without delta_pref, each sample at the noise of its index: w_t * (delta_gen + gamma * delta_cls)."""
    x_t, noise, eps_y, eps_n = (pick(stack, index) for stack in (p.x_t, p.noise, p.eps_y, p.eps_n))
    delta_gen = guidance.delta_gen(eps_n, noise)
    gamma_delta_cls = config.gamma * guidance.delta_cls(eps_y, eps_n)
    w_t = guidance.w_t(p.alpha_t, p.sigma_t, config.weighting)
    terms = {"delta_gen": guidance.norm(delta_gen), "delta_cls": guidance.norm(gamma_delta_cls)}
    eps_cfg = guidance.cfg(eps_y, eps_n, config.gamma)
    g = w_t * (delta_gen + gamma_delta_cls)
    if config.rescale:
        g = g + w_t * (guidance.rescale(x_t, eps_cfg, eps_y, p.alpha_t, p.sigma_t, config.rescale) - eps_cfg)
    return Guided(g, index, eps_cfg, terms)


@dataclass(frozen=True)
class Method:
    step: Callable[[Predictions, RunConfig, Score], Guided]
    noises: int  # per sample and step; also the number of x0_hat that are scored if above 1
    learns_negative: bool = False  # whether n follows the reward (eq. 13)


METHODS: dict[str, Method] = {
    "psd": Method(psd, noises=2, learns_negative=True),
    "sds": Method(sds, noises=1),
    "negative": Method(sds, noises=1, learns_negative=True),  # Sec. 3.3 alone, for the ablation
}
