"""Classifier score distillation (Yu et al. 2023): the implicit classifier alone, with two or three conditions."""

from __future__ import annotations

from collections.abc import Generator

from jaxtyping import Float
from torch import Tensor

from psd import guidance
from psd.contracts import Answer, Ask, Guided, Now, Setup
from psd.methods.sds import SDS, noisy

ANNEALED = 0.5  # share of the run over which the three-way weights move, 5,000 of its 10,000 steps


def three_way(share: float) -> tuple[float, float, float]:
    """Weights (c, u, v) of eps_y, eps_n, eps_null: from the empty prompt, (1, 0, -1), to the negative, (1, -1, 0)."""
    done = min(1.0, share / ANNEALED)
    return 1.0, -done, done - 1.0


def classifier_score(
    eps_y: Float[Tensor, "*shape"],
    eps_n: Float[Tensor, "*shape"],
    eps_null: Float[Tensor, "*shape"],
    weights: tuple[float, float, float],
) -> Float[Tensor, "*shape"]:
    """c * eps_y + u * eps_n + v * eps_null: neither guidance scale nor noise, as their code has it."""
    c, u, v = weights
    return c * eps_y + u * eps_n + v * eps_null


class CSD(SDS):
    """g = w_t * (eps_y - eps_n), or with the three-way weights and the empty prompt beside the negative one."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.null = setup.prior.embed([""]) if self.config.csd_weights == "three-way" else None

    def step(self, now: Now) -> Generator[Ask, Answer, Guided]:
        config = self.config
        eps_y, eps_n, *eps_null = yield Ask(noisy(now), (self.y, self.n, *([] if self.null is None else [self.null])))
        weights = three_way(now.share) if eps_null else (1.0, -1.0, 0.0)
        delta = classifier_score(eps_y[0], eps_n[0], eps_null[0][0] if eps_null else eps_n[0], weights)
        w_t = guidance.w_t(now.alpha_t, now.sigma_t, config.weighting)
        return Guided(w_t * delta, guidance.cfg(eps_y[0], eps_n[0], config.gamma), {"delta_cls": guidance.norm(delta)})
