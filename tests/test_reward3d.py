"""Rewards of several views: the published ones against their reference, and the way of any of them through a run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from psd import RunConfig, generate
from psd.contracts import Reward
from psd.errors import RequestError
from psd.events import Finished
from psd.models.hub import Source
from psd.models.priors.table import TOYBOX_FRAME
from psd.models.rewards import image_reward, load_reward, reward3d
from psd.models.rewards.mixture import Mixture
from psd.models.rewards.table import REWARDS, RewardInfo, held_out_rewards
from psd.modes import pictures
from psd.record import scores_of
from psd.safety import check_request
from psd.score import BoundScore
from psd.toybox import views, world
from psd.toybox.evaluate import HELDOUT_SEED
from psd.toybox.pairs import to_pixels
from tests.test_rewards import bert_tokenizer, golden, register, relative

GOLDEN = Path(__file__).parent / "golden"
VARIANTS = {"scorer": reward3d.Reward3DScorer, "cross_view": reward3d.Reward3DCrossView}
OTHER_HEAD = {"scorer": "cross_view_adapter.", "cross_view": "Scorer."}
PROMPT = "a red mushroom with a white stem"


# The published ones


@pytest.mark.parametrize(("variant", "cls"), VARIANTS.items())
def test_names_and_shapes_cover_the_full_size_models(variant: str, cls: type):
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    published = json.loads((GOLDEN / f"dreamreward/full_keys_{variant}.json").read_text())["keys"]
    weights = {name: torch.empty(shape, device="meta") for name, shape in published.items()}
    parts = image_reward.image_reward_to_transformers(weights)
    with torch.device("meta"):
        vision = BlipVisionModel(BlipVisionConfig(**image_reward.VIT_L_16))
        text = BlipTextModel(BlipTextConfig(**image_reward.BERT_BASE), add_pooling_layer=False)
    for part, model in (("vision", vision), ("text", text)):
        got = {name: weight.shape for name, weight in parts[part].items()}
        assert got == {name: weight.shape for name, weight in model.state_dict().items()}
    assert len(published) - sum(map(len, parts.values())) == 5  # BLIP's projections and position_ids
    head = cls.make_head({name: torch.zeros(weight.shape) for name, weight in parts["head"].items()})
    kept = sum(parameter.numel() for parameter in head.parameters())
    unused = sum(p.numel() for p in parts["head"].values()) - kept
    assert unused == (8256 + 1040 + 17 if variant == "scorer" else 0)  # the last three layers of the MLP
    assert head(torch.zeros(8, 768)).shape == (2, 1)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Loader of a variant from the golden tiny weights, in the published file's format."""
    weights, about = golden("dreamreward/tiny_weights")
    vit, bert = about["vit"], about["med_config"]
    vision = dict(
        hidden_size=vit["embed_dim"], intermediate_size=4 * vit["embed_dim"], num_hidden_layers=vit["depth"],
        num_attention_heads=vit["num_heads"], image_size=vit["img_size"], patch_size=vit["patch_size"],
    )  # fmt: skip
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    text = {name: bert[name] for name in (*sizes, "max_position_embeddings")} | {"encoder_hidden_size": 32}
    monkeypatch.setattr(image_reward, "VIT_L_16", image_reward.VIT_L_16 | vision)
    monkeypatch.setattr(image_reward, "BERT_BASE", image_reward.BERT_BASE | text)
    bert_tokenizer(118).save_pretrained(tmp_path / "bert")  # [DEC] and [ENC] make 120

    def load(variant: str, without: str = "") -> Reward:
        folder, cls = tmp_path / f"{variant}{without}", VARIANTS[variant]
        folder.mkdir()
        kept = {name: w for name, w in weights.items() if not name.startswith(OTHER_HEAD[variant]) and name != without}
        torch.save(kept, folder / cls.file)
        tokenizer = Source(str(tmp_path / "bert"))
        register(monkeypatch, "tiny", f"{cls.__module__}:{cls.__name__}", folder, tokenizer=tokenizer, views=4)
        return load_reward("tiny")

    return load


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_and_gradients_are_the_reference_ones(variant: str, published):
    io, _ = golden("dreamreward/tiny_io")
    reward = published(variant)

    def score(rows: Tensor, mask: Tensor) -> Tensor:
        return reward.score(io["pixel_values"][rows], io["input_ids"][rows], mask[rows])

    rows, mask = torch.arange(8), io["attention_mask"]
    swapped = torch.tensor([1, 0, *range(2, 8)])
    with torch.no_grad():
        assert relative(score(rows, mask), io[f"{variant}.score"][:, 0]) < 1e-4
        assert relative(score(swapped, mask), io[f"{variant}.score_first_two_views_swapped"][:, 0]) < 1e-4
        unmasked = score(rows, torch.ones_like(mask))
        assert relative(unmasked, io[f"{variant}.score_if_padding_not_masked"][:, 0]) < 1e-4
    pixels = io["pixel_values"].requires_grad_()
    reward.score(pixels, io["input_ids"], mask).sum().backward()
    assert relative(pixels.grad, io[f"{variant}.dscoresum_dpixels"]) < 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_view_is_read_with_its_own_prompt_and_objects_do_not_see_each_other(variant: str, published):
    reward, images = published(variant), torch.rand(8, 3, 40, 50)
    prompts = ["a red mushroom", "a blue lamp"] * 4
    both = reward(images, prompts)
    assert both.shape == (2,) and reward.max_tokens == 100
    torch.testing.assert_close(reward(images[4:], prompts[4:])[0], both[1])
    assert (reward(images, ["a blue mushroom", *prompts[1:]]) - both).abs().tolist()[1] < 1e-6
    assert not torch.isclose(reward(images, ["a blue mushroom", *prompts[1:]])[0], both[0], rtol=1e-6)
    with pytest.raises(ValueError, match="8 images but 4 prompts"):
        reward(images, prompts[:4])


@pytest.mark.parametrize(
    ("variant", "lost"),
    [
        ("scorer", "Scorer.fc2.weight"), ("scorer", "mlp.layers.2.bias"), ("scorer", "blip.visual_encoder.norm.weight"),
        ("cross_view", "cross_view_adapter.fusion_gate.0.bias"), ("cross_view", "mlp.layers.7.weight"),
    ],
)  # fmt: skip
def test_a_checkpoint_without_one_of_its_parameters_is_refused(variant: str, lost: str, published):
    with pytest.raises(RequestError, match="incomplete or damaged"):
        published(variant, lost)


def make_reward3d(folder: Path) -> None:
    """Both published files on the towers of ImageReward's golden weights, with random heads; for `tests.published`."""
    weights, generator = golden("rewards/imagereward_tiny_weights")[0], torch.Generator().manual_seed(5)
    width = weights["mlp.layers.0.weight"].shape[1]
    scorer = {"fc1": (256, 512), "fc2": (64, 256), "fc3": (1, 64)}
    adapter = reward3d.CrossViews(width, 4).state_dict()
    heads = {
        reward3d.Reward3DCrossView.file: {f"{reward3d.ADAPTER}{name}": weight for name, weight in adapter.items()},
        reward3d.Reward3DScorer.file: {
            f"Scorer.{name}.{kind}": torch.randn(shape if kind == "weight" else shape[:1], generator=generator) / 20
            for name, shape in scorer.items()
            for kind in ("weight", "bias")
        },
    }
    for file, head in heads.items():
        torch.save(weights | head, folder / file)


# Any of them in a run


class FourSides(Reward):
    """The brightness of the first view plus the spread of the four: no mean over views."""

    name, views = "four sides", 4

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        light = images.mean((1, 2, 3)).view(-1, 4)
        return 2 * light[:, 0] + light.std(1)


class Light(Reward):
    name = "light"

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return images.mean((1, 2, 3))


@pytest.mark.parametrize("rank", ["view", "group"])
def test_every_view_has_the_score_of_its_group(rank: str):
    x = torch.rand(2, 8, 3, 5, 5, requires_grad=True)
    scores = BoundScore(lambda x: x, FourSides(), [PROMPT], rank)(x)
    wanted = FourSides()(x.flatten(0, 1), []).view(2, 2, 1).expand(2, 2, 4)
    wanted = wanted.mean(1, keepdim=True).expand_as(wanted) if rank == "group" else wanted
    torch.testing.assert_close(scores, wanted.reshape(2, 8))
    scores.mean().backward()
    assert (x.grad[:, 0] != x.grad[:, 1]).all()


def test_a_mixture_counts_single_views_with_their_mean():
    mixture = Mixture({"a": FourSides(), "b": Light()}, {"a": 1.0, "b": 0.5}).bound()
    images = torch.rand(16, 3, 5, 5)
    scores = mixture.rank(images, [PROMPT] * 16, 2)  # two copies of two objects
    assert scores.shape == (4,) and mixture.views == 4
    light = Light()(images, []).view(4, 4).mean(1)
    members = torch.stack([FourSides()(images, []), light])
    spread = members.view(2, 2, 2).var(1).mean(1, keepdim=True).sqrt()
    wanted = (torch.tensor([[1.0], [0.5]]) * (members - members.mean(1, keepdim=True)) / spread).sum(0)
    torch.testing.assert_close(scores, wanted)


def test_result_views_come_in_groups_of_a_quarter_turn():
    cameras = pictures.scored_cameras(TOYBOX_FRAME)
    groups = cameras.azimuth_deg.view(3, 4)
    torch.testing.assert_close(groups, torch.tensor([[0.0, 90, 180, 270], [30, 120, 210, 300], [60, 150, 240, 330]]))
    images = torch.rand(12, 3, 5, 5)
    scores = scores_of(images, [PROMPT] * 12, {"four": FourSides(), "light": Light()})
    assert scores["four"] == pytest.approx(FourSides()(images, []).mean().item())
    assert scores["light"] == pytest.approx(images.mean().item())


def refusal(**settings) -> str:
    with pytest.raises(RequestError) as refused:
        check_request(RunConfig.from_preset(**dict(preset="toybox-fast", prompt=PROMPT) | settings))
    assert refused.value.field == "reward"
    return str(refused.value)


def test_a_reward_of_several_views_is_refused_where_there_are_others(monkeypatch):
    check_request(RunConfig.from_preset("toybox-fast", prompt=PROMPT, reward="reward3d"))
    check_request(RunConfig.from_preset("toybox-fast", prompt=PROMPT, reward="reward3d + 0.5 toybox/judge"))
    assert refusal(preset="toybox-image", reward="reward3d") == (
        "reward 'reward3d' judges 4 views of one object together, and mode image has single pictures: "
        "choose a reward of single pictures."
    )
    monkeypatch.setitem(REWARDS, "six", RewardInfo(Source("toybox/six"), "", 0, f"{__name__}:Light", "", views=6))
    assert "judges 6 views of one object together, and this prior draws 4:" in refusal(reward="six")


def test_judges_fit_the_prior_and_share_no_tower_with_the_target():
    row = RewardInfo(Source("toybox/four"), "", 0, "", "", encoder=REWARDS["toybox/preference"].source, views=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(REWARDS, "four", row)
        assert "four" not in held_out_rewards("toybox/judge") and "four" in held_out_rewards("toybox/judge", 4)
        assert held_out_rewards("four", 4) == ["toybox/judge"]
        assert held_out_rewards("toybox/preference", 4) == ["toybox/judge"]


class Flat(Light):
    """A reward without gradient."""

    name, differentiable = "flat", False

    @classmethod
    def load(cls, name: str, info: RewardInfo, device: str) -> Flat:
        return cls()

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return super().__call__(images.detach(), prompts)


@pytest.fixture
def flat(monkeypatch):
    row = RewardInfo(Source("toybox/taesd"), "", 0, f"{__name__}:Flat", "", differentiable=False)
    monkeypatch.setitem(REWARDS, "flat", row)


def test_without_a_gradient_n_stays_fixed_and_the_run_says_so(flat, tmp_path):
    """Not even where another arm ranks by it; what is drawn is what a fixed n draws."""
    settings = dict(preset="toybox-image", prompt=PROMPT, steps=6, reward="flat", seed=2)
    ends = {}
    for arms in ("with, negative-only, dreamdpo", "no-negative"):
        config = RunConfig.from_preset(**settings, arms=arms, fast_decoder=True)
        *_, ends[arms] = generate(config, tmp_path, "cpu")
        assert isinstance(ends[arms], Finished) and not ends[arms].failed
    learning, fixed = ends.values()
    assert learning.remarks == ("n stayed fixed: reward flat has no gradient that it could follow.",)
    assert fixed.remarks == ()
    assert "negative" not in learning.arms["with"].files
    drawn = [np.array(Image.open(path)) for path in (learning.arms["with"].picture, fixed.arms["no-negative"].picture)]
    assert np.array_equal(*drawn)


def test_a_method_that_follows_the_gradient_refuses_a_reward_without(flat):
    assert refusal(preset="toybox-image", reward="flat", arms="with, dreamreward") == (
        "reward 'flat' has no gradient, which method dreamreward follows: "
        "choose another reward, or a method that ranks."
    )


def test_a_row_says_of_its_reward_what_is_so(flat, monkeypatch):
    monkeypatch.setitem(REWARDS, "flat", RewardInfo(Source("toybox/instruments"), "", 0, f"{__name__}:Flat", ""))
    with pytest.raises(TypeError, match="flat is not what its row says"):
        load_reward("flat")


# toybox/reward3d


def test_an_object_is_ranked_by_four_views_together(tmp_path):
    """Curve, pairs, scores: one number a group, the target's and the judge's that shares no tower with it."""
    settings = dict(prompt=PROMPT, reward="toybox/reward3d", arms="with, dreamreward", steps=4, pref_interval=1)
    config = RunConfig.from_preset("toybox-fast", **settings, grid_size=16, grid_size_end=0, samples=16)
    *_, end = generate(config, tmp_path, "cpu")
    assert not end.failed and end.steps_done == 4
    for arm in end.arms.values():
        assert list(arm.scores) == ["toybox/reward3d", "toybox/judge"]
        assert all(map(math.isfinite, arm.scores.values()))
    pairs = np.array(end.arms["with"].remarks["pairs"]["scores"])  # [moment][better, worse][view]
    assert pairs.shape == (4, 2, 4) and np.ptp(pairs, axis=2).max() == 0
    assert (pairs[:, 0] > pairs[:, 1]).all()


def test_it_prefers_an_object_to_two_halves():
    reward, rng = load_reward("toybox/reward3d"), np.random.default_rng(3)
    drawn = [views.group(HELDOUT_SEED, index, heldout=True)[0].scene for index in range(6)]
    images = [to_pixels(views.draw_group(HELDOUT_SEED, index, heldout=True), torch.device("cpu")) for index in range(6)]
    prompts = [world.caption(scene, rng) for scene in drawn for _ in range(4)]
    mixed = [torch.cat([own[:2], other[2:]]) for own, other in zip(images, images[1:] + images[:1])]
    with torch.no_grad():
        whole, halves = (reward(torch.cat(each), prompts) for each in (images, mixed))
    assert (whole > halves).all()
