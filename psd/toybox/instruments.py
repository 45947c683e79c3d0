"""The toybox's instruments: how much of each axis of taste a picture shows. They say what a preference changed."""

from __future__ import annotations

from collections import OrderedDict

from jaxtyping import Float
from torch import Tensor

from psd.models.hub import Source
from psd.models.rewards.preprocess import load_mean_std, normalise, shorter_side
from psd.models.weights import load_once, pretrained, readable_errors

INSTRUMENTS = Source("toybox/instruments")

_loaded: OrderedDict = OrderedDict()


class Instruments:
    """A regressor of the axes of taste; `axes` names its outputs in order. Weights frozen, float32."""

    def __init__(self, model, mean: Tensor, std: Tensor):
        self.model, self.mean, self.std = model, mean, std
        self.axes: tuple[str, ...] = tuple(model.config.id2label[i] for i in range(model.config.num_labels))

    def __call__(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B axes"]:
        """Of images in [0, 1] each axis, 0 at its dull end and 1 at its fine end; a little outside is possible."""
        return self.model(normalise(shorter_side(images, self.model.config.image_size), self.mean, self.std)).logits


def load_instruments(device: str = "cpu", source: Source = INSTRUMENTS) -> Instruments:
    """The toybox's instruments on `device`, loaded once per process. Raises RequestError."""
    import torch
    from transformers import ResNetForImageClassification

    def load() -> Instruments:
        with readable_errors("toybox/instruments", source):
            model = pretrained(ResNetForImageClassification, source).to(device, torch.float32)
            return Instruments(model, *load_mean_std(source, device))

    return load_once(_loaded, (source, str(device)), load, 2)
