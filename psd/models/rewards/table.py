"""Reward models by name: the table REWARDS, and mixtures of them as text. Loads no torch.

To add one: a class that answers psd.contracts.Reward, and a row here that names it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from psd.errors import RequestError, shown, unknown_name
from psd.models.hub import Source, is_cached, on_disk

MAX_MEMBERS = 4  # of a mixture
MIN_WEIGHT, MAX_WEIGHT = 1e-3, 1e3
EXAMPLE = "hpsv2.1 + 0.5 aesthetic"
CLIP = "psd.models.rewards.clip_scores:CLIPReward"
BLIP = "psd.models.rewards.image_reward:ImageRewardModel"


@dataclass(frozen=True)
class RewardInfo:
    """What to tell about a reward before anything is downloaded, and how it is loaded."""

    source: Source
    licence: str
    download_mb: int  # 0: comes with the app
    model: str  # "module:class" of what answers `load(name, info, device)`, resolved when it is loaded
    about: str
    tokenizer: Source | None = None  # where it is not beside the weights
    encoder: Source | None = None  # of images, where it is not beside the weights
    held_out: bool = False  # a judge: report it, do not optimise against it
    views: int = 1  # of one object, which it judges together
    differentiable: bool = True  # in the images

    @property
    def embedded(self) -> bool:
        return not self.download_mb

    @property
    def towers(self) -> frozenset[Source]:
        """What its scores come from: two rewards with one in common do not judge each other."""
        return frozenset(source for source in (self.source, self.encoder) if source)

    @property
    def sources(self) -> tuple[Source, ...]:
        return tuple(source for source in (self.source, self.tokenizer, self.encoder) if source)

    def on_disk(self) -> RewardInfo:
        """The same with every source a folder; nothing is downloaded. Raises RequestError."""
        parts = {"source": self.source, "tokenizer": self.tokenizer, "encoder": self.encoder}
        return replace(self, **{name: source and on_disk(source) for name, source in parts.items()})


CLIP_H = Source(
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "1c2b8495b28150b8a4922ee1c8edee224c284c0c",
    ("merges.txt", "vocab.json", "special_tokens_map.json", "tokenizer_config.json"),
)  # fmt: skip
CLIP_L = Source(
    "openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41", ("model.safetensors", "config.json"),
)  # fmt: skip
BERT = Source(
    "google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594",
    ("config.json", "vocab.txt", "tokenizer.json", "tokenizer_config.json"),
)  # fmt: skip

# The revisions are the commits that published work pins.
REWARDS: dict[str, RewardInfo] = {
    "toybox/preference": RewardInfo(
        Source("toybox/preference"), "Apache-2.0", 0, CLIP, "PickScore in small: exp(logit_scale) * cosine.",
    ),
    "toybox/judge": RewardInfo(
        Source("toybox/judge"), "Apache-2.0", 0, BLIP,
        "ImageReward in small, on other data: the held-out score.", held_out=True,
    ),
    "toybox/reward3d": RewardInfo(
        Source("toybox/reward3d"), "Apache-2.0", 0, "psd.models.rewards.reward3d:ToyboxReward3D",
        "Reward3D in small: four views of an object judged together.", encoder=Source("toybox/preference"), views=4,
    ),
    "hpsv2.1": RewardInfo(
        Source("xswu/HPSv2", "697403c78157020a1ae59d23f111aa58ced35b0a", ("HPS_v2.1_compressed.pt",)),
        "Apache-2.0", 1980, "psd.models.rewards.clip_scores:HPSv2Reward",
        "HPS v2.1: raw cosine, about 0.2 to 0.35.", tokenizer=CLIP_H,
    ),
    "pickscore": RewardInfo(
        Source(
            "yuvalkirstain/PickScore_v1", "a4e4367c6dfa7288a00c550414478f865b875800",
            ("config.json", "model.safetensors"),
        ),
        "not stated by the authors; see the model card", 3950, CLIP, "PickScore: about 20.", tokenizer=CLIP_H,
    ),
    "imagereward": RewardInfo(
        Source("THUDM/ImageReward", "5736be03b2652728fb87788c9797b0570450ab72", ("ImageReward.pt",)),
        "Apache-2.0", 1790, "psd.models.rewards.image_reward:PublishedImageReward",
        "ImageReward: about -2 to 2.", tokenizer=BERT,
    ),
    "aesthetic": RewardInfo(
        Source(
            "trl-lib/ddpo-aesthetic-predictor", "7f639699bec8126062148a47ecb1a4312d8e6688", ("aesthetic-model.pth",)
        ),
        "Apache-2.0", 1720, "psd.models.rewards.aesthetic:AestheticReward",
        "Aesthetic predictor V2: about 1 to 10, does not read the prompt.",
        encoder=CLIP_L,
    ),
    "mps": RewardInfo(
        # Its only commit with weights is daceecc; the full hash is not known here.
        Source("RE-N-Y/mpsv1", "main", ("model.safetensors",)),
        "MIT", 4420, "psd.models.rewards.mps:MPSReward", "MPS, overall preference: about 10.", tokenizer=CLIP_H,
    ),
    # No commit of this repository is known here; sizes are counted from the code's own parameters.
    "reward3d": RewardInfo(
        Source("yejunliang23/Reward3D", "main", ("Reward3D_Scorer.pt",)),
        "not stated for the weights; the authors' code is MIT", 1790, "psd.models.rewards.reward3d:Reward3DScorer",
        "DreamReward's Reward3D: four views of an object judged together, with view_prompts; on ImageReward's scale.",
        tokenizer=BERT, views=4,
    ),
    "reward3d-cross-view": RewardInfo(
        Source("yejunliang23/Reward3D", "main", ("Reward3D_CrossViewFusion.pt",)),
        "not stated for the weights; the authors' code is MIT", 1800, "psd.models.rewards.reward3d:Reward3DCrossView",
        "Reward3D's other variant: its views read each other; on a fifth of ImageReward's scale.",
        tokenizer=BERT, views=4,
    ),
}  # fmt: skip


def reward_terms(text: str) -> dict[str, float]:
    """Member -> weight of "hpsv2.1 + 0.5 aesthetic": names joined by +, a weight of 1 left out; a name is one member.

    Raises RequestError.
    """
    terms: dict[str, float] = {}
    parts = text.split("+")
    if len(parts) > MAX_MEMBERS:
        raise RequestError(
            f"reward mixes {len(parts)} models, at most {MAX_MEMBERS} are allowed: leave some out.", "reward"
        )
    for part in parts:
        *number, name = part.split() or [""]
        if name not in REWARDS:
            raise RequestError(unknown_name("reward", name, REWARDS, f", or a mixture such as {EXAMPLE!r}"), "reward")
        if name in terms:
            raise RequestError(f"reward names {name} twice: give it once, with one weight.", "reward")
        try:
            weight = float(" ".join(number) or 1)
        except ValueError:
            weight = 0.0
        if not MIN_WEIGHT <= weight <= MAX_WEIGHT:  # nan is not, either
            raise RequestError(
                f"reward weight of {name} must be a number from {MIN_WEIGHT:g} to {MAX_WEIGHT:g}, "
                f"as in {EXAMPLE!r}, got {shown(' '.join(number))}.",
                "reward",
            )
        terms[name] = weight
    return terms


def is_mixture(text: str) -> bool:
    """Whether a reward is more than a name. Raises RequestError."""
    return text.strip() not in reward_terms(text)


def joint_views(text: str) -> int:
    """How many views of one object a reward judges together; 1: single pictures. Raises RequestError."""
    return max(REWARDS[name].views for name in reward_terms(text))


def is_differentiable(text: str) -> bool:
    """Whether a reward has a gradient in the images. Raises RequestError."""
    return all(REWARDS[name].differentiable for name in reward_terms(text))


def held_out_rewards(target: str, views: int = 1) -> list[str]:
    """Rewards that report beside the target without being optimised: those at home in the same world, without a tower
    of the target's, that judge single pictures or as many `views` as the prior draws.

    For the toybox's these are other embedded ones; for published targets what the hub's cache holds whole. Nothing is
    downloaded to judge. Raises RequestError.
    """
    members = reward_terms(target)
    worlds = {REWARDS[name].embedded for name in members}
    towers = frozenset().union(*(REWARDS[name].towers for name in members))
    others = {name: info for name, info in REWARDS.items() if name not in members and info.embedded in worlds}
    return [
        name
        for name, info in others.items()
        if info.views in (1, views) and not info.towers & towers and is_cached(*info.sources)
    ]
