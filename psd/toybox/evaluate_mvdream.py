"""Measure toybox/mvdream: `python -m psd.toybox.evaluate_mvdream`. Held-out combinations and unseen seeds only.

Four views of each caption are sampled together by DDIM, then read one by one by the classifier assets/toybox/views,
which psd.toybox.train_mvdream trains. Beside each number stands the same number of real renders: not everything that a
caption says is seen from behind, and the classifier errs too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from psd.export import to_uint8
from psd.guidance import cfg
from psd.models.hub import Source
from psd.models.priors import load_prior
from psd.models.priors.mvdream import MVDreamPrior
from psd.scene.cameras import Cameras, camera_embedding
from psd.toybox import world
from psd.toybox.classifier import AttributeClassifier, load_attributes
from psd.toybox.evaluate import HELDOUT_SEED, facts_shares
from psd.toybox.facts import check_facts, read_facts
from psd.toybox.instruments import load_instruments
from psd.toybox.models import make_scheduler
from psd.toybox.pairs import to_pixels
from psd.toybox.pictures import sheet
from psd.toybox.views import FOVY_DEG, VIEWS, Groups, read_azimuth, shows_azimuth

ELEVATION_DEG, DISTANCE = 15.0, 1.95  # of the sampled views
RENDERED = 256  # groups of held-out renders
SHOWN = 24  # groups on the contact sheet


def four_sides(groups: int) -> Cameras:
    """Azimuths 0, 90, 180, 270 plus one random offset a group; rows (group, view)."""
    offset = torch.from_numpy(np.random.default_rng(111).uniform(0, 360 / VIEWS, groups)).float()
    azimuth = (offset[:, None] + 360 / VIEWS * torch.arange(VIEWS)).flatten()
    same = torch.ones(len(azimuth))
    return Cameras.around(azimuth, ELEVATION_DEG * same, DISTANCE * same, FOVY_DEG * same)


@torch.no_grad()
def sample_views(
    prior: MVDreamPrior,
    captions: list[str],
    cameras: Cameras,
    gamma: float,
    steps: int = 30,
    batch: int = 8,
    negative: Float[Tensor, "L D"] | None = None,
) -> Float[Tensor, "G V 3 H W"]:
    """Images in [0, 1] by deterministic DDIM under CFG against `negative`, or the empty prompt; a seed per caption."""
    from tqdm.auto import tqdm

    scheduler, views, images = make_scheduler(), prior.views, []
    n = prior.embed([""])[0] if negative is None else negative.to(prior.device)
    scheduler.set_timesteps(steps)
    for start in tqdm(range(0, len(captions), batch), desc=f"sampling, gamma {gamma:g}", mininterval=5):
        part = captions[start : start + batch]
        noises = [
            torch.randn(views, *prior.latent_shape, generator=torch.Generator().manual_seed(1000 + start + i))
            for i in range(len(part))
        ]
        x = torch.cat(noises).to(prior.device)
        prompt, against = prior.embed(part).repeat_interleave(views, 0), n.expand(len(x), -1, -1)
        camera = camera_embedding(cameras[slice(start * views, start * views + len(x))].c2w).to(prior.device)
        for t in scheduler.timesteps:
            eps_y, eps_n = prior.eps(x, t, prompt, camera), prior.eps(x, t, against, camera)
            x = scheduler.step(cfg(eps_y, eps_n, gamma), t, x).prev_sample
        images.append(prior.decode(x).unflatten(0, (-1, views)))
    return torch.cat(images)


@torch.no_grad()
def measure_views(
    classifier: AttributeClassifier,
    images: Float[Tensor, "G V 3 H W"],
    scenes: list[world.Scene],
    azimuth_deg: Float[Tensor, "G V"],
) -> dict[str, float]:
    """Of single views: facts right in %. Of a group: whether its views agree on the kinds, and how they are turned.

    The azimuth is read off single objects of kinds that show it. Its step is that from each view to the next, the last
    back to the first: 90 degrees where the object is one, 0 where all views look alike.
    """
    views = images.shape[1]
    answers = [classifier(part) for part in images.flatten(0, 1).split(128)]
    log_probs = {name: torch.cat([answer[name] for answer in answers]) for name in answers[0]}
    seen_deg = read_azimuth(log_probs.pop("azimuth")).unflatten(0, (-1, views)).cpu()
    seen = [read_facts(log_probs, row) for row in range(len(scenes) * views)]
    held = [check_facts(scenes[row // views], facts) for row, facts in enumerate(seen)]
    kinds = [{frozenset((f["kind_a"], f["kind_b"])) for f in seen[i : i + views]} for i in range(0, len(seen), views)]
    shares = facts_shares(held, "views") | {"groups, one kind (%)": 100 * float(np.mean([len(k) == 1 for k in kinds]))}

    turned = [row for row, scene in enumerate(scenes) if shows_azimuth(scene)]
    seen_deg, asked_deg = seen_deg[turned], azimuth_deg[turned]
    off, step_off = wrapped(seen_deg - asked_deg), wrapped(seen_deg.roll(-1, 1) - seen_deg - 360 / views)
    return shares | {
        "azimuth, median error (deg)": off.median().item(),
        "azimuth, step's median error (deg)": step_off.median().item(),
        "azimuth, steps within 30 deg (%)": 100 * (step_off <= 30).float().mean().item(),
    }


@torch.no_grad()
def tastes_agree(images: Float[Tensor, "G V 3 H W"]) -> dict[str, float]:
    """Of each axis of taste: its standard deviation between the views of a group, by that between the groups."""
    instruments = load_instruments(str(images.device))
    read = torch.cat([instruments(part) for part in images.flatten(0, 1).split(128)]).unflatten(0, images.shape[:2])
    within, between = read.var(1).mean(0).sqrt(), read.mean(1).std(0)
    return {
        f"{axis}, spread in a group by that between": float(s) for axis, s in zip(instruments.axes, within / between)
    }


def wrapped(angle_deg: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """|angle| on the circle, in [0, 180]."""
    return ((angle_deg + 180) % 360 - 180).abs()


def real_views(classifier: AttributeClassifier, renders: Groups) -> dict[str, float]:
    """The same of clean held-out renders, whose azimuths and elevations are all there are."""
    images = renders.take(np.arange(renders.count))
    pixels = to_pixels(images.reshape(-1, *images.shape[2:]), classifier.device).unflatten(0, (-1, VIEWS))
    azimuths = torch.tensor([drawn.azimuth_deg for drawn in renders.groups])
    scenes = [drawn.scene for drawn in renders.groups]
    return measure_views(classifier, pixels, scenes, azimuths) | tastes_agree(pixels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(".toybox"), help="held-out renders; contact sheets go there")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    parser.add_argument("--samples", type=int, default=64, help="captions to sample, four views each")
    parser.add_argument("--gammas", type=float, nargs="+", default=[3.0, 5.0], help="guidance scales to try")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    classifier = load_attributes(args.device, Source("toybox/views"))
    renders = Groups(args.work, HELDOUT_SEED, RENDERED, heldout=True)
    measured = {"renders": real_views(classifier, renders)}

    prior = load_prior("toybox/mvdream", args.device)
    scenes = [drawn.scene for drawn in renders.groups[: args.samples]]
    captions, cameras = [world.caption(scene) for scene in scenes], four_sides(len(scenes))
    for gamma in args.gammas:
        images = sample_views(prior, captions, cameras, gamma)
        measured[f"gamma {gamma:g}"] = measure_views(
            classifier, images, scenes, cameras.azimuth_deg.unflatten(0, (-1, VIEWS))
        ) | tastes_agree(images)
        rows = [np.concatenate([to_uint8(view) for view in group], 1) for group in images[:SHOWN]]
        sheet(rows, captions[:SHOWN], 3).save(args.work / f"mvdream-gamma-{gamma:g}.png")
    print(f"{'':40s}", *(f"{name:>10s}" for name in measured))
    for name in dict.fromkeys(name for column in measured.values() for name in column):
        print(f"{name:40s}", *(f"{column[name]:10.2f}" if name in column else " " * 10 for column in measured.values()))


if __name__ == "__main__":
    main()
