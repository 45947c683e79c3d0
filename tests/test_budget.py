"""Rows through each network in real runs, against the budget: what a step must cost and no more."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

from psd.bench.paired import load_models
from psd.budget import passes_of
from psd.config import ARMS, MODES, RunConfig, arms_of
from psd.contracts import Models
from psd.distil import distil
from psd.methods import METHODS, Passes

PRESETS = {"image": "toybox-image", "3d": "toybox-fast"}
STEPS = 4  # a period of the intervals below


class Counted:
    """Every row through the networks, by network and whether a gradient goes through it."""

    def __init__(self, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: Counter[str] = Counter()
        prior, reward = models.prior, models.reward
        monkeypatch.setattr(prior, "eps", self._counting("unet", prior.eps))
        monkeypatch.setattr(prior, "encode", self._counting("encode", prior.encode))
        monkeypatch.setattr(type(reward), "__call__", self._counting("reward", type(reward).__call__, at=1))
        self.models = models._replace(decode=self._counting("decode", models.decode))

    def _counting(self, name: str, network, at: int = 0):
        def counting(*inputs, **named):
            answer = network(*inputs, **named)
            self.rows[f"{name}_grad" if answer.requires_grad else name] += len(inputs[at])
            return answer

        return counting


@pytest.fixture
def models(request) -> Models:
    config = RunConfig.from_preset(PRESETS[request.param])
    return load_models(config, "cpu")


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("models", PRESETS, indirect=True)
def test_an_arm_sends_no_row_that_its_mathematics_does_not_ask_for(models: Models, arm: str, monkeypatch, request):
    """Over whole periods of the intervals; of the start, the first step of image mode, nothing is counted.

    What depends on t is a mean over a whole run, and is compared with one of a few steps.
    """
    mode = request.node.callspec.params["models"]
    by_t = callable(METHODS[arms_of(RunConfig(arms=arm))[arm].method].passes) and arm != "csd"
    intervals = dict(pref_interval=2, negative_interval=2, negative_lr=1e-3)
    intervals |= dict(inversion_steps=3, explore_steps=3, candidates=3)
    config = RunConfig.from_preset(
        PRESETS[mode], prompt="a red cube", steps=(1 if by_t else 8) * STEPS, arms=arm, **intervals
    )
    counted = Counted(models, monkeypatch)
    if mode == "3d":
        monkeypatch.setattr(counted.models.prior, "decode", counted.models.decode)
    arms = arms_of(config)
    states = distil(models.prior, MODES[mode].load()(config, arms, counted.models))
    if mode == "image":
        next(states)
    counted.rows.clear()
    steps = sum(1 for _ in (states if by_t else islice(states, STEPS)))
    states.close()
    samples = steps * models.prior.views
    per_sample = Passes(**{name: count / samples for name, count in counted.rows.items()})
    assert per_sample == (pytest.approx(passes_of(arms[arm]), rel=0.3) if by_t else passes_of(arms[arm]))


def test_what_a_step_does_now_and_then_counts_a_share():
    config = RunConfig.from_preset("toybox-image", pref_interval=2, negative_interval=3)
    assert passes_of(config) == pytest.approx(
        Passes(unet=3, unet_grad=1 / 6, decode=1, decode_grad=1 / 6, reward=1, reward_grad=1 / 6)
    )
    fixed = RunConfig.from_preset("toybox-image", negative_lr=0.0)
    assert passes_of(fixed).unet_grad == 0
