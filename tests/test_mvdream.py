"""The multi-view prior against MVDream's own numbers (tests/golden/mvdream_unet) and in each layout it comes in."""

from __future__ import annotations

import copy
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from psd.errors import RequestError
from psd.guidance import cfg
from psd.models.hub import Source
from psd.models.parts import InParts
from psd.models.priors import mvdream as mv
from psd.models.priors.ldm import is_multi_view
from psd.models.priors.mvdream import (
    MVDreamPrior,
    convert_key,
    ldm_unet_state,
    multi_view,
    predict,
    start_from,
    unet_config,
)
from psd.models.priors.table import PriorInfo
from psd.models.weights import readable_errors
from psd.scene.rig import Frame
from tests.test_priors import SmallMemory, make_prior_folder, make_tokenizer

GOLDEN = Path(__file__).parent / "golden" / "mvdream_unet"
LDM_CONFIG = json.loads((GOLDEN / "unet" / "config.json").read_text())
IO = load_file(GOLDEN / "io.safetensors")
CASES = json.loads((GOLDEN / "io.json").read_text())["cases"]
CONTEXT_DIM = LDM_CONFIG["context_dim"]


def case(name: str, *tensors: str) -> list[torch.Tensor]:
    return [IO[f"{name}.{tensor}"] for tensor in tensors]


def load(folder: Path) -> MVDreamPrior:
    """As a user gets it: from a folder, errors made readable."""
    info = PriorInfo(Source(str(folder)), "openrail", 0, "test")
    with readable_errors(folder.name, info.source):
        return MVDreamPrior.load(folder.name, info, "cpu")


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Path:
    return make_mvdream_folder(tmp_path_factory.mktemp("priors") / "published")


def make_mvdream_folder(folder: Path) -> Path:
    """Laid out as ashawkey/mvdream-sd2.1-diffusers, its UNet the golden one (float16, LDM's names)."""
    from diffusers import AutoencoderKL, DDIMScheduler
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = make_tokenizer(max_length=12)
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=CONTEXT_DIM, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=12, bos_token_id=len(tokenizer) - 2,
        eos_token_id=len(tokenizer) - 1, pad_token_id=len(tokenizer) - 1,
    ))  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=4,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    parts = {"tokenizer": tokenizer, "text_encoder": text_encoder, "vae": vae, "scheduler": scheduler}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    (folder / "unet").mkdir()
    shutil.copy(GOLDEN / "unet" / "config.json", folder / "unet")
    shutil.copy(GOLDEN / "weights.safetensors", folder / mv.LDM_WEIGHTS)
    (folder / "unet" / "mv_unet.py").write_text("raise SystemExit('remote code was run')")
    return folder


@pytest.fixture(scope="session")
def prior(published) -> MVDreamPrior:
    return load(published)


@pytest.fixture(scope="session")
def single_view_folder(tmp_path_factory) -> Path:
    return make_prior_folder(tmp_path_factory.mktemp("priors") / "single-view", "tiny", "epsilon")


def single_view_unet(folder: Path):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(str(folder), subfolder="unet", local_files_only=True)


# Against the reference


@pytest.mark.parametrize("name", CASES)
def test_predict_is_the_reference(prior, name):
    x, t, context, want = case(name, "x", "timesteps", "context", "out")
    cameras = IO.get(f"{name}.camera")
    assert (cameras is None) == (name == "f4_nocamera")
    with torch.no_grad():
        got = predict(prior.unet, x, t, context, cameras, CASES[name]["num_frames"])
    torch.testing.assert_close(got, want, atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", ["f4_cfg", "f4_single_t"])
def test_eps_is_the_reference(prior, name):
    x, t, context, cameras, want = case(name, "x", "timesteps", "context", "camera", "out")
    with torch.no_grad():
        for rows in torch.arange(len(x)).split(4):
            got = prior.eps(x[rows], t[rows[0]], context[rows], cameras[rows])
            torch.testing.assert_close(got, want[rows], atol=5e-5, rtol=0)


def test_a_group_of_one_view_with_a_camera_is_the_reference(prior):
    x, t, context, cameras, want = case("f1", "x", "timesteps", "context", "camera", "out")
    alone = copy.copy(prior)
    alone.views = 1
    with torch.no_grad():
        for i in range(len(x)):
            got = alone.eps(x[i : i + 1], int(t[i]), context[i : i + 1], cameras[i : i + 1])
            torch.testing.assert_close(got, want[i : i + 1], atol=5e-5, rtol=0)


def test_sampling_is_both_published_samplers(prior):
    from diffusers import DDIMScheduler

    golden = load_file(GOLDEN / "sampling.safetensors")
    settings = json.loads((GOLDEN / "sampling.json").read_text())
    y, n = (golden[f"context_{name}"].repeat(4, 1, 1) for name in ("cond", "uncond"))
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    scheduler.set_timesteps(settings["steps"])
    assert scheduler.timesteps.tolist() == settings["timesteps"]
    x = golden["x_T"]
    with torch.no_grad():
        for t in scheduler.timesteps:
            eps = prior.eps(x.repeat(2, 1, 1, 1), t, torch.cat([y, n]), golden["camera"].repeat(2, 1))
            x = scheduler.step(cfg(*eps.chunk(2), settings["guidance_scale"]), t, x).prev_sample
    for sampler in ("bytedance", "mvdream_diffusers"):
        want = golden[f"sampled_{sampler}"]
        assert (x - want).abs().max() < 1e-4 * want.abs().max()


# Names and shapes of the full model


def full_names() -> tuple[dict, dict[str, list[int]], dict[str, torch.Size]]:
    """Published config, LDM's names and shapes, diffusers' names and shapes."""
    from diffusers import UNet2DConditionModel

    golden = json.loads((GOLDEN / "full_keys_hub.json").read_text())
    with torch.device("meta"):
        unet = UNet2DConditionModel(**unet_config(golden["config"]))
    return golden["config"], golden["keys"], {name: p.shape for name, p in unet.state_dict().items()}


def test_published_names_are_the_full_unets_one_to_one_in_name_and_shape():
    config, published_names, ours = full_names()
    converted = {convert_key(name, config): torch.Size(shape) for name, shape in published_names.items()}
    assert len(converted) == len(published_names) == 690
    assert converted == ours
    assert sum(shape.numel() for shape in ours.values()) == 867_572_164


def test_the_original_checkpoint_has_the_same_unet_and_other_parts_that_are_left():
    config, published_names, ours = full_names()
    shapes = json.loads((GOLDEN / "full_keys_original_checkpoint_all_parts.json").read_text())["keys"]
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    unet = ldm_unet_state(state)
    assert len(state) == 1244 and unet.keys() == published_names.keys()
    assert {convert_key(name, config): weight.shape for name, weight in unet.items()} == ours
    assert ldm_unet_state(unet).keys() == unet.keys()


def test_the_full_unet_is_stable_diffusion_2_1s_with_cameras():
    config = unet_config(full_names()[0])
    assert config["block_out_channels"] == [320, 640, 1280, 1280] and config["sample_size"] == 32
    assert config["attention_head_dim"] == [5, 10, 20, 20]  # heads of 64 channels
    assert config["down_block_types"] == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    assert config["up_block_types"] == ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3


def test_a_name_ldm_does_not_have_is_kept():
    config = full_names()[0]
    assert convert_key("image_embed.proj.weight", config) == "image_embed.proj.weight"
    assert convert_key("out.1.weight", config) == "out.1.weight"


# Views


def groups(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_t, cond, cameras of `count` groups of 4 views; the condition is a group's, as in a run."""
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(4 * count, 4, 8, 8, generator=generator)
    cond = torch.randn(count, 7, CONTEXT_DIM, generator=generator).repeat_interleave(4, dim=0)
    return x_t, cond, torch.randn(4 * count, 16, generator=generator)


@torch.no_grad()
def test_permuting_the_views_of_a_group_permutes_its_predictions(prior):
    x_t, cond, cameras = groups(2)
    order = torch.tensor([2, 0, 3, 1, 4, 5, 6, 7])
    got = prior.eps(x_t[order], 500, cond, cameras[order])
    torch.testing.assert_close(got, prior.eps(x_t, 500, cond, cameras)[order], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_view_changes_the_others_of_its_group_and_no_other_group(prior):
    x_t, cond, cameras = groups(2)
    before = prior.eps(x_t, 500, cond, cameras)
    x_t[5] += 1
    moved = (prior.eps(x_t, 500, cond, cameras) - before).abs().amax(dim=(1, 2, 3))
    assert moved[:4].max() < 1e-6
    assert moved[4:].min() > 1e-3


@torch.no_grad()
def test_cross_attention_stays_per_view(prior):
    """With self-attention silenced nothing passes from view to view, although each reads its own text."""
    unet = copy.deepcopy(prior.unet)
    for name, weight in unet.named_parameters():
        if ".attn1.to_out" in name:
            weight.zero_()
    x_t, cond, cameras = groups(1)
    before = predict(unet, x_t, 500, cond, cameras, 4)
    cond[1] += 1
    moved = (predict(unet, x_t, 500, cond, cameras, 4) - before).abs().amax(dim=(1, 2, 3))
    assert moved[1] > 1e-3 and moved[[0, 2, 3]].max() < 1e-6


@torch.no_grad()
def test_without_cameras_every_row_is_a_single_picture(prior):
    x_t, cond, cameras = groups(1)
    single = prior.eps(x_t[:3], 500, cond[:3])  # no multiple of 4
    for i in range(3):
        torch.testing.assert_close(single[i : i + 1], prior.eps(x_t[i : i + 1], 500, cond[i : i + 1]))
    assert (single - prior.eps(x_t, 500, cond, cameras)[:3]).abs().max() > 1e-2


@torch.no_grad()
def test_every_group_may_have_a_timestep_of_its_own(prior):
    x_t, cond, cameras = groups(2)
    both = prior.eps(x_t, torch.tensor([300] * 4 + [700] * 4), cond, cameras)
    for rows, t in ((slice(0, 4), 300), (slice(4, 8), 700)):
        torch.testing.assert_close(both[rows], prior.eps(x_t[rows], t, cond[rows], cameras[rows]))
    assert (both[4:] - prior.eps(x_t[4:], 300, cond[4:], cameras[4:])).abs().max() > 1e-3


@torch.no_grad()
def test_rows_with_and_without_a_camera_mix(prior):
    """A camera of zeros is none, which is not the embedding of zeros."""
    x_t, cond, cameras = groups(1)
    cameras[2:] = 0
    mixed = predict(prior.unet, x_t, 500, cond, cameras, 1)
    torch.testing.assert_close(mixed[2:], prior.eps(x_t[2:], 500, cond[2:]))
    torch.testing.assert_close(mixed[:2], predict(prior.unet, x_t[:2], 500, cond[:2], cameras[:2], 1))
    embedding_of_zeros = prior.unet.class_embedding.linear_2(
        torch.nn.functional.silu(prior.unet.class_embedding.linear_1.bias)
    )
    assert embedding_of_zeros.abs().max() > 1e-2
    assert not prior.unet.class_embedding(torch.zeros(1, 16)).any()


def test_rows_beyond_memory_go_in_whole_groups(prior, monkeypatch):
    x_t, cond = torch.randn(12, *prior.latent_shape), prior.embed(["a cat"] * 12)
    cameras = torch.randn(12, 16)
    with torch.no_grad():
        whole = prior.eps(x_t, 500, cond, cameras)
        small = SmallMemory(prior.unet, 6)
        monkeypatch.setattr(prior, "in_parts", InParts())
        monkeypatch.setattr(prior.unet, "forward", small)
        torch.testing.assert_close(prior.eps(x_t, 500, cond, cameras), whole, atol=1e-5, rtol=1e-5)
        assert small.seen == [12, 4, 4, 4]
        small.most = 3
        with pytest.raises(torch.OutOfMemoryError):
            prior.eps(x_t, 500, cond, cameras)


def test_incomplete_groups_are_refused(prior):
    x_t, cond, cameras = groups(2)
    with pytest.raises(ValueError, match="6 rows are no groups of 4 views"):
        prior.eps(x_t[:6], 500, cond[:6], cameras[:6])


def test_diffusers_has_nothing_to_warn_of(prior, caplog):
    from diffusers.utils import logging

    logger, verbosity = logging.get_logger("diffusers"), logging.get_verbosity()
    logging.set_verbosity_info()
    logger.addHandler(caplog.handler)
    try:
        with torch.no_grad():
            prior.eps(groups(1)[0], 500, *groups(1)[1:])
    finally:
        logger.removeHandler(caplog.handler)
        logging.set_verbosity(verbosity)
    assert not caplog.records


# Use as a prior


def test_weights_are_frozen_and_gradients_reach_the_inputs(prior):
    assert not prior.unet.training and not any(parameter.requires_grad for parameter in prior.unet.parameters())
    x_t, cond, cameras = (tensor.requires_grad_() for tensor in groups(1))
    prior.eps(x_t, 300, cond, cameras).square().sum().backward()
    for tensor in (x_t, cond, cameras):
        assert (tensor.grad.flatten(1).norm(dim=1) > 0).all()


def test_the_gradient_of_the_condition_is_the_finite_difference(prior):
    """eq. 13 moves the negative embedding by this gradient: every view must contribute to it."""
    x_t, cond, cameras = groups(1)
    n = cond[:1].clone().requires_grad_()
    direction = torch.randn(n.shape, generator=torch.Generator().manual_seed(1))
    weights = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(2))

    def objective(n: torch.Tensor) -> torch.Tensor:
        return (weights * prior.eps(x_t, 300, n.expand(4, -1, -1), cameras)).sum()

    (gradient,) = torch.autograd.grad(objective(n), n)
    with torch.no_grad():
        difference = (objective(n + 1e-2 * direction) - objective(n - 1e-2 * direction)) / 2e-2
    assert (gradient * direction).sum().item() == pytest.approx(difference.item(), rel=1e-2)


def test_it_is_a_prior_of_the_published_size(prior, published):
    from psd.contracts import Prior

    assert isinstance(prior, Prior)
    assert (prior.name, prior.licence, prior.views, prior.frame) == ("published", "openrail", 4, Frame())
    assert prior.latent_shape == (4, 32, 32) and prior.image_size == 64  # the tiny VAE has f = 2
    alphas = prior.alphas_cumprod
    assert alphas[0].item() == pytest.approx(1 - 0.00085, abs=1e-6) and len(alphas) == 1000
    assert prior.embed(["a red mushroom"]).shape == (1, 12, CONTEXT_DIM)
    images = prior.decode(prior.encode(torch.rand(4, 3, 16, 16)))
    assert images.shape == (4, 3, 16, 16)


def test_half_precision_answers_in_the_callers(prior):
    half = copy.copy(prior)
    half.unet, half.dtype = copy.deepcopy(prior.unet).to(torch.bfloat16), torch.bfloat16
    x_t, cond, cameras = groups(1)
    with torch.no_grad():
        got, want = half.eps(x_t, 500, cond, cameras), prior.eps(x_t, 500, cond, cameras)
    assert got.dtype == torch.float32
    assert 0 < (got - want).abs().max() < 0.1 * want.abs().max()


# Layouts


def test_a_checkpoint_of_the_original_layout_is_the_same_prior(published, prior, tmp_path):
    folder = shutil.copytree(published, tmp_path / "original")
    state = {mv.CHECKPOINT_PREFIX + name: weight for name, weight in load_file(folder / mv.LDM_WEIGHTS).items()}
    state |= {"first_stage_model.encoder.conv_in.weight": torch.ones(2), "betas": torch.ones(1000)}
    (folder / mv.LDM_WEIGHTS).unlink()
    torch.save(state, folder / mv.CHECKPOINT)
    for got, want in zip(load(folder).unet.parameters(), prior.unet.parameters(), strict=True):
        assert torch.equal(got, want)


def test_weights_do_not_depend_on_their_file_once_loaded(published, prior, tmp_path):
    folder = shutil.copytree(published, tmp_path / "overwritten")
    float32 = {name: weight.float() for name, weight in load_file(folder / mv.LDM_WEIGHTS).items()}
    save_file(float32, folder / mv.LDM_WEIGHTS)  # no conversion that would copy anyway
    unet = MVDreamPrior.load_unet("overwritten", Source(str(folder)), torch.float32)
    with open(folder / mv.LDM_WEIGHTS, "r+b") as file:
        size = file.seek(0, 2)
        file.seek(0)
        file.write(bytes(size))
    for got, want in zip(unet.parameters(), prior.unet.parameters(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("shard_size", ["10GB", "1MB"])
def test_saved_by_diffusers_it_is_native_and_comes_back(published, prior, tmp_path, shard_size):
    folder = shutil.copytree(published, tmp_path / "native")
    shutil.rmtree(folder / "unet")
    prior.unet.save_pretrained(folder / "unet", max_shard_size=shard_size)
    assert json.loads((folder / "unet" / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"
    assert (len(list((folder / "unet").glob("*-of-*.safetensors"))) > 1) == (shard_size == "1MB")
    x_t, cond, cameras = groups(1)
    with torch.no_grad():
        native = load(folder)
        torch.testing.assert_close(native.eps(x_t, 500, cond, cameras), prior.eps(x_t, 500, cond, cameras))
        torch.testing.assert_close(native.eps(x_t, 500, cond), prior.eps(x_t, 500, cond))


def test_text_encoder_and_vae_may_stand_in_another_folder(published, prior, tmp_path):
    shutil.copytree(published / "unet", tmp_path / "unet-alone" / "unet")
    info = PriorInfo(Source(str(tmp_path / "unet-alone")), "openrail", 0, "test", parts=Source(str(published)))
    x_t, _, cameras = groups(1)
    with torch.no_grad():
        apart = MVDreamPrior.load("unet-alone", info, "cpu")
        cond = apart.embed(["a red mushroom"]).repeat(4, 1, 1)
        assert torch.equal(apart.eps(x_t, 500, cond, cameras), prior.eps(x_t, 500, cond, cameras))


def test_multi_view_survives_a_deepcopy_and_being_applied_twice(prior):
    x_t, cond, cameras = groups(1)
    with torch.no_grad():
        for unet in (copy.deepcopy(prior.unet), multi_view(copy.deepcopy(prior.unet))):
            assert torch.equal(predict(unet, x_t, 500, cond, cameras, 4), prior.eps(x_t, 500, cond, cameras))
            assert torch.equal(predict(unet, x_t, 500, cond, None, 1), prior.eps(x_t, 500, cond))


# Training starts here


def test_start_from_is_the_single_view_unet_per_view(single_view_folder):
    source = single_view_unet(single_view_folder)
    unet = start_from(source)
    generator = torch.Generator().manual_seed(0)
    x_t, cond = torch.randn(4, 4, 4, 4, generator=generator), torch.randn(4, 12, 16, generator=generator)
    cameras, t = torch.randn(4, 16, generator=generator), torch.tensor([5, 300, 600, 990])
    with torch.no_grad():
        want = source(x_t, t, encoder_hidden_states=cond).sample
        torch.testing.assert_close(predict(unet, x_t, t, cond, cameras, 1), want)
        torch.testing.assert_close(predict(unet, x_t, t, cond, None, 1), want)
        assert (predict(unet, x_t, t, cond, cameras, 4) - want).abs().max() > 1e-4


def test_start_from_trains_its_cameras_and_leaves_the_source_alone(single_view_folder):
    source = single_view_unet(single_view_folder)
    before = copy.deepcopy(source.state_dict())
    unet = start_from(source).train()
    x_t, cond, cameras = torch.randn(4, 4, 4, 4), torch.randn(4, 12, 16), torch.randn(4, 16)
    optimiser = torch.optim.SGD(unet.parameters(), lr=0.1)
    for _ in range(2):
        predict(unet, x_t, 500, cond, cameras, 4).square().mean().backward()
        optimiser.step()
    assert unet.class_embedding.linear_2.weight.abs().max() > 0
    assert unet.class_embedding.linear_1.weight.grad.abs().max() > 0
    assert source.class_embedding is None
    assert all(torch.equal(weight, before[name]) for name, weight in source.state_dict().items())
    with pytest.raises(ValueError, match="single-view UNet"):
        start_from(unet)


# Refusals


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def rewrite(file: Path, change) -> None:
    weights = load_file(file)
    change(weights)
    save_file(weights, file)


def to_checkpoint(file: Path, content=None) -> None:
    """An original checkpoint beside the config, empty where nothing else is said."""
    torch.save({} if content is None else content, file.parent / Path(mv.CHECKPOINT).name)


def rename(weights: dict, old: str, new: str) -> None:
    weights[new] = weights.pop(old)


def reshape(weights: dict, name: str) -> None:
    weights[name] = weights[name][:-1].contiguous()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (Path.unlink, "A file of 'broken-model' is missing"),
        (cut, "A file of 'broken-model' is damaged"),
        (partial(to_checkpoint, content=[1, 2]), "incomplete or damaged, or those of another kind"),
        (
            partial(to_checkpoint, content=Path("pickled")),
            "A file of 'broken-model' is damaged",
        ),  # nothing is unpickled
        (to_checkpoint, "290 parameters are missing and 0 unknown or of another shape, the first is 'conv_in.weight'"),
        (
            partial(rewrite, change=lambda weights: weights.pop("camera_embed.2.bias")),
            "1 parameters are missing and 0 unknown or of another shape, the first is 'class_embedding.linear_2.bias'",
        ),
        (
            partial(rewrite, change=lambda weights: weights.update({"image_embed.weight": torch.ones(1)})),
            "0 parameters are missing and 1 unknown or of another shape, the first is 'image_embed.weight'",
        ),
        (
            partial(rewrite, change=partial(rename, old="out.2.bias", new="out.9.bias")),
            "1 parameters are missing and 1 unknown or of another shape, the first is 'conv_out.bias'",
        ),
        (
            partial(rewrite, change=partial(reshape, name="out.2.bias")),
            "0 parameters are missing and 1 unknown or of another shape, the first is 'conv_out.bias'",
        ),
    ],
)
def test_damaged_unet_weights_are_one_sentence_without_paths(damage, sentence, published, tmp_path):
    folder = shutil.copytree(published, tmp_path / "broken-model")
    damage(folder / mv.LDM_WEIGHTS)
    with pytest.raises(RequestError, match=sentence) as refusal:
        load(folder)
    message = str(refusal.value)
    assert "'broken-model'" in message and str(tmp_path) not in message and "\n" not in message


@pytest.mark.parametrize("file", ["unet/config.json", "vae/config.json", "text_encoder/model.safetensors"])
def test_other_damaged_files_are_one_sentence(file, published, tmp_path):
    folder = shutil.copytree(published, tmp_path / "broken-model")
    cut(folder / file)
    with pytest.raises(RequestError, match="A file of 'broken-model' is damaged"):
        load(folder)


def test_a_native_folder_without_a_parameter_is_refused(published, prior, tmp_path):
    folder = shutil.copytree(published, tmp_path / "broken-native")
    shutil.rmtree(folder / "unet")
    prior.unet.save_pretrained(folder / "unet")
    rewrite(folder / mv.LDM_WEIGHTS, lambda weights: weights.pop("class_embedding.linear_1.bias"))
    with pytest.raises(RequestError, match="'broken-native' are incomplete or damaged"):
        load(folder)


def test_models_of_another_kind_are_refused(single_view_folder, published, tmp_path):
    with pytest.raises(RequestError, match="'single-view' is not a multi-view model"):
        load(single_view_folder)
    folder = shutil.copytree(published, tmp_path / "other")
    config, scheduler = folder / "unet" / "config.json", folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**LDM_CONFIG, "camera_dim": None}))
    with pytest.raises(RequestError, match="'other' is not a multi-view model"):
        load(folder)
    config.write_text(json.dumps(LDM_CONFIG))
    scheduler.write_text(scheduler.read_text().replace('"epsilon"', '"v_prediction"'))
    with pytest.raises(RequestError, match="'other' predicts v"):
        load(folder)


def test_is_multi_view_tells_the_configs_apart(published, single_view_folder):
    configs = [json.loads((folder / "unet/config.json").read_text()) for folder in (published, single_view_folder)]
    assert [is_multi_view(config) for config in configs] == [True, False]
    labelled = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2816}
    assert not is_multi_view(labelled)
