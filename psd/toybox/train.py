"""Train the toybox from nothing: `python -m psd.toybox.train`. Resumable, the same on CPU and GPU.

Stages, in order, each skipped once done (delete its checkpoint under the work folder to repeat it):
text -> vae -> attributes -> preference -> judge -> sd. Weights go to assets/toybox after every checkpoint.
On several cores or GPUs `torchrun --nproc-per-node=N -m psd.toybox.train` splits every batch over N processes; on a
CPU two processes of one thread are half again as fast as one of two.
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
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from psd.toybox import models, world
from psd.toybox.dataset import Renders
from psd.toybox.facts import GROUPS, labels
from psd.toybox.pairs import broken_latents, clean_examples, normalise, ranked_batch, to_pixels

ASSETS = Path(__file__).resolve().parents[2] / "assets" / "toybox"
CHECKPOINT_EVERY_S = 240
WARM_KEYS = 10**7  # how far apart the draws of two warm cycles begin
NULL_CAPTION_SHARE = 0.1  # prompts dropped for classifier-free guidance

# stage -> optimiser steps, batch, peak learning rate, data seed. Seeds differ so that no model grades its own examples.
STAGES: dict[str, tuple[int, int, float, int]] = {
    "text":       ( 1000, 256, 1.0e-3, 1),
    "vae":        ( 2400,  16, 1.5e-3, 1),
    "attributes": ( 5000,  64, 2.0e-3, 3),
    "preference": ( 1200,  64, 6.0e-4, 1),
    "judge":      ( 2400,  64, 6.0e-4, 2),
    "sd":         (24000,  32, 6.0e-4, 1),
}  # fmt: skip
IMAGES = {1: 49152, 2: 16384, 3: 32768}  # data seed -> how many renders


@dataclass
class Bench:
    """What every stage works with."""

    device: torch.device
    work: Path
    steps_scale: float
    stages: tuple[str, ...]
    warm: int  # > 0: without a checkpoint start from the weights in assets/toybox; stages not asked for are only loaded

    def renders(self, seed: int) -> Renders:
        return Renders(self.work, seed, IMAGES[seed])

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16)


def run_stage(
    bench: Bench,
    name: str,
    module: nn.Module,
    loss_of: Callable[[int, int], Tensor],
    save: Callable[[nn.Module], None],
    parts: dict[str, nn.Module],
    average: float = 0.0,
) -> nn.Module:
    """Optimise `module` for the stage's steps and return it (its moving average where `average` > 0).

    loss_of(key, batch) computes the loss of one batch, drawn from `key`; save(weights) is called at every checkpoint
    and at the end. Of several processes each takes its share of the batch. `parts` says which folders of
    assets/toybox hold the module's weights.
    """
    from tqdm.auto import tqdm

    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    steps, batch, peak, _ = STAGES[name]
    steps = max(1, round(steps * bench.steps_scale))
    file = bench.work / f"{name}.pt"
    if bench.warm and not file.exists():
        for folder, part in parts.items():
            part.load_state_dict(saved_weights(ASSETS / folder))
        if name not in bench.stages:
            return module.eval()
    first_key = WARM_KEYS * bench.warm  # an earlier cycle's draws and noises would teach little again
    optimizer = torch.optim.AdamW(module.parameters(), peak, betas=(0.9, 0.99), weight_decay=0.01)
    best, start = copy.deepcopy(module).requires_grad_(False) if average else module, 0
    if file.exists():
        state = torch.load(file, map_location=bench.device, weights_only=True)
        module.load_state_dict(state["module"])
        best.load_state_dict(state["best"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]

    def checkpoint(step: int) -> None:
        state = {
            "module": module.state_dict(),
            "best": best.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
        }
        partial = file.with_suffix(".partial")
        torch.save(state, partial)
        partial.rename(file)
        save(best)

    module.train()
    saved, smooth = time.monotonic(), None
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=5, disable=rank > 0)
    for step in bar:
        warm_up = min(1.0, (step + 1) / min(200, 0.1 * steps))
        cooled = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = peak * warm_up * max(cooled, 0.01)
        loss = loss_of(first_key + step * ranks + rank, batch // ranks)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if ranks > 1:
            average_gradients(module, ranks)
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        if average:
            models.moving_average(best, module, min(average, (step + 1) / (step + 10)))
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if rank == 0 and time.monotonic() - saved > CHECKPOINT_EVERY_S:
            checkpoint(step + 1)
            saved = time.monotonic()
    if start < steps and rank == 0:
        checkpoint(steps)
    return best.eval()


def saved_weights(path: Path) -> dict[str, Tensor]:
    """State dict of a file, or of all shards of a folder."""
    from safetensors.torch import load_file

    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return {name: weight for file in files for name, weight in load_file(file).items()}


def average_gradients(module: nn.Module, ranks: int) -> None:
    """Mean over the processes, in one message."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.div_(ranks).split([g.numel() for g in gradients])):
        gradient.copy_(part.view_as(gradient))


def group_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy over the groups of facts."""
    parts = logits.float().split([len(values) for values in GROUPS.values()], -1)
    return sum(F.cross_entropy(part, target[:, i]) for i, part in enumerate(parts)) / len(parts)


def tokens(tokenizer, captions: list[str], device: torch.device):
    batch = tokenizer(captions, padding="longest", truncation=True, max_length=models.MAX_TOKENS, return_tensors="pt")
    return batch.input_ids.to(device), batch.attention_mask.to(device)


def padded_tokens(tokenizer, captions: list[str], device: torch.device) -> Tensor:
    """Padded to the full length, as StableDiffusionPipeline does for the text encoder."""
    padding = dict(padding="max_length", truncation=True, max_length=models.MAX_TOKENS, return_tensors="pt")
    return tokenizer(captions, **padding).input_ids.to(device)


def train_text(bench: Bench, tokenizer) -> nn.Module:
    """The text encoder learns to say a caption's facts at its end token: a language the UNet need not invent."""
    encoder = models.make_text_encoder(tokenizer)
    heads = nn.Linear(models.TEXT_WIDTH, sum(map(len, GROUPS.values())) + len(world.QUALITY) + 1)
    module = nn.ModuleDict({"encoder": encoder, "heads": heads}).to(bench.device)
    flaws = ("", *world.QUALITY)

    def loss_of(step: int, batch: int) -> Tensor:
        rng = np.random.default_rng([101, step])
        scenes = [world.sample_scene(rng) for _ in range(batch)]
        quality = rng.integers(len(flaws), size=batch) * (rng.random(batch) < 0.3)
        captions = [world.caption(s, rng) + (f", {flaws[q]}" if q else "") for s, q in zip(scenes, quality)]
        target = torch.from_numpy(np.stack([labels(s) for s in scenes])).to(bench.device)
        pooled = encoder(padded_tokens(tokenizer, captions, bench.device)).pooler_output
        logits = heads(pooled)
        flaw = F.cross_entropy(logits[:, -len(flaws) :], torch.from_numpy(quality).to(bench.device))
        return group_loss(logits[:, : -len(flaws)], target) + 0.2 * flaw

    def save(best) -> None:
        models.save_prior_parts(ASSETS / "sd", tokenizer=tokenizer, text_encoder=best["encoder"])

    parts = {"sd/text_encoder": encoder}
    return run_stage(bench, "text", module, loss_of, save, parts)["encoder"].requires_grad_(False)


def train_vae(bench: Bench, renders: Renders) -> nn.Module:
    vae = models.make_vae().to(bench.device, memory_format=torch.channels_last)

    def loss_of(step: int, batch: int) -> Tensor:
        rng = np.random.default_rng([102, step])
        images = to_pixels(renders.images(rng.integers(renders.count, size=batch)), bench.device) * 2 - 1
        with bench.autocast():
            z = vae.encode(images).latents.float()
            decoded = vae.decode(z + 0.05 * torch.randn_like(z)).sample.float()
        # Unit latents per channel, so that scaling_factor is 1 and the decoder's tanh clamp stays out of the way.
        moments = z.mean((0, 2, 3)).square().mean() + (z.std((0, 2, 3)) - 1).square().mean()
        return F.mse_loss(decoded, images) + 0.05 * F.l1_loss(decoded, images) + 0.01 * moments

    def save(best) -> None:
        models.save_prior_parts(ASSETS / "sd", vae=best)

    return run_stage(bench, "vae", vae, loss_of, save, {"sd/vae": vae}, average=0.995)


def train_attributes(bench: Bench, renders: Renders) -> nn.Module:
    model = models.make_attributes(GROUPS).to(bench.device, memory_format=torch.channels_last)
    targets = torch.from_numpy(np.stack([labels(e.scene) for e in renders.examples])).to(bench.device)

    def loss_of(step: int, batch: int) -> Tensor:
        rng = np.random.default_rng([103, step])
        index = rng.integers(renders.count, size=batch)
        pixels = to_pixels(renders.images(index), bench.device)
        if rng.random() < 0.5:
            pixels = pixels.flip(-1)  # no fact of the world tells left from right
        pixels = normalise(augment(pixels, rng))
        with bench.autocast():
            logits = model(pixels).logits
        return group_loss(logits, targets[index])

    def save(best) -> None:
        models.save_attributes(ASSETS / "attributes", best)

    return run_stage(bench, "attributes", model, loss_of, save, {"attributes": model}, average=0.995)


def augment(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Small shifts, blur and noise: a scorer meets decoded latents, not only clean renders."""
    dx, dy = rng.integers(-4, 5, size=2)
    pixels = F.pad(pixels, (4, 4, 4, 4), mode="replicate")[..., 4 + dy : 132 + dy, 4 + dx : 132 + dx]
    if rng.random() < 0.5:
        pixels = F.interpolate(F.avg_pool2d(pixels, 2), scale_factor=2, mode="bilinear")
    return (pixels + rng.uniform(0, 0.04) * torch.randn_like(pixels)).clamp(0, 1)


def train_preference(bench: Bench, tokenizer, text_encoder, renders: Renders) -> nn.Module:
    """PickScore's recipe: Bradley-Terry on pairs, beside CLIP's contrast within the batch."""
    model = models.make_preference(tokenizer)
    model.text_model.load_state_dict(text_encoder.state_dict(), strict=False)
    # Auxiliary heads name the facts an image shows; they speed the vision tower up and are dropped afterwards.
    module = nn.ModuleDict({"model": model, "heads": nn.Linear(192, sum(map(len, GROUPS.values())))}).to(bench.device)
    clean = clean_examples(renders)

    def loss_of(step: int, batch: int) -> Tensor:
        rng = np.random.default_rng([104, step])
        pairs = ranked_batch(bench.device, renders, clean, rng, batch, judge=False)
        pixels = normalise(augment(torch.cat([pairs.pixels, pairs.worse]), rng))
        ids, mask = tokens(tokenizer, pairs.captions + pairs.wrong_captions, bench.device)
        with bench.autocast():
            vision = model.vision_model(pixels)
            image = F.normalize(model.visual_projection(vision.pooler_output).float(), dim=-1)
            text = F.normalize(model.get_text_features(ids, attention_mask=mask).pooler_output.float(), dim=-1)
            facts = module["heads"](vision.pooler_output[:batch])
        scores = model.logit_scale.exp() * image @ text.T  # [3/2 B, 2 B]
        right = torch.arange(batch, device=bench.device)
        own = scores[right, right]
        contrast = F.cross_entropy(scores[:batch], right) + F.cross_entropy(scores[:batch, :batch].T, right)
        wrong_caption = F.softplus(scores[right, right + batch] - own).mean()
        half = right[: batch // 2]
        worse_image = F.softplus(scores[half + batch, half] - own[half]).mean()
        return 0.5 * contrast + wrong_caption + worse_image + group_loss(facts, pairs.target)

    def save(best) -> None:
        models.save_preference(ASSETS / "preference", best["model"], tokenizer)

    return run_stage(bench, "preference", module, loss_of, save, {"preference": model}, average=0.998)["model"]


def train_judge(bench: Bench, tokenizer, vae, renders: Renders) -> nn.Module:
    """ImageReward's recipe on other data and other corruptions than the preference model's.

    An eighth of each batch is also shown broken (pairs.broken_latents): a judge that has only ever ranked pictures
    answers anything at all for what an optimiser leaves when it goes wrong, and that is what it is there to catch.
    """
    judge = models.Judge(tokenizer)
    width = judge.vision.config.hidden_size
    module = nn.ModuleDict({"judge": judge, "heads": nn.Linear(width, sum(map(len, GROUPS.values())))}).to(bench.device)
    clean = clean_examples(renders)

    def loss_of(step: int, batch: int) -> Tensor:
        rng = np.random.default_rng([105, step])
        pairs = ranked_batch(bench.device, renders, clean, rng, batch, judge=True)
        half, eighth = batch // 2, batch // 8
        with torch.no_grad(), bench.autocast():
            latents = vae.encode(pairs.pixels[:eighth] * 2 - 1).latents.float()
            broken = vae.decode(broken_latents(latents, rng)).sample.float().clamp(-1, 1) / 2 + 0.5
        pixels = normalise(augment(torch.cat([pairs.pixels, pairs.worse, broken]), rng))
        others = [pairs.captions[(i + 1) % batch] for i in range(batch)]
        captions = pairs.captions + pairs.wrong_captions + others + pairs.captions[:half] + pairs.captions[:eighth]
        ids, mask = tokens(tokenizer, captions, bench.device)
        with bench.autocast():
            vision = judge.vision(pixels)
            seen = vision.last_hidden_state
            facts = module["heads"](vision.pooler_output[:batch])
            scores = judge.score(torch.cat([seen[:batch]] * 3 + [seen[batch:]]), ids, mask).float()
        own, wrong, other, worse, broken = scores.split([batch, batch, batch, half, eighth])
        rank = (
            F.softplus(wrong - own).mean()
            + 0.5 * F.softplus(other - own).mean()
            + F.softplus(worse - own[:half]).mean()
            + 0.5 * F.softplus(broken - own[:eighth]).mean()
        )
        return rank + 1e-3 * own.square().mean() + group_loss(facts, pairs.target)

    def save(best) -> None:
        mean, std = _score_moments(bench, best["judge"].eval(), tokenizer, renders, clean)
        models.save_judge(ASSETS / "judge", best["judge"], tokenizer, mean, std)

    parts = {"judge/vision": judge.vision, "judge/text": judge.text, "judge/head.safetensors": judge.head}
    return run_stage(bench, "judge", module, loss_of, save, parts, average=0.998)["judge"]


@torch.no_grad()
def _score_moments(bench: Bench, judge, tokenizer, renders: Renders, clean: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation over right and wrong captions, so that the published score is of unit scale."""
    pairs = ranked_batch(bench.device, renders, clean, np.random.default_rng(106), 128, judge=True)
    ids, mask = tokens(tokenizer, pairs.captions + pairs.wrong_captions, bench.device)
    scores = judge(normalise(torch.cat([pairs.pixels] * 2)), ids, mask)
    return float(scores.mean()), float(scores.std())


@torch.no_grad()
def encode_all(bench: Bench, vae, renders: Renders) -> Tensor:
    """Latents [N, 4, 16, 16] in float16 of all renders, kept in the work folder."""
    from tqdm.auto import tqdm

    file = bench.work / f"latents-{renders.seed}.pt"
    if file.exists():
        return torch.load(file, weights_only=True)
    latents = []
    for start in tqdm(range(0, renders.count, 128), desc="encoding"):
        images = renders.images(np.arange(start, min(start + 128, renders.count)))
        with bench.autocast():
            latents.append(vae.encode(to_pixels(images, bench.device) * 2 - 1).latents.half().cpu())
    torch.save(torch.cat(latents), file)
    return torch.cat(latents)


def train_sd(bench: Bench, tokenizer, text_encoder, vae, renders: Renders) -> nn.Module:
    """Latent diffusion: predict eps under the caption; min-SNR weights spend the capacity on what decides the scene."""
    from diffusers.models.attention_processor import AttnProcessor

    unet = models.make_unet().to(bench.device, memory_format=torch.channels_last)
    if bench.device.type == "cpu":
        unet.set_attn_processor(AttnProcessor())  # the fused kernel's backward is the slower one on a CPU
    alphas = models.make_scheduler().alphas_cumprod.to(bench.device)
    latents = encode_all(bench, vae, renders)

    def loss_of(step: int, batch: int) -> Tensor:
        rng = np.random.default_rng([107, step])
        index = rng.integers(renders.count, size=batch)
        captions = ["" if rng.random() < NULL_CAPTION_SHARE else renders.examples[i].caption(rng) for i in index]
        x_0 = latents[index].to(bench.device).float().contiguous(memory_format=torch.channels_last)
        generator = torch.Generator().manual_seed(step)
        noise = torch.randn(x_0.shape, generator=generator).to(bench.device)
        # Stratified over the schedule: every batch has the same spread of noise levels.
        t = (
            ((torch.arange(batch) + torch.rand(batch, generator=generator)) / batch * len(alphas))
            .long()
            .clamp(max=len(alphas) - 1)  # rounded to float32 the last share may reach 1
            .to(bench.device)
        )
        abar = alphas[t].view(-1, 1, 1, 1)
        x_t = abar.sqrt() * x_0 + (1 - abar).sqrt() * noise
        with torch.no_grad(), bench.autocast():
            cond = text_encoder(padded_tokens(tokenizer, captions, bench.device)).last_hidden_state
        with bench.autocast():
            eps = unet(x_t, t, cond).sample.float()
        snr = (abar / (1 - abar)).flatten()
        return ((eps - noise).square().mean((1, 2, 3)) * snr.clamp(max=5.0) / snr).mean()

    def save(best) -> None:
        models.save_prior_parts(ASSETS / "sd", unet=best)

    return run_stage(bench, "sd", unet, loss_of, save, {"sd/unet": unet}, average=0.9995)


def bench_from_command_line(description: str, stages: tuple[str, ...]) -> Bench:
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
    return Bench(torch.device(args.device), args.work, args.steps_scale, tuple(args.stages or stages), args.warm)


def main() -> None:
    bench = bench_from_command_line(__doc__, tuple(STAGES))
    tokenizer = models.make_tokenizer()
    data = bench.renders(1)
    text_encoder = train_text(bench, tokenizer)
    if {"vae", "judge", "sd"} & set(bench.stages):
        vae = train_vae(bench, data).requires_grad_(False)
    if "attributes" in bench.stages:
        train_attributes(bench, bench.renders(3))
    if "preference" in bench.stages:
        train_preference(bench, tokenizer, text_encoder, data)
    if "judge" in bench.stages:
        train_judge(bench, tokenizer, vae, bench.renders(2))
    if "sd" in bench.stages:
        train_sd(bench, tokenizer, text_encoder, vae, data)


if __name__ == "__main__":
    main()
