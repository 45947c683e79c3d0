"""Aesthetic predictor V2: a linear head on CLIP's image embedding. It knows nothing of the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from psd.contracts import Reward
from psd.models.parts import InParts
from psd.models.rewards.image_reward import linear_head
from psd.models.rewards.preprocess import load_mean_std, normalise, shorter_side
from psd.models.weights import pretrained

if TYPE_CHECKING:
    from psd.models.rewards.table import RewardInfo

AESTHETIC_FILE = "aesthetic-model.pth"  # sac+logos+ava1-l14-linearMSE.pth, renamed


class AestheticReward(Reward):
    """r(image) = head(e / |e|), e the image embedding of CLIP ViT-L/14; about 1 to 10. Weights frozen, float32."""

    def __init__(self, name: str, licence: str, vision, head: nn.Sequential, mean: Tensor, std: Tensor):
        if head[0].in_features != vision.config.projection_dim or head[-1].out_features != 1:
            raise ValueError(f"the head does not make one number of {vision.config.projection_dim}")
        self.name, self.licence = name, licence
        self.vision, self.head, self.mean, self.std = vision, head, mean, std
        self.device: torch.device = vision.device
        self.image_size: int = vision.config.image_size  # px
        self.in_parts = InParts()

    @classmethod
    def load(cls, name: str, info: RewardInfo, device: str) -> AestheticReward:
        """The head from the authors' checkpoint, read without unpickling code; the encoder from OpenAI's folder."""
        from transformers import CLIPVisionModelWithProjection

        head = linear_head(torch.load(info.source.file(AESTHETIC_FILE), map_location="cpu", weights_only=True))
        vision = pretrained(CLIPVisionModelWithProjection, info.encoder).to(device, torch.float32)
        return cls(name, info.licence, vision, head.to(device), *load_mean_std(info.encoder, device))

    def __call__(self, images: Float[Tensor, "B 3 H W"], prompts: list[str]) -> Float[Tensor, " B"]:
        """Scores of images in [0, 1]; the prompts are not read."""

        def score(part: slice) -> Float[Tensor, " b"]:
            # Rounding half to even, as torchvision's centre crop in OpenAI's preprocessing does.
            pixels = normalise(shorter_side(images[part], self.image_size, offset=round), self.mean, self.std)
            return self.score(self.vision(pixels).image_embeds)

        return self.in_parts(score, len(images))

    def score(self, embeddings: Float[Tensor, "B D"]) -> Float[Tensor, " B"]:
        return self.head(F.normalize(embeddings, dim=-1)).squeeze(-1)
