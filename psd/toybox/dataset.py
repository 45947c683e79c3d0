"""Rendered examples of the world, drawn once, kept as arrays, a pure function of (seed, index).

A small share of the images is degraded and says so in its caption ("..., blurry"): the world's own low-quality
pictures, which a negative prompt can name and a preference model learns to dislike.
"""

from __future__ import annotations

import io
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from psd.toybox import world

IMAGE_SIZE = 128
CHUNK = 2048  # images a file
DEGRADED_SHARE = 0.08


@dataclass(frozen=True)
class Example:
    scene: world.Scene
    quality: str = ""  # "" or one of world.QUALITY

    def caption(self, rng: np.random.Generator | None = None) -> str:
        text = world.caption(self.scene, rng)
        return f"{text}, {self.quality}" if self.quality else text


def example(
    seed: int, index: int, heldout: bool = False, pairs: float = world.PAIRS
) -> tuple[Example, np.random.Generator]:
    """Example `index` of data set `seed`, and the generator that draws its image."""
    rng = np.random.default_rng([seed, index])
    scene = world.sample_scene(rng, heldout, pairs)
    quality = str(rng.choice(world.QUALITY)) if not heldout and rng.random() < DEGRADED_SHARE else ""
    return Example(scene, quality), rng


def degrade(image: np.ndarray, quality: str, rng: np.random.Generator) -> np.ndarray:
    """The uint8 image [H, W, 3] with one of world.QUALITY's flaws."""
    picture = Image.fromarray(image)
    if quality == "blurry":
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(2.0, 4.0)))
    elif quality == "faded":
        picture = ImageEnhance.Color(picture).enhance(rng.uniform(0.15, 0.45))
        picture = Image.blend(picture, Image.new("RGB", picture.size, (200, 200, 200)), rng.uniform(0.25, 0.5))
    elif quality == "low quality":
        small = picture.resize((picture.width // 6, picture.height // 6), Image.Resampling.BOX)
        buffer = io.BytesIO()
        small.resize(picture.size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=int(rng.integers(5, 15)))
        picture = Image.open(buffer)
    elif quality == "noisy":
        noise = rng.normal(0, rng.uniform(20, 45), image.shape)
        return (image + noise).clip(0, 255).astype(np.uint8)
    else:
        raise ValueError(f"no such flaw: {quality}")
    return np.asarray(picture)


def draw_example(seed: int, index: int, heldout: bool = False) -> np.ndarray:
    drawn, rng = example(seed, index, heldout)
    image = world.draw(drawn.scene, IMAGE_SIZE, rng)
    return degrade(image, drawn.quality, rng) if drawn.quality else image


class Renders:
    """`count` examples of data set `seed` under `folder`; draws what is missing, in all cores, and keeps it.

    images: uint8 [count, 128, 128, 3], memory-mapped a chunk at a time.
    """

    def __init__(self, folder: Path, seed: int, count: int, heldout: bool = False):
        self.seed, self.heldout, self.count = seed, heldout, count
        self.folder = Path(folder) / f"renders-{seed}{'-heldout' if heldout else ''}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._draw_missing(-(-count // CHUNK))
        self.chunks = [np.load(self._path(c), mmap_mode="r") for c in range(-(-count // CHUNK))]
        self.examples = [example(seed, index, heldout)[0] for index in range(count)]

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
