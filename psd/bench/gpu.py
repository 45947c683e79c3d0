"""How fast, how much memory? `python -m psd.bench gpu`: the published architectures at full size, random weights.

Neither depends on what the weights are, so nothing is downloaded: Stable Diffusion 1.5 at 512 px and MVDream at
4 x 256 px, each with a reward of HPSv2.1's size (CLIP ViT-H/14), in the types and layouts of the loaders. The arms are
those of the paper's Table 4, one after the other, each alone. Not measured: previews, metrics and files of psd.run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import nn

from psd.config import MODES, RunConfig
from psd.contracts import Decode, Stage
from psd.contracts import Models as Loaded
from psd.distil import State, distil
from psd.models.priors.ldm import unet_config
from psd.models.priors.mvdream import MVDreamPrior, multi_view
from psd.models.priors.stable_diffusion import StableDiffusionPrior, compute_dtype, decode, vae_dtype
from psd.models.rewards.clip_scores import VIT_H_14, HPSv2Reward
from psd.models.rewards.preprocess import CLIP_MEAN, CLIP_STD
from psd.models.weights import use_tf32

PROMPT = "a red mushroom with a white stem"
PRESETS = {"image": "sd15-paper", "3d": "mvdream-fast"}
PLAIN, FULL, FAST = "score distillation", "full PSD", "full PSD, fast decoder"
BLOCKS = 5  # that are timed; their median counts
WARM_UP = 2  # periods of an arm's intervals
# The paper's Table 4: iterations a second, of MVDream's own 2.92.
PAPER = {PLAIN: 1.0, "delta_pref only": 0.50, FULL: 0.41, "full PSD, interval 2": 0.51, "full PSD, interval 5": 0.84}
LEAST_RATIO, MOST_GB, MOST_MINUTES = 0.5, 24.0, 3.0  # what is aimed at; the minutes on an H200

# Of the published config.json files; what is not listed is the class's default there too.
UNETS = {
    "image": dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
    "3d": unet_config(dict(
        image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=2,
        attention_resolutions=[4, 2, 1], channel_mult=[1, 2, 4, 4], num_head_channels=64, transformer_depth=1,
        context_dim=1024, camera_dim=16,
    )),
}  # fmt: skip
TEXT_ENCODERS = {
    "image": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),  # ViT-L/14's
    "3d": VIT_H_14["text_config"] | dict(num_hidden_layers=23),
}
VAE = dict(
    block_out_channels=[128, 256, 512, 512], down_block_types=4 * ["DownEncoderBlock2D"],
    up_block_types=4 * ["UpDecoderBlock2D"], layers_per_block=2, latent_channels=4, scaling_factor=0.18215,
)  # fmt: skip

# To try the script: blocks of the same kinds, few and narrow.
TINY_TRANSFORMER = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
TINY_UNET = dict(
    block_out_channels=[32, 32], down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"], layers_per_block=1, sample_size=8, cross_attention_dim=32,
    attention_head_dim=2,
)  # fmt: skip
TINY_VAE = dict(
    block_out_channels=[32, 32], down_block_types=2 * ["DownEncoderBlock2D"], up_block_types=2 * ["UpDecoderBlock2D"],
    layers_per_block=1,
)  # fmt: skip
TINY_TAESD = dict(encoder_block_out_channels=[8] * 4, decoder_block_out_channels=[8] * 4)
TINY_OBJECT = dict(grid_size=16, render_size=16, samples=8)


class Measured(NamedTuple):
    """One arm. UNet rows are means over whole periods of its intervals, so they are exact."""

    steps_per_s: float
    peak_gb: float | None  # that torch took of the GPU's memory, weights included; None on a CPU
    rows: float  # of the UNet a step, without gradient
    gradient_rows: float  # with gradient


class SameTokens:
    """Stands in for CLIP's tokenizer and reads every prompt alike: they are padded to one length anyway."""

    model_max_length = 77

    def __len__(self) -> int:
        return VIT_H_14["text_config"]["vocab_size"]

    def __call__(self, prompts: list[str], **_: object) -> SimpleNamespace:
        return SimpleNamespace(input_ids=torch.full((len(prompts), self.model_max_length), len(self) - 1))


def random_prior(mode: str, device: str, tiny: bool) -> StableDiffusionPrior:
    """Stable Diffusion 1.5 for mode "image", MVDream for "3d"; where `tiny` a small likeness."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device(device):
        text_encoder = CLIPTextModel(CLIPTextConfig(**TEXT_ENCODERS[mode] | (TINY_TRANSFORMER if tiny else {})))
        vae = AutoencoderKL(**VAE | (TINY_VAE if tiny else {}))
        unet = UNet2DConditionModel(**UNETS[mode] | (TINY_UNET if tiny else {}))
    text_encoder.to(compute_dtype(device))
    for model, dtype in ((vae, vae_dtype(device)), (unet, compute_dtype(device))):
        nn.Module.to(model, dtype=dtype, memory_format=torch.channels_last)  # diffusers' own warns, of nothing
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    models = (model.requires_grad_(False).eval() for model in (text_encoder, vae, unet))
    if mode == "3d":
        multi_view(unet)
    prior = MVDreamPrior if mode == "3d" else StableDiffusionPrior
    return prior(f"random {PRESETS[mode]}", "none", SameTokens(), *models, scheduler, [])


def random_reward(device: str, tiny: bool) -> HPSv2Reward:
    """HPS v2.1's architecture: CLIP ViT-H/14."""
    from transformers import CLIPConfig, CLIPModel

    use_tf32(device)
    text, vision = VIT_H_14["text_config"], VIT_H_14["vision_config"]
    if tiny:
        text, vision = text | TINY_TRANSFORMER, vision | TINY_TRANSFORMER | dict(image_size=56)
    with torch.device(device):
        model = CLIPModel(CLIPConfig(**VIT_H_14 | dict(text_config=text, vision_config=vision)))
    mean, std = (torch.tensor(value, device=device).view(3, 1, 1) for value in (CLIP_MEAN, CLIP_STD))
    return HPSv2Reward("random ViT-H/14", "none", model.requires_grad_(False).eval(), SameTokens(), mean, std)


def random_decoder(device: str, tiny: bool) -> Decode:
    """TAESD's architecture: AutoencoderTiny as it is by default."""
    from diffusers import AutoencoderTiny

    with torch.device(device):
        vae = AutoencoderTiny(**TINY_TAESD if tiny else {})
    nn.Module.to(vae, dtype=vae_dtype(device), memory_format=torch.channels_last)
    return partial(decode, vae.requires_grad_(False).eval())


def rows_of(preset: RunConfig) -> dict[str, RunConfig]:
    """The rows of Table 4: at an interval of k all work for the preference, ranking and n alike, is every k-th step's.

    Below them full PSD ranked through the small decoder, and the preset itself, where it is none of these.
    """
    every_step = dict(pref_interval=1, negative_interval=1, negative_lr=preset.negative_lr or 1e-3)
    full = replace(preset, **every_step, fast_decoder=False)
    arms = {
        PLAIN: replace(full, method="sds"),
        "delta_pref only": replace(full, negative_lr=0.0),
        FULL: full,
        "full PSD, interval 2": replace(full, pref_interval=2),
        "full PSD, interval 5": replace(full, pref_interval=5),
        FAST: replace(full, fast_decoder=True),
    }
    return arms if preset in arms.values() else arms | {f"`{preset.preset}` as it is": preset}


class Models(NamedTuple):
    prior: StableDiffusionPrior
    reward: HPSv2Reward
    fast_decoder: Decode

    def states(self, config: RunConfig) -> Iterator[State]:
        """The steps of one arm, as psd.run makes them."""
        ranked_by = self.fast_decoder if config.fast_decoder else self.prior.decode
        loaded = Loaded(self.prior, self.reward, ranked_by)
        stage: Stage = MODES[config.mode].load()(config, {"with": config}, loaded)
        return distil(self.prior, stage)


def measure(config: RunConfig, models: Models, steps: int) -> Measured:
    """Time `steps` of one arm, rounded to blocks of whole periods of its intervals, after WARM_UP periods.

    Raises RuntimeError where the numbers break down.
    """
    period = config.pref_interval * config.negative_interval
    blocks = min(BLOCKS, max(1, steps // period))
    block = period * max(1, round(steps / blocks / period))
    total = WARM_UP * period + blocks * block
    # Of an object the first tenth of a run: later one that random weights leave empty would be given up.
    config = replace(config, steps=10 * total if config.mode == "3d" else total)
    states, prior = models.states(config), models.prior
    cuda = prior.device.type == "cuda"

    def seconds(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            if problem := next(states).failure:
                raise RuntimeError(problem)
        if cuda:
            torch.cuda.synchronize(prior.device)
        return time.perf_counter() - started

    rows = {False: 0, True: 0}  # with gradient

    def count_rows(unet: nn.Module, inputs: tuple) -> None:
        rows[torch.is_grad_enabled()] += len(inputs[0])

    if cuda:
        torch.cuda.empty_cache()  # of the arm before
        torch.cuda.reset_peak_memory_stats(prior.device)
    seconds(WARM_UP * period)
    counting = prior.unet.register_forward_pre_hook(count_rows)
    try:
        speeds = [block / seconds(block) for _ in range(blocks)]
    finally:
        counting.remove()
        states.close()
    peak_gb = torch.cuda.max_memory_reserved(prior.device) / 1e9 if cuda else None
    timed = blocks * block
    return Measured(statistics.median(speeds), peak_gb, rows[False] / timed, rows[True] / timed)


def report(device: str, tiny: bool, steps: int, modes: Iterable[str], with_profile: bool = False) -> Iterator[str]:
    """The tables in Markdown, line by line as they are measured. Without CUDA the models are always tiny."""
    cuda = torch.device(device).type == "cuda"
    tiny = tiny or not cuda
    hardware = torch.cuda.get_device_name(device) if cuda else "a CPU"
    size = "TINY models, to try the script: their numbers say nothing of the published ones'" if tiny else "full size"
    yield f"Random weights on {hardware}, {compute_dtype(device)}, torch {torch.__version__}; {size}."
    reward, fast_decoder = random_reward(device, tiny), random_decoder(device, tiny)
    for mode in modes:
        models = Models(random_prior(mode, device, tiny), reward, fast_decoder)
        yield from report_mode(mode, models, steps, tiny, with_profile)


def report_mode(mode: str, models: Models, steps: int, tiny: bool, with_profile: bool) -> Iterator[str]:
    preset = RunConfig.from_preset(PRESETS[mode], prompt=PROMPT, **(TINY_OBJECT if tiny and mode == "3d" else {}))
    pictures = f"{models.prior.views} x {models.prior.image_size} px"
    titles = [
        f"{mode}, {pictures}", "steps/s", "ratio", "paper's ratio", "peak (GB)",
        "UNet rows a step", "and with gradient", f"{preset.steps:,} steps (min)",
    ]  # fmt: skip
    yield from ("", row(titles), "|---" * len(titles) + "|")
    arms, found = rows_of(preset), {}
    for name, config in arms.items():
        found[name] = measured = measure(config, models, steps)
        yield row([
            name,
            f"{measured.steps_per_s:.2f}",
            f"{measured.steps_per_s / found[PLAIN].steps_per_s:.2f}",
            f"{PAPER[name]:.2f}" if mode == "3d" and name in PAPER else "-",
            "-" if measured.peak_gb is None else f"{measured.peak_gb:.1f}",
            f"{measured.rows:g}",
            f"{measured.gradient_rows:g}",
            f"{minutes(measured, preset):.2f}",
        ])  # fmt: skip
    yield ""
    if tiny:
        yield "The bars hold for the full size on a GPU: not checked."
    else:
        own = next(name for name, config in arms.items() if config == preset)
        for bar, reached in bars(mode, found, minutes(found[own], preset)):
            yield f"- {bar}: {'reached' if reached else 'MISSED'}"
    if with_profile:
        yield from ("", "```", profile(arms[FULL], models), "```")


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def minutes(measured: Measured, preset: RunConfig) -> float:
    """Of the preset's steps at this speed; loading and files not included."""
    return preset.steps / measured.steps_per_s / 60


def bars(mode: str, found: dict[str, Measured], preset_minutes: float) -> Iterator[tuple[str, bool]]:
    """What is aimed at, with the measured number, and whether it is reached."""
    ratio = found[FULL].steps_per_s / found[PLAIN].steps_per_s
    yield f"full PSD at {ratio:.2f} of {PLAIN} (at least {LEAST_RATIO})", ratio >= LEAST_RATIO
    peak_gb = max(measured.peak_gb for measured in found.values())
    yield f"peak of {peak_gb:.1f} GB (under {MOST_GB:g})", peak_gb < MOST_GB
    if mode == "3d":
        bar = f"`{PRESETS[mode]}` in {preset_minutes:.1f} min (under {MOST_MINUTES:g} on an H200)"
        yield bar, preset_minutes < MOST_MINUTES


def profile(config: RunConfig, models: Models, steps: int = 5) -> str:
    """Table of the operations that so many steps of an arm spend most time in."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    cuda = models.prior.device.type == "cuda"
    states = models.states(config)
    for _ in range(WARM_UP):
        next(states)
    with profiler(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
        for _ in range(steps):
            next(states)
    states.close()
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    return found.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60)
