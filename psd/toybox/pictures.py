"""Pictures of the documents: `python -m psd.toybox.pictures` writes them to assets. Nothing is picked."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from psd.toybox import kinds, world
from psd.toybox.dataset import TABLE_SEED, heldout_scenes
from psd.toybox.taste import Taste

ASSETS = Path(__file__).resolve().parents[2] / "assets"
LABEL_PX = 18
TASTES_SEED, TASTE_LEVELS = 9, (0.08, 0.5, 0.95)


def sheet(images: list[np.ndarray], labels: list[str], columns: int) -> Image.Image:
    """Pictures of one size in rows, each with its label below."""
    side, rows = images[0].shape[1], -(-len(images) // columns)
    page = Image.new("RGB", (columns * side, rows * (images[0].shape[0] + LABEL_PX)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=11)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        x, y = i % columns * side, i // columns * (image.shape[0] + LABEL_PX)
        page.paste(Image.fromarray(image), (x, y))
        while font.getlength(label) > side - 4:
            label = label[:-2].rstrip(" .…") + "…"
        draw.text((x + 3, y + image.shape[0] + 2), label, fill=(40, 40, 50), font=font)
    return page


def world_sheet() -> Image.Image:
    """Every kind once, then scenes drawn from seed 0."""
    rng = np.random.default_rng(0)
    colours = list(world.COLOURS)
    scenes = [world.Scene(world.Thing(kind, colours[5 * i % 12])) for i, kind in enumerate(kinds.KINDS)]
    scenes += [world.sample_scene(rng, pairs=0.5) for _ in range(72 - len(scenes))]
    return sheet([world.draw(s, 128, rng, 3) for s in scenes], [world.caption(s) for s in scenes], 9)


def tastes_sheet(count: int = 12) -> Image.Image:
    """The same scenes three times: dull, plain, fine."""
    images, captions = [], []
    for index in range(count):
        scene = world.sample_scene(np.random.default_rng([TASTES_SEED, index]))
        levels = [replace(scene, taste=Taste.even(level)) for level in TASTE_LEVELS]
        images.append(np.concatenate([world.draw(s, 128, np.random.default_rng(index), 3) for s in levels]))
        captions.append(world.caption(scene))
    return sheet(images, captions, count)


def samples_sheet(count: int = 32) -> Image.Image:
    """DDIM samples of held-out captions, in order: nothing is picked."""
    from psd.export import to_uint8
    from psd.toybox.evaluate import HELDOUT_SEED, sample

    captions = [world.caption(scene) for scene in heldout_scenes(count, HELDOUT_SEED)]
    return sheet([to_uint8(image) for image in sample(captions, "cpu")], captions, 8)


def comparison_sheet(preset: str, count: int = 12) -> Image.Image:
    """The first held-out captions of the tables, seed 0: with preference guidance on top, without below."""
    from psd import RunConfig, generate

    images, captions = [], [world.caption(scene) for scene in heldout_scenes(count, TABLE_SEED)]
    for prompt in captions:
        with tempfile.TemporaryDirectory() as folder:
            *_, last = generate(RunConfig.from_preset(preset, prompt=prompt, seed=0), Path(folder))
            pictures = [Image.open(last.arms[arm].picture).convert("RGB") for arm in ("with", "without")]
            images.append(np.concatenate([np.asarray(picture) for picture in pictures]))
    return sheet(images, captions, count)


PICTURES = {
    "world": world_sheet,
    "tastes": tastes_sheet,
    "samples": samples_sheet,
    "comparison": partial(comparison_sheet, "toybox-image"),
    "comparison-3d": partial(comparison_sheet, "toybox-fast"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", nargs="*", choices=list(PICTURES), default=[])
    for name in parser.parse_args().which or PICTURES:
        PICTURES[name]().save(ASSETS / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
