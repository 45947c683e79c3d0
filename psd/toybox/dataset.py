"""Rendered examples of the world, drawn once, kept as arrays, a pure function of (seed, index).

Examples 2k and 2k + 1 are twins: one scene, one instance of its objects, one camera, and a taste each. What differs
between them is what a preference can be about.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from psd.toybox import world
from psd.toybox.taste import sample_taste

IMAGE_SIZE = 128
TABLE_SEED = 92  # of the held-out scenes of tables and contact sheets; defaults are tuned on others (93)
CHUNK = 2048  # images a file
# Data seeds whose twins have one finish: what is trained on them to prefer has never seen finish preferred.
ONE_FINISH = (7,)
# Data seeds of which every second scene is seen from any side: what they train reads the views of objects too.
ALL_SIDES = (2, 7, 8)


def example(
    seed: int, index: int, heldout: bool = False, pairs: float = world.PAIRS
) -> tuple[world.Scene, np.random.Generator]:
    """Example `index` of data set `seed`, and the generator that draws its image."""
    twins, own = divmod(index, 2)
    rng = np.random.default_rng([seed, twins])
    scene = world.sample_scene(rng, heldout, pairs)
    drawn = [sample_taste(np.random.default_rng([seed, twins, twin]), heldout) for twin in range(own + 1)]
    taste = replace(drawn[own], finish=drawn[0].finish) if seed in ONE_FINISH else drawn[own]
    return replace(scene, taste=taste), rng


def draw_example(seed: int, index: int, heldout: bool = False) -> np.ndarray:
    scene, rng = example(seed, index, heldout)
    around = seed in ALL_SIDES and index // 2 % 2
    return world.draw(scene, IMAGE_SIZE, rng, azimuths_deg=(0.0, 360.0) if around else world.FRONT_DEG)


def heldout_scenes(count: int, seed: int) -> list[world.Scene]:
    """The first `count` held-out scenes of a seed, at their finest: captions to try, and what they might look like."""
    return [world.sample_scene(np.random.default_rng([seed, index]), heldout=True) for index in range(count)]


class Renders:
    """`count` examples of data set `seed` under `folder`; draws what is missing, in all cores, and keeps it.

    images: uint8 [count, 128, 128, 3], memory-mapped a chunk at a time; scenes: what they show.
    """

    def __init__(self, folder: Path, seed: int, count: int, heldout: bool = False):
        self.seed, self.heldout, self.count = seed, heldout, count
        self.folder = Path(folder) / f"renders-{seed}{'-heldout' if heldout else ''}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._draw_missing(-(-count // CHUNK))
        self.chunks = [np.load(self._path(c), mmap_mode="r") for c in range(-(-count // CHUNK))]
        self.scenes = [example(seed, index, heldout)[0] for index in range(count)]
        self.tastes = np.stack([scene.taste.values() for scene in self.scenes])  # [count, 5]

    def _path(self, chunk: int) -> Path:
        return self.folder / f"{chunk:04d}.npy"

    def _draw_missing(self, chunks: int) -> None:
        missing = [c for c in range(chunks) if not self._path(c).exists()]
        if not missing:
            return
        from tqdm.auto import tqdm

        with ProcessPoolExecutor(os.cpu_count()) as pool:
            for chunk in tqdm(missing, desc=f"drawing {self.folder.name}", unit="chunk"):
                indices = range(chunk * CHUNK, (chunk + 1) * CHUNK)
                draw = partial(draw_example, self.seed, heldout=self.heldout)
                images = np.stack(list(pool.map(draw, indices, chunksize=64)))
                partial_file = self._path(chunk).with_suffix(".partial.npy")
                np.save(partial_file, images)
                partial_file.rename(self._path(chunk))

    def images(self, indices: np.ndarray) -> np.ndarray:
        return np.stack([self.chunks[i // CHUNK][i % CHUNK] for i in indices])

    def batches(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Indices and images of all, `size` at a time."""
        for start in range(0, self.count, size):
            indices = np.arange(start, min(start + size, self.count))
            yield indices, self.images(indices)
