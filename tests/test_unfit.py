"""Models that are refused: unfit or hostile by their config files, missing, damaged; and what is said of each."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from psd.errors import RequestError, is_out_of_memory
from psd.models.hub import Source
from psd.models.priors import load_prior, stable_diffusion
from psd.models.priors.fit import check_fit, check_index, parameters
from psd.models.priors.table import PRIORS, PriorInfo
from psd.models.weights import readable_errors
from tests.test_priors import make_prior_folder

UNET, VAE, TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory) -> Path:
    return make_prior_folder(tmp_path_factory.mktemp("priors") / "tiny", "tiny", "epsilon")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def drop_a_parameter(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file(dict(list(load_file(file).items())[1:]), file, metadata={"format": "pt"})


def rewrite(file: Path, text: str) -> None:
    file.write_text(text)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("unet/diffusion_pytorch_model.safetensors", Path.unlink),
        ("unet/diffusion_pytorch_model.safetensors", cut),
        ("unet/diffusion_pytorch_model.safetensors", drop_a_parameter),
        ("vae/diffusion_pytorch_model.safetensors", cut),
        ("text_encoder/model.safetensors", cut),
        ("text_encoder/model.safetensors", drop_a_parameter),
        ("vae/config.json", Path.unlink),
        ("unet/config.json", cut),
        ("scheduler/scheduler_config.json", Path.unlink),
        ("tokenizer/tokenizer.json", Path.unlink),
        ("tokenizer/tokenizer.json", cut),
        ("lexicon.json", cut),
    ],
)
def test_missing_or_damaged_files_are_one_sentence_without_paths(file, damage, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "broken-model")
    damage(folder / file)
    with pytest.raises(RequestError) as refusal:
        load_prior(str(folder))
    sentence = str(refusal.value)
    assert "'broken-model'" in sentence and str(tmp_path) not in sentence and "\n" not in sentence


@pytest.mark.parametrize(
    ("file", "damage", "told"),
    [
        ("unet/config.json", Path.unlink, "A file 'config.json' of 'broken-model' is missing"),
        ("unet/diffusion_pytorch_model.safetensors", Path.unlink, "A file of 'broken-model' is missing"),
        ("text_encoder/model.safetensors", Path.unlink, "A file of 'broken-model' is missing"),
        ("unet/diffusion_pytorch_model.safetensors", cut, "A file of 'broken-model' is damaged"),
        ("lexicon.json", cut, "A file of 'broken-model' is damaged"),
        ("vae/config.json", partial(rewrite, text="[]"), "incomplete or damaged, or those of another kind"),
        ("text_encoder/model.safetensors", drop_a_parameter, "incomplete or damaged, or those of another kind"),
    ],
)
def test_what_is_wrong_with_a_folder_is_told_apart_and_its_cause_is_logged(
    file, damage, told, tiny_folder, tmp_path, caplog
):
    folder = shutil.copytree(tiny_folder, tmp_path / "broken-model")
    damage(folder / file)
    with pytest.raises(RequestError, match=told) as refusal:
        load_prior(str(folder))
    (record,) = [record for record in caplog.records if record.name == "psd.models.weights"]
    assert record.exc_info[1] is refusal.value.__cause__ and "broken-model" in record.message


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:80] DefaultCPUAllocator: not enough memory: you tried to"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_memory_that_ran_out_is_no_fault_of_the_files(error, tiny_folder):
    with pytest.raises(type(error)), readable_errors("tiny", Source(str(tiny_folder))):
        raise error
    wrapped = ValueError("what a library makes of it")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped)


def test_other_errors_are_not_taken_for_memory():
    for error in (ValueError("not enough memory"), RuntimeError("shapes do not match"), KeyError("memory")):
        assert not is_out_of_memory(error)


def change(folder: Path, file: str, **settings) -> None:
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | settings))


@pytest.mark.parametrize(
    ("file", "settings", "told"),
    [
        (UNET, {"in_channels": 9}, r"is an inpainting model \(its UNet takes 9 channels\): choose a text-to-im"),
        (UNET, {"in_channels": 8}, "has a UNet that takes 8 channels where its VAE makes 4"),
        (
            UNET,
            {"cross_attention_dim": 24},
            "has a UNet that reads 24 numbers a token and a text encoder that writes 16",
        ),
        (
            UNET,
            {"addition_embed_type": "text_time"},
            "has a UNet that reads more than a prompt, as Stable Diffusion XL's",
        ),
        (UNET, {"_class_name": "SD3Transformer2DModel"}, "has a UNet of class 'SD3Transformer2DModel'"),
        (UNET, {"_class_name": "MultiViewUNetModel"}, "is a multi-view model"),
        (UNET, {"sample_size": None}, "draws None latents a side"),
        (VAE, {"_class_name": "VQModel"}, "has a VAE of class 'VQModel': use one with AutoencoderKL or Autoencod"),
        (TEXT, {"model_type": "t5"}, "has a text encoder of type 't5'"),
    ],
)
def test_a_model_of_another_kind_is_named(file, settings, told, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "other")
    change(folder, file, **settings)
    with pytest.raises(RequestError, match=f"^'other' {told}"):
        load_prior(str(folder))


@pytest.mark.parametrize(
    ("file", "settings", "told"),
    [
        (UNET, {"layers_per_block": 2_000_000}, "'layers_per_block' of 2000000 in unet/config.json, at most 8"),
        (UNET, {"transformer_layers_per_block": [1, [2_000_000]]}, "'transformer_layers_per_block' of 2000000"),
        (UNET, {"block_out_channels": [8] * 1000}, "'block_out_channels' of 1000 entries"),
        (UNET, {"down_block_types": ["DownBlock2D"] * 1000}, "'down_block_types' of 1000 entries"),
        (UNET, {"block_out_channels": [4096] * 8, "layers_per_block": 8}, "about .* billion parameters in unet/co"),
        (UNET, {"time_embedding_dim": 10**9}, "'time_embedding_dim' of 1000000000"),
        (UNET, {"sample_size": 10_000}, "draws 10000 latents a side"),
        (UNET, {"norm_num_groups": float("nan")}, "'norm_num_groups' of nan"),
        (VAE, {"num_decoder_blocks": [2_000_000, 1, 1, 0]}, "'num_decoder_blocks' of 2000000 in vae/config.json"),
        (TEXT, {"num_hidden_layers": 2_000_000}, "'num_hidden_layers' of 2000000 in text_encoder/config.json"),
        (TEXT, {"vocab_size": 10**10}, "'vocab_size' of 10000000000"),
        (TEXT, {"hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 48}, "about .* billion"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "'num_train_timesteps' of 1000000000"),
    ],
)
def test_measures_that_no_model_has_are_refused_before_anything_is_built(
    file, settings, told, tiny_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(stable_diffusion, "pretrained", lambda *_, **__: pytest.fail("it was built"))
    folder = shutil.copytree(tiny_folder, tmp_path / "huge")
    change(folder, file, **settings)
    with pytest.raises(RequestError, match=told):
        load_prior(str(folder))


@pytest.mark.parametrize(
    "settings",
    [
        {"attn_implementation": "somebody/kernel"},
        {"_attn_implementation": {"": "somebody/kernel"}},
        {"text_config": {"hidden_size": 16, "attn_implementation": "somebody/kernel"}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    ],
)
def test_a_config_that_sends_for_code_is_refused(settings, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "sends")
    change(folder, TEXT, **settings)
    with pytest.raises(
        RequestError, match=r"^'sends' wants code that this app does not load .* in text_encoder/config"
    ):
        load_prior(str(folder))


@pytest.mark.parametrize(("width", "layers"), [(768, 12), (1024, 23)])
def test_configs_of_stable_diffusion_1_and_2_fit(width, layers, tmp_path):
    attention = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    configs = {
        "model_index.json": {"_class_name": "StableDiffusionPipeline", "safety_checker": ["x", "y"]},
        "scheduler/scheduler_config.json": {"num_train_timesteps": 1000, "trained_betas": None, "beta_end": 0.012},
        TEXT: {
            "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_size": width,
            "intermediate_size": 4 * width, "num_hidden_layers": layers, "vocab_size": 49408, "eos_token_id": 49407,
            "max_position_embeddings": 77, "torch_dtype": "float32",
        },
        VAE: {"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "latent_channels": 4,
              "layers_per_block": 2, "sample_size": 768, "scaling_factor": 0.18215},
        UNET: {
            "_class_name": "UNet2DConditionModel", "attention_head_dim": [5, 10, 20, 20], "in_channels": 4,
            "block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": width, "down_block_types": attention,
            "layers_per_block": 2, "num_class_embeds": None, "out_channels": 4, "sample_size": 96,
        },
    }  # fmt: skip
    for file, config in configs.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(json.dumps(config))
    check_index("org/name", Source(str(tmp_path)))
    check_fit("org/name", Source(str(tmp_path)))


def test_a_config_of_megabytes_is_not_read(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "long")
    change(folder, UNET, note="x" * 10**6)
    with pytest.raises(RequestError, match="'long'"):
        load_prior(str(folder))


def test_the_counted_parameters_are_of_the_order_of_the_real_ones():
    unet = dict(block_out_channels=[320, 640, 1280, 1280], layers_per_block=2)
    text = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, vocab_size=49408)
    assert parameters(unet) == pytest.approx(866e6, rel=0.3)  # Stable Diffusion 2's
    assert parameters(text) == pytest.approx(340e6, rel=0.05)


def test_missing_folders_unknown_names_and_other_predictions_are_refused(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(PRIORS, "gone", PriorInfo(Source("toybox/no-such-folder"), "", 0, ""))
    with pytest.raises(RequestError, match="folder of 'gone' is missing"):
        load_prior("gone")
    with pytest.raises(RequestError, match="no prior 'nothing'"):
        load_prior(str(tmp_path / "deep" / "nothing"))
    folder = shutil.copytree(tiny_folder, tmp_path / "predicts-sample")
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"epsilon"', '"sample"'))
    with pytest.raises(RequestError, match="predicts sample"):
        load_prior(str(folder))
