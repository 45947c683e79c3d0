"""The learned negative embedding n (Sec. 3.3, eq. 13): gradient ascent on the reward of the winner's x0_hat.

One n serves all views of a run (S = 1); a batch of independent runs has one each (S = B).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from psd import guidance
from psd.config import RunConfig
from psd.contracts import Answer, Ask, Guided, Now, Prior, Setup
from psd.embedding import FILE, read_embedding
from psd.methods.sds import distilled, noisy


def starting_negative(config: RunConfig, prior: Prior, runs: int = 1) -> Float[Tensor, "S L D"]:
    """n_0 of every arm: the negative prompt's embedding, or the n in the file `negative_from`, one for each of `runs`.

    Raises RequestError where the file cannot be read or is of another prior.
    """
    embedded = prior.embed([config.negative_prompt] * runs)
    if not config.negative_from:
        return embedded
    given = torch.from_numpy(read_embedding(config.negative_from).values)
    if given.shape != embedded.shape[1:]:
        found, needed = list(given.shape), list(embedded.shape[1:])
        why = f"holds an array of {found}, {prior.name} reads {needed}"
        raise FILE.refusal(config.negative_from, why, "a run with this prior")
    return given.to(embedded.device).repeat(runs, 1, 1)


class NegativeEmbedding:
    """n, its optimiser and its learning rate lr_2, which is constant or falls linearly to 0 over `decay_steps`.

    Starts at n_0, the embedding of the negative prompt, and is kept in fp32 at least: a step of 1e-4 is lost in fp16.
    Raises ValueError on an optimiser other than "adam" (the paper names none) or "sgd".
    """

    def __init__(self, n_0: Float[Tensor, "S L D"], lr: float, optimizer: str = "adam", decay_steps: int = 0) -> None:
        self.n_0 = n_0.detach().to(torch.promote_types(n_0.dtype, torch.float32))
        self.lr_0, self.decay_steps = lr, decay_steps
        self._n = self.n_0.clone().requires_grad_()
        if optimizer not in ("adam", "sgd"):
            raise ValueError(f"negative_optimizer must be 'adam' or 'sgd', not {optimizer!r}")
        self._optimizer = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer]([self._n], lr=lr, maximize=True)

    @property
    def value(self) -> Float[Tensor, "S L D"]:
        """n without gradient, for the batched forward of the step."""
        return self._n.detach()

    @property
    def drift(self) -> float:
        """|n - n_0|."""
        return torch.linalg.vector_norm(self.value - self.n_0).item()

    def lr(self, step: int) -> float:
        """lr_2 at a 0-based step of the run; 0 means that an update would change nothing and can be saved."""
        return self.lr_0 * max(0.0, 1 - step / self.decay_steps) if self.decay_steps else self.lr_0

    def update(self, objective: Callable[[Float[Tensor, "S L D"]], Float[Tensor, ""]], step: int) -> Float[Tensor, ""]:
        """One ascent step n <- n + lr_2 * grad_n objective(n) (eq. 13); returns the objective before it.

        `step` is the run's 0-based step, which the decay counts in. Where a run's gradient is not finite (float16
        overflows) it counts as zero: one bad step must not end n.
        """
        with torch.enable_grad():
            reward = objective(self._n)
            (gradient,) = torch.autograd.grad(reward, self._n)
        finite = torch.isfinite(gradient).all(-1, keepdim=True).all(-2, keepdim=True)
        self._n.grad = torch.where(finite, gradient, 0.0)  # `where`, not `if`: the GPU is not waited for
        self._optimizer.param_groups[0]["lr"] = self.lr(step)
        self._optimizer.step()
        self._n.grad = None
        return reward.detach()


def reward_through_negative(
    n: Float[Tensor, "S L D"],
    x_t: Float[Tensor, "B C h w"],
    eps_y: Float[Tensor, "B C h w"],
    alpha_t: Float[Tensor, ""],
    sigma_t: Float[Tensor, ""],
    gamma: float,
    eps: Callable[[Float[Tensor, "B C h w"], Float[Tensor, "S L D"]], Float[Tensor, "B C h w"]],
    reward: Callable[[Float[Tensor, "B C h w"]], Float[Tensor, " B"]],
) -> Float[Tensor, ""]:
    """Objective of eq. 13: mean over samples of r(y, x0_hat^w(n)), with x0_hat under guidance (eqs. 3, 31, 32).

    x_t and eps_y are the winner's, reused from the step. The gradient runs through eps(x_t, n) alone, then through
    `reward`, which decodes x0_hat and scores it. Guided whatever `x0_from` says: otherwise n would have no influence.
    """
    eps_cfg = guidance.cfg(eps_y.detach(), eps(x_t.detach(), n), gamma)
    return reward(guidance.x0_hat(x_t.detach(), eps_cfg, alpha_t, sigma_t)).mean()


class FollowsReward:
    """What methods share whose n learns: the embedding, when an update is due, and the update itself."""

    def __init__(self, setup: Setup) -> None:
        config = setup.config
        self.config, self.prior, self.score = config, setup.prior, setup.score
        self.y, self.views = setup.y, setup.views
        self.negative = NegativeEmbedding(
            setup.n_0, config.negative_lr, config.negative_optimizer, config.negative_decay_steps
        )

    def due(self, step: int) -> bool:
        """Whether n moves at this step: on every `negative_interval`-th preference step, while it has a rate."""
        interval = self.config.pref_interval * self.config.negative_interval
        return step % interval == 0 and self.negative.lr(step) > 0

    def follow_reward(self, now: Now, x_t: Float[Tensor, "B C h w"], eps_y: Float[Tensor, "B C h w"]) -> None:
        """One ascent step of n (eq. 13) at the winner's x_t.

        The objective is the sum over independent runs and the mean over the views of one, which share an n.
        """
        runs = len(self.negative.value)

        def objective(n: Float[Tensor, "S L D"]) -> Float[Tensor, ""]:
            return runs * reward_through_negative(
                n, x_t, eps_y, now.alpha_t, now.sigma_t, self.config.gamma,
                eps=lambda x, cond: self.prior.eps(x, now.t, cond.expand(len(x), -1, -1), now.poses),
                reward=lambda x_0: self.score(x_0[None])[0],
            )  # fmt: skip

        self.negative.update(objective, now.step)

    def report(self) -> dict[str, float]:
        return {"negative_drift": self.negative.drift} if self.negative.lr_0 else {}


class NegativeOnly(FollowsReward):
    """Score distillation on the first noise whose n learns: Sec. 3.3 alone, for the ablation."""

    def noises(self, step: int) -> int:
        return 1

    def step(self, now: Now) -> Generator[Ask, Answer, Guided]:
        x_t = noisy(now)
        eps_y, eps_n = yield Ask(x_t, (self.y, self.negative.value))
        plain = distilled(now, self.config, self.views, x_t[0], now.noise[0], eps_y[0], eps_n[0])
        due = self.due(now.step)
        return plain._replace(learn=partial(self.follow_reward, now, x_t[0], eps_y[0]) if due else None)
