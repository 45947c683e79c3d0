"""Reward models: the table REWARDS, `load_reward`, and the toybox's attribute classifier.

A reward is called as reward(images [B 3 H W] in [0, 1], prompts of length B) -> scores [B]: higher is better, raw
scale, differentiable in the images, float32. Reading the table imports no torch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from psd.hub import Source, fetched
from psd.safety import RequestError
from psd.weights import load_once, readable_errors

if TYPE_CHECKING:
    from psd.rewards.attributes import AttributeClassifier
    from psd.rewards.clip_scores import CLIPReward
    from psd.rewards.image_reward import ImageRewardModel

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


@dataclass(frozen=True)
class RewardInfo:
    """What to tell about a reward before anything is downloaded, and how it is loaded."""

    source: Source
    licence: str
    download_mb: int  # 0: comes with the app
    load: Callable[[str, RewardInfo, str], CLIPReward | ImageRewardModel]
    about: str
    tokenizer: Source | None = None  # where it is not beside the weights
    held_out: bool = False  # a judge: report it, do not optimise against it

    @property
    def sources(self) -> tuple[Source, ...]:
        return (self.source, self.tokenizer) if self.tokenizer else (self.source,)

    def fetched(self) -> RewardInfo:
        """The same with every source a folder, downloaded first where need be. Raises RequestError."""
        return replace(self, source=fetched(self.source), tokenizer=self.tokenizer and fetched(self.tokenizer))


CLIP_H = Source(
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "1c2b8495b28150b8a4922ee1c8edee224c284c0c",
    ("merges.txt", "vocab.json", "special_tokens_map.json", "tokenizer_config.json"),
)  # fmt: skip
BERT = Source(
    "google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594",
    ("config.json", "vocab.txt", "tokenizer.json", "tokenizer_config.json"),
)  # fmt: skip

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
        Source("xswu/HPSv2", "697403c78157020a1ae59d23f111aa58ced35b0a", ("HPS_v2.1_compressed.pt",)),
        "Apache-2.0", 1980, load_hpsv2, "HPS v2.1: raw cosine, about 0.2 to 0.35.", tokenizer=CLIP_H,
    ),
    "pickscore": RewardInfo(
        Source(
            "yuvalkirstain/PickScore_v1", "a4e4367c6dfa7288a00c550414478f865b875800",
            ("config.json", "model.safetensors"),
        ),
        "not stated by the authors; see the model card", 3950, load_clip, "PickScore: about 20.", tokenizer=CLIP_H,
    ),
    "imagereward": RewardInfo(
        Source("THUDM/ImageReward", "5736be03b2652728fb87788c9797b0570450ab72", ("ImageReward.pt",)),
        "Apache-2.0", 1790, load_image_reward, "ImageReward: about -2 to 2.", tokenizer=BERT,
    ),
}  # fmt: skip

ATTRIBUTES = Source("toybox/attributes")  # the classifier that counts a caption's facts

_loaded: OrderedDict = OrderedDict()


def load_reward(name: str, device: str = "cpu") -> CLIPReward | ImageRewardModel:
    """The reward of this name on `device`, loaded once per process. Raises RequestError."""
    if name not in REWARDS:
        raise RequestError(f"There is no reward '{name}': choose one of {', '.join(REWARDS)}.")
    info = REWARDS[name]

    def load() -> CLIPReward | ImageRewardModel:
        with readable_errors(name, *info.sources):
            return info.load(name, info.fetched(), device)

    return load_once(_loaded, (info.source, str(device)), load, KEEP_LOADED)


def held_out_rewards(target: str) -> list[str]:
    """Rewards that report beside the target: those at home in the same world that nothing was optimised against."""
    toybox = target.startswith("toybox/")
    return [name for name, info in REWARDS.items() if info.held_out and name != target and toybox]


def load_attributes(device: str = "cpu", source: Source = ATTRIBUTES) -> AttributeClassifier:
    """The toybox's attribute classifier on `device`, loaded once per process. Raises RequestError."""

    def load() -> AttributeClassifier:
        from psd.rewards.attributes import AttributeClassifier

        with readable_errors("toybox/attributes", source):
            return AttributeClassifier.load(source, device)

    return load_once(_loaded, (source, str(device)), load, KEEP_LOADED)
