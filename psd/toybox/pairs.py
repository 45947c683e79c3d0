"""What the rewards are trained and tested on: a picture under a wrong caption, a worse picture under its own."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from psd.models.rewards.preprocess import CLIP_MEAN, CLIP_STD
from psd.toybox import kinds, world
from psd.toybox.dataset import Renders, degrade
from psd.toybox.facts import labels


def to_pixels(images: np.ndarray, device: torch.device) -> Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] in [0, 1], channels last."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float().div_(255)


def normalise(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


def wrong_scene(scene: world.Scene, rng: np.random.Generator) -> world.Scene:
    """The scene with one fact changed, so that its caption is false of the original's picture."""
    if scene.second is not None and rng.random() < 0.3:
        if rng.random() < 0.5:
            return replace(scene, relation="next" if scene.relation == "on" else "on")
        first, second = scene.things()  # swap the colours: binding, not only presence
        return replace(scene, first=replace(first, colour=second.colour), second=replace(second, colour=first.colour))
    slot = "second" if scene.second is not None and rng.random() < 0.5 else "first"
    return replace(scene, **{slot: _wrong_thing(getattr(scene, slot), scene.second is not None, rng)})


def _wrong_thing(thing: world.Thing, in_pair: bool, rng: np.random.Generator) -> world.Thing:
    changes = ["kind", "colour", "colour"]
    if thing.part_colour:
        changes.append("part_colour")
    if thing.part_colour not in ("", thing.colour):
        changes.append("swap")
    if not in_pair:
        changes.append("proportion")
        if not thing.material:  # the other way round would be no mistake: metal that is not called metal
            changes.append("material")
    change = str(rng.choice(changes))
    if change == "swap":
        return replace(thing, colour=thing.part_colour, part_colour=thing.colour)
    if change == "material":
        return replace(thing, material="metal")
    values = {
        "kind": [
            k for k in (kinds.PAIRABLE if in_pair else kinds.KINDS) if kinds.KINDS[k].part or not thing.part_colour
        ],
        "colour": list(world.COLOURS),
        "part_colour": list(world.COLOURS),
        "proportion": [name for name in world.PROPORTIONS if name],
    }[change]
    old = getattr(thing, change)
    return replace(thing, **{change: str(rng.choice([value for value in values if value != old]))})


def warp(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Bend the picture: straight edges wobble, circles dent (the judge's own idea of a bad image)."""
    size = image.shape[0]
    field = torch.from_numpy(rng.normal(0, rng.uniform(0.05, 0.12), (1, 2, 6, 6)).astype(np.float32))
    shift = F.interpolate(field, (size, size), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    grid = F.affine_grid(torch.eye(2, 3)[None], (1, 3, size, size), align_corners=False) + shift
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    bent = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return bent[0].permute(1, 2, 0).numpy().clip(0, 255).astype(np.uint8)


def smudge(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Copy patches elsewhere until it shows: misplaced pieces (the judge's second corruption)."""
    spoilt = image.copy()
    while (spoilt != image).any(-1).mean() < 0.03:
        side = int(rng.integers(12, 30))
        (y0, x0), (y1, x1) = rng.integers(10, 108 - side, (2, 2))
        spoilt[y1 : y1 + side, x1 : x1 + side] = image[y0 : y0 + side, x0 : x0 + side]
    return spoilt


def worse_image(image: np.ndarray, rng: np.random.Generator, judge: bool) -> np.ndarray:
    """A picture of the same scene that a viewer likes less."""
    if judge:
        flaw = int(rng.integers(3))
        return warp(image, rng) if flaw == 0 else smudge(image, rng) if flaw == 1 else degrade(image, "blurry", rng)
    return degrade(image, str(rng.choice(world.QUALITY)), rng)


def broken_latents(latents: Tensor, rng: np.random.Generator) -> Tensor:
    """Latents [B, C, h, w] of pictures that went wrong, as failed optimisations leave them (the judge's third kind).

    Each is pushed by noise of one random scale of blotches, blended with another picture, or blown up in contrast.
    """
    count, channels, height, width = latents.shape
    cells = int(2 ** rng.integers(0, 5))
    noise = torch.from_numpy(rng.standard_normal((count, channels, min(cells, height), min(cells, width))))
    noise = F.interpolate(noise.float(), (height, width), mode="bicubic").to(latents)
    noise = noise / noise.std((1, 2, 3), keepdim=True).clamp(min=1e-3)
    strength, blend, gain = (
        torch.from_numpy(values).to(latents).view(-1, 1, 1, 1)
        for values in (rng.uniform(0.2, 2.5, count), rng.uniform(0, 0.6, count), rng.uniform(1, 2.5, count))
    )
    return gain * ((1 - blend) * latents + blend * latents.roll(1, 0) + strength * noise)


@dataclass
class Ranked:
    """A batch of comparisons: the image under its own caption, under a wrong one, and a worse image under its own."""

    pixels: Tensor  # [B, 3, 128, 128] in [0, 1]
    captions: list[str]
    wrong_captions: list[str]
    worse: Tensor  # [B // 2, 3, 128, 128], of the first half
    target: Tensor  # facts [B, 8]


def ranked_batch(
    device: torch.device, renders: Renders, clean: np.ndarray, rng: np.random.Generator, batch: int, judge: bool
) -> Ranked:
    index = rng.choice(clean, batch, replace=False)
    images = renders.images(index)
    scenes = [renders.examples[i].scene for i in index]
    worse = np.stack([worse_image(image, rng, judge) for image in images[: batch // 2]])
    return Ranked(
        pixels=to_pixels(images, device),
        captions=[world.caption(scene, rng) for scene in scenes],
        wrong_captions=[world.caption(wrong_scene(scene, rng), rng) for scene in scenes],
        worse=to_pixels(worse, device),
        target=torch.from_numpy(np.stack([labels(scene) for scene in scenes])).to(device),
    )


def clean_examples(renders: Renders) -> np.ndarray:
    return np.array([i for i, e in enumerate(renders.examples) if not e.quality])
