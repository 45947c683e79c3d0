"""Stable Diffusion's safety checker: CLIP's embedding of a picture beside those of seventeen concepts (nudity, sex).

Which runs are checked is psd.content's. Its weights are used where they are, and never downloaded.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from psd.errors import Withheld
from psd.models.hub import Source, is_cached, on_disk
from psd.models.rewards.preprocess import load_mean_std, normalise, shorter_side
from psd.models.weights import from_state_dict, load_once, readable_errors

CHECKER = Source(
    "CompVis/stable-diffusion-safety-checker", "cb41f3a270d63d454d385fc2e4f571c487c253c5",
    ("pytorch_model.bin", "preprocessor_config.json", "config.json"),
)  # fmt: skip
ROWS = 32  # pictures of one forward
_loaded: OrderedDict = OrderedDict()


class SafetyChecker:
    """Flags a picture whose cosine with a concept is above the concept's threshold. Weights frozen, float32."""

    def __init__(self, model: Any, mean: Float[Tensor, "3 1 1"], std: Float[Tensor, "3 1 1"]):
        self.model, self.mean, self.std = model, mean, std
        self.image_size: int = model.config.vision_config.image_size  # px

    @torch.no_grad()
    def flags(self, images: Float[Tensor, "B 3 H W"]) -> list[bool]:
        """Of each image in [0, 1]; what is no number is judged as black, as files show it."""
        flagged: list[bool] = []
        for rows in images.split(ROWS):
            seen = shorter_side(rows.to(self.mean).nan_to_num(0.0), self.image_size)
            blank = torch.zeros(len(rows), 1)  # it blackens what it is given
            flagged += map(bool, self.model(normalise(seen, self.mean, self.std), blank)[1])
        return flagged

    def check(self, images: Float[Tensor, "B 3 H W"]) -> None:
        """Raise Withheld where one of these is flagged."""
        if any(self.flags(images)):
            raise Withheld(
                "A picture of this run was flagged by the safety checker, so the run ended without results: change the "
                "prompt or the seed."
            )


def load_checker(device: str = "cpu") -> SafetyChecker | None:
    """The published checker on `device`, once per process; None where the hub's cache lacks it. Raises RequestError."""

    def load() -> SafetyChecker:
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
        from diffusers.utils import logging
        from transformers import CLIPConfig

        logging.set_verbosity_error()  # it would say that black pictures are returned
        source = on_disk(CHECKER)
        with readable_errors(CHECKER.name, source):
            weights = torch.load(source.file(CHECKER.files[0]), map_location="cpu", weights_only=True)
            config = CLIPConfig.from_pretrained(source.path, **source.where)
            model = from_state_dict(StableDiffusionSafetyChecker, config, weights).to(device, torch.float32)
            return SafetyChecker(model, *load_mean_std(source, device))

    return load_once(_loaded, (CHECKER, str(device)), load, 1) if is_cached(CHECKER) else None
