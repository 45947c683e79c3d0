"""The training of the toybox: the loop of its stages and what the multi-view ones draw, exact, on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from psd.models.hub import Source
from psd.models.priors import load_prior
from psd.models.priors.mvdream import MVDreamPrior, predict, start_from
from psd.models.rewards import load_reward
from psd.models.rewards.clip_scores import CLIPReward
from psd.models.rewards.table import REWARDS, RewardInfo
from psd.scene.cameras import camera_embedding, sample_cameras
from psd.toybox import recolour, reward3d, train_mvdream, views, workshop, world
from psd.toybox.classifier import load_attributes
from psd.toybox.facts import GROUPS, labels
from psd.toybox.models import make_attributes
from psd.toybox.pairs import normalise, to_pixels
from psd.toybox.workshop import Recipe, Workshop
from tests.test_priors import make_prior_folder


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
        facts = model(images).logits[:, : -len(views.AZIMUTHS)]
        torch.testing.assert_close(facts, load_attributes().model(images).logits)
    assert torch.equal(model.classifier[-1].weight[-len(views.AZIMUTHS) :], drawn[-len(views.AZIMUTHS) :])


def test_the_learning_rate_by_hand():
    """Of a long stage the warm-up is 200 steps, of a short one a tenth."""

    def rates(steps: int, *at: int) -> list[float]:
        return [workshop.learning_rate(2.0, step, steps, progress=step / steps) for step in at]

    assert rates(10_000, 0, 5000, 9999) == pytest.approx([0.01, 1.0, 0.02])
    assert rates(10_000, 99) == pytest.approx([1.0], rel=1e-3)
    assert rates(100, 0, 4, 50) == pytest.approx([0.2, 1.0, 1.0], rel=5e-3)
    assert workshop.learning_rate(2.0, 5000, 10_000, progress=1.0) == 0.02  # its time is over


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
    seen, asked = recolour.recolour(pixels, target, np.random.default_rng(0))

    turned = ((seen - pixels).abs() > 1e-3).flatten(1).any(1)
    chromatic = torch.from_numpy(np.ptp(paint[colour], axis=1) > 0.1)
    assert 0.5 < turned[chromatic].float().mean() < 0.7
    assert torch.equal(asked[~turned & chromatic], target[~turned & chromatic])
    distance = np.linalg.norm(seen[:, :, 0, 0].numpy()[:, None] - paint, axis=-1)
    main = asked[:, list(GROUPS).index("colour_a")].numpy()
    kept = main != recolour.IGNORED
    assert (main[kept] == distance.argmin(1)[kept]).all()
    assert (distance.min(1)[kept] <= recolour.COLOUR_TOLERANCE).all()
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


# toybox/reward3d.


@pytest.fixture(scope="module")
def preference() -> CLIPReward:
    return load_reward("toybox/preference")


def seen_groups(count: int) -> tuple[reward3d.Seen, list[views.Group]]:
    """Groups whose view v is seen as 100 g + v; hues turned as minus that, in less taste as a half more."""
    own = (100.0 * torch.arange(count)[:, None] + torch.arange(4)).unsqueeze(-1)
    told = torch.zeros(count, 2, 3)
    seen = reward3d.Seen(own, -1 - own[:, :2], own + 0.5, told, told + 1)
    return seen, [views.group(5, index)[0] for index in range(count)]


def test_every_wrong_group_is_wrong_in_its_own_way():
    seen, groups = seen_groups(30)
    index = np.arange(30)
    compared = reward3d.Comparisons(seen, groups).of(index, np.random.default_rng(0))
    own, captioned, mixed, repeated, turned, worse = compared.seen[..., 0]
    assert torch.equal(own, seen.own[..., 0]) and torch.equal(captioned, own) and torch.equal(worse, own + 0.5)
    assert compared.told.mean((1, 2)).tolist() == [0, 1, 0, 0, 0, 0]

    foreign = (mixed != own).sum(1)
    assert set(foreign[compared.asked[1]].tolist()) == {1, 2}
    assert torch.equal(mixed % 100, own % 100)  # another object in the same place
    assert all(len((row // 100).unique()) == 2 for row in mixed[compared.asked[1]])
    kinds = [drawn.scene.first.kind for drawn in groups]
    others = [int((row[row != mine] // 100)[0]) for row, mine in zip(mixed, own) if (row != mine).any()]
    assert {kinds[i] == kinds[other] for i, other in zip(index[(foreign > 0).numpy()], others)} == {True, False}

    assert torch.equal(repeated[:, :2], repeated[:, 2:]) and torch.equal(repeated // 100, own // 100)
    assert compared.asked[2].tolist() == [views.shows_azimuth(drawn.scene) for drawn in groups]
    assert torch.equal(turned[:, 2:], own[:, 2:]) and (turned[:, 1] < 0).all()
    assert set((turned[:, 0] < 0).tolist()) == {True, False}


def test_the_reward_of_groups_trains_and_loads_as_what_it_was_trained_as(preference, monkeypatch, tmp_path):
    monkeypatch.setattr(views, "CHUNK", 4)
    monkeypatch.setattr(reward3d, "GROUPS_SEEN", 4)
    monkeypatch.setitem(workshop.STAGES, "reward3d", Recipe(30, 8, 3e-3, 5))
    shop = Workshop(torch.device("cpu"), tmp_path, 1.0, ("reward3d",), 0, tmp_path / "assets")
    head = reward3d.train_reward3d(shop)

    groups = views.Groups(tmp_path, 5, 4)
    seen = reward3d.Seen(*torch.load(tmp_path / "reward3d-seen-5.pt", weights_only=True))
    before = reward3d.right_answers(seen, groups.groups, preference, None)
    after = reward3d.right_answers(seen, groups.groups, preference, head)
    assert np.mean(list(after.values())) > np.mean(list(before.values()))

    row = RewardInfo(
        Source(str(tmp_path / "assets" / "reward3d")), "", 0, "psd.models.rewards.reward3d:ToyboxReward3D", "",
        encoder=Source("toybox/preference"), views=4,
    )  # fmt: skip
    monkeypatch.setitem(REWARDS, "trained", row)
    reward, captions = load_reward("trained"), [world.caption(drawn.scene) for drawn in groups.groups[:2]]
    pixels = to_pixels(groups.take(np.arange(2)).reshape(-1, 128, 128, 3), torch.device("cpu"))
    prompts = [caption for caption in captions for _ in range(4)]
    with torch.no_grad():
        scores = reward(pixels, prompts)
        told = torch.stack([preference.encode_prompt(caption) for caption in captions])
        kept = reward3d.scores_of(preference, head, reward.seen(pixels).view(1, 2, 4, -1), told[None])[0]
        alone = preference(pixels, prompts).view(2, 4).mean(1)
    torch.testing.assert_close(scores, kept, rtol=0, atol=5e-2)  # kept in half precision
    assert scores.shape == (2,) and (scores - alone).abs().min() > 1e-3
    gradient = torch.autograd.grad(reward(pixels.requires_grad_(), prompts)[0], pixels)[0].abs().amax((1, 2, 3))
    assert (gradient[:4] > 0).all() and (gradient[4:] == 0).all()
