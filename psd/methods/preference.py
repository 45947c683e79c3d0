"""Preference score distillation (Algorithm 1): a reward ranks a pair of noises, delta_pref steers, n learns."""

from __future__ import annotations

from collections.abc import Generator
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from psd import guidance
from psd.contracts import Answer, Ask, Guided, Now
from psd.methods.negative import FollowsReward
from psd.methods.sds import distilled, noisy, pick


class PSD(FollowsReward):
    """g = w_t * (delta_gen + gamma * delta_cls + beta_r * delta_pref) at the pair's winner (eq. 12); n by eq. 13.

    The pair is ranked per sample. A step between two of `pref_interval` is plain: one noise, no reward. With
    pref_weight = 0 it is winner selection only.
    """

    def noises(self, step: int) -> int:
        return 2 if step % self.config.pref_interval == 0 else 1

    def step(self, now: Now) -> Generator[Ask, Answer, Guided]:
        config, x_t = self.config, noisy(now)
        eps_y, eps_n = yield Ask(x_t, (self.y, self.negative.value))
        if len(now.noise) == 1:
            return distilled(now, config, self.views, x_t[0], now.noise[0], eps_y[0], eps_n[0])

        # Rank the pair by its one-step predictions (Sec. 3.1).
        eps_cfg = guidance.cfg(eps_y, eps_n, config.gamma)
        ranked = guidance.rescale(x_t, eps_cfg, eps_y, now.alpha_t, now.sigma_t, config.rescale, self.views)
        x_0 = guidance.x0_hat(x_t, ranked if config.x0_from == "cfg" else eps_y, now.alpha_t, now.sigma_t)
        winner, reward_gap, terms = rank(self.score(x_0).float())
        loser = 1 - winner

        # delta_gen + gamma * delta_cls, at the winner.
        won = [pick(stack, winner) for stack in (x_t, now.noise, eps_y, eps_n)]
        plain = distilled(now, config, self.views, *won)

        # beta_r * delta_pref; none where a noise could not be scored: there is nothing to prefer.
        delta_cls = guidance.delta_cls(won[2], won[3])
        delta_pref = guidance.delta_pref(
            plain.eps_cfg, pick(eps_cfg, loser), won[1], pick(now.noise, loser), config.pref_form
        )
        scored = terms["unscored"] == 0
        delta_pref = torch.where(scored[:, None, None, None], delta_pref, 0.0)
        beta_r = guidance.beta_r(delta_cls, delta_pref, config.gamma, reward_gap, config.reward_scale) * scored
        preference = config.pref_weight * beta_r[:, None, None, None] * delta_pref

        w_t = guidance.w_t(now.alpha_t, now.sigma_t, config.weighting)
        terms = plain.terms | {"delta_pref": guidance.norm(preference), "beta_r": beta_r} | terms
        learn = partial(self.follow_reward, now, won[0], won[2]) if self.due(now.step) else None
        return Guided(plain.g + w_t * preference, plain.eps_cfg, terms, learn)


def rank(
    rewards: Float[Tensor, "2 B"],
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"], dict[str, Float[Tensor, " B"]]]:
    """Index of each sample's winner, the gap of its pair, and what to tell of it; ties go to the first noise.

    A noise whose score is not finite loses. Where one or both are so the gap counts as 0, and `unscored` says how many.
    """
    finite = torch.isfinite(rewards)
    reward_1, reward_2 = torch.where(finite, rewards, -torch.inf)
    winner = (reward_2 > reward_1).long()
    unscored = (~finite).sum(0).to(rewards.dtype)
    gap = torch.where(unscored == 0, (rewards[0] - rewards[1]).abs(), 0.0)
    best = torch.where(unscored < 2, torch.maximum(reward_1, reward_2), torch.nan)
    return winner, gap, {"reward_gap": gap, "reward_winner": best, "unscored": unscored}
