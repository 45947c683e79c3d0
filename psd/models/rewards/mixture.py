"""Weighted mixtures of rewards: members on scales of their own, made comparable and summed.

Members are shared between runs; what a mixture learns of their scales belongs to the one run it was loaded for.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from psd.contracts import Reward

DECAY = 0.9  # of the running variances: about the last twenty pairs count
ROUNDING = 1e-5  # differences of scores below this are float32's, not the reward's


class Mixture(Reward):
    """r(y, image) = sum_k w_k * (r_k(y, image) - c_k) / s_k, a Reward as any other.

    s_k is the running standard deviation of r_k between noised copies of one sample (`rank`), not over the run or over
    views. A pair differs in its noise alone, so each member's say in who wins is its weight at every timestep; the gap
    that beta_r sees stays of the order of the weights (HPS v2.1 pairs differ by 0.01, PickScore's by 1); and the
    gradient for the negative embedding is summed in the same units. The newest pair counts in s_k before it is scored,
    so that a single wild one cannot decide alone. c_k, the mean score of the first pair, only moves the zero: every
    image scores 0 until a pair was ranked, then its gain over the start.

    Where a member judges several views together, each other one counts with its mean over them.

    Only `rank` learns. Previews and metrics call the mixture by the clock, and must not change what a run does.
    """

    def __init__(self, members: Mapping[str, Reward], weights: Mapping[str, float], device: torch.device | str = "cpu"):
        self.members = dict(members)
        self.name = " + ".join(f"{weights[name]:g} {name}".removeprefix("1 ") for name in self.members)
        self.views = max(reward.views for reward in self.members.values())
        self.differentiable = all(reward.differentiable for reward in self.members.values())
        self.weights: Float[Tensor, "K 1"] = torch.tensor([[weights[name]] for name in self.members], device=device)
        self.text_parts = tuple(part for reward in self.members.values() for part in reward.text_parts)
        self.ranked = 0  # calls of `rank` that had something to compare
        self._variance = torch.zeros_like(self.weights)
        self._start = torch.zeros_like(self.weights)

    def __call__(self, images: Float[Tensor, "B 3 H W"], prompts: list[str]) -> Float[Tensor, " S"]:
        return self._mix(self._scores(images, prompts))

    def rank(self, images: Float[Tensor, "B 3 H W"], prompts: list[str], copies: int) -> Float[Tensor, " S"]:
        """Scores of `copies` of the same samples, rows ordered (copy, sample), after learning from them."""
        scores = self._scores(images, prompts)
        if copies > 1:
            self._learn(scores.detach().unflatten(1, (copies, -1)))
        return self._mix(scores)

    def bound(self) -> Mixture:
        weights = dict(zip(self.members, self.weights[:, 0].tolist(), strict=True))
        return Mixture(self.members, weights, self.weights.device)

    @property
    def scales(self) -> Float[Tensor, "K 1"]:
        """s_k; infinite while nothing has been ranked."""
        if not self.ranked:
            return torch.full_like(self.weights, torch.inf)
        # The average starts from nothing: what of it is missing is divided out, as Adam does.
        return (self._variance / (1 - DECAY**self.ranked)).sqrt().clamp_min(ROUNDING)

    def _scores(self, images: Tensor, prompts: list[str]) -> Float[Tensor, "K S"]:
        samples = len(images) // self.views
        return torch.stack([reward(images, prompts).view(samples, -1).mean(1) for reward in self.members.values()])

    def _learn(self, scores: Float[Tensor, "K N S"]) -> None:
        scores = scores[..., scores.isfinite().all(0).all(0)]  # one nan would stay in the averages for ever
        if not scores.numel():
            return
        if not self.ranked:
            self._start = scores.mean((1, 2))[:, None]
        variance = scores.var(1).mean(1, keepdim=True)
        self._variance = DECAY * self._variance + (1 - DECAY) * variance
        self.ranked += 1

    def _mix(self, scores: Float[Tensor, "K S"]) -> Float[Tensor, " S"]:
        return (self.weights * (scores - self._start) / self.scales).sum(0)
