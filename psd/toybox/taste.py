"""Taste: how well a scene is shown, along five axes, apart from what it shows. What preference is about in the toybox.

Each axis goes from 0, its dull end, to 1, its fine end. The axes share a cause, the care that was taken, and have a
spread of their own, so that they can be told apart. Two combinations of ends are held out of all training. A caption
names an axis or two in half of the scenes: what a prompt can ask for, and a negative prompt name.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, fields

import numpy as np
from PIL import Image, ImageFilter

from psd.toybox.kinds import turn

LEVELS = (0.17, 0.5, 0.83)  # the common cause, dull, plain or fine: each a third of the scenes
SPREAD = 0.2  # standard deviation of an axis about it
LOW, HIGH = 0.33, 0.67  # what counts as an end: words are said of these alone
OTHER_AXES_SHARE = 0.25  # of the axes: drawn without the common cause
HELDOUT_SHARE = 0.25  # of the held-out scenes: their axes make a combination that is held out


@dataclass(frozen=True)
class Taste:
    """The five axes, each in [0, 1]."""

    colour: float = 1.0  # greyish and pale .. vivid
    light: float = 1.0  # flat, no shadow .. key light, highlight, contact shadow on the ground
    finish: float = 1.0  # bare primitives .. all trims of the kind
    sharpness: float = 1.0  # soft, noisy, compressed .. crisp
    framing: float = 1.0  # small, off centre, tilted .. fills the frame, centred, upright

    @classmethod
    def even(cls, value: float) -> Taste:
        return cls(*[value] * len(AXES))

    def values(self) -> np.ndarray:
        """float32 [5], in the order of AXES."""
        return np.array([getattr(self, axis) for axis in AXES], np.float32)


FINE = Taste()
AXES = tuple(field.name for field in fields(Taste))
# axis -> (words of the dull end, words of the fine end)
WORDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "colour": (("faded", "dull"), ("vivid", "colorful")),
    "light": (("flat light", "dim"), ("well lit", "glossy")),
    "finish": (("plain", "bare"), ("detailed", "ornate")),
    "sharpness": (("blurry", "noisy"), ("sharp", "crisp")),
    "framing": (("tilted", "off center"), ("close-up", "centered")),
}
OVERALL = ("low quality", "best quality")  # said of scenes whose axes are dull, or fine, on the whole
QUALITY = (*OVERALL, *(word for ends in WORDS.values() for end in ends for word in end))
WORDS_SHARE = 0.5  # of the captions: with a word or two of quality, where there is one to say


def is_heldout(taste: Taste) -> bool:
    """Combinations of ends that no model is trained on: vivid but blurry, and well framed in flat light."""
    return (taste.colour > HIGH and taste.sharpness < LOW) or (taste.framing > HIGH and taste.light < LOW)


def sample_taste(rng: np.random.Generator, heldout: bool = False) -> Taste:
    """A random taste; `heldout` asks for every fourth with a combination that training never shows."""
    wanted = heldout and rng.random() < HELDOUT_SHARE
    while True:
        cause = np.where(rng.random(len(AXES)) < OTHER_AXES_SHARE, rng.uniform(0, 1, len(AXES)), rng.choice(LEVELS))
        taste = Taste(*(cause + rng.normal(0, SPREAD, len(AXES))).clip(0, 1).tolist())
        if is_heldout(taste) == wanted:
            return taste


def quality_words(taste: Taste, rng: np.random.Generator) -> list[str]:
    """One or two of the words that are true of the taste, in WORDS_SHARE of the calls; else none."""
    if rng.random() >= WORDS_SHARE:
        return []
    words = true_words(taste, rng)
    count = min(len(words), 1 + int(rng.random() < 0.4))
    return [words[i] for i in rng.permutation(len(words))[:count]]


def true_words(taste: Taste, rng: np.random.Generator) -> list[str]:
    """A word of every axis that is at an end, and one of all together where they are, on the whole."""
    ends = [(axis, int(value > HIGH)) for axis, value in zip(AXES, taste.values()) if not LOW <= value <= HIGH]
    words = [str(rng.choice(WORDS[axis][end])) for axis, end in ends]
    mean = taste.values().mean()
    if not LOW <= mean <= HIGH:
        words.append(OVERALL[int(mean > HIGH)])
    return words


# What an axis does.
def tinted(rgb: np.ndarray, colour: float) -> np.ndarray:
    """Paint [..., 3] in [0, 1]: greyish and pale at 0, vivid at 1; hue and the order of brightness stay."""
    grey = rgb @ np.array([0.3, 0.59, 0.11], rgb.dtype)
    vivid = grey[..., None] + (0.5 + 0.7 * colour) * (rgb - grey[..., None])
    pale = 0.28 * (1 - colour)
    return ((1 - pale) * vivid + pale * 0.74).clip(0, 1).astype(rgb.dtype)


def trims_shown(count: int, finish: float) -> int:
    """How many of a kind's trims are there."""
    return int(finish * (count + 1) * 0.999)


def placed(framing: float, rng: np.random.Generator | None) -> tuple[np.ndarray, np.ndarray]:
    """Where an object stands in the world, x -> matrix @ x + shift ([3, 3] and [3]); all views of it agree.

    Smaller, off centre and tilted by up to 24 degrees at 0; `rng` draws to which side.
    """
    off = 1 - framing
    side, lean = (0.6, 2.2) if rng is None else rng.uniform(0, 2 * np.pi, 2)
    about = turn(z=np.rad2deg(lean))
    tilt = about @ turn(x=24 * off) @ about.T
    return (1.03 - 0.25 * off) * tilt, 0.22 * off * np.array([np.cos(side), np.sin(side), 0.0])


def worn(image: np.ndarray, sharpness: float, rng: np.random.Generator) -> np.ndarray:
    """The picture uint8 [H, W, 3] as soft, noisy and compressed as its sharpness says; at 1 as it is."""
    off = 1 - sharpness
    if off < 0.02:
        return image
    picture = Image.fromarray(image).filter(ImageFilter.GaussianBlur(2.2 * off**1.2))
    noisy = (np.asarray(picture) + rng.normal(0, 10 * off**2, image.shape)).clip(0, 255).astype(np.uint8)
    if off < 0.4:
        return noisy
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=int(70 - 55 * off))
    return np.asarray(Image.open(buffer))
