"""The image loop on exact priors: what it computes, how many forwards it takes, what switching things off gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from psd.config import RunConfig
from psd.image import ImageStep, distil_image
from psd.schedule import NoiseSchedule, descending_timesteps
from tests.gaussian import ExactPrior

CONFIG = RunConfig.from_preset(prompt="x", steps=8, negative_lr=1e-2)
SHAPE = (2, 3, 3)


def score(x_0: Float[Tensor, "N B C h w"]) -> Float[Tensor, "N B"]:
    return x_0.mean((2, 3, 4)) * 3


def run(arms: dict[str, RunConfig], seeds=(0,), prior: ExactPrior | None = None) -> list[ImageStep]:
    prior = prior or ExactPrior()
    y = prior.embed(["a longer prompt"] * len(seeds))
    n_0 = prior.embed(["bad"] * len(seeds))
    return list(distil_image(prior, score, y, n_0, arms, [torch.Generator().manual_seed(s) for s in seeds]))


def plain(config: RunConfig) -> RunConfig:
    return replace(config, method="sds")


def test_forward_passes():
    """N batched forwards; (2 noises + 1 noise) x (y, n) rows in each; one more with gradient per update of n."""
    prior = ExactPrior()
    run({"with": CONFIG, "without": plain(CONFIG)}, prior=prior)
    assert prior.plain_rows == [2] + [6] * 7  # the start is shared by both arms
    assert prior.gradient_rows == [1] * 7


def test_intervals_save_forwards():
    prior = ExactPrior()
    run({"with": replace(CONFIG, pref_interval=2, negative_interval=2)}, prior=prior)
    assert prior.plain_rows == [2, 4, 2, 4, 2, 4, 2, 4]
    assert len(prior.gradient_rows) == 2


def test_a_fixed_negative_embedding_costs_nothing():
    prior = ExactPrior()
    run({"with": replace(CONFIG, negative_lr=0.0)}, prior=prior)
    assert prior.gradient_rows == []


def test_without_preference_it_is_ddim():
    """Step by step: x_t = alpha x0_hat + sigma eps~ at the next timestep, the closed DDIM formula."""
    prior = ExactPrior()
    states = run({"without": plain(CONFIG)}, prior=prior)
    schedule = NoiseSchedule(prior.alphas_cumprod)
    x_t = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))[None]
    timesteps = descending_timesteps(CONFIG.steps, CONFIG.t_max, CONFIG.t_min).tolist()
    y, n = prior.embed(["a longer prompt"]), prior.embed(["bad"])
    for i, t in enumerate(timesteps):
        eps_y, eps_n = prior.eps(x_t, t, y), prior.eps(x_t, t, n)
        eps = eps_n + CONFIG.gamma * (eps_y - eps_n)
        x_0 = (x_t - schedule.sigma_t(t) * eps) / schedule.alpha_t(t)
        torch.testing.assert_close(states[i].x_c["without"], x_0, rtol=1e-4, atol=1e-4)
        if i + 1 < len(timesteps):
            x_t = schedule.alpha_t(timesteps[i + 1]) * x_0 + schedule.sigma_t(timesteps[i + 1]) * eps


@pytest.mark.parametrize("update", ["ddim", "adam"])
@pytest.mark.parametrize("pair", ["ddim", "independent"])
def test_preference_switched_off_is_the_plain_arm_bit_for_bit(update: str, pair: str):
    config = replace(CONFIG, update=update, pair=pair)
    states = run({"with": plain(config), "without": plain(config)})
    alone = run({"without": plain(config)})
    beside = run({"with": config, "without": plain(config)})
    assert torch.equal(states[-1].x_c["with"], states[-1].x_c["without"])
    assert torch.equal(states[-1].x_c["without"], alone[-1].x_c["without"])
    assert torch.equal(states[-1].x_c["without"], beside[-1].x_c["without"])


def test_preference_raises_the_reward():
    config = replace(CONFIG, negative_lr=0.0)
    last = run({"with": config, "without": plain(config)}, seeds=range(64))[-1]
    gain = score(last.x_c["with"][None]) - score(last.x_c["without"][None])
    assert gain.mean() > 4 * gain.std() / 8  # significantly


def test_the_negative_embedding_alone_raises_the_reward_and_drifts():
    last = run({"with": replace(CONFIG, method="negative"), "without": plain(CONFIG)}, seeds=range(16))[-1]
    assert (score(last.x_c["with"][None]) > score(last.x_c["without"][None])).all()
    assert last.drift["with"] > 0
    assert "without" not in last.drift


def test_same_seed_same_bits_and_a_batch_is_its_samples():
    arms = {"with": CONFIG, "without": plain(CONFIG)}
    first, second = run(arms, seeds=(5, 6))[-1], run(arms, seeds=(5, 6))[-1]
    assert torch.equal(first.x_c["with"], second.x_c["with"])
    assert not torch.equal(first.x_c["with"][0], first.x_c["with"][1])
    alone = run(arms, seeds=(6,))[-1]
    for name in arms:
        torch.testing.assert_close(first.x_c[name][1:], alone.x_c[name], rtol=1e-4, atol=1e-4)


def test_the_time_shift_moves_the_timesteps():
    shifted = run({"with": replace(CONFIG, time_shift_low=0.0, time_shift_high=0.1)})
    straight = run({"with": CONFIG})
    offsets = [a.t - b.t for a, b in zip(shifted, straight)]
    assert offsets[0] == 0
    assert len(set(offsets[1:])) > 3
    assert all(0 <= offset <= 100 for offset in offsets)
