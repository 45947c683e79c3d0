"""Stable Diffusion as a prior: text, VAE and eps-hat of any diffusers folder or hub id.

Only the parts are loaded, not the pipeline: no safety checker, no sampler. Guidance, timesteps and noise are the
caller's. Weights are frozen; gradients flow to the inputs wherever the caller did not switch them off.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from psd.errors import shown
from psd.models.hub import Source
from psd.models.parts import InParts, visiting
from psd.models.priors.fit import check_fit, read_config
from psd.models.weights import check_vocabulary, pretrained, token_count, tokenize
from psd.scene.rig import Frame

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel

    from psd.contracts import Decode
    from psd.models.priors.table import PriorInfo

UNKNOWN_WORDS = 5  # are told of, at most
MVDREAMS_FRAME = Frame()
PIXELS_AT_ONCE = 512 * 512  # that a VAE sees: an image of 512 px alone fills a GPU, and a batch only takes memory


class StableDiffusionPrior:
    """eps-hat(x_t, y, t) of a text-conditional latent diffusion model, with its VAE and text encoder.

    x are latents as the UNet sees them (times the VAE's scaling_factor), images are RGB in [0, 1].
    Compute dtype: float32 on a CPU (its VAE: `vae_dtype`), float16 elsewhere; answers are in the caller's precision.
    """

    views: int = 1  # rows of one object, which see each other

    def __init__(
        self, name: str, licence: str, tokenizer, text_encoder, vae, unet, scheduler, lexicon: list[str],
        frame: Frame = MVDREAMS_FRAME,
    ):  # fmt: skip
        self.name, self.licence, self.frame = name, licence, frame
        self.tokenizer, self.text_encoder, self.vae, self.unet = tokenizer, text_encoder, vae, unet
        self.predicts_v = scheduler.config.prediction_type == "v_prediction"
        self.dtype: torch.dtype = unet.dtype
        self.device: torch.device = unet.device
        self.alphas_cumprod = scheduler.alphas_cumprod.float().to(self.device)  # fp32 [T]

        size = unet.config.sample_size
        self.latent_shape: tuple[int, int, int] = (unet.config.in_channels, size, size)
        self.image_size: int = size * downscale(vae)  # px
        # A tokenizer saved without a length answers 10^30.
        self.max_tokens: int = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
        self.in_parts = InParts()  # through the UNet
        self.text_parts = (text_encoder,)
        self.lexicon = sorted({part for word in lexicon for part in words(word)})

    @classmethod
    def load(cls, name: str, info: PriorInfo, device: str) -> StableDiffusionPrior:
        """From the parts of a diffusers folder. Raises whatever the libraries raise for missing or damaged files."""
        from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler
        from transformers import CLIPTextModel, CLIPTokenizer

        check_fit(name, info.source, info.parts, cls.views)
        source = info.parts or info.source
        dtype = compute_dtype(device)
        tokenizer = CLIPTokenizer.from_pretrained(source.path, subfolder="tokenizer", **source.where)
        text_encoder = pretrained(CLIPTextModel, source, subfolder="text_encoder", dtype=dtype)
        check_vocabulary(tokenizer, text_encoder.config.vocab_size)
        vae_classes = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
        vae_class = vae_classes[read_config(source, "vae/config.json")["_class_name"]]
        vae = pretrained(vae_class, source, subfolder="vae", torch_dtype=vae_dtype(device))
        unet = cls.load_unet(name, info.source, dtype)
        scheduler = DDIMScheduler.from_pretrained(source.path, subfolder="scheduler", **source.where)
        text_encoder = text_encoder.to(device)
        vae, unet = (part.to(device, memory_format=torch.channels_last) for part in (vae, unet))  # VAE: half the time
        parts = (tokenizer, text_encoder, vae, unet, scheduler, load_lexicon(source))
        return cls(name, info.licence, *parts, info.frame)

    @classmethod
    def load_unet(cls, name: str, source: Source, dtype: torch.dtype) -> UNet2DConditionModel:
        """The UNet of a diffusers folder, frozen."""
        from diffusers import UNet2DConditionModel

        return pretrained(UNet2DConditionModel, source, subfolder="unet", torch_dtype=dtype)

    @torch.no_grad()
    def embed(self, prompts: list[str]) -> Float[Tensor, "P L D"]:
        """Last hidden states of the text encoder; prompts are padded and cut to its length. float32."""
        tokens = tokenize(self.tokenizer, prompts, self.max_tokens)
        with visiting(self.device, *self.text_parts):
            return self.text_encoder(tokens.input_ids.to(self.device)).last_hidden_state.float()

    def encode(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """Latents of images in [0, 1]: the posterior's mean (AutoencoderKL has one), so that it is deterministic."""

        def latents(rows: Tensor) -> Tensor:
            encoded = self.vae.encode(rows)
            return encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mean

        pixels = images.shape[-2:].numel()
        return in_slices(latents, 2 * images - 1, self.vae.dtype, pixels) * self.vae.config.scaling_factor

    def decode(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """Images of latents, clamped to [0, 1]."""
        return decode(self.vae, x)

    def eps(
        self,
        x_t: Float[Tensor, "B C h w"],
        t: int | Int[Tensor, ""] | Int[Tensor, " B"],
        cond: Float[Tensor, "B L D"],
        cameras: Float[Tensor, "B 16"] | None = None,
    ) -> Float[Tensor, "B C h w"]:
        """eps-hat(x_t, cond, t), one condition per sample; of a v-prediction model alpha_t v + sigma_t x_t.

        t is one for all rows, or one a row. A prior of single images has no use for `cameras`.
        """
        t_in = timestep(t, x_t.device)

        def unet(part: slice) -> Tensor:
            own_t = t_in[part] if t_in.ndim else t_in
            network = lambda x, y: self.unet(x, own_t, encoder_hidden_states=y).sample  # noqa: E731
            return in_dtype(self.dtype, network, x_t[part], cond[part])

        predicted = self.in_parts(unet, len(x_t))
        if not self.predicts_v:
            return predicted
        alpha_bar = self.alphas_cumprod[t_in].to(x_t.dtype).view(-1, 1, 1, 1)
        return alpha_bar.sqrt() * predicted + (1 - alpha_bar).sqrt() * x_t

    def remarks(self, prompt: str, label: str = "prompt") -> list[str]:
        """One sentence for each thing in a text, called `label`, that this prior will not understand."""
        found = []
        for word, nearest in self.unknown_words(prompt):
            hint = f"; near to it: {' or '.join(nearest)}" if nearest else ""
            found.append(f"{self.name} was never trained on the word {shown(word)} of the {label}{hint}.")
        if token_count(self.tokenizer, prompt) > self.max_tokens:
            found.append(f"The {label} is cut after the {self.max_tokens} tokens that {self.name} reads.")
        return found

    def unknown_words(self, prompt: str) -> list[tuple[str, tuple[str, ...]]]:
        """The first words this prior was never trained on, each once, with up to two that are spelled alike and known.

        Empty for a prior without a lexicon.json: it speaks English at large.
        """
        if not self.lexicon:
            return []
        unknown = [word for word in dict.fromkeys(words(prompt)) if word not in self.lexicon][:UNKNOWN_WORDS]
        return [(word, tuple(difflib.get_close_matches(word, self.lexicon, n=2))) for word in unknown]


def load_tiny_decoder(source: Source, device: str) -> Decode:
    """Latents to images by the AutoencoderTiny in a folder; its scaling_factor says which latents it takes."""
    from diffusers import AutoencoderTiny

    vae = pretrained(AutoencoderTiny, source, torch_dtype=vae_dtype(device))
    return partial(decode, vae.to(device, memory_format=torch.channels_last))


def decode(vae: AutoencoderKL | AutoencoderTiny, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
    """Images of latents as the UNet sees them, clamped to [0, 1], in the precision of x."""
    pixels = x.shape[-2:].numel() * downscale(vae) ** 2
    images = in_slices(lambda rows: vae.decode(rows).sample, x / vae.config.scaling_factor, vae.dtype, pixels)
    return (images / 2 + 0.5).clamp(0, 1)


def downscale(vae: AutoencoderKL | AutoencoderTiny) -> int:
    """Pixels a side of one latent."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def in_slices(
    network: Callable[[Tensor], Tensor], x: Float[Tensor, "B ..."], dtype: torch.dtype, pixels: int
) -> Float[Tensor, "B ..."]:
    """network(x), as many rows together as PIXELS_AT_ONCE allows rows of that many `pixels`, and memory."""
    in_parts = InParts(max(1, PIXELS_AT_ONCE // pixels))
    return in_parts(lambda part: in_dtype(dtype, network, x[part]), len(x))


def in_dtype(
    dtype: torch.dtype, network: Callable[..., Tensor], *inputs: Float[Tensor, "B ..."], views: int = 1
) -> Float[Tensor, "B ..."]:
    """network(*inputs) computed in `dtype`, answered in the precision of the first input.

    A gradient enters a float16 network scaled to a maximum of 1 and is scaled back behind it: that of a reward, spread
    over all pixels of an image, would vanish below float16's 6e-8 (loss scaling, Micikevicius et al. 2018). Every
    `views` rows, which the network lets see each other, have a scale of their own: what overflows stays among them.
    """
    if dtype != torch.float16 or not any(x.requires_grad for x in inputs) or not torch.is_grad_enabled():
        return network(*(x.to(dtype) for x in inputs)).to(inputs[0].dtype)
    scales: list[Tensor] = []

    def scale_up(gradient: Tensor) -> Tensor:
        largest = gradient.abs().reshape(len(gradient) // views, -1).amax(1)
        scales[:] = [(1 / largest.clamp(min=1e-30)).repeat_interleave(views)]
        return gradient * like(gradient)

    def like(gradient: Tensor) -> Tensor:
        return scales[0].view(-1, *(1,) * (gradient.ndim - 1))

    inputs = tuple(x.view_as(x) for x in inputs)  # a hook on the caller's own tensor would stay there
    for x in inputs:
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient / like(gradient))
    answer = network(*(x.to(dtype) for x in inputs)).to(inputs[0].dtype)
    answer.register_hook(scale_up)
    return answer


def compute_dtype(device: str) -> torch.dtype:
    """Of UNet and text encoder."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.float16


def vae_dtype(device: str) -> torch.dtype:
    """bfloat16 also on a CPU that multiplies it natively: half the time, an error far below the VAE's own."""
    if torch.device(device).type != "cpu":
        return compute_dtype(device)
    able = torch.cpu.get_capabilities()
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32


def timestep(t: int | Int[Tensor, "*shape"], device: torch.device) -> Int[Tensor, "*shape"]:
    """t as diffusers' UNets want it. Given a number they copy it to the GPU, and wait for all that is queued there."""
    return t.to(device) if isinstance(t, Tensor) else torch.full((), t, device=device)


def words(text: str) -> list[str]:
    """Lower-case words without punctuation; a hyphen parts two words, an apostrophe does not."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower())


def load_lexicon(source: Source) -> list[str]:
    """The words of a folder's lexicon.json; none where there is no such file."""
    if not source.file("lexicon.json").exists():
        return []
    return json.loads(source.file("lexicon.json").read_text(encoding="utf-8"))["words"]
