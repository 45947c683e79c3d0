"""TAESD, the small decoder that ranks and previews: loaded, asked for, refused; its run is in test_published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from psd.config import RunConfig
from psd.contracts import Models
from psd.distil import distil
from psd.errors import RequestError
from psd.events import Started
from psd.models.hub import Source
from psd.models.needs import check_downloads, missing_models
from psd.models.priors import load_fast_decoder, stable_diffusion
from psd.models.priors.table import PRIORS, TAESD
from psd.modes.image import ImageStage
from psd.run import generate
from psd.safety import check_request
from tests.gaussian import ExactPrior, PlainReward

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
CONFIG = RunConfig.from_preset("sd15-paper", prompt="a lamp", fast_decoder=True)


def make_taesd(folder: Path) -> None:
    """config.json and safetensors at the top of the folder, as published: small widths, the same depths."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    widths = (8, 8, 8, 8)
    vae = AutoencoderTiny(encoder_block_out_channels=widths, decoder_block_out_channels=widths)
    vae.save_pretrained(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_taesd(tmp_path / "taesd")
    return tmp_path / "taesd"


@pytest.fixture
def only_taesd_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psd.models.needs.is_cached", lambda *sources: TAESD.source not in sources)


def test_it_decodes_the_unets_own_latents(folder: Path, monkeypatch: pytest.MonkeyPatch):
    from diffusers import AutoencoderTiny

    monkeypatch.setattr(stable_diffusion, "vae_dtype", lambda device: torch.float32)
    info = replace(TAESD, source=Source(str(folder)))
    decode, vae = load_fast_decoder(info), AutoencoderTiny.from_pretrained(str(folder), local_files_only=True)
    assert load_fast_decoder(info) is decode
    x = torch.randn(2, 4, 4, 4, requires_grad=True)
    images = decode(x)
    assert images.shape == (2, 3, 32, 32)
    torch.testing.assert_close(images, (vae.decode(x).sample / 2 + 0.5).clamp(0, 1))
    (gradient,) = torch.autograd.grad(images.mean(), x)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [(Path.unlink, "is missing"), (lambda file: file.write_bytes(file.read_bytes()[:-100]), "is damaged")],
)
def test_missing_and_damaged_weights_are_one_sentence(folder: Path, damage: Callable[[Path], object], sentence: str):
    damage(folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(RequestError, match=rf"^A file of '[^\n]+' {sentence}: restore") as refusal:
        load_fast_decoder(replace(TAESD, source=Source(str(folder))))
    assert refusal.value.__cause__ is not None


def test_it_is_pinned_to_a_commit():
    assert len(TAESD.source.revision) == 40


def test_it_is_of_the_priors_own_latents():
    decoders = {name: info.fast_decoder.source.name for name, info in PRIORS.items()}
    assert {decoder: name.startswith("toybox/") for name, decoder in decoders.items()} == {
        "toybox/taesd": True, "madebyollin/taesd": False,
    }  # fmt: skip
    check_request(CONFIG)
    for settings in ({}, {"mode": "3d"}):
        check_request(RunConfig.from_preset(prompt="a lamp", fast_decoder=True, **settings))


def test_where_none_is_known_the_vae_decodes_and_the_run_says_so(tmp_path: Path):
    """Another model's latents would decode to noise, and a ranking by noise would look like a result."""
    folder = tmp_path / "prior"
    shutil.copytree(PRIORS["toybox/sd"].source.path, folder)
    config = RunConfig.from_preset(prompt="a lamp", prior=str(folder), steps=2)
    events = list(generate(config, tmp_path / "outputs", "cpu"))
    said = f"fast_decoder: none is known for the latents of {folder.name}, its VAE is used."
    assert next(event for event in events if isinstance(event, Started)).warnings[-1] == said
    about = json.loads((events[-1].directory / "run.json").read_text())
    assert about["fast_decoder_revision"] == ""


def test_it_is_asked_for_where_it_is_switched_on(only_taesd_is_missing: None, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    assert list(missing_models(CONFIG)) == ["madebyollin/taesd"]
    assert not missing_models(replace(CONFIG, fast_decoder=False))
    with pytest.raises(RequestError, match="'madebyollin/taesd' is not in the hub's cache and HF_HUB_OFFLINE forbids"):
        check_downloads(CONFIG, True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(RequestError, match=r"^allow_download .*madebyollin/taesd \(10 MB, licence: MIT\)"):
        check_downloads(CONFIG, False)
    check_downloads(CONFIG, True)


def test_without_a_network_the_loader_says_so():
    with pytest.raises(RequestError, match="'madebyollin/taesd' is not in the hub's cache"):
        load_fast_decoder(TAESD)


def test_the_page_shows_it_where_it_is_switched_on():
    from psd.ui import form, wiring

    models = (SD15, "hpsv2.1")
    assert "taesd" not in form.model_note(*models) and "MIT" not in form.download_box(*models)["info"]
    note, box = form.model_note(*models, True), form.download_box(*models, True)
    assert "<b>madebyollin/taesd</b> · TAESD decodes what is ranked and previewed. Licence: MIT; 10 MB" in note
    assert "CreativeML OpenRAIL-M; 4270 MB to download, about 12 GB of GPU memory." in note
    assert wiring.models_chosen(*models, True)[0] == wiring.models_used(*models, True)[0] == note
    assert "6260 MB" in box["label"] and "madebyollin/taesd: MIT" in box["info"]
    assert "toybox/taesd" in form.model_note("toybox/sd", "hpsv2.1", True)


def test_what_is_kept_is_the_priors_own():
    """Ranked and previewed are pictures of one decoder, exported and scored those of the other."""
    prior, seen, ranked = ExactPrior((3, 8, 8)), [], []

    def decode(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return torch.zeros_like(x)

    @PlainReward
    def reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        ranked.append(images)
        return images.mean((1, 2, 3))

    config = RunConfig(prompt="a lamp", steps=2, negative_lr=0.0)
    stage = ImageStage(config, {"with": config}, Models(prior, reward, decode))
    for _ in distil(prior, stage):
        pass
    assert [len(x) for x in seen] == [2] and not ranked[0].any()
    assert not stage.views()["with"].any()
    decoded = len(seen)
    images, _ = stage.scored("with")
    assert len(seen) == decoded
    torch.testing.assert_close(images, (stage.latents["with"].x_c * 255).round() / 255)  # its decoder is the identity
