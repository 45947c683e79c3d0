"""What every table is made of: the same jobs for every arm, means with intervals, paired differences.

All arms of a job share their random numbers, so that differences are paired. Intervals are 95 % bootstraps over prompts
(seeds of one prompt are not independent).
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from psd.export import export_png, to_uint8
from psd.toybox import world
from psd.toybox.pictures import sheet

PROMPT_SEED = 92  # held-out scenes of the tables; defaults were tuned on others (93)


class Column(NamedTuple):
    title: str
    digits: int


Job = tuple[world.Scene, int]  # a scene and a seed
Values = dict[str, dict[str, list[float]]]  # arm -> column -> one value a job
Found = dict[str, dict[str, Float[np.ndarray, "P S"]]]  # arm -> column -> value of every prompt and seed


def heldout_scenes(count: int, seed: int = PROMPT_SEED) -> list[world.Scene]:
    return [world.sample_scene(np.random.default_rng([seed, i]), heldout=True) for i in range(count)]


def measure(
    run_batch: Callable[[list[Job]], Values], scenes: list[world.Scene], seeds: int, batch: int, workers: int
) -> Found:
    """Every scene with every seed, `batch` jobs at a time. On a CPU, processes of one thread use the cores best."""
    from tqdm.auto import tqdm

    jobs = [(scene, seed) for scene in scenes for seed in range(seeds)]
    parts = [jobs[start : start + batch] for start in range(0, len(jobs), batch)]
    if workers > 1:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
            answers = list(tqdm(pool.map(run_batch, parts), total=len(parts), unit="batch"))
    else:
        answers = [run_batch(part) for part in tqdm(parts, unit="batch")]
    shape = (len(scenes), seeds)
    return {
        arm: {name: np.concatenate([answer[arm][name] for answer in answers]).reshape(shape) for name in columns}
        for arm, columns in answers[0].items()
    }


def picture_of(folder: Path, job: Job) -> Path:
    scene, seed = job
    return folder / f"{world.caption(scene).replace(' ', '-')}-{seed}.png"


def save_picture(folder: Path, job: Job, picture: Float[Tensor, "3 H W"]) -> None:
    export_png(picture_of(folder, job), to_uint8(picture), {"prompt": world.caption(job[0]), "seed": job[1]})


def contact_sheet(folder: Path, scenes: list[world.Scene], columns: int) -> Image.Image:
    """Every scene's picture of seed 0, in order: nothing is picked."""
    shown = [np.asarray(Image.open(picture_of(folder, (scene, 0)))) for scene in scenes]
    return sheet(shown, [world.caption(scene) for scene in scenes], columns)


def interval(values: Float[np.ndarray, "P S"], draws: int = 4000) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap interval over prompts."""
    prompts = values.mean(1)
    rng = np.random.default_rng(0)
    means = prompts[rng.integers(len(prompts), size=(draws, len(prompts)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(prompts.mean()), float(low), float(high)


def table(found: Found, columns: dict[str, Column], plain: str, extra: dict[str, dict[str, str]]) -> str:
    """Markdown: means with intervals, paired differences to the arm `plain`, then `extra` (title -> arm -> cell)."""
    titles = ["arm", *(column.title for column in columns.values()), *extra]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for arm, values in found.items():
        cells = []
        for name, (_, digits) in columns.items():
            mean, low, high = interval(values[name])
            cell = f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
            if arm != plain:
                mean, low, high = interval(values[name] - found[plain][name])
                cell += f"<br>{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
            cells.append(cell)
        cells += [cell_of.get(arm, "") for cell_of in extra.values()]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)
