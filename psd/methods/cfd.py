"""Consistent flow distillation (Yan et al. 2024): score distillation along an annealed t, on noise that stays in place.

The noise is the mode's (`noise` "consistent"): in 3D it lies on the object, so that views share it.
"""

from __future__ import annotations

from collections.abc import Generator

from psd.contracts import Answer, Ask, Guided, Now
from psd.methods.sds import SDS, distilled, noisy


class CFD(SDS):
    """g = w_t * (eps~ - noise) at t = t_max - (t_max - t_min) * share, whatever t the other arms have drawn.

    In image mode t falls from step to step anyway, and the step's own is kept.
    """

    def at(self, now: Now) -> Now:
        """The same step at this method's t."""
        if now.poses is None:
            return now
        total = len(self.schedule.alphas_cumprod)
        share = self.config.t_max - (self.config.t_max - self.config.t_min) * now.share
        t = min(round(share * total), total - 1)
        return now._replace(t=t, alpha_t=self.schedule.alpha_t(t), sigma_t=self.schedule.sigma_t(t))

    def step(self, now: Now) -> Generator[Ask, Answer, Guided]:
        now = self.at(now)
        x_t = noisy(now)
        eps_y, eps_n = yield Ask(x_t, (self.y, self.n), now.t)
        return distilled(now, self.config, self.views, x_t[0], now.noise[0], eps_y[0], eps_n[0])
