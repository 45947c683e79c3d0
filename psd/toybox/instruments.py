"""The toybox's instruments: how much of each axis of taste a picture shows. They say what a preference changed."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from psd.models.hub import Source
from psd.toybox.classifier import PictureReader, load_reader

INSTRUMENTS = Source("toybox/instruments")


class Instruments(PictureReader):
    """A regressor of the axes of taste; `axes` names its outputs in order."""

    def __init__(self, model, mean: Tensor, std: Tensor):
        super().__init__(model, mean, std)
        self.axes: tuple[str, ...] = tuple(model.config.id2label[i] for i in range(model.config.num_labels))

    def __call__(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B axes"]:
        """Of images in [0, 1] each axis, 0 at its dull end and 1 at its fine end; a little outside is possible."""
        return self.logits(images)


def load_instruments(device: str = "cpu", source: Source = INSTRUMENTS) -> Instruments:
    """The toybox's instruments on `device`, loaded once per process. Raises RequestError."""
    return load_reader(Instruments, "toybox/instruments", source, device)
