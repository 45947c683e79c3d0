"""The toybox's architectures, all of them diffusers' and transformers' own classes in small, and their folders.

Sizes are chosen for two CPU cores: nothing above 10 M parameters, no file above 9 MB, the large ones in 16 bits.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from psd.models.weights import export_sums
from psd.toybox import world
from psd.toybox.taste import AXES

MAX_TOKENS = 32
TEXT_WIDTH = 192
LATENT_SIDE = 16
SHARD_SIZE = "8MB"


def make_tokenizer():
    """A CLIPTokenizer whose merges make every word of the world one token; any other text falls apart into letters."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    symbols = letters + [letter + "</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in world.lexicon():
        # A private chain per word would be broken by an earlier word's merges, so apply those first, as BPE will.
        pieces = _bpe([*word[:-1], word[-1] + "</w>"], merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
            symbols.append(pieces[0])
    symbols = [*dict.fromkeys(symbols), "<|startoftext|>", "<|endoftext|>"]
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def _bpe(pieces: list[str], merges: list[tuple[str, str]]) -> list[str]:
    for left, right in merges:
        i = 0
        while i < len(pieces) - 1:
            if (pieces[i], pieces[i + 1]) == (left, right):
                pieces = [*pieces[:i], left + right, *pieces[i + 2 :]]
            i += 1
    return pieces


def _text_sizes(tokenizer) -> dict:
    return dict(
        vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=2 * TEXT_WIDTH, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=MAX_TOKENS, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def make_text_encoder(tokenizer):
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**_text_sizes(tokenizer)))


def make_vae():
    """f = 8, 4 x 16 x 16 latents of unit variance (so scaling_factor is 1)."""
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(
        encoder_block_out_channels=(48,) * 4, decoder_block_out_channels=(48,) * 4, num_encoder_blocks=(0, 1, 2, 3),
        num_decoder_blocks=(3, 2, 1, 0), latent_channels=4, scaling_factor=1.0,
    )  # fmt: skip


def make_taesd():
    """TAESD's part for the VAE above: its latents, a fraction of its work."""
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(
        encoder_block_out_channels=(16,) * 4, decoder_block_out_channels=(16,) * 4, num_encoder_blocks=(0, 1, 2, 4),
        num_decoder_blocks=(4, 3, 2, 0), latent_channels=4, scaling_factor=1.0,
    )  # fmt: skip


def make_unet():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT_SIDE, block_out_channels=(64, 128, 160), layers_per_block=1, cross_attention_dim=TEXT_WIDTH,
        down_block_types=("CrossAttnDownBlock2D",) * 3, up_block_types=("CrossAttnUpBlock2D",) * 3,
        attention_head_dim=4,
    )  # fmt: skip


def make_scheduler():
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, prediction_type="epsilon",
    )  # fmt: skip


def make_preference(tokenizer):
    """PickScore's architecture: a CLIP whose exp(logit_scale) * cos is the score."""
    from transformers import CLIPConfig, CLIPModel

    vision = dict(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        image_size=128,
        patch_size=16,
    )
    return CLIPModel(
        CLIPConfig(
            text_config=_text_sizes(tokenizer), vision_config=vision, projection_dim=128, logit_scale_init_value=2.3
        )
    )


class Judge(nn.Module):
    """ImageReward's architecture: the text tower reads the image by cross-attention, a linear head its first token."""

    def __init__(self, tokenizer):
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        width = 160
        self.vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=width, intermediate_size=3 * width, num_hidden_layers=5, num_attention_heads=5,
                image_size=128, patch_size=16, initializer_range=0.02,
            )
        )  # fmt: skip
        self.text = BlipTextModel(
            BlipTextConfig(
                vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=3,
                num_attention_heads=5, encoder_hidden_size=width, max_position_embeddings=MAX_TOKENS, is_decoder=True,
                hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, hidden_act="gelu",
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id, sep_token_id=tokenizer.eos_token_id,
            ),
            add_pooling_layer=False,
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(width, 64), nn.Linear(64, 1))

    def forward(self, pixels, input_ids, attention_mask):
        return self.score(self.vision(pixels).last_hidden_state, input_ids, attention_mask)

    def score(self, image_embeds, input_ids, attention_mask):
        fused = self.text(input_ids, attention_mask=attention_mask, encoder_hidden_states=image_embeds)
        return self.head(fused.last_hidden_state[:, 0]).squeeze(-1)


def make_attributes(groups: dict[str, tuple[str, ...]]):
    named = [f"{name}={value}" for name, values in groups.items() for value in values]
    # A list: a dict would be saved sorted.
    listed = [[name, list(values)] for name, values in groups.items()]
    return _resnet(named, hidden_sizes=[48, 96, 160, 256], depths=[1, 1, 2, 2], groups=listed)


def make_instruments():
    """A small ResNet with one output an axis of taste."""
    return _resnet(AXES, hidden_sizes=[32, 64, 96, 128], depths=[1, 1, 1, 1])


def _resnet(outputs: Sequence[str], **settings):
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=32, layer_type="basic", num_labels=len(outputs), image_size=128, **settings)
    config.id2label = dict(enumerate(outputs))
    config.label2id = {label: i for i, label in config.id2label.items()}
    return ResNetForImageClassification(config)


# Folders.
def save_prior_parts(folder: Path, tokenizer=None, text_encoder=None, vae=None, unet=None) -> None:
    """Write the given parts of toybox/sd, and what goes with any of them: scheduler, model_index.json, lexicon.json."""
    import diffusers
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    parts = {"tokenizer": tokenizer, "text_encoder": text_encoder, "vae": vae, "unet": unet}
    for name, part in parts.items():
        if part is None:
            continue
        if name in ("unet", "vae"):
            save_halved(folder / name, part)
        elif name == "text_encoder":
            save_transformer(folder / name, part)
        else:
            part.save_pretrained(folder / name)
    make_scheduler().save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None], "image_encoder": [None, None], "requires_safety_checker": False,
        "safety_checker": [None, None], "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", transformers.CLIPTextModel.__name__],
        "tokenizer": ["transformers", transformers.CLIPTokenizer.__name__],
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderTiny"],
    }  # fmt: skip
    _write_json(folder / "model_index.json", index)
    _write_json(folder / "lexicon.json", {"words": world.lexicon()})


def save_preference(folder: Path, model, tokenizer) -> None:
    save_transformer(folder, model)
    tokenizer.save_pretrained(folder)
    save_preprocessor(folder)


def save_judge(folder: Path, judge: Judge, tokenizer, mean: float, std: float) -> None:
    from safetensors.torch import save_file

    for name, tower in (("vision", judge.vision), ("text", judge.text)):
        tower.save_pretrained(folder / name, state_dict=halved(tower))
    tokenizer.save_pretrained(folder / "tokenizer")
    save_file(
        {k: v.detach().float().contiguous() for k, v in judge.head.state_dict().items()}, folder / "head.safetensors"
    )
    _write_json(folder / "reward_config.json", {"mean": mean, "std": std, "max_length": MAX_TOKENS})
    save_preprocessor(folder)
    export_sums(folder)


def save_image_model(folder: Path, model) -> None:
    """A ResNet that reads pictures: toybox/attributes, views and instruments."""
    save_transformer(folder, model)
    save_preprocessor(folder)


def save_halved(folder: Path, part) -> None:
    """A model of diffusers in 16 bits."""
    clear_weights(folder)
    copy.deepcopy(part).half().save_pretrained(folder, max_shard_size=SHARD_SIZE)
    export_sums(folder)


def save_transformer(folder: Path, model) -> None:
    """A model of transformers in 16 bits; its config still says 32, and so it is loaded."""
    clear_weights(folder)
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE, state_dict=halved(model))
    export_sums(folder)


def clear_weights(folder: Path) -> None:
    """Remove weights of an earlier save: fewer shards than before would leave some behind."""
    for old in folder.glob("*.safetensors*"):
        old.unlink()


def halved(model: nn.Module) -> dict[str, Tensor]:
    """State dict with 16-bit floats. The config keeps saying float32, and so the weights load as that."""
    return {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}


def save_preprocessor(folder: Path) -> None:
    """What the published CLIP models carry; the rewards read the mean and the standard deviation."""
    from psd.models.rewards.preprocess import CLIP_MEAN, CLIP_STD

    size = {
        "do_resize": True,
        "size": {"shortest_edge": 128},
        "do_center_crop": True,
        "crop_size": {"height": 128, "width": 128},
    }
    pixels = {
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }
    _write_json(
        folder / "preprocessor_config.json",
        {"image_processor_type": "CLIPImageProcessor", "resample": 3, **size, **pixels},
    )


def _write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@torch.no_grad()
def moving_average(average: nn.Module, module: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * module, parameters and buffers."""
    pairs = [(a, m) for a, m in zip(average.parameters(), module.parameters())]
    torch._foreach_lerp_([a for a, _ in pairs], [m for _, m in pairs], 1 - decay)
    for a, m in zip(average.buffers(), module.buffers()):
        a.copy_(m)
