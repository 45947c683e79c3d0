"""Taste: five axes apart from the facts, words that say them, combinations kept out of training."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from numpy.random import default_rng

from psd.toybox import kinds, raster, taste, trims, views, world
from psd.toybox.dataset import Renders, draw_example, example
from psd.toybox.facts import GROUPS, labels
from psd.toybox.pairs import CLEARLY, JUDGE, PREFERENCE, ranked_batch
from psd.toybox.taste import AXES, FINE, Taste

MUSHROOM = world.Scene(world.Thing("mushroom", "red", part_colour="white"))


def drawn(seed: int, count: int, heldout: bool = False) -> list[world.Scene]:
    return [example(seed, index, heldout)[0] for index in range(count)]


def with_axis(scene: world.Scene, axis: str, value: float) -> world.Scene:
    return replace(scene, taste=replace(FINE, **{axis: value}))


def test_axes_share_a_cause_and_can_be_told_apart():
    rng = default_rng(0)
    tastes = np.stack([taste.sample_taste(rng).values() for _ in range(3000)])
    correlation = np.corrcoef(tastes.T)
    others = correlation[~np.eye(len(AXES), dtype=bool)]
    assert others.min() > 0.2 and others.max() < 0.75
    assert (
        (tastes.std(0) > 0.25).all() and ((tastes < 0.2).mean(0) > 0.08).all() and ((tastes > 0.8).mean(0) > 0.08).all()
    )


@pytest.mark.parametrize("seed", [1, 2])
def test_no_fact_can_be_predicted_from_the_axes(seed: int):
    """The mean taste under each value of a fact differs from the overall one by no more than chance allows."""
    scenes = drawn(seed, 3000)[::2]
    tastes, facts = np.stack([s.taste.values() for s in scenes]), np.stack([labels(s) for s in scenes])
    whitened = (tastes - tastes.mean(0)) / tastes.std(0)
    for column, group in enumerate(GROUPS):
        for value in np.unique(facts[:, column]):
            chosen = whitened[facts[:, column] == value]
            assert np.abs(chosen.mean(0)).max() < 4.5 / np.sqrt(len(chosen)), (group, value)


def test_held_out_combinations_are_never_trained_on_and_stand_in_the_held_out_set():
    assert not any(taste.is_heldout(scene.taste) for seed in (1, 2, 3) for scene in drawn(seed, 400))
    share = np.mean([taste.is_heldout(scene.taste) for scene in drawn(90, 800, heldout=True)])
    assert abs(share - taste.HELDOUT_SHARE) < 0.06
    assert taste.is_heldout(Taste(colour=0.9, sharpness=0.1)) and not taste.is_heldout(FINE)


def test_twins_show_one_scene_with_a_taste_each():
    (one, first), (other, second) = example(2, 6), example(2, 7)
    assert replace(one, taste=FINE) == replace(other, taste=FINE) and one.taste != other.taste
    assert first.bit_generator.state == second.bit_generator.state  # the same instance and camera
    assert one.taste.finish != other.taste.finish
    liked = [example(7, index)[0].taste for index in (6, 7)]  # what preference learns on: it never sees finish differ
    assert liked[0].finish == liked[1].finish and liked[0].light != liked[1].light


def test_every_second_scene_of_a_data_set_for_scorers_is_seen_from_any_side(monkeypatch):
    seen = []
    monkeypatch.setattr(world, "camera_to_world", lambda a, e, d: (seen.append(a), raster.camera_to_world(a, e, d))[1])
    for seed in (1, 8):
        for index in range(48):
            draw_example(seed, index)
    front, scored = np.array(seen[:48]), np.array(seen[48:]).reshape(-1, 2, 2)
    assert ((front >= 20) & (front <= 70)).all() and (scored[:, 0] >= 20).all() and (scored[:, 0] <= 70).all()
    assert scored[:, 1].max() > 250 and np.ptp(scored[:, 1], axis=1).max() == 0  # twins from one side


# Words.
def test_captions_say_a_word_or_two_of_the_truth_in_half_of_the_scenes():
    rng, said = default_rng(0), 0
    for scene in drawn(1, 1000):
        plain, *words = world.caption(scene, rng, quality=True).split(", ")
        assert len(words) <= 2 and plain
        said += bool(words)
        for word in words:
            for axis, ends in taste.WORDS.items():
                for end, names in enumerate(ends):
                    if word in names:
                        assert (getattr(scene.taste, axis) > 0.5) == end
    assert 0.35 < said / 1000 <= 0.55  # in half of the scenes that have an end to name
    assert all(world.caption(scene) == world.caption(replace(scene, taste=FINE)) for scene in drawn(1, 20))


def test_every_word_of_quality_is_in_the_vocabulary():
    assert {part for word in taste.QUALITY for part in world.words(word)} <= set(world.lexicon())
    assert len(set(taste.QUALITY)) == 22


# Pictures.
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("kind", ["duck", "house", "cylinder"])
def test_every_axis_shows(axis: str, kind: str):
    scene = world.Scene(world.Thing(kind, "orange"))
    images = [world.draw(with_axis(scene, axis, value), rng=default_rng(3)).astype(float) for value in (0.0, 0.5, 1.0)]
    assert all(np.abs(a - b).mean() > 0.5 for a, b in pairwise(images))


def test_the_colour_axis_by_hand_and_every_colour_nameable_at_both_ends():
    red = np.array([0.8, 0.2, 0.2], np.float32)
    grey = 0.3 * 0.8 + 0.7 * 0.2
    np.testing.assert_allclose(taste.tinted(red, 1.0), grey + 1.2 * (red - grey), atol=1e-6)
    np.testing.assert_allclose(taste.tinted(red, 0.0), 0.72 * (grey + 0.5 * (red - grey)) + 0.28 * 0.74, atol=1e-6)
    rgb = np.array(list(world.COLOURS.values()), np.float32) / 255
    for end in (0.0, 0.5, 1.0):
        shown = taste.tinted(rgb, end)
        apart = np.linalg.norm(shown[:, None] - shown[None], axis=-1) + 9 * np.eye(len(shown))
        assert apart.min() > 36 / 255


def test_every_kind_has_trims_in_the_order_of_finish():
    for kind in kinds.KINDS:
        sets = trims.normalised_trims(kind)
        assert len(sets) == 3 and all(part.slot == "trim" for parts in sets for part in parts)
        shown = [taste.trims_shown(len(sets), finish) for finish in (0, 0.2, 0.3, 0.6, 0.9, 1)]
        assert shown == [0, 0, 1, 2, 3, 3]
    assert set(trims.TRIMS) == set(kinds.KINDS)


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_trims_show_and_leave_the_object_its_colour(kind: str):
    scene = world.Scene(world.Thing(kind, "green"))
    bare, fine = (world.draw(with_axis(scene, "finish", value)).astype(float) for value in (0.0, 1.0))
    changed = np.abs(bare - fine).max(-1) > 8
    covered = np.abs(bare / 255 - raster.BACKGROUND).max(-1) > 0.1
    assert changed.sum() > 0.02 * covered.sum()
    green = (fine[..., 1] > fine[..., 0] + 20) & (fine[..., 1] > fine[..., 2] + 12)
    was_green = (bare[..., 1] > bare[..., 0] + 20) & (bare[..., 1] > bare[..., 2] + 12)
    assert green.sum() > 0.6 * was_green.sum()


def test_light_casts_a_shadow_on_the_ground_and_none_where_it_is_flat():
    ball = raster.Primitive("sphere", 0.4 * np.eye(3), np.zeros(3), "main")
    surface = [raster.Surface(ball, np.array([0.8, 0.2, 0.2], np.float32))]
    pose = raster.camera_to_world(45, 25, 2.0)
    flat, half, full = (raster.render(surface, pose, 96, light=light).astype(float) for light in (0.0, 0.5, 1.0))
    covered = np.abs(flat / 255 - raster.BACKGROUND).max(-1) > 0.02
    beside = ~covered
    assert np.abs(flat - 255 * raster.BACKGROUND)[beside].max() < 1.5
    darker = [(255 * raster.BACKGROUND - image)[beside].mean(-1).max() for image in (half, full)]
    assert 15 < darker[0] < darker[1] < 190
    below = np.argwhere((255 * raster.BACKGROUND - full).mean(-1) * beside > 30)
    assert below[:, 0].mean() > 48  # under the object


def test_what_a_taste_changes_is_in_every_view():
    """Placement and light are the world's: the object turns, and every view has the same amount of it."""
    scene = world.Scene(world.Thing("sphere", "red"), taste=replace(FINE, framing=0.0, finish=0.0))
    surfaces = world.build(scene, default_rng(0))
    (ball,) = surfaces
    centre = ball.primitive.centre
    assert abs(np.linalg.norm(centre) - 0.22) < 1e-6 and abs(centre[2]) < 1e-9
    np.testing.assert_allclose(
        world.build(replace(scene, taste=FINE), default_rng(0))[0].primitive.centre, 0, atol=1e-9
    )
    tilted = world.build(replace(scene, first=world.Thing("sword", "red")), default_rng(0))[0].primitive.matrix
    up = tilted[:, 2] / np.linalg.norm(tilted[:, 2])
    assert abs(np.rad2deg(np.arccos(up[2])) - 24) < 0.1


def test_wear_by_sharpness():
    sharp = draw_example(3, 0)
    image = world.draw(MUSHROOM)
    assert np.array_equal(taste.worn(image, 1.0, default_rng(0)), image) and sharp.dtype == np.uint8
    edges = [np.abs(np.diff(taste.worn(image, s, default_rng(0)).astype(float), axis=0)).max() for s in (0.1, 0.5, 0.9)]
    assert edges[0] < edges[1] < edges[2]
    with_noise = taste.worn(np.full((64, 64, 3), 128, np.uint8), 0.65, default_rng(0)).astype(float)
    assert 0.5 < with_noise.std() < 7


# What the rewards are taught.
class FewRenders(Renders):
    """Examples of a data set without their pictures: what ranked_batch asks for."""

    def __init__(self, seed: int, count: int):
        self.scenes = drawn(seed, count)
        self.tastes = np.stack([scene.taste.values() for scene in self.scenes])

    def images(self, indices) -> np.ndarray:
        return np.stack([np.full((128, 128, 3), i % 250, np.uint8) for i in indices])


def test_likings_weigh_the_axes():
    tastes = np.eye(5, dtype=np.float32)
    np.testing.assert_allclose(PREFERENCE.of(tastes), [0.35, 0.3, 0.0, 0.2, 0.15], atol=1e-6)
    assert JUDGE.of(tastes)[AXES.index("finish")] > 0.2
    assert abs(JUDGE.of(np.ones((1, 5), np.float32))[0] - 1) < 1e-6


@pytest.mark.parametrize("liking", [PREFERENCE, replace(JUDGE, spoils=())])
def test_worse_pictures_are_twins_of_clearly_less_taste(liking):
    renders = FewRenders(2, 120)
    batch = ranked_batch(renders, liking, default_rng(0), 24)
    better, worse = (p[:, 0, 0, 0].astype(int) for p in (batch.images, batch.worse))
    assert len(worse) == 12 and len(set(better // 2)) == 24  # no scene twice: a caption would be right of both
    assert (worse // 2 == better[:12] // 2).all()
    liked = liking.of(renders.tastes)
    assert (liked[better[:12]] - liked[worse] > CLEARLY).all()


def test_groups_show_one_taste_in_all_views(monkeypatch):
    scene = views.group(4, 5)[0].scene
    assert replace(scene, taste=FINE) == replace(example(4, 10)[0], taste=FINE)
    seen = []
    real = views.render
    monkeypatch.setattr(views, "render", lambda *a, **k: (seen.append(k["light"]), real(*a, **k))[1])
    views.draw_group(4, 5)
    assert seen == [scene.taste.light] * 4
