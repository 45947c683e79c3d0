"""The Stable Diffusion prior against diffusers' own pipeline, on tiny random models of the formats it must load."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from psd.config import PRESETS, RunConfig
from psd.errors import RequestError
from psd.models import priors
from psd.models.hub import Source
from psd.models.parts import InParts
from psd.models.priors import load_prior, stable_diffusion
from psd.models.priors.stable_diffusion import StableDiffusionPrior
from psd.models.priors.table import PRIORS, PriorInfo, gpu_memory, prior_info
from psd.models.rewards.table import REWARDS

EXAMPLE = Path(__file__).parents[1] / "examples" / "mushroom" / "with.png"
WORDS = ("a", "red", "mushroom", "with", "white", "stem", "tall", "blue", "lamp")


def make_tokenizer(max_length: int):
    """A CLIP tokenizer whose merges make each of WORDS one token and anything else letters."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz,."
    tokens, merges = [*letters, *(letter + "</w>" for letter in letters)], []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts[:2] = [parts[0] + parts[1]]
            tokens.append(parts[0])
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))}
    return CLIPTokenizer(vocab=vocab, merges=list(dict.fromkeys(merges)), model_max_length=max_length)


def make_prior_folder(folder: Path, vae: str, prediction: str) -> Path:
    """A diffusers Stable Diffusion folder: latents 4x4x4, images 32 px (tiny VAE) or 8 px (KL)."""
    from diffusers import (
        AutoencoderKL,
        AutoencoderTiny,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = make_tokenizer(max_length=12)
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=12, bos_token_id=len(tokenizer) - 2, eos_token_id=len(tokenizer) - 1,
        pad_token_id=len(tokenizer) - 1,
    )  # fmt: skip
    vaes = {
        "tiny": lambda: AutoencoderTiny(
            encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, scaling_factor=0.7,
            num_encoder_blocks=(0, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 0),
        ),
        "kl": lambda: AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=4,
        ),
    }  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=4, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vaes[vae](), text_encoder=CLIPTextModel(text_config), tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    (folder / "lexicon.json").write_text(json.dumps({"words": WORDS}))
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    return make_prior_folder(tmp_path_factory.mktemp("priors") / "tiny", "tiny", "epsilon")


@pytest.fixture(scope="session")
def kl_v_folder(tmp_path_factory) -> Path:
    return make_prior_folder(tmp_path_factory.mktemp("priors") / "kl-v", "kl", "v_prediction")


def load_exact(folder: Path, monkeypatch) -> StableDiffusionPrior:
    """The folder's prior with a VAE of float32 on any CPU; what rounding does is test_the_vae_may_round's."""
    monkeypatch.setattr(stable_diffusion, "vae_dtype", lambda device: torch.float32)
    return StableDiffusionPrior.load(folder.name, prior_info(str(folder)), "cpu")


@pytest.mark.parametrize("folder", ["tiny_folder", "kl_v_folder"])
def test_sampling_with_the_prior_is_diffusers_own_pipeline(folder, request, monkeypatch):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    folder = request.getfixturevalue(folder)
    prior = load_exact(folder, monkeypatch)
    pipeline = StableDiffusionPipeline.from_pretrained(str(folder), safety_checker=None, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    start = torch.randn(1, *prior.latent_shape, generator=torch.Generator().manual_seed(1))
    want = pipeline(
        "a red mushroom, tall", negative_prompt="blue lamp", num_inference_steps=3, guidance_scale=5.0,
        latents=start.clone(), output_type="pt",
    ).images  # fmt: skip

    prompt, negative = prior.embed(["a red mushroom, tall", "blue lamp"]).split(1)
    # The scheduler sees eps whatever the network predicts: `eps` converts.
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type="epsilon")
    scheduler.set_timesteps(3)
    x = start
    with torch.no_grad():
        for t in scheduler.timesteps:
            eps_y, eps_n = prior.eps(x, t, prompt), prior.eps(x, t, negative)
            x = scheduler.step(eps_n + 5.0 * (eps_y - eps_n), t, x).prev_sample
        got = prior.decode(x)
    assert got.shape == (1, 3, prior.image_size, prior.image_size)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_v_prediction_becomes_eps_by_the_closed_formula(kl_v_folder):
    prior = load_prior(str(kl_v_folder))
    torch.manual_seed(0)
    x_t, cond, t = torch.randn(3, *prior.latent_shape), torch.randn(3, 12, 16), 700
    with torch.no_grad():
        v = prior.unet(x_t, t, encoder_hidden_states=cond).sample
        eps = prior.eps(x_t, t, cond)
        assert torch.equal(eps, prior.eps(x_t, torch.tensor(t), cond))
    alpha_t, sigma_t = prior.alphas_cumprod[t].sqrt(), (1 - prior.alphas_cumprod[t]).sqrt()
    torch.testing.assert_close(eps, alpha_t * v + sigma_t * x_t)
    # v = alpha_t eps - sigma_t x_0 must come out again, with the x_0 that eps implies.
    x_0 = (x_t - sigma_t * eps) / alpha_t
    torch.testing.assert_close(alpha_t * eps - sigma_t * x_0, v, atol=1e-4, rtol=1e-4)


def test_a_batch_of_conditions_is_each_condition_alone(tiny_folder):
    prior = load_prior(str(tiny_folder))
    x_t = torch.randn(2, *prior.latent_shape)
    cond = prior.embed(["a red mushroom", "tall blue lamp"])
    both = prior.eps(x_t, 500, cond)
    for i in range(2):
        torch.testing.assert_close(both[i : i + 1], prior.eps(x_t[i : i + 1], 500, cond[i : i + 1]))
    assert not torch.allclose(both[:1], prior.eps(x_t[:1], 500, cond[1:]))


@pytest.mark.parametrize("folder", ["tiny_folder", "kl_v_folder"])
def test_every_row_may_have_a_timestep_of_its_own(folder, request):
    prior = load_prior(str(request.getfixturevalue(folder)))
    torch.manual_seed(0)
    x_t, cond, t = torch.randn(3, *prior.latent_shape), torch.randn(3, 12, 16), torch.tensor([20, 500, 980])
    together = prior.eps(x_t, t, cond)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], prior.eps(x_t[i : i + 1], int(t[i]), cond[i : i + 1]))
    assert not torch.allclose(together, prior.eps(x_t, 500, cond))


class SmallMemory:
    """A UNet's forward where memory is enough for so many rows; counts its calls."""

    def __init__(self, unet, rows: int):
        self.forward, self.most, self.seen = unet.forward, rows, []

    def __call__(self, x, *inputs, **named):
        self.seen.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.forward(x, *inputs, **named)


@pytest.mark.parametrize("folder", ["tiny_folder", "kl_v_folder"])
def test_rows_beyond_memory_go_in_parts_and_answer_the_same(folder, request, monkeypatch):
    prior = load_prior(str(request.getfixturevalue(folder)))
    x_t, cond = torch.randn(7, *prior.latent_shape), prior.embed(["a cat"] * 7)
    t = torch.arange(7) * 100
    with torch.no_grad():
        whole = prior.eps(x_t, t, cond)
        small = SmallMemory(prior.unet, 2)
        monkeypatch.setattr(prior, "in_parts", InParts())
        monkeypatch.setattr(prior.unet, "forward", small)
        for tries in ([7, 3, 1] + 6 * [1], 7 * [1]):  # 3 are too many as well, and that is remembered
            small.seen.clear()
            torch.testing.assert_close(prior.eps(x_t, t, cond), whole, atol=1e-5, rtol=1e-5)
            assert small.seen == tries
    small.most = 0
    with pytest.raises(torch.OutOfMemoryError), torch.no_grad():
        prior.eps(x_t, t, cond)


@pytest.mark.parametrize("folder", ["tiny_folder", "kl_v_folder"])
def test_encode_and_decode_use_images_in_0_1_and_the_scaling_factor(folder, request, monkeypatch):
    prior = load_exact(request.getfixturevalue(folder), monkeypatch)
    images = torch.rand(2, 3, prior.image_size, prior.image_size)
    encoded = prior.vae.encode(2 * images - 1)
    raw = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    x = prior.encode(images)
    assert x.shape == (2, *prior.latent_shape)
    torch.testing.assert_close(x, raw * prior.vae.config.scaling_factor)
    decoded = prior.decode(40 * x)
    assert decoded.min() >= 0 and decoded.max() <= 1
    torch.testing.assert_close(decoded, (prior.vae.decode(40 * raw).sample / 2 + 0.5).clamp(0, 1))


def test_the_vae_may_round():
    prior = copy.deepcopy(load_prior("toybox/sd"))
    rounded = copy.deepcopy(prior)
    prior.vae.float(), rounded.vae.bfloat16()
    with Image.open(EXAMPLE) as picture:
        images = torch.from_numpy(np.asarray(picture.convert("RGB"))).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        seen, rough = (each.decode(each.encode(images)) for each in (prior, rounded))
    assert rough.dtype == torch.float32 and not torch.equal(rough, seen)
    assert (rough - seen).square().mean().sqrt() < 1 / 255


def test_weights_are_frozen_and_gradients_reach_the_inputs(tiny_folder):
    prior = load_prior(str(tiny_folder))
    for part in (prior.text_encoder, prior.vae, prior.unet):
        assert not part.training and not any(parameter.requires_grad for parameter in part.parameters())
    x_t = torch.randn(1, *prior.latent_shape, requires_grad=True)
    cond = prior.embed(["a red mushroom"]).requires_grad_()
    images = torch.rand(1, 3, prior.image_size, prior.image_size, requires_grad=True)
    (prior.decode(prior.eps(x_t, 300, cond)).sum() + prior.encode(images).sum()).backward()
    assert all(tensor.grad.abs().sum() > 0 for tensor in (x_t, cond, images))


def test_truncated_counts_tokens_not_characters(tiny_folder):
    prior = load_prior(str(tiny_folder))
    fits, too_long = " ".join(["mushroom"] * 10), " ".join(["mushroom"] * 11)  # 12 with start and end
    assert prior.remarks("") == prior.remarks(fits) == []
    (cut,) = prior.remarks(too_long, "negative prompt")
    assert cut == "The negative prompt is cut after the 12 tokens that tiny reads."
    assert torch.equal(*prior.embed([too_long, fits]))


def test_unknown_words_are_named_once_with_nearest_known_ones(tiny_folder, kl_v_folder):
    prior = load_prior(str(tiny_folder))
    assert prior.unknown_words("A RED mushroom, with (white) stem!") == []
    assert prior.unknown_words("a mushrom-stem, Zeppelin; zeppelin") == [("mushrom", ("mushroom",)), ("zeppelin", ())]
    assert all(len(nearest) <= 2 for _, nearest in prior.unknown_words("lam blu re whit"))
    assert prior.remarks("a mushrom, a zeppelin") == [
        "tiny was never trained on the word 'mushrom' of the prompt; near to it: mushroom.",
        "tiny was never trained on the word 'zeppelin' of the prompt.",
        "The prompt is cut after the 12 tokens that tiny reads.",
    ]


def test_of_many_unknown_words_the_first_five_are_told(tiny_folder):
    found = load_prior(str(tiny_folder)).remarks("q r s t u v w")
    assert [sentence.split("'")[1] for sentence in found if "never trained" in sentence] == list("qrstu")


def test_a_folder_without_lexicon_knows_no_unknown_words(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    (folder / "lexicon.json").unlink()
    assert load_prior(str(folder)).unknown_words("a zeppelin") == []


def test_text_encoder_of_older_transformers_loads(tiny_folder, tmp_path):
    """Published folders: names with text_model. before them and a position_ids buffer."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_folder, tmp_path / "older")
    file = folder / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{name.removeprefix('text_model.')}": weight for name, weight in load_file(file).items()}
    weights["text_model.embeddings.position_ids"] = torch.arange(12)[None]
    save_file(weights, file, metadata={"format": "pt"})
    prompts = ["a red mushroom"]
    torch.testing.assert_close(load_prior(str(folder)).embed(prompts), load_prior(str(tiny_folder)).embed(prompts))


def test_sharded_weights_load_and_a_missing_shard_is_refused(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "sharded")
    prior = load_prior(str(tiny_folder))
    for part, shard in (("unet", "20KB"), ("text_encoder", "4KB")):
        for file in (folder / part).glob("*.safetensors"):
            file.unlink()
        getattr(prior, part).save_pretrained(folder / part, max_shard_size=shard)
        assert len(list((folder / part).glob("*-of-*.safetensors"))) > 1
    x_t, cond = torch.randn(1, *prior.latent_shape), prior.embed(["a red mushroom"])
    sharded = load_prior(str(folder))
    torch.testing.assert_close(sharded.embed(["a red mushroom"]), cond)
    torch.testing.assert_close(sharded.eps(x_t, 500, cond), prior.eps(x_t, 500, cond))

    broken = shutil.copytree(folder, tmp_path / "broken-shards")
    next((broken / "unet").glob("*-of-*.safetensors")).unlink()
    with pytest.raises(RequestError, match="A file of 'broken-shards' is missing"):
        load_prior(str(broken))


def test_two_first_requests_load_once(tiny_folder, monkeypatch):
    loads, load = [], StableDiffusionPrior.load

    def slow_load(*arguments):
        loads.append(arguments)
        time.sleep(0.2)
        return load(*arguments)

    monkeypatch.setattr(StableDiffusionPrior, "load", slow_load)
    monkeypatch.setattr(priors, "_loaded", type(priors._loaded)())
    monkeypatch.setitem(PRIORS, "tiny", PriorInfo(Source(str(tiny_folder)), "Apache-2.0", 0, "test"))
    got = []
    threads = [threading.Thread(target=lambda: got.append(load_prior("tiny"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1 and got[0] is got[1]
    assert (got[0].name, got[0].licence) == ("tiny", "Apache-2.0")


def test_loaded_models_are_bounded():
    from psd.models.weights import load_once

    loaded = type(priors._loaded)()
    for key in "abcad":
        load_once(loaded, (key,), lambda: object(), keep=2)
    assert list(loaded) == [("a",), ("d",)]


def test_a_loaded_model_is_not_held_up_by_another_ones_download():
    from psd.models.weights import load_once

    loaded, downloading, done = type(priors._loaded)(), threading.Event(), threading.Event()
    toybox = load_once(loaded, ("toybox",), object, keep=2)

    def download():
        downloading.set()
        assert done.wait(10)
        return object()

    thread = threading.Thread(target=load_once, args=(loaded, ("huge",), download, 2))
    thread.start()
    assert downloading.wait(10)
    assert load_once(loaded, ("toybox",), object, keep=2) is toybox  # would hang
    done.set()
    thread.join()


def test_published_priors_are_pinned_to_a_commit():
    for info in PRIORS.values():
        assert info.source.is_folder or (len(info.source.revision) == 40 and info.download_mb > 0)


def test_every_prior_has_a_preset_with_settings_of_its_own():
    for name, info in PRIORS.items():
        presets = {preset: settings for preset, settings in PRESETS.items() if settings["prior"] == name}
        assert presets, f"no preset serves {name}"
        for preset, settings in presets.items():
            assert {"gamma", "steps"} <= settings.keys()
            config = RunConfig.from_preset(preset)
            assert config.mode == ("3d" if info.views > 1 else "image")
            assert config.t_min < config.t_max and config.render_size > 0 and config.image_size == 0  # the prior's own
            assert info.source.is_folder or config.negative_prompt


def test_every_prior_that_wants_a_gpu_says_how_much_of_it():
    for name, info in PRIORS.items():
        assert (info.gpu_gb > 0) == (info.download_mb > 0)
        assert gpu_memory(info) == (f", about {info.gpu_gb} GB of GPU memory" if info.gpu_gb else ""), name
    assert gpu_memory(REWARDS["hpsv2.1"]) == ""


def test_the_tables_import_no_heavy_library():
    code = "import sys, psd.models.priors, psd.models.rewards; print({'torch', 'diffusers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
