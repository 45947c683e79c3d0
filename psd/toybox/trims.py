"""The table of trims: the small parts that make an object of a kind finished, in the order in which they come.

In the units of the kind's own parts (psd.toybox.kinds), slot "trim": a tone of the main colour, so that no trim changes
what a caption states. The first trim of a kind is on every object that is half finished, all are on a fine one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from psd.toybox.kinds import ALONG_X, ON_SIDE, Parts, ball, box, dome, fitting, ring, rod, turn


def belt(z: float, low: float, high: float | None = None, height: float = 0.06) -> Parts:
    """Around a solid of revolution that is `low` wide just below z and `high` above it."""
    return [rod((0, 0, z), low, low if high is None else high, height, "trim")]


def slab(z: float, x: float, y: float | None = None, height: float = 0.06) -> Parts:
    """Around a box of these half sides."""
    return [box((0, 0, z), (x, x if y is None else y, height / 2), "trim")]


def studs(*centres, radius: float = 0.06) -> Parts:
    return [ball(centre, radius, "trim") for centre in centres]


def spots(centre, radii, angles, radius: float = 0.07) -> Parts:
    """On an ellipsoid; angles: (azimuth, elevation) of each in degrees."""
    around = np.deg2rad(np.array(angles, float))
    out = np.stack([np.cos(around[:, 1]) * np.cos(around[:, 0]), np.cos(around[:, 1]) * np.sin(around[:, 0]), np.sin(around[:, 1])], 1)  # fmt: skip
    return studs(*(np.array(centre) + out * np.broadcast_to(radii, 3)), radius=radius)


def beads(rotation: np.ndarray, major: float, minor: float, degrees) -> Parts:
    """On a torus about the origin."""
    around = np.deg2rad(np.array(degrees, float))
    circle = major * np.stack([np.cos(around), np.sin(around), np.zeros(len(around))], 1)
    return studs(*(circle @ rotation.T), radius=minor)


def hoop(centre, major: float, minor: float = 0.03, rotation=None) -> Parts:
    return [ring(centre, major, minor, "trim", rotation)]


EACH_SIDE = (-1, 1)
CORNERS = [(x, y) for x in EACH_SIDE for y in EACH_SIDE]
QUARTERS, EIGHTHS = (0, 90, 180, 270), tuple(range(0, 360, 45))
LYING = turn(y=90)  # a ring about the x axis

# fmt: off
TRIMS: dict[str, Callable[[], tuple[Parts, ...]]] = {
    "cube": lambda: (slab(.33, .415), slab(-.33, .415), [box((x * .36, y * .36, 0), (.06, .06, .34), "trim") for x, y in CORNERS]),
    "sphere": lambda: (belt(0, .515, height=.13), spots((0, 0, 0), .46, [(a, e) for a in EIGHTHS for e in (-42, 42)], .09), [dome((0, 0, .4), (.24, .24, .13), "trim")]),
    "cylinder": lambda: (belt(.38, .39, height=.1), belt(-.38, .39, height=.1), belt(0, .38, height=.12)),
    "cone": lambda: (belt(-.4, .44, .39, .1), belt(-.08, .3, .25, .09), belt(.2, .17, .12, .08)),
    "ring": lambda: (beads(turn(y=90, z=30), .4, .16, (90, 210, 330)), beads(turn(y=90, z=30), .4, .16, (30, 150, 270)), hoop((0, 0, 0), .52, .035, turn(y=90, z=30))),
    "pyramid": lambda: (slab(-.43, .515, height=.12), slab(-.02, .29, height=.08), studs((0, 0, .44), radius=.1)),
    "mushroom": lambda: (spots((0, 0, -.05), (.43, .43, .4), [(a, 32) for a in (0, 72, 144, 216, 288)], .09), spots((0, 0, -.05), (.42, .42, .4), [(36, 62), (156, 62), (276, 62)], .08), hoop((0, 0, -.2), .15, .04)),
    "table": lambda: (slab(.2, .52, height=.06), [box((0, s * .42, .08), (.36, .03, .05), "trim") for s in EACH_SIDE], [box((s * .42, 0, .08), (.03, .36, .05), "trim") for s in EACH_SIDE]),
    "chair": lambda: (slab(-.05, .295, height=.05), [box((-.2, y, .28), (.03, .035, .27), "trim") for y in (-.17, 0, .17)], [box((-.25, 0, .55), (.055, .3, .05), "trim")]),
    "lamp": lambda: (belt(.1, .355, .34, .06), belt(.44, .2, .195, .06), [rod((.25, 0, -.02), .015, .015, .22, "trim"), *studs((.25, 0, -.15), radius=.045)]),
    "car": lambda: ([box((0, 0, -.13), (.535, .265, .03), "trim")], studs((.52, .15, -.03), (.52, -.15, -.03), radius=.06), [box((0, s * .255, -.03), (.36, .012, .03), "trim") for s in EACH_SIDE]),
    "bus": lambda: ([box((0, 0, -.07), (.56, .23, .035), "trim")], [box((x, 0, .14), (.02, .235, .085), "trim") for x in (-.36, -.12, .12, .36)], [box((0, 0, .325), (.5, .18, .03), "trim")]),
    "house": lambda: ([box((0, 0, -.41), (.4, .4, .04), "trim")], [box((.38, s * .23, -.1), (.02, .09, .09), "trim") for s in EACH_SIDE] + [box((s * .2, .38, -.1), (.09, .02, .09), "trim") for s in EACH_SIDE], [box((-.15, .2, .42), (.07, .07, .16), "trim")]),
    "tower": lambda: (belt(.2, .245, .24, .08), belt(-.5, .275, .27, .08), [box((x, y, 0), (.06, .06, .09), "trim", turn(z=a)) for x, y, a in ((.23, 0, 0), (0, .23, 90), (-.23, 0, 0), (0, -.23, 90))]),
    "rocket": lambda: (belt(.27, .195, height=.07), belt(-.2, .195, height=.07), hoop((.17, 0, .12), .09, .03, LYING)),
    "tree": lambda: (spots((0, 0, .2), .35, [(a, e) for a, e in ((0, 10), (50, 40), (100, 0), (190, 20), (280, 15))], .075), spots((0, 0, .2), .35, [(25, -10), (140, 45), (320, 45), (240, 50), (70, 5)], .07), studs((.4, .2, .06), (.25, .36, .02), (-.2, -.42, .08), radius=.065)),
    "pine": lambda: (belt(-.31, .41, .38, .06), belt(-.03, .32, .29, .06), belt(.24, .225, .19, .05) + studs((0, 0, .55), radius=.06)),
    "flower": lambda: ([ball((.08, .22 * np.cos(k * np.pi / 3 + np.pi / 6), .2 + .22 * np.sin(k * np.pi / 3 + np.pi / 6)), (.04, .07, .07), "trim") for k in range(6)], hoop((.13, 0, .2), .15, .03, LYING), [ball((-.1, 0, -.35), (.13, .06, .03), "trim", turn(y=30))]),
    "cactus": lambda: ([box((.125 * c, .125 * s, -.02), (.02, .02, .26), "trim") for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1), (.7, .7))], hoop((0, 0, -.3), .25, .035), spots((0, 0, .26), .13, [(0, 50), (120, 50), (240, 50)], .06)),
    "teapot": lambda: (hoop((0, 0, -.05), .33, .035), spots((0, 0, -.05), (.34, .34, .28), [(a, -35) for a in EIGHTHS], .06), hoop((0, 0, .14), .2, .03)),
    "mug": lambda: (belt(.24, .315, height=.08), belt(-.24, .315, height=.08), spots((0, 0, 0), (.3, .3, .3), [(a, 0) for a in EIGHTHS], .07)),
    "bottle": lambda: (belt(-.15, .21, height=.22), belt(-.41, .21, height=.06), belt(.24, .09, height=.05)),
    "candle": lambda: (belt(-.27, .17, .15, .08), belt(.18, .15, height=.06), belt(0, .15, height=.06)),
    "hat": lambda: (hoop((0, 0, -.22), .49, .035), [ball((.3, .1, -.1), (.05, .06, .16), "trim", turn(y=-10))], belt(.23, .285, .28, .05)),
    "umbrella": lambda: ([rod((.36 * np.cos(a), .36 * np.sin(a), .24), .03, .03, .42, "trim", turn(z=np.rad2deg(a)) @ turn(y=-50)) for a in np.arange(0, 6.2, np.pi / 3)], hoop((0, 0, .08), .49, .03), [dome((0, 0, .37), (.17, .17, .08), "trim")]),
    "hammer": lambda: ([rod((0, .28, .34), .145, .145, .06, "trim", ON_SIDE)], [rod((0, -.15, .34), .145, .145, .06, "trim", ON_SIDE)], belt(-.42, .07, height=.2) + belt(.14, .07, height=.08)),
    "sword": lambda: ([box((0, 0, .15), (.03, .025, .4), "trim")], studs((0, .24, -.28), (0, -.24, -.28), radius=.065), [box((0, 0, -.28), (.065, .07, .055), "trim")]),
    "robot": lambda: ([box((.17, 0, .05), (.02, .15, .1), "trim")], studs((.19, -.1, -.12), (.19, 0, -.12), (.19, .1, -.12), radius=.04), [box((0, s * .12, -.5), (.12, .1, .04), "trim") for s in EACH_SIDE]),
    "snowman": lambda: (hoop((0, 0, .24), .15, .05), studs((.26, 0, -.16), (.28, 0, -.28), (.2, 0, .1), radius=.045), studs((.17, .12, .18), (.18, .13, .08), radius=.05)),
    "bear": lambda: (hoop((.01, 0, .08), .17, .045), [ball((.19, 0, -.18), (.08, .15, .17), "trim")], [ball((.04, s * .175, .41), (.06, .05, .05), "trim") for s in EACH_SIDE]),
    "rabbit": lambda: (hoop((.06, 0, -.04), .16, .04), [ball((.09, s * .1, .4), (.025, .035, .16), "trim", turn(x=-s * 12)) for s in EACH_SIDE], [ball((.16, 0, -.22), (.07, .13, .14), "trim")]),
    "duck": lambda: (hoop((.14, 0, .04), .14, .04), [ball((-.1, s * .22, -.1), (.19, .06, .11), "trim") for s in EACH_SIDE], [ball((.17, 0, .37), (.07, .03, .06), "trim")]),
    "fish": lambda: ([box((0, y, 0), (.14, .02, .2), "trim") for y in (-.02, .16)], [ball((s * .12, .02, -.06), (.03, .1, .05), "trim") for s in EACH_SIDE], [box((0, -.13, 0), (.12, .02, .2), "trim")]),
    "penguin": lambda: (hoop((0, 0, .13), .19, .05), studs((.27, 0, .02), (.29, 0, -.1), (.28, 0, -.22), radius=.035), [dome((0, 0, .43), (.12, .12, .09), "trim")]),
    "turtle": lambda: (spots((0, 0, -.1), (.39, .32, .29), [(a, 28) for a in (0, 60, 120, 180, 240, 300)], .09), [ball((0, 0, .18), (.15, .13, .04), "trim")], hoop((0, 0, -.08), .4, .03)),
    "snail": lambda: (hoop((-.08, -.11, .02), .2, .035, ON_SIDE) + hoop((-.08, .11, .02), .2, .035, ON_SIDE), spots((-.08, 0, .02), (.32, .1, .32), [(0, e) for e in (20, 55, 90, 125, 160)], .05), studs((-.08, .17, .02), (-.08, -.17, .02), radius=.06)),
    "spider": lambda: (spots((-.14, 0, 0), (.25, .22, .19), [(a, 40) for a in (90, 180, 270, 0)], .07), hoop((.06, 0, 0), .13, .03, LYING), [ball((-.14, 0, .18), (.12, .06, .04), "trim")]),
    "giraffe": lambda: (spots((-.1, 0, -.1), (.29, .14, .14), [(90, 20), (50, 30), (130, 30), (270, 20), (230, 30), (310, 30)], .055), studs((.25, .06, .12), (.3, .055, .32), (.24, -.06, .12), (.3, -.055, .32), radius=.045), studs((.3, .04, .66), (.3, -.04, .66), radius=.035)),
    "boat": lambda: ([box((0, 0, -.1), (.235, .44, .025), "trim")], [box((0, .14, .1), (.025, .19, .025), "trim"), box((0, .14, .25), (.025, .12, .025), "trim")], [box((0, .09, .52), (.012, .09, .05), "trim")]),
    "airplane": lambda: ([rod((.2, 0, 0), .115, .115, .06, "trim", ALONG_X), rod((-.15, 0, 0), .115, .115, .06, "trim", ALONG_X)], [rod((.1, s * .3, -.04), .05, .05, .2, "trim", ALONG_X) for s in EACH_SIDE], [box((.04, s * .52, .0), (.13, .04, .03), "trim") for s in EACH_SIDE]),
    "helicopter": lambda: ([ball((.1, 0, -.08), (.31, .2, .06), "trim")], hoop((-.55, 0, .1), .09, .02, ON_SIDE), [rod((-.3, 0, 0), .07, .06, .06, "trim", ALONG_X), *studs((.06, 0, .3), radius=.06)]),
    "balloon": lambda: (hoop((0, 0, .18), .35, .035), hoop((0, 0, .36), .3, .03) + hoop((0, 0, 0), .3, .03), hoop((0, 0, -.37), .12, .03)),
    "lollipop": lambda: (hoop((.03, 0, .2), .29, .04, LYING), hoop((.06, 0, .2), .07, .035, LYING), [ball((0, s * .07, -.1), (.04, .08, .05), "trim", turn(x=s * 25)) for s in EACH_SIDE]),
    "cake": lambda: (studs(*[(.42 * np.cos(np.deg2rad(a)), .42 * np.sin(np.deg2rad(a)), -.02) for a in EIGHTHS], radius=.06), belt(-.32, .465, height=.07), studs(*[(.27 * np.cos(np.deg2rad(a)), .27 * np.sin(np.deg2rad(a)), .23) for a in EIGHTHS], radius=.045)),
    "donut": lambda: (studs(*[(.36 * np.cos(np.deg2rad(a)), .36 * np.sin(np.deg2rad(a)), .18) for a in range(0, 360, 45)], radius=.045), studs(*[(.25 * np.cos(np.deg2rad(a)), .25 * np.sin(np.deg2rad(a)), .17) for a in range(20, 380, 60)], radius=.045), hoop((0, 0, -.06), .47, .035)),
    "apple": lambda: ([ball((.33, .05, .08), (.06, .12, .13), "trim")], spots((0, 0, 0), (.37, .37, .33), [(a, -20) for a in EIGHTHS], .045), hoop((0, 0, .31), .1, .04)),
    "carrot": lambda: (belt(.12, .195, .185, .05), belt(-.05, .15, .135, .05), belt(-.22, .105, .085, .05)),
    "barrel": lambda: ([rod((0, 0, .4), .24, .24, .03, "trim")], studs((.35, 0, -.1), (.35, 0, .1), (0, .35, -.1), (0, .35, .1), radius=.06), [box((.33 * c, .33 * s, 0), (.03, .03, .3), "trim") for c, s in ((.7, .7), (-.7, .7), (.7, -.7), (-.7, -.7))]),
    "bucket": lambda: (belt(.13, .345, .35, .07), belt(-.36, .265, .27, .07), belt(-.1, .3, .31, .06)),
    "windmill": lambda: (belt(-.44, .265, .26, .09), [box((.2, 0, -.05), (.03, .06, .09), "trim")], belt(.17, .18, .175, .06) + studs((.28, 0, .2), radius=.06)),
    "gift": lambda: (slab(.19, .38, height=.1), studs(*[(.37, y, z) for y, z in ((.2, .0), (-.2, .0), (.2, -.25), (-.2, -.25))], radius=.06), studs(*[(x, .37, z) for x, z in ((.2, .0), (-.2, .0), (.2, -.25), (-.2, -.25))], radius=.06)),
    "trophy": lambda: (belt(.39, .285, .29, .06), [box((.24, 0, .2), (.03, .09, .09), "trim")], belt(-.1, .1, height=.07) + slab(-.24, .21, height=.04)),
    "dumbbell": lambda: ([rod((0, s * .38, 0), .265, .265, .06, "trim", ON_SIDE) for s in EACH_SIDE], [rod((0, s * .51, 0), .12, .12, .05, "trim", ON_SIDE) for s in EACH_SIDE], [rod((0, y, 0), .08, .08, .05, "trim", ON_SIDE) for y in (-.1, 0, .1)]),
    "train": lambda: ([rod((x, 0, 0), .185, .185, .05, "trim", ALONG_X) for x in (.02, .25)], [rod((.47, 0, 0), .1, .1, .05, "trim", ALONG_X), *studs((.44, 0, .19), radius=.06)], [box((0, 0, -.13), (.47, .14, .04), "trim")]),
}
# fmt: on


@cache
def normalised_trims(kind: str) -> tuple[Parts, ...]:
    """The kind's trims, moved as `kinds.normalised` moves its parts."""
    scale, shift = fitting(kind)
    return tuple([part.moved(scale, shift) for part in parts] for parts in TRIMS[kind]())
