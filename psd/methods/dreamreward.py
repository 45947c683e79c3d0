"""DreamReward (Ye et al. 2024; eq. 18): score distillation plus the gradient of the reward itself."""

from __future__ import annotations

import math
from collections.abc import Generator

import torch
from jaxtyping import Float
from torch import Tensor

from psd import guidance
from psd.contracts import Answer, Ask, Guided, Now, Setup
from psd.methods.sds import SDS, distilled, noisy

GOOD = 4.0  # a reward above it has no gradient in the authors' loss, mean relu(4 - r)
FROM_SHARE, STRENGTH = 0.1, 0.3  # of the run, and of the balance below: their second configuration's
PREDICTED_BELOW = 0.3  # of the schedule: there the reward sees x0-hat, above it x_c


def balance(loss: float, loss_reward: float) -> float:
    """10^(digits before the point of `loss` - those of `loss_reward`), which brings both to one order of magnitude."""
    return 10.0 ** (digits(loss) - digits(loss_reward))


def digits(number: float) -> int:
    """As their code counts them, in the number as Python prints it: of 1e-05 it finds five."""
    return len(str(number).partition(".")[0])


class DreamReward(SDS):
    """g = w_t * (eps~ - noise) - lambda_r * d mean r / dx at x0-hat, as if x0-hat moved as x_c does.

    reward_schedule "code": from a tenth of the run on 0.3 * balance * mean relu(4 - r) is added to the reconstruction
    loss, in place of -lambda_r r; rewards must then be on ImageReward's scale. The reward must have a gradient.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.score, self.total = setup.score, len(setup.schedule.alphas_cumprod)

    def step(self, now: Now) -> Generator[Ask, Answer, Guided]:
        config, x_t = self.config, noisy(now)
        eps_y, eps_n = yield Ask(x_t, (self.y, self.n))
        plain = distilled(now, config, self.views, x_t[0], now.noise[0], eps_y[0], eps_n[0])
        x_0 = guidance.x0_hat(x_t[0], plain.eps_cfg, now.alpha_t, now.sigma_t)
        if config.reward_schedule == "constant":
            rewards, ascent = self.ascent(x_0)
            towards = config.reward_lambda * ascent
        elif now.share < FROM_SHARE:
            return plain
        else:
            seen = x_0 if now.t <= PREDICTED_BELOW * self.total else now.x_c
            rewards, ascent = self.ascent(seen, GOOD)
            loss = 0.5 * (now.x_c - x_0).square().sum().item() / len(x_0)
            loss_reward = (GOOD - rewards).clamp(min=0).mean().item()
            towards = STRENGTH * balance(loss, loss_reward) * ascent
        terms = {"delta_reward": guidance.norm(towards), "reward_now": rewards}
        return plain._replace(g=plain.g - towards, terms=plain.terms | terms)

    def ascent(
        self, x: Float[Tensor, "B C h w"], good: float = math.inf
    ) -> tuple[Float[Tensor, " B"], Float[Tensor, "B C h w"]]:
        """Rewards at x, and d(sum r)/dx of those below `good`: each sample's own, whatever stands beside it."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            rewards = self.score(x[None])[0].float()
            (gradient,) = torch.autograd.grad(rewards.clamp(max=good).sum(), x)
        return rewards.detach(), torch.nan_to_num(gradient, posinf=0.0, neginf=0.0)
