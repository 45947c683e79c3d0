"""The procedural world: things of a kind, colour, proportion and material, alone or in pairs, and captions that say so.

Every scene knows the facts its caption states, so text alignment can be measured instead of guessed, and, apart from
them, its taste (psd.toybox.taste): how well it is shown.
Held out from all training: one main colour per kind (`is_heldout`), so "a <kind> in that colour" is a new combination.

World z-up; objects face +x and are normalised to fit a box of side 0.95 around the origin.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np

from psd.toybox import taste as tastes
from psd.toybox.kinds import CARRIERS, KINDS, PAIRABLE, bounds, normalised
from psd.toybox.raster import Surface, camera_to_world, render
from psd.toybox.taste import FINE, QUALITY, Taste
from psd.toybox.trims import normalised_trims

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 38, 40),    "orange": (246, 132, 28), "yellow": (246, 216, 48), "green": (46, 158, 68),
    "blue": (42, 88, 212),   "purple": (132, 58, 182), "pink": (246, 142, 188),  "brown": (122, 74, 40),
    "black": (36, 36, 40),   "white": (246, 246, 246), "gray": (132, 132, 138),  "cyan": (48, 196, 206),
}  # fmt: skip
FIXED = {"dark": (48, 48, 54), "glass": (168, 206, 228), "leaf": (58, 150, 62), "flame": (252, 190, 40)}
PROPORTIONS = {  # word -> scale of (x, y, z)
    "": (1.0, 1.0, 1.0), "tall": (0.82, 0.82, 1.38), "wide": (1.3, 1.3, 0.72),
    "small": (0.58, 0.58, 0.58), "big": (1.32, 1.32, 1.32),
}  # fmt: skip
RELATIONS = ("single", "on", "next")
PAIRS = 0.22  # share of scenes with two things, unless another is asked for


def is_heldout(kind: str, colour: str) -> bool:
    """One main colour of every kind is never trained on, in any model."""
    names = list(COLOURS)
    return names[(5 * list(KINDS).index(kind) + 1) % len(names)] == colour


@dataclass(frozen=True)
class Thing:
    """One object and what its caption says of it. Empty strings: not said (and the kind's default is drawn)."""

    kind: str
    colour: str
    part_colour: str = ""
    proportion: str = ""
    material: str = ""  # "" | "metal"


@dataclass(frozen=True)
class Scene:
    first: Thing
    relation: str = "single"  # RELATIONS; "on": first stands on second
    second: Thing | None = None
    taste: Taste = FINE

    def things(self) -> tuple[Thing, ...]:
        return (self.first,) if self.second is None else (self.first, self.second)

    def facts(self) -> tuple[str, ...]:
        """What the caption states, as "slot=value"; the unit in which text alignment is counted."""
        facts = [f"relation={self.relation}"] if self.second else []
        for name, thing in zip(("a", "b"), self.things()):
            facts += [f"kind_{name}={thing.kind}", f"colour_{name}={thing.colour}"]
            for slot in ("part_colour", "proportion", "material"):
                if value := getattr(thing, slot):
                    facts.append(f"{slot}={value}")
        return tuple(facts)


def is_heldout_scene(scene: Scene) -> bool:
    return any(is_heldout(thing.kind, thing.colour) for thing in scene.things())


def sample_thing(rng: np.random.Generator, plain: bool = False, kinds: tuple[str, ...] = tuple(KINDS)) -> Thing:
    kind = str(rng.choice(kinds))
    colour = str(rng.choice(list(COLOURS)))
    if plain:
        return Thing(kind, colour)
    part = str(rng.choice(list(COLOURS))) if KINDS[kind].part and rng.random() < 0.6 else ""
    proportion = str(rng.choice(["tall", "wide", "small", "big"])) if rng.random() < 0.3 else ""
    return Thing(kind, colour, part, proportion, "metal" if rng.random() < 0.2 else "")


def sample_scene(rng: np.random.Generator, heldout: bool = False, pairs: float = PAIRS) -> Scene:
    """A random scene; `heldout` asks for one with a combination that training never shows."""
    while True:
        if rng.random() < pairs:
            relation = "on" if rng.random() < 0.6 else "next"
            first = sample_thing(rng, plain=True, kinds=PAIRABLE)
            second = sample_thing(rng, plain=True, kinds=CARRIERS if relation == "on" else PAIRABLE)
            if first.kind == second.kind or first.colour == second.colour:
                continue
            scene = Scene(first, relation, second)
        else:
            scene = Scene(sample_thing(rng))
        if is_heldout_scene(scene) == heldout:
            return scene


# Captions.
SYNONYMS = {
    "gray": ("grey",), "purple": ("violet",), "cyan": ("turquoise",), "red": ("crimson",), "tall": ("high",),
    "wide": ("broad",), "small": ("little", "tiny"), "big": ("large", "huge"), "metal": ("shiny", "metallic"),
    **{name: kind.synonyms for name, kind in KINDS.items() if kind.synonyms},
}  # fmt: skip
OPENERS = ("", "", "", "", "a picture of ", "a photo of ", "a render of ", "an image of ", "a toy of ")


def _say(word: str, rng: np.random.Generator | None) -> str:
    if rng is None or word not in SYNONYMS or rng.random() < 0.7:
        return word
    return str(rng.choice(SYNONYMS[word]))


def _article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeio" else "a ") + phrase


def _describe(thing: Thing, rng: np.random.Generator | None) -> str:
    words = [thing.proportion, thing.material, thing.colour, thing.kind]
    phrase = _article(" ".join(_say(word, rng) for word in words if word))
    if not thing.part_colour:
        return phrase
    part, colour = KINDS[thing.kind].part, _say(thing.part_colour, rng)
    plural = part.endswith("s") or part in ("icing",)
    style = 0 if rng is None else int(rng.integers(4))
    if style == 3:
        return f"{phrase} and {colour} {part}"
    return f"{phrase} with {colour} {part}" if plural else f"{phrase} with {_article(f'{colour} {part}')}"


def caption(scene: Scene, rng: np.random.Generator | None = None, quality: bool = False) -> str:
    """The scene in words; `rng` draws synonyms and paraphrases, None gives the plain form.

    `quality` adds, in half of the captions, a word or two of its taste; it needs `rng`.
    """
    text = _facts_in_words(scene, rng)
    return ", ".join([text, *(tastes.quality_words(scene.taste, rng) if quality else [])])


def _facts_in_words(scene: Scene, rng: np.random.Generator | None) -> str:
    first = _describe(scene.first, rng)
    opener = "" if rng is None else str(rng.choice(OPENERS))
    if scene.second is None:
        return opener + first
    second = _describe(scene.second, rng)
    joins = {"on": ("on top of", "on", "sitting on", "standing on"), "next": ("next to", "beside", "near")}[
        scene.relation
    ]
    return f"{opener}{first} {joins[0] if rng is None else rng.choice(joins)} {second}"


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def lexicon() -> list[str]:
    """Every word a caption can contain, sorted."""
    spoken = {*COLOURS, *KINDS, *PROPORTIONS, "metal", *(kind.part for kind in KINDS.values())}
    spoken |= {synonym for many in SYNONYMS.values() for synonym in many}
    spoken |= set(words(" ".join(OPENERS + QUALITY) + " a an and with on top of sitting standing next to beside near"))
    return sorted(spoken - {""})


# Drawing.
def _rgb(name: str) -> np.ndarray:
    return np.array(COLOURS.get(name) or FIXED[name], np.float32) / 255


def _trim_tone(rgb: np.ndarray) -> np.ndarray:
    """A tone of the main colour that shows beside it: darker, or lighter where that is dark already."""
    return 0.55 * rgb if rgb.mean() > 0.36 else 0.6 * rgb + 0.27


def _surfaces(
    thing: Thing, taste: Taste, scale: np.ndarray, shift: np.ndarray, rng: np.random.Generator | None
) -> list[Surface]:
    paint = {"main": thing.colour, "part": thing.part_colour or KINDS[thing.kind].part_colour}
    rgb = {slot: _rgb(paint.get(slot, slot)) for slot in ("main", "part", *FIXED)}
    rgb["trim"] = _trim_tone(rgb["main"])
    if rng is not None:
        rgb = {slot: (value + rng.normal(0, 0.012, 3)).clip(0, 1).astype(np.float32) for slot, value in rgb.items()}
    rgb = {slot: tastes.tinted(value, taste.colour) for slot, value in rgb.items()}
    trims = normalised_trims(thing.kind)
    shown = trims[: tastes.trims_shown(len(trims), taste.finish)]
    metal = thing.material == "metal"
    return [
        Surface(p.moved(scale, shift), rgb[p.slot], metal and p.slot in ("main", "part"))
        for p in [*normalised(thing.kind), *(p for trim in shown for p in trim)]
    ]


def build(scene: Scene, rng: np.random.Generator | None = None) -> list[Surface]:
    """The scene's surfaces in world coordinates; `rng` adds small variations of shape and paint, and its placement."""
    jitter = np.ones(3) if rng is None else 1 + rng.uniform(-0.04, 0.04, 3)
    surfaces = _standing(scene, jitter, rng)
    place = tastes.placed(scene.taste.framing, rng)
    return [replace(s, primitive=s.primitive.mapped(*place)) for s in surfaces]


def _standing(scene: Scene, jitter: np.ndarray, rng: np.random.Generator | None) -> list[Surface]:
    if scene.second is None:
        scale = jitter * PROPORTIONS[scene.first.proportion]
        return _surfaces(scene.first, scene.taste, scale, np.zeros(3), rng)
    scale = 0.60 * jitter
    heights = [float(np.diff(np.stack(bounds(normalised(t.kind)))[:, 2])[0]) * scale[2] for t in scene.things()]
    if scene.relation == "on":
        lift = sum(heights) / 2
        shifts = [np.array([0, 0, lift - heights[0] / 2]), np.array([0, 0, heights[1] / 2 - lift])]
    else:  # side by side, the first on the left of the usual view, standing on one ground
        sideways = np.array([1.0, -1.0, 0.0]) / np.sqrt(2) * 0.34
        ground = -max(heights) / 2
        shifts = [side * sideways + [0, 0, ground + h / 2] for side, h in zip((1, -1), heights)]
    return [s for t, shift in zip(scene.things(), shifts) for s in _surfaces(t, scene.taste, scale, shift, rng)]


FRONT_DEG = (20.0, 70.0)  # azimuths of the usual, three-quarter view


def draw(
    scene: Scene,
    size: int = 128,
    rng: np.random.Generator | None = None,
    oversample: int = 2,
    azimuths_deg: tuple[float, float] = FRONT_DEG,
) -> np.ndarray:
    """uint8 [size, size, 3]: the scene from the front; `rng` varies camera (azimuth in the range), shape, paint."""
    azimuth, elevation = (45.0, 20.0) if rng is None else (rng.uniform(*azimuths_deg), rng.uniform(10, 30))
    pose = camera_to_world(azimuth, elevation, 1.95)
    image = render(build(scene, rng), pose, size, oversample=oversample, light=scene.taste.light)
    return tastes.worn(image, scene.taste.sharpness, np.random.default_rng(0) if rng is None else rng)
