"""The toybox's readers of pictures, the attribute classifier among them: which kind, colours, parts an image shows.

Which facts count is not known here.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from psd.models.hub import Source
from psd.models.rewards.preprocess import load_mean_std, normalise, shorter_side
from psd.models.weights import load_once, pretrained, readable_errors

ATTRIBUTES = Source("toybox/attributes")  # the classifier that counts a caption's facts
IMAGE_SIZE = 128  # px, where the model's config has no image_size
KEEP_LOADED = 4

_loaded: OrderedDict = OrderedDict()
Reader = TypeVar("Reader", bound="PictureReader")


class PictureReader:
    """A ResNet that reads pictures in [0, 1]. Weights frozen, float32."""

    def __init__(self, model, mean: Tensor, std: Tensor):
        self.model, self.mean, self.std = model, mean, std
        self.device: torch.device = model.device
        self.image_size: int = getattr(model.config, "image_size", IMAGE_SIZE)

    @classmethod
    def load(cls, source: Source, device: str) -> PictureReader:
        from transformers import ResNetForImageClassification

        model = pretrained(ResNetForImageClassification, source).to(device, torch.float32)
        return cls(model, *load_mean_std(source, device))

    def logits(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B outputs"]:
        return self.model(normalise(shorter_side(images, self.image_size), self.mean, self.std)).logits


def load_reader(kind: type[Reader], name: str, source: Source, device: str) -> Reader:
    """A reader on `device`, loaded once per process; `name` is what an error calls it. Raises RequestError."""

    def load() -> Reader:
        with readable_errors(name, source):
            return kind.load(source, device)

    return load_once(_loaded, (kind, source, str(device)), load, KEEP_LOADED)


class AttributeClassifier(PictureReader):
    """log p(value | image) per group; a ResNet whose logits are the groups' logits one after the other.

    `groups` maps a group's name to its values' names, in the order of the logits.
    In the model's config they are a list of [group, values].
    """

    def __init__(self, model, mean: Tensor, std: Tensor):
        if isinstance(model.config.groups, dict):
            raise ValueError("groups must be a list of [group, values]: transformers sorts a dict's keys on saving")
        self.groups: dict[str, tuple[str, ...]] = {group: tuple(values) for group, values in model.config.groups}
        if sum(map(len, self.groups.values())) != model.config.num_labels:
            raise ValueError(f"{model.config.num_labels} logits do not split into the groups {list(self.groups)}")
        super().__init__(model, mean, std)

    def __call__(self, images: Float[Tensor, "B 3 H W"]) -> dict[str, Float[Tensor, "B _"]]:
        """Log-probabilities of images in [0, 1], each group summing to one in probability."""
        sizes = [len(values) for values in self.groups.values()]
        logits = self.logits(images).split(sizes, dim=-1)
        return {group: part.log_softmax(-1) for group, part in zip(self.groups, logits, strict=True)}


def load_attributes(device: str = "cpu", source: Source = ATTRIBUTES) -> AttributeClassifier:
    """The toybox's attribute classifier on `device`, loaded once per process. Raises RequestError."""
    return load_reader(AttributeClassifier, "toybox/attributes", source, device)
