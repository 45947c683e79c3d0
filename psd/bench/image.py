"""The image mode's table: eight arms over held-out prompts and seeds."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from psd.bench.paired import Column, Job, Values, save_picture
from psd.config import RunConfig
from psd.image import distil_image, scorer
from psd.priors import load_prior
from psd.rewards import load_reward
from psd.toybox import world
from psd.toybox.evaluate import facts_of

PRESET, PROMPTS, SEEDS, BATCH = "toybox-image", 40, 3, 15
SHEET_COLUMNS = 1
PLAIN = "DDIM (plain arm)"
COLUMNS = {
    "target": Column("target reward", 2),
    "judge": Column("held-out judge", 2),
    "facts": Column("facts right (%)", 1),
    "all_facts": Column("all facts right (%)", 1),
}


def arms_of(config: RunConfig) -> dict[str, RunConfig]:
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
def run_batch(config: RunConfig, device: str, pictures: Path, jobs: list[Job]) -> Values:
    """The jobs at once; how many does not change the results. Their arms' pictures go side by side to `pictures`."""
    prior, target = load_prior(config.prior, device), load_reward(config.reward, device)
    judge, arms = load_reward("toybox/judge", device), arms_of(config)
    prompts = [world.caption(scene) for scene, _ in jobs]
    generators = [torch.Generator().manual_seed(seed) for _, seed in jobs]
    y, n_0 = prior.embed(prompts), prior.embed([config.negative_prompt] * len(jobs))
    for state in distil_image(prior, scorer(prior.decode, target, prompts), y, n_0, arms, generators):
        x_c = state.x_c
    found, shown = {}, []
    for name in arms:
        images = prior.decode(x_c[name])
        shown.append(images)
        held = facts_of(images, [scene for scene, _ in jobs])
        found[name] = {
            "target": target(images, prompts).tolist(),
            "judge": judge(images, prompts).tolist(),
            "facts": [100 * float(np.mean(list(facts.values()))) for facts in held],
            "all_facts": [100.0 * all(facts.values()) for facts in held],
        }
    for job, row in zip(jobs, zip(*shown)):
        save_picture(pictures, job, torch.cat(row, -1))
    return found


def costs(config: RunConfig, device: str) -> dict[str, dict[str, str]]:
    return {"seconds": {name: f"{seconds_of(arm, device):.1f}" for name, arm in arms_of(config).items()}}


def seconds_of(config: RunConfig, device: str, repeats: int = 3) -> float:
    """Median seconds of one image, this arm alone, models warm."""
    prior, reward = load_prior(config.prior, device), load_reward(config.reward, device)
    prompts = ["a red mushroom with a white stem"]
    times = []
    for seed in range(repeats):
        started = time.perf_counter()
        arms, generators = {"": config}, [torch.Generator().manual_seed(seed)]
        n_0, score = prior.embed([config.negative_prompt]), scorer(prior.decode, reward, prompts)
        for _ in distil_image(prior, score, prior.embed(prompts), n_0, arms, generators):
            pass
        times.append(time.perf_counter() - started)
    return statistics.median(times)
