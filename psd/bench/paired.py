"""What every table is made of: rows, the same jobs for every row, means with intervals, paired differences.

All rows of a job share their random numbers, so that differences are paired. Intervals are 95 % bootstraps over prompts
(seeds of one prompt are not independent). A job's pictures are written to a file and judged as they are there: what is
slow to make can be judged again, by a later reward or classifier.
"""

from __future__ import annotations

import json
import multiprocessing
import textwrap
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from psd.config import RunConfig, arms_of
from psd.contracts import Models, Prior, Stage
from psd.distil import distil
from psd.export import PNG_KEY, export_png, to_json, to_uint8
from psd.models.rewards import load_reward
from psd.run import load
from psd.toybox import world
from psd.toybox.instruments import load_instruments
from psd.toybox.pairs import to_pixels
from psd.toybox.pictures import LABEL_PX, sheet
from psd.toybox.taste import AXES

COST_PROMPT = "a red mushroom with a white stem"
NAMES_PX, NAMES_CHARS = 104, 15  # beside a contact sheet
NEGATIVE_RATES = (1e-3, 4e-2, 1e-1)  # of n: the paper's Fig. 3; at the largest the reward is hacked


class Column(NamedTuple):
    title: str
    digits: int
    short: bool = False  # of a change only its size in standard deviations, with a star for p < 0.05, two for p < 0.001


# What every table measures: the rewards' means, and the instruments' axes of taste.
JUDGED = {"target": Column("target reward", 2), "judge": Column("held-out judge", 2)} | {
    axis: Column(axis, 2, short=True) for axis in AXES
}

Rows = dict[str, tuple[str, dict[str, Any]]]  # title -> a name of psd.presets.ARMS, and settings beyond that arm's
# The parts of full PSD, each alone, and its n at each rate: in every table.
PARTS: Rows = {
    "winner selection alone": ("selection", {}),
    "delta_pref, paper's form": ("no-negative", dict(pref_form="paper")),
    "delta_pref, centred": ("no-negative", dict(pref_form="centred")),
    "negative embedding alone": ("negative-only", {}),
}
RATES: Rows = {f"full PSD, n at {rate:g}": ("with", dict(negative_lr=rate)) for rate in NEGATIVE_RATES}
Keep = Literal["none", "same", "all"]  # of an earlier run's pictures: those of the same settings, or whatever is there
Job = tuple[world.Scene, int]  # a scene and a seed
Pictures = dict[str, Float[Tensor, "V 3 S S"]]  # title -> one image, or an object's views, in [0, 1]
Values = dict[str, dict[str, list[float]]]  # title -> column -> one value a job
Found = dict[str, dict[str, Float[np.ndarray, "P S"]]]  # title -> column -> value of every prompt and seed


def rows_of(config: RunConfig, rows: Rows) -> dict[str, RunConfig]:
    """Title -> what is run in that row, where `config` is full PSD."""
    arms = arms_of(replace(config, arms=", ".join(arm for arm, _ in rows.values())))
    return {title: replace(arms[arm], arms=config.arms, **beyond) for title, (arm, beyond) in rows.items()}


def load_models(config: RunConfig, device: str) -> Models:
    return load(config, device)[0]


def run_to_end(prior: Prior, stage: Stage) -> None:
    """All steps of all arms. Raises RuntimeError where one breaks down: its pictures are no answer of the method."""
    for state in distil(prior, stage):
        if state.failure:
            raise RuntimeError(state.failure)


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


def run_batch(
    make: Callable[[Rows, RunConfig, str, list[Job]], list[Pictures]],
    seen_in: Callable[[Float[Tensor, "V 3 S S"], world.Scene], dict[str, float]],
    rows: Rows,
    config: RunConfig,
    device: str,
    folder: Path,
    keep: Keep,
    jobs: list[Job],
) -> Values:
    """Make the jobs' pictures, but for those in `folder` that `keep` spares, and judge all of them: rewards' means
    and what `seen_in` says."""
    made_by = {"config": config.to_dict(), "rows": rows}
    missing = [job for job in jobs if keep == "none" or not kept(folder, job, made_by, keep)]
    for job, pictures in zip(missing, make(rows, config, device, missing) if missing else [], strict=True):
        save_pictures(folder, job, pictures, made_by)
    rewards = {"target": load_reward(config.reward, device), "judge": load_reward("toybox/judge", device)}
    instruments = load_instruments(device)
    found = {}
    for job in jobs:
        prompt = world.caption(job[0])
        for name, images in load_pictures(folder, job).items():
            views = to_pixels(images, torch.device(device))
            with torch.no_grad():
                values = {
                    column: score(views, [prompt] * len(views)).mean().item() for column, score in rewards.items()
                }
                values |= dict(zip(instruments.axes, instruments(views).mean(0).tolist()))
                values |= seen_in(views, job[0])
            for column, value in values.items():
                found.setdefault(name, {}).setdefault(column, []).append(value)
    return found


def file_of(folder: Path, job: Job) -> Path:
    scene, seed = job
    return folder / f"{world.caption(scene).replace(' ', '-')}-{seed}.png"


def kept(folder: Path, job: Job, made_by: dict[str, Any], keep: Keep) -> bool:
    """Whether the job's pictures stay. Raises ValueError where `keep` is "same" and other settings made them."""
    file = file_of(folder, job)
    if keep == "all" or not file.exists():
        return keep == "all"
    with Image.open(file) as picture:
        earlier = json.loads(picture.text[PNG_KEY]).get("made_by")
    if earlier != json.loads(to_json(made_by)):
        raise ValueError(f"{file} was made by other settings: name another --output")
    return True


def save_pictures(folder: Path, job: Job, pictures: Pictures, made_by: dict[str, Any]) -> None:
    """One PNG: a row an arm, a column a view."""
    rows = torch.cat([torch.cat(list(views), -1) for views in pictures.values()], -2)
    settings = {"prompt": world.caption(job[0]), "seed": job[1], "arms": list(pictures), "made_by": made_by}
    export_png(file_of(folder, job), to_uint8(rows), settings)


def load_pictures(folder: Path, job: Job) -> dict[str, UInt8[np.ndarray, "V S S 3"]]:
    """arm -> pictures; raises FileNotFoundError where the job was not run."""
    with Image.open(file_of(folder, job)) as picture:
        arms, image = json.loads(picture.text[PNG_KEY])["arms"], np.array(picture)
    size = len(image) // len(arms)
    tiles = image.reshape(len(arms), size, -1, size, 3).swapaxes(1, 2)
    return dict(zip(arms, tiles))


def contact_sheet(folder: Path, scenes: list[world.Scene], columns: int, views: int) -> Image.Image:
    """Every scene's arms of seed 0, one below the other, named, in order: nothing is picked. The first `views`."""
    shown, names = [], []
    for scene in scenes:
        pictures = load_pictures(folder, (scene, 0))
        names = list(pictures)
        shown.append(np.concatenate([np.concatenate(list(seen[:views]), 1) for seen in pictures.values()]))
    page = sheet(shown, [world.caption(scene) for scene in scenes], columns)
    return beside_names(page, names, len(shown[0]) // len(names))


def beside_names(page: Image.Image, names: list[str], height: int) -> Image.Image:
    """A contact sheet with what each row of `height` px shows to its left, in every block of rows."""
    wide = Image.new("RGB", (NAMES_PX + page.width, page.height), "white")
    wide.paste(page, (NAMES_PX, 0))
    draw, font, block = ImageDraw.Draw(wide), ImageFont.load_default(size=12), len(names) * height + LABEL_PX
    for top in range(0, page.height, block):
        for row, name in enumerate(names):
            text = "\n".join(textwrap.wrap(name, NAMES_CHARS))
            at = (NAMES_PX - 6, top + (row + 0.5) * height)
            draw.text(at, text, fill=(40, 40, 50), anchor="rm", align="right", font=font)
    return wide


def interval(values: Float[np.ndarray, "P S"], draws: int = 4000) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap interval over prompts."""
    prompts = values.mean(1)
    rng = np.random.default_rng(0)
    means = prompts[rng.integers(len(prompts), size=(draws, len(prompts)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(prompts.mean()), float(low), float(high)


def p_value(values: Float[np.ndarray, "P S"], draws: int = 20000) -> float:
    """Two-sided, that the mean is 0: the share of random signs of the prompts' means that reach as far."""
    prompts = values.mean(1)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (draws, len(prompts)))
    reached = np.abs(signs @ prompts) >= np.abs(prompts.sum()) * (1 - 1e-12)
    return float((reached.sum() + 1) / (draws + 1))


def change(values: Float[np.ndarray, "P S"], plain: Float[np.ndarray, "P S"], digits: int) -> str:
    """Paired difference with its interval, in standard deviations of the plain arm's values, and its p."""
    difference, spread = values - plain, plain.std()
    (mean, low, high), p = interval(difference), p_value(difference)
    sizes = [f"{mean / spread:+.2f} sd"] if spread > 0 else []
    sizes.append("p < 0.001" if p < 1e-3 else f"p = {p:.2g}")
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}] ({', '.join(sizes)})"


def short_change(values: Float[np.ndarray, "P S"], plain: Float[np.ndarray, "P S"]) -> str:
    """Paired difference in standard deviations of the plain arm's values, with the stars of a short Column."""
    p = p_value(values - plain)
    return (
        f"{(values - plain).mean() / max(plain.std(), 1e-12):+.2f} sd{' **' if p < 1e-3 else ' *' if p < 0.05 else ''}"
    )


def table(
    found: Found, columns: dict[str, Column], extra: dict[str, dict[str, str]], against: dict[str, str] | None = None
) -> str:
    """Markdown: means with intervals, paired differences, then `extra` (column -> row -> cell).

    `against`: row -> the row that it differs from; None: all from the first.
    """
    titles, first = ["arm", *(column.title for column in columns.values()), *extra], next(iter(found))
    against = dict.fromkeys(list(found)[1:], first) if against is None else against
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for arm, values in found.items():
        cells = []
        for name, (_, digits, short) in columns.items():
            mean, low, high = interval(values[name])
            cell = f"{mean:.{digits}f}" if short else f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
            if arm in against:
                plain = found[against[arm]][name]
                moved = short_change(values[name], plain) if short else change(values[name], plain, digits)
                cell += f"<br>{moved}"
            cells.append(cell)
        cells += [cell_of.get(arm, "") for cell_of in extra.values()]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)
