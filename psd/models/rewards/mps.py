"""MPS (overall preference): CLIP-H whose image tokens read, by cross-attention, the prompt's tokens that matter.

Names and shapes are those of the published module, rehosted as safetensors; `Kwai-Kolors/MPS` tells what it computes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from psd.models.parts import visiting
from psd.models.rewards.clip_scores import VIT_H_14, CLIPReward
from psd.models.rewards.preprocess import load_mean_std
from psd.models.weights import from_state_dict, tokenize

if TYPE_CHECKING:
    from psd.models.rewards.table import RewardInfo

MPS_FILE = "model.safetensors"
CROSS = dict(dim=1024, layers=4, heads=16, dim_head=64)
# What the score is about. Prompt tokens are kept by their likeness to these words.
CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)
RELEVANT = 0.3  # of the most relevant token: the published evaluation's; the module's own forward has 0.01
FF_MULT = 4


class MPSReward(CLIPReward):
    """r(y, image) = exp(logit_scale) * cos(text(y), cross(image tokens, relevant tokens of y)[0]); about 10."""

    def __init__(self, name: str, licence: str, model, cross: CrossModel, tokenizer, mean: Tensor, std: Tensor):
        super().__init__(name, licence, model, tokenizer, mean, std)
        self.cross = cross

    @classmethod
    def load(cls, name: str, info: RewardInfo, device: str) -> MPSReward:
        from safetensors.torch import load_file
        from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

        clip, cross = split_weights(load_file(info.source.file(MPS_FILE)))
        model = from_state_dict(CLIPModel, CLIPConfig(**VIT_H_14), clip).to(device)
        head = CrossModel(**CROSS)
        head.load_state_dict(cross)
        head.requires_grad_(False).eval().to(device)
        tokenizer = CLIPTokenizer.from_pretrained(info.tokenizer.path, **info.tokenizer.where)
        return cls(name, info.licence, model, head, tokenizer, *load_mean_std(info.source, device))

    def __call__(self, images: Float[Tensor, "B 3 H W"], prompts: list[str]) -> Float[Tensor, " B"]:
        """Scores of images in [0, 1], image i under prompt i. A prompt's text is encoded once."""
        if len(prompts) != len(images):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        text = [torch.stack(part) for part in zip(*map(self.text_features, prompts), strict=True)]
        score = lambda rows: self.score(self.pixels(images[rows]), *(part[rows] for part in text))  # noqa: E731
        return self.in_parts(score, len(images))

    def score(
        self,
        pixels: Float[Tensor, "B 3 s s"],
        text: Float[Tensor, "B D"],
        tokens: Float[Tensor, "B L D"],
        relevant: Bool[Tensor, "B L"],
    ) -> Float[Tensor, " B"]:
        # Every token is projected, and only the pooled one would be normalised by the tower.
        image_tokens = self.model.visual_projection(self.model.vision_model(pixels).last_hidden_state)
        fused = F.normalize(self.cross(image_tokens, tokens, relevant)[:, 0], dim=-1)
        return self.scale * (text * fused).sum(-1)

    def encode_prompt(self, prompt: str) -> tuple[Float[Tensor, " D"], Float[Tensor, "L D"], Bool[Tensor, " L"]]:
        """What `score` takes of one prompt."""
        ids = tokenize(self.tokenizer, [prompt, CONDITION], self.max_tokens).input_ids.to(self.device)
        # Kept for later calls: must serve in autograd even if this call comes from inference mode.
        with torch.inference_mode(False), torch.no_grad(), visiting(self.device, *self.text_parts):
            text, tokens, relevant = self.encode_ids(ids[:1], ids[1:])
        return text[0], tokens[0], relevant[0]

    def encode_ids(
        self, prompts: Int[Tensor, "P L"], condition: Int[Tensor, "1 L"]
    ) -> tuple[Float[Tensor, "P D"], Float[Tensor, "P L D"], Bool[Tensor, "P L"]]:
        """Unit text features, token features, and which of these the condition's words find relevant.

        Relevance is the largest dot product with a token of the condition, as a share of the prompt's own largest:
        a prompt's score does not depend on what else is in the batch. Padding takes part on both sides.
        """
        project = self.model.text_projection
        seen = self.model.text_model(prompts)
        tokens = project(seen.last_hidden_state)
        words = project(self.model.text_model(condition).last_hidden_state)
        likeness = (tokens @ words.mT).amax(-1)
        relevant = likeness / likeness.amax(-1, keepdim=True) > RELEVANT
        return F.normalize(project(seen.pooler_output), dim=-1), tokens, relevant


class CrossModel(nn.Module):
    """Layers of cross-attention and self-attention, each beside a SwiGLU feed-forward, residual.

    Multi-query: many heads of queries, one of keys and values. No dropout; LayerNorm's bias is zero and was never
    trained. The nesting of the modules is the published file's.
    """

    def __init__(self, dim: int, layers: int, heads: int, dim_head: int):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(nn.ModuleDict({"fn": block(dim, heads, dim_head)}) for block in (CrossBlock, SelfBlock))
            for _ in range(layers)
        )

    def forward(
        self, x: Float[Tensor, "B T D"], context: Float[Tensor, "B L D"], keep: Bool[Tensor, "B L"]
    ) -> Float[Tensor, "B T D"]:
        for cross, own in self.layers:
            x = x + cross["fn"](x, context, keep)
            x = x + own["fn"](x)
        return x


class SwiGLU(nn.Module):
    def forward(self, x: Float[Tensor, "B T two_F"]) -> Float[Tensor, "B T F"]:
        value, gate = x.chunk(2, dim=-1)
        return F.silu(gate) * value


def attend(
    q: Float[Tensor, "B T hd"],
    k: Float[Tensor, "B L d"],
    v: Float[Tensor, "B L d"],
    keep: Bool[Tensor, "B L"] | None = None,
    rotary: Float[Tensor, "T d"] | None = None,
) -> Float[Tensor, "B T hd"]:
    """softmax(q k^T / sqrt(d)) v with one head of keys and values; tokens without `keep` are not looked at."""
    q, k, v = q.unflatten(-1, (-1, k.shape[-1])).transpose(1, 2), k[:, None], v[:, None]
    if rotary is not None:
        q, k = (x * rotary.cos() + half_turn(x) * rotary.sin() for x in (q, k))
    mask = None if keep is None else keep[:, None, None]
    heads = (q.shape[1], -1, -1)
    out = F.scaled_dot_product_attention(q, k.expand(-1, *heads), v.expand(-1, *heads), attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def half_turn(x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


class CrossBlock(nn.Module):
    def __init__(self, dim: int, heads: int, dim_head: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        inner = FF_MULT * dim
        self.ff = nn.Sequential(nn.Linear(dim, 2 * inner, bias=False), SwiGLU(), nn.Linear(inner, dim, bias=False))

    def forward(self, x: Tensor, context: Tensor, keep: Tensor) -> Tensor:
        x = self.norm(x)
        k, v = self.to_kv(context).chunk(2, dim=-1)
        return self.to_out(attend(self.to_q(x), k, v, keep)) + self.ff(x)


class SelfBlock(nn.Module):
    def __init__(self, dim: int, heads: int, dim_head: int):
        super().__init__()
        inner = FF_MULT * dim
        self.parts = (heads * dim_head, dim_head, dim_head, 2 * inner)
        self.norm = nn.LayerNorm(dim)
        self.fused_attn_ff_proj = nn.Linear(dim, sum(self.parts), bias=False)
        self.attn_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.ff_out = nn.Sequential(SwiGLU(), nn.Linear(inner, dim, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, ff = self.fused_attn_ff_proj(self.norm(x)).split(self.parts, dim=-1)
        # Rotary positions: angle of token t in dimension pair i is t * 10000^(-2i/d).
        d = k.shape[-1]
        rate = 10000.0 ** -(torch.arange(0, d, 2, device=x.device) / d)
        angle = torch.arange(x.shape[1], device=x.device)[:, None] * rate
        return self.attn_out(attend(q, k, v, rotary=torch.cat([angle, angle], -1))) + self.ff_out(ff)


def split_weights(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The rehosted state dict as those of CLIPModel and CrossModel, in float32.

    Left out: buffers that follow from the sizes (position_ids, which older versions saved, and the rotary rates).
    Raises ValueError on a name that belongs to neither part.
    """
    parts: dict[str, dict[str, Tensor]] = {"mps.model.": {}, "mps.cross_model.": {}}
    for name, weight in weights.items():
        prefix = next((prefix for prefix in parts if name.startswith(prefix)), None)
        if prefix is None:
            raise ValueError(f"parameter of another model: {name}")
        if not name.endswith((".position_ids", ".rotary_emb.inv_freq")):
            parts[prefix][name.removeprefix(prefix)] = weight.float()
    return parts["mps.model."], parts["mps.cross_model."]
