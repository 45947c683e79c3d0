"""Reward models: the table REWARDS, `load_reward`, and the toybox's attribute classifier.

A reward is called as reward(images [B 3 H W] in [0, 1], prompts of length B) -> scores [B]: higher is better, raw
scale, differentiable in the images, float32. Reading the table imports no torch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from psd.safety import RequestError
from psd.weights import Source, load_once, readable_errors

if TYPE_CHECKING:
    from psd.contracts import Reward
    from psd.rewards.aesthetic import AestheticReward
    from psd.rewards.attributes import AttributeClassifier
    from psd.rewards.clip_scores import CLIPReward
    from psd.rewards.image_reward import ImageRewardModel
    from psd.rewards.mps import MPSReward

KEEP_LOADED = 4  # models; what was used last stays


def load_clip(name: str, info: RewardInfo, device: str) -> CLIPReward:
    from psd.rewards.clip_scores import CLIPReward

    return CLIPReward.load(name, info, device)


def load_hpsv2(name: str, info: RewardInfo, device: str) -> CLIPReward:
    from psd.rewards.clip_scores import HPSv2Reward

    return HPSv2Reward.load(name, info, device)


def load_judge(name: str, info: RewardInfo, device: str) -> ImageRewardModel:
    from psd.rewards.image_reward import ImageRewardModel

    return ImageRewardModel.load(name, info, device)


def load_image_reward(name: str, info: RewardInfo, device: str) -> ImageRewardModel:
    from psd.rewards.image_reward import ImageRewardModel

    return ImageRewardModel.load_published(name, info, device)


def load_aesthetic(name: str, info: RewardInfo, device: str) -> AestheticReward:
    from psd.rewards.aesthetic import AestheticReward

    return AestheticReward.load(name, info, device)


def load_mps(name: str, info: RewardInfo, device: str) -> MPSReward:
    from psd.rewards.mps import MPSReward

    return MPSReward.load(name, info, device)


@dataclass(frozen=True)
class RewardInfo:
    """What to tell about a reward before anything is downloaded, and how it is loaded."""

    source: Source
    licence: str
    download_mb: int  # 0: comes with the app
    load: Callable[[str, RewardInfo, str], Reward]
    about: str
    tokenizer: Source | None = None  # where it is not beside the weights
    encoder: Source | None = None  # of images, where it is not beside the weights
    held_out: bool = False  # a judge: report it, do not optimise against it


CLIP_H = Source("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "1c2b8495b28150b8a4922ee1c8edee224c284c0c")
CLIP_L = Source("openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41")
BERT = Source("google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594")

# The revisions are the commits that published work pins.
REWARDS: dict[str, RewardInfo] = {
    "toybox/preference": RewardInfo(
        Source("toybox/preference"), "Apache-2.0", 0, load_clip, "PickScore in small: exp(logit_scale) * cosine.",
    ),
    "toybox/judge": RewardInfo(
        Source("toybox/judge"), "Apache-2.0", 0, load_judge,
        "ImageReward in small, on other data: the held-out score.", held_out=True,
    ),
    "hpsv2.1": RewardInfo(
        Source("xswu/HPSv2", "697403c78157020a1ae59d23f111aa58ced35b0a"), "Apache-2.0", 1980, load_hpsv2,
        "HPS v2.1: raw cosine, about 0.2 to 0.35.", tokenizer=CLIP_H,
    ),
    "pickscore": RewardInfo(
        Source("yuvalkirstain/PickScore_v1", "a4e4367c6dfa7288a00c550414478f865b875800"),
        "not stated by the authors; see the model card", 3950, load_clip, "PickScore: about 20.", tokenizer=CLIP_H,
    ),
    "imagereward": RewardInfo(
        Source("THUDM/ImageReward", "5736be03b2652728fb87788c9797b0570450ab72"), "Apache-2.0", 1790,
        load_image_reward, "ImageReward: about -2 to 2.", tokenizer=BERT,
    ),
    "aesthetic": RewardInfo(
        Source("trl-lib/ddpo-aesthetic-predictor", "7f639699bec8126062148a47ecb1a4312d8e6688"), "Apache-2.0", 1720,
        load_aesthetic, "Aesthetic predictor V2: about 1 to 10, does not read the prompt.", encoder=CLIP_L,
    ),
    "mps": RewardInfo(
        Source("RE-N-Y/mpsv1", "main"),  # its only commit with weights is daceecc; the full hash is not known here
        "MIT", 4420, load_mps, "MPS, overall preference: about 10.", tokenizer=CLIP_H,
    ),
}  # fmt: skip

ATTRIBUTES = Source("toybox/attributes")  # the classifier that counts a caption's facts

_loaded: OrderedDict = OrderedDict()


def load_reward(name: str, device: str = "cpu") -> Reward:
    """The reward of this name on `device`, loaded once per process. Raises RequestError."""
    if name not in REWARDS:
        raise RequestError(f"There is no reward '{name}': choose one of {', '.join(REWARDS)}.")
    info = REWARDS[name]

    def load() -> Reward:
        with readable_errors(name, info.source):
            return info.load(name, info, device)

    return load_once(_loaded, (info.source, str(device)), load, KEEP_LOADED)


def load_attributes(device: str = "cpu", source: Source = ATTRIBUTES) -> AttributeClassifier:
    """The toybox's attribute classifier on `device`, loaded once per process. Raises RequestError."""

    def load() -> AttributeClassifier:
        from psd.rewards.attributes import AttributeClassifier

        with readable_errors("toybox/attributes", source):
            return AttributeClassifier.load(source, device)

    return load_once(_loaded, (source, str(device)), load, KEEP_LOADED)
