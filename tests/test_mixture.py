"""Mixtures of rewards: arithmetic by hand, scales that belong to one run, refusals, and who judges beside them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from psd import RunConfig, generate, run
from psd.contracts import Reward
from psd.errors import RequestError
from psd.events import Finished
from psd.methods import METHODS
from psd.models.hub import Source
from psd.models.rewards import load_reward
from psd.models.rewards.mixture import DECAY, ROUNDING, Mixture
from psd.models.rewards.table import REWARDS, held_out_rewards, is_mixture, reward_terms
from psd.modes.image import ImageStage
from psd.safety import check_request
from psd.score import BoundScore
from tests.gaussian import PlainReward
from tests.test_object3d import ExactPrior

CONFIG = RunConfig.from_preset(
    prompt="a red mushroom with a white stem", steps=4, seed=3, reward="toybox/preference + 0.5 toybox/judge"
)


@PlainReward
def red(images: Tensor, prompts: list[str]) -> Tensor:
    assert len(images) == len(prompts)
    return images[:, 0].mean((1, 2))


@PlainReward
def dark(images: Tensor, prompts: list[str]) -> Tensor:
    return 100 - 20 * images.mean((1, 2, 3))


def pictures(*values: float) -> Tensor:
    """One grey picture for each value."""
    return torch.tensor(values)[:, None, None, None].expand(-1, 3, 2, 2)


def red_and_dark() -> Mixture:
    return Mixture({"red": red, "dark": dark}, {"red": 1.0, "dark": 0.5})


# Arithmetic


def test_a_pair_by_hand():
    """red: 0.2 and 0.6, mean 0.4, s^2 = 0.08; dark: 96 and 88, mean 92, s^2 = 32."""
    mixture = red_and_dark()
    scores = mixture.rank(pictures(0.2, 0.6), ["x"] * 2, 2)
    torch.testing.assert_close(mixture.scales[:, 0], torch.tensor([math.sqrt(0.08), math.sqrt(32)]))
    by_hand = -0.2 / math.sqrt(0.08) + 0.5 * 4 / math.sqrt(32)
    torch.testing.assert_close(scores, torch.tensor([by_hand, -by_hand]), atol=1e-5, rtol=0)
    # A later call stands on the same zero and scales.
    later = 0.1 / math.sqrt(0.08) - 0.5 * 2 / math.sqrt(32)
    torch.testing.assert_close(mixture(pictures(0.5), ["x"]), torch.tensor([later]), atol=1e-5, rtol=0)


def test_the_weight_decides_between_members_of_unlike_scale():
    """dark's raw gap is twenty times red's; in units of their usual gaps the weights alone count."""
    images, prompts = pictures(0.2, 0.6), ["x"] * 2
    for weight, winner in ((0.9, 1), (1.1, 0)):
        mixture = Mixture({"red": red, "dark": dark}, {"red": 1.0, "dark": weight})
        assert mixture.rank(images, prompts, 2).argmax() == winner


def test_the_scale_runs_over_pairs_and_samples():
    """Rows are (noise, sample): the samples' own difference, 0.5 here, is no part of a pair's."""
    mixture = Mixture({"red": red}, {"red": 1.0})
    variance = 0.0
    for step, (a, b) in enumerate(((0.1, 0.3), (0.2, 0.2), (0.3, 0.1)), start=1):
        mixture.rank(pictures(0.0, 0.5, a, 0.5 + b), ["x", "y"] * 2, 2)
        variance = DECAY * variance + (1 - DECAY) * (a * a + b * b) / 4
        expected = math.sqrt(variance / (1 - DECAY**step))
        assert mixture.scales.item() == pytest.approx(expected, rel=1e-4)
    assert mixture.ranked == 3


def test_equal_copies_make_no_noise():
    mixture = red_and_dark()
    scores = mixture.rank(pictures(0.5, 0.5), ["x"] * 2, 2)
    assert torch.equal(scores, torch.zeros(2)) and mixture.scales.min() == torch.tensor(ROUNDING)


def test_only_ranking_teaches():
    mixture = red_and_dark()
    images = pictures(0.2, 0.6)
    assert torch.equal(mixture(images, ["x"] * 2), torch.zeros(2)) and mixture.ranked == 0
    mixture.rank(images, ["x"] * 2, 2)
    scales = mixture.scales
    mixture(pictures(0.0, 1.0), ["x"] * 2)
    mixture.rank(pictures(0.0, 1.0), ["x"] * 2, 1)  # the winner alone, for the negative embedding
    assert mixture.ranked == 1 and torch.equal(mixture.scales, scales)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_pair_without_a_finite_score_teaches_nothing(bad: float):
    clean, spoiled = red_and_dark(), red_and_dark()
    for a, b in ((0.2, 0.6), (0.1, 0.2)):
        clean.rank(pictures(a, b), ["x"] * 2, 2)
        spoiled.rank(pictures(bad, 0.5), ["x"] * 2, 2)
        spoiled.rank(pictures(a, bad, b, 0.7), ["x", "y"] * 2, 2)  # the second sample's pair is no pair
    assert spoiled.ranked == clean.ranked == 2
    torch.testing.assert_close(spoiled.scales, clean.scales)
    images = pictures(0.3, 0.9)
    torch.testing.assert_close(spoiled(images, ["x"] * 2), clean(images, ["x"] * 2))


def test_each_arm_learns_scales_of_its_own():
    loaded = red_and_dark()
    first, second = loaded.bound(), loaded.bound()
    first.rank(pictures(0.2, 0.6), ["x"] * 2, 2)
    assert (first.ranked, second.ranked, loaded.ranked) == (1, 0, 0)
    assert first.members == loaded.members and torch.equal(first.weights, loaded.weights)
    assert red.bound() is red


@pytest.mark.parametrize("name", ["toybox/preference", "toybox/judge", CONFIG.reward])
def test_every_reward_answers_to_the_contract(name: str):
    reward = load_reward(name)
    assert isinstance(reward, Reward)
    assert (reward.name, reward.views, reward.differentiable) == (name, 1, True)
    images, prompts = torch.rand(2, 3, 128, 128), ["a red lamp"] * 2
    if reward.bound() is reward:
        assert torch.equal(reward.rank(images, prompts, 2), reward(images, prompts))
    else:
        assert name == CONFIG.reward


def test_gradients_are_the_members_in_their_units():
    mixture = red_and_dark()
    mixture.rank(pictures(0.2, 0.6), ["x"] * 2, 2)
    images = torch.rand(3, 3, 2, 2, requires_grad=True)
    (got,) = torch.autograd.grad(mixture(images, ["x"] * 3).sum(), images)
    expected = torch.zeros(3, 3, 2, 2)
    expected[:, 0] += 1 / 4 / math.sqrt(0.08)
    expected -= 0.5 * 20 / 12 / math.sqrt(32)
    torch.testing.assert_close(got, expected)


def test_a_step_of_the_method_teaches_it():
    prior, mixture, x_0 = ExactPrior(), red_and_dark(), torch.rand(2, 3, 3, 2, 2)  # its latents are its pictures
    score = BoundScore(prior.decode, mixture, ["a", "b", "c"])
    scores = score(x_0)
    assert scores.shape == (2, 3) and score.reward.ranked == 1
    torch.testing.assert_close(score(x_0[:1]), scores[:1])
    assert score.reward.ranked == 1 and mixture.ranked == 0  # each arm's scales are its own


# Names


def test_terms():
    assert reward_terms("hpsv2.1 + 0.5 aesthetic") == {"hpsv2.1": 1.0, "aesthetic": 0.5}
    assert reward_terms(" 2 pickscore+imagereward ") == {"pickscore": 2.0, "imagereward": 1.0}
    assert is_mixture("0.5 aesthetic") and not is_mixture("aesthetic") and not is_mixture(" aesthetic ")


@pytest.mark.parametrize(
    ("reward", "sentence"),
    [
        ("hpsv2.1 + nobody", "reward 'nobody' is not known; known: toybox/preference"),
        ("hpsv2.1 + ", "reward '' is not known"),
        ("hpsv2.1 + 0.5*aesthetic", "did you mean aesthetic?"),
        ("hpsv2.1 + 0 aesthetic", "reward weight of aesthetic must be a number from 0.001 to 1000"),
        ("hpsv2.1 + -1 aesthetic", "got '-1'"),
        ("hpsv2.1 + nan aesthetic", "got 'nan'"),
        ("hpsv2.1 + inf aesthetic", "got 'inf'"),
        ("hpsv2.1 + 0,5 aesthetic", "as in 'hpsv2.1 + 0.5 aesthetic', got '0,5'"),
        ("hpsv2.1 + 2 hpsv2.1", "reward names hpsv2.1 twice: give it once"),
        ("hpsv2.1 + pickscore + imagereward + aesthetic + toybox/judge", "reward mixes 5 models, at most 4"),
    ],
)
def test_refusals(reward: str, sentence: str):
    with pytest.raises(RequestError) as refusal:
        check_request(RunConfig.from_preset(prompt="x", reward=reward))
    assert sentence in str(refusal.value) and str(refusal.value).startswith("reward") and len(str(refusal.value)) < 300


@pytest.mark.parametrize("method", [name for name, info in METHODS.items() if not info.samples])
def test_a_mixture_needs_an_arm_that_ranks_pairs(method: str):
    config = replace(CONFIG, method=method)
    if METHODS[method].ranks:
        check_request(config)
        check_request(replace(config, arms="without, with"))
    else:
        with pytest.raises(RequestError, match="no arm here ranks any: choose method psd, or a single reward"):
            check_request(config)
    with pytest.raises(RequestError, match="no arm here ranks any"):
        check_request(replace(config, arms="without, negative-only"))


# Runs


def test_scales_belong_to_one_run_and_members_to_all():
    first, second = load_reward(CONFIG.reward), load_reward(CONFIG.reward)
    first.rank(torch.rand(2, 3, 128, 128), ["a red lamp"] * 2, 2)
    assert first.ranked == 1 and second.ranked == 0
    assert first.members["toybox/judge"] is second.members["toybox/judge"] is load_reward("toybox/judge")
    assert second.weights.tolist() == [[1.0], [0.5]]


def test_a_run_with_a_mixture_is_reproducible_and_tells_each_members_score(tmp_path: Path, monkeypatch):
    *_, first = generate(CONFIG, tmp_path)
    # Measured at every step instead of at every preview: what is shown must not change what is done.
    monkeypatch.setattr(run, "MEASURED_STEPS", 1)
    monkeypatch.setattr(ImageStage, "preview_every_s", 1e9)
    *_, again = generate(CONFIG, tmp_path)
    assert isinstance(first, Finished)
    scores = {name: arm.scores for name, arm in first.arms.items()}
    assert scores == {name: arm.scores for name, arm in again.arms.items()}
    assert set(scores["with"]) == {CONFIG.reward, "toybox/preference", "toybox/judge"}
    assert all(math.isfinite(score) for arm in scores.values() for score in arm.values())
    assert scores["with"][CONFIG.reward] != scores["without"][CONFIG.reward]
    about = json.loads((first.directory / "run.json").read_text())
    assert about["reward_revisions"] == {"toybox/preference": "", "toybox/judge": ""}
    assert first.arms["with"].picture.read_bytes() != first.arms["without"].picture.read_bytes()


# Judges


def torchs_cpu_allocator(text: str) -> RuntimeError:
    return RuntimeError(f"[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: {text}")


class NoRoom:
    error = torch.OutOfMemoryError

    @classmethod
    def load(cls, name: str, info, device: str):
        raise cls.error("no room")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Path:
    """An empty hub cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def put(cache: Path, source: Source, leave_out: int = 0) -> None:
    """Files of `source` in the cache, by name and without contents, all but the first few."""
    folder = cache / f"models--{source.name.replace('/', '--')}" / "snapshots" / source.revision
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.files[leave_out:]:
        (folder / file).touch()


def test_judges_are_at_home_in_the_targets_world_and_here_whole(cache: Path):
    assert held_out_rewards("toybox/preference") == ["toybox/judge"]
    assert held_out_rewards("toybox/judge") == ["toybox/preference"]
    assert held_out_rewards(CONFIG.reward) == []
    assert held_out_rewards("pickscore") == []
    put(cache, REWARDS["hpsv2.1"].source)
    put(cache, REWARDS["hpsv2.1"].tokenizer, leave_out=1)
    assert held_out_rewards("pickscore") == []  # half a tokenizer is none
    put(cache, REWARDS["hpsv2.1"].tokenizer)
    for source in REWARDS["aesthetic"].sources:
        put(cache, source)
    assert held_out_rewards("pickscore") == ["hpsv2.1", "aesthetic"]
    assert held_out_rewards("pickscore + 0.5 aesthetic") == ["hpsv2.1"]
    assert held_out_rewards("toybox/preference") == ["toybox/judge"]


def test_a_published_judge_that_cannot_be_read_is_left_out_and_not_downloaded(cache: Path, monkeypatch, caplog):
    monkeypatch.setattr("psd.models.hub.missing_files", lambda source: pytest.fail("the hub was asked"))
    for source in REWARDS["hpsv2.1"].sources:
        put(cache, source)
    monkeypatch.setitem(REWARDS, "pickscore", replace(REWARDS["toybox/preference"], download_mb=1))
    assert list(run.load_rewards("pickscore", "cpu")) == ["pickscore"]
    assert "held-out judge is left out: 'hpsv2.1' was downloaded whole but cannot be read" in caplog.text


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, torchs_cpu_allocator])
def test_a_judge_that_finds_no_room_is_left_out(error, cache: Path, monkeypatch, caplog):
    monkeypatch.setattr(NoRoom, "error", error)
    here = replace(REWARDS["toybox/preference"], download_mb=1)
    monkeypatch.setitem(REWARDS, "pickscore", here)
    monkeypatch.setitem(REWARDS, "mps", replace(here, source=Source("toybox/large"), model=f"{__name__}:NoRoom"))
    assert list(run.load_rewards("pickscore", "cpu")) == ["pickscore"]
    assert "no room" in caplog.text


def test_a_broken_judge_of_the_app_is_a_fault(monkeypatch):
    broken = replace(REWARDS["toybox/judge"], source=Source("toybox/no-such-folder"))
    monkeypatch.setitem(REWARDS, "toybox/judge", broken)
    with pytest.raises(RequestError, match="folder of 'toybox/judge' is missing"):
        run.load_rewards("toybox/preference", "cpu")
