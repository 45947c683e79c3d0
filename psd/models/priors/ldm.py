"""Configuration and parameter names of MVDream's published UNet (LDM's), as diffusers' UNet2DConditionModel has them.

Pure tables and strings; what reads files and builds models is psd.models.priors.mvdream.
"""

from __future__ import annotations

CAMERA_DIM = 16  # a 4x4 camera-to-world matrix, row by row
LDM_CLASS = "MultiViewUNetModel"  # in the config of ashawkey/mvdream-sd2.1-diffusers


def is_multi_view(config: dict) -> bool:
    """Whether a unet/config.json, diffusers' or the published one, is of a UNet that takes cameras."""
    if config.get("_class_name") == LDM_CLASS:
        return config.get("camera_dim") == CAMERA_DIM
    projects = config.get("class_embed_type") == "projection"
    return projects and config.get("projection_class_embeddings_input_dim") == CAMERA_DIM


def unet_config(ldm_config: dict) -> dict:
    """Arguments of UNet2DConditionModel for the published config of a MultiViewUNetModel.

    What is not listed is diffusers' default and LDM's too, among them GroupNorm's eps (1e-5, in transformers 1e-6).
    """
    width, levels = ldm_config["model_channels"], ldm_config["channel_mult"]
    channels = [width * multiple for multiple in levels]
    attends = [2**level in ldm_config["attention_resolutions"] for level in range(len(levels))]
    return dict(
        sample_size=ldm_config["image_size"],
        in_channels=ldm_config["in_channels"],
        out_channels=ldm_config["out_channels"],
        block_out_channels=channels,
        layers_per_block=ldm_config["num_res_blocks"],
        down_block_types=["CrossAttnDownBlock2D" if cross else "DownBlock2D" for cross in attends],
        up_block_types=["CrossAttnUpBlock2D" if cross else "UpBlock2D" for cross in reversed(attends)],
        transformer_layers_per_block=ldm_config["transformer_depth"],
        cross_attention_dim=ldm_config["context_dim"],
        attention_head_dim=[c // ldm_config["num_head_channels"] for c in channels],  # in fact the number of heads
        use_linear_projection=True,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=ldm_config["camera_dim"],
    )


RESNET_NAMES = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
MIDDLE_NAMES = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
EMBEDDING_NAMES = {"time_embed": "time_embedding", "camera_embed": "class_embedding"}


def convert_key(key: str, ldm_config: dict) -> str:
    """diffusers' name of a UNet parameter that LDM calls `key`; an unknown one keeps its name, for a loader to report.

    LDM counts blocks through. With L = num_res_blocks + 1, input block n is layer (n - 1) mod L of level (n - 1) div L,
    the last of them the downsampler; output block n is layer n mod L of level n div L, whose last part may be an
    upsampler. Inside transformers both use the same names.
    """
    per_level = ldm_config["num_res_blocks"] + 1
    path, _, kind = key.rpartition(".")  # kind: weight or bias
    match path.split("."):
        case ["input_blocks", "0", "0"]:
            name = "conv_in"
        case ["out", "0" | "2" as i]:
            name = {"0": "conv_norm_out", "2": "conv_out"}[i]
        case ["time_embed" | "camera_embed" as embedding, "0" | "2" as i]:
            name = f"{EMBEDDING_NAMES[embedding]}.linear_{1 + int(i) // 2}"
        case ["input_blocks", n, "0", "op"]:
            name = f"down_blocks.{(int(n) - 1) // per_level}.downsamplers.0.conv"
        case ["output_blocks", n, "1" | "2", "conv"]:
            name = f"up_blocks.{int(n) // per_level}.upsamplers.0.conv"
        case ["input_blocks" | "output_blocks" as side, n, "0" | "1" as part, *rest]:
            is_input = side == "input_blocks"
            level, layer = divmod(int(n) - is_input, per_level)
            blocks, layers = ("down" if is_input else "up"), ("resnets", "attentions")[int(part)]
            name = f"{blocks}_blocks.{level}.{layers}.{layer}.{inner_name(layers, rest)}"
        case ["middle_block", "0" | "1" | "2" as i, *rest]:
            name = f"mid_block.{MIDDLE_NAMES[i]}.{inner_name(MIDDLE_NAMES[i], rest)}"
        case _:
            return key
    return f"{name}.{kind}"


def inner_name(layer: str, path: list[str]) -> str:
    """A parameter's path within a resnet or a transformer."""
    inner = ".".join(path)
    return RESNET_NAMES.get(inner, inner) if layer.startswith("resnets") else inner
