"""The learned negative embedding n (Sec. 3.3, eq. 13): gradient ascent on the reward of the winner's x0_hat.

One n serves all views of a run (S = 1); a batch of independent runs has one each (S = B). Knows nothing of prior or
reward: they come in as functions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from psd import guidance


class NegativeEmbedding:
    """n, its optimiser and its learning rate lr_2, which is constant or falls linearly to 0 over `decay_steps`.

    Starts at n_0, the embedding of the negative prompt, and is kept in fp32 at least: a step of 1e-4 is lost in fp16.
    Raises ValueError on an optimiser other than "adam" (the paper names none) or "sgd".
    """

    def __init__(self, n_0: Float[Tensor, "S L D"], lr: float, optimizer: str = "adam", decay_steps: int = 0) -> None:
        self.n_0 = n_0.detach().to(torch.promote_types(n_0.dtype, torch.float32))
        self.lr_0, self.decay_steps, self.updates = lr, decay_steps, 0
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

    def update(
        self, objective: Callable[[Float[Tensor, "S L D"]], Float[Tensor, ""]], step: int | None = None
    ) -> Float[Tensor, ""]:
        """One ascent step n <- n + lr_2 * grad_n objective(n) (eq. 13); returns the objective before it.

        `step` is the run's 0-based step, which the decay counts in; without it the updates done so far are counted.
        Where a run's gradient is not finite (float16 overflows) it counts as zero: one bad step must not end n.
        """
        with torch.enable_grad():
            reward = objective(self._n)
            (gradient,) = torch.autograd.grad(reward, self._n)
        finite = torch.isfinite(gradient).all(-1, keepdim=True).all(-2, keepdim=True)
        self._n.grad = torch.where(finite, gradient, 0.0)  # `where`, not `if`: the GPU is not waited for
        self._optimizer.param_groups[0]["lr"] = self.lr(self.updates if step is None else step)
        self._optimizer.step()
        self._n.grad = None
        self.updates += 1
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
