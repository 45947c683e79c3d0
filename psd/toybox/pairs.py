"""What the rewards are trained and tested on: a picture under a wrong caption, one of less taste under its own."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from psd.models.rewards.preprocess import CLIP_MEAN, CLIP_STD
from psd.toybox import kinds, world
from psd.toybox.dataset import Renders
from psd.toybox.facts import labels
from psd.toybox.taste import AXES


def to_pixels(images: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] in [0, 1], channels last."""
    return torch.as_tensor(images, device=device).permute(0, 3, 1, 2).float().div_(255)


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
    """Bend the picture: straight edges wobble, circles dent (the first of the judge's own ideas of a bad image)."""
    size = image.shape[0]
    field = torch.from_numpy(rng.normal(0, rng.uniform(0.05, 0.12), (1, 2, 6, 6)).astype(np.float32))
    shift = F.interpolate(field, (size, size), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    grid = F.affine_grid(torch.eye(2, 3)[None], (1, 3, size, size), align_corners=False) + shift
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    bent = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return bent[0].permute(1, 2, 0).numpy().clip(0, 255).astype(np.uint8)


def smudge(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Copy patches elsewhere until it shows: misplaced pieces (the second)."""
    spoilt = image.copy()
    while (spoilt != image).any(-1).mean() < 0.03:
        side = int(rng.integers(12, 30))
        (y0, x0), (y1, x1) = rng.integers(10, 108 - side, (2, 2))
        spoilt[y1 : y1 + side, x1 : x1 + side] = image[y0 : y0 + side, x0 : x0 + side]
    return spoilt


def broken_latents(latents: Tensor, rng: np.random.Generator) -> Tensor:
    """Latents [B, C, h, w] of pictures that went wrong, as failed optimisations leave them (the third).

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


@dataclass(frozen=True)
class Liking:
    """What a reward cares for beside the facts: how much each axis of taste counts, and what else spoils a picture."""

    weights: dict[str, float]
    spoils: tuple = ()  # of the pictures that have no twin of clearly less taste

    def of(self, tastes: np.ndarray) -> np.ndarray:
        """Weighted mean of tastes [..., 5], in [0, 1]."""
        weights = np.array([self.weights.get(axis, 0.0) for axis in AXES], np.float32)
        return tastes @ (weights / weights.sum())


# The judge weighs the axes otherwise and sees finish, which preference does not: it tells taste from hacking.
PREFERENCE = Liking({"colour": 0.35, "light": 0.3, "sharpness": 0.2, "framing": 0.15})
JUDGE = Liking({"colour": 0.2, "light": 0.2, "finish": 0.25, "sharpness": 0.2, "framing": 0.15}, (warp, smudge))
CLEARLY = 0.1  # least difference of two twins' taste that is asked for
SPOILT_SHARE = 0.3  # of the worse pictures, where the liking names a way


@dataclass
class Ranked:
    """A batch of comparisons: the picture under its own caption, under a wrong one, and a worse picture of its scene.

    worse[i] is of less taste than images[i], by more than CLEARLY, or spoilt; the same caption holds of both.
    """

    images: np.ndarray  # uint8 [B, 128, 128, 3]
    captions: list[str]
    wrong_captions: list[str]
    worse: np.ndarray  # uint8 [B // 2, 128, 128, 3], of the first half
    target: np.ndarray  # facts [B, 8]
    liked: np.ndarray  # [B + B // 2] of images and worse: their taste as the liking weighs it; 0 where spoilt


def ranked_batch(renders: Renders, liking: Liking, rng: np.random.Generator, batch: int) -> Ranked:
    """The first half are twins that clearly differ in taste, the second any pictures of other scenes."""
    half, liked = batch // 2, liking.of(renders.tastes).reshape(-1, 2)
    clear = np.flatnonzero(np.abs(liked[:, 1] - liked[:, 0]) > CLEARLY)
    ranked = rng.choice(clear, half, replace=False)
    others = rng.choice(np.setdiff1d(np.arange(len(liked)), ranked), batch - half, replace=False)
    better = liked[ranked].argmax(1)
    index = np.concatenate([2 * ranked + better, 2 * others + rng.integers(2, size=len(others))])
    images, worse = renders.images(index), renders.images(2 * ranked + 1 - better)
    shown = np.concatenate([liked.flatten()[index], liked[ranked, 1 - better]])
    for i in np.flatnonzero(rng.random(half) < SPOILT_SHARE) if liking.spoils else ():
        worse[i] = liking.spoils[int(rng.integers(len(liking.spoils)))](images[i], rng)
        shown[batch + i] = 0
    scenes = [renders.scenes[i] for i in index]
    return Ranked(
        images=images,
        captions=[world.caption(scene, rng) for scene in scenes],
        wrong_captions=[world.caption(wrong_scene(scene, rng), rng) for scene in scenes],
        worse=worse,
        target=np.stack([labels(scene) for scene in scenes]),
        liked=shown,
    )
