"""DreamDPO (Zhou et al. 2025; eq. 22): the difference of a ranked pair's residuals, and nothing else."""

from __future__ import annotations

from collections.abc import Generator

import torch

from psd import guidance
from psd.contracts import Answer, Ask, Guided, Now, Setup
from psd.methods.preference import rank
from psd.methods.sds import SDS, noisy, pick


class DreamDPO(SDS):
    """g = w_t * ((eps~_w - noise_w) - (eps~_l - noise_l)), winner and loser of a pair, ranked per sample.

    dpo_form "code", what its authors run: the loser's prediction has no guidance, and where the rewards differ by less
    than `dpo_threshold` g = w_t * eps~_w, from which no noise is subtracted.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.score = setup.score

    def noises(self, step: int) -> int:
        return 2

    def step(self, now: Now) -> Generator[Ask, Answer, Guided]:
        config, x_t = self.config, noisy(now)
        eps_y, eps_n = yield Ask(x_t, (self.y, self.n))
        eps_cfg = guidance.cfg(eps_y, eps_n, config.gamma)
        x_0 = guidance.x0_hat(x_t, eps_cfg, now.alpha_t, now.sigma_t)
        winner, reward_gap, terms = rank(self.score(x_0).float())
        loser = 1 - winner

        won, noise_w = pick(eps_cfg, winner), pick(now.noise, winner)
        lost, noise_l = pick(eps_y if config.dpo_form == "code" else eps_cfg, loser), pick(now.noise, loser)
        delta = guidance.delta_pref(won, lost, noise_w, noise_l, "centred")
        if config.dpo_form == "code":
            delta = torch.where((reward_gap < config.dpo_threshold)[:, None, None, None], won, delta)
        delta = torch.where((terms["unscored"] == 0)[:, None, None, None], delta, 0.0)  # nothing to prefer
        w_t = guidance.w_t(now.alpha_t, now.sigma_t, config.weighting)
        return Guided(w_t * delta, won, {"delta_pref": guidance.norm(delta)} | terms)
