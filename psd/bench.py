"""Does it work? `python -m psd.bench image`: held-out prompts x seeds over every arm, the README's table.

All arms share starting noise, timesteps and noises, so that differences are paired. Intervals are 95 % bootstraps over
prompts (seeds of one prompt are not independent).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from psd.config import RunConfig
from psd.image import distil_image, scorer
from psd.priors import load_prior
from psd.rewards import load_reward
from psd.toybox import world
from psd.toybox.evaluate import facts_of

PROMPT_SEED = 92  # held-out scenes of the table; defaults were tuned on others (93)
PLAIN = "DDIM (plain arm)"
COLUMNS = {
    "target": "target reward",
    "judge": "held-out judge",
    "facts": "facts right (%)",
    "all_facts": "all facts right (%)",
}


def image_arms(config: RunConfig) -> dict[str, RunConfig]:
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


def heldout_scenes(count: int, seed: int = PROMPT_SEED) -> list[world.Scene]:
    return [world.sample_scene(np.random.default_rng([seed, i]), heldout=True) for i in range(count)]


Job = tuple[world.Scene, int]  # a scene and a seed


def run_arms(
    config: RunConfig,
    arms: dict[str, RunConfig],
    scenes: list[world.Scene],
    seeds: int,
    device: str,
    batch: int,
    workers: int = 1,
) -> dict[str, dict[str, Float[np.ndarray, "P S"]]]:
    """arm -> column -> value for every prompt and seed. On a CPU, processes of one thread use the cores best."""
    from tqdm.auto import tqdm

    jobs = [(scene, seed) for scene in scenes for seed in range(seeds)]
    parts = [jobs[start : start + batch] for start in range(0, len(jobs), batch)]
    work = partial(run_batch, config, arms, device)
    if workers > 1:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
            answers = list(tqdm(pool.map(work, parts), total=len(parts), unit="batch"))
    else:
        answers = [work(part) for part in tqdm(parts, unit="batch")]
    shape = (len(scenes), seeds)
    return {
        name: {c: np.concatenate([answer[name][c] for answer in answers]).reshape(shape) for c in COLUMNS}
        for name in arms
    }


@torch.no_grad()
def run_batch(
    config: RunConfig, arms: dict[str, RunConfig], device: str, jobs: list[Job]
) -> dict[str, dict[str, list[float]]]:
    """arm -> column -> one value a job."""
    prior, target = load_prior(config.prior, device), load_reward(config.reward, device)
    judge = load_reward("toybox/judge", device)
    prompts = [world.caption(scene) for scene, _ in jobs]
    generators = [torch.Generator().manual_seed(seed) for _, seed in jobs]
    y, n_0 = prior.embed(prompts), prior.embed([config.negative_prompt] * len(jobs))
    for state in distil_image(prior, scorer(prior, target, prompts), y, n_0, arms, generators):
        x_c = state.x_c
    found = {}
    for name in arms:
        images = prior.decode(x_c[name])
        held = facts_of(images, [scene for scene, _ in jobs])
        found[name] = {
            "target": target(images, prompts).tolist(),
            "judge": judge(images, prompts).tolist(),
            "facts": [100 * float(np.mean(list(facts.values()))) for facts in held],
            "all_facts": [100.0 * all(facts.values()) for facts in held],
        }
    return found


def seconds_of(config: RunConfig, device: str, repeats: int = 3) -> float:
    """Median seconds of one image, this arm alone, models warm."""
    prior, reward = load_prior(config.prior, device), load_reward(config.reward, device)
    prompts = ["a red mushroom with a white stem"]
    times = []
    for seed in range(repeats):
        started = time.perf_counter()
        arms, generators = {"": config}, [torch.Generator().manual_seed(seed)]
        n_0 = prior.embed([config.negative_prompt])
        for _ in distil_image(prior, scorer(prior, reward, prompts), prior.embed(prompts), n_0, arms, generators):
            pass
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def interval(values: Float[np.ndarray, "P S"], draws: int = 4000) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap interval over prompts."""
    prompts = values.mean(1)
    rng = np.random.default_rng(0)
    means = prompts[rng.integers(len(prompts), size=(draws, len(prompts)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(prompts.mean()), float(low), float(high)


def table(found: dict[str, dict[str, np.ndarray]], seconds: dict[str, float]) -> str:
    """Markdown: means with intervals, and paired differences to the plain arm."""
    digits = {"target": 2, "judge": 2, "facts": 1, "all_facts": 1}
    lines = ["| arm | " + " | ".join(COLUMNS.values()) + " | seconds |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, columns in found.items():
        cells = []
        for column in COLUMNS:
            mean, low, high = interval(columns[column])
            cell = f"{mean:.{digits[column]}f} [{low:.{digits[column]}f}, {high:.{digits[column]}f}]"
            if name != PLAIN:
                mean, low, high = interval(columns[column] - found[PLAIN][column])
                cell += f"<br>{mean:+.{digits[column]}f} [{low:+.{digits[column]}f}, {high:+.{digits[column]}f}]"
            cells.append(cell)
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {seconds[name]:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["image"])
    parser.add_argument("--preset", default="toybox-image")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=None, help="instead of the preset's")
    parser.add_argument("--batch", type=int, default=15, help="runs at a time; does not change the results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, on a CPU")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench-image.json"), help="every single value")
    args = parser.parse_args()
    config = RunConfig.from_preset(args.preset, steps=args.steps)
    arms = image_arms(config)
    scenes = heldout_scenes(args.prompts)
    seconds = {name: seconds_of(arm, args.device) for name, arm in arms.items()}
    workers = args.workers if args.device == "cpu" else 1
    found = run_arms(config, arms, scenes, args.seeds, args.device, args.batch, workers)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    values = {name: {column: v.tolist() for column, v in columns.items()} for name, columns in found.items()}
    record = {
        "config": config.to_dict(),
        "prompts": [world.caption(s) for s in scenes],
        "values": values,
        "seconds": seconds,
    }
    args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(found, seconds))


if __name__ == "__main__":
    main()
