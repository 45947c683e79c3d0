"""What a caption states, as class labels of fixed groups, and how many of those statements an image shows."""

from __future__ import annotations

import numpy as np

from psd.toybox import kinds, world

_KINDS, _COLOURS = tuple(kinds.KINDS), tuple(world.COLOURS)
GROUPS: dict[str, tuple[str, ...]] = {
    "relation": world.RELATIONS,
    "kind_a": _KINDS,
    "colour_a": _COLOURS,
    "part_colour": ("none", *_COLOURS),  # the colour that is drawn, said or default; "none": the kind has no part
    "proportion": tuple(name or "plain" for name in world.PROPORTIONS),
    "material": ("matte", "metal"),
    "kind_b": ("none", *_KINDS),
    "colour_b": ("none", *_COLOURS),
}


def labels(scene: world.Scene) -> np.ndarray:
    """Class index of every group, int64 [8]. A pair's groups of details are those of plain objects.

    Things beside each other are named in the order of KINDS: no picture tells "a next to b" from "b next to a", and a
    classifier asked to tell them apart answers with the same thing twice.
    """
    first, second = scene.first, scene.second
    if scene.relation == "next":
        first, second = sorted(scene.things(), key=lambda thing: _KINDS.index(thing.kind))
    kind = kinds.KINDS[first.kind]
    values = {
        "relation": scene.relation,
        "kind_a": first.kind,
        "colour_a": first.colour,
        "part_colour": "none" if second or not kind.part else first.part_colour or kind.part_colour,
        "proportion": first.proportion or "plain",
        "material": first.material or "matte",
        "kind_b": second.kind if second else "none",
        "colour_b": second.colour if second else "none",
    }
    return np.array([GROUPS[group].index(value) for group, value in values.items()])


def check_facts(scene: world.Scene, seen: dict[str, str]) -> dict[str, bool]:
    """Which of the scene's stated facts hold in `seen` (group -> value read off an image).

    "a next to b" and "b next to a" are the same statement.
    """
    if scene.relation == "next":
        swapped = {
            **seen,
            **{f"{slot}_{x}": seen[f"{slot}_{y}"] for slot in ("kind", "colour") for x, y in ("ab", "ba")},
        }
        return max((_matches(scene, s) for s in (seen, swapped)), key=lambda held: sum(held.values()))
    return _matches(scene, seen)


def kind_right(held: dict[str, bool]) -> bool:
    """Whether `check_facts` found every kind as stated."""
    return all(ok for group, ok in held.items() if group.startswith("kind"))


def _matches(scene: world.Scene, seen: dict[str, str]) -> dict[str, bool]:
    stated = dict(fact.split("=") for fact in scene.facts())
    return {group: seen[group] == value for group, value in stated.items()}


def read_facts(log_probs: dict, row: int) -> dict[str, str]:
    """group -> most likely value of image `row` of `AttributeClassifier`'s answer."""
    return {group: GROUPS[group][int(log_p[row].argmax())] for group, log_p in log_probs.items()}
