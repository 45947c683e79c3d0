"""Measure the toybox against its bars: `python -m psd.toybox.evaluate`. Held-out combinations and unseen seeds only.

Samples come from diffusers' own StableDiffusionPipeline with 30 DDIM steps, as a stranger would load the folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from psd.models.priors import load_prior
from psd.models.rewards import load_reward
from psd.toybox import world
from psd.toybox.classifier import load_attributes
from psd.toybox.dataset import Renders
from psd.toybox.facts import check_facts, kind_right, read_facts
from psd.toybox.pairs import broken_latents, clean_examples, ranked_batch, to_pixels

HELDOUT_SEED = 90  # data seed of the held-out renders; training uses 1, 2 and 3
BARS = {
    "VAE PSNR (dB)": 30.0,
    "classifier, facts right on renders (%)": 97.0,
    "samples, kind right (%)": 95.0,
    "samples, every fact right (%)": 80.0,
    "preference, pairs right (%)": 95.0,
    "judge, pairs right (%)": 93.0,
}


@torch.no_grad()
def vae_psnr(renders: Renders, device: str) -> float:
    """Mean over images of the reconstruction's PSNR in dB; the degraded renders are not among them."""
    prior = load_prior("toybox/sd", device)
    values = []
    for start in range(0, renders.count, 64):
        images = to_pixels(renders.images(np.arange(start, min(start + 64, renders.count))), prior.device)
        error = (prior.decode(prior.encode(images)) - images).square().mean((1, 2, 3))
        values.append(-10 * error.log10())
    return torch.cat(values).mean().item()


@torch.no_grad()
def facts_of(images: Tensor, scenes: list[world.Scene]) -> list[dict[str, bool]]:
    """For each image which of its scene's stated facts the attribute classifier sees."""
    classifier = load_attributes(str(images.device))
    log_probs = classifier(images)
    return [check_facts(scene, read_facts(log_probs, row)) for row, scene in enumerate(scenes)]


def classifier_on_renders(renders: Renders, device: str) -> dict[str, float]:
    held = []
    for start in range(0, renders.count, 128):
        index = np.arange(start, min(start + 128, renders.count))
        images = to_pixels(renders.images(index), torch.device(device))
        held += facts_of(images, [renders.examples[i].scene for i in index])
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
def sample(captions: list[str], device: str, steps: int = 30, gamma: float = 3.0, batch: int = 32) -> Tensor:
    """[N, 3, 128, 128] in [0, 1] from StableDiffusionPipeline, one seed per caption."""
    from diffusers import StableDiffusionPipeline

    folder = Path(__file__).resolve().parents[2] / "assets" / "toybox" / "sd"
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).to(device)
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(captions), batch):
        part = captions[start : start + batch]
        generators = [torch.Generator().manual_seed(1000 + start + i) for i in range(len(part))]
        answer = pipeline(part, num_inference_steps=steps, guidance_scale=gamma, generator=generators, output_type="pt")
        images.append(answer.images)
    return torch.cat(images).float()


@torch.no_grad()
def pair_accuracy(name: str, renders: Renders, device: str, batches: int = 6) -> dict[str, float]:
    """Share of held-out pairs that a reward ranks right: wrong captions, and worse images under the same caption."""
    reward, judge = load_reward(name, device), name.endswith("judge")
    prior = load_prior("toybox/sd", device)
    clean, right = clean_examples(renders), {"wrong caption": [], "worse image": []}
    sound = []  # beside the bar's pairs: does a broken picture score below the good one?
    for batch in range(batches):
        rng = np.random.default_rng([91, batch])
        pairs = ranked_batch(torch.device(device), renders, clean, rng, 64, judge)
        own = reward(pairs.pixels, pairs.captions)
        right["wrong caption"].append(own > reward(pairs.pixels, pairs.wrong_captions))
        half = len(pairs.worse)
        right["worse image"].append(own[:half] > reward(pairs.worse, pairs.captions[:half]))
        broken = prior.decode(broken_latents(prior.encode(pairs.pixels), rng)).clamp(0, 1)
        sound.append(own > reward(broken, pairs.captions))
    label = name.split("/")[1]
    shares = {f"{label}, {kind} (%)": 100 * torch.cat(oks).float().mean().item() for kind, oks in right.items()}
    everything = torch.cat([ok for oks in right.values() for ok in oks])
    shares[f"{label}, broken picture (%)"] = 100 * torch.cat(sound).float().mean().item()
    return {f"{label}, pairs right (%)": 100 * everything.float().mean().item()} | shares


def unknown_words(device: str) -> list[tuple[str, tuple[str, ...]]]:
    """What the prior says of words outside its vocabulary."""
    return load_prior("toybox/sd", device).unknown_words("a crimsom mushrom beside a dragon")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(".toybox"), help="where held-out renders are kept")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--samples", type=int, default=256, help="captions to sample")
    parser.add_argument(
        "--only", nargs="*", default=[], choices=["vae", "attributes", "samples", "preference", "judge"]
    )
    args = parser.parse_args()
    wanted = args.only or ["vae", "attributes", "samples", "preference", "judge"]
    renders = Renders(args.work, HELDOUT_SEED, 1024, heldout=True)
    measured: dict[str, float] = {}
    if "vae" in wanted:
        measured["VAE PSNR (dB)"] = vae_psnr(renders, args.device)
    if "attributes" in wanted:
        shares = classifier_on_renders(renders, args.device)
        measured["classifier, facts right on renders (%)"] = shares["renders, facts right (%)"]
        measured |= shares
    if "samples" in wanted:
        scenes = [example.scene for example in renders.examples[: args.samples]]
        images = sample([world.caption(scene) for scene in scenes], args.device)
        measured |= facts_shares(facts_of(images, scenes), "samples")
    for name in ("preference", "judge"):
        if name in wanted:
            measured |= pair_accuracy(f"toybox/{name}", renders, args.device)
    for name, value in measured.items():
        bar = BARS.get(name)
        verdict = "" if bar is None else f"   bar {bar:g}: {'reached' if value >= bar else 'MISSED'}"
        print(f"{name:45s} {value:7.2f}{verdict}")
    print("unknown words:", unknown_words(args.device))


if __name__ == "__main__":
    main()
