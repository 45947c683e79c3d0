"""Rewards that are a CLIP model's similarity: toybox/preference, PickScore, HPSv2.1.

Not here: winner selection and reward scaling (methods.py), anything about the diffusion prior.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from psd.contracts import Reward
from psd.models.parts import InParts, visiting
from psd.models.rewards.preprocess import load_mean_std, longest_side, normalise, shorter_side
from psd.models.weights import check_vocabulary, from_state_dict, pretrained, tokenize

if TYPE_CHECKING:
    from psd.models.rewards.table import RewardInfo

TEXT_CACHE = 256  # prompts

HPSV2_FILE = "HPS_v2.1_compressed.pt"
# open_clip's ViT-H-14 as a CLIPConfig. Its GELU is the exact one, not CLIP's default quick_gelu.
VIT_H_14 = dict(
    projection_dim=1024,
    text_config=dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, hidden_act="gelu",
        vocab_size=49408, max_position_embeddings=77, projection_dim=1024,
        bos_token_id=49406, eos_token_id=49407, pad_token_id=49407,
    ),
    vision_config=dict(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, hidden_act="gelu",
        image_size=224, patch_size=14, projection_dim=1024,
    ),
)  # fmt: skip


class CLIPReward(Reward):
    """r(y, image) = exp(logit_scale) * cos(text(y), image), as PickScore scores. Weights frozen, float32."""

    def __init__(self, name: str, licence: str, model, tokenizer, mean: Tensor, std: Tensor):
        check_vocabulary(tokenizer, model.config.text_config.vocab_size)
        self.name, self.licence = name, licence
        self.model, self.tokenizer = model, tokenizer
        self.mean, self.std = mean, std
        self.device: torch.device = model.device
        self.image_size: int = model.config.vision_config.image_size  # px
        self.max_tokens: int = min(tokenizer.model_max_length, model.config.text_config.max_position_embeddings)
        self.scale: Tensor = model.logit_scale.exp()
        self.text_features = lru_cache(TEXT_CACHE)(self.encode_prompt)
        self.text_parts = (model.text_model, model.text_projection)
        self.in_parts = InParts()

    @classmethod
    def load(cls, name: str, info: RewardInfo, device: str) -> CLIPReward:
        from transformers import CLIPModel, CLIPTokenizer

        model = pretrained(CLIPModel, info.source).to(device, torch.float32)
        vocabulary = info.tokenizer or info.source
        tokenizer = CLIPTokenizer.from_pretrained(vocabulary.path, **vocabulary.where)
        return cls(name, info.licence, model, tokenizer, *load_mean_std(info.source, device))

    def __call__(self, images: Float[Tensor, "B 3 H W"], prompts: list[str]) -> Float[Tensor, " B"]:
        """Scores of images in [0, 1], image i under prompt i. A prompt's text is encoded once."""
        if len(prompts) != len(images):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        text = torch.stack([self.text_features(prompt) for prompt in prompts])
        seen = self.in_parts(lambda part: self.image_features(self.pixels(images[part])), len(images))
        return self.scale * (seen * text).sum(-1)

    def pixels(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 s s"]:
        return normalise(shorter_side(images, self.image_size), self.mean, self.std)

    def image_features(self, pixels: Float[Tensor, "B 3 s s"]) -> Float[Tensor, "B D"]:
        return F.normalize(self.model.get_image_features(pixels).pooler_output, dim=-1)

    def encode_prompt(self, prompt: str) -> Float[Tensor, " D"]:
        tokens = tokenize(self.tokenizer, [prompt], self.max_tokens)
        # Kept for later calls: must serve in autograd even if this call comes from inference mode.
        with torch.inference_mode(False), torch.no_grad(), visiting(self.device, *self.text_parts):
            return self.encode_tokens(tokens.input_ids.to(self.device))[0]

    def encode_tokens(self, input_ids: Int[Tensor, "P L"]) -> Float[Tensor, "P D"]:
        """Unit text features. No padding mask: attention is causal and the first end token is read."""
        return F.normalize(self.model.get_text_features(input_ids).pooler_output, dim=-1)


class HPSv2Reward(CLIPReward):
    """HPS v2.1: the raw cosine without logit scale, images letterboxed. The paper's tables are on this scale."""

    def __init__(self, *parts):
        super().__init__(*parts)
        self.scale = torch.ones((), device=self.device)

    @classmethod
    def load(cls, name: str, info: RewardInfo, device: str) -> CLIPReward:
        from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

        checkpoint = torch.load(info.source.file(HPSV2_FILE), map_location="cpu", weights_only=True)
        weights = open_clip_to_transformers(checkpoint["state_dict"])
        model = from_state_dict(CLIPModel, CLIPConfig(**VIT_H_14), weights).to(device)
        tokenizer = CLIPTokenizer.from_pretrained(info.tokenizer.path, **info.tokenizer.where)
        return cls(name, info.licence, model, tokenizer, *load_mean_std(info.source, device))

    def pixels(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 s s"]:
        return normalise(longest_side(images, self.image_size), self.mean, self.std)


OPEN_CLIP_NAMES = (
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),  # transformers' spelling
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
)


def open_clip_to_transformers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's CLIP state dict under CLIPModel's names, in float32.

    The two projections are stored transposed, and q, k, v of a layer as one matrix. A name without a counterpart
    keeps its own, so that loading reports it.
    """
    renamed = {}
    for name, weight in weights.items():
        for pattern, replacement in OPEN_CLIP_NAMES:
            name = re.sub(pattern, replacement, name)
        weight = weight.float()
        if name in ("visual_projection.weight", "text_projection.weight"):
            renamed[name] = weight.T.contiguous()
        elif ".in_proj_" in name:
            for part, rows in zip("qkv", weight.chunk(3), strict=True):
                renamed[name.replace("in_proj_", f"{part}_proj.")] = rows.contiguous()
        else:
            renamed[name] = weight
    return renamed
