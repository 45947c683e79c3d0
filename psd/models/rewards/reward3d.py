"""Rewards that judge four views of one object together: DreamReward's Reward3D (Ye et al. 2024), and one in small.

Rows are ordered (object, view); an object has one score. Which camera a view is from only its prompt can say.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from psd.models.rewards.clip_scores import CLIPReward
from psd.models.rewards.image_reward import IMAGE_REWARD, PublishedImageReward, linear_head

if TYPE_CHECKING:
    from psd.models.rewards.table import RewardInfo

VIEWS = 4
MAX_TOKENS = 100
HEADS = 12  # of the published attention over views
MLP = tuple(f"mlp.layers.{index}" for index in (0, 2, 4, 6, 7))
SCORER = ("Scorer.fc1", "Scorer.fc2", "Scorer.fc3")
ADAPTER = "cross_view_adapter."
DROPOUT = 0.3  # while toybox/reward3d trains
HEAD_FILE = "head.safetensors"  # of toybox/reward3d


class CrossViews(nn.Module):
    """x_v -> mean over v of g_v * a_v + (1 - g_v) * x_v; a = attention over the views, g = sigmoid(W [x; a]).

    The order of the views does not matter. Parameters have the published names.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.fusion_gate = nn.Sequential(nn.Linear(2 * width, width), nn.Sigmoid())

    def forward(self, x: Float[Tensor, "S V D"]) -> Float[Tensor, "S D"]:
        attended, _ = self.self_attn(x, x, x, need_weights=False)
        gate = self.fusion_gate(torch.cat([x, attended], -1))
        return (gate * attended + (1 - gate) * x).mean(1)


class Reward3DScorer(PublishedImageReward):
    """Reward3D as the paper has it: 128 numbers a view from the first half of ImageReward's head, then one head on all.

    The order of the views matters.
    """

    views = VIEWS
    file = "Reward3D_Scorer.pt"
    scale = IMAGE_REWARD | dict(max_length=MAX_TOKENS)

    @staticmethod
    def make_head(weights: dict[str, Tensor]) -> nn.Module:
        check_linears(weights, MLP + SCORER)
        scorer = {name.replace("Scorer.fc", "scorer."): weight for name, weight in starting(weights, "Scorer.").items()}
        return nn.Sequential(
            linear_head(starting(weights, "mlp."))[:2], nn.Unflatten(0, (-1, VIEWS)), nn.Flatten(), linear_head(scorer)
        )


class Reward3DCrossView(PublishedImageReward):
    """Reward3D's other variant: the views read each other before ImageReward's head."""

    views = VIEWS
    file = "Reward3D_CrossViewFusion.pt"
    scale = IMAGE_REWARD | dict(std=5.0, max_length=MAX_TOKENS)

    @staticmethod
    def make_head(weights: dict[str, Tensor]) -> nn.Module:
        adapter = {name.removeprefix(ADAPTER): weight for name, weight in starting(weights, ADAPTER).items()}
        check_linears({name: weight for name, weight in weights.items() if not name.startswith(ADAPTER)}, MLP)
        mlp = linear_head(starting(weights, "mlp."))
        views = CrossViews(mlp[0].in_features, HEADS)
        views.load_state_dict(adapter)
        return nn.Sequential(nn.Unflatten(0, (-1, VIEWS)), views, mlp).requires_grad_(False).eval()


def check_linears(weights: dict[str, Tensor], layers: tuple[str, ...]) -> None:
    """Raise ValueError unless the head's parameters are those of just these linear layers."""
    wanted = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    if odd := sorted(wanted ^ weights.keys()):
        raise ValueError(f"head: {len(odd)} parameters missing or of another model, the first: {odd[0]}")


def starting(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: weight for name, weight in weights.items() if name.startswith(prefix)}


class Agreement(nn.Module):
    """What four views together add to the mean of their own scores: mlp(CrossViews(read(image, prompt, likeness)))."""

    def __init__(self, seen: int, told: int, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        dropout = nn.Dropout(DROPOUT)
        self.read = nn.Sequential(dropout, nn.Linear(seen + 2 * told, width), nn.GELU(), dropout)
        self.together = CrossViews(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, 1))

    def forward(
        self, seen: Float[Tensor, "S V P"], told: Float[Tensor, "S V D"], alike: Float[Tensor, "S V D"]
    ) -> Float[Tensor, " S"]:
        return self.mlp(self.together(self.read(torch.cat([seen, told, alike], -1)))).squeeze(-1)


class ToyboxReward3D(CLIPReward):
    """r(y, views) = mean over views of exp(logit_scale) * cos, + Agreement of them; the towers are another reward's."""

    views = VIEWS

    def __init__(self, name: str, licence: str, model, tokenizer, mean: Tensor, std: Tensor, head: Agreement):
        super().__init__(name, licence, model, tokenizer, mean, std)
        self.head = head

    @classmethod
    def load(cls, name: str, info: RewardInfo, device: str) -> ToyboxReward3D:
        """The head from its folder, the towers from that of the row's `encoder`."""
        from safetensors.torch import load_file

        base = CLIPReward.load(name, replace(info, source=info.encoder), device)
        head = make_agreement(base).to(device)
        head.load_state_dict(load_file(info.source.file(HEAD_FILE)))
        return cls(
            name, info.licence, base.model, base.tokenizer, base.mean, base.std, head.requires_grad_(False).eval()
        )

    def __call__(self, images: Float[Tensor, "B 3 H W"], prompts: list[str]) -> Float[Tensor, " S"]:
        """Scores of images in [0, 1], image i under prompt i. A prompt's text is encoded once."""
        if len(prompts) != len(images):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        text = torch.stack([self.text_features(prompt) for prompt in prompts])
        return self.judge(self.seen(images), text)

    def seen(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B P"]:
        """What the vision tower makes of each view."""
        return self.model.vision_model(self.pixels(images)).pooler_output

    def judge(self, seen: Float[Tensor, "B P"], text: Float[Tensor, "B D"]) -> Float[Tensor, " S"]:
        """Scores of views that have been seen, under unit text features."""
        alike = self.scale * F.normalize(self.model.visual_projection(seen), dim=-1) * text
        seen, text, alike = (each.unflatten(0, (-1, VIEWS)) for each in (seen, text, alike))
        return alike.sum(-1).mean(1) + self.head(seen, text, alike)


def make_agreement(base: CLIPReward) -> Agreement:
    config = base.model.config
    return Agreement(config.vision_config.hidden_size, config.projection_dim)
