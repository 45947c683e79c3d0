"""The image mode's table: eight arms over held-out prompts and seeds."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from psd.bench.paired import Column, Job, Pictures
from psd.config import RunConfig
from psd.contracts import Models
from psd.distil import distil
from psd.models.priors import load_prior
from psd.models.rewards import load_reward
from psd.modes.image import ImageStage
from psd.toybox import world
from psd.toybox.evaluate import facts_of

PRESET, PROMPTS, SEEDS, BATCH = "toybox-image", 40, 3, 15
SHEET_COLUMNS, SHOWN_EVERY = 10, 1
PLAIN = "DDIM (plain arm)"
COLUMNS = {
    "target": Column("target reward", 2),
    "judge": Column("held-out judge", 2),
    "facts": Column("facts right (%)", 1),
    "all_facts": Column("all facts right (%)", 1),
}


def rows_of(config: RunConfig) -> dict[str, RunConfig]:
    """The table's rows: `config` is full PSD, every other arm is it with something taken away or exchanged."""
    no_negative = replace(config, negative_lr=0.0)
    return {
        PLAIN: replace(config, method="sds"),
        "score distillation with Adam, no preference": replace(config, method="sds", update="adam"),
        "winner selection alone": replace(no_negative, pref_weight=0.0),
        "delta_pref, paper's form": replace(no_negative, pref_form="paper"),
        "delta_pref, centred": replace(no_negative, pref_form="centred"),
        "negative embedding alone": replace(config, method="negative"),
        "full PSD, paper's form": replace(config, pref_form="paper"),
        "full PSD, centred": replace(config, pref_form="centred"),
    }


@torch.no_grad()
def make(config: RunConfig, device: str, jobs: list[Job]) -> list[Pictures]:
    """The jobs at once; how many does not change the results."""
    prompts, seeds = [world.caption(scene) for scene, _ in jobs], [seed for _, seed in jobs]
    stage = distilled(config, rows_of(config), device, prompts, seeds)
    images = {name: stage.pictures(name) for name in stage.arms}
    return [{name: images[name][job, None] for name in images} for job in range(len(jobs))]


def distilled(
    config: RunConfig, arms: dict[str, RunConfig], device: str, prompts: list[str], seeds: list[int]
) -> ImageStage:
    """A batch of independent runs of these arms, at their end. Raises RuntimeError where one breaks down."""
    prior = load_prior(config.prior, device)
    stage = ImageStage(config, arms, Models(prior, load_reward(config.reward, device), prior.decode), prompts, seeds)
    for state in distil(prior, stage):
        if state.failure:
            raise RuntimeError(state.failure)
    return stage


def seen_in(image: Float[Tensor, "1 3 S S"], scene: world.Scene) -> dict[str, float]:
    """facts: of those stated, which hold; all_facts: whether all do. In %."""
    held = list(facts_of(image, [scene])[0].values())
    return {"facts": 100 * float(np.mean(held)), "all_facts": 100.0 * all(held)}


def costs(config: RunConfig, device: str) -> dict[str, dict[str, str]]:
    return {"seconds": {name: f"{seconds_of(arm, device):.1f}" for name, arm in rows_of(config).items()}}


def seconds_of(config: RunConfig, device: str, repeats: int = 3) -> float:
    """Median seconds of one image, this arm alone, models warm."""
    times = []
    for seed in range(repeats):
        started = time.perf_counter()
        distilled(config, {"with": config}, device, ["a red mushroom with a white stem"], [seed])
        times.append(time.perf_counter() - started)
    return statistics.median(times)
