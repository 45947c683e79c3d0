"""DreamReward's Reward3D (Ye et al. 2024): four views of one object judged together, by either of its two variants.

Rows are ordered (object, view); an object has one score. Which camera a view is from only its prompt can say.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from psd.models.rewards.image_reward import IMAGE_REWARD, PublishedImageReward, linear_head

VIEWS = 4
MAX_TOKENS = 100
HEADS = 12  # of the published attention over views
MLP = tuple(f"mlp.layers.{index}" for index in (0, 2, 4, 6, 7))
SCORER = ("Scorer.fc1", "Scorer.fc2", "Scorer.fc3")
ADAPTER = "cross_view_adapter."


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
