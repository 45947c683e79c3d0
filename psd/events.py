"""What `psd.generate` yields. Plain data on the CPU: safe to pickle, to show, to write.

Order of a run: `Downloading` while models are fetched that are used for the first time, one `Started`, then `Step`s
with `Preview`s between them, of an object one `Shown`, then one `Finished`.
A cancelled generator ends without `Finished`; what was made stays in `Started.directory`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
    arms: tuple[str, ...]  # in the order of psd.config.arms_of
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
class Shown:
    """The folder holds every arm's scores, picture and mesh (psd.record.read); what takes longer is being written."""

    directory: Path


class ArmResult(NamedTuple):
    """What a run left of one arm; a run that was stopped leaves less."""

    picture: Path | None  # with the settings in its text chunks; of an object, its front
    scores: dict[str, float]  # reward -> raw score, the held-out judges among them
    files: dict[str, Path]  # kind (psd.record.KINDS) -> file, the picture among them
    remarks: dict[str, Any]  # on single kinds: what a mesh is like, why a file is missing


@dataclass(frozen=True)
class Finished:
    """The run's results. Everything here is also in the files of `directory`: psd.record.read."""

    run_id: str
    directory: Path
    config: RunConfig
    arms: dict[str, ArmResult]
    steps_done: int
    seconds: float
    stopped: str = ""  # why the loop ended early, one sentence; empty when it did not
    failed: bool = False  # whether it broke down, and was not only stopped
    remarks: tuple[str, ...] = ()  # one sentence each: what could not be written or scored, or is not in the settings
