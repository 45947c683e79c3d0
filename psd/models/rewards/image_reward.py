"""ImageReward and rewards of its architecture (toybox/judge): BLIP's text tower reads prompt and image together.

Built from transformers' BlipVisionModel and BlipTextModel; the published checkpoint is renamed onto them.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from psd.contracts import Reward
from psd.models.hub import Source
from psd.models.parts import InParts
from psd.models.rewards.preprocess import load_mean_std, normalise, shorter_side
from psd.models.weights import check_vocabulary, from_state_dict, pretrained, tokenize

if TYPE_CHECKING:
    from psd.models.rewards.table import RewardInfo

IMAGE_REWARD_FILE = "ImageReward.pt"
IMAGE_REWARD = dict(mean=0.16717362830052426, std=1.0333394966054072, max_length=35)
VIT_L_16 = dict(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
    image_size=224, patch_size=16, layer_norm_eps=1e-6,
)  # fmt: skip
# is_decoder makes transformers build the cross-attention; attention itself stays bidirectional (forward's default).
BERT_BASE = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, encoder_hidden_size=1024,
    vocab_size=30524, max_position_embeddings=512, layer_norm_eps=1e-12, is_decoder=True,
)  # fmt: skip


class ImageRewardModel(Reward):
    """r(y, image) = (head(first token of text(y, vision(image))) - mean) / std. Weights frozen, float32."""

    def __init__(
        self, name: str, licence: str, vision, text, head: nn.Module, tokenizer,
        mean: float, std: float, max_length: int, pixel_mean: Tensor, pixel_std: Tensor,
    ):  # fmt: skip
        check_vocabulary(tokenizer, text.config.vocab_size)
        self.name, self.licence = name, licence
        self.vision, self.text, self.head, self.tokenizer = vision, text, head, tokenizer
        self.mean, self.std, self.max_tokens = mean, std, max_length
        self.pixel_mean, self.pixel_std = pixel_mean, pixel_std
        self.device: torch.device = vision.device
        self.image_size: int = vision.config.image_size  # px
        self.in_parts = InParts()

    @classmethod
    def load(cls, name: str, info: RewardInfo, device: str) -> ImageRewardModel:
        """From a folder: vision/, text/, tokenizer/, head.safetensors, reward_config.json (mean, std, max_length)."""
        from safetensors.torch import load_file
        from transformers import AutoTokenizer, BlipTextModel, BlipVisionModel

        source = info.source
        vision = pretrained(BlipVisionModel, Source(f"{source.path}/vision"))
        text = pretrained(BlipTextModel, Source(f"{source.path}/text"), add_pooling_layer=False, is_decoder=True)
        tokenizer = AutoTokenizer.from_pretrained(f"{source.path}/tokenizer", **source.where)
        head = linear_head(load_file(source.file("head.safetensors")))
        settings = json.loads(source.file("reward_config.json").read_text(encoding="utf-8"))
        parts = [part.to(device, torch.float32) for part in (vision, text, head)]
        statistics = (settings["mean"], settings["std"], settings["max_length"])
        return cls(name, info.licence, *parts, tokenizer, *statistics, *load_mean_std(source, device))

    def __call__(self, images: Float[Tensor, "B 3 H W"], prompts: list[str]) -> Float[Tensor, " S"]:
        """Scores of images in [0, 1], image i under prompt i; prompts are cut to max_length tokens."""
        if len(prompts) != len(images):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        tokens = tokenize(self.tokenizer, prompts, self.max_tokens).to(self.device)

        def score(part: slice) -> Float[Tensor, " b"]:
            # Rounding half to even, as torchvision's centre crop does.
            shown = shorter_side(images[part], self.image_size, offset=round)
            pixels = normalise(shown, self.pixel_mean, self.pixel_std)
            return self.score(pixels, tokens.input_ids[part], tokens.attention_mask[part])

        return self.in_parts(score, len(images))

    def score(
        self, pixels: Float[Tensor, "B 3 s s"], input_ids: Int[Tensor, "B L"], attention_mask: Int[Tensor, "B L"]
    ) -> Float[Tensor, " S"]:
        image_embeds = self.vision(pixels).last_hidden_state
        fused = self.text(input_ids, attention_mask=attention_mask, encoder_hidden_states=image_embeds)
        return (self.head(fused.last_hidden_state[:, 0]).squeeze(-1) - self.mean) / self.std


class PublishedImageReward(ImageRewardModel):
    """ImageReward itself; a reward whose checkpoint has another head on the same towers overrides what stands first."""

    file = IMAGE_REWARD_FILE
    scale = IMAGE_REWARD

    @staticmethod
    def make_head(weights: dict[str, Tensor]) -> nn.Module:
        return linear_head(weights)

    @classmethod
    def load(cls, name: str, info: RewardInfo, device: str) -> ImageRewardModel:
        """From the authors' checkpoint, read without unpickling code."""
        from transformers import AutoTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        checkpoint = torch.load(info.source.file(cls.file), map_location="cpu", weights_only=True)
        weights = image_reward_to_transformers(checkpoint)
        vision = from_state_dict(BlipVisionModel, BlipVisionConfig(**VIT_L_16), weights["vision"])
        text = from_state_dict(BlipTextModel, BlipTextConfig(**BERT_BASE), weights["text"], add_pooling_layer=False)
        tokenizer = AutoTokenizer.from_pretrained(info.tokenizer.path, **info.tokenizer.where)
        tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)  # BLIP's two; a prompt never holds them
        parts = [part.to(device) for part in (vision, text, cls.make_head(weights["head"]))]
        statistics = (cls.scale["mean"], cls.scale["std"], cls.scale["max_length"])
        return cls(name, info.licence, *parts, tokenizer, *statistics, *load_mean_std(info.source, device))


def linear_head(weights: dict[str, Tensor]) -> nn.Sequential:
    """The MLP of a state dict `...<index>.{weight,bias}`: linear layers in the order of their index.

    Nothing between them: ImageReward's has dropout there, which is silent at test time, and no activation.
    """
    layers: dict[int, dict[str, Tensor]] = {}
    for name, weight in weights.items():
        index, kind = re.fullmatch(r"(?:.*\.)?(\d+)\.(weight|bias)", name).groups()
        layers.setdefault(int(index), {})[kind] = weight.float()
    linears = []
    for _, layer in sorted(layers.items()):
        linear = nn.Linear(*reversed(layer["weight"].shape))
        linear.load_state_dict(layer)
        linears.append(linear)
    return nn.Sequential(*linears).requires_grad_(False).eval()


VISION_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"^norm\.", "post_layernorm."),
)


def image_reward_to_transformers(weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """ImageReward's state dict as those of BlipVisionModel, BlipTextModel and its head, in float32.

    Left out: the projections of BLIP's contrastive loss, which the score does not use, and the position_ids buffer.
    """
    parts: dict[str, dict[str, Tensor]] = {"vision": {}, "text": {}, "head": {}}
    for name, weight in weights.items():
        if name.startswith("blip.visual_encoder."):
            name = name.removeprefix("blip.visual_encoder.")
            for pattern, replacement in VISION_NAMES:
                name = re.sub(pattern, replacement, name)
            parts["vision"][name] = weight.float()
        elif name.startswith("blip.text_encoder.") and not name.endswith(".position_ids"):
            parts["text"][name.removeprefix("blip.text_encoder.")] = weight.float()
        elif not name.startswith("blip."):
            parts["head"][name] = weight.float()
    return parts
