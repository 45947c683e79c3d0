"""What a step takes, and how much of it its networks do: `python -m psd.bench speed`, on the embedded models.

Every arm alone in one process, models warm, arms in turns so that a busy neighbour meets them all. A network's rows are
timed in the same rounds, as the step asks for them; psd.budget says how many there are.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from psd.bench.gpu import row
from psd.bench.paired import COST_PROMPT
from psd.budget import passes_of
from psd.config import MODES, RunConfig, arms_of
from psd.contracts import Models
from psd.distil import distil
from psd.methods import Passes
from psd.run import load

PRESETS = {"image": "toybox-image", "3d": "toybox-fast"}
ARMS = "without, selection, no-negative, negative-only, with"
ROUNDS, ROUND_STEPS = 7, 4
DIFFUSERS_STEPS = 50


def report(device: str, modes: list[str], rounds: int = ROUNDS) -> Iterator[str]:
    """A table a mode in Markdown, line by line as they are measured."""
    yield f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}; medians of {rounds} rounds."
    for mode in modes:
        yield from report_mode(mode, device, rounds)


def report_mode(mode: str, device: str, rounds: int) -> Iterator[str]:
    config = RunConfig.from_preset(PRESETS[mode], prompt=COST_PROMPT, arms=ARMS)
    arms = arms_of(config)
    arms["with, every step"] = replace(arms["with"], pref_interval=1, negative_interval=1)
    models, _ = load(config, device)
    step_s, rows_s = measured(arms, models, rounds)
    plain = step_s["without"]
    titles = [mode, "step (ms)", "its networks (ms)", "overhead", "of plain's speed", "rows a sample"]
    yield from ("", row(titles), "|---" * len(titles) + "|")
    for name, arm in arms.items():
        passes = passes_of(arm)
        networks_s = rows_s.taken(passes)
        rows = ", ".join(f"{network} {count:g}" for network, count in passes._asdict().items() if count)
        yield row([
            name, f"{1e3 * step_s[name]:.0f}", f"{1e3 * networks_s:.0f}", f"{step_s[name] / networks_s:.2f}",
            f"{plain / step_s[name]:.2f}", rows,
        ])  # fmt: skip
    if mode == "image":
        yield ""
        yield from beside_diffusers(config, models, rounds)


class Rows:
    """Seconds of a row through each network, in the batches that a step has."""

    def __init__(self, models: Models) -> None:
        prior, self.views = models.prior, models.prior.views
        x = torch.randn(self.views, *prior.latent_shape, device=prior.device)
        images = torch.rand(self.views, 3, prior.image_size, prior.image_size, device=prior.device)
        cond, prompts = prior.embed([COST_PROMPT]).expand(self.views, -1, -1), [COST_PROMPT] * self.views
        cameras = torch.randn(self.views, 16, device=prior.device) if self.views > 1 else None
        t = len(prior.alphas_cumprod) // 2

        def eps(x_t: Tensor, y: Tensor) -> Tensor:
            copies = len(y) // self.views
            return prior.eps(x_t.repeat(copies, 1, 1, 1), t, y, None if cameras is None else cameras.repeat(copies, 1))

        twice = lambda rows: rows.repeat(2, *(1 for _ in rows.shape[1:]))  # noqa: E731
        # Network -> how many rows a sample, and the call.
        self.calls: dict[str, tuple[int, Callable[[], object]]] = {
            "unet": (2, lambda: eps(x, twice(cond))),
            "unet_grad": (1, lambda: gradient(lambda n: eps(x, n), cond)),
            "encode": (1, lambda: prior.encode(images)),
            "encode_grad": (1, lambda: gradient(prior.encode, images)),
            "decode": (2, lambda: models.decode(twice(x))),
            "decode_grad": (1, lambda: gradient(models.decode, x)),
            "reward": (2, lambda: models.reward(twice(images), prompts * 2)),
            "reward_grad": (1, lambda: gradient(lambda each: models.reward(each, prompts), images)),
        }
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)

    def time(self) -> None:
        """Every network once."""
        for name, (rows, call) in self.calls.items():
            with torch.set_grad_enabled(name.endswith("_grad")):
                self.seconds[name].append(timed(call) / rows)

    def taken(self, passes: Passes) -> float:
        """Seconds of so many rows a sample."""
        return sum(count * statistics.median(self.seconds[name]) for name, count in passes._asdict().items() if count)


def gradient(network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(network(x).sum(), x)[0]


def measured(arms: dict[str, RunConfig], models: Models, rounds: int) -> tuple[dict[str, float], Rows]:
    """Seconds of a step of each arm, over whole periods of its intervals, and those of the networks' rows."""
    steps = ROUND_STEPS * (rounds + 1) + 1
    running = {}
    for name, arm in arms.items():
        # Of an object the first tenth of a run: its renders have the size that they start with.
        long = replace(arm, steps=10 * steps if arm.mode == "3d" else steps)
        running[name] = distil(models.prior, MODES[arm.mode].load()(long, {"with": long}, models))
        for _ in range(ROUND_STEPS + 1):  # in image mode the start is one
            next(running[name])
    rows, seconds = Rows(models), {name: [] for name in arms}
    rows.time()
    rows.seconds.clear()  # it warmed up
    for _ in range(rounds):
        for name, states in running.items():
            seconds[name].append(timed(lambda states=states: [next(states) for _ in range(ROUND_STEPS)]) / ROUND_STEPS)
        rows.time()
    for states in running.values():
        states.close()
    return {name: statistics.median(each) for name, each in seconds.items()}, rows


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def beside_diffusers(config: RunConfig, models: Models, rounds: int) -> Iterator[str]:
    """The plain arm from latents to the picture, and what a user would pick instead on the same folder."""
    from psd.toybox.evaluate import pipeline_on

    plain = replace(arms_of(config)["without"], steps=DIFFUSERS_STEPS)
    pipeline, seconds = pipeline_on(str(models.prior.device)), {"own": [], "diffusers": []}

    def own() -> None:
        stage = MODES["image"].load()(plain, {"with": plain}, models)
        for _ in distil(models.prior, stage):
            pass
        stage.pictures("with")

    def diffusers() -> None:
        pipeline(COST_PROMPT, num_inference_steps=DIFFUSERS_STEPS, guidance_scale=plain.gamma, output_type="pt")

    for _ in range(max(3, rounds // 2)):
        seconds["own"].append(timed(own))
        seconds["diffusers"].append(timed(diffusers))
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    yield (
        f"Plain arm, {DIFFUSERS_STEPS} steps: {medians['own']:.2f} s, {medians['own'] / medians['diffusers']:.2f} of "
        f"StableDiffusionPipeline's {medians['diffusers']:.2f} s."
    )
