"""What the reward saw: the better and the worse of an arm's pair at some moments of a run, as one sheet of pictures.

Taken from the ranking itself, so that nothing is decoded or scored for it, and kept on the device until the end.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from psd.export import to_uint8, write_file

if TYPE_CHECKING:
    from psd.contracts import Arm, Pair

MOMENTS = 25  # of a run, evenly spread
TILE_PX = 128
MAX_VIEWS = 4


class Moment(NamedTuple):
    step: int
    images: Float[Tensor, "2 V 3 h w"]  # (better, worse) of every view
    scores: Float[Tensor, "2 V"]


@dataclass
class Pairs:
    """Of every arm that ranks, the first pair of each MOMENTS-th part of the run."""

    steps: int
    arms: dict[str, dict[int, Moment]] = field(default_factory=dict)  # arm -> moment's number -> moment

    @torch.no_grad()
    def look(self, step: int, arms: dict[str, Arm]) -> None:
        """After a step, 1-based: take what its arms have ranked."""
        number = (step - 1) * MOMENTS // self.steps
        for name, arm in arms.items():
            pair, arm.score.pair = arm.score.pair, None
            if pair is not None and number not in self.arms.get(name, {}):
                shown = MAX_VIEWS if arm.score.cameras is not None else 1  # of several pictures the first
                self.arms.setdefault(name, {})[number] = Moment(step, *chosen(pair, shown))

    def write(self, arm: str, path: Path, about: dict[str, Any]) -> dict[str, Any]:
        """One WebP: a column a moment; rows: every view's better one, then every view's worse. What it shows."""
        moments = list(self.arms[arm].values())
        columns = [moment.images.flatten(0, 1) for moment in moments]
        sheet = torch.cat([torch.cat(list(column), -2) for column in columns], -1)
        buffer = io.BytesIO()
        Image.fromarray(to_uint8(sheet)).save(buffer, "WEBP", quality=85, method=1)
        write_file(path, buffer.getvalue())
        return {
            "steps": [moment.step for moment in moments],
            "views": columns[0].shape[0] // 2,
            "scores": torch.stack([moment.scores for moment in moments]).double().tolist(),  # [moment][better, worse]
        }


def chosen(pair: Pair, views: int) -> tuple[Float[Tensor, "2 V 3 h w"], Float[Tensor, "2 V"]]:
    """The best and the worst of the first `views` samples, as tiles, and their scores; ties go to the first noise."""
    scores = pair.scores[:, :views].float()
    known = torch.nan_to_num(scores, -torch.inf, neginf=-torch.inf)
    better = known.argmax(0)
    worse = torch.where(known.argmin(0) == better, len(known) - 1 - better, known.argmin(0))
    sample = torch.arange(scores.shape[1], device=scores.device)
    picked = torch.stack([better, worse])
    images = pair.images[picked, sample].clamp(0, 1)
    side = min(TILE_PX, images.shape[-1])
    if side < images.shape[-1]:
        images = F.interpolate(images.flatten(0, 1), (side, side), mode="area").unflatten(0, images.shape[:2])
    return images, scores[picked, sample]
