"""The table of kinds: what each object is built of, which of its parts has a colour of its own, what else it is called.

Objects are made of raster's primitives in units of their own, z-up, facing +x; `normalised` brings them to one size.
Which colours there are, what a scene is and what is said of it is psd.toybox.world's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from psd.toybox.raster import Primitive

Parts = list[Primitive]


# Primitives in the object's own units; every kind is normalised afterwards.
def turn(x: float = 0, y: float = 0, z: float = 0) -> np.ndarray:
    """Rotation matrix, degrees, applied x then y then z."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(np.deg2rad([x, y, z])), np.sin(np.deg2rad([x, y, z]))
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def _shape(shape, centre, scale, slot, rotation=None, param=0.0) -> Primitive:
    rotation = np.eye(3) if rotation is None else rotation
    return Primitive(shape, rotation * np.broadcast_to(scale, 3), np.array(centre, float), slot, param)


def ball(centre, radius, slot="main", rotation=None):
    return _shape("sphere", centre, radius, slot, rotation)


def dome(centre, radius, slot="main", rotation=None):
    return _shape("dome", centre, radius, slot, rotation)


def box(centre, half, slot="main", rotation=None, shape="box"):
    return _shape(shape, centre, half, slot, rotation)


def rod(centre, low, high, height, slot="main", rotation=None):
    """Frustum: radius `low` at the bottom, `high` at the top; a cylinder or a cone where they say so."""
    if low < high:  # the unit frustum narrows upwards
        rotation = (np.eye(3) if rotation is None else rotation) @ turn(x=180)
        low, high = high, low
    return _shape("frustum", centre, (low, low, height / 2), slot, rotation, high / low)


def ring(centre, major, minor, slot="main", rotation=None):
    return _shape("torus", centre, major, slot, rotation, minor / major)


def legs(x, y, top, length, radius, slot="part"):
    return [rod((sx * x, sy * y, top - length / 2), radius, radius, length, slot) for sx in (-1, 1) for sy in (-1, 1)]


def wheels(x, y, z, radius, slot="part"):
    return [rod((sx * x, sy * y, z), radius, radius, 0.1, slot, turn(x=90)) for sx in (-1, 1) for sy in (-1, 1)]


ON_SIDE, ALONG_X = turn(x=90), turn(y=90)


@dataclass(frozen=True)
class Kind:
    parts: Callable[[], Parts]
    part: str = ""  # the word for what the "part" slot is; empty where there is none
    part_colour: str = "gray"  # its colour when the caption does not say
    synonyms: tuple[str, ...] = ()


# fmt: off
KINDS: dict[str, Kind] = {
    "cube": Kind(lambda: [box((0, 0, 0), 0.4)], synonyms=("block", "box")),
    "sphere": Kind(lambda: [ball((0, 0, 0), 0.5)], synonyms=("ball", "orb")),
    "cylinder": Kind(lambda: [rod((0, 0, 0), 0.36, 0.36, 0.9)], synonyms=("tube",)),
    "cone": Kind(lambda: [rod((0, 0, 0), 0.45, 0.0, 0.95)]),
    "ring": Kind(lambda: [ring((0, 0, 0), 0.4, 0.13, rotation=turn(y=90, z=30))], synonyms=("torus", "hoop")),
    "pyramid": Kind(lambda: [box((0, 0, 0), 0.5, shape="pyramid")]),
    "mushroom": Kind(lambda: [rod((0, 0, -.25), .15, .12, .5, "part"), dome((0, 0, -.05), (.45, .45, .42))], "stem", "white", ("toadstool",)),
    "table": Kind(lambda: [box((0, 0, .2), (.5, .5, .06)), *legs(.4, .4, .15, .55, .055)], "legs", "brown", ("desk",)),
    "chair": Kind(lambda: [box((0, 0, -.05), (.28, .28, .05)), box((-.25, 0, .28), (.04, .28, .3)), *legs(.22, .22, -.08, .42, .045)],
                  "legs", "brown", ("seat",)),
    "lamp": Kind(lambda: [rod((0, 0, -.44), .24, .2, .07, "part"), rod((0, 0, -.1), .035, .035, .65, "part"), rod((0, 0, .27), .34, .18, .4)],
                 "base", "gray"),
    "car": Kind(lambda: [box((0, 0, -.05), (.52, .25, .12)), box((-.05, 0, .13), (.27, .21, .1), "glass"), box((-.05, 0, .235), (.25, .2, .02)),
                         *wheels(.3, .25, -.17, .13)], "wheels", "black", ("automobile",)),
    "bus": Kind(lambda: [box((0, 0, .05), (.55, .22, .26)), box((0, 0, .14), (.555, .225, .08), "glass"), *wheels(.33, .21, -.22, .12)],
                "wheels", "black", ("coach",)),
    "house": Kind(lambda: [box((0, 0, -.15), (.38, .38, .28)), box((0, 0, .33), (.44, .44, .2), "part", turn(z=90), "prism"),
                           box((.38, 0, -.25), (.015, .09, .17), "dark")], "roof", "brown", ("cottage", "home")),
    "tower": Kind(lambda: [rod((0, 0, -.15), .26, .22, .8), rod((0, 0, .45), .34, 0., .42, "part"), box((.24, 0, -.42), (.02, .08, .13), "dark")],
                  "roof", "gray", ("turret",)),
    "rocket": Kind(lambda: [rod((0, 0, 0), .18, .18, .65), rod((0, 0, .47), .18, 0., .3, "part"),
                            *[box((.22 * c, .22 * s, -.28), (.13, .02, .15), "part", turn(z=a))
                              for a in (45, 135, 225, 315) for c, s in [(np.cos(np.deg2rad(a)), np.sin(np.deg2rad(a)))]],
                            ball((.15, 0, .12), .08, "glass")], "fins", "gray", ("spaceship",)),
    "tree": Kind(lambda: [rod((0, 0, -.28), .1, .08, .45, "part"), ball((0, 0, .2), .36), ball((.2, .16, .06), .22), ball((-.16, -.2, .08), .24)],
                 "trunk", "brown"),
    "pine": Kind(lambda: [rod((0, 0, -.42), .09, .09, .2, "part"), rod((0, 0, -.15), .4, .1, .38), rod((0, 0, .12), .31, .06, .36), rod((0, 0, .38), .22, 0, .34)],
                 "trunk", "brown", ("fir",)),
    "flower": Kind(lambda: [rod((0, 0, -.3), .03, .03, .55, "leaf"), ball((.1, 0, -.3), (.14, .06, .03), "leaf", turn(y=-30)),
                            *[ball((.06, .22 * np.cos(k * np.pi / 3), .2 + .22 * np.sin(k * np.pi / 3)), (.05, .14, .14)) for k in range(6)],
                            ball((.1, 0, .2), (.08, .14, .14), "part")], "center", "yellow", ("daisy",)),
    "cactus": Kind(lambda: [rod((0, 0, -.4), .19, .25, .24, "part"), rod((0, 0, -.02), .13, .13, .55), ball((0, 0, .26), .13),
                            rod((0, .22, -.02), .07, .07, .2, rotation=ON_SIDE), rod((0, .3, .1), .07, .07, .22), ball((0, .3, .21), .07),
                            rod((0, -.2, .08), .07, .07, .2, rotation=ON_SIDE), rod((0, -.28, .2), .07, .07, .22), ball((0, -.28, .31), .07)],
                   "pot", "orange"),
    "teapot": Kind(lambda: [ball((0, 0, -.05), (.34, .34, .28)), ring((0, .36, -.02), .17, .04, "part", turn(y=90)), rod((0, -.4, .05), .09, .045, .36, rotation=turn(x=50)),
                            dome((0, 0, .17), (.17, .17, .08), "part"), ball((0, 0, .28), .05, "part")], "handle", "gray", ("kettle",)),
    "mug": Kind(lambda: [rod((0, 0, 0), .3, .3, .62), rod((0, 0, .3), .25, .25, .03, "dark"), ring((0, .32, 0), .19, .05, "part", turn(y=90))],
                "handle", "white", ("cup",)),
    "bottle": Kind(lambda: [rod((0, 0, -.15), .2, .2, .6), dome((0, 0, .15), (.2, .2, .14)), rod((0, 0, .32), .075, .075, .2), rod((0, 0, .45), .09, .09, .12, "part")],
                   "cap", "gray", ("flask",)),
    "candle": Kind(lambda: [rod((0, 0, -.38), .3, .24, .1, "part"), rod((0, 0, -.02), .14, .14, .64), ball((0, 0, .42), (.055, .055, .12), "flame")],
                   "holder", "gray"),
    "hat": Kind(lambda: [rod((0, 0, -.22), .5, .5, .05), rod((0, 0, -.13), .3, .3, .14, "part"), rod((0, 0, .08), .3, .27, .34)], "band", "black", ("fedora",)),
    "umbrella": Kind(lambda: [dome((0, 0, .08), (.5, .5, .34)), rod((0, 0, -.15), .03, .03, .6, "part"), ring((0, .08, -.44), .08, .03, "part", turn(y=90)),
                              rod((0, 0, .44), .025, .01, .08, "part")], "handle", "brown", ("parasol",)),
    "hammer": Kind(lambda: [rod((0, 0, -.12), .055, .055, .8, "part"), rod((0, .05, .34), .13, .13, .5, rotation=ON_SIDE), rod((0, -.3, .34), .13, .05, .2, rotation=ON_SIDE)],
                   "handle", "brown", ("mallet",)),
    "sword": Kind(lambda: [box((0, 0, .15), (.02, .075, .42)), box((0, 0, .62), (.02, .075, .1), shape="pyramid"), box((0, 0, -.28), (.05, .24, .04), "part"),
                           rod((0, 0, -.42), .05, .05, .26, "part"), ball((0, 0, -.58), .075, "part")], "handle", "brown", ("blade",)),
    "robot": Kind(lambda: [box((0, 0, 0), (.17, .24, .24)), box((0, 0, .4), (.15, .17, .13), "part"), ball((.15, .07, .43), .045, "dark"), ball((.15, -.07, .43), .045, "dark"),
                           *[box((0, s * .31, .02), (.07, .06, .2), "part") for s in (-1, 1)], *[box((0, s * .12, -.38), (.09, .08, .15)) for s in (-1, 1)],
                           rod((0, 0, .58), .02, .02, .12, "dark")], "head", "gray", ("android",)),
    "snowman": Kind(lambda: [ball((0, 0, -.26), .28), ball((0, 0, .1), .2), ball((0, 0, .36), .14), rod((0, 0, .48), .2, .2, .03, "part"), rod((0, 0, .57), .13, .13, .18, "part"),
                             rod((.2, 0, .36), .035, 0., .16, "flame", ALONG_X), ball((.12, .06, .41), .025, "dark"), ball((.12, -.06, .41), .025, "dark")], "hat", "black"),
    "bear": Kind(lambda: [ball((0, 0, -.15), (.24, .27, .28)), ball((.02, 0, .24), .22), *[ball((0, s * .17, .4), .085) for s in (-1, 1)], ball((.2, 0, .19), (.09, .1, .08), "part"),
                          *[ball((.12, s * .25, -.08), (.1, .09, .15), rotation=turn(x=s * 30)) for s in (-1, 1)], *[ball((.2, s * .16, -.37), (.14, .1, .1)) for s in (-1, 1)],
                          *[ball((.21, s * .08, .3), .03, "dark") for s in (-1, 1)]], "snout", "white", ("teddy",)),
    "rabbit": Kind(lambda: [ball((-.05, 0, -.22), (.27, .22, .24)), ball((.12, 0, .1), .18), *[ball((.06, s * .1, .4), (.04, .065, .22), "part", turn(x=-s * 12)) for s in (-1, 1)],
                            ball((-.32, 0, -.24), .09, "part"), *[ball((.27, s * .07, .14), .028, "dark") for s in (-1, 1)], *[ball((.14, s * .13, -.42), (.14, .07, .06)) for s in (-1, 1)]],
                   "ears", "pink", ("bunny",)),
    "duck": Kind(lambda: [ball((-.05, 0, -.15), (.36, .25, .22)), ball((.2, 0, .18), .17), rod((.4, 0, .15), .085, .05, .16, "part", ALONG_X), ball((-.38, 0, -.03), (.12, .1, .06), rotation=turn(y=35)),
                          *[ball((.32, s * .08, .24), .028, "dark") for s in (-1, 1)]], "beak", "orange"),
    "fish": Kind(lambda: [ball((0, .05, 0), (.13, .36, .22)), box((0, .42, 0), (.03, .26, .15), "part", turn(x=90), "pyramid"), box((0, .02, .24), (.025, .16, .1), "part", shape="pyramid"),
                          ball((.1, -.18, .06), .04, "dark"), ball((-.1, -.18, .06), .04, "dark")], "fins", "orange"),
    "penguin": Kind(lambda: [ball((0, 0, -.08), (.25, .26, .36)), ball((0, 0, .3), .19), ball((.09, 0, -.1), (.19, .19, .29), "part"), rod((.22, 0, .28), .05, .0, .14, "flame", ALONG_X),
                             *[ball((0, s * .27, -.06), (.08, .05, .22), rotation=turn(x=s * 14)) for s in (-1, 1)], *[ball((.12, s * .11, -.44), (.13, .09, .04), "flame") for s in (-1, 1)],
                             *[ball((.15, s * .08, .36), .028, "dark") for s in (-1, 1)]], "belly", "white"),
    "turtle": Kind(lambda: [dome((0, 0, -.1), (.4, .33, .3)), rod((0, 0, -.12), .42, .42, .06, "part"), ball((.5, 0, .0), (.14, .11, .11), "part"),
                            *[ball((sx * .28, sy * .3, -.2), (.12, .09, .09), "part") for sx in (-1, 1) for sy in (-1, 1)], *[ball((.6, s * .06, .05), .024, "dark") for s in (-1, 1)]],
                   "legs", "green", ("tortoise",)),
    "snail": Kind(lambda: [ball((.02, 0, -.3), (.5, .13, .1), "part"), ball((.42, 0, -.12), (.1, .1, .2), "part"), ring((-.08, 0, .02), .2, .13, rotation=ON_SIDE), ball((-.08, 0, .02), (.16, .17, .16)),
                           *[rod((.45, s * .06, .13), .02, .02, .2, "part") for s in (-1, 1)], *[ball((.45, s * .06, .24), .035, "dark") for s in (-1, 1)]], "body", "pink"),
    "spider": Kind(lambda: [ball((-.14, 0, 0), (.26, .23, .2)), ball((.18, 0, -.02), .14),
                            *[rod((.05 + .11 * k, s * .27, .04), .03, .03, .3, "part", turn(x=s * 60)) for k in (-2, -1, 0, 1) for s in (-1, 1)],
                            *[rod((.05 + .16 * k, s * .46, -.12), .028, .02, .34, "part", turn(x=-s * -25)) for k in (-2, -1, 0, 1) for s in (-1, 1)],
                            *[ball((.29, s * .05, .04), .03, "dark") for s in (-1, 1)]], "legs", "black"),
    "giraffe": Kind(lambda: [ball((-.1, 0, -.1), (.3, .15, .15)), rod((.22, 0, .2), .085, .06, .62, rotation=turn(y=18)), ball((.38, 0, .5), (.15, .08, .08), rotation=turn(y=15)),
                             *legs(.19, .09, -.14, .45, .042), *[rod((.3, s * .04, .6), .016, .016, .1, "part") for s in (-1, 1)], rod((-.4, 0, -.14), .02, .03, .24, "part", turn(y=15))],
                    "legs", "brown"),
    "boat": Kind(lambda: [box((0, 0, -.25), (.2, .5, .16), rotation=turn(y=180), shape="prism"), box((0, 0, -.1), (.22, .4, .04)), rod((0, 0, .2), .025, .025, .7, "dark"),
                          box((0, .14, .2), (.015, .22, .3), "part", shape="pyramid")], "sail", "white", ("ship",)),
    "airplane": Kind(lambda: [ball((0, 0, 0), (.52, .11, .11)), box((.04, 0, .0), (.12, .55, .02), "part"), box((-.42, 0, .04), (.07, .2, .018), "part"), box((-.43, 0, .13), (.07, .015, .12), "part"),
                              ball((.33, 0, .07), (.1, .06, .06), "glass")], "wings", "gray", ("plane", "aeroplane")),
    "helicopter": Kind(lambda: [ball((.1, 0, -.05), (.3, .19, .2)), ball((.27, 0, -.01), (.14, .14, .14), "glass"), rod((-.32, 0, 0), .07, .04, .5, rotation=turn(y=-90)), box((-.55, 0, .08), (.05, .015, .12)),
                                rod((.06, 0, .2), .025, .025, .14, "dark"), box((.06, 0, .28), (.52, .035, .012), "part", turn(z=35)), box((.06, 0, .28), (.52, .035, .012), "part", turn(z=125)),
                                *[rod((.08, s * .15, -.31), .025, .025, .5, "dark", ALONG_X) for s in (-1, 1)]], "rotor", "gray", ("chopper",)),
    "balloon": Kind(lambda: [ball((0, 0, .18), (.36, .36, .36)), rod((0, 0, -.2), .1, .24, .22), box((0, 0, -.46), (.1, .1, .09), "part"),
                             *[rod((sx * .09, sy * .09, -.34), .012, .012, .18, "dark") for sx in (-1, 1) for sy in (-1, 1)]], "basket", "brown"),
    "lollipop": Kind(lambda: [rod((0, 0, .2), .3, .3, .12, rotation=ALONG_X), ring((.05, 0, .2), .17, .035, "part", ALONG_X), rod((0, 0, -.32), .032, .032, .5, "part")], "stick", "white", ("candy",)),
    "cake": Kind(lambda: [rod((0, 0, -.22), .45, .45, .28), rod((0, 0, -.06), .455, .455, .06, "part"), rod((0, 0, .07), .3, .3, .2), rod((0, 0, .19), .305, .305, .06, "part"), ball((0, 0, .28), .08, "part")],
                 "icing", "white"),
    "donut": Kind(lambda: [ring((0, 0, -.03), .32, .17), ring((0, 0, .03), .32, .155, "part")], "icing", "pink", ("doughnut",)),
    "apple": Kind(lambda: [ball((0, 0, 0), (.38, .38, .34)), rod((0, 0, .4), .03, .03, .2, "dark"), ball((0, .13, .42), (.05, .15, .05), "part", turn(x=20))], "leaf", "green"),
    "carrot": Kind(lambda: [rod((0, 0, -.15), .0, .2, .75), dome((0, 0, .225), (.2, .2, .06)), *[ball((.07 * np.cos(a), .09 * np.sin(a), .42), (.045, .06, .19), "part", turn(x=-25 * np.sin(a), y=25 * np.cos(a))) for a in (0, 2.1, 4.2)]],
                   "leaves", "green"),
    "barrel": Kind(lambda: [rod((0, 0, -.2), .28, .35, .4), rod((0, 0, .2), .35, .28, .4), *[rod((0, 0, z), r, r, .06, "part") for z, r in ((-.28, .325), (0, .36), (.28, .325))]], "hoops", "gray", ("cask",)),
    "bucket": Kind(lambda: [rod((0, 0, -.12), .24, .34, .58), rod((0, 0, .165), .3, .3, .02, "dark"), ring((0, 0, .17), .33, .025, "part", turn(x=90, z=25))], "handle", "gray", ("pail",)),
    "windmill": Kind(lambda: [rod((0, 0, -.15), .25, .16, .7), dome((0, 0, .2), (.17, .17, .14), "dark"), rod((.2, 0, .2), .04, .04, .14, "dark", ALONG_X),
                              *[box((.26, .25 * np.cos(a), .2 + .25 * np.sin(a)), (.015, .22, .055), "part", turn(x=np.rad2deg(a))) for a in (.6, .6 + np.pi / 2, .6 + np.pi, .6 + 1.5 * np.pi)]], "blades", "white"),
    "gift": Kind(lambda: [box((0, 0, -.08), (.36, .36, .3)), box((0, 0, -.08), (.37, .07, .31), "part"), box((0, 0, -.08), (.07, .37, .31), "part"),
                          *[ring((0, s * .12, .3), .1, .04, "part", turn(y=90)) for s in (-1, 1)]], "ribbon", "yellow", ("present",)),
    "trophy": Kind(lambda: [rod((0, 0, .2), .16, .28, .42), ring((0, .28, .22), .12, .03, rotation=turn(y=90)), ring((0, -.28, .22), .12, .03, rotation=turn(y=90)), rod((0, 0, -.1), .06, .06, .26),
                            box((0, 0, -.32), (.2, .2, .11), "part")], "base", "black"),
    "dumbbell": Kind(lambda: [rod((0, 0, 0), .06, .06, .6, "part", ON_SIDE), *[rod((0, s * .38, 0), .25, .25, .22, rotation=ON_SIDE) for s in (-1, 1)]], "bar", "gray", ("barbell",)),
    "train": Kind(lambda: [rod((.15, 0, .0), .17, .17, .6, rotation=ALONG_X), box((-.3, 0, .08), (.18, .22, .27)), box((-.3, 0, .38), (.22, .25, .03), "dark"), rod((.32, 0, .24), .06, .1, .26, "part"),
                           *[rod((x, s * .18, -.2), .11, .11, .07, "part", ON_SIDE) for x in (-.33, -.05, .25) for s in (-1, 1)], box((-.3, 0, .2), (.1, .225, .08), "glass")], "wheels", "black", ("locomotive",)),
}
# fmt: on
# What stands in scenes of two things, and of these what another can stand on.
PAIRABLE = (
    "cube",
    "sphere",
    "cylinder",
    "cone",
    "pyramid",
    "mushroom",
    "car",
    "house",
    "mug",
    "hat",
    "bear",
    "duck",
    "apple",
    "barrel",
    "bucket",
    "gift",
    "cake",
    "lamp",
    "robot",
    "tree",
)  # fmt: skip
CARRIERS = ("cube", "cylinder", "table", "barrel", "gift", "house", "bus")


@cache
def normalised(kind: str) -> Parts:
    """The kind's primitives, centred; longest side of their bounding box at most 0.95, its diagonal at most 1.25."""
    scale, shift = fitting(kind)
    return [p.moved(scale, shift) for p in KINDS[kind].parts()]


@cache
def fitting(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Scale and shift, [3] each, that `normalised` applies."""
    low, high = bounds(KINDS[kind].parts())
    scale = min(0.95 / (high - low).max(), 1.25 / np.linalg.norm(high - low))
    return np.full(3, scale), -scale * (low + high) / 2


def bounds(parts: Parts) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest corner [3] of their common bounding box."""
    corners = np.concatenate([p.corners() for p in parts])
    return corners.min(0), corners.max(0)
