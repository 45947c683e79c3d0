"""What runs in half precision on a GPU and what never does, on tiny priors loaded in float16 and bfloat16 on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor

from psd.config import RunConfig
from psd.contracts import Models
from psd.distil import distil
from psd.models.priors import stable_diffusion
from psd.models.priors.mvdream import MVDreamPrior, start_from
from psd.models.priors.stable_diffusion import StableDiffusionPrior, compute_dtype, vae_dtype
from psd.models.priors.table import prior_info
from psd.modes.image import ImageStage
from psd.modes.object import ObjectStage
from tests.gaussian import PlainReward
from tests.test_priors import make_prior_folder

HALF = [torch.float16, torch.bfloat16]
CONFIG = RunConfig(prompt="a red mushroom", steps=3, negative_lr=1e-3, pref_interval=1)
Load = Callable[[torch.dtype], StableDiffusionPrior]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_prior_folder(tmp_path_factory.mktemp("priors") / "kl", "kl", "epsilon")


@pytest.fixture(scope="module")
def multi_view_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_prior_folder(tmp_path_factory.mktemp("priors") / "multi-view", "kl", "epsilon")
    single = StableDiffusionPrior.load("single", prior_info(str(folder)), "cpu")
    torch.manual_seed(0)
    start_from(single.unet).save_pretrained(folder / "unet")
    return folder


@pytest.fixture
def load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    return loader(folder, monkeypatch)


@pytest.fixture
def load_multi_view(multi_view_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    return loader(multi_view_folder, monkeypatch)


def loader(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """The folder's prior in a precision, by the loader that a GPU's runs use."""
    info = prior_info(str(folder))

    def load(dtype: torch.dtype) -> StableDiffusionPrior:
        for name in ("compute_dtype", "vae_dtype"):
            monkeypatch.setattr(stable_diffusion, name, lambda device: dtype)
        return (MVDreamPrior if info.views > 1 else StableDiffusionPrior).load(folder.name, info, "cpu")

    return load


@PlainReward
def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    assert images.dtype == torch.float32
    return images.mean((1, 2, 3))


def test_a_gpu_computes_in_float16():
    assert compute_dtype("cuda") == vae_dtype("cuda") == torch.float16
    assert compute_dtype("cpu") == torch.float32


@pytest.mark.parametrize("dtype", HALF)
def test_networks_are_half_schedule_and_answers_the_callers(load: Load, dtype: torch.dtype):
    prior, exact = load(dtype), load(torch.float32)
    assert {part.dtype for part in (prior.unet, prior.vae, prior.text_encoder)} == {prior.dtype} == {dtype}
    assert torch.equal(prior.alphas_cumprod, exact.alphas_cumprod) and prior.alphas_cumprod.dtype == torch.float32
    cond = prior.embed(["a red mushroom"])
    assert cond.dtype == torch.float32
    torch.manual_seed(0)
    x_t, images = torch.randn(1, *prior.latent_shape), torch.rand(1, 3, prior.image_size, prior.image_size)

    def answers(prior: StableDiffusionPrior, caller: torch.dtype) -> list[Tensor]:
        x, pixels = x_t.to(caller), images.to(caller)
        return [prior.eps(x, 500, cond), prior.decode(x), prior.encode(pixels)]

    with torch.no_grad():
        for caller in (torch.float32, torch.float64):
            for got, want in zip(answers(prior, caller), answers(exact, caller), strict=True):
                assert got.dtype == caller
                assert 0 < (got - want).abs().max() < 0.05 * want.abs().max()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("size", [1.0, 1e-9])
def test_gradients_of_any_size_pass_the_half_networks(load: Load, dtype: torch.dtype, size: float):
    """Those of a reward are far below what float16 can hold: unscaled they would be zero behind the network."""
    torch.manual_seed(0)
    x_t, cond, images = torch.randn(2, 4, 4, 4), torch.randn(2, 12, 16), torch.rand(2, 3, 8, 8)

    def gradients(prior: StableDiffusionPrior) -> list[Tensor]:
        inputs = [tensor.clone().requires_grad_() for tensor in (x_t, cond, images)]
        x, y, pixels = inputs
        outputs = prior.decode(prior.eps(x, 300, y)), prior.encode(pixels)
        found = torch.autograd.grad(size * sum(output.square().mean() for output in outputs), inputs)
        return [gradient / size for gradient in found]

    for got, want in zip(gradients(load(dtype)), gradients(load(torch.float32)), strict=True):
        assert got.dtype == torch.float32
        assert F.cosine_similarity(got.flatten(), want.flatten(), dim=0) > 0.99
        assert got.norm().item() == pytest.approx(want.norm().item(), rel=0.05)


@pytest.mark.parametrize("wild", [torch.nan, torch.inf, 1e30])
def test_one_rows_wild_gradient_spoils_no_other_row(load: Load, wild: float):
    prior = load(torch.float16)
    torch.manual_seed(0)
    x_t, cond, images = torch.randn(3, 4, 4, 4), torch.randn(3, 12, 16), torch.rand(3, 3, 8, 8)

    def gradients(size: float) -> list[Tensor]:
        inputs = [tensor.clone().requires_grad_() for tensor in (x_t, cond, images)]
        x, y, pixels = inputs
        outputs = prior.eps(x, 300, y), prior.decode(x), prior.encode(pixels)
        weights = torch.tensor([1.0, size, 1.0]).view(3, 1, 1, 1)
        return torch.autograd.grad(sum((weights * output).sum() for output in outputs), inputs)

    for got, want in zip(gradients(wild), gradients(1.0), strict=True):
        torch.testing.assert_close(got[::2], want[::2])


def test_a_wild_gradient_stays_in_its_group_of_views(load_multi_view: Load):
    prior = load_multi_view(torch.float16)
    torch.manual_seed(0)
    x_t, cond, cameras = torch.randn(8, *prior.latent_shape), torch.randn(8, 12, 16), torch.randn(8, 16)

    def gradient(size: float) -> Tensor:
        x = x_t.clone().requires_grad_()
        weights = torch.tensor([1.0] * 5 + [size] + [1.0] * 2).view(8, 1, 1, 1)
        return torch.autograd.grad((weights * prior.eps(x, 300, cond, cameras)).sum(), x)[0]

    got, want = gradient(torch.nan), gradient(1.0)
    torch.testing.assert_close(got[:4], want[:4])
    assert got[4:].isnan().all()


def test_a_gradient_leaves_no_hook_on_the_callers_tensors(load: Load):
    prior, cond = load(torch.float16), torch.randn(1, 12, 16, requires_grad=True)
    x_t = torch.randn(1, *prior.latent_shape)
    first, second = (torch.autograd.grad(prior.eps(x_t, 300, cond).sum(), cond)[0] for _ in range(2))
    assert torch.equal(first, second) and not cond._backward_hooks


def test_an_image_run_keeps_latents_ranking_and_n_in_float32(load: Load):
    prior = load(torch.float16)
    stage = ImageStage(CONFIG, {"with": CONFIG}, Models(prior, brightness, prior.decode))
    *_, last = distil(prior, stage)
    assert stage.latents["with"].x_c.dtype == torch.float32
    assert stage.arms["with"].method.report()["negative_drift"] > 0
    assert {value.dtype for value in last.terms["with"].values()} == {torch.float32}
    assert stage.views()["with"].dtype == torch.float32


def test_an_object_run_keeps_field_and_n_in_float32(load_multi_view: Load, multi_view_folder: Path):
    prior = load_multi_view(torch.float16)
    config = replace(
        CONFIG, mode="3d", prior=str(multi_view_folder), weighting="recon", grid_size=16, render_size=16, samples=8
    )
    stage = ObjectStage(config, {"with": config}, Models(prior, brightness, prior.decode))
    field, method = stage.sculptures["with"].field, stage.arms["with"].method
    start = [parameter.detach().clone() for parameter in field.parameters()]
    *_, last = distil(prior, stage)
    assert not last.failure and method.report()["negative_drift"] > 0
    assert {value.dtype for value in last.terms["with"].values()} == {torch.float32}
    assert method.negative.value.dtype == torch.float32
    for parameter, before in zip(field.parameters(), start, strict=True):
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter).all() and not torch.equal(parameter, before)


def test_attention_is_torchs_fused_one(load: Load, load_multi_view: Load, monkeypatch: pytest.MonkeyPatch):
    calls, fused = [], F.scaled_dot_product_attention

    def counted(*arguments, **options) -> Tensor:
        calls.append(arguments)
        return fused(*arguments, **options)

    single, views = load(torch.float32), load_multi_view(torch.float32)
    for part in (single.unet, single.vae, views.vae):
        assert {type(processor) for processor in part.attn_processors.values()} == {AttnProcessor2_0}
    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    for prior, cameras in ((single, None), (views, torch.ones(4, 16))):
        calls.clear()
        prior.eps(torch.randn(4, *prior.latent_shape), 500, torch.randn(4, 12, 16), cameras)
        assert len(calls) == len(prior.unet.attn_processors) > 0


def test_a_vae_sees_only_so_many_pixels_at_once(load: Load, monkeypatch: pytest.MonkeyPatch):
    prior, rows = load(torch.float32), []
    prior.vae.encoder.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    prior.vae.decoder.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    torch.manual_seed(0)
    images = torch.rand(5, 3, prior.image_size, prior.image_size, requires_grad=True)

    def pass_through() -> tuple[Tensor, Tensor]:
        rows.clear()
        decoded = prior.decode(prior.encode(images))
        return decoded.detach(), *torch.autograd.grad(decoded.square().sum(), images)

    whole = pass_through()
    assert rows == [5, 5]
    monkeypatch.setattr(stable_diffusion, "PIXELS_AT_ONCE", 2 * prior.image_size**2)
    sliced = pass_through()
    assert rows == [2, 2, 1] * 2
    torch.testing.assert_close(sliced, whole)
    monkeypatch.setattr(stable_diffusion, "PIXELS_AT_ONCE", 1)  # less than one image: one by one
    pass_through()
    assert rows == [1] * 10


def test_a_vae_takes_fewer_images_where_memory_runs_out(load: Load):
    prior, rows = load(torch.float32), []

    def small_memory(module: torch.nn.Module, inputs: tuple) -> None:
        rows.append(len(inputs[0]))
        if rows[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    images = torch.rand(5, 3, prior.image_size, prior.image_size)
    with torch.no_grad():
        x = prior.encode(images)
        whole = prior.decode(x)
        prior.vae.encoder.register_forward_pre_hook(small_memory)
        prior.vae.decoder.register_forward_pre_hook(small_memory)
        torch.testing.assert_close(prior.encode(images), x, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(prior.decode(x), whole, atol=1e-5, rtol=1e-5)
    assert rows == [5, 2, 2, 1] * 2
