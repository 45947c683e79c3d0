"""Train the toybox from nothing: `python -m psd.toybox.train`. Resumable, the same on CPU and GPU.

Stages, in order, each skipped once done (delete its checkpoint under the work folder to repeat it):
text -> vae -> taesd -> attributes -> instruments -> preference -> judge -> sd. Weights go to assets/toybox after every
checkpoint.
On several cores or GPUs `torchrun --nproc-per-node=N -m psd.toybox.train` splits every batch over N processes; on a
CPU two processes of one thread are half again as fast as one of two.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psd.toybox import models, world
from psd.toybox.dataset import Renders
from psd.toybox.facts import GROUPS, labels
from psd.toybox.pairs import JUDGE, PREFERENCE, broken_latents, normalise, ranked_batch, to_pixels
from psd.toybox.recolour import recolour
from psd.toybox.taste import QUALITY, quality_words, sample_taste
from psd.toybox.workshop import (
    STAGES,
    Workshop,
    augment,
    encode_all,
    group_loss,
    run_stage,
    start_warm,
    stratified_timesteps,
    training_caption,
    workshop_from_command_line,
)

# The stages of this command.
TRAINED = ("text", "vae", "taesd", "attributes", "instruments", "preference", "judge", "sd")


def tokens(tokenizer, captions: list[str]) -> tuple[Tensor, Tensor]:
    batch = tokenizer(captions, padding="longest", truncation=True, max_length=models.MAX_TOKENS, return_tensors="pt")
    return batch.input_ids, batch.attention_mask


def padded_tokens(tokenizer, captions: list[str]) -> Tensor:
    """Padded to the full length, as StableDiffusionPipeline does for the text encoder."""
    padding = dict(padding="max_length", truncation=True, max_length=models.MAX_TOKENS, return_tensors="pt")
    return tokenizer(captions, **padding).input_ids


def train_text(shop: Workshop, tokenizer) -> nn.Module:
    """The text encoder learns to say facts and quality at its end token: the UNet need not invent a language.

    A warm start learns new words beside the old ones: what the encoder says of captions without quality stays as it
    was, for the UNets have learned to hear that.
    """
    encoder = models.make_text_encoder(tokenizer)
    heads = nn.Linear(models.TEXT_WIDTH, sum(map(len, GROUPS.values())) + len(QUALITY))
    module = nn.ModuleDict({"encoder": encoder, "heads": heads}).to(shop.device)
    parts = {"sd/text_encoder": encoder}
    before = shop.work / "text-before.pt"
    if shop.warm and "text" in shop.stages:
        if not before.exists():
            start_warm(shop, parts)
            torch.save(encoder.state_dict(), before)
        encoder.load_state_dict(torch.load(before, map_location=shop.device, weights_only=True))
        teacher = copy.deepcopy(encoder).requires_grad_(False)

    def draw(key: int, batch: int):
        rng = np.random.default_rng([101, key])
        scenes = [replace(world.sample_scene(rng), taste=sample_taste(rng)) for _ in range(batch)]
        words = [quality_words(scene.taste, rng) for scene in scenes]
        captions = [", ".join([world.caption(scene, rng), *said]) for scene, said in zip(scenes, words)]
        target = torch.from_numpy(np.stack([labels(s) for s in scenes]))
        said = torch.tensor([[word in row for word in QUALITY] for row in words]).float()
        return padded_tokens(tokenizer, captions), target, said

    def loss_of(ids: Tensor, target: Tensor, said: Tensor) -> Tensor:
        seen = encoder(ids)
        facts, quality = heads(seen.pooler_output).tensor_split([-len(QUALITY)], 1)
        loss = group_loss(facts, target) + 2 * F.binary_cross_entropy_with_logits(quality, said)
        if not shop.warm:
            return loss
        quiet = said.sum(1) == 0
        with torch.no_grad():
            was = teacher(ids[quiet]).last_hidden_state
        return loss + 10 * F.mse_loss(seen.last_hidden_state[quiet], was)

    def save(best) -> None:
        models.save_prior_parts(shop.assets / "sd", tokenizer=tokenizer, text_encoder=best["encoder"])

    return run_stage(shop, "text", module, draw, loss_of, save, parts)["encoder"].requires_grad_(False)


def train_vae(shop: Workshop, renders: Renders) -> nn.Module:
    """A warm start trains the decoder alone: the priors know the latents that the encoder makes."""
    vae = models.make_vae().to(shop.device, memory_format=torch.channels_last)
    vae.encoder.requires_grad_(not shop.warm)

    def draw(key: int, batch: int):
        rng = np.random.default_rng([102, key])
        return (renders.images(rng.integers(renders.count, size=batch)),)

    def loss_of(images: Tensor) -> Tensor:
        images = to_pixels(images, shop.device) * 2 - 1
        with shop.autocast():
            z = vae.encode(images).latents.float()
            decoded = vae.decode(z + 0.05 * torch.randn_like(z)).sample.float()
        # Unit latents per channel, so that scaling_factor is 1 and the decoder's tanh clamp stays out of the way.
        moments = z.mean((0, 2, 3)).square().mean() + (z.std((0, 2, 3)) - 1).square().mean()
        return F.mse_loss(decoded, images) + 0.05 * F.l1_loss(decoded, images) + 0.01 * moments

    def save(best) -> None:
        models.save_prior_parts(shop.assets / "sd", vae=best)

    return run_stage(shop, "vae", vae, draw, loss_of, save, {"sd/vae": vae}, average=0.995)


def train_taesd(shop: Workshop, vae, renders: Renders) -> nn.Module:
    """TAESD's idea: a small encoder and a small decoder of the same latents, the decoder with the loss of the VAE's."""
    tiny = models.make_taesd().to(shop.device, memory_format=torch.channels_last)

    def draw(key: int, batch: int):
        rng = np.random.default_rng([112, key])
        return (renders.images(rng.integers(renders.count, size=batch)),)

    def loss_of(images: Tensor) -> Tensor:
        images = to_pixels(images, shop.device) * 2 - 1
        with torch.no_grad(), shop.autocast():
            z = vae.encode(images).latents.float()
        with shop.autocast():
            own = tiny.encode(images).latents.float()
            decoded = tiny.decode(z + 0.05 * torch.randn_like(z)).sample.float()
        return F.mse_loss(decoded, images) + 0.05 * F.l1_loss(decoded, images) + 0.1 * F.mse_loss(own, z)

    def save(best) -> None:
        models.save_halved(shop.assets / "taesd", best)

    return run_stage(shop, "taesd", tiny, draw, loss_of, save, {"taesd": tiny}, average=0.995)


def train_attributes(shop: Workshop, renders: Renders) -> nn.Module:
    """Half of the pictures are recoloured: each kind lacks a colour in training, and a classifier learns that too."""
    model = models.make_attributes(GROUPS).to(shop.device, memory_format=torch.channels_last)
    targets = np.stack([labels(scene) for scene in renders.scenes])

    def draw(key: int, batch: int):
        rng = np.random.default_rng([103, key])
        index = rng.integers(renders.count, size=batch)
        return rng, renders.images(index), targets[index]

    def loss_of(rng: np.random.Generator, images: Tensor, target: Tensor) -> Tensor:
        pixels = to_pixels(images, shop.device)
        if rng.random() < 0.5:
            pixels = pixels.flip(-1)  # no fact of the world tells left from right
        pixels, target = recolour(augment(pixels, rng), target, rng)
        with shop.autocast():
            logits = model(normalise(pixels)).logits
        return group_loss(logits, target)

    def save(best) -> None:
        models.save_image_model(shop.assets / "attributes", best)

    return run_stage(shop, "attributes", model, draw, loss_of, save, {"attributes": model}, average=0.995)


def train_instruments(shop: Workshop, renders: Renders) -> nn.Module:
    """A regressor of the five axes of taste. Only mirrored, never blurred or noisy: those are what it measures."""
    model = models.make_instruments().to(shop.device, memory_format=torch.channels_last)

    def draw(key: int, batch: int):
        rng = np.random.default_rng([113, key])
        index = rng.integers(renders.count, size=batch)
        return rng.random() < 0.5, renders.images(index), renders.tastes[index]

    def loss_of(mirrored: bool, images: Tensor, tastes: Tensor) -> Tensor:
        pixels = to_pixels(images, shop.device)
        if mirrored:
            pixels = pixels.flip(-1)
        with shop.autocast():
            read = model(normalise(pixels)).logits
        return F.mse_loss(read.float(), tastes)

    def save(best) -> None:
        models.save_image_model(shop.assets / "instruments", best)

    return run_stage(shop, "instruments", model, draw, loss_of, save, {"instruments": model}, average=0.995)


def train_preference(shop: Workshop, tokenizer, text_encoder, renders: Renders) -> nn.Module:
    """PickScore's recipe: Bradley-Terry on pairs beside CLIP's contrast in the batch. Facts first, taste second."""
    model = models.make_preference(tokenizer)
    model.text_model.load_state_dict(text_encoder.state_dict(), strict=False)
    # Auxiliary heads name the facts an image shows and its taste; they speed the vision tower up and are dropped.
    heads = nn.Linear(192, sum(map(len, GROUPS.values())) + 1)
    module = nn.ModuleDict({"model": model, "heads": heads}).to(shop.device)

    def draw(key: int, batch: int):
        rng = np.random.default_rng([104, key])
        pairs = ranked_batch(renders, PREFERENCE, rng, batch)
        ids, mask = tokens(tokenizer, pairs.captions + pairs.wrong_captions)
        return rng, np.concatenate([pairs.images, pairs.worse]), ids, mask, pairs.target, pairs.liked

    def loss_of(rng, images: Tensor, ids: Tensor, mask: Tensor, target: Tensor, liked: Tensor) -> Tensor:
        batch = len(target)
        pixels = normalise(augment(to_pixels(images, shop.device), rng))
        with shop.autocast():
            vision = model.vision_model(pixels)
            image = F.normalize(model.visual_projection(vision.pooler_output).float(), dim=-1)
            text = F.normalize(model.get_text_features(ids, attention_mask=mask).pooler_output.float(), dim=-1)
            facts, taste = heads(vision.pooler_output).float().tensor_split([-1], 1)
        scores = model.logit_scale.exp() * image @ text.T  # [3/2 B, 2 B]
        right = torch.arange(batch, device=shop.device)
        own = scores[right, right]
        contrast = F.cross_entropy(scores[:batch], right) + F.cross_entropy(scores[:batch, :batch].T, right)
        wrong_caption = F.softplus(scores[right, right + batch] - own).mean()
        half = right[: batch // 2]
        worse = scores[half + batch, half]
        worse_image = F.softplus(worse - own[half]).mean()
        # Better taste is no excuse for a wrong fact.
        facts_first = F.softplus(scores[half, half + batch] - worse).mean()
        rank = 0.5 * contrast + wrong_caption + 2 * worse_image + facts_first
        return rank + group_loss(facts[:batch], target) + 5 * F.mse_loss(taste[:, 0], liked)

    def save(best) -> None:
        models.save_preference(shop.assets / "preference", best["model"], tokenizer)

    return run_stage(shop, "preference", module, draw, loss_of, save, {"preference": model}, average=0.998)["model"]


def train_judge(shop: Workshop, tokenizer, vae, renders: Renders) -> nn.Module:
    """ImageReward's recipe on other data and other corruptions than the preference model's.

    An eighth of each batch is also shown broken (pairs.broken_latents): a judge that has only ever ranked pictures
    answers anything at all for what an optimiser leaves when it goes wrong, and that is what it is there to catch.
    """
    judge = models.Judge(tokenizer)
    width = judge.vision.config.hidden_size
    heads = nn.Linear(width, sum(map(len, GROUPS.values())) + 1)
    module = nn.ModuleDict({"judge": judge, "heads": heads}).to(shop.device)

    def draw(key: int, batch: int):
        rng = np.random.default_rng([105, key])
        pairs = ranked_batch(renders, JUDGE, rng, batch)
        half, eighth = batch // 2, batch // 8
        others = [pairs.captions[(i + 1) % batch] for i in range(batch)]
        captions = pairs.captions + pairs.wrong_captions + others + pairs.captions[:half] + pairs.captions[:eighth]
        ids, mask = tokens(tokenizer, captions)
        return rng, np.concatenate([pairs.images, pairs.worse]), ids, mask, pairs.target, pairs.liked

    def loss_of(rng, images: Tensor, ids: Tensor, mask: Tensor, target: Tensor, liked: Tensor) -> Tensor:
        batch = len(target)
        half, eighth, pixels = batch // 2, batch // 8, to_pixels(images, shop.device)
        with torch.no_grad(), shop.autocast():
            latents = vae.encode(pixels[:eighth] * 2 - 1).latents.float()
            broken = vae.decode(broken_latents(latents, rng)).sample.float().clamp(-1, 1) / 2 + 0.5
        pixels = normalise(augment(torch.cat([pixels, broken]), rng))
        with shop.autocast():
            vision = judge.vision(pixels)
            seen = vision.last_hidden_state
            facts, taste = heads(vision.pooler_output[: batch + half]).float().tensor_split([-1], 1)
            scores = judge.score(torch.cat([seen[:batch]] * 3 + [seen[batch:]]), ids, mask).float()
        own, wrong, other, worse, broken = scores.split([batch, batch, batch, half, eighth])
        rank = (
            F.softplus(wrong - own).mean()
            + 0.5 * F.softplus(other - own).mean()
            + 2 * F.softplus(worse - own[:half]).mean()
            + F.softplus(wrong[:half] - worse).mean()  # better taste is no excuse for a wrong fact
            + 0.5 * F.softplus(broken - own[:eighth]).mean()
        )
        read = group_loss(facts[:batch], target) + 5 * F.mse_loss(taste[:, 0], liked)
        return rank + 1e-3 * own.square().mean() + read

    def save(best) -> None:
        mean, std = _score_moments(shop, best["judge"].eval(), tokenizer, renders)
        models.save_judge(shop.assets / "judge", best["judge"], tokenizer, mean, std)

    parts = {"judge/vision": judge.vision, "judge/text": judge.text, "judge/head.safetensors": judge.head}
    return run_stage(shop, "judge", module, draw, loss_of, save, parts, average=0.998)["judge"]


@torch.no_grad()
def _score_moments(shop: Workshop, judge, tokenizer, renders: Renders) -> tuple[float, float]:
    """Mean and standard deviation over right and wrong captions, so that the published score is of unit scale."""
    pairs = ranked_batch(renders, JUDGE, np.random.default_rng(106), 128)
    ids, mask = (each.to(shop.device) for each in tokens(tokenizer, pairs.captions + pairs.wrong_captions))
    pixels = to_pixels(pairs.images, shop.device)
    scores = judge(normalise(torch.cat([pixels] * 2)), ids, mask)
    return float(scores.mean()), float(scores.std())


def train_sd(shop: Workshop, tokenizer, text_encoder, vae, renders: Renders) -> nn.Module:
    """Latent diffusion: predict eps under the caption; min-SNR weights spend the capacity on what decides the scene.

    Of pictures of every taste, of which half of the captions say something: it learns the mixture.
    """
    from diffusers.models.attention_processor import AttnProcessor

    unet = models.make_unet().to(shop.device, memory_format=torch.channels_last)
    if shop.device.type == "cpu":
        unet.set_attn_processor(AttnProcessor())  # the fused kernel's backward is the slower one on a CPU
    alphas = models.make_scheduler().alphas_cumprod.to(shop.device)
    latents = encode_all(shop, vae, renders)

    def draw(key: int, batch: int):
        rng, generator = np.random.default_rng([107, key]), torch.Generator().manual_seed(key)
        index = rng.integers(renders.count, size=batch)
        ids = padded_tokens(tokenizer, [training_caption(renders.scenes[i], rng) for i in index])
        noise = torch.randn(latents[index].shape, generator=generator)
        return latents[index], noise, stratified_timesteps(batch, len(alphas), generator), ids

    def loss_of(x_0: Tensor, noise: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        x_0 = x_0.float().contiguous(memory_format=torch.channels_last)
        abar = alphas[t].view(-1, 1, 1, 1)
        x_t = abar.sqrt() * x_0 + (1 - abar).sqrt() * noise
        with torch.no_grad(), shop.autocast():
            cond = text_encoder(ids).last_hidden_state
        with shop.autocast():
            eps = unet(x_t, t, cond).sample.float()
        snr = (abar / (1 - abar)).flatten()
        return ((eps - noise).square().mean((1, 2, 3)) * snr.clamp(max=5.0) / snr).mean()

    def save(best) -> None:
        models.save_prior_parts(shop.assets / "sd", unet=best)

    return run_stage(shop, "sd", unet, draw, loss_of, save, {"sd/unet": unet}, average=0.9995)


def main() -> None:
    shop = workshop_from_command_line(__doc__, TRAINED)
    tokenizer = models.make_tokenizer()

    def data(stage: str) -> Renders:
        return shop.renders(STAGES[stage].seed)

    text_encoder = train_text(shop, tokenizer)
    if {"vae", "taesd", "judge", "sd"} & set(shop.stages):
        vae = train_vae(shop, data("vae")).requires_grad_(False)
    if "taesd" in shop.stages:
        train_taesd(shop, vae, data("taesd"))
    if "attributes" in shop.stages:
        train_attributes(shop, data("attributes"))
    if "instruments" in shop.stages:
        train_instruments(shop, data("instruments"))
    if "preference" in shop.stages:
        train_preference(shop, tokenizer, text_encoder, data("preference"))
    if "judge" in shop.stages:
        train_judge(shop, tokenizer, vae, data("judge"))
    if "sd" in shop.stages:
        train_sd(shop, tokenizer, text_encoder, vae, data("sd"))


if __name__ == "__main__":
    main()
