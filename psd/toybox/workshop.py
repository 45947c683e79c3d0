"""What both training commands work with: the stages' numbers, their loop, its checkpoints and processes, the flags.

A stage optimises one module on batches that it draws from a key, so that a run cut off goes on exactly where it was.
What is trained, on what and by which loss, is psd.toybox.train's and train_mvdream's.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from psd.toybox import models, world
from psd.toybox.dataset import Renders
from psd.toybox.facts import GROUPS
from psd.toybox.pairs import to_pixels
from psd.toybox.taste import true_words

ASSETS = Path(__file__).resolve().parents[2] / "assets" / "toybox"
CHECKPOINT_EVERY_S = 240
WARM_KEYS = 10**7  # how far apart the draws of two warm cycles begin
NULL_CAPTION_SHARE = 0.1  # prompts dropped for classifier-free guidance
WORDS_ALONE_SHARE = 0.05  # prompts of nothing but words of quality, as negative prompts are


class Recipe(NamedTuple):
    steps: int
    batch: int  # of mvdream: groups of views
    peak: float  # learning rate
    seed: int  # of the data


# Seeds differ so that no model grades its own examples.
STAGES: dict[str, Recipe] = {
    "text":       Recipe( 1000, 256, 1.0e-3, 1),
    "vae":        Recipe( 2400,  16, 1.5e-3, 1),
    "taesd":      Recipe( 2400,  16, 1.5e-3, 1),
    "attributes": Recipe( 5000,  64, 2.0e-3, 3),
    "instruments": Recipe(5000,  64, 2.0e-3, 8),
    "preference": Recipe( 2400,  64, 6.0e-4, 7),
    "judge":      Recipe( 2400,  64, 6.0e-4, 2),
    "sd":         Recipe(24000,  32, 6.0e-4, 1),
    "mvdream":    Recipe( 3000,   8, 4.0e-4, 4),
    "views":      Recipe( 3000,  64, 1.0e-3, 5),
    "reward3d":   Recipe( 1000,  64, 1.0e-3, 5),
}  # fmt: skip
TOKENIZERS = {"sd/text_encoder": "sd/tokenizer", "preference": "preference", "judge/text": "judge/tokenizer"}
IMAGES = {1: 24576, 2: 24576, 3: 16384, 7: 16384, 8: 24576}  # data seed -> how many renders


@dataclass
class Workshop:
    """What every stage works with."""

    device: torch.device
    work: Path  # renders, latents and checkpoints
    steps_scale: float
    stages: tuple[str, ...]
    warm: int  # > 0: without a checkpoint start from the weights in `assets`; stages not asked for are only loaded
    assets: Path = ASSETS  # where the weights go
    batch_scale: float = 1.0  # multiplies every stage's batch: a GPU asks for larger ones
    minutes: float = math.inf  # end each stage, and its learning rate, after so long if its steps take longer
    workers: int = 0  # processes that draw batches ahead; 0: drawn between the steps

    def renders(self, seed: int) -> Renders:
        return Renders(self.work, seed, IMAGES[seed])

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16)


class Training:
    """A module on its way down: what a checkpoint holds. `best` is its moving average where `average` > 0."""

    def __init__(self, module: nn.Module, average: float):
        self.module, self.average, self.step = module, average, 0
        self.optimizer = torch.optim.AdamW(module.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.best = copy.deepcopy(module).requires_grad_(False) if average else module

    def load(self, file: Path, device: torch.device) -> None:
        state = torch.load(file, map_location=device, weights_only=True)
        for name in ("module", "best", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.step = state["step"]

    def save(self, file: Path) -> None:
        state = {name: getattr(self, name).state_dict() for name in ("module", "best", "optimizer")}
        partial = file.with_suffix(".partial")
        torch.save(state | {"step": self.step}, partial)
        partial.rename(file)

    def descend(self, loss: Tensor, rate: float) -> None:
        """One step of AdamW at this learning rate, down the loss of all processes."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(self.module)
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        if self.average:
            models.moving_average(self.best, self.module, min(self.average, self.step / (self.step + 9)))


def run_stage(
    shop: Workshop,
    name: str,
    module: nn.Module,
    draw: Callable[[int, int], tuple],
    loss_of: Callable[..., Tensor],
    save: Callable[[nn.Module], None],
    parts: dict[str, nn.Module],
    average: float = 0.0,
) -> nn.Module:
    """Optimise `module` for the stage's steps and return it (its moving average where `average` > 0).

    draw(key, batch) makes one batch from `key`, on the CPU and maybe in another process; loss_of(*batch) computes its
    loss, given the arrays as tensors on the device; save(weights) is called at every checkpoint and at the end. Of
    several processes each takes its share of the batch. `parts` says which folders of assets/toybox hold the module's
    weights.
    """
    from tqdm.auto import tqdm

    file, recipe = shop.work / f"{name}.pt", STAGES[name]
    first = name in shop.stages and not any((shop.assets / folder).exists() for folder in parts)
    if shop.warm and not file.exists() and not first:
        start_warm(shop, parts)
        if name not in shop.stages:
            return module.eval()
    training = Training(module, average)
    if file.exists():
        training.load(file, shop.device)
        if name not in shop.stages:
            return training.best.eval()
    (rank, ranks), steps = place(), max(1, round(recipe.steps * shop.steps_scale))
    first_key = WARM_KEYS * shop.warm  # an earlier cycle's draws and noises would teach little again
    keys = [first_key + step * ranks + rank for step in range(training.step, steps)]
    batches = _batches(keys, partial(draw, batch=round(recipe.batch * shop.batch_scale) // ranks), shop.workers)
    started = saved_at = time.monotonic()
    smooth, over = None, False
    module.train()
    bar = tqdm(batches, initial=training.step, total=steps, desc=name, mininterval=5, disable=rank > 0)
    for drawn in bar:
        loss = loss_of(*_on_device(drawn, shop.device))
        now = time.monotonic()
        progress = first_rank_s(max(training.step / steps, (now - started) / (60 * shop.minutes)), shop.device)
        training.descend(loss, learning_rate(recipe.peak, training.step, steps, progress))
        smooth = loss.detach() if smooth is None else smooth.lerp(loss.detach(), 0.02)
        if training.step % 20 == 0:
            bar.set_postfix(loss=f"{smooth.item():.4f}", refresh=False)  # waits for the device
        over = progress >= 1 or training.step == steps
        if rank == 0 and (over or now - saved_at > CHECKPOINT_EVERY_S):
            training.save(file)
            save(training.best)
            saved_at = time.monotonic()
        if over:
            break
    return training.best.eval()


def _batches(keys: list[int], draw: Callable[[int], tuple], workers: int) -> DataLoader:
    """One batch a key, in order. Workers are forked: they share the data and touch no device."""
    ahead = dict(num_workers=workers, prefetch_factor=4, multiprocessing_context="fork") if workers else {}
    return DataLoader(_Drawn(keys, draw), batch_size=None, collate_fn=_as_drawn, **ahead)


class _Drawn(Dataset):
    def __init__(self, keys: list[int], draw: Callable[[int], tuple]):
        self.keys, self.draw = keys, draw

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> tuple:
        return self.draw(self.keys[index])


def _as_drawn(batch: tuple) -> tuple:
    return batch


def _on_device(drawn, device: torch.device):
    """Arrays and tensors, also in tuples, as tensors on the device; anything else as it is."""
    if isinstance(drawn, tuple):
        return tuple(_on_device(part, device) for part in drawn)
    if isinstance(drawn, np.ndarray | Tensor):
        return torch.as_tensor(drawn).to(device, non_blocking=True)
    return drawn


def learning_rate(peak: float, step: int, steps: int, progress: float) -> float:
    """Linear warm-up over 200 steps, or a tenth of them, then half a cosine down to a hundredth of the peak.

    progress: how much of the stage is over, in [0, 1]; step / steps unless its time ends first.
    """
    warm_up = min(1.0, (step + 1) / min(200, 0.1 * steps))
    cooled = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return peak * warm_up * max(cooled, 0.01)


def saved_weights(path: Path) -> dict[str, Tensor]:
    """State dict of a file, or of all shards of a folder."""
    from safetensors.torch import load_file

    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return {name: weight for file in files for name, weight in load_file(file).items()}


def start_warm(shop: Workshop, parts: dict[str, nn.Module]) -> None:
    """Load each part's weights from its folder of `shop.assets`. Words that are new keep the embedding just drawn."""
    for folder, part in parts.items():
        saved = saved_weights(shop.assets / folder)
        if folder in TOKENIZERS:
            _carry_words(saved, part.state_dict(), shop.assets / TOKENIZERS[folder])
        part.load_state_dict(saved)


def _carry_words(saved: dict[str, Tensor], own: dict[str, Tensor], tokenizer: Path) -> None:
    """Move the rows of word embeddings to where the present tokenizer has their words."""
    from transformers import CLIPTokenizer

    before, now = CLIPTokenizer.from_pretrained(tokenizer).get_vocab(), models.make_tokenizer().get_vocab()
    kept = [token for token in now if token in before]
    for name in saved:
        if name.endswith(("token_embedding.weight", "word_embeddings.weight")):
            rows = own[name].clone()
            rows[[now[token] for token in kept]] = saved[name][[before[token] for token in kept]].to(rows)
            saved[name] = rows


# Processes of torchrun.
def place() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def average_gradients(module: nn.Module) -> None:
    """Mean over the processes, in one message."""
    _, ranks = place()
    if ranks == 1:
        return
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.div_(ranks).split([g.numel() for g in gradients])):
        gradient.copy_(part.view_as(gradient))


def first_rank_s(number: float, device: torch.device) -> float:
    """The number of the first process, in all: by clocks of their own they would not end at one step."""
    if not dist.is_initialized():
        return number
    shared = torch.tensor([number], dtype=torch.float64, device=device)
    dist.broadcast(shared, 0)
    return shared.item()


def rank_0_first(make: Callable):
    """make() in the first process, then, with its files there, in the others."""
    waits = dist.is_initialized()
    if waits and dist.get_rank() > 0:
        dist.barrier()
    made = make()
    if waits and dist.get_rank() == 0:
        dist.barrier()
    return made


# What stages of both commands do.
def group_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy over the groups of facts."""
    parts = logits.float().split([len(values) for values in GROUPS.values()], -1)
    return sum(F.cross_entropy(part, target[:, i]) for i, part in enumerate(parts)) / len(parts)


def training_caption(scene: world.Scene, rng: np.random.Generator) -> str:
    """What a prior is told of a picture."""
    kept = rng.random()
    if kept < NULL_CAPTION_SHARE:
        return ""
    if kept < NULL_CAPTION_SHARE + WORDS_ALONE_SHARE:
        words = true_words(scene.taste, rng)
        return ", ".join(words[i] for i in rng.permutation(len(words)))
    return world.caption(scene, rng, quality=True)


def augment(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Small shifts, blur and noise: a scorer meets decoded latents, not only clean renders."""
    dx, dy = rng.integers(-4, 5, size=2)
    pixels = F.pad(pixels, (4, 4, 4, 4), mode="replicate")[..., 4 + dy : 132 + dy, 4 + dx : 132 + dx]
    if rng.random() < 0.5:
        pixels = F.interpolate(F.avg_pool2d(pixels, 2), scale_factor=2, mode="bilinear")
    return (pixels + rng.uniform(0, 0.04) * torch.randn_like(pixels)).clamp(0, 1)


@torch.no_grad()
def encode_all(shop: Workshop, vae, renders: Renders) -> Tensor:
    """Latents [N, 4, 16, 16] in float16 of all renders, kept in the work folder."""
    from tqdm.auto import tqdm

    file = shop.work / f"latents-{renders.seed}.pt"
    if file.exists():
        return torch.load(file, weights_only=True)
    latents = []
    for start in tqdm(range(0, renders.count, 128), desc="encoding"):
        images = renders.images(np.arange(start, min(start + 128, renders.count)))
        with shop.autocast():
            latents.append(vae.encode(to_pixels(images, shop.device) * 2 - 1).latents.half().cpu())
    torch.save(torch.cat(latents), file)
    return torch.cat(latents)


def stratified_timesteps(count: int, steps: int, generator: torch.Generator) -> Int[Tensor, " count"]:
    """One t from each of `count` equal shares of the schedule: every batch has the same spread of noise levels."""
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return (u * steps).long().clamp(max=steps - 1)  # u may be rounded to 1


def workshop_from_command_line(description: str, stages: tuple[str, ...]) -> Workshop:
    """The flags of a training command, and its part in torchrun's group of processes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(".toybox"), help="renders and checkpoints (gigabytes)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stages", nargs="*", choices=stages, default=[], help="which to run; none named: all")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    parser.add_argument(
        "--warm", type=int, nargs="?", const=1, default=0, metavar="CYCLE",
        help="go on from the weights in assets/toybox; every further cycle of a stage needs a number of its own",
    )  # fmt: skip
    parser.add_argument("--steps-scale", type=float, default=1.0, help="multiplies every stage's number of steps")
    parser.add_argument(
        "--batch-scale", type=float, default=1.0, help="multiplies every stage's batch; 4 to 8 on a GPU"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="end each stage after so long at the latest")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw batches ahead, where a GPU waits")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    if args.threads:
        torch.set_num_threads(args.threads)
    if "RANK" in os.environ:
        # A patient one: the first process may be drawing for an hour.
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo", timeout=timedelta(hours=6))
        if args.device == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
    return Workshop(
        torch.device(args.device), args.work, args.steps_scale, tuple(args.stages or stages), args.warm,
        batch_scale=args.batch_scale, minutes=args.minutes, workers=args.workers,
    )  # fmt: skip
