"""Whether a diffusers folder is a model that this app distils from, judged by its config files of a few kB alone.

Before gigabytes are fetched, and before anything is built to a config's measures: a stranger wrote it, and two million
layers would be built for ever. Loads no torch. What the weights hold is the loaders' to check.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from psd.errors import RequestError, shown
from psd.events import Downloading
from psd.models.hub import Access, Source, download, on_disk
from psd.models.priors.ldm import LDM_CLASS, is_multi_view
from psd.models.weights import readable_errors

INDEX = "model_index.json"
CONFIGS = ("scheduler/scheduler_config.json", "text_encoder/config.json", "vae/config.json", "unet/config.json")
CONFIGS_MB = 1  # of all of them: more is no config
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
TEXT_ENCODERS = ("clip_text_model", "clip")
VAES = ("AutoencoderKL", "AutoencoderTiny")
PREDICTIONS = ("epsilon", "v_prediction")
MORE_INPUTS = ("addition_embed_type", "encoder_hid_dim_type", "class_embed_type", "num_class_embeds")
OWN_ATTENTION = ("eager", "sdpa")
SUITED = "choose a text-to-image Stable Diffusion 1 or 2 in diffusers' layout"

# At most, of a number anywhere in a config: by its name, else MOST. The largest that this app is made for (Stable
# Diffusion 2, its CLIP-H) is in the comment.
LARGEST = {
    "layers_per_block": 8,  # 2
    "num_res_blocks": 8,  # 2
    "transformer_layers_per_block": 16,  # 1
    "reverse_transformer_layers_per_block": 16,
    "transformer_depth": 16,  # 1
    "num_encoder_blocks": 16,  # 3
    "num_decoder_blocks": 16,  # 3
    "num_hidden_layers": 48,  # 23
    "hidden_size": 4096,  # 1024
    "block_out_channels": 4096,  # 1280
    "model_channels": 1024,  # 320
    "channel_mult": 16,  # 4
    "num_attention_heads": 256,  # 20
    "conv_in_kernel": 15,  # 3
    "conv_out_kernel": 15,  # 3
    "vocab_size": 300_000,  # 49408
    "max_position_embeddings": 4096,  # 77
    "num_train_timesteps": 10_000,  # 1000
}
MOST = 16_384
LONGEST = 16  # entries of a list of numbers or blocks: 4
LISTS = {"trained_betas": 10_000}
MOST_LATENTS = 256  # a side: 64
MOST_PARAMETERS = 3e9  # of one part, as `parameters` counts


def download_configs(name: str, source: Source, access: Access) -> Iterator[Downloading]:
    """Bring a repository's config files here and judge them, the pipeline's name first. Raises RequestError."""
    for files, check in (((INDEX,), check_index), (CONFIGS, check_fit)):
        part = replace(source, files=files)
        yield from download(part, replace(access, max_mb=CONFIGS_MB))
        with readable_errors(name, part):
            check(name, on_disk(part))


def check_index(name: str, source: Source) -> None:
    """Raise RequestError unless model_index.json is of a pipeline that fits."""
    index = read_config(source, INDEX)
    pipeline = index.get("_class_name")
    if pipeline not in PIPELINES:
        raise RequestError(f"'{name}' is a {shown(pipeline)}: {SUITED} ({PIPELINES[0]}).")
    if any(index.get("text_encoder_2") or ()):
        raise RequestError(f"'{name}' has two text encoders, as Stable Diffusion XL has: {SUITED}.")


def check_fit(name: str, source: Source, parts: Source | None = None, views: int = 1) -> None:
    """Raise RequestError unless the UNet in `source` and text encoder, VAE and schedule in `parts` fit.

    Raises whatever reading raises, and TypeError for a config that is none.
    """
    places = dict.fromkeys(CONFIGS, parts or source) | {"unet/config.json": source}
    configs = {file: read_config(place, file) for file, place in places.items()}
    for file, config in configs.items():
        check_code(name, file, config)
        check_bounds(name, file, config)
    scheduler, text, vae, unet = configs.values()
    text = text.get("text_config") or text
    misfit = unet_misfit(unet, views) or vae_misfit(vae, unet) or text_misfit(text, unet)
    prediction = scheduler.get("prediction_type", "epsilon")
    if not misfit and prediction not in PREDICTIONS:
        misfit = f"predicts {prediction}: use a model that predicts epsilon or v"
    if misfit:
        raise RequestError(f"'{name}' {misfit}.")


def unet_misfit(unet: dict[str, Any], views: int) -> str:
    """What a UNet is that is none of ours, to follow the model's name; "" of one that is."""
    kind, cameras = unet.get("_class_name"), is_multi_view(unet)
    if views > 1 and not cameras:
        return "is not a multi-view model: choose one whose UNet takes cameras"
    if views == 1 and (cameras or kind == LDM_CLASS):
        return "is a multi-view model, which only a local folder or one of the known priors may be: choose such a one"
    if kind not in ("UNet2DConditionModel", LDM_CLASS):
        return f"has a UNet of class {shown(kind)}: {SUITED}"
    for more in MORE_INPUTS:
        if unet.get(more) is not None and not (cameras and more == "class_embed_type"):
            return f"has a UNet that reads more than a prompt, as Stable Diffusion XL's ({more}): {SUITED}"
    size = unet.get("image_size" if kind == LDM_CLASS else "sample_size")
    if not isinstance(size, int) or not 1 <= size <= MOST_LATENTS:
        return f"draws {shown(size)} latents a side, 1 to {MOST_LATENTS} are possible: {SUITED}"
    return ""


def vae_misfit(vae: dict[str, Any], unet: dict[str, Any]) -> str:
    kind = vae.get("_class_name")
    if kind not in VAES:
        return f"has a VAE of class {shown(kind)}: use one with {' or '.join(VAES)}"
    latents, inputs = vae.get("latent_channels", 4), unet.get("in_channels", 4)
    if inputs == 2 * latents + 1:
        return f"is an inpainting model (its UNet takes {inputs} channels): {SUITED}"
    if (inputs, unet.get("out_channels", 4)) != (latents, latents):
        return f"has a UNet that takes {shown(inputs)} channels where its VAE makes {shown(latents)}: {SUITED}"
    return ""


def text_misfit(text: dict[str, Any], unet: dict[str, Any]) -> str:
    kind = text.get("model_type", TEXT_ENCODERS[0])
    if kind not in TEXT_ENCODERS:
        return f"has a text encoder of type {shown(kind)}: {SUITED}"
    width = text.get("hidden_size", 512)
    read = unet["context_dim"] if unet["_class_name"] == LDM_CLASS else unet.get("cross_attention_dim", 1280)
    if width != read:
        numbers = f"reads {shown(read)} numbers a token and a text encoder that writes {shown(width)}"
        return f"has a UNet that {numbers}: {SUITED}"
    return ""


def check_code(name: str, file: str, config: dict[str, Any]) -> None:
    """Raise RequestError for a config that sends its loader for code: transformers runs kernels of the hub."""
    for key, value in config.items():
        sent = key == "quantization_config" or key.endswith("_implementation")
        if sent and value not in (None, *OWN_ATTENTION):
            raise RequestError(f"'{name}' wants code that this app does not load ({shown(key)} in {file}): {SUITED}.")
        if isinstance(value, dict):
            check_code(name, file, value)


def check_bounds(name: str, file: str, config: dict[str, Any]) -> None:
    """Raise RequestError for a config of measures that no model of this kind has."""
    for key, value in measures(config):
        most = (LISTS.get(key, LONGEST), "entries") if isinstance(value, list) else (LARGEST.get(key, MOST), "")
        count = len(value) if isinstance(value, list) else value
        if not abs(count) <= most[0]:  # nan is not, either
            raise RequestError(
                f"'{name}' has {shown(key)} of {shown(count)} {most[1]}".rstrip()
                + f" in {file}, at most {most[0]} are possible: choose another model."
            )
    if parameters(config) > MOST_PARAMETERS:
        raise RequestError(
            f"'{name}' describes about {parameters(config) / 1e9:.0f} billion parameters in {file}, at most "
            f"{MOST_PARAMETERS / 1e9:.0f} are possible: choose a smaller model."
        )


def measures(value: Any, key: str = "") -> Iterator[tuple[str, float | list]]:
    """(Name, value) of every number and of every list that is built from, wherever it stands in a config."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from measures(inner, name)
    elif isinstance(value, list):
        if key.endswith("block_types") or not all(isinstance(entry, str) for entry in value):
            yield key, value
        for inner in value:
            yield from measures(inner, key)
    elif isinstance(value, int | float) and not key.endswith("_token_id"):
        yield key, value


def parameters(config: dict[str, Any]) -> float:
    """About how many a network of these measures has: Stable Diffusion 2's UNet 0.7e9, its text encoder 0.35e9."""

    def most(*keys: str) -> int:
        return max(
            (value for key in keys for _, value in measures(config.get(key)) if isinstance(value, int)), default=0
        )

    width = most("hidden_size")
    tower = (
        most("num_hidden_layers") * (4 * width**2 + 2 * width * most("intermediate_size")) + most("vocab_size") * width
    )
    channels = config.get("block_out_channels") or [
        config.get("model_channels", 0) * multiple for multiple in config.get("channel_mult", [])
    ]
    layers = 2 * most("layers_per_block", "num_res_blocks") + 1  # down and up
    depth = most("transformer_layers_per_block", "transformer_depth") or 1
    return tower + 18 * layers * (1 + depth) * sum(channel**2 for channel in channels)


def read_config(source: Source, file: str) -> dict[str, Any]:
    """A config file of a folder. Raises OSError, ValueError where it cannot be read, TypeError where it is no dict."""
    path = source.file(file)
    if path.stat().st_size > CONFIGS_MB * 1e6:
        raise ValueError(f"{file} is longer than a config")
    config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise TypeError(f"{file} holds a {type(config).__name__}")
    return config
