"""Groups of views, the training of the multi-view toybox and its measures: exact, and on tiny models."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from psd.models.hub import Source
from psd.models.priors import load_prior
from psd.models.priors.mvdream import MVDreamPrior, predict, start_from
from psd.models.priors.table import TOYBOX_FRAME
from psd.scene.cameras import camera_embedding, look_at, sample_cameras
from psd.toybox import evaluate_mvdream, raster, train_mvdream, views, workshop, world
from psd.toybox.classifier import AttributeClassifier, load_attributes
from psd.toybox.dataset import example
from psd.toybox.facts import GROUPS, labels
from psd.toybox.models import make_attributes, make_scheduler
from psd.toybox.pairs import normalise, to_pixels
from psd.toybox.workshop import Recipe, Workshop
from tests.test_priors import make_prior_folder

CLEAN = world.Scene(world.Thing("duck", "red"))
PAIR = world.Scene(world.Thing("duck", "red"), "next", world.Thing("cube", "blue"))


# Data.
def test_a_group_is_a_pure_function_of_seed_and_index_and_shows_the_examples_of_dataset():
    assert views.group(4, 7)[0] == views.group(4, 7)[0]
    assert np.array_equal(views.draw_group(4, 7), views.draw_group(4, 7))
    assert not np.array_equal(views.draw_group(4, 7), views.draw_group(5, 7))
    assert all(views.group(4, index)[0].example == example(4, index)[0] for index in range(20))


def test_training_groups_never_show_a_held_out_combination():
    for heldout in (False, True):
        scenes = [views.group(4, index, heldout)[0].example.scene for index in range(200)]
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

    def watched(surfaces, pose, *arguments):
        seen.append((surfaces, pose))
        return raster.render(surfaces, pose, *arguments)

    monkeypatch.setattr(views, "render", watched)
    images = views.draw_group(4, 3)
    assert images.shape == (4, 128, 128, 3) and images.dtype == np.uint8
    assert len(seen) == 4 and all(surfaces is seen[0][0] for surfaces, _ in seen)
    np.testing.assert_array_equal(np.stack([pose for _, pose in seen]), views.group(4, 3)[0].poses())


def find(quality: str) -> int:
    return next(index for index in range(1000) if views.group(4, index)[0].example.quality == quality)


def test_a_flaw_has_one_strength_in_all_views():
    faded = views.draw_group(4, find("faded"))
    corners = faded[:, 0, 0].astype(int)
    assert (corners == corners[0]).all() and np.abs(corners[0] - 255 * raster.BACKGROUND).max() > 2
    noise = views.draw_group(4, find("noisy"))[:, :, :12].astype(float) - 255 * raster.BACKGROUND  # beside the object
    spread = noise.clip(-60, 30).std((1, 2, 3))
    assert spread.max() / spread.min() < 1.15 and spread.min() > 10
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.1  # but the views' noises are their own


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


# Training.
def test_timesteps_are_one_per_share_and_inside_the_schedule(monkeypatch):
    t = workshop.stratified_timesteps(8, 1000, torch.Generator().manual_seed(0))
    assert (t // 125).tolist() == list(range(8)) and (t % 125).unique().numel() > 4
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, 1 - 2**-24))
    assert workshop.stratified_timesteps(64, 1000, torch.Generator()).max() == 999


def test_the_weight_of_the_loss_by_hand():
    weight = train_mvdream.loss_weight(torch.tensor([0.01, 0.25, 1.0, 4.0, 20.0]))
    torch.testing.assert_close(weight, torch.tensor([10.0, 2.0, 1.0, 1.0, 0.25]))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A prior whose latents of 128 px are the toybox's, 4 x 16 x 16, with a UNet of a few thousand parameters."""
    return load_prior(str(make_prior_folder(tmp_path_factory.mktemp("base") / "tiny", "tiny", "epsilon")))


def test_the_camera_is_heard_at_the_start_and_adds_nothing_on_average(tiny):
    unet = start_from(tiny.unet)
    train_mvdream.open_camera(unet)
    cameras = camera_embedding(sample_cameras(views.TOYBOX_RIG, 4, torch.Generator().manual_seed(1), groups=200).c2w)
    with torch.no_grad():
        heard = unet.class_embedding(cameras)
        times = unet.time_embedding(unet.time_proj(torch.arange(0, 1000, 10)))
        spread = heard.std(0).mean() / times.std(0).mean()
        assert abs(spread / train_mvdream.CAMERA_STD - 1) < 0.1
        assert heard.mean(0).abs().mean() < 0.1 * heard.std(0).mean()
        x, cond = torch.randn(4, 4, 16, 16), tiny.embed(["a red lamp"] * 4)
        alone, told = (predict(unet, x, 500, cond, camera, 1) for camera in (None, cameras[:4]))
        torch.testing.assert_close(alone, tiny.eps(x, 500, cond))
        assert (told - alone).abs().amax((1, 2, 3)).min() > 1e-3


@pytest.fixture
def small_stages(monkeypatch, tmp_path, tiny) -> Path:
    """Both stages on few groups, few steps and tiny models, their weights under the returned folder."""
    monkeypatch.setattr(views, "CHUNK", 4)
    monkeypatch.setattr(train_mvdream, "load_prior", lambda name, device: tiny)
    monkeypatch.setattr(train_mvdream, "GROUPS_DRAWN", {4: 4, 5: 4, 6: 4})
    monkeypatch.setitem(workshop.STAGES, "mvdream", Recipe(4, 2, 4e-4, 4))
    monkeypatch.setitem(workshop.STAGES, "views", Recipe(2, 4, 2e-3, 5))
    monkeypatch.setattr(workshop, "CHECKPOINT_EVERY_S", -1)
    return tmp_path / "assets"


def shop(work: Path, warm: int = 0) -> Workshop:
    torch.save(torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(2)).half(), work / "latents-1.pt")
    return Workshop(torch.device("cpu"), work, 1.0, ("mvdream", "views"), warm, work / "assets")


def test_training_goes_on_exactly_where_it_was_cut_off(small_stages, monkeypatch, tmp_path, tiny):
    at_once = train_mvdream.train_mvdream(shop(tmp_path))
    (tmp_path / "mvdream.pt").unlink()

    calls, take = [], views.Groups.take

    def cut(self, indices):
        calls.append(indices)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return take(self, indices)

    monkeypatch.setattr(views.Groups, "take", cut)
    with pytest.raises(KeyboardInterrupt):
        train_mvdream.train_mvdream(shop(tmp_path))
    resumed = train_mvdream.train_mvdream(shop(tmp_path))
    assert len(calls) == 3 + 2  # the third step again, and the fourth
    for name, weight in at_once.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], weight, rtol=0, atol=1e-6)

    # What was saved loads as a multi-view UNet, and is not what it started from.
    index = json.loads((small_stages / "mvdream" / "model_index.json").read_text())
    assert index["base"] == "../sd"
    saved = MVDreamPrior.load_unet("mvdream", Source(str(small_stages / "mvdream")), torch.float32)
    x, cond = torch.randn(4, 4, 16, 16), tiny.embed(["a red lamp"] * 4)
    cameras = camera_embedding(torch.from_numpy(views.group(4, 0)[0].poses()))
    with torch.no_grad():
        trained = predict(resumed, x, 500, cond, cameras, 4)
        torch.testing.assert_close(predict(saved, x, 500, cond, cameras, 4), trained, rtol=0, atol=5e-3)
        assert (trained - tiny.eps(x, 500, cond)).abs().max() > 1e-2

    # A finished stage is only loaded; with `warm` and without its checkpoint it goes on from what was saved.
    (tmp_path / "mvdream.pt").unlink()
    monkeypatch.setitem(workshop.STAGES, "mvdream", Recipe(1, 2, 0.0, 4))
    warm = train_mvdream.train_mvdream(shop(tmp_path, warm=1))
    with torch.no_grad():
        torch.testing.assert_close(predict(warm, x, 500, cond, cameras, 4), trained, rtol=0, atol=5e-3)


def test_the_classifier_of_views_trains_and_loads_as_one_of_attributes(small_stages, tmp_path):
    trained = train_mvdream.train_views(shop(tmp_path))
    classifier = load_attributes(source=Source(str(small_stages / "views")))
    assert classifier.groups == views.VIEW_GROUPS
    pixels = to_pixels(views.Groups(tmp_path, 5, 4).take(np.arange(4))[:, 0], torch.device("cpu"))
    with torch.no_grad():
        logits = trained(normalise(pixels)).logits.split([len(values) for values in views.VIEW_GROUPS.values()], 1)
        for said, own in zip(classifier(pixels).values(), logits, strict=True):
            torch.testing.assert_close(said, own.log_softmax(1), rtol=0, atol=5e-2)  # kept in half precision


def test_the_classifier_of_views_starts_from_that_of_attributes():
    model = make_attributes(views.VIEW_GROUPS).eval()
    images, drawn = torch.rand(2, 3, 128, 128), model.classifier[-1].weight.clone()
    train_mvdream.start_from_attributes(model)
    with torch.no_grad():
        facts, azimuth = model(images).logits.tensor_split([-len(views.AZIMUTHS)], 1)
        torch.testing.assert_close(facts, load_attributes().model(images).logits)
    assert torch.equal(model.classifier[-1].weight[-len(views.AZIMUTHS) :], drawn[-len(views.AZIMUTHS) :])
    assert azimuth.std() > 0


def test_the_learning_rate_by_hand():
    """Of a long stage the warm-up is 200 steps, of a short one a tenth."""
    assert [workshop.learning_rate(2.0, step, 10_000) for step in (0, 5000, 9999)] == pytest.approx([0.01, 1.0, 0.02])
    assert workshop.learning_rate(2.0, 99, 10_000) == pytest.approx(1.0, rel=1e-3)
    assert [workshop.learning_rate(2.0, step, 100) for step in (0, 4, 50)] == pytest.approx([0.2, 1.0, 1.0], rel=5e-3)


def test_gradients_are_the_mean_over_the_processes(monkeypatch):
    """Of the parameters that have one, in their order; the other process's are 3, 4, 5."""
    module = torch.nn.ModuleList([torch.nn.Linear(2, 1), torch.nn.Linear(4, 4)])
    module[0].weight.grad, module[0].bias.grad = torch.tensor([[1.0, 2.0]]), torch.tensor([3.0])
    monkeypatch.setattr(workshop, "place", lambda: (0, 2))
    monkeypatch.setattr(workshop.dist, "all_reduce", lambda flat: flat.add_(torch.tensor([3.0, 4.0, 5.0])))
    workshop.average_gradients(module)
    assert (module[0].weight.grad.tolist(), module[0].bias.grad.tolist()) == ([[2.0, 3.0]], [4.0])
    assert module[1].weight.grad is None


def test_recoloured_pictures_are_asked_for_the_colours_they_show():
    """Patches of plain paint: what is asked of a turned patch is the name nearest to what it shows, if one is near."""
    names, batch = list(GROUPS["colour_a"]), 600
    paint = np.array(list(world.COLOURS.values()), np.float32) / 255
    colour = np.arange(batch) % len(names)
    rows = [labels(world.Scene(world.Thing("lamp", names[i]))) for i in colour]
    target = torch.from_numpy(np.stack(rows))
    pixels = torch.from_numpy(paint[colour])[..., None, None].repeat(1, 1, 4, 4)
    seen, asked = train_mvdream.recolour(pixels, target, np.random.default_rng(0))

    turned = ((seen - pixels).abs() > 1e-3).flatten(1).any(1)
    chromatic = torch.from_numpy(np.ptp(paint[colour], axis=1) > 0.1)
    assert 0.5 < turned[chromatic].float().mean() < 0.7
    assert torch.equal(asked[~turned & chromatic], target[~turned & chromatic])
    distance = np.linalg.norm(seen[:, :, 0, 0].numpy()[:, None] - paint, axis=-1)
    main = asked[:, list(GROUPS).index("colour_a")].numpy()
    kept = main != train_mvdream.IGNORED
    assert (main[kept] == distance.argmin(1)[kept]).all()
    assert (distance.min(1)[kept] <= train_mvdream.COLOUR_TOLERANCE).all()
    assert 0.15 < (~kept & turned.numpy()).mean() < 0.35, "of one tint, or near no name"
    assert ((main != colour) & kept).sum() > 90, "some take another's name"
    for i, group in enumerate(GROUPS):
        if "colour" not in group or group == "colour_b":  # "none" is no colour
            assert torch.equal(asked[:, i], target[:, i]), group


def test_worn_pictures_are_blurred_or_mottled_where_the_object_is():
    background = torch.from_numpy(train_mvdream.BACKGROUND).view(1, 3, 1, 1)
    pixels = background.repeat(64, 1, 32, 32)
    pixels[..., 8:24, 8:24] = 0.5
    worn = train_mvdream.wear(pixels, np.random.default_rng(0))
    assert worn.shape == pixels.shape and worn.min() >= 0 and worn.max() <= 1
    blurred, sharp = worn.split(32)
    torch.testing.assert_close(sharp[..., :7, :], pixels[32:, :, :7, :], rtol=0, atol=0)  # nothing beside the object
    mottled = (sharp[..., 8:24, 8:24] != 0.5).flatten(1).any(1)
    assert 8 < mottled.sum() < 24
    assert (blurred[:, 0, 7, 16] < background[0, 0]).all(), "no soft edge"


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
    scenes, angles = [g.example.scene for g in renders.groups], torch.tensor([g.azimuth_deg for g in renders.groups])
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
