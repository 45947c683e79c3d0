"""The image loop on exact priors: what it computes, how many forwards it takes, what switching things off gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from psd.config import FIELDS, RunConfig, arms_of, varied_name
from psd.contracts import Models
from psd.distil import distil
from psd.errors import RequestError
from psd.modes.image import ImageStage
from psd.run import generate
from psd.safety import check_request
from psd.schedule import NoiseSchedule, descending_timesteps
from tests.gaussian import OTHER, ExactPrior, PlainReward

CONFIG = RunConfig.from_preset(
    prompt="a longer prompt", negative_prompt="bad", steps=8, negative_lr=1e-2, pref_interval=1, negative_interval=1
)
SHAPE = (2, 3, 3)


@PlainReward
def score(images: Tensor, prompts: list[str]) -> Tensor:
    """Of latents, which the exact prior's pictures are."""
    assert len(images) == len(prompts)
    return images.mean((1, 2, 3)) * 3


class Seen(NamedTuple):
    """A state of the loop and what the stage held then."""

    t: int
    x_c: dict[str, Tensor]
    drift: dict[str, float]
    failure: str


def run(arms: dict[str, RunConfig], seeds=(0,), prior: ExactPrior | None = None, reward=score) -> list[Seen]:
    prior = prior or ExactPrior()
    models = Models(prior, reward, prior.decode)
    prompts = [CONFIG.prompt] * len(seeds)
    stage = ImageStage(next(iter(arms.values())), arms, models, prompts, list(seeds))
    seen = []
    for state in distil(prior, stage):
        x_c = {name: latents.x_c for name, latents in stage.latents.items()}
        reports = {name: arm.method.report() for name, arm in stage.arms.items()}
        drift = {name: report["negative_drift"] for name, report in reports.items() if report}
        seen.append(Seen(state.t, x_c, drift, state.failure))
    return seen


def plain(config: RunConfig) -> RunConfig:
    return replace(config, method="sds")


def values(x_c: Tensor) -> Tensor:
    return score(x_c, [""] * len(x_c))


@pytest.mark.parametrize(("device", "rows"), [("cpu", [4, 2]), ("meta", [6])])
def test_forward_passes(device: str, rows: list[int], monkeypatch: pytest.MonkeyPatch):
    """(2 noises + 1 noise) x (y, n) rows a step, in one forward or on a CPU one an arm; one with gradient per update of
    n. The start is shared by both arms."""
    prior = ExactPrior()
    monkeypatch.setattr("psd.distil.apart", lambda prior: device == "cpu")
    run({"with": CONFIG, "without": plain(CONFIG)}, prior=prior)
    assert prior.plain_rows == [2] + rows * 7
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
    gain = values(last.x_c["with"]) - values(last.x_c["without"])
    assert gain.mean() > 4 * gain.std() / 8  # significantly


def test_the_negative_embedding_alone_raises_the_reward_and_drifts():
    last = run({"with": replace(CONFIG, method="negative"), "without": plain(CONFIG)}, seeds=range(16))[-1]
    assert (values(last.x_c["with"]) > values(last.x_c["without"])).all()
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


@pytest.mark.parametrize("update", ["ddim", "adam"])
def test_an_overflow_leaves_the_last_good_state(update: str):
    """Also with Adam, which moves its parameter in place."""

    class Breaks(ExactPrior):
        def eps(self, *args) -> Tensor:
            return super().eps(*args) * (float("nan") if len(self.plain_rows) == 5 else 1.0)

    states = run({"with": replace(CONFIG, update=update, negative_lr=0.0)}, prior=Breaks())
    assert [state.failure for state in states[:-1]] == [""] * 4
    assert states[-1].failure == "Stopped at step 5: numbers overflowed; lower gamma, pref_weight or lr."
    assert torch.equal(states[-1].x_c["with"], states[-2].x_c["with"]) and torch.isfinite(states[-1].x_c["with"]).all()
    good = run({"with": replace(CONFIG, update=update, negative_lr=0.0)})
    assert torch.equal(states[-1].x_c["with"], good[3].x_c["with"])


def test_weights_that_are_no_numbers_are_said_at_the_start():
    class Broken(ExactPrior):
        def eps(self, *args) -> Tensor:
            return super().eps(*args) * float("nan")

    with pytest.raises(RequestError, match=r"^The first prediction of exact is not a number"):
        run({"with": CONFIG}, prior=Broken())


def test_scores_that_are_no_numbers_leave_plain_steps():
    @PlainReward
    def mute(images: Tensor, prompts: list[str]) -> Tensor:
        return images.mean((1, 2, 3)) * float("nan")

    config = replace(CONFIG, negative_lr=0.0)
    states = run({"with": config, "without": plain(config)}, reward=mute)
    assert torch.equal(states[-1].x_c["with"], states[-1].x_c["without"])


@pytest.mark.parametrize("name", [name for name, setting in FIELDS.items() if setting.varies in ("any", "image")])
def test_a_number_that_varies_acts_on_its_own_arm_as_in_a_run_alone(name: str):
    config = replace(CONFIG, update="adam", arms="with", vary=f"{name}: {OTHER[name]}")
    arms, varied = arms_of(config), varied_name(name, OTHER[name])
    beside, alone = run(arms)[-1].x_c, run({"alone": arms[varied]})[-1].x_c["alone"]
    assert torch.equal(beside[varied], alone)
    assert not torch.equal(beside[varied], beside["with"])


def test_a_picture_to_start_from_is_what_is_changed(tmp_path: Path):
    """At a small t_max the result is the picture, at a large one something else; the arms still differ."""
    settings = dict(prompt="a green lamp", steps=4, arms="with, without", fast_decoder=True)
    *_, drawn = generate(RunConfig(**settings | dict(prompt="a red cube")), tmp_path)
    given = drawn.arms["without"].picture

    def distance(t_max: float) -> float:
        *_, last = generate(RunConfig(**settings, start=str(given), t_max=t_max), tmp_path)
        assert last.remarks[0].startswith("Started from a picture")
        pictures = [np.array(Image.open(path).convert("RGB"), float) for path in (given, last.arms["without"].picture)]
        assert last.arms["with"].picture.read_bytes() != last.arms["without"].picture.read_bytes()
        return float(np.abs(pictures[0] - pictures[1]).mean())

    assert distance(0.05) < 0.3 * distance(0.98)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(start="/nowhere/a.png"), "image 'a.png' is not a file"),
        (dict(start=__file__), "cannot be read"),
        (
            dict(start=__file__, mode="3d", prior="toybox/mvdream"),
            "start .* is not a safetensors file: give an ARM_field",
        ),
    ],
)
def test_a_start_that_cannot_be_is_refused(settings: dict, sentence: str):
    with pytest.raises(RequestError, match=sentence):
        check_request(RunConfig(prompt="a red cube", **settings), allow_local=True)


def test_a_stranger_starts_from_an_upload_alone(tmp_path: Path):
    with pytest.raises(RequestError, match="start must be an upload"):
        check_request(RunConfig(prompt="a red cube", start=__file__), uploads=tmp_path)
