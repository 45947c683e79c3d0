"""The 3D mode's table: every arm and three learning rates of n, each object judged from twelve sides."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

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
from psd.events import Preview
from psd.models.hub import Source
from psd.modes import pictures
from psd.modes.object import ObjectStage
from psd.run import generate
from psd.scene.cameras import Cameras
from psd.toybox import world
from psd.toybox.classifier import load_attributes
from psd.toybox.facts import GROUPS, check_facts, kind_right, read_facts
from psd.toybox.pairs import to_pixels
from psd.toybox.views import draw_views

PRESET, PROMPTS, SEEDS, BATCH = "toybox-fast", 20, 2, 1
SHEET_COLUMNS, SHOWN_VIEWS = 4, pictures.SIDES
TRUTH = "the world's own object"  # what the classifier and the rewards make of the real thing: no run can ask for more
COLUMNS = JUDGED | {
    "kind": Column("right kind (%)", 1),
    "kind_views": Column("views with the right kind (%)", 1),
    "facts": Column("facts right (%)", 1),
    "consistency": Column("views of one kind (%)", 1),
}
ROWS: Rows = {
    "without preference": ("without", {}),
    **PARTS,
    "full PSD": ("with", {}),
    **RATES,
}


def make(rows: Rows, config: RunConfig, device: str, jobs: list[Job]) -> list[Pictures]:
    """The jobs one after the other, their arms in lockstep, and the world's own object from the same cameras."""
    models, made = load_models(config, device), []
    for scene, seed in jobs:
        run = replace(config, prompt=world.caption(scene), seed=seed)
        stage = ObjectStage(run, rows_of(run, rows), models)
        run_to_end(models.prior, stage)
        seen = {name: stage.scored(name)[0] for name in stage.arms}
        cameras = pictures.scored_cameras(stage.frame)
        made.append(seen | {TRUTH: true_views(scene, seed, cameras, models.prior.image_size).to(device)})
    return made


def true_views(scene: world.Scene, seed: int, cameras: Cameras, size: int) -> Float[Tensor, "V 3 S S"]:
    """One instance of the scene, as the toybox draws it, from `cameras`; in [0, 1]."""
    images = draw_views(scene, np.random.default_rng(seed), cameras.c2w.cpu().numpy(), size, float(cameras.fovy_deg[0]))
    return to_pixels(images, torch.device("cpu"))


def seen_in(views: Float[Tensor, "V 3 H W"], scene: world.Scene) -> dict[str, float]:
    """What the classifier of single views reads of an object, in %.

    kind         whether the kinds are right that all views together say (mean log-probability)
    kind_views   of views whose own kinds are right
    facts        of single stated facts in single views
    consistency  of views that show the most frequent kinds
    """
    log_probs = load_attributes(str(views.device), Source("toybox/views"))(views)
    log_probs = {group: log_probs[group] for group in GROUPS}
    seen = [read_facts(log_probs, row) for row in range(len(views))]
    held = [check_facts(scene, facts) for facts in seen]
    together = read_facts({group: log_p.mean(0, keepdim=True) for group, log_p in log_probs.items()}, 0)
    kinds = [frozenset((facts["kind_a"], facts["kind_b"])) for facts in seen]
    return {
        "kind": 100.0 * kind_right(check_facts(scene, together)),
        "kind_views": 100 * float(np.mean([kind_right(facts) for facts in held])),
        "facts": 100 * float(np.mean([ok for facts in held for ok in facts.values()])),
        "consistency": 100 * max(map(kinds.count, kinds)) / len(kinds),
    }


class Cost(NamedTuple):
    seconds: float  # from the call to the last file, loading included
    first_preview_s: float
    peak_mb: float  # resident memory of the whole process


def costs(rows: Rows, config: RunConfig, device: str) -> dict[str, dict[str, str]]:
    """What each arm costs alone in a fresh process; printed: the compare run of the page."""
    config = replace(config, prompt=COST_PROMPT)
    cost_of = {name: cost(replace(arm, arms="with"), device) for name, arm in rows_of(config, rows).items()}
    print("compare run:", cost(replace(config, arms="with, without"), device))
    return {
        "seconds": {name: f"{each.seconds:.0f}" for name, each in cost_of.items()},
        "first preview (s)": {name: f"{each.first_preview_s:.1f}" for name, each in cost_of.items()},
        "peak memory (GB)": {name: f"{each.peak_mb / 1000:.1f}" for name, each in cost_of.items()},
    }


def cost(config: RunConfig, device: str) -> Cost:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(cost_here, config, device).result()


def cost_here(config: RunConfig, device: str) -> Cost:
    started, first_preview = time.perf_counter(), 0.0
    with TemporaryDirectory() as folder:
        for event in generate(config, Path(folder), device):
            if isinstance(event, Preview) and not first_preview:
                first_preview = time.perf_counter() - started
    unit = 1e6 if sys.platform == "darwin" else 1e3  # bytes there, KB elsewhere
    return Cost(time.perf_counter() - started, first_preview, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)
