"""What both modes share of a step: all arms' predictions in one forward, the scores of a pair, the update of n.

Knows nothing of where x_c comes from: latents that are optimised (psd.image) or a rendered object (psd.object3d).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from psd.contracts import Decode, Prior, Reward
from psd.methods import Guided, Predictions, Score, pick
from psd.negative import NegativeEmbedding, reward_through_negative


@torch.no_grad()
def eps_of_arms(
    prior: Prior,
    t: int,
    x_t: dict[str, Float[Tensor, "N B C h w"]],
    y: Float[Tensor, "B L D"],
    n: dict[str, Float[Tensor, "B L D"]],
    cameras: Float[Tensor, "B 16"] | None = None,
) -> dict[str, tuple[Float[Tensor, "N B C h w"], Float[Tensor, "N B C h w"]]]:
    """(eps_y, eps_n) of every arm, all in one forward. N may differ between arms; B is shared."""
    rows, conditions = [], []
    for name, x in x_t.items():
        for cond in (y, n[name]):
            rows.append(x.flatten(0, 1))
            conditions.append(cond.repeat(len(x), 1, 1))
    total = sum(map(len, rows))
    cameras = None if cameras is None else cameras.repeat(total // len(cameras), 1)
    eps = iter(prior.eps(torch.cat(rows), t, torch.cat(conditions), cameras).split([len(row) for row in rows]))
    answers = {}
    for name, x in x_t.items():
        eps_y = next(eps).view_as(x)
        eps_n = next(eps).view_as(x)
        answers[name] = (eps_y, eps_n)
    return answers


def score_noises(
    decode: Decode, reward: Reward, x_0: Float[Tensor, "N B C h w"], prompts: list[str]
) -> Float[Tensor, "N B"]:
    """r(y_b, decode(x_0[n, b])) for every noise n and sample b; differentiable. A mixture learns its scales here."""
    images = decode(x_0.flatten(0, 1)).float()
    every = prompts * len(x_0)
    return reward.rank(images, every, len(x_0)).view(x_0.shape[:2])


def update_negative(
    prior: Prior,
    score: Score,
    negative: NegativeEmbedding,
    p: Predictions,
    guided: Guided,
    gamma: float,
    t: int,
    step: int,
    cameras: Float[Tensor, "B 16"] | None = None,
) -> None:
    """One ascent step of n (eq. 13) at the winner; nothing is computed where its rate is zero.

    The objective is the sum over independent runs and the mean over the views of one, which share an n.
    """
    if negative.lr(step) == 0:
        return
    x_t, eps_y = pick(p.x_t, guided.winner), pick(p.eps_y, guided.winner)
    runs = len(negative.value)

    def objective(n: Float[Tensor, "S L D"]) -> Float[Tensor, ""]:
        return runs * reward_through_negative(
            n, x_t, eps_y, p.alpha_t, p.sigma_t, gamma,
            eps=lambda x, cond: prior.eps(x, t, cond.expand(len(x), -1, -1), cameras),
            reward=lambda x_0: score(x_0[None])[0],
        )  # fmt: skip

    negative.update(objective, step)
