"""Groups of views, what can be told of an azimuth, and the measures of the multi-view toybox: exact."""

from __future__ import annotations

import math

import numpy as np
import torch

from psd.models.priors.mvdream import MVDreamPrior
from psd.models.priors.table import TOYBOX_FRAME
from psd.scene.cameras import camera_embedding, look_at, sample_cameras
from psd.toybox import evaluate_mvdream, raster, views, world
from psd.toybox.classifier import AttributeClassifier
from psd.toybox.dataset import example
from psd.toybox.facts import GROUPS, labels
from psd.toybox.models import make_scheduler

CLEAN = world.Scene(world.Thing("duck", "red"))
PAIR = world.Scene(world.Thing("duck", "red"), "next", world.Thing("cube", "blue"))


# Data.
def test_a_group_is_a_pure_function_of_seed_and_index_and_shows_the_examples_of_dataset():
    assert views.group(4, 7)[0] == views.group(4, 7)[0]
    assert np.array_equal(views.draw_group(4, 7), views.draw_group(4, 7))
    assert not np.array_equal(views.draw_group(4, 7), views.draw_group(5, 7))
    assert all(views.group(4, index)[0].scene == example(4, 2 * index)[0] for index in range(20))


def test_training_groups_never_show_a_held_out_combination():
    for heldout in (False, True):
        scenes = [views.group(4, index, heldout)[0].scene for index in range(200)]
        assert {world.is_heldout_scene(scene) for scene in scenes} == {heldout}


def test_the_cameras_of_a_group_are_the_rigs():
    groups = [views.group(4, index)[0] for index in range(300)]
    for drawn in groups:
        turns = (np.array(drawn.azimuth_deg) - drawn.azimuth_deg[0]) % 360
        np.testing.assert_allclose(turns, [0, 90, 180, 270], atol=1e-9)
    elevations, distances = [g.elevation_deg for g in groups], [g.distance for g in groups]
    assert 0 <= min(elevations) < 1 and 29 < max(elevations) <= 30
    assert 0.95 * 1.95 <= min(distances) < 1.87 and 2.13 < max(distances) <= 1.10 * 1.95 + 1e-9
    assert len({int(g.azimuth_deg[0] // 90) for g in groups}) == 4

    sampled = sample_cameras(views.TOYBOX_RIG, views.VIEWS, torch.Generator().manual_seed(0), groups=300)
    assert sampled.fovy_deg.unique().tolist() == [40.0]
    assert abs(sampled.distance.min() - min(distances)) < 0.01 and abs(sampled.distance.max() - max(distances)) < 0.01


def test_the_frame_of_the_prior_is_that_of_its_training_pictures():
    for name in ("fovy_deg", "distance", "elevation_deg"):
        np.testing.assert_allclose(getattr(TOYBOX_FRAME.rig, name), getattr(views.TOYBOX_RIG, name), atol=1e-4)
    np.testing.assert_allclose(TOYBOX_FRAME.background, raster.BACKGROUND, atol=1e-6)


def test_poses_are_what_look_at_and_the_camera_embedding_say():
    drawn = views.group(4, 3)[0]
    azimuth = torch.tensor(drawn.azimuth_deg)
    same = torch.ones(views.VIEWS)
    poses = torch.from_numpy(drawn.poses())
    torch.testing.assert_close(poses, look_at(azimuth, drawn.elevation_deg * same, drawn.distance * same))
    a, e = math.radians(drawn.azimuth_deg[1]), math.radians(drawn.elevation_deg)
    position = camera_embedding(poses)[1].view(4, 4)[:3, 3]
    torch.testing.assert_close(
        position, torch.tensor([math.cos(a) * math.cos(e), math.sin(a) * math.cos(e), math.sin(e)])
    )


def test_the_views_of_a_group_show_one_instance_from_its_own_poses(monkeypatch):
    """`world.build` draws shape and paint: every view must be of the same surfaces."""
    seen = []

    def watched(surfaces, pose, *arguments, light):
        seen.append((surfaces, pose))
        return raster.render(surfaces, pose, *arguments, light=light)

    monkeypatch.setattr(views, "render", watched)
    images = views.draw_group(4, 3)
    assert images.shape == (4, 128, 128, 3) and images.dtype == np.uint8
    assert len(seen) == 4 and all(surfaces is seen[0][0] for surfaces, _ in seen)
    np.testing.assert_array_equal(np.stack([pose for _, pose in seen]), views.group(4, 3)[0].poses())


def test_wear_has_one_strength_in_all_views():
    index = next(i for i in range(1000) if views.group(4, i)[0].scene.taste.sharpness < 0.05)
    noise = views.draw_group(4, index)[:, :, :10].astype(float) - 255 * raster.BACKGROUND  # beside the object
    spread = noise.std((1, 2, 3))
    assert spread.max() / spread.min() < 1.5 and spread.min() > 0.5


def test_groups_keep_what_was_drawn_and_redraw_only_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(views, "CHUNK", 2)
    encoded = []

    def mean_colour(images):
        encoded.append(len(images))
        return images.mean((2, 3)).astype(np.float16)

    groups = views.Groups(tmp_path, 4, 3, encode=mean_colour)
    assert encoded == [2, 2] and len(groups.groups) == 3
    want = np.stack([views.draw_group(4, index) for index in (2, 0)]).mean((2, 3)).astype(np.float16)
    np.testing.assert_array_equal(groups.take(np.array([2, 0])), want)
    np.testing.assert_array_equal(groups.poses[2], views.group(4, 2)[0].poses())

    groups._path(1).unlink()
    again = views.Groups(tmp_path, 4, 4, encode=mean_colour)
    assert encoded == [2, 2, 2]
    np.testing.assert_array_equal(again.take(np.arange(3)), groups.take(np.arange(3)))
    images = views.Groups(tmp_path, 4, 1)  # other files than the encoded ones
    np.testing.assert_array_equal(images.take(np.array([0]))[0], views.draw_group(4, 0))


# Azimuths.
def test_asymmetry_is_zero_for_solids_of_revolution_and_large_for_animals():
    assert all(views.asymmetry(kind) < 1e-9 for kind in ("sphere", "bottle", "cube"))
    assert views.asymmetry("car") < views.ASYMMETRIC < views.asymmetry("duck")
    assert views.shows_azimuth(CLEAN) and not views.shows_azimuth(PAIR)


def test_an_azimuth_is_read_back_from_its_target():
    angles = torch.tensor([0.0, 3.0, 44.9, 180.0, 352.5, 359.9])
    target = views.azimuth_target(angles)
    torch.testing.assert_close(target.sum(1), torch.ones(6))
    assert evaluate_mvdream.wrapped(views.read_azimuth(target.log()) - angles).max() < 0.1
    front_or_back = 0.6 * views.azimuth_target(torch.tensor([10.0])) + 0.4 * views.azimuth_target(torch.tensor([190.0]))
    assert abs(views.read_azimuth(front_or_back.log()).item() - 10) < 0.1


# Measures.
class TellsTheTruth(AttributeClassifier):
    """A classifier that has read the scenes and the angles."""

    device = torch.device("cpu")

    def __init__(self, scenes: list[world.Scene], azimuth_deg: torch.Tensor):
        rows = [labels(scene) for scene in scenes for _ in range(views.VIEWS)]
        self.answer = {
            group: torch.nn.functional.one_hot(torch.tensor([int(row[i]) for row in rows]), len(values)).float().log()
            for i, (group, values) in enumerate(GROUPS.items())
        }
        self.answer["azimuth"] = views.azimuth_target(azimuth_deg.flatten()).log()

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.answer


def measure(said: list[world.Scene], said_deg, scenes: list[world.Scene], asked_deg) -> dict[str, float]:
    images = torch.zeros(len(scenes), views.VIEWS, 3, 8, 8)
    return evaluate_mvdream.measure_views(TellsTheTruth(said, said_deg), images, scenes, asked_deg)


ASKED = torch.tensor([[80.0, 170.0, 260.0, 350.0], [10.0, 100.0, 190.0, 280.0]])


def test_right_views_measure_as_right():
    measured = measure([CLEAN, PAIR], ASKED, [CLEAN, PAIR], ASKED)
    assert measured["views, every fact right (%)"] == measured["groups, one kind (%)"] == 100
    assert measured["azimuth, steps within 30 deg (%)"] == 100
    assert measured["azimuth, median error (deg)"] < 0.1


def test_real_views_are_read_beside_their_own_scenes_and_angles(monkeypatch, tmp_path):
    monkeypatch.setattr(views, "CHUNK", 8)
    renders = views.Groups(tmp_path, 90, 8, heldout=True)
    scenes, angles = [g.scene for g in renders.groups], torch.tensor([g.azimuth_deg for g in renders.groups])
    right = evaluate_mvdream.real_views(TellsTheTruth(scenes, angles), renders)
    assert right["views, every fact right (%)"] == right["groups, one kind (%)"] == 100
    assert right["azimuth, median error (deg)"] < 0.1
    wrong = evaluate_mvdream.real_views(TellsTheTruth(scenes[::-1], angles + 40), renders)
    assert wrong["views, every fact right (%)"] < 50 and abs(wrong["azimuth, median error (deg)"] - 40) < 0.1


def test_four_times_the_same_view_measures_as_no_step():
    measured = measure([CLEAN, PAIR], torch.full((2, 4), 80.0), [CLEAN, PAIR], ASKED)
    assert abs(measured["azimuth, step's median error (deg)"] - 90) < 0.1
    assert measured["azimuth, steps within 30 deg (%)"] == 0
    assert measured["groups, one kind (%)"] == 100


def test_wrong_kinds_measure_as_wrong():
    other = world.Scene(world.Thing("fish", "red"))
    measured = measure([other, PAIR], ASKED, [CLEAN, PAIR], ASKED)
    assert measured["views, kind right (%)"] == 50


class KnowsOneObject(MVDreamPrior):
    """A prior whose every condition and camera means exactly one x_0: eps-hat = (x_t - alpha x_0) / sigma."""

    views, latent_shape, device = 4, (4, 2, 2), torch.device("cpu")
    alphas_cumprod = make_scheduler().alphas_cumprod

    def __init__(self):
        pass

    def embed(self, prompts: list[str]) -> torch.Tensor:
        return torch.tensor([float(prompt or 0) for prompt in prompts]).view(-1, 1, 1)

    def x_0(self, cond: torch.Tensor, camera: torch.Tensor) -> torch.Tensor:
        return (cond[:, 0, 0, None] * (1 + camera[:, 3:12:4].sum(1, keepdim=True)))[..., None, None].expand(-1, 4, 2, 2)

    def eps(self, x_t, t, cond, camera):
        abar = self.alphas_cumprod[t]
        return (x_t - abar.sqrt() * self.x_0(cond, camera)) / (1 - abar).sqrt()

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :3]


def test_sampled_views_are_of_their_own_caption_and_camera():
    """DDIM ends at x_0 but for the schedule's last sigma, 0.03 of the first noise; guidance scales x_0 here."""
    prior, cameras = KnowsOneObject(), evaluate_mvdream.four_sides(3)
    images = evaluate_mvdream.sample_views(prior, ["1", "2", "-1"], cameras, 3.0, steps=10, batch=2)
    cond = prior.embed(["1", "2", "-1"]).repeat_interleave(4, 0)
    want = 3 * prior.x_0(cond, camera_embedding(cameras.c2w))[:, :3].unflatten(0, (3, 4))
    assert images.shape == (3, 4, 3, 2, 2)
    assert want.std(1).min() > 0.1  # the views differ
    torch.testing.assert_close(images, want, rtol=0, atol=0.3)


def test_sampled_cameras_stand_on_four_sides():
    cameras = evaluate_mvdream.four_sides(5)
    azimuth = cameras.azimuth_deg.view(5, 4)
    torch.testing.assert_close(azimuth - azimuth[:, :1], torch.tensor([0.0, 90, 180, 270]).expand(5, 4))
    assert azimuth[:, 0].unique().numel() == 5 and azimuth[:, 0].max() < 90
    assert cameras.elevation_deg.unique().tolist() == [15.0]
