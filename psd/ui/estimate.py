"""What a run will cost, said before it: seconds and memory, measured on this machine as far as it has been.

    seconds = steps * (seconds a step) + (seconds of the files of an arm) * arms

A step's seconds are those of the same work, if this process has seen it; else those of the nearest work of its mode, in
proportion to `work_of`; before anything was measured, those of one small forward pass.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from psd.budget import passes_of
from psd.config import FIELDS, FINER_FROM, MODES, RunConfig, arms_of
from psd.distil import distil
from psd.errors import RequestError
from psd.methods import Passes, learns_negative
from psd.models.priors import load_prior
from psd.models.priors.table import decoder_of, prior_info
from psd.record import KINDS, scores_of
from psd.run import BUDGET_SHARE, MEASURED_STEPS, load

ON_ZERO_GPU = bool(os.environ.get("SPACES_ZERO_GPU"))
CGROUP = Path("/sys/fs/cgroup")
MAX_RUN_S = float(os.environ.get("PSD_MAX_RUN_S", 1800))  # of one caller's run
FELT_PASSES, NOISE = 10, 0.3  # the latter as a logarithm
WARM_STEPS, WARM_S = 4, 2.0  # at least, in the warm-up; steps of an object go in pairs
MAX_GPU_S = 120  # asked of ZeroGPU for one run at most; visitors have minutes a day
LOAD_S = {"toybox": 1.0, "published": 20.0}

# Work, in milliseconds of one core of 2024 on the toybox's models; only the ratios count. Of a row of each network:
ROW = {
    "image": Passes(unet=12.5, unet_grad=40, decode=5.0, decode_grad=12.5, reward=3.5, reward_grad=12.5),
    "3d": Passes(unet=12.5, unet_grad=28, encode_grad=7.5, decode=6.0, decode_grad=10, reward=3.5, reward_grad=9.5),
}
VIEWS = {"image": 1, "3d": 4}
FAST_DECODER = 0.45  # of the VAE's time
STEP = {"image": 9.0, "3d": 0.0}  # of an arm, whatever it asks
MEASURED = {"image": 12.0, "3d": 38.0}  # a reward for the curves, and a preview
GRID, RENDER, HASHED = 12.0, 8.0, 340.0  # a voxel grid of 48, renders of 40 px; the hash grid at 24 samples a ray
PIXELS_POWER = 0.83  # four times the pixels take 3.1 times as long
EXPORT = {"image": 30.0, "3d": 2000.0}  # files of an arm; of an object the mesh and its texture
EXPORT_VIEWS = 100.0  # and a sample a ray of its pictures
FORWARD = 17.0  # one row of toybox/sd through its UNet
PUBLISHED = {"image": 400.0, "3d": 100.0}  # times the toybox's, in arithmetic
# Published models on a GPU take a step of an arm in so many seconds, guessed; the toybox's are bound by launches.
GPU_STEP_S = {"toybox": {"image": 0.12, "3d": 0.25}, "published": {"image": 0.4, "3d": 0.5}}

# Gigabytes, measured on a CPU with the toybox: of any run; of a picture of 128 px; of every arm, and once more for what
# comes and goes: of renders of 40 px at 24 samples a ray (three times as much where a hash grid is asked), of the hash
# grid's table, and of a voxel grid of 48.
TOYBOX_GB, PICTURE_GB, RENDER_GB, HASHED_GB, GRID_GB = 0.4, 0.03, 0.01, 0.17, 0.01
PUBLISHED_GB = {"image": 12, "3d": 16}  # of a model that no table knows, both arms
# Of that, by `make bench MODE=memory`: what `offload` leaves on the CPU; n's gradient by VAE and by small decoder.
OFFLOADED_GB, LEARNED_GB, LEARNED_FAST_GB = 1.6, 4.0, 1.5

# What a step's time depends on, besides whether n and a loss are switched on.
KEY = ("mode", "prior", "reward", "arms", "vary", "method", "image_size", "images", "pref_interval",
       "negative_interval", "field", "grid_size", "grid_size_end", "render_size", "render_size_end", "samples",
       "fast_decoder", "rank")  # fmt: skip
SWITCHES = ("negative_lr", "pref_weight", "lambda_rgb", "lambda_orient", "lambda_orient_end", "lambda_solid",
            "lambda_z_variance", "lambda_smooth")  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """Seconds of a step of `config`, averaged over a run or over a few steps."""

    config: RunConfig
    step_s: float
    pace: float  # of the machine then

    @property
    def now_s(self) -> float:
        return self.step_s * crowding(self.pace)


steps: dict[tuple, Measured] = {}  # the latest of each key, the newest last
exports: dict[tuple[str, str], tuple[float, float]] = {}  # (mode, family) -> seconds of a unit of `export_work`, pace
felt: list[float] = []  # the latest pace


def key_of(config: RunConfig) -> tuple:
    return (*(getattr(config, name) for name in KEY), *(getattr(config, name) > 0 for name in SWITCHES))


def family_of(config: RunConfig) -> str:
    return "toybox" if config.prior.startswith("toybox/") else "published"


def work_of(config: RunConfig) -> float:
    """Units of work of one step with all its arms, on average over the run."""
    arms, mode = arms_of(config).values(), config.mode
    measured = MEASURED[mode] * min(1.0, 2 * MEASURED_STEPS / config.steps)
    work = sum(guided_work(arm) + measured for arm in arms)
    if mode == "image":
        work *= config.images * (
            config.image_size / 128 if config.image_size and family_of(config) == "toybox" else 1.0
        ) ** (2 * PIXELS_POWER)
    work *= PUBLISHED[mode] if family_of(config) == "published" else 1.0
    return work + (sum(map(scene_work, arms)) if mode == "3d" else 0.0)


def guided_work(arm: RunConfig) -> float:
    """Of an arm's method on the models."""
    costs = ROW[arm.mode]
    if arm.fast_decoder:
        costs = costs._replace(decode=FAST_DECODER * costs.decode, decode_grad=FAST_DECODER * costs.decode_grad)
    rows = sum(count * cost for count, cost in zip(passes_of(arm), costs))
    return STEP[arm.mode] + VIEWS[arm.mode] * rows


def scene_work(arm: RunConfig) -> float:
    """Of an arm's radiance field and its renders, which may be larger in the later part."""
    pixels = over_the_run((arm.render_size / 40) ** 2, (arm.render_size_end / 40) ** 2)
    if arm.field == "hashgrid":
        normals = 2.0 if arm.lambda_orient or arm.lambda_orient_end else 1.0
        return HASHED * normals * pixels * arm.samples / 24
    voxels = over_the_run((arm.grid_size / 48) ** 3, (arm.grid_size_end / 48) ** 3)
    return GRID * voxels + RENDER * pixels * (0.5 + arm.samples / 48)


def over_the_run(early: float, late: float) -> float:
    """The mean of what is `late` from FINER_FROM on, or if that is 0 `early` throughout."""
    return FINER_FROM * early + (1 - FINER_FROM) * (late or early)


def export_work(config: RunConfig) -> float:
    """Of the files and scores of all arms."""
    if config.mode == "image":
        scale = PUBLISHED["image"] if family_of(config) == "published" else 1.0
        return EXPORT["image"] * scale * config.images * len(arms_of(config))
    pictures = EXPORT_VIEWS * config.samples * (6.0 if config.field == "hashgrid" else 1.0)
    return (EXPORT["3d"] + pictures) * len(arms_of(config))


def note_speed(config: RunConfig, seconds: float, steps_done: int) -> None:
    """Remember how long a step of such a run took, on average over `steps_done` of them."""
    if steps_done and math.isfinite(seconds):
        steps.pop(key_of(config), None)
        steps[key_of(config)] = Measured(config, seconds / steps_done, pace())


def note_export(config: RunConfig, seconds: float) -> None:
    """Remember how long scores and files of such a run took, all arms together."""
    exports[config.mode, family_of(config)] = seconds / export_work(config), pace()


def step_s(config: RunConfig) -> float:
    """Seconds of a step: of the same work, else in proportion to the nearest of its mode, else to one forward pass."""
    if known := steps.get(key_of(config)):
        return known.now_s
    work, on_gpu = work_of(config), torch.cuda.is_available()
    alike = [each for each in steps.values() if each.config.mode == config.mode]
    if on_gpu:  # where the toybox is bound by launches, and says nothing about arithmetic
        alike = [each for each in alike if family_of(each.config) == family_of(config)]
    if alike:
        nearest = min(reversed(alike), key=lambda each: abs(math.log(work_of(each.config) / work)))
        return nearest.now_s * work / work_of(nearest.config)
    if on_gpu:
        alone = RunConfig.from_preset(mode=config.mode, prior=config.prior, arms="with")
        return GPU_STEP_S[family_of(config)][config.mode] * work / work_of(alone)
    return pace() * work


def pace() -> float:
    """Seconds of a unit of work on this CPU, as it was felt last."""
    if not felt:
        feel()
    return felt[0]


def feel() -> None:
    """Time some small forward passes: how quick this machine is now, and how busy with others' work."""
    prior = load_prior("toybox/sd", "cpu")
    x_t, cond, seconds = torch.zeros(1, *prior.latent_shape), prior.embed([""]), []
    for _ in range(FELT_PASSES):
        started = time.monotonic()
        with torch.no_grad():
            prior.eps(x_t, 500, cond)
        seconds.append(time.monotonic() - started)
    felt[:] = [median(seconds) / FORWARD]  # of a neighbour's bursts a run sees its share, ten passes all or nothing


def crowding(then: float) -> float:
    """How much slower the machine is than at a pace before; what may be noise counts as nothing."""
    ratio = 1.0 if torch.cuda.is_available() else pace() / then
    return ratio if abs(math.log(ratio)) > NOISE else 1.0


def export_s(config: RunConfig) -> float:
    """Seconds of scores and files after the loop."""
    work = export_work(config)
    if known := exports.get((config.mode, family_of(config))):
        unit_s, then = known
        return work * unit_s * crowding(then)
    return work * step_s(config) / work_of(config)


def estimate_s(config: RunConfig) -> float:
    """Seconds that a run will take once its models are loaded."""
    loop_s = config.steps * step_s(config)
    loop_s = min(loop_s, BUDGET_SHARE * config.time_budget_s) if config.time_budget_s else loop_s
    return loop_s + export_s(config)


def gpu_seconds(config: RunConfig) -> int:
    """Seconds of GPU to ask for: the estimate with room for loading and slow days, between 15 and MAX_GPU_S."""
    return int(min(max(1.5 * estimate_s(config) + LOAD_S[family_of(config)] + 5, 15), MAX_GPU_S))


def gpu_steps(config: RunConfig) -> int:
    """How many of the run's steps that much GPU is likely to be enough for."""
    whole = estimate_s(replace(config, time_budget_s=0.0))
    left = BUDGET_SHARE * gpu_seconds(config) - LOAD_S[family_of(config)]
    return min(config.steps, int(config.steps * left / whole))


def check_work(config: RunConfig) -> None:
    """Raise RequestError where a checked `config` wants more memory or time than one caller has."""
    check_memory(config)
    seconds = estimate_s(config)
    if ON_ZERO_GPU or seconds <= MAX_RUN_S:  # ZeroGPU has a limit of its own, told before the run
        return
    fitting = int((MAX_RUN_S - export_s(config)) / step_s(config))
    less = f"lower steps to about {fitting}" if fitting >= FIELDS["steps"].low else "choose a smaller model or image"
    fewer = ", compare fewer arms" if len(arms_of(config)) > 1 else ""
    raise RequestError(
        f"This run would take about {duration(seconds)}, at most {duration(MAX_RUN_S)} are allowed here: {less}{fewer} "
        "or set time_budget_s.",
        "steps",
    )


def duration(seconds: float) -> str:
    """In words, for a sentence."""
    for unit, name in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} seconds"


def check_memory(config: RunConfig) -> None:
    """Raise RequestError where a run would not fit into what is free now; says how many arms would."""
    free, count = free_gb(), len(arms_of(config))
    if memory_gb(config) <= free:
        return
    fitting = [n for n in range(1, count) if memory_gb(config, n) <= free]
    less = f"compare {fitting[-1]} of the {count} arms, or " if fitting else ""
    sizes = "a smaller image" if config.mode == "image" else "smaller renders, fewer samples or a smaller grid"
    raise RequestError(
        f"This run would need about {memory_gb(config):.1f} GB of memory, {free:.1f} GB are free here: {less}choose "
        f"{sizes}.",
        "arms" if fitting else "image_size" if config.mode == "image" else "render_size",
    )


def memory_gb(config: RunConfig, arms: int = 0) -> float:
    """What a run takes at its peak, beside models of the toybox; published ones are in it. `arms`: of so many."""
    count = arms or len(arms_of(config))
    pixels = (max(config.render_size, config.render_size_end) / 40) ** 2 * config.samples / 24
    hashed, voxels = config.field == "hashgrid", max(config.grid_size, config.grid_size_end)
    field_gb = HASHED_GB + 3 * RENDER_GB * pixels if hashed else GRID_GB * (voxels / 48) ** 3 + RENDER_GB * pixels
    scene_gb = (count + 1) * field_gb if config.mode == "3d" else 0.0
    if family_of(config) == "toybox":
        picture_gb = PICTURE_GB * (config.image_size / 128) ** 2 if config.mode == "image" else 0.0
        return TOYBOX_GB + scene_gb + picture_gb * config.images * (count if torch.cuda.is_available() else 1)
    known, width = prior_info(config.prior).gpu_gb or PUBLISHED_GB[config.mode], 1.5  # float32
    if torch.cuda.is_available():
        known, width = known - spared_gb(config), 1.0
    larger = config.images * ((config.image_size / 512) ** 2 if config.image_size else 1.0)
    return width * (known * (0.6 + 0.4 * max(larger, 1.0)) + 0.5 * max(0, count - 2)) + scene_gb


def spared_gb(config: RunConfig) -> float:
    """What of its prior's `gpu_gb` a run does not take: less is offloaded, or learned."""
    learned = LEARNED_FAST_GB if decoder_of(config.prior, config.fast_decoder) else LEARNED_GB
    if config.mode == "image" and not any(map(learns_negative, arms_of(config).values())):
        learned = 0.0
    return LEARNED_GB - learned + OFFLOADED_GB * config.offload


def free_gb() -> float:
    """What a run may take of the device that it runs on; infinite where it cannot be asked."""
    if ON_ZERO_GPU:  # a GPU is there only while a run has it
        return math.inf
    if torch.cuda.is_available():
        reusable = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return (torch.cuda.mem_get_info()[0] + reusable) / 1e9
    return min(machine_gb(), container_gb())


def machine_gb() -> float:
    with contextlib.suppress(OSError):
        if found := re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii")):
            return int(found[1]) * 1024 / 1e9
    return math.inf


def container_gb() -> float:
    """Of the limit that a container sets, which the machine's own numbers do not know."""
    with contextlib.suppress(OSError, ValueError):  # none: "max", or no such files
        limit = int((CGROUP / "memory.max").read_text(encoding="ascii"))
        used = re.search(r"^anon (\d+)", (CGROUP / "memory.stat").read_text(encoding="ascii"), re.MULTILINE)
        return (limit - int(used[1] if used else 0)) / 1e9
    return math.inf


def measuring(mode: str, device: str) -> Iterator[None]:
    """Measure a step of the mode's default preset, and the files of one of its arms; yields between small parts."""
    # All of it as a run begins: what is larger later, `work_of` puts on top.
    coarse = dict(mode=mode, render_size_end=0, grid_size_end=0)
    config = RunConfig.from_preset(prompt="a red mushroom with a white stem", steps=4 * WARM_STEPS + 1, **coarse)
    models, rewards = load(config, device)
    stage = MODES[mode].load()(config, arms_of(config), models)
    states, seconds = distil(models.prior, stage), []
    feel()
    while len(seconds) < config.steps and (len(seconds) <= WARM_STEPS or sum(seconds[1:]) < WARM_S):
        started = time.monotonic()
        next(states)
        stage.preview(stage.views())
        seconds.append(time.monotonic() - started)
        yield
    states.close()
    default = RunConfig.from_preset(**coarse)
    # The first pays for what the others find ready; in pairs, since every second one may be a plain one.
    note_speed(default, median(sum(pair) for pair in zip(seconds[1::2], seconds[2::2])), 2)
    arm, export, about = next(iter(stage.arms)), 0.0, {}
    with tempfile.TemporaryDirectory() as folder:
        parts = [lambda: scores_of(*stage.scored(arm), rewards)]
        for artefact in stage.artefacts(arm):
            parts.append(lambda artefact=artefact: artefact.write(Path(folder) / f"file{KINDS[artefact.kind]}", about))
        for part in parts:
            started = time.monotonic()
            part()
            export += time.monotonic() - started
            yield
    note_export(replace(default, arms=arm), export)
