"""The procedural world: geometry against brute force, captions against facts, held-out combinations kept out."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from numpy.random import default_rng

from psd.toybox import kinds, raster, world
from psd.toybox.dataset import draw_example, example
from psd.toybox.facts import GROUPS, check_facts, labels
from psd.toybox.models import make_tokenizer
from psd.toybox.pairs import smudge, wrong_scene
from psd.toybox.taste import AXES, Taste, sample_taste
from psd.toybox.views import VIEW_GROUPS
from psd.toybox.workshop import ASSETS

RED_MUSHROOM = world.Scene(world.Thing("mushroom", "red", part_colour="white"))
PAIR = world.Scene(world.Thing("cube", "green"), "next", world.Thing("sphere", "orange"))


def inside(primitive: raster.Primitive, points: np.ndarray) -> np.ndarray:
    """Whether points [n, 3] of the unit frame lie in the unit shape, by its definition."""
    x, y, z = points.T
    rho = np.hypot(x, y)
    if primitive.shape == "sphere":
        return rho**2 + z**2 <= 1
    if primitive.shape == "dome":
        return (rho**2 + z**2 <= 1) & (z >= 0)
    if primitive.shape == "frustum":
        return (np.abs(z) <= 1) & (rho <= (1 + primitive.param) / 2 + (primitive.param - 1) / 2 * z)
    if primitive.shape == "torus":
        return np.hypot(rho - 1, z) <= primitive.param
    planes = raster.POLYHEDRA[primitive.shape]
    return (points @ planes[:, :3].T <= planes[:, 3]).all(1)


SHAPES = {"sphere": 0.0, "dome": 0.0, "frustum": 0.4, "torus": 0.3, "box": 0.0, "pyramid": 0.0, "prism": 0.0}


@pytest.mark.parametrize(("shape", "param"), SHAPES.items())
def test_first_hit_is_where_a_marched_ray_enters(shape: str, param: float):
    """March each ray in small steps and ask the shape's definition; the closed form must agree."""
    matrix = kinds.turn(20, 30, 40) * np.array([0.5, 0.3, 0.4])
    primitive = raster.Primitive(shape, matrix, np.array([0.1, -0.05, 0.02]), "main", param)
    pose = raster.camera_to_world(35, 20, 2.0)
    axis = np.linspace(-0.3, 0.3, 24, dtype=np.float32)
    x, y = np.meshgrid(axis, -axis)
    directions = (np.stack([x, y, -np.ones_like(x)], -1).reshape(-1, 3) @ pose[:3, :3].T).astype(np.float32)
    t, normal = raster._intersect(primitive, pose[:3, 3], directions)

    def holds(points: np.ndarray) -> np.ndarray:
        unit = (points - primitive.centre) @ np.linalg.inv(primitive.matrix).T
        return inside(primitive, unit.reshape(-1, 3)).reshape(unit.shape[:-1])

    steps = np.linspace(1.0, 3.0, 2001)
    hits = holds(pose[:3, 3] + steps[:, None, None] * directions)
    seen = t < raster.FAR
    assert (seen != hits.any(0)).mean() < 0.01  # sphere tracing stops 2e-3 short, and may stop beside the torus
    sure = hits.sum(0) >= 20  # a ray that only touches may fall between two steps
    assert sure.sum() > 50
    np.testing.assert_allclose(t[sure], steps[hits.argmax(0)][sure], rtol=0, atol=1e-2)  # more than 2e-3 where oblique

    normal, directions = normal[seen], directions[seen]
    assert ((normal * directions).sum(1) < 0.05).all()  # normals face the camera
    surface = pose[:3, 3] + t[seen, None] * directions
    assert not holds(surface + 0.01 * normal).any()
    assert holds(surface - 0.01 * normal).mean() > 0.95  # but where two faces meet


def test_camera_is_where_it_says():
    pose = raster.camera_to_world(0.0, 0.0, 2.0)
    np.testing.assert_allclose(pose[:3, 3], [2, 0, 0], atol=1e-6)
    np.testing.assert_allclose(pose[:3, 2], [1, 0, 0], atol=1e-6)  # looks along -z of the camera
    np.testing.assert_allclose(pose[:3, 1], [0, 0, 1], atol=1e-6)
    np.testing.assert_allclose(pose[:3, 0], [0, 1, 0], atol=1e-6)


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_every_kind_fits_the_frame_in_its_colour(kind: str):
    image = world.draw(world.Scene(world.Thing(kind, "green"), taste=Taste(light=0, finish=0))) / 255
    background = np.abs(image - raster.BACKGROUND).max(-1) < 0.02
    assert background[0].all() and background[-1].all() and background[:, 0].all() and background[:, -1].all()
    assert 0.04 < 1 - background.mean() < 0.7
    green = (image[..., 1] > image[..., 0] + 0.08) & (image[..., 1] > image[..., 2] + 0.05)
    assert green.mean() > 0.008


def test_the_committed_models_were_trained_on_this_world():
    """A kind, colour or word more, or another order, and their answers are read wrongly."""
    for folder, groups in {"attributes": GROUPS, "views": VIEW_GROUPS}.items():
        config = json.loads((ASSETS / folder / "config.json").read_text())
        assert config["groups"] == [[group, list(values)] for group, values in groups.items()]
    labels = json.loads((ASSETS / "instruments" / "config.json").read_text())["id2label"]
    assert tuple(labels[str(i)] for i in range(len(labels))) == AXES
    assert json.loads((ASSETS / "sd" / "lexicon.json").read_text()) == {"words": world.lexicon()}
    assert (len(kinds.KINDS), len(world.COLOURS)) == (54, 12)


@pytest.mark.parametrize("metal", [False, True])
def test_views_of_a_surface_agree(metal: bool):
    """A point of it has one colour, whichever camera sees it, as a radiance field needs."""
    ball, size, fovy_deg = raster.Primitive("sphere", 0.4 * np.eye(3), np.zeros(3), "main"), 256, 40.0
    surface = raster.Surface(ball, np.array([0.8, 0.2, 0.2], np.float32), metal)
    azimuth, elevation = np.deg2rad(np.meshgrid(np.arange(20, 71, 5), np.arange(0, 46, 5))).reshape(2, -1)
    points = 0.4 * np.stack(
        [np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)], 1
    )

    def colours(azimuth_deg: float) -> np.ndarray:
        pose = raster.camera_to_world(azimuth_deg, 20, 2)
        x, y, z = ((points - pose[:3, 3]) @ pose[:3, :3]).T
        focal = 0.5 * size / np.tan(np.deg2rad(fovy_deg / 2))
        row, column = (size / 2 + focal * np.stack([y, -x]) / z).astype(int)
        return raster.render([surface], pose, size, fovy_deg)[row, column].astype(int)

    left, right = colours(30), colours(60)
    assert left.std(0).max() > 15  # light and shadow
    assert np.abs(left - right).mean() < 1.5


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_training_never_shows_a_held_out_combination(seed: int):
    scenes = [example(seed, index)[0] for index in range(600)]
    assert not any(world.is_heldout_scene(scene) for scene in scenes)
    heldout = [example(seed, index, heldout=True)[0] for index in range(200)]
    assert all(world.is_heldout_scene(scene) for scene in heldout)


def test_one_colour_of_every_kind_is_held_out():
    """And no colour is unknown: each is held out of some kinds only."""
    heldout = {kind: [colour for colour in world.COLOURS if world.is_heldout(kind, colour)] for kind in kinds.KINDS}
    assert all(len(colours) == 1 for colours in heldout.values())
    missed = Counter(colour for (colour,) in heldout.values())
    assert set(missed) == set(world.COLOURS) and max(missed.values()) <= 5


def test_an_example_is_a_pure_function_of_seed_and_index():
    assert example(1, 7)[0] == example(1, 7)[0]
    assert np.array_equal(draw_example(1, 7), draw_example(1, 7))
    assert not np.array_equal(draw_example(1, 7), draw_example(2, 7))
    assert not np.array_equal(draw_example(1, 6), draw_example(1, 7))


def test_captions():
    assert world.caption(RED_MUSHROOM) == "a red mushroom with a white stem"
    assert world.caption(PAIR) == "a green cube next to an orange sphere"
    tall = world.Scene(world.Thing("lamp", "blue", "yellow", "tall", "metal"))
    assert world.caption(tall) == "a tall metal blue lamp with a yellow base"


def test_captions_speak_the_lexicon_and_every_word_is_one_token():
    tokenizer = make_tokenizer()
    lexicon = set(world.lexicon())
    rng = default_rng(0)
    longest = 0
    for _ in range(500):
        text = world.caption(replace(world.sample_scene(rng), taste=sample_taste(rng)), rng, quality=True)
        assert set(world.words(text)) <= lexicon, text
        longest = max(longest, len(tokenizer(text).input_ids))
    assert longest <= tokenizer.model_max_length
    assert all(len(tokenizer.tokenize(word)) == 1 for word in lexicon)


def test_facts():
    assert RED_MUSHROOM.facts() == ("kind_a=mushroom", "colour_a=red", "part_colour=white")
    assert PAIR.facts() == ("relation=next", "kind_a=cube", "colour_a=green", "kind_b=sphere", "colour_b=orange")


def seen(scene: world.Scene) -> dict[str, str]:
    return {group: values[label] for (group, values), label in zip(GROUPS.items(), labels(scene), strict=True)}


def test_a_scene_shows_its_own_facts():
    rng = default_rng(1)
    for _ in range(200):
        scene = world.sample_scene(rng)
        assert all(check_facts(scene, seen(scene)).values())


def test_a_wrong_scene_breaks_a_fact():
    rng = default_rng(2)
    for _ in range(300):
        scene = world.sample_scene(rng)
        assert not all(check_facts(wrong_scene(scene, rng), seen(scene)).values()), scene


def test_next_to_has_no_order_and_on_top_of_has():
    def swapped(scene: world.Scene) -> world.Scene:
        return world.Scene(scene.second, scene.relation, scene.first)

    assert all(check_facts(swapped(PAIR), seen(PAIR)).values())
    assert (labels(swapped(PAIR)) == labels(PAIR)).all()  # or a classifier would be asked for what no picture tells
    stacked = world.Scene(PAIR.first, "on", world.Thing("barrel", "red"))
    assert not all(check_facts(swapped(stacked), seen(stacked)).values())
    assert (labels(swapped(stacked)) != labels(stacked)).any()


def test_smudges_show():
    """A patch may be copied to where it changes little: one is not always enough."""
    image = world.draw(RED_MUSHROOM)
    for seed in range(20):
        assert (smudge(image, default_rng(seed)) != image).any(-1).mean() >= 0.03
