"""What a front end shows of a run: `watch` while it goes, `load_result` of a folder once it stands still.

Shared by the page and the public API. Knows files, events and numbers; no components.
"""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import math
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image

from psd.config import ARMS, RunConfig, arm_names
from psd.errors import RequestError
from psd.events import Downloading, Finished, Preview, Started, Step
from psd.models.needs import fetch_models, missing_models
from psd.models.priors import load_prior
from psd.models.rewards import load_reward
from psd.models.rewards.table import REWARDS
from psd.run import BUDGET_SHARE, MODES, generate
from psd.ui import files

log = logging.getLogger(__name__)

SHOW_EVERY_S = 0.45
KEPT_PREVIEWS = 20
ON_ZERO_GPU = bool(os.environ.get("SPACES_ZERO_GPU"))
# Before this process has measured a run: seconds a step of one arm, and of the files of an arm; loading is apart.
STEP_S = {("toybox", "image"): 0.12, ("published", "image"): 0.4, ("toybox", "3d"): 0.25, ("published", "3d"): 0.5}
EXPORT_S = {"image": 0.2, "3d": 4.5}
LOAD_S = {"toybox": 1.0, "published": 20.0}
SECOND_ARM = 0.6  # the arms share one batch: the second costs less than the first
# What a step's time depends on: a run's estimate is measured on the last run that agrees in all of it.
WORK = ("prior", "reward", "arms", "method", "image_size", "pref_interval", "negative_interval", "field",
        "grid_size", "render_size", "render_size_end", "samples", "fast_decoder")  # fmt: skip
MAX_GPU_S = 120  # asked of ZeroGPU for one run at most; visitors have minutes a day
measured_step_s: dict[tuple, float] = {}


@dataclass(frozen=True)
class View:
    """A run at one moment. `rows` are the lines of metrics.csv so far."""

    config: RunConfig
    download: Downloading | None = None
    directory: Path | None = None
    step: Step | None = None
    preview: Path | None = None
    rows: tuple[dict[str, float], ...] = ()
    warnings: tuple[str, ...] = ()
    finished: bool = False


@dataclass(frozen=True)
class Result:
    """What a run's folder holds; a stopped run's folder holds less."""

    directory: Path
    settings: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Path] = field(default_factory=dict)  # arm -> PNG; of an object, its front
    models: dict[str, Path] = field(default_factory=dict)  # arm -> GLB, of objects
    videos: dict[str, Path] = field(default_factory=dict)  # arm -> turntable, of objects
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    rows: tuple[dict[str, float], ...] = ()
    files: tuple[Path, ...] = ()
    stopped: str = ""
    seconds: float = math.nan


def watch(config: RunConfig, allow_download: bool = False) -> Iterator[View]:
    """Run and yield a View at the start, at the first preview, at 1-2 Hz and at the end; closing it cancels the run."""
    view = View(config)
    yield view
    if ON_ZERO_GPU:
        if missing := missing_models(config):
            names = " and ".join(missing)
            raise RequestError(
                f"{names} must be downloaded first, which is no work for a GPU: Run on the page does it."
            )
        # The GPU is taken away when the declared time is over: stop before, with everything written.
        declared = float(gpu_seconds(config))
        config = replace(config, time_budget_s=min(config.time_budget_s or declared, declared))
    rows: list[dict[str, float]] = []
    shown_at = 0.0
    with contextlib.closing(generate(config, files.output_root(), allow_download=allow_download)) as events:
        for event in events:
            urgent = False
            match event:
                case Downloading():
                    view = replace(view, download=event)
                case Started():
                    view = replace(view, config=event.config, directory=event.directory, warnings=event.warnings)
                    urgent = True
                case Step():
                    rows.append({"step": event.step, **event.metrics})
                    view = replace(view, step=event)
                case Preview():
                    urgent = view.preview is None
                    view = replace(view, preview=write_preview(event, view.directory))
                case Finished():
                    note_speed(event.config, event.seconds, event.steps_done)
                    view = replace(view, finished=True)
                    urgent = True
            if urgent or time.monotonic() - shown_at >= SHOW_EVERY_S:
                shown_at = time.monotonic()
                yield replace(view, rows=tuple(rows))


def fetch(config: RunConfig, allow_download: bool) -> Iterator[View]:
    """Download the models that a run of `config` needs: a View at 1-2 Hz, none where everything is here.

    Apart from `watch`, so that on ZeroGPU no GPU second goes into it.
    """
    shown_at = 0.0
    for event in fetch_models(config, allow_download):
        if time.monotonic() - shown_at >= SHOW_EVERY_S:
            shown_at = time.monotonic()
            yield View(config, download=event)


def write_preview(preview: Preview, directory: Path) -> Path:
    """Save the tile inside the run's folder, under a new name: a page shows an unchanged URL's old picture."""
    folder = directory / "previews"
    folder.mkdir(exist_ok=True)
    path = folder / f"{preview.step:06d}.webp"
    Image.fromarray(preview.image).save(path, quality=90, method=0)
    for old in sorted(folder.iterdir())[:-KEPT_PREVIEWS]:
        old.unlink(missing_ok=True)
    return path


def load_result(directory: Path) -> Result:
    """Read a run's folder: images of the arms, metrics, scores and settings, as far as they are there."""
    found = read_json(directory / "run.json")
    images, models, videos = (
        {arm: directory / f"{arm}.{kind}" for arm in ARMS if (directory / f"{arm}.{kind}").exists()}
        for kind in ("png", "glb", "mp4")
    )
    rows: tuple[dict[str, float], ...] = ()
    if (directory / "metrics.csv").exists():
        with open(directory / "metrics.csv", newline="", encoding="utf-8") as file:
            rows = tuple({key: as_float(value) for key, value in row.items()} for row in csv.DictReader(file))
    names = [f"{arm}{end}" for arm in ARMS for end in (".glb", ".ply", ".zip", ".mp4", "_views.png")]
    names += ["metrics.csv", "run.json"]
    listed = [*images.values(), *(directory / name for name in names if (directory / name).exists())]
    return Result(
        directory=directory,
        settings=found.get("config", {}),
        images=images,
        models=models,
        videos=videos,
        scores=found.get("scores", {}),
        rows=rows,
        files=tuple(listed),
        stopped=found.get("stopped", ""),
        seconds=as_float(found.get("seconds")),
    )


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def as_float(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def work_of(config: RunConfig) -> tuple:
    return (*(getattr(config, name) for name in WORK), config.negative_lr > 0, config.lambda_orient_end > 0)


def note_speed(config: RunConfig, seconds: float, steps_done: int) -> None:
    """Remember how long a step of such a run takes."""
    if steps_done and math.isfinite(seconds):
        measured_step_s[work_of(config)] = seconds / steps_done


def kind_of(config: RunConfig) -> str:
    """Row of the guesses above."""
    return "toybox" if config.prior.startswith("toybox/") else "published"


def estimate_s(config: RunConfig) -> float:
    """Seconds this run will take: measured on this process's last such run, else a guess."""
    guess = STEP_S[kind_of(config), config.mode] * (1 + SECOND_ARM * (len(arm_names(config.arms)) - 1))
    seconds = config.steps * measured_step_s.get(work_of(config), guess)
    seconds = min(seconds, BUDGET_SHARE * config.time_budget_s) if config.time_budget_s else seconds
    return seconds + EXPORT_S[config.mode] * len(arm_names(config.arms))


def gpu_seconds(config: RunConfig) -> int:
    """Seconds of GPU to ask for: the estimate with room for loading and slow days, between 15 and MAX_GPU_S."""
    return int(min(max(1.5 * estimate_s(config) + LOAD_S[kind_of(config)] + 5, 15), MAX_GPU_S))


def gpu_steps(config: RunConfig) -> int:
    """How many of the run's steps that much GPU is likely to be enough for."""
    whole = estimate_s(replace(config, time_budget_s=0.0))
    left = BUDGET_SHARE * gpu_seconds(config) - LOAD_S[kind_of(config)]
    return min(config.steps, int(config.steps * left / whole))


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """Turn every failure into one sentence: refusals as they are, the unexpected with an id for the log."""
    try:
        yield
    except RequestError as error:
        raise gr.Error(str(error), title="Please check the request", print_exception=False) from error
    except gr.Error:
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            sentence = "The device ran out of memory: choose a smaller image size or fewer arms."
        else:
            reference = secrets.token_hex(4)
            log.exception("run failed, reference %s", reference)
            sentence = f"The run failed on our side; try again, and quote reference {reference} if it happens twice."
        raise gr.Error(sentence, title="The run stopped", print_exception=False) from error


def warm() -> None:
    """Load both modes' default priors and every embedded reward, so that the first run need not; a failure is only
    logged: the first run says it again, to somebody."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        for mode in MODES:
            load_prior(RunConfig.from_preset(mode=mode).prior, device)
        for name in embedded_rewards():
            load_reward(name, device)
    except RequestError as error:
        log.warning("default models are not loaded: %s", error)


def embedded_rewards() -> list[str]:
    """Rewards whose weights ship with this repository: scoring with them downloads nothing."""
    return [name for name, info in REWARDS.items() if info.embedded]
