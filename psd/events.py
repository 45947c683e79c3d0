"""What `psd.generate` yields. Plain data on the CPU: safe to pickle, to show, to write.

Order of a run: `Downloading` while models are fetched that are used for the first time, one `Started`, then `Step`s
with `Preview`s between them, then one `Finished`.
A cancelled generator ends without `Finished`; the files written so far stay in `Started.directory`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from psd.config import RunConfig


@dataclass(frozen=True)
class Downloading:
    """A repository is being brought into the hub's cache; told twice a second."""

    name: str
    done_mb: float
    total_mb: float


@dataclass(frozen=True)
class Started:
    """The request passed every check; weights are loaded and the first step is next."""

    run_id: str
    directory: Path
    config: RunConfig
    arms: tuple[str, ...]  # in the order of config.arms
    warnings: tuple[str, ...]  # one sentence each: unknown words, a truncated prompt


@dataclass(frozen=True)
class Step:
    """One optimisation step of every arm; `metrics` is one row of metrics.csv."""

    step: int  # 1-based
    steps: int
    elapsed_s: float
    eta_s: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class Preview:
    """Current x0-hat of the arms, tiled left to right in the order of `Started.arms`."""

    step: int
    image: np.ndarray  # uint8 [H, arms * W, 3]


@dataclass(frozen=True)
class Finished:
    """The run's results. Everything here is also in the files of `directory`."""

    run_id: str
    directory: Path
    config: RunConfig
    images: dict[str, Path]  # arm -> PNG with the settings in its text chunks
    scores: dict[str, dict[str, float]]  # arm -> reward name -> raw score, held-out judge included
    files: dict[str, Path]  # "metrics.csv", "run.json", "result.png"
    steps_done: int
    seconds: float
    stopped: str = ""  # why the loop ended early, one sentence; empty when it did not
