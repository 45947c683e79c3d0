"""Groups of views: one object seen from four sides 90 degrees apart, with its cameras. What toybox/mvdream learns from.

A group is a pure function of (seed, index), like the single examples of dataset.py: the same scenes, held-out rule and
tastes. Also what can be told of a view's azimuth: which kinds show it, how a classifier says it.
This file knows nothing of diffusion models; what is kept of a group is its user's choice.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from psd.scene.rig import Rig
from psd.toybox import kinds, world
from psd.toybox.dataset import IMAGE_SIZE, example
from psd.toybox.facts import GROUPS
from psd.toybox.raster import BACKGROUND, Surface, camera_to_world, render
from psd.toybox.taste import Taste, worn

VIEWS = 4
FOVY_DEG = 40.0
_FOCAL = 1 / np.tan(np.deg2rad(FOVY_DEG / 2))  # the distance that a Rig calls 1
# Around the distance 1.95 of world.draw; 0.6 % of the views, of big objects, are cut by the frame.
TOYBOX_RIG = Rig(
    fovy_deg=(FOVY_DEG, FOVY_DEG), distance=(0.95 * 1.95 / _FOCAL, 1.10 * 1.95 / _FOCAL), elevation_deg=(0.0, 30.0)
)

CHUNK = 256  # groups a file
BATCH = 16  # groups encoded at once

AZIMUTH_BIN_DEG = 15
AZIMUTHS = tuple(str(azimuth) for azimuth in range(0, 360, AZIMUTH_BIN_DEG))
VIEW_GROUPS = GROUPS | {"azimuth": AZIMUTHS}  # what a classifier of views says: the facts, and from where it looks
ASYMMETRIC = 0.1  # least `asymmetry` of a kind whose azimuth is asked for


@dataclass(frozen=True)
class Group:
    """A scene and the cameras that see it; the rig's fovy."""

    scene: world.Scene
    azimuth_deg: tuple[float, ...]  # of each view
    elevation_deg: float
    distance: float

    def poses(self) -> Float[np.ndarray, "V 4 4"]:
        """Camera to world, float32: psd.scene.cameras.look_at of the same angles."""
        return np.stack([camera_to_world(azimuth, self.elevation_deg, self.distance) for azimuth in self.azimuth_deg])


def group(
    seed: int, index: int, heldout: bool = False, pairs: float = world.PAIRS
) -> tuple[Group, np.random.Generator]:
    """Group `index` of data set `seed`, and the generator that draws its object and how worn its pictures are.

    Of twins it shows the first: as many scenes as groups.
    """
    drawn, rng = example(seed, 2 * index, heldout, pairs)
    azimuths = rng.uniform(0, 360) + 360 / VIEWS * np.arange(VIEWS)
    elevation, distance = rng.uniform(*TOYBOX_RIG.elevation_deg), _FOCAL * rng.uniform(*TOYBOX_RIG.distance)
    return Group(drawn, tuple((azimuths % 360).tolist()), elevation, distance), rng


def draw_group(
    seed: int, index: int, heldout: bool = False, pairs: float = world.PAIRS
) -> UInt8[np.ndarray, "V S S 3"]:
    """The views of a group: one instance of the object, in one place, and pictures as worn as each other."""
    drawn, rng = group(seed, index, heldout, pairs)
    return draw_views(drawn.scene, rng, drawn.poses())


def draw_views(
    scene: world.Scene,
    rng: np.random.Generator,
    poses: Float[np.ndarray, "V 4 4"],
    size: int = IMAGE_SIZE,
    fovy_deg: float = FOVY_DEG,
) -> UInt8[np.ndarray, "V S S 3"]:
    """One instance of the scene, drawn by `rng`, from each camera (camera to world)."""
    surfaces = world.build(scene, rng)
    views = np.stack([render(surfaces, pose, size, fovy_deg, light=scene.taste.light) for pose in poses])
    strip = views.reshape(-1, size, 3)  # one tall picture: its seams are plain background
    return worn(strip, scene.taste.sharpness, rng).reshape(views.shape)


class Groups:
    """`count` groups of data set `seed` under `folder`; draws what is missing, in all cores, and keeps it.

    Kept are the images, uint8 [CHUNK, V, S, S, 3] a file, or what `encode` makes of images [n, V, S, S, 3]: an array
    [n, V, ...]. The files are memory-mapped. pairs: share of scenes with two things. groups: scenes and cameras of all;
    poses: float32 [count, V, 4, 4].
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        count: int,
        heldout: bool = False,
        encode: Callable[[np.ndarray], np.ndarray] | None = None,
        pairs: float = world.PAIRS,
    ):
        self.seed, self.count, self.heldout, self.encode, self.pairs = seed, count, heldout, encode, pairs
        kept = "latents" if encode else "images"
        drawn = f"views-{seed}{'-heldout' if heldout else ''}{'' if pairs == world.PAIRS else f'-pairs-{pairs:g}'}"
        self.folder = Path(folder) / f"{drawn}-{kept}"
        self.folder.mkdir(parents=True, exist_ok=True)
        chunks = range(-(-count // CHUNK))
        self._draw_missing([c for c in chunks if not self._path(c).exists()])
        self.chunks = [np.load(self._path(c), mmap_mode="r") for c in chunks]
        self.groups = [group(seed, index, heldout, pairs)[0] for index in range(count)]
        self.poses = np.stack([drawn.poses() for drawn in self.groups])

    def _path(self, chunk: int) -> Path:
        return self.folder / f"{chunk:04d}.npy"

    def _draw_missing(self, missing: list[int]) -> None:
        if not missing:
            return
        from tqdm.auto import tqdm

        draw = partial(draw_group, self.seed, heldout=self.heldout, pairs=self.pairs)
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            for chunk in tqdm(missing, desc=f"drawing {self.folder.name}", unit="chunk"):
                # Lazy: a batch is encoded here while the others are being drawn.
                drawn = pool.map(draw, range(chunk * CHUNK, (chunk + 1) * CHUNK), chunksize=4)
                kept = []
                while batch := list(islice(drawn, BATCH)):
                    images = np.stack(batch)
                    kept.append(self.encode(images) if self.encode else images)
                partial_file = self._path(chunk).with_suffix(".partial.npy")
                np.save(partial_file, np.concatenate(kept))
                partial_file.rename(self._path(chunk))

    def take(self, indices: np.ndarray) -> Shaped[np.ndarray, "n V ..."]:
        """What is kept of these groups."""
        return np.stack([self.chunks[i // CHUNK][i % CHUNK] for i in indices])


# The azimuth that a picture shows.
@cache
def asymmetry(kind: str) -> float:
    """How much a kind looks different after a quarter, half or three-quarter turn, at the least of the three.

    Mean |difference| of RGB in [0, 1] over the pixels that the object covers before or after, averaged over 12 starts.
    The object turns and the camera stays: the light must not tell the sides apart. 0 for a solid of revolution.
    Without trims, which half of the scenes do not have.
    """
    scene = world.Scene(world.Thing(kind, "red"), taste=Taste(finish=0))
    surfaces, pose = world.build(scene), camera_to_world(0, 15, 1.95)
    turns = [[_turned(surface, azimuth) for surface in surfaces] for azimuth in range(0, 360, 30)]
    images = np.stack([render(turn, pose, 64, light=0) for turn in turns]) / 255
    covered = np.abs(images - BACKGROUND).max(-1) > 0.02

    def change(starts: int) -> float:
        difference = np.abs(images - np.roll(images, starts, 0)).mean(-1).sum((1, 2))
        return float((difference / (covered | np.roll(covered, starts, 0)).sum((1, 2))).mean())

    return min(change(starts) for starts in (3, 6, 9))


def _turned(surface: Surface, azimuth_deg: float) -> Surface:
    rotation, old = kinds.turn(z=azimuth_deg), surface.primitive
    return replace(surface, primitive=replace(old, matrix=rotation @ old.matrix, centre=rotation @ old.centre))


def shows_azimuth(scene: world.Scene) -> bool:
    """Whether a view of this scene tells where the camera stands."""
    return scene.second is None and asymmetry(scene.first.kind) >= ASYMMETRIC


def azimuth_target(azimuth_deg: Float[Tensor, " B"]) -> Float[Tensor, "B bins"]:
    """Shares of the two nearest bins, so that their mean direction is the angle (to 0.1 degrees)."""
    place = azimuth_deg % 360 / AZIMUTH_BIN_DEG
    low, share = place.floor().long(), place % 1
    target = torch.zeros(len(place), len(AZIMUTHS), device=place.device)
    rows = torch.arange(len(place), device=place.device)
    target[rows, low % len(AZIMUTHS)] = 1 - share
    target[rows, (low + 1) % len(AZIMUTHS)] += share
    return target


def read_azimuth(log_p: Float[Tensor, "B bins"]) -> Float[Tensor, " B"]:
    """Degrees in [0, 360): the mean direction of the likeliest bin and its neighbours.

    Not of all bins: where front and back look alike, the mean over both would be a side.
    """
    bins = log_p.shape[1]
    near = log_p.argmax(1, keepdim=True) + torch.arange(-1, 2, device=log_p.device)
    p, angle = log_p.exp().gather(1, near % bins), torch.deg2rad(near.float() * AZIMUTH_BIN_DEG)
    return torch.rad2deg(torch.atan2((p * angle.sin()).sum(1), (p * angle.cos()).sum(1))) % 360
