"""The image mode's table: every arm and three learning rates of n over held-out prompts and seeds."""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from psd.bench.paired import (
    COST_PROMPT,
    JUDGED,
    PARTS,
    RATES,
    Column,
    Job,
    Pictures,
    Rows,
    load_models,
    rows_of,
    run_to_end,
)
from psd.config import RunConfig
from psd.modes.image import ImageStage
from psd.toybox import world
from psd.toybox.evaluate import facts_of

PRESET, PROMPTS, SEEDS, BATCH = "toybox-image", 40, 3, 15
SHEET_COLUMNS, SHOWN_VIEWS = 10, 1
COLUMNS = JUDGED | {"facts": Column("facts right (%)", 1), "all_facts": Column("all facts right (%)", 1)}
EVERY_STEP = dict(pref_interval=1, negative_interval=1)  # the preset does half of it, at twice the rate
RATE = dict(negative_lr=2e-2)
ROWS: Rows = {
    "DDIM (plain arm)": ("without", {}),
    "score distillation with Adam, no preference": ("without", dict(update="adam")),
    **{
        title: (arm, EVERY_STEP | (RATE if arm == "negative-only" else {}) | beyond)
        for title, (arm, beyond) in PARTS.items()
    },
    "full PSD, paper's form": ("paper-form", EVERY_STEP | RATE),
    "full PSD, centred": ("with", EVERY_STEP | RATE),
    "full PSD, centred, every second step: the preset": ("with", {}),
    **{title: (arm, EVERY_STEP | beyond) for title, (arm, beyond) in RATES.items()},
}


@torch.no_grad()
def make(rows: Rows, config: RunConfig, device: str, jobs: list[Job]) -> list[Pictures]:
    """The jobs at once; how many does not change the results."""
    prompts, seeds = [world.caption(scene) for scene, _ in jobs], [seed for _, seed in jobs]
    stage = distilled(config, rows_of(config, rows), device, prompts, seeds)
    images = {name: stage.pictures(name) for name in stage.arms}
    return [{name: images[name][job, None] for name in images} for job in range(len(jobs))]


def distilled(
    config: RunConfig, arms: dict[str, RunConfig], device: str, prompts: list[str], seeds: list[int]
) -> ImageStage:
    """A batch of independent runs of these arms, at their end."""
    models = load_models(config, device)
    stage = ImageStage(config, arms, models, prompts, seeds)
    run_to_end(models.prior, stage)
    return stage


def seen_in(image: Float[Tensor, "1 3 S S"], scene: world.Scene) -> dict[str, float]:
    """facts: of those stated, which hold; all_facts: whether all do. In %."""
    held = list(facts_of(image, [scene])[0].values())
    return {"facts": 100 * float(np.mean(held)), "all_facts": 100.0 * all(held)}


def costs(rows: Rows, config: RunConfig, device: str) -> dict[str, dict[str, str]]:
    return {"seconds": {name: f"{seconds_of(arm, device):.1f}" for name, arm in rows_of(config, rows).items()}}


def seconds_of(config: RunConfig, device: str, repeats: int = 3) -> float:
    """Median seconds of one image, this arm alone, models warm."""
    times = []
    for seed in range(repeats):
        started = time.perf_counter()
        distilled(config, {"with": config}, device, [COST_PROMPT], [seed])
        times.append(time.perf_counter() - started)
    return statistics.median(times)
