"""How time and memory grow with a run's sizes: `python -m psd.bench growth`, on the embedded models.

    seconds(size) = constant + work * size ** exponent

A row is one quantity: a process of its own, on one thread, in which the sizes take turns, so that a busy neighbour
meets them all. Time is the process's own (CPU seconds) in the fastest round, since neighbours who share caches only
ever add to it. Memory is what it takes at its peak beyond its loaded models; its exponent is the slope between the two
largest sizes, since below some size another phase has the peak. The views of an object are the prior's and cannot be
chosen: `samples` of a ray stand in their place.
"""

from __future__ import annotations

import math
import multiprocessing
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch

from psd.bench.gpu import row
from psd.bench.paired import COST_PROMPT
from psd.config import MODES, RunConfig
from psd.contracts import Models
from psd.distil import distil
from psd.modes.object import ObjectStage
from psd.modes.pictures import painting_views
from psd.run import generate, load
from psd.scene.mesh import extract_mesh

ROUNDS = 3
SLACK = 0.25  # of an exponent that was measured: as much comes from caches, neighbours and the heap
FLAT = 0.05  # between the sizes: less is no growth
PRESETS = {"image": "toybox-image", "3d": "toybox-fast"}
STEPS = {"image": 4, "3d": 2}  # that are timed together: whole periods of the arm's intervals
PROCESS = Path("/proc/self")

Work = Callable[[], object]
Prepare = Callable[[RunConfig, Models, int], Work]  # what a size costs, ready to be done again and again


class Row(NamedTuple):
    quantity: str
    sizes: tuple[int, ...]
    theory: int  # exponent of its work
    mode: str
    prepare: Prepare


class Measured(NamedTuple):
    seconds: list[float]  # of each size
    peak_mb: list[float] | None  # None where the system does not tell


def whole_run(config: RunConfig, models: Models, steps: int) -> Work:
    """A run with its record and files."""

    def run() -> None:
        with TemporaryDirectory() as folder:
            for _ in generate(replace(config, steps=steps), Path(folder), str(models.prior.device)):
                pass

    return run


def stepping(config: RunConfig, models: Models, copies: int = 1) -> Work:
    """STEPS of as many equal arms."""
    # So that an object stays in the first tenth of its run, where a field may be empty.
    long = replace(config, steps=1000)
    states = distil(models.prior, MODES[config.mode].load()(long, {f"arm {n}": long for n in range(copies)}, models))
    next(states)
    return lambda: [next(states) for _ in range(STEPS[config.mode])]


def with_setting(name: str, config: RunConfig, models: Models, size: int) -> Work:
    return stepping(replace(config, **{name: size}), models)


def meshed(config: RunConfig, models: Models, faces: int) -> Work:
    """The mesh of the field that a run starts from, with colours and texture."""
    stage = ObjectStage(config, {"with": config}, models)
    scene, size = stage.sculptures["with"].scene, models.prior.image_size
    views = painting_views(scene, stage.frame, size, config.samples)
    return lambda: extract_mesh(scene.field, target_faces=faces, views=views)


# Large enough that the smallest is more than what the networks take beside it.
ROWS = (
    Row("steps", (16, 32, 64), 1, "image", whole_run),
    Row("arms", (1, 2, 4, 6), 1, "image", stepping),
    Row("images", (1, 2, 4, 8), 1, "image", partial(with_setting, "images")),
    Row("samples", (24, 48, 96, 192), 1, "3d", partial(with_setting, "samples")),
    Row("render_size", (80, 120, 160, 200), 2, "3d", partial(with_setting, "render_size")),
    Row("grid_size", (96, 120, 140, 160), 3, "3d", partial(with_setting, "grid_size")),
    # Each with four times the triangles of the one before: the texture's side is a power of two.
    Row("mesh_faces", (2_000, 8_000, 32_000), 1, "3d", meshed),
)


def report(device: str, rounds: int = ROUNDS, rows: Iterable[Row] = ROWS) -> Iterator[str]:
    """The table in Markdown, line by line as it is measured."""
    yield f"torch {torch.__version__}, one thread, {device}; the fastest of {rounds} rounds."
    titles = ["quantity", "sizes", "seconds", "MB", "of time", "of memory", "of its work", "no faster than its work"]
    yield from ("", row(titles), "|---" * len(titles) + "|")
    for each in rows:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            yield told(each, pool.submit(measured, each, device, rounds).result())


def told(each: Row, found: Measured) -> str:
    """A line of the table."""
    exponents = [exponent(each.sizes, found.seconds)]
    if found.peak_mb:
        exponents.append(slope(each.sizes[-2:], found.peak_mb[-2:]))
    return row([
        each.quantity, ", ".join(f"{size:,}" for size in each.sizes),
        ", ".join(f"{seconds:.2f}" for seconds in found.seconds),
        ", ".join(f"{peak:.0f}" for peak in found.peak_mb) if found.peak_mb else "-",
        f"{exponents[0]:.2f}", f"{exponents[1]:.2f}" if found.peak_mb else "-", str(each.theory),
        "yes" if max(exponents) <= each.theory + SLACK else "NO",
    ])  # fmt: skip


def measured(each: Row, device: str, rounds: int) -> Measured:
    """Memory first, from the smallest size to the largest, which warms up as well; then the rounds."""
    config = RunConfig.from_preset(PRESETS[each.mode], prompt=COST_PROMPT, arms="with")
    if each.mode == "3d":  # the plain step: of the networks' work as little as there is
        config = replace(config, method="sds")
    models, _ = load(config, device)
    works, peaks, before = [], [], status_mb("VmRSS") or 0.0
    each.prepare(config, models, each.sizes[0])()  # whatever is made once
    for size in each.sizes:
        forget_peak()
        works.append(each.prepare(config, models, size))
        works[-1]()
        peaks.append(max((peak_mb() or 0.0) - before, 1.0))
    seconds: list[list[float]] = [[] for _ in each.sizes]
    for _ in range(rounds):
        for work, taken in zip(works, seconds):
            started = time.process_time()
            work()
            taken.append(time.process_time() - started)
    return Measured([min(taken) for taken in seconds], peaks if peak_mb() else None)


def slope(sizes: tuple[int, int], costs: list[float]) -> float:
    """Of the line through two points of logarithms."""
    return math.log(costs[1] / costs[0]) / math.log(sizes[1] / sizes[0])


def exponent(sizes: tuple[int, ...], costs: list[float]) -> float:
    """p of the c + w * size ** p, neither c nor w negative, that is nearest to the costs; 0 where they hardly grow."""
    values = np.array(costs)
    if values.max() - values.min() <= FLAT * values.max():
        return 0.0
    weights = 1 / (values + values.mean())  # of the small ones neither their noise nor nothing counts

    def misfit(power: float) -> float:
        terms = weights[:, None] * np.stack([np.ones(len(sizes)), (np.array(sizes) / sizes[-1]) ** power], 1)
        solution = np.linalg.lstsq(terms, weights * values, rcond=None)[0]
        if solution.min() < 0:
            solution = np.append(0.0, np.linalg.lstsq(terms[:, 1:], weights * values, rcond=None)[0])
        return float(((terms @ solution - weights * values) ** 2).sum())

    return min(np.arange(0.1, 5.0, 0.01).tolist(), key=misfit)


def forget_peak() -> None:
    """Let this process's peak be what it has now, where the system allows it."""
    if (file := PROCESS / "clear_refs").exists():
        file.write_text("5", encoding="ascii")


def peak_mb() -> float | None:
    """Resident memory of this process at its peak since `forget_peak`; None where the system does not tell."""
    return status_mb("VmHWM")


def status_mb(name: str) -> float | None:
    if not (file := PROCESS / "status").exists():
        return None
    return int(re.search(rf"{name}:\s+(\d+) kB", file.read_text(encoding="ascii"))[1]) / 1e3
