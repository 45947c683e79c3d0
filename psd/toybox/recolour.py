"""Pictures in other colours: what breaks the correlation of kinds and colours that held-out combinations leave.

In the training data each kind lacks a colour, and a classifier learns that too.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from psd.toybox import world
from psd.toybox.facts import GROUPS
from psd.toybox.raster import BACKGROUND

IGNORED = -100  # as a class label: cross_entropy's own
GREY_SHARE = 0.2  # of a batch: pictures of one tint
GREY_AXIS = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)  # its exponential turns hues
TURNS_TRIED = 6  # to find one that gives an object's main colour another name
COLOUR_TOLERANCE = 60 / 255  # Euclidean, in RGB: how far from a named colour one of this name may be


def recolour(
    pixels: Float[Tensor, "B 3 H W"], target: Int[Tensor, "B G"], rng: np.random.Generator
) -> tuple[Float[Tensor, "B 3 H W"], Int[Tensor, "B G"]]:
    """Half the pictures with their hues turned, every second of these with red and green exchanged; some in one tint.

    Colours are asked for by the name
    they have after the turn; those near no name, or near two, are not asked for, nor any of a tinted picture. The
    background stays as it is: it would tell which pictures were turned.
    """
    batch, main = len(pixels), target[:, list(GROUPS).index("colour_a")].cpu().numpy()
    angle = rng.uniform(0, 2 * np.pi, (batch, TURNS_TRIED, 1, 1))
    turns = np.cos(angle) * np.eye(3) + (1 - np.cos(angle)) / 3 + np.sin(angle) * GREY_AXIS
    turns = np.where(rng.random(angle.shape) < 0.5, turns, turns[..., [1, 0, 2]])
    renamed, rows = names_after(turns), np.arange(batch)
    after = renamed[rows, :, main]
    first = ((after != IGNORED) & (after != main[:, None])).argmax(1)  # that gives the main colour another name
    left = (rng.random(batch) < 0.5)[:, None]
    turn = np.where(left[..., None], np.eye(3), turns[rows, first])
    renamed = np.where(left, np.arange(len(world.COLOURS)), renamed[rows, first])
    grey, tint = rng.random(batch) < GREY_SHARE, rng.uniform(0.5, 1.2, (batch, 3))
    turn[grey], renamed[grey] = tint[grey, :, None] / 3, IGNORED

    target = target.clone()
    for column, (group, values) in enumerate(GROUPS.items()):
        if "colour" in group:
            others = len(values) - len(world.COLOURS)  # "none" stays what it is
            names = np.where(renamed == IGNORED, IGNORED, renamed + others)
            names = np.concatenate([np.tile(np.arange(others), (batch, 1)), names], 1)
            target[:, column] = torch.from_numpy(names[rows, target[:, column].cpu().numpy()]).to(target)
    turn, background = torch.from_numpy(turn).to(pixels), torch.from_numpy(BACKGROUND).to(pixels).view(3, 1, 1)
    return (torch.einsum("bij,bjhw->bihw", turn, pixels - background) + background).clamp(0, 1), target


def names_after(turns: Float[np.ndarray, "*batch 3 3"]) -> Int[np.ndarray, "*batch colours"]:
    """For every named colour the index of the name that it has once turned about the background's, or IGNORED."""
    named = np.array(list(world.COLOURS.values())) / 255
    turned = (np.einsum("...ij,kj->...ki", turns, named - BACKGROUND) + BACKGROUND).clip(0, 1)
    distance = np.linalg.norm(turned[..., None, :] - named, axis=-1)
    nearest, second = np.moveaxis(np.sort(distance)[..., :2], -1, 0)
    clear = (nearest <= COLOUR_TOLERANCE) & (second >= 1.6 * nearest)
    return np.where(clear, distance.argmin(-1), IGNORED)
