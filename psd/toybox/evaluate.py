"""Measure the toybox against its bars: `python -m psd.toybox.evaluate`. Held-out combinations and unseen seeds only.

Samples come from diffusers' own StableDiffusionPipeline with 30 DDIM steps, as a stranger would load the folder.
"""

from __future__ import annotations

import argparse
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from psd.models.priors import load_prior
from psd.models.rewards import load_reward
from psd.toybox import world
from psd.toybox.classifier import load_attributes
from psd.toybox.dataset import Renders
from psd.toybox.facts import check_facts, kind_right, read_facts
from psd.toybox.instruments import load_instruments
from psd.toybox.pairs import JUDGE, PREFERENCE, broken_latents, ranked_batch, to_pixels
from psd.toybox.taste import AXES, WORDS
from psd.toybox.workshop import ASSETS

HELDOUT_SEED = 90  # data seed of the held-out renders; training uses 1 to 8
BARS = {
    "VAE PSNR (dB)": 30.0,
    "taesd PSNR below the VAE's (dB)": 1.5,
    "taesd, time by the VAE's": 0.25,
    "renders, facts right (%)": 97.0,
    "samples, kind right (%)": 95.0,
    "samples, every fact right (%)": 85.0,
    "preference, facts (%)": 95.0,
    "preference, taste (%)": 90.0,
    "judge, facts (%)": 93.0,
    "judge, taste (%)": 85.0,
    **{f"instruments, {axis} (R^2)": 0.8 for axis in AXES},
    **{f"samples, spread of {axis} by the data's": 0.7 for axis in AXES},
    **{f'"{fine[0]}" against "{dull[0]}" (std)': 1.0 for dull, fine in WORDS.values()},
}
AT_MOST = ("taesd PSNR below the VAE's (dB)", "taesd, time by the VAE's")


@torch.no_grad()
def autoencoders(renders: Renders, device: str) -> dict[str, float]:
    """PSNR in dB over pictures of every taste, and the time that taesd takes beside the VAE."""
    from diffusers import AutoencoderTiny

    vaes = {"VAE": load_prior("toybox/sd", device).vae}
    vaes["taesd"] = AutoencoderTiny.from_pretrained(ASSETS / "taesd", torch_dtype=vaes["VAE"].dtype).to(device).eval()
    psnr, seconds = {name: [] for name in vaes}, {name: [] for name in vaes}
    for _, drawn in renders.batches(64):
        images = to_pixels(drawn, torch.device(device))
        for name, vae in vaes.items():
            begun = time.perf_counter()
            decoded = vae.decode(vae.encode(images.to(vae.dtype) * 2 - 1).latents).sample.float()
            seconds[name].append(time.perf_counter() - begun)
            error = (decoded / 2 + 0.5 - images).square().mean((1, 2, 3))
            psnr[name].append(-10 * error.log10())
    measured = {f"{name} PSNR (dB)": torch.cat(values).mean().item() for name, values in psnr.items()}
    measured["taesd PSNR below the VAE's (dB)"] = measured["VAE PSNR (dB)"] - measured["taesd PSNR (dB)"]
    measured["taesd, time by the VAE's"] = float(np.median(seconds["taesd"]) / np.median(seconds["VAE"]))
    return measured


@torch.no_grad()
def axes_read(renders: Renders, device: str) -> dict[str, float]:
    """R^2 of the instruments on renders, an axis each."""
    instruments = load_instruments(device)
    seen = [instruments(to_pixels(images, torch.device(device))).cpu().numpy() for _, images in renders.batches(128)]
    wrong = np.square(np.concatenate(seen) - renders.tastes).mean(0) / renders.tastes.var(0)
    return {f"instruments, {axis} (R^2)": float(1 - w) for axis, w in zip(instruments.axes, wrong)}


@torch.no_grad()
def mixture_shown(images: Tensor, renders: Renders) -> dict[str, float]:
    """How far samples of captions that say nothing spread over each axis, as a share of the data's own spread."""
    instruments = load_instruments(str(images.device))
    data = torch.from_numpy(renders.tastes).std(0)
    spread = torch.cat([instruments(part) for part in images.split(128)]).std(0).cpu() / data
    return {f"samples, spread of {axis} by the data's": float(s) for axis, s in zip(instruments.axes, spread)}


@torch.no_grad()
def words_move(scenes: list[world.Scene], renders: Renders, device: str) -> dict[str, float]:
    """How much further an axis is under its fine word than under its dull one, in the data's standard deviations."""
    instruments, moved = load_instruments(device), {}
    for i, (dull, fine) in enumerate(WORDS.values()):
        ends = []
        for word in (dull[0], fine[0]):
            images = sample([f"{world.caption(scene)}, {word}" for scene in scenes], device)
            ends.append(instruments(images)[:, i].mean())
        moved[f'"{fine[0]}" against "{dull[0]}" (std)'] = float((ends[1] - ends[0]).cpu() / renders.tastes[:, i].std())
    return moved


@torch.no_grad()
def facts_of(images: Tensor, scenes: list[world.Scene]) -> list[dict[str, bool]]:
    """For each image which of its scene's stated facts the attribute classifier sees."""
    classifier = load_attributes(str(images.device))
    log_probs = classifier(images)
    return [check_facts(scene, read_facts(log_probs, row)) for row, scene in enumerate(scenes)]


def classifier_on_renders(renders: Renders, device: str) -> dict[str, float]:
    held = []
    for index, images in renders.batches(128):
        held += facts_of(to_pixels(images, torch.device(device)), [renders.scenes[i] for i in index])
    return facts_shares(held, "renders")


def facts_shares(held: list[dict[str, bool]], name: str) -> dict[str, float]:
    """Percentages over images: single facts, the kinds, all facts; then by group of facts."""
    percent = lambda values: 100 * float(np.mean(list(values)))  # noqa: E731
    shares = {
        f"{name}, facts right (%)": percent(ok for facts in held for ok in facts.values()),
        f"{name}, kind right (%)": percent(kind_right(facts) for facts in held),
        f"{name}, every fact right (%)": percent(all(facts.values()) for facts in held),
    }
    for group in dict.fromkeys(group for facts in held for group in facts):
        shares[f"{name}, {group} (%)"] = percent(facts[group] for facts in held if group in facts)
    return shares


@torch.no_grad()
def sample(
    captions: list[str],
    device: str,
    steps: int = 30,
    gamma: float = 3.0,
    batch: int = 32,
    negative: Float[Tensor, "L D"] | None = None,
) -> Float[Tensor, "N 3 128 128"]:
    """Plain DDIM in [0, 1] from StableDiffusionPipeline, one seed per caption.

    `negative` is the embedding of classifier-free guidance, a learned n for example (psd.embedding); None: of "".
    """
    pipeline, images = pipeline_on(device), []
    for start in range(0, len(captions), batch):
        part = captions[start : start + batch]
        generators = [torch.Generator().manual_seed(1000 + start + i) for i in range(len(part))]
        n = None if negative is None else negative.to(device).expand(len(part), -1, -1)
        answer = pipeline(
            part, num_inference_steps=steps, guidance_scale=gamma, generator=generators, negative_prompt_embeds=n,
            output_type="pt",
        )  # fmt: skip
        images.append(answer.images)
    return torch.cat(images).float()


@cache
def pipeline_on(device: str):
    """StableDiffusionPipeline of toybox/sd, loaded once a device."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(ASSETS / "sd", safety_checker=None).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def pair_accuracy(name: str, renders: Renders, device: str, batches: int = 6) -> dict[str, float]:
    """Share of held-out comparisons that a reward decides right: wrong captions, and pictures of less taste."""
    reward, liking = load_reward(name, device), JUDGE if name.endswith("judge") else PREFERENCE
    prior = load_prior("toybox/sd", device)
    right = {"facts": [], "taste": [], "facts before taste": [], "broken picture": []}
    for batch in range(batches):
        rng = np.random.default_rng([91, batch])
        pairs = ranked_batch(renders, liking, rng, 64)
        half, pixels = len(pairs.worse), to_pixels(pairs.images, torch.device(device))
        own, wrong = reward(pixels, pairs.captions), reward(pixels, pairs.wrong_captions)
        worse = reward(to_pixels(pairs.worse, torch.device(device)), pairs.captions[:half])
        broken = prior.decode(broken_latents(prior.encode(pixels), rng)).clamp(0, 1)
        right["facts"].append(own > wrong)
        right["taste"].append(own[:half] > worse)
        right["facts before taste"].append(worse > wrong[:half])
        right["broken picture"].append(own > reward(broken, pairs.captions))
    label = name.split("/")[1]
    return {f"{label}, {kind} (%)": 100 * torch.cat(oks).float().mean().item() for kind, oks in right.items()}


def unknown_words(device: str) -> list[tuple[str, tuple[str, ...]]]:
    """What the prior says of words outside its vocabulary."""
    return load_prior("toybox/sd", device).unknown_words("a crimsom mushrom beside a dragon")


PARTS = ("vae", "attributes", "instruments", "samples", "words", "preference", "judge")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(".toybox"), help="where held-out renders are kept")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--samples", type=int, default=256, help="captions to sample")
    parser.add_argument("--only", nargs="*", default=[], choices=PARTS)
    args = parser.parse_args()
    renders = Renders(args.work, HELDOUT_SEED, 2048, heldout=True)
    scenes = renders.scenes[: 2 * args.samples : 2]  # of twins, one

    def samples() -> dict[str, float]:
        images = sample([world.caption(scene) for scene in scenes], args.device)
        return facts_shares(facts_of(images, scenes), "samples") | mixture_shown(images, renders)

    measure = {
        "vae": lambda: autoencoders(renders, args.device),
        "attributes": lambda: classifier_on_renders(renders, args.device),
        "instruments": lambda: axes_read(renders, args.device),
        "samples": samples,
        "words": lambda: words_move(scenes[:32], renders, args.device),
        "preference": lambda: pair_accuracy("toybox/preference", renders, args.device),
        "judge": lambda: pair_accuracy("toybox/judge", renders, args.device),
    }
    for part in args.only or PARTS:
        for name, value in measure[part]().items():
            print(f"{name:45s} {value:7.2f}{verdict(name, value)}", flush=True)
    print("unknown words:", unknown_words(args.device))


def verdict(name: str, value: float) -> str:
    if name not in BARS:
        return ""
    bar = BARS[name]
    return f"   bar {bar:g}: {'reached' if (value <= bar if name in AT_MOST else value >= bar) else 'MISSED'}"


if __name__ == "__main__":
    main()
