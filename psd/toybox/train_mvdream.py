"""Train the multi-view toybox: `python -m psd.toybox.train_mvdream`. Resumable, the same on CPU and GPU.

Stages, in order, each skipped once done:
mvdream  the prior of four views at once, from the UNet of toybox/sd; assets/toybox/mvdream
views    a classifier of views from all sides, from toybox/attributes, to measure that prior by; assets/toybox/views
reward3d a reward of four views together, on toybox/preference's towers (psd.toybox.reward3d); assets/toybox/reward3d
As psd.toybox.train does, it keeps data and checkpoints in a work folder, writes the weights to assets/toybox at every
checkpoint, and splits every batch over the processes of torchrun.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from psd.models.priors import load_prior
from psd.models.priors.mvdream import predict, start_from
from psd.models.priors.stable_diffusion import StableDiffusionPrior
from psd.models.weights import tokenize
from psd.scene.cameras import camera_embedding, sample_cameras
from psd.toybox import models, world
from psd.toybox.classifier import load_attributes
from psd.toybox.dataset import example
from psd.toybox.facts import labels
from psd.toybox.pairs import normalise, to_pixels
from psd.toybox.raster import BACKGROUND
from psd.toybox.recolour import recolour
from psd.toybox.reward3d import train_reward3d
from psd.toybox.views import AZIMUTHS, TOYBOX_RIG, VIEW_GROUPS, VIEWS, Groups, azimuth_target, shows_azimuth
from psd.toybox.workshop import (
    STAGES,
    Workshop,
    augment,
    encode_all,
    group_loss,
    rank_0_first,
    run_stage,
    stratified_timesteps,
    training_caption,
    workshop_from_command_line,
)

PAIRS_SEED = 6  # data seed of the pairs that the classifier of views sees beside those that come by chance
GROUPS_DRAWN = {4: 12288, 5: 8192, PAIRS_SEED: 4096}  # data seed -> how many groups
SINGLE_SHARE = 0.15  # of a step's images: pictures without a camera, as MVDream mixes them, with this share of the loss
SINGLES_SEED = 1  # their data seed: what toybox/sd was trained on
CAMERA_GAIN, CAMERA_STD = 4.0, 0.5  # of the camera embedding at the start, see `open_camera`
AZIMUTH_WEIGHT = 0.25  # of the azimuth beside the mean of the eight facts
PAIR_SHARE = 0.4  # of a batch of views: pairs beside those that come by chance; they are rare and the hardest to read


def train_mvdream(shop: Workshop) -> nn.Module:
    """MVDream's recipe: predict eps of four views of one object, each told its camera, beside single pictures."""
    base = load_prior("toybox/sd", str(shop.device))
    unet = start_from(base.unet).float().to(memory_format=torch.channels_last)
    open_camera(unet)
    seed = STAGES["mvdream"].seed
    groups = rank_0_first(lambda: Groups(shop.work, seed, GROUPS_DRAWN[seed], encode=encoder(shop, base)))
    cameras = camera_embedding(torch.from_numpy(groups.poses).flatten(0, 1)).unflatten(0, (-1, VIEWS))
    latents, scenes = rank_0_first(lambda: single_pictures(shop, base))

    def draw_part(x_0: Tensor, shown: list[world.Scene], rng, generator) -> tuple[Tensor, ...]:
        """Of `shown` scenes with one t and one caption each: their views in a row, or a single picture each."""
        captions = [training_caption(scene, rng) for scene in shown]
        t = stratified_timesteps(len(shown), len(base.alphas_cumprod), generator)
        return (
            x_0,
            torch.randn(x_0.shape, generator=generator),
            t,
            tokenize(base.tokenizer, captions, base.max_tokens).input_ids,
        )

    def draw(key: int, batch: int):
        rng, generator = np.random.default_rng([108, key]), torch.Generator().manual_seed(key)
        index = rng.integers(groups.count, size=batch)
        x_0, shown = torch.from_numpy(groups.take(index)).flatten(0, 1), [groups.groups[i].scene for i in index]
        together = (*draw_part(x_0, shown, rng, generator), cameras[index].flatten(0, 1))
        index = rng.integers(len(latents), size=max(1, round(batch * VIEWS * SINGLE_SHARE / (1 - SINGLE_SHARE))))
        return together, draw_part(latents[index], [scenes[i] for i in index], rng, generator)

    def part_loss(x_0: Tensor, noise: Tensor, t: Tensor, ids: Tensor, camera: Tensor | None = None) -> Tensor:
        views = len(x_0) // len(t)
        x_0, t = x_0.float(), t.repeat_interleave(views)
        abar = base.alphas_cumprod[t].view(-1, 1, 1, 1)
        x_t = (abar.sqrt() * x_0 + (1 - abar).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            cond = base.text_encoder(ids).last_hidden_state.repeat_interleave(views, 0)
        with shop.autocast():
            eps = predict(unet, x_t, t, cond, camera, views).float()
        return ((eps - noise).square().mean((1, 2, 3)) * loss_weight((abar / (1 - abar)).flatten())).mean()

    def loss_of(together: tuple[Tensor, ...], alone: tuple[Tensor, ...]) -> Tensor:
        return (1 - SINGLE_SHARE) * part_loss(*together) + SINGLE_SHARE * part_loss(*alone)

    def save(best) -> None:
        save_mvdream(shop.assets / "mvdream", best)

    return run_stage(shop, "mvdream", unet, draw, loss_of, save, {"mvdream/unet": unet}, average=0.999)


@torch.no_grad()
def open_camera(unet: nn.Module) -> None:
    """Let the camera be heard from the first step: the zero start that keeps a large prior intact learns it late.

    The embedding of the rig's cameras gets mean 0 and CAMERA_STD times the spread that the time embedding has over t.
    CAMERA_GAIN makes its first layer bend: as usually drawn, the embedding is linear in the cameras' sines and cosines,
    and front and back, opposite in it, can hardly share what they have in common.
    """
    generator = torch.Generator().manual_seed(110)
    first, last = unet.class_embedding.linear_1, unet.class_embedding.linear_2
    first.weight.copy_(CAMERA_GAIN * torch.rand(first.weight.shape, generator=generator).mul(2).sub(1) / 4)
    first.bias.zero_()
    last.weight.copy_(torch.randn(last.weight.shape, generator=generator))
    last.bias.zero_()
    times = unet.time_embedding(unet.time_proj(torch.arange(0, 1000, 10, device=unet.device)))
    cameras = sample_cameras(TOYBOX_RIG, VIEWS, generator, groups=64).to(unet.device)
    drawn = unet.class_embedding(camera_embedding(cameras.c2w))
    last.weight.mul_(CAMERA_STD * times.std(0).mean() / drawn.std(0).mean())
    last.bias.sub_(unet.class_embedding(camera_embedding(cameras.c2w)).mean(0))


def loss_weight(snr: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Of the squared error of eps-hat: min-SNR-5, times 1 / sqrt(SNR) where the SNR is below 1.

    The camera decides what is drawn while there is little but noise, where the error of eps-hat barely shows it:
    min-SNR leaves 0.004 of it at t = 950 and 0.033 at t = 600, this weight 0.04 and 0.07.
    """
    return snr.clamp(max=5.0) / snr / snr.clamp(max=1.0).sqrt()


def encoder(shop: Workshop, prior: StableDiffusionPrior) -> Callable[[np.ndarray], np.ndarray]:
    """uint8 images [n, V, S, S, 3] -> float16 latents [n, V, C, h, w]."""

    @torch.no_grad()
    def encode(images: np.ndarray) -> np.ndarray:
        with shop.autocast():
            x = prior.encode(to_pixels(images.reshape(-1, *images.shape[2:]), shop.device))
        return x.half().cpu().numpy().reshape(*images.shape[:2], *x.shape[1:])

    return encode


def single_pictures(shop: Workshop, prior: StableDiffusionPrior) -> tuple[Float[Tensor, "N C h w"], list[world.Scene]]:
    """toybox/sd's own training latents; encoded here where the work folder has none."""
    file = shop.work / f"latents-{SINGLES_SEED}.pt"
    if not file.exists():
        encode_all(shop, prior.vae, shop.renders(SINGLES_SEED))
    latents = torch.load(file, weights_only=True)
    return latents, [example(SINGLES_SEED, index)[0] for index in range(len(latents))]


def save_mvdream(folder: Path, unet: nn.Module) -> None:
    """A diffusers folder of the UNet alone: model_index.json names the folder whose other parts go with it."""
    import diffusers

    models.save_halved(folder / "unet", unet)
    index = {
        "_class_name": "MVDreamPipeline", "_diffusers_version": diffusers.__version__, "base": "../sd",
        "unet": ["diffusers", "UNet2DConditionModel"],
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def train_views(shop: Workshop) -> nn.Module:
    """The facts and, of kinds that show it, the azimuth; no mirrored pictures: they would be seen from elsewhere."""
    seed = STAGES["views"].seed
    groups = rank_0_first(lambda: Groups(shop.work, seed, GROUPS_DRAWN[seed]))
    pairs = rank_0_first(lambda: Groups(shop.work, PAIRS_SEED, GROUPS_DRAWN[PAIRS_SEED], pairs=1.0))
    every = groups.groups + pairs.groups
    scenes = [drawn.scene for drawn in every]
    facts = np.stack([labels(scene) for scene in scenes])
    shows = np.array([shows_azimuth(scene) for scene in scenes])
    azimuths = np.array([drawn.azimuth_deg for drawn in every], np.float32)
    model = models.make_attributes(VIEW_GROUPS).to(shop.device, memory_format=torch.channels_last)
    start_from_attributes(model)

    def draw(key: int, batch: int):
        rng = np.random.default_rng([109, key])
        more = round(PAIR_SHARE * batch)
        by_chance, paired = rng.integers(groups.count, size=batch - more), rng.integers(pairs.count, size=more)
        order, view = rng.permutation(batch), rng.integers(VIEWS, size=batch)
        index = np.concatenate([by_chance, groups.count + paired])[order]
        images = np.concatenate([groups.take(by_chance), pairs.take(paired)])[order, view]
        return rng, images, facts[index], azimuths[index, view], shows[index]

    def loss_of(rng, images: Tensor, facts: Tensor, azimuths: Tensor, shows: Tensor) -> Tensor:
        pixels = augment(wear(to_pixels(images, shop.device), rng), rng)
        pixels, stated_facts = recolour(pixels, facts, rng)
        with shop.autocast():
            logits = model(normalise(pixels)).logits
        stated, seen_from = logits.float().tensor_split([-len(AZIMUTHS)], 1)
        wrong = F.cross_entropy(seen_from, azimuth_target(azimuths), reduction="none")
        azimuth = (wrong * shows).sum() / shows.sum().clamp(min=1)
        return group_loss(stated, stated_facts) + AZIMUTH_WEIGHT * azimuth

    def save(best) -> None:
        models.save_image_model(shop.assets / "views", best)

    return run_stage(shop, "views", model, draw, loss_of, save, {"views": model}, average=0.995)


def wear(pixels: Float[Tensor, "B 3 H W"], rng: np.random.Generator) -> Float[Tensor, "B 3 H W"]:
    """What distilled objects look like beside clean renders: every second picture mottled, half of them blurred."""
    batch, _, size, _ = pixels.shape
    spots = torch.from_numpy(rng.normal(size=(batch, 3, size // 8, size // 8))).to(pixels)
    spots *= torch.from_numpy(rng.uniform(0, 0.2, batch) * (rng.random(batch) < 0.5)).to(pixels).view(-1, 1, 1, 1)
    background = torch.from_numpy(BACKGROUND).to(pixels).view(1, 3, 1, 1)
    thing = (pixels - background).abs().amax(1, keepdim=True) > 0.02
    pixels = pixels + thing * F.interpolate(spots, size=(size, size), mode="bilinear")
    coarse = int(rng.integers(size // 4, size // 2))
    half = F.interpolate(pixels[: batch // 2], size=(coarse, coarse), mode="bilinear", antialias=True)
    half = F.interpolate(half, size=(size, size), mode="bilinear")
    return torch.cat([half, pixels[batch // 2 :]]).clamp(0, 1)


@torch.no_grad()
def start_from_attributes(model: nn.Module) -> None:
    """Take over toybox/attributes; it has never seen a back. Of the head only the azimuth's rows stay as drawn."""
    own = model.state_dict()
    for name, weight in load_attributes(str(model.device)).model.state_dict().items():
        if weight.ndim:
            own[name][: len(weight)] = weight


TRAINERS = {"mvdream": train_mvdream, "views": train_views, "reward3d": train_reward3d}


def main() -> None:
    shop = workshop_from_command_line(__doc__, tuple(TRAINERS))
    for stage in shop.stages:
        TRAINERS[stage](shop)


if __name__ == "__main__":
    main()
